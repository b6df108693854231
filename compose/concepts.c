/* compose/concepts.c - words of the prompt and their variants. */
#include "compose/concepts.h"

#include <stdlib.h>
#include <string.h>

/* --- words in texts --------------------------------------------------------------------------- */
typedef enum kind { BLANK, LETTER, DIGIT, OTHER } kind;

/* Of the character that byte i belongs to.  Beyond ASCII: dashes, quotes, arrows, pictures and the
 * like are none of a word's. */
static kind kind_of(const char *text, size_t i)
{
    while (i > 0 && ((unsigned char)text[i] & 0xC0) == 0x80)
        i--;
    unsigned char c = (unsigned char)text[i], d = c >= 0x80 ? (unsigned char)text[i + 1] : 0;
    if (c == ' ' || (c >= '\t' && c <= '\r'))
        return BLANK;
    if (c >= '0' && c <= '9')
        return DIGIT;
    if (c >= 0x80)
        return c == 0xC2 || (c == 0xE2 && d < 0xB0) || (c == 0xE3 && d == 0x80) || c >= 0xF0
                   ? OTHER
                   : LETTER;
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? LETTER : OTHER;
}

/* Whether a word may begin or end between bytes i - 1 and i.  The tokenizer cuts also at digits. */
static bool is_between(const char *text, size_t i, bool as_tokens)
{
    kind a = i > 0 ? kind_of(text, i - 1) : BLANK, b = text[i] ? kind_of(text, i) : BLANK;
    if (((unsigned char)text[i] & 0xC0) == 0x80)
        return false;
    if (a == BLANK || b == BLANK)
        return true;
    return as_tokens ? a != b || a == DIGIT : (a == OTHER) != (b == OTHER);
}

static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c; }

static bool same(const char *a, const char *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (lower(a[i]) != lower(b[i]))
            return false;
    return true;
}

/* Offset of a word's occurrence in text, SIZE_MAX: there are fewer; *n counts those that begin
 * before `end`.  Words are whole, and apart; as_tokens: those that the tokenizer sees, "cat" in
 * "cat2", "a a" twice in "a a a". */
static size_t find_word(const char *text, const char *word, bool as_tokens, int32_t nth, size_t end,
                        int32_t *n)
{
    size_t m = strlen(word), len = strlen(text), found = SIZE_MAX;
    *n = 0;
    for (size_t i = 0; m > 0 && i < end && i + m <= len; i++) {
        if (!same(text + i, word, m) || !is_between(text, i, as_tokens) ||
            !is_between(text, i + m, as_tokens))
            continue;
        if ((*n)++ == nth)
            found = i;
        i += as_tokens ? 0 : m - 1;
    }
    return found;
}

/* How many of a word's occurrences the tokenizer sees before an offset. */
static int32_t count_before(const char *text, size_t at, const char *word)
{
    int32_t n = 0;
    (void)find_word(text, word, true, 0, at, &n);
    return n;
}

/* --- the slots' words ------------------------------------------------------------------------- */
/* Without the blanks at its ends. */
static char *trim(char *text)
{
    size_t n = strlen(text);
    while (n > 0 && kind_of(text, n - 1) == BLANK)
        text[--n] = 0;
    while (*text && kind_of(text, 0) == BLANK)
        text++;
    return text;
}

static ipt_status read_word(const ipt_job *job, const char *method, int32_t slot, ipt_concepts *c)
{
    const char *given = job->slot[slot].word;
    char *word = ipt_arena_strdup(job->texts->arena, given), *end = NULL;
    ipt_concept *k = &c->of[c->n];
    if (!word)
        return IPT_ERR_NOMEM;
    *k = (ipt_concept){.slot = slot, .nth = -1};
    char *phrase = strchr(word, '='), *number = strchr(word, '#');
    if (phrase)
        *phrase++ = 0;
    if (number && (!phrase || number < phrase)) {
        long n = number[1] >= '0' && number[1] <= '9' ? strtol(number + 1, &end, 10) : 0;
        if (!end || *end || n < 1 || n > 1000)
            return ipt_fail(job->ctx, IPT_ERR_ARG,
                            "%s: @%.100s: expected WORD[#K][=PHRASE], K from 1 to 1000", method,
                            given);
        *number = 0;
        k->nth = (int32_t)n - 1;
    }
    k->word = trim(word);
    k->phrase = phrase ? trim(phrase) : NULL;
    if (!k->word[0] || (phrase && !k->phrase[0]))
        return ipt_fail(job->ctx, IPT_ERR_ARG, "%s: @%.100s: expected WORD[#K][=PHRASE]", method,
                        given);
    k->is_numbered = k->nth >= 0;
    for (int32_t i = 0; i < c->n && !k->is_numbered; i++) /* the next of those without number */
        k->nth += !c->of[i].is_numbered && strlen(c->of[i].word) == strlen(k->word) &&
                  same(c->of[i].word, k->word, strlen(k->word));
    k->nth += !k->is_numbered; /* from -1 */
    c->n++;
    return IPT_OK;
}

static ipt_status check_files(const ipt_job *job, const char *method)
{
    for (int32_t a = 0; a < job->n_slot; a++)
        for (int32_t b = 0; b < a; b++)
            if (job->slot[a].file && job->slot[b].file &&
                strcmp(job->slot[a].file, job->slot[b].file) == 0)
                return ipt_fail(job->ctx, IPT_ERR_ARG,
                                "%s: %s is given twice; an adapter is one concept or one style",
                                method, job->slot[a].file);
    return IPT_OK;
}

/* --- the prompt's variants -------------------------------------------------------------------- */
/* Where each concept's word stands in a text: offset [n].  No two share a letter. */
static ipt_status locate(const ipt_job *job, const char *method, const ipt_concepts *c,
                         const char *text, size_t *at)
{
    for (int32_t i = 0; i < c->n; i++) {
        const ipt_concept *k = &c->of[i];
        int32_t n = 0;
        at[i] = find_word(text, k->word, false, k->nth, SIZE_MAX, &n);
        if (n == 0)
            return ipt_fail(job->ctx, IPT_ERR_ARG,
                            "%s: the word '%.100s' of %s is not in the prompt '%.200s'", method,
                            k->word, job->slot[k->slot].file, text);
        if (at[i] == SIZE_MAX)
            return ipt_fail(job->ctx, IPT_ERR_ARG,
                            "%s: %s wants '%.100s' number %d, which stands %d time%s in the prompt "
                            "'%.200s'",
                            method, job->slot[k->slot].file, k->word, k->nth + 1, n,
                            n == 1 ? "" : "s", text);
        for (int32_t j = 0; j < i; j++)
            if (at[i] < at[j] + strlen(c->of[j].word) && at[j] < at[i] + strlen(k->word))
                return ipt_fail(job->ctx, IPT_ERR_ARG,
                                "%s: '%.100s' and '%.100s' are the same words of the prompt "
                                "'%.200s'",
                                method, c->of[j].word, k->word, text);
    }
    return IPT_OK;
}

/* World j of a text into `out`; where concept c's words begin in it: at[c]. */
static ipt_status write_variant(const ipt_job *job, const ipt_concepts *c, int32_t world,
                                const char *text, size_t *at, uint16_t *out)
{
    const ipt_concept *k = world > 0 ? &c->of[world - 1] : NULL;
    if (!k || !k->phrase)
        return ipt_texts_add(job->texts, text, out);
    size_t from = at[world - 1], cut = strlen(k->word), add = strlen(k->phrase), n = strlen(text);
    char *v = ipt_alloc(job->ctx, n - cut + add + 1);
    if (!v)
        return IPT_ERR_NOMEM;
    memcpy(v, text, from);
    memcpy(v + from, k->phrase, add);
    memcpy(v + from + add, text + from + cut, n - from - cut + 1);
    ipt_status status = ipt_texts_add(job->texts, v, out);
    ipt_free(v);
    for (int32_t i = 0; i < c->n; i++)
        if (at[i] > from)
            at[i] = at[i] - cut + add;
    return status;
}

static const char *words_in(const ipt_concepts *c, int32_t world, int32_t k)
{
    return world == k + 1 && c->of[k].phrase ? c->of[k].phrase : c->of[k].word;
}

static ipt_status add_wording(const ipt_job *job, const char *method, uint16_t base,
                              ipt_concepts *c)
{
    const char *text = job->texts->text[base];
    size_t n = (size_t)c->n, worlds = n + 1, at[IPT_MAX_SLOT], moved[IPT_MAX_SLOT];
    ipt_arena *arena = job->texts->arena;
    ipt_wording v = {.base = base};
    IPT_TRY(locate(job, method, c, text, at));
    v.nth = ipt_arena_alloc(arena, worlds * n * sizeof *v.nth);
    v.place = ipt_arena_alloc(arena, worlds * n * sizeof *v.place);
    if (!v.nth || !v.place)
        return IPT_ERR_NOMEM;
    for (int32_t j = 0; j <= c->n; j++) {
        memcpy(moved, at, sizeof at);
        IPT_TRY(write_variant(job, c, j, text, moved, &v.text[j]));
        for (int32_t k = 0; k < c->n; k++)
            v.nth[(size_t)j * n + (size_t)k] =
                count_before(job->texts->text[v.text[j]], moved[k], words_in(c, j, k));
    }
    c->wording[c->n_wording++] = v;
    return IPT_OK;
}

ipt_status ipt_concepts_read(const ipt_job *job, const char *method, ipt_concepts *c)
{
    *c = (ipt_concepts){0};
    IPT_TRY(check_files(job, method));
    for (int32_t s = 0; s < job->n_slot; s++)
        if (job->slot[s].word)
            IPT_TRY(read_word(job, method, s, c));
    if (c->n == 0)
        return ipt_fail(job->ctx, IPT_ERR_ARG,
                        "%s: no adapter is bound to a word of the prompt; give --lora FILE@WORD",
                        method);
    if (job->n_part > 1)
        return ipt_fail(job->ctx, IPT_ERR_ARG, "%s reads one prompt; AND joins %d", method,
                        job->n_part);
    c->wording = ipt_arena_alloc(job->texts->arena, (size_t)job->n_eval * sizeof *c->wording);
    if (!c->wording)
        return IPT_ERR_NOMEM;
    for (int32_t i = 0; i < job->n_eval; i++)
        if (!ipt_concepts_at(c, job, i))
            IPT_TRY(add_wording(job, method, job->part[0].text[i], c));
    return IPT_OK;
}

const ipt_wording *ipt_concepts_at(const ipt_concepts *c, const ipt_job *job, int32_t eval)
{
    for (size_t i = 0; i < c->n_wording; i++)
        if (c->wording[i].base == job->part[0].text[eval])
            return &c->wording[i];
    return NULL;
}

/* --- tokens ----------------------------------------------------------------------------------- */
ipt_status ipt_concepts_bind(const ipt_job *job, const char *method, ipt_concepts *c)
{
    for (size_t i = 0; i < c->n_wording; i++)
        for (int32_t j = 0; j <= c->n; j++)
            for (int32_t k = 0; k < c->n; k++) {
                ipt_wording *v = &c->wording[i];
                size_t at = (size_t)j * (size_t)c->n + (size_t)k;
                const char *words = words_in(c, j, k);
                if (j > 0 && v->text[j] == v->text[0] && words == c->of[k].word) {
                    v->place[at] = v->place[k]; /* the same words of the same text */
                    continue;
                }
                IPT_TRY(job->find(job->find_user, v->text[j], words, v->nth[at], &v->place[at]));
                if (v->place[at].n == 0)
                    return ipt_fail(job->ctx, IPT_ERR_ARG,
                                    "%s: '%.100s' of %s is not among the tokens of the prompt "
                                    "'%.200s'",
                                    method, words, job->slot[c->of[k].slot].file,
                                    job->texts->text[v->text[j]]);
            }
    return IPT_OK;
}

const ipt_places *ipt_concepts_place(const ipt_concepts *all, const ipt_wording *v, int32_t world,
                                     int32_t c)
{
    return &v->place[(size_t)world * (size_t)all->n + (size_t)c];
}
