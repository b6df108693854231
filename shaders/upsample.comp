#version 450
//! variant f32
//! variant f16 -DACT_F16
// Nearest neighbour: y[n,i,j,c] = x[n, i h / oh, j w / ow, c]; gradient: sums over the copies.
// One invocation an element of the result (four when VEC; c is then in vec4).
#include "common.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint BWD = 0;
layout(constant_id = 1) const uint VEC = 1;
layout(push_constant) uniform Push {
    uint n, c, h, w, oh, ow;
    uint first, src0; // items of the result and of the source before their bindings
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 0) readonly buffer X4 { ELT4 x4[]; };
layout(binding = 1) writeonly buffer Y { ELT y[]; };
layout(binding = 1) writeonly buffer Y4 { ELT4 y4[]; };

vec4 load(uint i) { return VEC == 1 ? vec4(x4[i]) : vec4(float(x[i])); }

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint c = i % pc.c, p = (pc.first + i) / pc.c, w = BWD == 1 ? pc.w : pc.ow,
         h = BWD == 1 ? pc.h : pc.oh;
    uint px = p % w, py = p / w % h, b = p / (w * h);
    vec4 v = vec4(0.0);
    if (BWD == 0) {
        v = load(((b * pc.h + py * pc.h / pc.oh) * pc.w + px * pc.w / pc.ow) * pc.c + c - pc.src0);
    } else {
        // the copies of row py are ceil(py oh / h) .. ceil((py + 1) oh / h) - 1
        uint y0 = (py * pc.oh + pc.h - 1) / pc.h, y1 = ((py + 1) * pc.oh + pc.h - 1) / pc.h;
        uint x0 = (px * pc.ow + pc.w - 1) / pc.w, x1 = ((px + 1) * pc.ow + pc.w - 1) / pc.w;
        for (uint yy = y0; yy < y1; yy++)
            for (uint xx = x0; xx < x1; xx++)
                v += load(((b * pc.oh + yy) * pc.ow + xx) * pc.c + c - pc.src0);
    }
    if (VEC == 1)
        y4[i] = ELT4(v);
    else
        y[i] = ELT(v.x);
}
