// shaders/gemm_parts.comp - adds up what the parts of a deep product made (gemm_coop.glsl, -DPARTS)
// and does what the product's epilogue does.
//
// binding 0: f32 sums [parts][pc.each rows][pc.side_cols]; the rest as in gemm_iface.glsl.  An
// invocation has four columns of one row.  Grid: linear.
#version 450
//! variant f16 -DACT_F16
#extension GL_GOOGLE_include_directive : require
#include "gemm_iface.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const int PARTS = 2;
layout(constant_id = 2) const int HAS = 0;

layout(binding = 0, std430) readonly buffer part_block { vec4 part_data[]; };

void main()
{
    int across = min(pc.cols - pc.col0, pc.panels * 32) + 3 >> 2; // quads of columns
    int e = int(group_linear() * gl_WorkGroupSize.x + gl_LocalInvocationID.x);
    int row = e / across;
    int c = e - row * across;
    if (row >= pc.rows)
        return;
    int pitch = pc.side_cols >> 2;
    int at = row * pitch + c;
    vec4 v = part_data[at];
    for (int part = 1; part < PARTS; part++)
        v += part_data[part * pc.each * pitch + at];
    int col = pc.col0 + c * 4;
    gemm_begin(row, col);
    gemm_store(HAS, 0, col, (HAS & HAS_BIAS) != 0 ? v + gemm_bias(col) : v);
}
