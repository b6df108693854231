// shaders/attention_any.comp - attention for CPU devices and heads of any small width d, also odd
// ones:
//   o = softmax(scale q k^T) v, lse = ln(sum exp(scale q k^T))    q,o [n,t,h,d], k,v [n,s,h,d]
// One invocation owns one query; keys and values are read one after the other, the same for all
// lanes: no shared memory, no barrier, no shuffle.  Online softmax (Milakov and Gimelshein 2018) in
// base 2. Grid: x = query blocks, y = heads, z = batch.  Shared memory: none.
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
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
    const uint h = gl_WorkGroupID.y, n = gl_WorkGroupID.z;
    const uint row = gl_WorkGroupID.x * SG + gl_LocalInvocationID.x, here = min(row, pc.t - 1);
    const uint q_at = (n * pc.t + here) * pc.ld + h * D, kv_at = n * pc.s * pc.ld + h * D;
    float q[D], o[D], top = MASKED, sum = 0;
    [[unroll]] for (uint c = 0; c < D; c++) {
        q[c] = float(q_in[pc.q_off + q_at + c]) * pc.scale;
        o[c] = 0;
    }
    // causal: the last query of the block sees the most keys; the others mask theirs
    const uint end = CAUSAL != 0 ? min(pc.s, (gl_WorkGroupID.x + 1) * SG) : pc.s;
    for (uint j = 0; j < end; j++) {
        const uint at = kv_at + j * pc.ld;
        float x = 0;
        [[unroll]] for (uint c = 0; c < D; c++)
            x += q[c] * float(k_in[pc.k_off + at + c]);
        if (CAUSAL != 0)
            x = j <= here ? x : MASKED;
        const float high = max(top, x), keep = exp2(top - high), p = exp2(x - high);
        top = high;
        sum = sum * keep + p;
        [[unroll]] for (uint c = 0; c < D; c++)
            o[c] = o[c] * keep + p * float(v_in[pc.v_off + at + c]);
    }
    if (row < pc.t) {
        [[unroll]] for (uint c = 0; c < D; c++)
            o_out[pc.o_off + q_at + c] = ELT(o[c] / sum);
        lse[pc.lse_off + (n * pc.heads + h) * pc.t + row] = (top + log2(sum)) * LN2;
    }
}
