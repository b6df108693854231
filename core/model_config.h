/* core/model_config.h - what the parts of a model look like, as plain numbers: filled by model_io
 * from a folder's config.json files or from a checkpoint's tensors, read by unet, vae,
 * text_encoder, sampler and engine.  Lists are resolved: one entry per level, outermost (full
 * resolution) first; the up path uses them in reverse.
 *
 * Must not know: files, JSON, tensors. */
#ifndef IPT_CORE_MODEL_CONFIG_H
#define IPT_CORE_MODEL_CONFIG_H
#include "core/core.h"

enum { IPT_MAX_LEVEL = 8 };

typedef enum ipt_arch { IPT_ARCH_UNKNOWN, IPT_ARCH_SD1, IPT_ARCH_SD2, IPT_ARCH_SDXL } ipt_arch;
typedef enum ipt_prediction { IPT_PRED_EPSILON, IPT_PRED_V, IPT_PRED_SAMPLE } ipt_prediction;
typedef enum ipt_act { IPT_ACT_SILU, IPT_ACT_GELU, IPT_ACT_QUICK_GELU, IPT_ACT_RELU } ipt_act;

/* --- UNet2DConditionModel --------------------------------------------------------------------- */
typedef struct ipt_unet_config {
    int32_t in_channels, out_channels; /* 4, 4; inpainting 9, 4 */
    int32_t n_level;                   /* 1..IPT_MAX_LEVEL */
    int32_t channels[IPT_MAX_LEVEL];   /* block_out_channels */
    int32_t n_layer[IPT_MAX_LEVEL];    /* resnets of down block i; up block i has
                                          n_layer[n_level-1-i] + 1 */
    bool down_attn[IPT_MAX_LEVEL];     /* down_blocks[i] is a CrossAttnDownBlock2D */
    bool up_attn[IPT_MAX_LEVEL];       /* up_blocks[i] (i = 0: deepest) is a CrossAttnUpBlock2D */
    int32_t heads[IPT_MAX_LEVEL];      /* number of heads; mid: the last, up block i:
                                          heads[n_level-1-i] */
    int32_t depth[IPT_MAX_LEVEL];      /* transformer layers of down block i; mid: the last */
    int32_t up_depth[IPT_MAX_LEVEL];   /* of up block i */
    int32_t cross_dim[IPT_MAX_LEVEL];  /* width of the text at down block i; mid: the last,
                                          up block i: cross_dim[n_level-1-i] */
    bool only_cross[IPT_MAX_LEVEL];    /* attn1 attends to the text as well; up: reversed */
    bool has_mid;                      /* mid_block_type null: false */
    bool mid_attn;                     /* UNetMidBlock2DCrossAttn; else UNetMidBlock2D */
    bool mid_only_cross;
    int32_t norm_groups;        /* norm_num_groups */
    float norm_eps;             /* of the resnets and conv_norm_out; the transformers'
                                   group norm is always 1e-6 */
    bool linear_projection;     /* proj_in / proj_out are linear, not 1x1 convolutions */
    bool upcast_attention;      /* attention scores in f32: our kernels always do */
    ipt_act act;                /* act_fn of resnets, output and time embedding */
    bool flip_sin_to_cos;       /* time embedding: cosines first */
    float freq_shift;           /* downscale_freq_shift of the time embedding */
    int32_t time_embed_dim;     /* 0 in a config means 4 channels[0]: resolved here */
    int32_t time_cond_dim;      /* time_cond_proj_dim (LCM guidance embedding); 0 = none:
                                   weight time_embedding.cond_proj.weight */
    int32_t downsample_padding; /* 1: symmetric; 0: right and bottom by one */
    float mid_scale;            /* mid_block_scale_factor: output of the mid resnets is
                                   divided by it */
    int32_t conv_in_kernel, conv_out_kernel; /* 3, 3 */
    bool text_time;                          /* addition_embed_type "text_time" (SDXL) */
    int32_t add_time_dim;                    /* addition_time_embed_dim: 256 */
    int32_t add_in_dim;                      /* projection_class_embeddings_input_dim: 2816 */
    int32_t sample_size;                     /* latent pixels of a default picture */
} ipt_unet_config;

/* --- AutoencoderKL ------------------------------------------------------------------------------
 */
typedef struct ipt_vae_config {
    int32_t in_channels, out_channels, latent_channels; /* 3, 3, 4 */
    int32_t n_level;
    int32_t channels[IPT_MAX_LEVEL]; /* encoder order; the decoder uses them in reverse */
    int32_t n_layer;                 /* encoder resnets a level; decoder has one more */
    int32_t norm_groups;
    ipt_act act;
    float scaling_factor, shift_factor; /* latent = (mean - shift) * scaling */
    bool has_quant_conv, has_post_quant_conv;
    bool mid_attn;     /* mid_block_add_attention */
    bool force_upcast; /* f16 activations overflow: compute in f32 */
    int32_t sample_size;
    bool tiny; /* AutoencoderTiny (TAESD): channels = widths, n_layer = blocks */
} ipt_vae_config;

/* --- CLIPTextModel, CLIPTextModelWithProjection -------------------------------------------------
 */
typedef struct ipt_text_config {
    int32_t vocab, width, mlp_width, n_layer, heads, max_tokens; /* max_tokens: 77 */
    ipt_act act;            /* quick_gelu (CLIP-L) or gelu (OpenCLIP H, bigG) */
    float norm_eps;         /* 1e-5 */
    int32_t projection_dim; /* width of the projected pooled vector */
    bool has_projection;    /* text_projection.weight [projection_dim, width] exists */
    int32_t bos, eos, pad;  /* ids as configured; eos 2 (old configs): pool at the largest id */
} ipt_text_config;

/* --- the whole ----------------------------------------------------------------------------------
 */
enum { IPT_COMP_UNET, IPT_COMP_VAE, IPT_COMP_TEXT, IPT_COMP_TEXT2, IPT_COMP_COUNT };
typedef struct ipt_model_config {
    ipt_arch arch;
    ipt_prediction prediction; /* from scheduler config, metadata or the rule of the architecture */
    bool prediction_assumed;   /* nothing in the files says so */
    bool has[IPT_COMP_COUNT];  /* components whose weights are there */
    bool zero_empty_negative;  /* SDXL force_zeros_for_empty_prompt: empty negative = zeros */
    bool zero_snr;             /* checkpoint marked "ztsnr": zero terminal SNR schedule */
    ipt_unet_config unet;
    ipt_vae_config vae;
    ipt_text_config text, text2; /* SDXL: text = CLIP-L, text2 = OpenCLIP bigG */
} ipt_model_config;

/* Values of the published models.  Sources: config.json of runwayml/stable-diffusion-v1-5,
 * stabilityai/stable-diffusion-2-1 and stabilityai/stable-diffusion-xl-base-1.0. */
static inline ipt_unet_config ipt_unet_config_sd15(void)
{
    return (ipt_unet_config){.in_channels = 4,
                             .out_channels = 4,
                             .n_level = 4,
                             .channels = {320, 640, 1280, 1280},
                             .n_layer = {2, 2, 2, 2},
                             .down_attn = {true, true, true, false},
                             .up_attn = {false, true, true, true},
                             .heads = {8, 8, 8, 8},
                             .depth = {1, 1, 1, 1},
                             .up_depth = {1, 1, 1, 1},
                             .cross_dim = {768, 768, 768, 768},
                             .has_mid = true,
                             .mid_attn = true,
                             .norm_groups = 32,
                             .norm_eps = 1e-5f,
                             .act = IPT_ACT_SILU,
                             .flip_sin_to_cos = true,
                             .time_embed_dim = 1280,
                             .downsample_padding = 1,
                             .mid_scale = 1,
                             .conv_in_kernel = 3,
                             .conv_out_kernel = 3,
                             .sample_size = 64};
}
static inline ipt_unet_config ipt_unet_config_sd21(void)
{
    ipt_unet_config c = ipt_unet_config_sd15();
    static const int32_t heads[4] = {5, 10, 20, 20};
    for (int i = 0; i < 4; i++) {
        c.heads[i] = heads[i];
        c.cross_dim[i] = 1024;
    }
    c.linear_projection = true;
    c.upcast_attention = true;
    c.sample_size = 96;
    return c;
}
static inline ipt_unet_config ipt_unet_config_sdxl(void)
{
    return (ipt_unet_config){.in_channels = 4,
                             .out_channels = 4,
                             .n_level = 3,
                             .channels = {320, 640, 1280},
                             .n_layer = {2, 2, 2},
                             .down_attn = {false, true, true},
                             .up_attn = {true, true, false},
                             .heads = {5, 10, 20},
                             .depth = {1, 2, 10},
                             .up_depth = {10, 2, 1},
                             .cross_dim = {2048, 2048, 2048},
                             .has_mid = true,
                             .mid_attn = true,
                             .norm_groups = 32,
                             .norm_eps = 1e-5f,
                             .linear_projection = true,
                             .act = IPT_ACT_SILU,
                             .flip_sin_to_cos = true,
                             .time_embed_dim = 1280,
                             .downsample_padding = 1,
                             .mid_scale = 1,
                             .conv_in_kernel = 3,
                             .conv_out_kernel = 3,
                             .text_time = true,
                             .add_time_dim = 256,
                             .add_in_dim = 2816,
                             .sample_size = 128};
}
static inline ipt_vae_config
ipt_vae_config_sd(void) /* SD 1.x and 2.x; SDXL: scaling 0.13025, force_upcast */
{
    return (ipt_vae_config){.in_channels = 3,
                            .out_channels = 3,
                            .latent_channels = 4,
                            .n_level = 4,
                            .channels = {128, 256, 512, 512},
                            .n_layer = 2,
                            .norm_groups = 32,
                            .act = IPT_ACT_SILU,
                            .scaling_factor = 0.18215f,
                            .has_quant_conv = true,
                            .has_post_quant_conv = true,
                            .mid_attn = true,
                            .force_upcast = true,
                            .sample_size = 512};
}
static inline ipt_vae_config ipt_vae_config_sdxl(void)
{
    ipt_vae_config c = ipt_vae_config_sd();
    c.scaling_factor = 0.13025f;
    c.sample_size = 1024;
    return c;
}
static inline ipt_text_config ipt_text_config_clip_l(void) /* SD 1.x, SDXL text_encoder */
{
    return (ipt_text_config){.vocab = 49408,
                             .width = 768,
                             .mlp_width = 3072,
                             .n_layer = 12,
                             .heads = 12,
                             .max_tokens = 77,
                             .act = IPT_ACT_QUICK_GELU,
                             .norm_eps = 1e-5f,
                             .projection_dim = 768,
                             .bos = 49406,
                             .eos = 49407,
                             .pad = 49407};
}
static inline ipt_text_config
ipt_text_config_clip_h(void) /* SD 2.x: OpenCLIP-H less its last layer */
{
    ipt_text_config c = ipt_text_config_clip_l();
    c.width = 1024;
    c.mlp_width = 4096;
    c.n_layer = 23;
    c.heads = 16;
    c.act = IPT_ACT_GELU;
    c.projection_dim = 1024;
    c.pad = 0;
    return c;
}
static inline ipt_text_config ipt_text_config_clip_g(void) /* SDXL text_encoder_2: OpenCLIP bigG */
{
    ipt_text_config c = ipt_text_config_clip_l();
    c.width = 1280;
    c.mlp_width = 5120;
    c.n_layer = 32;
    c.heads = 20;
    c.act = IPT_ACT_GELU;
    c.projection_dim = 1280;
    c.has_projection = true;
    c.pad = 0;
    return c;
}
#endif
