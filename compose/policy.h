/* compose/policy.h - composing methods: which UNet rows are evaluated, under which prompt and which
 * adapters, and how their predictions become one.
 *
 * A method is one row of the table in methods.c and one file.  The engine runs it so:
 *
 *     begin                                     once a request: options are read, prompts added
 *     for every evaluation: plan                all rows it may need, before the first one: texts
 *                                               are encoded and plans recorded from these
 *     for every picture and evaluation:
 *         for (round = 0;; round++)
 *             step                              the rows of this round
 *             map_grad, latent                  when a row wants its gradient; `latent` says
 * whether there is another round on the changed latent blend                                 of the
 * last round's predictions
 *
 * Pure host code: no GPU types, no files.  Threads: a policy belongs to one thread at a time. */
#ifndef IPT_COMPOSE_POLICY_H
#define IPT_COMPOSE_POLICY_H
#include "core/core.h"

enum {
    IPT_MAX_SLOT = 32,            /* adapters at once */
    IPT_GATE_ROWS = 18,           /* row 0: other; 1..8 down level; 9 mid; 10..17 up block */
    IPT_MAX_PART = 32,            /* prompts that AND joins */
    IPT_MAX_TEXT = 2048,          /* prompts of a job */
    IPT_MAX_TEXT_BYTES = 8 << 20, /* of all of them */
};

/* --- strength over the steps ------------------------------------------------------------------ */
enum { IPT_MAX_POINT = 64 };
/* Straight lines between points of rising `at`, a share of the steps; level outside of them. */
typedef struct ipt_curve {
    int32_t n;
    struct {
        float at, value;
    } point[IPT_MAX_POINT];
} ipt_curve;
/* "0@0,1@0.3,0@0.9": value@share of the steps.  Errors: IPT_ERR_ARG quotes the text. */
IPT_CHECKED ipt_status ipt_curve_parse(ipt_ctx *ctx, const char *text, ipt_curve *out);
float ipt_curve_at(const ipt_curve *c, float at);

/* --- what a method is told -------------------------------------------------------------------- */
typedef struct ipt_slot_use {
    float weight, te_weight;
    float start, end;       /* active while start <= i / n_step < end */
    const ipt_curve *curve; /* multiplies weight; NULL: 1 */
    float block[IPT_GATE_ROWS];
    const char *word; /* of the prompt, which the adapter is bound to; NULL: none */
    const char *file; /* whose adapter it is */
    bool has_profile; /* its action on high frequencies has been measured: */
    float high;       /* the larger, the higher; comparable among adapters */
} ipt_slot_use;

/* The prompts of a job, each once.  A method may add its own in `begin`. */
typedef struct ipt_texts {
    ipt_arena *arena;
    const char **text; /* [n]; NULL: not given (some models take zeros for it) */
    size_t n, bytes;
} ipt_texts;
/* Index of a text, added when it is new (copied).  Errors: IPT_ERR_ARG above IPT_MAX_TEXT(_BYTES),
 * IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_texts_add(ipt_texts *t, const char *text, uint16_t *index);

/* One of the prompts that AND joins; most prompts are one part of weight 1. */
typedef struct ipt_part {
    float weight;
    const uint16_t *text; /* [n_eval] index into the job's texts: prompt editing changes it */
} ipt_part;

/* Where a word stands among the tokens of a text, its chunks of 77 one after the other. */
enum { IPT_MAX_PLACE = 24 };
typedef struct ipt_places {
    int32_t n;
    uint16_t at[IPT_MAX_PLACE];
} ipt_places;
/* Occurrence `nth` of a word in one of the job's texts, 0 being the first; out->n is 0 when there
 * are fewer.  Errors: IPT_ERR_ARG (a word of more tokens than IPT_MAX_PLACE), IPT_ERR_NOMEM. */
typedef ipt_status (*ipt_find_fn)(void *user, uint16_t text, const char *word, int32_t nth,
                                  ipt_places *out);

/* A level of the UNet, the outermost first. */
enum { IPT_MAX_GRID = 8 };
typedef struct ipt_grid {
    int32_t h, w;
    bool has_cross; /* cross-attention lies there: its rows can give maps */
} ipt_grid;

typedef struct ipt_job {
    ipt_ctx *ctx;
    int32_t n_step;         /* of the user's count; a method acts per step */
    int32_t n_eval;         /* UNet evaluations of a picture: several a step with some samplers */
    const int32_t *step_of; /* [n_eval], 0..n_step-1; img2img begins late */
    int32_t n_slot;
    const ipt_slot_use *slot;
    ipt_texts *texts;
    const ipt_part *part; /* [n_part], at least 1 */
    int32_t n_part;
    const uint16_t *negative; /* [n_eval] index into texts; NULL: no guidance, no negative rows */
    int32_t outer_level;      /* LEVEL of --cache at which the UNet's outermost block runs alone */
    int32_t channels, h, w;   /* of the latent; its n_latent values are [C,h,w] */
    size_t n_latent;
    int32_t n_grid;
    ipt_grid grid[IPT_MAX_GRID];
    /* From `bind` on: */
    int32_t tokens; /* of each text */
    ipt_find_fn find;
    void *find_user;
    const char *const *opt; /* "key=value" */
    size_t n_opt;
} ipt_job;

/* --- what it answers: rows -------------------------------------------------------------------- */
typedef enum ipt_variant {
    IPT_UNET_FULL,
    IPT_UNET_SHALLOW, /* the outer levels only, on the deep features of cache slot `cache` */
} ipt_variant;
enum {
    IPT_WANT_EPS = 1,
    IPT_WANT_MAPS = 2, /* cross-attention on the grid of the method's `tap`, mean of heads and
                          layers: [cells, tokens] */
    IPT_WANT_DEEP = 4, /* deep features are kept in cache slot `cache`; they stay on the device */
    IPT_WANT_GRAD = 8, /* dL/d(latent) of the loss whose gradient map_grad gives */
};
enum { IPT_NEGATIVE = -1 };
/* One batch element of a UNet evaluation. */
typedef struct ipt_row {
    uint16_t text;   /* of the job's texts */
    uint16_t world;  /* rows of one world are one prediction: a negative one and its parts */
    int16_t part;    /* which of the job's parts it stands for, or IPT_NEGATIVE */
    uint16_t region; /* 0: the whole picture; k: where mask k - 1 of the job lies */
    uint16_t cache;
    uint8_t variant, want;
    float slot[IPT_MAX_SLOT]; /* multiplier of each adapter's weight, 0 = off */
} ipt_row;
typedef struct ipt_rows {
    ipt_ctx *ctx;
    ipt_row *row; /* [n]; ipt_rows_finish */
    size_t n, cap;
} ipt_rows;
/* Appends a copy.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_rows_add(ipt_rows *r, const ipt_row *row);
/* Appends a world: the job's negative prompt of evaluation `eval`, if it has one, then each part,
 * all under the same adapters slot [n_slot]. */
IPT_CHECKED ipt_status ipt_rows_world(ipt_rows *r, const ipt_job *job, int32_t eval,
                                      const float *slot);
size_t ipt_rows_worlds(const ipt_rows *r); /* highest world + 1 */
void ipt_rows_finish(ipt_rows *r);

/* What came back for a row; NULL: was not wanted. */
typedef struct ipt_result {
    const float *eps;  /* [C,h,w] */
    const float *maps; /* [cells, tokens] */
} ipt_result;

/* --- the table -------------------------------------------------------------------------------- */
typedef enum ipt_option_type {
    IPT_OPTION_INT,
    IPT_OPTION_NUMBER,
    IPT_OPTION_CHOICE
} ipt_option_type;
typedef struct ipt_option {
    const char *key, *value; /* as --help writes it: "tau", "N"; key NULL ends a table */
    const char *help;
    ipt_option_type type;
    size_t at; /* offset in the method's state: int32_t, double; int32_t of a choice */
    double min, max;
    const char *choices; /* space separated */
} ipt_option;

struct ipt_tool; /* model_io/adapter_tools.h */
struct ipt_merge_input;
typedef struct ipt_method {
    const char *name, *brief;
    const ipt_option *option; /* NULL: none of its own */
    bool wants_profile;       /* asks for has_profile and high of slots */
    size_t state_size;        /* zeroed before `begin`, options already in it when it is called */
    void (*defaults)(void *state); /* of the options; NULL: zeros */
    /* Makes one adapter of n, into the tool's `out`, before there is a job: its slot has weight 1,
     * the inputs' weights are in it.  NULL: adapters act side by side, a slot each. */
    ipt_status (*combine)(const void *state, struct ipt_tool *t, const struct ipt_merge_input *in,
                          size_t n);
    /* Checks the job against the method.  NULL: nothing to do.  Errors: IPT_ERR_ARG, in one
     * sentence. */
    ipt_status (*begin)(void *state, const ipt_job *job);
    /* The job's texts are tokens: job->find finds words in them.  NULL: nothing to do.  Errors:
     * IPT_ERR_ARG. */
    ipt_status (*bind)(void *state, const ipt_job *job);
    /* All rows that evaluation `eval` may need.  Pure: same answer whenever it is asked. */
    ipt_status (*plan)(const void *state, const ipt_job *job, int32_t eval, ipt_rows *rows);
    /* The rows of one round; NULL: those of plan, one round. */
    ipt_status (*step)(void *state, const ipt_job *job, int32_t eval, int32_t round,
                       ipt_rows *rows);
    /* Predictions [n_latent]; eps_u only where the job has a negative.  NULL: ipt_blend_mean. */
    void (*blend)(void *state, const ipt_job *job, int32_t eval, const ipt_rows *rows,
                  const ipt_result *res, float *eps_u, float *eps_c);
    /* Where its shallow rows are cut (a LEVEL of --cache); NULL or -1: it has none. */
    int32_t (*level)(const void *state, const ipt_job *job);
    /* The grid whose maps its rows may want, an index into job->grid; NULL or -1: none. */
    int32_t (*tap)(const void *state, const ipt_job *job);
    /* The loss L, and dL/d(maps) of every row that wants its gradient, into the zeros of
     * d_maps[row]. */
    ipt_status (*map_grad)(void *state, const ipt_job *job, int32_t eval, const ipt_rows *rows,
                           const ipt_result *res, float *const *d_maps, double *loss);
    /* Changes latent by d_latent, the sum over rows; *again: another round on what it is now. */
    ipt_status (*latent)(void *state, const ipt_job *job, int32_t eval, int32_t round,
                         const float *d_latent, float *latent, bool *again);
    /* The masks by which the last evaluation was blended: mask k [h,w], 0..1, of adapter slot[k].
     * NULL or 0: there are none. */
    size_t (*masks)(const void *state, const ipt_job *job, const float **mask,
                    int32_t slot[IPT_MAX_SLOT]);
} ipt_method;

extern const ipt_method ipt_method_merge, ipt_method_switch, ipt_method_composite,
    ipt_method_cmlora, ipt_method_clora, ipt_method_lego, ipt_method_lorahub;
const ipt_method *const *ipt_methods(size_t *n); /* the first is the default */
const ipt_method *
ipt_method_find(const char *name);                 /* NULL: the default's name; NULL when unknown */
const char *ipt_method_names(char *buf, size_t n); /* "merge switch composite" */
/* The method's `combine` under options "key=value".  Errors: as ipt_policy_create for options;
 * those of the merge. */
IPT_CHECKED ipt_status ipt_method_combine(const ipt_method *m, ipt_ctx *ctx, const char *const *opt,
                                          size_t n_opt, struct ipt_tool *t,
                                          const struct ipt_merge_input *in, size_t n);
const ipt_option *ipt_policy_options(void); /* those that every method understands, ended by NULL */

/* --- a method at work ------------------------------------------------------------------------- */
typedef struct ipt_policy ipt_policy;
/* The job and what it points to outlive the policy.
 * Errors: IPT_ERR_ARG: unknown name or option, value out of range, more than IPT_MAX_SLOT. */
IPT_CHECKED ipt_status ipt_policy_create(const ipt_method *m, const ipt_job *job, ipt_policy **out);
void ipt_policy_destroy(ipt_policy **p);
const ipt_method *ipt_policy_method(const ipt_policy *p);
int32_t ipt_policy_level(const ipt_policy *p); /* of its method; -1: no shallow rows */
int32_t ipt_policy_tap(const ipt_policy *p);   /* of its method; -1: no maps */
/* After the job's texts were read, before the first evaluation. */
IPT_CHECKED ipt_status ipt_policy_bind(ipt_policy *p);
/* Rows of an evaluation: all it may need, and those of one round; r is emptied first. */
IPT_CHECKED ipt_status ipt_policy_plan(const ipt_policy *p, int32_t eval, ipt_rows *r);
IPT_CHECKED ipt_status ipt_policy_step(ipt_policy *p, int32_t eval, int32_t round, ipt_rows *r);
void ipt_policy_blend(ipt_policy *p, int32_t eval, const ipt_rows *rows, const ipt_result *res,
                      float *eps_u, float *eps_c);
IPT_CHECKED ipt_status ipt_policy_map_grad(ipt_policy *p, int32_t eval, const ipt_rows *rows,
                                           const ipt_result *res, float *const *d_maps,
                                           double *loss);
IPT_CHECKED ipt_status ipt_policy_latent(ipt_policy *p, int32_t eval, int32_t round,
                                         const float *d_latent, float *latent, bool *again);
size_t ipt_policy_masks(const ipt_policy *p, const float **mask, int32_t slot[IPT_MAX_SLOT]);
/* Gates of a row at a step for one batch element of the UNet: out[IPT_GATE_ROWS][n_slot] (row
 * stride: `stride` floats). */
void ipt_policy_gates(const ipt_policy *p, const ipt_row *row, int32_t step, float *out,
                      size_t stride);
/* Gates in the text encoder for a row: out[n_slot]. */
void ipt_policy_text_gates(const ipt_policy *p, const ipt_row *row, float *out);

/* --- pieces of methods ------------------------------------------------------------------------ */
/* A `plan`: one world in which all adapters act. */
IPT_CHECKED ipt_status ipt_plan_all(const void *state, const ipt_job *job, int32_t eval,
                                    ipt_rows *rows);
/* The rows of world k: its negative one (SIZE_MAX: none) and its parts, part[n_part]. */
void ipt_world_rows(const ipt_job *job, const ipt_rows *rows, size_t world, size_t *negative,
                    size_t part[IPT_MAX_PART]);
/* The mean over worlds of their predictions, on both sides of the guidance; a world's own is
 * u + sum_k w_k (c_k - u), which is c for one part of weight 1.
 * Source: Zhong et al. 2024 (arXiv 2402.16843), LoRA Composite; Liu et al. 2022 (arXiv 2206.01714)
 * for AND, with the weights as A1111 takes them. */
void ipt_blend_mean(const ipt_job *job, const ipt_rows *rows, const ipt_result *res, float *eps_u,
                    float *eps_c);
/* The same of predictions times weight [worlds]; ones: to the bit. */
void ipt_blend_weighted(const ipt_job *job, const ipt_rows *rows, const ipt_result *res,
                        const float *weight, float *eps_u, float *eps_c);
/* The mean weighted by place: mask [worlds][h*w], whose sum is above 0 everywhere. */
void ipt_blend_masked(const ipt_job *job, const ipt_rows *rows, const ipt_result *res,
                      const float *mask, float *eps_u, float *eps_c);
#endif
