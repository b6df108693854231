/* vk/vk_internal.h - what the files of vk/ share: the gpu with its caps, slabs, staging ring and
 * pipelines.  Included inside vk/ and by tests/test_vk.c; nothing above sees Vulkan types. */
#ifndef IPT_VK_VK_INTERNAL_H
#define IPT_VK_VK_INTERNAL_H
#include "vk/vk.h"

#include <stdatomic.h>
#include <vulkan/vulkan.h>

enum { IPT_VK_ALIGN = 256, IPT_VK_SLOTS = 4 };
/* Ends every message about missing device memory, behind what to do about --vram-limit. */
#define IPT_VK_MEM_ADVICE ", a smaller picture, --vae-tile auto or --precision f16"

/* What the device can do beyond ipt_traits; filled by ipt_vk_enumerate. */
typedef struct ipt_vk_caps {
    VkPhysicalDeviceProperties props;
    VkPhysicalDeviceMemoryProperties memory;
    uint32_t api;              /* lower of instance and device version                           */
    uint32_t family;           /* queue family with compute, without graphics where there is one */
    uint32_t stamp_bits;       /* valid bits of a time stamp; 0 = none                           */
    uint32_t sub_min, sub_max; /* required subgroup size may be chosen in this range; 0 = not */
    uint64_t max_buffer;       /* bytes of one vkCreateBuffer                                    */
    bool portability;          /* VK_KHR_portability_subset must be enabled                      */
    bool budget;               /* VK_EXT_memory_budget                                           */
    bool ext_size_control;     /* subgroup size control is an extension here (before 1.3)       */
    bool llvmpipe;
} ipt_vk_caps;

typedef struct ipt_vk_device {
    VkPhysicalDevice phys;
    ipt_gpu_info info;
    ipt_vk_caps caps;
} ipt_vk_device;

/* One vkAllocateMemory with one VkBuffer over all of it. */
typedef struct ipt_slab {
    struct ipt_slab *next;
    VkDeviceMemory memory;
    VkBuffer buffer;
    uint64_t size, held;      /* bytes that blocks may use; bytes taken from the device */
    uint8_t *mapped;          /* NULL: not host visible */
    struct ipt_buffer *first; /* blocks in address order, used and free */
    uint32_t n_used;
    bool dedicated; /* one block only; given back as soon as it is free */
} ipt_slab;

struct ipt_buffer {
    ipt_slab *slab;
    ipt_buffer *prev, *next; /* neighbours in the slab */
    ipt_buffer *next_dead;   /* destroyed, waiting for the GPU */
    uint64_t off, size;      /* place in the slab; multiples of IPT_VK_ALIGN */
    uint64_t bytes;          /* as asked for */
    uint64_t dead_at;        /* timeline value after which the block is free */
    bool used;
};

/* Host-visible slots for devices whose memory the host cannot see. */
typedef struct ipt_staging {
    VkDeviceMemory memory;
    VkBuffer buffer;
    uint8_t *mapped;
    VkCommandPool pool;
    VkCommandBuffer cmd[IPT_VK_SLOTS];
    uint64_t value[IPT_VK_SLOTS]; /* last submit that used the slot */
    uint32_t next;
} ipt_staging;

struct ipt_kernel {
    ipt_kernel_desc desc; /* desc.shader points into the registry */
    uint64_t hash;
    VkDescriptorSetLayout set_layout;
    VkPipelineLayout layout;
    VkPipeline pipeline;
    uint32_t n_ssbo, n_texel;
};

struct ipt_gpu {
    ipt_ctx *ctx;
    VkInstance instance;
    VkDebugUtilsMessengerEXT messenger;
    VkDevice device;
    VkQueue queue;
    VkSemaphore timeline;
    uint64_t submitted, completed; /* timeline values */
    bool lost;
    ipt_vk_device dev;
    atomic_uint n_messages;
    /* memory */
    ipt_slab *slabs;
    ipt_buffer *dead;
    ipt_staging staging;
    bool host_visible; /* buffers are mapped; else the staging ring is used */
    uint64_t memory_limit, used, peak;
    uint64_t n_alloc, fail_alloc; /* as ipt_alloc_fail_after */
    /* kernels */
    ipt_kernel **kernel;
    size_t n_kernel, cap_kernel;
    VkPipelineCache cache;
    char *cache_path;         /* NULL: none */
    uint8_t cache_digest[32]; /* of the data loaded */
    bool is_warm_useless;     /* warm.c: the driver keeps no compiled kernels */
};

/* --- query.c: what a physical device is ------------------------------------------------------- */
/* All devices of the instance, best first; *list: caller, ipt_free.  *n may come out 0.
 * kernels: "simd", "tile" or NULL, as ipt_gpu_opts.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_vk_enumerate(ipt_ctx *ctx, VkInstance instance, uint32_t api,
                                        const char *kernels, ipt_vk_device **list, size_t *n);
bool ipt_vk_has_extension(const VkExtensionProperties *e, uint32_t n, const char *name);

/* --- device.c --------------------------------------------------------------------------------- */
/* Status of a VkResult; VK_ERROR_DEVICE_LOST becomes sticky.  `what` names the call. */
ipt_status ipt_vk_check(ipt_gpu *gpu, VkResult r, const char *what);
/* IPT_ERR_DEVICE_LOST once the device is lost, else IPT_OK. */
IPT_CHECKED ipt_status ipt_vk_alive(ipt_gpu *gpu);

/* --- memory.c --------------------------------------------------------------------------------- */
void ipt_vk_memory_init(ipt_gpu *gpu);
void ipt_vk_memory_finish(ipt_gpu *gpu); /* the device must be idle */
/* First memory type allowed by `bits` with all `flags`, or UINT32_MAX. */
uint32_t ipt_vk_memory_type(const ipt_gpu *gpu, uint32_t bits, VkMemoryPropertyFlags flags);

/* --- kernel.c --------------------------------------------------------------------------------- */
/* The compiled shader of that name, or NULL. */
const struct ipt_shader *ipt_vk_shader(const char *name);
/* cache_dir: as ipt_gpu_opts.  A cache that cannot be read is an empty one. */
IPT_CHECKED ipt_status ipt_vk_kernels_init(ipt_gpu *gpu, const char *cache_dir);
void ipt_vk_kernels_finish(ipt_gpu *gpu);
/* Whether that pipeline has been made. */
bool ipt_vk_has_kernel(const ipt_gpu *gpu, const ipt_kernel_desc *d);

/* --- commands.c ------------------------------------------------------------------------------- */
/* Submits after everything submitted before, with a full memory dependency. */
IPT_CHECKED ipt_status ipt_vk_submit(ipt_gpu *gpu, VkCommandBuffer cmd, uint64_t *value);
/* As ipt_cmd_dispatch, of no workgroups: llvmpipe compiles the kernel.  The bindings are not
 * checked. */
IPT_CHECKED ipt_status ipt_vk_cmd_dispatch_none(ipt_cmd *c, const ipt_kernel *k,
                                                const ipt_binding *b, const void *push);
#endif
