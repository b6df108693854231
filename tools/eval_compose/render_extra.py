"""Stage 2: drawings of four packages that no generator sees: extra.npy, extra.json, for the judges alone."""
import collections
import io
import json
import os
import re

import cairosvg
import numpy as np
from PIL import Image

from world import WORK, concepts
from common import norm_hex
from render import centred, icon_svg, load

PACKS = {"fluent colour": "fluent-emoji", "openmoji": "openmoji", "emojione v1": "emojione-v1",
         "streamline": "streamline-emojis"}


def painted(svg):
    """Without filters, which Cairo cannot do: a softer shadow is no matter at 64 pixels."""
    svg = re.sub(r' filter="url\([^)]*\)"', "", svg)
    try:
        png = cairosvg.svg2png(bytestring=svg.encode(), output_width=256, output_height=256)
    except (MemoryError, ValueError):
        return None
    return centred(Image.open(io.BytesIO(png)).convert("RGBA"))


def main():
    by_label = {d["label"]: norm_hex(d["hexcode"]) for d in load("emojibase-data/en/data.json")}
    pixels, rows, count = [], [], collections.Counter()
    for style, package in PACKS.items():
        pack, named = load(f"@iconify-json/{package}/icons.json"), collections.defaultdict(list)
        chars = os.path.join(WORK, "node_modules", "@iconify-json", package, "chars.json")
        if os.path.exists(chars):
            for code, name in json.load(open(chars, encoding="utf-8")).items():
                named[norm_hex(code)].append(name)
        for c in concepts():
            slug = c.label.lower().replace("’", "").replace(" ", "-")
            names = named[by_label[c.label]] + [slug, slug + "-1", slug + "-2"]
            svg = next((s for s in (icon_svg(pack, n) for n in names) if s), None)
            if svg is None:
                continue
            px = painted(svg)
            if px is not None:
                pixels.append(px)
                rows.append((c.index, style))
                count[style] += 1
    np.save(os.path.join(WORK, "extra.npy"), np.stack(pixels))
    with open(os.path.join(WORK, "extra.json"), "w", encoding="utf-8") as f:
        json.dump(rows, f)
    print(dict(count))


if __name__ == "__main__":
    main()
