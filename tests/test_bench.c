/* tests/test_bench.c - impasto bench without its times: what it measures of a device, which
 * operators it has rows for. */
#include "tests/support.h"

#include <math.h>

#include "bench/bench.h"
#include "model_io/model_io.h"

static bool is_rate(double v) { return isfinite(v) && v > 0; }

static void test_peak(void **state)
{
    const bench_peak_opts o = {.least_ms = 0, .bytes = 1 << 20};
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    bench_peak p = {0, 0, 0};
    (void)state;
    assert_ok(ctx, bench_peak_measure(gpu, &o, &p));
    const bool has_matrix = ipt_gpu_traits(gpu)->coop_m > 0;
    assert_true(is_rate(p.macs) && is_rate(p.bytes));
    assert_true(has_matrix ? is_rate(p.matrix) : !(p.matrix > 0));
    test_gpu_done(&gpu, &ctx);
}

static void test_usual_peak(void **state)
{
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    (void)state;
    const bench_peak_opts o = bench_peak_usual(gpu);
    assert_true(o.least_ms > 0 && o.bytes >= 1 << 20);
    assert_true(o.bytes <= ipt_gpu_get_info(gpu)->heap_bytes / 4);
    test_gpu_done(&gpu, &ctx);
}

/* A new operator without a size for it would be a row without a time. */
static void test_every_operator_has_a_row(void **state)
{
    bool has[IPT_OP_COUNT] = {false};
    ipt_ctx *ctx = test_ctx();
    (void)state;
    for (size_t i = 0;; i++) {
        ipt_graph *g = NULL;
        ipt_op op = IPT_OP_COUNT;
        const char *name = NULL;
        assert_ok(ctx, ipt_graph_create(ctx, &g));
        const bool is_case = bench_ops_build(i, IPT_F32, g, &op, &name);
        assert_ok(ctx, ipt_graph_status(g));
        ipt_graph_destroy(&g);
        if (!is_case)
            break;
        has[op] = true;
    }
    for (int op = 0; op < IPT_OP_COUNT; op++)
        if (!has[op])
            fail_msg("%s: bench/bench_ops.c has no size for it", ipt_op_table[op]->name);
    ipt_ctx_destroy(&ctx);
}

/* Every row fits the device, in both types of activations; nothing is run. */
static void test_every_row_can_run(void **state)
{
    static const ipt_dtype act[] = {IPT_F32, IPT_F16};
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    const bool has_f16 = ipt_gpu_traits(gpu)->f16_storage;
    ipt_weights *w = NULL;
    (void)state;
    assert_ok(ctx, ipt_weights_random(ctx, gpu, IPT_F16, 1, &w));
    for (int k = 0; k < (has_f16 ? 2 : 1); k++)
        for (size_t i = 0;; i++) {
            ipt_graph *g = NULL;
            ipt_plan *p = NULL;
            ipt_op op = IPT_OP_COUNT;
            const char *name = NULL;
            const ipt_plan_opts o = {.gpu = gpu, .weights = w, .dry = true};
            assert_ok(ctx, ipt_graph_create(ctx, &g));
            const bool is_case = bench_ops_build(i, act[k], g, &op, &name);
            if (is_case && ipt_plan_create(g, &o, &p) != IPT_OK)
                fail_msg("%s, %s: %s", ipt_op_table[op]->name, name, ipt_last_error(ctx));
            ipt_plan_destroy(&p);
            ipt_graph_destroy(&g);
            if (!is_case)
                break;
        }
    ipt_weights_destroy(&w);
    test_gpu_done(&gpu, &ctx);
}

/* What is read once, what is only picked from, what is not moved at all. */
static void test_bytes(void **state)
{
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    const ipt_plan_opts o = {.gpu = gpu, .profile = true};
    static const struct {
        const char *op;
        double bytes;
    } want[] = {{"slice", 2 * 4 * 2 * 4}, {"add", 2 * 4 * 2 * 4}, {"reshape", 0}};
    const ipt_plan_row *row = NULL;
    float x[4 * 8] = {0};
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    size_t n = 0;
    (void)state;
    assert_ok(ctx, ipt_graph_create(ctx, &g));
    ipt_val y = ipt_slice(g, ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(IPT_F32, 4, 8)), 3, 2);
    ipt_output(g, "y", ipt_reshape(g, ipt_add(g, y, y), ipt_shape1(IPT_F32, 8)));
    assert_ok(ctx, ipt_plan_create(g, &o, &p));
    assert_ok(ctx, ipt_plan_write(p, "x", x, sizeof x));
    assert_ok(ctx, ipt_plan_run(p, 0));
    assert_ok(ctx, ipt_plan_profile(p, &row, &n));
    assert_int_equal(n, IPT_COUNT(want));
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(row[i].op, want[i].op);
        assert_true(fabs(row[i].bytes - want[i].bytes) < 0.5);
    }
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    test_gpu_done(&gpu, &ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_peak),
        cmocka_unit_test(test_usual_peak),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_every_operator_has_a_row),
        cmocka_unit_test(test_every_row_can_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
