/* tests/test_eval.c - impasto eval compose: places and figures in closed form, intervals, lists of
 * methods, hostile worlds, a judge against torch, the command from outside. */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "eval/report.h"
#include "tests/golden.h"
#include "tests/program.h"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

/* --- places ----------------------------------------------------------------------------------- */
enum {
    N_CLASS = 4,
    LEFT = 10,
    RIGHT = 14
}; /* views in the middle row: 16 and 48 pixels from the left */

typedef struct made {
    ipt_sight s;
    float p[IPT_VIEWS][N_CLASS + 2], like[IPT_VIEWS][N_CLASS], style[2];
} made;

/* A picture of nothing. */
static void make(made *m)
{
    memset(m, 0, sizeof *m);
    m->s = (ipt_sight){
        .n_class = N_CLASS, .n_style = 2, .p = m->p[0], .like = m->like[0], .style = m->style};
    for (int v = 0; v < IPT_VIEWS; v++)
        m->p[v][N_CLASS + 1] = 1;
}

static void put(made *m, int view, int c, float p)
{
    m->p[view][c] = p;
    m->p[view][N_CLASS + 1] -= p;
    m->like[view][c] = p;
}

static ipt_scored score(const made *m, int k)
{
    static const float threshold[N_CLASS] = {0.5F, 0.5F, 0.5F, 0.5F};
    static const int concept[] = {0, 1, 2};
    ipt_scored s;
    ipt_eval_score(&m->s, threshold, concept, k, &s);
    return s;
}

static void close_to(double got, double want)
{
    if (!(fabs(got - want) < 1e-6)) /* f32 probabilities of size 1 */
        fail_msg("%g, expected %g", got, want);
}

static void test_both_there(void **state)
{
    (void)state;
    made m;
    make(&m);
    put(&m, LEFT, 0, 0.9F);
    put(&m, LEFT + 1, 0, 0.6F); /* the same object, 8 pixels aside */
    put(&m, RIGHT, 1, 0.75F);
    ipt_scored s = score(&m, 2);
    assert_int_equal(s.n_found, 2);
    assert_int_equal(s.view[0], LEFT);
    assert_int_equal(s.view[1], RIGHT);
    assert_false(s.duplicate);
    close_to(s.leak, 0);
    close_to(s.likeness[0], 0.9);
    close_to(s.likeness[1], 0.75);
    close_to(s.strangers, 0);
    put(&m, 0, 3, 0.6F);
    close_to(score(&m, 2).strangers, 0.5); /* one of the two others */
}

/* Two mixtures of both: each is given one place, and what it has in the other's is leak. */
static void test_mixtures(void **state)
{
    (void)state;
    made m;
    make(&m);
    put(&m, LEFT, 0, 0.55F);
    put(&m, LEFT, 1, 0.45F);
    put(&m, RIGHT, 0, 0.3F);
    put(&m, RIGHT, 1, 0.6F);
    ipt_scored s = score(&m, 2);
    assert_int_equal(s.n_found, 2);
    close_to(s.leak, (0.3 + 0.45) / 2);
    put(&m, LEFT, 0, 0.4F);
    s = score(&m, 2);
    assert_int_equal(s.n_found, 1);
    assert_false(s.found[0]);
}

static void test_doubled(void **state)
{
    (void)state;
    made m;
    make(&m);
    put(&m, LEFT, 1, 0.9F);
    put(&m, RIGHT, 1, 0.8F);
    ipt_scored s = score(&m, 2);
    assert_int_equal(s.n_found, 1);
    assert_true(s.duplicate);
    assert_true(s.leak > 0.39 && s.leak < 0.41); /* 0.8 of one of two */
    put(&m, 2, 0, 0.7F); /* nothing is missing: a third one is no duplicate */
    assert_false(score(&m, 2).duplicate);
}

/* Two concepts in one place are not two objects, nor one that fills the picture and one in it. */
static void test_one_place(void **state)
{
    (void)state;
    made m;
    make(&m);
    put(&m, LEFT, 0, 0.9F);
    put(&m, LEFT + 1, 1, 0.9F);
    assert_int_equal(score(&m, 2).n_found, 1);
    put(&m, LEFT + 2, 1, 0.6F);
    assert_int_equal(score(&m, 2).n_found, 2);
    make(&m);
    put(&m, IPT_VIEW_WHOLE, 0, 0.9F);
    put(&m, RIGHT, 1, 0.9F);
    assert_int_equal(score(&m, 2).n_found, 1);
    assert_int_equal(score(&m, 1).n_found, 1);
}

/* As many as possible, even where the likeliest place of one has to be given up. */
static void test_most(void **state)
{
    (void)state;
    made m;
    make(&m);
    put(&m, LEFT, 0, 0.98F);
    put(&m, RIGHT, 0, 0.51F);
    put(&m, LEFT + 1, 1, 0.6F);
    put(&m, 2, 2, 0.7F);
    ipt_scored s = score(&m, 3);
    assert_int_equal(s.n_found, 3);
    assert_int_equal(s.view[0], RIGHT);
    assert_int_equal(ipt_view_apart(LEFT, RIGHT), 32);
    assert_int_equal(ipt_view_apart(0, 24), 32);
    assert_int_equal(ipt_view_apart(0, 6), 8);
    assert_int_equal(ipt_view_apart(0, IPT_VIEW_WHOLE), 0);
}

static void test_drift(void **state)
{
    (void)state;
    static uint8_t rgb[64 * 64 * 3];
    static const uint8_t colour[3] = {10, 20, 30};
    const ipt_image im = {64, 64, rgb};
    for (size_t i = 0; i < sizeof rgb; i++)
        rgb[i] = colour[i % 3];
    memset(rgb + (32 * 64 + 32) * 3, 255, 3); /* an object in the middle does not count */
    close_to(ipt_eval_drift(&im, colour), 0);
    for (size_t i = 0; i < sizeof rgb; i++)
        rgb[i] = (uint8_t)(colour[i % 3] + (i % 3 == 0 ? 3 : 0));
    close_to(ipt_eval_drift(&im, colour), sqrt(3));
}

/* --- intervals -------------------------------------------------------------------------------- */
static void test_intervals(void **state)
{
    (void)state;
    const double even[] = {0.25, 0.25, (double)NAN, 0.25}, none[] = {(double)NAN},
                 a[] = {0.2, 0.4, 0.6, 0.8, 1.0}, b[] = {0.1, 0.2, 0.3, 0.4, 0.5};
    ipt_interval i = ipt_eval_bootstrap(even, 4, 1);
    assert_int_equal(i.n, 3);
    close_to(i.mean, 0.25);
    close_to(i.low, 0.25);
    close_to(i.high, 0.25);
    assert_true(isnan(ipt_eval_bootstrap(none, 1, 1).mean));
    i = ipt_eval_bootstrap(a, 5, 7);
    const ipt_interval again = ipt_eval_bootstrap(a, 5, 7);
    assert_memory_equal(&i, &again, sizeof i);
    close_to(i.mean, 0.6);
    /* the mean of five has deviation 0.1265: a 95 % interval is about 0.25 to each side */
    assert_true(i.low > 0.3 && i.low < 0.45 && i.high > 0.75 && i.high < 0.9);
    i = ipt_eval_ratio(a, b, 5, 7); /* resampled together: always 2 */
    close_to(i.low, 2);
    close_to(i.high, 2);
    i = ipt_eval_difference(a, a, 5, 7);
    close_to(i.low, 0);
    close_to(i.high, 0);
    close_to(ipt_eval_difference(a, b, 5, 7).mean, 0.3);
    double odd[] = {3, 1, 2}, four[] = {4, 1, 2, 3};
    close_to(ipt_eval_median(odd, 3), 2);
    close_to(ipt_eval_median(four, 4), 2.5);
}

/* --- methods ---------------------------------------------------------------------------------- */
static void test_methods(void **state)
{
    static const struct {
        const char *list, *said;
    } bad[] = {
        {"merge,nothing", "'nothing' is not in this version"},
        {"", "'' is not in this version"},
        {"merge,,switch", "'' is not in this version"},
        {"merge:gap=1", "merge has no option 'gap'"},
        {"switch:every", "not KEY=VALUE"},
        {"base:x=1", "base takes no options"},
        {"merge,merge", "stands there twice"},
    };
    place *p = *state;
    const ipt_eval_method *m = NULL;
    size_t n = 0;
    ipt_arena arena;
    ipt_arena_init(&arena, p->ctx);
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        assert_int_equal(ipt_eval_methods(&arena, bad[i].list, &m, &n), IPT_ERR_ARG);
        if (!strstr(ipt_last_error(p->ctx), bad[i].said))
            fail_msg("%s: \"%s\" does not say \"%s\"", bad[i].list, ipt_last_error(p->ctx),
                     bad[i].said);
    }
    assert_ok(p->ctx,
              ipt_eval_methods(&arena, "base,single,cmlora:interval=2;order=given,merge", &m, &n));
    assert_int_equal(n, 4);
    assert_int_equal(m[0].kind, IPT_EVAL_BASE);
    assert_int_equal(m[1].kind, IPT_EVAL_SINGLE);
    assert_string_equal(m[2].compose, "cmlora");
    assert_false(m[2].has_masks);
    assert_int_equal(m[2].n_opt, 2);
    assert_string_equal(m[2].opt[0], "interval=2");
    assert_string_equal(m[2].opt[1], "order=given");
    assert_string_equal(m[2].label, "cmlora:interval=2;order=given");
    assert_string_equal(m[2].folder, "cmlora_interval=2_order=given");
    assert_int_equal(m[3].n_opt, 0);
    ipt_arena_finish(&arena);
}

/* --- worlds ----------------------------------------------------------------------------------- */
#define ADAPTERS                                                                                   \
    "{\"concepts\":[{\"name\":\"a\",\"word\":\"x a\",\"file\":\"a.bin\"}],"                        \
    "\"styles\":[{\"name\":\"s\",\"words\":\"s\",\"file\":\"a.bin\"}],"
#define SET(concepts, single, rest)                                                                \
    ADAPTERS "\"sets\":[{\"concepts\":" concepts ",\"single\":" single ",\"prompt\":\"p\"" rest    \
             "}]}"

static void test_hostile_worlds(void **state)
{
    static const struct {
        const char *json, *said;
        ipt_status status;
    } bad[] = {
        {"[]", "no list 'concepts'", IPT_ERR_FORMAT},
        {"{", "not valid JSON", IPT_ERR_FORMAT},
        {"{\"concepts\":[{\"name\":\"a\"}]}", "no text 'word'", IPT_ERR_FORMAT},
        {"{\"concepts\":[{\"name\":\"a\",\"word\":\"w\",\"file\":\"gone\"}]}", "there is no file",
         IPT_ERR_MISSING},
        {ADAPTERS "\"sets\":[]}", "no list 'sets'", IPT_ERR_FORMAT},
        {ADAPTERS "\"sets\":[3]}", "has 0 concepts", IPT_ERR_FORMAT},
        {SET("[\"b\"]", "[\"p\"]", ""), "'b' is unknown", IPT_ERR_FORMAT},
        {SET("[\"a\",\"a\"]", "[\"p\",\"p\"]", ""), "there twice", IPT_ERR_FORMAT},
        {SET("[\"a\"]", "[]", ""), "0 prompts", IPT_ERR_FORMAT},
        {SET("[\"a\"]", "[7]", ""), "without a prompt", IPT_ERR_FORMAT},
        {SET("[\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\"]", "[1,2,3,4,5,6,7]", ""), "7 concepts",
         IPT_ERR_FORMAT},
        {SET("[\"a\"]", "[\"p\"]", ""), "no text 'style'", IPT_ERR_FORMAT},
        {SET("[\"a\"]", "[\"p\"]", ",\"style\":\"s\",\"rgb\":[1,2,300]"), "'rgb'", IPT_ERR_FORMAT},
        {SET("[\"a\"]", "[\"p\"]", ",\"style\":\"s\",\"rgb\":7"), "'rgb'", IPT_ERR_FORMAT},
    };
    static const char good[] =
        SET("[\"a\"]", "[\"q\"]", ",\"style\":\"s\",\"rgb\":[1,2,3],\"same_family\":true");
    place *p = *state;
    ipt_world w = {.n_set = 0};
    write_text(p, "a.bin", "x", 1);
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        write_text(p, "sets.json", bad[i].json, strlen(bad[i].json));
        assert_int_equal(ipt_world_open(p->ctx, p->dir, &w), bad[i].status);
        if (!strstr(ipt_last_error(p->ctx), bad[i].said))
            fail_msg("%s: \"%s\" does not say \"%s\"", bad[i].json, ipt_last_error(p->ctx),
                     bad[i].said);
    }
    write_text(p, "sets.json", good, strlen(good));
    assert_ok(p->ctx, ipt_world_open(p->ctx, p->dir, &w));
    assert_int_equal(w.n_set, 1);
    assert_int_equal(w.set[0].style_adapter, 0);
    assert_string_equal(w.set[0].single[0], "q");
    size_t n = 0;
    const ipt_eval_group *g = ipt_eval_groups(&n);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(ipt_eval_is_in(&g[i], &w.set[0]), strcmp(g[i].key, "all") == 0);
    ipt_world_finish(&w);
}

/* --- the committed world ---------------------------------------------------------------------- */
/* What the demand asks of it: 40 sets, half of the pairs of one family; adapters stay small. */
static void test_world(void **state)
{
    place *p = *state;
    ipt_world w = {.n_set = 0};
    size_t n = 0, of[8] = {0};
    assert_ok(p->ctx, ipt_world_open(p->ctx, IPT_SOURCE_DIR "/models/eval", &w));
    const ipt_eval_group *g = ipt_eval_groups(&n);
    assert_true(w.n_concept >= 12 && w.n_style >= 2 && w.n_set >= 40);
    for (size_t i = 0; i < n; i++)
        for (size_t s = 0; s < w.n_set; s++)
            of[i] += ipt_eval_is_in(&g[i], &w.set[s]);
    assert_int_equal(of[0], of[1]);
    assert_int_equal(of[2], of[0] + of[1]);
    assert_int_equal(of[6], w.n_set);
    for (size_t i = 0; i < w.n_concept; i++) {
        struct stat st;
        assert_int_equal(stat(w.concept[i].path, &st), 0);
        assert_true(st.st_size < 400 * 1000);
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(w.concept[i].words, w.concept[k].words);
    }
    ipt_world_finish(&w);
}

/* --- a judge against torch -------------------------------------------------------------------- */
static void look_at_all(ipt_ctx *ctx, ipt_judge *j, const ipt_safetensors *st)
{
    const ipt_st_tensor *t = ipt_safetensors_find(st, "pictures");
    size_t n_cell = 0;
    float *cells = golden_f32(ctx, st, "cells", NULL), *p = golden_f32(ctx, st, "p", NULL),
          *like = golden_f32(ctx, st, "like", NULL), *style = golden_f32(ctx, st, "style", NULL);
    assert_ok(ctx, ipt_st_load(t));
    const int32_t edge = (int32_t)t->dim[1];
    const size_t n_px = (size_t)edge * (size_t)edge * 3;
    assert_int_equal(t->count, (size_t)t->dim[0] * n_px);
    for (size_t i = 0; i < (size_t)t->dim[0]; i++) {
        ipt_sight s = {0};
        const ipt_image im = {edge, edge, (uint8_t *)(uintptr_t)(t->data + i * n_px)};
        assert_ok(ctx, ipt_judge_look(j, &im, &s));
        const float *got = ipt_judge_cells(j, &n_cell);
        const size_t n_p = IPT_VIEWS * (s.n_class + 2), n_like = IPT_VIEWS * s.n_class;
        /* f32 on both sides, sums of a thousand products in another order */
        golden_at_most(golden_max_rel(cells + i * 64 * n_cell, got, 64 * n_cell), 1e-4,
                       "cells of %zu", i);
        golden_at_most(golden_max_diff(p + i * n_p, s.p, n_p), 1e-4, "probabilities of %zu", i);
        golden_at_most(golden_max_diff(like + i * n_like, s.like, n_like), 1e-4,
                       "likenesses of %zu", i);
        golden_at_most(golden_max_diff(style + i * s.n_style, s.style, s.n_style), 1e-4,
                       "styles of %zu", i);
        ipt_sight_finish(&s);
    }
    ipt_free(cells);
    ipt_free(p);
    ipt_free(like);
    ipt_free(style);
}

static void test_judge(void **state)
{
    place *p = *state;
    need_device(p);
    ipt_judge *j = NULL;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    ipt_safetensors *st = golden_open(ctx, IPT_TEST_DATA, "golden_judge");
    assert_ok(ctx, ipt_judge_open(ctx, gpu, IPT_SOURCE_DIR "/models/eval/judge_1.safetensors", &j));
    look_at_all(ctx, j, st);
    assert_true(ipt_judge_class(j, "otter") >= 0);
    assert_int_equal(ipt_judge_class(j, "dog"), -1);
    assert_true(ipt_judge_style(j, "fxemoji") >= 0);
    ipt_judge_close(&j);
    ipt_safetensors_close(&st);
    test_gpu_done(&gpu, &ctx);
}

static void test_not_a_judge(void **state)
{
    place *p = *state;
    ipt_judge *j = NULL;
    assert_int_equal(
        ipt_judge_open(p->ctx, NULL, IPT_SOURCE_DIR "/models/loras/pineapple.safetensors", &j),
        IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(p->ctx), "not a judge"));
    assert_null(j);
}

/* --- the command ------------------------------------------------------------------------------ */
static void check_report(const place *p, const result *r)
{
    json_t *o = NULL;
    assert_ok(p->ctx, ipt_json_parse(p->ctx, "stdout", r->out, r->n_out, &o));
    const json_t *methods = json_object_get(o, "methods"), *merge = json_array_get(methods, 2),
                 *all = json_object_get(json_object_get(merge, "groups"), "all");
    assert_int_equal(json_array_size(methods), 5);
    assert_null(json_object_get(all, "minus_first_variant")); /* the first */
    const json_t *variant = json_array_get(methods, 4),
                 *minus =
                     json_object_get(json_object_get(json_object_get(variant, "groups"), "all"),
                                     "minus_first_variant");
    assert_string_equal(ipt_json_str(minus, "method", ""), "switch");
    assert_true(json_is_number(json_object_get(json_object_get(minus, "leak"), "mean")));
    assert_int_equal(json_array_size(json_object_get(o, "judges")), 2);
    assert_true(ipt_json_num(json_object_get(all, "cost_of_a_picture"), "rows_full", 0) ==
                4); /* two steps of two rows */
    assert_true(json_is_number(json_object_get(json_object_get(all, "presence"), "mean")));
    assert_true(json_is_null(json_object_get(all, "attention_separation")));
    assert_true(json_string_length(json_object_get(o, "drawn_on")) > 0);
    json_decref(o);
}

/* Six pictures: base, two of single, merge, switch in two ways. */
static void test_command(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    /* one half draws, the other judges: what two machines do */
    static const char *const all[] = {"base,single,merge,switch,switch:tau=1",
                                      "--sets",
                                      "1",
                                      "--seeds",
                                      "1",
                                      "--steps",
                                      "2",
                                      "-o",
                                      "e",
                                      "-q"};
    const char *draw[16] = {"eval", "compose", "--methods"},
               *judge[16] = {"eval", "compose", "--methods"};
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        draw[3 + i] = judge[3 + i] = all[i];
    draw[3 + IPT_COUNT(all)] = "--draw";
    judge[3 + IPT_COUNT(all)] = "--judge";
    judge[4 + IPT_COUNT(all)] = "--json";
    result r = run_args(p, judge);
    expect_line(&r, 64, "e/base/001-1.json: this note", "nothing is drawn yet");
    r = run_args(p, draw);
    assert_int_equal(r.rc, 0);
    assert_string_equal(r.out, "6 pictures made, 0 were there\n");
    done(&r);
    assert_int_equal(unlink(in(p, path, "e/merge/001-1.json")),
                     0); /* cut off before its note was written */
    r = run_args(p, draw);
    assert_string_equal(r.out, "1 pictures made, 5 were there\n");
    done(&r);
    r = run_args(p, judge);
    assert_int_equal(r.rc, 0);
    check_report(p, &r);
    done(&r);
    static const char *const files[] = {"e/eval.json", "e/table.md", "e/pictures.csv",
                                        "e/sheet.png", "e/single/001-1-2.png"};
    for (size_t i = 0; i < IPT_COUNT(files); i++)
        assert_true(ipt_is_file(in(p, path, files[i])));
}

static void test_command_errors(void **state)
{
    place *p = *state;
    result r = RUN(p, "eval", "compose", "--methods", "merge,sorcery");
    expect_line(&r, 2, "'sorcery' is not in this version", "an unknown method");
    r = RUN(p, "eval", "compose", "--world", "nowhere");
    expect_line(&r, 64, "nowhere/sets.json", "no world");
    r = RUN(p, "eval", "compose", "--draw", "--judge");
    expect_line(&r, 2, "exclude each other", "two halves at once");
    r = RUN(p, "eval", "compose", "--shard", "1/2");
    expect_line(&r, 2, "--shard needs --draw", "a part is judged");
    r = RUN(p, "eval", "compose", "--draw", "--shard", "3/2");
    expect_line(&r, 2, "'3/2'; expected I/N", "no such part");
    r = RUN(p, "eval", "compse");
    expect_line(&r, 2, "did you mean eval compose", "a slip");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_both_there),     cmocka_unit_test(test_mixtures),
        cmocka_unit_test(test_doubled),        cmocka_unit_test(test_one_place),
        cmocka_unit_test(test_most),           cmocka_unit_test(test_drift),
        cmocka_unit_test(test_intervals),      cmocka_unit_test(test_methods),
        cmocka_unit_test(test_hostile_worlds), cmocka_unit_test(test_world),
        cmocka_unit_test(test_judge),          cmocka_unit_test(test_not_a_judge),
        cmocka_unit_test(test_command),        cmocka_unit_test(test_command_errors),
    };
    return cmocka_run_group_tests(tests, set_up, place_destroy);
}
