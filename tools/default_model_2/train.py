"""Trains UNet and text encoder jointly (v prediction) on a pool of encoded scenes."""
import math
import os
import time

import torch

from common import SEED, WORK
from nets import Text, Unet, Vae, alphas_cumprod, started
from optim import Clock, Optimizer, awaited, compiled, laid_out, mixed, saved, tuned
from scenes import Words
from vae import load_plan, source

REPEATS = 2     # timesteps a caption


def rate(p, warm=0.02):
    """Factor of the learning rate after the share p of the time: warm-up, cosine to zero."""
    return min(1.0, (p + 1e-4) / warm) * 0.5 * (1 + math.cos(math.pi * p))


def build(device):
    torch.manual_seed(SEED + 2)
    unet, text = started(Unet(), Text())
    return laid_out(unet, device), text.to(device)


def timesteps(n, device):
    """Stratified, the noisier ones oftener."""
    return (((torch.randperm(n, device=device) + torch.rand(n, device=device)) / n) ** 0.7
            * 1000).long().clamp_(0, 999)


def weight(snr):
    """Weight of the v error: less where noise is faint and nothing is left to decide."""
    return (5 / snr).clamp(max=1.0)


def noised(x0, noise, a2):
    """(noisy latents, v) at alphas_cumprod a2 [n].

    The network predicts v = a eps - s x0. With eps as its target the noisiest steps, where text
    decides everything, hardly learn: there an eps error of 0.006 is as large an error of the picture
    as the picture itself, and the network has to hand its input through to better than that.
    """
    a2 = a2.view(-1, 1, 1, 1)
    a, s = a2.sqrt(), (1 - a2).sqrt()
    return a * x0 + s * noise, a * noise - s * x0


def loss_of(unet, text, device):
    alphas = alphas_cumprod(device)

    def f(z, noise, t, ids):
        """z [n], noise and t [REPEATS n], ids [n,77]; (weighted v error, plain)."""
        a2 = alphas[t]
        x, v = noised(z.float().repeat_interleave(REPEATS, 0), noise, a2)
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            cond = text(ids).repeat_interleave(REPEATS, 0)
            guess = unet(x, t, cond).float()
        each = (guess - v).square().mean(dim=(1, 2, 3))
        return (each * weight(a2 / (1 - a2))).mean(), each.mean().detach()
    return f


@torch.no_grad()
def pool_of(pictures, vae, scale, encode, device, end, batch, log):
    """Scaled latents [n,4,32,32] of as many scenes as can be encoded until `end`."""
    out, start, total = [], time.time(), len(pictures)
    for i in range(0, total - batch + 1, batch):
        mean, logvar = encode(pictures.at(torch.arange(i, i + batch, device=device)))
        z = mean.float() + torch.exp(0.5 * logvar.float()) * torch.randn(mean.shape, device=device)
        out.append((scale * z).half().contiguous())
        if i // batch % 8 == 7:
            if device != "cpu":
                torch.cuda.synchronize()
            if time.time() > end and i:
                break
    z = torch.cat(out)
    log(f"{len(z)} of {total} scenes encoded in {time.time() - start:.1f} s, "
        f"deviation {float(z.float().std()):.3f}")
    return z


def keep(unet, text, opt, scale, log, start, publish):
    """The EMA, to the work folder and to the results."""
    named = [("unet." + n, p) for n, p in unet.named_parameters()]
    named += [("text." + n, p) for n, p in text.named_parameters()]
    state = {n: e.cpu() for n, e in opt.averaged(named).items()}
    saved({"ema": state, "scale": scale, "step": opt.count}, os.path.join(WORK, "unet.pt"))
    publish(state, scale)
    log(f"saved step {opt.count} after {time.time() - start:.0f} s")


def main(args, log, publish):
    """Role of run.py: from vae.pt's arrival to args.unet_end."""
    device, n = args.device, args.unet_batch // REPEATS
    tuned(device)
    unet, text = build(device)
    log(f"UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M, text encoder "
        f"{sum(p.numel() for p in text.parameters()) / 1e6:.2f} M, batch {args.unet_batch}")
    z = torch.zeros(n, 4, 32, 32, device=device, dtype=torch.float16)
    noise = torch.zeros(REPEATS * n, 4, 32, 32, device=device)
    step = compiled(loss_of(unet, text, device),
                    (z, noise, torch.arange(REPEATS * n, device=device) % 1000,
                     torch.zeros(n, 77, dtype=torch.long, device=device)), log, args.eager)
    for p in [*unet.parameters(), *text.parameters()]:
        p.grad = None
    vae = laid_out(Vae(), device).requires_grad_(False)

    def encode(x):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            return vae.encode(x)

    open(os.path.join(WORK, "unet.ready"), "w").close()
    awaited(os.path.join(WORK, "vae.pt"))
    state = torch.load(os.path.join(WORK, "vae.pt"), weights_only=True)
    vae.load_state_dict(state["vae"])
    pictures = source(device)
    scale = state["scale"]
    torch.manual_seed(SEED + 3)
    pool = pool_of(pictures, vae, scale, encode, device, time.time() + args.pool_seconds,
                   args.pool_batch, log)
    ids = torch.from_numpy(load_plan().ids[:len(pool)]).to(device).long()
    empty = torch.tensor(Words().ids(""), device=device)
    open(os.path.join(WORK, "pool.done"), "w").close()
    named = [("unet." + k, p) for k, p in unet.named_parameters()]
    named += [("text." + k, p) for k, p in text.named_parameters()]
    opt = Optimizer(named, args.muon_rate, args.adam_rate, 0.998, 1e-2,
                    ("unet.conv_in", "unet.conv_out"))
    clock, sums, last, last_save = Clock(args.unet_end), torch.zeros(2, device=device), 0, time.time()
    while opt.count < args.least or clock.passed() < 1:
        take = torch.randint(len(pool), (n,), device=device)
        words = torch.where(torch.rand(n, 1, device=device) < 0.1, empty, ids[take])
        loss, plain = step(pool[take], torch.randn_like(noise), timesteps(REPEATS * n, device), words)
        loss.backward()
        opt.step(rate(clock.passed()))
        sums += torch.stack([loss.detach(), plain])
        if opt.count % args.log_every == 0 or opt.count == args.least:
            a, b = (sums / (opt.count - last)).tolist()
            passed = time.time() - clock.start
            log(f"step {opt.count} weighted {a:.4f} v mse {b:.4f} rate {rate(clock.passed()):.3f} "
                f"{passed:.0f} s {opt.count * REPEATS * n / passed:.0f} samples/s")
            sums.zero_()
            last = opt.count
        if time.time() - last_save > 60:
            keep(unet, text, opt, scale, log, clock.start, publish)
            last_save = time.time()
    log(f"{opt.count} steps of {REPEATS * n} in {time.time() - clock.start:.0f} s")
    keep(unet, text, opt, scale, log, clock.start, publish)
    open(os.path.join(WORK, "unet.done"), "w").close()
