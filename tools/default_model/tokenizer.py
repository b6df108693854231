"""Stage 3: trains the small BPE vocabulary in CLIP's tokenizer format (vocab.json, merges.txt)."""
import collections
import json
import os
import re

from common import COLOURS, STYLES, WORK, concepts

VOCAB = 2000
CAPTION_WORDS = ("a an and on the left right middle next to in of above below , style background picture "
                 "emoji drawing with two three small big red green blue yellow white black").split()


def byte_alphabet():
    """CLIP's 256 printable stand-ins for bytes, in vocabulary order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(b) for b in shown]
    extra = 0
    for b in range(256):
        if b not in shown:
            shown.append(b)
            chars.append(chr(256 + extra))
            extra += 1
    return dict(zip(shown, chars))


def corpus():
    """Word -> weight: caption words above all, every emojibase label and tag once."""
    count = collections.Counter()

    def add(text, weight):
        for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
            count[word] += weight

    for c in concepts():
        add(c.words, 40)
    for words, _ in STYLES.values():
        add(words, 100)
    for word in [*COLOURS, *CAPTION_WORDS]:
        add(word, 100)
    path = os.path.join(WORK, "node_modules/emojibase-data/en/data.json")
    with open(path, encoding="utf-8") as f:
        for d in json.load(f):
            add(d["label"], 1)
            for tag in d.get("tags", []):
                add(tag, 1)
    return count


def train(count, alphabet, merges_wanted):
    words = {}
    for word, n in count.items():
        chars = [alphabet[b] for b in word.encode("utf-8")]
        chars[-1] += "</w>"
        words[tuple(chars)] = words.get(tuple(chars), 0) + n
    merges = []
    while len(merges) < merges_wanted:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        merged = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i:i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    return merges


def main():
    alphabet = byte_alphabet()
    merges = train(corpus(), alphabet, VOCAB - 512 - 2)
    tokens = [*alphabet.values(), *(c + "</w>" for c in alphabet.values())]
    tokens += ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    if len(set(tokens)) != VOCAB:
        raise SystemExit("two merges spell the same token")
    folder = os.path.join(WORK, "tokenizer")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump({t: i for i, t in enumerate(tokens)}, f, ensure_ascii=False)
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {k: {"content": v, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": k != "pad_token"}
               for k, v in (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"),
                            ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>"))}
    with open(os.path.join(folder, "special_tokens_map.json"), "w", encoding="utf-8") as f:
        json.dump(special, f, indent=1)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77,
                   "do_lower_case": True, "errors": "replace", "add_prefix_space": False,
                   "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                   "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, f, indent=1)
    print(VOCAB, "tokens,", len(merges), "merges")


if __name__ == "__main__":
    main()
