// shaders/attention.glsl - storage of activations in the attention kernels: quads of channels, read
// through texel buffers (-DTEXEL) or storage buffers, f32 or f16 (-DACT_F16).
#ifndef IPT_ATTENTION_GLSL
#define IPT_ATTENTION_GLSL
#include "common.glsl"
#ifdef TEXEL
#ifdef ACT_F16
#define QUADS_IN(b, name) layout(binding = b, rgba16f) uniform readonly imageBuffer name
#else
#define QUADS_IN(b, name) layout(binding = b, rgba32f) uniform readonly imageBuffer name
#endif
#define LOAD4(name, i) imageLoad(name, int(i))
#else
#define QUADS_IN(b, name)                                                                          \
    layout(binding = b, std430) readonly buffer name##_block { ELT4 name[]; }
#define LOAD4(name, i) vec4(name[i])
#endif
#define QUADS_OUT(b, name)                                                                         \
    layout(binding = b, std430) writeonly buffer name##_block { ELT4 name[]; }
const float LOG2E = 1.44269504088896340736;
const float LN2 = 0.69314718055994530942;
const float MASKED = -1e30; // score of a key that must not be seen: exp2(MASKED - m) = 0
#endif
