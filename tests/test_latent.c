/* tests/test_latent.c - which decoder a request gets and what it may be: a tiny one (--taesd,
 * --vae) beside models whose own VAE enlarges by another factor. */
#include "tests/golden.h"

#include "engine/impasto.h"
#include "engine/modules.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    char taesd[96], vae[96], model[512], small[512];
    ipt_image got; /* the last picture */
} fixture;

/* Every weight of the component with small values that are no multiple of each other. */
static void write_vae(fixture *f, const ipt_vae_config *vae, const char *path)
{
    ipt_model_config c = {.has[IPT_COMP_VAE] = true, .vae = *vae};
    ipt_want_list l = {0};
    assert_ok(f->ctx, ipt_wants_create(f->ctx, &c, IPT_COMP_VAE, &l));
    ipt_st_write *t = ipt_calloc(f->ctx, l.n, sizeof *t);
    float **data = ipt_calloc(f->ctx, l.n, sizeof *data);
    assert_true(t && data);
    uint32_t seed = 1;
    for (size_t i = 0; i < l.n; i++) {
        const ipt_shape *s = &l.want[i].shape;
        size_t n = ipt_shape_count(s);
        float scale = s->rank > 1 ? 2.0F * (float)s->dim[0] / (float)n : 0.1F;
        t[i] = (ipt_st_write){.name = l.want[i].name, .dtype = IPT_ST_F32, .rank = s->rank};
        for (int k = 0; k < s->rank; k++)
            t[i].dim[k] = s->dim[k];
        if (s->rank == 4) { /* the file's order: O, I, KH, KW */
            t[i].dim[1] = s->dim[3];
            t[i].dim[2] = s->dim[1];
            t[i].dim[3] = s->dim[2];
        }
        t[i].data = data[i] = ipt_calloc(f->ctx, n, sizeof(float));
        assert_non_null(data[i]);
        for (size_t k = 0; k < n; k++) {
            seed = seed * 1664525U + 1013904223U;
            data[i][k] = scale * ((float)(seed >> 8) / (float)(1 << 24) - 0.45F);
        }
    }
    assert_ok(f->ctx, ipt_safetensors_write(f->ctx, path, t, l.n, NULL, 0));
    for (size_t i = 0; i < l.n; i++)
        ipt_free(data[i]);
    ipt_free(data);
    ipt_free(t);
    ipt_wants_finish(&l);
}

static void open_engine(fixture *f)
{
    *f = (fixture){0};
    assert_int_equal(ipt_ctx_create(NULL, NULL, &f->ctx), IPT_OK);
    f->engine = test_engine(&f->ctx, IPT_PRECISION_F32, 0);
    ipt_name(f->taesd, sizeof f->taesd, "/tmp/impasto-taesd-%ld.safetensors", (long)getpid());
    ipt_name(f->vae, sizeof f->vae, "/tmp/impasto-vae-%ld.safetensors", (long)getpid());
    ipt_name(f->model, sizeof f->model, "%s/models/default", IPT_SOURCE_DIR);
    ipt_name(f->small, sizeof f->small, "%s/models/sd1", IPT_TEST_DATA);
    ipt_vae_config tiny = {.tiny = true};
    ipt_vae_config x8 = {.in_channels = 3,
                         .out_channels = 3,
                         .latent_channels = 4,
                         .n_level = 4,
                         .channels = {32, 32, 32, 32},
                         .n_layer = 1,
                         .norm_groups = 32,
                         .mid_attn = true};
    write_vae(f, &tiny, f->taesd);
    write_vae(f, &x8, f->vae);
}

static void close_engine(fixture *f)
{
    unlink(f->taesd);
    unlink(f->vae);
    ipt_image_finish(&f->got);
    test_engine_done(&f->engine, &f->ctx);
}

static ipt_status keep_picture(void *user, int32_t index, const ipt_image *im, const char *text,
                               const char *json)
{
    fixture *f = user;
    (void)index, (void)text, (void)json;
    ipt_image_finish(&f->got);
    f->got = (ipt_image){im->w, im->h, ipt_alloc(f->ctx, (size_t)im->w * (size_t)im->h * 3)};
    if (!f->got.rgb)
        return IPT_ERR_NOMEM;
    memcpy(f->got.rgb, im->rgb, (size_t)im->w * (size_t)im->h * 3);
    return IPT_OK;
}

static ipt_status draw(fixture *f, const char *model, const char *vae, const char *taesd,
                       int32_t side)
{
    ipt_request r;
    ipt_request_init(&r);
    r.model = model;
    r.prompt = "a red circle";
    r.steps = 1;
    r.cfg = 1;
    r.width = r.height = side;
    r.vae = vae;
    r.taesd = taesd;
    return ipt_generate(f->engine, &r, keep_picture, f, NULL);
}

/* The default model's VAE enlarges by 4, the fixture's by 2: a decoder that writes 8 x 8 pixels for
 * each of the latent's has no place for them. */
static void another_factor_is_refused(void **state)
{
    fixture all, *f = &all;
    (void)state;
    open_engine(f);
    const struct {
        const char *model, *says;
    } rows[] = {{f->model, "by 8, the model's VAE by 4"}, {f->small, "by 8, the model's VAE by 2"}};
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        assert_int_equal(draw(f, rows[i].model, NULL, f->taesd, 32), IPT_ERR_SHAPE);
        if (!strstr(ipt_last_error(f->ctx), rows[i].says) ||
            !strstr(ipt_last_error(f->ctx), f->taesd))
            fail_msg("'%s' does not name the file and '%s'", ipt_last_error(f->ctx), rows[i].says);
        assert_ok(f->ctx, draw(f, rows[i].model, NULL, NULL, 32)); /* the engine is usable */
        assert_int_equal(f->got.w, 32);
    }
    close_engine(f);
}

/* Beside a VAE of the same factor it decodes, and so it does as the model's own VAE. */
static void same_factor_decodes(void **state)
{
    fixture all, *f = &all;
    (void)state;
    open_engine(f);
    assert_ok(f->ctx, draw(f, f->small, f->vae, NULL, 128));
    ipt_image whole = f->got;
    f->got = (ipt_image){0};
    assert_ok(f->ctx, draw(f, f->small, f->vae, f->taesd, 128));
    ipt_image quick = f->got;
    f->got = (ipt_image){0};
    assert_ok(f->ctx, draw(f, f->small, f->taesd, NULL, 128));
    assert_int_equal(f->got.w, 128);
    assert_int_equal(quick.w, 128);
    assert_memory_equal(quick.rgb, f->got.rgb, 128 * 128 * 3);
    assert_memory_not_equal(quick.rgb, whole.rgb, 128 * 128 * 3);
    ipt_image_finish(&whole);
    ipt_image_finish(&quick);
    close_engine(f);
}

/* The tiny decoder stays open from request to request; the model beside it may change. */
static void checked_again_with_another_model(void **state)
{
    fixture all, *f = &all;
    (void)state;
    open_engine(f);
    assert_ok(f->ctx, draw(f, f->small, f->vae, f->taesd, 128));
    assert_int_equal(draw(f, f->small, NULL, f->taesd, 32), IPT_ERR_SHAPE);
    assert_int_equal(draw(f, f->small, NULL, f->taesd, 32), IPT_ERR_SHAPE); /* and not once only */
    assert_ok(f->ctx, draw(f, f->small, f->vae, f->taesd, 128));
    close_engine(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(another_factor_is_refused),
                                       cmocka_unit_test(same_factor_decodes),
                                       cmocka_unit_test(checked_again_with_another_model)};
    return cmocka_run_group_tests_name("latent", tests, NULL, NULL);
}
