// shaders/norm_layer.comp - layer norm over the last axis: one workgroup per row.
//   MODE y:    y = (x - mean) rstd gamma + beta          bindings x, gamma, beta, y
//   -DDX:      dx = rstd (gamma dy - s1 - xhat s2), s1 s2 row means of gamma dy, gamma dy xhat
//                                                        bindings x, gamma, dy, dx
//   -DSTAT:    stat[row] = (mean, rstd)                   bindings x, stat
// Two passes (mean, then deviations), f32.  y may be x: a row is read wholly before it is written,
// each invocation writes what it alone reads in the last pass.
// Grid: linear, WG invocations per row.  -DSUBGROUP: WG is one subgroup, sums by subgroupAdd;
// else WG is 64 and sums go through 64 floats of shared memory.
//! variant f32_texel -DTEXEL=1 -DSUBGROUP=1
//! variant f16_texel -DTEXEL=1 -DSUBGROUP=1 -DACT_F16=1
//! variant f32 -DSCALAR=1
//! variant f16 -DSCALAR=1 -DACT_F16=1
//! variant dx_f32_texel -DTEXEL=1 -DSUBGROUP=1 -DDX=1
//! variant dx_f16_texel -DTEXEL=1 -DSUBGROUP=1 -DACT_F16=1 -DDX=1
//! variant dx_f32 -DSCALAR=1 -DDX=1
//! variant dx_f16 -DSCALAR=1 -DACT_F16=1 -DDX=1
//! variant stat_f32 -DSCALAR=1 -DSTAT=1
//! variant stat_f16 -DSCALAR=1 -DACT_F16=1 -DSTAT=1
#version 450
#extension GL_GOOGLE_include_directive : require
#ifdef SUBGROUP
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#endif
#include "norm.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 64;
layout(push_constant) uniform Push {
    uint n_row, items; // rows of this dispatch, items per row
    uint base;         // items between the start of the bindings and the first row
    uint row0;         // number of the first row (stat)
    float inv_c, eps;
} pc;
ITEMS_IN(0, x_in);
#ifdef STAT
layout(binding = 1, std430) writeonly buffer StatBlock { vec2 stat[]; };
#else
#ifdef TEXEL
#define PARAM_IN(b, name) layout(binding = b, rgba32f) uniform readonly imageBuffer name
#define PARAM(name, i) imageLoad(name, int(i))
#else
#define PARAM_IN(b, name)                                                                          \
    layout(binding = b, std430) readonly buffer name##_block { ITEM name[]; }
#define PARAM(name, i) name[i]
#endif
PARAM_IN(1, gamma);
#ifdef DX
ITEMS_IN(2, dy_in);
#else
PARAM_IN(2, beta);
#endif
ITEMS_OUT(3, y_out);
#endif

#ifdef SCALAR
#define FIRST(v) (v)
float across(float x) { return x; }
#else
#define FIRST(v) (v).x
float across(vec4 x) { return (x.x + x.y) + (x.z + x.w); }
#endif
#ifdef SUBGROUP
float add_up(float x) { return subgroupAdd(x); }
#else
shared float red[64];
float add_up(float x)
{
    const uint tid = gl_LocalInvocationID.x;
    barrier();
    red[tid] = x;
    barrier();
    for (uint step = 32; step > 0; step /= 2) {
        if (tid < step)
            red[tid] += red[tid + step];
        barrier();
    }
    return red[0];
}
#endif

void main()
{
    const uint row = group_linear(), tid = gl_LocalInvocationID.x;
    if (row >= pc.n_row) // uniform
        return;
    const uint at = pc.base + row * pc.items;
    const float first = FIRST(LOAD(x_in, at)); // deviations from it keep a large mean exact
    ITEM sum = ITEM(0);
    for (uint i = tid; i < pc.items; i += WG)
        sum += LOAD(x_in, at + i) - first;
    const float mean = first + add_up(across(sum)) * pc.inv_c;
    sum = ITEM(0);
    for (uint i = tid; i < pc.items; i += WG) {
        const ITEM v = LOAD(x_in, at + i) - mean;
        sum += v * v;
    }
    const float rstd = 1.0 / sqrt(add_up(across(sum)) * pc.inv_c + pc.eps);
#if defined(STAT)
    if (tid == 0)
        stat[pc.row0 + row] = vec2(mean, rstd);
#elif defined(DX)
    ITEM s1 = ITEM(0), s2 = ITEM(0);
    for (uint i = tid; i < pc.items; i += WG) {
        const ITEM g = LOAD(dy_in, at + i) * PARAM(gamma, i);
        s1 += g;
        s2 += g * (LOAD(x_in, at + i) - mean);
    }
    const float m1 = add_up(across(s1)) * pc.inv_c;
    const float m2 = add_up(across(s2)) * pc.inv_c * rstd;
    for (uint i = tid; i < pc.items; i += WG) {
        const ITEM xhat = (LOAD(x_in, at + i) - mean) * rstd;
        y_out[at + i] = STORED(rstd * (LOAD(dy_in, at + i) * PARAM(gamma, i) - m1 - xhat * m2));
    }
#else
    for (uint i = tid; i < pc.items; i += WG)
        y_out[at + i] =
            STORED((LOAD(x_in, at + i) - mean) * rstd * PARAM(gamma, i) + PARAM(beta, i));
#endif
}
