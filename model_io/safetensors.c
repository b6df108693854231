/* model_io/safetensors.c - reads the safetensors container: the header when it is opened, each
 * tensor when it is asked for.  Nothing is mapped: a file that becomes shorter is a failed read.
 *
 * u64 header length, that many bytes of JSON, then the tensors' bytes (offsets count from there).
 * All numbers are little endian, as the hosts this program runs on.
 * Source: the format description of huggingface/safetensors. */
#include "model_io/internal.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_HEADER = 100 * 1000 * 1000 };
#define MAX_TENSOR (UINT64_C(4) << 30) /* of one that is read; a file may be sparse */

typedef struct chunk {
    uint8_t *p;
    size_t room;
} chunk;

struct ipt_safetensors {
    ipt_ctx *ctx;
    char *path;
    int fd;               /* -1: the bytes belong to the caller */
    const uint8_t *bytes; /* then */
    uint64_t size, data_start;
    ipt_st_tensor *tensor;
    chunk *memory; /* [n_tensor] of what is loaded */
    chunk spare;   /* of a released tensor, for the next one */
    size_t n_tensor;
    ipt_index index;
    ipt_arena names;
    json_t *meta;
};

static const struct {
    const char *name;
    size_t bytes;
} dtypes[IPT_ST_COUNT] = {
    [IPT_ST_F64] = {"F64", 8},         [IPT_ST_F32] = {"F32", 4},
    [IPT_ST_F16] = {"F16", 2},         [IPT_ST_BF16] = {"BF16", 2},
    [IPT_ST_F8_E4M3] = {"F8_E4M3", 1}, [IPT_ST_F8_E5M2] = {"F8_E5M2", 1},
    [IPT_ST_I64] = {"I64", 8},         [IPT_ST_I32] = {"I32", 4},
    [IPT_ST_I16] = {"I16", 2},         [IPT_ST_I8] = {"I8", 1},
    [IPT_ST_U8] = {"U8", 1},           [IPT_ST_BOOL] = {"BOOL", 1},
};

size_t ipt_st_dtype_bytes(ipt_st_dtype t) { return dtypes[t].bytes; }
const char *ipt_st_dtype_name(ipt_st_dtype t) { return dtypes[t].name; }

void ipt_st_shape_text(const ipt_st_tensor *t, char *buf, size_t n)
{
    size_t at = 0;
    for (int i = 0; i < t->rank && at < n; i++) {
        int len = snprintf(buf + at, n - at, "%s%" PRId64, i ? "," : "[", t->dim[i]);
        at += len > 0 ? (size_t)len : 0;
    }
    if (at < n)
        snprintf(buf + at, n - at, "%s", t->rank ? "]" : "[]");
}

/* --- what else it may be ---------------------------------------------------------------------- */
static bool is_text(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n && i < 64; i++) {
        if (p[i] < 32 && p[i] != '\t' && p[i] != '\n' && p[i] != '\r')
            return false;
        if (p[i] == 127)
            return false;
    }
    return n >= 1;
}

const char *ipt_sniff(const uint8_t *p, size_t n)
{
    static const struct {
        const char *magic, *what;
        size_t n;
    } kinds[] = {
        {"PK\003\004",
         "a zip archive or PyTorch pickle (.ckpt, .pt: convert it to .safetensors with a tool you "
         "trust)",
         4},
        {"PK\005\006", "an empty zip archive", 4},
        {"\x80\x02", "a Python pickle (.ckpt, .pt)", 2},
        {"\x80\x03", "a Python pickle", 2},
        {"\x80\x04", "a Python pickle", 2},
        {"\x80\x05", "a Python pickle", 2},
        {"GGUF", "a GGUF file", 4},
        {"\x89PNG", "a PNG picture", 4},
        {"\xff\xd8\xff", "a JPEG picture", 3},
        {"RIFF", "a RIFF (WebP) file", 4},
        {"\x1f\x8b", "a gzip archive", 2},
        {"\x7f"
         "ELF",
         "a program", 4},
        {"version https://git-lfs", "a Git LFS pointer: the real file was not downloaded", 23},
        {"<", "a web page or other markup text", 1},
    };
    for (size_t i = 0; i < IPT_COUNT(kinds); i++) {
        /* Two-byte magics are also possible header lengths: those have zeros in bytes 4 to 7. */
        bool could_be_length = n >= 8 && p[4] == 0 && p[5] == 0 && p[6] == 0 && p[7] == 0;
        if (n >= kinds[i].n && memcmp(p, kinds[i].magic, kinds[i].n) == 0 &&
            !(kinds[i].n <= 2 && could_be_length && n > 8 && p[8] == '{'))
            return kinds[i].what;
    }
    return is_text(p, n) ? "text" : NULL;
}

/* --- header ------------------------------------------------------------------------------------
 */
static ipt_status parse_shape(ipt_safetensors *st, ipt_st_tensor *t, const json_t *shape)
{
    size_t rank = json_array_size(shape), count = 1;
    if (!json_is_array(shape) || rank > IPT_ST_MAX_RANK)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: key '%.200s': shape has %zu dimensions, expected a list of at most %d",
                        st->path, t->name, rank, IPT_ST_MAX_RANK);
    t->rank = (uint8_t)rank;
    for (size_t i = 0; i < rank; i++) {
        const json_t *d = json_array_get(shape, i);
        json_int_t v = json_integer_value(d);
        if (!json_is_integer(d) || v < 0)
            return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                            "%s: key '%.200s': dimension %zu of the shape is not a number >= 0",
                            st->path, t->name, i);
        t->dim[i] = v;
        if (!ipt_mul_size(count, (size_t)v, &count))
            return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                            "%s: key '%.200s': the shape's element count overflows", st->path,
                            t->name);
    }
    t->count = count;
    return IPT_OK;
}

static ipt_status parse_entry(ipt_safetensors *st, ipt_st_tensor *t, const json_t *o)
{
    const char *dtype = ipt_json_str(o, "dtype", NULL);
    const json_t *offs = json_object_get(o, "data_offsets");
    size_t k = 0;
    uint64_t data_bytes = st->size - st->data_start;
    if (!json_is_object(o) || !dtype)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: key '%.200s': expected an object with dtype, shape and data_offsets",
                        st->path, t->name);
    while (k < IPT_ST_COUNT && strcmp(dtypes[k].name, dtype) != 0)
        k++;
    if (k == IPT_ST_COUNT)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: key '%.200s': unknown dtype '%.32s'",
                        st->path, t->name, dtype);
    t->dtype = (ipt_st_dtype)k;
    IPT_TRY(parse_shape(st, t, json_object_get(o, "shape")));
    if (!ipt_mul_size(t->count, dtypes[k].bytes, &t->bytes))
        return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: key '%.200s': the shape's size overflows",
                        st->path, t->name);
    const json_t *b = json_array_get(offs, 0), *e = json_array_get(offs, 1);
    if (json_array_size(offs) != 2 || !json_is_integer(b) || !json_is_integer(e))
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: key '%.200s': data_offsets are not two numbers", st->path, t->name);
    json_int_t begin = json_integer_value(b), end = json_integer_value(e);
    if (begin < 0 || end < begin || (uint64_t)end > data_bytes)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: key '%.200s': bytes %" PRId64 " to %" PRId64
                        " are outside the file's %" PRIu64 " data bytes%s",
                        st->path, t->name, (int64_t)begin, (int64_t)end, data_bytes,
                        begin >= 0 && end >= begin ? " (truncated file?)" : "");
    if ((uint64_t)(end - begin) != t->bytes) {
        char shape[128];
        ipt_st_shape_text(t, shape, sizeof shape);
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: key '%.200s': found %" PRId64 " bytes, expected %zu for %s %s",
                        st->path, t->name, (int64_t)(end - begin), t->bytes, dtypes[k].name, shape);
    }
    t->place = st->data_start + (uint64_t)begin;
    t->data = st->bytes && t->bytes ? st->bytes + t->place : NULL;
    t->of = st->bytes ? NULL : st;
    return IPT_OK;
}

static int by_place(const void *pa, const void *pb)
{
    const ipt_st_tensor *a = pa, *b = pb;
    if (a->place != b->place)
        return a->place < b->place ? -1 : 1;
    if (a->bytes != b->bytes) /* empty ones first: they overlap nothing */
        return a->bytes < b->bytes ? -1 : 1;
    return strcmp(a->name, b->name);
}

static ipt_status sort_and_index(ipt_safetensors *st)
{
    qsort(st->tensor, st->n_tensor, sizeof *st->tensor, by_place);
    IPT_TRY(ipt_index_init(&st->index, st->ctx, st->n_tensor));
    const ipt_st_tensor *last = NULL;
    for (size_t i = 0; i < st->n_tensor; i++) {
        ipt_st_tensor *t = &st->tensor[i];
        bool added = false;
        if (t->bytes != 0) {
            if (last && t->place < last->place + last->bytes)
                return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                                "%s: keys '%.200s' and '%.200s' overlap in the file", st->path,
                                last->name, t->name);
            last = t;
        }
        IPT_TRY(ipt_index_put(&st->index, t->name, (uint32_t)i, &added));
        if (!added)
            return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: key '%.200s' occurs twice", st->path,
                            t->name);
    }
    return IPT_OK;
}

static ipt_status take_metadata(ipt_safetensors *st, json_t *meta)
{
    const char *key;
    json_t *value;
    if (!json_is_object(meta))
        return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: __metadata__ is not an object", st->path);
    json_object_foreach(meta, key, value)
    {
        if (!json_is_string(value))
            return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: __metadata__ '%.200s' is not a string",
                            st->path, key);
    }
    st->meta = json_incref(meta);
    return IPT_OK;
}

static ipt_status parse_header(ipt_safetensors *st, json_t *root)
{
    const char *key;
    json_t *value;
    if (!json_is_object(root))
        return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: the header is not a JSON object", st->path);
    st->tensor = ipt_calloc(st->ctx, json_object_size(root), sizeof *st->tensor);
    st->memory = ipt_calloc(st->ctx, json_object_size(root), sizeof *st->memory);
    if (!st->tensor || !st->memory)
        return IPT_ERR_NOMEM;
    json_object_foreach(root, key, value)
    {
        if (strcmp(key, "__metadata__") == 0) {
            IPT_TRY(take_metadata(st, value));
            continue;
        }
        ipt_st_tensor *t = &st->tensor[st->n_tensor];
        t->name = ipt_arena_strdup(&st->names, key);
        if (!t->name)
            return IPT_ERR_NOMEM;
        IPT_TRY(parse_entry(st, t, value));
        st->n_tensor++;
    }
    return sort_and_index(st);
}

static ipt_status read_header(ipt_safetensors *st)
{
    uint8_t head[64] = {0};
    uint64_t n = 0;
    size_t n_head = st->size < sizeof head ? (size_t)st->size : sizeof head;
    if (st->size == 0)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: the file is empty, expected a safetensors file", st->path);
    IPT_TRY(ipt_safetensors_read(st, 0, n_head, head));
    const char *what = ipt_sniff(head, n_head);
    if (what)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT, "%s: this is %s, expected a .safetensors file",
                        st->path, what);
    if (st->size < 8)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: file has %" PRIu64
                        " bytes, expected a safetensors file (8 bytes and more)",
                        st->path, st->size);
    for (int i = 7; i >= 0; i--)
        n = n << 8 | head[i];
    if (n > st->size - 8)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: header says %" PRIu64 " bytes, file has %" PRIu64, st->path, n,
                        st->size);
    if (n > MAX_HEADER)
        return ipt_fail(st->ctx, IPT_ERR_FORMAT,
                        "%s: header says %" PRIu64 " bytes, expected at most %d", st->path, n,
                        (int)MAX_HEADER);
    st->data_start = 8 + n;
    json_t *root = NULL;
    char *text = ipt_alloc(st->ctx, (size_t)n + 1);
    if (!text)
        return IPT_ERR_NOMEM;
    ipt_status status = ipt_safetensors_read(st, 8, (size_t)n, text);
    if (status == IPT_OK)
        status = ipt_json_parse(st->ctx, st->path, text, (size_t)n, &root);
    ipt_free(text);
    if (status == IPT_OK)
        status = parse_header(st, root);
    json_decref(root);
    return status;
}

/* --- life ---------------------------------------------------------------------------------------
 */
static ipt_status create(ipt_ctx *ctx, const char *path, ipt_safetensors **out)
{
    ipt_safetensors *st = ipt_alloc(ctx, sizeof *st);
    if (!st)
        return IPT_ERR_NOMEM;
    st->ctx = ctx;
    st->fd = -1;
    ipt_arena_init(&st->names, ctx);
    st->path = ipt_strdup(ctx, path);
    if (!st->path) {
        ipt_safetensors_close(&st);
        return IPT_ERR_NOMEM;
    }
    *out = st;
    return IPT_OK;
}

ipt_status ipt_safetensors_open_memory(ipt_ctx *ctx, const char *name, const void *data,
                                       size_t size, ipt_safetensors **out)
{
    ipt_safetensors *st = NULL;
    IPT_TRY(create(ctx, name, &st));
    st->bytes = data;
    st->size = size;
    ipt_status status = read_header(st);
    if (status != IPT_OK) {
        ipt_safetensors_close(&st);
        return status;
    }
    *out = st;
    return IPT_OK;
}

ipt_status ipt_safetensors_open(ipt_ctx *ctx, const char *path, ipt_safetensors **out)
{
    ipt_safetensors *st = NULL;
    IPT_TRY(create(ctx, path, &st));
    ipt_status status = ipt_file_open(ctx, path, "a safetensors file", &st->fd, &st->size);
    if (status == IPT_OK)
        status = read_header(st);
    if (status != IPT_OK) {
        ipt_safetensors_close(&st);
        return status;
    }
    *out = st;
    return IPT_OK;
}

void ipt_safetensors_close(ipt_safetensors **pst)
{
    if (!pst || !*pst)
        return;
    ipt_safetensors *st = *pst;
    for (size_t i = 0; st->memory && i < st->n_tensor; i++)
        ipt_free(st->memory[i].p);
    ipt_free(st->memory);
    ipt_free(st->spare.p);
    if (st->fd >= 0)
        close(st->fd);
    json_decref(st->meta);
    ipt_index_finish(&st->index);
    ipt_arena_finish(&st->names);
    ipt_free(st->tensor);
    ipt_free(st->path);
    ipt_free(st);
    *pst = NULL;
}

const char *ipt_safetensors_path(const ipt_safetensors *st) { return st->path; }
size_t ipt_safetensors_count(const ipt_safetensors *st) { return st->n_tensor; }
const ipt_st_tensor *ipt_safetensors_at(const ipt_safetensors *st, size_t i)
{
    return &st->tensor[i];
}
const json_t *ipt_safetensors_metadata(const ipt_safetensors *st) { return st->meta; }

const ipt_st_tensor *ipt_safetensors_find(const ipt_safetensors *st, const char *name)
{
    uint32_t i = 0;
    return ipt_index_get(&st->index, name, &i) ? &st->tensor[i] : NULL;
}

const char *ipt_safetensors_meta(const ipt_safetensors *st, const char *key)
{
    return st->meta ? ipt_json_str(st->meta, key, NULL) : NULL;
}

void ipt_safetensors_size(const ipt_safetensors *st, uint64_t *size, uint64_t *data_start)
{
    *size = st->size;
    *data_start = st->data_start;
}

ipt_status ipt_safetensors_read(const ipt_safetensors *st, uint64_t at, size_t n, void *buf)
{
    if (st->fd >= 0)
        return ipt_file_read_at(st->ctx, st->fd, st->path, at, n, buf);
    if (n > 0)
        memcpy(buf, st->bytes + at, n);
    return IPT_OK;
}

/* --- one tensor's bytes ----------------------------------------------------------------------- */
enum {
    MAX_SPARE = 32 << 20
}; /* kept between tensors: fresh memory costs a page fault every 4 KiB */

ipt_status ipt_st_load(const ipt_st_tensor *t)
{
    ipt_safetensors *st = t->of;
    chunk c = {0};
    if (!st || t->data || t->bytes == 0)
        return IPT_OK;
    if (t->bytes > MAX_TENSOR)
        return ipt_fail(st->ctx, IPT_ERR_UNSUPPORTED,
                        "%s: key '%.200s': %zu bytes, expected at most %" PRIu64, st->path, t->name,
                        t->bytes, MAX_TENSOR);
    if (st->spare.room >= t->bytes) {
        c = st->spare;
        st->spare = (chunk){0};
    } else {
        c = (chunk){ipt_alloc(st->ctx, t->bytes), t->bytes};
    }
    ipt_status status = c.p ? ipt_safetensors_read(st, t->place, t->bytes, c.p) : IPT_ERR_NOMEM;
    if (status != IPT_OK) {
        ipt_free(c.p);
        return status;
    }
    st->memory[t - st->tensor] = c;
    st->tensor[t - st->tensor].data = c.p;
    return IPT_OK;
}

void ipt_st_release(const ipt_st_tensor *t)
{
    ipt_safetensors *st = t->of;
    if (!st || !t->data)
        return;
    chunk *c = &st->memory[t - st->tensor], none = {0};
    st->tensor[t - st->tensor].data = NULL;
    if (c->room > st->spare.room && c->room <= MAX_SPARE) {
        chunk old = st->spare;
        st->spare = *c;
        *c = old;
    }
    ipt_free(c->p);
    *c = none;
}

/* For functions that cannot fail: NULL when there are no values to look at. */
static const uint8_t *values_of(const ipt_st_tensor *t)
{
    return t->data || ipt_st_load(t) == IPT_OK ? t->data : NULL;
}

/* --- values -------------------------------------------------------------------------------------
 */
static uint16_t load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
static uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
static uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

float ipt_st_get(const ipt_st_tensor *t, size_t i)
{
    const uint8_t *p = values_of(t);
    if (!p)
        return NAN;
    p += i * dtypes[t->dtype].bytes;
    double d;
    float f;
    switch (t->dtype) {
    case IPT_ST_F64:
        memcpy(&d, p, sizeof d);
        return (float)d;
    case IPT_ST_F32:
        memcpy(&f, p, sizeof f);
        return f;
    case IPT_ST_F16:
        return ipt_f16_to_f32(load16(p));
    case IPT_ST_BF16:
        return ipt_bf16_to_f32(load16(p));
    case IPT_ST_F8_E4M3:
        return ipt_f8e4m3_to_f32(*p);
    case IPT_ST_F8_E5M2:
        return ipt_f8e5m2_to_f32(*p);
    case IPT_ST_I64:
        return (float)(int64_t)load64(p);
    case IPT_ST_I32:
        return (float)(int32_t)load32(p);
    case IPT_ST_I16:
        return (float)(int16_t)load16(p);
    case IPT_ST_I8:
        return (float)(int8_t)*p;
    case IPT_ST_U8:
    case IPT_ST_BOOL:
        return (float)*p;
    case IPT_ST_COUNT:
        break;
    }
    IPT_UNREACHABLE();
    return 0;
}

void ipt_st_to_f32(const ipt_st_tensor *t, size_t first, size_t n, float *dst)
{
    if (n == 0)
        return;
    const uint8_t *p = values_of(t);
    if (!p) {
        for (size_t i = 0; i < n; i++)
            dst[i] = NAN;
        return;
    }
    p += first * dtypes[t->dtype].bytes;
    if (t->dtype == IPT_ST_F32) {
        memcpy(dst, p, n * sizeof *dst);
    } else if (t->dtype == IPT_ST_F16) {
        for (size_t i = 0; i < n; i++)
            dst[i] = ipt_f16_to_f32(load16(p + 2 * i));
    } else if (t->dtype == IPT_ST_BF16) {
        for (size_t i = 0; i < n; i++)
            dst[i] = ipt_bf16_to_f32(load16(p + 2 * i));
    } else if (t->dtype == IPT_ST_F8_E4M3 || t->dtype == IPT_ST_F8_E5M2) {
        float table[256];
        for (unsigned v = 0; v < 256; v++)
            table[v] = t->dtype == IPT_ST_F8_E4M3 ? ipt_f8e4m3_to_f32((uint8_t)v)
                                                  : ipt_f8e5m2_to_f32((uint8_t)v);
        for (size_t i = 0; i < n; i++)
            dst[i] = table[p[i]];
    } else {
        for (size_t i = 0; i < n; i++)
            dst[i] = ipt_st_get(t, first + i);
    }
}

/* True when a value of n x size bytes has all bits of the exponent mask set. */
static bool has_full_exponent(const ipt_st_tensor *t)
{
    const uint8_t *p = t->data;
    uint32_t any = 0;
    switch (t->dtype) {
    case IPT_ST_F32:
        for (size_t i = 0; i < t->count; i++)
            any |= (uint32_t)((load32(p + 4 * i) & 0x7f800000u) == 0x7f800000u);
        break;
    case IPT_ST_F16:
        for (size_t i = 0; i < t->count; i++)
            any |= (uint32_t)((load16(p + 2 * i) & 0x7c00u) == 0x7c00u);
        break;
    case IPT_ST_BF16:
        for (size_t i = 0; i < t->count; i++)
            any |= (uint32_t)((load16(p + 2 * i) & 0x7f80u) == 0x7f80u);
        break;
    case IPT_ST_F64:
    case IPT_ST_F8_E4M3:
    case IPT_ST_F8_E5M2:
        return true; /* rare: looked at one by one */
    case IPT_ST_I64:
    case IPT_ST_I32:
    case IPT_ST_I16:
    case IPT_ST_I8:
    case IPT_ST_U8:
    case IPT_ST_BOOL:
    case IPT_ST_COUNT:
        return false;
    }
    return any != 0;
}

bool ipt_st_finite(const ipt_st_tensor *t, size_t *bad)
{
    if (t->count == 0)
        return true;
    if (values_of(t) && !has_full_exponent(t))
        return true;
    for (size_t i = 0; i < t->count; i++) {
        if (!isfinite(ipt_st_get(t, i))) {
            if (bad)
                *bad = i;
            return false;
        }
    }
    return true;
}
