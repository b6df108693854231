// shaders/gemm_iface.glsl - what both shapes of the matrix product share: push constants, operand
// bindings, the walk over convolution taps, the epilogue.
//
//   y[m, col] = sum_tap sum_k a[pixel(m, tap), k] b[col, tap, k]
//               (+ bias[col] + t[image(m), col] + r[m, col] + sum_k h[m, j, k] u[col', k]), col = j
//               side_cols + col'
//
// a: rows of `quads` quads (channels last), b: packed panels of 32 columns (graph/pack.c), y: rows
// of `ldy` elements.  A plain product has one tap and pixel(m) = m.  Sums are f32.
// -DMIX: the rows of y are made of those of the product, see gemm.comp.
// -DTEXEL reads a and b through storage texel buffers, -DACT_F16 stores a, t, r and y in 16 bits.
#ifndef IPT_GEMM_IFACE_GLSL
#define IPT_GEMM_IFACE_GLSL
#include "common.glsl"

layout(push_constant) uniform push_block {
    int rows;     // of y in this dispatch
    int row0;     // number of the first of them in the whole result
    int cols;     // columns of the whole result
    int col0;     // column at which the bound panels start (a multiple of 32)
    int quads;    // quads of k per tap
    int taps;     // kernel size squared
    int panels;   // bound panels
    int kw;       // taps per kernel row
    int ow, opix; // output pixels per line and per image
    int h, w;     // stored input size
    int vh, vw;   // its virtual (enlarged or spread) size
    int stride, pad, spread;
    int a_first;   // quad of `a` that is number 0 of the binding
    int ldy, y0;   // elements per row of y, and its first column
    int turned;    // gemm.comp: workgroups count row tiles first
    int side;      // quads of k of h and u; -DTEXEL alone, others are given two products
    int side_cols; // columns of u: those from j side_cols on belong to group j of h
    int mix_each, mix_gates, mix_slots; // -DMIX: matrices of a batch element, first line of gates,
                                        // and its slots
    int each;  // gemm.comp: rows that have panels of their own, one matrix after the other; 0: all
               // rows
    int adds;  // gemm.comp: HAS_BIAS, HAS_T (of two images a tile at most), which are not in HAS
    int shift; // TAPS: log2 of the enlargement
} pc;

const int PLAIN = 0;   // one tap, pixel(m) = m
const int TAPS = 1;    // convolution, with border, over an input enlarged 2^shift times
const int ENLARGE = 2; // the same over a nearest-neighbour enlarged input of any size
const int SPREAD = 3;  // the same over an input with spread - 1 zeros between pixels (of a stride's
                       // gradient)

const int HAS_BIAS = 1;
const int HAS_T = 2;
const int HAS_R = 4;
const int HAS_QUADS = 8;    // columns come in whole, aligned quads
const int HAS_GROUPS = 16;  // of h, more than one
const int HAS_NO_SIDE = 32; // pc.side is 0: nothing to compile for it

#ifdef TEXEL
#ifdef ACT_F16
#define ACT_TEXEL rgba16f
#else
#define ACT_TEXEL rgba32f
#endif
layout(binding = 0, ACT_TEXEL) uniform readonly imageBuffer a_view;
layout(binding = 1, rgba32ui) uniform readonly uimageBuffer b_view;
#define LOAD_A(i) imageLoad(a_view, i)
#define LOAD_B(i) imageLoad(b_view, i)
#else
layout(binding = 0, std430) readonly buffer a_block { ELT4 a_data[]; };
layout(binding = 1, std430) readonly buffer b_block { uvec4 b_data[]; };
#define LOAD_A(i) vec4(a_data[i])
#define LOAD_B(i) b_data[i]
#endif
layout(binding = 2, std430) writeonly buffer y_block { ELT y_data[]; };
layout(binding = 2, std430) writeonly buffer y_block4 { ELT4 y_data4[]; };
#ifdef MIX
layout(binding = 3, std430) readonly buffer gates_block { float gates_data[]; };
layout(binding = 4, std430) readonly buffer p_block { ELT p_data[]; };
layout(binding = 7, std430) readonly buffer slot_block { int slot_data[]; };
#else
layout(binding = 3, std430) readonly buffer bias_block { float bias_data[]; };
layout(binding = 4, std430) readonly buffer t_block { ELT t_data[]; };
#endif
layout(binding = 5, std430) readonly buffer r_block { ELT r_data[]; };
#ifdef TEXEL
layout(binding = 6, ACT_TEXEL) uniform readonly imageBuffer r_view;
#define LOAD_R(i) imageLoad(r_view, i)
#ifndef MIX
layout(binding = 7, ACT_TEXEL) uniform readonly imageBuffer h_view;
layout(binding = 8, rgba32ui) uniform readonly uimageBuffer u_view;
#endif
#else
layout(binding = 5, std430) readonly buffer r_block4 { ELT4 r_data4[]; };
#define LOAD_R(i) vec4(r_data4[i])
#endif

// Where row m of the whole result looks: (first pixel of its image, top line, left column).
ivec3 gemm_origin(int m)
{
    int image = m / pc.opix;
    int p = m - image * pc.opix;
    int oy = p / pc.ow;
    int ox = p - oy * pc.ow;
    return ivec3(image * pc.h * pc.w, oy * pc.stride - pc.pad, ox * pc.stride - pc.pad);
}

// Quad index in the binding of the pixel under a tap; -1 outside the image.
int gemm_pixel(int mode, ivec3 origin, int ky, int kx)
{
    int vy = origin.y + ky;
    int vx = origin.z + kx;
    bool inside = vy >= 0 && vx >= 0 && vy < pc.vh && vx < pc.vw;
    if (mode == TAPS) {
        vy >>= pc.shift;
        vx >>= pc.shift;
    }
    if (mode == ENLARGE) {
        vy = vy * pc.h / pc.vh;
        vx = vx * pc.w / pc.vw;
    }
    if (mode == SPREAD) {
        int sy = vy / pc.spread;
        int sx = vx / pc.spread;
        inside = inside && sy * pc.spread == vy && sx * pc.spread == vx;
        vy = sy;
        vx = sx;
    }
    return inside ? (origin.x + vy * pc.w + vx) * pc.quads - pc.a_first : -1;
}

// What the epilogue needs of the push block, read once by gemm_begin: inside control flow llvmpipe
// would gather it anew for every row.
int out_at, out_pitch, out_rows, out_cols, out_row0, out_image, out_adds;

// `first`: first row of this tile in the dispatch; `col`: this invocation's first column.
void gemm_begin(int first, int col)
{
    out_at = first * pc.ldy + pc.y0 + col;
    out_pitch = pc.ldy;
    out_rows = pc.rows - first;
    out_cols = pc.cols;
    out_row0 = pc.row0 + first;
    out_image = pc.opix;
    out_adds = pc.adds;
}

#ifndef MIX
// Bias of the four columns from `col`.
vec4 gemm_bias(int col)
{
    vec4 v = vec4(0);
    [[unroll]] for (int c = 0; c < 4; c++)
        v[c] = bias_data[min(col + c, out_cols - 1)];
    return v;
}

// Adds what the epilogue adds to row i of the tile and stores four columns.
void gemm_store(int has, int i, int col, vec4 v)
{
    if (i >= out_rows)
        return;
    int at = out_at + i * out_pitch;
    if ((has & HAS_T) != 0) {
        int from = (out_row0 + i) / out_image * out_cols;
        [[unroll]] for (int c = 0; c < 4; c++)
            v[c] += float(t_data[from + min(col + c, out_cols - 1)]);
    }
    if ((has & HAS_QUADS) != 0) {
        if ((has & HAS_R) != 0)
            v += LOAD_R(at >> 2);
        y_data4[at >> 2] = ELT4(v);
    } else {
        [[unroll]] for (int c = 0; c < 4; c++)
            if (col + c < out_cols) {
                if ((has & HAS_R) != 0)
                    v[c] += float(r_data[at + c]);
                y_data[at + c] = ELT(v[c]);
            }
    }
}
#endif // MIX
#endif
