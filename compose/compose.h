/* compose/compose.h - several adapters in one picture: the bank of loaded adapters, and the
 * policies that say which UNet rows to evaluate at a step, with which gates, and how to blend them.
 * Policies are pure host code: no GPU types, no files.
 * Threads: everything here belongs to one thread at a time. */
#ifndef IPT_COMPOSE_COMPOSE_H
#define IPT_COMPOSE_COMPOSE_H
#include "core/core.h"
#include "graph/graph.h"
#include "model_io/model_io.h"

enum {
    IPT_MAX_SLOT = 32,
    IPT_GATE_ROWS = 18
}; /* row 0: other; 1..8 down level; 9 mid; 10..17 up block */

/* --- bank: adapters stacked beside the weights, one slot each --------------------------------- */
typedef struct ipt_bank ipt_bank;
/* Stacks files (slot i = file[i]); the files and modules stay the caller's and outlive the bank.
 * Errors: IPT_ERR_ARG (more than IPT_MAX_SLOT), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_bank_create(ipt_ctx *ctx, const ipt_module *modules, size_t n_modules,
                                       ipt_adapter_file *const *file, size_t n_file,
                                       ipt_bank **out);
void ipt_bank_destroy(ipt_bank **b);
size_t ipt_bank_n_slot(const ipt_bank *b);
/* Sites of a component for ipt_graph_adapters; borrowed. */
const ipt_adapter_site *ipt_bank_sites(const ipt_bank *b, int comp, size_t *n);
/* True when both give the same graph: same sites, ranks and slots; only values may differ. */
bool ipt_bank_same_layout(const ipt_bank *a, const ipt_bank *b, int comp);
/* Writes the factors of a component into a plan built with ipt_bank_sites; adds bytes to *uploaded.
 * Text layers that the plan leaves out (clip skip) are passed over. */
IPT_CHECKED ipt_status ipt_bank_write(const ipt_bank *b, int comp, ipt_plan *p, uint64_t *uploaded);
bool ipt_bank_has(const ipt_bank *b, int comp); /* some adapter has modules there */

/* Block weights "down:1/mid:0/up:0.5", also "down.1:0.5" for one level; unnamed blocks are 1.
 * Errors: IPT_ERR_ARG quoting the text. */
IPT_CHECKED ipt_status ipt_block_weights(ipt_ctx *ctx, const char *text, float row[IPT_GATE_ROWS]);

/* --- policies --------------------------------------------------------------------------------- */
typedef struct ipt_slot_use {
    float weight, te_weight;
    float start, end; /* active while start <= i / n_step < end */
    float block[IPT_GATE_ROWS];
} ipt_slot_use;

typedef struct ipt_job {
    ipt_ctx *ctx;
    int32_t n_step; /* evaluations are grouped in steps; a policy acts per step */
    int32_t n_slot;
    const ipt_slot_use *slot;
    size_t n_latent;        /* values of one latent */
    const char *const *opt; /* "key=value" */
    size_t n_opt;
} ipt_job;

/* A world: adapters with their strengths, for which one pair of rows (uncond, cond) is evaluated.
 */
typedef struct ipt_world {
    float slot[IPT_MAX_SLOT]; /* multiplier of each slot's weight, 0 = off */
} ipt_world;

typedef struct ipt_policy ipt_policy;
/* Names: merge, switch, composite.  Options (key=value):
 *   switch: tau=N steps per adapter (5)        all: te=active|merged|none, which adapters act in
 * the text encoder: those of the row's world (default), all at their weights, or none. Errors:
 * IPT_ERR_ARG: unknown name or option, value out of range. */
IPT_CHECKED ipt_status ipt_policy_create(const char *name, const ipt_job *job, ipt_policy **out);
void ipt_policy_destroy(ipt_policy **p);
const char *ipt_policy_names(void);       /* "merge switch composite" */
const char *ipt_policy_option_help(void); /* lines for --help */
/* Worlds of step i (at most n_slot, at least 1); borrowed until the next call. */
const ipt_world *ipt_policy_step(ipt_policy *p, int32_t i, size_t *n);
/* eps_u, eps_c [n_latent]: blends of the worlds' predictions u[k], c[k]; u may be NULL (no
 * guidance). */
void ipt_policy_blend(const ipt_policy *p, const float *const *u, const float *const *c, size_t n,
                      float *eps_u, float *eps_c);
/* Gates of a world at step i for one batch element of the UNet: out[IPT_GATE_ROWS][n_slot] (row
 * stride: `stride` floats). */
void ipt_policy_gates(const ipt_policy *p, const ipt_world *w, int32_t i, float *out,
                      size_t stride);
/* Gates in the text encoder for a world: out[n_slot]. */
void ipt_policy_text_gates(const ipt_policy *p, const ipt_world *w, float *out);
#endif
