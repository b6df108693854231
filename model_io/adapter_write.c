/* model_io/adapter_write.c - see adapter_write.h.
 *
 * Sources: kohya-ss/sd-scripts (networks/lora.py save_weights, model_util precalculate_safetensors_
 * hashes), LyCORIS (kohya.py), PEFT (LoraConfig, get_peft_model_state_dict), diffusers
 * (lora_base.py, _pack_dict_with_prefix), DiffuseKronA. */
#include "model_io/adapter_write.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#include "model_io/adapter.h"

/* What goes into PEFT's settings: one row a module. */
typedef struct setting {
    size_t module;
    int32_t rank;
    double alpha;
} setting;

struct ipt_adapter_out {
    ipt_ctx *ctx;
    ipt_adapter_out_opts o;
    ipt_arena arena;
    ipt_key_frame frame;
    bool two_encoders, use_dora, has_lycoris;
    ipt_st_write *tensor;
    size_t n, cap;
    setting *setting;
    size_t n_setting, cap_setting;
    json_t *meta;
};

const char *ipt_adapter_format_name(ipt_adapter_format f)
{
    static const char *const names[] = {"kohya", "peft", "diffusers", "krona"};
    return names[f];
}

ipt_status ipt_adapter_out_create(ipt_ctx *ctx, const ipt_adapter_out_opts *o,
                                  ipt_adapter_out **out)
{
    ipt_adapter_out *w = ipt_alloc(ctx, sizeof *w);
    if (!w)
        return IPT_ERR_NOMEM;
    w->ctx = ctx;
    w->o = *o;
    ipt_arena_init(&w->arena, ctx);
    ipt_key_frame_modules(o->module, o->n_module, &w->frame);
    for (size_t i = 0; i < o->n_module; i++)
        w->two_encoders = w->two_encoders || o->module[i].comp == IPT_COMP_TEXT2;
    w->meta = json_object();
    if (!w->meta) {
        ipt_adapter_out_destroy(&w);
        return ipt_fail(ctx, IPT_ERR_NOMEM, "no memory for metadata");
    }
    *out = w;
    return IPT_OK;
}

void ipt_adapter_out_destroy(ipt_adapter_out **pw)
{
    if (!pw || !*pw)
        return;
    ipt_adapter_out *w = *pw;
    ipt_arena_finish(&w->arena);
    ipt_free(w->tensor);
    ipt_free(w->setting);
    json_decref(w->meta);
    ipt_free(w);
    *pw = NULL;
}

ipt_adapter_format ipt_adapter_out_format(const ipt_adapter_out *w) { return w->o.format; }
size_t ipt_adapter_out_count(const ipt_adapter_out *w) { return w->n; }

/* --- names ------------------------------------------------------------------------------------ */
/* How a format begins the keys of a component.  nth: of the spellings with that prefix; SDXL's
 * trainers name the UNet as the sgm checkpoint does, the second. */
typedef struct naming {
    ipt_adapter_format format;
    int comp;
    bool sdxl;
    const char *prefix;
    int nth;
} naming;
static const naming namings[] = {
    {IPT_FORMAT_KOHYA, IPT_COMP_UNET, false, "lora_unet_", 0},
    {IPT_FORMAT_KOHYA, IPT_COMP_UNET, true, "lora_unet_", 1},
    {IPT_FORMAT_KOHYA, IPT_COMP_TEXT, false, "lora_te_", 0},
    {IPT_FORMAT_KOHYA, IPT_COMP_TEXT, true, "lora_te1_", 0},
    {IPT_FORMAT_KOHYA, IPT_COMP_TEXT2, true, "lora_te2_", 0},
    {IPT_FORMAT_PEFT, IPT_COMP_UNET, false, "base_model.model.", 0},
    {IPT_FORMAT_PEFT, IPT_COMP_TEXT, false, "base_model.model.", 1}, /* transformers 5's */
    {IPT_FORMAT_DIFFUSERS, IPT_COMP_UNET, false, "unet.", 0},
    {IPT_FORMAT_DIFFUSERS, IPT_COMP_TEXT, false, "text_encoder.", 0},
    {IPT_FORMAT_DIFFUSERS, IPT_COMP_TEXT2, false, "text_encoder_2.", 0},
    {IPT_FORMAT_KRONA, IPT_COMP_UNET, false, "unet.", 0},
    {IPT_FORMAT_KRONA, IPT_COMP_TEXT, false, "text_encoder.", 0},
    {IPT_FORMAT_KRONA, IPT_COMP_TEXT2, false, "text_encoder_2.", 0},
};

static const naming *naming_of(const ipt_adapter_out *w, const ipt_module *m)
{
    bool sdxl = w->o.format == IPT_FORMAT_KOHYA && w->two_encoders;
    for (size_t i = 0; i < IPT_COUNT(namings); i++)
        if (namings[i].format == w->o.format && namings[i].comp == m->comp &&
            namings[i].sdxl == sdxl)
            return &namings[i];
    return NULL;
}

/* The first spelling with the prefix, or the nth of them where it has one. */
static bool find_stem(const ipt_adapter_out *w, const ipt_module *m, const naming *n, char *buf)
{
    ipt_adapter_stem stem;
    int seen = 0;
    bool attn = n->format == IPT_FORMAT_KRONA;
    buf[0] = 0;
    for (int i = 0; ipt_adapter_name(&w->frame, m, i, &stem); i++) {
        if (stem.attn_procs != attn || strncmp(stem.text, n->prefix, strlen(n->prefix)) != 0)
            continue;
        if (seen++ == 0 || seen == n->nth + 1)
            memcpy(buf, stem.text, strlen(stem.text) + 1);
        if (seen == n->nth + 1)
            return true;
    }
    return buf[0] != 0;
}

static ipt_status unsupported(const ipt_adapter_out *w, size_t module, const char *what,
                              const char *instead)
{
    const ipt_module *m = &w->o.module[module];
    return ipt_fail(w->ctx, IPT_ERR_UNSUPPORTED,
                    "%s.%s: found %s, which the %s format cannot hold; %s", ipt_comp_name(m->comp),
                    m->name, what, ipt_adapter_format_name(w->o.format), instead);
}

static ipt_status stem_of(const ipt_adapter_out *w, size_t module, char stem[IPT_KEY_MAX])
{
    const ipt_module *m = &w->o.module[module];
    const naming *n = naming_of(w, m);
    if (w->o.format == IPT_FORMAT_PEFT && w->two_encoders && m->comp != IPT_COMP_UNET)
        return unsupported(w, module, "one of two text encoders",
                           "expected one model a folder: use the diffusers format");
    if (!n || !find_stem(w, m, n, stem))
        return unsupported(w, module, "a module without a name there", "use the kohya format");
    return IPT_OK;
}

/* --- tensors ---------------------------------------------------------------------------------- */
static ipt_status grow(ipt_adapter_out *w)
{
    if (w->n < w->cap)
        return IPT_OK;
    size_t cap = w->cap ? 2 * w->cap : 256;
    ipt_st_write *t = ipt_regrow(w->ctx, w->tensor, w->cap * sizeof *t, cap * sizeof *t);
    if (!t)
        return IPT_ERR_NOMEM;
    w->tensor = t;
    w->cap = cap;
    return IPT_OK;
}

static ipt_status bad_value(const ipt_adapter_out *w, const char *key, ipt_st_dtype dtype)
{
    return ipt_fail(
        w->ctx, IPT_ERR_ARG,
        "key '%s': found a value that does not fit %s, expected smaller ones: write f32", key,
        ipt_st_dtype_name(dtype));
}

static ipt_status round_values(ipt_adapter_out *w, const char *key, ipt_st_dtype dtype,
                               const ipt_out_values *v, size_t count, void *dst)
{
    double part[512];
    size_t bytes = ipt_st_dtype_bytes(dtype);
    for (size_t i = 0; i < count; i += IPT_COUNT(part)) {
        size_t n = count - i < IPT_COUNT(part) ? count - i : IPT_COUNT(part);
        for (size_t k = 0; k < n; k++)
            part[k] = v->same ? (double)ipt_st_get(v->same, i + k) : v->value[i + k];
        if (!ipt_st_from_f64(dtype, part, n, (uint8_t *)dst + i * bytes))
            return bad_value(w, key, dtype);
    }
    return IPT_OK;
}

ipt_status ipt_adapter_out_key(ipt_adapter_out *w, const char *key, const ipt_out_values *v)
{
    ipt_st_write t = {.dtype = v->same ? v->same->dtype : v->dtype, .rank = v->rank};
    size_t count = 1;
    IPT_TRY(grow(w));
    if (v->same && v->rank == 0) {
        t.rank = v->same->rank;
        memcpy(t.dim, v->same->dim, sizeof t.dim);
    } else {
        memcpy(t.dim, v->dim, sizeof v->dim);
    }
    for (int i = 0; i < t.rank; i++)
        count *= (size_t)t.dim[i]; /* of values that are in memory */
    if (v->same && count != v->same->count)
        return ipt_fail(w->ctx, IPT_ERR_ARG, "key '%s': found %zu values, expected %zu", key,
                        v->same->count, count);
    if (w->o.dtype != IPT_ST_COUNT && (!v->same || t.dtype != IPT_ST_BOOL))
        t.dtype = w->o.dtype;
    bool copy = v->same && t.dtype == v->same->dtype;
    if (!copy && !ipt_st_can_write(t.dtype))
        t.dtype = IPT_ST_F32;
    void *data = ipt_arena_alloc(&w->arena, count * ipt_st_dtype_bytes(t.dtype));
    t.name = ipt_arena_strdup(&w->arena, key);
    if (!data || !t.name)
        return IPT_ERR_NOMEM;
    if (v->same)
        IPT_TRY(ipt_st_load(v->same));
    if (copy && count > 0)
        memcpy(data, v->same->data, v->same->bytes);
    else if (!copy)
        IPT_TRY(round_values(w, key, t.dtype, v, count, data));
    t.data = data;
    w->tensor[w->n++] = t;
    return IPT_OK;
}

static ipt_status put(ipt_adapter_out *w, const char *stem, const char *ending,
                      const ipt_out_values *v)
{
    char key[IPT_KEY_MAX + 64];
    return ipt_adapter_out_key(w, ipt_name(key, sizeof key, "%s%s", stem, ending), v);
}

ipt_status ipt_adapter_out_tensor(ipt_adapter_out *w, size_t module, const char *ending,
                                  const ipt_out_values *v)
{
    char stem[IPT_KEY_MAX];
    bool own = w->o.format == IPT_FORMAT_KRONA;
    if (w->o.format != IPT_FORMAT_KOHYA && !own)
        return unsupported(w, module, ending, "use the kohya format, or --to lora with a rank");
    IPT_TRY(stem_of(w, module, stem));
    w->has_lycoris = w->has_lycoris || !own;
    bool number = strcmp(ending, ".alpha") == 0 || strcmp(ending, ".on_input") == 0;
    ipt_st_dtype all = w->o.dtype;
    w->o.dtype = number ? IPT_ST_COUNT : all; /* no factors */
    ipt_status s = put(w, stem, ending, v);
    w->o.dtype = all;
    return s;
}

/* alpha in the dtype of the factors where that holds it, as trainers write it. */
static ipt_status put_alpha(ipt_adapter_out *w, const char *stem, double alpha, ipt_st_dtype dtype)
{
    ipt_out_values v = {.value = &alpha, .dtype = dtype};
    float f = (float)alpha;
    bool holds = dtype == IPT_ST_F16    ? ipt_f16_to_f32(ipt_f32_to_f16(f)) == f
                 : dtype == IPT_ST_BF16 ? ipt_bf16_to_f32(ipt_f32_to_bf16(f)) == f
                                        : dtype == IPT_ST_F64;
    ipt_st_dtype all = w->o.dtype;
    v.dtype = holds ? dtype : IPT_ST_F32;
    w->o.dtype = IPT_ST_COUNT;
    ipt_status s = put(w, stem, ".alpha", &v);
    w->o.dtype = all;
    return s;
}

static ipt_status note_setting(ipt_adapter_out *w, size_t module, int32_t rank, double alpha)
{
    if (w->n_setting == w->cap_setting) {
        size_t cap = w->cap_setting ? 2 * w->cap_setting : 256;
        setting *s = ipt_regrow(w->ctx, w->setting, w->cap_setting * sizeof *s, cap * sizeof *s);
        if (!s)
            return IPT_ERR_NOMEM;
        w->setting = s;
        w->cap_setting = cap;
    }
    w->setting[w->n_setting++] = (setting){module, rank, alpha};
    return IPT_OK;
}

static bool is_there(const ipt_out_values *v) { return v->same || v->value; }

/* LyCORIS has the magnitude with as many axes as the weight, PEFT a plain vector of outputs. */
static ipt_status put_magnitude(ipt_adapter_out *w, size_t module, const char *stem,
                                const ipt_out_lora *f)
{
    const ipt_module *m = &w->o.module[module];
    ipt_out_values v = f->magnitude;
    bool kohya = w->o.format == IPT_FORMAT_KOHYA;
    int axes = f->down.same ? f->down.same->rank : f->down.rank;
    if (!kohya && f->by_input)
        return unsupported(w, module, "DoRA by inputs", "use the kohya format");
    if (!kohya) {
        v.rank = 1;
        v.dim[0] = m->out;
    } else if (!f->by_input) {
        v.rank = (uint8_t)axes;
        v.dim[0] = m->out;
        v.dim[1] = v.dim[2] = v.dim[3] = 1;
    }
    w->use_dora = true;
    return put(w, stem, kohya ? ".dora_scale" : ".lora_magnitude_vector", &v);
}

ipt_status ipt_adapter_out_lora(ipt_adapter_out *w, size_t module, const ipt_out_lora *f)
{
    char stem[IPT_KEY_MAX];
    bool kohya = w->o.format == IPT_FORMAT_KOHYA;
    ipt_st_dtype dtype = w->o.dtype != IPT_ST_COUNT ? w->o.dtype
                         : f->up.same               ? f->up.same->dtype
                                                    : f->up.dtype;
    if (w->o.format == IPT_FORMAT_KRONA)
        return unsupported(w, module, "LoRA factors", "use --to krona");
    if (!kohya && is_there(&f->mid))
        return unsupported(w, module, "a factor in the middle (Tucker)", "use the kohya format");
    IPT_TRY(stem_of(w, module, stem));
    IPT_TRY(put(w, stem, kohya ? ".lora_down.weight" : ".lora_A.weight", &f->down));
    IPT_TRY(put(w, stem, kohya ? ".lora_up.weight" : ".lora_B.weight", &f->up));
    if (is_there(&f->mid))
        IPT_TRY(put(w, stem, ".lora_mid.weight", &f->mid));
    if (kohya)
        IPT_TRY(put_alpha(w, stem, f->alpha, dtype));
    if (is_there(&f->magnitude))
        IPT_TRY(put_magnitude(w, module, stem, f));
    return note_setting(w, module, f->rank, f->alpha);
}

/* --- settings --------------------------------------------------------------------------------- */
/* PEFT's own names: transformers 5 has dropped "text_model." (endings and patterns match both). */
static const char *peft_name(const ipt_module *m)
{
    static const char old[] = "text_model.";
    bool text = m->comp != IPT_COMP_UNET;
    return text && strncmp(m->name, old, sizeof old - 1) == 0 ? m->name + sizeof old - 1 : m->name;
}

/* The most frequent rank and alpha of a component (comp < 0: of all). */
static void usual(const ipt_adapter_out *w, int comp, int32_t *rank, double *alpha)
{
    size_t best_rank = 0, best_alpha = 0;
    for (size_t i = 0; i < w->n_setting; i++) {
        const setting *a = &w->setting[i];
        size_t n_rank = 0, n_alpha = 0;
        if (comp >= 0 && w->o.module[a->module].comp != comp)
            continue;
        for (size_t k = 0; k < w->n_setting; k++) {
            const setting *b = &w->setting[k];
            bool ours = comp < 0 || w->o.module[b->module].comp == comp;
            n_rank += ours && b->rank == a->rank;
            n_alpha += ours && b->alpha >= a->alpha && b->alpha <= a->alpha;
        }
        if (n_rank > best_rank) {
            best_rank = n_rank;
            *rank = a->rank;
        }
        if (n_alpha > best_alpha) {
            best_alpha = n_alpha;
            *alpha = a->alpha;
        }
    }
}

/* A whole number as such: PEFT declares lora_alpha as int, and reads floats all the same. */
static json_t *number(double v)
{
    return v >= -1e9 && v <= 1e9 && floor(v) >= v ? json_integer((json_int_t)v) : json_real(v);
}

static void set(json_t *o, const char *prefix, const char *key, json_t *v)
{
    char full[128];
    json_object_set_new(o, ipt_name(full, sizeof full, "%s%s", prefix, key), v);
}

/* LoraConfig of a component into o, every key after `prefix`. */
static void add_config(const ipt_adapter_out *w, int comp, const char *prefix, json_t *o)
{
    json_t *targets = json_array(), *ranks = json_object(), *alphas = json_object();
    int32_t rank = 1;
    double alpha = 1;
    usual(w, comp, &rank, &alpha);
    for (size_t i = 0; i < w->n_setting; i++) {
        const setting *s = &w->setting[i];
        const ipt_module *m = &w->o.module[s->module];
        if (comp >= 0 && m->comp != comp)
            continue;
        json_array_append_new(targets, json_string(peft_name(m)));
        if (s->rank != rank)
            json_object_set_new(ranks, peft_name(m), json_integer(s->rank));
        if (!(s->alpha >= alpha && s->alpha <= alpha))
            json_object_set_new(alphas, peft_name(m), number(s->alpha));
    }
    set(o, prefix, "peft_type", json_string("LORA"));
    set(o, prefix, "r", json_integer(rank));
    set(o, prefix, "lora_alpha", number(alpha));
    set(o, prefix, "target_modules", targets);
    set(o, prefix, "rank_pattern", ranks);
    set(o, prefix, "alpha_pattern", alphas);
    set(o, prefix, "bias", json_string("none"));
    set(o, prefix, "lora_dropout", json_real(0.0));
    set(o, prefix, "use_dora", json_boolean(w->use_dora));
    set(o, prefix, "use_rslora", json_false());
    set(o, prefix, "fan_in_fan_out", json_false());
    set(o, prefix, "inference_mode", json_true());
}

/* --- metadata --------------------------------------------------------------------------------- */
static bool is_own(const char *key)
{
    static const char *const starts[] = {"ss_network_dim",
                                         "ss_network_alpha",
                                         "ss_network_module",
                                         "ss_network_args",
                                         "sshs_",
                                         "lora_adapter_metadata",
                                         "format",
                                         "modelspec.hash_sha256"};
    for (size_t i = 0; i < IPT_COUNT(starts); i++)
        if (strncmp(key, starts[i], strlen(starts[i])) == 0)
            return true;
    return false;
}

ipt_status ipt_adapter_out_meta(ipt_adapter_out *w, const char *key, const char *value)
{
    if (is_own(key))
        return IPT_OK;
    json_t *v = ipt_json_text(value);
    return v && json_object_set_new(w->meta, key, v) == 0
               ? IPT_OK
               : ipt_fail(w->ctx, IPT_ERR_NOMEM, "no memory for metadata");
}

/* SHA-256 of the data part: kohya's model hash, A1111's hash of a LoRA. */
static void data_hash(const ipt_adapter_out *w, char hex[65])
{
    ipt_sha256 sha;
    uint8_t digest[32];
    ipt_sha256_init(&sha);
    for (size_t i = 0; i < w->n; i++) {
        size_t bytes = ipt_st_dtype_bytes(w->tensor[i].dtype);
        for (int d = 0; d < w->tensor[i].rank; d++)
            bytes *= (size_t)w->tensor[i].dim[d];
        ipt_sha256_update(&sha, w->tensor[i].data, bytes);
    }
    ipt_sha256_final(&sha, digest);
    ipt_hex(digest, sizeof digest, hex);
}

static void add_kohya_meta(const ipt_adapter_out *w, json_t *meta)
{
    char text[65];
    int32_t rank = 0;
    double alpha = 0;
    bool same_rank = true, same_alpha = true;
    usual(w, -1, &rank, &alpha);
    for (size_t i = 0; i < w->n_setting; i++) {
        same_rank = same_rank && w->setting[i].rank == rank;
        same_alpha = same_alpha && w->setting[i].alpha >= alpha && w->setting[i].alpha <= alpha;
    }
    json_object_set_new(meta, "ss_network_module",
                        json_string(w->has_lycoris ? "lycoris.kohya" : "networks.lora"));
    if (w->n_setting > 0) {
        ipt_name(text, sizeof text, "%d", (int)rank);
        json_object_set_new(meta, "ss_network_dim", json_string(same_rank ? text : "Dynamic"));
        ipt_name(text, sizeof text, "%.9g", alpha);
        json_object_set_new(meta, "ss_network_alpha", json_string(same_alpha ? text : "Dynamic"));
    }
    data_hash(w, text);
    json_object_set_new(meta, "sshs_model_hash", json_string(text));
}

static ipt_status add_diffusers_meta(const ipt_adapter_out *w, json_t *meta)
{
    json_t *o = json_object();
    char prefix[64];
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        bool any = false;
        for (size_t i = 0; i < w->n_setting; i++)
            any = any || w->o.module[w->setting[i].module].comp == comp;
        if (any)
            add_config(w, comp, ipt_name(prefix, sizeof prefix, "%s.", ipt_comp_name(comp)), o);
    }
    char *text = json_dumps(o, JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    json_decref(o);
    json_t *v = text ? json_string(text) : NULL;
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    if (text)
        release(text);
    if (!v)
        return ipt_fail(w->ctx, IPT_ERR_NOMEM, "no memory for metadata");
    json_object_set_new(meta, "lora_adapter_metadata", v);
    json_object_set_new(meta, "format", json_string("pt")); /* transformers asks for it */
    return IPT_OK;
}

/* --- files ------------------------------------------------------------------------------------ */
static ipt_status write_tensors(ipt_adapter_out *w, const char *path)
{
    const char *key;
    json_t *v;
    size_t n = 0;
    ipt_st_meta *meta = ipt_arena_alloc(&w->arena, (json_object_size(w->meta) + 1) * sizeof *meta);
    if (!meta)
        return IPT_ERR_NOMEM;
    json_object_foreach(w->meta, key, v) meta[n++] = (ipt_st_meta){key, json_string_value(v)};
    return ipt_safetensors_write(w->ctx, path, w->tensor, w->n, meta, n);
}

static ipt_status write_peft_files(ipt_adapter_out *w, const char *dir)
{
    char path[IPT_DIR_MAX];
    json_t *o = json_object();
    add_config(w, -1, "", o);
    char *text = json_dumps(o, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    json_decref(o);
    ipt_status s = text ? IPT_OK : ipt_fail(w->ctx, IPT_ERR_NOMEM, "no memory for settings");
    if (s == IPT_OK && !ipt_path_join(path, sizeof path, dir, "adapter_config.json"))
        s = ipt_fail(w->ctx, IPT_ERR_OUTPUT, "%.200s: cannot write: path too long", dir);
    if (s == IPT_OK)
        s = ipt_file_write(w->ctx, path, text, strlen(text));
    if (s == IPT_OK && ipt_path_join(path, sizeof path, dir, "adapter_model.safetensors"))
        s = write_tensors(w, path);
    json_free_t release;
    json_get_alloc_funcs(NULL, &release);
    if (text)
        release(text);
    return s;
}

static ipt_status write_peft(ipt_adapter_out *w, const char *path)
{
    char tmp[IPT_DIR_MAX];
    json_object_set_new(w->meta, "format", json_string("pt"));
    IPT_TRY(ipt_dir_begin(w->ctx, path, tmp));
    ipt_status s = write_peft_files(w, tmp);
    if (s == IPT_OK)
        s = ipt_dir_commit(w->ctx, tmp, path);
    if (s != IPT_OK)
        ipt_dir_abort(tmp);
    return s;
}

ipt_status ipt_adapter_out_write(ipt_adapter_out *w, const char *path)
{
    if (w->n == 0)
        return ipt_fail(w->ctx, IPT_ERR_ARG, "%s: nothing to write: no module has a change", path);
    if (ipt_cancelled(w->ctx))
        return ipt_fail(w->ctx, IPT_ERR_CANCELLED, "cancelled");
    if (w->o.format == IPT_FORMAT_PEFT)
        return write_peft(w, path);
    if (w->o.format == IPT_FORMAT_KOHYA)
        add_kohya_meta(w, w->meta);
    else if (w->o.format == IPT_FORMAT_DIFFUSERS)
        IPT_TRY(add_diffusers_meta(w, w->meta));
    else
        json_object_set_new(w->meta, "format", json_string("pt"));
    return write_tensors(w, path);
}

ipt_status ipt_adapter_out_bytes(const ipt_adapter_out *w, void **data, size_t *size)
{
    if (w->n == 0)
        return ipt_fail(w->ctx, IPT_ERR_ARG, "nothing to write: no module has a change");
    return ipt_safetensors_bytes(w->ctx, w->tensor, w->n, data, size);
}
