/* tests/test_request.c - requests as JSON: every field both ways, hostile texts, and the same bytes
 * from options, from JSON and from a picture. */
#include "tests/program.h"

#include "engine/impasto.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SD1 IPT_TEST_DATA "/models/sd1"
#define LORA IPT_TEST_DATA "/golden_lora_kohya.safetensors"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

/* --- every field ------------------------------------------------------------------------------ */
/* A value that is not the default, by the type of the field. */
#define VALUE_TEXT(min) "\"text of \\\"it\\\" \\u00e9 \\n\""
#define VALUE_PROMPT(min) "\"\""
#define VALUE_INT(min) #min
#define VALUE_NUMBER(min) "0.1"
#define VALUE_SEED(min) "\"18446744073709551615\""
#define VALUE_CHOICE(min) NULL
#define VALUE_FLAG(min) "true"
#define VALUE_OFF(min) "false"
#define VALUE_TILE(min) "\"never\""
#define VALUE_TEXTS(min) "[\"a=1\",\"b\"]"
#define VALUE_LORAS(min)                                                                           \
    "[{\"file\":\"a\",\"weight\":-0.5,\"te_weight\":0.25,\"word\":\"w\",\"start\":0.25,"           \
    "\"end\":0.5,\"blocks\":\"mid:0\"},{\"file\":\"b\"}]"
static const struct {
    const char *name, *value, *choices, *needs;
} fields[] = {
#define IPT_FIELD(type, member, name, option, letter, value, help, min, max, choices, needs, say)  \
    {name, VALUE_##type(min), choices, needs},
#include "engine/request.def"
#undef IPT_FIELD
};

/* Reads a text, writes it, reads that: both writings are the same. */
static json_t *there_and_back(ipt_arena *arena, const char *text)
{
    ipt_request r, again;
    ipt_request_init(&r);
    ipt_request_init(&again);
    assert_ok(arena->ctx, ipt_request_parse(arena, "first", text, strlen(text), &r));
    char *one = ipt_request_write(&r, arena);
    assert_non_null(one);
    assert_ok(arena->ctx, ipt_request_parse(arena, "second", one, strlen(one), &again));
    char *two = ipt_request_write(&again, arena);
    assert_string_equal(one, two);
    json_t *o = json_loads(two, 0, NULL);
    assert_non_null(o);
    return o;
}

static void test_every_field_both_ways(void **state)
{
    place *p = *state;
    ipt_arena arena;
    ipt_arena_init(&arena, p->ctx);
    for (size_t i = 0; i < IPT_COUNT(fields); i++) {
        char text[512], choice[64] = "";
        const char *value = fields[i].value;
        if (fields[i].choices) { /* the last one of them */
            const char *last = strrchr(fields[i].choices, ' ');
            value = ipt_name(choice, sizeof choice, "\"%s\"", last + 1);
        }
        bool low = strcmp(value, "0") == 0; /* a count whose least value means: not given */
        ipt_name(text, sizeof text, "{\"%s\":%s%s%s%s}", fields[i].name, low ? "2" : value,
                 fields[i].needs ? ",\"init\":\"i.png\",\"mask\":\"" : "",
                 fields[i].needs ? "m.png" : "", fields[i].needs ? "\"" : "");
        json_t *o = there_and_back(&arena, text), *want = json_loads(text, 0, NULL);
        const json_t *got = json_object_get(o, fields[i].name);
        if (strcmp(fields[i].name, "lora") == 0) { /* what is left out is filled in */
            assert_int_equal(json_array_size(got), 2);
            assert_true(json_equal(json_array_get(got, 0),
                                   json_array_get(json_object_get(want, "lora"), 0)));
        } else if (!json_equal(got, json_object_get(want, fields[i].name))) {
            fail_msg("%s: %s did not come back", fields[i].name, text);
        }
        json_decref(o);
        json_decref(want);
    }
    ipt_arena_finish(&arena);
}

/* --- hostile texts ---------------------------------------------------------------------------- */
static void test_bad_fields_are_named(void **state)
{
    static const struct {
        const char *text, *says;
    } rows[] = {
        {"", "not valid JSON"},
        {"{", "not valid JSON"},
        {"[1]", "expected a JSON object"},
        {"3", "not valid JSON"},
        {"{\"stepps\":3}", "field 'stepps' is unknown"},
        {"{\"Steps\":3}", "field 'Steps' is unknown"},
        {"{\"\":3}", "field '' is unknown"},
        {"{\"trace\":\"/x\"}", "field 'trace' is unknown"},
        {"{\"steps\":\"ten\"}",
         "field 'steps': found \"ten\", expected a whole number from 1 to 1000"},
        {"{\"steps\":0}", "field 'steps': found 0"},
        {"{\"steps\":1001}", "field 'steps': found 1001"},
        {"{\"steps\":2.0}", "field 'steps': found 2.0"},
        {"{\"steps\":9999999999999999999999}", "not valid JSON"},
        {"{\"steps\":null}", "field 'steps': found null"},
        {"{\"cfg\":\"7\"}", "field 'cfg': found \"7\", expected a number from 0 to 100"},
        {"{\"cfg\":-0.1}", "field 'cfg'"},
        {"{\"prompt\":7}", "field 'prompt': found 7, expected a text"},
        {"{\"prompt\":\"a\\u0000b\"}", "not valid JSON"},
        {"{\"prompt\":\"a\",\"prompt\":\"b\"}", "duplicate"},
        {"{\"model\":\"\"}", "field 'model': found \"\", expected a text that is not empty"},
        {"{\"seed\":-1}", "field 'seed': found -1"},
        {"{\"seed\":\"\"}", "field 'seed'"},
        {"{\"seed\":\"1x\"}", "field 'seed'"},
        {"{\"seed\":\"18446744073709551616\"}", "field 'seed'"},
        {"{\"rng\":\"cuda\"}", "field 'rng': found \"cuda\", expected one of: torch-cpu philox"},
        {"{\"rng\":\"torch-cpu philox\"}", "field 'rng'"},
        {"{\"allow_partial\":1}", "field 'allow_partial': found 1, expected true or false"},
        {"{\"paste\":\"yes\"}", "field 'paste'"},
        {"{\"vae_tile\":\"sometimes\"}", "expected \"auto\", \"never\" or a whole number from 64"},
        {"{\"vae_tile\":8}", "field 'vae_tile': found 8"},
        {"{\"compose_opt\":\"tau=5\"}", "field 'compose_opt'"},
        {"{\"compose_opt\":[\"a\",3]}", "field 'compose_opt[1]': found 3"},
        {"{\"lora\":{}}", "field 'lora': found {}, expected a list of at most 32 LoRAs"},
        {"{\"lora\":[7]}", "field 'lora[0]': found 7"},
        {"{\"lora\":[{\"file\":\"a\"},{}]}", "field 'lora[1].file': found nothing"},
        {"{\"lora\":[{\"file\":\"a\",\"wieght\":1}]}", "field 'lora[0].wieght' is unknown"},
        {"{\"lora\":[{\"file\":\"a\",\"weight\":101}]}",
         "field 'lora[0].weight': found 101, expected a number from -100 to 100"},
        {"{\"lora\":[{\"file\":\"a\",\"end\":2}]}", "field 'lora[0].end'"},
        {"{\"x\\u001b[31m\":1}", "field 'x\\x1b[31m' is unknown"},
    };
    place *p = *state;
    ipt_arena arena;
    ipt_arena_init(&arena, p->ctx);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_request r, before;
        ipt_request_init(&r);
        memcpy(&before, &r, sizeof r);
        ipt_status s =
            ipt_request_parse(&arena, "some.json", rows[i].text, strlen(rows[i].text), &r);
        if (s != IPT_ERR_FORMAT || !strstr(ipt_last_error(p->ctx), rows[i].says) ||
            !strstr(ipt_last_error(p->ctx), "some.json: "))
            fail_msg("%s: '%s', expected '%s'", rows[i].text, ipt_last_error(p->ctx), rows[i].says);
        assert_memory_equal(&r, &before, sizeof r);
    }
    char *deep = calloc(1, 200001);
    assert_non_null(deep);
    memset(deep, '[', 200000);
    ipt_request r;
    ipt_request_init(&r);
    assert_int_equal(ipt_request_parse(&arena, "deep", deep, 200000, &r), IPT_ERR_FORMAT);
    free(deep);
    ipt_arena_finish(&arena);
}

/* A PNG that is cut, lies about lengths, or has the text of another program. */
static void test_broken_pictures(void **state)
{
    place *p = *state;
    ipt_image im = {2, 2, ipt_alloc(p->ctx, 12)};
    char path[PATH_MAX], *data = NULL;
    const char *text = NULL;
    size_t n = 0, n_text = 0;
    assert_non_null(im.rgb);
    assert_ok(p->ctx, ipt_image_save(p->ctx, in(p, path, "a.png"), &im, "t", "{\"steps\":3}"));
    assert_ok(p->ctx, ipt_file_read(p->ctx, path, 1 << 20, &data, &n));
    assert_ok(p->ctx, ipt_image_find_request(p->ctx, "a.png", data, n, &text, &n_text));
    assert_int_equal(n_text, 11);
    assert_memory_equal(text, "{\"steps\":3}", 11);
    size_t end = (size_t)(text - data) + n_text;
    for (size_t k = 8; k < end; k++) { /* each cut, in memory of that size */
        char *cut = malloc(k);
        assert_non_null(cut);
        memcpy(cut, data, k);
        assert_int_equal(ipt_image_find_request(p->ctx, "cut", cut, k, &text, &n_text),
                         IPT_ERR_FORMAT);
        free(cut);
    }
    for (size_t k = 8; k < end; k++) { /* each byte another: found or not, never outside */
        char kept = data[k];
        data[k] = (char)0xff;
        if (ipt_image_find_request(p->ctx, "a.png", data, n, &text, &n_text) == IPT_OK)
            assert_true(text >= data && text + n_text <= data + n);
        data[k] = kept;
    }
    ipt_free(data);
    assert_ok(p->ctx, ipt_image_save(p->ctx, path, &im, "t", NULL));
    ipt_arena arena;
    ipt_request r;
    ipt_arena_init(&arena, p->ctx);
    ipt_request_init(&r);
    assert_int_equal(ipt_request_load(&arena, path, &r), IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(p->ctx), "holds no request"));
    ipt_arena_finish(&arena);
    ipt_image_finish(&im);
}

/* --- the program ------------------------------------------------------------------------------ */
static void expect_same_files(const place *p, const char *a, const char *b, const char *what)
{
    char path[PATH_MAX], *x = NULL, *y = NULL;
    size_t n = 0, m = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, a), 1 << 24, &x, &n));
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, b), 1 << 24, &y, &m));
    if (n != m || memcmp(x, y, n) != 0)
        fail_msg("%s: %s and %s differ", what, a, b);
    ipt_free(x);
    ipt_free(y);
}

/* The JSON of a.png as r.json. */
static void take_request(const place *p)
{
    char path[PATH_MAX], *data = NULL;
    const char *text = NULL;
    size_t n = 0, n_text = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "a.png"), 1 << 24, &data, &n));
    assert_ok(p->ctx, ipt_image_find_request(p->ctx, path, data, n, &text, &n_text));
    write_text(p, "r.json", text, n_text);
    ipt_free(data);
}

/* Options, the JSON of the picture, and the picture itself: three files of the same bytes. */
static void test_same_bytes_three_ways(void **state)
{
    static const char *const runs[][26] = {
        {"-m", SD1, "-p", "a (cat:1.2)", "-s", "9007199254740993"},
        {"-m", SD1, "-p", "a [cat|dog] AND b :0.3", "-n", "", "--lora", LORA ":0.8:0.33@cat",
         "--lora", LORA ",start=0.1,end=0.9,blocks=mid:0.5", "--compose", "switch", "--compose-opt",
         "tau=1", "--clip-skip", "2", "--rng", "philox"},
        {"-m", SD1, "-p", "x", "--init", IPT_TEST_DATA "/pictures/exif1.png", "--mask",
         IPT_TEST_DATA "/pictures/exif2.png", "--no-paste", "--strength", "0.7", "--steps", "3",
         "--precision", "f32", "--cfg-rescale", "0.3"},
        {"-m", IPT_TEST_DATA "/model_sd1_single_f16.safetensors", "--config-dir", SD1, "-p", "x",
         "--vae", IPT_TEST_DATA "/model_sd1_single_f16.safetensors", "--prediction", "v_prediction",
         "--batch", "1", "--vae-tile", "64"},
        {"-m", IPT_TEST_DATA "/models/lcm", "-p", "x", "--sampler", "lcm"},
        {"-m", SD1, "-p", "a cat, a cat and a \"dog\"", "--lora", LORA ":0.8@cat#2=sks cat",
         "--lora", IPT_TEST_DATA "/golden_lora_locon.safetensors:0.5:0,end=0.9@dog", "--compose",
         "clora", "--compose-opt", "refine=1", "--compose-opt", "masks=attention", "--compose-opt",
         "morph=open"},
        {"-m", IPT_TEST_DATA "/models/sdxl", "-p", "x", "--sampler", "DPM++ 2M Karras"},
    };
    place *p = *state;
    need_device(p);
    for (size_t i = 0; i < IPT_COUNT(runs); i++) {
        const char *args[40] = {"generate", "-q", "-W", "16", "-H", "16", "-o", "a.png"};
        size_t n = 8;
        bool steps = false;
        for (size_t k = 0; k < 26 && runs[i][k]; k++) {
            args[n++] = runs[i][k];
            steps = steps || strcmp(runs[i][k], "--steps") == 0;
        }
        if (!steps) {
            args[n++] = "--steps";
            args[n++] = "2";
        }
        result r = run_args(p, args);
        if (r.rc != 0)
            fail_msg("run %zu: exit %d: %s", i, r.rc, r.err);
        done(&r);
        take_request(p);
        r = RUN(p, "generate", "-q", "--request", "r.json", "-o", "b.png");
        if (r.rc != 0)
            fail_msg("run %zu from JSON: exit %d: %s", i, r.rc, r.err);
        done(&r);
        r = RUN(p, "generate", "-q", "-o", "c.png", "--request=a.png");
        if (r.rc != 0)
            fail_msg("run %zu from a picture: exit %d: %s", i, r.rc, r.err);
        done(&r);
        expect_same_files(p, "a.png", "b.png", args[11]);
        expect_same_files(p, "a.png", "c.png", args[11]);
    }
}

/* Options count over the file, wherever they stand; lists are replaced. */
static void test_options_over_the_file(void **state)
{
    static const char json[] =
        "{\"model\":\"" SD1 "\",\"prompt\":\"a\",\"steps\":1,\"seed\":5,\"width\":16,"
        "\"height\":16,\"lora\":[{\"file\":\"" LORA "\"}],\"count\":2}";
    place *p = *state;
    need_device(p);
    write_text(p, "q.json", json, sizeof json - 1);
    result r = RUN(p, "generate", "--steps", "2", "--request", "q.json", "--lora", LORA ":0.5",
                   "-o", "o.png", "--json", "-q");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    json_t *o = json_loads(r.out, 0, NULL);
    assert_int_equal(ipt_json_int(o, "steps", 0), 2);
    assert_int_equal(ipt_json_int(o, "seed", 0), 5);
    assert_int_equal(json_array_size(json_object_get(o, "files")), 2);
    assert_non_null(strstr(ipt_json_str(o, "parameters", ""), ":0.5>"));
    json_decref(o);
    done(&r);
    r = RUN(p, "generate", "--request", "none.json");
    expect_line(&r, 64, "none.json", "a request that is not there");
    r = RUN(p, "generate", "--request", SD1);
    expect_line(&r, 64, "sd1", "a folder");
    write_text(p, "q.json", "{\"steps\":3}", 11);
    r = RUN(p, "generate", "--request", "q.json");
    expect_line(&r, 2, "needs a prompt", "a request without a prompt");
    write_text(p, "q.json", "{\"prompt\":\"x\",\"compose\":\"blend\"}", 32);
    r = RUN(p, "generate", "--request", "q.json");
    expect_line(&r, 2, "'blend' is unknown", "a method that there is not");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_field_both_ways), cmocka_unit_test(test_bad_fields_are_named),
        cmocka_unit_test(test_broken_pictures),       cmocka_unit_test(test_same_bytes_three_ways),
        cmocka_unit_test(test_options_over_the_file),
    };
    return cmocka_run_group_tests_name("request", tests, set_up, place_destroy);
}
