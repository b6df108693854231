#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[b,:] = x[b, idx[b], :] and its gradient (zero elsewhere).
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint BWD = 0;
layout(push_constant) uniform Push {
    uint n, c, rows, t;
    uint first, end; // first: number of the first batch element of x and y
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 1) readonly buffer I { int idx[]; };
layout(binding = 2) writeonly buffer Y { ELT y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint c = i % pc.c;
    if (BWD == 0) {
        uint b = i / pc.c, r = uint(idx[pc.first + b]);
        y[i] = x[(b * pc.rows + (r < pc.rows ? r : 0)) * pc.c + c];
    } else {
        uint r = i / pc.c % pc.rows, b = i / pc.c / pc.rows, want = uint(idx[pc.first + b]);
        y[i] = r == (want < pc.rows ? want : 0) ? x[b * pc.c + c] : ELT(0.0);
    }
}
