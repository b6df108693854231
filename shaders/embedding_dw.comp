#version 450
// dtable[v,c] = sum over the places i with ids[i] = v of dy[i,c], in order (deterministic).
#include "common.glsl"
layout(local_size_x = 64) in;
layout(push_constant) uniform Push {
    uint n, c, rows, t;
    uint first, end; // first: number of the first bound row of the table
} pc;
layout(binding = 0) readonly buffer Ids { int ids[]; };
layout(binding = 1) readonly buffer D { float dy[]; };
layout(binding = 2) writeonly buffer Y { float dtable[]; };

void main()
{
    uint i = group_linear() * 64 + gl_LocalInvocationID.x;
    if (i >= pc.n)
        return;
    uint v = i / pc.c, c = i - v * pc.c;
    float sum = 0.0;
    for (uint k = 0; k < pc.t; k++) {
        uint row = uint(ids[k]);
        if ((row < pc.rows ? row : 0) == pc.first + v)
            sum += dy[k * pc.c + c];
    }
    dtable[i] = sum;
}
