/* model_io/safetensors_write.c - writes safetensors files: whole or not at all. */
#include "model_io/internal.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static ipt_status add_tensor(ipt_ctx *ctx, json_t *root, const char *path, const ipt_st_write *t,
                             size_t *end)
{
    size_t bytes = ipt_st_dtype_bytes(t->dtype), begin = *end;
    if (t->rank > IPT_ST_MAX_RANK || json_object_get(root, t->name) ||
        strcmp(t->name, "__metadata__") == 0)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "%s: key '%s' occurs twice, or has more than %d dimensions", path, t->name,
                        IPT_ST_MAX_RANK);
    json_t *shape = json_array();
    for (int i = 0; i < t->rank; i++) {
        if (t->dim[i] < 0 || !ipt_mul_size(bytes, (size_t)t->dim[i], &bytes)) {
            json_decref(shape);
            return ipt_fail(ctx, IPT_ERR_ARG, "%s: key '%s': bad shape", path, t->name);
        }
        json_array_append_new(shape, json_integer(t->dim[i]));
    }
    if (!ipt_add_size(begin, bytes, end)) {
        json_decref(shape);
        return ipt_fail(ctx, IPT_ERR_ARG, "%s: key '%s': too large", path, t->name);
    }
    json_t *entry = json_pack("{s:s, s:o, s:[I,I]}", "dtype", ipt_st_dtype_name(t->dtype), "shape",
                              shape, "data_offsets", (json_int_t)begin, (json_int_t)*end);
    if (!entry || json_object_set_new(root, t->name, entry) != 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "%s: key '%s' is not UTF-8, or memory is out", path,
                        t->name);
    return IPT_OK;
}

static ipt_status make_header(ipt_ctx *ctx, const char *path, const ipt_st_write *t, size_t n,
                              const ipt_st_meta *meta, size_t n_meta, char **text, size_t *n_text)
{
    ipt_status status = IPT_OK;
    size_t end = 0, at = 0;
    char *dump = NULL, *buf = NULL;
    json_t *root = json_object(), *m = n_meta ? json_object() : NULL;
    if (!root || (n_meta && !m)) {
        status = ipt_fail(ctx, IPT_ERR_NOMEM, "%s: out of memory while writing the header", path);
        goto out;
    }
    for (size_t i = 0; i < n_meta; i++)
        json_object_set_new(m, meta[i].key, json_string(meta[i].value)); /* not UTF-8: left out */
    if (n_meta)
        json_object_set(root, "__metadata__", m);
    for (size_t i = 0; i < n; i++)
        IPT_TRY_GOTO(add_tensor(ctx, root, path, &t[i], &end), out);
    dump = json_dumps(root, JSON_COMPACT);
    buf = dump ? ipt_alloc(ctx, strlen(dump) + 16) : NULL;
    if (!buf) {
        status = ipt_fail(ctx, IPT_ERR_NOMEM, "%s: out of memory while writing the header", path);
        goto out;
    }
    at = strlen(dump);
    memcpy(buf + 8, dump, at);
    while (at % 8 != 0)
        buf[8 + at++] = ' ';
    for (int i = 0; i < 8; i++)
        buf[i] = (char)(uint8_t)((uint64_t)at >> (8 * i));
    *text = buf;
    *n_text = at + 8;
out:
    free(dump);
    json_decref(m);
    json_decref(root);
    return status;
}

static size_t bytes_of(const ipt_st_write *t)
{
    size_t bytes = ipt_st_dtype_bytes(t->dtype);
    for (int d = 0; d < t->rank; d++)
        bytes *= (size_t)t->dim[d]; /* checked by add_tensor */
    return bytes;
}

/* Every tensor in turn, those without data by `fill`; room [most] holds one of them. */
static ipt_status append_each(ipt_file_out *f, const ipt_st_write *t, size_t n, ipt_st_fill_fn fill,
                              void *user, void *room)
{
    for (size_t i = 0; i < n; i++) {
        const void *data = t[i].data;
        size_t bytes = bytes_of(&t[i]);
        if (!data && bytes > 0 && fill) {
            IPT_TRY(fill(user, i, room, bytes));
            data = room;
        }
        IPT_TRY(ipt_file_append(f, data, bytes));
    }
    return IPT_OK;
}

ipt_status ipt_safetensors_write_each(ipt_ctx *ctx, const char *path, const ipt_st_write *t,
                                      size_t n, const ipt_st_meta *meta, size_t n_meta,
                                      ipt_st_fill_fn fill, void *user)
{
    char *header = NULL;
    ipt_file_out *f = NULL;
    void *room = NULL;
    size_t n_header = 0, most = 1;
    ipt_status status = make_header(ctx, path, t, n, meta, n_meta, &header, &n_header), closed;
    for (size_t i = 0; status == IPT_OK && i < n; i++)
        if (!t[i].data && bytes_of(&t[i]) > most)
            most = bytes_of(&t[i]);
    if (status == IPT_OK) {
        room = ipt_alloc(ctx, most);
        status = room ? ipt_file_create(ctx, path, &f) : IPT_ERR_NOMEM;
    }
    if (status == IPT_OK) {
        status = ipt_file_append(f, header, n_header);
        if (status == IPT_OK)
            status = append_each(f, t, n, fill, user, room);
        closed = ipt_file_close(&f, status == IPT_OK);
        status = status != IPT_OK ? status : closed;
    }
    ipt_free(room);
    ipt_free(header);
    return status;
}

ipt_status ipt_safetensors_write(ipt_ctx *ctx, const char *path, const ipt_st_write *t, size_t n,
                                 const ipt_st_meta *meta, size_t n_meta)
{
    return ipt_safetensors_write_each(ctx, path, t, n, meta, n_meta, NULL, NULL);
}

ipt_status ipt_safetensors_bytes(ipt_ctx *ctx, const ipt_st_write *t, size_t n, void **data,
                                 size_t *size)
{
    char *header = NULL;
    size_t at = 0, all = 0;
    IPT_TRY(make_header(ctx, "memory", t, n, NULL, 0, &header, &at));
    all = at;
    for (size_t i = 0; i < n; i++)
        all += bytes_of(&t[i]); /* of values that are in memory */
    char *file = ipt_alloc(ctx, all);
    if (file)
        memcpy(file, header, at);
    ipt_free(header);
    if (!file)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; at += bytes_of(&t[i++]))
        memcpy(file + at, t[i].data, bytes_of(&t[i]));
    *data = file;
    *size = all;
    return IPT_OK;
}

bool ipt_st_can_write(ipt_st_dtype t)
{
    return t == IPT_ST_F64 || t == IPT_ST_F32 || t == IPT_ST_F16 || t == IPT_ST_BF16;
}

bool ipt_st_from_f64(ipt_st_dtype t, const double *v, size_t n, void *dst)
{
    uint8_t *p = dst;
    bool fits = true;
    for (size_t i = 0; i < n; i++) {
        float f = (float)v[i];
        uint16_t h = t == IPT_ST_F16 ? ipt_f32_to_f16(f) : ipt_f32_to_bf16(f);
        if (t == IPT_ST_F64)
            memcpy(p + 8 * i, &v[i], 8);
        else if (t == IPT_ST_F32)
            memcpy(p + 4 * i, &f, 4);
        else
            memcpy(p + 2 * i, &h, 2);
        if (t == IPT_ST_F16)
            fits = fits && (h & 0x7c00u) != 0x7c00u;
        else if (t == IPT_ST_BF16)
            fits = fits && (h & 0x7f80u) != 0x7f80u;
        else
            fits = fits && isfinite(f);
    }
    return fits;
}
