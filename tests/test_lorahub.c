/* tests/test_lorahub.c - LoraHub: the search in closed form and beside tools/reference, files and
 * losses beside it, what a search finds, its command. */
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/hub.h"
#include "engine/lora_fit.h"
#include "engine/lora_tools.h"
#include "engine/search.h"
#include "tests/golden.h"
#include "tests/program.h"

#define TOOLS IPT_TEST_DATA "/tools/"
#define SD1 IPT_TEST_DATA "/models/sd1"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

static double f64_at(ipt_ctx *ctx, const ipt_safetensors *st, const char *name, size_t i)
{
    double v = 0;
    const ipt_st_tensor *t = ipt_safetensors_find(st, name);
    assert_true(t && i < t->count);
    assert_ok(ctx, ipt_st_load(t));
    memcpy(&v, t->data + i * sizeof v, sizeof v);
    return v;
}

/* --- the search ------------------------------------------------------------------------------- */
/* Every point of a search over a closed form, whose goal is partly outside of the box. */
static void points_are_the_references(void **state)
{
    static const double goal[] = {0.8, -0.3, 1.9};
    place *p = *state;
    ipt_safetensors *st = golden_open(p->ctx, IPT_TEST_DATA "/combine", "golden_lorahub");
    ipt_search s;
    ipt_search_begin(&s, 3, 1.5, 42);
    for (size_t i = 0; i < 60; i++) {
        const double *x = ipt_search_ask(&s);
        double value = 0, size = 0;
        for (size_t k = 0; k < 3; k++) {
            assert_true(fabs(x[k]) <= 1.5);
            golden_at_most(fabs(x[k] - f64_at(p->ctx, st, "points", 3 * i + k)), 1e-6, "point %zu",
                           i); /* normal values are rounded to f32 */
            value += (x[k] - goal[k]) * (x[k] - goal[k]);
            size += fabs(x[k]) / 3;
        }
        value += 0.05 * size;
        golden_at_most(fabs(value - f64_at(p->ctx, st, "values", i)), 1e-5, "value %zu", i);
        ipt_search_tell(&s, value);
    }
    for (size_t k = 0; k < 3; k++)
        golden_at_most(fabs(s.best[k] - f64_at(p->ctx, st, "best", k)), 1e-6, "best");
    ipt_safetensors_close(&st);
}

/* It comes near a minimum inside, to the wall where the minimum is behind it, and stays at the
 * start when nothing is better. */
static void search_finds(void **state)
{
    ipt_search s;
    (void)state;
    ipt_search_begin(&s, 2, 1.5, 1);
    for (int i = 0; i < 200; i++) {
        const double *x = ipt_search_ask(&s);
        ipt_search_tell(&s, (x[0] - 0.7) * (x[0] - 0.7) + (x[1] - 9) * (x[1] - 9));
    }
    assert_true(fabs(s.best[0] - 0.7) < 0.05 && fabs(s.best[1] - 1.5) < 0.01);
    for (int bad = 0; bad < 2; bad++) {
        ipt_search_begin(&s, 2, 1.5, 1);
        for (int i = 0; i < 50; i++) {
            const double *x = ipt_search_ask(&s);
            assert_true(i > 0 || !(fabs(x[0]) + fabs(x[1]) > 0));
            ipt_search_tell(&s, i > 0 && bad ? (double)NAN : fabs(x[0]) + fabs(x[1]));
        }
        assert_true(!(fabs(s.best[0]) + fabs(s.best[1]) > 0));
    }
}

/* --- files ------------------------------------------------------------------------------------ */
static ipt_status merge_files(const place *p, const char *files, const float *weight,
                              const char *out)
{
    char path[3][512], *text = NULL;
    ipt_lora l[3];
    size_t n = strlen(files);
    ipt_lora_job job = {.model = SD1, .out = out};
    ipt_lora_merge_opts o = {.method = "lorahub", .density = 0.5};
    for (size_t i = 0; i < n; i++) {
        ipt_name(path[i], sizeof path[i], TOOLS "%c.safetensors", files[i]);
        l[i] = (ipt_lora){.path = path[i], .weight = weight[i], .te_weight = weight[i]};
    }
    ipt_status s = ipt_lora_merge(p->ctx, &job, l, n, &o, &text);
    ipt_free(text);
    return s;
}

/* Relative distance of the changes of a file from a golden's; absolute where those are zero. */
static double file_distance(const place *p, const ipt_safetensors *st, const char *name,
                            const char *path)
{
    ipt_lora_fit f = {0};
    double worst = 0;
    assert_ok(p->ctx, ipt_lora_fit_open(p->ctx, path, SD1, NULL, &f));
    ipt_tool t = {.ctx = p->ctx, .module = f.modules.module, .n_module = f.modules.n};
    assert_int_equal(f.file->n_module, 5);
    for (size_t i = 0; i < f.file->n_module; i++) {
        const ipt_adapter_module *a = &f.file->module[i];
        const ipt_module *m = &t.module[a->module];
        char key[256];
        double *v = NULL, diff = 0, all = 0;
        ipt_name(key, sizeof key, "%s.%s%s", name,
                 m->comp == IPT_COMP_UNET ? "lora_unet_" : "lora_te_", m->name);
        for (char *c = key + strlen(name) + 1; *c; c++)
            *c = *c == '.' ? '_' : *c;
        assert_ok(p->ctx, ipt_tool_delta(&t, a, &v));
        for (size_t k = 0; k < (size_t)a->out * (size_t)a->in * (size_t)a->kh * (size_t)a->kw;
             k++) {
            double x = f64_at(p->ctx, st, key, k);
            diff += (v[k] - x) * (v[k] - x);
            all += x * x;
        }
        ipt_free(v);
        worst = fmax(worst, all > 0 ? sqrt(diff / all) : sqrt(diff));
    }
    ipt_lora_fit_finish(&f);
    return worst;
}

static void files_beside_the_reference(void **state)
{
    static const struct {
        const char *name, *files;
        float weight[3];
    } cases[] = {{"two", "ab", {0.7F, -0.4F}},
                 {"ranks", "abc", {0.8F, 0.5F, -1.1F}},
                 {"alone", "c", {-0.5F}},
                 {"none", "ab", {0}}};
    place *p = *state;
    char out[PATH_MAX];
    ipt_safetensors *st = golden_open(p->ctx, IPT_TEST_DATA "/combine", "golden_lorahub");
    in(p, out, "hub.safetensors");
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        assert_ok(p->ctx, merge_files(p, cases[i].files, cases[i].weight, out));
        double d = file_distance(p, st, cases[i].name, out);
        print_message("  %-8s %.2g\n", cases[i].name, d);
        golden_at_most(d, 2e-7, "%s", cases[i].name); /* factors are f32 */
    }
    ipt_safetensors_close(&st);
}

/* --- losses ----------------------------------------------------------------------------------- */
/* A request for two adapters and the golden's picture, in a file that is removed with the place. */
typedef struct scene {
    ipt_ctx *ctx;
    ipt_engine *e;
    ipt_safetensors *st;
    char path[PATH_MAX];
    const char *picture[1];
    ipt_lora lora[2];
    ipt_request r;
    ipt_hub_opts o;
    ipt_stop stop;
    int32_t shown, total, stop_at;
} scene;

static void begin_scene(const place *p, scene *s)
{
    *s = (scene){.stop_at = INT32_MAX};
    s->e = test_engine(&s->ctx, IPT_PRECISION_F32, 0);
    s->st = golden_open(s->ctx, IPT_TEST_DATA "/combine", "golden_lorahub");
    size_t n = 0;
    float *v = golden_f32(s->ctx, s->st, "picture", &n);
    ipt_image im = {32, 24, ipt_alloc(s->ctx, n)};
    assert_true(im.rgb && n == 32 * 24 * 3);
    for (size_t i = 0; i < n; i++)
        im.rgb[i] = (uint8_t)lrintf(v[i] * 255.0F);
    s->picture[0] = in(p, s->path, "picture.png");
    assert_ok(s->ctx, ipt_image_save(s->ctx, s->path, &im, NULL, NULL));
    ipt_image_finish(&im);
    ipt_free(v);
    s->lora[0] = (ipt_lora){.path = TOOLS "a.safetensors", .end = 1};
    s->lora[1] = (ipt_lora){.path = TOOLS "b.safetensors", .end = 1};
    ipt_request_init(&s->r);
    s->r.model = SD1;
    s->r.prompt = ipt_safetensors_meta(s->st, "prompt");
    s->r.width = 32;
    s->r.height = 24;
    s->r.seed = 7;
    s->r.lora = s->lora;
    s->r.n_lora = 2;
    s->o = (ipt_hub_opts){
        .picture = s->picture, .n_picture = 1, .pairs = 3, .evaluations = 6, .penalty = -1};
}

static void end_scene(scene *s)
{
    ipt_safetensors_close(&s->st);
    test_engine_done(&s->e, &s->ctx);
}

static void set_weights(scene *s, float a, float b)
{
    s->lora[0].weight = s->lora[0].te_weight = a;
    s->lora[1].weight = s->lora[1].te_weight = b;
}

static void losses_are_the_references(void **state)
{
    scene s;
    double loss = 0, none = 0;
    begin_scene(*state, &s);
    set_weights(&s, 0.7F, -0.4F);
    assert_ok(s.ctx, ipt_hub_loss(s.e, &s.r, &s.o, &loss));
    golden_at_most(fabs(loss / f64_at(s.ctx, s.st, "loss_two", 0) - 1), 1e-5, "two");
    set_weights(&s, 0, 0);
    assert_ok(s.ctx, ipt_hub_loss(s.e, &s.r, &s.o, &none));
    golden_at_most(fabs(none / f64_at(s.ctx, s.st, "loss_none", 0) - 1), 1e-5, "none");
    assert_true(fabs(loss - none) > 1e-4 * none);
    set_weights(&s, -0.7F, 0.4F); /* quadratic: signs of all together do not matter */
    double turned = 0;
    assert_ok(s.ctx, ipt_hub_loss(s.e, &s.r, &s.o, &turned));
    assert_true(fabs(turned - loss) < 1e-6 * loss);
    end_scene(&s);
}

/* --- searches --------------------------------------------------------------------------------- */
static void watch(void *user, const ipt_progress *p)
{
    scene *s = user;
    assert_string_equal(p->stage, "search");
    assert_true(p->done >= s->shown && p->done <= p->total);
    s->shown = p->done;
    s->total = p->total;
    if (p->done == s->stop_at)
        ipt_stop_ask(&s->stop);
}

static void searches(void **state)
{
    scene s;
    ipt_hub a = {0}, b = {0};
    double loss = 0;
    begin_scene(*state, &s);
    s.r.progress = watch;
    s.r.user = &s;
    assert_ok(s.ctx, ipt_hub_search(s.e, &s.r, &s.o, &a));
    assert_true(s.shown == 18 && s.total == 18);
    assert_int_equal(a.evaluations, 6);
    s.shown = 0;
    assert_ok(s.ctx, ipt_hub_search(s.e, &s.r, &s.o, &b)); /* the same again */
    assert_memory_equal(a.weight, b.weight, sizeof a.weight);
    s.r.progress = NULL;
    set_weights(&s, (float)a.weight[0], (float)a.weight[1]);
    assert_ok(s.ctx, ipt_hub_loss(s.e, &s.r, &s.o, &loss)); /* told is what the weights give */
    assert_true(fabs(loss - a.loss) <= 0 && a.loss <= a.none);
    s.o.evaluations = 1; /* the start alone */
    assert_ok(s.ctx, ipt_hub_search(s.e, &s.r, &s.o, &b));
    assert_true(!(fabs(b.weight[0]) + fabs(b.weight[1]) > 0) && fabs(b.loss - b.none) <= 0);
    s.o.evaluations = 20; /* no gain is worth such a penalty */
    s.o.penalty = 100;
    assert_ok(s.ctx, ipt_hub_search(s.e, &s.r, &s.o, &b));
    assert_true(!(fabs(b.weight[0]) + fabs(b.weight[1]) > 0));
    s.r.progress = watch; /* a stop between two evaluations of the UNet */
    s.shown = 0;
    s.stop_at = 7;
    s.r.stop = &s.stop;
    assert_int_equal(ipt_hub_search(s.e, &s.r, &s.o, &b), IPT_ERR_CANCELLED);
    assert_int_equal(s.shown, 7);
    s.r.stop = NULL;
    s.r.progress = NULL;
    s.o.evaluations = 1;
    assert_ok(s.ctx, ipt_hub_search(s.e, &s.r, &s.o, &b)); /* the engine goes on */
    end_scene(&s);
}

static void wrong_searches(void **state)
{
    scene s;
    ipt_hub h = {0};
    begin_scene(*state, &s);
    const ipt_request right = s.r;
    const ipt_hub_opts usual = s.o;
    for (int i = 0; i < 8; i++) {
        static const char *const said[] = {
            "found 0 adapters", "found 0 pictures", "found 101 noise",        "the prompt joins",
            "the prompt joins", "nowhere.png",      "unknown compose method", "lokr"};
        s.r = right;
        s.o = usual;
        s.picture[0] = s.path;
        s.lora[1].path = TOOLS "b.safetensors";
        s.r.n_lora = i == 0 ? 0 : 2;
        s.o.n_picture = i == 1 ? 0 : 1;
        s.o.pairs = i == 2 ? 101 : 1;
        if (i == 3)
            s.r.prompt = "a cat AND a dog";
        if (i == 4) {
            s.r.prompt = "a cat <lora:" TOOLS "c.safetensors:1>";
            s.r.n_lora = 1;
        }
        if (i == 5)
            s.picture[0] = "/nowhere.png";
        if (i == 6)
            s.r.compose = "hub";
        if (i == 7)
            s.lora[1].path = IPT_TEST_DATA "/kinds/lokr.safetensors";
        ipt_status status = ipt_hub_search(s.e, &s.r, &s.o, &h);
        if (status == IPT_OK || !strstr(ipt_last_error(s.ctx), said[i]))
            fail_msg("case %d: %s: %s", i, ipt_status_name(status), ipt_last_error(s.ctx));
    }
    end_scene(&s);
}

/* --- the program ------------------------------------------------------------------------------ */
/* The recipe is a request, and what it draws is what its weights draw as options. */
static void recipe(const place *p)
{
    char path[PATH_MAX], *text = NULL, first[64], second[64];
    size_t n = 0;
    json_t *o = NULL;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "recipe.json"), 1 << 16, &text, &n));
    assert_ok(p->ctx, ipt_json_parse(p->ctx, "recipe", text, n, &o));
    ipt_free(text);
    assert_string_equal(ipt_json_str(o, "compose", ""), "lorahub");
    assert_string_equal(ipt_json_str(o, "model", ""), SD1);
    const json_t *l = json_object_get(o, "lora");
    assert_int_equal(json_array_size(l), 2);
    assert_null(json_object_get(o, "seed"));
    ipt_name(first, sizeof first, "%.9g",
             ipt_json_num(json_array_get(l, 0), "weight", (double)NAN));
    ipt_name(second, sizeof second, "%.9g",
             ipt_json_num(json_array_get(l, 1), "weight", (double)NAN));
    json_decref(o);
    char a[512], b[512];
    ipt_name(a, sizeof a, TOOLS "a.safetensors:%s", first);
    ipt_name(b, sizeof b, TOOLS "b.safetensors:%s", second);
    result r = RUN(p, "generate", "--request", "recipe.json", "-p", "a cat", "--seed", "4",
                   "--steps", "2", "-W", "32", "-H", "32", "-o", "one.png");
    assert_int_equal(r.rc, 0);
    done(&r);
    r = RUN(p, "generate", "-m", SD1, "--compose", "lorahub", "--lora", a, "--lora", b, "-p",
            "a cat", "--seed", "4", "--steps", "2", "-W", "32", "-H", "32", "-o", "two.png");
    assert_int_equal(r.rc, 0);
    done(&r);
    ipt_image x = {0}, y = {0};
    assert_ok(p->ctx, ipt_image_load(p->ctx, in(p, path, "one.png"), &x));
    assert_ok(p->ctx, ipt_image_load(p->ctx, in(p, path, "two.png"), &y));
    assert_memory_equal(x.rgb, y.rgb, 32 * 32 * 3);
    ipt_image_finish(&x);
    ipt_image_finish(&y);
}

static void program(void **state)
{
    static const uint8_t grey[24 * 40 * 3] = {0};
    place *p = *state;
    char path[PATH_MAX], folder[PATH_MAX];
    assert_true(ipt_make_dirs((char *)(uintptr_t)in(p, folder, "pictures")));
    ipt_image im = {40, 24, (uint8_t *)(uintptr_t)grey};
    assert_ok(p->ctx, ipt_image_save(p->ctx, in(p, path, "pictures/b.png"), &im, NULL, NULL));
    assert_ok(p->ctx, ipt_image_save(p->ctx, in(p, path, "pictures/a.jpg"), &im, NULL, NULL));
    write_text(p, "pictures/notes.txt", "no picture", 10);
    assert_true(ipt_make_dirs((char *)(uintptr_t)in(p, folder, "empty")));
    result r = RUN(p, "lora", "hub", TOOLS "a.safetensors", "-p", "x", "-o", "x.json");
    expect_line(&r, 2, "--images DIR", "no pictures named");
    r = RUN(p, "lora", "hub", TOOLS "a.safetensors", "-p", "x", "-o", "x.json", "--images", "none");
    expect_line(&r, 64, "none", "no folder");
    r = RUN(p, "lora", "hub", TOOLS "a.safetensors", "-p", "x", "-o", "x.json", "--images",
            "empty");
    expect_line(&r, 64, "found no .png", "an empty folder");
    r = RUN(p, "lora", "hub", TOOLS "a.safetensors", "-p", "x", "-o", "none/x.json", "--images",
            "pictures");
    expect_line(&r, 73, "folder does not exist", "no place for the recipe");
    need_device(p);
    r = RUN(p, "lora", "hub", TOOLS "a.safetensors", TOOLS "b.safetensors", "--images", "pictures",
            "-p", "a cat", "-m", SD1, "-W", "32", "-H", "32", "--evaluations", "4", "--pairs", "2",
            "-o", "recipe.json", "--json");
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.err, "searching 16/16"));
    json_t *o = json_loads(r.out, 0, NULL);
    assert_int_equal(ipt_json_int(o, "evaluations", 0), 4);
    assert_true(ipt_json_num(o, "loss", 9) <= ipt_json_num(o, "loss_without", 0));
    json_decref(o);
    done(&r);
    recipe(p);
}

/* ctrl-C in the middle: the signal's exit code, and no recipe. */
static void interrupted(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    pid_t pid = program_start(p,
                              (const char *const[]){"lora", "hub", TOOLS "a.safetensors",
                                                    "--images", "pictures", "-p", "a cat", "-m",
                                                    SD1, "-W", "32", "-H", "32", "--evaluations",
                                                    "100000", "-o", "late.json", NULL},
                              false);
    sleep(2);
    kill(pid, SIGINT);
    result r = program_finish(p, pid);
    expect_line(&r, 130, "interrupted", "interrupted");
    assert_false(ipt_is_file(in(p, path, "late.json")));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(points_are_the_references),
        cmocka_unit_test(search_finds),
        cmocka_unit_test(files_beside_the_reference),
        cmocka_unit_test(losses_are_the_references),
        cmocka_unit_test(searches),
        cmocka_unit_test(wrong_searches),
        cmocka_unit_test(program),
        cmocka_unit_test(interrupted),
    };
    return cmocka_run_group_tests_name("lorahub", tests, set_up, place_destroy);
}
