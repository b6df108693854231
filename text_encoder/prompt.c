/* text_encoder/prompt.c - the prompt language: <lora:...> tags, emphasis, BREAK, chunks of 75,
 * textual inversions, finding words.
 *
 * Follows AUTOMATIC1111's web UI to the letter, because a prompt is expected to mean the same
 * here; its expressions are Python's, so blanks and word characters below are Python's too. */
#include "text_encoder/tokenizer.h"

#include "text_encoder/tokenizer_impl.h"

#include <math.h>
#include <string.h>

enum { MAX_PHRASE_TOKENS = 256 };

/* --- characters and numbers ----------------------------------------------------------------- */
static bool is_blank(uint32_t cp) { return tok_is_space(cp) || (cp >= 0x1c && cp <= 0x1f); }
static bool is_word(uint32_t cp) { return cp == '_' || tok_is_letter(cp) || tok_is_number(cp); }
static bool is_digit(uint32_t cp) { return cp >= '0' && cp <= '9'; }

bool tok_read_number(const char *s, size_t n, double *out)
{
    size_t i = 0, n_digits = 0, n_dots = 0, n_used = 0;
    int scale = 0;
    uint64_t mantissa = 0;
    bool negative = n > 0 && s[0] == '-';
    if (n > 0 && (s[0] == '-' || s[0] == '+'))
        i++;
    for (; i < n; i++) {
        if (s[i] == '.') {
            n_dots++;
            continue;
        }
        if (!is_digit((unsigned char)s[i]))
            return false;
        n_digits++;
        if (n_used < 19) { /* leading zeros do not count; later digits only shift */
            mantissa = mantissa * 10 + (uint64_t)(s[i] - '0');
            n_used += mantissa > 0;
            scale += n_dots > 0;
        } else {
            scale -= n_dots == 0;
        }
    }
    if (n_digits == 0 || n_dots > 1)
        return false;
    /* up to 2^53 and 10^22 both are exact, so the quotient is rounded once */
    double value = (double)mantissa;
    if (mantissa > 0 && scale > 0)
        value = scale <= 22 ? value / pow(10, scale)
                            : (double)((long double)mantissa * powl(10, -(long double)scale));
    else if (mantissa > 0 && scale < 0)
        value = (double)((long double)mantissa * powl(10, -(long double)scale));
    if (!isfinite(value))
        return false;
    *out = negative ? -value : value;
    return true;
}

/* --- emphasis ------------------------------------------------------------------------------- */
typedef struct piece {
    size_t off, len; /* in parse.buf; pieces follow each other without gaps */
    double weight;
} piece;

typedef struct parse {
    const char *text;
    const tok_char *v; /* [n] characters of text */
    size_t n;
    char *buf;
    size_t n_buf;
    piece *pieces;
    size_t n_pieces;
    uint32_t *round, *square; /* piece counts at brackets still open */
    size_t n_round, n_square;
} parse;

static void add_piece(parse *p, const char *s, size_t len, double weight)
{
    if (len > 0)
        memcpy(p->buf + p->n_buf, s, len);
    p->pieces[p->n_pieces++] = (piece){p->n_buf, len, weight};
    p->n_buf += len;
}

static void multiply_from(parse *p, size_t start, double factor)
{
    for (size_t i = start; i < p->n_pieces; i++)
        p->pieces[i].weight *= factor;
}

/* Length in characters of ":number)" at i, 0 = none. */
static size_t match_weight(const parse *p, size_t i, double *weight)
{
    size_t k = i + 1;
    while (k < p->n && is_blank(p->v[k].cp))
        k++;
    size_t begin = k;
    if (k < p->n && (p->v[k].cp == '+' || p->v[k].cp == '-'))
        k++;
    while (k < p->n && (is_digit(p->v[k].cp) || p->v[k].cp == '.'))
        k++;
    size_t end = k;
    while (k < p->n && is_blank(p->v[k].cp))
        k++;
    if (begin == end || k == p->n || p->v[k].cp != ')')
        return 0;
    const char *s = p->text + p->v[begin].begin;
    return tok_read_number(s, p->v[end - 1].end - p->v[begin].begin, weight) ? k + 1 - i : 0;
}

static bool is_break_at(const parse *p, size_t i, size_t begin, size_t end)
{
    static const char word[] = "BREAK";
    if (end - i < 5 || (i > begin && is_word(p->v[i - 1].cp)) ||
        (i + 5 < end && is_word(p->v[i + 5].cp)))
        return false;
    for (size_t k = 0; k < 5; k++)
        if (p->v[i + k].cp != (unsigned char)word[k])
            return false;
    return true;
}

static void add_source(parse *p, size_t begin, size_t end)
{
    if (begin < end)
        add_piece(p, p->text + p->v[begin].begin, p->v[end - 1].end - p->v[begin].begin, 1.0);
    else
        add_piece(p, "", 0, 1.0);
}

/* Plain text v[begin..end) cut at BREAK with the blanks around it. */
static void add_plain(parse *p, size_t begin, size_t end)
{
    size_t from = begin;
    for (size_t i = begin; i < end; i++) {
        if (!is_break_at(p, i, begin, end))
            continue;
        size_t stop = i;
        while (stop > from && is_blank(p->v[stop - 1].cp))
            stop--;
        add_source(p, from, stop);
        add_piece(p, "BREAK", 5, -1.0);
        from = i + 5;
        while (from < end && is_blank(p->v[from].cp))
            from++;
        i = from - 1;
    }
    add_source(p, from, end);
}

static bool is_syntax(uint32_t cp)
{
    return cp == '\\' || cp == '(' || cp == ')' || cp == '[' || cp == ']' || cp == ':';
}

/* Handles what stands at i; returns where to go on. */
static size_t parse_step(parse *p, size_t i)
{
    uint32_t cp = p->v[i].cp;
    double weight = 0;
    size_t len = 0, end = i + 1;
    if (cp == '\\') {
        bool escapes = end < p->n && is_syntax(p->v[end].cp) && p->v[end].cp != ':';
        end += escapes;
        add_source(p, i + 1, end);
        return end;
    }
    if (cp == '(') {
        p->round[p->n_round++] = (uint32_t)p->n_pieces;
        return end;
    }
    if (cp == '[') {
        p->square[p->n_square++] = (uint32_t)p->n_pieces;
        return end;
    }
    if (cp == ':')
        len = match_weight(p, i, &weight);
    if (len > 0 && p->n_round > 0) {
        multiply_from(p, p->round[--p->n_round], weight);
        return i + len;
    }
    if (len > 0) {
        end = i + len; /* a weight without its bracket is text */
    } else if (cp == ')' && p->n_round > 0) {
        multiply_from(p, p->round[--p->n_round], 1.1);
        return end;
    } else if (cp == ']' && p->n_square > 0) {
        multiply_from(p, p->square[--p->n_square], 1 / 1.1);
        return end;
    } else if (!is_syntax(cp)) {
        while (end < p->n && !is_syntax(p->v[end].cp))
            end++;
    }
    add_plain(p, i, end);
    return end;
}

/* Joins neighbours of equal weight and hands out copies that live in the arena. */
static ipt_status finish_parts(parse *p, ipt_arena *arena, ipt_prompt_part **parts, size_t *n_parts)
{
    size_t n = 0;
    if (p->n_pieces == 0)
        add_piece(p, "", 0, 1.0);
    for (size_t i = 1; i < p->n_pieces; i++)
        if (p->pieces[i].weight == p->pieces[n].weight)
            p->pieces[n].len += p->pieces[i].len;
        else
            p->pieces[++n] = p->pieces[i];
    n++;
    ipt_prompt_part *v = ipt_arena_alloc(arena, n * sizeof *v);
    char *text = ipt_arena_alloc(arena, p->n_buf + n);
    if (!v || !text)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        const piece *from = &p->pieces[i];
        memcpy(text, p->buf + from->off, from->len);
        v[i] = (ipt_prompt_part){text, from->len, from->weight};
        text += from->len + 1;
    }
    *parts = v;
    *n_parts = n;
    return IPT_OK;
}

static ipt_status parse_chars(ipt_ctx *ctx, parse *p, ipt_arena *arena, ipt_prompt_part **parts,
                              size_t *n_parts)
{
    /* a character makes at most one piece; one more for the end, one for each of the 5 of BREAK */
    p->pieces = ipt_calloc(ctx, p->n + 2, sizeof *p->pieces);
    p->buf = ipt_alloc(ctx, p->n * 4 + 1);
    p->round = ipt_calloc(ctx, p->n, sizeof *p->round);
    p->square = ipt_calloc(ctx, p->n, sizeof *p->square);
    if (!p->pieces || !p->buf || !p->round || !p->square)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < p->n;)
        i = parse_step(p, i);
    for (size_t i = 0; i < p->n_round; i++)
        multiply_from(p, p->round[i], 1.1);
    for (size_t i = 0; i < p->n_square; i++)
        multiply_from(p, p->square[i], 1 / 1.1);
    return finish_parts(p, arena, parts, n_parts);
}

static ipt_status check_length(ipt_ctx *ctx, size_t n)
{
    if (n > IPT_TOKEN_MAX_TEXT)
        return ipt_fail(ctx, IPT_ERR_ARG, "prompt of %zu bytes: at most %d allowed", n,
                        IPT_TOKEN_MAX_TEXT);
    return IPT_OK;
}

ipt_status ipt_prompt_parse(ipt_arena *arena, const char *text, size_t n, ipt_prompt_part **parts,
                            size_t *n_parts)
{
    ipt_ctx *ctx = arena->ctx;
    tok_chars c = {0};
    IPT_TRY(check_length(ctx, n));
    ipt_status status = tok_decode(ctx, text, n, &c);
    parse p = {.text = text, .v = c.v, .n = c.n};
    if (status == IPT_OK)
        status = parse_chars(ctx, &p, arena, parts, n_parts);
    ipt_free(p.pieces);
    ipt_free(p.buf);
    ipt_free(p.round);
    ipt_free(p.square);
    ipt_free(c.v);
    return status;
}

/* --- <lora:...> ----------------------------------------------------------------------------- */
static char *copy_text(ipt_arena *arena, const char *s, size_t n)
{
    char *p = ipt_arena_alloc(arena, n + 1);
    if (p && n > 0)
        memcpy(p, s, n);
    return p;
}

static ipt_status push_lora(ipt_ctx *ctx, ipt_prompt *p, ipt_prompt_lora lora)
{
    ipt_prompt_lora *v =
        ipt_regrow(ctx, p->loras, p->n_lora * sizeof *v, (p->n_lora + 1) * sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    p->loras = v;
    v[p->n_lora++] = lora;
    return IPT_OK;
}

static ipt_status push_ignored(ipt_ctx *ctx, ipt_prompt *p, const char *tag, size_t n)
{
    const char **v = ipt_calloc(ctx, p->n_ignored + 1, sizeof *v);
    char *copy = copy_text(&p->arena, tag, n);
    if (!v || !copy) {
        ipt_free(v);
        return IPT_ERR_NOMEM;
    }
    for (size_t i = 0; i < p->n_ignored; i++)
        v[i] = p->ignored[i];
    ipt_free(p->ignored);
    p->ignored = v;
    v[p->n_ignored++] = copy;
    return IPT_OK;
}

static ipt_status lora_number(ipt_ctx *ctx, const char *s, size_t n, const char *tag, size_t n_tag,
                              double *out)
{
    while (n > 0 && is_blank((unsigned char)*s)) {
        s++;
        n--;
    }
    while (n > 0 && is_blank((unsigned char)s[n - 1]))
        n--;
    if (!tok_read_number(s, n, out))
        return ipt_fail(ctx, IPT_ERR_ARG, "prompt: \"%.*s\" in %.*s is not a number",
                        (int)(n < 40 ? n : 40), s, (int)(n_tag < 120 ? n_tag : 120), tag);
    return IPT_OK;
}

/* What a tag's items say so far. */
typedef struct tag_items {
    const char *name;
    size_t n_name;
    int n_positional;
    double positional[2], te, unet; /* text encoder, UNet; NaN = not given */
} tag_items;

static ipt_status read_item(ipt_ctx *ctx, ipt_prompt *p, const char *s, size_t n, const char *tag,
                            size_t n_tag, tag_items *t)
{
    const char *eq = memchr(s, '=', n);
    bool is_named = eq && !memchr(eq + 1, '=', n - (size_t)(eq + 1 - s));
    if (is_named) {
        size_t n_key = (size_t)(eq - s), n_value = n - n_key - 1;
        if (n_key == 2 && memcmp(s, "te", 2) == 0)
            return lora_number(ctx, eq + 1, n_value, tag, n_tag, &t->te);
        if (n_key == 4 && memcmp(s, "unet", 4) == 0)
            return lora_number(ctx, eq + 1, n_value, tag, n_tag, &t->unet);
        return push_ignored(ctx, p, s, n); /* dyn=, in=, lbw= and the like have no meaning here */
    }
    if (t->n_positional == 0) {
        t->name = s;
        t->n_name = n;
    } else if (t->n_positional <= 2) {
        IPT_TRY(lora_number(ctx, s, n, tag, n_tag, &t->positional[t->n_positional - 1]));
    } else {
        IPT_TRY(push_ignored(ctx, p, s, n)); /* a dynamic rank */
    }
    t->n_positional++;
    return IPT_OK;
}

/* One tag's arguments: name[:te[:unet]] with te= and unet= anywhere.  As in A1111 the text
 * encoder's number comes first and, however it was given, is the UNet's too where that has none of
 * its own. Source: stable-diffusion-webui, extensions-builtin/Lora/extra_networks_lora.py
 * (activate). */
static ipt_status read_lora(ipt_ctx *ctx, ipt_prompt *p, const char *args, size_t n,
                            const char *tag, size_t n_tag)
{
    const double none = (double)NAN;
    tag_items t = {.positional = {none, none}, .te = none, .unet = none};
    for (const char *s = args, *end = args + n; s <= end;) {
        const char *colon = memchr(s, ':', (size_t)(end - s));
        const char *stop = colon ? colon : end;
        IPT_TRY(read_item(ctx, p, s, (size_t)(stop - s), tag, n_tag, &t));
        s = stop + 1;
    }
    if (t.n_name == 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "prompt: %.*s has no name",
                        (int)(n_tag < 120 ? n_tag : 120), tag);
    double te = !isnan(t.te) ? t.te : !isnan(t.positional[0]) ? t.positional[0] : 1.0;
    double unet = !isnan(t.unet) ? t.unet : !isnan(t.positional[1]) ? t.positional[1] : te;
    ipt_prompt_lora lora = {copy_text(&p->arena, t.name, t.n_name), unet, te};
    return lora.name ? push_lora(ctx, p, lora) : IPT_ERR_NOMEM;
}

/* Takes every <word:...> out of the text; c holds the text's characters. */
static ipt_status take_tags(ipt_ctx *ctx, ipt_prompt *p, const char *text, const tok_chars *c,
                            char *out, size_t *n_out)
{
    size_t n = 0, last_close = 0;
    for (size_t i = 0; i < c->n; i++)
        if (c->v[i].cp == '>')
            last_close = i;
    for (size_t i = 0; i < c->n;) {
        size_t colon = i + 1, close = 0;
        if (c->v[i].cp == '<' && i < last_close) {
            while (colon < c->n && is_word(c->v[colon].cp))
                colon++;
            if (colon > i + 1 && colon < last_close && c->v[colon].cp == ':')
                for (close = colon + 1; c->v[close].cp != '>';)
                    close++;
        }
        if (close <= colon + 1) { /* no tag, or one without arguments */
            size_t len = c->v[i].end - c->v[i].begin;
            memcpy(out + n, text + c->v[i].begin, len);
            n += len;
            i++;
            continue;
        }
        const char *tag = text + c->v[i].begin, *args = text + c->v[colon + 1].begin;
        size_t n_kind = c->v[colon].begin - c->v[i].end, n_tag = c->v[close].end - c->v[i].begin;
        bool is_lora =
            n_kind == 4 && (memcmp(tag + 1, "lora", 4) == 0 || memcmp(tag + 1, "lyco", 4) == 0);
        if (is_lora)
            IPT_TRY(read_lora(ctx, p, args, c->v[close].begin - c->v[colon].end, tag, n_tag));
        else
            IPT_TRY(push_ignored(ctx, p, tag, n_tag));
        i = close + 1;
    }
    *n_out = n;
    return IPT_OK;
}

static ipt_status strip_tags(ipt_ctx *ctx, ipt_prompt *p, const char *text, size_t n, bool plain,
                             size_t *n_text)
{
    char *out = copy_text(&p->arena, text, n);
    tok_chars c = {0};
    if (!out)
        return IPT_ERR_NOMEM;
    *n_text = n;
    p->text = out;
    if (plain)
        return IPT_OK;
    ipt_status status = tok_decode(ctx, text, n, &c);
    if (status == IPT_OK)
        status = take_tags(ctx, p, text, &c, out, n_text);
    if (status == IPT_OK)
        out[*n_text] = '\0';
    ipt_free(c.v);
    return status;
}

/* --- chunks --------------------------------------------------------------------------------- */
typedef struct layout {
    ipt_ctx *ctx;
    const ipt_tokenizer *tok;
    ipt_prompt *p;
    int32_t comma, backtrack, max_chunks, cap_chunk;
    size_t cap_span;
    int32_t ids[IPT_TOKEN_CONTENT]; /* the chunk being filled */
    float weights[IPT_TOKEN_CONTENT];
    int32_t n, last_comma;
} layout;

static ipt_status reserve_chunks(ipt_ctx *ctx, ipt_prompt *p, int32_t cap)
{
    size_t old = (size_t)p->n_chunk, n = (size_t)cap, w = IPT_TOKEN_WINDOW;
    int32_t *ids = ipt_regrow(ctx, p->ids, old * w * sizeof *ids, n * w * sizeof *ids);
    if (!ids)
        return IPT_ERR_NOMEM;
    p->ids = ids;
    float *weights =
        ipt_regrow(ctx, p->weights, old * w * sizeof *weights, n * w * sizeof *weights);
    if (!weights)
        return IPT_ERR_NOMEM;
    p->weights = weights;
    int32_t *n_content =
        ipt_regrow(ctx, p->n_content, old * sizeof *n_content, n * sizeof *n_content);
    if (!n_content)
        return IPT_ERR_NOMEM;
    p->n_content = n_content;
    bool *ends = ipt_regrow(ctx, p->ends_with_break, old * sizeof *ends, n * sizeof *ends);
    if (!ends)
        return IPT_ERR_NOMEM;
    p->ends_with_break = ends;
    return IPT_OK;
}

/* Writes chunk number n_chunk: bos, content, eos, padding. */
static void write_chunk(const ipt_tokenizer *tok, ipt_prompt *p, const int32_t *ids,
                        const float *weights, int32_t n, bool ends_with_break)
{
    int32_t *row = p->ids + (size_t)p->n_chunk * IPT_TOKEN_WINDOW;
    float *w = p->weights + (size_t)p->n_chunk * IPT_TOKEN_WINDOW;
    for (int32_t i = 0; i < IPT_TOKEN_WINDOW; i++) {
        row[i] = tok->pad;
        w[i] = 1.0F;
    }
    row[0] = tok->bos;
    for (int32_t i = 0; i < n; i++) {
        row[i + 1] = ids[i];
        w[i + 1] = weights[i];
    }
    row[n + 1] = tok->eos;
    p->n_content[p->n_chunk] = n;
    p->ends_with_break[p->n_chunk] = ends_with_break;
    p->n_chunk++;
}

static bool is_full(const layout *l) { return l->max_chunks > 0 && l->p->n_chunk >= l->max_chunks; }

static ipt_status close_chunk(layout *l, bool ends_with_break)
{
    l->last_comma = -1;
    if (is_full(l)) {
        l->p->was_cut |= l->n > 0;
        l->n = 0;
        return IPT_OK;
    }
    if (l->p->n_chunk == IPT_PROMPT_MAX_CHUNKS)
        return ipt_fail(l->ctx, IPT_ERR_ARG,
                        "the prompt is longer than %d chunks of %d tokens: make it shorter",
                        IPT_PROMPT_MAX_CHUNKS, IPT_TOKEN_CONTENT);
    if (l->p->n_chunk == l->cap_chunk) {
        int32_t cap = l->cap_chunk ? l->cap_chunk * 2 : 2;
        IPT_TRY(reserve_chunks(l->ctx, l->p, cap));
        l->cap_chunk = cap;
    }
    write_chunk(l->tok, l->p, l->ids, l->weights, l->n, ends_with_break);
    l->n = 0;
    return IPT_OK;
}

/* The chunk is full and its last comma is near: what follows the comma moves to the next chunk,
 * inversions included. */
static ipt_status move_after_comma(layout *l)
{
    int32_t at = l->last_comma + 1, n = l->n - at, chunk = l->p->n_chunk;
    l->n = at;
    IPT_TRY(close_chunk(l, false)); /* leaves ids[at..] as they are */
    memmove(l->ids, l->ids + at, (size_t)n * sizeof *l->ids);
    memmove(l->weights, l->weights + at, (size_t)n * sizeof *l->weights);
    l->n = n;
    for (size_t i = l->p->n_span; i > 0 && l->p->spans[i - 1].chunk == chunk; i--)
        if (l->p->spans[i - 1].pos > at) {
            l->p->spans[i - 1].chunk++;
            l->p->spans[i - 1].pos -= at;
        }
    return IPT_OK;
}

static ipt_status push_span(layout *l, ipt_prompt_span span)
{
    ipt_prompt *p = l->p;
    if (p->n_span == l->cap_span) {
        size_t cap = l->cap_span ? l->cap_span * 2 : 8;
        ipt_prompt_span *v = ipt_regrow(l->ctx, p->spans, p->n_span * sizeof *v, cap * sizeof *v);
        if (!v)
            return IPT_ERR_NOMEM;
        p->spans = v;
        l->cap_span = cap;
    }
    p->spans[p->n_span++] = span;
    return IPT_OK;
}

/* Appends the token at t[0] (of n left in its part), or the inversion that starts there;
 * *used tells how many tokens were taken. */
static ipt_status append_token(layout *l, const ipt_token *t, size_t n, float weight, size_t *used)
{
    if (t[0].id == l->comma)
        l->last_comma = l->n;
    else if (l->backtrack > 0 && l->n == IPT_TOKEN_CONTENT && l->last_comma != -1 &&
             l->n - l->last_comma <= l->backtrack)
        IPT_TRY(move_after_comma(l));
    if (l->n == IPT_TOKEN_CONTENT)
        IPT_TRY(close_chunk(l, false));
    const tok_name *e = tok_name_at(l->p->names, t, n);
    int32_t n_new = e ? e->n_vectors : 1;
    if (l->n + n_new > IPT_TOKEN_CONTENT)
        IPT_TRY(close_chunk(l, false));
    if (e)
        IPT_TRY(push_span(l, (ipt_prompt_span){l->p->n_chunk, l->n + 1, e->index, e->n_vectors}));
    for (int32_t i = 0; i < n_new; i++) {
        l->ids[l->n] = e ? 0 : t[0].id;
        l->weights[l->n++] = weight;
    }
    *used = e ? e->n_ids : 1;
    return IPT_OK;
}

static ipt_status append_part(layout *l, const ipt_prompt_part *part)
{
    ipt_token *tokens = NULL;
    size_t n = 0, used = 0;
    if (!isfinite((float)part->weight))
        return ipt_fail(l->ctx, IPT_ERR_ARG,
                        "prompt: brackets give \"%.*s\" the weight %g, expected a finite number",
                        (int)(part->len < 40 ? part->len : 40), part->text, part->weight);
    ipt_status status = tok_split(l->ctx, l->tok, l->p->names, part->text, part->len, &tokens, &n);
    for (size_t i = 0; status == IPT_OK && i < n; i += used) {
        if (is_full(l)) { /* nothing that follows can be kept */
            l->p->was_cut = true;
            break;
        }
        status = append_token(l, tokens + i, n - i, (float)part->weight, &used);
    }
    ipt_free(tokens);
    return status;
}

static ipt_status lay_out(layout *l, const ipt_prompt_part *parts, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bool is_break =
            parts[i].weight == -1.0 && parts[i].len == 5 && memcmp(parts[i].text, "BREAK", 5) == 0;
        if (is_break)
            IPT_TRY(close_chunk(l, true));
        else
            IPT_TRY(append_part(l, &parts[i]));
    }
    if (l->n > 0 || l->p->n_chunk == 0)
        IPT_TRY(close_chunk(l, false));
    while (l->p->n_span > 0 && l->p->spans[l->p->n_span - 1].chunk >= l->p->n_chunk)
        l->p->n_span--; /* fell to max_chunks */
    return IPT_OK;
}

static ipt_status fill_prompt(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text, size_t n,
                              const ipt_prompt_attr *attr, ipt_prompt *p)
{
    ipt_prompt_part whole, *parts = &whole;
    size_t n_text = 0, n_parts = 1;
    IPT_TRY(strip_tags(ctx, p, text, n, attr->plain || attr->has_no_tags, &n_text));
    whole = (ipt_prompt_part){p->text, n_text, 1.0};
    if (!attr->plain)
        IPT_TRY(ipt_prompt_parse(&p->arena, p->text, n_text, &parts, &n_parts));
    IPT_TRY(tok_names_make(ctx, tok, &p->arena, attr, &p->names));
    layout l = {.ctx = ctx, .tok = tok, .p = p, .last_comma = -1};
    l.comma = ipt_tokenizer_id(tok, ",</w>");
    l.backtrack = attr->comma_backtrack ? attr->comma_backtrack : IPT_PROMPT_COMMA_BACKTRACK;
    if (attr->plain)
        l.backtrack = -1;
    l.max_chunks = attr->max_chunks;
    return lay_out(&l, parts, n_parts);
}

ipt_status ipt_prompt_create(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text, size_t n,
                             const ipt_prompt_attr *attr, ipt_prompt **out)
{
    static const ipt_prompt_attr defaults = {.plain = false};
    IPT_TRY(check_length(ctx, n));
    ipt_prompt *p = ipt_alloc(ctx, sizeof *p);
    if (!p)
        return IPT_ERR_NOMEM;
    ipt_arena_init(&p->arena, ctx);
    ipt_status status = fill_prompt(ctx, tok, text, n, attr ? attr : &defaults, p);
    if (status != IPT_OK)
        ipt_prompt_destroy(&p);
    else
        *out = p;
    return status;
}

void ipt_prompt_destroy(ipt_prompt **prompt)
{
    if (!prompt || !*prompt)
        return;
    ipt_prompt *p = *prompt;
    ipt_free(p->ids);
    ipt_free(p->weights);
    ipt_free(p->n_content);
    ipt_free(p->ends_with_break);
    ipt_free(p->spans);
    ipt_free(p->loras);
    ipt_free(p->ignored);
    ipt_arena_finish(&p->arena);
    ipt_free(p);
    *prompt = NULL;
}

ipt_status ipt_prompt_extend(ipt_ctx *ctx, const ipt_tokenizer *tok, ipt_prompt *prompt,
                             int32_t n_chunk)
{
    if (n_chunk > IPT_PROMPT_MAX_CHUNKS)
        return ipt_fail(ctx, IPT_ERR_ARG, "%d chunks: at most %d", (int)n_chunk,
                        IPT_PROMPT_MAX_CHUNKS);
    if (n_chunk > prompt->n_chunk)
        IPT_TRY(reserve_chunks(ctx, prompt, n_chunk));
    while (prompt->n_chunk < n_chunk)
        write_chunk(tok, prompt, NULL, NULL, 0, false);
    return IPT_OK;
}

/* --- finding words -------------------------------------------------------------------------- */
enum { KEY_BREAK = -1 };

/* Ids are their own keys; vectors of inversions get keys above all ids. */
static int64_t vector_key(int32_t index, int32_t k)
{
    return (int64_t)1 << 40 | (int64_t)index << 8 | k;
}

static ipt_status phrase_keys(ipt_ctx *ctx, const ipt_tokenizer *tok, const ipt_prompt *p,
                              const char *phrase, size_t n, int64_t **keys, size_t *n_keys)
{
    ipt_token *t = NULL;
    size_t n_t = 0, m = 0, used = 1;
    IPT_TRY(tok_split(ctx, tok, p->names, phrase, n, &t, &n_t));
    if (n_t == 0 || n_t > MAX_PHRASE_TOKENS) {
        ipt_free(t);
        return ipt_fail(ctx, IPT_ERR_ARG, "phrase \"%.*s\" has %zu tokens, 1 to %d can be searched",
                        (int)(n < 60 ? n : 60), phrase, n_t, MAX_PHRASE_TOKENS);
    }
    int64_t *v = ipt_calloc(ctx, n_t * IPT_TOKEN_CONTENT, sizeof *v);
    for (size_t i = 0; v && i < n_t; i += used) {
        const tok_name *e = tok_name_at(p->names, t + i, n_t - i);
        used = e ? e->n_ids : 1;
        if (!e)
            v[m++] = t[i].id;
        for (int32_t k = 0; e && k < e->n_vectors; k++)
            v[m++] = vector_key(e->index, k);
    }
    ipt_free(t);
    *keys = v;
    *n_keys = m;
    return v ? IPT_OK : IPT_ERR_NOMEM;
}

/* The prompt's content in one row: keys[i] stands at pos[i]; a BREAK takes one place. */
static size_t flatten(const ipt_prompt *p, int64_t *keys, ipt_prompt_pos *pos)
{
    size_t n = 0, span = 0;
    for (int32_t c = 0; c < p->n_chunk; c++) {
        size_t first = n;
        for (int32_t i = 1; i <= p->n_content[c]; i++, n++) {
            keys[n] = p->ids[(size_t)c * IPT_TOKEN_WINDOW + (size_t)i];
            pos[n] = (ipt_prompt_pos){c, i};
        }
        for (; span < p->n_span && p->spans[span].chunk == c; span++)
            for (int32_t k = 0; k < p->spans[span].n; k++)
                keys[first + (size_t)(p->spans[span].pos + k - 1)] =
                    vector_key(p->spans[span].index, k);
        if (p->ends_with_break[c]) {
            keys[n] = KEY_BREAK;
            pos[n++] = (ipt_prompt_pos){c, p->n_content[c] + 1};
        }
    }
    return n;
}

/* Whether what follows a key goes on with its word. */
static bool is_cut_off(const ipt_tokenizer *tok, int64_t key)
{
    const char *text = key >= 0 && key < tok->n_ids ? ipt_tokenizer_piece(tok, (int32_t)key) : "";
    size_t n = strlen(text);
    for (size_t i = 0; i < tok->n_added; i++)
        if (tok->added[i].id == key)
            return false;
    return n > 0 && (n < 4 || memcmp(text + n - 4, "</w>", 4) != 0);
}

/* Every occurrence into out, which may be NULL; returns how many. */
static size_t search(const ipt_tokenizer *tok, const int64_t *keys, const ipt_prompt_pos *pos,
                     size_t n, const int64_t *want, size_t m, ipt_prompt_pos *out)
{
    size_t found = 0;
    for (size_t i = 0; m > 0 && i + m <= n; i++) {
        if (memcmp(keys + i, want, m * sizeof *want) != 0 ||
            (i > 0 && is_cut_off(tok, keys[i - 1])))
            continue;
        if (out)
            memcpy(out + found * m, pos + i, m * sizeof *pos);
        found++;
    }
    return found;
}

ipt_status ipt_prompt_find(ipt_ctx *ctx, const ipt_tokenizer *tok, const ipt_prompt *prompt,
                           const char *phrase, size_t n, ipt_prompt_pos **positions,
                           size_t *n_found, size_t *n_each)
{
    int64_t *want = NULL;
    size_t m = 0, found = 0, all = 0, room = (size_t)prompt->n_chunk * (IPT_TOKEN_CONTENT + 1);
    IPT_TRY(phrase_keys(ctx, tok, prompt, phrase, n, &want, &m));
    int64_t *keys = ipt_calloc(ctx, room, sizeof *keys);
    ipt_prompt_pos *pos = ipt_calloc(ctx, room, sizeof *pos), *out = NULL;
    ipt_status status = keys && pos ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        all = flatten(prompt, keys, pos);
        found = search(tok, keys, pos, all, want, m, NULL);
        out = ipt_calloc(ctx, found * m + 1, sizeof *out);
        status = out ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (status == IPT_OK) {
        *n_found = search(tok, keys, pos, all, want, m, out);
        *n_each = m;
        *positions = out;
    }
    ipt_free(want);
    ipt_free(keys);
    ipt_free(pos);
    return status;
}

/* --- weights on the encoded chunk ----------------------------------------------------------- */
void ipt_prompt_apply_weights(float *z, const float *weights, size_t T, size_t D)
{
    double before = 0, after = 0;
    for (size_t t = 0; t < T; t++)
        for (size_t d = 0; d < D; d++) {
            float *x = &z[t * D + d];
            before += (double)*x;
            *x *= weights[t];
            after += (double)*x;
        }
    double ratio = after != 0 ? before / after : 1.0;
    if (!isfinite(ratio))
        return;
    for (size_t i = 0; i < T * D; i++)
        z[i] = (float)((double)z[i] * ratio);
}
