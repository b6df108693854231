/* tests/test_layer.c - a test that cannot have the validation layer fails; it does not run without.
 */
#include "tests/golden.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void open_and_close(void **state)
{
    ipt_ctx *ctx = NULL;
    (void)state;
    ipt_gpu *gpu = test_gpu(&ctx);
    test_gpu_done(&gpu, &ctx);
}

static void open_bench(void **state) { (void)bench_ready(state); }

static int run_gpu(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(open_and_close)};
    return cmocka_run_group_tests_name("gpu", tests, NULL, NULL);
}

static int run_bench(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(open_bench)};
    return bench_run_all(tests);
}

/* Failures of `body` in a process whose Vulkan loader finds no layer. */
static int without_layer(int (*body)(void), const char *validation)
{
    char nowhere[300];
    int status = 0;
    test_nowhere(nowhere, sizeof nowhere, "layers");
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        setenv("VK_LAYER_PATH", nowhere, 1);
        if (validation)
            setenv("IPT_TEST_VALIDATION", validation, 1);
        else
            unsetenv("IPT_TEST_VALIDATION");
        if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr))
            _exit(99);
        _exit(body() ? 1 : 0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void a_missing_layer_fails(void **state)
{
    ipt_ctx *ctx = test_ctx();
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .cache_dir = ""};
    ipt_gpu *gpu = NULL;
    ipt_status s = ipt_gpu_create(ctx, &o, &gpu);
    (void)state;
    ipt_gpu_destroy(&gpu);
    if (s == IPT_ERR_NO_DEVICE) {
        print_message("skipped: %s\n", ipt_last_error(ctx));
        ipt_ctx_destroy(&ctx);
        skip();
    }
    assert_ok(ctx, s);
    ipt_ctx_destroy(&ctx);
    assert_int_equal(without_layer(run_gpu, NULL), 1);
    assert_int_equal(without_layer(run_bench, NULL), 1);
    assert_int_equal(without_layer(run_gpu, "0"), 0);
    assert_int_equal(without_layer(run_bench, "0"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_missing_layer_fails)};
    return cmocka_run_group_tests_name("layer", tests, NULL, NULL);
}
