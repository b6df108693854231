/* bench/peak.h - what a device does at most, measured and not looked up: every share that a row
 * prints is of these.
 *
 * Must not know: operators, graphs. */
#ifndef IPT_BENCH_PEAK_H
#define IPT_BENCH_PEAK_H
#include "vk/vk.h"

typedef struct bench_peak {
    double macs;   /* multiply-adds in f32 a second */
    double matrix; /* the same of matrix units, f16 x f16 -> f32; 0: none that kernels use */
    double bytes;  /* of memory a second, what is read and what is written together */
} bench_peak;
typedef struct bench_peak_opts {
    double least_ms; /* of a measured run: work is doubled until it takes so long */
    uint64_t bytes;  /* read and written by a run; should be far above what the caches hold */
} bench_peak_opts;
/* About a second with what bench_peak_usual gives, and the bytes in device memory meanwhile.
 * Errors: IPT_ERR_DEVICE_MEM, IPT_ERR_DEVICE_LOST, IPT_ERR_UNSUPPORTED: no time stamps. */
IPT_CHECKED ipt_status bench_peak_measure(ipt_gpu *gpu, const bench_peak_opts *o, bench_peak *out);
/* 20 ms; 256 MiB on CPU devices, 1 GiB on others, at most a quarter of what memory is free. */
bench_peak_opts bench_peak_usual(const ipt_gpu *gpu);
#endif
