/* model_io/config.c - config.json files of diffusers and transformers -> plain numbers.
 *
 * Every key is honoured, or refused when its value asks for something this program does not do;
 * keys nobody knew when this was written are named in the log. Source of names and defaults:
 * diffusers UNet2DConditionModel, AutoencoderKL, AutoencoderTiny; transformers CLIPTextConfig. */
#include "model_io/internal.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What is being read; the first failure stays in `status`, later reads do nothing. */
typedef struct reader {
    ipt_ctx *ctx;
    const char *path;
    json_t *o;
    ipt_status status;
} reader;

static const json_t *get(reader *r, const char *key)
{
    const json_t *v = json_object_get(r->o, key);
    return !v || json_is_null(v) ? NULL : v;
}

static void bad_value(reader *r, const char *key, const char *expected)
{
    if (r->status != IPT_OK)
        return;
    char *found = json_dumps(json_object_get(r->o, key), JSON_ENCODE_ANY | JSON_COMPACT);
    r->status = ipt_fail(r->ctx, IPT_ERR_FORMAT, "%s: key '%s': found %.100s, expected %s", r->path,
                         key, found ? found : "nothing", expected);
    free(found);
}

static void unsupported(reader *r, const char *key, const char *expected)
{
    if (r->status != IPT_OK)
        return;
    char *found = json_dumps(json_object_get(r->o, key), JSON_ENCODE_ANY | JSON_COMPACT);
    r->status =
        ipt_fail(r->ctx, IPT_ERR_UNSUPPORTED, "%s: key '%s': %.100s is not supported, expected %s",
                 r->path, key, found ? found : "nothing", expected);
    free(found);
}

/* Counts of things that become graph nodes are kept far below what would exhaust memory. */
enum { MAX_DIM = 1 << 20, MAX_LAYER = 64, MAX_TEXT_LAYER = 128 };

static bool small_int(const json_t *v, int32_t lo, int32_t *out)
{
    json_int_t n = json_integer_value(v);
    if (!json_is_integer(v) || n < lo || n > MAX_DIM)
        return false;
    *out = (int32_t)n;
    return true;
}

static const char *whole_from(int32_t lo)
{
    return lo > 0 ? "a whole number from 1 to 1048576" : "a whole number from 0 to 1048576";
}

static int32_t read_int(reader *r, const char *key, int32_t dflt, int32_t lo)
{
    const json_t *v = get(r, key);
    int32_t n = dflt;
    if (v && !small_int(v, lo, &n))
        bad_value(r, key, whole_from(lo));
    return n;
}

/* The native side of a picture or latent, which diffusers also writes as [height, width]; only the
 * area counts here, so of two the geometric mean. */
static int32_t read_side(reader *r, int32_t dflt)
{
    const json_t *v = get(r, "sample_size");
    int32_t n = dflt, m = 0;
    if (json_array_size(v) == 2 && small_int(json_array_get(v, 0), 1, &n) &&
        small_int(json_array_get(v, 1), 1, &m))
        return (int32_t)(sqrt((double)n * m) + 0.5);
    if (v && !small_int(v, 1, &n))
        bad_value(r, "sample_size", "a whole number from 1 to 1048576, or two");
    return n;
}

static float read_float(reader *r, const char *key, float dflt)
{
    const json_t *v = get(r, key);
    if (!v)
        return dflt;
    double d = json_number_value(v);
    if (!json_is_number(v) || !isfinite(d) || fabs(d) > 1e30) {
        bad_value(r, key, "a number");
        return dflt;
    }
    return (float)d;
}

static bool read_bool(reader *r, const char *key, bool dflt)
{
    const json_t *v = get(r, key);
    if (!v)
        return dflt;
    if (!json_is_boolean(v))
        bad_value(r, key, "true or false");
    return json_is_true(v);
}

/* One number for all levels or a list of n. */
static void read_list(reader *r, const char *key, int32_t dflt, int32_t lo, int32_t n, int32_t *out)
{
    const json_t *v = get(r, key);
    for (int32_t i = 0; i < n; i++) {
        out[i] = dflt;
        if (!v)
            continue;
        const json_t *e = json_is_array(v) ? json_array_get(v, (size_t)i) : v;
        if (json_is_array(e))
            unsupported(r, key, "one number a level");
        else if (!small_int(e, lo, &out[i]))
            bad_value(r, key, whole_from(lo));
    }
    if (json_is_array(v) && json_array_size(v) != (size_t)n)
        bad_value(r, key, "one number a level");
}

/* block_out_channels: sets the number of levels. */
static int32_t read_channels(reader *r, const char *key, const int32_t *dflt, int32_t n_dflt,
                             int32_t *out)
{
    const json_t *v = get(r, key);
    size_t n = json_array_size(v);
    if (!v) {
        memcpy(out, dflt, (size_t)n_dflt * sizeof *out);
        return n_dflt;
    }
    if (n < 1 || n > IPT_MAX_LEVEL) {
        bad_value(r, key, "a list of 1 to 8 numbers");
        return 1;
    }
    read_list(r, key, 0, 1, (int32_t)n, out);
    return (int32_t)n;
}

static ipt_act read_act(reader *r, const char *key, const char *dflt)
{
    static const struct {
        const char *name;
        ipt_act act;
    } acts[] = {
        {"silu", IPT_ACT_SILU}, {"swish", IPT_ACT_SILU},
        {"gelu", IPT_ACT_GELU}, {"quick_gelu", IPT_ACT_QUICK_GELU},
        {"relu", IPT_ACT_RELU},
    };
    const json_t *v = get(r, key);
    const char *name = v ? json_string_value(v) : dflt;
    for (size_t i = 0; name && i < IPT_COUNT(acts); i++) {
        if (strcmp(name, acts[i].name) == 0)
            return acts[i].act;
    }
    unsupported(r, key, "silu, gelu, quick_gelu or relu");
    return IPT_ACT_SILU;
}

/* Block types: all `plain`, or `cross` where out[i] becomes true (NULL: not allowed). */
static void read_types(reader *r, const char *key, int32_t n, const char *plain, const char *cross,
                       bool *out)
{
    const json_t *v = get(r, key);
    if (!v)
        return; /* the defaults are the caller's */
    if (json_array_size(v) != (size_t)n) {
        bad_value(r, key, "one block type a level");
        return;
    }
    for (int32_t i = 0; i < n; i++) {
        const char *s = json_string_value(json_array_get(v, (size_t)i));
        bool is_cross = s && cross && strcmp(s, cross) == 0;
        if (!is_cross && !(s && strcmp(s, plain) == 0))
            unsupported(r, key, cross ? cross : plain);
        if (out)
            out[i] = is_cross;
    }
}

/* Keys that must keep the value this program implements. */
typedef struct fixed_key {
    const char *key;
    const char *text; /* a string, NULL: null or false */
    double number;    /* when text is "#" */
} fixed_key;

static bool is_fixed(const json_t *v, const fixed_key *k)
{
    if (!v || json_is_null(v))
        return true;
    if (!k->text)
        return json_is_false(v);
    if (strcmp(k->text, "#") == 0)
        return json_is_number(v) && fabs(json_number_value(v) - k->number) < 1e-9;
    return json_is_string(v) && strcmp(json_string_value(v), k->text) == 0;
}

static void check_fixed(reader *r, const fixed_key *k, size_t n)
{
    char expected[64];
    for (size_t i = 0; i < n; i++) {
        if (is_fixed(json_object_get(r->o, k[i].key), &k[i]))
            continue;
        if (k[i].text && strcmp(k[i].text, "#") == 0)
            snprintf(expected, sizeof expected, "%g", k[i].number);
        else
            snprintf(expected, sizeof expected, "%s", k[i].text ? k[i].text : "null or false");
        unsupported(r, k[i].key, expected);
    }
}

/* Names what is neither read, nor fixed, nor known to be without effect here. */
static void name_unknown(reader *r, const fixed_key *fixed, size_t n_fixed,
                         const char *const *known)
{
    const char *key;
    json_t *v;
    json_object_foreach(r->o, key, v)
    {
        bool is_known = key[0] == '_' || json_is_null(v) || json_is_false(v);
        for (size_t i = 0; i < n_fixed && !is_known; i++)
            is_known = strcmp(key, fixed[i].key) == 0;
        for (size_t i = 0; known[i] && !is_known; i++)
            is_known = strcmp(key, known[i]) == 0;
        if (!is_known)
            ipt_log(r->ctx, IPT_LOG_WARN, "%s: key '%.100s' is not known and has no effect",
                    r->path, key);
    }
}

static bool start(reader *r, const char *class_a, const char *class_b)
{
    if (!json_is_object(r->o)) {
        r->status = ipt_fail(r->ctx, IPT_ERR_FORMAT, "%s: expected a JSON object", r->path);
        return false;
    }
    const char *name = ipt_json_str(r->o, "_class_name", NULL);
    if (name && strcmp(name, class_a) != 0 && !(class_b && strcmp(name, class_b) == 0)) {
        r->status = ipt_fail(r->ctx, IPT_ERR_UNSUPPORTED,
                             "%s: key '_class_name': %.100s is not supported, expected %s", r->path,
                             name, class_a);
        return false;
    }
    return true;
}

/* --- UNet ---------------------------------------------------------------------------------------
 */
static const fixed_key unet_fixed[] = {
    {"center_input_sample", NULL, 0},          {"class_embed_type", NULL, 0},
    {"class_embeddings_concat", NULL, 0},      {"cross_attention_norm", NULL, 0},
    {"dual_cross_attention", NULL, 0},         {"encoder_hid_dim", NULL, 0},
    {"encoder_hid_dim_type", NULL, 0},         {"num_class_embeds", NULL, 0},
    {"resnet_out_scale_factor", "#", 1},       {"resnet_skip_time_act", NULL, 0},
    {"resnet_time_scale_shift", "default", 0}, {"time_embedding_act_fn", NULL, 0},
    {"time_embedding_type", "positional", 0},  {"timestep_post_act", NULL, 0},
    {"attention_type", "default", 0},
};
static const char *const unet_known[] = {"act_fn",
                                         "addition_embed_type",
                                         "addition_embed_type_num_heads",
                                         "addition_time_embed_dim",
                                         "attention_head_dim",
                                         "block_out_channels",
                                         "conv_in_kernel",
                                         "conv_out_kernel",
                                         "cross_attention_dim",
                                         "down_block_types",
                                         "downsample_padding",
                                         "dropout",
                                         "flip_sin_to_cos",
                                         "freq_shift",
                                         "in_channels",
                                         "layers_per_block",
                                         "mid_block_only_cross_attention",
                                         "mid_block_scale_factor",
                                         "mid_block_type",
                                         "norm_eps",
                                         "norm_num_groups",
                                         "num_attention_heads",
                                         "only_cross_attention",
                                         "out_channels",
                                         "projection_class_embeddings_input_dim",
                                         "reverse_transformer_layers_per_block",
                                         "sample_size",
                                         "time_cond_proj_dim",
                                         "time_embedding_dim",
                                         "transformer_layers_per_block",
                                         "up_block_types",
                                         "upcast_attention",
                                         "use_linear_projection",
                                         NULL};

static void unet_mid(reader *r, ipt_unet_config *c)
{
    const json_t *v = json_object_get(r->o, "mid_block_type");
    const char *name = v ? json_string_value(v) : "UNetMidBlock2DCrossAttn";
    bool cross = name && strcmp(name, "UNetMidBlock2DCrossAttn") == 0;
    bool plain = name && strcmp(name, "UNetMidBlock2D") == 0;
    bool none = json_is_null(v);
    c->has_mid = !none;
    c->mid_attn = cross;
    if (!none && !cross && !plain)
        unsupported(r, "mid_block_type", "UNetMidBlock2DCrossAttn");
}

static void unet_levels(reader *r, ipt_unet_config *c)
{
    static const int32_t channels[] = {320, 640, 1280, 1280};
    int32_t n = read_channels(r, "block_out_channels", channels, 4, c->channels);
    c->n_level = n;
    for (int32_t i = 0; i < n;
         i++) { /* the class's defaults: attention everywhere but at the bottom */
        c->down_attn[i] = i < n - 1;
        c->up_attn[i] = i > 0;
    }
    read_types(r, "down_block_types", n, "DownBlock2D", "CrossAttnDownBlock2D", c->down_attn);
    read_types(r, "up_block_types", n, "UpBlock2D", "CrossAttnUpBlock2D", c->up_attn);
    read_list(r, "layers_per_block", 2, 1, n, c->n_layer);
    read_list(r, get(r, "num_attention_heads") ? "num_attention_heads" : "attention_head_dim", 8, 1,
              n, c->heads);
    read_list(r, "transformer_layers_per_block", 1, 1, n, c->depth);
    read_list(r, "cross_attention_dim", 1280, 1, n, c->cross_dim);
    for (int32_t i = 0; i < n; i++)
        c->up_depth[i] = c->depth[n - 1 - i];
    if (get(r, "reverse_transformer_layers_per_block"))
        read_list(r, "reverse_transformer_layers_per_block", 1, 1, n, c->up_depth);
    const json_t *only = get(r, "only_cross_attention");
    for (int32_t i = 0; i < n; i++) {
        const json_t *e = json_is_array(only) ? json_array_get(only, (size_t)i) : only;
        if (only && !json_is_boolean(e))
            bad_value(r, "only_cross_attention", "true, false or one a level");
        c->only_cross[i] = json_is_true(e);
    }
}

void ipt_unet_count(const ipt_unet_config *c, int32_t *resnets, int32_t *transformers)
{
    int32_t n = 2, layers = c->mid_attn ? c->depth[c->n_level - 1] : 0;
    for (int32_t i = 0; i < c->n_level; i++) {
        int32_t up = c->n_layer[c->n_level - 1 - i] + 1; /* of up block i */
        n += c->n_layer[i] + up;
        layers += c->down_attn[i] ? c->n_layer[i] * c->depth[i] : 0;
        layers += c->up_attn[i] ? up * c->up_depth[i] : 0;
    }
    *resnets = n;
    *transformers = layers;
}

static void unet_check(reader *r, const ipt_unet_config *c)
{
    int32_t resnets = 0, transformers = 0;
    for (int32_t i = 0; i < c->n_level && r->status == IPT_OK; i++) {
        if (c->n_layer[i] > MAX_LAYER)
            unsupported(r, "layers_per_block", "at most 64");
        if (c->depth[i] > MAX_LAYER || c->up_depth[i] > MAX_LAYER)
            unsupported(r, "transformer_layers_per_block", "at most 64");
        bool attn = c->down_attn[i] || c->up_attn[c->n_level - 1 - i] ||
                    (i == c->n_level - 1 && c->mid_attn);
        if (attn && c->channels[i] % c->heads[i] != 0)
            unsupported(r, "attention_head_dim", "a number of heads that divides the channels");
        if (c->channels[i] % c->norm_groups != 0)
            bad_value(r, "norm_num_groups", "a number that divides block_out_channels");
    }
    if (r->status != IPT_OK)
        return;
    ipt_unet_count(c, &resnets, &transformers);
    if (resnets > IPT_MAX_RESNET)
        unsupported(r, "layers_per_block", "at most 240 resnets in all blocks");
    if (transformers > IPT_MAX_TRANSFORMER)
        unsupported(r, "transformer_layers_per_block",
                    "at most 1024 transformer layers in all blocks");
    if (c->conv_in_kernel % 2 == 0 || c->conv_out_kernel % 2 == 0 || c->conv_in_kernel > 15 ||
        c->conv_out_kernel > 15)
        unsupported(r, "conv_in_kernel", "an odd number up to 15");
    if (c->downsample_padding > 1)
        unsupported(r, "downsample_padding", "0 or 1");
    if (fabsf(c->mid_scale) < 1e-6f)
        bad_value(r, "mid_block_scale_factor", "a number that is not 0");
}

ipt_status ipt_config_unet(ipt_ctx *ctx, const char *path, json_t *o, ipt_unet_config *out)
{
    reader r = {.ctx = ctx, .path = path, .o = o};
    ipt_unet_config c = {0};
    if (!start(&r, "UNet2DConditionModel", NULL))
        return r.status;
    check_fixed(&r, unet_fixed, IPT_COUNT(unet_fixed));
    unet_levels(&r, &c);
    unet_mid(&r, &c);
    c.in_channels = read_int(&r, "in_channels", 4, 1);
    c.out_channels = read_int(&r, "out_channels", 4, 1);
    c.norm_groups = read_int(&r, "norm_num_groups", 32, 1);
    c.norm_eps = read_float(&r, "norm_eps", 1e-5f);
    c.linear_projection = read_bool(&r, "use_linear_projection", false);
    c.upcast_attention = read_bool(&r, "upcast_attention", false);
    c.act = read_act(&r, "act_fn", "silu");
    c.flip_sin_to_cos = read_bool(&r, "flip_sin_to_cos", true);
    c.freq_shift = read_float(&r, "freq_shift", 0);
    c.time_embed_dim = read_int(&r, "time_embedding_dim", 4 * c.channels[0], 1);
    c.time_cond_dim = read_int(&r, "time_cond_proj_dim", 0, 1);
    c.downsample_padding = read_int(&r, "downsample_padding", 1, 0);
    c.mid_scale = read_float(&r, "mid_block_scale_factor", 1);
    c.conv_in_kernel = read_int(&r, "conv_in_kernel", 3, 1);
    c.conv_out_kernel = read_int(&r, "conv_out_kernel", 3, 1);
    c.sample_size = read_side(&r, 64);
    const json_t *added = get(&r, "addition_embed_type");
    if (added) {
        c.text_time = json_is_string(added) && strcmp(json_string_value(added), "text_time") == 0;
        if (!c.text_time)
            unsupported(&r, "addition_embed_type", "null or text_time");
        c.add_time_dim = read_int(&r, "addition_time_embed_dim", 0, 1);
        c.add_in_dim = read_int(&r, "projection_class_embeddings_input_dim", 0, 1);
        if (c.add_time_dim == 0 || c.add_in_dim <= 6 * c.add_time_dim)
            bad_value(&r, "projection_class_embeddings_input_dim",
                      "more than 6 times addition_time_embed_dim");
    }
    unet_check(&r, &c);
    if (r.status != IPT_OK)
        return r.status;
    name_unknown(&r, unet_fixed, IPT_COUNT(unet_fixed), unet_known);
    *out = c;
    return IPT_OK;
}

/* --- VAE -------------------------------------------------------------------------------------- */
static const fixed_key vae_fixed[] = {
    {"latents_mean", NULL, 0},
    {"latents_std", NULL, 0},
};
static const char *const vae_known[] = {"act_fn",
                                        "block_out_channels",
                                        "down_block_types",
                                        "force_upcast",
                                        "in_channels",
                                        "latent_channels",
                                        "layers_per_block",
                                        "mid_block_add_attention",
                                        "norm_num_groups",
                                        "out_channels",
                                        "sample_size",
                                        "scaling_factor",
                                        "shift_factor",
                                        "up_block_types",
                                        "use_post_quant_conv",
                                        "use_quant_conv",
                                        NULL};

static ipt_status vae_tiny(reader *r, ipt_vae_config *out)
{
    static const int32_t widths[] = {64, 64, 64, 64};
    static const int32_t blocks_default[] = {3, 3, 3, 1};
    ipt_vae_config c = {.tiny = true, .norm_groups = 1, .scaling_factor = 1};
    int32_t blocks[IPT_MAX_LEVEL] = {0};
    c.n_level = read_channels(r, "decoder_block_out_channels", widths, 4, c.channels);
    int32_t n = read_channels(r, "num_decoder_blocks", blocks_default, 4, blocks);
    c.n_layer = blocks[0];
    for (int32_t i = 0; i < n; i++) {
        if (n != c.n_level || blocks[i] != (i == n - 1 ? 1 : blocks[0]) ||
            c.channels[i < c.n_level ? i : 0] != c.channels[0])
            unsupported(r, "num_decoder_blocks",
                        "equal widths, equal counts and a last level of 1");
    }
    c.in_channels = read_int(r, "in_channels", 3, 1);
    c.out_channels = read_int(r, "out_channels", 3, 1);
    c.latent_channels = read_int(r, "latent_channels", 4, 1);
    c.act = read_act(r, "act_fn", "relu");
    c.scaling_factor = read_float(r, "scaling_factor", 1);
    if (r->status == IPT_OK)
        *out = c;
    return r->status;
}

ipt_status ipt_config_vae(ipt_ctx *ctx, const char *path, json_t *o, ipt_vae_config *out)
{
    static const int32_t channels[] = {64};
    reader r = {.ctx = ctx, .path = path, .o = o};
    ipt_vae_config c = {0};
    if (!start(&r, "AutoencoderKL", "AutoencoderTiny"))
        return r.status;
    if (strcmp(ipt_json_str(o, "_class_name", ""), "AutoencoderTiny") == 0)
        return vae_tiny(&r, out);
    check_fixed(&r, vae_fixed, IPT_COUNT(vae_fixed));
    c.n_level = read_channels(&r, "block_out_channels", channels, 1, c.channels);
    read_types(&r, "down_block_types", c.n_level, "DownEncoderBlock2D", NULL, NULL);
    read_types(&r, "up_block_types", c.n_level, "UpDecoderBlock2D", NULL, NULL);
    c.in_channels = read_int(&r, "in_channels", 3, 1);
    c.out_channels = read_int(&r, "out_channels", 3, 1);
    c.latent_channels = read_int(&r, "latent_channels", 4, 1);
    c.n_layer = read_int(&r, "layers_per_block", 1, 1);
    c.norm_groups = read_int(&r, "norm_num_groups", 32, 1);
    c.act = read_act(&r, "act_fn", "silu");
    c.scaling_factor = read_float(&r, "scaling_factor", 0.18215f);
    c.shift_factor = read_float(&r, "shift_factor", 0);
    c.has_quant_conv = read_bool(&r, "use_quant_conv", true);
    c.has_post_quant_conv = read_bool(&r, "use_post_quant_conv", true);
    c.mid_attn = read_bool(&r, "mid_block_add_attention", true);
    c.force_upcast = read_bool(&r, "force_upcast", true);
    c.sample_size = read_side(&r, 512);
    for (int32_t i = 0; i < c.n_level && r.status == IPT_OK; i++) {
        if (c.channels[i] % c.norm_groups != 0)
            bad_value(&r, "norm_num_groups", "a number that divides block_out_channels");
    }
    if (c.n_layer > MAX_LAYER)
        unsupported(&r, "layers_per_block", "at most 64");
    if (fabsf(c.scaling_factor) < 1e-12f)
        bad_value(&r, "scaling_factor", "a number that is not 0");
    if (r.status != IPT_OK)
        return r.status;
    name_unknown(&r, vae_fixed, IPT_COUNT(vae_fixed), vae_known);
    *out = c;
    return IPT_OK;
}

/* --- text ------------------------------------------------------------------------------------- */
static int32_t read_id(reader *r, const char *key, int32_t dflt)
{
    const json_t *v = get(r, key);
    int32_t n = dflt;
    if (v && !small_int(v, 0, &n))
        bad_value(r, key, "a token id");
    return n;
}

ipt_status ipt_config_text(ipt_ctx *ctx, const char *path, json_t *o, ipt_text_config *out)
{
    json_t *inner = json_object_get(o, "text_config"); /* a whole CLIP model's config */
    reader r = {.ctx = ctx, .path = path, .o = json_is_object(inner) ? inner : o};
    ipt_text_config c = {0};
    if (!json_is_object(o))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: expected a JSON object", path);
    const char *class_name =
        json_string_value(json_array_get(json_object_get(o, "architectures"), 0));
    if (class_name && strncmp(class_name, "CLIP", 4) != 0)
        return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                        "%s: key 'architectures': %.100s is not supported, expected CLIPTextModel",
                        path, class_name);
    c.has_projection = class_name && strcmp(class_name, "CLIPTextModelWithProjection") == 0;
    c.vocab = read_int(&r, "vocab_size", 49408, 1);
    c.width = read_int(&r, "hidden_size", 512, 1);
    c.mlp_width = read_int(&r, "intermediate_size", 2048, 1);
    c.n_layer = read_int(&r, "num_hidden_layers", 12, 1);
    c.heads = read_int(&r, "num_attention_heads", 8, 1);
    c.max_tokens = read_int(&r, "max_position_embeddings", 77, 3);
    c.act = read_act(&r, "hidden_act", "quick_gelu");
    c.norm_eps = read_float(&r, "layer_norm_eps", 1e-5f);
    c.projection_dim = read_int(&r, "projection_dim", 512, 1);
    c.bos = read_id(&r, "bos_token_id", 49406);
    c.eos = read_id(&r, "eos_token_id", 49407);
    c.pad = read_id(&r, "pad_token_id", 1);
    if (c.n_layer > MAX_TEXT_LAYER)
        unsupported(&r, "num_hidden_layers", "at most 128");
    if (c.width % c.heads != 0)
        bad_value(&r, "num_attention_heads", "a number that divides hidden_size");
    if (r.status == IPT_OK)
        *out = c;
    return r.status;
}
