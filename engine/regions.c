/* engine/regions.c - masks bound to prompts and adapters.  All regions are seen in one evaluation:
 * cross-attention looks at several texts, each with its share of every place, and an adapter's
 * parts have places.
 *
 * A text is seen with and without the adapters of a region, as far as both occur: keys and values
 * belong to tokens, which have no place. */
#include "engine/run.h"

#include "unet/blocks.h"

#include <math.h>
#include <string.h>

/* Adapters that are bound to one and the same mask. */
typedef struct group {
    const float *mask;
    bool has[IPT_MAX_SLOT];
} group;

typedef struct spec {
    const uint16_t *text;   /* [n_eval] what the region says; NULL: adapters' */
    bool has[IPT_MAX_SLOT]; /* or the adapters */
    const float *mask;      /* [H*W] */
} spec;

typedef struct reader {
    ipt_run *u;
    size_t n_pixel;
    spec *spec; /* [n] */
    size_t n;
    group group[IPT_MAX_SLOT];
    size_t n_group;
} reader;

/* --- what is given ---------------------------------------------------------------------------- */
/* File and the rest of "FILE@WHAT": cut at the first '@' with a file before it, else at the first.
 */
static ipt_status split(reader *r, const char *given, const char **file, const char **what)
{
    char *copy = ipt_arena_strdup(&r->u->arena, given);
    if (!copy)
        return IPT_ERR_NOMEM;
    char *cut = strchr(copy, '@');
    for (char *at = cut; at; at = strchr(at + 1, '@')) {
        *at = 0;
        bool is_file = ipt_is_file(copy);
        *at = '@';
        if (is_file) {
            cut = at;
            break;
        }
    }
    if (!cut || cut == copy)
        return ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                        "region %.200s: expected IMG@PROMPT or IMG@lora:NAME", given);
    *cut = 0;
    *file = copy;
    *what = given + (cut - copy) + 1;
    return IPT_OK;
}

/* The mask's brightness, 0..1. */
static ipt_status read_mask(reader *r, const char *file, const ipt_image *im, const float **out)
{
    const ipt_settings *s = &r->u->set;
    float *v = ipt_arena_alloc(&r->u->arena, r->n_pixel * sizeof *v), most = 0;
    if (!v)
        return IPT_ERR_NOMEM;
    if (im->w != s->width || im->h != s->height)
        return ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                        "region %.200s is %d x %d pixels, the picture %d x %d: masks have its size",
                        file, im->w, im->h, s->width, s->height);
    for (size_t i = 0; i < r->n_pixel; i++) {
        const uint8_t *p = im->rgb + 3 * i;
        v[i] = (0.299F * (float)p[0] + 0.587F * (float)p[1] + 0.114F * (float)p[2]) / 255.0F;
        v[i] = p[0] == 255 && p[1] == 255 && p[2] == 255 ? 1.0F : v[i];
        most = v[i] > most ? v[i] : most;
    }
    *out = v;
    return most > 0 ? IPT_OK
                    : ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                               "region %.200s is black everywhere: white is where it lies", file);
}

/* A file's name without its folders and ending. */
static const char *stem_of(const char *file, char *buf, size_t n)
{
    const char *base = strrchr(file, '/');
    ipt_name(buf, n, "%s", base ? base + 1 : file);
    char *dot = strrchr(buf, '.');
    if (dot && strcmp(dot, ".safetensors") == 0)
        *dot = 0;
    return buf;
}

/* The adapters of the file that is called so; it may have been given several times. */
static ipt_status find_adapter(const reader *r, const char *given, const char *name,
                               bool has[IPT_MAX_SLOT])
{
    const ipt_job *job = &r->u->job;
    ipt_ctx *ctx = r->u->e->ctx;
    char all[512] = "", stem[256];
    const char *found = NULL;
    size_t at = 0;
    for (int32_t s = 0; s < job->n_slot; s++) {
        const char *file = job->slot[s].file;
        has[s] = strcmp(stem_of(file, stem, sizeof stem), name) == 0 || strcmp(file, name) == 0;
        if (has[s] && found && strcmp(found, file) != 0)
            return ipt_fail(ctx, IPT_ERR_ARG,
                            "region %.200s: %s and %s have that name; write lora:FILE", given,
                            found, file);
        found = has[s] ? file : found;
        if (at < sizeof all)
            at += (size_t)snprintf(all + at, sizeof all - at, "%s%s", s ? ", " : "", stem);
    }
    return found ? IPT_OK
                 : ipt_fail(ctx, IPT_ERR_ARG,
                            "region %.200s: no adapter is called '%.100s'; there %s: %s", given,
                            name, job->n_slot == 1 ? "is" : "are", job->n_slot ? all : "none");
}

/* A prompt as the request's own, but that it can neither load adapters nor be joined of several. */
static ipt_status read_prompt(reader *r, const char *given, const ipt_prompt *tags,
                              const uint16_t **out)
{
    ipt_ctx *ctx = r->u->e->ctx;
    ipt_prompt_conjunct part[IPT_MAX_PART];
    size_t n = 0;
    if (tags->n_lora > 0)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "region %.200s: <lora:%.100s> stands in a region; give it in the prompt "
                        "and bind it with IMG@lora:NAME",
                        given, tags->loras[0].name);
    IPT_TRY(ipt_prompt_split(ctx, tags->text, strlen(tags->text), part, IPT_MAX_PART, &n));
    if (n != 1 || part[0].weight < 1 || part[0].weight > 1)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "region %.200s: AND and a weight at the end have no meaning in a region; "
                        "one region each, and grey for less of it",
                        given);
    return ipt_job_edits(r->u, part[0].text, part[0].len, out);
}

static ipt_status read_text(reader *r, const char *given, const char *what, const uint16_t **out)
{
    const ipt_engine *e = r->u->e;
    ipt_prompt *tags = NULL;
    IPT_TRY(ipt_prompt_create(e->ctx, e->m->tokenizer[0], what, strlen(what), NULL, &tags));
    for (size_t i = 0; i < tags->n_ignored; i++)
        ipt_log(e->ctx, IPT_LOG_WARN, "region: %.100s has no meaning here and is left out",
                tags->ignored[i]);
    ipt_status status = read_prompt(r, given, tags, out);
    ipt_prompt_destroy(&tags);
    return status;
}

static ipt_status read_spec(reader *r, size_t i)
{
    const ipt_request *q = r->u->r;
    const char *given = q->region[i], *file = "", *what = "";
    ipt_image im = {0};
    spec *s = &r->spec[r->n++];
    IPT_TRY(split(r, given, &file, &what));
    if (strspn(what, " \t\r\n") == strlen(what))
        return ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                        "region %.200s: no prompt behind '@'; expected IMG@PROMPT or IMG@lora:NAME",
                        given);
    if (strncmp(what, "lora:", 5) == 0)
        IPT_TRY(find_adapter(r, given, what + 5, s->has));
    else
        IPT_TRY(read_text(r, given, what, &s->text));
    IPT_TRY(ipt_trace_spares(r->u->e->ctx, q->trace, file));
    IPT_TRY(ipt_image_load(r->u->e->ctx, file, &im));
    ipt_status status = read_mask(r, file, &im, &s->mask);
    ipt_image_finish(&im);
    return status;
}

/* --- shares ----------------------------------------------------------------------------------- */
static bool is_full(const reader *r, const float *mask)
{
    for (size_t i = 0; i < r->n_pixel; i++)
        if (mask[i] < 1)
            return false;
    return true;
}

/* A slot's places: the largest of its regions; NULL: everywhere. */
static ipt_status place_slot(reader *r, int32_t slot, float **place)
{
    float *p = NULL;
    for (size_t i = 0; i < r->n; i++) {
        const spec *s = &r->spec[i];
        if (!s->has[slot])
            continue;
        if (!p && !(p = ipt_arena_alloc(&r->u->arena, r->n_pixel * sizeof *p)))
            return IPT_ERR_NOMEM;
        for (size_t k = 0; k < r->n_pixel; k++)
            p[k] = s->mask[k] > p[k] ? s->mask[k] : p[k];
    }
    *place = p && is_full(r, p) ? NULL : p;
    return IPT_OK;
}

static ipt_status place_slots(reader *r)
{
    ipt_regions *g = &r->u->regions;
    for (int32_t s = 0; s < IPT_MAX_SLOT; s++) {
        size_t k = 0;
        IPT_TRY(place_slot(r, s, &g->place[s]));
        while (g->place[s] && k < r->n_group &&
               memcmp(r->group[k].mask, g->place[s], r->n_pixel * sizeof(float)) != 0)
            k++;
        if (!g->place[s])
            continue;
        r->group[k].mask = g->place[s];
        r->group[k].has[s] = true;
        r->n_group = k + 1 > r->n_group ? k + 1 : r->n_group;
    }
    g->is_placed = r->n_group > 0;
    return IPT_OK;
}

/* What a mask has of a place, or what all of them leave over.  Their sum counts as 1 where it is
 * more, or so little less that only rounding (masks are 8 bit) can have made it so. */
static float part(float sum, float own, bool is_rest)
{
    const float rounding = 1e-5F;
    if (is_rest)
        return sum < 1 - rounding ? 1 - sum : 0;
    return sum > 1 ? own / sum : own;
}

/* One text that is seen: a region's, or (region NULL) the prompt; under the adapters of a group, or
 * (NULL) of none. */
static ipt_status add_text(reader *r, const spec *region, const group *of, const float *sum_text,
                           const float *sum_group)
{
    ipt_regions *g = &r->u->regions;
    float *share = ipt_arena_alloc(&r->u->arena, r->n_pixel * sizeof *share), most = 0;
    if (!share)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < r->n_pixel; i++) {
        share[i] = part(sum_text[i], region ? region->mask[i] : 0, !region) *
                   part(sum_group[i], of ? of->mask[i] : 0, !of);
        most = share[i] > most ? share[i] : most;
    }
    if (!(most > 0))
        return IPT_OK;
    if (g->n_text == IPT_MAX_CONTEXT)
        return ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                        "regions: more than %d combinations of prompts and adapters",
                        IPT_MAX_CONTEXT);
    ipt_region_text *t = &g->text[g->n_text++];
    t->text = region ? region->text : NULL;
    t->share = share;
    for (int32_t s = 0; s < IPT_MAX_SLOT; s++)
        t->acts[s] = !g->place[s] || (of && of->has[s]);
    return IPT_OK;
}

static ipt_status add_texts(reader *r)
{
    float *sum = ipt_arena_alloc(&r->u->arena, 2 * r->n_pixel * sizeof *sum);
    if (!sum)
        return IPT_ERR_NOMEM;
    float *of_texts = sum, *of_groups = sum + r->n_pixel;
    for (size_t k = 0; k < r->n; k++)
        for (size_t i = 0; r->spec[k].text && i < r->n_pixel; i++)
            of_texts[i] += r->spec[k].mask[i];
    for (size_t k = 0; k < r->n_group; k++)
        for (size_t i = 0; i < r->n_pixel; i++)
            of_groups[i] += r->group[k].mask[i];
    for (size_t k = 0; k <= r->n; k++) { /* 0: the prompt */
        const spec *s = k ? &r->spec[k - 1] : NULL;
        for (size_t j = 0; (!s || s->text) && j <= r->n_group; j++)
            IPT_TRY(add_text(r, s, j ? &r->group[j - 1] : NULL, of_texts, of_groups));
    }
    return IPT_OK;
}

ipt_status ipt_regions_read(ipt_run *u)
{
    const ipt_request *q = u->r;
    ipt_ctx *ctx = u->e->ctx;
    reader r = {.u = u, .n_pixel = (size_t)u->set.width * (size_t)u->set.height};
    if (q->n_region == 0)
        return IPT_OK;
    if (ipt_policy_tap(u->policy) >= 0)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "regions: compose method %s finds places itself; take merge",
                        ipt_policy_method(u->policy)->name);
    if (u->job.n_part > 1)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "regions: the prompt is joined of %d by AND, expected one", u->job.n_part);
    r.spec = ipt_arena_alloc(&u->arena, q->n_region * sizeof *r.spec);
    if (!r.spec)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < q->n_region; i++)
        IPT_TRY(read_spec(&r, i));
    IPT_TRY(place_slots(&r));
    return add_texts(&r);
}

/* --- rows ------------------------------------------------------------------------------------- */
ipt_row ipt_regions_row(const ipt_run *u, const ipt_row *row, int32_t k)
{
    const ipt_regions *g = &u->regions;
    ipt_row out = *row;
    if (g->n_text == 0)
        return out;
    const ipt_region_text *t = &g->text[k];
    if (t->text && row->part >= 0)
        out.text = t->text[u->eval];
    for (int32_t s = 0; s < u->job.n_slot; s++)
        out.slot[s] = t->acts[s] ? row->slot[s] : 0;
    return out;
}

bool ipt_regions_same(const ipt_run *u, int32_t a, int32_t b)
{
    const ipt_regions *g = &u->regions;
    bool same = true;
    for (int32_t k = 0; k < g->n_text; k++)
        same = same && (!g->text[k].text || g->text[k].text[a] == g->text[k].text[b]);
    return same;
}

/* --- places on the device --------------------------------------------------------------------- */
/* A grid over the picture: cells of `side` pixels each way, those at the end what is left of them,
 * or more. */
typedef struct cells {
    int32_t h, w, side;
} cells;

static int32_t end_of(int32_t i, int32_t n, int32_t side, int32_t all)
{
    return i + 1 == n ? all : (i + 1) * side;
}

/* The mean of what each cell covers. */
static void shrink(const ipt_run *u, const float *from, const cells *c, float *to, size_t step)
{
    const int32_t H = u->set.height, W = u->set.width;
    for (int32_t y = 0; y < c->h; y++)
        for (int32_t x = 0; x < c->w; x++) {
            int32_t y0 = y * c->side, y1 = end_of(y, c->h, c->side, H), x0 = x * c->side,
                    x1 = end_of(x, c->w, c->side, W);
            double sum = 0;
            for (int32_t v = y0; v < y1; v++)
                for (int32_t h = x0; h < x1; h++)
                    sum += (double)from[(size_t)v * (size_t)W + (size_t)h];
            to[((size_t)y * (size_t)c->w + (size_t)x) * step] =
                (float)(sum / ((double)(y1 - y0) * (x1 - x0)));
        }
}

static ipt_status write_shares(const ipt_run *u, ipt_plan *p, const cells *c, float *room)
{
    const ipt_regions *g = &u->regions;
    size_t n = (size_t)c->h * (size_t)c->w;
    char name[48];
    for (int32_t k = 0; k < g->n_text; k++) {
        ipt_name(name, sizeof name, "share%d_%zu", k, n);
        if (!ipt_plan_has(p, name))
            continue;
        shrink(u, g->text[k].share, c, room, 1);
        IPT_TRY(ipt_plan_write(p, name, room, n * sizeof *room));
    }
    return IPT_OK;
}

/* place [b][cells][slots]; adapters without regions are everywhere. */
static ipt_status write_places(const ipt_run *u, ipt_plan *p, const cells *c, float *room)
{
    size_t slots = (size_t)u->job.n_slot, n = (size_t)c->h * (size_t)c->w * slots,
           b = (size_t)u->batch;
    char name[48];
    ipt_name(name, sizeof name, "place%d", c->h * c->w);
    if (!u->regions.is_placed || !ipt_plan_has(p, name))
        return IPT_OK;
    for (size_t i = 0; i < n; i++)
        room[i] = 1;
    for (size_t s = 0; s < slots; s++)
        if (u->regions.place[s])
            shrink(u, u->regions.place[s], c, room + s, slots);
    for (size_t k = 1; k < b; k++)
        memcpy(room + k * n, room, n * sizeof *room);
    return ipt_plan_write(p, name, room, b * n * sizeof *room);
}

ipt_status ipt_regions_write(ipt_run *u, ipt_plan *p)
{
    size_t most = (size_t)u->set.h * (size_t)u->set.w;
    if (u->regions.n_text == 0 || !p)
        return IPT_OK;
    float *room =
        ipt_calloc(u->e->ctx, most * ((size_t)u->batch * (size_t)u->job.n_slot + 1), sizeof *room);
    ipt_status status = room ? IPT_OK : IPT_ERR_NOMEM;
    for (int32_t i = 0; i <= u->job.n_grid && status == IPT_OK; i++) {
        cells c = {1, 1, 0}; /* at the end one place for the time */
        if (i < u->job.n_grid)
            c = (cells){u->job.grid[i].h, u->job.grid[i].w, u->set.width / u->set.w << i};
        status = write_shares(u, p, &c, room);
        if (status == IPT_OK)
            status = write_places(u, p, &c, room);
    }
    ipt_free(room);
    return status;
}
