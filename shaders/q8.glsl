// shaders/q8.glsl - what kernels know of panels in q8 (graph/pack.c): blocks of 32 k's by 32
// columns, 68 quads of words each.  Four quads are the scales, pairs of f16; then come, for each of
// eight quads of k, eight quads of words: 4 columns, a word each, of 4 k's, a byte each.
#ifndef IPT_Q8_GLSL
#define IPT_Q8_GLSL

const int Q8_BLOCK = 68;

// Of the four columns of lane `lane` of eight, from quad lane / 2 of the block.
vec4 q8_scales(uvec4 quad, int lane)
{
    uvec2 two = (lane & 1) != 0 ? quad.zw : quad.xy;
    return vec4(unpackHalf2x16(two.x), unpackHalf2x16(two.y));
}

// Row k of four, before the scales.
vec4 q8_values(uvec4 quad, int k) { return vec4(ivec4(quad << (24 - 8 * k)) >> 24); }
#endif
