/* tests/test_state.c - values that several plans share and change in place: groups seen whole and
 * in parts, order of reads and writes, weights that are trained, an arena of several buffers. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "graph/internal.h"
#include "tests/golden.h"

enum { N_A = 6 * 5, N_B = 200, AT_B = 128, N_ALL = 384 };

static const ipt_state_item items[] = {{"a", {{6, 5, 1, 1}, 2, IPT_F32}},
                                       {"b", {{200, 1, 1, 1}, 1, IPT_F32}}};

static ipt_state *new_state(bench *b)
{
    ipt_state *s = NULL;
    assert_ok(b->ctx, ipt_state_create(b->ctx, b->gpu, &s));
    return s;
}

static void add_group(bench *b, ipt_state *s, const char *name, const char *prefix, ipt_dtype type)
{
    assert_ok(b->ctx, ipt_state_add(s, &(ipt_state_group){name, prefix, type, items, 2}));
}

static ipt_graph *graph_new(bench *b)
{
    ipt_graph *g = NULL;
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    return g;
}

static ipt_plan *plan_with(bench *b, ipt_graph **g, ipt_state *s, ipt_weights *w)
{
    ipt_plan *p = NULL;
    assert_ok(b->ctx,
              ipt_plan_create(*g, &(ipt_plan_opts){.gpu = b->gpu, .state = s, .weights = w}, &p));
    ipt_graph_destroy(g);
    return p;
}

static ipt_val leaf(ipt_graph *g, const char *name, int n)
{
    return ipt_leaf(g, IPT_PARAM, name, ipt_shape1(IPT_F32, n));
}

/* --- tensors and groups ----------------------------------------------------------------------- */
static void test_layout(void **state)
{
    bench *b = bench_ready(state);
    ipt_state *s = new_state(b);
    float a[N_A], all[N_ALL], v[N_B];
    add_group(b, s, "w", "", IPT_F32);
    add_group(b, s, "half", "half/", IPT_F16);
    assert_int_equal(ipt_state_bytes(s), N_ALL * 4 + N_ALL * 2);
    for (int i = 0; i < N_B; i++)
        v[i] = (float)i + 0.0001F;
    assert_ok(b->ctx, ipt_state_write(s, "b", v, sizeof v));
    assert_ok(b->ctx, ipt_state_write(s, "a", v, sizeof a));
    assert_ok(b->ctx, ipt_state_write(s, "half/b", v, sizeof v));
    assert_ok(b->ctx, ipt_state_read(s, "w", all, sizeof all));
    for (int i = 0; i < N_ALL; i++)
        assert_true(all[i] == (i < N_A ? v[i] : i >= AT_B && i < AT_B + N_B ? v[i - AT_B] : 0));
    assert_ok(b->ctx, ipt_state_read(s, "half", all, sizeof all));
    for (int i = 0; i < N_B; i++) /* an f16 has eleven bits */
        assert_true(all[AT_B + i] == (i == 0 ? ipt_f16_to_f32(ipt_f32_to_f16(v[0])) : (float)i));
    assert_int_equal(ipt_state_read(s, "a", a, sizeof a - 4), IPT_ERR_ARG);
    assert_int_equal(ipt_state_read(s, "c", a, sizeof a), IPT_ERR_MISSING);
    assert_int_equal(ipt_state_add(s, &(ipt_state_group){"w2", "", IPT_F32, items, 2}),
                     IPT_ERR_ARG);
    assert_int_equal(ipt_state_add(s, &(ipt_state_group){"w3", "3/", IPT_F32, items, 0}),
                     IPT_ERR_ARG);
    assert_int_equal(ipt_state_bytes(s), N_ALL * 6);
    ipt_state_destroy(&s);
}

/* One plan adds to a tensor of a group, another walks the whole group. */
static void test_two_plans(void **state)
{
    bench *b = bench_ready(state);
    ipt_state *s = new_state(b);
    add_group(b, s, "w", "", IPT_F32);
    add_group(b, s, "d", "d/", IPT_F32);
    ipt_graph *g = graph_new(b);
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape1(IPT_F32, N_B));
    ipt_accumulate(g, leaf(g, "d/b", N_B), ipt_mul(g, x, leaf(g, "b", N_B)));
    ipt_plan *first = plan_with(b, &g, s, NULL);
    g = graph_new(b);
    ipt_val w = leaf(g, "w", N_ALL), d = leaf(g, "d", N_ALL);
    ipt_output(g, "norm", ipt_dot(g, d, d));
    ipt_cut(g);
    ipt_put(g, w, ipt_add(g, w, d));                  /* reads the old sums, */
    ipt_put(g, d, ipt_unary(g, IPT_AFFINE, d, 0, 0)); /* which are zero then */
    ipt_output(g, "b_then", ipt_unary(g, IPT_AFFINE, leaf(g, "b", N_B), 1, 1)); /* a part of w */
    ipt_plan *second = plan_with(b, &g, s, NULL);
    float v[N_B], y[N_B];
    double want[N_B];
    for (int i = 0; i < N_B; i++) {
        v[i] = 0.01F * (float)i;
        want[i] = 1 + 0.5 * i;
        y[i] = (float)want[i];
    }
    assert_ok(b->ctx, ipt_state_write(s, "b", y, sizeof y));
    assert_ok(b->ctx, ipt_plan_write(first, "x", v, sizeof v));
    for (int round = 0; round < 3; round++) {
        double norm = 0;
        float got = 0;
        for (int k = 0; k < 2; k++)
            assert_ok(b->ctx, ipt_plan_run(first, 0));
        assert_ok(b->ctx, ipt_plan_run(second, 0));
        for (int i = 0; i < N_B; i++) {
            const double di = 2 * (double)v[i] * want[i];
            norm += di * di;
            want[i] += di;
        }
        assert_ok(b->ctx, ipt_plan_read(second, "norm", &got, sizeof got));
        assert_true(fabs((double)got - norm) < 1e-4 * norm);
        assert_ok(b->ctx, ipt_plan_run(second, 1));
        assert_ok(b->ctx, ipt_plan_read(second, "b_then", y, sizeof y));
        for (int i = 0; i < N_B; i++)
            assert_true(fabs((double)y[i] - 1 - want[i]) < 1e-4 * want[i]);
    }
    assert_ok(b->ctx, ipt_state_read(s, "d/b", y, sizeof y));
    for (int i = 0; i < N_B; i++)
        assert_true(y[i] == 0);
    ipt_plan_destroy(&first);
    ipt_plan_destroy(&second);
    ipt_state_destroy(&s);
}

/* What does not fit is told by name. */
static void test_misfits(void **state)
{
    bench *b = bench_ready(state);
    ipt_state *s = new_state(b);
    ipt_plan *p = NULL;
    add_group(b, s, "w", "", IPT_F32);
    ipt_graph *g = graph_new(b);
    ipt_output(g, "y", ipt_silu(g, ipt_leaf(g, IPT_PARAM, "a", ipt_shape2(IPT_F32, 5, 6))));
    assert_int_equal(ipt_plan_create(g, &(ipt_plan_opts){.gpu = b->gpu, .state = s}, &p),
                     IPT_ERR_SHAPE);
    assert_non_null(strstr(ipt_last_error(b->ctx), "a: the state has [6,5], the graph [5,6]"));
    ipt_graph_destroy(&g);
    g = graph_new(b);
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape1(IPT_F32, 3));
    ipt_put(g, x, x);
    assert_int_equal(ipt_graph_status(g), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(b->ctx), "changes a parameter in place"));
    ipt_graph_destroy(&g);
    ipt_state_destroy(&s);
}

/* --- a model's own weights -------------------------------------------------------------------- */
enum { ROWS = 9, IN = 5, OUT = 6 };

/* y = x a^T + c, of which a is trained: a step along its gradient is seen by the next run. */
static void test_weight(void **state)
{
    bench *b = bench_ready(state);
    ipt_state *s = new_state(b);
    const ipt_state_item mine = {"site.weight", {{OUT, IN, 1, 1}, 2, IPT_F32}};
    assert_ok(b->ctx, ipt_state_add(s, &(ipt_state_group){"w", "", IPT_F32, &mine, 1}));
    ipt_graph *g = graph_new(b);
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, ROWS, IN)), d = {0};
    ipt_val y = ipt_linear(g, x, "site", OUT, false), w = ipt_find(g, "site.weight");
    ipt_val loss = ipt_mse(g, y, ipt_leaf(g, IPT_INPUT, "want", ipt_shape2(IPT_F32, ROWS, OUT)));
    ipt_output(g, "loss", loss);
    assert_ok(b->ctx, ipt_graph_backward(g, &(ipt_seed){loss, {0}}, 1, &w, 1, &d));
    ipt_accumulate(g, ipt_leaf(g, IPT_PARAM, "w", ipt_shape1(IPT_F32, 128)),
                   ipt_leaf(g, IPT_PARAM, "step", ipt_shape1(IPT_F32, 128))); /* zeros */
    ipt_output(g, "d", d);
    assert_ok(b->ctx, ipt_graph_status(g));
    ipt_plan *p = plan_with(b, &g, s, NULL);
    float in[ROWS * IN], want[ROWS * OUT], a[OUT * IN], grad[OUT * IN], step[128] = {0};
    uint64_t seed = 3;
    for (size_t i = 0; i < IPT_COUNT(in); i++)
        in[i] = ipt_rng_normal(&seed);
    for (size_t i = 0; i < IPT_COUNT(want); i++)
        want[i] = ipt_rng_normal(&seed);
    for (size_t i = 0; i < IPT_COUNT(a); i++)
        a[i] = ipt_rng_normal(&seed);
    assert_ok(b->ctx, ipt_state_write(s, "site.weight", a, sizeof a));
    assert_ok(b->ctx, ipt_plan_write(p, "x", in, sizeof in));
    assert_ok(b->ctx, ipt_plan_write(p, "want", want, sizeof want));
    assert_ok(b->ctx, ipt_plan_write(p, "step", step, sizeof step));
    for (int round = 0; round < 4; round++) {
        float got = 0;
        double sum = 0, dw[OUT * IN] = {0};
        for (int r = 0; r < ROWS; r++)
            for (int o = 0; o < OUT; o++) {
                double e = -(double)want[r * OUT + o];
                for (int i = 0; i < IN; i++)
                    e += (double)in[r * IN + i] * (double)a[o * IN + i];
                sum += e * e / (ROWS * OUT);
                for (int i = 0; i < IN; i++)
                    dw[o * IN + i] += 2 * e * (double)in[r * IN + i] / (ROWS * OUT);
            }
        assert_ok(b->ctx, ipt_plan_run(p, 0));
        assert_ok(b->ctx, ipt_plan_read(p, "loss", &got, sizeof got));
        assert_true(fabs((double)got - sum) < 1e-5 * sum);
        assert_ok(b->ctx, ipt_plan_read(p, "d", grad, sizeof grad));
        for (int i = 0; i < OUT * IN; i++) {
            assert_true(fabs((double)grad[i] - dw[i]) < 1e-5);
            a[i] -= grad[i];
        }
        assert_ok(b->ctx, ipt_state_write(s, "site.weight", a, sizeof a));
    }
    ipt_plan_destroy(&p);
    ipt_state_destroy(&s);
}

/* --- an arena of several buffers -------------------------------------------------------------- */
enum { SIDE = 64, N_LAYER = 9 };

static ipt_graph *layers(bench *b)
{
    ipt_graph *g = graph_new(b);
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, SIDE, SIDE)), kept[N_LAYER];
    for (int i = 0; i < N_LAYER; i++)
        kept[i] = x = ipt_add_scaled(g, ipt_silu(g, x), 1.5F, x, 0.5F);
    for (int i = 0; i < N_LAYER; i++) /* so that all of them live at once */
        x = ipt_mul(g, ipt_unary(g, IPT_TANH, kept[i], 0, 0), x);
    ipt_output(g, "y", x);
    return g;
}

static void test_parts(void **state)
{
    bench *b = bench_device(state, false);
    const ipt_traits whole = *ipt_gpu_traits(b->gpu);
    float x[SIDE * SIDE], want[SIDE * SIDE], got[SIDE * SIDE];
    uint64_t seed = 8;
    for (size_t i = 0; i < IPT_COUNT(x); i++)
        x[i] = ipt_rng_normal(&seed);
    for (int k = 0; k < 4; k++) {
        ipt_graph *g = layers(b);
        ipt_plan *p = NULL;
        ipt_traits t = whole;
        if (k > 0) /* 16 KiB a value: two, and one, in a buffer */
            t.max_buffer = k == 2 ? 24 << 10 : 44 << 10;
        ipt_gpu_limit_traits(b->gpu, &t);
        assert_ok(b->ctx, ipt_plan_create(g, &(ipt_plan_opts){.gpu = b->gpu, .guard = k == 3}, &p));
        ipt_gpu_limit_traits(b->gpu, &whole);
        ipt_graph_destroy(&g);
        assert_true(k == 0 || p->arena_bytes > 2 * p->arena_part);
        assert_ok(b->ctx, ipt_plan_write(p, "x", x, sizeof x));
        for (int round = 0; round < 2; round++)
            assert_ok(b->ctx, ipt_plan_run(p, 0));
        assert_ok(b->ctx, ipt_plan_read(p, "y", k == 0 ? want : got, sizeof got));
        if (k > 0)
            assert_memory_equal(want, got, sizeof got);
        ipt_plan_destroy(&p);
    }
    ipt_graph *g = layers(b);
    ipt_plan *p = NULL;
    ipt_traits t = whole;
    t.max_buffer = 16 << 10;
    ipt_gpu_limit_traits(b->gpu, &t);
    assert_int_equal(ipt_plan_create(g, &(ipt_plan_opts){.gpu = b->gpu}, &p), IPT_ERR_DEVICE_MEM);
    ipt_gpu_limit_traits(b->gpu, &whole);
    assert_non_null(strstr(ipt_last_error(b->ctx), "one buffer may hold"));
    ipt_graph_destroy(&g);
}

/* --- AdamW beside torch ----------------------------------------------------------------------- */
/* torch 2.x, AdamW(lr 0.1, betas (0.9, 0.99), eps 1e-8, weight_decay 0.05), w = (1, -2, 0.5), loss
 * sum(w^3 / 3 + i w) with i = 0, 1, 2, three steps; in double. */
static void test_adamw(void **state)
{
    bench *b = bench_ready(state);
    static const double want[3][3] = {{0.895000001, -2.090000000, 0.397500000},
                                      {0.791653457, -2.179655941, 0.295633617},
                                      {0.690866855, -2.269037750, 0.194440118}};
    ipt_state *s = new_state(b);
    const ipt_state_item it = {"x", {{3, 1, 1, 1}, 1, IPT_F32}};
    static const char *const names[] = {"w", "d", "m", "v"};
    for (int i = 0; i < 4; i++) {
        char prefix[8];
        ipt_name(prefix, sizeof prefix, "%s/", names[i]);
        assert_ok(b->ctx, ipt_state_add(s, &(ipt_state_group){names[i], prefix, IPT_F32, &it, 1}));
    }
    ipt_graph *g = graph_new(b);
    ipt_adamw(g, leaf(g, "w", 128), leaf(g, "d", 128), leaf(g, "m", 128), leaf(g, "v", 128),
              ipt_leaf(g, IPT_INPUT, "hyper", ipt_shape1(IPT_F32, 8)));
    ipt_plan *p = plan_with(b, &g, s, NULL);
    float w[3] = {1, -2, 0.5F};
    assert_ok(b->ctx, ipt_state_write(s, "w/x", w, sizeof w));
    for (int t = 1; t <= 3; t++) {
        float d[3], h[8] = {0.1F,
                            0.9F,
                            0.99F,
                            1e-8F,
                            0.05F,
                            (float)(1 / (1 - pow(0.9, t))),
                            (float)(1 / sqrt(1 - pow(0.99, t))),
                            0.25F};
        for (int i = 0; i < 3; i++) /* times the factor: the gradient */
            d[i] = 4 * (w[i] * w[i] + (float)i);
        assert_ok(b->ctx, ipt_state_write(s, "d/x", d, sizeof d));
        assert_ok(b->ctx, ipt_plan_write(p, "hyper", h, sizeof h));
        assert_ok(b->ctx, ipt_plan_run(p, 0));
        assert_ok(b->ctx, ipt_state_read(s, "w/x", w, sizeof w));
        for (int i = 0; i < 3; i++)
            golden_at_most(fabs((double)w[i] - want[t - 1][i]), 1e-6, "step %d, w[%d]", t, i);
    }
    ipt_plan_destroy(&p);
    ipt_state_destroy(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout),  cmocka_unit_test(test_two_plans),
        cmocka_unit_test(test_misfits), cmocka_unit_test(test_weight),
        cmocka_unit_test(test_parts),   cmocka_unit_test(test_adamw),
    };
    return bench_run_all(tests);
}
