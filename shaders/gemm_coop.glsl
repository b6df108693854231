// shaders/gemm_coop.glsl - matrix product and implicit-GEMM convolution on cooperative matrices.
//
// Shapes and layouts: gemm_iface.glsl; f16 operands only, sums in f32.  A workgroup makes BM x BN
// results, DOWN x ACROSS subgroups of it a rectangle of matrices each.  Slices of BK k's go through
// registers into one half of shared memory while the other half is multiplied: one barrier per
// slice.  Rows in shared memory are padded by 16 bytes, so that eight of them, 16 bytes each, lie
// in different banks.  Where a product is deep and has few results, workgroups z share its slices
// and store sums that gemm_parts.comp adds up (-DPARTS).  Else sums pass through shared memory,
// matrix by matrix, to the epilogue.  Grid: x = row tiles, y = column tiles, z = parts.
//
// Included by gemm_coop.comp, and by gemm_emu.comp (-DEMULATED) with matrices in plain arithmetic:
// with it devices without matrix units test all of the rest.
#extension GL_KHR_shader_subgroup_basic : require
#include "coop.glsl"
#include "gemm_iface.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 128;
layout(constant_id = 1) const int TM = 16; // the device's matrix shape
layout(constant_id = 2) const int TN = 16;
layout(constant_id = 3) const int TK = 16;
layout(constant_id = 4) const int BM = 64;
layout(constant_id = 5) const int BN = 64;
layout(constant_id = 6) const int BK = 32;
layout(constant_id = 7) const int DOWN = 2;
layout(constant_id = 8) const int ACROSS = 2;
layout(constant_id = 9) const uint WIDE = 0; // rows of a begin at multiples of 16 bytes
layout(constant_id = 10) const int MODE = 0;
layout(constant_id = 11) const int HAS = 0;
const int EIGHTS = BK / 8; // in a row of a slice of a
const int OCTETS = BN / 8; // in a row of a slice of b
const int QK = BK / 4;     // quads of k in a slice
const int PITCH_A = EIGHTS + 1;
const int PITCH_B = OCTETS + 1;
const int PITCH_C = TN + 4; // floats
const int HALF_A = BM * PITCH_A;
const int HALF_B = BK * PITCH_B;
const int PIECES_A = BM * EIGHTS / int(THREADS);     // 16 bytes each, of one invocation
const int PIECES_B = BK / 2 * OCTETS / int(THREADS); // 32 bytes each
const int RM = BM / DOWN / TM;                       // matrices of a subgroup
const int RN = BN / ACROSS / TN;

shared uvec4 a_tile[2 * HALF_A];
shared uvec4 b_tile[2 * HALF_B];

layout(binding = 0, std430) readonly buffer a_block2 { uvec2 a_quads[]; };
layout(binding = 0, std430) readonly buffer a_block4 { uvec4 a_eights[]; };
#ifdef PARTS
layout(binding = 2, std430) writeonly buffer part_block { float part_data[]; };
#define RESULTS part_data
#else
shared float c_tile[DOWN * ACROSS * TM * PITCH_C];
#define RESULTS c_tile
#endif

#ifdef EMULATED
#define UNROLL // takes llvmpipe seconds to compile
// Operands stay in shared memory; of results an invocation holds every SG-th.  llvmpipe leaves
// loops after 65535 turns of all of a shader's together: about 50 slices.
const int SG = int(THREADS) / (DOWN * ACROSS);
struct matrix_a {
    int at;
};
struct matrix_b {
    int at;
};
struct matrix_c {
    float v[TM * TN / SG];
};

float half_at(uvec4 eight, int k)
{
    vec2 pair = unpackHalf2x16(eight[(k >> 1) & 3]);
    return (k & 1) != 0 ? pair.y : pair.x;
}

void multiply_add(matrix_a a, matrix_b b, inout matrix_c c)
{
    for (int i = 0; i < TM * TN / SG; i++) {
        int e = i * SG + int(gl_SubgroupInvocationID), row = e / TN, col = e % TN;
        for (int k = 0; k < TK; k++)
            c.v[i] += half_at(a_tile[a.at + row * PITCH_A + k / 8], k) *
                      half_at(b_tile[b.at + k * PITCH_B + col / 8], col);
    }
}

void clear(out matrix_c c)
{
    for (int i = 0; i < TM * TN / SG; i++)
        c.v[i] = 0;
}

void store_c(matrix_c c, int at, int pitch)
{
    for (int i = 0; i < TM * TN / SG; i++) {
        int e = i * SG + int(gl_SubgroupInvocationID);
        RESULTS[at + e / TN * pitch + e % TN] = c.v[i];
    }
}
#define load_a(m, offset) m.at = offset
#define load_b(m, offset) m.at = offset
#else
#define UNROLL [[unroll]]
#define load_a(m, at) coopMatLoad(m, a_tile, at, PITCH_A, gl_CooperativeMatrixLayoutRowMajor)
#define load_b(m, at) coopMatLoad(m, b_tile, at, PITCH_B, gl_CooperativeMatrixLayoutRowMajor)
#define clear(m) m = matrix_c(0)
#define multiply_add(a, b, c) c = coopMatMulAdd(a, b, c)
#define store_c(m, at, pitch)                                                                      \
    coopMatStore(m, RESULTS, at, pitch, gl_CooperativeMatrixLayoutRowMajor)
#endif

uvec4 a_next[PIECES_A];
uvec4 b_next[PIECES_B * 2];

// What an invocation fetches: of rows `from` the eight k's from quad `quad` on, ...
uvec4 fetch_a(int from, int quad)
{
    if (from < 0 || quad >= pc.quads)
        return uvec4(0);
    if (WIDE != 0)
        return a_eights[(from + quad) >> 1];
    return uvec4(a_quads[from + quad], quad + 1 < pc.quads ? a_quads[from + quad + 1] : uvec2(0));
}

// ... of b two k's of eight columns.
void fetch(int id, int from[PIECES_A], int panel_at[PIECES_B], int tap, int q)
{
    UNROLL for (int i = 0; i < PIECES_A; i++) a_next[i] =
        fetch_a(from[i], q + (id + i * int(THREADS)) % EIGHTS * 2);
    UNROLL for (int i = 0; i < PIECES_B; i++)
    {
        int pair = (id + i * int(THREADS)) / OCTETS;
        int at = panel_at[i] + ((tap * pc.quads + q) * 2 + pair) * 8;
        bool inside = q + (pair >> 1) < pc.quads;
        b_next[2 * i] = inside ? LOAD_B(at) : uvec4(0);
        b_next[2 * i + 1] = inside ? LOAD_B(at + 1) : uvec4(0);
    }
}

void keep(int id, int half_)
{
    UNROLL for (int i = 0; i < PIECES_A; i++)
    {
        int e = id + i * int(THREADS);
        a_tile[half_ * HALF_A + e / EIGHTS * PITCH_A + e % EIGHTS] = a_next[i];
    }
    // A word of b holds two k's of one column: columns become neighbours.
    UNROLL for (int i = 0; i < PIECES_B; i++)
    {
        int e = id + i * int(THREADS);
        int at = half_ * HALF_B + e / OCTETS * 2 * PITCH_B + e % OCTETS;
        uvec4 l = b_next[2 * i], r = b_next[2 * i + 1];
        uvec4 even = uvec4(l.x, l.z, r.x, r.z), odd = uvec4(l.y, l.w, r.y, r.w);
        b_tile[at] = (even & 0xffffu) | (odd << 16);
        b_tile[at + PITCH_B] = (even >> 16) | (odd & 0xffff0000u);
    }
}

// Where the rows look under a tap.
void look(ivec3 origin[PIECES_A], int tap, inout int from[PIECES_A])
{
    if (MODE == PLAIN)
        return;
    int ky = tap / pc.kw;
    UNROLL for (int i = 0; i < PIECES_A; i++) from[i] =
        gemm_pixel(MODE, origin[i], ky, tap - ky * pc.kw);
}

void main()
{
    int id = int(gl_LocalInvocationID.x);
    int first = int(gl_WorkGroupID.x) * BM;
    int column = int(gl_WorkGroupID.y) * BN; // among the bound panels
    int depth = pc.taps * pc.quads;

    // What this invocation fetches.
    ivec3 origin[PIECES_A];
    int from[PIECES_A];
    int panel_at[PIECES_B];
    UNROLL for (int i = 0; i < PIECES_A; i++)
    {
        int m = pc.row0 + min(first + (id + i * int(THREADS)) / EIGHTS, pc.rows - 1);
        origin[i] = gemm_origin(m);
        from[i] = m * pc.quads - pc.a_first;
    }
    UNROLL for (int i = 0; i < PIECES_B; i++)
    {
        int octet = (column >> 3) + (id + i * int(THREADS)) % OCTETS;
        panel_at[i] = min(octet >> 2, pc.panels - 1) * depth * 16 + (octet & 3) * 2;
    }

    int across = int(gl_SubgroupID) % ACROSS * (BN / ACROSS);
    int down = int(gl_SubgroupID) / ACROSS * (BM / DOWN);
    matrix_c sum[RM * RN];
    matrix_a a[RM];
    matrix_b b;
    UNROLL for (int i = 0; i < RM * RN; i++) clear(sum[i]);

    int per_tap = (pc.quads + QK - 1) / QK;
    int slice = 0, end = pc.taps * per_tap;
#ifdef PARTS
    slice = end * int(gl_WorkGroupID.z) / int(gl_NumWorkGroups.z);
    end = end * (int(gl_WorkGroupID.z) + 1) / int(gl_NumWorkGroups.z);
#endif
    int tap = slice / per_tap;
    int q = (slice - tap * per_tap) * QK;
    look(origin, tap, from);
    fetch(id, from, panel_at, tap, q);
    keep(id, 0);
    barrier();
    for (int turn = 0; slice < end; turn ^= 1) {
        slice++;
        q += QK;
        if (slice < end) {
            if (q >= pc.quads) {
                q = 0;
                tap++;
                look(origin, tap, from);
            }
            fetch(id, from, panel_at, tap, q);
        }
        UNROLL for (int k = 0; k < BK; k += TK)
        {
            UNROLL for (int i = 0; i < RM; i++)
                load_a(a[i], turn * HALF_A + (down + i * TM) * PITCH_A + k / 8);
            UNROLL for (int j = 0; j < RN; j++)
            {
                load_b(b, turn * HALF_B + k * PITCH_B + (across + j * TN) / 8);
                UNROLL for (int i = 0; i < RM; i++) multiply_add(a[i], b, sum[i * RN + j]);
            }
        }
        if (slice < end)
            keep(id, turn ^ 1);
        barrier();
    }

#ifdef PARTS
    int pitch = int(gl_NumWorkGroups.y) * BN;
    int corner =
        (int(gl_WorkGroupID.z * gl_NumWorkGroups.x) * BM + first + down) * pitch + column + across;
    UNROLL for (int i = 0; i < RM * RN; i++)
        store_c(sum[i], corner + i / RN * TM * pitch + i % RN * TN, pitch);
#else
    int mine = int(gl_SubgroupID) * TM * PITCH_C;
    int bound = min(pc.cols, pc.col0 + pc.panels * 32);
    UNROLL for (int i = 0; i < RM * RN; i++)
    {
        store_c(sum[i], mine, PITCH_C);
        SUBGROUP_BARRIER();
        for (int e = int(gl_SubgroupInvocationID); e < TM * TN / 4; e += int(gl_SubgroupSize)) {
            int row = e / (TN / 4), c = e % (TN / 4) * 4;
            int col = pc.col0 + column + across + i % RN * TN + c;
            int at = mine + row * PITCH_C + c;
            if (col < bound) {
                gemm_begin(first + down + i / RN * TM + row, col);
                vec4 v = vec4(c_tile[at], c_tile[at + 1], c_tile[at + 2], c_tile[at + 3]);
                gemm_store(HAS, 0, col, (HAS & HAS_BIAS) != 0 ? v + gemm_bias(col) : v);
            }
        }
        SUBGROUP_BARRIER();
    }
#endif
}
