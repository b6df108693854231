#!/usr/bin/env python3
"""Runs `impasto generate --trace` for every golden trace of a folder and compares.

    check_traces.py --impasto build/impasto tests/data           (models below tests/data/models)
    check_traces.py --impasto build/impasto DIR            (of make_fixtures.py --variants DIR)

Model, prompt, sampler, steps, sizes and so on come from each golden's metadata; more options for
the program after `--` (for instance -- --device cpu). Exit 1 when one differs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from safetensors import safe_open

SCHEDULES = ("karras", "exponential", "trailing")


def picture(golden, key, path):
    """Writes a picture of the golden ([1,H,W,3], or a mask [1,H,W], 0..1) as PNG."""
    with safe_open(golden, "np") as f:
        Image.fromarray((f.get_tensor(key)[0] * 255).round().astype("uint8")).save(path)
    return ["--" + key, str(path)]


def start(golden, meta, folder):
    """Options of a picture that starts from a picture."""
    with safe_open(golden, "np") as f:
        keys = [key for key in ("init", "mask") if key in f.keys()]
    more = ["--strength", meta["strength"]] if keys else []
    for key in keys:
        more += picture(golden, key, folder / (key + ".png"))
    return more


def command(args, meta, model, trace, png):
    cmd = [args.impasto, "generate", "-m", str(model), "-p", meta["prompt"], "-o", str(png),
           "--steps", meta["steps"], "--cfg", meta["cfg"], "--seed", meta["seed"],
           "-W", meta.get("width", "64"), "-H", meta.get("height", "64"), "--trace", str(trace), "-q",
           "--precision", args.precision]
    if meta["negative"] != "(none given)":
        cmd += ["-n", meta["negative"]]
    if meta["sampler"] != "folder default":
        name = meta["sampler"]
        for schedule in SCHEDULES:
            if name.endswith("_" + schedule):
                name = name.removesuffix("_" + schedule)
                cmd += ["--schedule", schedule]
        cmd += ["--sampler", name]
    if "schedule" in meta:
        cmd += ["--schedule", meta["schedule"]]
    if "guidance_rescale" in meta:
        cmd += ["--cfg-rescale", meta["guidance_rescale"]]
    if "lora" in meta:
        cmd += ["--lora", str(Path(args.folder) / meta["lora"])]
    return cmd + args.more


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impasto", required=True)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--match", default="", help="only files whose name holds this")
    parser.add_argument("folder")
    parser.add_argument("more", nargs="*", help="options passed on to the program, after --")
    args = parser.parse_args()
    compare = Path(__file__).with_name("compare.py")
    folder, bad, n = Path(args.folder), 0, 0
    limits = ["--psnr", "45", "--eps", "1e-3", "--latent", "1e-3", "--text", "1e-2"]
    for golden in sorted(folder.glob("*.safetensors")):
        with safe_open(golden, "pt") as f:
            meta, traced = f.metadata() or {}, "eps_step0" in f.keys()
        if not traced or args.match not in golden.name:
            continue
        name = meta.get("model", "sd1")
        model = folder / name
        model = model if model.is_dir() else folder / "models" / name
        if golden.stem == "default_model_golden":
            model = Path(__file__).resolve().parents[2] / "models/default"
        with tempfile.TemporaryDirectory(prefix="impasto-check-") as tmp:
            trace = Path(tmp) / "trace.safetensors"
            cmd = command(args, meta, model, trace, Path(tmp) / "out.png")
            run = subprocess.run(cmd + start(golden, meta, Path(tmp)), capture_output=True,
                                 text=True)
            text = f"exit {run.returncode}: {run.stderr.strip()[-300:]}"
            good = run.returncode == 0
            if good:
                more = [] if args.precision == "f32" else limits
                run = subprocess.run([sys.executable, str(compare), str(trace), str(golden), *more],
                                     capture_output=True, text=True)
                good = run.returncode == 0
                rows = run.stdout.splitlines()
                text = "\n    ".join(r for r in rows if "FAIL" in r or "MISSING" in r) or rows[-1]
        print(f"{'ok  ' if good else 'FAIL'} {golden.name}: {text}", flush=True)
        n, bad = n + 1, bad + (not good)
    print(f"{n - bad} of {n} traces agree")
    sys.exit(bad != 0 or n == 0)


if __name__ == "__main__":
    main()
