#!/bin/bash
# run_gpu.sh SECONDS OUT - adapters, judges and all pictures of the full evaluation on one GPU machine.
# Made to travel: pack.py puts it beside everything it needs, but for the model, which is MODEL beside it or
# models/default one folder up. Leaves in OUT at most eight files below 16 MiB: log.txt, judge_1.pt, judge_2.pt,
# adapters.tgz (with sets.json) and pictures.tar.aa ... (join them again with cat). Each part has its own
# limit of time; one that fails leaves the others.
set -u
here=$(cd "$(dirname "$0")" && pwd)
total=$1 out=$(mkdir -p "$2" && cd "$2" && pwd) start=$(date +%s)
export IMPASTO_DM=/tmp/evalwork IMPASTO_EVAL_PACK=$here/evalpack IMPASTO_PACK=$here/evalpack/pack
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 XDG_CACHE_HOME=/tmp/cache TRITON_CACHE_DIR=/tmp/evalcache
world=$IMPASTO_DM/world pictures=$IMPASTO_DM/pictures
IMPASTO_MODEL=$here/model
[ -d "$IMPASTO_MODEL" ] || IMPASTO_MODEL=$(cd "$here/../models/default" && pwd)
export IMPASTO_MODEL
# shares of the time: when adapters and judges end (these while drawing has begun), and when drawing ends, 9
# seconds before all
adapters=$((total * ${ADAPTERS_PERCENT:-38} / 100)) judges=$((total * ${JUDGES_PERCENT:-60} / 100))
drawn=$((total - 9))
device=${DEVICE:-cuda} jobs=${JOBS:-8} sets=${SETS:-0}
seconds_left() { echo $((start + $1 - $(date +%s))); }
say() { echo "[$(($(date +%s) - start)) run] $*"; }
exec > >(tee -a "$out/log.txt") 2>&1
mkdir -p "$world/loras" "$pictures"
cp "$here/sets.json" "$world/"

loader() { # the Vulkan loader and the program's libraries, where the machine has none
    [ "$device" = cuda ] || return 0
    ldconfig -p | grep -q libX11.so.6 || for f in "$here"/debs/lib[xbm]*.deb; do dpkg -x "$f" /tmp/evalx; done
    ldconfig -p | grep -q libvulkan.so.1 || for f in "$here"/debs/lib[vego]*.deb; do dpkg -x "$f" /; done
    ldconfig
    export VK_DRIVER_FILES=/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json
    export VK_ICD_FILENAMES=$VK_DRIVER_FILES
    export __EGL_VENDOR_LIBRARY_FILENAMES=/usr/local/nvidia/share/glvnd/egl_vendor.d/10_nvidia.json
}
impasto() { # not for python, whose libraries are its own
    LD_LIBRARY_PATH=$here/lib:/tmp/evalx/usr/lib/x86_64-linux-gnu:/usr/local/nvidia/lib64:/usr/local/nvidia/lib \
        "$here/bin/impasto" "$@"
}
profile() { # on which frequencies an adapter acts: cmlora's order
    impasto lora profile "$world/loras/$1.safetensors" -p "$2" --seeds 2 -q >/dev/null
}
draw() { # SEEDS METHOD SHARD: pictures of the first SEEDS seeds that are not there yet
    local left=$(seconds_left "$drawn") extra=()
    [ "$left" -gt 1 ] || return 0
    [ "$sets" = 0 ] || extra=(--sets "$sets")
    timeout "$left" bash -c 'impasto "$@"' impasto eval compose --world "$world" -o "$pictures" --draw --seeds "$1" \
        --methods "$2" --shard "$3" "${extra[@]}" ${STEPS:+--steps "$STEPS"} -q </dev/null 2>&1 | tail -n 1 |
        sed "s|^|$1 $2 $3: |; s|\$|, $(($(date +%s) - start)) s|"
}
export -f impasto profile draw seconds_left
export here world pictures start drawn sets

train() {
    OMP_NUM_THREADS=2 timeout $((adapters + 25)) python3 "$here/eval_compose/adapters.py" --device "$device" --processes "$jobs" \
        --seconds "$adapters" --start "$start" --model "$IMPASTO_MODEL" --out "$world/loras" ${ADAPTER_ARGS:-} &
    local wanted=$!
    for n in 1 2; do
        timeout $((judges + 20)) python3 "$here/eval_compose/judge.py" $n --device "$device" \
            --seconds "$(seconds_left "$judges")" --out "$out" ${JUDGE_ARGS:-} &
    done
    loader
    # the driver compiles the shaders once, meanwhile
    impasto devices && impasto generate -p "a dog and a rocket" -o "$IMPASTO_DM/dog.png" -q && say "the program runs"
    wait $wanted
}

keep_what_is_there() { # sets.json without the concepts and styles whose adapters are missing
    python3 - "$world" <<'EOF'
import json, os, sys
path = os.path.join(sys.argv[1], "sets.json")
world = json.load(open(path))
for key in ("concepts", "styles"):
    world[key] = [a for a in world[key] if os.path.exists(os.path.join(sys.argv[1], a["file"]))]
names = {a["name"] for key in ("concepts", "styles") for a in world[key]}
sets = [s for s in world["sets"] if names.issuperset(s["concepts"]) and (not s["style_adapter"] or s["style"] in names)]
if len(sets) < len(world["sets"]):
    print(len(world["sets"]) - len(sets), "sets left out: an adapter is missing")
    world["sets"] = sets
    open(path, "w").write(json.dumps(world, indent=1) + "\n")
for a in world["concepts"]:
    print(a["name"], "a " + a["word"], sep="\t")
for a in world["styles"]:
    print(a["name"], "a dog, " + a["words"], sep="\t")
EOF
}

measure() {
    keep_what_is_there | tee "$IMPASTO_DM/adapters.txt" | grep 'left out'
    grep -P '\t' "$IMPASTO_DM/adapters.txt" | tr '\t' '\n' |
        timeout 25 xargs -r -P "$jobs" -d '\n' -n 2 bash -c 'profile "$@"' profile
    tar -C "$world" -czf "$out/adapters.tgz" .
}

timed() { # one set by each method with one process at a time: times that mean something
    [ "${TIMED:-8}" -gt 0 ] && timeout "${TIMED:-8}" bash -c 'impasto "$@"' impasto eval compose --world "$world" \
        -o "$IMPASTO_DM/timed" --draw --sets 1 --seeds 2 ${STEPS:+--steps "$STEPS"} -q \
        --methods "base,single,merge,switch,composite,cmlora,clora:refine=0;morph=dilate;overlap=argmax,lego" </dev/null
}

queue() { # seed by seed, so that whatever is drawn in time is complete; ablations for the first seeds
    local clora="clora:refine=0;morph=dilate;overlap=argmax" shard method
    for seeds in ${SEEDS:-1 2 3 4 5}; do
        for shard in 1/4 2/4 3/4 4/4; do echo "$seeds $clora $shard"; done
        for method in single merge composite cmlora switch lego base; do echo "$seeds $method 1/1"; done
        [ "$seeds" -le 2 ] || continue
        for method in "$clora;update=off" "clora:refine=0" "clora:refine=0;masks=full" clora; do
            for shard in 1/2 2/2; do echo "$seeds $method $shard"; done
        done
        for method in cmlora:order=given cmlora:order=reverse; do echo "$seeds $method 1/1"; done
    done
}

say "model $IMPASTO_MODEL, $total s"
train
say "adapters: $(ls "$world/loras" | wc -l)"
measure
timed
say "drawing until $drawn s"
queue | timeout $(($(seconds_left "$drawn") + 2)) xargs -P "$jobs" -L 1 bash -c 'draw "$@"' draw
say "$(find "$pictures" -name '*.json' | wc -l) pictures"
mkdir -p "$IMPASTO_DM/timed"
tar -C "$IMPASTO_DM" -cf - pictures timed | split -b 15000000 - "$out/pictures.tar."
ls -l "$out"
say "done"
