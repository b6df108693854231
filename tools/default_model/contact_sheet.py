"""Stage 11: models/contact_sheet.png and .txt: 64 prompts that no training caption equals."""
import glob
import json
import os

import torch

from common import MODELS, WORK, threads
from publish import contact_sheet
from sample import generate, load, sheet

PROMPTS = """a red apple, noto style, on a grey background
a dog, twemoji style, on a blue background
a cat, fluent 3d style, on a yellow background
a rocket, emojione style, on a blue background
a pizza, fluent flat style, on a light blue background
a strawberry, noto style, on a black background
a panda, twemoji style, on a pink background
a ghost, fluent 3d style, on a blue background
a house, fluent flat style, on an orange background
a mushroom, emojione style, on a black background
a butterfly, noto style, on a grey background
a penguin, fluent flat style, on a red background
a soccer ball, twemoji style, on a grey background
a hamburger, fluent 3d style, on a red background
a sunflower, noto style, on a purple background
a bus, emojione style, on a light blue background
a frog, fluent 3d style, on an orange background
a skull, twemoji style, on a yellow background
a gift box, noto style, on a pink background
a birthday cake, fluent flat style, on a red background
an alien, emojione style, on a yellow background
a fish, twemoji style, on a yellow background
a robot, noto style, on a green background
a banana, fluent 3d style, on a purple background
a carrot and a ghost, noto style, on a black background
a key, fluent flat style, on a brown background
a star, noto style, on a red background
a drawing of a pig, emojione style, on a pink background
a castle and a tent, fluent flat style, on a yellow background
a trophy, fluent 3d style, on a purple background
a bee, twemoji style, on a brown background
an owl, noto style, on a yellow background
a picture of a car on a pink background
a picture of a lion on a blue background
an emoji of a cup of coffee on an orange background
an emoji of a spider on a yellow background
a drawing of a red heart on a black background
a drawing of a tree on a light blue background
a picture of a watermelon, fluent flat style, on a white background
a picture of a whale, emojione style
a small dog, noto style, on a red background
a big carrot, fluent 3d style, on a white background
a green apple, emojione style, on a grey background
a blue book, fluent flat style, on a yellow background
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
a soccer ball and a trophy, emojione style, on a green background
a butterfly and a rose, twemoji style, on a light blue background
a robot and an alien, fluent 3d style, on a grey background
a bee and a sunflower, noto style, on a brown background
a key and a padlock next to each other
a fish next to a crab on a blue background
a cloud on the left and a rainbow on the right, noto style
a clock and a book, emojione style, on a red background
a frog and a mushroom
a bomb and a red heart, fluent flat style, on a yellow background""".split("\n")


def main():
    torch.set_num_threads(threads())
    seen = set()
    for name in glob.glob(os.path.join(WORK, "captions*.json")):  # of every cache trained on
        seen.update(json.load(open(name, encoding="utf-8")))
    contact_sheet(PROMPTS, seen, lambda: sheet(
        generate(load(os.path.join(MODELS, "default")), PROMPTS, list(range(64))), PROMPTS, 8), MODELS)


if __name__ == "__main__":
    main()
