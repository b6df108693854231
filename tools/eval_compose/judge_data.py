"""Scenes for the judges: up to four objects on plain backgrounds, from drawings no generator has seen.

A judge looks at windows of a picture shrunk to 64 pixels: 25 small ones, half the picture's edge wide and 8
pixels apart, and the whole. A small window is of a concept when an object of about its size lies in its
middle, the whole when one large object fills the picture; else they are of nothing. Everything is painted
by torch, on a GPU as fast as a judge can look.
"""
import io
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from world import (ALL_STYLES, CLASSES, COLOURS, CONCEPT_STYLES, EVAL_PACK, NAMES, NOTHING, OTHER, STYLE_NAMES, WORK,
                   by_words, generator_saw, trains)
from scenes import LAYOUTS

EDGE = 64       # of what a judge looks at
MOST = 4        # objects of a scene
CENTRES = [(16 + 8 * i, 16 + 8 * k) for k in range(5) for i in range(5)]  # of the windows, row by row


# --- drawings ---------------------------------------------------------------------------------------
def packed(keep):
    """({(concept, style): row}, uint8 [n,64,64,4] premultiplied) of judge.bin (pack.py)."""
    with open(os.path.join(EVAL_PACK, "judge.json"), encoding="utf-8") as f:
        rows = [r for r in json.load(f) if keep(r[0], r[1])]
    with open(os.path.join(EVAL_PACK, "judge.bin"), "rb") as f:
        data = f.read()
    px = [np.asarray(Image.open(io.BytesIO(data[at:at + n])).convert("RGBA")) for _, _, at, n in rows]
    return {(c, s): i for i, (c, s, _, _) in enumerate(rows)}, np.stack(px)


def rendered(keep):
    """The same at 128 px, as render.py and render_extra.py left them."""
    index, px = {}, []
    for name in ("drawings", "extra"):
        every = np.load(os.path.join(WORK, name + ".npy"), mmap_mode="r")
        with open(os.path.join(WORK, name + ".json"), encoding="utf-8") as f:
            for i, (c, s) in enumerate(json.load(f)):
                if keep(c, s):
                    index[c, s] = len(px)
                    px.append(np.array(every[i]))
    return index, np.stack(px)


class Pick:
    """Drawings to choose from, by class (one for each concept, then all others) and style, on a device."""

    def __init__(self, drawings, device="cpu"):
        index, px = drawings
        self.index, self.device = index, device
        full = torch.from_numpy(px).to(device).permute(0, 3, 1, 2).float()
        edges = [full.shape[-1], full.shape[-1] * 11 // 16, full.shape[-1] * 15 // 32]
        self.banks = [full if e == edges[0] else F.interpolate(full, size=e, mode="area") for e in edges]
        number = {by_words(n).index: i for i, n in enumerate(NAMES)}
        lists = {}
        for (c, s), i in index.items():
            lists.setdefault((number.get(c, OTHER), ALL_STYLES.index(s)), []).append(i)
        self.own = [[i for s in range(len(ALL_STYLES)) for i in lists.get((c, s), [])] for c in range(CLASSES - 1)]
        most = max(map(len, self.own))
        # [class, style or any, place in the list]
        self.table = torch.zeros(CLASSES - 1, len(ALL_STYLES) + 1, most, dtype=torch.long)
        self.count = torch.zeros(CLASSES - 1, len(ALL_STYLES) + 1, dtype=torch.long)
        for c in range(CLASSES - 1):
            for s in range(len(ALL_STYLES) + 1):
                rows = lists.get((c, s), []) if s < len(ALL_STYLES) else self.own[c]
                self.table[c, s, :len(rows)] = torch.tensor(rows, dtype=torch.long)
                self.count[c, s] = len(rows)
        self.table, self.count = self.table.to(device), self.count.to(device)
        back = sorted((i, c, s) for (c, s), i in index.items())
        self.concept = torch.tensor([c for _, c, _ in back], device=device)
        self.style = torch.tensor([ALL_STYLES.index(s) for _, _, s in back], device=device)

    def draw(self, label, style):
        """Rows of drawings of classes [...] in styles [...] (len(ALL_STYLES): any); where there is none of
        a class in a style, one of class OTHER: (class, row)."""
        label = torch.where(self.count[label, style] > 0, label, torch.full_like(label, OTHER))
        n = self.count[label, style].clamp_min(1)
        at = (torch.rand(label.shape, device=self.device) * n).long().clamp_max(n - 1)
        return label, self.table[label, style, at]


def training(judge, device):
    return Pick(packed(lambda c, s: trains(judge, c, s)), device)


def unseen(judge):
    """For checks: the adapters' own drawings, and others that neither the judge nor a generator saw."""
    own = {by_words(n).index for n in NAMES}
    return Pick(rendered(lambda c, s: s in CONCEPT_STYLES if c in own else
                         not generator_saw(c, s) and not trains(judge, c, s)))


# --- painting ---------------------------------------------------------------------------------------
class Spec:
    """What is where, for n scenes of up to MOST objects; sizes and places in 64ths of the picture.

    rows, second [n,MOST] drawings (-1: none; second: what it is mixed with), spots [n,MOST,3] centre and
    size, turn [n,MOST,4] angle, stretches, 1 or -1; tint [n,MOST,6] gains, shifts; blend [n,MOST,4] kind (0
    average, 1 along a line), share, angle, place of the line; shade [n,3]; clouds [n,3,4,4] or None.
    """

    def __init__(self, n, device="cpu"):
        def full(value, *shape):
            return torch.full((n, *shape), value, device=device)

        self.rows, self.second = full(-1, MOST), full(-1, MOST)
        self.spots, self.turn = full(0.0, MOST, 3), full(1.0, MOST, 4)
        self.turn[..., 0] = 0
        self.tint, self.blend = full(1.0, MOST, 6), full(0.0, MOST, 4)
        self.tint[..., 3:] = 0
        self.shade, self.clouds = full(255.0, 3), None


def shares(blend, size, u, v):
    """How much of the first drawing a mixture has at (u, v) of -1..1 of its box."""
    kind, share, angle, at = blend.unbind(-1)
    shape = (-1,) + (1,) * (u.ndim - 1)
    line = torch.sigmoid(((u * angle.cos().view(shape) + v * angle.sin().view(shape)) - at.view(shape))
                         * (size / 3).view(shape))
    return torch.where((kind > 0.5).view(shape), line, share.view(shape).expand_as(line))


def sprites(pick, spec, edge):
    """RGBA [n,MOST,4,edge,edge] of all objects in their places."""
    n = len(spec.rows)
    out = torch.zeros(n * MOST, 4, edge, edge, device=pick.device)
    rows, second = spec.rows.flatten(), spec.second.flatten()
    spots, turn, tint = spec.spots.flatten(0, 1), spec.turn.flatten(0, 1), spec.tint.flatten(0, 1)
    blend = spec.blend.flatten(0, 1)
    limits = (1e9, 34.0, 23.0, 0.0)     # a drawing is never shrunk by more than about a half
    line = (torch.arange(edge, device=pick.device) + 0.5) * (EDGE / edge)
    for j, bank in enumerate(pick.banks):
        take = ((rows >= 0) & (spots[:, 2] <= limits[j]) & (spots[:, 2] > limits[j + 1])).nonzero()[:, 0]
        if len(take) == 0:
            continue
        x, y, size = spots[take].unbind(-1)
        angle, sx, sy, side = turn[take].unbind(-1)
        u = ((line - x[:, None]) * (2 / size)[:, None])[:, None, :].expand(-1, edge, edge)
        v = ((line - y[:, None]) * (2 / size)[:, None])[:, :, None].expand(-1, edge, edge)
        c, s = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        grid = torch.stack([(c * u + s * v) * (side / sx).view(-1, 1, 1),
                            (c * v - s * u) * (1 / sy).view(-1, 1, 1)], -1)
        px = F.grid_sample(bank[rows[take]], grid, align_corners=False)
        both = (second[take] >= 0).nonzero()[:, 0]
        if len(both):
            k = shares(blend[take[both]], size[both], u[both], v[both])[:, None]
            other = F.grid_sample(bank[second[take[both]]], grid[both], align_corners=False)
            px = px.index_copy(0, both, k * px[both] + (1 - k) * other)
        gain, shift = tint[take, :3, None, None], tint[take, 3:, None, None]
        alpha = px[:, 3:]
        rgb = torch.minimum((px[:, :3] * gain + shift * alpha / 255).clamp_min(0), alpha)
        out[take] = torch.cat([rgb, alpha], 1)
    return out.view(n, MOST, 4, edge, edge)


def paint(pick, spec, edge=EDGE):
    """Pictures [n,3,edge,edge] in 0..255."""
    n = len(spec.rows)
    canvas = spec.shade.view(n, 3, 1, 1).expand(n, 3, edge, edge)
    if spec.clouds is not None:
        canvas = canvas + F.interpolate(spec.clouds, size=edge, mode="bicubic", align_corners=False)
    canvas, objects = canvas.clamp(0, 255), sprites(pick, spec, edge)
    for k in range(MOST):
        canvas = canvas * (1 - objects[:, k, 3:] / 255) + objects[:, k, :3]
    return canvas


# --- random scenes ----------------------------------------------------------------------------------
def as_trained(n, rng):
    """[(x, y, size)] of a layout of the default model's, or of one that it does not have."""
    names = [k for k, v in LAYOUTS.items() if len(v[1]) == n]
    if names and rng.random() < 0.6:
        _, cells, (dx, dy), (least, most), _ = LAYOUTS[names[rng.integers(len(names))]]
        return [((x + 1.3 * dx * rng.uniform(-1, 1)) / 2, (y + 1.3 * dy * rng.uniform(-1, 1)) / 2,
                 rng.uniform(0.9 * least, 1.06 * most) / 2) for x, y in cells]
    for _ in range(20):
        spots = [(rng.uniform(12, 52), rng.uniform(12, 52), rng.uniform(17, 36 if n == 1 else 30))
                 for _ in range(n)]
        if all(max(abs(p[0] - q[0]), abs(p[1] - q[1])) > 0.46 * (p[2] + q[2])
               for i, p in enumerate(spots) for q in spots[:i]):
            return spots
    quarters = [(16, 16), (48, 16), (16, 48), (48, 48)]
    return [(quarters[i][0] + rng.uniform(-2, 2), quarters[i][1] + rng.uniform(-2, 2), rng.uniform(22, 30))
            for i in rng.permutation(4)[:n]]


def layouts(count, rng):
    """(spots [count,MOST,3], objects [count]) to choose from."""
    spots, n = np.zeros((count, MOST, 3), np.float32), rng.choice(5, count, p=(0.03, 0.40, 0.28, 0.18, 0.11))
    for i in range(count):
        if n[i]:
            spots[i, :n[i]] = as_trained(n[i], rng)
    return torch.from_numpy(spots), torch.from_numpy(n)


def uniform(low, high, *shape, device):
    return low + (high - low) * torch.rand(*shape, device=device)


def mixture(spec, mix, label, pick, style):
    """Gives the objects of mask `mix` a second drawing; (its class, the first one's share)."""
    n, d = len(mix), pick.device
    other = torch.where((label < OTHER) & (torch.rand(n, MOST, device=d) < 0.64),
                        torch.randint(OTHER, (n, MOST), device=d), torch.full_like(label, OTHER))
    other, second = pick.draw(other, style)
    spec.second = torch.where(mix, second, torch.full_like(second, -1))
    spec.blend = torch.stack([(torch.rand(n, MOST, device=d) < 0.5).float(),
                              uniform(0.25, 0.75, n, MOST, device=d),
                              uniform(0, 2 * np.pi, n, MOST, device=d),
                              uniform(-0.3, 0.3, n, MOST, device=d)], -1)
    line = (torch.arange(12, device=d) + 0.5) / 6 - 1
    u, v = line.view(1, 1, 12).expand(n * MOST, 12, 12), line.view(1, 12, 1).expand(n * MOST, 12, 12)
    k = shares(spec.blend.flatten(0, 1), spec.spots[..., 2].flatten(), u, v).mean(dim=(1, 2))
    return other, k.view(n, MOST)


def windows_of(spots, there, count, target, concept):
    """What the windows show: small [n,25,CLASSES], their weights, large [n,CLASSES], concepts [n,26]."""
    n, d = len(spots), spots.device
    centre = torch.tensor(CENTRES, dtype=torch.float32, device=d)
    away = (spots[:, None, :, :2] - centre[None, :, None]).abs().amax(-1)
    fills = (count == 1) & (spots[:, 0, 2] > 40)
    away = torch.where(there[:, None] & ~fills[:, None, None], away, torch.full_like(away, 1e9))
    near, which = away.min(-1)
    nothing = F.one_hot(torch.tensor(NOTHING, device=d), CLASSES).float()
    mine = near <= 6
    at = which[..., None].expand(-1, -1, CLASSES)
    small = torch.where(mine[..., None], target.gather(1, at), nothing.expand(n, len(CENTRES), CLASSES))
    weight = torch.where(mine, 4.0, torch.where(near > 12, 1.0, 0.0))
    large = torch.where(fills[:, None], target[:, 0], nothing)
    seen = torch.where(mine, concept.gather(1, which), torch.full_like(which, -1))
    whole = torch.where(fills, concept[:, 0], torch.full_like(concept[:, 0], -1))
    return small, weight, large, torch.cat([seen, whole[:, None]], 1)


def random_scenes(pick, n, choice, rough=True, edge=EDGE):
    """(pictures [n,3,edge,edge] in -1..1, (small, weight, large, concept), style or -1 [n])."""
    d, spec = pick.device, Spec(n, pick.device)
    at = torch.randint(len(choice[1]), (n,))
    spec.spots, count = choice[0][at].to(d), choice[1][at].to(d)
    there = torch.arange(MOST, device=d) < count[:, None]
    style = torch.where(torch.rand(n, 1, device=d) < 0.4, torch.randint(len(STYLE_NAMES), (n, 1), device=d),
                        torch.full((n, 1), len(ALL_STYLES), device=d)).expand(n, MOST)
    label = torch.where(torch.rand(n, MOST, device=d) < 0.62, torch.randint(OTHER, (n, MOST), device=d),
                        torch.full((n, MOST), OTHER, device=d))
    label, rows = pick.draw(label, style)
    spec.rows = torch.where(there, rows, torch.full_like(rows, -1))
    target, concept = F.one_hot(label, CLASSES).float(), pick.concept[rows]
    styles = pick.style[rows]
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=d)
    spec.shade = colours[torch.randint(len(colours), (n,), device=d)]
    second = styles
    if rough:
        mix = there & (torch.rand(n, MOST, device=d) < 0.22)
        other, k = mixture(spec, mix, label, pick, style)
        mixed = k[..., None] * target + (1 - k[..., None]) * F.one_hot(other, CLASSES).float()
        target = torch.where(mix[..., None], mixed, target)
        concept = torch.where(mix, torch.full_like(concept, -1), concept)
        second = torch.where(mix, pick.style[spec.second.clamp_min(0)], styles)
        spec.turn = torch.stack([0.12 * torch.randn(n, MOST, device=d),
                                 (0.06 * torch.randn(n, MOST, device=d)).exp(),
                                 (0.06 * torch.randn(n, MOST, device=d)).exp(),
                                 torch.where(torch.rand(n, MOST, device=d) < 0.4, -1.0, 1.0)], -1)
        spec.tint = torch.cat([(0.10 * torch.randn(n, MOST, 3, device=d)).exp(),
                               8 * torch.randn(n, MOST, 3, device=d)], -1)
        spec.shade = spec.shade + 6 * torch.randn(n, 3, device=d)
        strength = torch.where(torch.rand(n, device=d) < 0.3, uniform(4, 22, n, device=d), torch.zeros(n, device=d))
        spec.clouds = strength.view(n, 1, 1, 1) * torch.randn(n, 3, 4, 4, device=d)
    px = paint(pick, spec, edge) / 127.5 - 1
    first = styles[:, 0]
    alike = (((styles == first[:, None]) & (second == first[:, None])) | ~there).all(1)
    alike = alike & (first < len(STYLE_NAMES)) & (count > 0)
    return (px, windows_of(spec.spots, there, count, target, concept),
            torch.where(alike, first, torch.full_like(first, -1)))
