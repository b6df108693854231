/* tests/test_vk.c - the device layer: choice, memory, kernels, commands, their failures. */
#include "tests/support.h"

#include "vk/vk_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N = 1000, WG = 64 };
static const uint32_t GROUPS[3] = {(N + WG - 1) / WG, 1, 1};

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static ipt_kernel_desc selftest(const char *shader, float b)
{
    ipt_kernel_desc d = {
        .shader = shader, .n_spec = 2, .n_bind = 2, .push_bytes = 8, .spec = {WG, bits_of(b)}};
    return d;
}

struct push {
    uint32_t n;
    float a;
};

/* Sets an environment variable, or removes it (value NULL); its old value goes to old. */
static void swap_env(const char *name, const char *value, char old[256])
{
    const char *was = getenv(name);
    if (old)
        snprintf(old, 256, "%s", was ? was : "");
    if (value && *value)
        setenv(name, value, 1);
    else
        unsetenv(name);
}

/* A gpu whose buffers the host cannot map. */
static ipt_gpu *staged_gpu(ipt_ctx **ctx)
{
    char old[256];
    swap_env("IPT_STAGING", "1", old);
    ipt_gpu *gpu = test_gpu(ctx);
    swap_env("IPT_STAGING", old, NULL);
    return gpu;
}

/* --- list and choice -------------------------------------------------------------------------- */
static void list_devices(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_gpu_info *list = NULL;
    size_t n = 0;
    ipt_status s = ipt_gpu_list(ctx, &list, &n);
    if (s == IPT_ERR_NO_DEVICE) {
        print_message("skipped: %s\n", ipt_last_error(ctx));
        ipt_ctx_destroy(&ctx);
        skip();
    }
    assert_ok(ctx, s);
    assert_true(n >= 1);
    for (size_t i = 0; i < n; i++) {
        const ipt_traits *t = &list[i].traits;
        print_message("%zu: %s | %s | %s | type %d | heap %" PRIu64 " budget %" PRIu64 " | %s\n", i,
                      list[i].name, list[i].driver, list[i].api, (int)list[i].type,
                      list[i].heap_bytes, list[i].budget_bytes,
                      list[i].usable ? "usable" : list[i].why_not);
        print_message("   simd %d texel %d f16 %d coopmat %d shuffle %d subgroup %u wg %u "
                      "shared %u align %u range %" PRIu64 " texels %" PRIu64 "\n",
                      t->simd, t->texel, t->f16_storage, t->coop_m > 0, t->subgroup_shuffle,
                      t->subgroup, t->max_invocations, t->shared_bytes, t->align, t->max_range,
                      t->max_texels);
        assert_true(list[i].name[0] != 0);
        if (!list[i].usable) {
            assert_true(list[i].why_not[0] != 0);
            continue;
        }
        assert_true(t->align >= 16 && t->align <= 256);
        assert_true(t->max_range >= (UINT64_C(1) << 27));
        assert_true(t->max_invocations >= 128 && t->shared_bytes >= 16384);
        assert_true(t->max_group_count >= 65535);
        assert_false(t->texel && !t->simd);
        assert_false(t->simd && !t->subgroup_shuffle);
        if (i > 0)
            assert_true(list[i].type >= list[i - 1].type || list[i].type == IPT_GPU_CPU ||
                        list[i].type == IPT_GPU_OTHER);
    }
    ipt_free(list);
    ipt_ctx_destroy(&ctx);
}

static void choose_device(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx), *other = NULL;
    char upper[256], name[256];
    snprintf(name, sizeof name, "%s", ipt_gpu_get_info(gpu)->name);
    test_gpu_done(&gpu, &ctx);
    ctx = test_ctx();
    ipt_gpu_opts o = {.device = "0", .cache_dir = ""};
    assert_ok(ctx, ipt_gpu_create(ctx, &o, &other));
    ipt_gpu_destroy(&other);
    size_t n = 0;
    for (; name[n] && n < 5; n++) /* part of a name, other case */
        upper[n] = (char)(name[n] >= 'a' && name[n] <= 'z' ? name[n] - 32 : name[n]);
    upper[n] = 0;
    o.device = upper;
    assert_ok(ctx, ipt_gpu_create(ctx, &o, &other));
    ipt_gpu_destroy(&other);
    o.device = "no such card";
    assert_int_equal(ipt_gpu_create(ctx, &o, &other), IPT_ERR_NO_DEVICE);
    assert_non_null(strstr(ipt_last_error(ctx), "no such card"));
    assert_non_null(strstr(ipt_last_error(ctx), name));
    o.device = "99";
    assert_int_equal(ipt_gpu_create(ctx, &o, &other), IPT_ERR_NO_DEVICE);
    o.device = "99999999999999999999";
    assert_int_equal(ipt_gpu_create(ctx, &o, &other), IPT_ERR_NO_DEVICE);
    o.device = "cpu";
    ipt_status s = ipt_gpu_create(ctx, &o, &other);
    if (s == IPT_OK)
        assert_int_equal(ipt_gpu_get_info(other)->type, IPT_GPU_CPU);
    else
        assert_int_equal(s, IPT_ERR_NO_DEVICE);
    ipt_gpu_destroy(&other);
    ipt_gpu_destroy(&other); /* *gpu NULL */
    ipt_gpu_destroy(NULL);
    o.device = NULL;
    o.kernels = "tile";
    assert_ok(ctx, ipt_gpu_create(ctx, &o, &other));
    assert_false(ipt_gpu_traits(other)->simd || ipt_gpu_traits(other)->texel);
    ipt_gpu_destroy(&other);
    o.kernels = "cubes";
    assert_int_equal(ipt_gpu_create(ctx, &o, &other), IPT_ERR_ARG);
    assert_null(other);
    ipt_ctx_destroy(&ctx);
}

/* A machine without a driver. */
static void no_driver(void **state)
{
    (void)state;
    char files[256], names[256], none[512];
    swap_env("VK_DRIVER_FILES", "/dev/null", files);
    swap_env("VK_ICD_FILENAMES", test_nowhere(none, sizeof none, "icd.json"), names);
    ipt_ctx *ctx = test_ctx();
    ipt_gpu_info *list = NULL;
    ipt_gpu *gpu = NULL;
    size_t n = 7;
    ipt_gpu_opts o = {.cache_dir = ""};
    ipt_status a = ipt_gpu_list(ctx, &list, &n);
    ipt_status b = ipt_gpu_create(ctx, &o, &gpu);
    swap_env("VK_DRIVER_FILES", files, NULL);
    swap_env("VK_ICD_FILENAMES", names, NULL);
    assert_int_equal(a, IPT_ERR_NO_DEVICE);
    assert_int_equal(b, IPT_ERR_NO_DEVICE);
    assert_null(list);
    assert_null(gpu);
    assert_int_equal(n, 7);
    assert_non_null(strstr(ipt_last_error(ctx), "mesa-vulkan-drivers"));
    ipt_ctx_destroy(&ctx);
}

/* --- memory ----------------------------------------------------------------------------------- */
static void write_read(ipt_ctx *ctx, ipt_gpu *gpu, uint64_t bytes)
{
    static const uint64_t places[][2] = {{0, 1}, {1, 2}, {3, 61}, {255, 257}, {511, 0}};
    ipt_buffer *b = NULL;
    uint8_t *src = ipt_alloc(ctx, bytes), *dst = ipt_alloc(ctx, bytes);
    uint64_t seed = bytes;
    assert_non_null(src);
    assert_non_null(dst);
    for (uint64_t i = 0; i < bytes; i++)
        src[i] = (uint8_t)ipt_rng_next(&seed);
    assert_ok(ctx, ipt_buffer_create(gpu, bytes, &b));
    assert_int_equal(ipt_buffer_bytes(b), bytes);
    assert_ok(ctx, ipt_buffer_write(gpu, b, 0, src, bytes));
    assert_ok(ctx, ipt_buffer_read(gpu, b, 0, dst, bytes));
    assert_memory_equal(src, dst, bytes);
    for (size_t i = 0; i < IPT_COUNT(places); i++) {
        uint64_t off = places[i][0], n = places[i][1];
        if (off + n > bytes)
            continue;
        for (uint64_t k = 0; k < n; k++)
            src[off + k] = (uint8_t)ipt_rng_next(&seed);
        assert_ok(ctx, ipt_buffer_write(gpu, b, off, src + off, n));
        memset(dst, 0, n);
        assert_ok(ctx, ipt_buffer_read(gpu, b, off, dst, n));
        assert_memory_equal(src + off, dst, n);
    }
    assert_ok(ctx, ipt_buffer_read(gpu, b, 0, dst, bytes)); /* nothing beside was touched */
    assert_memory_equal(src, dst, bytes);
    assert_int_equal(ipt_buffer_write(gpu, b, bytes, src, 1), IPT_ERR_ARG);
    assert_int_equal(ipt_buffer_read(gpu, b, 1, dst, bytes), IPT_ERR_ARG);
    assert_int_equal(ipt_buffer_read(gpu, b, UINT64_MAX, dst, 2), IPT_ERR_ARG);
    ipt_buffer_destroy(gpu, &b);
    assert_null(b);
    ipt_buffer_destroy(gpu, &b);
    ipt_free(src);
    ipt_free(dst);
}

static void buffers(void **state)
{
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = *state ? staged_gpu(&ctx) : test_gpu(&ctx);
    ipt_buffer *b = NULL;
    assert_ok(ctx, ipt_buffer_create(gpu, 16, &b));
    if (*state)
        assert_null(ipt_buffer_map(b));
    else if (ipt_gpu_get_info(gpu)->type == IPT_GPU_CPU && !getenv("IPT_STAGING"))
        assert_non_null(ipt_buffer_map(b));
    ipt_buffer_destroy(gpu, &b);
    assert_int_equal(ipt_buffer_create(gpu, 0, &b), IPT_ERR_ARG);
    const uint64_t sizes[] = {1, 3, 255, 256, 257, 4099, (4u << 20) + 13, (37u << 20) + 1};
    for (size_t i = 0; i < IPT_COUNT(sizes); i++)
        write_read(ctx, gpu, sizes[i]);
    test_gpu_done(&gpu, &ctx);
}

/* Random create / destroy: no two live buffers overlap, all memory comes back. */
static void suballocation(void **state)
{
    (void)state;
    enum { LIVE = 64, ROUNDS = 3000 };
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    ipt_buffer *live[LIVE] = {NULL};
    uint64_t seed = 5;
    for (int r = 0; r < ROUNDS; r++) {
        size_t i = (size_t)(ipt_rng_next(&seed) % LIVE);
        if (live[i]) {
            ipt_buffer_destroy(gpu, &live[i]);
            continue;
        }
        uint64_t bytes = 1 + ipt_rng_next(&seed) % (r % 50 == 0 ? 40u << 20 : 1u << 20);
        assert_ok(ctx, ipt_buffer_create(gpu, bytes, &live[i]));
        assert_int_equal(live[i]->off % 256, 0);
        assert_true(live[i]->off + bytes <= live[i]->slab->size);
        for (size_t j = 0; j < LIVE; j++)
            if (j != i && live[j] && live[j]->slab == live[i]->slab)
                assert_true(live[j]->off + live[j]->bytes <= live[i]->off ||
                            live[i]->off + bytes <= live[j]->off);
    }
    assert_true(ipt_gpu_used_bytes(gpu) > 0);
    for (size_t i = 0; i < LIVE; i++)
        ipt_buffer_destroy(gpu, &live[i]);
    size_t n_slab = 0;
    for (ipt_slab *s = gpu->slabs; s; s = s->next, n_slab++) {
        assert_int_equal(s->n_used, 0);
        assert_null(s->first->next); /* all free blocks were joined */
    }
    assert_true(n_slab <= 1);
    assert_true(ipt_gpu_used_bytes(gpu) <= 65u << 20);
    assert_true(ipt_gpu_peak_bytes(gpu) >= ipt_gpu_used_bytes(gpu));
    test_gpu_done(&gpu, &ctx);
}

static void memory_limit(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu_limited(&ctx, 20u << 20); /* smaller than a slab */
    ipt_buffer *a = NULL, *b = NULL;
    assert_ok(ctx, ipt_buffer_create(gpu, 12u << 20, &a));
    assert_int_equal(ipt_buffer_create(gpu, 12u << 20, &b), IPT_ERR_DEVICE_MEM);
    assert_null(b);
    assert_non_null(strstr(ipt_last_error(ctx), "need 12.0 MiB"));
    assert_non_null(strstr(ipt_last_error(ctx), "20.0 MiB"));
    assert_non_null(strstr(ipt_last_error(ctx), "--vram-limit"));
    assert_int_equal(ipt_buffer_create(gpu, UINT64_MAX, &b), IPT_ERR_DEVICE_MEM);
    assert_int_equal(ipt_buffer_create(gpu, UINT64_MAX / 2, &b), IPT_ERR_DEVICE_MEM);
    ipt_buffer_destroy(gpu, &a);
    assert_ok(ctx, ipt_buffer_create(gpu, 12u << 20, &b));
    assert_true(ipt_gpu_peak_bytes(gpu) <= 20u << 20);
    ipt_buffer_destroy(gpu, &b);
    test_gpu_done(&gpu, &ctx);
}

static void out_of_memory(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    ipt_buffer *a = NULL, *b = NULL, *c = NULL;
    ipt_gpu_alloc_fail_after(gpu, 1);
    assert_int_equal(ipt_buffer_create(gpu, 1000, &a), IPT_ERR_DEVICE_MEM);
    assert_null(a);
    assert_int_equal(ipt_gpu_used_bytes(gpu), 0);
    ipt_gpu_alloc_fail_after(gpu, 2);
    assert_ok(ctx, ipt_buffer_create(gpu, 1000, &a));
    assert_ok(ctx, ipt_buffer_create(gpu, 1000, &b)); /* same slab */
    assert_int_equal(ipt_buffer_create(gpu, 100u << 20, &c), IPT_ERR_DEVICE_MEM);
    assert_non_null(strstr(ipt_last_error(ctx), "need 100.0 MiB"));
    assert_non_null(strstr(ipt_last_error(ctx), "--precision f16"));
    ipt_gpu_alloc_fail_after(gpu, 0);
    assert_ok(ctx, ipt_buffer_create(gpu, 100u << 20, &c));
    ipt_buffer_destroy(gpu, &a);
    ipt_buffer_destroy(gpu, &b);
    ipt_buffer_destroy(gpu, &c);
    test_gpu_done(&gpu, &ctx);
    /* the staging ring */
    gpu = staged_gpu(&ctx);
    assert_ok(ctx, ipt_buffer_create(gpu, 1000, &a));
    ipt_gpu_alloc_fail_after(gpu, 1);
    assert_int_equal(ipt_buffer_write(gpu, a, 0, "abc", 3), IPT_ERR_DEVICE_MEM);
    ipt_gpu_alloc_fail_after(gpu, 0);
    assert_ok(ctx, ipt_buffer_write(gpu, a, 0, "abc", 3));
    ipt_buffer_destroy(gpu, &a);
    test_gpu_done(&gpu, &ctx);
}

/* --- kernels and commands --------------------------------------------------------------------- */
typedef struct rig {
    ipt_ctx *ctx;
    ipt_gpu *gpu;
    ipt_buffer *x, *y;
    ipt_cmd *cmd;
} rig;

static rig rig_make_staged(bool staged)
{
    rig r = {.ctx = NULL};
    r.gpu = staged ? staged_gpu(&r.ctx) : test_gpu(&r.ctx);
    assert_ok(r.ctx, ipt_buffer_create(r.gpu, N * 4, &r.x));
    assert_ok(r.ctx, ipt_buffer_create(r.gpu, N * 4, &r.y));
    assert_ok(r.ctx, ipt_cmd_create(r.gpu, &r.cmd));
    return r;
}

static rig rig_make(void) { return rig_make_staged(false); }

static void rig_done(rig *r)
{
    ipt_cmd_destroy(r->gpu, &r->cmd);
    ipt_buffer_destroy(r->gpu, &r->x);
    ipt_buffer_destroy(r->gpu, &r->y);
    test_gpu_done(&r->gpu, &r->ctx);
}

static void run(rig *r)
{
    uint64_t value = 0;
    assert_ok(r->ctx, ipt_cmd_submit(r->cmd, &value));
    assert_ok(r->ctx, ipt_gpu_wait(r->gpu, value));
}

/* y = 3 x + 0.5 recorded once, run with different x. */
static void replay(rig *r, const char *shader, ipt_bind_kind kind)
{
    float x[N], y[N];
    uint64_t seed = 1;
    ipt_kernel *k = NULL, *same = NULL;
    ipt_kernel_desc d = selftest(shader, 0.5f);
    d.kind[0] = kind;
    assert_ok(r->ctx, ipt_kernel_get(r->gpu, &d, &k));
    d.spec[7] = 99; /* beyond n_spec: another description of the same kernel */
    assert_ok(r->ctx, ipt_kernel_get(r->gpu, &d, &same));
    assert_ptr_equal(k, same);
    d.subgroup = ipt_gpu_traits(r->gpu)->subgroup; /* another pipeline, asked for by size */
    assert_ok(r->ctx, ipt_kernel_get(r->gpu, &d, &k));
    assert_ptr_not_equal(k, same);
    struct push push = {N, 3.0f};
    ipt_binding b[] = {{r->x, 0, N * 4}, {r->y, 0, N * 4}};
    assert_ok(r->ctx, ipt_cmd_stamp(r->cmd, 0));
    assert_ok(r->ctx, ipt_cmd_dispatch(r->cmd, k, b, &push, GROUPS));
    assert_ok(r->ctx, ipt_cmd_stamp(r->cmd, 1));
    assert_ok(r->ctx, ipt_cmd_end(r->cmd));
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < N; i++)
            x[i] = ipt_rng_normal(&seed);
        assert_ok(r->ctx, ipt_buffer_write(r->gpu, r->x, 0, x, sizeof x));
        run(r);
        assert_ok(r->ctx, ipt_buffer_read(r->gpu, r->y, 0, y, sizeof y));
        for (int i = 0; i < N; i++)
            assert_float_equal(y[i], 3.0f * x[i] + 0.5f, 1e-5f);
    }
    double ms[2];
    ipt_status s = ipt_cmd_stamps(r->cmd, ms, 2);
    if (s != IPT_ERR_UNSUPPORTED) {
        assert_ok(r->ctx, s);
        assert_true(ms[0] == 0.0 && ms[1] >= 0.0 && ms[1] < 60000.0);
        assert_int_equal(ipt_cmd_stamps(r->cmd, (double[3]){0}, 3), IPT_ERR_ARG);
    }
}

static void dispatch_ssbo(void **state)
{
    rig r = rig_make_staged(*state != NULL);
    replay(&r, "selftest", IPT_BIND_SSBO);
    rig_done(&r);
}

static void dispatch_texel(void **state)
{
    (void)state;
    rig r = rig_make();
    replay(&r, "selftest.texel", IPT_BIND_TEXEL_RGBA32F);
    rig_done(&r);
}

static void dispatch_f16(void **state)
{
    (void)state;
    rig r = rig_make();
    uint16_t x[N], y[N];
    ipt_kernel *k = NULL;
    if (!ipt_gpu_traits(r.gpu)->f16_storage) {
        rig_done(&r);
        print_message("skipped: no 16-bit storage\n");
        skip();
    }
    ipt_kernel_desc d = selftest("selftest.f16", 1.0f);
    assert_ok(r.ctx, ipt_kernel_get(r.gpu, &d, &k));
    struct push push = {N, 2.0f};
    ipt_binding b[] = {{r.x, 256, N * 2 - 256}, {r.y, 0, N * 2}};
    push.n = N - 128;
    assert_ok(r.ctx, ipt_cmd_dispatch(r.cmd, k, b, &push, GROUPS));
    assert_ok(r.ctx, ipt_cmd_end(r.cmd));
    for (int i = 0; i < N; i++)
        x[i] = ipt_f32_to_f16((float)i * 0.25f);
    assert_ok(r.ctx, ipt_buffer_write(r.gpu, r.x, 0, x, sizeof x));
    run(&r);
    assert_ok(r.ctx, ipt_buffer_read(r.gpu, r.y, 0, y, sizeof y));
    for (int i = 0; i < N - 128; i++)
        assert_true(ipt_f16_to_f32(y[i]) == (float)(i + 128) * 0.5f + 1.0f);
    rig_done(&r);
}

/* Hundreds of dependent dispatches, many submits in flight, copies, then destruction of all of it
 * while the device may still work. */
static void chain(void **state)
{
    (void)state;
    enum { STEPS = 301, SUBMITS = 5 };
    rig r = rig_make();
    float x[N] = {0}, y[N];
    ipt_kernel *k = NULL, *other = NULL;
    ipt_buffer *copy = NULL;
    ipt_kernel_desc d = selftest("selftest", 1.0f);
    assert_ok(r.ctx, ipt_kernel_get(r.gpu, &d, &k));
    d.spec[1] = bits_of(2.0f);
    assert_ok(r.ctx, ipt_kernel_get(r.gpu, &d, &other));
    assert_ptr_not_equal(k, other);
    assert_ok(r.ctx, ipt_buffer_create(r.gpu, N * 4, &copy));
    struct push push = {N, 1.0f};
    ipt_binding b[2][2] = {{{r.x, 0, N * 4}, {r.y, 0, N * 4}}, {{r.y, 0, N * 4}, {r.x, 0, N * 4}}};
    for (int i = 0; i < STEPS; i++) {
        assert_ok(r.ctx, ipt_cmd_dispatch(r.cmd, i % 2 ? other : k, b[i % 2], &push, GROUPS));
        assert_ok(r.ctx, ipt_cmd_stamp(r.cmd, (uint32_t)i * 7)); /* more than one query pool */
        ipt_cmd_barrier(r.cmd);
    }
    /* the result lies in y; x takes part in the next submit */
    ipt_cmd_copy(r.cmd, &(ipt_binding){r.y, 0, N * 4}, &(ipt_binding){copy, 0, N * 4});
    ipt_cmd_copy(r.cmd, &(ipt_binding){r.y, 0, N * 4}, &(ipt_binding){r.x, 0, N * 4});
    assert_ok(r.ctx, ipt_cmd_end(r.cmd));
    assert_ok(r.ctx, ipt_buffer_write(r.gpu, r.x, 0, x, sizeof x));
    for (int i = 0; i < SUBMITS; i++) {
        uint64_t value = 0;
        assert_ok(r.ctx, ipt_cmd_submit(r.cmd, &value));
        assert_int_equal(value, r.gpu->submitted);
    }
    assert_ok(r.ctx, ipt_buffer_read(r.gpu, copy, 0, y, sizeof y));
    const float one = (float)(STEPS / 2) * 3.0f + 1.0f;
    for (int i = 0; i < N; i++)
        assert_true(y[i] == one * SUBMITS);
    assert_ok(r.ctx, ipt_cmd_submit(r.cmd, NULL));
    ipt_buffer_destroy(r.gpu, &copy); /* deferred until the submit is through */
    ipt_cmd_destroy(r.gpu, &r.cmd);
    assert_true(r.gpu->completed == r.gpu->submitted);
    rig_done(&r);
}

static void deferred_destroy(void **state)
{
    (void)state;
    rig r = rig_make();
    ipt_kernel *k = NULL;
    ipt_kernel_desc d = selftest("selftest", 0.0f);
    assert_ok(r.ctx, ipt_kernel_get(r.gpu, &d, &k));
    struct push push = {N, 1.0f};
    ipt_binding b[] = {{r.x, 0, N * 4}, {r.y, 0, N * 4}};
    assert_ok(r.ctx, ipt_cmd_dispatch(r.cmd, k, b, &push, GROUPS));
    assert_ok(r.ctx, ipt_cmd_end(r.cmd));
    uint64_t value = 0;
    assert_ok(r.ctx, ipt_cmd_submit(r.cmd, &value));
    r.gpu->submitted++; /* as if another submit were still under way */
    ipt_buffer *y = r.y, *fresh = NULL;
    uint64_t off = y->off;
    ipt_slab *slab = y->slab;
    ipt_buffer_destroy(r.gpu, &r.y);
    assert_true(y->used && r.gpu->dead == y);
    assert_ok(r.ctx, ipt_buffer_create(r.gpu, N * 4, &fresh));
    assert_false(fresh->slab == slab && fresh->off == off);
    r.gpu->submitted--;
    y->dead_at = value;
    assert_ok(r.ctx, ipt_gpu_wait(r.gpu, value));
    ipt_buffer_destroy(r.gpu, &fresh);
    assert_null(r.gpu->dead);
    rig_done(&r);
}

static void bad_arguments(void **state)
{
    (void)state;
    rig r = rig_make();
    ipt_kernel *k = NULL, *none = NULL;
    struct push push = {N, 1.0f};
    ipt_kernel_desc d = selftest("selftest", 0.0f);
    assert_ok(r.ctx, ipt_kernel_get(r.gpu, &d, &k));
    d.shader = "no-such-shader";
    assert_int_equal(ipt_kernel_get(r.gpu, &d, &none), IPT_ERR_MISSING);
    assert_non_null(strstr(ipt_last_error(r.ctx), "no-such-shader"));
    d = selftest("selftest", 0.0f);
    d.n_bind = IPT_MAX_BIND + 1;
    assert_int_equal(ipt_kernel_get(r.gpu, &d, &none), IPT_ERR_ARG);
    d = selftest("selftest", 0.0f);
    d.push_bytes = 132;
    assert_int_equal(ipt_kernel_get(r.gpu, &d, &none), IPT_ERR_ARG);
    d = selftest("selftest", 0.0f);
    d.subgroup = 1024;
    assert_int_equal(ipt_kernel_get(r.gpu, &d, &none), IPT_ERR_UNSUPPORTED);
    const ipt_binding bad[][2] = {
        {{r.x, 0, N * 4 + 1}, {r.y, 0, N * 4}}, {{r.x, N * 4, 4}, {r.y, 0, N * 4}},
        {{r.x, 4, 16}, {r.y, 0, N * 4}},        {{r.x, 0, 0}, {r.y, 0, N * 4}},
        {{NULL, 0, N * 4}, {r.y, 0, N * 4}},    {{r.x, 0, N * 4}, {r.y, UINT64_MAX - 255, 4}},
    };
    for (size_t i = 0; i < IPT_COUNT(bad); i++)
        assert_int_equal(ipt_cmd_dispatch(r.cmd, k, bad[i], &push, GROUPS), IPT_ERR_ARG);
    const ipt_binding good[] = {{r.x, 0, N * 4}, {r.y, 0, N * 4}};
    assert_int_equal(ipt_cmd_dispatch(r.cmd, k, good, NULL, GROUPS), IPT_ERR_ARG);
    const uint32_t zero[3] = {0, 1, 1}, large[3] = {1, UINT32_MAX, 1};
    assert_int_equal(ipt_cmd_dispatch(r.cmd, k, good, &push, zero), IPT_ERR_ARG);
    assert_int_equal(ipt_cmd_dispatch(r.cmd, k, good, &push, large), IPT_ERR_ARG);
    d = selftest("selftest.texel", 0.0f);
    d.kind[0] = IPT_BIND_TEXEL_RGBA32F;
    assert_ok(r.ctx, ipt_kernel_get(r.gpu, &d, &k));
    const ipt_binding ragged[] = {{r.x, 0, 20}, {r.y, 0, N * 4}};
    assert_int_equal(ipt_cmd_dispatch(r.cmd, k, ragged, &push, GROUPS), IPT_ERR_ARG);
    assert_int_equal(ipt_cmd_submit(r.cmd, NULL), IPT_ERR_ARG);
    assert_int_equal(ipt_gpu_wait(r.gpu, 5), IPT_ERR_ARG);
    ipt_cmd_copy(r.cmd, &(ipt_binding){r.x, 0, 8}, &(ipt_binding){r.y, 0, 4});
    ipt_cmd_barrier(r.cmd);
    assert_int_equal(ipt_cmd_end(r.cmd), IPT_ERR_ARG);
    rig_done(&r);
}

/* Lost once, lost for good; nothing crashes on the way out. */
static void device_lost(void **state)
{
    (void)state;
    rig r = rig_make();
    uint64_t value = 0;
    ipt_buffer *b = NULL;
    ipt_cmd *c = NULL;
    ipt_kernel *k = NULL;
    ipt_kernel_desc d = selftest("selftest", 0.0f);
    assert_ok(r.ctx, ipt_cmd_end(r.cmd));
    run(&r);
    assert_int_equal(ipt_vk_check(r.gpu, VK_ERROR_DEVICE_LOST, "test"), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_cmd_submit(r.cmd, &value), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_gpu_wait(r.gpu, 0), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_buffer_create(r.gpu, 4, &b), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_buffer_write(r.gpu, r.x, 0, "a", 1), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_buffer_read(r.gpu, r.x, 0, &value, 1), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_cmd_create(r.gpu, &c), IPT_ERR_DEVICE_LOST);
    assert_int_equal(ipt_kernel_get(r.gpu, &d, &k), IPT_ERR_DEVICE_LOST);
    rig_done(&r);
}

/* Host memory running out at every allocation in turn: a status, no leak, no crash. */
static void host_memory(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    bool done = false;
    for (uint64_t n = 1; !done && n < 200; n++) {
        ipt_buffer *b = NULL;
        ipt_cmd *c = NULL;
        ipt_kernel *k = NULL;
        ipt_kernel_desc d = selftest("selftest.texel", (float)n);
        d.kind[0] = IPT_BIND_TEXEL_RGBA32F;
        struct push push = {N, 1.0f};
        ipt_alloc_fail_after(ctx, n);
        ipt_status s = ipt_buffer_create(gpu, 2 * 4096, &b);
        if (s == IPT_OK)
            s = ipt_cmd_create(gpu, &c);
        if (s == IPT_OK)
            s = ipt_kernel_get(gpu, &d, &k);
        ipt_binding bind[] = {{b, 0, 4000}, {b, 4096, 4000}};
        if (s == IPT_OK)
            s = ipt_cmd_dispatch(c, k, bind, &push, GROUPS);
        if (s == IPT_OK)
            s = ipt_cmd_stamp(c, 0);
        ipt_alloc_fail_after(ctx, 0);
        assert_true(s == IPT_OK || s == IPT_ERR_NOMEM);
        done = s == IPT_OK;
        ipt_cmd_destroy(gpu, &c);
        ipt_buffer_destroy(gpu, &b);
    }
    assert_true(done);
    test_gpu_done(&gpu, &ctx);
    ctx = test_ctx();
    for (uint64_t n = 1; n < 20; n++) { /* creation */
        ipt_gpu_opts o = {.cache_dir = ""};
        ipt_alloc_fail_after(ctx, n);
        ipt_status s = ipt_gpu_create(ctx, &o, &gpu);
        ipt_alloc_fail_after(ctx, 0);
        if (s == IPT_OK)
            break;
        assert_null(gpu);
    }
    ipt_gpu_destroy(&gpu);
    ipt_ctx_destroy(&ctx);
}

/* --- pipeline cache file ---------------------------------------------------------------------- */
static void use_cache(ipt_ctx *ctx, const char *dir, bool expect_loaded)
{
    static const uint8_t zero[32] = {0};
    ipt_gpu *gpu = NULL;
    ipt_kernel *k = NULL;
    ipt_kernel_desc d = selftest("selftest", 0.0f);
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .cache_dir = dir};
    assert_ok(ctx, ipt_gpu_create(ctx, &o, &gpu));
    assert_int_equal(memcmp(gpu->cache_digest, zero, 32) != 0, expect_loaded);
    assert_ok(ctx, ipt_kernel_get(gpu, &d, &k));
    ipt_gpu_destroy(&gpu);
}

static void cache_file(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_gpu *gpu = test_gpu(&ctx);
    char top[64] = "/tmp/impasto-test-XXXXXX", dir[128], path[512], *data = NULL;
    size_t n = 0;
    test_gpu_done(&gpu, &ctx);
    ctx = test_ctx();
    assert_non_null(mkdtemp(top));
    snprintf(dir, sizeof dir, "%s/a/b", top); /* folders are made */
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .cache_dir = dir};
    assert_ok(ctx, ipt_gpu_create(ctx, &o, &gpu));
    snprintf(path, sizeof path, "%s", gpu->cache_path);
    ipt_gpu_destroy(&gpu);
    assert_false(ipt_is_file(path)); /* no kernel, no file */
    use_cache(ctx, dir, false);
    assert_ok(ctx, ipt_file_read(ctx, path, 1u << 28, &data, &n));
    use_cache(ctx, dir, true);
    for (size_t at = 0; at < n; at += 1 + n / 40) { /* damage anywhere */
        data[at] ^= 0x55;
        assert_ok(ctx, ipt_file_write(ctx, path, data, n));
        use_cache(ctx, dir, false);
        data[at] ^= 0x55;
    }
    for (size_t cut = 0; cut < n; cut += 1 + n / 20) {
        assert_ok(ctx, ipt_file_write(ctx, path, data, cut));
        use_cache(ctx, dir, false);
    }
    use_cache(ctx, dir, true); /* mended by the last run */
    use_cache(ctx, "/proc/impasto-cannot-be-made", false);
    ipt_free(data);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(dir), 0);
    snprintf(dir, sizeof dir, "%s/a", top);
    assert_int_equal(rmdir(dir), 0);
    assert_int_equal(rmdir(top), 0);
    ipt_ctx_destroy(&ctx);
}

/* --- the validation layer is alive ------------------------------------------------------------ */
static void quiet(void *user, ipt_log_level level, const char *line)
{
    if (level <= IPT_LOG_WARN && strstr(line, "SYNC-HAZARD"))
        ++*(int *)user;
}

static void missing_barrier(void **state)
{
    (void)state;
    ipt_ctx *ctx = NULL;
    int hazards = 0;
    rig r = {.ctx = NULL};
    assert_int_equal(ipt_ctx_create(quiet, &hazards, &ctx), IPT_OK);
    ipt_gpu_opts o = {.device = getenv("IPT_TEST_DEVICE"), .cache_dir = "", .validate = true};
    ipt_status s = ipt_gpu_create(ctx, &o, &r.gpu);
    if (s == IPT_ERR_NO_DEVICE || (s == IPT_ERR_MISSING && !test_wants_validation())) {
        print_message("skipped: %s\n", ipt_last_error(ctx));
        ipt_ctx_destroy(&ctx);
        skip();
    }
    assert_ok(ctx, s);
    ipt_kernel *k = NULL;
    ipt_kernel_desc d = selftest("selftest", 0.0f);
    struct push push = {N, 1.0f};
    assert_ok(ctx, ipt_kernel_get(r.gpu, &d, &k));
    assert_ok(ctx, ipt_buffer_create(r.gpu, N * 4, &r.x));
    assert_ok(ctx, ipt_buffer_create(r.gpu, N * 4, &r.y));
    /* With barriers, without after a dispatch, without after a copy.  Not every layer follows what
     * shaders write (newer ones only on demand), but all follow copies. */
    for (int round = 0; round < 3; round++) {
        const ipt_binding b[] = {{r.x, 0, N * 4}, {r.y, 0, N * 4}};
        assert_ok(ctx, ipt_cmd_create(r.gpu, &r.cmd));
        if (round < 2)
            assert_ok(ctx, ipt_cmd_dispatch(r.cmd, k, b, &push, GROUPS));
        else
            ipt_cmd_copy(r.cmd, &b[0], &b[1]);
        if (round == 0)
            ipt_cmd_barrier(r.cmd);
        ipt_cmd_copy(r.cmd, &b[1], &b[0]);
        assert_ok(ctx, ipt_cmd_end(r.cmd)); /* older layers speak here, newer ones at the submit */
        assert_ok(ctx, ipt_cmd_submit(r.cmd, NULL));
        ipt_cmd_destroy(r.gpu, &r.cmd);
        if (round == 0)
            assert_int_equal(ipt_gpu_validation_count(r.gpu), 0);
        if (round == 1)
            print_message("missing barrier after a dispatch: %s\n",
                          hazards ? "reported" : "not followed by this layer");
    }
    assert_true(hazards >= 1);
    assert_true(ipt_gpu_validation_count(r.gpu) >= 1);
    ipt_buffer_destroy(r.gpu, &r.x);
    ipt_buffer_destroy(r.gpu, &r.y);
    ipt_gpu_destroy(&r.gpu);
    ipt_ctx_destroy(&ctx);
}

int main(void)
{
    static char staged[] = "staged";
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(list_devices),
        cmocka_unit_test(choose_device),
        cmocka_unit_test(no_driver),
        cmocka_unit_test(buffers),
        {"buffers, staged", buffers, NULL, NULL, staged},
        cmocka_unit_test(suballocation),
        cmocka_unit_test(memory_limit),
        cmocka_unit_test(out_of_memory),
        cmocka_unit_test(dispatch_ssbo),
        {"dispatch_ssbo, staged", dispatch_ssbo, NULL, NULL, staged},
        cmocka_unit_test(dispatch_texel),
        cmocka_unit_test(dispatch_f16),
        cmocka_unit_test(chain),
        cmocka_unit_test(deferred_destroy),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(device_lost),
        cmocka_unit_test(host_memory),
        cmocka_unit_test(cache_file),
        cmocka_unit_test(missing_barrier),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
