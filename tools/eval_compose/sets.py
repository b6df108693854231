"""Writes models/eval/sets.json: which adapters are composed, with which prompts. Deterministic.

Half of the pairs are of one family (what merging mixes up), half of two; some have a style adapter too.
"""
import itertools
import json
import os

import numpy as np

from world import COLOURS, CONCEPT_STYLES, CONCEPTS, EVAL, NEW_STYLES, SEED, STYLES, phrase
from scenes import ground

GROUNDS = ("white", "light blue", "yellow", "pink", "grey", "purple", "blue")
COUNTS = {2: (10, 10), 3: (4, 4), 4: (2, 2)}  # objects -> sets of one family, of several
STYLED = 4                                     # pairs for each new style


def candidates(k, same, rng):
    """Sets of k concepts in an order that uses all of them about equally often."""
    every = [c for c in itertools.combinations(CONCEPTS, k)
             if (len({CONCEPTS[n][0] for n in c}) == 1) == same]
    rng.shuffle(every)
    used, out = dict.fromkeys(CONCEPTS, 0), []
    while every:
        best = min(range(len(every)), key=lambda i: sum(used[n] for n in every[i]))
        c = every.pop(best)
        for n in c:
            used[n] += 1
        out.append(tuple(rng.permutation(c)))
    return out


def described(names, same, style, rng):
    colour = str(GROUNDS[rng.integers(len(GROUNDS))])
    words = NEW_STYLES.get(style) or f"{STYLES[style][0]} style"
    things = [f"a {phrase(n)}" for n in names]
    end = f", {words}, {ground(colour)}"
    text = ", ".join(things[:-1]) + " and " + things[-1]
    return {"concepts": [str(n) for n in names], "same_family": same, "style": style,
            "style_adapter": style in NEW_STYLES, "background": colour, "rgb": list(COLOURS[colour]),
            "prompt": text + end, "single": [t + end for t in things]}


def interleaved(groups):
    """So that the first N sets are of all groups: each group evenly spread."""
    rows = [((i + 0.5) / len(g), n, s) for n, g in enumerate(groups) for i, s in enumerate(g)]
    return [s for _, _, s in sorted(rows, key=lambda r: r[:2])]


def main():
    rng, groups = np.random.default_rng(SEED + 3000), []
    for k, (n_same, n_other) in COUNTS.items():
        for same, n in ((True, n_same), (False, n_other)):
            chosen = candidates(k, same, rng)[:n]
            groups.append([described(c, same, CONCEPT_STYLES[0], rng) for c in chosen])
    for style in NEW_STYLES:
        half = STYLED // 2
        chosen = [(c, True) for c in candidates(2, True, rng)[:half]]
        chosen += [(c, False) for c in candidates(2, False, rng)[:STYLED - half]]
        groups.append([described(c, same, style, rng) for c, same in chosen])
    out = {"concepts": [{"name": n, "family": f, "word": phrase(n), "file": f"loras/{n}.safetensors"}
                        for n, (f, _) in CONCEPTS.items()],
           "styles": [{"name": s, "words": w, "file": f"loras/{s}.safetensors"} for s, w in NEW_STYLES.items()],
           "sets": interleaved(groups)}
    os.makedirs(EVAL, exist_ok=True)
    with open(os.path.join(EVAL, "sets.json"), "w", encoding="utf-8") as f:
        f.write(json.dumps(out, indent=1) + "\n")
    print(len(out["sets"]), "sets")


if __name__ == "__main__":
    main()
