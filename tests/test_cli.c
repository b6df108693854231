/* tests/test_cli.c - the program from outside: exit codes, one-line messages, JSON, help, signals,
 * bad input of every kind.  Runs IPT_PROGRAM by fork and exec in a folder of its own. */
#include "tests/program.h"

#include <jansson.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "compose/policy.h"
#include "model_io/model_io.h"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

/* --- usage
 * -------------------------------------------------------------------------------------------- */
static void test_usage_errors(void **state)
{
    static const struct {
        const char *arg[8], *said;
    } cases[] = {
        {{"genrate"}, "did you mean generate"},
        {{"train", "dreambooth"}, "unknown command"},
        {{"serve"}, "unknown command"},
        {{"lora"}, "inspect"},
        {{"lora", "merge", "a"}, "lora merge"},
        {{"lora", "convrt", "a"}, "did you mean lora convert"},
        {{"lora", "zzzzzzz"}, "inspect convert resize merge extract"},
        {{"model"}, "inspect"},
        {{"generate"}, "-p TEXT"},
        {{"generate", "-p"}, "needs a value"},
        {{"generate", "-p", "x", "--stpes", "3"}, "did you mean --steps"},
        {{"generate", "-p", "x", "--zzzzzzzz"}, "impasto generate --help"},
        {{"generate", "-p", "x", "-z"}, "unknown option -z"},
        {{"generate", "-p", "x", "--steps", "0"}, "from 1 to 1000"},
        {{"generate", "-p", "x", "--steps=3x"}, "from 1 to 1000"},
        {{"generate", "-p", "x", "--steps", "99999999999999999999"}, "from 1 to 1000"},
        {{"generate", "-p", "x", "--cfg", "nan"}, "from 0 to 100"},
        {{"generate", "-p", "x", "--cfg", "1e999"}, "from 0 to 100"},
        {{"generate", "-p", "x", "--cfg-rescale", "2"}, "from 0 to 1"},
        {{"generate", "-p", "x", "--seed", "-7"}, "random"},
        {{"generate", "-p", "x", "--seed", "18446744073709551616"}, "18446744073709551615"},
        {{"generate", "-p", "x", "-W", "abc"}, "--width"},
        {{"generate", "-p", "x", "--count", "0"}, "--count"},
        {{"generate", "-p", "x", "--sampler", "eulr"}, "did you mean euler"},
        {{"generate", "-p", "x", "--schedule", "karas"}, "did you mean karras"},
        {{"generate", "-p", "x", "--rng", "cuda"}, "torch-cpu"},
        {{"generate", "-p", "x", "--precision", "f8"}, "f16"},
        {{"generate", "-p", "x", "--prediction", "v"}, "v_prediction"},
        {{"generate", "-p", "x", "--compose", "swich"}, "did you mean switch"},
        {{"generate", "-p", "x", "--compose", "clor"}, "did you mean clora"},
        {{"generate", "-p", "x", "--compose-opt", "every"}, "KEY=VALUE"},
        {{"generate", "-p", "x", "--region", "m.png"}, "IMG@PROMPT or IMG@lora:NAME"},
        {{"generate", "-p", "x", "--region", "@cat"}, "IMG@PROMPT or IMG@lora:NAME"},
        {{"generate", "-p", "x", "--masks", ""}, "--masks is empty"},
        {{"generate", "-p", "x", "--explain"}, "--explain needs a value"},
        {{"generate", "-p", "x", "--mask", "m.png"}, "--init"},
        {{"generate", "-p", "x", "--strength", "0.5"}, "--init"},
        {{"generate", "-p", "x", "--vae-tile", "7"}, "from 64 to 8192"},
        {{"generate", "-p", "x", "--lora", "f:x"}, "not a number"},
        {{"generate", "-p", "x", "--lora", "f:1e9"}, "-100 to 100"},
        {{"generate", "-p", "x", "--lora", "f:1@"}, "WORD"},
        {{"generate", "-p", "x", "--lora", "f:1,start=2"}, "from 0 to 1"},
        {{"generate", "-p", "x", "--lora", "f:1,start=0.6,end=0.5"}, "not before"},
        {{"generate", "-p", "x", "-o", "x.gif"}, ".png"},
        {{"generate", "-p", "x", "--sheet", "x"}, ".png"},
        {{"generate", "-p", "x", "stray"}, "unexpected argument"},
        {{"generate", "-p", "x", "--json=1"}, "takes no value"},
        {{"tokenize"}, "tokenize --help"},
        {{"tokenize", "a", "--file", "b"}, "tokenize --help"},
        {{"model", "inspect"}, "usage"},
        {{"model", "inspect", "a", "b"}, "unexpected"},
        {{"bench", "nothing"}, "gemm"},
        {{"bench", "gemm", "--compare", ""}, "compare"},
        {{"bench", "unet", "-W", "100"}, "64"},
        {{"devices", "x"}, "unexpected"},
    };
    place *p = *state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        result r = run_args(p, cases[i].arg);
        assert_string_equal(r.out, "");
        expect_line(&r, 2, cases[i].said, cases[i].arg[0]);
    }
    result r = RUN(p, "generate", "--json", "-p", "x", "--steps", "0");
    json_t *o = json_loads(r.out, 0, NULL);
    assert_string_equal(ipt_json_str(json_object_get(o, "error"), "status", ""), "usage");
    json_decref(o);
    expect_line(&r, 2, "--steps", "json error");
}

static void test_help(void **state)
{
    static const char *const commands[][3] = {
        {"generate"},      {"devices"},        {"model", "inspect"}, {"lora", "inspect"},
        {"tokenize"},      {"bench"},          {"model", "bake"},    {"lora", "convert"},
        {"lora", "merge"}, {"lora", "resize"}, {"lora", "extract"}};
    place *p = *state;
    for (size_t i = 0; i < IPT_COUNT(commands); i++) {
        bool two = commands[i][1] != NULL;
        result r = RUN(p, commands[i][0], two ? commands[i][1] : "--help", two ? "--help" : NULL);
        assert_int_equal(r.rc, 0);
        assert_string_equal(r.err, "");
        assert_non_null(strstr(r.out, "Examples:"));
        assert_non_null(strstr(r.out, "--json"));
        result h = RUN(p, "help", commands[i][0], commands[i][1]);
        assert_int_equal(h.rc, 0);
        assert_string_equal(h.out, r.out);
        done(&h);
        done(&r);
    }
    result r = RUN(p, "generate", "--help");
    assert_non_null(strstr(r.out, "dpmpp_2m"));
    assert_non_null(strstr(r.out, "karras"));
    assert_non_null(strstr(r.out, "composite"));
    done(&r);
    r = RUN(p, "help");
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.out, "Examples:"));
    done(&r);
    r = RUN(p, "--version");
    assert_string_equal(r.out, "impasto " IPT_VERSION "\n");
    done(&r);
    r = run_args(p, (const char *const[]){NULL});
    assert_int_equal(r.rc, 2);
    done(&r);
}

/* What CLoRA cannot do with a request is one sentence, said before anything is drawn. */
static void test_clora(void **state)
{
#define LORA IPT_TEST_DATA "/golden_lora_kohya.safetensors"
#define OTHER IPT_TEST_DATA "/golden_lora_locon.safetensors"
    static const struct {
        const char *arg[6], *said;
    } cases[] = {
        {{NULL}, "clora: no adapter is bound to a word of the prompt; give --lora FILE@WORD"},
        {{"--lora", LORA ":0.8"}, "no adapter is bound to a word"},
        {{"--lora", LORA "@fish"}, "the word 'fish' of "},
        {{"--lora", LORA "@cat", "--lora", OTHER "@cat#3"}, "number 3, which stands 1 time in"},
        {{"--lora", LORA "@cat", "--lora", OTHER "@cat"}, "wants 'cat' number 2"},
        {{"--lora", LORA "@cat", "--lora", LORA "@dog"}, "is given twice"},
        {{"--lora", LORA "@cat#x"}, "@cat#x: expected WORD[#K][=PHRASE], K from 1 to 1000"},
        {{"--lora", LORA "@=fat cat"}, "expected WORD[#K][=PHRASE]"},
        {{"--lora", LORA "@cat="}, "expected WORD[#K][=PHRASE]"},
        {{"--lora", LORA "@a cat", "--lora", OTHER "@cat"}, "are the same words of the prompt"},
        {{"--lora", LORA "@cat", "--cache", "3"}, "reads attention in every evaluation"},
        {{"--lora", LORA "@cat", "-p", "a cat AND a dog"}, "clora reads one prompt; AND joins 2"},
        {{"--lora", LORA "@cat", "-p", "[a cat:a fox:1]"}, "is not in the prompt 'a fox'"},
        {{"--lora", LORA "@cat", "--compose-opt", "grid=2"}, "no cross-attention there"},
        {{"--lora", LORA "@cat", "--compose-opt", "tau=0"}, "tau=0: expected 0.01..100"},
        {{"--lora", LORA "@cat", "--compose-opt", "masks=no"}, "one of: attention mean full"},
        {{"--lora", LORA "@cat", "--compose-opt", "rounds=2"}, "unknown option 'rounds=2'"},
    };
#undef LORA
#undef OTHER
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        const char *args[24] = {"generate",  "-q",
                                "-m",        IPT_TEST_DATA "/models/sd1",
                                "-p",        "a cat and a dog",
                                "--steps",   "2",
                                "-W",        "16",
                                "-H",        "16",
                                "-o",        "clora.png",
                                "--compose", "clora"};
        for (size_t k = 0; k < 6 && cases[i].arg[k]; k++)
            args[16 + k] = cases[i].arg[k];
        result r = run_args(p, args);
        assert_string_equal(r.out, "");
        if (r.rc != 2 && r.rc != 64)
            fail_msg("case %zu: exit %d: %s", i, r.rc, r.err);
        expect_line(&r, r.rc, cases[i].said, cases[i].said);
        assert_false(ipt_is_file(in(p, path, "clora.png")));
    }
    result r = RUN(p, "generate", "--help");
    for (const ipt_option *o = ipt_method_clora.option; o->key; o++) {
        char want[64];
        ipt_name(want, sizeof want, "--compose-opt %s=%s: ", o->key, o->value);
        if (!strstr(r.out, want))
            fail_msg("%s is not in --help", want);
    }
    done(&r);
}

/* Every example of every command's help, and of README.md, is a command line that is understood:
 * without a device and without the files it names it fails for that, never for its words. */
static void expect_understood(place *p, const char *text, const char *start)
{
    size_t n = strlen(start), found = 0;
    for (const char *line = text; line && *line;) {
        const char *end = strchr(line, '\n'), *from = line + strspn(line, " ");
        while (end && end > line && end[-1] == '\\') /* a line that goes on */
            end = strchr(end + 1, '\n');
        if (from > line && strncmp(from, start, n) == 0) {
            char *command = ipt_calloc(p->ctx, strlen(from) + 1, 1);
            memcpy(command, from, end ? (size_t)(end - from) : strlen(from));
            const char *args[] = {"-c", command, NULL};
            p->program = "/bin/sh";
            result r = program_finish(p, program_start(p, args, true));
            p->program = IPT_PROGRAM;
            if (r.rc == 2 || r.rc > 128 || r.rc == 126 || r.rc == 127)
                fail_msg("exit %d: %s: %s", r.rc, command, r.err);
            done(&r);
            ipt_free(command);
            found++;
        }
        line = end ? end + 1 : NULL;
    }
    assert_true(found > 0);
}

static void test_examples(void **state)
{
    static const char *const commands[][2] = {
        {"generate"},      {"devices"},        {"model", "inspect"}, {"lora", "inspect"},
        {"tokenize"},      {"bench"},          {"model", "bake"},    {"lora", "convert"},
        {"lora", "merge"}, {"lora", "resize"}, {"lora", "extract"}};
    place *p = *state;
    char path[PATH_MAX], *readme = NULL, *old = strdup(getenv("PATH") ? getenv("PATH") : "");
    size_t n = 0;
    assert_int_equal(mkdir(in(p, path, "build"), 0700), 0);
    assert_int_equal(symlink(IPT_PROGRAM, in(p, path, "build/impasto")), 0);
    ipt_name(path, sizeof path, "%s/build:/usr/bin:/bin", p->dir);
    setenv("PATH", path, 1);
    for (size_t i = 0; i < IPT_COUNT(commands); i++) {
        result r = RUN(p, "help", commands[i][0], commands[i][1]);
        const char *examples = strstr(r.out, "\nExamples:\n");
        assert_non_null(examples);
        expect_understood(p, examples, "impasto ");
        done(&r);
    }
    assert_ok(p->ctx, ipt_file_read(p->ctx, IPT_SOURCE_DIR "/README.md", 1 << 20, &readme, &n));
    expect_understood(p, readme, "build/impasto ");
    ipt_free(readme);
    setenv("PATH", old, 1);
    free(old);
}

/* Another program's word for an option is that option. */
static void test_habits(void **state)
{
    static const struct {
        const char *arg[3], *said;
    } cases[] = {
        {{"-s", "x"}, "--seed is 'x'"},
        {{"-b", "0"}, "--count is '0'"},
        {{"--batch-count", "0"}, "--count is '0'"},
        {{"--batch-count=0"}, "--count is '0'"},
        {{"--cfg-scale", "x"}, "--cfg is 'x'"},
        {{"--guidance-scale", "x"}, "--cfg is 'x'"},
        {{"--guidance-rescale", "x"}, "--cfg-rescale is 'x'"},
        {{"--num-inference-steps", "x"}, "--steps is 'x'"},
        {{"--sampling-method", "x"}, "--sampler 'x'"},
        {{"--scheduler", "x"}, "--schedule 'x'"},
        {{"--denoising-strength", "x"}, "--strength is 'x'"},
        {{"--init-img", ""}, "--init is empty"},
        {{"-i", ""}, "--init is empty"},
        {{"--lora-model-dir", ""}, "--lora-dir is empty"},
        {{"--embd-dir", ""}, "--embedding-dir is empty"},
        {{"--negative-prompt"}, "--negative needs a value"},
        {{"--cfg-scal", "7"}, "did you mean --cfg-scale?"},
    };
    place *p = *state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        result r = RUN(p, "generate", "-p", "x", cases[i].arg[0], cases[i].arg[1]);
        expect_line(&r, 2, cases[i].said, cases[i].arg[0]);
    }
    result r = RUN(p, "help");
    assert_non_null(strstr(r.out, "IMPASTO_MODEL"));
    done(&r);
    r = RUN(p, "generate", "--help");
    assert_non_null(strstr(r.out, "$IMPASTO_MODEL"));
    assert_non_null(strstr(r.out, "ddim_inverse the way from a picture to its noise"));
    assert_non_null(strstr(r.out, "edm_euler    for models trained with EDM"));
    done(&r);
}

/* --- devices
 * -------------------------------------------------------------------------------------------- */
static void test_no_device(void **state)
{
    place *p = *state;
    static const char *const runs[][8] = {{"devices"},
                                          {"devices", "--json"},
                                          {"generate", "-p", "x", "-o", "n.png"},
                                          {"bench", "gemm"}};
    for (size_t i = 0; i < IPT_COUNT(runs); i++) {
        result r = program_finish(p, program_start(p, runs[i], true));
        expect_line(&r, 69, "Vulkan", runs[i][0]);
    }
}

static void test_devices(void **state)
{
    place *p = *state;
    ipt_gpu_info *found = NULL;
    size_t n = 0;
    result r = RUN(p, "devices", "--json");
    if (ipt_gpu_list(p->ctx, &found, &n) != IPT_OK) {
        expect_line(&r, 69, "Vulkan", "no device");
        need_device(p);
    }
    json_t *o = json_loads(r.out, 0, NULL), *list = json_object_get(o, "devices");
    assert_int_equal(r.rc, 0);
    assert_int_equal(json_array_size(list), n);
    for (size_t i = 0; i < n; i++) {
        const json_t *d = json_array_get(list, i);
        assert_string_equal(ipt_json_str(d, "name", ""), found[i].name);
        assert_int_equal(ipt_json_bool(d, "usable", !found[i].usable), found[i].usable);
    }
    ipt_free(found);
    json_decref(o);
    done(&r);
    need_device(p);
    r = RUN(p, "generate", "-p", "x", "-o", "d.png", "--device", "no such device");
    expect_line(&r, 69, "no such device", "device by name");
}

/* --- output ----------------------------------------------------------------------------------- */
static void test_output(void **state)
{
    place *p = *state;
    result r = RUN(p, "generate", "-p", "x", "-o", "no-folder/a.png");
    expect_line(&r, 73, "no-folder/a.png", "no folder");
    r = RUN(p, "generate", "-p", "x", "-o", "/proc/a.png");
    expect_line(&r, 73, "/proc/a.png", "not writable");
    char path[PATH_MAX];
    assert_int_equal(mkdir(in(p, path, "folder.png"), 0700), 0);
    r = RUN(p, "generate", "-p", "x", "-o", "folder.png");
    expect_line(&r, 73, "folder", "is a folder");
    r = RUN(p, "generate", "-p", "x", "-o", "a.png", "--sheet", "no-folder/s.png");
    expect_line(&r, 73, "no-folder/s.png", "sheet");
    r = RUN(p, "generate", "-p", "x", "-o", "a.png", "--trace", "no-folder/t.safetensors");
    expect_line(&r, 73, "no-folder/t", "trace");
    assert_false(ipt_is_file(in(p, path, "a.png")));
}

/* --- bad input
 * ---------------------------------------------------------------------------------------------- */
enum {
    TRUNCATED,
    HUGE_HEADER,
    OVERLAP,
    HAS_NAN,
    WRONG_SHAPE,
    PICKLE,
    ZIP,
    TEXT,
    EMPTY,
    PNG_CUT,
    N_BAD
};
static const char *const bad_name[N_BAD] = {"truncated",   "huge-header", "overlap", "nan",
                                            "wrong-shape", "pickle",      "zip",     "text",
                                            "empty",       "png-cut"};

/* Rewrites a whole file with one element of every tensor NaN, or with a dimension too many. */
static void write_spoilt(const place *p, const char *name, const char *from, bool nan)
{
    ipt_safetensors *st = NULL;
    assert_ok(p->ctx, ipt_safetensors_open(p->ctx, from, &st));
    size_t n = ipt_safetensors_count(st);
    ipt_st_write *w = calloc(n, sizeof *w);
    float **values = calloc(n, sizeof *values);
    assert_non_null(w);
    assert_non_null(values);
    for (size_t i = 0; i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        size_t count = t->count + 4096;
        values[i] = calloc(count, sizeof **values);
        assert_non_null(values[i]);
        ipt_st_to_f32(t, 0, t->count, values[i]);
        w[i] = (ipt_st_write){
            .name = t->name, .dtype = IPT_ST_F32, .rank = t->rank, .data = values[i]};
        memcpy(w[i].dim, t->dim, sizeof t->dim);
        if (nan && t->count > 0)
            memset(values[i] + t->count / 2, 0xff, sizeof **values);
        if (!nan && t->rank >= 2 && t->count / (size_t)t->dim[0] < 4096)
            w[i].dim[0]++; /* the spare values are zeros */
    }
    char path[PATH_MAX];
    const json_t *meta = ipt_safetensors_metadata(st);
    ipt_st_meta m[64];
    size_t n_meta = 0;
    for (void *it = json_object_iter((json_t *)(uintptr_t)meta); it && n_meta < 64;
         it = json_object_iter_next((json_t *)(uintptr_t)meta, it))
        m[n_meta++] =
            (ipt_st_meta){json_object_iter_key(it), json_string_value(json_object_iter_value(it))};
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, in(p, path, name), w, n, m, n_meta));
    for (size_t i = 0; i < n; i++)
        free(values[i]);
    free(values);
    free(w);
    ipt_safetensors_close(&st);
}

static void write_header(const place *p, const char *name, const char *json, uint64_t said,
                         size_t data)
{
    uint8_t buf[1024] = {0};
    size_t n = strlen(json);
    for (int i = 0; i < 8; i++)
        buf[i] = (uint8_t)(said >> (8 * i));
    memcpy(buf + 8, json, n);
    write_text(p, name, buf, 8 + n + data);
}

/* Every kind of bad file made from a good one; names "<prefix>-<kind>". */
static void make_bad(const place *p, const char *prefix, const char *good)
{
    static const char overlap[] =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[8,24]}}";
    static const uint8_t png[] = {0x89, 'P', 'N', 'G', 13,  10,  26, 10, 0, 0,
                                  0,    13,  'I', 'H', 'D', 'R', 0,  0,  0, 1};
    char name[N_BAD][64], *data = NULL;
    size_t n = 0;
    for (int i = 0; i < N_BAD; i++)
        ipt_name(name[i], sizeof name[i], "%s-%s", prefix, bad_name[i]);
    assert_ok(p->ctx, ipt_file_read(p->ctx, good, 1 << 26, &data, &n));
    write_text(p, name[TRUNCATED], data, n * 3 / 5);
    ipt_free(data);
    write_header(p, name[HUGE_HEADER], "{}", UINT64_C(1) << 40, 0);
    write_header(p, name[OVERLAP], overlap, strlen(overlap), 24);
    write_spoilt(p, name[HAS_NAN], good, true);
    write_spoilt(p, name[WRONG_SHAPE], good, false);
    write_text(p, name[PICKLE], "\x80\x02}q\0X\5\0\0\0state", 14);
    write_text(p, name[ZIP], "PK\3\4\x14\0\0\0\0\0archive/data.pkl", 26);
    write_text(p, name[TEXT], "version https://git-lfs.github.com/spec/v1\n", 43);
    write_text(p, name[EMPTY], "", 0);
    write_text(p, name[PNG_CUT], png, sizeof png);
}

static void expect_bad(const place *p, const char *const *args, const char *file)
{
    char path[PATH_MAX];
    result r = run_args(p, args);
    assert_string_equal(r.out, "");
    expect_line(&r, 64, file, file);
    assert_false(ipt_is_file(in(p, path, "bad.png")));
}

static void test_bad_checkpoint(void **state)
{
    place *p = *state;
    need_device(p);
    make_bad(p, "model", IPT_TEST_DATA "/model_sd1_single_f16.safetensors");
    for (int i = 0; i < N_BAD; i++) {
        char name[64], twice[128];
        ipt_name(name, sizeof name, "model-%s", bad_name[i]);
        const char *generate[] = {"generate", "-q", "-m", name,      "-p", "x",
                                  "--steps",  "1",  "-o", "bad.png", NULL};
        expect_bad(p, generate, name);
        const char *inspect[] = {"model", "inspect", name, NULL};
        if (i != HAS_NAN && i != WRONG_SHAPE)
            expect_bad(p, inspect, name);
        ipt_name(twice, sizeof twice, "no-%s", name);
        const char *missing[] = {"generate", "-m", twice, "-p", "x", "-o", "bad.png", NULL};
        expect_bad(p, missing, twice);
    }
    char path[PATH_MAX];
    assert_int_equal(mkdir(in(p, path, "nothing"), 0700), 0);
    const char *folder[] = {"model", "inspect", "nothing", NULL};
    expect_bad(p, folder, "nothing");
}

static void test_bad_vae(void **state)
{
    place *p = *state;
    need_device(p);
    make_bad(p, "vae", IPT_TEST_DATA "/model_sd1_single_f16.safetensors");
    for (int i = 0; i < N_BAD; i++) {
        char name[64];
        ipt_name(name, sizeof name, "vae-%s", bad_name[i]);
        const char *args[] = {"generate", "-q", "-m", IPT_TEST_DATA "/models/sd1",
                              "--vae",    name, "-p", "x",
                              "--steps",  "1",  "-W", "64",
                              "-H",       "64", "-o", "bad.png",
                              NULL};
        expect_bad(p, args, name);
    }
}

static void test_bad_lora(void **state)
{
    place *p = *state;
    need_device(p);
    make_bad(p, "lora", IPT_TEST_DATA "/golden_lora_kohya.safetensors");
    for (int i = 0; i < N_BAD; i++) {
        char name[64];
        ipt_name(name, sizeof name, "lora-%s", bad_name[i]);
        const char *generate[] = {"generate", "-q", "-m", IPT_TEST_DATA "/models/sd1",
                                  "--lora",   name, "-p", "x",
                                  "--steps",  "1",  "-W", "64",
                                  "-H",       "64", "-o", "bad.png",
                                  NULL};
        expect_bad(p, generate, name);
        const char *inspect[] = {"lora", "inspect", name, "-m", IPT_TEST_DATA "/models/sd1", NULL};
        const char *alone[] = {"lora", "inspect", name, NULL};
        if (i == HAS_NAN) { /* which is counted */
            result r = run_args(p, inspect);
            assert_int_equal(r.rc, 0);
            assert_non_null(strstr(r.out, "270 values in 270 tensors (first: "));
            done(&r);
            continue;
        }
        expect_bad(p, inspect, name);
        expect_bad(p, alone, name);
    }
}

static void test_bad_image(void **state)
{
    place *p = *state;
    make_bad(p, "image", IPT_TEST_DATA "/golden_lora_kohya.safetensors");
    for (int i = 0; i < N_BAD; i++) {
        char name[64];
        ipt_name(name, sizeof name, "image-%s", bad_name[i]);
        const char *args[] = {"generate", "-q", "--init", name,      "-p", "x",
                              "--steps",  "1",  "-o",     "bad.png", NULL};
        expect_bad(p, args, name);
    }
}

/* --- good input ------------------------------------------------------------------------------- */
static const char *const sd1 = IPT_TEST_DATA "/models/sd1";

static void test_inspect(void **state)
{
    place *p = *state;
    result r = RUN(p, "model", "inspect", sd1, "--json");
    json_t *o = json_loads(r.out, 0, NULL), *parts = json_object_get(o, "components");
    assert_int_equal(r.rc, 0);
    assert_string_equal(ipt_json_str(o, "architecture", ""), "sd1");
    assert_int_equal(json_object_size(parts), 3);
    assert_int_equal(json_array_size(json_object_get(json_object_get(parts, "unet"), "missing")),
                     0);
    json_decref(o);
    done(&r);
    r = RUN(p, "lora", "inspect", IPT_TEST_DATA "/golden_lora_kohya.safetensors", "-m", sd1,
            "--json");
    o = json_loads(r.out, 0, NULL);
    assert_int_equal(r.rc, 0);
    assert_string_equal(ipt_json_str(o, "family", ""), "kohya");
    assert_int_equal(ipt_json_int(o, "rank_max", 0), 4);
    assert_int_equal(json_array_size(json_object_get(o, "unmatched")), 0);
    assert_int_equal(strlen(ipt_json_str(o, "sha256", "")), 64);
    assert_int_equal(strlen(ipt_json_str(o, "autov2", "")), 10);
    json_decref(o);
    done(&r);
    r = RUN(p, "model", "inspect", sd1);
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.out, "unet"));
    done(&r);
}

static void test_tokenize(void **state)
{
    place *p = *state;
    write_text(p, "lines.txt", "a cat\r\n\nlast", 12);
    result r = RUN(p, "tokenize", "-m", IPT_TEST_DATA "/model_sd1_single_f16.safetensors", "--file",
                   "lines.txt", "--json");
    json_t *o = json_loads(r.out, 0, NULL), *lines = json_object_get(o, "lines"),
           *first = json_array_get(lines, 0);
    static const int ids[] = {49406, 320, 2368, 49407}; /* openai/CLIP: "a cat" */
    assert_int_equal(r.rc, 0);
    assert_int_equal(json_array_size(lines), 3);
    assert_int_equal(ipt_json_int(first, "count", 0), 4);
    for (size_t i = 0; i < IPT_COUNT(ids); i++)
        assert_int_equal(json_integer_value(json_array_get(json_object_get(first, "ids"), i)),
                         ids[i]);
    assert_int_equal(ipt_json_int(json_array_get(lines, 1), "count", 0), 2);
    json_decref(o);
    done(&r);
    r = RUN(p, "tokenize", "--file", "no-such-file");
    expect_line(&r, 64, "no-such-file", "no such file");
}

static void test_bench_input(void **state) /* before anything is measured */
{
    place *p = *state;
    static const char other[] = "{\"bench\": \"conv\", \"rows\": [{\"name\": \"a\", \"ms\": 1}]}";
    write_text(p, "other.json", other, sizeof other - 1);
    result r = RUN(p, "bench", "gemm", "--compare", "no-such-file");
    expect_line(&r, 64, "no-such-file", "no such file");
    r = RUN(p, "bench", "gemm", "--compare", "other.json");
    expect_line(&r, 64, "of bench conv, not of bench gemm", "another bench");
}

static void test_generate(void **state)
{
    static const char *const keys[] = {
        "model",           "seed",   "files",       "width",     "height",
        "steps",           "ms",     "ms_per_step", "unet_rows", "peak_host_mib",
        "peak_device_mib", "device", "adapters",    "compose"};
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    result r = RUN(p, "generate", "-m", sd1, "-p", "a cat", "--steps", "2", "-W", "64", "-H", "64",
                   "--seed", "5", "--count", "2", "-o", "g.png", "--sheet", "s.jpg", "--json", "-q",
                   "--lora", IPT_TEST_DATA "/golden_lora_kohya.safetensors:0.5:0@sks");
    json_t *o = json_loads(r.out, 0, NULL);
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    assert_string_equal(r.err, "");
    for (size_t i = 0; i < IPT_COUNT(keys); i++)
        if (!json_object_get(o, keys[i]))
            fail_msg("no %s in: %s", keys[i], r.out);
    assert_int_equal(ipt_json_int(o, "seed", 0), 5);
    assert_int_equal(json_array_size(json_object_get(o, "files")), 2);
    assert_true(ipt_json_int(json_array_get(json_object_get(o, "adapters"), 0), "matched", 0) > 0);
    json_decref(o);
    done(&r);
    assert_true(ipt_is_file(in(p, path, "g-1.png")));
    assert_true(ipt_is_file(in(p, path, "g-2.png")));
    assert_true(ipt_is_file(in(p, path, "s.jpg")));
    assert_false(ipt_is_file(in(p, path, "g.png")));
    r = RUN(p, "generate", "-m", sd1, "-p", "a cat", "--steps", "2", "-W", "64", "-H", "64", "-o",
            "plain.jpg", "--init", "g-1.png", "--strength", "0.6", "--compose", "switch", "--lora",
            IPT_TEST_DATA
            "/golden_lora_kohya.safetensors:0.5,start=0.0,end=0.5,blocks=down:1/mid:0/up:0.5@sks",
            "--lora",
            IPT_TEST_DATA "/golden_lora_kohya.safetensors:0@0,1@0.3,0@.9:0.5,start=0.1@sks");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    assert_string_equal(r.out, "plain.jpg\n");
    assert_non_null(strstr(r.err, "sampling"));
    assert_null(strchr(r.err, '\r'));
    done(&r);
}

/* Every method of the table can be named, and adapters can be measured. */
static void test_methods(void **state)
{
    place *p = *state;
    const char *const lora = IPT_TEST_DATA "/golden_lora_kohya.safetensors",
                      *const concept = IPT_TEST_DATA "/golden_lora_locon.safetensors@cat";
    char path[PATH_MAX];
    size_t n = 0;
    const ipt_method *const *m = ipt_methods(&n);
    need_device(p);
    for (size_t i = 0; i < n; i++) {
        result r =
            RUN(p, "generate", "-m", sd1, "-p", "a cat", "--steps", "2", "-W", "32", "-H", "32",
                "-o", "m.png", "--compose", m[i]->name, "--lora", concept, "--lora", lora);
        if (r.rc != 0)
            fail_msg("%s: exit %d: %s", m[i]->name, r.rc, r.err);
        done(&r);
    }
    result r = RUN(p, "lora", "profile", lora, "-m", sd1, "-W", "32", "-H", "32", "--steps", "2",
                   "--seeds", "1", "--no-note", "--plot", "plot.png", "--json");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    assert_non_null(strstr(r.out, "\"high_frequencies\""));
    assert_true(ipt_is_file(in(p, path, "plot.png")));
    done(&r);
}

/* A signal in the middle of sampling: its exit code, no picture, nothing half written. */
static void test_signals(void **state)
{
    static const int signals[] = {SIGINT, SIGTERM}, codes[] = {130, 143};
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    for (size_t i = 0; i < IPT_COUNT(signals); i++) {
        static const char *const args[] = {"generate", "-m", IPT_TEST_DATA "/models/sd1",
                                           "-p",       "x",  "--steps",
                                           "60",       "-W", "64",
                                           "-H",       "64", "--sampler",
                                           "ddim",     "-o", "sig.png",
                                           NULL};
        pid_t pid = program_start(p, args, false);
        for (int t = 0; t < 600; t++) { /* until it samples: said after a tenth of the steps */
            char *err = NULL;
            size_t n = 0;
            nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
            if (ipt_file_read(p->ctx, in(p, path, "stderr"), 1 << 20, &err, &n) != IPT_OK)
                continue;
            bool sampling = strstr(err, "sampling") != NULL;
            ipt_free(err);
            if (sampling)
                break;
        }
        kill(pid, signals[i]);
        result r = program_finish(p, pid);
        assert_int_equal(r.rc, codes[i]);
        assert_non_null(strstr(r.err, signals[i] == SIGINT ? "impasto: interrupted\n"
                                                           : "impasto: terminated\n"));
        done(&r);
        assert_false(ipt_is_file(in(p, path, "sig.png")));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_usage_errors),   cmocka_unit_test(test_help),
        cmocka_unit_test(test_clora),          cmocka_unit_test(test_examples),
        cmocka_unit_test(test_habits),         cmocka_unit_test(test_no_device),
        cmocka_unit_test(test_devices),        cmocka_unit_test(test_output),
        cmocka_unit_test(test_bad_checkpoint), cmocka_unit_test(test_bad_vae),
        cmocka_unit_test(test_bad_lora),       cmocka_unit_test(test_bad_image),
        cmocka_unit_test(test_inspect),        cmocka_unit_test(test_tokenize),
        cmocka_unit_test(test_bench_input),    cmocka_unit_test(test_generate),
        cmocka_unit_test(test_methods),        cmocka_unit_test(test_signals),
    };
    return cmocka_run_group_tests(tests, set_up, place_destroy);
}
