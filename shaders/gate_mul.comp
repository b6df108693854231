#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[n,t,r] = h[n,t,r] gates[row,n,slot[r]]; a padding column (slot < 0) gives 0.
// One invocation an element, or four columns when VEC (r % 4 == 0): divisions are the dear part.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 0;
layout(push_constant) uniform Push {
    uint n, t, r, batch, n_slot, row, n_row;
    uint first, count, add; // tokens of this dispatch; add to what is there
} pc;
layout(binding = 0) readonly buffer H { ELT h[]; };
layout(binding = 0) readonly buffer H4 { ELT4 h4[]; };
layout(binding = 1) readonly buffer G { float gates[]; };
layout(binding = 2) readonly buffer S { int slot[]; };
layout(binding = 3) writeonly buffer Y { ELT y[]; };
layout(binding = 3) writeonly buffer Y4 { ELT4 y4[]; };

float gate(uint b, uint column)
{
    uint s = uint(slot[column]);
    return s < pc.n_slot ? gates[(pc.row * pc.batch + b) * pc.n_slot + s] : 0.0;
}
bool used(uint column) { return uint(slot[column]) < pc.n_slot; }

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x, per = VEC == 1 ? pc.r / 4 : pc.r;
    if (i >= (VEC == 1 ? pc.n / 4 : pc.n))
        return;
    uint token = i / per, c = i - token * per, b = (pc.first + token) / pc.t;
    if (VEC == 1) {
        c *= 4;
        vec4 k = vec4(gate(b, c), gate(b, c + 1), gate(b, c + 2), gate(b, c + 3));
        bvec4 on = bvec4(used(c), used(c + 1), used(c + 2), used(c + 3));
        y4[i] = ELT4(mix(vec4(0.0), vec4(h4[i]) * k, on));
    } else {
        y[i] = used(c) ? ELT(float(h[i]) * gate(b, c)) : ELT(0.0);
    }
}
