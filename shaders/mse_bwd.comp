#version 450
//! variant f32
//! variant f16 -DACT_F16
// da = 2/n (a - b) dloss.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, chunk;
    float scale;
    uint part0; // number of this dispatch's first partial sum
} pc;
layout(binding = 0) readonly buffer A { ELT a[]; };
layout(binding = 1) readonly buffer B { ELT b[]; };
layout(binding = 2) readonly buffer L { float dloss[]; };
layout(binding = 3) writeonly buffer Y { ELT y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i < pc.n)
        y[i] = ELT(pc.scale * (float(a[i]) - float(b[i])) * dloss[0]);
}
