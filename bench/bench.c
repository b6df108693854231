/* bench/bench.c - see bench.h; here: what is shared, gemm, conv and single operators. */
#include "bench/bench.h"

#include <stdlib.h>
#include <string.h>

#include "model_io/model_io.h"

/* --- shared
 * ---------------------------------------------------------------------------------------- */
static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *v, size_t n)
{
    qsort(v, n, sizeof *v, by_value);
    return n == 0 ? 0 : n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

ipt_status bench_fill(bench *b, ipt_plan *p, const char *leaf, size_t n, double scale)
{
    float *v = ipt_calloc(b->ctx, n, sizeof *v);
    uint64_t state = 7;
    if (!v)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        v[i] = ipt_rng_normal(&state) * (float)scale;
    ipt_status s = ipt_plan_write(p, leaf, v, n * sizeof *v);
    ipt_free(v);
    return s;
}

static ipt_status device_sum(ipt_plan *p, double *ms, double *macs)
{
    const ipt_plan_row *row = NULL;
    size_t n = 0;
    IPT_TRY(ipt_plan_profile(p, &row, &n));
    *ms = *macs = 0;
    for (size_t i = 0; i < n; i++) {
        *ms += row[i].ms;
        *macs += row[i].macs;
    }
    return IPT_OK;
}

bool bench_more(int32_t repeat, int32_t done, double ms)
{
    return done < repeat || (done < BENCH_MAX_RUNS && ms < BENCH_MIN_MS);
}

ipt_status bench_measure(bench *b, ipt_plan *p, bench_time *t)
{
    int32_t n = 0;
    size_t room = (size_t)(b->o->repeat > BENCH_MAX_RUNS ? b->o->repeat : BENCH_MAX_RUNS);
    double *wall = ipt_calloc(b->ctx, 2 * room, sizeof *wall), *device = wall + room, sum = 0;
    ipt_status status = wall ? IPT_OK : IPT_ERR_NOMEM;
    memset(t, 0, sizeof *t);
    for (bool first = true; status == IPT_OK && (first || bench_more(b->o->repeat, n, sum));) {
        double start = ipt_now_ms(), ms = 0;
        status = ipt_plan_run(p, 0);
        double took = ipt_now_ms() - start;
        if (status == IPT_OK)
            status = device_sum(p, &ms, &t->macs);
        if (status == IPT_OK && ipt_cancelled(b->ctx))
            status = ipt_fail(b->ctx, IPT_ERR_CANCELLED, "interrupted");
        if (first) {
            t->first_ms = took;
        } else {
            wall[n] = took;
            device[n++] = ms;
            sum += took;
        }
        first = false;
    }
    if (status == IPT_OK) {
        t->wall_ms = bench_median(wall, (size_t)n);
        t->device_ms = bench_median(device, (size_t)n);
    }
    ipt_free(wall);
    return status;
}

void bench_row(bench *b, json_t *row)
{
    if (!row)
        return;
    if (b->o->row)
        b->o->row(b->o->user, row);
    json_array_append_new(b->rows, row);
}

static int by_op(const void *a, const void *b)
{
    const ipt_plan_row *const *x = a, *const *y = b;
    return strcmp((*x)->op, (*y)->op);
}

typedef struct op_sum {
    const char *op;
    double ms, macs;
    size_t n;
} op_sum;

static int slowest_first(const void *a, const void *b)
{
    double x = ((const op_sum *)a)->ms, y = ((const op_sum *)b)->ms;
    return (x < y) - (x > y);
}

ipt_status bench_profile_json(ipt_plan *p, json_t **out)
{
    const ipt_plan_row *row = NULL;
    size_t n = 0, n_op = 0;
    IPT_TRY(ipt_plan_profile(p, &row, &n));
    const ipt_plan_row **sorted = ipt_calloc(NULL, n, sizeof *sorted);
    op_sum *sum = ipt_calloc(NULL, n, sizeof *sum);
    if (!sorted || !sum) {
        ipt_free(sorted);
        ipt_free(sum);
        return IPT_ERR_NOMEM;
    }
    for (size_t i = 0; i < n; i++)
        sorted[i] = &row[i];
    qsort(sorted, n, sizeof *sorted, by_op);
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || strcmp(sorted[i]->op, sorted[i - 1]->op) != 0)
            sum[n_op++].op = sorted[i]->op;
        sum[n_op - 1].ms += sorted[i]->ms;
        sum[n_op - 1].macs += sorted[i]->macs;
        sum[n_op - 1].n++;
    }
    qsort(sum, n_op, sizeof *sum, slowest_first);
    *out = json_array();
    for (size_t i = 0; i < n_op; i++)
        json_array_append_new(*out,
                              json_pack("{s:s, s:I, s:f, s:f}", "op", sum[i].op, "n",
                                        (json_int_t)sum[i].n, "ms", sum[i].ms, "gflops",
                                        sum[i].ms > 0 ? 2e-6 * sum[i].macs / sum[i].ms : 0.0));
    ipt_free(sorted);
    ipt_free(sum);
    return IPT_OK;
}

/* --- one operator
 * ------------------------------------------------------------------------------------ */
typedef struct op_case {
    const char *op, *name;
    int32_t a, b, c, d; /* meaning by op, see build_case */
    int32_t heads;
} op_case;

/* Inputs "x" and, for attention, "k" and "v". */
static ipt_val build_case(bench *b, ipt_graph *g, const op_case *k)
{
    ipt_dtype t = b->act;
    if (strcmp(k->op, "gemm") == 0) /* a x c times c x b */
        return ipt_linear(g, ipt_leaf(g, IPT_INPUT, "x", ipt_shape2(t, k->a, k->c)), k->name, k->b,
                          false);
    if (strcmp(k->op, "attention") == 0) { /* a queries, b keys, width c */
        ipt_val q = ipt_leaf(g, IPT_INPUT, "x", ipt_shape3(t, 1, k->a, k->c));
        ipt_val key = ipt_leaf(g, IPT_INPUT, "k", ipt_shape3(t, 1, k->b, k->c));
        ipt_val val = ipt_leaf(g, IPT_INPUT, "v", ipt_shape3(t, 1, k->b, k->c));
        return ipt_attention(g, q, key, val, (ipt_attn){.heads = k->heads}, NULL);
    }
    if (strcmp(k->op, "layer_norm") == 0 || strcmp(k->op, "geglu") == 0) { /* a tokens of width b */
        ipt_val x = ipt_leaf(g, IPT_INPUT, "x", ipt_shape3(t, 1, k->a, k->b));
        return k->op[0] == 'l' ? ipt_layer_norm(g, x, k->name, 1e-5f) : ipt_geglu(g, x);
    }
    ipt_val x = ipt_leaf(g, IPT_INPUT, "x",
                         ipt_shape4(t, 1, k->a, k->b, k->c)); /* a x b pixels, c channels */
    if (strcmp(k->op, "conv") == 0)
        return ipt_conv2d(g, x, k->name, k->d, /* its own weights: shapes differ */
                          (ipt_conv){.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1});
    if (strcmp(k->op, "group_norm") == 0)
        return ipt_group_norm(g, x, k->name, 32, 1e-5f, true);
    if (strcmp(k->op, "silu") == 0)
        return ipt_silu(g, x);
    if (strcmp(k->op, "add") == 0)
        return ipt_add(g, x, x);
    return ipt_upsample(g, x, 2 * k->a, 2 * k->b);
}

static size_t leaf_size(ipt_graph *g, const char *name)
{
    ipt_shape s = ipt_shape_of(g, ipt_find(g, name));
    return ipt_shape_count(&s);
}

static ipt_status run_case(bench *b, const op_case *k, bench_time *t)
{
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    ipt_plan_opts po = {.gpu = b->gpu, .weights = b->weights, .profile = true};
    ipt_status status;
    IPT_TRY(ipt_graph_create(b->ctx, &g));
    ipt_output(g, "y", build_case(b, g, k));
    IPT_TRY_GOTO(ipt_graph_status(g), end);
    IPT_TRY_GOTO(ipt_plan_create(g, &po, &p), end);
    IPT_TRY_GOTO(bench_fill(b, p, "x", leaf_size(g, "x"), 1), end);
    if (strcmp(k->op, "attention") == 0) {
        IPT_TRY_GOTO(bench_fill(b, p, "k", leaf_size(g, "k"), 1), end);
        IPT_TRY_GOTO(bench_fill(b, p, "v", leaf_size(g, "v"), 1), end);
    }
    status = bench_measure(b, p, t);
end:
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    return status;
}

static const op_case gemm_cases[] = {
    {"gemm", "SD 1.5 to_q 64x64", 4096, 320, 320, 0, 0},
    {"gemm", "SD 1.5 ff in 64x64", 4096, 2560, 320, 0, 0},
    {"gemm", "SD 1.5 ff out 64x64", 4096, 320, 1280, 0, 0},
    {"gemm", "SD 1.5 to_q 32x32", 1024, 640, 640, 0, 0},
    {"gemm", "as a 3x3 convolution 32x32", 1024, 640, 5760, 0, 0},
    {"gemm", "SD 1.5 to_q 16x16", 256, 1280, 1280, 0, 0},
    {"gemm", "SDXL to_q 32x32", 1024, 1280, 1280, 0, 0},
    {"gemm", "square 1024", 1024, 1024, 1024, 0, 0},
    {"gemm", "square 2048", 2048, 2048, 2048, 0, 0},
};
static const op_case conv_cases[] = {
    {"conv", "SD 1.5 64x64", 64, 64, 320, 320, 0},
    {"conv", "SD 1.5 64x64 up", 64, 64, 960, 320, 0},
    {"conv", "SD 1.5 32x32", 32, 32, 640, 640, 0},
    {"conv", "SD 1.5 16x16", 16, 16, 1280, 1280, 0},
    {"conv", "SD 1.5 16x16 up", 16, 16, 2560, 1280, 0},
    {"conv", "VAE 128x128", 128, 128, 512, 512, 0},
    {"conv", "VAE 256x256", 256, 256, 256, 256, 0},
};
static const op_case other_cases[] = {
    {"attention", "self 64x64", 4096, 4096, 320, 0, 8},
    {"attention", "self 32x32", 1024, 1024, 640, 0, 8},
    {"attention", "cross 64x64", 4096, 77, 320, 0, 8},
    {"attention", "cross 32x32", 1024, 77, 640, 0, 8},
    {"group_norm", "64x64", 64, 64, 320, 0, 0},
    {"group_norm", "VAE 256x256", 256, 256, 256, 0, 0},
    {"layer_norm", "64x64", 4096, 320, 0, 0, 0},
    {"geglu", "64x64", 4096, 2560, 0, 0, 0},
    {"silu", "64x64", 64, 64, 320, 0, 0},
    {"add", "64x64", 64, 64, 320, 0, 0},
    {"upsample", "32x32", 32, 32, 640, 0, 0},
};

static ipt_status bench_matrix(bench *b, const op_case *k, size_t n, bool conv)
{
    for (size_t i = 0; i < n; i++, k++) {
        bench_time t;
        double blas_ms = 0, m = conv ? (double)k->a * k->b : k->a, N = conv ? k->d : k->b,
               K = conv ? 9.0 * k->c : k->c;
        double flop = 2 * m * N * K;
        IPT_TRY(run_case(b, k, &t));
        if (b->blas)
            IPT_TRY(bench_blas_sgemm(b->ctx, b->blas, (int32_t)m, (int32_t)N, (int32_t)K,
                                     b->o->repeat, &blas_ms));
        double ours = flop / t.wall_ms * 1e-6, theirs = blas_ms > 0 ? flop / blas_ms * 1e-6 : 0;
        json_t *row =
            json_pack("{s:s, s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:f}", "op", k->op, "name", k->name,
                      "m", (int)m, "n", (int)N, "k", (int)K, "first_ms", t.first_ms, "ms",
                      t.wall_ms, "device_ms", t.device_ms, "gflops", ours);
        json_object_set_new(row, "sgemm_gflops", b->blas ? json_real(theirs) : json_null());
        json_object_set_new(row, "of_sgemm", b->blas ? json_real(ours / theirs) : json_null());
        bench_row(b, row);
    }
    return IPT_OK;
}

static ipt_status bench_ops(bench *b)
{
    for (size_t i = 0; i < IPT_COUNT(other_cases); i++) {
        const op_case *k = &other_cases[i];
        bench_time t;
        char shape[64];
        IPT_TRY(run_case(b, k, &t));
        ipt_name(shape, sizeof shape, k->c ? "%d x %d x %d" : "%d x %d", k->a, k->b, k->c);
        bench_row(b, json_pack("{s:s, s:s, s:s, s:f, s:f, s:f, s:f}", "op", k->op, "name", k->name,
                               "shape", shape, "first_ms", t.first_ms, "ms", t.wall_ms, "device_ms",
                               t.device_ms, "gflops", 2e-6 * t.macs / t.wall_ms));
    }
    return IPT_OK;
}

/* --- entry ------------------------------------------------------------------------------------ */
static ipt_status run_kind(bench *b)
{
    const char *what = b->o->what;
    if (strcmp(what, "gemm") == 0)
        return bench_matrix(b, gemm_cases, IPT_COUNT(gemm_cases), false);
    if (strcmp(what, "conv") == 0)
        return bench_matrix(b, conv_cases, IPT_COUNT(conv_cases), true);
    if (strcmp(what, "ops") == 0)
        return bench_ops(b);
    if (strcmp(what, "unet") == 0)
        return bench_unet(b);
    if (strcmp(what, "vae") == 0)
        return bench_vae(b);
    return ipt_fail(b->ctx, IPT_ERR_ARG,
                    "bench %s is unknown; one of: gemm conv ops unet vae generate", what);
}

static ipt_status run_on_device(bench *b)
{
    const ipt_bench_opts *o = b->o;
    ipt_gpu_opts go = {.device = o->device, .kernels = o->kernels};
    IPT_TRY(ipt_gpu_create(b->ctx, &go, &b->gpu));
    const ipt_traits *t = ipt_gpu_traits(b->gpu);
    b->act = !o->f32 && t->f16_storage && !t->simd ? IPT_F16 : IPT_F32;
    IPT_TRY(ipt_weights_random(b->ctx, b->gpu, o->f32 ? IPT_F32 : IPT_F16, 1, &b->weights));
    b->blas = strcmp(o->what, "gemm") == 0 || strcmp(o->what, "conv") == 0 ? bench_blas_open(b->ctx)
                                                                           : NULL;
    const ipt_gpu_info *info = ipt_gpu_get_info(b->gpu);
    json_object_set_new(b->result, "device", json_string(info->name));
    json_object_set_new(b->result, "driver", json_string(info->driver));
    json_object_set_new(b->result, "kernels", json_string(t->simd ? "simd" : "tile"));
    json_object_set_new(b->result, "weights", json_string(o->f32 ? "f32" : "f16"));
    json_object_set_new(b->result, "activations", json_string(b->act == IPT_F16 ? "f16" : "f32"));
    json_object_set_new(b->result, "repeat", json_integer(o->repeat));
    if (b->blas)
        json_object_set_new(b->result, "sgemm_threads", json_integer(bench_blas_threads(b->blas)));
    return run_kind(b);
}

ipt_status ipt_bench_run(ipt_ctx *ctx, const ipt_bench_opts *o, json_t **out)
{
    bench b = {.ctx = ctx, .o = o, .result = json_object(), .rows = json_array()};
    ipt_status status = IPT_OK;
    json_object_set_new(b.result, "bench", json_string(o->what));
    json_object_set_new(b.result, "version", json_string(IPT_VERSION));
    json_object_set(b.result, "rows", b.rows);
    status =
        strcmp(o->what, "generate") == 0 ? bench_generate(ctx, o, b.result) : run_on_device(&b);
    if (b.gpu) {
        json_object_set_new(b.result, "peak_device_mib",
                            json_real((double)ipt_gpu_peak_bytes(b.gpu) / 1048576.0));
        json_object_set_new(b.result, "peak_host_mib",
                            json_real((double)ipt_peak_host_bytes() / 1048576.0));
    }
    bench_blas_close(&b.blas);
    ipt_weights_destroy(&b.weights);
    ipt_gpu_destroy(&b.gpu);
    json_decref(b.rows);
    if (status == IPT_OK)
        *out = b.result;
    else
        json_decref(b.result);
    return status;
}
