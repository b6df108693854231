/* eval/methods.c - a list of methods in words. */
#include "compose/policy.h"
#include "eval/run.h"

#include <string.h>

enum { MAX_METHODS = 64, MAX_OPTIONS = 32 };
static const char usual[] = "base,single,merge,switch,composite,cmlora,clora";

static bool has_key(const ipt_option *o, const char *key, size_t n)
{
    for (; o && o->key; o++)
        if (strlen(o->key) == n && memcmp(o->key, key, n) == 0)
            return true;
    return false;
}

/* An option that would fail only when the first picture of its method is made, hours later maybe.
 */
static ipt_status check_option(ipt_ctx *ctx, const ipt_method *m, const char *opt)
{
    const size_t n = strcspn(opt, "=");
    if (opt[n] != '=' || n == 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "--methods: '%s' of %s is not KEY=VALUE", opt, m->name);
    if (!has_key(m->option, opt, n) && !has_key(ipt_policy_options(), opt, n))
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "--methods: %s has no option '%.*s'; see impasto generate --help", m->name,
                        (int)n, opt);
    return IPT_OK;
}

static ipt_status read_options(ipt_arena *arena, const ipt_method *m, const char *text,
                               ipt_eval_method *out)
{
    const char **opt = ipt_arena_alloc(arena, MAX_OPTIONS * sizeof *opt);
    char *copy = ipt_arena_strdup(arena, text);
    if (!opt || !copy)
        return IPT_ERR_NOMEM;
    for (char *at = copy; at; out->n_opt++) {
        char *end = strchr(at, ';');
        if (end)
            *end++ = 0;
        if (out->n_opt == MAX_OPTIONS)
            return ipt_fail(arena->ctx, IPT_ERR_ARG, "--methods: more than %d options of %s",
                            MAX_OPTIONS, m->name);
        IPT_TRY(check_option(arena->ctx, m, at));
        opt[out->n_opt] = at;
        at = end;
    }
    out->opt = opt;
    return IPT_OK;
}

static ipt_status find_method(ipt_arena *arena, const char *name, const char *options,
                              ipt_eval_method *out)
{
    char names[256];
    const ipt_method *m = NULL;
    out->kind = strcmp(name, "base") == 0     ? IPT_EVAL_BASE
                : strcmp(name, "single") == 0 ? IPT_EVAL_SINGLE
                                              : IPT_EVAL_COMPOSED;
    if (out->kind == IPT_EVAL_COMPOSED) {
        m = name[0] ? ipt_method_find(name) : NULL;
        if (!m)
            return ipt_fail(arena->ctx, IPT_ERR_ARG,
                            "--methods: '%s' is not in this version; one of: base single %s", name,
                            ipt_method_names(names, sizeof names));
        out->compose = m->name;
        out->has_masks = m->masks != NULL;
    }
    if (!options)
        return IPT_OK;
    if (!m)
        return ipt_fail(arena->ctx, IPT_ERR_ARG, "--methods: %s takes no options", name);
    return read_options(arena, m, options, out);
}

static ipt_status read_method(ipt_arena *arena, const char *label, ipt_eval_method *out)
{
    char *folder = ipt_arena_strdup(arena, label), *name = ipt_arena_strdup(arena, label);
    if (!folder || !name)
        return IPT_ERR_NOMEM;
    for (char *c = folder; *c; c++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789=+-", *c))
            *c = *c == '.' && c != folder ? '.' : '_';
    char *options = strchr(name, ':');
    if (options)
        *options++ = 0;
    out->label = label;
    out->folder = folder;
    return find_method(arena, name, options, out);
}

ipt_status ipt_eval_methods(ipt_arena *arena, const char *list, const ipt_eval_method **out,
                            size_t *n)
{
    ipt_eval_method *m = ipt_arena_alloc(arena, MAX_METHODS * sizeof *m);
    char *at = ipt_arena_strdup(arena, list ? list : usual);
    size_t count = 0;
    if (!m || !at)
        return IPT_ERR_NOMEM;
    while (at) {
        char *end = strchr(at, ',');
        if (end)
            *end++ = 0;
        if (count == MAX_METHODS)
            return ipt_fail(arena->ctx, IPT_ERR_ARG, "--methods: more than %d", MAX_METHODS);
        IPT_TRY(read_method(arena, at, &m[count]));
        for (size_t i = 0; i < count; i++)
            if (strcmp(m[i].folder, m[count].folder) == 0)
                return ipt_fail(arena->ctx, IPT_ERR_ARG, "--methods: '%s' stands there twice", at);
        count++;
        at = end;
    }
    *out = m;
    *n = count;
    return IPT_OK;
}
