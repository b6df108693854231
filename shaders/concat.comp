#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[r, 0..wa) = a[r], y[r, wa..wa+wb) = b[r].  One invocation an element of y (four when VEC;
// widths are then in vec4): one dispatch writes y, so that nothing has to be ordered inside it.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 1;
layout(push_constant) uniform Push {
    uint n, wa, wb;
} pc;
layout(binding = 0) readonly buffer A { ELT a[]; };
layout(binding = 0) readonly buffer A4 { ELT4 a4[]; };
layout(binding = 1) readonly buffer B { ELT b[]; };
layout(binding = 1) readonly buffer B4 { ELT4 b4[]; };
layout(binding = 2) writeonly buffer Y { ELT y[]; };
layout(binding = 2) writeonly buffer Y4 { ELT4 y4[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint w = pc.wa + pc.wb, row = i / w, c = i - row * w;
    if (VEC == 1)
        y4[i] = c < pc.wa ? a4[row * pc.wa + c] : b4[row * pc.wb + c - pc.wa];
    else
        y[i] = c < pc.wa ? a[row * pc.wa + c] : b[row * pc.wb + c - pc.wa];
}
