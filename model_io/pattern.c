/* model_io/pattern.c - Python's regular expressions as PEFT's rank_pattern and alpha_pattern hold
 * them.  A pattern is compiled to a small program and all its threads walk over the name together,
 * so that no pattern, however hostile, costs more than its length times the name's.
 *
 * Source: Thompson's and Pike's machines as told by Russ Cox, swtch.com/~rsc/regexp; syntax of
 * Python's re.  Left out, with a message: look-around, back references, flags, possessive repeats.
 */
#include "model_io/internal.h"

#include <stdio.h>
#include <string.h>

enum { MAX_TEXT = 512, MAX_CODE = 4096, MAX_SET = 64, MAX_GROUP = 64, MAX_REPEAT = 1000 };

typedef enum code {
    CHAR,  /* one character: x */
    ANY,   /* any character */
    SET,   /* one of set x */
    SPLIT, /* go on at x and at y, relative to here */
    JUMP,  /* go on at x; 0: the end of the group, not known yet */
    BEGIN, /* only at the start of the name */
    END,
    BORDER, /* between a word and something else; x: not there */
    MATCH
} code;

typedef struct instr {
    uint8_t op;
    int16_t x, y;
} instr;

struct ipt_pattern {
    const char *plain; /* a name without any syntax but dots; the rest is unused then */
    instr *at;
    size_t n;
    uint8_t (*set)[32];
    uint16_t *work; /* [4][n] of the machine */
};

typedef struct compiler {
    const char *p; /* what is not read yet */
    instr at[MAX_CODE], copy[MAX_CODE];
    uint8_t set[MAX_SET][32];
    size_t n, n_set, cost;
    struct {
        size_t start, branch; /* of the group's code, of its last alternative */
    } group[MAX_GROUP];
    size_t n_group;
    size_t atom;      /* where the code of the last atom begins */
    bool repeatable;  /* there is an atom that a repeat can follow */
    const char *what; /* why the pattern is refused; NULL: it is not */
} compiler;

static void refuse(compiler *c, const char *what)
{
    if (!c->what)
        c->what = what;
}

/* --- code ------------------------------------------------------------------------------------- */
static void put(compiler *c, size_t where, instr i)
{
    if (c->n >= MAX_CODE) {
        refuse(c, "it is too long when its repeats are written out");
        return;
    }
    c->cost += 16 + (c->n - where) / 8;
    memmove(c->at + where + 1, c->at + where, (c->n - where) * sizeof *c->at);
    c->at[where] = i;
    c->n++;
}

static void append(compiler *c, code op, size_t x)
{
    put(c, c->n, (instr){.op = (uint8_t)op, .x = (int16_t)x});
}

static void begin_atom(compiler *c)
{
    c->atom = c->n;
    c->repeatable = true;
}

/* --- sets of characters ----------------------------------------------------------------------- */
static bool is_word(unsigned ch)
{
    return ch >= 0x80 || ch == '_' || (ch >= '0' && ch <= '9') || (ch >= 'a' && ch <= 'z') ||
           (ch >= 'A' && ch <= 'Z');
}

/* Whether \d, \w, \s (capital: not) take a character; false and *known false for other letters. */
static bool class_has(char letter, unsigned ch, bool *known)
{
    bool in = false;
    *known = true;
    switch (letter | 0x20) {
    case 'd':
        in = ch >= '0' && ch <= '9';
        break;
    case 'w':
        in = is_word(ch);
        break;
    case 's':
        in = ch == ' ' || (ch >= '\t' && ch <= '\r');
        break;
    default:
        *known = false;
    }
    return in != (letter < 'a');
}

static void add_class(uint8_t set[32], char letter)
{
    bool known = false;
    for (unsigned ch = 0; ch < 256; ch++)
        if (class_has(letter, ch, &known))
            set[ch / 8] |= (uint8_t)(1U << ch % 8);
}

static bool is_class(char letter)
{
    bool known = false;
    (void)class_has(letter, 0, &known);
    return known;
}

/* The character that a backslash and `c` stand for; 0: none. */
static unsigned char escaped(char c)
{
    static const char from[] = "ntrfv", to[] = "\n\t\r\f\v";
    const char *hit = c ? strchr(from, c) : NULL;
    if (hit)
        return (unsigned char)to[hit - from];
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    return letter ? 0 : (unsigned char)c;
}

static uint8_t *new_set(compiler *c)
{
    if (c->n_set == MAX_SET) {
        refuse(c, "it has too many sets of characters");
        return c->set[0];
    }
    memset(c->set[c->n_set], 0, 32);
    return c->set[c->n_set++];
}

/* One end of a range in [...]; false: a class such as \d, which is in the set now. */
static bool set_end(compiler *c, uint8_t set[32], unsigned *ch)
{
    *ch = (unsigned char)*c->p++;
    if (*ch != '\\')
        return true;
    char letter = *c->p;
    c->p += letter != 0;
    if (is_class(letter)) {
        add_class(set, letter);
        return false;
    }
    *ch = escaped(letter);
    if (*ch == 0)
        refuse(c, "an escape in [...] is not known");
    return true;
}

/* [...] with c->p behind the bracket. */
static void read_set(compiler *c)
{
    uint8_t *set = new_set(c);
    bool negative = *c->p == '^';
    c->p += negative;
    for (bool first = true; *c->p && (first || *c->p != ']'); first = false) {
        unsigned from = 0, to = 0;
        if (!set_end(c, set, &from))
            continue;
        to = from;
        if (c->p[0] == '-' && c->p[1] && c->p[1] != ']') {
            c->p++;
            if (!set_end(c, set, &to) || to < from)
                refuse(c, "a range in [...] is not one");
        }
        for (unsigned ch = from; ch <= to; ch++)
            set[ch / 8] |= (uint8_t)(1U << ch % 8);
    }
    if (*c->p != ']')
        refuse(c, "a [ is not closed");
    else
        c->p++;
    for (int i = 0; negative && i < 32; i++)
        set[i] = (uint8_t)~set[i];
    begin_atom(c);
    append(c, SET, c->n_set - 1);
}

static void read_escape(compiler *c)
{
    char letter = *c->p;
    c->p += letter != 0;
    if (is_class(letter)) {
        add_class(new_set(c), letter);
        begin_atom(c);
        append(c, SET, c->n_set - 1);
    } else if (letter == 'A' || letter == 'Z') {
        append(c, letter == 'A' ? BEGIN : END, 0);
        c->repeatable = false;
    } else if (letter == 'b' || letter == 'B') {
        append(c, BORDER, letter == 'B');
        c->repeatable = false;
    } else if (escaped(letter)) {
        begin_atom(c);
        append(c, CHAR, escaped(letter));
    } else {
        refuse(c, "a back reference or an escape is not known");
    }
}

/* --- groups and repeats ----------------------------------------------------------------------- */
static void open_group(compiler *c)
{
    if (c->p[0] == '?' && c->p[1] == ':') {
        c->p += 2;
    } else if (strncmp(c->p, "?P<", 3) == 0 && strchr(c->p, '>')) {
        c->p = strchr(c->p, '>') + 1;
    } else if (c->p[0] == '?') {
        refuse(c, "look-around and flags (?...) are not supported");
        return;
    }
    if (c->n_group == MAX_GROUP) {
        refuse(c, "its groups are too deep");
        return;
    }
    c->group[c->n_group].start = c->group[c->n_group].branch = c->n;
    c->n_group++;
    c->repeatable = false;
}

static void next_branch(compiler *c)
{
    size_t from = c->group[c->n_group - 1].branch, len = c->n - from;
    put(c, from, (instr){SPLIT, 1, (int16_t)(len + 2)});
    append(c, JUMP, 0);
    c->group[c->n_group - 1].branch = c->n;
    c->repeatable = false;
}

static void close_group(compiler *c)
{
    if (c->n_group == 1) {
        refuse(c, "a ) closes nothing");
        return;
    }
    c->atom = c->group[--c->n_group].start;
    for (size_t i = c->atom; i < c->n; i++)
        if (c->at[i].op == JUMP && c->at[i].x == 0)
            c->at[i].x = (int16_t)(c->n - i);
    c->repeatable = true;
}

static void emit(compiler *c, size_t len)
{
    for (size_t i = 0; i < len && !c->what; i++)
        put(c, c->n, c->copy[i]);
}

/* least to most times the last atom; most < 0: any number. */
static void repeat(compiler *c, int least, int most)
{
    size_t len = c->n - c->atom;
    if (!c->repeatable) {
        refuse(c, "a repeat follows nothing that can be repeated");
        return;
    }
    memcpy(c->copy, c->at + c->atom, len * sizeof *c->copy);
    c->n = c->atom;
    for (int k = 0; k < least; k++)
        emit(c, len);
    for (int k = least; k < most; k++) {
        put(c, c->n, (instr){SPLIT, 1, (int16_t)(len + 1)});
        emit(c, len);
    }
    if (most < 0) {
        put(c, c->n, (instr){SPLIT, 1, (int16_t)(len + 2)});
        emit(c, len);
        put(c, c->n, (instr){JUMP, (int16_t)(-1 - (int)len), 0});
    }
    c->repeatable = false;
}

static bool is_digit(char ch) { return ch >= '0' && ch <= '9'; }

static int read_count(compiler *c, const char **p, int dflt)
{
    int v = 0;
    if (!is_digit(**p))
        return dflt;
    for (; is_digit(**p); (*p)++)
        v = v > MAX_REPEAT ? v : v * 10 + (**p - '0');
    if (v > MAX_REPEAT)
        refuse(c, "it repeats more than 1000 times");
    return v;
}

/* "{2}", "{2,}", "{,3}", "{2,3}" behind c->p; false: a plain brace. */
static bool read_braces(compiler *c)
{
    const char *p = c->p;
    if (*p == '}')
        return false;
    bool has_least = is_digit(*p);
    int least = read_count(c, &p, 0), most = least;
    if (*p == ',') {
        p++;
        most = read_count(c, &p, -1);
    } else if (!has_least) {
        return false;
    }
    if (*p != '}')
        return false;
    c->p = p + 1;
    if (most >= 0 && most < least)
        refuse(c, "a repeat has its most below its least");
    else
        repeat(c, least, most);
    return true;
}

/* A lazy repeat takes the same names; a possessive one does not. */
static void after_repeat(compiler *c)
{
    c->p += *c->p == '?';
    if (c->p[-1] != '?' && *c->p == '+')
        refuse(c, "possessive repeats are not supported");
}

static void read_item(compiler *c)
{
    char ch = *c->p++;
    switch (ch) {
    case '(':
        open_group(c);
        return;
    case ')':
        close_group(c);
        return;
    case '|':
        next_branch(c);
        return;
    case '[':
        read_set(c);
        return;
    case '\\':
        read_escape(c);
        return;
    case '^':
    case '$':
        append(c, ch == '^' ? BEGIN : END, 0);
        c->repeatable = false;
        return;
    case '*':
        repeat(c, 0, -1);
        break;
    case '+':
        repeat(c, 1, -1);
        break;
    case '?':
        repeat(c, 0, 1);
        break;
    default:
        if (ch == '{' && read_braces(c))
            break;
        begin_atom(c);
        append(c, ch == '.' ? ANY : CHAR, (unsigned char)ch);
        return;
    }
    after_repeat(c);
}

static void compile(compiler *c)
{
    c->n_group = 1;
    while (*c->p && !c->what)
        read_item(c);
    if (!c->what && c->n_group > 1)
        refuse(c, "a ( is not closed");
    for (size_t i = 0; i < c->n; i++)
        if (c->at[i].op == JUMP && c->at[i].x == 0)
            c->at[i].x = (int16_t)(c->n - i);
    append(c, MATCH, 0);
}

/* --- plain names ------------------------------------------------------------------------------ */
/* Nearly all patterns are names of modules, of which files have a thousand: no machine for these.
 */
static bool is_plain(const char *text)
{
    for (text += *text == '^'; *text; text++)
        if (*text != '.' && *text != '-' && (!is_word((unsigned char)*text)))
            return false;
    return true;
}

static void spend(uint64_t *budget, uint64_t cost)
{
    *budget = *budget > cost ? *budget - cost : 0;
}

static bool match_plain(const char *text, const char *name, uint64_t *budget)
{
    bool whole = *text == '^';
    size_t n = strlen(text += whole), len = strlen(name), at = len - n, i = n;
    spend(budget, 1);
    if (n > len || (at > 0 && (whole || name[at - 1] != '.')))
        return false;
    while (i > 0 && (text[i - 1] == '.' || text[i - 1] == name[at + i - 1]))
        i--;
    spend(budget, n - i);
    return i == 0;
}

ipt_status ipt_pattern_create(ipt_arena *arena, const char *text, uint64_t *budget,
                              ipt_pattern **out, const char **why)
{
    char whole[MAX_TEXT + 16];
    ipt_pattern *p = ipt_arena_alloc(arena, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    spend(budget, 1024);
    *why = *budget == 0              ? "the file's patterns are too costly"
           : strlen(text) > MAX_TEXT ? "it has more than 512 bytes"
                                     : NULL;
    if (*why)
        return IPT_ERR_UNSUPPORTED;
    *out = p;
    if (is_plain(text)) {
        p->plain = ipt_arena_strdup(arena, text);
        return p->plain ? IPT_OK : IPT_ERR_NOMEM;
    }
    compiler *c = ipt_alloc(arena->ctx, sizeof *c);
    if (!c)
        return IPT_ERR_NOMEM;
    c->p = ipt_name(whole, sizeof whole, "(.*\\.)?(%s)$", text);
    compile(c);
    spend(budget, c->cost);
    *why = c->what;
    p->n = c->n;
    p->at = ipt_arena_alloc(arena, c->n * sizeof *p->at);
    p->set = ipt_arena_alloc(arena, (c->n_set + 1) * sizeof *p->set);
    p->work = ipt_arena_alloc(arena, 4 * c->n * sizeof *p->work);
    ipt_status status = p->at && p->set && p->work ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        memcpy(p->at, c->at, c->n * sizeof *p->at);
        memcpy(p->set, c->set, c->n_set * sizeof *p->set);
    }
    ipt_free(c);
    return status == IPT_OK && *why ? IPT_ERR_UNSUPPORTED : status;
}

/* --- the machine ------------------------------------------------------------------------------ */
typedef struct threads {
    uint16_t *at; /* instructions that wait for a character */
    size_t n;
} threads;

typedef struct machine {
    const ipt_pattern *p;
    const char *name;
    size_t len;
    uint16_t *mark; /* [i]: the place in the name, from 1, at which instruction i was seen last */
    uint16_t *stack;
    uint64_t cost;
} machine;

static bool holds(const machine *m, const instr *i, size_t pos)
{
    if (i->op == BEGIN || i->op == END)
        return pos == (i->op == BEGIN ? 0 : m->len);
    bool before = pos > 0 && is_word((unsigned char)m->name[pos - 1]),
         after = pos < m->len && is_word((unsigned char)m->name[pos]);
    return (before != after) == (i->x == 0);
}

/* Adds instruction `first` and all that follows from it without taking a character. */
static void add(machine *m, threads *t, size_t first, size_t pos)
{
    size_t n = 0, next[2] = {first, first};
    uint16_t stamp = (uint16_t)(pos + 1);
    for (size_t n_next = 1;;) {
        for (size_t k = 0; k < n_next; k++)
            if (m->mark[next[k]] != stamp) {
                m->mark[next[k]] = stamp;
                m->stack[n++] = (uint16_t)next[k];
            }
        if (n == 0)
            return;
        size_t at = m->stack[--n];
        const instr *i = &m->p->at[at];
        m->cost++;
        n_next = 0;
        if (i->op == SPLIT || i->op == JUMP)
            next[n_next++] = (size_t)((ptrdiff_t)at + i->x);
        if (i->op == SPLIT)
            next[n_next++] = (size_t)((ptrdiff_t)at + i->y);
        if (i->op == CHAR || i->op == ANY || i->op == SET || i->op == MATCH)
            t->at[t->n++] = (uint16_t)at;
        else if (n_next == 0 && holds(m, i, pos))
            next[n_next++] = at + 1;
    }
}

static bool takes(const ipt_pattern *p, const instr *i, unsigned char ch)
{
    return i->op == ANY || (i->op == CHAR && (unsigned char)i->x == ch) ||
           (i->op == SET && (p->set[i->x][ch / 8] >> ch % 8 & 1U));
}

bool ipt_pattern_match(const ipt_pattern *p, const char *name, uint64_t *budget)
{
    if (p->plain)
        return match_plain(p->plain, name, budget);
    machine m = {p, name, strlen(name), p->work, p->work + p->n, 0};
    threads now = {p->work + 2 * p->n, 0}, next = {p->work + 3 * p->n, 0};
    memset(m.mark, 0, p->n * sizeof *m.mark);
    add(&m, &now, 0, 0);
    for (size_t pos = 0; pos < m.len && now.n > 0; pos++) {
        m.cost += now.n;
        for (size_t k = 0; k < now.n; k++)
            if (takes(p, &p->at[now.at[k]], (unsigned char)name[pos]))
                add(&m, &next, now.at[k] + 1U, pos + 1);
        threads last = now;
        now = next;
        next = (threads){last.at, 0};
    }
    spend(budget, m.cost);
    for (size_t k = 0; k < now.n; k++)
        if (p->at[now.at[k]].op == MATCH)
            return true;
    return false;
}
