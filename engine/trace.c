/* engine/trace.c - every intermediate of a picture, for comparison with another implementation. */
#include "engine/internal.h"

#include <string.h>

struct ipt_trace {
    ipt_ctx *ctx;
    ipt_arena arena;
    ipt_st_write *tensor;
    size_t n, cap;
};

ipt_status ipt_trace_create(ipt_ctx *ctx, ipt_trace **out)
{
    ipt_trace *t = ipt_alloc(ctx, sizeof *t);
    if (!t)
        return IPT_ERR_NOMEM;
    t->ctx = ctx;
    ipt_arena_init(&t->arena, ctx);
    *out = t;
    return IPT_OK;
}

void ipt_trace_destroy(ipt_trace **t)
{
    if (!t || !*t)
        return;
    ipt_free((*t)->tensor);
    ipt_arena_finish(&(*t)->arena);
    ipt_free(*t);
    *t = NULL;
}

static ipt_status add(ipt_trace *t, const char *name, const void *v, ipt_st_dtype type,
                      const int64_t *dim, int rank)
{
    if (t->n == t->cap) {
        size_t cap = t->cap ? t->cap * 2 : 64;
        ipt_st_write *w = ipt_regrow(t->ctx, t->tensor, t->cap * sizeof *w, cap * sizeof *w);
        if (!w)
            return IPT_ERR_NOMEM;
        t->tensor = w;
        t->cap = cap;
    }
    ipt_st_write *w = &t->tensor[t->n];
    size_t count = 1;
    *w = (ipt_st_write){.dtype = type, .rank = (uint8_t)rank};
    for (int i = 0; i < rank; i++) {
        w->dim[i] = dim[i];
        count *= (size_t)dim[i];
    }
    char *copy = ipt_arena_alloc(&t->arena, count * 4);
    w->name = ipt_arena_strdup(&t->arena, name);
    if (!copy || !w->name)
        return IPT_ERR_NOMEM;
    memcpy(copy, v, count * 4);
    w->data = copy;
    t->n++;
    return IPT_OK;
}

ipt_status ipt_trace_f32(ipt_trace *t, const char *name, const float *v, const int64_t *dim,
                         int rank)
{
    return t ? add(t, name, v, IPT_ST_F32, dim, rank) : IPT_OK;
}

ipt_status ipt_trace_i32(ipt_trace *t, const char *name, const int32_t *v, int64_t n)
{
    return t ? add(t, name, v, IPT_ST_I32, &n, 1) : IPT_OK;
}

ipt_status ipt_trace_spares(ipt_ctx *ctx, const char *trace, const char *input)
{
    const uint64_t stamp = ipt_file_stamp(trace);
    if (stamp == 0 || stamp != ipt_file_stamp(input))
        return IPT_OK;
    return ipt_fail(ctx, IPT_ERR_ARG, "trace %s would replace %s, which the request reads", trace,
                    input);
}

ipt_status ipt_trace_write(ipt_trace *t, const char *path)
{
    const ipt_st_meta meta[] = {{"format", "pt"}, {"producer", "impasto " IPT_VERSION}};
    return ipt_safetensors_write(t->ctx, path, t->tensor, t->n, meta, IPT_COUNT(meta));
}
