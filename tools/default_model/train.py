"""Trains UNet and text encoder jointly (v prediction) on a pool of encoded scenes."""
import math
import os
import time

import torch

import fast
from common import HERE, SEED, WORK
from nets import Text, Unet, Vae, alphas_cumprod, started
from optim import Clock, Optimizer, awaited, laid_out, mixed, saved, tuned
from scenes import Words
from vae import load_plan, source

REPEATS = 2     # timesteps a caption


def rate(p, warm=0.02):
    """Factor of the learning rate after the share p of the time: warm-up, cosine to zero."""
    return min(1.0, (p + 1e-4) / warm) * 0.5 * (1 + math.cos(math.pi * p))


def build(device, log=print):
    """Fresh networks, or those of an earlier call, where its files lie beside this one."""
    torch.manual_seed(SEED + 2)
    unet, text = started(Unet(), Text())
    paths = [os.path.join(HERE, f"denoiser-{i}.safetensors") for i in (1, 2)]
    if all(os.path.exists(path) for path in paths):
        from safetensors.torch import load_file
        state = {k: v.float() for path in paths for k, v in load_file(path).items()}
        for name, module in (("unet.", unet), ("text.", text)):
            module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
        log("goes on from an earlier call")
    return laid_out(unet, device), text.to(device)


def timesteps(n, device):
    """Stratified, the noisier ones oftener; a caption's REPEATS are far apart."""
    order = torch.arange(n, device=device).view(REPEATS, -1).t().reshape(-1) if n % REPEATS == 0 else (
        torch.arange(n, device=device))
    return (((order + torch.rand(n, device=device)) / n) ** 0.7 * 1000).long().clamp_(0, 999)


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
        # weights in bfloat16 need no autocast, which would run the layer norms in f32
        with torch.autocast(device, torch.bfloat16, enabled=mixed(device) and not fast.usable):
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


def keep(named, opt, scale, log, start, publish):
    """The EMA, to the work folder and to the results."""
    state = {n: e.cpu() for n, e in opt.averaged(named).items()}
    saved({"ema": state, "scale": scale, "step": opt.count}, os.path.join(WORK, "unet.pt"))
    publish(state, scale)
    log(f"saved step {opt.count} after {time.time() - start:.0f} s")


def stepper(unet, text, pool, ids, empty, n, device, log, record=True):
    """(step, sums, whether gradients stay in place): step() leaves the gradients of a random batch.

    sums [3] adds up both losses and a count.
    """
    halves = [fast.Half(unet), fast.Half(text, torch.float32)] if fast.usable else []
    loss_at = loss_of(*([h.low for h in halves] or (unet, text)), device)
    sums, one = torch.zeros(3, device=device), torch.ones((), device=device)

    def step():
        for h in halves:
            h.refresh()
        take = torch.randint(len(pool), (n,), device=device)
        words = torch.where(torch.rand(n, 1, device=device) < 0.1, empty, ids[take])
        noise = torch.randn(REPEATS * n, 4, 32, 32, device=device)
        loss, plain = loss_at(pool[take], noise, timesteps(REPEATS * n, device), words)
        loss.backward()
        for h in halves:
            h.hand_back()
        sums.add_(torch.stack([loss.detach(), plain, one]))

    return fast.recorded(step, log, device) if halves and record else step, sums, bool(halves)


def begun(args, log, pool, ids, empty, n):
    """(named parameters, networks, optimizer, step, sums) after the first steps.

    The fastest way whose loss is a number: recorded, not recorded, plain autocast.
    """
    device = args.device
    for record in (True, False, None):
        fast.usable = fast.usable and record is not None
        unet, text = build(device, log)
        step, sums, in_place = stepper(unet, text, pool, ids, empty, n, device, log, bool(record))
        named = [("unet." + k, p) for k, p in unet.named_parameters()]
        named += [("text." + k, p) for k, p in text.named_parameters()]
        opt = Optimizer(named, args.muon_rate, args.adam_rate, 0.998, 1e-2, ("unet.conv_in", "unet.conv_out"))
        opt.clears = not in_place
        sums.zero_()
        while opt.count < args.least:
            step()
            opt.step(rate(0))
        a, b, k = sums.tolist()
        log(f"first steps: weighted {a / k:.4f} v mse {b / k:.4f}")
        if math.isfinite(a):
            break
    sums.zero_()
    return named, (unet, text), opt, step, sums


def main(args, log, publish):
    """Role of run.py: from vae.pt's arrival to args.unet_end."""
    device, n = args.device, args.unet_batch // REPEATS
    tuned(device)
    vae = laid_out(Vae(), device).requires_grad_(False)
    fast.checked(device, log)

    def encode(x):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed(device)):
            return vae.encode(x)

    awaited(os.path.join(WORK, "vae.pt"))
    awaited(os.path.join(WORK, "plan.npz"))
    state = torch.load(os.path.join(WORK, "vae.pt"), weights_only=True)
    vae.load_state_dict(state["vae"])
    pictures = source(device)
    scale = state["scale"]
    torch.manual_seed(SEED + 3)
    pool = pool_of(pictures, vae, scale, encode, device, time.time() + args.pool_seconds,
                   args.pool_batch, log)
    ids = torch.from_numpy(load_plan().ids[:len(pool)]).to(device).long()
    empty = torch.tensor(Words().ids(""), device=device)
    del pictures
    open(os.path.join(WORK, "pool.done"), "w").close()
    named, (unet, text), opt, step, sums = begun(args, log, pool, ids, empty, n)
    log(f"UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M, text encoder "
        f"{sum(p.numel() for p in text.parameters()) / 1e6:.2f} M, batch {args.unet_batch}")
    clock, last_save, least = Clock(args.unet_end), time.time(), opt.count
    while clock.passed() < 1:
        step()
        opt.step(rate(clock.passed()))
        if opt.count % args.log_every == 0:
            a, b, k = sums.tolist()
            passed = time.time() - clock.start
            log(f"step {opt.count} weighted {a / k:.4f} v mse {b / k:.4f} rate {rate(clock.passed()):.3f} "
                f"{passed:.0f} s {(opt.count - least) * REPEATS * n / passed:.0f} samples/s")
            sums.zero_()
        if time.time() - last_save > 60:
            keep(named, opt, scale, log, clock.start, publish)
            last_save = time.time()
    log(f"{opt.count} steps of {REPEATS * n} in {time.time() - clock.start:.0f} s")
    keep(named, opt, scale, log, clock.start, publish)
    open(os.path.join(WORK, "unet.done"), "w").close()
