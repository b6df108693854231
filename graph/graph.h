/* graph/graph.h - static tensor graph, reverse mode, memory plan, replayable execution.
 *
 * Life: build once per shape key -> ipt_graph_backward (optional) -> ipt_plan_create ->
 *       { write, run, read } many times.  Nothing allocates or records after plan creation.
 * Layout: channels last.  Images [N,H,W,C], tokens [N,T,C], weights [O,KH,KW,I] or [O,I].
 * Errors: builder calls never fail; the first mistake poisons the graph and is returned, with
 *         the name of the offending node, by ipt_graph_status() and ipt_plan_create().
 * Threads: a graph or plan belongs to one thread at a time. */
#ifndef IPT_GRAPH_GRAPH_H
#define IPT_GRAPH_GRAPH_H
#include "core/core.h"

struct ipt_gpu;
struct ipt_buffer;

typedef enum ipt_dtype {
    IPT_F32,
    IPT_F16,
    IPT_I32,
    IPT_Q8, /* of packed weights alone */
} ipt_dtype;
typedef struct ipt_shape {
    int32_t dim[4]; /* outermost first; unused = 1 */
    uint8_t rank;
    ipt_dtype dtype;
} ipt_shape;
typedef struct ipt_val {
    uint32_t id; /* a value of one graph; 0 = none */
} ipt_val;
typedef struct ipt_graph ipt_graph; /* owns nodes and names (one arena) */
typedef struct ipt_plan ipt_plan;   /* owns device arena, descriptors, command buffers */

static inline ipt_shape ipt_shape1(ipt_dtype t, int32_t a)
{
    return (ipt_shape){{a, 1, 1, 1}, 1, t};
}
static inline ipt_shape ipt_shape2(ipt_dtype t, int32_t a, int32_t b)
{
    return (ipt_shape){{a, b, 1, 1}, 2, t};
}
static inline ipt_shape ipt_shape3(ipt_dtype t, int32_t a, int32_t b, int32_t c)
{
    return (ipt_shape){{a, b, c, 1}, 3, t};
}
static inline ipt_shape ipt_shape4(ipt_dtype t, int32_t a, int32_t b, int32_t c, int32_t d)
{
    return (ipt_shape){{a, b, c, d}, 4, t};
}
size_t ipt_shape_count(const ipt_shape *s);                   /* elements */
size_t ipt_dtype_bytes(ipt_dtype t);                          /* 4, 2, 4; 1 without scales */
size_t ipt_shape_bytes(const ipt_shape *s);                   /* elements x element size */
bool ipt_shape_same(const ipt_shape *a, const ipt_shape *b);  /* rank and dims, not dtype */
void ipt_shape_text(const ipt_shape *s, char *buf, size_t n); /* "[2,64,64,320]" */

/* --- graph --------------------------------------------------------------------------------- */
/* ctx outlives the graph.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_graph_create(ipt_ctx *ctx, ipt_graph **out);
void ipt_graph_destroy(ipt_graph **g);
ipt_status ipt_graph_status(const ipt_graph *g); /* IPT_OK or the poison; message in the ctx */
/* Prefix of weight names made after this call: "" (default), "unet.", ...; copied. */
void ipt_graph_prefix(ipt_graph *g, const char *prefix);

typedef enum ipt_role {
    IPT_INPUT,  /* host writes it before a run: latent, t, text, gates */
    IPT_WEIGHT, /* bound by canonical name to a weight store; shared, never copied */
    IPT_PARAM,  /* kept between runs: adapter factors, trainable tensors; the host writes it, and
                   operators that change values in place */
} ipt_role;
/* A leaf; the same name gives the same leaf (shapes must agree). */
ipt_val ipt_leaf(ipt_graph *g, ipt_role role, const char *name, ipt_shape s);
ipt_val ipt_find(const ipt_graph *g, const char *name); /* leaf or output by name; id 0 if none */
ipt_shape ipt_shape_of(const ipt_graph *g, ipt_val v);
void ipt_output(ipt_graph *g, const char *name, ipt_val v); /* pinned: host may read it */
void ipt_cut(ipt_graph *g); /* end a segment: the host may read, think and write here */
/* Nodes between two marks (begin true, then false) run in a segment of their own before all others,
 * which is number 0 then, the others from 1 on; what they give stands until it runs again.  They
 * depend on leaves and on each other only. */
void ipt_early(ipt_graph *g, bool begin);
/* Forward nodes between two marks are recomputed for the backward part instead of kept; call in
 * pairs around a block (begin true, then false). */
void ipt_recompute(ipt_graph *g, bool begin);
/* Every IPT_WEIGHT leaf, in order of first use. */
size_t ipt_graph_n_weights(const ipt_graph *g);
const char *ipt_graph_weight(const ipt_graph *g, size_t i, ipt_shape *s);

/* --- operators (graph/op_*.c; one row each in ops.def).  `site` is the canonical name: weights are
 *     "<site>.weight" and "<site>.bias".  Result dtype = dtype of x unless said. ----------------
 */
typedef enum ipt_unary_kind {
    IPT_SILU,       /* x / (1 + exp(-x))            */
    IPT_GELU,       /* x Phi(x), by erf             */
    IPT_QUICK_GELU, /* x / (1 + exp(-1.702 x))      */
    IPT_RELU,
    IPT_TANH,
    IPT_AFFINE, /* a x + b                      */
} ipt_unary_kind;
typedef struct ipt_conv {
    int kernel, stride;
    int pad_lo, pad_hi; /* top = left, bottom = right */
    int up_h, up_w;     /* > 0: the input is first enlarged to this size by nearest neighbour */
    bool no_bias;
} ipt_conv;
/* y = x W^T [+ b] [+ residual]; x [*,I], W [out,I], residual (0: none) and y [*,out]. */
ipt_val ipt_linear(ipt_graph *g, ipt_val x, const char *site, int out, bool bias);
ipt_val ipt_linear_add(ipt_graph *g, ipt_val x, const char *site, int out, bool bias,
                       ipt_val residual);
/* x [N,H,W,I], W [out,K,K,I]; t (0: none) [N,out] is added to every pixel; residual [N,OH,OW,out].
 */
ipt_val ipt_conv2d(ipt_graph *g, ipt_val x, const char *site, int out, ipt_conv c);
ipt_val ipt_conv2d_add(ipt_graph *g, ipt_val x, const char *site, int out, ipt_conv c, ipt_val t,
                       ipt_val residual);
/* Operand forms for adapters: c = a b (+ residual); a [*,K], b [K,N] (b is never a packed weight);
 * conv with a kernel leaf w [KH*KW*I, O] in the row order ky, kx, i. */
ipt_val ipt_matmul(ipt_graph *g, ipt_val a, ipt_val b, ipt_val residual);
ipt_val ipt_conv2d_leaf(ipt_graph *g, ipt_val x, ipt_val w, ipt_conv c);
/* Normalisation over groups of channels and all pixels ([N,H,W,C] or [N,T,C]); act: silu after. */
ipt_val ipt_group_norm(ipt_graph *g, ipt_val x, const char *site, int groups, float eps, bool silu);
ipt_val ipt_layer_norm(ipt_graph *g, ipt_val x, const char *site, float eps);
ipt_val ipt_unary(ipt_graph *g, ipt_unary_kind k, ipt_val x, float a, float b);
ipt_val ipt_silu(ipt_graph *g, ipt_val x);
ipt_val ipt_geglu(ipt_graph *g,
                  ipt_val x); /* [*,2c] -> [*,c]: first half times gelu(second half) */
/* y = sa a + sb b; b is aligned to the last axes of a; its dims equal those of a or are 1
 * (broadcast). */
ipt_val ipt_add_scaled(ipt_graph *g, ipt_val a, float sa, ipt_val b, float sb);
ipt_val ipt_add(ipt_graph *g, ipt_val a, ipt_val b);
ipt_val ipt_mul(ipt_graph *g, ipt_val a, ipt_val b); /* broadcasting as ipt_add_scaled */
ipt_val ipt_add_weight(ipt_graph *g, ipt_val x, const char *site,
                       ipt_shape s);                       /* x + "<site>.weight" */
ipt_val ipt_sum_to(ipt_graph *g, ipt_val x, ipt_shape to); /* sums the dims that `to` has as 1 */
/* q [N,T,C], k v [N,S,C], C = heads x d; scale 0 = 1/sqrt(d).  probs NULL: tiled form; else *probs
 * is the kept softmax [N,heads,T,S]. */
typedef struct ipt_attn {
    int heads;
    bool causal; /* key j <= query i; T = S */
    float scale;
} ipt_attn;
ipt_val ipt_attention(ipt_graph *g, ipt_val q, ipt_val k, ipt_val v, ipt_attn a, ipt_val *probs);
ipt_val ipt_concat(ipt_graph *g, ipt_val a, ipt_val b);         /* along the last axis */
ipt_val ipt_slice(ipt_graph *g, ipt_val x, int start, int len); /* of the last axis */
ipt_val ipt_upsample(ipt_graph *g, ipt_val x, int h, int w);    /* nearest, [N,H,W,C] */
ipt_val ipt_reshape(ipt_graph *g, ipt_val x, ipt_shape s);      /* same count, a view */
ipt_val ipt_cast(ipt_graph *g, ipt_val x, ipt_dtype t);
ipt_val ipt_embedding(ipt_graph *g, ipt_val ids, const char *site, int vocab,
                      int width);                            /* [N,T] i32 -> [N,T,width] f32 */
ipt_val ipt_take_rows(ipt_graph *g, ipt_val x, ipt_val idx); /* [N,T,C], [N] i32 -> [N,C] */
/* y[n,t,r] = h[n,t,r] gates[row,n,slot[r]]; slot < 0: 0.  gates [n_row,N,n_slot] f32, slot [R] i32.
 */
ipt_val ipt_gate_mul(ipt_graph *g, ipt_val h, ipt_val gates, ipt_val slot, int row);
/* x [R,I,C], p [I,O]: g p^T x of every row, [R,O,C]; g = gates[row,n,slot[0]] of the R / N rows of
 * batch element n; without gates and slot (id 0) 1. */
ipt_val ipt_mix(ipt_graph *g, ipt_val x, ipt_val p, ipt_val gates, ipt_val slot, int row);
/* The factors of p kron q, q [K,C]; gates and slot as ipt_mix takes them. */
typedef struct ipt_kron_factors {
    ipt_val p, q, gates, slot;
    int row;
    bool is_swapped;
} ipt_kron_factors;
/* x [R,I,K]: add + g p^T (x q) of every row, [R,O,C], or its transposes [R,C,O] when swapped; add
 * id 0: without it. */
ipt_val ipt_kron(ipt_graph *g, ipt_val x, const ipt_kron_factors *f, ipt_val add);
ipt_val ipt_swap(ipt_graph *g, ipt_val x); /* [A,B,C,D] -> [A,C,B,D] */
/* y[n,t,c] = share[t] b[n,t,c] + a[n,t,c] (a 0: without it); share [T] f32. */
ipt_val ipt_share(ipt_graph *g, ipt_val b, ipt_val share, ipt_val a);
ipt_val ipt_mse(ipt_graph *g, ipt_val a, ipt_val b); /* mean squared difference -> [1] f32 */
ipt_val ipt_dot(ipt_graph *g, ipt_val a, ipt_val b); /* sum of products -> [1] f32 */
/* --- in place: they change leaves of role IPT_PARAM.  What was built before reads the old values,
 *     what is built later the new ones. -------------------------------------------------------- */
void ipt_put(ipt_graph *g, ipt_val leaf, ipt_val v);        /* leaf = v, of either element type;
                                                            without v (id 0) zeros, leaf f32 */
void ipt_accumulate(ipt_graph *g, ipt_val leaf, ipt_val v); /* leaf += v; leaf f32 */
/* One step of AdamW on w with gradient d, moments m and v, all [n] f32; hyper [8] f32: rate, b1,
 * b2, eps, decay, 1 / (1 - b1^t), 1 / sqrt(1 - b2^t), factor of d. m = b1 m + (1-b1) d;  v = b2 v +
 * (1-b2) d^2;  w = w (1 - rate decay) - rate m^ / (sqrt(v^) + eps) Source: Loshchilov and Hutter
 * 2019, in the order of torch.optim.AdamW. */
void ipt_adamw(ipt_graph *g, ipt_val w, ipt_val d, ipt_val m, ipt_val v, ipt_val hyper);

/* --- adapters beside untouched weights (graph/adapter.c) --------------------------------------
 * Before building: a linear, conv2d or norm whose name matches a site emits side paths, gated by
 * INPUT "gates" [n_row,N,n_slot], g = gates[row][n][slot]:
 *   low rank  y += B (g (A x))     PARAM "<site>.lora_a" [K,R] (K = I, or KH*KW*I in the order ky,
 *             kx, i), "<site>.lora_b" [R,O], "<site>.lora_slot" [R] i32.  R = n_rank is a multiple
 *             of 4; ranks of several slots are stacked; a column whose slot is -1 is padding.
 *   Kronecker y += g (P kron Q) x  "<site>.kron<k>_p" [I1,O1], "_q" [KH*KW*I2,O2], "_slot" i32
 *   dense     y += g D x           "<site>.dense<k>" [K,O], "<site>.dense<k>_slot" i32
 *   bias      y += g d             "<site>.bias_delta" [n_slot,O] f32
 *   norm      y += g d norm(x)     "<site>.norm_delta" [n_slot,C] f32, "<site>.norm_one" and
 *             "_zero" [C] f32: ones and zeros
 * "kron<k>_slot" is [1]; "dense<k>_slot" has 4 times the slot's number when I is a multiple of 4,
 * else once. */
typedef struct ipt_adapter_kron {
    int32_t o1, o2, i1, i2; /* P [O1,I1], Q [O2,I2]; x is viewed [..,I1,I2] */
    bool is_shuffled;       /* output (o1,o2) is number o2*O1 + o1, else o1*O2 + o2 */
} ipt_adapter_kron;
typedef struct ipt_adapter_site {
    const char *site; /* canonical module name, without ".weight", with the prefix */
    uint16_t n_rank;  /* stacked and padded rank; 0: no low-rank path */
    uint16_t row;     /* row of "gates" */
    uint16_t n_dense, n_kron;
    bool has_bias, has_norm;
    const ipt_adapter_kron *kron; /* [n_kron] */
} ipt_adapter_site;
/* Copies the list.  n_batch: batch elements of "gates". */
void ipt_graph_adapters(ipt_graph *g, const ipt_adapter_site *s, size_t n, int n_row, int n_batch,
                        int n_slot);
/* From here on: adapters' gates are the input of that name (NULL: "gates"); placed: and their parts
 * times INPUT "place<T>" [1,N*T,n_slot] f32 at each of the T pixels or tokens of a value [N,T,*].
 */
void ipt_graph_gates(ipt_graph *g, const char *name, bool placed);

/* --- reverse mode: appends gradient nodes; branches that reach no `wrt` are never built ------- */
typedef struct ipt_seed {
    ipt_val of, grad; /* grad = dL/d(of); id 0 with `of` of one element: 1 */
} ipt_seed;
/* d_wrt[i] = dL/d(wrt[i]) (id 0 when L does not depend on it).  wrt: leaves or values. */
IPT_CHECKED ipt_status ipt_graph_backward(ipt_graph *g, const ipt_seed *seed, size_t n_seed,
                                          const ipt_val *wrt, size_t n_wrt, ipt_val *d_wrt);

/* --- weights: who implements this owns the device copies (model_io) --------------------------- */
typedef enum ipt_use {
    IPT_USE_PANEL, /* right operand of linear or conv2d: packed panels (graph/pack.c) */
    IPT_USE_BACK,  /* the same for the gradient of x: panels of ipt_panel_back */
    IPT_USE_ROWS,  /* norm, bias: row-major f32 */
    IPT_USE_TABLE, /* embedding table: row-major f32 or f16 */
} ipt_use;
typedef struct ipt_weight_view {
    struct ipt_buffer *buf;
    uint64_t off, bytes;
    ipt_dtype dtype; /* of the stored elements */
    bool is_q8;      /* panels of values that q8 holds, whatever dtype is */
} ipt_weight_view;
typedef struct ipt_weights ipt_weights;
struct ipt_weights {
    /* Device copy, made at the first call for a name and use.  shape: logical, [O,KH,KW,I], [O,I],
     * ... */
    ipt_status (*find)(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                       ipt_weight_view *out);
    /* The values for host reference runs, logical order. */
    ipt_status (*read)(ipt_weights *w, const char *name, const ipt_shape *shape, double *out);
    /* What find would give, without making a copy: buf is NULL where there is none.  It may be NULL
     * for devices without a memory limit; so may put. */
    ipt_status (*size)(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                       ipt_weight_view *out);
    /* The values of such a copy into a place of the caller's that nothing on the device reads or
     * writes meanwhile; what is submitted afterwards sees them.  is_known: a put of that name
     * succeeded before, and its values are not looked through again. */
    ipt_status (*put)(ipt_weights *w, const char *name, const ipt_shape *shape, ipt_use use,
                      const ipt_weight_view *to, bool is_known);
};

/* Panels: columns (output features) in groups of 32; f32: [ceil(O/32)][Kp][32] floats; f16:
 * [ceil(O/32)][Kp/2][32] pairs, even k in the low half.  Kp = KH*KW*Ip, Ip = I rounded up to 4
 * (zeros); 32 k of zeros after the last panel, so that a prefetch stays inside.  q8 (q8_0 of GGUF):
 * blocks of 32 k, [ceil(O/32)][Kp/32] of them: 32 scales in f16, d = max |w| / 127 of a column's 32
 * values, then [8][32] words of four k, the first in the lowest byte: round(w / d), signed. */
uint64_t ipt_panel_bytes(const ipt_shape *w, ipt_dtype dtype);
/* Of `depth` rows of one panel (q8: a multiple of 32). */
uint64_t ipt_panel_rows(uint64_t depth, ipt_dtype dtype);
/* How panels of a weight are stored in a precision: q8 needs whole blocks under every tap, other
 * weights stay f16. */
ipt_dtype ipt_panel_dtype(const ipt_shape *w, ipt_dtype precision);
/* What q8 panels hold of values whose blocks lie one after the other; n: a multiple of 32. */
void ipt_q8_round(float *v, size_t n);
/* The weight by which dy gives dx: [I,O] of [O,I]; [I,KH,KW,O] of [O,KH,KW,I], its taps from the
 * last to the first. */
ipt_shape ipt_panel_back(const ipt_shape *w);
/* Packs one weight.  src: element (o,i,ky,kx) is at src[o*so + i*si + ky*sy + kx*sx] (elements, as
 * returned by `get`).  dst: ipt_panel_bytes, written wholly. */
typedef enum { IPT_PANEL_GET, IPT_PANEL_F32, IPT_PANEL_F16, IPT_PANEL_BF16 } ipt_panel_type;
typedef struct ipt_panel_src {
    const void *data;
    float (*get)(const void *data, size_t i); /* used when type is IPT_PANEL_GET */
    size_t so, si, sy, sx;
    ipt_panel_type type; /* plain arrays of a known type (aligned) are read directly */
    bool is_reversed;    /* tap (ky,kx) is (KH-1-ky, KW-1-kx) of src */
} ipt_panel_src;
void ipt_panel_pack(const ipt_shape *w, const ipt_panel_src *src, ipt_dtype dtype, void *dst);
/* The values again, as a right operand's leaf has them: [KH*KW*I, O], the row order ky, kx, i. */
void ipt_panel_unpack(const ipt_shape *w, ipt_dtype dtype, const void *packed, float *dst);

/* --- state: values on the device that outlive runs and that several plans share (ADR 14) -------
 * A group is one buffer: tensors one behind the other in the order given, each from a multiple of
 * 128 elements on, zeros between.  Groups of the same tensors have the same layout.  A graph sees a
 * tensor as the leaf "<prefix><name>", the whole group as the leaf "<group>" [n]. */
typedef struct ipt_state ipt_state;
typedef struct ipt_state_item {
    const char *name;
    ipt_shape shape; /* the dtype is the group's */
} ipt_state_item;
typedef struct ipt_state_group {
    const char *name, *prefix;
    ipt_dtype dtype;
    const ipt_state_item *item;
    size_t n;
} ipt_state_group;
typedef struct ipt_state_view {
    ipt_shape shape;
    struct ipt_buffer *buf; /* NULL without a device */
    uint64_t off;           /* bytes */
    double *host;           /* without a device */
} ipt_state_view;
/* gpu NULL: for host plans, in double.  ctx and gpu outlive the state.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_state_create(ipt_ctx *ctx, struct ipt_gpu *gpu, ipt_state **out);
void ipt_state_destroy(ipt_state **s); /* after the plans that use it */
/* All zeros; names are copied.  Errors: IPT_ERR_ARG (a name twice, nothing in it), IPT_ERR_NOMEM,
 * IPT_ERR_DEVICE_MEM, IPT_ERR_TOO_LARGE; the state is as before then. */
IPT_CHECKED ipt_status ipt_state_add(ipt_state *s, const ipt_state_group *g);
bool ipt_state_locate(const ipt_state *s, const char *name, ipt_state_view *out);
/* A tensor or a whole group; bytes: 4 for each element, f32 on the host whatever is stored.
 * Errors: IPT_ERR_MISSING, IPT_ERR_ARG (size), those of ipt_buffer_write. */
IPT_CHECKED ipt_status ipt_state_write(ipt_state *s, const char *name, const float *src,
                                       size_t bytes);
IPT_CHECKED ipt_status ipt_state_read(const ipt_state *s, const char *name, float *dst,
                                      size_t bytes);
uint64_t ipt_state_bytes(const ipt_state *s); /* of the device */

/* --- plan: liveness -> offsets -> kernels -> descriptors -> barriers -> commands -------------- */
typedef struct ipt_plan_opts {
    struct ipt_gpu *gpu;  /* NULL: run every .ref on the host, in double */
    ipt_weights *weights; /* may be NULL when the graph has no weights */
    ipt_state *state;     /* NULL: none; parameters and weights whose names it has are its tensors,
                             row-major.  It outlives the plan. */
    uint64_t arena_limit; /* bytes; 0 = what the device allows */
    bool check;           /* also run each node's reference on the device's inputs and name the
                             first node that differs (also env IPT_PLAN_CHECK=1) */
    bool profile;         /* time stamps around every node: ipt_plan_profile */
    bool dry;    /* only whether it can be made: described and placed, its memory taken (where a
                    limit says that there is enough: not even that), but nothing recorded; it can
                    only be destroyed */
    bool stream; /* on a device with a memory limit: as many weights as fit when it first runs (or
                    is settled) stay on the device, the others come in through a ring buffer in
                    every run, ahead of what reads them.  The same bits. */
    bool guard;  /* tests: guard bands around every value and NaN poison before each run */
} ipt_plan_opts;
/* Keeps gpu and weights until destroy; the graph may be destroyed at once.
 * Errors: the poison; IPT_ERR_DEVICE_MEM with need / have; IPT_ERR_TOO_LARGE when a tensor passes a
 * limit of the device; those of weights->find; IPT_ERR_UNSUPPORTED. */
IPT_CHECKED ipt_status ipt_plan_create(ipt_graph *g, const ipt_plan_opts *o, ipt_plan **out);
/* Of a plan with `stream`: settles which weights stay on the device, and records.  Its first run
 * does it otherwise; once everything else that needs memory has it is the time.  Other plans:
 * nothing. Errors: those of weights->find but for missing memory; IPT_ERR_CANCELLED: it may be
 * tried again. */
IPT_CHECKED ipt_status ipt_plan_settle(ipt_plan *p);
/* Device memory of a plan, bytes.  Before it is settled nothing streams yet. */
typedef struct ipt_plan_memory {
    uint64_t weights;  /* that it reads, each once */
    uint64_t streamed; /* of them, those that come in anew in every run */
    uint64_t ring;     /* through which they come */
    uint64_t working;  /* activations, inputs, adapters' factors */
    uint32_t n_block;  /* parts in which they come, one ahead of the other */
} ipt_plan_memory;
ipt_plan_memory ipt_plan_get_memory(const ipt_plan *p); /* of a host plan: zeros */
bool ipt_plan_is_streamed(const ipt_plan *p);           /* made with `stream` */
/* The store that the plan was made with; NULL: none. */
ipt_weights *ipt_plan_weights(const ipt_plan *p);
/* Whether the plan has an input or parameter of that name: a graph leaves out what its key does not
 * ask for. */
bool ipt_plan_has(const ipt_plan *p, const char *in);
/* n bytes = the leaf's whole size; f32 (or i32) host data, converted when the leaf is f16. */
IPT_CHECKED ipt_status ipt_plan_write(ipt_plan *p, const char *in, const void *src, size_t n);
/* Submits segment 0.. and waits; IPT_ERR_CANCELLED between submissions when the ctx is cancelled.
 */
IPT_CHECKED ipt_status ipt_plan_run(ipt_plan *p, uint32_t segment);
/* Where an input or output lies on the device, in the element type of the graph: what is copied
 * there before a run, or from there after one, need not pass the host.  Errors: IPT_ERR_MISSING,
 * IPT_ERR_ARG (a host plan, or nothing reads the input). */
IPT_CHECKED ipt_status ipt_plan_locate(const ipt_plan *p, const char *name, struct ipt_buffer **buf,
                                       uint64_t *off, uint64_t *bytes);
/* An output, input or parameter; the host gets f32 (or i32) whatever the device stores. */
IPT_CHECKED ipt_status ipt_plan_read(ipt_plan *p, const char *out, void *dst, size_t n);
uint64_t ipt_plan_arena_bytes(const ipt_plan *p);
size_t ipt_plan_n_dispatch(const ipt_plan *p);
double ipt_plan_macs(const ipt_plan *p);       /* multiply-adds of a whole run; 0 on the host */
double ipt_plan_early_macs(const ipt_plan *p); /* those of ipt_early's segment among them */
/* Per-node device times of the last run (profile) and the node's work. */
typedef struct ipt_plan_row {
    const char *op, *name;
    double ms;
    double macs, matrix_macs; /* multiply-adds; of them, those of matrix units */
    double bytes;             /* that must be read and written once: inputs, weights, outputs */
} ipt_plan_row;
IPT_CHECKED ipt_status ipt_plan_profile(ipt_plan *p, const ipt_plan_row **rows, size_t *n);
void ipt_plan_destroy(ipt_plan **p); /* p and *p may be NULL */
#endif
