/* tests/test_models_lora.c - adapter files of every family on the tiny models, applied beside the
 * weights by gates, against weights that were merged in Python: UNet and text encoders, several
 * adapters at once, another adapter in every row of a batch, none at all. */
#include <math.h>
#include <string.h>

#include "engine/modules.h"
#include "tests/golden.h"
#include "text_encoder/text_encoder.h"
#include "unet/unet.h"

static const double NMSE = 1e-8, NMSE_F16 = 2e-5, TEXT = 1e-4;
static const float WEIGHT = 0.8F, TEXT_WEIGHT = 0.5F; /* of the golden files */

enum { MAX_FILES = 3 };

/* Adapter files over one model. */
typedef struct bank {
    bench *b;
    ipt_model *m;
    ipt_module_list modules;
    ipt_adapter_file *file[MAX_FILES];
    size_t n_file;
    ipt_adapter_site *site; /* one a module that any file has, of component `comp` */
    size_t *module;         /* of every site */
    size_t n_site;
} bank;

static const ipt_adapter_module *module_of(const ipt_adapter_file *f, size_t module)
{
    for (size_t i = 0; i < f->n_module; i++)
        if (f->module[i].module == module)
            return &f->module[i];
    return NULL;
}

static void bank_open(bank *k, bench *b, const char *model)
{
    *k = (bank){.b = b, .m = bench_model(b, model, NULL)};
    assert_ok(b->ctx, ipt_modules_create(b->ctx, ipt_model_get_config(k->m), &k->modules));
    k->site = ipt_calloc(b->ctx, k->modules.n, sizeof *k->site);
    k->module = ipt_calloc(b->ctx, k->modules.n, sizeof *k->module);
    assert_true(k->site && k->module);
}

static void bank_drop_files(bank *k)
{
    for (size_t i = 0; i < k->n_file; i++)
        ipt_adapter_close(&k->file[i]);
    k->n_file = 0;
}

static void bank_close(bank *k)
{
    bank_drop_files(k);
    ipt_free(k->site);
    ipt_free(k->module);
    ipt_modules_finish(&k->modules);
    ipt_model_close(&k->m);
}

static void bank_add(bank *k, const char *path)
{
    ipt_adapter_file **f = &k->file[k->n_file++];
    assert_ok(k->b->ctx, ipt_adapter_open(k->b->ctx, path, k->modules.module, k->modules.n, f));
    if ((*f)->n_unmatched)
        fail_msg("%s: %zu keys fit nothing, the first is %s", path, (*f)->n_unmatched,
                 (*f)->unmatched[0]);
}

/* The sites of one component, ranks of all files stacked and padded to 4. */
static void bank_sites(bank *k, int comp)
{
    k->n_site = 0;
    for (size_t i = 0; i < k->modules.n; i++) {
        int rank = 0;
        for (size_t f = 0; f < k->n_file && k->modules.module[i].comp == comp; f++) {
            const ipt_adapter_module *m = module_of(k->file[f], i);
            rank += m ? m->rank : 0;
        }
        if (rank == 0)
            continue;
        k->module[k->n_site] = i;
        k->site[k->n_site++] = (ipt_adapter_site){.site = k->modules.module[i].name,
                                                  .n_rank = (uint16_t)((rank + 3) / 4 * 4)};
    }
    assert_true(k->n_site > 0);
}

/* Forgets the sites of layers that the graph does not have (clip skip). */
static void keep_built(bank *k, const ipt_graph *g)
{
    size_t n = 0;
    char name[256];
    for (size_t i = 0; i < k->n_site; i++) {
        if (!ipt_find(g, ipt_name(name, sizeof name, "%s.lora_a", k->site[i].site)).id)
            continue;
        k->site[n] = k->site[i];
        k->module[n++] = k->module[i];
    }
    k->n_site = n;
}

static void write_site(const bank *k, ipt_plan *p, size_t at)
{
    ipt_ctx *ctx = k->b->ctx;
    const ipt_module *mod = &k->modules.module[k->module[at]];
    size_t rank = k->site[at].n_rank, rows = (size_t)(mod->kh * mod->kw * mod->in),
           out = (size_t)mod->out, col = 0;
    float *a = ipt_calloc(ctx, rows * rank, sizeof *a), *b = ipt_calloc(ctx, rank * out, sizeof *b);
    int32_t *slot = ipt_calloc(ctx, rank, sizeof *slot);
    char name[256];
    assert_true(a && b && slot);
    for (size_t f = 0; f < k->n_file; f++) {
        const ipt_adapter_module *m = module_of(k->file[f], k->module[at]);
        if (!m)
            continue;
        ipt_adapter_pack(m, a, b, rank, col);
        for (int r = 0; r < m->rank; r++)
            slot[col++] = (int32_t)f;
    }
    while (col < rank)
        slot[col++] = -1;
    assert_ok(ctx, ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_a", mod->name), a,
                                  rows * rank * sizeof *a));
    assert_ok(ctx, ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_b", mod->name), b,
                                  rank * out * sizeof *b));
    assert_ok(ctx, ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_slot", mod->name), slot,
                                  rank * sizeof *slot));
    ipt_free(a);
    ipt_free(b);
    ipt_free(slot);
}

/* UNet with the bank's files; gates [N, n_file]. */
static void run_unet(bank *k, const unet_call *c, const float *gates, float *eps)
{
    bench *b = k->b;
    const ipt_unet_config *u = &ipt_model_get_config(k->m)->unet;
    ipt_unet_key key = {.batch = c->n, .h = c->h, .w = c->w, .tokens = c->tokens, .act = b->act};
    ipt_weights *w = bench_weights(b, k->m, IPT_COMP_UNET);
    ipt_graph *g = NULL;
    bank_sites(k, IPT_COMP_UNET);
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_graph_adapters(g, k->site, k->n_site, 1, c->n, (int)k->n_file);
    ipt_unet_build(g, u, &key);
    keep_built(k, g);
    ipt_plan *p = bench_plan(b, &g, w);
    unet_write(b, p, u, c);
    for (size_t i = 0; i < k->n_site; i++)
        write_site(k, p, i);
    assert_ok(b->ctx, ipt_plan_write(p, "gates", gates, (size_t)c->n * k->n_file * sizeof *gates));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "eps", eps,
                                    (size_t)(c->n * c->h * c->w * u->out_channels) * sizeof *eps));
    ipt_plan_destroy(&p);
    ipt_weights_destroy(&w);
}

/* One row of the golden file with the files opened so far. */
static void check_unet(bank *k, const ipt_safetensors *st, const float *gates, const char *want_key,
                       double limit)
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
    bank k;
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
    bank k;
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
    bank k;
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
    bench *b = bench_ready(state);
    if (!b->gpu || !ipt_gpu_traits(b->gpu)->f16_storage)
        skip();
    b->weights = b->act = IPT_F16;
    check_rows(b, NMSE_F16);
}

/* One text encoder with file 0 at the weight of the golden files. */
static void run_text(bank *k, int comp, const ipt_text_key *key, const int32_t *ids, float *text,
                     float *pooled)
{
    bench *b = k->b;
    const ipt_model_config *mc = ipt_model_get_config(k->m);
    const ipt_text_config *c = comp == IPT_COMP_TEXT ? &mc->text : &mc->text2;
    int32_t eos = ipt_text_eos(c, ids, 77);
    ipt_weights *w = bench_weights(b, k->m, comp);
    ipt_graph *g = NULL;
    bank_sites(k, comp);
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_graph_adapters(g, k->site, k->n_site, 1, 1, 1);
    ipt_text_build(g, c, key);
    keep_built(k, g);
    ipt_plan *p = bench_plan(b, &g, w);
    assert_ok(b->ctx, ipt_plan_write(p, "ids", ids, 77 * sizeof *ids));
    if (key->pooled)
        assert_ok(b->ctx, ipt_plan_write(p, "eos", &eos, sizeof eos));
    for (size_t i = 0; i < k->n_site; i++)
        write_site(k, p, i);
    assert_ok(b->ctx, ipt_plan_write(p, "gates", &TEXT_WEIGHT, sizeof TEXT_WEIGHT));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "text", text, 77 * (size_t)c->width * sizeof *text));
    if (key->pooled)
        assert_ok(b->ctx,
                  ipt_plan_read(p, "pooled", pooled, (size_t)c->projection_dim * sizeof *pooled));
    ipt_plan_destroy(&p);
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
    bank k;
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
    bank k;
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
