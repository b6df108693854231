/* CLIP tokenizer and prompt language against transformers' CLIPTokenizer (fixtures of
 * tools/fixtures_tokenizer.py), published vectors, hand cases and hostile input. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "text_encoder/tokenizer.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef IPT_TEST_DATA
#define IPT_TEST_DATA "tests/data"
#define IPT_SOURCE_DIR "."
#endif

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_tokenizer *clip, *bang, *tiny;
} fixture;

#define OK(ctx, expr)                                                                              \
    do {                                                                                           \
        ipt_status ok_ = (expr);                                                                   \
        if (ok_ != IPT_OK)                                                                         \
            fail_msg("%s: %s: %s", #expr, ipt_status_name(ok_), ipt_last_error(ctx));              \
    } while (0)

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    if (!f || ipt_ctx_create(NULL, NULL, &f->ctx) != IPT_OK)
        return -1;
    const char *merges = IPT_SOURCE_DIR "/models/clip/merges.txt";
    *state = f;
    return ipt_tokenizer_load_merges(f->ctx, merges, NULL, &f->clip) != IPT_OK ||
           ipt_tokenizer_load_merges(f->ctx, merges, "!", &f->bang) != IPT_OK ||
           ipt_tokenizer_load_folder(f->ctx, IPT_TEST_DATA "/tok_tiny", &f->tiny) != IPT_OK;
}

static int teardown(void **state)
{
    fixture *f = *state;
    ipt_tokenizer_destroy(&f->clip);
    ipt_tokenizer_destroy(&f->bang);
    ipt_tokenizer_destroy(&f->tiny);
    ipt_ctx_destroy(&f->ctx);
    free(f);
    return 0;
}

static json_t *load_json(const char *path)
{
    json_error_t err;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &err);
    if (!root)
        fail_msg("%s: %s", path, err.text);
    return root;
}

/* --- ids ------------------------------------------------------------------------------------ */
static void check_ids(fixture *f, const ipt_tokenizer *tok, const char *name, const char *text,
                      size_t n, const json_t *want)
{
    ipt_token *t = NULL;
    size_t n_t = 0, last_begin = 0;
    OK(f->ctx, ipt_tokenize(f->ctx, tok, text, n, &t, &n_t));
    if (n_t != json_array_size(want))
        fail_msg("%s: \"%s\": %zu ids, %zu expected", name, text, n_t, json_array_size(want));
    for (size_t i = 0; i < n_t; i++) {
        json_int_t id = json_integer_value(json_array_get(want, i));
        if (t[i].id != id)
            fail_msg("%s: \"%s\": id %zu is %d, expected %d", name, text, i, (int)t[i].id, (int)id);
        assert_true(t[i].begin < t[i].end && t[i].end <= n);
        assert_true(t[i].begin >= last_begin);
        last_begin = t[i].begin;
    }
    ipt_free(t);
}

static void check_cases(fixture *f, const ipt_tokenizer *tok, const char *name, const json_t *cases)
{
    assert_true(json_array_size(cases) > 0);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i), *text = json_array_get(c, 0);
        check_ids(f, tok, name, json_string_value(text), json_string_length(text),
                  json_array_get(c, 1));
    }
}

static void test_reference(void **state)
{
    fixture *f = *state;
    json_t *root = load_json(IPT_TEST_DATA "/tok_clip.json");
    check_cases(f, f->clip, "clip", json_object_get(root, "clip"));
    check_cases(f, f->bang, "clip, pad !", json_object_get(root, "clip_pad_bang"));
    json_decref(root);
    const char *more = getenv("IPT_TOKENIZER_CASES"); /* tools/fixtures_tokenizer.py --random */
    if (more) {
        root = load_json(more);
        check_cases(f, f->clip, "clip", json_object_get(root, "clip"));
        json_decref(root);
    }
}

/* The texts of transformers.js, with start and end. */
static void test_published(void **state)
{
    fixture *f = *state;
    json_t *root = load_json(IPT_TEST_DATA "/tok_published.json");
    const char *groups[] = {"clip", "clip_pad_bang"};
    ipt_tokenizer *toks[] = {f->clip, f->bang};
    for (size_t g = 0; g < 2; g++) {
        json_t *cases = json_object_get(root, groups[g]), *c = NULL;
        size_t i = 0;
        assert_int_equal(json_array_size(cases), g == 0 ? 25 : 1);
        json_array_foreach(cases, i, c)
        {
            json_t *ids = json_array_get(c, 1);
            assert_int_equal(json_integer_value(json_array_get(ids, 0)), 49406);
            assert_int_equal(json_integer_value(json_array_get(ids, json_array_size(ids) - 1)),
                             49407);
            json_array_remove(ids, 0);
            json_array_remove(ids, json_array_size(ids) - 1);
        }
        check_cases(f, toks[g], groups[g], cases);
    }
    json_decref(root);
}

/* The model fixtures' own rows, with start and end. */
static void test_goldens(void **state)
{
    fixture *f = *state;
    static const char *const files[] = {IPT_TEST_DATA "/golden_tokens_clip.json",
                                        IPT_TEST_DATA "/golden_tokens_tiny.json"};
    ipt_tokenizer *folder = NULL;
    OK(f->ctx, ipt_tokenizer_load_folder(f->ctx, IPT_TEST_DATA "/models/sd1/tokenizer", &folder));
    for (size_t g = 0; g < IPT_COUNT(files); g++) {
        json_t *root = load_json(files[g]), *row = NULL;
        size_t i = 0;
        json_array_foreach(json_object_get(root, "rows"), i, row)
        {
            json_t *ids = json_object_get(row, "ids"), *text = json_object_get(row, "text");
            json_array_remove(ids, 0);
            json_array_remove(ids, json_array_size(ids) - 1);
            check_ids(f, g == 0 ? f->clip : folder, files[g], json_string_value(text),
                      json_string_length(text), ids);
        }
        assert_true(i >= 20);
        json_decref(root);
    }
    ipt_tokenizer_destroy(&folder);
}

static void test_vocabulary(void **state)
{
    fixture *f = *state;
    assert_int_equal(ipt_tokenizer_vocab_size(f->clip), 49408);
    assert_int_equal(ipt_tokenizer_bos(f->clip), 49406);
    assert_int_equal(ipt_tokenizer_eos(f->clip), 49407);
    assert_int_equal(ipt_tokenizer_pad(f->clip), 49407);
    assert_int_equal(ipt_tokenizer_pad(f->bang), 0);
    assert_int_equal(ipt_tokenizer_max_length(f->clip), 77);
    assert_string_equal(ipt_tokenizer_piece(f->clip, 0), "!");
    assert_string_equal(ipt_tokenizer_piece(f->clip, 267), ",</w>");
    assert_string_equal(ipt_tokenizer_piece(f->clip, 2368), "cat</w>");
    assert_string_equal(ipt_tokenizer_piece(f->clip, 188), "\xc4\x80"); /* byte 0 */
    assert_string_equal(ipt_tokenizer_piece(f->clip, 49406), "<|startoftext|>");
    assert_string_equal(ipt_tokenizer_piece(f->clip, 49408), "");
    assert_string_equal(ipt_tokenizer_piece(f->clip, -1), "");
    assert_int_equal(ipt_tokenizer_id(f->clip, "cat</w>"), 2368);
    assert_int_equal(ipt_tokenizer_id(f->clip, "no such piece"), -1);
    assert_int_equal(ipt_tokenizer_bos(f->tiny), 0);
    assert_int_equal(ipt_tokenizer_eos(f->tiny), 1);
    assert_int_equal(ipt_tokenizer_unk(f->tiny), 1);
    assert_int_equal(ipt_tokenizer_pad(f->tiny), 1);
    assert_int_equal(ipt_tokenizer_vocab_size(f->tiny), 1000);
    ipt_tokenizer *tok = NULL;
    const char *merges = IPT_SOURCE_DIR "/models/clip/merges.txt";
    assert_int_equal(ipt_tokenizer_load_merges(f->ctx, merges, "no such piece", &tok),
                     IPT_ERR_FORMAT);
    assert_int_equal(ipt_tokenizer_load_merges(f->ctx, "/no/such", NULL, &tok), IPT_ERR_IO);
    assert_int_equal(ipt_tokenizer_load_folder(f->ctx, "/no/such", &tok), IPT_ERR_IO);
    assert_int_equal(ipt_tokenizer_load_folder(f->ctx, IPT_TEST_DATA, &tok), IPT_ERR_MISSING);
    assert_null(tok);
}

static ipt_tokenizer_text text_of(const json_t *files, const char *key)
{
    const json_t *v = json_object_get(files, key);
    return (ipt_tokenizer_text){json_string_value(v), json_string_length(v)};
}

/* Folders: special tokens, added tokens, tokenizer.json in both forms. */
static void test_folder_variants(void **state)
{
    fixture *f = *state;
    json_t *root = load_json(IPT_TEST_DATA "/tok_variants.json"), *v = NULL;
    char *vocab = NULL, *merges = NULL;
    size_t n_vocab = 0, n_merges = 0, i = 0;
    OK(f->ctx,
       ipt_file_read(f->ctx, IPT_TEST_DATA "/tok_tiny/vocab.json", 1 << 20, &vocab, &n_vocab));
    OK(f->ctx,
       ipt_file_read(f->ctx, IPT_TEST_DATA "/tok_tiny/merges.txt", 1 << 20, &merges, &n_merges));
    json_array_foreach(json_object_get(root, "variants"), i, v)
    {
        const json_t *files = json_object_get(v, "files"), *info = json_object_get(v, "info");
        const char *name = json_string_value(json_object_get(v, "name"));
        ipt_tokenizer_files in = {.config = text_of(files, "tokenizer_config"),
                                  .special_tokens = text_of(files, "special_tokens_map"),
                                  .added_tokens = text_of(files, "added_tokens"),
                                  .tokenizer = text_of(files, "tokenizer")};
        if (!in.tokenizer.data) {
            in.vocab = (ipt_tokenizer_text){vocab, n_vocab};
            in.merges = (ipt_tokenizer_text){merges, n_merges};
        }
        ipt_tokenizer *tok = NULL;
        OK(f->ctx, ipt_tokenizer_create_from_files(f->ctx, name, &in, &tok));
        int32_t got[] = {ipt_tokenizer_bos(tok), ipt_tokenizer_eos(tok), ipt_tokenizer_pad(tok),
                         ipt_tokenizer_unk(tok), ipt_tokenizer_vocab_size(tok)};
        for (size_t k = 0; k < IPT_COUNT(got); k++)
            if (got[k] != json_integer_value(json_array_get(info, k)))
                fail_msg("%s: info %zu is %d", name, k, (int)got[k]);
        assert_int_equal(ipt_tokenizer_max_length(tok), strcmp(name, "added") == 0 ? 64 : 77);
        check_cases(f, tok, name, json_object_get(v, "cases"));
        ipt_tokenizer_destroy(&tok);
    }
    assert_true(i >= 8);
    json_decref(root);
    ipt_free(vocab);
    ipt_free(merges);
}

/* Ill-formed UTF-8 against the U+FFFD it stands for (Unicode 15, table 3-8 and its text). */
static void test_invalid_utf8(void **state)
{
    static const struct {
        const char *bytes;
        size_t n, n_bad;
    } cases[] = {
        {"\x80", 1, 1},
        {"\xc3", 1, 1},
        {"\xc0\xaf", 2, 2},
        {"\xe0\x80\xaf", 3, 3},
        {"\xed\xa0\x80", 3, 3},
        {"\xf0\x80\x80\x80", 4, 4},
        {"\xf4\x90\x80\x80", 4, 4},
        {"\xe2\x82", 2, 1},
        {"\xf0\x9f\x98", 3, 1},
        {"\xf1\x80\x80\xc3", 4, 2},
        {"\xff\xfe", 2, 2},
        {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf", 8, 4},
    };
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        char good[64];
        size_t n_good = 0;
        for (; n_good < 3 * cases[i].n_bad; n_good += 3)
            memcpy(good + n_good, "\xef\xbf\xbd", 3);
        ipt_token *a = NULL, *b = NULL;
        size_t n_a = 0, n_b = 0;
        OK(f->ctx, ipt_tokenize(f->ctx, f->clip, cases[i].bytes, cases[i].n, &a, &n_a));
        OK(f->ctx, ipt_tokenize(f->ctx, f->clip, good, n_good, &b, &n_b));
        assert_int_equal(n_a, n_b);
        for (size_t k = 0; k < n_a; k++)
            assert_int_equal(a[k].id, b[k].id);
        assert_int_equal(a[n_a - 1].end, cases[i].n);
        ipt_free(a);
        ipt_free(b);
    }
}

static void test_spans(void **state)
{
    static const struct {
        const char *text;
        size_t n;
        uint32_t spans[8][2];
    } cases[] = {
        {"Hello,  World", 3, {{0, 5}, {5, 6}, {8, 13}}},
        {"\t12 it's", 4, {{1, 2}, {2, 3}, {4, 6}, {6, 8}}},
        {"cafe\xcc\x81!", 2, {{0, 6}, {6, 7}}}, /* e + acute compose to one letter */
        {"a<|endoftext|> b", 3, {{0, 1}, {1, 14}, {15, 16}}},
        {"a\xff"
         "b",
         3,
         {{0, 1}, {1, 2}, {2, 3}}},
    };
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        ipt_token *t = NULL;
        size_t n = 0;
        OK(f->ctx, ipt_tokenize(f->ctx, f->clip, cases[i].text, strlen(cases[i].text), &t, &n));
        assert_int_equal(n, cases[i].n);
        for (size_t k = 0; k < n; k++) {
            assert_int_equal(t[k].begin, cases[i].spans[k][0]);
            assert_int_equal(t[k].end, cases[i].spans[k][1]);
        }
        ipt_free(t);
    }
}

/* Long words and long runs of marks must not take quadratic time, longer texts are refused. */
static void test_long_texts(void **state)
{
    fixture *f = *state;
    size_t n = IPT_TOKEN_MAX_TEXT;
    char *text = calloc(n + 2, 1);
    static const char *const units[] = {
        "a",      "ab", "\xcc\xa3\xcc\x81", "(",  "!",  "\xf0\x9f\x98\x82", "<|endoftext|>", "(a",
        "BREAK ", ":",  "<lora:",           ":1", "\\", "\xe1\x84\x80"};
    assert_non_null(text);
    for (size_t u = 0; u < IPT_COUNT(units); u++) {
        size_t len = strlen(units[u]), n_t = 0;
        ipt_token *t = NULL;
        ipt_prompt *p = NULL;
        for (size_t i = 0; i < n; i++)
            text[i] = units[u][i % len];
        double start = ipt_now_ms();
        OK(f->ctx, ipt_tokenize(f->ctx, f->clip, text, n, &t, &n_t));
        ipt_status s = ipt_prompt_create(f->ctx, f->clip, text, n, NULL, &p);
        if (s != IPT_OK && !(s == IPT_ERR_ARG && (strstr(ipt_last_error(f->ctx), "64 chunks") ||
                                                  strstr(ipt_last_error(f->ctx), "brackets"))))
            fail_msg("\"%s\": %s", units[u], ipt_last_error(f->ctx));
        if (ipt_now_ms() - start > 20000) /* 30 ms here; sanitizers and busy machines take more */
            fail_msg("%zu bytes of \"%s\" took %.0f ms", n, units[u], ipt_now_ms() - start);
        ipt_free(t);
        ipt_prompt_destroy(&p);
    }
    ipt_token *t = NULL;
    size_t n_t = 0;
    ipt_prompt *p = NULL;
    text[n] = 'a';
    assert_int_equal(ipt_tokenize(f->ctx, f->clip, text, n + 1, &t, &n_t), IPT_ERR_ARG);
    assert_int_equal(ipt_prompt_create(f->ctx, f->clip, text, n + 1, NULL, &p), IPT_ERR_ARG);
    assert_null(p);
    free(text);
    OK(f->ctx, ipt_tokenize(f->ctx, f->clip, "", 0, &t, &n_t));
    assert_int_equal(n_t, 0);
    ipt_free(t);
}

/* 64 chunks of 75 tokens are taken, one token more is not; inversions and BREAK count as chunks. */
static void test_chunk_limit(void **state)
{
    static const ipt_prompt_embedding word = {"w", 75};
    static const struct {
        const char *unit;
        int n, chunks; /* chunks 0: refused */
    } rows[] = {{"a ", 64 * 75, 64}, {"a ", 64 * 75 + 1, 0}, {"w ", 64, 64},
                {"w ", 65, 0},       {"BREAK ", 63, 64},     {"BREAK ", 65, 0}};
    fixture *f = *state;
    const ipt_prompt_attr attr = {.embeddings = &word, .n_embeddings = 1};
    char *text = calloc(1, 1 << 16);
    assert_non_null(text);
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_prompt *p = NULL;
        size_t len = strlen(rows[i].unit);
        for (int k = 0; k < rows[i].n; k++)
            memcpy(text + (size_t)k * len, rows[i].unit, len);
        size_t n = (size_t)rows[i].n * len;
        if (rows[i].unit[0] == 'B')
            text[n++] = 'x';
        ipt_status s = ipt_prompt_create(f->ctx, f->clip, text, n, &attr, &p);
        if (rows[i].chunks ? s != IPT_OK || p->n_chunk != rows[i].chunks
                           : s != IPT_ERR_ARG || !strstr(ipt_last_error(f->ctx), "64 chunks of 75"))
            fail_msg("row %zu: %s, %d chunks: %s", i, ipt_status_name(s), p ? p->n_chunk : 0,
                     ipt_last_error(f->ctx));
        ipt_prompt_destroy(&p);
    }
    memset(text, '(', 1000);
    strcpy(text + 1000, "a");
    ipt_prompt *p = NULL;
    assert_int_equal(ipt_prompt_create(f->ctx, f->clip, text, 1001, NULL, &p), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "brackets"));
    free(text);
}

/* --- bad vocabulary files ------------------------------------------------------------------- */
#define TEXT(s)                                                                                    \
    {                                                                                              \
        s, sizeof(s) - 1                                                                           \
    }
static void test_bad_files(void **state)
{
    static const struct {
        const char *name, *in_message;
        ipt_tokenizer_files files;
    } cases[] = {
        {"no json", "not valid JSON", {.vocab = TEXT("hello"), .merges = TEXT("")}},
        {"array", "object", {.vocab = TEXT("[1]"), .merges = TEXT("")}},
        {"empty", "not an object of ids", {.vocab = TEXT("{}"), .merges = TEXT("")}},
        {"text id",
         "of piece \"a\": expected a number",
         {.vocab = TEXT("{\"a\":\"b\"}"), .merges = TEXT("")}},
        {"negative id",
         "id -1 of piece \"a\" not in 0..",
         {.vocab = TEXT("{\"a\":-1}"), .merges = TEXT("")}},
        {"broken id", "id 1.5 of", {.vocab = TEXT("{\"a\":1.5}"), .merges = TEXT("")}},
        {"large id", "id 1000000000 of", {.vocab = TEXT("{\"a\":1e9}"), .merges = TEXT("")}},
        {"id twice", "given to", {.vocab = TEXT("{\"a\":1,\"b\":1}"), .merges = TEXT("")}},
        {"unknown merge",
         "not in the vocabulary",
         {.vocab = TEXT("{\"a\":0}"), .merges = TEXT("a b")}},
        {"unknown result", "the result", {.vocab = TEXT("{\"a\":0}"), .merges = TEXT("a a")}},
        {"one word", "not \"left right\"", {.vocab = TEXT("{\"a\":0}"), .merges = TEXT("a\n")}},
        {"three words",
         "not \"left right\"",
         {.vocab = TEXT("{\"a\":0}"), .merges = TEXT("a a a\n")}},
        {"NUL in a merge",
         "NUL",
         {.vocab = TEXT("{\"a\":0,\"b\":1,\"ab\":2}"),
          .merges = TEXT("a\0aaaaaaaaaaaaaaaaaaa b\n")}},
        {"no model", "not an object of ids", {.tokenizer = TEXT("{}")}},
        {"no merges", "no model.merges", {.tokenizer = TEXT("{\"model\":{\"vocab\":{\"a\":0}}}")}},
        {"odd merge",
         "merge 1",
         {.tokenizer = TEXT("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}}")}},
        {"number merge",
         "merge 1",
         {.tokenizer = TEXT("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[7]}}")}},
        {"nameless",
         "no content",
         {.tokenizer = TEXT("{\"added_tokens\":[{\"id\":1}],\"model\":{\"vocab\":{\"a\":0},"
                            "\"merges\":[]}}")}},
    };
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        ipt_tokenizer *tok = NULL;
        ipt_status s = ipt_tokenizer_create_from_files(f->ctx, "f", &cases[i].files, &tok);
        if (s != IPT_ERR_FORMAT || !strstr(ipt_last_error(f->ctx), cases[i].in_message))
            fail_msg("%s: %s: %s", cases[i].name, ipt_status_name(s), ipt_last_error(f->ctx));
        assert_null(tok);
    }
    ipt_tokenizer *tok = NULL;
    static const char *const bad[] = {"",        "#version: 0.2\n", "#version: 0.2\na\n",
                                      "a b c\n", "\xc4 x y\n",      " a\n",
                                      "a \n",    "zz z\n"};
    for (size_t i = 0; i < IPT_COUNT(bad); i++)
        assert_int_equal(
            ipt_tokenizer_create_from_merges(f->ctx, bad[i], strlen(bad[i]), NULL, &tok),
            IPT_ERR_FORMAT);
    static const char nul[] = "c a\nca\0tttttttttttttttt t</w>\n";
    assert_int_equal(ipt_tokenizer_create_from_merges(f->ctx, nul, sizeof nul - 1, NULL, &tok),
                     IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(f->ctx), "NUL"));
    static const char dos[] = "#version: 0.2\r\nc a\r\n\r\nca t</w>\r\n";
    OK(f->ctx, ipt_tokenizer_create_from_merges(f->ctx, dos, sizeof dos - 1, NULL, &tok));
    assert_int_equal(ipt_tokenizer_vocab_size(tok), 516);
    assert_int_equal(ipt_tokenizer_id(tok, "cat</w>"), 513);
    ipt_tokenizer_destroy(&tok);
}

/* --- prompts -------------------------------------------------------------------------------- */
static void check_parts(fixture *f, const char *text, size_t n, const json_t *want)
{
    ipt_arena arena;
    ipt_prompt_part *parts = NULL;
    size_t n_parts = 0;
    ipt_arena_init(&arena, f->ctx);
    OK(f->ctx, ipt_prompt_parse(&arena, text, n, &parts, &n_parts));
    if (n_parts != json_array_size(want))
        fail_msg("\"%s\": %zu parts, %zu expected", text, n_parts, json_array_size(want));
    for (size_t i = 0; i < n_parts; i++) {
        const json_t *w = json_array_get(want, i);
        assert_string_equal(parts[i].text, json_string_value(json_array_get(w, 0)));
        assert_int_equal(parts[i].len, json_string_length(json_array_get(w, 0)));
        /* the same multiplications in the same order: equal to the last bit */
        if (parts[i].weight != json_number_value(json_array_get(w, 1)))
            fail_msg("\"%s\": part %zu has weight %.17g", text, i, parts[i].weight);
    }
    ipt_arena_finish(&arena);
}

static void check_chunks(const ipt_tokenizer *tok, const ipt_prompt *p, const json_t *c)
{
    const json_t *ids = json_object_get(c, "ids"), *weights = json_object_get(c, "weights");
    const char *text = json_string_value(json_object_get(c, "text"));
    if ((size_t)p->n_chunk != json_array_size(ids))
        fail_msg("\"%s\": %d chunks, %zu expected", text, (int)p->n_chunk, json_array_size(ids));
    for (size_t k = 0; k < (size_t)p->n_chunk; k++) {
        const json_t *row = json_array_get(ids, k), *row_w = json_array_get(weights, k);
        size_t n = json_array_size(row);
        const int32_t *got = p->ids + k * IPT_TOKEN_WINDOW;
        const float *got_w = p->weights + k * IPT_TOKEN_WINDOW;
        assert_int_equal(p->n_content[k], n);
        assert_int_equal(got[0], ipt_tokenizer_bos(tok));
        assert_int_equal(got[n + 1], ipt_tokenizer_eos(tok));
        for (size_t i = 0; i < IPT_TOKEN_WINDOW; i++) {
            bool is_content = i >= 1 && i <= n;
            if (is_content && got[i] != json_integer_value(json_array_get(row, i - 1)))
                fail_msg("\"%s\": chunk %zu, place %zu: id %d", text, k, i, (int)got[i]);
            float w = is_content ? (float)json_number_value(json_array_get(row_w, i - 1)) : 1.0F;
            if (got_w[i] < w || got_w[i] > w)
                fail_msg("\"%s\": chunk %zu, place %zu: weight %g", text, k, i, (double)got_w[i]);
            if (i > n + 1)
                assert_int_equal(got[i], ipt_tokenizer_pad(tok));
        }
    }
}

static void test_prompts(void **state)
{
    fixture *f = *state;
    json_t *root = load_json(IPT_TEST_DATA "/tok_prompts.json"), *c = NULL;
    size_t i = 0, n_with_spans = 0;
    json_array_foreach(json_object_get(root, "cases"), i, c)
    {
        const json_t *text = json_object_get(c, "text"), *list = json_object_get(c, "embeddings");
        const json_t *spans = json_object_get(c, "spans");
        ipt_prompt_embedding e[8];
        ipt_prompt_attr attr = {.embeddings = e, .n_embeddings = (int32_t)json_array_size(list)};
        ipt_prompt *p = NULL;
        for (size_t k = 0; k < json_array_size(list); k++) {
            const json_t *v = json_array_get(list, k);
            e[k] = (ipt_prompt_embedding){json_string_value(json_array_get(v, 0)),
                                          (int32_t)json_integer_value(json_array_get(v, 1))};
        }
        check_parts(f, json_string_value(text), json_string_length(text),
                    json_object_get(c, "parts"));
        OK(f->ctx, ipt_prompt_create(f->ctx, f->clip, json_string_value(text),
                                     json_string_length(text), &attr, &p));
        check_chunks(f->clip, p, c);
        assert_int_equal(p->n_span, json_array_size(spans));
        for (size_t k = 0; k < p->n_span; k++) {
            const json_t *s = json_array_get(spans, k);
            assert_int_equal(p->spans[k].chunk, json_integer_value(json_array_get(s, 0)));
            assert_int_equal(p->spans[k].pos, json_integer_value(json_array_get(s, 1)));
            assert_int_equal(p->spans[k].index, json_integer_value(json_array_get(s, 2)));
            assert_int_equal(p->spans[k].n, e[p->spans[k].index].n_vectors);
        }
        n_with_spans += p->n_span > 0;
        ipt_prompt_destroy(&p);
    }
    assert_true(i > 100 && n_with_spans > 10);
    json_decref(root);
}

static ipt_prompt *make(fixture *f, const char *text, const ipt_prompt_attr *attr)
{
    ipt_prompt *p = NULL;
    OK(f->ctx, ipt_prompt_create(f->ctx, f->clip, text, strlen(text), attr, &p));
    return p;
}

/* What diffusers feeds the encoder: [bos] ids [eos] pad..., cut at 77, brackets as text. */
static void test_plain(void **state)
{
    static const int32_t want[] = {49406, 320, 263, 2368, 281, 272, 269, 273, 264, 49407};
    fixture *f = *state;
    ipt_prompt_attr attr = {.plain = true, .max_chunks = 1};
    ipt_prompt *p = make(f, "a (cat:1.2)", &attr);
    assert_int_equal(p->n_chunk, 1);
    assert_memory_equal(p->ids, want, sizeof want);
    assert_int_equal(p->ids[76], 49407);
    assert_false(p->was_cut);
    ipt_prompt_destroy(&p);
    p = make(f, "<lora:x:1> BREAK", &attr);
    assert_int_equal(p->n_lora, 0);
    assert_string_equal(p->text, "<lora:x:1> BREAK");
    ipt_prompt_destroy(&p);
    char text[400];
    for (size_t i = 0; i < 399; i++)
        text[i] = i % 4 == 3 ? ' ' : "cat"[i % 4];
    text[399] = '\0'; /* 100 words */
    p = make(f, text, &attr);
    assert_int_equal(p->n_chunk, 1);
    assert_int_equal(p->n_content[0], 75);
    assert_int_equal(p->ids[75], 2368);
    assert_int_equal(p->ids[76], 49407);
    assert_true(p->was_cut);
    ipt_prompt_destroy(&p);
    text[75 * 4 - 1] = '\0'; /* exactly 75 */
    p = make(f, text, &attr);
    assert_false(p->was_cut);
    ipt_prompt_destroy(&p);
    attr.plain = false;
    p = make(f, "cat BREAK dog", &attr);
    assert_int_equal(p->n_chunk, 1);
    assert_true(p->was_cut);
    ipt_prompt_destroy(&p);
    /* OpenCLIP's padding */
    OK(f->ctx, ipt_prompt_create(f->ctx, f->bang, "cat!", 4, NULL, &p));
    assert_int_equal(p->ids[1], 2368);
    assert_int_equal(p->ids[2], 0);
    assert_int_equal(p->ids[3], 49407);
    assert_int_equal(p->ids[4], 0);
    ipt_prompt_destroy(&p);
}

static void test_tags(void **state)
{
    static const struct {
        const char *tag, *name;
        double weight, te;
    } cases[] = {
        {"<lora:a>", "a", 1, 1},
        {"<lora:a b.c:0.8>", "a b.c", 0.8, 0.8},
        {"<lora:a:0.8:0.5>", "a", 0.5, 0.8}, /* the text encoder first, as in A1111 */
        {"<lora:a:-1:.5>", "a", 0.5, -1},
        {"<lora:a:0.8:0.5:te=0.25>", "a", 0.5, 0.25},
        {"<lora:a:0.8:unet=0.25>", "a", 0.25, 0.8},
        {"<lora:a:0.8:te=0.5>", "a", 0.5, 0.5}, /* A1111 overrides before it copies */
        {"<lora:a:te=0.5>", "a", 0.5, 0.5},
        {"<lora:a:unet=0.5>", "a", 0.5, 1},
        {"<lora:te=0.25:a:unet=0.5>", "a", 0.5, 0.25},
        {"<lora:a: 1 :dyn=4>", "a", 1, 1},
        {"<lyco:a:2>", "a", 2, 2},
        {"<lora:\xc3\xbc<x:0.1>", "\xc3\xbc<x", 0.1, 0.1},
    };
    static const char *const none[] = {"<lora>", "<lora:>", "< lora:a>", "<lora:a", "lora:a>",
                                       "a < b",  "<>",      "<:>",       "<:a>"};
    static const char *const bad[] = {"<lora::1>",   "<lora:a:b>",   "<lora:a:1.2.3>",
                                      "<lora:te=1>", "<lora:a:te=>", "<lora:a:>"};
    fixture *f = *state;
    ipt_prompt *p = NULL;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        char text[128];
        snprintf(text, sizeof text, "x %sy", cases[i].tag);
        p = make(f, text, NULL);
        assert_int_equal(p->n_lora, 1);
        assert_string_equal(p->loras[0].name, cases[i].name);
        if (p->loras[0].weight != cases[i].weight || p->loras[0].te_weight != cases[i].te)
            fail_msg("%s: %g %g", cases[i].tag, p->loras[0].weight, p->loras[0].te_weight);
        assert_string_equal(p->text, "x y");
        assert_int_equal(p->n_content[0], 2);
        ipt_prompt_destroy(&p);
    }
    for (size_t i = 0; i < IPT_COUNT(none); i++) {
        p = make(f, none[i], NULL);
        assert_int_equal(p->n_lora + p->n_ignored, 0);
        assert_string_equal(p->text, none[i]);
        ipt_prompt_destroy(&p);
    }
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        assert_int_equal(ipt_prompt_create(f->ctx, f->clip, bad[i], strlen(bad[i]), NULL, &p),
                         IPT_ERR_ARG);
        assert_null(p);
    }
    p = make(f, "<lora:a:1:2:8:dyn=4:in=0.5>", NULL);
    assert_int_equal(p->n_lora, 1);
    assert_int_equal(p->n_ignored, 3);
    assert_string_equal(p->ignored[0], "8");
    assert_string_equal(p->ignored[1], "dyn=4");
    assert_string_equal(p->ignored[2], "in=0.5");
    ipt_prompt_destroy(&p);
    p = make(f, "<lora:a:1>cat<hypernet:h:0.5> <lora:b:2> <x:1>", NULL);
    assert_int_equal(p->n_lora, 2);
    assert_string_equal(p->loras[1].name, "b");
    assert_int_equal(p->n_ignored, 2);
    assert_string_equal(p->ignored[0], "<hypernet:h:0.5>");
    assert_string_equal(p->ignored[1], "<x:1>");
    assert_string_equal(p->text, "cat  ");
    ipt_prompt_destroy(&p);
}

static size_t find(fixture *f, const ipt_prompt *p, const char *phrase, ipt_prompt_pos *out,
                   size_t room, size_t *n_each)
{
    ipt_prompt_pos *pos = NULL;
    size_t n = 0;
    OK(f->ctx, ipt_prompt_find(f->ctx, f->clip, p, phrase, strlen(phrase), &pos, &n, n_each));
    assert_true(n * *n_each <= room);
    if (n > 0)
        memcpy(out, pos, n * *n_each * sizeof *pos);
    ipt_free(pos);
    return n;
}

static void test_find(void **state)
{
    static const ipt_prompt_embedding e[] = {{"<s1>", 2}, {"sks dog", 3}};
    fixture *f = *state;
    ipt_prompt_attr attr = {.embeddings = e, .n_embeddings = 2};
    ipt_prompt_pos at[64];
    size_t m = 0;
    ipt_prompt *p =
        make(f, "a (black cat:1.2) and a Cat, <s1> cat BREAK cat sks dog cat cat", &attr);
    assert_int_equal(p->n_chunk, 2);
    assert_int_equal(find(f, p, "cat", at, 64, &m), 6);
    assert_int_equal(m, 1);
    assert_int_equal(at[0].pos, 3);
    assert_int_equal(at[1].pos, 6);
    assert_int_equal(at[2].pos, 10);
    assert_int_equal(at[3].chunk, 1);
    assert_int_equal(at[3].pos, 1);
    assert_int_equal(find(f, p, "black cat", at, 64, &m), 1);
    assert_int_equal(m, 2);
    assert_int_equal(at[0].pos, 2);
    assert_int_equal(at[1].pos, 3);
    assert_int_equal(find(f, p, "<s1> cat", at, 64, &m), 1);
    assert_int_equal(m, 3);
    assert_int_equal(at[0].pos, 8);
    assert_int_equal(at[2].pos, 10);
    assert_int_equal(find(f, p, "sks dog", at, 64, &m), 1);
    assert_int_equal(m, 3);
    assert_int_equal(at[0].pos, 2);
    assert_int_equal(find(f, p, "cat cat", at, 64, &m), 1); /* not across BREAK */
    assert_int_equal(at[0].pos, 5);
    assert_int_equal(find(f, p, "sks dog cat cat", at, 64, &m), 1);
    assert_int_equal(m, 5);
    assert_int_equal(find(f, p, "dog", at, 64, &m), 0); /* it is part of an inversion */
    assert_int_equal(find(f, p, "!", at, 64, &m), 0);   /* placeholders are not id 0 */
    ipt_prompt_pos *pos = NULL;
    size_t n = 0;
    assert_int_equal(ipt_prompt_find(f->ctx, f->clip, p, " ", 1, &pos, &n, &m), IPT_ERR_ARG);
    OK(f->ctx, ipt_prompt_extend(f->ctx, f->clip, p, 4));
    OK(f->ctx, ipt_prompt_extend(f->ctx, f->clip, p, 1));
    assert_int_equal(p->n_chunk, 4);
    assert_int_equal(p->ids[3 * 77], 49406);
    assert_int_equal(p->ids[3 * 77 + 1], 49407);
    assert_int_equal(p->ids[3 * 77 + 76], 49407);
    assert_int_equal(p->n_content[3], 0);
    assert_int_equal(find(f, p, "cat", at, 64, &m), 6);
    ipt_prompt_destroy(&p);
    char text[74 * 2 + 10];
    for (size_t i = 0; i < 74; i++)
        memcpy(text + 2 * i, "a ", 2);
    strcpy(text + 148, "cat dog");
    p = make(f, text, NULL); /* a phrase over the border of two chunks */
    assert_int_equal(find(f, p, "cat dog", at, 64, &m), 1);
    assert_true(at[0].chunk == 0 && at[0].pos == 75 && at[1].chunk == 1 && at[1].pos == 1);
    ipt_prompt_destroy(&p);
    p = make(f, "xqzcat cat2, cat cat cat", NULL); /* not the end of another word */
    size_t before = find(f, p, "2", at, 64, &m) ? (size_t)at[0].pos - 1 : 0;
    assert_true(before > 2 && p->ids[before] == p->ids[before - 1]); /* which is cat's id */
    assert_int_equal(find(f, p, "cat", at, 64, &m), 4);
    assert_int_equal(at[0].pos, before);
    assert_int_equal(find(f, p, "cat cat", at, 64, &m), 2); /* they overlap */
    assert_true(at[0].pos + 1 == at[1].pos && at[2].pos == at[1].pos);
    ipt_prompt_destroy(&p);
}

static void test_embedding_errors(void **state)
{
    static const ipt_prompt_embedding bad[] = {{"", 1}, {NULL, 1}, {"a", 0}, {"a", 76}};
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(bad); i++) {
        ipt_prompt_attr attr = {.embeddings = &bad[i], .n_embeddings = 1};
        ipt_prompt *p = NULL;
        assert_int_equal(ipt_prompt_create(f->ctx, f->clip, "a", 1, &attr, &p), IPT_ERR_ARG);
        assert_null(p);
    }
}

static void test_apply_weights(void **state)
{
    (void)state;
    float z[6] = {1, 2, 3, 4, -1, 3}, w[3] = {1, 2, 0.5F}; /* [3,2] */
    /* sum 12; scaled: 1 2 6 8 -0.5 1.5 = 18; ratio 2/3 */
    static const double want[6] = {2. / 3, 4. / 3, 4, 16. / 3, -1. / 3, 1};
    ipt_prompt_apply_weights(z, w, 3, 2);
    for (size_t i = 0; i < 6; i++)
        assert_true(fabs((double)z[i] - want[i]) < 1e-6);
    float one[2] = {0.3F, -7.7F}, ones[2] = {1, 1}, keep[2] = {0.3F, -7.7F};
    ipt_prompt_apply_weights(one, ones, 2, 1);
    assert_memory_equal(one, keep, sizeof one);
    float zero[2] = {1, -1}, twos[2] = {2, 2}; /* mean 0 after: no second step */
    ipt_prompt_apply_weights(zero, twos, 2, 1);
    assert_true(zero[0] > 1.9F && zero[1] < -1.9F);
}

/* Every allocation fails in turn: a clean status each time, nothing leaks (ASan). */
static void test_out_of_memory(void **state)
{
    static const char text[] = "a (cafe\xcc\x81:1.2), <lora:x:1> <h:1> zz<h> BREAK <|EndOfText|>";
    static const ipt_prompt_embedding e[] = {{"zz", 2}, {"<h>", 1}};
    fixture *f = *state;
    ipt_prompt_attr attr = {.embeddings = e, .n_embeddings = 2};
    bool done = false;
    for (uint64_t n = 1; !done; n++) {
        ipt_tokenizer *tok = NULL;
        ipt_prompt *p = NULL;
        ipt_prompt_pos *pos = NULL;
        size_t n_pos = 0, m = 0;
        ipt_alloc_fail_after(f->ctx, n);
        ipt_status s = ipt_tokenizer_load_folder(f->ctx, IPT_TEST_DATA "/tok_tiny", &tok);
        if (s == IPT_OK)
            s = ipt_prompt_create(f->ctx, tok, text, sizeof text - 1, &attr, &p);
        if (s == IPT_OK)
            s = ipt_prompt_extend(f->ctx, tok, p, 9);
        if (s == IPT_OK)
            s = ipt_prompt_find(f->ctx, tok, p, "zz", 2, &pos, &n_pos, &m);
        ipt_alloc_fail_after(f->ctx, 0);
        done = s == IPT_OK;
        if (!done)
            assert_int_equal(s, IPT_ERR_NOMEM);
        ipt_free(pos);
        ipt_prompt_destroy(&p);
        ipt_tokenizer_destroy(&tok);
        assert_true(n < 5000);
    }
}

/* "<word>" is found wherever it stands, as a token added to a tokenizer is; between them the text
 * is what it is without them. */
static void test_angled_names(void **state)
{
    static const struct {
        const char *text, *rest; /* with and without the words */
        int index[4], pos[4];    /* of the vectors; pos 0: none */
    } rows[] = {
        {"style of <s1><s2>", "style of", {0, 1}, {3, 4}},
        {"<s1>,<S2> cat", ", cat", {0, 1}, {1, 3}},
        {"dog<s2>cat", "dog cat", {1}, {2}},
        {"(<s1>:1.3).", ".", {0}, {1}},
        {"<s1><s1>!<s", "!<s", {0, 0}, {1, 2}},
        {"<s3>", "<s3>", {0}, {0}},
        {"a <s12>", "a", {2}, {2}},
    };
    fixture *f = *state;
    const ipt_prompt_embedding e[] = {{"<s1>", 1}, {"<s2>", 1}, {"<s12>", 2}};
    const ipt_prompt_attr attr = {.embeddings = e, .n_embeddings = 3};
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_prompt *p = make(f, rows[i].text, &attr), *rest = make(f, rows[i].rest, NULL);
        size_t n_span = 0;
        int32_t taken = 0, k = 1;
        while (n_span < 4 && rows[i].pos[n_span])
            n_span++;
        assert_int_equal(p->n_span, n_span);
        for (size_t s = 0; s < n_span; s++) {
            assert_int_equal(p->spans[s].index, rows[i].index[s]);
            assert_int_equal(p->spans[s].pos, rows[i].pos[s]);
            taken += p->spans[s].n;
        }
        assert_int_equal(p->n_content[0], rest->n_content[0] + taken);
        for (int32_t at = 1; at <= p->n_content[0]; at++) {
            bool vector = false;
            for (size_t s = 0; s < n_span; s++)
                vector = vector || (at >= p->spans[s].pos && at < p->spans[s].pos + p->spans[s].n);
            if (!vector)
                assert_int_equal(p->ids[at], rest->ids[k++]);
        }
        ipt_prompt_destroy(&p);
        ipt_prompt_destroy(&rest);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_published),
        cmocka_unit_test(test_goldens),
        cmocka_unit_test(test_vocabulary),
        cmocka_unit_test(test_folder_variants),
        cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_spans),
        cmocka_unit_test(test_angled_names),
        cmocka_unit_test(test_long_texts),
        cmocka_unit_test(test_chunk_limit),
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_prompts),
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_tags),
        cmocka_unit_test(test_find),
        cmocka_unit_test(test_embedding_errors),
        cmocka_unit_test(test_apply_weights),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
