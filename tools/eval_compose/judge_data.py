"""Scenes for the judges: up to four objects on plain backgrounds, from drawings no generator has seen.

A judge looks at windows: 25 small ones, half the picture's edge wide and 8 pixels apart, and the whole.
A small window is of a concept when an object of about its size lies in its middle, the whole when one
large object fills the picture; else they are of nothing.
"""
import functools
import json
import os

import numpy as np
from PIL import Image

from world import (COLOURS, CONCEPT_STYLES, CONCEPTS, NEW_STYLES, SIZE, STYLES, TRAIN_STYLES, WORK,
                   Drawings, by_words, concepts)

EXTRA = ("fluent colour", "openmoji", "emojione v1", "streamline")
STYLE_NAMES = list(STYLES)                 # what the style head tells apart
ALL_STYLES = STYLE_NAMES + list(EXTRA)
NAMES = list(CONCEPTS)
OTHER, NOTHING = len(NAMES), len(NAMES) + 1
# Which drawings of the adapters' concepts each judge trains on.
OWN = {1: ("noto", "notov1", "emojione v1", "fluent colour"),
       2: ("twemoji", "emojione", "fxemoji", "openmoji", "streamline", "3d")}
WINDOWS = [(16 + 8 * i, 16 + 8 * k) for k in range(5) for i in range(5)]  # centres (x, y), row by row


@functools.lru_cache(None)
def pool():
    """{(concept, style): 64 px premultiplied RGBA}: all drawings."""
    out, main = {}, Drawings()
    for (c, s), i in main.index.items():
        out[c, s] = main.pixels[i]
    extra = np.load(os.path.join(WORK, "extra.npy"), mmap_mode="r")
    rows = json.load(open(os.path.join(WORK, "extra.json"), encoding="utf-8"))
    out.update({(c, s): extra[i] for i, (c, s) in enumerate(rows)})
    return {k: np.asarray(Image.fromarray(np.asarray(v), "RGBa").reduce(2)) for k, v in out.items()}


def generator_saw(index, style):
    c = concepts()[index]
    if c.words in CONCEPTS:
        return style in CONCEPT_STYLES
    return c.core and not c.held and (style in TRAIN_STYLES or style in NEW_STYLES)


def trains(judge, index, style):
    """Whether a judge trains on a drawing."""
    if generator_saw(index, style):
        return False
    if concepts()[index].words in CONCEPTS:
        return style in OWN[judge]
    return (index * 7 + ALL_STYLES.index(style) * 3) % 3 != judge - 1


class Pick:
    """Drawings to choose from, of the concepts in question (one list each) and of all others."""

    def __init__(self, keep):
        self.own, self.other = [], []
        for name in NAMES:
            c = by_words(name).index
            self.own.append([(c, s) for s in ALL_STYLES if (c, s) in pool() and keep(c, s)])
        mine = {by_words(n).index for n in NAMES}
        self.other = [k for k in pool() if k[0] not in mine and keep(*k)]
        self.of_style = {}
        for label, rows in enumerate(self.own + [self.other]):
            for k in rows:
                self.of_style.setdefault((label, k[1]), []).append(k)

    def draw(self, label, style, rng):
        """A drawing of class `label`, in `style` where there is one."""
        rows = self.own[label] if label < OTHER else self.other
        if style is not None:
            rows = self.of_style.get((label, style), rows)
        return rows[rng.integers(len(rows))]


def training(judge):
    return Pick(lambda c, s: trains(judge, c, s))


def unseen(judge):
    """For checks: the adapters' own drawings, and others that neither the judge nor its kin saw."""
    own = {by_words(n).index for n in NAMES}
    return Pick(lambda c, s: s in CONCEPT_STYLES if c in own else
                not generator_saw(c, s) and not trains(judge, c, s))


def sprite(key, size, rng, rough):
    """Premultiplied RGBA [size,size,4], f32; rough: turned, stretched, tinted, sometimes mirrored."""
    im = Image.fromarray(pool()[key], "RGBa")
    if not rough:
        return np.asarray(im.resize((size, size), Image.LANCZOS), np.float32)
    n = max(8, size)
    im = im.resize((n, n), Image.BICUBIC)
    a, sx, sy = rng.normal(0, 0.12), np.exp(rng.normal(0, 0.06)), np.exp(rng.normal(0, 0.06))
    c, s, m = np.cos(a) / sx, np.sin(a) / sy, (n - 1) / 2
    f = -1 if rng.random() < 0.25 else 1
    im = im.transform((n, n), Image.AFFINE, (c * f, s, m - c * f * m - s * m, -s * f, c, m + s * f * m - c * m),
                      Image.BILINEAR)
    px = np.asarray(im, np.float32)
    gain, shift = np.exp(rng.normal(0, 0.10, 3)), rng.normal(0, 8, 3)
    rgb = np.clip(px[..., :3] * gain + shift * px[..., 3:] / 255, 0, px[..., 3:])
    return np.concatenate([rgb, px[..., 3:]], 2).astype(np.float32)


def place(canvas, px, cx, cy):
    n = px.shape[0]
    left, top = int(round(cx - n / 2)), int(round(cy - n / 2))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + n, SIZE), min(top + n, SIZE)
    part, room = px[y0 - top:y1 - top, x0 - left:x1 - left], canvas[y0:y1, x0:x1]
    room *= 1 - part[..., 3:] / 255
    room += part[..., :3]


def mixed(a, b, rng):
    """(sprite, share of a): both in one place, averaged or cut along a soft line."""
    n = a.shape[0]
    if rng.random() < 0.5:
        k = rng.uniform(0.25, 0.75)
        return k * a + (1 - k) * b, k
    angle, at = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15) * n
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    m = 1 / (1 + np.exp(-(x * np.cos(angle) + y * np.sin(angle) - at) / 1.5))[..., None]
    return m * a + (1 - m) * b, float(m.mean())


def layout(n, rng):
    """Centres and sizes of n objects that do not overlap."""
    if n == 1 and rng.random() < 0.55:
        s = rng.uniform(44, 60)
        return [(32 + rng.uniform(-4, 4), 32 + rng.uniform(-4, 4), s)]
    if n == 2 and rng.random() < 0.6:
        return [(16 + rng.uniform(-3, 3), 32 + rng.uniform(-4, 4), rng.uniform(26, 33)),
                (48 + rng.uniform(-3, 3), 32 + rng.uniform(-4, 4), rng.uniform(26, 33))]
    for _ in range(20):
        spots = [(rng.uniform(14, 50), rng.uniform(14, 50), rng.uniform(21, 36 if n == 1 else 31))
                 for _ in range(n)]
        if all(max(abs(p[0] - q[0]), abs(p[1] - q[1])) > 0.46 * (p[2] + q[2])
               for i, p in enumerate(spots) for q in spots[:i]):
            return spots
    quarters = [(16, 16), (48, 16), (16, 48), (48, 48)]
    return [(quarters[i][0] + rng.uniform(-2, 2), quarters[i][1] + rng.uniform(-2, 2), rng.uniform(22, 30))
            for i in rng.permutation(4)[:n]]


SOFT = np.asarray(Image.fromarray(np.eye(4, dtype=np.float32)).resize((4, SIZE), Image.BICUBIC))


def ground(rng, rough):
    shade = np.asarray(list(COLOURS.values())[rng.integers(len(COLOURS))], np.float32)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = np.clip(shade + rng.normal(0, 6, 3) * rough, 0, 255)
    if rough and rng.random() < 0.3:  # clouds, as a denoiser leaves them
        clouds = rng.normal(0, rng.uniform(4, 22), (4, 4, 3))
        canvas += np.einsum("ik,jl,klc->ijc", SOFT, SOFT, clouds, optimize=True)
    return np.clip(canvas, 0, 255)


def an_object(pick, style, size, rng, rough):
    """(sprite, target over classes, concept for the auxiliary head or -1, styles in it)."""
    target = np.zeros(NOTHING + 1, np.float32)
    label = int(rng.integers(OTHER)) if rng.random() < 0.62 else OTHER
    key = pick.draw(label, style, rng)
    px, r = sprite(key, size, rng, rough), rng.random()
    target[label] = 1
    if not rough or r > 0.22:
        return px, target, key[0], {key[1]}
    other = int(rng.integers(OTHER)) if label < OTHER and r < 0.14 else OTHER
    second = pick.draw(other, style, rng)
    px, k = mixed(px, sprite(second, size, rng, rough), rng)
    target[label] = 0
    target[label] += k
    target[other] += 1 - k
    return px, target, -1, {key[1], second[1]}


class Targets:
    """What the windows of one scene are: small [25, classes] with weights, large [classes]."""

    def __init__(self):
        self.small = np.zeros((len(WINDOWS), NOTHING + 1), np.float32)
        self.weight = np.zeros(len(WINDOWS), np.float32)
        self.large = np.zeros(NOTHING + 1, np.float32)
        self.concept = np.full(len(WINDOWS) + 1, -1, np.int64)

    def fill(self, spots, objects):
        self.large[NOTHING] = 1
        if len(spots) == 1 and spots[0][2] > 40:
            self.large[:] = objects[0][1]
            self.concept[-1] = objects[0][2]
            spots, objects = [], []
        for i, (x, y) in enumerate(WINDOWS):
            d = [max(abs(s[0] - x), abs(s[1] - y)) for s in spots]
            k = int(np.argmin(d)) if d else -1
            if k < 0 or d[k] > 12:
                self.small[i, NOTHING] = self.weight[i] = 1
            elif d[k] <= 6:
                self.small[i] = objects[k][1]
                self.weight[i] = 4
                self.concept[i] = objects[k][2]
        return self


def scene(pick, rng, rough=True):
    """(uint8 [64,64,3], Targets, style number or -1)."""
    n = int(rng.choice(5, p=(0.04, 0.40, 0.32, 0.14, 0.10)))
    style = ALL_STYLES[rng.integers(len(ALL_STYLES))] if rng.random() < 0.6 else None
    canvas, spots, objects = ground(rng, rough), layout(n, rng) if n else [], []
    for x, y, s in spots:
        o = an_object(pick, style, int(round(s)), rng, rough)
        place(canvas, o[0], x, y)
        objects.append(o)
    styles = set().union(*(o[3] for o in objects))
    one = len(styles) == 1 and styles <= set(STYLE_NAMES)
    px = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return px, Targets().fill(spots, objects), STYLE_NAMES.index(styles.pop()) if one else -1
