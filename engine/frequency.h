/* engine/frequency.h - how much of a latent's spectrum is high: what CMLoRA orders adapters by.
 * Pure functions; threads: any. */
#ifndef IPT_ENGINE_FREQUENCY_H
#define IPT_ENGINE_FREQUENCY_H
#include "core/core.h"

/* The mean over channels of x [c,h,w], its discrete Fourier transform's magnitudes, their means
 * over rings of whole radius around the lowest frequency, divided by the largest of these: the mean
 * of the rings from `share` of the largest radius on.  0 for a flat or empty spectrum.  *out.
 * Source: Zou et al. 2025 (arXiv 2502.04923), section 3 (share 0.2), on latents.
 * Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_high_frequencies(ipt_ctx *ctx, const float *x, int32_t c, int32_t h,
                                            int32_t w, double share, double *out);
#endif
