/* vk/warm.c - compiling many kernels at once, before they run.  llvmpipe compiles a pipeline when
 * it is first dispatched, in the one thread of its queue, a second each from an empty cache.  Here
 * every other one is compiled by a second device in a thread of its own; the driver's cache on disk
 * hands its code to the first.  Nothing here can fail: what is not compiled now is compiled when it
 * runs.
 *
 * Between the threads: the list, which is only read, and the atomics of a `warm`.  The second
 * device has its own context and its own instance. */
#include "vk/vk_internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A second device is worth it for so many kernels of which one took so many milliseconds: it did
 * not come out of a cache. */
enum { LEAST = 2, LEAST_MS = 100 };
enum { BYTES = 4352 }; /* of what kernels are bound to: no power of two, as memory.c says */

typedef struct warm {
    const ipt_kernel_desc *desc;
    size_t n;
    atomic_uint_least64_t range; /* kernels that nobody has taken: first << 32 | end */
    /* A kernel that took the second device sample_ms, valid once sample > 0 (its number + 1): then
     * the next one is compiled too, so that the driver has written it. */
    atomic_size_t sample;
    double sample_ms;
    atomic_bool stop, over;
    pthread_t thread;
} warm;

/* Takes the kernel at the front (this thread) or the back (the other one); false: none is left. */
static bool take(warm *w, bool front, size_t *out)
{
    uint64_t old = atomic_load(&w->range), next;
    do {
        const uint64_t first = old >> 32, end = old & UINT32_MAX;
        if (first >= end)
            return false;
        *out = (size_t)(front ? first : end - 1);
        next = front ? (first + 1) << 32 | end : first << 32 | (end - 1);
    } while (!atomic_compare_exchange_weak(&w->range, &old, next));
    return true;
}

/* --- one kernel ------------------------------------------------------------------------------- */
/* Memory that no limit counts and no other buffer shares. */
typedef struct target {
    ipt_slab slab;
    ipt_buffer buffer;
} target;

static bool open_target(ipt_gpu *gpu, target *t)
{
    memset(t, 0, sizeof *t);
    VkMemoryRequirements need;
    VkBufferCreateInfo info = {.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
                               .size = BYTES,
                               .usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT |
                                        VK_BUFFER_USAGE_STORAGE_TEXEL_BUFFER_BIT};
    if (vkCreateBuffer(gpu->device, &info, NULL, &t->slab.buffer) != VK_SUCCESS)
        return false;
    vkGetBufferMemoryRequirements(gpu->device, t->slab.buffer, &need);
    VkMemoryAllocateInfo a = {.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
                              .allocationSize = need.size,
                              .memoryTypeIndex = ipt_vk_memory_type(gpu, need.memoryTypeBits, 0)};
    t->buffer = (ipt_buffer){.slab = &t->slab, .size = BYTES, .bytes = BYTES};
    return vkAllocateMemory(gpu->device, &a, NULL, &t->slab.memory) == VK_SUCCESS &&
           vkBindBufferMemory(gpu->device, t->slab.buffer, t->slab.memory, 0) == VK_SUCCESS;
}

static void close_target(ipt_gpu *gpu, target *t)
{
    vkDestroyBuffer(gpu->device, t->slab.buffer, NULL);
    vkFreeMemory(gpu->device, t->slab.memory, NULL);
}

/* A dispatch of no workgroups; the milliseconds it took, or < 0. */
static double compile(ipt_gpu *gpu, target *t, const ipt_kernel_desc *d)
{
    const uint8_t push[IPT_MAX_PUSH] = {0};
    const double start = ipt_now_ms();
    ipt_binding b[IPT_MAX_BIND];
    ipt_kernel *k = NULL;
    ipt_cmd *c = NULL;
    uint64_t value = 0;
    for (size_t i = 0; i < IPT_COUNT(b); i++)
        b[i] = (ipt_binding){&t->buffer, 0, 4096};
    ipt_status status = ipt_kernel_get(gpu, d, &k);
    if (status == IPT_OK)
        status = ipt_cmd_create(gpu, &c);
    if (status == IPT_OK)
        status = ipt_vk_cmd_dispatch_none(c, k, b, push);
    if (status == IPT_OK)
        status = ipt_cmd_end(c);
    if (status == IPT_OK)
        status = ipt_cmd_submit(c, &value);
    if (status == IPT_OK)
        status = ipt_gpu_wait(gpu, value);
    ipt_cmd_destroy(gpu, &c);
    return status == IPT_OK ? ipt_now_ms() - start : -1;
}

/* --- the other thread ------------------------------------------------------------------------- */
static void compile_from_back(warm *w, ipt_gpu *gpu)
{
    target t;
    size_t i, sample = 0;
    if (open_target(gpu, &t))
        while (!atomic_load(&w->stop) && take(w, false, &i)) {
            const double ms = compile(gpu, &t, &w->desc[i]);
            if (ms < 0)
                break;
            if (sample > 0)
                atomic_store(&w->sample, sample);
            else if (ms >= 2 * LEAST_MS) {
                w->sample_ms = ms;
                sample = i + 1;
            }
        }
    close_target(gpu, &t);
}

static void *second_device(void *arg)
{
    warm *w = arg;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = NULL;
    const ipt_gpu_opts o = {.device = "llvmpipe", .cache_dir = ""};
    if (ipt_ctx_create(NULL, NULL, &ctx) == IPT_OK && ipt_gpu_create(ctx, &o, &gpu) == IPT_OK)
        compile_from_back(w, gpu);
    ipt_gpu_destroy(&gpu); /* what the driver has yet to write to its cache is written here */
    ipt_ctx_destroy(&ctx);
    atomic_store(&w->over, true);
    return NULL;
}

static bool start(warm *w)
{
    sigset_t all, before; /* signals are the caller's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool is_running = pthread_create(&w->thread, NULL, second_device, w) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return is_running;
}

/* --- this thread ------------------------------------------------------------------------------ */
/* Whether the driver's cache hands kernels over: told by how long one of the other device's takes
 * here.  Where there is no such cache, work would be done twice. */
static void check_cache(ipt_gpu *gpu, warm *w, target *t, bool *is_checked)
{
    const size_t sample = atomic_load(&w->sample);
    if (*is_checked || sample == 0)
        return;
    *is_checked = true;
    const double ms = compile(gpu, t, &w->desc[sample - 1]);
    if (ms < 0.5 * w->sample_ms)
        return;
    gpu->is_warm_useless = true;
    atomic_store(&w->stop, true);
    ipt_log(gpu->ctx, IPT_LOG_DEBUG, "kernels are compiled by one thread: no driver cache");
}

static void compile_all(ipt_gpu *gpu, warm *w, target *t)
{
    bool is_checked = false, is_running = false;
    for (size_t i; !ipt_cancelled(gpu->ctx) && take(w, true, &i);) {
        const clock_t before = clock(); /* of the process: other programs do not count */
        if (compile(gpu, t, &w->desc[i]) < 0)
            break;
        const double ms = 1e3 * (double)(clock() - before) / (double)CLOCKS_PER_SEC;
        is_running = is_running || (ms >= LEAST_MS && start(w));
        check_cache(gpu, w, t, &is_checked);
    }
    while (is_running && !atomic_load(&w->over) && !ipt_cancelled(gpu->ctx))
        nanosleep(&(struct timespec){.tv_nsec = 2 * 1000 * 1000}, NULL);
    atomic_store(&w->stop, true);
    if (is_running)
        pthread_join(w->thread, NULL);
}

void ipt_gpu_warm(ipt_gpu *gpu, ipt_kernel_desc *desc, size_t n)
{
    warm w = {.desc = desc};
    target t;
    if (!gpu->dev.caps.llvmpipe || gpu->is_warm_useless || gpu->lost || n > UINT32_MAX ||
        sysconf(_SC_NPROCESSORS_ONLN) < 2)
        return;
    for (size_t i = 0; i < n; i++) /* those that earlier plans have run go */
        if (!ipt_vk_has_kernel(gpu, &desc[i]))
            desc[w.n++] = desc[i];
    if (w.n < LEAST)
        return;
    atomic_init(&w.range, (uint64_t)w.n);
    atomic_init(&w.sample, 0);
    atomic_init(&w.stop, false);
    atomic_init(&w.over, false);
    if (open_target(gpu, &t))
        compile_all(gpu, &w, &t);
    close_target(gpu, &t);
}
