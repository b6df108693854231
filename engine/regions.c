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
    const char *text;  /* what the region says; NULL: an adapter's */
    int32_t slot;      /* or the adapter */
    const float *mask; /* [H*W] */
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
/* File and the rest of "FILE@WHAT"; a file with '@' in its name comes before the first '@'. */
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

static ipt_status find_adapter(const reader *r, const char *given, const char *name, int32_t *out)
{
    const ipt_job *job = &r->u->job;
    char all[512] = "", stem[256];
    size_t at = 0;
    for (*out = 0; *out < job->n_slot; ++*out) {
        const char *file = job->slot[*out].file, *base = strrchr(file, '/');
        ipt_name(stem, sizeof stem, "%s", base ? base + 1 : file);
        char *dot = strrchr(stem, '.');
        if (dot && strcmp(dot, ".safetensors") == 0)
            *dot = 0;
        if (strcmp(stem, name) == 0 || strcmp(file, name) == 0)
            return IPT_OK;
        if (at < sizeof all)
            at += (size_t)snprintf(all + at, sizeof all - at, "%s%s", *out ? ", " : "", stem);
    }
    return ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                    "region %.200s: no adapter is called '%.100s'; there %s: %s", given, name,
                    job->n_slot == 1 ? "is" : "are", job->n_slot ? all : "none");
}

static ipt_status read_spec(reader *r, size_t i)
{
    const ipt_request *q = r->u->r;
    const char *given = q->region[i], *file = NULL, *what = NULL;
    ipt_image im = {0};
    spec *s = &r->spec[r->n++];
    IPT_TRY(split(r, given, &file, &what));
    if (strspn(what, " \t\r\n") == strlen(what))
        return ipt_fail(r->u->e->ctx, IPT_ERR_ARG,
                        "region %.200s: no prompt behind '@'; expected IMG@PROMPT or IMG@lora:NAME",
                        given);
    if (strncmp(what, "lora:", 5) == 0)
        IPT_TRY(find_adapter(r, given, what + 5, &s->slot));
    else
        s->text = what;
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

/* A slot's places: the largest of its regions. */
static ipt_status place_slots(reader *r)
{
    ipt_regions *g = &r->u->regions;
    for (size_t i = 0; i < r->n; i++) {
        const spec *s = &r->spec[i];
        if (s->text)
            continue;
        float *p = g->place[s->slot];
        if (!p && !(p = ipt_arena_alloc(&r->u->arena, r->n_pixel * sizeof *p)))
            return IPT_ERR_NOMEM;
        g->place[s->slot] = p;
        for (size_t k = 0; k < r->n_pixel; k++)
            p[k] = s->mask[k] > p[k] ? s->mask[k] : p[k];
    }
    for (int32_t s = 0; s < IPT_MAX_SLOT; s++) {
        if (g->place[s] && is_full(r, g->place[s]))
            g->place[s] = NULL; /* everywhere, as without a region */
        size_t k = 0;
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

/* Part `which` of masks that share a place, -1 being what they leave over: their sum counts as 1
 * where it is more. */
static float part(float sum, float own, bool is_rest)
{
    if (is_rest)
        return sum < 1 ? 1 - sum : 0;
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
    t->is_own = region != NULL;
    t->share = share;
    for (int32_t s = 0; s < IPT_MAX_SLOT; s++)
        t->acts[s] = !g->place[s] || (of && of->has[s]);
    return region ? ipt_texts_add(&r->u->texts, region->text, &t->text) : IPT_OK;
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
    if (t->is_own && row->part >= 0)
        out.text = t->text;
    for (int32_t s = 0; s < u->job.n_slot; s++)
        out.slot[s] = t->acts[s] ? row->slot[s] : 0;
    return out;
}

/* --- places on the device --------------------------------------------------------------------- */
/* The mean of what each cell of a grid covers. */
static void shrink(const ipt_run *u, const float *from, int32_t gh, int32_t gw, float *to,
                   size_t step)
{
    const int32_t H = u->set.height, W = u->set.width;
    for (int32_t y = 0; y < gh; y++)
        for (int32_t x = 0; x < gw; x++) {
            int32_t y0 = y * H / gh, y1 = (y + 1) * H / gh, x0 = x * W / gw, x1 = (x + 1) * W / gw;
            double sum = 0;
            y1 = y1 > y0 ? y1 : y0 + 1;
            x1 = x1 > x0 ? x1 : x0 + 1;
            for (int32_t v = y0; v < y1; v++)
                for (int32_t h = x0; h < x1; h++)
                    sum += (double)from[(size_t)v * (size_t)W + (size_t)h];
            to[((size_t)y * (size_t)gw + (size_t)x) * step] =
                (float)(sum / ((double)(y1 - y0) * (x1 - x0)));
        }
}

static ipt_status write_shares(const ipt_run *u, ipt_plan *p, int32_t gh, int32_t gw, float *room)
{
    const ipt_regions *g = &u->regions;
    size_t cells = (size_t)gh * (size_t)gw;
    char name[48];
    for (int32_t k = 0; k < g->n_text; k++) {
        ipt_name(name, sizeof name, "share%d_%d", k, gh * gw);
        if (!ipt_plan_has(p, name))
            continue;
        shrink(u, g->text[k].share, gh, gw, room, 1);
        IPT_TRY(ipt_plan_write(p, name, room, cells * sizeof *room));
    }
    return IPT_OK;
}

/* place [b][cells][slots]; adapters without regions are everywhere. */
static ipt_status write_places(const ipt_run *u, ipt_plan *p, int32_t gh, int32_t gw, float *room)
{
    size_t cells = (size_t)gh * (size_t)gw, slots = (size_t)u->job.n_slot, n = cells * slots,
           b = (size_t)u->batch;
    char name[48];
    ipt_name(name, sizeof name, "place%d", gh * gw);
    if (!u->regions.is_placed || !ipt_plan_has(p, name))
        return IPT_OK;
    for (size_t i = 0; i < n; i++)
        room[i] = 1;
    for (size_t s = 0; s < slots; s++)
        if (u->regions.place[s])
            shrink(u, u->regions.place[s], gh, gw, room + s, slots);
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
    for (int32_t i = 0; i <= u->job.n_grid && status == IPT_OK;
         i++) { /* and one place for the time */
        const ipt_grid one = {1, 1, false}, *g = i < u->job.n_grid ? &u->job.grid[i] : &one;
        status = write_shares(u, p, g->h, g->w, room);
        if (status == IPT_OK)
            status = write_places(u, p, g->h, g->w, room);
    }
    ipt_free(room);
    return status;
}
