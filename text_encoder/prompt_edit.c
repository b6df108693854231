/* text_encoder/prompt_edit.c - prompts that change over the steps: [from:to:when], [a|b], and AND.
 *
 * A1111 reads prompts with an ambiguous grammar; what its parser makes of it is this.  A bracket
 * that is closed, whose inside holds only closed brackets and, by its kind, the right separators,
 * is a node: ( ) with at most one colon, [ ] with none, [ ] with bars alone, [ ] with one or two
 * colons of which the last is followed by a number.  All others are text, and so is what encloses
 * them.  A bar outside of a node of bars, or a backslash before nothing or a line end, makes the
 * whole prompt text.  Source: stable-diffusion-webui 1.10, modules/prompt_parser.py, run beside. */
#include "text_encoder/tokenizer.h"

#include "text_encoder/tokenizer_impl.h"

#include <math.h>
#include <string.h>

static bool is_blank(uint32_t cp) { return tok_is_space(cp) || (cp >= 0x1c && cp <= 0x1f); }
static bool is_word(uint32_t cp) { return cp == '_' || tok_is_letter(cp) || tok_is_number(cp); }
static bool is_digit(uint32_t cp) { return cp >= '0' && cp <= '9'; }
static bool is_sign(uint32_t cp) { return cp == '+' || cp == '-'; }

/* --- nodes ------------------------------------------------------------------------------------ */
typedef enum node_kind { NODE_TEXT, NODE_CHANGES, NODE_ALTERNATES } node_kind;
typedef struct node {
    node_kind kind;
    uint32_t close; /* place of its bracket */
    uint32_t first; /* its first separator, 0: none; the next one is next[first] */
    uint32_t n_bar, n_colon;
    int32_t when; /* of NODE_CHANGES: the last step of what it is before */
} node;

struct ipt_prompt_edits {
    ipt_ctx *ctx;
    const char *text; /* copied */
    tok_chars c;
    node *at;        /* [c.n] of each opening bracket */
    uint32_t *next;  /* [c.n] from each separator to the next one of its node, 0: the last */
    uint32_t *stack; /* [c.n] open brackets, or ranges to be written */
    uint32_t *last;  /* [c.n] last separator of an open bracket */
    bool *is_step;   /* [steps + 1] the prompt changes after it */
    int32_t steps;
    bool literal;
};

/* The number between character i and end with blanks around it: when it is due in `steps`. */
static bool read_when(const ipt_prompt_edits *p, size_t i, size_t end, int32_t *when)
{
    const tok_char *c = p->c.v;
    double v = 0, power = 0;
    bool fraction = false;
    while (i < end && is_blank(c[i].cp))
        i++;
    while (end > i && is_blank(c[end - 1].cp))
        end--;
    size_t e = i + (i < end && is_sign(c[i].cp)), k = 0;
    for (; e < end && (is_digit(c[e].cp) || c[e].cp == '.'); e++)
        fraction = fraction || c[e].cp == '.';
    if (e == i || !tok_read_number(p->text + c[i].begin, c[e - 1].end - c[i].begin, &v))
        return false;
    if (e < end) { /* an exponent: whole, with a sign or without */
        for (k = e + 1 + (e + 1 < end && is_sign(c[e + 1].cp)); k < end && is_digit(c[k].cp);)
            k++;
        if ((c[e].cp != 'e' && c[e].cp != 'E') || k < end || e + 1 == end ||
            !tok_read_number(p->text + c[e + 1].begin, c[end - 1].end - c[e + 1].begin, &power))
            return false;
        if (v != 0) /* 0e999 is 0, not 0 times infinity */
            v *= pow(10, power);
    }
    if (fraction)
        v *= p->steps;
    *when = v >= p->steps ? p->steps : v < 0 ? 0 : (int32_t)v;
    return true;
}

/* What the bracket pair at `open` is; false: text. */
static bool settle(ipt_prompt_edits *p, uint32_t open, uint32_t close, uint32_t last)
{
    node *n = &p->at[open];
    n->close = close;
    if (p->c.v[open].cp == '(')
        return n->n_bar == 0 && n->n_colon <= 1;
    if (n->n_bar > 0) {
        n->kind = NODE_ALTERNATES;
        return n->n_colon == 0;
    }
    if (n->n_colon == 0)
        return true;
    n->kind = NODE_CHANGES;
    return n->n_colon <= 2 && read_when(p, last + 1, close, &n->when);
}

/* All open brackets are text; false: one of them had a bar. */
static bool give_up(ipt_prompt_edits *p, size_t *depth)
{
    bool ok = true;
    for (; *depth > 0; --*depth) {
        ok = ok && p->at[p->stack[*depth - 1]].n_bar == 0;
        p->at[p->stack[*depth - 1]] = (node){0};
    }
    return ok;
}

static void add_separator(ipt_prompt_edits *p, size_t depth, uint32_t i)
{
    node *n = &p->at[p->stack[depth - 1]];
    uint32_t *last = &p->last[depth - 1];
    if (n->first)
        p->next[*last] = i;
    else
        n->first = i;
    *last = i;
    n->n_bar += p->c.v[i].cp == '|';
    n->n_colon += p->c.v[i].cp == ':';
}

/* false: the whole prompt is text. */
static bool find_nodes(ipt_prompt_edits *p)
{
    size_t depth = 0;
    for (uint32_t i = 0; i < p->c.n; i++) {
        uint32_t cp = p->c.v[i].cp;
        if (cp == '\\') {
            if (++i == p->c.n || p->c.v[i].cp == '\n')
                return false;
        } else if (cp == '(' || cp == '[') {
            p->last[depth] = 0;
            p->stack[depth++] = i;
        } else if (cp == ')' || cp == ']') {
            uint32_t open = depth > 0 ? p->stack[depth - 1] : 0;
            bool fits = depth > 0 && (p->c.v[open].cp == '(') == (cp == ')') &&
                        settle(p, open, i, p->last[depth - 1]);
            if (fits)
                depth--;
            else if (!give_up(p, &depth))
                return false;
        } else if (cp == '|' && (depth == 0 || p->c.v[p->stack[depth - 1]].cp == '(')) {
            return false;
        } else if ((cp == '|' || cp == ':') && depth > 0) {
            add_separator(p, depth, i);
        }
    }
    return give_up(p, &depth);
}

static void collect_steps(ipt_prompt_edits *p)
{
    p->is_step[p->steps] = true;
    for (size_t i = 0; i < p->c.n && !p->literal; i++) {
        const node *n = &p->at[i];
        if (n->kind == NODE_CHANGES && n->when >= 1)
            p->is_step[n->when] = true;
        for (int32_t s = 1; n->kind == NODE_ALTERNATES && s <= p->steps; s++)
            p->is_step[s] = true;
        if (n->kind == NODE_ALTERNATES)
            break; /* all of them */
    }
}

ipt_status ipt_prompt_edits_create(ipt_ctx *ctx, const char *text, size_t n, int32_t steps,
                                   ipt_prompt_edits **out)
{
    if (n > IPT_TOKEN_MAX_TEXT)
        return ipt_fail(ctx, IPT_ERR_ARG, "prompt of %zu bytes: at most %d allowed", n,
                        IPT_TOKEN_MAX_TEXT);
    ipt_prompt_edits *p = ipt_alloc(ctx, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    char *copy = ipt_alloc(ctx, n + 1);
    ipt_status status = copy ? tok_decode(ctx, text, n, &p->c) : IPT_ERR_NOMEM;
    p->ctx = ctx;
    p->text = copy;
    p->steps = steps;
    if (status == IPT_OK) {
        memcpy(copy, text, n);
        p->at = ipt_calloc(ctx, p->c.n + 1, sizeof *p->at);
        p->next = ipt_calloc(ctx, p->c.n + 1, sizeof *p->next);
        p->stack = ipt_calloc(ctx, 2 * (p->c.n + 1), sizeof *p->stack);
        p->last = ipt_calloc(ctx, p->c.n + 1, sizeof *p->last);
        p->is_step = ipt_calloc(ctx, (size_t)steps + 1, sizeof *p->is_step);
        if (!p->at || !p->next || !p->stack || !p->last || !p->is_step)
            status = IPT_ERR_NOMEM;
    }
    if (status != IPT_OK) {
        ipt_prompt_edits_destroy(&p);
        return status;
    }
    p->literal = !find_nodes(p);
    collect_steps(p);
    *out = p;
    return IPT_OK;
}

void ipt_prompt_edits_destroy(ipt_prompt_edits **pp)
{
    if (!pp || !*pp)
        return;
    ipt_prompt_edits *p = *pp;
    char *copy = (char *)(uintptr_t)p->text;
    ipt_free(copy);
    ipt_free(p->c.v);
    ipt_free(p->at);
    ipt_free(p->next);
    ipt_free(p->stack);
    ipt_free(p->last);
    ipt_free(p->is_step);
    ipt_free(p);
    *pp = NULL;
}

/* --- texts ------------------------------------------------------------------------------------ */
int32_t ipt_prompt_edits_end(const ipt_prompt_edits *p, int32_t step)
{
    int32_t end = step < 0 ? 0 : step;
    while (end < p->steps && !p->is_step[end])
        end++;
    return end < p->steps ? end : p->steps;
}

/* The part of a node that stands at the step whose schedule ends at `end`: characters from..to. */
static void choose(const ipt_prompt_edits *p, uint32_t open, int32_t end, uint32_t *from,
                   uint32_t *to)
{
    const node *n = &p->at[open];
    uint32_t part = 0, at = open;
    if (n->kind == NODE_ALTERNATES)
        part = (uint32_t)(end - 1) % (n->n_bar + 1);
    else if (n->n_colon == 2)
        part = end > n->when;
    else if (end <= n->when) { /* [to:when] before it is due */
        *from = *to = open + 1;
        return;
    }
    for (uint32_t k = 0; k < part; k++)
        at = k == 0 ? n->first : p->next[at];
    *from = at + 1;
    *to = at == open ? n->first : p->next[at] ? p->next[at] : n->close;
}

static bool changes(const ipt_prompt_edits *p, uint32_t i) { return p->at[i].kind != NODE_TEXT; }

size_t ipt_prompt_edits_text(const ipt_prompt_edits *p, int32_t end, char *out)
{
    size_t n = 0, depth = 0;
    uint32_t i = 0, to = (uint32_t)p->c.n;
    for (;;) {
        if (i >= to) { /* the rest of what encloses it */
            if (depth == 0)
                break;
            depth--;
            i = p->stack[2 * depth];
            to = p->stack[2 * depth + 1];
            continue;
        }
        size_t take = p->c.v[i].cp == '\\' && i + 1 < to ? 2 : 1;
        if (!p->literal && changes(p, i)) {
            p->stack[2 * depth] = p->at[i].close + 1;
            p->stack[2 * depth + 1] = to;
            depth++;
            choose(p, i, end, &i, &to);
            continue;
        }
        size_t bytes = p->c.v[i + take - 1].end - p->c.v[i].begin;
        memcpy(out + n, p->text + p->c.v[i].begin, bytes);
        n += bytes;
        i += (uint32_t)take;
    }
    out[n] = 0;
    return n;
}

/* --- AND -------------------------------------------------------------------------------------- */
static bool is_and(const tok_chars *c, size_t i)
{
    return i + 3 <= c->n && c->v[i].cp == 'A' && c->v[i + 1].cp == 'N' && c->v[i + 2].cp == 'D' &&
           (i == 0 || !is_word(c->v[i - 1].cp)) && (i + 3 == c->n || !is_word(c->v[i + 3].cp));
}

/* Characters from..to without blanks at the end and without ": weight" there. */
static void read_part(const char *text, const tok_chars *c, size_t from, size_t to,
                      ipt_prompt_conjunct *out)
{
    size_t end = to, begin = 0, colon = 0;
    out->weight = 1;
    while (end > from && is_blank(c->v[end - 1].cp))
        end--;
    for (begin = end; begin > from && (is_digit(c->v[begin - 1].cp) || c->v[begin - 1].cp == '.');)
        begin--;
    if (begin > from && begin < end && is_sign(c->v[begin - 1].cp))
        begin--;
    for (colon = begin; colon > from && is_blank(c->v[colon - 1].cp);)
        colon--;
    if (begin < end && colon > from && c->v[colon - 1].cp == ':' &&
        tok_read_number(text + c->v[begin].begin, c->v[end - 1].end - c->v[begin].begin,
                        &out->weight))
        for (end = colon - 1; end > from && is_blank(c->v[end - 1].cp);)
            end--;
    out->text = text + (from < c->n ? c->v[from].begin : 0);
    out->len = end > from ? c->v[end - 1].end - c->v[from].begin : 0;
}

ipt_status ipt_prompt_split(ipt_ctx *ctx, const char *text, size_t n, ipt_prompt_conjunct *out,
                            size_t max, size_t *n_out)
{
    tok_chars c = {0};
    size_t k = 0, from = 0;
    IPT_TRY(tok_decode(ctx, text, n, &c));
    ipt_status status = IPT_OK;
    for (size_t i = 0; i <= c.n; i++) {
        if (i < c.n && !is_and(&c, i))
            continue;
        if (k == max) {
            status = ipt_fail(ctx, IPT_ERR_ARG, "AND joins more than %zu prompts", max);
            break;
        }
        read_part(text, &c, from, i, &out[k++]);
        from = i + 3;
        i += i < c.n ? 2 : 0;
    }
    ipt_free(c.v);
    *n_out = k;
    return status;
}
