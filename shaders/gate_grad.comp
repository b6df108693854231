#version 450
//! variant f32
//! variant f16 -DACT_F16
// dgates[w,n,s] = sum over t and the columns r with slot[r] = s of h dy in row w = row, else 0.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, t, r, batch, n_slot, row, n_row;
    uint first, count, add; // tokens of this dispatch; add to what is there
} pc;
layout(binding = 0) readonly buffer H { ELT h[]; };
layout(binding = 1) readonly buffer D { ELT dy[]; };
layout(binding = 2) readonly buffer S { int slot[]; };
layout(binding = 3) buffer Y { float y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint s = i % pc.n_slot, b = i / pc.n_slot % pc.batch, w = i / (pc.n_slot * pc.batch);
    // tokens of batch element b that are bound, counted from the binding's first
    uint t0 = max(b * pc.t, pc.first), t1 = min((b + 1) * pc.t, pc.first + pc.count);
    float sum = pc.add == 1 ? y[i] : 0.0;
    for (uint r = 0; w == pc.row && r < pc.r; r++)
        if (uint(slot[r]) == s)
            for (uint t = t0; t < t1; t++) {
                uint e = (t - pc.first) * pc.r + r;
                sum += float(h[e]) * float(dy[e]);
            }
    y[i] = sum;
}
