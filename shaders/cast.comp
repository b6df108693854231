#version 450
//! variant f32
//! variant f32_f16 -DOUT_F16
//! variant f16 -DACT_F16 -DOUT_F16
//! variant f16_f32 -DACT_F16
// Element type conversion, one invocation an element.
#ifdef OUT_F16
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#define OELT float16_t
#else
#define OELT float
#endif
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n;
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 1) writeonly buffer Y { OELT y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i < pc.n)
        y[i] = OELT(float(x[i]));
}
