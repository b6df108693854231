// shaders/norm_lpart.comp - layer norm parameter gradients, first stage: per chunk of rows and
// channel part[chunk][c] = (sum dy, sum dy xhat), xhat from stat[row] = (mean, rstd).
// Grid: linear over (chunk, channel), 64 per workgroup, channel fastest.
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint chunk0, n_chunk, chunk, rows, channels;
    uint base; // elements of the tensor before the bindings
} pc;
layout(binding = 0, std430) readonly buffer XBlock { ELT x[]; };
layout(binding = 1, std430) readonly buffer DyBlock { ELT dy[]; };
layout(binding = 2, std430) readonly buffer StatBlock { vec2 stat[]; };
layout(binding = 3, std430) writeonly buffer PartBlock { vec2 part[]; };

void main()
{
    const uint e = group_linear() * 64 + gl_LocalInvocationID.x;
    const uint c = e % pc.channels, i = pc.chunk0 + e / pc.channels;
    if (i >= pc.chunk0 + pc.n_chunk)
        return;
    vec2 sum = vec2(0);
    for (uint r = i * pc.chunk; r < min(pc.rows, (i + 1) * pc.chunk); r++) {
        const vec2 k = stat[r];
        const uint at = r * pc.channels + c - pc.base;
        const float g = float(dy[at]);
        sum += vec2(g, g * (float(x[at]) - k.x) * k.y);
    }
    part[i * pc.channels + c] = sum;
}
