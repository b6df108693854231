#version 450
//! variant f32
//! variant f16 -DACT_F16
// Element by element: y = f(x), dx = f'(x) dy, y = sa a + sb b, y = a b.
// Grid: one invocation an element, or four when VEC (count % 4 == 0).  No shared memory.
#include "common.glsl"
#include "activation.glsl"
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint MODE = 0; // 0 unary, 1 unary gradient, 2 add, 3 mul
layout(constant_id = 1) const uint KIND = 0;
layout(constant_id = 2) const uint VEC = 1;
layout(push_constant) uniform Push {
    uint n;
    float a, b;
} pc;
layout(binding = 0) readonly buffer X { ELT x[]; };
layout(binding = 0) readonly buffer X4 { ELT4 x4[]; };
layout(binding = 1) readonly buffer B { ELT b[]; };
layout(binding = 1) readonly buffer B4 { ELT4 b4[]; };
layout(binding = 2) writeonly buffer Y { ELT y[]; };
layout(binding = 2) writeonly buffer Y4 { ELT4 y4[]; };

vec4 f(vec4 v)
{
    if (KIND == K_SILU)
        return v * sigmoid4(v);
    if (KIND == K_GELU)
        return gelu4(v);
    if (KIND == K_QUICK_GELU)
        return v * sigmoid4(1.702 * v);
    if (KIND == K_RELU)
        return max(v, vec4(0.0));
    if (KIND == K_TANH)
        return tanh4(v);
    return pc.a * v + pc.b;
}

vec4 slope(vec4 v)
{
    if (KIND == K_SILU) {
        vec4 s = sigmoid4(v);
        return s * (1.0 + v * (1.0 - s));
    }
    if (KIND == K_GELU)
        return gelu_slope4(v);
    if (KIND == K_QUICK_GELU) {
        vec4 s = sigmoid4(1.702 * v);
        return s * (1.0 + 1.702 * v * (1.0 - s));
    }
    if (KIND == K_RELU)
        return vec4(greaterThan(v, vec4(0.0)));
    if (KIND == K_TANH) {
        vec4 t = tanh4(v);
        return 1.0 - t * t;
    }
    return vec4(pc.a);
}

vec4 apply(vec4 u, vec4 v)
{
    if (MODE == 0)
        return f(u);
    if (MODE == 1)
        return slope(u) * v;
    if (MODE == 2)
        return pc.a * u + pc.b * v;
    return u * v;
}

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    if (VEC == 1)
        y4[i] = ELT4(apply(vec4(x4[i]), MODE == 0 ? vec4(0.0) : vec4(b4[i])));
    else
        y[i] = ELT(apply(vec4(float(x[i])), MODE == 0 ? vec4(0.0) : vec4(float(b[i]))).x);
}
