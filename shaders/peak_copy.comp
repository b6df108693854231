// shaders/peak_copy.comp - y = x as fast as the device reads and writes memory, for `impasto
// bench`.  A workgroup copies one piece of PER quads an invocation, neighbours side by side.
// Grid: x only, exactly the buffer.  No shared memory.
#version 450
#extension GL_EXT_control_flow_attributes : require
//! variant ssbo
//! variant texel -DTEXEL

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const int PER = 1;
#ifdef TEXEL
layout(set = 0, binding = 0, rgba32f) uniform readonly restrict imageBuffer x;
#else
layout(set = 0, binding = 0) readonly restrict buffer X { vec4 x[]; };
#endif
layout(set = 0, binding = 1) writeonly restrict buffer Y { vec4 y[]; };

void main()
{
    uint at = gl_WorkGroupID.x * gl_WorkGroupSize.x * PER + gl_LocalInvocationID.x;
    for (int i = 0; i < PER; i++, at += gl_WorkGroupSize.x)
#ifdef TEXEL
        y[at] = imageLoad(x, int(at));
#else
        y[at] = x[at];
#endif
}
