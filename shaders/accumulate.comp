#version 450
// y += x, one invocation an element.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n;
} pc;
layout(binding = 0) buffer Y { float y[]; };
layout(binding = 1) readonly buffer X { float x[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i < pc.n)
        y[i] += x[i];
}
