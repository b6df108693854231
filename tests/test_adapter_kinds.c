/* tests/test_adapter_kinds.c - every kind of adapter on the tiny SD 1 model: the change of each
 * weight against LyCORIS' and PEFT's own modules in double, and what the models make of it beside
 * the untouched weights, alone, mixed, and with another kind in every row.
 *
 * IPT_KIND_FILES="adapter.safetensors reference.safetensors ..." also checks published files
 * against references of tools/fixtures_adapters.py --real, on a list of SD 1.5's modules. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/golden_adapters.h"

/* Both sides compute in double from the same f32 values; measured 5e-16 to 4e-13 (inverses). */
static const double DELTA = 1e-11;
/* One evaluation in f32 against torch's in f32: as for plain models. */
static const double NMSE = 1e-8, TEXT = 1e-4, NMSE_F16 = 1e-4;

#define KINDS GOLDEN("kinds/")

typedef struct kind_case {
    const char *name, *kind;
    int n_module;  /* parts, weights and biases */
    uint32_t acts; /* bits of ipt_adapter_act: what is in the file */
    ipt_adapter_family family;
    bool always; /* also with tile kernels and in f16: one of each way to act */
} kind_case;
#define LOW (1U << IPT_ACTS_LOW_RANK)
#define KRON (1U << IPT_ACTS_KRON)
#define DENSE (1U << IPT_ACTS_DENSE)
#define BIAS (1U << IPT_ACTS_BIAS)
#define NORM (1U << IPT_ACTS_NORM)
static const kind_case cases[] = {
    {"locon", "lora", 10, LOW, IPT_ADAPTER_KOHYA, true},
    {"dora", "dora", 10, DENSE, IPT_ADAPTER_KOHYA, true},
    {"dora_in", "dora", 10, DENSE, IPT_ADAPTER_KOHYA, false},
    {"loha", "loha", 10, LOW | DENSE, IPT_ADAPTER_LYCORIS, true},
    {"loha_tucker", "loha", 10, LOW | DENSE, IPT_ADAPTER_LYCORIS, false},
    {"loha_dora", "dora", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"lokr", "lokr", 10, KRON, IPT_ADAPTER_LYCORIS, true},
    {"lokr_full", "lokr", 10, KRON, IPT_ADAPTER_LYCORIS, false},
    {"lokr_half", "lokr", 10, KRON, IPT_ADAPTER_LYCORIS, false},
    {"lokr_tucker", "lokr", 10, KRON, IPT_ADAPTER_LYCORIS, true},
    {"lokr_flat", "lokr", 3, LOW | KRON, IPT_ADAPTER_LYCORIS, false},
    {"lokr_dora", "dora", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"oft", "oft", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"oft_free", "oft", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"boft", "boft", 9, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"oft_diag", "oft_diag", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"ia3", "ia3", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"ia3_in", "ia3", 10, DENSE, IPT_ADAPTER_LYCORIS, false},
    {"glora", "glora", 10, LOW | DENSE, IPT_ADAPTER_LYCORIS, false},
    {"full", "diff", 18, DENSE | BIAS, IPT_ADAPTER_LYCORIS, true},
    {"norm", "norm", 8, NORM | BIAS, IPT_ADAPTER_LYCORIS, true},
    {"set", "set_weight", 11, DENSE | NORM, IPT_ADAPTER_LYCORIS, false},
    {"krona", "krona", 4, KRON, IPT_ADAPTER_KRONA, true},
    {"peft_dora", "dora", 10, DENSE, IPT_ADAPTER_PEFT, false},
    {"peft_loha", "loha", 10, LOW | DENSE, IPT_ADAPTER_LYCORIS, false},
    {"peft_lokr", "lokr", 10, KRON, IPT_ADAPTER_LYCORIS, false},
    {"peft_ia3", "ia3", 10, DENSE | BIAS, IPT_ADAPTER_PEFT, false},
    {"peft_ia3_in", "ia3", 6, DENSE, IPT_ADAPTER_PEFT, false},
};

static const char *path_of(const char *name, char *path, size_t n)
{
    return ipt_name(path, n, KINDS "%s.safetensors", name);
}

/* --- deltas ----------------------------------------------------------------------------------- */
/* The F64 tensor of a golden file, in file order; NULL: not there. */
static const double *golden_f64(const ipt_safetensors *const st[2], const char *key, size_t *n)
{
    for (int i = 0; i < 2; i++) {
        const ipt_st_tensor *t = ipt_safetensors_find(st[i], key);
        if (!t)
            continue;
        assert_int_equal(t->dtype, IPT_ST_F64);
        assert_int_equal(ipt_st_load(t), IPT_OK);
        *n = t->count;
        double *v = malloc(t->count * sizeof *v);
        assert_non_null(v);
        memcpy(v, t->data, t->count * sizeof *v);
        return v;
    }
    return NULL;
}

/* The model's own values that a part is relative to, in logical order. */
static double *base_of(ipt_weights *w, const ipt_module *m, bool is_bias, size_t n)
{
    char name[300];
    double *v = malloc(n * sizeof *v);
    assert_non_null(v);
    ipt_shape s = is_bias || m->is_norm ? ipt_shape1(IPT_F32, m->out)
                  : m->kh * m->kw == 1  ? ipt_shape2(IPT_F32, m->out, m->in)
                                        : ipt_shape4(IPT_F32, m->out, m->kh, m->kw, m->in);
    ipt_name(name, sizeof name, "%s.%s", m->name, is_bias ? "bias" : "weight");
    assert_int_equal(w->read(w, name, &s, v), IPT_OK);
    return v;
}

/* Relative error of one part against the golden; -1: the golden does not have it. */
static double delta_error(adapters *k, ipt_weights *w, const ipt_safetensors *const st[2],
                          const char *name, const ipt_adapter_module *a)
{
    const ipt_module *m = &k->modules.module[a->module];
    const bool is_bias = a->act == IPT_ACTS_BIAS;
    size_t taps = is_bias ? 1 : (size_t)m->kh * (size_t)m->kw, in = is_bias ? 1 : (size_t)m->in,
           n = (size_t)m->out * in * taps, want_n = 0;
    char key[400];
    ipt_name(key, sizeof key, "%s.%s.%s", name, m->name, is_bias ? "bias" : "weight");
    const double *want = golden_f64(st, key, &want_n);
    if (!want)
        return -1;
    assert_int_equal(want_n, n);
    double *base = base_of(w, m, is_bias, n), *got = malloc(n * sizeof *got), diff = 0, size = 0;
    assert_non_null(got);
    assert_ok(k->b->ctx, ipt_adapter_delta(k->b->ctx, a, base, got));
    for (size_t o = 0; o < (size_t)m->out; o++)
        for (size_t i = 0; i < in; i++)
            for (size_t t = 0; t < taps; t++) {
                double x = want[(o * in + i) * taps + t], d = got[(o * taps + t) * in + i] - x;
                diff += d * d;
                size += x * x;
            }
    free(base);
    free(got);
    free((void *)(uintptr_t)want);
    assert_true(size > 0);
    return sqrt(diff / size);
}

static size_t count_goldens(const ipt_safetensors *const st[2], const char *name)
{
    size_t n = 0, len = strlen(name);
    for (int i = 0; i < 2; i++)
        for (size_t t = 0; t < ipt_safetensors_count(st[i]); t++) {
            const char *key = ipt_safetensors_at(st[i], t)->name;
            n += strncmp(key, name, len) == 0 && key[len] == '.';
        }
    return n;
}

static void check_deltas(adapters *k, ipt_weights *w[2], const ipt_safetensors *const st[2],
                         const kind_case *c)
{
    size_t seen = 0;
    double worst = 0;
    uint32_t acts = 0;
    for (size_t i = 0; i < k->file[0]->n_module; i++) {
        const ipt_adapter_module *a = &k->file[0]->module[i];
        bool text = k->modules.module[a->module].comp == IPT_COMP_TEXT;
        double e = delta_error(k, w[text], st, c->name, a);
        acts |= 1U << a->act;
        seen += e >= 0;
        worst = fmax(worst, e);
        if (a->act != IPT_ACTS_BIAS)
            assert_string_equal(ipt_adapter_kind_name(a), c->kind);
    }
    print_message("  %-12s %zu of %zu parts: %.2g\n", c->name, seen, k->file[0]->n_module, worst);
    golden_at_most(worst, DELTA, "%s: relative error of the change", c->name);
    assert_int_equal(seen, count_goldens(st, c->name));
    assert_true(seen >= 1);
    assert_int_equal(acts, c->acts);
    assert_int_equal(k->file[0]->n_module, c->n_module);
    assert_int_equal(k->file[0]->family, c->family);
}

static void test_deltas(void **state)
{
    bench *b = bench_ready(state);
    if (b->gpu) /* the same on every bench */
        return;
    ipt_safetensors *st[2] = {golden_open(b->ctx, IPT_TEST_DATA "/kinds", "golden_deltas_1"),
                              golden_open(b->ctx, IPT_TEST_DATA "/kinds", "golden_deltas_2")};
    adapters k;
    char path[512];
    adapters_open(&k, b, GOLDEN("models/sd1"));
    ipt_weights *w[2] = {bench_weights(b, k.m, IPT_COMP_UNET),
                         bench_weights(b, k.m, IPT_COMP_TEXT)};
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        adapters_add(&k, path_of(cases[i].name, path, sizeof path));
        check_deltas(&k, w, (const ipt_safetensors *const *)st, &cases[i]);
        adapters_drop(&k);
    }
    ipt_weights_destroy(&w[0]);
    ipt_weights_destroy(&w[1]);
    adapters_close(&k);
    ipt_safetensors_close(&st[0]);
    ipt_safetensors_close(&st[1]);
}

/* --- pictures --------------------------------------------------------------------------------- */
static void check_unet(adapters *k, const ipt_safetensors *st, const unet_case *c,
                       const float *gates, const char *name, double limit)
{
    bench *b = k->b;
    char key[64];
    float *want = golden_nhwc(b->ctx, st, ipt_name(key, sizeof key, "eps_%s", name), NULL),
          *got = ipt_calloc(b->ctx, c->count, sizeof *got);
    assert_non_null(got);
    adapters_unet(k, &c->call, gates, got);
    golden_at_most(golden_nmse(want, got, c->count), limit, "eps_%s on %s: NMSE", name, b->name);
    ipt_free(want);
    ipt_free(got);
}

static void check_text(adapters *k, const ipt_safetensors *st, const float *gates, const char *name)
{
    const ipt_text_key key = {.batch = 1, .tokens = 77, .final_norm = true, .act = IPT_F32};
    bench *b = k->b;
    char text_key[64];
    float text[77 * 16];
    size_t n = 0;
    ipt_name(text_key, sizeof text_key, "text_%s", name);
    if (!golden_has(st, text_key))
        return;
    int32_t *ids = golden_i32(b->ctx, st, "ids", NULL);
    float *want = golden_f32(b->ctx, st, text_key, &n);
    assert_int_equal(n, IPT_COUNT(text));
    adapters_text(k, IPT_COMP_TEXT, &key, gates, ids, text, NULL);
    golden_at_most(golden_max_rel(want, text, n), TEXT, "%s on %s: largest error", text_key,
                   b->name);
    ipt_free(ids);
    ipt_free(want);
}

/* Each kind alone at gate 1, beside the untouched weights. */
static void check_alone(bench *b, double limit)
{
    static const float one = 1;
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA "/kinds", "golden_sd1");
    adapters k;
    unet_case c;
    char path[512];
    adapters_open(&k, b, GOLDEN("models/sd1"));
    unet_case_load(b, st, &ipt_model_get_config(k.m)->unet, "", "text_base", &c);
    bool all = b->act == IPT_F32 && strcmp(b->name, "tile") != 0;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        if (!all && !cases[i].always)
            continue;
        adapters_add(&k, path_of(cases[i].name, path, sizeof path));
        check_unet(&k, st, &c, &one, cases[i].name, limit);
        if (b->act == IPT_F32)
            check_text(&k, st, &one, cases[i].name);
        adapters_drop(&k);
    }
    unet_case_free(&c);
    adapters_close(&k);
    ipt_safetensors_close(&st);
}

static void test_alone(void **state) { check_alone(bench_ready(state), NMSE); }

static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    check_alone(b, NMSE_F16);
}

/* Three kinds at once with weights of their own: merge. */
static void test_mix(void **state)
{
    static const char *const names[] = {"lokr_full", "dora", "loha"};
    static const float gates[] = {0.7F, 0.5F, -0.4F};
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA "/kinds", "golden_sd1");
    adapters k;
    unet_case c;
    char path[512];
    adapters_open(&k, b, GOLDEN("models/sd1"));
    unet_case_load(b, st, &ipt_model_get_config(k.m)->unet, "", "text_base", &c);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        adapters_add(&k, path_of(names[i], path, sizeof path));
    check_unet(&k, st, &c, gates, "mix", NMSE);
    check_text(&k, st, gates, "mix");
    unet_case_free(&c);
    adapters_close(&k);
    ipt_safetensors_close(&st);
}

/* Another kind in every row of one batch, as composite has them; then with gates 0 what the model
 * without adapters gives, byte for byte. */
static void test_rows(void **state)
{
    enum { ROWS = 4 };
    static const char *const names[ROWS] = {"lokr_tucker", "oft", "norm", "krona"};
    float gates[ROWS * ROWS] = {0};
    bench *b = bench_ready(state);
    ipt_safetensors *st = golden_open(b->ctx, IPT_TEST_DATA "/kinds", "golden_sd1");
    adapters k;
    unet_case c;
    char path[512];
    adapters_open(&k, b, GOLDEN("models/sd1"));
    unet_case_load(b, st, &ipt_model_get_config(k.m)->unet, "", "text_base", &c);
    unet_call call = c.call;
    size_t text = 77 * 16;
    float *x = ipt_calloc(b->ctx, ROWS * c.count, sizeof *x),
          *t = ipt_calloc(b->ctx, ROWS * text, sizeof *t),
          *got = ipt_calloc(b->ctx, ROWS * c.count, sizeof *got),
          *base = ipt_calloc(b->ctx, ROWS * c.count, sizeof *base),
          *want = golden_nhwc(b->ctx, st, "eps_rows", NULL);
    assert_true(x && t && got && base);
    for (size_t i = 0; i < ROWS; i++) {
        adapters_add(&k, path_of(names[i], path, sizeof path));
        memcpy(x + i * c.count, c.call.x, c.count * sizeof *x);
        memcpy(t + i * text, c.call.text, text * sizeof *t);
        call.t[i] = c.call.t[0];
        gates[i * ROWS + i] = 1;
    }
    call.n = ROWS;
    call.x = x;
    call.text = t;
    adapters_unet(&k, &call, gates, got);
    for (size_t i = 0; i < ROWS; i++)
        golden_at_most(golden_nmse(want + i * c.count, got + i * c.count, c.count), NMSE,
                       "row %zu (%s) on %s: NMSE", i, names[i], b->name);
    memset(gates, 0, sizeof gates);
    adapters_unet(&k, &call, gates, got);
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
    adapters_close(&k);
    ipt_safetensors_close(&st);
}

/* --- published files -------------------------------------------------------------------------- */
/* The reference's vector for a part: under its key without the last ending. */
static const ipt_st_tensor *reference_of(const ipt_safetensors *st, const char *key)
{
    char stem[512];
    for (size_t n = strlen(key); n > 0; n--) {
        if (key[n] != '\0' && key[n] != '.' && key[n] != ':')
            continue;
        ipt_name(stem, sizeof stem, "%.*s", (int)n, key);
        const ipt_st_tensor *t = ipt_safetensors_find(st, stem);
        if (t)
            return t;
    }
    return NULL;
}

/* |delta v - reference| / |reference|, v[i] = cos(i + 1) over the file's order. */
static double probe_error(ipt_ctx *ctx, const ipt_adapter_module *a, const ipt_st_tensor *want)
{
    size_t in = (size_t)a->in, taps = (size_t)a->kh * (size_t)a->kw, out = (size_t)a->out;
    double *d = malloc(out * in * taps * sizeof *d), diff = 0, size = 0;
    assert_int_equal(want->count, out);
    assert_ok(ctx, ipt_st_load(want));
    if (!d)
        return HUGE_VAL;
    assert_ok(ctx, ipt_adapter_delta(ctx, a, NULL, d));
    for (size_t o = 0; o < out; o++) {
        double sum = 0, x = 0;
        for (size_t i = 0; i < in; i++)
            for (size_t t = 0; t < taps; t++)
                sum += d[(o * taps + t) * in + i] * cos((double)(i * taps + t + 1));
        memcpy(&x, want->data + o * sizeof x, sizeof x);
        diff += (sum - x) * (sum - x);
        size += x * x;
    }
    free(d);
    return size > 0 ? sqrt(diff / size) : sqrt(diff);
}

static void check_file(ipt_ctx *ctx, const ipt_module_list *l, const char *path, const char *ref)
{
    ipt_adapter_file *f = NULL;
    ipt_safetensors *st = NULL;
    double worst = 0;
    assert_ok(ctx, ipt_adapter_open(ctx, path, l->module, l->n, &f));
    assert_ok(ctx, ipt_safetensors_open(ctx, ref, &st));
    for (size_t i = 0; i < f->n_module; i++) {
        const ipt_adapter_module *a = &f->module[i];
        const ipt_st_tensor *part = a->part[0] ? a->part[0] : a->part[1],
                            *want = reference_of(st, part->name);
        if (want)
            worst = fmax(worst, probe_error(ctx, a, want));
        else
            fail_msg("%s: no reference for %s", ref, part->name);
    }
    print_message("  %s: %s, %zu modules of %zu, %zu keys fit nothing: %.2g\n", f->name,
                  ipt_adapter_kind_name(&f->module[0]), f->n_module, ipt_safetensors_count(st),
                  f->n_unmatched, worst);
    golden_at_most(worst, 1e-6, "%s: relative error of the change", path);
    assert_int_equal(f->n_module, ipt_safetensors_count(st));
    assert_int_equal(f->n_unmatched, 0);
    ipt_adapter_close(&f);
    ipt_safetensors_close(&st);
}

static void test_files(void **state)
{
    bench *b = bench_ready(state);
    const char *given = getenv("IPT_KIND_FILES");
    ipt_module_list l;
    char text[4096], *next = NULL;
    if (b->gpu)
        return;
    if (!given) {
        print_message("published files: IPT_KIND_FILES names none\n");
        skip();
    }
    ipt_model_config *mc = ipt_calloc(b->ctx, 1, sizeof *mc);
    assert_non_null(mc);
    mc->unet = ipt_unet_config_sd15();
    mc->text = ipt_text_config_clip_l();
    mc->has[IPT_COMP_UNET] = mc->has[IPT_COMP_TEXT] = true;
    assert_ok(b->ctx, ipt_modules_create(b->ctx, mc, &l));
    ipt_name(text, sizeof text, "%s", given);
    for (char *path = strtok_r(text, " ", &next), *ref; path; path = strtok_r(NULL, " ", &next)) {
        ref = strtok_r(NULL, " ", &next);
        assert_non_null(ref);
        check_file(b->ctx, &l, path, ref);
    }
    ipt_modules_finish(&l);
    ipt_free(mc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_deltas), cmocka_unit_test(test_alone), cmocka_unit_test(test_half),
        cmocka_unit_test(test_mix),    cmocka_unit_test(test_rows),  cmocka_unit_test(test_files),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return bench_run_all(tests);
}
