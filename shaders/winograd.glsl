// shaders/winograd.glsl - what the three kernels of a 3 x 3 convolution by Winograd's F(4 x 4, 3 x
// 3) share (graph/winograd.c): push constants and the transforms of one line.
//
// Interpolation points 0, a, -a, b, -b and infinity with a = 2/3, b = 3/2: in f32 the result's
// error is 2.6 times the plain sum's (NMSE), with the usual 1 and 2 it is 14 times.  Since a b = 1
// the transforms are as short. Names as in Lavin and Gray 2015: d, v the picture's tiles and their
// transforms, g, u the weight's, m their products, y the result.
#ifndef IPT_WINOGRAD_GLSL
#define IPT_WINOGRAD_GLSL
#include "common.glsl"

layout(push_constant) uniform push_block {
    int n;             // work items
    int tiles, each;   // tiles of this band; rows that v and m have for each of the 36 positions
    int tile0, tw, th; // number of the first tile; tiles in a line and in a column of an image
    int quads;         // of a row of v or m; of a position of u
    int h, w, vh, vw;  // stored input, and its enlarged size
    int pad;
    int oh, ow;         // output
    int cols, col0;     // columns of the whole result; first one of m
    int ldy, y0, first; // elements: row pitch of y, its first column, what comes before the binding
    int panel0, depth;  // first panel of the weight; rows of a panel under one tap
    int shift;          // log2 of the enlargement, where it is one of 2^shift times
    int adds;           // HAS_BIAS, HAS_T
} pc;

const float A = 2.0 / 3.0, B = 1.5, A2 = A * A, B2 = B * B, A3 = A2 * A, B3 = B2 * B;
const float FA = 1.0 / (2.0 * A2 * (A2 - B2)), FB = 1.0 / (2.0 * B2 * (B2 - A2));

// v[at + i step], i < 6: six values of a tile's line become their transforms.
#define TRANSFORM_D(v, at, step)                                                                   \
    {                                                                                              \
        vec4 d0 = v[at], d1 = v[at + step], d2 = v[at + 2 * step], d3 = v[at + 3 * step];          \
        vec4 d4 = v[at + 4 * step], d5 = v[at + 5 * step];                                         \
        vec4 ea = d4 - B2 * d2, oa = A * d3 - B * d1, eb = d4 - A2 * d2, ob = B * d3 - A * d1;     \
        v[at] = d0 - (A2 + B2) * d2 + d4;                                                          \
        v[at + step] = ea + oa;                                                                    \
        v[at + 2 * step] = ea - oa;                                                                \
        v[at + 3 * step] = eb + ob;                                                                \
        v[at + 4 * step] = eb - ob;                                                                \
        v[at + 5 * step] = d1 - (A2 + B2) * d3 + d5;                                               \
    }

// The same of a weight: w0, w1, w2 become v[at + i step], i < 6; they may lie there.
#define TRANSFORM_G(w0, w1, w2, v, at, step)                                                       \
    {                                                                                              \
        vec4 g0 = w0, g1 = w1, g2 = w2;                                                            \
        vec4 ea = FA * g0 + (FA * A2) * g2, oa = (FA * A) * g1;                                    \
        vec4 eb = FB * g0 + (FB * B2) * g2, ob = (FB * B) * g1;                                    \
        v[at] = g0;                                                                                \
        v[at + step] = ea + oa;                                                                    \
        v[at + 2 * step] = ea - oa;                                                                \
        v[at + 3 * step] = eb + ob;                                                                \
        v[at + 4 * step] = eb - ob;                                                                \
        v[at + 5 * step] = g2;                                                                     \
    }

// The way back: six products v[at + i step] become four results, in the first four places.
#define TRANSFORM_M(v, at, step)                                                                   \
    {                                                                                              \
        vec4 m0 = v[at], m5 = v[at + 5 * step];                                                    \
        vec4 sa = v[at + step] + v[at + 2 * step], ra = v[at + step] - v[at + 2 * step];           \
        vec4 sb = v[at + 3 * step] + v[at + 4 * step], rb = v[at + 3 * step] - v[at + 4 * step];   \
        v[at] = m0 + sa + sb;                                                                      \
        v[at + step] = A * ra + B * rb;                                                            \
        v[at + 2 * step] = A2 * sa + B2 * sb;                                                      \
        v[at + 3 * step] = A3 * ra + B3 * rb + m5;                                                 \
    }
#endif
