/* tests/op_cases_pointwise.c - cases of graph/op_pointwise.c. */
#include "tests/op_cases.h"

static void unary(case_env *e, ipt_unary_kind k, int n, float a, float b)
{
    ipt_val x = case_in(e, "x", ipt_shape2(IPT_F32, 3, n));
    case_out(e, "y", ipt_unary(e->g, k, x, a, b));
}
static void silu(case_env *e) { unary(e, IPT_SILU, 64, 0, 0); }
static void silu_ragged(case_env *e) { unary(e, IPT_SILU, 37, 0, 0); }
static void gelu(case_env *e) { unary(e, IPT_GELU, 128, 0, 0); }
static void gelu_one(case_env *e) { unary(e, IPT_GELU, 1, 0, 0); }
static void quick_gelu(case_env *e) { unary(e, IPT_QUICK_GELU, 77, 0, 0); }
static void relu(case_env *e) { unary(e, IPT_RELU, 65, 0, 0); }
static void tanh_(case_env *e) { unary(e, IPT_TANH, 64, 0, 0); }
static void affine(case_env *e) { unary(e, IPT_AFFINE, 63, 2.5F, -0.75F); }

static void geglu(case_env *e, int n, int c)
{
    case_out(e, "y", ipt_geglu(e->g, case_in(e, "x", ipt_shape3(IPT_F32, 2, n, 2 * c))));
}
static void geglu_vec(case_env *e) { geglu(e, 7, 40); }
static void geglu_odd(case_env *e) { geglu(e, 5, 13); }

static void add_same(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, 2, 5, 12)),
            b = case_in(e, "b", ipt_shape3(IPT_F32, 2, 5, 12));
    case_out(e, "y", ipt_add_scaled(e->g, a, 0.5F, b, -2.0F));
}
static void add_rows(case_env *e) /* a position embedding */
{
    ipt_val a = case_in_f32(e, "a", ipt_shape3(IPT_F32, 2, 7, 9));
    case_out(e, "y", ipt_add_weight(e->g, a, "pos", ipt_shape2(IPT_F32, 7, 9)));
}
static void add_channel(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape4(IPT_F32, 2, 3, 5, 8)),
            b = case_in(e, "b", ipt_shape4(IPT_F32, 2, 1, 1, 8));
    case_out(e, "y", ipt_add(e->g, a, b));
}
static void add_tokens(case_env *e) /* a position embedding that stays f32 under f16 */
{
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, 2, 40, 9));
    case_out(e, "y", ipt_add_weight(e->g, a, "pos", ipt_shape2(IPT_F32, 40, 9)));
}
static void mul_lines(case_env *e) /* the broadcast axes lie between those that match */
{
    ipt_val a = case_in(e, "a", ipt_shape4(IPT_F32, 2, 3, 52, 8)),
            b = case_in(e, "b", ipt_shape4(IPT_F32, 2, 1, 52, 1));
    case_out(e, "y", ipt_mul(e->g, a, b));
}
static void mul_same(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape2(IPT_F32, 3, 11)),
            b = case_in(e, "b", ipt_shape2(IPT_F32, 3, 11));
    case_out(e, "y", ipt_mul(e->g, a, b));
}
static void mul_last(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, 2, 6, 5)),
            b = case_in(e, "b", ipt_shape3(IPT_F32, 2, 6, 1));
    case_out(e, "y", ipt_mul(e->g, a, b));
}
static void used_twice(case_env *e) /* gradients of the two uses add up; no reuse in place */
{
    ipt_val x = case_in(e, "x", ipt_shape2(IPT_F32, 4, 8));
    case_out(e, "y", ipt_add(e->g, ipt_mul(e->g, x, x), ipt_silu(e->g, x)));
}

static void sum_bias(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 2, 5, 7, 6));
    case_out(e, "y", ipt_sum_to(e->g, x, ipt_shape1(IPT_F32, 6)));
}
static void sum_long(case_env *e) /* two stages */
{
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 3, 700, 5));
    case_out(e, "y", ipt_sum_to(e->g, x, ipt_shape1(IPT_F32, 5)));
}
static void sum_middle(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 2, 3, 4, 5));
    case_out(e, "y", ipt_sum_to(e->g, x, ipt_shape4(e->act, 2, 1, 4, 1)));
}

static void sum_first(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 70, 3, 6));
    case_out(e, "y", ipt_sum_to(e->g, x, ipt_shape3(e->act, 1, 3, 6)));
}
static void sum_inner(case_env *e) /* two stages for each band of results */
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 1, 30, 530, 2));
    case_out(e, "y", ipt_sum_to(e->g, x, ipt_shape4(e->act, 1, 30, 1, 2)));
}

static void mse(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, 2, 37, 11)),
            b = case_in(e, "b", ipt_shape3(IPT_F32, 2, 37, 11));
    case_out(e, "y", ipt_mse(e->g, a, b));
}
static void mse_long(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape2(IPT_F32, 50, 101)),
            b = case_in(e, "b", ipt_shape2(IPT_F32, 50, 101));
    case_out(e, "y", ipt_mse(e->g, a, b));
}

const op_case op_cases_pointwise[] = {
    {"unary/silu", silu, true, 0, 0, 0},
    {"unary/silu_ragged", silu_ragged, true, 0, 0, 0},
    {"unary/gelu", gelu, true, 0, 0, 0},
    {"unary/gelu_one", gelu_one, true, 0, 0, 0},
    {"unary/quick_gelu", quick_gelu, true, 0, 0, 0},
    {"unary/relu", relu, true, 0, 0, 0},
    {"unary/tanh", tanh_, true, 0, 0, 0},
    {"unary/affine", affine, true, 0, 0, 0},
    {"geglu/vec", geglu_vec, true, 0, 0, 0},
    {"geglu/odd", geglu_odd, true, 0, 0, 0},
    {"add/same", add_same, true, 0, 0, 0},
    {"add/rows", add_rows, true, 0, 0, 0},
    {"add/channel", add_channel, true, 0, 0, 0},
    {"add/tokens", add_tokens, true, 0, 0, 0},
    {"mul/lines", mul_lines, true, 0, 0, 0},
    {"mul/same", mul_same, true, 0, 0, 0},
    {"mul/last", mul_last, true, 0, 0, 0},
    {"add/used_twice", used_twice, true, 0, 0, 0},
    {"sum_to/bias", sum_bias, true, 0, 0, 0},
    {"sum_to/long", sum_long, true, 0, 0, 0},
    {"sum_to/middle", sum_middle, true, 0, 0, 0},
    {"sum_to/first", sum_first, true, 0, 0, 0},
    {"sum_to/inner", sum_inner, true, 0, 0, 0},
    {"mse/small", mse, true, 0, 0, 0},
    {"mse/long", mse_long, true, 0, 0, 0},
    {NULL, NULL, false, 0, 0, 0},
};
