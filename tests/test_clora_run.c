/* tests/test_clora_run.c - CLoRA on a device: maps of the UNet and the gradient through them, and
 * requests: rows that are counted, plans that are kept, kinds of adapters, cancel, what is refused.
 * Numbers against the reference: test_generate's goldens. */
#include "tests/golden.h"

#include "engine/impasto.h"
#include "graph/graph.h"
#include "unet/unet.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#define DATA IPT_TEST_DATA

/* --- one evaluation --------------------------------------------------------------------------- */
static float *randoms(ipt_ctx *ctx, size_t n, uint64_t seed)
{
    float *v = ipt_calloc(ctx, n, sizeof *v);
    assert_non_null(v);
    for (size_t i = 0; i < n; i++)
        v[i] = (float)(ipt_rng_next(&seed) >> 40) / 8388608.0F - 1;
    return v;
}

static void write_random(bench *b, ipt_plan *p, const char *name, size_t n, uint64_t seed)
{
    float *v = randoms(b->ctx, n, seed);
    assert_ok(b->ctx, ipt_plan_write(p, name, v, n * sizeof *v));
    ipt_free(v);
}

static ipt_plan *make(bench *b, const ipt_unet_config *c, const ipt_unet_key *key, ipt_weights *w)
{
    ipt_graph *g = NULL;
    const size_t n = (size_t)key->batch;
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_unet_build(g, c, key);
    ipt_plan *p = bench_plan(b, &g, w);
    write_random(b, p, "x", n * (size_t)key->h * (size_t)key->w * (size_t)c->in_channels, 1);
    write_random(b, p, "t_emb", n * (size_t)c->channels[0], 2);
    write_random(b, p, "text", n * (size_t)key->tokens * (size_t)c->cross_dim[0], 3);
    if (c->text_time)
        write_random(b, p, "add", n * (size_t)c->add_in_dim, 4);
    if (c->time_cond_dim > 0)
        write_random(b, p, "w_emb", n * (size_t)c->time_cond_dim, 5);
    return p;
}

static ipt_model *open_model(bench *b, const char *name, const ipt_unet_config **c)
{
    char path[512];
    ipt_name(path, sizeof path, "%s/models/%s", DATA, name);
    ipt_model *m = bench_model(b, path, NULL);
    *c = &ipt_model_get_config(m)->unet;
    return m;
}

static const char *const MODELS[] = {"sd1", "sd2", "sdxl", "inpaint", "lcm"};

/* What ipt_unet_grid says is what the graph has, at every level of every model. */
static void grids(void **state)
{
    static const int32_t sizes[][2] = {{9, 14}, {5, 7}, {16, 16}, {1, 1}, {2, 31}, {13, 4}};
    bench *b = bench_ready(state);
    for (size_t i = 0; i < IPT_COUNT(MODELS); i++) {
        const ipt_unet_config *c = NULL;
        ipt_model *m = open_model(b, MODELS[i], &c);
        for (size_t s = 0; s < IPT_COUNT(sizes); s++)
            for (int32_t level = -1; level <= c->n_level; level++) {
                int32_t h = sizes[s][0], w = sizes[s][1];
                ipt_graph *g = NULL;
                if (!ipt_unet_grid(c, level, &h, &w))
                    continue;
                ipt_unet_key key = {
                    .batch = 2, .h = sizes[s][0], .w = sizes[s][1], .tokens = 5, .tap = level + 1};
                assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
                ipt_unet_build(g, c, &key);
                assert_ok(b->ctx, ipt_graph_status(g));
                ipt_shape maps = ipt_shape_of(g, ipt_find(g, "maps"));
                if (maps.rank != 3 || maps.dim[0] != 2 || maps.dim[1] != h * w || maps.dim[2] != 5)
                    fail_msg("%s, level %d of %d x %d: [%d,%d,%d], expected %d x %d cells",
                             MODELS[i], level, key.h, key.w, maps.dim[0], maps.dim[1], maps.dim[2],
                             h, w);
                ipt_graph_destroy(&g);
            }
        ipt_model_close(&m);
    }
}

/* A level without cross-attention is a mistake of the caller's, which is told. */
static void grid_without_attention(void **state)
{
    bench *b = bench_ready(state);
    const ipt_unet_config *c = NULL;
    ipt_graph *g = NULL;
    ipt_model *m = open_model(b, "sdxl", &c);
    int32_t h = 8, w = 8;
    ipt_unet_key key = {.batch = 1, .h = 8, .w = 8, .tokens = 5, .tap = 1};
    assert_false(ipt_unet_grid(c, 0, &h, &w));
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_unet_build(g, c, &key);
    assert_int_not_equal(ipt_graph_status(g), IPT_OK);
    ipt_graph_destroy(&g);
    ipt_model_close(&m);
}

/* Every cell looks at all tokens together once; eps is what it is without maps. */
static void maps_are_shares(void **state)
{
    bench *b = bench_ready(state);
    const ipt_unet_config *c = NULL;
    for (size_t i = 0; i < IPT_COUNT(MODELS); i += b->gpu ? 2 : 1) {
        ipt_model *m = open_model(b, MODELS[i], &c);
        ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
        for (int32_t level = c->n_level - 1; level >= 0; level--) {
            ipt_unet_key key = {.batch = 2, .h = 5, .w = 3, .tokens = 9, .tap = level + 1};
            int32_t gh = key.h, gw = key.w;
            if (!ipt_unet_grid(c, level, &gh, &gw))
                continue;
            size_t cells = 2 * (size_t)gh * (size_t)gw, n = 2U * 5 * 3 * (size_t)c->out_channels;
            float *maps = ipt_calloc(b->ctx, cells * 9 + 2 * n, sizeof *maps),
                  *eps = maps + cells * 9;
            assert_non_null(maps);
            ipt_plan *p = make(b, c, &key, w);
            assert_ok(b->ctx, ipt_plan_run(p, 0));
            assert_ok(b->ctx, ipt_plan_read(p, "maps", maps, cells * 9 * sizeof *maps));
            assert_ok(b->ctx, ipt_plan_read(p, "eps", eps, n * sizeof *eps));
            ipt_plan_destroy(&p);
            for (size_t k = 0; k < cells; k++) {
                double sum = 0;
                for (size_t t = 0; t < 9; t++)
                    sum += (double)maps[k * 9 + t];
                golden_at_most(fabs(sum - 1), 1e-5, "%s: %s: a cell's sum", b->name, MODELS[i]);
            }
            key.tap = 0;
            p = make(b, c, &key, w);
            assert_ok(b->ctx, ipt_plan_run(p, 0));
            assert_ok(b->ctx, ipt_plan_read(p, "eps", eps + n, n * sizeof *eps));
            ipt_plan_destroy(&p);
            golden_at_most(golden_max_rel(eps + n, eps, n), 1e-5, "%s: %s: eps", b->name,
                           MODELS[i]); /* other kernels where probabilities are kept */
            ipt_free(maps);
        }
        ipt_weights_destroy(&w);
        ipt_model_close(&m);
    }
}

/* sum(d_maps maps), which a graph that only looks gives for any x. */
static double along(bench *b, ipt_plan *p, const float *x, size_t n_x, const float *d, float *maps,
                    size_t n)
{
    double sum = 0;
    assert_ok(b->ctx, ipt_plan_write(p, "x", x, n_x * sizeof *x));
    assert_ok(b->ctx, ipt_plan_run(p, 0));
    assert_ok(b->ctx, ipt_plan_read(p, "maps", maps, n * sizeof *maps));
    for (size_t i = 0; i < n; i++)
        sum += (double)d[i] * (double)maps[i];
    return sum;
}

static void gradient_of(bench *b, const char *name, int32_t level, int32_t h, int32_t w_px)
{
    const ipt_unet_config *c = NULL;
    ipt_model *m = open_model(b, name, &c);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
    int32_t gh = h, gw = w_px;
    assert_true(ipt_unet_grid(c, level, &gh, &gw));
    ipt_unet_key key = {.batch = 2, .h = h, .w = w_px, .tokens = 6, .tap = level + 1};
    size_t n = 2U * 6 * (size_t)gh * (size_t)gw,
           n_x = 2 * (size_t)h * (size_t)w_px * (size_t)c->in_channels;
    float *d = randoms(b->ctx, n, 7), *x = randoms(b->ctx, n_x, 1), *v = randoms(b->ctx, n_x, 8),
          *near = randoms(b->ctx, n_x, 1), *dx = randoms(b->ctx, n_x, 9),
          *maps = randoms(b->ctx, n, 9);
    ipt_plan *forward = make(b, c, &key, w);
    key.is_grad = true;
    ipt_plan *grad = make(b, c, &key, w);
    assert_ok(b->ctx, ipt_plan_run(grad, 0));
    assert_ok(b->ctx, ipt_plan_write(grad, "d_maps", d, n * sizeof *d));
    assert_ok(b->ctx, ipt_plan_run(grad, 1));
    assert_ok(b->ctx, ipt_plan_read(grad, "d_x", dx, n_x * sizeof *dx));
    double slope = 0, size = 0, h_step = 4e-3;
    for (size_t i = 0; i < n_x; i++) {
        slope += (double)dx[i] * (double)v[i];
        size += (double)dx[i] * (double)dx[i];
    }
    assert_true(size > 0 && isfinite(size));
    double sums[2];
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < n_x; i++)
            near[i] = x[i] + (float)(k ? -h_step : h_step) * v[i];
        sums[k] = along(b, forward, near, n_x, d, maps, n);
    }
    double got = (sums[0] - sums[1]) / (2 * h_step);
    /* h^2, and maps in f32 over h; against the length that a random direction meets */
    golden_at_most(fabs(got - slope) / sqrt(size), 1e-2, "%s: %s, level %d: slope %g, %g", b->name,
                   name, level, slope, got);
    ipt_plan_destroy(&forward);
    ipt_plan_destroy(&grad);
    float *all[] = {d, x, v, near, dx, maps};
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        ipt_free(all[i]);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
}

static void gradients(void **state)
{
    bench *b = bench_ready(state);
    gradient_of(b, "sd1", 0, 3, 5);
    gradient_of(b, "inpaint", 1, 5, 3);
    if (b->gpu) /* whose kernels test_ops knows */
        return;
    gradient_of(b, "sd1", 1, 6, 4);
    gradient_of(b, "sd2", 1, 9, 5);
    gradient_of(b, "sdxl", 2, 5, 6);
}

/* What lies behind the last tapped layer is in no gradient plan: the deeper, the less. */
static void plans_end_where_they_may(void **state)
{
    bench *b = bench_device(state, false);
    const ipt_unet_config *c = NULL;
    ipt_model *m = open_model(b, "sd2", &c);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
    ipt_unet_key key = {.batch = 1, .h = 16, .w = 16, .tokens = 8, .tap = 1};
    double macs[3] = {0}, whole = 0;
    size_t n[3] = {0};
    for (int32_t level = 0; level < 3; level++) {
        key.tap = level + 1;
        key.is_grad = true;
        ipt_plan *p = make(b, c, &key, w);
        macs[level] = ipt_plan_macs(p);
        n[level] = ipt_plan_n_dispatch(p);
        ipt_plan_destroy(&p);
    }
    key.is_grad = false;
    ipt_plan *p = make(b, c, &key, w);
    whole = ipt_plan_macs(p);
    ipt_plan_destroy(&p);
    assert_true(macs[2] < macs[1] && macs[1] < macs[0] && n[2] < n[1] && n[1] < n[0]);
    assert_true(macs[2] < 2 * whole && macs[0] < 4 * whole); /* there, and back */
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
}

/* --- requests --------------------------------------------------------------------------------- */
enum { SIDE = 16, MOST_SLOTS = 6 };
typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_report rep;
    ipt_request r;
    ipt_lora lora[MOST_SLOTS];
    const char *opt[4];
    char trace[64], said[512];
    uint8_t rgb[SIDE * SIDE * 3];
    int pictures;
} fixture;

static void keep_line(void *user, ipt_log_level level, const char *line)
{
    fixture *f = user;
    if (level <= IPT_LOG_WARN)
        ipt_name(f->said, sizeof f->said, "%s", line);
}

static int set_up(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    if (!f)
        return -1;
    *state = f;
    ipt_name(f->trace, sizeof f->trace, "/tmp/impasto-clora-%ld.safetensors", (long)getpid());
    return 0;
}

static int tear_down(void **state)
{
    fixture *f = *state;
    unlink(f->trace);
    if (f->engine)
        test_engine_done(&f->engine, &f->ctx);
    free(f);
    return 0;
}

static const char *const FILES[] = {
    DATA "/golden_lora_kohya.safetensors", DATA "/golden_lora_locon.safetensors",
    DATA "/golden_lora_locon_cp.safetensors", DATA "/kinds/locon.safetensors",
    DATA "/kinds/loha.safetensors"};

/* A request with the first adapters bound to the words; NULL: a style. */
static void ask(fixture *f, const char *model, const char *const *word, size_t n)
{
    ipt_request_init(&f->r);
    f->r.model = model;
    f->r.prompt = "a cat and a dog, a fox, a cow";
    f->r.width = f->r.height = SIDE;
    f->r.steps = 2;
    f->r.sampler = "euler";
    f->r.seed = 5;
    f->r.compose = "clora";
    f->r.compose_opt = f->opt;
    f->r.lora = f->lora;
    f->r.n_lora = n;
    for (size_t i = 0; i < n; i++)
        f->lora[i] = (ipt_lora){FILES[i], 0.8F, 0.5F, word[i], 0, 1, NULL, NULL};
}

static const char *const ANIMALS[] = {"cat", "dog", "fox", "cow"};

static fixture *ready(void **state, ipt_precision precision)
{
    fixture *f = *state;
    if (ipt_ctx_create(keep_line, f, &f->ctx) != IPT_OK)
        fail_msg("no memory for a context");
    f->engine = test_engine(&f->ctx, precision, 0);
    return f;
}

static void options(fixture *f, const char *a, const char *b, const char *c)
{
    const char *const all[] = {a, b, c};
    f->r.n_compose_opt = 0;
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        if (all[i])
            f->opt[f->r.n_compose_opt++] = all[i];
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    fixture *f = user;
    assert_true(index >= 0 && im->w == SIDE && im->h == SIDE && text && json);
    memcpy(f->rgb, im->rgb, sizeof f->rgb);
    f->pictures++;
    return IPT_OK;
}

static void draw(fixture *f)
{
    assert_ok(f->ctx, ipt_generate(f->engine, &f->r, keep, f, &f->rep));
}

static void refused(fixture *f, const char *says)
{
    ipt_status s = ipt_generate(f->engine, &f->r, keep, f, NULL);
    if (s != IPT_ERR_ARG || !strstr(ipt_last_error(f->ctx), says))
        fail_msg("%s: '%s', expected '%s'", ipt_status_name(s), ipt_last_error(f->ctx), says);
}

/* A tensor of the request's trace; ipt_free. */
static float *traced(fixture *f, const char *name, size_t *n)
{
    ipt_safetensors *st = NULL;
    f->r.trace = f->trace;
    assert_ok(f->ctx, ipt_safetensors_open(f->ctx, f->trace, &st));
    float *v = golden_f32(f->ctx, st, name, n);
    ipt_safetensors_close(&st);
    return v;
}

static float *draw_traced(fixture *f, const char *name, size_t *n)
{
    f->r.trace = f->trace;
    draw(f);
    return traced(f, name, n);
}

/* One concept everywhere and no updates is the plain adapter, bit for bit. */
static void one_is_the_adapter(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    size_t n = 0, k = 0;
    ask(f, DATA "/models/sd1", ANIMALS, 1);
    options(f, "masks=full", "update=off", NULL);
    f->r.fold = "never";
    float *got = draw_traced(f, "latent_step1", &n);
    assert_int_equal(f->rep.rows_full, 4);
    assert_int_equal(f->rep.rows_maps + f->rep.rows_backward, 0);
    f->r.compose = NULL;
    f->r.n_compose_opt = 0;
    f->lora[0].word = NULL;
    float *want = draw_traced(f, "latent_step1", &k);
    assert_true(n == k && n > 0);
    assert_memory_equal(got, want, n * sizeof *got);
    ipt_free(got);
    ipt_free(want);
}

/* Rows of four steps, two concepts: updates at steps 0 (three) and 1 (one). */
static void rows_are_counted(void **state)
{
    static const struct {
        const char *opt[3];
        uint64_t full, maps, back;
    } rows[] = {
        {{"refine=2"}, 24, 12, 12},
        {{"refine=2", "refresh=off"}, 24, 12, 12},
        {{"refine=1", "maps=both"}, 24, 3 * 9, 18}, /* six in two goes, the first one twice */
        {{"refine=0", "masks=full"}, 16, 6, 6},
        {{"refine=0", "masks=full", "refresh=off"}, 20, 6, 6},
        {{"update=off"}, 24, 0, 0},
        {{"update=off", "masks=full"}, 16, 0, 0},
        {{"refine=1", "until=1"}, 24, 18, 18}, /* two, one, two, one */
    };
    fixture *f = ready(state, IPT_PRECISION_F32);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ask(f, DATA "/models/sd1", ANIMALS, 2);
        f->r.steps = 4;
        options(f, rows[i].opt[0], rows[i].opt[1], rows[i].opt[2]);
        f->opt[f->r.n_compose_opt++] = "every=0.5";
        draw(f);
        if (f->rep.rows_full != rows[i].full || f->rep.rows_maps != rows[i].maps ||
            f->rep.rows_backward != rows[i].back || f->rep.rows_shallow != 0)
            fail_msg("row %zu: %d full, %d maps, %d backward", i, (int)f->rep.rows_full,
                     (int)f->rep.rows_maps, (int)f->rep.rows_backward);
    }
    options(f, "refine=0", NULL, NULL); /* the same is recorded, and other weights are numbers */
    draw(f);
    f->lora[0].weight = 0.1F;
    f->r.seed++;
    draw(f);
    assert_true(f->rep.n_plans_recorded == 0 && f->rep.bytes_uploaded == 0);
}

/* By how much the latent moves when rows are evaluated one by one: not at all. */
static void batches_are_no_matter(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    size_t n = 0, k = 0;
    ask(f, DATA "/models/sd1", ANIMALS, 4);
    options(f, "refine=0", "maps=both", NULL);
    float *all = draw_traced(f, "latent_step1", &n);
    f->r.batch = 3;
    float *few = draw_traced(f, "latent_step1", &k);
    assert_true(n == k && n > 0);
    golden_at_most(golden_nmse(all, few, n), 1e-9, "rows in batches of three");
    ipt_free(all);
    ipt_free(few);
}

/* Words of every kind of prompt: in the second chunk, edited, of an inversion. */
static void prompts(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    char text[512], folder[64], path[128], *at = text;
    float v[48];
    size_t n = 0;
    for (int i = 0; i < 80; i++, at += 2)
        memcpy(at, "a ", 3);
    strcpy(at, "cat and a dog");
    ask(f, DATA "/models/sd1", ANIMALS, 2);
    options(f, "refine=0", "threshold=0.9", NULL);
    f->r.prompt = text;
    ipt_free(draw_traced(f, "map_step0", &n));
    assert_int_equal(n, 3 * 64 * 154); /* [worlds, cells, tokens] */
    ipt_free(draw_traced(f, "grad_step0", &n));
    f->r.prompt = "a [big|fat] (cat:1.3) and a [red::1] dog";
    f->r.steps = 3;
    f->lora[0].word = "cat=sks cat";
    draw(f);
    f->r.prompt = "a [cat:fish:1] and a dog";
    refused(f, "the word 'cat' of");
    f->r.prompt = "a cat AND a dog";
    refused(f, "clora reads one prompt; AND joins 2");
    f->r.prompt = "a dog and a cat2";
    refused(f, "is not in the prompt 'a dog and a cat2'");
    f->r.prompt = "a scat, a cat2, a cat and a dog"; /* the one that stands alone */
    f->lora[0].word = "cat";
    draw(f);

    for (int i = 0; i < 48; i++)
        v[i] = 0.3F * (float)(i % 5) - 0.5F;
    const ipt_st_write t = {"emb_params", IPT_ST_F32, 2, {3, 16}, v};
    ipt_name(folder, sizeof folder, "/tmp/impasto-words-%ld", (long)getpid());
    assert_int_equal(mkdir(folder, 0700), 0);
    ipt_name(path, sizeof path, "%s/zot.safetensors", folder);
    assert_ok(f->ctx, ipt_safetensors_write(f->ctx, path, &t, 1, NULL, 0));
    const char *folders[] = {folder};
    f->r.embedding_dirs = folders;
    f->r.n_embedding_dirs = 1;
    f->r.prompt = "a zot and a dog";
    f->lora[0].word = "zot";
    draw(f);
    unlink(path);
    rmdir(folder);
}

static void what_is_refused(void **state)
{
    static const char *const none[] = {NULL, NULL};
    fixture *f = ready(state, IPT_PRECISION_F32);
    ask(f, DATA "/models/sd1", none, 2);
    refused(f, "clora: no adapter is bound to a word of the prompt; give --lora FILE@WORD");
    ask(f, DATA "/models/sd1", ANIMALS, 2);
    f->r.cache = "3";
    refused(f, "cache 3: compose method clora reads attention in every evaluation");
    options(f, "update=off", "masks=mean", NULL);
    draw(f); /* which reads none */
    assert_true(f->rep.rows_shallow > 0);
    f->r.cache = NULL;
    options(f, "grid=2", NULL, NULL);
    refused(f, "clora: grid=2: this model's unet has no cross-attention there");
    options(f, NULL, NULL, NULL);
    f->lora[1].path = f->lora[0].path;
    refused(f, "is given twice; an adapter is one concept or one style");
    ask(f, DATA "/models/sd1", ANIMALS, 2);
    f->r.prompt = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx and a dog";
    f->lora[0].word = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";
    refused(f, "tokens, expected 24 at most");
}

/* Every kind of adapter as a concept: finite, and another gradient than without it. */
static void every_kind(void **state)
{
    static const char *const names[] = {"boft",  "dora", "full", "glora", "ia3",
                                        "krona", "loha", "lokr", "norm",  "oft"};
    fixture *f = ready(state, IPT_PRECISION_F32);
    float *first = NULL;
    char path[512];
    size_t n = 0;
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        ask(f, DATA "/models/sd1", ANIMALS, 2);
        f->r.steps = 1;
        f->r.width = f->r.height = SIDE;
        options(f, "refine=0", "until=1", "masks=full");
        ipt_name(path, sizeof path, "%s/kinds/%s.safetensors", DATA, names[i]);
        f->lora[0].path = path;
        f->lora[0].te_weight = 0;
        float *with = draw_traced(f, "grad_step0", &n);
        if (!first) {
            f->lora[0].weight = 0;
            first = draw_traced(f, "grad_step0", &n);
        }
        for (size_t k = 0; k < n; k++)
            assert_true(isfinite(with[k]));
        double apart = golden_nmse(first, with, n);
        if (!(apart > 1e-10 && apart < 1e6))
            fail_msg("%s: the gradient differs by %g from that without", names[i], apart);
        ipt_free(with);
    }
    ipt_free(first);
}

/* Gradients near 0, and of a sharp loss, are gradients. */
static void sharp_losses(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    size_t n = 0;
    for (int i = 0; i < 2; i++) {
        ask(f, DATA "/models/sd1", ANIMALS, 2);
        f->said[0] = 0;
        options(f, "tau=0.01", "refine=2", i ? "step_size=1e6" : NULL);
        float *grad = draw_traced(f, "grad_step0", &n);
        for (size_t k = 0; k < n; k++)
            assert_true(isfinite(grad[k]));
        assert_string_equal(f->said, "");
        ipt_free(grad);
    }
}

static void half_precision(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    size_t n = 0, k = 0;
    ask(f, DATA "/models/sd1", ANIMALS, 2);
    options(f, "refine=0", NULL, NULL);
    float *want = draw_traced(f, "grad_step0", &n);
    f->r.precision = "f16";
    float *got = draw_traced(f, "grad_step0", &k);
    assert_true(n == k && n > 0);
    double apart = golden_max_rel(want, got, n);
    golden_at_most(apart, 2e-2, "gradient with f16 weights"); /* 11 bits, some tens of layers */
    assert_true(apart > 0);
    ipt_free(got);
    ipt_free(want);
}

/* A small adapter for the middle of the tiny inpainting model. */
static void write_adapter(fixture *f, const char *path, uint64_t seed)
{
    enum { WIDTH = 8, RANK = 2 };
#define KEY(leaf) "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q." leaf
    float *v = randoms(f->ctx, (size_t)2 * WIDTH * RANK, seed);
    const ipt_st_write t[] = {{KEY("lora_down.weight"), IPT_ST_F32, 2, {RANK, WIDTH}, v},
                              {KEY("lora_up.weight"), IPT_ST_F32, 2, {WIDTH, RANK}, v + 16}};
#undef KEY
    assert_ok(f->ctx, ipt_safetensors_write(f->ctx, path, t, IPT_COUNT(t), NULL, 0));
    ipt_free(v);
}

/* Nine channels: those that are given stay as they are, the latent's four move. */
static void inpainting(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    uint8_t rgb[SIDE * SIDE * 3], white[SIDE * SIDE * 3];
    ipt_image init = {SIDE, SIDE, rgb}, mask = {SIDE, SIDE, white};
    char path[2][64];
    size_t n = 0, k = 0;
    for (size_t i = 0; i < sizeof rgb; i++) {
        rgb[i] = (uint8_t)(i * 37 % 251);
        white[i] = i / 3 % SIDE < SIDE / 2 ? 255 : 0;
    }
    ask(f, DATA "/models/inpaint", ANIMALS, 2);
    for (int i = 0; i < 2; i++) {
        ipt_name(path[i], sizeof path[i], "/tmp/impasto-lora-%ld-%d.safetensors", (long)getpid(),
                 i);
        write_adapter(f, path[i], (uint64_t)i);
        f->lora[i].path = path[i];
    }
    f->r.init = &init;
    f->r.mask = &mask;
    f->r.steps = 3;
    options(f, "refine=1", NULL, NULL);
    float *grad = draw_traced(f, "grad_step0", &n), *moved = traced(f, "moved_step0", &k);
    assert_int_equal(n, 4 * 8 * 8);
    assert_int_equal(k, n);
    double size = 0;
    for (size_t i = 0; i < n; i++) {
        assert_true(isfinite(grad[i]) && isfinite(moved[i]));
        size += fabs((double)grad[i]);
    }
    assert_true(size > 0);
    ipt_free(grad);
    ipt_free(moved);
    for (int i = 0; i < 2; i++)
        unlink(path[i]);
}

/* More concepts take more time, not more memory. */
static void memory_is_of_few_rows(void **state)
{
    fixture *f = *state;
    uint64_t peak[2] = {0};
    for (int i = 0; i < 2; i++) {
        f = ready(state, IPT_PRECISION_F32);
        ask(f, DATA "/models/sd1", ANIMALS, 4);
        if (i == 0) /* the same adapters, two of them styles */
            f->lora[2].word = f->lora[3].word = NULL;
        f->r.steps = 1;
        options(f, "refine=0", "until=1", NULL);
        draw(f);
        peak[i] = f->rep.peak_device_bytes;
        test_engine_done(&f->engine, &f->ctx);
    }
    if (!(peak[0] > 0 && (double)peak[1] <= 1.25 * (double)peak[0]))
        fail_msg("%d bytes with two concepts, %d with four", (int)peak[0], (int)peak[1]);
}

/* --- cancel ----------------------------------------------------------------------------------- */
static ipt_stop stop;
static void stop_now(int number)
{
    (void)number;
    ipt_stop_ask(&stop);
}

/* In the middle of a thousand rounds of one step. */
static void cancel_within_a_round(void **state)
{
    fixture *f = ready(state, IPT_PRECISION_F32);
    struct sigaction on = {.sa_handler = stop_now}, was;
    const struct itimerval soon = {.it_value = {.tv_usec = 300000}};
    ask(f, DATA "/models/sd1", ANIMALS, 2);
    options(f, "refine=0", NULL, NULL);
    draw(f);
    double t = ipt_now_ms(), round = 0;
    options(f, "refine=19", NULL, NULL);
    draw(f);
    round = (ipt_now_ms() - t) / 20;
    options(f, "refine=1000", "every=1e-9", "until=1");
    f->r.steps = 50;
    f->r.stop = &stop;
    f->pictures = 0;
    sigaction(SIGALRM, &on, &was);
    t = ipt_now_ms();
    setitimer(ITIMER_REAL, &soon, NULL);
    assert_int_equal(ipt_generate(f->engine, &f->r, keep, f, NULL), IPT_ERR_CANCELLED);
    double ms = ipt_now_ms() - t - 300;
    sigaction(SIGALRM, &was, NULL);
    if (ms > 20 * round + 500) /* one is meant; the machine may be busy */
        fail_msg("%.0f ms after it was asked, a round takes %.0f", ms, round);
    assert_int_equal(f->pictures, 0);
    ask(f, DATA "/models/sd1", ANIMALS, 2); /* the engine is usable at once */
    options(f, "refine=0", NULL, NULL);
    draw(f);
    assert_int_equal(f->rep.n_plans_recorded, 0);
}

int main(void)
{
    const struct CMUnitTest evaluations[] = {
        cmocka_unit_test(grids), cmocka_unit_test(grid_without_attention),
        cmocka_unit_test(gradients), cmocka_unit_test(maps_are_shares),
        cmocka_unit_test(plans_end_where_they_may)};
    const struct CMUnitTest requests[] = {
#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        CASE(one_is_the_adapter),
        CASE(rows_are_counted),
        CASE(batches_are_no_matter),
        CASE(prompts),
        CASE(what_is_refused),
        CASE(every_kind),
        CASE(sharp_losses),
        CASE(half_precision),
        CASE(inpainting),
        CASE(memory_is_of_few_rows),
        CASE(cancel_within_a_round),
#undef CASE
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    int failed = bench_run_all(evaluations);
    return failed + cmocka_run_group_tests_name("clora_run", requests, NULL, NULL);
}
