/* text_encoder/tokenizer.h - CLIP's byte-pair tokenizer and the prompt language on top of it.
 *
 * Owns: text -> token ids, prompt syntax -> chunks of 77 ids with weights.
 * Must not know: tensors, Vulkan, the encoder that consumes the ids.
 * Threads: a tokenizer and a prompt are read-only after creation and may be shared; every call
 *          takes the ctx of the calling thread for messages and memory. */
#ifndef IPT_TEXT_ENCODER_TOKENIZER_H
#define IPT_TEXT_ENCODER_TOKENIZER_H
#include "core/core.h"

enum {
    IPT_TOKEN_WINDOW = 77,           /* bos + content + eos of one chunk          */
    IPT_TOKEN_CONTENT = 75,          /* content tokens of one chunk               */
    IPT_TOKEN_MAX_TEXT = 64 * 1024,  /* bytes of one text                         */
    IPT_TOKEN_MAX_FILE = 32 << 20,   /* bytes of one tokenizer file               */
    IPT_TOKEN_MAX_IDS = 1 << 20,     /* ids of one vocabulary                     */
    IPT_PROMPT_COMMA_BACKTRACK = 20, /* A1111's default                           */
    IPT_PROMPT_MAX_CHUNKS = 64,      /* chunks of one prompt: time grows with it  */
};

/* --- tokenizer -------------------------------------------------------------------------- */
typedef struct ipt_tokenizer ipt_tokenizer;

typedef struct ipt_token {
    int32_t id;
    uint32_t begin, end; /* bytes of the text it stands for; tokens that share a character share
                            its span */
} ipt_token;

/* CLIP's vocabulary from its merges alone: 256 byte symbols in CLIP's order, the same with
 * "</w>", one id a merge, <|startoftext|>, <|endoftext|> (found in texts as written, not in
 * capitals: what CLIPTokenizer does when made from a vocabulary alone).
 *   merges  [n] text, one "left right" a line; a first line holding "#version" is skipped; lines
 *           past CLIP's 48,894 merges are ignored, so OpenAI's whole file may be given.
 *   pad     padding piece; NULL: <|endoftext|>.  Another piece (OpenCLIP's "!") becomes a special
 *           piece that is also recognised inside texts, as the published tokenizers do.
 * Ownership: caller, ipt_tokenizer_destroy.  Errors: IPT_ERR_FORMAT with the line, IPT_ERR_NOMEM.
 * Source: openai/CLIP simple_tokenizer.py. */
IPT_CHECKED ipt_status ipt_tokenizer_create_from_merges(ipt_ctx *ctx, const char *merges, size_t n,
                                                        const char *pad, ipt_tokenizer **out);
/* The same from a file.  Errors: as above and IPT_ERR_IO. */
IPT_CHECKED ipt_status ipt_tokenizer_load_merges(ipt_ctx *ctx, const char *path, const char *pad,
                                                 ipt_tokenizer **out);

/* The texts of a diffusers tokenizer/ folder; data = NULL where a file is absent. */
typedef struct ipt_tokenizer_text {
    const char *data; /* NUL-terminated or not */
    size_t size;
} ipt_tokenizer_text;
typedef struct ipt_tokenizer_files {
    ipt_tokenizer_text vocab;          /* vocab.json                                        */
    ipt_tokenizer_text merges;         /* merges.txt                                        */
    ipt_tokenizer_text tokenizer;      /* tokenizer.json: where present, used for both      */
    ipt_tokenizer_text config;         /* tokenizer_config.json                             */
    ipt_tokenizer_text special_tokens; /* special_tokens_map.json                           */
    ipt_tokenizer_text added_tokens;   /* added_tokens.json                                 */
} ipt_tokenizer_files;
/* Needs tokenizer, or vocab and merges.  bos, eos, unk and pad pieces and added pieces come from
 * the configuration with the precedence of transformers; defaults are CLIP's.
 *   what  names the files in messages.
 * Ownership: caller.  Errors: IPT_ERR_MISSING, IPT_ERR_FORMAT, IPT_ERR_NOMEM.
 * Source: transformers 5.23 CLIPTokenizer, PreTrainedTokenizerBase._from_pretrained. */
IPT_CHECKED ipt_status ipt_tokenizer_create_from_files(ipt_ctx *ctx, const char *what,
                                                       const ipt_tokenizer_files *files,
                                                       ipt_tokenizer **out);
/* The same from a folder.  Errors: as above and IPT_ERR_IO. */
IPT_CHECKED ipt_status ipt_tokenizer_load_folder(ipt_ctx *ctx, const char *folder,
                                                 ipt_tokenizer **out);
void ipt_tokenizer_destroy(ipt_tokenizer **tok); /* tok and *tok may be NULL */

/* Ids of a text, without start and end.  Invalid UTF-8 counts as U+FFFD.  Pieces such as
 * <|endoftext|> typed in the text give their own id.
 *   text  [n] bytes, n <= IPT_TOKEN_MAX_TEXT
 *   tokens [*n_tokens]: caller, ipt_free
 * Errors: IPT_ERR_ARG when longer, IPT_ERR_NOMEM.
 * Source: transformers 5.23 CLIPTokenizer over tokenizers 0.23: NFC, white space to one blank,
 * lower case, CLIP's split expression, byte-level BPE. */
IPT_CHECKED ipt_status ipt_tokenize(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text,
                                    size_t n, ipt_token **tokens, size_t *n_tokens);

/* The piece of an id as vocab.json spells it ("cat</w>"); "" for an id that has none.  Valid as
 * long as the tokenizer. */
const char *ipt_tokenizer_piece(const ipt_tokenizer *tok, int32_t id);
int32_t ipt_tokenizer_id(const ipt_tokenizer *tok, const char *piece); /* -1: none */
int32_t ipt_tokenizer_bos(const ipt_tokenizer *tok);
int32_t ipt_tokenizer_eos(const ipt_tokenizer *tok);
int32_t ipt_tokenizer_pad(const ipt_tokenizer *tok);
int32_t ipt_tokenizer_unk(const ipt_tokenizer *tok);        /* -1: none */
int32_t ipt_tokenizer_vocab_size(const ipt_tokenizer *tok); /* highest id + 1 */
/* model_max_length of the configuration; 77 where absent or above 1,000,000. */
int32_t ipt_tokenizer_max_length(const ipt_tokenizer *tok);

/* --- prompts ---------------------------------------------------------------------------- */
/* <lora:name>, <lora:name:te>, <lora:name:te:unet>, with te=X and unet=X in any place, in A1111's
 * order: the text encoder first.  A missing te is 1, a missing unet is te.  <lyco:...> is the same.
 */
typedef struct ipt_prompt_lora {
    const char *name;
    double weight;    /* for the UNet         */
    double te_weight; /* for the text encoder */
} ipt_prompt_lora;

/* A textual inversion that the caller can supply. */
typedef struct ipt_prompt_embedding {
    const char *name;  /* as written in prompts; matched by its token ids, longest first; "<word>"
                          wherever the text has it, capital or not, as an added token */
    int32_t n_vectors; /* 1..75 */
} ipt_prompt_embedding;

/* Where one stands: ids [chunk][pos .. pos+n) are placeholders 0 to be replaced after the token
 * embedding by vectors 0..n-1 of embedding `index`. */
typedef struct ipt_prompt_span {
    int32_t chunk, pos, index, n;
} ipt_prompt_span;

typedef struct ipt_prompt_attr {
    const ipt_prompt_embedding *embeddings; /* [n_embeddings], borrowed for the call */
    int32_t n_embeddings;
    int32_t comma_backtrack; /* 0: A1111's 20; negative: off                                    */
    int32_t max_chunks;      /* 0: as needed, up to 64; else later tokens are dropped           */
    bool plain;              /* no syntax at all: brackets, BREAK and <...> are text (diffusers) */
    bool has_no_tags;        /* they are taken out already: what looks like one is text */
} ipt_prompt_attr;

typedef struct ipt_prompt {
    int32_t n_chunk;        /* >= 1 */
    int32_t *ids;           /* [n_chunk][77]: bos, content, eos, pad... */
    float *weights;         /* [n_chunk][77]: 1 for bos, eos and padding */
    int32_t *n_content;     /* [n_chunk] content tokens, 0..75 */
    bool *ends_with_break;  /* [n_chunk] closed by BREAK */
    ipt_prompt_span *spans; /* [n_span], in reading order */
    size_t n_span;
    ipt_prompt_lora *loras; /* [n_lora], in reading order */
    size_t n_lora;
    const char **ignored; /* [n_ignored] other <name:...> tags, whole, removed from the text; items
                             of <lora:> tags that have no meaning here: "dyn=8" */
    size_t n_ignored;
    const char *text; /* the prompt without tags */
    bool was_cut;     /* tokens were dropped because of max_chunks */
    /* private: what ipt_prompt_find needs of the embeddings */
    struct ipt_prompt_names *names;
    ipt_arena arena;
} ipt_prompt;

/* Reads a prompt in A1111's language and lays it out in chunks.
 *   (x) times 1.1, (x:W) times W, [x] divided by 1.1, nested; \( \) \[ \] \\ literal; brackets
 *   left open reach to the end; BREAK fills the chunk.  As in A1111, a BREAK inside brackets is
 *   the plain word: its marker weight has been scaled.  A number that cannot be read ("1.2.3") is
 *   text.  Where a chunk is full and a comma lies within the last 20 tokens, what follows the
 *   comma moves to the next chunk.
 *   text [n] bytes; attr may be NULL.
 * Ownership: caller, ipt_prompt_destroy.
 * Errors: IPT_ERR_ARG (text over IPT_TOKEN_MAX_TEXT; more than IPT_PROMPT_MAX_CHUNKS chunks;
 * brackets that make an infinite weight; embedding without name or with n_vectors out of range),
 * IPT_ERR_FORMAT (a <lora:...> tag without name or with an unreadable number; the message quotes
 * it), IPT_ERR_NOMEM. Source: AUTOMATIC1111/stable-diffusion-webui 1.10
 * prompt_parser.parse_prompt_attention, sd_hijack_clip.tokenize_line, extra_networks.parse_prompt.
 */
IPT_CHECKED ipt_status ipt_prompt_create(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text,
                                         size_t n, const ipt_prompt_attr *attr, ipt_prompt **out);
void ipt_prompt_destroy(ipt_prompt **prompt); /* prompt and *prompt may be NULL */
/* Appends empty chunks (bos, eos, pad...) up to n_chunk, so that a prompt and its negative have
 * the same length.  No effect when long enough.
 * Errors: IPT_ERR_ARG above IPT_PROMPT_MAX_CHUNKS, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_prompt_extend(ipt_ctx *ctx, const ipt_tokenizer *tok, ipt_prompt *prompt,
                                         int32_t n_chunk);

typedef struct ipt_prompt_pos {
    int32_t chunk, pos; /* pos in 0..76 of its chunk */
} ipt_prompt_pos;
/* Where a word or phrase stands: every occurrence of its id sequence that does not begin within a
 * word ("cat" not in "scat"), left to right, also where they overlap, across chunk borders but not
 * across a BREAK.  Names of embeddings in it are matched as in the prompt.  `prompt` must come
 * from `tok`.
 *   positions  [*n_found][*n_each]: the k-th occurrence is row k; caller, ipt_free.  *n_found may
 *              be 0.
 * Errors: IPT_ERR_ARG (phrase too long or without tokens), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_prompt_find(ipt_ctx *ctx, const ipt_tokenizer *tok,
                                       const ipt_prompt *prompt, const char *phrase, size_t n,
                                       ipt_prompt_pos **positions, size_t *n_found, size_t *n_each);

/* Text and weight of one run of a prompt, before tokenising. */
typedef struct ipt_prompt_part {
    const char *text; /* NUL-terminated, len bytes */
    size_t len;
    double weight; /* "BREAK" with weight -1 is the break mark */
} ipt_prompt_part;
/* Emphasis only: what parse_prompt_attention returns.  `text` is invalid-UTF-8 safe.
 *   parts [*n_parts] live in `arena` (>= 1).  Errors: IPT_ERR_ARG (too long), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_prompt_parse(ipt_arena *arena, const char *text, size_t n,
                                        ipt_prompt_part **parts, size_t *n_parts);

/* Emphasis on one encoded chunk, in place: z[t] *= weights[t], then all of z times
 * mean(before) / mean(after), which keeps the mean of the chunk; the second step is left out when
 * the mean after is 0 or the ratio is not finite.
 *   z [T,D], weights [T].  Host only, cannot fail.  Sums in double.
 * The encoder applies it to the hidden states it hands to the UNet (after clip skip and final
 * norm), never to the pooled output.
 * Source: A1111 sd_emphasis.EmphasisOriginal. */
void ipt_prompt_apply_weights(float *z, const float *weights, size_t T, size_t D);

/* --- prompts that change over the steps ------------------------------------------------------- */
/* [from:to:when], [to:when], [from::when] (when: a step, or with a point a part of all steps) and
 * [a|b|c], nested as one likes, in A1111's way; what is not of these forms stays as it is. */
typedef struct ipt_prompt_edits ipt_prompt_edits;
/*   text [n] bytes without tags;  steps >= 1: as many as the sampler's evaluations are counted in
 * Ownership: caller, ipt_prompt_edits_destroy.  Errors: IPT_ERR_ARG (too long), IPT_ERR_NOMEM.
 * Source: AUTOMATIC1111/stable-diffusion-webui 1.10
 * prompt_parser.get_learned_conditioning_prompt_schedules. */
IPT_CHECKED ipt_status ipt_prompt_edits_create(ipt_ctx *ctx, const char *text, size_t n,
                                               int32_t steps, ipt_prompt_edits **out);
void ipt_prompt_edits_destroy(ipt_prompt_edits **p);
/* The last step, up to `steps`, of the text that stands at step `step`, 0 being the first: the
 * first change at or after it.  As in A1111 a change "after step 3" is seen from step 4 on, so the
 * first text of [a|b] stands twice. */
int32_t ipt_prompt_edits_end(const ipt_prompt_edits *p, int32_t step);
/* That text, out of `end` as the function above gives it, NUL-terminated; its length.
 *   out [n + 1]: never longer than what it is made of */
size_t ipt_prompt_edits_text(const ipt_prompt_edits *p, int32_t end, char *out);

/* One of the prompts that AND joins, "a cat :1.2 AND a dog": without blanks at its end and without
 * its weight.  A prompt without AND is one, with a weight too. */
typedef struct ipt_prompt_conjunct {
    const char *text; /* [len] inside the prompt */
    size_t len;
    double weight;
} ipt_prompt_conjunct;
/* Errors: IPT_ERR_ARG (more than max), IPT_ERR_NOMEM.
 * Source: the same file, get_multicond_prompt_list. */
IPT_CHECKED ipt_status ipt_prompt_split(ipt_ctx *ctx, const char *text, size_t n,
                                        ipt_prompt_conjunct *out, size_t max, size_t *n_out);
#endif
