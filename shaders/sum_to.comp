#version 450
//! variant f32
//! variant f16 -DACT_F16 -DOUT_ACT
//! variant f16_f32 -DACT_F16
//! variant f32_f16 -DOUT_F16
// Sums the axes marked in is_red.  Invocation i: result o = i % n_out, part p = i / n_out; adds
// elements p*chunk .. of the reduced index space in order (deterministic).  Partial sums lie as
// [part, n_out]; a part beyond the elements adds nothing.
#ifdef OUT_F16
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#endif
#include "common.glsl"
#if defined(OUT_F16)
#define OELT float16_t
#elif defined(OUT_ACT)
#define OELT ELT
#else
#define OELT float
#endif
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n_out, n_red, chunk, dim[4], is_red;
    uint parts, add; // add: to what is there
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 1) buffer Y { OELT y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    uint part = i / pc.n_out, o = i - part * pc.n_out;
    uint first = part * pc.chunk, last = min(first + pc.chunk, pc.n_red);
    if (part >= pc.parts)
        return;
    uvec4 stride; // a local array would inherit the push block's ArrayStride, which newer SPIR-V
                  // rules refuse
    uint base = 0, r = o, s = 1;
    for (int k = 3; k >= 0; k--) {
        stride[k] = s;
        s *= pc.dim[k];
    }
    for (int k = 3; k >= 0; k--)
        if ((pc.is_red >> k & 1u) == 0u) {
            base += r % pc.dim[k] * stride[k];
            r /= pc.dim[k];
        }
    float sum = pc.add == 1 ? float(y[i]) : 0.0;
    for (uint j = first; j < last; j++) {
        uint at = base, q = j;
        for (int k = 3; k >= 0; k--)
            if ((pc.is_red >> k & 1u) == 1u) {
                at += q % pc.dim[k] * stride[k];
                q /= pc.dim[k];
            }
        sum += float(x[at]);
    }
    y[i] = OELT(sum);
}
