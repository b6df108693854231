/* model_io/weights.c - weight stores: canonical names -> device memory, converted and packed on the
 * way, once for each name and use.
 *
 * One tensor at a time is read from its file and goes straight into device memory (or through one
 * bounce buffer where the device's memory is not visible). */
#include "model_io/weights.h"

#include <math.h>
#include <string.h>

/* Values of one weight in file order; element (o,i,ky,kx) is number o*so + i*si + ky*sy + kx*sx. */
typedef struct elems {
    const void *p;
    float *owned; /* freed after use; NULL: p is the loaded tensor */
    ipt_panel_type type;
    size_t so, si, sy, sx;
} elems;

static const char *strip(const ipt_store *s, const char *name)
{
    size_t n = s->prefix ? strlen(s->prefix) : 0;
    return n && strncmp(name, s->prefix, n) == 0 ? name + n : name;
}

/* --- finding ---------------------------------------------------------------------------------- */
bool ipt_source_find(const ipt_source *s, const char *canonical, ipt_found *out)
{
    char key[IPT_KEY_MAX];
    size_t n = strlen(s->prefix);
    memcpy(key, s->prefix, n);
    for (int alt = 0;
         ipt_keymap_emit(s->layout, &s->frame, canonical, alt, key + n, sizeof key - n, &out->part);
         alt++) {
        for (size_t f = 0; f < s->n_file; f++) {
            out->tensor = ipt_safetensors_find(s->file[f], key);
            out->file = s->file[f];
            if (out->tensor)
                return true;
        }
    }
    return false;
}

/* Dims in file order (O,I,KH,KW) of a logical shape; returns the rank without trailing ones. */
static int file_dims(const ipt_shape *s, int64_t d[4])
{
    static const int order[4] = {0, 3, 1, 2};
    for (int i = 0; i < 4; i++)
        d[i] = i >= s->rank ? 1 : s->rank == 4 ? s->dim[order[i]] : s->dim[i];
    int rank = 4;
    while (rank > 0 && d[rank - 1] == 1)
        rank--;
    return rank;
}

bool ipt_found_fits(const ipt_found *f, const ipt_shape *want)
{
    int64_t w[4], d[IPT_ST_MAX_RANK];
    int n_want = file_dims(want, w), n = f->tensor->rank;
    memcpy(d, f->tensor->dim, sizeof d);
    if (f->part.third) {
        if (n < 1 || d[0] % 3 != 0)
            return false;
        d[0] /= 3;
    }
    if (f->part.transposed) {
        if (n != 2)
            return false;
        int64_t t = d[0];
        d[0] = d[1];
        d[1] = t;
    }
    while (n > 0 && d[n - 1] == 1)
        n--;
    if (n != n_want)
        return false;
    for (int i = 0; i < n; i++) {
        if (d[i] != w[i])
            return false;
    }
    return true;
}

void ipt_file_shape_text(const ipt_shape *s, char *buf, size_t n)
{
    int64_t d[4];
    size_t at = 0;
    file_dims(s, d);
    buf[0] = '\0';
    for (int i = 0; i < s->rank && at < n; i++) {
        int len = snprintf(buf + at, n - at, "%s%" PRId64 "%s", i ? "," : "[", d[i],
                           i + 1 == s->rank ? "]" : "");
        at += len > 0 ? (size_t)len : 0;
    }
}

static ipt_status find_tensor(const ipt_store *s, const char *name, const ipt_shape *shape,
                              ipt_found *f)
{
    const char *file = s->src.n_file ? ipt_safetensors_path(s->src.file[0]) : "model";
    if (!ipt_source_find(&s->src, name, f))
        return ipt_fail(s->ctx, IPT_ERR_MISSING, "%s: weight '%s' is missing", file, name);
    if (!ipt_found_fits(f, shape)) {
        char found[128], want[96];
        ipt_st_shape_text(f->tensor, found, sizeof found);
        ipt_file_shape_text(shape, want, sizeof want);
        return ipt_fail(s->ctx, IPT_ERR_SHAPE, "%s: key '%s': found shape %s, expected %s%s",
                        ipt_safetensors_path(f->file), f->tensor->name, found, want,
                        f->part.third        ? " for each third"
                        : f->part.transposed ? " transposed"
                                             : "");
    }
    return IPT_OK;
}

/* Reads a found tensor; the caller releases it, also after failure. */
static ipt_status load_finite(const ipt_store *s, const ipt_found *f)
{
    size_t bad = 0;
    IPT_TRY(ipt_st_load(f->tensor));
    if (ipt_st_finite(f->tensor, &bad))
        return IPT_OK;
    return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                    "%s: key '%s': element %zu is %s, expected finite numbers",
                    ipt_safetensors_path(f->file), f->tensor->name, bad,
                    isnan(ipt_st_get(f->tensor, bad)) ? "NaN" : "infinite");
}

/* --- values ----------------------------------------------------------------------------------- */
static void set_strides(elems *e, const ipt_shape *shape, bool transposed)
{
    int64_t d[4];
    file_dims(shape, d);
    e->sx = 1;
    e->sy = (size_t)d[3];
    e->si = (size_t)(d[2] * d[3]);
    e->so = (size_t)(d[1] * d[2] * d[3]);
    if (transposed) {
        e->so = 1;
        e->si = (size_t)d[0];
    }
}

/* Same bits for the same name, seed and number, whatever asks. */
static float random_value(uint64_t key, size_t i)
{
    uint64_t state = key + (uint64_t)i * 0x9e3779b97f4a7c15u, r = ipt_rng_next(&state);
    /* The sum of four uniform numbers is close to normal; its deviation is 65536 / sqrt(3). */
    int32_t sum = (int32_t)(r & 0xffff) + (int32_t)(r >> 16 & 0xffff) +
                  (int32_t)(r >> 32 & 0xffff) + (int32_t)(r >> 48);
    return (float)(sum - 131070) * (1.7320508f / 65536.0f);
}

static void random_fill(const ipt_store *s, const char *name, const ipt_shape *shape, float *dst)
{
    size_t n = ipt_shape_count(shape), len = strlen(name),
           fan = shape->dim[0] > 0 ? n / (size_t)shape->dim[0] : 1;
    uint64_t key = ipt_hash_name(name) ^ (s->seed * 0xd1342543de82ef95u);
    float mean = 0, dev = 1.0f / sqrtf((float)(fan ? fan : 1));
    if (shape->rank == 1) {
        bool is_bias = len > 5 && strcmp(name + len - 5, ".bias") == 0;
        mean = is_bias ? 0.0f : 1.0f;
        dev = is_bias ? 0.02f : 0.05f;
    } else if (strstr(name, "embedding.weight")) {
        dev = 0.02f;
    }
    for (size_t i = 0; i < n; i++)
        dst[i] = mean + dev * random_value(key, i);
}

ipt_status ipt_store_too_large(const ipt_store *s, const char *file, const char *key, float value,
                               ipt_dtype type)
{
    return ipt_fail(s->ctx, IPT_ERR_UNSUPPORTED,
                    "%s: key '%s': value %g does not fit %s; use --precision f32", file, key,
                    (double)value, type == IPT_Q8 ? "q8" : "f16");
}

static float top_of(const float *v, size_t n)
{
    float top = 0;
    for (size_t i = 0; i < n; i++)
        top = fmaxf(top, fabsf(v[i]));
    return top;
}
static const float half_limit = 65520.0f; /* rounds to infinity */

/* Rows and tables: converts through a small buffer, so that no second whole copy exists. */
static ipt_status convert(const ipt_store *s, const ipt_found *f, size_t first, size_t n,
                          ipt_dtype to, void *dst)
{
    float part[1024];
    for (size_t i = 0; i < n; i += IPT_COUNT(part)) {
        size_t m = n - i < IPT_COUNT(part) ? n - i : IPT_COUNT(part);
        ipt_st_to_f32(f->tensor, first + i, m, part);
        if (to == IPT_F32) {
            memcpy((float *)dst + i, part, sizeof *part * m);
            continue;
        }
        float top = top_of(part, m);
        if (top >= half_limit)
            return ipt_store_too_large(s, ipt_safetensors_path(f->file), f->tensor->name, top,
                                       IPT_F16);
        for (size_t k = 0; k < m; k++)
            ((uint16_t *)dst)[i + k] = ipt_f32_to_f16(part[k]);
    }
    return IPT_OK;
}

/* Whether packing reads values of that type as they lie in the file. */
static bool is_plain(ipt_st_dtype t, ipt_panel_type *as)
{
    static const ipt_panel_type types[IPT_ST_COUNT] = {
        [IPT_ST_F32] = IPT_PANEL_F32, [IPT_ST_F16] = IPT_PANEL_F16, [IPT_ST_BF16] = IPT_PANEL_BF16};
    *as = types[t];
    return types[t] != IPT_PANEL_GET;
}

/* Borrows the loaded tensor where packing can read it as it is, else converts to f32. */
static ipt_status get_elems(const ipt_store *s, const char *name, const ipt_shape *shape,
                            const ipt_found *f, elems *e)
{
    size_t n = ipt_shape_count(shape);
    *e = (elems){.type = IPT_PANEL_F32};
    set_strides(e, shape, f->part.transposed);
    if (!s->is_random && n > 0) {
        const ipt_st_tensor *t = f->tensor;
        size_t first = f->part.third ? (size_t)(f->part.third - 1) * n : 0,
               size = ipt_st_dtype_bytes(t->dtype);
        const uint8_t *p = t->data + first * size;
        ipt_panel_type type;
        if (is_plain(t->dtype, &type) && (uintptr_t)p % size == 0) {
            e->p = p;
            e->type = type;
            return IPT_OK;
        }
        e->owned = ipt_calloc(s->ctx, n, sizeof *e->owned);
        if (!e->owned)
            return IPT_ERR_NOMEM;
        ipt_st_to_f32(t, first, n, e->owned);
    } else {
        e->owned = ipt_calloc(s->ctx, n, sizeof *e->owned);
        if (!e->owned)
            return IPT_ERR_NOMEM;
        random_fill(s, name, shape, e->owned);
    }
    e->p = e->owned;
    return IPT_OK;
}

static float elem(const elems *e, size_t i)
{
    switch (e->type) {
    case IPT_PANEL_F16:
        return ipt_f16_to_f32(((const uint16_t *)e->p)[i]);
    case IPT_PANEL_BF16:
        return ipt_bf16_to_f32(((const uint16_t *)e->p)[i]);
    case IPT_PANEL_F32:
    case IPT_PANEL_GET:
        break;
    }
    return ((const float *)e->p)[i];
}

/* --- upload ----------------------------------------------------------------------------------- */
/* Whatever the layout, in logical order (channels last). */
static ipt_status fill_logical(const ipt_store *s, const char *name, const ipt_shape *shape,
                               const ipt_found *f, ipt_dtype to, void *dst)
{
    elems e;
    int64_t d[4];
    size_t at = 0;
    IPT_TRY(get_elems(s, name, shape, f, &e));
    file_dims(shape, d);
    for (size_t o = 0; o < (size_t)d[0]; o++) {
        for (size_t k = 0; k < (size_t)(d[2] * d[3]); k++) {
            for (size_t i = 0; i < (size_t)d[1]; i++, at++) {
                float v = elem(&e, o * e.so + i * e.si + k);
                if (to == IPT_F16)
                    ((uint16_t *)dst)[at] = ipt_f32_to_f16(v);
                else
                    ((float *)dst)[at] = v;
            }
        }
    }
    ipt_free(e.owned);
    return IPT_OK;
}

/* The values that q8 panels hold, in logical order: a gradient is that of the product that is
 * computed. */
static ipt_status get_rounded(const ipt_store *s, const char *name, const ipt_shape *shape,
                              const ipt_found *f, elems *e)
{
    const size_t n = ipt_shape_count(shape), in = (size_t)shape->dim[shape->rank - 1],
                 kw = shape->rank == 4 ? (size_t)shape->dim[2] : 1;
    float *v = ipt_calloc(s->ctx, n, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    ipt_status status = fill_logical(s, name, shape, f, IPT_F32, v);
    if (status != IPT_OK) {
        ipt_free(v);
        return status;
    }
    ipt_q8_round(v, n);
    *e = (elems){.p = v,
                 .owned = v,
                 .type = IPT_PANEL_F32,
                 .so = shape->dim[0] > 0 ? n / (size_t)shape->dim[0] : 0,
                 .si = 1,
                 .sy = kw * in,
                 .sx = in};
    return IPT_OK;
}

/* Refuses a tensor with a value that panels of that type do not hold. */
static ipt_status check_range(const ipt_store *s, const ipt_found *f, size_t first, size_t n,
                              const ipt_weight_view *v)
{
    /* A scale is rounded, and with it what it multiplies. */
    const float limit = v->dtype == IPT_Q8 ? 127 * half_limit
                        : v->is_q8         ? 0.999F * half_limit
                                           : half_limit;
    float part[1024], top = 0;
    if (v->dtype == IPT_F32 || (f->tensor->dtype == IPT_ST_F16 && !v->is_q8))
        return IPT_OK;
    for (size_t i = 0; i < n; i += IPT_COUNT(part)) {
        size_t m = n - i < IPT_COUNT(part) ? n - i : IPT_COUNT(part);
        ipt_st_to_f32(f->tensor, first + i, m, part);
        top = fmaxf(top, top_of(part, m));
    }
    return top < limit ? IPT_OK
                       : ipt_store_too_large(s, ipt_safetensors_path(f->file), f->tensor->name, top,
                                             v->dtype);
}

static ipt_status fill(const ipt_store *s, const char *name, const ipt_store_entry *to, ipt_use use,
                       const ipt_found *f, bool is_known, void *dst)
{
    const ipt_shape *shape = &to->shape;
    const ipt_dtype dtype = to->view.dtype;
    size_t n = ipt_shape_count(shape), first = f->part.third ? (size_t)(f->part.third - 1) * n : 0;
    elems e;
    if (use != IPT_USE_PANEL && use != IPT_USE_BACK) {
        if (s->is_random || f->part.transposed || shape->rank > 2)
            return fill_logical(s, name, shape, f, dtype, dst);
        return convert(s, f, first, n, dtype, dst);
    }
    if (!is_known)
        IPT_TRY(check_range(s, f, first, n, &to->view));
    IPT_TRY(to->view.is_q8 && use == IPT_USE_BACK ? get_rounded(s, name, shape, f, &e)
                                                  : get_elems(s, name, shape, f, &e));
    ipt_panel_src src = {
        .data = e.p, .so = e.so, .si = e.si, .sy = e.sy, .sx = e.sx, .type = e.type};
    ipt_shape packed = *shape;
    if (use == IPT_USE_BACK) {
        packed = ipt_panel_back(shape);
        src.so = e.si;
        src.si = e.so;
        src.is_reversed = true;
    }
    ipt_panel_pack(&packed, &src, dtype, dst);
    ipt_free(e.owned);
    return IPT_OK;
}

/* Panels of a plain tensor whose values are known, a few at a time: what is read stays in the
 * processor's cache, and no memory of the tensor's size is touched anew. */
static ipt_status fill_parts(const ipt_store *s, const ipt_shape *shape, const ipt_found *f,
                             ipt_dtype to, void *dst)
{
    enum { OUTPUTS = 32 }; /* of a panel */
    const size_t size = ipt_st_dtype_bytes(f->tensor->dtype), out = (size_t)shape->dim[0],
                 first = f->part.third ? (size_t)(f->part.third - 1) * out : 0;
    ipt_shape part = *shape;
    elems e = {0};
    uint8_t *to_bytes = dst;
    ipt_status status = IPT_OK;
    set_strides(&e, shape, false);
    (void)is_plain(f->tensor->dtype, &e.type);
    part.dim[0] = 0;
    const uint64_t tail = ipt_panel_bytes(&part, to); /* behind the last panel */
    part.dim[0] = OUTPUTS;
    const uint64_t panel = ipt_panel_bytes(&part, to) - tail;
    void *values = ipt_calloc(s->ctx, e.so * OUTPUTS, size);
    if (!values)
        return IPT_ERR_NOMEM;
    for (size_t o = 0; o < out && status == IPT_OK; o += OUTPUTS, to_bytes += panel) {
        const size_t n = out - o < OUTPUTS ? out - o : OUTPUTS;
        const ipt_panel_src src = {
            .data = values, .so = e.so, .si = e.si, .sy = e.sy, .sx = e.sx, .type = e.type};
        part.dim[0] = (int32_t)n;
        status = ipt_safetensors_read(f->file, f->tensor->place + (first + o) * e.so * size,
                                      n * e.so * size, values);
        if (status == IPT_OK)
            ipt_panel_pack(&part, &src, to, to_bytes);
    }
    ipt_free(values);
    return status;
}

/* All of an entry as it lies on the device. */
static ipt_status store_values(ipt_store *s, const char *name, ipt_use use,
                               const ipt_store_entry *e, bool is_known, void *dst)
{
    ipt_found f = {0};
    ipt_status status = IPT_OK;
    if (s->is_random)
        return fill(s, name, e, use, &f, true, dst);
    IPT_TRY(find_tensor(s, name, &e->shape, &f));
    ipt_panel_type type;
    if (is_known && use == IPT_USE_PANEL && !f.part.transposed && is_plain(f.tensor->dtype, &type))
        return fill_parts(s, &e->shape, &f, e->view.dtype, dst);
    status = is_known ? ipt_st_load(f.tensor) : load_finite(s, &f);
    if (status == IPT_OK)
        status = fill(s, name, e, use, &f, is_known, dst);
    ipt_st_release(f.tensor);
    return status;
}

ipt_status ipt_store_write(ipt_store *s, const char *name, ipt_use use, const ipt_store_entry *e,
                           bool is_known)
{
    uint8_t *mapped = ipt_buffer_map(e->view.buf);
    if (mapped)
        return store_values(s, name, use, e, is_known, mapped + e->view.off);
    void *bounce = ipt_alloc(s->ctx, (size_t)e->view.bytes);
    if (!bounce)
        return IPT_ERR_NOMEM;
    ipt_status status = store_values(s, name, use, e, is_known, bounce);
    if (status == IPT_OK)
        status = ipt_buffer_write(s->gpu, e->view.buf, e->view.off, bounce, e->view.bytes);
    ipt_free(bounce);
    return status;
}

/* How a weight lies on the device. */
static ipt_weight_view view_of(const ipt_store *s, const ipt_shape *shape, ipt_use use)
{
    const bool is_panel = use == IPT_USE_PANEL || use == IPT_USE_BACK;
    const ipt_dtype panel = ipt_panel_dtype(shape, s->precision);
    const ipt_shape packed = use == IPT_USE_BACK ? ipt_panel_back(shape) : *shape;
    ipt_weight_view v = {.dtype = s->precision == IPT_Q8 ? IPT_F16 : s->precision,
                         .is_q8 = is_panel && panel == IPT_Q8};
    if (use == IPT_USE_ROWS)
        v.dtype = IPT_F32;
    if (use == IPT_USE_PANEL)
        v.dtype = panel;
    v.bytes = is_panel ? ipt_panel_bytes(&packed, v.dtype)
                       : ipt_shape_count(shape) * ipt_dtype_bytes(v.dtype);
    return v;
}

static ipt_status upload(ipt_store *s, const char *name, const ipt_shape *shape, ipt_use use,
                         ipt_store_entry *out)
{
    ipt_found f = {0};
    if (!s->is_random) /* before memory is taken for it */
        IPT_TRY(find_tensor(s, name, shape, &f));
    *out = (ipt_store_entry){.shape = *shape, .view = view_of(s, shape, use)};
    IPT_TRY(ipt_buffer_create(s->gpu, out->view.bytes ? out->view.bytes : 4, &out->buf));
    out->view.buf = out->buf;
    ipt_status status = ipt_store_write(s, name, use, out, false);
    if (status != IPT_OK) {
        ipt_buffer_destroy(s->gpu, &out->buf);
        return status;
    }
    s->device_bytes += out->view.bytes;
    return IPT_OK;
}

static ipt_status add_entry(ipt_store *s, const char *key, const ipt_store_entry *e)
{
    if (s->n_entry == s->cap_entry) {
        size_t cap = s->cap_entry ? 2 * s->cap_entry : 256;
        ipt_store_entry *grown =
            ipt_regrow(s->ctx, s->entries, s->n_entry * sizeof *grown, cap * sizeof *grown);
        if (!grown)
            return IPT_ERR_NOMEM;
        s->entries = grown;
        s->cap_entry = cap;
    }
    bool added = false;
    const char *kept = ipt_arena_strdup(&s->arena, key);
    if (!kept)
        return IPT_ERR_NOMEM;
    IPT_TRY(ipt_index_put(&s->index, kept, (uint32_t)s->n_entry, &added));
    s->entries[s->n_entry++] = *e;
    return IPT_OK;
}

static ipt_status other_shape(const ipt_store *s, const char *name, const ipt_shape *had,
                              const ipt_shape *want)
{
    char a[64], b[64];
    ipt_shape_text(had, a, sizeof a);
    ipt_shape_text(want, b, sizeof b);
    return ipt_fail(s->ctx, IPT_ERR_SHAPE, "weight '%s': asked for as %s, kept as %s", name, b, a);
}

static bool key_of(const char *name, ipt_use use, char key[IPT_KEY_MAX + 2])
{
    static const char kinds[] = {
        [IPT_USE_PANEL] = 'P', [IPT_USE_BACK] = 'B', [IPT_USE_ROWS] = 'R', [IPT_USE_TABLE] = 'T'};
    const char kind = kinds[use];
    int n = snprintf(key, IPT_KEY_MAX + 2, "%c:%s", kind, name);
    return n >= 0 && n < IPT_KEY_MAX + 2;
}

ipt_store_entry *ipt_store_entry_of(ipt_store *s, const char *name, ipt_use use)
{
    char key[IPT_KEY_MAX + 2];
    uint32_t at = 0;
    return key_of(strip(s, name), use, key) && ipt_index_get(&s->index, key, &at) ? &s->entries[at]
                                                                                  : NULL;
}

/* What is on the device of a name, out->buf NULL where it is not; key [IPT_KEY_MAX + 2]. */
static ipt_status find_kept(ipt_store *s, const char *name, const ipt_shape *shape, ipt_use use,
                            char *key, ipt_weight_view *out)
{
    if (!s->gpu)
        return ipt_fail(s->ctx, IPT_ERR_ARG, "weight '%s': this store has no device", name);
    if (!key_of(name, use, key))
        return ipt_fail(s->ctx, IPT_ERR_ARG, "weight '%.100s...': name too long", name);
    const ipt_store_entry *kept = ipt_store_entry_of(s, name, use);
    if (kept && memcmp(kept->shape.dim, shape->dim, sizeof shape->dim) != 0)
        return other_shape(s, name, &kept->shape, shape);
    *out = kept ? kept->view : view_of(s, shape, use);
    return IPT_OK;
}

static ipt_status store_size(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                             ipt_weight_view *out)
{
    ipt_store *s = (ipt_store *)w;
    char key[IPT_KEY_MAX + 2];
    return find_kept(s, strip(s, name), shape, use, key, out);
}

static ipt_status store_put(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                            const ipt_weight_view *to, bool is_known)
{
    const ipt_store_entry e = {.shape = *shape, .view = *to};
    return ipt_store_write((ipt_store *)w, strip((ipt_store *)w, name), use, &e, is_known);
}

static ipt_status store_find(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                             ipt_weight_view *out)
{
    ipt_store *s = (ipt_store *)w;
    char key[IPT_KEY_MAX + 2];
    ipt_weight_view kept = {0};
    ipt_store_entry e;
    name = strip(s, name);
    IPT_TRY(find_kept(s, name, shape, use, key, &kept));
    if (kept.buf) {
        *out = kept;
        return IPT_OK;
    }
    IPT_TRY(upload(s, name, shape, use, &e));
    ipt_status status = add_entry(s, key, &e);
    if (status != IPT_OK) {
        ipt_buffer_destroy(s->gpu, &e.buf);
        return status;
    }
    *out = e.view;
    return IPT_OK;
}

static ipt_status store_read(ipt_weights *w, const char *name, const ipt_shape *shape, double *out)
{
    ipt_store *s = (ipt_store *)w;
    ipt_found f = {0};
    elems e = {0};
    int64_t d[4];
    ipt_status status = IPT_OK;
    name = strip(s, name);
    if (!s->is_random)
        IPT_TRY(find_tensor(s, name, shape, &f));
    if (!s->is_random)
        status = load_finite(s, &f);
    if (status == IPT_OK)
        status = get_elems(s, name, shape, &f, &e);
    file_dims(shape, d);
    for (size_t o = 0; status == IPT_OK && o < (size_t)d[0]; o++)
        for (size_t k = 0; k < (size_t)(d[2] * d[3]); k++)
            for (size_t i = 0; i < (size_t)d[1]; i++)
                *out++ = (double)elem(&e, o * e.so + i * e.si + k);
    ipt_free(e.owned);
    if (!s->is_random)
        ipt_st_release(f.tensor);
    return status;
}

/* --- life ------------------------------------------------------------------------------------- */
static ipt_status create(ipt_ctx *ctx, ipt_gpu *gpu, ipt_dtype precision, const char *prefix,
                         ipt_store **out)
{
    if (precision != IPT_F16 && precision != IPT_F32 && precision != IPT_Q8) {
        ipt_fail(ctx, IPT_ERR_ARG, "weight store: precision must be f16, f32 or q8");
        return IPT_ERR_ARG;
    }
    ipt_store *s = ipt_alloc(ctx, sizeof *s);
    if (!s)
        return IPT_ERR_NOMEM;
    s->base.find = store_find;
    s->base.read = store_read;
    s->base.size = store_size;
    s->base.put = store_put;
    s->ctx = ctx;
    s->gpu = gpu;
    s->precision = precision;
    ipt_arena_init(&s->arena, ctx);
    s->prefix = ipt_strdup(ctx, prefix ? prefix : "");
    if (!s->prefix || ipt_index_init(&s->index, ctx, 512) != IPT_OK) {
        ipt_weights *w = &s->base;
        ipt_weights_destroy(&w);
        return IPT_ERR_NOMEM;
    }
    *out = s;
    return IPT_OK;
}

ipt_status ipt_store_create(ipt_ctx *ctx, const ipt_source *src, ipt_gpu *gpu, ipt_dtype precision,
                            const char *prefix, ipt_weights **out)
{
    ipt_store *s = NULL;
    IPT_TRY(create(ctx, gpu, precision, prefix, &s));
    s->src = *src;
    s->src.file = ipt_arena_alloc(&s->arena, src->n_file * sizeof(void *));
    if (!s->src.file) {
        ipt_weights *w = &s->base;
        ipt_weights_destroy(&w);
        return IPT_ERR_NOMEM;
    }
    memcpy(s->src.file, src->file, src->n_file * sizeof(void *));
    *out = &s->base;
    return IPT_OK;
}

ipt_status ipt_weights_file(ipt_ctx *ctx, const ipt_safetensors *st, ipt_gpu *gpu,
                            ipt_dtype precision, const char *prefix, ipt_weights **out)
{
    const ipt_safetensors *one[1] = {st};
    return ipt_store_create(ctx, &(ipt_source){.file = one, .n_file = 1}, gpu, precision, prefix,
                            out);
}

ipt_status ipt_weights_random(ipt_ctx *ctx, ipt_gpu *gpu, ipt_dtype precision, uint64_t seed,
                              ipt_weights **out)
{
    ipt_store *s = NULL;
    IPT_TRY(create(ctx, gpu, precision, NULL, &s));
    s->is_random = true;
    s->seed = seed;
    *out = &s->base;
    return IPT_OK;
}

void ipt_weights_destroy(ipt_weights **w)
{
    if (!w || !*w)
        return;
    ipt_store *s = (ipt_store *)*w;
    for (int i = 0; i < IPT_STORE_JOBS; i++) {
        ipt_cmd_destroy(s->gpu, &s->job[i].cmd);
        ipt_buffer_destroy(s->gpu, &s->job[i].a);
        ipt_buffer_destroy(s->gpu, &s->job[i].b);
    }
    for (size_t i = 0; i < s->n_entry; i++)
        ipt_buffer_destroy(s->gpu, &s->entries[i].buf);
    ipt_free(s->entries);
    ipt_index_finish(&s->index);
    ipt_arena_finish(&s->arena);
    ipt_free(s->prefix);
    ipt_free(s);
    *w = NULL;
}

uint64_t ipt_weights_device_bytes(const ipt_weights *w)
{
    return ((const ipt_store *)w)->device_bytes;
}
