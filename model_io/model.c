/* model_io/model.c - a model's files: a single checkpoint or a diffusers folder, opened, checked
 * for what they are, and offered component by component. */
#include "model_io/internal.h"

#include <dirent.h>
#include <jansson.h>
#include <limits.h>
#include <string.h>

enum { MAX_FILES = 64 };

struct ipt_model {
    ipt_ctx *ctx;
    char *path;
    const char *layout;
    ipt_model_config cfg;
    ipt_safetensors *file[MAX_FILES]; /* owned; sources point at some of them */
    size_t n_file;
    ipt_source src[IPT_COMP_COUNT];
    const ipt_safetensors *of[IPT_COMP_COUNT][MAX_FILES];
    json_t *index, *scheduler;
    char *tokenizer[2];
};

static const char *const comp_names[IPT_COMP_COUNT] = {"unet", "vae", "text_encoder",
                                                       "text_encoder_2"};
const char *ipt_comp_name(int comp) { return comp_names[comp]; }

/* --- files of one component ------------------------------------------------------------------- */
static ipt_status add_file(ipt_model *m, int comp, const char *path)
{
    ipt_safetensors *st = NULL;
    if (m->n_file == MAX_FILES)
        return ipt_fail(m->ctx, IPT_ERR_UNSUPPORTED, "%s: more than %d weight files", path,
                        MAX_FILES);
    IPT_TRY(ipt_safetensors_open(m->ctx, path, &st));
    ipt_source *s = &m->src[comp];
    m->file[m->n_file++] = st;
    s->file = m->of[comp];
    s->file[s->n_file++] = st;
    return IPT_OK;
}

static ipt_status join(ipt_ctx *ctx, char *buf, const char *dir, const char *name)
{
    if (ipt_path_join(buf, PATH_MAX, dir, name))
        return IPT_OK;
    return ipt_fail(ctx, IPT_ERR_IO, "%.200s...: path too long", dir);
}

/* Shards named by NAME.safetensors.index.json; only plain names of files beside it are followed. */
static ipt_status add_shards(ipt_model *m, int comp, const char *dir, const char *index_path)
{
    json_t *root = NULL;
    char path[PATH_MAX];
    ipt_status status = ipt_json_load(m->ctx, index_path, &root);
    json_t *map = json_object_get(root, "weight_map"), *value;
    const char *key;
    if (status == IPT_OK && !json_is_object(map))
        status = ipt_fail(m->ctx, IPT_ERR_FORMAT, "%s: key 'weight_map' is missing", index_path);
    json_object_foreach(map, key, value)
    {
        const char *name = json_string_value(value);
        bool known = false;
        if (status != IPT_OK)
            break;
        if (!name || strchr(name, '/') || name[0] == '.') {
            status =
                ipt_fail(m->ctx, IPT_ERR_FORMAT,
                         "%s: key '%.100s': found %.100s, expected the name of a file beside it",
                         index_path, key, name ? name : "no string");
            break;
        }
        status = join(m->ctx, path, dir, name);
        for (size_t i = 0; i < m->src[comp].n_file && status == IPT_OK && !known; i++)
            known = strcmp(ipt_safetensors_path(m->src[comp].file[i]), path) == 0;
        if (status == IPT_OK && !known)
            status = add_file(m, comp, path);
    }
    json_decref(root);
    return status;
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

/* The only .safetensors file of a folder under another name; *has_pickle: a .bin or .pt is there.
 */
static bool only_weight_file(const char *dir, char *name, size_t n, bool *has_pickle)
{
    DIR *d = opendir(dir);
    int count = 0;
    *has_pickle = false;
    if (!d)
        return false;
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        if (ends_with(e->d_name, ".bin") || ends_with(e->d_name, ".pt") ||
            ends_with(e->d_name, ".ckpt"))
            *has_pickle = true;
        if (!ends_with(e->d_name, ".safetensors") || strlen(e->d_name) >= n)
            continue;
        snprintf(name, n, "%s", e->d_name);
        count++;
    }
    closedir(d);
    return count == 1;
}

static ipt_status add_weights(ipt_model *m, int comp, const char *dir)
{
    static const char *const forms[] = {"%s.safetensors", "%s.fp16.safetensors",
                                        "%s.safetensors.index.json",
                                        "%s.safetensors.index.fp16.json", "%s.fp32.safetensors"};
    const char *base =
        comp == IPT_COMP_UNET || comp == IPT_COMP_VAE ? "diffusion_pytorch_model" : "model";
    char path[PATH_MAX], name[NAME_MAX + 1];
    bool has_pickle = false;
    for (size_t i = 0; i < IPT_COUNT(forms); i++) {
        size_t at = 0;
        for (const char *p = forms[i]; *p; p++) { /* "%s" stands for the base name */
            const char *piece = *p == '%' ? base : p;
            size_t len = *p == '%' ? strlen(base) : 1;
            memcpy(name + at, piece, len);
            at += len;
            p += *p == '%';
        }
        name[at] = '\0';
        IPT_TRY(join(m->ctx, path, dir, name));
        if (!ipt_is_file(path))
            continue;
        return ends_with(name, ".json") ? add_shards(m, comp, dir, path) : add_file(m, comp, path);
    }
    if (only_weight_file(dir, name, sizeof name, &has_pickle)) {
        IPT_TRY(join(m->ctx, path, dir, name));
        return add_file(m, comp, path);
    }
    if (has_pickle)
        return ipt_fail(m->ctx, IPT_ERR_FORMAT,
                        "%s: only pickled weights here (.bin, .pt), expected %s.safetensors", dir,
                        base);
    return ipt_fail(m->ctx, IPT_ERR_MISSING, "%s: no weights found, expected %s.safetensors", dir,
                    base);
}

/* --- configs of a folder ---------------------------------------------------------------------- */
static ipt_status load_config(ipt_model *m, const char *dir, int comp, bool *found)
{
    char sub[PATH_MAX], path[PATH_MAX];
    json_t *o = NULL;
    IPT_TRY(join(m->ctx, sub, dir, comp_names[comp]));
    IPT_TRY(join(m->ctx, path, sub, "config.json"));
    *found = ipt_is_file(path);
    if (!*found)
        return IPT_OK;
    IPT_TRY(ipt_json_load(m->ctx, path, &o));
    ipt_status status = IPT_OK;
    switch (comp) {
    case IPT_COMP_UNET:
        status = ipt_config_unet(m->ctx, path, o, &m->cfg.unet);
        break;
    case IPT_COMP_VAE:
        status = ipt_config_vae(m->ctx, path, o, &m->cfg.vae);
        break;
    case IPT_COMP_TEXT:
        status = ipt_config_text(m->ctx, path, o, &m->cfg.text);
        break;
    default:
        status = ipt_config_text(m->ctx, path, o, &m->cfg.text2);
        break;
    }
    json_decref(o);
    return status;
}

static ipt_status load_scheduler(ipt_model *m, const char *dir)
{
    char path[PATH_MAX];
    IPT_TRY(join(m->ctx, path, dir, "scheduler/scheduler_config.json"));
    if (!ipt_is_file(path))
        return IPT_OK;
    json_decref(m->scheduler);
    m->scheduler = NULL;
    IPT_TRY(ipt_json_load(m->ctx, path, &m->scheduler));
    const char *type = ipt_json_str(m->scheduler, "prediction_type", "epsilon");
    if (strcmp(type, "epsilon") == 0)
        m->cfg.prediction = IPT_PRED_EPSILON;
    else if (strcmp(type, "v_prediction") == 0)
        m->cfg.prediction = IPT_PRED_V;
    else if (strcmp(type, "sample") == 0)
        m->cfg.prediction = IPT_PRED_SAMPLE;
    else
        return ipt_fail(m->ctx, IPT_ERR_UNSUPPORTED,
                        "%s: key 'prediction_type': %.50s is not supported, expected epsilon, "
                        "v_prediction or sample",
                        path, type);
    m->cfg.prediction_assumed = false;
    return IPT_OK;
}

static ipt_status load_side_files(ipt_model *m, const char *dir)
{
    static const char *const tokenizers[2] = {"tokenizer", "tokenizer_2"};
    char path[PATH_MAX];
    IPT_TRY(join(m->ctx, path, dir, "model_index.json"));
    if (ipt_is_file(path)) {
        json_decref(m->index);
        m->index = NULL;
        IPT_TRY(ipt_json_load(m->ctx, path, &m->index));
        if (ipt_json_bool(m->index, "requires_aesthetics_score", false))
            return ipt_fail(m->ctx, IPT_ERR_UNSUPPORTED,
                            "%s: this is the SDXL refiner, which is not supported", path);
        m->cfg.zero_empty_negative =
            ipt_json_bool(m->index, "force_zeros_for_empty_prompt", m->cfg.zero_empty_negative);
    }
    for (int i = 0; i < 2; i++) {
        IPT_TRY(join(m->ctx, path, dir, tokenizers[i]));
        if (!ipt_is_dir(path))
            continue;
        ipt_free(m->tokenizer[i]);
        m->tokenizer[i] = ipt_strdup(m->ctx, path);
        if (!m->tokenizer[i])
            return IPT_ERR_NOMEM;
    }
    return load_scheduler(m, dir);
}

/* SDXL's added conditions are the pooled text and six embedded numbers: nothing else fills them. */
static ipt_status check_added(const ipt_model *m)
{
    const ipt_unet_config *u = &m->cfg.unet;
    const ipt_text_config *t = &m->cfg.text2;
    int64_t pooled = t->has_projection ? t->projection_dim : t->width, each = u->add_time_dim;
    if (!u->text_time || !m->cfg.has[IPT_COMP_TEXT2] ||
        (each >= 1 && pooled >= 1 && pooled + 6 * each == u->add_in_dim))
        return IPT_OK;
    return ipt_fail(m->ctx, IPT_ERR_SHAPE,
                    "%s: the UNet's added conditions (label_emb, add_embedding) read %d values, "
                    "expected %" PRId64 " of pooled text and 6 times an embedded size",
                    m->path, (int)u->add_in_dim, pooled);
}

/* The text encoders' widths must add up to what the UNet reads. */
static ipt_status check_widths(const ipt_model *m)
{
    IPT_TRY(check_added(m));
    const ipt_model_config *c = &m->cfg;
    int32_t width = c->has[IPT_COMP_TEXT] ? c->text.width : 0;
    if (c->has[IPT_COMP_TEXT2])
        width += c->text2.width;
    for (int32_t i = 0; i < c->unet.n_level; i++) {
        bool used = c->unet.down_attn[i] || c->unet.up_attn[c->unet.n_level - 1 - i];
        bool all_there =
            c->has[IPT_COMP_TEXT] && (c->has[IPT_COMP_TEXT2] || c->arch != IPT_ARCH_SDXL);
        if (used && all_there && c->unet.cross_dim[i] != width)
            return ipt_fail(m->ctx, IPT_ERR_SHAPE,
                            "%s: the UNet reads text of width %d, the text encoder%s gives %d",
                            m->path, (int)c->unet.cross_dim[i], c->has[IPT_COMP_TEXT2] ? "s" : "",
                            (int)width);
    }
    int32_t in = c->unet.in_channels, z = c->vae.latent_channels;
    if (c->has[IPT_COMP_VAE] && in != z && in != 2 * z && in != 2 * z + 1)
        return ipt_fail(m->ctx, IPT_ERR_SHAPE,
                        "%s: the UNet reads %d channels, the VAE's latents have %d", m->path,
                        (int)in, (int)z);
    return IPT_OK;
}

static ipt_status open_folder(ipt_model *m)
{
    char sub[PATH_MAX];
    bool found = false;
    m->layout = "diffusers";
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        IPT_TRY(load_config(m, m->path, comp, &found));
        m->cfg.has[comp] = found;
        if (!found)
            continue;
        IPT_TRY(join(m->ctx, sub, m->path, comp_names[comp]));
        IPT_TRY(add_weights(m, comp, sub));
        m->src[comp].layout = IPT_LAYOUT_CANONICAL;
    }
    if (!m->cfg.has[IPT_COMP_UNET])
        return ipt_fail(
            m->ctx, IPT_ERR_MISSING,
            "%s: unet/config.json not found: expected a diffusers folder or a .safetensors file",
            m->path);
    const ipt_unet_config *u = &m->cfg.unet;
    m->cfg.arch = u->text_time ? IPT_ARCH_SDXL : u->linear_projection ? IPT_ARCH_SD2 : IPT_ARCH_SD1;
    m->cfg.zero_empty_negative = m->cfg.arch == IPT_ARCH_SDXL;
    m->cfg.prediction_assumed = true;
    IPT_TRY(load_side_files(m, m->path));
    return check_widths(m);
}

/* --- single files ----------------------------------------------------------------------------- */
static ipt_status apply_config_dir(ipt_model *m, const char *dir)
{
    ipt_model_config before = m->cfg;
    if (!ipt_is_dir(dir))
        return ipt_fail(m->ctx, IPT_ERR_IO, "%s: no such folder", dir);
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        bool found = false;
        if (before.has[comp])
            IPT_TRY(load_config(m, dir, comp, &found));
    }
    ipt_key_frame_unet(&m->cfg.unet, &m->src[IPT_COMP_UNET].frame);
    ipt_key_frame_vae(&m->cfg.vae, &m->src[IPT_COMP_VAE].frame);
    return load_side_files(m, dir);
}

static ipt_status open_single(ipt_model *m, const ipt_model_opts *opts)
{
    IPT_TRY(add_file(m, IPT_COMP_UNET, m->path));
    for (int comp = IPT_COMP_UNET + 1; comp < IPT_COMP_COUNT; comp++) {
        m->src[comp].file = m->of[comp];
        m->src[comp].file[0] = m->file[0];
        m->src[comp].n_file = 1;
    }
    IPT_TRY(ipt_probe_checkpoint(m->ctx, m->file[0], &m->cfg, m->src));
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++)
        m->src[comp].shared_file = true;
    m->layout = m->cfg.arch == IPT_ARCH_SDXL ? "sgm" : "compvis";
    if (opts && opts->config_dir)
        IPT_TRY(apply_config_dir(m, opts->config_dir));
    return check_widths(m);
}

ipt_status ipt_model_open(ipt_ctx *ctx, const char *path, const ipt_model_opts *opts,
                          ipt_model **out)
{
    ipt_model *m = ipt_alloc(ctx, sizeof *m);
    if (!m)
        return IPT_ERR_NOMEM;
    m->ctx = ctx;
    m->path = ipt_strdup(ctx, path);
    ipt_status status = IPT_ERR_NOMEM;
    if (m->path && ipt_is_dir(path) && opts && opts->config_dir)
        status = ipt_fail(ctx, IPT_ERR_ARG,
                          "%s: a folder has configurations of its own; the folder %s is for single "
                          "files",
                          path, opts->config_dir);
    else if (m->path)
        status = ipt_is_dir(path) ? open_folder(m) : open_single(m, opts);
    if (status != IPT_OK) {
        ipt_model_close(&m);
        return status;
    }
    *out = m;
    return IPT_OK;
}

void ipt_model_close(ipt_model **pm)
{
    if (!pm || !*pm)
        return;
    ipt_model *m = *pm;
    for (size_t i = 0; i < m->n_file; i++)
        ipt_safetensors_close(&m->file[i]);
    json_decref(m->index);
    json_decref(m->scheduler);
    ipt_free(m->tokenizer[0]);
    ipt_free(m->tokenizer[1]);
    ipt_free(m->path);
    ipt_free(m);
    *pm = NULL;
}

/* --- another VAE ------------------------------------------------------------------------------ */
/* config.json of an AutoencoderKL / AutoencoderTiny in `dir`. */
static ipt_status vae_config_in(ipt_ctx *ctx, const char *dir, ipt_vae_config *cfg, bool *found)
{
    char path[PATH_MAX];
    json_t *o = NULL;
    IPT_TRY(join(ctx, path, dir, "config.json"));
    *found = false;
    if (!ipt_is_file(path))
        return IPT_OK;
    IPT_TRY(ipt_json_load(ctx, path, &o));
    ipt_status status = IPT_OK;
    if (strncmp(ipt_json_str(o, "_class_name", ""), "Autoencoder", 11) == 0) {
        status = ipt_config_vae(ctx, path, o, cfg);
        *found = status == IPT_OK;
    }
    json_decref(o);
    return status;
}

static ipt_status vae_from_folder(ipt_model *m, const char *path, ipt_vae_config *cfg)
{
    char sub[PATH_MAX];
    const char *dir = path;
    bool found = false;
    IPT_TRY(join(m->ctx, sub, path, "vae"));
    if (ipt_is_dir(sub))
        dir = sub;
    IPT_TRY(vae_config_in(m->ctx, dir, cfg, &found));
    if (!found)
        return ipt_fail(m->ctx, IPT_ERR_MISSING, "%s: config.json of an AutoencoderKL not found",
                        dir);
    m->src[IPT_COMP_VAE] =
        (ipt_source){.layout = IPT_LAYOUT_CANONICAL, .file = m->of[IPT_COMP_VAE]};
    return add_weights(m, IPT_COMP_VAE, dir);
}

static bool same_shape(const ipt_vae_config *a, const ipt_vae_config *b)
{
    return a->tiny == b->tiny && a->n_level == b->n_level && a->n_layer == b->n_layer &&
           memcmp(a->channels, b->channels, sizeof a->channels) == 0;
}

static ipt_status vae_from_file(ipt_model *m, const char *path, ipt_vae_config *cfg)
{
    char dir[PATH_MAX];
    bool found = false;
    const char *slash = strrchr(path, '/');
    const ipt_vae_config *old = &m->cfg.vae;
    m->src[IPT_COMP_VAE] = (ipt_source){.file = m->of[IPT_COMP_VAE]};
    IPT_TRY(add_file(m, IPT_COMP_VAE, path));
    const ipt_safetensors *st = m->src[IPT_COMP_VAE].file[0];
    if (!ipt_probe_vae(st, cfg, &m->src[IPT_COMP_VAE]))
        return ipt_fail(m->ctx, IPT_ERR_FORMAT,
                        "%s: no VAE in this file: key 'decoder.conv_in.weight' not found among %zu",
                        path, ipt_safetensors_count(st));
    if (cfg->tiny == old->tiny && m->cfg.has[IPT_COMP_VAE]) { /* what tensors do not tell stays */
        cfg->scaling_factor = old->scaling_factor;
        cfg->shift_factor = old->shift_factor;
        cfg->sample_size = old->sample_size;
        if (same_shape(cfg, old)) {
            cfg->norm_groups = old->norm_groups;
            cfg->act = old->act;
        }
    } else if (!cfg->tiny && m->cfg.arch == IPT_ARCH_SDXL) {
        cfg->scaling_factor = 0.13025f;
        cfg->sample_size = 1024;
    }
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    if (m->src[IPT_COMP_VAE].layout == IPT_LAYOUT_CANONICAL)
        return vae_config_in(m->ctx, dir, cfg, &found);
    m->src[IPT_COMP_VAE].shared_file = m->src[IPT_COMP_VAE].prefix[0] != '\0';
    return IPT_OK;
}

/* Points the model's VAE at `path`; on failure its files stay opened (the caller drops them). */
static ipt_status take_vae(ipt_model *m, const char *path, ipt_vae_config *cfg)
{
    IPT_TRY(ipt_is_dir(path) ? vae_from_folder(m, path, cfg) : vae_from_file(m, path, cfg));
    if (m->cfg.has[IPT_COMP_UNET] && cfg->latent_channels != m->cfg.unet.out_channels)
        return ipt_fail(m->ctx, IPT_ERR_SHAPE, "%s: found %d latent channels, expected %d", path,
                        (int)cfg->latent_channels, (int)m->cfg.unet.out_channels);
    ipt_key_frame_vae(cfg, &m->src[IPT_COMP_VAE].frame);
    m->cfg.vae = *cfg;
    m->cfg.has[IPT_COMP_VAE] = true;
    return IPT_OK;
}

ipt_status ipt_model_set_vae(ipt_model *m, const char *path)
{
    ipt_source old = m->src[IPT_COMP_VAE];
    const ipt_safetensors *old_files[MAX_FILES];
    ipt_vae_config cfg = {0};
    size_t n_file = m->n_file;
    memcpy(old_files, m->of[IPT_COMP_VAE], sizeof old_files);
    ipt_status status = take_vae(m, path, &cfg);
    if (status == IPT_OK)
        return IPT_OK;
    m->src[IPT_COMP_VAE] = old;
    memcpy(m->of[IPT_COMP_VAE], old_files, sizeof old_files);
    while (m->n_file > n_file)
        ipt_safetensors_close(&m->file[--m->n_file]);
    return status;
}

ipt_status ipt_model_open_vae(ipt_ctx *ctx, const char *path, ipt_model **out)
{
    ipt_vae_config cfg = {0};
    ipt_model *m = ipt_alloc(ctx, sizeof *m);
    if (!m)
        return IPT_ERR_NOMEM;
    m->ctx = ctx;
    m->layout = "vae";
    m->path = ipt_strdup(ctx, path);
    ipt_status status = m->path ? take_vae(m, path, &cfg) : IPT_ERR_NOMEM;
    if (status != IPT_OK) {
        ipt_model_close(&m);
        return status;
    }
    *out = m;
    return IPT_OK;
}

/* --- views ------------------------------------------------------------------------------------ */
const ipt_model_config *ipt_model_get_config(const ipt_model *m) { return &m->cfg; }
const ipt_source *ipt_model_source(const ipt_model *m, int comp) { return &m->src[comp]; }
const char *ipt_model_path(const ipt_model *m) { return m->path; }
const char *ipt_model_layout(const ipt_model *m) { return m->layout; }
const json_t *ipt_model_scheduler(const ipt_model *m) { return m->scheduler; }
const json_t *ipt_model_index(const ipt_model *m) { return m->index; }
const char *ipt_model_tokenizer(const ipt_model *m, int comp)
{
    return m->tokenizer[comp == IPT_COMP_TEXT2];
}
size_t ipt_model_n_files(const ipt_model *m, int comp)
{
    return m->cfg.has[comp] ? m->src[comp].n_file : 0;
}

const char *ipt_model_file(const ipt_model *m, int comp, size_t i)
{
    return ipt_safetensors_path(m->src[comp].file[i]);
}

const char *ipt_model_dtype(const ipt_model *m, int comp)
{
    size_t count[IPT_ST_COUNT] = {0}, best = IPT_ST_F32;
    const ipt_source *s = &m->src[comp];
    for (size_t f = 0; m->cfg.has[comp] && f < s->n_file; f++) {
        for (size_t i = 0; i < ipt_safetensors_count(s->file[f]); i++) {
            const ipt_st_tensor *t = ipt_safetensors_at(s->file[f], i);
            if (strncmp(t->name, s->prefix, strlen(s->prefix)) == 0)
                count[t->dtype] += t->count;
        }
    }
    for (size_t k = 0; k < IPT_ST_COUNT; k++)
        best = count[k] > count[best] ? k : best;
    return ipt_st_dtype_name((ipt_st_dtype)best);
}

ipt_status ipt_model_weights(ipt_model *m, int comp, struct ipt_gpu *gpu, ipt_dtype precision,
                             const char *prefix, ipt_weights **out)
{
    if (!m->cfg.has[comp])
        return ipt_fail(m->ctx, IPT_ERR_MISSING, "%s: this model has no %s", m->path,
                        comp_names[comp]);
    return ipt_store_create(m->ctx, &m->src[comp], gpu, precision, prefix, out);
}

/* --- completeness ----------------------------------------------------------------------------- */
/* Keys that published files carry and nothing needs. */
static bool is_harmless(const ipt_model *m, int comp, const char *key)
{
    static const char *const anywhere[] = {"position_ids", "logit_scale", "text_projection",
                                           "num_batches_tracked", "_scale"};
    static const char *const starts[] = {"model_ema.",
                                         "alphas_cumprod",
                                         "betas",
                                         "log_one_minus_alphas_cumprod",
                                         "posterior_",
                                         "sqrt_",
                                         "scale_factor",
                                         "lvlb_weights",
                                         "logvar",
                                         "global_step",
                                         "denoiser.",
                                         "v_pred",
                                         "ztsnr",
                                         "embedding_manager.",
                                         "first_stage_model.loss.",
                                         "loss.",
                                         "state_dict",
                                         "cond_stage_model.logit",
                                         "model_ema",
                                         "edm_mean",
                                         "edm_std",
                                         "encoder.layers."};
    char last[64];
    for (size_t i = 0; i < IPT_COUNT(anywhere); i++) {
        if (ends_with(key, anywhere[i]) || (i == 2 && strstr(key, anywhere[i])))
            return true;
    }
    for (size_t i = 0; i < IPT_COUNT(starts); i++) {
        /* "encoder.layers." only beside a tiny decoder: previews never encode. */
        if (strncmp(key, starts[i], strlen(starts[i])) == 0 &&
            (i + 1 < IPT_COUNT(starts) || (comp == IPT_COMP_VAE && m->cfg.vae.tiny)))
            return true;
    }
    if (m->src[comp].layout != IPT_LAYOUT_OPEN_CLIP)
        return false;
    snprintf(last, sizeof last, "resblocks.%d.",
             comp == IPT_COMP_TEXT ? (int)m->cfg.text.n_layer : (int)m->cfg.text2.n_layer);
    return strstr(key, last) != NULL; /* the last layer of SD 2's text encoder is never read */
}

/* Keys of the file that this component should know: its prefix; the UNet also answers for those
 * that belong to nobody. */
static bool is_ours(const ipt_model *m, int comp, const ipt_source *s, const char *key)
{
    if (!s->shared_file)
        return true;
    for (int c = 0; c < IPT_COMP_COUNT; c++) {
        const char *p = m->src[c].prefix;
        if (m->cfg.has[c] && m->src[c].n_file && m->src[c].file[0] == s->file[0] && p[0] &&
            strncmp(key, p, strlen(p)) == 0)
            return c == comp;
    }
    /* A VAE replaced by another file leaves its keys behind. */
    return comp == IPT_COMP_UNET && strncmp(key, "first_stage_model.", 18) != 0;
}

static bool misshaped(ipt_check *c, const ipt_want *w, const ipt_found *f, ipt_misshaped *out)
{
    out->name = ipt_arena_strdup(&c->arena, w->name);
    out->key = f->tensor->name;
    out->file = ipt_safetensors_path(f->file);
    ipt_st_shape_text(f->tensor, out->found, sizeof out->found);
    ipt_file_shape_text(&w->shape, out->expected, sizeof out->expected);
    return out->name != NULL;
}

static ipt_status list_unclaimed(const ipt_model *m, int comp, const ipt_index *claimed,
                                 ipt_check *c)
{
    const ipt_source *s = &m->src[comp];
    size_t total = 0;
    uint32_t dummy = 0;
    for (size_t f = 0; f < s->n_file; f++)
        total += ipt_safetensors_count(s->file[f]);
    c->unclaimed = ipt_arena_alloc(&c->arena, total * sizeof *c->unclaimed);
    if (!c->unclaimed)
        return IPT_ERR_NOMEM;
    for (size_t f = 0; f < s->n_file; f++) {
        for (size_t i = 0; i < ipt_safetensors_count(s->file[f]); i++) {
            const char *key = ipt_safetensors_at(s->file[f], i)->name;
            if (is_ours(m, comp, s, key) && !ipt_index_get(claimed, key, &dummy) &&
                !is_harmless(m, comp, key))
                c->unclaimed[c->n_unclaimed++] = key;
        }
    }
    return IPT_OK;
}

ipt_status ipt_model_check(const ipt_model *m, int comp, const ipt_want *want, size_t n,
                           ipt_check *out)
{
    ipt_check c = {0};
    ipt_index claimed = {0};
    ipt_status status = IPT_OK;
    bool added = false;
    ipt_arena_init(&c.arena, m->ctx);
    IPT_TRY(ipt_index_init(&claimed, m->ctx, n));
    c.missing = ipt_arena_alloc(&c.arena, n * sizeof *c.missing);
    c.misshaped = ipt_arena_alloc(&c.arena, n * sizeof *c.misshaped);
    if (!c.missing || !c.misshaped)
        status = IPT_ERR_NOMEM;
    for (size_t i = 0; i < n && status == IPT_OK; i++) {
        ipt_found f = {0};
        if (!m->cfg.has[comp] || !ipt_source_find(&m->src[comp], want[i].name, &f)) {
            c.missing[c.n_missing] = ipt_arena_strdup(&c.arena, want[i].name);
            status = c.missing[c.n_missing++] ? IPT_OK : IPT_ERR_NOMEM;
            continue;
        }
        status = ipt_index_put(&claimed, f.tensor->name, 0, &added);
        if (status == IPT_OK && ipt_found_fits(&f, &want[i].shape))
            c.n_bound++;
        else if (status == IPT_OK)
            status =
                misshaped(&c, &want[i], &f, &c.misshaped[c.n_misshaped++]) ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (status == IPT_OK && m->cfg.has[comp])
        status = list_unclaimed(m, comp, &claimed, &c);
    ipt_index_finish(&claimed);
    if (status != IPT_OK) {
        ipt_arena_finish(&c.arena);
        return status;
    }
    *out = c;
    return IPT_OK;
}

ipt_status ipt_check_status(const ipt_model *m, int comp, const ipt_check *c)
{
    const char *file = ipt_model_n_files(m, comp) ? ipt_model_file(m, comp, 0) : m->path;
    if (c->n_misshaped)
        return ipt_fail(m->ctx, IPT_ERR_SHAPE,
                        "%s: key '%s': found shape %s, expected %s (%zu such of %s)",
                        c->misshaped[0].file, c->misshaped[0].key, c->misshaped[0].found,
                        c->misshaped[0].expected, c->n_misshaped, comp_names[comp]);
    if (c->n_missing)
        return ipt_fail(m->ctx, IPT_ERR_MISSING,
                        "%s: weight '%s' of %s is missing (%zu missing, %zu found)", file,
                        c->missing[0], comp_names[comp], c->n_missing, c->n_bound);
    return IPT_OK;
}

void ipt_check_finish(ipt_check *c)
{
    ipt_arena_finish(&c->arena);
    *c = (ipt_check){0};
}
