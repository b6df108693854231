"""Shared by all stages: folders, concepts, styles, colours and the drawings."""
import concurrent.futures
import functools
import io
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WORK = os.path.abspath(os.environ.get("IMPASTO_DM", "dm"))
PACK = os.path.abspath(os.environ.get("IMPASTO_PACK", os.path.join(WORK, "pack")))
MODELS = os.path.join(ROOT, "models")
SEED = 20261127
SIZE = 128       # picture edge
LATENT = 32      # latents' edge
MASTER = 128     # edge of the rendered drawings


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
STYLE_NAMES = list(STYLES)
with open(os.path.join(HERE, "held_out.json"), encoding="utf-8") as _f:
    HELD = json.load(_f)
HELD_CONCEPTS = [c for family in HELD["concepts"].values() for c in family]
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
        self.mirrors = not line.startswith("*|")
        line = line.lstrip("*| ")
        plural = line.endswith("!")
        line = line.rstrip("! ").strip()
        self.label, _, words = (p.strip() for p in line.partition("="))
        self.words = (words or self.label).lower().replace("’", "'")
        vowel = self.words[0] in "aeiou" and not self.words.startswith(("uni", "ewe", "one "))
        self.phrase = self.words if plural else ("an " if vowel else "a ") + self.words
        self.held = self.words in HELD_CONCEPTS


@functools.lru_cache(None)
def concepts():
    out = []
    with open(os.path.join(HERE, "concepts.txt"), encoding="utf-8") as f:
        for line in f:
            line = line.strip()
            if line and not line.startswith("#"):
                out.append(Concept(len(out), line))
    return out


def training_concepts():
    return [c for c in concepts() if c.core and not c.held]


class Drawings:
    """Premultiplied RGBA drawings of (concept, style) pairs, 128 px and two smaller copies.

    `want(concept index, style)` chooses which are read from the packed file; `index` maps each to
    its row in `banks`, one tensor [rows, 4, edge, edge] of 0..255 for each edge of EDGES.
    """
    EDGES = (128, 64, 48)

    def __init__(self, device="cpu", want=lambda index, style: True, dtype=torch.float32):
        with open(os.path.join(PACK, "sprites.json"), encoding="utf-8") as f:
            rows = [r for r in json.load(f) if want(r[0], r[1])]
        with open(os.path.join(PACK, "sprites.bin"), "rb") as f:
            data = f.read()

        def pixels(row):
            return np.asarray(Image.open(io.BytesIO(data[row[2]:row[2] + row[3]])).convert("RGBA"))

        with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
            full = torch.from_numpy(np.stack(list(pool.map(pixels, rows))))
        self.index = {(c, s): i for i, (c, s, _, _) in enumerate(rows)}
        full = full.to(device).permute(0, 3, 1, 2).to(dtype).contiguous()
        self.banks = [full] + [F.interpolate(full.float(), size=e, mode="area").to(dtype)
                               for e in self.EDGES[1:]]


def drawn_styles():
    """(concept index, style) of all packed drawings."""
    with open(os.path.join(PACK, "sprites.json"), encoding="utf-8") as f:
        return {(r[0], r[1]) for r in json.load(f)}


def for_training(index, style):
    """Whether VAE, text encoder and UNet may see this drawing."""
    c = concepts()[index]
    return c.core and not c.held and style in TRAIN_STYLES
