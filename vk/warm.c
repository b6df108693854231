/* vk/warm.c - compiling many kernels at once, before they run.  llvmpipe compiles a pipeline when
 * it is first dispatched, in the one thread of its queue, a second each from an empty cache.  Here
 * some are compiled by a second device in a thread of its own; the driver's cache on disk
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
    atomic_size_t next; /* the first kernel that nobody has taken */
    /* The other thread's, read once it has ended: a kernel that took it sample_ms; its number + 1.
     */
    size_t sample;
    double sample_ms;
    atomic_bool stop, over;
    pthread_t thread;
} warm;

/* Takes the next kernel; false: none is left. */
static bool take(warm *w, size_t *out)
{
    *out = atomic_fetch_add(&w->next, 1);
    return *out < w->n;
}

/* Those that take long to compile: with them first, no thread is left alone with one at the end. */
static bool is_long(const ipt_kernel_desc *d)
{
    return strncmp(d->shader, "gemm", 4) == 0 || strncmp(d->shader, "attention", 9) == 0;
}

/* Long ones first, but for one in front of them, which tells whether there is anything to compile.
 */
static void sort(ipt_kernel_desc *d, size_t n)
{
    size_t n_long = 0;
    for (size_t i = 0; i < n; i++)
        if (is_long(&d[i])) {
            const ipt_kernel_desc one = d[i];
            memmove(&d[n_long + 1], &d[n_long], (i - n_long) * sizeof *d);
            d[n_long++] = one;
        }
    if (n_long == n)
        return;
    const ipt_kernel_desc one = d[n_long];
    memmove(&d[1], &d[0], n_long * sizeof *d);
    d[0] = one;
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
static void compile_there(warm *w, ipt_gpu *gpu)
{
    target t;
    size_t i;
    if (open_target(gpu, &t))
        while (!atomic_load(&w->stop) && take(w, &i)) {
            const double ms = compile(gpu, &t, &w->desc[i]);
            if (ms < 0)
                break;
            if (w->sample == 0 && ms >= 2 * LEAST_MS) {
                w->sample_ms = ms;
                w->sample = i + 1;
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
        compile_there(w, gpu);
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
 * here.  Only once that one is gone: the driver writes its cache in a thread that waits for all
 * others.  Where there is no cache, work would be done twice from now on. */
static void check_cache(ipt_gpu *gpu, const warm *w, target *t)
{
    if (w->sample == 0)
        return;
    const double ms = compile(gpu, t, &w->desc[w->sample - 1]);
    if (ms < 0.5 * w->sample_ms)
        return;
    gpu->is_warm_useless = true;
    ipt_log(gpu->ctx, IPT_LOG_DEBUG, "kernels are compiled by one thread: no driver cache");
}

static void compile_all(ipt_gpu *gpu, warm *w, target *t)
{
    bool is_running = false;
    for (size_t i; !ipt_cancelled(gpu->ctx) && take(w, &i);) {
        const clock_t before = clock(); /* of the process: other programs do not count */
        if (compile(gpu, t, &w->desc[i]) < 0)
            break;
        const double ms = 1e3 * (double)(clock() - before) / (double)CLOCKS_PER_SEC;
        is_running = is_running || (ms >= LEAST_MS && start(w));
    }
    while (is_running && !atomic_load(&w->over) && !ipt_cancelled(gpu->ctx))
        nanosleep(&(struct timespec){.tv_nsec = 2 * 1000 * 1000}, NULL);
    atomic_store(&w->stop, true);
    if (!is_running)
        return;
    pthread_join(w->thread, NULL);
    if (!ipt_cancelled(gpu->ctx))
        check_cache(gpu, w, t);
}

void ipt_gpu_warm(ipt_gpu *gpu, ipt_kernel_desc *desc, size_t n)
{
    warm w = {.desc = desc};
    target t;
    if (!gpu->dev.caps.llvmpipe || gpu->is_warm_useless || gpu->lost ||
        sysconf(_SC_NPROCESSORS_ONLN) < 2)
        return;
    for (size_t i = 0; i < n; i++) /* those that earlier plans have run go */
        if (!ipt_vk_has_kernel(gpu, &desc[i]))
            desc[w.n++] = desc[i];
    if (w.n < LEAST)
        return;
    sort(desc, w.n);
    atomic_init(&w.next, 0);
    atomic_init(&w.stop, false);
    atomic_init(&w.over, false);
    if (open_target(gpu, &t))
        compile_all(gpu, &w, &t);
    close_target(gpu, &t);
}
