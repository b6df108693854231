/* tests/test_lora_tools.c - adapters converted, resized, merged, extracted and baked: singular
 * values in closed form, PEFT's merges and torch's errors, round trips to the bit, the program's
 * commands. */
#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/lora_fit.h"
#include "engine/lora_tools.h"
#include "tests/golden.h"
#include "tests/program.h"

#define KINDS IPT_TEST_DATA "/kinds/"
#define TOOLS IPT_TEST_DATA "/tools/"
#define SD1 IPT_TEST_DATA "/models/sd1"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

/* --- files ------------------------------------------------------------------------------------ */
/* An adapter among the modules of the tiny SD 1 model, and the model's weights. */
typedef struct opened {
    ipt_lora_fit fit;
    ipt_tool tool;
} opened;

static opened open_file(ipt_ctx *ctx, const char *path)
{
    opened o = {{0}, {0}};
    assert_ok(ctx, ipt_lora_fit_open(ctx, path, SD1, NULL, &o.fit));
    if (o.fit.file->n_unmatched)
        fail_msg("%s: '%s' fits nothing", path, o.fit.file->unmatched[0]);
    o.tool = (ipt_tool){.ctx = ctx, .module = o.fit.modules.module, .n_module = o.fit.modules.n};
    assert_ok(ctx, ipt_tool_weights(o.fit.model, &o.tool));
    return o;
}

static void close_file(opened *o)
{
    ipt_tool_drop_weights(&o->tool);
    ipt_lora_fit_finish(&o->fit);
}

static const ipt_adapter_module *part_of(const opened *o, size_t module, bool is_bias)
{
    for (size_t i = 0; i < o->fit.file->n_module; i++) {
        const ipt_adapter_module *a = &o->fit.file->module[i];
        if (a->module == module && (a->act == IPT_ACTS_BIAS) == is_bias)
            return a;
    }
    return NULL;
}

static size_t size_of(const ipt_adapter_module *a)
{
    bool vector = a->act == IPT_ACTS_BIAS || a->act == IPT_ACTS_NORM;
    return (size_t)a->out * (vector ? 1 : (size_t)a->in * (size_t)a->kh * (size_t)a->kw);
}

/* Largest relative distance of the changes of two files over the parts of the first; both have the
 * same ones. */
static double compare_files(ipt_ctx *ctx, const char *a, const char *b)
{
    opened x = open_file(ctx, a), y = open_file(ctx, b);
    double worst = 0;
    assert_int_equal(x.fit.file->n_module, y.fit.file->n_module);
    for (size_t i = 0; i < x.fit.file->n_module; i++) {
        const ipt_adapter_module *p = &x.fit.file->module[i],
                                 *q = part_of(&y, p->module, p->act == IPT_ACTS_BIAS);
        double *u = NULL, *v = NULL, diff = 0, all = 0;
        if (!q) {
            fail_msg("%s: no part for '%s'", b, x.tool.module[p->module].name);
            break;
        }
        assert_ok(ctx, ipt_tool_delta(&x.tool, p, &u));
        assert_ok(ctx, ipt_tool_delta(&y.tool, q, &v));
        for (size_t k = 0; k < size_of(p); k++) {
            diff += (u[k] - v[k]) * (u[k] - v[k]);
            all += u[k] * u[k];
        }
        ipt_free(u);
        ipt_free(v);
        worst = fmax(worst, all > 0 ? sqrt(diff / all) : sqrt(diff));
    }
    close_file(&x);
    close_file(&y);
    return worst;
}

/* Every tensor of `a` is in `b` under its name, with its dtype, shape and bits. */
static void expect_same_tensors(ipt_ctx *ctx, const char *a, const char *b)
{
    ipt_safetensors *x = NULL, *y = NULL;
    assert_ok(ctx, ipt_safetensors_open(ctx, a, &x));
    assert_ok(ctx, ipt_safetensors_open(ctx, b, &y));
    assert_int_equal(ipt_safetensors_count(x), ipt_safetensors_count(y));
    for (size_t i = 0; i < ipt_safetensors_count(x); i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(x, i), *u = ipt_safetensors_find(y, t->name);
        if (!u || u->dtype != t->dtype || u->rank != t->rank || u->bytes != t->bytes ||
            memcmp(u->dim, t->dim, t->rank * sizeof *t->dim) != 0) {
            fail_msg("%s: '%s' is not what it was in %s", b, t->name, a);
            break;
        }
        assert_ok(ctx, ipt_st_load(t));
        assert_ok(ctx, ipt_st_load(u));
        if (memcmp(t->data, u->data, t->bytes) != 0)
            fail_msg("%s: '%s' has other bits than in %s", b, t->name, a);
    }
    ipt_safetensors_close(&x);
    ipt_safetensors_close(&y);
}

/* The report of a run that must succeed. */
static json_t *succeed(ipt_ctx *ctx, ipt_status s, char *text)
{
    assert_ok(ctx, s);
    json_t *o = json_loads(text, 0, NULL);
    assert_non_null(o);
    ipt_free(text);
    return o;
}

static json_t *convert(const place *p, const char *from, const char *to, const char *kind,
                       const char *format, int32_t rank)
{
    ipt_lora_job job = {.model = SD1, .out = to, .format = format};
    ipt_lora_convert_opts o = {.to = kind, .kron = NULL, .rank = rank, .factor = -1};
    char *text = NULL;
    ipt_status s = ipt_lora_convert(p->ctx, &job, from, &o, &text);
    return succeed(p->ctx, s, text);
}

static double error_of(json_t *o, const char *which)
{
    double e = ipt_json_num(json_object_get(o, "error"), which, (double)NAN);
    json_decref(o);
    return e;
}

/* --- other names ------------------------------------------------------------------------------ */
static void test_round_trips(void **state)
{
    static const char *const files[] = {KINDS "locon.safetensors", KINDS "dora.safetensors",
                                        TOOLS "a.safetensors",
                                        IPT_TEST_DATA "/golden_lora_kohya.safetensors"};
    static const char *const formats[] = {"peft", "diffusers", "kohya"};
    place *p = *state;
    char mid[PATH_MAX], back[PATH_MAX], name[32];
    for (size_t i = 0; i < IPT_COUNT(files); i++)
        for (size_t f = 0; f < IPT_COUNT(formats); f++) {
            in(p, mid, ipt_name(name, sizeof name, "mid%zu_%zu", i, f));
            in(p, back, ipt_name(name, sizeof name, "back%zu_%zu", i, f));
            json_t *o = convert(p, files[i], mid, formats[f], NULL, 0);
            assert_int_equal(ipt_json_int(o, "exact", 0), ipt_json_int(o, "modules", -1));
            assert_string_equal(ipt_json_str(o, "format", ""), formats[f]);
            json_decref(o);
            golden_at_most(compare_files(p->ctx, files[i], mid), 0, "%s as %s", files[i],
                           formats[f]);
            json_decref(convert(p, mid, back, "kohya", NULL, 0));
            expect_same_tensors(p->ctx, files[i], back);
        }
}

/* Every kind that kohya's names hold stays as it is, also those of PEFT's and diffusers' names. */
static void test_kinds_stay(void **state)
{
    static const struct {
        const char *name;
        double limit; /* PEFT's alphas become f32 */
    } files[] = {{"loha", 0},      {"loha_tucker", 0}, {"loha_dora", 0},   {"lokr", 0},
                 {"lokr_full", 0}, {"lokr_tucker", 0}, {"lokr_dora", 0},   {"oft", 0},
                 {"boft", 0},      {"oft_diag", 0},    {"ia3", 0},         {"glora", 0},
                 {"full", 0},      {"norm", 0},        {"set", 0},         {"dora_in", 0},
                 {"peft_dora", 0}, {"peft_loha", 0},   {"peft_lokr", 1e-7}};
    place *p = *state;
    char from[PATH_MAX], out[PATH_MAX];
    in(p, out, "stays.safetensors");
    for (size_t i = 0; i < IPT_COUNT(files); i++) {
        ipt_name(from, sizeof from, KINDS "%s.safetensors", files[i].name);
        json_decref(convert(p, from, out, "kohya", NULL, 0));
        golden_at_most(compare_files(p->ctx, from, out), files[i].limit, "%s", files[i].name);
    }
}

/* Tucker's middle goes into the factor before it where the format has none. */
static void test_tucker_expands(void **state)
{
    place *p = *state;
    char out[PATH_MAX];
    const char *from = IPT_TEST_DATA "/golden_lora_locon_cp.safetensors";
    in(p, out, "expanded.safetensors");
    double told = error_of(convert(p, from, out, "diffusers", NULL, 0), "worst");
    golden_at_most(fabs(compare_files(p->ctx, from, out) - told), 1e-7, "expanded");
    golden_at_most(told, 2e-3, "expanded: rounding"); /* bf16 */
}

/* --- other kinds ------------------------------------------------------------------------------ */
static void test_krona(void **state)
{
    place *p = *state;
    char lokr[PATH_MAX], back[PATH_MAX], lora[PATH_MAX];
    const char *from = KINDS "krona.safetensors";
    in(p, lokr, "lokr.safetensors");
    in(p, back, "krona.safetensors");
    in(p, lora, "lora.safetensors");
    json_decref(convert(p, from, lokr, "lokr", NULL, 0));
    golden_at_most(compare_files(p->ctx, from, lokr), 6e-8, "krona as lokr"); /* f32 products */
    json_decref(convert(p, lokr, back, "krona", NULL, 0));
    expect_same_tensors(p->ctx, from, back);
    /* of full rank: as many values as the smaller side has */
    golden_at_most(error_of(convert(p, from, lora, "lora", NULL, 16), "worst"), 3e-7,
                   "krona as lora");
    golden_at_most(compare_files(p->ctx, from, lora), 3e-7, "krona as lora, compared");
}

/* Factors of 4 x 2 and 2 x 8: few enough for a product through their inner index. */
static void test_krona_factored(void **state)
{
    enum { A1 = 4, A2 = 2, B1 = 2, B2 = 8 };
    static const char stem[] =
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora";
    place *p = *state;
    char from[PATH_MAX], lokr[PATH_MAX], back[PATH_MAX], key[2][160];
    float v[2][B1 * B2];
    uint64_t seed = 8;
    for (size_t i = 0; i < B1 * B2; i++)
        for (int k = 0; k < 2; k++)
            v[k][i] = ipt_rng_normal(&seed);
    ipt_st_write t[2] = {{.name = ipt_name(key[0], sizeof key[0], "%s.down.weight", stem),
                          .dtype = IPT_ST_F32,
                          .rank = 2,
                          .dim = {A2, A1},
                          .data = v[0]},
                         {.name = ipt_name(key[1], sizeof key[1], "%s.up.weight", stem),
                          .dtype = IPT_ST_F32,
                          .rank = 2,
                          .dim = {B1, B2},
                          .data = v[1]}};
    in(p, from, "factored.safetensors");
    in(p, lokr, "factored_lokr.safetensors");
    in(p, back, "factored_krona.safetensors");
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, from, t, 2, NULL, 0));
    json_t *o = convert(p, from, lokr, "lokr", NULL, 0);
    assert_int_equal(ipt_json_int(o, "exact", 0), 1);
    json_decref(o);
    golden_at_most(compare_files(p->ctx, from, lokr), 0, "krona as a factored lokr");
    opened x = open_file(p->ctx, lokr);
    assert_non_null(x.fit.file->module[0].part[4]); /* lokr_w2_a */
    assert_int_equal(x.fit.file->module[0].rank, A2 * B1);
    close_file(&x);
    json_decref(convert(p, lokr, back, "krona", NULL, 0));
    expect_same_tensors(p->ctx, from, back);
}

/* Errors of approximations against torch's. */
static void check_error(const place *p, const ipt_safetensors *st, const char *key,
                        const char *from, const char *to, const char *kron, int32_t rank,
                        double limit, size_t *seen)
{
    opened x = {{0}, {0}}, y = {{0}, {0}};
    char out[PATH_MAX], *text = NULL;
    in(p, out, "approximated.safetensors");
    ipt_lora_job job = {.model = SD1, .out = out, .dtype = "f32"};
    ipt_lora_convert_opts o = {.to = to, .kron = kron, .rank = rank, .factor = -1};
    ipt_status s = ipt_lora_convert(p->ctx, &job, from, &o, &text);
    json_decref(succeed(p->ctx, s, text));
    x = open_file(p->ctx, from);
    y = open_file(p->ctx, out);
    for (size_t i = 0; i < x.fit.file->n_module; i++) {
        const ipt_adapter_module *a = &x.fit.file->module[i], *b = NULL;
        char name[400];
        double *u = NULL, *v = NULL, diff = 0, all = 0;
        const ipt_st_tensor *t = ipt_safetensors_find(
            st, ipt_name(name, sizeof name, "%s.%s.weight", key, x.tool.module[a->module].name));
        if (!t || a->act == IPT_ACTS_BIAS)
            continue;
        b = part_of(&y, a->module, false);
        assert_non_null(b);
        assert_ok(p->ctx, ipt_st_load(t));
        assert_ok(p->ctx, ipt_tool_delta(&x.tool, a, &u));
        assert_ok(p->ctx, ipt_tool_delta(&y.tool, b, &v));
        for (size_t k = 0; k < size_of(a); k++) {
            diff += (u[k] - v[k]) * (u[k] - v[k]);
            all += u[k] * u[k];
        }
        ipt_free(u);
        ipt_free(v);
        double want = 0;
        memcpy(&want, t->data, sizeof want);
        golden_at_most(fabs(sqrt(diff / all) - want), limit, "%s: error %g, torch's is %g", name,
                       sqrt(diff / all), want);
        ++*seen;
    }
    close_file(&x);
    close_file(&y);
}

static void test_errors(void **state)
{
    static const char *const kinds[] = {"locon",       "loha", "lokr", "lokr_full",
                                        "lokr_tucker", "dora", "oft",  "krona"};
    place *p = *state;
    ipt_safetensors *st = golden_open(p->ctx, IPT_TEST_DATA "/tools", "golden_errors");
    char from[PATH_MAX], key[64];
    size_t seen = 0, want = 0;
    for (size_t i = 0; i < IPT_COUNT(kinds); i++)
        for (int32_t rank = 1; rank <= 3; rank++) {
            ipt_name(from, sizeof from, KINDS "%s.safetensors", kinds[i]);
            ipt_name(key, sizeof key, "lora%d.%s", (int)rank, kinds[i]);
            check_error(p, st, key, from, "lora", NULL, rank, 3e-7, &seen); /* f32 factors */
        }
    check_error(p, st, "lokr.locon", KINDS "locon.safetensors", "lokr", NULL, 0, 3e-7, &seen);
    opened o = open_file(p->ctx, KINDS "lokr.safetensors");
    close_file(&o);
    for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
        const char *name = ipt_safetensors_at(st, i)->name;
        want += strncmp(name, "lora", 4) == 0 || strncmp(name, "lokr.", 5) == 0;
    }
    assert_int_equal(seen, want);
    assert_true(want > 60);
    ipt_safetensors_close(&st);
}

/* Ranks by share against kohya's rule on torch's values. */
static void test_keep(void **state)
{
    static const double keeps[] = {0.5, 0.8, 0.95};
    place *p = *state;
    ipt_safetensors *st = golden_open(p->ctx, IPT_TEST_DATA "/tools", "golden_errors");
    char out[PATH_MAX], name[400], *text = NULL;
    size_t seen = 0;
    in(p, out, "kept.safetensors");
    for (size_t k = 0; k < IPT_COUNT(keeps); k++) {
        ipt_lora_job job = {.model = SD1, .out = out};
        ipt_lora_resize_opts o = {.keep = keeps[k]};
        ipt_status s = ipt_lora_resize(p->ctx, &job, KINDS "locon.safetensors", &o, &text);
        json_decref(succeed(p->ctx, s, text));
        opened x = open_file(p->ctx, out);
        for (size_t i = 0; i < x.fit.file->n_module; i++) {
            const ipt_adapter_module *a = &x.fit.file->module[i];
            const ipt_st_tensor *t =
                ipt_safetensors_find(st, ipt_name(name, sizeof name, "keep%g.locon.%s.weight",
                                                  keeps[k], x.tool.module[a->module].name));
            double want = 0;
            if (!t)
                continue;
            assert_ok(p->ctx, ipt_st_load(t));
            memcpy(&want, t->data, sizeof want);
            assert_int_equal(a->rank, (int)want);
            seen++;
        }
        close_file(&x);
    }
    assert_true(seen >= 9);
    ipt_safetensors_close(&st);
}

/* The told error is that of the file, rounding included. */
static void test_told_error(void **state)
{
    place *p = *state;
    char out[PATH_MAX], *text = NULL;
    in(p, out, "told.safetensors");
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    for (size_t i = 0; i < IPT_COUNT(dtypes); i++) {
        ipt_lora_job job = {.model = SD1, .out = out, .dtype = dtypes[i]};
        ipt_lora_resize_opts o = {.rank = 1};
        ipt_status s = ipt_lora_resize(p->ctx, &job, KINDS "locon.safetensors", &o, &text);
        double told = error_of(succeed(p->ctx, s, text), "worst");
        assert_true(told > 0.01);
        golden_at_most(fabs(compare_files(p->ctx, KINDS "locon.safetensors", out) - told), 1e-6,
                       "%s: told error", dtypes[i]);
        ipt_lora_resize_opts all = {.rank = 64}; /* nothing is cut: what remains is rounding */
        s = ipt_lora_resize(p->ctx, &job, KINDS "locon.safetensors", &all, &text);
        told = error_of(succeed(p->ctx, s, text), "worst");
        golden_at_most(fabs(compare_files(p->ctx, KINDS "locon.safetensors", out) - told), 1e-7,
                       "%s: told rounding", dtypes[i]);
        assert_true(i == 0 ? told <= 0 : told > 1e-5);
    }
}

/* --- merge ------------------------------------------------------------------------------------ */
typedef struct merge_case {
    const char *name, *method, *majority;
    int n;
    float weight[3];
    int32_t rank;
    double density;
} merge_case;
static const merge_case merges[] = {
    {"linear", "linear", NULL, 2, {0.7F, 0.4F}, 0, 0.5},
    {"linear_minus", "linear", NULL, 2, {0.7F, -0.5F}, 0, 0.5},
    {"cat", "cat", NULL, 3, {0.7F, -0.5F, 1.25F}, 0, 0.5},
    {"svd", "svd", NULL, 3, {0.7F, 0.4F, 0.3F}, 4, 0.5},
    {"ties", "ties", NULL, 2, {0.7F, 0.4F}, 0, 0.5},
    {"ties_minus", "ties", NULL, 2, {0.7F, -0.4F}, 0, 0.8},
    {"ties_frequency", "ties", "frequency", 2, {0.7F, 0.4F}, 0, 0.5},
    {"ties_svd", "ties_svd", NULL, 3, {0.7F, 0.4F, -0.3F}, 3, 0.5},
    {"magnitude_prune", "magnitude_prune", NULL, 2, {0.7F, 0.4F}, 0, 0.3},
    {"magnitude_prune_svd", "magnitude_prune_svd", NULL, 3, {0.7F, 0.4F, 0.3F}, 3, 0.3},
    {"dare_linear", "dare", NULL, 2, {0.7F, 0.4F}, 0, 1},
    {"dare_ties", "dare_ties", NULL, 2, {0.7F, 0.4F}, 0, 1},
    {"dare_linear_svd", "dare_linear_svd", NULL, 3, {0.7F, 0.4F, 0.3F}, 4, 1},
    {"dare_ties_svd", "dare_ties_svd", NULL, 3, {0.7F, 0.4F, 0.3F}, 4, 1},
};
static const char *const merge_files[] = {TOOLS "a.safetensors", TOOLS "b.safetensors",
                                          TOOLS "c.safetensors"};

static ipt_status run_merge(const place *p, const merge_case *c, uint64_t seed, const char *out,
                            char **text)
{
    ipt_lora_job job = {.model = SD1, .out = out};
    ipt_lora_merge_opts o = {.method = c->method,
                             .majority = c->majority,
                             .rank = c->rank,
                             .density = c->density,
                             .seed = seed};
    ipt_lora l[3] = {{0}};
    for (int i = 0; i < c->n; i++)
        l[i] =
            (ipt_lora){.path = merge_files[i], .weight = c->weight[i], .te_weight = c->weight[i]};
    return ipt_lora_merge(p->ctx, &job, l, (size_t)c->n, &o, text);
}

/* Relative distance of a file's changes from those of a golden; -1: it has none. */
static double golden_distance(const place *p, const ipt_safetensors *st, const char *key, opened *x,
                              const ipt_adapter_module *a)
{
    char name[400];
    double *v = NULL, diff = 0, all = 0;
    const ipt_st_tensor *t = ipt_safetensors_find(
        st, ipt_name(name, sizeof name, "%s.%s", key, x->tool.module[a->module].name));
    if (!t)
        return -1;
    assert_int_equal(t->count, size_of(a));
    assert_ok(p->ctx, ipt_st_load(t));
    assert_ok(p->ctx, ipt_tool_delta(&x->tool, a, &v));
    for (size_t i = 0; i < t->count; i++) {
        double want = 0;
        memcpy(&want, t->data + i * sizeof want, sizeof want);
        diff += (v[i] - want) * (v[i] - want);
        all += want * want;
    }
    ipt_free(v);
    return sqrt(diff / all);
}

static void test_merges(void **state)
{
    place *p = *state;
    ipt_safetensors *st = golden_open(p->ctx, IPT_TEST_DATA "/tools", "golden_merge");
    char out[PATH_MAX], *text = NULL;
    in(p, out, "merged.safetensors");
    for (size_t i = 0; i < IPT_COUNT(merges); i++) {
        double worst = 0;
        ipt_status s = run_merge(p, &merges[i], 0, out, &text);
        json_decref(succeed(p->ctx, s, text));
        opened x = open_file(p->ctx, out);
        assert_int_equal(x.fit.file->n_module, 5);
        for (size_t k = 0; k < 5; k++) {
            double d = golden_distance(p, st, merges[i].name, &x, &x.fit.file->module[k]);
            assert_true(d >= 0);
            worst = fmax(worst, d);
        }
        close_file(&x);
        print_message("  %-20s %.2g\n", merges[i].name, worst);
        golden_at_most(worst, 4e-7, "%s",
                       merges[i].name); /* PEFT's weights are f32, ours' factors */
    }
    ipt_safetensors_close(&st);
}

/* The same seed gives the same bytes, another one others; a share of the values stays. */
static void test_dare(void **state)
{
    place *p = *state;
    merge_case c = {"dare", "dare_linear", NULL, 1, {1}, 0, 0.25};
    char a[PATH_MAX], b[PATH_MAX], d[PATH_MAX], *text = NULL;
    const char *paths[] = {in(p, a, "dare1.safetensors"), in(p, b, "dare2.safetensors"),
                           in(p, d, "dare3.safetensors")};
    for (size_t i = 0; i < 3; i++) {
        ipt_status s = run_merge(p, &c, i == 2 ? 6 : 5, paths[i], &text);
        json_decref(succeed(p->ctx, s, text));
    }
    expect_same_tensors(p->ctx, a, b);
    assert_true(compare_files(p->ctx, a, d) > 0.1);
    ipt_safetensors *st = NULL;
    size_t kept = 0, all = 0;
    assert_ok(p->ctx, ipt_safetensors_open(p->ctx, a, &st));
    for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        for (size_t k = 0; t->rank > 0 && k < t->count; k++, all++)
            kept += fabsf(ipt_st_get(t, k)) > 0;
    }
    ipt_safetensors_close(&st);
    double share = (double)kept / (double)all;
    assert_true(all > 400 && share > 0.18 && share < 0.32); /* 0.25 and four deviations */
}

/* --- bake, extract ---------------------------------------------------------------------------- */
static ipt_status bake(const place *p, const char *model, const char *config, const char *lora,
                       float weight, const char *dtype, const char *out)
{
    ipt_lora_job job = {.model = model, .config_dir = config, .out = out, .dtype = dtype};
    ipt_lora l = {.path = lora, .weight = weight, .te_weight = weight};
    char *text = NULL;
    ipt_status s = ipt_model_bake_loras(p->ctx, &job, &l, 1, &text);
    ipt_free(text);
    return s;
}

/* W' - W of every module of a baked model against w times the file's change, relative to the
 * largest weight; modules that the file does not touch are equal. */
static double bake_error(const place *p, const char *model, const char *config, const char *baked,
                         const char *lora, double weight)
{
    ipt_lora_fit f = {0};
    ipt_model *m = NULL;
    double worst = 0;
    assert_ok(p->ctx, ipt_lora_fit_open(p->ctx, lora, model, config, &f));
    assert_ok(p->ctx, ipt_open_model(p->ctx, baked, config, &m));
    ipt_tool t = {.ctx = p->ctx, .module = f.modules.module, .n_module = f.modules.n}, u = t;
    assert_ok(p->ctx, ipt_tool_weights(f.model, &t));
    assert_ok(p->ctx, ipt_tool_weights(m, &u));
    opened x = {f, t};
    for (size_t i = 0; i < f.modules.n; i++)
        for (int bias = 0; bias <= f.modules.module[i].has_bias; bias++) {
            const ipt_module *mod = &f.modules.module[i];
            const ipt_adapter_module *a = part_of(&x, i, bias);
            size_t n = (size_t)mod->out *
                       (bias || mod->is_norm ? 1 : (size_t)(mod->in * mod->kh * mod->kw));
            double *w = NULL, *v = NULL, *d = calloc(n, sizeof *d), *base = NULL, top = 0, off = 0;
            assert_non_null(d);
            assert_ok(p->ctx, ipt_tool_read(&t, t.weights[mod->comp], mod, bias, &w));
            assert_ok(p->ctx, ipt_tool_read(&u, u.weights[mod->comp], mod, bias, &v));
            if (a) {
                assert_ok(p->ctx, ipt_tool_base(&t, a, &base));
                assert_ok(p->ctx, ipt_adapter_delta(p->ctx, a, base, d));
            }
            for (size_t k = 0; k < n; k++) {
                top = fmax(top, fabs(v[k]));
                off = fmax(off, fabs(v[k] - w[k] - weight * d[k]));
            }
            worst = fmax(worst, top > 0 ? off / top : off);
            if (!a && off > 0)
                fail_msg("%s: '%s' changed, and %s does not touch it", baked, mod->name, lora);
            ipt_free(w);
            ipt_free(v);
            ipt_free(base);
            free(d);
        }
    ipt_tool_drop_weights(&t);
    ipt_tool_drop_weights(&u);
    ipt_model_close(&m);
    ipt_lora_fit_finish(&f);
    return worst;
}

/* Folders and single files, f32, f16 and bf16; one of each way to act. */
static void test_bake(void **state)
{
    static const struct {
        const char *model, *config, *lora, *dtype;
        double limit; /* half a unit of the dtype's last place */
    } cases[] = {
        {SD1, NULL, KINDS "locon.safetensors", NULL, 6e-8},
        {SD1, NULL, KINDS "lokr_full.safetensors", NULL, 6e-8},
        {SD1, NULL, KINDS "dora.safetensors", NULL, 6e-8},
        {SD1, NULL, KINDS "full.safetensors", NULL, 6e-8},
        {SD1, NULL, KINDS "norm.safetensors", NULL, 6e-8},
        {IPT_TEST_DATA "/model_sd1_single_f16.safetensors", SD1, KINDS "locon.safetensors", NULL,
         4.9e-4},
        {IPT_TEST_DATA "/model_sd1_single_bf16.safetensors", SD1, KINDS "loha.safetensors", NULL,
         4e-3},
    };
    place *p = *state;
    char out[PATH_MAX], name[32];
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        in(p, out, ipt_name(name, sizeof name, "baked%zu", i));
        assert_ok(p->ctx, bake(p, cases[i].model, cases[i].config, cases[i].lora, 0.75F,
                               cases[i].dtype, out));
        golden_at_most(bake_error(p, cases[i].model, cases[i].config, out, cases[i].lora, 0.75),
                       cases[i].limit, "%s in %s", cases[i].lora, cases[i].model);
    }
}

/* OpenCLIP's fused and transposed matrices of SD 2 and SDXL, sgm names: by a LoRA of every module,
 * the difference of the single file in f16 and the folder in f32, many times over. */
static void test_bake_layouts(void **state)
{
    static const char *const models[][2] = {
        {IPT_TEST_DATA "/model_sd2_single_f16.safetensors", IPT_TEST_DATA "/models/sd2"},
        {IPT_TEST_DATA "/model_sdxl_single_f16.safetensors", IPT_TEST_DATA "/models/sdxl"}};
    place *p = *state;
    char lora[PATH_MAX], out[PATH_MAX], name[32], *text = NULL;
    for (size_t i = 0; i < IPT_COUNT(models); i++) {
        in(p, lora, ipt_name(name, sizeof name, "every%zu.safetensors", i));
        in(p, out, ipt_name(name, sizeof name, "every%zu_baked.safetensors", i));
        ipt_lora_job job = {.model = models[i][0], .config_dir = models[i][1], .out = lora};
        ipt_lora_extract_opts o = {.rank = 128, .conv_rank = 128};
        ipt_status s = ipt_lora_extract(p->ctx, &job, models[i][1], &o, &text);
        json_t *r = succeed(p->ctx, s, text);
        assert_true(ipt_json_int(r, "modules", 0) > 60);
        json_decref(r);
        assert_ok(p->ctx, bake(p, models[i][0], models[i][1], lora, 300, NULL, out));
        golden_at_most(bake_error(p, models[i][0], models[i][1], out, lora, 300), 4.9e-4, "%s",
                       models[i][0]);
    }
}

/* Files of a folder that nobody touches, metadata, and what is refused. */
static void test_bake_files(void **state)
{
    place *p = *state;
    char out[PATH_MAX], path[PATH_MAX], other[PATH_MAX], *x = NULL, *y = NULL;
    size_t nx = 0, ny = 0;
    in(p, out, "whole");
    assert_ok(p->ctx, bake(p, SD1, NULL, KINDS "locon.safetensors", 1, NULL, out));
    static const char *const same[] = {"model_index.json", "scheduler/scheduler_config.json",
                                       "unet/config.json", "tokenizer/vocab.json"};
    for (size_t i = 0; i < IPT_COUNT(same); i++) {
        ipt_name(path, sizeof path, "%s/%s", out, same[i]);
        ipt_name(other, sizeof other, SD1 "/%s", same[i]);
        assert_ok(p->ctx, ipt_file_read(p->ctx, path, 1 << 24, &x, &nx));
        assert_ok(p->ctx, ipt_file_read(p->ctx, other, 1 << 24, &y, &ny));
        assert_int_equal(nx, ny);
        assert_memory_equal(x, y, nx);
        ipt_free(x);
        ipt_free(y);
    }
    /* the folder is there now; a fp8 checkpoint cannot be written as it is, but as f16 */
    assert_int_equal(bake(p, SD1, NULL, KINDS "locon.safetensors", 1, NULL, out), IPT_ERR_OUTPUT);
    assert_non_null(strstr(ipt_last_error(p->ctx), "not empty"));
    const char *fp8 = IPT_TEST_DATA "/model_sd1_single_fp8.safetensors";
    in(p, out, "fp8.safetensors");
    assert_int_equal(bake(p, fp8, SD1, KINDS "locon.safetensors", 1, NULL, out),
                     IPT_ERR_UNSUPPORTED);
    assert_non_null(strstr(ipt_last_error(p->ctx), "--dtype"));
    assert_false(ipt_is_file(out));
    assert_ok(p->ctx, bake(p, fp8, SD1, KINDS "locon.safetensors", 1, "f16", out));
    assert_true(ipt_is_file(out));
}

/* What was baked is found again. */
static void test_extract(void **state)
{
    place *p = *state;
    char tuned[PATH_MAX], out[PATH_MAX], *text = NULL;
    in(p, tuned, "tuned");
    in(p, out, "extracted.safetensors");
    assert_ok(p->ctx, bake(p, SD1, NULL, KINDS "locon.safetensors", 1, NULL, tuned));
    ipt_lora_job job = {.model = SD1, .out = out};
    ipt_lora_extract_opts o = {.rank = 64, .conv_rank = 64};
    ipt_status s = ipt_lora_extract(p->ctx, &job, tuned, &o, &text);
    json_t *r = succeed(p->ctx, s, text);
    assert_int_equal(ipt_json_int(r, "modules", 0), 10);
    assert_int_equal(ipt_json_int(r, "left_out", -1), 0);
    json_decref(r);
    golden_at_most(compare_files(p->ctx, KINDS "locon.safetensors", out), 2e-6,
                   "extracted"); /* f32 W */
    o.conv_rank = 0;             /* its kernels are lost, and that is told */
    s = ipt_lora_extract(p->ctx, &job, tuned, &o, &text);
    r = succeed(p->ctx, s, text);
    assert_true(ipt_json_int(r, "left_out", -1) >= 2);
    assert_true(error_of(r, "total") > 0.1);
}

/* --- failures --------------------------------------------------------------------------------- */
/* Part files that were left in the folder. */
static size_t entries(const place *p)
{
    size_t n = 0;
    DIR *d = opendir(p->dir);
    assert_non_null(d);
    for (struct dirent *e = readdir(d); e; e = readdir(d))
        n += strstr(e->d_name, ".part") != NULL;
    closedir(d);
    return n;
}

/* Out of memory at any point: that status, and nothing on disk. */
static void test_oom(void **state)
{
    place *p = *state;
    char out[PATH_MAX], *text = NULL;
    for (int which = 0; which < 3; which++) {
        for (uint64_t i = 1; i < 4000; i += i < 200 ? 1 : 37) {
            in(p, out, which == 0 ? "oom_dir" : "oom.safetensors");
            ipt_lora_job job = {.model = SD1, .out = out};
            ipt_lora_convert_opts c = {.to = which == 0 ? "peft" : "lora", .rank = 2, .factor = -1};
            ipt_alloc_fail_after(p->ctx, i);
            ipt_status s = which < 2
                               ? ipt_lora_convert(p->ctx, &job, TOOLS "a.safetensors", &c, &text)
                               : run_merge(p, &merges[7], 0, out, &text);
            ipt_alloc_fail_after(p->ctx, 0);
            if (s == IPT_OK) {
                ipt_free(text);
                break;
            }
            if (s != IPT_ERR_NOMEM)
                fail_msg("allocation %" PRIu64 ": %s: %s", i, ipt_status_name(s),
                         ipt_last_error(p->ctx));
            /* reading back may run out after the result is there, whole; never half of it */
            if (which == 0 && ipt_is_dir(out)) {
                char file[PATH_MAX + 32];
                ipt_name(file, sizeof file, "%s/adapter_model.safetensors", out);
                assert_true(ipt_is_file(file));
                ipt_dir_abort(out);
            }
            unlink(out);
        }
    }
    assert_int_equal(entries(p), 0);
}

static void test_cancel(void **state)
{
    place *p = *state;
    char out[PATH_MAX], *text = NULL;
    ipt_stop stop = {0};
    in(p, out, "cancelled.safetensors");
    ipt_stop_ask(&stop);
    ipt_ctx_listen(p->ctx, IPT_LISTEN_REQUEST, &stop);
    assert_int_equal(run_merge(p, &merges[0], 0, out, &text), IPT_ERR_CANCELLED);
    char folder[PATH_MAX];
    in(p, folder, "cancelled");
    assert_int_equal(bake(p, SD1, NULL, KINDS "locon.safetensors", 1, NULL, folder),
                     IPT_ERR_CANCELLED);
    assert_false(ipt_is_dir(folder));
    ipt_ctx_listen(p->ctx, IPT_LISTEN_REQUEST, NULL);
    assert_false(ipt_is_file(out) || ipt_is_dir(out));
    assert_int_equal(entries(p), 0);
}

/* --- the program ------------------------------------------------------------------------------ */
static void test_program(void **state)
{
    static const struct {
        int rc;
        const char *arg[14], *said;
    } cases[] = {
        {2, {"lora", "convert", TOOLS "a.safetensors", "--to", "peft"}, "-o OUT"},
        {2, {"lora", "convert", TOOLS "a.safetensors", "-o", "x"}, "--to"},
        {2,
         {"lora", "convert", TOOLS "a.safetensors", "-o", "x", "--to", "pefd"},
         "did you mean peft"},
        {2,
         {"lora", "convert", TOOLS "a.safetensors", "-o", "x.safetensors", "--to", "peft", "-m",
          SD1},
         "expected the name of a folder"},
        {2,
         {"lora", "convert", KINDS "lokr.safetensors", "-o", "x", "--to", "lora", "-m", SD1},
         "expected --rank"},
        {2,
         {"lora", "convert", TOOLS "a.safetensors", "-o", "x", "--to", "krona", "--kron", "4", "-m",
          SD1},
         "A1xA2"},
        {64,
         {"lora", "convert", KINDS "lokr.safetensors", "-o", "x", "--to", "diffusers", "-m", SD1},
         "lokr"},
        {64,
         {"lora", "convert", KINDS "krona.safetensors", "-o", "x", "--to", "kohya", "-m", SD1},
         "--to lokr"},
        {64,
         {"lora", "convert", "nowhere.safetensors", "-o", "x", "--to", "kohya", "-m", SD1},
         "nowhere.safetensors"},
        {73,
         {"lora", "convert", TOOLS "a.safetensors", "-o", "none/x", "--to", "kohya", "-m", SD1},
         "folder does not exist"},
        {2, {"lora", "resize", TOOLS "a.safetensors", "-o", "x", "-m", SD1}, "--keep"},
        {2, {"lora", "resize", TOOLS "a.safetensors", "-o", "x", "--rank", "0"}, "from 1 to 8192"},
        {64,
         {"lora", "merge", TOOLS "a.safetensors", TOOLS "c.safetensors", "-o", "x", "--method",
          "linear", "-m", SD1},
         "ranks 3 and 2"},
        {64,
         {"lora", "merge", TOOLS "a.safetensors", KINDS "lokr.safetensors", "-o", "x", "-m", SD1},
         "--method svd"},
        {2, {"lora", "merge", TOOLS "a.safetensors:1,start=0.5", "-o", "x", "-m", SD1}, "steps"},
        {2,
         {"lora", "merge", TOOLS "a.safetensors", "-o", "x", "--density", "0", "-m", SD1},
         "--density"},
        {2,
         {"lora", "merge", TOOLS "a.safetensors", "-o", "x", "--method", "lega"},
         "did you mean lego"},
        {2, {"lora", "extract", SD1, "-o", "x"}, "--base"},
        {2, {"lora", "extract", SD1, "--base", SD1, "-o", "x"}, "nothing to write"},
        {2, {"model", "bake", SD1, "-o", "x"}, "--lora"},
        {73, {"model", "bake", SD1, "-o", ".", "--lora", TOOLS "a.safetensors"}, "not empty"},
        {64,
         {"model", "bake", IPT_TEST_DATA "/models/sd2", "-o", "x", "--lora", TOOLS "a.safetensors"},
         "a.safetensors"},
    };
    place *p = *state;
    char path[PATH_MAX];
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        result r = run_args(p, cases[i].arg);
        char what[32];
        expect_line(&r, cases[i].rc, cases[i].said, ipt_name(what, sizeof what, "case %zu", i));
        assert_false(ipt_is_file(in(p, path, "x")) || ipt_is_dir(in(p, path, "x")));
    }
    result r = RUN(p, "lora", "merge", "--json", TOOLS "a.safetensors:0.5", TOOLS "b.safetensors",
                   "-o", "ok.safetensors", "-m", SD1);
    assert_int_equal(r.rc, 0);
    json_t *o = json_loads(r.out, 0, NULL);
    assert_int_equal(ipt_json_int(o, "modules", 0), 5);
    assert_int_equal(ipt_json_int(o, "rank_max", 0), 6);
    assert_string_equal(ipt_json_str(o, "method", ""), "cat");
    assert_int_equal(strlen(ipt_json_str(o, "autov3", "")), 12);
    json_decref(o);
    done(&r);
    r = RUN(p, "lora", "inspect", "ok.safetensors", "-m", SD1);
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.out, "15/15 keys in 5 modules"));
    assert_non_null(strstr(r.out, "as its metadata says"));
    assert_non_null(strstr(r.out, "of its energy"));
    done(&r);
}

/* Shares of the energy add up, and are those of the changes. */
static void test_energy(void **state)
{
    place *p = *state;
    char *text = NULL;
    const char *comp, *block;
    json_t *part, *v;
    double sum = 0, want = 0;
    assert_ok(p->ctx, ipt_lora_describe(p->ctx, KINDS "lokr_dora.safetensors", SD1, NULL, &text));
    json_t *o = json_loads(text, 0, NULL), *energy = json_object_get(o, "energy");
    json_object_foreach(energy, comp, part) json_object_foreach(part, block, v) sum +=
        json_number_value(v);
    opened x = open_file(p->ctx, KINDS "lokr_dora.safetensors");
    for (size_t i = 0; i < x.fit.file->n_module; i++) {
        double *d = NULL;
        assert_ok(p->ctx, ipt_tool_delta(&x.tool, &x.fit.file->module[i], &d));
        want += ipt_norm2(d, size_of(&x.fit.file->module[i]));
        ipt_free(d);
    }
    close_file(&x);
    assert_true(want > 0);
    golden_at_most(fabs(sum - want) / want, 1e-7, "energy by blocks"); /* 9 digits of JSON */
    golden_at_most(fabs(ipt_json_num(energy, "total", 0) - want) / want, 1e-7, "energy");
    json_decref(o);
    ipt_free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_kinds_stay),
        cmocka_unit_test(test_tucker_expands),
        cmocka_unit_test(test_krona),
        cmocka_unit_test(test_krona_factored),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_keep),
        cmocka_unit_test(test_told_error),
        cmocka_unit_test(test_merges),
        cmocka_unit_test(test_dare),
        cmocka_unit_test(test_bake),
        cmocka_unit_test(test_bake_layouts),
        cmocka_unit_test(test_bake_files),
        cmocka_unit_test(test_extract),
        cmocka_unit_test(test_oom),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_program),
        cmocka_unit_test(test_energy),
    };
    return cmocka_run_group_tests(tests, set_up, place_destroy);
}
