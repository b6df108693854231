/* model_io/svd.c - see svd.h.  Vectors are rows throughout, so that every inner loop runs along
 * memory. */
#include "model_io/svd.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { EXACT_SIDE = 128, MAX_SWEEP = 60, MAX_PASS = 60 };

/* --- vectors ---------------------------------------------------------------------------------- */
static double dot(const double *a, const double *b, size_t n)
{
    double s[4] = {0, 0, 0, 0};
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (size_t k = 0; k < 4; k++)
            s[k] += a[i + k] * b[i + k];
    for (; i < n; i++)
        s[0] += a[i] * b[i];
    return s[0] + s[1] + (s[2] + s[3]);
}

double ipt_norm2(const double *v, size_t n) { return dot(v, v, n); }

static void axpy(double *y, double s, const double *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] += s * x[i];
}

/* Two rows of c by four of b at once: what is read serves twice, and c is touched a quarter as
 * often. */
static void add_block(double *c, double *d, const double w[8], const double *x, size_t n)
{
    for (size_t t = 0; t < n; t++) {
        double p = x[t], q = x[n + t], r = x[2 * n + t], s = x[3 * n + t];
        c[t] += w[0] * p + w[1] * q + (w[2] * r + w[3] * s);
        d[t] += w[4] * p + w[5] * q + (w[6] * r + w[7] * s);
    }
}

void ipt_add_product(double *c, const double *a, const double *b, size_t m, size_t k, size_t n,
                     double s)
{
    size_t i = 0;
    for (; i + 2 <= m; i += 2) {
        const double *p = a + i * k, *q = p + k;
        size_t j = 0;
        for (; j + 4 <= k; j += 4) {
            const double w[8] = {s * p[j], s * p[j + 1], s * p[j + 2], s * p[j + 3],
                                 s * q[j], s * q[j + 1], s * q[j + 2], s * q[j + 3]};
            add_block(c + i * n, c + (i + 1) * n, w, b + j * n, n);
        }
        for (; j < k; j++) {
            axpy(c + i * n, s * p[j], b + j * n, n);
            axpy(c + (i + 1) * n, s * q[j], b + j * n, n);
        }
    }
    for (size_t j = 0; i < m && j < k; j++)
        axpy(c + i * n, s * a[i * k + j], b + j * n, n);
}

/* c [m,k] = a [m,n] b^T, b [k,n]. */
static void times_transposed(double *c, const double *a, const double *b, size_t m, size_t n,
                             size_t k)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < k; j++)
            c[i * k + j] = dot(a + i * n, b + j * n, n);
}

/* c [n,m] = a^T, a [m,n], in blocks that stay in the cache. */
static void transpose(double *c, const double *a, size_t m, size_t n)
{
    enum { B = 16 };
    for (size_t i = 0; i < m; i += B)
        for (size_t j = 0; j < n; j += B)
            for (size_t x = i; x < m && x < i + B; x++)
                for (size_t y = j; y < n && y < j + B; y++)
                    c[y * m + x] = a[x * n + y];
}

/* --- a [k,n] = l [k,k] q, k <= n -------------------------------------------------------------- */
/* Householder from the right.  a becomes q, whose rows are orthonormal also where a's are not
 * independent; l is lower triangular.  tau: [k]. */
static void factor_lq(double *a, size_t k, size_t n, double *l, double *tau)
{
    memset(l, 0, k * k * sizeof *l);
    for (size_t i = 0; i < k; i++) {
        double *v = a + i * n + i, norm = sqrt(dot(v, v, n - i)), head = v[0];
        for (size_t j = 0; j < i; j++)
            l[i * k + j] = a[i * n + j];
        tau[i] = 0;
        l[i * k + i] = head;
        if (!(norm > 0) || n - i < 2)
            continue;
        double beta = head > 0 ? -norm : norm; /* no cancellation in head - beta */
        for (size_t j = 1; j < n - i; j++)
            v[j] /= head - beta;
        v[0] = 1;
        tau[i] = (beta - head) / beta;
        l[i * k + i] = beta;
        for (size_t r = i + 1; r < k; r++)
            axpy(a + r * n + i, -tau[i] * dot(v, a + r * n + i, n - i), v, n - i);
    }
    for (size_t i = k; i-- > 0;) { /* the rows of q, last first: reflectors give way to them */
        double *v = a + i * n + i;
        if (!(tau[i] > 0)) /* no reflection */
            memset(v, 0, (n - i) * sizeof *v);
        v[0] = 1;
        for (size_t r = i + 1; r < k; r++)
            axpy(a + r * n + i, -tau[i] * dot(v, a + r * n + i, n - i), v, n - i);
        for (size_t j = 1; j < n - i; j++)
            v[j] *= -tau[i];
        v[0] = 1 - tau[i];
        memset(a + i * n, 0, i * sizeof *a);
    }
}

/* --- small matrices: one-sided Jacobi --------------------------------------------------------- */
/* Turns rows p, q of w [k,k] so that they are orthogonal, and those of j [k,k] with them.  Whether
 * they were not.  Rows below `least` (squared) are rounding. */
static bool rotate(double *w, double *j, size_t k, size_t p, size_t q, double least)
{
    double *x = w + p * k, *y = w + q * k, a = dot(x, x, k), b = dot(y, y, k), c = dot(x, y, k);
    if (fabs(c) <= 8 * DBL_EPSILON * sqrt(a) * sqrt(b) || a <= least || b <= least)
        return false;
    double zeta = (b - a) / (2 * c),
           t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta)),
           cs = 1 / sqrt(1 + t * t), sn = cs * t;
    for (size_t i = 0; i < k; i++) {
        double u = x[i], v = y[i];
        x[i] = cs * u - sn * v;
        y[i] = sn * u + cs * v;
    }
    for (size_t i = 0; i < k; i++) {
        double u = j[p * k + i], v = j[q * k + i];
        j[p * k + i] = cs * u - sn * v;
        j[q * k + i] = sn * u + cs * v;
    }
    return true;
}

typedef struct order {
    double s;
    size_t at;
} order;

static int by_value(const void *a, const void *b)
{
    const order *x = a, *y = b;
    return x->s < y->s ? 1 : x->s > y->s ? -1 : x->at < y->at ? -1 : x->at > y->at;
}

/* w [k,k] = sum s[i] u[i] v[i]^T, all of them; w is used up. */
static ipt_status small_svd(ipt_ctx *ctx, double *w, size_t k, double *s, double *u, double *v)
{
    double *j = ipt_calloc(ctx, k * k, sizeof *j);
    order *o = ipt_calloc(ctx, k, sizeof *o);
    ipt_status status = j && o ? IPT_OK : IPT_ERR_NOMEM;
    bool turned = true;
    double least = fmax(1e-34 * dot(w, w, k * k), DBL_MIN);
    for (size_t i = 0; status == IPT_OK && i < k; i++)
        j[i * k + i] = 1;
    for (int sweep = 0; status == IPT_OK && turned && sweep < MAX_SWEEP; sweep++) {
        turned = false;
        for (size_t p = 0; p + 1 < k; p++)
            for (size_t q = p + 1; q < k; q++)
                turned = rotate(w, j, k, p, q, least) || turned;
        if (ipt_cancelled(ctx))
            status = ipt_fail(ctx, IPT_ERR_CANCELLED, "cancelled");
    }
    for (size_t i = 0; status == IPT_OK && i < k; i++)
        o[i] = (order){sqrt(dot(w + i * k, w + i * k, k)), i};
    if (status == IPT_OK)
        qsort(o, k, sizeof *o, by_value);
    for (size_t i = 0; status == IPT_OK && i < k; i++) {
        const double *row = w + o[i].at * k;
        s[i] = o[i].s;
        memcpy(u + i * k, j + o[i].at * k, k * sizeof *u);
        for (size_t t = 0; t < k; t++)
            v[i * k + t] = o[i].s > 0 ? row[t] / o[i].s : 0;
    }
    ipt_free(j);
    ipt_free(o);
    return status;
}

/* --- results ---------------------------------------------------------------------------------- */
void ipt_svd_finish(ipt_svd *d)
{
    ipt_free(d->s);
    ipt_free(d->u);
    ipt_free(d->v);
    *d = (ipt_svd){0};
}

double ipt_svd_error(const ipt_svd *d)
{
    return d->total > 0 ? sqrt(fmax(d->tail, 0) / d->total) : 0;
}

void ipt_svd_cut(ipt_svd *d, size_t rank)
{
    for (; d->rank > rank; d->rank--)
        d->tail += d->s[d->rank - 1] * d->s[d->rank - 1];
}

static ipt_status allocate(ipt_ctx *ctx, size_t m, size_t n, size_t rank, ipt_svd *out)
{
    *out = (ipt_svd){.m = m,
                     .n = n,
                     .rank = rank,
                     .s = ipt_calloc(ctx, rank, sizeof(double)),
                     .u = ipt_calloc(ctx, rank * m, sizeof(double)),
                     .v = ipt_calloc(ctx, rank * n, sizeof(double))};
    if (out->s && out->u && out->v)
        return IPT_OK;
    ipt_svd_finish(out);
    return IPT_ERR_NOMEM;
}

/* From core [k,k] = u s v^T between the rows of left [k,m] and right [k,n]; core is used up.  total
 * < 0: the core has all of it. */
static ipt_status from_core(ipt_ctx *ctx, double *core, ipt_matrix left, ipt_matrix right,
                            size_t rank, double total, ipt_svd *out)
{
    size_t k = left.m, keep = rank == 0 || rank > k ? k : rank;
    double *s = ipt_calloc(ctx, k, sizeof *s), *u = ipt_calloc(ctx, k * k, sizeof *u),
           *v = ipt_calloc(ctx, k * k, sizeof *v), sum = 0, head = 0;
    ipt_status status = s && u && v ? allocate(ctx, left.n, right.n, keep, out) : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        status = small_svd(ctx, core, k, s, u, v);
        if (status != IPT_OK)
            ipt_svd_finish(out);
    }
    if (status == IPT_OK) {
        ipt_add_product(out->u, u, left.v, keep, k, left.n, 1);
        ipt_add_product(out->v, v, right.v, keep, k, right.n, 1);
        memcpy(out->s, s, keep * sizeof *s);
        for (size_t i = k; i-- > 0;) { /* smallest first */
            sum += s[i] * s[i];
            if (i == keep)
                out->tail = sum;
        }
        head = sum - out->tail;
        out->total = total < 0 ? sum : total;
        if (total >= 0)
            out->tail = fmax(total - head, 0);
    }
    ipt_free(s);
    ipt_free(u);
    ipt_free(v);
    return status;
}

static void swap_sides(ipt_svd *d)
{
    double *u = d->u;
    size_t m = d->m;
    d->u = d->v;
    d->v = u;
    d->m = d->n;
    d->n = m;
}

/* --- whole matrices --------------------------------------------------------------------------- */
/* a [m,n], m <= n; a is used up. */
static ipt_status exact(ipt_ctx *ctx, double *a, size_t m, size_t n, size_t rank, ipt_svd *out)
{
    double *l = ipt_calloc(ctx, m * m, sizeof *l), *one = ipt_calloc(ctx, m * m, sizeof *one),
           *tau = ipt_calloc(ctx, m, sizeof *tau);
    ipt_status status = l && one && tau ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        factor_lq(a, m, n, l, tau);
        for (size_t i = 0; i < m; i++)
            one[i * m + i] = 1;
        status = from_core(ctx, l, (ipt_matrix){one, m, m}, (ipt_matrix){a, m, n}, rank, -1, out);
    }
    ipt_free(l);
    ipt_free(one);
    ipt_free(tau);
    return status;
}

typedef struct iteration {
    double *left, *right, *turned; /* [w,m] [w,n] [n,w] */
    double *l, *core, *tau, *s, *u, *v;
    size_t width;
} iteration;

static bool iteration_init(ipt_ctx *ctx, iteration *t, size_t m, size_t n, size_t width)
{
    *t = (iteration){.left = ipt_calloc(ctx, width * m, sizeof(double)),
                     .right = ipt_calloc(ctx, width * n, sizeof(double)),
                     .turned = ipt_calloc(ctx, width * n, sizeof(double)),
                     .l = ipt_calloc(ctx, width * width, sizeof(double)),
                     .core = ipt_calloc(ctx, width * width, sizeof(double)),
                     .tau = ipt_calloc(ctx, width, sizeof(double)),
                     .s = ipt_calloc(ctx, width, sizeof(double)),
                     .u = ipt_calloc(ctx, width * width, sizeof(double)),
                     .v = ipt_calloc(ctx, width * width, sizeof(double)),
                     .width = width};
    return t->left && t->right && t->turned && t->l && t->core && t->tau && t->s && t->u && t->v;
}

static void iteration_finish(iteration *t)
{
    double *all[] = {t->left, t->right, t->turned, t->l, t->core, t->tau, t->s, t->u, t->v};
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        ipt_free(all[i]);
}

/* left <- orthonormal rows of right a^T, right <- orthonormal rows of left a; l is between them. */
static void one_pass(iteration *t, const double *a, size_t m, size_t n, double *scratch)
{
    size_t w = t->width;
    transpose(t->turned, t->right, w, n);
    memset(scratch, 0, m * w * sizeof *scratch);
    ipt_add_product(scratch, a, t->turned, m, n, w, 1);
    transpose(t->left, scratch, m, w);
    factor_lq(t->left, w, m, t->l, t->tau);
    memset(t->right, 0, w * n * sizeof *t->right);
    ipt_add_product(t->right, t->left, a, w, m, n, 1);
    factor_lq(t->right, w, n, t->l, t->tau);
}

/* a [m,n], of which `rank` values are wanted, fewer than half of them. */
static ipt_status iterate(ipt_ctx *ctx, const double *a, size_t m, size_t n, size_t rank,
                          ipt_svd *out)
{
    size_t side = m < n ? m : n, width = rank + (rank / 4 > 12 ? rank / 4 : 12);
    width = width < side ? width : side;
    iteration t;
    double *scratch = ipt_calloc(ctx, m * width, sizeof *scratch), total = dot(a, a, m * n),
           before = -1;
    uint64_t seed = 0x2545f4914f6cdd1du;
    bool ok = iteration_init(ctx, &t, m, n, width) && scratch;
    ipt_status status = ok ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; ok && i < width * n; i++)
        t.right[i] = (double)ipt_rng_normal(&seed);
    for (int pass = 0; status == IPT_OK && pass < MAX_PASS; pass++) {
        double head = 0;
        one_pass(&t, a, m, n, scratch);
        memcpy(t.core, t.l, width * width * sizeof *t.l);
        status = small_svd(ctx, t.core, width, t.s, t.u, t.v);
        for (size_t i = 0; i < rank; i++)
            head += t.s[i] * t.s[i];
        double tail = fmax(total - head, 0), moved = fabs(before - tail);
        if (before >= 0 && moved <= 1e-5 * tail + 4 * DBL_EPSILON * total)
            break;
        before = tail;
    }
    if (status == IPT_OK)
        status = from_core(ctx, t.l, (ipt_matrix){t.left, width, m},
                           (ipt_matrix){t.right, width, n}, rank, total, out);
    iteration_finish(&t);
    ipt_free(scratch);
    return status;
}

ipt_status ipt_svd_dense(ipt_ctx *ctx, ipt_matrix a, size_t rank, ipt_svd *out)
{
    size_t m = a.m, n = a.n, side = m < n ? m : n;
    if (side == 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "singular values of a matrix without values");
    rank = rank == 0 || rank > side ? side : rank;
    if (side > EXACT_SIDE && 2 * rank < side)
        return iterate(ctx, a.v, m, n, rank, out);
    double *copy = ipt_calloc(ctx, m * n, sizeof *copy);
    if (!copy)
        return IPT_ERR_NOMEM;
    if (m > n)
        transpose(copy, a.v, m, n);
    else
        memcpy(copy, a.v, m * n * sizeof *copy);
    ipt_status status = exact(ctx, copy, side, m > n ? m : n, rank, out);
    if (status == IPT_OK && m > n)
        swap_sides(out);
    ipt_free(copy);
    return status;
}

/* --- products --------------------------------------------------------------------------------- */
static ipt_status wide_product(ipt_ctx *ctx, ipt_matrix up, ipt_matrix down, size_t rank,
                               ipt_svd *out)
{
    double *a = ipt_calloc(ctx, up.m * down.n, sizeof *a);
    if (!a)
        return IPT_ERR_NOMEM;
    ipt_add_product(a, up.v, down.v, up.m, up.n, down.n, 1);
    ipt_status status = ipt_svd_dense(ctx, (ipt_matrix){a, up.m, down.n}, rank, out);
    ipt_free(a);
    return status;
}

/* The rows of left [r,m] and right [r,n] turned by a decomposition of the core between them. */
static ipt_status turn(ipt_ctx *ctx, const ipt_svd *c, ipt_matrix left, ipt_matrix right,
                       ipt_svd *out)
{
    IPT_TRY(allocate(ctx, left.n, right.n, c->rank, out));
    ipt_add_product(out->u, c->u, left.v, c->rank, left.m, left.n, 1);
    ipt_add_product(out->v, c->v, right.v, c->rank, right.m, right.n, 1);
    memcpy(out->s, c->s, c->rank * sizeof *c->s);
    out->total = c->total;
    out->tail = c->tail;
    return IPT_OK;
}

ipt_status ipt_svd_product(ipt_ctx *ctx, ipt_matrix up, ipt_matrix down, size_t rank, ipt_svd *out)
{
    size_t m = up.m, r = up.n, n = down.n;
    if (m == 0 || n == 0 || r == 0 || r != down.m)
        return ipt_fail(ctx, IPT_ERR_ARG, "singular values of a product that is none");
    if (r > m || r > n)
        return wide_product(ctx, up, down, rank, out);
    double *left = ipt_calloc(ctx, r * m, sizeof *left),
           *right = ipt_calloc(ctx, r * n, sizeof *right), *lu = ipt_calloc(ctx, r * r, sizeof *lu),
           *ld = ipt_calloc(ctx, r * r, sizeof *ld), *core = ipt_calloc(ctx, r * r, sizeof *core),
           *tau = ipt_calloc(ctx, r, sizeof *tau);
    ipt_svd c = {0};
    ipt_status status = left && right && lu && ld && core && tau ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) { /* up = left^T lu^T, down = ld right: the core is lu^T ld */
        transpose(left, up.v, m, r);
        memcpy(right, down.v, r * n * sizeof *right);
        factor_lq(left, r, m, lu, tau);
        factor_lq(right, r, n, ld, tau);
        transpose(core, lu, r, r);
        memcpy(lu, core, r * r * sizeof *lu);
        memset(core, 0, r * r * sizeof *core);
        ipt_add_product(core, lu, ld, r, r, r, 1);
        status = ipt_svd_dense(ctx, (ipt_matrix){core, r, r}, rank, &c);
    }
    if (status == IPT_OK)
        status = turn(ctx, &c, (ipt_matrix){left, r, m}, (ipt_matrix){right, r, n}, out);
    ipt_svd_finish(&c);
    ipt_free(left);
    ipt_free(right);
    ipt_free(lu);
    ipt_free(ld);
    ipt_free(core);
    ipt_free(tau);
    return status;
}

ipt_status ipt_product_norm2(ipt_ctx *ctx, const double *up, const double *down, size_t m, size_t r,
                             size_t n, double *norm2)
{
    double *t = ipt_calloc(ctx, r * m, sizeof *t), *a = ipt_calloc(ctx, r * r, sizeof *a),
           *b = ipt_calloc(ctx, r * r, sizeof *b);
    ipt_status status = t && a && b ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) { /* trace of (up^T up) (down down^T) */
        transpose(t, up, m, r);
        times_transposed(a, t, t, r, m, r);
        times_transposed(b, down, down, r, n, r);
        *norm2 = fmax(dot(a, b, r * r), 0);
    }
    ipt_free(t);
    ipt_free(a);
    ipt_free(b);
    return status;
}

/* --- Kronecker products ----------------------------------------------------------------------- */
/* The pairs of values with the largest products; *n of them.  order.at is i * q->rank + j. */
static ipt_status largest_pairs(ipt_ctx *ctx, const ipt_svd *p, const ipt_svd *q, size_t rank,
                                order **out, size_t *n)
{
    size_t all = p->rank * q->rank;
    order *o = ipt_calloc(ctx, all, sizeof *o);
    if (!o)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < all; i++)
        o[i] = (order){p->s[i / q->rank] * q->s[i % q->rank], i};
    qsort(o, all, sizeof *o, by_value);
    *out = o;
    *n = rank < all ? rank : all;
    return IPT_OK;
}

/* row <- the outer product of x [a] and y [b] as a vector; the second index is the slower one where
 * is_shuffled. */
static void outer(double *row, const double *x, size_t a, const double *y, size_t b,
                  bool is_shuffled)
{
    for (size_t i = 0; i < a; i++)
        for (size_t j = 0; j < b; j++)
            row[is_shuffled ? j * a + i : i * b + j] = x[i] * y[j];
}

static ipt_status join_pairs(ipt_ctx *ctx, const ipt_svd *a, const ipt_svd *b, bool is_shuffled,
                             size_t rank, ipt_svd *out)
{
    order *o = NULL;
    size_t n = 0;
    double head = 0;
    if (a->rank == 0 || b->rank == 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "singular values of a product that is none");
    IPT_TRY(largest_pairs(ctx, a, b, rank, &o, &n));
    ipt_status status = allocate(ctx, a->m * b->m, a->n * b->n, n, out);
    for (size_t k = 0; status == IPT_OK && k < n; k++) {
        size_t i = o[k].at / b->rank, j = o[k].at % b->rank;
        out->s[k] = o[k].s;
        head += o[k].s * o[k].s;
        outer(out->u + k * out->m, a->u + i * a->m, a->m, b->u + j * b->m, b->m, is_shuffled);
        outer(out->v + k * out->n, a->v + i * a->n, a->n, b->v + j * b->n, b->n, false);
    }
    ipt_free(o);
    if (status != IPT_OK)
        return status;
    out->total = a->total * b->total;
    out->tail = fmax(out->total - head, 0);
    return IPT_OK;
}

ipt_status ipt_svd_kron(ipt_ctx *ctx, ipt_matrix p, ipt_matrix q, bool is_shuffled, size_t rank,
                        ipt_svd *out)
{
    ipt_svd a = {0}, b = {0};
    size_t m = p.m * q.m, n = p.n * q.n, side = m < n ? m : n;
    rank = rank == 0 || rank > side ? side : rank;
    ipt_status status = ipt_svd_dense(ctx, p, 0, &a);
    if (status == IPT_OK)
        status = ipt_svd_dense(ctx, q, rank, &b);
    if (status == IPT_OK)
        status = join_pairs(ctx, &a, &b, is_shuffled, rank, out);
    ipt_svd_finish(&a);
    ipt_svd_finish(&b);
    return status;
}
