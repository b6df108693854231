/* tests/test_compose.c - composing methods in closed form, without a device: rows and worlds, gates
 * from windows and block weights, blends, options. */
#include "tests/support.h"

#include "compose/compose.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STEPS = 12, SLOTS = 3, VALUES = 5 };

/* A job of STEPS steps, two evaluations each. */
typedef struct fixture {
    ipt_ctx *ctx;
    ipt_arena arena;
    ipt_texts texts;
    ipt_job job;
    ipt_slot_use slot[IPT_MAX_SLOT + 1];
    ipt_part part[2];
    int32_t step_of[2 * STEPS];
    uint16_t text[3][2 * STEPS]; /* first part, second part, negative */
    const char *opt[2];
    ipt_rows rows;
    char said[256];
} fixture;

static void keep_line(void *user, ipt_log_level level, const char *line)
{
    fixture *f = user;
    (void)level;
    ipt_name(f->said, sizeof f->said, "%s", line);
}

static int set_up(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    if (!f || ipt_ctx_create(keep_line, f, &f->ctx) != IPT_OK)
        return -1;
    *state = f;
    ipt_arena_init(&f->arena, f->ctx);
    f->texts.arena = &f->arena;
    f->rows.ctx = f->ctx;
    for (int i = 0; i < 2 * STEPS; i++) {
        f->step_of[i] = i / 2;
        f->text[0][i] = (uint16_t)(i < STEPS ? 0 : 3); /* a prompt that is edited half way */
        f->text[1][i] = 1;
        f->text[2][i] = 2;
    }
    for (int s = 0; s <= IPT_MAX_SLOT; s++) {
        f->slot[s] = (ipt_slot_use){.weight = 0.5F + (float)s, .te_weight = 0.25F, .end = 1};
        for (int r = 0; r < IPT_GATE_ROWS; r++)
            f->slot[s].block[r] = 1;
    }
    f->part[0] = (ipt_part){1, f->text[0]};
    f->part[1] = (ipt_part){0.6F, f->text[1]};
    f->job = (ipt_job){.ctx = f->ctx,
                       .n_step = STEPS,
                       .n_eval = 2 * STEPS,
                       .step_of = f->step_of,
                       .n_slot = SLOTS,
                       .slot = f->slot,
                       .texts = &f->texts,
                       .part = f->part,
                       .n_part = 1,
                       .negative = f->text[2],
                       .channels = 1,
                       .h = 1,
                       .w = VALUES,
                       .n_latent = VALUES,
                       .opt = f->opt};
    return 0;
}

static int tear_down(void **state)
{
    fixture *f = *state;
    ipt_rows_finish(&f->rows);
    ipt_arena_finish(&f->arena);
    ipt_ctx_destroy(&f->ctx);
    free(f);
    return 0;
}

static ipt_policy *make(fixture *f, const char *method)
{
    ipt_policy *p = NULL;
    assert_ok(f->ctx, ipt_policy_create(ipt_method_find(method), &f->job, &p));
    return p;
}

/* The adapters that act in world k of evaluation `eval`, as bits. */
static unsigned acting(fixture *f, ipt_policy *p, int32_t eval, size_t world)
{
    unsigned bits = 0;
    assert_ok(f->ctx, ipt_policy_step(p, eval, 0, &f->rows));
    for (size_t i = 0; i < f->rows.n; i++)
        for (int32_t s = 0; s < f->job.n_slot; s++)
            if (f->rows.row[i].world == world && fabsf(f->rows.row[i].slot[s]) > 0)
                bits |= 1U << s;
    return bits;
}

/* --- the table -------------------------------------------------------------------------------- */
static void methods_are_a_table(void **state)
{
    size_t n = 0;
    char names[256], little[8];
    (void)state;
    const ipt_method *const *m = ipt_methods(&n);
    assert_string_equal(ipt_method_names(names, sizeof names),
                        "merge switch composite cmlora clora lego lorahub");
    assert_string_equal(ipt_method_names(little, sizeof little), "merge s");
    assert_ptr_equal(ipt_method_find(NULL), m[0]);
    assert_null(ipt_method_find("blend"));
    assert_null(ipt_method_find(""));
    for (size_t i = 0; i < n; i++) {
        assert_ptr_equal(ipt_method_find(m[i]->name), m[i]);
        assert_true(m[i]->plan && m[i]->brief[0]);
        assert_true(!m[i]->map_grad == !m[i]->latent);
    }
}

/* Every method: rows are whole worlds, plan is pure and is what step gives, in any order. */
static void rows_are_worlds(void **state)
{
    fixture *f = *state;
    size_t n = 0;
    const ipt_method *const *m = ipt_methods(&n);
    for (size_t i = 0; i < n; i++)
        for (f->job.n_slot = 0; f->job.n_slot <= SLOTS && !m[i]->bind; /* test_clora has words */
             f->job.n_slot++)
            for (f->job.n_part = 1; f->job.n_part <= 2; f->job.n_part++) {
                ipt_policy *p = make(f, m[i]->name);
                ipt_rows other = {.ctx = f->ctx};
                for (int32_t k = f->job.n_eval - 1; k >= 0; k--) {
                    assert_ok(f->ctx, ipt_policy_plan(p, k, &other));
                    assert_ok(f->ctx, ipt_policy_step(p, k, 0, &f->rows));
                    assert_int_equal(other.n, f->rows.n);
                    for (size_t r = 0; r < other.n; r++) { /* how it is evaluated may depend */
                        other.row[r].variant = f->rows.row[r].variant;
                        other.row[r].cache = f->rows.row[r].cache;
                        other.row[r].want = f->rows.row[r].want;
                    }
                    assert_memory_equal(other.row, f->rows.row, other.n * sizeof *other.row);
                    size_t worlds = ipt_rows_worlds(&f->rows);
                    assert_true(worlds >= 1 && (worlds == 1 || (int32_t)worlds <= f->job.n_slot));
                    assert_int_equal(f->rows.n, worlds * (size_t)(1 + f->job.n_part));
                    for (size_t w = 0; w < worlds; w++) {
                        size_t negative = 0, part[IPT_MAX_PART];
                        ipt_world_rows(&f->job, &f->rows, w, &negative, part);
                        assert_int_equal(f->rows.row[negative].text, 2);
                        assert_int_equal(f->rows.row[part[0]].text, k < STEPS ? 0 : 3);
                        assert_int_equal(negative + 1, part[0]);
                        if (f->job.n_part == 2)
                            assert_int_equal(f->rows.row[part[1]].text, 1);
                    }
                }
                ipt_rows_finish(&other);
                ipt_policy_destroy(&p);
            }
}

static void without_guidance_no_negative(void **state)
{
    fixture *f = *state;
    f->job.negative = NULL;
    ipt_policy *p = make(f, "composite");
    assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
    assert_int_equal(f->rows.n, SLOTS);
    for (size_t i = 0; i < f->rows.n; i++)
        assert_int_equal(f->rows.row[i].part, 0);
    ipt_policy_destroy(&p);
}

/* --- who acts --------------------------------------------------------------------------------- */
static void merge_is_all_at_once(void **state)
{
    fixture *f = *state;
    ipt_policy *p = make(f, "merge");
    for (int32_t k = 0; k < f->job.n_eval; k++) {
        assert_int_equal(acting(f, p, k, 0), 7);
        assert_int_equal(ipt_rows_worlds(&f->rows), 1);
    }
    ipt_policy_destroy(&p);
}

static void composite_is_one_each(void **state)
{
    fixture *f = *state;
    ipt_policy *p = make(f, "composite");
    for (int32_t k = 0; k < f->job.n_eval; k++)
        for (size_t w = 0; w < SLOTS; w++)
            assert_int_equal(acting(f, p, k, w), 1U << w);
    ipt_policy_destroy(&p);
}

/* One adapter at a time, for tau whole steps (not evaluations), in turn; each has its turn. */
static void switch_switches(void **state)
{
    fixture *f = *state;
    char opt[16];
    f->job.n_opt = 1;
    for (int32_t tau = 1; tau <= 2 * STEPS; tau++)
        for (f->job.n_slot = 1; f->job.n_slot <= 6; f->job.n_slot++) {
            f->opt[0] = ipt_name(opt, sizeof opt, "tau=%d", tau);
            f->said[0] = 0;
            ipt_policy *p = make(f, "switch");
            int32_t n = f->job.n_slot, used = tau, seen = 0, changes = 0;
            unsigned before = 0;
            if (n > 1 && tau * n > STEPS) {
                used = STEPS / n;
                assert_non_null(strstr(f->said, "do not fit into 12 steps"));
            } else {
                assert_string_equal(f->said, "");
            }
            for (int32_t k = 0; k < f->job.n_eval; k++) {
                unsigned now = acting(f, p, k, 0);
                assert_int_equal(now, 1U << (f->step_of[k] / used % n));
                seen |= (int32_t)now;
                changes += k > 0 && now != before;
                before = now;
            }
            assert_int_equal(seen, (1 << n) - 1);
            assert_int_equal(changes, n == 1 ? 0 : (STEPS - 1) / used);
            ipt_policy_destroy(&p);
        }
}

/* img2img begins late: the step counts, not the evaluation. */
static void switch_counts_steps_of_the_request(void **state)
{
    fixture *f = *state;
    for (int i = 0; i < 2 * STEPS; i++)
        f->step_of[i] = 6 + i / 4;
    f->opt[0] = "tau=4";
    f->job.n_opt = 1;
    ipt_policy *p = make(f, "switch");
    assert_int_equal(acting(f, p, 0, 0), 2); /* step 6 is the second adapter's */
    assert_int_equal(acting(f, p, 7, 0), 2);
    assert_int_equal(acting(f, p, 8, 0), 4); /* step 8 */
    ipt_policy_destroy(&p);
}

static void expect(float got, double want)
{
    if (!(fabs((double)got - want) <= 1e-6 * (1 + fabs(want)))) /* a few roundings of f32 */
        fail_msg("%g, expected %g", (double)got, want);
}

/* Who is whole and what each weighs, by the paper's rules, for every number of adapters. */
static void cmlora_takes_turns(void **state)
{
    static const char *const options[] = {"interval=0", "refresh=dominant"};
    fixture *f = *state;
    f->opt[0] = options[0];
    f->opt[1] = options[1];
    f->job.n_opt = 2;
    for (f->job.n_slot = 1; f->job.n_slot <= SLOTS; f->job.n_slot++) {
        ipt_policy *p = make(f, "cmlora");
        for (int picture = 0; picture < 2; picture++) { /* the second begins anew */
            int32_t n = f->job.n_slot, turn = 0, changes = 0, dominant = -1, before = -1;
            double d = n - 0.5;
            for (int32_t k = 0; k < f->job.n_eval; k++) {
                int32_t step = f->step_of[k], a = STEPS * 3 / 8, b = STEPS * 7 / 8;
                bool fresh = step < a   ? step % 2 == 0
                             : step < b ? (step - a) % 3 == 0
                                        : (step - b) % 2 == 0;
                if (fresh && step != before) {
                    int32_t next = turn++ % n;
                    if (dominant >= 0 && next != dominant)
                        d = fmax(1, d - pow(0.5, ++changes));
                    dominant = next;
                }
                before = step;
                assert_ok(f->ctx, ipt_policy_step(p, k, 0, &f->rows));
                for (size_t i = 0; i < f->rows.n; i++) {
                    const ipt_row *r = &f->rows.row[i];
                    bool whole = n == 1 || k == 0 || (fresh && r->world == dominant) ||
                                 k == STEPS; /* where the texts change */
                    assert_int_equal(r->variant, whole ? IPT_UNET_FULL : IPT_UNET_SHALLOW);
                    assert_int_equal(r->cache, i);
                    assert_int_equal((r->want & IPT_WANT_DEEP) != 0, whole && n > 1);
                }
                ipt_result res[16];
                static float eps[16][VALUES];
                float u[VALUES], c[VALUES], other = (float)(n / (d + n - 1));
                double want = 0;
                for (size_t i = 0; i < f->rows.n; i++) {
                    const ipt_row *r = &f->rows.row[i];
                    eps[i][0] = (float)(i + 1);
                    res[i] = (ipt_result){.eps = eps[i]};
                    if (r->part != IPT_NEGATIVE)
                        want +=
                            (r->world == dominant ? d : 1) * (double)other * (double)(i + 1) / n;
                }
                ipt_policy_blend(p, k, &f->rows, res, u, c);
                expect(c[0], want);
            }
        }
        ipt_policy_destroy(&p);
    }
}

/* Adapters whose frequencies are measured: the high ones take turns first, then the low ones. */
static void cmlora_orders_by_profile(void **state)
{
    static const float high[SLOTS] = {0.1F, 0.9F, 0.8F};
    fixture *f = *state;
    unsigned early = 0, late = 0;
    for (int i = 0; i < SLOTS; i++) {
        f->slot[i].has_profile = true;
        f->slot[i].high = high[i];
    }
    f->job.n_slot = SLOTS;
    f->opt[0] = "interval=1";
    f->job.n_opt = 1;
    ipt_policy *p = make(f, "cmlora");
    for (int32_t k = 1; k < f->job.n_eval; k++) {
        assert_ok(f->ctx, ipt_policy_step(p, k, 0, &f->rows));
        for (size_t i = 0; i < f->rows.n; i++)
            if (f->rows.row[i].variant == IPT_UNET_FULL && k != STEPS && k > 1)
                *(f->step_of[k] < 0.55 * STEPS ? &early : &late) |= 1U << f->rows.row[i].world;
    }
    assert_int_equal(early, 6);
    assert_int_equal(late, 1);
    assert_int_equal(ipt_policy_level(p), f->job.outer_level);
    ipt_policy_destroy(&p);
}

/* --- gates ------------------------------------------------------------------------------------ */
/* weight x block x (start <= i / n < end), laid out [row][stride]. */
static void gates_are_products(void **state)
{
    fixture *f = *state;
    float out[IPT_GATE_ROWS][8];
    f->slot[0].start = 0.25F; /* steps 3..8 */
    f->slot[0].end = 0.75F;
    f->slot[1].start = 0.5F; /* 6..11: an end of 1 is the last step too */
    f->slot[1].weight = -2;
    f->slot[2].end = 0; /* never */
    assert_ok(f->ctx, ipt_block_weights(f->ctx, "down:0.5/mid:0/up.2:3", f->slot[0].block));
    ipt_policy *p = make(f, "merge");
    assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
    for (int32_t step = 0; step < STEPS; step++) {
        memset(out, 0x7f, sizeof out);
        ipt_policy_gates(p, &f->rows.row[0], step, &out[0][0], 8);
        for (int r = 0; r < IPT_GATE_ROWS; r++) {
            double block = r >= 1 && r <= 8 ? 0.5 : r == 9 ? 0 : r == 12 ? 3 : 1;
            expect(out[r][0], step >= 3 && step < 9 ? 0.5 * block : 0);
            expect(out[r][1], step >= 6 ? -2 : 0);
            expect(out[r][2], 0);
            assert_true(out[r][3] > 1e38F); /* beside the slots nothing is written */
        }
    }
    ipt_policy_destroy(&p);
}

/* weight x curve, straight between its points and level outside of them. */
static void curves(void **state)
{
    static const char *const bad[] = {"",        "1",           "1@",          "@1",    "1@0,",
                                      "1@0,2@0", "1@0.5,2@0.4", "1@-0.1",      "1@1.5", "101@0",
                                      "nan@0",   "1@0 ,2@1",    "1@0;2@1",     "1@0,x", "1e999@0",
                                      "1@0x1",   " 1@0",        "1@0,2@0.5@1", "--1@0"};
    fixture *f = *state;
    ipt_curve c, ones;
    float out[IPT_GATE_ROWS][8];
    assert_ok(f->ctx, ipt_curve_parse(f->ctx, "-1@0.25,1@0.5,.5@1", &c));
    assert_ok(f->ctx, ipt_curve_parse(f->ctx, "1@0,1@0.3,1@1", &ones));
    assert_int_equal(c.n, 3);
    const struct {
        double at, want;
    } points[] = {{0, -1}, {0.25, -1}, {0.375, 0}, {0.5, 1}, {0.75, 0.75}, {1, 0.5}};
    for (size_t i = 0; i < IPT_COUNT(points); i++)
        expect(ipt_curve_at(&c, (float)points[i].at), points[i].want);
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        assert_int_equal(ipt_curve_parse(f->ctx, bad[i], &c), IPT_ERR_ARG);
        assert_non_null(strstr(ipt_last_error(f->ctx), "rising shares"));
    }
    assert_ok(f->ctx, ipt_curve_parse(f->ctx, "0@0,1@0.5", &c));
    f->slot[0].curve = &c;
    f->slot[1].curve = &ones;
    f->slot[0].weight = 2;
    f->slot[1].weight = 0.3F;
    ipt_policy *p = make(f, "merge");
    assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
    for (int32_t step = 0; step < STEPS; step++) {
        ipt_policy_gates(p, &f->rows.row[0], step, &out[0][0], 8);
        expect(out[3][0], 2 * fmin(1, 2.0 * step / STEPS));
        assert_true(!(out[3][1] < 0.3F) && !(out[3][1] > 0.3F)); /* ones: to the bit */
    }
    ipt_policy_destroy(&p);
    char many[1024] = "";
    for (int i = 0; i <= IPT_MAX_POINT; i++)
        ipt_name(many + strlen(many), sizeof many - strlen(many), "%s1@%.3f", i ? "," : "",
                 i / 100.0);
    assert_int_equal(ipt_curve_parse(f->ctx, many, &c), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "more than 64 points"));
}

static void text_gates(void **state)
{
    static const struct {
        const char *opt;
        double want[2];
    } modes[] = {{"te=active", {0, 0.25}}, {"te=merged", {0.25, 0.25}}, {"te=none", {0, 0}}};
    fixture *f = *state;
    f->job.n_opt = 1;
    f->job.n_slot = 2;
    for (size_t i = 0; i < IPT_COUNT(modes); i++) {
        float out[2];
        f->opt[0] = modes[i].opt;
        ipt_policy *p = make(f, "composite");
        assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
        ipt_policy_text_gates(p, &f->rows.row[f->rows.n - 1], out); /* of the second world */
        expect(out[0], modes[i].want[0]);
        expect(out[1], modes[i].want[1]);
        ipt_policy_destroy(&p);
    }
}

/* --- blends ----------------------------------------------------------------------------------- */
static float value(size_t row, size_t i) { return (float)(row * 10 + i * i) + 0.3F; }

static void blend(fixture *f, ipt_policy *p, float *u, float *c)
{
    static float eps[64][VALUES];
    ipt_result res[64] = {{0}};
    assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
    assert_true(f->rows.n <= 64);
    for (size_t k = 0; k < f->rows.n; k++) {
        for (size_t i = 0; i < VALUES; i++)
            eps[k][i] = value(k, i);
        res[k].eps = eps[k];
    }
    ipt_policy_blend(p, 0, &f->rows, res, u, c);
}

/* One world is its own prediction, bit for bit. */
static void one_world_is_itself(void **state)
{
    static const char *const methods[] = {"merge", "switch", "composite"};
    fixture *f = *state;
    f->job.n_slot = 1;
    for (size_t m = 0; m < IPT_COUNT(methods); m++) {
        float u[VALUES], c[VALUES];
        ipt_policy *p = make(f, methods[m]);
        blend(f, p, u, c);
        for (size_t i = 0; i < VALUES; i++) {
            float want_u = value(0, i), want_c = value(1, i);
            assert_memory_equal(&u[i], &want_u, sizeof want_u);
            assert_memory_equal(&c[i], &want_c, sizeof want_c);
        }
        ipt_policy_destroy(&p);
    }
}

static void worlds_are_averaged(void **state)
{
    fixture *f = *state;
    float u[VALUES], c[VALUES];
    ipt_policy *p = make(f, "composite");
    blend(f, p, u, c);
    for (size_t i = 0; i < VALUES; i++) {
        expect(u[i], (double)(value(0, i) + value(2, i) + value(4, i)) / 3);
        expect(c[i], (double)(value(1, i) + value(3, i) + value(5, i)) / 3);
    }
    ipt_policy_destroy(&p);
}

/* AND: u + sum of w (c - u), for each world. */
static void parts_are_weighted(void **state)
{
    fixture *f = *state;
    float u[VALUES], c[VALUES];
    f->job.n_part = 2;
    f->job.n_slot = 2;
    ipt_policy *p = make(f, "composite");
    blend(f, p, u, c);
    for (size_t i = 0; i < VALUES; i++) {
        double want = 0;
        for (size_t w = 0; w < 2; w++) {
            double un = (double)value(3 * w, i);
            want +=
                un + ((double)value(3 * w + 1, i) - un) + 0.6 * ((double)value(3 * w + 2, i) - un);
        }
        expect(c[i], want / 2);
    }
    ipt_policy_destroy(&p);
    f->job.negative = NULL; /* without one: the weighted sum */
    p = make(f, "merge");
    blend(f, p, u, c);
    for (size_t i = 0; i < VALUES; i++)
        expect(c[i], (double)value(0, i) + 0.6 * (double)value(1, i));
    ipt_policy_destroy(&p);
}

/* --- options and limits ----------------------------------------------------------------------- */
static void bad_options_are_named(void **state)
{
    static const struct {
        const char *method, *opt, *says;
    } rows[] = {
        {"switch", "tau=0", "tau=0: expected a whole number 1..1000"},
        {"switch", "tau=1001", "tau=1001"},
        {"switch", "tau=2.5", "tau=2.5"},
        {"switch", "tau=", "tau="},
        {"switch", "tau=5x", "tau=5x"},
        {"switch", "tau=1e99999", "tau=1e99999"},
        {"switch", "tau=nan", "tau=nan"},
        {"switch", "ta=5", "unknown option 'ta=5' for compose method switch"},
        {"merge", "tau=5", "unknown option 'tau=5' for compose method merge"},
        {"merge", "te=all", "te=all: expected one of: active merged none"},
        {"merge", "te=", "te="},
        {"merge", "te=active merged", "te=active merged"},
        {"merge", "te", "unknown option 'te'"},
        {"merge", "", "unknown option ''"},
        {"merge", "=1", "unknown option '=1'"},
    };
    fixture *f = *state;
    f->job.n_opt = 1;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_policy *p = NULL;
        f->opt[0] = rows[i].opt;
        ipt_status s = ipt_policy_create(ipt_method_find(rows[i].method), &f->job, &p);
        if (s != IPT_ERR_ARG || p || !strstr(ipt_last_error(f->ctx), rows[i].says))
            fail_msg("'%s': %s", rows[i].opt, ipt_last_error(f->ctx));
    }
}

static void limits(void **state)
{
    fixture *f = *state;
    ipt_policy *p = NULL;
    char text[32];
    uint16_t index = 0, again = 1;
    f->job.n_slot = IPT_MAX_SLOT + 1;
    assert_int_equal(ipt_policy_create(ipt_method_find(NULL), &f->job, &p), IPT_ERR_ARG);
    f->job.n_slot = 0;
    f->job.n_part = IPT_MAX_PART + 1;
    assert_int_equal(ipt_policy_create(ipt_method_find(NULL), &f->job, &p), IPT_ERR_ARG);
    f->job.n_part = 1;
    assert_ok(f->ctx, ipt_texts_add(&f->texts, NULL, &index)); /* not given is not "" */
    assert_ok(f->ctx, ipt_texts_add(&f->texts, "", &again));
    assert_true(index == 0 && again == 1);
    assert_ok(f->ctx, ipt_texts_add(&f->texts, NULL, &again));
    assert_int_equal(again, 0);
    for (int i = 2; i < IPT_MAX_TEXT; i++) {
        ipt_name(text, sizeof text, "%d", i);
        assert_ok(f->ctx, ipt_texts_add(&f->texts, text, &index));
        assert_int_equal(index, i);
    }
    assert_int_equal(ipt_texts_add(&f->texts, "one more", &index), IPT_ERR_ARG);
    assert_ok(f->ctx, ipt_texts_add(&f->texts, "2", &index));
    assert_int_equal(index, 2);
}

/* Every allocation that fails is told and leaves nothing behind. */
static void out_of_memory(void **state)
{
    fixture *f = *state;
    for (uint64_t k = 1; k <= 3; k++) {
        ipt_policy *p = NULL;
        ipt_rows_finish(&f->rows);
        ipt_alloc_fail_after(f->ctx, k);
        ipt_status s = ipt_policy_create(ipt_method_find("switch"), &f->job, &p);
        if (s == IPT_OK)
            s = ipt_policy_plan(p, 0, &f->rows);
        ipt_alloc_fail_after(f->ctx, 0);
        assert_int_equal(s, IPT_ERR_NOMEM);
        ipt_policy_destroy(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        CASE(methods_are_a_table),
        CASE(rows_are_worlds),
        CASE(without_guidance_no_negative),
        CASE(merge_is_all_at_once),
        CASE(composite_is_one_each),
        CASE(switch_switches),
        CASE(switch_counts_steps_of_the_request),
        CASE(cmlora_takes_turns),
        CASE(cmlora_orders_by_profile),
        CASE(gates_are_products),
        CASE(curves),
        CASE(text_gates),
        CASE(one_world_is_itself),
        CASE(worlds_are_averaged),
        CASE(parts_are_weighted),
        CASE(bad_options_are_named),
        CASE(limits),
        CASE(out_of_memory),
#undef CASE
    };
    return cmocka_run_group_tests_name("compose", tests, NULL, NULL);
}
