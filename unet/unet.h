/* unet/unet.h - the UNet of SD 1.x, SD 2.x and SDXL as one graph function; names, structure and
 * shapes are written once, top to bottom, from the configuration.
 *
 * Must not know: files, Vulkan, adapters (linear and conv2d attach them by name), samplers. */
#ifndef IPT_UNET_UNET_H
#define IPT_UNET_UNET_H
#include "core/model_config.h"
#include "graph/graph.h"

/* The shape key of one UNet graph. */
typedef struct ipt_unet_key {
    int32_t batch, h, w; /* rows; latent size in pixels (any size >= 1 that the levels can halve) */
    int32_t tokens;      /* length of the text: 77, 154, ... */
    ipt_dtype act;       /* element type of activations inside */
    /* k > 0: the hidden state just before the up path takes skip connection k - 1 (0 is conv_in's)
     * is the output "deep", of type act; with is_shallow the input "deep", and what leads to it is
     * left out: the outer layers on deep features of an earlier step.  0: neither.
     * Source: Ma et al. 2023, DeepCache (arXiv 2312.00858), whose branch number is k - 1. */
    int32_t deep;
    bool is_shallow;
    /* k > 0: output "maps", what cross-attention of level k - 1 looks at; ipt_unet_grid says
     * whether there is any. */
    int32_t tap;
    /* No "eps"; instead input "d_maps" = dL/d(maps) and, in segment 1, output "d_x" = dL/dx.  What
     * lies behind the last tapped layer is left out of both segments. */
    bool is_grad;
    /* Regions: k > 1 texts, each with its share of every place (up to IPT_MAX_CONTEXT of blocks.h);
     * is_placed: adapters' parts have places, and text k is seen under gates of its own.  Keys and
     * values of several texts are segment 0 (ipt_early), everything else segment 1. */
    int32_t n_text;
    bool is_placed;
    /* For training: what is inside a resnet or a transformer is computed again for the gradient
     * instead of being kept.  The same values. */
    bool is_recomputed;
} ipt_unet_key;
int32_t ipt_unet_n_skip(const ipt_unet_config *c); /* `deep` goes from 1 to this */
/* Grid of a level, 0 the latent's own: *h, *w of the latent become the level's.  False when no
 * cross-attention lies there. */
bool ipt_unet_grid(const ipt_unet_config *c, int32_t level, int32_t *h, int32_t *w);

/* Builds eps = unet(x, t, text).  Inputs (all f32):
 *   "x"     [N,h,w,in_channels]   scaled latent (inpainting: latent, mask, masked latent)
 *   "t_emb" [N,channels[0]]       sinusoidal embedding of the time step (ipt_timestep_embedding)
 *   "text"  [N,tokens,cross_dim]; of further texts "text1", ..., and for each text k and number
 *           T of cells of a grid with cross-attention "share<k>_<T>" [T]
 *   "place<T>" [1,N*T,n_slot], "gates_<k>" as "gates": with is_placed and adapters; T is also 1,
 *           for what acts on the time
 *   "add"   [N,add_in_dim]        only with text_time: pooled text, then the embedded time ids
 *   "w_emb" [N,time_cond_dim]     only with time_cond_dim (LCM): guidance embedding
 *
 * Output "eps" [N,h,w,out_channels] f32; with `tap` also "maps" [N,h_k*w_k,tokens] f32: softmax of
 * the cross-attention (attn2) whose queries lie on the grid of that level (the middle block too
 * when it is its), mean over heads and layers.
 *
 * Returns eps, or maps for is_grad.
 *
 * Errors: poisons the graph (IPT_ERR_SHAPE, IPT_ERR_UNSUPPORTED).
 *
 * Source: Rombach et al. 2022; diffusers UNet2DConditionModel.forward. */
ipt_val ipt_unet_build(ipt_graph *g, const ipt_unet_config *c, const ipt_unet_key *key);
#endif
