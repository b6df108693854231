/* graph/pack.c - packed panels: the layout in which weights lie on the device (graph.h).  Knows no
 * file format: the source is strides and an element type. */
#include "graph/graph.h"

#include <string.h>

enum { PANEL = 32, BLOCK = 32 }; /* columns of a panel; inputs handled at a time (stays in L1) */

typedef struct pack_dims {
    int32_t o, kh, kw, i, ip; /* ip: i rounded up to 4 */
    uint64_t depth, panels;
} pack_dims;

static pack_dims dims_of(const ipt_shape *w)
{
    pack_dims d = {.o = w->dim[0], .kh = 1, .kw = 1, .i = w->dim[1]};
    if (w->rank == 4) {
        d.kh = w->dim[1];
        d.kw = w->dim[2];
        d.i = w->dim[3];
    }
    d.ip = (d.i + 3) & ~3;
    d.depth = (uint64_t)d.kh * (uint64_t)d.kw * (uint64_t)d.ip;
    d.panels = ((uint64_t)d.o + PANEL - 1) / PANEL;
    return d;
}

uint64_t ipt_panel_bytes(const ipt_shape *w, ipt_dtype dtype)
{
    pack_dims d = dims_of(w);
    return (d.panels * d.depth + 32) * PANEL * ipt_dtype_bytes(dtype);
}

ipt_shape ipt_panel_back(const ipt_shape *w)
{
    ipt_shape s = *w;
    s.dim[0] = w->dim[w->rank - 1];
    s.dim[w->rank - 1] = w->dim[0];
    return s;
}

/* One block: up to 32 inputs of 32 outputs under one tap, [input][output]. */
typedef struct pack_block {
    size_t at; /* source element of its first input and output */
    int n_i, n_o;
} pack_block;

static void load_half(const ipt_panel_src *s, pack_block b, uint16_t out[BLOCK][PANEL])
{
    const uint16_t *p = (const uint16_t *)s->data + b.at;
    for (int o = 0; o < b.n_o; o++)
        for (int i = 0; i < b.n_i; i++)
            out[i][o] = p[(size_t)o * s->so + (size_t)i * s->si];
}

/* As ipt_f16_to_f32, inline and short for the common range. */
static inline float from_half(uint16_t h)
{
    const uint32_t exponent = h & 0x7c00U, u = (uint32_t)(h & 0x8000U) << 16 |
                                               (((uint32_t)(h & 0x7fffU) << 13) + 0x38000000U);
    float f;
    if (exponent == 0 || exponent == 0x7c00U)
        return ipt_f16_to_f32(h);
    memcpy(&f, &u, sizeof f);
    return f;
}

/* One output's inputs; the type is asked once for all. */
static void load_column(const ipt_panel_src *s, size_t at, int n, float *out)
{
    const size_t step = s->si;
    switch (s->type) {
    case IPT_PANEL_F32:
        for (int i = 0; i < n; i++)
            out[i * PANEL] = ((const float *)s->data)[at + (size_t)i * step];
        break;
    case IPT_PANEL_F16:
        for (int i = 0; i < n; i++)
            out[i * PANEL] = from_half(((const uint16_t *)s->data)[at + (size_t)i * step]);
        break;
    case IPT_PANEL_BF16:
        for (int i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)((const uint16_t *)s->data)[at + (size_t)i * step] << 16;
            memcpy(&out[i * PANEL], &bits, sizeof bits);
        }
        break;
    case IPT_PANEL_GET:
        for (int i = 0; i < n; i++)
            out[i * PANEL] = s->get(s->data, at + (size_t)i * step);
        break;
    }
}

static void load_float(const ipt_panel_src *s, pack_block b, float out[BLOCK][PANEL])
{
    for (int o = 0; o < b.n_o; o++)
        load_column(s, b.at + (size_t)o * s->so, b.n_i, &out[0][o]);
}

/* As ipt_f32_to_f16, inline and short for the common range. */
static inline uint16_t to_half(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    const uint32_t mag = u & 0x7fffffffU;
    if (mag - 0x38800000U >= 0x47000000U - 0x38800000U) /* subnormal, zero, huge, not a number */
        return ipt_f32_to_f16(f);
    return (uint16_t)((u >> 16 & 0x8000U) |
                      ((mag - 0x38000000U + 0xfffU + (mag >> 13 & 1U)) >> 13));
}

/* Block rows -> pairs [i/2][32]; a last odd input pairs with zero. */
static void store_pairs(uint16_t in[BLOCK][PANEL], int n_i, uint32_t *dst)
{
    for (int i = 0; i < n_i; i += 2)
        for (int o = 0; o < PANEL; o++)
            dst[i / 2 * PANEL + o] = in[i][o] | (uint32_t)in[i + 1][o] << 16;
}

static void pack_block_f16(const ipt_panel_src *s, pack_block b, int n_pad, uint32_t *dst)
{
    uint16_t half[BLOCK][PANEL];
    if (b.n_o < PANEL || b.n_i < n_pad)
        memset(half, 0, sizeof half);
    if (s->type == IPT_PANEL_F16) {
        load_half(s, b, half);
    } else {
        float f[BLOCK][PANEL];
        load_float(s, b, f);
        for (int i = 0; i < b.n_i; i++)
            for (int o = 0; o < b.n_o; o++)
                half[i][o] = to_half(f[i][o]);
    }
    store_pairs(half, n_pad, dst);
}

static void pack_block_f32(const ipt_panel_src *s, pack_block b, int n_pad, float *dst)
{
    float f[BLOCK][PANEL];
    if (b.n_o < PANEL || b.n_i < n_pad)
        memset(f, 0, sizeof f);
    load_float(s, b, f);
    memcpy(dst, f, (size_t)n_pad * PANEL * sizeof(float));
}

void ipt_panel_pack(const ipt_shape *w, const ipt_panel_src *src, ipt_dtype dtype, void *dst)
{
    const pack_dims d = dims_of(w);
    const int taps = d.kh * d.kw;
    const uint64_t panel_bytes = d.depth * PANEL * ipt_dtype_bytes(dtype);
    for (uint64_t p = 0; p < d.panels; p++) {
        char *panel = (char *)dst + p * panel_bytes;
        const int left = d.o - (int)p * PANEL;
        for (int i0 = 0; i0 < d.i; i0 += BLOCK)
            for (int tap = 0; tap < taps; tap++) {
                pack_block b = {.n_i = d.i - i0 < BLOCK ? d.i - i0 : BLOCK,
                                .n_o = left < PANEL ? left : PANEL};
                const int from = src->is_reversed ? taps - 1 - tap : tap;
                b.at = p * PANEL * src->so + (size_t)i0 * src->si +
                       (size_t)(from / d.kw) * src->sy + (size_t)(from % d.kw) * src->sx;
                const int n_pad = d.ip - i0 < BLOCK ? d.ip - i0 : BLOCK;
                const uint64_t k = (uint64_t)tap * (uint64_t)d.ip + (uint64_t)i0;
                if (dtype == IPT_F16)
                    pack_block_f16(src, b, n_pad, (uint32_t *)(void *)panel + k / 2 * PANEL);
                else
                    pack_block_f32(src, b, n_pad, (float *)(void *)panel + k * PANEL);
            }
    }
    memset((char *)dst + d.panels * panel_bytes, 0, (size_t)32 * PANEL * ipt_dtype_bytes(dtype));
}

void ipt_panel_unpack(const ipt_shape *w, ipt_dtype dtype, const void *packed, float *dst)
{
    const pack_dims d = dims_of(w);
    const size_t taps = (size_t)d.kh * (size_t)d.kw, in = (size_t)d.i, out = (size_t)d.o;
    for (size_t t = 0; t < taps; t++)
        for (size_t i = 0; i < in; i++)
            for (size_t o = 0; o < out; o++) {
                const size_t k = t * (size_t)d.ip + i, p = o / PANEL, c = o % PANEL;
                float *to = dst + (t * in + i) * out + o;
                if (dtype == IPT_F16) /* pairs: even k in the low half of a word */
                    *to = ipt_f16_to_f32((
                        (const uint16_t *)packed)[((p * d.depth + k) / 2 * PANEL + c) * 2 + k % 2]);
                else
                    *to = ((const float *)packed)[(p * d.depth + k) * PANEL + c];
            }
}
