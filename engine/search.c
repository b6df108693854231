/* engine/search.c - see search.h. */
#include "engine/search.h"

#include <math.h>
#include <string.h>

/* A success makes steps longer by exp(0.8 / 2), four failures as much shorter: one in five keeps
 * their length.  At least a hundredth, else a bad start would be the end. */
static const double GROWTH = 1.4918246976412703, LEAST = 0.01;

void ipt_search_begin(ipt_search *s, size_t n, double box, uint64_t seed)
{
    *s = (ipt_search){.n = n < IPT_SEARCH_MAX ? n : IPT_SEARCH_MAX,
                      .box = box,
                      .sigma = box / 3,
                      .least = HUGE_VAL,
                      .random = seed};
}

const double *ipt_search_ask(ipt_search *s)
{
    for (size_t i = 0; i < s->n; i++) {
        double step = s->n_asked > 0 ? s->sigma * (double)ipt_rng_normal(&s->random) : 0;
        s->x[i] = fmin(fmax(s->best[i] + step, -s->box), s->box);
    }
    s->n_asked++;
    return s->x;
}

void ipt_search_tell(ipt_search *s, double value)
{
    bool better = value < s->least;
    if (s->n_asked > 1)
        s->sigma =
            better ? fmin(s->sigma * GROWTH, s->box) : fmax(s->sigma * pow(GROWTH, -0.25), LEAST);
    if (!better)
        return;
    memcpy(s->best, s->x, sizeof s->best);
    s->least = value;
}
