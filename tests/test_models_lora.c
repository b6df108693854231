/* tests/test_models_lora.c - adapter files of every family on the tiny models, applied beside the
 * weights by gates, against weights that were merged in Python: UNet and text encoders, several
 * adapters at once, another adapter in every row of a batch, none at all. */
#include <math.h>
#include <string.h>

#include "compose/compose.h"
#include "engine/modules.h"
#include "tests/golden.h"
#include "text_encoder/text_encoder.h"
#include "unet/unet.h"

static const double NMSE = 1e-8, NMSE_F16 = 2e-5, TEXT = 1e-4;
static const float WEIGHT = 0.8F, TEXT_WEIGHT = 0.5F; /* of the golden files */

enum { MAX_FILES = 3 };

/* Adapter files over one model, stacked as the engine stacks them. */
typedef struct adapters {
    bench *b;
    ipt_model *m;
    ipt_module_list modules;
    ipt_adapter_file *file[MAX_FILES];
    size_t n_file;
} adapters;

static void bank_open(adapters *k, bench *b, const char *model)
{
    *k = (adapters){.b = b, .m = bench_model(b, model, NULL)};
    assert_ok(b->ctx, ipt_modules_create(b->ctx, ipt_model_get_config(k->m), &k->modules));
}

static void bank_drop_files(adapters *k)
{
    for (size_t i = 0; i < k->n_file; i++)
        ipt_adapter_close(&k->file[i]);
    k->n_file = 0;
}

static void bank_close(adapters *k)
{
    bank_drop_files(k);
    ipt_modules_finish(&k->modules);
    ipt_model_close(&k->m);
}

static void bank_add(adapters *k, const char *path)
{
    ipt_adapter_file **f = &k->file[k->n_file++];
    assert_ok(k->b->ctx, ipt_adapter_open(k->b->ctx, path, k->modules.module, k->modules.n, f));
    if ((*f)->n_unmatched)
        fail_msg("%s: %zu keys fit nothing, the first is %s", path, (*f)->n_unmatched,
                 (*f)->unmatched[0]);
}

/* A graph with the sites of one component; *bank is the caller's, ipt_bank_destroy. */
static ipt_graph *bank_graph(adapters *k, int comp, int rows, int batch, ipt_bank **bank)
{
    bench *b = k->b;
    ipt_graph *g = NULL;
    size_t n = 0;
    assert_ok(b->ctx,
              ipt_bank_create(b->ctx, k->modules.module, k->modules.n, k->file, k->n_file, bank));
    assert_true(ipt_bank_has(*bank, comp));
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    const ipt_adapter_site *site = ipt_bank_sites(*bank, comp, &n);
    ipt_graph_adapters(g, site, n, rows, batch, (int)k->n_file);
    return g;
}

/* UNet with the bank's files; gates [N, n_file], the same in every block. */
static void run_unet(adapters *k, const unet_call *c, const float *gates, float *eps)
{
    bench *b = k->b;
    const ipt_unet_config *u = &ipt_model_get_config(k->m)->unet;
    ipt_unet_key key = {.batch = c->n, .h = c->h, .w = c->w, .tokens = c->tokens, .act = b->act};
    ipt_weights *w = bench_weights(b, k->m, IPT_COMP_UNET);
    ipt_bank *bank = NULL;
    ipt_graph *g = bank_graph(k, IPT_COMP_UNET, IPT_GATE_ROWS, c->n, &bank);
    size_t row = (size_t)c->n * k->n_file;
    uint64_t bytes = 0;
    float *all = ipt_calloc(b->ctx, IPT_GATE_ROWS * row, sizeof *all);
    assert_non_null(all);
    for (size_t i = 0; i < IPT_GATE_ROWS; i++)
        memcpy(all + i * row, gates, row * sizeof *all);
    ipt_unet_build(g, u, &key);
    ipt_plan *p = bench_plan(b, &g, w);
    unet_write(b, p, u, c);
    assert_ok(b->ctx, ipt_bank_write(bank, IPT_COMP_UNET, p, &bytes));
    assert_ok(b->ctx, ipt_plan_write(p, "gates", all, IPT_GATE_ROWS * row * sizeof *all));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "eps", eps,
                                    (size_t)(c->n * c->h * c->w * u->out_channels) * sizeof *eps));
    ipt_free(all);
    ipt_plan_destroy(&p);
    ipt_bank_destroy(&bank);
    ipt_weights_destroy(&w);
}

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
    run_unet(k, &c.call, gates, got);
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
    bank_open(&k, b, GOLDEN("models/sd1"));
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        bank_add(&k, adapter_path(files[i].name, path, sizeof path));
        assert_int_equal(k.file[0]->family, files[i].family);
        assert_int_equal(k.file[0]->has_tucker, strcmp(files[i].name, "locon_cp") == 0);
        check_unet(&k, st, &WEIGHT, ipt_name(key, sizeof key, "eps_%s", files[i].name), NMSE);
        bank_drop_files(&k);
    }
    bank_close(&k);
    ipt_safetensors_close(&st);
}

/* Two adapters in one plan: the ranks are stacked and each has its own gate. */
static void test_two(void **state)
{
    static const float gates[2] = {0.7F, -0.4F};
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA, "golden_lora_sd1");
    adapters k;
    bank_open(&k, b, GOLDEN("models/sd1"));
    bank_add(&k, GOLDEN("golden_lora_kohya.safetensors"));
    bank_add(&k, GOLDEN("golden_lora_locon.safetensors"));
    check_unet(&k, st, gates, "eps_two", NMSE);
    bank_close(&k);
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
    bank_open(&k, b, GOLDEN("models/sd1"));
    bank_add(&k, GOLDEN("golden_lora_kohya.safetensors"));
    bank_add(&k, GOLDEN("golden_lora_locon.safetensors"));
    bank_add(&k, GOLDEN("golden_lora_peft.safetensors"));
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
    run_unet(&k, &call, gates, got);
    for (size_t i = 0; i < ROWS; i++)
        golden_at_most(golden_nmse(want + i * c.count, got + i * c.count, c.count), limit,
                       "row %zu on %s: NMSE", i, b->name);
    run_unet(&k, &call, off, got);
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
    bank_close(&k);
    ipt_safetensors_close(&st);
}

static void test_rows(void **state) { check_rows(bench_ready(state), NMSE); }

static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    check_rows(b, NMSE_F16);
}

/* One text encoder with file 0 at the weight of the golden files. */
static void run_text(adapters *k, int comp, const ipt_text_key *key, const int32_t *ids,
                     float *text, float *pooled)
{
    bench *b = k->b;
    const ipt_model_config *mc = ipt_model_get_config(k->m);
    const ipt_text_config *c = comp == IPT_COMP_TEXT ? &mc->text : &mc->text2;
    int32_t eos = ipt_text_eos(c, ids, 77);
    ipt_weights *w = bench_weights(b, k->m, comp);
    ipt_bank *bank = NULL;
    ipt_graph *g = bank_graph(k, comp, 1, 1, &bank);
    uint64_t bytes = 0;
    ipt_text_build(g, c, key);
    ipt_plan *p = bench_plan(b, &g, w);
    assert_ok(b->ctx, ipt_plan_write(p, "ids", ids, 77 * sizeof *ids));
    if (key->pooled)
        assert_ok(b->ctx, ipt_plan_write(p, "eos", &eos, sizeof eos));
    assert_ok(b->ctx, ipt_bank_write(bank, comp, p, &bytes));
    assert_ok(b->ctx, ipt_plan_write(p, "gates", &TEXT_WEIGHT, sizeof TEXT_WEIGHT));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "text", text, 77 * (size_t)c->width * sizeof *text));
    if (key->pooled)
        assert_ok(b->ctx,
                  ipt_plan_read(p, "pooled", pooled, (size_t)c->projection_dim * sizeof *pooled));
    ipt_plan_destroy(&p);
    ipt_bank_destroy(&bank);
    ipt_weights_destroy(&w);
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
    bank_open(&k, b, GOLDEN("models/sd1"));
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        bank_add(&k, adapter_path(files[i], path, sizeof path));
        run_text(&k, IPT_COMP_TEXT, &key, ids, text, NULL);
        compare_text(b, st, ipt_name(name, sizeof name, "text_%s", files[i]), text);
        bank_drop_files(&k);
    }
    bank_close(&k);
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
    bank_open(&k, b, GOLDEN("models/sdxl"));
    bank_add(&k, GOLDEN("golden_lora_sdxl_kohya.safetensors"));
    check_unet(&k, st, &WEIGHT, "eps_lora", NMSE);
    run_text(&k, IPT_COMP_TEXT, &key, ids, one, NULL);
    key.pooled = true;
    run_text(&k, IPT_COMP_TEXT2, &key, ids_2, two, pooled);
    for (int t = 0; t < 77; t++) {
        memcpy(both + t * (W1 + W2), one + t * W1, W1 * sizeof *both);
        memcpy(both + t * (W1 + W2) + W1, two + t * W2, W2 * sizeof *both);
    }
    compare_text(b, st, "text_lora", both);
    compare_text(b, st, "pooled_lora", pooled);
    bank_close(&k);
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
