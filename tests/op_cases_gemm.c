/* tests/op_cases_gemm.c - linear layers, matrix products, convolutions.  Sizes sit around the tiles
 * of the kernels (8, 16, 32, 64), quads (4) and panels (32 columns), plus primes, 1 and 77 tokens.
 * The gradient cases bring LINEAR_DX, MATMUL_NT, the transposed MATMUL, CONV2D_DX and CONV2D_DW. */
#include "tests/op_cases.h"

static const ipt_val no_val = {0};

/* x [n,t,k] -> [n,t,o] */
static void linear(case_env *e, int32_t n, int32_t t, int32_t k, int32_t o, bool bias,
                   bool residual)
{
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, n, t, k));
    ipt_val r = residual ? case_in(e, "r", ipt_shape3(IPT_F32, n, t, o)) : no_val;
    case_out(e, "y", ipt_linear_add(e->g, x, "layer", o, bias, r));
}
static void linear_one(case_env *e) { linear(e, 1, 1, 1, 1, true, true); }
static void linear_vector(case_env *e) { linear(e, 2, 1, 64, 40, true, false); }
static void linear_primes(case_env *e) { linear(e, 1, 13, 7, 5, true, true); }
static void linear_ragged_k(case_env *e) { linear(e, 1, 17, 30, 32, false, false); }
static void linear_ragged_o(case_env *e) { linear(e, 2, 9, 12, 33, true, true); }
static void linear_below(case_env *e) { linear(e, 1, 15, 16, 31, true, false); }
static void linear_tile(case_env *e) { linear(e, 1, 16, 32, 32, true, true); }
static void linear_above(case_env *e) { linear(e, 1, 65, 20, 68, false, true); }
static void linear_tokens(case_env *e) { linear(e, 2, 77, 96, 128, true, true); }
static void linear_deep(case_env *e) { linear(e, 1, 3, 1280, 36, true, false); }
static void linear_rows(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape2(IPT_F32, 33, 24));
    case_out(e, "y", ipt_linear(e->g, x, "layer", 20, true));
}
/* A trainable weight: row-major, not packed. */
static void linear_param(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape3(IPT_F32, 2, 9, 18));
    ipt_val w = case_in_f32(e, "w", ipt_shape2(IPT_F32, 21, 18));
    case_out(
        e, "y",
        ipt_emit(e->g, IPT_OP_LINEAR, "layer", (ipt_val[]){x, w, no_val, no_val}, 4, NULL, NULL));
}

/* a [n,t,k] b [k,o] */
static void matmul(case_env *e, int32_t n, int32_t t, int32_t k, int32_t o, bool residual)
{
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, n, t, k));
    ipt_val b = case_in_f32(e, "b", ipt_shape2(IPT_F32, k, o));
    ipt_val r = residual ? case_in(e, "r", ipt_shape3(IPT_F32, n, t, o)) : no_val;
    case_out(e, "c", ipt_matmul(e->g, a, b, r));
}
static void matmul_one(case_env *e) { matmul(e, 1, 1, 1, 1, false); }
static void matmul_rank4(case_env *e) { matmul(e, 2, 77, 64, 4, false); }
static void matmul_up(case_env *e) { matmul(e, 2, 33, 12, 64, true); }
static void matmul_primes(case_env *e) { matmul(e, 1, 11, 19, 23, true); }
static void matmul_transposed(case_env *e)
{
    const ipt_attr ta = {.matmul = {.ta = 1}};
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, 2, 17, 21));
    ipt_val b = case_in(e, "b", ipt_shape2(IPT_F32, 34, 10));
    case_out(e, "c", ipt_emit(e->g, IPT_OP_MATMUL, NULL, (ipt_val[]){a, b}, 2, &ta, NULL));
}
static void matmul_nt(case_env *e)
{
    ipt_val a = case_in(e, "a", ipt_shape3(IPT_F32, 2, 15, 22));
    ipt_val b = case_in(e, "b", ipt_shape2(IPT_F32, 35, 22));
    case_out(e, "c", ipt_emit(e->g, IPT_OP_MATMUL_NT, NULL, (ipt_val[]){a, b}, 2, NULL, NULL));
}

/* x [n,h,w,i] -> o channels; extra: t and residual too */
typedef struct conv_case {
    int32_t n, h, w, i, o;
    ipt_conv c;
    bool extra;
} conv_case;
static void conv(case_env *e, conv_case k)
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, k.n, k.h, k.w, k.i)), t = no_val, r = no_val;
    if (k.extra) {
        const int32_t vh = k.c.up_h > 0 ? k.c.up_h : k.h, vw = k.c.up_w > 0 ? k.c.up_w : k.w;
        const int32_t oh = (vh + k.c.pad_lo + k.c.pad_hi - k.c.kernel) / k.c.stride + 1;
        const int32_t ow = (vw + k.c.pad_lo + k.c.pad_hi - k.c.kernel) / k.c.stride + 1;
        t = case_in(e, "t", ipt_shape2(IPT_F32, k.n, k.o));
        r = case_in(e, "r", ipt_shape4(IPT_F32, k.n, oh, ow, k.o));
    }
    case_out(e, "y", ipt_conv2d_add(e->g, x, "conv", k.o, k.c, t, r));
}
#define CONV3                                                                                      \
    {                                                                                              \
        .kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1                                         \
    }
static void conv_one(case_env *e)
{
    conv(e, (conv_case){1, 1, 1, 1, 1, {.kernel = 1, .stride = 1}, true});
}
static void conv_1x1(case_env *e)
{
    conv(e, (conv_case){2, 5, 7, 20, 36, {.kernel = 1, .stride = 1}, true});
}
static void conv_3x3(case_env *e) { conv(e, (conv_case){1, 8, 8, 16, 32, CONV3, false}); }
static void conv_batch(case_env *e) { conv(e, (conv_case){3, 5, 3, 8, 12, CONV3, true}); }
static void conv_rgb_in(case_env *e) { conv(e, (conv_case){1, 9, 7, 3, 8, CONV3, false}); }
static void conv_rgb_out(case_env *e) { conv(e, (conv_case){2, 6, 5, 8, 3, CONV3, true}); }
static void conv_primes(case_env *e) { conv(e, (conv_case){1, 7, 5, 11, 13, CONV3, true}); }
static void conv_wide(case_env *e) { conv(e, (conv_case){1, 4, 17, 64, 65, CONV3, false}); }
static void conv_thin(case_env *e) { conv(e, (conv_case){1, 1, 2, 4, 4, CONV3, false}); }
static void conv_valid(case_env *e)
{
    conv(e, (conv_case){1, 6, 6, 8, 8, {.kernel = 3, .stride = 1}, false});
}
static void conv_stride(case_env *e)
{
    conv(e,
         (conv_case){2, 8, 7, 12, 16, {.kernel = 3, .stride = 2, .pad_lo = 1, .pad_hi = 1}, false});
}
static void conv_stride_right(case_env *e) /* the VAE's downsampling pads right and bottom only */
{
    conv(e,
         (conv_case){1, 8, 9, 8, 12, {.kernel = 3, .stride = 2, .pad_lo = 0, .pad_hi = 1}, false});
}
static void conv_stride_1x1(case_env *e)
{
    conv(e, (conv_case){1, 7, 6, 8, 8, {.kernel = 1, .stride = 2}, false});
}
static void conv_patch(case_env *e)
{
    conv(e, (conv_case){1, 8, 8, 3, 16, {.kernel = 4, .stride = 4}, false});
}
static void conv_up(case_env *e)
{
    conv(e, (conv_case){2,
                        4,
                        3,
                        8,
                        12,
                        {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, .up_h = 8, .up_w = 6},
                        false});
}
static void conv_up_odd(case_env *e)
{
    conv(e, (conv_case){1,
                        4,
                        5,
                        12,
                        8,
                        {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, .up_h = 7, .up_w = 9},
                        true});
}
/* Large enough for Winograd's method: tiles that end inside and at the edge, several panels. */
static void conv_tiles(case_env *e) { conv(e, (conv_case){2, 18, 21, 36, 68, CONV3, true}); }
static void conv_tiles_even(case_env *e) { conv(e, (conv_case){1, 16, 24, 64, 32, CONV3, false}); }
static void conv_tiles_up(case_env *e)
{
    conv(e,
         (conv_case){1,
                     9,
                     8,
                     40,
                     64,
                     {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, .up_h = 18, .up_w = 17},
                     true});
}
/* Depths of whole q8 blocks, columns for several bands of panels. */
static void linear_blocks(case_env *e) { linear(e, 2, 19, 96, 161, true, true); }
static void conv_blocks(case_env *e) { conv(e, (conv_case){2, 6, 5, 32, 40, CONV3, true}); }
static void conv_blocks_1x1(case_env *e)
{
    conv(e, (conv_case){2, 5, 3, 64, 36, {.kernel = 1, .stride = 1}, true});
}
static void conv_blocks_stride(case_env *e)
{
    conv(e,
         (conv_case){1, 7, 8, 64, 35, {.kernel = 3, .stride = 2, .pad_lo = 1, .pad_hi = 1}, false});
}
static void conv_blocks_up(case_env *e)
{
    conv(e, (conv_case){1,
                        4,
                        5,
                        32,
                        36,
                        {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, .up_h = 8, .up_w = 9},
                        true});
}
static void conv_blocks_tiles(case_env *e) { conv(e, (conv_case){2, 18, 21, 96, 68, CONV3, true}); }
/* Plain leaves: the trainable kernel, [k k i, o] and [o,k,k,i]. */
static void conv_leaf(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 2, 5, 6, 10));
    ipt_val w = case_in_f32(e, "w", ipt_shape2(IPT_F32, 90, 4));
    case_out(e, "y", ipt_conv2d_leaf(e->g, x, w, (ipt_conv)CONV3));
}
static void conv_leaf_stride(case_env *e)
{
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 1, 7, 8, 6));
    ipt_val w = case_in_f32(e, "w", ipt_shape2(IPT_F32, 54, 7));
    const ipt_conv c = {.kernel = 3, .stride = 2, .pad_lo = 1, .pad_hi = 1};
    case_out(e, "y", ipt_conv2d_leaf(e->g, x, w, c));
}
static void conv_param(case_env *e)
{
    const ipt_attr attr = {.conv = CONV3};
    ipt_val x = case_in(e, "x", ipt_shape4(IPT_F32, 1, 4, 5, 6));
    ipt_val w = case_in_f32(e, "w", ipt_shape4(IPT_F32, 9, 3, 3, 6));
    case_out(e, "y", ipt_emit(e->g, IPT_OP_CONV2D, "conv", (ipt_val[]){x, w}, 2, &attr, NULL));
}

const op_case op_cases_gemm[] = {
    {"linear/one", linear_one, true, 0, 0, 0},
    {"linear/vector", linear_vector, true, 0, 0, 0},
    {"linear/primes", linear_primes, true, 0, 0, 0},
    {"linear/ragged-k", linear_ragged_k, true, 0, 0, 0},
    {"linear/ragged-o", linear_ragged_o, true, 0, 0, 0},
    {"linear/below", linear_below, true, 0, 0, 0},
    {"linear/tile", linear_tile, true, 0, 0, 0},
    {"linear/above", linear_above, true, 0, 0, 0},
    {"linear/tokens", linear_tokens, false, 0, 0, 0},
    {"linear/deep", linear_deep, false, 0, 0, 0},
    {"linear/rows", linear_rows, true, 0, 0, 0},
    {"linear/param", linear_param, true, 0, 0, 0},
    {"matmul/one", matmul_one, true, 0, 0, 0},
    {"matmul/rank4", matmul_rank4, true, 0, 0, 0},
    {"matmul/up", matmul_up, true, 0, 0, 0},
    {"matmul/primes", matmul_primes, true, 0, 0, 0},
    {"matmul/transposed", matmul_transposed, true, 0, 0, 0},
    {"matmul/nt", matmul_nt, true, 0, 0, 0},
    {"conv2d/one", conv_one, true, 0, 0, 0},
    {"conv2d/1x1", conv_1x1, true, 0, 0, 0},
    {"conv2d/3x3", conv_3x3, true, 0, 0, 0},
    {"conv2d/batch", conv_batch, true, 0, 0, 0},
    {"conv2d/rgb-in", conv_rgb_in, true, 0, 0, 0},
    {"conv2d/rgb-out", conv_rgb_out, true, 0, 0, 0},
    {"conv2d/primes", conv_primes, true, 0, 0, 0},
    {"conv2d/wide", conv_wide, false, 0, 0, 0},
    {"conv2d/thin", conv_thin, true, 0, 0, 0},
    {"conv2d/valid", conv_valid, true, 0, 0, 0},
    {"conv2d/stride", conv_stride, true, 0, 0, 0},
    {"conv2d/stride-right", conv_stride_right, true, 0, 0, 0},
    {"conv2d/stride-1x1", conv_stride_1x1, true, 0, 0, 0},
    {"conv2d/patch", conv_patch, true, 0, 0, 0},
    {"conv2d/up", conv_up, true, 0, 0, 0},
    {"conv2d/up-odd", conv_up_odd, true, 0, 0, 0},
    {"conv2d/tiles", conv_tiles, false, 0, 0, 0},
    {"conv2d/tiles-even", conv_tiles_even, false, 0, 0, 0},
    {"conv2d/tiles-up", conv_tiles_up, false, 0, 0, 0},
    {"linear/blocks", linear_blocks, true, 0, 0, 0},
    {"conv2d/blocks", conv_blocks, true, 0, 0, 0},
    {"conv2d/blocks-1x1", conv_blocks_1x1, true, 0, 0, 0},
    {"conv2d/blocks-stride", conv_blocks_stride, true, 0, 0, 0},
    {"conv2d/blocks-up", conv_blocks_up, true, 0, 0, 0},
    {"conv2d/blocks-tiles", conv_blocks_tiles, false, 0, 0, 0},
    {"conv2d/leaf", conv_leaf, true, 0, 0, 0},
    {"conv2d/leaf-stride", conv_leaf_stride, true, 0, 0, 0},
    {"conv2d/param", conv_param, true, 0, 0, 0},
    {NULL, NULL, false, 0, 0, 0},
};
