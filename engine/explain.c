/* engine/explain.c - what is told beside a picture: the masks by which its method let adapters in,
 * and what each adapter did.  For that the rows in which it acts are evaluated once more without
 * it, at the first evaluation of each step; the sampler never sees them. */
#include "engine/run.h"

#include <math.h>
#include <string.h>

#include "engine/frequency.h"

static const double HIGH = 0.2; /* of the largest radius, from which frequencies are high */

/* --- a request -------------------------------------------------------------------------------- */
/* The methods that make masks, as their names. */
static void name_methods(char *buf, size_t n)
{
    size_t count = 0, at = 0;
    const ipt_method *const *m = ipt_methods(&count);
    buf[0] = 0;
    for (size_t i = 0; i < count; i++)
        if (m[i]->masks && at < n)
            at += (size_t)snprintf(buf + at, n - at, "%s%s", at ? " " : "", m[i]->name);
}

/* Where the adapters' words stand: for methods that read attention, which bind them likewise. */
static ipt_status find_words(ipt_run *u)
{
    ipt_explain *x = &u->explain;
    bool any = false;
    for (int32_t k = 0; k < u->job.n_slot; k++)
        any = any || u->slot[k].word;
    if (!any || ipt_policy_tap(u->policy) < 0)
        return IPT_OK;
    x->concepts = ipt_arena_alloc(&u->arena, sizeof *x->concepts);
    if (!x->concepts)
        return IPT_ERR_NOMEM;
    return ipt_concepts_read(&u->job, "explain", x->concepts);
}

ipt_status ipt_explain_check(ipt_run *u)
{
    const float *v = NULL;
    int32_t slot[IPT_MAX_SLOT];
    char names[256];
    if (u->r->explain && u->job.n_slot == 0)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG,
                        "explain: no adapter acts in this picture; give --lora FILE");
    if (u->r->masks && ipt_policy_masks(u->policy, &v, slot) == 0) {
        name_methods(names, sizeof names);
        return ipt_fail(
            u->e->ctx, IPT_ERR_ARG,
            "compose method %s makes no masks; methods that do: %s (with --lora FILE@WORD)",
            ipt_policy_method(u->policy)->name, names);
    }
    return u->r->explain ? find_words(u) : IPT_OK;
}

static ipt_row without(const ipt_row *row, int32_t slot)
{
    ipt_row r = *row;
    r.slot[slot] = 0;
    r.variant = IPT_UNET_FULL;
    r.want = IPT_WANT_EPS;
    return r;
}

/* In a row whose prediction counts. */
static bool acts(const ipt_row *row, int32_t slot)
{
    return (row->want & IPT_WANT_EPS) && (row->slot[slot] < 0 || row->slot[slot] > 0);
}

/* A row's own text and those of the regions that it sees. */
static ipt_status encode_texts(ipt_run *u, const ipt_row *row)
{
    size_t text = 0;
    IPT_TRY(ipt_job_text(u, row, &text));
    for (int32_t k = 0; k < u->regions.n_text; k++) {
        const ipt_row seen = ipt_regions_row(u, row, k);
        IPT_TRY(ipt_job_text(u, &seen, &text));
    }
    return IPT_OK;
}

ipt_status ipt_explain_plan(ipt_run *u)
{
    size_t n = u->rows.n; /* at most: each once more, whole */
    for (size_t i = 0; u->r->explain && i < u->rows.n; i++)
        for (int32_t k = 0; k < u->job.n_slot; k++) {
            if (!acts(&u->rows.row[i], k))
                continue;
            const ipt_row r = without(&u->rows.row[i], k);
            IPT_TRY(encode_texts(u, &r));
            n++;
        }
    u->explain.max_row = n > u->explain.max_row ? n : u->explain.max_row;
    return IPT_OK;
}

static ipt_status list_steps(ipt_run *u)
{
    ipt_explain *x = &u->explain;
    x->step = ipt_arena_alloc(&u->arena, (size_t)u->n_eval * sizeof *x->step);
    for (int32_t i = 0; x->step && i < u->n_eval; i++)
        if (i == 0 || u->job.step_of[i] != u->job.step_of[i - 1])
            x->step[x->n_step++] = u->job.step_of[i];
    return x->step ? IPT_OK : IPT_ERR_NOMEM;
}

ipt_status ipt_explain_prepare(ipt_run *u)
{
    ipt_explain *x = &u->explain;
    if (!u->r->explain)
        return IPT_OK;
    IPT_TRY(list_steps(u));
    if (x->concepts)
        IPT_TRY(ipt_concepts_bind(&u->job, "explain", x->concepts));
    if (u->maps.tap > 0)
        x->cells = u->maps.n / (size_t)u->job.tokens;
    size_t n = u->set.n, slots = (size_t)u->job.n_slot, steps = (size_t)x->n_step,
           hw = (size_t)u->set.h * (size_t)u->set.w, gates = IPT_GATE_ROWS * slots;
    const struct {
        float **at;
        size_t n;
    } room[] = {{&x->in, n},
                {&x->eps, x->max_row * n},
                {&x->eps_u, n},
                {&x->whole, n},
                {&x->base, n},
                {&x->lack, n},
                {&x->gate_a, gates},
                {&x->gate_b, gates},
                {&x->power, steps},
                {&x->energy, slots * hw},
                {&x->words, slots * x->cells},
                {&x->when, slots * steps},
                {&x->share, slots * steps}};
    for (size_t i = 0; i < IPT_COUNT(room); i++)
        if (!(*room[i].at = ipt_arena_alloc(&u->arena, room[i].n * sizeof(float))))
            return IPT_ERR_NOMEM;
    x->band = ipt_arena_alloc(&u->arena, (IPT_BANDS + 2) * slots * sizeof *x->band);
    x->n_words = ipt_arena_alloc(&u->arena, slots * sizeof *x->n_words);
    x->row = ipt_arena_alloc(&u->arena, x->max_row * sizeof *x->row);
    x->with = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *x->with);
    x->without = ipt_arena_alloc(&u->arena, u->max_rows * sizeof *x->without);
    if (!x->band || !x->n_words || !x->row || !x->with || !x->without)
        return IPT_ERR_NOMEM;
    x->high = x->band + IPT_BANDS * slots;
    x->all = x->high + slots;
    return IPT_OK;
}

void ipt_explain_input(ipt_run *u)
{
    if (u->r->explain)
        memcpy(u->explain.in, u->buf.in, u->set.n * sizeof *u->explain.in);
}

static void begin_picture(ipt_run *u)
{
    ipt_explain *x = &u->explain;
    size_t slots = (size_t)u->job.n_slot, steps = (size_t)x->n_step,
           hw = (size_t)u->set.h * (size_t)u->set.w;
    x->at = -1;
    memset(x->energy, 0, slots * hw * sizeof *x->energy);
    memset(x->words, 0, slots * x->cells * sizeof *x->words);
    memset(x->when, 0, slots * steps * sizeof *x->when);
    memset(x->share, 0, slots * steps * sizeof *x->share);
    memset(x->band, 0, (IPT_BANDS + 2) * slots * sizeof *x->band);
    memset(x->n_words, 0, slots * sizeof *x->n_words);
}

/* --- rows that are evaluated for it ----------------------------------------------------------- */
static ipt_status same_text(ipt_run *u, const ipt_row *a, const ipt_row *b, bool *same)
{
    size_t text_a = 0, text_b = 0;
    IPT_TRY(ipt_job_text(u, a, &text_a));
    IPT_TRY(ipt_job_text(u, b, &text_b));
    *same = *same && text_a == text_b;
    return IPT_OK;
}

static void same_gates(ipt_run *u, const ipt_row *a, const ipt_row *b, int32_t step, bool *same)
{
    const ipt_explain *x = &u->explain;
    size_t slots = (size_t)u->job.n_slot;
    ipt_policy_gates(u->policy, a, step, x->gate_a, slots);
    ipt_policy_gates(u->policy, b, step, x->gate_b, slots);
    *same = *same && memcmp(x->gate_a, x->gate_b, IPT_GATE_ROWS * slots * sizeof(float)) == 0;
}

/* Whether a whole evaluation of both says the same: the same texts, their own and those of regions,
 * under the same gates. */
static ipt_status same_input(ipt_run *u, const ipt_row *a, const ipt_row *b, int32_t step,
                             bool *same)
{
    *same = a->region == b->region;
    same_gates(u, a, b, step, same);
    if (*same)
        IPT_TRY(same_text(u, a, b, same));
    for (int32_t k = 0; k < u->regions.n_text && *same; k++) {
        const ipt_row seen_a = ipt_regions_row(u, a, k), seen_b = ipt_regions_row(u, b, k);
        IPT_TRY(same_text(u, &seen_a, &seen_b, same));
    }
    return IPT_OK;
}

/* The prediction of a row that is evaluated whole: one of the method's, or one that was asked for;
 * NULL: there is none yet. */
static ipt_status find(ipt_run *u, const ipt_row *row, int32_t step, const float **eps)
{
    const ipt_explain *x = &u->explain;
    bool same = false;
    *eps = NULL;
    for (size_t i = 0; i < u->rows.n && !*eps; i++) {
        if (u->rows.row[i].variant != IPT_UNET_FULL || !u->result[i].eps)
            continue;
        IPT_TRY(same_input(u, row, &u->rows.row[i], step, &same));
        *eps = same ? u->result[i].eps : NULL;
    }
    for (size_t i = 0; i < x->n_row && !*eps; i++) {
        IPT_TRY(same_input(u, row, &x->row[i], step, &same));
        *eps = same ? x->eps + i * u->set.n : NULL;
    }
    return IPT_OK;
}

static ipt_status ask(ipt_run *u, const ipt_row *row, int32_t step)
{
    ipt_explain *x = &u->explain;
    const float *eps = NULL;
    IPT_TRY(find(u, row, step, &eps));
    if (eps)
        return IPT_OK;
    if (x->n_row == x->max_row)
        return ipt_fail(u->e->ctx, IPT_ERR_ARG, "explain: more than %zu rows", x->max_row);
    x->row[x->n_row++] = *row;
    return IPT_OK;
}

/* Row i as the method has it, but whole. */
static ipt_row whole(const ipt_run *u, size_t i)
{
    ipt_row r = u->rows.row[i];
    r.variant = IPT_UNET_FULL;
    r.want = IPT_WANT_EPS;
    return r;
}

static ipt_status ask_all(ipt_run *u, int32_t step)
{
    u->explain.n_row = 0;
    for (int32_t k = 0; k < u->job.n_slot; k++)
        for (size_t i = 0; i < u->rows.n; i++) {
            if (!acts(&u->rows.row[i], k))
                continue;
            const ipt_row with = whole(u, i), less = without(&u->rows.row[i], k);
            IPT_TRY(ask(u, &with, step));
            IPT_TRY(ask(u, &less, step));
        }
    return IPT_OK;
}

static ipt_status evaluate(ipt_run *u, double t, int32_t step)
{
    ipt_explain *x = &u->explain;
    uint64_t before = u->rep->rows_full;
    for (size_t i = 0; i < x->n_row; i += (size_t)u->batch) {
        size_t left = x->n_row - i, n = left < (size_t)u->batch ? left : (size_t)u->batch;
        if (ipt_cancelled(u->e->ctx))
            return ipt_fail(u->e->ctx, IPT_ERR_CANCELLED, "cancelled");
        for (size_t k = 0; k < n; k++)
            u->pick_eps[k] = x->eps + (i + k) * u->set.n;
        IPT_TRY(ipt_unet_rows(u, x->in, t, step, x->row + i, n, u->pick_eps, NULL));
        u->rep->rows_explain += n;
        u->rep->rows_full = before;
    }
    return IPT_OK;
}

/* --- what is measured ------------------------------------------------------------------------- */
static double mean_square(const float *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)v[i] * (double)v[i];
    return sum / (double)n;
}

/* Of a contribution v [C,h,w]: where, when, at which frequencies. */
static ipt_status measure(ipt_run *u, int32_t k, const float *v)
{
    ipt_explain *x = &u->explain;
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, c = (size_t)u->set.channels,
           at = (size_t)k * (size_t)x->n_step + (size_t)x->at;
    float *energy = x->energy + (size_t)k * hw, scale = 1.0F / (float)(c * (size_t)x->n_step);
    double sum = mean_square(v, u->set.n), power = (double)x->power[x->at], band[IPT_BANDS],
           high = 0;
    if (!isfinite(sum))
        return ipt_fail(u->e->ctx, IPT_ERR_FORMAT,
                        "explain: the prediction without %s at step %d is not finite",
                        u->rep->adapter[k].name, x->step[x->at] + 1);
    for (size_t i = 0; i < u->set.n; i++)
        energy[i % hw] += v[i] * v[i] * scale;
    x->when[at] = (float)sum;
    x->share[at] = power > 0 ? (float)(sum / power) : 0;
    IPT_TRY(
        ipt_frequency_bands(u->e->ctx, v, u->set.channels, u->set.h, u->set.w, HIGH, band, &high));
    for (size_t i = 0; i < IPT_BANDS; i++)
        x->band[(size_t)k * IPT_BANDS + i] += band[i];
    x->high[k] += high;
    x->all[k] += sum;
    return IPT_OK;
}

/* Guided predictions with and without adapter k: x->base and x->lack.  *is_there: it acts. */
static ipt_status compare(ipt_run *u, int32_t eval, int32_t k, bool *is_there)
{
    ipt_explain *x = &u->explain;
    int32_t step = u->job.step_of[eval];
    *is_there = false;
    memcpy(x->with, u->result, u->rows.n * sizeof *x->with);
    memcpy(x->without, u->result, u->rows.n * sizeof *x->without);
    for (size_t i = 0; i < u->rows.n; i++) {
        if (!acts(&u->rows.row[i], k))
            continue;
        const ipt_row with = whole(u, i), less = without(&u->rows.row[i], k);
        if (u->rows.row[i].variant != IPT_UNET_FULL)
            IPT_TRY(find(u, &with, step, &x->with[i].eps));
        IPT_TRY(find(u, &less, step, &x->without[i].eps));
        *is_there = true;
    }
    if (!*is_there)
        return IPT_OK;
    ipt_rows_guide(u, eval, x->with, x->eps_u, x->base);
    ipt_rows_guide(u, eval, x->without, x->eps_u, x->lack);
    return IPT_OK;
}

/* Adds what concept c's words look at in row i of the evaluation. */
static void add_words(ipt_run *u, int32_t eval, int32_t c, size_t i)
{
    ipt_explain *x = &u->explain;
    const ipt_wording *v = ipt_concepts_at(x->concepts, &u->job, eval);
    const ipt_row *row = &u->rows.row[i];
    int32_t slot = x->concepts->of[c].slot;
    if (!v || !u->result[i].maps || !acts(row, slot) || row->part == IPT_NEGATIVE ||
        row->text != v->text[c + 1])
        return;
    const ipt_places *p = ipt_concepts_place(x->concepts, v, c + 1, c);
    float *words = x->words + (size_t)slot * x->cells;
    for (size_t cell = 0; cell < x->cells; cell++)
        for (int32_t k = 0; k < p->n; k++)
            words[cell] += u->result[i].maps[cell * (size_t)u->job.tokens + p->at[k]] / (float)p->n;
    x->n_words[slot]++;
}

static bool is_first(const ipt_run *u, int32_t eval)
{
    return eval == 0 || u->job.step_of[eval] != u->job.step_of[eval - 1];
}

ipt_status ipt_explain_step(ipt_run *u, double t, int32_t eval)
{
    ipt_explain *x = &u->explain;
    if (!u->r->explain || !is_first(u, eval))
        return IPT_OK;
    if (eval == 0)
        begin_picture(u);
    x->at++;
    IPT_TRY(ask_all(u, u->job.step_of[eval]));
    IPT_TRY(evaluate(u, t, u->job.step_of[eval]));
    ipt_rows_guide(u, eval, u->result, x->eps_u, x->whole);
    x->power[x->at] = (float)mean_square(x->whole, u->set.n);
    for (int32_t k = 0; k < u->job.n_slot; k++) {
        bool is_there = false;
        IPT_TRY(compare(u, eval, k, &is_there));
        for (size_t i = 0; is_there && i < u->set.n; i++)
            x->lack[i] = x->base[i] - x->lack[i];
        if (is_there)
            IPT_TRY(measure(u, k, x->lack));
    }
    for (int32_t c = 0; x->concepts && c < x->concepts->n; c++)
        for (size_t i = 0; i < u->rows.n; i++)
            add_words(u, eval, c, i);
    return IPT_OK;
}

/* --- what is given ---------------------------------------------------------------------------- */
/* An adapter that the method made of all is called as the method, and is no file's. */
static ipt_effect effect_of(const ipt_run *u, size_t k)
{
    const ipt_explain *x = &u->explain;
    const ipt_adapter_report *a = &u->rep->adapter[k];
    bool is_one = u->e->set->one != NULL;
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, steps = (size_t)x->n_step;
    ipt_effect f = {.name = is_one ? u->slot[k].file : a->name,
                    .file = is_one ? NULL : a->file,
                    .word = u->slot[k].word,
                    .energy = x->energy + k * hw,
                    .when = x->when + k * steps,
                    .share = x->share + k * steps,
                    .high = x->all[k] > 0 ? (float)(x->high[k] / x->all[k]) : 0};
    for (size_t i = 0; i < IPT_BANDS; i++)
        f.band[i] = (float)(x->band[k * IPT_BANDS + i] / (double)steps);
    if (x->n_words[k] > 0) {
        const ipt_grid *g = &u->job.grid[u->maps.tap - 1];
        f.words = x->words + k * x->cells;
        f.words_h = g->h;
        f.words_w = g->w;
    }
    return f;
}

static ipt_status give_explanation(ipt_run *u, int32_t k, const ipt_image *im)
{
    ipt_explain *x = &u->explain;
    ipt_effect effect[IPT_MAX_SLOT];
    const float *mask = NULL;
    int32_t slot[IPT_MAX_SLOT];
    size_t n = (size_t)u->job.n_slot, n_mask = ipt_policy_masks(u->policy, &mask, slot),
           hw = (size_t)u->set.h * (size_t)u->set.w;
    for (size_t i = 0; i < n; i++) {
        for (size_t c = 0; x->n_words[i] > 0 && c < x->cells; c++)
            x->words[i * x->cells + c] /= (float)x->n_words[i];
        effect[i] = effect_of(u, i);
    }
    for (size_t i = 0; i < n_mask; i++)
        effect[slot[i]].mask = mask + i * hw;
    const ipt_explanation v = {k, u->set.h, u->set.w, x->n_step, x->step, x->power, im, effect, n};
    return u->r->explain(u->r->explain_user, &v);
}

static ipt_status give_masks(ipt_run *u, int32_t k, const ipt_image *im)
{
    const float *v = NULL;
    int32_t slot[IPT_MAX_SLOT];
    ipt_mask list[IPT_MAX_SLOT];
    size_t hw = (size_t)u->set.h * (size_t)u->set.w, n = ipt_policy_masks(u->policy, &v, slot);
    for (size_t i = 0; i < n; i++)
        list[i] = (ipt_mask){u->rep->adapter[slot[i]].name, u->slot[slot[i]].word, v + i * hw};
    const ipt_masks m = {k, u->set.h, u->set.w, im, list, n};
    return u->r->masks(u->r->masks_user, &m);
}

ipt_status ipt_explain_give(ipt_run *u, int32_t k, const ipt_image *im)
{
    if (u->r->masks)
        IPT_TRY(give_masks(u, k, im));
    return u->r->explain ? give_explanation(u, k, im) : IPT_OK;
}
