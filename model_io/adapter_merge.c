/* model_io/adapter_merge.c - several adapters as one, and the difference of two models as one.
 *
 * Sources: PEFT (tuners/lora/model.py add_weighted_adapter, utils/merge_utils.py: scalings, signs
 * and divisors are theirs), TIES (Yadav et al. 2023), DARE (Yu et al. 2023), kohya-ss/sd-scripts
 * (extract_lora_from_models.py). */
#include <math.h>
#include <string.h>

#include "model_io/adapter_tools.h"
#include "model_io/kinds.h"

/* How values are thinned, and how signs are settled. */
typedef enum thinning { ALL, LARGEST, RANDOM } thinning;
typedef struct method {
    const char *name;
    thinning thin;
    bool elects;     /* TIES: the majority's sign, divided by how many have it */
    bool on_factors; /* else on the changes themselves, cut to a rank */
} method;
static const method methods[IPT_MERGE_COUNT] = {
    [IPT_MERGE_CAT] = {"cat", ALL, false, false},
    [IPT_MERGE_SVD] = {"svd", ALL, false, false},
    [IPT_MERGE_LINEAR] = {"linear", ALL, false, true},
    [IPT_MERGE_TIES] = {"ties", LARGEST, true, true},
    [IPT_MERGE_DARE_LINEAR] = {"dare_linear", RANDOM, false, true},
    [IPT_MERGE_DARE_TIES] = {"dare_ties", RANDOM, true, true},
    [IPT_MERGE_MAGNITUDE_PRUNE] = {"magnitude_prune", LARGEST, false, true},
    [IPT_MERGE_TIES_SVD] = {"ties_svd", LARGEST, true, false},
    [IPT_MERGE_DARE_LINEAR_SVD] = {"dare_linear_svd", RANDOM, false, false},
    [IPT_MERGE_DARE_TIES_SVD] = {"dare_ties_svd", RANDOM, true, false},
    [IPT_MERGE_MAGNITUDE_PRUNE_SVD] = {"magnitude_prune_svd", LARGEST, false, false},
    [IPT_MERGE_LEGO] = {"lego", ALL, false, true},
    [IPT_MERGE_LORAHUB] = {"lorahub", ALL, false, true},
};

const char *ipt_merge_name(ipt_merge_method m) { return methods[m].name; }

/* What the files have for one module's weight or bias. */
typedef struct term {
    const ipt_adapter_module *a;
    const char *file;
    size_t number; /* of the file */
    double weight;
} term;
typedef struct group {
    term term[IPT_TOOL_MAX_FILES];
    size_t n, module;
} group;

/* --- sets of values --------------------------------------------------------------------------- */
static double bigger(double a, double b) { return a > b ? a : b; }

/* The k-th largest of v [n], k >= 1; v is reordered. */
static double kth_largest(double *v, size_t n, size_t k)
{
    size_t lo = 0, hi = n - 1, want = k - 1;
    while (lo < hi) {
        double pivot = v[lo + (hi - lo) / 2];
        size_t i = lo, j = hi;
        for (;;) {
            while (v[i] > pivot)
                i++;
            while (v[j] < pivot)
                j--;
            if (i >= j)
                break;
            double x = v[i];
            v[i++] = v[j];
            v[j--] = x;
        }
        /* v[lo..j] >= pivot >= v[j+1..hi] */
        if (want <= j)
            hi = j;
        else
            lo = j + 1;
        if (hi == lo)
            break;
    }
    return v[want];
}

/* Zeroes all but the int(density n) largest magnitudes; of equal ones the first stay. */
static ipt_status keep_largest(ipt_ctx *ctx, double *v, size_t n, double density)
{
    size_t k = (size_t)(density * (double)n), above = 0;
    if (density >= 1)
        return IPT_OK;
    double *size = ipt_calloc(ctx, n, sizeof *size);
    if (!size)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        size[i] = fabs(v[i]);
    double least = k > 0 ? kth_largest(size, n, k) : HUGE_VAL;
    for (size_t i = 0; i < n; i++)
        above += fabs(v[i]) > least;
    size_t equal = k - (above < k ? above : k);
    for (size_t i = 0; i < n; i++) {
        bool stays = fabs(v[i]) > least || (equal > 0 && fabs(v[i]) >= least);
        equal -= stays && !(fabs(v[i]) > least);
        v[i] = stays ? v[i] : 0;
    }
    ipt_free(size);
    return IPT_OK;
}

/* Keeps each value with the chance `density`, divided by it. */
static void keep_random(double *v, size_t n, double density, uint64_t seed)
{
    for (size_t i = 0; density < 1 && i < n; i++)
        v[i] = (double)ipt_rng_uniform(&seed) < density ? v[i] / density : 0;
}

static ipt_status thin(ipt_ctx *ctx, const method *m, const ipt_merge_opts *o, double *v, size_t n,
                       uint64_t stream)
{
    if (m->thin == LARGEST)
        return keep_largest(ctx, v, n, o->density);
    if (m->thin == RANDOM)
        keep_random(v, n, o->density, stream);
    return IPT_OK;
}

/* out = the weighted sum of x[k] [n], by the majority's sign where the method elects one. */
static void combine(const method *m, const ipt_merge_opts *o, double *const *x,
                    const double *weight, size_t k, size_t n, double *out)
{
    for (size_t i = 0; i < n; i++) {
        double sum = 0, vote = 0, count = 0;
        for (size_t f = 0; m->elects && f < k; f++)
            vote += o->by_frequency ? (x[f][i] > 0) - (x[f][i] < 0) : x[f][i];
        for (size_t f = 0; f < k; f++) {
            bool takes = !m->elects || (vote >= 0 ? x[f][i] > 0 : x[f][i] < 0);
            sum += takes ? weight[f] * x[f][i] : 0;
            count += takes;
        }
        out[i] = m->elects ? sum / bigger(count, 1) : sum;
    }
}

/* A stream of its own for each seed, module, file and factor. */
static uint64_t stream_of(const ipt_tool *t, const ipt_merge_opts *o, const group *g, size_t file,
                          int factor)
{
    const ipt_module *m = &t->module[g->module];
    uint64_t s = o->seed ^ (ipt_hash_name(m->name) + (uint64_t)m->comp * 0x9e3779b97f4a7c15u);
    s += (uint64_t)(file * 2 + (size_t)factor) * 0xd1342543de82ef95u;
    return ipt_rng_next(&s);
}

/* --- exact sums ------------------------------------------------------------------------------- */
static ipt_status differ(ipt_tool *t, const group *g, const char *what, const char *instead)
{
    const ipt_module *m = &t->module[g->module];
    const char *first = g->term[0].file, *last = g->term[g->n - 1].file;
    bool one = strcmp(first, last) == 0;
    return ipt_fail(t->ctx, IPT_ERR_UNSUPPORTED, "%.150s%s%.150s: %s.%s: found %s, %s", first,
                    one ? "" : ", ", one ? "" : last, ipt_comp_name(m->comp), m->name, what,
                    instead);
}

/* All terms side by side: down [*rank, fan], up [out, *rank] with scales and weights. */
static ipt_status concatenate(ipt_tool *t, const group *g, double **down, double **up, size_t *rank)
{
    const ipt_adapter_module *a = g->term[0].a;
    size_t fan = ipt_fan(a), out = (size_t)a->out, total = 0, at = 0;
    for (size_t i = 0; i < g->n; i++)
        total += (size_t)g->term[i].a->n_col;
    if (total > IPT_MAX_FILE_RANK)
        return differ(t, g, "ranks of more than 65536 together", "expected fewer: use svd");
    double *d = ipt_calloc(t->ctx, total * fan, sizeof *d),
           *u = ipt_calloc(t->ctx, total * out, sizeof *u);
    ipt_status s = d && u ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && i < g->n; i++) {
        const ipt_adapter_module *b = g->term[i].a;
        size_t r = (size_t)b->n_col;
        double *base = NULL, *part = ipt_calloc(t->ctx, r * out, sizeof *part);
        s = part ? ipt_tool_base(t, b, &base) : IPT_ERR_NOMEM;
        if (s == IPT_OK)
            s = ipt_adapter_factors(t->ctx, b, base, d + at * fan, part);
        for (size_t o = 0; s == IPT_OK && o < out; o++)
            for (size_t k = 0; k < r; k++)
                u[o * total + at + k] = g->term[i].weight * part[o * r + k];
        ipt_free(base);
        ipt_free(part);
        at += r;
    }
    if (s != IPT_OK) {
        ipt_free(d);
        ipt_free(u);
        return s;
    }
    *down = d;
    *up = u;
    *rank = total;
    return IPT_OK;
}

static bool all_low_rank(const group *g)
{
    for (size_t i = 0; i < g->n; i++)
        if (g->term[i].a->act != IPT_ACTS_LOW_RANK)
            return false;
    return true;
}

static ipt_status merge_cat(ipt_tool *t, const group *g)
{
    const ipt_adapter_module *a = g->term[0].a;
    double *down = NULL, *up = NULL;
    size_t rank = 0;
    if (!all_low_rank(g))
        return differ(t, g, "a kind without low-rank factors",
                      "expected --method svd (or one that ends in _svd) with --rank");
    IPT_TRY(concatenate(t, g, &down, &up, &rank));
    ipt_status s = ipt_tool_put_factors(t, g->module, down, up, rank, ipt_tool_dtype(t, a),
                                        ipt_tool_axes(t, a));
    ipt_free(down);
    ipt_free(up);
    return s;
}

/* --- on the changes --------------------------------------------------------------------------- */
static ipt_status put_cut(ipt_tool *t, const group *g, const ipt_svd *d)
{
    const ipt_adapter_module *a = g->term[0].a;
    if (d->total > 0)
        return ipt_tool_put_svd(t, g->module, d, ipt_tool_dtype(t, a), ipt_tool_axes(t, a));
    t->report.n_empty++;
    return IPT_OK;
}

static ipt_status low_rank_sum(ipt_tool *t, const group *g, size_t rank)
{
    const ipt_adapter_module *a = g->term[0].a;
    double *down = NULL, *up = NULL;
    size_t total = 0;
    ipt_svd d = {0};
    IPT_TRY(concatenate(t, g, &down, &up, &total));
    ipt_status s = ipt_svd_product(t->ctx, (ipt_matrix){up, (size_t)a->out, total},
                                   (ipt_matrix){down, total, ipt_fan(a)}, rank, &d);
    if (s == IPT_OK)
        s = put_cut(t, g, &d);
    ipt_free(down);
    ipt_free(up);
    ipt_svd_finish(&d);
    return s;
}

static ipt_status merge_changes(ipt_tool *t, const group *g, const ipt_merge_opts *o)
{
    const method *m = &methods[o->method];
    const ipt_adapter_module *a = g->term[0].a;
    size_t n = (size_t)a->out * ipt_fan(a), rank = (size_t)o->rank;
    double *x[IPT_TOOL_MAX_FILES] = {NULL}, weight[IPT_TOOL_MAX_FILES] = {0}, *sum = NULL;
    ipt_status s = IPT_OK;
    ipt_svd d = {0};
    for (size_t i = 0; o->rank == 0 && i < g->n; i++) {
        size_t r = (size_t)g->term[i].a->rank;
        rank = r > rank ? r : rank;
    }
    if (rank == 0)
        return differ(t, g, "a kind without a rank", "expected --rank R");
    if (o->method == IPT_MERGE_SVD && all_low_rank(g))
        return low_rank_sum(t, g, rank);
    for (size_t i = 0; s == IPT_OK && i < g->n; i++) {
        weight[i] = g->term[i].weight;
        s = ipt_tool_delta(t, g->term[i].a, &x[i]);
        if (s == IPT_OK)
            s = thin(t->ctx, m, o, x[i], n, stream_of(t, o, g, g->term[i].number, 0));
    }
    if (s == IPT_OK) {
        sum = ipt_calloc(t->ctx, n, sizeof *sum);
        s = sum ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (s == IPT_OK) {
        combine(m, o, x, weight, g->n, n, sum);
        s = ipt_svd_dense(t->ctx, (ipt_matrix){sum, (size_t)a->out, ipt_fan(a)}, rank, &d);
    }
    if (s == IPT_OK)
        s = put_cut(t, g, &d);
    for (size_t i = 0; i < g->n; i++)
        ipt_free(x[i]);
    ipt_free(sum);
    ipt_svd_finish(&d);
    return s;
}

/* --- on the factors --------------------------------------------------------------------------- */
static ipt_status check_factors(ipt_tool *t, const group *g)
{
    char what[96];
    const ipt_adapter_module *first = g->term[0].a;
    for (size_t i = 0; i < g->n; i++) {
        const ipt_adapter_module *a = g->term[i].a;
        if (!ipt_tool_is_lora(a) || a->part[2])
            return differ(t, g, "a kind that is not plain LoRA",
                          "expected a method on whole changes: svd, ties_svd, dare_ties_svd ...");
        if (a->rank != first->rank)
            return differ(
                t, g,
                ipt_name(what, sizeof what, "ranks %d and %d", (int)first->rank, (int)a->rank),
                "expected one rank under this method: use cat (exact), svd or a method "
                "that ends in _svd");
    }
    return IPT_OK;
}

/* One of the two factors of all terms, thinned and combined into out [n]. */
static ipt_status merge_factor(ipt_tool *t, const group *g, const ipt_merge_opts *o, int factor,
                               double *out)
{
    const method *m = &methods[o->method];
    size_t n = g->term[0].a->part[factor]->count;
    double *x[IPT_TOOL_MAX_FILES] = {NULL}, weight[IPT_TOOL_MAX_FILES] = {0};
    ipt_status s = IPT_OK;
    for (size_t i = 0; s == IPT_OK && i < g->n; i++) {
        const ipt_adapter_module *a = g->term[i].a;
        double w = g->term[i].weight * a->scale;
        weight[i] = sqrt(fabs(w)) * (w < 0 && factor == 0 ? -1 : 1); /* the sign on one side */
        x[i] = ipt_calloc(t->ctx, n, sizeof *x[i]);
        s = x[i] ? ipt_st_load(a->part[factor]) : IPT_ERR_NOMEM;
        for (size_t k = 0; s == IPT_OK && k < n; k++)
            x[i][k] = (double)ipt_st_get(a->part[factor], k);
        if (s == IPT_OK)
            s = thin(t->ctx, m, o, x[i], n, stream_of(t, o, g, g->term[i].number, factor));
    }
    if (s == IPT_OK)
        combine(m, o, x, weight, g->n, n, out);
    for (size_t i = 0; i < g->n; i++)
        ipt_free(x[i]);
    return s;
}

static ipt_status merge_factors(ipt_tool *t, const group *g, const ipt_merge_opts *o)
{
    IPT_TRY(check_factors(t, g));
    const ipt_adapter_module *a = g->term[0].a;
    double *down = ipt_calloc(t->ctx, a->part[0]->count, sizeof *down),
           *up = ipt_calloc(t->ctx, a->part[1]->count, sizeof *up);
    ipt_status s = down && up ? merge_factor(t, g, o, 0, down) : IPT_ERR_NOMEM;
    if (s == IPT_OK)
        s = merge_factor(t, g, o, 1, up);
    if (s == IPT_OK)
        s = ipt_tool_put_factors(t, g->module, down, up, (size_t)a->rank, ipt_tool_dtype(t, a),
                                 ipt_tool_axes(t, a));
    ipt_free(down);
    ipt_free(up);
    return s;
}

/* --- LEGO ------------------------------------------------------------------------------------- */
/* Methods on ranks need some: a kind that has none is named with its file. */
static ipt_status check_ranks(ipt_tool *t, const group *g)
{
    char what[96];
    for (size_t i = 0; i < g->n; i++) {
        group one = {.term = {g->term[i]}, .n = 1, .module = g->module};
        if (g->term[i].a->act != IPT_ACTS_LOW_RANK)
            return differ(t, &one,
                          ipt_name(what, sizeof what, "%s, which has no ranks of its own",
                                   ipt_adapter_kind_name(g->term[i].a)),
                          "expected LoRA (impasto lora convert FILE --to lora --rank R makes one)");
    }
    return IPT_OK;
}

static ipt_status check_count(ipt_tool *t, const group *g)
{
    size_t n = 0;
    char what[64];
    for (size_t i = 0; i < g->n; i++)
        n += (size_t)g->term[i].a->n_col;
    if (n <= IPT_LEGO_MAX_UNITS)
        return IPT_OK;
    return differ(t, g, ipt_name(what, sizeof what, "%zu ranks together", n),
                  "expected at most 4096 under this method: resize them first");
}

/* What ipt_units of all terms point to. */
typedef struct unit_room {
    double *down, *up, *split, *omega;
    int32_t *from;
} unit_room;

static void room_finish(unit_room *r)
{
    ipt_free(r->down);
    ipt_free(r->up);
    ipt_free(r->split);
    ipt_free(r->omega);
    ipt_free(r->from);
}

static ipt_status fill_units(ipt_tool *t, const group *g, unit_room *r, ipt_units *u)
{
    const ipt_adapter_module *a = g->term[0].a;
    size_t out = (size_t)a->out, n = 0, at = 0;
    double *up = NULL;
    IPT_TRY(concatenate(t, g, &r->down, &up, &n));
    r->up = ipt_calloc(t->ctx, n * out, sizeof *r->up);
    r->split = ipt_calloc(t->ctx, n, sizeof *r->split);
    r->omega = ipt_calloc(t->ctx, g->n, sizeof *r->omega);
    r->from = ipt_calloc(t->ctx, n, sizeof *r->from);
    bool ok = r->up && r->split && r->omega && r->from;
    for (size_t o = 0; ok && o < out; o++)
        for (size_t k = 0; k < n; k++)
            r->up[k * out + o] = up[o * n + k];
    ipt_free(up);
    for (size_t f = 0; ok && f < g->n; f++) {
        double s = sqrt(fabs(g->term[f].a->scale * g->term[f].weight));
        r->omega[f] = fabs(g->term[f].weight);
        for (int32_t k = 0; k < g->term[f].a->n_col; k++, at++) {
            r->split[at] = s > 0 ? s : 1;
            r->from[at] = (int32_t)f;
        }
    }
    *u = (ipt_units){.n = n,
                     .fan = ipt_fan(a),
                     .out = out,
                     .n_from = g->n,
                     .down = r->down,
                     .up = r->up,
                     .split = r->split,
                     .from = r->from,
                     .omega = r->omega};
    return ok ? IPT_OK : IPT_ERR_NOMEM;
}

/* Factors with the ranks as rows, down [rank,fan] and up [rank,out].  Zeros are written too: what
 * has the same files has the same modules. */
static ipt_status put_ranks(ipt_tool *t, const group *g, const double *down, const double *up,
                            size_t rank)
{
    const ipt_adapter_module *a = g->term[0].a;
    size_t out = (size_t)a->out, n = rank > 0 ? rank : 1, fan = ipt_fan(a);
    double *b = ipt_calloc(t->ctx, n * out, sizeof *b),
           *zero = rank > 0 ? NULL : ipt_calloc(t->ctx, fan, sizeof *zero);
    ipt_status s = b && (zero || rank > 0) ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t k = 0; s == IPT_OK && k < rank; k++)
        for (size_t o = 0; o < out; o++)
            b[o * rank + k] = up[k * out + o];
    if (s == IPT_OK)
        s = ipt_tool_put_factors(t, g->module, zero ? zero : down, b, n, ipt_tool_dtype(t, a),
                                 ipt_tool_axes(t, a));
    ipt_free(b);
    ipt_free(zero);
    return s;
}

static ipt_status merge_lego(ipt_tool *t, const group *g, const ipt_merge_opts *o)
{
    unit_room room = {0};
    ipt_units units = {0};
    ipt_lego l = {0};
    ipt_lego_opts lego = o->lego;
    lego.rank = o->rank;
    IPT_TRY(check_ranks(t, g));
    IPT_TRY(check_count(t, g));
    ipt_status s = fill_units(t, g, &room, &units);
    if (s == IPT_OK)
        s = ipt_lego_merge(t->ctx, &units, &lego, &l);
    if (s == IPT_OK)
        s = put_ranks(t, g, l.down, l.up, l.rank);
    t->report.n_clamped += l.is_clamped;
    ipt_lego_finish(&l);
    room_finish(&room);
    return s;
}

/* --- LoraHub ---------------------------------------------------------------------------------- */
/* down [rank,fan] and up [out,rank] grow by weight times one adapter's, which may have fewer ranks.
 * Its factors have the scale in `up`: a root of it goes to each side. */
static ipt_status add_adapter(ipt_tool *t, const term *x, size_t rank, double *down, double *up)
{
    const ipt_adapter_module *a = x->a;
    size_t r = (size_t)a->n_col, fan = ipt_fan(a), out = (size_t)a->out;
    double *base = NULL, *d = ipt_calloc(t->ctx, r * fan, sizeof *d),
           *u = ipt_calloc(t->ctx, r * out, sizeof *u), root = sqrt(fabs(a->scale));
    ipt_status s = d && u ? ipt_tool_base(t, a, &base) : IPT_ERR_NOMEM;
    if (s == IPT_OK)
        s = ipt_adapter_factors(t->ctx, a, base, d, u);
    for (size_t i = 0; s == IPT_OK && i < r * fan; i++)
        down[i] += x->weight * root * d[i];
    for (size_t i = 0; s == IPT_OK && root > 0 && i < r * out; i++)
        up[i / r * rank + i % r] += x->weight / root * u[i];
    ipt_free(base);
    ipt_free(d);
    ipt_free(u);
    return s;
}

static ipt_status merge_lorahub(ipt_tool *t, const group *g)
{
    const ipt_adapter_module *a = g->term[0].a;
    size_t rank = 0, out = (size_t)a->out;
    IPT_TRY(check_ranks(t, g));
    for (size_t i = 0; i < g->n; i++)
        rank = (size_t)g->term[i].a->n_col > rank ? (size_t)g->term[i].a->n_col : rank;
    double *down = ipt_calloc(t->ctx, rank * ipt_fan(a), sizeof *down),
           *up = ipt_calloc(t->ctx, rank * out, sizeof *up);
    ipt_status s = down && up ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && i < g->n; i++)
        s = add_adapter(t, &g->term[i], rank, down, up);
    if (s == IPT_OK)
        s = ipt_tool_put_factors(t, g->module, down, up, rank, ipt_tool_dtype(t, a),
                                 ipt_tool_axes(t, a));
    ipt_free(down);
    ipt_free(up);
    return s;
}

/* --- merge ------------------------------------------------------------------------------------ */
static ipt_status merge_vectors(ipt_tool *t, const group *g)
{
    const ipt_adapter_module *a = g->term[0].a;
    size_t n = (size_t)a->out;
    double *sum = ipt_calloc(t->ctx, n, sizeof *sum);
    ipt_status s = sum ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && i < g->n; i++) {
        double *v = NULL;
        s = ipt_tool_delta(t, g->term[i].a, &v);
        for (size_t k = 0; s == IPT_OK && k < n; k++)
            sum[k] += g->term[i].weight * v[k];
        ipt_free(v);
    }
    if (s == IPT_OK)
        s = ipt_tool_put_vector(t, g->module, a->act == IPT_ACTS_BIAS, sum, ipt_tool_dtype(t, a));
    ipt_free(sum);
    return s;
}

static ipt_status merge_group(ipt_tool *t, const group *g, const ipt_merge_opts *o)
{
    if (ipt_tool_is_vector(g->term[0].a))
        return merge_vectors(t, g);
    if (o->method == IPT_MERGE_CAT)
        return merge_cat(t, g);
    if (o->method == IPT_MERGE_LEGO)
        return merge_lego(t, g, o);
    if (o->method == IPT_MERGE_LORAHUB)
        return merge_lorahub(t, g);
    return methods[o->method].on_factors ? merge_factors(t, g, o) : merge_changes(t, g, o);
}

/* The terms of a module: of its bias, or of its weight. */
static void gather(const ipt_tool *t, const ipt_merge_input *in, size_t n, size_t module,
                   bool is_bias, const size_t *const *at, group *g)
{
    g->n = 0;
    g->module = module;
    for (size_t f = 0; f < n; f++) {
        size_t k = at[f][2 * module + is_bias];
        bool text = t->module[module].comp != IPT_COMP_UNET;
        if (k > 0)
            g->term[g->n++] = (term){&in[f].file->module[k - 1], in[f].file->path, f,
                                     text ? in[f].te_weight : in[f].weight};
    }
}

static ipt_status merge_all(ipt_tool *t, const ipt_merge_input *in, size_t n,
                            const ipt_merge_opts *o, const size_t *const *at)
{
    group g;
    for (size_t m = 0; m < t->n_module; m++)
        for (int bias = 0; bias < 2; bias++) {
            gather(t, in, n, m, bias, at, &g);
            if (g.n == 0)
                continue;
            IPT_TRY(ipt_tool_step(t, m, t->n_module));
            IPT_TRY(merge_group(t, &g, o));
        }
    return IPT_OK;
}

ipt_status ipt_adapter_merge(ipt_tool *t, const ipt_merge_input *in, size_t n,
                             const ipt_merge_opts *o)
{
    size_t *at[IPT_TOOL_MAX_FILES] = {NULL}; /* number + 1 of a file's part for (module, bias) */
    ipt_status s = IPT_OK;
    if (n < 1 || n > IPT_TOOL_MAX_FILES)
        return ipt_fail(t->ctx, IPT_ERR_ARG, "found %zu adapters, expected 1 to %d", n,
                        IPT_TOOL_MAX_FILES);
    for (size_t f = 0; s == IPT_OK && f < n; f++) {
        at[f] = ipt_calloc(t->ctx, 2 * t->n_module, sizeof *at[f]);
        s = at[f] ? IPT_OK : IPT_ERR_NOMEM;
        t->report.n_left_out += in[f].file->n_embedding;
        for (size_t i = 0; s == IPT_OK && i < in[f].file->n_module; i++) {
            const ipt_adapter_module *a = &in[f].file->module[i];
            at[f][2 * a->module + (a->act == IPT_ACTS_BIAS)] = i + 1;
        }
    }
    if (s == IPT_OK)
        s = merge_all(t, in, n, o, (const size_t *const *)at);
    for (size_t f = 0; f < n; f++)
        ipt_free(at[f]);
    return s;
}

/* --- extract ---------------------------------------------------------------------------------- */
/* tuned - base of a weight or bias, in file order; *norm2 its squared norm. */
static ipt_status difference(ipt_tool *t, ipt_weights *tuned, const ipt_module *m, bool is_bias,
                             double **out, double *norm2)
{
    double *w = NULL, *v = NULL;
    bool vector = is_bias || m->is_norm;
    size_t taps = vector ? 1 : (size_t)m->kh * (size_t)m->kw, in = vector ? 1 : (size_t)m->in,
           n = (size_t)m->out * in * taps;
    IPT_TRY(ipt_tool_read(t, t->weights[m->comp], m, is_bias, &w));
    ipt_status s = ipt_tool_read(t, tuned, m, is_bias, &v);
    *norm2 = 0;
    for (size_t i = 0; s == IPT_OK && i < n; i++) {
        v[i] -= w[i];
        *norm2 += v[i] * v[i];
    }
    if (s == IPT_OK && taps > 1) { /* [O,taps,I] -> [O,I,taps] */
        for (size_t o = 0; o < (size_t)m->out; o++)
            for (size_t i = 0; i < in; i++)
                for (size_t k = 0; k < taps; k++)
                    w[(o * in + i) * taps + k] = v[(o * taps + k) * in + i];
        double *x = w;
        w = v;
        v = x;
    }
    ipt_free(w);
    if (s == IPT_OK)
        *out = v;
    else
        ipt_free(v);
    return s;
}

/* A change that the result does not hold. */
static void leave_out(ipt_tool *t, double norm2)
{
    if (norm2 > 0) {
        t->report.n_left_out++;
        t->report.total += norm2;
        t->report.lost += norm2;
    }
}

static ipt_status extract_weight(ipt_tool *t, ipt_weights *tuned, size_t module,
                                 const ipt_extract_opts *o)
{
    const ipt_module *m = &t->module[module];
    bool conv = m->kh * m->kw > 1;
    int32_t rank = m->is_norm ? 0 : conv ? o->conv_rank : o->rank;
    double *x = NULL, norm2 = 0;
    ipt_svd d = {0};
    IPT_TRY(difference(t, tuned, m, false, &x, &norm2));
    ipt_status s = IPT_OK;
    if (rank == 0) {
        leave_out(t, norm2);
    } else if (!(norm2 > 0)) {
        t->report.n_empty++;
    } else {
        size_t fan = (size_t)m->in * (size_t)m->kh * (size_t)m->kw;
        s = ipt_svd_dense(t->ctx, (ipt_matrix){x, (size_t)m->out, fan}, (size_t)rank, &d);
        if (s == IPT_OK && o->keep > 0)
            ipt_svd_cut(&d, ipt_rank_for(d.s, d.rank, d.total, o->keep));
        if (s == IPT_OK)
            s = ipt_tool_put_svd(t, module, &d, t->dtype == IPT_ST_COUNT ? IPT_ST_F32 : t->dtype,
                                 ipt_tool_module_axes(t, module));
    }
    ipt_free(x);
    ipt_svd_finish(&d);
    return s;
}

ipt_status ipt_adapter_extract(ipt_tool *t, ipt_weights *const tuned[IPT_COMP_COUNT],
                               const ipt_extract_opts *o)
{
    for (size_t i = 0; i < t->n_module; i++) {
        const ipt_module *m = &t->module[i];
        double *x = NULL, norm2 = 0;
        if (!t->weights[m->comp] || !tuned[m->comp])
            continue;
        IPT_TRY(ipt_tool_step(t, i, t->n_module));
        IPT_TRY(extract_weight(t, tuned[m->comp], i, o));
        if (!m->has_bias)
            continue;
        IPT_TRY(difference(t, tuned[m->comp], m, true, &x, &norm2));
        ipt_free(x);
        leave_out(t, norm2);
    }
    return IPT_OK;
}
