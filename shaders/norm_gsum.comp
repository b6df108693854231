// shaders/norm_gsum.comp - group norm gradient, second stage: per (n, g) the means over the group
// of gamma dz and gamma dz xhat.  Grid: one workgroup of 64 per (n, g), linear.  Shared: 64 vec2.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n_row, groups, per_group, chunks;
    float inv_count;
} pc;
layout(binding = 0, std430) readonly buffer PartBlock { vec2 part[]; };
layout(binding = 1, std430) readonly buffer GammaBlock { float gamma[]; };
layout(binding = 2, std430) writeonly buffer SumBlock { vec2 sums[]; };
shared vec2 red[64];

void main()
{
    const uint row = group_linear(), tid = gl_LocalInvocationID.x;
    if (row >= pc.n_row) // uniform
        return;
    const uint channels = pc.groups * pc.per_group, total = pc.chunks * pc.per_group;
    const uint c0 = row % pc.groups * pc.per_group;
    const uint base = row / pc.groups * pc.chunks * channels + c0;
    vec2 sum = vec2(0);
    for (uint e = tid; e < total; e += 64) {
        const uint c = e % pc.per_group;
        sum += part[base + e / pc.per_group * channels + c] * gamma[c0 + c];
    }
    red[tid] = sum;
    barrier();
    for (uint step = 32; step > 0; step /= 2) {
        if (tid < step)
            red[tid] += red[tid + step];
        barrier();
    }
    if (tid == 0)
        sums[row] = red[0] * pc.inv_count;
}
