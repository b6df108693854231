// shaders/fold.comp - adds a low-rank product to a weight that lies in packed panels of 32 columns
// (graph/pack.c), in place:
//
//   w[panel][k][c] += sum_r a[k, r] b[panel][r, c]
//
// a: depth rows of `quads` quads of r; b: panels of 32 columns, 4 * quads rows each, both f32.
// Sums are f32, rounded once to the panels' type, to the nearest and ties to even.
// One subgroup per workgroup makes TM rows x 4 SG columns, as gemm.comp: lane l owns columns
// 4l..4l+3.  With -DSHUFFLE rows of `a` are fetched with lanes = rows and broadcast by shuffle
// (CPU devices), else every lane fetches them.
// Grid: x = row tiles, y = column tiles.  Shared memory: none.
#version 450
//! variant texel -DSHUFFLE -DTEXEL
//! variant shuffle -DSHUFFLE
//! variant plain
#extension GL_GOOGLE_include_directive : require
#ifdef SHUFFLE
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
#include "common.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const int SG = 8;  // invocations of a workgroup, with -DSHUFFLE a subgroup
layout(constant_id = 1) const int TM = 16; // rows, a multiple of SG and of 4
layout(constant_id = 2) const int W16 = 0; // panels hold pairs of f16

layout(push_constant) uniform push_block {
    int depth;  // rows of a panel, a multiple of 4
    int quads;  // of r
    int panels; // bound
} pc;

#ifdef TEXEL
layout(binding = 0, rgba32f) uniform readonly imageBuffer a_view;
layout(binding = 1, rgba32f) uniform readonly imageBuffer b_view;
layout(binding = 3, rgba32ui) uniform readonly uimageBuffer w_view; // the same memory as w_data
#define LOAD_A(i) imageLoad(a_view, i)
#define LOAD_B(i) imageLoad(b_view, i)
#define LOAD_W(i) imageLoad(w_view, i)
#else
layout(binding = 0, std430) readonly buffer a_block { vec4 a_data[]; };
layout(binding = 1, std430) readonly buffer b_block { vec4 b_data[]; };
#define LOAD_A(i) a_data[i]
#define LOAD_B(i) b_data[i]
#define LOAD_W(i) w_data[i]
#endif
layout(binding = 2, std430) buffer w_block { uvec4 w_data[]; };

vec4 acc[TM];
vec4 b[4];

// acc[rows from `i`] += quad a of r's times b; one row a lane, or one row
void multiply(int i, vec4 a)
{
#ifdef SHUFFLE
    [[unroll]] for (int l = 0; l < SG; l++) {
        vec4 sum = acc[i + l];
        sum += subgroupShuffle(a.x, uint(l)) * b[0];
        sum += subgroupShuffle(a.y, uint(l)) * b[1];
        sum += subgroupShuffle(a.z, uint(l)) * b[2];
        sum += subgroupShuffle(a.w, uint(l)) * b[3];
        acc[i + l] = sum;
    }
#else
    acc[i] += a.x * b[0] + a.y * b[1] + a.z * b[2] + a.w * b[3];
#endif
}

// As ipt_f32_to_f16: packHalf2x16 may round either way, and is slow on llvmpipe 22.3.6.
uvec4 to_half(vec4 v)
{
    uvec4 u = floatBitsToUint(v), mag = u & 0x7fffffffu;
    uvec4 normal = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
    uvec4 tiny = uvec4(roundEven(abs(v) * 16777216.0));
    uvec4 h = mix(normal, tiny, lessThan(mag, uvec4(0x38800000u)));
    return ((u >> 16) & 0x8000u) |
           mix(h, uvec4(0x7c00u), greaterThanEqual(mag, uvec4(0x477ff000u)));
}

void main()
{
#ifdef SHUFFLE
    int lane = int(gl_SubgroupInvocationID);
#else
    int lane = int(gl_LocalInvocationID.x);
#endif
    int first = int(gl_WorkGroupID.x) * TM;
    int quad = int(gl_WorkGroupID.y) * SG + lane; // of columns
    int panel = min(quad >> 3, pc.panels - 1);
    bool is_bound = panel == quad >> 3;
    int b_at = panel * pc.quads * 32 + (quad & 7);

    [[unroll]] for (int i = 0; i < TM; i++)
        acc[i] = vec4(0);
    for (int q = 0; q < pc.quads; q++) {
        [[unroll]] for (int i = 0; i < 4; i++)
            b[i] = LOAD_B(b_at + (q * 4 + i) * 8);
#ifdef SHUFFLE
        [[unroll]] for (int i = 0; i < TM; i += SG)
            multiply(i, LOAD_A(min(first + i + lane, pc.depth - 1) * pc.quads + q));
#else
        [[unroll]] for (int i = 0; i < TM; i++)
            multiply(i, LOAD_A(min(first + i, pc.depth - 1) * pc.quads + q));
#endif
    }
    if (!is_bound)
        return;
    if (W16 != 0) {
        [[unroll]] for (int i = 0; i < TM; i += 2) {
            int at = ((panel * pc.depth + first + i) >> 1) * 8 + (quad & 7);
            if (first + i < pc.depth) {
                uvec4 w = LOAD_W(at);
                vec2 p0 = unpackHalf2x16(w.x), p1 = unpackHalf2x16(w.y);
                vec2 p2 = unpackHalf2x16(w.z), p3 = unpackHalf2x16(w.w);
                uvec4 even = to_half(vec4(p0.x, p1.x, p2.x, p3.x) + acc[i]);
                uvec4 odd = to_half(vec4(p0.y, p1.y, p2.y, p3.y) + acc[i + 1]);
                w_data[at] = even | odd << 16;
            }
        }
    } else {
        [[unroll]] for (int i = 0; i < TM; i++) {
            int at = (panel * pc.depth + first + i) * 8 + (quad & 7);
            if (first + i < pc.depth)
                w_data[at] = floatBitsToUint(uintBitsToFloat(LOAD_W(at)) + acc[i]);
        }
    }
}
