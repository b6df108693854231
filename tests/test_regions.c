/* tests/test_regions.c - masks bound to prompts and adapters: what is everywhere is as without, to
 * the bit; what is bound acts where its mask is; what cannot be is said in a sentence.  Numbers
 * beside a reference: in_regions of test_generate. */
#include "tests/golden.h"
#include "tests/program.h"

#include "engine/impasto.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { W = 32, H = 24, CELL = 2 /* pixels of a latent's cell of models/sd1 */ };
#define SD1 IPT_TEST_DATA "/models/sd1"
#define KOHYA IPT_TEST_DATA "/golden_lora_kohya.safetensors"
#define LOCON IPT_TEST_DATA "/golden_lora_locon.safetensors"

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    char dir[64], trace[96];
} fixture;

static int set_up(void **state)
{
    static fixture f;
    f = (fixture){.ctx = NULL};
    ipt_name(f.dir, sizeof f.dir, "/tmp/impasto-regions-XXXXXX");
    if (!mkdtemp(f.dir))
        return -1;
    ipt_name(f.trace, sizeof f.trace, "%s/trace.safetensors", f.dir);
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    fixture *f = *state;
    char command[128];
    ipt_name(command, sizeof command, "rm -r '%s'", f->dir);
    int rc = system(command); /* NOLINT(cert-env33-c): a folder of this test's own */
    if (f->engine)
        test_engine_done(&f->engine, &f->ctx);
    return rc;
}

static fixture *ready(void **state)
{
    fixture *f = *state;
    if (!f->engine)
        f->engine = test_engine(&f->ctx, IPT_PRECISION_F32, 0);
    return f;
}

/* --- masks ------------------------------------------------------------------------------------ */
typedef enum shade { ALL, ALMOST, LEFT, RIGHT, RISING, FALLING, NOTHING, SOME } shade;

static uint8_t grey(shade s, int32_t x, int32_t y, int32_t w)
{
    const uint8_t rising = (uint8_t)(255 * x / (w - 1));
    switch (s) {
    case ALMOST:
        return x == 3 && y == 2 ? 254 : 255;
    case LEFT:
        return x < w / 2 ? 255 : 0;
    case RIGHT:
        return x < w / 2 ? 0 : 255;
    case RISING:
        return rising;
    case FALLING:
        return (uint8_t)(255 - rising);
    case NOTHING:
        return 0;
    case SOME:
        return 8;
    case ALL:
    default:
        return 255;
    }
}

static ipt_image picture(int32_t w, int32_t h, shade s)
{
    ipt_image im = {w, h, malloc((size_t)w * (size_t)h * 3)};
    assert_non_null(im.rgb);
    for (int32_t i = 0; i < w * h * 3; i++)
        im.rgb[i] = grey(s, i / 3 % w, i / 3 / w, w);
    return im;
}

static void write_mask(const fixture *f, const char *name, int32_t w, int32_t h, shade s)
{
    char path[256];
    ipt_image im = picture(w, h, s);
    ipt_name(path, sizeof path, "%s/%s", f->dir, name);
    assert_ok(f->ctx, ipt_image_save(f->ctx, path, &im, NULL, NULL));
    free(im.rgb);
}

/* A request with up to MAX regions; "SHADE.png@WHAT" with the masks of set_masks. */
enum { MAX = 40 };
typedef struct request {
    ipt_request r;
    char text[MAX][256];
    const char *region[MAX];
    ipt_lora lora[4];
} request;

static void add_region(const fixture *f, request *q, const char *what)
{
    size_t n = q->r.n_region++;
    assert_true(n < MAX);
    ipt_name(q->text[n], sizeof q->text[n], "%s/%s", f->dir, what);
    q->region[n] = q->text[n];
    q->r.region = q->region;
}

static void add_lora(request *q, const char *path, float weight, float te_weight)
{
    assert_true(q->r.n_lora < IPT_COUNT(q->lora));
    q->lora[q->r.n_lora++] = (ipt_lora){path, weight, te_weight, NULL, 0, 1, NULL, NULL};
    q->r.lora = q->lora;
}

static void begin(const fixture *f, request *q)
{
    static const char *const names[] = {"all.png",    "almost.png",  "left.png",    "right.png",
                                        "rising.png", "falling.png", "nothing.png", "some.png"};
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        write_mask(f, names[i], W, H, (shade)i);
    memset(q, 0, sizeof *q);
    ipt_request_init(&q->r);
    q->r.model = SD1;
    q->r.prompt = "a cat";
    q->r.negative = "blurry";
    q->r.width = W;
    q->r.height = H;
    q->r.steps = 2;
    q->r.seed = 5;
    q->r.sampler = "ddim";
    q->r.fold = "never";
}

typedef struct drawn {
    uint8_t *rgb;
    size_t n;
    char *json;
    ipt_report rep;
} drawn;

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    drawn *d = user;
    assert_true(index == 0 && text);
    d->n = (size_t)im->w * (size_t)im->h * 3;
    d->rgb = malloc(d->n);
    d->json = strdup(json);
    assert_true(d->rgb && d->json);
    memcpy(d->rgb, im->rgb, d->n);
    return IPT_OK;
}

static drawn draw(fixture *f, const ipt_request *r)
{
    drawn d = {.rgb = NULL};
    assert_ok(f->ctx, ipt_generate(f->engine, r, keep, &d, &d.rep));
    assert_non_null(d.rgb);
    return d;
}

static void drop(drawn *d)
{
    free(d->rgb);
    free(d->json);
    *d = (drawn){.rgb = NULL};
}

static bool same(const drawn *a, const drawn *b)
{
    return a->n == b->n && memcmp(a->rgb, b->rgb, a->n) == 0;
}

/* Whether two requests draw the same bytes. */
static bool draws_same(fixture *f, const ipt_request *a, const ipt_request *b)
{
    drawn one = draw(f, a), two = draw(f, b);
    bool is_same = same(&one, &two);
    drop(&one);
    drop(&two);
    return is_same;
}

/* The prediction of a step, [C,h,w]. */
static float *prediction(fixture *f, ipt_request *r, const char *step, size_t *n)
{
    ipt_safetensors *st = NULL;
    r->trace = f->trace;
    assert_ok(f->ctx, ipt_generate(f->engine, r, NULL, NULL, NULL));
    r->trace = NULL;
    assert_ok(f->ctx, ipt_safetensors_open(f->ctx, f->trace, &st));
    float *v = golden_f32(f->ctx, st, step, n);
    ipt_safetensors_close(&st);
    return v;
}

/* --- everywhere is as without ----------------------------------------------------------------- */
static void full_masks_are_none(void **state)
{
    fixture *f = ready(state);
    request with, without;
    begin(f, &with);
    begin(f, &without);
    without.r.prompt = "a [dog:(fox:1.3):0.5]";
    add_region(f, &with, "all.png@a [dog:(fox:1.3):0.5]");
    assert_true(draws_same(f, &with.r, &without.r));
    begin(f, &with);
    begin(f, &without);
    for (int i = 0; i < 2; i++) {
        request *q = i ? &without : &with;
        add_lora(q, KOHYA, 0.8F, 0.6F);
        add_lora(q, LOCON, 0.5F, 0.5F);
    }
    add_region(f, &with, "all.png@lora:golden_lora_kohya");
    add_region(f, &with, "left.png@lora:golden_lora_locon"); /* the larger of both: everywhere */
    add_region(f, &with, "all.png@lora:golden_lora_locon");
    assert_true(draws_same(f, &with.r, &without.r));
}

/* Soft masks that cover the picture, but for rounding: the prompt says nothing. */
static void covered_prompts_are_silent(void **state)
{
    fixture *f = ready(state);
    request a, b;
    begin(f, &a);
    begin(f, &b);
    for (int i = 0; i < 2; i++) {
        add_region(f, i ? &b : &a, "rising.png@a dog");
        add_region(f, i ? &b : &a, "falling.png@a fox");
    }
    b.r.prompt = "something else";
    assert_true(draws_same(f, &a.r, &b.r));
    begin(f, &b); /* and is not looked at: the plan is that of two texts */
    add_region(f, &b, "left.png@a dog");
    add_region(f, &b, "right.png@a fox");
    drawn hard = draw(f, &b.r);
    assert_int_equal(hard.rep.n_plans_recorded, 0);
    drop(&hard);
    b.r.n_region = a.r.n_region = 1;
    assert_false(draws_same(f, &a.r, &b.r));
}

/* --- where it is ------------------------------------------------------------------------------ */
/* |a - b|^2 over the outer third of a prediction, its left or right one. */
static double apart(const float *a, const float *b, size_t n, bool is_right)
{
    const size_t w = W / CELL, third = w / 3;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        size_t x = i % w;
        double d = (double)a[i] - (double)b[i];
        sum += (is_right ? x >= w - third : x < third) ? d * d : 0;
    }
    return sum;
}

static double power(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sum;
}

/* An adapter bound to the left half: there it is nearer to the picture with it, on the right to the
 * one without.  Bound to all but a pixel's last bit: as unbound, on the other graph. */
static void check_kind(fixture *f, const char *name)
{
    char path[256], what[64];
    request q;
    float *v[4]; /* without, with, almost, half */
    size_t n = 0;
    begin(f, &q);
    q.r.steps = 1;
    q.r.cfg = 1;
    for (int i = 0; i < 4; i++) {
        static const char *const mask[] = {"", "", "almost.png", "left.png"};
        q.r.n_lora = q.r.n_region = 0;
        if (i > 0)
            add_lora(&q, ipt_name(path, sizeof path, IPT_TEST_DATA "/kinds/%s.safetensors", name),
                     1, 0);
        q.lora[0].blocks = "down:0.5/mid:0.8/up:1.2"; /* gates that differ */
        if (i > 1)
            add_region(f, &q, ipt_name(what, sizeof what, "%s@lora:%s", mask[i], name));
        v[i] = prediction(f, &q.r, "eps_step0", &n);
    }
    double acts = power(v[0], v[1], n), almost = power(v[1], v[2], n);
    double left[] = {apart(v[3], v[0], n, false), apart(v[3], v[1], n, false)},
           right[] = {apart(v[3], v[0], n, true), apart(v[3], v[1], n, true)};
    print_message("  %-12s acts %.2g, almost full %.2g off; left %.2g from none, %.2g from all; "
                  "right %.2g, %.2g\n",
                  name, acts, almost, left[0], left[1], right[0], right[1]);
    assert_true(acts > 0);
    /* a 255th of one of 768 pixels, and another order of sums */
    golden_at_most(almost / acts, 1e-4, "%s: bound to almost everything", name);
    assert_true(left[1] < left[0] && right[0] < right[1]);
    for (int i = 0; i < 4; i++)
        ipt_free(v[i]);
}

static void kinds_lie_where_they_are_bound(void **state)
{
    static const char *const names[] = {"locon", "loha",  "loha_tucker", "lokr", "lokr_tucker",
                                        "dora",  "oft",   "boft",        "ia3",  "glora",
                                        "full",  "krona", "norm",        "set"};
    fixture *f = ready(state);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        check_kind(f, names[i]);
}

/* A file that is given twice is bound twice. */
static void every_use_of_a_file_is_bound(void **state)
{
    fixture *f = ready(state);
    request one, two;
    size_t n = 0;
    float *v[2];
    begin(f, &one);
    begin(f, &two);
    add_lora(&one, KOHYA, 0.8F, 0);
    add_lora(&two, KOHYA, 0.3F, 0);
    add_lora(&two, KOHYA, 0.5F, 0);
    add_region(f, &one, "left.png@lora:golden_lora_kohya");
    add_region(f, &two, "left.png@lora:golden_lora_kohya");
    v[0] = prediction(f, &one.r, "eps_step0", &n);
    v[1] = prediction(f, &two.r, "eps_step0", &n);
    golden_at_most(golden_nmse(v[0], v[1], n), 1e-8, "given twice");
    ipt_free(v[0]);
    ipt_free(v[1]);
}

/* --- texts ------------------------------------------------------------------------------------ */
/* A region's prompt changes with the steps, also where features are kept. */
static void prompts_change_over_the_steps(void **state)
{
    static const char *const caches[] = {NULL, "2"};
    fixture *f = ready(state);
    request q;
    size_t n = 0;
    for (size_t c = 0; c < IPT_COUNT(caches); c++) {
        float *v[3][2];
        for (int i = 0; i < 3; i++) {
            static const char *const what[] = {"left.png@a dog", "left.png@a fox",
                                               "left.png@a [dog:fox:2]"};
            begin(f, &q);
            q.r.steps = 4;
            q.r.cache = caches[c];
            add_region(f, &q, what[i]);
            v[i][0] = prediction(f, &q.r, "eps_step0", &n);
            v[i][1] = prediction(f, &q.r, "eps_step3", &n);
        }
        assert_memory_equal(v[2][0], v[0][0], n * sizeof(float));
        assert_memory_not_equal(v[2][1], v[0][1], n * sizeof(float));
        assert_memory_not_equal(v[2][1], v[1][1], n * sizeof(float)); /* from another latent */
        for (int i = 0; i < 6; i++)
            ipt_free(v[i / 2][i % 2]);
    }
    drawn d = {.rgb = NULL};
    begin(f, &q); /* the last evaluation is whole: the prompt is another one */
    q.r.steps = 4;
    q.r.cache = "2";
    for (int i = 0; i < 2; i++) {
        q.r.n_region = 0;
        add_region(f, &q, i ? "left.png@a [dog:fox:2]" : "left.png@a dog");
        d = draw(f, &q.r);
        assert_int_equal(d.rep.rows_shallow, i ? 2 : 4);
        drop(&d);
    }
}

/* A word that only a region names is found among the embeddings. */
static void regions_name_embeddings(void **state)
{
    fixture *f = ready(state);
    request with, without;
    float v[16];
    char path[128];
    const char *dirs[] = {f->dir};
    for (int i = 0; i < 16; i++)
        v[i] = sinf((float)i);
    const ipt_st_write t = {
        .name = "emb_params", .dtype = IPT_ST_F32, .rank = 2, .dim = {1, 16}, .data = v};
    ipt_name(path, sizeof path, "%s/zorp.safetensors", f->dir);
    assert_ok(f->ctx, ipt_safetensors_write(f->ctx, path, &t, 1, NULL, 0));
    begin(f, &with);
    begin(f, &without);
    add_region(f, &with, "all.png@a zorp");
    without.r.prompt = "a zorp";
    drawn plain = draw(f, &without.r);
    with.r.embedding_dirs = without.r.embedding_dirs = dirs;
    with.r.n_embedding_dirs = without.r.n_embedding_dirs = 1;
    drawn a = draw(f, &with.r), b = draw(f, &without.r);
    assert_true(same(&a, &b) && !same(&a, &plain));
    drop(&plain);
    drop(&a);
    drop(&b);
    unlink(path);
}

/* --- beside everything else ------------------------------------------------------------------- */
static void two_of_each(const fixture *f, request *q)
{
    add_lora(q, KOHYA, 0.8F, 0.5F);
    add_lora(q, LOCON, 0.6F, 0.3F);
    add_region(f, q, "left.png@a dog");
    add_region(f, q, "rising.png@lora:golden_lora_kohya");
    add_region(f, q, "right.png@lora:golden_lora_locon");
}

static void methods_have_regions(void **state)
{
    static const struct {
        const char *compose, *cache, *fold;
        int32_t batch;
    } ways[] = {{"merge", NULL, "never", 0},   {"merge", NULL, "always", 0},
                {"switch", NULL, "never", 0},  {"composite", NULL, "never", 0},
                {"cmlora", NULL, "never", 0},  {"merge", "2", "never", 0},
                {"composite", "3", "never", 3}};
    fixture *f = ready(state);
    for (size_t i = 0; i < IPT_COUNT(ways); i++) {
        request q;
        begin(f, &q);
        q.r.steps = 4;
        q.r.compose = ways[i].compose;
        q.r.cache = ways[i].cache;
        q.r.fold = ways[i].fold;
        q.r.batch = ways[i].batch;
        two_of_each(f, &q);
        drawn a = draw(f, &q.r), b = draw(f, &q.r);
        assert_true(same(&a, &b));
        assert_false(a.rep.is_folded); /* what lies in places is not in the weights */
        q.r.n_region = 0;
        drop(&b);
        b = draw(f, &q.r);
        assert_false(same(&a, &b));
        drop(&a);
        drop(&b);
    }
}

/* Regions of prompts alone: adapters may be folded. */
static void prompts_let_adapters_be_folded(void **state)
{
    fixture *f = ready(state);
    request q;
    size_t n = 0;
    float *v[2];
    for (int i = 0; i < 2; i++) {
        begin(f, &q);
        two_of_each(f, &q);
        q.r.n_region = 1;
        q.r.fold = i ? "always" : "never";
        v[i] = prediction(f, &q.r, "eps_step0", &n);
    }
    golden_at_most(golden_nmse(v[0], v[1], n), 1e-8, "folded");
    ipt_free(v[0]);
    ipt_free(v[1]);
}

/* Fewer rows at once than an evaluation has: keys and values are made for each.  All at once: they
 * stand from step to step, but where the prompt or the adapters' strength changes. */
static void rows_one_by_one(void **state)
{
    static const struct {
        const char *compose, *region, *cache;
        float start;
        int32_t batch;
    } cases[] = {{"composite", "left.png@a dog", NULL, 0, 3},
                 {"merge", "left.png@a dog", NULL, 0.5F, 1},
                 {"merge", "left.png@a [dog:fox:2]", NULL, 0, 1},
                 {"merge", "left.png@a [dog:fox:2]", "2", 0.5F, 1},
                 {"switch", "left.png@a dog", NULL, 0, 1}};
    fixture *f = ready(state);
    request q;
    size_t n = 0;
    for (size_t c = 0; c < IPT_COUNT(cases); c++) {
        float *v[2];
        for (int i = 0; i < 2; i++) {
            begin(f, &q);
            q.r.steps = 4;
            two_of_each(f, &q);
            q.lora[0].start = cases[c].start;
            q.r.n_region = 0;
            add_region(f, &q, cases[c].region);
            add_region(f, &q, "rising.png@lora:golden_lora_kohya");
            add_region(f, &q, "right.png@lora:golden_lora_locon");
            q.r.compose = cases[c].compose;
            q.r.cache = cases[c].cache;
            q.r.batch = i ? cases[c].batch : 0;
            v[i] = prediction(f, &q.r, "eps_step3", &n);
        }
        golden_at_most(golden_nmse(v[0], v[1], n), 1e-8, "case %zu in batches", c);
        ipt_free(v[0]);
        ipt_free(v[1]);
    }
}

static void from_pictures_and_other_models(void **state)
{
    static const struct {
        const char *model;
        int32_t w, h;
        bool init, mask;
    } cases[] = {{"sd1", W, H, true, false},    {"sd1", W, H, true, true},
                 {"inpaint", W, H, true, true}, {"lcm", W, H, false, false},
                 {"sd2", 72, 56, false, false}, {"sdxl", 40, 56, false, false}};
    fixture *f = ready(state);
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        char model[256];
        request q;
        const int32_t w = cases[i].w, h = cases[i].h;
        begin(f, &q);
        ipt_name(model, sizeof model, IPT_TEST_DATA "/models/%s", cases[i].model);
        q.r.model = model;
        q.r.width = w;
        q.r.height = h;
        q.r.sampler = strcmp(cases[i].model, "lcm") == 0 ? "lcm" : "ddim";
        write_mask(f, "left.png", w, h, LEFT);
        write_mask(f, "rising.png", w, h, RISING);
        ipt_image init = picture(w, h, FALLING), mask = picture(w, h, RIGHT);
        q.r.init = cases[i].init ? &init : NULL;
        q.r.mask = cases[i].mask ? &mask : NULL;
        drawn a = draw(f, &q.r);
        add_region(f, &q, "left.png@a red dog");
        add_region(f, &q, "rising.png@a fox");
        drawn b = draw(f, &q.r);
        assert_false(same(&a, &b));
        drop(&a);
        drop(&b);
        free(init.rgb);
        free(mask.rgb);
    }
}

/* Other masks and prompts are data: nothing is recorded; the first ones again are the first
 * picture. */
static void masks_are_data(void **state)
{
    fixture *f = ready(state);
    request q;
    drawn d[3];
    for (int i = 0; i < 3; i++) {
        begin(f, &q);
        add_lora(&q, KOHYA, 0.8F, 0.5F);
        add_region(f, &q, i == 1 ? "right.png@a fox" : "left.png@a dog");
        add_region(f, &q,
                   i == 1 ? "falling.png@lora:golden_lora_kohya"
                          : "rising.png@lora:golden_lora_kohya");
        d[i] = draw(f, &q.r);
        if (i > 0)
            assert_true(d[i].rep.n_plans_recorded == 0 && d[i].rep.bytes_uploaded == 0);
    }
    assert_true(same(&d[0], &d[2]) && !same(&d[0], &d[1]));
    for (int i = 0; i < 3; i++)
        drop(&d[i]);
}

/* The request inside the picture makes it again. */
static void requests_repeat(void **state)
{
    fixture *f = ready(state);
    request q;
    ipt_request again;
    ipt_arena arena;
    ipt_arena_init(&arena, f->ctx);
    begin(f, &q);
    two_of_each(f, &q);
    drawn a = draw(f, &q.r);
    assert_non_null(strstr(a.json, "left.png@a dog"));
    ipt_request_init(&again);
    assert_ok(f->ctx, ipt_request_parse(&arena, "json", a.json, strlen(a.json), &again));
    assert_int_equal(again.n_region, 3);
    drawn b = draw(f, &again);
    assert_true(same(&a, &b));
    assert_string_equal(a.json, b.json);
    drop(&a);
    drop(&b);
    ipt_arena_finish(&arena);
}

/* --- names, numbers, mistakes ----------------------------------------------------------------- */
static void files_with_at_signs(void **state)
{
    fixture *f = ready(state);
    request plain, odd;
    char folder[128], cwd[512];
    begin(f, &plain);
    begin(f, &odd);
    ipt_name(folder, sizeof folder, "%s/x@y", f->dir);
    assert_int_equal(mkdir(folder, 0700), 0);
    write_mask(f, "x@y/a@b.png", W, H, LEFT);
    add_region(f, &plain, "left.png@cat@home");
    add_region(f, &odd, "x@y/a@b.png@cat@home");
    assert_true(draws_same(f, &plain.r, &odd.r));
    assert_non_null(getcwd(cwd, sizeof cwd));
    assert_int_equal(chdir(folder), 0);
    odd.region[0] = "a@b.png@cat@home";
    assert_true(draws_same(f, &plain.r, &odd.r));
    assert_int_equal(chdir(cwd), 0);
}

static void many_regions(void **state)
{
    fixture *f = ready(state);
    request q;
    char what[64];
    begin(f, &q);
    q.r.steps = 1;
    for (int i = 0; i < 31; i++) /* and the prompt */
        add_region(f, &q, ipt_name(what, sizeof what, "some.png@dog number %d", i));
    drawn d = draw(f, &q.r);
    drop(&d);
    add_region(f, &q, "left.png@one more");
    assert_int_equal(ipt_generate(f->engine, &q.r, NULL, NULL, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "more than 32 combinations"));
}

static void mistakes_are_named(void **state)
{
    static const struct {
        const char *region, *prompt, *compose;
        ipt_status status;
        const char *says;
    } cases[] = {
        {"nothing.png@a dog", "a cat", NULL, IPT_ERR_ARG, "black everywhere"},
        {"small.png@a dog", "a cat", NULL, IPT_ERR_ARG, "is 8 x 8 pixels, the picture 32 x 24"},
        {"left.png@", "a cat", NULL, IPT_ERR_ARG, "no prompt behind '@'"},
        {"left.png@ \t", "a cat", NULL, IPT_ERR_ARG, "no prompt behind '@'"},
        {"left.png", "a cat", NULL, IPT_ERR_ARG, "expected IMG@PROMPT or IMG@lora:NAME"},
        {"left.png@lora:cat", "a cat", NULL, IPT_ERR_ARG,
         "no adapter is called 'cat'; there are: golden_lora_kohya, golden_lora_locon"},
        {"left.png@lora:", "a cat", NULL, IPT_ERR_ARG, "no adapter is called ''"},
        {"gone.png@a dog", "a cat", NULL, IPT_ERR_IO, "gone.png"},
        {"text.png@a dog", "a cat", NULL, IPT_ERR_FORMAT, "text.png"},
        {"left.png@a dog", "a cat AND a dog", NULL, IPT_ERR_ARG, "joined of 2 by AND"},
        {"left.png@a cat AND a dog", "a cat", NULL, IPT_ERR_ARG, "AND and a weight at the end"},
        {"left.png@a dog :0.5", "a cat", NULL, IPT_ERR_ARG, "AND and a weight at the end"},
        {"left.png@a dog <lora:ink:0.5>", "a cat", NULL, IPT_ERR_ARG, "<lora:ink> stands in a"},
        {"left.png@a dog", "a cat", "clora", IPT_ERR_ARG, "clora finds places itself"},
    };
    fixture *f = ready(state);
    char path[128];
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        request q;
        begin(f, &q);
        write_mask(f, "small.png", 8, 8, ALL);
        ipt_name(path, sizeof path, "%s/text.png", f->dir);
        assert_ok(f->ctx, ipt_file_write(f->ctx, path, "words", 5));
        add_lora(&q, KOHYA, 1, 1);
        add_lora(&q, LOCON, 1, 1);
        q.lora[0].word = q.lora[1].word = cases[i].compose ? "cat" : NULL;
        q.r.prompt = cases[i].compose ? "a cat and a cat" : cases[i].prompt;
        q.r.compose = cases[i].compose;
        add_region(f, &q, cases[i].region);
        ipt_status s = ipt_generate(f->engine, &q.r, NULL, NULL, NULL);
        if (s != cases[i].status || !strstr(ipt_last_error(f->ctx), cases[i].says))
            fail_msg("%s: %s: %s", cases[i].region, ipt_status_name(s), ipt_last_error(f->ctx));
    }
}

static void copy_to(fixture *f, const char *from, const char *name, char path[128])
{
    char *data = NULL;
    size_t n = 0;
    assert_ok(f->ctx, ipt_file_read(f->ctx, from, 1 << 24, &data, &n));
    ipt_name(path, 128, "%s/%s", f->dir, name);
    assert_ok(f->ctx, ipt_file_write(f->ctx, path, data, n));
    ipt_free(data);
}

/* Two files of one name; a trace over a mask. */
static void names_that_clash(void **state)
{
    fixture *f = ready(state);
    request q;
    char a[128], b[128], what[192];
    begin(f, &q);
    ipt_name(a, sizeof a, "%s/other", f->dir);
    assert_int_equal(mkdir(a, 0700), 0);
    copy_to(f, KOHYA, "ink.safetensors", a);
    copy_to(f, LOCON, "other/ink.safetensors", b);
    add_lora(&q, a, 0.8F, 0);
    add_lora(&q, b, 0.6F, 0);
    add_region(f, &q, "left.png@lora:ink");
    assert_int_equal(ipt_generate(f->engine, &q.r, NULL, NULL, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "have that name; write lora:FILE"));
    q.r.n_region = 0;
    add_region(f, &q, ipt_name(what, sizeof what, "left.png@lora:%s", b));
    drawn d = draw(f, &q.r);
    drop(&d);
    ipt_name(what, sizeof what, "%s/left.png", f->dir);
    q.r.trace = what;
    assert_int_equal(ipt_generate(f->engine, &q.r, NULL, NULL, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "would replace"));
}

/* --- the program ------------------------------------------------------------------------------ */
static void exit_codes(void **state)
{
    const fixture *f = ready(state);
    static const struct {
        const char *region, *says;
        int rc;
    } cases[] = {{"left.png", "IMG@PROMPT or IMG@lora:NAME", 2},
                 {"@a dog", "IMG@PROMPT or IMG@lora:NAME", 2},
                 {"left.png@", "no prompt", 2},
                 {"nothing.png@a dog", "black everywhere", 2},
                 {"left.png@lora:ink", "there are: none", 2},
                 {"gone.png@a dog", "gone.png", 64},
                 {"text.png@a dog", "text.png", 64}};
    void *where = NULL;
    request q;
    char path[192];
    assert_int_equal(place_create(&where, IPT_PROGRAM), 0);
    place *p = where;
    need_device(p);
    begin(f, &q);
    ipt_name(path, sizeof path, "%s/text.png", f->dir);
    assert_ok(p->ctx, ipt_file_write(p->ctx, path, "words", 5));
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        const char *region = cases[i].region;
        if (region[0] != '@')
            region = ipt_name(path, sizeof path, "%s/%s", f->dir, cases[i].region);
        result r = RUN(p, "generate", "-m", SD1, "-p", "a cat", "--steps", "1", "-W", "32", "-H",
                       "24", "--region", region, "-o", "x.png");
        expect_line(&r, cases[i].rc, cases[i].says, cases[i].region);
    }
    ipt_name(path, sizeof path, "%s/left.png@a dog", f->dir);
    result r = RUN(p, "generate", "-m", SD1, "-p", "a cat", "--steps", "1", "-W", "32", "-H", "24",
                   "--region", path, "-o", "x.png", "--seed", "3");
    assert_int_equal(r.rc, 0);
    done(&r);
    r = RUN(p, "generate", "--request", "x.png", "-o", "y.png");
    assert_int_equal(r.rc, 0);
    done(&r);
    char *data[2] = {NULL, NULL}, file[PATH_MAX];
    size_t n[2] = {0, 0};
    for (int i = 0; i < 2; i++)
        assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, file, i ? "y.png" : "x.png"), 1 << 24,
                                        &data[i], &n[i]));
    assert_true(n[0] == n[1] && memcmp(data[0], data[1], n[0]) == 0);
    ipt_free(data[0]);
    ipt_free(data[1]);
    r = RUN(p, "generate", "--help");
    assert_non_null(strstr(r.out, "--region IMG@"));
    done(&r);
    place_destroy(&where);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(full_masks_are_none),
        cmocka_unit_test(covered_prompts_are_silent),
        cmocka_unit_test(kinds_lie_where_they_are_bound),
        cmocka_unit_test(every_use_of_a_file_is_bound),
        cmocka_unit_test(prompts_change_over_the_steps),
        cmocka_unit_test(regions_name_embeddings),
        cmocka_unit_test(methods_have_regions),
        cmocka_unit_test(prompts_let_adapters_be_folded),
        cmocka_unit_test(rows_one_by_one),
        cmocka_unit_test(from_pictures_and_other_models),
        cmocka_unit_test(masks_are_data),
        cmocka_unit_test(requests_repeat),
        cmocka_unit_test(files_with_at_signs),
        cmocka_unit_test(many_regions),
        cmocka_unit_test(mistakes_are_named),
        cmocka_unit_test(names_that_clash),
        cmocka_unit_test(exit_codes),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("regions", tests, set_up, tear_down);
}
