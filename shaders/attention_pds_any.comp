// shaders/attention_pds_any.comp - attention_pds.comp for CPU devices: an invocation has a row to
// itself, no shared memory, no barrier.
//   ds = scale p (dp - rowsum(p dp)), f32 scratch
// Grid: one invocation per row, 64 a group (linear).
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

void main()
{
    const uint r = group_linear() * 64 + gl_LocalInvocationID.x;
    if (r >= pc.n_row)
        return;
    const uint p_at = pc.p_off + r * pc.n, dp_at = pc.dp_off + r * pc.n;
    float sum = 0;
    for (uint j = 0; j < pc.n; j++)
        sum += float(p[p_at + j]) * float(dp[dp_at + j]);
    for (uint j = 0; j < pc.n; j++)
        ds[r * pc.n + j] = pc.scale * float(p[p_at + j]) * (float(dp[dp_at + j]) - sum);
}
