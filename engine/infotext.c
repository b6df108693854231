/* engine/infotext.c - what a picture says about itself: A1111's "parameters" text and the request
 * as JSON. */
#include "engine/hash.h"
#include "engine/internal.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

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

/* --- A1111's text ----------------------------------------------------------------------------- */
typedef struct speech {
    ipt_engine *e;
    const ipt_request *r; /* with nothing left open */
    const ipt_report *rep;
    ipt_arena *arena;
    char *buf; /* [n], at stays below */
    size_t n, at;
} speech;

static void put(speech *s, const char *fmt, ...) IPT_PRINTF(2, 3);
static void put(speech *s, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int len = vsnprintf(s->buf + s->at, s->n - s->at, fmt, ap);
    va_end(ap);
    if (len > 0)
        s->at = s->at + (size_t)len < s->n ? s->at + (size_t)len : s->n - 1;
}

/* ", KEY: value", the value as a JSON string where its characters would end it, as A1111 quotes. */
static void put_value(speech *s, const char *key, const char *value)
{
    json_t *o = value && strpbrk(value, ",:\n") ? ipt_json_text(value) : NULL;
    char *quoted = o ? json_dumps(o, JSON_ENCODE_ANY) : NULL;
    if (value)
        put(s, ", %s: %s", key, quoted ? quoted : value);
    free(quoted);
    json_decref(o);
}

/* The prompt, and --lora options as if typed: tags carry the strengths, the text encoder's first.
 */
static void say_prompt(speech *s)
{
    put(s, "%s", s->r->prompt ? s->r->prompt : "");
    for (size_t i = 0; i < s->r->n_lora; i++) {
        double w = (double)s->r->lora[i].weight, te = (double)s->r->lora[i].te_weight;
        put(s, " <lora:%s:%g", s->e->set->file[i]->name, te);
        if (w < te || w > te)
            put(s, ":%g", w);
        put(s, ">");
    }
}

static void say_negative(speech *s)
{
    if (s->r->negative && *s->r->negative)
        put(s, "\nNegative prompt: %s", s->r->negative);
}

static void say_steps(speech *s) { put(s, "\nSteps: %d", s->r->steps); }

static void say_sampler(speech *s)
{
    ipt_sampler_kind kind = IPT_SAMPLER_COUNT;
    bool known = ipt_sampler_from_name(s->rep->sampler, &kind);
    put(s, ", Sampler: %s", known ? ipt_sampler_label(kind) : s->rep->sampler);
}

static void say_schedule(speech *s) { put_value(s, "Schedule type", s->rep->schedule_label); }
static void say_cfg(speech *s) { put(s, ", CFG scale: %g", s->r->cfg); }
static void say_seed(speech *s) { put(s, ", Seed: %" PRIu64, s->r->seed); }
static void say_size(speech *s) { put(s, ", Size: %dx%d", s->r->width, s->r->height); }

static void say_model(speech *s)
{
    put_value(s, "Model hash", first_of(s->rep->model_sha256, 10, s->arena));
    put_value(s, "Model", name_of(s->arena, s->rep->model, false));
}

static void say_vae(speech *s)
{
    put_value(s, "VAE hash", first_of(s->rep->vae_sha256, 10, s->arena));
    if (s->r->vae)
        put_value(s, "VAE", name_of(s->arena, s->r->vae, true));
}

static void say_strength(speech *s)
{
    if (s->r->init)
        put(s, ", Denoising strength: %g", s->r->strength);
}

static void say_clip_skip(speech *s)
{
    if (s->r->clip_skip > 1)
        put(s, ", Clip skip: %d", s->r->clip_skip);
}

static void say_taesd(speech *s)
{
    if (s->r->taesd)
        put(s, ", VAE Decoder: TAESD");
}

static void say_mask(speech *s)
{
    if (s->rep->mask_blur > 0)
        put(s, ", Mask blur: %g", s->rep->mask_blur);
}

static void say_cfg_rescale(speech *s)
{
    if (s->r->cfg_rescale > 0)
        put(s, ", CFG Rescale phi: %g", s->r->cfg_rescale);
}

static void say_rng(speech *s)
{
    put(s, ", RNG: %s", strcmp(s->rep->rng, "philox") == 0 ? "NV" : "CPU");
}

/* "Lora hashes": names as the prompt's tags have them. */
static void say_loras(speech *s)
{
    speech list = {.arena = s->arena, .n = 1};
    for (size_t i = 0; i < s->rep->n_adapter; i++)
        list.n += strlen(s->rep->adapter[i].name) + 32;
    list.buf = ipt_arena_alloc(s->arena, list.n);
    for (size_t i = 0; list.buf && i < s->rep->n_adapter; i++) {
        const ipt_adapter_report *a = &s->rep->adapter[i];
        if (!a->a1111_hash)
            continue;
        put(&list, "%s", list.at ? ", " : "");
        for (const char *c = a->name; *c; c++) /* they separate the list */
            if (*c != ':' && *c != ',')
                put(&list, "%c", *c);
        put(&list, ": %s", a->a1111_hash);
    }
    if (list.at > 0)
        put_value(s, "Lora hashes", list.buf);
}

static void say_cache(speech *s)
{
    if (s->r->cache)
        put(s, ", Cache: %.40s", s->r->cache);
}

static void say_compose(speech *s)
{
    if (s->rep->n_adapter > 0)
        put(s, ", Compose: %s", s->rep->compose);
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

char *ipt_infotext(ipt_engine *e, const ipt_request *r, const ipt_report *rep, ipt_arena *arena)
{
    static void (*const say[])(speech * s) = {
#define IPT_FIELD(type, member, name, option, letter, value, help, min, max, choices, needs, say)  \
    say,
#include "engine/request.def"
#undef IPT_FIELD
    };
    speech s = {e, r, rep, arena, NULL, text_room(e, r, rep), 0};
    s.buf = ipt_arena_alloc(arena, s.n);
    if (!s.buf)
        return NULL;
    for (size_t i = 0; i < IPT_COUNT(say); i++)
        if (say[i])
            say[i](&s);
    put(&s, ", Version: impasto " IPT_VERSION);
    return s.buf;
}
