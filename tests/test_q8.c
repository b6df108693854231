/* tests/test_q8.c - weights in q8: the panels byte by byte, what is refused, and whole requests:
 * pictures beside f32, under memory limits, with adapters, gradients.  The products themselves are
 * test_ops's (modes q8). */
#include "tests/golden.h"

#include "engine/internal.h"
#include "model_io/internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DATA IPT_TEST_DATA
#define DEFAULT IPT_SOURCE_DIR "/models/default"
#define LORAS IPT_SOURCE_DIR "/models/loras/"
enum { MOST = 128, BYTES = MOST * MOST * 3 };

/* --- panels ----------------------------------------------------------------------------------- */
/* Byte by byte as graph.h describes them: where a value lies, and what it is of its 32. */
static void check_q8_panels(const ipt_shape *s, const float *w)
{
    const size_t in = (size_t)s->dim[s->rank - 1], out = (size_t)s->dim[0],
                 kh = s->rank == 4 ? (size_t)s->dim[1] : 1,
                 kw = s->rank == 4 ? (size_t)s->dim[2] : 1, depth = kh * kw * in,
                 panels = (out + 31) / 32, bytes = (panels * depth / 32 + 1) * (64 + 1024);
    const ipt_panel_src src = {
        .data = w, .type = IPT_PANEL_F32, .so = depth, .si = 1, .sx = in, .sy = kw * in};
    uint8_t *got = malloc(bytes);
    float *back = calloc(depth * out, sizeof *back);
    assert_true(got && back);
    memset(got, 0xa5, bytes);
    assert_true(ipt_panel_bytes(s, IPT_Q8) == bytes);
    ipt_panel_pack(s, &src, IPT_Q8, got);
    ipt_panel_unpack(s, IPT_Q8, got, back);
    for (size_t o = 0; o < panels * 32; o++)
        for (size_t k = 0; k < depth; k++) {
            const uint8_t *block = got + (o / 32 * (depth / 32) + k / 32) * 1088;
            uint16_t scale;
            double top = 0, v = o < out ? (double)w[o * depth + k] : 0;
            for (size_t i = k / 32 * 32; o < out && i < k / 32 * 32 + 32; i++)
                top = fmax(top, fabs((double)w[o * depth + i]));
            memcpy(&scale, block + 2 * (o % 32), 2);
            assert_int_equal(scale, ipt_f32_to_f16((float)top / 127.0F));
            const double d = (double)ipt_f16_to_f32(scale);
            const double q =
                d > 0 ? fmax(-127, fmin(127, round((double)((float)v / (float)d)))) : 0;
            const int8_t have = (int8_t)block[64 + (k % 32 / 4 * 32 + o % 32) * 4 + k % 4];
            if (have != (int)q)
                fail_msg("output %zu, depth %zu: %d for %g / %g", o, k, have, v, d);
            if (o < out)
                assert_true((double)back[k * out + o] == q * d);
        }
    for (size_t i = bytes - 1088; i < bytes; i++)
        assert_int_equal(got[i], 0);
    free(got);
    free(back);
}

static void panels(void **state)
{
    static const ipt_shape shapes[] = {{{1, 32, 1, 1}, 2, IPT_F32},
                                       {{33, 96, 1, 1}, 2, IPT_F32},
                                       {{31, 3, 3, 32}, 4, IPT_F32},
                                       {{70, 3, 2, 64}, 4, IPT_F32}};
    (void)state;
    for (size_t i = 0; i < IPT_COUNT(shapes); i++) {
        const size_t n = ipt_shape_count(&shapes[i]);
        uint64_t rng = 3 + i;
        float *w = calloc(n, sizeof *w), *rounded = calloc(n, sizeof *rounded);
        assert_true(w && rounded);
        for (size_t k = 0; k < n; k++) /* blocks of all sizes, down to what f16 rounds to zero */
            w[k] = k / 32 % 7 == 3 ? 0 : ipt_rng_normal(&rng) * ldexpf(1, -(int)(k / 32 % 31));
        check_q8_panels(&shapes[i], w);
        memcpy(rounded, w, n * sizeof *w);
        ipt_q8_round(rounded, n);
        float *again = calloc(n, sizeof *again),
              *packed = malloc(ipt_panel_bytes(&shapes[i], IPT_Q8));
        assert_true(again && packed);
        const size_t in = (size_t)shapes[i].dim[shapes[i].rank - 1], out = (size_t)shapes[i].dim[0];
        const ipt_panel_src src = {.data = w,
                                   .type = IPT_PANEL_F32,
                                   .so = n / out,
                                   .si = 1,
                                   .sx = in,
                                   .sy = in * (size_t)(shapes[i].rank == 4 ? shapes[i].dim[2] : 1)};
        ipt_panel_pack(&shapes[i], &src, IPT_Q8, packed);
        ipt_panel_unpack(&shapes[i], IPT_Q8, packed, again);
        for (size_t k = 0; k < n; k++)
            assert_true(rounded[k] == again[k % (n / out) * out + k / (n / out)]);
        free(w);
        free(rounded);
        free(again);
        free(packed);
    }
}

/* What q8 cannot hold is refused by name, and nothing of it reaches the device. */
static void refused_values(void **state)
{
    static const struct {
        float bad;
        ipt_use use;
        ipt_status status;
        const char *says;
    } all[] = {
        {NAN, IPT_USE_PANEL, IPT_ERR_FORMAT, "key 'a': element 40 is NaN, expected finite numbers"},
        {-INFINITY, IPT_USE_PANEL, IPT_ERR_FORMAT, "key 'a': element 40 is infinite"},
        {NAN, IPT_USE_BACK, IPT_ERR_FORMAT, "key 'a': element 40 is NaN"},
        {-8.4e6F, IPT_USE_PANEL, IPT_ERR_UNSUPPORTED, "value 8.4e+06 does not fit q8; use"},
        {8.3e6F, IPT_USE_PANEL, IPT_OK, NULL}, /* the scale is what has to fit */
        {8.3e6F, IPT_USE_BACK, IPT_ERR_UNSUPPORTED, "value 8.3e+06 does not fit f16; use"},
        {65500, IPT_USE_BACK, IPT_ERR_UNSUPPORTED, "value 65500 does not fit f16; use"},
        {65400, IPT_USE_BACK, IPT_OK, NULL},
    };
    static const char header[] =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,32],\"data_offsets\":[0,256]}}";
    const ipt_shape s = ipt_shape2(IPT_F32, 2, 32);
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    (void)state;
    for (size_t i = 0; i < IPT_COUNT(all); i++) {
        const uint64_t n_header = sizeof header - 1;
        const size_t n = 8 + (size_t)n_header + 256;
        uint8_t *p = calloc(1, n);
        assert_non_null(p);
        memcpy(p, &n_header, 8);
        memcpy(p + 8, header, (size_t)n_header);
        ipt_safetensors *st = NULL;
        ipt_weights *w = NULL;
        ipt_weight_view v;
        memcpy(p + n - 256 + 4 * 40, &all[i].bad, 4);
        assert_ok(ctx, ipt_safetensors_open_memory(ctx, "n.safetensors", p, n, &st));
        assert_ok(ctx, ipt_weights_file(ctx, st, gpu, IPT_Q8, NULL, &w));
        assert_int_equal(w->find(w, "a", &s, all[i].use, &v), all[i].status);
        if (all[i].says && !strstr(ipt_last_error(ctx), all[i].says))
            fail_msg("%s", ipt_last_error(ctx));
        assert_true((ipt_weights_device_bytes(w) > 0) == (all[i].status == IPT_OK));
        ipt_weights_destroy(&w);
        ipt_safetensors_close(&st);
        free(p);
    }
    test_gpu_done(&gpu, &ctx);
}

/* q8 weights stay what the file says: they take no adapters in. */
static void no_changes(void **state)
{
    const ipt_shape s = ipt_shape2(IPT_F32, 8, 32);
    const float factor[4 * 32] = {0};
    const double values[8 * 32] = {0};
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    ipt_weights *w = NULL;
    ipt_weight_view v;
    (void)state;
    assert_ok(ctx, ipt_weights_random(ctx, gpu, IPT_Q8, 7, &w));
    assert_ok(ctx, w->find(w, "x.weight", &s, IPT_USE_PANEL, &v));
    assert_int_equal(ipt_weights_add(w, "x.weight", factor, factor, 4), IPT_ERR_UNSUPPORTED);
    assert_int_equal(ipt_weights_replace(w, "x.weight", values), IPT_ERR_UNSUPPORTED);
    ipt_weights_destroy(&w);
    test_gpu_done(&gpu, &ctx);
}

/* Panels for gradients hold what the weight's own panels hold, rounded to f16 where those are q8.
 */
static void check_back(ipt_ctx *ctx, ipt_gpu *gpu, ipt_weights *w, const char *name,
                       const ipt_shape *s)
{
    const ipt_shape back = ipt_panel_back(s);
    const size_t count = ipt_shape_count(s), in = (size_t)s->dim[s->rank - 1],
                 out = (size_t)s->dim[0], taps = count / in / out;
    ipt_weight_view v[2];
    float *value[2];
    for (int k = 0; k < 2; k++) {
        assert_ok(ctx, w->find(w, name, s, k ? IPT_USE_BACK : IPT_USE_PANEL, &v[k]));
        uint8_t *raw = calloc(1, v[k].bytes);
        value[k] = calloc(count, sizeof(float));
        assert_true(raw && value[k]);
        assert_ok(ctx, ipt_buffer_read(gpu, v[k].buf, v[k].off, raw, v[k].bytes));
        ipt_panel_unpack(k ? &back : s, v[k].dtype, raw, value[k]);
        free(raw);
    }
    assert_int_equal(v[1].dtype, v[0].dtype == IPT_Q8 ? IPT_F16 : v[0].dtype);
    assert_true(v[1].is_q8 == (v[0].dtype == IPT_Q8));
    for (size_t t = 0; t < taps; t++)
        for (size_t i = 0; i < in; i++)
            for (size_t o = 0; o < out; o++) {
                float a = value[0][(t * in + i) * out + o],
                      b = value[1][((taps - 1 - t) * out + o) * in + i];
                if (v[0].dtype == IPT_Q8)
                    a = ipt_f16_to_f32(ipt_f32_to_f16(a));
                if (a != b)
                    fail_msg("%s: tap %zu, input %zu, output %zu: %g, for gradients %g", name, t, i,
                             o, (double)a, (double)b);
            }
    free(value[0]);
    free(value[1]);
}

static void gradient_panels(void **state)
{
    static const ipt_shape shapes[] = {
        {{33, 64, 1, 1}, 2, IPT_F32}, {{32, 30, 1, 1}, 2, IPT_F32}, {{9, 3, 2, 32}, 4, IPT_F32}};
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    (void)state;
    for (int q8 = 0; q8 < 2; q8++)
        for (size_t i = 0; i < IPT_COUNT(shapes); i++) {
            ipt_weights *w = NULL;
            assert_ok(ctx, ipt_weights_random(ctx, gpu, q8 ? IPT_Q8 : IPT_F16, 7, &w));
            check_back(ctx, gpu, w, "x.weight", &shapes[i]);
            ipt_weights_destroy(&w);
        }
    test_gpu_done(&gpu, &ctx);
}

/* --- requests --------------------------------------------------------------------------------- */
typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_report rep;
    int n_warning; /* of folding */
    char json[8192], trace[96];
    size_t n; /* bytes of the picture */
    uint8_t rgb[BYTES];
} fixture;

static void count_line(void *user, ipt_log_level level, const char *line)
{
    fixture *f = user;
    f->n_warning += level == IPT_LOG_WARN && strncmp(line, "fold always: q8", 15) == 0;
    if (level == IPT_LOG_ERROR)
        print_message("%s\n", line);
}

static fixture *open_engine(void)
{
    fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    assert_int_equal(ipt_ctx_create(count_line, f, &f->ctx), IPT_OK);
    f->engine = test_engine(&f->ctx, IPT_PRECISION_F32, 0);
    ipt_name(f->trace, sizeof f->trace, "/tmp/impasto-q8-%ld.safetensors", (long)getpid());
    return f;
}

static void close_engine(fixture *f)
{
    test_engine_done(&f->engine, &f->ctx);
    unlink(f->trace);
    free(f);
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    fixture *f = user;
    (void)text;
    assert_int_equal(index, 0);
    f->n = (size_t)im->w * (size_t)im->h * 3;
    assert_true(f->n <= BYTES);
    memcpy(f->rgb, im->rgb, f->n);
    ipt_name(f->json, sizeof f->json, "%s", json);
    return IPT_OK;
}

/* The picture of a request in a precision. */
static void draw(fixture *f, const ipt_request *r, const char *precision, uint8_t rgb[BYTES])
{
    ipt_request q = *r;
    q.precision = precision;
    assert_ok(f->ctx, ipt_generate(f->engine, &q, keep, f, &f->rep));
    memcpy(rgb, f->rgb, f->n);
}

static double psnr(const fixture *f, const uint8_t *a, const uint8_t *b)
{
    double sum = 0;
    for (size_t i = 0; i < f->n; i++)
        sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sum > 0 ? 10 * log10(255.0 * 255.0 * (double)f->n / sum) : 99;
}

static ipt_request request(const char *model, const char *prompt, int32_t side)
{
    ipt_request r;
    ipt_request_init(&r);
    r.model = model;
    r.prompt = prompt;
    r.width = r.height = side;
    r.steps = 4;
    r.seed = 11;
    return r;
}

/* q8 is not f32, near to it, and takes half of what f16 takes; a store of one precision is none of
 * another. */
static void pictures(void **state)
{
    static uint8_t f32[BYTES], q8[BYTES], f16[BYTES], again[BYTES];
    static const char *const prompts[] = {"a red apple, noto style, on a blue background",
                                          "a picture of a frog, fluent 3d style"};
    (void)state;
    fixture *f = open_engine();
    for (size_t i = 0; i < IPT_COUNT(prompts); i++) {
        ipt_request r = request(DEFAULT, prompts[i], MOST);
        draw(f, &r, "q8", q8);
        assert_non_null(strstr(f->json, "\"precision\":\"q8\""));
        assert_non_null(strstr(f->rep.precision, "q8 weights"));
        const uint64_t bytes = f->rep.unet_weight_bytes;
        draw(f, &r, "f16", f16);
        const double share = (double)bytes / (double)f->rep.unet_weight_bytes;
        draw(f, &r, "f32", f32);
        draw(f, &r, "q8", again);
        const double apart = psnr(f, f32, q8);
        print_message("  '%s': PSNR %.1f dB, %.3f of the bytes of f16\n", prompts[i], apart, share);
        assert_memory_equal(q8, again, f->n);
        assert_memory_not_equal(q8, f16, f->n);
        assert_true(apart >= 35 && apart < 99);
        assert_true(share > 0.53 && share < 0.56); /* 34 bytes for 64, and what is not in q8 */
    }
    close_engine(f);
}

/* Within less memory than the weights take: they come in anew in every run, as they were. */
static void within_limits(void **state)
{
    static uint8_t want[BYTES];
    const ipt_lora lora[] = {{LORAS "snowman.safetensors", 1, 1, "snowman", 0, 1, NULL, NULL},
                             {LORAS "pineapple.safetensors", 1, 1, "pineapple", 0, 1, NULL, NULL}};
    static const char *const opts[] = {"refine=1"};
    (void)state;
    fixture *f = open_engine();
    ipt_gpu *gpu = ipt_engine_gpu(f->engine);
    for (int i = 0; i < 3; i++) {
        ipt_request r = request(DEFAULT, "a quib snowman and a zorp pineapple", 32);
        uint64_t limit = UINT64_C(60) << 20; /* all fits; every buffer is what it asks for */
        int n_streamed = 0;
        r.steps = 2;
        r.vae_tile = -1;
        r.lora = lora;
        r.n_lora = i > 0 ? 2 : 0;
        r.compose = i > 1 ? "clora" : "merge";
        r.compose_opt = opts;
        r.n_compose_opt = i > 1;
        r.fold = "never";
        r.precision = "q8";
        ipt_status status = IPT_OK;
        for (int part = 0; status == IPT_OK; part++) {
            for (int k = 0; k < IPT_KEEP_MODELS; k++)
                ipt_loaded_drop(f->engine, &f->engine->model[k]);
            ipt_gpu_limit_memory(gpu, limit);
            f->engine->opts.vram_limit = limit;
            status = ipt_generate(f->engine, &r, keep, f, &f->rep);
            assert_true(ipt_gpu_peak_bytes(gpu) <= limit);
            if (part == 0) {
                assert_ok(f->ctx, status);
                memcpy(want, f->rgb, f->n);
                limit = ipt_gpu_peak_bytes(gpu);
            }
            limit -= f->rep.unet_weight_bytes / 4;
            n_streamed += status == IPT_OK && f->rep.unet_streamed_bytes > 0;
            assert_memory_equal(want, f->rgb, f->n);
        }
        assert_int_equal(status, IPT_ERR_DEVICE_MEM);
        print_message("  %s: %d limits with weights on their way\n", r.compose, n_streamed);
        assert_true(n_streamed > 0);
    }
    close_engine(f);
}

/* Adapters lie beside q8 weights, whatever is asked for, and leave no trace. */
static void adapters(void **state)
{
    static uint8_t plain[BYTES], f32[BYTES], q8[BYTES], always[BYTES];
    const ipt_lora lora = {LORAS "snowman.safetensors", 1, 1, NULL, 0, 1, NULL, NULL};
    (void)state;
    fixture *f = open_engine();
    ipt_request r = request(DEFAULT, "a quib snowman, fluent 3d style", MOST);
    draw(f, &r, "q8", plain);
    r.lora = &lora;
    r.n_lora = 1;
    r.fold = "never";
    draw(f, &r, "f32", f32);
    draw(f, &r, "q8", q8);
    assert_int_equal(f->n_warning, 0);
    r.fold = "always";
    draw(f, &r, "q8", always);
    assert_int_equal(f->n_warning, 1);
    assert_false(f->rep.is_folded);
    assert_memory_equal(q8, always, f->n);
    print_message("  LoRA: PSNR %.1f dB, %.1f dB from the picture without\n", psnr(f, f32, q8),
                  psnr(f, plain, q8));
    assert_true(psnr(f, f32, q8) >= 35);
    assert_true(psnr(f, plain, q8) < 30);
    r.n_lora = 0;
    r.fold = "auto";
    draw(f, &r, "q8", always);
    assert_memory_equal(plain, always, f->n);
    close_engine(f);
}

/* Every kind: what changes with the weights' own values (DoRA) reads the file's. */
static void kinds(void **state)
{
    static uint8_t f32[BYTES], q8[BYTES], plain[BYTES];
    static const char *const files[] = {
        "boft",      "dora",        "dora_in", "full",     "glora",     "ia3",       "ia3_in",
        "krona",     "locon",       "loha",    "lokr",     "norm",      "loha_dora", "loha_tucker",
        "lokr_dora", "lokr_tucker", "oft",     "oft_diag", "peft_dora", "peft_ia3",  "peft_lokr"};
    (void)state;
    fixture *f = open_engine();
    ipt_request r = request(DATA "/models/sd1", "a cat", 32);
    r.steps = 2;
    draw(f, &r, "q8", plain);
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        char path[512];
        const ipt_lora lora = {ipt_name(path, sizeof path, DATA "/kinds/%s.safetensors", files[i]),
                               0.8F,
                               0.8F,
                               NULL,
                               0,
                               1,
                               NULL,
                               NULL};
        r.lora = &lora;
        r.n_lora = 1;
        draw(f, &r, "f32", f32);
        draw(f, &r, "q8", q8);
        const double near = psnr(f, f32, q8), moved = psnr(f, plain, q8);
        if (!(near >= 35 && moved < near))
            fail_msg("%s: %.1f dB from f32, %.1f dB from the picture without", files[i], near,
                     moved);
    }
    close_engine(f);
}

/* The gradient of the latent: f32's but for the rounding of the weights. */
static void gradient(void **state)
{
    static uint8_t rgb[BYTES];
    const ipt_lora lora[] = {{LORAS "snowman.safetensors", 1, 1, "snowman", 0, 1, NULL, NULL},
                             {LORAS "pineapple.safetensors", 1, 1, "pineapple", 0, 1, NULL, NULL}};
    static const char *const opts[] = {"refine=0"}, *const precision[] = {"f32", "q8"};
    float *grad[2];
    size_t n[2];
    (void)state;
    fixture *f = open_engine();
    ipt_request r = request(DEFAULT, "a quib snowman and a zorp pineapple", 64);
    r.steps = 1;
    r.lora = lora;
    r.n_lora = 2;
    r.compose = "clora";
    r.compose_opt = opts;
    r.n_compose_opt = 1;
    r.trace = f->trace;
    for (int i = 0; i < 2; i++) {
        ipt_safetensors *st = NULL;
        draw(f, &r, precision[i], rgb);
        assert_ok(f->ctx, ipt_safetensors_open(f->ctx, f->trace, &st));
        grad[i] = golden_f32(f->ctx, st, "grad_step0", &n[i]);
        ipt_safetensors_close(&st);
    }
    const double apart = golden_nmse(grad[0], grad[1], n[0]);
    print_message("  gradient: NMSE %.2g\n", apart);
    assert_true(n[0] == n[1] && apart > 0);
    golden_at_most(apart, 1e-2, "gradient with q8 weights"); /* 2.5e-5 a layer, some tens of them */
    ipt_free(grad[0]);
    ipt_free(grad[1]);
    close_engine(f);
}

/* The check of every node against its reference knows what q8 holds. */
static void checked(void **state)
{
    static uint8_t rgb[BYTES];
    (void)state;
    fixture *f = open_engine();
    ipt_request r = request(DATA "/models/sd1", "a cat", 32);
    r.steps = 1;
    setenv("IPT_PLAN_CHECK", "1", 1);
    draw(f, &r, "q8", rgb);
    unsetenv("IPT_PLAN_CHECK");
    close_engine(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(panels),     cmocka_unit_test(refused_values),
        cmocka_unit_test(no_changes), cmocka_unit_test(gradient_panels),
        cmocka_unit_test(pictures),   cmocka_unit_test(within_limits),
        cmocka_unit_test(adapters),   cmocka_unit_test(kinds),
        cmocka_unit_test(gradient),   cmocka_unit_test(checked),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("q8", tests, NULL, NULL);
}
