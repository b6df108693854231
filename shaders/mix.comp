#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[r,o,c] = g sum_i p[i,o] x[r,i,c]: a small matrix from the left of every row's matrix;
// with SWAPPED y[r,c,o], with ADDS plus `more`, of y's shape; g = gates[row,b,slot[0]] of the row's
// batch element when GATED, else 1. One invocation: one column, or four when VEC (c % 4 == 0), of
// OUTPUTS outputs; their block is the grid's z.  With INPUTS the matrix is known, [INPUTS,OUTPUTS],
// no invocation is left over and nothing stands in control flow: only there does llvmpipe read p
// once for all invocations of a vector.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 0;
layout(constant_id = 1) const uint OUTPUTS = 4;
layout(constant_id = 2) const uint GATED = 0;
layout(constant_id = 3) const uint INPUTS = 0;
layout(constant_id = 4) const uint ADDS = 0;
layout(constant_id = 5) const uint SWAPPED = 0;
layout(push_constant) uniform Push {
    uint n, n_i, n_o, n_c; // invocations; columns counted in items
    uint first, each;      // row of the tensor, rows of a batch element
    uint batch, n_slot, row;
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 0) readonly buffer X4 { ELT4 x4[]; };
layout(binding = 1) readonly buffer P { ELT p[]; };
layout(binding = 2) readonly buffer G { float gates[]; };
layout(binding = 3) readonly buffer S { int slot[]; };
layout(binding = 4) writeonly buffer Y { ELT y[]; };
layout(binding = 4) writeonly buffer Y4 { ELT4 y4[]; };
layout(binding = 5) readonly buffer R { ELT more[]; };
layout(binding = 5) readonly buffer R4 { ELT4 more4[]; };

float gate_of(uint r)
{
    uint s = uint(slot[0]), b = (pc.first + r) / pc.each;
    float g = gates[(pc.row * pc.batch + b) * pc.n_slot + min(s, pc.n_slot - 1)];
    return s < pc.n_slot ? g : 0.0;
}

void main()
{
    uint item = group_linear() * 64 + gl_LocalInvocationID.x;
    if (INPUTS == 0 && item >= pc.n)
        return;
    uint r = item / pc.n_c, c = item - r * pc.n_c, o = INPUTS > 0 ? 0 : gl_WorkGroupID.z * OUTPUTS;
    vec4 sum[8] = vec4[8](vec4(0), vec4(0), vec4(0), vec4(0), vec4(0), vec4(0), vec4(0), vec4(0));
    float g = 1.0;
    if (GATED == 1)
        g = gate_of(r);
    if (INPUTS > 0) {
        uint at = r * INPUTS * pc.n_c + c;
        [[unroll]] for (uint i = 0; i < 8; i++) {
            if (i < INPUTS) {
                vec4 v = VEC == 1 ? vec4(x4[at + i * pc.n_c]) : vec4(float(x[at + i * pc.n_c]));
                [[unroll]] for (uint k = 0; k < 8; k++)
                    if (k < OUTPUTS)
                        sum[k] += float(p[i * OUTPUTS + k]) * v;
            }
        }
    } else {
        uint last = pc.n_o - 1, line = 0, at = r * pc.n_i * pc.n_c + c;
        for (uint i = 0; i < pc.n_i; i++, at += pc.n_c, line += pc.n_o) {
            vec4 v = VEC == 1 ? vec4(x4[at]) : vec4(float(x[at]));
            [[unroll]] for (uint k = 0; k < 8; k++)
                if (k < OUTPUTS)
                    sum[k] += float(p[line + min(o + k, last)]) * v;
        }
    }
    uint outputs = INPUTS > 0 ? OUTPUTS : pc.n_o;
    if (SWAPPED == 1) {
        uint per = VEC == 1 ? 4 : 1, to = (r * pc.n_c + c) * per * outputs + o;
        [[unroll]] for (uint j = 0; j < 4; j++)
            [[unroll]] for (uint k = 0; k < 8; k++) {
                uint at = to + j * outputs + k;
                if (j < per && k < OUTPUTS && (INPUTS > 0 || o + k < pc.n_o))
                    y[at] = ELT(g * sum[k][j] + (ADDS == 1 ? float(more[at]) : 0.0));
            }
        return;
    }
    uint to = (r * outputs + o) * pc.n_c + c;
    [[unroll]] for (uint k = 0; k < 8; k++) {
        uint at = to + k * pc.n_c;
        if (k < OUTPUTS && (INPUTS > 0 || o + k < pc.n_o)) {
            if (VEC == 1)
                y4[at] = ELT4(g * sum[k] + (ADDS == 1 ? vec4(more4[at]) : vec4(0)));
            else
                y[at] = ELT(g * sum[k].x + (ADDS == 1 ? float(more[at]) : 0.0));
        }
    }
}
