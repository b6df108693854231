/* eval/judge.h - a judge: a small network that says what the windows of a picture show.
 *
 * It was trained on drawings that no generator saw (tools/eval_compose/README.md) and runs through
 * the engine's own graph.  Files are untrusted. Threads: a judge belongs to one thread at a time.
 */
#ifndef IPT_EVAL_JUDGE_H
#define IPT_EVAL_JUDGE_H
#include "engine/impasto.h"

struct ipt_gpu;
struct json_t;

/* Views of a picture of 64 x 64: 25 small windows of 32 x 32, 8 pixels apart, row by row, then the
 * whole. */
enum {
    IPT_VIEW_SIDE = 64,
    IPT_VIEW_WINDOW = 32,
    IPT_VIEW_STEP = 8,
    IPT_VIEW_ROW = 5,
    IPT_VIEW_SMALL = IPT_VIEW_ROW * IPT_VIEW_ROW,
    IPT_VIEW_WHOLE = IPT_VIEW_SMALL,
    IPT_VIEWS = IPT_VIEW_SMALL + 1,
};

typedef struct ipt_judge ipt_judge;

typedef struct ipt_judge_info {
    const char *path;
    size_t n_class; /* concepts: "another object" and "nothing" follow them in a sight */
    const char *const *class_name;
    size_t n_style;
    const char *const *style_name;
    const float *threshold; /* [n_class] of a view's probability, from which a concept is there */
    const struct json_t *error; /* own error on real drawings; NULL: not said */
} ipt_judge_info;

/* Probabilities and likenesses of one picture. */
typedef struct ipt_sight {
    size_t n_class, n_style;
    float *p;     /* [IPT_VIEWS][n_class + 2] sum to 1 in a view */
    float *like;  /* [IPT_VIEWS][n_class] cosine to the concept's reference, -1..1 */
    float *style; /* [n_style] of the whole, sum to 1 */
} ipt_sight;

/* Opens a file of tools/eval_compose/judge_export.py and records its plan; gpu NULL: the host's
 * reference run, in double.  ctx and gpu outlive it.  Errors: those of files and plans;
 * IPT_ERR_FORMAT and IPT_ERR_SHAPE name what is not a judge's. */
IPT_CHECKED ipt_status ipt_judge_open(ipt_ctx *ctx, struct ipt_gpu *gpu, const char *path,
                                      ipt_judge **out);
void ipt_judge_close(ipt_judge **j); /* j and *j may be NULL */
const ipt_judge_info *ipt_judge_get_info(const ipt_judge *j);
/* Number of a concept or a style, -1: the judge does not know it. */
int ipt_judge_class(const ipt_judge *j, const char *name);
int ipt_judge_style(const ipt_judge *j, const char *name);

/* Looks at a picture of any size, shrunk to 64 x 64: by means where its edge is a multiple, else by
 * Lanczos-3.  Ownership of *out: caller,
 * ipt_sight_finish.  Errors: those of the plan; IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_judge_look(ipt_judge *j, const ipt_image *im, ipt_sight *out);
void ipt_sight_finish(ipt_sight *s); /* safe on zeroed */
/* Raw outputs of the last look, for tests: cells [64][n_cell] logits, features [64][n_feature]. */
const float *ipt_judge_cells(const ipt_judge *j, size_t *n_cell);
const float *ipt_judge_features(const ipt_judge *j, size_t *n_feature);
#endif
