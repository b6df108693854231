/* compose/contrast.h - how far apart attention maps of different concepts are: the loss whose
 * gradient moves the latent, and masks from maps.  Pure maths on the host. */
#ifndef IPT_COMPOSE_CONTRAST_H
#define IPT_COMPOSE_CONTRAST_H
#include "core/core.h"

/* NT-Xent over maps x [n][cells] of classes `of` [n], temperature tau: maps of one class shall be
 * alike, those of others not.  Each map is spread to 0..1 first; flat ones are left out.
 * Adds dL/dx to dx [n][cells].  *loss is 0 and nothing is added when no class has two maps, or
 * there is only one class.  Errors: IPT_ERR_NOMEM.
 * Source: Chen et al. 2020 (arXiv 2002.05709) as Meral et al. 2024, CLoRA (arXiv 2403.19776) use
 * it. */
IPT_CHECKED ipt_status ipt_contrast(ipt_ctx *ctx, const float *x, size_t n, size_t cells,
                                    const int32_t *of, double tau, float *dx, double *loss);

typedef enum ipt_morph {
    IPT_MORPH_NONE,
    IPT_MORPH_DILATE,
    IPT_MORPH_ERODE,
    IPT_MORPH_OPEN,  /* erode, dilate: specks go */
    IPT_MORPH_CLOSE, /* dilate, erode: holes go */
} ipt_morph;
/* mask [h,w] of 0 and 1 by 3x3 neighbourhoods, in place; what lies outside changes nothing.
 * scratch [h,w]. */
void ipt_mask_morph(ipt_morph how, int32_t h, int32_t w, float *mask, float *scratch);
/* from [gh,gw] to [h,w], nearest. */
void ipt_mask_enlarge(const float *from, int32_t gh, int32_t gw, float *to, int32_t h, int32_t w);
#endif
