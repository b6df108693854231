"""contact_sheet.png and .txt: 64 prompts that no training caption equals, first picture of each.

The captions are planned anew, as run.py planned them: 25 s. With --loras also before_after.png of the
adapters there.
"""
import argparse
import os

import torch

from common import MODELS, threads
from loras import LORAS
from publish import before_after, contact_sheet
from sample import generate, load, sheet
from scenes import SCENES, planned

PROMPTS = """a picture of a dog, twemoji style, on a blue background
an emoji of a cat, fluent 3d style, on a brown background
a picture of a rocket, emojione style, on a light blue background
an emoji of a pizza, fluent flat style, on a blue background
a picture of a strawberry, noto style, on a black background
an emoji of a panda, twemoji style, on a green background
a picture of a ghost, fluent 3d style, on a purple background
an emoji of a house, noto style, on a red background
a picture of a unicorn, fluent flat style, on a green background
an emoji of a butterfly, emojione style, on a grey background
a picture of a soccer ball, twemoji style, on a pink background
an emoji of a hamburger, fluent 3d style, on a red background
a picture of a sunflower, noto style, on a purple background
an emoji of a bus, emojione style, on a light blue background
a picture of a frog, fluent 3d style, on an orange background
an emoji of a skull, twemoji style, on a purple background
a picture of a birthday cake, fluent flat style, on a grey background
an emoji of a shark, noto style, on a light blue background
a picture of a trumpet, twemoji style, on a black background
an emoji of a top hat, fluent 3d style, on a yellow background
a drawing of a pig, emojione style, on a pink background
a drawing of a castle, noto style
a drawing of a red heart on a black background
a small dog, noto style, on a red background
a dog and a rocket, noto style, on a blue background
a cat and a fish, twemoji style, on a pink background
a pizza and a hamburger, fluent flat style, on a green background
a red apple and a banana, noto style, on a light blue background
a ghost and a skull, emojione style, on a purple background
a house and a tree, fluent 3d style, on a yellow background
a car and a bus, twemoji style, on a white background
a panda and a penguin, fluent flat style, on an orange background
a star and a crescent moon, noto style, on a black background
a strawberry and a lemon, fluent 3d style, on a white background
a soccer ball and a trophy, emojione style, on a red background
a butterfly and a rose, twemoji style, on a light blue background
a robot and an alien, fluent 3d style, on a grey background
a bee and a sunflower, noto style, on a brown background
a key and a padlock next to each other
a fish next to a crab on a blue background
a cloud on the left and a rainbow on the right, noto style, on a blue background
a clock and a book, emojione style, on a red background
a hamburger above a star
a dragon above a castle, noto style, on a purple background
a sun above a cloud, twemoji style, on a light blue background
a balloon above a birthday cake, fluent 3d style, on a pink background
a bell below a key, emojione style, on a grey background
a top hat above a rabbit, fluent flat style, on a green background
an airplane above a ship, noto style, on a blue background
a frog below a ladybug, twemoji style, on a yellow background
a candle above a gift box on a red background
a crab below a whale, fluent 3d style
a dog, a cat and a rabbit, noto style, on a green background
a clock, a key and a bell
an orange, a lemon and a banana, fluent 3d style, on a purple background
a car, a bus and a taxi, twemoji style, on a grey background
a star, a sun and a crescent moon, fluent flat style, on a black background
a horse on the left, a cow in the middle and a pig on the right, emojione style
a rose, a tulip and a sunflower, noto style, on a white background
a mushroom above a frog and a snail, noto style
a trophy above a soccer ball and a basketball, twemoji style, on an orange background
a cup of coffee above a croissant and a cookie, fluent 3d style, on a brown background
a tree above a house and a car, fluent flat style, on a light blue background
a bee above a rose and a tulip, emojione style, on a yellow background""".split("\n")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", default=os.path.join(MODELS, "default"))
    ap.add_argument("--out", default=MODELS, help="folder of the two files")
    ap.add_argument("--scenes", type=int, default=SCENES, help="as many as the run had")
    ap.add_argument("--loras", help="folder of the adapters")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    contact_sheet(PROMPTS, set(planned(args.scenes).texts), lambda: sheet(
        generate(load(args.model), PROMPTS, list(range(64)), batch=8), PROMPTS, 8), args.out)
    if args.loras:
        before_after(LORAS, args.model, args.loras, lambda pictures, labels, columns: sheet(
            torch.from_numpy(pictures).permute(0, 3, 1, 2), labels, columns),
            os.path.join(args.loras, "before_after.png"))


if __name__ == "__main__":
    main()
