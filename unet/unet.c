/* unet/unet.c - the whole UNet, top to bottom: time, in, down, middle, up, out.
 * Details that have caused bugs: the up path takes the down path's lists in reverse; up block i has
 * one resnet more than its down block; an upsampler enlarges to the size of the next skip, which
 * differs from twice the size when the latent is odd. */
#include "unet/unet.h"

#include "unet/blocks.h"

enum { NAME = 160, MAX_SKIP = IPT_MAX_LEVEL * 16 };

typedef struct build {
    ipt_graph *g;
    const ipt_unet_config *c;
    ipt_val temb;
    ipt_context text;
    ipt_val skip[MAX_SKIP];
    int n_skip;
    const ipt_unet_key *key;
    ipt_taps taps;
} build;

static ipt_val activate(const build *b, ipt_val v)
{
    static const ipt_unary_kind kind[] = {[IPT_ACT_SILU] = IPT_SILU,
                                          [IPT_ACT_GELU] = IPT_GELU,
                                          [IPT_ACT_QUICK_GELU] = IPT_QUICK_GELU,
                                          [IPT_ACT_RELU] = IPT_RELU};
    return ipt_unary(b->g, kind[b->c->act], v, 0, 0);
}

static void mark(const build *b, bool begin)
{
    if (b->key->is_recomputed)
        ipt_recompute(b->g, begin);
}

static ipt_val resnet(const build *b, ipt_val x, const char *site, int32_t channels, float scale)
{
    mark(b, true);
    x = ipt_unet_resnet(b->g, b->c, x, b->temb, site, channels, scale);
    mark(b, false);
    return x;
}

static ipt_val transformer(const build *b, ipt_val x, const char *site, const ipt_transformer *t)
{
    mark(b, true);
    x = ipt_unet_transformer(b->g, b->c, x, &b->text, site, t);
    mark(b, false);
    return x;
}

static void push_skip(build *b, ipt_val v)
{
    if (b->n_skip < MAX_SKIP)
        b->skip[b->n_skip++] = v;
}

/* A shallow graph has all the skip connections that it needs. */
static bool is_deep_enough(const build *b)
{
    return b->key->is_shallow && b->n_skip >= b->key->deep;
}

/* Where attention on the grid of a level is added up; NULL: it is not wanted. */
static ipt_taps *taps_at(build *b, int level) { return b->key->tap == level + 1 ? &b->taps : NULL; }

bool ipt_unet_grid(const ipt_unet_config *c, int32_t level, int32_t *h, int32_t *w)
{
    const int32_t add = c->downsample_padding > 0 ? 1 : 0, last = c->n_level - 1;
    if (level < 0 || level > last)
        return false;
    for (int32_t i = 0; i < level; i++) {
        *h = (*h + add) / 2;
        *w = (*w + add) / 2;
    }
    return c->down_attn[level] || c->up_attn[last - level] ||
           (level == last && c->has_mid && c->mid_attn);
}

int32_t ipt_unet_n_skip(const ipt_unet_config *c)
{
    int32_t n = 1;
    for (int i = 0; i < c->n_level; i++)
        n += c->n_layer[i] + (i < c->n_level - 1);
    return n;
}

/* temb = silu(linear_2(silu(linear_1(t_emb)))) (+ guidance before, + pooled text and sizes after).
 */
static ipt_val time_embedding(const build *b, const ipt_unet_key *key, ipt_val t, ipt_val add,
                              ipt_val w)
{
    ipt_graph *g = b->g;
    const ipt_unet_config *c = b->c;
    t = ipt_cast(g, t, key->act);
    if (c->time_cond_dim > 0)
        t = ipt_add(g, t,
                    ipt_linear(g, ipt_cast(g, w, key->act), "time_embedding.cond_proj",
                               c->channels[0], false));
    t = ipt_linear(g, t, "time_embedding.linear_1", c->time_embed_dim, true);
    t = ipt_linear(g, activate(b, t), "time_embedding.linear_2", c->time_embed_dim, true);
    if (c->text_time) {
        ipt_val a = ipt_linear(g, ipt_cast(g, add, key->act), "add_embedding.linear_1",
                               c->time_embed_dim, true);
        t = ipt_linear_add(g, activate(b, a), "add_embedding.linear_2", c->time_embed_dim, true, t);
    }
    return activate(b, t);
}

/* Inputs "text", "text1", ... */
static void add_texts(build *b)
{
    const ipt_unet_key *key = b->key;
    char name[16] = "text";
    b->text = (ipt_context){.n = key->n_text > 1 ? key->n_text : 1,
                            .has_gates = key->is_placed,
                            .is_placed = key->is_placed};
    for (int32_t k = 0; k < b->text.n; k++) {
        if (k > 0)
            ipt_name(name, sizeof name, "text%d", k);
        ipt_val v = ipt_leaf(b->g, IPT_INPUT, name,
                             ipt_shape3(IPT_F32, key->batch, key->tokens, b->c->cross_dim[0]));
        if (b->text.n > 1)
            ipt_early(b->g, true);
        b->text.text[k] = ipt_cast(b->g, v, key->act);
        if (b->text.n > 1)
            ipt_early(b->g, false);
    }
}

static ipt_val down_block(build *b, ipt_val x, int i)
{
    const ipt_unet_config *c = b->c;
    char s[NAME];
    for (int j = 0; j < c->n_layer[i] && !is_deep_enough(b); j++) {
        ipt_name(s, sizeof s, "down_blocks.%d.resnets.%d", i, j);
        x = resnet(b, x, s, c->channels[i], 1.0F);
        if (c->down_attn[i]) {
            ipt_name(s, sizeof s, "down_blocks.%d.attentions.%d", i, j);
            x = transformer(b, x, s,
                            &(ipt_transformer){c->heads[i], c->depth[i], c->cross_dim[i],
                                               c->only_cross[i], taps_at(b, i)});
        }
        push_skip(b, x);
    }
    if (i < c->n_level - 1 && !is_deep_enough(b)) {
        int pad = c->downsample_padding;
        ipt_name(s, sizeof s, "down_blocks.%d.downsamplers.0.conv", i);
        x = ipt_conv2d(
            b->g, x, s, c->channels[i],
            (ipt_conv){.kernel = 3, .stride = 2, .pad_lo = pad, .pad_hi = pad > 0 ? pad : 1});
        push_skip(b, x);
    }
    return x;
}

static ipt_val mid_block(build *b, ipt_val x)
{
    const ipt_unet_config *c = b->c;
    int last = c->n_level - 1;
    if (!c->has_mid)
        return x;
    x = resnet(b, x, "mid_block.resnets.0", c->channels[last], c->mid_scale);
    if (c->mid_attn)
        x = transformer(b, x, "mid_block.attentions.0",
                        &(ipt_transformer){c->heads[last], c->depth[last], c->cross_dim[last],
                                           c->mid_only_cross, taps_at(b, last)});
    return resnet(b, x, "mid_block.resnets.1", c->channels[last], c->mid_scale);
}

/* The hidden state before the next skip connection, of `channels`: made here, or of an earlier
 * step.
 */
static ipt_val cut(build *b, ipt_val x, int32_t channels)
{
    const ipt_unet_key *key = b->key;
    if (key->deep == 0 || b->n_skip != key->deep)
        return x;
    ipt_shape next = ipt_shape_of(b->g, b->skip[b->n_skip - 1]);
    if (key->is_shallow)
        return ipt_leaf(b->g, IPT_INPUT, "deep",
                        ipt_shape4(key->act, key->batch, next.dim[1], next.dim[2], channels));
    ipt_output(b->g, "deep", x);
    return ipt_find(b->g, "deep");
}

static ipt_val up_block(build *b, ipt_val x, int i)
{
    const ipt_unet_config *c = b->c;
    int level = c->n_level - 1 - i, first = 0;
    char s[NAME];
    for (int k = 0; k < level; k++)
        first += c->n_layer[k] + 1; /* the lowest skip connection that this block takes */
    for (int j = 0; j < c->n_layer[level] + 1 && b->n_skip > 0; j++) {
        if (b->key->is_shallow && b->key->deep < first + c->n_layer[level] + 1 - j)
            continue; /* before the cut */
        x = cut(b, x, c->channels[j == 0 && level < c->n_level - 1 ? level + 1 : level]);
        x = ipt_concat(b->g, x, b->skip[--b->n_skip]);
        ipt_name(s, sizeof s, "up_blocks.%d.resnets.%d", i, j);
        x = resnet(b, x, s, c->channels[level], 1.0F);
        if (c->up_attn[i]) {
            ipt_name(s, sizeof s, "up_blocks.%d.attentions.%d", i, j);
            x = transformer(b, x, s,
                            &(ipt_transformer){c->heads[level], c->up_depth[i], c->cross_dim[level],
                                               c->only_cross[level], taps_at(b, level)});
        }
    }
    if (level > 0 && b->n_skip > 0 && x.id) {
        ipt_shape next = ipt_shape_of(b->g, b->skip[b->n_skip - 1]);
        ipt_name(s, sizeof s, "up_blocks.%d.upsamplers.0.conv", i);
        x = ipt_conv2d(b->g, x, s, c->channels[level],
                       (ipt_conv){.kernel = 3,
                                  .stride = 1,
                                  .pad_lo = 1,
                                  .pad_hi = 1,
                                  .up_h = next.dim[1],
                                  .up_w = next.dim[2]});
    }
    return x;
}

/* The mean of what was tapped, [N,cells,tokens], as an output. */
static ipt_val add_maps(build *b)
{
    ipt_graph *g = b->g;
    ipt_val maps = ipt_unary(g, IPT_AFFINE, b->taps.sum, 1.0F / (float)b->taps.n, 0.0F);
    ipt_shape s = ipt_shape_of(g, maps);
    ipt_output(g, "maps", ipt_reshape(g, maps, ipt_shape3(IPT_F32, s.dim[0], s.dim[2], s.dim[3])));
    return ipt_find(g, "maps");
}

/* dL/dx from dL/d(maps), in a segment of its own: the host looks at all rows' maps in between. */
static void add_gradient(build *b, ipt_val maps)
{
    ipt_graph *g = b->g;
    ipt_val x = ipt_find(g, "x"), dx = {0};
    ipt_cut(g);
    ipt_val d = ipt_leaf(g, IPT_INPUT, "d_maps", ipt_shape_of(g, maps));
    if (ipt_graph_backward(g, &(ipt_seed){maps, d}, 1, &x, 1, &dx) == IPT_OK)
        ipt_output(g, "d_x", dx);
}

ipt_val ipt_unet_build(ipt_graph *g, const ipt_unet_config *c, const ipt_unet_key *key)
{
    build b = {.g = g, .c = c, .key = key};
    int32_t n = key->batch, kin = c->conv_in_kernel, kout = c->conv_out_kernel;
    ipt_val none = {0};
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape4(IPT_F32, n, key->h, key->w, c->in_channels));
    ipt_val t = ipt_leaf(g, IPT_INPUT, "t_emb", ipt_shape2(IPT_F32, n, c->channels[0]));
    ipt_val add =
        c->text_time ? ipt_leaf(g, IPT_INPUT, "add", ipt_shape2(IPT_F32, n, c->add_in_dim)) : none;
    ipt_val w = c->time_cond_dim > 0
                    ? ipt_leaf(g, IPT_INPUT, "w_emb", ipt_shape2(IPT_F32, n, c->time_cond_dim))
                    : none;
    ipt_graph_gates(g, NULL, key->is_placed);
    b.temb = time_embedding(&b, key, t, add, w);
    add_texts(&b);
    x = ipt_conv2d(
        g, ipt_cast(g, x, key->act), "conv_in", c->channels[0],
        (ipt_conv){.kernel = kin, .stride = 1, .pad_lo = (kin - 1) / 2, .pad_hi = (kin - 1) / 2});
    push_skip(&b, x);
    for (int i = 0; i < c->n_level; i++)
        x = down_block(&b, x, i);
    x = key->is_shallow ? none : mid_block(&b, x);
    for (int i = 0; i < c->n_level; i++)
        x = up_block(&b, x, i);
    ipt_val maps = key->tap > 0 ? add_maps(&b) : none;
    if (key->is_grad) {
        add_gradient(&b, maps);
        return maps;
    }
    x = ipt_group_norm(g, x, "conv_norm_out", c->norm_groups, c->norm_eps, true);
    x = ipt_conv2d(
        g, x, "conv_out", c->out_channels,
        (ipt_conv){
            .kernel = kout, .stride = 1, .pad_lo = (kout - 1) / 2, .pad_hi = (kout - 1) / 2});
    x = ipt_cast(g, x, IPT_F32);
    ipt_output(g, "eps", x);
    return ipt_find(g, "eps");
}
