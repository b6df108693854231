/* tests/test_config_io.c - model_io: config.json files honoured or refused; names of the full
 * models. */
#include "tests/support.h"

#include "model_io/internal.h"

#include <jansson.h>
#include <string.h>

/* --- configs ---------------------------------------------------------------------------------- */
static void test_configs(void **state)
{
    (void)state;
    static const struct {
        char kind; /* u, v, t */
        const char *json;
        ipt_status want;
        const char *says;
    } rows[] = {
        {'u', "{}", IPT_OK, ""},
        {'u',
         "{\"block_out_channels\":[32,64],\"down_block_types\":[\"DownBlock2D\",\"DownBlock2D\"],"
         "\"up_block_types\":[\"UpBlock2D\",\"UpBlock2D\"]}",
         IPT_OK, ""},
        {'u',
         "{\"down_block_types\":[\"AttnDownBlock2D\",\"DownBlock2D\",\"DownBlock2D\","
         "\"DownBlock2D\"]}",
         IPT_ERR_UNSUPPORTED, "down_block_types"},
        {'u', "{\"down_block_types\":[\"DownBlock2D\"]}", IPT_ERR_FORMAT, "down_block_types"},
        {'u', "{\"class_embed_type\":\"timestep\"}", IPT_ERR_UNSUPPORTED, "class_embed_type"},
        {'u', "{\"encoder_hid_dim\":1024}", IPT_ERR_UNSUPPORTED, "encoder_hid_dim"},
        {'u', "{\"dual_cross_attention\":true}", IPT_ERR_UNSUPPORTED, "dual_cross_attention"},
        {'u', "{\"resnet_time_scale_shift\":\"scale_shift\"}", IPT_ERR_UNSUPPORTED,
         "resnet_time_scale_shift"},
        {'u', "{\"addition_embed_type\":\"text\"}", IPT_ERR_UNSUPPORTED, "addition_embed_type"},
        {'u', "{\"act_fn\":\"mish\"}", IPT_ERR_UNSUPPORTED, "act_fn"},
        {'u', "{\"in_channels\":\"4\"}", IPT_ERR_FORMAT, "in_channels"},
        {'u', "{\"in_channels\":99999999999}", IPT_ERR_FORMAT,
         "in_channels': found 99999999999, expected a whole number from 1 to 1048576"},
        {'u', "{\"sample_size\":[96,64]}", IPT_OK, ""},
        {'u', "{\"sample_size\":null}", IPT_OK, ""},
        {'u', "{\"sample_size\":0}", IPT_ERR_FORMAT, "sample_size': found 0"},
        {'u', "{\"sample_size\":[64,64,64]}", IPT_ERR_FORMAT, "sample_size"},
        {'v', "{\"sample_size\":\"512\"}", IPT_ERR_FORMAT, "sample_size': found \"512\""},
        {'u', "{\"norm_num_groups\":7}", IPT_ERR_FORMAT, "norm_num_groups"},
        {'u', "{\"attention_head_dim\":7}", IPT_ERR_UNSUPPORTED, "attention_head_dim"},
        {'u', "{\"transformer_layers_per_block\":[1,[2,2],3,4]}", IPT_ERR_UNSUPPORTED,
         "transformer_layers_per_block"},
        {'u', "{\"layers_per_block\":[1,2]}", IPT_ERR_FORMAT, "layers_per_block"},
        {'u', "{\"block_out_channels\":[]}", IPT_ERR_FORMAT, "block_out_channels"},
        {'u', "{\"mid_block_type\":\"UNetMidBlock2DSimpleCrossAttn\"}", IPT_ERR_UNSUPPORTED,
         "mid_block_type"},
        {'u', "{\"mid_block_scale_factor\":0}", IPT_ERR_FORMAT, "mid_block_scale_factor"},
        {'u', "{\"_class_name\":\"UNet3DConditionModel\"}", IPT_ERR_UNSUPPORTED, "_class_name"},
        {'u', "{\"layers_per_block\":1000000}", IPT_ERR_UNSUPPORTED, "layers_per_block"},
        {'u', "[]", IPT_ERR_FORMAT, "expected a JSON object"},
        {'v', "{\"block_out_channels\":[32]}", IPT_OK, ""},
        {'v', "{\"_class_name\":\"AutoencoderTiny\"}", IPT_OK, ""},
        {'v', "{\"down_block_types\":[\"AttnDownEncoderBlock2D\"],\"block_out_channels\":[32]}",
         IPT_ERR_UNSUPPORTED, "down_block_types"},
        {'v', "{\"scaling_factor\":0}", IPT_ERR_FORMAT, "scaling_factor"},
        {'v', "{\"latents_mean\":[1,2]}", IPT_ERR_UNSUPPORTED, "latents_mean"},
        {'v', "{\"_class_name\":\"VQModel\"}", IPT_ERR_UNSUPPORTED, "_class_name"},
        {'t', "{}", IPT_OK, ""},
        {'t', "{\"architectures\":[\"T5EncoderModel\"]}", IPT_ERR_UNSUPPORTED, "T5EncoderModel"},
        {'t', "{\"hidden_act\":\"gelu_new\"}", IPT_ERR_UNSUPPORTED, "hidden_act"},
        {'t', "{\"num_attention_heads\":7}", IPT_ERR_FORMAT, "num_attention_heads"},
        {'t', "{\"vocab_size\":0}", IPT_ERR_FORMAT, "vocab_size"},
    };
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        json_t *o = json_loads(rows[i].json, 0, NULL);
        ipt_unet_config u;
        ipt_vae_config v;
        ipt_text_config t;
        assert_non_null(o);
        ipt_status s = rows[i].kind == 'u'   ? ipt_config_unet(ctx, "c.json", o, &u)
                       : rows[i].kind == 'v' ? ipt_config_vae(ctx, "c.json", o, &v)
                                             : ipt_config_text(ctx, "c.json", o, &t);
        if (s != rows[i].want || (s != IPT_OK && !strstr(ipt_last_error(ctx), rows[i].says)))
            fail_msg("%s: %s: %s", rows[i].json, ipt_status_name(s), ipt_last_error(ctx));
        json_decref(o);
    }
    ipt_ctx_destroy(&ctx);
}

static void test_published_configs(void **state)
{
    (void)state;
    /* A walk through the numbering of the full models: names known from the published files. */
    static const struct {
        const char *canonical, *sd, *xl;
    } rows[] = {
        {"conv_in.weight", "input_blocks.0.0.weight", "input_blocks.0.0.weight"},
        {"down_blocks.0.resnets.1.norm1.bias", "input_blocks.2.0.in_layers.0.bias",
         "input_blocks.2.0.in_layers.0.bias"},
        {"down_blocks.1.downsamplers.0.conv.weight", "input_blocks.6.0.op.weight",
         "input_blocks.6.0.op.weight"},
        {"down_blocks.2.attentions.1.proj_in.weight", "input_blocks.8.1.proj_in.weight",
         "input_blocks.8.1.proj_in.weight"},
        {"up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight",
         "output_blocks.2.2.conv.weight"},
        {"up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight",
         "output_blocks.5.2.conv.weight"},
        {"up_blocks.2.resnets.2.conv_shortcut.weight", "output_blocks.8.0.skip_connection.weight",
         "output_blocks.8.0.skip_connection.weight"},
        {"mid_block.resnets.1.time_emb_proj.bias", "middle_block.2.emb_layers.1.bias",
         "middle_block.2.emb_layers.1.bias"},
        {"add_embedding.linear_2.weight", "label_emb.0.2.weight", "label_emb.0.2.weight"},
    };
    ipt_unet_config sd = ipt_unet_config_sd15(), xl = ipt_unet_config_sdxl();
    ipt_key_frame f;
    ipt_key_part part;
    char buf[IPT_KEY_MAX];
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_key_frame_unet(&sd, &f);
        assert_true(
            ipt_keymap_emit(IPT_LAYOUT_LDM_UNET, &f, rows[i].canonical, 0, buf, sizeof buf, &part));
        assert_string_equal(buf, rows[i].sd);
        ipt_key_frame_unet(&xl, &f);
        assert_true(
            ipt_keymap_emit(IPT_LAYOUT_LDM_UNET, &f, rows[i].canonical, 0, buf, sizeof buf, &part));
        assert_string_equal(buf, rows[i].xl);
    }
    assert_false(ipt_keymap_emit(IPT_LAYOUT_LDM_UNET, &f, "down_blocks.7.resnets.0.conv1.weight", 0,
                                 buf, sizeof buf, &part));
    assert_false(ipt_keymap_emit(IPT_LAYOUT_LDM_UNET, &f, "conv_in.weight", 0, buf, 4,
                                 &part)); /* does not fit */
    assert_true(ipt_keymap_emit(IPT_LAYOUT_CANONICAL, NULL,
                                "encoder.mid_block.attentions.0.to_out.0.bias", 1, buf, sizeof buf,
                                &part));
    assert_string_equal(buf, "encoder.mid_block.attentions.0.proj_attn.bias");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_configs),
        cmocka_unit_test(test_published_configs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
