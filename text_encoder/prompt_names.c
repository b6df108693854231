/* text_encoder/prompt_names.c - names of textual inversions among the tokens of a text. */
#include "text_encoder/tokenizer.h"

#include "text_encoder/tokenizer_impl.h"

#include <string.h>

static ipt_status make_name(ipt_ctx *ctx, const ipt_tokenizer *tok, ipt_arena *arena,
                            const ipt_prompt_embedding *e, int32_t index, tok_name *out)
{
    ipt_token *tokens = NULL;
    size_t n = 0;
    if (!e->name || !e->name[0] || e->n_vectors < 1 || e->n_vectors > IPT_TOKEN_CONTENT)
        return ipt_fail(ctx, IPT_ERR_ARG, "embedding \"%.80s\": %d vectors, 1 to %d possible",
                        e->name ? e->name : "", (int)e->n_vectors, IPT_TOKEN_CONTENT);
    size_t len = strlen(e->name);
    bool angled = len > 2 && e->name[0] == '<' && e->name[len - 1] == '>';
    if (angled)
        n = 1;
    else
        IPT_TRY(ipt_tokenize(ctx, tok, e->name, len, &tokens, &n));
    *out = (tok_name){ipt_arena_alloc(arena, (n + 1) * sizeof *out->ids), n, index, e->n_vectors,
                      angled ? ipt_arena_strdup(arena, e->name) : NULL};
    for (size_t i = 0; out->ids && i < n; i++)
        out->ids[i] = angled ? -1 - index : tokens[i].id;
    ipt_free(tokens);
    return out->ids && (out->text || !angled) ? IPT_OK : IPT_ERR_NOMEM;
}

ipt_status tok_names_make(ipt_ctx *ctx, const ipt_tokenizer *tok, ipt_arena *arena,
                          const ipt_prompt_attr *attr, struct ipt_prompt_names **out)
{
    struct ipt_prompt_names *names = ipt_arena_alloc(arena, sizeof *names);
    size_t n = attr->n_embeddings > 0 ? (size_t)attr->n_embeddings : 0, bytes = 0;
    if (!names || !ipt_mul_size(n + 1, sizeof *names->v, &bytes))
        return IPT_ERR_NOMEM;
    names->v = ipt_arena_alloc(arena, bytes);
    if (!names->v)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        tok_name made = {0};
        size_t at = names->n;
        IPT_TRY(make_name(ctx, tok, arena, &attr->embeddings[i], (int32_t)i, &made));
        if (made.n_ids == 0) /* a name of blanks matches nothing */
            continue;
        for (; at > 0 && names->v[at - 1].n_ids < made.n_ids; at--)
            names->v[at] = names->v[at - 1];
        names->v[at] = made;
        names->n++;
    }
    *out = names;
    return IPT_OK;
}

const tok_name *tok_name_at(const struct ipt_prompt_names *names, const ipt_token *t, size_t n)
{
    for (size_t i = 0; i < names->n; i++) {
        const tok_name *e = &names->v[i];
        size_t k = 0;
        while (k < e->n_ids && k < n && t[k].id == e->ids[k])
            k++;
        if (k == e->n_ids)
            return e;
    }
    return NULL;
}

static bool begins(const char *s, size_t n, const char *word, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        char a = i < n ? s[i] : '\0', b = word[i];
        a = (char)(a >= 'A' && a <= 'Z' ? a | 0x20 : a);
        b = (char)(b >= 'A' && b <= 'Z' ? b | 0x20 : b);
        if (a != b)
            return false;
    }
    return true;
}

/* The longest "<word>" that stands at text[0]. */
static const tok_name *angled_at(const struct ipt_prompt_names *names, const char *text, size_t n)
{
    const tok_name *best = NULL;
    for (size_t i = 0; i < names->n && *text == '<'; i++) {
        const tok_name *e = &names->v[i];
        if (e->text && begins(text, n, e->text, strlen(e->text)) &&
            (!best || strlen(e->text) > strlen(best->text)))
            best = e;
    }
    return best;
}

/* Tokens of a text; a "<word>" is one token -1-index and parts what stands beside it, as a token
 * added to a tokenizer does: by ids it would be lost, since "<s1><s2>" is "<", "s", "1", "><", ...
 */
ipt_status tok_split(ipt_ctx *ctx, const ipt_tokenizer *tok, const struct ipt_prompt_names *names,
                     const char *text, size_t len, ipt_token **tokens, size_t *n_tokens)
{
    ipt_token *all = NULL, *t = NULL;
    size_t n = 0, m = 0, from = 0;
    for (size_t at = 0; at <= len; at++) {
        const tok_name *e = at < len ? angled_at(names, text + at, len - at) : NULL;
        if (!e && at < len)
            continue;
        ipt_status status = ipt_tokenize(ctx, tok, text + from, at - from, &t, &m);
        ipt_token *grown = status == IPT_OK
                               ? ipt_regrow(ctx, all, n * sizeof *all, (n + m + 1) * sizeof *all)
                               : NULL;
        if (!grown) {
            ipt_free(all);
            ipt_free(t);
            return status == IPT_OK ? IPT_ERR_NOMEM : status;
        }
        all = grown;
        for (size_t i = 0; i < m; i++)
            all[n++] = (ipt_token){t[i].id, t[i].begin + (uint32_t)from, t[i].end + (uint32_t)from};
        ipt_free(t);
        t = NULL;
        if (e) {
            from = at + strlen(e->text);
            all[n++] = (ipt_token){e->ids[0], (uint32_t)at, (uint32_t)from};
            at = from - 1;
        }
    }
    *tokens = all;
    *n_tokens = n;
    return IPT_OK;
}
