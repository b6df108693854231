/* engine/run.h - one request while it runs, and its stages in the order of the files:
 * job.c (adapters, prompts, the method; texts encoded before the first step), unet.c (its plan, a
 * batch of rows), rows.c (a guided prediction from the rows of an evaluation), loop.c (one
 * picture), explain.c (what acted where), report.c, generate.c (all of them). */
#ifndef IPT_ENGINE_RUN_H
#define IPT_ENGINE_RUN_H
#include "compose/concepts.h"
#include "engine/internal.h"
#include "unet/blocks.h"

/* A text of the job under the adapters' gates in the text encoder. */
typedef struct ipt_encoding_key {
    uint16_t text; /* of the job's texts */
    float gate[IPT_MAX_SLOT];
} ipt_encoding_key;
typedef struct ipt_run_text {
    ipt_encoding_key key;
    ipt_encoded enc;
} ipt_run_text;

/* Buffers of one picture: latents [C,h,w]. */
typedef struct ipt_buffers {
    float *x, *in, *eps, *eps_u, *noise, *fresh, *keep, *x0;
    float *row_eps; /* [rows of an evaluation at most][n] */
} ipt_buffers;

/* Deep features of the UNet between evaluations; interval 1: none are kept. */
typedef struct ipt_cache {
    int32_t interval, deep; /* one whole evaluation in so many; ipt_unet_key.deep */
    bool is_methods;        /* the method says which rows are whole */
    ipt_plan *shallow;
    ipt_buffer *kept; /* [max_rows] of row_bytes */
    uint64_t row_bytes;
    ipt_row *row; /* [n_row] of the last whole evaluation */
    size_t n_row;
    int32_t since, eval; /* evaluations since then, and its own number */
} ipt_cache;

enum { IPT_KEEP_LOSS = 64 };
/* Attention maps of rows, and the latent's gradient by way of them; tap 0: no row wants maps. */
typedef struct ipt_maps {
    int32_t tap;        /* ipt_unet_key.tap */
    ipt_plan_key key;   /* of `plan`, unless batch is 0 */
    ipt_plan *plan;     /* to the last tapped layer and back; NULL: no gradients */
    int32_t batch;      /* its rows */
    size_t n;           /* values of a row's maps: cells x tokens */
    float *row, *d_row; /* [max_rows][n] */
    float **d_maps;     /* [max_rows] into d_row */
    size_t *order;      /* [n_order] rows that want gradients */
    size_t n_order;
    float *chunk;          /* [batch][n] */
    float *d_x, *d_latent; /* [batch][h,w,in_channels], [C,h,w] */
    float *first;          /* d_latent of the first round of this evaluation */
    float loss[IPT_KEEP_LOSS];
    int32_t n_round; /* of this evaluation */
    bool is_moved;   /* the latent of this evaluation: u->buf.in is not u->buf.x any more */
} ipt_maps;

/* Masks bound to prompts and adapters. */
typedef struct ipt_region_text {
    const uint16_t *text;    /* [n_eval] of the job's texts; NULL: the row's */
    bool acts[IPT_MAX_SLOT]; /* the adapters under which it is seen */
    const float *share;      /* [H*W] of each place; those of all texts add up to 1 */
} ipt_region_text;
/* Texts and gates of which a plan has keys and values. */
typedef struct ipt_seen {
    float *text, *gates; /* as u->in_text, and of the texts in u->in_gates */
    bool is_valid;
} ipt_seen;
typedef struct ipt_regions {
    int32_t n_text; /* 0: no regions */
    ipt_region_text text[IPT_MAX_CONTEXT];
    bool is_placed;             /* some adapter has places: */
    float *place[IPT_MAX_SLOT]; /* [H*W]; NULL: everywhere */
    ipt_seen seen[2];           /* u->unet, u->cache.shallow */
} ipt_regions;

/* What adapters did to the picture that runs; only where the request asks. */
typedef struct ipt_explain {
    int32_t n_step, at; /* steps that run, and which of them it is */
    int32_t *step;
    float *in;    /* [n] what the last round's rows were evaluated on */
    ipt_row *row; /* [n_row] evaluated beside the method's, [max_row] at most */
    float *eps;   /* [max_row][n] */
    size_t n_row, max_row;
    ipt_result *with, *without;           /* [max_rows] of the method's rows, some replaced */
    float *eps_u, *whole, *base, *lack;   /* [n] guided predictions */
    float *gate_a, *gate_b;               /* [IPT_GATE_ROWS][n_slot] */
    float *power;                         /* [n_step] */
    float *energy, *words, *when, *share; /* [n_slot][h*w], [n_slot][cells], [n_slot][n_step] */
    double *band, *high, *all;            /* [n_slot][IPT_BANDS], sums over steps; [n_slot] */
    int32_t *n_words;                     /* [n_slot] steps in which words were read */
    size_t cells;                         /* of the maps */
    ipt_concepts *concepts;               /* where words stand; NULL: no maps, or no words */
} ipt_explain;

typedef struct ipt_run {
    ipt_engine *e;
    ipt_request request;  /* with the pictures of its files */
    const ipt_request *r; /* it */
    ipt_image init, mask;
    ipt_report *rep;
    ipt_adapter_report *adapter; /* rep's, [e->n_file] */
    ipt_arena arena;
    ipt_settings set;
    /* job.c */
    ipt_job job;
    ipt_slot_use slot[IPT_MAX_SLOT];
    ipt_part part[IPT_MAX_PART];
    ipt_texts texts;
    ipt_policy *policy;
    ipt_prompts prompts; /* of the job's texts */
    ipt_run_text *text;  /* [n_text], grows */
    size_t n_text, cap_text;
    uint64_t text_bytes;
    uint16_t negative;    /* of the first evaluation, also where no row has it */
    size_t trace_text[2]; /* in u->text: positive and negative */
    size_t max_rows;      /* of an evaluation */
    int32_t eval;         /* that runs or is prepared, in its picture */
    ipt_rows rows;        /* its */
    ipt_result *result;   /* [max_rows] */
    ipt_row *pick;        /* [max_rows] those of a replay, and where their predictions go */
    float **pick_eps, **pick_maps;
    /* unet.c: the plan and its inputs, [batch, ...] */
    ipt_unet_key key; /* of the whole UNet; batch: rows that are wanted at once */
    ipt_plan *unet;
    int32_t batch;
    float *in_x, *in_text, *in_add, *in_gates, *in_time, *out_eps, *out_maps;
    ipt_cache cache;
    ipt_maps maps;
    ipt_regions regions;
    ipt_explain explain;
    float *fold_gate; /* fold.c: [IPT_GATE_ROWS][n_slot] of all rows */
    ipt_start start;  /* img2img and inpainting */
    ipt_paste paste;
    ipt_buffers buf;
    /* progress */
    double t_start, step_ms, vae_ms; /* the last two: 0, not known yet */
    double step_macs;                /* of all replays of an evaluation */
    int32_t n_eval, done_eval;
} ipt_run;

/* --- generate.c ------------------------------------------------------------------------------- */
typedef ipt_status (*ipt_run_fn)(ipt_run *u, void *user);
/* A request from its beginning to its end around what `body` does with it. */
IPT_CHECKED ipt_status ipt_run_with(ipt_engine *e, const ipt_request *r, ipt_run_fn body,
                                    void *user, ipt_report *report);

/* --- job.c ------------------------------------------------------------------------------------ */
/* Loads what the request names, reads prompts and options, chooses the settings. */
IPT_CHECKED ipt_status ipt_job_prepare(ipt_run *u);
/* The text of every evaluation [n_eval], of a prompt without tags that may change over the steps;
 * they join the job's. */
IPT_CHECKED ipt_status ipt_job_edits(ipt_run *u, const char *text, size_t n, const uint16_t **out);
/* Encodes every text that an evaluation will need. */
IPT_CHECKED ipt_status ipt_job_encode(ipt_run *u);
/* Index of a row's text in u->text, encoded at first use. */
IPT_CHECKED ipt_status ipt_job_text(ipt_run *u, const ipt_row *row, size_t *index);
void ipt_job_finish(ipt_run *u);

/* --- unet.c ----------------------------------------------------------------------------------- */
/* A plan for all rows of an evaluation at once, or for fewer at a time when they do not fit, with
 * what goes beside it; after everything else that needs the device before the first evaluation. */
IPT_CHECKED ipt_status ipt_unet_prepare(ipt_run *u);
/* Under a memory limit: no evaluation follows until ipt_unet_wake, and what comes may take the
 * UNet's place. */
void ipt_unet_rest(ipt_run *u);
IPT_CHECKED ipt_status ipt_unet_wake(ipt_run *u);
/* Evaluates rows [n] of one variant, n <= u->batch, at timestep t of step `step`: eps[k] [C,h,w],
 * and maps[k] [u->maps.n] of those that want them. */
IPT_CHECKED ipt_status ipt_unet_rows(ipt_run *u, const float *x, double t, int32_t step,
                                     const ipt_row *row, size_t n, float *const *eps,
                                     float *const *maps);
/* The inputs of rows [n] into a plan for b rows; the last one fills it.  With regions also keys and
 * values of their texts, where these or their gates are not those of the plan's last rows. */
IPT_CHECKED ipt_status ipt_unet_inputs(ipt_run *u, ipt_plan *plan, const float *x, double t,
                                       int32_t step, const ipt_row *row, size_t n, size_t b);

/* --- regions.c -------------------------------------------------------------------------------- */
/* Reads the request's regions, after the method is made; their prompts join the job's texts.
 * Errors, one sentence each: IPT_ERR_ARG; those of the pictures. */
IPT_CHECKED ipt_status ipt_regions_read(ipt_run *u);
/* A row of evaluation u->eval as the regions' text k is seen for it (k 0 without any: itself). */
ipt_row ipt_regions_row(const ipt_run *u, const ipt_row *row, int32_t k);
/* Whether two evaluations have the same prompts of regions. */
bool ipt_regions_same(const ipt_run *u, int32_t a, int32_t b);
/* Shares and places into a plan; p NULL: nothing. */
IPT_CHECKED ipt_status ipt_regions_write(ipt_run *u, ipt_plan *p);

/* --- maps.c ----------------------------------------------------------------------------------- */
/* What the method needs for maps and gradients but for the plan. */
IPT_CHECKED ipt_status ipt_maps_prepare(ipt_run *u);
/* The plan for gradients beside u->unet, where the method wants some. */
IPT_CHECKED ipt_status ipt_maps_plan(ipt_run *u);
/* Maps of the rows that want a gradient, then the method's loss, then dL/d(latent), by which the
 * method changes u->buf.in.  *again: another round on what it is now. */
IPT_CHECKED ipt_status ipt_maps_update(ipt_run *u, double t, int32_t eval, int32_t round,
                                       bool *again);

/* --- fold.c ----------------------------------------------------------------------------------- */
/* Whether this request's adapters go into the UNet's weights: e->is_folded.  Before its plan. */
IPT_CHECKED ipt_status ipt_fold_choose(ipt_run *u);
/* Not after all: the weights do not stay on the device. */
void ipt_fold_refuse(ipt_run *u);
/* Brings the weights on the device into that state: out with what an earlier request left, in with
 * this one's.  After its plan, which puts them there.  A failure or a cancel half way is mended by
 * the next call.  Errors: those of ipt_bank_fold; IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_fold_apply(ipt_run *u);

/* --- cache.c ---------------------------------------------------------------------------------- */
/* Reads the request's `cache`.  Errors: IPT_ERR_ARG. */
IPT_CHECKED ipt_status ipt_cache_read(ipt_run *u);
/* The shallow plan beside u->unet, and memory for the features. */
IPT_CHECKED ipt_status ipt_cache_prepare(ipt_run *u, const ipt_unet_key *whole);
void ipt_cache_finish(ipt_run *u);
/* Says of u->rows which run whole and which on kept features. */
void ipt_cache_mark(ipt_run *u, int32_t eval);
/* Features of rows [n] that u->unet has evaluated, where they want it; into u->cache.shallow. */
IPT_CHECKED ipt_status ipt_cache_keep(ipt_run *u, const ipt_row *row, size_t n);
IPT_CHECKED ipt_status ipt_cache_give(ipt_run *u, const ipt_row *row, size_t n);

/* --- rows.c ----------------------------------------------------------------------------------- */
/* Whether this engine can evaluate such a row.  Errors: IPT_ERR_UNSUPPORTED says what it cannot. */
IPT_CHECKED ipt_status ipt_rows_possible(ipt_ctx *ctx, const ipt_method *m, const ipt_row *row);
/* Guided prediction of evaluation `eval` for the model's input u->buf.in into u->buf.eps. */
IPT_CHECKED ipt_status ipt_rows_predict(ipt_run *u, double t, int32_t eval);

/* The method's blend of results of u->rows, then guidance, into eps; eps_u: room. */
void ipt_rows_guide(ipt_run *u, int32_t eval, const ipt_result *res, float *eps_u, float *eps);

/* --- loop.c ----------------------------------------------------------------------------------- */
IPT_CHECKED ipt_status ipt_loop_buffers(ipt_run *u);
/* What a trace holds of the texts. */
IPT_CHECKED ipt_status ipt_loop_trace_text(ipt_run *u, ipt_trace *t);
/* Picture k of the request into rgb [H,W,3], 0..1; trace may be NULL. */
IPT_CHECKED ipt_status ipt_loop_picture(ipt_run *u, int32_t k, ipt_trace *trace, float *rgb);

/* --- preview.c -------------------------------------------------------------------------------- */
/* Where previews are wanted: what they need of the model's VAE, before the UNet takes the device;
 * the plan that works beside the UNet. */
IPT_CHECKED ipt_status ipt_preview_fit(ipt_run *u);
IPT_CHECKED ipt_status ipt_preview_plan(ipt_run *u);
/* After evaluation `eval` of picture `image`, before its step: shows u->buf.x and .eps if wanted.
 */
IPT_CHECKED ipt_status ipt_preview_show(ipt_run *u, const ipt_sampler *s, int32_t eval,
                                        int32_t image);

/* --- explain.c -------------------------------------------------------------------------------- */
/* Whether what the request asks for beside its pictures can be had.  Errors: IPT_ERR_ARG. */
IPT_CHECKED ipt_status ipt_explain_check(ipt_run *u);
/* What it needs of the evaluation whose rows are in u->rows: texts are encoded, rows counted. */
IPT_CHECKED ipt_status ipt_explain_plan(ipt_run *u);
IPT_CHECKED ipt_status ipt_explain_prepare(ipt_run *u);
/* Keeps u->buf.in, on which a round is evaluated. */
void ipt_explain_input(ipt_run *u);
/* Measures the first evaluation of a step, after its rounds and before its blend: the method's
 * results are what they were. */
IPT_CHECKED ipt_status ipt_explain_step(ipt_run *u, double t, int32_t eval);
/* Gives what was asked for beside picture k, which is done. */
IPT_CHECKED ipt_status ipt_explain_give(ipt_run *u, int32_t k, const ipt_image *im);

/* --- report.c --------------------------------------------------------------------------------- */
void ipt_run_progress(ipt_run *u, const char *stage, int32_t done, int32_t total, int32_t image);
IPT_CHECKED ipt_status ipt_run_report(ipt_run *u);
#endif
