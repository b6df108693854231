/* tests/test_train.c - ten optimiser steps of adapters and of whole tiny models beside torch:
 * losses, gradients, norms, final values; the same twice; f16 with masters. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/modules.h"
#include "tests/golden.h"
#include "train/step.h"

enum { STEPS = 10, RANK = 3, PADDED = 4, MAX_ITEM = 1024, ROWS = 2 };
/* GRAD_LIMIT: of all gradients together.  A single tensor's may differ more: torch's own f32
 * is 1.9e-4 from its double in to_out of heads of one channel.  NORM_LIMIT: AdamW's first steps are
 * the signs of gradients, those that are nearly zero too, so that rounding moves a whole model;
 * losses hardly. */
static const double LOSS_LIMIT = 1e-4, GRAD_LIMIT = 1e-4, TENSOR_LIMIT = 1e-3, NORM_LIMIT = 5e-3,
                    VALUE_LIMIT = 1e-3, CLIP = 0.05;
static const double ALPHA = 1.5;

typedef enum { LORA, KRON, FULL } kind;
typedef struct train_case {
    const char *model, *file; /* of GOLDEN("models"), golden_train_<file> */
    kind kind;
    bool is_shuffled;
    double rate;
} train_case;

/* What is trained: its name in the graph and in the file, and how the file's values lie. */
typedef struct item {
    char name[200], key[200];
    enum { AS_IS, KERNEL, LORA_A, LORA_B, TURNED } layout;
} item;

typedef struct setup {
    bench *b;
    const train_case *c;
    ipt_safetensors *st;
    ipt_model *m;
    ipt_weights *w;
    ipt_state *state;
    ipt_plan *gradients, *update;
    item item[MAX_ITEM];
    ipt_state_item desc[MAX_ITEM];
    size_t n;
    ipt_adapter_site site[MAX_ITEM];
    ipt_adapter_kron kron[MAX_ITEM];
    size_t n_site;
    ipt_want_list wants;
} setup;

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

static const ipt_st_tensor *tensor(const setup *s, const char *group, const item *it)
{
    char name[256];
    return ipt_safetensors_find(s->st, ipt_name(name, sizeof name, "%s%s", group, it->key));
}

/* Element i of the file's tensor in the graph's value. */
static size_t place(const item *it, const ipt_st_tensor *t, size_t i)
{
    const size_t c = t->rank < 2 ? 1 : (size_t)t->dim[1],
                 taps = t->rank < 4 ? 1 : (size_t)(t->dim[2] * t->dim[3]), first = i / (c * taps),
                 second = i / taps % c, tap = i % taps;
    switch (it->layout) {
    case AS_IS:
        return i;
    case KERNEL:
        return (first * taps + tap) * c + second;
    case LORA_A:
        return (tap * c + second) * PADDED + first;
    case LORA_B:
    case TURNED:
        return second * (size_t)t->dim[0] + first;
    }
    return 0;
}

/* The file's values as the graph has them; padding is zero. */
static float *values(const setup *s, const char *group, size_t i)
{
    const ipt_st_tensor *t = tensor(s, group, &s->item[i]);
    size_t n = 0, count = ipt_shape_count(&s->desc[i].shape);
    float *v = golden_f32(s->b->ctx, s->st, t->name, &n), *out = calloc(count, sizeof *out);
    assert_true(out && n <= count);
    for (size_t k = 0; k < n; k++)
        out[place(&s->item[i], t, k)] = v[k];
    ipt_free(v);
    return out;
}

static void add_factor(setup *s, const ipt_st_tensor *t)
{
    const char *key = t->name + strlen("begin."), *dot = strrchr(key, '.');
    item *it = &s->item[s->n];
    const int32_t d0 = (int32_t)t->dim[0], d1 = (int32_t)(t->count / (uint64_t)t->dim[0]);
    assert_true(s->n < MAX_ITEM);
    ipt_name(it->key, sizeof it->key, "%s", key);
    const char *kinds[][2] = {
        {"lora_a", "lora_a"}, {"lora_b", "lora_b"}, {"w1", "kron0_p"}, {"w2", "kron0_q"}};
    for (size_t k = 0; k < IPT_COUNT(kinds); k++)
        if (strcmp(dot + 1, kinds[k][0]) == 0) {
            ipt_name(it->name, sizeof it->name, "%.*s.%s", (int)(dot - key), key, kinds[k][1]);
            it->layout = k == 0 ? LORA_A : k == 1 ? LORA_B : TURNED;
            s->desc[s->n] = (ipt_state_item){it->name, k == 0   ? ipt_shape2(IPT_F32, d1, PADDED)
                                                       : k == 1 ? ipt_shape2(IPT_F32, PADDED, d0)
                                                                : ipt_shape2(IPT_F32, d1, d0)};
        }
    s->n++;
}

static void add_site(setup *s, const ipt_st_tensor *t)
{
    static char names[MAX_ITEM][200];
    const char *key = t->name + strlen("begin."), *dot = strrchr(key, '.');
    char other[256];
    ipt_name(names[s->n_site], sizeof names[0], "%.*s", (int)(dot - key), key);
    ipt_adapter_site *site = &s->site[s->n_site];
    *site = (ipt_adapter_site){.site = names[s->n_site]};
    if (s->c->kind == LORA) {
        site->n_rank = PADDED;
    } else {
        const ipt_st_tensor *q =
            ipt_safetensors_find(s->st, ipt_name(other, sizeof other, "begin.%s.w2", site->site));
        s->kron[s->n_site] =
            (ipt_adapter_kron){(int32_t)t->dim[0], (int32_t)q->dim[0], (int32_t)t->dim[1],
                               (int32_t)q->dim[1], s->c->is_shuffled};
        site->n_kron = 1;
        site->kron = &s->kron[s->n_site];
    }
    s->n_site++;
}

static void find_items(setup *s)
{
    if (s->c->kind == FULL) {
        assert_ok(s->b->ctx, ipt_wants_create(s->b->ctx, ipt_model_get_config(s->m), IPT_COMP_UNET,
                                              &s->wants));
        assert_true(s->wants.n <= MAX_ITEM);
        for (size_t i = 0; i < s->wants.n; i++) {
            const ipt_want *w = &s->wants.want[i];
            ipt_name(s->item[i].name, sizeof s->item[i].name, "%s", w->name);
            ipt_name(s->item[i].key, sizeof s->item[i].key, "%s", w->name);
            s->item[i].layout = w->shape.rank == 4 ? KERNEL : AS_IS;
            s->desc[i] = (ipt_state_item){s->item[i].name, w->shape};
        }
        s->n = s->wants.n;
        return;
    }
    for (size_t i = 0; i < ipt_safetensors_count(s->st); i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(s->st, i);
        if (strncmp(t->name, "begin.", 6) != 0)
            continue;
        add_factor(s, t);
        if (ends_with(t->name, ".lora_a") || ends_with(t->name, ".w1"))
            add_site(s, t);
    }
}

static void set_values(setup *s)
{
    ipt_ctx *ctx = s->b->ctx;
    for (size_t i = 0; i < s->n; i++) {
        const size_t n = ipt_shape_count(&s->desc[i].shape);
        float *v = s->c->kind == FULL ? calloc(n, sizeof *v) : values(s, "begin.", i);
        if (s->c->kind == FULL) {
            double *d = calloc(n, sizeof *d);
            assert_true(v && d);
            assert_ok(ctx, s->w->read(s->w, s->item[i].name, &s->desc[i].shape, d));
            for (size_t k = 0; k < n; k++)
                v[k] = (float)d[k];
            free(d);
        }
        assert_ok(ctx, ipt_train_set(s->state, s->item[i].name, v, n * 4));
        free(v);
    }
}

static void write_constants(setup *s)
{
    static const int32_t slot[PADDED] = {0, 0, 0, -1};
    const float gate = s->c->kind == LORA ? (float)(ALPHA / RANK) : 1;
    char name[256];
    for (size_t i = 0; i < s->n_site; i++)
        assert_ok(s->b->ctx,
                  ipt_plan_write(s->gradients,
                                 ipt_name(name, sizeof name, "%s.%s_slot", s->site[i].site,
                                          s->c->kind == LORA ? "lora" : "kron0"),
                                 slot, s->c->kind == LORA ? sizeof slot : sizeof slot[0]));
    if (s->n_site)
        assert_ok(s->b->ctx, ipt_plan_write(s->gradients, "gates", (float[ROWS]){gate, gate},
                                            sizeof gate * 2));
}

static void open_case(setup *s, bench *b, const train_case *c, bool is_recomputed)
{
    char path[256];
    *s = (setup){.b = b, .c = c};
    s->st =
        golden_open(b->ctx, IPT_TEST_DATA, ipt_name(path, sizeof path, "golden_train_%s", c->file));
    s->m = bench_model(b, ipt_name(path, sizeof path, IPT_TEST_DATA "/models/%s", c->model), NULL);
    s->w = bench_weights(b, s->m, IPT_COMP_UNET);
    find_items(s);
    const ipt_unet_config *u = &ipt_model_get_config(s->m)->unet;
    int32_t dim[4];
    ipt_free(golden_nhwc(b->ctx, s->st, "x0", dim));
    const ipt_st_tensor *text = ipt_safetensors_find(s->st, "text0");
    const ipt_unet_key key = {.batch = ROWS,
                              .h = dim[2],
                              .w = dim[3],
                              .tokens = (int32_t)text->dim[1],
                              .act = b->act,
                              .is_recomputed = is_recomputed};
    assert_ok(b->ctx, ipt_state_create(b->ctx, b->gpu, &s->state));
    assert_ok(b->ctx, ipt_train_groups(s->state, s->desc, s->n, b->act));
    set_values(s);
    const ipt_train_opts o = {.gpu = b->gpu,
                              .weights = s->w,
                              .state = s->state,
                              .item = s->desc,
                              .n = s->n,
                              .site = s->site,
                              .n_site = s->n_site,
                              .n_gate = 1};
    assert_ok(b->ctx, ipt_train_gradients(b->ctx, u, &key, &o, &s->gradients));
    assert_ok(b->ctx, ipt_train_update(b->ctx, &o, &s->update));
    write_constants(s);
}

static void close_case(setup *s)
{
    ipt_plan_destroy(&s->gradients);
    ipt_plan_destroy(&s->update);
    ipt_state_destroy(&s->state);
    ipt_weights_destroy(&s->w);
    ipt_model_close(&s->m);
    ipt_wants_finish(&s->wants);
    ipt_safetensors_close(&s->st);
}

static void write_batch(setup *s, int step, float scale)
{
    ipt_ctx *ctx = s->b->ctx;
    char name[32];
    int32_t dim[4], one[4];
    float *x = golden_nhwc(ctx, s->st, ipt_name(name, sizeof name, "x%d", step), dim);
    float *target = golden_nhwc(ctx, s->st, ipt_name(name, sizeof name, "target%d", step), NULL);
    float *weight = golden_nhwc(ctx, s->st, ipt_name(name, sizeof name, "weight%d", step), one);
    float *text = golden_f32(ctx, s->st, ipt_name(name, sizeof name, "text%d", step), NULL);
    float *t = golden_f32(ctx, s->st, ipt_name(name, sizeof name, "t%d", step), NULL);
    float *pooled = NULL, *ids = NULL;
    if (golden_has(s->st, "pooled0")) {
        pooled = golden_f32(ctx, s->st, ipt_name(name, sizeof name, "pooled%d", step), NULL);
        ids = golden_f32(ctx, s->st, ipt_name(name, sizeof name, "time_ids%d", step), NULL);
    }
    const size_t cells = (size_t)(dim[2] * dim[3]), n = cells * ROWS * 4;
    for (size_t i = 0; i < cells * ROWS; i++)
        weight[i] /= (float)n;
    const unet_call call = {.n = ROWS,
                            .h = dim[2],
                            .w = dim[3],
                            .tokens = (int32_t)ipt_safetensors_find(s->st, "text0")->dim[1],
                            .channels = 4,
                            .t = {(double)t[0], (double)t[1]},
                            .x = x,
                            .text = text,
                            .pooled = pooled,
                            .time_ids = ids};
    unet_write(s->b, s->gradients, &ipt_model_get_config(s->m)->unet, &call);
    assert_ok(ctx, ipt_plan_write(s->gradients, "target", target, n * 4));
    assert_ok(ctx, ipt_plan_write(s->gradients, "weight", weight, cells * ROWS * 4));
    assert_ok(ctx, ipt_plan_write(s->gradients, "scale", &scale, 4));
    float *all[] = {x, target, weight, text, t, pooled, ids};
    for (size_t i = 0; i < IPT_COUNT(all); i++)
        ipt_free(all[i]);
}

/* Each tensor within `limit`; all together within `total` of their norm. */
static void compare(const setup *s, const char *group, const char *state, double limit,
                    double total)
{
    char name[512];
    double off = 0, sum = 0;
    for (size_t i = 0; i < s->n; i++) {
        if (!tensor(s, group, &s->item[i]))
            continue; /* of a whole model one in five is in the file */
        const size_t n = ipt_shape_count(&s->desc[i].shape);
        float *want = values(s, group, i), *got = calloc(n, sizeof *got);
        assert_true(got);
        ipt_name(name, sizeof name, "%s%s", state, s->item[i].name);
        if (state[0])
            assert_ok(s->b->ctx, ipt_state_read(s->state, name, got, n * 4));
        else
            assert_ok(s->b->ctx, ipt_train_get(s->state, name, got, n * 4));
        golden_at_most(sqrt(golden_nmse(want, got, n)), limit, "%s: %s%s", s->c->file, group,
                       s->item[i].key);
        for (size_t k = 0; k < n; k++) {
            const double e = (double)want[k] - (double)got[k];
            off += e * e;
            sum += (double)want[k] * (double)want[k];
        }
        free(want);
        free(got);
    }
    golden_at_most(sqrt(off / sum), total, "%s: all of %s", s->c->file, group);
}

/* One step; the loss, and the norm before clipping.  factor: what all gradients are scaled by. */
static void take_step(setup *s, int step, double scale, double *loss, double *norm)
{
    ipt_ctx *ctx = s->b->ctx;
    float v = 0, rows[ROWS];
    write_batch(s, step, (float)scale);
    assert_ok(ctx, ipt_plan_run(s->gradients, 0));
    assert_ok(ctx, ipt_plan_read(s->gradients, "loss", &v, sizeof v));
    assert_ok(ctx, ipt_plan_read(s->gradients, "losses", rows, sizeof rows));
    *loss = (double)v;
    golden_at_most(fabs((double)rows[0] + (double)rows[1] - *loss), 1e-6 * *loss, "sum of rows");
    assert_ok(ctx, ipt_plan_run(s->update, IPT_TRAIN_NORM));
    assert_ok(ctx, ipt_plan_read(s->update, "norm2", &v, sizeof v));
    *norm = sqrt((double)v) / scale;
}

static void update(setup *s, int step, double scale, double norm)
{
    const ipt_adamw_opts o = {s->c->rate, 0.9, 0.999, 1e-8, 0.01};
    float hyper[8];
    const double clip = CLIP / (norm + 1e-6);
    ipt_adamw_hyper(&o, step + 1, (clip < 1 ? clip : 1) / scale, hyper);
    assert_ok(s->b->ctx, ipt_plan_write(s->update, "hyper", hyper, sizeof hyper));
    assert_ok(s->b->ctx, ipt_plan_run(s->update, IPT_TRAIN_UPDATE));
    assert_ok(s->b->ctx, ipt_plan_run(s->update, IPT_TRAIN_CLEAR));
}

static void run_case(bench *b, const train_case *c)
{
    setup s;
    open_case(&s, b, c, false);
    float *losses = golden_f32(b->ctx, s.st, "loss", NULL),
          *norms = golden_f32(b->ctx, s.st, "norm", NULL);
    for (int step = 0; step < STEPS; step++) {
        double loss = 0, norm = 0;
        take_step(&s, step, 1, &loss, &norm);
        golden_at_most(fabs(loss / (double)losses[step] - 1), LOSS_LIMIT, "%s: loss %d", c->file,
                       step);
        golden_at_most(fabs(norm / (double)norms[step] - 1), NORM_LIMIT, "%s: norm %d", c->file,
                       step);
        if (step == 0)
            compare(&s, "grad.", "grad/", TENSOR_LIMIT, GRAD_LIMIT);
        update(&s, step, 1, norm);
    }
    compare(&s, "end.", "", c->kind == FULL ? 10 * VALUE_LIMIT : VALUE_LIMIT, VALUE_LIMIT);
    ipt_free(losses);
    ipt_free(norms);
    close_case(&s);
}

static const train_case cases[] = {
    {"sd1", "sd1_lora", LORA, false, 1e-2},   {"sd1", "sd1_locon", LORA, false, 1e-2},
    {"sd1", "sd1_lokr", KRON, false, 1e-2},   {"sd1", "sd1_krona", KRON, true, 1e-2},
    {"sd1", "sd1_full", FULL, false, 1e-3},   {"sd2", "sd2_lora", LORA, false, 1e-2},
    {"sd2", "sd2_lokr", KRON, false, 1e-2},   {"sd2", "sd2_full", FULL, false, 1e-3},
    {"sdxl", "sdxl_lora", LORA, false, 1e-2}, {"sdxl", "sdxl_krona", KRON, true, 1e-2},
    {"sdxl", "sdxl_full", FULL, false, 1e-3},
};

static void test_beside_torch(void **state)
{
    bench *b = bench_ready(state);
    const size_t by = b->gpu && !ipt_gpu_traits(b->gpu)->simd ? 5 : 1; /* tiles on a CPU: slow */
    for (size_t i = 0; i < IPT_COUNT(cases); i += by)
        run_case(b, &cases[i]);
}

/* Ten steps; the values at the end. */
static float *train(bench *b, const train_case *c, double scale, size_t *n)
{
    setup s;
    open_case(&s, b, c, false);
    for (int step = 0; step < STEPS; step++) {
        double loss = 0, norm = 0;
        take_step(&s, step, scale, &loss, &norm);
        update(&s, step, scale, norm);
    }
    *n = 0;
    for (size_t i = 0; i < s.n; i++)
        *n += ipt_shape_count(&s.desc[i].shape);
    float *v = calloc(*n, sizeof *v), *at = v;
    assert_true(v);
    for (size_t i = 0; i < s.n; i++) {
        const size_t count = ipt_shape_count(&s.desc[i].shape);
        assert_ok(b->ctx, ipt_train_get(s.state, s.item[i].name, at, count * 4));
        at += count;
    }
    close_case(&s);
    return v;
}

static void test_twice(void **state)
{
    bench *b = bench_device(state, false);
    size_t n = 0, m = 0;
    float *first = train(b, &cases[0], 1, &n), *again = train(b, &cases[0], 1, &m);
    assert_int_equal(n, m);
    assert_memory_equal(first, again, n * sizeof *first);
    free(first);
    free(again);
}

/* Computing blocks again changes no bit, and less is kept. */
static void test_recomputed(void **state)
{
    bench *b = bench_device(state, false);
    static const size_t which[] = {0, 7, 9}; /* a LoRA, a whole model, SDXL */
    for (size_t k = 0; k < IPT_COUNT(which); k++) {
        uint64_t arena[2];
        float *grads[2];
        size_t n = 0;
        for (int again = 0; again < 2; again++) {
            setup s;
            double loss = 0, norm = 0;
            open_case(&s, b, &cases[which[k]], again);
            take_step(&s, 0, 1, &loss, &norm);
            ipt_state_view all;
            assert_true(ipt_state_locate(s.state, IPT_TRAIN_GRADS, &all));
            n = ipt_shape_count(&all.shape);
            grads[again] = calloc(n, sizeof(float));
            assert_true(grads[again]);
            assert_ok(b->ctx, ipt_state_read(s.state, IPT_TRAIN_GRADS, grads[again], n * 4));
            arena[again] = ipt_plan_arena_bytes(s.gradients);
            close_case(&s);
        }
        print_message("%s: %.0f KiB kept, %.0f KiB with blocks computed again\n",
                      cases[which[k]].file, (double)arena[0] / 1024, (double)arena[1] / 1024);
        assert_memory_equal(grads[0], grads[1], n * sizeof(float));
        assert_true(arena[1] < arena[0]);
        free(grads[0]);
        free(grads[1]);
    }
}

/* Activations and factors in f16, gradients scaled, masters in f32: near f32's result. */
static void test_half(void **state)
{
    bench *b = bench_device(state, true);
    size_t n = 0;
    float *want = train(b, &cases[0], 1, &n);
    b->act = IPT_F16;
    float *got = train(b, &cases[0], 256, &n);
    const double off = golden_nmse(want, got, n);
    print_message("f16: NMSE %.2g of the values of f32\n", off);
    golden_at_most(off, 1e-3, "f16"); /* a rate of 0.01 and ten steps: signs of small gradients */
    assert_true(off > 0);
    b->act = IPT_F32;
    free(want);
    free(got);
}

/* A gradient that is not finite is seen before anything changes, and gone after the sums are
 * cleared. */
static void test_not_finite(void **state)
{
    bench *b = bench_ready(state);
    setup s;
    float x = INFINITY, values[2][4096];
    double loss = 0, norm = 0;
    open_case(&s, b, &cases[0], false);
    const size_t n = ipt_shape_count(&s.desc[0].shape);
    assert_true(n <= IPT_COUNT(values[0]));
    assert_ok(b->ctx, ipt_train_get(s.state, s.item[0].name, values[0], n * 4));
    write_batch(&s, 0, x);
    assert_ok(b->ctx, ipt_plan_run(s.gradients, 0));
    assert_ok(b->ctx, ipt_plan_run(s.update, IPT_TRAIN_NORM));
    assert_ok(b->ctx, ipt_plan_read(s.update, "norm2", &x, sizeof x));
    const bool is_finite = isfinite(x);
    assert_false(is_finite);
    assert_ok(b->ctx, ipt_plan_run(s.update, IPT_TRAIN_CLEAR));
    assert_ok(b->ctx, ipt_train_get(s.state, s.item[0].name, values[1], n * 4));
    assert_memory_equal(values[0], values[1], n * 4);
    take_step(&s, 0, 1, &loss, &norm);
    assert_true(isfinite(norm) && norm > 0);
    compare(&s, "grad.", "grad/", TENSOR_LIMIT, GRAD_LIMIT);
    close_case(&s);
}

/* What cannot be trained is told by name. */
static void test_misfits(void **state)
{
    bench *b = bench_ready(state);
    setup s;
    open_case(&s, b, &cases[0], false);
    const ipt_state_item strange = {"conv_in.lora_a", {{4, 4, 1, 1}, 2, IPT_F32}};
    const ipt_unet_key key = {.batch = 1, .h = 4, .w = 4, .tokens = 7, .act = IPT_F32};
    const ipt_train_opts o = {
        .gpu = b->gpu, .weights = s.w, .state = s.state, .item = &strange, .n = 1};
    ipt_plan *p = NULL;
    assert_int_equal(ipt_train_gradients(b->ctx, &ipt_model_get_config(s.m)->unet, &key, &o, &p),
                     IPT_ERR_MISSING);
    assert_non_null(strstr(ipt_last_error(b->ctx), "conv_in.lora_a"));
    close_case(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_beside_torch), cmocka_unit_test(test_twice),
        cmocka_unit_test(test_recomputed),   cmocka_unit_test(test_half),
        cmocka_unit_test(test_not_finite),   cmocka_unit_test(test_misfits),
    };
    return bench_run_all(tests);
}
