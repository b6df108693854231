#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[a,c,b,d] = x[a,b,c,d].  One invocation an element of y, or four when VEC (d % 4 == 0).
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 0;
layout(push_constant) uniform Push {
    uint n, n_b, n_c, n_d; // invocations; the last axis counted in items
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 0) readonly buffer X4 { ELT4 x4[]; };
layout(binding = 1) writeonly buffer Y { ELT y[]; };
layout(binding = 1) writeonly buffer Y4 { ELT4 y4[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint line = i / pc.n_d, d = i - line * pc.n_d, ac = line / pc.n_b, b = line - ac * pc.n_b;
    uint a = ac / pc.n_c, c = ac - a * pc.n_c;
    uint from = ((a * pc.n_b + b) * pc.n_c + c) * pc.n_d + d;
    if (VEC == 1)
        y4[i] = x4[from];
    else
        y[i] = x[from];
}
