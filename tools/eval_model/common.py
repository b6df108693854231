"""Shared by all stages: folders, concepts, styles, captions and the composing of pictures."""
import functools
import json
import os
import sys

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WORK = os.path.abspath(os.environ.get("IMPASTO_DM", "dm"))
MODELS = os.path.join(ROOT, "models")
SEED = 20261123
SIZE = 64        # picture edge
MASTER = 128     # edge of the rendered drawings

sys.path.append(os.path.join(os.path.dirname(HERE), "default_model"))    # publish.py

# key -> (words in captions, npm package)
STYLES = {
    "flat": ("fluent flat", "@iconify-json/fluent-emoji-flat"),
    "3d": ("fluent 3d", "@lobehub/fluent-emoji-3d"),
    "noto": ("noto", "@iconify-json/noto"),
    "twemoji": ("twemoji", "@iconify-json/twemoji"),
    "emojione": ("emojione", "@iconify-json/emojione"),
    "fxemoji": ("fxemoji", "@iconify-json/fxemoji"),
    "notov1": ("noto blob", "@iconify-json/noto-v1"),
}
HELD = json.load(open(os.path.join(HERE, "held_out.json"), encoding="utf-8"))
TRAIN_STYLES = [s for s in STYLES if s not in HELD["styles"]]

COLOURS = {
    "white": (255, 255, 255), "black": (24, 24, 28), "grey": (140, 144, 150), "red": (206, 52, 56),
    "orange": (240, 146, 50), "yellow": (248, 214, 78), "green": (74, 166, 88),
    "blue": (58, 112, 214), "light blue": (158, 208, 242), "purple": (136, 84, 184),
    "pink": (244, 162, 190), "brown": (134, 92, 62),
}


def threads():
    return int(os.environ.get("OMP_NUM_THREADS", "2"))


def norm_hex(code):
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


class Concept:
    """One line of concepts.txt: label (emojibase), words (caption) and article."""

    def __init__(self, index, line):
        self.index = index
        self.core = line.startswith("*")
        line = line.lstrip("* ")
        plural = line.endswith("!")
        line = line.rstrip("! ").strip()
        self.label, _, words = (p.strip() for p in line.partition("="))
        self.words = (words or self.label).lower().replace("’", "'")
        vowel = self.words[0] in "aeiou" and not self.words.startswith(("uni", "ewe", "one "))
        self.phrase = self.words if plural else ("an " if vowel else "a ") + self.words
        self.held = self.words in HELD["concepts"]


@functools.lru_cache(None)
def concepts():
    out = []
    with open(os.path.join(HERE, "concepts.txt"), encoding="utf-8") as f:
        for line in f:
            line = line.strip()
            if line and not line.startswith("#"):
                out.append(Concept(len(out), line))
    return out


class Drawings:
    """Premultiplied RGBA drawings, 128 px, of every (concept, style) that exists."""

    def __init__(self):
        self.pixels = np.load(os.path.join(WORK, "drawings.npy"), mmap_mode="r")
        rows = json.load(open(os.path.join(WORK, "drawings.json"), encoding="utf-8"))
        self.index = {(c, s): i for i, (c, s) in enumerate(rows)}

    def styles_of(self, concept, allowed):
        return [s for s in allowed if (concept.index, s) in self.index]

    def get(self, concept, style, size):
        px = self.pixels[self.index[(concept.index, style)]]
        return np.asarray(Image.fromarray(px, "RGBa").resize((size, size), Image.LANCZOS),
                          dtype=np.float32)


def paste(canvas, sprite, left, top):
    """Puts a premultiplied RGBA sprite over a float RGB canvas, clipping at the edges."""
    n = sprite.shape[0]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + n, SIZE), min(top + n, SIZE)
    part = sprite[y0 - top:y1 - top, x0 - left:x1 - left]
    room = canvas[y0:y1, x0:x1]
    room *= 1.0 - part[..., 3:] / 255.0
    room += part[..., :3]


def compose(drawings, parts, style, colour, rng, jitter=1.0):
    """RGB uint8 picture of one or two concepts in a style on a plain background."""
    shade = np.asarray(COLOURS[colour], dtype=np.float32)
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = np.clip(shade + (rng.uniform(-4, 4, 3) * jitter if colour != "white" else 0), 0, 255)
    if len(parts) == 1:
        n = int(round(56 + rng.uniform(-2, 2) * jitter))
        off = rng.uniform(-1.5, 1.5, 2) * jitter
        centres = [(32 + off[0], 32 + off[1])]
    else:
        n = int(round(30 + rng.uniform(-1, 1) * jitter))
        off = rng.uniform(-1, 1, 4) * jitter
        centres = [(16 + off[0], 32 + off[1]), (48 + off[2], 32 + off[3])]
    for part, (cx, cy) in zip(parts, centres):
        paste(canvas, drawings.get(part, style, n), int(round(cx - n / 2)), int(round(cy - n / 2)))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def ground(colour):
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def caption(parts, style, colour, rng):
    """A caption and the colour that the picture must have (white where none is named)."""
    if len(parts) == 1:
        what = parts[0].phrase
        r = rng.random()
        if r < 0.04:
            what = "a picture of " + what
        elif r < 0.08:
            what = "an emoji of " + what
        elif r < 0.12:
            what = parts[0].words
    else:
        r = rng.random()
        a, b = parts[0].phrase, parts[1].phrase
        if r < 0.75:
            what = f"{a} and {b}"
        elif r < 0.90:
            what = f"{a} next to {b}"
        else:
            what = f"{a} on the left and {b} on the right"
    r = rng.random()
    words = STYLES[style][0]
    if r < 0.50:
        return f"{what}, {words} style, {ground(colour)}", colour
    if r < 0.65:
        return f"{what} {ground(colour)}", colour
    if r < 0.85:
        return f"{what}, {words} style", "white"
    return what, "white"


def draw_scene(drawings, pool, rng, styles=None, pair_share=0.3):
    """A random scene of the training distribution: (parts, style, colour, caption)."""
    styles = styles or TRAIN_STYLES
    while True:
        style = styles[rng.integers(len(styles))]
        n = 2 if rng.random() < pair_share else 1
        parts = [pool[rng.integers(len(pool))] for _ in range(n)]
        if n == 2 and parts[0] is parts[1]:
            continue
        if all((p.index, style) in drawings.index for p in parts):
            break
    names = list(COLOURS)
    colour = names[rng.integers(len(names))] if rng.random() < 0.8 else "white"
    text, colour = caption(parts, style, colour, rng)
    return parts, style, colour, text


def training_concepts():
    return [c for c in concepts() if c.core and not c.held]
