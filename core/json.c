/* core/json.c - jansson with our messages and defaults. */
#include "core/core.h"

#include <jansson.h>
#include <string.h>

enum { MAX_JSON_BYTES = 256 * 1024 * 1024 };

ipt_status ipt_json_parse(ipt_ctx *ctx, const char *what, const char *text, size_t n, json_t **out)
{
    json_error_t err;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &err);
    if (!root) {
        if (json_error_code(&err) == json_error_out_of_memory)
            return ipt_fail(ctx, IPT_ERR_NOMEM, "%s: out of memory while reading JSON", what);
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: not valid JSON: %.200s (line %d, column %d)",
                        what, err.text, err.line, err.column);
    }
    *out = root;
    return IPT_OK;
}

ipt_status ipt_json_load(ipt_ctx *ctx, const char *path, json_t **out)
{
    char *text = NULL;
    size_t n = 0;
    IPT_TRY(ipt_file_read(ctx, path, MAX_JSON_BYTES, &text, &n));
    ipt_status status = ipt_json_parse(ctx, path, text, n, out);
    ipt_free(text);
    return status;
}

json_t *ipt_json_text(const char *s)
{
    json_t *o = s ? json_string(s) : json_null();
    size_t n = s ? strlen(s) * (IPT_PRINTABLE - 1) + 1 : 0;
    if (o)
        return o;
    char *clean = ipt_alloc(NULL, n); /* not UTF-8 */
    if (!clean)
        return NULL;
    o = json_string(ipt_printable(s, clean, n));
    ipt_free(clean);
    return o;
}

json_t *ipt_json_uint(uint64_t v)
{
    char text[24];
    return v <= INT64_MAX ? json_integer((json_int_t)v)
                          : json_string(ipt_name(text, sizeof text, "%" PRIu64, v));
}

double ipt_json_num(const json_t *o, const char *key, double dflt)
{
    const json_t *v = json_object_get(o, key);
    return json_is_number(v) ? json_number_value(v) : dflt;
}

int64_t ipt_json_int(const json_t *o, const char *key, int64_t dflt)
{
    const json_t *v = json_object_get(o, key);
    return json_is_integer(v) ? json_integer_value(v) : dflt;
}

bool ipt_json_bool(const json_t *o, const char *key, bool dflt)
{
    const json_t *v = json_object_get(o, key);
    return json_is_boolean(v) ? json_is_true(v) : dflt;
}

const char *ipt_json_str(const json_t *o, const char *key, const char *dflt)
{
    const json_t *v = json_object_get(o, key);
    return json_is_string(v) ? json_string_value(v) : dflt;
}
