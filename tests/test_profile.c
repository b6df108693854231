/* tests/test_profile.c - high frequencies of latents against numpy, the note beside an adapter, and
 * what measuring one gives. */
#include "tests/golden.h"

#include "engine/frequency.h"
#include "engine/profile.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void frequencies(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_safetensors *st = golden_open(ctx, IPT_TEST_DATA, "golden_frequencies");
    for (int i = 0; i < 5; i++) {
        char name[16];
        double got = 0;
        const ipt_st_tensor *t = ipt_safetensors_find(st, ipt_name(name, sizeof name, "x%d", i));
        assert_non_null(t);
        float *x = golden_f32(ctx, st, name, NULL),
              *want = golden_f32(ctx, st, ipt_name(name, sizeof name, "high%d", i), NULL);
        assert_ok(ctx, ipt_high_frequencies(ctx, x, (int32_t)t->dim[0], (int32_t)t->dim[1],
                                            (int32_t)t->dim[2], 0.2, &got));
        golden_at_most(fabs(got - (double)want[0]), 1e-6, "latent %d: %g, expected %g", i, got,
                       (double)want[0]);
        ipt_free(x);
        ipt_free(want);
    }
    ipt_safetensors_close(&st);
    ipt_ctx_destroy(&ctx);
}

/* A flat latent has none; a checkerboard has nothing else. */
static void extremes(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    float flat[64], board[64];
    double a = 1, b = 0;
    for (int i = 0; i < 64; i++) {
        flat[i] = 3;
        board[i] = (i / 8 + i % 8) % 2 ? 1.0F : -1.0F;
    }
    assert_ok(ctx, ipt_high_frequencies(ctx, flat, 1, 8, 8, 0.2, &a));
    assert_ok(ctx, ipt_high_frequencies(ctx, board, 1, 8, 8, 0.2, &b));
    assert_true(a < 1e-12 && b > 0.19); /* one ring of five */
    memset(flat, 0, sizeof flat);
    assert_ok(ctx, ipt_high_frequencies(ctx, flat, 1, 8, 8, 0.2, &a));
    assert_ok(ctx, ipt_high_frequencies(ctx, flat, 1, 0, 8, 0.2, &b));
    assert_true(!(a > 0) && !(b > 0));
    ipt_ctx_destroy(&ctx);
}

/* --- notes ------------------------------------------------------------------------------------ */
static void write_text(ipt_ctx *ctx, const char *path, const char *text)
{
    assert_ok(ctx, ipt_file_write(ctx, path, text, strlen(text)));
}

static void notes(void **state)
{
    static const struct {
        const char *note;
        bool found;
    } rows[] = {
        {"{\"impasto_profile\":1,\"bytes\":4,\"high\":0.25}", true},
        {"{\"bytes\":5,\"high\":0.25}", false},
        {"{\"high\":0.25}", false},
        {"{\"bytes\":4}", false},
        {"{\"bytes\":4,\"high\":\"0.25\"}", false},
        {"{\"bytes\":4,\"high\":-1}", false},
        {"{\"bytes\":4,\"high\":1e300}", false},
        {"[]", false},
        {"{", false},
        {"", false},
    };
    char file[64], note[64];
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_name(file, sizeof file, "/tmp/impasto-profile-%ld.safetensors", (long)getpid());
    ipt_name(note, sizeof note, "/tmp/impasto-profile-%ld.profile.json", (long)getpid());
    write_text(ctx, file, "1234");
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        bool found = !rows[i].found;
        double high = 0;
        write_text(ctx, note, rows[i].note);
        ipt_profile_find(ctx, file, &found, &high);
        if (found != rows[i].found)
            fail_msg("%s: found %d", rows[i].note, found);
        assert_true(!found || fabs(high - 0.25) < 1e-12);
    }
    unlink(note);
    bool found = true;
    double high = 0;
    ipt_profile_find(ctx, file, &found, &high);
    assert_false(found);
    unlink(file);
    ipt_ctx_destroy(&ctx);
}

/* --- measuring -------------------------------------------------------------------------------- */
typedef struct seen {
    int n;
    double h[16];
    ipt_ctx *ctx;
} seen;

static ipt_status watch(void *user, const ipt_latent *l)
{
    seen *s = user;
    assert_true(l->step == s->n && l->n_step == 3 && s->n < 16);
    return ipt_high_frequencies(s->ctx, l->x, l->c, l->h, l->w, 0.2, &s->h[s->n++]);
}

/* What is measured of one picture is what its latents say; the note is found again. */
static void measured(void **state)
{
    char file[64], note[64], *data = NULL;
    size_t n = 0;
    (void)state;
    ipt_ctx *ctx = NULL;
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    ipt_name(file, sizeof file, "/tmp/impasto-profile-%ld.safetensors", (long)getpid());
    ipt_name(note, sizeof note, "/tmp/impasto-profile-%ld.profile.json", (long)getpid());
    assert_ok(ctx, ipt_file_read(ctx, GOLDEN("golden_lora_kohya.safetensors"), 1 << 24, &data, &n));
    assert_ok(ctx, ipt_file_write(ctx, file, data, n));
    ipt_free(data);
    ipt_lora l = {file, 1, 1, NULL, 0, 1, NULL, NULL};
    ipt_request r;
    ipt_request_init(&r);
    r.model = GOLDEN("models/sd1");
    r.prompt = "a cat";
    r.width = r.height = 32;
    r.steps = 3;
    r.sampler = "ddim";
    r.seed = 7;
    r.lora = &l;
    r.n_lora = 1;
    seen s = {.ctx = ctx};
    ipt_request watched = r;
    watched.latent = watch;
    watched.latent_user = &s;
    assert_ok(ctx, ipt_generate(e, &watched, NULL, NULL, NULL));
    assert_int_equal(s.n, 4);
    ipt_profile p = {0};
    ipt_profile_opts po = {.seeds = 1, .keep = true};
    assert_ok(ctx, ipt_profile_measure(e, &r, &po, &p));
    assert_int_equal(p.n_step, 3);
    double want = 0, high = 0;
    for (int i = 0; i <= 3; i++) {
        assert_true(fabs(p.h[i] - s.h[i]) < 1e-9);
        want += i > 0 ? fabs(s.h[i] - s.h[i - 1]) / 3 : 0;
    }
    assert_true(fabs(p.high - want) < 1e-9 && p.high > 0);
    bool found = false;
    ipt_profile_find(ctx, file, &found, &high);
    assert_true(found && fabs(high - p.high) < 1e-12);
    ipt_profile_finish(&p);
    r.n_lora = 0;
    assert_int_equal(ipt_profile_measure(e, &r, &po, &p), IPT_ERR_ARG);
    unlink(file);
    unlink(note);
    test_engine_done(&e, &ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(frequencies), cmocka_unit_test(extremes),
                                       cmocka_unit_test(notes), cmocka_unit_test(measured)};
    return cmocka_run_group_tests_name("profile", tests, NULL, NULL);
}
