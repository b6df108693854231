/* tests/test_models_lora.c - adapter files of every family on the tiny models, applied beside the
 * weights by gates, against weights that were merged in Python: UNet and text encoders, several
 * adapters at once, another adapter in every row of a batch, none at all. */
#include <math.h>
#include <string.h>

#include "tests/golden_adapters.h"

static const double NMSE = 1e-8, NMSE_F16 = 2e-5, TEXT = 1e-4;
static const float WEIGHT = 0.8F, TEXT_WEIGHT = 0.5F; /* of the golden files */

/* One row of the golden file with the files opened so far. */
static void check_unet(adapters *k, const ipt_safetensors *st, const float *gates,
                       const char *want_key, double limit)
{
    bench *b = k->b;
    unet_case c;
    unet_case_load(b, st, &ipt_model_get_config(k->m)->unet, "", "text_base", &c);
    float *want = golden_nhwc(b->ctx, st, want_key, NULL),
          *got = ipt_calloc(b->ctx, c.count, sizeof *got);
    assert_non_null(got);
    adapters_unet(k, &c.call, gates, got);
    double e = golden_nmse(want, got, c.count);
    print_message("  %s %s: NMSE %.2g\n", b->name, want_key, e);
    golden_at_most(e, limit, "%s on %s: NMSE", want_key, b->name);
    ipt_free(want);
    ipt_free(got);
    unet_case_free(&c);
}

static const char *adapter_path(const char *name, char *path, size_t n)
{
    return strcmp(name, "peft_folder") == 0
               ? GOLDEN("golden_lora_peft_folder")
               : ipt_name(path, n, GOLDEN("golden_lora_%s.safetensors"), name);
}

static void test_families(void **state)
{
    static const struct {
        const char *name;
        ipt_adapter_family family;
    } files[] = {
        {"kohya", IPT_ADAPTER_KOHYA},         {"locon", IPT_ADAPTER_KOHYA},
        {"locon_cp", IPT_ADAPTER_KOHYA},      {"attnprocs", IPT_ADAPTER_ATTN_PROCS},
        {"diffusers", IPT_ADAPTER_DIFFUSERS}, {"peft", IPT_ADAPTER_PEFT},
        {"peft_metadata", IPT_ADAPTER_PEFT},  {"peft_folder", IPT_ADAPTER_PEFT},
    };
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_lora_sd1");
    adapters k;
    char path[1024], key[64];
    adapters_open(&k, b, GOLDEN("models/sd1"));
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        adapters_add(&k, adapter_path(files[i].name, path, sizeof path));
        assert_int_equal(k.file[0]->family, files[i].family);
        assert_int_equal(k.file[0]->has_tucker, strcmp(files[i].name, "locon_cp") == 0);
        check_unet(&k, st, &WEIGHT, ipt_name(key, sizeof key, "eps_%s", files[i].name), NMSE);
        adapters_drop(&k);
    }
    adapters_close(&k);
    ipt_safetensors_close(&st);
}

/* Two adapters in one plan: the ranks are stacked and each has its own gate. */
static void test_two(void **state)
{
    static const float gates[2] = {0.7F, -0.4F};
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_lora_sd1");
    adapters k;
    adapters_open(&k, b, GOLDEN("models/sd1"));
    adapters_add(&k, GOLDEN("golden_lora_kohya.safetensors"));
    adapters_add(&k, GOLDEN("golden_lora_locon.safetensors"));
    check_unet(&k, st, gates, "eps_two", NMSE);
    adapters_close(&k);
    ipt_safetensors_close(&st);
}

/* Three rows with the same input, another adapter in each; then with gates 0 what the model without
 * adapters gives, byte for byte. */
static void check_rows(bench *b, double limit)
{
    enum { ROWS = 3 };
    const float W = WEIGHT, gates[ROWS * ROWS] = {W, 0, 0, 0, W, 0, 0, 0, W},
                off[ROWS * ROWS] = {0};
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_lora_sd1");
    adapters k;
    unet_case c;
    adapters_open(&k, b, GOLDEN("models/sd1"));
    adapters_add(&k, GOLDEN("golden_lora_kohya.safetensors"));
    adapters_add(&k, GOLDEN("golden_lora_locon.safetensors"));
    adapters_add(&k, GOLDEN("golden_lora_peft.safetensors"));
    unet_case_load(b, st, &ipt_model_get_config(k.m)->unet, "", "text_base", &c);
    size_t text = 77 * 16;
    float *x = ipt_calloc(b->ctx, ROWS * c.count, sizeof *x),
          *t = ipt_calloc(b->ctx, ROWS * text, sizeof *t);
    float *got = ipt_calloc(b->ctx, ROWS * c.count, sizeof *got),
          *base = ipt_calloc(b->ctx, ROWS * c.count, sizeof *base);
    float *want = golden_nhwc(b->ctx, st, "eps_composite", NULL);
    unet_call call = c.call;
    assert_true(x && t && got && base);
    for (size_t i = 0; i < ROWS; i++) {
        memcpy(x + i * c.count, c.call.x, c.count * sizeof *x);
        memcpy(t + i * text, c.call.text, text * sizeof *t);
        call.t[i] = c.call.t[0];
    }
    call.n = ROWS;
    call.x = x;
    call.text = t;
    adapters_unet(&k, &call, gates, got);
    for (size_t i = 0; i < ROWS; i++)
        golden_at_most(golden_nmse(want + i * c.count, got + i * c.count, c.count), limit,
                       "row %zu on %s: NMSE", i, b->name);
    adapters_unet(&k, &call, off, got);
    ipt_weights *w = bench_weights(b, k.m, IPT_COMP_UNET);
    unet_eval(b, k.m, w, &call, base);
    assert_memory_equal(got, base, ROWS * c.count * sizeof *got);
    ipt_weights_destroy(&w);
    ipt_free(x);
    ipt_free(t);
    ipt_free(got);
    ipt_free(base);
    ipt_free(want);
    unet_case_free(&c);
    adapters_close(&k);
    ipt_safetensors_close(&st);
}

static void test_rows(void **state) { check_rows(bench_ready(state), NMSE); }

static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    check_rows(b, NMSE_F16);
}

static void compare_text(bench *b, const ipt_safetensors *st, const char *key, const float *got)
{
    size_t n = 0;
    float *want = golden_f32(b->ctx, st, key, &n);
    golden_at_most(golden_max_rel(want, got, n), TEXT, "%s on %s: largest error", key, b->name);
    ipt_free(want);
}

static void test_text(void **state)
{
    static const char *const files[] = {"kohya", "attnprocs", "diffusers", "peft", "peft_metadata"};
    const ipt_text_key key = {.batch = 1, .tokens = 77, .final_norm = true, .act = IPT_F32};
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_lora_sd1");
    int32_t *ids = golden_i32(b->ctx, st, "ids", NULL);
    float text[77 * 16];
    adapters k;
    char path[1024], name[64];
    adapters_open(&k, b, GOLDEN("models/sd1"));
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        adapters_add(&k, adapter_path(files[i], path, sizeof path));
        adapters_text(&k, IPT_COMP_TEXT, &key, &TEXT_WEIGHT, ids, text, NULL);
        compare_text(b, st, ipt_name(name, sizeof name, "text_%s", files[i]), text);
        adapters_drop(&k);
    }
    adapters_close(&k);
    ipt_free(ids);
    ipt_safetensors_close(&st);
}

/* SDXL: sgm names in the file, two text encoders side by side, pooled text. */
static void test_sdxl(void **state)
{
    enum { W1 = 8, W2 = 12 };
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_lora_sdxl");
    int32_t *ids = golden_i32(b->ctx, st, "ids", NULL),
            *ids_2 = golden_i32(b->ctx, st, "ids_2", NULL);
    ipt_text_key key = {.batch = 1, .tokens = 77, .skip = 1, .act = IPT_F32};
    float one[77 * W1], two[77 * W2], both[77 * (W1 + W2)], pooled[10];
    adapters k;
    adapters_open(&k, b, GOLDEN("models/sdxl"));
    adapters_add(&k, GOLDEN("golden_lora_sdxl_kohya.safetensors"));
    check_unet(&k, st, &WEIGHT, "eps_lora", NMSE);
    adapters_text(&k, IPT_COMP_TEXT, &key, &TEXT_WEIGHT, ids, one, NULL);
    key.pooled = true;
    adapters_text(&k, IPT_COMP_TEXT2, &key, &TEXT_WEIGHT, ids_2, two, pooled);
    for (int t = 0; t < 77; t++) {
        memcpy(both + t * (W1 + W2), one + t * W1, W1 * sizeof *both);
        memcpy(both + t * (W1 + W2) + W1, two + t * W2, W2 * sizeof *both);
    }
    compare_text(b, st, "text_lora", both);
    compare_text(b, st, "pooled_lora", pooled);
    adapters_close(&k);
    ipt_free(ids);
    ipt_free(ids_2);
    ipt_safetensors_close(&st);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_families), cmocka_unit_test(test_two),  cmocka_unit_test(test_rows),
        cmocka_unit_test(test_half),     cmocka_unit_test(test_text), cmocka_unit_test(test_sdxl),
    };
    return bench_run_all(tests);
}
