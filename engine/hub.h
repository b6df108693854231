/* engine/hub.h - LoraHub: weights of adapters under which a model predicts some pictures best, by a
 * search without gradients.
 * Source: Huang et al. 2023 (arXiv 2307.13269); for pictures the loss is the model's own.
 * Threads: as the engine. */
#ifndef IPT_ENGINE_HUB_H
#define IPT_ENGINE_HUB_H
#include "engine/impasto.h"

enum { IPT_HUB_MAX_PICTURES = 256 };
typedef struct ipt_hub_opts {
    const char *const *picture; /* [n_picture] files; cut in the middle and resized to the request's
                                   size */
    size_t n_picture;
    int32_t pairs;       /* noise levels of each, evenly spread, each with noise of its own; 0: 4 */
    int32_t evaluations; /* of the loss; 0: 40 */
    double penalty;      /* times the mean size of the weights; < 0: 0.05 */
} ipt_hub_opts;
typedef struct ipt_hub {
    size_t n;          /* adapters */
    double weight[32]; /* [n] the best, of the UNet's and the text encoders' parts alike */
    double loss, none; /* mean squared error with them, and without adapters */
    int32_t evaluations;
    double ms;
} ipt_hub;
/* Searches the weights of r->lora (files; what else they say is not read) in [-1.5, 1.5] from 0
 * under r->compose (NULL: "lorahub"), r's model, prompt, size and seed (of the noise, and of the
 * search).  All evaluations see the same pictures, noise and levels.  The score is the loss
 * relative to `none`, plus the penalty.  Progress: stage "search", UNet evaluations; the first runs
 * with the model's loading.
 * Errors: IPT_ERR_ARG (no pictures, a prompt with AND or LoRA tags, a number out of range), those
 * of files and of ipt_generate; IPT_ERR_CANCELLED between UNet evaluations. */
IPT_CHECKED ipt_status ipt_hub_search(ipt_engine *e, const ipt_request *r, const ipt_hub_opts *o,
                                      ipt_hub *out);
/* The loss at the weights that r->lora has. */
IPT_CHECKED ipt_status ipt_hub_loss(ipt_engine *e, const ipt_request *r, const ipt_hub_opts *o,
                                    double *loss);
/* The part of a request that a result is, as JSON: its method and adapters with their weights, and
 * r's model.  Memory: arena; NULL when it ran out. */
char *ipt_hub_recipe(const ipt_request *r, const ipt_hub *h, ipt_arena *arena);
#endif
