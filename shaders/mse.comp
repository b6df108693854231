#version 450
//! variant f32
//! variant f16 -DACT_F16
//! variant dot_f32 -DDOT
//! variant dot_f16 -DACT_F16 -DDOT
// Partial sums of (a - b)^2, or of a b: invocation p adds elements p*chunk .. in order.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, chunk;
    float scale;
    uint part0; // number of this dispatch's first partial sum
} pc;
layout(binding = 0) readonly buffer A { ELT a[]; };
layout(binding = 1) readonly buffer B { ELT b[]; };
layout(binding = 2) writeonly buffer Y { float y[]; };

void main()
{
    uint p = group_linear() * 64 + gl_LocalInvocationID.x, first = p * pc.chunk;
    if (first >= pc.n)
        return;
    float sum = 0.0;
    for (uint i = first; i < min(first + pc.chunk, pc.n); i++) {
#ifdef DOT
        sum += float(a[i]) * float(b[i]);
#else
        float d = float(a[i]) - float(b[i]);
        sum += d * d;
#endif
    }
    y[pc.part0 + p] = sum;
}
