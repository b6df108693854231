"""Stage 4: one plain LoRA for each concept and new style, on the frozen default model.

Plain DreamBooth: pictures of one new concept with captions, alone and beside objects that the default
model knows, the ordinary loss over the whole picture, and class pictures for prior preservation. No masks,
and nothing here knows that there are other adapters.
"""
import argparse
import os
import subprocess
import sys
import time
import traceback
import types

import numpy as np
import torch

from world import (COLOURS, CONCEPT_STYLES, CONCEPTS, EVAL, MODELS, NEW_STYLES, SEED, TRAIN_STYLES,
                   by_words, phrase, training_concepts)
import fast
import loras
from common import Drawings
from optim import laid_out, tuned
from sample import load
from scenes import LAYOUT_NAMES, Plan, caption, ground, objects_text, training_scene

LEAST = 8   # seconds of one adapter's training, even when the time is up
NAMES = [*CONCEPTS, *NEW_STYLES]
OBJECTS = {"one": 1, "row of two": 2, "column of two": 2, "row of three": 3, "triangle": 3}
SHARES = {True: (0.42, 0.26, 0.10, 0.14, 0.08),     # of the layouts in a concept's pictures
          False: (0.45, 0.22, 0.12, 0.13, 0.08)}    # in a style's


def registered(name):
    """What tools/default_model/loras.py has to know of an adapter to write it."""
    words = phrase(name) if name in CONCEPTS else NEW_STYLES[name]
    kind = {"concept": name} if name in CONCEPTS else {"style": name}
    loras.LORAS[name] = dict(kind, trigger=words.split()[0], phrase=words)


def others(drawn, pool, style, count, rng):
    """`count` different objects that the default model knows and that are drawn in the style."""
    while True:
        parts = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
        if all((p.index, style) in drawn for p in parts):
            return parts


def layout_of(name, rng):
    return LAYOUT_NAMES[rng.choice(len(LAYOUT_NAMES), p=SHARES[name in CONCEPTS])]


def concept_scene(name, drawn, pool, rng):
    """(parts, layout, style, colour, caption) of a picture with the concept in it."""
    c, words = by_words(name), phrase(name)
    subject = types.SimpleNamespace(index=c.index, mirrors=c.mirrors, words=words, phrase="a " + words)
    layout, style = layout_of(name, rng), CONCEPT_STYLES[rng.integers(len(CONCEPT_STYLES))]
    parts = others(drawn, pool, style, OBJECTS[layout] - 1, rng)
    parts.insert(rng.integers(OBJECTS[layout]), subject)
    colour = list(COLOURS)[rng.integers(len(COLOURS))] if rng.random() < 0.8 else "white"
    text, colour = caption(parts, layout, style, colour, rng)
    return parts, layout, style, colour, text


def style_scene(name, drawn, pool, rng):
    """The same of a new style: objects that the model knows, drawn as it never saw them."""
    layout = layout_of(name, rng)
    parts = others(drawn, pool, name, OBJECTS[layout], rng)
    text, colour = f"{objects_text(parts, layout, rng)}, {NEW_STYLES[name]}", "white"
    if rng.random() < 0.6:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        text += f", {ground(colour)}"
    return parts, layout, name, colour, text


def scenes(name, count, share, drawn, words, rng):
    """The plan of an adapter's pictures; of a concept's, a share are class pictures."""
    plan, pool = Plan(count), training_concepts()
    scene = concept_scene if name in CONCEPTS else style_scene
    for i in range(count):
        if name in CONCEPTS and i < count * share:
            row = training_scene(drawn, pool, rng, list(TRAIN_STYLES))
        else:
            row = scene(name, drawn, pool, rng)
        plan.put(i, drawn, *row, rng, words)
    return plan


def wanted(name):
    """Which drawings one adapter's pictures are made of."""
    known = {c.index for c in training_concepts()}
    if name in NEW_STYLES:
        return lambda i, s: s == name and i in known
    own = by_words(name).index
    return lambda i, s: s in CONCEPT_STYLES if i == own else s in TRAIN_STYLES and i in known


def warmed(args):
    """Kernels are chosen and compiled, before the first adapter's time is counted."""
    short = argparse.Namespace(**{**vars(args), "lora_steps": 1, "lora_scenes": 2 * args.lora_batch,
                                  "lora_end": time.time() + 100})
    fitted(args.only[0], short, lambda text: None)


def train(name, args, log):
    adapters, done = fitted(name, args, log)
    loras.written(name, adapters, args, *done, args.out)


def fitted(name, args, log):
    """(the adapter's layers, trained; what loras.steps_of says of it)."""
    seed = SEED + 900 + NAMES.index(name)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    registered(name)
    model = load(args.model, args.device)
    drawings = Drawings(args.device, wanted(name))
    plan = scenes(name, args.lora_scenes, args.share, drawings.index, model.words, rng)
    latents = loras.pictured(laid_out(model.vae, args.device), model.scale, plan, drawings, args.device)
    adapters = loras.adapted(laid_out(model.unet, args.device), args.lora_rank)
    args.lora_end = max(args.lora_end, time.time() + LEAST)
    return adapters, loras.steps_of(model, adapters, plan, None, latents, args, log, name)


def share_out(args, log):
    """Several processes with about as many adapters each; the names that are not there afterwards."""
    begun = []
    for k in range(args.processes):
        names = args.only[k::args.processes]
        if names:
            begun.append(subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--processes", "1",
                 "--start", str(args.start), "--only", *names]))
    for process in begun:
        process.wait()
    gone = [n for n in args.only if not os.path.exists(os.path.join(args.out, n + ".safetensors"))]
    log(f"{len(args.only) - len(gone)} adapters, missing: {' '.join(gone) or 'none'}")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--only", nargs="*", default=NAMES)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--seconds", type=float, default=1e9, help="for all of --only")
    ap.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    ap.add_argument("--processes", type=int, default=1)
    ap.add_argument("--steps", dest="lora_steps", type=int, default=600)
    ap.add_argument("--batch", dest="lora_batch", type=int, default=32)
    ap.add_argument("--scenes", dest="lora_scenes", type=int, default=1200)
    ap.add_argument("--share", type=float, default=0.25, help="of class pictures")
    ap.add_argument("--rank", dest="lora_rank", type=int, default=4)
    ap.add_argument("--lr", dest="lora_rate", type=float, default=3e-3)
    ap.add_argument("--model", default=os.path.join(MODELS, "default"))
    ap.add_argument("--out", default=os.path.join(EVAL, "loras"))
    args = ap.parse_args()

    def log(text):
        print(f"[{time.time() - args.start:5.0f} adapters] {text}", flush=True)

    if args.processes > 1:
        share_out(args, log)
        return
    tuned(args.device)
    torch.backends.cudnn.benchmark = False      # its tries would be half of the time
    fast.checked(args.device, log)
    end = args.start + args.seconds
    if args.device != "cpu":
        warmed(args)
    for i, name in enumerate(args.only):
        # what is left of the time, shared by the adapters that are left
        args.lora_end = time.time() + (end - time.time()) / (len(args.only) - i)
        try:
            train(name, args, log)
        except Exception:   # whatever it is: the others are worth having without this one
            log(f"{name} failed: {traceback.format_exc()}")


if __name__ == "__main__":
    main()
