// shaders/attention_simd.comp - flash attention for CPU devices: one subgroup per block of queries.
//   o = softmax(scale q k^T) v, lse = ln(sum exp(scale q k^T))    q,o [n,t,h,d], k,v [n,s,h,d]
// Lanes are queries (TQ per lane), each owns whole softmax rows: no shared memory, no barrier, no
// reduction across lanes.  Blocks of KB keys are fetched with lanes = (key, quad of d) and handed
// round by subgroupShuffle with a constant index.  Online softmax (Milakov and Gimelshein 2018,
// Dao et al. 2022) in base 2, q pre-scaled.
// Grid: x = query blocks, y = heads, z = batch.  Shared memory: none.  The subgroup has SG lanes.
//! variant f32 -DTEXEL=1
//! variant f16 -DTEXEL=1 -DACT_F16=1
//! variant f32_ssbo
//! variant f16_ssbo -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "attention.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint SG = 8;
layout(constant_id = 1) const uint D4 = 10;
layout(constant_id = 2) const uint KB = 4;
layout(constant_id = 3) const uint TQ = 2;
layout(push_constant) uniform Push {
    uint t, s, heads;
    uint ld;                         // quads per token
    uint q_off, k_off, v_off, o_off; // quads
    uint lse_off;
    float scale; // scale log2(e)
    uint causal;
} pc;
QUADS_IN(0, q_in);
QUADS_IN(1, k_in);
QUADS_IN(2, v_in);
QUADS_OUT(3, o_out);
layout(binding = 4, std430) writeonly buffer LseBlock { float lse[]; };

const uint NR = (KB * D4 + SG - 1) / SG; // registers that hold one block of keys

vec4 shuffle4(vec4 v, uint i)
{
    return vec4(subgroupShuffle(v.x, i), subgroupShuffle(v.y, i), subgroupShuffle(v.z, i),
                subgroupShuffle(v.w, i));
}

void main()
{
    const uint lane = gl_LocalInvocationID.x, h = gl_WorkGroupID.y, n = gl_WorkGroupID.z;
    const uint q0 = gl_WorkGroupID.x * SG * TQ;
    vec4 q[TQ * D4], o[TQ * D4];
    float m[TQ], sum[TQ];
    uint lim[TQ];
    [[unroll]] for (uint t = 0; t < TQ; t++) {
        const uint row = min(q0 + t * SG + lane, pc.t - 1);
        const uint at = pc.q_off + (n * pc.t + row) * pc.ld + h * D4;
        [[unroll]] for (uint c = 0; c < D4; c++) {
            q[t * D4 + c] = LOAD4(q_in, at + c) * pc.scale;
            o[t * D4 + c] = vec4(0);
        }
        m[t] = MASKED;
        sum[t] = 0;
        lim[t] = pc.causal != 0 ? min(row + 1, pc.s) : pc.s;
    }
    uint key[NR], chunk[NR];
    [[unroll]] for (uint r = 0; r < NR; r++) {
        key[r] = (r * SG + lane) / D4;
        chunk[r] = (n * pc.s) * pc.ld + h * D4 + (r * SG + lane) % D4;
    }
    const uint end = pc.causal != 0 ? min(pc.s, q0 + SG * TQ) : pc.s;
    for (uint k0 = 0; k0 < end; k0 += KB) {
        vec4 b[NR];
        float s[KB * TQ];
        [[unroll]] for (uint r = 0; r < NR; r++)
            b[r] = LOAD4(k_in, pc.k_off + chunk[r] + min(k0 + key[r], pc.s - 1) * pc.ld);
        [[unroll]] for (uint i = 0; i < KB * TQ; i++)
            s[i] = 0;
        [[unroll]] for (uint c = 0; c < D4; c++) {
            [[unroll]] for (uint j = 0; j < KB; j++) {
                const vec4 kk = shuffle4(b[(j * D4 + c) / SG], (j * D4 + c) % SG);
                [[unroll]] for (uint t = 0; t < TQ; t++) {
                    const vec4 a = q[t * D4 + c];
                    float x = s[j * TQ + t];
                    x += a.x * kk.x;
                    x += a.y * kk.y;
                    x += a.z * kk.z;
                    x += a.w * kk.w;
                    s[j * TQ + t] = x;
                }
            }
        }
        [[unroll]] for (uint r = 0; r < NR; r++)
            b[r] = LOAD4(v_in, pc.v_off + chunk[r] + min(k0 + key[r], pc.s - 1) * pc.ld);
        float alpha[TQ];
        [[unroll]] for (uint t = 0; t < TQ; t++) {
            float top = m[t];
            [[unroll]] for (uint j = 0; j < KB; j++) {
                s[j * TQ + t] = k0 + j < lim[t] ? s[j * TQ + t] : MASKED;
                top = max(top, s[j * TQ + t]);
            }
            alpha[t] = exp2(m[t] - top);
            m[t] = top;
            float part = sum[t] * alpha[t];
            [[unroll]] for (uint j = 0; j < KB; j++) {
                s[j * TQ + t] = exp2(s[j * TQ + t] - top);
                part += s[j * TQ + t];
            }
            sum[t] = part;
        }
        [[unroll]] for (uint c = 0; c < D4; c++) {
            vec4 acc[TQ];
            [[unroll]] for (uint t = 0; t < TQ; t++)
                acc[t] = o[t * D4 + c] * alpha[t];
            [[unroll]] for (uint j = 0; j < KB; j++) {
                const vec4 vv = shuffle4(b[(j * D4 + c) / SG], (j * D4 + c) % SG);
                [[unroll]] for (uint t = 0; t < TQ; t++)
                    acc[t] += s[j * TQ + t] * vv;
            }
            [[unroll]] for (uint t = 0; t < TQ; t++)
                o[t * D4 + c] = acc[t];
        }
    }
    [[unroll]] for (uint t = 0; t < TQ; t++) {
        const uint row = q0 + t * SG + lane;
        if (row < pc.t) {
            const float inv = 1.0 / sum[t];
            const uint at = pc.o_off + (n * pc.t + row) * pc.ld + h * D4;
            [[unroll]] for (uint c = 0; c < D4; c++)
                o_out[at + c] = ELT4(o[t * D4 + c] * inv);
            lse[pc.lse_off + (n * pc.heads + h) * pc.t + row] = (m[t] + log2(sum[t])) * LN2;
        }
    }
}
