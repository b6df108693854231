/* bench/blas.c - the yardstick of gemm and conv: sgemm of OpenBLAS, loaded when it is there. */
#include "bench/bench.h"

#include <dlfcn.h>
#include <string.h>

typedef void sgemm_fn(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                      int lda, const float *b, int ldb, float beta, float *c, int ldc);
typedef int threads_fn(void);

struct bench_blas {
    void *library;
    sgemm_fn *sgemm;
    threads_fn *threads;
};

struct bench_blas *bench_blas_open(ipt_ctx *ctx)
{
    void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return NULL;
    struct bench_blas *b = ipt_calloc(ctx, 1, sizeof *b);
    void *sgemm = dlsym(library, "cblas_sgemm"),
         *threads = dlsym(library, "openblas_get_num_threads");
    if (!b || !sgemm || !threads) {
        ipt_free(b);
        dlclose(library);
        return NULL;
    }
    b->library = library;
    memcpy(&b->sgemm, &sgemm, sizeof sgemm); /* POSIX: dlsym's pointer is the function's */
    memcpy(&b->threads, &threads, sizeof threads);
    return b;
}

void bench_blas_close(struct bench_blas **blas)
{
    if (!blas || !*blas)
        return;
    dlclose((*blas)->library);
    ipt_free(*blas);
    *blas = NULL;
}

int bench_blas_threads(const struct bench_blas *blas) { return blas->threads(); }

ipt_status bench_blas_sgemm(ipt_ctx *ctx, struct bench_blas *blas, int32_t m, int32_t n, int32_t k,
                            int32_t repeat, double *ms)
{
    enum { ROW_MAJOR = 101, NO_TRANS = 111 };
    size_t na = (size_t)m * (size_t)k, nb = (size_t)k * (size_t)n, nc = (size_t)m * (size_t)n;
    float *a = ipt_calloc(ctx, na + nb + nc, sizeof *a), *b = a + na, *c = b + nb;
    size_t room = (size_t)(repeat > BENCH_MAX_RUNS ? repeat : BENCH_MAX_RUNS);
    double *t = ipt_calloc(ctx, room, sizeof *t), sum = 0;
    int32_t done = 0;
    uint64_t state = 1;
    if (!a || !t) {
        ipt_free(a);
        ipt_free(t);
        return IPT_ERR_NOMEM;
    }
    for (size_t i = 0; i < na + nb; i++)
        a[i] = ipt_rng_uniform(&state) - 0.5f;
    blas->sgemm(ROW_MAJOR, NO_TRANS, NO_TRANS, m, n, k, 1, a, k, b, n, 0, c, n); /* warms up */
    while (bench_more(repeat, done, sum)) {
        double start = ipt_now_ms();
        blas->sgemm(ROW_MAJOR, NO_TRANS, NO_TRANS, m, n, k, 1, a, k, b, n, 0, c, n);
        t[done] = ipt_now_ms() - start;
        sum += t[done++];
    }
    *ms = bench_median(t, (size_t)done);
    ipt_free(a);
    ipt_free(t);
    return IPT_OK;
}
