/* model_io/adapter_delta.c - what each kind of adapter changes, in double.
 *
 * Inside, matrices are [out, fan] with fan = in*kh*kw, as files have them; the public functions
 * turn from and to the graph's order [O,KH,KW,I]. Sources: LyCORIS (lycoris/modules/..., forward:
 * what a trained picture is made with; its get_diff_weight scales twice), PEFT (get_delta_weight,
 * dora.py), DiffuseKronA (krona.py), A1111. */
#include "model_io/kinds.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* All values of a part; the caller's, ipt_free.  NULL: out of memory. */
static double *values(ipt_ctx *ctx, const ipt_st_tensor *t)
{
    double *v = ipt_calloc(ctx, t->count + 1, sizeof *v);
    for (size_t i = 0; v && i < t->count; i++)
        v[i] = (double)ipt_st_get(t, i);
    return v;
}

static size_t taps_of(const ipt_adapter_module *a)
{
    size_t n = (size_t)a->kh * (size_t)a->kw;
    return n ? n : 1;
}

/* c [m,n] += s a [m,k] b [k,n]. */
static void product(double *c, const double *a, const double *b, size_t m, size_t k, size_t n,
                    double s)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < k; j++) {
            const double v = s * a[i * k + j], *row = b + j * n;
            if (v != 0)
                for (size_t x = 0; x < n; x++)
                    c[i * n + x] += v * row[x];
        }
}

/* --- low rank --------------------------------------------------------------------------------- */
/* out [r, in, taps] = sum_j t[r,j,taps] d[j,in]: a middle factor over its inputs. */
static void over_inputs(double *out, const double *t, const double *d, size_t r, size_t inner,
                        size_t in, size_t taps)
{
    for (size_t a = 0; a < r; a++)
        for (size_t j = 0; j < inner; j++)
            for (size_t i = 0; i < in; i++) {
                const double v = d[j * in + i], *m = t + (a * inner + j) * taps;
                for (size_t k = 0; k < taps; k++)
                    out[(a * in + i) * taps + k] += m[k] * v;
            }
}

/* `down` of a pair with an optional middle: [r, fan]. */
static ipt_status down_values(ipt_ctx *ctx, const ipt_adapter_module *a, const ipt_st_tensor *down,
                              const ipt_st_tensor *mid, double *out)
{
    size_t in = (size_t)a->in, taps = taps_of(a);
    double *d = values(ctx, down), *t = mid ? values(ctx, mid) : NULL;
    ipt_status status = d && (t || !mid) ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK && !mid)
        memcpy(out, d, down->count * sizeof *d);
    if (status == IPT_OK && mid) {
        size_t r = (size_t)mid->dim[0], inner = (size_t)mid->dim[1];
        memset(out, 0, r * in * taps * sizeof *out);
        over_inputs(out, t, d, r, inner, in, taps);
    }
    ipt_free(d);
    ipt_free(t);
    return status;
}

IPT_FACTORS(ipt_lora_factors)
{
    const ipt_st_tensor *u = a->part[1];
    (void)w;
    for (size_t i = 0; i < u->count; i++)
        up[i] = a->scale * (double)ipt_st_get(u, i);
    return down_values(ctx, a, a->part[0], a->part[2], down);
}

IPT_DELTA(ipt_low_rank_delta)
{
    size_t r = (size_t)a->n_col, out = (size_t)a->out, fan = ipt_fan(a);
    double *down = ipt_calloc(ctx, r * fan, sizeof *down),
           *up = ipt_calloc(ctx, r * out, sizeof *up);
    ipt_status status = down && up ? a->kind->factors(ctx, a, w, down, up) : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        memset(dw, 0, out * fan * sizeof *dw);
        product(dw, up, down, out, r, fan, 1);
    }
    ipt_free(down);
    ipt_free(up);
    return status;
}

/* --- LoHa: (A1 B1) o (A2 B2) ------------------------------------------------------------------ */
typedef struct hada { /* one of the two: up [out,r], down [r,fan] */
    double *up, *down;
    size_t r;
} hada;

static void hada_finish(hada *h)
{
    ipt_free(h->up);
    ipt_free(h->down);
}

static ipt_status hada_read(ipt_ctx *ctx, const ipt_adapter_module *a, int k, hada *h)
{
    const ipt_st_tensor *u = a->part[2 * k], *d = a->part[2 * k + 1], *t = a->part[4 + k];
    size_t out = (size_t)a->out;
    h->r = (size_t)(t ? t->dim[0] : d->dim[0]);
    h->up = ipt_calloc(ctx, h->r * out, sizeof *h->up);
    h->down = ipt_calloc(ctx, h->r * ipt_fan(a), sizeof *h->down);
    if (!h->up || !h->down)
        return IPT_ERR_NOMEM;
    for (size_t o = 0; o < out; o++)
        for (size_t r = 0; r < h->r; r++) /* with a middle the first factor is transposed */
            h->up[o * h->r + r] = (double)ipt_st_get(u, t ? r * out + o : o * h->r + r);
    return down_values(ctx, a, d, t, h->down);
}

IPT_FACTORS(ipt_loha_factors)
{
    size_t fan = ipt_fan(a), out = (size_t)a->out, n = (size_t)a->n_col;
    hada h[2] = {{NULL, NULL, 0}, {NULL, NULL, 0}};
    ipt_status status = hada_read(ctx, a, 0, &h[0]);
    (void)w;
    if (status == IPT_OK)
        status = hada_read(ctx, a, 1, &h[1]);
    for (size_t c = 0; status == IPT_OK && c < n; c++) {
        size_t p = c / h[1].r, q = c % h[1].r;
        for (size_t i = 0; i < fan; i++)
            down[c * fan + i] = h[0].down[p * fan + i] * h[1].down[q * fan + i];
        for (size_t o = 0; o < out; o++)
            up[o * n + c] = a->scale * h[0].up[o * h[0].r + p] * h[1].up[o * h[1].r + q];
    }
    hada_finish(&h[0]);
    hada_finish(&h[1]);
    return status;
}

IPT_DELTA(ipt_loha_delta)
{
    size_t fan = ipt_fan(a), out = (size_t)a->out;
    hada h[2] = {{NULL, NULL, 0}, {NULL, NULL, 0}};
    double *line = ipt_calloc(ctx, 2 * fan, sizeof *line);
    ipt_status status = line ? hada_read(ctx, a, 0, &h[0]) : IPT_ERR_NOMEM;
    (void)w;
    if (status == IPT_OK)
        status = hada_read(ctx, a, 1, &h[1]);
    for (size_t o = 0; status == IPT_OK && o < out; o++) {
        memset(line, 0, 2 * fan * sizeof *line);
        for (int k = 0; k < 2; k++)
            product(line + (size_t)k * fan, h[k].up + o * h[k].r, h[k].down, 1, h[k].r, fan, 1);
        for (size_t i = 0; i < fan; i++)
            dw[o * fan + i] = a->scale * line[i] * line[fan + i];
    }
    ipt_free(line);
    hada_finish(&h[0]);
    hada_finish(&h[1]);
    return status;
}

/* --- Kronecker: P [O1,I1], Q [O2,I2,taps] ----------------------------------------------------- */
/* x or a b: [rows, cols]. */
static ipt_status one_or_two(ipt_ctx *ctx, const ipt_st_tensor *x, const ipt_st_tensor *a,
                             const ipt_st_tensor *b, size_t rows, size_t cols, double *out)
{
    if (x) {
        for (size_t i = 0; i < x->count; i++)
            out[i] = (double)ipt_st_get(x, i);
        return IPT_OK;
    }
    if (!a || !b)
        return IPT_ERR_ARG; /* the shapes were read, so one of both forms is there */
    double *va = values(ctx, a), *vb = values(ctx, b);
    ipt_status status = va && vb ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        memset(out, 0, rows * cols * sizeof *out);
        product(out, va, vb, rows, a->count / rows, cols, 1);
    }
    ipt_free(va);
    ipt_free(vb);
    return status;
}

/* Q of a middle: sum_rj t[r,j,taps] a[r,o] b[j,i]. */
static ipt_status tucker_q(ipt_ctx *ctx, const ipt_adapter_module *m, double *q)
{
    const ipt_st_tensor *t = m->part[6], *a = m->part[4];
    size_t taps = (size_t)m->kh * (size_t)m->kw, i2 = (size_t)m->kron.i2, o2 = (size_t)m->kron.o2,
           r = (size_t)t->dim[0], inner = (size_t)t->dim[1];
    double *vt = values(ctx, t), *vb = values(ctx, m->part[5]);
    double *d = ipt_calloc(ctx, r * i2 * taps, sizeof *d);
    ipt_status status = vt && vb && d ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        over_inputs(d, vt, vb, r, inner, i2, taps);
        memset(q, 0, o2 * i2 * taps * sizeof *q);
        for (size_t o = 0; o < o2; o++)
            for (size_t k = 0; k < r; k++) {
                double v = (double)ipt_st_get(a, k * o2 + o);
                product(q + o * i2 * taps, &v, d + k * i2 * taps, 1, 1, i2 * taps, 1);
            }
    }
    ipt_free(vt);
    ipt_free(vb);
    ipt_free(d);
    return status;
}

/* Both factors; the scale is in Q. */
static ipt_status kron_values(ipt_ctx *ctx, const ipt_adapter_module *a, double *p, double *q)
{
    const ipt_adapter_kron *k = &a->kron;
    size_t o1 = (size_t)k->o1, i1 = (size_t)k->i1, n = ipt_fan(a) / i1, count = (size_t)k->o2 * n;
    if (k->is_shuffled) { /* DiffuseKronA: down is P transposed */
        for (size_t i = 0; i < i1; i++)
            for (size_t o = 0; o < o1; o++)
                p[o * i1 + i] = (double)ipt_st_get(a->part[0], i * o1 + o);
        IPT_TRY(one_or_two(ctx, a->part[1], NULL, NULL, 0, 0, q));
    } else {
        IPT_TRY(one_or_two(ctx, a->part[0], a->part[1], a->part[2], o1, i1, p));
        if (a->part[6])
            IPT_TRY(tucker_q(ctx, a, q));
        else
            IPT_TRY(one_or_two(ctx, a->part[3], a->part[4], a->part[5], (size_t)k->o2, n, q));
    }
    for (size_t i = 0; i < count; i++)
        q[i] *= a->scale;
    return IPT_OK;
}

static ipt_status kron_alloc(ipt_ctx *ctx, const ipt_adapter_module *a, double **p, double **q)
{
    const ipt_adapter_kron *k = &a->kron;
    *p = ipt_calloc(ctx, (size_t)k->o1 * (size_t)k->i1, sizeof **p);
    *q = ipt_calloc(ctx, (size_t)k->o2 * (ipt_fan(a) / (size_t)k->i1), sizeof **q);
    return *p && *q ? kron_values(ctx, a, *p, *q) : IPT_ERR_NOMEM;
}

IPT_DELTA(ipt_kron_delta)
{
    const ipt_adapter_kron *k = &a->kron;
    size_t fan = ipt_fan(a), o1 = (size_t)k->o1, o2 = (size_t)k->o2, i1 = (size_t)k->i1,
           n = fan / i1;
    double *p = NULL, *q = NULL;
    ipt_status status = kron_alloc(ctx, a, &p, &q);
    (void)w;
    for (size_t x = 0; status == IPT_OK && x < o1; x++)
        for (size_t y = 0; y < o2; y++) {
            double *row = dw + (k->is_shuffled ? y * o1 + x : x * o2 + y) * fan;
            for (size_t i = 0; i < i1; i++)
                for (size_t j = 0; j < n; j++)
                    row[i * n + j] = p[x * i1 + i] * q[y * n + j];
        }
    ipt_free(p);
    ipt_free(q);
    return status;
}

/* Both matrices factored: (A1 B1) kron (A2 B2) = (A1 kron A2) (B1 kron B2). */
IPT_FACTORS(ipt_lokr_factors)
{
    const ipt_st_tensor *const *t = a->part;
    const ipt_adapter_kron *k = &a->kron;
    size_t fan = ipt_fan(a), i1 = (size_t)k->i1, n = fan / i1, o2 = (size_t)k->o2,
           out = (size_t)a->out, r1 = (size_t)t[2]->dim[0], r2 = (size_t)t[5]->dim[0],
           cols = r1 * r2;
    double *a1 = values(ctx, t[1]), *b1 = values(ctx, t[2]), *a2 = values(ctx, t[4]),
           *b2 = values(ctx, t[5]);
    ipt_status status = a1 && b1 && a2 && b2 ? IPT_OK : IPT_ERR_NOMEM;
    (void)w;
    for (size_t c = 0; status == IPT_OK && c < cols; c++) {
        size_t p = c / r2, q = c % r2;
        for (size_t i = 0; i < fan; i++)
            down[c * fan + i] = b1[p * i1 + i / n] * b2[q * n + i % n];
        for (size_t o = 0; o < out; o++)
            up[o * cols + c] = a->scale * a1[o / o2 * r1 + p] * a2[o % o2 * r2 + q];
    }
    ipt_free(a1);
    ipt_free(b1);
    ipt_free(a2);
    ipt_free(b2);
    return status;
}

ipt_status ipt_adapter_kron_factors(ipt_ctx *ctx, const ipt_adapter_module *m, float *p, float *q)
{
    const ipt_adapter_kron *k = &m->kron;
    size_t taps = (size_t)m->kh * (size_t)m->kw, o1 = (size_t)k->o1, o2 = (size_t)k->o2,
           i1 = (size_t)k->i1, i2 = (size_t)k->i2;
    double *vp = NULL, *vq = NULL;
    ipt_status status = kron_alloc(ctx, m, &vp, &vq);
    if (status == IPT_OK) {
        for (size_t o = 0; o < o1; o++)
            for (size_t i = 0; i < i1; i++)
                p[i * o1 + o] = (float)vp[o * i1 + i];
        for (size_t o = 0; o < o2; o++)
            for (size_t i = 0; i < i2; i++)
                for (size_t t = 0; t < taps; t++)
                    q[(t * i2 + i) * o2 + o] = (float)vq[(o * i2 + i) * taps + t];
    }
    ipt_free(vp);
    ipt_free(vq);
    return status;
}

/* --- GLoRA: scale (W A1 A2 + B1 B2) ----------------------------------------------------------- */
/* W over its inputs by A1: [out, r, taps]. */
static void base_by(const ipt_adapter_module *a, const double *w, const double *a1, size_t r,
                    double *out)
{
    size_t in = (size_t)a->in, taps = taps_of(a);
    for (size_t o = 0; o < (size_t)a->out; o++)
        for (size_t i = 0; i < in; i++)
            for (size_t j = 0; j < r; j++)
                for (size_t t = 0; t < taps; t++)
                    out[(o * r + j) * taps + t] += w[(o * in + i) * taps + t] * a1[i * r + j];
}

IPT_FACTORS(ipt_glora_factors) /* [W A1 | B1] and [A2; B2], of one tap */
{
    size_t out = (size_t)a->out, in = (size_t)a->in, n = (size_t)a->n_col,
           ra = (size_t)a->part[1]->dim[0], rb = n - ra;
    double *a1 = values(ctx, a->part[0]), *wa = ipt_calloc(ctx, out * ra, sizeof *wa);
    ipt_status status = a1 && wa ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        base_by(a, w, a1, ra, wa);
        for (size_t o = 0; o < out; o++)
            for (size_t c = 0; c < n; c++)
                up[o * n + c] =
                    a->scale *
                    (c < ra ? wa[o * ra + c] : (double)ipt_st_get(a->part[2], o * rb + c - ra));
        for (size_t i = 0; i < ra * in; i++)
            down[i] = (double)ipt_st_get(a->part[1], i);
        status = down_values(ctx, a, a->part[3], a->part[4], down + ra * in);
    }
    ipt_free(a1);
    ipt_free(wa);
    return status;
}

IPT_DELTA(ipt_glora_delta)
{
    size_t out = (size_t)a->out, in = (size_t)a->in, fan = ipt_fan(a), taps = taps_of(a),
           ra = (size_t)a->part[1]->dim[0],
           rb = (size_t)(a->part[4] ? a->part[4]->dim[0] : a->part[3]->dim[0]);
    double *a1 = values(ctx, a->part[0]), *b1 = values(ctx, a->part[2]),
           *wa = ipt_calloc(ctx, out * ra * taps, sizeof *wa),
           *b2 = ipt_calloc(ctx, rb * fan, sizeof *b2);
    ipt_status status = a1 && b1 && wa && b2 ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = down_values(ctx, a, a->part[3], a->part[4], b2);
    if (status == IPT_OK) {
        memset(dw, 0, out * fan * sizeof *dw);
        product(dw, b1, b2, out, rb, fan, a->scale);
        base_by(a, w, a1, ra, wa);
        for (size_t o = 0; o < out; o++)
            for (size_t j = 0; j < ra; j++)
                for (size_t i = 0; i < in; i++) {
                    double v = a->scale * (double)ipt_st_get(a->part[1], j * in + i);
                    for (size_t t = 0; t < taps; t++)
                        dw[(o * in + i) * taps + t] += wa[(o * ra + j) * taps + t] * v;
                }
    }
    ipt_free(a1);
    ipt_free(b1);
    ipt_free(wa);
    ipt_free(b2);
    return status;
}

/* --- given, IA3 ------------------------------------------------------------------------------- */
IPT_DELTA(ipt_given_delta)
{
    (void)ctx, (void)w;
    for (size_t i = 0; i < a->part[0]->count; i++)
        dw[i] = (double)ipt_st_get(a->part[0], i);
    return IPT_OK;
}

IPT_DELTA(ipt_set_delta)
{
    (void)ctx;
    for (size_t i = 0; i < a->part[0]->count; i++)
        dw[i] = (double)ipt_st_get(a->part[0], i) - w[i];
    return IPT_OK;
}

/* dw = w (v - minus) by outputs or inputs. */
static void scale_rows(const ipt_adapter_module *a, const double *w, double minus, double *dw)
{
    bool bias = a->act == IPT_ACTS_BIAS;
    size_t fan = bias ? 1 : ipt_fan(a), taps = bias ? 1 : taps_of(a);
    for (size_t o = 0; o < (size_t)a->out; o++)
        for (size_t i = 0; i < fan; i++)
            dw[o * fan + i] =
                w[o * fan + i] *
                ((double)ipt_st_get(a->part[0], a->is_by_input ? i / taps : o) - minus);
}

IPT_DELTA(ipt_ia3_delta)
{
    (void)ctx;
    scale_rows(a, w, 0, dw);
    return IPT_OK;
}

IPT_DELTA(ipt_peft_ia3_delta)
{
    (void)ctx;
    scale_rows(a, w, 1, dw);
    return IPT_OK;
}

/* --- OFT, BOFT: W' = rescale R W -------------------------------------------------------------- */
/* x <- y x^-1 ... solves r (1 - q) = 1 + q for one block by Gauss-Jordan on the transposed system;
 * 1 - q is never singular for a skew q.  Both [n,n]; q is used up. */
static void cayley(double *q, double *r, size_t n)
{
    for (size_t i = 0; i < n; i++) /* left (1 - q)^T, right (1 + q)^T: (1 - q)^T r^T = (1 + q)^T */
        for (size_t k = 0; k < n; k++)
            r[i * n + k] = (i == k) + q[k * n + i];
    for (size_t i = 0; i < n; i++)
        for (size_t k = i; k < n; k++) {
            double a = (i == k) - q[k * n + i], b = (i == k) - q[i * n + k];
            q[i * n + k] = a;
            q[k * n + i] = b;
        }
    for (size_t c = 0; c < n; c++) {
        size_t best = c;
        for (size_t i = c + 1; i < n; i++)
            best = fabs(q[i * n + c]) > fabs(q[best * n + c]) ? i : best;
        double pivot = q[best * n + c];
        for (size_t k = 0; k < n; k++) {
            double a = q[best * n + k], b = r[best * n + k];
            q[best * n + k] = q[c * n + k];
            r[best * n + k] = r[c * n + k];
            q[c * n + k] = a / pivot;
            r[c * n + k] = b / pivot;
        }
        for (size_t i = 0; i < n; i++) {
            double v = q[i * n + c];
            for (size_t k = 0; i != c && v != 0 && k < n; k++) {
                q[i * n + k] -= v * q[c * n + k];
                r[i * n + k] -= v * r[c * n + k];
            }
        }
    }
}

/* The rotations of all blocks, transposed (r[k][row][col] = R[col][row]): R = (1 + q)(1 - q)^-1
 * with q = x - x^T, cut to the norm that the file allows. */
static ipt_status rotations(ipt_ctx *ctx, const ipt_adapter_module *a, size_t n, double *r)
{
    const ipt_st_tensor *t = a->part[0], *limit = a->part[2];
    size_t blocks = t->count / (n * n);
    double *q = values(ctx, t), norm = 0, cut = 1;
    if (!q)
        return IPT_ERR_NOMEM;
    if (strcmp(a->kind->name, "oft_diag") == 0) { /* the rotations themselves */
        for (size_t i = 0; i < t->count; i++)
            r[i / (n * n) * n * n + i % n * n + i / n % n] = q[i];
        ipt_free(q);
        return IPT_OK;
    }
    for (size_t b = 0; b < blocks; b++)
        for (size_t i = 0; i < n; i++)
            for (size_t k = 0; k <= i; k++) {
                double *x = q + b * n * n, v = x[i * n + k] - x[k * n + i];
                x[i * n + k] = v;
                x[k * n + i] = -v;
                norm += 2 * v * v;
            }
    norm = sqrt(norm) + 1e-8;
    double most = limit ? (double)ipt_st_get(limit, 0) * a->out : 0;
    if (most > 0 && norm > most)
        cut = most / norm;
    for (size_t i = 0; i < t->count; i++)
        q[i] *= cut;
    for (size_t b = 0; b < blocks; b++)
        cayley(q + b * n * n, r + b * n * n, n);
    ipt_free(q);
    return IPT_OK;
}

/* dw holds R W: rescales it and takes the base off. */
static void finish_rotation(const ipt_adapter_module *a, const double *w, double *dw)
{
    size_t fan = ipt_fan(a);
    for (size_t o = 0; o < (size_t)a->out; o++) {
        double s = a->part[1] ? (double)ipt_st_get(a->part[1], o) : 1;
        for (size_t i = 0; i < fan; i++)
            dw[o * fan + i] = s * dw[o * fan + i] - w[o * fan + i];
    }
}

IPT_DELTA(ipt_oft_delta) /* W'[k,m] = sum_n R[k,n,m] W[k,n] */
{
    const ipt_st_tensor *t = a->part[0];
    size_t blocks = (size_t)t->dim[0], n = (size_t)t->dim[1], fan = ipt_fan(a);
    double *r = ipt_calloc(ctx, t->count, sizeof *r);
    ipt_status status = r ? rotations(ctx, a, n, r) : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        memset(dw, 0, (size_t)a->out * fan * sizeof *dw);
        for (size_t b = 0; b < blocks; b++)
            product(dw + b * n * fan, r + b * n * n, w + b * n * fan, n, n, fan, 1);
        finish_rotation(a, w, dw);
    }
    ipt_free(r);
    return status;
}

/* One stage: rows in the order (c, k, g) instead of (c, g, k), blocks of n rows by R, and back. */
static void butterfly(const double *r, size_t n, size_t stride, size_t rows, size_t fan, double *w,
                      double *tmp)
{
    memset(tmp, 0, rows * fan * sizeof *tmp);
    for (size_t x = 0; x < rows; x++) {
        size_t block = x / n, i = x % n, c = x / (2 * stride), k = x / 2 % stride, g = x % 2,
               to = c * 2 * stride + g * stride + k;
        for (size_t j = 0; j < n; j++) {
            size_t y = block * n + j, cy = y / (2 * stride), ky = y / 2 % stride, gy = y % 2,
                   from = cy * 2 * stride + gy * stride + ky;
            product(tmp + to * fan, r + block * n * n + j * n + i, w + from * fan, 1, 1, fan, 1);
        }
    }
    memcpy(w, tmp, rows * fan * sizeof *w);
}

IPT_DELTA(ipt_boft_delta)
{
    const ipt_st_tensor *t = a->part[0];
    size_t stages = (size_t)t->dim[0], n = (size_t)t->dim[2], out = (size_t)a->out,
           fan = ipt_fan(a);
    if (n < 2) /* the shape was read: even */
        return IPT_ERR_ARG;
    double *r = ipt_calloc(ctx, t->count, sizeof *r),
           *tmp = ipt_calloc(ctx, out * fan, sizeof *tmp);
    ipt_status status = r && tmp ? rotations(ctx, a, n, r) : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        memcpy(dw, w, out * fan * sizeof *dw);
        for (size_t s = 0; s < stages; s++)
            butterfly(r + s * out * n, n, ((size_t)1 << s) * (n / 2), out, fan, dw, tmp);
        finish_rotation(a, w, dw);
    }
    ipt_free(r);
    ipt_free(tmp);
    return status;
}

/* --- DoRA: W' = magnitude (W + delta) / |W + delta|, the norm of each output or input --------- */
static ipt_status decompose(ipt_ctx *ctx, const ipt_adapter_module *a, const double *w, double *dw)
{
    size_t fan = ipt_fan(a), taps = taps_of(a), out = (size_t)a->out,
           n = a->is_by_input ? (size_t)a->in : out;
    double *sum = ipt_calloc(ctx, n, sizeof *sum);
    if (!sum)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < out * fan; i++) {
        double v = w[i] + dw[i];
        sum[a->is_by_input ? i % fan / taps : i / fan] += v * v;
    }
    for (size_t i = 0; i < n; i++)
        sum[i] = (double)ipt_st_get(a->magnitude, i) / (sqrt(sum[i]) + DBL_EPSILON);
    for (size_t i = 0; i < out * fan; i++)
        dw[i] = (w[i] + dw[i]) * sum[a->is_by_input ? i % fan / taps : i / fan] - w[i];
    ipt_free(sum);
    return IPT_OK;
}

/* --- for the rest of the program -------------------------------------------------------------- */
/* [O,KH,KW,I] <-> [O,I,KH,KW] */
static void reorder(const ipt_adapter_module *a, const double *from, double *to, bool to_file)
{
    size_t in = (size_t)a->in, taps = taps_of(a);
    for (size_t o = 0; o < (size_t)a->out; o++)
        for (size_t i = 0; i < in; i++)
            for (size_t t = 0; t < taps; t++) {
                size_t file = (o * in + i) * taps + t, graph = (o * taps + t) * in + i;
                to[to_file ? file : graph] = from[to_file ? graph : file];
            }
}

/* The base in file order: *own (to be freed) or base itself; NULL where it is not needed. */
static ipt_status file_order(ipt_ctx *ctx, const ipt_adapter_module *m, const double *base,
                             double **own, const double **w)
{
    *own = NULL;
    *w = base;
    if (!ipt_adapter_needs_base(m) || m->kh * m->kw == 1 || m->act == IPT_ACTS_BIAS)
        return IPT_OK;
    *own = ipt_calloc(ctx, (size_t)m->out * ipt_fan(m), sizeof **own);
    if (!*own)
        return IPT_ERR_NOMEM;
    reorder(m, base, *own, true);
    *w = *own;
    return IPT_OK;
}

static ipt_status load_parts(const ipt_adapter_module *m)
{
    for (int i = 0; i < IPT_ADAPTER_PARTS; i++)
        if (m->part[i])
            IPT_TRY(ipt_st_load(m->part[i]));
    return m->magnitude ? ipt_st_load(m->magnitude) : IPT_OK;
}

ipt_status ipt_adapter_file_delta(ipt_ctx *ctx, const ipt_adapter_module *m, const double *base,
                                  double *delta)
{
    const double *w = NULL;
    double *own = NULL;
    IPT_TRY(load_parts(m));
    ipt_status status = file_order(ctx, m, base, &own, &w);
    if (status == IPT_OK)
        status = m->kind->delta(ctx, m, w, delta);
    if (status == IPT_OK && m->magnitude)
        status = decompose(ctx, m, w, delta);
    ipt_free(own);
    return status;
}

ipt_status ipt_adapter_delta(ipt_ctx *ctx, const ipt_adapter_module *m, const double *base,
                             double *delta)
{
    if (m->kh * m->kw == 1 || m->act == IPT_ACTS_BIAS)
        return ipt_adapter_file_delta(ctx, m, base, delta);
    double *dw = ipt_calloc(ctx, (size_t)m->out * ipt_fan(m), sizeof *dw);
    ipt_status status = dw ? ipt_adapter_file_delta(ctx, m, base, dw) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        reorder(m, dw, delta, false);
    ipt_free(dw);
    return status;
}

ipt_status ipt_adapter_factors(ipt_ctx *ctx, const ipt_adapter_module *m, const double *base,
                               double *down, double *up)
{
    const double *w = NULL;
    double *own = NULL;
    IPT_TRY(load_parts(m));
    ipt_status status = file_order(ctx, m, base, &own, &w);
    if (status == IPT_OK)
        status = m->kind->factors(ctx, m, w, down, up);
    ipt_free(own);
    return status;
}

ipt_status ipt_adapter_kron_pair(ipt_ctx *ctx, const ipt_adapter_module *m, double **p, double **q)
{
    IPT_TRY(load_parts(m));
    ipt_status status = kron_alloc(ctx, m, p, q);
    if (status != IPT_OK) {
        ipt_free(*p);
        ipt_free(*q);
        *p = *q = NULL;
    }
    return status;
}

ipt_status ipt_adapter_pack(ipt_ctx *ctx, const ipt_adapter_module *m, const double *base, float *a,
                            float *b, size_t n_rank, size_t col)
{
    size_t rank = (size_t)m->n_col, in = (size_t)m->in, taps = taps_of(m), out = (size_t)m->out;
    double *down = ipt_calloc(ctx, rank * in * taps, sizeof *down),
           *up = ipt_calloc(ctx, rank * out, sizeof *up);
    ipt_status status = down && up ? load_parts(m) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = m->kind->factors(ctx, m, base, down, up);
    for (size_t r = 0; status == IPT_OK && r < rank; r++)
        for (size_t i = 0; i < in; i++)
            for (size_t k = 0; k < taps; k++)
                a[(k * in + i) * n_rank + col + r] = (float)down[(r * in + i) * taps + k];
    for (size_t r = 0; status == IPT_OK && r < rank; r++)
        for (size_t o = 0; o < out; o++)
            b[(col + r) * out + o] = (float)up[o * rank + r];
    ipt_free(down);
    ipt_free(up);
    return status;
}
