/* eval/scenes.h - what is composed: adapters, and sets of them with prompts, from the file
 * sets.json of a world.
 *
 * The file is written by tools/eval_compose/sets.py and untrusted.
 * Threads: a world belongs to one thread at a time. */
#ifndef IPT_EVAL_SCENES_H
#define IPT_EVAL_SCENES_H
#include "eval/metrics.h"

typedef struct ipt_world_adapter {
    const char *name;  /* as the judges call the concept or the style */
    const char *words; /* of a prompt: what the adapter is bound to; a style's are its trigger */
    const char *path;
} ipt_world_adapter;

typedef struct ipt_world_set {
    size_t number; /* in the file */
    int k;
    size_t concept[IPT_EVAL_MAX_K]; /* of the world's concepts, different ones */
    bool is_same_family;
    const char *style; /* as the judges call it */
    int style_adapter; /* of the world's styles; -1: a style that the model knows */
    uint8_t rgb[3];    /* of the background that is asked for */
    const char *prompt, *single[IPT_EVAL_MAX_K]; /* of all, of each concept alone */
} ipt_world_set;

typedef struct ipt_world {
    ipt_arena arena;
    const ipt_world_adapter *concept, *style;
    const ipt_world_set *set;
    size_t n_concept, n_style, n_set;
} ipt_world;

/* Reads FOLDER/sets.json; adapters' files are looked for in the folder.  Ownership of *out: caller,
 * ipt_world_finish.  Errors: those of the file; IPT_ERR_FORMAT names the set and what is wrong with
 * it; IPT_ERR_MISSING names an adapter whose file is not there. */
IPT_CHECKED ipt_status ipt_world_open(ipt_ctx *ctx, const char *folder, ipt_world *out);
void ipt_world_finish(ipt_world *w);

/* --- groups of sets that figures are given for ------------------------------------------------ */
typedef struct ipt_eval_group {
    const char *key, *title;
    int k;         /* 0: any */
    int is_same;   /* 1, 0; -1: any */
    int is_styled; /* with a style adapter: 1, 0; -1: any */
} ipt_eval_group;
const ipt_eval_group *ipt_eval_groups(size_t *n);
bool ipt_eval_is_in(const ipt_eval_group *g, const ipt_world_set *s);
#endif
