/* graph/launch.c - helpers with which kernel functions describe their dispatches. */
#include "graph/op.h"

#include <string.h>

ipt_dispatch *ipt_launch_add(ipt_launch *l, const char *shader, const void *push, size_t push_bytes)
{
    if (l->n_d == l->cap_d) {
        size_t cap = l->cap_d ? l->cap_d * 2 : 4;
        ipt_dispatch *d = ipt_arena_alloc(l->arena, cap * sizeof *d);
        if (!d || push_bytes > IPT_MAX_PUSH) {
            l->status = d ? IPT_ERR_UNSUPPORTED : IPT_ERR_NOMEM;
            return NULL;
        }
        if (l->n_d)
            memcpy(d, l->d, l->n_d * sizeof *d);
        l->d = d;
        l->cap_d = cap;
    }
    ipt_dispatch *d = &l->d[l->n_d++];
    memset(d, 0, sizeof *d);
    d->k.shader = shader;
    d->k.push_bytes = (uint8_t)push_bytes;
    memcpy(d->push, push, push_bytes);
    d->groups[0] = d->groups[1] = d->groups[2] = 1;
    return d;
}

void ipt_launch_bind_range(ipt_dispatch *d, ipt_bind_kind kind, ipt_src src, int index, bool write,
                           uint64_t off, uint64_t bytes)
{
    if (!d || d->n_bind >= IPT_MAX_BIND)
        return;
    d->k.kind[d->n_bind] = kind;
    d->bind[d->n_bind++] = (ipt_bind){kind, src, (uint8_t)index, write, off, bytes};
    d->k.n_bind = d->n_bind;
}

void ipt_launch_bind(ipt_dispatch *d, ipt_bind_kind kind, ipt_src src, int index, bool write)
{
    ipt_launch_bind_range(d, kind, src, index, write, 0, 0);
}

void ipt_launch_bind_part(const ipt_launch *l, ipt_dispatch *d, const ipt_bind *part)
{
    uint64_t off = part->off / l->dev->align * l->dev->align;
    ipt_launch_bind_range(d, part->kind, part->src, part->index, part->write, off,
                          part->off + part->bytes - off);
}

void ipt_launch_spec(ipt_dispatch *d, uint32_t value)
{
    if (d && d->k.n_spec < IPT_MAX_SPEC)
        d->k.spec[d->k.n_spec++] = value;
}

int ipt_launch_scratch(ipt_launch *l, uint64_t bytes)
{
    if (l->n_scratch >= IPT_COUNT(l->scratch)) {
        l->status = IPT_ERR_UNSUPPORTED;
        return 0;
    }
    l->scratch[l->n_scratch] = bytes ? bytes : 16;
    return l->n_scratch++;
}

/* --- bands ---------------------------------------------------------------------------------- */
/* Rows after which an operand is aligned again; align is a power of two. */
static uint64_t granule_of(uint64_t align, uint64_t row)
{
    uint64_t low = row & (~row + 1); /* the largest power of two that divides a row */
    return low >= align ? 1 : align / low;
}

ipt_bands ipt_launch_bands(ipt_launch *l, uint64_t rows, const ipt_band_operand o[], int n)
{
    ipt_bands b = {.rows = rows, .size = rows, .granule = 1};
    for (int i = 0; i < n; i++) {
        uint64_t fit = l->dev->max_range / o[i].row, g = granule_of(l->dev->align, o[i].row);
        b.o[i] = o[i];
        b.size = fit < b.size ? fit : b.size;
        b.granule = g > b.granule ? g : b.granule;
    }
    if (b.size < rows)
        b.size -= b.size % b.granule;
    if (b.size == 0 && rows > 0 && l->status == IPT_OK)
        l->status = IPT_ERR_TOO_LARGE;
    return b;
}

bool ipt_bands_next(ipt_bands *b)
{
    b->first += b->n;
    uint64_t left = b->rows - b->first;
    b->n = left < b->size ? left : b->size;
    return b->n > 0;
}

bool ipt_bands_halve(ipt_bands *b)
{
    uint64_t half = b->n / 2 - b->n / 2 % b->granule;
    if (half == 0)
        return false;
    b->n = b->size = half;
    return true;
}

void ipt_bands_bind(ipt_dispatch *d, const ipt_bands *b, int i)
{
    const ipt_band_operand *o = &b->o[i];
    if (!d)
        return;
    ipt_launch_bind_range(d, IPT_BIND_SSBO, o->src, o->index, o->write, b->first * o->row,
                          b->n * o->row);
    d->no_wait = b->first > 0;
}

void ipt_launch_linear(const ipt_launch *l, ipt_dispatch *d, uint64_t n, uint32_t wg)
{
    if (!d)
        return;
    uint64_t groups = (n + wg - 1) / wg, limit = l->dev->max_group_count;
    if (groups <= limit) {
        d->groups[0] = (uint32_t)(groups ? groups : 1);
        return;
    }
    uint64_t rows = (groups + limit - 1) / limit;
    d->groups[1] = (uint32_t)rows;
    d->groups[0] = (uint32_t)((groups + rows - 1) / rows);
}
