/* bench/compare.c - see compare.h. */
#include "bench/compare.h"

#include <math.h>
#include <string.h>

/* Rows with a note instead of a time are of no use here. */
static bool has_time(const json_t *row)
{
    const double ms = ipt_json_num(row, "ms", 0);
    return isfinite(ms) && ms > 0;
}

static ipt_status check_rows(ipt_ctx *ctx, const char *path, const json_t *rows)
{
    size_t n_time = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        if (!ipt_json_str(row, "name", NULL))
            return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: row %zu has no name", path, i + 1);
        if (!has_time(row) && !json_object_get(row, "note"))
            return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: row %zu has no time", path, i + 1);
        n_time += has_time(row);
    }
    if (n_time == 0)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: has no rows with times", path);
    return IPT_OK;
}

ipt_status ipt_bench_load(ipt_ctx *ctx, const char *path, const char *what, json_t **out)
{
    json_t *o = NULL;
    IPT_TRY(ipt_json_load(ctx, path, &o));
    const char *bench = ipt_json_str(o, "bench", NULL);
    ipt_status status = IPT_OK;
    if (!bench)
        status = ipt_fail(ctx, IPT_ERR_FORMAT, "%s: not a result of impasto bench --json", path);
    else if (strcmp(bench, what) != 0)
        status = ipt_fail(ctx, IPT_ERR_FORMAT, "%s: a result of bench %.32s, not of bench %s", path,
                          bench, what);
    else
        status = check_rows(ctx, path, json_object_get(o, "rows"));
    if (status == IPT_OK)
        *out = o;
    else
        json_decref(o);
    return status;
}

/* What tells a row from the others of its bench. */
static const char *row_name(const json_t *row, char *buf, size_t n)
{
    const char *op = ipt_json_str(row, "op", NULL), *name = ipt_json_str(row, "name", "");
    const int64_t batch = ipt_json_int(row, "batch", 1);
    size_t at = strlen(ipt_name(buf, n, "%.64s%s%.128s", op ? op : "", op ? " " : "", name));
    if (batch != 1)
        ipt_name(buf + at, n - at, ", batch %" PRId64, batch);
    return buf;
}

static const json_t *find_row(const json_t *result, const char *name)
{
    const json_t *rows = json_object_get(result, "rows");
    char buf[256];
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        if (has_time(row) && strcmp(row_name(row, buf, sizeof buf), name) == 0)
            return row;
    }
    return NULL;
}

/* Names of a's rows that b has not; with `both`, ratios of those that it has. */
static json_t *walk(const json_t *a, const json_t *b, json_t *both)
{
    const json_t *rows = json_object_get(a, "rows");
    json_t *only = json_array();
    char name[256];
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        if (!has_time(row))
            continue;
        const json_t *other = find_row(b, row_name(row, name, sizeof name));
        const double ms = ipt_json_num(row, "ms", 0), old = ipt_json_num(other, "ms", 0);
        if (!other)
            json_array_append_new(only, ipt_json_text(name));
        else if (both)
            json_array_append_new(both,
                                  json_pack("{s:o, s:f, s:f, s:f}", "name", ipt_json_text(name),
                                            "ms", ms, "earlier_ms", old, "ratio", ms / old));
    }
    return only;
}

static json_t *differences(const json_t *now, const json_t *earlier)
{
    static const char *const what[] = {"device", "driver", "kernels", "weights", "activations",
                                       "config", "width",  "height",  "model",   "steps"};
    json_t *out = json_array();
    for (size_t i = 0; i < IPT_COUNT(what); i++) {
        json_t *a = json_object_get(now, what[i]), *b = json_object_get(earlier, what[i]);
        if ((a || b) && !(a && b && json_equal(a, b)))
            json_array_append_new(
                out, json_pack("{s:s, s:O*, s:O*}", "what", what[i], "now", a, "earlier", b));
    }
    return out;
}

json_t *ipt_bench_compare(const json_t *now, const json_t *earlier)
{
    json_t *rows = json_array(), *only_now = walk(now, earlier, rows);
    return json_pack("{s:o, s:o, s:o, s:o}", "rows", rows, "only_now", only_now, "only_earlier",
                     walk(earlier, now, NULL), "differs", differences(now, earlier));
}
