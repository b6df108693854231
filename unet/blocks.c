/* unet/blocks.c - residual block and spatial transformer.
 * Source: diffusers ResnetBlock2D, Transformer2DModel, BasicTransformerBlock. */
#include "unet/blocks.h"

enum { NAME = 192 };
static const float TRANSFORMER_NORM_EPS = 1e-6F; /* fixed in Transformer2DModel */

ipt_val ipt_unet_resnet(ipt_graph *g, const ipt_unet_config *c, ipt_val x, ipt_val temb,
                        const char *at, int32_t out, float scale)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "%s." leaf, at)
    const ipt_conv same = {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1};
    const ipt_conv point = {.kernel = 1, .stride = 1};
    ipt_shape xs = ipt_shape_of(g, x);
    ipt_val h = ipt_group_norm(g, x, AT("norm1"), c->norm_groups, c->norm_eps, true);
    ipt_val t = ipt_linear(g, temb, AT("time_emb_proj"), out, true);
    h = ipt_conv2d_add(g, h, AT("conv1"), out, same, t, (ipt_val){0});
    h = ipt_group_norm(g, h, AT("norm2"), c->norm_groups, c->norm_eps, true);
    if (xs.dim[3] != out)
        x = ipt_conv2d(g, x, AT("conv_shortcut"), out, point);
    h = ipt_conv2d_add(g, h, AT("conv2"), out, same, (ipt_val){0}, x);
#undef AT
    return scale == 1.0F ? h : ipt_unary(g, IPT_AFFINE, h, 1.0F / scale, 0.0F);
}

static void tap(ipt_graph *g, ipt_val probs, ipt_taps *t)
{
    ipt_shape one = ipt_shape_of(g, probs);
    const float heads = (float)one.dim[1];
    one.dim[1] = 1;
    ipt_val mean = ipt_sum_to(g, probs, one);
    mean = ipt_unary(g, IPT_AFFINE, ipt_cast(g, mean, IPT_F32), 1.0F / heads, 0.0F);
    t->sum = t->n++ ? ipt_add(g, t->sum, mean) : mean;
}

/* Attention of q to text k; taps NULL: its probabilities are not kept. */
static ipt_val look_at(ipt_graph *g, ipt_val q, const ipt_context *text, int32_t k, const char *at,
                       int32_t heads, ipt_taps *taps)
{
    char s[NAME], gates[32];
    int32_t width = ipt_shape_of(g, q).dim[2];
    ipt_name(gates, sizeof gates, "gates_%d", k);
    if (text->n > 1) /* as long as texts and gates stay what they are */
        ipt_early(g, true);
    ipt_graph_gates(g, text->has_gates ? gates : NULL, false); /* tokens have no place */
    ipt_val key = ipt_linear(g, text->text[k], ipt_name(s, sizeof s, "%s.to_k", at), width, false);
    ipt_val v = ipt_linear(g, text->text[k], ipt_name(s, sizeof s, "%s.to_v", at), width, false);
    if (text->n > 1)
        ipt_early(g, false);
    ipt_graph_gates(g, NULL, text->is_placed);
    ipt_val probs = {0},
            o = ipt_attention(g, q, key, v, (ipt_attn){.heads = heads}, taps ? &probs : NULL);
    if (taps && probs.id)
        tap(g, probs, taps);
    return o;
}

/* The sum over texts of what each says times its share of the place. */
static ipt_val look_at_all(ipt_graph *g, ipt_val q, const ipt_context *text, const char *at,
                           int32_t heads, ipt_taps *taps)
{
    ipt_val sum = {0};
    ipt_shape qs = ipt_shape_of(g, q);
    char name[48];
    for (int32_t k = 0; k < text->n; k++) {
        ipt_val o = look_at(g, q, text, k, at, heads, taps);
        if (text->n == 1)
            return o;
        ipt_name(name, sizeof name, "share%d_%d", k, qs.dim[1]);
        sum = ipt_share(g, o, ipt_leaf(g, IPT_INPUT, name, ipt_shape1(IPT_F32, qs.dim[1])), sum);
    }
    return sum;
}

/* x [N,T,C] + out(attention(q(x_norm), k(context), v(context))); text NULL: x_norm is the context.
 */
static ipt_val attend(ipt_graph *g, ipt_val x, ipt_val normed, const ipt_context *text,
                      const char *at, int32_t heads, ipt_taps *taps)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "%s." leaf, at)
    int32_t width = ipt_shape_of(g, x).dim[2];
    ipt_val q = ipt_linear(g, normed, AT("to_q"), width, false), o = {0};
    if (text) {
        o = look_at_all(g, q, text, at, heads, taps);
    } else {
        ipt_val k = ipt_linear(g, normed, AT("to_k"), width, false);
        ipt_val v = ipt_linear(g, normed, AT("to_v"), width, false);
        o = ipt_attention(g, q, k, v, (ipt_attn){.heads = heads}, NULL);
    }
    x = ipt_linear_add(g, o, AT("to_out.0"), width, true, x);
#undef AT
    return x;
}

static ipt_val basic_block(ipt_graph *g, ipt_val x, const ipt_context *text, const char *at,
                           const ipt_transformer *t)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "%s." leaf, at)
    int32_t width = ipt_shape_of(g, x).dim[2];
    ipt_val n = ipt_layer_norm(g, x, AT("norm1"), 1e-5F);
    x = attend(g, x, n, t->only_cross ? text : NULL, AT("attn1"), t->heads, NULL);
    n = ipt_layer_norm(g, x, AT("norm2"), 1e-5F);
    x = attend(g, x, n, text, AT("attn2"), t->heads, t->taps);
    n = ipt_layer_norm(g, x, AT("norm3"), 1e-5F);
    n = ipt_geglu(g, ipt_linear(g, n, AT("ff.net.0.proj"), 8 * width, true));
    x = ipt_linear_add(g, n, AT("ff.net.2"), width, true, x);
#undef AT
    return x;
}

ipt_val ipt_unet_transformer(ipt_graph *g, const ipt_unet_config *c, ipt_val x,
                             const ipt_context *text, const char *at, const ipt_transformer *t)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "%s." leaf, at)
    ipt_shape xs = ipt_shape_of(g, x);
    ipt_shape tokens = ipt_shape3(xs.dtype, xs.dim[0], xs.dim[1] * xs.dim[2], xs.dim[3]);
    ipt_val residual = ipt_reshape(g, x, tokens);
    ipt_val h = ipt_group_norm(g, x, AT("norm"), c->norm_groups, TRANSFORMER_NORM_EPS, false);
    /* a 1x1 convolution (SD 1.x) and a linear map (SD 2.x, SDXL) are the same product */
    h = ipt_linear(g, ipt_reshape(g, h, tokens), AT("proj_in"), xs.dim[3], true);
    for (int32_t i = 0; i < t->depth; i++) {
        ipt_name(s, sizeof s, "%s.transformer_blocks.%d", at, i);
        h = basic_block(g, h, text, s, t);
    }
    h = ipt_linear_add(g, h, AT("proj_out"), xs.dim[3], true, residual);
#undef AT
    return ipt_reshape(g, h, xs);
}
