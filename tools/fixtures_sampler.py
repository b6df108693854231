#!/usr/bin/env python3
"""Writes tests/data/sampler_golden.h: trajectories of the diffusers schedulers on a toy model.

    python3 tools/fixtures_sampler.py > tests/data/sampler_golden.h
    python3 tools/fixtures_sampler.py --randn > tests/data/sampler_randn.h

Needs torch, numpy, diffusers, scipy, torchsde (versions are written into the file).
The toy model is evaluated in double and rounded to f32, so that both sides see the same numbers.
Every case lists: sampler, schedule, configuration as KEY=VALUE pairs, steps, skipped steps, then
timesteps of all evaluations, one probed value after every evaluation, the first 8 final values.
What diffusers does not have (dpmpp_3m_sde, simple, sgm_uniform, beta, ays of other than 10 steps)
comes from the formulas written out below, in numpy and scipy.
"""
import math
import sys
import warnings

import diffusers
import numpy as np
import scipy
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

CLASSES = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "dpm_2": "KDPM2DiscreteScheduler", "dpm_2_a": "KDPM2AncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler", "dpmpp_sde": "DPMSolverSDEScheduler",
    "dpm_single": "DPMSolverSinglestepScheduler", "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler", "deis": "DEISMultistepScheduler", "lcm": "LCMScheduler",
    "tcd": "TCDScheduler", "ddpm": "DDPMScheduler", "ddim_inverse": "DDIMInverseScheduler",
    "ipndm": "IPNDMScheduler", "edm_euler": "EDMEulerScheduler", "sa": "SASolverScheduler",
}
ORDER2 = {"heun", "dpm_2", "dpm_2_a", "dpmpp_sde"}
SHAPE = (1, 4, 2, 2)
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
          timestep_spacing="leading", clip_sample=False, set_alpha_to_one=False,
          skip_prk_steps=True)


def toy(x, t):
    x, t = x.double(), float(t)
    m = 0.8 * x * t / (abs(t) + 1) + 0.1 * torch.sin(4 * x) + 0.05 * math.cos(t / 200)
    return m.float()


def accepted(cls, config):
    import inspect
    names = set(inspect.signature(cls.__init__).parameters)
    return {k: v for k, v in config.items() if k in names}


def build(sampler, schedule, config):
    config = dict(config)
    eta = config.pop("eta", None)
    if sampler == "dpmpp_2m_sde":
        config.setdefault("algorithm_type", "sde-dpmsolver++")
    config.update({"karras": {"use_karras_sigmas": True},
                   "exponential": {"use_exponential_sigmas": True},
                   "trailing": {"timestep_spacing": "trailing"},
                   "normal": {"timestep_spacing": "linspace"}}.get(schedule, {}))
    cls = getattr(diffusers, CLASSES[sampler])
    if "disable_corrector" in config:
        config["disable_corrector"] = [i for i in range(64) if config["disable_corrector"] >> i & 1]
    return cls(**accepted(cls, config)), eta


class Brownian:
    """The noise of DPMSolverSDE as increments of one path: fresh normals for each half."""

    def __init__(self, generator):
        self.generator, self.first = generator, None

    def __call__(self, sigma, sigma_next):
        z = torch.randn(SHAPE, generator=self.generator)
        if self.first is None:
            self.first = (z, abs(sigma_next - sigma))
            return z
        (z1, d1), self.first = self.first, None
        span = abs(sigma_next - sigma)
        return (z1 * d1.sqrt() + z * (span - d1).sqrt()) / span.sqrt()


def foreign(table, schedule, steps, sdxl):
    """Sigmas and timesteps of ComfyUI's simple, sgm_uniform, beta, and the AYS interpolation."""
    T, logs = len(table), np.log(table.astype(np.float64))
    if schedule == "simple":
        t = np.array([T - 1 - int(i * (T / steps)) for i in range(steps)], dtype=float)
        return table[t.astype(int)].astype(float), t
    if schedule == "sgm_uniform":
        t = np.linspace(T - 1, 0, steps + 1)[:-1]
        return np.exp(np.interp(t, np.arange(T), logs)), t
    if schedule == "beta":  # comfy/samplers.py beta_scheduler
        t = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
                    * (T - 1))
        t = np.array([x for i, x in enumerate(t) if i == 0 or x != t[i - 1]])
        return table[t.astype(int)].astype(float), t
    levels = {False: [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177,
                      1.3943805092, 0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662,
                      0.0291671582],
              True: [14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945,
                     0.8620721141, 0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177,
                     0.0291671582]}[sdxl]
    at = np.linspace(0, 1, steps + 1)
    s = np.exp(np.interp(at, np.linspace(0, 1, 11), np.log(levels)))[:-1]
    return s, np.interp(np.log(s), logs, np.arange(T))


def place(sched, sampler, sigmas, timesteps):
    """Makes a scheduler run on these levels, ending at zero."""
    if sampler == "euler":
        sched.set_timesteps(sigmas=list(sigmas) + [0.0])
        sched.timesteps = torch.tensor(timesteps, dtype=torch.float32)
    elif sampler in ("heun", "dpmpp_2m", "dpmpp_2m_sde", "dpm_single", "ddpm", "lcm", "tcd"):
        whole = [int(t) for t in timesteps]
        sched.set_timesteps(timesteps=whole)
    else:  # classes that take no list: lms, euler_a, unipc
        sched.set_timesteps(len(timesteps))
        sched.sigmas = torch.tensor(list(sigmas) + [0.0], dtype=torch.float32)
        sched.timesteps = torch.tensor(timesteps, dtype=torch.float32)


def run_diffusers(sampler, schedule, config, steps, skip):
    sched, eta = build(sampler, schedule, config)
    if schedule == "ays" and steps == 10:
        xl = "XL" if config.get("ays_sdxl") else ""
        name = "StableDiffusion%sTimesteps" % xl
        sched.set_timesteps(timesteps=AysSchedules[name])
    elif schedule in ("simple", "sgm_uniform", "beta", "ays"):
        a = sched.alphas_cumprod
        table = (((1 - a) / a) ** 0.5).numpy()
        s, t = foreign(table, schedule, steps, bool(config.get("ays_sdxl")))
        place(sched, sampler, s, t)
    else:
        sched.set_timesteps(steps)
    begin = skip * getattr(sched, "order", 1)
    ts = sched.timesteps[begin:]
    if hasattr(sched, "set_begin_index"):
        sched.set_begin_index(begin)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    if skip:
        noise = torch.randn(SHAPE, generator=generator)
        x = sched.add_noise(x, noise, ts[:1].repeat(1))
    elif sampler not in ("ddim_inverse",):
        x = x * sched.init_noise_sigma
    if sampler == "dpmpp_sde":
        sched.noise_sampler = Brownian(generator)
    kw = {}
    import inspect
    if "generator" in inspect.signature(sched.step).parameters:
        kw["generator"] = generator
    if eta is not None:
        kw["eta"] = eta
    probes = []
    for t in ts:
        xin = sched.scale_model_input(x, t) if hasattr(sched, "scale_model_input") else x
        x = sched.step(toy(xin, t), t, x, **kw).prev_sample.float()
        probes.append(x.flatten()[7].item())
    return [float(t) for t in ts], probes, x.flatten().tolist()


def run_3m_sde(schedule, config, steps, skip):
    """k-diffusion's rule in its own frame, on the timesteps of DPMSolverMultistep."""
    sched, _ = build("dpmpp_2m_sde", schedule, config)
    sched.set_timesteps(steps)
    sig = sched.sigmas.double()
    ts = sched.timesteps[skip:]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator).double()
    if skip:
        noise = torch.randn(SHAPE, generator=generator)
        x = sched.add_noise(x.float(), noise, ts[:1]).double()
    d1 = d2 = h1 = h2 = None
    probes = []
    for i, t in enumerate(ts):
        s, nxt = sig[skip + i], sig[skip + i + 1]
        a = 1 / (s * s + 1).sqrt()
        m = toy(x.float(), t).double()
        v = config.get("prediction_type") == "v_prediction"
        den = a * x - s * a * m if v else (x - s * a * m) / a
        y = x / a
        if nxt == 0:
            y = den
        else:
            h = s.log() - nxt.log()
            he = 2 * h
            y = torch.exp(-he) * y + (-he).expm1().neg() * den
            p2 = (-he).expm1() / he + 1
            if h2 is not None:
                r0, r1 = h1 / h, h2 / h
                e0, e1 = (den - d1) / r0, (d1 - d2) / r1
                y = y + p2 * (e0 + (e0 - e1) * r0 / (r0 + r1)) \
                    - (p2 / he - 0.5) * (e0 - e1) / (r0 + r1)
            elif h1 is not None:
                y = y + p2 * (den - d1) / (h1 / h)
            z = torch.randn(SHAPE, generator=generator).double()
            y = y + z * nxt * (-2 * h).expm1().neg().sqrt()
            h1, h2 = h, h1
        d1, d2 = den, d1
        x = (y / (nxt * nxt + 1).sqrt()).float().double()
        probes.append(x.flatten()[7].item())
    return [float(t) for t in ts], probes, x.flatten().tolist()


def cases():
    sd = SD
    v, smp = dict(prediction_type="v_prediction"), dict(prediction_type="sample")
    lin, trail = dict(timestep_spacing="linspace"), dict(timestep_spacing="trailing")
    zero = dict(rescale_betas_zero_snr=True, **v, **trail)
    cosine = dict(beta_schedule="squaredcos_cap_v2")
    fmin = dict(final_sigmas_type="sigma_min")

    def add(names, *configs, schedule="default", steps=20, skip=0):
        for name in names.split():
            for c in configs:
                yield name, schedule, {**sd, **c}, steps, skip

    k = "euler heun dpm_2 lms"
    vp = "dpmpp_2m dpm_single unipc deis"
    every = k + " " + vp + " ddim pndm"
    stochastic = "euler_a dpm_2_a dpmpp_2m_sde dpmpp_3m_sde dpmpp_sde ddpm lcm tcd sa"
    yield from add(every + " ddim_inverse " + stochastic, {}, v)
    yield from add("ddim euler heun lms dpmpp_2m dpm_single unipc deis ddpm lcm tcd", smp)
    yield from add(every.replace("dpm_single ", "") + " euler_a dpm_2_a dpmpp_2m_sde ddpm", lin)
    yield from add(every.replace("dpm_single ", "") + " euler_a dpmpp_sde sa", {},
                   schedule="trailing", steps=7)
    for how, more in (("karras", {}), ("exponential", {}), ("default", {"use_beta_sigmas": True})):
        yield from add(k + " " + vp + " dpm_2_a dpmpp_2m_sde dpmpp_sde dpmpp_3m_sde sa", more,
                       schedule=how)
        yield from add("euler heun lms dpmpp_2m unipc", {**v, **lin, **more}, schedule=how)
    yield from add("euler dpmpp_2m unipc deis", {**lin, "use_karras_sigmas": True})
    yield from add("ddim euler euler_a dpmpp_2m unipc ddpm lcm tcd", zero)
    yield from add("ddim euler dpmpp_2m unipc lms", cosine, {**cosine, "use_karras_sigmas": True})
    # fewer than 15 steps use lower final orders; odd and tiny counts
    yield from add(every + " dpmpp_2m_sde dpmpp_3m_sde sa", {}, steps=10)
    yield from add(every + " " + stochastic, {}, steps=2)
    yield from add(every + " " + stochastic, {}, steps=1)
    yield from add("euler heun dpmpp_2m unipc", {}, schedule="karras", steps=1)
    yield from add("dpmpp_2m unipc deis ddim euler", {}, steps=50)
    # options of single classes
    three, one = dict(solver_order=3), dict(solver_order=1)
    old = dict(algorithm_type="dpmsolver", **fmin)
    yield from add("dpmpp_2m unipc deis dpm_single", three, one, {**three, "steps": 0})
    yield from add("dpmpp_2m unipc dpm_single", fmin, {**fmin, **three}, {**fmin, **v})
    yield from add("dpmpp_2m unipc deis dpm_single", three, steps=10)
    yield from add("dpmpp_2m dpm_single", old, {**old, **three}, {**old, "solver_type": "heun"},
                   {"solver_type": "heun"}, {**three, "solver_type": "heun"},
                   {**old, **v}, {**old, **smp}, {**old, **three, "solver_type": "heun"})
    yield from add("dpmpp_2m", dict(euler_at_final=True), dict(lower_order_final=False, **fmin),
                   dict(use_lu_lambdas=True), dict(use_lu_lambdas=True, **v),
                   {**cosine, "lambda_min_clipped": -5.1}, dict(thresholding=True))
    yield from add("dpmpp_2m_sde", three, {"solver_type": "heun"}, v, fmin,
                   {**fmin, "algorithm_type": "sde-dpmsolver"},
                   {**fmin, "algorithm_type": "sde-dpmsolver", "solver_type": "heun"})
    sde = dict(algorithm_type="sde-dpmsolver++")
    yield from add("dpm_single", sde, {**sde, **three}, {**sde, "solver_type": "heun"})
    # the third order amplifies f32 rounding from step to step: a short run
    yield from add("dpm_single", {**sde, **three, "solver_type": "heun"}, steps=8)
    yield from add("unipc", dict(solver_type="bh1", **fmin), dict(predict_x0=False, **fmin),
                   dict(predict_x0=False, solver_order=3, **v, **fmin),
                   dict(disable_corrector=5), dict(thresholding=True))
    yield from add("pndm", dict(skip_prk_steps=False), dict(skip_prk_steps=False, **v), dict(
        set_alpha_to_one=True))
    yield from add("ddim", dict(clip_sample=True), dict(thresholding=True, sample_max_value=1.5),
                   dict(eta=0.5), dict(eta=1.0, **v), dict(set_alpha_to_one=True))
    yield from add("ddpm", dict(clip_sample=True), dict(variance_type="fixed_large"))
    yield from add("heun", dict(clip_sample=True, clip_sample_range=2.0), {
        "beta_schedule": "exp"})
    yield from add("euler", fmin, dict(interpolation_type="log_linear"),
                   dict(timestep_type="continuous", **v), dict(sigma_min=0.1, sigma_max=9.0,
                                                                use_karras_sigmas=True))
    yield from add("lcm", dict(original_inference_steps=100), dict(timestep_scaling=5.0), steps=4)
    yield from add("tcd", dict(eta=0.0), dict(eta=0.7), steps=4)
    yield from add("sa", dict(predictor_order=3, corrector_order=3), dict(predictor_order=1))
    yield from add("ipndm edm_euler", {})
    yield from add("edm_euler", v, dict(sigma_schedule="exponential"))
    # image to image
    yield from add(every + " " + stochastic, {}, skip=8)
    yield from add(every, v, skip=5, steps=10)
    # the other schedules
    for sdxl in (False, True):
        yield from add("euler dpmpp_2m", dict(ays_sdxl=sdxl), schedule="ays", steps=10)
        yield from add("euler", dict(ays_sdxl=sdxl), schedule="ays", steps=20)
    yield from add("euler heun lms euler_a dpmpp_2m dpmpp_2m_sde unipc ddpm lcm tcd", {},
                   schedule="beta")
    yield from add("euler dpmpp_2m", v, schedule="beta", steps=7, skip=2)
    yield from add("euler", {}, schedule="simple")
    yield from add("euler", v, schedule="sgm_uniform", steps=13)
    yield from add("euler", {}, schedule="sgm_uniform")


def text(v):
    if isinstance(v, bool):
        return "true" if v else "false"
    return repr(v) if not isinstance(v, str) else v


def numbers(values):
    out = []
    for x in values:
        s = "%.9g" % np.float32(x)
        out.append((s if ("." in s or "e" in s) else s + ".") + "f")
    return ",".join(out)


def randn():
    print("/* Generated by tools/fixtures_sampler.py --randn with torch %s: manual_seed(seed), then"
          % torch.__version__.split("+")[0])
    print(" * randn(n) for each n; first and last (backwards) three values of the final call. */")
    for seed in (0, 42, 2**32 + 7, 123456789012):
        for ns in ([1], [2], [7], [15], [16], [17], [100], [768], [16384], [3, 5, 1], [1, 16, 1],
                   [17, 2, 100]):
            torch.manual_seed(seed)
            for n in ns:
                v = torch.randn(n).tolist()
            print("{%dULL, {%s}, {%s}, {%s}}," % (seed, ", ".join(map(str, ns)), numbers(v[:3]),
                                                  numbers(v[::-1][:3])))


def main():
    print("/* Generated by tools/fixtures_sampler.py: diffusers %s, torch %s, numpy %s, scipy %s."
          % (diffusers.__version__, torch.__version__.split("+")[0], np.__version__,
             scipy.__version__))
    print(" * Data only; include after golden_case is declared. */")
    rows, seen = [], set()
    for sampler, schedule, config, steps, skip in cases():
        config = {k: v for k, v in config.items() if k != "steps"}
        key = (sampler, schedule, tuple(sorted(config.items())), steps, skip)
        if key in seen:
            continue
        seen.add(key)
        try:
            if sampler == "dpmpp_3m_sde":
                ts, probes, final = run_3m_sde(schedule, config, steps, skip)
            else:
                ts, probes, final = run_diffusers(sampler, schedule, config, steps, skip)
        except Exception as e:
            print("skipped", sampler, schedule, steps, skip, config, repr(e)[:200], file=sys.stderr)
            continue
        if not np.isfinite(final).all():
            print("not finite", sampler, schedule, steps, skip, config, file=sys.stderr)
            continue
        diff = {k: v for k, v in config.items() if SD.get(k) != v}
        i = len(rows)
        print("static const float g%d[] = {%s};" % (
            i, numbers(ts + probes + final[:8])))
        rows.append('    {"%s", "%s", "%s", %d, %d, %d, g%d},' % (
            sampler, schedule, " ".join("%s=%s" % (k, text(x)) for k, x in diff.items()), steps,
            skip, len(ts), i))
    print("static const golden_case golden_cases[] = {")
    print("\n".join(rows))
    print("};")


if __name__ == "__main__":
    randn() if "--randn" in sys.argv else main()
