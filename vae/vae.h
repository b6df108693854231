/* vae/vae.h - AutoencoderKL (encode, decode) and AutoencoderTiny (decode) as graph functions.
 * Must not know: files, Vulkan, tiling (engine cuts and blends tiles). */
#ifndef IPT_VAE_VAE_H
#define IPT_VAE_VAE_H
#include "core/model_config.h"
#include "graph/graph.h"

/* Pixels per latent pixel: 2^(n_level-1). */
int32_t ipt_vae_factor(const ipt_vae_config *c);

/* rgb = decode(z).  Input "z" [N,h,w,latent_channels] f32, already divided by scaling_factor and
 * shifted; output "rgb" [N,f h,f w,3] f32, nominally -1..1.
 * Source: diffusers AutoencoderKL.decode, Decoder. */
ipt_val ipt_vae_decode_build(ipt_graph *g, const ipt_vae_config *c, int32_t n, int32_t h, int32_t w,
                             ipt_dtype act);

/* moments = encode(rgb).  Input "picture" [N,H,W,3] f32 in -1..1; output "moments"
 * [N,H/f,W/f,2 latent_channels] f32: mean, then log variance (unclamped).
 * Source: diffusers AutoencoderKL.encode, Encoder. */
ipt_val ipt_vae_encode_build(ipt_graph *g, const ipt_vae_config *c, int32_t n, int32_t h, int32_t w,
                             ipt_dtype act);

/* rgb = tiny decode(z).  Input "z" [N,h,w,4] f32: the sampler's latent (scaled); output "rgb"
 * [N,8h,8w,3] f32 in 0..1.  at: "decoder.layers." with first = 0 (diffusers) or "" with first = 1
 * (the published taesd_decoder file, which counts its clamp).
 * Source: TAESD (madebyollin/taesd), diffusers DecoderTiny. */
ipt_val ipt_vae_tiny_build(ipt_graph *g, int32_t n, int32_t h, int32_t w, const char *at, int first,
                           ipt_dtype act);
#endif
