/* tests/test_concepts.c - adapters bound to words: where the words stand, variants of the prompt,
 * what is refused. */
#include "tests/clora_job.h"

#include "compose/concepts.h"

#include <stdlib.h>
#include <string.h>

/* --- concepts --------------------------------------------------------------------------------- */
static const char *places_text(const ipt_concepts *c, const ipt_wording *v, int32_t world, char *b,
                               size_t n)
{
    size_t at = 0;
    b[0] = 0;
    for (int32_t k = 0; k < c->n; k++) {
        const ipt_places *p = ipt_concepts_place(c, v, world, k);
        for (int32_t i = 0; i < p->n; i++)
            at += (size_t)snprintf(b + at, n - at, "%s%d", i ? " " : k ? ";" : "", p->at[i]);
    }
    return b;
}

/* The places of all concepts, "2;5 6", in each world, and the worlds' texts; NULL: the prompt. */
static const struct {
    const char *prompt, *words;
    struct {
        const char *text, *places;
    } world[4];
} WORDS[] = {
    {"a cat and a dog", "cat;dog", {{NULL, "2;5"}, {NULL, "2;5"}, {NULL, "2;5"}}},
    {"a Cat and a DOG", "cAT;-;dog", {{NULL, "2;5"}, {NULL, "2;5"}, {NULL, "2;5"}}},
    {"cat cat cat", "cat#3;cat#1", {{NULL, "3;1"}, {NULL, "3;1"}, {NULL, "3;1"}}},
    {"cat dog cat", "cat;CAT", {{NULL, "1;3"}, {NULL, "1;3"}, {NULL, "1;3"}}},
    {"cat dog cat", "cat#2;cat", {{NULL, "3;1"}, {NULL, "3;1"}, {NULL, "3;1"}}},
    {"cat cat cat", "cat;cat;cat", {{NULL, "1;2;3"}, {0}, {0}, {NULL, "1;2;3"}}},
    {"a red cat, red dog", "red cat;red#2", {{0}, {NULL, "2 3;5"}, {NULL, "2 3;5"}}},
    /* whole words; the tokenizer also sees a "cat" in cat2, and none in scat */
    {"scat cat2 cat's cat", "cat;cat", {{NULL, "5;8"}, {NULL, "5;8"}, {NULL, "5;8"}}},
    {"elephant ant", "ant", {{NULL, "4"}, {NULL, "4"}}},
    {"(elephant:1.2)", "elephant", {{NULL, "2 3 4"}, {NULL, "2 3 4"}}},
    /* punctuation is whole runs */
    {"... .", ".", {{NULL, "2"}, {NULL, "2"}}},
    /* phrases: only in their own world, all that follows moves */
    {"a cat, a dog",
     "cat=big fat cat;dog",
     {{NULL, "2;5"}, {"a big fat cat, a dog", "2 3 4;7"}, {NULL, "2;5"}}},
    {"a cat, a dog",
     "cat=sks cat;-;dog=elephant",
     {{NULL, "2;5"}, {"a sks cat, a dog", "2 3;6"}, {"a cat, a elephant", "2;5 6 7"}}},
    {"a big cat, a dog", "big cat=it;dog", {{NULL, "2 3;6"}, {"a it, a dog", "2;5"}}},
    /* a phrase with another's word, or its own twice, takes no place away */
    {"a cat , a dog", " cat = red cat ;dog ", {{0}, {"a red cat , a dog", "2 3;6"}, {0}}},
    {"a \xe2\x80\x9c"
     "cat\xe2\x80\x9d\xe2\x80\x94wow\xe2\x80\xa6",
     "cat;wow",
     {{NULL, "3;6"}}},
    {"a cat and a dog",
     "cat=dog cat;dog",
     {{NULL, "2;5"}, {"a dog cat and a dog", "2 3;6"}, {NULL, "2;5"}}},
    {"a cat cat", "cat#2=cat cat;cat#1", {{NULL, "3;2"}, {"a cat cat cat", "3 4;2"}}},
    {"cat cat", "cat=old cat;cat", {{NULL, "1;2"}, {"old cat cat", "1 2;3"}, {NULL, "1;2"}}},
    {"a cat", "cat=b=c#2", {{NULL, "2"}, {"a b=c#2", "2 3 4 5 6"}}},
};

static void words_are_found(void **state)
{
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(WORDS); i++) {
        ipt_concepts c;
        char got[256];
        give_prompt(f, WORDS[i].prompt);
        give_words(f, WORDS[i].words);
        assert_ok(f->ctx, ipt_concepts_read(&f->job, "m", &c));
        assert_ok(f->ctx, ipt_concepts_bind(&f->job, "m", &c));
        assert_int_equal(c.n_wording, 1);
        const ipt_wording *v = ipt_concepts_at(&c, &f->job, 0);
        for (int32_t j = 0; j <= c.n; j++) {
            const char *text = WORDS[i].world[j].text, *places = WORDS[i].world[j].places;
            assert_string_equal(f->texts.text[v->text[j]], text ? text : WORDS[i].prompt);
            if (places && strcmp(places_text(&c, v, j, got, sizeof got), places) != 0)
                fail_msg("'%s' of '%s', world %d: %s, expected %s", WORDS[i].words, WORDS[i].prompt,
                         j, got, places);
        }
    }
}

/* A prompt that changes: each text once, with its own places. */
static void words_in_edited_prompts(void **state)
{
    fixture *f = *state;
    ipt_concepts c;
    char got[64];
    uint16_t other = 0;
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat=sks cat;dog");
    assert_ok(f->ctx, ipt_texts_add(&f->texts, "old dog, old cat", &other));
    for (int32_t i = 0; i < f->job.n_eval; i += 2)
        f->text[i] = other;
    assert_ok(f->ctx, ipt_concepts_read(&f->job, "m", &c));
    assert_ok(f->ctx, ipt_concepts_bind(&f->job, "m", &c));
    assert_int_equal(c.n_wording, 2);
    for (int32_t i = 0; i < f->job.n_eval; i++) {
        const ipt_wording *v = ipt_concepts_at(&c, &f->job, i);
        assert_int_equal(v->base, f->text[i]);
        assert_string_equal(places_text(&c, v, 1, got, sizeof got), i % 2 ? "2 3;6" : "5 6;2");
        assert_string_equal(f->texts.text[v->text[1]],
                            i % 2 ? "a sks cat and a dog" : "old dog, old sks cat");
    }
    assert_int_equal(f->texts.n, 5); /* two prompts, a negative, a variant of each */
    ipt_name(got, sizeof got, "old dog");
    assert_ok(f->ctx, ipt_texts_add(&f->texts, got, &other));
    f->text[5] = other;
    assert_int_equal(ipt_concepts_read(&f->job, "m", &c), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "'cat' of 1.safetensors is not in the prompt "
                                                   "'old dog'"));
}

static const struct {
    const char *prompt, *words, *says;
} WRONG_WORDS[] = {
    {"a cat", "dog", "the word 'dog' of 1.safetensors is not in the prompt 'a cat'"},
    {"a scat", "cat", "is not in the prompt"},
    {"a cat2", "cat", "is not in the prompt"},
    {"", "cat", "is not in the prompt ''"},
    {"a cat", "cat;cat", "2.safetensors wants 'cat' number 2, which stands 1 time in the prompt"},
    {"a cat, cat", "cat#3", "number 3, which stands 2 times"},
    {"a cat", "cat#0", "m: @cat#0: expected WORD[#K][=PHRASE], K from 1 to 1000"},
    {"a cat", "cat#", "expected WORD[#K][=PHRASE]"},
    {"a cat", "cat#1001", "K from 1 to 1000"},
    {"a cat", "cat#99999999999999999999", "K from 1 to 1000"},
    {"a cat", "cat#-1", "expected WORD[#K][=PHRASE]"},
    {"a cat", "cat# 1", "expected WORD[#K][=PHRASE]"},
    {"a cat", "cat#1x=b", "expected WORD[#K][=PHRASE]"},
    {"a cat", "#1", "expected WORD[#K][=PHRASE]"},
    {"a cat", "=b", "expected WORD[#K][=PHRASE]"},
    {"a cat", "cat=", "m: @cat=: expected WORD[#K][=PHRASE]"},
    {"a cat", " ", "expected WORD[#K][=PHRASE]"},
    {"a cat", "cat= ", "expected WORD[#K][=PHRASE]"},
    {"a red cat, red dog", "red cat;red", "'red cat' and 'red' are the same words of the prompt"},
    {"a red cat", "red cat;cat", "'red cat' and 'cat' are the same words of the prompt"},
    {"a cat", "cat#1;CAT#1", "'cat' and 'CAT' are the same words"},
    {"a cat", "-", "m: no adapter is bound to a word of the prompt; give --lora FILE@WORD"},
};

static void wrong_words(void **state)
{
    fixture *f = *state;
    for (size_t i = 0; i < IPT_COUNT(WRONG_WORDS); i++) {
        ipt_concepts c;
        give_prompt(f, WRONG_WORDS[i].prompt);
        give_words(f, WRONG_WORDS[i].words);
        if (ipt_concepts_read(&f->job, "m", &c) != IPT_ERR_ARG ||
            !strstr(ipt_last_error(f->ctx), WRONG_WORDS[i].says))
            fail_msg("'%s' of '%s': %s", WRONG_WORDS[i].words, WRONG_WORDS[i].prompt,
                     ipt_last_error(f->ctx));
    }
}

static void wrong_adapters(void **state)
{
    fixture *f = *state;
    ipt_concepts c;
    give_prompt(f, "a cat and a dog");
    give_words(f, "cat;-;dog");
    f->slot[2].file = f->slot[1].file; /* a style and a concept */
    assert_int_equal(ipt_concepts_read(&f->job, "m", &c), IPT_ERR_ARG);
    assert_string_equal(ipt_last_error(f->ctx), "m: 2.safetensors is given twice; an adapter is "
                                                "one concept or one style");
    give_words(f, "cat;dog");
    f->job.n_part = 2;
    assert_int_equal(ipt_concepts_read(&f->job, "m", &c), IPT_ERR_ARG);
    assert_string_equal(ipt_last_error(f->ctx), "m reads one prompt; AND joins 2");
    f->job.n_part = 1;
    f->job.n_slot = 0;
    assert_int_equal(ipt_concepts_read(&f->job, "m", &c), IPT_ERR_ARG);
}

/* Words that the characters have and the tokens have not; more tokens than there is room for. */
static void words_that_are_no_tokens(void **state)
{
    fixture *f = *state;
    ipt_concepts c;
    char letters[3 * IPT_MAX_PLACE + 2], words[sizeof letters + 4];
    for (size_t n = sizeof letters - 2; n <= sizeof letters - 1; n++) {
        memset(letters, 'x', n);
        letters[n] = 0;
        give_prompt(f, letters);
        give_words(f, letters);
        assert_ok(f->ctx, ipt_concepts_read(&f->job, "m", &c));
        ipt_status s = ipt_concepts_bind(&f->job, "m", &c);
        assert_int_equal(s, n == 3 * IPT_MAX_PLACE ? IPT_OK : IPT_ERR_ARG);
    }
    give_prompt(f, "a cat");
    ipt_name(words, sizeof words, "cat=%s", letters);
    give_words(f, words);
    assert_ok(f->ctx, ipt_concepts_read(&f->job, "m", &c));
    assert_int_equal(ipt_concepts_bind(&f->job, "m", &c), IPT_ERR_ARG);
    give_prompt(f, "a cat-like");
    give_words(f, "cat-");
    assert_ok(f->ctx, ipt_concepts_read(&f->job, "m", &c));
    assert_ok(f->ctx, ipt_concepts_bind(&f->job, "m", &c));
    f->texts.text[0] = "a fish"; /* as if the tokenizer did not know it */
    assert_int_equal(ipt_concepts_bind(&f->job, "m", &c), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(f->ctx), "'cat-' of 1.safetensors is not among the "
                                                   "tokens of the prompt 'a fish'"));
}

/* As many concepts and texts as a job may have. */
static void many_words_and_texts(void **state)
{
    fixture *f = *state;
    ipt_concepts c;
    char text[512], words[512];
    size_t at = 0, n = 0;
    uint16_t k = 0;
    for (int i = 0; i < IPT_MAX_SLOT; i++) {
        at += (size_t)snprintf(words + at, sizeof words - at, "%sw%c%c", i ? ";" : "", 'a' + i % 26,
                               'a' + i / 26);
        n += (size_t)snprintf(text + n, sizeof text - n, "%sw%c%c", i ? " " : "", 'a' + i % 26,
                              'a' + i / 26);
    }
    ipt_name(words + at - 4, 16, ";%.3s=x y z", text + n - 3);
    give_prompt(f, text);
    give_words(f, words);
    assert_int_equal(f->job.n_slot, IPT_MAX_SLOT);
    for (int32_t i = 0; i < MOST_EVALS; i++) {
        ipt_name(text + n, sizeof text - n, " %d", i);
        assert_ok(f->ctx, ipt_texts_add(&f->texts, text, &k));
        f->text[i] = k;
    }
    set_steps(f, MOST_EVALS, 1, 0);
    assert_ok(f->ctx, ipt_concepts_read(&f->job, "m", &c));
    assert_ok(f->ctx, ipt_concepts_bind(&f->job, "m", &c));
    assert_int_equal(c.n_wording, MOST_EVALS);
    for (int32_t i = 0; i < MOST_EVALS; i++) {
        const ipt_wording *v = ipt_concepts_at(&c, &f->job, i);
        for (int32_t j = 0; j <= c.n; j++)
            for (int32_t w = 0; w < c.n; w++) {
                const ipt_places *q = ipt_concepts_place(&c, v, j, w);
                assert_int_equal(q->n, j == c.n && w == c.n - 1 ? 3 : 1);
                assert_int_equal(q->at[0], w + 1);
            }
    }
    assert_int_equal(f->texts.n, 2 + 2 * MOST_EVALS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        CLORA_CASE(words_are_found),
        CLORA_CASE(words_in_edited_prompts),
        CLORA_CASE(wrong_words),
        CLORA_CASE(wrong_adapters),
        CLORA_CASE(words_that_are_no_tokens),
        CLORA_CASE(many_words_and_texts),
    };
    cmocka_set_test_filter(getenv("IPT_TEST_ONLY"));
    return cmocka_run_group_tests_name("concepts", tests, NULL, NULL);
}
