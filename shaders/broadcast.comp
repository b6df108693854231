#version 450
//! variant f32
//! variant f16 -DACT_F16
//! variant f16_f32 -DACT_F16 -DB_F32
// y = sa a + sb b or y = a b where axes of b may be 1.  One invocation a result element.
#include "common.glsl"
#ifdef B_F32
#define BELT float
#else
#define BELT ELT
#endif
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint MODE = 2; // 2 add, 3 mul
layout(push_constant) uniform Push {
    uint n, dim[4], stride[4];
    float a, b;
    uint first, b0; // elements of a and of b before their bindings
} pc;
layout(binding = 0) readonly buffer A { ELT a[]; };
layout(binding = 1) readonly buffer B { BELT b[]; };
layout(binding = 2) writeonly buffer Y { ELT y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint r = pc.first + i, at = 0u - pc.b0;
    for (int k = 3; k >= 0; k--) {
        uint q = r / pc.dim[k];
        at += (r - q * pc.dim[k]) * pc.stride[k];
        r = q;
    }
    float u = float(a[i]), v = float(b[at]);
    y[i] = ELT(MODE == 2 ? pc.a * u + pc.b * v : u * v);
}
