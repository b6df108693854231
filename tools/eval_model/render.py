"""Stage 2: renders every concept of concepts.txt in every style to premultiplied RGBA, 128 px."""
import collections
import io
import json
import os

import cairosvg
import numpy as np
from PIL import Image

from common import HELD, MASTER, STYLES, WORK, concepts, norm_hex

MODULES = os.path.join(WORK, "node_modules")


def load(path):
    with open(os.path.join(MODULES, path), encoding="utf-8") as f:
        return json.load(f)


def icon_svg(pack, name):
    """The SVG text of an Iconify icon, aliases followed."""
    for _ in range(5):
        if name in pack["icons"]:
            break
        alias = pack.get("aliases", {}).get(name)
        if alias is None:
            return None
        if set(alias) - {"parent"}:
            return None     # turned or flipped aliases are not needed here
        name = alias["parent"]
    icon = pack["icons"].get(name)
    if icon is None:
        return None
    w = icon.get("width", pack.get("width", 16))
    h = icon.get("height", pack.get("height", 16))
    box = f'{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{MASTER}" height="{MASTER}" viewBox="{box}">{icon["body"]}</svg>')


def centred(img):
    """Centres the drawing and scales its longer side to the master's edge, less one pixel each side."""
    box = img.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None:
        return None
    part = img.crop(box)
    if part.width < 24 and part.height < 24:
        return None
    room = MASTER - 2
    k = room / max(part.size)
    size = (max(1, round(part.width * k)), max(1, round(part.height * k)))
    part = part.convert("RGBa").resize(size, Image.LANCZOS)
    out = Image.new("RGBa", (MASTER, MASTER))
    out.paste(part, ((MASTER - size[0]) // 2, (MASTER - size[1]) // 2))
    return np.asarray(out)


def main():
    by_label = {d["label"]: norm_hex(d["hexcode"]) for d in load("emojibase-data/en/data.json")}
    names = collections.defaultdict(list)
    packs = {}
    for style, (_, package) in STYLES.items():
        if style == "3d":
            continue
        packs[style] = load(f"{package}/icons.json")
        for code, name in load(f"{package}/chars.json").items():
            if name not in names[norm_hex(code)]:
                names[norm_hex(code)].append(name)
    folder = os.path.join(MODULES, STYLES["3d"][1], "assets")
    files3d = {norm_hex(f[:-5]): os.path.join(folder, f) for f in os.listdir(folder)}
    squeezed = {n.replace("-", ""): n for n in packs["fxemoji"]["icons"]}

    pixels, rows, missing = [], [], collections.Counter()
    for c in concepts():
        code = by_label[c.label]
        slug = c.label.lower().replace("’", "").replace(" ", "-")
        for style in STYLES:
            if style == "3d":
                img = Image.open(files3d[code]).convert("RGBA") if code in files3d else None
            else:
                own = load_names(packs[style], names[code] + [slug], style, squeezed)
                svg = next((s for s in (icon_svg(packs[style], n) for n in own) if s), None)
                img = None
                if svg:
                    png = cairosvg.svg2png(bytestring=svg.encode(), output_width=256,
                                           output_height=256)
                    img = Image.open(io.BytesIO(png)).convert("RGBA")
            px = centred(img) if img is not None else None
            if px is None:
                missing[style] += 1
                continue
            pixels.append(px)
            rows.append((c.index, style))
    np.save(os.path.join(WORK, "drawings.npy"), np.stack(pixels))
    with open(os.path.join(WORK, "drawings.json"), "w", encoding="utf-8") as f:
        json.dump(rows, f)
    print(len(concepts()), "concepts,", len(rows), "drawings, missing", dict(missing))
    unknown = [h for h in HELD["concepts"] if h not in {c.words for c in concepts()}]
    if unknown:
        raise SystemExit(f"held-out concepts not in concepts.txt: {unknown}")


def load_names(pack, candidates, style, squeezed):
    if style != "fxemoji":
        return candidates
    return [squeezed[n.replace("-", "")] for n in candidates if n.replace("-", "") in squeezed]


if __name__ == "__main__":
    main()
