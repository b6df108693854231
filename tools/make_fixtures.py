#!/usr/bin/env python3
"""Writes tests/data: tiny random models and what PyTorch + diffusers + transformers make of them.

    python3 tools/make_fixtures.py [--tokenizer DIR] [--only models,pipelines,starts,...]
    python3 tools/make_fixtures.py --variants DIR      (more tiny models and traces, not committed)

DIR holds a small CLIP tokenizer (vocab.json, merges.txt, special_tokens_map.json,
tokenizer_config.json), for instance that of hf-internal-testing/tiny-stable-diffusion-torch; once
the models exist, tests/data/models/sd1/tokenizer is such a folder and is the default.
Needs torch, diffusers, transformers, peft, safetensors, open-clip-torch and scipy (LMS, beta).
Every number comes from those libraries on the CPU in f32; nothing here runs this project's code.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fixtures import (  # noqa: E402
    cache,
    clip,
    compose,
    grads,
    loras,
    models,
    pipelines,
    quantized,
    readme,
    singlefile,
    starts,
    train,
    variants,
)
from fixtures.common import save  # noqa: E402

SIZES = {"sd1": (32, 24), "sd2": (56, 40), "sdxl": (40, 24), "lcm": (16, 24)}


def load_tokenizer_source(given, data):
    """A copy outside the output folder, because that folder is rewritten."""
    source = Path(given) if given else data / "models/sd1/tokenizer"
    if not (source / "vocab.json").is_file():
        sys.exit(f"{source}: no vocab.json there; give --tokenizer")
    copy = Path(tempfile.mkdtemp(prefix="impasto-fixtures-")) / "tokenizer"
    shutil.copytree(source, copy)
    return copy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="folder with the small CLIP tokenizer")
    parser.add_argument("--out", default=Path(__file__).resolve().parent.parent / "tests/data")
    parser.add_argument("--only", default="models,pipelines,starts,cache,clip,grads,train,loras,compose,quantized")
    parser.add_argument("--variants", metavar="DIR", help="only write more models, to DIR")
    args = parser.parse_args()
    only = set(args.only.split(","))
    data = Path(args.out)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    source = load_tokenizer_source(args.tokenizer, data)
    if args.variants:
        variants.make(args.variants, source)
        return
    work = data / "models" if "models" in only else source.parent / "models"
    made = models.make_all(work, source)
    pipes = {name: pipe for name, (pipe, _) in made.items()}
    singles = {}
    for kind in ("sd1", "sd2", "sdxl"):
        singles[kind] = singlefile.checkpoint(pipes[kind], kind)
        singlefile.check(pipes[kind], kind, singles[kind])
        if "models" in only and kind != "sd1":  # sd1's are written by quantized.make
            half = singlefile.cast(singles[kind], torch.float16)
            save(data / f"model_{kind}_single_f16.safetensors", half)
    license_text = Path("/usr/share/common-licenses/Apache-2.0")  # Debian's copy
    if license_text.is_file():
        (data / "models/LICENSE.tokenizer").write_text(
            "The tokenizers below this folder (vocab.json, merges.txt, tokenizer.json and their\n"
            "configs) are those of hf-internal-testing/tiny-stable-diffusion-torch, made by\n"
            "Hugging Face for the tests of diffusers and transformers; pad tokens and file layout\n"
            "were changed. Licence:\n\n" + license_text.read_text())
    if "quantized" in only:
        quantized.make(pipes["sd1"], singles["sd1"], data)
    if "pipelines" in only:
        for name, pipe in pipes.items():
            pipelines.model_goldens(name, pipe, data, SIZES[name])
        pipelines.make_traces(made, data, SIZES)
    if "starts" in only:
        starts.make(made, data, source)
    if "cache" in only:
        cache.make(made, data, SIZES)
    if "clip" in only:
        clip.make(data, work, source)
    if "grads" in only:
        grads.make(pipes["sd1"], data)
    if "train" in only:
        train.make(pipes, data)
    if "loras" in only:
        loras.make(made, data, SIZES)
    if "compose" in only:
        folder = data.parent.parent / "models/default"
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        compose.make(made | {"default": (pipe, folder)}, data)
    readme.make(data)
    shutil.rmtree(source.parent)


if __name__ == "__main__":
    main()
