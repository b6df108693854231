/* graph/state.c - values on the device that outlive runs and that several plans share (ADR 14).
 * Must not know: what they are for. */
#include "graph/internal.h"

#include <stdlib.h>
#include <string.h>

/* Elements from one tensor's start to the next are a multiple of this: 256 bytes of f16. */
enum { STATE_ALIGN = 128 };

typedef struct tensor {
    const char *name; /* the whole of a group too */
    ipt_shape shape;
    uint32_t group;
    uint64_t at; /* element of the group */
} tensor;

typedef struct group {
    ipt_dtype dtype;
    ipt_buffer *buf;
    double *host; /* of a state without a device */
    uint64_t count;
} group;

struct ipt_state {
    ipt_ctx *ctx;
    struct ipt_gpu *gpu;
    ipt_arena arena;
    tensor *tensor;
    uint32_t n_tensor, cap_tensor;
    group *group;
    uint32_t n_group, cap_group;
};

ipt_status ipt_state_create(ipt_ctx *ctx, struct ipt_gpu *gpu, ipt_state **out)
{
    ipt_state *s = ipt_alloc(ctx, sizeof *s);
    if (!s)
        return IPT_ERR_NOMEM;
    s->ctx = ctx;
    s->gpu = gpu;
    ipt_arena_init(&s->arena, ctx);
    *out = s;
    return IPT_OK;
}

void ipt_state_destroy(ipt_state **sp)
{
    if (!sp || !*sp)
        return;
    ipt_state *s = *sp;
    for (uint32_t i = 0; i < s->n_group; i++) {
        if (s->group[i].buf)
            ipt_buffer_destroy(s->gpu, &s->group[i].buf);
        ipt_free(s->group[i].host);
    }
    ipt_free(s->group);
    ipt_free(s->tensor);
    ipt_arena_finish(&s->arena);
    ipt_free(s);
    *sp = NULL;
}

static const tensor *find(const ipt_state *s, const char *name)
{
    for (uint32_t i = 0; i < s->n_tensor; i++)
        if (strcmp(s->tensor[i].name, name) == 0)
            return &s->tensor[i];
    return NULL;
}

static ipt_status add_tensor(ipt_state *s, const char *prefix, const char *name, ipt_shape shape,
                             uint64_t at)
{
    char full[512];
    const int n = snprintf(full, sizeof full, "%s%s", prefix, name);
    if (n < 0 || (size_t)n >= sizeof full)
        return ipt_fail(s->ctx, IPT_ERR_ARG, "%s: the name is too long", name);
    if (find(s, full))
        return ipt_fail(s->ctx, IPT_ERR_ARG, "%s: is in the state already", full);
    if (s->n_tensor == s->cap_tensor) {
        const uint32_t cap = s->cap_tensor ? 2 * s->cap_tensor : 256;
        tensor *t = ipt_regrow(s->ctx, s->tensor, s->cap_tensor * sizeof *t, cap * sizeof *t);
        if (!t)
            return IPT_ERR_NOMEM;
        s->tensor = t;
        s->cap_tensor = cap;
    }
    shape.dtype = s->group[s->n_group].dtype;
    s->tensor[s->n_tensor] = (tensor){
        .name = ipt_arena_strdup(&s->arena, full), .shape = shape, .group = s->n_group, .at = at};
    return s->tensor[s->n_tensor++].name ? IPT_OK : IPT_ERR_NOMEM;
}

static ipt_status clear_buffer(ipt_state *s, ipt_buffer *b, uint64_t bytes)
{
    enum { PART = 1 << 20 };
    const uint64_t part = bytes < PART ? bytes : PART;
    ipt_status status = IPT_OK;
    void *zeros = ipt_calloc(s->ctx, part, 1);
    if (!zeros)
        return IPT_ERR_NOMEM;
    for (uint64_t at = 0; status == IPT_OK && at < bytes; at += part)
        status = ipt_buffer_write(s->gpu, b, at, zeros, bytes - at < part ? bytes - at : part);
    ipt_free(zeros);
    return status;
}

static ipt_status allocate(ipt_state *s, group *g)
{
    if (!s->gpu) {
        g->host = ipt_calloc(s->ctx, g->count, sizeof *g->host);
        return g->host ? IPT_OK : IPT_ERR_NOMEM;
    }
    const uint64_t bytes = g->count * ipt_dtype_bytes(g->dtype);
    IPT_TRY(ipt_buffer_create(s->gpu, bytes, &g->buf));
    return clear_buffer(s, g->buf, bytes);
}

ipt_status ipt_state_add(ipt_state *s, const ipt_state_group *desc)
{
    if (s->n_group == s->cap_group) {
        const uint32_t cap = s->cap_group ? 2 * s->cap_group : 16;
        group *g = ipt_regrow(s->ctx, s->group, s->cap_group * sizeof *g, cap * sizeof *g);
        if (!g)
            return IPT_ERR_NOMEM;
        s->group = g;
        s->cap_group = cap;
    }
    const uint32_t had = s->n_tensor;
    group *g = &s->group[s->n_group];
    *g = (group){.dtype = desc->dtype};
    ipt_status status = IPT_OK;
    for (size_t i = 0; i < desc->n && status == IPT_OK; i++) {
        status = add_tensor(s, desc->prefix, desc->item[i].name, desc->item[i].shape, g->count);
        g->count +=
            (ipt_shape_count(&desc->item[i].shape) + STATE_ALIGN - 1) / STATE_ALIGN * STATE_ALIGN;
        if (status == IPT_OK && g->count > INT32_MAX)
            status = ipt_fail(s->ctx, IPT_ERR_TOO_LARGE,
                              "%s: %" PRIu64 " values are more than a group of 2^31 holds",
                              desc->name, g->count);
    }
    if (status == IPT_OK && g->count == 0)
        status = ipt_fail(s->ctx, IPT_ERR_ARG, "%s: a group of nothing", desc->name);
    if (status == IPT_OK)
        status = add_tensor(s, "", desc->name, ipt_shape1(desc->dtype, (int32_t)g->count), 0);
    if (status == IPT_OK)
        status = allocate(s, g);
    if (status != IPT_OK) {
        if (g->buf)
            ipt_buffer_destroy(s->gpu, &g->buf);
        s->n_tensor = had;
        return status;
    }
    s->n_group++;
    return IPT_OK;
}

bool ipt_state_locate(const ipt_state *s, const char *name, ipt_state_view *out)
{
    const tensor *t = find(s, name);
    if (!t)
        return false;
    const group *g = &s->group[t->group];
    *out = (ipt_state_view){.shape = t->shape,
                            .buf = g->buf,
                            .off = t->at * ipt_dtype_bytes(g->dtype),
                            .host = g->host ? g->host + t->at : NULL};
    return true;
}

static ipt_status expect(const ipt_state *s, const char *name, size_t bytes, ipt_state_view *out)
{
    if (!ipt_state_locate(s, name, out))
        return ipt_fail(s->ctx, IPT_ERR_MISSING, "the state has no %s", name);
    const size_t want = ipt_shape_count(&out->shape) * 4;
    if (want != bytes)
        return ipt_fail(s->ctx, IPT_ERR_ARG, "%s: %zu bytes given, expected %zu", name, bytes,
                        want);
    return IPT_OK;
}

ipt_status ipt_state_write(ipt_state *s, const char *name, const float *src, size_t bytes)
{
    ipt_state_view v = {0};
    IPT_TRY(expect(s, name, bytes, &v));
    const size_t n = bytes / 4;
    if (v.host) {
        for (size_t i = 0; i < n; i++)
            v.host[i] = v.shape.dtype == IPT_F16 ? (double)ipt_f16_to_f32(ipt_f32_to_f16(src[i]))
                                                 : (double)src[i];
        return IPT_OK;
    }
    if (v.shape.dtype != IPT_F16)
        return ipt_buffer_write(s->gpu, v.buf, v.off, src, bytes);
    uint16_t *half = ipt_calloc(s->ctx, n, 2);
    if (!half)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        half[i] = ipt_f32_to_f16(src[i]);
    ipt_status status = ipt_buffer_write(s->gpu, v.buf, v.off, half, n * 2);
    ipt_free(half);
    return status;
}

ipt_status ipt_state_read(const ipt_state *s, const char *name, float *dst, size_t bytes)
{
    ipt_state_view v = {0};
    IPT_TRY(expect(s, name, bytes, &v));
    const size_t n = bytes / 4;
    if (v.host) {
        for (size_t i = 0; i < n; i++)
            dst[i] = (float)v.host[i];
        return IPT_OK;
    }
    if (v.shape.dtype != IPT_F16)
        return ipt_buffer_read(s->gpu, v.buf, v.off, dst, bytes);
    uint16_t *half = ipt_calloc(s->ctx, n, 2);
    if (!half)
        return IPT_ERR_NOMEM;
    ipt_status status = ipt_buffer_read(s->gpu, v.buf, v.off, half, n * 2);
    for (size_t i = 0; status == IPT_OK && i < n; i++)
        dst[i] = ipt_f16_to_f32(half[i]);
    ipt_free(half);
    return status;
}

uint64_t ipt_state_bytes(const ipt_state *s)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < s->n_group; i++)
        sum += s->group[i].count * ipt_dtype_bytes(s->group[i].dtype);
    return sum;
}
