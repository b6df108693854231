/* libFuzzer target: tokenizer files, texts and prompts from memory.
 *   fuzz_tokenizer -max_total_time=60 tests/data/tok_fuzz
 * The first byte chooses what the rest is: 't' a text, 'p' a prompt, 'm' merges alone, anything
 * else the files of a folder, separated by 0xFF, in the order of ipt_tokenizer_files. */
#include "text_encoder/tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)

static const char sample[] = "A (cafe\xcc\x81:1.2), [dog] it's 12!! <|endoftext|> sks";

static void check_text(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text, size_t n)
{
    ipt_token *t = NULL;
    size_t n_t = 0;
    if (ipt_tokenize(ctx, tok, text, n, &t, &n_t) != IPT_OK) {
        REQUIRE(n > IPT_TOKEN_MAX_TEXT);
        return;
    }
    for (size_t i = 0; i < n_t; i++) {
        REQUIRE(t[i].id >= 0 && t[i].id < ipt_tokenizer_vocab_size(tok));
        REQUIRE(t[i].begin <= t[i].end && t[i].end <= n);
        REQUIRE(ipt_tokenizer_piece(tok, t[i].id)[0] != '\0');
    }
    ipt_free(t);
}

static void check_layout(const ipt_tokenizer *tok, const ipt_prompt *p)
{
    REQUIRE(p->n_chunk >= 1);
    for (int32_t c = 0; c < p->n_chunk; c++) {
        const int32_t *ids = p->ids + (size_t)c * IPT_TOKEN_WINDOW;
        int32_t n = p->n_content[c];
        REQUIRE(n >= 0 && n <= IPT_TOKEN_CONTENT);
        REQUIRE(ids[0] == ipt_tokenizer_bos(tok) && ids[n + 1] == ipt_tokenizer_eos(tok));
        for (int32_t i = n + 2; i < IPT_TOKEN_WINDOW; i++)
            REQUIRE(ids[i] == ipt_tokenizer_pad(tok));
    }
    for (size_t i = 0; i < p->n_span; i++) {
        const ipt_prompt_span *s = &p->spans[i];
        REQUIRE(s->chunk >= 0 && s->chunk < p->n_chunk && s->pos >= 1);
        REQUIRE(s->pos + s->n <= p->n_content[s->chunk] + 1);
    }
}

static void check_prompt(ipt_ctx *ctx, const ipt_tokenizer *tok, const char *text, size_t n)
{
    static const ipt_prompt_embedding e[] = {{"ab", 3}, {"a", 70}, {"(", 1}};
    for (int32_t round = 0; round < 3; round++) {
        ipt_prompt_attr attr = {.embeddings = e,
                                .n_embeddings = round,
                                .max_chunks = round == 1 ? 2 : 0,
                                .comma_backtrack = round == 2 ? 70 : 0};
        ipt_prompt *p = NULL;
        ipt_prompt_pos *pos = NULL;
        size_t n_pos = 0, n_each = 0;
        if (ipt_prompt_create(ctx, tok, text, n, &attr, &p) != IPT_OK)
            continue;
        check_layout(tok, p);
        if (ipt_prompt_find(ctx, tok, p, text, n < 3 ? n : 3, &pos, &n_pos, &n_each) == IPT_OK)
            for (size_t i = 0; i < n_pos * n_each; i++)
                REQUIRE(pos[i].chunk < p->n_chunk && pos[i].pos >= 1 &&
                        pos[i].pos <= p->n_content[pos[i].chunk]);
        if (ipt_prompt_extend(ctx, tok, p, p->n_chunk + 2) == IPT_OK)
            check_layout(tok, p);
        ipt_free(pos);
        ipt_prompt_destroy(&p);
    }
}

static ipt_status load_files(ipt_ctx *ctx, const char *data, size_t size, ipt_tokenizer **tok)
{
    ipt_tokenizer_files files = {.vocab = {NULL, 0}};
    ipt_tokenizer_text *const texts[] = {&files.vocab,  &files.merges,         &files.tokenizer,
                                         &files.config, &files.special_tokens, &files.added_tokens};
    const char *end = data + size;
    for (size_t i = 0; i < IPT_COUNT(texts); i++) {
        const char *stop = memchr(data, 0xff, (size_t)(end - data));
        if (!stop)
            stop = end;
        if (stop > data)
            *texts[i] = (ipt_tokenizer_text){data, (size_t)(stop - data)};
        data = stop < end ? stop + 1 : end;
    }
    return ipt_tokenizer_create_from_files(ctx, "fuzz", &files, tok);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char merges[] = "a b\nc a\nca t</w>\nd o\ndo g</w>\na b</w>\n! !</w>\n, ,</w>\n";
    ipt_ctx *ctx = NULL;
    ipt_tokenizer *tok = NULL;
    if (size == 0 || ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 0;
    /* an exact copy, so that reading one byte too far is seen */
    size_t n = size - 1;
    char *text = malloc(n ? n : 1);
    REQUIRE(text);
    memcpy(text, data + 1, n);
    bool is_text = data[0] == 't' || data[0] == 'p';
    ipt_status s = is_text ? ipt_tokenizer_create_from_merges(ctx, merges, sizeof merges - 1,
                                                              n % 2 ? "!" : NULL, &tok)
                   : data[0] == 'm' ? ipt_tokenizer_create_from_merges(ctx, text, n, NULL, &tok)
                                    : load_files(ctx, text, n, &tok);
    REQUIRE(!is_text || s == IPT_OK);
    if (s == IPT_OK) {
        check_text(ctx, tok, is_text ? text : sample, is_text ? n : sizeof sample - 1);
        if (data[0] != 't')
            check_prompt(ctx, tok, is_text ? text : sample, is_text ? n : sizeof sample - 1);
    } else {
        REQUIRE(!tok && ipt_last_error(ctx)[0] != '\0');
    }
    free(text);
    ipt_tokenizer_destroy(&tok);
    ipt_ctx_destroy(&ctx);
    return 0;
}
