// shaders/attention_any.comp - attention for CPU devices and heads of any small width d, also odd
// ones:
//   o = softmax(scale q k^T) v, lse = ln(sum exp(scale q k^T))    q,o [n,t,h,d], k,v [n,s,h,d]
// One lane owns one query.  SG keys and values are fetched at a time, one a lane, and handed round
// by subgroupShuffle with a constant index: no shared memory, no barrier.  Online softmax (Milakov
// and Gimelshein 2018) in base 2. Grid: x = query blocks, y = heads, z = batch.  Shared memory:
// none.  The subgroup has SG lanes.
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "attention.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint SG = 8;
layout(constant_id = 1) const uint D = 1;
layout(constant_id = 2) const uint CAUSAL = 0;
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

void main()
{
    const uint lane = gl_LocalInvocationID.x, h = gl_WorkGroupID.y, n = gl_WorkGroupID.z;
    const uint row = gl_WorkGroupID.x * SG + lane, here = min(row, pc.t - 1);
    const uint q_at = (n * pc.t + here) * pc.ld + h * D, kv_at = n * pc.s * pc.ld + h * D;
    const uint lim = CAUSAL != 0 ? min(here + 1, pc.s) : pc.s;
    // the last query of the block sees the most keys; the others mask theirs
    const uint end = CAUSAL != 0 ? min(pc.s, (gl_WorkGroupID.x + 1) * SG) : pc.s;
    float q[D], o[D], top = MASKED, sum = 0;
    [[unroll]] for (uint c = 0; c < D; c++) {
        q[c] = float(q_in[pc.q_off + q_at + c]) * pc.scale;
        o[c] = 0;
    }
    for (uint j0 = 0; j0 < end; j0 += SG) {
        const uint at = kv_at + min(j0 + lane, pc.s - 1) * pc.ld;
        float k[D], v[D], x[SG], high = top;
        [[unroll]] for (uint c = 0; c < D; c++) {
            k[c] = float(k_in[pc.k_off + at + c]);
            v[c] = float(v_in[pc.v_off + at + c]);
        }
        [[unroll]] for (uint i = 0; i < SG; i++) {
            x[i] = 0;
            [[unroll]] for (uint c = 0; c < D; c++)
                x[i] += q[c] * subgroupShuffle(k[c], i);
            x[i] = j0 + i < lim ? x[i] : MASKED;
            high = max(high, x[i]);
        }
        const float keep = exp2(top - high);
        top = high;
        sum *= keep;
        [[unroll]] for (uint c = 0; c < D; c++)
            o[c] *= keep;
        [[unroll]] for (uint i = 0; i < SG; i++) {
            const float p = exp2(x[i] - high);
            sum += p;
            [[unroll]] for (uint c = 0; c < D; c++)
                o[c] += p * subgroupShuffle(v[c], i);
        }
    }
    if (row < pc.t) {
        [[unroll]] for (uint c = 0; c < D; c++)
            o_out[pc.o_off + q_at + c] = ELT(o[c] / sum);
        lse[pc.lse_off + (n * pc.heads + h) * pc.t + row] = (top + log2(sum)) * LN2;
    }
}
