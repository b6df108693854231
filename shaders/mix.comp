#version 450
//! variant f32
//! variant f16 -DACT_F16
// y[r,o,c] = sum_i p[i,o] x[r,i,c]: a small matrix from the left of every row's matrix.
// One invocation: one column, or four when VEC (c % 4 == 0), of four outputs o.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint VEC = 0;
layout(push_constant) uniform Push {
    uint n, n_i, n_o, n_c; // invocations; columns counted in items
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 0) readonly buffer X4 { ELT4 x4[]; };
layout(binding = 1) readonly buffer P { ELT p[]; };
layout(binding = 2) writeonly buffer Y { ELT y[]; };
layout(binding = 2) writeonly buffer Y4 { ELT4 y4[]; };

void main()
{
    uint item = group_linear() * 64 + gl_LocalInvocationID.x, blocks = (pc.n_o + 3) / 4;
    if (item >= pc.n)
        return;
    uint line = item / pc.n_c, c = item - line * pc.n_c, r = line / blocks;
    uint o = (line - r * blocks) * 4, last = pc.n_o - 1, at = r * pc.n_i * pc.n_c + c;
    uvec4 column = min(uvec4(o, o + 1, o + 2, o + 3), uvec4(last));
    vec4 sum[4] = vec4[4](vec4(0), vec4(0), vec4(0), vec4(0));
    for (uint i = 0; i < pc.n_i; i++, at += pc.n_c) {
        vec4 v = VEC == 1 ? vec4(x4[at]) : vec4(float(x[at]));
        uint row = i * pc.n_o;
        sum[0] += float(p[row + column.x]) * v;
        sum[1] += float(p[row + column.y]) * v;
        sum[2] += float(p[row + column.z]) * v;
        sum[3] += float(p[row + column.w]) * v;
    }
    uint to = (r * pc.n_o + o) * pc.n_c + c;
    for (uint k = 0; k < 4 && o + k < pc.n_o; k++, to += pc.n_c) {
        if (VEC == 1)
            y4[to] = ELT4(sum[k]);
        else
            y[to] = ELT(sum[k].x);
    }
}
