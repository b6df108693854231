// shaders/winograd_g.comp - the transforms of a 3 x 3 weight's panels.
//   g: packed panels (graph/pack.c) of nine taps -> u [36][panels] f32 panels of one tap
// One invocation: four columns of one k, of f16 panels two k's, of q8 (-DQ8) four.
// Grid: group_linear.  Shared memory: none.
#version 450
//! variant f
//! variant q8 -DQ8
#extension GL_GOOGLE_include_directive : require
#include "winograd.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const int WG = 64;
layout(constant_id = 1) const int B16 = 0; // panels hold pairs of f16
layout(binding = 0, rgba32ui) uniform readonly uimageBuffer g_view;
layout(binding = 1, std430) writeonly buffer u_block { vec4 u_data[]; };

vec4 g[9];
vec4 u[36];

void transform()
{
    [[unroll]] for (int k = 0; k < 3; k++)
        TRANSFORM_G(g[k], g[3 + k], g[6 + k], u, k, 6)
    [[unroll]] for (int i = 0; i < 6; i++)
        TRANSFORM_G(u[i * 6], u[i * 6 + 1], u[i * 6 + 2], u, i * 6, 1)
}

#ifdef Q8
#include "q8.glsl"

void main()
{
    int item = int(group_linear()) * WG + int(gl_LocalInvocationID.x);
    int rows = pc.depth >> 2; // quads of k under a tap
    int at = min(item, pc.n - 1), panel = at / (rows * 8), rest = at - panel * rows * 8;
    int lane = rest & 7, row = rest >> 3, tap = (pc.depth >> 5) * Q8_BLOCK; // of a tap
    int from = (pc.panel0 + panel) * tap * 9 + (row >> 3) * Q8_BLOCK;       // under the first
    uvec4 raw[9];
    vec4 scale[9];
    [[unroll]] for (int t = 0; t < 9; t++) {
        scale[t] = q8_scales(imageLoad(g_view, from + t * tap + (lane >> 1)), lane);
        raw[t] = imageLoad(g_view, from + t * tap + 4 + (row & 7) * 8 + lane);
    }
    int to = panel * pc.depth * 8 + row * 32 + lane;
    [[dont_unroll]] for (int k = 0; k < 4; k++)
    {
        [[unroll]] for (int t = 0; t < 9; t++)
            g[t] = scale[t] * q8_values(raw[t], k);
        transform();
        if (item < pc.n)
            [[unroll]] for (int i = 0; i < 36; i++)
                u_data[i * pc.quads + to + k * 8] = u[i];
    }
}
#else
void main()
{
    int item = int(group_linear()) * WG + int(gl_LocalInvocationID.x);
    int rows = B16 != 0 ? pc.depth >> 1 : pc.depth; // of quads, of a panel and tap
    int at = min(item, pc.n - 1), panel = at / (rows * 8), rest = at - panel * rows * 8;
    int from = (pc.panel0 + panel) * rows * 72 + rest, lane = rest & 7, row = rest >> 3;
    uvec4 raw[9];
    [[unroll]] for (int t = 0; t < 9; t++)
        raw[t] = imageLoad(g_view, from + t * rows * 8);
    int to = panel * pc.depth * 8 + lane;
    [[dont_unroll]] for (int odd = 0; odd <= B16; odd++)
    { // half the code to compile
        [[unroll]] for (int t = 0; t < 9; t++) {
            uvec4 pair = odd != 0 ? raw[t] >> 16 : raw[t];
            g[t] = B16 == 0 ? uintBitsToFloat(raw[t])
                            : vec4(unpackHalf2x16(pair.x).x, unpackHalf2x16(pair.y).x,
                                   unpackHalf2x16(pair.z).x, unpackHalf2x16(pair.w).x);
        }
        transform();
        if (item < pc.n)
            [[unroll]] for (int i = 0; i < 36; i++)
                u_data[i * pc.quads + to + (row * (1 + B16) + odd) * 8] = u[i];
    }
}
#endif
