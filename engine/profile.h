/* engine/profile.h - an adapter's measured action on high frequencies, and the note beside its file
 * that keeps it: FILE.profile.json for FILE.safetensors.
 * Threads: as the engine. */
#ifndef IPT_ENGINE_PROFILE_H
#define IPT_ENGINE_PROFILE_H
#include "engine/impasto.h"

typedef struct ipt_profile_opts {
    int32_t seeds; /* pictures, from request->seed on; 0: 3 */
    bool keep;     /* write the note beside the file */
} ipt_profile_opts;
typedef struct ipt_profile {
    int32_t n_step;
    double *h;   /* [n_step + 1] share of high frequencies at the start and after each step, mean of
                    the   seeds; ipt_free */
    double high; /* mean change of it in a step: what adapters are ordered by */
} ipt_profile;
/* Samples with the one adapter of the request (r->lora[0], r->n_lora 1) alone, in r's size, steps
 * and prompt, and measures the latents.  Source: Zou et al. 2025 (arXiv 2502.04923), section 3.
 * Ownership: caller, ipt_profile_finish.  Errors: those of ipt_generate; of the note
 * IPT_ERR_OUTPUT.
 */
IPT_CHECKED ipt_status ipt_profile_measure(ipt_engine *e, const ipt_request *r,
                                           const ipt_profile_opts *o, ipt_profile *out);
void ipt_profile_finish(ipt_profile *p);
/* The note beside an adapter file, if there is one that was made for a file of its size; *found
 * false: there is none, or it is another file's.  A note that cannot be read counts as none, and is
 * named in the log. */
void ipt_profile_find(ipt_ctx *ctx, const char *file, bool *found, double *high);
#endif
