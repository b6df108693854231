/* vk/device.c - the instance, the list of devices, the choice, the logical device and its end.
 * Must not know: slabs, pipelines, commands beyond their init and finish. */
#include "vk/vk_internal.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const char LAYER[] = "VK_LAYER_KHRONOS_validation";

/* --- statuses -------------------------------------------------------------------------------- */
static const char *result_name(VkResult r)
{
    static const struct {
        VkResult r;
        const char *name;
    } names[] = {
        {VK_ERROR_OUT_OF_HOST_MEMORY, "out of host memory"},
        {VK_ERROR_OUT_OF_DEVICE_MEMORY, "out of device memory"},
        {VK_ERROR_INITIALIZATION_FAILED, "initialisation failed"},
        {VK_ERROR_DEVICE_LOST, "device lost"},
        {VK_ERROR_MEMORY_MAP_FAILED, "memory map failed"},
        {VK_ERROR_LAYER_NOT_PRESENT, "layer not present"},
        {VK_ERROR_EXTENSION_NOT_PRESENT, "extension not present"},
        {VK_ERROR_FEATURE_NOT_PRESENT, "feature not present"},
        {VK_ERROR_INCOMPATIBLE_DRIVER, "incompatible driver"},
        {VK_ERROR_TOO_MANY_OBJECTS, "too many objects"},
        {VK_ERROR_FRAGMENTED_POOL, "fragmented pool"},
        {VK_ERROR_OUT_OF_POOL_MEMORY, "out of pool memory"},
    };
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        if (names[i].r == r)
            return names[i].name;
    return "driver error";
}

ipt_status ipt_vk_alive(ipt_gpu *gpu)
{
    if (!gpu->lost)
        return IPT_OK;
    return ipt_fail(gpu->ctx, IPT_ERR_DEVICE_LOST,
                    "%s: the device was lost (driver reset or crash); start again",
                    gpu->dev.info.name);
}

ipt_status ipt_vk_check(ipt_gpu *gpu, VkResult r, const char *what)
{
    if (r >= 0)
        return IPT_OK;
    if (r == VK_ERROR_DEVICE_LOST) {
        gpu->lost = true;
        return ipt_vk_alive(gpu);
    }
    ipt_status s = IPT_ERR_UNSUPPORTED;
    if (r == VK_ERROR_OUT_OF_HOST_MEMORY)
        s = IPT_ERR_NOMEM;
    if (r == VK_ERROR_OUT_OF_DEVICE_MEMORY || r == VK_ERROR_OUT_OF_POOL_MEMORY ||
        r == VK_ERROR_FRAGMENTED_POOL || r == VK_ERROR_TOO_MANY_OBJECTS ||
        r == VK_ERROR_MEMORY_MAP_FAILED)
        s = IPT_ERR_DEVICE_MEM;
    return ipt_fail(gpu->ctx, s, "%s: %s: %s (%d)%s", gpu->dev.info.name, what, result_name(r),
                    (int)r, s == IPT_ERR_DEVICE_MEM ? "; try --vram-limit" IPT_VK_MEM_ADVICE : "");
}

/* --- instance -------------------------------------------------------------------------------- */
static ipt_status no_device(ipt_ctx *ctx)
{
    return ipt_fail(ctx, IPT_ERR_NO_DEVICE,
                    "no Vulkan device found: install a driver (Debian: apt install "
                    "mesa-vulkan-drivers gives the CPU device lavapipe)");
}

/* Counts and forwards.  The messenger asks for validation and performance types only: messages of
 * type GENERAL come from the loader and tell of the machine's drivers, not of our calls. */
static VKAPI_ATTR VkBool32 VKAPI_CALL on_message(VkDebugUtilsMessageSeverityFlagBitsEXT severity,
                                                 VkDebugUtilsMessageTypeFlagsEXT types,
                                                 const VkDebugUtilsMessengerCallbackDataEXT *data,
                                                 void *user)
{
    ipt_gpu *gpu = user;
    (void)types;
    bool is_error = (severity & VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT) != 0;
    const char *id = data->pMessageIdName ? data->pMessageIdName : "";
    const char *text = data->pMessage ? data->pMessage : "";
    /* What the loader, the drivers' own layers and the drivers look up is not our doing: this
     * program never calls vkGetDeviceProcAddr.  (NVIDIA 580 asks there for a function of the
     * instance.) */
    if (strcmp(id, "WARNING-vkGetDeviceProcAddr-device") == 0)
        return VK_FALSE;
    atomic_fetch_add(&gpu->n_messages, 1);
    if (strstr(text, id)) /* older layers repeat the name in the text */
        id = "";
    ipt_log(gpu->ctx, is_error ? IPT_LOG_ERROR : IPT_LOG_WARN, "Vulkan validation: %s%s%s", id,
            *id ? ": " : "", text);
    return VK_FALSE;
}

static bool has_layer(ipt_ctx *ctx, const char *name)
{
    uint32_t n = 0;
    bool found = false;
    if (vkEnumerateInstanceLayerProperties(&n, NULL) != VK_SUCCESS)
        return false;
    VkLayerProperties *l = ipt_calloc(ctx, n, sizeof *l);
    if (!l)
        return false;
    VkResult r = vkEnumerateInstanceLayerProperties(&n, l);
    for (uint32_t i = 0; (r == VK_SUCCESS || r == VK_INCOMPLETE) && i < n; i++)
        found = found || strcmp(l[i].layerName, name) == 0;
    ipt_free(l);
    return found;
}

/* layer: NULL for what the loader and the drivers offer. */
static bool has_instance_extension(ipt_ctx *ctx, const char *layer, const char *name)
{
    uint32_t n = 0;
    if (vkEnumerateInstanceExtensionProperties(layer, &n, NULL) != VK_SUCCESS)
        return false;
    VkExtensionProperties *e = ipt_calloc(ctx, n, sizeof *e);
    if (!e)
        return false;
    VkResult r = vkEnumerateInstanceExtensionProperties(layer, &n, e);
    bool found = (r == VK_SUCCESS || r == VK_INCOMPLETE) && ipt_vk_has_extension(e, n, name);
    ipt_free(e);
    return found;
}

/* messages: the gpu whose messenger receives validation messages; NULL without the layer. */
static ipt_status make_instance(ipt_ctx *ctx, ipt_gpu *messages, VkInstance *out, uint32_t *api)
{
    uint32_t loader = VK_API_VERSION_1_0, n_ext = 0;
    const char *ext[3], *const layers[] = {LAYER};
    const char *portability = "VK_KHR_portability_enumeration";
    VkInstanceCreateFlags flags = 0;
    if (vkEnumerateInstanceVersion(&loader) != VK_SUCCESS || loader < VK_API_VERSION_1_1)
        return ipt_fail(ctx, IPT_ERR_NO_DEVICE,
                        "the Vulkan loader is too old (1.0): install version 1.2 or newer");
    *api = loader >= VK_API_VERSION_1_3 ? VK_API_VERSION_1_3 : VK_API_VERSION_1_2;
    if (has_instance_extension(ctx, NULL, portability)) {
        ext[n_ext++] = portability;
        flags |= 0x1; /* VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR, absent in old headers */
    }
    if (messages && !has_layer(ctx, LAYER))
        return ipt_fail(ctx, IPT_ERR_MISSING,
                        "the layer %s is not installed (Debian: apt install "
                        "vulkan-validationlayers)",
                        LAYER);
    if (messages)
        ext[n_ext++] = VK_EXT_DEBUG_UTILS_EXTENSION_NAME;
    if (messages && has_instance_extension(ctx, LAYER, VK_EXT_VALIDATION_FEATURES_EXTENSION_NAME))
        ext[n_ext++] = VK_EXT_VALIDATION_FEATURES_EXTENSION_NAME;
    VkDebugUtilsMessengerCreateInfoEXT messenger = {
        .sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT,
        .messageSeverity = VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT |
                           VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT,
        .messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT |
                       VK_DEBUG_UTILS_MESSAGE_TYPE_PERFORMANCE_BIT_EXT,
        .pfnUserCallback = on_message,
        .pUserData = messages};
    const VkValidationFeatureEnableEXT enable =
        VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT;
    VkValidationFeaturesEXT features = {.sType = VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT,
                                        .pNext = &messenger,
                                        .enabledValidationFeatureCount = 1,
                                        .pEnabledValidationFeatures = &enable};
    VkApplicationInfo app = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO,
                             .pApplicationName = "impasto",
                             .pEngineName = "impasto",
                             .apiVersion = *api};
    VkInstanceCreateInfo info = {.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
                                 .pNext = messages ? &features : NULL,
                                 .flags = flags,
                                 .pApplicationInfo = &app,
                                 .enabledLayerCount = messages ? 1 : 0,
                                 .ppEnabledLayerNames = layers,
                                 .enabledExtensionCount = n_ext,
                                 .ppEnabledExtensionNames = ext};
    VkResult r = vkCreateInstance(&info, NULL, out);
    if (r == VK_ERROR_OUT_OF_HOST_MEMORY)
        return ipt_fail(ctx, IPT_ERR_NOMEM, "out of memory: the Vulkan instance");
    if (r == VK_ERROR_LAYER_NOT_PRESENT || r == VK_ERROR_EXTENSION_NOT_PRESENT)
        return ipt_fail(ctx, IPT_ERR_MISSING, "the layer %s cannot be loaded: %s", LAYER,
                        result_name(r));
    if (r != VK_SUCCESS)
        return no_device(ctx);
    if (messages) {
        PFN_vkCreateDebugUtilsMessengerEXT create =
            (PFN_vkCreateDebugUtilsMessengerEXT)vkGetInstanceProcAddr(
                *out, "vkCreateDebugUtilsMessengerEXT");
        if (create && create(*out, &messenger, NULL, &messages->messenger) != VK_SUCCESS)
            messages->messenger = VK_NULL_HANDLE;
    }
    return IPT_OK;
}

ipt_status ipt_gpu_list(ipt_ctx *ctx, ipt_gpu_info **list, size_t *n)
{
    VkInstance instance = VK_NULL_HANDLE;
    uint32_t api = 0;
    ipt_vk_device *devs = NULL;
    size_t count = 0;
    IPT_TRY(make_instance(ctx, NULL, &instance, &api));
    ipt_status status = ipt_vk_enumerate(ctx, instance, api, NULL, &devs, &count);
    vkDestroyInstance(instance, NULL);
    if (status != IPT_OK)
        return status;
    if (count == 0) {
        ipt_free(devs);
        return no_device(ctx);
    }
    ipt_gpu_info *infos = ipt_calloc(ctx, count, sizeof *infos);
    if (!infos) {
        ipt_free(devs);
        return IPT_ERR_NOMEM;
    }
    for (size_t i = 0; i < count; i++)
        infos[i] = devs[i].info;
    ipt_free(devs);
    *list = infos;
    *n = count;
    return IPT_OK;
}

/* --- choice ---------------------------------------------------------------------------------- */
static bool contains(const char *hay, const char *needle)
{
    size_t n = strlen(needle);
    for (; *hay; hay++)
        if (strncasecmp(hay, needle, n) == 0)
            return true;
    return false;
}

/* Index of the device that `want` names, or n. */
static size_t find_device(const ipt_vk_device *devs, size_t n, const char *want)
{
    size_t len = strlen(want);
    if (len > 0 && strspn(want, "0123456789") == len) {
        unsigned long i = len < 10 ? strtoul(want, NULL, 10) : n;
        return i < n ? i : n;
    }
    if (strcasecmp(want, "cpu") == 0)
        for (size_t i = 0; i < n; i++)
            if (devs[i].info.type == IPT_GPU_CPU)
                return i;
    for (size_t i = 0; i < n; i++)
        if (devs[i].info.usable && contains(devs[i].info.name, want))
            return i;
    for (size_t i = 0; i < n; i++)
        if (contains(devs[i].info.name, want))
            return i;
    return n;
}

static ipt_status no_match(ipt_ctx *ctx, const ipt_vk_device *devs, size_t n, const char *want)
{
    char found[640] = "";
    size_t at = 0;
    for (size_t i = 0; i < n && at < sizeof found; i++) {
        int len = snprintf(found + at, sizeof found - at, "%s%zu: %s", i ? "; " : "", i,
                           devs[i].info.name);
        at += len > 0 ? (size_t)len : 0;
    }
    return ipt_fail(ctx, IPT_ERR_NO_DEVICE, "no Vulkan device matches \"%.100s\"; there are: %s",
                    want, found);
}

static ipt_status choose(ipt_ctx *ctx, const ipt_vk_device *devs, size_t n, const char *want,
                         ipt_vk_device *out)
{
    size_t i = 0;
    if (n == 0)
        return no_device(ctx);
    if (want && *want) {
        i = find_device(devs, n, want);
        if (i == n)
            return no_match(ctx, devs, n, want);
    } else {
        while (i < n && !devs[i].info.usable)
            i++;
        if (i == n)
            i = 0; /* none is usable: say why the best one is not */
    }
    if (!devs[i].info.usable)
        return ipt_fail(ctx, IPT_ERR_UNSUPPORTED, "%s cannot be used: %s", devs[i].info.name,
                        devs[i].info.why_not);
    *out = devs[i];
    return IPT_OK;
}

/* --- logical device --------------------------------------------------------------------------- */
/* Enables what the traits promise and the device has, nothing else. */
static ipt_status make_device(ipt_gpu *gpu)
{
    const ipt_vk_caps *caps = &gpu->dev.caps;
    const ipt_traits *t = &gpu->dev.info.traits;
    const char *ext[4];
    uint32_t n_ext = 0;
    const float priority = 0.5f;
    VkDeviceQueueCreateInfo queue = {.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
                                     .queueFamilyIndex = caps->family,
                                     .queueCount = 1,
                                     .pQueuePriorities = &priority};
    VkPhysicalDeviceSubgroupSizeControlFeatures sub = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES,
        .subgroupSizeControl = VK_TRUE};
    VkPhysicalDeviceVulkan12Features f12 = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
        .shaderFloat16 = t->f16_storage,
        .vulkanMemoryModel = t->coop_m > 0,
        .timelineSemaphore = VK_TRUE};
    VkPhysicalDeviceVulkan11Features f11 = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES,
        .pNext = &f12,
        .storageBuffer16BitAccess = t->f16_storage};
    if (caps->sub_max > 0) {
        sub.pNext = f12.pNext;
        f12.pNext = &sub;
        if (caps->ext_size_control)
            ext[n_ext++] = VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME;
    }
#ifdef VK_KHR_cooperative_matrix
    VkPhysicalDeviceCooperativeMatrixFeaturesKHR coop = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR,
        .cooperativeMatrix = VK_TRUE};
    if (t->coop_m > 0) {
        coop.pNext = f12.pNext;
        f12.pNext = &coop;
        ext[n_ext++] = VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME;
    }
#endif
    if (caps->budget)
        ext[n_ext++] = VK_EXT_MEMORY_BUDGET_EXTENSION_NAME;
    if (caps->portability)
        ext[n_ext++] = "VK_KHR_portability_subset";
    VkDeviceCreateInfo info = {.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
                               .pNext = &f11,
                               .queueCreateInfoCount = 1,
                               .pQueueCreateInfos = &queue,
                               .enabledExtensionCount = n_ext,
                               .ppEnabledExtensionNames = ext};
    IPT_TRY(ipt_vk_check(gpu, vkCreateDevice(gpu->dev.phys, &info, NULL, &gpu->device),
                         "cannot open the device"));
    vkGetDeviceQueue(gpu->device, caps->family, 0, &gpu->queue);
    VkSemaphoreTypeCreateInfo type = {.sType = VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO,
                                      .semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE};
    VkSemaphoreCreateInfo sem = {.sType = VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO, .pNext = &type};
    return ipt_vk_check(gpu, vkCreateSemaphore(gpu->device, &sem, NULL, &gpu->timeline),
                        "cannot make a timeline semaphore");
}

static ipt_status check_kernels(ipt_ctx *ctx, const char *kernels, const char *from)
{
    if (!kernels || strcmp(kernels, "simd") == 0 || strcmp(kernels, "tile") == 0)
        return IPT_OK;
    return ipt_fail(ctx, IPT_ERR_ARG, "%s: \"%.40s\" is neither simd nor tile", from, kernels);
}

ipt_status ipt_gpu_create(ipt_ctx *ctx, const ipt_gpu_opts *o, ipt_gpu **out)
{
    const ipt_gpu_opts defaults = {.device = NULL};
    ipt_status status = IPT_OK;
    ipt_vk_device *devs = NULL;
    size_t n = 0;
    uint32_t api = 0;
    if (!o)
        o = &defaults;
    const char *kernels = o->kernels ? o->kernels : getenv("IPT_KERNELS");
    IPT_TRY(check_kernels(ctx, kernels, o->kernels ? "kernels" : "IPT_KERNELS"));
    ipt_gpu *gpu = ipt_alloc(ctx, sizeof *gpu);
    if (!gpu)
        return IPT_ERR_NOMEM;
    gpu->ctx = ctx;
    gpu->memory_limit = o->memory_limit;
    atomic_init(&gpu->n_messages, 0);
    IPT_TRY_GOTO(make_instance(ctx, o->validate ? gpu : NULL, &gpu->instance, &api), fail);
    IPT_TRY_GOTO(ipt_vk_enumerate(ctx, gpu->instance, api, kernels, &devs, &n), fail);
    IPT_TRY_GOTO(choose(ctx, devs, n, o->device, &gpu->dev), fail);
    ipt_free(devs);
    devs = NULL;
    if (kernels && strcmp(kernels, "simd") == 0 && !gpu->dev.info.traits.simd)
        ipt_log(ctx, IPT_LOG_WARN, "%s cannot run simd kernels (subgroup shuffle): using tile",
                gpu->dev.info.name);
    IPT_TRY_GOTO(make_device(gpu), fail);
    ipt_vk_memory_init(gpu);
    IPT_TRY_GOTO(ipt_vk_kernels_init(gpu, o->cache_dir), fail);
    *out = gpu;
    return IPT_OK;
fail:
    ipt_free(devs);
    ipt_gpu_destroy(&gpu);
    return status;
}

void ipt_gpu_destroy(ipt_gpu **pgpu)
{
    if (!pgpu || !*pgpu)
        return;
    ipt_gpu *gpu = *pgpu;
    if (gpu->device) {
        vkDeviceWaitIdle(gpu->device);
        ipt_vk_kernels_finish(gpu);
        ipt_vk_memory_finish(gpu);
        vkDestroySemaphore(gpu->device, gpu->timeline, NULL);
        vkDestroyDevice(gpu->device, NULL);
    }
    if (gpu->messenger) {
        PFN_vkDestroyDebugUtilsMessengerEXT destroy =
            (PFN_vkDestroyDebugUtilsMessengerEXT)vkGetInstanceProcAddr(
                gpu->instance, "vkDestroyDebugUtilsMessengerEXT");
        if (destroy)
            destroy(gpu->instance, gpu->messenger, NULL);
    }
    if (gpu->instance)
        vkDestroyInstance(gpu->instance, NULL);
    ipt_free(gpu);
    *pgpu = NULL;
}

const ipt_gpu_info *ipt_gpu_get_info(const ipt_gpu *gpu) { return &gpu->dev.info; }
const ipt_traits *ipt_gpu_traits(const ipt_gpu *gpu) { return &gpu->dev.info.traits; }
void ipt_gpu_limit_traits(ipt_gpu *gpu, const ipt_traits *t)
{
    const VkPhysicalDeviceLimits *l = &gpu->dev.caps.props.limits;
    ipt_traits *own = &gpu->dev.info.traits;
    if (t->max_range <= l->maxStorageBufferRange)
        own->max_range = t->max_range;
    if (t->max_texels <= l->maxTexelBufferElements)
        own->max_texels = t->max_texels;
    own->max_buffer = t->max_buffer;
    own->max_group_count = t->max_group_count;
    own->align = t->align;
    own->winograd = t->winograd;
    own->coop_emulated = t->coop_emulated;
    own->coop_m = t->coop_m;
    own->coop_n = t->coop_n;
    own->coop_k = t->coop_k;
}
ipt_ctx *ipt_gpu_ctx(const ipt_gpu *gpu) { return gpu->ctx; }
uint32_t ipt_gpu_validation_count(const ipt_gpu *gpu) { return atomic_load(&gpu->n_messages); }
