/* tests/support.c - see support.h. */
#include "tests/support.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void print_line(void *user, ipt_log_level level, const char *line)
{
    (void)user;
    if (level <= IPT_LOG_WARN)
        print_message("%s: %s\n", level == IPT_LOG_ERROR ? "error" : "warning", line);
}

ipt_ctx *test_ctx(void)
{
    ipt_ctx *ctx = NULL;
    if (ipt_ctx_create(print_line, NULL, &ctx) != IPT_OK)
        fail_msg("no memory for a context");
    return ctx;
}

const char *test_nowhere(char *buf, size_t n, const char *name)
{
    char dir[256];
    const char *tmp = getenv("TMPDIR");
    ipt_name(dir, sizeof dir, "%s/impasto-nowhere-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir) || rmdir(dir) != 0)
        fail_msg("%s: no temporary folder can be made", dir);
    return ipt_name(buf, n, "%s/%s", dir, name);
}

bool test_wants_validation(void)
{
    const char *v = getenv("IPT_TEST_VALIDATION");
    if (!v || strcmp(v, "0") != 0)
        return true;
    print_message("IPT_TEST_VALIDATION=0: the test runs without it\n");
    return false;
}

ipt_gpu *test_gpu_limited(ipt_ctx **pctx, uint64_t limit)
{
    ipt_gpu *gpu = NULL;
    ipt_ctx *ctx = test_ctx();
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"),
                      .cache_dir = "",
                      .validate = test_wants_validation(),
                      .memory_limit = limit};
    ipt_status s = ipt_gpu_create(ctx, &o, &gpu);
    if (s == IPT_ERR_NO_DEVICE) {
        print_message("skipped: %s\n", ipt_last_error(ctx));
        ipt_ctx_destroy(&ctx);
        skip();
    }
    assert_ok(ctx, s);
    *pctx = ctx;
    return gpu;
}

ipt_gpu *test_gpu(ipt_ctx **ctx) { return test_gpu_limited(ctx, 0); }

void test_gpu_done(ipt_gpu **gpu, ipt_ctx **ctx)
{
    uint32_t n = ipt_gpu_validation_count(*gpu);
    ipt_gpu_destroy(gpu);
    ipt_ctx_destroy(ctx);
    if (n != 0)
        fail_msg("the validation layer reported %u messages", n);
}

ipt_engine *test_engine(ipt_ctx **pctx, ipt_precision precision, uint64_t vram_limit)
{
    ipt_engine *e = NULL;
    ipt_ctx *ctx = *pctx ? *pctx : test_ctx();
    const ipt_engine_opts o = {.precision = precision,
                               .validate = test_wants_validation(),
                               .device = getenv("IPT_TEST_DEVICE"),
                               .vram_limit = vram_limit};
    assert_ok(ctx, ipt_engine_create(ctx, &o, &e));
    ipt_status s = ipt_engine_open_device(e);
    if (s == IPT_ERR_NO_DEVICE) {
        print_message("skipped: %s\n", ipt_last_error(ctx));
        ipt_engine_destroy(&e);
        ipt_ctx_destroy(&ctx);
        *pctx = NULL;
        skip();
    }
    assert_ok(ctx, s);
    *pctx = ctx;
    return e;
}

void test_engine_done(ipt_engine **e, ipt_ctx **ctx)
{
    uint32_t n = ipt_gpu_validation_count(ipt_engine_gpu(*e));
    ipt_engine_destroy(e);
    ipt_ctx_destroy(ctx);
    if (n != 0)
        fail_msg("the validation layer reported %u messages", n);
}
