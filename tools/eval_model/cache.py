"""Stage 5: composes training scenes, encodes them with the VAE and keeps latents and token ids."""
import argparse
import json
import multiprocessing
import os
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from common import SEED, WORK, Drawings, compose, draw_scene, training_concepts
from vae import to_tensor


def load_vae():
    state = torch.load(os.path.join(WORK, "vae.pt"), weights_only=True)
    vae = AutoencoderKL(**state["config"])
    vae.load_state_dict(state["ema"])
    return vae.eval().requires_grad_(False)


def tokenizer():
    return CLIPTokenizer.from_pretrained(os.path.join(WORK, "tokenizer"))


def ids_of(tok, texts):
    return tok(texts, padding="max_length", max_length=77, truncation=True,
               return_tensors="np").input_ids.astype(np.int16)


@torch.no_grad()
def encode(vae, pictures, batch=64):
    """(mean, std) of the posterior, float16, unscaled."""
    mean, std = [], []
    for i in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            dist = vae.encode(to_tensor(pictures[i:i + batch])).latent_dist
        mean.append(dist.mean.float().half())
        std.append(dist.std.float().half())
    return torch.cat(mean), torch.cat(std)


def part(job):
    """One worker's share: composes `count` scenes from its seed and encodes them."""
    seed, count = job
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    drawings, pool = Drawings(), training_concepts()
    pictures = np.empty((count, 64, 64, 3), dtype=np.uint8)
    texts = []
    for i in range(count):
        parts, style, colour, text = draw_scene(drawings, pool, rng)
        # hardly any jitter: a drawing always lies on the same latent cells, which halves what a
        # small network has to learn
        pictures[i] = compose(drawings, parts, style, colour, rng, 0.25)
        texts.append(text)
    mean, std = encode(load_vae(), pictures)
    return mean.numpy(), std.numpy(), texts


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--scenes", type=int, default=20000)
    args = ap.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    jobs = [(SEED + 10 + i, args.scenes // 8) for i in range(8)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        done = pool.map(part, jobs, chunksize=1)
    mean = torch.from_numpy(np.concatenate([d[0] for d in done]))
    std = torch.from_numpy(np.concatenate([d[1] for d in done]))
    texts = [t for d in done for t in d[2]]
    m, s = mean.float(), std.float()
    scale = float(1.0 / ((m.square() + s.square()).mean() - m.mean() ** 2).sqrt())
    print("channel means", m.mean(dim=(0, 2, 3)).tolist(), "deviations",
          m.std(dim=(0, 2, 3)).tolist(), "mean posterior deviation", float(s.mean()),
          "scaling_factor", scale, flush=True)
    torch.save({"mean": mean, "std": std, "ids": torch.from_numpy(ids_of(tokenizer(), texts)),
                "empty": torch.from_numpy(ids_of(tokenizer(), [""])), "scale": scale},
               os.path.join(WORK, "latents.pt"))
    with open(os.path.join(WORK, "captions.json"), "w", encoding="utf-8") as f:
        json.dump(sorted(set(texts)), f)
    print(f"done in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
