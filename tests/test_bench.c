/* tests/test_bench.c - impasto bench without its times: what it measures of a device, which
 * operators it has rows for, its JSON, and how two runs are compared. */
#include "tests/support.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "bench/compare.h"
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

/* --- comparison ------------------------------------------------------------------------------- */
/* A file of a folder that lasts as long as the test. */
static void write_file(ipt_ctx *ctx, char path[256], const char *text)
{
    const char *tmp = getenv("TMPDIR");
    ipt_name(path, 256, "%s/impasto-bench-XXXXXX", tmp ? tmp : "/tmp");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    assert_ok(ctx, ipt_file_write(ctx, path, text, strlen(text)));
}

static json_t *load(ipt_ctx *ctx, const char *text)
{
    char path[256];
    json_t *o = NULL;
    write_file(ctx, path, text);
    assert_ok(ctx, ipt_bench_load(ctx, path, "ops", &o));
    unlink(path);
    return o;
}

static const json_t *at(const json_t *o, const char *list, size_t i)
{
    return json_array_get(json_object_get(o, list), i);
}

static void test_compare(void **state)
{
    ipt_ctx *ctx = test_ctx();
    (void)state;
    json_t *earlier =
        load(ctx, "{\"bench\": \"ops\", \"device\": \"A\", \"width\": 512, \"rows\": ["
                  "{\"op\": \"add\", \"name\": \"x\", \"ms\": 4},"
                  "{\"op\": \"mul\", \"name\": \"x\", \"ms\": 2},"
                  "{\"op\": \"old\", \"name\": \"x\", \"ms\": 1},"
                  "{\"op\": \"view\", \"name\": \"x\", \"note\": \"none\"}]}");
    json_t *now = load(ctx, "{\"bench\": \"ops\", \"device\": \"B\", \"width\": 512, \"rows\": ["
                            "{\"op\": \"mul\", \"name\": \"x\", \"ms\": 3},"
                            "{\"op\": \"add\", \"name\": \"x\", \"ms\": 1},"
                            "{\"op\": \"add\", \"name\": \"x\", \"batch\": 2, \"ms\": 1}]}");
    json_t *o = ipt_bench_compare(now, earlier);
    assert_int_equal(json_array_size(json_object_get(o, "rows")), 2);
    assert_string_equal(ipt_json_str(at(o, "rows", 0), "name", ""), "mul x");
    assert_true(fabs(ipt_json_num(at(o, "rows", 0), "ratio", 0) - 1.5) < 1e-12);
    assert_string_equal(ipt_json_str(at(o, "rows", 1), "name", ""), "add x");
    assert_true(fabs(ipt_json_num(at(o, "rows", 1), "ratio", 0) - 0.25) < 1e-12);
    assert_int_equal(json_array_size(json_object_get(o, "only_now")), 1);
    assert_string_equal(json_string_value(at(o, "only_now", 0)), "add x, batch 2");
    assert_int_equal(json_array_size(json_object_get(o, "only_earlier")), 1);
    assert_string_equal(json_string_value(at(o, "only_earlier", 0)), "old x");
    assert_int_equal(json_array_size(json_object_get(o, "differs")), 1);
    assert_string_equal(ipt_json_str(at(o, "differs", 0), "what", ""), "device");
    assert_string_equal(ipt_json_str(at(o, "differs", 0), "now", ""), "B");
    assert_string_equal(ipt_json_str(at(o, "differs", 0), "earlier", ""), "A");
    json_decref(o);
    json_decref(now);
    json_decref(earlier);
    ipt_ctx_destroy(&ctx);
}

static void test_wrong_files(void **state)
{
    static const struct {
        const char *text, *says;
    } wrong[] = {
        {"", "not valid JSON"},
        {"{\"bench\": \"ops\"", "not valid JSON"},
        {"[1, 2]", "not a result of impasto bench"},
        {"{\"error\": {}}", "not a result of impasto bench"},
        {"{\"bench\": \"conv\", \"rows\": []}", "of bench conv, not of bench ops"},
        {"{\"bench\": \"ops\"}", "no rows"},
        {"{\"bench\": \"ops\", \"rows\": {}}", "no rows"},
        {"{\"bench\": \"ops\", \"rows\": []}", "no rows"},
        {"{\"bench\": \"ops\", \"rows\": [7]}", "row 1 has no name"},
        {"{\"bench\": \"ops\", \"rows\": [{\"name\": 1, \"ms\": 1}]}", "row 1 has no name"},
        {"{\"bench\": \"ops\", \"rows\": [{\"name\": \"a\", \"ms\": 1}, {\"name\": \"a\"}]}",
         "row 2 has no time"},
        {"{\"bench\": \"ops\", \"rows\": [{\"name\": \"a\", \"ms\": -1}]}", "row 1 has no time"},
        {"{\"bench\": \"ops\", \"rows\": [{\"name\": \"a\", \"note\": \"b\"}]}", "no rows"},
    };
    ipt_ctx *ctx = test_ctx();
    (void)state;
    for (size_t i = 0; i < IPT_COUNT(wrong); i++) {
        char path[256];
        json_t *o = NULL;
        write_file(ctx, path, wrong[i].text);
        assert_int_equal(ipt_bench_load(ctx, path, "ops", &o), IPT_ERR_FORMAT);
        if (o || !strstr(ipt_last_error(ctx), path) || !strstr(ipt_last_error(ctx), wrong[i].says))
            fail_msg("'%s': %s", wrong[i].text, ipt_last_error(ctx));
        unlink(path);
    }
    ipt_ctx_destroy(&ctx);
}

/* The smallest bench there is, to JSON and back: the same rows, each 1 times itself. */
static void test_json(void **state)
{
    const ipt_bench_opts opts = {.what = "vae",
                                 .device = getenv("IPT_TEST_DEVICE"),
                                 .config = "sd15",
                                 .weights = IPT_F16,
                                 .width = 64,
                                 .height = 64,
                                 .batch = 1,
                                 .repeat = 1};
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx); /* skips without a device */
    char path[256];
    json_t *now = NULL, *earlier = NULL;
    (void)state;
    assert_ok(ctx, ipt_bench_run(ctx, &opts, &now));
    const json_t *peak = json_object_get(now, "peak"), *row = at(now, "rows", 0);
    assert_true(is_rate(ipt_json_num(peak, "gflops", 0)));
    assert_true(is_rate(ipt_json_num(peak, "gbytes", 0)));
    assert_true(is_rate(ipt_json_num(row, "gmac", 0)));
    assert_true(is_rate(ipt_json_num(row, "of_peak", 0)));
    assert_true(is_rate(ipt_json_num(row, "of_bandwidth", 0)));
    char *text = json_dumps(now, JSON_INDENT(2));
    assert_non_null(text);
    write_file(ctx, path, text);
    assert_ok(ctx, ipt_bench_load(ctx, path, "vae", &earlier));
    json_t *o = ipt_bench_compare(now, earlier);
    assert_int_equal(json_array_size(json_object_get(o, "rows")), 1);
    assert_true(fabs(ipt_json_num(at(o, "rows", 0), "ratio", 0) - 1) < 1e-9);
    assert_int_equal(json_array_size(json_object_get(o, "only_now")), 0);
    assert_int_equal(json_array_size(json_object_get(o, "only_earlier")), 0);
    assert_int_equal(json_array_size(json_object_get(o, "differs")), 0);
    unlink(path);
    free(text);
    json_decref(o);
    json_decref(earlier);
    json_decref(now);
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
        cmocka_unit_test(test_compare),
        cmocka_unit_test(test_wrong_files),
        cmocka_unit_test(test_json),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
