/* graph/attention.h - what the attention operators share: extents, reference helpers, bindings of
 * parts, products with free strides.  For graph/op_att*.c only. */
#ifndef IPT_GRAPH_ATTENTION_H
#define IPT_GRAPH_ATTENTION_H
#include "graph/op.h"

enum { IPT_ATTN_TILE = 64 };                  /* rows and columns of a tile of products */
#define IPT_ATTN_SCRATCH (UINT64_C(32) << 20) /* bytes of one matrix of scores */

/* --- extents --------------------------------------------------------------------------------- */
typedef struct ipt_attn_geo {
    uint32_t n, t, s, c, heads, d;
    uint64_t elt; /* bytes */
    ipt_dtype dtype;
    float scale;
    uint32_t causal;
    bool whole; /* every tensor fits one binding */
} ipt_attn_geo;

/* The heads of the node divide c channels. */
bool ipt_attn_dividing(const ipt_node *n, int32_t c);
/* Problem text when the first n_act operands differ in type. */
const char *ipt_attn_same_types(const ipt_node *n, int n_act);
/* Problem text when heads, mask or scale do not fit q and k (operands 0 and 1). */
const char *ipt_attn_check_query(const ipt_node *n);
/* q, k: shapes of operands of those extents. */
ipt_attn_geo ipt_attn_geo_of(const ipt_node *n, const ipt_launch *l, const ipt_shape *q,
                             const ipt_shape *k);
/* False when an index or a binding of one batch element does not fit the device. */
bool ipt_attn_fits(const ipt_attn_geo *g, const ipt_launch *l);
static inline uint32_t ipt_attn_div_up(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

/* --- references, in double ------------------------------------------------------------------- */
typedef struct ipt_attn_ref {
    size_t n, t, s, h, d, c;
    double scale;
    bool causal;
} ipt_attn_ref;

/* Extents for references; q, k as in ipt_attn_geo_of. */
ipt_attn_ref ipt_attn_ref_geo(const ipt_node *n, const ipt_shape *q, const ipt_shape *k);
/* sum_c a[c] b[c] over one head. */
double ipt_attn_dot(const double *a, const double *b, size_t d);
/* dst += a x over one head. */
void ipt_attn_axpy(double *dst, double a, const double *x, size_t d);
/* Rows of head h of a [N,rows,C] tensor. */
const double *ipt_attn_row(const ipt_attn_ref *g, const double *x, size_t rows, size_t n, size_t h,
                           size_t i);
/* Scaled score of query i and key j. */
double ipt_attn_score(const ipt_attn_ref *g, const double *q, const double *k, size_t n, size_t h,
                      size_t i, size_t j);
/* ln sum exp of the scores of one query. */
double ipt_attn_log_sum(const ipt_attn_ref *g, const double *q, const double *k, size_t n, size_t h,
                        size_t i);

/* --- dispatches ------------------------------------------------------------------------------ */
/* The element at which an ipt_launch_bind_part from element `first` starts. */
uint32_t ipt_attn_below(const ipt_launch *l, uint64_t first, uint64_t elt);
/* Sets the grid; d may be NULL. */
void ipt_attn_groups(ipt_dispatch *d, uint32_t x, uint32_t y, uint32_t z);

typedef struct ipt_attn_soft { /* shaders/attention_soft.comp */
    uint32_t n_row, rows, row0, n, ld, ld_out, out_off, lse_off, lse_ld;
} ipt_attn_soft;

/* Element (i, j) of a pair is at off + batch sb + head sh + i s0 + j s1 (modulo 2^32). */
typedef struct ipt_attn_operand {
    uint32_t off, sb, sh, s0, s1;
} ipt_attn_operand;
typedef struct ipt_attn_matrix {
    ipt_src src;
    int index;
    uint64_t batch; /* elements of one batch element; 0: scratch, bound whole */
    ipt_attn_operand at;
} ipt_attn_matrix;
typedef struct ipt_attn_pairs { /* (batch, head) pairs first .. first + count - 1 */
    uint32_t first, count;
} ipt_attn_pairs;

/* Head slices of a [N,rows,C] tensor from row `row0`. */
ipt_attn_matrix ipt_attn_heads(const ipt_attn_geo *g, ipt_src src, int index, uint32_t rows,
                               uint32_t row0);
/* Of a [N,heads,T,S] tensor. */
ipt_attn_matrix ipt_attn_probs(const ipt_attn_geo *g, ipt_src src, int index, uint32_t row0);
/* Of scratch [count][rows][cols] that starts at pair p.first. */
ipt_attn_matrix ipt_attn_scratch(const ipt_attn_geo *g, int index, const ipt_attn_pairs *p,
                                 uint32_t rows, uint32_t cols);
ipt_attn_matrix ipt_attn_transposed(ipt_attn_matrix m);
/* Storage of a, b and c with f16 activations: half or float. */
typedef enum ipt_attn_types { IPT_ATTN_HHF, IPT_ATTN_HHH, IPT_ATTN_FHH } ipt_attn_types;
/* c = alpha a b for every pair (shaders/attention_mm.comp, on CPU devices attention_mm_any.comp);
 * mnk: rows, columns, depth. */
void ipt_attn_mm(const ipt_attn_geo *g, ipt_launch *l, ipt_attn_types types,
                 const ipt_attn_pairs *p, const uint32_t mnk[3], float alpha, ipt_attn_matrix a,
                 ipt_attn_matrix b, ipt_attn_matrix c);
/* How many pairs and how many of `extent` lines of `other` scores each fit the scratch. */
uint32_t ipt_attn_plan(const ipt_attn_geo *g, const ipt_launch *l, uint32_t extent, uint32_t other,
                       ipt_attn_pairs *p);
/* Moves to the next (at most) `count` pairs; false when none is left. */
bool ipt_attn_next(const ipt_attn_geo *g, ipt_attn_pairs *p, uint32_t count);
#endif
