// shaders/attention_pds.comp - gradient of a row softmax: ds = scale p (dp - rowsum(p dp)), f32
// scratch.
// Grid: one workgroup of 64 per row (linear).  Shared memory: 64 floats.
//! variant f32
//! variant f16 -DACT_F16=1
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n_row, n, p_off, dp_off;
    float scale;
} pc;
layout(binding = 0, std430) readonly buffer PBlock { ELT p[]; };
layout(binding = 1, std430) readonly buffer DpBlock { ELT dp[]; };
layout(binding = 2, std430) writeonly buffer DsBlock { float ds[]; };
shared float part[64];

void main()
{
    const uint r = group_linear(), tid = gl_LocalInvocationID.x;
    if (r >= pc.n_row) // uniform
        return;
    float sum = 0;
    for (uint j = tid; j < pc.n; j += 64)
        sum += float(p[pc.p_off + r * pc.n + j]) * float(dp[pc.dp_off + r * pc.n + j]);
    part[tid] = sum;
    barrier();
    for (uint step = 32; step > 0; step /= 2) {
        if (tid < step)
            part[tid] += part[tid + step];
        barrier();
    }
    sum = part[0];
    for (uint j = tid; j < pc.n; j += 64)
        ds[r * pc.n + j] = pc.scale * float(p[pc.p_off + r * pc.n + j]) *
                           (float(dp[pc.dp_off + r * pc.n + j]) - sum);
}
