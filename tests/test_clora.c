/* tests/test_clora.c - CLoRA without a device: rounds of an evaluation, updates of the latent,
 * masks, blends.  Its words: test_concepts.c; its loss: test_contrast.c; with a device:
 * test_clora_run.c. */
#include "tests/clora_job.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static ipt_policy *make(fixture *f, const char *o1, const char *o2, const char *o3)
{
    const char *const o[] = {o1, o2, o3};
    ipt_policy *p = NULL;
    f->job.n_opt = 0;
    for (size_t i = 0; i < IPT_COUNT(o); i++)
        if (o[i])
            f->opt[f->job.n_opt++] = o[i];
    assert_ok(f->ctx, ipt_policy_create(&ipt_method_clora, &f->job, &p));
    assert_ok(f->ctx, ipt_policy_bind(p));
    return p;
}

/* --- what is asked for, round by round -------------------------------------------------------- */
/* The rows of a round, each "world, n or p, wants": "0nE 0pEM". */
static const char *rows_text(const fixture *f, char *out, size_t n)
{
    size_t at = 0;
    out[0] = 0;
    for (size_t i = 0; i < f->rows.n; i++) {
        const ipt_row *r = &f->rows.row[i];
        assert_int_equal(r->variant, IPT_UNET_FULL);
        assert_true(r->text == (r->part == IPT_NEGATIVE ? f->negative[0] : f->text[0]));
        at += (size_t)snprintf(
            out + at, n - at, "%s%d%s%s%s%s", i ? " " : "", r->world,
            r->part == IPT_NEGATIVE ? "n" : "p", r->want & IPT_WANT_EPS ? "E" : "",
            r->want & IPT_WANT_MAPS ? "M" : "", r->want & IPT_WANT_GRAD ? "G" : "");
    }
    return out;
}

/* Results of the rows, as an engine gives them. */
static void answer(fixture *f)
{
    const ipt_grid *g = &f->job.grid[1];
    for (size_t i = 0; i < f->rows.n; i++) {
        f->res[i] = (ipt_result){0};
        memset(f->d_maps[i], 0, sizeof f->d_maps[i]);
        for (int k = 0; k < g->h * g->w * TOKENS; k++)
            f->maps[i][k] = uniform(&f->seed);
        for (int k = 0; k < VALUES; k++)
            f->eps[i][k] = uniform(&f->seed);
        if (f->rows.row[i].want & IPT_WANT_MAPS)
            f->res[i].maps = f->maps[i];
        if (f->rows.row[i].want & IPT_WANT_EPS)
            f->res[i].eps = f->eps[i];
    }
}

/* One evaluation as the engine runs it, with this gradient each round; how many updates it had, and
 * the rounds' rows one after the other, joined by '|'. */
static int32_t evaluate(fixture *f, ipt_policy *p, int32_t eval, float slope, float *z, char *told,
                        size_t n_told)
{
    float d[VALUES], *dm[MOST_ROWS], u[VALUES], c[VALUES];
    char text[512];
    int32_t updates = 0;
    bool again = true;
    told[0] = 0;
    for (int i = 0; i < VALUES; i++)
        d[i] = slope;
    for (int i = 0; i < MOST_ROWS; i++)
        dm[i] = f->d_maps[i];
    for (int32_t round = 0; again; round++) {
        bool moves = false;
        double loss = -1;
        again = false;
        assert_ok(f->ctx, ipt_policy_step(p, eval, round, &f->rows));
        ipt_name(told + strlen(told), n_told - strlen(told), "%s%s", round ? "|" : "",
                 rows_text(f, text, sizeof text));
        answer(f);
        for (size_t i = 0; i < f->rows.n; i++)
            moves = moves || (f->rows.row[i].want & IPT_WANT_GRAD);
        if (moves) {
            assert_ok(f->ctx, ipt_policy_map_grad(p, eval, &f->rows, f->res, dm, &loss));
            assert_ok(f->ctx, ipt_policy_latent(p, eval, round, d, z, &again));
            assert_true(loss > 0);
            updates++;
        }
    }
    ipt_policy_blend(p, eval, &f->rows, f->res, u, c); /* whose predictions are there */
    for (int i = 0; i < VALUES; i++)
        assert_true(isfinite(u[i]) && isfinite(c[i]));
    return updates;
}

static void fill(float *v, float with)
{
    for (int i = 0; i < VALUES; i++)
        v[i] = with;
}

static bool is_same_row(const ipt_row *a, const ipt_row *b)
{
    bool same = a->text == b->text;
    for (int i = 0; i < IPT_MAX_SLOT; i++)
        same = same && !(fabsf(a->slot[i] - b->slot[i]) > 0);
    return same;
}

static void rows_by_round(void **state)
{
#define THREE "0nE 0pE 1nE 1pE 2nE 2pE"
#define LAST "0nE 0pEM 1nE 1pEM 2nE 2pEM"
#define BOTH "0nEM 0pEM 1nEM 1pEM 2nEM 2pEM"
#define MOVE "0pMG 1pMG 2pMG"
#define MOVE_BOTH "0nMG 0pMG 1nMG 1pMG 2nMG 2pMG"
    static const struct {
        const char *opt[3], *words, *told;
        bool has_negative;
    } rows[] = {
        {{"refine=0"}, "cat;dog", MOVE "|" LAST, true},
        {{"refine=2"}, "cat;dog;-", MOVE "|" MOVE "|" MOVE "|" LAST, true},
        {{"refine=1"}, "cat;dog", MOVE "|" MOVE "|0pEM 1pEM 2pEM", false},
        {{"refine=0", "maps=both"}, "cat;dog", MOVE_BOTH "|" BOTH, true},
        {{"refine=0", "refresh=off"}, "cat;dog", "0nE 0pEMG 1nE 1pEMG 2nE 2pEMG", true},
        {{"refine=1", "refresh=off"}, "-;cat;dog", MOVE "|0nE 0pEMG 1nE 1pEMG 2nE 2pEMG", true},
        {{"refine=1", "refresh=off", "maps=both"},
         "cat;dog",
         MOVE_BOTH "|0nEMG 0pEMG 1nEMG 1pEMG 2nEMG 2pEMG",
         true},
        {{"update=off"}, "cat;dog", LAST, true},
        {{"until=0"}, "cat;dog", LAST, true},
        {{"update=off", "maps=both"}, "cat;dog", BOTH, true},
        {{"update=off", "masks=mean"}, "cat;dog", THREE, true},
        {{"update=off", "masks=full"}, "cat;dog", "0nE 0pE 1nE 1pE", true},
        {{"update=off", "masks=full"}, "cat", "0pE", false},
        {{"refine=0", "masks=full"}, "cat;dog", MOVE "|0nE 0pEM 1nE 1pEM", true},
        {{"refine=0", "masks=full", "refresh=off"},
         "cat;dog",
         "0nE 0pEMG 1nE 1pEMG 2nE 2pEMG",
         true},
        {{"refine=0", "masks=mean"}, "cat;dog", MOVE "|" LAST, true},
        {{NULL}, "cat", "0nE 0pEM 1nE 1pEM", true}, /* one concept: nothing to keep apart */
        {{"masks=full"}, "-;cat", "0nE 0pE", true},
        {{"masks=mean"}, "cat", "0nE 0pE 1nE 1pE", true},
    };
    fixture *f = *state;
    char told[1024];
    float z[VALUES];
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        give_prompt(f, "a cat and a dog");
        give_words(f, rows[i].words);
        f->job.negative = rows[i].has_negative ? f->negative : NULL;
        ipt_policy *p = make(f, rows[i].opt[0], rows[i].opt[1], rows[i].opt[2]);
        ipt_rows all = {.ctx = f->ctx};
        assert_ok(f->ctx, ipt_policy_plan(p, 0, &all));
        fill(z, 1);
        evaluate(f, p, 0, 0.001F, z, told, sizeof told);
        if (strcmp(told, rows[i].told) != 0)
            fail_msg("row %zu: %s, expected %s", i, told, rows[i].told);
        for (size_t k = 0; k < f->rows.n; k++) { /* plan has them all */
            bool known = false;
            for (size_t j = 0; j < all.n; j++)
                known = known || is_same_row(&all.row[j], &f->rows.row[k]);
            assert_true(known);
        }
        assert_true(all.n >= f->rows.n);
        ipt_rows_finish(&all);
        ipt_policy_destroy(&p);
    }
    f->job.negative = f->negative;
}

/* Concepts in their own worlds, styles in all. */
static void who_acts(void **state)
{
    static const float want[3][4] = {{0, 1, 0, 1}, {1, 1, 0, 1}, {0, 1, 1, 1}};
    fixture *f = *state;
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;-;dog;-");
    for (int full = 0; full < 2; full++) {
        ipt_policy *p = make(f, "update=off", full ? "masks=full" : NULL, NULL);
        assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
        assert_int_equal(f->rows.n, full ? 4 : 6);
        for (size_t i = 0; i < f->rows.n; i++)
            assert_memory_equal(f->rows.row[i].slot, want[f->rows.row[i].world + full],
                                sizeof want[0]);
        ipt_policy_destroy(&p);
    }
}

/* Updates by step, counted anew from the definition. */
static int32_t expected_updates(double every, double until, int32_t refine, int32_t n_step,
                                int32_t step)
{
    bool fine = step == 0;
    for (int32_t k = 0; every > 0 && k <= n_step / (every * n_step) + 2 && k < 100000; k++)
        fine = fine || (int32_t)floor(k * (every * n_step) + 0.5) == step;
    return step < until * n_step ? 1 + (fine ? refine : 0) : 0;
}

static void updates_by_step(void **state)
{
    static const int32_t counts[] = {1, 2, 3, 7, 20, 50}, refines[] = {0, 3};
    static const char *const every[] = {"0", "0.1", "0.2", "0.37", "0.5", "1", "0.001"},
                             *const until[] = {"0", "0.3", "0.5", "1"};
    fixture *f = *state;
    char o[3][32], told[2048];
    float z[VALUES];
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    for (size_t c = 0; c < IPT_COUNT(counts); c++)
        for (size_t e = 0; e < IPT_COUNT(every); e++)
            for (size_t u = 0; u < IPT_COUNT(until); u++)
                for (size_t r = 0; r < IPT_COUNT(refines); r++) {
                    int32_t each = 1 + (int32_t)((c + e + u + r) % 2); /* evaluations a step */
                    int32_t first = counts[c] > 2 && e == 1 ? counts[c] / 3 : 0; /* img2img */
                    set_steps(f, counts[c], each, first);
                    ipt_name(o[0], sizeof o[0], "every=%s", every[e]);
                    ipt_name(o[1], sizeof o[1], "until=%s", until[u]);
                    ipt_name(o[2], sizeof o[2], "refine=%d", refines[r]);
                    ipt_policy *p = make(f, o[0], o[1], o[2]);
                    for (int32_t i = 0; i < f->job.n_eval; i++) {
                        fill(z, 1);
                        int32_t got = evaluate(f, p, i, 0.001F, z, told, sizeof told),
                                want = i % each
                                           ? 0
                                           : expected_updates(atof(every[e]), atof(until[u]),
                                                              refines[r], counts[c], f->step_of[i]);
                        if (got != want)
                            fail_msg("%d steps, %s, %s, %s: evaluation %d: %d updates, expected %d",
                                     counts[c], o[0], o[1], o[2], i, got, want);
                    }
                    ipt_policy_destroy(&p);
                }
}

/* Shares too small to count in 32 bits: every step is a refinement step. */
static void tiny_shares(void **state)
{
    static const char *const every[] = {"every=1e-12", "every=1e-300"};
    fixture *f = *state;
    char told[1024];
    float z[VALUES];
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    for (size_t e = 0; e < IPT_COUNT(every); e++) {
        ipt_policy *p = make(f, every[e], "until=1", "refine=1");
        fill(z, 1);
        for (int32_t i = 0; i < f->job.n_eval; i++)
            assert_int_equal(evaluate(f, p, i, 0.001F, z, told, sizeof told), 2);
        ipt_policy_destroy(&p);
    }
}

/* z - step_size d, or as far as the guard lets it. */
static void latents_move(void **state)
{
    static const struct {
        const char *step, *guard;
        float slope;
        double by;
    } rows[] = {
        {"step_size=20", "guard=1000", 0.01F, 0.2},   {"step_size=0.5", "guard=0.1", 0.01F, 0.005},
        {"step_size=20", "guard=0.1", 0.01F, 0.1},    {"step_size=20", "guard=0.1", -0.01F, -0.1},
        {"step_size=20", "guard=0.1", 1e30F, 0.1},    {"step_size=0", "guard=0.1", 0.01F, 0},
        {"step_size=20", "guard=0", 0.01F, 0},        {"step_size=20", "guard=0.1", 0, 0},
        {"step_size=1e6", "guard=0.25", 1e-3F, 0.25},
    };
    fixture *f = *state;
    char told[256];
    float z[VALUES];
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_policy *p = make(f, rows[i].step, rows[i].guard, "refine=0");
        fill(z, 1);
        assert_int_equal(evaluate(f, p, 0, rows[i].slope, z, told, sizeof told), 1);
        for (int k = 0; k < VALUES; k++)
            near_to((double)z[k], 1 - rows[i].by, 1e-6, "latent");
        fill(z, 0); /* nothing may move further than a share of nothing */
        evaluate(f, p, 0, rows[i].slope, z, told, sizeof told);
        for (int k = 0; k < VALUES; k++)
            near_to((double)z[k], 0, 0, "latent of zeros");
        ipt_policy_destroy(&p);
    }
}

/* Not finite: this picture goes on without; the next one begins anew. */
static void broken_gradients_stop(void **state)
{
    static const float broken[] = {NAN, INFINITY, -INFINITY, 3e38F};
    fixture *f = *state;
    char told[1024];
    float z[VALUES];
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    for (size_t b = 0; b < IPT_COUNT(broken); b++)
        for (int off = 0; off < 2; off++) {
            ipt_policy *p = make(f, off ? "refresh=off" : NULL, "refine=3", "step_size=1e6");
            const bool is_sum = isfinite(broken[b]); /* its square is finite in double */
            fill(z, 1);
            f->said[0] = 0;
            assert_int_equal(evaluate(f, p, 0, 0, z, told, sizeof told), 4);
            assert_int_equal(evaluate(f, p, 1, broken[b], z, told, sizeof told), 1);
            assert_string_equal(told, off ? "0nE 0pEMG 1nE 1pEMG 2nE 2pEMG" : MOVE "|" LAST);
            assert_int_equal(strstr(f->said, "no further updates") != NULL, !is_sum);
            for (int k = 0; k < VALUES && !is_sum; k++)
                near_to((double)z[k], 1, 0, "latent");
            assert_int_equal(evaluate(f, p, 2, 0.001F, z, told, sizeof told), is_sum ? 4 : 0);
            assert_int_equal(evaluate(f, p, 0, 0.001F, z, told, sizeof told), 4);
            assert_int_equal(evaluate(f, p, 0, broken[b], z, told, sizeof told), is_sum ? 4 : 1);
            assert_string_equal(told + strlen(told) - strlen(off && is_sum ? "2pEMG" : "2pEM"),
                                off && is_sum ? "2pEMG" : "2pEM");
            ipt_policy_destroy(&p);
        }
}

/* --- masks and blends ------------------------------------------------------------------------- */
/* Maps of world j: what its concept's token looks at, 0.1 elsewhere; predictions 10 j + row kind.
 */
static void blend_of(fixture *f, ipt_policy *p, int32_t eval, const char *const look[],
                     const uint16_t *token, float *u, float *c)
{
    const int cells = f->job.grid[1].h * f->job.grid[1].w;
    assert_ok(f->ctx, ipt_policy_step(p, eval, 0, &f->rows));
    for (size_t i = 0; i < f->rows.n; i++) {
        const ipt_row *r = &f->rows.row[i];
        const char *at = look[r->world];
        memset(f->maps[i], 0, sizeof f->maps[i]);
        for (int k = 0; k < cells && at; k++)
            f->maps[i][k * TOKENS + token[r->world]] = (float)(at[k] - '0') / 9;
        for (int k = 0; k < VALUES; k++)
            f->eps[i][k] = (float)(10 * r->world + (r->part == IPT_NEGATIVE ? 1 : 2));
        f->res[i] =
            (ipt_result){.eps = f->eps[i], .maps = r->want & IPT_WANT_MAPS ? f->maps[i] : NULL};
    }
    ipt_policy_blend(p, eval, &f->rows, f->res, u, c);
}

static void blends_by_masks(void **state)
{
    /* what concept 1 and 2 look at on 4 x 4 cells, 0..9; the worlds of each cell as hex bits */
    static const struct {
        const char *opt[2], *one, *two, *worlds;
    } rows[] = {
        {{NULL}, "9900990000000000", "0000000000990099", "2211221111441144"},
        {{NULL}, "9900990000000000", "0990099000000000", "2641264111111111"},
        {{"threshold=0.5"}, "9540540000000000", "0000000000000009", "2211211111111114"},
        {{"threshold=1"}, "9900990000000000", "0000000000000009", "1111111111111111"},
        {{"threshold=0"}, "1100110000000000", "0000000000000009", "2211221111111114"},
        {{"overlap=argmax"}, "9500990000000000", "0990099000000000", "2441224111111111"},
        {{"overlap=argmax"}, "9900000000000000", "9900000000000000", "2211111111111111"},
        {{"overlap=argmax", "morph=dilate"},
         "9000000000000000",
         "0090000000000000",
         "2244224411111111"},
        {{"morph=dilate"}, "9000000000000000", "0000000000000009", "2211221111441144"},
        {{"morph=open"}, "9900990000000009", "0000000000000000", "2211221111111111"},
        {{"masks=mean"}, "9900990000000000", "0000000000000009", "7777777777777777"},
        {{"masks=full"}, "9900990000000000", "0000000000000009", "6666666666666666"},
        {{NULL}, "0000000000000000", "0000000000000000", "1111111111111111"},
    };
    static const uint16_t token[] = {0, 2, 5};
    fixture *f = *state;
    f->job.grid[1].h = f->job.grid[1].w = SIDE;
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        float u[VALUES], c[VALUES];
        const bool full = rows[i].opt[0] && strcmp(rows[i].opt[0], "masks=full") == 0;
        const char *const look[] = {NULL, rows[i].one, rows[i].two};
        ipt_policy *p = make(f, rows[i].opt[0], rows[i].opt[1], "update=off");
        const float *mask = NULL;
        int32_t slot[IPT_MAX_SLOT];
        blend_of(f, p, 0, look, token, u, c);
        assert_int_equal(ipt_policy_masks(p, &mask, slot), 2);
        assert_true(slot[0] == 0 && slot[1] == 1);
        for (int k = 0; k < SIDE * SIDE; k++) {
            unsigned want = (unsigned)strtoul((char[]){rows[i].worlds[k], 0}, NULL, 16);
            double sum = 0, n = 0;
            for (unsigned j = 0; j < 3; j++) {
                sum += want >> j & 1 ? 10 * (double)(j - full) + 1 : 0;
                n += want >> j & 1;
            }
            for (int ch = 0; ch < CHANNELS; ch++) {
                near_to((double)u[ch * SIDE * SIDE + k], sum / n, 1e-6, "negative");
                near_to((double)c[ch * SIDE * SIDE + k], sum / n + 1, 1e-6, "positive");
            }
            for (int j = 0; j < 2; j++)
                near_to((double)mask[j * SIDE * SIDE + k], want >> (j + 1) & 1, 0, "mask");
        }
        ipt_policy_destroy(&p);
    }
}

/* masks=mean holds before a share of the steps. */
static void masks_come_later(void **state)
{
    static const uint16_t token[] = {0, 2, 5};
    static const char *const look[] = {NULL, "9000", "0009"};
    fixture *f = *state;
    set_steps(f, 10, 2, 2); /* from a picture: the step counts */
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    ipt_policy *p = make(f, "mask_after=0.55", "update=off", NULL);
    for (int32_t i = 0; i < f->job.n_eval; i++) {
        float u[VALUES], c[VALUES];
        blend_of(f, p, i, look, token, u, c);
        near_to((double)c[0], 12, 1e-6, "cell of world 1, which is the mean too");
        near_to((double)c[3], f->step_of[i] >= 6 ? 2 : 12, 1e-6, "cell of world 0");
        near_to((double)c[VALUES - 1], f->step_of[i] >= 6 ? 22 : 12, 1e-6, "cell of world 2");
    }
    ipt_policy_destroy(&p);
}

/* maps=both: the mean of both rows. */
static void maps_of_both_rows(void **state)
{
    fixture *f = *state;
    float u[VALUES], c[VALUES];
    give_prompt(f, "a cat");
    give_words(f, "cat");
    ipt_policy *p = make(f, "maps=both", "threshold=0.5", NULL);
    assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
    answer(f);
    assert_int_equal(f->rows.n, 4);
    for (int i = 2; i < 4; i++) /* negative 0 1 0 0, positive 1 0 0.9 0: only half of it each */
        for (int k = 0; k < CELLS; k++)
            f->maps[i][k * TOKENS + 2] = i == 2 ? (float)(k == 1) : k == 0 ? 1 : k == 2 ? 0.4F : 0;
    ipt_policy_blend(p, 0, &f->rows, f->res, u, c);
    const float *mask = NULL;
    int32_t slot[IPT_MAX_SLOT];
    assert_int_equal(ipt_policy_masks(p, &mask, slot), 1);
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++)
            near_to((double)mask[y * SIDE + x], y < 2, 0, "mask");
    ipt_policy_destroy(&p);
}

/* Which level is read where none is asked for. */
static void level_by_size(void **state)
{
    static const struct {
        int32_t side, cross; /* of the latent; levels with cross-attention, as bits */
        int tap;
    } rows[] = {
        {64, 7, 2},  {64, 15, 2}, {64, 3, 1},  {64, 8, 3},   {64, 9, 3}, {32, 15, 2},
        {28, 15, 1}, {28, 14, 1}, {30, 12, 2}, {16, 15, 1},  {8, 15, 0}, {7, 15, 0},
        {7, 12, 2},  {1, 8, 3},   {128, 8, 3}, {128, 10, 3},
    };
    fixture *f = *state;
    give_prompt(f, "a cat");
    give_words(f, "cat");
    f->job.n_grid = 4;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        for (int32_t k = 0, n = rows[i].side; k < 4; k++, n = n / 2 + n % 2)
            f->job.grid[k] = (ipt_grid){n / 1, 2 * n, rows[i].cross >> k & 1};
        ipt_policy *p = make(f, NULL, NULL, NULL);
        if (ipt_policy_tap(p) != rows[i].tap)
            fail_msg("row %zu: level %d, expected %d", i, ipt_policy_tap(p), rows[i].tap);
        ipt_policy_destroy(&p);
    }
    ipt_policy *p = make(f, "grid=3", NULL, NULL);
    assert_int_equal(ipt_policy_tap(p), 3);
    ipt_policy_destroy(&p);
    p = make(f, "masks=mean", "grid=0", NULL); /* nothing reads it */
    assert_int_equal(ipt_policy_tap(p), -1);
    ipt_policy_destroy(&p);
}

static void wrong_options(void **state)
{
    static const struct {
        const char *opt, *says;
    } rows[] = {
        {"grid=0", "clora: grid=0: this model's unet has no cross-attention there"},
        {"grid=2", "no cross-attention there"},
        {"grid=8", "compose option grid=8: expected a whole number -1..7"},
        {"refine=-1", "0..1000"},
        {"refine=1001", "0..1000"},
        {"every=1.5", "0..1"},
        {"until=-0.1", "0..1"},
        {"tau=0", "0.01..100"},
        {"guard=nan", "0..1000"},
        {"step_size=1e7", "0..1e+06"},
        {"threshold=2", "0..1"},
        {"morph=thin", "expected one of: none dilate erode open close"},
        {"maps=all", "expected one of: cond both"},
        {"masks=none", "expected one of: attention mean full"},
        {"overlap=max", "expected one of: mean argmax"},
        {"update=yes", "expected one of: on off"},
        {"refresh=1", "expected one of: on off"},
        {"levels=2", "unknown option 'levels=2' for compose method clora"},
    };
    fixture *f = *state;
    give_prompt(f, "a cat");
    give_words(f, "cat");
    f->job.n_opt = 1;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_policy *p = NULL;
        f->opt[0] = rows[i].opt;
        if (ipt_policy_create(&ipt_method_clora, &f->job, &p) != IPT_ERR_ARG || p ||
            !strstr(ipt_last_error(f->ctx), rows[i].says))
            fail_msg("%s: %s", rows[i].opt, ipt_last_error(f->ctx));
    }
    ipt_policy *p = NULL;
    f->job.grid[1].has_cross = false;
    f->job.n_opt = 0;
    assert_int_equal(ipt_policy_create(&ipt_method_clora, &f->job, &p), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "this model's unet has no cross-attention"));
    f->opt[0] = "masks=mean"; /* which needs none */
    f->job.n_opt = 1;
    assert_ok(f->ctx, ipt_policy_create(&ipt_method_clora, &f->job, &p));
    ipt_policy_destroy(&p);
}

/* A grid of one cell, where every map is flat: no loss, no harm. */
static void one_cell(void **state)
{
    fixture *f = *state;
    float *dm[MOST_ROWS], z[VALUES], u[VALUES], c[VALUES];
    double loss = -1;
    f->job.grid[1].h = f->job.grid[1].w = 1;
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;dog");
    ipt_policy *p = make(f, "refine=0", "refresh=off", NULL);
    assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
    answer(f);
    for (int i = 0; i < MOST_ROWS; i++)
        dm[i] = f->d_maps[i];
    assert_ok(f->ctx, ipt_policy_map_grad(p, 0, &f->rows, f->res, dm, &loss));
    near_to(loss, 0, 0, "loss");
    for (size_t i = 0; i < f->rows.n; i++)
        for (int k = 0; k < TOKENS; k++)
            near_to((double)dm[i][k], 0, 0, "gradient");
    bool again = true;
    fill(z, 1);
    assert_ok(f->ctx, ipt_policy_latent(p, 0, 0, dm[0], z, &again));
    assert_false(again);
    ipt_policy_blend(p, 0, &f->rows, f->res, u, c);
    for (int k = 0; k < VALUES; k++)
        near_to((double)u[k], (double)(f->eps[2][k] + f->eps[4][k]) / 2, 1e-6, "both masks");
    ipt_policy_destroy(&p);
}

/* The gradient of the maps is the loss's: of the tokens' own columns, on the rows that have maps.
 */
static void gradient_goes_to_the_rows(void **state)
{
    fixture *f = *state;
    float *dm[MOST_ROWS];
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat=big cat;-;dog");
    for (int both = 0; both < 2; both++) {
        ipt_policy *p = make(f, both ? "maps=both" : NULL, "tau=0.7", NULL);
        double loss = 0, up = 0, none = 0;
        assert_ok(f->ctx, ipt_policy_step(p, 0, 0, &f->rows));
        answer(f);
        for (int i = 0; i < MOST_ROWS; i++)
            dm[i] = f->d_maps[i];
        assert_ok(f->ctx, ipt_policy_map_grad(p, 0, &f->rows, f->res, dm, &loss));
        for (size_t i = 0; i < f->rows.n; i++)
            for (int k = 0; k < CELLS * TOKENS; k++) {
                static float spare[MOST_ROWS][CELLS * TOKENS];
                float *ds[MOST_ROWS], was = f->maps[i][k], h = 1e-3F;
                int token = k % TOKENS;
                const bool second = f->rows.row[i].world == 1; /* a big cat and a dog */
                bool is_bound = token == 2 || token == 5 + second || (second && token == 3);
                if (!is_bound) {
                    near_to((double)dm[i][k], 0, 0, "a word of nobody");
                    continue;
                }
                for (int r = 0; r < MOST_ROWS; r++)
                    ds[r] = spare[r];
                f->maps[i][k] = was + h;
                assert_ok(f->ctx, ipt_policy_map_grad(p, 0, &f->rows, f->res, ds, &up));
                f->maps[i][k] = was - h;
                assert_ok(f->ctx, ipt_policy_map_grad(p, 0, &f->rows, f->res, ds, &none));
                f->maps[i][k] = was;
                near_to((double)dm[i][k], (up - none) / (2 * (double)h), 3e-3, "gradient");
            }
        ipt_policy_destroy(&p);
    }
}

/* --- limits ----------------------------------------------------------------------------------- */
/* Every allocation that fails is told and leaves nothing behind. */
static void out_of_memory(void **state)
{
    fixture *f = *state;
    float *dm[MOST_ROWS];
    ipt_status s = IPT_ERR_NOMEM;
    uint64_t k = 1;
    give_words(f, "cat=big cat;dog");
    for (int i = 0; i < MOST_ROWS; i++)
        dm[i] = f->d_maps[i];
    for (; s == IPT_ERR_NOMEM; k++) {
        ipt_policy *p = NULL;
        double loss = 0;
        ipt_arena_finish(&f->arena);
        ipt_arena_init(&f->arena, f->ctx);
        give_prompt(f, "a cat and a dog");
        give_words(f, "cat=big cat;dog");
        ipt_rows_finish(&f->rows);
        ipt_alloc_fail_after(f->ctx, k);
        s = ipt_policy_create(&ipt_method_clora, &f->job, &p);
        if (s == IPT_OK)
            s = ipt_policy_bind(p);
        if (s == IPT_OK)
            s = ipt_policy_step(p, 0, 0, &f->rows);
        if (s == IPT_OK) {
            answer(f);
            s = ipt_policy_map_grad(p, 0, &f->rows, f->res, dm, &loss);
        }
        ipt_alloc_fail_after(f->ctx, 0);
        ipt_policy_destroy(&p);
        assert_true(s == IPT_OK || s == IPT_ERR_NOMEM);
    }
    assert_int_equal(s, IPT_OK);
    assert_true(k > 8);
}

/* A loss of more maps than memory is worth is refused, not tried. */
static void too_many_maps(void **state)
{
    fixture *f = *state;
    ipt_policy *p = NULL;
    char words[2048], text[2048];
    size_t at = 0, n = 0;
    for (int i = 0; i < IPT_MAX_SLOT - 1; i++) {
        at += (size_t)snprintf(words + at, sizeof words - at, "%sqq%c%ccccdddeeefff", i ? ";" : "",
                               'a' + i % 26, 'a' + i / 26);
        n += (size_t)snprintf(text + n, sizeof text - n, "qq%c%ccccdddeeefff ", 'a' + i % 26,
                              'a' + i / 26);
    }
    give_prompt(f, text);
    give_words(f, words);
    f->job.n_opt = 0;
    for (int off = 0; off < 2; off++) {
        f->opt[0] = "update=off";
        f->job.n_opt = (size_t)off;
        assert_ok(f->ctx, ipt_policy_create(&ipt_method_clora, &f->job, &p));
        assert_int_equal(ipt_policy_bind(p), off ? IPT_OK : IPT_ERR_ARG);
        if (!off)
            assert_non_null(strstr(ipt_last_error(f->ctx),
                                   "clora: the words' tokens have 5952 maps in "
                                   "all worlds; 4096 can be kept apart"));
        ipt_policy_destroy(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        CLORA_CASE(rows_by_round),
        CLORA_CASE(who_acts),
        CLORA_CASE(updates_by_step),
        CLORA_CASE(tiny_shares),
        CLORA_CASE(latents_move),
        CLORA_CASE(broken_gradients_stop),
        CLORA_CASE(blends_by_masks),
        CLORA_CASE(masks_come_later),
        CLORA_CASE(maps_of_both_rows),
        CLORA_CASE(level_by_size),
        CLORA_CASE(wrong_options),
        CLORA_CASE(one_cell),
        CLORA_CASE(gradient_goes_to_the_rows),
        CLORA_CASE(out_of_memory),
        CLORA_CASE(too_many_maps),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("clora", tests, NULL, NULL);
}
