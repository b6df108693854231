/* tests/test_lora.c - whole requests with adapter files: text layers that clip skip leaves out,
 * words inside the files. */
#include "tests/golden.h"

#include "engine/impasto.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEXT = 77 * 16 }; /* values of the tiny SD 1 model's text */

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    char trace[64], lora[64]; /* files of this process, removed at the end */
} fixture;

static fixture open_engine(void)
{
    fixture f = {.ctx = test_ctx()};
    f.engine = test_engine(&f.ctx, IPT_PRECISION_F32, 0);
    ipt_name(f.trace, sizeof f.trace, "/tmp/impasto-trace-%ld.safetensors", (long)getpid());
    ipt_name(f.lora, sizeof f.lora, "/tmp/impasto-lora-%ld.safetensors", (long)getpid());
    return f;
}

static void close_engine(fixture *f)
{
    unlink(f->trace);
    unlink(f->lora);
    test_engine_done(&f->engine, &f->ctx);
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
    ipt_lora l = {GOLDEN("golden_lora_sdxl_kohya.safetensors"), 0.8F, 0.5F, NULL, 0, 1, NULL, NULL};
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

/* Files that diffusers saved with metadata (old and new keys, rank and alpha patterns,
 * rank-stabilised scaling, text encoders) at every clip skip: latents beside PEFT in memory. */
static void test_patterns(void **state)
{
    (void)state;
    static const struct {
        const char *model;
        int w, h, skip[3];
    } rows[] = {{"sd1", 32, 24, {0, 1, 2}}, {"sdxl", 40, 24, {0, 2, 3}}};
    fixture f = open_engine();
    ipt_safetensors *st = golden_open(f.ctx, IPT_TEST_DATA, "golden_lora_patterns"), *got = NULL;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        char model[512], lora[512], key[64];
        ipt_lora l = {lora, 1, 1, NULL, 0, 1, NULL, NULL};
        ipt_request r;
        ipt_name(model, sizeof model, IPT_TEST_DATA "/models/%s", rows[i].model);
        ipt_name(lora, sizeof lora, IPT_TEST_DATA "/golden_lora_%s_patterns.safetensors",
                 rows[i].model);
        small_request(&f, &r, model);
        r.prompt = ipt_safetensors_meta(st, "prompt");
        r.negative = ipt_safetensors_meta(st, "negative");
        r.steps = 3;
        r.cfg = 5;
        r.seed = 11;
        r.width = rows[i].w;
        r.height = rows[i].h;
        r.lora = &l;
        r.n_lora = 1;
        for (int k = 0; k < 3; k++) {
            size_t n = 0, m = 0;
            r.clip_skip = rows[i].skip[k];
            assert_ok(f.ctx, ipt_generate(f.engine, &r, NULL, NULL, NULL));
            assert_ok(f.ctx, ipt_safetensors_open(f.ctx, f.trace, &got));
            ipt_name(key, sizeof key, "%s.skip%d", rows[i].model, r.clip_skip);
            float *a = golden_f32(f.ctx, st, key, &n),
                  *b = golden_f32(f.ctx, got, "latent_step2", &m);
            assert_int_equal(n, m);
            golden_at_most(golden_nmse(a, b, n), 1e-6, "%s", key);
            ipt_free(a);
            ipt_free(b);
            ipt_safetensors_close(&got);
        }
    }
    ipt_safetensors_close(&st);
    close_engine(&f);
}

/* One module of rank 1 with constant factors, and other tensors beside it. */
static void write_lora(fixture *f, const char *stem, int32_t out, int32_t in,
                       const ipt_st_write *more, size_t n_more)
{
    enum { MOST = 64 };
    char key[2][200];
    float v[MOST];
    ipt_st_write t[16];
    for (int i = 0; i < MOST; i++)
        v[i] = 0.5F;
    assert_true(out <= MOST && in <= MOST && n_more <= 14);
    ipt_name(key[0], sizeof key[0], "%s.lora_down.weight", stem);
    ipt_name(key[1], sizeof key[1], "%s.lora_up.weight", stem);
    t[0] = (ipt_st_write){key[0], IPT_ST_F32, 2, {1, in}, v};
    t[1] = (ipt_st_write){key[1], IPT_ST_F32, 2, {out, 1}, v};
    for (size_t i = 0; i < n_more; i++)
        t[i + 2] = more[i];
    assert_ok(f->ctx, ipt_safetensors_write(f->ctx, f->lora, t, n_more + 2, NULL, 0));
}

/* The text of one run, [77,16]: caller, ipt_free. */
static float *text_of(fixture *f, const ipt_request *r)
{
    ipt_safetensors *st = NULL;
    size_t n = 0;
    assert_ok(f->ctx, ipt_generate(f->engine, r, NULL, NULL, NULL));
    assert_ok(f->ctx, ipt_safetensors_open(f->ctx, r->trace, &st));
    float *text = golden_f32(f->ctx, st, "text", &n);
    assert_int_equal(n, TEXT);
    ipt_safetensors_close(&st);
    return text;
}

/* An adapter of which clip skip leaves out everything changes nothing and fails nothing. */
static void test_every_layer_skipped(void **state)
{
    (void)state;
    fixture f = open_engine();
    ipt_lora l = {f.lora, 1, 1, NULL, 0, 1, NULL, NULL};
    ipt_request r;
    write_lora(&f, "lora_te_text_model_encoder_layers_4_mlp_fc2", 16, 37, NULL, 0);
    small_request(&f, &r, GOLDEN("models/sd1"));
    r.lora = &l;
    for (int skip = 2; skip > 0; skip--) { /* at 2 the same text, at 1 another */
        r.clip_skip = skip;
        r.n_lora = 0;
        float *plain = text_of(&f, &r);
        r.n_lora = 1;
        float *text = text_of(&f, &r);
        assert_int_equal(golden_max_diff(plain, text, TEXT) <= 0, skip == 2);
        ipt_free(plain);
        ipt_free(text);
    }
    close_engine(&f);
}

/* Words inside an adapter file are found inside a prompt and beside each other; what a prompt does
 * not name may be of any shape. */
/* A trace that would replace what the request reads is refused before anything is written. */
static void test_trace_spares_inputs(void **state)
{
    (void)state;
    fixture f = open_engine();
    char *before = NULL, *after = NULL;
    size_t n = 0, m = 0;
    ipt_request r;
    ipt_lora lora = {.path = f.lora, .weight = 1, .te_weight = 1, .end = 1};
    assert_ok(f.ctx, ipt_file_read(f.ctx, IPT_TEST_DATA "/golden_lora_kohya.safetensors", 1 << 24,
                                   &before, &n));
    assert_ok(f.ctx, ipt_file_write(f.ctx, f.lora, before, n));
    small_request(&f, &r, IPT_TEST_DATA "/models/sd1");
    r.lora = &lora;
    r.n_lora = 1;
    r.trace = f.lora;
    assert_int_equal(ipt_generate(f.engine, &r, NULL, NULL, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f.ctx), "which the request reads"));
    assert_ok(f.ctx, ipt_file_read(f.ctx, f.lora, 1 << 24, &after, &m));
    assert_int_equal(n, m);
    assert_memory_equal(before, after, n);
    ipt_free(before);
    ipt_free(after);
    close_engine(&f);
}

static void test_words_inside(void **state)
{
    (void)state;
    enum { W = 16 };
    fixture f = open_engine();
    float v[4 * W];
    for (int i = 0; i < 4 * W; i++)
        v[i] = 0.1F * (float)(i % 7) + (float)(i / W);
    const float nan = NAN;
    const ipt_st_write words[] = {
        {"<s1>", IPT_ST_F32, 1, {W}, v},
        {"<s2>", IPT_ST_F32, 1, {W}, v + W},
        {"bundle_emb.three.string_to_param.*", IPT_ST_F32, 2, {3, W}, v + W},
        {"bundle_emb.wide.clip_l", IPT_ST_F32, 2, {1, 4}, v},
        {"bundle_emb.second.clip_g", IPT_ST_F32, 2, {1, 4}, v},
        {"bundle_emb.broken.string_to_param.*", IPT_ST_F32, 2, {1, 1}, &nan},
    };
    ipt_lora l = {f.lora, 0, 0, NULL, 0, 1, NULL, NULL};
    ipt_request r;
    write_lora(&f, "lora_te_text_model_encoder_layers_4_mlp_fc2", 16, 37, words, 6);
    small_request(&f, &r, GOLDEN("models/sd1"));
    r.lora = &l;
    r.n_lora = 1;
    static const struct {
        const char *a, *b;
        bool same;
        size_t n; /* first rows of the text that are compared: layers are causal */
    } rows[] = {
        {"cat, <s1><s2>", "cat, <s1> <s2>", true, 77},
        {"<s1><s2>, cat", "<s1> <s2> , cat", true, 77},
        {"cat, <s1><s2>", "cat, <s2><s1>", false, 77},
        {"cat, <s1><s2>", "cat, <s3><s4>", false, 77},
        {"three", "three dog", true, 4},
        {"three", "thrice", false, 4},
    };
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        r.prompt = rows[i].a;
        float *a = text_of(&f, &r);
        r.prompt = rows[i].b;
        float *b = text_of(&f, &r);
        if ((golden_max_diff(a, b, rows[i].n * W) <= 0) != rows[i].same)
            fail_msg("'%s' and '%s'", rows[i].a, rows[i].b);
        ipt_free(a);
        ipt_free(b);
    }
    static const char *const bad[][2] = {
        {"a wide cat", "found shape [1,4], expected [1..75,16] for this model's text_encoder"},
        {"a second cat", "vectors for a second text encoder only"},
        {"a broken cat", "found shape [1,1]"},
    };
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        r.prompt = bad[i][0];
        assert_int_equal(ipt_generate(f.engine, &r, NULL, NULL, NULL), IPT_ERR_SHAPE);
        if (!strstr(ipt_last_error(f.ctx), bad[i][1]))
            fail_msg("%s", ipt_last_error(f.ctx));
    }
    close_engine(&f);
}

static void count_pickles(void *user, ipt_log_level level, const char *line)
{
    int *n = user;
    *n += level == IPT_LOG_WARN && strstr(line, "2 files are pickles") && strstr(line, "easy.pt") &&
          strstr(line, "hard.bin");
}

/* Embeddings that are not read are named once, whether a prompt has their word or not. */
static void test_pickled_embeddings(void **state)
{
    (void)state;
    static const char *const names[] = {"easy.pt", "hard.bin", "note.txt"};
    int warnings = 0;
    char folder[64], path[128];
    fixture f = open_engine();
    ipt_engine_destroy(&f.engine); /* one whose log can be read */
    ipt_ctx_destroy(&f.ctx);
    assert_int_equal(ipt_ctx_create(count_pickles, &warnings, &f.ctx), IPT_OK);
    ipt_engine_opts o = {
        .precision = IPT_PRECISION_F32, .validate = true, .device = getenv("IPT_TEST_DEVICE")};
    assert_ok(f.ctx, ipt_engine_create(f.ctx, &o, &f.engine));
    ipt_name(folder, sizeof folder, "/tmp/impasto-words-%ld", (long)getpid());
    assert_int_equal(mkdir(folder, 0700), 0);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        assert_ok(f.ctx,
                  ipt_file_write(f.ctx, ipt_name(path, sizeof path, "%s/%s", folder, names[i]),
                                 "\x80\x02", 2));
    const char *folders[] = {folder};
    ipt_request r;
    small_request(&f, &r, GOLDEN("models/sd1"));
    r.embedding_dirs = folders;
    r.n_embedding_dirs = 1;
    assert_ok(f.ctx, ipt_generate(f.engine, &r, NULL, NULL, NULL));
    assert_int_equal(warnings, 1);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        unlink(ipt_name(path, sizeof path, "%s/%s", folder, names[i]));
    rmdir(folder);
    close_engine(&f);
}

/* What `lora inspect` shows: words, values that are no numbers, what does not fit. */
static void test_description(void **state)
{
    (void)state;
    static const char *const parts[] = {
        "\"word\": \"two\", \"text_encoder\": 2, \"text_encoder_2\": 2, \"usable\": true",
        "\"word\": \"<s1>\", \"text_encoder\": 1, \"usable\": true}",
        "\"word\": \"<s2>\", \"text_encoder\": 1, \"usable\": false}", /* of a wider encoder */
        "\"word\": \"g\", \"text_encoder_2\": 1, \"usable\": false}",  /* of another encoder */
        "\"nan\": [\"bundle_emb.two.clip_g\"], \"nan_values\": 3",
        "\"groups\": [{\"name\": \"lora_unet_joint_blocks_\"",
        "\"made_for\": \"SD 3\"",
    };
    fixture f = {.ctx = test_ctx()};
    ipt_name(f.lora, sizeof f.lora, "/tmp/impasto-lora-%ld.safetensors", (long)getpid());
    const float v[32] = {1}, bad[8] = {NAN, 1, INFINITY, 1, 1, -INFINITY, 1, 1};
    const ipt_st_write more[] = {
        {"<s1>", IPT_ST_F32, 1, {16}, v},
        {"<s2>", IPT_ST_F32, 1, {24}, v},
        {"bundle_emb.g.clip_g", IPT_ST_F32, 1, {4}, v},
        {"bundle_emb.two.clip_l", IPT_ST_F32, 2, {2, 16}, v},
        {"bundle_emb.two.clip_g", IPT_ST_F32, 2, {2, 4}, bad},
        {"lora_unet_joint_blocks_1_x.lora_up.weight", IPT_ST_F32, 2, {16, 1}, v},
    };
    char *json = NULL;
    write_lora(&f, "lora_te_text_model_encoder_layers_4_mlp_fc2", 16, 37, more, 6);
    assert_ok(f.ctx, ipt_lora_describe(f.ctx, f.lora, GOLDEN("models/sd1"), NULL, &json));
    for (size_t i = 0; i < IPT_COUNT(parts); i++)
        if (!strstr(json, parts[i]))
            fail_msg("%s is not in %s", parts[i], json);
    ipt_free(json);
    unlink(f.lora);
    ipt_ctx_destroy(&f.ctx);
}

/* A file of which half the keys fit nothing is refused in one run and allowed in another. */
static void test_partial(void **state)
{
    (void)state;
    fixture f = open_engine();
    const float v[32] = {1};
    const ipt_st_write more[] = {
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", IPT_ST_F32, 2, {1, 32}, v},
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", IPT_ST_F32, 2, {32, 1}, v},
    };
    ipt_lora l = {f.lora, 1, 1, NULL, 0, 1, NULL, NULL};
    ipt_request r;
    ipt_report rep;
    write_lora(&f, "lora_te_text_model_encoder_layers_4_mlp_fc2", 16, 37, more, 2);
    small_request(&f, &r, GOLDEN("models/sd1"));
    r.lora = &l;
    r.n_lora = 1;
    for (int round = 0; round < 2; round++) { /* also when the engine has kept the file */
        r.allow_partial = false;
        assert_int_equal(ipt_generate(f.engine, &r, NULL, NULL, NULL), IPT_ERR_MISSING);
        assert_non_null(strstr(ipt_last_error(f.ctx), "2 of 4 keys fit nothing in this model; by "
                                                      "its keys it was made for Flux; "
                                                      "--allow-partial"));
        r.allow_partial = true;
        assert_ok(f.ctx, ipt_generate(f.engine, &r, NULL, NULL, &rep));
        assert_int_equal(rep.adapter[0].n_unmatched, 2);
    }
    close_engine(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sdxl_leaves_out_a_layer),
        cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_every_layer_skipped),
        cmocka_unit_test(test_trace_spares_inputs),
        cmocka_unit_test(test_words_inside),
        cmocka_unit_test(test_pickled_embeddings),
        cmocka_unit_test(test_description),
        cmocka_unit_test(test_partial),
    };
    return cmocka_run_group_tests_name("lora", tests, NULL, NULL);
}
