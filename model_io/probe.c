/* model_io/probe.c - what a single checkpoint file holds, found by looking for names and shapes.
 *
 * Heads, norm groups and activations leave no trace in tensors: they are those of the published
 * models unless the caller names a folder of configs. */
#include "model_io/internal.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* Tensor named prefix + printf(form); NULL when absent. */
static const ipt_st_tensor *at(const ipt_safetensors *st, const char *prefix, const char *form, ...)
    IPT_PRINTF(3, 4);
static const ipt_st_tensor *at(const ipt_safetensors *st, const char *prefix, const char *form, ...)
{
    char name[IPT_KEY_MAX];
    size_t at_prefix = strlen(prefix);
    if (at_prefix >= sizeof name)
        return NULL;
    memcpy(name, prefix, at_prefix + 1);
    va_list ap;
    va_start(ap, form);
    int n = vsnprintf(name + at_prefix, sizeof name - at_prefix, form, ap);
    va_end(ap);
    if (n < 0 || (size_t)n >= sizeof name - at_prefix)
        return NULL;
    return ipt_safetensors_find(st, name);
}

/* i-th dimension as a sane size; 0 when there is none. */
static int32_t dim(const ipt_st_tensor *t, int i)
{
    return t && i < t->rank && t->dim[i] > 0 && t->dim[i] < 1 << 20 ? (int32_t)t->dim[i] : 0;
}

static int32_t groups_for(const int32_t *channels, int32_t n)
{
    for (int32_t g = 32; g > 1; g--) {
        bool ok = true;
        for (int32_t i = 0; i < n; i++)
            ok = ok && channels[i] % g == 0;
        if (ok)
            return g;
    }
    return 1;
}

/* --- UNet ------------------------------------------------------------------------------------- */
typedef struct walk {
    ipt_ctx *ctx;
    const ipt_safetensors *st;
    const char *prefix;
    ipt_unet_config *c;
} walk;

static ipt_status odd(const walk *w, const char *block, int32_t i)
{
    return ipt_fail(w->ctx, IPT_ERR_UNSUPPORTED,
                    "%s: key '%s%s.%d': this UNet's structure is not that of SD 1, SD 2 or SDXL",
                    ipt_safetensors_path(w->st), w->prefix, block, (int)i);
}

/* Transformer layers of block i of `block` ("input_blocks"); 0: no attention. */
static int32_t depth_of(const walk *w, const char *block, int32_t i)
{
    int32_t n = 0;
    while (n < 256 && at(w->st, w->prefix, "%s.%d.1.transformer_blocks.%d.attn1.to_q.weight", block,
                         (int)i, (int)n))
        n++;
    return n;
}

static ipt_status walk_down(const walk *w)
{
    ipt_unet_config *c = w->c;
    int32_t level = 0;
    for (int32_t i = 1; i < 256; i++) {
        if (at(w->st, w->prefix, "input_blocks.%d.0.op.weight", (int)i)) {
            if (++level >= IPT_MAX_LEVEL)
                return odd(w, "input_blocks", i);
            continue;
        }
        const ipt_st_tensor *conv =
            at(w->st, w->prefix, "input_blocks.%d.0.out_layers.3.weight", (int)i);
        if (!conv)
            break;
        int32_t depth = depth_of(w, "input_blocks", i);
        if (c->n_layer[level] > 0 &&
            (depth != c->depth[level] || dim(conv, 0) != c->channels[level]))
            return odd(w, "input_blocks", i);
        c->channels[level] = dim(conv, 0);
        c->depth[level] = depth;
        c->down_attn[level] = depth > 0;
        c->n_layer[level]++;
        if (depth == 0)
            continue;
        const ipt_st_tensor *proj =
            at(w->st, w->prefix, "input_blocks.%d.1.proj_in.weight", (int)i);
        const ipt_st_tensor *k = at(
            w->st, w->prefix, "input_blocks.%d.1.transformer_blocks.0.attn2.to_k.weight", (int)i);
        c->linear_projection = proj && proj->rank == 2;
        c->cross_dim[level] = dim(k, 1);
        if (c->cross_dim[level] == 0)
            return odd(w, "input_blocks", i);
    }
    c->n_level = level + 1;
    for (int32_t i = 0; i < c->n_level; i++) {
        if (c->n_layer[i] == 0 || c->channels[i] == 0)
            return odd(w, "input_blocks", i);
    }
    return IPT_OK;
}

static ipt_status walk_rest(const walk *w)
{
    ipt_unet_config *c = w->c;
    int32_t n = c->n_level, index = 0, mid = 0;
    while (mid < 256 &&
           at(w->st, w->prefix, "middle_block.1.transformer_blocks.%d.attn1.to_q.weight", (int)mid))
        mid++;
    c->has_mid = at(w->st, w->prefix, "middle_block.0.in_layers.0.weight") != NULL;
    c->mid_attn = mid > 0;
    if (c->mid_attn && c->down_attn[n - 1] && mid != c->depth[n - 1])
        return odd(w, "middle_block", 1);
    if (c->mid_attn)
        c->depth[n - 1] = mid;
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j < c->n_layer[n - 1 - i] + 1; j++, index++) {
            int32_t depth = depth_of(w, "output_blocks", index);
            if (!at(w->st, w->prefix, "output_blocks.%d.0.in_layers.0.weight", (int)index) ||
                (j > 0 && depth != c->up_depth[i]))
                return odd(w, "output_blocks", index);
            c->up_depth[i] = depth;
            c->up_attn[i] = depth > 0;
        }
    }
    int32_t cross = 0;
    const ipt_st_tensor *k =
        at(w->st, w->prefix, "middle_block.1.transformer_blocks.0.attn2.to_k.weight");
    for (int32_t i = 0; i < n; i++)
        cross = c->cross_dim[i] ? c->cross_dim[i] : cross;
    cross = cross ? cross : dim(k, 1);
    for (int32_t i = 0; i < n; i++) {
        c->cross_dim[i] = c->cross_dim[i] ? c->cross_dim[i] : cross;
        c->depth[i] = c->depth[i] ? c->depth[i] : 1;
        c->up_depth[i] = c->up_depth[i] ? c->up_depth[i] : 1;
    }
    return IPT_OK;
}

static ipt_status probe_unet(ipt_ctx *ctx, const ipt_safetensors *st, const char *prefix,
                             ipt_unet_config *out)
{
    ipt_unet_config c = ipt_unet_config_sd15();
    memset(c.channels, 0, sizeof c.channels);
    memset(c.n_layer, 0, sizeof c.n_layer);
    memset(c.depth, 0, sizeof c.depth);
    memset(c.up_depth, 0, sizeof c.up_depth);
    memset(c.cross_dim, 0, sizeof c.cross_dim);
    memset(c.down_attn, 0, sizeof c.down_attn);
    memset(c.up_attn, 0, sizeof c.up_attn);
    int32_t resnets = 0, transformers = 0;
    walk w = {ctx, st, prefix, &c};
    IPT_TRY(walk_down(&w));
    IPT_TRY(walk_rest(&w));
    const ipt_st_tensor *conv_in = at(st, prefix, "input_blocks.0.0.weight"),
                        *conv_out = at(st, prefix, "out.2.weight");
    const ipt_st_tensor *label = at(st, prefix, "label_emb.0.0.weight"),
                        *time = at(st, prefix, "time_embed.0.weight");
    c.in_channels = dim(conv_in, 1);
    c.out_channels = dim(conv_out, 0);
    c.conv_in_kernel = dim(conv_in, 2);
    c.conv_out_kernel = dim(conv_out, 2);
    c.time_embed_dim = dim(time, 0);
    c.time_cond_dim = dim(at(st, prefix, "time_embed.cond_proj.weight"), 1);
    c.text_time = label != NULL;
    c.add_in_dim = dim(label, 1);
    if (!c.in_channels || !c.out_channels || !c.conv_in_kernel || !c.conv_out_kernel ||
        !c.time_embed_dim || (label && !c.add_in_dim))
        return odd(&w, "input_blocks", 0);
    ipt_unet_count(&c, &resnets, &transformers);
    if (resnets > IPT_MAX_RESNET || transformers > IPT_MAX_TRANSFORMER)
        return ipt_fail(
            ctx, IPT_ERR_UNSUPPORTED,
            "%s: a UNet of %d resnets and %d transformer layers, expected at most %d and "
            "%d",
            ipt_safetensors_path(st), (int)resnets, (int)transformers, IPT_MAX_RESNET,
            IPT_MAX_TRANSFORMER);
    c.norm_groups = groups_for(c.channels, c.n_level);
    *out = c;
    return IPT_OK;
}

/* SD 1: 8 heads; SD 2 and SDXL: heads of 64 channels. */
static void guess_heads(ipt_unet_config *c, ipt_arch arch)
{
    for (int32_t i = 0; i < c->n_level; i++) {
        int32_t h = arch == IPT_ARCH_SD1 ? 8 : c->channels[i] / 64;
        h = h < 1 ? 1 : h;
        while (c->channels[i] % h != 0)
            h--;
        c->heads[i] = h;
    }
}

/* --- text encoders ---------------------------------------------------------------------------- */
static bool probe_open_clip(const ipt_safetensors *st, const char *prefix, ipt_text_config *c)
{
    const ipt_st_tensor *tok = at(st, prefix, "token_embedding.weight"),
                        *pos = at(st, prefix, "positional_embedding");
    if (!tok)
        return false;
    *c = ipt_text_config_clip_h();
    c->n_layer = 0;
    while (c->n_layer < 256 &&
           at(st, prefix, "transformer.resblocks.%d.ln_1.weight", (int)c->n_layer))
        c->n_layer++;
    c->vocab = dim(tok, 0);
    c->width = dim(tok, 1);
    c->max_tokens = dim(pos, 0);
    c->mlp_width = dim(at(st, prefix, "transformer.resblocks.0.mlp.c_fc.weight"), 0);
    const ipt_st_tensor *plain = at(st, prefix, "text_projection.weight"),
                        *turned = at(st, prefix, "text_projection");
    c->has_projection = plain || turned;
    c->projection_dim = turned ? dim(turned, 1) : plain ? dim(plain, 0) : c->width;
    return true;
}

static bool probe_hf_clip(const ipt_safetensors *st, const char *prefix, ipt_text_config *c)
{
    char inner[IPT_MAX_PREFIX];
    snprintf(inner, sizeof inner, "%stext_model.", prefix);
    if (!at(st, inner, "embeddings.token_embedding.weight"))
        snprintf(inner, sizeof inner, "%s", prefix);
    const ipt_st_tensor *tok = at(st, inner, "embeddings.token_embedding.weight");
    if (!tok)
        return false;
    *c = ipt_text_config_clip_l();
    c->n_layer = 0;
    while (c->n_layer < 256 &&
           at(st, inner, "encoder.layers.%d.layer_norm1.weight", (int)c->n_layer))
        c->n_layer++;
    c->vocab = dim(tok, 0);
    c->width = dim(tok, 1);
    c->max_tokens = dim(at(st, inner, "embeddings.position_embedding.weight"), 0);
    c->mlp_width = dim(at(st, inner, "encoder.layers.0.mlp.fc1.weight"), 0);
    const ipt_st_tensor *proj = at(st, prefix, "text_projection.weight");
    c->has_projection = proj != NULL;
    c->projection_dim = proj ? dim(proj, 0) : c->width;
    if (c->width >= 1024) /* OpenCLIP models converted to transformers' names */
        c->act = IPT_ACT_GELU;
    return true;
}

static bool probe_text(const ipt_safetensors *st, const char *const *prefix, ipt_text_config *c,
                       ipt_source *src)
{
    for (; *prefix; prefix++) {
        bool open_clip = probe_open_clip(st, *prefix, c);
        if (!open_clip && !probe_hf_clip(st, *prefix, c))
            continue;
        src->layout = open_clip ? IPT_LAYOUT_OPEN_CLIP : IPT_LAYOUT_CANONICAL;
        snprintf(src->prefix, sizeof src->prefix, "%s", *prefix);
        c->heads = c->width / 64 > 0 ? c->width / 64 : 1;
        while (c->width % c->heads != 0)
            c->heads--;
        return c->n_layer > 0 && c->vocab > 0 && c->width > 0 && c->max_tokens > 2 &&
               c->mlp_width > 0;
    }
    return false;
}

/* --- VAE -------------------------------------------------------------------------------------- */
static int32_t vae_levels(const ipt_safetensors *st, const char *prefix, const char *form,
                          ipt_vae_config *c)
{
    char name[128];
    int32_t n = 0;
    for (; n < IPT_MAX_LEVEL; n++) {
        int32_t j = 0;
        for (; j < 64; j++) {
            snprintf(name, sizeof name, "%s.%d.%s.%d.conv2.weight", form, (int)n,
                     strstr(form, "blocks") ? "resnets" : "block", (int)j);
            const ipt_st_tensor *t = at(st, prefix, "%s", name);
            if (!t)
                break;
            c->channels[n] = dim(t, 0);
        }
        if (j == 0)
            break;
        c->n_layer = j;
    }
    return n;
}

static void reverse(int32_t *v, int32_t n)
{
    for (int32_t i = 0; i < n / 2; i++) {
        int32_t t = v[i];
        v[i] = v[n - 1 - i];
        v[n - 1 - i] = t;
    }
}

static bool probe_tiny_vae(const ipt_safetensors *st, ipt_vae_config *c, ipt_source *src)
{
    bool named = at(st, "", "decoder.layers.0.weight") != NULL;
    const char *prefix = named ? "decoder.layers." : "";
    int first = named ? 0 : 1;
    const ipt_st_tensor *conv = at(st, prefix, "%d.weight", first);
    if (!conv || !at(st, prefix, "%d.conv.0.weight", first + 2) || conv->rank != 4)
        return false;
    *c = (ipt_vae_config){.tiny = true,
                          .in_channels = 3,
                          .out_channels = 3,
                          .latent_channels = dim(conv, 1),
                          .n_level = 4,
                          .n_layer = 3,
                          .norm_groups = 1,
                          .act = IPT_ACT_RELU,
                          .scaling_factor = 1};
    for (int i = 0; i < 4; i++)
        c->channels[i] = dim(conv, 0);
    src->layout = named ? IPT_LAYOUT_CANONICAL : IPT_LAYOUT_TAESD;
    src->prefix[0] = '\0';
    return true;
}

bool ipt_probe_vae(const ipt_safetensors *st, ipt_vae_config *out, ipt_source *src)
{
    static const char *const prefixes[] = {"first_stage_model.", "", "vae."};
    for (size_t i = 0; i < IPT_COUNT(prefixes); i++) {
        const char *p = prefixes[i];
        const ipt_st_tensor *conv = at(st, p, "decoder.conv_in.weight");
        bool ldm = at(st, p, "decoder.mid.block_1.conv1.weight") != NULL;
        if (!conv || (!ldm && !at(st, p, "decoder.mid_block.resnets.0.conv1.weight")))
            continue;
        ipt_vae_config c = ipt_vae_config_sd();
        c.n_level = vae_levels(st, p, ldm ? "encoder.down" : "encoder.down_blocks", &c);
        if (c.n_level == 0) { /* a decoder alone */
            c.n_level = vae_levels(st, p, ldm ? "decoder.up" : "decoder.up_blocks", &c);
            c.n_layer--;
            if (!ldm)
                reverse(c.channels, c.n_level);
        }
        c.latent_channels = dim(conv, 1);
        c.in_channels = dim(at(st, p, "encoder.conv_in.weight"), 1);
        c.out_channels = dim(at(st, p, "decoder.conv_out.weight"), 0);
        c.in_channels = c.in_channels ? c.in_channels : 3;
        c.has_quant_conv = at(st, p, "quant_conv.weight") != NULL;
        c.has_post_quant_conv = at(st, p, "post_quant_conv.weight") != NULL;
        c.mid_attn = at(st, p,
                        ldm ? "decoder.mid.attn_1.norm.weight"
                            : "decoder.mid_block.attentions.0.group_norm.weight") != NULL;
        if (c.n_level == 0 || c.n_layer < 1 || !c.latent_channels || !c.out_channels)
            return false;
        for (int32_t k = 0; k < c.n_level; k++) {
            if (c.channels[k] == 0)
                return false;
        }
        c.norm_groups = groups_for(c.channels, c.n_level);
        *out = c;
        src->layout = ldm ? IPT_LAYOUT_LDM_VAE : IPT_LAYOUT_CANONICAL;
        snprintf(src->prefix, sizeof src->prefix, "%s", p);
        ipt_key_frame_vae(&c, &src->frame);
        return true;
    }
    return probe_tiny_vae(st, out, src);
}

/* --- the rest --------------------------------------------------------------------------------- */
/* A side file NAME.yaml in CompVis form that asks for v-prediction. */
static bool yaml_says_v(ipt_ctx *ctx, const char *path)
{
    char name[4096], *text = NULL;
    size_t n = strlen(path), size = 0;
    const char *dot = strrchr(path, '.');
    size_t stem = dot && !strchr(dot, '/') ? (size_t)(dot - path) : n;
    if (stem + 6 > sizeof name)
        return false;
    memcpy(name, path, stem);
    memcpy(name + stem, ".yaml", 6);
    if (!ipt_is_file(name) || ipt_file_read(ctx, name, 1 << 20, &text, &size) != IPT_OK)
        return false;
    const char *p = strstr(text, "parameterization:");
    bool v = false;
    for (p = p ? p + 17 : NULL; p && *p && *p != '\n'; p++)
        v = v || *p == 'v';
    ipt_free(text);
    return v;
}

static void probe_prediction(ipt_ctx *ctx, const ipt_safetensors *st, ipt_model_config *cfg)
{
    const char *path = ipt_safetensors_path(st),
               *type = ipt_safetensors_meta(st, "modelspec.prediction_type");
    const char *arch = ipt_safetensors_meta(st, "modelspec.architecture");
    const ipt_st_tensor *step = ipt_safetensors_find(st, "global_step");
    cfg->zero_snr = ipt_safetensors_find(st, "ztsnr") != NULL;
    if (type) {
        cfg->prediction = strcmp(type, "v") == 0 || strcmp(type, "v_prediction") == 0
                              ? IPT_PRED_V
                              : IPT_PRED_EPSILON;
    } else if (ipt_safetensors_find(st, "v_pred") || (arch && strstr(arch, "768-v")) ||
               yaml_says_v(ctx, path)) {
        cfg->prediction = IPT_PRED_V;
    } else if (cfg->arch == IPT_ARCH_SD2) {
        /* diffusers' rule: SD 2.0-base and 2.1-base carry their step count, all others are v
         * models. */
        bool base = step && step->count == 1 && ipt_st_get(step, 0) >= 874999.5f &&
                    ipt_st_get(step, 0) < 875000.5f;
        cfg->prediction = base || (arch && strstr(arch, "v2-512")) ? IPT_PRED_EPSILON : IPT_PRED_V;
        cfg->prediction_assumed = cfg->prediction == IPT_PRED_V;
    } else {
        cfg->prediction = IPT_PRED_EPSILON;
        cfg->prediction_assumed = true;
    }
    if (cfg->arch == IPT_ARCH_SD2 && cfg->prediction_assumed)
        ipt_log(ctx, IPT_LOG_INFO, "%s: an SD 2 file that does not say what it predicts: v assumed",
                path);
}

/* One line for a file without a CompVis UNet. */
static ipt_status not_a_checkpoint(ipt_ctx *ctx, const ipt_safetensors *st)
{
    static const struct {
        const char *in_key, *what;
    } kinds[] = {
        {"double_blocks.", "a FLUX model, which is not supported"},
        {"joint_blocks.", "an SD 3 model, which is not supported"},
        {"lora_unet_", "an adapter (LoRA), expected a checkpoint"},
        {"lora_te", "an adapter (LoRA), expected a checkpoint"},
        {".lora", "an adapter (LoRA), expected a checkpoint"},
        {"_lora.", "an adapter (LoRA), expected a checkpoint"},
        {"unet:0:", "an adapter (LoRA), expected a checkpoint"},
        {"control_model.", "a ControlNet, expected a checkpoint"},
        {"decoder.mid", "a VAE alone, expected a checkpoint"},
        {"first_stage_model.", "a VAE alone, expected a checkpoint"},
        {"down_blocks.0.resnets",
         "one part of a diffusers model: give the folder that has model_index.json"},
        {"text_model.", "a text encoder alone: give the folder that has model_index.json"},
    };
    const char *path = ipt_safetensors_path(st);
    size_t n = ipt_safetensors_count(st), best = IPT_COUNT(kinds);
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < best; k++) {
            if (strstr(ipt_safetensors_at(st, i)->name, kinds[k].in_key))
                best = k;
        }
    }
    if (best < IPT_COUNT(kinds))
        return ipt_fail(ctx, best < 2 ? IPT_ERR_UNSUPPORTED : IPT_ERR_FORMAT, "%s: this is %s",
                        path, kinds[best].what);
    return ipt_fail(ctx, IPT_ERR_MISSING,
                    "%s: no Stable Diffusion UNet in this file: key "
                    "'model.diffusion_model.input_blocks.0.0.weight' not found among %zu",
                    path, n);
}

static void finish_arch(const ipt_safetensors *st, const char *prefix, ipt_model_config *cfg)
{
    ipt_unet_config *u = &cfg->unet;
    bool open_clip = at(st, "cond_stage_model.model.", "token_embedding.weight") != NULL;
    (void)prefix;
    cfg->arch = u->text_time                                                   ? IPT_ARCH_SDXL
                : open_clip || u->linear_projection || u->cross_dim[0] == 1024 ? IPT_ARCH_SD2
                                                                               : IPT_ARCH_SD1;
    guess_heads(u, cfg->arch);
    u->upcast_attention = cfg->arch == IPT_ARCH_SD2;
    u->sample_size = cfg->arch == IPT_ARCH_SDXL ? 128 : 64;
    cfg->zero_empty_negative = cfg->arch == IPT_ARCH_SDXL;
}

ipt_status ipt_probe_checkpoint(ipt_ctx *ctx, const ipt_safetensors *st, ipt_model_config *cfg,
                                ipt_source *src)
{
    static const char *const unet_prefix[] = {"model.diffusion_model.", "diffusion_model.", ""};
    static const char *const text_sd[] = {"cond_stage_model.transformer.",
                                          "cond_stage_model.model.", NULL};
    static const char *const text_xl[] = {"conditioner.embedders.0.transformer.", NULL};
    static const char *const text2_xl[] = {"conditioner.embedders.1.model.",
                                           "conditioner.embedders.1.transformer.", NULL};
    const char *prefix = NULL;
    for (size_t i = 0; i < IPT_COUNT(unet_prefix) && !prefix; i++) {
        if (at(st, unet_prefix[i], "input_blocks.0.0.weight") &&
            at(st, unet_prefix[i], "output_blocks.0.0.in_layers.0.weight"))
            prefix = unet_prefix[i];
    }
    if (!prefix)
        return not_a_checkpoint(ctx, st);
    if (ipt_safetensors_find(st, "scaled_fp8"))
        return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                        "%s: key 'scaled_fp8': fp8 weights with separate scales are not supported",
                        ipt_safetensors_path(st));
    *cfg = (ipt_model_config){.arch = IPT_ARCH_UNKNOWN};
    IPT_TRY(probe_unet(ctx, st, prefix, &cfg->unet));
    finish_arch(st, prefix, cfg);
    bool xl = cfg->arch == IPT_ARCH_SDXL;
    if (xl && at(st, "conditioner.embedders.0.model.", "token_embedding.weight"))
        return ipt_fail(
            ctx, IPT_ERR_UNSUPPORTED,
            "%s: this is the SDXL refiner, which is not supported; expected a base model",
            ipt_safetensors_path(st));
    cfg->has[IPT_COMP_UNET] = true;
    src[IPT_COMP_UNET].layout = IPT_LAYOUT_LDM_UNET;
    snprintf(src[IPT_COMP_UNET].prefix, IPT_MAX_PREFIX, "%s", prefix);
    ipt_key_frame_unet(&cfg->unet, &src[IPT_COMP_UNET].frame);
    cfg->has[IPT_COMP_TEXT] =
        probe_text(st, xl ? text_xl : text_sd, &cfg->text, &src[IPT_COMP_TEXT]);
    cfg->text.has_projection = false;
    if (cfg->arch == IPT_ARCH_SD2 && src[IPT_COMP_TEXT].layout == IPT_LAYOUT_OPEN_CLIP &&
        cfg->text.n_layer > 1)
        cfg->text.n_layer--; /* SD 2 reads the last layer but one; diffusers' configs leave the last
                                out */
    cfg->has[IPT_COMP_TEXT2] = xl && probe_text(st, text2_xl, &cfg->text2, &src[IPT_COMP_TEXT2]);
    cfg->unet.add_time_dim = xl ? 256 : 0;
    if (cfg->has[IPT_COMP_TEXT2])
        cfg->unet.add_time_dim = (cfg->unet.add_in_dim - cfg->text2.projection_dim) / 6;
    cfg->has[IPT_COMP_VAE] = ipt_probe_vae(st, &cfg->vae, &src[IPT_COMP_VAE]);
    if (cfg->has[IPT_COMP_VAE] && !cfg->vae.tiny) {
        cfg->vae.scaling_factor = xl ? 0.13025f : 0.18215f;
        cfg->vae.sample_size = xl ? 1024 : 512;
    }
    probe_prediction(ctx, st, cfg);
    if (cfg->arch == IPT_ARCH_SD2 && cfg->prediction == IPT_PRED_V)
        cfg->unet.sample_size = 96;
    return IPT_OK;
}
