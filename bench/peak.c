/* bench/peak.c - see peak.h.  Each figure is the best of several runs: whatever runs beside only
 * makes them slower. */
#include "bench/peak.h"

/* Of shaders/peak_fma.comp and peak_coop.comp: multiply-adds of a lane, products of a subgroup in
 * one turn. */
enum { FMA_TURN = 4 * 4 * 4, COOP_TURN = 4 * 4 };
/* Turns are few enough for llvmpipe, which ends a loop after 65535, and short enough that a group
 * is no large part of the least time. */
enum { TURNS = 256, RUNS = 5, FIRST_GROUPS = 256, GPU_GROUP = 256 };
enum { CPU_PIECE = 8192, GPU_PIECE = 32768 }; /* bytes that a workgroup copies */
enum { MIB = 1 << 20 };

/* Some commands that are timed together. */
typedef struct job {
    ipt_gpu *gpu;
    ipt_kernel *kernel; /* NULL: the device's own copy of b[0] to b[1] */
    ipt_binding b[2];
    float push[3];
    uint32_t groups, max_groups; /* grow to the second, then there are more repeats */
    uint32_t repeats;
} job;

static ipt_status record(const job *j, ipt_cmd *c)
{
    const uint32_t groups[3] = {j->groups, 1, 1};
    ipt_cmd_barrier(c); /* after what earlier submissions did */
    IPT_TRY(ipt_cmd_stamp(c, 0));
    for (uint32_t i = 0; i < j->repeats; i++) {
        if (j->kernel)
            IPT_TRY(ipt_cmd_dispatch(c, j->kernel, j->b, j->push, groups));
        else
            ipt_cmd_copy(c, &j->b[0], &j->b[1]);
        ipt_cmd_barrier(c);
    }
    IPT_TRY(ipt_cmd_stamp(c, 1));
    return ipt_cmd_end(c);
}

/* The least time of n runs, after one that compiles and touches memory. */
static ipt_status best_of(const job *j, int n, double *ms)
{
    ipt_cmd *c = NULL;
    IPT_TRY(ipt_cmd_create(j->gpu, &c));
    ipt_status status = record(j, c);
    *ms = 0;
    for (int i = 0; status == IPT_OK && i <= n; i++) {
        double stamp[2] = {0, 0};
        uint64_t value = 0;
        IPT_TRY_GOTO(ipt_cmd_submit(c, &value), end);
        IPT_TRY_GOTO(ipt_gpu_wait(j->gpu, value), end);
        IPT_TRY_GOTO(ipt_cmd_stamps(c, stamp, 2), end);
        if (i == 1 || (i > 1 && stamp[1] < *ms))
            *ms = stamp[1];
    }
end:
    ipt_cmd_destroy(j->gpu, &c);
    return status;
}

/* How often a second the device does what one group does once. */
static ipt_status groups_a_second(job *j, double least_ms, double *out)
{
    double ms = 0;
    IPT_TRY(best_of(j, 1, &ms));
    while (ms < least_ms) {
        uint32_t *grows = j->groups <= j->max_groups / 2 ? &j->groups : &j->repeats;
        *grows *= 2;
        IPT_TRY(best_of(j, 1, &ms));
    }
    IPT_TRY(best_of(j, RUNS, &ms));
    *out = 1e3 * (double)j->groups * j->repeats / ms;
    return IPT_OK;
}

/* Invocations of a workgroup: CPU devices have nothing to gain from more than a vector. */
static uint32_t group_size(const ipt_traits *t)
{
    if (t->simd && t->subgroup)
        return t->subgroup;
    return t->max_invocations < GPU_GROUP ? t->max_invocations : GPU_GROUP;
}

static ipt_status measure_fma(ipt_gpu *gpu, const bench_peak_opts *o, ipt_buffer *buf, double *out)
{
    const ipt_traits *t = ipt_gpu_traits(gpu);
    const uint32_t size = group_size(t);
    const ipt_kernel_desc d = {.shader = "peak_fma",
                               .n_spec = 2,
                               .spec = {size, TURNS},
                               .n_bind = 1,
                               .push_bytes = sizeof(float[3]),
                               .subgroup = t->subgroup};
    job j = {.gpu = gpu,
             .b = {{buf, 0, 16}},
             .push = {0.5F, 1, -1}, /* sums go to 2 */
             .groups = FIRST_GROUPS,
             .max_groups = t->max_group_count,
             .repeats = 1};
    IPT_TRY(ipt_kernel_get(gpu, &d, &j.kernel));
    IPT_TRY(groups_a_second(&j, o->least_ms, out));
    *out *= (double)size * TURNS * FMA_TURN;
    return IPT_OK;
}

static ipt_status measure_matrix(ipt_gpu *gpu, const bench_peak_opts *o, ipt_buffer *buf,
                                 double *out)
{
    const ipt_traits *t = ipt_gpu_traits(gpu);
    *out = 0;
    if (t->coop_m == 0 || t->subgroup == 0)
        return IPT_OK;
    const uint32_t subgroups = group_size(t) / t->subgroup, size = subgroups * t->subgroup;
    const ipt_kernel_desc d = {.shader = "peak_coop",
                               .n_spec = 5,
                               .spec = {size, TURNS, t->coop_m, t->coop_n, t->coop_k},
                               .n_bind = 1,
                               .push_bytes = sizeof(float[3]),
                               .subgroup = t->subgroup};
    job j = {.gpu = gpu,
             .b = {{buf, 0, 16}},
             .push = {1.0F / 256, 1.0F / 256, -1}, /* factors up to about 1; sums only grow */
             .groups = FIRST_GROUPS,
             .max_groups = t->max_group_count,
             .repeats = 1};
    IPT_TRY(ipt_kernel_get(gpu, &d, &j.kernel));
    IPT_TRY(groups_a_second(&j, o->least_ms, out));
    const double product = (double)t->coop_m * t->coop_n * t->coop_k;
    *out *= (double)subgroups * TURNS * COOP_TURN * product;
    return IPT_OK;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* The better of a kernel and of the device's own copy: llvmpipe stores lane by lane, which may be
 * slower than memory. */
static ipt_status measure_copy(ipt_gpu *gpu, const bench_peak_opts *o, double *out)
{
    const ipt_traits *t = ipt_gpu_traits(gpu);
    const uint32_t size = group_size(t), piece = t->simd ? CPU_PIECE : GPU_PIECE;
    const uint64_t fit = least(least(o->bytes / 2, t->max_range), t->max_texels * 16);
    const uint64_t pieces = least(fit / piece, t->max_group_count), bytes = pieces * piece;
    const ipt_kernel_desc d = {.shader = t->texel ? "peak_copy.texel" : "peak_copy.ssbo",
                               .n_spec = 2,
                               .spec = {size, piece / (size * 16)},
                               .n_bind = 2,
                               .kind = {t->texel ? IPT_BIND_TEXEL_RGBA32F : IPT_BIND_SSBO},
                               .subgroup = t->subgroup};
    ipt_buffer *buf = NULL;
    double own = 0, ms = 0;
    ipt_status status;
    IPT_TRY(ipt_buffer_create(gpu, 2 * bytes, &buf));
    job j = {.gpu = gpu,
             .b = {{buf, bytes, bytes}, {buf, 0, bytes}},
             .groups = (uint32_t)pieces,
             .max_groups = (uint32_t)pieces,
             .repeats = 1};
    /* backwards first: pages that nobody wrote are all the same one, which caches hold */
    IPT_TRY_GOTO(best_of(&j, 0, &ms), end);
    j.b[1] = j.b[0];
    j.b[0] = (ipt_binding){buf, 0, bytes};
    IPT_TRY_GOTO(groups_a_second(&j, o->least_ms, &own), end);
    IPT_TRY_GOTO(ipt_kernel_get(gpu, &d, &j.kernel), end);
    IPT_TRY_GOTO(groups_a_second(&j, o->least_ms, out), end);
    *out = 2.0 * piece * (own > *out ? own : *out);
end:
    ipt_buffer_destroy(gpu, &buf);
    return status;
}

ipt_status bench_peak_measure(ipt_gpu *gpu, const bench_peak_opts *o, bench_peak *out)
{
    bench_peak p = {0, 0, 0};
    ipt_buffer *buf = NULL;
    IPT_TRY(ipt_buffer_create(gpu, 16, &buf));
    ipt_status status = measure_fma(gpu, o, buf, &p.macs);
    if (status == IPT_OK)
        status = measure_matrix(gpu, o, buf, &p.matrix);
    ipt_buffer_destroy(gpu, &buf);
    if (status == IPT_OK)
        status = measure_copy(gpu, o, &p.bytes);
    if (status == IPT_OK)
        *out = p;
    return status;
}

bench_peak_opts bench_peak_usual(const ipt_gpu *gpu)
{
    const ipt_gpu_info *info = ipt_gpu_get_info(gpu);
    const uint64_t want = (info->type == IPT_GPU_CPU ? 256ULL : 1024ULL) * MIB;
    const uint64_t all = info->budget_bytes ? info->budget_bytes : info->heap_bytes;
    const uint64_t used = ipt_gpu_used_bytes(gpu), quarter = all > used ? (all - used) / 4 : 0;
    return (bench_peak_opts){.least_ms = 20, .bytes = quarter < MIB ? MIB : least(want, quarter)};
}
