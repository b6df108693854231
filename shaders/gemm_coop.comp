// shaders/gemm_coop.comp - matrix product and implicit-GEMM convolution on cooperative matrices,
// for GPUs with matrix units.
//
// Shapes and layouts: gemm_iface.glsl; f16 operands only, sums in f32.  As in gemm_tile.comp 128
// invocations make 64 x 64 results, here 32 k's (8 quads) at a time.  The subgroups share the
// (64 / TM) x (64 / TN) matrices of results, COUNT each in row order; their sums pass through
// shared memory to the epilogue, where an invocation owns 8 rows x 4 columns.  Rows of a_tile and
// b_tile are padded by 16 bytes against bank conflicts (and stay aligned for matrix loads). Grid: x
// = row tiles, y = column tiles.  Shared memory: 5 + 4.5 + 17 KiB = 26.5 KiB.
#version 450
//! requires GL_KHR_cooperative_matrix
//! variant f16 -DACT_F16
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_shader_subgroup_basic : require
#include "gemm_iface.glsl"

layout(local_size_x = 128) in;
layout(constant_id = 0) const int TM = 16; // the device's matrix shape
layout(constant_id = 1) const int TN = 16;
layout(constant_id = 2) const int TK = 16;
layout(constant_id = 3) const int COUNT = 4; // result matrices of a subgroup
layout(constant_id = 4) const int MODE = 0;
layout(constant_id = 5) const int HAS = 0;
const int BM = 64, BN = 64, QK = 8; // rows, columns, quads of k per slice
const int PITCH_A = QK + 2;         // quads per row of a, per k of b, floats per row of sums
const int PITCH_B = BN / 4 + 2;
const int PITCH_C = BN + 4;
const int ACROSS = BN / TN; // result matrices side by side

shared f16vec4 a_tile[BM * PITCH_A];
shared f16vec4 b_tile[QK * 4 * PITCH_B];
shared float c_tile[BM * PITCH_C];

f16vec4 a_next[4];
uvec4 b_next[2];

// Fetches the slice that starts at quad `q` of a tap: 64 rows x 8 quads of a (invocation i: quad
// i % 8 of every sixteenth row), 16 pairs of k's x 16 quads of b.
void fetch(int id, int from[4], int panel_at, int tap, int q)
{
    int quad = q + (id & 7);
    [[unroll]] for (int i = 0; i < 4; i++)
        a_next[i] = from[i] >= 0 && quad < pc.quads ? a_data[from[i] + quad] : f16vec4(0);
    [[unroll]] for (int i = 0; i < 2; i++) {
        int pair = (id >> 4) + i * 8;
        b_next[i] = q + (pair >> 1) < pc.quads
                        ? LOAD_B(panel_at + ((tap * pc.quads + q) * 2 + pair) * 8)
                        : uvec4(0);
    }
}

void keep(int id)
{
    [[unroll]] for (int i = 0; i < 4; i++)
        a_tile[((id >> 3) + i * 16) * PITCH_A + (id & 7)] = a_next[i];
    [[unroll]] for (int i = 0; i < 2; i++) {
        int at = ((id >> 4) + i * 8) * 2 * PITCH_B + (id & 15);
        vec2 p0 = unpackHalf2x16(b_next[i].x), p1 = unpackHalf2x16(b_next[i].y);
        vec2 p2 = unpackHalf2x16(b_next[i].z), p3 = unpackHalf2x16(b_next[i].w);
        b_tile[at] = f16vec4(p0.x, p1.x, p2.x, p3.x);
        b_tile[at + PITCH_B] = f16vec4(p0.y, p1.y, p2.y, p3.y);
    }
}

void main()
{
    int id = int(gl_LocalInvocationID.x);
    int first = int(gl_WorkGroupID.x) * BM;
    int column = int(gl_WorkGroupID.y) * BN; // among the bound panels
    int depth = pc.taps * pc.quads;

    // What this invocation fetches.
    ivec3 origin[4];
    int from[4];
    [[unroll]] for (int i = 0; i < 4; i++) {
        int m = pc.row0 + min(first + (id >> 3) + i * 16, pc.rows - 1);
        origin[i] = gemm_origin(m);
        from[i] = m * pc.quads - pc.a_first;
    }
    int quad = (column >> 2) + (id & 15);
    int panel_at = min(quad >> 3, pc.panels - 1) * depth * 16 + (quad & 7);

    // Matrices of a subgroup share rows as long as they fit side by side (all numbers are powers
    // of two), so one matrix of a serves up to ACROSS of them.
    int matrix = int(gl_SubgroupID) * COUNT;
    coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator> sum[COUNT];
    coopmat<float16_t, gl_ScopeSubgroup, TM, TK, gl_MatrixUseA> a;
    coopmat<float16_t, gl_ScopeSubgroup, TK, TN, gl_MatrixUseB> b;
    [[unroll]] for (int i = 0; i < COUNT; i++)
        sum[i] = coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator>(0);

    for (int tap = 0; tap < pc.taps; tap++) {
        if (MODE != PLAIN) {
            int ky = tap / pc.kw;
            [[unroll]] for (int i = 0; i < 4; i++)
                from[i] = gemm_pixel(MODE, origin[i], ky, tap - ky * pc.kw);
        }
        fetch(id, from, panel_at, tap, 0);
        for (int q = 0; q < pc.quads; q += QK) {
            keep(id);
            barrier();
            if (q + QK < pc.quads)
                fetch(id, from, panel_at, tap, q + QK);
            [[unroll]] for (int k = 0; k < QK * 4; k += TK) {
                [[unroll]] for (int i = 0; i < COUNT; i++) {
                    int row = (matrix + i) / ACROSS * TM;
                    int col = (matrix + i) % ACROSS * TN;
                    if (i % ACROSS == 0)
                        coopMatLoad(a, a_tile, row * PITCH_A + k / 4, PITCH_A,
                                    gl_CooperativeMatrixLayoutRowMajor);
                    coopMatLoad(b, b_tile, k * PITCH_B + col / 4, PITCH_B,
                                gl_CooperativeMatrixLayoutRowMajor);
                    sum[i] = coopMatMulAdd(a, b, sum[i]);
                }
            }
            barrier();
        }
    }
    [[unroll]] for (int i = 0; i < COUNT; i++) {
        int row = (matrix + i) / ACROSS * TM;
        int col = (matrix + i) % ACROSS * TN;
        coopMatStore(sum[i], c_tile, row * PITCH_C + col, PITCH_C,
                     gl_CooperativeMatrixLayoutRowMajor);
    }
    barrier();

    int col = pc.col0 + quad * 4;
    if (col >= pc.cols || quad >= pc.panels * 8)
        return;
    int row = (id >> 4) * 8;
    gemm_begin(first + row, col);
    vec4 bias = (HAS & HAS_BIAS) != 0 ? gemm_bias(col) : vec4(0);
    [[unroll]] for (int i = 0; i < 8; i++) {
        int at = (row + i) * PITCH_C + (id & 15) * 4;
        gemm_store(HAS, i, col,
                   vec4(c_tile[at], c_tile[at + 1], c_tile[at + 2], c_tile[at + 3]) + bias);
    }
}
