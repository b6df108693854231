/* eval/run.h - the evaluation itself: methods, pictures of all sets under the same noise, their
 * figures.
 *
 * Life: ipt_eval_open -> ipt_eval_pictures -> ipt_eval_judge -> ipt_eval_report (report.h) ->
 * ipt_eval_close; either of the two in the middle may be left out, so that pictures can be drawn on
 * one machine, by several processes (shards), and judged on another. Pictures lie in
 * OUT/METHOD/NNN-S.png with a note of how they were made (.json) and stay: what is there whole, and
 * was asked for in the same words with the same adapters, is not made again. Threads: one. */
#ifndef IPT_EVAL_RUN_H
#define IPT_EVAL_RUN_H
#include "eval/scenes.h"

typedef struct ipt_eval_opts {
    const char *world;   /* folder of sets.json, adapters, judge_*.safetensors and, if it is not the
                            default model's world, model/; NULL: models/eval */
    const char *out;     /* folder for pictures and reports, made when missing */
    const char *methods; /* "merge,clora:update=off;grid=1": see ipt_eval_methods */
    int32_t sets, seeds, steps; /* sets 0: all; seeds 0: 5; steps 0: 20 */
    int32_t shard, n_shard; /* only sets shard, shard + n_shard, ... are drawn; n_shard 0: all */
    bool draw_only;         /* no judge is looked for */
    double cfg;             /* NAN: 5 */
    ipt_engine_opts engine;
    ipt_progress_fn progress; /* stages "pictures" and "judge" */
    void *user;
} ipt_eval_opts;

typedef enum ipt_eval_kind {
    IPT_EVAL_BASE,   /* no adapter: what the model makes of the words alone */
    IPT_EVAL_SINGLE, /* each concept in a picture of its own: what composing can reach at most */
    IPT_EVAL_COMPOSED,
} ipt_eval_kind;
typedef struct ipt_eval_method {
    ipt_eval_kind kind;
    const char *label;   /* as it was asked for */
    const char *folder;  /* the same as a file name */
    const char *compose; /* of a request */
    bool has_masks;      /* it says where it let each adapter in */
    const char *const *opt;
    size_t n_opt;
} ipt_eval_method;
/* Reads a list of methods (NULL: base, single and those that need no preparation), ',' between
 * them; ':' before a method's options, ';' between those. Memory from arena.  Errors: IPT_ERR_ARG
 * names the method or option that this build does not have.
 */
IPT_CHECKED ipt_status ipt_eval_methods(ipt_arena *arena, const char *list,
                                        const ipt_eval_method **out, size_t *n);

/* Figures of one picture by one judge; "single" has the k pictures of a set as one. */
typedef enum ipt_figure {
    IPT_FIG_PRESENCE, /* 1: all concepts are there, each in a place of its own */
    IPT_FIG_FOUND,    /* share of the concepts that are */
    IPT_FIG_LIKE_MIN,
    IPT_FIG_LIKE_AVG,
    IPT_FIG_LIKE_MAX,
    IPT_FIG_DUPLICATE,
    IPT_FIG_LEAK,
    IPT_FIG_STYLE, /* 1: the style that was asked for is the likeliest */
    IPT_FIG_DRIFT,
    IPT_FIG_STRANGERS,
    IPT_FIGURES
} ipt_figure;
typedef struct ipt_eval_cost {
    double rows_full, rows_shallow, rows_maps, rows_backward; /* UNet rows */
    double gmac;       /* 10^9 multiply-adds of all of them */
    double ms;         /* text, folding, sampling, decoding */
    double device_mib; /* peak so far */
    double
        separation; /* of the concepts' masks: 1 - mean overlap (IoU) of two; NAN: there are none */
} ipt_eval_cost;
/* Its members by their names in JSON, in their order; the first IPT_EVAL_WORK are what work cost.
 */
typedef struct ipt_eval_cost_member {
    const char *key;
    size_t at; /* of a double in ipt_eval_cost, bytes */
} ipt_eval_cost_member;
enum { IPT_EVAL_WORK = 7, IPT_EVAL_COSTS };
extern const ipt_eval_cost_member ipt_eval_costs[IPT_EVAL_COSTS];

enum { IPT_EVAL_JUDGES = 8 };
typedef struct ipt_eval {
    ipt_ctx *ctx;
    ipt_arena arena;
    ipt_eval_opts o;
    const char *folder; /* of the world */
    ipt_world world;
    const ipt_eval_method *method;
    size_t n_method, n_set, n_seed, n_judge;
    const char *judge_path[IPT_EVAL_JUDGES];
    char (*adapter)[65];     /* digests of the world's concepts, then styles; "": not read yet */
    const char *model_path;  /* the world's own model; NULL: the default model */
    char model[65];          /* digest of its UNet; "": it is no folder */
    char *device;            /* that judged; NULL: none yet */
    char *drawn_on;          /* device of the notes, the first one's; NULL: none was read yet */
    bool is_drawn_elsewhere; /* some pictures are of another device than drawn_on */
    size_t n_made, n_kept;   /* pictures of this run, and of earlier ones */
    double *figure;          /* [method][judge][set][seed][IPT_FIGURES] */
    ipt_eval_cost *cost;     /* [method][set][seed] */
    char *judges;            /* JSON list of the judges' own words about themselves */
} ipt_eval;

/* Reads the world and the methods, looks for judges; nothing is computed.  *o is copied, its texts
 * are not. Ownership of *out: caller, ipt_eval_close.  Errors: those of ipt_world_open and
 * ipt_eval_methods. */
IPT_CHECKED ipt_status ipt_eval_open(ipt_ctx *ctx, const ipt_eval_opts *o, ipt_eval *out);
void ipt_eval_close(ipt_eval *v); /* safe on zeroed */
/* Makes the pictures that are not there.  Errors: those of ipt_generate and of writing;
 * IPT_ERR_CANCELLED: what was made stays. */
IPT_CHECKED ipt_status ipt_eval_pictures(ipt_eval *v);
/* All judges look at all pictures: fills figure and cost.  Errors: those of files and judges;
 * IPT_ERR_MISSING names a picture that was not drawn. */
IPT_CHECKED ipt_status ipt_eval_judge(ipt_eval *v);
/* [IPT_FIGURES] of one picture by one judge, and what it cost; both lie in the evaluation. */
double *ipt_eval_figure(const ipt_eval *v, size_t method, size_t judge, size_t set, size_t seed);
ipt_eval_cost *ipt_eval_cost_of(const ipt_eval *v, size_t method, size_t set, size_t seed);
/* A picture's file; part: of "single", else 0.  false: the name is too long. */
bool ipt_eval_file(const ipt_eval *v, size_t method, size_t set, size_t seed, int part,
                   const char *ending, char *buf, size_t n);
#endif
