/* unet/blocks.h - the two building blocks of the UNet; for unet/ only. */
#ifndef IPT_UNET_BLOCKS_H
#define IPT_UNET_BLOCKS_H
#include "core/model_config.h"
#include "graph/graph.h"

/* Residual block: norm, silu, conv, + time, norm, silu, conv, + shortcut.
 *   x [N,H,W,I], temb [N,time_embed_dim] after its silu -> [N,H,W,out]; the sum is divided by
 * `scale`. */
ipt_val ipt_unet_resnet(ipt_graph *g, const ipt_unet_config *c, ipt_val x, ipt_val temb,
                        const char *at, int32_t out, float scale);

/* What attention to the text looked at, summed over layers. */
typedef struct ipt_taps {
    ipt_val sum; /* [N,1,H*W,T] f32: of the layers' means over heads */
    int32_t n;   /* layers */
} ipt_taps;
/* The texts that cross-attention looks at.  With several, each has its share of every place: INPUT
 * "share<k>_<T>" [T] on a grid of T cells, which add up to 1. */
enum { IPT_MAX_CONTEXT = 32 };
typedef struct ipt_context {
    int32_t n;
    ipt_val text[IPT_MAX_CONTEXT]; /* [N,tokens,cross_dim] */
    bool has_gates; /* text k is seen under adapters' gates "gates_<k>", else under "gates" */
    bool is_placed; /* adapters' parts have places (ipt_graph_gates) */
} ipt_context;

typedef struct ipt_transformer {
    int32_t heads, depth, cross_dim;
    bool only_cross; /* attn1 looks at the text too */
    ipt_taps *taps;  /* attn2's probabilities are added here; NULL: they are not kept */
} ipt_transformer;
/* Spatial transformer: group norm, projection, `depth` blocks of self-attention, cross-attention
 * and GEGLU, projection, + x.  x [N,H,W,C]. */
ipt_val ipt_unet_transformer(ipt_graph *g, const ipt_unet_config *c, ipt_val x,
                             const ipt_context *text, const char *at, const ipt_transformer *t);
#endif
