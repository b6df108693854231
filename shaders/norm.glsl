// shaders/norm.glsl - storage of activations in the normalisation kernels.  An item is what one
// invocation handles per pixel: four channels (VEC 4) or one (VEC 1, when C % 4 != 0).
// -DTEXEL reads through texel buffers, -DACT_F16 stores 16 bits, -DSCALAR makes items one channel.
#ifndef IPT_NORM_GLSL
#define IPT_NORM_GLSL
#include "common.glsl"
#ifdef SCALAR
#define VEC 1
#define ITEM float
#define STORED ELT
#else
#define VEC 4
#define ITEM vec4
#define STORED ELT4
#endif
#ifdef TEXEL
#ifdef ACT_F16
#define ITEMS_IN(b, name) layout(binding = b, rgba16f) uniform readonly imageBuffer name
#else
#define ITEMS_IN(b, name) layout(binding = b, rgba32f) uniform readonly imageBuffer name
#endif
#define LOAD(name, i) imageLoad(name, int(i))
#else
#define ITEMS_IN(b, name)                                                                          \
    layout(binding = b, std430) readonly buffer name##_block { STORED name[]; }
#define LOAD(name, i) ITEM(name[i])
#endif
#define ITEMS_OUT(b, name)                                                                         \
    layout(binding = b, std430) writeonly buffer name##_block { STORED name[]; }
// f32 vectors over channels.
#define FLOATS_IN(b, name)                                                                         \
    layout(binding = b, std430) readonly buffer name##_block { float name[]; }
#endif
