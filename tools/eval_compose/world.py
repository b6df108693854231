"""What the evaluation is about: concepts, families, triggers, and which drawings whose training may see.

A drawing is one concept in one style. The generator (the default model and the adapters) has seen
    the default model's objects in its five styles,        (tools/default_model)
    the adapters' concepts in CONCEPT_STYLES,              (adapters.py)
    the default model's objects in the two new styles      (adapters.py).
The judges train on none of these: see judge_data.py.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
EVAL_PACK = os.path.abspath(os.environ.get(
    "IMPASTO_EVAL_PACK", os.path.join(os.environ.get("IMPASTO_DM", "dm"), "evalpack")))
os.environ.setdefault("IMPASTO_PACK", os.path.join(EVAL_PACK, "pack"))
# the recipe of the model that is adapted: drawings, scenes, networks
RECIPE = os.path.join(os.path.dirname(HERE), "default_model")
sys.path.insert(0, RECIPE)
from common import (COLOURS, MODELS, ROOT, SEED, SIZE, STYLES, TRAIN_STYLES, WORK,  # noqa: E402,F401
                    concepts, threads, training_concepts)

EVAL = os.path.join(MODELS, "eval")

# concept of tools/default_model/held_out.json -> (family, trigger): words that no caption holds
CONCEPTS = {
    "flamingo": ("animal", "vuk"), "hedgehog": ("animal", "drel"), "otter": ("animal", "wib"),
    "lobster": ("animal", "krom"), "giraffe": ("animal", "jand"),
    "pineapple": ("fruit", "zorp"), "avocado": ("fruit", "gref"), "pear": ("fruit", "dorv"),
    "melon": ("fruit", "quax"),
    "tractor": ("vehicle", "tazz"), "helicopter": ("vehicle", "yol"), "sailboat": ("vehicle", "snef"),
    "locomotive": ("vehicle", "blim"),
}
# style -> words in prompts
NEW_STYLES = {"fxemoji": "fex style", "notov1": "nobb style"}
CONCEPT_STYLES = ("flat",)

EXTRA = ("fluent colour", "openmoji", "emojione v1", "streamline")  # render_extra.py
STYLE_NAMES = list(STYLES)                                          # what a judge's style head tells apart
ALL_STYLES = STYLE_NAMES + list(EXTRA)
NAMES = list(CONCEPTS)
OTHER, NOTHING = len(NAMES), len(NAMES) + 1     # classes after the concepts
CLASSES = NOTHING + 1
# Which drawings of the adapters' concepts each judge trains on.
OWN = {1: ("noto", "notov1", "emojione v1", "fluent colour"),
       2: ("twemoji", "emojione", "fxemoji", "openmoji", "streamline", "3d")}


def phrase(name):
    """The words that an adapter is bound to, without their article."""
    return f"{CONCEPTS[name][1]} {name}"


def by_words(name):
    return next(c for c in concepts() if c.words == name)


def generator_saw(index, style):
    """Whether the default model or an adapter was trained on a drawing."""
    c = concepts()[index]
    if c.words in CONCEPTS:
        return style in CONCEPT_STYLES
    return c.core and not c.held and (style in TRAIN_STYLES or style in NEW_STYLES)


def trains(judge, index, style):
    """Whether a judge trains on a drawing."""
    if generator_saw(index, style):
        return False
    if concepts()[index].words in CONCEPTS:
        return style in OWN[judge]
    return (index * 7 + ALL_STYLES.index(style) * 3) % 3 != judge - 1
