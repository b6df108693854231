/* compose/clora.c - CLoRA: a world for each adapter that is bound to words of the prompt, and one
 * without them.  A contrastive loss on what their words look at moves the latent until concepts
 * look at different places; masks from the same maps blend the worlds' predictions.  Adapters
 * without words (styles) act in all worlds.
 *
 * Source: Meral et al. 2024, CLoRA (arXiv 2403.19776).  As meant there; where its code does
 * something else, that is an option: maps=both averages over the negative prompt too, refresh=off
 * blends predictions from before the last update. */
#include "compose/concepts.h"
#include "compose/contrast.h"

#include <math.h>
#include <string.h>

enum { ON, OFF };               /* update, refresh */
enum { COND, BOTH };            /* maps */
enum { ATTENTION, MEAN, FULL }; /* masks */
enum { OVERLAP_MEAN, ARGMAX };  /* overlap */

typedef struct state {
    /* options */
    int32_t update, refine, refresh, maps, morph, overlap, masks, grid;
    double step_size, until, every, tau, guard, threshold, mask_after;
    /* of the request */
    ipt_concepts concepts;
    int32_t tap; /* grid of the maps, -1: nothing reads them */
    float *mask; /* [worlds][h*w] of the last blend */
    float *room; /* [2 n + 1][cells] */
    /* of the picture */
    int32_t n_update; /* of the step that runs */
    bool is_stopped;
} state;

static void defaults(void *st)
{
    state *s = st;
    s->refine = 20;
    s->grid = -1;
    s->step_size = 20;
    s->until = 0.5;
    s->every = 0.2;
    s->tau = 0.5;
    s->guard = 0.1;
    s->threshold = 0.4;
}

/* --- what is asked for ------------------------------------------------------------------------ */
static bool has_update(const state *s) { return s->update == ON && s->concepts.n > 1; }

/* The level that is a quarter of the latent, as published, if things can be told apart on it; else
 * the deepest where they can. */
static int32_t choose_grid(const ipt_job *job)
{
    enum { PUBLISHED = 2, LEAST = 8 };
    int32_t finest = -1, deepest = -1;
    for (int32_t i = 0; i < job->n_grid; i++) {
        const ipt_grid *g = &job->grid[i];
        if (!g->has_cross)
            continue;
        finest = finest < 0 ? i : finest;
        if ((g->h < g->w ? g->h : g->w) >= LEAST) {
            deepest = i;
            if (i == PUBLISHED)
                break;
        }
    }
    return deepest >= 0 ? deepest : finest;
}

static ipt_status choose_tap(state *s, const ipt_job *job)
{
    s->tap = -1;
    if (!has_update(s) && s->masks != ATTENTION)
        return IPT_OK;
    if (s->grid >= 0 && (s->grid >= job->n_grid || !job->grid[s->grid].has_cross))
        return ipt_fail(job->ctx, IPT_ERR_ARG,
                        "clora: grid=%d: this model's unet has no cross-attention there", s->grid);
    s->tap = s->grid >= 0 ? s->grid : choose_grid(job);
    if (s->tap < 0)
        return ipt_fail(job->ctx, IPT_ERR_ARG, "clora: this model's unet has no cross-attention");
    return IPT_OK;
}

static size_t cells_of(const state *s, const ipt_job *job)
{
    return (size_t)job->grid[s->tap].h * (size_t)job->grid[s->tap].w;
}

static ipt_status begin(void *st, const ipt_job *job)
{
    state *s = st;
    IPT_TRY(ipt_concepts_read(job, "clora", &s->concepts));
    size_t hw = (size_t)job->h * (size_t)job->w;
    size_t worlds = (size_t)s->concepts.n + 1, cells = 0;
    IPT_TRY(choose_tap(s, job));
    cells = s->tap >= 0 ? cells_of(s, job) : 1;
    s->mask = ipt_arena_alloc(job->texts->arena, worlds * hw * sizeof *s->mask);
    s->room = ipt_arena_alloc(job->texts->arena, 2 * worlds * cells * sizeof *s->room);
    return s->mask && s->room ? IPT_OK : IPT_ERR_NOMEM;
}

static int32_t tap(const void *st, const ipt_job *job)
{
    (void)job;
    return ((const state *)st)->tap;
}

/* --- rows ------------------------------------------------------------------------------------- */
/* Full masks leave nothing to the world without concepts. */
static int32_t first_world(const state *s, bool is_blended)
{
    return is_blended && s->masks == FULL ? 1 : 0;
}

typedef struct ask {
    uint8_t positive, negative; /* what rows of each kind want; 0: no such rows */
    bool is_blended;
} ask;

static ipt_status add_world(const state *s, const ipt_job *job, int32_t eval, int32_t world,
                            const ask *a, ipt_rows *rows)
{
    const ipt_wording *v = ipt_concepts_at(&s->concepts, job, eval);
    ipt_row row = {.world = (uint16_t)(world - first_world(s, a->is_blended))};
    for (int32_t i = 0; i < job->n_slot; i++)
        row.slot[i] = job->slot[i].word ? 0.0F : 1.0F;
    if (world > 0)
        row.slot[s->concepts.of[world - 1].slot] = 1.0F;
    if (job->negative && a->negative) {
        row.part = IPT_NEGATIVE;
        row.text = job->negative[eval];
        row.want = a->negative;
        IPT_TRY(ipt_rows_add(rows, &row));
    }
    row.part = 0;
    row.text = v->text[world];
    row.want = a->positive;
    return ipt_rows_add(rows, &row);
}

static ipt_status add_worlds(const state *s, const ipt_job *job, int32_t eval, const ask *a,
                             ipt_rows *rows)
{
    for (int32_t j = first_world(s, a->is_blended); j <= s->concepts.n; j++)
        IPT_TRY(add_world(s, job, eval, j, a, rows));
    return IPT_OK;
}

/* Rows whose predictions are blended, and `more` that they want. */
static ask blended(const state *s, uint8_t more)
{
    uint8_t maps = s->tap >= 0 ? IPT_WANT_MAPS : 0;
    return (ask){.positive = (uint8_t)(IPT_WANT_EPS | maps | more),
                 .negative = s->maps == BOTH ? (uint8_t)(IPT_WANT_EPS | maps | more) : IPT_WANT_EPS,
                 .is_blended = !more};
}

static ipt_status plan(const void *st, const ipt_job *job, int32_t eval, ipt_rows *rows)
{
    const state *s = st;
    const ask a = blended(s, has_update(s) ? IPT_WANT_GRAD : 0);
    return add_worlds(s, job, eval, &a, rows);
}

static int32_t updates_of(const state *s, const ipt_job *job, int32_t eval)
{
    int32_t step = job->step_of[eval];
    double n_step = job->n_step, every = s->every * n_step;
    bool is_first = eval == 0 || job->step_of[eval - 1] != job->step_of[eval];
    if (!has_update(s) || s->is_stopped || !is_first || step >= s->until * n_step)
        return 0;
    if (every > 0 && every <= 1) /* all of them; k below has 32 bits */
        return 1 + s->refine;
    int32_t k = every > 1 ? (int32_t)((step + 0.5) / every) : 0;
    for (int32_t i = k > 0 ? k - 1 : 0; i <= k + 1; i++)
        if ((int32_t)floor(i * every + 0.5) == step)
            return 1 + s->refine;
    return 1;
}

static ipt_status step(void *st, const ipt_job *job, int32_t eval, int32_t round, ipt_rows *rows)
{
    state *s = st;
    if (round == 0 && eval == 0)
        s->is_stopped = false;
    if (round == 0)
        s->n_update = updates_of(s, job, eval);
    ask a = blended(s, 0);
    if (round < s->n_update && (s->refresh == ON || round + 1 < s->n_update)) {
        a = (ask){.positive = IPT_WANT_MAPS | IPT_WANT_GRAD};
        if (s->maps == BOTH)
            a.negative = a.positive;
    } else if (round < s->n_update) {
        a = blended(s, IPT_WANT_GRAD);
    }
    return add_worlds(s, job, eval, &a, rows);
}

/* --- maps ------------------------------------------------------------------------------------- */
/* Rows of a world that have maps: one, or two with the negative's. */
static size_t mapped_rows(const ipt_job *job, const ipt_rows *rows, const ipt_result *res,
                          size_t world, size_t out[2])
{
    size_t negative = 0, part[IPT_MAX_PART], n = 0;
    ipt_world_rows(job, rows, world, &negative, part);
    if (negative != SIZE_MAX && res[negative].maps)
        out[n++] = negative;
    if (part[0] != SIZE_MAX && res[part[0]].maps)
        out[n++] = part[0];
    return n;
}

/* What token `at` of a world looks at, [cells]. */
static void read_map(const ipt_job *job, const ipt_rows *rows, const ipt_result *res, size_t world,
                     uint16_t at, size_t cells, float *out)
{
    size_t row[2], n = mapped_rows(job, rows, res, world, row);
    for (size_t i = 0; i < cells; i++) {
        out[i] = 0;
        for (size_t k = 0; k < n; k++)
            out[i] += res[row[k]].maps[i * (size_t)job->tokens + at] / (float)n;
    }
}

/* --- the latent's update ---------------------------------------------------------------------- */
/* One map of the loss: of a token of a concept's words, in one world. */
typedef struct token {
    int32_t concept, world;
    uint16_t at;
} token;

static size_t list_tokens(const state *s, const ipt_wording *v, token *out)
{
    size_t n = 0;
    for (int32_t c = 0; c < s->concepts.n; c++)
        for (int32_t j = 0; j <= s->concepts.n; j++) {
            const ipt_places *p = ipt_concepts_place(&s->concepts, v, j, c);
            for (int32_t i = 0; i < p->n; i++, n++)
                if (out)
                    out[n] = (token){c, j, p->at[i]};
        }
    return n;
}

/* The loss compares every map with every other one. */
static ipt_status bind(void *st, const ipt_job *job)
{
    enum { MOST = 4096 };
    state *s = st;
    IPT_TRY(ipt_concepts_bind(job, "clora", &s->concepts));
    for (size_t i = 0; i < s->concepts.n_wording && has_update(s); i++) {
        size_t n = list_tokens(s, &s->concepts.wording[i], NULL);
        if (n > MOST)
            return ipt_fail(job->ctx, IPT_ERR_ARG,
                            "clora: the words' tokens have %zu maps in all worlds; %d can be kept "
                            "apart: fewer adapters, shorter words, or update=off",
                            n, MOST);
    }
    return IPT_OK;
}

static ipt_status map_grad(void *st, const ipt_job *job, int32_t eval, const ipt_rows *rows,
                           const ipt_result *res, float *const *d_maps, double *loss)
{
    const state *s = st;
    const ipt_wording *v = ipt_concepts_at(&s->concepts, job, eval);
    size_t n = list_tokens(s, v, NULL), cells = cells_of(s, job), row[2];
    token *t = ipt_calloc(job->ctx, n, sizeof *t);
    int32_t *of = ipt_calloc(job->ctx, n, sizeof *of);
    float *x = ipt_calloc(job->ctx, 2 * n * cells, sizeof *x), *dx = x ? x + n * cells : NULL;
    ipt_status status = t && of && x ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        (void)list_tokens(s, v, t);
    for (size_t i = 0; i < n && status == IPT_OK; i++) {
        of[i] = t[i].concept;
        read_map(job, rows, res, (size_t)t[i].world, t[i].at, cells, x + i * cells);
    }
    if (status == IPT_OK)
        status = ipt_contrast(job->ctx, x, n, cells, of, s->tau, dx, loss);
    for (size_t i = 0; i < n && status == IPT_OK; i++) {
        size_t n_row = mapped_rows(job, rows, res, (size_t)t[i].world, row);
        for (size_t k = 0; k < n_row; k++)
            for (size_t c = 0; c < cells; c++)
                d_maps[row[k]][c * (size_t)job->tokens + t[i].at] +=
                    dx[i * cells + c] / (float)n_row;
    }
    ipt_free(t);
    ipt_free(of);
    ipt_free(x);
    return status;
}

static double length(const float *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)v[i] * (double)v[i];
    return sqrt(sum);
}

static ipt_status latent(void *st, const ipt_job *job, int32_t eval, int32_t round,
                         const float *d_latent, float *z, bool *again)
{
    state *s = st;
    double by = s->step_size, far = by * length(d_latent, job->n_latent),
           most = s->guard * length(z, job->n_latent);
    (void)eval;
    *again = s->refresh == ON || round + 1 < s->n_update;
    if (!isfinite(far)) {
        ipt_log(job->ctx, IPT_LOG_WARN,
                "clora: the gradient of the latent is not finite; no further updates");
        s->is_stopped = true;
        s->n_update = *again ? round + 1 : s->n_update;
        return IPT_OK;
    }
    if (far > most)
        by *= most / far;
    for (size_t i = 0; i < job->n_latent; i++)
        z[i] -= (float)(by * (double)d_latent[i]);
    return IPT_OK;
}

/* --- masks ------------------------------------------------------------------------------------ */
/* Where words lie on the grid: for each concept its mask, then for each how sure it is, then room
 * for a map. */
static float *mask_of(const state *s, const ipt_job *job, size_t k)
{
    return s->room + k * cells_of(s, job);
}
static float *sureness_of(const state *s, const ipt_job *job, size_t k)
{
    return mask_of(s, job, (size_t)s->concepts.n + k);
}
static float *spare_map(const state *s, const ipt_job *job)
{
    return mask_of(s, job, 2 * (size_t)s->concepts.n);
}

/* Concept k's mask on the grid: where one of its words, in its world, looks at more than a part of
 * what it looks at most; its sureness is the largest such share. */
static void threshold(const state *s, const ipt_job *job, const ipt_rows *rows,
                      const ipt_result *res, const ipt_places *p, size_t k)
{
    size_t cells = cells_of(s, job);
    float *mask = mask_of(s, job, k), *sure = sureness_of(s, job, k), *map = spare_map(s, job);
    for (size_t i = 0; i < cells; i++)
        mask[i] = sure[i] = 0;
    for (int32_t t = 0; t < p->n; t++) {
        float most = 0;
        read_map(job, rows, res, k + 1, p->at[t], cells, map);
        for (size_t i = 0; i < cells; i++)
            most = map[i] > most ? map[i] : most;
        for (size_t i = 0; i < cells && most > 0; i++) {
            sure[i] = map[i] / most > sure[i] ? map[i] / most : sure[i];
            if (map[i] > (float)s->threshold * most)
                mask[i] = 1;
        }
    }
}

/* Where several masks lie, the one that is surest keeps the cell. */
static void keep_surest(size_t n, size_t cells, float *mask, const float *sure)
{
    for (size_t i = 0; i < cells; i++) {
        size_t best = n;
        for (size_t k = 0; k < n; k++)
            if (mask[k * cells + i] > 0 &&
                (best == n || sure[k * cells + i] > sure[best * cells + i]))
                best = k;
        for (size_t k = 0; k < n; k++)
            if (k != best)
                mask[k * cells + i] = 0;
    }
}

/* s->mask from the maps. */
static void masks_from_maps(state *s, const ipt_job *job, int32_t eval, const ipt_rows *rows,
                            const ipt_result *res)
{
    const ipt_wording *v = ipt_concepts_at(&s->concepts, job, eval);
    const ipt_grid *g = &job->grid[s->tap];
    size_t n = (size_t)s->concepts.n, hw = (size_t)job->h * (size_t)job->w;
    for (size_t k = 0; k < n; k++) {
        const ipt_places *p = ipt_concepts_place(&s->concepts, v, (int32_t)k + 1, (int32_t)k);
        threshold(s, job, rows, res, p, k);
        ipt_mask_morph((ipt_morph)s->morph, g->h, g->w, mask_of(s, job, k), spare_map(s, job));
    }
    if (s->overlap == ARGMAX)
        keep_surest(n, cells_of(s, job), mask_of(s, job, 0), sureness_of(s, job, 0));
    for (size_t k = 0; k < n; k++)
        ipt_mask_enlarge(mask_of(s, job, k), g->h, g->w, s->mask + (k + 1) * hw, job->h, job->w);
    for (size_t i = 0; i < hw; i++) {
        s->mask[i] = 1;
        for (size_t k = 1; k <= n; k++)
            if (s->mask[k * hw + i] > 0)
                s->mask[i] = 0;
    }
}

static void blend(void *st, const ipt_job *job, int32_t eval, const ipt_rows *rows,
                  const ipt_result *res, float *eps_u, float *eps_c)
{
    state *s = st;
    size_t n = (size_t)s->concepts.n, hw = (size_t)job->h * (size_t)job->w;
    bool by_maps = s->masks == ATTENTION && job->step_of[eval] >= s->mask_after * job->n_step;
    for (size_t i = 0; i < (n + 1) * hw; i++) /* a full mask leaves nothing to world 0 */
        s->mask[i] = s->masks == FULL && i < hw ? 0 : 1;
    if (by_maps)
        masks_from_maps(s, job, eval, rows, res);
    if (s->masks == FULL && ipt_rows_worlds(rows) == n)
        ipt_blend_mean(job, rows, res, eps_u, eps_c);
    else
        ipt_blend_masked(job, rows, res, s->mask, eps_u, eps_c);
}

static size_t masks(const void *st, const ipt_job *job, const float **mask,
                    int32_t slot[IPT_MAX_SLOT])
{
    const state *s = st;
    *mask = s->mask + (size_t)job->h * (size_t)job->w;
    for (int32_t k = 0; k < s->concepts.n; k++)
        slot[k] = s->concepts.of[k].slot;
    return (size_t)s->concepts.n;
}

static const ipt_option option[] = {
    {"update", "on|off", "move the latent by the loss, default on", IPT_OPTION_CHOICE,
     offsetof(state, update), 0, 0, "on off"},
    {"step_size", "X", "of an update, default 20", IPT_OPTION_NUMBER, offsetof(state, step_size), 0,
     1e6, NULL},
    {"until", "SHARE", "of the steps that have updates, default 0.5", IPT_OPTION_NUMBER,
     offsetof(state, until), 0, 1, NULL},
    {"refine", "N", "further updates at refinement steps, default 20", IPT_OPTION_INT,
     offsetof(state, refine), 0, 1000, NULL},
    {"every", "SHARE",
     "of the steps from one refinement step to the next, default 0.2; 0: only the "
     "first",
     IPT_OPTION_NUMBER, offsetof(state, every), 0, 1, NULL},
    {"refresh", "on|off", "predict anew after the last update, default on; off as published",
     IPT_OPTION_CHOICE, offsetof(state, refresh), 0, 0, "on off"},
    {"maps", "cond|both", "of the prompt (default), or of the negative one too, as published",
     IPT_OPTION_CHOICE, offsetof(state, maps), 0, 0, "cond both"},
    {"tau", "X", "temperature of the loss, default 0.5", IPT_OPTION_NUMBER, offsetof(state, tau),
     0.01, 100, NULL},
    {"guard", "SHARE", "of the latent's length that an update changes at most, default 0.1",
     IPT_OPTION_NUMBER, offsetof(state, guard), 0, 1000, NULL},
    {"masks", "attention|mean|full",
     "from the maps (default); mean: all worlds everywhere; full: the concepts everywhere",
     IPT_OPTION_CHOICE, offsetof(state, masks), 0, 0, "attention mean full"},
    {"threshold", "SHARE", "of its maximum above which a map is mask, default 0.4",
     IPT_OPTION_NUMBER, offsetof(state, threshold), 0, 1, NULL},
    {"morph", "none|dilate|erode|open|close", "of masks, 3x3 cells, default none",
     IPT_OPTION_CHOICE, offsetof(state, morph), 0, 0, "none dilate erode open close"},
    {"overlap", "mean|argmax", "where masks overlap, default mean", IPT_OPTION_CHOICE,
     offsetof(state, overlap), 0, 0, "mean argmax"},
    {"mask_after", "SHARE", "of the steps before which masks=mean holds, default 0",
     IPT_OPTION_NUMBER, offsetof(state, mask_after), 0, 1, NULL},
    {"grid", "L", "level of the UNet whose attention is read; -1, the default: by size",
     IPT_OPTION_INT, offsetof(state, grid), -1, IPT_MAX_GRID - 1, NULL},
    {0},
};

const ipt_method ipt_method_clora = {
    .name = "clora",
    .brief = "LoRAs bound to words (FILE@WORD) kept apart by their attention",
    .option = option,
    .state_size = sizeof(state),
    .defaults = defaults,
    .begin = begin,
    .bind = bind,
    .plan = plan,
    .step = step,
    .blend = blend,
    .tap = tap,
    .map_grad = map_grad,
    .latent = latent,
    .masks = masks,
};
