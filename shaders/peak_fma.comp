// shaders/peak_fma.comp - as many multiply-adds in f32 as the device does, for `impasto bench`:
// nothing but chains in registers.
//
// Sixteen chains a lane, each four multiply-adds long.  What llvmpipe 22.3 makes of it decides the
// lengths: fma() is a multiplication and an addition, every sum is masked at the end of a turn,
// and chains stand one after the other, so they must be short enough for a CPU to look ahead into
// the next ones.  Of 82 GFLOP/s of a core's own fused instructions 3 chains of 16 vec4 reach 31,
// 3 of 4 55, 4 of 4 58, 4 of 2 50.  The values converge to a sum that is not pc.never, which no
// compiler can know.  Grid: x only.  No shared memory.
#version 450
#extension GL_EXT_control_flow_attributes : require

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const int TURNS = 1; // llvmpipe ends loops after 65535 turns
layout(set = 0, binding = 0) writeonly restrict buffer Y { float y[]; };
layout(push_constant) uniform Push {
    float a, b, never;
} pc;
const int CHAINS = 4, STEPS = 4; // vec4; multiply-adds of each in a turn

void main()
{
    vec4 a = vec4(pc.a), b = vec4(pc.b), sum[CHAINS];
    [[unroll]] for (int i = 0; i < CHAINS; i++)
        sum[i] = vec4(i) + vec4(gl_LocalInvocationID.x) * b;
    for (int turn = 0; turn < TURNS; turn++) {
        [[unroll]] for (int step = 0; step < STEPS; step++) {
            [[unroll]] for (int i = 0; i < CHAINS; i++)
                sum[i] = fma(sum[i], a, b);
        }
    }
    vec4 all = vec4(0);
    [[unroll]] for (int i = 0; i < CHAINS; i++)
        all += sum[i];
    float total = dot(all, vec4(1));
    if (total == pc.never)
        y[0] = total;
}
