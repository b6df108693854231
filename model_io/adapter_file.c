/* model_io/adapter_file.c - LoRA and LoCon files of every family as one neutral list: which module
 * of the model, which two factors, which scale. */
#include "model_io/adapter.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <string.h>

enum { MAX_RANK = 1 << 16 };

static const struct {
    const char *down, *up, *mid;
    ipt_adapter_family family;
    bool attn_procs;
} suffixes[] = {
    {".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", IPT_ADAPTER_KOHYA, false},
    {".lora_A.weight", ".lora_B.weight", NULL, IPT_ADAPTER_PEFT, false},
    {".lora_A.default.weight", ".lora_B.default.weight", NULL, IPT_ADAPTER_PEFT, false},
    {".lora_A.default_0.weight", ".lora_B.default_0.weight", NULL, IPT_ADAPTER_PEFT, false},
    {".lora.down.weight", ".lora.up.weight", NULL, IPT_ADAPTER_DIFFUSERS, false},
    {".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", NULL, IPT_ADAPTER_DIFFUSERS,
     false},
    {".down.weight", ".up.weight", NULL, IPT_ADAPTER_ATTN_PROCS, true},
};

const char *ipt_adapter_family_name(ipt_adapter_family f)
{
    static const char *const names[] = {"kohya", "diffusers attn-procs", "diffusers", "peft",
                                        "cloneofsimo"};
    return names[f];
}

static const ipt_st_tensor *take(const ipt_adapter_file *f, const char *stem, const char *suffix)
{
    char key[IPT_KEY_MAX + 64];
    int n = snprintf(key, sizeof key, "%s%s", stem, suffix);
    return n > 0 && (size_t)n < sizeof key ? ipt_safetensors_find(f->impl->st, key) : NULL;
}

void ipt_adapter_claim(ipt_adapter_file *f, const ipt_st_tensor *t, bool is_word)
{
    if (t)
        f->impl->used[t - ipt_safetensors_at(f->impl->st, 0)] = is_word ? 2 : 1;
}

bool ipt_adapter_factors_of(const ipt_adapter_file *f, const char *key, ipt_adapter_factors *out)
{
    size_t len = strlen(key);
    for (size_t k = 0; k < IPT_COUNT(suffixes); k++) {
        const char *endings[] = {suffixes[k].down, suffixes[k].up, suffixes[k].mid, ".alpha"};
        for (size_t i = 0; i < IPT_COUNT(endings); i++) {
            size_t n = endings[i] ? strlen(endings[i]) : len;
            if (n >= len || len - n >= sizeof out->stem || strcmp(key + len - n, endings[i]) != 0)
                continue;
            snprintf(out->stem, sizeof out->stem, "%.*s", (int)(len - n), key);
            out->down = take(f, out->stem, suffixes[k].down);
            out->up = take(f, out->stem, suffixes[k].up);
            if (i < 3 || out->down || out->up) /* an alpha goes with any family's factors */
                return true;
        }
    }
    return false;
}

/* --- scale ------------------------------------------------------------------------------------ */
/* The file's own alpha, else that of PEFT's settings, else the rank. */
static ipt_status set_scale(ipt_adapter_file *f, const ipt_module *m, const char *stem,
                            ipt_adapter_family family, ipt_adapter_module *out)
{
    bool found = false;
    const ipt_st_tensor *t = take(f, stem, ".alpha");
    double alpha = out->rank, divisor = out->rank;
    if (!t && family == IPT_ADAPTER_DIFFUSERS)
        t = take(f, stem, ".lora.alpha");
    if (t) {
        if (t->count != 1)
            return ipt_fail(f->impl->ctx, IPT_ERR_SHAPE,
                            "%s: key '%s': found %zu elements, expected 1", f->path, t->name,
                            t->count);
        IPT_TRY(ipt_st_load(t));
        if (ipt_st_finite(t, NULL)) /* else the file is refused before it is used */
            alpha = (double)ipt_st_get(t, 0);
        ipt_adapter_claim(f, t, false);
    } else {
        IPT_TRY(ipt_adapter_alpha(f, m, out->rank, &found, &alpha, &divisor));
    }
    out->alpha = (float)alpha;
    out->scale = (float)(alpha / divisor);
    if (!isfinite(out->scale))
        return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT,
                        "%s: '%s': alpha is %g, expected a finite number", f->path, stem, alpha);
    return IPT_OK;
}

/* --- one module ------------------------------------------------------------------------------- */
static ipt_status bad_shape(const ipt_adapter_file *f, const ipt_st_tensor *t, const char *expected)
{
    char found[128];
    ipt_st_shape_text(t, found, sizeof found);
    return ipt_fail(f->impl->ctx, IPT_ERR_SHAPE,
                    "%s: key '%s': found shape %s, expected %s: made for %s?", f->path, t->name,
                    found, expected, f->made_for ? f->made_for : "another model");
}

/* down' = mid with down applied to its inputs: up x down' is the Tucker form's product. */
static ipt_status expand_tucker(ipt_adapter_file *f, const ipt_module *m, const ipt_st_tensor *mid,
                                ipt_adapter_module *out)
{
    char text[96];
    const ipt_st_tensor *down = out->down;
    size_t in = (size_t)m->in, taps = (size_t)m->kh * (size_t)m->kw, n = 0;
    size_t r_in = down->rank > 0 && down->dim[0] > 0 ? (size_t)down->dim[0] : 0,
           r = (size_t)out->rank;
    snprintf(text, sizeof text, "[%zu,%zu,%d,%d]", r, r_in, (int)m->kh, (int)m->kw);
    if (r_in > MAX_RANK || mid->count != r * r_in * taps || mid->rank != 4 ||
        mid->dim[0] != out->rank || mid->dim[1] != (int64_t)r_in)
        return bad_shape(f, mid, text);
    snprintf(text, sizeof text, "[%zu,%d,1,1]", r_in, (int)m->in);
    if (r_in == 0 || down->count != r_in * in)
        return bad_shape(f, down, text);
    if (!ipt_mul_size(r * in, taps * sizeof(float), &n))
        return ipt_fail(f->impl->ctx, IPT_ERR_NOMEM, "%s: '%s' is too large", f->path, down->name);
    float *full = ipt_arena_alloc(&f->impl->arena, n);
    if (!full)
        return IPT_ERR_NOMEM;
    for (size_t a = 0; a < r; a++)
        for (size_t b = 0; b < r_in; b++)
            for (size_t i = 0; i < in; i++) {
                float d = ipt_st_get(down, b * in + i);
                for (size_t k = 0; k < taps; k++)
                    full[(a * in + i) * taps + k] += ipt_st_get(mid, (a * r_in + b) * taps + k) * d;
            }
    out->down_f32 = full;
    f->has_tucker = true;
    return IPT_OK;
}

static ipt_status add_module(ipt_adapter_file *f, size_t index, const ipt_st_tensor *down,
                             const ipt_st_tensor *up, const ipt_st_tensor *mid,
                             ipt_adapter_module *out)
{
    const ipt_module *m = &f->impl->list[index];
    char text[96];
    size_t fan = (size_t)m->in * (size_t)m->kh * (size_t)m->kw;
    *out = (ipt_adapter_module){.module = index,
                                .out = m->out,
                                .in = m->in,
                                .kh = m->kh,
                                .kw = m->kw,
                                .down = down,
                                .up = up};
    ipt_adapter_claim(f, down, false);
    ipt_adapter_claim(f, up, false);
    ipt_adapter_claim(f, mid, false);
    const ipt_st_tensor *of = mid ? mid : down;
    int64_t rank = of->rank > 0 ? of->dim[0] : 0;
    if (rank < 1 || rank > MAX_RANK)
        return bad_shape(f, of, "a rank of 1 to 65536 in front");
    out->rank = (int32_t)rank;
    snprintf(text, sizeof text, "[%d,%d]", (int)m->out, (int)rank);
    if (up->rank < 2 || up->dim[0] != m->out || up->count != (size_t)m->out * (size_t)rank)
        return bad_shape(f, up, text);
    if (mid) {
        IPT_TRY(expand_tucker(f, m, mid, out));
    } else if (down->count != (size_t)rank * fan) {
        if (m->kh * m->kw == 1)
            snprintf(text, sizeof text, "[%d,%d]", (int)rank, (int)m->in);
        else
            snprintf(text, sizeof text, "[%d,%d,%d,%d]", (int)rank, (int)m->in, (int)m->kh,
                     (int)m->kw);
        return bad_shape(f, down, text);
    }
    f->has_conv = f->has_conv || m->kh * m->kw > 1;
    f->rank_min = f->rank_min == 0 || out->rank < f->rank_min ? out->rank : f->rank_min;
    f->rank_max = out->rank > f->rank_max ? out->rank : f->rank_max;
    return IPT_OK;
}

static ipt_status missing_half(const ipt_adapter_file *f, const ipt_st_tensor *t, const char *stem,
                               const char *suffix)
{
    return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT, "%s: key '%s' is there, but not '%s%s'", f->path,
                    t->name, stem, suffix);
}

/* With two text encoders in the model: factors that are the other one's by their shape, or taken.
 */
static bool is_others(const ipt_adapter_file *f, const ipt_module *m, const ipt_st_tensor *down,
                      const ipt_st_tensor *up)
{
    bool two = false;
    for (size_t i = 0; i < f->impl->n_list && !two; i++)
        two = f->impl->list[i].comp == IPT_COMP_TEXT2;
    if (!two || !down || !up)
        return false;
    return f->impl->used[down - ipt_safetensors_at(f->impl->st, 0)] || down->rank < 2 ||
           up->rank < 2 || down->dim[1] != m->in || up->dim[0] != m->out;
}

/* Looks for one module under every spelling.  *found false: the file has nothing for it. */
static ipt_status match_module(ipt_adapter_file *f, const ipt_key_frame *frame, size_t index,
                               bool *found)
{
    ipt_adapter_stem stem;
    const ipt_module *m = &f->impl->list[index];
    for (int i = 0; !*found && ipt_adapter_name(frame, m, i, &stem); i++) {
        for (size_t k = 0; stem.text[0] && !*found && k < IPT_COUNT(suffixes); k++) {
            if (suffixes[k].attn_procs != stem.attn_procs)
                continue;
            const ipt_st_tensor *down = take(f, stem.text, suffixes[k].down),
                                *up = take(f, stem.text, suffixes[k].up);
            const ipt_st_tensor *mid = suffixes[k].mid ? take(f, stem.text, suffixes[k].mid) : NULL;
            if ((!down && !up) || (stem.any_encoder && is_others(f, m, down, up)))
                continue;
            if (!down || !up)
                return missing_half(f, down ? down : up, stem.text,
                                    down ? suffixes[k].up : suffixes[k].down);
            ipt_adapter_module *out = &f->module[f->n_module];
            IPT_TRY(add_module(f, index, down, up, mid, out));
            IPT_TRY(set_scale(f, m, stem.text, suffixes[k].family, out));
            if (f->n_module++ == 0)
                f->family = suffixes[k].family;
            *found = true;
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
    f->family = IPT_ADAPTER_CLONEOFSIMO;
    for (int pass = 0; pass < 2; pass++) {
        int comp = pass ? IPT_COMP_TEXT : IPT_COMP_UNET;
        for (int32_t i = 0; i < 100000; i++) {
            snprintf(key, sizeof key, "%s:%d:", pass ? "text_encoder" : "unet", (int)i);
            const ipt_st_tensor *down = take(f, key, "down"), *up = take(f, key, "up");
            size_t index = ipt_adapter_ordinal(f->impl->list, f->impl->n_list, comp, has_geglu, i);
            if (!down && !up)
                break;
            if (!down || !up)
                return missing_half(f, down ? down : up, key, down ? "up" : "down");
            if (index == f->impl->n_list || f->n_module == f->impl->n_list)
                continue; /* reported as unmatched */
            ipt_adapter_module *out = &f->module[f->n_module];
            IPT_TRY(add_module(f, index, down, up, NULL, out));
            out->alpha = (float)out->rank;
            out->scale = 1;
            f->n_module++;
        }
    }
    return IPT_OK;
}

/* --- opening ---------------------------------------------------------------------------------- */
static ipt_status check_kind(ipt_adapter_file *f)
{
    const ipt_safetensors *st = f->impl->st;
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        const char *peft = ipt_adapter_peft_type(f, comp);
        if (peft && strcmp(peft, "LORA") != 0)
            return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED,
                            "%s: %.50s adapter (peft_type): not supported yet, expected LORA",
                            f->path, peft);
    }
    for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
        const char *key = ipt_safetensors_at(st, i)->name, *what = ipt_adapter_unsupported(key);
        if (what)
            return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED, "%s: %s ('%s'): not supported yet",
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
    f->module = ipt_arena_alloc(&f->impl->arena, f->impl->n_list * sizeof *f->module);
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
    for (size_t i = 0; i < f->impl->n_list; i++) {
        bool found = false;
        IPT_TRY(match_module(f, &frame, i, &found));
    }
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
    char hex[65];
    if (f->sha256[0])
        return;
    uint8_t *block = ipt_alloc(f->impl->ctx, BLOCK);
    if (block && hash_file(f->impl->st, block, BLOCK, whole, part)) {
        ipt_hex(whole, sizeof whole, f->sha256);
        ipt_hex(part, sizeof part, hex);
        memcpy(f->autov2, f->sha256, 10);
        memcpy(f->autov3, hex, 12);
    }
    ipt_free(block);
}

/* --- factors ---------------------------------------------------------------------------------- */
void ipt_adapter_pack(const ipt_adapter_module *m, float *a, float *b, size_t n_rank, size_t col)
{
    size_t rank = (size_t)m->rank, in = (size_t)m->in, taps = (size_t)m->kh * (size_t)m->kw,
           out = (size_t)m->out;
    for (size_t r = 0; r < rank; r++)
        for (size_t i = 0; i < in; i++)
            for (size_t k = 0; k < taps; k++) {
                size_t src = (r * in + i) * taps + k;
                a[(k * in + i) * n_rank + col + r] =
                    m->down_f32 ? m->down_f32[src] : ipt_st_get(m->down, src);
            }
    for (size_t o = 0; o < out; o++)
        for (size_t r = 0; r < rank; r++)
            b[(col + r) * out + o] = m->scale * ipt_st_get(m->up, o * rank + r);
}
