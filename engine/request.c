/* engine/request.c - requests as JSON, both ways, from the table of fields (request.def). */
#include "engine/impasto.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef enum field_type {
    TEXT,
    PROMPT,
    INT,
    NUMBER,
    SEED,
    CHOICE,
    FLAG,
    OFF,
    TILE,
    TEXTS,
    LORAS
} field_type;
typedef struct field {
    field_type type;
    const char *name;
    size_t at, count; /* of the member, and of its count */
    double min, max;
    const char *choices, *needs;
} field;

#define COUNT_TEXT(m) 0
#define COUNT_PROMPT(m) 0
#define COUNT_INT(m) 0
#define COUNT_NUMBER(m) 0
#define COUNT_SEED(m) 0
#define COUNT_CHOICE(m) 0
#define COUNT_FLAG(m) 0
#define COUNT_OFF(m) 0
#define COUNT_TILE(m) 0
#define COUNT_TEXTS(m) offsetof(ipt_request, n_##m)
#define COUNT_LORAS(m) offsetof(ipt_request, n_##m)
static const field fields[] = {
#define IPT_FIELD(type, member, name, option, letter, value, help, min, max, choices, needs, say)  \
    {type, name, offsetof(ipt_request, member), COUNT_##type(member), min, max, choices, needs},
#include "engine/request.def"
#undef IPT_FIELD
};

enum { MAX_REQUEST = 16 << 20, MAX_ITEMS = 1024, MAX_LORAS = 32, MAX_WEIGHT = 100 };

void ipt_request_init(ipt_request *r)
{
    memset(r, 0, sizeof *r);
    r->cfg = (double)NAN;
    r->strength = (double)NAN;
}

/* --- reading ---------------------------------------------------------------------------------- */
typedef struct reader {
    ipt_ctx *ctx;
    const char *what; /* names the text in messages */
    ipt_arena *arena;
} reader;

static ipt_status wrong(const reader *d, const char *name, const json_t *found,
                        const char *expected)
{
    char *text = found ? json_dumps(found, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    ipt_fail(d->ctx, IPT_ERR_FORMAT, "%s: field '%.80s': found %.80s%s, expected %s", d->what, name,
             text ? text : "nothing", text && strlen(text) > 80 ? "..." : "", expected);
    free(text);
    return IPT_ERR_FORMAT;
}

static ipt_status read_text(const reader *d, const char *name, const json_t *v, bool may_be_empty,
                            const char **out)
{
    const char *s = json_string_value(v);
    if (!s || (!*s && !may_be_empty))
        return wrong(d, name, v, may_be_empty ? "a text" : "a text that is not empty");
    const char *copy = ipt_arena_strdup(d->arena, s);
    if (!copy)
        return IPT_ERR_NOMEM;
    *out = copy;
    return IPT_OK;
}

static ipt_status read_number(const reader *d, const char *name, const json_t *v, double min,
                              double max, double *out)
{
    char expected[80];
    double x = json_number_value(v);
    if (!json_is_number(v) || !(x >= min && x <= max))
        return wrong(d, name, v,
                     ipt_name(expected, sizeof expected, "a number from %g to %g", min, max));
    *out = x;
    return IPT_OK;
}

static ipt_status read_int(const reader *d, const char *name, const json_t *v, const field *f,
                           int32_t *out)
{
    char expected[80];
    json_int_t x = json_integer_value(v);
    if (!json_is_integer(v) || x < (json_int_t)f->min || x > (json_int_t)f->max)
        return wrong(d, name, v,
                     ipt_name(expected, sizeof expected, "%sa whole number from %g to %g",
                              f->type == TILE ? "\"auto\", \"never\" or " : "", f->min, f->max));
    *out = (int32_t)x;
    return IPT_OK;
}

/* A number, or its digits where it passes 2^63 - 1. */
static ipt_status read_seed(const reader *d, const char *name, const json_t *v, uint64_t *out)
{
    const char *s = json_string_value(v);
    uint64_t x =
        json_is_integer(v) && json_integer_value(v) >= 0 ? (uint64_t)json_integer_value(v) : 0;
    bool good = json_is_integer(v) ? json_integer_value(v) >= 0 : s && *s;
    for (; good && s && *s; s++) {
        uint64_t digit = (uint64_t)(*s - '0');
        good = *s >= '0' && *s <= '9' && x <= (UINT64_MAX - digit) / 10;
        x = good ? 10 * x + digit : 0;
    }
    if (!good)
        return wrong(d, name, v, "a whole number from 0 to 18446744073709551615");
    *out = x;
    return IPT_OK;
}

static bool has_word(const char *words, const char *word)
{
    size_t n = strlen(word);
    for (const char *w = words; *w; w += strspn(w, " ")) {
        size_t len = strcspn(w, " ");
        if (n > 0 && len == n && memcmp(w, word, n) == 0)
            return true;
        w += len;
    }
    return false;
}

static ipt_status read_choice(const reader *d, const field *f, const json_t *v, const char **out)
{
    char expected[200];
    const char *s = json_string_value(v);
    if (!s || !has_word(f->choices, s))
        return wrong(d, f->name, v, ipt_name(expected, sizeof expected, "one of: %s", f->choices));
    return read_text(d, f->name, v, false, out);
}

static ipt_status read_texts(const reader *d, const field *f, const json_t *v,
                             const char *const **out, size_t *n_out)
{
    char name[64];
    size_t n = json_array_size(v);
    if (!json_is_array(v) || n > MAX_ITEMS)
        return wrong(d, f->name, v, "a list of at most 1024 texts");
    const char **list = ipt_arena_alloc(d->arena, (n + 1) * sizeof *list);
    if (!list)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        IPT_TRY(read_text(d, ipt_name(name, sizeof name, "%s[%zu]", f->name, i),
                          json_array_get(v, i), false, &list[i]));
    *out = list;
    *n_out = n;
    return IPT_OK;
}

/* One member of a LoRA. */
static ipt_status read_lora_member(const reader *d, const char *name, const char *key,
                                   const json_t *v, ipt_lora *l)
{
    static const struct {
        const char *key;
        size_t at;
        bool text;
        double min, max;
    } members[] = {
        {"file", offsetof(ipt_lora, path), true, 0, 0},
        {"weight", offsetof(ipt_lora, weight), false, -MAX_WEIGHT, MAX_WEIGHT},
        {"te_weight", offsetof(ipt_lora, te_weight), false, -MAX_WEIGHT, MAX_WEIGHT},
        {"word", offsetof(ipt_lora, word), true, 0, 0},
        {"start", offsetof(ipt_lora, start), false, 0, 1},
        {"end", offsetof(ipt_lora, end), false, 0, 1},
        {"blocks", offsetof(ipt_lora, blocks), true, 0, 0},
        {"curve", offsetof(ipt_lora, curve), true, 0, 0},
    };
    for (size_t i = 0; i < IPT_COUNT(members); i++) {
        char *at = (char *)l + members[i].at;
        const char *text = NULL;
        double x = 0;
        if (strcmp(key, members[i].key) != 0)
            continue;
        if (members[i].text) {
            IPT_TRY(read_text(d, name, v, false, &text));
            memcpy(at, &text, sizeof text);
            return IPT_OK;
        }
        IPT_TRY(read_number(d, name, v, members[i].min, members[i].max, &x));
        memcpy(at, &(float){(float)x}, sizeof(float));
        return IPT_OK;
    }
    return ipt_fail(d->ctx, IPT_ERR_FORMAT,
                    "%s: field '%.80s' is unknown; a LoRA has file, weight, te_weight, word, "
                    "start, end, blocks",
                    d->what, name);
}

static ipt_status read_lora(const reader *d, size_t i, json_t *v, ipt_lora *l)
{
    char name[160];
    *l = (ipt_lora){.weight = 1, .te_weight = 1, .end = 1};
    ipt_name(name, sizeof name, "lora[%zu]", i);
    if (!json_is_object(v))
        return wrong(d, name, v, "an object with at least a file");
    for (void *it = json_object_iter(v); it; it = json_object_iter_next(v, it)) {
        ipt_name(name, sizeof name, "lora[%zu].%.100s", i, json_object_iter_key(it));
        IPT_TRY(read_lora_member(d, name, json_object_iter_key(it), json_object_iter_value(it), l));
    }
    ipt_name(name, sizeof name, "lora[%zu].", i);
    if (!l->path)
        return wrong(d, ipt_name(name, sizeof name, "lora[%zu].file", i), NULL,
                     "a text that is not empty");
    if (!json_object_get(v, "te_weight")) /* as on the command line */
        l->te_weight = l->weight;
    return IPT_OK;
}

static ipt_status read_loras(const reader *d, const field *f, const json_t *v, const ipt_lora **out,
                             size_t *n_out)
{
    size_t n = json_array_size(v);
    if (!json_is_array(v) || n > MAX_LORAS)
        return wrong(d, f->name, v, "a list of at most 32 LoRAs");
    ipt_lora *list = ipt_arena_alloc(d->arena, (n + 1) * sizeof *list);
    if (!list)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        IPT_TRY(read_lora(d, i, json_array_get(v, i), &list[i]));
    *out = list;
    *n_out = n;
    return IPT_OK;
}

static ipt_status read_field(const reader *d, const field *f, const json_t *v, ipt_request *r)
{
    char *at = (char *)r + f->at, *count = (char *)r + f->count;
    switch (f->type) {
    case TEXT:
    case PROMPT:
        return read_text(d, f->name, v, f->type == PROMPT, (const char **)(void *)at);
    case INT:
        return read_int(d, f->name, v, f, (int32_t *)(void *)at);
    case NUMBER:
        return read_number(d, f->name, v, f->min, f->max, (double *)(void *)at);
    case SEED:
        return read_seed(d, f->name, v, (uint64_t *)(void *)at);
    case CHOICE:
        return read_choice(d, f, v, (const char **)(void *)at);
    case FLAG:
    case OFF:
        if (!json_is_boolean(v))
            return wrong(d, f->name, v, "true or false");
        *(bool *)(void *)at = json_is_true(v) == (f->type == FLAG);
        return IPT_OK;
    case TILE:
        if (json_is_string(v) && has_word("auto never", json_string_value(v))) {
            *(int32_t *)(void *)at = strcmp(json_string_value(v), "never") == 0 ? -1 : 0;
            return IPT_OK;
        }
        return read_int(d, f->name, v, f, (int32_t *)(void *)at);
    case TEXTS:
        return read_texts(d, f, v, (const char *const **)(void *)at, (size_t *)(void *)count);
    case LORAS:
        return read_loras(d, f, v, (const ipt_lora **)(void *)at, (size_t *)(void *)count);
    }
    return IPT_OK;
}

static ipt_status read_object(const reader *d, json_t *o, ipt_request *r)
{
    if (!json_is_object(o))
        return ipt_fail(d->ctx, IPT_ERR_FORMAT, "%s: not a request: expected a JSON object",
                        d->what);
    for (void *it = json_object_iter(o); it; it = json_object_iter_next(o, it)) {
        const char *key = json_object_iter_key(it);
        size_t k = 0;
        while (k < IPT_COUNT(fields) && strcmp(fields[k].name, key) != 0)
            k++;
        if (k < IPT_COUNT(fields))
            IPT_TRY(read_field(d, &fields[k], json_object_iter_value(it), r));
        else if (strcmp(key, "version") != 0) /* who wrote it */
            return ipt_fail(d->ctx, IPT_ERR_FORMAT, "%s: field '%.80s' is unknown", d->what, key);
    }
    return IPT_OK;
}

ipt_status ipt_request_parse(ipt_arena *arena, const char *what, const char *text, size_t n,
                             ipt_request *r)
{
    const reader d = {arena->ctx, what, arena};
    json_t *o = NULL;
    ipt_request read = *r;
    IPT_TRY(ipt_json_parse(arena->ctx, what, text, n, &o));
    ipt_status status = read_object(&d, o, &read);
    json_decref(o);
    if (status == IPT_OK)
        *r = read;
    return status;
}

ipt_status ipt_request_load(ipt_arena *arena, const char *path, ipt_request *r)
{
    enum { MAX_PICTURE = 256 << 20 };
    static const char png[] = "\x89PNG\r\n\x1a\n";
    char *data = NULL;
    const char *text = NULL;
    size_t n = 0;
    IPT_TRY(ipt_file_read(arena->ctx, path, MAX_PICTURE, &data, &n));
    text = data;
    ipt_status status = IPT_OK;
    if (n >= 8 && memcmp(data, png, 8) == 0)
        status = ipt_image_find_request(arena->ctx, path, data, n, &text, &n);
    if (status == IPT_OK && n > MAX_REQUEST)
        status = ipt_fail(arena->ctx, IPT_ERR_FORMAT, "%s: %zu bytes, a request has at most %d",
                          path, n, MAX_REQUEST);
    if (status == IPT_OK)
        status = ipt_request_parse(arena, path, text, n, r);
    ipt_free(data);
    return status;
}

/* --- writing ---------------------------------------------------------------------------------- */
static json_t *lora_json(const ipt_lora *l)
{
    json_t *o = json_object();
    json_object_set_new(o, "file", ipt_json_text(l->path));
    json_object_set_new(o, "weight", json_real((double)l->weight));
    json_object_set_new(o, "te_weight", json_real((double)l->te_weight));
    if (l->word)
        json_object_set_new(o, "word", ipt_json_text(l->word));
    if (l->start > 0 || l->end < 1) {
        json_object_set_new(o, "start", json_real((double)l->start));
        json_object_set_new(o, "end", json_real((double)l->end));
    }
    if (l->blocks)
        json_object_set_new(o, "blocks", ipt_json_text(l->blocks));
    if (l->curve)
        json_object_set_new(o, "curve", ipt_json_text(l->curve));
    return o;
}

static json_t *list_json(const field *f, const ipt_request *r)
{
    json_t *list = json_array();
    const char *at = (const char *)r + f->at, *count = (const char *)r + f->count;
    size_t n = *(const size_t *)(const void *)count;
    for (size_t i = 0; i < n; i++)
        json_array_append_new(
            list, f->type == LORAS
                      ? lora_json(&(*(const ipt_lora *const *)(const void *)at)[i])
                      : ipt_json_text((*(const char *const *const *)(const void *)at)[i]));
    return list;
}

static json_t *field_json(const field *f, const ipt_request *r)
{
    const void *at = (const char *)r + f->at;
    const char *text = NULL;
    int32_t i = 0;
    double x = 0;
    switch (f->type) {
    case TEXT:
    case PROMPT:
    case CHOICE:
        memcpy(&text, at, sizeof text);
        return ipt_json_text(text);
    case INT:
    case TILE:
        memcpy(&i, at, sizeof i);
        return f->type == TILE && i < 0 ? json_string("never") : json_integer(i);
    case NUMBER:
        memcpy(&x, at, sizeof x);
        return json_real(x);
    case SEED:
        return ipt_json_uint(*(const uint64_t *)at);
    case FLAG:
    case OFF:
        return json_boolean(*(const bool *)at == (f->type == FLAG));
    case TEXTS:
    case LORAS:
        return list_json(f, r);
    }
    return NULL;
}

/* Left out: what is as ipt_request_init has it. */
static bool is_default(const field *f, const ipt_request *r)
{
    static const size_t size[] = {[TEXT] = sizeof(char *),   [PROMPT] = sizeof(char *),
                                  [INT] = sizeof(int32_t),   [NUMBER] = sizeof(double),
                                  [CHOICE] = sizeof(char *), [FLAG] = sizeof(bool),
                                  [TILE] = sizeof(int32_t),  [LORAS] = 0}; /* 0: never */
    ipt_request none;
    ipt_request_init(&none);
    return size[f->type] > 0 &&
           memcmp((const char *)r + f->at, (const char *)&none + f->at, size[f->type]) == 0;
}

static bool is_meaningless(const field *f, const ipt_request *r)
{
    bool init = r->init || r->init_file, mask = init && (r->mask || r->mask_file);
    return f->needs && !(strcmp(f->needs, "mask") == 0 ? mask : init);
}

char *ipt_request_write(const ipt_request *r, ipt_arena *arena)
{
    json_t *o = json_object();
    for (size_t i = 0; i < IPT_COUNT(fields); i++) {
        if (!is_meaningless(&fields[i], r) && !is_default(&fields[i], r))
            json_object_set_new(o, fields[i].name, field_json(&fields[i], r));
    }
    json_object_set_new(o, "version", ipt_json_text("impasto " IPT_VERSION));
    char *text = json_dumps(o, JSON_COMPACT);
    char *copy = text ? ipt_arena_strdup(arena, text) : NULL;
    free(text);
    json_decref(o);
    return copy;
}
