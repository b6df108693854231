/* tests/support.h - what every test program shares: cmocka, a context that prints, a gpu with
 * validation on. */
#ifndef IPT_TESTS_SUPPORT_H
#define IPT_TESTS_SUPPORT_H
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/core.h"
#include "engine/impasto.h"
#include "vk/vk.h"

/* Fails the test with the message of ctx when `expr` is not IPT_OK. */
#define assert_ok(ctx, expr)                                                                       \
    do {                                                                                           \
        ipt_status assert_ok_ = (expr);                                                            \
        if (assert_ok_ != IPT_OK)                                                                  \
            fail_msg("%s: %s: %s", #expr, ipt_status_name(assert_ok_), ipt_last_error(ctx));       \
    } while (0)

/* A context whose warnings and errors are printed.  Ownership: caller, ipt_ctx_destroy. */
ipt_ctx *test_ctx(void);

/* The path of `name` in a folder that does not exist on any machine: one made for the purpose and
 * removed again. */
const char *test_nowhere(char *buf, size_t n, const char *name);

/* Whether tests run under the validation layer: always, but for IPT_TEST_VALIDATION=0, which is for
 * machines that cannot have it and is printed, so that CI sees it. */
bool test_wants_validation(void);

/* A gpu with validation on and no pipeline cache file; a layer that is not installed fails the
 * test. Env IPT_TEST_DEVICE chooses the device as --device does.  Skips the test, printing the
 * reason, when there is no device.  `limit`: as ipt_gpu_opts.memory_limit. Ownership: caller,
 * test_gpu_done. */
ipt_gpu *test_gpu(ipt_ctx **ctx);
ipt_gpu *test_gpu_limited(ipt_ctx **ctx, uint64_t limit);
/* Destroys both; fails the test when the validation layer said anything. */
void test_gpu_done(ipt_gpu **gpu, ipt_ctx **ctx);
/* An engine whose device is open, with validation on; *ctx NULL: one is made, else it is the
 * caller's until then.  Env IPT_TEST_DEVICE as above.  Skips the test, printing the reason, when
 * there is no device: *ctx is gone then.  `vram_limit`: as ipt_engine_opts.  Ownership: caller,
 * test_engine_done. */
ipt_engine *test_engine(ipt_ctx **ctx, ipt_precision precision, uint64_t vram_limit);
/* Destroys both; fails the test when the validation layer said anything: what else the test has is
 * removed before. */
void test_engine_done(ipt_engine **e, ipt_ctx **ctx);
#endif
