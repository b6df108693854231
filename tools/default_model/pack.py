"""Puts what the training machine needs into one folder: pack.py FOLDER (the drawings: $IMPASTO_DM/pack).

Drawings for training are packed without loss, the others (which only the judge sees) as WebP of
quality 95; also the vocabulary and this folder's Python files.
"""
import io
import json
import os
import shutil
import sys

import numpy as np
from PIL import Image

from common import HERE, PACK, WORK, for_training

FILES = ("common.py", "scenes.py", "nets.py", "fast.py", "optim.py", "vae.py", "train.py", "score.py", "sample.py",
         "loras.py", "run.py", "run.sh", "concepts.txt", "held_out.json")


def main():
    pixels = np.load(os.path.join(WORK, "drawings.npy"), mmap_mode="r")
    with open(os.path.join(WORK, "drawings.json"), encoding="utf-8") as f:
        rows = json.load(f)
    os.makedirs(PACK, exist_ok=True)
    out, at = [], 0
    with open(os.path.join(PACK, "sprites.bin"), "wb") as f:
        for px, (index, style) in zip(pixels, rows):
            how = (dict(lossless=True, quality=80, method=4) if for_training(index, style) else
                   dict(quality=95, method=4, alpha_quality=100))
            data = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(px), "RGBA").save(data, "WEBP", exact=True, **how)
            f.write(data.getvalue())
            out.append((index, style, at, len(data.getvalue())))
            at += len(data.getvalue())
    with open(os.path.join(PACK, "sprites.json"), "w", encoding="utf-8") as f:
        json.dump(out, f)
    shutil.copytree(os.path.join(WORK, "tokenizer"), os.path.join(PACK, "tokenizer"), dirs_exist_ok=True)
    print(len(out), "drawings,", at, "bytes")
    if len(sys.argv) > 1:
        os.makedirs(sys.argv[1], exist_ok=True)
        for name in FILES:
            shutil.copy(os.path.join(HERE, name), sys.argv[1])
        shutil.copytree(PACK, os.path.join(sys.argv[1], "pack"), dirs_exist_ok=True)


if __name__ == "__main__":
    main()
