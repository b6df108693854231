/* text_encoder/prompt_check.c - finds A1111's syntax that is not built here, so that a prompt is
 * not taken literally without a word. */
#include "text_encoder/tokenizer.h"

#include <string.h>

enum { MAX_DEPTH = 64 };

/* An open square bracket. */
typedef struct bracket {
    bool has_bar;      /* | directly inside */
    bool has_colon;    /* : directly inside */
    bool after_number; /* since the last one: a number, blanks, nothing else */
    size_t digits;
} bracket;

static bool is_word(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' ||
           (c & 0x80);
}

static bool is_and(const char *s, size_t n, size_t i)
{
    return n - i >= 3 && memcmp(s + i, "AND", 3) == 0 && (i == 0 || !is_word(s[i - 1])) &&
           (i + 3 == n || !is_word(s[i + 3]));
}

/* What one character inside a bracket, but not inside its inner ones, means for it. */
static void look(bracket *b, char c)
{
    if (c == '|') {
        b->has_bar = true;
    } else if (c == ':') {
        b->has_colon = b->after_number = true;
        b->digits = 0;
    } else if (c >= '0' && c <= '9') {
        b->digits++;
    } else if (c != '.' && c != ' ' && c != '\t' && c != '\n' && c != '-' && c != '+') {
        b->after_number = false;
    }
}

unsigned ipt_prompt_not_built(const char *text, size_t n)
{
    bracket open[MAX_DEPTH];
    size_t depth = 0, round = 0, round_at[MAX_DEPTH];
    unsigned found = 0;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        bool inside = depth > 0 && depth <= MAX_DEPTH;
        bracket *b = inside ? &open[depth - 1] : NULL;
        if (c == '\\') {
            i++; /* the next one is a plain character */
            if (b)
                b->after_number = false;
        } else if (c == '[') {
            if (b)
                b->after_number = false;
            if (depth < MAX_DEPTH) {
                open[depth] = (bracket){0};
                round_at[depth] = round;
            }
            depth++;
        } else if (c == ']' && depth > 0) {
            if (b && b->has_bar)
                found |= IPT_PROMPT_ALTERNATES;
            if (b && !b->has_bar && b->has_colon && b->after_number && b->digits > 0)
                found |= IPT_PROMPT_EDITS;
            depth--;
            if (inside)
                round = round_at[depth];
        } else if (c == '(' || c == ')') { /* (a:1.2) has a colon of its own */
            round = c == '(' ? round + 1 : round > 0 ? round - 1 : 0;
            if (b)
                b->after_number = false;
        } else if (b && round == round_at[depth - 1]) {
            look(b, c);
        }
        if (is_and(text, n, i))
            found |= IPT_PROMPT_AND;
    }
    return found;
}
