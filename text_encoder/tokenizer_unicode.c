/* text_encoder/tokenizer_unicode.c - the Unicode part of the CLIP tokenizer: UTF-8, character
 * classes, NFC, lower case.
 *
 * utf8proc supplies the data.  Two tables below stand between its Unicode version and those of
 * the reference (tokenizers 0.23: letters and numbers of Unicode 16, normalisation of Unicode 9),
 * so that ids are equal for every code point. */
#include "text_encoder/tokenizer.h"

#include "text_encoder/tokenizer_impl.h"

#include <string.h>
#include <utf8proc.h>

typedef struct range {
    uint32_t first, last;
} range;

static bool in_ranges(const range *r, size_t n, uint32_t cp)
{
    size_t lo = 0, hi = n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (cp > r[mid].last)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < n && cp >= r[lo].first;
}

/* Letters and decimal digits of Unicode 15.1 to 16 that utf8proc 2.8 calls unassigned. */
static const range late_letters[] = {
    {0x1c89, 0x1c8a},   {0xa7cb, 0xa7cd},   {0xa7da, 0xa7dc},   {0x105c0, 0x105f3},
    {0x10d4a, 0x10d65}, {0x10d6f, 0x10d85}, {0x10ec2, 0x10ec4}, {0x11380, 0x11389},
    {0x1138b, 0x1138b}, {0x1138e, 0x1138e}, {0x11390, 0x113b5}, {0x113b7, 0x113b7},
    {0x113d1, 0x113d1}, {0x113d3, 0x113d3}, {0x11bc0, 0x11be0}, {0x13460, 0x143fa},
    {0x16100, 0x1611d}, {0x16d40, 0x16d6c}, {0x18cff, 0x18cff}, {0x1e5d0, 0x1e5ed},
    {0x1e5f0, 0x1e5f0}, {0x2ebf0, 0x2ee5d},
};
static const range late_numbers[] = {
    {0x10d40, 0x10d49}, {0x116d0, 0x116e3}, {0x11bf0, 0x11bf9}, {0x16130, 0x16139},
    {0x16d70, 0x16d79}, {0x1ccf0, 0x1ccf9}, {0x1e5f1, 0x1e5fa},
};
/* Their capitals: lower case is `first` + offset.  step 2: every other code point. */
typedef struct lower_range {
    uint32_t first, last, step;
    int32_t offset;
} lower_range;
static const lower_range late_lower[] = {
    {0x1c89, 0x1c89, 1, 1},    {0xa7cb, 0xa7cb, 1, 0x264 - 0xa7cb},
    {0xa7cc, 0xa7ce, 2, 1},    {0xa7d2, 0xa7d4, 2, 1},
    {0xa7da, 0xa7da, 1, 1},    {0xa7dc, 0xa7dc, 1, 0x19b - 0xa7dc},
    {0x10d50, 0x10d65, 1, 32}, {0x16ea0, 0x16eb8, 1, 27},
};

/* Marks assigned after Unicode 9, and the one that composes: the reference's normaliser knows
 * neither their combining class nor their compositions. */
static const range late_marks[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},
    {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},
    {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x10d24, 0x10d27},
    {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85},
    {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a},
    {0x11930, 0x11930}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42},
    {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1},
    {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef},
    {0x1e4ec, 0x1e4ef},
};

/* --- growing arrays ------------------------------------------------------------------------- */
static ipt_status chars_reserve(ipt_ctx *ctx, tok_chars *c, size_t more)
{
    if (c->cap - c->n >= more)
        return IPT_OK;
    size_t cap = (c->n + more) * 2;
    tok_char *v = ipt_regrow(ctx, c->v, c->n * sizeof *v, cap * sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    c->v = v;
    c->cap = cap;
    return IPT_OK;
}

static ipt_status chars_push(ipt_ctx *ctx, tok_chars *c, tok_char ch)
{
    IPT_TRY(chars_reserve(ctx, c, 1));
    c->v[c->n++] = ch;
    return IPT_OK;
}

/* --- UTF-8 ---------------------------------------------------------------------------------- */
/* Length of the well-formed sequence at s, with its value in *cp; else 0 with the length of the
 * maximal ill-formed part in *bad. */
static size_t decode_one(const unsigned char *s, size_t n, uint32_t *cp, size_t *bad)
{
    unsigned lead = s[0], lo = 0x80, hi = 0xbf;
    size_t len = 0;
    *bad = 1;
    if (lead < 0x80) {
        *cp = lead;
        return 1;
    }
    if (lead >= 0xc2 && lead <= 0xdf)
        len = 2;
    else if ((lead & 0xf0) == 0xe0)
        len = 3;
    else if (lead >= 0xf0 && lead <= 0xf4)
        len = 4;
    else
        return 0;
    /* the second byte is narrower where overlong forms, surrogates or > U+10FFFF lurk */
    if (lead == 0xe0)
        lo = 0xa0;
    else if (lead == 0xed)
        hi = 0x9f;
    else if (lead == 0xf0)
        lo = 0x90;
    else if (lead == 0xf4)
        hi = 0x8f;
    uint32_t value = lead & (0x7fU >> len);
    for (size_t i = 1; i < len; i++) {
        if (i == n || s[i] < lo || s[i] > hi) {
            *bad = i;
            return 0;
        }
        value = value << 6 | (s[i] & 0x3fU);
        lo = 0x80;
        hi = 0xbf;
    }
    *cp = value;
    return len;
}

ipt_status tok_decode(ipt_ctx *ctx, const char *text, size_t n, tok_chars *out)
{
    const unsigned char *s = (const unsigned char *)text;
    IPT_TRY(chars_reserve(ctx, out, n));
    for (size_t i = 0; i < n;) {
        size_t bad = 1;
        uint32_t cp = 0xfffd;
        size_t len = decode_one(s + i, n - i, &cp, &bad);
        if (len == 0)
            len = bad;
        out->v[out->n++] = (tok_char){cp, (uint32_t)i, (uint32_t)(i + len)};
        i += len;
    }
    return IPT_OK;
}

/* --- character classes ---------------------------------------------------------------------- */
bool tok_is_space(uint32_t cp)
{
    return (cp >= 0x09 && cp <= 0x0d) || cp == 0x20 || cp == 0x85 || cp == 0xa0 || cp == 0x1680 ||
           (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 || cp == 0x2029 || cp == 0x202f ||
           cp == 0x205f || cp == 0x3000;
}

bool tok_is_letter(uint32_t cp)
{
    if (cp < 0x80)
        return (cp >= 'a' && cp <= 'z') || (cp >= 'A' && cp <= 'Z');
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    if (c == UTF8PROC_CATEGORY_CN)
        return in_ranges(late_letters, IPT_COUNT(late_letters), cp);
    return c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO;
}

bool tok_is_number(uint32_t cp)
{
    if (cp < 0x80)
        return cp >= '0' && cp <= '9';
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    if (c == UTF8PROC_CATEGORY_CN)
        return in_ranges(late_numbers, IPT_COUNT(late_numbers), cp);
    return c >= UTF8PROC_CATEGORY_ND && c <= UTF8PROC_CATEGORY_NO;
}

bool tok_is_word(uint32_t cp)
{
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    return tok_is_letter(cp) || (c >= UTF8PROC_CATEGORY_MN && c <= UTF8PROC_CATEGORY_NL) ||
           c == UTF8PROC_CATEGORY_PC || cp == 0x200c || cp == 0x200d ||
           in_ranges(late_numbers, IPT_COUNT(late_numbers), cp);
}

/* --- normalisation -------------------------------------------------------------------------- */
/* Characters that may join the one before them under NFC: marks, and the jamo vowels and tails.
 * Everything else starts a new segment. */
static bool joins_previous(uint32_t cp)
{
    if (cp < 0x300)
        return false;
    if (cp >= 0x1160 && cp <= 0x11ff)
        return true;
    if (in_ranges(late_marks, IPT_COUNT(late_marks), cp))
        return false;
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    return c >= UTF8PROC_CATEGORY_MN && c <= UTF8PROC_CATEGORY_ME;
}

static unsigned combining_class(utf8proc_int32_t cp)
{
    if (cp < 0x300 || in_ranges(late_marks, IPT_COUNT(late_marks), (uint32_t)cp))
        return 0;
    return (unsigned)utf8proc_get_property(cp)->combining_class & 0xffU;
}

/* Canonical ordering of v[0..n) through spare[0..n): a stable counting sort of each run of marks,
 * because the usual exchange sort is quadratic on hostile texts. */
static void order_marks(utf8proc_int32_t *v, utf8proc_int32_t *spare, size_t n)
{
    for (size_t i = 0; i < n;) {
        if (combining_class(v[i]) == 0) {
            i++;
            continue;
        }
        size_t at[257] = {0}, end = i;
        for (; end < n && combining_class(v[end]) != 0; end++)
            at[combining_class(v[end]) + 1]++;
        for (size_t c = 1; c < IPT_COUNT(at); c++)
            at[c] += at[c - 1];
        for (size_t k = i; k < end; k++)
            spare[at[combining_class(v[k])]++] = v[k];
        memcpy(v + i, spare, (end - i) * sizeof *v);
        i = end;
    }
}

/* NFC of one segment appended to out.  A segment that changes gives all its characters the span
 * of the whole. */
static ipt_status normalize_segment(ipt_ctx *ctx, const tok_char *v, size_t n, tok_chars *out)
{
    enum { MAX_DECOMPOSED = 18 }; /* per character; canonical forms need 4 at most */
    size_t cap = n * MAX_DECOMPOSED, len = 0;
    utf8proc_int32_t *buf = ipt_calloc(ctx, 2 * cap, sizeof *buf);
    ipt_status status = buf ? IPT_OK : IPT_ERR_NOMEM;
    if (!buf)
        return status;
    for (size_t i = 0; i < n; i++) {
        int boundclass = 0;
        utf8proc_ssize_t k = utf8proc_decompose_char(
            (utf8proc_int32_t)v[i].cp, buf + len, MAX_DECOMPOSED,
            (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE), &boundclass);
        if (k < 0 || k > MAX_DECOMPOSED) {
            buf[len] = (utf8proc_int32_t)v[i].cp;
            k = 1;
        }
        len += (size_t)k;
    }
    order_marks(buf, buf + cap, len);
    utf8proc_ssize_t composed = utf8proc_normalize_utf32(
        buf, (utf8proc_ssize_t)len, (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    len = composed > 0 ? (size_t)composed : 0;
    bool same = len == n;
    for (size_t i = 0; same && i < n; i++)
        same = (uint32_t)buf[i] == v[i].cp;
    status = chars_reserve(ctx, out, len);
    for (size_t i = 0; status == IPT_OK && i < len; i++)
        out->v[out->n++] = same ? v[i] : (tok_char){(uint32_t)buf[i], v[0].begin, v[n - 1].end};
    ipt_free(buf);
    return status;
}

/* Rust's char::to_lowercase, one character at a time (so no final sigma): a character's simple
 * mapping, and the single multiple one, U+0130. */
static ipt_status push_lower(ipt_ctx *ctx, tok_chars *out, tok_char c)
{
    if (c.cp == 0x130) {
        IPT_TRY(chars_push(ctx, out, (tok_char){'i', c.begin, c.end}));
        c.cp = 0x307;
    } else if (c.cp < 0x80) {
        c.cp += c.cp >= 'A' && c.cp <= 'Z' ? 32 : 0;
    } else {
        uint32_t cp = c.cp;
        c.cp = (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp);
        for (size_t i = 0; c.cp == cp && i < IPT_COUNT(late_lower); i++) {
            const lower_range *r = &late_lower[i];
            if (cp >= r->first && cp <= r->last && (cp - r->first) % r->step == 0)
                c.cp = (uint32_t)((int32_t)cp + r->offset);
        }
    }
    return chars_push(ctx, out, c);
}

static ipt_status normalize_into(ipt_ctx *ctx, const tok_char *v, size_t n, tok_chars *nfc,
                                 tok_chars *out)
{
    for (size_t i = 0, end = 0; i < n; i = end) {
        end = i + 1;
        while (end < n && joins_previous(v[end].cp))
            end++;
        if (end == i + 1 && v[i].cp < 0x300)
            IPT_TRY(chars_push(ctx, nfc, v[i]));
        else
            IPT_TRY(normalize_segment(ctx, v + i, end - i, nfc));
    }
    for (size_t i = 0; i < nfc->n; i++) {
        tok_char c = nfc->v[i];
        if (!tok_is_space(c.cp)) {
            IPT_TRY(push_lower(ctx, out, c));
            continue;
        }
        while (i + 1 < nfc->n && tok_is_space(nfc->v[i + 1].cp))
            c.end = nfc->v[++i].end;
        c.cp = ' ';
        IPT_TRY(chars_push(ctx, out, c));
    }
    return IPT_OK;
}

ipt_status tok_normalize(ipt_ctx *ctx, const tok_char *v, size_t n, tok_chars *out)
{
    tok_chars nfc = {0};
    ipt_status status = normalize_into(ctx, v, n, &nfc, out);
    ipt_free(nfc.v);
    return status;
}
