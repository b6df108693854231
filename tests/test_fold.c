/* tests/test_fold.c - adapters in the UNet's weights: the product against its closed form, the way
 * back bit for bit, and when the engine folds. */
#include "tests/golden.h"

#include "engine/impasto.h"
#include "graph/graph.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DATA IPT_TEST_DATA

/* --- one weight ------------------------------------------------------------------------------- */
static const struct {
    int32_t dim[4]; /* [O,KH,KW,I] */
    size_t rank;
} CASES[] = {{{40, 0, 0, 36}, 4}, {{33, 0, 0, 5}, 8},   {{200, 0, 0, 132}, 32},
             {{70, 3, 3, 6}, 12}, {{4, 1, 1, 320}, 64}, {{1, 0, 0, 1}, 4}};

static ipt_shape shape_of(const int32_t d[4])
{
    return d[1] ? ipt_shape4(IPT_F32, d[0], d[1], d[2], d[3]) : ipt_shape2(IPT_F32, d[0], d[3]);
}

static size_t fan_of(const ipt_shape *s) { return ipt_shape_count(s) / (size_t)s->dim[0]; }

/* The buffer as it lies there; ipt_free. */
static uint8_t *raw(bench *b, const ipt_weight_view *v)
{
    uint8_t *p = ipt_alloc(b->ctx, (size_t)v->bytes);
    assert_non_null(p);
    assert_ok(b->ctx, ipt_buffer_read(b->gpu, v->buf, v->off, p, v->bytes));
    return p;
}

static float *random_values(bench *b, size_t n, uint64_t seed, float size)
{
    float *v = ipt_calloc(b->ctx, n + 1, sizeof *v);
    assert_non_null(v);
    for (size_t i = 0; i < n; i++)
        v[i] = size * ((float)(ipt_rng_next(&seed) >> 40) / 8388608.0F - 1);
    return v;
}

/* Half the distance of the type's neighbours at v, and what sums of f32 may be off. */
static double slack(ipt_dtype type, double v, double size)
{
    double step = type == IPT_F16 ? ldexp(1, ilogb(fmax(fabs(v), ldexp(1, -14))) - 10) : 0;
    return step / 2 + 4e-7 * size;
}

/* W + a b, element by element; padding stays zero. */
static void check_sum(bench *b, const ipt_shape *s, size_t rank, const ipt_weight_view *view,
                      const float *before, const float *fa, const float *fb)
{
    size_t n = ipt_shape_count(s), o_n = (size_t)s->dim[0];
    float *after = ipt_calloc(b->ctx, n, sizeof *after);
    uint8_t *now = raw(b, view), *again = ipt_alloc(b->ctx, (size_t)view->bytes);
    assert_true(after && again);
    ipt_panel_unpack(s, view->dtype, now, after);
    for (size_t k = 0; k < fan_of(s); k++)
        for (size_t o = 0; o < o_n; o++) {
            double want = (double)before[k * o_n + o], size = fabs(want);
            for (size_t r = 0; r < rank; r++) {
                double p = (double)fa[k * rank + r] * (double)fb[r * o_n + o];
                want += p;
                size += fabs(p);
            }
            golden_at_most(fabs((double)after[k * o_n + o] - want), slack(view->dtype, want, size),
                           "%s, %s, element (%zu,%zu)", b->name,
                           view->dtype == IPT_F16 ? "f16" : "f32", k, o);
        }
    size_t in = (size_t)s->dim[s->rank - 1], kw = s->rank == 4 ? (size_t)s->dim[2] : 1;
    ipt_panel_src src = {.data = after,
                         .type = IPT_PANEL_F32,
                         .so = 1,
                         .si = o_n,
                         .sx = in * o_n,
                         .sy = kw * in * o_n};
    ipt_panel_pack(s, &src, view->dtype, again);
    assert_memory_equal(again, now, (size_t)view->bytes);
    ipt_free(after);
    ipt_free(now);
    ipt_free(again);
}

static void check_weight(bench *b, const ipt_shape *s, size_t rank, ipt_dtype type, float size)
{
    ipt_weights *w = NULL;
    ipt_weight_view view = {0};
    size_t n = ipt_shape_count(s), o_n = (size_t)s->dim[0];
    float *fa = random_values(b, fan_of(s) * rank, 3, 1),
          *fb = random_values(b, rank * o_n, 5, size), *v = random_values(b, n, 7, size),
          *before = ipt_calloc(b->ctx, n, sizeof *before);
    double *d = ipt_calloc(b->ctx, n, sizeof *d);
    assert_true(before && d);
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, type, 1, &w));
    assert_int_equal(ipt_weights_add(w, "x.weight", fa, fb, rank), IPT_ERR_MISSING);
    assert_ok(b->ctx, ipt_weights_restore(w, "x.weight")); /* never asked for: nothing to do */
    assert_ok(b->ctx, w->find(w, "x.weight", s, IPT_USE_PANEL, &view));
    uint8_t *original = raw(b, &view);
    if (size < 1) /* small values: f16 has fewer digits there */
        for (size_t i = 0; i < n; i++)
            d[i] = (double)v[i];
    else
        assert_ok(b->ctx, w->read(w, "x.weight", s, d));
    assert_ok(b->ctx, ipt_weights_replace(w, "x.weight", d));
    uint8_t *placed = raw(b, &view);
    ipt_panel_unpack(s, type, placed, before);
    if (size >= 1)
        assert_memory_equal(placed, original, (size_t)view.bytes);
    for (size_t k = 0; k < fan_of(s); k++)
        for (size_t o = 0; o < o_n; o++)
            assert_true(fabs((double)before[k * o_n + o] - d[o * fan_of(s) + k]) <=
                        slack(type, d[o * fan_of(s) + k], 0));
    assert_ok(b->ctx, ipt_weights_add(w, "x.weight", fa, fb, rank));
    check_sum(b, s, rank, &view, before, fa, fb);
    assert_ok(b->ctx, ipt_weights_restore(w, "x.weight"));
    uint8_t *restored = raw(b, &view);
    assert_memory_equal(restored, original, (size_t)view.bytes);
    void *all[] = {fa, fb, v, before, d, original, placed, restored};
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        ipt_free(all[i]);
    ipt_weights_destroy(&w);
}

static void products(void **state)
{
    bench *b = bench_device(state, false);
    for (size_t i = 0; i < IPT_COUNT(CASES); i++)
        for (int k = 0; k < 4; k++) {
            const ipt_shape s = shape_of(CASES[i].dim);
            check_weight(b, &s, CASES[i].rank, k & 1 ? IPT_F16 : IPT_F32, k & 2 ? 1e-6F : 1);
        }
}

/* Bindings of four kilobytes: panels go in parts, or not at all. */
static void narrow_bindings(void **state)
{
    bench *b = bench_device(state, false);
    ipt_traits narrow = *ipt_gpu_traits(b->gpu);
    const ipt_shape s = ipt_shape2(IPT_F32, 200, 12), deep = ipt_shape2(IPT_F32, 32, 2000);
    float *fa = random_values(b, 2000 * 4, 3, 1), *fb = random_values(b, 200 * 4, 5, 1);
    ipt_weights *w = NULL;
    ipt_weight_view view = {0};
    ipt_ctx *ctx = NULL;
    bench own = {.name = b->name};
    /* the limits stay with the device: one of its own */
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .cache_dir = ""};
    assert_int_equal(ipt_ctx_create(NULL, NULL, &ctx), IPT_OK);
    assert_ok(ctx, ipt_gpu_create(ctx, &o, &own.gpu));
    own.ctx = ctx;
    narrow.max_range = 4096;
    ipt_gpu_limit_traits(own.gpu, &narrow);
    assert_ok(ctx, ipt_weights_random(ctx, own.gpu, IPT_F32, 1, &w));
    assert_ok(ctx, w->find(w, "a.weight", &s, IPT_USE_PANEL, &view));
    uint8_t *original = raw(&own, &view);
    float *before = ipt_calloc(ctx, ipt_shape_count(&s), sizeof *before);
    assert_non_null(before);
    ipt_panel_unpack(&s, IPT_F32, original, before);
    assert_ok(ctx, ipt_weights_add(w, "a.weight", fa, fb, 4));
    check_sum(&own, &s, 4, &view, before, fa, fb);
    assert_ok(ctx, w->find(w, "b.weight", &deep, IPT_USE_PANEL, &view));
    assert_int_equal(ipt_weights_add(w, "b.weight", fa, fb, 4), IPT_ERR_TOO_LARGE);
    ipt_free(original);
    ipt_free(before);
    ipt_free(fa);
    ipt_free(fb);
    ipt_weights_destroy(&w);
    ipt_gpu_destroy(&own.gpu);
    ipt_ctx_destroy(&ctx);
}

/* A value that f16 does not hold is refused before anything is written. */
static void beyond_half(void **state)
{
    bench *b = bench_device(state, false);
    const ipt_shape s = ipt_shape2(IPT_F32, 3, 4);
    const double d[12] = {1, 2, 3, 4, 70000};
    ipt_weights *w = NULL;
    ipt_weight_view view = {0};
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F16, 1, &w));
    assert_ok(b->ctx, w->find(w, "a.weight", &s, IPT_USE_PANEL, &view));
    uint8_t *before = raw(b, &view);
    assert_int_equal(ipt_weights_replace(w, "a.weight", d), IPT_ERR_UNSUPPORTED);
    assert_non_null(strstr(ipt_last_error(b->ctx), "a.weight"));
    uint8_t *after = raw(b, &view);
    assert_memory_equal(before, after, (size_t)view.bytes);
    ipt_free(before);
    ipt_free(after);
    ipt_weights_destroy(&w);
}

/* --- requests --------------------------------------------------------------------------------- */
enum { SIDE = 16 };
typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_report rep;
    uint8_t rgb[SIDE * SIDE * 3];
    char json[4096];
    int n_warning;
} fixture;

static void count_line(void *user, ipt_log_level level, const char *line)
{
    fixture *f = user;
    f->n_warning += level == IPT_LOG_WARN && strncmp(line, "fold always", 11) == 0;
    if (level == IPT_LOG_ERROR)
        print_message("%s\n", line);
}

static fixture *open_engine(ipt_precision precision)
{
    fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    assert_int_equal(ipt_ctx_create(count_line, f, &f->ctx), IPT_OK);
    f->engine = test_engine(&f->ctx, precision, 0);
    return f;
}

static void close_engine(fixture *f)
{
    test_engine_done(&f->engine, &f->ctx);
    free(f);
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    fixture *f = user;
    (void)text;
    assert_int_equal(index, 0);
    assert_int_equal(im->w * im->h, SIDE * SIDE);
    memcpy(f->rgb, im->rgb, sizeof f->rgb);
    ipt_name(f->json, sizeof f->json, "%s", json);
    return IPT_OK;
}

static const ipt_lora
    lokr = {DATA "/kinds/lokr.safetensors", 0.7F, 1, NULL, 0, 1, NULL, NULL},
    locon = {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0, 1, NULL, NULL},
    late = {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0.5F, 1, NULL, NULL},
    blocks = {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0, 1, "down:0.5/mid:0", NULL};

static ipt_request small_request(const ipt_lora *l, size_t n, const char *fold)
{
    ipt_request r;
    ipt_request_init(&r);
    r.model = DATA "/models/sd1";
    r.prompt = "a cat";
    r.width = r.height = SIDE;
    r.steps = 2;
    r.seed = 3;
    r.lora = l;
    r.n_lora = n;
    r.fold = fold;
    return r;
}

static void draw(fixture *f, const ipt_request *r, uint8_t rgb[sizeof((fixture){0}.rgb)])
{
    assert_ok(f->ctx, ipt_generate(f->engine, r, keep, f, &f->rep));
    memcpy(rgb, f->rgb, sizeof f->rgb);
}

/* In, other weights, other blocks, out: what is drawn without adapters never changes by a bit, and
 * what is drawn with them repeats. */
static void there_and_back(void **state)
{
    static uint8_t first[4][sizeof((fixture){0}.rgb)], now[sizeof first[0]];
    (void)state;
    for (int half = 0; half < 2; half++) {
        fixture *f = open_engine(half ? IPT_PRECISION_F16 : IPT_PRECISION_F32);
        const ipt_lora *const use[4] = {NULL, &locon, &blocks, &lokr};
        for (int i = 0; i < 12; i++) {
            int k = i < 4 ? i : i * 7 % 4;
            ipt_request r = small_request(use[k], use[k] ? 1 : 0, "always");
            draw(f, &r, i < 4 ? first[k] : now);
            assert_int_equal(f->rep.is_folded, k > 0);
            if (i >= 4)
                assert_memory_equal(now, first[k], sizeof now);
            if (i >= 4)
                assert_int_equal(f->rep.n_plans_recorded, 0);
        }
        assert_memory_not_equal(first[0], first[1], sizeof now);
        assert_memory_not_equal(first[1], first[2], sizeof now);
        close_engine(f);
    }
}

/* The same picture, but for rounding, as beside the weights; the UNet's plan is that of a request
 * without adapters; its JSON says what was done. */
static void same_as_beside(void **state)
{
    static uint8_t beside[sizeof((fixture){0}.rgb)], folded[sizeof beside];
    const ipt_lora two[] = {locon, lokr};
    int worst = 0;
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F32);
    ipt_request none = small_request(NULL, 0, NULL), r = small_request(two, 2, "never");
    draw(f, &none, folded);
    assert_null(strstr(f->json, "\"fold\""));
    draw(f, &r, beside);
    assert_non_null(strstr(f->json, "\"fold\":\"never\""));
    assert_true(f->rep.n_plans_recorded > 0 && !f->rep.is_folded);
    r.fold = "always";
    draw(f, &r, folded);
    assert_non_null(strstr(f->json, "\"fold\":\"always\""));
    assert_true(f->rep.n_plans_recorded == 0 && f->rep.is_folded);
    for (size_t i = 0; i < sizeof beside; i++)
        worst = abs(beside[i] - folded[i]) > worst ? abs(beside[i] - folded[i]) : worst;
    assert_true(worst <= 1);
    r.fold = "sometimes";
    assert_int_equal(ipt_generate(f->engine, &r, keep, f, NULL), IPT_ERR_ARG);
    close_engine(f);
}

/* Only mixes that stay the same. */
static void what_is_folded(void **state)
{
    const ipt_lora two[] = {locon, lokr};
    const struct {
        const ipt_lora *lora;
        size_t n;
        const char *compose;
        bool is_folded;
    } rows[] = {
        {two, 2, "merge", true},   {two, 1, "composite", true}, {two, 2, "composite", false},
        {two, 2, "switch", false}, {&late, 1, "merge", false},  {&blocks, 1, "merge", true},
    };
    static uint8_t rgb[sizeof((fixture){0}.rgb)];
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_request r = small_request(rows[i].lora, rows[i].n, "always");
        r.compose = rows[i].compose;
        f->n_warning = 0;
        draw(f, &r, rgb);
        assert_int_equal(f->rep.is_folded, rows[i].is_folded);
        assert_int_equal(f->n_warning, rows[i].is_folded ? 0 : 1);
    }
    /* by work: a step of one row does not repay it, a thousand do */
    for (int many = 0; many < 2; many++) {
        ipt_request r = small_request(&locon, 1, "auto");
        r.steps = many ? 1000 : 1;
        r.cfg = 1;
        r.width = r.height = SIDE;
        r.sampler = "ddim";
        draw(f, &r, rgb);
        assert_int_equal(f->rep.is_folded, many);
    }
    close_engine(f);
}

/* A request that fails anywhere while adapters go in leaves nothing of them behind. */
static void half_way(void **state)
{
    static uint8_t plain[sizeof((fixture){0}.rgb)], now[sizeof plain];
    int failed = 0;
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F32);
    ipt_request none = small_request(NULL, 0, NULL), r = small_request(&lokr, 1, "always");
    r.steps = none.steps = 1;
    draw(f, &none, plain);
    draw(f, &r, now);
    ipt_status s = IPT_ERR_NOMEM;
    for (uint64_t k = 40; s != IPT_OK; k += 1 + k / 8) {
        draw(f, &none, now);
        assert_memory_equal(now, plain, sizeof now);
        ipt_alloc_fail_after(f->ctx, k);
        s = ipt_generate(f->engine, &r, NULL, NULL, NULL);
        ipt_alloc_fail_after(f->ctx, 0);
        failed += s == IPT_ERR_NOMEM;
        assert_true(s == IPT_OK || s == IPT_ERR_NOMEM);
    }
    draw(f, &none, now);
    assert_memory_equal(now, plain, sizeof now);
    assert_true(failed > 5);
    close_engine(f);
}

int main(void)
{
    const struct CMUnitTest weights[] = {cmocka_unit_test(products), cmocka_unit_test(beyond_half),
                                         cmocka_unit_test(narrow_bindings)};
    const struct CMUnitTest requests[] = {
        cmocka_unit_test(there_and_back), cmocka_unit_test(same_as_beside),
        cmocka_unit_test(what_is_folded), cmocka_unit_test(half_way)};
    int failed = bench_run_all(weights);
    return failed + cmocka_run_group_tests_name("fold", requests, NULL, NULL);
}
