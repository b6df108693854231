// shaders/pack.comp - copies an operand of a matrix product into the layout gemm reads.
//
// Result, one quad of four elements per invocation: panels of 32 columns (quad = 4 columns of one
// k, f32, zeros behind the last panel) or rows (quad = 4 k's of one row, type of the source); what
// lies outside n x k is zero.  Source element (n, tap, k):
//   STRIDED  src[base + n sn + tap st + k sk]
//   GATHER   channel n of the pixel that output pixel k sees under tap (ky, kx)
//   PANEL    packed panels of depth sk: column k, row (taps - 1 - tap) * sn + n
// Grid: group_linear.  Shared memory: none.
#version 450
//! variant f32
//! variant f16 -DACT_F16
//! variant q8 -DQ8
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const int WG = 64;
layout(constant_id = 1) const int MODE = 0;
layout(constant_id = 2) const int ROWS = 0;
layout(constant_id = 3) const int B16 = 0;  // PANEL: pairs of f16
layout(constant_id = 4) const int WALK = 0; // GATHER: as in gemm_iface.glsl
const int STRIDED = 0, GATHER = 1, PANEL = 2;

layout(push_constant) uniform push_block {
    int count, q0; // quads of this dispatch and the number of its first
    int n, taps, k, kpad;
    int base, sn, st, sk;
    int ow, opix, h, w, vh, vw, stride, pad, spread, ky, kx;
} pc;

layout(binding = 0, std430) readonly buffer src_block { ELT src_data[]; };
layout(binding = 0, std430) readonly buffer src_words { uint src_word[]; };
layout(binding = 1, std430) writeonly buffer dst_panels { vec4 dst_panel[]; };
layout(binding = 1, std430) writeonly buffer dst_rows { ELT4 dst_row[]; };

float gathered(int n, int p)
{
    int image = p / pc.opix;
    p -= image * pc.opix;
    int oy = p / pc.ow;
    int y = oy * pc.stride - pc.pad + pc.ky;
    int x = (p - oy * pc.ow) * pc.stride - pc.pad + pc.kx;
    bool inside = y >= 0 && x >= 0 && y < pc.vh && x < pc.vw;
    if (WALK == 2) { // enlarged input
        y = y * pc.h / pc.vh;
        x = x * pc.w / pc.vw;
    }
    int at = inside ? ((image * pc.h + y) * pc.w + x) * pc.sn + n : 0;
    float v = float(src_data[at]);
    return inside ? v : 0.0;
}

float element(int n, int depth)
{
    int tap = depth / pc.kpad;
    int k = depth - tap * pc.kpad;
    if (n >= pc.n || k >= pc.k)
        return 0.0;
    if (MODE == GATHER)
        return gathered(n, k);
    if (MODE == STRIDED)
        return float(src_data[pc.base + n * pc.sn + tap * pc.st + k * pc.sk]);
    int row = (pc.taps - 1 - tap) * pc.sn + n;
    int panel = k >> 5;
#ifdef Q8
    int block = (panel * (pc.sk >> 5) + (row >> 5)) * 272; // words of 32 rows
    uint scales = src_word[block + ((k & 31) >> 1)];
    uint word = src_word[block + 16 + ((row & 31) >> 2) * 32 + (k & 31)];
    float scale = unpackHalf2x16((k & 1) != 0 ? scales >> 16 : scales).x;
    return scale * float(bitfieldExtract(int(word), (row & 3) * 8, 8));
#else
    if (B16 == 0)
        return uintBitsToFloat(src_word[(panel * pc.sk + row) * 32 + (k & 31)]);
    vec2 pair = unpackHalf2x16(src_word[(panel * (pc.sk >> 1) + (row >> 1)) * 32 + (k & 31)]);
    return (row & 1) == 0 ? pair.x : pair.y;
#endif
}

void main()
{
    int at = int(group_linear()) * WG + int(gl_LocalInvocationID.x);
    if (at >= pc.count)
        return;
    int q = pc.q0 + at;
    int depth = pc.taps * pc.kpad;
    vec4 v = vec4(0);
    if (ROWS != 0) {
        int row = q / (depth >> 2);
        int k = (q - row * (depth >> 2)) << 2;
        [[unroll]] for (int c = 0; c < 4; c++)
            v[c] = element(row, k + c);
        dst_row[at] = ELT4(v);
    } else {
        int panel = q / (depth * 8);
        int rest = q - panel * depth * 8;
        int col = panel * 32 + (rest & 7) * 4;
        [[unroll]] for (int c = 0; c < 4; c++)
            v[c] = element(col + c, rest >> 3);
        dst_panel[at] = v;
    }
}
