/* tests/op_cases_shape.c - cases of graph/op_shape.c. */
#include "tests/op_cases.h"

static void concat(case_env *e, int a, int b)
{
    ipt_val x = case_in(e, "a", ipt_shape4(IPT_F32, 2, 3, 5, a)),
            y = case_in(e, "b", ipt_shape4(IPT_F32, 2, 3, 5, b));
    case_out(e, "y", ipt_concat(e->g, x, y));
}
static void concat_vec(case_env *e) { concat(e, 8, 12); }
static void concat_odd(case_env *e) { concat(e, 3, 1); }
static void slice(case_env *e, int w, int start, int len)
{
    case_out(e, "y", ipt_slice(e->g, case_in(e, "x", ipt_shape3(IPT_F32, 2, 7, w)), start, len));
}
static void slice_vec(case_env *e) { slice(e, 24, 8, 12); }
static void slice_odd(case_env *e) { slice(e, 11, 3, 5); }
static void slice_all(case_env *e) { slice(e, 5, 0, 5); }

static void upsample(case_env *e, int h, int w, int c, int oh, int ow)
{
    case_out(e, "y", ipt_upsample(e->g, case_in(e, "x", ipt_shape4(IPT_F32, 2, h, w, c)), oh, ow));
}
static void upsample_twice(case_env *e) { upsample(e, 4, 3, 8, 8, 6); }
static void upsample_odd(case_env *e) { upsample(e, 3, 4, 5, 5, 7); }
static void upsample_same(case_env *e) { upsample(e, 3, 3, 1, 3, 3); }

static void reshape(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 2, 3, 5, 4));
    x = ipt_silu(e->g, ipt_reshape(e->g, x, ipt_shape3(e->act, 2, 15, 4)));
    case_out(e, "y", ipt_reshape(e->g, x, ipt_shape2(e->act, 30, 4)));
}
static void cast(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape2(IPT_F32, 7, 11));
    case_out(e, "y", ipt_cast(e->g, x, IPT_F32));
    case_out(e, "z", ipt_cast(e->g, ipt_silu(e->g, ipt_cast(e->g, x, IPT_F32)), e->act));
}
static void cast_long(case_env *e)
{
    ipt_val x = case_in_f32(e, "x", ipt_shape2(IPT_F32, 31, 37));
    case_out(e, "y", ipt_cast(e->g, ipt_silu(e->g, ipt_cast(e->g, x, e->act)), IPT_F32));
}
static void embedding(case_env *e, int n, int t, int v, int c)
{
    ipt_val ids = case_ids(e, "ids", ipt_shape2(IPT_I32, n, t), 0, v - 1);
    case_out(e, "y", ipt_embedding(e->g, ids, "table", v, c));
}
static void embedding_even(case_env *e) { embedding(e, 2, 9, 20, 8); }
static void embedding_odd(case_env *e) { embedding(e, 1, 77, 13, 5); }
static void embedding_outside(case_env *e) /* ids outside the table take row 0 */
{
    ipt_val ids = case_ids(e, "ids", ipt_shape2(IPT_I32, 2, 9), -3, 15);
    case_out(e, "y", ipt_embedding(e->g, ids, "table", 12, 4));
}
static void embedding_long(case_env *e) { embedding(e, 2, 150, 301, 8); }
static void embedding_table(case_env *e) { embedding(e, 1, 20, 301, 8); }
static void take_long(case_env *e)
{
    ipt_val idx = case_ids(e, "idx", ipt_shape1(IPT_I32, 12), 0, 29);
    case_out(e, "y", ipt_take_rows(e->g, case_in(e, "x", ipt_shape3(IPT_F32, 12, 30, 16)), idx));
}
static void take_rows(case_env *e)
{
    ipt_val idx = case_ids(e, "idx", ipt_shape1(IPT_I32, 3), 0, 6);
    case_out(e, "y", ipt_take_rows(e->g, case_in(e, "x", ipt_shape3(IPT_F32, 3, 7, 5)), idx));
}

const op_case op_cases_shape[] = {
    {"concat/vec", concat_vec, true, 0, 0, 0},
    {"concat/odd", concat_odd, true, 0, 0, 0},
    {"slice/vec", slice_vec, true, 0, 0, 0},
    {"slice/odd", slice_odd, true, 0, 0, 0},
    {"slice/all", slice_all, true, 0, 0, 0},
    {"upsample/twice", upsample_twice, true, 0, 0, 0},
    {"upsample/odd", upsample_odd, true, 0, 0, 0},
    {"upsample/same", upsample_same, true, 0, 0, 0},
    {"reshape", reshape, true, 0, 0, 0},
    {"cast", cast, true, 0, 0, 0},
    {"cast/long", cast_long, true, 0, 0, 0},
    {"embedding/even", embedding_even, true, 0, 0, 0},
    {"embedding/odd", embedding_odd, true, 0, 0, 0},
    {"embedding/outside", embedding_outside, true, 0, 0, 0},
    {"embedding/long", embedding_long, false, 0, 0, 0},
    {"embedding/table", embedding_table, true, 0, 0, 0},
    {"take_rows", take_rows, true, 0, 0, 0},
    {"take_rows/long", take_long, true, 0, 0, 0},
    {NULL, NULL, false, 0, 0, 0},
};
