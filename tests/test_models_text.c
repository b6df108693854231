/* tests/test_models_text.c - token ids and text encoders of the tiny models against transformers:
 * last layer, clip skip, both pooling rules, injected vectors, single files. */
#include <math.h>
#include <string.h>

#include "tests/golden.h"
#include "text_encoder/text_encoder.h"
#include "text_encoder/tokenizer.h"

static const double LIMIT = 1e-4; /* of the largest value */

/* One run; text [N,77,width], pooled (may be NULL) [N,p]. */
typedef struct text_run {
    const int32_t *ids;
    const float *keep, *extra; /* injected: [N,77,1], [N,77,width] */
    ipt_text_key key;
    float *text, *pooled;
} text_run;

static void run_text(bench *b, const ipt_text_config *c, ipt_weights *w, const text_run *r)
{
    int32_t n = r->key.batch, t = r->key.tokens, eos[GOLDEN_MAX_BATCH] = {0};
    size_t width = (size_t)c->width, rows = (size_t)(n * t);
    ipt_graph *g = NULL;
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_text_build(g, c, &r->key);
    ipt_plan *p = bench_plan(b, &g, w);
    assert_ok(b->ctx, ipt_plan_write(p, "ids", r->ids, rows * sizeof *r->ids));
    for (int32_t i = 0; i < n; i++)
        eos[i] = ipt_text_eos(c, r->ids + i * t, t);
    if (r->key.pooled)
        assert_ok(b->ctx, ipt_plan_write(p, "eos", eos, (size_t)n * sizeof *eos));
    if (r->key.injected) {
        assert_ok(b->ctx, ipt_plan_write(p, "keep", r->keep, rows * sizeof(float)));
        assert_ok(b->ctx, ipt_plan_write(p, "extra", r->extra, rows * width * sizeof(float)));
    }
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "text", r->text, rows * width * sizeof(float)));
    size_t wide = c->has_projection ? (size_t)c->projection_dim : width;
    if (r->key.pooled)
        assert_ok(b->ctx, ipt_plan_read(p, "pooled", r->pooled, (size_t)n * wide * sizeof(float)));
    ipt_plan_destroy(&p);
}

static void compare(bench *b, const ipt_safetensors *st, const char *key, const float *got,
                    double limit)
{
    size_t n = 0;
    float *want = golden_f32(b->ctx, st, key, &n);
    double e = golden_max_rel(want, got, n);
    print_message("  %s %s: %.2g\n", b->name, key, e);
    golden_at_most(e, limit, "%s %s on %s: largest error", ipt_safetensors_path(st), key, b->name);
    ipt_free(want);
}

/* golden_clip_*: four texts; last, penultimate, skip 2, both pooling rules. */
static void check_clip(bench *b, const char *golden, const char *folder, int comp, double limit)
{
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, golden);
    ipt_model *m = bench_model(b, folder, NULL);
    ipt_weights *w = bench_weights(b, m, comp);
    const ipt_model_config *mc = ipt_model_get_config(m);
    ipt_text_config c = comp == IPT_COMP_TEXT ? mc->text : mc->text2;
    int32_t *ids = golden_i32(b->ctx, st, "ids", NULL);
    float *text = ipt_calloc(b->ctx, 4 * 77 * (size_t)c.width, sizeof *text);
    float *pooled = ipt_calloc(b->ctx, 4 * 64, sizeof *pooled);
    assert_true(text && pooled);
    text_run r = {.ids = ids, .text = text, .pooled = pooled};
    r.key =
        (ipt_text_key){.batch = 4, .tokens = 77, .final_norm = true, .pooled = true, .act = b->act};
    c.eos = 2;
    run_text(b, &c, w, &r);
    compare(b, st, "last", text, limit);
    compare(b, st, "pooled_legacy", pooled, limit);
    c.eos = 1;
    r.key.skip = 1;
    run_text(b, &c, w, &r);
    compare(b, st, "skip2", text, limit);
    compare(b, st, "pooled_eos", pooled, limit);
    r.key.final_norm = r.key.pooled = false;
    run_text(b, &c, w, &r);
    compare(b, st, "penultimate", text, limit);
    ipt_free(ids);
    ipt_free(text);
    ipt_free(pooled);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
    ipt_safetensors_close(&st);
}

static void test_clip(void **state)
{
    bench *b = bench_ready(state);
    check_clip(b, "golden_clip_sd1", GOLDEN("models/sd1"), IPT_COMP_TEXT, LIMIT);
    check_clip(b, "golden_clip_sd2", GOLDEN("models/sd2"), IPT_COMP_TEXT, LIMIT);
    check_clip(b, "golden_clip_sdxl_2", GOLDEN("models/sdxl"), IPT_COMP_TEXT2, LIMIT);
}

static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    check_clip(b, "golden_clip_sd1", GOLDEN("models/sd1"), IPT_COMP_TEXT, 2e-2);
    check_clip(b, "golden_clip_sdxl_2", GOLDEN("models/sdxl"), IPT_COMP_TEXT2, 2e-2);
}

/* The prompt's ids as the pipeline's tokenizer makes them: one chunk, no prompt language. */
static void prompt_ids(bench *b, ipt_model *m, int comp, const char *text, int32_t *ids)
{
    const ipt_prompt_attr attr = {.plain = true, .max_chunks = 1};
    ipt_tokenizer *tok = NULL;
    ipt_prompt *prompt = NULL;
    assert_non_null(ipt_model_tokenizer(m, comp));
    assert_ok(b->ctx, ipt_tokenizer_load_folder(b->ctx, ipt_model_tokenizer(m, comp), &tok));
    assert_ok(b->ctx, ipt_prompt_create(b->ctx, tok, text, strlen(text), &attr, &prompt));
    assert_int_equal(prompt->n_chunk, 1);
    memcpy(ids, prompt->ids, 77 * sizeof *ids);
    ipt_prompt_destroy(&prompt);
    ipt_tokenizer_destroy(&tok);
}

/* Embedding of one prompt by one encoder, [77,width] (and pooled). */
static void embed(bench *b, ipt_model *m, int comp, bool sdxl, const int32_t *ids, float *text,
                  float *pooled)
{
    const ipt_model_config *mc = ipt_model_get_config(m);
    const ipt_text_config *c = comp == IPT_COMP_TEXT ? &mc->text : &mc->text2;
    ipt_weights *w = bench_weights(b, m, comp);
    text_run r = {.ids = ids, .text = text, .pooled = pooled};
    r.key = (ipt_text_key){.batch = 1,
                           .tokens = 77,
                           .skip = sdxl ? 1 : 0,
                           .final_norm = !sdxl,
                           .pooled = pooled != NULL,
                           .act = b->act};
    run_text(b, c, w, &r);
    ipt_weights_destroy(&w);
}

static void check_ids(bench *b, ipt_model *m, const ipt_safetensors *st, int comp, const char *key,
                      const char *meta, int32_t *ids)
{
    int32_t *want = golden_i32(b->ctx, st, key, NULL);
    prompt_ids(b, m, comp, ipt_safetensors_meta(st, meta), ids);
    assert_memory_equal(ids, want, 77 * sizeof *ids);
    ipt_free(want);
}

/* Prompt -> ids -> embeddings of a whole model, both encoders side by side for SDXL. */
static void check_prompts(bench *b, const char *model, const char *path, const char *config,
                          double limit)
{
    static const char *const sides[2][4] = {
        {"prompt", "ids", "ids_2", ""},
        {"negative", "ids_negative", "ids_2_negative", "_negative"}};
    char name[64];
    ipt_safetensors *st =
        golden_open(b->ctx, IPT_TEST_DATA, ipt_name(name, sizeof name, "golden_%s_unet", model));
    ipt_model *m = bench_model(b, path, config);
    const ipt_model_config *mc = ipt_model_get_config(m);
    bool sdxl = mc->arch == IPT_ARCH_SDXL;
    size_t w1 = (size_t)mc->text.width, w2 = sdxl ? (size_t)mc->text2.width : 0;
    float *one = ipt_calloc(b->ctx, 77 * (w1 + w2), sizeof *one),
          *two = ipt_calloc(b->ctx, 77 * w2, sizeof *two);
    float *first = ipt_calloc(b->ctx, 77 * w1, sizeof *first), pooled[64] = {0};
    int32_t ids[77];
    assert_true(one && two && first);
    for (int s = 0; s < 2; s++) {
        check_ids(b, m, st, IPT_COMP_TEXT, sides[s][1], sides[s][0], ids);
        embed(b, m, IPT_COMP_TEXT, sdxl, ids, first, NULL);
        if (sdxl) {
            check_ids(b, m, st, IPT_COMP_TEXT2, sides[s][2], sides[s][0], ids);
            embed(b, m, IPT_COMP_TEXT2, true, ids, two, pooled);
            compare(b, st, ipt_name(name, sizeof name, "pooled%s", sides[s][3]), pooled, limit);
        }
        for (size_t t = 0; t < 77; t++) {
            memcpy(one + t * (w1 + w2), first + t * w1, w1 * sizeof *one);
            memcpy(one + t * (w1 + w2) + w1, two + t * w2, w2 * sizeof *one);
        }
        compare(b, st, ipt_name(name, sizeof name, "text%s", sides[s][3]), one, limit);
    }
    ipt_free(first);
    ipt_free(one);
    ipt_free(two);
    ipt_model_close(&m);
    ipt_safetensors_close(&st);
}

static void test_prompts(void **state)
{
    bench *b = bench_ready(state);
    check_prompts(b, "sd1", GOLDEN("models/sd1"), NULL, LIMIT);
    check_prompts(b, "sd2", GOLDEN("models/sd2"), NULL, LIMIT);
    check_prompts(b, "sdxl", GOLDEN("models/sdxl"), NULL, LIMIT);
    check_prompts(b, "lcm", GOLDEN("models/lcm"), NULL, LIMIT);
}

/* Single files: other key names, other layouts (packed q, k, v; transposed projection), f16 values.
 */
static void test_single_files(void **state)
{
    bench *b = bench_ready(state);
    check_prompts(b, "sd1", GOLDEN("model_sd1_single_f16.safetensors"), GOLDEN("models/sd1"), 3e-3);
    check_prompts(b, "sd2", GOLDEN("model_sd2_single_f16.safetensors"), GOLDEN("models/sd2"), 3e-3);
    check_prompts(b, "sdxl", GOLDEN("model_sdxl_single_f16.safetensors"), GOLDEN("models/sdxl"),
                  3e-3);
}

/* Textual inversion: a vector given for a token works as the token's own vector does. */
static void test_injected(void **state)
{
    enum { W = 16, AT = 5 };
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_sd1_unet");
    ipt_model *m = bench_model(b, GOLDEN("models/sd1"), NULL);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_TEXT);
    const ipt_text_config *c = &ipt_model_get_config(m)->text;
    int32_t *ids = golden_i32(b->ctx, st, "ids", NULL);
    const ipt_shape table = ipt_shape2(IPT_F32, c->vocab, c->width);
    double *all = ipt_calloc(b->ctx, ipt_shape_count(&table), sizeof *all);
    float keep[77], extra[77 * W] = {0}, text[77 * W];
    assert_non_null(all);
    assert_int_equal(c->width, W);
    assert_ok(b->ctx, w->read(w, "text_model.embeddings.token_embedding.weight", &table, all));
    for (int i = 0; i < 77; i++)
        keep[i] = i == AT ? 0.0F : 1.0F;
    for (int i = 0; i < W; i++)
        extra[AT * W + i] = (float)all[ids[AT] * W + i];
    ids[AT] = 7; /* another token stands there */
    text_run r = {.ids = ids, .keep = keep, .extra = extra, .text = text};
    r.key = (ipt_text_key){
        .batch = 1, .tokens = 77, .final_norm = true, .injected = true, .act = IPT_F32};
    run_text(b, c, w, &r);
    compare(b, st, "text", text, LIMIT);
    ipt_free(all);
    ipt_free(ids);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
    ipt_safetensors_close(&st);
}

static void test_eos(void **state)
{
    (void)state;
    const int32_t ids[6] = {0, 90, 99, 98, 99, 98};
    ipt_text_config c = {.eos = 2};
    assert_int_equal(ipt_text_eos(&c, ids, 6), 2);
    c.eos = 98;
    assert_int_equal(ipt_text_eos(&c, ids, 6), 3);
    c.eos = 50; /* not there: the first position, as argmax of zeros */
    assert_int_equal(ipt_text_eos(&c, ids, 6), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clip),         cmocka_unit_test(test_half),
        cmocka_unit_test(test_prompts),      cmocka_unit_test(test_injected),
        cmocka_unit_test(test_single_files), cmocka_unit_test(test_eos),
    };
    return bench_run_all(tests);
}
