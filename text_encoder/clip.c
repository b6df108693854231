/* text_encoder/clip.c - CLIP's text transformer. */
#include "text_encoder/text_encoder.h"

enum { NAME = 128 };

static ipt_val activate(ipt_graph *g, const ipt_text_config *c, ipt_val v)
{
    static const ipt_unary_kind kind[] = {[IPT_ACT_SILU] = IPT_SILU,
                                          [IPT_ACT_GELU] = IPT_GELU,
                                          [IPT_ACT_QUICK_GELU] = IPT_QUICK_GELU,
                                          [IPT_ACT_RELU] = IPT_RELU};
    return ipt_unary(g, kind[c->act], v, 0, 0);
}

/* Pre-norm transformer layer with a causal mask; x [N,T,width]. */
static ipt_val layer(ipt_graph *g, const ipt_text_config *c, ipt_val x, int i)
{
    char s[NAME];
#define AT(leaf) ipt_name(s, sizeof s, "text_model.encoder.layers.%d." leaf, i)
    ipt_val h = ipt_layer_norm(g, x, AT("layer_norm1"), c->norm_eps);
    ipt_val q = ipt_linear(g, h, AT("self_attn.q_proj"), c->width, true);
    ipt_val k = ipt_linear(g, h, AT("self_attn.k_proj"), c->width, true);
    ipt_val v = ipt_linear(g, h, AT("self_attn.v_proj"), c->width, true);
    h = ipt_attention(g, q, k, v, (ipt_attn){.heads = c->heads, .causal = true}, NULL);
    x = ipt_linear_add(g, h, AT("self_attn.out_proj"), c->width, true, x);
    h = ipt_layer_norm(g, x, AT("layer_norm2"), c->norm_eps);
    h = activate(g, c, ipt_linear(g, h, AT("mlp.fc1"), c->mlp_width, true));
    x = ipt_linear_add(g, h, AT("mlp.fc2"), c->width, true, x);
#undef AT
    return x;
}

void ipt_text_build(ipt_graph *g, const ipt_text_config *c, const ipt_text_key *key)
{
    int32_t n = key->batch, t = key->tokens;
    ipt_val ids = ipt_leaf(g, IPT_INPUT, "ids", ipt_shape2(IPT_I32, n, t));
    ipt_val x = ipt_embedding(g, ids, "text_model.embeddings.token_embedding", c->vocab, c->width);
    if (key->injected) {
        ipt_val keep = ipt_leaf(g, IPT_INPUT, "keep", ipt_shape3(IPT_F32, n, t, 1));
        ipt_val extra = ipt_leaf(g, IPT_INPUT, "extra", ipt_shape3(IPT_F32, n, t, c->width));
        x = ipt_add(g, ipt_mul(g, x, keep), extra);
    }
    x = ipt_add_weight(g, x, "text_model.embeddings.position_embedding",
                       ipt_shape2(IPT_F32, c->max_tokens, c->width));
    x = ipt_cast(g, x, key->act);
    ipt_val text = {0};
    int last = key->pooled ? c->n_layer : c->n_layer - key->skip;
    for (int i = 0; i <= last && i <= c->n_layer; i++) {
        if (i == c->n_layer - key->skip)
            text = x;
        if (i < last)
            x = layer(g, c, x, i);
    }
    if (key->final_norm)
        text = ipt_layer_norm(g, text, "text_model.final_layer_norm", c->norm_eps);
    ipt_output(g, "text", ipt_cast(g, text, IPT_F32));
    if (key->pooled) {
        ipt_val eos = ipt_leaf(g, IPT_INPUT, "eos", ipt_shape1(IPT_I32, n));
        ipt_val p = ipt_take_rows(g, x, eos);
        p = ipt_layer_norm(g, p, "text_model.final_layer_norm", c->norm_eps);
        if (c->has_projection)
            p = ipt_linear(g, p, "text_projection", c->projection_dim, false);
        ipt_output(g, "pooled", ipt_cast(g, p, IPT_F32));
    }
}

int32_t ipt_text_eos(const ipt_text_config *c, const int32_t *ids, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 0; i < n; i++) {
        if (c->eos != 2 && ids[i] == c->eos)
            return i;
        if (c->eos == 2 && ids[i] > ids[best])
            best = i;
    }
    return best;
}
