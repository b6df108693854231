/* cli/lora_arg.c - the value of --lora, read from the right so that names may hold ':' and '@'. */
#include "cli/cli.h"

#include <string.h>

enum { MAX_WEIGHT = 100 };

/* ",start=", ",end=" or ",blocks=" at p. */
static bool is_key(const char *p)
{
    static const char *const keys[] = {",start=", ",end=", ",blocks="};
    for (size_t i = 0; i < IPT_COUNT(keys); i++)
        if (strncmp(p, keys[i], strlen(keys[i])) == 0)
            return true;
    return false;
}

static ipt_status read_share(ipt_ctx *ctx, const char *arg, const char *what, const char *v,
                             float *out)
{
    double x = 0;
    if (!cli_read_number(v, 0, 1, &x))
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "--lora %.200s: %s is '%s'; expected a number from 0 to 1", arg, what, v);
    *out = (float)x;
    return IPT_OK;
}

/* The ",key=value" items at p, which is cut into pieces. */
static ipt_status read_items(ipt_ctx *ctx, const char *arg, char *p, ipt_lora *l)
{
    while (p) {
        char *key = p + 1, *value = strchr(key, '=');
        if (!value)
            return ipt_fail(ctx, IPT_ERR_ARG, "--lora %.200s: '%s' is not KEY=VALUE", arg, key);
        *value++ = 0;
        p = strchr(value, ',');
        if (p)
            *p = 0;
        if (strcmp(key, "start") == 0)
            IPT_TRY(read_share(ctx, arg, key, value, &l->start));
        else if (strcmp(key, "end") == 0)
            IPT_TRY(read_share(ctx, arg, key, value, &l->end));
        else if (strcmp(key, "blocks") == 0 && *value)
            l->blocks = value;
        else
            return ipt_fail(ctx, IPT_ERR_ARG,
                            strcmp(key, "blocks") == 0
                                ? "--lora %.200s: %s= has no value"
                                : "--lora %.200s: unknown key '%s'; one of start, end, blocks",
                            arg, key);
    }
    if (l->start >= l->end)
        return ipt_fail(ctx, IPT_ERR_ARG, "--lora %.200s: start %g is not before end %g", arg,
                        (double)l->start, (double)l->end);
    return IPT_OK;
}

/* Takes ":number" off the end of text; 1 taken, 0 none there, -1 a number out of range. */
static int take_weight(char *text, float *out)
{
    char *colon = strrchr(text, ':');
    double x = 0;
    if (!colon || strchr(colon, '/') || !cli_read_number(colon + 1, -1e30, 1e30, &x))
        return 0;
    if (x < -MAX_WEIGHT || x > MAX_WEIGHT)
        return -1;
    *out = (float)x;
    *colon = 0;
    return 1;
}

/* A number at p; its end, or NULL. */
static const char *skip_number(const char *p)
{
    const char *begin = p;
    while (*p && strchr("+-.0123456789", *p))
        p++;
    return p > begin ? p : NULL;
}

/* Length of "W@T,W@T..." at p, of two points at least ("W@T" alone is a weight and a word); 0:
 * none. Whether its numbers are good is asked later. */
static size_t curve_length(const char *p)
{
    const char *at = p;
    size_t n = 0;
    for (;; n++) {
        const char *value = skip_number(at),
                   *share = value && *value == '@' ? skip_number(value + 1) : NULL;
        if (!share)
            return 0;
        at = share;
        if (*at != ',' || is_key(at))
            break;
        at++;
    }
    return n > 0 && (*at == 0 || *at == ':' || *at == '@' || *at == ',') ? (size_t)(at - p) : 0;
}

/* Moves the last ":CURVE" out of text to `to`, which has room for all of it. */
static void take_curve(char *text, char *to, ipt_lora *l)
{
    for (char *p = strrchr(text, ':'); p && p > text; p--) {
        size_t n = *p == ':' ? curve_length(p + 1) : 0;
        if (n == 0)
            continue;
        memcpy(to, p + 1, n);
        to[n] = 0;
        memmove(p, p + 1 + n, strlen(p + 1 + n) + 1);
        l->curve = to;
        return;
    }
}

static ipt_status read_weights(ipt_ctx *ctx, const char *arg, char *text, ipt_lora *l)
{
    float last = 1, before = 1;
    int n = take_weight(text, &last), m = n == 1 && !l->curve ? take_weight(text, &before) : 0;
    if (n < 0 || m < 0)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "--lora %.200s: weight out of range; expected a number from -%d to %d", arg,
                        MAX_WEIGHT, MAX_WEIGHT);
    const char *colon = strrchr(text, ':');
    double x = 0;
    if (l->curve && n == 1 && colon && !strchr(colon, '/') && !ipt_is_file(text))
        return ipt_fail(ctx, IPT_ERR_ARG, "--lora %.200s: expected FILE:CURVE[:TE_W]", arg);
    if (m == 1 && colon && cli_read_number(colon + 1, -1e30, 1e30, &x) && !ipt_is_file(text))
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "--lora %.200s: at most two weights, expected FILE[:W[:TE_W]][@WORD]", arg);
    if (colon && !strchr(colon, '/') && !ipt_is_file(text))
        return ipt_fail(
            ctx, IPT_ERR_ARG,
            "--lora %.200s: weight '%.80s' is not a number; expected FILE[:W[:TE_W]][@WORD]", arg,
            colon + 1);
    l->weight = l->curve ? 1 : m == 1 ? before : last;
    l->te_weight = last;
    return IPT_OK;
}

/* One reading of the value; with_word: an '@' without '/' after it starts the word. */
static ipt_status read_lora(ipt_ctx *ctx, const char *arg, bool with_word, ipt_lora *l, char **buf)
{
    size_t size = strlen(arg) + 1;
    char *text = ipt_alloc(ctx, 2 * size), *items = NULL; /* and the curve behind it */
    ipt_status status = IPT_OK;
    if (!text)
        return IPT_ERR_NOMEM;
    memcpy(text, arg, size);
    *l = (ipt_lora){.path = text, .weight = 1, .te_weight = 1, .start = 0, .end = 1};
    take_curve(text, text + size, l);
    char *at = with_word ? strrchr(text, '@') : NULL;
    if (at && !strchr(at, '/')) {
        *at = 0;
        l->word = at + 1;
    }
    for (const char *p = l->word; p && status == IPT_OK && *p; p++)
        if (is_key(p))
            status = ipt_fail(ctx, IPT_ERR_ARG,
                              "--lora %.200s: '%.100s' stands behind @WORD; expected "
                              "FILE[:W[:TE_W]][,start=X][,end=X][,blocks=...][@WORD]",
                              arg, p + 1);
    for (items = text; *items && !is_key(items); items++)
        ;
    if (*items && status == IPT_OK) {
        status = read_items(ctx, arg, items, l);
        *items = 0;
    }
    if (status == IPT_OK)
        status = read_weights(ctx, arg, text, l);
    if (status == IPT_OK && (text[0] == 0 || (l->word && !l->word[0])))
        status = ipt_fail(ctx, IPT_ERR_ARG, "--lora %.200s: expected FILE[:W[:TE_W]][@WORD]", arg);
    if (status == IPT_OK)
        *buf = text;
    else
        ipt_free(text);
    return status;
}

ipt_status cli_lora_parse(ipt_ctx *ctx, const char *arg, ipt_lora *out, char **buf)
{
    ipt_lora l = {0};
    char *text = NULL;
    if (ipt_is_file(arg)) { /* a name that looks like anything */
        text = ipt_strdup(ctx, arg);
        if (!text)
            return IPT_ERR_NOMEM;
        l = (ipt_lora){.path = text, .weight = 1, .te_weight = 1, .start = 0, .end = 1};
    }
    if (!text && strchr(arg, '@')) { /* a file with '@' in its name comes before a word */
        ipt_status s = read_lora(ctx, arg, false, &l, &text);
        if (s == IPT_OK && (!ipt_is_file(l.path) || (l.blocks && strchr(l.blocks, '@')))) {
            ipt_free(text);
            text = NULL;
        }
    }
    if (!text)
        IPT_TRY(read_lora(ctx, arg, true, &l, &text));
    *out = l;
    *buf = text;
    return IPT_OK;
}
