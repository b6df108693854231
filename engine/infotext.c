/* engine/infotext.c - what a picture says about itself: A1111's "parameters" text and the request
 * as JSON. */
#include "engine/hash.h"
#include "engine/internal.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static double cfg_of(const ipt_request *r, const ipt_report *rep)
{
    bool few = strcmp(rep->sampler, "lcm") == 0 || strcmp(rep->sampler, "tcd") == 0;
    return isnan(r->cfg) ? (few ? 1.5 : 7.0) : r->cfg;
}

static double strength_of(const ipt_request *r)
{
    return isnan(r->strength) ? (r->mask ? 1.0 : 0.75) : r->strength;
}

/* The last name of a path, without an ending unless `whole`: what A1111 calls a model and a VAE. */
static const char *name_of(ipt_arena *arena, const char *path, bool whole)
{
    char *copy = ipt_arena_strdup(arena, path);
    if (!copy)
        return NULL;
    size_t n = strlen(copy);
    while (n > 1 && copy[n - 1] == '/')
        copy[--n] = 0;
    char *slash = strrchr(copy, '/'), *base = slash && slash[1] ? slash + 1 : copy;
    char *dot = whole || ipt_is_dir(path) ? NULL : strrchr(base, '.');
    if (dot && dot != base)
        *dot = 0;
    return base;
}

/* --- hashes
 * ------------------------------------------------------------------------------------------ */
/* Places in the list of files whose hashes are wanted; SIZE_MAX: none. */
typedef struct places {
    size_t model, vae, lora, n;
} places;

static places places_of(const ipt_engine *e, const ipt_request *r)
{
    places p = {SIZE_MAX, SIZE_MAX, 0, 0};
    if (ipt_is_file(ipt_model_path(e->m->model))) /* a folder has no hash that others know */
        p.model = p.n++;
    if (r->vae && ipt_is_file(r->vae))
        p.vae = p.n++;
    p.lora = p.n;
    p.n += ipt_engine_n_file(e);
    return p;
}

ipt_status ipt_infotext_begin(ipt_engine *e, const ipt_request *r)
{
    const char *path[IPT_MAX_SLOT + 2];
    bool has_data[IPT_MAX_SLOT + 2] = {false};
    places p = places_of(e, r);
    if (!e->hashes)
        IPT_TRY(ipt_hashes_create(e->ctx, &e->hashes));
    if (p.model != SIZE_MAX)
        path[p.model] = ipt_model_path(e->m->model);
    if (p.vae != SIZE_MAX)
        path[p.vae] = r->vae;
    for (size_t i = 0; i < ipt_engine_n_file(e); i++) {
        path[p.lora + i] = e->set->key[i];
        has_data[p.lora + i] = true;
    }
    return ipt_hashes_want(e->hashes, path, has_data, p.n);
}

static const char *sha256_of(const ipt_engine *e, size_t i, ipt_arena *arena)
{
    const ipt_file_hash *h = i == SIZE_MAX ? NULL : ipt_hashes_get(e->hashes, i);
    return h ? ipt_arena_strdup(arena, h->sha256) : NULL;
}

static const char *first_of(const char *hex, size_t n, ipt_arena *arena)
{
    char *copy = hex && strlen(hex) >= n ? ipt_arena_strdup(arena, hex) : NULL;
    if (copy)
        copy[n] = 0;
    return copy;
}

/* A1111's hash of a LoRA: what its trainer wrote down (kohya's hash of the tensors), else the
 * SHA-256 of what follows the header; 12 digits.  Source: stable-diffusion-webui,
 * extensions-builtin/Lora/network.py (NetworkOnDisk). */
static const char *lora_hash(const ipt_adapter_file *f, const ipt_file_hash *h, ipt_arena *arena)
{
    const char *said = ipt_json_str(f->metadata, "sshs_model_hash", "");
    bool usable = strlen(said) >= 12 && strspn(said, "0123456789abcdefABCDEF") == strlen(said);
    return usable ? first_of(said, 12, arena) : h ? first_of(h->data, 12, arena) : NULL;
}

ipt_status ipt_infotext_hashes(ipt_engine *e, const ipt_request *r, ipt_report *rep,
                               ipt_adapter_report *a)
{
    ipt_arena *arena = &e->report_arena;
    places p = places_of(e, r);
    ipt_hashes_wait(e->hashes);
    if (ipt_cancelled(e->ctx))
        return ipt_fail(e->ctx, IPT_ERR_CANCELLED, "cancelled");
    rep->model_sha256 = sha256_of(e, p.model, arena);
    rep->vae_sha256 = sha256_of(e, p.vae, arena);
    for (size_t i = 0; i < ipt_engine_n_file(e); i++) {
        const ipt_file_hash *h = ipt_hashes_get(e->hashes, p.lora + i);
        a[i].sha256 = sha256_of(e, p.lora + i, arena);
        a[i].autov2 = first_of(a[i].sha256, 10, arena);
        a[i].autov3 = h ? first_of(h->data, 12, arena) : NULL;
        a[i].a1111_hash = lora_hash(e->set->file[i], h, arena);
    }
    return IPT_OK;
}

/* --- A1111's text
 * ------------------------------------------------------------------------------------ */
/* Appends to buf; *at stays below n. */
static void put(char *buf, size_t n, size_t *at, const char *fmt, ...) IPT_PRINTF(4, 5);
static void put(char *buf, size_t n, size_t *at, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int len = vsnprintf(buf + *at, n - *at, fmt, ap);
    va_end(ap);
    if (len > 0)
        *at = *at + (size_t)len < n ? *at + (size_t)len : n - 1;
}

/* ", KEY: value", the value as a JSON string where its characters would end it, as A1111 quotes. */
static void put_value(char *buf, size_t n, size_t *at, const char *key, const char *value)
{
    json_t *o = value && strpbrk(value, ",:\n") ? ipt_json_text(value) : NULL;
    char *quoted = o ? json_dumps(o, JSON_ENCODE_ANY) : NULL;
    if (value)
        put(buf, n, at, ", %s: %s", key, quoted ? quoted : value);
    free(quoted);
    json_decref(o);
}

/* "Lora hashes": names as the prompt's tags have them. */
static void put_loras(char *buf, size_t n, size_t *at, const ipt_report *rep, ipt_arena *arena)
{
    size_t room = 1, k = 0;
    for (size_t i = 0; i < rep->n_adapter; i++)
        room += strlen(rep->adapter[i].name) + 32;
    char *list = ipt_arena_alloc(arena, room);
    for (size_t i = 0; list && i < rep->n_adapter; i++) {
        const ipt_adapter_report *a = &rep->adapter[i];
        if (!a->a1111_hash)
            continue;
        put(list, room, &k, "%s", k ? ", " : "");
        for (const char *c = a->name; *c; c++) /* they separate the list */
            if (*c != ':' && *c != ',')
                put(list, room, &k, "%c", *c);
        put(list, room, &k, ": %s", a->a1111_hash);
    }
    if (list && k > 0)
        put_value(buf, n, at, "Lora hashes", list);
}

/* --lora options as if typed: tags carry the strengths, the text encoder's first. */
static void put_tags(char *buf, size_t n, size_t *at, const ipt_engine *e, const ipt_request *r)
{
    for (size_t i = 0; i < r->n_lora; i++) {
        double w = (double)r->lora[i].weight, te = (double)r->lora[i].te_weight;
        put(buf, n, at, " <lora:%s:%g", e->set->file[i]->name, te);
        if (w < te || w > te)
            put(buf, n, at, ":%g", w);
        put(buf, n, at, ">");
    }
}

static size_t text_room(const ipt_engine *e, const ipt_request *r, const ipt_report *rep)
{
    size_t n = 4096 + 6 * strlen(rep->model);
    n += (r->prompt ? strlen(r->prompt) : 0) + (r->negative ? strlen(r->negative) : 0);
    n += r->vae ? 6 * strlen(r->vae) : 0;
    for (size_t i = 0; i < rep->n_adapter; i++) /* in a tag and in the list, quoted */
        n += 8 * strlen(e->set->file[i]->name) + 128;
    return n;
}

char *ipt_infotext(ipt_engine *e, const ipt_request *r, const ipt_report *rep, uint64_t seed,
                   ipt_arena *arena)
{
    const char *prompt = r->prompt ? r->prompt : "", *negative = r->negative ? r->negative : "";
    ipt_sampler_kind kind = IPT_SAMPLER_COUNT;
    size_t n = text_room(e, r, rep), at = 0;
    char *buf = ipt_arena_alloc(arena, n);
    const char *model = name_of(arena, rep->model, false),
               *vae = r->vae ? name_of(arena, r->vae, true) : NULL;
    if (!buf || !model || (r->vae && !vae))
        return NULL;
    put(buf, n, &at, "%s", prompt);
    put_tags(buf, n, &at, e, r);
    if (*negative)
        put(buf, n, &at, "\nNegative prompt: %s", negative);
    bool known = ipt_sampler_from_name(rep->sampler, &kind);
    put(buf, n, &at, "\nSteps: %d, Sampler: %s", rep->steps,
        known ? ipt_sampler_label(kind) : rep->sampler);
    put_value(buf, n, &at, "Schedule type", rep->schedule_label);
    put(buf, n, &at, ", CFG scale: %g, Seed: %" PRIu64 ", Size: %dx%d", cfg_of(r, rep), seed,
        rep->width, rep->height);
    put_value(buf, n, &at, "Model hash", first_of(rep->model_sha256, 10, arena));
    put_value(buf, n, &at, "Model", model);
    put_value(buf, n, &at, "VAE hash", first_of(rep->vae_sha256, 10, arena));
    put_value(buf, n, &at, "VAE", vae);
    if (r->init)
        put(buf, n, &at, ", Denoising strength: %g", strength_of(r));
    if (r->clip_skip > 1)
        put(buf, n, &at, ", Clip skip: %d", r->clip_skip);
    if (r->taesd)
        put(buf, n, &at, ", VAE Decoder: TAESD");
    if (rep->mask_blur > 0)
        put(buf, n, &at, ", Mask blur: %g", rep->mask_blur);
    if (r->cfg_rescale > 0)
        put(buf, n, &at, ", CFG Rescale phi: %g", r->cfg_rescale);
    put(buf, n, &at, ", RNG: %s", strcmp(rep->rng, "philox") == 0 ? "NV" : "CPU");
    put_loras(buf, n, &at, rep, arena);
    if (rep->n_adapter > 0)
        put(buf, n, &at, ", Compose: %s", rep->compose);
    put(buf, n, &at, ", Version: impasto " IPT_VERSION);
    return buf;
}

/* --- the request as JSON
 * ----------------------------------------------------------------------------- */
static json_t *lora_json(const ipt_request *r)
{
    json_t *list = json_array();
    for (size_t i = 0; i < r->n_lora; i++) {
        const ipt_lora *l = &r->lora[i];
        json_t *o = json_object();
        json_object_set_new(o, "file", ipt_json_text(l->path));
        json_object_set_new(o, "weight", json_real((double)l->weight));
        json_object_set_new(o, "te_weight", json_real((double)l->te_weight));
        if (l->word)
            json_object_set_new(o, "word", ipt_json_text(l->word));
        if (l->start > 0 || l->end < 1) {
            json_object_set_new(o, "start", json_real((double)l->start));
            json_object_set_new(o, "end", json_real((double)l->end));
        }
        if (l->blocks)
            json_object_set_new(o, "blocks", ipt_json_text(l->blocks));
        json_array_append_new(list, o);
    }
    return list;
}

char *ipt_request_json(ipt_engine *e, const ipt_request *r, const ipt_report *rep, uint64_t seed,
                       ipt_arena *arena)
{
    json_t *o = json_object();
    (void)e;
    json_object_set_new(o, "model", ipt_json_text(rep->model));
    json_object_set_new(o, "prompt", ipt_json_text(r->prompt ? r->prompt : ""));
    if (r->negative)
        json_object_set_new(o, "negative", ipt_json_text(r->negative));
    json_object_set_new(o, "steps", json_integer(rep->steps));
    json_object_set_new(o, "cfg", json_real(cfg_of(r, rep)));
    if (r->cfg_rescale > 0)
        json_object_set_new(o, "cfg_rescale", json_real(r->cfg_rescale));
    json_object_set_new(o, "seed", ipt_json_uint(seed));
    json_object_set_new(o, "width", json_integer(rep->width));
    json_object_set_new(o, "height", json_integer(rep->height));
    json_object_set_new(o, "sampler", ipt_json_text(rep->sampler));
    json_object_set_new(o, "schedule", ipt_json_text(rep->schedule));
    json_object_set_new(o, "rng", ipt_json_text(rep->rng));
    json_object_set_new(o, "precision", ipt_json_text(rep->precision));
    if (r->clip_skip > 0)
        json_object_set_new(o, "clip_skip", json_integer(r->clip_skip));
    if (r->vae)
        json_object_set_new(o, "vae", ipt_json_text(r->vae));
    if (r->init)
        json_object_set_new(o, "strength", json_real(strength_of(r)));
    json_object_set_new(o, "compose", ipt_json_text(rep->compose));
    if (r->init && r->mask)
        json_object_set_new(o, "paste", json_boolean(!r->no_paste));
    json_object_set_new(o, "compose", json_string(rep->compose));
    json_t *opts = json_array();
    for (size_t i = 0; i < r->n_compose_opt; i++)
        json_array_append_new(opts, ipt_json_text(r->compose_opt[i]));
    json_object_set_new(o, "compose_opt", opts);
    json_object_set_new(o, "lora", lora_json(r));
    json_object_set_new(o, "version", ipt_json_text("impasto " IPT_VERSION));
    char *text = json_dumps(o, JSON_COMPACT);
    char *copy = text ? ipt_arena_strdup(arena, text) : NULL;
    free(text);
    json_decref(o);
    return copy;
}
