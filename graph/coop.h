/* graph/coop.h - how a product is cut for matrix units (shaders/gemm_coop.glsl). */
#ifndef IPT_GRAPH_COOP_H
#define IPT_GRAPH_COOP_H

#include "vk/vk.h"

typedef struct ipt_coop_tile {
    uint32_t threads;      /* of a workgroup; 0: the device or the product does not suit */
    uint32_t bm, bn, bk;   /* its results, and k's at a time */
    uint32_t down, across; /* its subgroups */
    uint32_t parts;        /* workgroups that share the k's of the same results */
} ipt_coop_tile;

/* The tile for rows x cols results of `taps` x `k` products each, f16 operands.  Pure. */
ipt_coop_tile ipt_coop_choose(const ipt_traits *dev, int64_t rows, int32_t cols, int32_t taps,
                              int32_t k);

#endif
