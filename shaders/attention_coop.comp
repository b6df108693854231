// shaders/attention_coop.comp - flash attention on matrix units, f16 operands, sums in f32.
//   o = softmax(scale q k^T) v, lse = ln(sum exp(scale q k^T))    q,o [n,t,h,d], k,v [n,s,h,d]
// A subgroup has TM queries and all of d (rounded up to whole matrices, DP); a workgroup's
// subgroups share blocks of BK keys and values in shared memory.  Scores pass through shared
// memory, where the lanes of a row find its maximum and its exponentials; results stay in matrices.
// These are relative to a maximum that may be outgrown by a factor of 2^SLACK before they are
// scaled anew (in 16 bits a factor fits up to 2^16): scaling takes matrices through shared memory,
// so it has to be rare. d and every offset are multiples of 8.  Grid: x = query blocks, y = heads,
// z = batch. Online softmax: Milakov and Gimelshein 2018, Dao et al. 2022.
#version 450
//! requires GL_KHR_cooperative_matrix
#define ACT_F16
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "attention.glsl"
#include "coop.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 128;
layout(constant_id = 1) const int TM = 16; // the device's matrix shape
layout(constant_id = 2) const int TN = 16;
layout(constant_id = 3) const int TK = 16;
layout(constant_id = 4) const int SG = 32; // lanes of a subgroup, a multiple of TM
layout(constant_id = 5) const int DP = 48; // d rounded up to TN and TK
layout(constant_id = 6) const int BK = 32;
layout(constant_id = 7) const uint CAUSAL = 0;
layout(push_constant) uniform Push {
    uint t, s, heads, d;
    uint ld;                         // elements per token
    uint q_off, k_off, v_off, o_off; // elements
    uint lse_off;
    float scale; // scale log2(e)
} pc;
layout(binding = 0, std430) readonly buffer QBlock { uvec4 q_in[]; };
layout(binding = 1, std430) readonly buffer KBlock { uvec4 k_in[]; };
layout(binding = 2, std430) readonly buffer VBlock { uvec4 v_in[]; };
layout(binding = 3, std430) writeonly buffer OBlock { ELT o_out[]; };
layout(binding = 4, std430) writeonly buffer LseBlock { float lse[]; };

const float SLACK = 8.0;
const int SUBGROUPS = int(THREADS) / SG;
const int EIGHTS = DP / 8, PITCH = EIGHTS + 1;            // of a row of keys or values, in 16 bytes
const int WIDTH = BK > TN ? BK : TN, PITCH_S = WIDTH + 4; // of a row of scores, floats
const int WIDTH_P = (BK > TK ? BK : TK) / 8,
          PITCH_P = WIDTH_P + 1;                // of a row of factors, in 16 bytes
const int PART = SG / TM;                       // lanes of a row
const int OWN_S = BK / PART, OWN_O = TN / PART; // scores and results of one of them
shared uvec4 k_tile[BK * PITCH];
shared uvec4 v_tile[BK * PITCH];
shared float s_tile[SUBGROUPS * TM * PITCH_S];
shared uvec4 p_tile[SUBGROUPS * TM * PITCH_P];
shared int outgrown; // the block of keys in which some row of the workgroup was

// Keys and values k0 .. k0 + BK - 1; zeros outside.
void fetch(int id, int k0, int base)
{
    [[unroll]] for (int e = id; e < BK * EIGHTS; e += int(THREADS)) {
        int row = e / EIGHTS, c = e % EIGHTS;
        bool inside = k0 + row < int(pc.s) && c * 8 < int(pc.d);
        int at = (base + (k0 + row) * int(pc.ld)) / 8 + c;
        k_tile[row * PITCH + c] = inside ? k_in[int(pc.k_off) / 8 + at] : uvec4(0);
        v_tile[row * PITCH + c] = inside ? v_in[int(pc.v_off) / 8 + at] : uvec4(0);
    }
}

float row_max(float x)
{
    [[unroll]] for (int step = 1; step < PART; step *= 2)
        x = max(x, subgroupShuffleXor(x, uint(step)));
    return x;
}

float row_sum(float x)
{
    [[unroll]] for (int step = 1; step < PART; step *= 2)
        x += subgroupShuffleXor(x, uint(step));
    return x;
}

void main()
{
    int id = int(gl_LocalInvocationID.x), lane = int(gl_SubgroupInvocationID);
    int row = lane / PART, part = lane % PART; // a row's lanes are neighbours
    int h = int(gl_WorkGroupID.y), n = int(gl_WorkGroupID.z);
    int q0 = (int(gl_WorkGroupID.x) * SUBGROUPS + int(gl_SubgroupID)) * TM;
    int query = q0 + row;
    int kv_base = n * int(pc.s * pc.ld) + h * int(pc.d);
    int q_at = (int(pc.q_off) + (n * int(pc.t) + query) * int(pc.ld) + h * int(pc.d)) / 8;
    int s_mine = int(gl_SubgroupID) * TM * PITCH_S, p_mine = int(gl_SubgroupID) * TM * PITCH_P;

    matrix_a q[DP / TK];
    matrix_c o[DP / TN];
    [[unroll]] for (int c = 0; c < DP / TK; c++) {
        for (int e = part; e < TK / 8; e += PART) {
            bool inside = query < int(pc.t) && c * TK + e * 8 < int(pc.d);
            p_tile[p_mine + row * PITCH_P + e] = inside ? q_in[q_at + c * TK / 8 + e] : uvec4(0);
        }
        SUBGROUP_BARRIER();
        coopMatLoad(q[c], p_tile, p_mine, PITCH_P, gl_CooperativeMatrixLayoutRowMajor);
        SUBGROUP_BARRIER();
    }
    [[unroll]] for (int j = 0; j < DP / TN; j++)
        o[j] = matrix_c(0);
    if (id == 0)
        outgrown = -1;
    float top = MASKED, sum = 0; // of the row; the sum is of this lane's keys

    int last = (int(gl_WorkGroupID.x) + 1) * SUBGROUPS * TM; // no query of the workgroup is behind
    int end = CAUSAL != 0 ? min(int(pc.s), last) : int(pc.s);
    int lim = CAUSAL != 0 ? min(int(pc.s), query + 1) : int(pc.s);
    for (int k0 = 0; k0 < end; k0 += BK) {
        barrier();
        fetch(id, k0, kv_base);
        barrier();
        [[unroll]] for (int j = 0; j < BK / TN; j++) {
            matrix_c s = matrix_c(0);
            [[unroll]] for (int c = 0; c < DP / TK; c++) {
                matrix_b b;
                coopMatLoad(b, k_tile, j * TN * PITCH + c * TK / 8, PITCH,
                            gl_CooperativeMatrixLayoutColumnMajor);
                s = coopMatMulAdd(q[c], b, s);
            }
            coopMatStore(s, s_tile, s_mine + j * TN, PITCH_S, gl_CooperativeMatrixLayoutRowMajor);
        }
        SUBGROUP_BARRIER();
        float own[OWN_S];
        float most = MASKED;
        [[unroll]] for (int i = 0; i < OWN_S; i++) {
            int key = part * OWN_S + i;
            own[i] = k0 + key < lim ? s_tile[s_mine + row * PITCH_S + key] * pc.scale : MASKED;
            most = max(most, own[i]);
        }
        most = row_max(most);
        bool is_outgrown = most > top + SLACK;
        if (is_outgrown)
            outgrown = k0;
        barrier();
        if (outgrown == k0) {
            float now = max(top, most), alpha = exp2(top - now);
            top = now;
            sum *= alpha;
            if (k0 > 0) {
                [[unroll]] for (int j = 0; j < DP / TN; j++) {
                    coopMatStore(o[j], s_tile, s_mine, PITCH_S, gl_CooperativeMatrixLayoutRowMajor);
                    SUBGROUP_BARRIER();
                    [[unroll]] for (int i = 0; i < OWN_O; i++)
                        s_tile[s_mine + row * PITCH_S + part * OWN_O + i] *= alpha;
                    SUBGROUP_BARRIER();
                    coopMatLoad(o[j], s_tile, s_mine, PITCH_S, gl_CooperativeMatrixLayoutRowMajor);
                    SUBGROUP_BARRIER();
                }
            }
        }
        [[unroll]] for (int i = 0; i < OWN_S; i += 8) {
            float p[8];
            [[unroll]] for (int e = 0; e < 8; e++) {
                p[e] = exp2(own[i + e] - top);
                sum += p[e];
            }
            p_tile[p_mine + row * PITCH_P + (part * OWN_S + i) / 8] =
                uvec4(packHalf2x16(vec2(p[0], p[1])), packHalf2x16(vec2(p[2], p[3])),
                      packHalf2x16(vec2(p[4], p[5])), packHalf2x16(vec2(p[6], p[7])));
        }
        SUBGROUP_BARRIER();
        [[unroll]] for (int c = 0; c < BK / TK; c++) {
            matrix_a a;
            coopMatLoad(a, p_tile, p_mine + c * TK / 8, PITCH_P,
                        gl_CooperativeMatrixLayoutRowMajor);
            [[unroll]] for (int j = 0; j < DP / TN; j++) {
                matrix_b b;
                coopMatLoad(b, v_tile, c * TK * PITCH + j * TN / 8, PITCH,
                            gl_CooperativeMatrixLayoutRowMajor);
                o[j] = coopMatMulAdd(a, b, o[j]);
            }
        }
    }

    sum = row_sum(sum);
    int o_at = int(pc.o_off) + (n * int(pc.t) + query) * int(pc.ld) + h * int(pc.d);
    [[unroll]] for (int j = 0; j < DP / TN; j++) {
        SUBGROUP_BARRIER();
        coopMatStore(o[j], s_tile, s_mine, PITCH_S, gl_CooperativeMatrixLayoutRowMajor);
        SUBGROUP_BARRIER();
        [[unroll]] for (int i = 0; i < OWN_O; i++) {
            int col = part * OWN_O + i;
            if (query < int(pc.t) && j * TN + col < int(pc.d))
                o_out[o_at + j * TN + col] = ELT(s_tile[s_mine + row * PITCH_S + col] / sum);
        }
    }
    if (query < int(pc.t) && part == 0)
        lse[pc.lse_off + (n * pc.heads + h) * pc.t + query] = (top + log2(sum)) * LN2;
}
