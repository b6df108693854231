/* eval/scenes.c - a world's adapters and sets from JSON. */
#include "eval/scenes.h"

#include <jansson.h>
#include <string.h>

enum { MAX_SETS = 10000, MAX_ADAPTERS = 1000 };

typedef struct reader {
    ipt_ctx *ctx;
    const char *folder, *file;
    ipt_world *w;
} reader;

static char *keep(const reader *r, const char *s) { return ipt_arena_strdup(&r->w->arena, s); }

/* A text that has to be there; NULL in *out only after a failure. */
static ipt_status text_of(const reader *r, const json_t *o, const char *what, size_t i,
                          const char *key, const char **out)
{
    const char *s = ipt_json_str(o, key, NULL);
    if (!s || !s[0])
        return ipt_fail(r->ctx, IPT_ERR_FORMAT, "%s: %s %zu has no text '%s'", r->file, what, i + 1,
                        key);
    *out = keep(r, s);
    return *out ? IPT_OK : IPT_ERR_NOMEM;
}

/* --- adapters --------------------------------------------------------------------------------- */
static ipt_status read_adapter(const reader *r, const json_t *o, const char *what, size_t i,
                               const char *words, ipt_world_adapter *a)
{
    char path[4096];
    const char *file = NULL;
    IPT_TRY(text_of(r, o, what, i, "name", &a->name));
    IPT_TRY(text_of(r, o, what, i, words, &a->words));
    IPT_TRY(text_of(r, o, what, i, "file", &file));
    if (!ipt_path_join(path, sizeof path, r->folder, file) || !ipt_is_file(path))
        return ipt_fail(r->ctx, IPT_ERR_MISSING, "%s: %s '%s': there is no file %s/%s", r->file,
                        what, a->name, r->folder, file);
    a->path = keep(r, path);
    return a->path ? IPT_OK : IPT_ERR_NOMEM;
}

static ipt_status read_adapters(const reader *r, const json_t *root, const char *key,
                                const char *words, const ipt_world_adapter **out, size_t *n)
{
    const json_t *list = json_object_get(root, key);
    const size_t count = json_array_size(list);
    if (!json_is_array(list) || count > MAX_ADAPTERS)
        return ipt_fail(r->ctx, IPT_ERR_FORMAT, "%s: no list '%s' of at most %d adapters", r->file,
                        key, MAX_ADAPTERS);
    ipt_world_adapter *a = ipt_arena_alloc(&r->w->arena, (count + 1) * sizeof *a);
    if (!a)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < count; i++)
        IPT_TRY(read_adapter(r, json_array_get(list, i), key, i, words, &a[i]));
    *out = a;
    *n = count;
    return IPT_OK;
}

static int find(const ipt_world_adapter *a, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(a[i].name, name) == 0)
            return (int)i;
    return -1;
}

/* --- sets ------------------------------------------------------------------------------------- */
static ipt_status read_concepts(const reader *r, const json_t *o, ipt_world_set *s)
{
    const json_t *names = json_object_get(o, "concepts"), *single = json_object_get(o, "single");
    const size_t k = json_array_size(names);
    if (k < 1 || k > IPT_EVAL_MAX_K || json_array_size(single) != k)
        return ipt_fail(
            r->ctx, IPT_ERR_FORMAT,
            "%s: set %zu has %zu concepts and %zu prompts for them alone, expected 1 to %d of both",
            r->file, s->number + 1, k, json_array_size(single), IPT_EVAL_MAX_K);
    for (size_t i = 0; i < k; i++) {
        const char *name = json_string_value(json_array_get(names, i)),
                   *alone = json_string_value(json_array_get(single, i));
        const int c = name ? find(r->w->concept, r->w->n_concept, name) : -1;
        bool twice = false;
        for (size_t j = 0; j < i; j++)
        twice = twice || s->concept[j] == (size_t)c;
        if (c < 0 || twice || !alone)
            return ipt_fail(r->ctx, IPT_ERR_FORMAT, "%s: set %zu: concept '%s' is %s", r->file,
                            s->number + 1, name ? name : "?",
                            twice   ? "there twice"
                            : c < 0 ? "unknown"
                                    : "without a prompt");
        s->concept[i] = (size_t)c;
        s->single[i] = keep(r, alone);
        if (!s->single[i])
            return IPT_ERR_NOMEM;
    }
    s->k = (int)k;
    return IPT_OK;
}

static ipt_status read_set(const reader *r, const json_t *o, size_t i, ipt_world_set *s)
{
    const json_t *rgb = json_object_get(o, "rgb");
    s->number = i;
    IPT_TRY(read_concepts(r, o, s));
    IPT_TRY(text_of(r, o, "set", i, "prompt", &s->prompt));
    IPT_TRY(text_of(r, o, "set", i, "style", &s->style));
    s->is_same_family = ipt_json_bool(o, "same_family", false);
    s->style_adapter = find(r->w->style, r->w->n_style, s->style);
    for (size_t c = 0; c < 3; c++) {
        const json_t *v = json_array_get(rgb, c);
        const json_int_t level = json_is_integer(v) ? json_integer_value(v) : -1;
        if (level < 0 || level > 255)
            return ipt_fail(r->ctx, IPT_ERR_FORMAT,
                            "%s: set %zu: 'rgb' is not three numbers 0..255", r->file, i + 1);
        s->rgb[c] = (uint8_t)level;
    }
    return IPT_OK;
}

static ipt_status read_sets(const reader *r, const json_t *root)
{
    const json_t *list = json_object_get(root, "sets");
    const size_t count = json_array_size(list);
    if (count == 0 || count > MAX_SETS)
        return ipt_fail(r->ctx, IPT_ERR_FORMAT, "%s: no list 'sets' of 1 to %d sets", r->file,
                        MAX_SETS);
    ipt_world_set *s = ipt_arena_alloc(&r->w->arena, count * sizeof *s);
    if (!s)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < count; i++)
        IPT_TRY(read_set(r, json_array_get(list, i), i, &s[i]));
    r->w->set = s;
    r->w->n_set = count;
    return IPT_OK;
}

ipt_status ipt_world_open(ipt_ctx *ctx, const char *folder, ipt_world *out)
{
    char file[4096];
    json_t *root = NULL;
    ipt_world w = {.n_set = 0};
    reader r = {.ctx = ctx, .folder = folder, .file = file, .w = &w};
    ipt_arena_init(&w.arena, ctx);
    if (!ipt_path_join(file, sizeof file, folder, "sets.json"))
        return ipt_fail(ctx, IPT_ERR_IO, "%.200s...: path too long", folder);
    IPT_TRY(ipt_json_load(ctx, file, &root));
    ipt_status status = read_adapters(&r, root, "concepts", "word", &w.concept, &w.n_concept);
    if (status == IPT_OK)
        status = read_adapters(&r, root, "styles", "words", &w.style, &w.n_style);
    if (status == IPT_OK)
        status = read_sets(&r, root);
    json_decref(root);
    if (status != IPT_OK) {
        ipt_world_finish(&w);
        return status;
    }
    *out = w;
    return IPT_OK;
}

void ipt_world_finish(ipt_world *w)
{
    ipt_arena_finish(&w->arena);
    memset(w, 0, sizeof *w);
}

/* --- groups ----------------------------------------------------------------------------------- */
static const ipt_eval_group groups[] = {
    {"pairs_same_family", "pairs of one family", 2, 1, 0},
    {"pairs_other", "pairs of two families", 2, 0, 0},
    {"pairs", "all pairs", 2, -1, 0},
    {"triples", "three objects", 3, -1, 0},
    {"quadruples", "four objects", 4, -1, 0},
    {"styled", "pairs with a style adapter", 2, -1, 1},
    {"all", "all sets", 0, -1, -1},
};

const ipt_eval_group *ipt_eval_groups(size_t *n)
{
    *n = IPT_COUNT(groups);
    return groups;
}

bool ipt_eval_is_in(const ipt_eval_group *g, const ipt_world_set *s)
{
    return (g->k == 0 || g->k == s->k) &&
           (g->is_same < 0 || g->is_same == (int)s->is_same_family) &&
           (g->is_styled < 0 || g->is_styled == (int)(s->style_adapter >= 0));
}
