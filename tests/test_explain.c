/* tests/test_explain.c - what is told beside a picture: the method's masks, and what each adapter
 * did; as numbers, and as the files that impasto generate writes. */
#include "tests/golden.h"
#include "tests/program.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SIDE = 32, MOST_CELLS = 32 * 32, MOST = 4 };
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

static ipt_status draw(fixture *f, seen *s)
{
    memset(s, 0, sizeof *s);
    f->r.lora = f->lora;
    f->r.masks_user = s;
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
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(masks_are_the_methods, set_up, place_destroy),
        cmocka_unit_test(methods_without_masks),
#ifdef IPT_PROGRAM
        cmocka_unit_test_setup_teardown(mask_files, set_up, place_destroy),
        cmocka_unit_test_setup_teardown(program_says_no, set_up, place_destroy),
#endif
    };
    return cmocka_run_group_tests_name("explain", tests, NULL, NULL);
}
