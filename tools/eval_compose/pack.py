"""Puts what the training machine needs into one folder: pack.py FOLDER [--model MODEL] [--program IMPASTO].

The drawings that the adapters are made of at 128 px (as tools/default_model/pack.py packs them), those of the
judges at 64 px, this folder's and tools/default_model's Python files, the sets of prompts, the shell script;
with --model the diffusers folder to adapt, with --program what draws. Without FOLDER only $IMPASTO_EVAL_PACK is made, which judge.py
and judge_export.py read here.
"""
import argparse
import io
import json
import os
import shutil
import subprocess

import numpy as np
from PIL import Image

from world import CONCEPT_STYLES, CONCEPTS, EVAL, EVAL_PACK, HERE, RECIPE, WORK, concepts, generator_saw, trains

OWN = ("world.py", "adapters.py", "judge_data.py", "judge.py")


def drawings():
    """(concept, style, premultiplied RGBA at 128 px) of everything rendered."""
    for name in ("drawings", "extra"):
        pixels = np.load(os.path.join(WORK, name + ".npy"), mmap_mode="r")
        with open(os.path.join(WORK, name + ".json"), encoding="utf-8") as f:
            for px, (index, style) in zip(pixels, json.load(f)):
                yield index, style, np.ascontiguousarray(px)


def for_adapters(index, style):
    c = concepts()[index]
    return style in CONCEPT_STYLES if c.words in CONCEPTS else generator_saw(index, style)


def for_judges(index, style):
    return trains(1, index, style) or trains(2, index, style)


def halved(px):
    return np.asarray(Image.fromarray(px, "RGBa").reduce(2)).copy()


def written(path, want, change, quality):
    """PATH.json and PATH.bin with the drawings that are wanted, as WebP."""
    rows, at = [], 0
    with open(path + ".bin", "wb") as f:
        for index, style, px in drawings():
            if not want(index, style):
                continue
            data = io.BytesIO()
            Image.fromarray(change(px), "RGBA").save(data, "WEBP", exact=True, method=4, quality=quality,
                                                     alpha_quality=quality)
            f.write(data.getvalue())
            rows.append((index, style, at, len(data.getvalue())))
            at += len(data.getvalue())
    with open(path + ".json", "w", encoding="utf-8") as f:
        json.dump(rows, f)
    print(f"{path}: {len(rows)} drawings, {at} bytes")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    ap.add_argument("folder", nargs="?")
    ap.add_argument("--model", help="diffusers folder to take along")
    ap.add_argument("--program", help="impasto, built for that machine")
    args = ap.parse_args()
    pack = os.path.join(EVAL_PACK, "pack")
    os.makedirs(pack, exist_ok=True)
    if not os.path.exists(os.path.join(EVAL_PACK, "judge.json")):
        shutil.copytree(os.path.join(WORK, "tokenizer"), os.path.join(pack, "tokenizer"), dirs_exist_ok=True)
        written(os.path.join(pack, "sprites"), for_adapters, lambda px: px, 88)
        written(os.path.join(EVAL_PACK, "judge"), for_judges, halved, 80)
    if not args.folder:
        return
    theirs = [n for n in os.listdir(RECIPE) if n.endswith((".py", "concepts.txt", "held_out.json"))]
    for folder, names, to in ((HERE, OWN, "eval_compose"), (RECIPE, theirs, "default_model")):
        os.makedirs(os.path.join(args.folder, to), exist_ok=True)
        for name in names:
            shutil.copy(os.path.join(folder, name), os.path.join(args.folder, to, name))
    shutil.copytree(EVAL_PACK, os.path.join(args.folder, "evalpack"), dirs_exist_ok=True)
    shutil.copy(os.path.join(EVAL, "sets.json"), args.folder)
    shutil.copy(os.path.join(HERE, "run_gpu.sh"), args.folder)
    if args.program:
        os.makedirs(os.path.join(args.folder, "bin"), exist_ok=True)
        shutil.copy(args.program, os.path.join(args.folder, "bin", "impasto"))
        subprocess.run(["strip", os.path.join(args.folder, "bin", "impasto")], check=True)
    if args.model:
        shutil.copytree(args.model, os.path.join(args.folder, "model"), dirs_exist_ok=True)


if __name__ == "__main__":
    main()
