"""Writes tests/data/default_model_golden.safetensors: diffusers, f32 on the CPU, f16 weights."""
import argparse
import os

import torch

from common import MODELS, ROOT, threads
from publish import GOLDEN, golden, load


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", default=os.path.join(MODELS, "default"))
    ap.add_argument("--out", default=os.path.join(ROOT, GOLDEN))
    args = ap.parse_args()
    torch.set_num_threads(threads())
    golden(load(args.model), args.out, "tools/default_model/golden.py", "a dog above a rocket")


if __name__ == "__main__":
    main()
