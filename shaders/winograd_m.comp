// shaders/winograd_m.comp - the products of transforms, back to 4 x 4 pixels of the result.
//   m [36][each][columns] -> y (+ bias + t + r), as the epilogue of gemm.comp
// One invocation: four columns of one tile.
// Grid: group_linear.  Shared memory: none.
#version 450
//! variant f32
//! variant f16 -DACT_F16
#extension GL_GOOGLE_include_directive : require
#include "winograd.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const int WG = 64;
layout(constant_id = 1) const int HAS_R = 0;
const int HAS_BIAS = 1, HAS_T = 2; // of pc.adds
layout(binding = 0, rgba32f) uniform readonly imageBuffer m_view;
layout(binding = 1, std430) writeonly buffer y_block { ELT4 y_data[]; };
layout(binding = 2, std430) readonly buffer bias_block { vec4 bias_data[]; };
layout(binding = 3, std430) readonly buffer t_block { ELT4 t_data[]; };
#ifdef ACT_F16
layout(binding = 4, rgba16f) uniform readonly imageBuffer r_view;
#else
layout(binding = 4, rgba32f) uniform readonly imageBuffer r_view;
#endif

void main()
{
    int item = int(group_linear()) * WG + int(gl_LocalInvocationID.x);
    int per = pc.n / pc.tiles; // quads of a tile
    int at = min(item, pc.n - 1), local = at / per, q = at - local * per;
    vec4 m[36];
    [[unroll]] for (int i = 0; i < 6; i++) {
        [[unroll]] for (int k = 0; k < 6; k++)
            m[i * 6 + k] = imageLoad(m_view, ((i * 6 + k) * pc.each + local) * pc.quads + q);
        TRANSFORM_M(m, i * 6, 1)
    }
    [[unroll]] for (int k = 0; k < 4; k++)
        TRANSFORM_M(m, k, 6)
    int tile = pc.tile0 + local, line = tile / pc.tw, image = line / pc.th;
    int y = (line - image * pc.th) * 4, x = (tile - line * pc.tw) * 4;
    int col = (pc.col0 >> 2) + q;
    if (item >= pc.n)
        return;
    // Not constants, which would make four pipelines of one; where there is none, -0 changes no
    // sum.
    bool has_bias = (pc.adds & HAS_BIAS) != 0, has_t = (pc.adds & HAS_T) != 0;
    const vec4 none = vec4(uintBitsToFloat(0x80000000u));
    vec4 bias = bias_data[has_bias ? col : 0];
    vec4 t = vec4(t_data[has_t ? image * (pc.cols >> 2) + col : 0]);
    vec4 more = vec4(0) + (has_bias ? bias : none) + (has_t ? t : none);
    [[unroll]] for (int i = 0; i < 4; i++)
        [[unroll]] for (int k = 0; k < 4; k++)
            if (y + i < pc.oh && x + k < pc.ow) {
                int row = (image * pc.oh + y + i) * pc.ow + x + k;
                int to = ((row * pc.ldy + pc.y0) >> 2) + col;
                vec4 v = m[i * 6 + k] + more;
                if (HAS_R != 0)
                    v += imageLoad(r_view, to);
                y_data[to - (pc.first >> 2)] = ELT4(v);
            }
}
