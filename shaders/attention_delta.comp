// shaders/attention_delta.comp - delta[n,h,t] = sum over d of do o.
// Grid: linear over (n, t, h), 64 per workgroup, h fastest (neighbours read neighbouring memory).
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint count, t, heads, d;
    uint o_off, do_off, delta_off; // elements; delta of batch element 0 of this dispatch
} pc;
layout(binding = 0, std430) readonly buffer OBlock { ELT o[]; };
layout(binding = 1, std430) readonly buffer DoBlock { ELT g[]; };
layout(binding = 2, std430) writeonly buffer DeltaBlock { float delta[]; };

void main()
{
    const uint e = group_linear() * 64 + gl_LocalInvocationID.x;
    if (e >= pc.count)
        return;
    const uint h = e % pc.heads, t = e / pc.heads % pc.t, n = e / pc.heads / pc.t;
    float sum = 0;
    for (uint c = 0; c < pc.d; c++)
        sum += float(o[pc.o_off + e * pc.d + c]) * float(g[pc.do_off + e * pc.d + c]);
    delta[pc.delta_off + (n * pc.heads + h) * pc.t + t] = sum;
}
