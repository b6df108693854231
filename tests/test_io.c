/* tests/test_io.c - model_io: the safetensors container, hostile files, whole models, weight
 * stores. Adapter files: test_adapter_io.c; configs and key maps: test_config_io.c. */
#include "tests/support.h"

#include "model_io/internal.h"
#include "text_encoder/text_encoder.h"
#include "unet/unet.h"
#include "vae/vae.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define MODELS IPT_TEST_DATA "/models/"

/* --- the container -----------------------------------------------------------------------------
 */
/* A file in memory: header text (its length written in front) and n_data zero bytes. */
static uint8_t *make_file(const char *header, size_t n_data, size_t *size)
{
    size_t n = strlen(header);
    uint8_t *p = calloc(1, 8 + n + n_data + 1);
    assert_non_null(p);
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)((uint64_t)n >> (8 * i));
    memcpy(p + 8, header, n + 1); /* the terminator falls on data, which is zero, or behind it */
    *size = 8 + n + n_data;
    return p;
}

static void temp_path(char *buf, size_t n, const char *name)
{
    const char *dir = getenv("TMPDIR");
    snprintf(buf, n, "%s/ipt_test_io_%ld_%s", dir ? dir : "/tmp", (long)getpid(), name);
}

/* Under AddressSanitizer (CI's step asan) an arena's allocations have poisoned borders, as malloc's
 * have; elsewhere only that allocations do not overlap. */
static void test_arena_borders(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_arena a;
    ipt_arena_init(&a, ctx);
    for (size_t n = 1; n < 70; n++) {
        char *p = ipt_arena_alloc(&a, n), *q = ipt_arena_alloc(&a, n);
        assert_true(p && q && (q >= p + n || p >= q + n));
#ifdef __SANITIZE_ADDRESS__
        assert_false(__asan_address_is_poisoned(p + n - 1));
        assert_true(__asan_address_is_poisoned(p + n));
        assert_true(__asan_address_is_poisoned(q + n));
#endif
    }
    ipt_arena_finish(&a);
    ipt_ctx_destroy(&ctx);
}

static void test_roundtrip(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    char path[512];
    static const float f32[6] = {1, -2, 0.5f, 3e30f, -0.0f, 7};
    static const uint16_t f16[2] = {0x3c00, 0xc000};
    static const int32_t i32[1] = {-5};
    const ipt_st_write t[] = {
        {"a.weight", IPT_ST_F32, 2, {2, 3}, f32},
        {"half \"x\"", IPT_ST_F16, 1, {2}, f16},
        {"scalar", IPT_ST_I32, 0, {0}, i32},
        {"empty", IPT_ST_F32, 2, {0, 4}, NULL},
    };
    const ipt_st_meta meta[] = {{"made_by", "test_io"}, {"k\xc3\xa4se", "\xe2\x82\xac"}};
    temp_path(path, sizeof path, "rt.safetensors");
    assert_ok(ctx, ipt_safetensors_write(ctx, path, t, 4, meta, 2));
    ipt_safetensors *st = NULL;
    assert_ok(ctx, ipt_safetensors_open(ctx, path, &st));
    assert_int_equal(ipt_safetensors_count(st), 4);
    assert_string_equal(ipt_safetensors_meta(st, "made_by"), "test_io");
    assert_string_equal(ipt_safetensors_meta(st, "k\xc3\xa4se"), "\xe2\x82\xac");
    assert_null(ipt_safetensors_meta(st, "other"));
    const ipt_st_tensor *a = ipt_safetensors_find(st, "a.weight");
    assert_non_null(a);
    assert_int_equal(a->rank, 2);
    assert_int_equal(a->dim[1], 3);
    assert_null(a->data);
    for (int round = 0; round < 2; round++) { /* comes back from the file */
        assert_ok(ctx, ipt_st_load(a));
        assert_memory_equal(a->data, f32, sizeof f32);
        ipt_st_release(a);
        assert_null(a->data);
    }
    float v[2];
    ipt_st_to_f32(ipt_safetensors_find(st, "half \"x\""), 0, 2, v);
    assert_true(v[0] == 1.0f && v[1] == -2.0f);
    assert_true(ipt_st_get(ipt_safetensors_find(st, "scalar"), 0) == -5.0f);
    assert_int_equal(ipt_safetensors_find(st, "empty")->count, 0);
    assert_null(ipt_safetensors_find(st, "b"));
    ipt_safetensors_close(&st);
    const ipt_st_write twice[] = {t[0], t[0]};
    assert_int_equal(ipt_safetensors_write(ctx, path, twice, 2, NULL, 0), IPT_ERR_ARG);
    unlink(path);
    assert_int_equal(
        ipt_safetensors_write(ctx, test_nowhere(path, sizeof path, "x"), t, 1, NULL, 0),
        IPT_ERR_OUTPUT);
    ipt_ctx_destroy(&ctx);
}

static void test_dtypes(void **state)
{
    (void)state;
    static const double f64 = -1.5;
    static const float f32 = 0.1f;
    static const uint16_t f16 = 0x3555, bf16 = 0x3eab, inf16 = 0x7c00;
    static const uint8_t e4m3 = 0x38, e4m3_nan = 0x7f, e5m2 = 0x3c, e5m2_inf = 0x7c;
    static const int64_t i64 = 1 << 20;
    static const int8_t i8 = -3;
    static const int16_t i16 = -300;
    static const struct {
        ipt_st_dtype t;
        const void *p;
        double want; /* NAN: not finite */
    } rows[] = {
        {IPT_ST_F64, &f64, -1.5},
        {IPT_ST_F32, &f32, (double)0.1f},
        {IPT_ST_F16, &f16, 0.333251953125},
        {IPT_ST_BF16, &bf16, 0.333984375},
        {IPT_ST_F16, &inf16, (double)NAN},
        {IPT_ST_F8_E4M3, &e4m3, 1},
        {IPT_ST_F8_E4M3, &e4m3_nan, (double)NAN},
        {IPT_ST_F8_E5M2, &e5m2, 1},
        {IPT_ST_F8_E5M2, &e5m2_inf, (double)NAN},
        {IPT_ST_I64, &i64, 1 << 20},
        {IPT_ST_I8, &i8, -3},
        {IPT_ST_I16, &i16, -300},
        {IPT_ST_U8, &e4m3, 0x38},
    };
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_st_tensor t = {.name = "x", .dtype = rows[i].t, .data = rows[i].p, .count = 1};
        size_t bad = 9;
        float v = 0;
        ipt_st_to_f32(&t, 0, 1, &v);
        if (isnan(rows[i].want)) {
            assert_false(ipt_st_finite(&t, &bad));
            assert_int_equal(bad, 0);
            continue;
        }
        assert_true(ipt_st_finite(&t, NULL));
        assert_true((double)v == rows[i].want && (double)ipt_st_get(&t, 0) == rows[i].want);
    }
}

/* Headers that must be refused, with words that the message must contain. */
static const struct {
    const char *header;
    size_t n_data;
    const char *says;
} bad_headers[] = {
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4,
     "outside the file's 4 data bytes (truncated file?)"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 8,
     "key 'a': found 4 bytes, expected 8 for F32 [2]"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\","
     "\"shape\":[1],\"data_offsets\":[4,8]}}",
     8, "keys 'a' and 'b' overlap"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\","
     "\"shape\":[1],\"data_offsets\":[4,8]}}",
     8, "duplicate"},
    {"{\"a\":{\"dtype\":\"Q4\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
     "key 'a': unknown dtype 'Q4'"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "dimension 0"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", 4, "dimension 0"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4,
     "9 dimensions"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,4]"
     "}}",
     4, "overflows"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 4,
     "overflows"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 8, "outside"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 8, "outside"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 8, "not two numbers"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,1e3]}}", 8, "not two numbers"},
    {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 8, "expected a list"},
    {"{\"a\":[]}", 8, "expected an object"},
    {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 8, "expected an object with dtype"},
    {"{\"__metadata__\":{\"a\":1}}", 0, "not a string"},
    {"{\"__metadata__\":[]}", 0, "not an object"},
    {"[1,2]", 0, "not a JSON object"},
    {"{\"a\":", 0, "not valid JSON"},
    {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 8,
     "not valid JSON"},
};

static void test_bad_headers(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(bad_headers); i++) {
        size_t n = 0;
        uint8_t *p = make_file(bad_headers[i].header, bad_headers[i].n_data, &n);
        ipt_safetensors *st = NULL;
        ipt_status s = ipt_safetensors_open_memory(ctx, "x.safetensors", p, n, &st);
        if (s != IPT_ERR_FORMAT || !strstr(ipt_last_error(ctx), bad_headers[i].says) ||
            strncmp(ipt_last_error(ctx), "x.safetensors: ", 15) != 0 ||
            strchr(ipt_last_error(ctx), '\n'))
            fail_msg("header %zu: %s: %s", i, ipt_status_name(s), ipt_last_error(ctx));
        assert_null(st);
        free(p);
    }
    ipt_ctx_destroy(&ctx);
}

/* Whole files that are something else. */
static void test_other_files(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t n;
        const char *says;
    } files[] = {
        {"", 0, "the file is empty"},
        {"PK\003\004rest of a zip", 18, "zip archive or PyTorch pickle"},
        {"\x80\x02}q\x00(U\x03"
         "abc",
         11, "Python pickle"},
        {"GGUF\x03\0\0\0\0\0\0\0", 12, "a GGUF file"},
        {"just some words in a file\n", 26, "this is text"},
        {"<!DOCTYPE html><html>", 21, "web page"},
        {"version https://git-lfs.github.com/spec/v1\noid", 46, "Git LFS pointer"},
        {"\x89PNG\r\n\x1a\n....", 12, "PNG"},
        {"\xff\xd8\xff\xe0....", 8, "JPEG"},
        {"\x10\0\0", 3, "file has 3 bytes"},
        {"\x28\x23\0\0\0\0\0\0{}", 10, "header says 9000 bytes, file has 10"},
        {"\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10,
         "header says 9223372036854775807 bytes, file has 10"},
        {"\0\0\0\0\0\0\0\0", 8, "not valid JSON"},
    };
    ipt_ctx *ctx = test_ctx();
    char path[512];
    temp_path(path, sizeof path, "bad.safetensors");
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        ipt_safetensors *st = NULL;
        ipt_model *m = NULL;
        assert_ok(ctx, ipt_file_write(ctx, path, files[i].bytes, files[i].n));
        ipt_status s = ipt_safetensors_open(ctx, path, &st);
        if (s != IPT_ERR_FORMAT || !strstr(ipt_last_error(ctx), files[i].says) ||
            !strstr(ipt_last_error(ctx), path))
            fail_msg("file %zu: %s: %s", i, ipt_status_name(s), ipt_last_error(ctx));
        assert_int_equal(ipt_model_open(ctx, path, NULL, &m), IPT_ERR_FORMAT);
    }
    unlink(path);
    ipt_safetensors *st = NULL;
    assert_int_equal(ipt_safetensors_open(ctx, path, &st), IPT_ERR_IO);
    assert_int_equal(ipt_safetensors_open(ctx, "/tmp", &st), IPT_ERR_IO);
    assert_non_null(strstr(ipt_last_error(ctx), "is a folder"));
    ipt_ctx_destroy(&ctx);
}

/* --- models ----------------------------------------------------------------------------------- */
static const char *const layouts[][2] = {
    /* file or folder, folder of configs (single files only) */
    {MODELS "sd1", NULL},
    {MODELS "sd2", NULL},
    {MODELS "sdxl", NULL},
    {MODELS "lcm", NULL},
    {IPT_TEST_DATA "/model_sd1_single_f16.safetensors", MODELS "sd1"},
    {IPT_TEST_DATA "/model_sd1_single_bf16.safetensors", MODELS "sd1"},
    {IPT_TEST_DATA "/model_sd1_single_fp8.safetensors", MODELS "sd1"},
    {IPT_TEST_DATA "/model_sd2_single_f16.safetensors", MODELS "sd2"},
    {IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", MODELS "sdxl"},
    {IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", NULL},
};

static void build_part(ipt_graph *g, const ipt_model_config *c, int comp)
{
    if (comp == IPT_COMP_UNET) {
        ipt_unet_build(g, &c->unet, &(ipt_unet_key){.batch = 1, .h = 16, .w = 16, .tokens = 77});
    } else if (comp == IPT_COMP_VAE) {
        ipt_vae_decode_build(g, &c->vae, 1, 8, 8, IPT_F32);
    } else {
        bool two = comp == IPT_COMP_TEXT2;
        ipt_text_key key = {.batch = 1, .tokens = 77, .final_norm = true, .pooled = two};
        ipt_text_build(g, two ? &c->text2 : &c->text, &key);
    }
}

/* Everything a component's graphs ask for.  Ownership: caller frees both. */
static size_t wants_of(ipt_ctx *ctx, const ipt_model_config *c, int comp, ipt_graph *g[2],
                       ipt_want **want)
{
    size_t n = 0;
    *want = NULL;
    for (int k = 0; k < 2; k++) {
        assert_ok(ctx, ipt_graph_create(ctx, &g[k]));
        if (k == 0)
            build_part(g[k], c, comp);
        else if (comp == IPT_COMP_VAE) /* one name cannot mean two sizes in one graph */
            ipt_vae_encode_build(g[k], &c->vae, 1, 8 * ipt_vae_factor(&c->vae),
                                 8 * ipt_vae_factor(&c->vae), IPT_F32);
        assert_ok(ctx, ipt_graph_status(g[k]));
        size_t more = ipt_graph_n_weights(g[k]);
        *want = realloc(*want, (n + more + 1) * sizeof **want);
        for (size_t i = 0; i < more; i++, n++)
            (*want)[n].name = ipt_graph_weight(g[k], i, &(*want)[n].shape);
    }
    return n;
}

static void test_models_complete(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t k = 0; k < IPT_COUNT(layouts); k++) {
        ipt_model *m = NULL;
        ipt_model_opts o = {.config_dir = layouts[k][1]};
        assert_ok(ctx, ipt_model_open(ctx, layouts[k][0], &o, &m));
        const ipt_model_config *c = ipt_model_get_config(m);
        for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
            ipt_graph *g[2];
            ipt_want *want;
            ipt_check check;
            if (!c->has[comp]) {
                assert_int_equal(comp, IPT_COMP_TEXT2);
                continue;
            }
            size_t n = wants_of(ctx, c, comp, g, &want);
            assert_ok(ctx, ipt_model_check(m, comp, want, n, &check));
            assert_ok(ctx, ipt_check_status(m, comp, &check));
            if (check.n_bound != n || check.n_unclaimed != 0)
                fail_msg("%s %s: %zu of %zu bound, unclaimed %zu: %s", layouts[k][0],
                         ipt_comp_name(comp), check.n_bound, n, check.n_unclaimed,
                         check.n_unclaimed ? check.unclaimed[0] : "");
            ipt_check_finish(&check);
            free(want);
            ipt_graph_destroy(&g[0]);
            ipt_graph_destroy(&g[1]);
        }
        ipt_model_close(&m);
    }
    ipt_ctx_destroy(&ctx);
}

/* The same weights must come out of a folder and of a single file of the same model. */
static void compare_layouts(ipt_ctx *ctx, const char *folder, const char *single, double rel,
                            double abs_tol)
{
    ipt_model *m[2] = {NULL};
    ipt_model_opts o = {.config_dir = folder};
    assert_int_equal(ipt_model_open(ctx, folder, &o, &m[0]), IPT_ERR_ARG); /* has its own */
    assert_ok(ctx, ipt_model_open(ctx, folder, NULL, &m[0]));
    assert_ok(ctx, ipt_model_open(ctx, single, &o, &m[1]));
    const ipt_model_config *c = ipt_model_get_config(m[0]);
    for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
        ipt_graph *g[2];
        ipt_want *want;
        ipt_weights *w[2] = {NULL};
        if (!c->has[comp])
            continue;
        size_t n = wants_of(ctx, c, comp, g, &want);
        for (int k = 0; k < 2; k++)
            assert_ok(ctx, ipt_model_weights(m[k], comp, NULL, IPT_F32, "pre.", &w[k]));
        for (size_t i = 0; i < n; i++) {
            char name[256];
            size_t count = ipt_shape_count(&want[i].shape);
            double *a = calloc(count, sizeof *a), *b = calloc(count, sizeof *b);
            snprintf(name, sizeof name, "%s%s", i % 2 ? "pre." : "", want[i].name);
            assert_ok(ctx, w[0]->read(w[0], name, &want[i].shape, a));
            assert_ok(ctx, w[1]->read(w[1], name, &want[i].shape, b));
            for (size_t e = 0; e < count; e++) {
                if (!(fabs(a[e] - b[e]) <= rel * fabs(a[e]) + abs_tol))
                    fail_msg("%s: %s element %zu: %g in the folder, %g", single, want[i].name, e,
                             a[e], b[e]);
            }
            free(a);
            free(b);
        }
        for (int k = 0; k < 2; k++) {
            ipt_weights_destroy(&w[k]);
            ipt_graph_destroy(&g[k]);
        }
        free(want);
    }
    ipt_model_close(&m[0]);
    ipt_model_close(&m[1]);
}

static void test_layouts_agree(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    compare_layouts(ctx, MODELS "sd1", IPT_TEST_DATA "/model_sd1_single_f16.safetensors", 0x1p-11,
                    0x1p-25);
    compare_layouts(ctx, MODELS "sd1", IPT_TEST_DATA "/model_sd1_single_bf16.safetensors", 0x1p-8,
                    1e-30);
    compare_layouts(ctx, MODELS "sd1", IPT_TEST_DATA "/model_sd1_single_fp8.safetensors", 0x1p-4,
                    0x1p-10);
    compare_layouts(ctx, MODELS "sd2", IPT_TEST_DATA "/model_sd2_single_f16.safetensors", 0x1p-11,
                    0x1p-25);
    compare_layouts(ctx, MODELS "sdxl", IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", 0x1p-11,
                    0x1p-25);
    ipt_ctx_destroy(&ctx);
}

static void test_model_facts(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    static const struct {
        const char *path, *layout;
        ipt_arch arch;
        ipt_prediction pred;
    } rows[] = {
        {MODELS "sd1", "diffusers", IPT_ARCH_SD1, IPT_PRED_EPSILON},
        {MODELS "sd2", "diffusers", IPT_ARCH_SD2, IPT_PRED_V},
        {MODELS "sdxl", "diffusers", IPT_ARCH_SDXL, IPT_PRED_EPSILON},
        {IPT_TEST_DATA "/model_sd1_single_f16.safetensors", "compvis", IPT_ARCH_SD1,
         IPT_PRED_EPSILON},
        {IPT_TEST_DATA "/model_sd2_single_f16.safetensors", "compvis", IPT_ARCH_SD2, IPT_PRED_V},
        {IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", "sgm", IPT_ARCH_SDXL,
         IPT_PRED_EPSILON},
    };
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_model *m = NULL;
        assert_ok(ctx, ipt_model_open(ctx, rows[i].path, NULL, &m));
        assert_string_equal(ipt_model_layout(m), rows[i].layout);
        assert_int_equal(ipt_model_get_config(m)->arch, rows[i].arch);
        assert_int_equal(ipt_model_get_config(m)->prediction, rows[i].pred);
        assert_true(ipt_model_get_config(m)->zero_empty_negative ==
                    (rows[i].arch == IPT_ARCH_SDXL));
        assert_true((ipt_model_scheduler(m) != NULL) == (i < 3));
        assert_true((ipt_model_tokenizer(m, IPT_COMP_TEXT) != NULL) == (i < 3));
        ipt_model_close(&m);
    }
    ipt_ctx_destroy(&ctx);
}

static void test_set_vae(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_model *m = NULL;
    assert_ok(ctx, ipt_model_open(ctx, MODELS "sd1", NULL, &m));
    assert_ok(ctx, ipt_model_set_vae(m, MODELS "lcm"));
    assert_int_equal(ipt_model_get_config(m)->vae.norm_groups, 4);
    assert_ok(ctx, ipt_model_set_vae(m, MODELS "sdxl/vae"));
    assert_int_equal(ipt_model_get_config(m)->vae.n_level, 3);
    assert_ok(ctx, ipt_model_set_vae(m, MODELS "lcm/vae/diffusion_pytorch_model.safetensors"));
    assert_int_equal(ipt_model_get_config(m)->vae.norm_groups, 4);
    assert_ok(ctx, ipt_model_set_vae(m, IPT_TEST_DATA "/model_sd1_single_f16.safetensors"));
    assert_int_equal(ipt_model_get_config(m)->vae.n_level, 2);
    assert_int_equal(ipt_model_set_vae(m, MODELS "sd1/unet/diffusion_pytorch_model.safetensors"),
                     IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "no VAE in this file"));
    char none[512];
    assert_int_equal(ipt_model_set_vae(m, test_nowhere(none, sizeof none, "vae")), IPT_ERR_IO);
    assert_int_equal(ipt_model_get_config(m)->vae.n_level, 2); /* unchanged */
    ipt_model_close(&m);
    ipt_ctx_destroy(&ctx);
}

static void write_f32(ipt_ctx *ctx, const char *path, const ipt_st_write *shapes, size_t n)
{
    ipt_st_write t[4];
    float *zeros = calloc(1 << 16, sizeof *zeros);
    for (size_t i = 0; i < n; i++) {
        t[i] = shapes[i];
        t[i].data = zeros;
    }
    assert_ok(ctx, ipt_safetensors_write(ctx, path, t, n, NULL, 0));
    free(zeros);
}

/* TAESD as published (numbers) and as diffusers names it; embeddings of three makers. */
static void test_small_files(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    char path[512];
    ipt_model *m = NULL;
    ipt_embedding_file e;
    temp_path(path, sizeof path, "word.safetensors");
    static const ipt_st_write taesd[2][2] = {
        {{"1.weight", IPT_ST_F32, 4, {8, 4, 3, 3}, NULL},
         {"3.conv.0.weight", IPT_ST_F32, 4, {8, 8, 3, 3}, NULL}},
        {{"decoder.layers.0.weight", IPT_ST_F32, 4, {8, 4, 3, 3}, NULL},
         {"decoder.layers.2.conv.0.weight", IPT_ST_F32, 4, {8, 8, 3, 3}, NULL}},
    };
    for (int k = 0; k < 2; k++) {
        ipt_weights *w = NULL;
        ipt_shape s = ipt_shape4(IPT_F32, 8, 3, 3, 8);
        double values[8 * 8 * 9];
        write_f32(ctx, path, taesd[k], 2);
        assert_ok(ctx, ipt_model_open_vae(ctx, path, &m));
        assert_true(ipt_model_get_config(m)->vae.tiny &&
                    ipt_model_get_config(m)->vae.channels[0] == 8);
        assert_ok(ctx, ipt_model_weights(m, IPT_COMP_VAE, NULL, IPT_F32, NULL, &w));
        assert_ok(ctx, w->read(w, "decoder.layers.2.conv.0.weight", &s, values));
        ipt_weights_destroy(&w);
        assert_int_equal(ipt_model_weights(m, IPT_COMP_UNET, NULL, IPT_F32, NULL, &w),
                         IPT_ERR_MISSING);
        ipt_model_close(&m);
    }
    static const ipt_st_write words[3][2] = {
        {{"emb_params", IPT_ST_F32, 2, {3, 16}, NULL}, {"x", IPT_ST_F32, 1, {1}, NULL}},
        {{"clip_g", IPT_ST_F32, 2, {2, 24}, NULL}, {"clip_l", IPT_ST_F32, 2, {2, 16}, NULL}},
        {{"<cat>", IPT_ST_F32, 1, {16}, NULL}, {"", IPT_ST_F32, 0, {0}, NULL}},
    };
    static const int32_t want[3][3] = {{3, 16, 0}, {2, 16, 24}, {1, 16, 0}};
    for (int k = 0; k < 3; k++) {
        write_f32(ctx, path, words[k], k == 2 ? 1 : 2);
        assert_ok(ctx, ipt_embedding_open(ctx, path, &e));
        assert_int_equal(e.n_vector, want[k][0]);
        assert_int_equal(e.width[0], want[k][1]);
        assert_int_equal(e.width[1], want[k][2]);
        assert_non_null(strstr(e.name, "_word"));
        ipt_embedding_close(&e);
    }
    write_f32(ctx, path, taesd[0], 2);
    assert_int_equal(ipt_embedding_open(ctx, path, &e), IPT_ERR_FORMAT);
    unlink(path);
    ipt_ctx_destroy(&ctx);
}

/* A folder whose UNet is listed in an index; the index may name only files beside it. */
static void test_shards(void **state)
{
    (void)state;
    static const struct {
        const char *index;
        ipt_status want;
        const char *says;
    } rows[] = {
        {"{\"weight_map\":{\"conv_in.weight\":\"a.safetensors\",\"b\":\"a.safetensors\"}}", IPT_OK,
         ""},
        {"{\"weight_map\":{\"conv_in.weight\":\"../a.safetensors\"}}", IPT_ERR_FORMAT,
         "expected the name of a file"},
        {"{\"weight_map\":{\"conv_in.weight\":3}}", IPT_ERR_FORMAT, "no string"},
        {"{\"weight_map\":{\"conv_in.weight\":\"gone.safetensors\"}}", IPT_ERR_IO, "No such file"},
        {"{}", IPT_ERR_FORMAT, "'weight_map' is missing"},
    };
    static const char *const links[][2] = {
        {MODELS "sd1/unet/config.json", "unet/config.json"},
        {MODELS "sd1/unet/diffusion_pytorch_model.safetensors", "unet/a.safetensors"},
    };
    ipt_ctx *ctx = test_ctx();
    char dir[400], path[512];
    temp_path(dir, sizeof dir, "shards");
    snprintf(path, sizeof path, "%s/unet", dir);
    assert_int_equal(mkdir(dir, 0777) | mkdir(path, 0777), 0);
    for (size_t i = 0; i < IPT_COUNT(links); i++) {
        snprintf(path, sizeof path, "%s/%s", dir, links[i][1]);
        assert_int_equal(symlink(links[i][0], path), 0);
    }
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_model *m = NULL;
        snprintf(path, sizeof path, "%s/unet/diffusion_pytorch_model.safetensors.index.json", dir);
        assert_ok(ctx, ipt_file_write(ctx, path, rows[i].index, strlen(rows[i].index)));
        ipt_status s = ipt_model_open(ctx, dir, NULL, &m);
        if (s != rows[i].want || (s != IPT_OK && !strstr(ipt_last_error(ctx), rows[i].says)))
            fail_msg("index %zu: %s: %s", i, ipt_status_name(s), ipt_last_error(ctx));
        if (s == IPT_OK)
            assert_int_equal(ipt_model_n_files(m, IPT_COMP_UNET), 1);
        ipt_model_close(&m);
    }
    unlink(path);
    for (size_t i = 0; i < IPT_COUNT(links); i++) {
        snprintf(path, sizeof path, "%s/%s", dir, links[i][1]);
        unlink(path);
    }
    snprintf(path, sizeof path, "%s/unet", dir);
    rmdir(path);
    rmdir(dir);
    ipt_ctx_destroy(&ctx);
}

static void test_not_models(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {MODELS "sd1/unet/diffusion_pytorch_model.safetensors", "give the folder"},
        {MODELS "sd1/vae/diffusion_pytorch_model.safetensors", "VAE alone"},
        {MODELS "sd1/text_encoder/model.safetensors", "text encoder alone"},
        {IPT_TEST_DATA "/golden_lora_kohya.safetensors", "adapter (LoRA)"},
        {IPT_TEST_DATA "/golden_sd1_unet.safetensors", "no Stable Diffusion UNet"},
        {MODELS "sd1/vae", "unet/config.json not found"},
    };
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_model *m = NULL;
        assert_true(ipt_model_open(ctx, rows[i][0], NULL, &m) != IPT_OK);
        if (!strstr(ipt_last_error(ctx), rows[i][1]) || !strstr(ipt_last_error(ctx), rows[i][0]))
            fail_msg("%s", ipt_last_error(ctx));
        assert_null(m);
    }
    ipt_ctx_destroy(&ctx);
}

/* --- stores ----------------------------------------------------------------------------------- */
static float get_double(const void *data, size_t i) { return (float)((const double *)data)[i]; }

/* What is put into a place of the caller's is what a copy of its own would hold, and nothing beside
 * it is written; the second time it comes by the short way. */
static void check_put(ipt_ctx *ctx, ipt_gpu *gpu, ipt_weights *w, const ipt_want *want, ipt_use use,
                      const uint8_t *expect, const ipt_weight_view *v)
{
    enum { BAND = 256 };
    ipt_buffer *buf = NULL;
    ipt_weight_view size;
    const size_t n = v->bytes + 2U * BAND;
    uint8_t *mark = malloc(n), *got = malloc(n);
    assert_true(mark && got);
    memset(mark, 0xa5, n);
    assert_ok(ctx, w->size(w, want->name, &want->shape, use, &size));
    assert_true(size.bytes == v->bytes && size.dtype == v->dtype && size.is_q8 == v->is_q8);
    assert_ok(ctx, ipt_buffer_create(gpu, n, &buf));
    ipt_weight_view to = *v;
    to.buf = buf;
    to.off = BAND;
    for (int known = 0; known < 2; known++) {
        assert_ok(ctx, ipt_buffer_write(gpu, buf, 0, mark, n));
        assert_ok(ctx, w->put(w, want->name, &want->shape, use, &to, known));
        assert_ok(ctx, ipt_buffer_read(gpu, buf, 0, got, n));
        assert_memory_equal(got, mark, BAND);
        assert_memory_equal(got + BAND, expect, v->bytes);
        assert_memory_equal(got + BAND + v->bytes, mark, BAND);
    }
    ipt_buffer_destroy(gpu, &buf);
    free(mark);
    free(got);
}

/* How a weight is stored: q8 where whole blocks lie along the inputs. */
static ipt_dtype stored_as(ipt_dtype precision, ipt_use use, size_t in)
{
    if (use == IPT_USE_ROWS)
        return IPT_F32;
    return precision == IPT_Q8 && (use != IPT_USE_PANEL || in % 32 != 0) ? IPT_F16 : precision;
}

/* What lies in device memory equals panels packed from what read() returns. */
static void check_store(ipt_ctx *ctx, ipt_gpu *gpu, ipt_weights *w, ipt_dtype precision,
                        const ipt_want *want, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const ipt_shape *s = &want[i].shape;
        size_t count = ipt_shape_count(s), in = (size_t)s->dim[s->rank - 1];
        ipt_use use = s->rank == 1                        ? IPT_USE_ROWS
                      : strstr(want[i].name, "embedding") ? IPT_USE_TABLE
                                                          : IPT_USE_PANEL;
        ipt_weight_view v, again;
        assert_ok(ctx, w->find(w, want[i].name, s, use, &v));
        assert_ok(ctx, w->find(w, want[i].name, s, use, &again));
        assert_true(v.buf == again.buf && v.off == again.off && v.bytes == again.bytes);
        assert_int_equal(v.dtype, stored_as(precision, use, in));
        assert_true(v.is_q8 == (v.dtype == IPT_Q8));
        double *values = calloc(count, sizeof *values);
        uint8_t *got = calloc(1, v.bytes + 1), *expect = calloc(1, v.bytes + 1);
        assert_ok(ctx, w->read(w, want[i].name, s, values));
        assert_ok(ctx, ipt_buffer_read(gpu, v.buf, v.off, got, v.bytes));
        if (use == IPT_USE_PANEL) {
            ipt_panel_src src = {.data = values,
                                 .get = get_double,
                                 .type = IPT_PANEL_GET,
                                 .so = count / (size_t)s->dim[0],
                                 .si = 1};
            if (s->rank == 4) {
                src.sx = in;
                src.sy = in * (size_t)s->dim[2];
            }
            assert_true(v.bytes == ipt_panel_bytes(s, v.dtype));
            ipt_panel_pack(s, &src, v.dtype, expect);
        } else {
            for (size_t e = 0; e < count; e++) {
                uint16_t h = ipt_f32_to_f16((float)values[e]);
                float f = (float)values[e];
                if (v.dtype == IPT_F16)
                    memcpy(expect + 2 * e, &h, 2);
                else
                    memcpy(expect + 4 * e, &f, 4);
            }
        }
        assert_memory_equal(got, expect, v.bytes);
        check_put(ctx, gpu, w, &want[i], use, expect, &v);
        free(values);
        free(got);
        free(expect);
    }
}

static void check_component(ipt_ctx *ctx, ipt_gpu *gpu, ipt_model *m, int comp, ipt_dtype precision)
{
    ipt_graph *g[2];
    ipt_want *want;
    ipt_weights *w = NULL;
    size_t n = wants_of(ctx, ipt_model_get_config(m), comp, g, &want);
    assert_ok(ctx, ipt_model_weights(m, comp, gpu, precision, NULL, &w));
    check_store(ctx, gpu, w, precision, want, n);
    assert_true(ipt_weights_device_bytes(w) > 0);
    ipt_weights_destroy(&w);
    if (strcmp(ipt_model_path(m), layouts[0][0]) == 0) {
        assert_ok(ctx, ipt_weights_random(ctx, gpu, precision, 7, &w));
        check_store(ctx, gpu, w, precision, want, n);
        ipt_weights_destroy(&w);
    }
    free(want);
    ipt_graph_destroy(&g[0]);
    ipt_graph_destroy(&g[1]);
}

static void test_device_store(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    for (size_t k = 0; k < IPT_COUNT(layouts); k++) {
        ipt_model *m = NULL;
        ipt_model_opts o = {.config_dir = layouts[k][1]};
        assert_ok(ctx, ipt_model_open(ctx, layouts[k][0], &o, &m));
        for (int comp = 0; comp < IPT_COMP_COUNT; comp++) {
            if (!ipt_model_get_config(m)->has[comp])
                continue;
            check_component(ctx, gpu, m, comp, (k + (size_t)comp) % 2 ? IPT_F32 : IPT_F16);
            check_component(ctx, gpu, m, comp, IPT_Q8);
        }
        ipt_model_close(&m);
    }
    test_gpu_done(&gpu, &ctx);
}

/* One name, two shapes: the second would be read behind the first one's buffer. */
static void test_one_shape_a_name(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    ipt_weights *w = NULL;
    ipt_weight_view v;
    const ipt_shape small = ipt_shape2(IPT_F32, 8, 16), large = ipt_shape2(IPT_F32, 64, 256);
    assert_ok(ctx, ipt_weights_random(ctx, gpu, IPT_F32, 7, &w));
    assert_ok(ctx, w->find(w, "x.weight", &small, IPT_USE_PANEL, &v));
    assert_ok(ctx, w->find(w, "x.weight", &small, IPT_USE_PANEL, &v));
    assert_int_equal(w->find(w, "x.weight", &large, IPT_USE_PANEL, &v), IPT_ERR_SHAPE);
    assert_string_equal(ipt_last_error(ctx),
                        "weight 'x.weight': asked for as [64,256], kept as [8,16]");
    ipt_weights_destroy(&w);
    test_gpu_done(&gpu, &ctx);
}

static void test_random_store(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_weights *w = NULL;
    enum { N = 64 * 256 };
    double *a = calloc(N, sizeof *a), *b = calloc(N, sizeof *b), mean = 0, square = 0;
    ipt_shape s = ipt_shape2(IPT_F32, 64, 256);
    for (int k = 0; k < 2; k++) {
        assert_ok(ctx, ipt_weights_random(ctx, NULL, IPT_F32, 5, &w));
        assert_ok(ctx, w->read(w, "x.weight", &s, k ? b : a));
        ipt_weights_destroy(&w);
    }
    assert_memory_equal(a, b, N * sizeof *a);
    for (int i = 0; i < N; i++) {
        mean += a[i] / N;
        square += a[i] * a[i] / N;
    }
    assert_true(fabs(mean) < 2e-3 &&
                fabs(sqrt(square) * 16 - 1) < 0.05); /* deviation 1/sqrt(256) */
    free(a);
    free(b);
    ipt_ctx_destroy(&ctx);
}

/* NaN, wrong shape and missing, as a store reports them. */
static void test_store_errors(void **state)
{
    (void)state;
    static const char header[] =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
        "\"big\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[16,20]}}";
    ipt_ctx *ctx = test_ctx();
    size_t n = 0;
    uint8_t *p = make_file(header, 20, &n);
    float nan = NAN, big = 1e30f;
    double out[8];
    memcpy(p + n - 12, &nan, 4);
    memcpy(p + n - 4, &big, 4);
    ipt_safetensors *st = NULL;
    ipt_weights *w = NULL;
    ipt_weight_view v;
    assert_ok(ctx, ipt_safetensors_open_memory(ctx, "n.safetensors", p, n, &st));
    assert_ok(ctx, ipt_weights_file(ctx, st, NULL, IPT_F16, NULL, &w));
    ipt_shape good = ipt_shape2(IPT_F32, 2, 2), wrong = ipt_shape2(IPT_F32, 4, 2),
              conv = ipt_shape4(IPT_F32, 2, 3, 3, 2);
    assert_int_equal(w->read(w, "a", &good, out), IPT_ERR_FORMAT);
    assert_string_equal(ipt_last_error(ctx),
                        "n.safetensors: key 'a': element 2 is NaN, expected finite numbers");
    assert_int_equal(w->read(w, "a", &wrong, out), IPT_ERR_SHAPE);
    assert_string_equal(ipt_last_error(ctx),
                        "n.safetensors: key 'a': found shape [2,2], expected [4,2]");
    assert_int_equal(w->read(w, "a", &conv, out), IPT_ERR_SHAPE);
    assert_non_null(strstr(ipt_last_error(ctx), "expected [2,2,3,3]"));
    assert_int_equal(w->read(w, "b", &good, out), IPT_ERR_MISSING);
    assert_non_null(strstr(ipt_last_error(ctx), "'b' is missing"));
    assert_int_equal(w->find(w, "a", &good, IPT_USE_PANEL, &v), IPT_ERR_ARG);
    ipt_weights_destroy(&w);
    ipt_safetensors_close(&st);
    free(p);
    ipt_ctx_destroy(&ctx);
}

/* --- out of memory ---------------------------------------------------------------------------- */
static ipt_status open_and_check(ipt_ctx *ctx, size_t k, const ipt_want *want, size_t n)
{
    ipt_model *m = NULL;
    ipt_check check;
    ipt_weights *w = NULL;
    ipt_model_opts o = {.config_dir = layouts[k][1]};
    ipt_status s = ipt_model_open(ctx, layouts[k][0], &o, &m);
    if (s != IPT_OK)
        return s;
    s = ipt_model_check(m, IPT_COMP_UNET, want, n, &check);
    if (s == IPT_OK)
        ipt_check_finish(&check);
    if (s == IPT_OK)
        s = ipt_model_weights(m, IPT_COMP_UNET, NULL, IPT_F32, "unet.", &w);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
    return s;
}

static void test_oom(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    assert_int_equal(ipt_ctx_create(NULL, NULL, &ctx), IPT_OK);
    static const size_t which[] = {0, 8};
    for (size_t r = 0; r < IPT_COUNT(which); r++) {
        ipt_want want[2] = {{"conv_in.weight", ipt_shape4(IPT_F32, 8, 3, 3, 4)},
                            {"nothing", ipt_shape1(IPT_F32, 1)}};
        uint64_t before = ipt_alloc_count(ctx);
        assert_ok(ctx, open_and_check(ctx, which[r], want, 2));
        uint64_t n = ipt_alloc_count(ctx) - before;
        assert_true(n > 10);
        for (uint64_t i = 1; i <= n; i++) {
            ipt_alloc_fail_after(ctx, i);
            ipt_status s = open_and_check(ctx, which[r], want, 2);
            ipt_alloc_fail_after(ctx, 0);
            if (s != IPT_ERR_NOMEM)
                fail_msg("allocation %" PRIu64 " of %" PRIu64 ": %s", i, n, ipt_status_name(s));
        }
    }
    ipt_ctx_destroy(&ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arena_borders), cmocka_unit_test(test_roundtrip),
        cmocka_unit_test(test_dtypes),        cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_other_files),   cmocka_unit_test(test_models_complete),
        cmocka_unit_test(test_layouts_agree), cmocka_unit_test(test_model_facts),
        cmocka_unit_test(test_set_vae),       cmocka_unit_test(test_small_files),
        cmocka_unit_test(test_shards),        cmocka_unit_test(test_not_models),
        cmocka_unit_test(test_device_store),  cmocka_unit_test(test_one_shape_a_name),
        cmocka_unit_test(test_random_store),  cmocka_unit_test(test_store_errors),
        cmocka_unit_test(test_oom),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
