// shaders/norm_channel.glsl - the per-channel constants of an item: mean, rstd, gamma, beta; z(x)
// and d silu.  Users declare FLOATS_IN gamma, beta, stat before.
struct Channels {
    ITEM mean, rstd, gamma, beta;
};
Channels channels_of(Span r)
{
    Channels k;
    [[unroll]] for (uint i = 0; i < VEC; i++) {
        const uint c = r.item * VEC + i, g = (r.n * pc.groups + c / pc.per_group) * 2;
        CHANNEL(k.mean, i) = stat[g];
        CHANNEL(k.rstd, i) = stat[g + 1];
        CHANNEL(k.gamma, i) = gamma[c];
        CHANNEL(k.beta, i) = beta[c];
    }
    return k;
}
ITEM sigmoid(ITEM z) { return 1.0 / (1.0 + exp2(z * -1.44269504088896340736)); }
// dL/dz from dL/dy: y = silu(z) has dy/dz = s (1 + z (1 - s)).
ITEM before_act(ITEM dy, ITEM xhat, Channels k)
{
    if (SILU == 0)
        return dy;
    const ITEM z = xhat * k.gamma + k.beta, s = sigmoid(z);
    return dy * s * (1.0 + z * (1.0 - s));
}
