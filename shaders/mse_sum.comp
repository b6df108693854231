#version 450
// Last stage of mse and dot: one invocation adds the partial sums in order.
layout(local_size_x = 1) in;
layout(push_constant) uniform Push {
    uint n, chunk;
    float scale;
    uint part0; // number of this dispatch's first partial sum
} pc;
layout(binding = 0) readonly buffer X { float x[]; };
layout(binding = 1) writeonly buffer Y { float y[]; };

void main()
{
    float sum = 0.0;
    for (uint i = 0; i < pc.n; i++)
        sum += x[i];
    y[0] = sum * pc.scale;
}
