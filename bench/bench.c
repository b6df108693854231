/* bench/bench.c - see bench.h; here: what is shared, and the entry. */
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

static void add_work(bench_work *w, const ipt_plan_row *row)
{
    w->macs += row->macs;
    w->matrix_macs += row->matrix_macs;
    w->bytes += row->bytes;
}

/* Time on the device and work of the last run. */
static ipt_status device_sum(ipt_plan *p, double *ms, bench_work *w)
{
    const ipt_plan_row *row = NULL;
    size_t n = 0;
    IPT_TRY(ipt_plan_profile(p, &row, &n));
    *ms = 0;
    *w = (bench_work){0};
    for (size_t i = 0; i < n; i++) {
        *ms += row[i].ms;
        add_work(w, &row[i]);
    }
    return IPT_OK;
}

void bench_add_shares(const bench *b, json_t *row, double ms, const bench_work *w)
{
    const double s = ms * 1e-3, plain = w->macs - w->matrix_macs;
    double least = plain / b->peak.macs; /* seconds, on units that are always busy */
    if (b->peak.matrix > 0)
        least += w->matrix_macs / b->peak.matrix;
    json_object_set_new(row, "gmac", json_real(w->macs * 1e-9));
    json_object_set_new(row, "gflops", json_real(s > 0 ? 2e-9 * w->macs / s : 0));
    if (s > 0 && w->bytes > 0) {
        json_object_set_new(row, "of_peak", json_real(least / s));
        json_object_set_new(row, "of_bandwidth", json_real(w->bytes / b->peak.bytes / s));
    }
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
            status = device_sum(p, &ms, &t->work);
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
    double ms;
    bench_work work;
    size_t n;
} op_sum;

static int slowest_first(const void *a, const void *b)
{
    double x = ((const op_sum *)a)->ms, y = ((const op_sum *)b)->ms;
    return (x < y) - (x > y);
}

ipt_status bench_profile_json(const bench *b, ipt_plan *p, json_t **out)
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
        add_work(&sum[n_op - 1].work, sorted[i]);
        sum[n_op - 1].n++;
    }
    qsort(sum, n_op, sizeof *sum, slowest_first);
    *out = json_array();
    for (size_t i = 0; i < n_op; i++) {
        json_t *o = json_pack("{s:s, s:I, s:f}", "op", sum[i].op, "n", (json_int_t)sum[i].n, "ms",
                              sum[i].ms);
        bench_add_shares(b, o, sum[i].ms, &sum[i].work);
        json_array_append_new(*out, o);
    }
    ipt_free(sorted);
    ipt_free(sum);
    return IPT_OK;
}

/* --- entry ------------------------------------------------------------------------------------ */
static ipt_status run_kind(bench *b)
{
    const char *what = b->o->what;
    if (strcmp(what, "gemm") == 0)
        return bench_gemm(b);
    if (strcmp(what, "conv") == 0)
        return bench_conv(b);
    if (strcmp(what, "ops") == 0)
        return bench_ops(b);
    if (strcmp(what, "unet") == 0)
        return bench_unet(b);
    if (strcmp(what, "vae") == 0)
        return bench_vae(b);
    return ipt_fail(b->ctx, IPT_ERR_ARG,
                    "bench %s is unknown; one of: gemm conv ops unet vae generate", what);
}

/* On a device of its own: its memory is not the bench's. */
static ipt_status measure_peak(bench *b, const ipt_gpu_opts *go)
{
    ipt_gpu *gpu = NULL;
    IPT_TRY(ipt_gpu_create(b->ctx, go, &gpu));
    const bench_peak_opts usual = bench_peak_usual(gpu);
    const ipt_status status = bench_peak_measure(gpu, &usual, &b->peak);
    ipt_gpu_destroy(&gpu);
    IPT_TRY(status);
    json_t *o = json_pack("{s:f, s:o, s:f}", "gflops", 2e-9 * b->peak.macs, "matrix_gflops",
                          b->peak.matrix > 0 ? json_real(2e-9 * b->peak.matrix) : json_null(),
                          "gbytes", 1e-9 * b->peak.bytes);
    json_object_set_new(b->result, "peak", o);
    return IPT_OK;
}

static ipt_status run_on_device(bench *b)
{
    const ipt_bench_opts *o = b->o;
    static const char *const names[] = {[IPT_F32] = "f32", [IPT_F16] = "f16", [IPT_Q8] = "q8"};
    ipt_gpu_opts go = {.device = o->device, .kernels = o->kernels};
    IPT_TRY(measure_peak(b, &go));
    IPT_TRY(ipt_gpu_create(b->ctx, &go, &b->gpu));
    const ipt_traits *t = ipt_gpu_traits(b->gpu);
    b->act = o->weights != IPT_F32 && t->f16_storage && !t->simd ? IPT_F16 : IPT_F32;
    IPT_TRY(ipt_weights_random(b->ctx, b->gpu, o->weights, 1, &b->weights));
    b->blas = strcmp(o->what, "gemm") == 0 || strcmp(o->what, "conv") == 0 ? bench_blas_open(b->ctx)
                                                                           : NULL;
    const ipt_gpu_info *info = ipt_gpu_get_info(b->gpu);
    json_object_set_new(b->result, "device", json_string(info->name));
    json_object_set_new(b->result, "driver", json_string(info->driver));
    json_object_set_new(b->result, "kernels", json_string(t->simd ? "simd" : "tile"));
    json_object_set_new(b->result, "weights", json_string(names[o->weights]));
    json_object_set_new(b->result, "activations", json_string(b->act == IPT_F16 ? "f16" : "f32"));
    json_object_set_new(b->result, "repeat", json_integer(o->repeat));
    if (b->blas)
        json_object_set_new(b->result, "sgemm_threads", json_integer(bench_blas_threads(b->blas)));
    if (o->begin)
        o->begin(o->user, b->result);
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
