/* vae/vae.c - AutoencoderKL and the tiny decoder.
 * Details that have caused bugs: the encoder's downsampler pads right and bottom only; the decoder
 * has one resnet a level more than the encoder; the middle attention has one head as wide as the
 * level. */
#include "vae/vae.h"

enum { NAME = 128 };
static const float NORM_EPS = 1e-6F;
static const ipt_conv SAME = {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1};
static const ipt_conv POINT = {.kernel = 1, .stride = 1};

int32_t ipt_vae_factor(const ipt_vae_config *c) { return c->tiny ? 8 : 1 << (c->n_level - 1); }

static ipt_val resnet(ipt_graph *g, const ipt_vae_config *c, ipt_val x, const char *at, int32_t out)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "%s." leaf, at)
    int32_t in = ipt_shape_of(g, x).dim[3];
    ipt_val h, from = x;
    if (in !=
        out) /* first, so that the norm may take the place of x: the largest values there are */
        from = ipt_conv2d(g, x, AT("conv_shortcut"), out, POINT);
    h = ipt_group_norm(g, x, AT("norm1"), c->norm_groups, NORM_EPS, true);
    h = ipt_conv2d(g, h, AT("conv1"), out, SAME);
    h = ipt_group_norm(g, h, AT("norm2"), c->norm_groups, NORM_EPS, true);
    h = ipt_conv2d_add(g, h, AT("conv2"), out, SAME, (ipt_val){0}, from);
#undef AT
    return h;
}

static ipt_val mid_block(ipt_graph *g, const ipt_vae_config *c, ipt_val x, const char *at,
                         int32_t width)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "%s." leaf, at)
    x = resnet(g, c, x, AT("mid_block.resnets.0"), width);
    if (c->mid_attn) {
        ipt_shape xs = ipt_shape_of(g, x);
        ipt_shape tokens = ipt_shape3(xs.dtype, xs.dim[0], xs.dim[1] * xs.dim[2], xs.dim[3]);
        ipt_val residual = ipt_reshape(g, x, tokens);
        ipt_val h = ipt_group_norm(g, x, AT("mid_block.attentions.0.group_norm"), c->norm_groups,
                                   NORM_EPS, false);
        h = ipt_reshape(g, h, tokens);
        ipt_val q = ipt_linear(g, h, AT("mid_block.attentions.0.to_q"), width, true);
        ipt_val k = ipt_linear(g, h, AT("mid_block.attentions.0.to_k"), width, true);
        ipt_val v = ipt_linear(g, h, AT("mid_block.attentions.0.to_v"), width, true);
        h = ipt_attention(g, q, k, v, (ipt_attn){.heads = 1}, NULL);
        h = ipt_linear_add(g, h, AT("mid_block.attentions.0.to_out.0"), width, true, residual);
        x = ipt_reshape(g, h, xs);
    }
    x = resnet(g, c, x, AT("mid_block.resnets.1"), width);
#undef AT
    return x;
}

ipt_val ipt_vae_decode_build(ipt_graph *g, const ipt_vae_config *c, int32_t n, int32_t h, int32_t w,
                             ipt_dtype act)
{
    char s[NAME];
    int last = c->n_level - 1;
    ipt_val x = ipt_leaf(g, IPT_INPUT, "z", ipt_shape4(IPT_F32, n, h, w, c->latent_channels));
    x = ipt_cast(g, x, act);
    if (c->has_post_quant_conv)
        x = ipt_conv2d(g, x, "post_quant_conv", c->latent_channels, POINT);
    x = ipt_conv2d(g, x, "decoder.conv_in", c->channels[last], SAME);
    x = mid_block(g, c, x, "decoder", c->channels[last]);
    for (int i = 0; i < c->n_level; i++) {
        int32_t width = c->channels[last - i];
        for (int j = 0; j < c->n_layer + 1; j++) {
            ipt_name(s, sizeof s, "decoder.up_blocks.%d.resnets.%d", i, j);
            x = resnet(g, c, x, s, width);
        }
        if (i < last) {
            ipt_shape xs = ipt_shape_of(g, x);
            ipt_conv up = SAME;
            up.up_h = 2 * xs.dim[1];
            up.up_w = 2 * xs.dim[2];
            ipt_name(s, sizeof s, "decoder.up_blocks.%d.upsamplers.0.conv", i);
            x = ipt_conv2d(g, x, s, width, up);
        }
    }
    x = ipt_group_norm(g, x, "decoder.conv_norm_out", c->norm_groups, NORM_EPS, true);
    x = ipt_conv2d(g, x, "decoder.conv_out", c->out_channels, SAME);
    ipt_output(g, "rgb", ipt_cast(g, x, IPT_F32));
    return ipt_find(g, "rgb");
}

ipt_val ipt_vae_encode_build(ipt_graph *g, const ipt_vae_config *c, int32_t n, int32_t h, int32_t w,
                             ipt_dtype act)
{
    char s[NAME];
    int last = c->n_level - 1;
    ipt_val x = ipt_leaf(g, IPT_INPUT, "picture", ipt_shape4(IPT_F32, n, h, w, c->in_channels));
    x = ipt_conv2d(g, ipt_cast(g, x, act), "encoder.conv_in", c->channels[0], SAME);
    for (int i = 0; i < c->n_level; i++) {
        for (int j = 0; j < c->n_layer; j++) {
            ipt_name(s, sizeof s, "encoder.down_blocks.%d.resnets.%d", i, j);
            x = resnet(g, c, x, s, c->channels[i]);
        }
        if (i < last) {
            ipt_name(s, sizeof s, "encoder.down_blocks.%d.downsamplers.0.conv", i);
            x = ipt_conv2d(g, x, s, c->channels[i],
                           (ipt_conv){.kernel = 3, .stride = 2, .pad_lo = 0, .pad_hi = 1});
        }
    }
    x = mid_block(g, c, x, "encoder", c->channels[last]);
    x = ipt_group_norm(g, x, "encoder.conv_norm_out", c->norm_groups, NORM_EPS, true);
    x = ipt_conv2d(g, x, "encoder.conv_out", 2 * c->latent_channels, SAME);
    if (c->has_quant_conv)
        x = ipt_conv2d(g, x, "quant_conv", 2 * c->latent_channels, POINT);
    ipt_output(g, "moments", ipt_cast(g, x, IPT_F32));
    return ipt_find(g, "moments");
}

/* conv, relu, conv, relu, conv, + x, relu. */
static ipt_val tiny_block(ipt_graph *g, ipt_val x, const char *at)
{
    char s[NAME];
    ipt_val h = x;
    for (int i = 0; i < 3; i++) {
        ipt_name(s, sizeof s, "%s.conv.%d", at, 2 * i);
        h = i < 2 ? ipt_unary(g, IPT_RELU, ipt_conv2d(g, h, s, 64, SAME), 0, 0)
                  : ipt_conv2d_add(g, h, s, 64, SAME, (ipt_val){0}, x);
    }
    return ipt_unary(g, IPT_RELU, h, 0, 0);
}

ipt_val ipt_vae_tiny_build(ipt_graph *g, int32_t n, int32_t h, int32_t w, const char *at, int first,
                           ipt_dtype act)
{
    static const int n_block[4] = {3, 3, 3, 1};
    char s[NAME];
    int layer = first;
    ipt_val x = ipt_leaf(g, IPT_INPUT, "z", ipt_shape4(IPT_F32, n, h, w, 4));
    x = ipt_unary(g, IPT_AFFINE, x, 1.0F / 3.0F, 0); /* soft clamp: 3 tanh(z / 3) */
    x = ipt_unary(g, IPT_AFFINE, ipt_unary(g, IPT_TANH, x, 0, 0), 3.0F, 0);
    ipt_name(s, sizeof s, "%s%d", at, layer);
    x = ipt_unary(g, IPT_RELU, ipt_conv2d(g, ipt_cast(g, x, act), s, 64, SAME), 0, 0);
    layer += 2; /* the convolution and its relu */
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < n_block[i]; j++) {
            ipt_name(s, sizeof s, "%s%d", at, layer++);
            x = tiny_block(g, x, s);
        }
        if (i < 3) {
            ipt_shape xs = ipt_shape_of(g, x);
            ipt_conv up = SAME;
            up.up_h = 2 * xs.dim[1];
            up.up_w = 2 * xs.dim[2];
            up.no_bias = true;
            layer++; /* the upsampler has no weights */
            ipt_name(s, sizeof s, "%s%d", at, layer++);
            x = ipt_conv2d(g, x, s, 64, up);
        }
    }
    ipt_name(s, sizeof s, "%s%d", at, layer);
    x = ipt_conv2d(g, x, s, 3, SAME);
    ipt_output(g, "rgb", ipt_cast(g, x, IPT_F32));
    return ipt_find(g, "rgb");
}
