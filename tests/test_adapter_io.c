/* tests/test_adapter_io.c - adapter files: every family, scales, hostile files.  What the factors
 * do to pictures is tested elsewhere; here: which module, which rank, which numbers. */
#include "tests/support.h"

#include "model_io/internal.h"
#include "text_encoder/text_encoder.h"
#include "unet/unet.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- the modules of a tiny model -------------------------------------------------------------- */
typedef struct model_modules {
    ipt_ctx *ctx;
    ipt_graph *g[3];
    ipt_module *m;
    char (*name)[IPT_KEY_MAX];
    size_t n;
} model_modules;

static void add_modules(model_modules *t, ipt_graph *g, int comp)
{
    for (size_t i = 0; i < ipt_graph_n_weights(g); i++) {
        ipt_shape s;
        const char *name = ipt_graph_weight(g, i, &s);
        size_t len = strlen(name);
        if (len < 8 || strcmp(name + len - 7, ".weight") != 0 || s.rank < 2 ||
            strstr(name, "embeddings"))
            continue;
        snprintf(t->name[t->n], IPT_KEY_MAX, "%.*s", (int)(len - 7), name);
        t->m[t->n] = (ipt_module){.comp = comp,
                                  .name = t->name[t->n],
                                  .out = s.dim[0],
                                  .in = s.dim[s.rank - 1],
                                  .kh = 1,
                                  .kw = 1};
        if (s.rank == 4) {
            t->m[t->n].kh = s.dim[1];
            t->m[t->n].kw = s.dim[2];
        }
        t->n++;
    }
}

static void modules_of(ipt_ctx *ctx, const char *folder, model_modules *t)
{
    ipt_model *model = NULL;
    assert_ok(ctx, ipt_model_open(ctx, folder, NULL, &model));
    const ipt_model_config *c = ipt_model_get_config(model);
    *t = (model_modules){
        .ctx = ctx, .m = calloc(2000, sizeof *t->m), .name = calloc(2000, sizeof *t->name)};
    for (int k = 0; k < 3; k++) {
        assert_ok(ctx, ipt_graph_create(ctx, &t->g[k]));
        ipt_text_key key = {.batch = 1, .tokens = 77, .final_norm = true, .pooled = k == 2};
        if (k == 0)
            ipt_unet_build(t->g[k], &c->unet,
                           &(ipt_unet_key){.batch = 1, .h = 16, .w = 16, .tokens = 77});
        else if (c->has[k == 1 ? IPT_COMP_TEXT : IPT_COMP_TEXT2])
            ipt_text_build(t->g[k], k == 1 ? &c->text : &c->text2, &key);
        assert_ok(ctx, ipt_graph_status(t->g[k]));
        add_modules(t, t->g[k], k == 0 ? IPT_COMP_UNET : k == 1 ? IPT_COMP_TEXT : IPT_COMP_TEXT2);
    }
    ipt_model_close(&model);
}

static void modules_done(model_modules *t)
{
    for (int k = 0; k < 3; k++)
        ipt_graph_destroy(&t->g[k]);
    free(t->m);
    free(t->name);
}

/* --- published families ----------------------------------------------------------------------- */
static const struct {
    const char *file, *model;
    ipt_adapter_family family;
    size_t n_module;
    int32_t rank_min, rank_max;
    float scale; /* of the first module */
    bool conv, tucker;
} families[] = {
    {"golden_lora_kohya.safetensors", "sd1", IPT_ADAPTER_KOHYA, 90, 4, 4, 0.5f, false, false},
    {"golden_lora_locon.safetensors", "sd1", IPT_ADAPTER_KOHYA, 121, 2, 2, 0.5f, true, false},
    {"golden_lora_locon_cp.safetensors", "sd1", IPT_ADAPTER_KOHYA, 51, 2, 2, 1, true, true},
    {"golden_lora_attnprocs.safetensors", "sd1", IPT_ADAPTER_ATTN_PROCS, 68, 3, 3, 1, false, false},
    {"golden_lora_diffusers.safetensors", "sd1", IPT_ADAPTER_DIFFUSERS, 68, 2, 4, 1, false, false},
    {"golden_lora_peft.safetensors", "sd1", IPT_ADAPTER_PEFT, 80, 4, 4, 1, false, false},
    {"golden_lora_peft_metadata.safetensors", "sd1", IPT_ADAPTER_PEFT, 80, 4, 4, 1.5f, false,
     false},
    {"golden_lora_peft_folder", "sd1", IPT_ADAPTER_PEFT, 36, 4, 4, 1.5f, true, false},
    {"golden_lora_sdxl_kohya.safetensors", "sdxl", IPT_ADAPTER_KOHYA, 273, 2, 2, 1, true, false},
};

static void test_families(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(families); i++) {
        char path[512], folder[512];
        model_modules t;
        ipt_adapter_file *f = NULL;
        snprintf(folder, sizeof folder, IPT_TEST_DATA "/models/%s", families[i].model);
        snprintf(path, sizeof path, IPT_TEST_DATA "/%s", families[i].file);
        modules_of(ctx, folder, &t);
        assert_ok(ctx, ipt_adapter_open(ctx, path, t.m, t.n, &f));
        if (f->n_unmatched)
            fail_msg("%s: %zu unmatched: %s", path, f->n_unmatched, f->unmatched[0]);
        assert_int_equal(f->family, families[i].family);
        assert_int_equal(f->n_module, families[i].n_module);
        assert_int_equal(f->rank_min, families[i].rank_min);
        assert_int_equal(f->rank_max, families[i].rank_max);
        assert_true(fabs(f->module[0].scale - (double)families[i].scale) < 1e-6);
        assert_true(f->has_conv == families[i].conv && f->has_tucker == families[i].tucker);
        ipt_adapter_close(&f);
        modules_done(&t);
    }
    ipt_ctx_destroy(&ctx);
}

static void test_words_and_hashes(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    model_modules t;
    ipt_adapter_file *f = NULL;
    char *bytes = NULL, hex[65];
    size_t n = 0;
    uint8_t digest[32];
    ipt_sha256 h;
    modules_of(ctx, IPT_TEST_DATA "/models/sd1", &t);
    assert_ok(ctx,
              ipt_adapter_open(ctx, IPT_TEST_DATA "/golden_lora_kohya.safetensors", t.m, t.n, &f));
    assert_string_equal(f->name, "golden_lora_kohya");
    assert_int_equal(f->n_word, 2);
    assert_string_equal(f->word[0], "sks");
    assert_string_equal(f->word[1], "dog");
    assert_string_equal(f->sha256, "");
    ipt_adapter_hash(f);
    assert_ok(ctx, ipt_file_read(ctx, f->path, 1 << 24, &bytes, &n));
    ipt_sha256_init(&h);
    ipt_sha256_update(&h, bytes, n);
    ipt_sha256_final(&h, digest);
    ipt_hex(digest, 32, hex);
    assert_string_equal(f->sha256, hex);
    assert_memory_equal(f->autov2, hex, 10);
    assert_int_equal(strlen(f->autov3), 12);
    ipt_free(bytes);
    ipt_adapter_close(&f);
    modules_done(&t);
    ipt_ctx_destroy(&ctx);
}

/* w += weight * (b a)^T in logical order for one module of one file; nothing when it has none. */
static void merge(ipt_ctx *ctx, const ipt_adapter_file *f, const model_modules *t, const char *name,
                  double weight, double *w)
{
    for (size_t i = 0; i < f->n_module; i++) {
        const ipt_adapter_module *m = &f->module[i];
        if (t->m[m->module].comp != IPT_COMP_UNET || strcmp(t->m[m->module].name, name) != 0)
            continue;
        size_t r = (size_t)m->rank, k = (size_t)m->kh * (size_t)m->kw * (size_t)m->in,
               o = (size_t)m->out;
        float *a = calloc(k * r, sizeof *a), *b = calloc(r * o, sizeof *b);
        assert_ok(ctx, ipt_adapter_pack(ctx, m, NULL, a, b, r, 0));
        for (size_t y = 0; y < o; y++)
            for (size_t x = 0; x < k; x++)
                for (size_t j = 0; j < r; j++)
                    w[y * k + x] += weight * (double)a[x * r + j] * (double)b[j * o + y];
        free(a);
        free(b);
    }
}

/* Weights merged by the reference from two files at once. */
static void test_merged_weights(void **state)
{
    (void)state;
    static const char *const names[] = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "conv_out",
        "up_blocks.1.resnets.0.conv1",
        "up_blocks.1.attentions.1.proj_out",
    };
    static const double weight[] = {0.7, -0.4};
    ipt_ctx *ctx = test_ctx();
    model_modules t;
    ipt_adapter_file *f[2] = {NULL};
    ipt_safetensors *st = NULL;
    ipt_model *model = NULL;
    ipt_weights *base = NULL, *golden = NULL;
    modules_of(ctx, IPT_TEST_DATA "/models/sd1", &t);
    assert_ok(ctx, ipt_adapter_open(ctx, IPT_TEST_DATA "/golden_lora_kohya.safetensors", t.m, t.n,
                                    &f[0]));
    assert_ok(ctx, ipt_adapter_open(ctx, IPT_TEST_DATA "/golden_lora_locon.safetensors", t.m, t.n,
                                    &f[1]));
    assert_ok(ctx, ipt_safetensors_open(ctx, IPT_TEST_DATA "/golden_lora_sd1.safetensors", &st));
    assert_ok(ctx, ipt_model_open(ctx, IPT_TEST_DATA "/models/sd1", NULL, &model));
    assert_ok(ctx, ipt_model_weights(model, IPT_COMP_UNET, NULL, IPT_F32, NULL, &base));
    assert_ok(ctx, ipt_weights_file(ctx, st, NULL, IPT_F32, NULL, &golden));
    for (size_t k = 0; k < IPT_COUNT(names); k++) {
        char name[200], merged_name[240];
        size_t at = 0;
        while (at + 1 < t.n && strcmp(t.m[at].name, names[k]) != 0)
            at++;
        const ipt_module *m = &t.m[at];
        assert_string_equal(m->name, names[k]);
        ipt_shape s = ipt_shape4(IPT_F32, m->out, m->kh, m->kw, m->in);
        size_t n = ipt_shape_count(&s);
        double *got = calloc(n, sizeof *got), *want = calloc(n, sizeof *want);
        snprintf(name, sizeof name, "%s.weight", names[k]);
        snprintf(merged_name, sizeof merged_name, "merged_two.%s", name);
        assert_ok(ctx, base->read(base, name, &s, got));
        assert_ok(ctx, golden->read(golden, merged_name, &s, want));
        for (int i = 0; i < 2; i++)
            merge(ctx, f[i], &t, names[k], weight[i], got);
        for (size_t i = 0; i < n; i++) {
            if (fabs(got[i] - want[i]) > 1e-5)
                fail_msg("%s element %zu: %g, expected %g", names[k], i, got[i], want[i]);
        }
        free(got);
        free(want);
    }
    ipt_weights_destroy(&base);
    ipt_weights_destroy(&golden);
    ipt_model_close(&model);
    ipt_safetensors_close(&st);
    ipt_adapter_close(&f[0]);
    ipt_adapter_close(&f[1]);
    modules_done(&t);
    ipt_ctx_destroy(&ctx);
}

/* --- files made here -------------------------------------------------------------------------- */
static const ipt_module toy[] = {
    {IPT_COMP_UNET, "down_blocks.0.resnets.0.conv1", 3, 2, 3, 3, false, true},
    {IPT_COMP_UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 4, 4, 1, 1, false,
     true},
    {IPT_COMP_UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", 4, 4, 1, 1,
     false, true},
    {IPT_COMP_TEXT, "text_model.encoder.layers.0.self_attn.k_proj", 4, 4, 1, 1, false, true},
};
#define Q "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
#define C "lora_unet_down_blocks_0_resnets_0_conv1"

typedef struct toy_tensor {
    const char *name;
    int64_t dim[4];
    uint8_t rank;
    float fill; /* value of every element: NAN, or else fill + index */
} toy_tensor;

static uint8_t *toy_file(ipt_ctx *ctx, const toy_tensor *t, size_t n, const ipt_st_meta *meta,
                         size_t n_meta, size_t *size)
{
    char path[512], *bytes = NULL;
    ipt_st_write w[16];
    float *data[16];
    snprintf(path, sizeof path, "/tmp/ipt_test_adapter_%ld.safetensors", (long)getpid());
    for (size_t i = 0; i < n; i++) {
        size_t count = 1;
        w[i] = (ipt_st_write){.name = t[i].name, .dtype = IPT_ST_F32, .rank = t[i].rank};
        for (int d = 0; d < t[i].rank; d++) {
            w[i].dim[d] = t[i].dim[d];
            count *= (size_t)t[i].dim[d];
        }
        data[i] = calloc(count + 1, sizeof(float));
        for (size_t e = 0; e < count; e++)
            data[i][e] = t[i].fill + (float)e;
        w[i].data = data[i];
    }
    assert_ok(ctx, ipt_safetensors_write(ctx, path, w, n, meta, n_meta));
    assert_ok(ctx, ipt_file_read(ctx, path, 1 << 20, &bytes, size));
    for (size_t i = 0; i < n; i++)
        free(data[i]);
    unlink(path);
    return (uint8_t *)bytes;
}

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        toy_tensor t[4];
        size_t n;
        ipt_status want;
        const char *says;
    } rows[] = {
        {{{Q ".lora_down.weight", {2, 5}, 2, 0}, {Q ".lora_up.weight", {4, 2}, 2, 0}},
         2,
         IPT_ERR_SHAPE,
         "found shape [2,5], expected [2,4]"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 0}, {Q ".lora_up.weight", {5, 2}, 2, 0}},
         2,
         IPT_ERR_SHAPE,
         "found shape [5,2], expected [4,2]"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 0}, {Q ".lora_up.weight", {4, 3}, 2, 0}},
         2,
         IPT_ERR_SHAPE,
         "found shape [4,3], expected [4,2]"},
        {{{Q ".lora_down.weight", {0, 4}, 2, 0}, {Q ".lora_up.weight", {4, 0}, 2, 0}},
         2,
         IPT_ERR_SHAPE,
         "rank"},
        {{{Q ".lora_down.weight", {2, 4}, 2, NAN}, {Q ".lora_up.weight", {4, 2}, 2, 0}},
         2,
         IPT_ERR_FORMAT,
         "NaN or infinite, expected finite numbers (8 such values in 1 tensors)"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 0}, {Q ".lora_up.weight", {4, 2}, 2, INFINITY}},
         2,
         IPT_ERR_FORMAT,
         "(8 such values in 1 tensors)"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 0}},
         1,
         IPT_ERR_FORMAT,
         "but not '" Q ".lora_up.weight'"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 0},
          {Q ".lora_up.weight", {4, 2}, 2, 0},
          {Q ".alpha", {2}, 1, 1}},
         3,
         IPT_ERR_SHAPE,
         "found 2 elements"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 0},
          {Q ".lora_up.weight", {4, 2}, 2, 0},
          {Q ".alpha", {0}, 0, NAN}},
         3,
         IPT_ERR_FORMAT,
         "NaN"},
        {{{C ".lora_down.weight", {2, 2, 1, 1}, 4, 0}, {C ".lora_up.weight", {3, 2, 1, 1}, 4, 0}},
         2,
         IPT_ERR_SHAPE,
         "expected [2,2,3,3]"},
        {{{C ".lora_down.weight", {2, 2, 1, 1}, 4, 0},
          {C ".lora_up.weight", {3, 2, 1, 1}, 4, 0},
          {C ".lora_mid.weight", {2, 1, 3, 3}, 4, 0}},
         3,
         IPT_ERR_SHAPE,
         "lora_mid"},
        {{{Q ".lokr_w1", {2, 2}, 2, 0}}, 1, IPT_ERR_FORMAT, "but not '" Q ".lokr_w2'"},
        {{{Q ".lokr_w1", {3, 2}, 2, 0}, {Q ".lokr_w2", {2, 2}, 2, 0}},
         2,
         IPT_ERR_SHAPE,
         "key '" Q ".lokr_w1': found shape [3,2], expected divisors of [4,4]"},
        {{{Q ".lokr_w1", {2, 2}, 2, 0}, {Q ".lokr_w2", {2, 3}, 2, 0}},
         2,
         IPT_ERR_SHAPE,
         "key '" Q ".lokr_w2': found shape [2,3], expected [2,2]"},
        {{{Q ".lokr_w1", {2, 2}, 2, 0}, {Q ".lokr_w2_a", {2, 1}, 2, 0}},
         2,
         IPT_ERR_FORMAT,
         "but not '" Q ".lokr_w2_b'"},
        {{{Q ".hada_w1_a", {4, 2}, 2, 0}}, 1, IPT_ERR_FORMAT, "but not '" Q ".hada_w1_b'"},
        {{{Q ".hada_w1_a", {4, 2}, 2, 0},
          {Q ".hada_w1_b", {2, 4}, 2, 0},
          {Q ".hada_w2_a", {4, 2}, 2, 0},
          {Q ".hada_w2_b", {2, 5}, 2, 0}},
         4,
         IPT_ERR_SHAPE,
         "hada_w2_b': found shape [2,5], expected [2,4]"},
        {{{Q ".dora_scale", {4, 1}, 2, 1}}, 1, IPT_ERR_MISSING, "none of its 1 keys"},
        {{{Q ".lora_down.weight", {2, 4}, 2, 1},
          {Q ".lora_up.weight", {4, 2}, 2, 1},
          {Q ".dora_scale", {5, 1}, 2, 1}},
         3,
         IPT_ERR_SHAPE,
         "dora_scale': found shape [5,1], expected [4,1] or [1,4]"},
        {{{Q ".diff", {4, 5}, 2, 0}}, 1, IPT_ERR_SHAPE, "found shape [4,5], expected [4,4]"},
        {{{Q ".diff_b", {5}, 1, 0}}, 1, IPT_ERR_SHAPE, "found shape [5], expected [4]"},
        {{{Q ".w_norm", {4}, 1, 1}}, 1, IPT_ERR_MISSING, "none of its 1 keys"},
        {{{Q ".oft_blocks", {3, 2, 2}, 3, 0}}, 1, IPT_ERR_SHAPE, "blocks x size = outputs"},
        {{{Q ".oft_blocks", {2, 2, 3}, 3, 0}}, 1, IPT_ERR_SHAPE, "expected [2,2,2]"},
        {{{Q ".oft_blocks", {3, 2, 2, 2}, 4, 0}}, 1, IPT_ERR_SHAPE, "[stages,blocks,size,size]"},
        {{{Q ".on_input", {1}, 1, 0}}, 1, IPT_ERR_FORMAT, "but not '" Q ".weight'"},
        {{{Q ".weight", {3}, 1, 0}, {Q ".on_input", {1}, 1, 0}},
         2,
         IPT_ERR_SHAPE,
         "found shape [3], expected [4]"},
        {{{Q ".a1.weight", {4, 2}, 2, 0}}, 1, IPT_ERR_FORMAT, "but not '" Q ".a2.weight'"},
        {{{Q ".oft_R.weight", {2, 2}, 2, 0}}, 1, IPT_ERR_UNSUPPORTED, "PEFT's OFT adapter"},
        {{{Q ".set_weight", {4, 3}, 2, 0}}, 1, IPT_ERR_SHAPE, "expected [4,4]"},
        {{{"model.diffusion_model.out.2.weight", {4, 4}, 2, 0}},
         1,
         IPT_ERR_FORMAT,
         "this is a checkpoint"},
        {{{"something", {4}, 1, 0}}, 1, IPT_ERR_MISSING, "none of its 1 keys ('something' ...)"},
        {{{"", {0}, 0, 0}}, 0, IPT_ERR_FORMAT, "no tensors"},
    };
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        size_t n = 0;
        uint8_t *p = toy_file(ctx, rows[i].t, rows[i].n, NULL, 0, &n);
        ipt_adapter_file *f = NULL;
        ipt_status s =
            ipt_adapter_open_memory(ctx, "bad.safetensors", p, n, toy, IPT_COUNT(toy), &f);
        if (s == IPT_OK) {
            s = ipt_adapter_check(f, false);
            ipt_adapter_close(&f);
        }
        const char *text = ipt_last_error(ctx);
        if (s != rows[i].want || !strstr(text, rows[i].says) ||
            strncmp(text, "bad.safetensors: ", 17) != 0)
            fail_msg("row %zu: %s: %s", i, ipt_status_name(s), text);
        assert_null(f);
        ipt_free(p);
    }
    ipt_ctx_destroy(&ctx);
}

/* Stacked operands: order of the kernel's rows, scale, column. */
static void test_pack(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    static const toy_tensor t[] = {
        {C ".lora_down.weight", {2, 2, 3, 3}, 4, 0},
        {C ".lora_up.weight", {3, 2, 1, 1}, 4, 1},
        {C ".alpha", {1}, 1, 1},
        {"lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight", {1, 4}, 2, 5},
        {"lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight", {4, 1}, 2, 1},
        {"lora_te_other.lora_up.weight", {4, 1}, 2, 1},
    };
    size_t n = 0;
    uint8_t *p = toy_file(ctx, t, IPT_COUNT(t), NULL, 0, &n);
    ipt_adapter_file *f = NULL;
    assert_ok(ctx, ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f));
    assert_int_equal(f->n_module, 2);
    assert_int_equal(f->n_unmatched, 1);
    assert_string_equal(f->unmatched[0], "lora_te_other.lora_up.weight");
    const ipt_adapter_module *m = &f->module[0];
    assert_int_equal(m->module, 0);
    assert_true(m->scale == 0.5 && m->alpha == 1.0f);
    enum { R = 5, K = 18, O = 3 };
    float a[K * R], b[R * O];
    for (int i = 0; i < K * R; i++)
        a[i] = -1;
    for (int i = 0; i < R * O; i++)
        b[i] = -1;
    assert_ok(ctx, ipt_adapter_pack(ctx, m, NULL, a, b, R, 2));
    for (int ky = 0; ky < 3; ky++)
        for (int kx = 0; kx < 3; kx++)
            for (int i = 0; i < 2; i++)
                for (int r = 0; r < R; r++) {
                    float want =
                        r >= 2 && r < 4 ? (float)(((r - 2) * 2 + i) * 9 + ky * 3 + kx) : -1;
                    assert_true(a[((ky * 3 + kx) * 2 + i) * R + r] == want);
                }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++)
            assert_true(b[r * O + o] == (r >= 2 && r < 4 ? 0.5f * (float)(1 + o * 2 + r - 2) : -1));
    ipt_adapter_close(&f);
    ipt_free(p);
    ipt_ctx_destroy(&ctx);
}

/* Tucker: the expanded factor equals mid x down, term by term. */
static void test_tucker(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    static const toy_tensor t[] = {
        {C ".lora_down.weight", {2, 2, 1, 1}, 4, 1},
        {C ".lora_mid.weight", {2, 2, 3, 3}, 4, 0},
        {C ".lora_up.weight", {3, 2, 1, 1}, 4, 1},
    };
    size_t n = 0;
    uint8_t *p = toy_file(ctx, t, IPT_COUNT(t), NULL, 0, &n);
    ipt_adapter_file *f = NULL;
    assert_ok(ctx, ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f));
    assert_true(f->has_tucker && f->module[0].rank == 2);
    float down[18 * 2], up[2 * 3];
    assert_ok(ctx, ipt_adapter_pack(ctx, &f->module[0], NULL, down, up, 2, 0));
    for (int a = 0; a < 2; a++)
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 9; k++) {
                float want = 0;
                for (int b = 0; b < 2; b++)
                    want += (float)((a * 2 + b) * 9 + k) * (float)(1 + b * 2 + i);
                assert_true(fabsf(down[(k * 2 + i) * 2 + a] - want) < 1e-4f);
            }
    ipt_adapter_close(&f);
    ipt_free(p);
    ipt_ctx_destroy(&ctx);
}

/* cloneofsimo: numbers instead of names, words beside them. */
static void test_ordinals(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    static const toy_tensor t[] = {
        {"unet:0:down", {1, 4}, 2, 1},
        {"unet:0:up", {4, 1}, 2, 1},
        {"unet:1:down", {1, 4}, 2, 1},
        {"unet:1:up", {4, 1}, 2, 1},
        {"unet:2:down", {1, 4}, 2, 1},
        {"unet:2:up", {4, 1}, 2, 1},
        {"unet:3:down", {1, 4}, 2, 1},
        {"unet:3:up", {4, 1}, 2, 1},
        {"text_encoder:0:down", {1, 4}, 2, 1},
        {"text_encoder:0:up", {4, 1}, 2, 1},
        {"<s1>", {4}, 1, 1},
    };
    const ipt_st_meta meta[] = {{"<s1>", "<embed>"},
                                {"unet", "[\"CrossAttention\", \"Attention\", \"GEGLU\"]"}};
    size_t n = 0;
    uint8_t *p = toy_file(ctx, t, IPT_COUNT(t), meta, 2, &n);
    ipt_adapter_file *f = NULL;
    assert_ok(ctx, ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f));
    assert_int_equal(f->family, IPT_ADAPTER_CLONEOFSIMO);
    assert_int_equal(f->n_module, 3);
    assert_int_equal(f->module[0].module, 1); /* attn1.to_q */
    assert_int_equal(f->module[1].module, 2); /* attn1.to_out.0 */
    assert_int_equal(f->module[2].module, 3);
    assert_int_equal(f->n_unmatched, 4); /* to_k and to_v are not in the toy's list */
    assert_int_equal(f->n_embedding, 1);
    assert_string_equal(f->embedding[0].word, "<s1>");
    ipt_adapter_close(&f);
    ipt_free(p);
    ipt_ctx_destroy(&ctx);
}

/* --- PEFT's settings -------------------------------------------------------------------------- */
#define Q_NAME "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
#define K_NAME "text_model.encoder.layers.0.self_attn.k_proj"
#define SETTINGS(text)                                                                             \
    {                                                                                              \
        {                                                                                          \
            "lora_adapter_metadata", text                                                          \
        }                                                                                          \
    }

/* A UNet module and a text module of rank 4 with metadata; scales that PEFT would use. */
static void test_settings(void **state)
{
    (void)state;
    static const char *const names[][2] = {
        {"unet." Q_NAME ".lora_A", "text_encoder." K_NAME ".lora_A"},
        {"unet." Q_NAME ".lora.down", "text_encoder." K_NAME ".lora_linear_layer.down"},
        {"unet." Q_NAME ".lora.down", "text_encoder." K_NAME ".lora.down"},
        {"unet." Q_NAME ".lora_A", "text_encoder.encoder.layers.0.self_attn.k_proj.lora_A"},
        {Q_NAME ".lora_A", K_NAME ".lora_A"},
    };
    static const struct {
        int names;
        const char *text;
        float unet, te; /* scales; unet 0: refused, with what `says` */
        const char *says;
    } rows[] = {
        {0, "{\"unet.lora_alpha\":6,\"text_encoder.lora_alpha\":2}", 1.5F, 0.5F, NULL},
        {1, "{\"unet.lora_alpha\":6,\"text_encoder.lora_alpha\":2}", 1.5F, 0.5F, NULL},
        {1, "{\"unet.lora_alpha\":6,\"unet.use_rslora\":true}", 3, 1, NULL},
        {2, "{\"text_encoder.r\":4,\"text_encoder.use_rslora\":true}", 1, 4, NULL}, /* alpha 8 */
        {4, "{\"lora_alpha\":2,\"r\":4}", 0.5F, 0.5F, NULL}, /* one model's own metadata */
        {0, "{\"unet.r\":4,\"unet.alpha_pattern\":{\"^" Q_NAME "\":16,\"to_q\":4}}", 4, 1, NULL},
        {0, "{\"unet.r\":4,\"unet.alpha_pattern\":{\"^to_q\":16,\"attn1.to_q\":4}}", 1, 1, NULL},
        {0, "{\"unet.r\":4,\"unet.alpha_pattern\":{\"o_q\":16}}", 2, 1, NULL},
        {0, "{\"unet.r\":4,\"unet.alpha_pattern\":{\".*attn[0-9].to_(q|k)\":16}}", 4, 1, NULL},
        {3,
         "{\"unet.lora_alpha\":4,\"text_encoder.lora_alpha\":4,\"text_encoder.alpha_pattern\":"
         "{\"^encoder.layers.0.self_attn.k_proj\":1}}",
         1, 0.25F, NULL},
        {3,
         "{\"unet.lora_alpha\":4,\"text_encoder.lora_alpha\":4,\"text_encoder.alpha_pattern\":"
         "{\"^" K_NAME "\":1}}",
         1, 0.25F, NULL},
        {0, "{\"unet.lora_alpha\":\"6\"}", 0, 0, "'lora_alpha' is \"6\", expected a number"},
        {0, "{\"unet.alpha_pattern\":{\"to_q\":[]}}", 0, 0, "'to_q' is [], expected a number"},
        {0, "{\"unet.alpha_pattern\":[3]}", 0, 0, "'alpha_pattern' is [3], expected an object"},
        {0, "{\"unet.r\":\"4\"}", 0, 0, "'r' is \"4\", expected a number"},
        {0, "{\"unet.r\":4,\"unet.use_rslora\":1}", 0, 0, "'use_rslora' is 1, expected true or"},
        {0, "{\"unet.lora_alpha\":1e300}", 0, 0, "alpha 1e+300 gives a scale of"},
        {0, "{\"unet.alpha_pattern\":{\"(q\":1}}", 0, 0, "alpha_pattern '(q' is no"},
        {0, "{\"unet.peft_type\":\"VERA\"}", 0, 0, "VERA adapter (peft_type)"},
        {0, "{", 0, 0, "metadata 'lora_adapter_metadata': not valid JSON"},
    };
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        char key[4][200];
        toy_tensor t[4];
        for (int k = 0; k < 4; k++) {
            const char *down = names[rows[i].names][k / 2];
            size_t n = strlen(down);
            bool is_a = strcmp(down + n - 6, "lora_A") == 0;
            ipt_name(key[k], sizeof key[k], "%.*s%s.weight", (int)(is_a ? n - 1 : n - 4), down,
                     k % 2 ? (is_a ? "B" : "up") : (is_a ? "A" : "down"));
            t[k] = (toy_tensor){key[k], {4, 4}, 2, 1};
        }
        const ipt_st_meta meta[] = SETTINGS(rows[i].text);
        size_t n = 0;
        uint8_t *p = toy_file(ctx, t, 4, meta, 1, &n);
        ipt_adapter_file *f = NULL;
        ipt_status s = ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f);
        if (rows[i].says) {
            if (s == IPT_OK || !strstr(ipt_last_error(ctx), rows[i].says))
                fail_msg("row %zu: %s: %s", i, ipt_status_name(s), ipt_last_error(ctx));
        } else {
            assert_ok(ctx, s);
            assert_int_equal(f->n_module, 2);
            if (fabs(f->module[0].scale - (double)rows[i].unet) > 1e-6 ||
                fabs(f->module[1].scale - (double)rows[i].te) > 1e-6)
                fail_msg("row %zu: scales %g and %g", i, f->module[0].scale, f->module[1].scale);
        }
        ipt_adapter_close(&f);
        ipt_free(p);
    }
    ipt_ctx_destroy(&ctx);
}

/* PEFT's file of one text model says nothing of which of two it is; the shapes do. */
static void test_either_encoder(void **state)
{
    (void)state;
    static const ipt_module two[] = {{IPT_COMP_TEXT, K_NAME, 4, 4, 1, 1, false, true},
                                     {IPT_COMP_TEXT2, K_NAME, 5, 5, 1, 1, false, true}};
    static const char *const names[] = {("base_model.model." K_NAME), K_NAME,
                                        "base_model.model.encoder.layers.0.self_attn.k_proj"};
    ipt_ctx *ctx = test_ctx();
    for (int64_t width = 4; width < 7; width++)
        for (size_t i = 0; i < IPT_COUNT(names); i++) {
            char key[2][200];
            ipt_name(key[0], sizeof key[0], "%s.lora_A.weight", names[i]);
            ipt_name(key[1], sizeof key[1], "%s.lora_B.weight", names[i]);
            const toy_tensor t[] = {{key[0], {1, width}, 2, 1}, {key[1], {width, 1}, 2, 1}};
            size_t n = 0;
            uint8_t *p = toy_file(ctx, t, 2, NULL, 0, &n);
            ipt_adapter_file *f = NULL;
            ipt_status s = ipt_adapter_open_memory(ctx, "p", p, n, two, 2, &f);
            assert_int_equal(s, width == 6 ? IPT_ERR_MISSING : IPT_OK);
            if (s == IPT_OK) {
                assert_int_equal(f->n_module, 1);
                assert_int_equal(f->module[0].module, width - 4);
            }
            ipt_adapter_close(&f);
            ipt_free(p);
        }
    ipt_ctx_destroy(&ctx);
}

/* Words of OneTrainer and A1111: several vectors, one list an encoder, a dot in the word. */
static void test_bundled_words(void **state)
{
    (void)state;
    static const toy_tensor t[] = {
        {Q ".lora_down.weight", {1, 4}, 2, 1},
        {Q ".lora_up.weight", {4, 1}, 2, 1},
        {"bundle_emb.one.string_to_param.*", {3, 4}, 2, 1},
        {"bundle_emb.v1.5.clip_l", {2, 4}, 2, 1},
        {"bundle_emb.v1.5.clip_g", {2, 5}, 2, 1},
        {"bundle_emb.two.emb_params", {4}, 1, 1},
        {"bundle_emb.one.clip_l", {1, 4}, 2, 1}, /* the same word again: a warning */
        {"<s1>", {4}, 1, NAN},                   /* matters to who writes it only */
    };
    ipt_ctx *ctx = test_ctx();
    size_t n = 0;
    uint8_t *p = toy_file(ctx, t, IPT_COUNT(t), NULL, 0, &n);
    ipt_adapter_file *f = NULL;
    assert_ok(ctx, ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f));
    assert_int_equal(f->n_unmatched, 0);
    assert_int_equal(f->n_embedding, 4);
    static const char *const words[] = {"one", "v1.5", "two", "<s1>"};
    for (size_t i = 0; i < f->n_embedding; i++) {
        size_t k = 0;
        while (k < 4 && strcmp(words[k], f->embedding[i].word) != 0)
            k++;
        assert_true(k < 4 && f->embedding[i].vector[0]);
        assert_int_equal(f->embedding[i].vector[1] != NULL, k == 1);
    }
    ipt_adapter_close(&f);
    ipt_free(p);
    ipt_ctx_destroy(&ctx);
}

/* --- what does not fit ------------------------------------------------------------------------ */
#define T_KEY "lora_te_text_model_encoder_layers_0_self_attn_k_proj"

static void test_partial(void **state)
{
    (void)state;
    static const toy_tensor t[] = {
        {T_KEY ".lora_down.weight", {1, 4}, 2, 5},
        {T_KEY ".lora_up.weight", {4, 1}, 2, NAN},
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", {1, 4}, 2, 1},
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", {4, 1}, 2, 1},
        {"lora_unet_double_blocks_0_img_attn_qkv.alpha", {0}, 0, 1},
        {"lora_unet_single_blocks_10_linear1.lora_down.weight", {1, 4}, 2, INFINITY},
        {"lora_unet_single_blocks_10_linear1.lora_up.weight", {4, 1}, 2, 1},
        /* these change nothing in any model */
        {"lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight", {1, 4}, 2, 1},
        {"lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight", {1, 1}, 2, 0},
        {"lora_te_text_model_encoder_layers_11_mlp_fc1.alpha", {0}, 0, 1},
        {"lora_unet_gone.alpha", {0}, 0, 1},
        {"nothing", {0}, 1, 1},
    };
    static const ipt_st_meta meta[] = {{"modelspec.architecture", "stable-diffusion-v1/lora"}};
    ipt_ctx *ctx = test_ctx();
    size_t n = 0;
    uint8_t *p = toy_file(ctx, t, IPT_COUNT(t), meta, 1, &n);
    ipt_adapter_file *f = NULL;
    assert_ok(ctx, ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f));
    assert_int_equal(f->n_key, IPT_COUNT(t));
    assert_int_equal(f->n_unmatched, 5);
    assert_int_equal(f->n_harmless, 5);
    assert_int_equal(f->n_group, 2);
    for (size_t i = 0; i < 2; i++) {
        bool twice = f->group[i].n == 2;
        assert_string_equal(f->group[i].name,
                            twice ? "lora_unet_single_blocks_" : "lora_unet_double_blocks_");
        assert_true(twice || f->group[i].n == 3);
    }
    assert_string_equal(f->made_for, "Flux");
    assert_string_equal(f->claims, "stable-diffusion-v1/lora");
    assert_int_equal(f->n_bad, 2);
    assert_int_equal(f->bad_values, 8);
    assert_string_equal(f->bad_module, T_KEY ".lora_up.weight");
    assert_int_equal(ipt_adapter_check(f, false), IPT_ERR_MISSING);
    assert_non_null(strstr(ipt_last_error(ctx), "p: 5 of 12 keys fit nothing in this model; by its "
                                                "keys it was made for Flux, its metadata says "
                                                "'stable-diffusion-v1/lora'; --allow-partial"));
    assert_int_equal(ipt_adapter_check(f, true), IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "key '" T_KEY ".lora_up.weight'"));
    ipt_adapter_close(&f);
    ipt_free(p);
    ipt_ctx_destroy(&ctx);
}

/* Published names of other bases, whatever the metadata claims. */
static void test_made_for(void **state)
{
    (void)state;
    static const struct {
        const char *key;
        int64_t dim[2];
        const char *base; /* NULL: not told */
    } rows[] = {
        {"lora_unet_single_blocks_0_linear1.lora_down.weight", {4, 3072}, "Flux"},
        {"transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", {4, 3072}, "Flux"},
        {"lora_unet_double_blocks_19_img_mod_lin.lora_down.weight", {4, 3072}, "HunyuanVideo"},
        {"lora_unet_double_blocks_3_img_mlp_0.lora_down.weight", {4, 3072}, "Flux"},
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", {4, 1536}, "SD 3"},
        {"transformer.transformer_blocks.5.attn.add_q_proj.lora_A.weight", {4, 1536}, "SD 3"},
        {"transformer.transformer_blocks.30.attn.add_q_proj.lora_A.weight",
         {4, 3072},
         "Qwen-Image"},
        {"transformer_blocks.2.img_mlp.net.0.proj.lora_B.weight", {4, 4}, "Qwen-Image"},
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
         {4, 3072},
         "Flux or Qwen-Image"},
        {"transformer.transformer_blocks.0.attn.to_v.lora_A.weight", {4, 1536}, "SD 3"},
        {"transformer.transformer_blocks.59.attn.to_add_out.lora_B.weight",
         {3072, 4},
         "Qwen-Image"},
        {"transformer.transformer_blocks.7.txt_mlp.net.2.lora_A.weight", {4, 4}, "Qwen-Image"},
        {"lora_unet_transformer_blocks_0_attn_to_k.lora_down.weight", {4, 2432}, "SD 3"},
        {"diffusion_model.blocks.3.self_attn.q.lora_A.weight", {4, 5120}, "Wan"},
        {"lora_unet_blocks_3_ffn_0.lora_down.weight", {4, 5120}, "Wan"},
        {"diffusion_model.blocks.3.self_attn.q_proj.lora_A.weight", {4, 2048}, "Cosmos"},
        {"diffusion_model.blocks.0.cross_attn.k.lora_A.weight", {4, 5120}, "Wan"},
        {"lora_unet_blocks_0_cross_attn_k.lora_down.weight", {4, 5120}, "Wan"},
        {"transformer.blocks.0.attn2.to_k.lora_A.weight", {4, 5120}, "Wan"},
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
         {4, 2048},
         "SDXL"},
        {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
         {4, 1024},
         "SD 2.x"},
        {"mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
         {4, 768},
         "SD 1.x"},
        {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight",
         {4, 768},
         NULL},
    };
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        const toy_tensor t[] = {{T_KEY ".lora_down.weight", {1, 4}, 2, 5},
                                {T_KEY ".lora_up.weight", {4, 1}, 2, 1},
                                {rows[i].key, {rows[i].dim[0], rows[i].dim[1]}, 2, 1}};
        static const ipt_st_meta meta[] = {{"ss_base_model_version", "sd_v1"}};
        size_t n = 0;
        uint8_t *p = toy_file(ctx, t, 3, meta, 1, &n);
        ipt_adapter_file *f = NULL;
        assert_ok(ctx, ipt_adapter_open_memory(ctx, "p", p, n, toy, IPT_COUNT(toy), &f));
        if (!rows[i].base != !f->made_for ||
            (f->made_for && strcmp(f->made_for, rows[i].base) != 0))
            fail_msg("%s: '%s'", rows[i].key, f->made_for ? f->made_for : "nothing");
        ipt_adapter_close(&f);
        ipt_free(p);
    }
    ipt_ctx_destroy(&ctx);
}

static void test_not_adapters(void **state)
{
    (void)state;
    static const struct {
        const char *path;
        ipt_status want;
        const char *says;
    } rows[] = {
        {IPT_TEST_DATA "/models/sd1", IPT_ERR_MISSING,
         "a folder without adapter_model.safetensors"},
        {IPT_TEST_DATA "/models/sd1/model_index.json", IPT_ERR_FORMAT, "this is text"},
        {IPT_TEST_DATA "/model_sd1_single_f16.safetensors", IPT_ERR_FORMAT, "this is a checkpoint"},
        {NULL, IPT_ERR_IO, "No such file"},
    };
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_adapter_file *f = NULL;
        char none[512];
        const char *path =
            rows[i].path ? rows[i].path : test_nowhere(none, sizeof none, "lora.safetensors");
        ipt_status s = ipt_adapter_open(ctx, path, toy, IPT_COUNT(toy), &f);
        if (s != rows[i].want || !strstr(ipt_last_error(ctx), rows[i].says))
            fail_msg("%s: %s: %s", path, ipt_status_name(s), ipt_last_error(ctx));
    }
    ipt_ctx_destroy(&ctx);
}

static void test_oom(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    assert_int_equal(ipt_ctx_create(NULL, NULL, &ctx), IPT_OK);
    model_modules t;
    modules_of(ctx, IPT_TEST_DATA "/models/sd1", &t);
    static const char *const files[] = {IPT_TEST_DATA "/golden_lora_locon_cp.safetensors",
                                        IPT_TEST_DATA "/golden_lora_peft_folder"};
    for (size_t k = 0; k < IPT_COUNT(files); k++) {
        ipt_adapter_file *f = NULL;
        uint64_t before = ipt_alloc_count(ctx);
        assert_ok(ctx, ipt_adapter_open(ctx, files[k], t.m, t.n, &f));
        uint64_t n = ipt_alloc_count(ctx) - before;
        ipt_adapter_close(&f);
        for (uint64_t i = 1; i <= n; i++) {
            ipt_alloc_fail_after(ctx, i);
            ipt_status s = ipt_adapter_open(ctx, files[k], t.m, t.n, &f);
            ipt_alloc_fail_after(ctx, 0);
            if (s != IPT_ERR_NOMEM)
                fail_msg("%s: allocation %" PRIu64 ": %s", files[k], i, ipt_status_name(s));
        }
    }
    modules_done(&t);
    ipt_ctx_destroy(&ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_families),       cmocka_unit_test(test_words_and_hashes),
        cmocka_unit_test(test_merged_weights), cmocka_unit_test(test_refused),
        cmocka_unit_test(test_pack),           cmocka_unit_test(test_tucker),
        cmocka_unit_test(test_ordinals),       cmocka_unit_test(test_settings),
        cmocka_unit_test(test_either_encoder), cmocka_unit_test(test_bundled_words),
        cmocka_unit_test(test_partial),        cmocka_unit_test(test_made_for),
        cmocka_unit_test(test_not_adapters),   cmocka_unit_test(test_oom),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
