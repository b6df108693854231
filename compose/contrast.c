/* compose/contrast.c - NT-Xent on attention maps with its gradient in closed form; masks. */
#include "compose/contrast.h"

#include <math.h>
#include <string.h>

/* --- maps as unit vectors --------------------------------------------------------------------- */
static const double SPREAD = 1e-6; /* a flat map is 0, not 0 / 0 */

typedef struct unit {
    double *u;       /* [cells] e / |e|, e = (x - min) / (max - min + SPREAD) */
    double norm, by; /* |e|, max - min + SPREAD */
    size_t lo, hi;   /* where the minimum and the maximum are */
} unit;

static void make_unit(const float *x, size_t cells, unit *k)
{
    double sum = 0;
    k->lo = k->hi = 0;
    for (size_t i = 1; i < cells; i++) {
        k->lo = x[i] < x[k->lo] ? i : k->lo;
        k->hi = x[i] > x[k->hi] ? i : k->hi;
    }
    k->by = (double)x[k->hi] - (double)x[k->lo] + SPREAD;
    for (size_t i = 0; i < cells; i++) {
        k->u[i] = ((double)x[i] - (double)x[k->lo]) / k->by;
        sum += k->u[i] * k->u[i];
    }
    k->norm = sqrt(sum);
    for (size_t i = 0; i < cells && k->norm > 0; i++)
        k->u[i] /= k->norm;
}

/* From dL/du to dL/dx, through the norm and the spread; du is overwritten. */
static void unit_grad(const unit *k, size_t cells, double *du, float *dx)
{
    double along = 0, sum = 0, sum_e = 0;
    for (size_t i = 0; i < cells; i++)
        along += du[i] * k->u[i];
    for (size_t i = 0; i < cells; i++) {
        du[i] = (du[i] - along * k->u[i]) / k->norm; /* dL/de */
        sum += du[i];
        sum_e += du[i] * k->u[i] * k->norm;
        dx[i] += (float)(du[i] / k->by);
    }
    dx[k->lo] += (float)((sum_e - sum) / k->by);
    dx[k->hi] -= (float)(sum_e / k->by);
}

/* --- the loss --------------------------------------------------------------------------------- */
typedef struct pairs {
    const int32_t *of;
    const unit *unit;
    size_t n;
    const double *sim; /* [n,n] cosines / tau */
} pairs;

static bool is_used(const pairs *p, size_t k) { return p->unit[k].norm > 0; }

/* The terms of anchor a: adds to the loss and to g [n] = dL/d(sim[a,:]), both times the number of
 * all terms; returns how many there are. */
static size_t anchor(const pairs *p, size_t a, double *loss, double *g)
{
    const double *s = p->sim + a * p->n;
    double most = -1e300, others = 0, share = 0;
    size_t n = 0, n_other = 0;
    for (size_t k = 0; k < p->n; k++)
        if (k != a && is_used(p, k) && s[k] > most)
            most = s[k];
    for (size_t k = 0; k < p->n; k++)
        if (is_used(p, k) && p->of[k] != p->of[a]) {
            others += exp(s[k] - most);
            n_other++;
        }
    for (size_t k = 0; k < p->n && n_other > 0; k++) {
        if (k == a || !is_used(p, k) || p->of[k] != p->of[a])
            continue;
        double own = exp(s[k] - most), z = own + others;
        *loss += log(z) - (s[k] - most);
        g[k] += own / z - 1;
        share += 1 / z;
        n++;
    }
    for (size_t o = 0; o < p->n && n > 0; o++)
        if (is_used(p, o) && p->of[o] != p->of[a])
            g[o] += exp(s[o] - most) * share;
    return n;
}

ipt_status ipt_contrast(ipt_ctx *ctx, const float *x, size_t n, size_t cells, const int32_t *of,
                        double tau, float *dx, double *loss)
{
    *loss = 0;
    if (n < 2 || cells == 0)
        return IPT_OK;
    double *vec = ipt_calloc(ctx, (n + 1) * cells, sizeof *vec), *du = vec ? vec + n * cells : NULL,
           *mat = ipt_calloc(ctx, 2 * n * n, sizeof *mat), *grad = mat ? mat + n * n : NULL;
    unit *k = ipt_calloc(ctx, n, sizeof *k);
    const pairs p = {of, k, n, mat};
    size_t terms = 0;
    ipt_status status = vec && mat && k ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t a = 0; a < n && status == IPT_OK; a++) {
        k[a].u = vec + a * cells;
        make_unit(x + a * cells, cells, &k[a]);
        for (size_t b = 0; b <= a; b++) {
            double dot = 0;
            for (size_t i = 0; i < cells; i++)
                dot += k[a].u[i] * k[b].u[i];
            mat[a * n + b] = mat[b * n + a] = dot / tau;
        }
    }
    for (size_t a = 0; a < n && status == IPT_OK; a++)
        if (is_used(&p, a))
            terms += anchor(&p, a, loss, grad + a * n);
    for (size_t a = 0; a < n && terms > 0; a++) {
        if (!is_used(&p, a))
            continue;
        memset(du, 0, cells * sizeof *du);
        for (size_t b = 0; b < n; b++) {
            double w = (grad[a * n + b] + grad[b * n + a]) / (tau * (double)terms);
            for (size_t i = 0; i < cells; i++)
                du[i] += w * k[b].u[i];
        }
        unit_grad(&k[a], cells, du, dx + a * cells);
    }
    *loss = terms > 0 ? *loss / (double)terms : 0;
    ipt_free(vec);
    ipt_free(mat);
    ipt_free(k);
    return status;
}

/* --- masks ------------------------------------------------------------------------------------ */
/* Every cell becomes the largest (or smallest) of itself and its neighbours. */
static void spread(bool largest, int32_t h, int32_t w, float *mask, float *scratch)
{
    memcpy(scratch, mask, (size_t)h * (size_t)w * sizeof *mask);
    for (int32_t y = 0; y < h; y++)
        for (int32_t x = 0; x < w; x++) {
            float *to = &mask[(size_t)y * (size_t)w + (size_t)x];
            for (int32_t v = y > 0 ? y - 1 : 0; v <= y + 1 && v < h; v++)
                for (int32_t u = x > 0 ? x - 1 : 0; u <= x + 1 && u < w; u++) {
                    float f = scratch[(size_t)v * (size_t)w + (size_t)u];
                    if (largest ? f > *to : f < *to)
                        *to = f;
                }
        }
}

void ipt_mask_morph(ipt_morph how, int32_t h, int32_t w, float *mask, float *scratch)
{
    if (how == IPT_MORPH_DILATE || how == IPT_MORPH_CLOSE)
        spread(true, h, w, mask, scratch);
    if (how == IPT_MORPH_ERODE || how == IPT_MORPH_OPEN || how == IPT_MORPH_CLOSE)
        spread(false, h, w, mask, scratch);
    if (how == IPT_MORPH_OPEN)
        spread(true, h, w, mask, scratch);
}

void ipt_mask_enlarge(const float *from, int32_t gh, int32_t gw, float *to, int32_t h, int32_t w)
{
    for (int32_t y = 0; y < h; y++)
        for (int32_t x = 0; x < w; x++)
            to[(size_t)y * (size_t)w + (size_t)x] =
                from[(size_t)(y * gh / h) * (size_t)gw + (size_t)(x * gw / w)];
}
