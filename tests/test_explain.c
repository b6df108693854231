/* tests/test_explain.c - what is told beside a picture: the method's masks, and what each adapter
 * did; as numbers, and as the files that impasto generate writes. */
#include "tests/golden.h"
#include "tests/program.h"

#include "engine/frequency.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SIDE = 32, MOST_CELLS = 32 * 32, MOST = 4, STEPS = 4 };
#define SD1 GOLDEN("models/sd1")

static int set_up(void **state)
{
#ifdef IPT_PROGRAM
    return place_create(state, IPT_PROGRAM);
#else
    return place_create(state, "");
#endif
}

/* --- requests --------------------------------------------------------------------------------- */
/* What a request gave: the last picture, and what came beside it. */
typedef struct seen {
    uint8_t rgb[SIDE * SIDE * 3];
    int n_picture, n_masks;
    int32_t h, w;
    size_t n_mask;
    float mask[MOST][MOST_CELLS];
    int n_explain;
    int32_t n_step, step[STEPS];
    size_t n_effect, n_words[MOST];
    float power[STEPS];
    ipt_effect effect[MOST]; /* what it points to is gone, but for: */
    float energy[MOST][MOST_CELLS], words[MOST][MOST_CELLS], when[MOST][STEPS], share[MOST][STEPS];
    ipt_status answer; /* of the callback */
} seen;

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_lora lora[2];
    ipt_request r;
    ipt_report rep;
} fixture;

static fixture open_fixture(void)
{
    static const ipt_lora both[2] = {
        {GOLDEN("golden_lora_peft.safetensors"), 0.8F, 0.8F, "cat", 0, 1, NULL, NULL},
        {GOLDEN("golden_lora_kohya.safetensors"), 1, 1, "dog", 0, 1, NULL, NULL}};
    fixture f = {0};
    f.engine = test_engine(&f.ctx, IPT_PRECISION_F32, 0);
    memcpy(f.lora, both, sizeof both);
    ipt_request_init(&f.r);
    f.r.model = SD1;
    f.r.prompt = "a cat and a dog";
    f.r.width = f.r.height = SIDE;
    f.r.steps = 3;
    f.r.sampler = "ddim";
    f.r.seed = 5;
    f.r.fold = "never";
    f.r.n_lora = 2;
    return f;
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    seen *s = user;
    assert_true(im->w == SIDE && im->h == SIDE && index == s->n_picture && text && json);
    memcpy(s->rgb, im->rgb, sizeof s->rgb);
    s->n_picture++;
    return IPT_OK;
}

static ipt_status keep_masks(void *user, const ipt_masks *m)
{
    seen *s = user;
    assert_true(m->n <= MOST && m->h * m->w <= MOST_CELLS && m->image == s->n_masks);
    assert_int_equal(s->n_picture, s->n_masks + 1);
    assert_memory_equal(m->im->rgb, s->rgb, sizeof s->rgb);
    s->n_masks++;
    s->n_mask = m->n;
    s->h = m->h;
    s->w = m->w;
    for (size_t k = 0; k < m->n; k++) {
        assert_true(m->mask[k].name && m->mask[k].word);
        memcpy(s->mask[k], m->mask[k].v, (size_t)m->h * (size_t)m->w * sizeof(float));
    }
    return IPT_OK;
}

static void copy(float *to, const float *v, size_t n)
{
    assert_true(n <= MOST_CELLS);
    memcpy(to, v, n * sizeof *v);
}

static ipt_status keep_explanation(void *user, const ipt_explanation *x)
{
    seen *s = user;
    size_t steps = (size_t)x->n_step;
    assert_true(x->n <= MOST && x->n_step <= STEPS && x->image == s->n_explain);
    assert_int_equal(s->n_picture, s->n_explain + 1);
    assert_memory_equal(x->im->rgb, s->rgb, sizeof s->rgb);
    s->n_explain++;
    s->n_step = x->n_step;
    s->n_effect = x->n;
    s->h = x->h;
    s->w = x->w;
    memcpy(s->step, x->step, steps * sizeof *x->step);
    copy(s->power, x->power, steps);
    for (size_t k = 0; k < x->n; k++) {
        const ipt_effect *f = &x->effect[k];
        assert_non_null(f->name);
        s->effect[k] = *f;
        s->n_words[k] = f->words ? (size_t)f->words_h * (size_t)f->words_w : 0;
        copy(s->energy[k], f->energy, (size_t)x->h * (size_t)x->w);
        copy(s->when[k], f->when, steps);
        copy(s->share[k], f->share, steps);
        if (f->words)
            copy(s->words[k], f->words, s->n_words[k]);
    }
    return s->answer;
}

static ipt_status draw(fixture *f, seen *s)
{
    ipt_status answer = s->answer;
    memset(s, 0, sizeof *s);
    s->answer = answer;
    f->r.lora = f->lora;
    f->r.masks_user = f->r.explain_user = s;
    return ipt_generate(f->engine, &f->r, keep, s, &f->rep);
}

static void close_fixture(fixture *f) { test_engine_done(&f->engine, &f->ctx); }

/* --- masks ------------------------------------------------------------------------------------ */
/* They are those of the last evaluation, and asking for them changes nothing. */
static void masks_are_the_methods(void **state)
{
    static seen plain, asked;
    static const char *const opt[] = {"refine=1"};
    char path[PATH_MAX];
    size_t n = 0;
    const place *p = *state;
    fixture f = open_fixture();
    f.r.compose = "clora";
    f.r.compose_opt = opt;
    f.r.n_compose_opt = 1;
    f.r.count = 2;
    assert_ok(f.ctx, draw(&f, &plain));
    f.r.masks = keep_masks;
    assert_ok(f.ctx, draw(&f, &asked));
    assert_memory_equal(plain.rgb, asked.rgb, sizeof plain.rgb);
    assert_int_equal(asked.n_masks, 2);
    f.r.count = 1;
    f.r.trace = in(p, path, "masks.safetensors");
    assert_ok(f.ctx, draw(&f, &asked));
    ipt_safetensors *st = golden_open(f.ctx, p->dir, "masks");
    float *want = golden_f32(f.ctx, st, "mask_step2", &n);
    size_t cells = (size_t)asked.h * (size_t)asked.w;
    assert_true(asked.n_mask == 2 && n == 2 * cells);
    for (size_t k = 0; k < 2; k++)
        assert_memory_equal(want + k * cells, asked.mask[k], cells * sizeof *want);
    ipt_free(want);
    ipt_safetensors_close(&st);
    close_fixture(&f);
}

static void methods_without_masks(void **state)
{
    static const char *const names[] = {NULL, "switch", "composite", "cmlora"};
    static seen s;
    (void)state;
    fixture f = open_fixture();
    f.r.masks = keep_masks;
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        f.r.compose = names[i];
        assert_int_equal(draw(&f, &s), IPT_ERR_ARG);
        assert_non_null(strstr(ipt_last_error(f.ctx), "makes no masks; methods that do: clora"));
        assert_int_equal(s.n_picture, 0);
    }
    close_fixture(&f);
}

/* --- what adapters did ------------------------------------------------------------------------ */
static double mean_of(const float *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)v[i] / (double)n;
    return sum;
}

static double mean_square(const float *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)v[i] * (double)v[i] / (double)n;
    return sum;
}

/* The numbers of one explanation fit each other. */
static void expect_sums(const seen *s)
{
    size_t cells = (size_t)s->h * (size_t)s->w;
    for (size_t k = 0; k < s->n_effect; k++) {
        const ipt_effect *f = &s->effect[k];
        double all = mean_of(s->when[k], (size_t)s->n_step);
        golden_at_most(fabs(mean_of(s->energy[k], cells) - all), 1e-5 * all, "adapter %zu", k);
        for (int32_t i = 0; i < s->n_step; i++)
            golden_at_most(
                fabs((double)s->share[k][i] * (double)s->power[i] - (double)s->when[k][i]),
                1e-5 * all, "adapter %zu, step %d", k, i);
        assert_true(f->high > 0 && f->high < 1 && f->band[0] > 0);
    }
}

/* Pictures are the same to the bit with every method, also where features are kept and where a step
 * has two evaluations; rows that say the same are evaluated once. */
static void pictures_stay_the_same(void **state)
{
    static const char *const opt[] = {"refine=1", "refresh=off"};
    static const struct {
        const char *compose, *cache, *sampler;
        size_t n_opt;
        uint64_t rows; /* for three steps */
    } rows[] = {
        {"merge", NULL, "ddim", 0, 12},    {"merge", NULL, "heun", 0, 12},
        {"merge", "3", "ddim", 0, 16},     {"switch", NULL, "ddim", 0, 6},
        {"composite", NULL, "ddim", 0, 6}, {"cmlora", NULL, "ddim", 0, 0},
        {"clora", NULL, "euler_a", 1, 0},  {"clora", NULL, "ddim", 2, 0},
    };
    static seen plain, asked;
    (void)state;
    fixture f = open_fixture();
    f.r.compose_opt = opt;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        f.r.compose = rows[i].compose;
        f.r.cache = rows[i].cache;
        f.r.sampler = rows[i].sampler;
        f.r.n_compose_opt = rows[i].n_opt;
        f.r.explain = NULL;
        assert_ok(f.ctx, draw(&f, &plain));
        uint64_t full = f.rep.rows_full, shallow = f.rep.rows_shallow;
        assert_int_equal(f.rep.rows_explain, 0);
        f.r.explain = keep_explanation;
        assert_ok(f.ctx, draw(&f, &asked));
        assert_memory_equal(plain.rgb, asked.rgb, sizeof plain.rgb);
        assert_true(f.rep.rows_full == full && f.rep.rows_shallow == shallow);
        assert_true(asked.n_explain == 1 && asked.n_effect == 2 && asked.n_step == 3);
        if (rows[i].rows > 0 && f.rep.rows_explain != rows[i].rows)
            fail_msg("%s: %d rows for it, expected %d", rows[i].compose, (int)f.rep.rows_explain,
                     (int)rows[i].rows);
        expect_sums(&asked);
    }
    close_fixture(&f);
}

/* The same where words and adapters have places.  Adapters of which the method makes one are one.
 */
static void places_and_joined_adapters(void **state)
{
    static seen plain, asked;
    place *p = *state;
    char path[PATH_MAX], region[2][PATH_MAX + 64];
    const char *const list[] = {region[0], region[1]};
    uint8_t half[SIDE * SIDE * 3] = {0};
    const ipt_image im = {SIDE, SIDE, half};
    fixture f = open_fixture();
    for (size_t i = 0; i < sizeof half; i++)
        half[i] = i / 3 % SIDE < SIDE / 2 ? 255 : 0;
    assert_ok(f.ctx, ipt_image_save(f.ctx, in(p, path, "left.png"), &im, NULL, NULL));
    ipt_name(region[0], sizeof region[0], "%s@a red house", path);
    ipt_name(region[1], sizeof region[1], "%s@lora:golden_lora_kohya", path);
    for (int i = 0; i < 2; i++) {
        f.r.region = i ? NULL : list;
        f.r.n_region = i ? 0 : 2;
        f.r.compose = i ? "lego" : "composite";
        f.r.explain = NULL;
        assert_ok(f.ctx, draw(&f, &plain));
        f.r.explain = keep_explanation;
        assert_ok(f.ctx, draw(&f, &asked));
        assert_memory_equal(plain.rgb, asked.rgb, sizeof plain.rgb);
        expect_sums(&asked);
        assert_int_equal(asked.n_effect, i ? 1 : 2);
        assert_int_equal(f.rep.rows_explain, 6);
        assert_true(!asked.effect[0].file == (i == 1));
    }
    close_fixture(&f);
}

static float *first_eps(fixture *f, const place *p, seen *s, float weight, size_t n_lora, size_t *n)
{
    char path[PATH_MAX];
    f->lora[0].weight = f->lora[0].te_weight = weight;
    f->r.n_lora = n_lora;
    f->r.trace = in(p, path, "eps.safetensors");
    assert_ok(f->ctx, draw(f, s));
    f->r.trace = NULL;
    ipt_safetensors *st = golden_open(f->ctx, p->dir, "eps");
    float *v = golden_f32(f->ctx, st, "eps_step0", n);
    ipt_safetensors_close(&st);
    return v;
}

/* One adapter's contribution is the prediction with it less that without it: at weight 0, and where
 * it is not given at all. */
static void one_adapter_is_a_difference(void **state)
{
    static seen s, other;
    const place *p = *state;
    size_t n = 0;
    fixture f = open_fixture();
    f.r.steps = 1;
    f.r.n_lora = 1;
    f.r.explain = keep_explanation;
    float *with = first_eps(&f, p, &s, 0.8F, 1, &n);
    f.r.explain = NULL;
    float *less = first_eps(&f, p, &other, 0, 1, &n), *none = first_eps(&f, p, &other, 0, 0, &n);
    size_t cells = (size_t)s.h * (size_t)s.w, c = n / cells;
    assert_true(s.n_effect == 1 && s.n_step == 1 && s.step[0] == 0);
    golden_at_most(fabs((double)s.power[0] / mean_square(with, n) - 1), 1e-6, "power");
    for (size_t i = 0; i < cells; i++) {
        double a = 0, b = 0, got = (double)s.energy[0][i];
        for (size_t k = i; k < n; k += cells) {
            a += pow((double)with[k] - (double)less[k], 2) / (double)c;
            b += pow((double)with[k] - (double)none[k], 2) / (double)c;
        }
        golden_at_most(fabs(got - a), 1e-6 * a, "cell %zu", i);
        /* Another plan, other roundings: 1e-6 of the prediction, times twice the difference. */
        golden_at_most(fabs(sqrt(got) - sqrt(b)), 1e-5 * sqrt((double)s.power[0]), "cell %zu", i);
    }
    ipt_free(with);
    ipt_free(less);
    ipt_free(none);
    close_fixture(&f);
}

/* An adapter acts in its own steps only, and nothing is evaluated for the others. */
static void outside_its_steps_it_did_nothing(void **state)
{
    static seen s;
    (void)state;
    fixture f = open_fixture();
    f.r.explain = keep_explanation;
    f.r.fold = "always"; /* cannot be */
    f.r.n_lora = 1;
    f.lora[0].te_weight = 0;
    f.lora[0].start = 0.3F;
    f.lora[0].end = 0.6F;
    assert_ok(f.ctx, draw(&f, &s));
    assert_false(f.rep.is_folded);
    assert_int_equal(f.rep.rows_explain, 2);
    assert_true(s.when[0][1] > 0 && !(s.when[0][0] > 0) && !(s.when[0][2] > 0));
    f.lora[0].start = 0;
    f.lora[0].end = 1;
    assert_ok(f.ctx, draw(&f, &s));
    assert_false(f.rep.is_folded);
    assert_int_equal(f.rep.rows_explain, 6);
    close_fixture(&f);
}

/* The map of words is the mean of neighbouring columns of their world's maps, and of the steps. */
static void words_are_read(void **state)
{
    static seen s;
    static const char *const opt[] = {"update=off"};
    char path[PATH_MAX], name[32];
    const place *p = *state;
    float *map[3];
    size_t n = 0;
    fixture f = open_fixture();
    f.r.compose = "clora";
    f.r.compose_opt = opt;
    f.r.n_compose_opt = 1;
    f.r.explain = keep_explanation;
    f.r.trace = in(p, path, "maps.safetensors");
    assert_ok(f.ctx, draw(&f, &s));
    ipt_safetensors *st = golden_open(f.ctx, p->dir, "maps");
    for (int i = 0; i < 3; i++)
        map[i] = golden_f32(f.ctx, st, ipt_name(name, sizeof name, "map_step%d", i), &n);
    size_t cells = s.n_words[0], tokens = n / 3 / cells, found[2] = {0, 0};
    assert_true(cells > 0 && s.n_words[1] == cells && tokens == 77);
    for (size_t k = 0; k < 2; k++)
        for (size_t t = 1; t < 30 && found[k] == 0; t++)
            for (size_t m = 1; m < 6 && found[k] == 0; m++) { /* tokens from t on */
                double far = 0;
                for (size_t c = 0; c < cells; c++) {
                    double want = 0;
                    for (size_t i = 0; i < 3 * m; i++)
                        want += (double)map[i / m][((k + 1) * cells + c) * tokens + t + i % m] /
                                (double)(3 * m);
                    far = fmax(far, fabs(want - (double)s.words[k][c]));
                }
                found[k] = far < 1e-7 ? t : 0;
            }
    assert_true(found[0] > 1 && found[1] > found[0]);
    for (int i = 0; i < 3; i++)
        ipt_free(map[i]);
    ipt_safetensors_close(&st);
    close_fixture(&f);
}

/* No adapter: nothing to tell.  A refused explanation and a stop end the request. */
typedef struct stopping {
    ipt_stop stop;
    int seen;
} stopping;

static ipt_status stop_at_two(void *user, const ipt_latent *l)
{
    stopping *s = user;
    s->seen = l->step;
    if (l->step == 1)
        ipt_stop_ask(&s->stop);
    return IPT_OK;
}

static void it_can_be_ended(void **state)
{
    static seen s;
    stopping stop = {0};
    (void)state;
    fixture f = open_fixture();
    f.r.explain = keep_explanation;
    f.r.n_lora = 0;
    assert_int_equal(draw(&f, &s), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f.ctx), "no adapter"));
    f.r.n_lora = 2;
    f.r.count = 2;
    s.answer = IPT_ERR_OUTPUT;
    assert_int_equal(draw(&f, &s), IPT_ERR_OUTPUT);
    assert_int_equal(s.n_explain, 1);
    s.answer = IPT_OK;
    f.r.latent = stop_at_two;
    f.r.latent_user = &stop;
    f.r.stop = &stop.stop;
    assert_int_equal(draw(&f, &s), IPT_ERR_CANCELLED);
    assert_true(stop.seen == 1 && s.n_explain == 0);
    f.r.latent = NULL;
    f.r.stop = NULL;
    assert_ok(f.ctx, draw(&f, &s));
    assert_int_equal(s.n_explain, 2);
    close_fixture(&f);
}

/* Waves of one frequency lie in one ring; energy is kept. */
static void rings_of_frequencies(void **state)
{
    enum { N = 16 };
    const double pi = 3.14159265358979323846;
    float x[2 * N * N];
    double band[IPT_BANDS], high = 0, square = 0;
    uint64_t seed = 1;
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(x); i++)
        x[i] = ipt_rng_normal(&seed);
    square = mean_square(x, IPT_COUNT(x));
    assert_ok(ctx, ipt_frequency_bands(ctx, x, 2, N, N, 0, band, &high));
    golden_at_most(fabs(high / square - 1), 1e-9, "all of the energy");
    for (size_t i = 0; i < IPT_COUNT(x); i++) /* 4 of at most sqrt(128) */
        x[i] = (float)cos(2 * pi * 4 * (double)(i % N) / N);
    for (int k = 0; k < 2; k++) {
        assert_ok(ctx, ipt_frequency_bands(ctx, x, 2, N, N, k ? 0.3 : 0.4, band, &high));
        golden_at_most(fabs(high - k / 2.0), 1e-6, "share %d", k);
        for (size_t i = 0; i < IPT_BANDS; i++)
            assert_true(i == 2 ? band[i] > 0.1 : band[i] < 1e-4);
    }
    assert_ok(ctx, ipt_frequency_bands(ctx, x, 0, N, N, 0, band, &high));
    assert_ok(ctx, ipt_frequency_bands(ctx, x, 1, 1, 1, 0.2, band, &high));
    assert_true(band[0] > 0.9 && band[1] < 1e-9);
    assert_int_equal(ipt_crc32("123456789", 9), 0xcbf43926);
    ipt_ctx_destroy(&ctx);
}

/* --- the program ------------------------------------------------------------------------------ */
#ifdef IPT_PROGRAM
#define LORA_A GOLDEN("golden_lora_peft.safetensors")
#define LORA_B GOLDEN("golden_lora_kohya.safetensors")

static void expect_files(const place *p, const char *const *name, size_t n)
{
    char path[PATH_MAX];
    for (size_t i = 0; i < n; i++)
        if (!ipt_is_file(in(p, path, name[i])))
            fail_msg("%s is not there", path);
}

/* Names of any kind stay in their folder, and are different. */
static void mask_files(void **state)
{
    static const char request[] =
        "{\"prompt\":\"a ../.. cat and a CAT\\u00e9\",\"compose\":\"clora\",\"compose_opt\":"
        "[\"update=off\"],\"sampler\":\"ddim\",\"steps\":1,\"width\":32,\"height\":32,\"seed\":5,"
        "\"model\":\"" SD1 "\",\"lora\":[{\"file\":\"" LORA_A "\",\"word\":\"../.. cat\"},"
        "{\"file\":\"" LORA_B "\",\"word\":\"CAT\\u00e9#1=dog\"}]}";
    static const char *const names[] = {"a.png", "m/a-cat.png", "m/a-CAT\xc3\xa9.png"};
    place *p = *state;
    char path[PATH_MAX];
    size_t n = 0;
    ipt_image im = {0};
    need_device(p);
    write_text(p, "q.json", request, sizeof request - 1);
    result r = RUN(p, "generate", "-q", "--request", "q.json", "--masks", "m/", "-o", "a.png",
                   "--trace", "t.safetensors");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    assert_string_equal(r.out, "a.png\nm//a-cat.png\nm//a-CAT\xc3\xa9.png\n");
    done(&r);
    expect_files(p, names, IPT_COUNT(names));
    ipt_safetensors *st = golden_open(p->ctx, p->dir, "t");
    float *mask = golden_f32(p->ctx, st, "mask_step0", &n);
    size_t side = (size_t)sqrt((double)n / 2), cell = SIDE / side;
    for (size_t k = 0; k < 2; k++) {
        assert_ok(p->ctx, ipt_image_load(p->ctx, in(p, path, names[k + 1]), &im));
        assert_true(im.w == SIDE && im.h == SIDE);
        for (size_t i = 0; i < (size_t)SIDE * SIDE * 3; i++) {
            size_t y = i / 3 / SIDE / cell, x = i / 3 % SIDE / cell;
            assert_int_equal(im.rgb[i], mask[(k * side + y) * side + x] > 0 ? 255 : 0);
        }
        ipt_image_finish(&im);
    }
    ipt_free(mask);
    ipt_safetensors_close(&st);
}

static uint32_t le(const char *p, int n)
{
    uint32_t v = 0;
    for (int i = 0; i < n; i++)
        v |= (uint32_t)(uint8_t)p[i] << (8 * i);
    return v;
}

/* Walks the central directory of a ZIP of stored members: `names` in their order.  Each one is what
 * its local header says, PNGs are pictures; text: of stack.xml, the caller's. */
static void expect_layers(const place *p, const char *file, const char *const *names, size_t n,
                          char **text)
{
    char path[PATH_MAX], name[64], *d = NULL;
    size_t size = 0;
    ipt_image im = {0};
    *text = NULL;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, file), 1 << 24, &d, &size));
    const char *end = d + size - 22, *at = NULL;
    assert_true(size > 22 && le(end, 4) == 0x06054b50 && le(end + 10, 2) == n);
    at = d + le(end + 16, 4);
    assert_true(at + le(end + 12, 4) == end);
    for (size_t i = 0; i < n; i++) {
        uint32_t bytes = le(at + 24, 4), len = le(at + 28, 2), start = le(at + 42, 4);
        const char *local = d + start, *data = local + 30 + len;
        assert_true(le(at, 4) == 0x02014b50 && le(local, 4) == 0x04034b50);
        assert_memory_equal(at + 6, local + 4, 26); /* version to lengths */
        assert_true(le(at + 10, 2) == 0 && le(at + 20, 4) == bytes && le(at + 30, 2) == 0);
        assert_memory_equal(at + 46, local + 30, len);
        ipt_name(name, sizeof name, "%.*s", (int)len, at + 46);
        assert_string_equal(name, names[i]);
        assert_int_equal(ipt_crc32(data, bytes), le(at + 16, 4));
        if (strstr(name, ".png")) {
            assert_ok(p->ctx, ipt_image_load_memory(p->ctx, name, data, bytes, &im));
            assert_true(im.w == SIDE && im.h == SIDE);
            ipt_image_finish(&im);
        } else if (strcmp(name, "stack.xml") == 0) {
            *text = ipt_calloc(p->ctx, bytes + 1, 1);
            memcpy(*text, data, bytes);
        } else {
            assert_true(start == 0 && bytes == 16 && memcmp(data, "image/openraster", 16) == 0);
        }
        at += 46 + len;
    }
    assert_true(at == end && *text);
    ipt_free(d);
}

/* Every file of an explanation, of words of any kind and of two pictures. */
static void explain_files(void **state)
{
    static const char request[] =
        "{\"prompt\":\"a when <&\\u00e9> and a dog\",\"compose\":\"clora\",\"compose_opt\":"
        "[\"update=off\"],\"sampler\":\"ddim\",\"steps\":2,\"width\":32,\"height\":32,\"seed\":5,"
        "\"count\":2,\"model\":\"" SD1 "\",\"lora\":[{\"file\":\"" LORA_A "\",\"word\":\"when\"},"
        "{\"file\":\"" LORA_B "\",\"word\":\"<&\\u00e9>\"}]}";
    static const char *const names[] = {"a-1.png",
                                        "a-2.png",
                                        "m/a-1-when-2.png",
                                        "m/a-2-when-2.png",
                                        "m/a-1-\xc3\xa9.png",
                                        "m/a-1-when-2-where.png",
                                        "m/a-2-\xc3\xa9-where.png",
                                        "m/a-1-when.png",
                                        "m/a-2.json"};
    static const char *const members[] = {
        "mimetype",        "data/layer0.png", "data/layer1.png",         "data/layer2.png",
        "data/layer3.png", "data/layer4.png", "data/layer5.png",         "data/layer6.png",
        "stack.xml",       "mergedimage.png", "Thumbnails/thumbnail.png"};
    place *p = *state;
    char path[PATH_MAX], *xml = NULL;
    json_t *o = NULL;
    need_device(p);
    write_text(p, "q.json", request, sizeof request - 1);
    result r = RUN(p, "generate", "-q", "--request", "q.json", "--masks", "m", "--explain", "m",
                   "-o", "a.png", "--json");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    o = json_loads(r.out, 0, NULL);
    assert_int_equal(json_array_size(json_object_get(o, "explain")), 10);
    assert_int_equal(json_array_size(json_object_get(o, "masks")), 4);
    /* Without its adapter each world says what the one without concepts says already. */
    assert_int_equal(ipt_json_int(json_object_get(o, "unet_rows"), "explain", -1), 0);
    json_decref(o);
    done(&r);
    expect_files(p, names, IPT_COUNT(names));
    expect_layers(p, "m/a-2.ora", members, IPT_COUNT(members), &xml);
    assert_non_null(strstr(xml, "name=\"&lt;&amp;\xc3\xa9&gt; (golden_lora_kohya) acted here\""));
    ipt_free(xml);
    assert_ok(p->ctx, ipt_json_load(p->ctx, in(p, path, "m/a-2.json"), &o));
    const json_t *adapter = json_array_get(json_object_get(o, "adapters"), 1);
    assert_string_equal(ipt_json_str(o, "picture", ""), "a-2.png");
    assert_string_equal(ipt_json_str(adapter, "word", ""), "<&\xc3\xa9>");
    assert_int_equal(json_array_size(json_object_get(adapter, "energy")),
                     ipt_json_int(o, "latent_height", 0));
    assert_int_equal(json_array_size(json_object_get(adapter, "share_of_step")), 2);
    assert_int_equal(json_array_size(json_object_get(adapter, "amplitude_of_band")), 8);
    assert_true(json_is_array(json_object_get(adapter, "words")));
    json_decref(o);
}

static void program_says_no(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    write_text(p, "file", "x", 1);
    result r = RUN(p, "generate", "-m", SD1, "-p", "x", "--masks", "m2", "-o", "a.png");
    expect_line(&r, 2, "makes no masks", "merge");
    assert_false(ipt_is_dir(in(p, path, "m2")));
    r = RUN(p, "generate", "-m", SD1, "-p", "x", "--masks", "file", "-o", "a.png");
    expect_line(&r, 73, "is no folder", "a file");
    r = RUN(p, "generate", "-m", SD1, "-p", "x", "--masks", "none/m", "-o", "a.png");
    expect_line(&r, 73, "none/m", "no folder to make it in");
    r = RUN(p, "generate", "-m", SD1, "-p", "x", "--explain", "file/", "-o", "a.png");
    expect_line(&r, 73, "is no folder", "a file");
    r = RUN(p, "generate", "-m", SD1, "-p", "x", "--explain", "m2", "-o", "a.png");
    expect_line(&r, 2, "no adapter", "no LoRA");
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(masks_are_the_methods, set_up, place_destroy),
        cmocka_unit_test(methods_without_masks),
        cmocka_unit_test(pictures_stay_the_same),
        cmocka_unit_test_setup_teardown(places_and_joined_adapters, set_up, place_destroy),
        cmocka_unit_test_setup_teardown(one_adapter_is_a_difference, set_up, place_destroy),
        cmocka_unit_test(outside_its_steps_it_did_nothing),
        cmocka_unit_test_setup_teardown(words_are_read, set_up, place_destroy),
        cmocka_unit_test(it_can_be_ended),
        cmocka_unit_test(rings_of_frequencies),
#ifdef IPT_PROGRAM
        cmocka_unit_test_setup_teardown(mask_files, set_up, place_destroy),
        cmocka_unit_test_setup_teardown(explain_files, set_up, place_destroy),
        cmocka_unit_test_setup_teardown(program_says_no, set_up, place_destroy),
#endif
    };
    return cmocka_run_group_tests_name("explain", tests, NULL, NULL);
}
