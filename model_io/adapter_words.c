/* model_io/adapter_words.c - words in an adapter file: vectors that stand for them (textual
 * inversions), and trigger words that its metadata tells.
 *
 * Sources: cloneofsimo/lora ("<s1>"), A1111's extensions-builtin/Lora/networks.py and OneTrainer
 * ("bundle_emb."), kohya-ss/sd-scripts (ss_tag_frequency), modelspec. */
#include "model_io/adapter.h"

#include <jansson.h>
#include <limits.h>
#include <string.h>

enum { MAX_WORDS = 8 };

/* --- vectors ---------------------------------------------------------------------------------- */
/* The word that a key holds the vectors of, and for which text encoder; its length, 0: none. */
static size_t word_of(const char *key, const char **word, int *which)
{
    static const struct {
        const char *ending;
        int which;
    } endings[] = {{".string_to_param", 0}, {".clip_l", 0}, {".clip_g", 1}, {".", 0}};
    static const char bundle[] = "bundle_emb.";
    size_t len = strlen(key);
    *word = key;
    *which = 0;
    if (len > 2 && key[0] == '<' && key[len - 1] == '>')
        return len;
    if (strncmp(key, bundle, sizeof bundle - 1) != 0)
        return 0;
    *word = key + sizeof bundle - 1;
    for (size_t i = 0; i < IPT_COUNT(endings); i++) {
        const char *end = strstr(*word, endings[i].ending);
        *which = endings[i].which;
        if (end)
            return (size_t)(end - *word);
    }
    return 0;
}

/* The entry of a word, made at first sight. */
static ipt_status entry_of(ipt_adapter_file *f, ipt_index *words, const char *word, size_t len,
                           ipt_adapter_embedding **out)
{
    uint32_t at = (uint32_t)f->n_embedding;
    bool added = false;
    char *copy = ipt_arena_alloc(&f->impl->arena, len + 1);
    if (!copy)
        return IPT_ERR_NOMEM;
    memcpy(copy, word, len);
    if (!ipt_index_get(words, copy, &at)) {
        IPT_TRY(ipt_index_put(words, copy, at, &added));
        f->embedding[f->n_embedding++].word = copy;
    }
    *out = &f->embedding[at];
    return IPT_OK;
}

static ipt_status find_vectors(ipt_adapter_file *f, ipt_index *words)
{
    const ipt_safetensors *st = f->impl->st;
    for (size_t i = 0; i < ipt_safetensors_count(st); i++) {
        const ipt_st_tensor *t = ipt_safetensors_at(st, i);
        ipt_adapter_embedding *e = NULL;
        const char *word = NULL;
        int which = 0;
        size_t len = word_of(t->name, &word, &which);
        if (len == 0)
            continue;
        IPT_TRY(entry_of(f, words, word, len, &e));
        if (e->vector[which])
            ipt_log(f->impl->ctx, IPT_LOG_WARN,
                    "%s: word '%s' has vectors in '%s' and in '%s': the second are not used",
                    f->path, e->word, e->vector[which]->name, t->name);
        else
            e->vector[which] = t;
        ipt_adapter_claim(f, t, true);
    }
    return IPT_OK;
}

static ipt_status find_embeddings(ipt_adapter_file *f)
{
    ipt_index words = {0};
    f->embedding =
        ipt_arena_alloc(&f->impl->arena, ipt_safetensors_count(f->impl->st) * sizeof *f->embedding);
    if (!f->embedding)
        return IPT_ERR_NOMEM;
    IPT_TRY(ipt_index_init(&words, f->impl->ctx, 16));
    ipt_status status = find_vectors(f, &words);
    ipt_index_finish(&words);
    return status;
}

/* --- trigger words ---------------------------------------------------------------------------- */
static ipt_status add_word(ipt_adapter_file *f, const char *word)
{
    if (!word[0] || f->n_word == MAX_WORDS)
        return IPT_OK;
    for (size_t i = 0; i < f->n_word; i++) {
        if (strcmp(f->word[i], word) == 0)
            return IPT_OK;
    }
    f->word[f->n_word] = ipt_arena_strdup(&f->impl->arena, word);
    return f->word[f->n_word++] ? IPT_OK : IPT_ERR_NOMEM;
}

/* kohya's tag counts: {"10_sks dog": {"tag": count, ...}, ...}: the tag with most pictures below
 * `limit`; *best its count. */
static const char *top_tag(json_t *folders, json_int_t limit, json_int_t *best)
{
    const char *top = NULL;
    *best = 0;
    const char *folder, *tag;
    json_t *tags, *count;
    json_object_foreach(folders, folder, tags)
    {
        json_object_foreach(tags, tag, count)
        {
            json_int_t n = json_integer_value(count);
            if (n > *best && n < limit) {
                *best = n;
                top = tag;
            }
        }
    }
    return top;
}

static ipt_status find_triggers(ipt_adapter_file *f)
{
    const char *phrase = ipt_safetensors_meta(f->impl->st, "modelspec.trigger_phrase");
    const char *text = ipt_safetensors_meta(f->impl->st, "ss_tag_frequency");
    json_t *tags = NULL;
    ipt_status status = IPT_OK;
    f->word = ipt_arena_alloc(&f->impl->arena, MAX_WORDS * sizeof *f->word);
    if (!f->word)
        return IPT_ERR_NOMEM;
    if (phrase)
        IPT_TRY(add_word(f, phrase));
    if (text)
        tags = json_loads(text, 0, NULL); /* not JSON: no words */
    for (void *a = json_object_iter(tags); a && status == IPT_OK;
         a = json_object_iter_next(tags, a)) {
        const char *name = json_object_iter_key(a), *p = name; /* "REPEATS_words" */
        while (*p >= '0' && *p <= '9')
            p++;
        status = add_word(f, p > name && *p == '_' ? p + 1 : name);
    }
    json_int_t limit = INT_MAX, best = 0;
    for (int i = 0; i < 3 && status == IPT_OK; i++, limit = best) {
        const char *tag = top_tag(tags, limit, &best);
        if (!tag)
            break;
        status = add_word(f, tag);
    }
    json_decref(tags);
    return status;
}

ipt_status ipt_adapter_find_words(ipt_adapter_file *f)
{
    IPT_TRY(find_embeddings(f));
    return find_triggers(f);
}
