/* tests/test_graph.c - graphs and plans themselves: messages, liveness and aliasing by brute force,
 * segments, reverse mode, recomputing, checks, cancelling, running out of memory. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "graph/internal.h"
#include "tests/golden.h"

enum { ROWS = 6, COLS = 8, COUNT = ROWS * COLS };

static ipt_graph *graph_new(ipt_ctx *ctx)
{
    ipt_graph *g = NULL;
    assert_ok(ctx, ipt_graph_create(ctx, &g));
    return g;
}

static ipt_val input(ipt_graph *g, const char *name)
{
    return ipt_leaf(g, IPT_INPUT, name, ipt_shape2(IPT_F32, ROWS, COLS));
}

static void fill(float *v, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n; i++)
        v[i] = ipt_rng_normal(&seed);
}

static void write_input(bench *b, ipt_plan *p, const char *name, uint64_t seed)
{
    float v[COUNT];
    fill(v, COUNT, seed);
    assert_ok(b->ctx, ipt_plan_write(p, name, v, sizeof v));
}

/* --- messages -------------------------------------------------------------------------------- */
static void expect_poison(bench *b, ipt_graph **g, ipt_status want, const char *a, const char *c)
{
    ipt_plan *p = NULL;
    const char *text = ipt_last_error(b->ctx);
    assert_int_equal(ipt_graph_status(*g), want);
    if (!strstr(text, a) || !strstr(text, c))
        fail_msg("\"%s\" has not both %s and %s", text, a, c);
    assert_int_equal(ipt_plan_create(*g, &(ipt_plan_opts){0}, &p), want);
    assert_null(p);
    ipt_graph_destroy(g);
}

static void test_poison(void **state)
{
    bench *b = bench_ready(state);
    ipt_graph *g = graph_new(b->ctx);
    ipt_val x = input(g, "x");
    ipt_graph_prefix(g, "unet.");
    ipt_val y = ipt_linear(g, x, "first", 4, true);
    ipt_linear_add(g, y, "second", 5, true, x); /* the residual has 8 columns */
    ipt_matmul(g, x, x, (ipt_val){0});          /* a later mistake does not hide the first */
    expect_poison(b, &g, IPT_ERR_SHAPE, "unet.second", "[6,8]");

    g = graph_new(b->ctx);
    x = input(g, "x");
    ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, 3, 8));
    expect_poison(b, &g, IPT_ERR_SHAPE, "x", "[3,8]");

    g = graph_new(b->ctx);
    ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, 3, -1));
    expect_poison(b, &g, IPT_ERR_SHAPE, "x", "not usable");

    g = graph_new(b->ctx);
    ipt_output(g, "y", ipt_silu(g, input(g, "x")));
    ipt_output(g, "y", ipt_silu(g, input(g, "x")));
    expect_poison(b, &g, IPT_ERR_ARG, "y", "taken");

    g = graph_new(b->ctx);
    ipt_silu(g, (ipt_val){77});
    expect_poison(b, &g, IPT_ERR_ARG, "operand 0", "not a value");

    g = graph_new(b->ctx);
    ipt_recompute(g, false);
    expect_poison(b, &g, IPT_ERR_ARG, "ipt_recompute", "pair");
}

static void test_names(void **state)
{
    bench *b = bench_ready(state);
    ipt_graph *g = graph_new(b->ctx);
    float v[COUNT] = {0};
    input(g, "unused");
    ipt_val dead = ipt_silu(g, input(g, "x"));
    ipt_silu(g, dead);
    ipt_output(g, "y", ipt_silu(g, input(g, "x")));
    ipt_output(g, "same", input(g, "x")); /* a leaf as an output */
    ipt_plan *p = bench_plan(b, &g, NULL);
    assert_int_equal(p->n_node, 2); /* nobody reads the other two */
    write_input(b, p, "x", 3);
    assert_ok(b->ctx, ipt_plan_write(p, "unused", v, sizeof v));
    assert_int_equal(ipt_plan_write(p, "x", v, sizeof v - 4), IPT_ERR_ARG);
    assert_int_equal(ipt_plan_write(p, "y", v, sizeof v), IPT_ERR_MISSING);
    assert_int_equal(ipt_plan_read(p, "nothing", v, sizeof v), IPT_ERR_MISSING);
    assert_int_equal(ipt_plan_run(p, 1), IPT_ERR_ARG);
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    float x[COUNT];
    fill(x, COUNT, 3);
    assert_ok(b->ctx, ipt_plan_read(p, "same", v, sizeof v));
    assert_memory_equal(v, x, sizeof v);
    ipt_plan_destroy(&p);
}

/* --- liveness and aliasing
 * ------------------------------------------------------------------------ */
static ipt_val random_node(ipt_graph *g, uint64_t *seed, ipt_val a, ipt_val c)
{
    ipt_shape flat = ipt_shape1(IPT_F32, COUNT), square = ipt_shape2(IPT_F32, ROWS, COLS);
    switch (ipt_rng_next(seed) % 8) {
    case 0:
        return ipt_silu(g, a);
    case 1:
        return ipt_unary(g, IPT_TANH, a, 0, 0);
    case 2:
        return ipt_add_scaled(g, a, 0.5F, c, -0.25F);
    case 3:
        return ipt_mul(g, a, ipt_unary(g, IPT_TANH, c, 0, 0));
    case 4:
        return ipt_slice(g, ipt_concat(g, a, c), 3, COLS);
    case 5:
        return ipt_reshape(g, ipt_silu(g, ipt_reshape(g, a, flat)), square);
    case 6:
        return ipt_add(
            g, a, ipt_sum_to(g, ipt_unary(g, IPT_TANH, c, 0, 0), ipt_shape2(IPT_F32, 1, COLS)));
    default:
        return ipt_reshape(g, ipt_reshape(g, a, flat), square);
    }
}

/* A graph of `n` random nodes over all earlier values, with outputs in the middle and cuts. */
static ipt_graph *random_graph(bench *b, uint64_t seed, int n, bool cuts)
{
    ipt_val v[80];
    char name[32];
    int n_value = 2;
    ipt_graph *g = graph_new(b->ctx);
    v[0] = input(g, "x");
    v[1] = input(g, "y");
    for (int i = 0; i < n; i++) {
        ipt_val a = v[ipt_rng_next(&seed) % (uint64_t)n_value];
        ipt_val last = v[n_value - 1 - (int)(ipt_rng_next(&seed) % 2)];
        v[n_value++] = random_node(g, &seed, last, a);
        if (i == n - 1 || ipt_rng_next(&seed) % 5 == 0)
            ipt_output(g, ipt_name(name, sizeof name, "out%d", i), v[n_value - 1]);
        if (cuts && ipt_rng_next(&seed) % 9 == 0)
            ipt_cut(g);
    }
    assert_ok(b->ctx, ipt_graph_status(g));
    return g;
}

/* What stands in every word of the arena while the nodes run in order: an operand must still be
 * there when it is read, whatever the planner thought about lifetimes. */
typedef struct sim {
    const ipt_plan *p;
    uint32_t *owner; /* per word: value whose data it holds */
    uint32_t *root;  /* value -> what it is a view of */
} sim;

static void range_of(const sim *s, uint32_t v, size_t *first, size_t *end)
{
    const ipt_slot *slot = &s->p->slot[s->p->place[v] - 1];
    *first = slot->off / 4;
    *end = *first + (slot->bytes + 3) / 4;
}

static void take(const sim *s, uint32_t v)
{
    size_t i, end;
    for (range_of(s, v, &i, &end); i < end; i++)
        s->owner[i] = s->root[v];
}

static void must_hold(const sim *s, uint32_t v, const char *when)
{
    size_t i, end;
    if (!s->p->place[v])
        return;
    for (range_of(s, v, &i, &end); i < end; i++)
        if (s->owner[i] != s->root[v])
            fail_msg("%s: value %u was overwritten by value %u", when, v, s->owner[i]);
}

/* A result may lie on an operand only as a whole and where the operator says so. */
static void check_alias(const sim *s, const ipt_node *n, int o)
{
    size_t of, oe, f, e;
    range_of(s, n->out[o], &of, &oe);
    for (int k = 0; k < n->n_in; k++) {
        if (!n->in[k] || !s->p->place[n->in[k]])
            continue;
        range_of(s, n->in[k], &f, &e);
        bool whole = o == 0 && f == of && e == oe && (ipt_op_table[n->op]->alias >> k & 1);
        if (f < oe && of < e && !whole)
            fail_msg("%s: result %d lies on operand %d", n->name, o, k);
    }
}

static void simulate(ipt_plan *p)
{
    sim s = {.p = p,
             .owner = calloc(p->arena_bytes / 4 + 1, sizeof(uint32_t)),
             .root = calloc(p->n_value, sizeof(uint32_t))};
    assert_true(s.owner && s.root);
    for (uint32_t v = 1; v < p->n_value; v++) {
        s.root[v] = v;
        if (!p->value[v].node && p->place[v])
            take(&s, v);
    }
    for (uint32_t i = 0; i < p->n_node; i++) {
        const ipt_node *n = &p->node[i].n;
        for (int k = 0; k < n->n_in; k++)
            if (n->in[k])
                must_hold(&s, n->in[k], n->name);
        if (ipt_op_table[n->op]->view) {
            s.root[n->out[0]] = s.root[n->in[0]];
            continue;
        }
        for (int k = 0; k < n->n_out; k++)
            check_alias(&s, n, k);
        for (int k = 0; k < n->n_out; k++)
            take(&s, n->out[k]);
    }
    for (uint32_t v = 1; v < p->n_value; v++)
        if (p->value[v].is_output || !p->value[v].node)
            must_hold(&s, v, "at the end");
    free(s.owner);
    free(s.root);
}

static void test_overlaps(void **state)
{
    bench *b = bench_ready(state);
    for (uint64_t seed = 1; seed <= (b->gpu ? 4u : 300u); seed++) {
        ipt_graph *g = random_graph(b, seed, 5 + (int)(seed % 60), seed % 2 == 0);
        ipt_plan *p = bench_plan(b, &g, NULL);
        if (!b->gpu)
            assert_ok(b->ctx, ipt_planner_offsets(p, 0));
        simulate(p);
        ipt_plan_destroy(&p);
    }
}

/* No value lies across a cut of the arena's offsets. */
static void test_cuts(void **state)
{
    bench *b = bench_ready(state);
    if (b->gpu)
        return; /* test_state has the buffers themselves */
    for (uint64_t seed = 1; seed <= 100; seed++) {
        ipt_graph *g = random_graph(b, seed, 5 + (int)(seed % 60), seed % 2 == 0);
        ipt_plan *p = bench_plan(b, &g, NULL);
        uint64_t most = 0;
        for (uint32_t i = 0; i < p->n_slot; i++)
            most = p->slot[i].bytes > most ? p->slot[i].bytes : most;
        const uint64_t pad = seed % 3 == 0 ? 256 : 0;
        p->arena_part = (most + 2 * pad + 255) / 256 * 256 * (1 + seed % 3);
        assert_ok(b->ctx, ipt_planner_offsets(p, pad));
        for (uint32_t i = 0; i < p->n_slot; i++) {
            const ipt_slot *s = &p->slot[i];
            assert_true((s->off - pad) / p->arena_part ==
                        (s->off + s->bytes + pad - 1) / p->arena_part);
        }
        simulate(p);
        ipt_plan_destroy(&p);
    }
}

/* The same random graphs on the bench and on the host, with and without guard bands. */
static void test_random_runs(void **state)
{
    bench *b = bench_device(state, false);
    for (uint64_t seed = 21; seed <= 24; seed++) {
        ipt_plan *p[3] = {NULL};
        for (int i = 0; i < 3; i++) { /* host; device; device, guarded */
            ipt_graph *g = random_graph(b, seed, 50, seed % 2 == 0);
            ipt_plan_opts o = {.gpu = i ? b->gpu : NULL, .guard = i == 2};
            assert_ok(b->ctx, ipt_plan_create(g, &o, &p[i]));
            ipt_graph_destroy(&g);
            write_input(b, p[i], "x", 5);
            write_input(b, p[i], "y", 6);
            for (uint32_t s = 0; s < p[i]->n_segment; s++)
                assert_ok(b->ctx, ipt_plan_run(p[i], s));
        }
        for (uint32_t v = 1; v < p[0]->n_value; v++) {
            const char *name = p[0]->value[v].name;
            float want[COUNT], got[COUNT];
            if (!p[0]->value[v].is_output)
                continue;
            assert_ok(b->ctx, ipt_plan_read(p[0], name, want, sizeof want));
            for (int i = 1; i < 3; i++) {
                assert_ok(b->ctx, ipt_plan_read(p[i], name, got, sizeof got));
                golden_at_most(golden_nmse(want, got, COUNT), 1e-10, "graph %d, %s", (int)seed,
                               name);
            }
        }
        for (int i = 0; i < 3; i++)
            ipt_plan_destroy(&p[i]);
    }
}

/* --- segments ------------------------------------------------------------------------------------
 */
static void test_segments(void **state)
{
    bench *b = bench_ready(state);
    ipt_graph *g = graph_new(b->ctx);
    ipt_val a = ipt_silu(g, input(g, "x")); /* crosses the cut without being an output */
    ipt_val mid = ipt_add(g, a, a);
    ipt_output(g, "mid", mid);
    ipt_cut(g);
    ipt_output(g, "end", ipt_mul(g, ipt_add(g, mid, a), input(g, "factor")));
    ipt_plan *p = bench_plan(b, &g, NULL);
    float x[COUNT], m[COUNT], e[COUNT];
    fill(x, COUNT, 9);
    for (int round = 0; round < 2; round++) {
        assert_ok(b->ctx, ipt_plan_write(p, "x", x, sizeof x));
        assert_ok(b->ctx, ipt_plan_run(p, 0));
        assert_ok(b->ctx, ipt_plan_read(p, "mid", m, sizeof m));
        for (int i = 0; i < COUNT; i++)
            m[i] = (float)round - 2.0F * m[i]; /* what the host made of it */
        assert_ok(b->ctx, ipt_plan_write(p, "factor", m, sizeof m));
        assert_ok(b->ctx, ipt_plan_run(p, 1));
        assert_ok(b->ctx, ipt_plan_read(p, "end", e, sizeof e));
        for (int i = 0; i < COUNT; i++) {
            double s = (double)x[i] / (1 + exp(-(double)x[i]));
            assert_true(fabs((double)e[i] - 3 * s * (round - 4 * s)) < 1e-4);
        }
        x[0] += 1;
    }
    ipt_plan_destroy(&p);
}

/* Early nodes, built in the midst of others, run first and stand while those run again and again.
 */
static void test_early(void **state)
{
    bench *b = bench_ready(state);
    ipt_graph *g = graph_new(b->ctx);
    ipt_val y = input(g, "y"), sum = y, kept[3];
    for (int k = 0; k < 3; k++) { /* values of both kinds come and go */
        sum = ipt_silu(g, ipt_add(g, sum, y));
        ipt_early(g, true);
        kept[k] = ipt_mul(g, ipt_add(g, input(g, "x"), input(g, "x")), input(g, "x"));
        kept[k] = ipt_reshape(g, ipt_unary(g, IPT_AFFINE, kept[k], 1, (float)k),
                              ipt_shape2(IPT_F32, COUNT / COLS, COLS));
        ipt_early(g, false);
        sum = ipt_add(g, sum, ipt_reshape(g, kept[k], ipt_shape_of(g, sum)));
    }
    ipt_output(g, "end", sum);
    ipt_plan *p = bench_plan(b, &g, NULL);
    float x[COUNT], v[COUNT], e[COUNT];
    fill(x, COUNT, 9);
    fill(v, COUNT, 10);
    for (int round = 0; round < 4; round++) {
        assert_ok(b->ctx, ipt_plan_write(p, "y", v, sizeof v));
        if (round % 2 == 0) {
            assert_ok(b->ctx, ipt_plan_write(p, "x", x, sizeof x));
            assert_ok(b->ctx, ipt_plan_run(p, 0));
        }
        assert_ok(b->ctx, ipt_plan_run(p, 1));
        assert_ok(b->ctx, ipt_plan_read(p, "end", e, sizeof e));
        for (int i = 0; i < COUNT; i++) {
            double s = (double)v[i];
            for (int k = 0; k < 3; k++) {
                double a = s + (double)v[i];
                s = a / (1 + exp(-a)) + 2 * (double)x[i] * (double)x[i] + k;
            }
            assert_true(fabs((double)e[i] - s) < 1e-4 * (1 + fabs(s)));
            v[i] += 0.5F;
            x[i] += round % 2 ? 0.25F : 0; /* before it is written again */
        }
    }
    assert_int_equal(ipt_plan_run(p, 2), IPT_ERR_ARG);
    ipt_plan_destroy(&p);
    g = graph_new(b->ctx);
    y = ipt_silu(g, input(g, "y"));
    ipt_early(g, true);
    y = ipt_silu(g, y);
    ipt_early(g, false);
    ipt_output(g, "end", y);
    const ipt_plan_opts o = {.gpu = b->gpu};
    assert_int_equal(ipt_plan_create(g, &o, &p), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(b->ctx), "depends on what comes later"));
    ipt_graph_destroy(&g);
}

/* --- reverse mode --------------------------------------------------------------------------------
 */
/* loss = mse(f(x), 0) with shared values, a broadcast and a weight. */
static ipt_val small_loss(ipt_graph *g, ipt_val *mid)
{
    ipt_val x = input(g, "x");
    ipt_val h = ipt_linear(g, x, "one", COLS, true);
    *mid = ipt_silu(g, h);
    ipt_val y = ipt_add(g, ipt_mul(g, *mid, x), *mid);
    y = ipt_add(g, y, ipt_leaf(g, IPT_PARAM, "row", ipt_shape2(IPT_F32, 1, COLS)));
    y = ipt_linear_add(g, y, "two", COLS, false, x);
    return ipt_mse(g, y, input(g, "target"));
}

static double host_loss(bench *b, ipt_plan *p)
{
    size_t n = 0;
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    return *ipt_host_values(p, "loss", &n);
}

/* Gradients of leaves and of a value in the middle against central differences of the host's
 * doubles. */
static void test_backward(void **state)
{
    bench *b = bench_ready(state);
    ipt_weights *w = NULL;
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F32, 4, &w));
    ipt_graph *g = graph_new(b->ctx);
    ipt_val mid, loss = small_loss(g, &mid), d[5];
    ipt_val wrt[5] = {input(g, "x"), ipt_find(g, "row"), ipt_find(g, "one.weight"),
                      input(g, "elsewhere"), mid};
    assert_ok(b->ctx, ipt_graph_backward(g, &(ipt_seed){.of = loss}, 1, wrt, 5, d));
    assert_int_equal(d[3].id, 0); /* the loss does not depend on it */
    assert_true(d[0].id && d[1].id && d[2].id && d[4].id);
    ipt_output(g, "loss", loss);
    ipt_output(g, "dx", d[0]);
    ipt_output(g, "drow", d[1]);
    ipt_plan *p = bench_plan(b, &g, w), *host = NULL;
    ipt_graph *again = graph_new(b->ctx);
    ipt_output(again, "loss", small_loss(again, &mid));
    assert_ok(b->ctx, ipt_plan_create(again, &(ipt_plan_opts){.weights = w}, &host));
    ipt_graph_destroy(&again);
    float row[COLS], drow[COLS], dx[COUNT];
    fill(row, COLS, 8);
    for (int i = 0; i < 2; i++) {
        ipt_plan *q = i ? host : p;
        write_input(b, q, "x", 1);
        write_input(b, q, "target", 2);
        assert_ok(b->ctx, ipt_plan_write(q, "row", row, sizeof row));
    }
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "dx", dx, sizeof dx));
    assert_ok(b->ctx, ipt_plan_read(p, "drow", drow, sizeof drow));
    for (int which = 0; which < 2; which++) {
        size_t n = 0;
        double *v = ipt_host_values(host, which ? "row" : "x", &n);
        for (size_t i = 0; i < n; i++) {
            const double eps = 1e-4, keep = v[i];
            v[i] = keep + eps;
            double up = host_loss(b, host);
            v[i] = keep - eps;
            double down = host_loss(b, host);
            v[i] = keep;
            double want = (up - down) / (2 * eps), got = (double)(which ? drow[i] : dx[i]);
            assert_true(fabs(got - want) <= 1e-5 + 1e-4 * fabs(want));
        }
    }
    ipt_plan_destroy(&host);
    ipt_plan_destroy(&p);
    ipt_weights_destroy(&w);
}

static void test_no_gradient(void **state)
{
    bench *b = bench_ready(state);
    ipt_graph *g = graph_new(b->ctx);
    ipt_val x = input(g, "x"), d = {0}, dd = {0};
    ipt_val loss = ipt_mse(g, ipt_silu(g, x), x);
    assert_ok(b->ctx, ipt_graph_backward(g, &(ipt_seed){.of = loss}, 1, &x, 1, &d));
    ipt_seed twice = {.of = d, .grad = x}; /* gradients of gradients are not offered */
    assert_int_equal(ipt_graph_backward(g, &twice, 1, &x, 1, &dd), IPT_ERR_UNSUPPORTED);
    assert_non_null(strstr(ipt_last_error(b->ctx), "has no gradient"));
    ipt_graph_destroy(&g);
    g = graph_new(b->ctx);
    x = input(g, "x");
    assert_int_equal(ipt_graph_backward(g, &(ipt_seed){.of = ipt_silu(g, x)}, 1, &x, 1, &d),
                     IPT_ERR_SHAPE);
    ipt_graph_destroy(&g);
}

/* Eight blocks of six nodes: marked blocks give the same bytes from a smaller arena. */
static void run_blocks(bench *b, bool marks, float *dx, uint64_t *arena)
{
    ipt_weights *w = NULL;
    char site[32];
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F32, 4, &w));
    ipt_graph *g = graph_new(b->ctx);
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, 64, COLS)), h = x, d = {0};
    for (int i = 0; i < 8; i++) {
        if (marks)
            ipt_recompute(g, true);
        h = ipt_linear(g, h, ipt_name(site, sizeof site, "block%d", i), COLS, true);
        for (int k = 0; k < 5; k++)
            h = ipt_mul(g, ipt_silu(g, h), h);
        h = ipt_unary(g, IPT_TANH, h, 0, 0);
        if (marks)
            ipt_recompute(g, false);
    }
    ipt_val loss = ipt_mse(g, h, ipt_leaf(g, IPT_INPUT, "target", ipt_shape2(IPT_F32, 64, COLS)));
    assert_ok(b->ctx, ipt_graph_backward(g, &(ipt_seed){.of = loss}, 1, &x, 1, &d));
    ipt_output(g, "dx", d);
    ipt_plan *p = bench_plan(b, &g, w);
    float v[64 * COLS];
    fill(v, IPT_COUNT(v), 12);
    assert_ok(b->ctx, ipt_plan_write(p, "x", v, sizeof v));
    fill(v, IPT_COUNT(v), 13);
    assert_ok(b->ctx, ipt_plan_write(p, "target", v, sizeof v));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "dx", dx, sizeof v));
    if (!b->gpu)
        assert_ok(b->ctx, ipt_planner_offsets(p, 0));
    simulate(p);
    *arena = ipt_plan_arena_bytes(p);
    ipt_plan_destroy(&p);
    ipt_weights_destroy(&w);
}

static void test_recompute(void **state)
{
    bench *b = bench_ready(state);
    float plain[64 * COLS], marked[64 * COLS];
    uint64_t bytes[2];
    run_blocks(b, false, plain, &bytes[0]);
    run_blocks(b, true, marked, &bytes[1]);
    print_message("  %s: arena %d KiB, recomputed %d KiB\n", b->name, (int)(bytes[0] >> 10),
                  (int)(bytes[1] >> 10));
    assert_memory_equal(plain, marked, sizeof plain);
    assert_true(bytes[1] * 2 < bytes[0]);
}

/* --- checks, cancelling, limits
 * -------------------------------------------------------------------- */
/* A store whose host values of one weight are not what its device copy holds. */
typedef struct liar {
    ipt_weights base;
    ipt_weights *real;
    const char *about; /* NULL: honest */
} liar;

static ipt_status liar_find(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                            ipt_weight_view *out)
{
    ipt_weights *real = ((liar *)(void *)w)->real;
    return real->find(real, name, shape, use, out);
}

static ipt_status liar_read(ipt_weights *w, const char *name, const ipt_shape *shape, double *out)
{
    liar *l = (liar *)(void *)w;
    IPT_TRY(l->real->read(l->real, name, shape, out));
    if (l->about && strcmp(name, l->about) == 0)
        out[0] += 0.5;
    return IPT_OK;
}

static ipt_status run_checked(bench *b, liar *l)
{
    ipt_plan *p = NULL;
    ipt_val mid;
    ipt_graph *g = graph_new(b->ctx);
    ipt_output(g, "loss", small_loss(g, &mid));
    assert_ok(b->ctx,
              ipt_plan_create(
                  g, &(ipt_plan_opts){.gpu = b->gpu, .weights = &l->base, .check = true}, &p));
    ipt_graph_destroy(&g);
    write_input(b, p, "x", 1);
    write_input(b, p, "target", 2);
    assert_ok(b->ctx, ipt_plan_write(p, "row", (const float[COLS]){0}, COLS * sizeof(float)));
    ipt_status s = ipt_plan_run(p, 0);
    ipt_plan_destroy(&p);
    return s;
}

static void test_check(void **state)
{
    bench *b = bench_device(state, false);
    liar l = {.base = {.find = liar_find, .read = liar_read}};
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F32, 4, &l.real));
    assert_ok(b->ctx, run_checked(b, &l));
    l.about = "two.weight";
    assert_int_equal(run_checked(b, &l), IPT_ERR_UNSUPPORTED);
    assert_int_equal(strncmp(ipt_last_error(b->ctx), "two: ", 5), 0);
    l.about = "one.bias";
    assert_int_equal(run_checked(b, &l), IPT_ERR_UNSUPPORTED);
    assert_int_equal(strncmp(ipt_last_error(b->ctx), "one: ", 5), 0);
    ipt_weights_destroy(&l.real);
}

/* Builds, plans, writes and runs the small graph with its gradients. */
static ipt_status run_small(bench *b, ipt_weights *w, const ipt_plan_opts *more, float *loss,
                            float *dx)
{
    static const ipt_adapter_site site = {.site = "one", .n_rank = 4};
    const float row[COLS] = {0}, gate[ROWS] = {0}, factor[4 * COLS] = {0};
    const int32_t slot[4] = {0, 0, -1, -1};
    ipt_plan_opts o = more ? *more : (ipt_plan_opts){0};
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    ipt_status status = IPT_OK;
    float x[COUNT], t[COUNT];
    ipt_val in, l, mid, d = {0};
    fill(x, COUNT, 1);
    fill(t, COUNT, 2);
    o.gpu = b->gpu;
    o.weights = w;
    IPT_TRY_GOTO(ipt_graph_create(b->ctx, &g), done);
    ipt_graph_adapters(g, &site, 1, 1, ROWS, 1);
    in = input(g, "x");
    ipt_recompute(g, true);
    l = small_loss(g, &mid);
    ipt_recompute(g, false);
    IPT_TRY_GOTO(ipt_graph_backward(g, &(ipt_seed){.of = l}, 1, &in, 1, &d), done);
    ipt_output(g, "loss", l);
    ipt_output(g, "dx", d);
    IPT_TRY_GOTO(ipt_graph_status(g), done);
    IPT_TRY_GOTO(ipt_plan_create(g, &o, &p), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "x", x, sizeof x), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "target", t, sizeof t), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "row", row, sizeof row), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "gates", gate, sizeof gate), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "one.lora_a", factor, sizeof factor), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "one.lora_b", factor, sizeof factor), done);
    IPT_TRY_GOTO(ipt_plan_write(p, "one.lora_slot", slot, sizeof slot), done);
    IPT_TRY_GOTO(ipt_plan_run(p, 0), done);
    IPT_TRY_GOTO(ipt_plan_read(p, "loss", loss, sizeof *loss), done);
    IPT_TRY_GOTO(ipt_plan_read(p, "dx", dx, sizeof x), done);
done:
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    return status;
}

/* Factors without gradients lie packed on the device; reading gives the values that were written.
 */
static void check_reading_back(bench *b, ipt_dtype act)
{
    static const ipt_adapter_site sites[2] = {{.site = "conv", .n_rank = 8},
                                              {.site = "lin", .n_rank = 4}};
    static const char *const names[] = {"conv.lora_a", "conv.lora_b", "lin.lora_a", "lin.lora_b",
                                        "gates"};
    const ipt_conv c = {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1};
    float want[45 * 40], got[45 * 40];
    ipt_weights *w = NULL;
    ipt_graph *g = NULL;
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, act, 4, &w));
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_graph_adapters(g, sites, 2, 1, 1, 1);
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape4(act, 1, 3, 4, 5));
    x = ipt_conv2d(g, x, "conv", 37, c);
    ipt_output(g, "y",
               ipt_linear(g, ipt_reshape(g, x, ipt_shape3(act, 1, 12, 37)), "lin", 40, false));
    size_t n[IPT_COUNT(names)];
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        ipt_shape s = ipt_shape_of(g, ipt_find(g, names[i]));
        n[i] = ipt_shape_count(&s);
        assert_in_range(n[i], 1, IPT_COUNT(want));
    }
    ipt_plan *p = bench_plan(b, &g, w);
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        for (size_t k = 0; k < n[i]; k++)
            want[k] = (float)((k * 7 + i) % 2003) - 1000.0F; /* exact in f16 */
        assert_ok(b->ctx, ipt_plan_write(p, names[i], want, n[i] * sizeof *want));
        assert_ok(b->ctx, ipt_plan_read(p, names[i], got, n[i] * sizeof *got));
        assert_memory_equal(got, want, n[i] * sizeof *got);
    }
    ipt_plan_destroy(&p);
    ipt_weights_destroy(&w);
}

static void test_reading_back(void **state) { check_reading_back(bench_ready(state), IPT_F32); }

static void test_reading_back_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    check_reading_back(b, IPT_F16);
}

static void test_same_bytes(void **state)
{
    bench *b = bench_ready(state);
    float loss[2], dx[2][COUNT];
    ipt_weights *w = NULL;
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F32, 4, &w));
    for (int i = 0; i < 2; i++)
        assert_ok(b->ctx, run_small(b, w, NULL, &loss[i], dx[i]));
    assert_memory_equal(&loss[0], &loss[1], sizeof loss[0]);
    assert_memory_equal(dx[0], dx[1], sizeof dx[0]);
    ipt_weights_destroy(&w);
}

static void test_cancel(void **state)
{
    bench *b = bench_ready(state);
    ipt_graph *g = random_graph(b, 3, 20, false);
    ipt_plan *p = bench_plan(b, &g, NULL);
    write_input(b, p, "x", 1);
    write_input(b, p, "y", 2);
    ipt_stop stop = {0};
    ipt_ctx_listen(b->ctx, IPT_LISTEN_ALWAYS, &stop);
    ipt_stop_ask(&stop);
    assert_int_equal(ipt_plan_run(p, 0), IPT_ERR_CANCELLED);
    ipt_ctx_listen(b->ctx, IPT_LISTEN_ALWAYS, NULL);
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    ipt_plan_destroy(&p);
}

static void test_limits(void **state)
{
    bench *b = bench_device(state, false);
    float loss, dx[COUNT];
    ipt_weights *w = NULL;
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F32, 4, &w));
    assert_int_equal(run_small(b, w, &(ipt_plan_opts){.arena_limit = 1024}, &loss, dx),
                     IPT_ERR_DEVICE_MEM);
    assert_non_null(strstr(ipt_last_error(b->ctx), "need"));
    assert_int_equal(run_small(b, NULL, NULL, &loss, dx), IPT_ERR_MISSING);
    assert_ok(b->ctx, run_small(b, w, &(ipt_plan_opts){.profile = true, .guard = true}, &loss, dx));
    ipt_weights_destroy(&w);
}

/* What no band can cut is refused by name before memory is taken or anything recorded: one row
 * above a binding, and tensors whose elements 32 bits do not count. */
static void test_too_large(void **state)
{
    bench *b = bench_device(state, false);
    const struct {
        ipt_shape x;
        const char *says;
    } rows[] = {{ipt_shape2(IPT_F32, 3, 0x40000000), "geglu of [3,1073741824]"},
                {ipt_shape4(IPT_F32, 1, 65536, 65536, 2), "x: shape [1,65536,65536,2]"}};
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_graph *g = NULL;
        ipt_plan *p = NULL;
        assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
        ipt_output(g, "y", ipt_geglu(g, ipt_leaf(g, IPT_INPUT, "x", rows[i].x)));
        assert_int_equal(ipt_plan_create(g, &(ipt_plan_opts){.gpu = b->gpu}, &p),
                         IPT_ERR_TOO_LARGE);
        if (!strstr(ipt_last_error(b->ctx), rows[i].says))
            fail_msg("'%s' does not name '%s'", ipt_last_error(b->ctx), rows[i].says);
        ipt_graph_destroy(&g);
    }
}

/* A dry plan is measured as the other, and its memory is given back. */
static void test_dry(void **state)
{
    bench *b = bench_device(state, false);
    uint64_t bytes[2] = {0, 0};
    for (int dry = 0; dry < 2; dry++) {
        ipt_graph *g = NULL;
        ipt_plan *p = NULL;
        assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
        ipt_output(g, "y", ipt_silu(g, ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, 999, 4))));
        assert_ok(b->ctx, ipt_plan_create(g, &(ipt_plan_opts){.gpu = b->gpu, .dry = dry}, &p));
        bytes[dry] = ipt_plan_arena_bytes(p);
        ipt_plan_destroy(&p);
        ipt_graph_destroy(&g);
    }
    assert_true(bytes[0] >= UINT64_C(2) * 999 * 16 && bytes[0] == bytes[1]);
}

/* Every allocation fails once: a clean status each time, and the next try starts afresh. */
static void test_out_of_memory(void **state)
{
    bench *b = bench_ready(state);
    float loss, want, dx[COUNT];
    uint64_t n = 0;
    ipt_weights *w = NULL;
    assert_ok(b->ctx, ipt_weights_random(b->ctx, b->gpu, IPT_F32, 4, &w));
    assert_ok(b->ctx,
              run_small(b, w, NULL, &want, dx)); /* kernels and weights are there from here on */
    ipt_status s = IPT_ERR_NOMEM;
    for (n = 1; s != IPT_OK && n < 5000; n++) {
        ipt_alloc_fail_after(b->ctx, n);
        s = run_small(b, w, NULL, &loss, dx);
        ipt_alloc_fail_after(b->ctx, 0);
        if (s != IPT_OK)
            assert_int_equal(s, IPT_ERR_NOMEM);
    }
    assert_int_equal(s, IPT_OK);
    assert_memory_equal(&loss, &want, sizeof loss);
    print_message("  %s: %d allocations failed one after the other\n", b->name, (int)n - 2);
    ipt_weights_destroy(&w);
}

static void test_out_of_device_memory(void **state)
{
    bench *b = bench_device(state, false);
    float loss, dx[COUNT];
    ipt_status s = IPT_ERR_DEVICE_MEM;
    uint64_t n = 1;
    for (; s != IPT_OK && n < 100; n++) {
        ipt_weights *w = NULL;
        ipt_gpu *gpu = NULL;
        ipt_gpu *keep = b->gpu;
        ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .kernels = b->name, .cache_dir = ""};
        assert_ok(b->ctx,
                  ipt_gpu_create(b->ctx, &o, &gpu)); /* a fresh one: nothing is in its slabs */
        ipt_gpu_alloc_fail_after(gpu, n);
        b->gpu = gpu;
        s = ipt_weights_random(b->ctx, gpu, IPT_F32, 4, &w);
        if (s == IPT_OK)
            s = run_small(b, w, NULL, &loss, dx);
        b->gpu = keep;
        ipt_gpu_alloc_fail_after(gpu, 0);
        if (s != IPT_OK)
            assert_int_equal(s, IPT_ERR_DEVICE_MEM);
        ipt_weights_destroy(&w);
        ipt_gpu_destroy(&gpu);
    }
    assert_int_equal(s, IPT_OK);
    assert_true(n > 2); /* at least one did fail */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_poison),        cmocka_unit_test(test_names),
        cmocka_unit_test(test_overlaps),      cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_random_runs),   cmocka_unit_test(test_segments),
        cmocka_unit_test(test_early),         cmocka_unit_test(test_backward),
        cmocka_unit_test(test_no_gradient),   cmocka_unit_test(test_recompute),
        cmocka_unit_test(test_check),         cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_reading_back),  cmocka_unit_test(test_reading_back_half),
        cmocka_unit_test(test_cancel),        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_too_large),     cmocka_unit_test(test_dry),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_out_of_device_memory),
    };
    return bench_run_all(tests);
}
