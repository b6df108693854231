// shaders/winograd_d.comp - tiles of 6 x 6 pixels of a picture, four pixels apart, and their
// transforms.
//   x [n,h,w,k] (seen through an enlargement to vh x vw) -> v [36][each][k]
// One invocation: four channels of one tile; those behind the last tile repeat it.
// Grid: group_linear.  Shared memory: none.
#version 450
//! variant f32
//! variant f16 -DACT_F16
#extension GL_GOOGLE_include_directive : require
#include "winograd.glsl"
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const int WG = 64;
layout(constant_id = 1) const int ENLARGED = 0; // other than 2^shift times
#ifdef ACT_F16
layout(binding = 0, rgba16f) uniform readonly imageBuffer x_view;
#else
layout(binding = 0, rgba32f) uniform readonly imageBuffer x_view;
#endif
layout(binding = 1, std430) writeonly buffer v_block { vec4 v_data[]; };

void main()
{
    int item = int(group_linear()) * WG + int(gl_LocalInvocationID.x);
    int at = min(item, pc.n - 1), local = at / pc.quads, q = at - local * pc.quads;
    int tile = pc.tile0 + min(local, pc.tiles - 1);
    int line = tile / pc.tw, image = line / pc.th;
    int y = (line - image * pc.th) * 4 - pc.pad, x = (tile - line * pc.tw) * 4 - pc.pad;
    vec4 v[36];
    [[unroll]] for (int i = 0; i < 6; i++) {
        bool in_y = y + i >= 0 && y + i < pc.vh;
        int sy = ENLARGED != 0 ? (y + i) * pc.h / pc.vh : (y + i) >> pc.shift;
        int from = (image * pc.h + (in_y ? sy : 0)) * pc.w;
        [[unroll]] for (int k = 0; k < 6; k++) {
            bool is_in = in_y && x + k >= 0 && x + k < pc.vw;
            int sx = ENLARGED != 0 ? (x + k) * pc.w / pc.vw : (x + k) >> pc.shift;
            vec4 d = imageLoad(x_view, (from + (is_in ? sx : 0)) * pc.quads + q);
            v[i * 6 + k] = is_in ? d : vec4(0);
        }
        TRANSFORM_D(v, i * 6, 1)
    }
    [[unroll]] for (int k = 0; k < 6; k++)
        TRANSFORM_D(v, k, 6)
    if (item >= pc.n)
        return;
    [[unroll]] for (int i = 0; i < 36; i++)
        v_data[(i * pc.each + local) * pc.quads + q] = v[i];
}
