/* tests/test_lora.c - whole requests with adapter files: text layers that clip skip leaves out. */
#include "tests/golden.h"

#include "engine/impasto.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    char trace[64], lora[64]; /* files of this process, removed at the end */
} fixture;

static fixture open_engine(void)
{
    fixture f = {.ctx = test_ctx()};
    ipt_engine_opts o = {
        .precision = IPT_PRECISION_F32, .validate = true, .device = getenv("IPT_TEST_DEVICE")};
    assert_ok(f.ctx, ipt_engine_create(f.ctx, &o, &f.engine));
    assert_ok(f.ctx, ipt_engine_open_device(f.engine)); /* fails, never skips, without a device */
    ipt_name(f.trace, sizeof f.trace, "/tmp/impasto-trace-%ld.safetensors", (long)getpid());
    ipt_name(f.lora, sizeof f.lora, "/tmp/impasto-lora-%ld.safetensors", (long)getpid());
    return f;
}

static void close_engine(fixture *f)
{
    uint32_t said = ipt_gpu_validation_count(ipt_engine_gpu(f->engine));
    ipt_engine_destroy(&f->engine);
    ipt_ctx_destroy(&f->ctx);
    unlink(f->trace);
    unlink(f->lora);
    assert_int_equal(said, 0);
}

static void small_request(const fixture *f, ipt_request *r, const char *model)
{
    ipt_request_init(r);
    r->model = model;
    r->prompt = "A photo of a cat, sks dog! It's 12 o'clock"; /* of the golden files */
    r->steps = 1;
    r->sampler = "euler";
    r->trace = f->trace;
}

/* A tensor of the last trace against one of a golden file. */
static void compare(fixture *f, const char *key, const ipt_safetensors *want, const char *want_key)
{
    ipt_safetensors *got = NULL;
    size_t n = 0, m = 0;
    assert_ok(f->ctx, ipt_safetensors_open(f->ctx, f->trace, &got));
    float *a = golden_f32(f->ctx, want, want_key, &n), *b = golden_f32(f->ctx, got, key, &m);
    assert_int_equal(n, m);
    golden_at_most(golden_max_rel(a, b, n), 1e-4, "%s", want_key);
    ipt_free(a);
    ipt_free(b);
    ipt_safetensors_close(&got);
}

/* SDXL never runs the last layer of its first text encoder, which adapter files do have. */
static void test_sdxl_leaves_out_a_layer(void **state)
{
    (void)state;
    fixture f = open_engine();
    ipt_lora l = {GOLDEN("golden_lora_sdxl_kohya.safetensors"), 0.8F, 0.5F, NULL, 0, 1, NULL};
    ipt_request r;
    small_request(&f, &r, GOLDEN("models/sdxl"));
    r.lora = &l;
    r.n_lora = 1;
    assert_ok(f.ctx, ipt_generate(f.engine, &r, NULL, NULL, NULL));
    ipt_safetensors *st = golden_open(f.ctx, IPT_TEST_DATA, "golden_lora_sdxl");
    compare(&f, "text", st, "text_lora");
    compare(&f, "pooled", st, "pooled_lora");
    ipt_safetensors_close(&st);
    close_engine(&f);
}

/* One module of rank 1 with constant factors. */
static void write_lora(fixture *f, const char *stem, int32_t out, int32_t in)
{
    enum { MOST = 64 };
    char key[2][200];
    float v[MOST];
    for (int i = 0; i < MOST; i++)
        v[i] = 0.5F;
    assert_true(out <= MOST && in <= MOST);
    ipt_name(key[0], sizeof key[0], "%s.lora_down.weight", stem);
    ipt_name(key[1], sizeof key[1], "%s.lora_up.weight", stem);
    const ipt_st_write t[2] = {{key[0], IPT_ST_F32, 2, {1, in}, v},
                               {key[1], IPT_ST_F32, 2, {out, 1}, v}};
    assert_ok(f->ctx, ipt_safetensors_write(f->ctx, f->lora, t, 2, NULL, 0));
}

/* An adapter of which clip skip leaves out everything changes nothing and fails nothing. */
static void test_every_layer_skipped(void **state)
{
    (void)state;
    fixture f = open_engine();
    ipt_lora l = {f.lora, 1, 1, NULL, 0, 1, NULL};
    ipt_safetensors *plain = NULL, *st = NULL;
    ipt_request r;
    size_t n = 0, m = 0;
    char keep[80];
    write_lora(&f, "lora_te_text_model_encoder_layers_4_mlp_fc2", 16, 37);
    small_request(&f, &r, GOLDEN("models/sd1"));
    ipt_name(keep, sizeof keep, "%s.plain", f.trace);
    for (int skip = 2; skip > 0; skip--) { /* at 2 the same text, at 1 another */
        r.clip_skip = skip;
        r.trace = keep;
        r.n_lora = 0;
        assert_ok(f.ctx, ipt_generate(f.engine, &r, NULL, NULL, NULL));
        r.trace = f.trace;
        r.lora = &l;
        r.n_lora = 1;
        assert_ok(f.ctx, ipt_generate(f.engine, &r, NULL, NULL, NULL));
        assert_ok(f.ctx, ipt_safetensors_open(f.ctx, keep, &plain));
        assert_ok(f.ctx, ipt_safetensors_open(f.ctx, f.trace, &st));
        float *a = golden_f32(f.ctx, plain, "text", &n), *b = golden_f32(f.ctx, st, "text", &m);
        assert_int_equal(n, m);
        assert_int_equal(memcmp(a, b, n * sizeof *a) == 0, skip == 2);
        ipt_free(a);
        ipt_free(b);
        ipt_safetensors_close(&plain);
        ipt_safetensors_close(&st);
    }
    unlink(keep);
    close_engine(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sdxl_leaves_out_a_layer),
        cmocka_unit_test(test_every_layer_skipped),
    };
    return cmocka_run_group_tests_name("lora", tests, NULL, NULL);
}
