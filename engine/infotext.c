/* engine/infotext.c - what a picture says about itself: A1111's "parameters" text and the request
 * as JSON. */
#include "engine/internal.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* A1111's label of a sampler and schedule. */
static const char *sampler_label(const char *name)
{
    static const struct {
        const char *name, *label;
    } labels[] = {{"ddim", "DDIM"},
                  {"euler", "Euler"},
                  {"euler_a", "Euler a"},
                  {"heun", "Heun"},
                  {"dpm_2", "DPM2"},
                  {"dpm_2_a", "DPM2 a"},
                  {"lms", "LMS"},
                  {"dpmpp_2m", "DPM++ 2M"},
                  {"dpmpp_sde", "DPM++ SDE"},
                  {"dpmpp_2m_sde", "DPM++ 2M SDE"},
                  {"unipc", "UniPC"},
                  {"dpmpp_3m_sde", "DPM++ 3M SDE"},
                  {"pndm", "PLMS"},
                  {"lcm", "LCM"},
                  {"deis", "DEIS"},
                  {"tcd", "TCD"}};
    for (size_t i = 0; i < IPT_COUNT(labels); i++)
        if (strcmp(labels[i].name, name) == 0)
            return labels[i].label;
    return name;
}

static double cfg_of(const ipt_request *r, const ipt_report *rep)
{
    bool few = strcmp(rep->sampler, "lcm") == 0 || strcmp(rep->sampler, "tcd") == 0;
    return isnan(r->cfg) ? (few ? 1.5 : 7.0) : r->cfg;
}

static double strength_of(const ipt_request *r)
{
    return isnan(r->strength) ? (r->mask ? 1.0 : 0.75) : r->strength;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

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

char *ipt_infotext(ipt_engine *e, const ipt_request *r, const ipt_report *rep, uint64_t seed,
                   ipt_arena *arena)
{
    const char *prompt = r->prompt ? r->prompt : "", *negative = r->negative ? r->negative : "";
    size_t n = strlen(prompt) + strlen(negative) + 1024 + rep->n_adapter * 400, at = 0;
    char *buf = ipt_arena_alloc(arena, n);
    if (!buf)
        return NULL;
    put(buf, n, &at, "%s", prompt);
    for (size_t i = 0; i < r->n_lora; i++) /* as if typed: tags carry the strengths */
        put(buf, n, &at, " <lora:%s:%g:%g>", e->file[i]->name, (double)r->lora[i].weight,
            (double)r->lora[i].te_weight);
    if (*negative)
        put(buf, n, &at, "\nNegative prompt: %s", negative);
    put(buf, n, &at, "\nSteps: %d, Sampler: %s", rep->steps, sampler_label(rep->sampler));
    if (strcmp(rep->schedule, "default") != 0)
        put(buf, n, &at, ", Schedule type: %s", rep->schedule);
    put(buf, n, &at, ", CFG scale: %g, Seed: %" PRIu64 ", Size: %dx%d, Model: %s", cfg_of(r, rep),
        seed, rep->width, rep->height, base_name(rep->model));
    if (r->clip_skip > 1)
        put(buf, n, &at, ", Clip skip: %d", r->clip_skip);
    if (r->init)
        put(buf, n, &at, ", Denoising strength: %g", strength_of(r));
    if (r->cfg_rescale > 0)
        put(buf, n, &at, ", CFG Rescale phi: %g", r->cfg_rescale);
    put(buf, n, &at, ", RNG: %s", strcmp(rep->rng, "philox") == 0 ? "NV" : "CPU");
    if (rep->n_adapter > 0) {
        put(buf, n, &at, ", Lora hashes: \"");
        for (size_t i = 0; i < rep->n_adapter; i++)
            put(buf, n, &at, "%s%s: %s", i ? ", " : "", rep->adapter[i].name, e->file[i]->autov3);
        put(buf, n, &at, "\", Compose: %s", rep->compose);
    }
    put(buf, n, &at, ", Version: impasto " IPT_VERSION);
    return buf;
}

static json_t *lora_json(const ipt_request *r)
{
    json_t *list = json_array();
    for (size_t i = 0; i < r->n_lora; i++) {
        const ipt_lora *l = &r->lora[i];
        json_t *o = json_object();
        json_object_set_new(o, "file", json_string(l->path));
        json_object_set_new(o, "weight", json_real((double)l->weight));
        json_object_set_new(o, "te_weight", json_real((double)l->te_weight));
        if (l->word)
            json_object_set_new(o, "word", json_string(l->word));
        if (l->start > 0 || l->end < 1) {
            json_object_set_new(o, "start", json_real((double)l->start));
            json_object_set_new(o, "end", json_real((double)l->end));
        }
        if (l->blocks)
            json_object_set_new(o, "blocks", json_string(l->blocks));
        json_array_append_new(list, o);
    }
    return list;
}

char *ipt_request_json(ipt_engine *e, const ipt_request *r, const ipt_report *rep, uint64_t seed,
                       ipt_arena *arena)
{
    json_t *o = json_object();
    (void)e;
    json_object_set_new(o, "model", json_string(rep->model));
    json_object_set_new(o, "prompt", json_string(r->prompt ? r->prompt : ""));
    if (r->negative)
        json_object_set_new(o, "negative", json_string(r->negative));
    json_object_set_new(o, "steps", json_integer(rep->steps));
    json_object_set_new(o, "cfg", json_real(cfg_of(r, rep)));
    if (r->cfg_rescale > 0)
        json_object_set_new(o, "cfg_rescale", json_real(r->cfg_rescale));
    json_object_set_new(o, "seed", json_integer((json_int_t)seed));
    json_object_set_new(o, "width", json_integer(rep->width));
    json_object_set_new(o, "height", json_integer(rep->height));
    json_object_set_new(o, "sampler", json_string(rep->sampler));
    json_object_set_new(o, "schedule", json_string(rep->schedule));
    json_object_set_new(o, "rng", json_string(rep->rng));
    json_object_set_new(o, "precision", json_string(rep->precision));
    if (r->clip_skip > 0)
        json_object_set_new(o, "clip_skip", json_integer(r->clip_skip));
    if (r->vae)
        json_object_set_new(o, "vae", json_string(r->vae));
    if (r->init)
        json_object_set_new(o, "strength", json_real(strength_of(r)));
    json_object_set_new(o, "compose", json_string(rep->compose));
    json_t *opts = json_array();
    for (size_t i = 0; i < r->n_compose_opt; i++)
        json_array_append_new(opts, json_string(r->compose_opt[i]));
    json_object_set_new(o, "compose_opt", opts);
    json_object_set_new(o, "lora", lora_json(r));
    json_object_set_new(o, "version", json_string("impasto " IPT_VERSION));
    char *text = json_dumps(o, JSON_COMPACT);
    char *copy = text ? ipt_arena_strdup(arena, text) : NULL;
    free(text);
    json_decref(o);
    return copy;
}
