// shaders/norm_csum.comp - last stage of parameter gradients: dbeta[c] = sum over rows of
// part[row][c].x, dgamma[c] = the same of .y.  Grid: linear over channels, 64 per workgroup.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint channels, rows;
} pc;
layout(binding = 0, std430) readonly buffer PartBlock { vec2 part[]; };
layout(binding = 1, std430) writeonly buffer GammaBlock { float dgamma[]; };
layout(binding = 2, std430) writeonly buffer BetaBlock { float dbeta[]; };

void main()
{
    const uint c = group_linear() * 64 + gl_LocalInvocationID.x;
    if (c >= pc.channels)
        return;
    vec2 sum = vec2(0);
    for (uint r = 0; r < pc.rows; r++)
        sum += part[r * pc.channels + c];
    dgamma[c] = sum.y;
    dbeta[c] = sum.x;
}
