/* tests/test_metadata.c - what pictures say about themselves, the names of samplers and schedules,
 * hashes of files and their cache. */
#include "tests/program.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/hash.h"
#include "model_io/model_io.h"
#include "sampler/sampler.h"

#define MODEL IPT_TEST_DATA "/model_sd1_single_f16.safetensors"
#define FOLDER IPT_TEST_DATA "/models/sd1"
#define LORA IPT_TEST_DATA "/golden_lora_kohya.safetensors"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

/* --- names ------------------------------------------------------------------------------------ */
/* What other programs call them.  Sources: stable-diffusion-webui's sd_samplers_kdiffusion.py,
 * sd_samplers_timesteps.py, sd_schedulers.py; ComfyUI's samplers.py; stable-diffusion.cpp's
 * examples/cli/README.md; diffusers' classes. */
static void test_names_of_other_programs(void **state)
{
    static const struct {
        const char *name, *sampler, *schedule;
    } known[] = {
        {"euler", "euler", "default"},
        {"Euler a", "euler_a", "default"},
        {"euler_ancestral", "euler_a", "default"},
        {"k_euler_a", "euler_a", "default"},
        {"k_euler_ancestral", "euler_a", "default"},
        {"sample_euler_ancestral", "euler_a", "default"},
        {"EulerAncestralDiscreteScheduler", "euler_a", "default"},
        {"LMS Karras", "lms", "karras"},
        {"k_lms_ka", "lms", "karras"},
        {"Heun", "heun", "default"},
        {"DPM2", "dpm_2", "default"},
        {"dpm2", "dpm_2", "default"},
        {"DPM2 Karras", "dpm_2", "karras"},
        {"DPM2 a", "dpm_2_a", "default"},
        {"DPM2 a Karras", "dpm_2_a", "karras"},
        {"dpm_2_ancestral", "dpm_2_a", "default"},
        {"k_dpm_2_a_ka", "dpm_2_a", "karras"},
        {"KDPM2AncestralDiscreteScheduler", "dpm_2_a", "default"},
        {"DPM++ 2M", "dpmpp_2m", "default"},
        {"DPM++ 2M Karras", "dpmpp_2m", "karras"},
        {"dpm++ 2m karras", "dpmpp_2m", "karras"},
        {"dpm++2m", "dpmpp_2m", "default"},
        {"k_dpmpp_2m_ka", "dpmpp_2m", "karras"},
        {"DPMSolverMultistepScheduler", "dpmpp_2m", "default"},
        {"DPM++ SDE", "dpmpp_sde", "default"},
        {"DPM++ SDE Karras", "dpmpp_sde", "karras"},
        {"dpmpp_sde_gpu", "dpmpp_sde", "default"},
        {"DPM++ 2M SDE", "dpmpp_2m_sde", "default"},
        {"DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"},
        {"k_dpmpp_2m_sde_ka", "dpmpp_2m_sde", "karras"},
        {"k_dpmpp_2m_sde_exp", "dpmpp_2m_sde", "exponential"},
        {"DPM++ 3M SDE Karras", "dpmpp_3m_sde", "karras"},
        {"dpmpp_3m_sde_gpu", "dpmpp_3m_sde", "default"},
        {"DPMSolverSinglestepScheduler", "dpm_single", "default"},
        {"DDIM", "ddim", "default"},
        {"ddim_trailing", "ddim", "trailing"},
        {"DDIMScheduler", "ddim", "default"},
        {"PLMS", "pndm", "default"},
        {"UniPC", "unipc", "default"},
        {"uni_pc", "unipc", "default"},
        {"uni_pc_bh2", "unipc", "default"},
        {"LCM", "lcm", "default"},
        {"tcd", "tcd", "default"},
        {"deis", "deis", "default"},
        {"DDPM", "ddpm", "default"},
        {"ipndm", "ipndm", "default"},
        {"sa_solver", "sa", "default"},
        {"Euler SGM Uniform", "euler", "sgm_uniform"},
        {"euler simple", "euler", "simple"},
        {"DPM++ 2M Align Your Steps", "dpmpp_2m", "ays"},
    };
    static const char *const elsewhere[] = {"DPM++ 2S a",
                                            "DPM++ 2S a Karras",
                                            "DPM fast",
                                            "DPM adaptive",
                                            "Restart",
                                            "dpm++2s_a",
                                            "dpm++2mv2",
                                            "ipndm_v",
                                            "res_multistep",
                                            "heunpp2",
                                            "euler_cfg_pp",
                                            "DDIM CFG++",
                                            "DPM++ 2M SDE Heun Karras"};
    static const char *const unknown[] = {"",  " ",       "++",  "eulr",          "karras",
                                          "a", "euler b", "dpm", "Euler a Karas", "\xff\xfe"};
    ipt_sampler_kind kind = IPT_SAMPLER_COUNT;
    (void)state;
    for (size_t i = 0; i < IPT_COUNT(known); i++) {
        ipt_schedule schedule = IPT_SCHEDULE_DEFAULT;
        if (ipt_sampler_read(known[i].name, &kind, &schedule) != IPT_NAME_KNOWN ||
            strcmp(ipt_sampler_name(kind), known[i].sampler) != 0 ||
            strcmp(ipt_schedule_name(schedule), known[i].schedule) != 0)
            fail_msg("'%s': %s, %s; expected %s, %s", known[i].name, ipt_sampler_name(kind),
                     ipt_schedule_name(schedule), known[i].sampler, known[i].schedule);
    }
    for (size_t i = 0; i < IPT_COUNT(elsewhere); i++) {
        ipt_schedule schedule = IPT_SCHEDULE_DEFAULT;
        if (ipt_sampler_read(elsewhere[i], &kind, &schedule) != IPT_NAME_ELSEWHERE)
            fail_msg("'%s' is taken for something else", elsewhere[i]);
    }
    for (size_t i = 0; i < IPT_COUNT(unknown); i++) {
        ipt_schedule schedule = IPT_SCHEDULE_DEFAULT;
        if (ipt_sampler_read(unknown[i], &kind, &schedule) != IPT_NAME_UNKNOWN)
            fail_msg("'%s' is taken for something", unknown[i]);
    }
    char longer[1000];
    memset(longer, 'e', sizeof longer);
    longer[sizeof longer - 1] = 0;
    assert_int_equal(ipt_sampler_read(longer, &kind, &(ipt_schedule){0}), IPT_NAME_UNKNOWN);
    assert_int_equal(ipt_sampler_read(NULL, &kind, &(ipt_schedule){0}), IPT_NAME_UNKNOWN);
}

/* Every name, label and class means itself; every pair of them too. */
static void test_names_round_trip(void **state)
{
    (void)state;
    for (int i = 0; i < IPT_SAMPLER_COUNT; i++)
        for (int j = 0; j < IPT_SCHEDULE_COUNT; j++) {
            const char *names[2] = {ipt_sampler_name((ipt_sampler_kind)i),
                                    ipt_sampler_label((ipt_sampler_kind)i)};
            const char *label = ipt_schedule_label((ipt_schedule)j, NULL);
            const char *then[2] = {ipt_schedule_name((ipt_schedule)j), label ? label : "Automatic"};
            for (int k = 0; k < 2; k++) {
                char both[128];
                ipt_sampler_kind kind = IPT_SAMPLER_COUNT;
                ipt_schedule schedule = IPT_SCHEDULE_COUNT, alone = IPT_SCHEDULE_COUNT;
                ipt_name(both, sizeof both, "%s %s", names[k], then[k]);
                if (ipt_sampler_read(both, &kind, &schedule) != IPT_NAME_KNOWN || (int)kind != i ||
                    (int)schedule != j || ipt_schedule_read(then[k], &alone) != IPT_NAME_KNOWN ||
                    (int)alone != j)
                    fail_msg("%s: %d, %d", both, (int)kind, (int)schedule);
            }
        }
}

static void test_unknown_names_are_helped(void **state)
{
    static const struct {
        const char *option, *name, *said;
    } cases[] = {
        {"--sampler", "DPM++ 2MM", "did you mean dpmpp_2m?"},
        {"--sampler", "eulr a", "did you mean euler?"},
        {"--sampling-method", "eulerr", "did you mean euler?"},
        {"--sampler", "DPM++ 2S a", "not built in here; one of: ddim"},
        {"--schedule", "Karas", "did you mean karras?"},
        {"--scheduler", "polyexponential", "not built in here; one of: default"},
        {"--sampler", "DPM++ 2M Karas", "one of: ddim"},
    };
    place *p = *state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        result r = RUN(p, "generate", "-p", "x", cases[i].option, cases[i].name);
        expect_line(&r, 2, cases[i].said, cases[i].name);
    }
    result r = RUN(p, "generate", "-p", "x", "--sampler", "DPM++ 2M Karras", "--schedule", "beta");
    expect_line(&r, 2, "names the schedule karras, --schedule beta another", "two schedules");
}

/* --- the texts in a picture ------------------------------------------------------------------- */
/* Data of the PNG's text chunk `key` (tEXt or iTXt without translation); freed with free. */
static char *png_text(const place *p, const char *name, const char *key)
{
    char path[PATH_MAX], *png = NULL, *found = NULL;
    size_t n = 0, k = strlen(key) + 1;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, name), 1 << 26, &png, &n));
    for (size_t at = 8; at + 12 <= n && !found;) {
        const unsigned char *c = (const unsigned char *)png + at;
        size_t len = (size_t)c[0] << 24 | (size_t)c[1] << 16 | (size_t)c[2] << 8 | c[3];
        assert_true(at + 12 + len <= n);
        bool plain = memcmp(c + 4, "tEXt", 4) == 0, international = memcmp(c + 4, "iTXt", 4) == 0;
        size_t skip = k + (international ? 4 : 0);
        if ((plain || international) && len >= skip && memcmp(c + 8, key, k) == 0) {
            found = calloc(1, len - skip + 1);
            assert_non_null(found);
            memcpy(found, c + 8 + skip, len - skip);
        }
        at += 12 + len;
    }
    ipt_free(png);
    return found;
}

static void expect_text(const place *p, const char *name, const char *key, const char *expected)
{
    char *text = png_text(p, name, key);
    if (!text || !strstr(text, expected))
        fail_msg("%s: %s is '%s', expected '%s' in it", name, key, text ? text : "-", expected);
    free(text);
}

static void copy_file(const place *p, const char *from, const char *name)
{
    char *data = NULL;
    size_t n = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, from, 1 << 26, &data, &n));
    write_text(p, name, data, n);
    ipt_free(data);
}

/* The hashes are those of sha256sum and of Python's hashlib over what follows the header. */
static void test_parameters(void **state)
{
    place *p = *state;
    need_device(p);
    result r =
        RUN(p, "generate", "-m", MODEL, "--config-dir", FOLDER, "-p", "a cat", "-n", "dog",
            "--steps", "1", "-W", "64", "-H", "64", "-s", "7", "--cfg-scale", "5.5", "--sampler",
            "DPM++ 2M Karras", "--lora", LORA ":0.5:0.25", "-o", "p.png", "-q", "--json");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    expect_text(p, "p.png", "parameters",
                "a cat <lora:golden_lora_kohya:0.25:0.5>\nNegative prompt: dog\n"
                "Steps: 1, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 7, "
                "Size: 64x64, Model hash: ef93489275, Model: model_sd1_single_f16, RNG: CPU, "
                "Lora hashes: \"golden_lora_kohya: 18b69f6228ff\", Compose: merge, "
                "Version: impasto " IPT_VERSION);
    json_t *o = json_loads(r.out, 0, NULL);
    const json_t *a = json_array_get(json_object_get(o, "adapters"), 0);
    assert_string_equal(ipt_json_str(o, "model_sha256", ""),
                        "ef934892758e920d62778d6398e6b67dd5b8da05b863919c5ecdc9af8e16558c");
    assert_string_equal(ipt_json_str(a, "sha256", ""),
                        "75eff6a4c6aca7470251d45b20275070e9bc08d4c3db6aca2bba2629e548b592");
    assert_string_equal(ipt_json_str(a, "autov2", ""), "75eff6a4c6");
    assert_string_equal(ipt_json_str(a, "autov3", ""), "18b69f6228ff");
    assert_string_equal(ipt_json_str(a, "a1111_hash", ""), "18b69f6228ff");
    json_decref(o);
    done(&r);
}

/* Names that would end their value are quoted; a folder has no hash; a VAE keeps its ending. */
static void test_parameters_quote_names(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    need_device(p);
    copy_file(p, MODEL, "m,o: \"d.v2.safetensors");
    assert_int_equal(mkdir(in(p, path, "lo"), 0700), 0);
    copy_file(p, LORA, "lo/a:b, c.safetensors");
    result r = RUN(p, "generate", "-m", "m,o: \"d.v2.safetensors", "--config-dir", FOLDER, "-p",
                   "x", "--steps", "1", "-W", "64", "-H", "64", "-o", "q.png", "-q", "--lora",
                   "lo/a:b, c.safetensors", "--vae", MODEL, "--sampler", "euler_ancestral",
                   "--clip-skip", "2");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    done(&r);
    expect_text(p, "q.png", "parameters", "Steps: 1, Sampler: Euler a, CFG scale: 7, ");
    expect_text(p, "q.png", "parameters",
                "Model hash: ef93489275, Model: \"m,o: \\\"d.v2\", VAE hash: ef93489275, "
                "VAE: model_sd1_single_f16.safetensors, Clip skip: 2, ");
    expect_text(p, "q.png", "parameters", "Lora hashes: \"ab c: 18b69f6228ff\"");
    r = RUN(p, "generate", "-m", FOLDER "/", "-p", "x", "--steps", "1", "-W", "64", "-H", "64",
            "-o", "f.png", "-q", "--json");
    json_t *o = json_loads(r.out, 0, NULL);
    assert_int_equal(r.rc, 0);
    assert_true(json_is_null(json_object_get(o, "model_sha256")));
    json_decref(o);
    done(&r);
    expect_text(p, "f.png", "parameters", "Size: 64x64, Model: sd1, ");
}

/* A LoRA whose trainer wrote its hash down is called by it, as A1111 does. */
static void test_lora_hash_of_the_trainer(void **state)
{
    static const ipt_st_meta meta[] = {
        {"sshs_model_hash", "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}};
    static const ipt_st_meta broken[] = {{"sshs_model_hash", "not, a: hash\x1b"}};
    place *p = *state;
    need_device(p);
    ipt_safetensors *st = NULL;
    char path[PATH_MAX];
    assert_ok(p->ctx, ipt_safetensors_open(p->ctx, LORA, &st));
    size_t n = ipt_safetensors_count(st);
    ipt_st_write *w = calloc(n, sizeof *w);
    assert_non_null(w);
    for (size_t i = 0; i < n; i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        assert_ok(p->ctx, ipt_st_load(t));
        w[i] = (ipt_st_write){.name = t->name, .dtype = t->dtype, .rank = t->rank, .data = t->data};
        memcpy(w[i].dim, t->dim, sizeof t->dim);
    }
    assert_ok(p->ctx,
              ipt_safetensors_write(p->ctx, in(p, path, "said.safetensors"), w, n, meta, 1));
    assert_ok(p->ctx,
              ipt_safetensors_write(p->ctx, in(p, path, "wrong.safetensors"), w, n, broken, 1));
    free(w);
    ipt_safetensors_close(&st);
    result r =
        RUN(p, "generate", "-m", FOLDER, "-p", "x", "--steps", "1", "-W", "64", "-H", "64", "-o",
            "s.png", "-q", "--lora", "said.safetensors", "--lora", "wrong.safetensors", "--json");
    json_t *o = json_loads(r.out, 0, NULL), *list = json_object_get(o, "adapters");
    assert_string_equal(ipt_json_str(json_array_get(list, 0), "a1111_hash", ""), "0123456789ab");
    const char *computed = ipt_json_str(json_array_get(list, 1), "autov3", "");
    assert_int_equal(strlen(computed), 12);
    assert_string_equal(ipt_json_str(json_array_get(list, 1), "a1111_hash", ""), computed);
    json_decref(o);
    done(&r);
}

/* Every seed reads back as it was given. */
static void test_seeds_round_trip(void **state)
{
    static const char *const seeds[] = {"9007199254740993", "9223372036854775807",
                                        "9223372036854775808", "18446744073709551615"};
    place *p = *state;
    need_device(p);
    for (size_t i = 0; i < IPT_COUNT(seeds); i++) {
        char expected[64];
        result r = RUN(p, "generate", "-m", FOLDER, "-p", "x", "--steps", "1", "-W", "64", "-H",
                       "64", "--seed", seeds[i], "-o", "seed.png", "-q", "--json");
        if (r.rc != 0)
            fail_msg("exit %d: %s", r.rc, r.err);
        bool big = strlen(seeds[i]) > 19 || strcmp(seeds[i], "9223372036854775807") > 0;
        big = big && strlen(seeds[i]) >= 19;
        expect_text(p, "seed.png", "parameters",
                    ipt_name(expected, sizeof expected, "Seed: %s, ", seeds[i]));
        expect_text(p, "seed.png", "impasto",
                    ipt_name(expected, sizeof expected, big ? "\"seed\":\"%s\"," : "\"seed\":%s,",
                             seeds[i]));
        json_t *o = json_loads(r.out, 0, NULL), *seed = json_object_get(o, "seed");
        char *back = json_dumps(seed, JSON_ENCODE_ANY);
        ipt_name(expected, sizeof expected, big ? "\"%s\"" : "%s", seeds[i]);
        assert_string_equal(back, expected);
        free(back);
        json_decref(o);
        done(&r);
    }
    for (int k = 0; k < 2; k++) { /* -1 is a random one, as everywhere */
        result r = RUN(p, "generate", "-m", FOLDER, "-p", "x", "--steps", "1", "-W", "64", "-H",
                       "64", "--seed", k ? "random" : "-1", "-o", "seed.png", "-q", "--json");
        json_t *o = json_loads(r.out, 0, NULL);
        assert_true(ipt_json_int(o, "seed", -1) >= 0);
        assert_true(ipt_json_int(o, "seed", -1) <= UINT32_MAX);
        json_decref(o);
        done(&r);
    }
}

/* A prompt of bytes that are no text still gives JSON and a readable picture. */
static void test_bytes_in_a_prompt(void **state)
{
    place *p = *state;
    need_device(p);
    result r = RUN(p, "generate", "-m", FOLDER, "-p", "a \xff\xc3 \x1b[31m cat", "--steps", "1",
                   "-W", "64", "-H", "64", "-o", "b.png", "-q", "--json");
    if (r.rc != 0)
        fail_msg("exit %d: %s", r.rc, r.err);
    json_t *o = json_loads(r.out, 0, NULL);
    assert_non_null(strstr(ipt_json_str(o, "parameters", ""), "\\xff\\xc3"));
    json_decref(o);
    done(&r);
    char *text = png_text(p, "b.png", "impasto");
    o = json_loads(text, 0, NULL);
    assert_non_null(strstr(ipt_json_str(o, "prompt", ""), "\\xff\\xc3"));
    json_decref(o);
    free(text);
}

/* --- hashes ----------------------------------------------------------------------------------- */
/* The hash of one file through a fresh ipt_hashes; "" when it has none. */
static void hash_of(const place *p, const char *name, bool data, ipt_file_hash *out)
{
    char path[PATH_MAX];
    const char *list[1] = {in(p, path, name)};
    ipt_hashes *h = NULL;
    memset(out, 0, sizeof *out);
    assert_ok(p->ctx, ipt_hashes_create(p->ctx, &h));
    assert_ok(p->ctx, ipt_hashes_want(h, list, &data, 1));
    ipt_hashes_wait(h);
    assert_true(ipt_hashes_ready(h));
    if (ipt_hashes_get(h, 0))
        *out = *ipt_hashes_get(h, 0);
    ipt_hashes_destroy(&h);
}

static void sha256_hex(const void *data, size_t n, char hex[65])
{
    ipt_sha256 s;
    uint8_t digest[32];
    ipt_sha256_init(&s);
    ipt_sha256_update(&s, data, n);
    ipt_sha256_final(&s, digest);
    ipt_hex(digest, sizeof digest, hex);
}

/* The only file in the cache folder. */
static void cache_file(const place *p, char *name, size_t n)
{
    char hex[65], path[PATH_MAX], real[PATH_MAX];
    assert_non_null(getcwd(real, sizeof real));
    assert_int_equal(chdir(p->dir), 0); /* /tmp may be a link */
    assert_non_null(getcwd(path, sizeof path));
    assert_int_equal(chdir(real), 0);
    ipt_name(real, sizeof real, "%s/big.bin", path);
    sha256_hex(real, strlen(real), hex);
    ipt_name(name, n, "cache/impasto/sha256-%.32s.txt", hex);
}

static void test_hash_cache(void **state)
{
    enum { N = 9 << 20, HEADER = 1000 };
    place *p = *state;
    char path[PATH_MAX], all[65], tail[65], name[128], *kept = NULL, *real_cache = NULL;
    size_t n = 0;
    if (getenv("XDG_CACHE_HOME"))
        real_cache = strdup(getenv("XDG_CACHE_HOME"));
    setenv("XDG_CACHE_HOME", in(p, path, "cache"), 1);
    char *data = calloc(1, N);
    assert_non_null(data);
    uint64_t seed = 1;
    for (size_t i = 0; i + 8 <= N; i += 8) {
        uint64_t v = ipt_rng_next(&seed);
        memcpy(data + i, &v, 8);
    }
    memset(data, 0, 8);
    data[0] = (char)(HEADER & 0xff);
    data[1] = (char)(HEADER >> 8);
    write_text(p, "big.bin", data, N);
    sha256_hex(data, N, all);
    sha256_hex(data + 8 + HEADER, N - 8 - HEADER, tail);
    ipt_file_hash h;
    hash_of(p, "big.bin", true, &h);
    assert_string_equal(h.sha256, all);
    assert_string_equal(h.data, tail);
    cache_file(p, name, sizeof name);
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, name), 1 << 20, &kept, &n));
    memset(kept + n - 130, '7', 64); /* it is used: another hash there is told */
    write_text(p, name, kept, n);
    hash_of(p, "big.bin", true, &h);
    assert_int_equal(strspn(h.sha256, "7"), 64);
    for (size_t cut = 0; cut < n; cut += 37) { /* a damaged one is not */
        write_text(p, name, kept, cut);
        hash_of(p, "big.bin", cut == 0, &h);
        if (strcmp(h.sha256, all) != 0 && strspn(h.sha256, "7") != 64)
            fail_msg("cut at %zu: %s", cut, h.sha256);
    }
    memset(kept + n - 130, 'g', 64);
    write_text(p, name, kept, n);
    hash_of(p, "big.bin", true, &h);
    assert_string_equal(h.sha256, all);
    data[N - 1] ^= 1; /* another file of the same name and size */
    write_text(p, "big.bin", data, N);
    sha256_hex(data, N, all);
    hash_of(p, "big.bin", false, &h);
    assert_string_equal(h.sha256, all);
    ipt_free(kept);
    free(data);
    if (real_cache)
        setenv("XDG_CACHE_HOME", real_cache, 1);
    else
        unsetenv("XDG_CACHE_HOME");
    free(real_cache);
}

/* What has no hash: nothing hangs, nothing fails. */
static void test_no_hash(void **state)
{
    place *p = *state;
    char path[PATH_MAX];
    ipt_file_hash h;
    hash_of(p, "no such file", true, &h);
    assert_string_equal(h.sha256, "");
    hash_of(p, ".", true, &h);
    assert_string_equal(h.sha256, "");
    assert_int_equal(mkfifo(in(p, path, "pipe"), 0600), 0);
    hash_of(p, "pipe", true, &h);
    assert_string_equal(h.sha256, "");
    write_text(p, "small", "\xff\xff\xff\xff\xff\xff\xff\xff",
               8); /* a header longer than the file */
    hash_of(p, "small", true, &h);
    assert_int_equal(strlen(h.sha256), 64);
    assert_string_equal(h.data, "");
    write_text(p, "small", "abc", 3); /* FIPS 180-4's example */
    hash_of(p, "small", true, &h);
    assert_string_equal(h.sha256,
                        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_string_equal(h.data, "");
    write_text(p, "small", "", 0);
    hash_of(p, "small", true, &h);
    assert_string_equal(h.sha256,
                        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names_of_other_programs),
        cmocka_unit_test(test_names_round_trip),
        cmocka_unit_test(test_unknown_names_are_helped),
        cmocka_unit_test(test_parameters),
        cmocka_unit_test(test_parameters_quote_names),
        cmocka_unit_test(test_lora_hash_of_the_trainer),
        cmocka_unit_test(test_seeds_round_trip),
        cmocka_unit_test(test_bytes_in_a_prompt),
        cmocka_unit_test(test_hash_cache),
        cmocka_unit_test(test_no_hash),
    };
    return cmocka_run_group_tests(tests, set_up, place_destroy);
}
