/* model_io/lego.c - see lego.h.
 *
 * Distances come from the pool's Gram matrix, so that a round of k-means costs the same for vectors
 * of any length: with v_i.c = S_ic / W_c, S_ic = sum over the cluster's j of w_j s_j G_ij and W_c
 * its weight, |v_i - s c|^2 = G_ii - 2 s S_ic / W_c + |c|^2. */
#include "model_io/lego.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model_io/svd.h"

enum { N_START = 10, MAX_ROUND = 300 };
/* Of |v_i|^2 + |v_j|^2: squared distances below are rounding of f32 values, and none. */
static const double NEAR = 1e-12;
/* Starts count as better by more than rounding only: else equal ones would be told apart by it. */
static const double BETTER = 1 - 1e-9;

/* The units that are not zero, and what k-means knows of them. */
typedef struct pool {
    ipt_ctx *ctx;
    const ipt_units *u;
    bool up_to_sign;
    size_t n, k;
    size_t *unit;      /* [n] number in u */
    double *balance;   /* [n] t: the vector is t a beside b / t */
    double *w;         /* [n] weights */
    double *g;         /* [n,n] Gram matrix */
    size_t *cluster;   /* [n] */
    double *sign;      /* [n] of each in its cluster */
    size_t *best;      /* [n] of the best start so far, and its signs */
    double *best_sign; /* [n] */
    double *s;         /* [k,n] S above */
    double *weight;    /* [k] W; 0: an empty cluster */
    double *norm2;     /* [k] of centroids */
    double *near2;     /* [n] squared distance to the nearest */
} pool;

static void pool_finish(pool *p)
{
    void *const all[] = {p->unit, p->balance,   p->w, p->g,      p->cluster, p->sign,
                         p->best, p->best_sign, p->s, p->weight, p->norm2,   p->near2};
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        ipt_free(all[i]);
}

static ipt_status pool_alloc(pool *p)
{
    size_t n = p->n, k = p->k, table = k < n ? n : 0; /* else nothing is compared */
    const struct {
        double **at;
        size_t n;
    } real[] = {{&p->sign, n},  {&p->best_sign, n}, {&p->near2, n},    {&p->weight, k},
                {&p->norm2, k}, {&p->g, n * table}, {&p->s, k * table}};
    for (size_t i = 0; i < IPT_COUNT(real); i++)
        if (!(*real[i].at = ipt_calloc(p->ctx, real[i].n, sizeof(double))))
            return IPT_ERR_NOMEM;
    p->cluster = ipt_calloc(p->ctx, n, sizeof *p->cluster);
    p->best = ipt_calloc(p->ctx, n, sizeof *p->best);
    return p->cluster && p->best ? IPT_OK : IPT_ERR_NOMEM;
}

static const double *down_of(const pool *p, size_t i)
{
    return p->u->down + p->unit[i] * p->u->fan;
}
static const double *up_of(const pool *p, size_t i) { return p->u->up + p->unit[i] * p->u->out; }

/* --- the pool --------------------------------------------------------------------------------- */
/* Units that change something, with their balance and weight.  The weights are divided by their
 * mean: they are shares, and no share may round to nothing. */
static ipt_status find_units(pool *p, const ipt_lego_opts *o)
{
    const ipt_units *u = p->u;
    double sum = 0;
    p->unit = ipt_calloc(p->ctx, u->n, sizeof *p->unit);
    p->balance = ipt_calloc(p->ctx, u->n, sizeof *p->balance);
    p->w = ipt_calloc(p->ctx, u->n, sizeof *p->w);
    if (!p->unit || !p->balance || !p->w)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < u->n; i++) {
        double a = sqrt(ipt_norm2(u->down + i * u->fan, u->fan)),
               b = sqrt(ipt_norm2(u->up + i * u->out, u->out)), w = u->omega[u->from[i]];
        if (!isfinite(a) || !isfinite(b) || !isfinite(w))
            return ipt_fail(p->ctx, IPT_ERR_ARG,
                            "a unit has values that are not finite, or too large to be squared");
        if (!(a > 0) || !(b > 0) || !(w > 0))
            continue;
        p->unit[p->n] = i;
        p->balance[p->n] = o->want_gauge ? sqrt(b / a) : u->split[i];
        p->w[p->n++] = w;
        sum += w;
    }
    for (size_t i = 0; i < p->n; i++)
        p->w[i] *= (double)p->n / sum;
    return p->n <= IPT_LEGO_MAX_UNITS
               ? IPT_OK
               : ipt_fail(p->ctx, IPT_ERR_ARG,
                          "the adapters have %zu units together, expected at most %d: resize them "
                          "first",
                          p->n, IPT_LEGO_MAX_UNITS);
}

/* The mean of the adapters' ranks by weight, of those that change something here. */
static ipt_status mean_rank(const pool *p, double *out)
{
    size_t *rank = ipt_calloc(p->ctx, p->u->n_from, sizeof *rank);
    double sum = 0, weight = 0;
    if (!rank)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < p->n; i++)
        rank[p->u->from[p->unit[i]]]++;
    for (size_t f = 0; f < p->u->n_from; f++)
        if (rank[f] > 0) {
            sum += p->u->omega[f] * (double)rank[f];
            weight += p->u->omega[f];
        }
    *out = sum / weight;
    ipt_free(rank);
    return IPT_OK;
}

static double dot(const double *a, const double *b, size_t n)
{
    double s[8] = {0};
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (size_t k = 0; k < 8; k++)
            s[k] += a[i + k] * b[i + k];
    for (; i < n; i++)
        s[0] += a[i] * b[i];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static ipt_status make_gram(pool *p)
{
    size_t n = p->n;
    for (size_t i = 0; i < n; i++) {
        if (ipt_cancelled(p->ctx))
            return ipt_fail(p->ctx, IPT_ERR_CANCELLED, "cancelled");
        for (size_t j = 0; j <= i; j++) {
            double t = p->balance[i] * p->balance[j];
            p->g[i * n + j] = p->g[j * n + i] = t * dot(down_of(p, i), down_of(p, j), p->u->fan) +
                                                dot(up_of(p, i), up_of(p, j), p->u->out) / t;
        }
    }
    return IPT_OK;
}

/* --- k-means ---------------------------------------------------------------------------------- */
static double product_of(const pool *p, double x) { return p->up_to_sign ? fabs(x) : x; }

/* Squared distance of units i and j. */
static double between(const pool *p, size_t i, size_t j)
{
    double both = p->g[i * p->n + i] + p->g[j * p->n + j],
           d = both - 2 * product_of(p, p->g[i * p->n + j]);
    return d > NEAR * both ? d : 0;
}

/* A unit by chance, by weight times near2 (first: by weight alone). */
static size_t draw(const pool *p, bool is_first, uint64_t *random)
{
    double total = 0, at = 0;
    for (size_t i = 0; i < p->n; i++)
        total += p->w[i] * (is_first ? 1 : p->near2[i]);
    double goal = (double)ipt_rng_uniform(random) * total;
    size_t last = 0;
    for (size_t i = 0; i < p->n; i++) {
        double mass = p->w[i] * (is_first ? 1 : p->near2[i]);
        at += mass;
        last = mass > 0 ? i : last;
        if (at > goal)
            return i;
    }
    return last;
}

/* k-means++: units far from all centroids so far are likelier to be the next.  Every unit joins the
 * nearest; where fewer than k differ, the rest of the clusters stay empty. */
static void start(pool *p, uint64_t *random)
{
    for (size_t c = 0; c < p->k; c++) {
        double left = 0;
        size_t center = draw(p, c == 0, random);
        for (size_t i = 0; i < p->n; i++) {
            double d = between(p, i, center);
            if (c > 0 && !(d < p->near2[i]))
                continue;
            p->near2[i] = d;
            p->cluster[i] = c;
            p->sign[i] = p->up_to_sign && p->g[i * p->n + center] < 0 ? -1 : 1;
        }
        for (size_t i = 0; i < p->n; i++)
            left += p->near2[i];
        if (!(left > 0))
            return;
    }
}

/* S, W and |c|^2 of the clusters as they are. */
static void measure(pool *p)
{
    size_t n = p->n;
    memset(p->s, 0, p->k * n * sizeof *p->s);
    memset(p->weight, 0, p->k * sizeof *p->weight);
    memset(p->norm2, 0, p->k * sizeof *p->norm2);
    for (size_t j = 0; j < n; j++) {
        double w = p->w[j] * p->sign[j], *s = p->s + p->cluster[j] * n;
        const double *g = p->g + j * n;
        p->weight[p->cluster[j]] += p->w[j];
        for (size_t i = 0; i < n; i++)
            s[i] += w * g[i];
    }
    for (size_t j = 0; j < n; j++)
        p->norm2[p->cluster[j]] += p->w[j] * p->sign[j] * p->s[p->cluster[j] * n + j];
    for (size_t c = 0; c < p->k; c++)
        if (p->weight[c] > 0)
            p->norm2[c] /= p->weight[c] * p->weight[c];
}

/* Every unit joins the nearest centroid, the first of equal ones; true when one moved or turned. */
static bool join(pool *p)
{
    size_t n = p->n;
    bool moved = false;
    for (size_t i = 0; i < n; i++) {
        size_t best = p->cluster[i];
        double own = p->g[i * n + i], least = HUGE_VAL;
        for (size_t c = 0; c < p->k; c++) {
            if (!(p->weight[c] > 0))
                continue;
            double both = own + p->norm2[c],
                   d = both - 2 * product_of(p, p->s[c * n + i]) / p->weight[c];
            d = d > NEAR * both ? d : 0;
            if (d < least) {
                least = d;
                best = c;
            }
        }
        double sign = p->up_to_sign && p->s[best * n + i] < 0 ? -1 : 1;
        moved = moved || best != p->cluster[i] || sign * p->sign[i] < 0;
        p->cluster[i] = best;
        p->sign[i] = sign;
        p->near2[i] = least;
    }
    return moved;
}

/* Empty clusters take the units that are farthest from their centroids, as long as any is away. */
static bool fill_empty(pool *p)
{
    bool filled = false;
    memset(p->weight, 0, p->k * sizeof *p->weight);
    for (size_t i = 0; i < p->n; i++)
        p->weight[p->cluster[i]] += p->w[i];
    for (size_t c = 0; c < p->k; c++) {
        size_t far = 0;
        if (p->weight[c] > 0)
            continue;
        for (size_t i = 1; i < p->n; i++)
            if (p->w[i] * p->near2[i] > p->w[far] * p->near2[far])
                far = i;
        if (!(p->near2[far] > 0))
            return filled;
        p->cluster[far] = c; /* it was not alone: a unit alone is no distance away */
        p->sign[far] = 1;
        p->near2[far] = 0;
        filled = true;
    }
    return filled;
}

/* From one start to the end: the weighted sum of squared distances. */
static ipt_status run(pool *p, double *inertia)
{
    bool moves = true;
    for (int round = 0; moves && round < MAX_ROUND; round++) {
        if (ipt_cancelled(p->ctx))
            return ipt_fail(p->ctx, IPT_ERR_CANCELLED, "cancelled");
        measure(p);
        moves = join(p);
        moves = fill_empty(p) || moves;
    }
    *inertia = 0;
    for (size_t i = 0; i < p->n; i++)
        *inertia += p->w[i] * p->near2[i];
    return IPT_OK;
}

static ipt_status best_of_starts(pool *p)
{
    uint64_t random = 0;
    double least = HUGE_VAL, inertia = 0;
    for (int i = 0; i < N_START; i++) {
        start(p, &random);
        IPT_TRY(run(p, &inertia));
        if (i > 0 && !(inertia < least * BETTER))
            continue;
        least = inertia;
        memcpy(p->best, p->cluster, p->n * sizeof *p->best);
        memcpy(p->best_sign, p->sign, p->n * sizeof *p->best_sign);
    }
    return IPT_OK;
}

/* Clusters by their first units, which keep their sign; p->k: those that are not empty. */
static ipt_status put_in_order(pool *p)
{
    size_t n = 0;
    size_t *number = ipt_calloc(p->ctx, p->k, sizeof *number); /* + 1; 0: not met yet */
    double *turn = ipt_calloc(p->ctx, p->k, sizeof *turn);
    for (size_t i = 0; number && turn && i < p->n; i++) {
        size_t c = p->best[i];
        if (number[c] == 0) {
            number[c] = ++n;
            turn[c] = p->best_sign[i];
        }
        p->best[i] = number[c] - 1;
        p->best_sign[i] *= turn[c];
    }
    ipt_status s = number && turn ? IPT_OK : IPT_ERR_NOMEM;
    ipt_free(number);
    ipt_free(turn);
    p->k = n;
    return s;
}

/* --- centroids -------------------------------------------------------------------------------- */
static double norm_of(const ipt_lego_opts *o, const double *a, size_t n, const double *b, size_t m,
                      double t)
{
    double most = 0;
    if (o->norm == IPT_LEGO_NORM_2)
        return sqrt(t * t * ipt_norm2(a, n) + ipt_norm2(b, m) / (t * t));
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs(t * a[i]));
    for (size_t i = 0; i < m; i++)
        most = fmax(most, fabs(b[i] / t));
    return most;
}

/* Members of cluster c, their weight and the mean of their norms. */
static size_t members(const pool *p, const ipt_lego_opts *o, size_t c, double *weight, double *norm,
                      size_t *first)
{
    size_t n = 0;
    *weight = *norm = 0;
    for (size_t i = p->n; i-- > 0;) {
        if (p->best[i] != c)
            continue;
        n++;
        *first = i;
        *weight += p->w[i];
        *norm +=
            p->w[i] * norm_of(o, down_of(p, i), p->u->fan, up_of(p, i), p->u->out, p->balance[i]);
    }
    *norm /= *weight;
    return n;
}

/* The mean of a cluster, made as long as its members are on average: averaging shortens. */
static void make_centroid(const pool *p, const ipt_lego_opts *o, size_t c, double *a, double *b)
{
    double weight = 0, norm = 0;
    size_t fan = p->u->fan, out = p->u->out, first = 0;
    if (members(p, o, c, &weight, &norm, &first) == 1) {
        memcpy(a, down_of(p, first), fan * sizeof *a);
        memcpy(b, up_of(p, first), out * sizeof *b);
        return;
    }
    for (size_t i = 0; i < p->n; i++) {
        if (p->best[i] != c)
            continue;
        const double *x = down_of(p, i), *y = up_of(p, i);
        double share = p->w[i] * p->best_sign[i] / weight, t = p->balance[i];
        for (size_t k = 0; k < fan; k++)
            a[k] += share * t * x[k];
        for (size_t k = 0; k < out; k++)
            b[k] += share / t * y[k];
    }
    if (o->norm == IPT_LEGO_NORM_OFF)
        return;
    double own = norm_of(o, a, fan, b, out, 1), f = own > NEAR * norm ? norm / own : 0;
    for (size_t k = 0; k < fan; k++)
        a[k] *= f;
    for (size_t k = 0; k < out; k++)
        b[k] *= f;
}

static ipt_status make_result(const pool *p, const ipt_lego_opts *o, double mean, ipt_lego *out)
{
    size_t k = p->k, width = p->u->out;
    double f = o->want_output ? sqrt(mean / (double)k) : 1;
    out->down = ipt_calloc(p->ctx, k * p->u->fan, sizeof *out->down);
    out->up = ipt_calloc(p->ctx, k * width, sizeof *out->up);
    if (!out->down || !out->up)
        return IPT_ERR_NOMEM;
    for (size_t c = 0; c < k; c++)
        make_centroid(p, o, c, out->down + c * p->u->fan, out->up + c * width);
    for (size_t i = 0; o->want_output && i < k * width; i++)
        out->up[i] *= f;
    out->rank = k;
    return IPT_OK;
}

/* --- all of it -------------------------------------------------------------------------------- */
static ipt_status cluster(pool *p)
{
    if (p->k == p->n) { /* nothing to choose */
        for (size_t i = 0; i < p->n; i++) {
            p->best[i] = i;
            p->best_sign[i] = 1;
        }
        return IPT_OK;
    }
    IPT_TRY(make_gram(p));
    IPT_TRY(best_of_starts(p));
    return put_in_order(p);
}

static ipt_status merge(pool *p, const ipt_lego_opts *o, ipt_lego *out)
{
    double mean = 0;
    IPT_TRY(find_units(p, o));
    if (p->n == 0)
        return IPT_OK;
    IPT_TRY(mean_rank(p, &mean));
    p->k = o->rank > 0 ? (size_t)o->rank : (size_t)lround(mean);
    out->is_clamped = p->k > p->n;
    p->k = p->k > p->n ? p->n : p->k > 0 ? p->k : 1;
    IPT_TRY(pool_alloc(p));
    IPT_TRY(cluster(p));
    return make_result(p, o, mean, out);
}

ipt_status ipt_lego_merge(ipt_ctx *ctx, const ipt_units *u, const ipt_lego_opts *o, ipt_lego *out)
{
    pool p = {.ctx = ctx, .u = u, .up_to_sign = o->want_gauge};
    ipt_lego l = {0};
    ipt_status s = merge(&p, o, &l);
    pool_finish(&p);
    if (s == IPT_OK)
        *out = l;
    else
        ipt_lego_finish(&l);
    return s;
}

void ipt_lego_finish(ipt_lego *l)
{
    ipt_free(l->down);
    ipt_free(l->up);
    *l = (ipt_lego){0};
}
