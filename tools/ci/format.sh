#!/bin/sh
# tools/ci/format.sh [--check] [FILE...] - formats C and GLSL files (all of git's, when none is
# named) with .clang-format; --check changes nothing, prints the differences and fails if any.
#
# clang-format knows no GLSL.  Two constructs would be torn apart, so they are dressed as C while the
# file is formatted, in the same number of columns: "[[unroll]] for (" and a push constant block.
set -eu
cd "$(dirname "$0")/../.."
check=0
if [ "${1:-}" = --check ]; then
    check=1
    shift
fi
if [ $# -eq 0 ]; then
    set -- $(git ls-files --cached --others --exclude-standard -- '*.c' '*.h' '*.comp' '*.glsl' ':!tests/data')
fi
tmp=$(mktemp)
trap 'rm -f "$tmp"' EXIT
bad=0
# A heading "/* --- x ------ */" that passes column 100 loses dashes, else it would be wrapped.
rule=':a;/^.{101,}$/s,^(/\* --- .*-)-( \*/)$,\1\2,;ta'
for file in "$@"; do
    case "$file" in
    *.comp | *.glsl)
        sed -E -e "$rule" -e 's/\[\[unroll\]\] for \(/ipt_unroll_for (/' \
            -e 's/^layout\(push_constant\) uniform /struct PUSHED______________________ /' "$file" |
            clang-format --assume-filename=shader.c |
            sed -e 's/ipt_unroll_for (/[[unroll]] for (/' \
                -e 's/^struct PUSHED______________________ /layout(push_constant) uniform /' >"$tmp"
        ;;
    *) sed -E -e "$rule" "$file" | clang-format --assume-filename="$file" >"$tmp" ;;
    esac
    cmp -s "$file" "$tmp" && continue
    bad=$((bad + 1))
    if [ $check -eq 1 ]; then
        diff -u --label "$file" --label "$file (formatted)" "$file" "$tmp" || true
    else
        cat "$tmp" >"$file"
        echo "formatted $file"
    fi
done
if [ $check -eq 1 ] && [ $bad -ne 0 ]; then
    echo "format: $bad file(s) differ; run tools/ci/format.sh" >&2
    exit 1
fi
