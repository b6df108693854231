// shaders/gemm_tile.comp - matrix product and implicit-GEMM convolution over shared-memory tiles,
// for GPUs.
//
// Shapes and layouts: gemm_iface.glsl.  128 invocations make 64 x 64 results, 8 x 4 each, 16 k's
// (4 quads) at a time: invocation i owns columns 4 (i % 16).. and rows 8 (i / 16)..; the next
// slice is fetched into registers while the present one is multiplied.  `a` lies transposed,
// [k][row]: the 16 invocations of one row block read the same words (broadcast), those of one
// column block neighbouring quads of `b`.  Both arrays are padded by one quad against bank
// conflicts.
// -DQ8: panels hold q8, see q8.glsl.
// Grid: x = row tiles, y = column tiles.  Shared memory: 2 x 16 x 68 floats = 8.5 KiB.
#version 450
//! variant f32
//! variant f16 -DACT_F16
//! variant q32 -DQ8
//! variant q16 -DQ8 -DACT_F16
#extension GL_GOOGLE_include_directive : require
#include "gemm_iface.glsl"

layout(local_size_x = 128) in;
layout(constant_id = 0) const int B16 = 0; // panels hold pairs of f16
layout(constant_id = 1) const int MODE = 0;
layout(constant_id = 2) const int HAS = 0;
const int BM = 64, BN = 64, QK = 4; // rows, columns, quads of k per slice
const int PITCH = 17;               // quads per k in shared memory: 64 columns and padding

shared float a_tile[QK * 4 * PITCH * 4];
shared vec4 b_tile[QK * 4 * PITCH];

vec4 a_next[2];
uvec4 b_next[2];
#ifdef Q8
#include "q8.glsl"

// Of b 4 quads of k x 16 quads of columns: the first 64 invocations fetch one each, with scales.
vec4 b_scale;

void fetch_b(int id, int panel_at, int quad)
{
    int block = panel_at + (quad >> 3) * Q8_BLOCK, lane = id & 7;
    if (id < 64) {
        b_scale = q8_scales(LOAD_B(block + (lane >> 1)), lane);
        b_next[0] = LOAD_B(block + 4 + (quad & 7) * 8 + lane);
    }
}
#endif

// Fetches the slice that starts at quad `q` of a tap: 64 rows x 4 quads of a, and of b 16 k's (8
// pairs) x 16 quads.
void fetch(int id, int from[2], int panel_at, int tap, int q)
{
    [[unroll]] for (int i = 0; i < 2; i++) {
        int at = q + (id & 3);
        a_next[i] = from[i] >= 0 && at < pc.quads ? LOAD_A(from[i] + at) : vec4(0);
    }
#ifdef Q8
    fetch_b(id, panel_at, tap * pc.quads + q + (id >> 4));
#else
    [[unroll]] for (int i = 0; i < 2; i++) {
        int row = (id >> 4) + i * 8; // k, or pair of k's
        int quad = q + (B16 != 0 ? row >> 1 : row >> 2);
        int at = B16 != 0 ? (tap * pc.quads + q) * 2 + row : (tap * pc.quads + q) * 4 + row;
        if (B16 == 0 || i == 0)
            b_next[i] = quad < pc.quads ? LOAD_B(panel_at + at * 8) : uvec4(0);
    }
#endif
}

void keep(int id)
{
    [[unroll]] for (int i = 0; i < 2; i++) {
        int row = (id >> 2) + i * 32;
        [[unroll]] for (int c = 0; c < 4; c++)
            a_tile[((id & 3) * 4 + c) * PITCH * 4 + row] = a_next[i][c];
    }
#ifdef Q8
    if (id < 64)
        [[unroll]] for (int k = 0; k < 4; k++)
            b_tile[((id >> 4) * 4 + k) * PITCH + (id & 15)] = q8_values(b_next[0], k) * b_scale;
#else
    if (B16 != 0) {
        int k = (id >> 4) * 2;
        vec2 p0 = unpackHalf2x16(b_next[0].x), p1 = unpackHalf2x16(b_next[0].y);
        vec2 p2 = unpackHalf2x16(b_next[0].z), p3 = unpackHalf2x16(b_next[0].w);
        b_tile[k * PITCH + (id & 15)] = vec4(p0.x, p1.x, p2.x, p3.x);
        b_tile[(k + 1) * PITCH + (id & 15)] = vec4(p0.y, p1.y, p2.y, p3.y);
    } else {
        [[unroll]] for (int i = 0; i < 2; i++)
            b_tile[((id >> 4) + i * 8) * PITCH + (id & 15)] = uintBitsToFloat(b_next[i]);
    }
#endif
}

void main()
{
    int id = int(gl_LocalInvocationID.x);
    int first = int(gl_WorkGroupID.x) * BM;
    int column = int(gl_WorkGroupID.y) * BN; // among the bound panels
    int depth = pc.taps * pc.quads;

    // What this invocation fetches.
    ivec3 origin[2];
    int from[2];
    [[unroll]] for (int i = 0; i < 2; i++) {
        int m = pc.row0 + min(first + (id >> 2) + i * 32, pc.rows - 1);
        origin[i] = gemm_origin(m);
        from[i] = m * pc.quads - pc.a_first;
    }
    int quad = (column >> 2) + (id & 15);
#ifdef Q8
    int panel_at = min(quad >> 3, pc.panels - 1) * (depth >> 3) * Q8_BLOCK;
#else
    int panel_at = min(quad >> 3, pc.panels - 1) * depth * (B16 != 0 ? 16 : 32) + (quad & 7);
#endif

    vec4 acc[8];
    [[unroll]] for (int i = 0; i < 8; i++)
        acc[i] = vec4(0);
    int row = (id >> 4) * 8;

    for (int tap = 0; tap < pc.taps; tap++) {
        if (MODE != PLAIN) {
            int ky = tap / pc.kw;
            [[unroll]] for (int i = 0; i < 2; i++)
                from[i] = gemm_pixel(MODE, origin[i], ky, tap - ky * pc.kw);
        }
        fetch(id, from, panel_at, tap, 0);
        for (int q = 0; q < pc.quads; q += QK) {
            keep(id);
            barrier();
            if (q + QK < pc.quads)
                fetch(id, from, panel_at, tap, q + QK);
            [[unroll]] for (int k = 0; k < QK * 4; k++) {
                vec4 b = b_tile[k * PITCH + (id & 15)];
                [[unroll]] for (int i = 0; i < 8; i++)
                    acc[i] += a_tile[k * PITCH * 4 + row + i] * b;
            }
            barrier();
        }
    }

    int col = pc.col0 + quad * 4;
    if (col >= pc.cols || quad >= pc.panels * 8)
        return;
    gemm_begin(first + row, col);
    vec4 bias = (HAS & HAS_BIAS) != 0 ? gemm_bias(col) : vec4(0);
    [[unroll]] for (int i = 0; i < 8; i++)
        gemm_store(HAS, i, col, acc[i] + bias);
}
