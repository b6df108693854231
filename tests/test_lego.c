/* tests/test_lego.c - LoRA-LEGO: the clustering of ranks in closed form, files and pictures beside
 * tools/reference, the program's command. */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/lora_fit.h"
#include "engine/lora_tools.h"
#include "tests/golden.h"
#include "tests/program.h"

#define TOOLS IPT_TEST_DATA "/tools/"
#define KINDS IPT_TEST_DATA "/kinds/"
#define COMBINE IPT_TEST_DATA "/combine/"
#define SD1 IPT_TEST_DATA "/models/sd1"

static int set_up(void **state) { return place_create(state, IPT_PROGRAM); }

/* --- pools ------------------------------------------------------------------------------------ */
enum { FAN = 5, OUT = 4, MOST = 16, ADAPTERS = 3 };
/* Up to MOST units, of one adapter each or as `from` says. */
typedef struct units {
    size_t n;
    double down[MOST * FAN], up[MOST * OUT], split[MOST], omega[ADAPTERS];
    int32_t from[MOST];
} units;

static const ipt_lego_opts usual = {0, IPT_LEGO_NORM_2, true, true},
                           plain = {0, IPT_LEGO_NORM_OFF, false, true};

static void add(units *u, const double *a, const double *b, double stretch, int32_t from)
{
    for (size_t i = 0; i < FAN; i++)
        u->down[u->n * FAN + i] = a[i] * stretch;
    for (size_t i = 0; i < OUT; i++)
        u->up[u->n * OUT + i] = b[i] / stretch;
    u->split[u->n] = 1;
    u->from[u->n] = from;
    u->omega[from] = 1;
    u->n++;
}

/* The k-th of some random units, always the same ones. */
static void add_random(units *u, uint64_t k, double stretch, int32_t from)
{
    double a[FAN], b[OUT];
    uint64_t seed = 100 + k;
    for (int i = 0; i < FAN; i++)
        a[i] = (double)ipt_rng_normal(&seed);
    for (int i = 0; i < OUT; i++)
        b[i] = (double)ipt_rng_normal(&seed);
    add(u, a, b, stretch, from);
}

static ipt_status run(ipt_ctx *ctx, const units *u, const ipt_lego_opts *o, size_t k, ipt_lego *l)
{
    ipt_lego_opts opts = *o;
    opts.rank = (int32_t)k;
    ipt_units pool = {.n = u->n,
                      .fan = FAN,
                      .out = OUT,
                      .n_from = ADAPTERS,
                      .down = u->down,
                      .up = u->up,
                      .split = u->split,
                      .from = u->from,
                      .omega = u->omega};
    return ipt_lego_merge(ctx, &pool, &opts, l);
}

static void change_of(const double *down, const double *up, size_t n, double d[OUT * FAN])
{
    memset(d, 0, OUT * FAN * sizeof *d);
    for (size_t k = 0; k < n; k++)
        for (size_t o = 0; o < OUT; o++)
            for (size_t i = 0; i < FAN; i++)
                d[o * FAN + i] += up[k * OUT + o] * down[k * FAN + i];
}

/* The change of a pool's merge with rank k; *rank: of the result. */
static void merged(ipt_ctx *ctx, const units *u, const ipt_lego_opts *o, size_t k,
                   double d[OUT * FAN], size_t *rank)
{
    ipt_lego l = {0};
    assert_ok(ctx, run(ctx, u, o, k, &l));
    change_of(l.down, l.up, l.rank, d);
    if (rank)
        *rank = l.rank;
    ipt_lego_finish(&l);
}

static double distance(const double *a, const double *b)
{
    double diff = 0, all = 0;
    for (size_t i = 0; i < OUT * FAN; i++) {
        diff += (a[i] - b[i]) * (a[i] - b[i]);
        all += b[i] * b[i];
    }
    return all > 0 ? sqrt(diff / all) : sqrt(diff);
}

/* --- closed forms ----------------------------------------------------------------------------- */
/* One adapter at its rank, and all units of several without output reweighting, stay what they are
 * to the bit; zero units are gone. */
static void units_alone_stay(void **state)
{
    place *p = *state;
    static const double none[FAN] = {0};
    units u = {0};
    ipt_lego l = {0};
    for (uint64_t k = 0; k < 4; k++)
        add_random(&u, k, k == 2 ? -3 : 0.5, 0);
    assert_ok(p->ctx, run(p->ctx, &u, &usual, 0, &l));
    assert_int_equal(l.rank, 4);
    assert_false(l.is_clamped);
    assert_memory_equal(l.down, u.down, 4 * FAN * sizeof *u.down);
    assert_memory_equal(l.up, u.up, 4 * OUT * sizeof *u.up);
    ipt_lego_finish(&l);
    add(&u, none, u.up, 1, 1); /* changes nothing */
    u.omega[2] = 0;
    add_random(&u, 9, 1, 2);
    u.omega[2] = 0; /* nor does an adapter without weight */
    ipt_lego_opts o = usual;
    o.want_output = false;
    assert_ok(p->ctx, run(p->ctx, &u, &o, 6, &l));
    assert_int_equal(l.rank, 4);
    assert_true(l.is_clamped);
    assert_memory_equal(l.down, u.down, 4 * FAN * sizeof *u.down);
    assert_memory_equal(l.up, u.up, 4 * OUT * sizeof *u.up);
    ipt_lego_finish(&l);
    assert_ok(p->ctx, run(p->ctx, &u, &usual, 8, &l)); /* the empty adapters have no rank here */
    assert_memory_equal(l.up, u.up, 4 * OUT * sizeof *u.up);
    ipt_lego_finish(&l);
}

/* Three adapters of the same units, each in its order, lengths and signs: one of them. */
static void gauge_and_order_do_not_matter(void **state)
{
    static const double stretch[ADAPTERS][3] = {{1, 1, 1}, {-4, 0.5, 3}, {0.25, -2, -1}};
    place *p = *state;
    units u = {0}, one = {0}, other = {0};
    double d[OUT * FAN], want[OUT * FAN], raw[OUT * FAN];
    size_t rank = 0;
    for (int32_t f = 0; f < ADAPTERS; f++)
        for (uint64_t k = 0; k < 3; k++) {
            add_random(&u, (k + (uint64_t)f) % 3, stretch[f][k], f);
            if (f == 0)
                add_random(&one, k, 1, 0);
        }
    change_of(one.down, one.up, 3, want);
    merged(p->ctx, &u, &usual, 3, d, &rank);
    assert_int_equal(rank, 3);
    golden_at_most(distance(d, want), 1e-12, "three of the same");
    merged(p->ctx, &u, &usual, 0, d, &rank); /* their mean rank is 3, too */
    golden_at_most(distance(d, want), 1e-12, "mean rank");
    merged(p->ctx, &u, &usual, 7, d, &rank); /* there are no seven: the factor is that of three */
    assert_int_equal(rank, 3);
    golden_at_most(distance(d, want), 1e-12, "fewer differ than are asked for");
    for (size_t i = u.n; i-- > 0;) /* the same pool backwards */
        add(&other, u.down + i * FAN, u.up + i * OUT, 1, u.from[i]);
    merged(p->ctx, &other, &usual, 3, d, &rank);
    golden_at_most(distance(d, want), 1e-12, "backwards");
    ipt_lego_opts o = usual;
    o.want_gauge = false;
    merged(p->ctx, &u, &o, 3, raw, NULL);
    assert_true(distance(raw, want) > 0.1); /* as published, lengths and signs count */
}

/* Two units of one length and the angle between them: what averaging takes and norms give back. */
static void centroids(void **state)
{
    static const double a[2][FAN] = {{1}, {0, 1}}, b[OUT] = {0, 1};
    static const struct {
        ipt_lego_norm norm;
        bool output;
        double omega[2], want[2];
    } rows[] = {
        /* (1/2, 1/2 | 1): |c|^2 3/2 instead of 2, so 4/3 on the product; its largest value is 1 */
        {IPT_LEGO_NORM_OFF, false, {1, 1}, {0.5, 0.5}},
        {IPT_LEGO_NORM_2, false, {1, 1}, {2.0 / 3, 2.0 / 3}},
        {IPT_LEGO_NORM_INF, false, {1, 1}, {0.5, 0.5}},
        {IPT_LEGO_NORM_OFF, false, {3, 1}, {0.75, 0.25}},
        {IPT_LEGO_NORM_2, false, {3, 1}, {0.75 * 2 / 1.625, 0.25 * 2 / 1.625}},
        {IPT_LEGO_NORM_OFF, true, {1, 1}, {0.5, 0.5}}, /* mean rank 1 */
    };
    place *p = *state;
    double d[OUT * FAN], want[OUT * FAN];
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        units u = {0};
        add(&u, a[0], b, 1, 0);
        add(&u, a[1], b, -2, 1);
        memcpy(u.omega, rows[i].omega, sizeof rows[i].omega);
        ipt_lego_opts o = {0, rows[i].norm, rows[i].output, true};
        merged(p->ctx, &u, &o, 1, d, NULL);
        memset(want, 0, sizeof want);
        want[FAN] = rows[i].want[0];
        want[FAN + 1] = rows[i].want[1];
        golden_at_most(distance(d, want), 1e-12, "row %zu", i);
    }
    units u = {0}; /* both of one adapter: its rank is 2, and the change grows by its root */
    add(&u, a[0], b, 1, 0);
    add(&u, a[1], b, 1, 0);
    ipt_lego_opts o = {0, IPT_LEGO_NORM_OFF, true, true};
    merged(p->ctx, &u, &o, 1, d, NULL);
    want[FAN] = want[FAN + 1] = 0.5 * sqrt(2);
    golden_at_most(distance(d, want), 1e-12, "output");
    units w = {0}; /* without a gauge opposite signs cancel, and nothing is blown up */
    add(&w, a[0], b, 1, 0);
    add(&w, a[0], b, -1, 1);
    o = usual;
    o.want_gauge = false;
    merged(p->ctx, &w, &o, 1, d, NULL);
    memset(want, 0, sizeof want);
    golden_at_most(distance(d, want), 1e-12, "cancelled");
}

/* A result is the mean of its clusters: each unit nearer to its own than to the others. */
static void clusters_are_tight(void **state)
{
    place *p = *state;
    for (size_t k = 1; k < 8; k++) {
        units u = {0};
        ipt_lego l = {0};
        for (uint64_t i = 0; i < MOST; i++)
            add_random(&u, i % 8, i < 8 ? 1 : -1.5, (int32_t)(i % ADAPTERS));
        assert_ok(p->ctx, run(p->ctx, &u, &plain, k, &l));
        assert_int_equal(l.rank, k);
        for (size_t i = 0; i < l.rank * FAN; i++)
            assert_true(isfinite(l.down[i]));
        ipt_lego_finish(&l);
    }
}

static void hostile(void **state)
{
    place *p = *state;
    units u = {0};
    ipt_lego l = {0};
    assert_ok(p->ctx, run(p->ctx, &u, &usual, 3, &l)); /* no units at all */
    assert_true(l.rank == 0 && !l.down && !l.up);
    for (uint64_t i = 0; i < 6; i++)
        add_random(&u, i, 1, 0);
    assert_ok(p->ctx, run(p->ctx, &u, &usual, INT32_MAX, &l));
    assert_true(l.rank == 6 && l.is_clamped);
    ipt_lego_finish(&l);
    static const double bad[] = {(double)NAN, (double)INFINITY, -(double)INFINITY, 1e300};
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        units v = u;
        v.down[3 * FAN + 1] = bad[i];
        assert_int_equal(run(p->ctx, &v, &usual, 2, &l), IPT_ERR_ARG);
        assert_non_null(strstr(ipt_last_error(p->ctx), "not finite"));
    }
    u.omega[0] = (double)NAN;
    assert_int_equal(run(p->ctx, &u, &usual, 2, &l), IPT_ERR_ARG);
    enum { MANY = IPT_LEGO_MAX_UNITS + 1 };
    double *ones = calloc(MANY, sizeof *ones);
    int32_t *from = calloc(MANY, sizeof *from);
    assert_true(ones && from);
    for (size_t i = 0; ones && i < MANY; i++)
        ones[i] = 1;
    ipt_units many = {MANY, 1, 1, 1, ones, ones, ones, from, ones};
    ipt_lego_opts o = {8, IPT_LEGO_NORM_2, true, true};
    assert_int_equal(ipt_lego_merge(p->ctx, &many, &o, &l), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(p->ctx), "4097 units"));
    many.n = 500; /* all the same: one cluster */
    assert_ok(p->ctx, ipt_lego_merge(p->ctx, &many, &o, &l));
    assert_int_equal(l.rank, 1);
    ipt_lego_finish(&l);
    ipt_stop stop = {0};
    ipt_stop_ask(&stop);
    ipt_ctx_listen(p->ctx, IPT_LISTEN_REQUEST, &stop);
    assert_int_equal(ipt_lego_merge(p->ctx, &many, &o, &l), IPT_ERR_CANCELLED);
    ipt_ctx_listen(p->ctx, IPT_LISTEN_REQUEST, NULL);
    free(ones);
    free(from);
}

static void out_of_memory(void **state)
{
    place *p = *state;
    units u = {0};
    for (uint64_t i = 0; i < 9; i++)
        add_random(&u, i, 1, (int32_t)(i % ADAPTERS));
    for (uint64_t i = 1;; i++) {
        ipt_lego l = {0};
        ipt_alloc_fail_after(p->ctx, i);
        ipt_status s = run(p->ctx, &u, &usual, 3, &l);
        ipt_alloc_fail_after(p->ctx, 0);
        ipt_lego_finish(&l);
        if (s == IPT_OK)
            break;
        assert_int_equal(s, IPT_ERR_NOMEM);
        assert_true(i < 100);
    }
}

/* --- files ------------------------------------------------------------------------------------ */
typedef struct file_case {
    const char *name, *files; /* of tools/ and combine/ */
    float weight[3];
    int32_t rank;
    const char *norm, *output, *gauge;
    int clamped;
} file_case;
static const file_case cases[] = {
    {"default", "abc", {1, 1, 1}, 0, NULL, NULL, NULL, 0},
    {"weights", "abc", {0.8F, -0.4F, 1.5F}, 4, "2", "on", "on", 0},
    {"inf", "abc", {1, 0.5F, 1}, 3, "inf", NULL, NULL, 0},
    {"off", "abc", {1, 1, 0.3F}, 2, "off", "off", NULL, 0},
    {"raw", "ab", {1, 0.7F}, 3, NULL, NULL, "off", 0},
    {"one", "a", {1}, 2, NULL, NULL, NULL, 0},
    {"all", "abc", {0.7F, -0.5F, 1.25F}, 99, NULL, "off", NULL, 5},
    {"planted", "xyz", {1, 1, 1}, 3, NULL, NULL, NULL, 0},
};

static ipt_status merge_files(const place *p, const file_case *c, const char *method,
                              const char *out, char **text)
{
    char path[3][512];
    ipt_lora l[3];
    size_t n = strlen(c->files);
    ipt_lora_job job = {.model = SD1, .out = out};
    ipt_lora_merge_opts o = {.method = method,
                             .rank = c->rank,
                             .density = 0.5,
                             .lego_norm = c->norm,
                             .lego_output = c->output,
                             .lego_gauge = c->gauge};
    for (size_t i = 0; i < n; i++) {
        ipt_name(path[i], sizeof path[i], "%s%c.safetensors", c->files[i] < 'x' ? TOOLS : COMBINE,
                 c->files[i]);
        l[i] = (ipt_lora){.path = path[i], .weight = c->weight[i], .te_weight = c->weight[i]};
    }
    return ipt_lora_merge(p->ctx, &job, l, n, &o, text);
}

static void kohya_name(const ipt_module *m, char *buf, size_t n)
{
    ipt_name(buf, n, "%s%s", m->comp == IPT_COMP_UNET ? "lora_unet_" : "lora_te_", m->name);
    for (char *c = buf; *c; c++)
        *c = *c == '.' ? '_' : *c;
}

/* Largest relative distance of a file's changes from a golden's of that case. */
static double file_distance(const place *p, const ipt_safetensors *st, const char *name,
                            const char *path)
{
    ipt_lora_fit f = {0};
    double worst = 0;
    assert_ok(p->ctx, ipt_lora_fit_open(p->ctx, path, SD1, NULL, &f));
    ipt_tool t = {.ctx = p->ctx, .module = f.modules.module, .n_module = f.modules.n};
    for (size_t i = 0; i < f.file->n_module; i++) {
        char stem[200], key[256];
        double *v = NULL, diff = 0, all = 0;
        kohya_name(&t.module[f.file->module[i].module], stem, sizeof stem);
        const ipt_st_tensor *want =
            ipt_safetensors_find(st, ipt_name(key, sizeof key, "%s.%s", name, stem));
        assert_non_null(want);
        assert_ok(p->ctx, ipt_st_load(want));
        assert_ok(p->ctx, ipt_tool_delta(&t, &f.file->module[i], &v));
        for (size_t k = 0; k < want->count; k++) {
            double x = 0;
            memcpy(&x, want->data + k * sizeof x, sizeof x);
            diff += (v[k] - x) * (v[k] - x);
            all += x * x;
        }
        ipt_free(v);
        worst = fmax(worst, sqrt(diff / all));
    }
    ipt_lora_fit_finish(&f);
    return worst;
}

static void files_beside_the_reference(void **state)
{
    place *p = *state;
    ipt_safetensors *st = golden_open(p->ctx, IPT_TEST_DATA "/combine", "golden_lego");
    char out[PATH_MAX], *text = NULL;
    in(p, out, "lego.safetensors");
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        assert_ok(p->ctx, merge_files(p, &cases[i], "lego", out, &text));
        json_t *o = json_loads(text, 0, NULL);
        assert_int_equal(ipt_json_int(o, "clamped", -1), cases[i].clamped);
        json_decref(o);
        ipt_free(text);
        double d = file_distance(p, st, cases[i].name, out);
        print_message("  %-10s %.2g\n", cases[i].name, d);
        golden_at_most(d, 2e-7, "%s", cases[i].name); /* factors are f32 */
        if (strcmp(cases[i].name, "all") != 0)
            continue;
        assert_ok(p->ctx, merge_files(p, &cases[i], "cat", out, &text)); /* all ranks: a sum */
        ipt_free(text);
        golden_at_most(file_distance(p, st, cases[i].name, out), 2e-7, "all, as cat");
    }
    ipt_safetensors_close(&st);
}

/* --- pictures --------------------------------------------------------------------------------- */
typedef struct picture {
    uint8_t rgb[64 * 64 * 3];
    size_t n;
} picture;

static ipt_status keep(void *user, int32_t i, const ipt_image *im, const char *text,
                       const char *json)
{
    picture *p = user;
    (void)i, (void)text, (void)json;
    p->n = (size_t)im->w * (size_t)im->h * 3;
    assert_true(p->n <= sizeof p->rgb);
    memcpy(p->rgb, im->rgb, p->n);
    return IPT_OK;
}

static void request(ipt_request *r, ipt_lora *lora, size_t n)
{
    ipt_request_init(r);
    r->model = SD1;
    r->prompt = "a photo of a (cat:1.2)";
    r->steps = 3;
    r->seed = 41;
    r->width = r->height = 32;
    r->lora = lora;
    r->n_lora = n;
    r->fold = "never";
}

static ipt_lora lora_of(const char *path)
{
    return (ipt_lora){.path = path, .weight = 1, .te_weight = 1, .end = 1};
}

static bool same_picture(const picture *a, const picture *b)
{
    return a->n == b->n && memcmp(a->rgb, b->rgb, a->n) == 0;
}

/* All ranks without reweighting at weight 1 are Merge to the bit, beside the weights and in them;
 * one adapter is itself; text encoders too. */
static void pictures_of_all_ranks(void **state)
{
    static const char *const options[] = {"rank=99", "output=off", "rank=3"};
    ipt_ctx *ctx = NULL;
    ipt_request r;
    ipt_report rep;
    (void)state;
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    ipt_lora l[2] = {lora_of(IPT_TEST_DATA "/golden_lora_kohya.safetensors"),
                     lora_of(IPT_TEST_DATA "/golden_lora_locon_cp.safetensors")};
    picture *merge = calloc(1, sizeof *merge), *lego = calloc(1, sizeof *lego);
    assert_true(merge && lego);
    for (int fold = 0; fold < 2; fold++)
        for (size_t n = 1; n <= 2; n++) {
            request(&r, l, n);
            r.fold = fold ? "always" : "never";
            assert_ok(ctx, ipt_generate(e, &r, keep, merge, NULL));
            r.compose = "lego";
            r.compose_opt = options;
            r.n_compose_opt = n == 1 ? 0 : 2;
            assert_ok(ctx, ipt_generate(e, &r, keep, lego, &rep));
            assert_true(same_picture(merge, lego));
            assert_int_equal(rep.n_adapter, n);
            assert_int_equal(rep.is_folded, fold);
        }
    r.fold = "never";
    r.compose_opt = options + 2; /* three ranks are another picture */
    r.n_compose_opt = 1;
    assert_ok(ctx, ipt_generate(e, &r, keep, lego, NULL));
    assert_false(same_picture(merge, lego));
    assert_ok(ctx, ipt_generate(e, &r, keep, lego, &rep)); /* again: nothing is made or uploaded */
    assert_true(rep.n_plans_recorded == 0 && rep.bytes_uploaded == 0);
    l[1].weight = l[1].te_weight = 0.5F; /* another weight: another adapter of the same layout */
    assert_ok(ctx, ipt_generate(e, &r, keep, merge, &rep));
    assert_true(rep.n_plans_recorded == 0 && rep.bytes_uploaded > 0);
    assert_false(same_picture(merge, lego));
    free(merge);
    free(lego);
    test_engine_done(&e, &ctx);
}

/* What the file of `lora merge` draws is what the method draws, at any weights. */
static void method_is_the_tool(void **state)
{
    place *p = *state;
    static const char *const options[] = {"rank=2", "norm=inf"};
    char out[PATH_MAX], *text = NULL;
    ipt_ctx *ctx = NULL;
    ipt_request r;
    picture *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
    assert_true(a && b);
    file_case c = {"", "abc", {0.8F, -0.4F, 1.5F}, 2, "inf", NULL, NULL, 0};
    assert_ok(p->ctx, merge_files(p, &c, "lego", in(p, out, "tool.safetensors"), &text));
    ipt_free(text);
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    ipt_lora three[3] = {lora_of(TOOLS "a.safetensors"), lora_of(TOOLS "b.safetensors"),
                         lora_of(TOOLS "c.safetensors")},
             one = lora_of(out);
    for (int i = 0; i < 3; i++)
        three[i].weight = three[i].te_weight = c.weight[i];
    request(&r, &one, 1);
    assert_ok(ctx, ipt_generate(e, &r, keep, a, NULL));
    request(&r, three, 3);
    r.compose = "lego";
    r.compose_opt = options;
    r.n_compose_opt = 2;
    assert_ok(ctx, ipt_generate(e, &r, keep, b, NULL));
    assert_true(same_picture(a, b));
    free(a);
    free(b);
    test_engine_done(&e, &ctx);
}

/* Memory that runs out while adapters become one: that status, and the next request is whole. */
static void requests_out_of_memory(void **state)
{
    ipt_ctx *ctx = NULL;
    ipt_request r;
    (void)state;
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    ipt_lora l[2] = {lora_of(TOOLS "a.safetensors"), lora_of(TOOLS "b.safetensors")};
    picture *good = calloc(1, sizeof *good), *again = calloc(1, sizeof *again);
    assert_true(good && again);
    request(&r, l, 2);
    r.compose = "lego";
    assert_ok(ctx, ipt_generate(e, &r, keep, good, NULL));
    for (uint64_t i = 1; i < 1200; i += 23) {
        l[0].weight = 1 + (float)i / 1024; /* never made before */
        ipt_alloc_fail_after(ctx, i);
        ipt_status s = ipt_generate(e, &r, NULL, NULL, NULL);
        ipt_alloc_fail_after(ctx, 0);
        if (s != IPT_OK && s != IPT_ERR_NOMEM)
            fail_msg("allocation %d: %s: %s", (int)i, ipt_status_name(s), ipt_last_error(ctx));
    }
    l[0].weight = 1;
    assert_ok(ctx, ipt_generate(e, &r, keep, again, NULL));
    assert_true(same_picture(good, again));
    free(good);
    free(again);
    test_engine_done(&e, &ctx);
}

/* Steps and blocks that all share are those of the one adapter; others are refused. */
static void windows(void **state)
{
    ipt_ctx *ctx = NULL;
    ipt_request r;
    (void)state;
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    const ipt_lora before = lora_of(TOOLS "a.safetensors");
    ipt_lora l[2] = {before, lora_of(TOOLS "b.safetensors")};
    picture *always = calloc(1, sizeof *always), *some = calloc(1, sizeof *some);
    assert_true(always && some);
    request(&r, l, 2);
    r.compose = "lego";
    assert_ok(ctx, ipt_generate(e, &r, keep, always, NULL));
    for (int i = 0; i < 4; i++) {
        l[0] = before;
        l[0].start = i == 0 ? 0.5F : 0;
        l[0].end = i == 1 ? 0.5F : 1;
        l[0].blocks = i == 2 ? "down:0" : NULL;
        l[0].curve = i == 3 ? "0@0,1@1" : NULL;
        assert_int_equal(ipt_generate(e, &r, NULL, NULL, NULL), IPT_ERR_ARG);
        assert_non_null(strstr(ipt_last_error(ctx), "compose method lego makes one adapter"));
        l[1].start = l[0].start;
        l[1].end = l[0].end;
        l[1].blocks = l[0].blocks;
        l[1].curve = l[0].curve;
        assert_ok(ctx, ipt_generate(e, &r, keep, some, NULL));
        assert_false(same_picture(always, some));
        l[1] = lora_of(TOOLS "b.safetensors");
    }
    l[0] = before; /* nor can one of them have a place of its own */
    static const char *const of_one[] = {"mask.png@lora:a"}, *const of_all[] = {
                                                                 "mask.png@lora:lego"};
    r.region = of_one;
    r.n_region = 1;
    assert_int_equal(ipt_generate(e, &r, NULL, NULL, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(ctx), "no adapter is called 'a'; there is: lego"));
    r.region = of_all;
    assert_int_equal(ipt_generate(e, &r, NULL, NULL, NULL), IPT_ERR_IO); /* the mask is not there */
    r.n_region = 0;
    l[0].weight = (float)NAN;
    assert_int_equal(ipt_generate(e, &r, NULL, NULL, NULL), IPT_ERR_ARG);
    free(always);
    free(some);
    test_engine_done(&e, &ctx);
}

/* A LoHa of rank 1, which is a LoRA of rank 1 for what is done here. */
static void write_loha(const place *p, const char *path)
{
    static const char *const ending[] = {"w1_a", "w1_b", "w2_a", "w2_b"};
    char key[4][160];
    float v[8] = {1, -2, 3, 0.5F, 1, 2, -1, 0.25F};
    ipt_st_write t[4];
    for (size_t i = 0; i < 4; i++) {
        ipt_name(key[i], sizeof key[i],
                 "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.hada_%s",
                 ending[i]);
        t[i] = (ipt_st_write){.name = key[i], .dtype = IPT_ST_F32, .rank = 2, .data = v};
        t[i].dim[0] = i % 2 ? 1 : 8;
        t[i].dim[1] = i % 2 ? 8 : 1;
    }
    assert_ok(p->ctx, ipt_safetensors_write(p->ctx, path, t, 4, NULL, 0));
}

static void refused(void **state)
{
    static const struct {
        const char *file, *option, *said;
    } rows[] = {
        {KINDS "lokr.safetensors", NULL, "lokr.safetensors: unet."},
        {KINDS "dora.safetensors", NULL,
         "found dora, which has no ranks of its own, expected LoRA"},
        {KINDS "full.safetensors", NULL, "found diff"},
        {KINDS "locon.safetensors", "rank=0", "expected a whole number 1..8192"},
        {KINDS "locon.safetensors", "norm=1", "expected one of: 2 inf off"},
        {KINDS "locon.safetensors", "tau=2", "unknown option 'tau=2' for compose method lego"},
    };
    ipt_ctx *ctx = NULL;
    ipt_request r;
    place *p = *state;
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    ipt_lora l[2] = {lora_of(TOOLS "a.safetensors")};
    request(&r, l, 2);
    r.compose = "lego";
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        l[1] = lora_of(rows[i].file);
        r.compose_opt = &rows[i].option;
        r.n_compose_opt = rows[i].option != NULL;
        assert_int_not_equal(ipt_generate(e, &r, NULL, NULL, NULL), IPT_OK);
        if (!strstr(ipt_last_error(ctx), rows[i].said))
            fail_msg("row %zu said: %s", i, ipt_last_error(ctx));
    }
    r.n_compose_opt = 0;
    char loha[PATH_MAX];
    write_loha(p, in(p, loha, "loha.safetensors"));
    const char *const taken[] = {KINDS "locon.safetensors", KINDS "norm.safetensors", loha};
    for (size_t i = 0; i < IPT_COUNT(taken); i++) { /* ranks of their own, or vectors: summed */
        l[1] = lora_of(taken[i]);
        assert_ok(ctx, ipt_generate(e, &r, NULL, NULL, NULL));
    }
    test_engine_done(&e, &ctx);
}

/* --- the program ------------------------------------------------------------------------------ */
static void program(void **state)
{
    place *p = *state;
    result r = RUN(p, "lora", "merge", TOOLS "a.safetensors:0.8", TOOLS "b.safetensors", "-o",
                   "lego.safetensors", "--method", "lego", "--rank", "20", "-m", SD1);
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.out, "5 modules have fewer ranks than --rank: all are kept"));
    assert_non_null(strstr(r.out, "6..6"));
    done(&r);
    r = RUN(p, "lora", "merge", TOOLS "a.safetensors", KINDS "lokr.safetensors", "-o", "x",
            "--method", "lego", "-m", SD1);
    expect_line(&r, 64, "lokr.safetensors: ", "lokr");
    r = RUN(p, "lora", "merge", TOOLS "a.safetensors", "-o", "x", "--method", "lego", "--lego-norm",
            "3", "-m", SD1);
    expect_line(&r, 2, "2 inf off", "norm");
    need_device(p);
    r = RUN(p, "generate", "-m", SD1, "-p", "a cat", "--steps", "2", "-W", "32", "-H", "32",
            "--seed", "3", "--lora", TOOLS "a.safetensors:0.8", "--lora", TOOLS "b.safetensors",
            "--compose", "lego", "--compose-opt", "rank=20", "-o", "l.png", "--json");
    assert_int_equal(r.rc, 0);
    assert_non_null(strstr(r.err, "fewer than 20 ranks together in 5 modules"));
    json_t *o = json_loads(r.out, 0, NULL);
    assert_string_equal(ipt_json_str(json_object_get(o, "compose"), "method", ""), "lego");
    json_decref(o);
    done(&r);
    r = RUN(p, "generate", "--request", "l.png", "-o",
            "again.png"); /* the picture repeats itself */
    assert_int_equal(r.rc, 0);
    done(&r);
    char path[PATH_MAX], *a = NULL, *b = NULL;
    size_t na = 0, nb = 0;
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "l.png"), 1 << 24, &a, &na));
    assert_ok(p->ctx, ipt_file_read(p->ctx, in(p, path, "again.png"), 1 << 24, &b, &nb));
    assert_int_equal(na, nb);
    assert_memory_equal(a, b, na);
    ipt_free(a);
    ipt_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(units_alone_stay),
        cmocka_unit_test(gauge_and_order_do_not_matter),
        cmocka_unit_test(centroids),
        cmocka_unit_test(clusters_are_tight),
        cmocka_unit_test(hostile),
        cmocka_unit_test(out_of_memory),
        cmocka_unit_test(files_beside_the_reference),
        cmocka_unit_test(pictures_of_all_ranks),
        cmocka_unit_test(method_is_the_tool),
        cmocka_unit_test(requests_out_of_memory),
        cmocka_unit_test(windows),
        cmocka_unit_test(refused),
        cmocka_unit_test(program),
    };
    return cmocka_run_group_tests_name("lego", tests, set_up, place_destroy);
}
