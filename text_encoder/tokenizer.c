/* text_encoder/tokenizer.c - text to CLIP token ids: added pieces, splitting into words,
 * byte-pair merging.  Vocabularies are read in tokenizer_load.c, Unicode is in
 * tokenizer_unicode.c.
 *
 * Each step carries the source bytes of every character along, so that a token can be shown
 * against the text that the user typed. */
#include "text_encoder/tokenizer.h"

#include "text_encoder/tokenizer_impl.h"

#include <string.h>
#include <utf8proc.h>

/* --- byte-pair merging ---------------------------------------------------------------------- */
typedef struct symbol {
    int32_t id;
    int32_t prev, next; /* -1 = none; a merged-away symbol has id -1 */
    uint32_t begin, end;
} symbol;

typedef struct candidate {
    uint32_t rank, pos;
    int32_t id;
} candidate;

/* Reused from word to word of one call. */
typedef struct work {
    ipt_ctx *ctx;
    const ipt_tokenizer *tok;
    symbol *symbols;
    size_t n_symbols, cap_symbols;
    candidate *heap; /* smallest (rank, pos) first */
    size_t n_heap, cap_heap;
    ipt_token *out;
    size_t n_out, cap_out;
} work;

static ipt_status push_token(work *w, ipt_token t)
{
    if (w->n_out == w->cap_out) {
        size_t cap = w->cap_out ? w->cap_out * 2 : 64;
        ipt_token *v = ipt_regrow(w->ctx, w->out, w->n_out * sizeof *v, cap * sizeof *v);
        if (!v)
            return IPT_ERR_NOMEM;
        w->out = v;
        w->cap_out = cap;
    }
    w->out[w->n_out++] = t;
    return IPT_OK;
}

static bool before(candidate a, candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.pos < b.pos;
}

static void heap_push(work *w, candidate c)
{
    size_t i = w->n_heap++;
    while (i > 0 && before(c, w->heap[(i - 1) / 2])) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = c;
}

static candidate heap_pop(work *w)
{
    candidate top = w->heap[0], last = w->heap[--w->n_heap];
    size_t i = 0;
    for (size_t child = 1; child < w->n_heap; child = 2 * i + 1) {
        if (child + 1 < w->n_heap && before(w->heap[child + 1], w->heap[child]))
            child++;
        if (!before(w->heap[child], last))
            break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return top;
}

/* Queues the pair that starts at symbol `pos`, if it has a merge. */
static void consider(work *w, int32_t pos)
{
    if (pos < 0 || w->symbols[pos].next < 0)
        return;
    const symbol *s = &w->symbols[pos];
    const tok_merge *m = tok_find_merge(w->tok, s->id, w->symbols[s->next].id);
    if (m)
        heap_push(w, (candidate){m->rank, (uint32_t)pos, m->id});
}

static void merge_symbols(work *w)
{
    symbol *v = w->symbols;
    w->n_heap = 0;
    for (size_t i = 0; i + 1 < w->n_symbols; i++)
        consider(w, (int32_t)i);
    while (w->n_heap > 0) {
        candidate c = heap_pop(w);
        symbol *s = &v[c.pos];
        if (s->id < 0 || s->next < 0)
            continue;
        symbol *right = &v[s->next];
        const tok_merge *m = tok_find_merge(w->tok, s->id, right->id);
        if (!m || m->id != c.id) /* an entry from before one of the two changed */
            continue;
        s->id = c.id;
        s->begin = s->begin < right->begin ? s->begin : right->begin;
        s->end = s->end > right->end ? s->end : right->end;
        s->next = right->next;
        right->id = -1;
        if (right->next >= 0)
            v[right->next].prev = (int32_t)c.pos;
        consider(w, s->prev);
        consider(w, (int32_t)c.pos);
    }
}

static ipt_status reserve_symbols(work *w, size_t n)
{
    if (n > w->cap_symbols) {
        ipt_free(w->symbols);
        ipt_free(w->heap);
        w->heap = NULL;
        w->cap_symbols = 0;
        w->symbols = ipt_calloc(w->ctx, n, sizeof *w->symbols);
        if (!w->symbols)
            return IPT_ERR_NOMEM;
        /* n-1 pairs at first, two more for each of at most n-1 merges */
        w->heap = ipt_calloc(w->ctx, 3 * n, sizeof *w->heap);
        if (!w->heap)
            return IPT_ERR_NOMEM;
        w->cap_symbols = n;
    }
    return IPT_OK;
}

/* One word: its bytes as symbols, the last with "</w>", merged, appended to the output. */
static ipt_status encode_word(work *w, const tok_char *v, size_t n)
{
    const ipt_tokenizer *tok = w->tok;
    IPT_TRY(reserve_symbols(w, n < 16 ? 64 : n * 4));
    w->n_symbols = 0;
    for (size_t i = 0; i < n; i++) {
        utf8proc_uint8_t bytes[4];
        utf8proc_ssize_t len = utf8proc_encode_char((utf8proc_int32_t)v[i].cp, bytes);
        for (utf8proc_ssize_t k = 0; k < len; k++) {
            bool is_last = i + 1 == n && k + 1 == len;
            int32_t id = is_last ? tok->byte_end_id[bytes[k]] : tok->byte_id[bytes[k]];
            if (id < 0)
                id = tok->unk;
            if (id < 0) /* no unknown piece either: dropped, as the reference does */
                continue;
            int32_t at = (int32_t)w->n_symbols++;
            w->symbols[at] = (symbol){id, at - 1, at + 1, v[i].begin, v[i].end};
        }
    }
    if (w->n_symbols == 0)
        return IPT_OK;
    w->symbols[w->n_symbols - 1].next = -1;
    merge_symbols(w);
    for (int32_t i = 0; i >= 0; i = w->symbols[i].next) {
        const symbol *s = &w->symbols[i];
        IPT_TRY(push_token(w, (ipt_token){s->id, s->begin, s->end}));
    }
    return IPT_OK;
}

/* --- splitting ------------------------------------------------------------------------------ */
static bool starts_with(const tok_char *v, size_t n, const char *ascii)
{
    size_t len = strlen(ascii);
    if (n < len)
        return false;
    for (size_t i = 0; i < len; i++)
        if (v[i].cp != (unsigned char)ascii[i])
            return false;
    return true;
}

/* Length of the contraction at v, 0 = none. */
static size_t contraction_length(const tok_char *v, size_t n)
{
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; v[0].cp == '\'' && i < IPT_COUNT(contractions); i++)
        if (starts_with(v, n, contractions[i]))
            return strlen(contractions[i]);
    return 0;
}

/* Length of a special piece at v that no added piece claimed (written in capitals, say), 0 = none.
 * The split expression takes it whole, then the byte-level step cuts it at its letters. */
static size_t special_length(const tok_char *v, size_t n)
{
    static const char *const specials[] = {"<|startoftext|>", "<|endoftext|>"};
    for (size_t i = 0; i < IPT_COUNT(specials); i++)
        if (v[0].cp == '<' && starts_with(v, n, specials[i]))
            return strlen(specials[i]);
    return 0;
}

/* Words of normalised text: 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+ */
static ipt_status encode_words(work *w, const tok_char *v, size_t n)
{
    for (size_t i = 0, end = 0; i < n; i = end) {
        end = i + 1;
        size_t special = special_length(v + i, n - i);
        size_t len = contraction_length(v + i, n - i);
        if (tok_is_space(v[i].cp))
            continue;
        if (special > 0) {
            IPT_TRY(encode_word(w, v + i, 2));
            IPT_TRY(encode_word(w, v + i + 2, special - 4));
            IPT_TRY(encode_word(w, v + i + special - 2, 2));
            end = i + special;
            continue;
        }
        if (len > 0) {
            end = i + len;
        } else if (tok_is_letter(v[i].cp)) {
            while (end < n && tok_is_letter(v[end].cp))
                end++;
        } else if (!tok_is_number(v[i].cp)) {
            while (end < n && !tok_is_space(v[end].cp) && !tok_is_letter(v[end].cp) &&
                   !tok_is_number(v[end].cp))
                end++;
        }
        IPT_TRY(encode_word(w, v + i, end - i));
    }
    return IPT_OK;
}

/* --- added pieces --------------------------------------------------------------------------- */
/* Longest added piece of the given kind at v[at], NULL = none. */
static const tok_added *added_at(const ipt_tokenizer *tok, bool normalized, const tok_char *v,
                                 size_t n, size_t at)
{
    const tok_added *best = NULL;
    for (size_t i = 0; i < tok->n_added; i++) {
        const tok_added *a = &tok->added[i];
        if (a->is_normalized != normalized || a->n_chars == 0 || a->n_chars > n - at ||
            a->chars[0].cp != v[at].cp || (best && best->n_chars >= a->n_chars))
            continue;
        size_t k = 1;
        while (k < a->n_chars && a->chars[k].cp == v[at + k].cp)
            k++;
        if (k == a->n_chars)
            best = a;
    }
    return best;
}

static ipt_status encode_normalized(work *w, const tok_char *v, size_t n);

/* A stretch without added pieces of the kind just looked for. */
static ipt_status encode_rest(work *w, bool normalized, const tok_char *v, size_t n)
{
    if (n == 0)
        return IPT_OK;
    if (normalized)
        return encode_words(w, v, n);
    tok_chars norm = {0};
    ipt_status status = tok_normalize(w->ctx, v, n, &norm);
    if (status == IPT_OK)
        status = encode_normalized(w, norm.v, norm.n);
    ipt_free(norm.v);
    return status;
}

/* Cuts v at added pieces (leftmost, longest) and encodes what lies between. */
static ipt_status encode_added(work *w, bool normalized, const tok_char *v, size_t n)
{
    size_t done = 0;
    if (n == 0) /* v may be NULL */
        return IPT_OK;
    for (size_t i = 0; i < n;) {
        const tok_added *a = added_at(w->tok, normalized, v, n, i);
        if (!a) {
            i++;
            continue;
        }
        size_t begin = i, end = i + a->n_chars;
        i = end;
        if (a->single_word &&
            ((begin > 0 && tok_is_word(v[begin - 1].cp)) || (end < n && tok_is_word(v[end].cp))))
            continue;
        while (a->lstrip && begin > done && tok_is_space(v[begin - 1].cp))
            begin--;
        while (a->rstrip && end < n && tok_is_space(v[end].cp))
            end++;
        if (begin < done) /* the piece before stripped into this one */
            begin = done;
        if (end < begin)
            end = begin;
        IPT_TRY(encode_rest(w, normalized, v + done, begin - done));
        IPT_TRY(push_token(w, (ipt_token){a->id, v[begin].begin, v[end - 1].end}));
        done = end; /* the search goes on at i: stripped blanks may begin the next piece */
    }
    return encode_rest(w, normalized, v + done, n - done);
}

static ipt_status encode_normalized(work *w, const tok_char *v, size_t n)
{
    return encode_added(w, true, v, n);
}

ipt_status ipt_tokenize(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text, size_t n,
                        ipt_token **tokens, size_t *n_tokens)
{
    if (n > IPT_TOKEN_MAX_TEXT)
        return ipt_fail(ctx, IPT_ERR_ARG, "text of %zu bytes: at most %d can be tokenised", n,
                        IPT_TOKEN_MAX_TEXT);
    work w = {.ctx = ctx, .tok = tok};
    tok_chars raw = {0};
    ipt_status status = tok_decode(ctx, text, n, &raw);
    if (status == IPT_OK)
        status = encode_added(&w, false, raw.v, raw.n);
    if (status == IPT_OK && !w.out) {
        w.out = ipt_alloc(ctx, sizeof *w.out); /* "" has no tokens but still a pointer to free */
        status = w.out ? IPT_OK : IPT_ERR_NOMEM;
    }
    ipt_free(raw.v);
    ipt_free(w.symbols);
    ipt_free(w.heap);
    if (status != IPT_OK) {
        ipt_free(w.out);
        return status;
    }
    *tokens = w.out;
    *n_tokens = w.n_out;
    return IPT_OK;
}
