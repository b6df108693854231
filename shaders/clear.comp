#version 450
// y = 0, one invocation an element.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n;
} pc;
layout(binding = 0) writeonly buffer Y { float y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i < pc.n)
        y[i] = 0.0;
}
