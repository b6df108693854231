"""Regions: masks bound to prompts and to adapters, all of them in one evaluation of a diffusers UNet.

Cross-attention sees several texts, each by its share of a place; what an adapter adds to a layer is
multiplied by how much of the adapter there is at that place. Texts are encoded without adapters.
"""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass
class Change:
    """What an adapter adds to a layer: weight and bias, as differences of the layer's own, in double.

    by_input: the place is that of the cell which goes in (a matrix of its own), else of the cell that
    comes out (two thin matrices, whose inner cells lie where the result does).
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    by_input: bool = False


@dataclasses.dataclass
class Seen:
    """A text in cross-attention: [2, tokens, width], its share [H, W], the adapters that made its keys."""

    context: torch.Tensor
    share: torch.Tensor
    adapters: list


def shares(masks, size):
    """Masks [H, W] to what each has of a place; in front, what they leave over. Together 1."""
    if not masks:
        return torch.ones(1, *size)
    m = torch.stack(masks)
    total = m.sum(0, keepdim=True)
    return torch.cat([(1 - total).clamp(min=0), m / total.clamp(min=1)])


def bound(regions, n):
    """The place of each of n adapters: the largest of its masks; None: everywhere."""
    out = []
    for k in range(n):
        mine = [mask for mask, what in regions if not torch.is_tensor(what) and what == k]
        place = torch.stack(mine).amax(0) if mine else None
        out.append(None if place is None or (place == 1).all() else place)
    return out


class Regions:
    """Stands in a UNet's layers for the time of a with.

    regions: (mask [H, W], what): an encoded text [2, tokens, width], or the number of an adapter.
    context: the prompt's own. adapters: {module: Change} of each. factor: pixels of a latent's cell.
    """

    def __init__(self, unet, factor, context, regions, adapters):
        self.unet, self.adapters = unet, adapters
        size = tuple(regions[0][0].shape)
        self.places = bound(regions, len(adapters))
        free = [k for k, place in enumerate(self.places) if place is None]
        groups = []
        for k, place in enumerate(self.places):
            same = [g for g in groups if place is not None and torch.equal(g[0], place)]
            if same:
                same[0][1].append(k)
            elif place is not None:
                groups.append((place, [k]))
        texts = [(mask, what) for mask, what in regions if torch.is_tensor(what)]
        of_texts = shares([mask for mask, _ in texts], size)
        of_groups = shares([mask for mask, _ in groups], size)
        self.seen = [Seen(text, a * b, free + members)
                     for a, text in zip(of_texts, [context] + [what for _, what in texts])
                     for b, members in zip(of_groups, [[]] + [members for _, members in groups])
                     if (a * b).any()]
        self.free, self.factor, self.undo = free, factor, contextlib.ExitStack()
        self.levels = len(unet.config.block_out_channels)

    # --- a mask on a layer's grid ---

    def grid(self, mask, level):
        """The mean of each cell's pixels; the last ones of an odd size are halves."""
        step = self.factor << level
        return F.avg_pool2d(mask[None, None], step, ceil_mode=True)

    def level_of(self, like):
        for level in range(self.levels):
            g = self.grid(self.seen[0].share, level)
            if g.numel() == like.shape[1] if like.ndim == 3 else g.shape[2:] == like.shape[2:]:
                return level
        raise ValueError(f"no level is of shape {tuple(like.shape)}")

    def lying(self, mask, like):
        """A mask as a factor of values [N, C, H, W], [N, cells, C] or [N, C]."""
        if like.ndim == 2:
            return mask.mean()
        g = self.grid(mask, self.level_of(like))
        return g if like.ndim == 4 else g.flatten()[:, None]

    def enlarged(self, mask, like):
        """Of an upsampler's convolution: the cells are those before they are enlarged."""
        g = self.grid(mask, self.level_of(like) + 1)
        return F.interpolate(g, size=like.shape[2:], mode="nearest")

    # --- layers ---

    def act(self, name, change, place):
        """A hook that adds an adapter's part to what the module gives."""
        upsampler = ".upsamplers." in name

        def hook(module, inputs, out):
            x = inputs[0]
            here = self.lying(place, out)
            if change.weight is not None:
                w = change.weight.float()
                if change.by_input:
                    x = x * (self.enlarged(place, x) if upsampler else self.lying(place, x))
                d = product(module, x, w)
                out = out + (d if change.by_input else d * here)
            if change.bias is not None:
                b = change.bias.float()
                out = out + here * (b if out.ndim < 4 else b[:, None, None])
            return out

        return hook

    def __enter__(self):
        for name, module in self.unet.named_modules():
            changes = [(k, a[name]) for k, a in enumerate(self.adapters) if name in a]
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                continue
            if name.endswith("attn2"):
                self.undo.callback(module.set_processor, module.processor)
                module.set_processor(Look(self, name))
            for k, change in changes:
                if k in self.free:
                    self.add(module, change)
                else:
                    hook = module.register_forward_hook(self.act(name, change, self.places[k]))
                    self.undo.callback(hook.remove)
        return self

    def add(self, module, change):
        for key in ("weight", "bias"):
            delta, p = getattr(change, key), getattr(module, key)
            if delta is not None:
                self.undo.callback(setattr, p, "data", p.data)
                p.data = (p.data.double() + delta).float()

    def __exit__(self, *_):
        self.undo.close()

    def projection(self, name, layer, adapters):
        """Weight and bias of a layer of tokens under some of the adapters."""
        w, b = layer.weight.double(), None if layer.bias is None else layer.bias.double()
        for change in (self.adapters[k][name] for k in adapters if name in self.adapters[k]):
            w = w if change.weight is None else w + change.weight
            b = b if change.bias is None else change.bias + (0 if b is None else b)
        return w.float(), None if b is None else b.float()


class Look:
    """Processor of a cross-attention that sees every text, each by its share of the cell."""

    def __init__(self, regions, name):
        self.regions, self.name = regions, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        r = self.regions

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        out = 0
        for text in r.seen:
            k, v = (heads(F.linear(text.context, *r.projection(f"{self.name}.{end}", layer, text.adapters)))
                    for end, layer in (("to_k", attn.to_k), ("to_v", attn.to_v)))
            p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
            said = (p @ v).transpose(1, 2).flatten(2)
            out = out + said * r.lying(text.share, said)
        return attn.to_out[0](out)


def product(module, x, w):
    """The module's own kind of product, with another weight and without a bias."""
    if isinstance(module, torch.nn.Conv2d):
        return F.conv2d(x, w, None, module.stride, module.padding)
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps) * w[:, None, None]
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps) * w
    return F.linear(x, w)
