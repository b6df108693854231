#!/usr/bin/env python3
"""Compares a trace of `impasto generate --trace` with a golden, tensor by tensor.

    compare.py trace.safetensors golden.safetensors [--eps 1e-8] [--latent 1e-6] [--text 1e-4]
               [--psnr DB]

Limits: ids equal; text max |difference| / max |golden|; eps and latents NMSE; picture max
difference 1/255, or with --psnr a ratio in dB instead. Prints a row per tensor; exit 1 when one
fails or a tensor of the golden is missing in the trace. Works for tests/data/golden_trace_* too.
"""

import argparse
import math
import sys

import torch
from safetensors.torch import load_file


INPUTS = ("init", "mask", "vae_noise")  # of a golden; not results


def row(key, got, want, args):
    """(text, good) for one tensor."""
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}", False
    diff = (got - want).abs().max().item()
    nmse = ((got - want) ** 2).sum().item() / max((want**2).sum().item(), 1e-300)
    if key.startswith("ids"):
        return f"max difference {diff:g}", diff == 0
    if key.startswith("time"):  # timesteps between two are f32, rounded at another place
        rel = diff / max(want.abs().max().item(), 1e-30)
        return f"max relative difference {rel:.2e}", rel <= 1e-6
    if key.startswith(("text", "pooled")):
        rel = diff / max(want.abs().max().item(), 1e-30)
        return f"max relative difference {rel:.2e}, NMSE {nmse:.2e}", rel <= args.text
    if key == "image":
        psnr = -10 * math.log10(max(((got - want) ** 2).mean().item(), 1e-30))
        good = psnr >= args.psnr if args.psnr else diff <= 1 / 255
        return f"max difference {diff:.2e}, PSNR {psnr:.1f} dB", good
    limit = args.eps if key.startswith("eps") else args.latent
    return f"NMSE {nmse:.2e}, max difference {diff:.2e}", nmse <= limit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("golden")
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--latent", type=float, default=1e-6)
    parser.add_argument("--text", type=float, default=1e-4)
    parser.add_argument("--psnr", type=float, help="picture limit in dB (f16)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    got, want = load_file(args.trace), load_file(args.golden)
    bad = 0
    for key in sorted(want):
        if key in INPUTS:
            continue
        if key not in got:
            print(f"{key:16} MISSING")
            bad += 1
            continue
        text, good = row(key, got[key], want[key], args)
        print(f"{key:16} {text}{'' if good else '   FAIL'}")
        bad += not good
    print("same" if bad == 0 else f"{bad} tensors differ")
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
