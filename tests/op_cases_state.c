/* tests/op_cases_state.c - cases of graph/op_state.c, and of dot. */
#include "tests/op_cases.h"

static void dot(case_env *e)
{
    case_out(e, "y",
             ipt_dot(e->g, case_in(e, "a", ipt_shape3(IPT_F32, 3, 7, 11)),
                     case_in(e, "b", ipt_shape3(IPT_F32, 3, 7, 11))));
}
static void dot_long(case_env *e)
{
    case_out(e, "y",
             ipt_dot(e->g, case_in(e, "a", ipt_shape2(IPT_F32, 3, 5000)),
                     case_in(e, "b", ipt_shape2(IPT_F32, 3, 5000))));
}
static void dot_own(case_env *e) /* a norm */
{
    ipt_val a = case_in(e, "a", ipt_shape1(IPT_F32, 77));
    case_out_nograd(e, "y", ipt_dot(e->g, a, a));
}

/* What reads the leaf before sees the old values, what reads it later the new ones. */
static void store(case_env *e)
{
    ipt_val leaf = case_in(e, "leaf", ipt_shape2(IPT_F32, 5, 13)),
            v = case_in(e, "v", ipt_shape2(IPT_F32, 5, 13));
    case_out_nograd(e, "before", ipt_unary(e->g, IPT_AFFINE, leaf, 2, 0));
    ipt_put(e->g, leaf, ipt_silu(e->g, v));
    case_out_nograd(e, "after", ipt_unary(e->g, IPT_AFFINE, leaf, 3, 0));
    ipt_put(e->g, leaf, v);
    case_out_nograd(e, "leaf_then", leaf);
}
static void store_cast(case_env *e) /* masters in f32 */
{
    ipt_val leaf = case_in(e, "leaf", ipt_shape1(IPT_F32, 130)),
            v = case_in_f32(e, "v", ipt_shape1(IPT_F32, 130)),
            back = case_in_f32(e, "back", ipt_shape1(IPT_F32, 130));
    ipt_put(e->g, leaf, v);
    ipt_put(e->g, back, leaf);
    case_out_nograd(e, "leaf_then", leaf);
    case_out_nograd(e, "back_then", back);
}
static void clear(case_env *e)
{
    ipt_val leaf = case_in_f32(e, "leaf", ipt_shape1(IPT_F32, 131));
    case_out_nograd(e, "before", ipt_unary(e->g, IPT_AFFINE, leaf, 2, 0));
    ipt_put(e->g, leaf, (ipt_val){0});
    case_out_nograd(e, "after", ipt_unary(e->g, IPT_AFFINE, leaf, 2, 1));
}
static void accumulate(case_env *e)
{
    ipt_val sum = case_in_f32(e, "sum", ipt_shape2(IPT_F32, 9, 21)),
            v = case_in(e, "v", ipt_shape2(IPT_F32, 9, 21));
    ipt_accumulate(e->g, sum, v);
    ipt_accumulate(e->g, sum, ipt_silu(e->g, v));
    case_out_nograd(e, "sum_then", sum);
}
static void adamw(case_env *e)
{
    const ipt_shape s = ipt_shape2(IPT_F32, 7, 33);
    ipt_val w = case_in_f32(e, "w", s), d = case_in_f32(e, "d", s), m = case_in_f32(e, "m", s),
            v = case_in_f32(e, "v", s), h = case_in_f32(e, "h", ipt_shape1(IPT_F32, 8));
    ipt_put(e->g, v, ipt_mul(e->g, v, v)); /* never negative */
    h = ipt_mul(e->g, h, h);               /* b1 and b2 may be above 1: any number will do */
    h = ipt_add_scaled(e->g, ipt_unary(e->g, IPT_TANH, h, 0, 0), 0.9F, h, 0.0F);
    ipt_adamw(e->g, w, d, m, v, h);
    case_out_nograd(e, "w_then", w);
    case_out_nograd(e, "m_then", m);
    case_out_nograd(e, "v_then", v);
}

const op_case op_cases_state[] = {{"dot/ragged", dot, true, 0, 0, 0},
                                  {"dot/long", dot_long, true, 0, 0, 0},
                                  {"dot/own", dot_own, false, 0, 0, 0},
                                  {"store/twice", store, false, 0, 0, 0},
                                  {"store/cast", store_cast, false, 0, 0, 0},
                                  {"store/clear", clear, false, 0, 0, 0},
                                  {"accumulate/twice", accumulate, false, 0, 0, 0},
                                  {"adamw/step", adamw, false, 0, 0, 0},
                                  {NULL, NULL, false, 0, 0, 0}};
