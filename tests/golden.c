/* tests/golden.c - see golden.h. */
#include "tests/golden.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sampler/sampler.h"
#include "unet/unet.h"

/* --- golden files ---------------------------------------------------------------------------- */
ipt_safetensors *golden_open(ipt_ctx *ctx, const char *dir, const char *name)
{
    ipt_safetensors *st = NULL;
    char path[1024];
    ipt_name(path, sizeof path, "%s/%s.safetensors", dir, name);
    assert_ok(ctx, ipt_safetensors_open(ctx, path, &st));
    return st;
}

bool golden_has(const ipt_safetensors *st, const char *name)
{
    return ipt_safetensors_find(st, name) != NULL;
}

static const ipt_st_tensor *tensor(const ipt_safetensors *st, const char *name)
{
    const ipt_st_tensor *t = ipt_safetensors_find(st, name);
    if (!t)
        fail_msg("%s: no tensor %s", ipt_safetensors_path(st), name);
    return t;
}

float *golden_f32(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, size_t *n)
{
    const ipt_st_tensor *t = tensor(st, name);
    float *v = ipt_calloc(ctx, t->count, sizeof *v);
    assert_non_null(v);
    ipt_st_to_f32(t, 0, t->count, v);
    if (n)
        *n = t->count;
    return v;
}

int32_t *golden_i32(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, size_t *n)
{
    const ipt_st_tensor *t = tensor(st, name);
    int32_t *v = ipt_calloc(ctx, t->count, sizeof *v);
    assert_non_null(v);
    assert_int_equal(t->dtype, IPT_ST_I32);
    assert_ok(ctx, ipt_st_load(t));
    memcpy(v, t->data, t->bytes);
    if (n)
        *n = t->count;
    return v;
}

void golden_to_nhwc(const float *nchw, const int32_t dim[4], float *nhwc)
{
    size_t c = (size_t)dim[1], p = (size_t)dim[2] * (size_t)dim[3];
    for (size_t n = 0; n < (size_t)dim[0]; n++)
        for (size_t k = 0; k < c; k++)
            for (size_t i = 0; i < p; i++)
                nhwc[(n * p + i) * c + k] = nchw[(n * c + k) * p + i];
}

void golden_to_nchw(const float *nhwc, const int32_t dim[4], float *nchw)
{
    size_t c = (size_t)dim[1], p = (size_t)dim[2] * (size_t)dim[3];
    for (size_t n = 0; n < (size_t)dim[0]; n++)
        for (size_t k = 0; k < c; k++)
            for (size_t i = 0; i < p; i++)
                nchw[(n * c + k) * p + i] = nhwc[(n * p + i) * c + k];
}

float *golden_nhwc(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, int32_t dim[4])
{
    const ipt_st_tensor *t = tensor(st, name);
    int32_t d[4] = {1, 1, 1, 1};
    size_t n = 0;
    float *v = golden_f32(ctx, st, name, &n);
    for (int i = 0; i < t->rank && i < 4; i++)
        d[i] = (int32_t)t->dim[i];
    if (t->rank == 4) {
        float *out = ipt_calloc(ctx, n, sizeof *out);
        assert_non_null(out);
        golden_to_nhwc(v, d, out);
        ipt_free(v);
        v = out;
    }
    if (dim)
        memcpy(dim, d, sizeof d);
    return v;
}

/* --- measures -------------------------------------------------------------------------------- */
double golden_nmse(const float *ref, const float *got, size_t n)
{
    double err = 0, sum = 0;
    for (size_t i = 0; i < n; i++) {
        double e = (double)got[i] - (double)ref[i];
        err += e * e;
        sum += (double)ref[i] * (double)ref[i];
    }
    return sum > 0 ? err / sum : err;
}

double golden_max_diff(const float *ref, const float *got, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - (double)ref[i]);
        if (!(e <= worst)) /* NaN stays */
            worst = e;
        if (isnan(worst))
            return worst;
    }
    return worst;
}

double golden_max_rel(const float *ref, const float *got, size_t n)
{
    double top = 0;
    for (size_t i = 0; i < n; i++)
        top = fmax(top, fabs((double)ref[i]));
    return golden_max_diff(ref, got, n) / (top > 0 ? top : 1);
}

void golden_at_most(double value, double limit, const char *what, ...)
{
    char text[256];
    va_list ap;
    if (value <= limit)
        return;
    va_start(ap, what);
    vsnprintf(text, sizeof text, what, ap);
    va_end(ap);
    fail_msg("%s: %.4g, limit %.4g", text, value, limit);
}

/* --- bench ----------------------------------------------------------------------------------- */
/* A failed test leaves objects behind, and the validation layer has a line for each of them. */
static void print_some(void *user, ipt_log_level level, const char *line)
{
    bench *b = user;
    if (level <= IPT_LOG_WARN && b->n_line++ < 5)
        print_message("%s: %s\n", level == IPT_LOG_ERROR ? "error" : "warning", line);
}

static void set_up(bench *b, const char *kernels)
{
    *b = (bench){.name = kernels ? kernels : "host"};
    if (ipt_ctx_create(print_some, b, &b->ctx) != IPT_OK)
        abort();
    if (!kernels)
        return;
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"),
                      .kernels = kernels,
                      .cache_dir = "",
                      .validate = test_wants_validation()};
    b->gpu_status = ipt_gpu_create(b->ctx, &o, &b->gpu);
}

int bench_run(const struct CMUnitTest *tests, size_t n)
{
    static const char *const kernels[] = {NULL, "simd", "tile"};
    struct CMUnitTest *own = calloc(n, sizeof *own);
    int failed = 0;
    if (!own)
        abort();
    for (size_t i = 0; i < IPT_COUNT(kernels); i++) {
        bench b;
        set_up(&b, kernels[i]);
        memcpy(own, tests, n * sizeof *own);
        for (size_t k = 0; k < n; k++)
            own[k].initial_state = &b;
        print_message("on %s:\n", b.name);
        failed += _cmocka_run_group_tests(b.name, own, n, NULL, NULL);
        uint32_t said = b.gpu ? ipt_gpu_validation_count(b.gpu) : 0;
        if (said)
            print_error("[  FAILED  ] the validation layer reported %u messages\n", said);
        failed += said != 0;
        int lines = b.n_line;
        ipt_gpu_destroy(&b.gpu); /* objects that a passing test left behind are reported here */
        failed += b.n_line != lines;
        ipt_ctx_destroy(&b.ctx);
    }
    free(own);
    return failed;
}

bench *bench_device(void **state, bool f16)
{
    bench *b = bench_ready(state);
    if (!b->gpu) {
        print_message("about devices: nothing to test on the host\n");
        skip();
    }
    if (f16 && !ipt_gpu_traits(b->gpu)->f16_storage) {
        print_message("skipped: the device has no 16-bit storage\n");
        skip();
    }
    return b;
}

bench *bench_ready(void **state)
{
    bench *b = *state;
    if (b->gpu_status == IPT_ERR_NO_DEVICE) {
        print_message("skipped: no Vulkan device\n");
        skip();
    }
    assert_ok(b->ctx, b->gpu_status);
    b->weights = b->act = IPT_F32;
    return b;
}

ipt_model *bench_model(bench *b, const char *path, const char *config_dir)
{
    ipt_model *m = NULL;
    ipt_model_opts o = {.config_dir = config_dir};
    assert_ok(b->ctx, ipt_model_open(b->ctx, path, &o, &m));
    return m;
}

ipt_weights *bench_weights(bench *b, ipt_model *m, int comp)
{
    ipt_weights *w = NULL;
    assert_ok(b->ctx, ipt_model_weights(m, comp, b->gpu, b->weights, NULL, &w));
    return w;
}

ipt_plan *bench_plan(bench *b, ipt_graph **g, ipt_weights *w)
{
    ipt_plan *p = NULL;
    ipt_plan_opts o = {.gpu = b->gpu, .weights = w};
    assert_ok(b->ctx, ipt_graph_status(*g));
    assert_ok(b->ctx, ipt_plan_create(*g, &o, &p));
    ipt_graph_destroy(g);
    return p;
}

/* --- whole parts -------------------------------------------------------------------------------
 */
/* "add" = pooled text, then the sinusoids of the six time ids. */
static void write_add(bench *b, ipt_plan *p, const ipt_unet_config *u, const unet_call *c)
{
    size_t width = (size_t)u->add_in_dim, dim = (size_t)u->add_time_dim, pooled = width - 6 * dim;
    float *add = ipt_calloc(b->ctx, width * (size_t)c->n, sizeof *add);
    assert_non_null(add);
    for (size_t n = 0; n < (size_t)c->n; n++) {
        float *row = add + n * width;
        memcpy(row, c->pooled + n * pooled, pooled * sizeof *row);
        for (size_t i = 0; i < 6; i++)
            ipt_timestep_embedding((double)c->time_ids[n * 6 + i], u->add_time_dim,
                                   u->flip_sin_to_cos, (double)u->freq_shift,
                                   row + pooled + i * dim);
    }
    assert_ok(b->ctx, ipt_plan_write(p, "add", add, width * (size_t)c->n * sizeof *add));
    ipt_free(add);
}

void unet_write(bench *b, ipt_plan *p, const ipt_unet_config *u, const unet_call *c)
{
    size_t n = (size_t)c->n, ch = (size_t)u->channels[0];
    float *t = ipt_calloc(b->ctx, n * ch, sizeof *t);
    assert_non_null(t);
    for (size_t i = 0; i < n; i++)
        ipt_timestep_embedding(c->t[i], u->channels[0], u->flip_sin_to_cos, (double)u->freq_shift,
                               t + i * ch);
    assert_ok(b->ctx, ipt_plan_write(p, "t_emb", t, n * ch * sizeof *t));
    ipt_free(t);
    assert_ok(b->ctx, ipt_plan_write(p, "x", c->x,
                                     n * (size_t)(c->h * c->w * u->in_channels) * sizeof(float)));
    assert_ok(b->ctx, ipt_plan_write(p, "text", c->text,
                                     n * (size_t)(c->tokens * u->cross_dim[0]) * sizeof(float)));
    if (u->text_time)
        write_add(b, p, u, c);
    if (u->time_cond_dim > 0)
        assert_ok(b->ctx, ipt_plan_write(p, "w_emb", c->w_emb,
                                         n * (size_t)u->time_cond_dim * sizeof(float)));
}

void unet_eval(bench *b, ipt_model *m, ipt_weights *w, const unet_call *c, float *eps)
{
    const ipt_unet_config *u = &ipt_model_get_config(m)->unet;
    ipt_unet_key key = {.batch = c->n, .h = c->h, .w = c->w, .tokens = c->tokens, .act = b->act};
    ipt_graph *g = NULL;
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_unet_build(g, u, &key);
    ipt_plan *p = bench_plan(b, &g, w);
    unet_write(b, p, u, c);
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "eps", eps,
                                    (size_t)(c->n * c->h * c->w * u->out_channels) * sizeof *eps));
    ipt_plan_destroy(&p);
}

static void case_times(const ipt_safetensors *st, const char *key, unet_call *c)
{
    const ipt_st_tensor *t = tensor(st, key);
    for (int32_t i = 0; i < c->n; i++)
        c->t[i] = (double)ipt_st_get(t, t->count == (size_t)c->n ? (size_t)i : 0);
}

void unet_case_load(bench *b, const ipt_safetensors *st, const ipt_unet_config *u,
                    const char *suffix, const char *context_key, unet_case *out)
{
    unet_case k = {0};
    char name[64];
    k.own[0] = golden_nhwc(b->ctx, st, ipt_name(name, sizeof name, "sample%s", suffix), k.dim);
    k.call = (unet_call){
        .n = k.dim[0], .h = k.dim[2], .w = k.dim[3], .channels = k.dim[1], .x = k.own[0]};
    k.count = (size_t)k.dim[0] * (size_t)k.dim[1] * (size_t)k.dim[2] * (size_t)k.dim[3];
    assert_in_range(k.call.n, 1, GOLDEN_MAX_BATCH);
    case_times(st, ipt_name(name, sizeof name, "timestep%s", suffix), &k.call);
    k.call.tokens = (int32_t)tensor(st, context_key)->dim[1];
    k.call.text = k.own[1] = golden_f32(b->ctx, st, context_key, NULL);
    if (u->text_time) {
        bool whole = golden_has(st, "unet_pooled");
        k.call.pooled = k.own[2] =
            golden_f32(b->ctx, st, whole ? "unet_pooled" : "pooled_base", NULL);
        ipt_name(name, sizeof name, "%stime_ids%s", whole ? "unet_" : "", suffix);
        k.call.time_ids = k.own[3] = golden_f32(b->ctx, st, name, NULL);
    }
    if (u->time_cond_dim > 0)
        k.call.w_emb = k.own[4] = golden_f32(b->ctx, st, "timestep_cond", NULL);
    *out = k;
}

void unet_case_free(unet_case *c)
{
    for (size_t i = 0; i < IPT_COUNT(c->own); i++)
        ipt_free(c->own[i]);
    *c = (unet_case){0};
}
