/* eval/run.c - the pictures of all methods, sets and seeds, and what the judges say of them. */
#include "eval/run.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ADAPTER_BYTES = 1 << 28, MAX_NOTE_BYTES = 1 << 16, DIGEST = 65 };

/* --- opening ---------------------------------------------------------------------------------- */
static ipt_status choose_world(ipt_eval *v)
{
    char folder[PATH_MAX];
    if (v->o.world) {
        v->folder = v->o.world;
        return IPT_OK;
    }
    IPT_TRY(ipt_shipped_folder(v->ctx, "models/eval", "sets.json", folder, sizeof folder));
    v->folder = ipt_arena_strdup(&v->arena, folder);
    return v->folder ? IPT_OK : IPT_ERR_NOMEM;
}

static ipt_status find_judges(ipt_eval *v)
{
    char path[PATH_MAX], name[32];
    for (int i = 0; i < IPT_EVAL_JUDGES; i++) {
        ipt_name(name, sizeof name, "judge_%d.safetensors", i + 1);
        if (!ipt_path_join(path, sizeof path, v->folder, name) || !ipt_is_file(path))
            break;
        v->judge_path[v->n_judge] = ipt_arena_strdup(&v->arena, path);
        if (!v->judge_path[v->n_judge++])
            return IPT_ERR_NOMEM;
    }
    return v->n_judge > 0 ? IPT_OK
                          : ipt_fail(v->ctx, IPT_ERR_MISSING, "%s: there is no judge_1.safetensors",
                                     v->folder);
}

static ipt_status file_digest(ipt_ctx *ctx, const char *path, char out[DIGEST])
{
    ipt_sha256 sha;
    uint8_t digest[32];
    char *bytes = NULL;
    size_t n = 0;
    IPT_TRY(ipt_file_read(ctx, path, MAX_ADAPTER_BYTES, &bytes, &n));
    ipt_sha256_init(&sha);
    ipt_sha256_update(&sha, bytes, n);
    ipt_sha256_final(&sha, digest);
    ipt_hex(digest, sizeof digest, out);
    ipt_free(bytes);
    return IPT_OK;
}

/* The world's own model, or the default one; and which it is, so that another one's pictures are
 * not taken for its. */
static ipt_status know_model(ipt_eval *v)
{
    char model[PATH_MAX], path[PATH_MAX];
    if (ipt_path_join(model, sizeof model, v->folder, "model") &&
        ipt_path_join(path, sizeof path, model, "model_index.json") && ipt_is_file(path)) {
        v->model_path = ipt_arena_strdup(&v->arena, model);
        if (!v->model_path)
            return IPT_ERR_NOMEM;
    } else {
        IPT_TRY(ipt_default_model(v->ctx, model, sizeof model));
    }
    if (!ipt_path_join(path, sizeof path, model, "unet/diffusion_pytorch_model.safetensors") ||
        !ipt_is_file(path))
        return IPT_OK;
    return file_digest(v->ctx, path, v->model);
}

static ipt_status reserve(ipt_eval *v)
{
    const size_t pictures = v->n_method * v->n_set * v->n_seed; /* at most 64 * 10,000 * 1,000 */
    v->figure = ipt_calloc(v->ctx, pictures * (v->n_judge > 0 ? v->n_judge : 1),
                           IPT_FIGURES * sizeof *v->figure);
    v->cost = ipt_calloc(v->ctx, pictures, sizeof *v->cost);
    v->adapter = ipt_calloc(v->ctx, v->world.n_concept + v->world.n_style + 1, sizeof *v->adapter);
    return v->figure && v->cost && v->adapter ? IPT_OK : IPT_ERR_NOMEM;
}

ipt_status ipt_eval_open(ipt_ctx *ctx, const ipt_eval_opts *o, ipt_eval *out)
{
    ipt_eval v = {.ctx = ctx, .o = *o};
    ipt_arena_init(&v.arena, ctx);
    v.n_seed = o->seeds > 0 ? (size_t)o->seeds : 5;
    ipt_status status = ipt_eval_methods(&v.arena, o->methods, &v.method, &v.n_method);
    if (status == IPT_OK)
        status = choose_world(&v);
    if (status == IPT_OK)
        status = ipt_world_open(ctx, v.folder, &v.world);
    if (status == IPT_OK && !o->draw_only)
        status = find_judges(&v);
    if (status == IPT_OK)
        status = know_model(&v);
    if (status == IPT_OK) {
        v.n_set = o->sets > 0 && (size_t)o->sets < v.world.n_set ? (size_t)o->sets : v.world.n_set;
        status = reserve(&v);
    }
    if (status != IPT_OK) {
        ipt_eval_close(&v);
        return status;
    }
    *out = v;
    return IPT_OK;
}

void ipt_eval_close(ipt_eval *v)
{
    ipt_free(v->figure);
    ipt_free(v->cost);
    ipt_free(v->adapter);
    free(v->judges); /* jansson's */
    ipt_free(v->device);
    ipt_free(v->drawn_on);
    ipt_world_finish(&v->world);
    ipt_arena_finish(&v->arena);
    memset(v, 0, sizeof *v);
}

double *ipt_eval_figure(const ipt_eval *v, size_t method, size_t judge, size_t set, size_t seed)
{
    return v->figure +
           (((method * v->n_judge + judge) * v->n_set + set) * v->n_seed + seed) * IPT_FIGURES;
}

ipt_eval_cost *ipt_eval_cost_of(const ipt_eval *v, size_t method, size_t set, size_t seed)
{
    return v->cost + (method * v->n_set + set) * v->n_seed + seed;
}

bool ipt_eval_file(const ipt_eval *v, size_t method, size_t set, size_t seed, int part,
                   const char *ending, char *buf, size_t n)
{
    const ipt_eval_method *m = &v->method[method];
    char which[16] = "";
    if (m->kind == IPT_EVAL_SINGLE)
        ipt_name(which, sizeof which, "-%d", part + 1);
    const int len = snprintf(buf, n, "%s/%s/%03zu-%zu%s%s", v->o.out, m->folder, set + 1, seed + 1,
                             which, ending);
    return len > 0 && (size_t)len < n;
}

static int parts_of(const ipt_eval_method *m, const ipt_world_set *s)
{
    return m->kind == IPT_EVAL_SINGLE ? s->k : 1;
}

/* --- requests --------------------------------------------------------------------------------- */
/* A request and what it points to. */
typedef struct asked {
    ipt_request q;
    ipt_lora lora[IPT_EVAL_MAX_K + 1];
    const ipt_world_adapter *adapter[IPT_EVAL_MAX_K + 1];
} asked;

static void add_adapter(asked *a, const ipt_world_adapter *w, const char *word)
{
    a->adapter[a->q.n_lora] = w;
    a->lora[a->q.n_lora++] =
        (ipt_lora){.path = w->path, .weight = 1, .te_weight = 1, .word = word, .end = 1};
    a->q.lora = a->lora;
}

/* All methods begin from the same noise: the seed depends on the set and its number alone. */
static void ask(const ipt_eval *v, size_t method, size_t set, size_t seed, int part, asked *a)
{
    const ipt_eval_method *m = &v->method[method];
    const ipt_world_set *s = &v->world.set[set];
    a->q.n_lora = 0;
    ipt_request_init(&a->q);
    a->q.steps = v->o.steps > 0 ? v->o.steps : 20;
    a->q.cfg = isnan(v->o.cfg) ? 5 : v->o.cfg;
    a->q.seed = 1000 * (s->number + 1) + seed;
    a->q.prompt = m->kind == IPT_EVAL_SINGLE ? s->single[part] : s->prompt;
    a->q.model = v->model_path;
    a->q.compose = m->compose;
    a->q.compose_opt = m->opt;
    a->q.n_compose_opt = m->n_opt;
    if (m->kind == IPT_EVAL_BASE)
        return;
    for (int i = 0; i < s->k; i++) {
        const ipt_world_adapter *w = v->world.concept + s->concept[i];
        if (m->kind == IPT_EVAL_COMPOSED || i == part)
            add_adapter(a, w, w->words);
    }
    if (s->style_adapter >= 0)
        add_adapter(a, &v->world.style[s->style_adapter], NULL);
}

/* Where an adapter's digest is kept. */
static char *adapter_digest(const ipt_eval *v, const ipt_world_adapter *a)
{
    const ipt_world *w = &v->world;
    for (size_t i = 0; i < w->n_concept; i++)
        if (a == &w->concept[i])
            return v->adapter[i];
    return v->adapter[w->n_concept + (size_t)(a - w->style)];
}

/* A digest of the model and the request, with the bytes of its adapters instead of where they lie.
 */
static ipt_status digest_of(const ipt_eval *v, const asked *a, char out[DIGEST])
{
    ipt_arena arena;
    asked named = *a;
    ipt_sha256 sha;
    uint8_t digest[32];
    ipt_status status = IPT_OK;
    for (size_t i = 0; i < a->q.n_lora; i++)
        named.lora[i].path = a->adapter[i]->name;
    named.q.lora = named.lora;
    named.q.model = NULL; /* its digest stands for it */
    ipt_arena_init(&arena, v->ctx);
    const char *text = ipt_request_write(&named.q, &arena);
    ipt_sha256_init(&sha);
    ipt_sha256_update(&sha, v->model, strlen(v->model));
    if (text)
        ipt_sha256_update(&sha, text, strlen(text));
    else
        status = IPT_ERR_NOMEM;
    for (size_t i = 0; i < a->q.n_lora && status == IPT_OK; i++) {
        char *file = adapter_digest(v, a->adapter[i]);
        if (!file[0])
            status = file_digest(v->ctx, a->adapter[i]->path, file);
        if (status == IPT_OK)
            ipt_sha256_update(&sha, file, strlen(file));
    }
    ipt_arena_finish(&arena);
    ipt_sha256_final(&sha, digest);
    ipt_hex(digest, sizeof digest, out);
    return status;
}

/* --- notes: how a picture was made, and what it cost ------------------------------------------ */
const ipt_eval_cost_member ipt_eval_costs[IPT_EVAL_COSTS] = {
    {"rows_full", offsetof(ipt_eval_cost, rows_full)},
    {"rows_shallow", offsetof(ipt_eval_cost, rows_shallow)},
    {"rows_maps", offsetof(ipt_eval_cost, rows_maps)},
    {"rows_backward", offsetof(ipt_eval_cost, rows_backward)},
    {"gmac", offsetof(ipt_eval_cost, gmac)},
    {"ms", offsetof(ipt_eval_cost, ms)},
    {"peak_device_mib", offsetof(ipt_eval_cost, device_mib)},
    {"mask_separation", offsetof(ipt_eval_cost, separation)},
};

static double *field(ipt_eval_cost *c, size_t i)
{
    return (double *)(void *)((char *)c + ipt_eval_costs[i].at);
}

static ipt_status write_note(const ipt_eval *v, const char *path, const char *digest,
                             const ipt_report *p, double separation)
{
    ipt_eval_cost cost = {.rows_full = (double)p->rows_full,
                          .rows_shallow = (double)p->rows_shallow,
                          .rows_maps = (double)p->rows_maps,
                          .rows_backward = (double)p->rows_backward,
                          .gmac = p->unet_macs / 1e9,
                          .ms = p->ms_text + p->ms_fold + p->ms_sample + p->ms_vae,
                          .device_mib = (double)p->peak_device_bytes / 1048576.0,
                          .separation = separation};
    json_t *o = json_pack("{s:s, s:s, s:o}", "made_from", digest, "version", IPT_VERSION, "device",
                          ipt_json_text(p->device));
    for (size_t i = 0; i < IPT_EVAL_COSTS; i++)
        json_object_set_new(o, ipt_eval_costs[i].key,
                            isnan(*field(&cost, i)) ? json_null() : json_real(*field(&cost, i)));
    char *text = o ? json_dumps(o, JSON_INDENT(1)) : NULL;
    json_decref(o);
    if (!text)
        return ipt_fail(v->ctx, IPT_ERR_NOMEM, "no memory for %s", path);
    ipt_status status = ipt_file_write(v->ctx, path, text, strlen(text));
    free(text);
    return status;
}

/* What is in a note; false: there is none, or it is of another request. */
static bool read_note(const ipt_eval *v, const char *path, const char *digest, ipt_eval_cost *cost,
                      char device[256])
{
    json_t *o = NULL;
    if (!ipt_is_file(path) || ipt_json_load(v->ctx, path, &o) != IPT_OK)
        return false;
    const bool same = strcmp(ipt_json_str(o, "made_from", ""), digest) == 0;
    ipt_name(device, 256, "%s", ipt_json_str(o, "device", ""));
    for (size_t i = 0; i < IPT_EVAL_COSTS; i++)
        *field(cost, i) = ipt_json_num(o, ipt_eval_costs[i].key, (double)NAN);
    json_decref(o);
    return same;
}

/* --- pictures --------------------------------------------------------------------------------- */
typedef struct work {
    ipt_eval *v;
    ipt_engine *engine;
    size_t method, done, total, n_timed;
    double ms; /* of n_timed pictures of this method */
    const char *path;
    double separation; /* of the last picture */
} work;

static bool is_mine(const ipt_eval *v, size_t set)
{
    return v->o.n_shard <= 0 || set % (size_t)v->o.n_shard == (size_t)v->o.shard;
}

static size_t count_parts(const ipt_eval *v, size_t method)
{
    size_t n = 0;
    for (size_t s = 0; s < v->n_set; s++)
        n +=
            !is_mine(v, s) ? 0 : (size_t)parts_of(&v->method[method], &v->world.set[s]) * v->n_seed;
    return n;
}

static void show(const ipt_eval *v, const char *stage, size_t done, size_t total, size_t image,
                 size_t n_image, double each)
{
    if (!v->o.progress)
        return;
    const ipt_progress p = {.stage = stage,
                            .done = (int32_t)done,
                            .total = (int32_t)total,
                            .image = (int32_t)image,
                            .n_image = (int32_t)n_image,
                            .step_ms = each,
                            .eta_ms = each > 0 ? each * (double)(total - done) : -1};
    v->o.progress(v->o.user, &p);
}

static ipt_status save_picture(void *user, int32_t i, const ipt_image *im, const char *text,
                               const char *json)
{
    const work *w = user;
    (void)i;
    return ipt_image_save(w->v->ctx, w->path, im, text, json);
}

/* Overlap of two masks: cells of both over cells of either. */
static double overlap(const float *a, const float *b, size_t n)
{
    size_t both = 0, either = 0;
    for (size_t i = 0; i < n; i++) {
        const bool in_a = a[i] >= 0.5F, in_b = b[i] >= 0.5F;
        both += in_a && in_b;
        either += in_a || in_b;
    }
    return either ? (double)both / (double)either : 0;
}

static ipt_status take_masks(void *user, const ipt_masks *m)
{
    work *w = user;
    double sum = 0;
    int n = 0;
    for (size_t i = 0; i < m->n; i++)
        for (size_t k = 0; k < i; k++) {
            if (!m->mask[i].word || !m->mask[k].word)
                continue;
            sum += overlap(m->mask[i].v, m->mask[k].v, (size_t)m->h * (size_t)m->w);
            n++;
        }
    w->separation = n ? 1 - sum / n : (double)NAN;
    return IPT_OK;
}

static ipt_status make_one(work *w, size_t set, size_t seed, int part)
{
    ipt_eval *v = w->v;
    char picture[PATH_MAX], note[PATH_MAX], digest[DIGEST], device[256];
    ipt_eval_cost cost;
    ipt_report p = {0};
    asked a;
    ask(v, w->method, set, seed, part, &a);
    IPT_TRY(digest_of(v, &a, digest));
    if (!ipt_eval_file(v, w->method, set, seed, part, ".png", picture, sizeof picture) ||
        !ipt_eval_file(v, w->method, set, seed, part, ".json", note, sizeof note))
        return ipt_fail(v->ctx, IPT_ERR_OUTPUT, "%.100s...: path too long", v->o.out);
    w->done++;
    if (ipt_is_file(picture) && read_note(v, note, digest, &cost, device)) {
        v->n_kept++;
        return IPT_OK;
    }
    const double start = ipt_now_ms();
    w->path = picture;
    w->separation = (double)NAN;
    if (v->method[w->method].has_masks) {
        a.q.masks = take_masks;
        a.q.masks_user = w;
    }
    IPT_TRY(ipt_generate(w->engine, &a.q, save_picture, w, &p));
    IPT_TRY(write_note(v, note, digest, &p,
                       w->separation)); /* last: it says that the picture is whole */
    w->ms += ipt_now_ms() - start;
    w->n_timed++;
    v->n_made++;
    show(v, "pictures", w->done, w->total, w->method, v->n_method, w->ms / (double)w->n_timed);
    return IPT_OK;
}

static ipt_status make_method(work *w)
{
    ipt_eval *v = w->v;
    char folder[PATH_MAX];
    const int len = snprintf(folder, sizeof folder, "%s/%s", v->o.out, v->method[w->method].folder);
    if (len <= 0 || (size_t)len >= sizeof folder || !ipt_make_dirs(folder))
        return ipt_fail(v->ctx, IPT_ERR_OUTPUT, "%.200s: cannot make this folder", folder);
    w->done = w->n_timed = 0;
    w->ms = 0;
    w->total = count_parts(v, w->method);
    for (size_t s = 0; s < v->n_set; s++)
        for (size_t i = 0; i < v->n_seed && is_mine(v, s); i++)
            for (int part = 0; part < parts_of(&v->method[w->method], &v->world.set[s]); part++)
                IPT_TRY(make_one(w, s, i, part));
    return IPT_OK;
}

/* An engine for each method: its peak of memory is then this method's. */
ipt_status ipt_eval_pictures(ipt_eval *v)
{
    work w = {.v = v};
    for (w.method = 0; w.method < v->n_method; w.method++) {
        IPT_TRY(ipt_engine_create(v->ctx, &v->o.engine, &w.engine));
        ipt_status status = make_method(&w);
        ipt_engine_destroy(&w.engine);
        IPT_TRY(status);
    }
    return IPT_OK;
}

/* --- judging ---------------------------------------------------------------------------------- */
/* The numbers that a judge has for a set's concepts and style. */
typedef struct looked_for {
    int concept[IPT_EVAL_MAX_K], k, style;
} looked_for;

static ipt_status translate(const ipt_eval *v, const ipt_judge *j, const ipt_world_set *s,
                            looked_for *out)
{
    const char *path = ipt_judge_get_info(j)->path;
    out->k = s->k;
    out->style = ipt_judge_style(j, s->style);
    if (out->style < 0)
        return ipt_fail(v->ctx, IPT_ERR_MISSING, "%s: this judge does not know the style '%s'",
                        path, s->style);
    for (int i = 0; i < s->k; i++) {
        out->concept[i] = ipt_judge_class(j, v->world.concept[s->concept[i]].name);
        if (out->concept[i] < 0)
            return ipt_fail(v->ctx, IPT_ERR_MISSING, "%s: this judge does not know '%s'", path,
                            v->world.concept[s->concept[i]].name);
    }
    return IPT_OK;
}

/* Figures of one picture for concepts [k]. */
static void figures_of(const ipt_judge *j, const ipt_sight *s, const ipt_image *im,
                       const looked_for *want, const uint8_t rgb[3], double f[IPT_FIGURES])
{
    ipt_scored score;
    int likeliest = 0;
    ipt_eval_score(s, ipt_judge_get_info(j)->threshold, want->concept, want->k, &score);
    for (size_t i = 1; i < s->n_style; i++)
        likeliest = s->style[i] > s->style[likeliest] ? (int)i : likeliest;
    f[IPT_FIG_PRESENCE] = score.n_found == want->k;
    f[IPT_FIG_FOUND] = (double)score.n_found / want->k;
    f[IPT_FIG_LIKE_MIN] = f[IPT_FIG_LIKE_MAX] = score.likeness[0];
    f[IPT_FIG_LIKE_AVG] = 0;
    for (int i = 0; i < want->k; i++) {
        f[IPT_FIG_LIKE_MIN] = fmin(f[IPT_FIG_LIKE_MIN], score.likeness[i]);
        f[IPT_FIG_LIKE_MAX] = fmax(f[IPT_FIG_LIKE_MAX], score.likeness[i]);
        f[IPT_FIG_LIKE_AVG] += score.likeness[i] / want->k;
    }
    f[IPT_FIG_DUPLICATE] = score.duplicate;
    f[IPT_FIG_LEAK] = score.leak;
    f[IPT_FIG_STYLE] = likeliest == want->style;
    f[IPT_FIG_DRIFT] = ipt_eval_drift(im, rgb);
    f[IPT_FIG_STRANGERS] = score.strangers;
}

/* Adds a part of "single" to what the parts before it gave. */
static void join(double all[IPT_FIGURES], const double f[IPT_FIGURES], int k, bool is_first)
{
    if (is_first) {
        memset(all, 0, IPT_FIGURES * sizeof *all);
        all[IPT_FIG_PRESENCE] = 1;
        all[IPT_FIG_LIKE_MIN] = 1;
        all[IPT_FIG_LIKE_MAX] = -1;
    }
    for (int i = 0; i < IPT_FIGURES; i++)
        if (i != IPT_FIG_PRESENCE && i != IPT_FIG_LIKE_MIN && i != IPT_FIG_LIKE_MAX)
            all[i] += f[i] / k;
    all[IPT_FIG_PRESENCE] *= f[IPT_FIG_PRESENCE];
    all[IPT_FIG_LIKE_MIN] = fmin(all[IPT_FIG_LIKE_MIN], f[IPT_FIG_LIKE_MIN]);
    all[IPT_FIG_LIKE_MAX] = fmax(all[IPT_FIG_LIKE_MAX], f[IPT_FIG_LIKE_MAX]);
}

static ipt_status look_at(const ipt_eval *v, ipt_judge *j, const char *path, const looked_for *want,
                          const uint8_t rgb[3], double f[IPT_FIGURES])
{
    ipt_image im = {0};
    ipt_sight s = {0};
    IPT_TRY(ipt_image_load(v->ctx, path, &im));
    ipt_status status = ipt_judge_look(j, &im, &s);
    if (status == IPT_OK)
        figures_of(j, &s, &im, want, rgb, f);
    ipt_sight_finish(&s);
    ipt_image_finish(&im);
    return status;
}

static ipt_status judge_one(const ipt_eval *v, ipt_judge *j, size_t method, size_t judge,
                            size_t set, size_t seed)
{
    const ipt_eval_method *m = &v->method[method];
    const ipt_world_set *s = &v->world.set[set];
    double *all = ipt_eval_figure(v, method, judge, set, seed), f[IPT_FIGURES];
    char path[PATH_MAX];
    looked_for want = {.k = 0};
    IPT_TRY(translate(v, j, s, &want));
    for (int part = 0; part < parts_of(m, s); part++) {
        looked_for one = want;
        if (m->kind == IPT_EVAL_SINGLE) {
            one.k = 1;
            one.concept[0] = want.concept[part];
        }
        if (!ipt_eval_file(v, method, set, seed, part, ".png", path, sizeof path))
            return ipt_fail(v->ctx, IPT_ERR_OUTPUT, "%.100s...: path too long", v->o.out);
        IPT_TRY(look_at(v, j, path, &one, s->rgb, f));
        join(all, f, parts_of(m, s), part == 0);
    }
    return ipt_cancelled(v->ctx) ? ipt_fail(v->ctx, IPT_ERR_CANCELLED, "cancelled") : IPT_OK;
}

static ipt_status judge_all(ipt_eval *v, ipt_judge *j, size_t judge)
{
    const size_t total = v->n_method * v->n_set * v->n_seed, per_method = v->n_set * v->n_seed;
    const double start = ipt_now_ms();
    for (size_t i = 0; i < total; i++) {
        IPT_TRY(judge_one(v, j, i / per_method, judge, i / v->n_seed % v->n_set, i % v->n_seed));
        show(v, "judge", i + 1, total, judge, v->n_judge, (ipt_now_ms() - start) / (double)(i + 1));
    }
    return IPT_OK;
}

/* What a judge says of itself, for the report. */
static json_t *judge_json(const ipt_judge *j)
{
    const ipt_judge_info *i = ipt_judge_get_info(j);
    const char *slash = strrchr(i->path, '/');
    json_t *limits = json_object();
    for (size_t c = 0; c < i->n_class; c++)
        json_object_set_new(limits, i->class_name[c], json_real((double)i->threshold[c]));
    return json_pack("{s:o, s:o, s:o}", "file", ipt_json_text(slash ? slash + 1 : i->path),
                     "threshold", limits, "own_error",
                     i->error ? json_deep_copy(i->error) : json_null());
}

/* Whose cost the notes are. */
static ipt_status note_device(ipt_eval *v, const char *device)
{
    if (!v->drawn_on) {
        v->drawn_on = ipt_strdup(v->ctx, device);
        return v->drawn_on ? IPT_OK : IPT_ERR_NOMEM;
    }
    v->is_drawn_elsewhere = v->is_drawn_elsewhere || strcmp(v->drawn_on, device) != 0;
    return IPT_OK;
}

/* A part's note, which has to be there, of this request. */
static ipt_status read_part(ipt_eval *v, size_t method, size_t set, size_t seed, int part,
                            ipt_eval_cost *cost)
{
    char note[PATH_MAX], digest[DIGEST], device[256];
    asked a;
    ask(v, method, set, seed, part, &a);
    IPT_TRY(digest_of(v, &a, digest));
    if (!ipt_eval_file(v, method, set, seed, part, ".json", note, sizeof note) ||
        !read_note(v, note, digest, cost, device))
        return ipt_fail(v->ctx, IPT_ERR_MISSING,
                        "%s: this note of a picture is not there, or of another model, adapter or "
                        "prompt",
                        note);
    return note_device(v, device);
}

static ipt_status read_costs(ipt_eval *v)
{
    for (size_t i = 0; i < v->n_method * v->n_set * v->n_seed; i++) {
        const size_t method = i / (v->n_set * v->n_seed), set = i / v->n_seed % v->n_set,
                     seed = i % v->n_seed;
        ipt_eval_cost *sum = ipt_eval_cost_of(v, method, set, seed), one;
        *sum = (ipt_eval_cost){0};
        double mib = 0;
        for (int part = 0; part < parts_of(&v->method[method], &v->world.set[set]); part++) {
            IPT_TRY(read_part(v, method, set, seed, part, &one));
            for (size_t k = 0; k < IPT_EVAL_COSTS; k++)
                *field(sum, k) += *field(&one, k);
            mib = fmax(mib, one.device_mib);
            sum->device_mib = mib;
        }
    }
    return IPT_OK;
}

static ipt_status judges_look(ipt_eval *v, ipt_engine *e, json_t *list)
{
    IPT_TRY(ipt_engine_open_device(e));
    ipt_free(v->device);
    v->device = ipt_strdup(v->ctx, ipt_engine_device_name(e));
    if (!v->device)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < v->n_judge; i++) {
        ipt_judge *j = NULL;
        IPT_TRY(ipt_judge_open(v->ctx, ipt_engine_gpu(e), v->judge_path[i], &j));
        ipt_status status = judge_all(v, j, i);
        json_array_append_new(list, judge_json(j));
        ipt_judge_close(&j);
        IPT_TRY(status);
    }
    return IPT_OK;
}

ipt_status ipt_eval_judge(ipt_eval *v)
{
    ipt_engine *e = NULL;
    IPT_TRY(read_costs(v));
    json_t *list = json_array();
    ipt_status status = ipt_engine_create(v->ctx, &v->o.engine, &e);
    if (status == IPT_OK)
        status = judges_look(v, e, list);
    ipt_engine_destroy(&e);
    free(v->judges);
    v->judges = json_dumps(list, JSON_COMPACT);
    json_decref(list);
    return status == IPT_OK && !v->judges ? ipt_fail(v->ctx, IPT_ERR_NOMEM, "no memory") : status;
}
