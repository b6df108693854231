/* tests/test_cli_text.c - what the program says: nothing that a terminal would obey comes out of a
 * file, an argument or a name; malformed option texts; outputs that cannot be written. */
#include "tests/program.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "model_io/model_io.h"
#include "text_encoder/tokenizer.h"

/* Colour, title of the window, C1 in UTF-8, DEL, override, isolate, tab, line end. */
#define EVIL                                                                                       \
    "\x1b[31m\x1b]0;owned\x07\xc2\x9b"                                                             \
    "2J\x7f\xe2\x80\xae\xe2\x81\xa6\t\r"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

static void expect_clean(const char *s, const char *what)
{
    const char *all = s;
    for (const char *from = s; ipt_utf8_next(&s) != 0; from = s) {
        const char *p = from;
        uint32_t c = ipt_utf8_next(&p);
        if ((c != '\n' && ipt_is_control(c)) || (c == 0xfffd && p == from + 1))
            fail_msg("%s: byte %zu is U+%04X: %s", what, (size_t)(from - all), (unsigned)c, all);
    }
}

/* A LoRA of the small SD 1 model with hostile metadata and one module that fits nothing. */
static void write_hostile_lora(const place *p, const char *name)
{
    ipt_safetensors *st = NULL;
    static const float one[4] = {1, 1, 1, 1};
    static const ipt_st_meta meta[] = {
        {"ss_" EVIL, "value " EVIL},
        {"modelspec.title", EVIL},
        {"modelspec.trigger_phrase", "sks " EVIL},
        {"ss_tag_frequency", "{\"d\": {\"tag \\u001b[31m \\u009b \\u202e\": 3}}"},
    };
    char path[PATH_MAX];
    assert_ok(p->ctx,
              ipt_safetensors_open(p->ctx, IPT_TEST_DATA "/golden_lora_kohya.safetensors", &st));
    size_t n = ipt_safetensors_count(st);
    ipt_st_write *w = calloc(n + 2, sizeof *w);
    float **values = calloc(n, sizeof *values);
    assert_non_null(w);
    assert_non_null(values);
    for (size_t i = 0; i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        values[i] = calloc(t->count + 1, sizeof **values);
        assert_non_null(values[i]);
        ipt_st_to_f32(t, 0, t->count, values[i]);
        w[i] = (ipt_st_write){
            .name = t->name, .dtype = IPT_ST_F32, .rank = t->rank, .data = values[i]};
        memcpy(w[i].dim, t->dim, sizeof t->dim);
    }
    w[n] = (ipt_st_write){.name = "lora_unet_" EVIL ".lora_down.weight",
                          .dtype = IPT_ST_F32,
                          .rank = 2,
                          .dim = {2, 2},
                          .data = one};
    w[n + 1] = w[n];
    w[n + 1].name = "lora_unet_" EVIL ".lora_up.weight";
    assert_ok(p->ctx,
              ipt_safetensors_write(p->ctx, in(p, path, name), w, n + 2, meta, IPT_COUNT(meta)));
    for (size_t i = 0; i < n; i++)
        free(values[i]);
    free(values);
    free(w);
    ipt_safetensors_close(&st);
}

/* Every way in which a foreign text reaches the terminal. */
static void test_no_control_reaches_the_terminal(void **state)
{
    static const char *const sd1 = IPT_TEST_DATA "/models/sd1";
    static const char *const runs[][10] = {
        {"lora", "inspect", "evil.safetensors", "-m", IPT_TEST_DATA "/models/sd1"},
        {"lora", "inspect", "evil.safetensors"},
        {"lora", "inspect", "evil.safetensors", "-m", IPT_TEST_DATA "/models/sd1", "--json"},
        {"lora", "inspect", EVIL "\xff"},
        {"lora", "inspect", EVIL "\xff", "--json"},
        {"model", "inspect", EVIL "\xff"},
        {"model", "inspect", "evil.safetensors"},
        {"tokenize", EVIL, "-m", IPT_TEST_DATA "/models/sd1"},
        {"tokenize", EVIL, "-m", IPT_TEST_DATA "/models/sd1", "--json"},
        {"tokenize", "-m", EVIL, "x"},
        {"generate", "-p", "x", "--lora", EVIL "\xff:y"},
        {"generate", "-p", "x", "--lora", EVIL "\xff:y", "--json"},
        {"generate", "-p", "x", "--sampler", EVIL},
        {"generate", "-p", "x", "--rng", EVIL},
        {"generate", "-p", "x", "--seed", EVIL},
        {"generate", "-p", "x", "--compose-opt", EVIL},
        {"generate", "-p", "x", "--" EVIL},
        {"generate", "-p", "x", "-\xff"},
        {"generate", "-p", "x", EVIL},
        {"generate", "-p", "x", "-o", EVIL "/\xff.png"},
        {"generate", "-p", "x", "--init", EVIL},
        {"bench", EVIL},
        {EVIL "\xff"},
        {"lora", EVIL},
        {"help", EVIL},
    };
    place *p = *state;
    write_hostile_lora(p, "evil.safetensors");
    for (size_t i = 0; i < IPT_COUNT(runs); i++) {
        char what[64];
        result r = run_args(p, runs[i]);
        ipt_name(what, sizeof what, "run %zu (%s)", i, i < 20 ? runs[i][0] : "");
        expect_clean(r.err, what);
        expect_clean(r.out, what);
        bool json = false;
        for (size_t k = 0; runs[i][k]; k++)
            json = json || strcmp(runs[i][k], "--json") == 0;
        json_t *o = json ? json_loads(r.out, 0, NULL) : NULL;
        if (json && !o)
            fail_msg("%s: not JSON: %s", what, r.out);
        json_decref(o);
        done(&r);
    }
    result r = RUN(p, "lora", "inspect", "evil.safetensors", "-m", sd1);
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.out, "lora_unet_\\x1b[31m\\x1b]0;owned\\x07\\u009b2J\\x7f\\u202e"));
    done(&r);
    r = RUN(p, "lora", "inspect", "evil.safetensors", "-m", sd1, "--json");
    json_t *o = json_loads(r.out, 0, NULL);
    const json_t *meta = json_object_get(o, "metadata");
    assert_string_equal(ipt_json_str(meta, "modelspec.title", ""), EVIL); /* JSON keeps it whole */
    json_decref(o);
    done(&r);
}

/* What is printable stays; the rest becomes visible; twice is once. */
static void test_printable(void **state)
{
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"", ""},
        {"a\\x b", "a\\x b"},
        {"\xc3\xa4 \xe7\x8c\xab \xf0\x9f\x90\x88", "\xc3\xa4 \xe7\x8c\xab \xf0\x9f\x90\x88"},
        {"\xef\xbf\xbd", "\xef\xbf\xbd"},
        {"\n\r\t\x01\x1b\x7f", "\\n\\r\\t\\x01\\x1b\\x7f"},
        {"\xc2\x80\xc2\x9b\xc2\x9f\xc2\xa0", "\\u0080\\u009b\\u009f\xc2\xa0"},
        {"\xe2\x80\xaa\xe2\x80\xac\xe2\x81\xa6\xe2\x81\xa9", "\\u202a\\u202c\\u2066\\u2069"},
        {"\x80\xff\xc3", "\\x80\\xff\\xc3"},
        {"\xe2\x80", "\\xe2\\x80"},
        {"\xed\xa0\x80", "\\xed\\xa0\\x80"},                   /* a surrogate */
        {"\xc0\x9b\xe0\x82\x9b", "\\xc0\\x9b\\xe0\\x82\\x9b"}, /* C1 in too many bytes */
    };
    char buf[64], twice[64];
    (void)state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        assert_string_equal(ipt_printable(cases[i].in, buf, sizeof buf), cases[i].out);
        assert_string_equal(ipt_printable(buf, twice, sizeof twice), buf);
    }
    assert_string_equal(ipt_printable("ab\x1b", buf, 6), "ab"); /* never half an escape */
    ipt_ctx *ctx = test_ctx();
    ipt_fail(ctx, IPT_ERR_IO, "%s", "a\x1b\xff\xc2\x9b");
    assert_string_equal(ipt_last_error(ctx), "a\\x1b\\xff\\u009b");
    ipt_fail(ctx, IPT_ERR_IO, "again: %s", ipt_last_error(ctx));
    assert_string_equal(ipt_last_error(ctx), "again: a\\x1b\\xff\\u009b");
    ipt_ctx_destroy(&ctx);
}

/* --- texts of options ------------------------------------------------------------------------- */
static void test_lora_texts(void **state)
{
    static const struct {
        const char *text, *said;
    } bad[] = {
        {"", "is empty"},
        {"@", "expected FILE"},
        {"f@", "expected FILE"},
        {"f@@", "expected FILE"},
        {"f:1@", "WORD"},
        {"f@:1@", "WORD"},
        {"@@@", "expected FILE"},
        {":", "not a number"},
        {"f:", "not a number"},
        {"f::", "not a number"},
        {"f:1:", "not a number"},
        {"f:1:2:3", "at most two weights"},
        {"f:nan", "not a number"},
        {"f:inf", "not a number"},
        {"f:-inf", "not a number"},
        {"f:0x10", "not a number"},
        {"f:1x", "not a number"},
        {"f:1,5", "not a number"},
        {"f,start=0,5", "KEY=VALUE"},
        {"f: 1", "not a number"},
        {"f:1e400", "not a number"},
        {"f:101", "out of range"},
        {"f,start=", "start is ''"},
        {"f,start=nan", "start is 'nan'"},
        {"f,start=0x1p-1", "start is '0x1p-1'"},
        {"f,start=0.5 ", "start is '0.5 '"},
        {"f,end=0", "not before"},
        {"f,start=0.2,foo=3", "unknown key 'foo'"},
        {",start=0", "expected FILE"},
        {"f@w,start=0.5", "'start=0.5' stands behind @WORD"},
        {"f:0.5@w,blocks=down:1", "stands behind @WORD"},
        {"f,blocks=", "blocks= has no value"},
        {"f:0@0,1@0.5:1:2", "expected FILE:CURVE[:TE_W]"},
    };
    place *p = *state;
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        result r = RUN(p, "generate", "-p", "x", "-o", "x.png", "--lora", bad[i].text);
        expect_line(&r, 2, bad[i].said, bad[i].text);
    }
    char *long_name = calloc(1, 100001);
    assert_non_null(long_name);
    memset(long_name, 'n', 100000);
    memcpy(long_name + 99990, ":w", 2);
    result r = RUN(p, "generate", "-p", "x", "--lora", long_name);
    expect_line(&r, 2, "not a number", "a long text: the reason is not cut off");
    free(long_name);
}

/* Empty texts, and numbers that are none, of every option that takes a value. */
static void test_empty_and_odd_values(void **state)
{
    static const char *const texts[] = {
        "--model",    "--output",     "--sheet",      "--lora",        "--compose",
        "--sampler",  "--schedule",   "--rng",        "--init",        "--vae",
        "--taesd",    "--vae-tile",   "--device",     "--precision",   "--trace",
        "--lora-dir", "--config-dir", "--prediction", "--compose-opt", "--embedding-dir"};
    static const char *const numbers[] = {"--steps",    "--cfg",   "--cfg-rescale", "--seed",
                                          "--count",    "--width", "--height",      "--clip-skip",
                                          "--strength", "--batch", "--vram-limit"};
    static const char *const odd[] = {"",     " ",   "1 ",   " 1",    "0x10",
                                      "nan",  "inf", "-inf", "1e400", "1,5",
                                      "1.5x", "--1", "1e",   "0x1p3", "\xd9\xa1"};
    place *p = *state;
    for (size_t i = 0; i < IPT_COUNT(texts); i++) {
        result r = RUN(p, "generate", "-p", "x", "-o", "x.png", "--steps", "1", texts[i], "");
        expect_line(&r, 2, texts[i] + 2, texts[i]);
    }
    for (size_t i = 0; i < IPT_COUNT(numbers); i++)
        for (size_t k = 0; k < IPT_COUNT(odd); k++) {
            result r = RUN(p, "generate", "-p", "x", "-o", "x.png", numbers[i], odd[k]);
            expect_line(&r, 2, numbers[i] + 2, odd[k]);
        }
}

/* --- outputs ---------------------------------------------------------------------------------- */
/* A full disk behind standard output is an error with its exit code, whatever is printed. */
static void test_full_stdout(void **state)
{
    static const char *const runs[][10] = {
        {"help"},
        {"--version"},
        {"generate", "--help"},
        {"lora", "inspect", IPT_TEST_DATA "/golden_lora_kohya.safetensors", "-m",
         IPT_TEST_DATA "/models/sd1"},
        {"model", "inspect", IPT_TEST_DATA "/models/sd1"},
        {"model", "inspect", IPT_TEST_DATA "/models/sd1", "--json"},
        {"tokenize", "a cat", "-m", IPT_TEST_DATA "/models/sd1"},
        {"devices"},
        {"devices", "--json"},
        {"generate", "-m", IPT_TEST_DATA "/models/sd1", "-p", "x", "-q", "-o", "full.png",
         "--steps=1"},
    };
    place *p = *state;
    if (access("/dev/full", W_OK) != 0)
        fail_msg("this test needs /dev/full");
    p->stdout_path = "/dev/full";
    for (size_t i = 0; i < IPT_COUNT(runs); i++) {
        bool device = strcmp(runs[i][0], "devices") == 0 || i + 1 == IPT_COUNT(runs);
        if (device && !p->has_device)
            continue; /* exit 69 comes first; test_cli says that there is none */
        result r = run_args(p, runs[i]);
        expect_line(&r, 73, "standard output", runs[i][0]);
    }
    p->stdout_path = NULL;
}

/* Each said once, on one line each; a missing LoRA says where it was looked for. */
static void test_warnings_of_a_prompt(void **state)
{
    static const char *const said[] = {"warning: prompt: <hypernet:x:1>", "warning: prompt: dyn=8",
                                       "warning: negative prompt: <lora:b>"};
    place *p = *state;
    char path[PATH_MAX], env[1][PATH_MAX + 32];
    need_device(p);
    ipt_name(env[0], sizeof env[0], "XDG_DATA_HOME=%s", in(p, path, "data"));
    const char *const list[] = {env[0], NULL};
    p->env = list;
    result r = RUN(p, "generate", "-m", IPT_TEST_DATA "/models/sd1", "-p", "a <lora:nix:0.5> cat",
                   "-o", "w.png", "--lora-dir", "some/where");
    expect_line(&r, 64, "data/impasto/loras; --lora-dir DIR names a folder", "a missing LoRA");
    r = RUN(p, "generate", "-m", IPT_TEST_DATA "/models/sd1", "-p", "a <lora:nix:0.5> cat", "-o",
            "w.png", "--lora-dir", "some/where");
    expect_line(&r, 64, "nor one of that name in some/where, ", "a missing LoRA");
    char *data = NULL; /* in the user's own folder it is found */
    size_t n = 0;
    ipt_name(path, sizeof path, "%s/data/impasto/loras", p->dir);
    assert_true(ipt_make_dirs(path));
    assert_ok(p->ctx, ipt_file_read(p->ctx, IPT_TEST_DATA "/golden_lora_kohya.safetensors", 1 << 24,
                                    &data, &n));
    write_text(p, "data/impasto/loras/mine.safetensors", data, n);
    ipt_free(data);
    r = RUN(p, "generate", "-m", IPT_TEST_DATA "/models/sd1", "-p",
            "a [b:c:0.5] [d|e] AND [f:0.1] <hypernet:x:1> <lora:mine:0.5:dyn=8>", "-n",
            "[g|h] <lora:b:1>", "-o", "w.png", "--steps", "4", "--sampler", "ddim", "-W", "64",
            "-H", "64");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    for (size_t i = 0; i < IPT_COUNT(said); i++) {
        const char *first = strstr(r.err, said[i]);
        if (!first || strstr(first + 1, said[i]))
            fail_msg("'%s' %s: %s", said[i], first ? "said twice" : "not said", r.err);
    }
    /* what is left after the last step is the decoding */
    const char *last = strstr(r.err, "sampling 4/4");
    if (!last || !strstr(last, " left") || strstr(last, ", 0 ms left"))
        fail_msg("the time left does not count the decoding: %s", r.err);
    done(&r);
    p->env = NULL;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_printable),   cmocka_unit_test(test_no_control_reaches_the_terminal),
        cmocka_unit_test(test_lora_texts),  cmocka_unit_test(test_empty_and_odd_values),
        cmocka_unit_test(test_full_stdout), cmocka_unit_test(test_warnings_of_a_prompt),
    };
    return cmocka_run_group_tests(tests, set_up, place_destroy);
}
