"""Pictures from a model folder or, with --checkpoint, from the training's EMA; a labelled sheet."""
import argparse
import os

import torch
from PIL import Image, ImageDraw

from common import MODELS, threads
from publish import generate, load

PEEK = ["a red apple, noto style, on a blue background", "a dog and a rocket", "a cat",
        "a dog, twemoji style, on a green background", "a rocket, fluent 3d style, on a yellow background",
        "a pizza, noto style", "a house, emojione style, on a light blue background", "a bicycle",
        "a fish, fluent flat style, on a pink background", "a hamburger and a star", "a skull",
        "a car, twemoji style, on an orange background", "a panda, noto style, on a purple background",
        "a tree and a house, fluent flat style, on a yellow background", "a butterfly", "a red heart",
        "a ghost, fluent 3d style, on a black background", "an elephant, emojione style",
        "a bus, noto style, on a red background", "a clock and a key", "a strawberry",
        "a penguin, fluent 3d style", "a mushroom, fluent flat style, on a green background",
        "a guitar and a drum"]


def sheet(pictures, labels, columns, zoom=2):
    """A grid of pictures with the labels under them."""
    edge, foot = 64 * zoom, 26
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (edge + 6), rows * (edge + foot)), "white")
    pen = ImageDraw.Draw(page)
    for i, (px, text) in enumerate(zip(pictures, labels)):
        x, y = (i % columns) * (edge + 6) + 3, (i // columns) * (edge + foot) + 2
        page.paste(Image.fromarray(px).resize((edge, edge), Image.LANCZOS), (x, y))
        words, lines, line = text.split(), [], ""
        for w in words:
            if pen.textlength(line + " " + w, font_size=9) > edge:
                lines.append(line)
                line = w
            else:
                line = (line + " " + w).strip()
        for k, text_line in enumerate([*lines, line][:2]):
            pen.text((x, y + edge + 1 + 11 * k), text_line, fill="black", font_size=9)
    return page


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", default=os.path.join(MODELS, "eval", "model"))
    ap.add_argument("--checkpoint", action="store_true")
    ap.add_argument("--out", default="sheet.png")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--cfg", type=float, default=5.0)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("prompts", nargs="*")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    if args.checkpoint:
        from export import pipeline
        pipe, step = pipeline()
        print("step", step)
    else:
        pipe = load(args.model)
    prompts = args.prompts or PEEK
    px = generate(pipe, prompts, [args.seed + i for i in range(len(prompts))], args.steps, args.cfg)
    sheet(px, prompts, min(8, len(prompts))).save(args.out)


if __name__ == "__main__":
    main()
