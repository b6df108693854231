/* tests/test_models_unet.c - one UNet evaluation of every tiny model against diffusers, on the host
 * references and on a device with both kernel shapes; single files of every data type. */
#include <math.h>
#include <string.h>

#include "tests/golden.h"
#include "unet/unet.h"

static const double NMSE = 1e-8, NMSE_F16 = 2e-5; /* the second is about 47 dB */

/* Folders, and single files whose configuration is that of the folder. */
static const struct source {
    const char *model, *path, *config;
} FOLDERS[] = {
    {"sd1", GOLDEN("models/sd1"), NULL},
    {"sd2", GOLDEN("models/sd2"), NULL},
    {"sdxl", GOLDEN("models/sdxl"), NULL},
    {"lcm", GOLDEN("models/lcm"), NULL},
};

static void check_case(bench *b, ipt_model *m, ipt_weights *w, const ipt_safetensors *st,
                       const char *model, const char *suffix, double limit)
{
    unet_case k;
    char name[32];
    unet_case_load(b, st, &ipt_model_get_config(m)->unet, suffix, "context", &k);
    float *want = golden_nhwc(b->ctx, st, ipt_name(name, sizeof name, "eps%s", suffix), NULL);
    float *got = ipt_calloc(b->ctx, k.count, sizeof *got);
    assert_non_null(got);
    unet_eval(b, m, w, &k.call, got);
    double e = golden_nmse(want, got, k.count);
    print_message("  %s %s eps%s: NMSE %.2g\n", b->name, model, suffix, e);
    golden_at_most(e, limit, "%s eps%s on %s: NMSE", model, suffix, b->name);
    ipt_free(got);
    ipt_free(want);
    unet_case_free(&k);
}

static void check_folder(bench *b, const struct source *s, double limit)
{
    char name[64];
    ipt_safetensors *st =
        golden_open(b->ctx, IPT_TEST_DATA, ipt_name(name, sizeof name, "golden_%s_unet", s->model));
    ipt_model *m = bench_model(b, s->path, s->config);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
    check_case(b, m, w, st, s->model, "", limit);
    check_case(b, m, w, st, s->model, "_odd", limit);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
    ipt_safetensors_close(&st);
}

static void test_folders(void **state)
{
    bench *b = bench_ready(state);
    for (size_t i = 0; i < IPT_COUNT(FOLDERS); i++)
        check_folder(b, &FOLDERS[i], NMSE);
}

/* Panels in f16, then activations in f16 as well. */
static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = IPT_F16;
    check_folder(b, &FOLDERS[0], NMSE_F16);
    check_folder(b, &FOLDERS[2], NMSE_F16);
    b->act = IPT_F16;
    for (size_t i = 0; i < IPT_COUNT(FOLDERS); i++)
        check_folder(b, &FOLDERS[i], NMSE_F16);
}

/* A row of a batch is what the row alone gives, to rounding; and the same rows give the same bytes.
 */
static void test_rows(void **state)
{
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_sd1_unet");
    ipt_model *m = bench_model(b, GOLDEN("models/sd1"), NULL);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
    unet_case k;
    unet_case_load(b, st, &ipt_model_get_config(m)->unet, "_odd", "context", &k);
    size_t one = k.count / (size_t)k.call.n, text = (size_t)k.call.tokens * 16;
    float *both = ipt_calloc(b->ctx, k.count, sizeof *both),
          *again = ipt_calloc(b->ctx, k.count, sizeof *again);
    float *row = ipt_calloc(b->ctx, one, sizeof *row);
    assert_true(both && again && row);
    k.call.t[1] = 999; /* every row has its own time step */
    unet_eval(b, m, w, &k.call, both);
    unet_eval(b, m, w, &k.call, again);
    assert_memory_equal(both, again, k.count * sizeof *both);
    for (size_t i = 0; i < 2; i++) {
        unet_call c = k.call;
        c.n = 1;
        c.t[0] = k.call.t[i];
        c.x += i * one;
        c.text += i * text;
        unet_eval(b, m, w, &c, row);
        golden_at_most(golden_nmse(row, both + i * one, one), 1e-12,
                       "row %zu of a batch on %s: NMSE", i, b->name);
    }
    ipt_free(both);
    ipt_free(again);
    ipt_free(row);
    unet_case_free(&k);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
    ipt_safetensors_close(&st);
}

/* models/sd1 rounded to each type, against diffusers with the same rounded values. */
static void test_dtypes(void **state)
{
    static const struct {
        const char *path, *want;
    } files[] = {
        {GOLDEN("model_sd1_single_f16.safetensors"), "eps_f16"},
        {GOLDEN("model_sd1_single_bf16.safetensors"), "eps_bf16"},
        {GOLDEN("model_sd1_single_fp8.safetensors"), "eps_fp8"},
        {GOLDEN("models/sd1"), "eps_f32"},
    };
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_sd1_dtypes");
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        unet_case k;
        ipt_model *m = bench_model(b, files[i].path, i < 3 ? GOLDEN("models/sd1") : NULL);
        ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
        unet_case_load(b, st, &ipt_model_get_config(m)->unet, "", "context", &k);
        float *want = golden_nhwc(b->ctx, st, files[i].want, NULL);
        float *got = ipt_calloc(b->ctx, k.count, sizeof *got);
        assert_non_null(got);
        unet_eval(b, m, w, &k.call, got);
        golden_at_most(golden_nmse(want, got, k.count), NMSE, "%s on %s: NMSE", files[i].want,
                       b->name);
        ipt_free(got);
        ipt_free(want);
        unet_case_free(&k);
        ipt_weights_destroy(&w);
        ipt_model_close(&m);
    }
    ipt_safetensors_close(&st);
}

/* The f16 single files of SD 2 and SDXL give what their folders give, to the rounding of the file.
 */
static void test_single_files(void **state)
{
    static const struct source files[] = {
        {"sd2", GOLDEN("model_sd2_single_f16.safetensors"), GOLDEN("models/sd2")},
        {"sdxl", GOLDEN("model_sdxl_single_f16.safetensors"), GOLDEN("models/sdxl")},
    };
    bench *b = bench_ready(state);
    for (size_t i = 0; i < IPT_COUNT(files); i++)
        check_folder(b, &files[i], 1e-5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_folders),      cmocka_unit_test(test_rows),
        cmocka_unit_test(test_dtypes),       cmocka_unit_test(test_half),
        cmocka_unit_test(test_single_files),
    };
    return bench_run_all(tests);
}
