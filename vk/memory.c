/* vk/memory.c - device memory: slabs with best-fit free blocks, deferred free, limit and
 * counters, and the staging ring for memory that the host cannot see.
 * Must not know: pipelines, descriptors. */
#include "vk/vk_internal.h"

#include <stdlib.h>
#include <string.h>

/* Larger than half of it: an allocation of its own.  No VkBuffer's size is a power of two: llvmpipe
 * compiles its shaders anew when that property of a texel view's buffer changes. */
static const uint64_t SLAB = (64u << 20) - IPT_VK_ALIGN;
static const uint64_t SLOT = 4u << 20; /* one of IPT_VK_SLOTS parts of the staging ring */
static const VkMemoryPropertyFlags LOCAL = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
static const VkMemoryPropertyFlags HOST =
    VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
static const VkMemoryPropertyFlags CACHED = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;

uint64_t ipt_gpu_used_bytes(const ipt_gpu *gpu) { return gpu->used; }
uint64_t ipt_gpu_peak_bytes(const ipt_gpu *gpu) { return gpu->peak; }
void ipt_gpu_alloc_fail_after(ipt_gpu *gpu, uint64_t n)
{
    gpu->fail_alloc = n ? gpu->n_alloc + n : 0;
}

/* --- vkAllocateMemory ------------------------------------------------------------------------- */
uint32_t ipt_vk_memory_type(const ipt_gpu *gpu, uint32_t bits, VkMemoryPropertyFlags flags)
{
    const VkPhysicalDeviceMemoryProperties *m = &gpu->dev.caps.memory;
    for (uint32_t i = 0; i < m->memoryTypeCount; i++)
        if ((bits & (1u << i)) && (m->memoryTypes[i].propertyFlags & flags) == flags)
            return i;
    return UINT32_MAX;
}

void ipt_vk_memory_init(ipt_gpu *gpu)
{
    const char *staging = getenv("IPT_STAGING");
    ipt_gpu_type t = gpu->dev.info.type;
    /* The host can write the memory of these devices at full speed. */
    gpu->host_visible = (t == IPT_GPU_CPU || t == IPT_GPU_INTEGRATED) &&
                        ipt_vk_memory_type(gpu, UINT32_MAX, HOST) != UINT32_MAX;
    if (staging && strcmp(staging, "1") == 0)
        gpu->host_visible = false;
}

/* One buffer with memory of the first of `n` kinds of memory that has room; mapped when asked.
 * VK_ERROR_OUT_OF_DEVICE_MEMORY is the caller's to explain. */
static VkResult back_buffer(ipt_gpu *gpu, uint64_t size, VkBufferUsageFlags usage,
                            const VkMemoryPropertyFlags *kinds, size_t n, bool map, ipt_slab *out)
{
    VkBufferCreateInfo info = {.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
                               .size = size,
                               .usage = usage,
                               .sharingMode = VK_SHARING_MODE_EXCLUSIVE};
    VkMemoryRequirements req;
    void *mapped = NULL;
    if (size > gpu->dev.caps.max_buffer)
        return VK_ERROR_OUT_OF_DEVICE_MEMORY;
    VkResult r = vkCreateBuffer(gpu->device, &info, NULL, &out->buffer);
    if (r != VK_SUCCESS) {
        out->buffer = VK_NULL_HANDLE;
        return r;
    }
    vkGetBufferMemoryRequirements(gpu->device, out->buffer, &req);
    gpu->n_alloc++;
    r = VK_ERROR_OUT_OF_DEVICE_MEMORY;
    if (!gpu->fail_alloc || gpu->n_alloc < gpu->fail_alloc)
        for (size_t i = 0; i < n && r != VK_SUCCESS; i++) {
            VkMemoryAllocateInfo a = {.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
                                      .allocationSize = req.size,
                                      .memoryTypeIndex =
                                          ipt_vk_memory_type(gpu, req.memoryTypeBits, kinds[i])};
            if (a.memoryTypeIndex != UINT32_MAX)
                r = vkAllocateMemory(gpu->device, &a, NULL, &out->memory);
        }
    if (r != VK_SUCCESS)
        out->memory = VK_NULL_HANDLE;
    else
        r = vkBindBufferMemory(gpu->device, out->buffer, out->memory, 0);
    if (r == VK_SUCCESS && map)
        r = vkMapMemory(gpu->device, out->memory, 0, VK_WHOLE_SIZE, 0, &mapped);
    if (r != VK_SUCCESS) {
        vkDestroyBuffer(gpu->device, out->buffer, NULL);
        vkFreeMemory(gpu->device, out->memory, NULL);
        out->buffer = VK_NULL_HANDLE;
        out->memory = VK_NULL_HANDLE;
        return r;
    }
    out->mapped = mapped;
    out->size = size;
    out->held = req.size;
    return VK_SUCCESS;
}

/* --- slabs ------------------------------------------------------------------------------------ */
static void free_slab(ipt_gpu *gpu, ipt_slab *s)
{
    ipt_slab **at = &gpu->slabs;
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    gpu->used -= s->held;
    vkDestroyBuffer(gpu->device, s->buffer, NULL);
    vkFreeMemory(gpu->device, s->memory, NULL); /* unmaps */
    while (s->first) {
        ipt_buffer *b = s->first;
        s->first = b->next;
        ipt_free(b);
    }
    ipt_free(s);
}

/* *out stays NULL when the device (or the limit) has no room: *r then tells. */
static ipt_status new_slab(ipt_gpu *gpu, uint64_t size, bool dedicated, VkResult *r, ipt_slab **out)
{
    const VkMemoryPropertyFlags host[] = {LOCAL | HOST | CACHED, LOCAL | HOST, HOST | CACHED, HOST};
    const VkMemoryPropertyFlags local[] = {LOCAL};
    *out = NULL;
    *r = VK_ERROR_OUT_OF_DEVICE_MEMORY;
    if (gpu->memory_limit &&
        (gpu->used > gpu->memory_limit || size > gpu->memory_limit - gpu->used))
        return IPT_OK;
    ipt_slab *s = ipt_alloc(gpu->ctx, sizeof *s);
    ipt_buffer *b = ipt_alloc(gpu->ctx, sizeof *b);
    if (!s || !b) {
        ipt_free(s);
        ipt_free(b);
        return IPT_ERR_NOMEM;
    }
    const VkBufferUsageFlags usage =
        VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_STORAGE_TEXEL_BUFFER_BIT |
        VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT;
    *r = gpu->host_visible ? back_buffer(gpu, size, usage, host, IPT_COUNT(host), true, s)
                           : back_buffer(gpu, size, usage, local, IPT_COUNT(local), false, s);
    if (*r != VK_SUCCESS) {
        ipt_free(s);
        ipt_free(b);
        return IPT_OK;
    }
    s->dedicated = dedicated;
    s->first = b;
    b->slab = s;
    b->size = size;
    s->next = gpu->slabs;
    gpu->slabs = s;
    gpu->used += s->held;
    if (gpu->used > gpu->peak)
        gpu->peak = gpu->used;
    *out = s;
    return IPT_OK;
}

/* Smallest free block that holds `size`, or NULL. */
static ipt_buffer *best_fit(ipt_gpu *gpu, uint64_t size)
{
    ipt_buffer *best = NULL;
    for (ipt_slab *s = gpu->slabs; s; s = s->next)
        for (ipt_buffer *b = s->first; b; b = b->next)
            if (!b->used && b->size >= size && (!best || b->size < best->size))
                best = b;
    return best;
}

/* Marks the front of free block `b` as used; the rest becomes a free block of its own. */
static ipt_status take(ipt_gpu *gpu, ipt_buffer *b, uint64_t size, uint64_t bytes)
{
    if (b->size > size) {
        ipt_buffer *rest = ipt_alloc(gpu->ctx, sizeof *rest);
        if (!rest)
            return IPT_ERR_NOMEM;
        rest->slab = b->slab;
        rest->off = b->off + size;
        rest->size = b->size - size;
        rest->prev = b;
        rest->next = b->next;
        if (rest->next)
            rest->next->prev = rest;
        b->next = rest;
        b->size = size;
    }
    b->used = true;
    b->bytes = bytes;
    b->slab->n_used++;
    return IPT_OK;
}

/* Joins `b` with the block after it. */
static void join_next(ipt_buffer *b)
{
    ipt_buffer *n = b->next;
    b->size += n->size;
    b->next = n->next;
    if (b->next)
        b->next->prev = b;
    ipt_free(n);
}

static bool another_empty(const ipt_gpu *gpu, const ipt_slab *but)
{
    for (const ipt_slab *s = gpu->slabs; s; s = s->next)
        if (s != but && s->n_used == 0)
            return true;
    return false;
}

static void give_back(ipt_gpu *gpu, ipt_buffer *b)
{
    ipt_slab *s = b->slab;
    b->used = false;
    b->bytes = 0;
    s->n_used--;
    if (b->next && !b->next->used)
        join_next(b);
    if (b->prev && !b->prev->used)
        join_next(b->prev);
    /* One empty slab is kept: the next plan is usually about as large as the last. */
    if (s->n_used == 0 && (s->dedicated || another_empty(gpu, s)))
        free_slab(gpu, s);
}

/* Frees the destroyed blocks that the GPU no longer uses. */
static void reclaim(ipt_gpu *gpu)
{
    uint64_t done = gpu->completed;
    if (!gpu->dead)
        return;
    if (gpu->lost)
        done = UINT64_MAX;
    else if (done < gpu->submitted &&
             vkGetSemaphoreCounterValue(gpu->device, gpu->timeline, &done) == VK_SUCCESS)
        gpu->completed = done;
    for (ipt_buffer **at = &gpu->dead; *at;) {
        ipt_buffer *b = *at;
        if (b->dead_at <= done) {
            *at = b->next_dead;
            give_back(gpu, b);
        } else {
            at = &b->next_dead;
        }
    }
}

static void free_empty_slabs(ipt_gpu *gpu)
{
    for (ipt_slab *s = gpu->slabs, *next; s; s = next) {
        next = s->next;
        if (s->n_used == 0)
            free_slab(gpu, s);
    }
}

void ipt_gpu_limit_memory(ipt_gpu *gpu, uint64_t bytes)
{
    gpu->memory_limit = bytes;
    reclaim(gpu);
    free_empty_slabs(gpu);
    gpu->peak = gpu->used;
}

uint64_t ipt_gpu_room(ipt_gpu *gpu)
{
    if (gpu->memory_limit == 0)
        return UINT64_MAX;
    reclaim(gpu);
    free_empty_slabs(gpu); /* whoever asks wants to know what a large block may have */
    return gpu->used < gpu->memory_limit ? gpu->memory_limit - gpu->used : 0;
}

/* A free block of at least `size`, or NULL with *r telling why. */
static ipt_status find_block(ipt_gpu *gpu, uint64_t size, VkResult *r, ipt_buffer **out)
{
    ipt_slab *s = NULL;
    *out = best_fit(gpu, size);
    if (*out)
        return IPT_OK;
    if (size <= SLAB / 2)
        IPT_TRY(new_slab(gpu, SLAB, false, r, &s));
    if (!s)
        IPT_TRY(new_slab(gpu, size & (size - 1) ? size : size + IPT_VK_ALIGN, true, r, &s));
    *out = s ? s->first : NULL;
    return IPT_OK;
}

static ipt_status out_of_memory(ipt_gpu *gpu, uint64_t need)
{
    const double mib = 1024.0 * 1024.0;
    const ipt_gpu_info *i = &gpu->dev.info;
    char have[96];
    if (need > gpu->dev.caps.max_buffer)
        snprintf(have, sizeof have, "one buffer may hold %.1f MiB",
                 (double)gpu->dev.caps.max_buffer / mib);
    else if (gpu->memory_limit)
        snprintf(have, sizeof have, "%.1f MiB of the limit of %.1f MiB are in use",
                 (double)gpu->used / mib, (double)gpu->memory_limit / mib);
    else if (i->type == IPT_GPU_CPU) /* the heap size of a CPU device means nothing */
        snprintf(have, sizeof have, "%.1f MiB are in use", (double)gpu->used / mib);
    else
        snprintf(have, sizeof have, "%.1f MiB of %.1f MiB are in use", (double)gpu->used / mib,
                 (double)(i->budget_bytes ? i->budget_bytes : i->heap_bytes) / mib);
    return ipt_fail(gpu->ctx, IPT_ERR_DEVICE_MEM,
                    "%s: out of device memory: need %.1f MiB more, %s; try %s" IPT_VK_MEM_ADVICE,
                    i->name, (double)need / mib, have,
                    gpu->memory_limit ? "a higher --vram-limit" : "--vram-limit");
}

ipt_status ipt_buffer_create(ipt_gpu *gpu, uint64_t bytes, ipt_buffer **out)
{
    VkResult r = VK_SUCCESS;
    ipt_buffer *b = NULL;
    IPT_TRY(ipt_vk_alive(gpu));
    if (bytes == 0)
        return ipt_fail(gpu->ctx, IPT_ERR_ARG, "a device buffer of 0 bytes");
    if (bytes > UINT64_MAX - IPT_VK_ALIGN)
        return out_of_memory(gpu, bytes);
    uint64_t size = (bytes + IPT_VK_ALIGN - 1) / IPT_VK_ALIGN * IPT_VK_ALIGN;
    reclaim(gpu);
    IPT_TRY(find_block(gpu, size, &r, &b));
    if (!b && r == VK_ERROR_OUT_OF_DEVICE_MEMORY) {
        /* What was destroyed but is still in use, and what is kept for later, may make room. */
        IPT_TRY(ipt_gpu_wait(gpu, gpu->submitted));
        reclaim(gpu);
        free_empty_slabs(gpu);
        IPT_TRY(find_block(gpu, size, &r, &b));
    }
    if (!b)
        return r == VK_ERROR_OUT_OF_DEVICE_MEMORY ? out_of_memory(gpu, bytes)
                                                  : ipt_vk_check(gpu, r, "cannot allocate memory");
    ipt_status status = take(gpu, b, size, bytes);
    if (status != IPT_OK) {
        if (b->slab->n_used == 0)
            free_slab(gpu, b->slab);
        return status;
    }
    *out = b;
    return IPT_OK;
}

void ipt_buffer_destroy(ipt_gpu *gpu, ipt_buffer **pb)
{
    if (!pb || !*pb)
        return;
    ipt_buffer *b = *pb;
    *pb = NULL;
    b->dead_at = gpu->submitted;
    b->next_dead = gpu->dead;
    gpu->dead = b;
    reclaim(gpu);
}

uint64_t ipt_buffer_bytes(const ipt_buffer *b) { return b->bytes; }

void *ipt_buffer_map(ipt_buffer *b) { return b->slab->mapped ? b->slab->mapped + b->off : NULL; }

/* --- staging ring ----------------------------------------------------------------------------- */
static void staging_finish(ipt_gpu *gpu)
{
    ipt_staging *s = &gpu->staging;
    vkDestroyCommandPool(gpu->device, s->pool, NULL); /* with its command buffers */
    vkDestroyBuffer(gpu->device, s->buffer, NULL);
    vkFreeMemory(gpu->device, s->memory, NULL);
    memset(s, 0, sizeof *s);
}

static ipt_status staging_commands(ipt_gpu *gpu)
{
    ipt_staging *s = &gpu->staging;
    VkCommandPoolCreateInfo pool = {.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                    .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT |
                                             VK_COMMAND_POOL_CREATE_TRANSIENT_BIT,
                                    .queueFamilyIndex = gpu->dev.caps.family};
    IPT_TRY(ipt_vk_check(gpu, vkCreateCommandPool(gpu->device, &pool, NULL, &s->pool),
                         "cannot make a command pool"));
    VkCommandBufferAllocateInfo a = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                     .commandPool = s->pool,
                                     .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
                                     .commandBufferCount = IPT_VK_SLOTS};
    return ipt_vk_check(gpu, vkAllocateCommandBuffers(gpu->device, &a, s->cmd),
                        "cannot make command buffers");
}

/* Makes the ring at its first use. */
static ipt_status staging_init(ipt_gpu *gpu)
{
    const VkMemoryPropertyFlags kinds[] = {HOST | CACHED, HOST};
    ipt_staging *s = &gpu->staging;
    ipt_slab slab = {.next = NULL};
    if (s->buffer)
        return IPT_OK;
    VkResult r = back_buffer(gpu, SLOT * IPT_VK_SLOTS,
                             VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT,
                             kinds, IPT_COUNT(kinds), true, &slab);
    if (r == VK_ERROR_OUT_OF_DEVICE_MEMORY)
        return out_of_memory(gpu, SLOT * IPT_VK_SLOTS);
    IPT_TRY(ipt_vk_check(gpu, r, "cannot allocate the staging ring"));
    s->buffer = slab.buffer;
    s->memory = slab.memory;
    s->mapped = slab.mapped;
    ipt_status status = staging_commands(gpu);
    if (status != IPT_OK)
        staging_finish(gpu);
    return status;
}

/* Submits one copy between slot `i` and `b`; to_host tells the direction. */
static ipt_status staging_copy(ipt_gpu *gpu, uint32_t i, const ipt_buffer *b, uint64_t off,
                               uint64_t n, bool to_host)
{
    ipt_staging *s = &gpu->staging;
    VkCommandBuffer cmd = s->cmd[i];
    VkCommandBufferBeginInfo begin = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
                                      .flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT};
    VkBufferCopy region = {.srcOffset = SLOT * i, .dstOffset = b->off + off, .size = n};
    VkMemoryBarrier barrier = {.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                               .srcAccessMask = VK_ACCESS_TRANSFER_WRITE_BIT,
                               .dstAccessMask = VK_ACCESS_HOST_READ_BIT};
    IPT_TRY(ipt_vk_check(gpu, vkBeginCommandBuffer(cmd, &begin), "cannot record a copy"));
    if (to_host) {
        region = (VkBufferCopy){.srcOffset = b->off + off, .dstOffset = SLOT * i, .size = n};
        vkCmdCopyBuffer(cmd, b->slab->buffer, s->buffer, 1, &region);
        vkCmdPipelineBarrier(cmd, VK_PIPELINE_STAGE_TRANSFER_BIT, VK_PIPELINE_STAGE_HOST_BIT, 0, 1,
                             &barrier, 0, NULL, 0, NULL);
    } else {
        vkCmdCopyBuffer(cmd, s->buffer, b->slab->buffer, 1, &region);
    }
    IPT_TRY(ipt_vk_check(gpu, vkEndCommandBuffer(cmd), "cannot record a copy"));
    return ipt_vk_submit(gpu, cmd, &s->value[i]);
}

static ipt_status check_range(ipt_gpu *gpu, const ipt_buffer *b, uint64_t off, uint64_t n)
{
    IPT_TRY(ipt_vk_alive(gpu));
    if (off > b->bytes || n > b->bytes - off)
        return ipt_fail(gpu->ctx, IPT_ERR_ARG,
                        "bytes %" PRIu64 " + %" PRIu64 " of a device buffer of %" PRIu64, off, n,
                        b->bytes);
    return IPT_OK;
}

ipt_status ipt_buffer_write(ipt_gpu *gpu, ipt_buffer *b, uint64_t off, const void *src, uint64_t n)
{
    const uint8_t *p = src;
    ipt_staging *s = &gpu->staging;
    IPT_TRY(check_range(gpu, b, off, n));
    if (n == 0)
        return IPT_OK;
    if (b->slab->mapped) {
        IPT_TRY(ipt_gpu_wait(gpu, gpu->submitted));
        memcpy(b->slab->mapped + b->off + off, p, (size_t)n);
        return IPT_OK;
    }
    IPT_TRY(staging_init(gpu));
    while (n > 0) { /* the queue keeps the copies behind earlier submits */
        uint64_t part = n < SLOT ? n : SLOT;
        uint32_t i = s->next++ % IPT_VK_SLOTS;
        IPT_TRY(ipt_gpu_wait(gpu, s->value[i]));
        memcpy(s->mapped + SLOT * i, p, (size_t)part);
        IPT_TRY(staging_copy(gpu, i, b, off, part, false));
        p += part;
        off += part;
        n -= part;
    }
    return IPT_OK;
}

ipt_status ipt_buffer_read(ipt_gpu *gpu, ipt_buffer *b, uint64_t off, void *dst, uint64_t n)
{
    uint8_t *p = dst;
    ipt_staging *s = &gpu->staging;
    IPT_TRY(check_range(gpu, b, off, n));
    if (n == 0)
        return IPT_OK;
    if (b->slab->mapped) {
        IPT_TRY(ipt_gpu_wait(gpu, gpu->submitted));
        memcpy(p, b->slab->mapped + b->off + off, (size_t)n);
        return IPT_OK;
    }
    IPT_TRY(staging_init(gpu));
    const uint64_t parts = (n + SLOT - 1) / SLOT;
    const uint32_t base = s->next;
    for (uint64_t sent = 0, got = 0; got < parts; got++) { /* keeps all slots busy */
        for (; sent < parts && sent < got + IPT_VK_SLOTS; sent++) {
            uint64_t at = sent * SLOT, part = n - at < SLOT ? n - at : SLOT;
            uint32_t i = (uint32_t)((base + sent) % IPT_VK_SLOTS);
            IPT_TRY(ipt_gpu_wait(gpu, s->value[i]));
            IPT_TRY(staging_copy(gpu, i, b, off + at, part, true));
        }
        uint64_t at = got * SLOT, part = n - at < SLOT ? n - at : SLOT;
        uint32_t i = (uint32_t)((base + got) % IPT_VK_SLOTS);
        IPT_TRY(ipt_gpu_wait(gpu, s->value[i]));
        memcpy(p + at, s->mapped + SLOT * i, (size_t)part);
    }
    s->next = (uint32_t)((base + parts) % IPT_VK_SLOTS);
    return IPT_OK;
}

void ipt_vk_memory_finish(ipt_gpu *gpu)
{
    staging_finish(gpu);
    gpu->dead = NULL;
    while (gpu->slabs)
        free_slab(gpu, gpu->slabs);
}
