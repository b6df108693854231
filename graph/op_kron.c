/* graph/op_kron.c - what Kronecker adapters need beside products: a small matrix from the left of
 * every row's matrix (mix), the same after a product with another (kron), and two axes changing
 * places (swap).  (P kron Q) x with x viewed [I1,I2] is P X Q^T: mix with P, then a product with Q,
 * or both at once with kron. */
#include "graph/gemm.h"

enum {
    WG = 64,
    MAX_OUTPUTS = 8 /* of one invocation, and a known matrix's inputs, shaders/mix.comp */
};

/* What mix and kron have in common: where the small matrix and its gates are, and in which form. */
typedef struct mixing {
    ipt_operand x, p, r, gates, slot; /* r, gates and slot may be none */
    ipt_dtype t;
    int32_t rows, i, c, o;     /* x [rows,i,c] -> y [rows,o,c] */
    bool is_swapped;           /* y [rows,c,o] */
    int32_t row, batch, slots; /* of the gates */
} mixing;

/* Inputs from number `first`: gates?, slot?. */
static bool has_gates(const ipt_node *n, int first)
{
    return n->n_in > first && n->in_shape[first].rank > 0;
}

static const char *check_gates(const ipt_node *n, int first)
{
    if (!has_gates(n, first))
        return NULL;
    const ipt_shape *g = &n->in_shape[first];
    if (g->dtype != IPT_F32 || n->n_in < first + 2 || n->in_shape[first + 1].dtype != IPT_I32)
        return "gates must be f32 and slots i32";
    if (n->attr.gate.row < 0 || n->attr.gate.row >= g->dim[0])
        return "no such gate row";
    return n->in_shape[0].dim[0] % g->dim[1] ? "rows are no multiple of the gates' batch" : NULL;
}

static double gate_of(const ipt_node *n, int first, const double *const in[], size_t r)
{
    const ipt_shape *g = &n->in_shape[first];
    if (!has_gates(n, first))
        return 1;
    int64_t slot = (int64_t)in[first + 1][0], b = (int64_t)r / (n->in_shape[0].dim[0] / g->dim[1]);
    return slot < 0 || slot >= g->dim[2]
               ? 0
               : in[first][((int64_t)n->attr.gate.row * g->dim[1] + b) * g->dim[2] + slot];
}

/* --- gradients -------------------------------------------------------------------------------- */
/* [R,a,c] as rows of a: [R*c,a]. */
static ipt_val rows_of(ipt_graph *g, ipt_val v)
{
    ipt_shape s = ipt_shape_of(g, v);
    v = ipt_swap(g, ipt_reshape(g, v, ipt_shape4(s.dtype, s.dim[0], s.dim[1], s.dim[2], 1)));
    return ipt_reshape(g, v, ipt_shape2(s.dtype, s.dim[0] * s.dim[2], s.dim[1]));
}

/* The values of y = mix(x, p, gates, slot). */
typedef struct mix_values {
    ipt_val x, p, gates, slot; /* gates and slot id 0: none */
    int row;
} mix_values;

/* [R,a,c] as [N,*,1], the view that one slot gates. */
static ipt_val by_batch(ipt_graph *g, const mix_values *m, ipt_val v)
{
    ipt_shape s = ipt_shape_of(g, v);
    int32_t batch = ipt_shape_of(g, m->gates).dim[1];
    return ipt_reshape(
        g, v, ipt_shape3(s.dtype, batch, (int32_t)(ipt_shape_count(&s) / (size_t)batch), 1));
}

static ipt_val mix_dx(ipt_graph *g, const mix_values *m, ipt_val dy)
{
    ipt_shape p = ipt_shape_of(g, m->p);
    ipt_val t = ipt_swap(g, ipt_reshape(g, m->p, ipt_shape4(p.dtype, 1, p.dim[0], p.dim[1], 1)));
    t = ipt_reshape(g, t, ipt_shape2(p.dtype, p.dim[1], p.dim[0]));
    return ipt_mix(g, dy, t, m->gates, m->slot, m->row);
}

static ipt_val mix_dp(ipt_graph *g, const mix_values *m, ipt_val dy)
{
    const ipt_attr ta = {.matmul = {.ta = 1}};
    ipt_shape s = ipt_shape_of(g, dy);
    if (m->gates.id)
        dy = ipt_reshape(g, ipt_gate_mul(g, by_batch(g, m, dy), m->gates, m->slot, m->row), s);
    ipt_val ab[2] = {rows_of(g, m->x), rows_of(g, dy)};
    return ipt_emit(g, IPT_OP_MATMUL, NULL, ab, 2, &ta, NULL);
}

static ipt_val mix_dgates(ipt_graph *g, const mix_values *m, ipt_val dy)
{
    const ipt_attr at = {.gate = {.row = m->row}};
    const ipt_val none = {0};
    ipt_val y = ipt_mix(g, m->x, m->p, none, none, 0);
    ipt_val h[4] = {by_batch(g, m, y), by_batch(g, m, dy), m->gates, m->slot};
    return ipt_emit(g, IPT_OP_GATE_GRAD, NULL, h, 4, &at, NULL);
}

/* --- the kernel ------------------------------------------------------------------------------- */
struct mix_push {
    uint32_t n, n_i, n_o, n_c; /* invocations; columns counted in items of 4 or 1 */
    uint32_t first, each;      /* row of the tensor, rows of a batch element */
    uint32_t batch, n_slot, row;
};

/* Whether the kernel is made for a matrix of ni inputs, which wants whole workgroups. */
static bool is_known(const ipt_launch *l, uint32_t ni, uint32_t invocations)
{
    return ni <= MAX_OUTPUTS && invocations % WG == 0 &&
           invocations / WG <= l->dev->max_group_count;
}

static void bind_band(ipt_dispatch *d, const ipt_bands *b, int i, const ipt_operand *o,
                      const ipt_operand *else_o)
{
    if (o->number >= 0)
        ipt_bands_bind(d, b, i);
    else /* never read */
        ipt_launch_bind(d, IPT_BIND_SSBO, else_o->src, else_o->number, false);
}

static ipt_status launch_mix(ipt_launch *l, const mixing *m)
{
    const uint32_t ni = (uint32_t)m->i, nc = (uint32_t)m->c, no = (uint32_t)m->o, vec = nc % 4 == 0,
                   items = vec ? nc / 4 : nc, gated = m->gates.number >= 0,
                   blocks = (no + MAX_OUTPUTS - 1) / MAX_OUTPUTS, per = (no + blocks - 1) / blocks;
    const uint64_t line = (uint64_t)nc * ipt_dtype_bytes(m->t);
    const bool adds = m->r.number >= 0;
    const ipt_band_operand o[3] = {{m->x.src, (uint8_t)m->x.number, false, ni * line},
                                   {IPT_SRC_OUT, 0, true, no * line},
                                   {m->r.src, (uint8_t)(adds ? m->r.number : 0), false, no * line}};
    const ipt_operand *gates = gated ? &m->gates : &m->p, *slot = gated ? &m->slot : &m->p;
    for (ipt_bands b = ipt_launch_bands(l, (uint64_t)m->rows, o, adds ? 3 : 2);
         ipt_bands_next(&b);) {
        struct mix_push p = {.n = (uint32_t)b.n * items,
                             .n_i = ni,
                             .n_o = no,
                             .n_c = items,
                             .first = (uint32_t)b.first,
                             .each = (uint32_t)(gated ? m->rows / m->batch : m->rows)};
        if (gated) {
            p.batch = (uint32_t)m->batch;
            p.n_slot = (uint32_t)m->slots;
            p.row = (uint32_t)m->row;
        }
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("mix", m->t), &p, sizeof p);
        if (!d)
            return l->status;
        ipt_launch_spec(d, vec);
        ipt_launch_spec(d, per);
        ipt_launch_spec(d, gated);
        ipt_launch_spec(d, blocks == 1 && is_known(l, ni, p.n) ? ni : 0);
        ipt_launch_spec(d, adds);
        ipt_launch_spec(d, m->is_swapped);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_bind(d, IPT_BIND_SSBO, m->p.src, m->p.number, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, gates->src, gates->number, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, slot->src, slot->number, false);
        ipt_bands_bind(d, &b, 1);
        bind_band(d, &b, 2, &m->r, &m->p);
        ipt_launch_linear(l, d, p.n, WG);
        d->groups[2] = blocks;
        d->macs = (double)b.n * ni * no * nc;
        d->no_wait = b.first > 0; /* the first waits for what wrote x */
    }
    return l->status;
}

/* Gates and slot from input `first` on. */
static void take_gates(mixing *m, const ipt_node *n, int first)
{
    m->gates = ipt_operand_optional(n, first);
    m->slot = ipt_operand_optional(n, first + 1);
    m->row = n->attr.gate.row;
    m->batch = has_gates(n, first) ? n->in_shape[first].dim[1] : 1;
    m->slots = has_gates(n, first) ? n->in_shape[first].dim[2] : 0;
}

/* --- mix: y[r,o,c] = g sum_i p[i,o] x[r,i,c], g = gates[row,b,slot[0]] of the row's batch element
 * b (g = 1 without gates) ---------------------------------------------------------------------- */
static void mix_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *x = &n->in_shape[0];
    size_t ni = (size_t)x->dim[1], nc = (size_t)x->dim[2], no = (size_t)n->in_shape[1].dim[1];
    for (size_t r = 0; r < (size_t)x->dim[0]; r++)
        for (size_t o = 0; o < no; o++)
            for (size_t c = 0; c < nc; c++) {
                double sum = 0;
                for (size_t i = 0; i < ni; i++)
                    sum += in[1][i * no + o] * in[0][(r * ni + i) * nc + c];
                out[0][(r * no + o) * nc + c] = gate_of(n, 2, in, r) * sum;
            }
}

static void mix_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                     ipt_val dx[])
{
    mix_values m = {.x = ipt_in(n, 0), .p = ipt_in(n, 1), .row = n->attr.gate.row};
    if (has_gates(n, 2)) {
        m.gates = ipt_in(n, 2);
        m.slot = ipt_in(n, 3);
    }
    if (want & 1)
        dx[0] = mix_dx(g, &m, dy[0]);
    if (want & 2)
        dx[1] = ipt_grad_as_input(g, n, 1, mix_dp(g, &m, dy[0]));
    if (want & 4)
        dx[2] = mix_dgates(g, &m, dy[0]);
}

static ipt_status mix_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[0];
    mixing m = {.x = ipt_operand_in(0),
                .p = ipt_operand_in(1),
                .r = ipt_operand_none(),
                .t = x->dtype,
                .rows = x->dim[0],
                .i = x->dim[1],
                .c = x->dim[2],
                .o = n->in_shape[1].dim[1]};
    take_gates(&m, n, 2);
    return launch_mix(l, &m);
}

static const char *mix_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    if (n->in_shape[1].dtype != n->in_shape[0].dtype)
        return "p must have the type of x";
    return check_gates(n, 2);
}

const ipt_op_def ipt_op_mix = {.name = "mix",
                               .sig = "x:ric p:io gates?:wns slot?:1 -> y:roc",
                               .infer = mix_infer,
                               .ref = mix_ref,
                               .grad = mix_grad,
                               .kernel = mix_kernel};

ipt_val ipt_mix(ipt_graph *g, ipt_val x, ipt_val p, ipt_val gates, ipt_val slot, int row)
{
    ipt_attr at = {.gate = {.row = row}};
    return ipt_emit(g, IPT_OP_MIX, NULL, (ipt_val[]){x, p, gates, slot}, 4, &at, NULL);
}

/* --- kron: y[r,o,c] = g sum_i p[i,o] sum_k x[r,i,k] q[k,c] (+ add), or y[r,c,o] when swapped -- */
enum { KRON_X, KRON_P, KRON_Q, KRON_ADD, KRON_GATES, KRON_SLOT };

static size_t kron_at(const ipt_node *n, size_t r, size_t o, size_t c)
{
    size_t no = (size_t)n->in_shape[KRON_P].dim[1], nc = (size_t)n->in_shape[KRON_Q].dim[1];
    return r * no * nc + (n->attr.gate.is_swapped ? c * no + o : o * nc + c);
}

static void kron_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *x = &n->in_shape[KRON_X];
    size_t ni = (size_t)x->dim[1], nk = (size_t)x->dim[2], no = (size_t)n->in_shape[KRON_P].dim[1],
           nc = (size_t)n->in_shape[KRON_Q].dim[1];
    const double *add = in[KRON_ADD];
    for (size_t r = 0; r < (size_t)x->dim[0]; r++)
        for (size_t o = 0; o < no; o++)
            for (size_t c = 0; c < nc; c++) {
                double sum = 0;
                size_t at = kron_at(n, r, o, c);
                for (size_t i = 0; i < ni; i++)
                    for (size_t k = 0; k < nk; k++)
                        sum += in[KRON_P][i * no + o] * in[KRON_X][(r * ni + i) * nk + k] *
                               in[KRON_Q][k * nc + c];
                out[0][at] = gate_of(n, KRON_GATES, in, r) * sum + (add ? add[at] : 0);
            }
}

static void kron_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                      ipt_val dx[])
{
    const ipt_attr ta = {.matmul = {.ta = 1}};
    const ipt_shape *x = &n->in_shape[KRON_X], *p = &n->in_shape[KRON_P], *q = &n->in_shape[KRON_Q];
    const int32_t r = x->dim[0], i = x->dim[1], k = x->dim[2], o = p->dim[1], c = q->dim[1];
    const uint32_t of_product = 1u << KRON_X | 1u << KRON_Q,
                   of_mix = 1u << KRON_P | 1u << KRON_GATES;
    ipt_val d = dy[0], none = {0};
    if (want & 1u << KRON_ADD)
        dx[KRON_ADD] = d;
    if (!(want & (of_product | of_mix)))
        return;
    if (n->attr.gate.is_swapped)
        d = ipt_swap(g, ipt_reshape(g, d, ipt_shape4(x->dtype, r, c, o, 1)));
    d = ipt_reshape(g, d, ipt_shape3(x->dtype, r, o, c));
    mix_values m = {.p = ipt_in(n, KRON_P), .row = n->attr.gate.row};
    if (has_gates(n, KRON_GATES)) {
        m.gates = ipt_in(n, KRON_GATES);
        m.slot = ipt_in(n, KRON_SLOT);
    }
    if (want & of_mix)
        m.x = ipt_matmul(g, ipt_in(n, KRON_X), ipt_in(n, KRON_Q), none);
    if (want & 1u << KRON_P)
        dx[KRON_P] = ipt_grad_as_input(g, n, KRON_P, mix_dp(g, &m, d));
    if (want & 1u << KRON_GATES)
        dx[KRON_GATES] = mix_dgates(g, &m, d);
    if (!(want & of_product))
        return;
    ipt_val dz = ipt_reshape(g, mix_dx(g, &m, d), ipt_shape2(x->dtype, r * i, c));
    if (want & 1u << KRON_X)
        dx[KRON_X] = ipt_grad_as_input(g, n, KRON_X,
                                       ipt_emit(g, IPT_OP_MATMUL_NT, n->name,
                                                (ipt_val[]){dz, ipt_in(n, KRON_Q)}, 2, NULL, NULL));
    if (want & 1u << KRON_Q) {
        ipt_val flat = ipt_reshape(g, ipt_in(n, KRON_X), ipt_shape2(x->dtype, r * i, k));
        dx[KRON_Q] = ipt_grad_as_input(
            g, n, KRON_Q, ipt_emit(g, IPT_OP_MATMUL, n->name, (ipt_val[]){flat, dz}, 2, &ta, NULL));
    }
}

/* One kernel where it can be (ipt_gemm_can_mix), else a product into scratch and mix. */
static ipt_status kron_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[KRON_X], *q = &n->in_shape[KRON_Q];
    mixing m = {.p = ipt_operand_in(KRON_P),
                .r = ipt_operand_optional(n, KRON_ADD),
                .t = x->dtype,
                .rows = x->dim[0],
                .i = x->dim[1],
                .c = q->dim[1],
                .o = n->in_shape[KRON_P].dim[1],
                .is_swapped = n->attr.gate.is_swapped != 0};
    take_gates(&m, n, KRON_GATES);
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = m.r,
                  .act = x->dtype,
                  .rows = (int64_t)m.rows * m.i,
                  .cols = m.c,
                  .k = x->dim[2],
                  .ldy = m.c};
    g.walk = ipt_walk_plain(g.rows, 1);
    IPT_TRY(ipt_gemm_left(l, n, KRON_X, &g.a));
    IPT_TRY(ipt_gemm_right(l, n, KRON_Q, true, &g.b, &g.b_type));
    g.mix = (ipt_gemm_mix){.i = m.i,
                           .o = m.o,
                           .is_swapped = m.is_swapped,
                           .p = m.p,
                           .gates = m.gates,
                           .slot = m.slot,
                           .row = m.row,
                           .batch = m.batch,
                           .slots = m.slots};
    if (ipt_gemm_can_mix(l, &g))
        return ipt_gemm_launch(l, &g);
    g.mix = (ipt_gemm_mix){.i = 0};
    g.r = ipt_operand_none();
    g.y = m.x = ipt_operand_scratch(
        ipt_launch_scratch(l, (uint64_t)g.rows * (uint64_t)m.c * ipt_dtype_bytes(m.t)));
    IPT_TRY(ipt_gemm_launch(l, &g));
    return launch_mix(l, &m);
}

static const char *kron_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *x = &n->in_shape[KRON_X], *p = &n->in_shape[KRON_P], *q = &n->in_shape[KRON_Q];
    if (p->dtype != x->dtype || q->dtype != x->dtype)
        return "p and q must have the type of x";
    out[0] = n->attr.gate.is_swapped ? ipt_shape3(x->dtype, x->dim[0], q->dim[1], p->dim[1])
                                     : ipt_shape3(x->dtype, x->dim[0], p->dim[1], q->dim[1]);
    const ipt_shape *add = &n->in_shape[KRON_ADD];
    if (add->rank && (add->dtype != x->dtype || !ipt_shape_same(add, &out[0])))
        return "the summand must have the shape and type of the result";
    return check_gates(n, KRON_GATES);
}

static ipt_shape kron_packs(const ipt_node *n, int operand)
{
    const ipt_shape *q = &n->in_shape[KRON_Q];
    return operand == KRON_Q ? ipt_shape2(q->dtype, q->dim[1], q->dim[0]) : (ipt_shape){.rank = 0};
}

const ipt_op_def ipt_op_kron = {.name = "kron",
                                .sig = "x:rik p:io q:kc add?:abd gates?:wns slot?:1 -> y:roc",
                                .alias = 1u << KRON_ADD,
                                .infer = kron_infer,
                                .ref = kron_ref,
                                .grad = kron_grad,
                                .packs = kron_packs,
                                .kernel = kron_kernel};

ipt_val ipt_kron(ipt_graph *g, ipt_val x, const ipt_kron_factors *f, ipt_val add)
{
    ipt_attr at = {.gate = {.row = f->row, .is_swapped = f->is_swapped}};
    return ipt_emit(g, IPT_OP_KRON, NULL, (ipt_val[]){x, f->p, f->q, add, f->gates, f->slot}, 6,
                    &at, NULL);
}

/* --- swap: y[a,c,b,d] = x[a,b,c,d] ------------------------------------------------------------ */
static void swap_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const int32_t *s = n->in_shape[0].dim;
    size_t nb = (size_t)s[1], nc = (size_t)s[2], nd = (size_t)s[3];
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++) {
        size_t d = i % nd, c = i / nd % nc, b = i / (nd * nc) % nb, a = i / (nd * nc * nb);
        out[0][((a * nc + c) * nb + b) * nd + d] = in[0][i];
    }
}

static void swap_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                      ipt_val dx[])
{
    (void)n, (void)want;
    dx[0] = ipt_swap(g, dy[0]);
}

struct swap_push {
    uint32_t n, n_b, n_c, n_d; /* invocations; the last axis counted in items of 4 or 1 */
};

static ipt_status swap_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[0];
    uint32_t d4 = (uint32_t)x->dim[3], vec = d4 % 4 == 0, items = vec ? d4 / 4 : d4;
    const uint64_t per = (uint64_t)x->dim[1] * (uint64_t)x->dim[2],
                   line = per * d4 * ipt_dtype_bytes(x->dtype);
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, line}, {IPT_SRC_OUT, 0, true, line}};
    for (ipt_bands b = ipt_launch_bands(l, (uint64_t)x->dim[0], o, 2); ipt_bands_next(&b);) {
        struct swap_push p = {(uint32_t)(b.n * per * items), (uint32_t)x->dim[1],
                              (uint32_t)x->dim[2], items};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("swap", x->dtype), &p, sizeof p);
        ipt_launch_spec(d, vec);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_swap = {.name = "swap",
                                .sig = "x:abcd -> y:acbd",
                                .ref = swap_ref,
                                .grad = swap_grad,
                                .kernel = swap_kernel};

ipt_val ipt_swap(ipt_graph *g, ipt_val x)
{
    return ipt_emit(g, IPT_OP_SWAP, NULL, &x, 1, NULL, NULL);
}
