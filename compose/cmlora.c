/* compose/cmlora.c - CMLoRA: a world for each adapter alone, as Composite, of which one at a time
 * is dominant: it weighs more and its deep features are fresh; the others run the UNet's outer
 * layers on theirs.  Adapters that act on high frequencies take turns early, those on low ones
 * late.
 *
 * Source: Zou et al. 2025, Cached Multi-LoRA Composition (arXiv 2502.04923).  As meant there, not
 * as its code runs: the dominant weight decays (the code never recomputes it), refreshed is who is
 * dominant, the late pool is refreshed too, and 0 as interval is a cache and not none. */
#include "compose/policy.h"

#include <string.h>

enum { DOMINANT, ALL, ALWAYS };          /* refresh */
enum { BY_PROFILE, AS_GIVEN, REVERSED }; /* order */
enum { BY_DOMINANCE, EQUAL };            /* weights */
enum { ON, OFF };                        /* decay */

typedef struct state {
    /* options */
    int32_t interval, refresh, order, decay, weights, level;
    double early;
    /* of the request */
    int32_t n;      /* worlds */
    int32_t n_high; /* the first of `sorted` */
    int32_t sorted[IPT_MAX_SLOT];
    /* of the picture */
    int32_t step, turn, dominant, n_change;
    double d;
    bool is_full[IPT_MAX_SLOT], is_filled[IPT_MAX_SLOT];
    uint16_t text[IPT_MAX_SLOT][IPT_MAX_PART + 1]; /* of a world's rows when they were last whole */
} state;

static void defaults(void *st)
{
    state *s = st;
    s->early = 0.55;
    s->level = -1;
}

/* --- who is high ------------------------------------------------------------------------------ */
/* Falling by measured high frequencies, and cut where they fall most. */
static void sort_by_profile(state *s, const ipt_job *job)
{
    float most = 0;
    for (int32_t i = 1; i < s->n; i++)
        for (int32_t k = i;
             k > 0 && job->slot[s->sorted[k]].high > job->slot[s->sorted[k - 1]].high; k--) {
            int32_t t = s->sorted[k];
            s->sorted[k] = s->sorted[k - 1];
            s->sorted[k - 1] = t;
        }
    for (int32_t i = 1; i < s->n; i++) {
        float gap = job->slot[s->sorted[i - 1]].high - job->slot[s->sorted[i]].high;
        if (gap > most) {
            most = gap;
            s->n_high = i;
        }
    }
}

static ipt_status begin(void *st, const ipt_job *job)
{
    state *s = st;
    bool is_known = job->n_slot > 0;
    s->n = job->n_slot > 0 ? job->n_slot : 1;
    s->n_high = s->n;
    for (int32_t i = 0; i < s->n; i++) {
        s->sorted[i] = s->order == REVERSED ? s->n - 1 - i : i;
        is_known = is_known && job->slot[i].has_profile;
    }
    if (s->order == BY_PROFILE && is_known)
        sort_by_profile(s, job);
    else if (s->order == BY_PROFILE && job->n_slot > 1)
        ipt_log(
            job->ctx, IPT_LOG_INFO,
            "cmlora: not every adapter's frequencies are measured; they take turns in the order "
            "given");
    return IPT_OK;
}

/* --- rows ------------------------------------------------------------------------------------- */
static ipt_status plan(const void *st, const ipt_job *job, int32_t eval, ipt_rows *rows)
{
    (void)st;
    return ipt_method_composite.plan(NULL, job, eval, rows);
}

/* Every interval-th step; published: every 2nd up to 3/8 of the steps and from 7/8 on, every 3rd
 * between. */
static bool is_refresh(const state *s, int32_t step, int32_t n_step)
{
    int32_t middle = n_step * 3 / 8, late = n_step * 7 / 8;
    if (s->interval > 0)
        return step % s->interval == 0;
    return step < middle ? step % 2 == 0
           : step < late ? (step - middle) % 3 == 0
                         : (step - late) % 2 == 0;
}

static void next_dominant(state *s, const ipt_job *job, int32_t step)
{
    bool is_early = step < s->early * job->n_step;
    int32_t first = is_early ? 0 : s->n_high, n = is_early ? s->n_high : s->n - s->n_high;
    if (n == 0)
        first = 0, n = s->n;
    int32_t next = s->sorted[first + s->turn++ % n];
    if (s->dominant >= 0 && next != s->dominant && s->decay == ON) {
        double fall = 1;
        s->n_change++;
        for (int32_t i = 0; i < s->n_change && i < 64; i++)
            fall /= 2;
        s->d = s->d - fall > 1 ? s->d - fall : 1;
    }
    s->dominant = next;
}

static void begin_step(state *s, const ipt_job *job, int32_t step, bool is_first)
{
    bool refresh = is_first || is_refresh(s, step, job->n_step);
    if (is_first) {
        s->turn = s->n_change = 0;
        s->dominant = -1;
        s->d = s->n - 0.5;
        memset(s->is_filled, 0, sizeof s->is_filled);
    }
    s->step = step;
    if (refresh)
        next_dominant(s, job, step);
    for (int32_t k = 0; k < s->n; k++)
        s->is_full[k] = s->n == 1 || (k == s->dominant && (refresh || s->refresh == ALWAYS)) ||
                        (refresh && s->refresh != DOMINANT);
}

/* Features of another prompt are not used. */
static bool same_texts(state *s, const ipt_rows *rows, size_t world)
{
    bool same = true;
    for (size_t i = 0; i < rows->n; i++)
        if (rows->row[i].world == world)
            same = same && s->text[world][rows->row[i].part + 1] == rows->row[i].text;
    return same;
}

static ipt_status step(void *st, const ipt_job *job, int32_t eval, int32_t round, ipt_rows *rows)
{
    state *s = st;
    (void)round;
    if (eval == 0 || job->step_of[eval] != s->step)
        begin_step(s, job, job->step_of[eval], eval == 0);
    IPT_TRY(plan(st, job, eval, rows));
    for (size_t k = 0; k < (size_t)s->n; k++) {
        bool full = s->is_full[k] || !s->is_filled[k] || !same_texts(s, rows, k);
        for (size_t i = 0; i < rows->n; i++) {
            ipt_row *r = &rows->row[i];
            if (r->world != k)
                continue;
            r->cache = (uint16_t)i;
            r->variant = full ? IPT_UNET_FULL : IPT_UNET_SHALLOW;
            r->want = full && s->n > 1 ? IPT_WANT_EPS | IPT_WANT_DEEP : IPT_WANT_EPS;
            if (full)
                s->text[k][r->part + 1] = r->text;
        }
        s->is_filled[k] = s->is_filled[k] || full;
    }
    return IPT_OK;
}

/* --- what they say ---------------------------------------------------------------------------- */
static void blend(void *st, const ipt_job *job, int32_t eval, const ipt_rows *rows,
                  const ipt_result *res, float *eps_u, float *eps_c)
{
    const state *s = st;
    float weight[IPT_MAX_SLOT];
    double other = s->n / (s->d + s->n - 1);
    (void)eval;
    for (int32_t k = 0; k < s->n; k++)
        weight[k] = s->weights == EQUAL ? 1.0F
                    : k == s->dominant  ? (float)(s->d * other)
                                        : (float)other;
    ipt_blend_weighted(job, rows, res, weight, eps_u, eps_c);
}

static int32_t level(const void *st, const ipt_job *job)
{
    const state *s = st;
    return s->n == 1 ? -1 : s->level < 0 ? job->outer_level : s->level; /* one: always whole */
}

static const ipt_option option[] = {
    {"interval", "N", "steps between refreshes; 0, the default: 2, then 3, then 2, as published",
     IPT_OPTION_INT, offsetof(state, interval), 0, 1000, NULL},
    {"refresh", "WHO",
     "dominant (default), all; always: the dominant in every step, all at refreshes",
     IPT_OPTION_CHOICE, offsetof(state, refresh), 0, 0, "dominant all always"},
    {"early", "SHARE", "of the steps, in which high frequencies take turns, default 0.55",
     IPT_OPTION_NUMBER, offsetof(state, early), 0, 1, NULL},
    {"order", "HOW", "by measured profile (default), given, reverse", IPT_OPTION_CHOICE,
     offsetof(state, order), 0, 0, "profile given reverse"},
    {"weights", "HOW", "dominant (default): N - 0.5 times another's; equal", IPT_OPTION_CHOICE,
     offsetof(state, weights), 0, 0, "dominant equal"},
    {"decay", "on|off", "the dominant's weight falls with each change, default on",
     IPT_OPTION_CHOICE, offsetof(state, decay), 0, 0, "on off"},
    {"level", "L", "as in --cache N:L; -1, the default: the outermost block", IPT_OPTION_INT,
     offsetof(state, level), -1, 64, NULL},
    {0},
};

const ipt_method ipt_method_cmlora = {
    .name = "cmlora",
    .brief = "as composite, one LoRA dominant at a time, the others on kept features",
    .option = option,
    .wants_profile = true,
    .state_size = sizeof(state),
    .defaults = defaults,
    .begin = begin,
    .plan = plan,
    .step = step,
    .blend = blend,
    .level = level,
};
