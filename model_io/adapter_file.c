/* model_io/adapter_file.c - adapter files of every family as one neutral list: which module of the
 * model, which kind (adapter_kinds.c), which parts, which scale. */
#include "model_io/kinds.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <string.h>

const char *ipt_adapter_family_name(ipt_adapter_family f)
{
    static const char *const names[] = {"kohya",       "diffusers attn-procs", "diffusers",
                                        "peft",        "cloneofsimo",          "lycoris",
                                        "diffusekrona"};
    return names[f];
}

static const ipt_st_tensor *take(const ipt_adapter_file *f, const char *stem, const char *suffix)
{
    char key[IPT_KEY_MAX + 64];
    int n = snprintf(key, sizeof key, "%s%s", stem, suffix);
    return n > 0 && (size_t)n < sizeof key ? ipt_safetensors_find(f->impl->st, key) : NULL;
}

/* What a kind's keys of one stem hold; false: none of those that tell it. */
static bool take_parts(const ipt_adapter_file *f, const ipt_kind *kind, const char *stem,
                       const ipt_st_tensor *part[IPT_ADAPTER_PARTS])
{
    bool told = false;
    for (int i = 0; i < IPT_ADAPTER_PARTS; i++) {
        bool tells = kind->tells >> i & 1;
        part[i] = kind->key[i] && tells ? take(f, stem, kind->key[i]) : NULL;
        told = told || part[i];
    }
    for (int i = 0; told && i < IPT_ADAPTER_PARTS; i++)
        if (kind->key[i] && !(kind->tells >> i & 1))
            part[i] = take(f, stem, kind->key[i]);
    return told;
}

void ipt_adapter_claim(ipt_adapter_file *f, const ipt_st_tensor *t, bool is_word)
{
    if (t)
        f->impl->used[t - ipt_safetensors_at(f->impl->st, 0)] = is_word ? 2 : 1;
}

static bool is_claimed(const ipt_adapter_file *f, const ipt_st_tensor *t)
{
    return f->impl->used[t - ipt_safetensors_at(f->impl->st, 0)] != 0;
}

/* --- keys that change nothing ----------------------------------------------------------------- */
static bool is_zero(const ipt_st_tensor *t)
{
    bool zero = true;
    for (size_t i = 0; zero && i < t->count; i++) {
        float v = ipt_st_get(t, i);
        zero = v >= 0 && v <= 0;
    }
    ipt_st_release(t); /* nobody else wants it */
    return zero;
}

/* A product of the kind at the stem has a part that is zero. */
static bool is_idle_product(const ipt_adapter_file *f, const ipt_kind *kind, const char *stem,
                            bool *there)
{
    const ipt_st_tensor *part[IPT_ADAPTER_PARTS];
    if (!take_parts(f, kind, stem, part))
        return false;
    *there = true;
    for (int i = 0; kind->is_product && i < IPT_ADAPTER_PARTS; i++)
        if (part[i] && is_zero(part[i]))
            return true;
    return false;
}

bool ipt_adapter_is_idle(const ipt_adapter_file *f, const char *key)
{
    size_t len = strlen(key), alpha = sizeof ".alpha" - 1;
    char stem[IPT_KEY_MAX + 64];
    bool of_alpha = len > alpha && strcmp(key + len - alpha, ".alpha") == 0, there = false;
    for (const ipt_kind *kind = ipt_kinds; kind->name; kind++) {
        for (int i = 0; i < IPT_ADAPTER_PARTS && kind->key[i]; i++) {
            size_t n = of_alpha ? alpha : strlen(kind->key[i]);
            if (n >= len || len - n >= sizeof stem || (of_alpha && i > 0) ||
                (!of_alpha && strcmp(key + len - n, kind->key[i]) != 0))
                continue;
            snprintf(stem, sizeof stem, "%.*s", (int)(len - n), key);
            if (is_idle_product(f, kind, stem, &there))
                return true;
        }
    }
    return of_alpha && !there; /* an alpha alone */
}

/* --- scale ------------------------------------------------------------------------------------ */
static ipt_status one_number(ipt_adapter_file *f, const ipt_st_tensor *t, double *out)
{
    if (t->count != 1)
        return ipt_fail(f->impl->ctx, IPT_ERR_SHAPE, "%s: key '%s': found %zu elements, expected 1",
                        f->path, t->name, t->count);
    IPT_TRY(ipt_st_load(t));
    if (ipt_st_finite(t, NULL)) /* else the file is refused before it is used */
        *out = (double)ipt_st_get(t, 0);
    ipt_adapter_claim(f, t, false);
    return IPT_OK;
}

/* The file's own alpha, else that of PEFT's settings, else the rank.  LyCORIS' kinds: an alpha of 0
 * means the rank, and none counts where nothing is factored; its scalar, in files of its first
 * versions, multiplies. */
static ipt_status set_scale(ipt_adapter_file *f, const ipt_module *m, const char *stem,
                            ipt_adapter_module *out)
{
    const ipt_kind *kind = out->kind;
    bool found = false, is_lycoris = kind->family == IPT_ADAPTER_LYCORIS;
    const ipt_st_tensor *t = take(f, stem, ".alpha"), *scalar = take(f, stem, ".scalar");
    double alpha = out->rank, divisor = out->rank, times = 1;
    out->scale = 1;
    if (!kind->is_scaled)
        return IPT_OK;
    if (!t && kind->family == IPT_ADAPTER_DIFFUSERS)
        t = take(f, stem, ".lora.alpha");
    if (t)
        IPT_TRY(one_number(f, t, &alpha));
    else
        IPT_TRY(ipt_adapter_alpha(f, m, out->rank, &found, &alpha, &divisor));
    if (scalar && is_lycoris)
        IPT_TRY(one_number(f, scalar, &times));
    if (is_lycoris && t && alpha >= 0 && alpha <= 0)
        alpha = out->rank;
    out->alpha = (float)alpha;
    out->scale = (divisor > 0 ? alpha / divisor : 1) * times;
    if (!isfinite(out->scale) || !isfinite((float)out->scale))
        return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT,
                        "%s: '%s': alpha %g gives a scale of %g, expected at most 3.4e38", f->path,
                        stem, alpha, out->scale);
    return IPT_OK;
}

/* --- one module ------------------------------------------------------------------------------- */
ipt_status ipt_adapter_bad_shape(const ipt_adapter_file *f, const ipt_st_tensor *t,
                                 const char *expected)
{
    char found[128];
    ipt_st_shape_text(t, found, sizeof found);
    return ipt_fail(f->impl->ctx, IPT_ERR_SHAPE,
                    "%s: key '%s': found shape %s, expected %s: made for %s?", f->path, t->name,
                    found, expected, f->made_for ? f->made_for : "another model");
}

/* DoRA's magnitude: LyCORIS' [out,1] or (first versions) [1,in]; PEFT's [out] or [1,out,1,1]. */
static ipt_status find_magnitude(ipt_adapter_file *f, const ipt_module *m, const char *stem,
                                 ipt_adapter_module *a)
{
    static const char *const keys[] = {".dora_scale", ".lora_magnitude_vector",
                                       ".lora_magnitude_vector.weight",
                                       ".lora_magnitude_vector.default.weight"};
    for (size_t i = 0; i < IPT_COUNT(keys) && !a->magnitude; i++) {
        const ipt_st_tensor *t = take(f, stem, keys[i]);
        if (!t || is_claimed(f, t))
            continue;
        bool row = i == 0 && t->rank > 1 && t->dim[0] == 1 && (m->out > 1 || t->dim[1] > 1);
        size_t n = row ? (size_t)m->in : (size_t)m->out;
        if (t->count != n) {
            char text[96];
            snprintf(text, sizeof text, "[%d,1] or [1,%d]", (int)m->out, (int)m->in);
            return ipt_adapter_bad_shape(f, t, text);
        }
        a->magnitude = t;
        a->is_by_input = row;
        a->act = IPT_ACTS_DENSE;
        ipt_adapter_claim(f, t, false);
    }
    return IPT_OK;
}

static ipt_status add_module(ipt_adapter_file *f, size_t index, const ipt_kind *kind,
                             const ipt_st_tensor *const part[], const char *stem)
{
    const ipt_module *m = &f->impl->list[index];
    ipt_adapter_module *a = &f->module[f->n_module];
    *a = (ipt_adapter_module){
        .module = index, .kind = kind, .out = m->out, .in = m->in, .kh = m->kh, .kw = m->kw};
    for (int i = 0; i < IPT_ADAPTER_PARTS; i++) {
        a->part[i] = part[i];
        ipt_adapter_claim(f, part[i], false);
    }
    IPT_TRY(kind->read(f, m, a));
    IPT_TRY(set_scale(f, m, stem, a));
    if (kind->is_product && kind->is_scaled)
        IPT_TRY(find_magnitude(f, m, stem, a));
    f->has_conv = f->has_conv || m->kh * m->kw > 1;
    if (a->rank > 0) {
        f->rank_min = f->rank_min == 0 || a->rank < f->rank_min ? a->rank : f->rank_min;
        f->rank_max = a->rank > f->rank_max ? a->rank : f->rank_max;
    }
    if (f->n_module++ == 0)
        f->family = kind->family;
    return IPT_OK;
}

/* With two text encoders in the model: parts that are the other one's by their shape, or taken. */
static bool is_others(const ipt_adapter_file *f, const ipt_module *m, const ipt_kind *kind,
                      const ipt_st_tensor *const part[])
{
    bool two = false;
    const ipt_st_tensor *down = part[0], *up = part[1];
    for (size_t i = 0; i < f->impl->n_list && !two; i++)
        two = f->impl->list[i].comp == IPT_COMP_TEXT2;
    for (int i = 0; two && i < IPT_ADAPTER_PARTS; i++)
        if (part[i] && is_claimed(f, part[i]))
            return true;
    if (!two || !down || !up || kind->factors != ipt_lora_factors)
        return false;
    return down->rank < 2 || up->rank < 2 || down->dim[1] != m->in || up->dim[0] != m->out;
}

/* Looks for one module under every spelling: what changes its weight, and what its bias. */
static ipt_status match_module(ipt_adapter_file *f, const ipt_key_frame *frame, size_t index)
{
    ipt_adapter_stem stem;
    const ipt_module *m = &f->impl->list[index];
    const ipt_st_tensor *part[IPT_ADAPTER_PARTS];
    const uint8_t on = m->is_norm ? IPT_ON_NORM : IPT_ON_WEIGHT;
    bool found[2] = {false, false}; /* weight, bias */
    for (int i = 0; !(found[0] && found[1]) && ipt_adapter_name(frame, m, i, &stem); i++) {
        for (const ipt_kind *kind = ipt_kinds; stem.text[0] && kind->name; kind++) {
            if (found[kind->is_bias] || kind->attn_procs != stem.attn_procs || !(kind->on & on) ||
                !take_parts(f, kind, stem.text, part) || (kind->fits && !kind->fits(m, part)) ||
                (stem.any_encoder && is_others(f, m, kind, part)))
                continue;
            IPT_TRY(add_module(f, index, kind, part, stem.text));
            found[kind->is_bias] = true;
        }
    }
    return IPT_OK;
}

/* --- cloneofsimo ------------------------------------------------------------------------------ */
static ipt_status match_ordinals(ipt_adapter_file *f)
{
    const char *classes = ipt_safetensors_meta(f->impl->st, "unet");
    bool has_geglu = !classes || strstr(classes, "GEGLU");
    char key[64];
    if (classes && strstr(classes, "ResnetBlock2D"))
        return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED,
                        "%s: cloneofsimo adapter with convolutions (ResnetBlock2D): not supported",
                        f->path);
    for (int pass = 0; pass < 2; pass++) {
        int comp = pass ? IPT_COMP_TEXT : IPT_COMP_UNET;
        for (int32_t i = 0; i < 100000; i++) {
            snprintf(key, sizeof key, "%s:%d:", pass ? "text_encoder" : "unet", (int)i);
            const ipt_st_tensor *down = take(f, key, "down"), *up = take(f, key, "up");
            size_t index = ipt_adapter_ordinal(f->impl->list, f->impl->n_list, comp, has_geglu, i);
            if (!down && !up)
                break;
            if (!down || !up)
                return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT,
                                "%s: key '%s' is there, but not '%s%s'", f->path,
                                down ? down->name : up->name, key, down ? "up" : "down");
            if (index == f->impl->n_list || f->n_module == f->impl->n_list)
                continue; /* reported as unmatched */
            const ipt_st_tensor *part[IPT_ADAPTER_PARTS] = {down, up};
            IPT_TRY(add_module(f, index, &ipt_kind_cloneofsimo, part, key));
        }
    }
    return IPT_OK;
}

/* --- opening ---------------------------------------------------------------------------------- */
static ipt_status check_kind(ipt_adapter_file *f)
{
    static const char *const types[] = {"LORA", "LOHA", "LOKR", "IA3"};
    const ipt_safetensors *st = f->impl->st;
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        const char *peft = ipt_adapter_peft_type(f, comp);
        bool known = !peft;
        for (size_t i = 0; i < IPT_COUNT(types) && !known; i++)
            known = strcmp(peft, types[i]) == 0;
        if (!known)
            return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED,
                            "%s: %.50s adapter (peft_type): not supported, expected LORA, LOHA, "
                            "LOKR or IA3",
                            f->path, peft);
    }
    for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
        const char *key = ipt_safetensors_at(st, i)->name, *what = ipt_adapter_unsupported(key);
        if (what)
            return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED, "%s: %s ('%s'): not supported",
                            f->path, what, key);
        if (strncmp(key, "model.diffusion_model.", 22) == 0 ||
            strncmp(key, "first_stage_model.", 18) == 0)
            return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT,
                            "%s: this is a checkpoint ('%s'), expected an adapter", f->path, key);
    }
    if (ipt_safetensors_count(st) == 0)
        return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT,
                        "%s: no tensors in this file, expected an adapter", f->path);
    return IPT_OK;
}

static ipt_status resolve(ipt_adapter_file *f)
{
    const ipt_safetensors *st = f->impl->st;
    ipt_key_frame frame;
    f->metadata = ipt_safetensors_metadata(st);
    f->impl->used =
        ipt_arena_alloc(&f->impl->arena, ipt_safetensors_count(st) * sizeof *f->impl->used);
    f->module = ipt_arena_alloc(&f->impl->arena, 2 * f->impl->n_list * sizeof *f->module);
    if (!f->impl->used || !f->module)
        return IPT_ERR_NOMEM;
    IPT_TRY(ipt_adapter_read_metadata(f));
    IPT_TRY(check_kind(f));
    ipt_adapter_guess(f);
    IPT_TRY(ipt_adapter_find_words(f));
    if (ipt_safetensors_find(st, "unet:0:up") || ipt_safetensors_find(st, "text_encoder:0:up")) {
        IPT_TRY(match_ordinals(f));
        return ipt_adapter_list(f);
    }
    ipt_key_frame_modules(f->impl->list, f->impl->n_list, &frame);
    for (size_t i = 0; i < f->impl->n_list; i++)
        IPT_TRY(match_module(f, &frame, i));
    return ipt_adapter_list(f);
}

static ipt_status create(ipt_ctx *ctx, const char *path, const ipt_module *modules, size_t n,
                         ipt_adapter_file **out)
{
    ipt_adapter_file *f = ipt_alloc(ctx, sizeof *f);
    struct ipt_adapter_impl *impl = ipt_alloc(ctx, sizeof *impl);
    if (!f || !impl) {
        ipt_free(f);
        ipt_free(impl);
        return IPT_ERR_NOMEM;
    }
    f->impl = impl;
    impl->ctx = ctx;
    impl->list = modules;
    impl->n_list = n;
    impl->budget = IPT_PATTERN_BUDGET;
    impl->config_name = "adapter_config.json";
    ipt_arena_init(&impl->arena, ctx);
    f->path = ipt_arena_strdup(&impl->arena, path);
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path,
               *dot = strrchr(base, '.');
    size_t len = dot && dot > base ? (size_t)(dot - base) : strlen(base);
    char *name = ipt_arena_alloc(&impl->arena, len + 1);
    if (!f->path || !name) {
        ipt_adapter_close(&f);
        return IPT_ERR_NOMEM;
    }
    snprintf(name, len + 1, "%.*s", (int)len, base);
    f->name = name;
    *out = f;
    return IPT_OK;
}

/* A PEFT or diffusers folder: the weights' file; and adapter_config.json where it belongs to them.
 */
static ipt_status find_files(ipt_adapter_file *f, char *file)
{
    static const char *const names[] = {"adapter_model.safetensors",
                                        "pytorch_lora_weights.safetensors"};
    char config[PATH_MAX];
    const char *slash = strrchr(f->path, '/');
    size_t dir = slash ? (size_t)(slash - f->path) + 1 : 0;
    bool is_dir = ipt_is_dir(f->path), found = !is_dir;
    snprintf(file, PATH_MAX, "%s", f->path);
    for (size_t i = 0; i < IPT_COUNT(names) && !found; i++)
        found = ipt_path_join(file, PATH_MAX, f->path, names[i]) && ipt_is_file(file);
    if (!found)
        return ipt_fail(
            f->impl->ctx, IPT_ERR_MISSING,
            "%s: a folder without adapter_model.safetensors or pytorch_lora_weights.safetensors",
            f->path);
    int n = 0;
    if (is_dir)
        n = snprintf(config, sizeof config, "%s/adapter_config.json", f->path);
    else if (strcmp(f->path + dir, names[0]) == 0)
        n = snprintf(config, sizeof config, "%.*sadapter_config.json", (int)dir, f->path);
    if (n > 0 && (size_t)n < sizeof config && ipt_is_file(config))
        return ipt_json_load(f->impl->ctx, config, &f->impl->config);
    return IPT_OK;
}

ipt_status ipt_adapter_open(ipt_ctx *ctx, const char *path, const ipt_module *modules,
                            size_t n_modules, ipt_adapter_file **out)
{
    ipt_adapter_file *f = NULL;
    char file[PATH_MAX];
    if (strlen(path) + 64 > PATH_MAX)
        return ipt_fail(ctx, IPT_ERR_IO, "%.200s...: path too long", path);
    IPT_TRY(create(ctx, path, modules, n_modules, &f));
    ipt_status status = find_files(f, file);
    if (status == IPT_OK)
        status = ipt_safetensors_open(ctx, file, &f->impl->st);
    if (status == IPT_OK)
        status = resolve(f);
    if (status != IPT_OK) {
        ipt_adapter_close(&f);
        return status;
    }
    f->impl->list = NULL;
    *out = f;
    return IPT_OK;
}

ipt_status ipt_adapter_open_memory(ipt_ctx *ctx, const char *name, const void *data, size_t size,
                                   const ipt_module *modules, size_t n_modules,
                                   ipt_adapter_file **out)
{
    ipt_adapter_file *f = NULL;
    IPT_TRY(create(ctx, name, modules, n_modules, &f));
    ipt_status status = ipt_safetensors_open_memory(ctx, name, data, size, &f->impl->st);
    if (status == IPT_OK)
        status = resolve(f);
    if (status != IPT_OK) {
        ipt_adapter_close(&f);
        return status;
    }
    f->impl->list = NULL;
    *out = f;
    return IPT_OK;
}

void ipt_adapter_close(ipt_adapter_file **pf)
{
    if (!pf || !*pf)
        return;
    struct ipt_adapter_impl *impl = (*pf)->impl;
    ipt_safetensors_close(&impl->st);
    json_decref(impl->config);
    ipt_arena_finish(&impl->arena);
    ipt_free(impl);
    ipt_free(*pf);
    *pf = NULL;
}

/* Of the whole file and of its data part; false when it cannot be read. */
static bool hash_file(const ipt_safetensors *st, uint8_t *block, size_t n_block, uint8_t whole[32],
                      uint8_t part[32])
{
    uint64_t size = 0, start = 0;
    ipt_sha256 all, data;
    ipt_safetensors_size(st, &size, &start);
    ipt_sha256_init(&all);
    ipt_sha256_init(&data);
    for (uint64_t at = 0; at < size;) {
        uint64_t end = at < start ? start : size; /* no block lies in both parts */
        size_t n = end - at < n_block ? (size_t)(end - at) : n_block;
        if (ipt_safetensors_read(st, at, n, block) != IPT_OK)
            return false;
        ipt_sha256_update(&all, block, n);
        if (at >= start)
            ipt_sha256_update(&data, block, n);
        at += n;
    }
    ipt_sha256_final(&all, whole);
    ipt_sha256_final(&data, part);
    return true;
}

void ipt_adapter_hash(ipt_adapter_file *f)
{
    enum { BLOCK = 1 << 20 };
    uint8_t whole[32], part[32];
    if (f->sha256[0])
        return;
    uint8_t *block = ipt_alloc(f->impl->ctx, BLOCK);
    if (block && hash_file(f->impl->st, block, BLOCK, whole, part)) {
        ipt_hex(whole, sizeof whole, f->sha256);
        ipt_hex(part, sizeof part, f->data_sha256);
        memcpy(f->autov2, f->sha256, 10);
        memcpy(f->autov3, f->data_sha256, 12);
    }
    ipt_free(block);
}
