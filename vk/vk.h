/* vk/vk.h - the device: choice, limits, memory, kernels, recorded commands.  The only folder that
 * includes vulkan.h; everything above sees these handles.
 *
 * Threads: a gpu and all that is made from it belong to one thread at a time.
 * Errors: IPT_ERR_DEVICE_MEM says need / have and what to try; IPT_ERR_DEVICE_LOST is sticky
 *         (every later call returns it; destroy and recreate the gpu). */
#ifndef IPT_VK_VK_H
#define IPT_VK_VK_H
#include "core/core.h"

typedef struct ipt_gpu ipt_gpu;
typedef struct ipt_buffer ipt_buffer; /* device memory; many share one slab */
typedef struct ipt_kernel ipt_kernel; /* a pipeline; owned by the gpu, shared */
typedef struct ipt_cmd ipt_cmd;       /* recorded commands, submitted many times */

/* --- choice -------------------------------------------------------------------------------- */
/* What kernels need to know of a device; all limits are read, none assumed. */
typedef struct ipt_traits {
    bool simd;        /* row-blocked kernels without shared memory (CPU devices); else tiles */
    bool texel;       /* storage texel buffers are the fast load path (llvmpipe) */
    uint8_t winograd; /* 3 x 3 convolutions by fewer multiplications: 0 never, 1 where faster, 2
                         where possible (tests) */
    bool f16_storage; /* 16-bit storage buffers: f16 activations possible */
    /* Matrix shape of VK_KHR_cooperative_matrix, f16 x f16 -> f32, subgroup scope; powers of two,
     * m and n <= 64, k <= 32; 0 = none, or the build's glslc or headers do not know them. */
    uint32_t coop_m, coop_n, coop_k;
    bool coop_emulated;    /* tests: such matrices in plain arithmetic (shaders/gemm_emu.comp) */
    bool subgroup_shuffle; /* compute stage has basic + arithmetic + shuffle subgroup operations */
    uint32_t subgroup; /* invocations of a subgroup; where the device could choose, the size that
                        * every pipeline is made with; 0 = unknown */
    uint32_t max_invocations, max_group_count; /* per workgroup; per grid axis (min of x,y,z) */
    uint32_t shared_bytes;
    uint32_t align;      /* storage and texel buffer offset alignment, bytes (<= 256) */
    uint64_t max_range;  /* maxStorageBufferRange, bytes: no SSBO binding is larger; < 2 GiB */
    uint64_t max_texels; /* maxTexelBufferElements */
    uint64_t max_buffer; /* bytes that one buffer and its memory may have */
} ipt_traits;

typedef enum {
    IPT_GPU_DISCRETE,
    IPT_GPU_INTEGRATED,
    IPT_GPU_VIRTUAL,
    IPT_GPU_CPU,
    IPT_GPU_OTHER
} ipt_gpu_type;
typedef struct ipt_gpu_info {
    char name[256],
        driver[256]; /* "NVIDIA H100", "llvmpipe (LLVM 15.0.6, 256 bits)"; driver + version */
    char api[32];    /* "1.3.230" */
    uint32_t vendor_id, device_id;
    ipt_gpu_type type;
    uint64_t heap_bytes;   /* largest device-local heap */
    uint64_t budget_bytes; /* VK_EXT_memory_budget; 0 = the driver does not say */
    bool usable;           /* meets the minimum: Vulkan 1.2, timeline semaphores, 8 SSBOs a stage */
    char why_not[128];     /* reason when not usable */
    ipt_traits traits;
} ipt_gpu_info;

/* All devices, best first (discrete, integrated, virtual, other, CPU).  *list: caller, ipt_free.
 * Errors: IPT_ERR_NO_DEVICE: no Vulkan loader, driver or device (message says what to install). */
IPT_CHECKED ipt_status ipt_gpu_list(ipt_ctx *ctx, ipt_gpu_info **list, size_t *n);

/* Environment, for tests and measurements: IPT_KERNELS=simd|tile, IPT_TEXEL=0|1 (traits.texel),
 * IPT_COOPMAT=0 (no cooperative matrices), IPT_WINOGRAD=0|1|2 (traits.winograd), IPT_STAGING=1 (no
 * mapped buffers: every write and read goes through the staging ring), IPT_MAX_BINDING=BYTES (a
 * lower traits.max_range, 4096 at least).
 */
typedef struct ipt_gpu_opts {
    const char
        *device; /* NULL: best; "0": index in ipt_gpu_list; "cpu"; else part of a name, any case */
    const char *kernels;   /* NULL: by device; "simd" or "tile": forced (also env IPT_KERNELS) */
    const char *cache_dir; /* pipeline cache folder; NULL: $XDG_CACHE_HOME/impasto or
                              ~/.cache/impasto; "" none */
    bool validate;         /* Khronos layer + synchronisation validation; messages are counted */
    uint64_t memory_limit; /* bytes of device memory this gpu may take; 0 = no own limit */
} ipt_gpu_opts;
/* Errors: IPT_ERR_NO_DEVICE (none, or none matches; lists what exists), IPT_ERR_UNSUPPORTED,
 * IPT_ERR_MISSING (validate asked for, layer not installed), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_gpu_create(ipt_ctx *ctx, const ipt_gpu_opts *o, ipt_gpu **out);
void ipt_gpu_destroy(ipt_gpu **gpu); /* writes the pipeline cache (atomically, failures ignored) */
const ipt_gpu_info *ipt_gpu_get_info(const ipt_gpu *gpu);
const ipt_traits *ipt_gpu_traits(const ipt_gpu *gpu);
ipt_ctx *ipt_gpu_ctx(const ipt_gpu *gpu);
uint64_t ipt_gpu_used_bytes(const ipt_gpu *gpu); /* device memory allocated now */
uint64_t ipt_gpu_peak_bytes(const ipt_gpu *gpu);
/* Bytes that may be allocated before the memory limit, as if all of it were one block; UINT64_MAX:
 * there is no limit. */
uint64_t ipt_gpu_room(ipt_gpu *gpu);
/* Validation messages of severity warning or error so far; 0 when validate was off. */
uint32_t ipt_gpu_validation_count(const ipt_gpu *gpu);
/* Tests only: the n-th vkAllocateMemory from now and all later ones fail; 0 = off. */
void ipt_gpu_alloc_fail_after(ipt_gpu *gpu, uint64_t n);
/* Tests only: another memory limit, and the peak counted anew. */
void ipt_gpu_limit_memory(ipt_gpu *gpu, uint64_t bytes);
/* Tests only: plans made from now on see another device: max_range, max_texels, max_buffer,
 * max_group_count (none larger than the device's own), align (none smaller), winograd and coop_* of
 * *t. */
void ipt_gpu_limit_traits(ipt_gpu *gpu, const ipt_traits *t);

/* --- memory: slabs, suballocated ------------------------------------------------------------- */
/* Storage + storage texel + transfer usage; offset alignment 256; content undefined.
 * CPU and integrated devices: host visible.  Errors: IPT_ERR_DEVICE_MEM, IPT_ERR_DEVICE_LOST. */
IPT_CHECKED ipt_status ipt_buffer_create(ipt_gpu *gpu, uint64_t bytes, ipt_buffer **out);
/* Freed when the GPU has finished what was submitted before. */
void ipt_buffer_destroy(ipt_gpu *gpu, ipt_buffer **b);
uint64_t ipt_buffer_bytes(const ipt_buffer *b);
/* Host pointer when the memory is host visible and coherent, else NULL (then use write/read). */
void *ipt_buffer_map(ipt_buffer *b);
/* Copies through the staging ring or the mapping; synchronous with respect to earlier submits of
 * this gpu (they have completed when the copy starts).  off and n need no alignment.
 * Errors: IPT_ERR_ARG out of range, IPT_ERR_DEVICE_MEM, IPT_ERR_DEVICE_LOST. */
IPT_CHECKED ipt_status ipt_buffer_write(ipt_gpu *gpu, ipt_buffer *b, uint64_t off, const void *src,
                                        uint64_t n);
IPT_CHECKED ipt_status ipt_buffer_read(ipt_gpu *gpu, ipt_buffer *b, uint64_t off, void *dst,
                                       uint64_t n);

/* --- kernels --------------------------------------------------------------------------------- */
typedef enum ipt_bind_kind {
    IPT_BIND_SSBO,
    IPT_BIND_TEXEL_RGBA32F, /* storage texel buffer views of the same memory */
    IPT_BIND_TEXEL_RGBA32UI,
    IPT_BIND_TEXEL_RGBA16F,
} ipt_bind_kind;
enum { IPT_MAX_BIND = 9, IPT_MAX_SPEC = 16, IPT_MAX_PUSH = 128 };
typedef struct ipt_kernel_desc {
    const char *shader; /* name in shaders/registry.h */
    uint8_t n_spec, n_bind, push_bytes;
    uint32_t spec[IPT_MAX_SPEC]; /* constant_id 0, 1, ... (floats by bits) */
    ipt_bind_kind kind[IPT_MAX_BIND];
    uint32_t subgroup; /* required subgroup size when the device can control it; 0 = any */
} ipt_kernel_desc;
/* The pipeline of a description, made once and kept.  Errors: IPT_ERR_MISSING unknown shader,
 * IPT_ERR_DEVICE_MEM, IPT_ERR_DEVICE_LOST, IPT_ERR_UNSUPPORTED. */
IPT_CHECKED ipt_status ipt_kernel_get(ipt_gpu *gpu, const ipt_kernel_desc *d, ipt_kernel **out);
/* Compiles kernels that are about to run, on several cores where the device would take them one by
 * one (llvmpipe, from an empty cache); a thread lives as long as the call.  Returns early on a
 * cancel.  Whatever fails here is left to ipt_kernel_get.  desc: in any order afterwards. */
void ipt_gpu_warm(ipt_gpu *gpu, ipt_kernel_desc *desc, size_t n);

/* --- recorded commands ------------------------------------------------------------------------ */
typedef struct ipt_binding {
    ipt_buffer *buf;
    uint64_t off, bytes; /* off: multiple of traits.align */
} ipt_binding;
/* begin .. record .. end, then submit any number of times; buffers must outlive the cmd. */
IPT_CHECKED ipt_status ipt_cmd_create(ipt_gpu *gpu, ipt_cmd **out);
void ipt_cmd_destroy(ipt_gpu *gpu, ipt_cmd **c); /* waits for its submits */
/* Groups: each <= traits.max_group_count.  Errors: IPT_ERR_DEVICE_MEM (descriptors), IPT_ERR_ARG.
 */
IPT_CHECKED ipt_status ipt_cmd_dispatch(ipt_cmd *c, ipt_kernel *k, const ipt_binding *b,
                                        const void *push, const uint32_t groups[3]);
/* Compute writes before are visible to compute and transfer after (and WAR ordered). */
void ipt_cmd_barrier(ipt_cmd *c);
/* Copy inside device memory; a barrier before and after is the caller's. */
void ipt_cmd_copy(ipt_cmd *c, const ipt_binding *src, const ipt_binding *dst);
/* Time stamp number i (0..n-1) after all commands before it; read with ipt_cmd_stamps. */
IPT_CHECKED ipt_status ipt_cmd_stamp(ipt_cmd *c, uint32_t i);
IPT_CHECKED ipt_status ipt_cmd_end(ipt_cmd *c);
/* Queues the commands after all earlier submits of the gpu; returns the timeline value. */
IPT_CHECKED ipt_status ipt_cmd_submit(ipt_cmd *c, uint64_t *value);
/* Waits until the timeline has reached `value`.  Errors: IPT_ERR_DEVICE_LOST.  Submitted work
 * cannot be recalled: callers check ipt_cancelled() between submissions. */
IPT_CHECKED ipt_status ipt_gpu_wait(ipt_gpu *gpu, uint64_t value);
/* Waits for all that was submitted: the host may write to mapped buffers again.
 * Errors: IPT_ERR_DEVICE_LOST. */
IPT_CHECKED ipt_status ipt_gpu_idle(ipt_gpu *gpu);
/* Milliseconds of stamps 0..n-1 of the last completed submit, relative to stamp 0. */
IPT_CHECKED ipt_status ipt_cmd_stamps(ipt_cmd *c, double *ms, uint32_t n);
#endif
