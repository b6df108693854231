/* tests/test_pattern.c - expressions in alpha_pattern against what peft and Python's re say. */
#include "model_io/internal.h"
#include "tests/support.h"

#include <jansson.h>
#include <string.h>

static json_t *load(ipt_ctx *ctx)
{
    json_t *root = NULL;
    assert_ok(ctx, ipt_json_load(ctx, IPT_TEST_DATA "/peft_patterns.json", &root));
    return root;
}

static void test_matches(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_arena arena;
    ipt_arena_init(&arena, ctx);
    json_t *root = load(ctx), *row, *name;
    size_t i = 0, k = 0, n = 0;
    json_array_foreach(json_object_get(root, "cases"), i, row)
    {
        const char *text = json_string_value(json_array_get(row, 0)), *why = NULL,
                   *want = json_string_value(json_array_get(row, 2));
        const json_t *names = json_array_get(json_object_get(root, "names"),
                                             (size_t)json_integer_value(json_array_get(row, 1)));
        ipt_pattern *p = NULL;
        uint64_t budget = IPT_PATTERN_BUDGET;
        ipt_status s = ipt_pattern_create(&arena, text, &budget, &p, &why);
        if (s != IPT_OK)
            fail_msg("'%s': %s", text, why ? why : ipt_status_name(s));
        json_array_foreach(names, k, name)
        {
            if (ipt_pattern_match(p, json_string_value(name), &budget) != (want[k] == '1'))
                fail_msg("'%s' and '%s': expected %c", text, json_string_value(name), want[k]);
            n++;
        }
        assert_true(budget > 0);
    }
    assert_true(i > 250 && n > 5000);
    json_decref(root);
    ipt_arena_finish(&arena);
    ipt_ctx_destroy(&ctx);
}

static void test_refused(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_arena arena;
    ipt_arena_init(&arena, ctx);
    json_t *root = load(ctx), *row;
    size_t i = 0;
    json_array_foreach(json_object_get(root, "refused"), i, row)
    {
        const char *why = NULL;
        ipt_pattern *p = NULL;
        uint64_t budget = IPT_PATTERN_BUDGET;
        ipt_status s = ipt_pattern_create(&arena, json_string_value(row), &budget, &p, &why);
        if (s != IPT_ERR_UNSUPPORTED || !why)
            fail_msg("'%s': %s", json_string_value(row), ipt_status_name(s));
    }
    assert_true(i > 10);
    json_decref(root);
    ipt_arena_finish(&arena);
    ipt_ctx_destroy(&ctx);
}

/* Expressions that take a backtracking matcher exponential time end with the budget. */
static void test_costs(void **state)
{
    (void)state;
    static const char *const texts[] = {"((a*)*)*!", "(a|aa)+!", "(([a-z]+)+)+!",
                                        "(.*.*.*.*.*.*.*.*)*!"};
    char name[256];
    ipt_ctx *ctx = test_ctx();
    ipt_arena arena;
    ipt_arena_init(&arena, ctx);
    memset(name, 'a', sizeof name - 1);
    memcpy(name + sizeof name - 3, "!b", 3);
    for (size_t i = 0; i < IPT_COUNT(texts); i++) {
        const char *why = NULL;
        ipt_pattern *p = NULL;
        uint64_t budget = (uint64_t)1 << 20;
        assert_ok(ctx, ipt_pattern_create(&arena, texts[i], &budget, &p, &why));
        assert_false(ipt_pattern_match(p, name, &budget));
        assert_true(budget == 0);
        budget = 1000;
        assert_true(ipt_pattern_match(p, "aaaa!", &budget));
        assert_true(budget > 0);
    }
    ipt_arena_finish(&arena);
    ipt_ctx_destroy(&ctx);
}

/* A thousand modules that look for their names among a thousand stay within the budget; expressions
 * by the thousand, whose memory is large, do not. */
static void test_many(void **state)
{
    (void)state;
    enum { N = 1500 };
    ipt_ctx *ctx = test_ctx();
    ipt_arena arena;
    ipt_arena_init(&arena, ctx);
    static ipt_pattern *p[N];
    const char *why = NULL;
    uint64_t budget = IPT_PATTERN_BUDGET;
    char name[128];
    for (int i = 0; i < N; i++) {
        ipt_name(name, sizeof name, "^up_blocks.0.attentions.%d.transformer_blocks.0.attn1.to_q",
                 i);
        assert_ok(ctx, ipt_pattern_create(&arena, name, &budget, &p[i], &why));
    }
    for (int i = 0; i < N; i++) {
        ipt_name(name, sizeof name, "up_blocks.0.attentions.%d.transformer_blocks.0.attn1.to_q", i);
        for (int k = 0; k < N; k++)
            assert_int_equal(ipt_pattern_match(p[k], name, &budget), i == k);
    }
    assert_true(budget > IPT_PATTERN_BUDGET / 2);
    budget = IPT_PATTERN_BUDGET;
    int n = 0;
    while (ipt_pattern_create(&arena, "(a{250}){250}x", &budget, &p[0], &why) == IPT_OK)
        n++;
    assert_true(n > 500 && n < 1100);
    assert_string_equal(why, "the file has too many");
    ipt_arena_finish(&arena);
    ipt_ctx_destroy(&ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_matches),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_costs),
        cmocka_unit_test(test_many),
    };
    return cmocka_run_group_tests_name("pattern", tests, NULL, NULL);
}
