"""LoRA-LEGO (Zhao et al. 2024, arXiv 2409.16167) as described, for one module, in double.

Works on the unit vectors themselves: no Gram matrix, as lego.c has one. Draws come from splitmix64
with seed 0 in the same order as there, so that both start from the same centroids.
"""

import numpy as np

N_START, MAX_ROUND, NEAR, BETTER = 10, 300, 1e-12, 1 - 1e-9
MASK = (1 << 64) - 1


class Random:
    """core/rng.c's stream: splitmix64, 24 bits a draw."""

    def __init__(self, seed=0):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def uniform(self):
        return (self.next() >> 40) * 2.0**-24


def units_of(adapters, gauge):
    """adapters: (down [r,in], up [out,r], scale, weight). Rows a, rows b, splits, weights, owners."""
    a, b, t, w, owner = [], [], [], [], []
    for f, (down, up, scale, weight) in enumerate(adapters):
        for m in range(down.shape[0]):
            x, y = down[m].astype(float), up[:, m].astype(float) * scale * weight
            if not x.any() or not y.any() or weight == 0:
                continue
            norms = np.linalg.norm(x), np.linalg.norm(y)
            a.append(x)
            b.append(y)
            t.append(np.sqrt(norms[1] / norms[0]) if gauge else np.sqrt(abs(scale * weight)))
            w.append(abs(weight))
            owner.append(f)
    return np.array(a), np.array(b), np.array(t), np.array(w), np.array(owner, int)


def squared(v, c, gauge):
    """Squared distances of all v to c, up to sign with a gauge, and the signs."""
    both = (v * v).sum(1) + c @ c
    dots = v @ c
    d = both - 2 * (np.abs(dots) if gauge else dots)
    return np.where(d > NEAR * both, d, 0.0), np.where((dots < 0) & gauge, -1.0, 1.0)


def draw(mass, random):
    at = np.cumsum(mass)
    over = np.nonzero(at > random.uniform() * mass.sum())[0]
    return int(over[0]) if len(over) else int(np.nonzero(mass > 0)[0][-1])


def begin(v, w, k, gauge, random):
    """k-means++: the cluster and sign of every unit."""
    near = cluster = sign = None
    for c in range(k):
        center = draw(w if c == 0 else w * near, random)
        d, s = squared(v, v[center], gauge)
        if c == 0:
            near, cluster, sign = d, np.zeros(len(v), int), s
        else:
            closer = d < near
            near, sign = np.where(closer, d, near), np.where(closer, s, sign)
            cluster[closer] = c
        if not near.sum() > 0:
            break
    return cluster, sign


def lloyd(v, w, k, gauge, cluster, sign):
    """Rounds until nothing moves: cluster, sign, weighted sum of squared distances."""
    for _ in range(MAX_ROUND):
        best = np.full(len(v), np.inf)
        to, turned = cluster.copy(), sign.copy()
        for c in range(k):
            of = cluster == c
            if not of.any():
                continue
            center = (w[of] * sign[of]) @ v[of] / w[of].sum()
            d, s = squared(v, center, gauge)
            closer = d < best
            best, turned = np.where(closer, d, best), np.where(closer, s, turned)
            to[closer] = c
        moved = (to != cluster).any() or (turned != sign).any()
        cluster, sign = to, turned
        for c in set(range(k)) - set(cluster.tolist()):
            far = int(np.argmax(w * best))
            if not best[far] > 0:
                break
            cluster[far], sign[far], best[far], moved = c, 1.0, 0.0, True
        if not moved:
            break
    return cluster, sign, float((w * best).sum())


def kmeans(v, w, k, gauge):
    random, least, kept = Random(), np.inf, None
    for start in range(N_START):
        cluster, sign, inertia = lloyd(v, w, k, gauge, *begin(v, w, k, gauge, random))
        if start == 0 or inertia < least * BETTER:
            least, kept = inertia, (cluster, sign)
    return kept


def merge(adapters, rank=0, norm="2", output=True, gauge=True):
    """The adapters as one: down [k,in], up [out,k]; scale 1."""
    a, b, t, w, owner = units_of(adapters, gauge)
    weights = np.array([abs(x[3]) for x in adapters])
    there = np.array([(owner == f).sum() for f in range(len(adapters))])
    mean = (weights * there).sum() / weights[there > 0].sum()
    k = min(rank if rank else max(int(np.floor(mean + 0.5)), 1), len(a))
    v = np.concatenate([a * t[:, None], b / t[:, None]], 1)
    cluster, sign = (np.arange(len(a)), np.ones(len(a))) if k == len(a) else \
        kmeans(v, w / w.mean(), k, gauge)
    size = {"2": lambda x: np.linalg.norm(x), "inf": lambda x: np.abs(x).max()}.get(norm)
    down, up = [], []
    for c in dict.fromkeys(cluster.tolist()):
        of = np.nonzero(cluster == c)[0]
        if len(of) == 1:
            down.append(a[of[0]])
            up.append(b[of[0]])
            continue
        center = (w[of] * sign[of] * sign[of[0]]) @ v[of] / w[of].sum()
        if size:
            goal = sum(w[i] * size(v[i]) for i in of) / w[of].sum()
            own = size(center)
            center = center * (goal / own if own > NEAR * goal else 0)
        down.append(center[: a.shape[1]])
        up.append(center[a.shape[1] :])
    up = np.array(up).T * (np.sqrt(mean / len(down)) if output else 1)
    return np.array(down), up
