#version 450
//! variant f32
//! variant f16 -DTABLE_F16
// y[i,:] = table[ids[i],:]; a half table is read as words, so that no 16-bit storage is needed.
// Ids outside the table take row 0 (the host checks them; this keeps the read inside).  Rows
// first..end-1 are bound; other ids belong to another dispatch.
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, c, rows, t, first, end;
} pc;
layout(binding = 0) readonly buffer Ids { int ids[]; };
#ifdef TABLE_F16
layout(binding = 1) readonly buffer T { uint table[]; };
#else
layout(binding = 1) readonly buffer T { float table[]; };
#endif
layout(binding = 2) writeonly buffer Y { float y[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint row = uint(ids[i / pc.c]);
    row = row < pc.rows ? row : 0;
    if (row < pc.first || row >= pc.end)
        return;
    uint at = (row - pc.first) * pc.c + i % pc.c;
#ifdef TABLE_F16
    vec2 pair = unpackHalf2x16(table[at / 2]);
    y[i] = (at & 1u) == 1u ? pair.y : pair.x;
#else
    y[i] = table[at];
#endif
}
