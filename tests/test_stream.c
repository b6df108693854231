/* tests/test_stream.c - requests within a memory limit: whatever it is, the picture has the bytes
 * that it has without one, or one sentence says what is needed. */
#include "tests/golden.h"

#include "engine/internal.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#define DATA IPT_TEST_DATA
enum { SIDE = 32, PICTURES = 2, BYTES = SIDE * SIDE * 3 };

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_gpu *gpu;
    ipt_report rep;
    uint64_t peak; /* of the last request */
    int n_picture, n_preview, n_warning;
    uint8_t rgb[PICTURES][BYTES], want[PICTURES][BYTES];
} fixture;

static void count_line(void *user, ipt_log_level level, const char *line)
{
    fixture *f = user;
    f->n_warning += level == IPT_LOG_WARN && strncmp(line, "fold always", 11) == 0;
}

static fixture *open_engine(ipt_precision precision)
{
    fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    assert_int_equal(ipt_ctx_create(count_line, f, &f->ctx), IPT_OK);
    f->engine = test_engine(&f->ctx, precision, 0);
    f->gpu = ipt_engine_gpu(f->engine);
    return f;
}

static void close_engine(fixture *f)
{
    test_engine_done(&f->engine, &f->ctx);
    free(f);
}

/* The engine as if it had been made with that limit, of compiled shaders only. */
static void limit(fixture *f, uint64_t bytes)
{
    for (int i = 0; i < IPT_KEEP_MODELS; i++)
        ipt_loaded_drop(f->engine, &f->engine->model[i]);
    ipt_gpu_limit_memory(f->gpu, bytes);
    f->engine->opts.vram_limit = bytes;
}

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    fixture *f = user;
    (void)text, (void)json;
    assert_true(index < PICTURES && im->w == SIDE && im->h == SIDE);
    memcpy(f->rgb[index], im->rgb, BYTES);
    f->n_picture++;
    return IPT_OK;
}

static ipt_status look(void *user, const ipt_preview *p)
{
    fixture *f = user;
    (void)p;
    f->n_preview++;
    return IPT_OK;
}

static ipt_status draw(fixture *f, const ipt_request *r)
{
    f->n_picture = 0;
    memset(f->rgb, 0, sizeof f->rgb);
    ipt_status s = ipt_generate(f->engine, r, keep, f, &f->rep);
    f->peak = ipt_gpu_peak_bytes(f->gpu);
    if (s == IPT_OK)
        assert_int_equal(f->n_picture, r->count > 1 ? r->count : 1);
    return s;
}

static ipt_request small(const char *model)
{
    ipt_request r;
    ipt_request_init(&r);
    r.model = model;
    r.prompt = "a cat and a dog";
    r.width = r.height = SIDE;
    r.steps = 2;
    r.seed = 3;
    r.vae_tile = -1; /* tiles are other bytes */
    return r;
}

/* --- everything ------------------------------------------------------------------------------- */
typedef struct shown {
    const char *name, *model, *compose, *cache, *fold, *opt;
    size_t n_lora;
    int32_t count;
    bool from_picture, is_masked, is_previewed, is_half, is_q8, is_staged, has_regions;
} shown;

static const shown ALL[] = {
    {.name = "plain", .model = "sd1"},
    {.name = "two pictures", .model = "sd1", .count = 2},
    {.name = "sdxl, half", .model = "sdxl", .is_half = true},
    {.name = "sd2", .model = "sd2"},
    {.name = "q8", .model = "sd1", .is_q8 = true},
    {.name = "no mapped memory", .model = "sd1", .is_staged = true},
    {.name = "merge", .model = "sd1", .n_lora = 2, .compose = "merge", .fold = "never"},
    {.name = "switch", .model = "sd1", .n_lora = 2, .compose = "switch"},
    {.name = "composite", .model = "sd1", .n_lora = 2, .compose = "composite"},
    {.name = "clora",
     .model = "sd1",
     .n_lora = 2,
     .compose = "clora",
     .opt = "refine=1",
     .count = 2},
    {.name = "cmlora", .model = "sd1", .n_lora = 2, .compose = "cmlora"},
    {.name = "cache", .model = "sd1", .cache = "2", .count = 2},
    {.name = "img2img", .model = "sd1", .from_picture = true},
    {.name = "inpaint", .model = "inpaint", .from_picture = true, .is_masked = true, .count = 2},
    {.name = "previews", .model = "sd1", .is_previewed = true},
    {.name = "regions", .model = "sd1", .has_regions = true},
};

static ipt_request request_of(const shown *c, ipt_lora lora[2], const char **opt, char *model,
                              size_t n)
{
    static const char *const words[] = {"cat", "dog"}, *const files[] = {
                                                           DATA "/kinds/locon.safetensors",
                                                           DATA "/kinds/lokr.safetensors"};
    ipt_request r = small(ipt_name(model, n, DATA "/models/%s", c->model));
    for (size_t i = 0; i < 2; i++)
        lora[i] = (ipt_lora){files[i], 0.8F, 0.5F, words[i], 0, 1, NULL, NULL};
    r.lora = lora;
    r.n_lora = c->n_lora;
    r.compose = c->compose;
    r.cache = c->cache;
    r.fold = c->fold;
    r.count = c->count;
    *opt = c->opt;
    r.compose_opt = opt;
    r.n_compose_opt = c->opt != NULL;
    r.preview = c->is_previewed ? look : NULL;
    r.steps = c->cache ? 3 : 2;
    return r;
}

/* Limits from the peak that a request has by itself, each less by a part of the weights, down to
 * those that are refused. */
static void sweep(fixture *f, const shown *c, ipt_request *r)
{
    int n_streamed = 0, n_refused = 0;
    limit(f, 0);
    assert_ok(f->ctx, draw(f, r));
    assert_int_equal(f->rep.unet_streamed_bytes, 0);
    memcpy(f->want, f->rgb, sizeof f->want);
    limit(f, UINT64_C(60) << 20); /* less than a slab: every buffer is what it asks for */
    assert_ok(f->ctx, draw(f, r));
    const uint64_t most = f->peak, step = f->rep.unet_weight_bytes / 4;
    for (uint64_t bytes = most; n_refused<2; bytes = bytes> step ? bytes - step : bytes / 2) {
        limit(f, bytes);
        ipt_status s = draw(f, r);
        if (f->peak > bytes)
            fail_msg("%s: %d bytes of %d taken", c->name, (int)f->peak, (int)bytes);
        if (s == IPT_OK && memcmp(f->rgb, f->want, sizeof f->rgb) != 0)
            fail_msg("%s: another picture within %d bytes", c->name, (int)bytes);
        if (s != IPT_OK &&
            (s != IPT_ERR_DEVICE_MEM || !strstr(ipt_last_error(f->ctx), "a higher --vram-limit")))
            fail_msg("%s: within %d bytes: %s", c->name, (int)bytes, ipt_last_error(f->ctx));
        n_streamed += s == IPT_OK && f->rep.unet_streamed_bytes > 0;
        n_refused += s != IPT_OK;
    }
    print_message("  %s: from %d KiB down %d limits with weights on their way\n", c->name,
                  (int)(most >> 10), n_streamed);
    assert_true(n_streamed > 0);
}

static void every_limit(void **state)
{
    uint8_t rgb[BYTES], white[BYTES];
    char model[512], path[64], region[128];
    const ipt_image init = {SIDE, SIDE, rgb}, mask = {SIDE, SIDE, white};
    const char *const regions[] = {region};
    (void)state;
    for (size_t i = 0; i < BYTES; i++) {
        rgb[i] = (uint8_t)(i * 37 % 251);
        white[i] = i / 3 % SIDE < SIDE / 2 ? 255 : 0;
    }
    for (size_t i = 0; i < IPT_COUNT(ALL); i++) {
        const shown *c = &ALL[i];
        ipt_lora lora[2];
        const char *opt = NULL;
        if (c->is_staged)
            setenv("IPT_STAGING", "1", 1);
        fixture *f = open_engine(c->is_half ? IPT_PRECISION_F16
                                 : c->is_q8 ? IPT_PRECISION_Q8
                                            : IPT_PRECISION_F32);
        unsetenv("IPT_STAGING");
        ipt_request r = request_of(c, lora, &opt, model, sizeof model);
        ipt_name(path, sizeof path, "/tmp/impasto-mask-%ld.png", (long)getpid());
        ipt_name(region, sizeof region, "%s@a fox", path);
        if (c->has_regions)
            assert_ok(f->ctx, ipt_image_save(f->ctx, path, &mask, NULL, NULL));
        r.user = f;
        r.region = regions;
        r.n_region = c->has_regions;
        r.init = c->from_picture ? &init : NULL;
        r.mask = c->is_masked ? &mask : NULL;
        sweep(f, c, &r);
        unlink(path);
        close_engine(f);
    }
}

/* --- what goes wrong -------------------------------------------------------------------------- */
/* The engine under a limit with which two thirds of the UNet's weights come in anew; f->want: the
 * picture without one. */
static void limit_to_third(fixture *f, const ipt_request *r)
{
    limit(f, 0);
    assert_ok(f->ctx, draw(f, r));
    memcpy(f->want, f->rgb, sizeof f->want);
    limit(f, f->rep.unet_working_bytes + f->rep.unet_weight_bytes / 3);
}

static void same_picture(fixture *f, const ipt_request *r)
{
    assert_ok(f->ctx, draw(f, r));
    assert_true(f->rep.unet_streamed_bytes > 0);
    assert_memory_equal(f->rgb, f->want, sizeof f->rgb);
}

static ipt_stop stop;
static void stop_now(int number)
{
    (void)number;
    ipt_stop_ask(&stop);
}

/* Whenever it is asked: while weights are loaded, recorded, on their way. */
static void cancel_anywhere(void **state)
{
    struct sigaction on = {.sa_handler = stop_now}, was;
    int n_cancelled = 0;
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F32);
    ipt_request r = small(DATA "/models/sd1");
    limit_to_third(f, &r);
    sigaction(SIGALRM, &on, &was);
    for (int i = 0; i < 24; i++) {
        const struct itimerval soon = {.it_value = {.tv_usec = 1000 + i * 4000}}, never = {0};
        atomic_store(&stop.asked, 0);
        r.stop = &stop;
        setitimer(ITIMER_REAL, &soon, NULL);
        ipt_status s = draw(f, &r);
        setitimer(ITIMER_REAL, &never, NULL);
        assert_true(s == IPT_OK || s == IPT_ERR_CANCELLED);
        n_cancelled += s == IPT_ERR_CANCELLED;
        r.stop = NULL;
        if (i % 4 == 3) /* now and then from what was left */
            same_picture(f, &r);
        if (i % 4 == 1)
            limit(f, f->engine->opts.vram_limit);
    }
    sigaction(SIGALRM, &was, NULL);
    assert_true(n_cancelled > 0);
    close_engine(f);
}

static void two_models_in_turn(void **state)
{
    static uint8_t want[2][BYTES];
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F16);
    ipt_request r[2] = {small(DATA "/models/sd1"), small(DATA "/models/sdxl")};
    uint64_t bytes = UINT64_MAX;
    for (int i = 0; i < 2; i++) {
        limit_to_third(f, &r[i]);
        memcpy(want[i], f->want[0], BYTES);
        bytes = f->engine->opts.vram_limit < bytes ? f->engine->opts.vram_limit : bytes;
    }
    limit(f, bytes);
    for (int i = 0; i < 6; i++) {
        assert_ok(f->ctx, draw(f, &r[i % 2]));
        assert_memory_equal(f->rgb[0], want[i % 2], BYTES);
        assert_true(f->rep.unet_streamed_bytes > 0 && f->peak <= bytes);
    }
    close_engine(f);
}

/* Weights that do not stay cannot be changed: adapters stay beside them, which is said where it was
 * asked for.  Folded weights that stayed are the file's again. */
static void nothing_is_folded(void **state)
{
    static const char *const how[] = {"auto", "always"};
    const ipt_lora lora = {DATA "/kinds/locon.safetensors", 0.9F, 1, NULL, 0, 1, NULL, NULL};
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F32);
    ipt_request r = small(DATA "/models/sd1"), plain = r;
    r.lora = &lora;
    r.n_lora = 1;
    r.steps = 30; /* auto would fold */
    for (size_t i = 0; i < IPT_COUNT(how); i++) {
        r.fold = "never";
        limit_to_third(f, &r);
        r.fold = how[i];
        f->n_warning = 0;
        for (int k = 0; k < 2; k++) /* recorded, then kept */
            same_picture(f, &r);
        assert_false(f->rep.is_folded);
        assert_int_equal(f->n_warning, i == 0 ? 0 : 2);
    }
    limit_to_third(f, &plain);
    const uint64_t bytes = f->engine->opts.vram_limit;
    limit(f, UINT64_C(60) << 20);
    assert_ok(f->ctx, draw(f, &r));
    assert_true(f->rep.is_folded);
    f->engine->opts.vram_limit = bytes; /* the folded weights stand, and have to go */
    ipt_gpu_limit_memory(f->gpu, bytes);
    same_picture(f, &plain);
    close_engine(f);
}

/* A file that is cut while its weights are on their way. */
typedef struct cut {
    const char *path;
    int32_t at;
} cut;

static ipt_status cut_file(void *user, const ipt_latent *l)
{
    const cut *c = user;
    return l->step == c->at && truncate(c->path, 4096) != 0 ? IPT_ERR_IO : IPT_OK;
}

static void copy_file(fixture *f, const char *from, const char *to)
{
    char *data = NULL;
    size_t n = 0;
    assert_ok(f->ctx, ipt_file_read(f->ctx, from, (size_t)64 << 20, &data, &n));
    assert_ok(f->ctx, ipt_file_write(f->ctx, to, data, n));
    ipt_free(data);
}

static void file_is_cut(void **state)
{
    static const char from[] = DATA "/model_sd1_single_f16.safetensors";
    char path[64];
    (void)state;
    fixture *f = open_engine(IPT_PRECISION_F32);
    ipt_name(path, sizeof path, "/tmp/impasto-cut-%ld.safetensors", (long)getpid());
    copy_file(f, from, path);
    ipt_request r = small(path);
    r.config_dir = DATA "/models/sd1";
    limit_to_third(f, &r);
    cut c = {path, 1};
    r.latent = cut_file;
    r.latent_user = &c;
    assert_int_equal(draw(f, &r), IPT_ERR_IO);
    assert_non_null(strstr(ipt_last_error(f->ctx), path));
    copy_file(f, from, path);
    r.latent = NULL;
    same_picture(f, &r);
    unlink(path);
    close_engine(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_limit),        cmocka_unit_test(cancel_anywhere),
        cmocka_unit_test(two_models_in_turn), cmocka_unit_test(nothing_is_folded),
        cmocka_unit_test(file_is_cut),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("stream", tests, NULL, NULL);
}
