#!/bin/sh
# examples/sheet.sh [PROGRAM [FOLDER]] - pictures of the default model: a few prompts, then two LoRAs in
# one picture, joined in three ways.  Needs nothing but the built program (build/impasto).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-$root/build/impasto}
out=${2:-$root/pictures}
loras=$root/models/loras
mkdir -p "$out"

make() { # make NAME PROMPT [options]: four pictures, seeds 1 to 4, as one sheet NAME.png
    name=$1
    prompt=$2
    shift 2
    mkdir -p "$out/single"
    echo "$name: $prompt"
    "$program" generate -q -p "$prompt" --seed 1 --count 4 -o "$out/single/$name.png" \
        --sheet "$out/$name.png" "$@" >/dev/null
}

make apple "a red apple, noto style, on a blue background"
make dog-and-rocket "a dog and a rocket"
make cat "a cat, twemoji style, on a green background"
