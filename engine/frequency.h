/* engine/frequency.h - how much of a latent's spectrum is high: what CMLoRA orders adapters by, and
 * what is told of an adapter's contribution.
 * Pure functions; threads: any. */
#ifndef IPT_ENGINE_FREQUENCY_H
#define IPT_ENGINE_FREQUENCY_H
#include "engine/impasto.h"

/* The mean over channels of x [c,h,w], its discrete Fourier transform's magnitudes, their means
 * over rings of whole radius around the lowest frequency, divided by the largest of these: the mean
 * of the rings from `share` of the largest radius on.  0 for a flat or empty spectrum.  *out.
 * Source: Zou et al. 2025 (arXiv 2502.04923), section 3 (share 0.2), on latents.
 * Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_high_frequencies(ipt_ctx *ctx, const float *x, int32_t c, int32_t h,
                                            int32_t w, double share, double *out);
/* The root of the mean over channels of |F|^2, F the unitary transform of a channel of x [c,h,w]:
 * its means over rings of radius k/8..(k+1)/8 of the largest (0: no frequency is there).
 * *high: the mean of |F|^2 over all frequencies of which those below `share` of the largest radius
 * count as 0; with share 0 the mean square of x.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_frequency_bands(ipt_ctx *ctx, const float *x, int32_t c, int32_t h,
                                           int32_t w, double share, double band[IPT_BANDS],
                                           double *high);
#endif
