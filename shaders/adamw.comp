#version 450
// One step of AdamW in place, one invocation an element; h: graph.h's hyper.
// Source: Loshchilov and Hutter 2019; order of operations: torch.optim.AdamW.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n;
} pc;
layout(binding = 0) buffer W { float w[]; };
layout(binding = 1) readonly buffer D { float d[]; };
layout(binding = 2) buffer M { float m[]; };
layout(binding = 3) buffer V { float v[]; };
layout(binding = 4) readonly buffer H { float h[8]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    float rate = h[0], b1 = h[1], b2 = h[2], g = d[i] * h[7];
    float mi = m[i] + (1.0 - b1) * (g - m[i]), vi = b2 * v[i] + (1.0 - b2) * g * g;
    m[i] = mi;
    v[i] = vi;
    w[i] = w[i] * (1.0 - rate * h[4]) - rate * h[5] * mi / (sqrt(vi) * h[6] + h[3]);
}
