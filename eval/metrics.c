/* eval/metrics.c - places of concepts, what is missing, doubled or spilt, bootstrap intervals. */
#include "eval/metrics.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    APART = 16, /* pixels between the places of two concepts */
    ELSEWHERE =
        24, /* from here on a view shows another place: windows overlap by a quarter at most */
    CANDIDATES = 10, /* best views of a concept that are tried as its place */
};

int ipt_view_apart(int a, int b)
{
    if (a == IPT_VIEW_WHOLE || b == IPT_VIEW_WHOLE)
        return 0;
    const int dx = abs(a % IPT_VIEW_ROW - b % IPT_VIEW_ROW),
              dy = abs(a / IPT_VIEW_ROW - b / IPT_VIEW_ROW);
    return IPT_VIEW_STEP * (dx > dy ? dx : dy);
}

static double at(const ipt_sight *s, int view, int concept)
{
    return (double)s->p[(size_t)view * (s->n_class + 2) + (size_t) concept];
}

/* --- places ----------------------------------------------------------------------------------- */
typedef struct search {
    const ipt_sight *s;
    const float *threshold;
    const int *concept;
    int k, candidate[IPT_EVAL_MAX_K][CANDIDATES];
    int now[IPT_EVAL_MAX_K], best[IPT_EVAL_MAX_K];
    double best_score;
} search;

/* The views of a concept's highest probabilities, the first of equals first. */
static void choose_candidates(search *q, int c)
{
    bool taken[IPT_VIEWS] = {false};
    for (int i = 0; i < CANDIDATES; i++) {
        int best = -1;
        for (int v = 0; v < IPT_VIEWS; v++)
            if (!taken[v] &&
                (best < 0 || at(q->s, v, q->concept[c]) > at(q->s, best, q->concept[c])))
                best = v;
        q->candidate[c][i] = best;
        taken[best] = true;
    }
}

static bool is_free(const search *q, int c, int view)
{
    for (int i = 0; i < c; i++)
        if (q->now[i] >= 0 && ipt_view_apart(q->now[i], view) < APART)
            return false;
    return true;
}

/* What a place is worth: being there outweighs all probabilities together. */
static double worth(const search *q, int c, int view)
{
    const double p = at(q->s, view, q->concept[c]);
    return p + (p >= (double)q->threshold[q->concept[c]] ? 2.0 * IPT_EVAL_MAX_K : 0);
}

/* Counts through all ways like an odometer: digit CANDIDATES means that a concept has no place. */
static void try_all(search *q)
{
    int digit[IPT_EVAL_MAX_K] = {0}, c = 0;
    double score[IPT_EVAL_MAX_K + 1] = {0};
    while (c >= 0) {
        if (c == q->k) {
            if (score[c] > q->best_score) {
                q->best_score = score[c];
                memcpy(q->best, q->now, sizeof q->best);
            }
            c--;
            continue;
        }
        const int d = digit[c]++;
        if (d > CANDIDATES) {
            digit[c] = 0;
            c--;
            continue;
        }
        const int view = d < CANDIDATES ? q->candidate[c][d] : -1;
        if (view >= 0 && !is_free(q, c, view))
            continue;
        q->now[c] = view;
        score[c + 1] = score[c] + (view >= 0 ? worth(q, c, view) : 0);
        c++;
    }
}

static double highest(const ipt_sight *s, int concept, int away_from)
{
    double top = 0;
    for (int v = 0; v < IPT_VIEWS; v++)
        if (away_from < 0 || ipt_view_apart(v, away_from) >= ELSEWHERE)
            top = fmax(top, at(s, v, concept));
    return top;
}

static double strangers(const ipt_sight *s, const float *threshold, const int *concept, int k)
{
    int n = 0, there = 0;
    for (int c = 0; c < (int)s->n_class; c++) {
        bool asked = false;
        for (int i = 0; i < k; i++)
        asked = asked || concept[i] == c;
        n += !asked;
        there += !asked && highest(s, c, -1) >= (double)threshold[c];
    }
    return n > 0 ? (double)there / n : 0;
}

void ipt_eval_score(const ipt_sight *s, const float *threshold, const int *concept, int k,
                    ipt_scored *out)
{
    search q = {.s = s, .threshold = threshold, .concept = concept, .k = k, .best_score = -1};
    memset(out, 0, sizeof *out);
    for (int c = 0; c < k; c++)
        choose_candidates(&q, c);
    try_all(&q);
    bool doubled = false;
    for (int c = 0; c < k; c++) {
        const int v = q.best[c];
        const double limit = (double)threshold[concept[c]], away = highest(s, concept[c], v);
        out->view[c] = v;
        out->found[c] = v >= 0 && at(s, v, concept[c]) >= limit;
        out->n_found += out->found[c];
        out->likeness[c] =
            v >= 0 ? (double)s->like[(size_t)v * s->n_class + (size_t) concept[c]] : 0;
        out->leak += away / k;
        doubled = doubled || (out->found[c] && away >= limit);
    }
    out->duplicate = doubled && out->n_found < k;
    out->strangers = strangers(s, threshold, concept, k);
}

double ipt_eval_drift(const ipt_image *im, const uint8_t colour[3])
{
    const int32_t ring = im->w / 16 > 0 ? im->w / 16 : 1;
    double sum = 0;
    size_t n = 0;
    for (int32_t y = 0; y < im->h; y++)
        for (int32_t x = 0; x < im->w; x++) {
            if (x >= ring && x < im->w - ring && y >= ring && y < im->h - ring)
                continue;
            const uint8_t *p = im->rgb + ((size_t)y * (size_t)im->w + (size_t)x) * 3;
            for (int i = 0; i < 3; i++)
                sum += ((double)p[i] - colour[i]) * ((double)p[i] - colour[i]);
            n += 3;
        }
    return n ? sqrt(sum / (double)n) : (double)NAN;
}

/* --- intervals -------------------------------------------------------------------------------- */
static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Mean of a, of a - b, or their ratio, over picked sets. */
typedef enum statistic { MEAN, DIFFERENCE, RATIO } statistic;

static double value_of(statistic kind, double sum_a, double sum_b, size_t n)
{
    switch (kind) {
    case MEAN:
        return sum_a / (double)n;
    case DIFFERENCE:
        return (sum_a - sum_b) / (double)n;
    case RATIO:
        break;
    }
    return sum_b > 0 ? sum_a / sum_b : (double)(sum_a > 0 ? INFINITY : NAN);
}

static ipt_interval resample(statistic kind, const double *a, const double *b, size_t n,
                             uint64_t seed)
{
    const double none = (double)NAN;
    ipt_interval out = {none, none, none, 0};
    double drawn[IPT_BOOTSTRAP], sum_a = 0, sum_b = 0;
    size_t m = 0, used = 0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(a[i]) || isnan(b[i]))
            continue;
        sum_a += a[i];
        sum_b += b[i];
        m++;
    }
    if (m == 0)
        return out;
    out.n = m;
    out.mean = value_of(kind, sum_a, sum_b, m);
    for (size_t r = 0; r < IPT_BOOTSTRAP; r++) {
        sum_a = sum_b = 0;
        for (size_t i = 0; i < m;) {
            const size_t k = (size_t)(ipt_rng_next(&seed) % n);
            if (isnan(a[k]) || isnan(b[k]))
                continue;
            sum_a += a[k];
            sum_b += b[k];
            i++;
        }
        const double v = value_of(kind, sum_a, sum_b, m);
        if (!isnan(v))
            drawn[used++] = v;
    }
    if (used == 0)
        return out;
    qsort(drawn, used, sizeof *drawn, by_value);
    out.low = drawn[(used - 1) * 25 / 1000];
    out.high = drawn[(used - 1) * 975 / 1000];
    return out;
}

ipt_interval ipt_eval_bootstrap(const double *value, size_t n, uint64_t seed)
{
    return resample(MEAN, value, value, n, seed);
}

ipt_interval ipt_eval_difference(const double *a, const double *b, size_t n, uint64_t seed)
{
    return resample(DIFFERENCE, a, b, n, seed);
}

ipt_interval ipt_eval_ratio(const double *a, const double *b, size_t n, uint64_t seed)
{
    return resample(RATIO, a, b, n, seed);
}

double ipt_eval_median(double *value, size_t n)
{
    if (n == 0)
        return (double)NAN;
    qsort(value, n, sizeof *value, by_value);
    return n % 2 ? value[n / 2] : (value[n / 2 - 1] + value[n / 2]) / 2;
}
