/* model_io/weights_change.c - weights that change on the device: a low-rank product added in place
 * by shaders/fold.comp, values replaced from the host, and the way back to what the files hold. */
#include "model_io/weights.h"

#include <math.h>
#include <string.h>

/* Not IPT_USE_BACK: no gradient is asked for while weights are changed (engine/fold.c). */
static const ipt_use all_uses[] = {IPT_USE_PANEL, IPT_USE_ROWS, IPT_USE_TABLE};
static const float half_limit = 65520.0F; /* rounds to infinity in f16 */

/* Rounding to q8 would lose most of what an adapter adds. */
static ipt_status is_changeable(const ipt_store *s, const char *name, const ipt_store_entry *e)
{
    return e->view.dtype == IPT_Q8
               ? ipt_fail(s->ctx, IPT_ERR_UNSUPPORTED, "weight '%s' is q8: it cannot change", name)
               : IPT_OK;
}

/* --- values from the host --------------------------------------------------------------------- */
static float get_double(const void *data, size_t i) { return (float)((const double *)data)[i]; }

static ipt_status fits_half(const ipt_store *s, const char *name, const double *v, size_t n)
{
    float top = 0;
    for (size_t i = 0; i < n; i++)
        top = fmaxf(top, fabsf((float)v[i]));
    return top >= half_limit ? ipt_store_too_large(s, "adapters", name, top, IPT_F16) : IPT_OK;
}

static void from_double(ipt_use use, const ipt_store_entry *e, const double *v, void *dst)
{
    const ipt_shape *shape = &e->shape;
    size_t n = ipt_shape_count(shape), in = (size_t)shape->dim[shape->rank - 1],
           kw = shape->rank == 4 ? (size_t)shape->dim[2] : 1;
    if (use == IPT_USE_PANEL) {
        ipt_panel_src src = {.data = v,
                             .get = get_double,
                             .so = shape->dim[0] > 0 ? n / (size_t)shape->dim[0] : 0,
                             .si = 1,
                             .sy = kw * in,
                             .sx = in,
                             .type = IPT_PANEL_GET};
        ipt_panel_pack(shape, &src, e->view.dtype, dst);
        return;
    }
    for (size_t i = 0; i < n; i++)
        if (e->view.dtype == IPT_F16)
            ((uint16_t *)dst)[i] = ipt_f32_to_f16((float)v[i]);
        else
            ((float *)dst)[i] = (float)v[i];
}

/* The whole of one entry. */
static ipt_status write_double(ipt_store *s, ipt_use use, const ipt_store_entry *e, const double *v)
{
    void *mapped = ipt_buffer_map(e->buf),
         *dst = mapped ? mapped : ipt_alloc(s->ctx, (size_t)e->view.bytes);
    if (!dst)
        return IPT_ERR_NOMEM;
    ipt_status status = ipt_gpu_idle(s->gpu);
    if (status == IPT_OK)
        from_double(use, e, v, dst);
    if (status == IPT_OK && !mapped)
        status = ipt_buffer_write(s->gpu, e->buf, 0, dst, e->view.bytes);
    if (!mapped)
        ipt_free(dst);
    return status;
}

ipt_status ipt_weights_replace(ipt_weights *w, const char *name, const double *v)
{
    ipt_store *s = (ipt_store *)w;
    for (int pass = 0; pass < 2; pass++) /* looked at before anything is written */
        for (size_t i = 0; i < IPT_COUNT(all_uses); i++) {
            const ipt_store_entry *e = ipt_store_entry_of(s, name, all_uses[i]);
            if (e && pass == 0)
                IPT_TRY(is_changeable(s, name, e));
            if (e && pass == 0 && e->view.dtype == IPT_F16)
                IPT_TRY(fits_half(s, name, v, ipt_shape_count(&e->shape)));
            if (e && pass == 1)
                IPT_TRY(write_double(s, all_uses[i], e, v));
        }
    return IPT_OK;
}

ipt_status ipt_weights_restore(ipt_weights *w, const char *name)
{
    ipt_store *s = (ipt_store *)w;
    IPT_TRY(ipt_gpu_idle(s->gpu));
    for (size_t i = 0; i < IPT_COUNT(all_uses); i++) {
        const ipt_store_entry *e = ipt_store_entry_of(s, name, all_uses[i]);
        if (e)
            IPT_TRY(ipt_store_write(s, name, all_uses[i], e, true));
    }
    return IPT_OK;
}

/* --- products on the device ------------------------------------------------------------------- */
/* A product on its way: sizes in elements, and in bytes of a panel and of b's columns for it. */
typedef struct product {
    const ipt_store_entry *e;
    size_t rank, depth, panels;
    uint64_t a_bytes, panel, column;
} product;

static product product_of(const ipt_store_entry *e, size_t rank)
{
    size_t in = (size_t)e->shape.dim[e->shape.rank - 1],
           taps = e->shape.rank == 4 ? (size_t)e->shape.dim[1] * (size_t)e->shape.dim[2] : 1;
    product p = {.e = e, .rank = rank, .depth = taps * ((in + 3) / 4 * 4)};
    p.panels = ((size_t)e->shape.dim[0] + 31) / 32;
    p.a_bytes = (uint64_t)p.depth * rank * sizeof(float);
    p.panel = (uint64_t)p.depth * 32 * ipt_dtype_bytes(e->view.dtype);
    p.column = (uint64_t)rank * 32 * sizeof(float);
    return p;
}

/* a [K, rank] with a row for each input of the panels, which are padded to a multiple of four. */
static void pad_rows(const product *p, const float *a, float *dst)
{
    const ipt_shape *shape = &p->e->shape;
    size_t in = (size_t)shape->dim[shape->rank - 1], padded = (in + 3) / 4 * 4;
    memset(dst, 0, (size_t)p->a_bytes);
    for (size_t t = 0; t * padded < p->depth; t++)
        memcpy(dst + t * padded * p->rank, a + t * in * p->rank, in * p->rank * sizeof *a);
}

/* b [rank, out] as panels of 32 columns, [panel][rank][32]. */
static void panel_columns(const product *p, const float *b, float *dst)
{
    size_t out = (size_t)p->e->shape.dim[0];
    for (size_t at = 0; at < out; at += 32)
        for (size_t r = 0; r < p->rank; r++, dst += 32) {
            size_t n = out - at < 32 ? out - at : 32;
            memset(dst, 0, 32 * sizeof *dst);
            memcpy(dst, b + r * out + at, n * sizeof *b);
        }
}

/* A factor in the layout that fill() gives it. */
static ipt_status upload_factor(ipt_store *s, const product *p, const float *v,
                                void (*fill)(const product *p, const float *v, float *dst),
                                ipt_buffer *to, uint64_t bytes)
{
    float *mapped = ipt_buffer_map(to), *dst = mapped ? mapped : ipt_alloc(s->ctx, (size_t)bytes);
    if (!dst)
        return IPT_ERR_NOMEM;
    fill(p, v, dst);
    if (mapped)
        return IPT_OK;
    ipt_status status = ipt_buffer_write(s->gpu, to, 0, dst, bytes);
    ipt_free(dst);
    return status;
}

typedef struct fold_push {
    int32_t depth, quads, panels;
} fold_push;

/* texels: of the largest binding. */
static ipt_kernel_desc describe(const ipt_traits *t, ipt_dtype type, uint64_t texels)
{
    bool shuffle = t->simd && t->subgroup_shuffle && t->subgroup >= 4 && t->subgroup <= 64,
         texel = shuffle && t->texel && texels <= t->max_texels;
    uint32_t sg = shuffle ? t->subgroup : 64, tm = shuffle && sg > 16 ? sg : 16;
    ipt_kernel_desc d = {
        .shader = texel     ? "fold.texel"
                  : shuffle ? "fold.shuffle"
                            : "fold.plain",
        .n_spec = 3,
        .n_bind = 4,
        .push_bytes = sizeof(fold_push),
        .spec = {sg, tm, type == IPT_F16},
        .subgroup = shuffle ? sg : 0,
    };
    if (texel) {
        d.kind[0] = d.kind[1] = IPT_BIND_TEXEL_RGBA32F;
        d.kind[3] = IPT_BIND_TEXEL_RGBA32UI;
    }
    return d;
}

/* How many panels go into one dispatch; 0: not even one. */
static uint64_t panels_at_once(const ipt_traits *t, const product *p)
{
    uint64_t most = p->panel > p->column ? p->panel : p->column,
             n = most > 0 ? t->max_range / most : 0;
    if (p->a_bytes > t->max_range || n >= p->panels)
        return p->a_bytes > t->max_range ? 0 : p->panels;
    while (n > 0 && (n * p->panel % t->align || n * p->column % t->align))
        n--;
    return n;
}

static ipt_status record(ipt_store *s, const product *p, ipt_buffer *a, ipt_buffer *b, ipt_cmd *cmd)
{
    const ipt_traits *t = ipt_gpu_traits(s->gpu);
    const ipt_store_entry *e = p->e;
    uint64_t at_once = panels_at_once(t, p);
    ipt_kernel *kernel = NULL;
    if (at_once == 0)
        return ipt_fail(s->ctx, IPT_ERR_TOO_LARGE,
                        "a weight of %zu inputs at rank %zu passes what a binding takes", p->depth,
                        p->rank);
    uint64_t texels = p->a_bytes > at_once * p->panel ? p->a_bytes : at_once * p->panel;
    texels = (texels > at_once * p->column ? texels : at_once * p->column) / 16;
    const ipt_kernel_desc d = describe(t, e->view.dtype, texels);
    IPT_TRY(ipt_kernel_get(s->gpu, &d, &kernel));
    for (uint64_t at = 0; at < p->panels; at += at_once) {
        uint64_t m = p->panels - at < at_once ? p->panels - at : at_once;
        const ipt_binding w = {e->buf, e->view.off + at * p->panel, m * p->panel};
        const ipt_binding bind[4] = {{a, 0, p->a_bytes}, {b, at * p->column, m * p->column}, w, w};
        const fold_push push = {(int32_t)p->depth, (int32_t)(p->rank / 4), (int32_t)m};
        const uint32_t groups[3] = {(uint32_t)((p->depth + d.spec[1] - 1) / d.spec[1]),
                                    (uint32_t)((m * 8 + d.spec[0] - 1) / d.spec[0]), 1};
        IPT_TRY(ipt_cmd_dispatch(cmd, kernel, bind, &push, groups));
    }
    return IPT_OK;
}

ipt_status ipt_weights_ready(ipt_weights *w)
{
    ipt_store *s = (ipt_store *)w;
    ipt_kernel *kernel = NULL;
    const ipt_kernel_desc d = describe(ipt_gpu_traits(s->gpu), s->precision, 1);
    return ipt_kernel_get(s->gpu, &d, &kernel);
}

ipt_status ipt_weights_add(ipt_weights *w, const char *name, const float *a, const float *b,
                           size_t rank)
{
    ipt_store *s = (ipt_store *)w;
    const ipt_store_entry *e = ipt_store_entry_of(s, name, IPT_USE_PANEL);
    if (!e)
        return ipt_fail(s->ctx, IPT_ERR_MISSING, "weight '%s' is not on the device", name);
    IPT_TRY(is_changeable(s, name, e));
    const product p = product_of(e, rank);
    const uint64_t b_bytes = p.panels * p.column;
    uint32_t k = s->n_job++ % IPT_STORE_JOBS;
    ipt_cmd_destroy(s->gpu, &s->job[k].cmd); /* waits for it */
    ipt_buffer_destroy(s->gpu, &s->job[k].a);
    ipt_buffer_destroy(s->gpu, &s->job[k].b);
    IPT_TRY(ipt_buffer_create(s->gpu, p.a_bytes, &s->job[k].a));
    IPT_TRY(ipt_buffer_create(s->gpu, b_bytes, &s->job[k].b));
    IPT_TRY(upload_factor(s, &p, a, pad_rows, s->job[k].a, p.a_bytes));
    IPT_TRY(upload_factor(s, &p, b, panel_columns, s->job[k].b, b_bytes));
    IPT_TRY(ipt_cmd_create(s->gpu, &s->job[k].cmd));
    IPT_TRY(record(s, &p, s->job[k].a, s->job[k].b, s->job[k].cmd));
    IPT_TRY(ipt_cmd_end(s->job[k].cmd));
    return ipt_cmd_submit(s->job[k].cmd, NULL);
}
