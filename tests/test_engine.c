/* tests/test_engine.c - what an engine keeps between requests: models, plans, adapters; and that a
 * request is stopped without touching the next one. */
#include "tests/golden.h"

#include "engine/run.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DATA IPT_TEST_DATA
enum { SIDE = 16, LOOK = 64 }; /* the default model draws nothing on 16 pixels */

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_report rep;
    uint8_t rgb[LOOK * LOOK * 3];
} fixture;

static void print_line(void *user, ipt_log_level level, const char *line)
{
    (void)user;
    if (level == IPT_LOG_ERROR)
        print_message("%s\n", line);
}

static fixture *open_engine(void)
{
    fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    assert_int_equal(ipt_ctx_create(print_line, NULL, &f->ctx), IPT_OK);
    f->engine = test_engine(&f->ctx, IPT_PRECISION_F32, 0);
    return f;
}

static void close_engine(fixture *f)
{
    test_engine_done(&f->engine, &f->ctx);
    free(f);
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    fixture *f = user;
    size_t n = (size_t)im->w * (size_t)im->h * 3;
    assert_true(index == 0 && text && json && n <= sizeof f->rgb);
    memcpy(f->rgb, im->rgb, n);
    return IPT_OK;
}

static void small_request(ipt_request *r, const char *model)
{
    ipt_request_init(r);
    r->model = model;
    r->prompt = "a cat";
    r->width = r->height = SIDE;
    r->steps = 2;
    r->seed = 3;
    r->sampler = "euler_a";
}

static void draw(fixture *f, const ipt_request *r)
{
    memset(f->rgb, 0, sizeof f->rgb);
    assert_ok(f->ctx, ipt_generate(f->engine, r, keep, f, &f->rep));
}

/* --- plans ------------------------------------------------------------------------------------ */
/* Two models, two sizes, with and without a picture's VAE: after the first round nothing is
 * recorded, and the pictures stay what they were. */
static void nothing_is_recorded_twice(void **state)
{
    static const char *const models[] = {DATA "/models/sd1", DATA "/models/sdxl"};
    static uint8_t first[4][sizeof((fixture){0}.rgb)];
    (void)state;
    fixture *f = open_engine();
    for (int i = 0; i < 12; i++) {
        ipt_request r;
        small_request(&r, models[i % 2]);
        r.width = i / 2 % 2 ? 2 * SIDE : SIDE;
        draw(f, &r);
        if (i < 4) {
            assert_true(f->rep.n_plans_recorded > 0);
            memcpy(first[i], f->rgb, sizeof first[i]);
            continue;
        }
        if (f->rep.n_plans_recorded != 0)
            fail_msg("request %d recorded %d plans", i, (int)f->rep.n_plans_recorded);
        assert_memory_equal(first[i % 4], f->rgb, sizeof first[0]);
    }
    close_engine(f);
}

/* Three models in turn: two are kept, and the third is right all the same. */
static void more_models_than_are_kept(void **state)
{
    static const char *const models[] = {DATA "/models/sd1", DATA "/models/sdxl",
                                         DATA "/models/sd2"};
    static uint8_t first[3][sizeof((fixture){0}.rgb)];
    (void)state;
    fixture *f = open_engine();
    for (int i = 0; i < 6; i++) {
        ipt_request r;
        small_request(&r, models[i % 3]);
        r.steps = 1;
        draw(f, &r);
        assert_true(f->rep.n_plans_recorded > 0);
        if (i < 3)
            memcpy(first[i], f->rgb, sizeof first[i]);
        else
            assert_memory_equal(first[i % 3], f->rgb, sizeof first[0]);
    }
    close_engine(f);
}

/* More sizes than plans: the oldest go, and come back as they were. */
static void more_sizes_than_are_kept(void **state)
{
    static uint8_t first[6][sizeof((fixture){0}.rgb)];
    (void)state;
    fixture *f = open_engine();
    for (int i = 0; i < 12; i++) {
        ipt_request r;
        small_request(&r, DATA "/models/sd1");
        r.steps = 1;
        r.width = 8 + 2 * (i % 6);
        draw(f, &r);
        assert_int_equal(f->rep.n_plans_recorded, i == 0 ? 3 : 2);
        if (i < 6)
            memcpy(first[i], f->rgb, sizeof first[i]);
        else
            assert_memory_equal(first[i % 6], f->rgb, sizeof first[0]);
    }
    close_engine(f);
}

/* --- adapters --------------------------------------------------------------------------------- */
static void copy_file(ipt_ctx *ctx, const char *from, const char *to)
{
    char *data = NULL;
    size_t n = 0;
    assert_ok(ctx, ipt_file_read(ctx, from, 1 << 24, &data, &n));
    assert_ok(ctx, ipt_file_write(ctx, to, data, n));
    ipt_free(data);
}

/* Files of one layout in turn: an upload each, nothing is recorded; back to none and to one of
 * another layout: each has its own plans, and every picture is as at first. */
static void another_file_is_an_upload(void **state)
{
    static uint8_t first[4][sizeof((fixture){0}.rgb)];
    char copy[128];
    (void)state;
    fixture *f = open_engine();
    ipt_name(copy, sizeof copy, "/tmp/impasto-same-%ld.safetensors", (long)getpid());
    copy_file(f->ctx, DATA "/golden_lora_kohya.safetensors", copy);
    const char *const file[4] = {DATA "/golden_lora_kohya.safetensors", copy, NULL,
                                 DATA "/golden_lora_locon.safetensors"};
    for (int i = 0; i < 12; i++) {
        ipt_lora lora = {.path = file[i % 4], .weight = 1, .te_weight = 1, .end = 1};
        ipt_request r;
        small_request(&r, DATA "/models/sd1");
        r.steps = 1;
        r.lora = &lora;
        r.n_lora = file[i % 4] ? 1 : 0;
        draw(f, &r);
        if (i < 4) {
            memcpy(first[i], f->rgb, sizeof first[i]);
            assert_int_equal(f->rep.n_plans_recorded == 0, i == 1);
        } else {
            assert_int_equal(f->rep.n_plans_recorded, 0);
            assert_memory_equal(first[i % 4], f->rgb, sizeof first[0]);
        }
        assert_int_equal(f->rep.bytes_uploaded > 0, i % 4 < 2 || i == 3);
    }
    assert_memory_equal(first[0], first[1], sizeof first[0]);
    assert_memory_not_equal(first[0], first[2], SIDE * SIDE * 3);
    assert_memory_not_equal(first[0], first[3], SIDE * SIDE * 3);
    unlink(copy);
    close_engine(f);
}

/* --- stopping --------------------------------------------------------------------------------- */
enum { ROUNDS = 40 };
typedef struct stress {
    ipt_stop stop[ROUNDS];
    atomic_int at; /* the request that runs */
} stress;

/* Asks the stop of the request that runs as it sees it, at odd times: also of one just over. */
static void *stop_some(void *user)
{
    stress *s = user;
    uint64_t seed = 5;
    for (int i = 0; i < ROUNDS;) {
        const struct timespec wait = {.tv_nsec = (long)(ipt_rng_next(&seed) % 40000000)};
        nanosleep(&wait, NULL);
        i = atomic_load(&s->at);
        if (i < ROUNDS && i % 2 == 0)
            ipt_stop_ask(&s->stop[i]);
    }
    return NULL;
}

/* Every second request is stopped somewhere by another thread; the others never are, and give their
 * picture to the bit. */
static void stops_touch_their_request_only(void **state)
{
    static stress s;
    static uint8_t first[sizeof((fixture){0}.rgb)];
    pthread_t thread;
    int stopped = 0;
    ipt_request r;
    (void)state;
    fixture *f = open_engine();
    small_request(&r, DATA "/models/sd1");
    draw(f, &r);
    memcpy(first, f->rgb, sizeof first);
    r.steps = 2;
    assert_int_equal(pthread_create(&thread, NULL, stop_some, &s), 0);
    for (int i = 0; i < ROUNDS; i++) {
        atomic_store(&s.at, i);
        r.stop = &s.stop[i];
        memset(f->rgb, 0, sizeof f->rgb);
        ipt_status got = ipt_generate(f->engine, &r, keep, f, NULL);
        if (got == IPT_ERR_CANCELLED && i % 2 == 0) {
            stopped++;
            continue;
        }
        assert_ok(f->ctx, got);
        assert_memory_equal(first, f->rgb, sizeof first);
    }
    atomic_store(&s.at, ROUNDS);
    assert_int_equal(pthread_join(thread, NULL), 0);
    print_message("%d of %d requests were stopped\n", stopped, ROUNDS / 2);
    close_engine(f);
}

/* Asked before it begins, a request does nothing; the next one with another stop runs. */
static void a_stop_is_not_forgotten(void **state)
{
    ipt_stop asked = {0}, fresh = {0};
    ipt_request r;
    (void)state;
    fixture *f = open_engine();
    small_request(&r, DATA "/models/sd1");
    ipt_stop_ask(&asked);
    for (int i = 0; i < 2; i++) {
        r.stop = &asked;
        assert_int_equal(ipt_generate(f->engine, &r, keep, f, NULL), IPT_ERR_CANCELLED);
        r.stop = i ? &fresh : NULL;
        draw(f, &r);
    }
    ipt_ctx_listen(f->ctx, IPT_LISTEN_ALWAYS, &asked); /* a program that ends */
    assert_int_equal(ipt_generate(f->engine, &r, keep, f, NULL), IPT_ERR_CANCELLED);
    ipt_ctx_listen(f->ctx, IPT_LISTEN_ALWAYS, NULL);
    close_engine(f);
}

/* --- prompts that change ---------------------------------------------------------------------- */
static void expect_pictures(fixture *f, const char *a, const char *b, bool same)
{
    static uint8_t first[sizeof f->rgb];
    ipt_request r;
    small_request(&r, DATA "/models/sd1");
    r.prompt = a;
    draw(f, &r);
    memcpy(first, f->rgb, sizeof first);
    r.prompt = b;
    draw(f, &r);
    if ((memcmp(first, f->rgb, sizeof first) == 0) != same)
        fail_msg("'%s' and '%s' give %s", a, b, same ? "two pictures" : "one picture");
}

/* Edits that are always or never due are the plain prompts; weights of 0 and 1 are as if they were
 * not there; what changes within the steps gives another picture. */
static void prompts_over_steps(void **state)
{
    ipt_request r;
    (void)state;
    fixture *f = open_engine();
    expect_pictures(f, "a cat", "a [cat:dog:9]", true);
    expect_pictures(f, "a dog", "a [cat:dog:0]", true);
    expect_pictures(f, "a dog", "a [cat:dog:0] :1", true);
    expect_pictures(f, "a cat", "a cat AND a dog:0", true);
    expect_pictures(f, "a cat", "a cat AND a dog", false);
    expect_pictures(f, "a cat", "a cat :2", false);
    small_request(&r, DATA "/models/sd1"); /* rows: a negative one and one for each part */
    r.prompt = "a cat AND a [dog|fox]";
    r.steps = 3;
    draw(f, &r);
    assert_int_equal(f->rep.rows_full, 3 * 3);
    r.cfg = 1; /* without guidance AND still needs the negative */
    draw(f, &r);
    assert_int_equal(f->rep.rows_full, 3 * 3);
    r.prompt = "a cat";
    draw(f, &r);
    assert_int_equal(f->rep.rows_full, 3);
    small_request(&r, DATA "/models/lcm");
    r.sampler = "lcm";
    r.prompt = "a AND b";
    assert_int_equal(ipt_generate(f->engine, &r, NULL, NULL, NULL), IPT_ERR_UNSUPPORTED);
    assert_non_null(strstr(ipt_last_error(f->ctx), "AND"));
    close_engine(f);
}

/* --- rows ------------------------------------------------------------------------------------- */
/* What a method may ask for and this engine cannot give is refused by name. */
static void rows_that_are_not_built(void **state)
{
    const ipt_method plain = {.name = "mine"};
    const ipt_row usual = {.want = IPT_WANT_EPS}, odd = {.want = IPT_WANT_EPS, .region = 1};
    ipt_ctx *ctx = NULL;
    (void)state;
    assert_int_equal(ipt_ctx_create(NULL, NULL, &ctx), IPT_OK);
    assert_int_equal(ipt_rows_possible(ctx, &plain, &odd), IPT_ERR_UNSUPPORTED);
    if (!strstr(ipt_last_error(ctx), "regions") || !strstr(ipt_last_error(ctx), "mine"))
        fail_msg("'%s'", ipt_last_error(ctx));
    assert_ok(ctx, ipt_rows_possible(ctx, &plain, &usual));
    ipt_ctx_destroy(&ctx);
}

/* More rows at once than the engine would take by itself. */
static void many_rows_at_once(void **state)
{
    static uint8_t few[sizeof((fixture){0}.rgb)];
    ipt_lora six[6];
    ipt_request r;
    (void)state;
    fixture *f = open_engine();
    for (int i = 0; i < 6; i++)
        six[i] =
            (ipt_lora){DATA "/kinds/locon.safetensors", 0.2F * (float)i, 1, NULL, 0, 1, NULL, NULL};
    small_request(&r, DATA "/models/sd1");
    r.lora = six;
    r.n_lora = 6;
    r.compose = "composite";
    for (int i = 0; i < 2; i++) {
        r.batch = i ? 12 : 0;
        draw(f, &r);
        assert_int_equal(f->rep.rows_full, 12 * 2);
        if (i == 0)
            memcpy(few, f->rgb, sizeof few);
    }
    for (size_t i = 0; i < sizeof few; i++)
        assert_true(abs(few[i] - f->rgb[i]) <= 1);
    close_engine(f);
}

/* --- previews --------------------------------------------------------------------------------- */
typedef struct previews {
    fixture *f;
    int n, last, refuse_at;
    int32_t w, h;
    uint8_t rgb[LOOK * LOOK * 3];
} previews;

static ipt_status take_preview(void *user, const ipt_preview *p)
{
    previews *v = user;
    size_t bytes = (size_t)p->im->w * (size_t)p->im->h * 3;
    assert_true(bytes <= sizeof v->rgb && p->image == 0 && p->step > v->last);
    v->last = p->step;
    v->w = p->im->w;
    v->h = p->im->h;
    memcpy(v->rgb, p->im->rgb, bytes);
    v->n++;
    return v->n == v->refuse_at ? IPT_ERR_OUTPUT : IPT_OK;
}

static ipt_status keep_any(void *user, int32_t index, const ipt_image *im, const char *text,
                           const char *json)
{
    uint8_t *rgb = ((previews *)user)->f->rgb;
    (void)index, (void)text, (void)json;
    assert_true((size_t)im->w * (size_t)im->h * 3 <= sizeof((previews *)user)->f->rgb);
    memcpy(rgb, im->rgb, (size_t)im->w * (size_t)im->h * 3);
    return IPT_OK;
}

/* Correlation of a preview with the means of the picture's squares of side f. */
static double likeness(const uint8_t *rgb, const uint8_t *small, int32_t w, int32_t h, int32_t f)
{
    double n = 0, sx = 0, sy = 0, sxx = 0, syy = 0, sxy = 0;
    for (int32_t y = 0; y < h; y++)
        for (int32_t i = 0; i < 3 * w; i++) {
            double x = 0, v = small[y * 3 * w + i];
            for (int32_t k = 0; k < f * f; k++)
                x += rgb[((y * f + k / f) * w * f + i / 3 * f + k % f) * 3 + i % 3] /
                     (double)(f * f);
            n++, sx += x, sy += v, sxx += x * x, syy += v * v, sxy += x * v;
        }
    return (n * sxy - sx * sy) / sqrt((n * sxx - sx * sx) * (n * syy - sy * sy));
}

/* They come every N steps, change nothing, and the last one looks like the picture; one that is
 * refused ends the request. */
static void previews_look_ahead(void **state)
{
    static uint8_t first[sizeof((fixture){0}.rgb)];
    static previews v;
    char model[512];
    ipt_request r;
    (void)state;
    fixture *f = open_engine();
    v.f = f;
    small_request(&r, ipt_name(model, sizeof model, "%s/models/default", IPT_SOURCE_DIR));
    r.prompt = "a red apple, noto style, on a blue background";
    r.sampler = NULL;
    r.width = r.height = LOOK;
    r.steps = 7;
    r.user = &v;
    assert_ok(f->ctx, ipt_generate(f->engine, &r, keep_any, &v, NULL));
    memcpy(first, f->rgb, sizeof first);
    for (r.preview_every = 0; r.preview_every <= 3; r.preview_every++) {
        v.n = v.last = 0;
        r.preview = take_preview;
        assert_ok(f->ctx, ipt_generate(f->engine, &r, keep_any, &v, NULL));
        assert_memory_equal(first, f->rgb, LOOK * LOOK * 3);
        assert_int_equal(v.n, r.preview_every > 1 ? 7 / r.preview_every : 7);
        if (r.preview_every > 1)
            continue;
        assert_int_equal(v.w, LOOK / 4);
        double like = likeness(first, v.rgb, v.w, v.h, LOOK / v.w);
        if (!(like > 0.84)) /* the best linear map of this VAE: 0.95 */
            fail_msg("the last preview is not like the picture: %g", like);
    }
    v.n = v.last = 0;
    v.refuse_at = 2;
    r.preview_every = 0;
    assert_int_equal(ipt_generate(f->engine, &r, keep_any, &v, NULL), IPT_ERR_OUTPUT);
    assert_int_equal(v.n, 2);
    close_engine(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_is_recorded_twice),
        cmocka_unit_test(more_models_than_are_kept),
        cmocka_unit_test(more_sizes_than_are_kept),
        cmocka_unit_test(another_file_is_an_upload),
        cmocka_unit_test(stops_touch_their_request_only),
        cmocka_unit_test(a_stop_is_not_forgotten),
        cmocka_unit_test(prompts_over_steps),
        cmocka_unit_test(previews_look_ahead),
        cmocka_unit_test(rows_that_are_not_built),
        cmocka_unit_test(many_rows_at_once),
    };
    return cmocka_run_group_tests_name("engine", tests, NULL, NULL);
}
