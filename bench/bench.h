/* bench/bench.h - measurements with random weights: kernels, single operators, whole parts of
 * models. Everything is timed warm, as the median of repeated runs, unless a figure's name says
 * otherwise.
 *
 * Must not know: files of weights (bench generate takes the engine's word), the command line. */
#ifndef IPT_BENCH_BENCH_H
#define IPT_BENCH_BENCH_H
#include "core/core.h"

#include <jansson.h>

#include "bench/peak.h"
#include "graph/op.h"
#include "vk/vk.h"

typedef struct ipt_bench_opts {
    const char *what;              /* "gemm", "conv", "ops", "unet", "vae", "generate" */
    const char *device;            /* as ipt_gpu_opts */
    const char *kernels;           /* "simd", "tile" or NULL */
    const char *config;            /* "sd15", "sd21", "sdxl" */
    const char *model;             /* of generate; NULL: default model */
    int32_t width, height;         /* pixels; 0: 512 (generate: the model's size) */
    int32_t batch, repeat;         /* rows, measured runs */
    int32_t lora_rank, lora_count; /* 0: none */
    const char *lora_kind;         /* "lora", "lokr", "krona": with about the values of that rank */
    ipt_dtype weights;             /* IPT_F32: activations too; IPT_F16; IPT_Q8 */
    bool composite;  /* with LoRAs: one batch of lora_count rows against as many single rows */
    bool profile;    /* table of operators */
    int32_t regions; /* unet with LoRAs: also with so many texts seen by place, the LoRAs bound */
    int32_t maps;    /* unet: k > 0: also attention maps of level k - 1 and their gradient */
    int32_t steps;   /* of generate */
    /* The device and its peaks before any row; may be NULL; not called by generate. */
    void (*begin)(void *user, const json_t *result);
    void (*row)(void *user, const json_t *row); /* each row as it is measured; may be NULL */
    void *user;
} ipt_bench_opts;
/* One object: bench, version, device, driver, peak, rows[], ...  Ownership: caller, json_decref.
 * Errors: IPT_ERR_ARG (unknown `what` or config), those of devices and plans, IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_bench_run(ipt_ctx *ctx, const ipt_bench_opts *o, json_t **out);

/* --- between the files of bench/ ---------------------------------------------------------------
 */
typedef struct bench {
    ipt_ctx *ctx;
    const ipt_bench_opts *o;
    ipt_gpu *gpu;
    ipt_weights *weights;
    ipt_dtype act; /* of activations */
    bench_peak peak;
    json_t *result, *rows;
    struct bench_blas *blas; /* NULL: OpenBLAS is not installed */
} bench;

/* Sums over operators of what ipt_plan_row says. */
typedef struct bench_work {
    double macs, matrix_macs, bytes;
} bench_work;
typedef struct bench_time {
    double first_ms;           /* the first run: pipelines are compiled */
    double wall_ms, device_ms; /* medians; device: sum over operators */
    bench_work work;
} bench_time;
/* A median of five runs of 8 ms is at the mercy of whatever wakes up beside it: short runs go on
 * until they have taken this long together, or BENCH_MAX_RUNS are done. */
enum { BENCH_MIN_MS = 300, BENCH_MAX_RUNS = 64 };
/* Whether another run is due after `done` of them, which took `ms` together. */
bool bench_more(int32_t repeat, int32_t done, double ms);
/* Runs a plan made with profile once, then `repeat` times and until bench_more has enough. */
IPT_CHECKED ipt_status bench_measure(bench *b, ipt_plan *p, bench_time *t);
double bench_median(double *v, size_t n); /* sorts v */
/* Fills the named leaf with nearly normal values. */
IPT_CHECKED ipt_status bench_fill(bench *b, ipt_plan *p, const char *leaf, size_t n, double scale);
/* Appends a row and shows it; takes row. */
void bench_row(bench *b, json_t *row);
/* Adds to a row what was done in ms: gmac, gflops and, where the bytes are known, of_peak and
 * of_bandwidth: the time in which the device could have computed, or moved, all of it, over ms.
 * Products that run on matrix units are measured by their peak.  A convolution by Winograd's method
 * counts as the direct sum and may pass 1. */
void bench_add_shares(const bench *b, json_t *row, double ms, const bench_work *w);
/* Rows {op, n, ms, gflops, ...} of the last run, slowest first. */
IPT_CHECKED ipt_status bench_profile_json(const bench *b, ipt_plan *p, json_t **out);

/* --- bench_ops.c: single operators ------------------------------------------------------------ */
IPT_CHECKED ipt_status bench_gemm(bench *b);
IPT_CHECKED ipt_status bench_conv(bench *b);
/* Rows of every operator of the table; one without a case says so. */
IPT_CHECKED ipt_status bench_ops(bench *b);
/* The i-th case of bench_ops as a graph with the output "y", or false after the last; its name. */
bool bench_ops_build(size_t i, ipt_dtype act, ipt_graph *g, ipt_op *op, const char **name);

IPT_CHECKED ipt_status bench_unet(bench *b);
IPT_CHECKED ipt_status bench_vae(bench *b);
IPT_CHECKED ipt_status bench_generate(ipt_ctx *ctx, const ipt_bench_opts *o, json_t *result);

/* OpenBLAS found at run time (libopenblas.so.0), so that the program does not depend on it. */
struct bench_blas *bench_blas_open(ipt_ctx *ctx);
void bench_blas_close(struct bench_blas **blas);
/* Median ms of C[m,n] = A[m,k] B[k,n] in f32 on all cores.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status bench_blas_sgemm(ipt_ctx *ctx, struct bench_blas *blas, int32_t m, int32_t n,
                                        int32_t k, int32_t repeat, double *ms);
int bench_blas_threads(const struct bench_blas *blas);
#endif
