/* tests/test_models_vae.c - VAE encoder moments and decoded pictures of every tiny model against
 * diffusers, on the host references and on a device with both kernel shapes. */
#include <math.h>
#include <string.h>

#include "tests/golden.h"
#include "vae/vae.h"

static const double MOMENTS = 1e-4; /* of the largest value */
static const double PICTURE = 1e-4; /* decoded values span 2: far below 1/255 of that */

static const char *const MODELS[] = {"sd1", "sd2", "sdxl", "lcm"};

/* dim: N,C,H,W of the input; out [N,H',W',out] after the permutation to NCHW. */
static void run_vae(bench *b, ipt_model *m, bool encode, const float *in, const int32_t dim[4],
                    const int32_t out_dim[4], float *out)
{
    const ipt_vae_config *c = &ipt_model_get_config(m)->vae;
    size_t n_in = (size_t)(dim[0] * dim[1] * dim[2] * dim[3]);
    size_t n_out = (size_t)(out_dim[0] * out_dim[1] * out_dim[2] * out_dim[3]);
    float *raw = ipt_calloc(b->ctx, n_out, sizeof *raw);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_VAE);
    ipt_graph *g = NULL;
    assert_non_null(raw);
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    if (encode)
        ipt_vae_encode_build(g, c, dim[0], dim[2], dim[3], b->act);
    else
        ipt_vae_decode_build(g, c, dim[0], dim[2], dim[3], b->act);
    ipt_plan *p = bench_plan(b, &g, w);
    assert_ok(b->ctx, ipt_plan_write(p, encode ? "picture" : "z", in, n_in * sizeof *in));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, encode ? "moments" : "rgb", raw, n_out * sizeof *raw));
    ipt_plan_destroy(&p);
    ipt_weights_destroy(&w);
    golden_to_nchw(raw, out_dim, out);
    ipt_free(raw);
}

static void check_encode(bench *b, ipt_model *m, const ipt_safetensors *st, double limit)
{
    int32_t dim[4], md[4];
    float *picture = golden_nhwc(b->ctx, st, "picture", dim);
    ipt_free(golden_nhwc(b->ctx, st, "mean", md));
    size_t half = (size_t)(md[1] * md[2] * md[3]);
    float *got = ipt_calloc(b->ctx, 2 * half, sizeof *got);
    float *mean = golden_f32(b->ctx, st, "mean", NULL),
          *logvar = golden_f32(b->ctx, st, "logvar", NULL);
    assert_non_null(got);
    assert_int_equal(md[0], 1); /* so that mean and log variance are halves of the result */
    md[1] *= 2;
    run_vae(b, m, true, picture, dim, md, got);
    double e[2] = {golden_max_rel(mean, got, half), golden_max_rel(logvar, got + half, half)};
    print_message("  %s mean %.2g, logvar %.2g\n", b->name, e[0], e[1]);
    golden_at_most(e[0], limit, "%s on %s: mean", ipt_safetensors_path(st), b->name);
    golden_at_most(e[1], limit, "%s on %s: logvar", ipt_safetensors_path(st), b->name);
    ipt_free(picture);
    ipt_free(mean);
    ipt_free(logvar);
    ipt_free(got);
}

static void check_decode(bench *b, ipt_model *m, const ipt_safetensors *st, double limit)
{
    int32_t dim[4], pd[4];
    float *z = golden_nhwc(b->ctx, st, "z", dim);
    ipt_free(golden_nhwc(b->ctx, st, "decoded", pd));
    size_t n = 0;
    float *want = golden_f32(b->ctx, st, "decoded", &n), *got = ipt_calloc(b->ctx, n, sizeof *got);
    assert_non_null(got);
    run_vae(b, m, false, z, dim, pd, got);
    double e = golden_max_diff(want, got, n);
    print_message("  %s decoded %.2g\n", b->name, e);
    golden_at_most(e, limit, "%s on %s: decoded", ipt_safetensors_path(st), b->name);
    ipt_free(z);
    ipt_free(want);
    ipt_free(got);
}

static void check_model(bench *b, const char *model, const char *path, const char *config,
                        double limit)
{
    char name[64];
    ipt_safetensors *st =
        golden_open(b->ctx, IPT_TEST_DATA, ipt_name(name, sizeof name, "golden_%s_vae", model));
    ipt_model *m = bench_model(b, path, config);
    check_encode(b, m, st, limit > 0 ? limit : MOMENTS);
    check_decode(b, m, st, limit > 0 ? limit : PICTURE);
    ipt_model_close(&m);
    ipt_safetensors_close(&st);
}

static void test_folders(void **state)
{
    bench *b = bench_ready(state);
    char path[1024];
    for (size_t i = 0; i < IPT_COUNT(MODELS); i++)
        check_model(b, MODELS[i], ipt_name(path, sizeof path, GOLDEN("models/%s"), MODELS[i]), NULL,
                    0);
}

static void test_single_files(void **state)
{
    bench *b = bench_ready(state);
    check_model(b, "sd1", GOLDEN("model_sd1_single_f16.safetensors"), GOLDEN("models/sd1"), 5e-3);
    check_model(b, "sd2", GOLDEN("model_sd2_single_f16.safetensors"), GOLDEN("models/sd2"), 5e-3);
    check_model(b, "sdxl", GOLDEN("model_sdxl_single_f16.safetensors"), GOLDEN("models/sdxl"),
                5e-3);
}

static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    check_model(b, "sd1", GOLDEN("models/sd1"), NULL, 3e-2);
    check_model(b, "sdxl", GOLDEN("models/sdxl"), NULL, 3e-2);
}

/* Encoding gives back the size that decoding came from. */
static void test_sizes(void **state)
{
    bench *b = bench_ready(state);
    ipt_model *m = bench_model(b, GOLDEN("models/sd1"), NULL);
    const ipt_vae_config *c = &ipt_model_get_config(m)->vae;
    int32_t f = ipt_vae_factor(c);
    ipt_graph *g = NULL;
    assert_int_equal(f, 2);
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_shape rgb = ipt_shape_of(g, ipt_vae_decode_build(g, c, 2, 3, 5, IPT_F32));
    assert_true(rgb.dim[0] == 2 && rgb.dim[1] == 3 * f && rgb.dim[2] == 5 * f && rgb.dim[3] == 3);
    ipt_graph_destroy(&g);
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_shape z = ipt_shape_of(g, ipt_vae_encode_build(g, c, 2, 3 * f, 5 * f, IPT_F32));
    assert_true(z.dim[0] == 2 && z.dim[1] == 3 && z.dim[2] == 5 &&
                z.dim[3] == 2 * c->latent_channels);
    ipt_graph_destroy(&g);
    ipt_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_half),
        cmocka_unit_test(test_single_files),
        cmocka_unit_test(test_sizes),
    };
    return bench_run_all(tests);
}
