"""LoraHub (Huang et al. 2023, arXiv 2307.13269) as described, for one module, and a search for its
weights.

Published is a sum of the factors, each side for itself: dW = (sum w_i B_i) (sum w_j A_j), quadratic
in w, with nevergrad's choice of optimiser over [-1.5, 1.5]^k from 0. Here the search is a (1+1)
evolution strategy with the 1/5 rule (Rechenberg 1973; the step of Kern et al. 2004). Ranks that
some adapters lack count as zero rows; each side has the root of an adapter's scale.
"""

import math

import numpy as np

from reference.lego import MASK, Random

BOX, SIGMA, LEAST, GROWTH, PENALTY = 1.5, 0.5, 0.01, math.exp(0.8 / 2), 0.05


def merge(adapters):
    """adapters: (down [r,in], up [out,r], scale, weight). The two sums: down [k,in], up [out,k]."""
    k = max(x[0].shape[0] for x in adapters)
    down = np.zeros((k, adapters[0][0].shape[1]))
    up = np.zeros((adapters[0][1].shape[0], k))
    for a, b, scale, weight in adapters:
        root = math.sqrt(abs(scale))
        down[: a.shape[0]] += weight * root * a
        up[:, : a.shape[0]] += weight * math.copysign(root, scale) * b
    return down, up


class Normal(Random):
    """core/rng.c's ipt_rng_normal: Box-Muller, two draws a value, rounded to f32."""

    def normal(self):
        u, v = ((self.next() >> 11) * 2.0**-53 for _ in range(2))
        return float(np.float32(math.sqrt(-2 * math.log1p(-u)) * math.cos(2 * math.pi * v)))


def search(loss, n, evaluations, seed):
    """Every point that was asked for, its loss with the penalty, and the best point."""
    random, sigma = Normal(seed & MASK), SIGMA
    best, least, points, losses = np.zeros(n), math.inf, [], []
    for i in range(evaluations):
        x = best if i == 0 else np.clip(
            best + sigma * np.array([random.normal() for _ in range(n)]), -BOX, BOX)
        value = loss(x) + PENALTY * np.abs(x).mean()
        points.append(x)
        losses.append(value)
        if i > 0:
            sigma = min(sigma * GROWTH, BOX) if value < least else max(sigma * GROWTH**-0.25, LEAST)
        if value < least:
            best, least = x, value
    return np.array(points), np.array(losses), best
