/* train/step.h - one training step as two plans on a device (ADR 14): gradients of a micro-batch,
 * and the update of what is trained.
 *
 * Must not know: files, pictures, prompts, when to stop.
 * Threads: everything belongs to the thread of its ctx. */
#ifndef IPT_TRAIN_STEP_H
#define IPT_TRAIN_STEP_H
#include "core/model_config.h"
#include "graph/graph.h"
#include "unet/unet.h"

/* Groups of a state that is trained, all of the same tensors: the values as the optimiser keeps
 * them (f32), sums of gradients, and the optimiser's two moments.  Tensor NAME of the graph is
 * "NAME" of the values (or, when activations are f16, of a copy in f16; the values are
 * "master/NAME" then), "grad/NAME", ... */
#define IPT_TRAIN_VALUES "train.values"
#define IPT_TRAIN_COPY "train.copy"
#define IPT_TRAIN_GRADS "train.grads"
#define IPT_TRAIN_MEAN "train.mean"
#define IPT_TRAIN_SQUARE "train.square"

/* Adds the groups for these tensors; act IPT_F16: with the copy.  Errors: those of ipt_state_add.
 */
IPT_CHECKED ipt_status ipt_train_groups(ipt_state *s, const ipt_state_item *item, size_t n,
                                        ipt_dtype act);
/* Writes a tensor's values, and their copy.  Errors: those of ipt_state_write. */
IPT_CHECKED ipt_status ipt_train_set(ipt_state *s, const char *name, const float *v, size_t bytes);
IPT_CHECKED ipt_status ipt_train_get(const ipt_state *s, const char *name, float *v, size_t bytes);

typedef struct ipt_train_opts {
    struct ipt_gpu *gpu; /* NULL: on the host, in double */
    ipt_weights *weights;
    ipt_state *state;
    const ipt_state_item *item; /* [n] what is trained */
    size_t n;
    const ipt_adapter_site *site; /* [n_site] adapters whose factors are parameters */
    size_t n_site;
    int n_gate; /* rows of "gates" */
} ipt_train_opts;

/* The plan of a micro-batch: the UNet's inputs (unet.h; "gates" [n_gate,N,1] with adapters) and
 *   "target" [N,h,w,C]  noise or v
 *   "weight" [N,h,w,1]  of each squared difference: 1 / (N h w C) for the mean; masks, min-SNR and
 *                       the share of prior preservation are factors of it
 *   "scale"  [1]        of the gradients (loss scaling)
 * One run adds scale * dL/dNAME to "grad/NAME" for each of item.  Outputs: "loss" [1] = sum weight
 * (prediction - target)^2, in f32; "losses" [N], its part of each row.
 * Errors: those of the graph and of ipt_plan_create; IPT_ERR_MISSING: the loss does not depend on
 * an item. */
IPT_CHECKED ipt_status ipt_train_gradients(ipt_ctx *ctx, const ipt_unet_config *c,
                                           const ipt_unet_key *key, const ipt_train_opts *o,
                                           ipt_plan **out);

/* The plan of an update.  Segment 0: output "norm2" [1], the sum of squares of all gradients.
 * Segment 1: input "hyper" [8] (graph.h, ipt_adamw) changes the values.  Segment 2: gradients
 * become zero. */
enum { IPT_TRAIN_NORM, IPT_TRAIN_UPDATE, IPT_TRAIN_CLEAR };
IPT_CHECKED ipt_status ipt_train_update(ipt_ctx *ctx, const ipt_train_opts *o, ipt_plan **out);

/* What AdamW is asked for; defaults of torch: 0.9, 0.999, 1e-8, 0.01. */
typedef struct ipt_adamw_opts {
    double rate, b1, b2, eps, decay;
} ipt_adamw_opts;
/* hyper [8] of update number t (1, 2, ...), for gradients that are to be multiplied by `factor`. */
void ipt_adamw_hyper(const ipt_adamw_opts *o, int64_t t, double factor, float hyper[8]);
#endif
