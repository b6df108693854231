/* vk/query.c - reads what a physical device is and can do, and derives the traits from it.
 * Creates nothing on the device.  Must not know: memory, pipelines, commands. */
#include "vk/vk_internal.h"

#include <stdlib.h>
#include <string.h>

enum { MIN_SSBO = 8, MIN_TEXELS = 1 << 24 };
enum { MIN_RANGE = 4096 };
enum { MAX_RANGE = 0x7fffff00 }; /* kernels count a binding's bytes in a signed word */
enum { MIN_VIEWS = 5 };          /* a, b, r, h, u of shaders/gemm.comp */

/* The property and feature structs that one query fills. */
typedef struct query {
    VkPhysicalDeviceProperties2 props;
    VkPhysicalDeviceVulkan11Properties p11;
    VkPhysicalDeviceVulkan12Properties p12;
    VkPhysicalDeviceSubgroupSizeControlProperties p_sub;
    VkPhysicalDeviceMaintenance4Properties p_m4;
    VkPhysicalDeviceFeatures2 feats;
    VkPhysicalDeviceVulkan11Features f11;
    VkPhysicalDeviceVulkan12Features f12;
    VkPhysicalDeviceSubgroupSizeControlFeatures f_sub;
#ifdef VK_KHR_cooperative_matrix
    VkPhysicalDeviceCooperativeMatrixFeaturesKHR f_coop;
#endif
    VkExtensionProperties *ext;
    uint32_t n_ext;
} query;

bool ipt_vk_has_extension(const VkExtensionProperties *e, uint32_t n, const char *name)
{
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(e[i].extensionName, name) == 0)
            return true;
    return false;
}

static bool has(const query *q, const char *name)
{
    return ipt_vk_has_extension(q->ext, q->n_ext, name);
}

static ipt_gpu_type type_of(VkPhysicalDeviceType t)
{
    if (t == VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU)
        return IPT_GPU_DISCRETE;
    if (t == VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU)
        return IPT_GPU_INTEGRATED;
    if (t == VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU)
        return IPT_GPU_VIRTUAL;
    if (t == VK_PHYSICAL_DEVICE_TYPE_CPU)
        return IPT_GPU_CPU;
    return IPT_GPU_OTHER;
}

/* Picks the queue family; false when the device cannot compute. */
static ipt_status pick_family(ipt_ctx *ctx, ipt_vk_device *d, bool *found)
{
    uint32_t n = 0, best = UINT32_MAX;
    int best_score = -1;
    vkGetPhysicalDeviceQueueFamilyProperties(d->phys, &n, NULL);
    VkQueueFamilyProperties *f = ipt_calloc(ctx, n, sizeof *f);
    if (!f)
        return IPT_ERR_NOMEM;
    vkGetPhysicalDeviceQueueFamilyProperties(d->phys, &n, f);
    for (uint32_t i = 0; i < n; i++) {
        if (!(f[i].queueFlags & VK_QUEUE_COMPUTE_BIT) || f[i].queueCount == 0)
            continue;
        /* A queue without graphics does not hold up the desktop. */
        int score = f[i].timestampValidBits > 0 ? 2 : 0;
        if (!(f[i].queueFlags & VK_QUEUE_GRAPHICS_BIT))
            score++;
        if (score > best_score) {
            best_score = score;
            best = i;
        }
    }
    *found = best != UINT32_MAX;
    if (*found) {
        d->caps.family = best;
        d->caps.stamp_bits = f[best].timestampValidBits;
    }
    ipt_free(f);
    return IPT_OK;
}

/* Largest device-local heap and, when the driver tells, what of it is free for us. */
static void read_heaps(ipt_vk_device *d)
{
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
    VkPhysicalDeviceMemoryProperties2 m = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2,
        .pNext = d->caps.budget ? &budget : NULL};
    vkGetPhysicalDeviceMemoryProperties2(d->phys, &m);
    d->caps.memory = m.memoryProperties;
    for (uint32_t i = 0; i < m.memoryProperties.memoryHeapCount; i++) {
        const VkMemoryHeap *h = &m.memoryProperties.memoryHeaps[i];
        if ((h->flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) && h->size > d->info.heap_bytes) {
            d->info.heap_bytes = h->size;
            d->info.budget_bytes = d->caps.budget ? budget.heapBudget[i] : 0;
        }
    }
}

static void query_run(VkPhysicalDevice phys, uint32_t api, query *q)
{
    bool v13 = api >= VK_API_VERSION_1_3;
    bool sub = v13 || has(q, VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME);
    void *next = NULL;
    q->p11.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES;
    q->p12.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES;
    q->p_sub.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES;
    q->p_m4.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_4_PROPERTIES;
    q->props.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
    q->p11.pNext = &q->p12;
    if (sub) {
        q->p_sub.pNext = next;
        next = &q->p_sub;
    }
    if (v13) {
        q->p_m4.pNext = next;
        next = &q->p_m4;
    }
    q->p12.pNext = next;
    q->props.pNext = &q->p11;
    vkGetPhysicalDeviceProperties2(phys, &q->props);

    next = NULL;
    q->f11.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES;
    q->f12.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES;
    q->f_sub.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES;
    q->feats.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
    if (sub) {
        q->f_sub.pNext = next;
        next = &q->f_sub;
    }
#ifdef VK_KHR_cooperative_matrix
    q->f_coop.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR;
    if (has(q, VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME)) {
        q->f_coop.pNext = next;
        next = &q->f_coop;
    }
#endif
    q->f12.pNext = next;
    q->f11.pNext = &q->f12;
    q->feats.pNext = &q->f11;
    vkGetPhysicalDeviceFeatures2(phys, &q->feats);
}

#ifdef VK_KHR_cooperative_matrix
static bool coop_fits(const VkCooperativeMatrixPropertiesKHR *m)
{
    return m->AType == VK_COMPONENT_TYPE_FLOAT16_KHR && m->BType == VK_COMPONENT_TYPE_FLOAT16_KHR &&
           m->CType == VK_COMPONENT_TYPE_FLOAT32_KHR &&
           m->ResultType == VK_COMPONENT_TYPE_FLOAT32_KHR && m->scope == VK_SCOPE_SUBGROUP_KHR &&
           m->MSize && m->NSize && m->KSize && 64 % m->MSize == 0 && 64 % m->NSize == 0 &&
           32 % m->KSize == 0;
}
#endif

/* Sets traits.coop_*: of the shapes that the kernels take the one with most work in it, 16 x 16 x
 * 16 before others of its size. */
static ipt_status query_coopmat(ipt_ctx *ctx, VkInstance instance, VkPhysicalDevice phys,
                                const query *q, ipt_traits *t)
{
#ifdef VK_KHR_cooperative_matrix
    const char *off = getenv("IPT_COOPMAT");
    if (!q->f_coop.cooperativeMatrix || !q->f12.vulkanMemoryModel || !t->f16_storage ||
        !ipt_vk_shader("gemm_coop.f16") || (off && strcmp(off, "0") == 0))
        return IPT_OK;
    PFN_vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR get =
        (PFN_vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR)vkGetInstanceProcAddr(
            instance, "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
    uint32_t n = 0;
    if (!get || get(phys, &n, NULL) != VK_SUCCESS || n == 0)
        return IPT_OK;
    VkCooperativeMatrixPropertiesKHR *m = ipt_calloc(ctx, n, sizeof *m);
    if (!m)
        return IPT_ERR_NOMEM;
    for (uint32_t i = 0; i < n; i++)
        m[i].sType = VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_KHR;
    VkResult r = get(phys, &n, m);
    for (uint32_t i = 0; i < n && (r == VK_SUCCESS || r == VK_INCOMPLETE); i++) {
        uint32_t had = t->coop_m * t->coop_n * t->coop_k,
                 has = m[i].MSize * m[i].NSize * m[i].KSize;
        if (coop_fits(&m[i]) && (has > had || (has == had && m[i].MSize == m[i].NSize))) {
            t->coop_m = m[i].MSize;
            t->coop_n = m[i].NSize;
            t->coop_k = m[i].KSize;
        }
    }
    ipt_free(m);
#else
    (void)ctx;
    (void)instance;
    (void)phys;
    (void)q;
    (void)t;
#endif
    return IPT_OK;
}

/* Sets traits.subgroup and the range that a pipeline may ask for. */
static void derive_subgroup(const query *q, ipt_vk_caps *caps, ipt_traits *t)
{
    const VkSubgroupFeatureFlags want = VK_SUBGROUP_FEATURE_BASIC_BIT |
                                        VK_SUBGROUP_FEATURE_ARITHMETIC_BIT |
                                        VK_SUBGROUP_FEATURE_SHUFFLE_BIT;
    bool compute = (q->p11.subgroupSupportedStages & VK_SHADER_STAGE_COMPUTE_BIT) != 0;
    t->subgroup_shuffle = compute && (q->p11.subgroupSupportedOperations & want) == want;
    t->subgroup = q->p11.subgroupSize;
    if (!q->f_sub.subgroupSizeControl ||
        !(q->p_sub.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT))
        return;
    caps->sub_min = q->p_sub.minSubgroupSize;
    caps->sub_max = q->p_sub.maxSubgroupSize;
    if (caps->sub_min == caps->sub_max)
        return;
    t->subgroup = 32; /* the device could choose: every pipeline is made with this size */
    if (t->subgroup < caps->sub_min)
        t->subgroup = caps->sub_min;
    if (t->subgroup > caps->sub_max)
        t->subgroup = caps->sub_max;
}

static uint32_t min3(const uint32_t v[3])
{
    uint32_t m = v[0] < v[1] ? v[0] : v[1];
    return m < v[2] ? m : v[2];
}

static bool texel_formats(VkPhysicalDevice phys)
{
    static const VkFormat formats[] = {VK_FORMAT_R32G32B32A32_SFLOAT, VK_FORMAT_R32G32B32A32_UINT,
                                       VK_FORMAT_R16G16B16A16_SFLOAT};
    for (size_t i = 0; i < IPT_COUNT(formats); i++) {
        VkFormatProperties p;
        vkGetPhysicalDeviceFormatProperties(phys, formats[i], &p);
        if (!(p.bufferFeatures & VK_FORMAT_FEATURE_STORAGE_TEXEL_BUFFER_BIT))
            return false;
    }
    return true;
}

/* simd / texel: by device, then by `kernels`, then by environment. */
static void derive_shape(ipt_vk_device *d, uint32_t max_views, const char *kernels)
{
    ipt_traits *t = &d->info.traits;
    const char *env = getenv("IPT_KERNELS"), *texel = getenv("IPT_TEXEL");
    const char *force = kernels ? kernels : env;
    t->simd = d->info.type == IPT_GPU_CPU;
    if (force && strcmp(force, "simd") == 0)
        t->simd = true;
    if (force && strcmp(force, "tile") == 0)
        t->simd = false;
    const char *winograd = getenv("IPT_WINOGRAD");
    t->winograd = winograd && *winograd ? (uint8_t)(strtoul(winograd, NULL, 10) & 3) : 1;
    uint32_t s = t->subgroup;
    if (!t->subgroup_shuffle || !(s == 4 || s == 8 || s == 16 || s == 32 || s == 64))
        t->simd = false;
    t->texel = d->caps.llvmpipe;
    if (texel && *texel)
        t->texel = strcmp(texel, "0") != 0;
    t->texel = t->texel && t->simd && max_views >= MIN_VIEWS && t->max_texels >= MIN_TEXELS &&
               texel_formats(d->phys);
}

static void derive_traits(ipt_vk_device *d, const query *q, const char *kernels)
{
    const VkPhysicalDeviceLimits *l = &q->props.properties.limits;
    ipt_traits *t = &d->info.traits;
    VkDeviceSize a = l->minStorageBufferOffsetAlignment, b = l->minTexelBufferOffsetAlignment;
    t->f16_storage = q->f11.storageBuffer16BitAccess && q->f12.shaderFloat16;
    t->max_invocations = l->maxComputeWorkGroupInvocations;
    t->max_group_count = min3(l->maxComputeWorkGroupCount);
    t->shared_bytes = l->maxComputeSharedMemorySize;
    t->align = (uint32_t)(a > b ? a : b);
    if (t->align < 16)
        t->align = 16; /* kernels load vec4 */
    t->max_range = l->maxStorageBufferRange < MAX_RANGE ? l->maxStorageBufferRange : MAX_RANGE;
    const char *range = getenv("IPT_MAX_BINDING");
    uint64_t lower = range ? strtoull(range, NULL, 10) : 0;
    if (lower >= MIN_RANGE && lower < t->max_range)
        t->max_range = lower;
    t->max_texels = l->maxTexelBufferElements;
    d->caps.llvmpipe = q->p12.driverID == VK_DRIVER_ID_MESA_LLVMPIPE;
    d->caps.max_buffer = q->p_m4.maxBufferSize ? q->p_m4.maxBufferSize : UINT64_MAX;
    t->max_buffer = d->caps.max_buffer < q->p11.maxMemoryAllocationSize
                        ? d->caps.max_buffer
                        : q->p11.maxMemoryAllocationSize;
    derive_subgroup(q, &d->caps, t);
    derive_shape(d, l->maxPerStageDescriptorStorageImages, kernels);
}

static const char *unusable(const ipt_vk_device *d, const query *q, bool compute)
{
    if (!compute)
        return "no compute queue";
    if (!q->f12.timelineSemaphore)
        return "no timeline semaphores";
    if (q->props.properties.limits.maxPerStageDescriptorStorageBuffers < MIN_SSBO)
        return "fewer than 8 storage buffers per shader stage";
    if (d->info.traits.align > IPT_VK_ALIGN)
        return "buffer offset alignment above 256 bytes";
    return NULL;
}

static ipt_status read_extensions(ipt_ctx *ctx, VkPhysicalDevice phys, query *q)
{
    uint32_t n = 0;
    if (vkEnumerateDeviceExtensionProperties(phys, NULL, &n, NULL) != VK_SUCCESS)
        return IPT_OK; /* a device that cannot say has none */
    q->ext = ipt_calloc(ctx, n, sizeof *q->ext);
    if (!q->ext)
        return IPT_ERR_NOMEM;
    VkResult r = vkEnumerateDeviceExtensionProperties(phys, NULL, &n, q->ext);
    q->n_ext = r == VK_SUCCESS || r == VK_INCOMPLETE ? n : 0;
    return IPT_OK;
}

static ipt_status fill(ipt_ctx *ctx, VkInstance instance, uint32_t api, const char *kernels,
                       ipt_vk_device *d)
{
    ipt_status status = IPT_OK;
    query q = {.n_ext = 0};
    bool compute = false;
    const char *why = NULL;
    VkPhysicalDeviceProperties *p = &d->caps.props;
    ipt_gpu_info *info = &d->info;
    vkGetPhysicalDeviceProperties(d->phys, p);
    snprintf(info->name, sizeof info->name, "%s", p->deviceName);
    snprintf(info->api, sizeof info->api, "%u.%u.%u", VK_API_VERSION_MAJOR(p->apiVersion),
             VK_API_VERSION_MINOR(p->apiVersion), VK_API_VERSION_PATCH(p->apiVersion));
    info->vendor_id = p->vendorID;
    info->device_id = p->deviceID;
    info->type = type_of(p->deviceType);
    d->caps.api = p->apiVersion < api ? p->apiVersion : api;
    if (p->apiVersion < VK_API_VERSION_1_2) {
        snprintf(info->why_not, sizeof info->why_not, "Vulkan %s, 1.2 is needed", info->api);
        return IPT_OK;
    }
    IPT_TRY(pick_family(ctx, d, &compute));
    IPT_TRY_GOTO(read_extensions(ctx, d->phys, &q), fail);
    d->caps.budget = has(&q, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
    d->caps.portability = has(&q, "VK_KHR_portability_subset");
    d->caps.ext_size_control = d->caps.api < VK_API_VERSION_1_3;
    read_heaps(d);
    query_run(d->phys, d->caps.api, &q);
    /* The driver's numeric version is packed by its vendor; its text says what people know. */
    snprintf(info->driver, sizeof info->driver, "%.100s %.150s", q.p12.driverName,
             q.p12.driverInfo);
    derive_traits(d, &q, kernels);
    IPT_TRY_GOTO(query_coopmat(ctx, instance, d->phys, &q, &info->traits), fail);
    why = unusable(d, &q, compute);
    info->usable = why == NULL;
    snprintf(info->why_not, sizeof info->why_not, "%s", why ? why : "");
fail:
    ipt_free(q.ext);
    return status;
}

/* Discrete, integrated, virtual, other, CPU; unusable ones after usable ones of their type. */
static int rank(const ipt_gpu_info *i)
{
    static const int of_type[] = {[IPT_GPU_DISCRETE] = 0,
                                  [IPT_GPU_INTEGRATED] = 1,
                                  [IPT_GPU_VIRTUAL] = 2,
                                  [IPT_GPU_OTHER] = 3,
                                  [IPT_GPU_CPU] = 4};
    return of_type[i->type] * 2 + (i->usable ? 0 : 1);
}

ipt_status ipt_vk_enumerate(ipt_ctx *ctx, VkInstance instance, uint32_t api, const char *kernels,
                            ipt_vk_device **list, size_t *n)
{
    ipt_status status = IPT_OK;
    ipt_vk_device *devs = NULL;
    VkPhysicalDevice *phys = NULL;
    uint32_t count = 0;
    VkResult r = vkEnumeratePhysicalDevices(instance, &count, NULL);
    if (r != VK_SUCCESS)
        count = 0;
    phys = ipt_calloc(ctx, count, sizeof *phys);
    devs = ipt_calloc(ctx, count, sizeof *devs);
    if (!phys || !devs) {
        status = IPT_ERR_NOMEM;
        goto fail;
    }
    if (count > 0) {
        r = vkEnumeratePhysicalDevices(instance, &count, phys);
        if (r != VK_SUCCESS && r != VK_INCOMPLETE)
            count = 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        devs[i].phys = phys[i];
        IPT_TRY_GOTO(fill(ctx, instance, api, kernels, &devs[i]), fail);
    }
    for (uint32_t i = 1; i < count; i++) /* stable: the loader's order breaks ties */
        for (uint32_t j = i; j > 0 && rank(&devs[j].info) < rank(&devs[j - 1].info); j--) {
            ipt_vk_device tmp = devs[j];
            devs[j] = devs[j - 1];
            devs[j - 1] = tmp;
        }
    ipt_free(phys);
    *list = devs;
    *n = count;
    return IPT_OK;
fail:
    ipt_free(phys);
    ipt_free(devs);
    return status;
}
