/* compose/policy.c - a method at work: its options, its rows, gates from slots, windows and block
 * weights. */
#include "compose/policy.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Which adapters act in the text encoder. */
typedef enum te_mode { TE_ACTIVE, TE_MERGED, TE_NONE } te_mode;
typedef struct common {
    int32_t te;
} common;

struct ipt_policy {
    const ipt_method *method;
    const ipt_job *job;
    common common;
    void *state;
};

static const ipt_option common_option[] = {
    {"te", "active|merged|none",
     "LoRAs in the text encoder: those of the row (default), all at their weights, none",
     IPT_OPTION_CHOICE, offsetof(common, te), 0, 0, "active merged none"},
    {0},
};

const ipt_option *ipt_policy_options(void) { return common_option; }

/* --- options ---------------------------------------------------------------------------------- */
/* Place of a word in a list of words, -1 when it is none of them. */
static int32_t word_index(const char *words, const char *word)
{
    size_t n = strlen(word);
    int32_t i = 0;
    for (const char *w = words; *w; i++) {
        size_t len = strcspn(w, " ");
        if (n == len && memcmp(w, word, n) == 0)
            return i;
        w += len;
        w += strspn(w, " ");
    }
    return -1;
}

static ipt_status read_value(ipt_ctx *ctx, const ipt_option *o, const char *v, void *into)
{
    char *at = (char *)into + o->at, *end = NULL;
    if (o->type == IPT_OPTION_CHOICE) {
        int32_t choice = word_index(o->choices, v);
        if (choice < 0)
            return ipt_fail(ctx, IPT_ERR_ARG, "compose option %s=%s: expected one of: %s", o->key,
                            v, o->choices);
        memcpy(at, &choice, sizeof choice);
        return IPT_OK;
    }
    bool plain = v[0] && strspn(v, "+-.0123456789eE") == strlen(v);
    errno = 0;
    double x = plain ? strtod(v, &end) : 0;
    bool whole = o->type != IPT_OPTION_INT || (plain && strspn(v, "+-0123456789") == strlen(v));
    if (!plain || *end || errno || !isfinite(x) || x < o->min || x > o->max || !whole)
        return ipt_fail(ctx, IPT_ERR_ARG, "compose option %s=%s: expected %s%g..%g", o->key, v,
                        o->type == IPT_OPTION_INT ? "a whole number " : "", o->min, o->max);
    if (o->type == IPT_OPTION_INT)
        memcpy(at, &(int32_t){(int32_t)x}, sizeof(int32_t));
    else
        memcpy(at, &x, sizeof x);
    return IPT_OK;
}

static const ipt_option *find_option(const ipt_option *table, const char *key, size_t n)
{
    for (const ipt_option *o = table; o && o->key; o++)
        if (strlen(o->key) == n && memcmp(o->key, key, n) == 0)
            return o;
    return NULL;
}

static ipt_status read_option(ipt_ctx *ctx, const ipt_method *m, const char *text, void *state,
                              common *c)
{
    size_t n = strcspn(text, "=");
    const ipt_option *own = find_option(m->option, text, n),
                     *all = find_option(common_option, text, n);
    if (text[n] != '=' || (!own && !all))
        return ipt_fail(ctx, IPT_ERR_ARG, "unknown option '%s' for compose method %s", text,
                        m->name);
    return own ? read_value(ctx, own, text + n + 1, state) : read_value(ctx, all, text + n + 1, c);
}

/* The method's state with its options in it.  Ownership: caller, ipt_free, also after a failure. */
static ipt_status read_options(ipt_ctx *ctx, const ipt_method *m, const char *const *opt, size_t n,
                               void **state, common *c)
{
    *state = ipt_alloc(ctx, m->state_size);
    if (!*state)
        return IPT_ERR_NOMEM;
    if (m->defaults)
        m->defaults(*state);
    for (size_t i = 0; i < n; i++)
        IPT_TRY(read_option(ctx, m, opt[i], *state, c));
    return IPT_OK;
}

ipt_status ipt_method_combine(const ipt_method *m, ipt_ctx *ctx, const char *const *opt,
                              size_t n_opt, struct ipt_tool *t, const struct ipt_merge_input *in,
                              size_t n)
{
    void *state = NULL;
    common c = {0};
    ipt_status s = read_options(ctx, m, opt, n_opt, &state, &c);
    if (s == IPT_OK)
        s = m->combine(state, t, in, n);
    ipt_free(state);
    return s;
}

/* --- life ------------------------------------------------------------------------------------- */
ipt_status ipt_policy_create(const ipt_method *m, const ipt_job *job, ipt_policy **out)
{
    if (job->n_slot > IPT_MAX_SLOT)
        return ipt_fail(job->ctx, IPT_ERR_ARG, "%d adapters given, at most %d at once", job->n_slot,
                        IPT_MAX_SLOT);
    if (job->n_part < 1 || job->n_part > IPT_MAX_PART)
        return ipt_fail(job->ctx, IPT_ERR_ARG, "%d prompts joined by AND, expected 1 to %d",
                        job->n_part, IPT_MAX_PART);
    ipt_policy *p = ipt_alloc(job->ctx, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    p->method = m;
    p->job = job;
    ipt_status status = read_options(job->ctx, m, job->opt, job->n_opt, &p->state, &p->common);
    if (status == IPT_OK && m->begin)
        status = m->begin(p->state, job);
    if (status != IPT_OK) {
        ipt_policy_destroy(&p);
        return status;
    }
    *out = p;
    return IPT_OK;
}

void ipt_policy_destroy(ipt_policy **pp)
{
    if (!pp || !*pp)
        return;
    ipt_free((*pp)->state);
    ipt_free(*pp);
    *pp = NULL;
}

const ipt_method *ipt_policy_method(const ipt_policy *p) { return p->method; }

int32_t ipt_policy_level(const ipt_policy *p)
{
    return p->method->level ? p->method->level(p->state, p->job) : -1;
}

int32_t ipt_policy_tap(const ipt_policy *p)
{
    return p->method->tap ? p->method->tap(p->state, p->job) : -1;
}

ipt_status ipt_policy_bind(ipt_policy *p)
{
    return p->method->bind ? p->method->bind(p->state, p->job) : IPT_OK;
}

ipt_status ipt_policy_map_grad(ipt_policy *p, int32_t eval, const ipt_rows *rows,
                               const ipt_result *res, float *const *d_maps, double *loss)
{
    return p->method->map_grad(p->state, p->job, eval, rows, res, d_maps, loss);
}

ipt_status ipt_policy_latent(ipt_policy *p, int32_t eval, int32_t round, const float *d_latent,
                             float *latent, bool *again)
{
    return p->method->latent(p->state, p->job, eval, round, d_latent, latent, again);
}

size_t ipt_policy_masks(const ipt_policy *p, const float **mask, int32_t slot[IPT_MAX_SLOT])
{
    return p->method->masks ? p->method->masks(p->state, p->job, mask, slot) : 0;
}

ipt_status ipt_texts_add(ipt_texts *t, const char *text, uint16_t *index)
{
    ipt_ctx *ctx = t->arena->ctx;
    for (size_t i = 0; i < t->n; i++)
        if (text && t->text[i] ? strcmp(text, t->text[i]) == 0 : text == t->text[i]) {
            *index = (uint16_t)i;
            return IPT_OK;
        }
    size_t bytes = text ? strlen(text) + 1 : 1;
    if (t->n >= IPT_MAX_TEXT || bytes > IPT_MAX_TEXT_BYTES - t->bytes)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "the prompts change into more than %d texts, or into more than %d MiB",
                        IPT_MAX_TEXT, IPT_MAX_TEXT_BYTES >> 20);
    if (!t->text) {
        const char **list = ipt_arena_alloc(t->arena, IPT_MAX_TEXT * sizeof *list);
        if (!list)
            return IPT_ERR_NOMEM;
        t->text = list;
    }
    char *copy = text ? ipt_arena_strdup(t->arena, text) : NULL;
    if (text && !copy)
        return IPT_ERR_NOMEM;
    t->bytes += bytes;
    *index = (uint16_t)t->n;
    t->text[t->n++] = copy;
    return IPT_OK;
}

/* --- rows ------------------------------------------------------------------------------------- */
ipt_status ipt_rows_add(ipt_rows *r, const ipt_row *row)
{
    if (r->n == r->cap) {
        size_t cap = r->cap ? 2 * r->cap : 8;
        ipt_row *v = ipt_regrow(r->ctx, r->row, r->cap * sizeof *v, cap * sizeof *v);
        if (!v)
            return IPT_ERR_NOMEM;
        r->row = v;
        r->cap = cap;
    }
    r->row[r->n++] = *row;
    return IPT_OK;
}

ipt_status ipt_rows_world(ipt_rows *r, const ipt_job *job, int32_t eval, const float *slot)
{
    ipt_row row = {.world = (uint16_t)ipt_rows_worlds(r), .want = IPT_WANT_EPS};
    memcpy(row.slot, slot, (size_t)job->n_slot * sizeof *slot);
    if (job->negative) {
        row.part = IPT_NEGATIVE;
        row.text = job->negative[eval];
        IPT_TRY(ipt_rows_add(r, &row));
    }
    for (int16_t k = 0; k < job->n_part; k++) {
        row.part = k;
        row.text = job->part[k].text[eval];
        IPT_TRY(ipt_rows_add(r, &row));
    }
    return IPT_OK;
}

size_t ipt_rows_worlds(const ipt_rows *r)
{
    size_t n = 0;
    for (size_t i = 0; i < r->n; i++)
        n = r->row[i].world + 1U > n ? r->row[i].world + 1U : n;
    return n;
}

void ipt_rows_finish(ipt_rows *r)
{
    ipt_free(r->row);
    *r = (ipt_rows){.ctx = r->ctx};
}

ipt_status ipt_policy_plan(const ipt_policy *p, int32_t eval, ipt_rows *r)
{
    r->n = 0;
    return p->method->plan(p->state, p->job, eval, r);
}

ipt_status ipt_policy_step(ipt_policy *p, int32_t eval, int32_t round, ipt_rows *r)
{
    r->n = 0;
    return p->method->step ? p->method->step(p->state, p->job, eval, round, r)
                           : p->method->plan(p->state, p->job, eval, r);
}

/* --- blends ----------------------------------------------------------------------------------- */
void ipt_world_rows(const ipt_job *job, const ipt_rows *rows, size_t world, size_t *negative,
                    size_t part[IPT_MAX_PART])
{
    *negative = SIZE_MAX;
    for (int32_t k = 0; k < job->n_part; k++)
        part[k] = SIZE_MAX;
    for (size_t i = 0; i < rows->n; i++)
        if (rows->row[i].world == world && rows->row[i].part == IPT_NEGATIVE)
            *negative = i;
        else if (rows->row[i].world == world)
            part[rows->row[i].part] = i;
}

/* One prompt as it is: its prediction needs no sum with the negative one's. */
static bool is_plain(const ipt_job *job)
{
    return job->n_part == 1 && !(job->part[0].weight < 1 || job->part[0].weight > 1);
}

/* Adds the predictions of one world. */
static void add_world(const ipt_job *job, const ipt_rows *rows, const ipt_result *res, size_t world,
                      float scale, float *sum_u, float *sum_c)
{
    size_t negative = 0, part[IPT_MAX_PART];
    ipt_world_rows(job, rows, world, &negative, part);
    const float *u = negative != SIZE_MAX ? res[negative].eps : NULL;
    bool plain = is_plain(job);
    for (size_t i = 0; u && i < job->n_latent; i++)
        sum_u[i] += scale * u[i];
    for (int32_t k = 0; k < job->n_part; k++) {
        const float *c = res[part[k]].eps;
        float w = job->part[k].weight;
        for (size_t i = 0; i < job->n_latent; i++)
            sum_c[i] += scale * (plain ? c[i] : u ? w * (c[i] - u[i]) : w * c[i]);
    }
    for (size_t i = 0; !plain && u && i < job->n_latent; i++)
        sum_c[i] += scale * u[i];
}

void ipt_blend_mean(const ipt_job *job, const ipt_rows *rows, const ipt_result *res, float *eps_u,
                    float *eps_c)
{
    ipt_blend_weighted(job, rows, res, NULL, eps_u, eps_c);
}

void ipt_blend_weighted(const ipt_job *job, const ipt_rows *rows, const ipt_result *res,
                        const float *weight, float *eps_u, float *eps_c)
{
    size_t n = ipt_rows_worlds(rows);
    float scale = 1.0F / (float)n; /* one world: times 1, exactly the plain prediction */
    for (size_t i = 0; i < job->n_latent; i++)
        eps_u[i] = eps_c[i] = 0;
    for (size_t k = 0; k < n; k++)
        add_world(job, rows, res, k, weight ? weight[k] : 1.0F, eps_u, eps_c);
    for (size_t i = 0; i < job->n_latent; i++) {
        eps_u[i] *= scale;
        eps_c[i] *= scale;
    }
}

/* Adds one world's predictions, weighted by place. */
static void add_masked(const ipt_job *job, const ipt_rows *rows, const ipt_result *res,
                       size_t world, const float *mask, float *sum_u, float *sum_c)
{
    size_t negative = 0, part[IPT_MAX_PART], hw = (size_t)job->h * (size_t)job->w;
    ipt_world_rows(job, rows, world, &negative, part);
    const float *u = negative != SIZE_MAX ? res[negative].eps : NULL;
    for (size_t i = 0; i < job->n_latent; i++) {
        float c = is_plain(job) || !u ? 0 : u[i], m = mask[i % hw];
        for (int32_t k = 0; k < job->n_part; k++) {
            float v = res[part[k]].eps[i], w = job->part[k].weight;
            c += is_plain(job) ? v : u ? w * (v - u[i]) : w * v;
        }
        sum_u[i] += u ? m * u[i] : 0;
        sum_c[i] += m * c;
    }
}

void ipt_blend_masked(const ipt_job *job, const ipt_rows *rows, const ipt_result *res,
                      const float *mask, float *eps_u, float *eps_c)
{
    size_t n = ipt_rows_worlds(rows), hw = (size_t)job->h * (size_t)job->w;
    for (size_t i = 0; i < job->n_latent; i++)
        eps_u[i] = eps_c[i] = 0;
    for (size_t k = 0; k < n; k++)
        add_masked(job, rows, res, k, mask + k * hw, eps_u, eps_c);
    for (size_t i = 0; i < job->n_latent; i++) {
        float sum = 0;
        for (size_t k = 0; k < n; k++)
            sum += mask[k * hw + i % hw];
        eps_u[i] /= sum;
        eps_c[i] /= sum;
    }
}

void ipt_policy_blend(ipt_policy *p, int32_t eval, const ipt_rows *rows, const ipt_result *res,
                      float *eps_u, float *eps_c)
{
    if (p->method->blend)
        p->method->blend(p->state, p->job, eval, rows, res, eps_u, eps_c);
    else
        ipt_blend_mean(p->job, rows, res, eps_u, eps_c);
}

/* --- gates ------------------------------------------------------------------------------------ */
void ipt_policy_gates(const ipt_policy *p, const ipt_row *row, int32_t step, float *out,
                      size_t stride)
{
    const ipt_job *job = p->job;
    float at = job->n_step > 0 ? (float)step / (float)job->n_step : 0.0F;
    for (int32_t s = 0; s < job->n_slot; s++) {
        const ipt_slot_use *u = &job->slot[s];
        bool on = at >= u->start && (at < u->end || u->end >= 1.0F);
        float weight = u->curve ? u->weight * ipt_curve_at(u->curve, at) : u->weight;
        for (int r = 0; r < IPT_GATE_ROWS; r++)
            out[(size_t)r * stride + (size_t)s] = on ? row->slot[s] * weight * u->block[r] : 0.0F;
    }
}

void ipt_policy_text_gates(const ipt_policy *p, const ipt_row *row, float *out)
{
    for (int32_t s = 0; s < p->job->n_slot; s++) {
        float on = p->common.te == TE_NONE ? 0.0F : p->common.te == TE_MERGED ? 1.0F : row->slot[s];
        out[s] = on * p->job->slot[s].te_weight;
    }
}
