/* graph/coop.c - chooses tiles of gemm_coop.glsl: large ones where there are enough of them to fill
 * a device, small ones else, and parts of the depth where even these are few. */
#include "graph/coop.h"

#include "core/core.h"

/* Larger ones reread less, smaller ones fill more of the device. */
static const struct shape {
    uint32_t threads, bm, bn, bk;
} shapes[] = {{256, 128, 128, 32}, {128, 64, 64, 32}};
enum {
    FULL = 192,       /* workgroups that keep a large device busy (measured on an H200) */
    SHARED_OUT = 384, /* of small products' parts: each has little to do */
    LEAST_SLICES = 8, /* of a part */
    MAX_PARTS = 8
};

static uint64_t shared_bytes(const ipt_traits *dev, const struct shape *s)
{
    const uint64_t operands = (uint64_t)s->bm * (s->bk / 8 + 1) + (uint64_t)s->bk * (s->bn / 8 + 1),
                   sums = (uint64_t)s->threads / dev->subgroup * dev->coop_m * (dev->coop_n + 4);
    return 2 * operands * 16 + sums * 4;
}

/* Shares a tile out among its subgroups, as squarely as whole matrices allow. */
static bool share_out(const ipt_traits *dev, const struct shape *s, ipt_coop_tile *t)
{
    const uint32_t subgroups = s->threads / dev->subgroup;
    uint32_t best = UINT32_MAX;
    if (dev->subgroup == 0 || s->threads % dev->subgroup || s->threads > dev->max_invocations ||
        s->bk % dev->coop_k || s->bm * s->bk / 8 % s->threads ||
        s->bk / 2 * (s->bn / 8) % s->threads || shared_bytes(dev, s) > dev->shared_bytes)
        return false;
    for (uint32_t across = 1; across <= subgroups; across *= 2) {
        const uint32_t down = subgroups / across;
        if (down * across != subgroups || s->bm % (down * dev->coop_m) ||
            s->bn % (across * dev->coop_n) || s->bm / down + s->bn / across >= best)
            continue;
        best = s->bm / down + s->bn / across;
        *t = (ipt_coop_tile){s->threads, s->bm, s->bn, s->bk, down, across, 1};
    }
    return best < UINT32_MAX;
}

static uint64_t tiles_of(const ipt_coop_tile *t, int64_t rows, int32_t cols)
{
    return ((uint64_t)rows + t->bm - 1) / t->bm * (((uint64_t)cols + t->bn - 1) / t->bn);
}

ipt_coop_tile ipt_coop_choose(const ipt_traits *dev, int64_t rows, int32_t cols, int32_t taps,
                              int32_t k)
{
    ipt_coop_tile t = {0};
    if (dev->coop_m == 0 || dev->subgroup == 0)
        return t;
    for (size_t i = 0; i < IPT_COUNT(shapes); i++) {
        ipt_coop_tile next = {0};
        if (share_out(dev, &shapes[i], &next) &&
            (t.threads == 0 || tiles_of(&t, rows, cols) < FULL))
            t = next;
    }
    if (t.threads == 0)
        return t;
    const uint64_t tiles = tiles_of(&t, rows, cols),
                   slices = (uint64_t)taps * (((uint64_t)k + t.bk - 1) / t.bk);
    uint64_t parts = tiles < FULL ? (SHARED_OUT + tiles - 1) / tiles : 1;
    parts = parts < slices / LEAST_SLICES ? parts : slices / LEAST_SLICES;
    parts = parts < MAX_PARTS ? parts : MAX_PARTS;
    t.parts = parts > 1 ? (uint32_t)parts : 1;
    return t;
}
