/* model_io/svd.h - singular value decompositions in double, whole or cut to a rank: what
 * converting, merging, resizing and extracting adapters stand on.
 *
 * Must not know: files, adapters.
 * Matrices are row-major.  Threads: none are made; a call belongs to the thread of its ctx. */
#ifndef IPT_MODEL_IO_SVD_H
#define IPT_MODEL_IO_SVD_H
#include "core/core.h"

typedef struct ipt_matrix { /* borrowed, row-major [m,n] */
    const double *v;
    size_t m, n;
} ipt_matrix;

/* a [m,n] = sum_k s[k] u[k] v[k]^T + what was cut off. */
typedef struct ipt_svd {
    size_t m, n, rank;
    double *s; /* [rank], descending, >= 0 */
    double
        *u; /* [rank, m]: orthonormal rows, the left vectors; of s = 0 they are orthonormal or 0 */
    double *v;    /* [rank, n] */
    double total; /* |a|^2, the sum of all squared values */
    double tail;  /* what was cut off of it */
} ipt_svd;
void ipt_svd_finish(ipt_svd *d); /* safe on zeroed */
/* sqrt(tail / total): the relative error of what is kept; 0 for a matrix of zeros. */
double ipt_svd_error(const ipt_svd *d);
/* Keeps the first `rank` values; the others join the tail. */
void ipt_svd_cut(ipt_svd *d, size_t rank);

/* All of these: rank 0 keeps min(m,n) values, else at most `rank`.  Ownership: *out, caller,
 * ipt_svd_finish.  Errors: IPT_ERR_NOMEM, IPT_ERR_CANCELLED (polled between passes).
 *
 * A whole matrix.  Up to 128 on its short side, or for more than half of its values, exactly
 * (Householder, then one-sided Jacobi); else by subspace iteration with a fixed seed until the tail
 * moves by less than 1e-5 of itself from one pass to the next, 60 passes at most: `tail` belongs to
 * the vectors returned, whatever they are.  Sources: Golub and Van Loan 5.2, 8.6; Halko, Martinsson
 * and Tropp 2011, algorithm 4.4. */
IPT_CHECKED ipt_status ipt_svd_dense(ipt_ctx *ctx, ipt_matrix a, size_t rank, ipt_svd *out);
/* up [m,r] down [r,n] through an r x r core, which is a whole matrix as above: nothing of size m x
 * n is made while r <= min(m,n). */
IPT_CHECKED ipt_status ipt_svd_product(ipt_ctx *ctx, ipt_matrix up, ipt_matrix down, size_t rank,
                                       ipt_svd *out);
/* P [o1,i1] kron Q [o2,i2] from the two decompositions (Van Loan 2000): row (a,b) is number a*o2+b,
 * or b*o1+a where is_shuffled; column (i,j) is number i*i2+j. */
IPT_CHECKED ipt_status ipt_svd_kron(ipt_ctx *ctx, ipt_matrix p, ipt_matrix q, bool is_shuffled,
                                    size_t rank, ipt_svd *out);
/* c [m,n] += s a [m,k] b [k,n]. */
void ipt_add_product(double *c, const double *a, const double *b, size_t m, size_t k, size_t n,
                     double s);
double ipt_norm2(const double *v, size_t n); /* the sum of squares */
/* |up down|^2 of up [m,r], down [r,n], through r x r matrices.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_product_norm2(ipt_ctx *ctx, const double *up, const double *down,
                                         size_t m, size_t r, size_t n, double *norm2);
#endif
