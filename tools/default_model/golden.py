"""Writes tests/data/default_model_golden.safetensors: diffusers, f32 on the CPU, f16 weights."""
import os

import torch

from common import MODELS, ROOT, threads
from publish import GOLDEN, golden, load


def main():
    torch.set_num_threads(threads())
    golden(load(os.path.join(MODELS, "default")), os.path.join(ROOT, GOLDEN),
           "tools/default_model/golden.py", "a dog and a rocket")


if __name__ == "__main__":
    main()
