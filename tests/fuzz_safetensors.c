/* libFuzzer target: safetensors files from memory, and what is made of a whole checkpoint.
 *   fuzz_safetensors -max_total_time=60
 * Seeds are built in (LLVMFuzzerCustomMutator). */
#include "model_io/internal.h"

#include "tests/fuzz_seed.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)
#define ONE(name, shape, b, e)                                                                     \
    "\"" name "\":{\"dtype\":\"F16\",\"shape\":" shape ",\"data_offsets\":[" #b "," #e "]}"
#define UNET "model.diffusion_model."

static const char *const headers[] = {
    "{\"__metadata__\":{\"format\":\"pt\"}," ONE("a", "[2,3]", 0, 12) "," ONE(
        "b", "[]", 12, 14) "," ONE("c", "[0]", 14, 14) "}",
    "{" ONE(UNET "input_blocks.0.0.weight", "[4,4,3,3]", 0, 288) "," ONE(
        UNET "input_blocks.1.0.out_layers.3.weight", "[4,4,3,3]", 288,
        576) "," ONE(UNET "output_blocks.0.0.in_layers.0.weight", "[8]", 576,
                     592) "," ONE(UNET "output_blocks.1.0.in_layers.0.weight", "[8]", 592,
                                  608) "," ONE(UNET "out.2.weight", "[4,4,3,3]", 608,
                                               896) "," ONE(UNET "time_embed.0.weight", "[16,4]",
                                                            896,
                                                            1024) "," ONE("cond_stage_model."
                                                                          "transformer.text_model."
                                                                          "embeddings.token_"
                                                                          "embedding.weight",
                                                                          "[10,4]", 1024, 1104) "}",
    "{" ONE("first_stage_model.decoder.conv_in.weight", "[4,4,3,3]", 0, 288) "," ONE(
        "first_stage_model.decoder.mid.block_1.conv1.weight", "[4,4,3,3]", 288,
        576) "," ONE("first_stage_model.encoder.down.0.block.0.conv2.weight", "[4,4,3,3]", 576,
                     864) "," ONE("first_stage_model.decoder.conv_out.weight", "[3,4,3,3]", 864,
                                  1080) "}",
    ("{\"q\":{\"dtype\":\"F8_E4M3\",\"shape\":[3,4],\"data_offsets\":[0,12]},\"r\":{\"dtype\":"
     "\"I64\",\"shape\":[1],\"data_offsets\":[16,24]},"
     "\"s\":{\"dtype\":\"BF16\",\"shape\":[1,1,2,2],\"data_offsets\":[24,32]},\"t\":{\"dtype\":"
     "\"F64\",\"shape\":[2],\"data_offsets\":[32,48]}}"),
};

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    return seed_mutate(data, size, max_size, seed, headers, IPT_COUNT(headers));
}

static void use_tensor(ipt_ctx *ctx, const ipt_safetensors *st, const ipt_st_tensor *t)
{
    char text[96];
    float values[16];
    size_t bad = 0, n = t->count < 16 ? t->count : 16;
    ipt_weights *w = NULL;
    REQUIRE(ipt_safetensors_find(st, t->name) == t);
    ipt_st_shape_text(t, text, sizeof text);
    ipt_st_to_f32(t, t->count - n, n, values);
    if (!ipt_st_finite(t, &bad))
        REQUIRE(bad < t->count);
    ipt_st_release(t);
    if (t->rank > 2 || t->rank < 1 || t->count > 4096 || t->count == 0)
        return;
    ipt_shape s = t->rank == 1 ? ipt_shape1(IPT_F32, (int32_t)t->dim[0])
                               : ipt_shape2(IPT_F32, (int32_t)t->dim[0], (int32_t)t->dim[1]);
    double *out = calloc(t->count, sizeof *out);
    if (out && ipt_weights_file(ctx, st, NULL, IPT_F32, NULL, &w) == IPT_OK)
        (void)!w->read(w, t->name, &s, out); /* fails for NaN */
    ipt_weights_destroy(&w);
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    ipt_safetensors *st = NULL;
    if (ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 0;
    if (ipt_safetensors_open_memory(ctx, "fuzz", data, size, &st) == IPT_OK) {
        ipt_model_config cfg = {0};
        ipt_source src[IPT_COMP_COUNT] = {0};
        ipt_vae_config vae;
        const uint8_t *end = NULL;
        for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
            const ipt_st_tensor *t = ipt_safetensors_at(st, i);
            REQUIRE(t->bytes == 0 || (t->data >= data && t->data + t->bytes <= data + size));
            REQUIRE(t->bytes == 0 || !end || t->data >= end);
            end = t->bytes ? t->data + t->bytes : end;
            use_tensor(ctx, st, t);
        }
        if (ipt_probe_checkpoint(ctx, st, &cfg, src) != IPT_OK)
            REQUIRE(ipt_last_error(ctx)[0] != '\0');
        (void)ipt_probe_vae(st, &vae, &src[IPT_COMP_VAE]);
    } else {
        REQUIRE(ipt_last_error(ctx)[0] != '\0');
    }
    ipt_safetensors_close(&st);
    ipt_ctx_destroy(&ctx);
    return 0;
}
