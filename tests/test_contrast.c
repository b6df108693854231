/* tests/test_contrast.c - the loss between attention maps and its gradient; masks. */
#include "tests/clora_job.h"

#include "compose/contrast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- the loss --------------------------------------------------------------------------------- */
/* The loss as the paper writes it, in double, without tricks. */
static double loss_of(const double *x, size_t n, size_t cells, const int32_t *of, double tau)
{
    double e[16][MOST_CELLS], sum = 0, pairs = 0;
    bool used[16];
    for (size_t k = 0; k < n; k++) {
        double lo = x[k * cells], hi = lo, norm = 0;
        for (size_t i = 0; i < cells; i++) {
            lo = fmin(lo, x[k * cells + i]);
            hi = fmax(hi, x[k * cells + i]);
        }
        for (size_t i = 0; i < cells; i++) {
            e[k][i] = (x[k * cells + i] - lo) / (hi - lo + 1e-6);
            norm += e[k][i] * e[k][i];
        }
        used[k] = norm > 0;
        for (size_t i = 0; i < cells && norm > 0; i++)
            e[k][i] /= sqrt(norm);
    }
    for (size_t a = 0; a < n; a++)
        for (size_t p = 0; p < n; p++) {
            double own = 0, others = 0;
            for (size_t k = 0; k < n; k++) {
                double s = 0;
                for (size_t i = 0; i < cells; i++)
                    s += e[a][i] * e[k][i];
                own = k == p ? exp(s / tau) : own;
                others += used[k] && of[k] != of[a] ? exp(s / tau) : 0;
            }
            if (a == p || of[a] != of[p] || !used[a] || !used[p] || !(others > 0))
                continue;
            sum -= log(own / (own + others));
            pairs++;
        }
    return pairs > 0 ? sum / pairs : 0;
}

static void loss_in_closed_form(void **state)
{
    static const int32_t two[] = {0, 0, 1, 1}, one[] = {0, 0, 0, 0}, each[] = {0, 1, 2, 3},
                         odd[] = {7, 7, -1, 3};
    static const struct {
        float x[8];
        const int32_t *of;
        double tau, loss;
    } rows[] = {
        {{1, 0, 1, 0, 0, 1, 0, 1}, two, 0.5, 0.23954515658},   /* log(1 + 2 exp(-2)) */
        {{1, 0, 1, 0, 0, 1, 0, 1}, two, 1, 0.55144471393},     /* log(1 + 2 / e) */
        {{5, 3, 9, 1, 2, 4, 0, .1F}, two, 0.5, 0.23954515658}, /* spread to the same */
        {{1, 0, 0, 1, 1, 0, 0, 1}, two, 0.5, 2.2395447},       /* log(2 + exp(2)) */
        {{1, 0, 1, 0, 0, 1, 0, 1}, one, 0.5, 0},
        {{1, 0, 1, 0, 0, 1, 0, 1}, each, 0.5, 0},
        {{1, 0, 1, 0, 0, 1, 3, 3}, two, 0.5, 0.126928011}, /* flat: one pair, one other */
        {{1, 1, 0, 0, 2, 2, 3, 3}, two, 0.5, 0},           /* all flat */
        {{1, 0, 1, 0, 2, 2, 3, 3}, two, 0.5, 0},           /* no others left */
        {{1, 0, 1, 0, 0, 1, 0, 1}, odd, 0.5, 0.23954515658},
    };
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        double loss = -1, want = rows[i].loss;
        float dx[8] = {0};
        assert_ok(f->ctx,
                  ipt_contrast(f->ctx, rows[i].x, 4, 2, rows[i].of, rows[i].tau, dx, &loss));
        near_to(loss, want, 1e-5, "loss");
        for (int k = 0; k < 8; k++)
            assert_true(isfinite(dx[k]) && (want > 0 || !(fabsf(dx[k]) > 0)));
    }
    double loss = -1;
    assert_ok(f->ctx, ipt_contrast(f->ctx, NULL, 0, 4, NULL, 0.5, NULL, &loss));
    near_to(loss, 0, 0, "of nothing");
}

/* Random maps, some of them flat, some with equal extremes. */
static void random_maps(uint64_t *seed, size_t n, size_t cells, float *x)
{
    for (size_t k = 0; k < n; k++) {
        int32_t kind = (int32_t)(ipt_rng_next(seed) % 8);
        for (size_t i = 0; i < cells; i++)
            x[k * cells + i] = kind == 0   ? 0.25F
                               : kind == 1 ? (float)(ipt_rng_next(seed) % 3) / 8
                                           : uniform(seed);
    }
}

/* Whether a map's minimum and maximum stay where they are when one value moves a little. */
static bool is_smooth(const float *x, size_t cells, size_t at, float by)
{
    float lo = x[0], hi = x[0];
    int n_lo = 0, n_hi = 0;
    for (size_t i = 0; i < cells; i++) {
        lo = fminf(lo, x[i]);
        hi = fmaxf(hi, x[i]);
    }
    for (size_t i = 0; i < cells; i++) {
        n_lo += x[i] < lo + by;
        n_hi += x[i] > hi - by;
    }
    return hi - lo > 4 * by && (n_lo == 1 || x[at] >= lo + by) && (n_hi == 1 || x[at] <= hi - by);
}

static void gradient_is_of_the_loss(void **state)
{
    fixture *f = *state;
    uint64_t seed = 11;
    size_t compared = 0;
    for (int round = 0; round < 300; round++) {
        size_t n = 1 + ipt_rng_next(&seed) % 9, cells = 1 + ipt_rng_next(&seed) % MOST_CELLS;
        float x[9 * MOST_CELLS], dx[9 * MOST_CELLS];
        double wide[9 * MOST_CELLS], tau = 0.2 + (double)uniform(&seed), loss = -1;
        int32_t of[9];
        random_maps(&seed, n, cells, x);
        for (size_t k = 0; k < n; k++)
            of[k] = (int32_t)(ipt_rng_next(&seed) % (1 + (uint64_t)round % 4));
        for (size_t i = 0; i < n * cells; i++) {
            wide[i] = (double)x[i];
            dx[i] = 1; /* which the gradient is added to */
        }
        assert_ok(f->ctx, ipt_contrast(f->ctx, x, n, cells, of, tau, dx, &loss));
        near_to(loss, loss_of(wide, n, cells, of, tau), 1e-12, "loss");
        for (size_t i = 0; i < n * cells; i++) {
            const double h = 1e-6, was = wide[i];
            if (!is_smooth(x + i / cells * cells, cells, i % cells, 1e-4F)) {
                assert_true(isfinite(dx[i]));
                continue;
            }
            wide[i] = was + h;
            double up = loss_of(wide, n, cells, of, tau);
            wide[i] = was - h;
            double slope = (up - loss_of(wide, n, cells, of, tau)) / (2 * h);
            wide[i] = was;
            near_to((double)dx[i], 1 + slope, 2e-5, "gradient"); /* f32 around 1, and h^2 */
            compared++;
        }
    }
    assert_true(compared > 2000);
}

static void loss_knows_no_order(void **state)
{
    enum { N = 7, C = 6 };
    static const int32_t of[N] = {0, 1, 0, 2, 1, 1, 2}, name[3] = {5, -3, 9};
    fixture *f = *state;
    uint64_t seed = 3;
    float x[N * C], y[N * C], dx[N * C], dy[N * C];
    int32_t to[N];
    for (int round = 0; round < 20; round++) {
        double one = 0, two = 0;
        memset(dx, 0, sizeof dx);
        memset(dy, 0, sizeof dy);
        random_maps(&seed, N, C, x);
        size_t turn = ipt_rng_next(&seed) % N, roll = ipt_rng_next(&seed) % C;
        for (size_t k = 0; k < N; k++) {
            to[(k + turn) % N] = name[of[k]];
            for (size_t i = 0; i < C; i++)
                y[(k + turn) % N * C + (i + roll) % C] = x[k * C + i];
        }
        assert_ok(f->ctx, ipt_contrast(f->ctx, x, N, C, of, 0.5, dx, &one));
        assert_ok(f->ctx, ipt_contrast(f->ctx, y, N, C, to, 0.5, dy, &two));
        near_to(one, two, 1e-13, "loss");
        for (size_t k = 0; k < N; k++) /* of equal extremes the first takes all */
            for (size_t i = 0; i < C; i++)
                if (is_smooth(x + k * C, C, i, 1e-4F))
                    near_to((double)dy[(k + turn) % N * C + (i + roll) % C], (double)dx[k * C + i],
                            1e-6, "gradient");
    }
}

/* Cold, large, small and broken values neither overflow nor hang. */
static void loss_of_wild_values(void **state)
{
    static const int32_t of[] = {0, 0, 1, 1};
    static const float wild[] = {1e30F, 1e-30F, -1e30F, 0, INFINITY, NAN};
    fixture *f = *state;
    for (size_t v = 0; v < IPT_COUNT(wild); v++)
        for (double tau = 0.01; tau <= 100; tau *= 100) {
            float x[16], dx[16] = {0};
            double loss = 0;
            for (size_t i = 0; i < 16; i++)
                x[i] = (float)(i * i % 5);
            x[5] = wild[v];
            assert_ok(f->ctx, ipt_contrast(f->ctx, x, 4, 4, of, tau, dx, &loss));
            for (size_t i = 0; i < 16 && isfinite(wild[v]); i++)
                assert_true(isfinite(dx[i]) && isfinite(loss));
        }
}

/* --- masks ------------------------------------------------------------------------------------ */
static void read_mask(const char *text, float *out)
{
    for (size_t i = 0; text[i]; i++)
        out[i] = text[i] == '#' ? 1 : 0;
}

static void masks_morph(void **state)
{
    static const struct {
        ipt_morph how;
        int32_t h, w;
        const char *from, *to;
    } rows[] = {
        {IPT_MORPH_NONE, 2, 3, "#.#.#.", "#.#.#."},
        {IPT_MORPH_DILATE, 3, 5, "#..............", "##...##........"},
        {IPT_MORPH_DILATE, 3, 5, ".......#.......", ".###..###..###."},
        {IPT_MORPH_ERODE, 3, 5, "###############", "###############"}, /* outside is no hole */
        {IPT_MORPH_ERODE, 3, 5, "##########.####", "#####..###..###"},
        {IPT_MORPH_ERODE, 3, 5, "####.####.####.", "###..###..###.."},
        {IPT_MORPH_OPEN, 3, 5, "##...##....", "##...##...."},
        {IPT_MORPH_OPEN, 3, 5, ".......#.......", "..............."},
        {IPT_MORPH_CLOSE, 3, 5, "#######.#######", "###############"},
        {IPT_MORPH_CLOSE, 3, 5, "#...#..........", "#...#.........."},
        {IPT_MORPH_DILATE, 1, 1, "#", "#"},
        {IPT_MORPH_ERODE, 1, 1, "#", "#"},
        {IPT_MORPH_OPEN, 1, 1, ".", "."},
        {IPT_MORPH_CLOSE, 1, 4, "#..#", "####"},
        {IPT_MORPH_ERODE, 4, 1, "##.#", "#..."},
    };
    (void)state;
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        float mask[16] = {0}, want[16] = {0}, scratch[16];
        read_mask(rows[i].from, mask);
        read_mask(rows[i].to, want);
        ipt_mask_morph(rows[i].how, rows[i].h, rows[i].w, mask, scratch);
        for (size_t k = 0; k < IPT_COUNT(mask); k++)
            if (fabsf(mask[k] - want[k]) > 0)
                fail_msg("morph %zu: '%s' is not '%s'", i, rows[i].from, rows[i].to);
    }
}

static void masks_enlarge(void **state)
{
    float from[25], to[11 * 11];
    (void)state;
    for (int32_t gh = 1; gh <= 5; gh++)
        for (int32_t gw = 1; gw <= 5; gw++)
            for (int32_t h = gh; h <= 11; h++)
                for (int32_t w = gw; w <= 11; w += 2) {
                    for (int32_t i = 0; i < gh * gw; i++)
                        from[i] = (float)i;
                    ipt_mask_enlarge(from, gh, gw, to, h, w);
                    for (int32_t y = 0; y < h; y++)
                        for (int32_t x = 0; x < w; x++) {
                            double v = floor((double)y * gh / h), u = floor((double)x * gw / w);
                            assert_int_equal((int)to[y * w + x], (int)v * gw + (int)u);
                        }
                }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        CLORA_CASE(loss_in_closed_form), CLORA_CASE(gradient_is_of_the_loss),
        CLORA_CASE(loss_knows_no_order), CLORA_CASE(loss_of_wild_values),
        CLORA_CASE(masks_morph),         CLORA_CASE(masks_enlarge),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("contrast", tests, NULL, NULL);
}
