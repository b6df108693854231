/* tests/test_cache.c - the UNet's outer layers on kept features: the same bits as the whole UNet
 * where nothing is out of date, at every level of every model; when the engine evaluates whole. */
#include "tests/golden.h"

#include "engine/impasto.h"
#include "engine/modules.h"
#include "graph/graph.h"
#include "unet/unet.h"

#include <stdlib.h>
#include <string.h>

#define DATA IPT_TEST_DATA

/* --- one evaluation --------------------------------------------------------------------------- */
static void write_random(bench *b, ipt_plan *p, const char *name, size_t n, uint64_t seed)
{
    float *v = ipt_calloc(b->ctx, n, sizeof *v);
    assert_non_null(v);
    for (size_t i = 0; i < n; i++)
        v[i] = (float)(ipt_rng_next(&seed) >> 40) / 8388608.0F - 1;
    assert_ok(b->ctx, ipt_plan_write(p, name, v, n * sizeof *v));
    ipt_free(v);
}

static ipt_plan *make(bench *b, const ipt_unet_config *c, const ipt_unet_key *key, ipt_weights *w)
{
    ipt_graph *g = NULL;
    const size_t n = (size_t)key->batch;
    assert_ok(b->ctx, ipt_graph_create(b->ctx, &g));
    ipt_unet_build(g, c, key);
    assert_ok(b->ctx, ipt_graph_status(g));
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

static void give(bench *b, ipt_plan *from, ipt_plan *to)
{
    ipt_buffer *src = NULL, *dst = NULL;
    uint64_t at = 0, n = 0, to_at = 0, m = 0;
    assert_ok(b->ctx, ipt_plan_locate(from, "deep", &src, &at, &n));
    assert_ok(b->ctx, ipt_plan_locate(to, "deep", &dst, &to_at, &m));
    assert_true(n == m && n > 0);
    void *v = ipt_alloc(b->ctx, (size_t)n);
    assert_non_null(v);
    assert_ok(b->ctx, ipt_buffer_read(b->gpu, src, at, v, n));
    assert_ok(b->ctx, ipt_buffer_write(b->gpu, dst, to_at, v, n));
    ipt_free(v);
}

/* Levels 0, step, 2 step ... and the last. */
static void outer_layers_of(bench *b, const char *path, int32_t step)
{
    char full_path[512];
    ipt_name(full_path, sizeof full_path, "%s/models/%s", DATA, path);
    ipt_model *m = bench_model(b, full_path, NULL);
    ipt_weights *w = bench_weights(b, m, IPT_COMP_UNET);
    const ipt_unet_config *c = &ipt_model_get_config(m)->unet;
    ipt_unet_key key = {.batch = 2, .h = 9, .w = 14, .tokens = 5, .act = b->act};
    size_t n = 2U * 9 * 14 * (size_t)c->out_channels;
    float *whole = ipt_calloc(b->ctx, n, sizeof *whole),
          *part = ipt_calloc(b->ctx, n, sizeof *part);
    double before = 0;
    assert_true(whole && part);
    const int32_t last = ipt_unet_n_skip(c);
    for (int32_t level = 0; level < last; level += step) {
        key.deep = level + step < last ? level + 1 : last;
        key.is_shallow = false;
        ipt_plan *full = make(b, c, &key, w);
        key.is_shallow = true;
        ipt_plan *shallow = make(b, c, &key, w);
        assert_ok(b->ctx, ipt_plan_run(full, 0));
        assert_ok(b->ctx, ipt_plan_read(full, "eps", whole, n * sizeof *whole));
        give(b, full, shallow);
        assert_ok(b->ctx, ipt_plan_run(shallow, 0));
        assert_ok(b->ctx, ipt_plan_read(shallow, "eps", part, n * sizeof *part));
        if (memcmp(whole, part, n * sizeof *whole) != 0)
            fail_msg("%s, %s: level %d is not the whole UNet to the bit", b->name, path,
                     key.deep - 1);
        double macs = ipt_plan_macs(shallow);
        assert_true(macs > before && macs < ipt_plan_macs(full));
        before = macs;
        ipt_plan_destroy(&full);
        ipt_plan_destroy(&shallow);
    }
    ipt_free(whole);
    ipt_free(part);
    ipt_weights_destroy(&w);
    ipt_model_close(&m);
}

static void outer_layers(void **state)
{
    bench *b = bench_device(state, false);
    outer_layers_of(b, "sd1", 2);
    outer_layers_of(b, "sdxl", 8);
}

static void outer_layers_half(void **state)
{
    bench *b = bench_device(state, true);
    b->weights = b->act = IPT_F16;
    outer_layers_of(b, "sd1", 6);
    b->weights = b->act = IPT_F32;
}

/* --- requests --------------------------------------------------------------------------------- */
enum { SIDE = 16, MAX_PICTURES = 2 };
typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_report rep;
    uint8_t rgb[MAX_PICTURES][SIDE * SIDE * 3];
} fixture;

static int set_up(void **state)
{
    *state = calloc(1, sizeof(fixture));
    return *state ? 0 : -1;
}

static int tear_down(void **state)
{
    fixture *f = *state;
    if (f->engine)
        test_engine_done(&f->engine, &f->ctx);
    free(f);
    return 0;
}

static fixture *ready(void **state)
{
    fixture *f = *state;
    f->engine = test_engine(&f->ctx, IPT_PRECISION_F32, 0);
    return f;
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    fixture *f = user;
    assert_true(index < MAX_PICTURES && im->w == SIDE && im->h == SIDE);
    assert_true(text && json);
    memcpy(f->rgb[index], im->rgb, sizeof f->rgb[0]);
    return IPT_OK;
}

static ipt_request request(const char *cache)
{
    ipt_request r;
    ipt_request_init(&r);
    r.model = DATA "/models/sd1";
    r.prompt = "a cat";
    r.width = r.height = SIDE;
    r.steps = 7;
    r.sampler = "ddim";
    r.seed = 3;
    r.cache = cache;
    return r;
}

static void draw(fixture *f, const ipt_request *r)
{
    assert_ok(f->ctx, ipt_generate(f->engine, r, keep, f, &f->rep));
}

/* One in one is none; a larger interval is another picture; rows are counted by kind. */
static void intervals(void **state)
{
    static const struct {
        const char *cache;
        uint64_t full, shallow;
    } rows[] = {{NULL, 14, 0}, {"1", 14, 0},  {"1:2", 14, 0},
                {"2", 8, 6},   {"3:1", 6, 8}, {"1000", 2, 12}};
    static uint8_t none[sizeof((fixture){0}.rgb[0])];
    fixture *f = ready(state);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_request r = request(rows[i].cache);
        draw(f, &r);
        assert_int_equal(f->rep.rows_full, rows[i].full);
        assert_int_equal(f->rep.rows_shallow, rows[i].shallow);
        if (i == 0)
            memcpy(none, f->rgb[0], sizeof none);
        assert_int_equal(memcmp(none, f->rgb[0], sizeof none) == 0, rows[i].shallow == 0);
    }
}

/* Rows keep their own features, whatever is evaluated at once, and no picture sees another's. */
static void rows_are_apart(void **state)
{
    static const ipt_lora two[] = {
        {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0, 1, NULL, NULL},
        {DATA "/kinds/lokr.safetensors", 0.7F, 1, NULL, 0, 1, NULL, NULL}};
    static uint8_t first[MAX_PICTURES][sizeof((fixture){0}.rgb[0])];
    fixture *f = ready(state);
    ipt_request r = request("3");
    r.lora = two;
    r.n_lora = 2;
    r.compose = "composite";
    r.count = 2;
    draw(f, &r);
    assert_int_equal(f->rep.rows_full, 2 * 4 * 3);
    memcpy(first, f->rgb, sizeof first);
    r.batch = 3; /* two replays, the second filled up */
    draw(f, &r);
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < sizeof first[0]; i++)
            assert_true(abs(first[k][i] - f->rgb[k][i]) <= 1);
    r.batch = 0;
    r.count = 1;
    r.seed++;
    draw(f, &r);
    assert_memory_equal(first[1], f->rgb[0], sizeof first[1]);
}

/* Features of another prompt or of other adapters are not used. */
static void changes_are_seen(void **state)
{
    static const ipt_lora two[] = {
        {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0, 1, NULL, NULL},
        {DATA "/kinds/lokr.safetensors", 0.7F, 1, NULL, 0, 1, NULL, NULL}};
    fixture *f = ready(state);
    ipt_request r = request("7");
    r.prompt = "a [cat:dog:2]";
    draw(f, &r); /* evaluations 0 and 2 of 7 */
    assert_int_equal(f->rep.rows_full, 4);
    r.prompt = "a [cat|dog]"; /* another one each time but the second, as in A1111 */
    draw(f, &r);
    assert_int_equal(f->rep.rows_full, 12);
    r.prompt = "a cat";
    r.lora = two;
    r.n_lora = 2;
    r.compose = "switch"; /* of 7 steps 3, 3 and 1 */
    draw(f, &r);
    assert_int_equal(f->rep.rows_full, 6);
}

/* With adapters beside the weights and in them: the same picture, up to rounding. */
static void with_adapters(void **state)
{
    static const ipt_lora one[] = {
        {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0, 1, NULL, NULL}};
    static uint8_t first[sizeof((fixture){0}.rgb[0])];
    fixture *f = ready(state);
    ipt_request r = request("3:2");
    r.lora = one;
    r.n_lora = 1;
    for (int i = 0; i < 2; i++) {
        r.fold = i ? "always" : "never";
        draw(f, &r);
        assert_int_equal(f->rep.rows_shallow, 8);
        if (i == 0)
            memcpy(first, f->rgb[0], sizeof first);
    }
    for (size_t i = 0; i < sizeof first; i++)
        assert_true(abs(first[i] - f->rgb[0][i]) <= 1);
    draw(f, &r);
    assert_int_equal(f->rep.n_plans_recorded, 0);
}

static void wrong_values(void **state)
{
    static const char *const bad[] = {
        "0", "-1", "x", "3:", "3:x", ":1", "3:1:1", "1001", "3 ", "", "99999999999999999999"};
    fixture *f = ready(state);
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        ipt_request r = request(bad[i]);
        assert_int_equal(ipt_generate(f->engine, &r, keep, f, NULL), IPT_ERR_ARG);
        assert_non_null(strstr(ipt_last_error(f->ctx), "expected N or N:LEVEL"));
    }
    ipt_request r = request("3:6");
    assert_int_equal(ipt_generate(f->engine, &r, keep, f, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "levels 0 to 5"));
}

int main(void)
{
    const struct CMUnitTest evaluations[] = {cmocka_unit_test(outer_layers),
                                             cmocka_unit_test(outer_layers_half)};
    const struct CMUnitTest requests[] = {
#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        CASE(intervals),     CASE(rows_are_apart), CASE(changes_are_seen),
        CASE(with_adapters), CASE(wrong_values),
#undef CASE
    };
    int failed = bench_run_all(evaluations);
    return failed + cmocka_run_group_tests_name("cache", requests, NULL, NULL);
}
