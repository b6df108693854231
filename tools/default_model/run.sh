#!/bin/sh
# run.sh smoke|full SECONDS OUT [more options of run.py] - trains everything on one CUDA GPU in SECONDS.
# Made to travel: pack.py puts it, the Python files and the drawings into one folder. The compiler's
# cache is kept in /tmp between calls on one machine; smoke leaves it in OUT/cache.tgz, and a cache.tgz
# beside this script is unpacked first.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=$3
mkdir -p "$out"
export IMPASTO_DM=${IMPASTO_DM:-/tmp/dm2work} IMPASTO_PACK=${IMPASTO_PACK:-$here/pack}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
cache=/tmp/dm2cache
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton
export TORCHINDUCTOR_FX_GRAPH_CACHE=1 TORCHINDUCTOR_AUTOGRAD_CACHE=1 TORCHINDUCTOR_COMPILE_THREADS=12
export TORCHINDUCTOR_FORCE_LAYOUT_OPT=1     # channels last, although some convolutions narrow
if [ -f "$here/cache.tgz" ] && [ ! -d $cache ]; then tar -xzf "$here/cache.tgz" -C /tmp; fi
mkdir -p $cache
python3 "$here/run.py" "$@" 2>&1 | tee "$out/log.txt"
if [ "$1" = smoke ]; then
    tar -czf /tmp/cache.tgz -C /tmp dm2cache && ls -l /tmp/cache.tgz
    if [ "$(stat -c %s /tmp/cache.tgz)" -lt 16700000 ]; then cp /tmp/cache.tgz "$out/cache.tgz"; fi
fi
