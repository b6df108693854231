/* tests/test_trainee.c - adapters that are trained: what they sit on, their first values, the files
 * they become, which read back as what a plan had. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/modules.h"
#include "tests/golden.h"
#include "train/step.h"
#include "train/trainee.h"

static const struct {
    const char *name, *model;
    ipt_trainee_opts o;
} cases[] = {
    {"lora", "sd1", {.kind = IPT_TRAINEE_LORA, .rank = 3, .alpha = 1.5, .seed = 4}},
    {"locon",
     "sd1",
     {.kind = IPT_TRAINEE_LORA,
      .reach = IPT_REACH_TRANSFORMER,
      .rank = 4,
      .conv_rank = 2,
      .alpha = 4,
      .conv_alpha = 1,
      .seed = 5}},
    {"sdxl", "sdxl", {.kind = IPT_TRAINEE_LORA, .rank = 2, .alpha = 2, .seed = 6}},
    {"lokr", "sd1", {.kind = IPT_TRAINEE_LOKR, .factor = -1, .seed = 7}},
    {"krona", "sd2", {.kind = IPT_TRAINEE_KRONA, .a1 = 4, .a2 = 3, .seed = 8}},
};

typedef struct made {
    ipt_model *m;
    ipt_module_list modules;
    ipt_trainee *t;
    ipt_state *s;
} made;

static made make(bench *b, size_t k)
{
    made r = {0};
    char path[256];
    r.m = bench_model(b, ipt_name(path, sizeof path, IPT_TEST_DATA "/models/%s", cases[k].model),
                      NULL);
    assert_ok(b->ctx, ipt_modules_create(b->ctx, ipt_model_get_config(r.m), &r.modules));
    assert_ok(b->ctx, ipt_trainee_create(b->ctx, r.modules.module, r.modules.n, &cases[k].o,
                                         IPT_F32, &r.t));
    assert_ok(b->ctx, ipt_state_create(b->ctx, NULL, &r.s));
    assert_ok(b->ctx, ipt_train_groups(r.s, r.t->item, r.t->n_item, IPT_F32));
    assert_ok(b->ctx, ipt_trainee_begin(r.t, r.s));
    return r;
}

static void drop(made *r)
{
    ipt_state_destroy(&r->s);
    ipt_trainee_destroy(&r->t);
    ipt_modules_finish(&r->modules);
    ipt_model_close(&r->m);
}

static float *values_of(bench *b, const made *r, size_t i, size_t *n)
{
    *n = ipt_shape_count(&r->t->item[i].shape);
    float *v = calloc(*n, sizeof *v);
    assert_true(v);
    assert_ok(b->ctx, ipt_train_get(r->s, r->t->item[i].name, v, *n * sizeof *v));
    return v;
}

/* Nothing is changed at first; the first factors have the deviation that they should; another seed
 * gives others. */
static void test_begin(void **state)
{
    bench *b = bench_ready(state);
    for (size_t k = 0; k < IPT_COUNT(cases); k++) {
        made r = make(b, k), again = make(b, k);
        double sum = 0, expected = 0;
        for (size_t i = 0; i < r.t->n_item; i++) {
            size_t n = 0;
            float *v = values_of(b, &r, i, &n), *w = values_of(b, &again, i, &n);
            assert_memory_equal(v, w, n * sizeof *v);
            const ipt_shape *s = &r.t->item[i].shape;
            const size_t rank = (size_t)cases[k].o.rank;
            for (size_t j = 0; j < n; j++) {
                const bool padding = cases[k].o.kind == IPT_TRAINEE_LORA && i % 2 == 0 && k != 1 &&
                                     j % (size_t)s->dim[1] >= rank;
                if (i % 2 || padding)
                    assert_true(!(v[j] < 0) && !(v[j] > 0));
                else if (k != 1) {
                    sum += (double)v[j] * (double)v[j];
                    expected += cases[k].o.kind == IPT_TRAINEE_KRONA ? 1.0 / (s->dim[1] * s->dim[1])
                                                                     : 1.0 / (3.0 * s->dim[0]);
                }
            }
            free(v);
            free(w);
        }
        if (k != 1)
            golden_at_most(fabs(sum / expected - 1), 0.25, "%s: variance of few values",
                           cases[k].name);
        drop(&r);
        drop(&again);
    }
}

static void test_reach(void **state)
{
    bench *b = bench_ready(state);
    static const struct {
        size_t k;
        const char *name;
        bool is_in;
    } want[] = {
        {0, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", true},
        {0, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", true},
        {0, "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", false},
        {0, "down_blocks.0.attentions.0.proj_in", false},
        {1, "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", true},
        {1, "down_blocks.0.attentions.0.proj_in", true},
        {1, "down_blocks.0.resnets.0.conv1", true},
        {1, "down_blocks.0.resnets.0.time_emb_proj", false},
        {3, "down_blocks.0.resnets.0.conv1", false},
    };
    for (size_t i = 0; i < IPT_COUNT(want); i++) {
        made r = make(b, want[i].k);
        bool found = false;
        for (size_t k = 0; k < r.t->n_site; k++)
            found = found || strcmp(r.t->site[k].site, want[i].name) == 0;
        if (found != want[i].is_in)
            fail_msg("%s: %s", cases[want[i].k].name, want[i].name);
        drop(&r);
    }
}

/* Random values, written, read: what the file changes is what the plan's factors do. */
static void check_file(bench *b, size_t k, ipt_adapter_format format)
{
    made r = make(b, k);
    uint64_t seed = 77;
    for (size_t i = 0; i < r.t->n_item; i++) {
        size_t n = 0;
        float *v = values_of(b, &r, i, &n);
        const ipt_shape *s = &r.t->item[i].shape;
        const bool lora = cases[k].o.kind == IPT_TRAINEE_LORA;
        const int32_t rank =
            r.t->module[r.t->from[i / 2]].kh > 1 ? cases[k].o.conv_rank : cases[k].o.rank;
        for (size_t j = 0; j < n; j++) {
            const int32_t unit = (int32_t)(i % 2 ? j / (size_t)s->dim[1] : j % (size_t)s->dim[1]);
            v[j] = lora && unit >= rank ? 0 : ipt_rng_normal(&seed);
        }
        assert_ok(b->ctx, ipt_train_set(r.s, r.t->item[i].name, v, n * sizeof *v));
        free(v);
    }
    ipt_adapter_out *out = NULL;
    ipt_adapter_file *f = NULL;
    char folder[] = "/tmp/impasto-trainee-XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    ipt_name(path, sizeof path, "%s/a.safetensors", folder);
    assert_ok(b->ctx, ipt_adapter_out_create(b->ctx,
                                             &(ipt_adapter_out_opts){format, IPT_ST_F32,
                                                                     r.modules.module, r.modules.n},
                                             &out));
    assert_ok(b->ctx, ipt_trainee_write(r.t, r.s, out));
    assert_ok(b->ctx, ipt_adapter_out_write(out, path));
    assert_ok(b->ctx, ipt_adapter_open(b->ctx, path, r.modules.module, r.modules.n, &f));
    unlink(path);
    rmdir(folder);
    assert_int_equal(f->n_module, r.t->n_site);
    assert_int_equal(f->n_unmatched, 0);
    for (size_t i = 0; i < f->n_module; i++) {
        const ipt_adapter_module *a = &f->module[i];
        size_t at = 0, n[2];
        while (at < r.t->n_site && r.t->from[at] != a->module)
            at++;
        assert_true(at < r.t->n_site);
        float *v[2] = {values_of(b, &r, 2 * at, &n[0]), values_of(b, &r, 2 * at + 1, &n[1])},
              *x = calloc(n[0], sizeof *x), *y = calloc(n[1], sizeof *y);
        double scale = 1;
        assert_true(x && y);
        if (a->act == IPT_ACTS_LOW_RANK) {
            scale = a->kh > 1 ? cases[k].o.conv_alpha / cases[k].o.conv_rank
                              : cases[k].o.alpha / cases[k].o.rank;
            assert_ok(b->ctx, ipt_adapter_pack(b->ctx, a, NULL, x, y, r.t->site[at].n_rank, 0));
        } else {
            assert_int_equal(a->act, IPT_ACTS_KRON);
            assert_memory_equal(&a->kron, r.t->site[at].kron, sizeof a->kron);
            assert_ok(b->ctx, ipt_adapter_kron_factors(b->ctx, a, x, y));
        }
        for (size_t j = 0; j < n[1]; j++)
            v[1][j] *= (float)scale;
        golden_at_most(golden_nmse(v[0], x, n[0]), 1e-14, "%s: first factor", cases[k].name);
        golden_at_most(golden_nmse(v[1], y, n[1]), 1e-13, "%s: second factor", cases[k].name);
        free(v[0]);
        free(v[1]);
        free(x);
        free(y);
    }
    ipt_adapter_close(&f);
    ipt_adapter_out_destroy(&out);
    drop(&r);
}

static void test_files(void **state)
{
    bench *b = bench_ready(state);
    for (size_t k = 0; k < IPT_COUNT(cases); k++) {
        check_file(b, k, IPT_FORMAT_KOHYA);
        if (cases[k].o.kind == IPT_TRAINEE_LORA)
            check_file(b, k, IPT_FORMAT_DIFFUSERS);
    }
}

static void test_refused(void **state)
{
    bench *b = bench_ready(state);
    made r = make(b, 0);
    static const struct {
        ipt_trainee_opts o;
        const char *says;
    } bad[] = {
        {{.kind = IPT_TRAINEE_LORA, .rank = 0}, "rank 0"},
        {{.kind = IPT_TRAINEE_LORA, .rank = 4, .conv_rank = -1}, "kernels: -1"},
        {{.kind = IPT_TRAINEE_LORA, .rank = 1 << 20}, "rank 1048576"},
        {{.kind = IPT_TRAINEE_LOKR, .factor = 0}, "factor 0"},
        {{.kind = IPT_TRAINEE_KRONA, .a1 = 0, .a2 = 4}, "0 x 4"},
    };
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        ipt_trainee *t = NULL;
        assert_int_equal(
            ipt_trainee_create(b->ctx, r.modules.module, r.modules.n, &bad[i].o, IPT_F32, &t),
            IPT_ERR_ARG);
        assert_null(t);
        assert_non_null(strstr(ipt_last_error(b->ctx), bad[i].says));
    }
    ipt_trainee *t = NULL;
    assert_int_equal(ipt_trainee_create(b->ctx, r.modules.module, 1, &cases[0].o, IPT_F32, &t),
                     IPT_ERR_MISSING);
    drop(&r);
}

/* A step with a plan that the trainee prepared: padding stays zero, the loss falls. */
static void test_step(void **state)
{
    bench *b = bench_ready(state);
    if (b->gpu && !ipt_gpu_traits(b->gpu)->simd)
        return;
    for (size_t k = 0; k < IPT_COUNT(cases); k++) {
        made r = make(b, k);
        ipt_weights *w = bench_weights(b, r.m, IPT_COMP_UNET);
        const ipt_unet_config *u = &ipt_model_get_config(r.m)->unet;
        ipt_state_destroy(&r.s);
        assert_ok(b->ctx, ipt_state_create(b->ctx, b->gpu, &r.s));
        assert_ok(b->ctx, ipt_train_groups(r.s, r.t->item, r.t->n_item, IPT_F32));
        assert_ok(b->ctx, ipt_trainee_begin(r.t, r.s));
        const ipt_unet_key key = {.batch = 1, .h = 4, .w = 4, .tokens = 5, .act = IPT_F32};
        const ipt_train_opts o = {.gpu = b->gpu,
                                  .weights = w,
                                  .state = r.s,
                                  .item = r.t->item,
                                  .n = r.t->n_item,
                                  .site = r.t->site,
                                  .n_site = r.t->n_site,
                                  .n_gate = IPT_TRAINEE_GATES};
        ipt_plan *p = NULL, *update = NULL;
        assert_ok(b->ctx, ipt_train_gradients(b->ctx, u, &key, &o, &p));
        assert_ok(b->ctx, ipt_train_update(b->ctx, &o, &update));
        assert_ok(b->ctx, ipt_trainee_prepare(r.t, p, 1));
        float x[64], target[64], weight[16], text[5 * 64] = {0}, pooled[64] = {0},
                                                      ids[6] = {32, 32, 0, 0, 32, 32}, one = 1;
        uint64_t seed = 3;
        for (int i = 0; i < 64; i++) {
            x[i] = ipt_rng_normal(&seed);
            target[i] = 0.3F * ipt_rng_normal(&seed);
            weight[i / 4] = 1.0F / 64;
        }
        for (size_t i = 0; i < IPT_COUNT(text); i++)
            text[i] = ipt_rng_normal(&seed);
        const unet_call call = {.n = 1,
                                .h = 4,
                                .w = 4,
                                .tokens = 5,
                                .channels = 4,
                                .t = {300},
                                .x = x,
                                .text = text,
                                .pooled = pooled,
                                .time_ids = ids};
        unet_write(b, p, u, &call);
        assert_ok(b->ctx, ipt_plan_write(p, "target", target, sizeof target));
        assert_ok(b->ctx, ipt_plan_write(p, "weight", weight, sizeof weight));
        assert_ok(b->ctx, ipt_plan_write(p, "scale", &one, sizeof one));
        double first = 0, last = 0;
        for (int step = 1; step <= 12; step++) {
            float loss = 0, hyper[8];
            assert_ok(b->ctx, ipt_plan_run(p, 0));
            assert_ok(b->ctx, ipt_plan_read(p, "loss", &loss, sizeof loss));
            last = (double)loss;
            first = step == 1 ? last : first;
            ipt_adamw_hyper(&(ipt_adamw_opts){1e-2, 0.9, 0.999, 1e-8, 0}, step, 1, hyper);
            assert_ok(b->ctx, ipt_plan_write(update, "hyper", hyper, sizeof hyper));
            assert_ok(b->ctx, ipt_plan_run(update, IPT_TRAIN_UPDATE));
            assert_ok(b->ctx, ipt_plan_run(update, IPT_TRAIN_CLEAR));
        }
        if (!(last < first))
            fail_msg("%s: the loss went from %g to %g", cases[k].name, first, last);
        ipt_plan_destroy(&p);
        ipt_plan_destroy(&update);
        ipt_weights_destroy(&w);
        drop(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_begin),   cmocka_unit_test(test_reach), cmocka_unit_test(test_files),
        cmocka_unit_test(test_refused), cmocka_unit_test(test_step),
    };
    return bench_run_all(tests);
}
