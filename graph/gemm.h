/* graph/gemm.h - the matrix product kernels as seen by op_gemm.c and op_conv.c: operands and sizes
 * in, dispatches out.  Which shader, tile, band and binding is gemm.c's business alone. */
#ifndef IPT_GRAPH_GEMM_H
#define IPT_GRAPH_GEMM_H
#include "graph/op.h"

/* A tensor of the launch; number < 0: none. */
typedef struct ipt_operand {
    ipt_src src;
    int number;
} ipt_operand;
static inline ipt_operand ipt_operand_in(int i) { return (ipt_operand){IPT_SRC_IN, i}; }
static inline ipt_operand ipt_operand_out(int i) { return (ipt_operand){IPT_SRC_OUT, i}; }
static inline ipt_operand ipt_operand_scratch(int i) { return (ipt_operand){IPT_SRC_SCRATCH, i}; }
static inline ipt_operand ipt_operand_none(void) { return (ipt_operand){IPT_SRC_IN, -1}; }
static inline ipt_operand ipt_operand_optional(const ipt_node *n, int i)
{
    return i < n->n_in && n->in_shape[i].rank ? ipt_operand_in(i) : ipt_operand_none();
}

/* How rows of the result look into the left operand (values: MODE of shaders/gemm_iface.glsl). */
typedef enum ipt_walk_mode {
    IPT_WALK_PLAIN,
    IPT_WALK_TAPS,
    IPT_WALK_ENLARGE,
    IPT_WALK_SPREAD
} ipt_walk_mode;
typedef struct ipt_walk {
    ipt_walk_mode mode;
    int32_t kernel, stride, pad, spread;
    int32_t n, h, w; /* images and their stored size      */
    int32_t vh, vw;  /* virtual size                      */
    int32_t oh, ow;  /* result size                       */
} ipt_walk;
/* The walk of a forward convolution of x [n,h,w,*]; oh, ow are filled in (0: the kernel does not
 * fit). */
ipt_walk ipt_walk_conv(const ipt_shape *x, const ipt_conv *c);
/* The walk over dy [n,oh,ow,*] that gives dx [n,vh,vw,*] of the convolution c over a vh x vw input.
 */
ipt_walk ipt_walk_conv_dx(const ipt_shape *dy, const ipt_conv *c, int32_t vh, int32_t vw);
/* One tap over `rows` rows; images of `rows / n` rows. */
ipt_walk ipt_walk_plain(int64_t rows, int32_t n);

static inline int32_t ipt_pad4(int32_t k) { return (k + 3) & ~3; }

/* A small matrix from the left of the product: its rows are those of matrices of i rows, and
 *   y[r, o, col] = g sum_i p[i, o] (a b)[r i, col] (+ r),  g = gates[row, n, slot[0]] (1 without)
 * with r's batch element n; is_swapped: y[r, col, o].  i 0: none. */
typedef struct ipt_gemm_mix {
    int32_t i, o;
    bool is_swapped;
    ipt_operand p;           /* [i][o] of type act */
    ipt_operand gates, slot; /* [*][batch][slots] f32, [1] i32 */
    int32_t row, batch, slots;
} ipt_gemm_mix;

/* y[m, y0 + col] = sum over taps and k of a[walk(m, tap), k] b[col, tap, k] + bias[col] +
 * t[image(m), col]
 *                + r[m, col] */
typedef struct ipt_gemm {
    ipt_operand a;    /* [pixels][ipt_pad4(k)] of type act */
    ipt_operand b;    /* panels of type b_type, depth taps * ipt_pad4(k) */
    ipt_operand y;    /* [rows][ldy] of type act */
    ipt_operand bias; /* [cols] f32 */
    ipt_operand t, r; /* [n][cols], [rows][ldy] of type act */
    /* A second, short product added to the first: h [rows][groups][side] of type act, u panels of
     * depth side (a multiple of 4) and type u_type, side_cols columns, groups = cols / side_cols:
     * columns of group j are h[.., j, ..] u.  More than one group: side_cols a multiple of 4.  side
     * 0: none. */
    ipt_operand h, u;
    int32_t side, side_cols;
    ipt_dtype u_type;
    ipt_gemm_mix mix; /* only where ipt_gemm_can_mix says so: no bias, t, h then */
    ipt_dtype act, b_type;
    ipt_walk walk;
    int64_t rows;
    int32_t each; /* rows with a matrix of panels of their own, one after the other in b (a multiple
                     of the tile's rows; winograd.c); 0: one for all */
    int32_t cols, k;
    int32_t ldy, y0; /* elements: row pitch of y; offset of its first result (0 <= y0) */
} ipt_gemm;
/* Appends the dispatches.  IPT_ERR_TOO_LARGE: a row granule does not fit a binding, or
 * indices pass 32 bits. */
IPT_CHECKED ipt_status ipt_gemm_launch(ipt_launch *l, const ipt_gemm *g);

/* The texel view of activations: four at once. */
static inline ipt_bind_kind ipt_gemm_view(ipt_dtype act)
{
    return act == IPT_F16 ? IPT_BIND_TEXEL_RGBA16F : IPT_BIND_TEXEL_RGBA32F;
}
/* Binds bytes [off, off + bytes) of an operand that the kernel reads only where there is one; of
 * none the start of b, so that every binding is valid. */
void ipt_gemm_bind_optional(ipt_dispatch *d, const ipt_gemm *g, ipt_operand o, uint64_t off,
                            uint64_t bytes);

/* Whether one kernel of this device makes a plain product and mixes its rows. */
bool ipt_gemm_can_mix(const ipt_launch *l, const ipt_gemm *g);

/* Copies an operand into scratch in a layout the product takes; element (n, tap, k):
 *   IPT_PACK_STRIDED  src[base + n sn + tap st + k sk]
 *   IPT_PACK_GATHER   x[pixel `k` of the walk under `tap0`][n], channels sn (one tap)
 *   IPT_PACK_PANEL    packed panels src, depth sk = taps * ipt_pad4(cols of it): column k, k' =
 * (T-1-tap, n) */
typedef enum ipt_pack_mode { IPT_PACK_STRIDED, IPT_PACK_GATHER, IPT_PACK_PANEL } ipt_pack_mode;
typedef struct ipt_pack {
    ipt_operand src;
    ipt_dtype type; /* of src */
    uint64_t src_bytes;
    ipt_pack_mode mode;
    bool rows; /* result: rows [n][taps * pad4(k)] of type src, else f32 panels */
    int32_t n, taps, k;
    int64_t base, sn, st, sk;
    int32_t tap0;
    ipt_walk walk; /* GATHER */
    int reuse;     /* scratch number + 1 to write into; 0 = a new one */
} ipt_pack;
IPT_CHECKED ipt_status ipt_gemm_pack(ipt_launch *l, const ipt_pack *p, ipt_operand *out);
/* Input i of the node ([*,k], channels last) as a left operand: itself, or a copy with whole quads.
 */
IPT_CHECKED ipt_status ipt_gemm_left(ipt_launch *l, const ipt_node *n, int i, ipt_operand *out);

/* Input `number` as panels: itself when it was packed as it was written, or a packed copy of a
 * row-major [columns, depth], or with by_depth [depth, columns], matrix. */
IPT_CHECKED ipt_status ipt_gemm_right(ipt_launch *l, const ipt_node *n, int number, bool by_depth,
                                      ipt_operand *b, ipt_dtype *type);

/* For gradients.  v in the shape and element type of input i of the forward node. */
ipt_val ipt_grad_as_input(ipt_graph *g, const ipt_node *n, int i, ipt_val v);
/* dy summed over its dims first .. rank - 2, as input i. */
ipt_val ipt_grad_columns(ipt_graph *g, const ipt_node *n, int i, ipt_val dy, int first);
#endif
