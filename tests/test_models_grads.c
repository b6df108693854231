/* tests/test_models_grads.c - gradients of a loss through the tiny SD 1 UNet against torch's:
 * latent, text, weights of every kind, adapter factors; plain and with everything recomputed. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/golden.h"
#include "unet/unet.h"

static const double LIMIT = 1e-4; /* |d - ref| / |ref| of every tensor */

enum { MAX_WRT = 64, RANK = 3, PADDED = 4 };

/* One gradient: where it is in the graph and how the file's values lie. */
typedef struct wrt {
    char leaf[200];            /* in the graph */
    const ipt_st_tensor *want; /* "d...." of the file */
    enum { AS_IS, NCHW, KERNEL, LORA_A, LORA_B } layout;
} wrt;

typedef struct grads {
    bench *b;
    ipt_safetensors *st;
    ipt_adapter_site site[16];
    size_t n_site;
    wrt wrt[MAX_WRT];
    size_t n_wrt;
} grads;

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

/* "<module>.lora_A.weight" -> "<module>.lora_a". */
static void factor_leaf(const char *key, char side, char *out, size_t n)
{
    ipt_name(out, n, "%.*s.lora_%c", (int)(strlen(key) - strlen(".lora_A.weight")), key, side);
}

static void add_wrt(grads *s, const ipt_st_tensor *t)
{
    const char *name = t->name + 2;
    wrt *w = &s->wrt[s->n_wrt++];
    assert_true(s->n_wrt <= MAX_WRT);
    w->want = t;
    if (strcmp(name, "sample") == 0 || strcmp(name, "context") == 0) {
        ipt_name(w->leaf, sizeof w->leaf, "%s", name[0] == 's' ? "x" : "text");
        w->layout = name[0] == 's' ? NCHW : AS_IS;
    } else if (ends_with(name, ".lora_A.weight") || ends_with(name, ".lora_B.weight")) {
        bool a = ends_with(name, ".lora_A.weight");
        factor_leaf(name, a ? 'a' : 'b', w->leaf, sizeof w->leaf);
        w->layout = a ? LORA_A : LORA_B;
    } else {
        ipt_name(w->leaf, sizeof w->leaf, "%s", name);
        w->layout = t->rank == 4 ? KERNEL : AS_IS;
    }
}

static void load(grads *s, bench *b, const char *file)
{
    static char names[16][200];
    *s = (grads){.b = b, .st = golden_open(b->ctx, IPT_TEST_DATA, file)};
    for (size_t i = 0; i < ipt_safetensors_count(s->st); i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(s->st, i);
        if (strncmp(t->name, "d.", 2) == 0) {
            add_wrt(s, t);
        } else if (ends_with(t->name, ".lora_A.weight")) {
            char *name = names[s->n_site];
            assert_true(s->n_site < IPT_COUNT(s->site));
            ipt_name(name, sizeof names[0], "%.*s",
                     (int)(strlen(t->name) - strlen(".lora_A.weight")), t->name);
            s->site[s->n_site++] = (ipt_adapter_site){.site = name, .n_rank = PADDED};
        }
    }
}

/* Element i of the file's tensor -> element of the graph's value. */
static size_t place(const wrt *w, size_t i)
{
    const int64_t *d = w->want->dim;
    bool flat = w->want->rank < 4;
    size_t c = w->want->rank < 2 ? 1 : (size_t)d[1], taps = flat ? 1 : (size_t)(d[2] * d[3]);
    size_t first = i / (c * taps), second = i / taps % c, tap = i % taps;
    switch (w->layout) {
    case AS_IS:
        return i;
    case NCHW: /* [N,C,H,W] -> [N,H,W,C]; kernels [O,I,KH,KW] -> [O,KH,KW,I] alike */
    case KERNEL:
        return (first * taps + tap) * c + second;
    case LORA_A: /* [R,I,KH,KW] -> [(KH,KW,I),R] */
        return (tap * c + second) * PADDED + first;
    case LORA_B: /* [O,R] -> [R,O] */
        return second * (size_t)d[0] + first;
    }
    return 0;
}

static size_t graph_count(const wrt *w)
{
    if (w->layout == LORA_A || w->layout == LORA_B)
        return w->want->count / RANK * PADDED;
    return w->want->count;
}

static void write_factors(grads *s, ipt_plan *p)
{
    static const int32_t slot[PADDED] = {0, 0, 0, -1};
    static const float gates[2] = {0.5F, 0.5F}; /* alpha / rank */
    char name[256];
    for (size_t i = 0; i < s->n_site; i++) {
        const char *site = s->site[i].site;
        assert_ok(s->b->ctx, ipt_plan_write(p, ipt_name(name, sizeof name, "%s.lora_slot", site),
                                            slot, sizeof slot));
    }
    for (size_t i = 0; i < s->n_wrt; i++) {
        const wrt *w = &s->wrt[i];
        if (w->layout != LORA_A && w->layout != LORA_B)
            continue;
        float *v = golden_f32(s->b->ctx, s->st, w->want->name + 2, NULL);
        size_t n = graph_count(w);
        float *leaf = ipt_calloc(s->b->ctx, n, sizeof *leaf);
        assert_non_null(leaf);
        for (size_t k = 0; k < n; k++)
            leaf[k] = 7.0F; /* padding: whatever stands there must not matter */
        for (size_t k = 0; k < w->want->count; k++)
            leaf[place(w, k)] = v[k];
        assert_ok(s->b->ctx, ipt_plan_write(p, w->leaf, leaf, n * sizeof *leaf));
        ipt_free(leaf);
        ipt_free(v);
    }
    if (s->n_site)
        assert_ok(s->b->ctx, ipt_plan_write(p, "gates", gates, sizeof gates));
}

static ipt_plan *build(grads *s, const ipt_unet_config *u, const unet_case *k, ipt_weights *w,
                       bool recompute)
{
    ipt_ctx *ctx = s->b->ctx;
    ipt_unet_key key = {.batch = k->call.n,
                        .h = k->call.h,
                        .w = k->call.w,
                        .tokens = k->call.tokens,
                        .act = IPT_F32};
    ipt_val v[MAX_WRT], d[MAX_WRT];
    ipt_graph *g = NULL;
    char name[256];
    assert_ok(ctx, ipt_graph_create(ctx, &g));
    ipt_graph_adapters(g, s->site, s->n_site, 1, k->call.n, 1);
    if (recompute)
        ipt_recompute(g, true);
    ipt_val eps = ipt_unet_build(g, u, &key);
    if (recompute)
        ipt_recompute(g, false);
    ipt_val target = ipt_leaf(g, IPT_INPUT, "target", ipt_shape_of(g, eps));
    ipt_val loss = ipt_mse(g, eps, target);
    assert_ok(ctx, ipt_graph_status(g));
    for (size_t i = 0; i < s->n_wrt; i++) {
        v[i] = ipt_find(g, s->wrt[i].leaf);
        if (!v[i].id)
            fail_msg("the graph has no %s", s->wrt[i].leaf);
    }
    assert_ok(ctx, ipt_graph_backward(g, &(ipt_seed){.of = loss}, 1, v, s->n_wrt, d));
    for (size_t i = 0; i < s->n_wrt; i++) {
        if (!d[i].id)
            fail_msg("no gradient for %s", s->wrt[i].leaf);
        ipt_output(g, ipt_name(name, sizeof name, "d.%s", s->wrt[i].leaf), d[i]);
    }
    ipt_output(g, "loss", loss);
    return bench_plan(s->b, &g, w);
}

/* Returns the relative error of one gradient; padding of factors must be exactly 0. */
static double compare(grads *s, ipt_plan *p, const wrt *w)
{
    char name[256];
    size_t n = graph_count(w);
    float *raw = ipt_calloc(s->b->ctx, n, sizeof *raw),
          *got = ipt_calloc(s->b->ctx, n, sizeof *got);
    float *want = golden_f32(s->b->ctx, s->st, w->want->name, NULL);
    assert_true(raw && got);
    assert_ok(s->b->ctx,
              ipt_plan_read(p, ipt_name(name, sizeof name, "d.%s", w->leaf), raw, n * sizeof *raw));
    for (size_t i = 0; i < w->want->count; i++) {
        got[i] = raw[place(w, i)];
        raw[place(w, i)] = 0;
    }
    for (size_t i = 0; i < n; i++)
        if (raw[i] != 0)
            fail_msg("%s: padding has the gradient %g", w->leaf, (double)raw[i]);
    double e = sqrt(golden_nmse(want, got, w->want->count));
    ipt_free(raw);
    ipt_free(got);
    ipt_free(want);
    return e;
}

static void check(bench *b, const char *file, bool recompute)
{
    grads *s = malloc(sizeof *s);
    unet_case k;
    float loss = 0, want;
    double worst = 0;
    assert_non_null(s);
    load(s, b, file);
    ipt_model *m = bench_model(b, GOLDEN("models/sd1"), NULL);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
    const ipt_unet_config *u = &ipt_model_get_config(m)->unet;
    unet_case_load(b, s->st, u, "", "context", &k);
    float *target = golden_nhwc(b->ctx, s->st, "target", NULL);
    ipt_plan *p = build(s, u, &k, w, recompute);
    unet_write(b, p, u, &k.call);
    assert_ok(b->ctx, ipt_plan_write(p, "target", target, k.count * sizeof *target));
    write_factors(s, p);
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "loss", &loss, sizeof loss));
    want = ipt_st_get(ipt_safetensors_find(s->st, "loss"), 0);
    golden_at_most(fabs((double)(loss - want)) / (double)want, 1e-5, "loss on %s", b->name);
    for (size_t i = 0; i < s->n_wrt; i++) {
        double e = compare(s, p, &s->wrt[i]);
        golden_at_most(e, LIMIT, "%s on %s: d.%s", file, b->name, s->wrt[i].leaf);
        worst = fmax(worst, e);
    }
    print_message("  %s %s%s: %zu gradients, worst %.2g\n", b->name, file,
                  recompute ? ", recomputed" : "", s->n_wrt, worst);
    ipt_plan_destroy(&p);
    ipt_free(target);
    unet_case_free(&k);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
    ipt_safetensors_close(&s->st);
    free(s);
}

static void test_base(void **state) { check(bench_ready(state), "golden_grads_sd1_base", false); }
static void test_lora(void **state) { check(bench_ready(state), "golden_grads_sd1_lora", false); }
static void test_recomputed(void **state)
{
    check(bench_ready(state), "golden_grads_sd1_lora", true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_base),
        cmocka_unit_test(test_lora),
        cmocka_unit_test(test_recomputed),
    };
    return bench_run_all(tests);
}
