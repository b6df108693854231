/* tests/op_cases_norm.c - group norm and layer norm over groups, ragged sizes and large means. */
#include "tests/op_cases.h"

typedef struct norm_size {
    int n, h, w, c, groups; /* h 0: tokens [n,w,c] */
    bool silu;
    float mean; /* added to x */
} norm_size;

static ipt_val input(case_env *e, norm_size a)
{
    ipt_shape s =
        a.h ? ipt_shape4(IPT_F32, a.n, a.h, a.w, a.c) : ipt_shape3(IPT_F32, a.n, a.w, a.c);
    if (!(a.mean > 0))
        return case_in(e, "x", s);
    return ipt_unary(e->g, IPT_AFFINE, case_in(e, "x", s), 1, a.mean);
}

static void group(case_env *e, norm_size a)
{
    ipt_shape c = ipt_shape1(IPT_F32, a.c);
    ipt_val in[3] = {input(e, a), case_in_f32(e, "gamma", c), case_in_f32(e, "beta", c)};
    ipt_attr attr = {.norm = {a.groups, 1e-5F, a.silu}};
    ipt_val out[2] = {{0}, {0}};
    ipt_emit(e->g, IPT_OP_GROUP_NORM, "norm", in, 3, &attr, out);
    case_out(e, "y", out[0]);
    case_out_nograd(e, "stat", out[1]);
}

static void layer(case_env *e, norm_size a)
{
    ipt_shape c = ipt_shape1(IPT_F32, a.c);
    ipt_val in[3] = {input(e, a), case_in_f32(e, "gamma", c), case_in_f32(e, "beta", c)};
    ipt_attr attr = {.norm = {.eps = 1e-5F}};
    case_out(e, "y", ipt_emit(e->g, IPT_OP_LAYER_NORM, "norm", in, 3, &attr, NULL));
}

#define GROUP(id, ...)                                                                             \
    static void id(case_env *e) { group(e, (norm_size){__VA_ARGS__}); }
#define LAYER(id, ...)                                                                             \
    static void id(case_env *e) { layer(e, (norm_size){__VA_ARGS__}); }
/*              n  h   w   c    groups silu mean */
GROUP(group_one, 1, 1, 2, 1, 1, false, 0)
GROUP(group_each, 2, 3, 5, 6, 6, false, 0)
GROUP(group_two, 2, 4, 3, 8, 2, true, 0)
GROUP(group_whole, 1, 5, 7, 12, 1, true, 0)
GROUP(group_per3, 1, 7, 3, 9, 3, true, 0)
GROUP(group_per10, 2, 9, 11, 40, 4, true, 0)
GROUP(group_odd, 1, 37, 29, 15, 5, false, 0)
GROUP(group_tokens, 2, 0, 33, 20, 5, false, 0)
GROUP(group_wide, 1, 16, 16, 320, 32, true, 0)
GROUP(group_chunks, 1, 97, 101, 8, 4, true, 0)
GROUP(group_mean, 1, 31, 33, 16, 4, false, 1000)
GROUP(group_mean_scalar, 1, 31, 33, 6, 2, true, 1000)
LAYER(layer_two, 1, 0, 3, 2, 0, false, 0)
LAYER(layer_odd, 2, 0, 5, 7, 0, false, 0)
LAYER(layer_four, 2, 3, 5, 12, 0, false, 0)
LAYER(layer_768, 1, 0, 77, 768, 0, false, 0)
LAYER(layer_321, 1, 0, 40, 321, 0, false, 0)
LAYER(layer_long, 2, 0, 75, 8, 0, false, 0)
LAYER(layer_mean, 1, 0, 9, 64, 0, false, 1000)
LAYER(layer_mean_odd, 1, 0, 9, 63, 0, false, 1000)

static void built(case_env *e) /* weights by name */
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 1, 3, 4, 8));
    ipt_val y = ipt_group_norm(e->g, x, "block.norm1", 4, 1e-6F, true);
    case_out(e, "y", ipt_layer_norm(e->g, y, "block.norm2", 1e-5F));
}

const op_case op_cases_norm[] = {
    {.name = "group_norm/one", .build = group_one},
    {.name = "group_norm/each", .build = group_each, .grad = true},
    {.name = "group_norm/two", .build = group_two, .grad = true},
    {.name = "group_norm/whole", .build = group_whole, .grad = true},
    {.name = "group_norm/per3", .build = group_per3, .grad = true},
    {.name = "group_norm/per10", .build = group_per10},
    {.name = "group_norm/odd", .build = group_odd},
    {.name = "group_norm/tokens", .build = group_tokens, .grad = true},
    {.name = "group_norm/wide", .build = group_wide},
    {.name = "group_norm/chunks", .build = group_chunks},
    /* x + 1000 is stored in 24 (11) bits before it is normalised: the input itself is rounded. */
    {.name = "group_norm/mean", .build = group_mean, .nmse_f32 = 1e-8, .nmse_f16 = 1e-1},
    {.name = "group_norm/mean_scalar",
     .build = group_mean_scalar,
     .nmse_f32 = 1e-8,
     .nmse_f16 = 1e-1},
    {.name = "layer_norm/two", .build = layer_two},
    {.name = "layer_norm/odd", .build = layer_odd, .grad = true},
    {.name = "layer_norm/four", .build = layer_four, .grad = true},
    {.name = "layer_norm/768", .build = layer_768},
    {.name = "layer_norm/321", .build = layer_321},
    {.name = "layer_norm/long", .build = layer_long, .grad = true},
    {.name = "layer_norm/mean", .build = layer_mean, .nmse_f32 = 1e-8, .nmse_f16 = 1e-1},
    {.name = "layer_norm/mean_odd", .build = layer_mean_odd, .nmse_f32 = 1e-8, .nmse_f16 = 1e-1},
    {.name = "norm/built", .build = built, .grad = true},
    {.name = NULL},
};
