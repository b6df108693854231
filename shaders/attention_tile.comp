// shaders/attention_tile.comp - flash attention for GPUs: 64 queries x 32 keys per step.
//   o = softmax(scale q k^T) v, lse = ln(sum exp(scale q k^T))    q,o [n,t,h,d], k,v [n,s,h,d]
// 128 invocations: ty = 0..15 owns queries 4 ty .. 4 ty + 3, tx = 0..7 owns keys tx + 8 j (scores)
// and columns tx + 8 j (output).  Any d: scores go over d in chunks of 16; a workgroup makes NV
// chunks of 16 output columns, so a wide d is split over several workgroups that repeat the scores.
// Grid: x = query blocks, y = heads x column slices, z = batch.
// Shared memory: (64 + 32) x 17 + 64 x 33 floats = 14976 bytes; no assumption on the subgroup size.
// Online softmax: Milakov and Gimelshein 2018, Dao et al. 2022.
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "attention.glsl"
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint NV = 3; // chunks of 16 output columns
layout(constant_id = 1) const uint CAUSAL = 0;
layout(push_constant) uniform Push {
    uint t, s, heads, d;
    uint ld;                         // elements per token
    uint q_off, k_off, v_off, o_off; // elements
    uint lse_off;
    float scale; // scale log2(e)
} pc;
layout(binding = 0, std430) readonly buffer QBlock { ELT q_in[]; };
layout(binding = 1, std430) readonly buffer KBlock { ELT k_in[]; };
layout(binding = 2, std430) readonly buffer VBlock { ELT v_in[]; };
layout(binding = 3, std430) writeonly buffer OBlock { ELT o_out[]; };
layout(binding = 4, std430) writeonly buffer LseBlock { float lse[]; };

const uint BQ = 64, BK = 32, DC = 16;
shared float sq[BQ * (DC + 1)]; // queries; also partial maxima and sums [64][8]
shared float sk[BK * (DC + 1)]; // keys, then values
shared float sp[BQ * (BK + 1)];

// One chunk of 16 columns of BK rows from k or v into sk; zeros outside.
float other(bool value, uint row, uint col, uint base)
{
    if (row >= pc.s || col >= pc.d)
        return 0.0;
    const uint at = base + row * pc.ld + col;
    return value ? float(v_in[pc.v_off + at]) : float(k_in[pc.k_off + at]);
}

void fetch(bool value, uint k0, uint c0, uint base)
{
    for (uint e = gl_LocalInvocationID.x; e < BK * DC; e += 128)
        sk[e / DC * (DC + 1) + e % DC] = other(value, k0 + e / DC, c0 + e % DC, base);
}

void main()
{
    const uint tid = gl_LocalInvocationID.x, tx = tid % 8, ty = tid / 8;
    const uint h = gl_WorkGroupID.y % pc.heads, slice = gl_WorkGroupID.y / pc.heads;
    const uint n = gl_WorkGroupID.z, q0 = gl_WorkGroupID.x * BQ, col0 = slice * NV * DC;
    const uint q_base = pc.q_off + n * pc.t * pc.ld + h * pc.d;
    const uint kv_base = n * pc.s * pc.ld + h * pc.d;
    float acc[4 * 2 * NV];
    float m[4], sum[4];
    [[unroll]] for (uint i = 0; i < 4; i++) {
        m[i] = MASKED;
        sum[i] = 0;
        [[unroll]] for (uint j = 0; j < 2 * NV; j++)
            acc[i * 2 * NV + j] = 0;
    }
    const uint end = CAUSAL != 0 ? min(pc.s, q0 + BQ) : pc.s;
    for (uint k0 = 0; k0 < end; k0 += BK) {
        float s[16];
        [[unroll]] for (uint i = 0; i < 16; i++)
            s[i] = 0;
        for (uint c0 = 0; c0 < pc.d; c0 += DC) {
            barrier();
            for (uint e = tid; e < BQ * DC; e += 128) {
                const uint row = q0 + e / DC, col = c0 + e % DC;
                float x = 0;
                if (row < pc.t && col < pc.d)
                    x = float(q_in[q_base + row * pc.ld + col]);
                sq[e / DC * (DC + 1) + e % DC] = x * pc.scale;
            }
            fetch(false, k0, c0, kv_base);
            barrier();
            for (uint c = 0; c < DC; c++) {
                float b[4];
                [[unroll]] for (uint j = 0; j < 4; j++)
                    b[j] = sk[(tx + 8 * j) * (DC + 1) + c];
                [[unroll]] for (uint i = 0; i < 4; i++) {
                    const float a = sq[(ty * 4 + i) * (DC + 1) + c];
                    [[unroll]] for (uint j = 0; j < 4; j++)
                        s[i * 4 + j] += a * b[j];
                }
            }
        }
        barrier();
        [[unroll]] for (uint i = 0; i < 4; i++) {
            const uint lim = CAUSAL != 0 ? min(pc.s, q0 + ty * 4 + i + 1) : pc.s;
            float top = MASKED;
            [[unroll]] for (uint j = 0; j < 4; j++) {
                s[i * 4 + j] = k0 + tx + 8 * j < lim ? s[i * 4 + j] : MASKED;
                top = max(top, s[i * 4 + j]);
            }
            sq[(ty * 4 + i) * 8 + tx] = top;
        }
        barrier();
        [[unroll]] for (uint i = 0; i < 4; i++) {
            float top = m[i];
            for (uint x = 0; x < 8; x++)
                top = max(top, sq[(ty * 4 + i) * 8 + x]);
            const float alpha = exp2(m[i] - top);
            m[i] = top;
            sum[i] *= alpha; // of this invocation's keys only; added up at the end
            [[unroll]] for (uint j = 0; j < 4; j++) {
                const float p = exp2(s[i * 4 + j] - top);
                sum[i] += p;
                sp[(ty * 4 + i) * (BK + 1) + tx + 8 * j] = p;
            }
            [[unroll]] for (uint j = 0; j < 2 * NV; j++)
                acc[i * 2 * NV + j] *= alpha;
        }
        [[unroll]] for (uint c = 0; c < NV; c++) {
            barrier();
            fetch(true, k0, col0 + c * DC, kv_base);
            barrier();
            for (uint x = 0; x < BK; x++) {
                const float b0 = sk[x * (DC + 1) + tx], b1 = sk[x * (DC + 1) + tx + 8];
                [[unroll]] for (uint i = 0; i < 4; i++) {
                    const float p = sp[(ty * 4 + i) * (BK + 1) + x];
                    acc[i * 2 * NV + 2 * c] += p * b0;
                    acc[i * 2 * NV + 2 * c + 1] += p * b1;
                }
            }
        }
    }
    barrier();
    [[unroll]] for (uint i = 0; i < 4; i++)
        sq[(ty * 4 + i) * 8 + tx] = sum[i];
    barrier();
    [[unroll]] for (uint i = 0; i < 4; i++) {
        const uint row = q0 + ty * 4 + i;
        float total = 0;
        for (uint x = 0; x < 8; x++)
            total += sq[(ty * 4 + i) * 8 + x];
        const uint at = pc.o_off + (n * pc.t + row) * pc.ld + h * pc.d;
        [[unroll]] for (uint j = 0; j < 2 * NV; j++) {
            const uint col = col0 + tx + 8 * j;
            if (row < pc.t && col < pc.d)
                o_out[at + col] = ELT(acc[i * 2 * NV + j] / total);
        }
        if (row < pc.t && tx == 0 && slice == 0)
            lse[pc.lse_off + (n * pc.heads + h) * pc.t + row] = (m[i] + log2(total)) * LN2;
    }
}
