/* cli/args.c - options from a table: strict values, named ranges, suggestions, help. */
#include "cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const cli_option common[] = {
    {"json", 0, CLI_FLAG, NULL, "print one JSON object on standard output", offsetof(cli, json), 0,
     0, NULL},
    {"quiet", 'q', CLI_FLAG, NULL, "no progress, no warnings", offsetof(cli, quiet), 0, 0, NULL},
    {"verbose", 'v', CLI_FLAG, NULL, "say more on standard error", offsetof(cli, verbose), 0, 0,
     NULL},
    {"help", 'h', CLI_FLAG, NULL, "show this", 0, 0, 0, NULL},
    {0},
};

static size_t min3(size_t a, size_t b, size_t c)
{
    size_t m = a < b ? a : b;
    return m < c ? m : c;
}

/* Levenshtein distance where two exchanged neighbours count once (optimal string alignment). */
static size_t distance(const char *a, size_t na, const char *b, size_t nb)
{
    enum { MAX = 40 };
    size_t d[3][MAX + 1];
    if (na > MAX || nb > MAX)
        return MAX;
    for (size_t j = 0; j <= nb; j++)
        d[0][j] = j;
    for (size_t i = 1; i <= na; i++) {
        size_t *row = d[i % 3], *up = d[(i + 2) % 3], *up2 = d[(i + 1) % 3];
        row[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            row[j] = min3(up[j] + 1, row[j - 1] + 1, up[j - 1] + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                up2[j - 2] + 1 < row[j])
                row[j] = up2[j - 2] + 1;
        }
    }
    return d[na % 3][nb];
}

bool cli_has_word(const char *word, const char *words)
{
    size_t n = strlen(word);
    for (const char *w = words; n > 0 && *w;) {
        size_t len = strcspn(w, " ");
        if (len == n && memcmp(w, word, n) == 0)
            return true;
        w += len;
        w += strspn(w, " ");
    }
    return false;
}

const char *cli_nearest(const char *word, const char *words, char *buf, size_t n)
{
    size_t best = strlen(word) / 3 + 2;
    buf[0] = 0;
    for (const char *w = words; *w;) {
        size_t len = strcspn(w, " "), d = distance(word, strlen(word), w, len);
        if (d < best && d < len) {
            best = d;
            ipt_name(buf, n, "%.*s", (int)len, w);
        }
        w += len;
        w += strspn(w, " ");
    }
    return buf[0] ? buf : NULL;
}

static const cli_option *find_in(const cli_option *table, const char *name, size_t n, char letter)
{
    for (const cli_option *o = table; o && o->name; o++)
        if (name ? strlen(o->name) == n && memcmp(o->name, name, n) == 0
                 : letter && o->letter == letter)
            return o;
    return NULL;
}

/* A long name as this program calls it; *n is its length. */
static const char *own_name(const cli_alias *table, const char *name, size_t *n)
{
    for (const cli_alias *a = table; a && a->name; a++)
        if (strlen(a->name) == *n && memcmp(a->name, name, *n) == 0) {
            *n = strlen(a->option);
            return a->option;
        }
    return name;
}

static int unknown_option(const cli *c, const cli_command *cmd, const char *arg)
{
    char words[2048] = "", near[64], name[64];
    size_t at = 0;
    const cli_option *tables[] = {cmd->option, common};
    for (size_t t = 0; t < IPT_COUNT(tables); t++)
        for (const cli_option *o = tables[t]; o && o->name && at < sizeof words; o++)
            at += (size_t)snprintf(words + at, sizeof words - at, "%s ", o->name);
    for (const cli_alias *a = cmd->alias; a && a->name && at < sizeof words; a++)
        at += (size_t)snprintf(words + at, sizeof words - at, "%s ", a->name);
    ipt_name(name, sizeof name, "%.*s", (int)strcspn(arg + strspn(arg, "-"), "="),
             arg + strspn(arg, "-"));
    const char *hint = cli_nearest(name, words, near, sizeof near);
    if (hint)
        return cli_usage_error(c, "unknown option %.80s; did you mean --%s? See impasto %s --help",
                               arg, hint, cmd->name);
    return cli_usage_error(c, "unknown option %.80s; see impasto %s --help", arg, cmd->name);
}

static int bad_value(const cli *c, const cli_option *o, const char *v)
{
    char near[64];
    const char *hint = o->type == CLI_CHOICE ? cli_nearest(v, o->choices, near, sizeof near) : NULL;
    if (hint)
        return cli_usage_error(c, "--%s '%.80s' is unknown; did you mean %s? One of: %s", o->name,
                               v, hint, o->choices);
    if (o->type == CLI_CHOICE)
        return cli_usage_error(c, "--%s '%.80s' is unknown; one of: %s", o->name, v, o->choices);
    if (o->type == CLI_SEED)
        return cli_usage_error(
            c, "--%s is '%.80s'; expected a whole number from 0 to 18446744073709551615, or random",
            o->name, v);
    return cli_usage_error(c, "--%s is '%.80s'; expected %sa %snumber from %g to %g", o->name, v,
                           o->type == CLI_TILE ? "auto, never or " : "",
                           o->type == CLI_NUMBER ? "" : "whole ", o->min, o->max);
}

static bool read_seed(const char *v, uint64_t *out)
{
    char *end = NULL;
    if (v[0] < '0' || v[0] > '9')
        return false;
    errno = 0;
    unsigned long long x = strtoull(v, &end, 10);
    *out = x;
    return errno == 0 && *end == 0;
}

bool cli_list_add(ipt_ctx *ctx, cli_list *l, const char *v)
{
    const char **item = ipt_calloc(ctx, l->n + 1, sizeof *item);
    if (!item)
        return false;
    for (size_t i = 0; i < l->n; i++)
        item[i] = l->item[i];
    item[l->n] = v;
    ipt_free(l->item);
    l->item = item;
    l->n++;
    return true;
}

void cli_list_finish(cli_list *l)
{
    ipt_free(l->item);
    l->item = NULL;
    l->n = 0;
}

static int store(cli *c, const cli_option *o, const char *v, void *into)
{
    char *p = (char *)into + o->at;
    int64_t i = 0;
    double x = 0;
    uint64_t seed = 0;
    switch (o->type) {
    case CLI_FLAG:
        memcpy(p, &(bool){true}, sizeof(bool));
        return CLI_GO_ON;
    case CLI_CHOICE:
        if (!cli_has_word(v, o->choices))
            return bad_value(c, o, v);
        memcpy(p, &v, sizeof v);
        return CLI_GO_ON;
    case CLI_TEXT:
        if (v[0] == 0)
            return cli_usage_error(c, "--%s is empty; expected %s", o->name, o->value);
        memcpy(p, &v, sizeof v);
        return CLI_GO_ON;
    case CLI_PROMPT:
        memcpy(p, &v, sizeof v);
        return CLI_GO_ON;
    case CLI_INT:
        if (!cli_read_int(v, (int64_t)o->min, (int64_t)o->max, &i))
            return bad_value(c, o, v);
        memcpy(p, &(int32_t){(int32_t)i}, sizeof(int32_t));
        return CLI_GO_ON;
    case CLI_TILE:
        i = strcmp(v, "never") == 0 ? -1 : 0;
        if (i == 0 && strcmp(v, "auto") != 0 &&
            !cli_read_int(v, (int64_t)o->min, (int64_t)o->max, &i))
            return bad_value(c, o, v);
        memcpy(p, &(int32_t){(int32_t)i}, sizeof(int32_t));
        return CLI_GO_ON;
    case CLI_NUMBER:
        if (!cli_read_number(v, o->min, o->max, &x))
            return bad_value(c, o, v);
        memcpy(p, &x, sizeof x);
        return CLI_GO_ON;
    case CLI_SEED:
        if (strcmp(v, "-1") == 0 || strcmp(v, "random") == 0) {
            ipt_status s = cli_random_seed(c->ctx, &seed);
            if (s != IPT_OK)
                return cli_fail_status(c, s);
        } else if (!read_seed(v, &seed)) {
            return bad_value(c, o, v);
        }
        memcpy(p, &seed, sizeof seed);
        return CLI_GO_ON;
    case CLI_REPEAT:
        if (v[0] == 0)
            return cli_usage_error(c, "--%s is empty; expected %s", o->name, o->value);
        return cli_list_add(c->ctx, (cli_list *)(void *)p, v) ? CLI_GO_ON
                                                              : cli_fail_status(c, IPT_ERR_NOMEM);
    case CLI_LATER:
        break;
    }
    return cli_usage_error(c, "--%s is not in this version%s%s", o->name, o->choices ? "; " : "",
                           o->choices ? o->choices : "");
}

/* One option at argv[*i]; *i moves over its value. */
static int take_option(cli *c, const cli_command *cmd, int argc, char **argv, int *i, void *into)
{
    const char *arg = argv[*i];
    bool is_long = arg[1] == '-';
    const char *name = arg + (is_long ? 2 : 1), *inline_value = NULL;
    size_t n = is_long ? strcspn(name, "=") : 1;
    if (is_long && name[n] == '=')
        inline_value = name + n + 1;
    if (!is_long && name[1])
        inline_value = name + 1 + (name[1] == '=');
    void *target = into;
    if (is_long)
        name = own_name(cmd->alias, name, &n);
    const cli_option *o = find_in(cmd->option, is_long ? name : NULL, n, name[0]);
    if (!o) {
        o = find_in(common, is_long ? name : NULL, n, name[0]);
        target = c;
    }
    if (!o)
        return unknown_option(c, cmd, arg);
    if (o->type == CLI_FLAG) {
        if (inline_value)
            return is_long ? cli_usage_error(c, "--%s takes no value; see impasto %s --help",
                                             o->name, cmd->name)
                           : unknown_option(c, cmd, arg);
        if (strcmp(o->name, "help") == 0) {
            cli_help(cmd);
            return CLI_OK;
        }
        return store(c, o, NULL, target);
    }
    if (o->type == CLI_LATER)
        return store(c, o, NULL, target);
    if (!inline_value && *i + 1 >= argc)
        return cli_usage_error(c, "--%s needs a value: %s; see impasto %s --help", o->name,
                               o->value, cmd->name);
    return store(c, o, inline_value ? inline_value : argv[++*i], target);
}

int cli_parse(cli *c, const cli_command *cmd, int argc, char **argv, void *into, cli_list *args)
{
    bool only_args = false;
    int n_args = 0;
    c->command = cmd->name;
    for (int i = 0; i < argc; i++) /* help wins over mistakes */
        if (strcmp(argv[i], "--") == 0)
            break;
        else if (strcmp(argv[i], "--help") == 0) {
            cli_help(cmd);
            return CLI_OK;
        }
    for (int i = 0; i < argc; i++) {
        int rc = CLI_GO_ON;
        if (!only_args && strcmp(argv[i], "--") == 0) {
            only_args = true;
        } else if (!only_args && argv[i][0] == '-' && argv[i][1]) {
            rc = take_option(c, cmd, argc, argv, &i, into);
        } else if (!args || (cmd->max_args >= 0 && n_args >= cmd->max_args)) {
            rc = cli_usage_error(c, "unexpected argument '%.80s'; see impasto %s --help", argv[i],
                                 cmd->name);
        } else {
            n_args++;
            if (!cli_list_add(c->ctx, args, argv[i]))
                rc = cli_fail_status(c, IPT_ERR_NOMEM);
        }
        if (rc != CLI_GO_ON)
            return rc;
    }
    if (n_args < cmd->min_args)
        return cli_usage_error(c, "usage: impasto %s %s; see impasto %s --help", cmd->name,
                               cmd->usage, cmd->name);
    return CLI_GO_ON;
}

static void help_options(const cli_option *table)
{
    for (const cli_option *o = table; o && o->name; o++) {
        char left[80], letter[8] = "    ";
        if (o->type == CLI_LATER)
            continue;
        if (o->letter)
            ipt_name(letter, sizeof letter, "-%c, ", o->letter);
        ipt_name(left, sizeof left, "%s--%s%s%s", letter, o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        cli_own_text("  %-30s%s%s", left, strlen(left) >= 30 ? " " : "", o->help);
        if (o->type == CLI_INT || o->type == CLI_NUMBER)
            cli_own_text(" (%.9g..%.9g)", o->min, o->max);
        cli_own_text("\n");
    }
}

/* "Also understood: --cfg-scale (--cfg), ...", in lines of at most 100 columns. */
static void help_aliases(const cli_alias *table)
{
    char item[80];
    size_t column = 0;
    for (const cli_alias *a = table; a && a->name; a++) {
        ipt_name(item, sizeof item, "--%s (--%s)%s", a->name, a->option, a[1].name ? "," : "");
        if (column == 0)
            cli_own_text("\nOther programs' words:");
        else if (column + strlen(item) > 96)
            cli_own_text("\n ");
        column = column == 0 ? 23 : column + strlen(item) > 96 ? 2 : column;
        column += strlen(item) + 1;
        cli_own_text(" %s", item);
    }
    if (column > 0)
        cli_own_text("\n");
}

void cli_help(const cli_command *cmd)
{
    cli_own_text("usage: impasto %s %s\n\n%s\n", cmd->name, cmd->usage, cmd->brief);
    if (cmd->about[0])
        cli_own_text("\n%s", cmd->about);
    cli_own_text("\nOptions:\n");
    help_options(cmd->option);
    help_options(common);
    help_aliases(cmd->alias);
    if (cmd->more)
        cmd->more();
    cli_own_text("\nExamples:\n%s", cmd->example);
}
