#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[n,t,r] = h[n,t,r] gates[row,n,slot[r]]; a padding column (slot < 0) gives 0.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, t, r, batch, n_slot, row, n_row;
} pc;
layout(binding = 0) readonly buffer H { ELT h[]; };
layout(binding = 1) readonly buffer G { float gates[]; };
layout(binding = 2) readonly buffer S { int slot[]; };
layout(binding = 3) writeonly buffer Y { ELT y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint b = i / (pc.r * pc.t), s = uint(slot[i % pc.r]);
    float gate = s < pc.n_slot ? gates[(pc.row * pc.batch + b) * pc.n_slot + s] : 0.0;
    y[i] = s < pc.n_slot ? ELT(float(h[i]) * gate) : ELT(0.0);
}
