#!/usr/bin/env python3
"""Writes the tokenizer and prompt fixtures of tests/data from the reference tokenizer.

    python tools/fixtures_tokenizer.py                        the committed fixtures
    python tools/fixtures_tokenizer.py --random 20000 F.json  many more cases, for
        IPT_TOKENIZER_CASES=F.json build/tests/test_tokenizer

Needs transformers (5.23 was used) with tokenizers; no network.  The reference is
transformers.CLIPTokenizer, loaded from folders that this script puts together in a temporary
place: CLIP's vocabulary derived from models/clip/merges.txt, and the 1,000-piece vocabulary in
tests/data/tok_tiny.  What the prompt language means is restated below from its grammar.
"""
import argparse
import json
import os
import random
import re
import shutil
import tempfile

import tokenizers
import transformers
from transformers import CLIPTokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(ROOT, "tests", "data")
TINY = os.path.join(DATA, "tok_tiny")
SOURCE = f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
START, END = "<|startoftext|>", "<|endoftext|>"

WORDS = """a photo of the cat dog Sunset don't we'll I'VE it's O'Reilly'S 1girl 2024 8k UHD
<|endoftext|> <|startoftext|> <|EndOfText|> <|STARTOFTEXT|> <cat-toy> dog Dog xx sks SKS <s1> <s2>
Ünï ünï ! !! ... --ar 16:9 naïve CAFÉ café cafe\u0301 İstanbul ΟΔΟΣ \u2126 ﬁ ½ ² 日本語 中文 한국어
\u1112\u1161\u11ab العربية עברית हिन्दी ไทย 😂 👨\u200d👩\u200d👧 ❤️ \u200b \ufeff \x01 \x7f ß ẞ ǅ
Å A\u030a \u212b \u1e9b\u0323 \u0958 \U0001d15e 🏳️\u200d🌈 ½sks a\u0315\u0300\u05ae\u0300b
supercalifragilisticexpialidocious""".split()
BLANKS = ["\t", "\n", "\x0b", "\x0c", "\r", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u202f", "\u205f", "\u3000", "\u200b", "  "]


def clip_folder(path):
    """CLIP's vocabulary from its merges, as the published folders hold it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    symbols = [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]
    with open(os.path.join(ROOT, "models", "clip", "merges.txt"), encoding="utf-8") as f:
        merges = f.read().split("\n")[1:-1]
    pieces = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    pieces += [START, END]
    assert len(set(pieces)) == 49408
    with open(os.path.join(path, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump({p: i for i, p in enumerate(pieces)}, f)
    with open(os.path.join(path, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "\n".join(merges) + "\n")


def flags(content, **kw):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False, **kw}


# special_tokens_map.json of the published SD 1.5 tokenizer
SD15_MAP = {"bos_token": flags(START), "eos_token": flags(END), "pad_token": END,
            "unk_token": flags(END)}
# tokenizer_config.json in the manner of SDXL's second tokenizer
XL2_CONFIG = {
    "added_tokens_decoder": {
        "@!": flags("!", normalized=False, special=True),
        "@" + START: flags(START, special=True),
        "@" + END: flags(END, special=True),
    },
    "bos_token": START, "eos_token": END, "pad_token": "!", "unk_token": END,
    "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
}
TI_CONFIG = {
    "added_tokens_decoder": {
        "@" + START: flags(START, normalized=False, special=True),
        "@" + END: flags(END, normalized=False, special=True),
        "1000": flags("<cat-toy>", special=False),
        "1001": flags("Dog", single_word=True, special=False),
        "1002": flags(" xx", normalized=False, lstrip=True, rstrip=True, special=False),
        "1003": flags("sks", normalized=False, single_word=True, rstrip=True, special=True),
    },
    "pad_token": END, "model_max_length": 1000000000000000019884624838656,
}


def with_ids(config, vocab):
    """Turns the keys "@piece" of an added_tokens_decoder into ids."""
    config = dict(config)
    config["added_tokens_decoder"] = {
        str(vocab[k[1:]]) if k[0] == "@" else k: v
        for k, v in config["added_tokens_decoder"].items()}
    return config


def make_folder(top, name, vocab_from, **files):
    path = os.path.join(top, name)
    os.makedirs(path)
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(os.path.join(vocab_from, f), path)
    for key, value in files.items():
        with open(os.path.join(path, key + ".json"), "w", encoding="utf-8") as f:
            json.dump(value, f)
    return path


def random_text(rnd):
    kind = rnd.random()
    if kind < 0.45:
        return "".join(rnd.choice(WORDS) + rnd.choice(["", " ", " ", rnd.choice(BLANKS)])
                       for _ in range(rnd.randint(0, 9)))
    if kind < 0.55:
        return "".join(rnd.choice("'stremvldSTRE <|>!.,abZ1é\u0301\u0323 ")
                       for _ in range(rnd.randint(0, 30)))
    if kind < 0.72:
        spans = [(1, 0x24f), (0x300, 0x36f), (0x370, 0xd7ff), (0xe000, 0xffff), (0x10000, 0x1ffff)]
        return "".join(chr(rnd.randint(*rnd.choice(spans))) for _ in range(rnd.randint(1, 14)))
    if kind < 0.84:
        spans = [(0x61, 0x7a), (0x41, 0x5a), (0x300, 0x36f), (0x591, 0x5c7), (0x900, 0xdff),
                 (0x1100, 0x11ff), (0xac00, 0xd7a3), (0x1dc0, 0x1dff), (0x1b00, 0x1b4f),
                 (0x11000, 0x115ff)]
        return "".join(chr(rnd.randint(*rnd.choice(spans))) for _ in range(rnd.randint(1, 14)))
    if kind < 0.88:
        return rnd.choice("abzé日🔥!") * rnd.randint(20, 120)
    if kind < 0.92:
        return "".join(chr(rnd.randint(97, 122)) for _ in range(rnd.randint(30, 150)))
    return "".join(chr(rnd.randint(1, 255)) for _ in range(rnd.randint(1, 40)))


def cases(tok, rnd, n, fixed=()):
    texts = list(fixed) + [random_text(rnd) for _ in range(n)]
    return [[t, ids] for t, ids in zip(texts, tok(texts, add_special_tokens=False).input_ids)]


def write(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=True, separators=(",", ":"))
        f.write("\n")
    print(path, os.path.getsize(path))


def info(tok):
    return [tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, tok.unk_token_id, len(tok)]


# --- the prompt language, restated ------------------------------------------------------------
class Emphasis:
    """One pass over the text; a run's weight changes when the bracket around it closes."""

    NUMBER = re.compile(r":\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)")
    PLAIN = re.compile(r"[^\\()\[\]:]+")
    BREAK = re.compile(r"\s*\bBREAK\b\s*")

    def __init__(self, text):
        self.runs = []
        self.open = {"(": [], "[": []}
        at = 0
        while at < len(text):
            at = self.step(text, at)
        for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):
            for start in self.open[kind]:
                self.scale(start, factor)
        self.runs = self.runs or [("", 1.0)]

    def scale(self, start, factor):
        self.runs[start:] = [(t, w * factor) for t, w in self.runs[start:]]

    def plain(self, text):
        first, *more = self.BREAK.split(text)
        self.runs.append((first, 1.0))
        for part in more:
            self.runs += [("BREAK", -1.0), (part, 1.0)]

    def step(self, text, at):
        c = text[at]
        if c == "\\":
            n = 1 + (text[at + 1:at + 2] in tuple("()[]\\"))
            self.runs.append((text[at + 1:at + n], 1.0))
            return at + n
        if c in "([":
            self.open[c].append(len(self.runs))
            return at + 1
        number = self.NUMBER.match(text, at)
        if number and self.open["("]:
            self.scale(self.open["("].pop(), float(number.group(1)))
            return number.end()
        if c == ")" and self.open["("]:
            self.scale(self.open["("].pop(), 1.1)
            return at + 1
        if c == "]" and self.open["["]:
            self.scale(self.open["["].pop(), 1 / 1.1)
            return at + 1
        run = number or self.PLAIN.match(text, at)
        end = run.end() if run else at + 1
        self.plain(text[at:end])
        return end

    def merged(self):
        out = []
        for text, weight in self.runs:
            if out and out[-1][1] == weight:
                out[-1] = (out[-1][0] + text, weight)
            else:
                out.append((text, weight))
        return out


def chunk_prompt(tok, text, embeddings, backtrack=20):
    """Rows of (content ids, weights, [(pos, embedding)]): 75 places each, a BREAK ends a row, and
    what follows a comma within the last `backtrack` places moves on when the row is full."""
    encode = lambda t: tok(t, add_special_tokens=False).input_ids
    comma = tok.convert_tokens_to_ids(",</w>")
    names = sorted(((encode(name), n, i) for i, (name, n) in enumerate(embeddings)),
                   key=lambda e: -len(e[0]))
    rows, row, last_comma = [], [], None  # a place is (id, weight, embedding or None)

    def close():
        nonlocal row, last_comma
        rows.append(row)
        row, last_comma = [], None

    for part, weight in Emphasis(text).merged():
        if (part, weight) == ("BREAK", -1.0):
            close()
            continue
        ids = encode(part)
        while ids:
            if ids[0] == comma:
                last_comma = len(row)
            elif len(row) == 75 and last_comma is not None and 75 - last_comma <= backtrack:
                row, rest = row[:last_comma + 1], row[last_comma + 1:]
                close()
                row = rest
            if len(row) == 75:
                close()
            hit = next((e for e in names if ids[:len(e[0])] == e[0]), None)
            if hit and len(row) + hit[1] > 75:
                close()
            row += [(0, weight, (hit[2], k)) for k in range(hit[1])] if hit else \
                [(ids[0], weight, None)]
            ids = ids[len(hit[0]) if hit else 1:]
    if row or not rows:
        close()
    return rows


PROMPTS = [
    "", "normal text", "an (important) word", "(unbalanced", "\\(literal\\]",
    "(unnecessary)(parens)", "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
    "closed) too ]early", "[(mixed] up)", "(a:1.2", "a:1.2)", "(a:1.2.3)", "(a:.)", "(a: +0.5 )",
    "(neg:-1)", "(x:-1)BREAK", "a BREAK b", "a BREAK", "BREAK", "BREAK BREAK b", "(a BREAK b:1.2)",
    "BREAKfast at BREAK, BREAK_", "\u3000BREAK\u3000x", "back\\slash \\\\ (\\(\\)) \\", "((((a))))",
    "[[[b]]]", "(cat:0)", "(日本:1.5) [😂]", "(a (b:2) c:3)", "::a::", "()[]", "a myemb b",
    "MYEMB two, myemb, my emb", "(zwx:1.5) " * 6, "a, " * 60,
    "word " * 70 + "one, two three four five six", "word " * 60 + ", " + "tail " * 30,
    "word " * 50 + ", " + "tail " * 40, "word " * 74 + "myemb", "word " * 73 + ", zwx zwx",
    "word " * 60 + ", zwx " + "tail " * 20, "w " * 75, "w " * 76, "w " * 150 + "BREAK x",
]
EMBEDDINGS = [["myemb", 3], ["myemb two", 8], ["zwx", 12]]


def prompt_cases(tok, rnd, n):
    fragments = ["(", ")", "[", "]", "\\", "\\(", "\\]", "\\\\", ":", ":1.2)", ": -0.5 )", ":0)",
                 "BREAK", " BREAK ", "cat", "a dog", ", ", " ", "日本", "myemb", ":1.23456789)"]
    texts = PROMPTS + ["".join(rnd.choice(fragments) for _ in range(rnd.randint(1, 14)))
                       for _ in range(n)]
    out = []
    for text in texts:
        for embeddings in ([], EMBEDDINGS):
            rows = chunk_prompt(tok, text, embeddings)
            ids = [[p[0] for p in row] for row in rows]
            spans = [[c, 1 + i, p[2][0]] for c, row in enumerate(rows)
                     for i, p in enumerate(row) if p[2] and p[2][1] == 0]
            if embeddings and not spans:
                continue
            out.append({"text": text, "embeddings": embeddings,
                        "parts": [list(p) for p in Emphasis(text).merged()], "ids": ids,
                        "weights": [[p[1] for p in row] for row in rows], "spans": spans})
    return out


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--random", nargs=2, metavar=("N", "FILE"))
    args = args.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as top:
        os.makedirs(os.path.join(top, "clip"))
        clip_folder(os.path.join(top, "clip"))
        with open(os.path.join(top, "clip", "vocab.json"), encoding="utf-8") as f:
            clip_vocab = json.load(f)
        with open(os.path.join(TINY, "vocab.json"), encoding="utf-8") as f:
            tiny_vocab = json.load(f)
        clip = CLIPTokenizer.from_pretrained(
            make_folder(top, "bare", os.path.join(top, "clip")))
        if args.random:
            rnd = random.Random(0)
            write(args.random[1], {"source": SOURCE, "clip": cases(clip, rnd, int(args.random[0]))})
            return
        rnd = random.Random(1)
        bang = CLIPTokenizer.from_pretrained(
            make_folder(top, "bang", os.path.join(top, "clip"),
                        special_tokens_map={"pad_token": "!"}))
        write(os.path.join(DATA, "tok_clip.json"),
              {"source": SOURCE, "clip": cases(clip, rnd, 500, WORDS),
               "clip_pad_bang": cases(bang, rnd, 100, ["hello!", "!!", "a ! b", "!</w>"])})
        write(os.path.join(DATA, "tok_prompts.json"),
              {"source": SOURCE + "; prompt language restated in tools/fixtures_tokenizer.py",
               "cases": prompt_cases(clip, rnd, 120)})
        variants = {
            "plain": {},
            "sd15": {"special_tokens_map": SD15_MAP},
            "xl2": {"tokenizer_config": with_ids(XL2_CONFIG, tiny_vocab),
                    "special_tokens_map": {"bos_token": END, "pad_token": END}},
            "inversions": {"tokenizer_config": with_ids(TI_CONFIG, tiny_vocab)},
            "added": {"tokenizer_config": {"model_max_length": 64},
                      "added_tokens": {"<s1>": 1000, "<s2>": 1001, "Ünï": 1002}},
            "own_specials": {"tokenizer_config": {"bos_token": "<s1>", "eos_token": "!",
                                                  "pad_token": "<s2>", "unk_token": "?"}},
        }
        out = []
        for name, files in variants.items():
            folder = make_folder(top, "v_" + name, TINY, **files)
            tok = CLIPTokenizer.from_pretrained(folder)
            out.append({"name": name, "info": info(tok), "files": {
                k: json.dumps(v) for k, v in files.items()}, "cases": cases(tok, rnd, 80, WORDS)})
            if name not in ("sd15", "inversions"):
                continue
            # the same from tokenizer.json alone, once with each form of merges
            saved = os.path.join(top, "saved_" + name)
            tok.save_pretrained(saved)
            with open(os.path.join(saved, "tokenizer.json"), encoding="utf-8") as f:
                value = json.load(f)
            if name == "sd15":
                merges = value["model"]["merges"]
                value["model"]["merges"] = [" ".join(m) for m in merges]
            alone = os.path.join(top, "alone_" + name)
            os.makedirs(alone)
            with open(os.path.join(alone, "tokenizer.json"), "w", encoding="utf-8") as f:
                json.dump(value, f)
            tok = CLIPTokenizer.from_pretrained(alone)
            out.append({"name": name + "_tokenizer_json", "info": info(tok),
                        "files": {"tokenizer": json.dumps(value)},
                        "cases": cases(tok, rnd, 40, WORDS)})
        write(os.path.join(DATA, "tok_variants.json"), {"source": SOURCE, "variants": out})


if __name__ == "__main__":
    main()
