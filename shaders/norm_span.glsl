// shaders/norm_span.glsl - which items an invocation of a group norm kernel handles: one item
// column of a chunk of pixels.  A dispatch covers chunks chunk0 .. chunk0 + n_chunk - 1 of batch
// elements n0 .. n0 + n_n - 1; its bindings start `base` items into the tensor.
// Grid: linear, WG per workgroup, item fastest, then chunk, then batch element.
layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint WG = 64;
layout(constant_id = 1) const uint SILU = 0;
layout(push_constant) uniform Push {
    uint n0, n_n, chunk0, n_chunk;
    uint pixels, chunk;     // pixels of an image; pixels of a chunk
    uint items;             // per pixel
    uint chunks;            // of an image
    uint groups, per_group; // channels per group
    uint base;
    float inv_count; // 1 / values of a group
} pc;
struct Span {
    bool ok;
    uint n, chunk, item;
    uint at, count; // first item in the bindings, pixels (stride pc.items)
};
Span span()
{
    const uint e = group_linear() * WG + gl_LocalInvocationID.x;
    Span r;
    r.item = e % pc.items;
    r.chunk = pc.chunk0 + e / pc.items % pc.n_chunk;
    r.n = pc.n0 + e / pc.items / pc.n_chunk;
    r.ok = r.n < pc.n0 + pc.n_n;
    const uint p0 = r.chunk * pc.chunk;
    r.count = r.ok ? min(pc.chunk, pc.pixels - p0) : 0;
    r.at = (r.n * pc.pixels + p0) * pc.items + r.item - pc.base;
    return r;
}
// Position in the partial sums [n][chunks][C].
uint part_at(Span r) { return ((r.n * pc.chunks + r.chunk) * pc.items + r.item) * VEC; }
#ifdef SCALAR
#define CHANNEL(v, i) (v)
#else
#define CHANNEL(v, i) (v)[i]
#endif
