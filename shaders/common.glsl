// shaders/common.glsl - what every kernel shares: storage types, load and store, group numbers.
// Element storage is chosen with -DACT_F16 (16-bit storage, arithmetic stays f32).
#ifndef IPT_COMMON_GLSL
#define IPT_COMMON_GLSL
#extension GL_EXT_control_flow_attributes : require
#ifdef ACT_F16
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#define ELT float16_t
#define ELT4 f16vec4
#else
#define ELT float
#define ELT4 vec4
#endif
// Number of this workgroup when the host used ipt_launch_linear.
uint group_linear() { return gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x; }
#endif
