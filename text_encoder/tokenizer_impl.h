/* text_encoder/tokenizer_impl.h - inside of ipt_tokenizer, for tokenizer*.c only. */
#ifndef IPT_TEXT_ENCODER_TOKENIZER_IMPL_H
#define IPT_TEXT_ENCODER_TOKENIZER_IMPL_H
#include "text_encoder/tokenizer.h"

/* One character of a text on its way through normalisation. */
typedef struct tok_char {
    uint32_t cp;
    uint32_t begin, end; /* bytes of the source text */
} tok_char;

/* A piece that is found in texts before splitting. */
typedef struct tok_added {
    const char *content;
    tok_char *chars; /* [n_chars] as matched: raw, or normalised where is_normalized */
    size_t n_chars;
    int32_t id;
    bool is_normalized; /* looked for after normalisation, else in the raw text */
    bool single_word, lstrip, rstrip;
} tok_added;

typedef struct tok_merge {
    uint64_t pair; /* left id << 32 | right id */
    uint32_t rank;
    int32_t id; /* merged piece; -1: empty slot */
} tok_merge;

struct ipt_tokenizer {
    ipt_arena arena;     /* pieces, added pieces; its ctx is only used while loading */
    const char **pieces; /* [n_ids], NULL where an id has none */
    int32_t n_ids, cap_ids;
    int32_t *table; /* [n_table] open addressing over pieces, -1 = empty */
    size_t n_table, n_table_used;
    tok_merge *merges; /* [n_merges_table] open addressing */
    size_t n_merges_table;
    int32_t byte_id[256], byte_end_id[256]; /* symbol of a byte inside / at the end of a word */
    tok_added *added;                       /* [n_added] */
    size_t n_added, cap_added;
    int32_t bos, eos, pad, unk, max_length;
};

/* Growing array of characters. */
typedef struct tok_chars {
    tok_char *v;
    size_t n, cap;
} tok_chars;

/* Decodes UTF-8; each maximal ill-formed part becomes one U+FFFD (Unicode 15, 3.9, table 3-7).
 * out->v: caller, ipt_free, also after failure. */
ipt_status tok_decode(ipt_ctx *ctx, const char *text, size_t n, tok_chars *out);
/* NFC, white space runs to one blank, lower case of v[0..n) appended to out. */
ipt_status tok_normalize(ipt_ctx *ctx, const tok_char *v, size_t n, tok_chars *out);
/* [+-]digits[.digits] as the nearest double, whatever the locale.  false: not of that form. */
bool tok_read_number(const char *s, size_t n, double *out); /* false: *out is as it was */
bool tok_is_space(uint32_t cp);                             /* \s */
bool tok_is_letter(uint32_t cp);                            /* \p{L} */
bool tok_is_number(uint32_t cp);                            /* \p{N} */
bool tok_is_word(uint32_t cp); /* \w as Unicode TR18 has it: letters, marks, digits, connectors */
/* Looks a merge up; NULL: none. */
const tok_merge *tok_find_merge(const ipt_tokenizer *tok, int32_t left, int32_t right);
/* The character that stands for a byte in pieces, as UTF-8 of at most 2 bytes plus NUL. */
void tok_byte_piece(unsigned byte, char out[3]);

/* --- names of textual inversions (prompt_names.c) --------------------------------------------- */
typedef struct tok_name {
    int32_t *ids;
    size_t n_ids;
    int32_t index, n_vectors;
    const char *text; /* "<word>", found in the text wherever it stands; NULL: by its ids */
} tok_name;
struct ipt_prompt_names {
    tok_name *v; /* [n], longest first */
    size_t n;
};
/* Ownership: arena.  Errors: IPT_ERR_ARG (no name, n_vectors out of range), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status tok_names_make(ipt_ctx *ctx, const ipt_tokenizer *tok, ipt_arena *arena,
                                      const ipt_prompt_attr *attr, struct ipt_prompt_names **out);
/* As ipt_tokenize, but a "<word>" is one token -1-index. */
IPT_CHECKED ipt_status tok_split(ipt_ctx *ctx, const ipt_tokenizer *tok,
                                 const struct ipt_prompt_names *names, const char *text, size_t len,
                                 ipt_token **tokens, size_t *n_tokens);
/* The name that the tokens t[0..n) begin with, or NULL. */
const tok_name *tok_name_at(const struct ipt_prompt_names *names, const ipt_token *t, size_t n);
#endif
