/* model_io/keymap_sd.c - the names of Stable Diffusion checkpoints as tables: canonical name (that
 * of diffusers and transformers) -> name in the file, without the component's prefix.
 *
 * Sources: CompVis/stable-diffusion, Stability-AI/stablediffusion and generative-models (module
 * names), mlfoundations/open_clip (text transformer), diffusers 0.x (old attention names). */
#include "model_io/keymap.h"

/* --- UNet: openaimodel.UNetModel ----------------------------------------------------------------
 */
static const ipt_leaf_rule resnet_leaf[] = {
    {"norm1.", "in_layers.0."},
    {"conv1.", "in_layers.2."},
    {"norm2.", "out_layers.0."},
    {"conv2.", "out_layers.3."},
    {"time_emb_proj.", "emb_layers.1."},
    {"conv_shortcut.", "skip_connection."},
    {NULL, NULL},
};
static const ipt_key_rule unet_ldm[] = {
    {.pattern = "time_embedding.linear_1.", .form = "time_embed.0."},
    {.pattern = "time_embedding.linear_2.", .form = "time_embed.2."},
    {.pattern = "time_embedding.cond_proj.", .form = "time_embed.cond_proj."},
    {.pattern = "add_embedding.linear_1.", .form = "label_emb.0.0."},
    {.pattern = "add_embedding.linear_2.", .form = "label_emb.0.2."},
    {.pattern = "conv_in.", .form = "input_blocks.0.0."},
    {.pattern = "conv_norm_out.", .form = "out.0."},
    {.pattern = "conv_out.", .form = "out.2."},
    {.pattern = "down_blocks.{i}.resnets.{j}.", .form = "input_blocks.{D}.0.", .leaf = resnet_leaf},
    {.pattern = "down_blocks.{i}.attentions.{j}.", .form = "input_blocks.{D}.1."},
    {.pattern = "down_blocks.{i}.downsamplers.0.conv.", .form = "input_blocks.{S}.0.op."},
    {.pattern = "mid_block.resnets.{j}.", .form = "middle_block.{k}.", .leaf = resnet_leaf},
    {.pattern = "mid_block.attentions.0.", .form = "middle_block.1."},
    {.pattern = "up_blocks.{i}.resnets.{j}.", .form = "output_blocks.{U}.0.", .leaf = resnet_leaf},
    {.pattern = "up_blocks.{i}.attentions.{j}.", .form = "output_blocks.{U}.1."},
    {.pattern = "up_blocks.{i}.upsamplers.0.conv.", .form = "output_blocks.{V}.{W}.conv."},
    {.pattern = NULL},
};

/* --- VAE: ldm.modules.diffusionmodules.model.Encoder / Decoder -------------------------------- */
static const ipt_leaf_rule vae_resnet_leaf[] = {
    {"conv_shortcut.", "nin_shortcut."},
    {NULL, NULL},
};
static const ipt_leaf_rule vae_attention_leaf[] = {
    {"group_norm.", "norm."},   {"to_q.", "q."}, {"to_k.", "k."}, {"to_v.", "v."},
    {"to_out.0.", "proj_out."}, {NULL, NULL},
};
static const ipt_key_rule vae_ldm[] = {
    {.pattern = "encoder.down_blocks.{i}.resnets.{j}.",
     .form = "encoder.down.{i}.block.{j}.",
     .leaf = vae_resnet_leaf},
    {.pattern = "encoder.down_blocks.{i}.downsamplers.0.conv.",
     .form = "encoder.down.{i}.downsample.conv."},
    {.pattern = "encoder.mid_block.resnets.{j}.",
     .form = "encoder.mid.block_{n}.",
     .leaf = vae_resnet_leaf},
    {.pattern = "encoder.mid_block.attentions.0.",
     .form = "encoder.mid.attn_1.",
     .leaf = vae_attention_leaf},
    {.pattern = "encoder.conv_norm_out.", .form = "encoder.norm_out."},
    {.pattern = "decoder.up_blocks.{i}.resnets.{j}.",
     .form = "decoder.up.{R}.block.{j}.",
     .leaf = vae_resnet_leaf},
    {.pattern = "decoder.up_blocks.{i}.upsamplers.0.conv.",
     .form = "decoder.up.{R}.upsample.conv."},
    {.pattern = "decoder.mid_block.resnets.{j}.",
     .form = "decoder.mid.block_{n}.",
     .leaf = vae_resnet_leaf},
    {.pattern = "decoder.mid_block.attentions.0.",
     .form = "decoder.mid.attn_1.",
     .leaf = vae_attention_leaf},
    {.pattern = "decoder.conv_norm_out.", .form = "decoder.norm_out."},
    {.pattern = "encoder.", .form = "encoder."},
    {.pattern = "decoder.", .form = "decoder."},
    {.pattern = "quant_conv.", .form = "quant_conv."},
    {.pattern = "post_quant_conv.", .form = "post_quant_conv."},
    {.pattern = NULL},
};

/* --- text: OpenCLIP's transformer ------------------------------------------------------------- */
static const ipt_leaf_rule open_clip_leaf[] = {
    {"self_attn.out_proj.", "attn.out_proj."},
    {"layer_norm1.", "ln_1."},
    {"layer_norm2.", "ln_2."},
    {"mlp.fc1.", "mlp.c_fc."},
    {"mlp.fc2.", "mlp.c_proj."},
    {NULL, NULL},
};
#define LAYER "text_model.encoder.layers.{i}."
#define BLOCK "transformer.resblocks.{i}."
static const ipt_key_rule open_clip[] = {
    {.pattern = LAYER "self_attn.q_proj.weight",
     .form = BLOCK "attn.in_proj_weight",
     .whole = true,
     .third = 1},
    {.pattern = LAYER "self_attn.k_proj.weight",
     .form = BLOCK "attn.in_proj_weight",
     .whole = true,
     .third = 2},
    {.pattern = LAYER "self_attn.v_proj.weight",
     .form = BLOCK "attn.in_proj_weight",
     .whole = true,
     .third = 3},
    {.pattern = LAYER "self_attn.q_proj.bias",
     .form = BLOCK "attn.in_proj_bias",
     .whole = true,
     .third = 1},
    {.pattern = LAYER "self_attn.k_proj.bias",
     .form = BLOCK "attn.in_proj_bias",
     .whole = true,
     .third = 2},
    {.pattern = LAYER "self_attn.v_proj.bias",
     .form = BLOCK "attn.in_proj_bias",
     .whole = true,
     .third = 3},
    {.pattern = LAYER, .form = BLOCK, .leaf = open_clip_leaf},
    {.pattern = "text_model.embeddings.token_embedding.", .form = "token_embedding."},
    {.pattern = "text_model.embeddings.position_embedding.weight",
     .form = "positional_embedding",
     .whole = true},
    {.pattern = "text_model.final_layer_norm.", .form = "ln_final."},
    {.pattern = "text_projection.weight",
     .form = "text_projection",
     .whole = true,
     .transposed = true},
    {.pattern = "text_projection.weight", .form = "text_projection.weight", .whole = true},
    {.pattern = NULL},
};

/* --- TAESD as its author publishes it: the decoder's sequence starts with a clamp ------------- */
static const ipt_key_rule taesd[] = {
    {.pattern = "decoder.layers.{j}.", .form = "{n}."},
    {.pattern = NULL},
};

/* --- canonical files: today's spelling first, then older ones --------------------------------- */
static const ipt_leaf_rule old_vae_attention_leaf[] = {
    {"to_q.", "query."},         {"to_k.", "key."}, {"to_v.", "value."},
    {"to_out.0.", "proj_attn."}, {NULL, NULL},
};
static const ipt_key_rule canonical[] = {
    {.pattern = "", .form = ""},
    {.pattern = "encoder.mid_block.attentions.0.",
     .form = "encoder.mid_block.attentions.0.",
     .leaf = old_vae_attention_leaf},
    {.pattern = "decoder.mid_block.attentions.0.",
     .form = "decoder.mid_block.attentions.0.",
     .leaf = old_vae_attention_leaf},
    {.pattern = "text_model.", .form = ""}, /* saved from the inner model */
    {.pattern = NULL},
};

const ipt_key_rule *ipt_key_rules(ipt_layout layout)
{
    static const ipt_key_rule *const tables[IPT_LAYOUT_COUNT] = {
        [IPT_LAYOUT_CANONICAL] = canonical, [IPT_LAYOUT_LDM_UNET] = unet_ldm,
        [IPT_LAYOUT_LDM_VAE] = vae_ldm,     [IPT_LAYOUT_OPEN_CLIP] = open_clip,
        [IPT_LAYOUT_TAESD] = taesd,
    };
    return tables[layout];
}
