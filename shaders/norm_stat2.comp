// shaders/norm_stat2.comp - group norm, second stage: stat[n,g] = (mean, 1 / sqrt(var + eps)) from
// the partial (mean, m2) of every channel and chunk (Chan, Golub and LeVeque 1983, pairwise
// update).
// Grid: one workgroup of 64 per (n, g), linear.  Shared memory: 64 floats.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n_row, groups, per_group, chunks, pixels, chunk;
    float inv_count, eps;
} pc;
layout(binding = 0, std430) readonly buffer PartBlock { vec2 part[]; };
layout(binding = 1, std430) writeonly buffer StatBlock { vec2 stat[]; };
shared float red[64];

float add_up(float x)
{
    const uint tid = gl_LocalInvocationID.x;
    barrier();
    red[tid] = x;
    barrier();
    for (uint step = 32; step > 0; step /= 2) {
        if (tid < step)
            red[tid] += red[tid + step];
        barrier();
    }
    return red[0];
}

void main()
{
    const uint row = group_linear(), tid = gl_LocalInvocationID.x;
    if (row >= pc.n_row) // uniform
        return;
    const uint channels = pc.groups * pc.per_group, total = pc.chunks * pc.per_group;
    const uint base = row / pc.groups * pc.chunks * channels + row % pc.groups * pc.per_group;
    const float first = part[base].x; // deviations from it keep a large mean exact
    float sum = 0;
    for (uint e = tid; e < total; e += 64) {
        const uint i = e / pc.per_group;
        const float count = float(min(pc.chunk, pc.pixels - i * pc.chunk));
        sum += (part[base + i * channels + e % pc.per_group].x - first) * count;
    }
    const float mean = first + add_up(sum) * pc.inv_count;
    float m2 = 0;
    for (uint e = tid; e < total; e += 64) {
        const uint i = e / pc.per_group;
        const float count = float(min(pc.chunk, pc.pixels - i * pc.chunk));
        const vec2 v = part[base + i * channels + e % pc.per_group];
        m2 += v.y + (v.x - mean) * (v.x - mean) * count;
    }
    m2 = add_up(m2);
    if (tid == 0)
        stat[row] = vec2(mean, 1.0 / sqrt(m2 * pc.inv_count + pc.eps));
}
