"""Pictures from a model folder, or with --checkpoint from the training's EMA; a labelled sheet."""
import argparse
import json
import os

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import LATENT, MODELS, SIZE, WORK, threads
from nets import Text, Unet, Vae, sampled
from scenes import Words

PEEK = ["a red apple, noto style, on a blue background", "a dog and a rocket", "a cat",
        "a dog, twemoji style, on a green background", "a rocket, fluent 3d style, on a yellow background",
        "a pizza, noto style", "a house, emojione style, on a light blue background", "an avocado",
        "a fish, fluent flat style, on a pink background", "a hamburger above a star", "a skull",
        "a car, twemoji style, on an orange background", "a panda, noto style, on a purple background",
        "a tree and a house, fluent flat style, on a yellow background", "a butterfly", "a red heart",
        "a ghost, fluent 3d style, on a black background", "a dragon, emojione style",
        "a bus, noto style, on a red background", "a clock, a key and a bell", "a strawberry",
        "a penguin, fluent 3d style", "a mushroom above a frog and a snail, noto style",
        "a horse and a drum"]


class Model:
    """The three networks on a device, with the vocabulary and the scaling factor."""

    def __init__(self, state, scale, words, device="cpu"):
        self.unet, self.text, self.vae = Unet(), Text(), Vae()
        for name in ("unet", "text", "vae"):
            part = {k[len(name) + 1:]: v.float() for k, v in state.items() if k.startswith(name + ".")}
            getattr(self, name).load_state_dict(part)
            getattr(self, name).eval().requires_grad_(False).to(device)
        self.scale, self.words, self.device = scale, words, device


def of_training(device="cpu"):
    """The working folder's checkpoints, the decoder as far as it is."""
    unet = torch.load(os.path.join(WORK, "unet.pt"), weights_only=True)
    for name in ("vae2.pt", "vae.pt"):
        if os.path.exists(os.path.join(WORK, name)):
            vae = torch.load(os.path.join(WORK, name), weights_only=True)
            break
    state = {**unet["ema"], **{"vae." + k: v for k, v in vae["vae"].items()}}
    return Model(state, unet["scale"], Words(), device)


def load(folder, device="cpu"):
    """A diffusers folder, as export.py writes it."""
    from safetensors.torch import load_file
    state = {}
    for name, path in (("unet", "unet/diffusion_pytorch_model.safetensors"),
                       ("text", "text_encoder/model.safetensors"),
                       ("vae", "vae/diffusion_pytorch_model.safetensors")):
        part = load_file(os.path.join(folder, path))
        state.update({f"{name}.{k}": v for k, v in part.items()})
    with open(os.path.join(folder, "vae/config.json"), encoding="utf-8") as f:
        scale = json.load(f)["scaling_factor"]
    return Model(state, scale, Words(os.path.join(folder, "tokenizer")), device)


@torch.no_grad()
def generate(model, prompts, seeds, steps=20, cfg=5.0, batch=64, negative=""):
    """uint8 [n,3,128,128]; each picture's noise comes from its own seed alone."""
    def embed(texts):
        return model.text(torch.tensor([model.words.ids(t) for t in texts], device=model.device))

    out = []
    for i in range(0, len(prompts), batch):
        noise = torch.cat([torch.randn(1, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(s))
                           for s in seeds[i:i + batch]]).to(model.device)
        x = sampled(model.unet, embed(prompts[i:i + batch]), embed([negative]), noise, steps, cfg)
        y = model.vae.decode(x / model.scale)
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(out)


def sheet(pictures, labels, columns, zoom=1):
    """A grid of pictures [n,3,h,w] with the labels under them."""
    edge, foot = SIZE * zoom, 38
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (edge + 6), rows * (edge + foot)), "white")
    pen = ImageDraw.Draw(page)
    for i, (px, text) in enumerate(zip(pictures, labels)):
        x, y = (i % columns) * (edge + 6) + 3, (i // columns) * (edge + foot) + 2
        picture = Image.fromarray(np.ascontiguousarray(px.permute(1, 2, 0).numpy()))
        page.paste(picture if zoom == 1 else picture.resize((edge, edge), Image.LANCZOS), (x, y))
        words, lines, line = text.split(), [], ""
        for w in words:
            if pen.textlength(line + " " + w, font_size=9) > edge:
                lines.append(line)
                line = w
            else:
                line = (line + " " + w).strip()
        for k, text_line in enumerate([*lines, line][:3]):
            pen.text((x, y + edge + 1 + 11 * k), text_line, fill="black", font_size=9)
    return page


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", default=os.path.join(MODELS, "default"))
    ap.add_argument("--checkpoint", action="store_true")
    ap.add_argument("--out", default="sheet.png")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--cfg", type=float, default=5.0)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("prompts", nargs="*")
    args = ap.parse_args()
    torch.set_num_threads(threads())
    model = of_training() if args.checkpoint else load(args.model)
    prompts = args.prompts or PEEK
    px = generate(model, prompts, [args.seed + i for i in range(len(prompts))], args.steps, args.cfg)
    sheet(px, prompts, min(8, len(prompts))).save(args.out)


if __name__ == "__main__":
    main()
