/* tests/test_stream.c - requests within a memory limit: whatever it is, the picture has the bytes
 * that it has without one, or one sentence says what is needed. */
#include "tests/golden.h"

#include "engine/internal.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
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
    bool from_picture, is_masked, is_previewed, is_half, is_staged, has_regions;
} shown;

static const shown ALL[] = {
    {.name = "plain", .model = "sd1"},
    {.name = "two pictures", .model = "sd1", .count = 2},
    {.name = "sdxl, half", .model = "sdxl", .is_half = true},
    {.name = "sd2", .model = "sd2"},
    {.name = "no mapped memory", .model = "sd1", .is_staged = true, .count = 2},
    {.name = "merge", .model = "sd1", .n_lora = 2, .compose = "merge", .fold = "never"},
    {.name = "switch", .model = "sd1", .n_lora = 2, .compose = "switch", .count = 2},
    {.name = "composite", .model = "sd1", .n_lora = 2, .compose = "composite"},
    {.name = "clora",
     .model = "sd1",
     .n_lora = 2,
     .compose = "clora",
     .opt = "refine=1",
     .count = 2},
    {.name = "cmlora", .model = "sd1", .n_lora = 2, .compose = "cmlora", .count = 2},
    {.name = "cache", .model = "sd1", .cache = "2", .count = 2},
    {.name = "img2img", .model = "sd1", .from_picture = true},
    {.name = "inpaint", .model = "inpaint", .from_picture = true, .is_masked = true, .count = 2},
    {.name = "previews", .model = "sd1", .is_previewed = true},
    {.name = "regions", .model = "sd1", .has_regions = true, .count = 2},
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
    const uint64_t most = f->peak, step = f->rep.unet_weight_bytes / 6;
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
    const char *only = getenv("IPT_STREAM_ONLY");
    (void)state;
    for (size_t i = 0; i < BYTES; i++) {
        rgb[i] = (uint8_t)(i * 37 % 251);
        white[i] = i / 3 % SIDE < SIDE / 2 ? 255 : 0;
    }
    for (size_t i = 0; i < IPT_COUNT(ALL); i++) {
        const shown *c = &ALL[i];
        ipt_lora lora[2];
        const char *opt = NULL;
        if (only && !strstr(c->name, only))
            continue;
        if (c->is_staged)
            setenv("IPT_STAGING", "1", 1);
        fixture *f = open_engine(c->is_half ? IPT_PRECISION_F16 : IPT_PRECISION_F32);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_limit),
    };
    return cmocka_run_group_tests_name("stream", tests, NULL, NULL);
}
