#version 450
//! variant f32
//! variant f16 -DACT_F16
// dgates[w,n,s] = sum over t and the columns r with slot[r] = s of h dy in row w = row, else 0.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, t, r, batch, n_slot, row, n_row;
} pc;
layout(binding = 0) readonly buffer H { ELT h[]; };
layout(binding = 1) readonly buffer D { ELT dy[]; };
layout(binding = 2) readonly buffer S { int slot[]; };
layout(binding = 3) writeonly buffer Y { float y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint s = i % pc.n_slot, b = i / pc.n_slot % pc.batch, w = i / (pc.n_slot * pc.batch);
    float sum = 0.0;
    for (uint r = 0; w == pc.row && r < pc.r; r++)
        if (uint(slot[r]) == s)
            for (uint t = 0; t < pc.t; t++) {
                uint e = (b * pc.t + t) * pc.r + r;
                sum += float(h[e]) * float(dy[e]);
            }
    y[i] = sum;
}
