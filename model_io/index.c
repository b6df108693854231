/* model_io/index.c - hash table from names to indices. */
#include "model_io/internal.h"

#include <string.h>

uint64_t ipt_hash_name(const char *s)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (; *s; s++)
        h = (h ^ (uint8_t)*s) * 0x100000001b3u;
    return h;
}

ipt_status ipt_index_init(ipt_index *x, ipt_ctx *ctx, size_t expected)
{
    size_t n = 16;
    while (n / 2 < expected) {
        if (n > SIZE_MAX / 64)
            return ipt_fail(ctx, IPT_ERR_NOMEM, "out of memory: a table of %zu names", expected);
        n *= 2;
    }
    *x = (ipt_index){.ctx = ctx, .n_slot = n};
    x->key = ipt_calloc(ctx, n, sizeof *x->key);
    x->value = ipt_calloc(ctx, n, sizeof *x->value);
    if (x->key && x->value)
        return IPT_OK;
    ipt_index_finish(x);
    return IPT_ERR_NOMEM;
}

void ipt_index_finish(ipt_index *x)
{
    ipt_free(x->key);
    ipt_free(x->value);
    *x = (ipt_index){0};
}

static size_t slot_of(const ipt_index *x, const char *key)
{
    size_t i = (size_t)(ipt_hash_name(key) * 0x9e3779b97f4a7c15u >> 20) & (x->n_slot - 1);
    while (x->key[i] && strcmp(x->key[i], key) != 0)
        i = (i + 1) & (x->n_slot - 1);
    return i;
}

bool ipt_index_get(const ipt_index *x, const char *key, uint32_t *value)
{
    if (x->n_slot == 0)
        return false;
    size_t i = slot_of(x, key);
    if (!x->key[i])
        return false;
    *value = x->value[i];
    return true;
}

static ipt_status grow(ipt_index *x)
{
    ipt_index y;
    IPT_TRY(ipt_index_init(&y, x->ctx, x->n_slot));
    for (size_t i = 0; i < x->n_slot; i++) {
        if (!x->key[i])
            continue;
        size_t j = slot_of(&y, x->key[i]);
        y.key[j] = x->key[i];
        y.value[j] = x->value[i];
    }
    y.n_used = x->n_used;
    ipt_index_finish(x);
    *x = y;
    return IPT_OK;
}

ipt_status ipt_index_put(ipt_index *x, const char *key, uint32_t value, bool *added)
{
    if (x->n_used * 2 >= x->n_slot)
        IPT_TRY(grow(x));
    size_t i = slot_of(x, key);
    *added = x->key[i] == NULL;
    if (!*added)
        return IPT_OK;
    x->key[i] = key;
    x->value[i] = value;
    x->n_used++;
    return IPT_OK;
}
