/* vk/kernel.c - pipelines: one for each description, made once, kept until the gpu dies; and the
 * pipeline cache on disk.  Must not know: memory, commands. */
#include "shaders/registry.h"
#include "vk/vk_internal.h"

#include <limits.h>
#include <string.h>

/* --- the cache file: our header, then what the driver gave ------------------------------------ */
/* Drivers check their own header only, and some crash on damaged content: hence the digest. */
typedef struct cache_head {
    char magic[8];
    uint64_t bytes;
    uint8_t digest[32];
} cache_head;
static const char MAGIC[8] = {'I', 'P', 'T', 'P', 'I', 'P', 'E', '1'};
enum { CACHE_MAX = 256 << 20, VK_HEAD = 32 };

static void digest_of(const void *data, size_t n, uint8_t out[32])
{
    ipt_sha256 s;
    ipt_sha256_init(&s);
    ipt_sha256_update(&s, data, n);
    ipt_sha256_final(&s, out);
}

/* The folder for cache files in buf, or false: no cache. */
static bool cache_folder(const char *dir, char *buf, size_t n)
{
    return dir ? *dir && strlen(dir) < n && (strcpy(buf, dir), true) : ipt_cache_dir(buf, n);
}

static bool cache_name(ipt_gpu *gpu, const char *dir, char *path, size_t n)
{
    char folder[PATH_MAX], uuid[2 * VK_UUID_SIZE + 1], name[128];
    const VkPhysicalDeviceProperties *p = &gpu->dev.caps.props;
    if (!cache_folder(dir, folder, sizeof folder))
        return false;
    ipt_hex(p->pipelineCacheUUID, VK_UUID_SIZE, uuid);
    snprintf(name, sizeof name, "pipelines-%04x-%04x-%08x-%s.bin", p->vendorID, p->deviceID,
             p->driverVersion, uuid);
    return ipt_path_join(path, n, folder, name);
}

/* True when the bytes are a cache that this driver of this device wrote. */
static bool cache_fits(const ipt_gpu *gpu, const char *file, size_t n)
{
    const VkPhysicalDeviceProperties *p = &gpu->dev.caps.props;
    cache_head head;
    uint8_t digest[32];
    uint32_t vk[4];
    if (n < sizeof head + VK_HEAD)
        return false;
    memcpy(&head, file, sizeof head);
    const char *data = file + sizeof head;
    if (memcmp(head.magic, MAGIC, sizeof MAGIC) != 0 || head.bytes != n - sizeof head)
        return false;
    digest_of(data, n - sizeof head, digest);
    if (memcmp(digest, head.digest, sizeof digest) != 0)
        return false;
    memcpy(vk, data, sizeof vk);
    return vk[0] >= VK_HEAD && vk[1] == VK_PIPELINE_CACHE_HEADER_VERSION_ONE &&
           vk[2] == p->vendorID && vk[3] == p->deviceID &&
           memcmp(data + sizeof vk, p->pipelineCacheUUID, VK_UUID_SIZE) == 0;
}

ipt_status ipt_vk_kernels_init(ipt_gpu *gpu, const char *cache_dir)
{
    char path[PATH_MAX], *file = NULL;
    size_t n = 0;
    VkPipelineCacheCreateInfo info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO};
    if (cache_name(gpu, cache_dir, path, sizeof path)) {
        gpu->cache_path = ipt_strdup(gpu->ctx, path);
        if (!gpu->cache_path)
            return IPT_ERR_NOMEM;
        /* No ctx: a cache that cannot be read is no failure and must leave no message. */
        if (ipt_is_file(path) && ipt_file_read(NULL, path, CACHE_MAX, &file, &n) == IPT_OK &&
            cache_fits(gpu, file, n)) {
            info.pInitialData = file + sizeof(cache_head);
            info.initialDataSize = n - sizeof(cache_head);
            digest_of(info.pInitialData, info.initialDataSize, gpu->cache_digest);
            ipt_log(gpu->ctx, IPT_LOG_DEBUG, "pipeline cache: %zu bytes from %s",
                    info.initialDataSize, path);
        } else if (file) {
            ipt_log(gpu->ctx, IPT_LOG_INFO, "pipeline cache %s is not usable: ignored", path);
        }
    }
    VkResult r = vkCreatePipelineCache(gpu->device, &info, NULL, &gpu->cache);
    if (r != VK_SUCCESS && info.initialDataSize > 0) {
        info.pInitialData = NULL;
        info.initialDataSize = 0;
        r = vkCreatePipelineCache(gpu->device, &info, NULL, &gpu->cache);
    }
    ipt_free(file);
    if (r != VK_SUCCESS)
        gpu->cache = VK_NULL_HANDLE; /* pipelines can be made without */
    return IPT_OK;
}

/* Writes what the driver has gathered, when that is not what was loaded.  Failures are ignored. */
static void save_cache(ipt_gpu *gpu)
{
    size_t n = 0;
    char folder[PATH_MAX];
    cache_head head = {.bytes = 0};
    if (!gpu->cache_path || !gpu->cache || gpu->n_kernel == 0 || gpu->lost)
        return;
    if (vkGetPipelineCacheData(gpu->device, gpu->cache, &n, NULL) != VK_SUCCESS || n < VK_HEAD ||
        n > CACHE_MAX - sizeof head)
        return;
    char *file = ipt_alloc(NULL, sizeof head + n);
    if (!file)
        return;
    char *data = file + sizeof head;
    /* lavapipe of Mesa 26.2 then gives 20 bytes of the 32 that it promised: nothing to keep. */
    if (vkGetPipelineCacheData(gpu->device, gpu->cache, &n, data) == VK_SUCCESS && n >= VK_HEAD) {
        memcpy(head.magic, MAGIC, sizeof MAGIC);
        head.bytes = n;
        digest_of(data, n, head.digest);
        memcpy(file, &head, sizeof head);
        snprintf(folder, sizeof folder, "%s", gpu->cache_path);
        *strrchr(folder, '/') = 0;
        if (memcmp(head.digest, gpu->cache_digest, sizeof head.digest) != 0 &&
            ipt_make_dirs(folder) &&
            ipt_file_write(NULL, gpu->cache_path, file, sizeof head + n) != IPT_OK)
            ipt_log(gpu->ctx, IPT_LOG_DEBUG, "pipeline cache %s was not written", gpu->cache_path);
    }
    ipt_free(file);
}

/* --- pipelines -------------------------------------------------------------------------------- */
static void destroy_kernel(ipt_gpu *gpu, ipt_kernel *k)
{
    vkDestroyPipeline(gpu->device, k->pipeline, NULL);
    vkDestroyPipelineLayout(gpu->device, k->layout, NULL);
    vkDestroyDescriptorSetLayout(gpu->device, k->set_layout, NULL);
    ipt_free(k);
}

void ipt_vk_kernels_finish(ipt_gpu *gpu)
{
    save_cache(gpu);
    for (size_t i = 0; i < gpu->n_kernel; i++)
        destroy_kernel(gpu, gpu->kernel[i]);
    ipt_free(gpu->kernel);
    gpu->kernel = NULL;
    gpu->n_kernel = 0;
    vkDestroyPipelineCache(gpu->device, gpu->cache, NULL);
    ipt_free(gpu->cache_path);
    gpu->cache_path = NULL;
}

const ipt_shader *ipt_vk_shader(const char *name)
{
    for (const ipt_shader *s = ipt_shaders; s->name; s++)
        if (strcmp(s->name, name) == 0)
            return s;
    return NULL;
}

/* Entries after n_spec and n_bind do not count: they come out zero, and so does all padding, for
 * keys are compared as bytes. */
static void normal_form(const ipt_kernel_desc *d, const ipt_shader *s, ipt_kernel_desc *key)
{
    memset(key, 0, sizeof *key);
    key->shader = s->name;
    key->n_spec = d->n_spec;
    key->n_bind = d->n_bind;
    key->push_bytes = d->push_bytes;
    key->subgroup = d->subgroup;
    memcpy(key->spec, d->spec, d->n_spec * sizeof *d->spec);
    memcpy(key->kind, d->kind, d->n_bind * sizeof *d->kind);
}

static uint64_t hash_of(const ipt_kernel_desc *d) /* FNV-1a */
{
    const uint8_t *p = (const uint8_t *)d;
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < sizeof *d; i++)
        h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

static ipt_status make_layouts(ipt_gpu *gpu, ipt_kernel *k)
{
    VkDescriptorSetLayoutBinding b[IPT_MAX_BIND];
    const ipt_kernel_desc *d = &k->desc;
    for (uint32_t i = 0; i < d->n_bind; i++) {
        bool ssbo = d->kind[i] == IPT_BIND_SSBO;
        b[i] = (VkDescriptorSetLayoutBinding){.binding = i,
                                              .descriptorType =
                                                  ssbo ? VK_DESCRIPTOR_TYPE_STORAGE_BUFFER
                                                       : VK_DESCRIPTOR_TYPE_STORAGE_TEXEL_BUFFER,
                                              .descriptorCount = 1,
                                              .stageFlags = VK_SHADER_STAGE_COMPUTE_BIT};
        if (ssbo)
            k->n_ssbo++;
        else
            k->n_texel++;
    }
    VkDescriptorSetLayoutCreateInfo set = {.sType =
                                               VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO,
                                           .bindingCount = d->n_bind,
                                           .pBindings = b};
    IPT_TRY(ipt_vk_check(gpu, vkCreateDescriptorSetLayout(gpu->device, &set, NULL, &k->set_layout),
                         d->shader));
    VkPushConstantRange push = {.stageFlags = VK_SHADER_STAGE_COMPUTE_BIT, .size = d->push_bytes};
    VkPipelineLayoutCreateInfo layout = {.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
                                         .setLayoutCount = 1,
                                         .pSetLayouts = &k->set_layout,
                                         .pushConstantRangeCount = d->push_bytes ? 1 : 0,
                                         .pPushConstantRanges = &push};
    return ipt_vk_check(gpu, vkCreatePipelineLayout(gpu->device, &layout, NULL, &k->layout),
                        d->shader);
}

static ipt_status make_pipeline(ipt_gpu *gpu, ipt_kernel *k, const ipt_shader *s)
{
    const ipt_kernel_desc *d = &k->desc;
    const ipt_vk_caps *caps = &gpu->dev.caps;
    VkSpecializationMapEntry entry[IPT_MAX_SPEC];
    VkShaderModule module = VK_NULL_HANDLE;
    for (uint32_t i = 0; i < d->n_spec; i++)
        entry[i] =
            (VkSpecializationMapEntry){.constantID = i, .offset = i * 4, .size = sizeof *d->spec};
    VkSpecializationInfo spec = {.mapEntryCount = d->n_spec,
                                 .pMapEntries = entry,
                                 .dataSize = d->n_spec * sizeof *d->spec,
                                 .pData = d->spec};
    VkShaderModuleCreateInfo code = {.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO,
                                     .codeSize = s->bytes,
                                     .pCode = s->spirv};
    IPT_TRY(ipt_vk_check(gpu, vkCreateShaderModule(gpu->device, &code, NULL, &module), d->shader));
    /* Where sizes vary, traits.subgroup holds for every pipeline only because all ask for it. */
    uint32_t size = d->subgroup;
    if (size == 0 && caps->sub_min != caps->sub_max)
        size = gpu->dev.info.traits.subgroup;
    VkPipelineShaderStageRequiredSubgroupSizeCreateInfo sub = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO,
        .requiredSubgroupSize = size};
    bool require = size && caps->sub_max && size >= caps->sub_min && size <= caps->sub_max &&
                   (size & (size - 1)) == 0;
    VkComputePipelineCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
        .stage = {.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                  .pNext = require ? &sub : NULL,
                  .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                  .module = module,
                  .pName = "main",
                  .pSpecializationInfo = d->n_spec ? &spec : NULL},
        .layout = k->layout,
        .basePipelineIndex = -1};
    VkResult r = vkCreateComputePipelines(gpu->device, gpu->cache, 1, &info, NULL, &k->pipeline);
    vkDestroyShaderModule(gpu->device, module, NULL);
    if (r != VK_SUCCESS)
        k->pipeline = VK_NULL_HANDLE;
    return ipt_vk_check(gpu, r, d->shader);
}

static ipt_status check_desc(ipt_gpu *gpu, const ipt_kernel_desc *d)
{
    const ipt_traits *t = &gpu->dev.info.traits;
    IPT_TRY(ipt_vk_alive(gpu));
    if (!d->shader || d->n_spec > IPT_MAX_SPEC || d->n_bind > IPT_MAX_BIND ||
        d->push_bytes > IPT_MAX_PUSH || d->push_bytes % 4 != 0)
        return ipt_fail(gpu->ctx, IPT_ERR_ARG,
                        "kernel %s: %u constants, %u bindings, %u push bytes",
                        d->shader ? d->shader : "(none)", d->n_spec, d->n_bind, d->push_bytes);
    if (d->subgroup && !gpu->dev.caps.sub_max && d->subgroup != t->subgroup)
        return ipt_fail(gpu->ctx, IPT_ERR_UNSUPPORTED, "kernel %s wants subgroups of %u, %s has %u",
                        d->shader, d->subgroup, gpu->dev.info.name, t->subgroup);
    if (d->subgroup && gpu->dev.caps.sub_max &&
        (d->subgroup < gpu->dev.caps.sub_min || d->subgroup > gpu->dev.caps.sub_max))
        return ipt_fail(gpu->ctx, IPT_ERR_UNSUPPORTED,
                        "kernel %s wants subgroups of %u, %s has %u to %u", d->shader, d->subgroup,
                        gpu->dev.info.name, gpu->dev.caps.sub_min, gpu->dev.caps.sub_max);
    return IPT_OK;
}

/* The pipeline of a description in its normal form, or NULL. */
static ipt_kernel *find(const ipt_gpu *gpu, const ipt_kernel_desc *key, uint64_t hash)
{
    for (size_t i = 0; i < gpu->n_kernel; i++) {
        /* normal_form() zeroes the padding */
        /* NOLINTNEXTLINE(bugprone-suspicious-memory-comparison,cert-exp42-c,cert-flp37-c) */
        bool same = memcmp(&gpu->kernel[i]->desc, key, sizeof *key) == 0;
        if (gpu->kernel[i]->hash == hash && same)
            return gpu->kernel[i];
    }
    return NULL;
}

bool ipt_vk_has_kernel(const ipt_gpu *gpu, const ipt_kernel_desc *d)
{
    const ipt_shader *s = ipt_vk_shader(d->shader);
    ipt_kernel_desc key;
    if (!s)
        return false;
    normal_form(d, s, &key);
    return find(gpu, &key, hash_of(&key)) != NULL;
}

ipt_status ipt_kernel_get(ipt_gpu *gpu, const ipt_kernel_desc *d, ipt_kernel **out)
{
    ipt_status status = IPT_OK;
    IPT_TRY(check_desc(gpu, d));
    const ipt_shader *s = ipt_vk_shader(d->shader);
    if (!s)
        return ipt_fail(gpu->ctx, IPT_ERR_MISSING, "no shader \"%s\" in this build", d->shader);
    ipt_kernel_desc key;
    normal_form(d, s, &key);
    uint64_t hash = hash_of(&key);
    ipt_kernel *k = find(gpu, &key, hash);
    if (k) {
        *out = k;
        return IPT_OK;
    }
    if (gpu->n_kernel == gpu->cap_kernel) {
        size_t cap = gpu->cap_kernel ? 2 * gpu->cap_kernel : 64;
        ipt_kernel **grown =
            ipt_regrow(gpu->ctx, gpu->kernel, gpu->cap_kernel * sizeof *grown, cap * sizeof *grown);
        if (!grown)
            return IPT_ERR_NOMEM;
        gpu->kernel = grown;
        gpu->cap_kernel = cap;
    }
    k = ipt_alloc(gpu->ctx, sizeof *k);
    if (!k)
        return IPT_ERR_NOMEM;
    memcpy(&k->desc, &key, sizeof key);
    k->hash = hash;
    IPT_TRY_GOTO(make_layouts(gpu, k), fail);
    IPT_TRY_GOTO(make_pipeline(gpu, k, s), fail);
    gpu->kernel[gpu->n_kernel++] = k;
    *out = k;
    return IPT_OK;
fail:
    destroy_kernel(gpu, k);
    return status;
}
