/* tests/test_prompt_edits.c - prompts that change over the steps, and AND: against what A1111's
 * grammar gives under its own parser generator (tests/data/prompt_edits.json). */
#include "tests/support.h"

#include "text_encoder/tokenizer.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static ipt_ctx *ctx;

static int set_up(void **state)
{
    (void)state;
    ctx = test_ctx();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    ipt_ctx_destroy(&ctx);
    return 0;
}

static json_t *cases(const char *key)
{
    const char *path = getenv("IPT_TEST_PROMPTS");
    json_t *o = NULL;
    assert_ok(ctx, ipt_json_load(ctx, path ? path : IPT_TEST_DATA "/prompt_edits.json", &o));
    json_t *list = json_incref(json_object_get(o, key));
    json_decref(o);
    assert_true(json_array_size(list) > 0);
    return list;
}

/* One schedule: [[end, text], ...]; every step shows the entry that A1111 takes for it. */
static void check_schedule(const char *text, int32_t steps, const json_t *want)
{
    ipt_prompt_edits *p = NULL;
    size_t n = strlen(text), entry = 0;
    char *out = malloc(n + 1);
    assert_non_null(out);
    assert_ok(ctx, ipt_prompt_edits_create(ctx, text, n, steps, &p));
    for (int32_t step = 0; step <= steps + 1; step++) {
        const json_t *e = json_array_get(want, entry);
        int32_t last = (int32_t)json_integer_value(json_array_get(e, 0));
        if (step > last && entry + 1 < json_array_size(want)) {
            e = json_array_get(want, ++entry);
            last = (int32_t)json_integer_value(json_array_get(e, 0));
        }
        int32_t end = ipt_prompt_edits_end(p, step);
        size_t len = ipt_prompt_edits_text(p, end, out);
        if (end != last || len != strlen(out) ||
            strcmp(out, json_string_value(json_array_get(e, 1))) != 0)
            fail_msg("'%s' of %d steps, step %d: '%s' until %d, expected '%s' until %d", text,
                     steps, step, out, end, json_string_value(json_array_get(e, 1)), last);
    }
    assert_int_equal(entry + 1, json_array_size(want));
    ipt_prompt_edits_destroy(&p);
    free(out);
}

static void schedules(void **state)
{
    (void)state;
    json_t *list = cases("edits");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *c = json_array_get(list, i);
        check_schedule(json_string_value(json_object_get(c, "text")),
                       (int32_t)json_integer_value(json_object_get(c, "steps")),
                       json_object_get(c, "schedule"));
    }
    json_decref(list);
}

static void conjunctions(void **state)
{
    (void)state;
    json_t *list = cases("and");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *c = json_array_get(list, i), *want = json_object_get(c, "parts");
        const char *text = json_string_value(json_object_get(c, "text"));
        ipt_prompt_conjunct part[16];
        size_t n = 0;
        assert_ok(ctx, ipt_prompt_split(ctx, text, strlen(text), part, 16, &n));
        if (n != json_array_size(want))
            fail_msg("'%s': %zu parts, expected %zu", text, n, json_array_size(want));
        for (size_t k = 0; k < n; k++) {
            const char *t = json_string_value(json_array_get(json_array_get(want, k), 0));
            double w = json_number_value(json_array_get(json_array_get(want, k), 1));
            if (part[k].len != strlen(t) || memcmp(part[k].text, t, part[k].len) != 0 ||
                fabs(part[k].weight - w) > 0)
                fail_msg("'%s', part %zu: '%.*s' %g, expected '%s' %g", text, k, (int)part[k].len,
                         part[k].text, part[k].weight, t, w);
        }
    }
    json_decref(list);
}

/* Deep and long texts take no deep stack and no long time; what they give is never longer. */
static void hostile(void **state)
{
    enum { N = 60000 };
    static const char *const pieces[] = {"[",  "]",   "(",   ")",     "|",    ":", ":3]", "[a|b]",
                                         "\\", "\\[", "AND", ":0.5]", "\xff", "x", "\n"};
    static char text[N + 16], out[N + 16];
    (void)state;
    for (int round = 0; round < 12; round++) {
        uint64_t seed = (uint64_t)round;
        ipt_prompt_edits *p = NULL;
        ipt_prompt_conjunct part[32];
        size_t n = 0, parts = 0;
        text[0] = 0;
        while (n < N - 8) {
            const char *s = round == 0   ? "["
                            : round == 1 ? (n < N / 2 ? "[" : "]")
                            : round == 2 ? (n < N / 2 ? "[" : ":3]")
                            : round == 3 ? (n < N / 2 ? "[|" : "]")
                                         : pieces[ipt_rng_next(&seed) % IPT_COUNT(pieces)];
            n += (size_t)snprintf(text + n, sizeof text - n, "%s", s);
        }
        assert_ok(ctx, ipt_prompt_edits_create(ctx, text, n, 1000, &p));
        for (int32_t step = 0; step < 1000; step += 199)
            assert_true(ipt_prompt_edits_text(p, ipt_prompt_edits_end(p, step), out) <= n);
        ipt_prompt_edits_destroy(&p);
        ipt_status s = ipt_prompt_split(ctx, text, n, part, 32, &parts);
        assert_true(s == IPT_OK || s == IPT_ERR_ARG);
    }
}

/* A weight beyond double is text, and leaves the weight alone. */
static void endless_weight(void **state)
{
    char text[512] = "a :1";
    ipt_prompt_conjunct part[2];
    size_t n = 0;
    (void)state;
    memset(text + 4, '9', 400);
    assert_ok(ctx, ipt_prompt_split(ctx, text, strlen(text), part, 2, &n));
    assert_int_equal(n, 1);
    assert_int_equal(part[0].len, strlen(text));
    assert_true(!(part[0].weight < 1) && !(part[0].weight > 1));
}

static void limits_are_named(void **state)
{
    ipt_prompt_edits *p = NULL;
    ipt_prompt_conjunct part[2];
    size_t n = 0;
    char *big = calloc(1, IPT_TOKEN_MAX_TEXT + 2);
    (void)state;
    assert_non_null(big);
    memset(big, 'a', IPT_TOKEN_MAX_TEXT + 1);
    assert_int_equal(ipt_prompt_edits_create(ctx, big, IPT_TOKEN_MAX_TEXT + 1, 4, &p), IPT_ERR_ARG);
    free(big);
    assert_int_equal(ipt_prompt_split(ctx, "a AND b AND c", 13, part, 2, &n), IPT_ERR_ARG);
    for (uint64_t k = 1;; k++) {
        ipt_alloc_fail_after(ctx, k);
        ipt_status s = ipt_prompt_edits_create(ctx, "[a|b]", 5, 4, &p);
        ipt_alloc_fail_after(ctx, 0);
        ipt_prompt_edits_destroy(&p);
        if (s == IPT_OK)
            break;
        assert_int_equal(s, IPT_ERR_NOMEM);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(schedules), cmocka_unit_test(conjunctions),
                                       cmocka_unit_test(hostile), cmocka_unit_test(endless_weight),
                                       cmocka_unit_test(limits_are_named)};
    return cmocka_run_group_tests_name("prompt_edits", tests, set_up, tear_down);
}
