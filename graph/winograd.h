/* graph/winograd.h - 3 x 3 convolutions of stride 1 with a quarter of the multiplications, on
 * devices whose kernels are row-blocked (CPUs): Winograd's F(4 x 4, 3 x 3), Lavin and Gray, "Fast
 * Algorithms for Convolutional Neural Networks" (2015).  gemm.c asks; nobody else does. */
#ifndef IPT_GRAPH_WINOGRAD_H
#define IPT_GRAPH_WINOGRAD_H
#include "graph/gemm.h"

/* Whether this convolution is one of them and faster so.  The answer depends on one image's size,
 * not on how many there are: a picture has the same bits alone and in a batch. */
bool ipt_winograd_fits(const ipt_launch *l, const ipt_gemm *g);
/* Appends the dispatches and takes three pieces of scratch, 64 MiB at most together unless one line
 * of tiles needs more.  Errors: those of ipt_gemm_launch. */
IPT_CHECKED ipt_status ipt_winograd_launch(ipt_launch *l, const ipt_gemm *g);
#endif
