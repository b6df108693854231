/* graph/op.h - what an operator is: signature, reference, gradient, kernel.  For graph/, its
 * tests and bench/ only; models see graph.h. */
#ifndef IPT_GRAPH_OP_H
#define IPT_GRAPH_OP_H
#include "graph/graph.h"
#include "vk/vk.h"

enum { IPT_MAX_IN = 8, IPT_MAX_OUT = 3 };

typedef enum ipt_op {
#define IPT_OP(id, def) IPT_OP_##id,
#include "graph/ops.def"
#undef IPT_OP
    IPT_OP_COUNT
} ipt_op;

/* Attributes of all operators; each uses its own member, the rest is zero. */
typedef union ipt_attr {
    ipt_conv conv;
    struct {
        int32_t groups;
        float eps;
        int32_t silu;
    } norm;
    struct {
        int32_t kind; /* ipt_unary_kind */
        float a, b;
    } unary;
    struct {
        float sa, sb;
    } add;
    struct {
        int32_t heads, causal;
        float scale; /* never 0 here */
    } attn;
    struct {
        int32_t start, len;
    } slice;
    struct {
        int32_t ta; /* matmul: a is given transposed, [K,M] */
    } matmul;
    struct {
        int32_t row, is_swapped; /* kron: y [R,C,O] */
    } gate;
    ipt_shape to; /* sum_to, reshape, cast, upsample, embedding: the result */
} ipt_attr;

typedef struct ipt_node {
    ipt_op op;
    const char *name; /* for messages: site or op name */
    uint8_t n_in, n_out;
    uint32_t in[IPT_MAX_IN]; /* value ids; 0 = optional input not given */
    uint32_t out[IPT_MAX_OUT];
    ipt_shape in_shape[IPT_MAX_IN]; /* rank 0 = not given */
    ipt_shape out_shape[IPT_MAX_OUT];
    bool in_is_back[IPT_MAX_IN];  /* those are of ipt_panel_back */
    bool in_is_panel[IPT_MAX_IN]; /* that input is an IPT_WEIGHT leaf used as packed panels: the
                                     device sees ipt_panel layout; its in_shape.dtype is that of the
                                     store */
    ipt_attr attr;
} ipt_node;

/* --- what a kernel function writes ------------------------------------------------------------ */
typedef enum { IPT_SRC_IN, IPT_SRC_OUT, IPT_SRC_SCRATCH } ipt_src;
typedef struct ipt_bind {
    ipt_bind_kind kind;
    ipt_src src;
    uint8_t index; /* in[index], out[index] or scratch number */
    bool write;    /* the dispatch writes it (it may read it too) */
    uint64_t off,
        bytes; /* part of it; bytes 0 = from off to the end.  off: multiple of traits.align */
} ipt_bind;
typedef struct ipt_dispatch {
    ipt_kernel_desc k; /* shader, spec, push size; k.kind and k.n_bind are filled from bind[] */
    uint8_t n_bind;
    ipt_bind bind[IPT_MAX_BIND];
    uint8_t push[IPT_MAX_PUSH];
    uint32_t groups[3];
    double macs;    /* multiply-adds, for profiles and submit sizes */
    bool is_matrix; /* they are done by matrix units */
    bool no_wait;   /* independent of the dispatch before it in the same node: no barrier between */
} ipt_dispatch;
enum { IPT_MAX_SCRATCH = 6 };
/* The list a kernel function fills; scratch lives for the node only. */
typedef struct ipt_launch {
    const ipt_traits *dev;
    ipt_arena *arena;
    ipt_dispatch *d;
    size_t n_d, cap_d;
    uint64_t scratch[IPT_MAX_SCRATCH]; /* bytes */
    uint8_t n_scratch;
    ipt_status status; /* IPT_ERR_NOMEM, _UNSUPPORTED or _TOO_LARGE after a failed helper */
} ipt_launch;
/* Appends a dispatch of `shader` with a copy of the push block; NULL when out of memory (then
 * l->status is set).  The caller adds spec, binds, groups. */
ipt_dispatch *ipt_launch_add(ipt_launch *l, const char *shader, const void *push,
                             size_t push_bytes);
void ipt_launch_bind(ipt_dispatch *d, ipt_bind_kind kind, ipt_src src, int index, bool write);
/* Same with a byte range of the tensor. */
void ipt_launch_bind_range(ipt_dispatch *d, ipt_bind_kind kind, ipt_src src, int index, bool write,
                           uint64_t off, uint64_t bytes);
/* The same with any off: the binding starts at the last aligned byte at or before it; the shader is
 * told by how much. */
void ipt_launch_bind_part(const ipt_launch *l, ipt_dispatch *d, const ipt_bind *part);
void ipt_launch_spec(ipt_dispatch *d, uint32_t value); /* next specialisation constant */
int ipt_launch_scratch(ipt_launch *l, uint64_t bytes); /* returns its number */
/* --- bands: rows of equal bytes, as many dispatches as the device's binding range asks for --- */
typedef struct ipt_band_operand {
    ipt_src src;
    uint8_t index;
    bool write;
    uint64_t row; /* bytes of one row; rows follow one another */
} ipt_band_operand;
enum { IPT_MAX_BAND_OPERAND = 4 };
typedef struct ipt_bands {
    ipt_band_operand o[IPT_MAX_BAND_OPERAND];
    uint64_t rows, size, granule; /* of the tensor; of a band at most; a band starts at multiples */
    uint64_t first, n;            /* the band at hand: rows first .. first + n - 1 */
} ipt_bands;
/* Bands of `rows` rows of all n operands at once; one when they fit.  A band starts where every
 * operand is aligned.  Even the smallest too large: no band at all, and l->status says so. */
ipt_bands ipt_launch_bands(ipt_launch *l, uint64_t rows, const ipt_band_operand o[], int n);
bool ipt_bands_next(ipt_bands *b); /* false after the last */
/* Makes the band at hand half as long; false when it has one granule only. */
bool ipt_bands_halve(ipt_bands *b);
/* Binds what the band at hand has of operand i; bands do not wait for each other unless the caller
 * sets d->no_wait back. */
void ipt_bands_bind(ipt_dispatch *d, const ipt_bands *b, int i);
/* n work items in workgroups of `wg`: groups x and y so that neither passes the device limit; the
 * shader takes (gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x) as its group number and
 * checks its bound. */
void ipt_launch_linear(const ipt_launch *l, ipt_dispatch *d, uint64_t n, uint32_t wg);

/* --- the one description of an operator ------------------------------------------------------- */
typedef struct ipt_op_def {
    const char *name;
    /* "x:*k w:ok b?:o r?:*o -> y:*o": letters are dims (equal letters equal sizes), '*' any leading
     * dims (all '*' agree), a digit a fixed size, '?' optional, no dims: infer looks.  Output dims
     * must be bound on the left unless infer is given. */
    const char *sig;
    uint8_t alias; /* bit i: out[0] may reuse the storage of in[i] (same element count and dtype) */
    uint8_t panel; /* bit i: in[i] is read as packed panels when it is a WEIGHT leaf */
    uint8_t back;  /* bit i, with panel's: better as panels of ipt_panel_back (IPT_USE_BACK) */
    uint8_t table; /* bit i: in[i] is an embedding table (IPT_USE_TABLE) */
    uint8_t picks; /* bit i: of in[i] no more is read than out[0] holds */
    uint8_t writes; /* bit i: in[i], a PARAM leaf, is changed in place.  Such an operator has no
                       outputs; ref's out[j] is the j-th of these, with its old values */
    bool view;      /* out[0] is in[0] under another shape: no kernel at all */
    /* Checks attributes and sets out shapes (dims, rank and dtype) the signature cannot; called
     * after the signature matched; out[] comes filled where the signature says all.  NULL: sig says
     * it all. Returns a message (static text) on error, else NULL. */
    const char *(*infer)(const ipt_node *n, ipt_shape out[]);
    /* Truth, in double, logical layouts; in[i] NULL when not given; i32 values arrive as doubles.
     */
    void (*ref)(const ipt_node *n, const double *const in[], double *const out[]);
    /* Appends nodes; dy[j] id 0: that output has no gradient.  want bit i: dx[i] is needed.  NULL:
     * not differentiable (gradient nodes themselves). */
    void (*grad)(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want, ipt_val dx[]);
    /* The weight that a PARAM in in[operand] is when the host packs it as it is written: [O,I] of a
     * [K,N] right operand, [O,KH,KW,I] of a kernel leaf; rank 0: as this operand it stays
     * row-major.  NULL: no operand is packed. */
    ipt_shape (*packs)(const ipt_node *n, int operand);
    /* Describes the dispatches; returns IPT_OK, IPT_ERR_UNSUPPORTED, or IPT_ERR_TOO_LARGE when
     * these sizes pass a limit of the device. */
    ipt_status (*kernel)(const ipt_node *n, ipt_launch *l);
} ipt_op_def;
extern const ipt_op_def *const ipt_op_table[IPT_OP_COUNT];

/* Name of a shader's variant by element type: "name.f32" or "name.f16". */
#define IPT_VARIANT(name, dtype) ((dtype) == IPT_F16 ? name ".f16" : name ".f32")

/* --- for builders in op_*.c ------------------------------------------------------------------- */
/* Appends a node: checks the signature, infers, makes outputs.  in: n_in values (id 0 = not given).
 * out may be NULL for nodes with one output; returns out[0].  On a poisoned graph returns id 0. */
ipt_val ipt_emit(ipt_graph *g, ipt_op op, const char *name, const ipt_val *in, int n_in,
                 const ipt_attr *attr, ipt_val *out);
/* For gradients: the node's own values. */
static inline ipt_val ipt_in(const ipt_node *n, int i) { return (ipt_val){n->in[i]}; }
static inline ipt_val ipt_out(const ipt_node *n, int i) { return (ipt_val){n->out[i]}; }
/* "<prefix><site>.<leaf>" as a WEIGHT leaf of the given shape; panel: it is the packed operand. */
ipt_val ipt_weight_leaf(ipt_graph *g, const char *site, const char *leaf, ipt_shape s);
/* For a linear operator, what it adds in the same product: when `site` is in the adapter list, gate
 * * down(x) [*,R] and in *up its factor [R,out], or of a Kronecker product [*,o1 i2] and q [i2,o2].
 * Else id 0. */
ipt_val ipt_adapter_hidden(ipt_graph *g, ipt_val x, int32_t out, const char *site, ipt_val *up);
/* Called with the result of a linear (conv NULL; what ipt_adapter_hidden
 * gave is in it) or a convolution: when
 * `site` is in the adapter list, appends what else acts there and returns the sum, else y. */
ipt_val ipt_adapter_path(ipt_graph *g, ipt_val x, ipt_val y, const char *site,
                         const ipt_conv *conv);
/* Whether adapters act on a norm of c channels; where one changes its weight, one_zero gets ones
 * and zeros to norm with (else it stays as it is). */
bool ipt_adapter_norm_operands(ipt_graph *g, const char *site, int32_t c, ipt_val one_zero[2]);
/* y + what adapters add; normed: the norm with ones and zeros. */
ipt_val ipt_adapter_norm_path(ipt_graph *g, const char *site, ipt_val y, ipt_val normed);
/* Sets the poison (first one wins). */
void ipt_poison(ipt_graph *g, ipt_status s, const char *fmt, ...) IPT_PRINTF(3, 4);
#endif
