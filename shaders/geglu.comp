#version 450
//! variant f32
//! variant f16 -DACT_F16
// y = a gelu(b) for x = [a | b] along the last axis, and its gradient [dy gelu(b) | dy a gelu'(b)].
// Grid: one invocation a result element of the half width (four when VEC).
#include "common.glsl"
#include "activation.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint BWD = 0;
layout(constant_id = 1) const uint VEC = 1;
layout(push_constant) uniform Push {
    uint n, c;
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 0) readonly buffer X4 { ELT4 x4[]; };
layout(binding = 1) readonly buffer D { ELT d[]; };
layout(binding = 1) readonly buffer D4 { ELT4 d4[]; };
layout(binding = 2) writeonly buffer Y { ELT y[]; };
layout(binding = 2) writeonly buffer Y4 { ELT4 y4[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint row = i / pc.c, at = row * 2 * pc.c + (i - row * pc.c);
    if (VEC == 1) {
        vec4 a = vec4(x4[at]), b = vec4(x4[at + pc.c]);
        if (BWD == 0) {
            y4[i] = ELT4(a * gelu4(b));
        } else {
            vec4 dy = vec4(d4[i]);
            y4[at] = ELT4(dy * gelu4(b));
            y4[at + pc.c] = ELT4(dy * a * gelu_slope4(b));
        }
    } else {
        float a = float(x[at]), b = float(x[at + pc.c]);
        if (BWD == 0) {
            y[i] = ELT(a * gelu4(vec4(b)).x);
        } else {
            float dy = float(d[i]);
            y[at] = ELT(dy * gelu4(vec4(b)).x);
            y[at + pc.c] = ELT(dy * a * gelu_slope4(vec4(b)).x);
        }
    }
}
