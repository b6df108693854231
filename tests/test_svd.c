/* tests/test_svd.c - singular values against closed forms: known values on cosine vectors, products
 * and Kronecker products against the whole matrices they are, ranks by share. */
#include <math.h>
#include <stdlib.h>

#include "model_io/adapter_tools.h"
#include "tests/golden.h"

/* Row k of the orthonormal cosine basis of n. */
static double cosine(size_t k, size_t i, size_t n)
{
    const double pi = 3.14159265358979323846;
    return sqrt((k ? 2.0 : 1.0) / (double)n) * cos(pi * ((double)i + 0.5) * (double)k / (double)n);
}

/* a [m,n] with the values s[k] = ratio^k, k < r, on cosine vectors. */
static double *known_matrix(size_t m, size_t n, size_t r, double ratio)
{
    double *a = calloc(m * n, sizeof *a);
    assert_non_null(a);
    for (size_t k = 0; k < r; k++)
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < n; j++)
                a[i * n + j] += pow(ratio, (double)k) * cosine(k, i, m) * cosine(k, j, n);
    return a;
}

/* Largest distance of v v^T from 1. */
static double orthonormality(const double *v, size_t rank, size_t n)
{
    double worst = 0;
    for (size_t p = 0; p < rank; p++)
        for (size_t q = 0; q <= p; q++) {
            double c = 0;
            for (size_t i = 0; i < n; i++)
                c += v[p * n + i] * v[q * n + i];
            worst = fmax(worst, fabs(c - (p == q)));
        }
    return worst;
}

static double distance(const double *a, const ipt_svd *d)
{
    double sum = 0;
    for (size_t i = 0; i < d->m; i++)
        for (size_t j = 0; j < d->n; j++) {
            double x = a[i * d->n + j];
            for (size_t k = 0; k < d->rank; k++)
                x -= d->s[k] * d->u[k * d->m + i] * d->v[k * d->n + j];
            sum += x * x;
        }
    return sqrt(sum);
}

static void test_known_values(void **state)
{
    /* 300 x 260 and 150 x 400 of low ranks take the iteration, the others the exact way */
    static const struct {
        size_t m, n, r, rank;
        double ratio;
    } cases[] = {{1, 1, 1, 1, 0.5},      {5, 3, 3, 2, 0.5},        {3, 5, 3, 0, 0.7},
                 {64, 64, 64, 7, 0.9},   {77, 130, 20, 9, 0.6},    {300, 260, 100, 12, 0.93},
                 {150, 400, 9, 30, 0.5}, {400, 150, 150, 5, 0.98}, {260, 260, 260, 4, 1}};
    ipt_ctx *ctx = test_ctx();
    (void)state;
    for (size_t c = 0; c < IPT_COUNT(cases); c++) {
        size_t m = cases[c].m, n = cases[c].n, r = cases[c].r;
        double *a = known_matrix(m, n, r, cases[c].ratio), tail = 0, total = 0, worst = 0;
        ipt_svd d = {0};
        assert_ok(ctx, ipt_svd_dense(ctx, (ipt_matrix){a, m, n}, cases[c].rank, &d));
        size_t want = cases[c].rank ? cases[c].rank : (m < n ? m : n);
        assert_int_equal(d.rank, want);
        for (size_t k = 0; k < r; k++) {
            double s = pow(cases[c].ratio, (double)k);
            total += s * s;
            tail += k < d.rank ? 0 : s * s;
            worst = k < d.rank ? fmax(worst, fabs(d.s[k] - s)) : worst;
        }
        bool flat = cases[c].ratio > 0.99; /* all values equal: any vectors are right */
        golden_at_most(flat ? 0 : worst, 1e-5, "case %zu: values", c); /* the iteration's limit */
        golden_at_most(fabs(d.total - total) / total, 1e-13, "case %zu: total", c);
        golden_at_most(fabs(ipt_svd_error(&d) - sqrt(tail / total)), flat ? 1e-12 : 2e-6,
                       "case %zu: error", c);
        /* what it says of itself is so, whatever the iteration reached */
        golden_at_most(fabs(distance(a, &d) - sqrt(d.tail)), 1e-7, "case %zu: told error", c);
        golden_at_most(orthonormality(d.u, d.rank < r ? d.rank : r, m), 1e-12, "case %zu: u", c);
        golden_at_most(orthonormality(d.v, d.rank < r ? d.rank : r, n), 1e-12, "case %zu: v", c);
        free(a);
        ipt_svd_finish(&d);
    }
    double zero[12] = {0};
    ipt_svd d = {0};
    assert_ok(ctx, ipt_svd_dense(ctx, (ipt_matrix){zero, 3, 4}, 2, &d));
    assert_true(d.total <= 0 && ipt_svd_error(&d) <= 0);
    ipt_svd_finish(&d);
    ipt_ctx_destroy(&ctx);
}

static double *noise(uint64_t seed, size_t n)
{
    double *v = calloc(n, sizeof *v);
    assert_non_null(v);
    for (size_t i = 0; i < n; i++)
        v[i] = (double)ipt_rng_normal(&seed);
    return v;
}

static void expect_same_values(const ipt_svd *a, const ipt_svd *b, const char *what)
{
    assert_int_equal(a->rank, b->rank);
    for (size_t k = 0; k < a->rank; k++)
        golden_at_most(fabs(a->s[k] - b->s[k]) / b->s[0], 1e-12, "%s: value %zu", what, k);
    golden_at_most(fabs(a->tail - b->tail) / b->total, 1e-12, "%s: tail", what);
}

/* Products and Kronecker products against the whole matrices they are. */
static void test_structured_values(void **state)
{
    static const struct {
        size_t m, r, n;
    } sizes[] = {{40, 6, 50}, {7, 7, 30}, {9, 20, 11}, {30, 1, 2}};
    ipt_ctx *ctx = test_ctx();
    (void)state;
    for (size_t c = 0; c < IPT_COUNT(sizes); c++) {
        size_t m = sizes[c].m, r = sizes[c].r, n = sizes[c].n, side = m < n ? m : n;
        size_t rank = r > 2 ? 3 : 1;
        double *up = noise(1, m * r), *down = noise(2, r * n), *a = calloc(m * n, sizeof *a),
               norm2 = 0;
        ipt_svd x = {0}, y = {0};
        ipt_matrix u = {up, m, r}, w = {down, r, n};
        assert_non_null(a);
        ipt_add_product(a, up, down, m, r, n, 1);
        assert_ok(ctx, ipt_svd_product(ctx, u, w, rank, &x));
        assert_ok(ctx, ipt_svd_dense(ctx, (ipt_matrix){a, m, n}, rank, &y));
        expect_same_values(&x, &y, "product");
        golden_at_most(fabs(distance(a, &x) - sqrt(x.tail)) / sqrt(x.total), 1e-7, "product: told");
        assert_ok(ctx, ipt_product_norm2(ctx, up, down, m, r, n, &norm2));
        golden_at_most(fabs(norm2 - y.total) / y.total, 1e-12, "norm of a product");
        ipt_svd_finish(&x);
        assert_ok(ctx, ipt_svd_product(ctx, u, w, 0, &x));
        assert_int_equal(x.rank, r < side ? r : side);
        golden_at_most(distance(a, &x) / sqrt(x.total), 1e-13, "product: all of it");
        ipt_svd_finish(&x);
        ipt_svd_finish(&y);
        free(up);
        free(down);
        free(a);
    }
    for (int shuffled = 0; shuffled < 2; shuffled++) {
        enum { O1 = 3, I1 = 4, O2 = 5, I2 = 6 };
        double *p = noise(3, O1 * I1), *q = noise(4, O2 * I2), a[O1 * O2 * I1 * I2];
        ipt_svd x = {0}, y = {0};
        for (size_t o = 0; o < O1 * O2; o++)
            for (size_t i = 0; i < I1 * I2; i++) {
                size_t o1 = shuffled ? o % O1 : o / O2, o2 = shuffled ? o / O1 : o % O2;
                a[o * I1 * I2 + i] = p[o1 * I1 + i / I2] * q[o2 * I2 + i % I2];
            }
        assert_ok(ctx, ipt_svd_kron(ctx, (ipt_matrix){p, O1, I1}, (ipt_matrix){q, O2, I2}, shuffled,
                                    7, &x));
        assert_ok(ctx, ipt_svd_dense(ctx, (ipt_matrix){a, O1 * O2, I1 * I2}, 7, &y));
        expect_same_values(&x, &y, "kron");
        golden_at_most(fabs(distance(a, &x) - sqrt(x.tail)) / sqrt(x.total), 1e-7, "kron: told");
        ipt_svd_finish(&x);
        ipt_svd_finish(&y);
        free(p);
        free(q);
    }
    ipt_ctx_destroy(&ctx);
}

/* By hand: squares 16, 4, 1 of 21. */
static void test_rank_for(void **state)
{
    static const double s[3] = {4, 2, 1};
    (void)state;
    assert_int_equal(ipt_rank_for(s, 3, 21, 0.1), 1);
    assert_int_equal(ipt_rank_for(s, 3, 21, 0.8), 1);  /* 0.64 < 16/21 = 0.76 */
    assert_int_equal(ipt_rank_for(s, 3, 21, 0.9), 2);  /* 0.81 < 20/21 = 0.95 */
    assert_int_equal(ipt_rank_for(s, 3, 21, 0.99), 3); /* 0.98 > 20/21 */
    assert_int_equal(ipt_rank_for(s, 3, 21, 1), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_values),
        cmocka_unit_test(test_structured_values),
        cmocka_unit_test(test_rank_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
