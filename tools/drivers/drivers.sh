#!/bin/sh
# The program under several versions of Mesa's lavapipe, without installing any of them.
#
#   sh tools/drivers/drivers.sh get FOLDER SUITE...          unpacks lavapipe of these Debian suites
#   sh tools/drivers/drivers.sh run FOLDER SUITE COMMAND...  runs a command under one; suite "here": as installed
#   sh tools/drivers/drivers.sh bench FOLDER IMPASTO         benches under all in turns, with ratios to "here"
#
# SUITE is bookworm-backports, trixie, forky, sid ... of DEBIAN (default http://deb.debian.org/debian).  A
# command runs with the suite's own C library and loader, other libraries come from here where the suite's
# driver does not bring them.  bench: ROUNDS (default 3) in turns of BENCHES (default: gemm; conv; unet -W 256
# -H 256; vae -W 256 -H 256); the least time of each row counts, since other work on the machine only makes
# rows slower.
set -eu
DEBIAN=${DEBIAN:-http://deb.debian.org/debian}
KEYS=${KEYS:-/usr/share/keyrings/debian-archive-keyring.gpg}
ROUNDS=${ROUNDS:-3}
BENCHES=${BENCHES:-gemm; conv; unet -W 256 -H 256; vae -W 256 -H 256}

get() { # FOLDER SUITE
    root=$1/$2
    mkdir -p "$root/apt/lists/partial" "$root/apt/archives/partial" "$root/fs"
    : >"$root/apt/status"
    base=${2%-backports}
    {
        echo "deb [signed-by=$KEYS] $DEBIAN $base main"
        [ "$base" = "$2" ] || echo "deb [signed-by=$KEYS] $DEBIAN $2 main"
    } >"$root/apt/sources.list"
    set -- "$root" "$2" -o "Dir::State=$root/apt" -o "Dir::State::status=$root/apt/status" -o "Dir::Cache=$root/apt" \
        -o "Dir::Etc::sourcelist=$root/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o APT::Install-Recommends=false -o APT::Sandbox::User=root
    root=$1 suite=$2
    shift 2
    apt-get "$@" -qq update
    apt-get "$@" -qq -y -t "$suite" --download-only install mesa-vulkan-drivers libvulkan1
    for deb in "$root"/apt/archives/*.deb; do
        dpkg -x "$deb" "$root/fs"
    done
    json=$(find "$root/fs/usr/share/vulkan/icd.d" -name 'lvp_icd*.json')
    driver=$(find "$root/fs" -name libvulkan_lvp.so)
    sed "s#\"library_path\": *\"[^\"]*\"#\"library_path\": \"$driver\"#" "$json" >"$root/lvp.json"
    rm -r "$root/apt"
    echo "$suite: $driver"
}

run() { # FOLDER SUITE COMMAND...
    root=$1/$2 suite=$2
    shift 2
    if [ "$suite" = here ]; then
        "$@"
        return
    fi
    libs=$root/fs/usr/lib/x86_64-linux-gnu:$root/fs/lib/x86_64-linux-gnu
    loader=$(find "$root/fs" -name 'ld-linux-x86-64.so.2' | head -n 1)
    program=$(command -v "$1")
    shift
    VK_DRIVER_FILES=$root/lvp.json VK_ICD_FILENAMES=$root/lvp.json XDG_CACHE_HOME=$root/cache \
        MESA_SHADER_CACHE_DIR=$root/cache "$loader" \
        --library-path "$libs:/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu" "$program" "$@"
}

# Lines "name<tab>milliseconds" of a bench's JSON: of each row, "ms" follows "name".
rows() {
    sed -n -e 's/^ *"name": "\(.*\)",$/\1/;t keep' -e 's/^ *"ms": \([0-9.e+-]*\),*$/\1/;t show' -e d \
        -e ':keep' -e 'h;d' -e ':show' -e 'G;s/^\(.*\)\n\(.*\)$/\2\t\1/p'
}

bench() { # FOLDER IMPASTO
    folder=$1 program=$2
    out=$(mktemp -d)
    suites=$(cd "$folder" && ls -d ./*/lvp.json | sed 's#^\./##; s#/lvp.json##')
    for round in $(seq "$ROUNDS"); do
        for suite in here $suites; do
            echo "$BENCHES" | tr ';' '\n' | while read -r what; do
                echo "round $round, $suite: $what" >&2
                # shellcheck disable=SC2086
                run "$folder" "$suite" "$program" bench $what --repeat 3 --json -q </dev/null | rows >>"$out/$suite"
            done
        done
    done
    for suite in $suites; do
        echo "$suite, times of \"here\":"
        awk -F '\t' 'FNR == 1 { file++ }
            { if (!((file, $1) in least) || $2 < least[file, $1]) least[file, $1] = $2; if (file == 2 && !seen[$1]++) name[++n] = $1 }
            END { for (i = 1; i <= n; i++) printf "  %-64s %9.1f ms  %9.1f ms  %5.2f\n", name[i], least[1, name[i]],
                  least[2, name[i]], least[2, name[i]] / least[1, name[i]] }' "$out/here" "$out/$suite"
    done
    rm -r "$out"
}

what=${1:-}
[ $# -gt 1 ] && shift
case $what in
get)
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
    for suite; do get "$folder" "$suite"; done
    ;;
run | bench)
    folder=$(cd "$1" && pwd)
    shift
    "$what" "$folder" "$@"
    ;;
*)
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 64
    ;;
esac
