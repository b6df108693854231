/* libFuzzer target: adapter files from memory against a small list of modules.
 *   fuzz_lora -max_total_time=60
 * Seeds of every family are built in (LLVMFuzzerCustomMutator). */
#include "model_io/model_io.h"

#include "tests/fuzz_seed.h"

#include <math.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)
#define ONE(name, shape, b, e)                                                                     \
    "\"" name "\":{\"dtype\":\"U8\",\"shape\":" shape ",\"data_offsets\":[" #b "," #e "]}"
#define BLOCK "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
#define KOHYA "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
#define CONV "lora_unet_down_blocks_0_resnets_0_conv1"
#define TEXT "text_model.encoder.layers.0.self_attn"

static const ipt_module modules[] = {
    {IPT_COMP_UNET, "down_blocks.0.resnets.0.conv1", 3, 2, 3, 3},
    {IPT_COMP_UNET, BLOCK ".to_q", 4, 4, 1, 1},
    {IPT_COMP_UNET, BLOCK ".to_k", 4, 4, 1, 1},
    {IPT_COMP_UNET, BLOCK ".to_v", 4, 4, 1, 1},
    {IPT_COMP_UNET, BLOCK ".to_out.0", 4, 4, 1, 1},
    {IPT_COMP_TEXT, TEXT ".k_proj", 4, 4, 1, 1},
    {IPT_COMP_TEXT2, "text_projection", 5, 4, 1, 1},
};
static const char *const headers[] = {
    "{\"__metadata__\":{\"ss_tag_frequency\":\"{\\\"1_a b\\\":{\\\"x\\\":3}}\"}," ONE(
        KOHYA ".lora_down.weight", "[2,4]", 0, 8) "," ONE(KOHYA ".lora_up.weight", "[4,2]", 8,
                                                          16) "," ONE(KOHYA ".alpha", "[]", 16,
                                                                      17) "}",
    "{" ONE(CONV ".lora_down.weight", "[2,2,1,1]", 0,
            4) "," ONE(CONV ".lora_mid.weight", "[2,2,3,3]", 4,
                       40) "," ONE(CONV ".lora_up.weight", "[3,2,1,1]", 40, 46) "}",
    "{" ONE("lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight", "[2,2,3,3]", 0, 36) "," ONE(
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight", "[3,2]", 36, 42) "}",
    "{" ONE("unet." BLOCK ".processor.to_out_lora.down.weight", "[1,4]", 0,
            4) "," ONE("unet." BLOCK ".processor.to_out_lora.up.weight", "[4,1]", 4, 8) "}",
    "{" ONE("unet." BLOCK ".to_v.lora.down.weight", "[1,4]", 0, 4) "," ONE(
        "unet." BLOCK ".to_v.lora.up.weight", "[4,1]", 4,
        8) "," ONE("text_encoder." TEXT ".k_proj.lora_linear_layer.down.weight", "[1,4]", 8,
                   12) "," ONE("text_encoder." TEXT ".k_proj.lora_linear_layer.up.weight", "[4,1]",
                               12, 16) "}",
    "{\"__metadata__\":{\"lora_adapter_metadata\":\"{\\\"unet.lora_alpha\\\":3,\\\"unet.use_"
    "rslora\\\":true,\\\"unet.alpha_pattern\\\":{\\\"to_k\\\":2}}\"}," ONE(
        "unet." BLOCK ".to_k.lora_A.weight", "[4,4]", 0,
        16) "," ONE("unet." BLOCK ".to_k.lora_B.weight", "[4,4]", 16, 32) "}",
    "{\"__metadata__\":{\"unet\":\"[\\\"GEGLU\\\"]\"}," ONE("unet:0:down", "[1,4]", 0, 4) "," ONE(
        "unet:0:up", "[4,1]", 4, 8) "," ONE("text_encoder:0:down", "[1,4]", 8,
                                            12) "," ONE("text_encoder:0:up", "[4,1]", 12,
                                                        16) "," ONE("<s1>", "[4]", 16, 20) "}",
};

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    return seed_mutate(data, size, max_size, seed, headers, IPT_COUNT(headers));
}

static void use_module(const ipt_adapter_module *m)
{
    size_t fan = (size_t)m->in * (size_t)m->kh * (size_t)m->kw, rank = (size_t)m->rank,
           out = (size_t)m->out;
    REQUIRE(m->module < IPT_COUNT(modules) && m->rank >= 1 && isfinite(m->scale));
    float *a = malloc(fan * (rank + 2) * sizeof *a), *b = malloc(out * (rank + 2) * sizeof *b);
    if (a && b)
        ipt_adapter_pack(m, a, b, rank + 2, 1);
    free(a);
    free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    ipt_adapter_file *f = NULL;
    if (ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 0;
    if (ipt_adapter_open_memory(ctx, "fuzz", data, size, modules, IPT_COUNT(modules), &f) ==
        IPT_OK) {
        REQUIRE(f->n_module + f->n_embedding > 0);
        for (size_t i = 0; i < f->n_module; i++)
            use_module(&f->module[i]);
        for (size_t i = 0; i < f->n_word; i++)
            REQUIRE(f->word[i][0] != '\0');
        ipt_adapter_hash(f);
        ipt_adapter_close(&f);
    } else {
        REQUIRE(ipt_last_error(ctx)[0] != '\0');
    }
    ipt_ctx_destroy(&ctx);
    return 0;
}
