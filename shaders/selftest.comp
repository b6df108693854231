// shaders/selftest.comp - y[i] = a * x[i] + b over n elements: the smallest kernel of every load
// path, for tests of vk/.  Grid: one invocation an element, x only.  No shared memory.
//! variant -
//! variant texel -DTEXEL
//! variant f16 -DACT_F16
#version 450
#include "common.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const float B = 0.0;
#ifdef TEXEL
layout(set = 0, binding = 0, rgba32f) uniform readonly restrict imageBuffer x_in;
#else
layout(set = 0, binding = 0) readonly restrict buffer X { ELT x[]; };
#endif
layout(set = 0, binding = 1) writeonly restrict buffer Y { ELT y[]; };
layout(push_constant) uniform Push {
    uint n;
    float a;
} pc;

void main()
{
    uint i = gl_GlobalInvocationID.x;
    if (i >= pc.n)
        return;
#ifdef TEXEL
    float v = imageLoad(x_in, int(i / 4u))[i % 4u];
#else
    float v = float(x[i]);
#endif
    y[i] = ELT(pc.a * v + B);
}
