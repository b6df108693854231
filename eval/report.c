/* eval/report.c - figures of groups with their intervals, as JSON, as a table, as one line a
 * picture. */
#include "eval/report.h"

#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "eval/sheet.h"

static const struct {
    const char *key, *title;
    int digits;
} figures[IPT_FIGURES] = {
    [IPT_FIG_PRESENCE] = {"presence", "presence@k", 2},
    [IPT_FIG_FOUND] = {"found", "concepts found", 2},
    [IPT_FIG_LIKE_MIN] = {"identity_min", "identity min", 2},
    [IPT_FIG_LIKE_AVG] = {"identity_avg", "identity avg", 2},
    [IPT_FIG_LIKE_MAX] = {"identity_max", "identity max", 2},
    [IPT_FIG_DUPLICATE] = {"duplicate_rate", "duplicates", 2},
    [IPT_FIG_LEAK] = {"leak", "leak", 3},
    [IPT_FIG_STYLE] = {"style_kept", "style kept", 2},
    [IPT_FIG_DRIFT] = {"background_drift", "background drift", 1},
    [IPT_FIG_STRANGERS] = {"strangers", "strangers", 3},
};
enum { SEED_OF_BOOTSTRAP = 20261127 };
static const char reference[] = "merge"; /* what the other methods are compared with */

/* --- figures ---------------------------------------------------------------------------------- */
void ipt_eval_of_sets(const ipt_eval *v, size_t method, int judge, const ipt_eval_group *g,
                      ipt_figure f, double *out)
{
    const size_t first = judge < 0 ? 0 : (size_t)judge, last = judge < 0 ? v->n_judge : first + 1;
    for (size_t s = 0; s < v->n_set; s++) {
        double sum = 0;
        for (size_t j = first; j < last; j++)
            for (size_t i = 0; i < v->n_seed; i++)
                sum += ipt_eval_figure(v, method, j, s, i)[f];
        out[s] = ipt_eval_is_in(g, &v->world.set[s]) ? sum / (double)((last - first) * v->n_seed)
                                                     : (double)NAN;
    }
}

/* Median of one cost over the pictures of a group; NAN: it has none. */
static double cost_of(const ipt_eval *v, size_t method, const ipt_eval_group *g, size_t which,
                      double *scratch)
{
    size_t n = 0;
    for (size_t s = 0; s < v->n_set; s++)
        for (size_t i = 0; i < v->n_seed && ipt_eval_is_in(g, &v->world.set[s]); i++)
            scratch[n++] = *(const double *)((const char *)ipt_eval_cost_of(v, method, s, i) +
                                             ipt_eval_costs[which].at);
    return ipt_eval_median(scratch, n);
}

/* How far apart the concepts' masks are, each set's mean over seeds; NAN: the method makes none. */
static ipt_interval separation_of(const ipt_eval *v, size_t method, const ipt_eval_group *g,
                                  double *a)
{
    for (size_t s = 0; s < v->n_set; s++) {
        double sum = 0;
        for (size_t i = 0; i < v->n_seed; i++)
            sum += ipt_eval_cost_of(v, method, s, i)->separation;
        a[s] = ipt_eval_is_in(g, &v->world.set[s]) ? sum / (double)v->n_seed : (double)NAN;
    }
    return ipt_eval_bootstrap(a, v->n_set, SEED_OF_BOOTSTRAP);
}

static size_t sets_in(const ipt_eval *v, const ipt_eval_group *g)
{
    size_t n = 0;
    for (size_t s = 0; s < v->n_set; s++)
        n += ipt_eval_is_in(g, &v->world.set[s]);
    return n;
}

static size_t reference_of(const ipt_eval *v)
{
    for (size_t m = 0; m < v->n_method; m++)
        if (strcmp(v->method[m].label, reference) == 0)
            return m;
    return SIZE_MAX;
}

/* The first method of the list that differs from m in its options only; m itself: it is that. */
static size_t first_variant(const ipt_eval *v, size_t m)
{
    const char *label = v->method[m].label;
    const size_t len = strcspn(label, ":");
    for (size_t i = 0; i < m; i++)
        if (strcspn(v->method[i].label, ":") == len && strncmp(v->method[i].label, label, len) == 0)
            return i;
    return m;
}

/* What variants of a method are compared by. */
static const ipt_figure telling[] = {IPT_FIG_PRESENCE, IPT_FIG_FOUND, IPT_FIG_LEAK};

/* Method m minus another one, set by set; a [2 sets]. */
static ipt_interval difference(const ipt_eval *v, size_t m, size_t other, const ipt_eval_group *g,
                               ipt_figure f, double *a)
{
    double *b = a + v->n_set;
    ipt_eval_of_sets(v, m, -1, g, f, a);
    ipt_eval_of_sets(v, other, -1, g, f, b);
    return ipt_eval_difference(a, b, v->n_set, SEED_OF_BOOTSTRAP);
}

/* --- JSON ------------------------------------------------------------------------------------- */
static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static json_t *interval_json(ipt_interval i)
{
    return json_pack("{s:o, s:o, s:o}", "mean", number(i.mean), "low", number(i.low), "high",
                     number(i.high));
}

static json_t *figure_json(const ipt_eval *v, size_t m, const ipt_eval_group *g, ipt_figure f,
                           double *a)
{
    ipt_eval_of_sets(v, m, -1, g, f, a);
    json_t *o = interval_json(ipt_eval_bootstrap(a, v->n_set, SEED_OF_BOOTSTRAP)),
           *each = json_array();
    for (size_t j = 0; j < v->n_judge; j++) {
        ipt_eval_of_sets(v, m, (int)j, g, f, a);
        json_array_append_new(each,
                              number(ipt_eval_bootstrap(a, v->n_set, SEED_OF_BOOTSTRAP).mean));
    }
    json_object_set_new(o, "by_judge", each);
    return o;
}

/* Difference from the reference and ratio to it, set by set. */
static json_t *against_json(const ipt_eval *v, size_t m, const ipt_eval_group *g, ipt_figure f,
                            double *a)
{
    const ipt_interval d = difference(v, m, reference_of(v), g, f, a); /* fills a */
    return json_pack("{s:o, s:o}", "difference", interval_json(d), "ratio",
                     interval_json(ipt_eval_ratio(a, a + v->n_set, v->n_set, SEED_OF_BOOTSTRAP)));
}

static json_t *variant_json(const ipt_eval *v, size_t m, size_t first, const ipt_eval_group *g,
                            double *a)
{
    json_t *o = json_object();
    json_object_set_new(o, "method", ipt_json_text(v->method[first].label));
    for (size_t i = 0; i < IPT_COUNT(telling); i++)
        json_object_set_new(o, figures[telling[i]].key,
                            interval_json(difference(v, m, first, g, telling[i], a)));
    return o;
}

static json_t *group_json(const ipt_eval *v, size_t m, const ipt_eval_group *g, double *scratch)
{
    const size_t ref = reference_of(v);
    json_t *o = json_object(), *cost = json_object();
    for (int f = 0; f < IPT_FIGURES; f++)
        json_object_set_new(o, figures[f].key, figure_json(v, m, g, (ipt_figure)f, scratch));
    const ipt_interval apart = separation_of(v, m, g, scratch); /* of methods that give masks */
    json_object_set_new(o, "attention_separation",
                        apart.n > 0 && isfinite(apart.mean) ? interval_json(apart) : json_null());
    for (size_t c = 0; c < IPT_EVAL_WORK; c++)
        json_object_set_new(cost, ipt_eval_costs[c].key, number(cost_of(v, m, g, c, scratch)));
    json_object_set_new(o, "cost_of_a_picture", cost);
    if (ref != SIZE_MAX && ref != m)
        json_object_set_new(o, "against_merge",
                            json_pack("{s:o, s:o}", "presence",
                                      against_json(v, m, g, IPT_FIG_PRESENCE, scratch), "leak",
                                      against_json(v, m, g, IPT_FIG_LEAK, scratch)));
    if (first_variant(v, m) != m)
        json_object_set_new(o, "minus_first_variant",
                            variant_json(v, m, first_variant(v, m), g, scratch));
    return o;
}

static json_t *methods_json(const ipt_eval *v, double *scratch)
{
    size_t n = 0;
    const ipt_eval_group *g = ipt_eval_groups(&n);
    json_t *list = json_array();
    for (size_t m = 0; m < v->n_method; m++) {
        json_t *o = json_object(), *of = json_object();
        for (size_t i = 0; i < n; i++)
            if (sets_in(v, &g[i]) > 0)
                json_object_set_new(of, g[i].key, group_json(v, m, &g[i], scratch));
        json_object_set_new(o, "method", ipt_json_text(v->method[m].label));
        json_object_set_new(o, "groups", of);
        json_array_append_new(list, o);
    }
    return list;
}

static json_t *groups_json(const ipt_eval *v)
{
    size_t n = 0;
    const ipt_eval_group *g = ipt_eval_groups(&n);
    json_t *o = json_object();
    for (size_t i = 0; i < n; i++)
        json_object_set_new(
            o, g[i].key,
            json_pack("{s:s, s:I}", "title", g[i].title, "sets", (json_int_t)sets_in(v, &g[i])));
    return o;
}

ipt_status ipt_eval_json(const ipt_eval *v, json_t **out)
{
    double *scratch = ipt_calloc(v->ctx, 2 * v->n_set * (v->n_seed + 1), sizeof *scratch);
    if (!scratch)
        return IPT_ERR_NOMEM;
    json_t *judges = v->judges ? json_loads(v->judges, 0, NULL) : NULL, *o = json_object();
    json_object_set_new(o, "version", json_string(IPT_VERSION));
    json_object_set_new(o, "judged_on", ipt_json_text(v->device));
    json_object_set_new(o, "drawn_on",
                        v->is_drawn_elsewhere || !v->drawn_on
                            ? json_string("several devices: see the pictures' notes")
                            : ipt_json_text(v->drawn_on));
    json_object_set_new(o, "model_unet_sha256", v->model[0] ? json_string(v->model) : json_null());
    json_object_set_new(o, "sets", json_integer((json_int_t)v->n_set));
    json_object_set_new(o, "seeds", json_integer((json_int_t)v->n_seed));
    json_object_set_new(o, "steps", json_integer(v->o.steps > 0 ? v->o.steps : 20));
    json_object_set_new(o, "cfg", json_real(isnan(v->o.cfg) ? 5 : v->o.cfg));
    json_object_set_new(o, "pictures_made", json_integer((json_int_t)v->n_made));
    json_object_set_new(o, "pictures_kept", json_integer((json_int_t)v->n_kept));
    json_object_set_new(o, "intervals", json_string("95 %, 2000 bootstrap resamples of sets"));
    json_object_set_new(o, "judges", judges ? judges : json_null());
    json_object_set_new(o, "groups", groups_json(v));
    json_object_set_new(o, "methods", methods_json(v, scratch));
    ipt_free(scratch);
    *out = o;
    return o ? IPT_OK : ipt_fail(v->ctx, IPT_ERR_NOMEM, "no memory for the report");
}

/* --- text that grows -------------------------------------------------------------------------- */
typedef struct text {
    ipt_ctx *ctx;
    char *s;
    size_t n, cap;
    bool failed;
} text;

static void put(text *t, const char *fmt, ...) IPT_PRINTF(2, 3);
static void put(text *t, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    const int len = vsnprintf(NULL, 0, fmt, ap);
    if (len > 0 && t->n + (size_t)len + 1 > t->cap) {
        const size_t cap = 2 * (t->n + (size_t)len + 1);
        char *s = ipt_regrow(t->ctx, t->s, t->cap, cap);
        t->failed = t->failed || !s;
        if (s) {
            t->s = s;
            t->cap = cap;
        }
    }
    if (len > 0 && t->n + (size_t)len + 1 <= t->cap)
        t->n += (size_t)vsnprintf(t->s + t->n, t->cap - t->n, fmt, again);
    va_end(again);
    va_end(ap);
}

static ipt_status write_text(const ipt_eval *v, const char *name, text *t)
{
    char path[PATH_MAX];
    ipt_status status =
        t->failed ? ipt_fail(v->ctx, IPT_ERR_NOMEM, "no memory for %s", name) : IPT_OK;
    if (status == IPT_OK && !ipt_path_join(path, sizeof path, v->o.out, name))
        status = ipt_fail(v->ctx, IPT_ERR_OUTPUT, "%.100s...: path too long", v->o.out);
    if (status == IPT_OK)
        status = ipt_file_write(v->ctx, path, t->s ? t->s : "", t->n);
    ipt_free(t->s);
    return status;
}

/* --- the table -------------------------------------------------------------------------------- */
static void put_number(text *t, double v, int digits)
{
    if (isinf(v))
        put(t, "\u221e");
    else
        put(t, "%.*f", digits, v);
}

static void put_cell(text *t, ipt_interval i, int digits)
{
    put(t, " ");
    if (i.n > 0 && !isnan(i.mean)) { /* else no values; or a ratio of nothing to nothing */
        put_number(t, i.mean, digits);
        put(t, " [");
        put_number(t, i.low, digits);
        put(t, ", ");
        put_number(t, i.high, digits);
        put(t, "] ");
    }
    put(t, "|");
}

static void put_head(text *t, const char *const *title, size_t n)
{
    put(t, "| method |");
    for (size_t i = 0; i < n; i++)
        put(t, " %s |", title[i]);
    put(t, "\n|---|");
    for (size_t i = 0; i < n; i++)
        put(t, "---|");
    put(t, "\n");
}

/* Presence by group, then the other figures over all sets. */
static void put_figures(const ipt_eval *v, text *t, double *a)
{
    size_t n = 0;
    const ipt_eval_group *g = ipt_eval_groups(&n), *all = &g[n - 1];
    const char *title[16] = {NULL};
    char heads[16][96];
    for (size_t i = 0; i + 1 < n; i++)
        title[i] = ipt_name(heads[i], sizeof heads[i], "%s (%zu)", g[i].title, sets_in(v, &g[i]));
    put(t, "Presence@k: share of pictures in which all k concepts are there, each in a place of "
           "its own (sets in brackets).\n\n");
    put_head(t, title, n - 1);
    for (size_t m = 0; m < v->n_method; m++) {
        put(t, "| %s |", v->method[m].label);
        for (size_t i = 0; i + 1 < n; i++) {
            ipt_eval_of_sets(v, m, -1, &g[i], IPT_FIG_PRESENCE, a);
            put_cell(t, ipt_eval_bootstrap(a, v->n_set, SEED_OF_BOOTSTRAP), 2);
        }
        put(t, "\n");
    }
    put(t, "\nAll sets.\n\n");
    for (size_t f = IPT_FIG_FOUND; f < IPT_FIGURES; f++)
        title[f - IPT_FIG_FOUND] = figures[f].title;
    put_head(t, title, IPT_FIGURES - IPT_FIG_FOUND);
    for (size_t m = 0; m < v->n_method; m++) {
        put(t, "| %s |", v->method[m].label);
        for (size_t f = IPT_FIG_FOUND; f < IPT_FIGURES; f++) {
            ipt_eval_of_sets(v, m, -1, all, (ipt_figure)f, a);
            put_cell(t, ipt_eval_bootstrap(a, v->n_set, SEED_OF_BOOTSTRAP), figures[f].digits);
        }
        put(t, "\n");
    }
}

/* Against the reference on pairs of one family, where merging mixes; cost of a picture of a pair.
 */
static void put_comparison(const ipt_eval *v, text *t, double *a)
{
    static const char *const title[] = {"presence / merge's",
                                        "leak / merge's",
                                        "leak",
                                        "separation of masks",
                                        "rows full",
                                        "rows shallow",
                                        "rows maps",
                                        "rows backward",
                                        "GMAC",
                                        "ms",
                                        "peak MiB"};
    const ipt_eval_group *pairs = &ipt_eval_groups(&(size_t){0})[0],
                         *any = &ipt_eval_groups(&(size_t){0})[2];
    const size_t ref = reference_of(v);
    double *b = a + v->n_set;
    put(t, "\nPairs of one family against merge (\u221e: merge has none), and what a picture of a "
           "pair costs.\n\n");
    put_head(t, title, IPT_COUNT(title));
    for (size_t m = 0; m < v->n_method; m++) {
        put(t, "| %s |", v->method[m].label);
        for (int f = 0; f < 2; f++) {
            const ipt_figure which = f ? IPT_FIG_LEAK : IPT_FIG_PRESENCE;
            ipt_interval i = {.n = 0};
            ipt_eval_of_sets(v, m, -1, pairs, which, a);
            if (ref != SIZE_MAX) {
                ipt_eval_of_sets(v, ref, -1, pairs, which, b);
                i = ipt_eval_ratio(a, b, v->n_set, SEED_OF_BOOTSTRAP);
            }
            put_cell(t, i, 2);
        }
        put_cell(t, ipt_eval_bootstrap(a, v->n_set, SEED_OF_BOOTSTRAP), 3);
        put_cell(t, separation_of(v, m, pairs, a), 2);
        for (size_t c = 0; c < IPT_EVAL_WORK; c++)
            put(t, " %.4g |", cost_of(v, m, any, c, a));
        put(t, "\n");
    }
}

/* Methods that stand in the list with several options: what the options change. */
static void put_variants(const ipt_eval *v, text *t, double *a)
{
    size_t n = 0, n_variant = 0;
    const ipt_eval_group *g = ipt_eval_groups(&n), *all = &g[n - 1];
    for (size_t m = 0; m < v->n_method; m++)
        n_variant += first_variant(v, m) != m;
    if (n_variant == 0)
        return;
    const char *title[1 + IPT_COUNT(telling)] = {"minus"};
    for (size_t i = 0; i < IPT_COUNT(telling); i++)
        title[1 + i] = figures[telling[i]].title;
    put(t, "\nVariants of one method: their figures minus those of the first in the list, all "
           "sets.\n\n");
    put_head(t, title, IPT_COUNT(title));
    for (size_t m = 0; m < v->n_method; m++) {
        const size_t first = first_variant(v, m);
        if (first == m)
            continue;
        put(t, "| %s | %s |", v->method[m].label, v->method[first].label);
        for (size_t i = 0; i < IPT_COUNT(telling); i++)
            put_cell(t, difference(v, m, first, all, telling[i], a), 3);
        put(t, "\n");
    }
}

static ipt_status write_table(const ipt_eval *v)
{
    text t = {.ctx = v->ctx};
    double *a = ipt_calloc(v->ctx, 2 * v->n_set * (v->n_seed + 1), sizeof *a);
    if (!a)
        return IPT_ERR_NOMEM;
    put(&t,
        "%zu sets x %zu seeds, %d steps, the same noise for all methods; drawn on %s. 95 %% "
        "intervals: bootstrap of sets.\n\n",
        v->n_set, v->n_seed, v->o.steps > 0 ? v->o.steps : 20,
        v->is_drawn_elsewhere || !v->drawn_on ? "several devices" : v->drawn_on);
    put_figures(v, &t, a);
    put_comparison(v, &t, a);
    put_variants(v, &t, a);
    ipt_free(a);
    return write_text(v, "table.md", &t);
}

/* --- one line a picture ----------------------------------------------------------------------- */
static ipt_status write_lines(const ipt_eval *v)
{
    text t = {.ctx = v->ctx};
    put(&t, "set,seed,method,judge");
    for (int f = 0; f < IPT_FIGURES; f++)
        put(&t, ",%s", figures[f].key);
    put(&t, "\n");
    for (size_t m = 0; m < v->n_method; m++)
        for (size_t s = 0; s < v->n_set; s++)
            for (size_t i = 0; i < v->n_seed; i++)
                for (size_t j = 0; j < v->n_judge; j++) {
                    put(&t, "%zu,%zu,\"%s\",%zu", s + 1, i + 1, v->method[m].label, j + 1);
                    for (int f = 0; f < IPT_FIGURES; f++)
                        put(&t, ",%.4g", ipt_eval_figure(v, m, j, s, i)[f]);
                    put(&t, "\n");
                }
    return write_text(v, "pictures.csv", &t);
}

static ipt_status write_json(const ipt_eval *v, const json_t *json)
{
    text t = {.ctx = v->ctx};
    char *dump = json_dumps(json, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
    if (!dump)
        return ipt_fail(v->ctx, IPT_ERR_NOMEM, "no memory for the report");
    put(&t, "%s\n", dump);
    free(dump);
    return write_text(v, "eval.json", &t);
}

ipt_status ipt_eval_report(const ipt_eval *v, const json_t *json)
{
    IPT_TRY(write_json(v, json));
    IPT_TRY(write_table(v));
    IPT_TRY(write_lines(v));
    return ipt_eval_sheet(v);
}
