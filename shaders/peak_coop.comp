// shaders/peak_coop.comp - as many multiply-adds as matrix units do, for `impasto bench`: nothing
// but products f16 x f16 -> f32 of matrices in registers.
//
// Four sums a subgroup do not wait for each other.  All values come from push constants and differ
// within a matrix: where matrices are emulated, equal ones would be computed once.  The result is
// not pc.never, which no compiler can know.  Grid: x only.  No shared memory.
#version 450
//! requires GL_KHR_cooperative_matrix
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_GOOGLE_include_directive : require
#include "coop.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const int TURNS = 1;
layout(constant_id = 2) const int TM = 16; // the device's matrix shape
layout(constant_id = 3) const int TN = 16;
layout(constant_id = 4) const int TK = 16;
layout(set = 0, binding = 0) writeonly restrict buffer Y { float y[]; };
layout(push_constant) uniform Push {
    float a, b, never;
} pc;
const int CHAINS = 4, STEPS = 4; // sums; products of each in a turn

void main()
{
    float lane = 1 + float(gl_LocalInvocationID.x);
    matrix_a a;
    matrix_b b;
    matrix_c sum[CHAINS];
    for (int i = 0; i < a.length(); i++)
        a[i] = float16_t(pc.a * (lane + float(i)));
    for (int i = 0; i < b.length(); i++)
        b[i] = float16_t(pc.b * (lane + float(i)));
    [[unroll]] for (int i = 0; i < CHAINS; i++)
        sum[i] = matrix_c(pc.b * float(i));
    for (int turn = 0; turn < TURNS; turn++) {
        [[unroll]] for (int step = 0; step < STEPS; step++) {
            [[unroll]] for (int i = 0; i < CHAINS; i++)
                sum[i] = coopMatMulAdd(a, b, sum[i]);
        }
    }
    [[unroll]] for (int i = 1; i < CHAINS; i++)
        sum[0] += sum[i];
    float total = 0;
    for (int i = 0; i < sum[0].length(); i++)
        total += sum[0][i];
    if (total == pc.never)
        y[0] = total;
}
