/* model_io/keymap.c - expands the rule tables of keymap_sd.c: canonical name in, foreign name out.
 *
 * A pattern is matched from the start of the canonical name; {i} and {j} bind numbers; what follows
 * the match is kept.  The emission may use:
 *   {i} {j}   the bound numbers           {k}  j times 2
 *   {D} {S}   input block of down resnet (i,j), of the downsampler of i
 *   {U} {V}   output block of up resnet (i,j), of the last resnet of up block i
 *   {W}       slot of the upsampler of up block i: 2 beside an attention, else 1
 *   {R}       level counted from the other end
 *   {n}       j + 1
 * First match wins, in written order. */
#include "model_io/keymap.h"

#include <string.h>

typedef struct bound {
    int32_t i, j;
} bound;

/* Length of the match of `pattern` at the start of `name`, 0: none. */
static size_t match(const char *pattern, const char *name, bound *b)
{
    const char *p = pattern, *s = name;
    while (*p) {
        if (*p != '{') {
            if (*p++ != *s++)
                return 0;
            continue;
        }
        int32_t v = 0, n = 0;
        for (; *s >= '0' && *s <= '9' && n < 6; s++, n++)
            v = v * 10 + (*s - '0');
        if (n == 0)
            return 0;
        *(p[1] == 'i' ? &b->i : &b->j) = v;
        p += 3;
    }
    return (size_t)(s - name);
}

static int32_t first_input(const ipt_key_frame *f, int32_t level)
{
    int32_t at = 1; /* input_blocks.0 is conv_in */
    for (int32_t i = 0; i < level; i++)
        at += f->n_layer[i] + 1;
    return at;
}

static int32_t first_output(const ipt_key_frame *f, int32_t block)
{
    int32_t at = 0;
    for (int32_t i = 0; i < block; i++)
        at += f->n_layer[f->n_level - 1 - i] + 1;
    return at;
}

/* Value of one placeholder; false when the numbers are outside the model. */
static bool value_of(char c, const ipt_key_frame *f, const bound *b, int32_t *v)
{
    bool inside = f && b->i >= 0 && b->i < f->n_level;
    switch (c) {
    case 'i':
        *v = b->i;
        return true;
    case 'j':
        *v = b->j;
        return true;
    case 'k':
        *v = 2 * b->j;
        return true;
    case 'n':
        *v = b->j + 1;
        return true;
    default:
        break;
    }
    if (!inside)
        return false;
    int32_t up_layers = f->n_layer[f->n_level - 1 - b->i] + 1;
    switch (c) {
    case 'D':
        *v = first_input(f, b->i) + b->j;
        return b->j < f->n_layer[b->i];
    case 'S':
        *v = first_input(f, b->i) + f->n_layer[b->i];
        return b->i + 1 < f->n_level;
    case 'U':
        *v = first_output(f, b->i) + b->j;
        return b->j < up_layers;
    case 'V':
        *v = first_output(f, b->i) + up_layers - 1;
        return true;
    case 'W':
        *v = f->up_attn[b->i] ? 2 : 1;
        return true;
    case 'R':
        *v = f->n_level - 1 - b->i;
        return true;
    default:
        return false;
    }
}

static bool append(char *buf, size_t n, size_t *at, const char *s)
{
    size_t len = strlen(s);
    if (*at + len >= n)
        return false;
    memcpy(buf + *at, s, len + 1);
    *at += len;
    return true;
}

static bool emit(const char *form, const ipt_key_frame *f, const bound *b, char *buf, size_t n,
                 size_t *at)
{
    char one[16];
    for (const char *p = form; *p; p++) {
        if (*p == '{') {
            int32_t v = 0;
            if (!value_of(p[1], f, b, &v))
                return false;
            snprintf(one, sizeof one, "%d", (int)v);
            p += 2;
        } else {
            one[0] = *p;
            one[1] = '\0';
        }
        if (!append(buf, n, at, one))
            return false;
    }
    return true;
}

/* The rest of the name after a rule's match, its first words renamed by the rule's leaf table. */
static bool emit_leaf(const ipt_leaf_rule *leaf, const char *rest, char *buf, size_t n, size_t *at)
{
    for (; leaf && leaf->canonical; leaf++) {
        size_t len = strlen(leaf->canonical);
        if (strncmp(rest, leaf->canonical, len) == 0)
            return append(buf, n, at, leaf->foreign) && append(buf, n, at, rest + len);
    }
    return append(buf, n, at, rest);
}

bool ipt_keymap_emit(ipt_layout layout, const ipt_key_frame *f, const char *canonical, int alt,
                     char *buf, size_t n, ipt_key_part *part)
{
    int seen = 0;
    *part = (ipt_key_part){0};
    if (n == 0)
        return false;
    for (const ipt_key_rule *r = ipt_key_rules(layout); r->pattern; r++) {
        bound b = {0};
        size_t len = match(r->pattern, canonical, &b), at = 0;
        if (len == 0 && r->pattern[0])
            continue;
        if (r->whole && canonical[len])
            continue;
        if (seen++ < alt)
            continue;
        buf[0] = '\0';
        part->third = r->third;
        part->transposed = r->transposed;
        return emit(r->form, f, &b, buf, n, &at) &&
               emit_leaf(r->leaf, canonical + len, buf, n, &at);
    }
    return false;
}

void ipt_key_frame_unet(const ipt_unet_config *c, ipt_key_frame *f)
{
    *f = (ipt_key_frame){.n_level = c->n_level};
    for (int i = 0; i < IPT_MAX_LEVEL; i++) {
        f->n_layer[i] = c->n_layer[i];
        f->up_attn[i] = c->up_attn[i];
    }
}

void ipt_key_frame_vae(const ipt_vae_config *c, ipt_key_frame *f)
{
    *f = (ipt_key_frame){.n_level = c->n_level};
    for (int i = 0; i < c->n_level; i++)
        f->n_layer[i] = c->n_layer;
}
