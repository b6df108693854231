#!/bin/sh
# examples/sheet.sh [PROGRAM [FOLDER]] - pictures of the default model: a few prompts, then two LoRAs in
# one picture, joined in three ways.  Needs nothing but the built program; FOLDER (pictures) gets PNGs
# and index.html, which shows them side by side.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-$root/build/impasto}
out=${2:-$root/pictures}
loras=$root/models/loras
mkdir -p "$out/single"

{
    echo '<!doctype html><meta charset="utf-8"><title>Impasto</title>'
    echo '<style>body{font:16px sans-serif;margin:2em}figure{display:inline-block;margin:1em}'
    echo 'img{width:264px;image-rendering:pixelated}figcaption{width:264px}</style>'
} >"$out/index.html"

heading() { echo "<h2>$1</h2>" >>"$out/index.html"; }

make() { # make COUNT NAME CAPTION PROMPT [options]: pictures of seeds 1 to COUNT in one sheet NAME.png
    count=$1
    name=$2
    caption=$3
    prompt=$4
    shift 4
    echo "$caption"
    "$program" generate -q -p "$prompt" --sampler dpmpp_2m --steps 12 --cfg 5 --seed 1 --count "$count" -o "$out/single/$name.png" \
        --sheet "$out/$name.png" "$@" >/dev/null
    echo "<figure><img src=\"$name.png\"><figcaption>$caption</figcaption></figure>" >>"$out/index.html"
}

plain() { make 4 "$1" "$2" "$2"; }

heading "The default model"
plain apple "a red apple, noto style, on a blue background"
plain panda-and-rocket "a panda and a rocket, fluent 3d style"
plain bee-cat-bus "a bee above a cat and a bus, twemoji style, on a green background"

heading "Two LoRAs in one picture: a pineapple and a snowman that the model was never shown"
both="a zorp pineapple and a quib snowman, on a blue background"
for method in merge switch composite; do
    make 2 "two-$method" "$method: $both" "$both" --compose "$method" \
        --lora "$loras/pineapple.safetensors:1" --lora "$loras/snowman.safetensors:1"
done

heading "A concept and a style"
style="a zorp pineapple, fex style"
for method in merge switch composite; do
    make 2 "style-$method" "$method: $style" "$style" --compose "$method" \
        --lora "$loras/pineapple.safetensors:1" --lora "$loras/fxemoji.safetensors:0.6"
done

echo
echo "The pictures are in $out; open $out/index.html"
ls "$out"/*.png
