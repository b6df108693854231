/* bench/bench_ops.c - single operators at sizes of SD 1.5 at 512 pixels: products and convolutions
 * beside OpenBLAS, and a row or more of every operator of the table. */
#include "bench/bench.h"

/* --- cases ------------------------------------------------------------------------------------ */
typedef enum operand_kind {
    NONE,   /* an optional operand that is not given */
    ACT,    /* activations, in their type */
    FACTOR, /* the same, written once and kept: the host may pack it */
    F32,
    KEPT,   /* f32, changed in place */
    IDS,    /* i32, 0 */
    WEIGHT, /* of the store */
} operand_kind;
typedef struct operand {
    operand_kind kind;
    int32_t dim[4]; /* outermost first; the first 0 ends the shape */
} operand;
typedef struct op_case {
    ipt_op op;
    const char *name;
    operand in[IPT_MAX_IN];
    ipt_attr attr;
} op_case;

#define X(...)                                                                                     \
    {                                                                                              \
        ACT, { __VA_ARGS__ }                                                                       \
    }
#define P(...)                                                                                     \
    {                                                                                              \
        FACTOR, { __VA_ARGS__ }                                                                    \
    }
#define F(...)                                                                                     \
    {                                                                                              \
        F32, { __VA_ARGS__ }                                                                       \
    }
#define K(...)                                                                                     \
    {                                                                                              \
        KEPT, { __VA_ARGS__ }                                                                      \
    }
#define I(...)                                                                                     \
    {                                                                                              \
        IDS, { __VA_ARGS__ }                                                                       \
    }
#define W(...)                                                                                     \
    {                                                                                              \
        WEIGHT, { __VA_ARGS__ }                                                                    \
    }
#define CONV3(...)                                                                                 \
    {                                                                                              \
        .conv = {.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, __VA_ARGS__ }                 \
    }
#define HEADS(n)                                                                                   \
    {                                                                                              \
        .attn = {.heads = (n), .scale = 0.125F }                                                   \
    }
#define NORM(...)                                                                                  \
    {                                                                                              \
        .norm = { __VA_ARGS__ }                                                                    \
    }
#define TO(...)                                                                                    \
    {                                                                                              \
        .to = { {__VA_ARGS__}, .rank = sizeof((int[]){__VA_ARGS__}) / sizeof(int) }                \
    }

/* rows, depth; columns, depth */
static const op_case gemm_cases[] = {
    {IPT_OP_LINEAR, "SD 1.5 to_q 64x64", {X(4096, 320), W(320, 320)}, {{0}}},
    {IPT_OP_LINEAR, "SD 1.5 ff in 64x64", {X(4096, 320), W(2560, 320)}, {{0}}},
    {IPT_OP_LINEAR, "SD 1.5 ff out 64x64", {X(4096, 1280), W(320, 1280)}, {{0}}},
    {IPT_OP_LINEAR, "SD 1.5 to_q 32x32", {X(1024, 640), W(640, 640)}, {{0}}},
    {IPT_OP_LINEAR, "as a 3x3 convolution 32x32", {X(1024, 5760), W(640, 5760)}, {{0}}},
    {IPT_OP_LINEAR, "SD 1.5 to_q 16x16", {X(256, 1280), W(1280, 1280)}, {{0}}},
    {IPT_OP_LINEAR, "SDXL to_q 32x32", {X(1024, 1280), W(1280, 1280)}, {{0}}},
    {IPT_OP_LINEAR, "square 1024", {X(1024, 1024), W(1024, 1024)}, {{0}}},
    {IPT_OP_LINEAR, "square 2048", {X(2048, 2048), W(2048, 2048)}, {{0}}},
};

#define CONV(name, side, in, out)                                                                  \
    {                                                                                              \
        IPT_OP_CONV2D, name, {X(1, side, side, in), W(out, 3, 3, in), W(out)}, CONV3(0)            \
    }
static const op_case conv_cases[] = {
    CONV("SD 1.5 64x64", 64, 320, 320),      CONV("SD 1.5 64x64 up", 64, 960, 320),
    CONV("SD 1.5 32x32", 32, 640, 640),      CONV("SD 1.5 16x16", 16, 1280, 1280),
    CONV("SD 1.5 16x16 up", 16, 2560, 1280), CONV("VAE 128x128", 128, 512, 512),
    CONV("VAE 256x256", 256, 256, 256),
};

/* In the order of graph/ops.def.  What only gradients use has the sizes of 32 x 32. */
static const op_case op_cases[] = {
    {IPT_OP_LINEAR, "to_q 64x64", {X(1, 4096, 320), W(320, 320), W(320)}, {{0}}},
    {IPT_OP_LINEAR, "ff in 32x32", {X(1, 1024, 640), W(5120, 640), W(5120)}, {{0}}},
    {IPT_OP_LINEAR_DX, "to_q 32x32", {X(1, 1024, 640), W(640, 640)}, {{0}}},
    {IPT_OP_MATMUL, "LoRA down 64x64", {X(1, 4096, 320), P(320, 8)}, {{0}}},
    {IPT_OP_MATMUL, "LoRA up 64x64", {X(1, 4096, 8), P(8, 320), X(1, 4096, 320)}, {{0}}},
    {IPT_OP_MATMUL_NT, "LoRA 32x32", {X(1, 1024, 640), P(8, 640)}, {{0}}},
    CONV("64x64", 64, 320, 320),
    CONV("16x16", 16, 1280, 1280),
    CONV("VAE 256x256", 256, 256, 128),
    {IPT_OP_CONV2D_DX,
     "32x32",
     {X(1, 32, 32, 640), W(640, 3, 3, 640)},
     CONV3(.up_h = 32, .up_w = 32)},
    {IPT_OP_CONV2D_DW,
     "32x32",
     {X(1, 32, 32, 320), X(1, 32, 32, 320), W(320, 3, 3, 320)},
     CONV3(0)},
    {IPT_OP_GROUP_NORM, "64x64", {X(1, 64, 64, 320), W(320), W(320)}, NORM(32, 1e-5F, 1)},
    {IPT_OP_GROUP_NORM, "VAE 256x256", {X(1, 256, 256, 256), W(256), W(256)}, NORM(32, 1e-6F, 1)},
    {IPT_OP_GROUP_NORM_DX,
     "32x32",
     {X(1, 32, 32, 640), W(640), W(640), F(1, 32, 2), X(1, 32, 32, 640)},
     NORM(32, 1e-5F, 1)},
    {IPT_OP_GROUP_NORM_DP,
     "32x32",
     {X(1, 32, 32, 640), W(640), W(640), F(1, 32, 2), X(1, 32, 32, 640)},
     NORM(32, 1e-5F, 1)},
    {IPT_OP_LAYER_NORM, "64x64", {X(1, 4096, 320), W(320), W(320)}, NORM(.eps = 1e-5F)},
    {IPT_OP_LAYER_NORM_DX, "32x32", {X(1, 1024, 640), W(640), X(1, 1024, 640)}, NORM(.eps = 1e-5F)},
    {IPT_OP_LAYER_NORM_DP, "32x32", {X(1, 1024, 640), X(1, 1024, 640)}, NORM(.eps = 1e-5F)},
    {IPT_OP_ATTENTION, "self 64x64", {X(1, 4096, 320), X(1, 4096, 320), X(1, 4096, 320)}, HEADS(8)},
    {IPT_OP_ATTENTION, "self 32x32", {X(1, 1024, 640), X(1, 1024, 640), X(1, 1024, 640)}, HEADS(8)},
    {IPT_OP_ATTENTION, "cross 64x64", {X(1, 4096, 320), X(1, 77, 320), X(1, 77, 320)}, HEADS(8)},
    {IPT_OP_ATTENTION, "cross 32x32", {X(1, 1024, 640), X(1, 77, 640), X(1, 77, 640)}, HEADS(8)},
    {IPT_OP_ATTENTION_BWD,
     "self 32x32",
     {X(1, 1024, 640), X(1, 1024, 640), X(1, 1024, 640), X(1, 1024, 640), F(1, 8, 1024),
      X(1, 1024, 640)},
     HEADS(8)},
    {IPT_OP_ATTN_PROBS, "cross 32x32", {X(1, 1024, 640), X(1, 77, 640)}, HEADS(8)},
    {IPT_OP_ATTN_PROBS_BWD,
     "cross 32x32",
     {X(1, 1024, 640), X(1, 77, 640), X(1, 8, 1024, 77), X(1, 8, 1024, 77)},
     HEADS(8)},
    {IPT_OP_ATTN_APPLY, "cross 32x32", {X(1, 8, 1024, 77), X(1, 77, 640)}, HEADS(8)},
    {IPT_OP_ATTN_APPLY_BWD,
     "cross 32x32",
     {X(1, 8, 1024, 77), X(1, 77, 640), X(1, 1024, 640)},
     HEADS(8)},
    {IPT_OP_UNARY, "silu 64x64", {X(1, 64, 64, 320)}, {.unary = {.kind = IPT_SILU}}},
    {IPT_OP_UNARY, "quick gelu, text", {X(1, 77, 3072)}, {.unary = {.kind = IPT_QUICK_GELU}}},
    {IPT_OP_UNARY_BWD,
     "silu 32x32",
     {X(1, 32, 32, 640), X(1, 32, 32, 640)},
     {.unary = {.kind = IPT_SILU}}},
    {IPT_OP_GEGLU, "64x64", {X(1, 4096, 2560)}, {{0}}},
    {IPT_OP_GEGLU_BWD, "32x32", {X(1, 1024, 5120), X(1, 1024, 2560)}, {{0}}},
    {IPT_OP_ADD, "64x64", {X(1, 64, 64, 320), X(1, 64, 64, 320)}, {.add = {1, 1}}},
    {IPT_OP_MUL, "64x64", {X(1, 64, 64, 320), X(1, 64, 64, 320)}, {{0}}},
    {IPT_OP_SUM_TO, "bias 64x64", {X(1, 4096, 320)}, TO(320)},
    {IPT_OP_CONCAT, "64x64", {X(1, 64, 64, 320), X(1, 64, 64, 320)}, {{0}}},
    {IPT_OP_SLICE, "64x64", {X(1, 4096, 2560)}, {.slice = {1280, 1280}}},
    {IPT_OP_SLICE_BWD, "32x32", {X(1, 1024, 2560)}, {.slice = {2560, 5120}}},
    {IPT_OP_UPSAMPLE, "32x32", {X(1, 32, 32, 640)}, TO(64, 64)},
    {IPT_OP_UPSAMPLE_BWD, "32x32", {X(1, 64, 64, 640), X(1, 32, 32, 640)}, {{0}}},
    {IPT_OP_RESHAPE, "64x64", {X(1, 64, 64, 320)}, TO(1, 4096, 320)},
    {IPT_OP_CAST, "f32 to f16 64x64", {F(1, 64, 64, 320)}, {.to = {.dtype = IPT_F16}}},
    {IPT_OP_EMBEDDING, "text", {I(1, 77), W(49408, 768)}, {{0}}},
    {IPT_OP_EMBEDDING_DW, "text", {I(1, 77), F(1, 77, 768)}, TO(1024, 768)},
    {IPT_OP_TAKE_ROWS, "text", {X(1, 77, 768), I(1)}, {{0}}},
    {IPT_OP_TAKE_ROWS_BWD, "text", {X(1, 768), I(1)}, TO(1, 77, 768)},
    {IPT_OP_GATE_MUL, "LoRA 64x64", {X(1, 4096, 8), F(1, 1, 3), I(8)}, {{0}}},
    {IPT_OP_GATE_GRAD, "LoRA 32x32", {X(1, 1024, 8), X(1, 1024, 8), F(1, 1, 3), I(8)}, {{0}}},
    {IPT_OP_MIX, "LoKr 64x64", {X(4096, 5, 64), P(5, 5)}, {{0}}},
    {IPT_OP_KRON,
     "LoKr 64x64",
     {X(4096, 5, 64), P(5, 5), P(64, 64), X(4096, 5, 64), F(1, 1, 3), I(1)},
     {{0}}},
    {IPT_OP_SWAP, "heads 64x64", {X(1, 4096, 8, 40)}, {{0}}},
    {IPT_OP_SHARE, "64x64", {X(1, 4096, 320), F(4096), X(1, 4096, 320)}, {{0}}},
    {IPT_OP_MSE, "latent 64x64", {X(1, 64, 64, 4), X(1, 64, 64, 4)}, {{0}}},
    {IPT_OP_MSE_BWD, "latent 64x64", {X(1, 64, 64, 4), X(1, 64, 64, 4), F(1)}, {{0}}},
    {IPT_OP_DOT, "LoRA of rank 4", {F(797184), F(797184)}, {{0}}},
    {IPT_OP_STORE, "LoRA of rank 4", {K(797184), F(797184)}, {{0}}},
    {IPT_OP_ACCUMULATE, "LoRA of rank 4", {K(797184), F(797184)}, {{0}}},
    {IPT_OP_ADAMW, "LoRA of rank 4", {K(797184), F(797184), K(797184), K(797184), F(8)}, {{0}}},
};

/* --- one case --------------------------------------------------------------------------------- */
/* The leaf of operand i; weights are named by case too: shapes differ. */
static const char *leaf_name(const op_case *c, int i, char *buf, size_t n)
{
    if (c->in[i].kind == WEIGHT)
        return ipt_name(buf, n, "%s.%s.%d", ipt_op_table[c->op]->name, c->name, i);
    return ipt_name(buf, n, "in%d", i);
}

static ipt_shape shape_of(const operand *o, ipt_dtype act)
{
    ipt_shape s = {{1, 1, 1, 1}, 0, IPT_F32};
    for (; s.rank < 4 && o->dim[s.rank] > 0; s.rank++)
        s.dim[s.rank] = o->dim[s.rank];
    if (o->kind == ACT || o->kind == FACTOR)
        s.dtype = act;
    else if (o->kind == IDS)
        s.dtype = IPT_I32;
    return s;
}

static void build(const op_case *c, ipt_dtype act, ipt_graph *g)
{
    ipt_val in[IPT_MAX_IN] = {{0}}, out[IPT_MAX_OUT] = {{0}};
    ipt_attr attr = c->attr;
    int n = 0;
    for (int i = 0; i < IPT_MAX_IN; i++) {
        const operand *o = &c->in[i];
        char name[96];
        if (o->kind == NONE)
            continue;
        in[i] = ipt_leaf(g,
                         o->kind == WEIGHT                      ? IPT_WEIGHT
                         : o->kind == FACTOR || o->kind == KEPT ? IPT_PARAM
                                                                : IPT_INPUT,
                         leaf_name(c, i, name, sizeof name), shape_of(o, act));
        n = i + 1;
    }
    if (c->op == IPT_OP_RESHAPE || c->op == IPT_OP_TAKE_ROWS_BWD)
        attr.to.dtype = act;
    ipt_emit(g, c->op, c->name, in, n, &attr, out);
    if (out[0].id) /* not of what changes its operands */
        ipt_output(g, "y", out[0]);
}

bool bench_ops_build(size_t i, ipt_dtype act, ipt_graph *g, ipt_op *op, const char **name)
{
    if (i >= IPT_COUNT(op_cases))
        return false;
    build(&op_cases[i], act, g);
    *op = op_cases[i].op;
    *name = op_cases[i].name;
    return true;
}

static ipt_status fill_ids(bench *b, ipt_plan *p, const char *leaf, size_t n)
{
    int32_t *v = ipt_calloc(b->ctx, n, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    ipt_status s = ipt_plan_write(p, leaf, v, n * sizeof *v);
    ipt_free(v);
    return s;
}

static ipt_status fill_leaves(bench *b, const op_case *c, ipt_plan *p)
{
    for (int i = 0; i < IPT_MAX_IN; i++) {
        const operand *o = &c->in[i];
        const ipt_shape s = shape_of(o, b->act);
        const size_t n = ipt_shape_count(&s);
        char buf[96];
        const char *name = leaf_name(c, i, buf, sizeof buf);
        if (!ipt_plan_has(p, name)) /* not given, of the store, or nothing reads it */
            continue;
        IPT_TRY(o->kind == IDS ? fill_ids(b, p, name, n) : bench_fill(b, p, name, n, 1));
    }
    return IPT_OK;
}

static ipt_status run_case(bench *b, const op_case *c, bench_time *t)
{
    ipt_graph *g = NULL;
    ipt_plan *p = NULL;
    const ipt_plan_opts po = {.gpu = b->gpu, .weights = b->weights, .profile = true};
    ipt_status status;
    IPT_TRY(ipt_graph_create(b->ctx, &g));
    build(c, b->act, g);
    IPT_TRY_GOTO(ipt_plan_create(g, &po, &p), end);
    IPT_TRY_GOTO(fill_leaves(b, c, p), end);
    status = bench_measure(b, p, t);
end:
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
    return status;
}

/* --- beside OpenBLAS -------------------------------------------------------------------------- */
static ipt_status bench_matrix(bench *b, const op_case *c, size_t n)
{
    for (size_t i = 0; i < n; i++, c++) {
        const bool conv = c->op == IPT_OP_CONV2D;
        const int32_t *x = c->in[0].dim, *w = c->in[1].dim;
        const int32_t rows = conv ? x[1] * x[2] : x[0], depth = conv ? w[1] * w[2] * w[3] : w[1];
        bench_time t;
        IPT_TRY(run_case(b, c, &t));
        json_t *row =
            json_pack("{s:s, s:s, s:i, s:i, s:i, s:f, s:f, s:f}", "op", ipt_op_table[c->op]->name,
                      "name", c->name, "m", (int)rows, "n", (int)w[0], "k", (int)depth, "first_ms",
                      t.first_ms, "ms", t.wall_ms, "device_ms", t.device_ms);
        bench_add_shares(b, row, t.wall_ms, &t.work);
        double blas_ms = 0;
        ipt_status status =
            b->blas ? bench_blas_sgemm(b->ctx, b->blas, rows, w[0], depth, b->o->repeat, &blas_ms)
                    : IPT_OK;
        if (status != IPT_OK) {
            json_decref(row);
            return status;
        }
        json_object_set_new(row, "sgemm_gflops",
                            b->blas ? json_real(2e-6 * rows * w[0] * depth / blas_ms)
                                    : json_null());
        json_object_set_new(row, "of_sgemm",
                            b->blas ? json_real(blas_ms / t.wall_ms) : json_null());
        bench_row(b, row);
    }
    return IPT_OK;
}

ipt_status bench_gemm(bench *b) { return bench_matrix(b, gemm_cases, IPT_COUNT(gemm_cases)); }
ipt_status bench_conv(bench *b) { return bench_matrix(b, conv_cases, IPT_COUNT(conv_cases)); }

/* --- the table of operators ------------------------------------------------------------------- */
static void note_row(bench *b, ipt_op op, const char *name, const char *note)
{
    bench_row(
        b, json_pack("{s:s, s:s, s:s}", "op", ipt_op_table[op]->name, "name", name, "note", note));
}

static ipt_status bench_op(bench *b, const op_case *c)
{
    bench_time t;
    char shape[64];
    if (ipt_op_table[c->op]->view) {
        note_row(b, c->op, c->name, "a view: nothing is done");
        return IPT_OK;
    }
    ipt_status status = run_case(b, c, &t);
    if (status == IPT_ERR_UNSUPPORTED) {
        note_row(b, c->op, c->name, "not on this device");
        return IPT_OK;
    }
    if (status != IPT_OK)
        return status;
    const ipt_shape s = shape_of(&c->in[0], b->act);
    ipt_shape_text(&s, shape, sizeof shape);
    json_t *row = json_pack("{s:s, s:s, s:s, s:f, s:f, s:f}", "op", ipt_op_table[c->op]->name,
                            "name", c->name, "shape", shape, "first_ms", t.first_ms, "wall_ms",
                            t.wall_ms, "ms", t.device_ms);
    bench_add_shares(b, row, t.device_ms, &t.work);
    bench_row(b, row);
    return IPT_OK;
}

ipt_status bench_ops(bench *b)
{
    for (int op = 0; op < IPT_OP_COUNT; op++) {
        bool has_case = false;
        for (size_t i = 0; i < IPT_COUNT(op_cases); i++)
            if ((int)op_cases[i].op == op) {
                IPT_TRY(bench_op(b, &op_cases[i]));
                has_case = true;
            }
        if (!has_case)
            note_row(b, (ipt_op)op, "", "bench_ops.c has no size for it");
    }
    return IPT_OK;
}
