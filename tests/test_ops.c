/* tests/test_ops.c - every operator of the table, on both kernel shapes: double reference against
 * the device in f32, f32 with f16 or q8 weights, and f16 storage; gradients against finite
 * differences; guard bands, NaN poison and the validation layer watch each run. */
#include "tests/support.h"

#include "graph/internal.h"
#include "tests/op_cases.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LEAF = 16, MAX_NAME = 96, MAX_TESTS = 4096, PROBES = 5 };

typedef struct leaf_rec {
    char name[MAX_NAME];
    ipt_shape shape;
    ipt_val val;
    int lo, hi; /* i32 leaves */
} leaf_rec;

typedef struct test_run {
    leaf_rec leaf[MAX_LEAF];
    int n_leaf;
    struct {
        char name[MAX_NAME];
        ipt_val val;
        bool grad;
    } out[MAX_LEAF];
    int n_out;
} test_run;

/* --- what cases call -------------------------------------------------------------------------- */
static ipt_val add_leaf(case_env *e, const char *name, ipt_shape s, int lo, int hi)
{
    test_run *r = e->run;
    ipt_val v = ipt_leaf(e->g, s.dtype == IPT_I32 ? IPT_INPUT : IPT_PARAM, name, s);
    assert_true(r->n_leaf < MAX_LEAF);
    leaf_rec *l = &r->leaf[r->n_leaf++];
    ipt_name(l->name, sizeof l->name, "%s", name);
    l->shape = s;
    l->val = v;
    l->lo = lo;
    l->hi = hi;
    return v;
}

ipt_val case_in(case_env *e, const char *name, ipt_shape s)
{
    s.dtype = e->act;
    return add_leaf(e, name, s, 0, 0);
}

ipt_val case_in_f32(case_env *e, const char *name, ipt_shape s)
{
    s.dtype = IPT_F32;
    return add_leaf(e, name, s, 0, 0);
}

ipt_val case_ids(case_env *e, const char *name, ipt_shape s, int lo, int hi)
{
    s.dtype = IPT_I32;
    return add_leaf(e, name, s, lo, hi);
}

static void add_out(case_env *e, const char *name, ipt_val v, bool grad)
{
    test_run *r = e->run;
    assert_true(r->n_out < MAX_LEAF);
    snprintf(r->out[r->n_out].name, MAX_NAME, "%s", name);
    r->out[r->n_out].val = v;
    r->out[r->n_out++].grad = grad;
}

void case_out(case_env *e, const char *name, ipt_val v) { add_out(e, name, v, true); }
void case_out_nograd(case_env *e, const char *name, ipt_val v) { add_out(e, name, v, false); }

/* --- a weight store that makes values from names ---------------------------------------------- */
typedef struct held {
    char name[MAX_NAME];
    ipt_use use;
    ipt_buffer *buf;
    struct held *next;
} held;

typedef struct test_weights {
    ipt_weights base;
    ipt_gpu *gpu;
    ipt_dtype dtype;
    held *head;
} test_weights;

static float weight_value(const char *name, size_t i)
{
    uint64_t h = 7;
    for (; *name; name++)
        h = h * 131 + (unsigned char)*name;
    h += (uint64_t)i * 0x9e3779b97f4a7c15u;
    return ipt_rng_normal(&h) * 0.5F;
}

static bool is_wide(const ipt_shape *s)
{
    return s->rank >= 2;
} /* panels and tables follow the precision */

/* q8 as GGUF has it: 32 values and a scale. */
static void round_block(float *v)
{
    double top = 0;
    for (int i = 0; i < 32; i++)
        top = fmax(top, fabs((double)v[i]));
    const double d = (double)ipt_f16_to_f32(ipt_f32_to_f16((float)(top / 127)));
    for (int i = 0; i < 32; i++)
        v[i] = (float)(d * round((double)v[i] / d));
}

/* What a weight is worth where it is stored. */
static void stored_values(const test_weights *t, const char *name, const ipt_shape *s, float *v)
{
    const size_t n = ipt_shape_count(s);
    const bool blocks = t->dtype == IPT_Q8 && s->dim[s->rank - 1] % 32 == 0;
    for (size_t i = 0; i < n; i++)
        v[i] = weight_value(name, i);
    for (size_t i = 0; i < n && is_wide(s) && t->dtype != IPT_F32; i += blocks ? 32 : 1)
        if (blocks)
            round_block(v + i);
        else
            v[i] = ipt_f16_to_f32(ipt_f32_to_f16(v[i]));
}

static ipt_status store_read(ipt_weights *w, const char *name, const ipt_shape *s, double *out)
{
    const size_t n = ipt_shape_count(s);
    float *v = calloc(n, sizeof *v);
    assert_non_null(v);
    stored_values((const test_weights *)w, name, s, v);
    for (size_t i = 0; i < n; i++)
        out[i] = (double)v[i];
    free(v);
    return IPT_OK;
}

static float get_f32(const void *data, size_t i) { return ((const float *)data)[i]; }

static ipt_status store_find(ipt_weights *w, const char *name, const ipt_shape *s, ipt_use use,
                             ipt_weight_view *out)
{
    test_weights *t = (test_weights *)w;
    ipt_dtype dtype = use == IPT_USE_ROWS ? IPT_F32 : t->dtype;
    if (dtype == IPT_Q8) /* the gradient's panels: what q8 holds, without a second rounding */
        dtype = use == IPT_USE_BACK ? IPT_F32 : ipt_panel_dtype(s, dtype);
    size_t n = ipt_shape_count(s);
    const ipt_shape back = ipt_panel_back(s), *packed = use == IPT_USE_BACK ? &back : s;
    const bool is_packed = use == IPT_USE_PANEL || use == IPT_USE_BACK;
    uint64_t bytes =
        is_packed ? ipt_panel_bytes(packed, dtype) : (n * ipt_dtype_bytes(dtype) + 3) / 4 * 4;
    held *h = t->head;
    while (h && (strcmp(h->name, name) != 0 || h->use != use))
        h = h->next;
    if (!h) {
        h = calloc(1, sizeof *h);
        float *v = calloc(n, sizeof *v);
        void *bytes_out = calloc(1, bytes);
        assert_true(h && v && bytes_out);
        ipt_name(h->name, sizeof h->name, "%s", name);
        h->use = use;
        if (dtype != IPT_Q8)
            stored_values(t, name, s, v);
        for (size_t i = 0; i < n && dtype == IPT_Q8; i++)
            v[i] = weight_value(name, i);
        if (is_packed) {
            size_t k = s->rank == 4 ? (size_t)s->dim[1] * (size_t)s->dim[2] : 1;
            size_t in = (size_t)s->dim[s->rank - 1];
            ipt_panel_src src = {.data = v,
                                 .get = get_f32,
                                 .so = k * in,
                                 .si = 1,
                                 .sx = in,
                                 .sy = s->rank == 4 ? (size_t)s->dim[2] * in : 0,
                                 .is_reversed = use == IPT_USE_BACK};
            if (use == IPT_USE_BACK) {
                src.so = 1;
                src.si = k * in;
            }
            ipt_panel_pack(packed, &src, dtype, bytes_out);
        } else {
            for (size_t i = 0; i < n; i++)
                if (dtype == IPT_F16)
                    ((uint16_t *)bytes_out)[i] = ipt_f32_to_f16(v[i]);
                else
                    ((float *)bytes_out)[i] = v[i];
        }
        IPT_TRY(ipt_buffer_create(t->gpu, bytes, &h->buf));
        IPT_TRY(ipt_buffer_write(t->gpu, h->buf, 0, bytes_out, bytes));
        free(v);
        free(bytes_out);
        h->next = t->head;
        t->head = h;
    }
    *out = (ipt_weight_view){.buf = h->buf, .bytes = bytes, .dtype = dtype};
    return IPT_OK;
}

static test_weights make_store(ipt_gpu *gpu, ipt_dtype dtype)
{
    return (test_weights){{.find = store_find, .read = store_read}, gpu, dtype, NULL};
}

static void drop_store(test_weights *t)
{
    while (t->head) {
        held *h = t->head;
        t->head = h->next;
        ipt_buffer_destroy(t->gpu, &h->buf);
        free(h);
    }
}

/* --- one run ---------------------------------------------------------------------------------- */
typedef struct mode {
    const char *name;
    ipt_dtype act, weight;
} mode;
static const mode modes[] = {{"f32", IPT_F32, IPT_F32},
                             {"f16w", IPT_F32, IPT_F16},
                             {"f16", IPT_F16, IPT_F16},
                             {"q8", IPT_F32, IPT_Q8},
                             {"q8_f16", IPT_F16, IPT_Q8}};

/* Graph of the case with its gradient; wrt: float leaves, then weights. */
static ipt_graph *build(ipt_ctx *ctx, const op_case *c, ipt_dtype act, test_run *run,
                        char wrt_name[][MAX_NAME], int *n_wrt)
{
    ipt_graph *g = NULL;
    assert_ok(ctx, ipt_graph_create(ctx, &g));
    memset(run, 0, sizeof *run);
    case_env e = {g, act, run};
    c->build(&e);
    assert_ok(ctx, ipt_graph_status(g));
    *n_wrt = 0;
    ipt_seed seed[MAX_LEAF];
    ipt_val wrt[2 * MAX_LEAF], d[2 * MAX_LEAF];
    int n_seed = 0, n_case_leaf = run->n_leaf;
    size_t n_weights = ipt_graph_n_weights(g);
    for (int i = 0; c->grad && i < run->n_out; i++) {
        if (!run->out[i].grad)
            continue;
        char name[MAX_NAME + 8];
        ipt_name(name, sizeof name, "r_%s", run->out[i].name);
        ipt_val r = add_leaf(&e, name, ipt_shape_of(g, run->out[i].val), 0, 0);
        seed[n_seed++] = (ipt_seed){run->out[i].val, r};
    }
    for (int i = 0; c->grad && i < n_case_leaf; i++)
        if (run->leaf[i].shape.dtype != IPT_I32) {
            snprintf(wrt_name[*n_wrt], MAX_NAME, "%s", run->leaf[i].name);
            wrt[(*n_wrt)++] = run->leaf[i].val;
        }
    for (size_t i = 0; c->grad && i < n_weights; i++) {
        ipt_shape s;
        snprintf(wrt_name[*n_wrt], MAX_NAME, "%s", ipt_graph_weight(g, i, &s));
        wrt[*n_wrt] = ipt_find(g, wrt_name[*n_wrt]);
        (*n_wrt)++;
    }
    if (c->grad) {
        assert_ok(ctx, ipt_graph_backward(g, seed, (size_t)n_seed, wrt, (size_t)*n_wrt, d));
        for (int i = 0; i < *n_wrt; i++) {
            char name[MAX_NAME + 8];
            ipt_name(name, sizeof name, "d_%s", wrt_name[i]);
            if (!d[i].id)
                fail_msg("%s: no gradient for %s", c->name, wrt_name[i]);
            ipt_output(g, name, d[i]);
        }
    }
    for (int i = 0; i < run->n_out; i++)
        ipt_output(g, run->out[i].name, run->out[i].val);
    assert_ok(ctx, ipt_graph_status(g));
    return g;
}

static void write_leaves(ipt_ctx *ctx, const test_run *run, ipt_plan *p, uint64_t seed)
{
    for (int i = 0; i < run->n_leaf; i++) {
        const leaf_rec *l = &run->leaf[i];
        size_t n = ipt_shape_count(&l->shape);
        float *f = calloc(n, sizeof *f);
        int32_t *ids = calloc(n, sizeof *ids);
        assert_true(f && ids);
        for (size_t k = 0; k < n; k++) {
            f[k] = ipt_rng_normal(&seed);
            ids[k] = l->lo + (int32_t)(ipt_rng_next(&seed) % (uint64_t)(l->hi - l->lo + 1));
        }
        assert_ok(ctx, ipt_plan_write(p, l->name,
                                      l->shape.dtype == IPT_I32 ? (void *)ids : (void *)f, n * 4));
        free(f);
        free(ids);
    }
}

static double nmse(const float *ref, const float *got, size_t n)
{
    double err = 0, sum = 0;
    for (size_t i = 0; i < n; i++) {
        double e = (double)got[i] - (double)ref[i];
        if (!isfinite(got[i]))
            return (double)INFINITY;
        err += e * e;
        sum += (double)ref[i] * (double)ref[i];
    }
    return sum > 0 ? err / sum : err;
}

static void compare(ipt_ctx *ctx, const char *test, const char *name, ipt_graph *g, ipt_plan *a,
                    ipt_plan *b, double limit)
{
    ipt_shape s = ipt_shape_of(g, ipt_find(g, name));
    size_t n = ipt_shape_count(&s);
    float *x = calloc(n, sizeof *x), *y = calloc(n, sizeof *y);
    assert_true(x && y);
    assert_ok(ctx, ipt_plan_read(a, name, x, n * 4));
    assert_ok(ctx, ipt_plan_read(b, name, y, n * 4));
    double e = nmse(x, y, n);
    free(x);
    free(y);
    if (!(e <= limit))
        fail_msg("%s: %s: NMSE %.3g against the double reference, limit %.3g", test, name, e,
                 limit);
}

/* dL/dv by finite differences of the reference, at a few elements of every leaf and weight. */
static void check_gradients(ipt_ctx *ctx, const op_case *c)
{
    test_run run;
    char wrt[2 * MAX_LEAF][MAX_NAME];
    int n_wrt = 0;
    ipt_graph *g = build(ctx, c, IPT_F32, &run, wrt, &n_wrt);
    test_weights store = make_store(NULL, IPT_F32);
    ipt_plan *p = NULL;
    assert_ok(ctx, ipt_plan_create(g, &(ipt_plan_opts){.weights = &store.base}, &p));
    write_leaves(ctx, &run, p, 11);
    assert_ok(ctx, ipt_plan_run(p, 0));
    uint64_t rng = 5;
    const double h = 1e-4;
    for (int i = 0; i < n_wrt; i++) {
        char name[MAX_NAME + 8];
        size_t n = 0, dn = 0;
        ipt_name(name, sizeof name, "d_%s", wrt[i]);
        double *x = ipt_host_values(p, wrt[i], &n), *d = ipt_host_values(p, name, &dn),
               want[PROBES], scale = 0;
        size_t at[PROBES];
        assert_true(x && d && n == dn);
        assert_ok(ctx, ipt_plan_run(p, 0)); /* d at the undisturbed point */
        for (size_t k = 0; k < n; k++)
            scale += d[k] * d[k];
        scale = sqrt(scale / (double)n);
        for (int k = 0; k < PROBES; k++) {
            at[k] = (size_t)(ipt_rng_next(&rng) % n);
            want[k] = d[at[k]];
        }
        for (int k = 0; k < PROBES; k++) {
            double keep = x[at[k]], loss[2] = {0, 0};
            for (int side = 0; side < 2; side++) {
                x[at[k]] = keep + (side ? h : -h);
                assert_ok(ctx, ipt_plan_run(p, 0));
                for (int o = 0; o < run.n_out; o++) {
                    if (!run.out[o].grad)
                        continue;
                    size_t m = 0, rm = 0;
                    char rname[MAX_NAME + 8];
                    ipt_name(rname, sizeof rname, "r_%s", run.out[o].name);
                    const double *y = ipt_host_values(p, run.out[o].name, &m),
                                 *r = ipt_host_values(p, rname, &rm);
                    for (size_t q = 0; q < m; q++)
                        loss[side] += y[q] * r[q];
                }
            }
            x[at[k]] = keep;
            double fd = (loss[1] - loss[0]) / (2 * h), err = fabs(fd - want[k]);
            if (!(err <= 1e-5 * (scale + fabs(fd)) + 1e-7))
                fail_msg("%s: d/d%s[%zu] = %.9g, finite difference %.9g", c->name, wrt[i], at[k],
                         want[k], fd);
        }
    }
    ipt_plan_destroy(&p);
    ipt_graph_destroy(&g);
}

/* --- tests ------------------------------------------------------------------------------------ */
typedef struct shape_gpu {
    ipt_ctx *ctx;
    ipt_gpu *gpu;
} shape_gpu;
static shape_gpu gpus[2]; /* simd, tile: one test program, one device each */

typedef struct test_state {
    char name[160];
    const op_case *c;
    int mode, shape;
    enum { AS_IT_IS, WINOGRAD, COOP } kernels;
} test_state;

/* For plans that are made from now on: 3 x 3 convolutions by Winograd's method wherever it can be,
 * or products as for matrix units of 8 x 8 x 8, which are emulated.  The former traits, to be set
 * back. */
static ipt_traits set_kernels(ipt_gpu *gpu, const test_state *t)
{
    const ipt_traits was = *ipt_gpu_traits(gpu);
    ipt_traits now = was;
    if (t->kernels == WINOGRAD)
        now.winograd = 2;
    if (t->kernels == COOP) {
        now.coop_emulated = true;
        now.coop_m = now.coop_n = now.coop_k = 8;
    }
    ipt_gpu_limit_traits(gpu, &now);
    return was;
}

/* Convolutions of 3 x 3 pixels and stride 1. */
static bool is_conv(const op_case *c)
{
    static const char *const others[] = {"/one", "1x1", "stride", "patch"};
    for (size_t i = 0; i < IPT_COUNT(others); i++)
        if (strstr(c->name, others[i]))
            return false;
    return strstr(c->name, "conv2d") != NULL;
}

static bool has_products(const op_case *c)
{
    static const char *const names[] = {"conv2d", "linear", "kron"};
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        if (strstr(c->name, names[i]))
            return true;
    return false;
}

/* No weight of the case would be stored otherwise. */
static bool is_idle(const op_case *c, ipt_dtype weight)
{
    return weight == IPT_Q8 && !has_products(c);
}

static void need_device(const ipt_gpu *gpu, ipt_dtype act)
{
    if (!gpu) {
        print_message("no Vulkan device: the test is skipped\n");
        skip();
    }
    if (act == IPT_F16 && !ipt_gpu_traits(gpu)->f16_storage) {
        print_message("the device has no 16-bit storage\n");
        skip();
    }
}

/* NOLINTNEXTLINE(readability-function-size): all of one run */
static void compare_all(ipt_ctx *ctx, const test_state *t, ipt_graph *g, const test_run *run,
                        char wrt[][MAX_NAME], int n_wrt, ipt_plan *host, ipt_plan *dev,
                        ipt_dtype act)
{
    double limit = act == IPT_F16 ? (t->c->nmse_f16 > 0 ? t->c->nmse_f16 : 1e-6)
                                  : (t->c->nmse_f32 > 0 ? t->c->nmse_f32 : 1e-9);
    for (int i = 0; i < run->n_out; i++)
        compare(ctx, t->name, run->out[i].name, g, host, dev, limit);
    for (int i = 0; i < n_wrt; i++) {
        char name[MAX_NAME + 8];
        ipt_name(name, sizeof name, "d_%s", wrt[i]);
        compare(ctx, t->name, name, g, host, dev, limit);
    }
}

static void parity(void **state)
{
    const test_state *t = *state;
    const mode *m = &modes[t->mode];
    ipt_ctx *ctx = gpus[t->shape].ctx;
    ipt_gpu *gpu = gpus[t->shape].gpu;
    need_device(gpu, m->act);
    uint32_t before = ipt_gpu_validation_count(gpu);
    test_run run;
    char wrt[2 * MAX_LEAF][MAX_NAME];
    int n_wrt = 0;
    ipt_graph *g = build(ctx, t->c, m->act, &run, wrt, &n_wrt);
    test_weights store = make_store(gpu, m->weight);
    ipt_plan *host = NULL, *dev = NULL;
    const ipt_traits traits = set_kernels(gpu, t);
    assert_ok(ctx, ipt_plan_create(g, &(ipt_plan_opts){.weights = &store.base}, &host));
    assert_ok(
        ctx, ipt_plan_create(g, &(ipt_plan_opts){.gpu = gpu, .weights = &store.base, .guard = true},
                             &dev));
    ipt_gpu_limit_traits(gpu, &traits);
    for (uint64_t seed = 1; seed <= 2; seed++) { /* the second run replays the same commands */
        write_leaves(ctx, &run, host, seed);
        write_leaves(ctx, &run, dev, seed);
        assert_ok(ctx, ipt_plan_run(host, 0));
        assert_ok(ctx, ipt_plan_run(dev, 0));
        compare_all(ctx, t, g, &run, wrt, n_wrt, host, dev, m->act);
    }
    ipt_plan_destroy(&host);
    ipt_plan_destroy(&dev);
    drop_store(&store);
    ipt_graph_destroy(&g);
    assert_int_equal(ipt_gpu_validation_count(gpu), before);
}

/* --- a device that takes little at once ------------------------------------------------------ */
/* Each case again with the smallest binding that its operators can be walked with, from 256 bytes
 * on: nothing of the result may depend on where one band ends and the next begins. */
static const struct narrow {
    const char *name;
    ipt_dtype act, weight;
    uint32_t align; /* 0: the device's */
    bool texels;    /* texel views are limited as well: operands go through storage buffers */
    uint32_t groups;
} narrows[] = {{"narrow", IPT_F32, IPT_F32, 0, false, 0},
               {"narrow_256", IPT_F32, IPT_F32, 256, true, 1024},
               {"narrow_f16", IPT_F16, IPT_F16, 64, true, 0},
               {"narrow_q8", IPT_F32, IPT_Q8, 256, true, 0}};
enum { NARROW_MIN = 256, NARROW_MAX = 1 << 20 };
static bool walked[IPT_OP_COUNT]; /* in more dispatches than on the whole device */

static ipt_plan *narrow_plan(ipt_ctx *ctx, ipt_graph *g, ipt_gpu *gpu, test_weights *store,
                             const struct narrow *w, uint64_t *range)
{
    const ipt_traits full = *ipt_gpu_traits(gpu);
    ipt_plan *plan = NULL;
    ipt_status s = IPT_ERR_TOO_LARGE;
    for (*range = NARROW_MIN; s == IPT_ERR_TOO_LARGE && *range <= NARROW_MAX; *range *= 2) {
        ipt_traits t = full;
        t.max_range = *range;
        t.align = w->align ? w->align : t.align;
        t.max_texels = w->texels ? *range / 16 : t.max_texels;
        t.max_group_count = w->groups ? w->groups : t.max_group_count;
        ipt_gpu_limit_traits(gpu, &t);
        s = ipt_plan_create(g, &(ipt_plan_opts){.gpu = gpu, .weights = &store->base, .guard = true},
                            &plan);
    }
    ipt_gpu_limit_traits(gpu, &full);
    assert_ok(ctx, s);
    return plan;
}

static void narrow(void **state)
{
    const test_state *t = *state;
    const struct narrow *w = &narrows[t->mode];
    ipt_ctx *ctx = gpus[t->shape].ctx;
    ipt_gpu *gpu = gpus[t->shape].gpu;
    need_device(gpu, w->act);
    uint32_t before = ipt_gpu_validation_count(gpu);
    test_run run;
    char wrt[2 * MAX_LEAF][MAX_NAME];
    int n_wrt = 0;
    uint64_t range = 0;
    ipt_graph *g = build(ctx, t->c, w->act, &run, wrt, &n_wrt);
    test_weights store = make_store(gpu, w->weight);
    const ipt_traits traits = set_kernels(gpu, t);
    ipt_plan *host = NULL, *whole = NULL, *dev = narrow_plan(ctx, g, gpu, &store, w, &range);
    assert_ok(ctx, ipt_plan_create(g, &(ipt_plan_opts){.weights = &store.base}, &host));
    assert_ok(ctx,
              ipt_plan_create(g, &(ipt_plan_opts){.gpu = gpu, .weights = &store.base}, &whole));
    ipt_gpu_limit_traits(gpu, &traits);
    for (uint32_t i = 0; i < dev->n_node; i++)
        if (dev->node[i].launch.n_d > whole->node[i].launch.n_d)
            walked[dev->node[i].n.op] = true;
    write_leaves(ctx, &run, host, 1);
    write_leaves(ctx, &run, dev, 1);
    assert_ok(ctx, ipt_plan_run(host, 0));
    assert_ok(ctx, ipt_plan_run(dev, 0));
    compare_all(ctx, t, g, &run, wrt, n_wrt, host, dev, w->act);
    ipt_plan_destroy(&host);
    ipt_plan_destroy(&whole);
    ipt_plan_destroy(&dev);
    drop_store(&store);
    ipt_graph_destroy(&g);
    assert_int_equal(ipt_gpu_validation_count(gpu), before);
}

/* Operators that are not walked, and why none has to be. */
static const struct {
    ipt_op op;
    const char *why;
} unwalked[] = {
    {IPT_OP_RESHAPE, "a view"},
};

static void every_row_is_walked(void **state)
{
    (void)state;
    if (getenv("IPT_TEST_ONLY") || !(gpus[0].gpu && gpus[1].gpu)) {
        print_message("not all cases ran: there is nothing to count\n");
        skip();
    }
    for (size_t i = 0; i < IPT_COUNT(unwalked); i++)
        walked[unwalked[i].op] = true;
    int n = 0;
    for (int i = 0; i < IPT_OP_COUNT; i++)
        if (!walked[i]) {
            print_message("no case walks operator %s in bands\n", ipt_op_table[i]->name);
            n++;
        }
    assert_int_equal(n, 0);
}

static void gradient(void **state)
{
    const test_state *t = *state;
    ipt_ctx *ctx = test_ctx();
    check_gradients(ctx, t->c);
    ipt_ctx_destroy(&ctx);
}

static const op_case *const groups[] = {op_cases_gemm,      op_cases_attention, op_cases_norm,
                                        op_cases_pointwise, op_cases_shape,     op_cases_adapter,
                                        op_cases_state};

static void every_row_has_a_case(void **state)
{
    (void)state;
    bool seen[IPT_OP_COUNT] = {false};
    ipt_ctx *ctx = test_ctx();
    for (size_t k = 0; k < IPT_COUNT(groups); k++)
        for (const op_case *c = groups[k]; c->name; c++) {
            test_run run;
            char wrt[2 * MAX_LEAF][MAX_NAME];
            int n_wrt = 0;
            ipt_graph *g = build(ctx, c, IPT_F16, &run, wrt, &n_wrt);
            for (uint32_t i = 0; i < g->n_node; i++)
                seen[g->node[i].op] = true;
            ipt_graph_destroy(&g);
        }
    ipt_ctx_destroy(&ctx);
    for (int i = 0; i < IPT_OP_COUNT; i++)
        if (!seen[i])
            fail_msg("operator %s has no test case", ipt_op_table[i]->name);
}

static int open_gpus(void **state)
{
    static const char *const shape[2] = {"simd", "tile"};
    (void)state;
    for (int i = 0; i < 2; i++) {
        gpus[i].ctx = test_ctx();
        ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"),
                          .kernels = shape[i],
                          .cache_dir = "",
                          .validate = test_wants_validation()};
        ipt_status s = ipt_gpu_create(gpus[i].ctx, &o, &gpus[i].gpu);
        if (s != IPT_OK)
            print_message("%s\n", ipt_last_error(gpus[i].ctx));
        if (s != IPT_OK && s != IPT_ERR_NO_DEVICE)
            return -1; /* a device that does not open is no reason to skip */
    }
    return 0;
}

static int close_gpus(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        ipt_gpu_destroy(&gpus[i].gpu);
        ipt_ctx_destroy(&gpus[i].ctx);
    }
    return 0;
}

int main(void)
{
    static struct CMUnitTest tests[MAX_TESTS];
    static test_state states[MAX_TESTS];
    static const char *const shape[2] = {"simd", "tile"};
    size_t n = 0;
    const char *only = getenv("IPT_TEST_ONLY"); /* substring of test names */
    tests[n++] =
        (struct CMUnitTest){"every row has a case", every_row_has_a_case, NULL, NULL, NULL};
    for (size_t k = 0; k < IPT_COUNT(groups); k++)
        for (const op_case *c = groups[k]; c->name; c++) {
            for (int s = -1; s < 2; s++)
                for (int m = 0; m < (int)IPT_COUNT(modes); m++) {
                    if ((s < 0 && (m > 0 || !c->grad)) || is_idle(c, modes[m].weight) ||
                        (s >= 0 && c->simd_tile && c->simd_tile != s + 1))
                        continue;
                    test_state *t = &states[n];
                    *t = (test_state){.c = c, .mode = m, .shape = s < 0 ? 0 : s};
                    if (s < 0)
                        ipt_name(t->name, sizeof t->name, "%s/gradient", c->name);
                    else
                        ipt_name(t->name, sizeof t->name, "%s/%s/%s", c->name, modes[m].name,
                                 shape[s]);
                    if (only && !strstr(t->name, only))
                        continue;
                    assert_true(n + 1 < MAX_TESTS);
                    tests[n++] =
                        (struct CMUnitTest){t->name, s < 0 ? gradient : parity, NULL, NULL, t};
                }
            for (int m = 0; m < 2 * (int)(IPT_COUNT(modes) + IPT_COUNT(narrows)); m++) {
                const bool is_coop = m % 2;
                const int narrow_at = m / 2 - (int)IPT_COUNT(modes),
                          at = narrow_at < 0 ? m / 2 : narrow_at;
                const ipt_dtype act = narrow_at < 0 ? modes[at].act : narrows[at].act,
                                weight = narrow_at < 0 ? modes[at].weight : narrows[at].weight;
                /* Matrix units take 16-bit operands. */
                if (is_coop ? !has_products(c) || act != IPT_F16 || weight == IPT_Q8 : !is_conv(c))
                    continue;
                test_state *t = &states[n];
                *t = (test_state){.c = c,
                                  .mode = at,
                                  .shape = is_coop ? 1 : 0,
                                  .kernels = is_coop ? COOP : WINOGRAD};
                ipt_name(t->name, sizeof t->name, "%s/%s/%s", c->name,
                         narrow_at < 0 ? modes[at].name : narrows[at].name,
                         is_coop ? "coop" : "winograd");
                if (only && !strstr(t->name, only))
                    continue;
                assert_true(n + 2 < MAX_TESTS);
                tests[n++] =
                    (struct CMUnitTest){t->name, narrow_at < 0 ? parity : narrow, NULL, NULL, t};
            }
            for (int s = 0; s < 2; s++)
                for (int m = 0; m < (int)IPT_COUNT(narrows); m++) {
                    test_state *t = &states[n];
                    *t = (test_state){.c = c, .mode = m, .shape = s};
                    ipt_name(t->name, sizeof t->name, "%s/%s/%s", c->name, narrows[m].name,
                             shape[s]);
                    if ((c->simd_tile && c->simd_tile != s + 1) || is_idle(c, narrows[m].weight) ||
                        (only && !strstr(t->name, only)))
                        continue;
                    assert_true(n + 2 < MAX_TESTS);
                    tests[n++] = (struct CMUnitTest){t->name, narrow, NULL, NULL, t};
                }
        }
    tests[n++] = (struct CMUnitTest){"every row is walked", every_row_is_walked, NULL, NULL, NULL};
    return _cmocka_run_group_tests("ops", tests, n, open_gpus, close_gpus);
}
