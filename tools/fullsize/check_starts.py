#!/usr/bin/env python3
"""Img2img and inpainting beside diffusers: every sampler at several strengths, guidance on.

    check_starts.py --impasto build/impasto [--data tests/data] [--match TEXT] [--verbose]
                    [--steps 6] [--strengths 0.3 0.5 0.75 1]

Models: the tiny ones of tests/data/models with 4 channels, and the same with a UNet of 9 (made in a
temporary folder). The wide SD 2 model takes a few samplers only. Pictures are given at another size (both sides resize them) and the mask is
coloured. dpmpp_sde takes its noise from the generator in both (fixtures/pipelines.py, Increments):
diffusers' own comes from torchsde's Brownian tree. Compared are every prediction and latent. Exit 1
when a latent's NMSE is above 1e-6.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusers import DiffusionPipeline  # noqa: E402

from fixtures.common import NEGATIVE, PROMPT, nmse  # noqa: E402
from fixtures.starts import pictures, start_trace, with_mask_channels  # noqa: E402

SAMPLERS = ("ddim pndm euler euler_karras euler_a heun dpm_2 dpm_2_a lms dpmpp_2m dpmpp_2m_karras "
            "dpmpp_2m_sde dpmpp_2m_sde_karras dpmpp_sde dpm_single unipc deis sa sa_karras lcm tcd "
            "ddpm").split()
STRENGTHS = (0.3, 0.5, 0.75, 1.0)
FEW = ("ddim", "euler_a", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc", "sa")  # on SD 2
SIZES = {"sd1": (24, 16), "sd2": (40, 24), "sdxl": (24, 16)}
LIMIT = 1e-6


def load(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models(data, work):
    """(name, (pipeline, folder), size, has mask channels)"""
    for name, size in SIZES.items():
        folder = data / "models" / name
        pipe = load(folder)
        yield name, (pipe, folder), size, False
        if name != "sd2":
            nine = work / (name + "_inpaint")
            with_mask_channels(pipe, 601).save_pretrained(nine)
            yield nine.name, (load(nine), nine), size, True


def command(args, folder, sampler, strength, steps, cfg, seed, size, work, masked):
    name, _, schedule = sampler.partition("_karras")
    del schedule
    cmd = [args.impasto, "generate", "-m", str(folder), "-p", PROMPT, "-n", NEGATIVE, "--steps",
           str(steps), "--cfg", str(cfg), "--seed", str(seed), "-W", str(size[0]), "-H",
           str(size[1]), "--sampler", name, "--strength", str(strength), "--init",
           str(work / "init.png"), "--trace", str(work / "trace.safetensors"), "-o",
           str(work / "out.png"), "-q", "--precision", "f32"]
    if sampler.endswith("_karras"):
        cmd += ["--schedule", "karras"]
    if masked:
        cmd += ["--mask", str(work / "mask.png")]
    return cmd


def compare(want, trace):
    """(worst NMSE of a latent, of a prediction, first key above the limit)"""
    got = load_file(trace)
    worst, first = {"latent": 0.0, "eps": 0.0}, ""
    keys = [k for k in want if k.startswith(("latent_start", "latent_step", "eps_step"))]
    keys.sort(key=lambda k: (int(k.rpartition("step")[2]) if "step" in k else -1, k))
    for key in keys:
        if key not in got:
            return float("inf"), float("inf"), f"{key} is not in the trace"
        value = nmse(got[key].double(), want[key].double())
        kind = key.partition("_")[0]
        worst[kind] = max(worst[kind], value)
        if not value <= LIMIT and not first:
            first = key
    return worst["latent"], worst["eps"], first


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impasto", required=True)
    parser.add_argument("--data", default=Path(__file__).resolve().parents[2] / "tests/data")
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    n = bad = 0
    table = {}
    with tempfile.TemporaryDirectory(prefix="impasto-starts-") as tmp:
        work = Path(tmp)
        for name, made, size, nine in models(Path(args.data), work):
            images = pictures(size, 1.5)
            images[0].save(work / "init.png")
            images[1].save(work / "mask.png")
            for masked in (True,) if nine else (False, True):
                for sampler in FEW if name == "sd2" else SAMPLERS:
                    for strength in args.strengths:
                        title = f"{name} {'inpaint' if masked else 'img2img'} {sampler} {strength}"
                        if args.match not in title:
                            continue
                        want = start_trace(made, sampler, masked, strength, args.steps, 6.0, 21,
                                           size, images)
                        cmd = command(args, made[1], sampler, strength, args.steps, 6.0, 21, size,
                                      work, masked)
                        run = subprocess.run(cmd, capture_output=True, text=True)
                        if run.returncode:
                            latent, eps, first = float("inf"), float("inf"), run.stderr.strip()
                        else:
                            latent, eps, first = compare(want, work / "trace.safetensors")
                        good = latent <= LIMIT
                        n, bad = n + 1, bad + (not good)
                        key = (name, "inpaint" if masked else "img2img", sampler)
                        table[key] = max(table.get(key, 0.0), latent)
                        if args.verbose or not good:
                            print(f"{'ok  ' if good else 'FAIL'} {title}: latents {latent:.1e}, "
                                  f"predictions {eps:.1e} {first}", flush=True)
    for key, value in table.items():
        print(f"{' '.join(key)}: worst latent NMSE {value:.1e}")
    print(f"{n - bad} of {n} agree")
    sys.exit(bad != 0 or n == 0)


if __name__ == "__main__":
    main()
