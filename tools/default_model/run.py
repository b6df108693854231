"""All training in one call on one GPU: run.py smoke|full SECONDS OUT.

Processes share the device. `vae` trains the VAE, and at the end its decoder; `unet` then trains UNet and text
encoder; each adapter has one, which waits for the denoiser, as `judge` does, which trains the judge before. This one plans
the scenes, restarts a process that fails once, and ends all at the deadline. Every stage's end is a share of SECONDS;
results are written as they come. A vae.safetensors or judge.safetensors of an earlier call beside this file is taken as it is.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time

from common import HERE, WORK, concepts, drawn_styles
from scenes import SCENES, vocabulary

# stage: share of SECONDS after which it ends (full, smoke); the pool of latents in seconds
ENDS = {"judge": (0.11, 0.30), "vae": (0.25, 0.50), "unet": (0.87, 0.78), "decoder": (0.945, 0.90),
        "lora": (0.97, 0.92)}
LATER = 0.45    # when the roles begin that wait for the denoiser
ADAPTERS = ("pineapple", "snowman", "fxemoji")
ROLES = ("judge", "vae", "unet", *ADAPTERS)


def settings(argv):
    ap = argparse.ArgumentParser()
    ap.add_argument("mode", choices=("smoke", "full"))
    ap.add_argument("seconds", type=float)
    ap.add_argument("out")
    ap.add_argument("--role", choices=ROLES)
    ap.add_argument("--start", type=float, default=time.time())
    ap.add_argument("--device", default="cuda")
    ap.add_argument("--share", type=float, default=1.0, help="of the judge's prompts")
    ap.add_argument("--tiny", action="store_true", help="small batches: to try the script on a CPU")
    ap.add_argument("--scenes", type=int, default=SCENES)
    ap.add_argument("--vae-batch", type=int, default=64)
    ap.add_argument("--unet-batch", type=int, default=256)
    ap.add_argument("--pool-batch", type=int, default=256)
    ap.add_argument("--judge-batch", type=int, default=256)
    ap.add_argument("--judge-scenes", type=int, default=60000)
    ap.add_argument("--check-scenes", type=int, default=2000)
    ap.add_argument("--muon-rate", type=float, default=1.5e-3)
    ap.add_argument("--adam-rate", type=float, default=1e-3)
    ap.add_argument("--log-every", type=int, default=100)
    ap.add_argument("--lora-batch", type=int, default=32)
    ap.add_argument("--lora-steps", type=int, default=900)
    ap.add_argument("--lora-scenes", type=int, default=2000)
    ap.add_argument("--lora-rank", type=int, default=3)
    ap.add_argument("--lora-rate", type=float, default=3e-3)
    args = ap.parse_args(argv)
    smoke = args.mode == "smoke"
    for stage, shares in ENDS.items():
        setattr(args, stage + "_end", args.start + shares[smoke] * args.seconds)
    args.pool_seconds = 2 if smoke else 0.024 * args.seconds
    args.ddim, args.cfg, args.spread_prompts = 20, 5.0, max(1, round(6 * args.share))
    args.least, args.probe = 5, 4096     # steps of a stage at least; pictures that measure the VAE
    args.patience = 90 if smoke else 15  # how late one stage may be before the next goes on
    if smoke:
        args.scenes, args.judge_scenes, args.log_every = 40000, 10000, 20
        args.share, args.spread_prompts, args.check_scenes = 0.3, 1, 500
        args.lora_steps, args.lora_scenes = 100, 300
    if args.tiny:
        args.scenes, args.judge_scenes, args.check_scenes, args.log_every = 600, 300, 64, 5
        args.vae_batch = args.judge_batch = 2
        args.unet_batch = 4
        args.pool_batch, args.share, args.spread_prompts = 16, 0.01, 1
        args.lora_batch, args.lora_steps, args.lora_scenes, args.least = 2, 2, 8, 2
        args.ddim, args.probe = 2, 16
    return args


def logger(args):
    def log(text):
        print(f"[{time.time() - args.start:5.0f} {args.role or 'run'}] {text}", flush=True)
    return log


def written(tensors, path, scale=None):
    """A safetensors file in f16 (vectors in f32), complete or not there."""
    from safetensors.torch import save_file
    own = {k: (v.half() if v.is_floating_point() and v.ndim > 1 else v).detach().cpu().contiguous()
           for k, v in tensors.items()}
    save_file(own, path + ".tmp", metadata={
        "scale": str(scale), "vocabulary": vocabulary()} if scale else None)
    os.replace(path + ".tmp", path)


def publish_denoiser(args):
    def publish(state, scale):
        """UNet and text encoder in two files, each below 16 MiB."""
        parts, size, half = [{}, {}], 0, sum(v.numel() for v in state.values()) / 2
        for k, v in state.items():
            parts[size > half][k] = v
            size += v.numel()
        for i, part in enumerate(parts):
            written(part, os.path.join(args.out, f"denoiser-{i + 1}.safetensors"), scale)
    return publish


def publish_vae(args):
    def publish(state, scale):
        written({"vae." + k: v for k, v in state.items()}, os.path.join(args.out, "vae.safetensors"), scale)
    return publish


def role(args, log):
    if args.role == "judge":
        import score
        score.main_role(args, log, lambda s: args.mode == "smoke" or
                        written(s, os.path.join(args.out, "judge.safetensors")))
    elif args.role == "vae":
        import vae
        vae.main(args, log, publish_vae(args))
    elif args.role in ADAPTERS:
        import loras
        loras.main(args, log, args.role)
    else:
        import train
        train.main(args, log, publish_denoiser(args))


def plan_scenes(args, log):
    """plan.npz and captions.json: the training scenes."""
    import numpy as np
    from scenes import Plan, planned
    start = time.time()
    plan = planned(args.scenes)
    path = os.path.join(WORK, "plan.npz")
    with open(path + ".tmp", "wb") as f:
        np.savez(f, **{name: getattr(plan, name) for name in Plan.ARRAYS})
    os.replace(path + ".tmp", path)
    log(f"{args.scenes} scenes planned in {time.time() - start:.0f} s")
    with open(os.path.join(WORK, "captions.json"), "w", encoding="utf-8") as f:
        json.dump(sorted(set(plan.texts)), f)


def vae_of_before(args, log):
    """The VAE of an earlier call becomes this one's and one of its results; whether there is one."""
    path = os.path.join(HERE, "vae.safetensors")
    if not os.path.exists(path):
        return False
    from safetensors.torch import safe_open
    with safe_open(path, "pt") as f:
        scale = float(f.metadata()["scale"])
        state = {k.removeprefix("vae."): f.get_tensor(k).float() for k in f.keys()}
    from optim import saved
    for name in ("vae.pt", "vae2.pt"):
        saved({"vae": state, "scale": scale}, os.path.join(WORK, name))
    publish_vae(args)(state, scale)
    log("the VAE of an earlier call")
    return True


def begun(args, name):
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--role", name,
               "--start", str(args.start)]
    return subprocess.Popen(command)


def watch(args, log):
    """Runs the roles until the judge's end or the deadline."""
    running = {name: begun(args, name) for name in (["unet"] if vae_of_before(args, log) else ["vae", "unet"])}
    later, again = ["judge", *ADAPTERS], set()
    plan_scenes(args, log)
    limit = args.start + args.seconds + (60 if args.mode == "smoke" else 4)
    while time.time() < limit and (running or later):
        if later and time.time() > args.start + LATER * args.seconds:
            running.update({name: begun(args, name) for name in later})
            later = []
        for name, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[name]
            if code and name not in again:
                log(f"{name} failed ({code}), once more")
                again.add(name)
                running[name] = begun(args, name)
        time.sleep(0.2)
    for name, process in running.items():
        log(f"{name} ended by the deadline")
        process.kill()


def main():
    args = settings(sys.argv[1:])
    log = logger(args)
    os.makedirs(args.out, exist_ok=True)
    if args.role:
        role(args, log)
        return
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    log(f"{len([c for c in concepts() if c.core and not c.held])} concepts, "
        f"{len(drawn_styles())} drawings packed, {args.seconds:.0f} s")
    watch(args, log)
    if os.path.isdir(os.path.join(WORK, "loras")):
        shutil.make_archive(os.path.join(args.out, "loras"), "zip", os.path.join(WORK, "loras"))
    log("done")


if __name__ == "__main__":
    main()
