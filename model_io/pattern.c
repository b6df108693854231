/* model_io/pattern.c - the regular expressions that PEFT's alpha_pattern holds, through PCRE2,
 * whose syntax is Python's but for the repeat {,n}.  A backtracking matcher takes exponential time
 * for some expressions: its steps are counted, and come off a budget of the file.
 *
 * Sources: peft get_pattern_key; pcre2pattern(3), pcre2callout(3). */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "model_io/internal.h"

#include <pcre2.h>
#include <string.h>

enum {
    MAX_TEXT = 512,
    MAX_HEAP = 4096, /* KiB, of one match */
    MAX_NEST = 100,
    COMPILED = 1 << 14, /* steps that an expression costs by its memory: a file has 1024 at most */
    NAMED = 64,         /* and a plain name */
};

struct ipt_pattern {
    const char *plain; /* a name, dots being any character; the rest is not used then */
    pcre2_code *code;
    pcre2_match_context *context;
    pcre2_match_data *data;
    char why[128]; /* of a failed compilation */
};

static void *take_memory(size_t n, void *arena) { return ipt_arena_alloc(arena, n); }
static void leave_memory(void *p, void *arena) { (void)p, (void)arena; /* dies with the arena */ }

/* Copies Python's expression; "{,n}", which PCRE2 before 10.43 takes literally, becomes "{0,n}". */
static void translate(const char *text, char *out)
{
    bool in_set = false, first = false; /* "]" at a set's start is a member */
    for (const char *p = text; *p; p++) {
        *out++ = *p;
        if (*p == '\\' && p[1]) {
            *out++ = *++p;
        } else if (in_set) {
            in_set = *p != ']' || first;
            first = first && *p == '^' && p[-1] == '[';
            continue;
        } else if (*p == '[') {
            in_set = first = true;
            continue;
        } else if (*p == '{' && p[1] == ',') {
            size_t n = strspn(p + 2, "0123456789");
            if (p[2 + n] == '}')
                *out++ = '0';
        }
        first = false;
    }
    *out = '\0';
}

/* Called before each item of the expression: a step. */
static int count_step(pcre2_callout_block *block, void *budget)
{
    uint64_t *left = budget;
    (void)block;
    if (*left == 0)
        return PCRE2_ERROR_CALLOUT;
    (*left)--;
    return 0;
}

static bool spend(uint64_t *budget, uint64_t cost)
{
    *budget = *budget > cost ? *budget - cost : 0;
    return *budget > 0;
}

/* Files have a pattern for each of a thousand modules, and a thousand modules look for theirs:
 * names without syntax are compared from their end. */
static bool is_plain(const char *text)
{
    for (text += *text == '^'; *text; text++)
        if (*text != '.' && *text != '_' && !(*text >= '0' && *text <= '9') &&
            !(*text >= 'a' && *text <= 'z') && !(*text >= 'A' && *text <= 'Z'))
            return false;
    return true;
}

static bool match_plain(const char *text, const char *name, uint64_t *budget)
{
    bool whole = *text == '^';
    size_t n = strlen(text += whole), len = strlen(name), at = len - n, i = n;
    if (!spend(budget, 1) || n > len || (at > 0 && (whole || name[at - 1] != '.')))
        return false;
    while (i > 0 && (text[i - 1] == '.' || text[i - 1] == name[at + i - 1]))
        i--;
    return i == 0;
}

ipt_status ipt_pattern_create(ipt_arena *arena, const char *text, uint64_t *budget,
                              ipt_pattern **out, const char **why)
{
    char python[2 * MAX_TEXT + 1], whole[sizeof python + 16];
    int error = 0;
    PCRE2_SIZE at = 0;
    *why = strlen(text) > MAX_TEXT                             ? "longer than 512 bytes"
           : !spend(budget, is_plain(text) ? NAMED : COMPILED) ? "the file has too many"
                                                               : NULL;
    if (*why)
        return IPT_ERR_UNSUPPORTED;
    ipt_pattern *p = ipt_arena_alloc(arena, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    if (is_plain(text)) {
        p->plain = ipt_arena_strdup(arena, text);
        *out = p;
        return p->plain ? IPT_OK : IPT_ERR_NOMEM;
    }
    translate(text, python);
    snprintf(whole, sizeof whole, "(.*\\.)?(%s)$", python);
    pcre2_general_context *memory = pcre2_general_context_create(take_memory, leave_memory, arena);
    pcre2_compile_context *limits = memory ? pcre2_compile_context_create(memory) : NULL;
    if (!limits)
        return IPT_ERR_NOMEM;
    pcre2_set_parens_nest_limit(limits, MAX_NEST);
    p->code = pcre2_compile((PCRE2_SPTR)whole, PCRE2_ZERO_TERMINATED,
                            PCRE2_ANCHORED | PCRE2_AUTO_CALLOUT | PCRE2_NO_AUTO_POSSESS |
                                PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C,
                            &error, &at, limits);
    if (!p->code) {
        if (error == PCRE2_ERROR_HEAP_FAILED)
            return IPT_ERR_NOMEM;
        pcre2_get_error_message(error, (PCRE2_UCHAR *)p->why, sizeof p->why);
        *why = p->why;
        return IPT_ERR_UNSUPPORTED;
    }
    p->context = pcre2_match_context_create(memory);
    p->data = pcre2_match_data_create(1, memory);
    if (!p->context || !p->data)
        return IPT_ERR_NOMEM;
    pcre2_set_heap_limit(p->context, MAX_HEAP);
    *out = p;
    return IPT_OK;
}

bool ipt_pattern_match(const ipt_pattern *p, const char *name, uint64_t *budget)
{
    if (p->plain)
        return match_plain(p->plain, name, budget);
    pcre2_set_callout(p->context, count_step, budget);
    int rc =
        pcre2_match(p->code, (PCRE2_SPTR)name, PCRE2_ZERO_TERMINATED, 0, 0, p->data, p->context);
    if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
        *budget = 0; /* too many steps or too much memory */
    return rc >= 0;
}
