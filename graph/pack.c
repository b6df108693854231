/* graph/pack.c - packed panels: the layout in which weights lie on the device (graph.h).  Knows no
 * file format: the source is strides and an element type. */
#include "graph/graph.h"

#include <math.h>
#include <string.h>

enum { PANEL = 32, BLOCK = 32 }; /* columns of a panel; inputs handled at a time (stays in L1) */
enum { Q8_TOP = 127 };           /* of a block's values */

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

uint64_t ipt_panel_rows(uint64_t depth, ipt_dtype dtype)
{
    const uint64_t scales = dtype == IPT_Q8 ? depth / BLOCK * PANEL * sizeof(uint16_t) : 0;
    return depth * PANEL * ipt_dtype_bytes(dtype) + scales;
}

uint64_t ipt_panel_bytes(const ipt_shape *w, ipt_dtype dtype)
{
    pack_dims d = dims_of(w);
    return d.panels * ipt_panel_rows(d.depth, dtype) + ipt_panel_rows(BLOCK, dtype);
}

ipt_dtype ipt_panel_dtype(const ipt_shape *w, ipt_dtype precision)
{
    return precision == IPT_Q8 && w->dim[w->rank - 1] % BLOCK != 0 ? IPT_F16 : precision;
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

/* --- q8 --------------------------------------------------------------------------------------- */
/* The scale of a block whose largest magnitude is `top`, as it is stored. */
static inline uint16_t q8_scale(float top) { return to_half(top / (float)Q8_TOP); }

/* v / d to the nearest, ties away from zero; a scale that f16 holds coarsely may ask for more than
 * Q8_TOP. */
static inline int32_t q8_value(float v, float d)
{
    const float top = (float)Q8_TOP, ratio = v / d, below = ratio < top ? ratio : top, /* NaN too */
        x = below > -top ? below : -top;
    const int32_t whole = (int32_t)x;
    const float rest = x - (float)whole;
    return whole + (rest >= 0.5F) - (rest <= -0.5F);
}

void ipt_q8_round(float *v, size_t n)
{
    for (float *end = v + n; v < end; v += BLOCK) {
        float top = 0;
        for (int i = 0; i < BLOCK; i++)
            top = fmaxf(top, fabsf(v[i]));
        const float d = from_half(q8_scale(top));
        for (int i = 0; i < BLOCK; i++)
            v[i] = d > 0 ? (float)q8_value(v[i], d) * d : 0;
    }
}

/* A block: the scales of 32 columns, then words of four k's, the first in the lowest byte, of 32
 * columns, for each of eight quads of k. */
static void pack_block_q8(const ipt_panel_src *s, pack_block b, uint32_t *dst)
{
    float f[BLOCK][PANEL], top[PANEL] = {0}, d[PANEL];
    uint16_t scale[PANEL];
    if (b.n_o < PANEL)
        memset(f, 0, sizeof f);
    load_float(s, b, f);
    for (int i = 0; i < BLOCK; i++)
        for (int o = 0; o < PANEL; o++)
            top[o] = fabsf(f[i][o]) > top[o] ? fabsf(f[i][o]) : top[o];
    for (int o = 0; o < PANEL; o++) {
        scale[o] = q8_scale(top[o]);
        d[o] = from_half(scale[o]);
        d[o] = d[o] > 0 ? d[o] : INFINITY; /* all values are zero */
    }
    memcpy(dst, scale, sizeof scale);
    dst += PANEL / 2; /* pairs of scales */
    for (int i = 0; i < BLOCK; i += 4, dst += PANEL) {
        uint32_t q[4][PANEL];
        for (int k = 0; k < 4; k++)
            for (int o = 0; o < PANEL; o++)
                q[k][o] = (uint32_t)q8_value(f[i + k][o], d[o]) & 0xffU;
        for (int o = 0; o < PANEL; o++)
            dst[o] = q[0][o] | q[1][o] << 8 | q[2][o] << 16 | q[3][o] << 24;
    }
}

static float unpack_q8(const char *panel, uint64_t k, size_t c)
{
    const char *block = panel + ipt_panel_rows(k / BLOCK * BLOCK, IPT_Q8);
    const uint16_t scale = ((const uint16_t *)(const void *)block)[c];
    const int8_t q = ((const int8_t *)block)[PANEL * 2 + (k % BLOCK / 4 * PANEL + c) * 4 + k % 4];
    return (float)q * ipt_f16_to_f32(scale);
}

/* --- panels ----------------------------------------------------------------------------------- */
void ipt_panel_pack(const ipt_shape *w, const ipt_panel_src *src, ipt_dtype dtype, void *dst)
{
    const pack_dims d = dims_of(w);
    const int taps = d.kh * d.kw;
    const uint64_t panel_bytes = ipt_panel_rows(d.depth, dtype);
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
                if (dtype == IPT_Q8)
                    pack_block_q8(src, b, (uint32_t *)(void *)(panel + ipt_panel_rows(k, dtype)));
                else if (dtype == IPT_F16)
                    pack_block_f16(src, b, n_pad, (uint32_t *)(void *)panel + k / 2 * PANEL);
                else
                    pack_block_f32(src, b, n_pad, (float *)(void *)panel + k * PANEL);
            }
    }
    memset((char *)dst + d.panels * panel_bytes, 0, (size_t)ipt_panel_rows(BLOCK, dtype));
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
                if (dtype == IPT_Q8)
                    *to =
                        unpack_q8((const char *)packed + p * ipt_panel_rows(d.depth, dtype), k, c);
                else if (dtype == IPT_F16) /* pairs: even k in the low half of a word */
                    *to = ipt_f16_to_f32((
                        (const uint16_t *)packed)[((p * d.depth + k) / 2 * PANEL + c) * 2 + k % 2]);
                else
                    *to = ((const float *)packed)[(p * d.depth + k) * PANEL + c];
            }
}
