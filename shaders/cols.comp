#version 450
//! variant f32
//! variant f16 -DACT_F16
// Copies columns of rows: dst[r, dst_at + c] = src[r, src_at + c]; with fill the whole row of dst
// is written, zero outside.  One invocation an element (four when VEC; then all numbers are in
// vec4).
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 1;
layout(push_constant) uniform Push {
    uint n, width, src_width, src_at, dst_width, dst_at, fill;
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
    uint per = pc.fill == 1 ? pc.dst_width : pc.width, row = i / per, c = i - row * per;
    bool inside = true;
    if (pc.fill == 1) {
        inside = c >= pc.dst_at && c < pc.dst_at + pc.width;
        c -= inside ? pc.dst_at : 0;
    }
    uint from = row * pc.src_width + pc.src_at + c;
    uint to = pc.fill == 1 ? i : row * pc.dst_width + pc.dst_at + c;
    if (VEC == 1)
        y4[to] = inside ? x4[from] : ELT4(0.0);
    else
        y[to] = inside ? x[from] : ELT(0.0);
}
