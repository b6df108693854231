#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[n,t,c] = share[t] b[n,t,c] (+ a[n,t,c]).  One invocation an element, or four when VEC (c % 4 ==
// 0).
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 0;
layout(constant_id = 1) const uint HAS_A = 0;
layout(push_constant) uniform Push {
    uint n, c, t, first; // items, of a place; places, the first of this dispatch
} pc;
layout(binding = 0) readonly buffer B { ELT b[]; };
layout(binding = 0) readonly buffer B4 { ELT4 b4[]; };
layout(binding = 1) readonly buffer S { float share[]; };
layout(binding = 2) readonly buffer A { ELT a[]; };
layout(binding = 2) readonly buffer A4 { ELT4 a4[]; };
layout(binding = 3) writeonly buffer Y { ELT y[]; };
layout(binding = 3) writeonly buffer Y4 { ELT4 y4[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    float k = share[(pc.first + i / pc.c) % pc.t];
    if (VEC == 1) {
        vec4 v = k * vec4(b4[i]);
        y4[i] = ELT4(HAS_A == 1 ? v + vec4(a4[i]) : v);
    } else {
        float v = k * float(b[i]);
        y[i] = ELT(HAS_A == 1 ? v + float(a[i]) : v);
    }
}
