/* model_io/adapter_fit.c - what of an adapter file fits a model, what does not, for which model it
 * was made by its keys, and which of its values are no numbers.
 *
 * Sources of the names: kohya-ss/sd-scripts and musubi-tuner, diffusers' loaders, ComfyUI. */
#include "model_io/adapter.h"

#include <math.h>
#include <string.h>

enum { MAX_GROUPS = 12 };

/* --- made for ----------------------------------------------------------------------------------
 */
/* Widths of what cross-attention reads tell the models with UNets apart. */
static const char *by_width(const ipt_st_tensor *t)
{
    static const struct {
        int64_t width;
        const char *name;
    } widths[] = {{768, "SD 1.x"}, {1024, "SD 2.x"}, {2048, "SDXL"}, {1280, "SDXL's refiner"}};
    bool is_to_k = strstr(t->name, "attn2_to_k") || strstr(t->name, "attn2.to_k") ||
                   strstr(t->name, "attn2.processor.to_k");
    bool is_down = strstr(t->name, "down.weight") || strstr(t->name, "lora_A");
    for (size_t i = 0; i < IPT_COUNT(widths) && is_to_k && is_down && t->rank >= 2; i++)
        if (t->dim[1] == widths[i].width)
            return widths[i].name;
    return NULL;
}

/* The first row that occurs in any key, in the order of rows: later ones are less certain. */
static const struct {
    const char *part, *name;
} signs[] = {
    {"distilled_guidance_layer", "Chroma"},
    {"individual_token_refiner", "HunyuanVideo"},
    {"joint_transformer_blocks", "AuraFlow"},
    {"double_stream_blocks", "HiDream"},
    {"double_blocks_19_", "HunyuanVideo"}, /* Flux has 19 of them */
    {"double_blocks.19.", "HunyuanVideo"},
    {"single_transformer_blocks", "Flux"},
    {"single_blocks", "Flux"},
    {"double_blocks", "Flux"},
    {"img_mlp", "Qwen-Image"},
    {"img_mod", "Qwen-Image"},
    {"txt_mlp", "Qwen-Image"},
    {"txt_mod", "Qwen-Image"},
    {"joint_blocks", "SD 3"},
    {"add_q_proj", NULL}, /* Qwen-Image, Flux or SD 3: by number and width */
    {"add_k_proj", NULL},
    {"add_v_proj", NULL},
    {"to_add_out", NULL},
    {"ff_context", "SD 3"},
    {"context_refiner", "Lumina 2 or Z-Image"},
    {"noise_refiner", "Lumina 2 or Z-Image"},
    {"layers.0.attention.", "Lumina 2 or Z-Image"},
    {"layers_0_attention_", "Lumina 2 or Z-Image"},
    {"lora_prior_unet", "Stable Cascade"},
    {"cross_attn_q_proj", "Cosmos"},
    {"cross_attn.q_proj", "Cosmos"},
    {"self_attn_q_proj", "Cosmos"},
    {"self_attn.q_proj", "Cosmos"},
    {"cross_attn", "Wan"},
    {"transformer.blocks.", "Wan"},
    {"diffusion_model.blocks.", "Wan"},
    {"lora_unet_blocks_", "Wan"},
    {"transformer_blocks.0.attn.to_", NULL}, /* UNets say attn1 and attn2 */
    {"transformer_blocks_0_attn_to_", NULL},
    {"transformer.transformer_blocks.", "a transformer such as LTX-Video or PixArt"},
    {"diffusion_model.transformer_blocks.", "a transformer such as LTX-Video or PixArt"},
    {"lora_transformer_", "a transformer such as Flux or SD 3"},
    {"lora_te3_", "SD 3 or Flux"},
};

/* Qwen-Image has 60 blocks of 3072, Flux 19 of 3072, SD 3 24 or 38 of 1536 or 2432. */
static const char *by_joint_attention(const ipt_st_tensor *t)
{
    const char *p = strstr(t->name, "transformer_blocks");
    int block = 0;
    for (p = p ? p + 19 : ""; *p >= '0' && *p <= '9' && block < 1000; p++)
        block = block * 10 + (*p - '0');
    bool down = strstr(t->name, "down.weight") || strstr(t->name, "lora_A");
    int64_t width = t->rank < 2 ? 0 : down ? t->dim[1] : t->dim[0];
    if (width == 1536 || width == 2432)
        return "SD 3";
    return width == 3072 && block > 18 ? "Qwen-Image" : "Flux or Qwen-Image";
}

static bool is_joint_attention(const char *key)
{
    static const char *const parts[] = {"add_q_proj", "add_k_proj", "add_v_proj",
                                        "to_add_out", ".attn.to_",  "_attn_to_"};
    for (size_t i = 0; i < IPT_COUNT(parts); i++)
        if (strstr(key, parts[i]))
            return true;
    return false;
}

/* Of a CLIP text encoder, whose projections other transformers have too. */
static bool is_clip(const char *key)
{
    static const char *const starts[] = {"lora_te_", "lora_te1_", "lora_te2_", "text_encoder."};
    for (size_t i = 0; i < IPT_COUNT(starts); i++)
        if (strncmp(key, starts[i], strlen(starts[i])) == 0)
            return true;
    return false;
}

void ipt_adapter_guess(ipt_adapter_file *f)
{
    static const char *const says[] = {"modelspec.architecture", "ss_base_model_version"};
    const ipt_safetensors *st = f->impl->st;
    const char *unet = NULL, *added = NULL;
    size_t best = IPT_COUNT(signs);
    for (size_t i = 0; i < IPT_COUNT(says) && !f->claims; i++)
        f->claims = ipt_safetensors_meta(st, says[i]);
    for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        for (size_t k = 0; k < best && !is_clip(t->name); k++)
            if (strstr(t->name, signs[k].part))
                best = k;
        if (is_joint_attention(t->name) && (!added || strcmp(added, "Flux or Qwen-Image") == 0))
            added = by_joint_attention(t);
        unet = unet ? unet : by_width(t);
    }
    f->made_for = best == IPT_COUNT(signs) ? unet : signs[best].name ? signs[best].name : added;
}

/* --- values ----------------------------------------------------------------------------------- */
static ipt_status list_bad_values(ipt_adapter_file *f)
{
    const ipt_safetensors *st = f->impl->st;
    size_t n = ipt_safetensors_count(st), bad = 0;
    f->bad = ipt_arena_alloc(&f->impl->arena, n * sizeof *f->bad);
    if (!f->bad)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        IPT_TRY(ipt_st_load(t));
        if (!ipt_st_finite(t, &bad)) {
            for (; bad < t->count; bad++)
                f->bad_values += isfinite(ipt_st_get(t, bad)) ? 0 : 1;
            f->bad[f->n_bad++] = t->name;
            if (!f->bad_module && f->impl->used[i] == 1)
                f->bad_module = t->name;
        }
        if (f->impl->used[i] == 0)
            ipt_st_release(t);
    }
    return IPT_OK;
}

/* --- what is left ----------------------------------------------------------------------------- */
/* Length of the part that names a group: up to the first number between separators. */
static size_t group_length(const char *key)
{
    static const char second[] = "text_encoder_2.";
    size_t n = strlen(key), i = strncmp(key, second, sizeof second - 1) == 0 ? sizeof second : 1;
    for (; i < n; i++) {
        bool starts = key[i] >= '0' && key[i] <= '9' &&
                      (key[i - 1] == '.' || key[i - 1] == '_' || key[i - 1] == ':');
        size_t k = i;
        while (starts && key[k] >= '0' && key[k] <= '9')
            k++;
        if (starts && (key[k] == '.' || key[k] == '_' || key[k] == ':'))
            return i;
    }
    return n;
}

/* Groups in the order of the keys; the last one takes what is too various. */
static ipt_status group_keys(ipt_adapter_file *f)
{
    f->group = ipt_arena_alloc(&f->impl->arena, MAX_GROUPS * sizeof *f->group);
    if (!f->group)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < f->n_unmatched; i++) {
        const char *key = f->unmatched[i];
        size_t len = group_length(key), g = 0;
        while (g < f->n_group &&
               (strncmp(f->group[g].name, key, len) != 0 || f->group[g].name[len]))
            g++;
        if (g == MAX_GROUPS)
            g = MAX_GROUPS - 1;
        if (g == f->n_group) {
            char *name = ipt_arena_alloc(&f->impl->arena, len + 1);
            if (!name)
                return IPT_ERR_NOMEM;
            memcpy(name, key, len);
            f->group[f->n_group++] =
                (ipt_adapter_group){g == MAX_GROUPS - 1 ? "others" : name, key, 0};
        }
        f->group[g].n++;
    }
    return IPT_OK;
}

ipt_status ipt_adapter_list(ipt_adapter_file *f)
{
    const ipt_safetensors *st = f->impl->st;
    size_t n = f->n_key = ipt_safetensors_count(st);
    IPT_TRY(list_bad_values(f));
    f->unmatched = ipt_arena_alloc(&f->impl->arena, n * sizeof *f->unmatched);
    if (!f->unmatched)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        if (f->impl->used[i])
            continue;
        if (t->count == 0 || ipt_adapter_is_idle(f, t->name))
            f->n_harmless++;
        else
            f->unmatched[f->n_unmatched++] = t->name;
    }
    if (f->n_module > 0 || f->n_embedding > 0)
        return group_keys(f);
    return ipt_fail(f->impl->ctx, IPT_ERR_MISSING,
                    "%s: none of its %zu keys ('%s' ...) fits a module of this model: no adapter, "
                    "or made for %s",
                    f->path, n, ipt_safetensors_at(st, 0)->name,
                    f->made_for ? f->made_for : "another model");
}

/* --- before use ------------------------------------------------------------------------------- */
static ipt_status refuse_partial(const ipt_adapter_file *f)
{
    ipt_ctx *ctx = f->impl->ctx;
    char made[160] = "", says[160] = "";
    if (f->made_for)
        ipt_name(made, sizeof made, "; by its keys it was made for %s", f->made_for);
    if (f->claims)
        ipt_name(says, sizeof says, "%s its metadata says '%.60s'", made[0] ? "," : ";", f->claims);
    ipt_log(ctx, IPT_LOG_ERROR, "%s: what fits this model and what does not:", f->path);
    ipt_log(ctx, IPT_LOG_ERROR, "%8zu keys fit: %zu modules, %zu words",
            f->n_key - f->n_unmatched - f->n_harmless, f->n_module, f->n_embedding);
    for (size_t i = 0; i < f->n_group; i++)
        ipt_log(ctx, IPT_LOG_ERROR, "%8zu keys fit nothing: %.100s* (first: %.200s)", f->group[i].n,
                f->group[i].name, f->group[i].first);
    return ipt_fail(ctx, IPT_ERR_MISSING,
                    "%s: %zu of %zu keys fit nothing in this model%s%s; --allow-partial takes what "
                    "fits",
                    f->path, f->n_unmatched, f->n_key, made, says);
}

ipt_status ipt_adapter_check(const ipt_adapter_file *f, bool is_partial)
{
    if (f->n_unmatched > 0 && !is_partial)
        return refuse_partial(f);
    if (f->bad_module)
        return ipt_fail(
            f->impl->ctx, IPT_ERR_FORMAT,
            "%s: key '%s': NaN or infinite, expected finite numbers (%zu such values in "
            "%zu tensors)",
            f->path, f->bad_module, f->bad_values, f->n_bad);
    return IPT_OK;
}
