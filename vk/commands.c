/* vk/commands.c - recorded command buffers: descriptors, barriers, time stamps, submits, waits.
 * A cmd owns its descriptor pools, texel views and query pools.  Must not know: slabs' inside. */
#include "vk/vk_internal.h"

#include <string.h>

enum { POOL_SETS = 256, STAMPS = 1024 };

typedef struct desc_pool {
    struct desc_pool *next;
    VkDescriptorPool pool;
    uint32_t sets, ssbo, texel; /* left */
} desc_pool;

typedef struct stamp_pool {
    VkQueryPool pool;
    uint8_t written[STAMPS];
} stamp_pool;

struct ipt_cmd {
    ipt_gpu *gpu;
    VkCommandPool pool;
    VkCommandBuffer cmd;
    desc_pool *pools; /* the first has room */
    VkBufferView *view;
    size_t n_view, cap_view;
    stamp_pool **stamp;
    size_t n_stamp;
    const ipt_kernel *bound; /* pipeline bound last */
    ipt_status status;       /* first failure of a function that returns none */
    bool ended;
    uint64_t value; /* last submit; 0 = none */
};

/* --- life ------------------------------------------------------------------------------------- */
static ipt_status open_cmd(ipt_gpu *gpu, ipt_cmd *c)
{
    VkCommandPoolCreateInfo pool = {.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                    .queueFamilyIndex = gpu->dev.caps.family};
    IPT_TRY(ipt_vk_check(gpu, vkCreateCommandPool(gpu->device, &pool, NULL, &c->pool),
                         "cannot make a command pool"));
    VkCommandBufferAllocateInfo a = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                     .commandPool = c->pool,
                                     .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
                                     .commandBufferCount = 1};
    IPT_TRY(ipt_vk_check(gpu, vkAllocateCommandBuffers(gpu->device, &a, &c->cmd),
                         "cannot make a command buffer"));
    /* Simultaneous use: a cmd may be submitted again while its last submit still runs. */
    VkCommandBufferBeginInfo begin = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
                                      .flags = VK_COMMAND_BUFFER_USAGE_SIMULTANEOUS_USE_BIT};
    return ipt_vk_check(gpu, vkBeginCommandBuffer(c->cmd, &begin), "cannot record");
}

ipt_status ipt_cmd_create(ipt_gpu *gpu, ipt_cmd **out)
{
    IPT_TRY(ipt_vk_alive(gpu));
    ipt_cmd *c = ipt_alloc(gpu->ctx, sizeof *c);
    if (!c)
        return IPT_ERR_NOMEM;
    c->gpu = gpu;
    ipt_status status = open_cmd(gpu, c);
    if (status != IPT_OK)
        ipt_cmd_destroy(gpu, &c);
    else
        *out = c;
    return status;
}

void ipt_cmd_destroy(ipt_gpu *gpu, ipt_cmd **pc)
{
    if (!pc || !*pc)
        return;
    ipt_cmd *c = *pc;
    *pc = NULL;
    if (c->value && ipt_gpu_wait(gpu, c->value) != IPT_OK)
        vkDeviceWaitIdle(gpu->device); /* lost: nothing runs any more, objects may go */
    vkDestroyCommandPool(gpu->device, c->pool, NULL);
    while (c->pools) {
        desc_pool *p = c->pools;
        c->pools = p->next;
        vkDestroyDescriptorPool(gpu->device, p->pool, NULL);
        ipt_free(p);
    }
    for (size_t i = 0; i < c->n_view; i++)
        vkDestroyBufferView(gpu->device, c->view[i], NULL);
    ipt_free(c->view);
    for (size_t i = 0; i < c->n_stamp; i++)
        if (c->stamp[i]) {
            vkDestroyQueryPool(gpu->device, c->stamp[i]->pool, NULL);
            ipt_free(c->stamp[i]);
        }
    ipt_free(c->stamp);
    ipt_free(c);
}

static ipt_status recording(ipt_cmd *c)
{
    IPT_TRY(ipt_vk_alive(c->gpu));
    if (c->ended)
        return ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "recording into commands that have ended");
    return IPT_OK;
}

/* --- dispatches ------------------------------------------------------------------------------- */
static ipt_status add_pool(ipt_cmd *c)
{
    ipt_gpu *gpu = c->gpu;
    const uint32_t each = POOL_SETS * 6;
    const VkDescriptorPoolSize sizes[] = {{VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, each},
                                          {VK_DESCRIPTOR_TYPE_STORAGE_TEXEL_BUFFER, each}};
    VkDescriptorPoolCreateInfo info = {.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO,
                                       .maxSets = POOL_SETS,
                                       .poolSizeCount = IPT_COUNT(sizes),
                                       .pPoolSizes = sizes};
    desc_pool *p = ipt_alloc(gpu->ctx, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    ipt_status status =
        ipt_vk_check(gpu, vkCreateDescriptorPool(gpu->device, &info, NULL, &p->pool),
                     "cannot make a descriptor pool");
    if (status != IPT_OK) {
        ipt_free(p);
        return status;
    }
    p->sets = POOL_SETS;
    p->ssbo = p->texel = each;
    p->next = c->pools;
    c->pools = p;
    return IPT_OK;
}

static ipt_status new_set(ipt_cmd *c, const ipt_kernel *k, VkDescriptorSet *out)
{
    ipt_gpu *gpu = c->gpu;
    for (int attempt = 0;; attempt++) {
        desc_pool *p = c->pools;
        if (!p || !p->sets || p->ssbo < k->n_ssbo || p->texel < k->n_texel) {
            IPT_TRY(add_pool(c));
            p = c->pools;
        }
        VkDescriptorSetAllocateInfo a = {.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO,
                                         .descriptorPool = p->pool,
                                         .descriptorSetCount = 1,
                                         .pSetLayouts = &k->set_layout};
        VkResult r = vkAllocateDescriptorSets(gpu->device, &a, out);
        if ((r == VK_ERROR_OUT_OF_POOL_MEMORY || r == VK_ERROR_FRAGMENTED_POOL) && attempt == 0) {
            p->sets = 0; /* drivers may run out before the counts do */
            continue;
        }
        IPT_TRY(ipt_vk_check(gpu, r, "cannot make a descriptor set"));
        p->sets--;
        p->ssbo -= k->n_ssbo;
        p->texel -= k->n_texel;
        return IPT_OK;
    }
}

/* A texel view of a binding, owned by the cmd. */
static ipt_status new_view(ipt_cmd *c, const ipt_binding *b, ipt_bind_kind kind, VkBufferView *out)
{
    ipt_gpu *gpu = c->gpu;
    const bool half = kind == IPT_BIND_TEXEL_RGBA16F;
    const uint64_t texel = half ? 8 : 16;
    if (b->bytes % texel != 0 || b->bytes / texel > gpu->dev.info.traits.max_texels)
        return ipt_fail(gpu->ctx, IPT_ERR_ARG,
                        "texel view of %" PRIu64 " bytes: not whole texels of %" PRIu64
                        " bytes, or more than %" PRIu64 " of them",
                        b->bytes, texel, gpu->dev.info.traits.max_texels);
    if (c->n_view == c->cap_view) {
        size_t cap = c->cap_view ? 2 * c->cap_view : 256;
        VkBufferView *grown =
            ipt_regrow(gpu->ctx, c->view, c->cap_view * sizeof *grown, cap * sizeof *grown);
        if (!grown)
            return IPT_ERR_NOMEM;
        c->view = grown;
        c->cap_view = cap;
    }
    VkFormat format = half ? VK_FORMAT_R16G16B16A16_SFLOAT : VK_FORMAT_R32G32B32A32_SFLOAT;
    if (kind == IPT_BIND_TEXEL_RGBA32UI)
        format = VK_FORMAT_R32G32B32A32_UINT;
    VkBufferViewCreateInfo info = {.sType = VK_STRUCTURE_TYPE_BUFFER_VIEW_CREATE_INFO,
                                   .buffer = b->buf->slab->buffer,
                                   .format = format,
                                   .offset = b->buf->off + b->off,
                                   .range = b->bytes};
    IPT_TRY(ipt_vk_check(gpu, vkCreateBufferView(gpu->device, &info, NULL, out),
                         "cannot make a texel view"));
    c->view[c->n_view++] = *out;
    return IPT_OK;
}

static bool in_buffer(const ipt_binding *b)
{
    return b->buf && b->bytes > 0 && b->off <= b->buf->bytes && b->bytes <= b->buf->bytes - b->off;
}

static ipt_status check_dispatch(ipt_cmd *c, const ipt_kernel *k, const ipt_binding *b,
                                 const void *push, const uint32_t groups[3])
{
    const ipt_traits *t = &c->gpu->dev.info.traits;
    const ipt_kernel_desc *d = &k->desc;
    if (d->push_bytes && !push)
        return ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "kernel %s: no push constants", d->shader);
    for (int i = 0; i < 3; i++)
        if (groups[i] == 0 || groups[i] > t->max_group_count)
            return ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "kernel %s: %u x %u x %u workgroups",
                            d->shader, groups[0], groups[1], groups[2]);
    for (uint32_t i = 0; i < d->n_bind; i++) {
        if (!in_buffer(&b[i]) || b[i].off % t->align != 0)
            return ipt_fail(c->gpu->ctx, IPT_ERR_ARG,
                            "kernel %s, binding %u: bytes %" PRIu64 " + %" PRIu64
                            " of a buffer of %" PRIu64 ", alignment %u",
                            d->shader, i, b[i].off, b[i].bytes, b[i].buf ? b[i].buf->bytes : 0,
                            t->align);
        if (d->kind[i] == IPT_BIND_SSBO && b[i].bytes > t->max_range)
            return ipt_fail(c->gpu->ctx, IPT_ERR_ARG,
                            "kernel %s, binding %u: %" PRIu64 " bytes, a binding holds %" PRIu64,
                            d->shader, i, b[i].bytes, t->max_range);
    }
    return IPT_OK;
}

static ipt_status record(ipt_cmd *c, const ipt_kernel *k, const ipt_binding *b, const void *push,
                         const uint32_t groups[3])
{
    const ipt_kernel_desc *d = &k->desc;
    VkDescriptorSet set = VK_NULL_HANDLE;
    VkDescriptorBufferInfo buffer[IPT_MAX_BIND];
    VkBufferView view[IPT_MAX_BIND];
    VkWriteDescriptorSet write[IPT_MAX_BIND];
    IPT_TRY(new_set(c, k, &set));
    for (uint32_t i = 0; i < d->n_bind; i++) {
        write[i] = (VkWriteDescriptorSet){.sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET,
                                          .dstSet = set,
                                          .dstBinding = i,
                                          .descriptorCount = 1};
        if (d->kind[i] == IPT_BIND_SSBO) {
            buffer[i] = (VkDescriptorBufferInfo){.buffer = b[i].buf->slab->buffer,
                                                 .offset = b[i].buf->off + b[i].off,
                                                 .range = b[i].bytes};
            write[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
            write[i].pBufferInfo = &buffer[i];
        } else {
            IPT_TRY(new_view(c, &b[i], d->kind[i], &view[i]));
            write[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_TEXEL_BUFFER;
            write[i].pTexelBufferView = &view[i];
        }
    }
    vkUpdateDescriptorSets(c->gpu->device, d->n_bind, write, 0, NULL);
    if (c->bound != k)
        vkCmdBindPipeline(c->cmd, VK_PIPELINE_BIND_POINT_COMPUTE, k->pipeline);
    c->bound = k;
    vkCmdBindDescriptorSets(c->cmd, VK_PIPELINE_BIND_POINT_COMPUTE, k->layout, 0, 1, &set, 0, NULL);
    if (d->push_bytes)
        vkCmdPushConstants(c->cmd, k->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, d->push_bytes, push);
    vkCmdDispatch(c->cmd, groups[0], groups[1], groups[2]);
    return IPT_OK;
}

ipt_status ipt_cmd_dispatch(ipt_cmd *c, ipt_kernel *k, const ipt_binding *b, const void *push,
                            const uint32_t groups[3])
{
    IPT_TRY(recording(c));
    IPT_TRY(check_dispatch(c, k, b, push, groups));
    return record(c, k, b, push, groups);
}

ipt_status ipt_vk_cmd_dispatch_none(ipt_cmd *c, const ipt_kernel *k, const ipt_binding *b,
                                    const void *push)
{
    return record(c, k, b, push, (const uint32_t[3]){0, 0, 0});
}

/* --- barriers and copies ---------------------------------------------------------------------- */
void ipt_cmd_barrier(ipt_cmd *c)
{
    const VkPipelineStageFlags stages =
        VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;
    VkMemoryBarrier barrier = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
        .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
        .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                         VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT};
    if (c->status == IPT_OK)
        c->status = recording(c);
    if (c->status == IPT_OK)
        vkCmdPipelineBarrier(c->cmd, stages, stages, 0, 1, &barrier, 0, NULL, 0, NULL);
}

void ipt_cmd_copy(ipt_cmd *c, const ipt_binding *src, const ipt_binding *dst)
{
    if (c->status == IPT_OK)
        c->status = recording(c);
    if (c->status != IPT_OK)
        return;
    if (!in_buffer(src) || !in_buffer(dst) || src->bytes != dst->bytes) {
        c->status = ipt_fail(c->gpu->ctx, IPT_ERR_ARG,
                             "copy of %" PRIu64 " to %" PRIu64 " bytes: sizes differ or leave the "
                             "buffer",
                             src->bytes, dst->bytes);
        return;
    }
    VkBufferCopy region = {.srcOffset = src->buf->off + src->off,
                           .dstOffset = dst->buf->off + dst->off,
                           .size = src->bytes};
    if (src->buf->slab == dst->buf->slab && region.srcOffset < region.dstOffset + region.size &&
        region.dstOffset < region.srcOffset + region.size) {
        c->status = ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "copy between overlapping ranges");
        return;
    }
    vkCmdCopyBuffer(c->cmd, src->buf->slab->buffer, dst->buf->slab->buffer, 1, &region);
}

/* --- time stamps ------------------------------------------------------------------------------ */
/* The pool of stamps at*STAMPS ..., made at its first use. */
static ipt_status stamp_pool_at(ipt_cmd *c, size_t at, stamp_pool **out)
{
    ipt_gpu *gpu = c->gpu;
    if (at >= c->n_stamp) {
        stamp_pool **grown =
            ipt_regrow(gpu->ctx, c->stamp, c->n_stamp * sizeof *grown, (at + 1) * sizeof *grown);
        if (!grown)
            return IPT_ERR_NOMEM;
        c->stamp = grown;
        c->n_stamp = at + 1;
    }
    if (!c->stamp[at]) {
        VkQueryPoolCreateInfo info = {.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
                                      .queryType = VK_QUERY_TYPE_TIMESTAMP,
                                      .queryCount = STAMPS};
        stamp_pool *p = ipt_alloc(gpu->ctx, sizeof *p);
        if (!p)
            return IPT_ERR_NOMEM;
        ipt_status status = ipt_vk_check(gpu, vkCreateQueryPool(gpu->device, &info, NULL, &p->pool),
                                         "cannot make time stamps");
        if (status != IPT_OK) {
            ipt_free(p);
            return status;
        }
        c->stamp[at] = p;
        vkCmdResetQueryPool(c->cmd, p->pool, 0, STAMPS); /* recorded: every submit resets */
    }
    *out = c->stamp[at];
    return IPT_OK;
}

ipt_status ipt_cmd_stamp(ipt_cmd *c, uint32_t i)
{
    stamp_pool *p = NULL;
    IPT_TRY(recording(c));
    if (i >= 64 * STAMPS)
        return ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "time stamp number %u", i);
    if (c->gpu->dev.caps.stamp_bits == 0)
        return IPT_OK; /* ipt_cmd_stamps says that there are none */
    IPT_TRY(stamp_pool_at(c, i / STAMPS, &p));
    if (p->written[i % STAMPS])
        return ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "time stamp %u was written before", i);
    p->written[i % STAMPS] = 1;
    vkCmdWriteTimestamp(c->cmd, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, p->pool, i % STAMPS);
    return IPT_OK;
}

ipt_status ipt_cmd_stamps(ipt_cmd *c, double *ms, uint32_t n)
{
    ipt_gpu *gpu = c->gpu;
    const uint32_t bits = gpu->dev.caps.stamp_bits;
    const uint64_t mask = bits >= 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
    const double period = (double)gpu->dev.caps.props.limits.timestampPeriod * 1e-6;
    uint64_t first = 0;
    if (bits == 0)
        return ipt_fail(gpu->ctx, IPT_ERR_UNSUPPORTED, "%s has no time stamps", gpu->dev.info.name);
    if (c->value == 0)
        return ipt_fail(gpu->ctx, IPT_ERR_ARG, "time stamps of commands never submitted");
    IPT_TRY(ipt_gpu_wait(gpu, c->value));
    for (uint32_t i = 0; i < n; i++) {
        uint64_t ticks = 0;
        size_t at = i / STAMPS, k = i % STAMPS;
        if (at >= c->n_stamp || !c->stamp[at] || !c->stamp[at]->written[k])
            return ipt_fail(gpu->ctx, IPT_ERR_ARG, "time stamp %u was never recorded", i);
        IPT_TRY(
            ipt_vk_check(gpu,
                         vkGetQueryPoolResults(gpu->device, c->stamp[at]->pool, (uint32_t)k, 1,
                                               sizeof ticks, &ticks, sizeof ticks,
                                               VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT),
                         "cannot read time stamps"));
        if (i == 0)
            first = ticks;
        ms[i] = (double)((ticks - first) & mask) * period;
    }
    return IPT_OK;
}

/* --- submit and wait -------------------------------------------------------------------------- */
ipt_status ipt_cmd_end(ipt_cmd *c)
{
    /* What the host reads through a mapping after the wait must be made visible to it here. */
    VkMemoryBarrier barrier = {.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                               .srcAccessMask =
                                   VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                               .dstAccessMask = VK_ACCESS_HOST_READ_BIT};
    IPT_TRY(c->status);
    IPT_TRY(recording(c));
    if (c->gpu->host_visible)
        vkCmdPipelineBarrier(c->cmd,
                             VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
                             VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &barrier, 0, NULL, 0, NULL);
    IPT_TRY(ipt_vk_check(c->gpu, vkEndCommandBuffer(c->cmd), "cannot record"));
    c->ended = true;
    return IPT_OK;
}

ipt_status ipt_vk_submit(ipt_gpu *gpu, VkCommandBuffer cmd, uint64_t *value)
{
    const uint64_t before = gpu->submitted, after = before + 1;
    const VkPipelineStageFlags stage = VK_PIPELINE_STAGE_ALL_COMMANDS_BIT;
    IPT_TRY(ipt_vk_alive(gpu));
    VkTimelineSemaphoreSubmitInfo values = {.sType =
                                                VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO,
                                            .waitSemaphoreValueCount = 1,
                                            .pWaitSemaphoreValues = &before,
                                            .signalSemaphoreValueCount = 1,
                                            .pSignalSemaphoreValues = &after};
    VkSubmitInfo info = {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
                         .pNext = &values,
                         .waitSemaphoreCount = 1,
                         .pWaitSemaphores = &gpu->timeline,
                         .pWaitDstStageMask = &stage,
                         .commandBufferCount = 1,
                         .pCommandBuffers = &cmd,
                         .signalSemaphoreCount = 1,
                         .pSignalSemaphores = &gpu->timeline};
    IPT_TRY(ipt_vk_check(gpu, vkQueueSubmit(gpu->queue, 1, &info, VK_NULL_HANDLE),
                         "cannot submit commands"));
    gpu->submitted = after;
    *value = after;
    return IPT_OK;
}

ipt_status ipt_cmd_submit(ipt_cmd *c, uint64_t *value)
{
    uint64_t v = 0;
    if (!c->ended)
        return ipt_fail(c->gpu->ctx, IPT_ERR_ARG, "commands submitted before their end");
    IPT_TRY(ipt_vk_submit(c->gpu, c->cmd, &v));
    c->value = v;
    if (value)
        *value = v;
    return IPT_OK;
}

ipt_status ipt_gpu_wait(ipt_gpu *gpu, uint64_t value)
{
    IPT_TRY(ipt_vk_alive(gpu));
    if (value <= gpu->completed)
        return IPT_OK;
    if (value > gpu->submitted)
        return ipt_fail(gpu->ctx, IPT_ERR_ARG, "waiting for submit %" PRIu64 " of %" PRIu64, value,
                        gpu->submitted);
    VkSemaphoreWaitInfo info = {.sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
                                .semaphoreCount = 1,
                                .pSemaphores = &gpu->timeline,
                                .pValues = &value};
    IPT_TRY(ipt_vk_check(gpu, vkWaitSemaphores(gpu->device, &info, UINT64_MAX),
                         "cannot wait for the device"));
    if (value > gpu->completed)
        gpu->completed = value;
    return IPT_OK;
}

ipt_status ipt_gpu_idle(ipt_gpu *gpu) { return ipt_gpu_wait(gpu, gpu->submitted); }
