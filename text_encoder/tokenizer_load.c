/* text_encoder/tokenizer_load.c - vocabularies of the CLIP tokenizer: from merges alone, or from
 * the files of a diffusers tokenizer/ folder.  All of it untrusted. */
#include "text_encoder/tokenizer.h"

#include "text_encoder/tokenizer_impl.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    CLIP_MERGES = 49152 - 256 - 2,
    MAX_PIECE = 4096, /* bytes of one piece */
    MAX_ADDED = 4096, /* added pieces   */
    MAX_LENGTH = 1000000,
};
#define BOS_PIECE "<|startoftext|>"
#define EOS_PIECE "<|endoftext|>"

/* --- piece and merge tables ----------------------------------------------------------------- */
static uint64_t hash_bytes(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325ULL;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)s[i]) * 0x100000001b3ULL;
    return h ^ h >> 29;
}

static uint64_t hash_pair(uint64_t x)
{
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15ULL;
    return x ^ x >> 29;
}

/* Slot of a piece, or the empty slot where it belongs. */
static size_t piece_slot(const ipt_tokenizer *tok, const char *s, size_t n)
{
    size_t i = (size_t)hash_bytes(s, n) & (tok->n_table - 1);
    for (; tok->table[i] >= 0; i = (i + 1) & (tok->n_table - 1)) {
        const char *p = tok->pieces[tok->table[i]];
        if (strnlen(p, n + 1) == n && memcmp(p, s, n) == 0)
            break;
    }
    return i;
}

static int32_t find_piece(const ipt_tokenizer *tok, const char *s, size_t n)
{
    return tok->n_table ? tok->table[piece_slot(tok, s, n)] : -1;
}

static ipt_status grow_table(ipt_ctx *ctx, ipt_tokenizer *tok, size_t n)
{
    int32_t *old = tok->table, *v = ipt_calloc(ctx, n, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    size_t n_old = tok->n_table;
    for (size_t i = 0; i < n; i++)
        v[i] = -1;
    tok->table = v;
    tok->n_table = n;
    for (size_t i = 0; i < n_old; i++)
        if (old[i] >= 0) {
            const char *p = tok->pieces[old[i]];
            v[piece_slot(tok, p, strlen(p))] = old[i];
        }
    ipt_free(old);
    return IPT_OK;
}

/* Gives piece s[0..n) the id.  A piece given twice keeps the later id. */
static ipt_status add_piece(ipt_ctx *ctx, ipt_tokenizer *tok, const char *what, const char *s,
                            size_t n, int64_t id)
{
    if (id < 0 || id >= IPT_TOKEN_MAX_IDS)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: id %" PRId64 " of piece \"%.40s\" not in 0..%d",
                        what, id, s, IPT_TOKEN_MAX_IDS - 1);
    if (n > MAX_PIECE)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: piece of %zu bytes, at most %d allowed", what, n,
                        MAX_PIECE);
    if (memchr(s, 0, n)) /* pieces are C strings */
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: piece with id %" PRId64 " holds a NUL byte", what,
                        id);
    if (id >= tok->cap_ids) {
        int32_t cap = id >= 1024 ? (int32_t)id * 2 : 2048;
        const char **v = ipt_calloc(ctx, (size_t)cap, sizeof *v);
        if (!v)
            return IPT_ERR_NOMEM;
        for (int32_t i = 0; i < tok->n_ids; i++)
            v[i] = tok->pieces[i];
        ipt_free(tok->pieces);
        tok->pieces = v;
        tok->cap_ids = cap;
    }
    if (tok->pieces[id])
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: id %" PRId64 " given to \"%.40s\" and \"%.40s\"",
                        what, id, tok->pieces[id], s);
    if (2 * (tok->n_table_used + 1) > tok->n_table)
        IPT_TRY(grow_table(ctx, tok, tok->n_table ? tok->n_table * 2 : 4096));
    char *copy = ipt_arena_alloc(&tok->arena, n + 1);
    if (!copy)
        return IPT_ERR_NOMEM;
    memcpy(copy, s, n);
    tok->pieces[id] = copy;
    if (id >= tok->n_ids)
        tok->n_ids = (int32_t)id + 1;
    size_t slot = piece_slot(tok, copy, n);
    tok->n_table_used += tok->table[slot] < 0;
    tok->table[slot] = (int32_t)id;
    return IPT_OK;
}

static tok_merge *merge_slot(const ipt_tokenizer *tok, uint64_t pair)
{
    size_t i = (size_t)hash_pair(pair) & (tok->n_merges_table - 1);
    while (tok->merges[i].id >= 0 && tok->merges[i].pair != pair)
        i = (i + 1) & (tok->n_merges_table - 1);
    return &tok->merges[i];
}

const tok_merge *tok_find_merge(const ipt_tokenizer *tok, int32_t left, int32_t right)
{
    const tok_merge *m = merge_slot(tok, (uint64_t)(uint32_t)left << 32 | (uint32_t)right);
    return m->id >= 0 ? m : NULL;
}

static ipt_status reserve_merges(ipt_ctx *ctx, ipt_tokenizer *tok, size_t n)
{
    tok->n_merges_table = 16;
    while (tok->n_merges_table < 2 * n)
        tok->n_merges_table *= 2;
    tok->merges = ipt_calloc(ctx, tok->n_merges_table, sizeof *tok->merges);
    if (!tok->merges)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < tok->n_merges_table; i++)
        tok->merges[i].id = -1;
    return IPT_OK;
}

/* Merge number `rank` (0 first); all three pieces must be in the vocabulary.  A pair given twice
 * keeps the later rank. */
static ipt_status add_merge(ipt_ctx *ctx, ipt_tokenizer *tok, const char *what, const char *left,
                            size_t n_left, const char *right, size_t n_right, size_t rank)
{
    char joined[2 * MAX_PIECE];
    if (n_left == 0 || n_right == 0 || n_left > MAX_PIECE || n_right > MAX_PIECE)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: merge %zu is not \"left right\"", what, rank + 1);
    if (memchr(left, 0, n_left) || memchr(right, 0, n_right))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: merge %zu holds a NUL byte", what, rank + 1);
    memcpy(joined, left, n_left);
    memcpy(joined + n_left, right, n_right);
    int32_t a = find_piece(tok, left, n_left), b = find_piece(tok, right, n_right);
    int32_t id = find_piece(tok, joined, n_left + n_right);
    if (a < 0 || b < 0 || id < 0)
        return ipt_fail(ctx, IPT_ERR_FORMAT,
                        "%s: merge %zu (\"%.*s\" \"%.*s\"): %s is not in the vocabulary", what,
                        rank + 1, (int)(n_left < 40 ? n_left : 40), left,
                        (int)(n_right < 40 ? n_right : 40), right,
                        a < 0   ? "the left piece"
                        : b < 0 ? "the right piece"
                                : "the result");
    uint64_t pair = (uint64_t)(uint32_t)a << 32 | (uint32_t)b;
    *merge_slot(tok, pair) = (tok_merge){pair, (uint32_t)rank, id};
    return IPT_OK;
}

/* --- merges.txt ----------------------------------------------------------------------------- */
typedef struct line {
    const char *left, *right;
    size_t n_left, n_right;
} line;

/* Next merge of a merges text, skipping the version line and empty lines.  false at the end;
 * a line that is not "left right" gives n_right = 0. */
static bool next_merge(const char **at, const char *end, line *out)
{
    while (*at < end) {
        const char *s = *at, *nl = memchr(s, '\n', (size_t)(end - s));
        const char *stop = nl ? nl : end;
        *at = nl ? nl + 1 : end;
        if (stop > s && stop[-1] == '\r')
            stop--;
        size_t n = (size_t)(stop - s);
        if (n == 0 || (n >= 8 && memcmp(s, "#version", 8) == 0) ||
            (n >= 10 && memcmp(s, "\"bpe_simpl", 10) == 0)) /* the header of OpenAI's file */
            continue;
        const char *blank = memchr(s, ' ', n);
        *out = (line){s, stop, n, 0};
        if (blank && !memchr(blank + 1, ' ', (size_t)(stop - blank - 1)))
            *out = (line){s, blank + 1, (size_t)(blank - s), (size_t)(stop - blank - 1)};
        return true;
    }
    return false;
}

static ipt_status add_merge_lines(ipt_ctx *ctx, ipt_tokenizer *tok, const char *what,
                                  const char *text, size_t n, size_t max)
{
    const char *at = text, *end = text + n;
    size_t count = 0, rank = 0;
    line l;
    while (count < max && next_merge(&at, end, &l))
        count++;
    IPT_TRY(reserve_merges(ctx, tok, count));
    for (at = text; rank < count && next_merge(&at, end, &l); rank++)
        IPT_TRY(add_merge(ctx, tok, what, l.left, l.n_left, l.right, l.n_right, rank));
    return IPT_OK;
}

/* --- byte symbols --------------------------------------------------------------------------- */
/* Bytes that stand for themselves in pieces: printable Latin-1 without blanks. */
static bool is_plain_byte(unsigned b)
{
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
}

void tok_byte_piece(unsigned byte, char out[3])
{
    unsigned cp = byte;
    if (!is_plain_byte(byte)) { /* the n-th other byte is U+0100 + n */
        cp = 256;
        for (unsigned b = 0; b < byte; b++)
            cp += !is_plain_byte(b);
    }
    bool is_short = cp < 0x80;
    out[0] = (char)(is_short ? cp : 0xc0 | cp >> 6);
    out[1] = (char)(is_short ? 0 : 0x80 | (cp & 0x3f));
    out[2] = '\0';
}

static void find_byte_ids(ipt_tokenizer *tok)
{
    for (unsigned b = 0; b < 256; b++) {
        char s[8];
        tok_byte_piece(b, s);
        tok->byte_id[b] = find_piece(tok, s, strlen(s));
        memcpy(s + strlen(s), "</w>", 5);
        tok->byte_end_id[b] = find_piece(tok, s, strlen(s));
    }
}

/* CLIP's 512 first ids: plain bytes, then the others, then both again with "</w>". */
static ipt_status add_byte_pieces(ipt_ctx *ctx, ipt_tokenizer *tok)
{
    int64_t id = 0;
    for (int pass = 0; pass < 4; pass++)
        for (unsigned b = 0; b < 256; b++) {
            char s[8];
            if (is_plain_byte(b) != (pass % 2 == 0))
                continue;
            tok_byte_piece(b, s);
            if (pass >= 2)
                memcpy(s + strlen(s), "</w>", 5);
            IPT_TRY(add_piece(ctx, tok, "byte symbols", s, strlen(s), id++));
        }
    return IPT_OK;
}

/* --- added pieces --------------------------------------------------------------------------- */
typedef struct added_attr {
    bool is_normalized, single_word, lstrip, rstrip;
} added_attr;

static ipt_status match_form(ipt_ctx *ctx, const tok_chars *raw, bool is_normalized, tok_chars *out)
{
    if (is_normalized)
        return tok_normalize(ctx, raw->v, raw->n, out);
    for (size_t i = 0; i < raw->n; i++)
        out->v[i] = raw->v[i];
    out->n = raw->n;
    return IPT_OK;
}

/* Fills a->chars for its content. */
static ipt_status set_match(ipt_ctx *ctx, ipt_tokenizer *tok, tok_added *a)
{
    tok_chars raw = {0}, norm = {0};
    ipt_status status = tok_decode(ctx, a->content, strlen(a->content), &raw);
    if (status == IPT_OK && !a->is_normalized) {
        norm.v = ipt_calloc(ctx, raw.n, sizeof *norm.v);
        status = norm.v ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (status == IPT_OK)
        status = match_form(ctx, &raw, a->is_normalized, &norm);
    if (status == IPT_OK) {
        a->chars = ipt_arena_alloc(&tok->arena, norm.n * sizeof *a->chars);
        status = a->chars ? IPT_OK : IPT_ERR_NOMEM;
    }
    if (status == IPT_OK && norm.n > 0)
        memcpy(a->chars, norm.v, norm.n * sizeof *a->chars);
    a->n_chars = norm.n;
    ipt_free(raw.v);
    ipt_free(norm.v);
    return status;
}

static tok_added *find_added(const ipt_tokenizer *tok, const char *content)
{
    for (size_t i = 0; i < tok->n_added; i++)
        if (strcmp(tok->added[i].content, content) == 0)
            return &tok->added[i];
    return NULL;
}

/* Adds a piece that texts are searched for, with its vocabulary id or a new one; given again, the
 * later attributes hold. */
static ipt_status add_added(ipt_ctx *ctx, ipt_tokenizer *tok, const char *what, const char *content,
                            added_attr attr)
{
    tok_added *a = find_added(tok, content);
    size_t n = strlen(content);
    if (n == 0)
        return IPT_OK;
    if (!a) {
        if (tok->n_added == MAX_ADDED)
            return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: more than %d added pieces", what, MAX_ADDED);
        if (tok->n_added == tok->cap_added) {
            size_t cap = tok->cap_added ? tok->cap_added * 2 : 8;
            tok_added *v = ipt_regrow(ctx, tok->added, tok->n_added * sizeof *v, cap * sizeof *v);
            if (!v)
                return IPT_ERR_NOMEM;
            tok->added = v;
            tok->cap_added = cap;
        }
        int32_t id = find_piece(tok, content, n);
        if (id < 0) {
            id = tok->n_ids;
            IPT_TRY(add_piece(ctx, tok, what, content, n, id));
        }
        a = &tok->added[tok->n_added++];
        *a = (tok_added){.content = tok->pieces[id], .id = id};
    }
    a->is_normalized = attr.is_normalized;
    a->single_word = attr.single_word;
    a->lstrip = attr.lstrip;
    a->rstrip = attr.rstrip;
    return set_match(ctx, tok, a);
}

/* --- from merges ---------------------------------------------------------------------------- */
static ipt_status create_empty(ipt_ctx *ctx, ipt_tokenizer **out)
{
    ipt_tokenizer *tok = ipt_alloc(ctx, sizeof *tok);
    if (!tok)
        return IPT_ERR_NOMEM;
    ipt_arena_init(&tok->arena, ctx);
    tok->bos = tok->eos = tok->pad = tok->unk = -1;
    tok->max_length = IPT_TOKEN_WINDOW;
    *out = tok;
    return IPT_OK;
}

static ipt_status fill_from_merges(ipt_ctx *ctx, ipt_tokenizer *tok, const char *merges, size_t n,
                                   const char *pad)
{
    static const char what[] = "CLIP merges";
    const char *at = merges, *end = merges + n;
    int64_t id = 512;
    line l;
    IPT_TRY(add_byte_pieces(ctx, tok));
    while (id < 512 + CLIP_MERGES && next_merge(&at, end, &l)) {
        char joined[2 * MAX_PIECE];
        if (l.n_left == 0 || l.n_right == 0 || l.n_left + l.n_right > MAX_PIECE)
            return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: merge %" PRId64 " is not \"left right\"",
                            what, id - 511);
        memcpy(joined, l.left, l.n_left);
        memcpy(joined + l.n_left, l.right, l.n_right);
        joined[l.n_left + l.n_right] = '\0';
        IPT_TRY(add_piece(ctx, tok, what, joined, l.n_left + l.n_right, id++));
    }
    if (id == 512)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: no merges in %zu bytes", what, n);
    find_byte_ids(tok);
    IPT_TRY(add_merge_lines(ctx, tok, what, merges, n, CLIP_MERGES));
    IPT_TRY(add_piece(ctx, tok, what, BOS_PIECE, strlen(BOS_PIECE), id++));
    IPT_TRY(add_piece(ctx, tok, what, EOS_PIECE, strlen(EOS_PIECE), id));
    IPT_TRY(add_added(ctx, tok, what, BOS_PIECE, (added_attr){0}));
    IPT_TRY(add_added(ctx, tok, what, EOS_PIECE, (added_attr){0}));
    if (pad && find_piece(tok, pad, strlen(pad)) < 0)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: padding piece \"%.40s\" is not in the vocabulary",
                        what, pad);
    if (pad)
        IPT_TRY(add_added(ctx, tok, what, pad, (added_attr){0}));
    tok->bos = find_piece(tok, BOS_PIECE, strlen(BOS_PIECE));
    tok->eos = tok->unk = find_piece(tok, EOS_PIECE, strlen(EOS_PIECE));
    tok->pad = pad ? find_piece(tok, pad, strlen(pad)) : tok->eos;
    return IPT_OK;
}

ipt_status ipt_tokenizer_create_from_merges(ipt_ctx *ctx, const char *merges, size_t n,
                                            const char *pad, ipt_tokenizer **out)
{
    ipt_tokenizer *tok = NULL;
    if (n > IPT_TOKEN_MAX_FILE)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "CLIP merges: %zu bytes, at most %d allowed", n,
                        IPT_TOKEN_MAX_FILE);
    IPT_TRY(create_empty(ctx, &tok));
    ipt_status status = fill_from_merges(ctx, tok, merges, n, pad);
    if (status != IPT_OK)
        ipt_tokenizer_destroy(&tok);
    else
        *out = tok;
    return status;
}

ipt_status ipt_tokenizer_load_merges(ipt_ctx *ctx, const char *path, const char *pad,
                                     ipt_tokenizer **out)
{
    char *text = NULL;
    size_t n = 0;
    IPT_TRY(ipt_file_read(ctx, path, IPT_TOKEN_MAX_FILE, &text, &n));
    ipt_status status = ipt_tokenizer_create_from_merges(ctx, text, n, pad, out);
    ipt_free(text);
    return status;
}

/* --- from a folder's files ------------------------------------------------------------------ */
typedef struct folder {
    ipt_ctx *ctx;
    const char *what;
    ipt_tokenizer *tok;
    json_t *vocab, *tokenizer, *config, *special, *added; /* parsed files, NULL = absent */
} folder;

/* Like ipt_json_parse, but lets through integers beyond 64 bits: many a tokenizer_config.json
 * says model_max_length 1000000000000000019884624838656. */
static ipt_status parse_text(folder *f, const char *name, ipt_tokenizer_text text, json_t **out)
{
    json_error_t err;
    if (!text.data)
        return IPT_OK;
    if (text.size > IPT_TOKEN_MAX_FILE)
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: %s has %zu bytes, at most %d allowed", f->what,
                        name, text.size, IPT_TOKEN_MAX_FILE);
    *out = json_loadb(text.data, text.size, JSON_DECODE_INT_AS_REAL | JSON_REJECT_DUPLICATES, &err);
    if (!*out && json_error_code(&err) == json_error_out_of_memory)
        return ipt_fail(f->ctx, IPT_ERR_NOMEM, "%s: %s: out of memory", f->what, name);
    if (!*out)
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: %s: not valid JSON: %.120s (line %d)", f->what,
                        name, err.text, err.line);
    if (!json_is_object(*out))
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: %s: an object was expected", f->what, name);
    return IPT_OK;
}

/* A JSON number as an id, -1 when it is none. */
static int64_t as_id(const json_t *v)
{
    double x = json_number_value(v);
    return json_is_number(v) && x >= 0 && x < IPT_TOKEN_MAX_IDS && floor(x) == x ? (int64_t)x : -1;
}

static ipt_status add_vocab(folder *f, json_t *vocab)
{
    const char *key = NULL;
    json_t *value = NULL;
    if (!json_is_object(vocab) || json_object_size(vocab) == 0)
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: the vocabulary is not an object of ids",
                        f->what);
    json_object_foreach(vocab, key, value)
    {
        int64_t id = as_id(value);
        if (id < 0 && json_is_number(value))
            return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: id %.15g of piece \"%.40s\" not in 0..%d",
                            f->what, json_number_value(value), key, IPT_TOKEN_MAX_IDS - 1);
        if (id < 0)
            return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: id of piece \"%.40s\": expected a number",
                            f->what, key);
        IPT_TRY(add_piece(f->ctx, f->tok, f->what, key, strlen(key), id));
    }
    return IPT_OK;
}

/* model.merges of tokenizer.json: "left right" or ["left", "right"]. */
static ipt_status add_json_merges(folder *f, const json_t *merges)
{
    size_t n = json_array_size(merges);
    if (!json_is_array(merges))
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: tokenizer.json has no model.merges", f->what);
    IPT_TRY(reserve_merges(f->ctx, f->tok, n));
    for (size_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(merges, i);
        const char *left = json_string_value(json_array_get(m, 0));
        const char *right = json_string_value(json_array_get(m, 1));
        size_t n_left = left ? strlen(left) : 0;
        if (json_is_string(m)) {
            left = json_string_value(m);
            right = strchr(left, ' ');
            n_left = right ? (size_t)(right - left) : 0;
            right = right ? right + 1 : NULL;
        }
        if (!left || !right || strchr(right, ' ') || (json_is_array(m) && json_array_size(m) != 2))
            return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: merge %zu is not \"left right\"", f->what,
                            i + 1);
        IPT_TRY(add_merge(f->ctx, f->tok, f->what, left, n_left, right, strlen(right), i));
    }
    return IPT_OK;
}

/* Adds an entry {"content": ..., flags} of an added-token list. */
static ipt_status add_entry(folder *f, const json_t *entry, bool normalized_default)
{
    const char *content = ipt_json_str(entry, "content", NULL);
    if (!content)
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: an added token has no content", f->what);
    return add_added(f->ctx, f->tok, f->what, content,
                     (added_attr){ipt_json_bool(entry, "normalized", normalized_default),
                                  ipt_json_bool(entry, "single_word", false),
                                  ipt_json_bool(entry, "lstrip", false),
                                  ipt_json_bool(entry, "rstrip", false)});
}

static const char *const special_keys[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                           "pad_token", "cls_token", "mask_token"};

/* The value of a special-token key: a string or an object with content; NULL = not given.
 * special_tokens_map.json counts only where the configuration has no added_tokens_decoder. */
static const json_t *special_value(const folder *f, const char *key)
{
    const json_t *v = NULL;
    if (!json_object_get(f->config, "added_tokens_decoder"))
        v = json_object_get(f->special, key);
    if (!v)
        v = json_object_get(f->config, key);
    if (json_is_string(v) || ipt_json_str(v, "content", NULL))
        return v;
    return NULL;
}

static const char *special_content(const folder *f, const char *key, const char *dflt)
{
    const json_t *v = special_value(f, key);
    if (!v)
        return dflt;
    return json_is_string(v) ? json_string_value(v) : ipt_json_str(v, "content", dflt);
}

typedef struct sorted_entry {
    int64_t id;
    const json_t *entry; /* object with content, or NULL: plain `content` */
    const char *content;
} sorted_entry;

static int compare_entries(const void *a, const void *b)
{
    const sorted_entry *x = a, *y = b;
    return x->id < y->id ? -1 : x->id > y->id;
}

static bool is_special_content(const folder *f, const char *content)
{
    for (size_t i = 0; i < IPT_COUNT(special_keys); i++)
        if (strcmp(special_content(f, special_keys[i], ""), content) == 0)
            return true;
    return false;
}

/* Collects added_tokens_decoder, or added_tokens.json and tokenizer.json's list, into v. */
static size_t collect_entries(const folder *f, sorted_entry *v)
{
    const char *key = NULL;
    json_t *value = NULL, *decoder = json_object_get(f->config, "added_tokens_decoder");
    size_t n = 0, i = 0;
    if (decoder) {
        json_object_foreach(decoder, key, value) v[n++] =
            (sorted_entry){strtol(key, NULL, 10), value, NULL};
        return n;
    }
    json_object_foreach(f->added, key, value) v[n++] = (sorted_entry){as_id(value), NULL, key};
    json_array_foreach(json_object_get(f->tokenizer, "added_tokens"), i, value)
    {
        int64_t id = as_id(json_object_get(value, "id"));
        size_t k = 0;
        while (k < n && v[k].id != id)
            k++;
        n += k == n;
        v[k] = (sorted_entry){id, value, NULL};
    }
    return n;
}

static ipt_status add_entries(folder *f)
{
    const json_t *list = json_object_get(f->tokenizer, "added_tokens");
    const json_t *decoder = json_object_get(f->config, "added_tokens_decoder");
    size_t cap = json_object_size(decoder) + json_object_size(f->added) + json_array_size(list);
    if (cap > MAX_ADDED)
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: more than %d added pieces", f->what,
                        MAX_ADDED);
    sorted_entry *v = ipt_calloc(f->ctx, cap, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    size_t n = collect_entries(f, v);
    qsort(v, n, sizeof *v, compare_entries);
    ipt_status status = IPT_OK;
    for (size_t i = 0; status == IPT_OK && i < n; i++) {
        if (v[i].entry)
            status = add_entry(f, v[i].entry, !ipt_json_bool(v[i].entry, "special", false));
        else
            status = add_added(f->ctx, f->tok, f->what, v[i].content,
                               (added_attr){.is_normalized = !is_special_content(f, v[i].content)});
    }
    ipt_free(v);
    return status;
}

/* bos, eos, unk and the others become added pieces unless the lists above have them.  A plain
 * string overrides the flags of an object seen before with the same content; an object does not:
 * that is how the reference comes to look for CLIP's start piece after lower-casing and for its
 * end piece before. */
static ipt_status add_specials(folder *f)
{
    size_t n_listed = f->tok->n_added;
    for (size_t i = 0; i < IPT_COUNT(special_keys); i++) {
        const char *key = special_keys[i];
        bool has_default = i == 0 || i == 1 || i == 2 || i == 4;
        const char *dflt = !has_default ? NULL : i == 0 ? BOS_PIECE : EOS_PIECE;
        const char *content = special_content(f, key, dflt);
        const json_t *v = special_value(f, key);
        if (!content)
            continue;
        const tok_added *known = find_added(f->tok, content);
        if (known && ((size_t)(known - f->tok->added) < n_listed || json_is_object(v)))
            continue;
        bool from_map = v && !json_object_get(f->config, "added_tokens_decoder") &&
                        json_object_get(f->special, key) == v;
        if (json_is_object(v))
            IPT_TRY(add_entry(f, v, !from_map));
        else
            IPT_TRY(add_added(f->ctx, f->tok, f->what, content, (added_attr){0}));
    }
    return IPT_OK;
}

/* Further special tokens of the configuration, strings or objects. */
static ipt_status add_extra_specials(folder *f, const json_t *list)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const char *content =
            json_is_string(v) ? json_string_value(v) : ipt_json_str(v, "content", NULL);
        if (!content || find_added(f->tok, content))
            continue;
        if (json_is_object(v))
            IPT_TRY(add_entry(f, v, false));
        else
            IPT_TRY(add_added(f->ctx, f->tok, f->what, content, (added_attr){0}));
    }
    return IPT_OK;
}

static ipt_status fill_from_files(folder *f, const ipt_tokenizer_files *files)
{
    ipt_tokenizer *tok = f->tok;
    const json_t *model = json_object_get(f->tokenizer, "model");
    if (f->tokenizer) {
        IPT_TRY(add_vocab(f, json_object_get(model, "vocab")));
        IPT_TRY(add_json_merges(f, json_object_get(model, "merges")));
    } else {
        if (files->merges.size > IPT_TOKEN_MAX_FILE)
            return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: merges.txt has %zu bytes", f->what,
                            files->merges.size);
        IPT_TRY(add_vocab(f, f->vocab));
        IPT_TRY(add_merge_lines(f->ctx, tok, f->what, files->merges.data, files->merges.size,
                                SIZE_MAX));
    }
    find_byte_ids(tok);
    IPT_TRY(add_entries(f));
    IPT_TRY(add_specials(f));
    static const char *const extra[] = {"extra_special_tokens", "additional_special_tokens"};
    for (size_t i = 0; i < IPT_COUNT(extra); i++) {
        IPT_TRY(add_extra_specials(f, json_object_get(f->config, extra[i])));
        if (!json_object_get(f->config, "added_tokens_decoder"))
            IPT_TRY(add_extra_specials(f, json_object_get(f->special, extra[i])));
    }
    tok->bos = ipt_tokenizer_id(tok, special_content(f, "bos_token", BOS_PIECE));
    tok->eos = ipt_tokenizer_id(tok, special_content(f, "eos_token", EOS_PIECE));
    tok->unk = ipt_tokenizer_id(tok, special_content(f, "unk_token", EOS_PIECE));
    tok->pad = ipt_tokenizer_id(tok, special_content(f, "pad_token", EOS_PIECE));
    if (tok->bos < 0 || tok->eos < 0 || tok->pad < 0)
        return ipt_fail(f->ctx, IPT_ERR_FORMAT, "%s: the start, end or padding token is empty",
                        f->what);
    double max = ipt_json_num(f->config, "model_max_length", IPT_TOKEN_WINDOW);
    tok->max_length = max >= 1 && max <= MAX_LENGTH ? (int32_t)max : IPT_TOKEN_WINDOW;
    return IPT_OK;
}

static ipt_status parse_files(folder *f, const ipt_tokenizer_files *files)
{
    IPT_TRY(parse_text(f, "tokenizer_config.json", files->config, &f->config));
    IPT_TRY(parse_text(f, "special_tokens_map.json", files->special_tokens, &f->special));
    IPT_TRY(parse_text(f, "added_tokens.json", files->added_tokens, &f->added));
    if (files->tokenizer.data)
        return parse_text(f, "tokenizer.json", files->tokenizer, &f->tokenizer);
    if (!files->vocab.data || !files->merges.data)
        return ipt_fail(f->ctx, IPT_ERR_MISSING,
                        "%s: needs tokenizer.json, or vocab.json and merges.txt", f->what);
    return parse_text(f, "vocab.json", files->vocab, &f->vocab);
}

ipt_status ipt_tokenizer_create_from_files(ipt_ctx *ctx, const char *what,
                                           const ipt_tokenizer_files *files, ipt_tokenizer **out)
{
    folder f = {.ctx = ctx, .what = what};
    IPT_TRY(create_empty(ctx, &f.tok));
    ipt_status status = parse_files(&f, files);
    if (status == IPT_OK)
        status = fill_from_files(&f, files);
    json_decref(f.vocab);
    json_decref(f.tokenizer);
    json_decref(f.config);
    json_decref(f.special);
    json_decref(f.added);
    if (status != IPT_OK)
        ipt_tokenizer_destroy(&f.tok);
    else
        *out = f.tok;
    return status;
}

static ipt_status read_if_there(ipt_ctx *ctx, const char *folder_path, const char *name,
                                ipt_tokenizer_text *out, char **owned)
{
    char path[4096];
    if (!ipt_path_join(path, sizeof path, folder_path, name))
        return ipt_fail(ctx, IPT_ERR_IO, "%.200s...: path too long", folder_path);
    if (!ipt_is_file(path))
        return IPT_OK;
    IPT_TRY(ipt_file_read(ctx, path, IPT_TOKEN_MAX_FILE, owned, &out->size));
    out->data = *owned;
    return IPT_OK;
}

ipt_status ipt_tokenizer_load_folder(ipt_ctx *ctx, const char *folder_path, ipt_tokenizer **out)
{
    static const char *const names[] = {"vocab.json",
                                        "merges.txt",
                                        "tokenizer.json",
                                        "tokenizer_config.json",
                                        "special_tokens_map.json",
                                        "added_tokens.json"};
    ipt_tokenizer_files files = {.vocab = {NULL, 0}};
    ipt_tokenizer_text *const texts[] = {&files.vocab,  &files.merges,         &files.tokenizer,
                                         &files.config, &files.special_tokens, &files.added_tokens};
    char *owned[IPT_COUNT(names)] = {0};
    ipt_status status = IPT_OK;
    if (!ipt_is_dir(folder_path))
        return ipt_fail(ctx, IPT_ERR_IO, "%s: not a folder", folder_path);
    for (size_t i = 0; status == IPT_OK && i < IPT_COUNT(names); i++)
        status = read_if_there(ctx, folder_path, names[i], texts[i], &owned[i]);
    if (status == IPT_OK)
        status = ipt_tokenizer_create_from_files(ctx, folder_path, &files, out);
    for (size_t i = 0; i < IPT_COUNT(names); i++)
        ipt_free(owned[i]);
    return status;
}

/* --- the rest of the interface -------------------------------------------------------------- */
void ipt_tokenizer_destroy(ipt_tokenizer **tok)
{
    if (!tok || !*tok)
        return;
    ipt_free((*tok)->pieces);
    ipt_free((*tok)->table);
    ipt_free((*tok)->merges);
    ipt_free((*tok)->added);
    ipt_arena_finish(&(*tok)->arena);
    ipt_free(*tok);
    *tok = NULL;
}

const char *ipt_tokenizer_piece(const ipt_tokenizer *tok, int32_t id)
{
    return id >= 0 && id < tok->n_ids && tok->pieces[id] ? tok->pieces[id] : "";
}

int32_t ipt_tokenizer_id(const ipt_tokenizer *tok, const char *piece)
{
    return find_piece(tok, piece, strlen(piece));
}

int32_t ipt_tokenizer_bos(const ipt_tokenizer *tok) { return tok->bos; }
int32_t ipt_tokenizer_eos(const ipt_tokenizer *tok) { return tok->eos; }
int32_t ipt_tokenizer_pad(const ipt_tokenizer *tok) { return tok->pad; }
int32_t ipt_tokenizer_unk(const ipt_tokenizer *tok) { return tok->unk; }
int32_t ipt_tokenizer_vocab_size(const ipt_tokenizer *tok) { return tok->n_ids; }
int32_t ipt_tokenizer_max_length(const ipt_tokenizer *tok) { return tok->max_length; }
