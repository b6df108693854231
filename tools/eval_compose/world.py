"""What the evaluation is about: concepts, families, triggers, and which drawings whose training may see.

A drawing is one concept in one style. The generator (models/eval/model and the adapters) has seen
    the model's objects in its five styles,        (tools/eval_model)
    the adapters' concepts in CONCEPT_STYLES,              (adapters.py)
    the model's objects in the two new styles      (adapters.py).
The judges train on none of these: see judge_data.py.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "eval_model"))
from common import (COLOURS, MODELS, ROOT, SEED, SIZE, STYLES, TRAIN_STYLES, WORK, Drawings,  # noqa: E402,F401
                    compose, concepts, draw_scene, ground, paste, threads, training_concepts)

EVAL = os.path.join(MODELS, "eval")

# concept of tools/eval_model/held_out.json -> (family, trigger): words that no caption holds
CONCEPTS = {
    "flamingo": ("animal", "vuk"), "hedgehog": ("animal", "drel"), "otter": ("animal", "wib"),
    "lobster": ("animal", "krom"), "giraffe": ("animal", "jand"), "sauropod": ("animal", "plux"),
    "pineapple": ("food", "zorp"), "taco": ("food", "mip"), "avocado": ("food", "gref"),
    "doughnut": ("food", "hub"),
    "tractor": ("vehicle", "tazz"), "helicopter": ("vehicle", "yol"), "sailboat": ("vehicle", "snef"),
}
# style -> words in prompts
NEW_STYLES = {"fxemoji": "fex style", "notov1": "nobb style"}
CONCEPT_STYLES = ("flat",)


def phrase(name):
    """The words that an adapter is bound to, without their article."""
    return f"{CONCEPTS[name][1]} {name}"


def by_words(name):
    return next(c for c in concepts() if c.words == name)
