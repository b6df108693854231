"""Stage 6: trains text encoder and UNet jointly on the cached latents; writes unet.pt (resumable).

The learning rate depends on the step alone: warm-up, constant, then a cosine to zero over the last
42 %. The number of steps is read from control.json in the working folder when it is there, so that
a run can be lengthened or shortened before its decay begins.
"""
import argparse
import json
import math
import os
import time

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import workers
from common import SEED, WORK

UNET_CONFIG = dict(
    sample_size=16, in_channels=4, out_channels=4, layers_per_block=1,
    block_out_channels=(96, 128, 128), cross_attention_dim=192, attention_head_dim=4,
    norm_num_groups=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
TEXT_CONFIG = dict(
    vocab_size=2000, hidden_size=192, intermediate_size=768, projection_dim=192,
    num_hidden_layers=4, num_attention_heads=4, hidden_act="quick_gelu",
    max_position_embeddings=77, bos_token_id=1998, eos_token_id=1999, pad_token_id=1999)
SCHEDULER_CONFIG = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")


def build():
    torch.manual_seed(SEED)
    return UNet2DConditionModel(**UNET_CONFIG), CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))


def rate(step, steps, warm=200, tail=0.42):
    up = min(1.0, (step + 1) / warm)
    left = max(0.0, (steps - step) / (tail * steps))
    return up * (1.0 if left >= 1.0 else 0.5 * (1 - math.cos(math.pi * left)))


def total_steps(default):
    try:
        with open(os.path.join(WORK, "control.json"), encoding="utf-8") as f:
            return int(json.load(f)["steps"])
    except (OSError, ValueError, KeyError):
        return default


class Batches:
    """Shuffled passes over the cache."""

    def __init__(self, data, size, seed):
        self.data, self.size = data, size
        self.gen = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def next(self, drop=0.1):
        if len(self.order) < self.size:
            self.order = torch.randperm(len(self.data["mean"]), generator=self.gen)
        take, self.order = self.order[:self.size], self.order[self.size:]
        ids = self.data["ids"][take].long()
        ids[torch.rand(self.size, generator=self.gen) < drop] = self.data["empty"][0].long()
        mean, std = self.data["mean"][take].float(), self.data["std"][take].float()
        return ids, (mean + std * torch.randn_like(mean)) * self.data["scale"]


def noised(x0, alphas, repeats):
    """Each latent at `repeats` stratified timesteps, the noisier ones oftener: (x, v, t, snr).

    The network predicts v = a eps - s x0. With eps as its target the noisiest steps, where text
    decides everything, hardly learn: there an eps error of 0.006 is as large an error of the picture
    as the picture itself, and the network has to hand its input through to better than that.
    """
    n = len(x0) * repeats
    x0 = x0.repeat_interleave(repeats, 0)
    t = (((torch.randperm(n) + torch.rand(n)) / n) ** 0.7 * 1000).long().clamp_(0, 999)
    a2 = alphas[t].view(-1, 1, 1, 1)
    a, s = a2.sqrt(), (1 - a2).sqrt()
    noise = torch.randn_like(x0)
    return a * x0 + s * noise, a * noise - s * x0, t, (a2 / (1 - a2)).flatten()


def weight(snr):
    """Weight of the v error: less where noise is faint and nothing is left to decide."""
    return (5 / snr).clamp(max=1.0)


def worker(rank, shared, job):
    unet, text, data, args, trained = job
    torch.set_num_threads(1)
    alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod
    params = [*unet.parameters(), *text.parameters()]
    step = last = shared.step.value
    torch.manual_seed(SEED + 100 + 1000 * rank + step)
    batches = Batches(data, args.captions, SEED + 200 + 1000 * rank + step)
    start = last_save = time.time()
    sums, count, steps = [0.0, 0.0], 0, total_steps(args.steps)
    while True:
        step = shared.ticket()
        if step >= steps:
            return
        if step // 50 > last // 50:
            steps = total_steps(args.steps)
            if rank == 0:
                print(f"step {step}/{steps} v mse {sums[0] / count:.4f} "
                      f"weighted {sums[1] / count:.4f} lr {args.lr * rate(step, steps):.2e} "
                      f"{trained + time.time() - start:.0f} s", flush=True)
                sums, count = [0.0, 0.0], 0
        if rank == 0 and step > last and time.time() - last_save > 60 * args.save_minutes:
            save(unet, text, shared, data["scale"], trained + time.time() - start)
            last_save = time.time()
        last = step
        ids, x0 = batches.next()
        x, v, t, snr = noised(x0, alphas, args.repeats)
        with torch.autocast("cpu", torch.bfloat16):
            cond = text(ids).last_hidden_state.repeat_interleave(args.repeats, 0)
            guess = unet(x, t, cond).sample.float()
        each = (guess - v).square().mean(dim=(1, 2, 3))
        loss = (each * weight(snr)).mean()
        grads = torch.autograd.grad(loss, params)
        shared.add(list(grads), lambda n: args.lr * rate(n, steps))
        sums = [sums[0] + each.mean().item(), sums[1] + loss.item()]
        count += 1


def save(unet, text, shared, scale, seconds):
    path = os.path.join(WORK, "unet.pt")
    torch.save({"unet": unet.state_dict(), "text": text.state_dict(), "scale": scale,
                "seconds": seconds, **shared.state()}, path + ".tmp")
    os.replace(path + ".tmp", path)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--steps", type=int, default=9000)
    ap.add_argument("--captions", type=int, default=8, help="captions a small batch")
    ap.add_argument("--micro", type=int, default=2, help="small batches an update")
    ap.add_argument("--repeats", type=int, default=4, help="timesteps a caption")
    ap.add_argument("--init", help="an earlier run's checkpoint: begin from its EMA at step 0")
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--save-minutes", type=float, default=4)
    args = ap.parse_args()
    torch.set_num_threads(1)
    unet, text = build()
    print(f"UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M, text encoder "
          f"{sum(p.numel() for p in text.parameters()) / 1e6:.2f} M", flush=True)
    data = torch.load(os.path.join(WORK, "latents.pt"), weights_only=True)
    old, path = None, os.path.join(WORK, "unet.pt")
    if os.path.exists(path):
        old = torch.load(path, weights_only=True)
        unet.load_state_dict(old["unet"])
        text.load_state_dict(old["text"])
    elif args.init:
        first = torch.load(args.init, weights_only=True)["ema"]
        for p, e in zip([*unet.parameters(), *text.parameters()], first):
            p.data.copy_(e)
    named = [*unet.named_parameters(), *text.named_parameters()]
    shared = workers.Shared([p for _, p in named], 0.998, args.micro,
                            matrices=workers.matrices(named, ("conv_in", "conv_out")))
    if old:
        shared.restore(old)
        print("resumed at step", old["step"], flush=True)
    trained, start = old["seconds"] if old else 0.0, time.time()
    workers.run(worker, shared, (unet, text, data, args, trained))
    save(unet, text, shared, data["scale"], trained + time.time() - start)


if __name__ == "__main__":
    main()
