#!/usr/bin/env bash
# Trains a pair on SmolLM2 and measures extraction, explanation and joint training on a GPU, in ten minutes at most.
#
#   benchmarks/gpu.sh prepare FOLDER     with a network: the wheels that a machine with torch lacks, SmolLM2's among them,
#                                        in FOLDER/part-* with checksums; with this repository none is above 60 MiB
#   benchmarks/gpu.sh run FOLDER OUT     there, without one: OUT gets table.md, table.json, log.txt and the pair in parts
#   benchmarks/gpu.sh --dry-run OUT [FOLDER]
#                                        here, on a CPU: the same way with random models of a few blocks
#
# Every part has its own time and process. What it measured is in the table at once, and its failure is a line there.
set -euo pipefail

PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
MIB=$((1024 * 1024))

prepare() {
    local folder=$1 tree
    "$PYTHON" "$root/benchmarks/gpu.py" wheels >"$folder/wheels.txt"
    local platforms=() name
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    local download=("$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/wheels")
    "${download[@]}" --python-version 3.12 --implementation cp "${platforms[@]}" -r "$folder/wheels.txt"
    "${download[@]}" --require-hashes -r "$root/real.txt"
    tree=$(cd "$root" && git ls-files -coz --exclude-standard | du -cb --files0-from=- | tail -n 1 | cut -f 1)
    pack "$folder" $((60 * MIB - tree))
}

# FOLDER/wheels in parts of at most so many bytes.
pack() {
    local folder=$1 bytes=$2
    rm -f "$folder"/part-*
    tar -C "$folder/wheels" -cf - . | split -b "$bytes" -d - "$folder/part-"
    (cd "$folder" && sha256sum part-* >SHA256SUMS)
    ls -l "$folder"/part-*
}

# Of this machine: the wheels, and this repository as the package that it is when it is installed.
set_up() {
    if [ -n "$folder" ]; then
        (cd "$folder" && sha256sum --check --quiet SHA256SUMS) || return
        mkdir "$work/wheels" && cat "$folder"/part-* | tar -C "$work/wheels" -xf - || return
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
            --target "$work/site" "$work"/wheels/*.whl || return
    fi
    mkdir -p "$work/site" && cp -r "$root/nla" "$work/site/nla" || return
    cp -r "$root/train" "$work/site/nla/train" && cp -r "$root/eval" "$work/site/nla/eval"
}

say() { "$PYTHON" "$root/benchmarks/gpu.py" failed "$out" "$1" "$2"; }

# A part, with so many seconds at most; the last fifteen are for its start and end.
part() {
    local name=$1 limit=$(($2 * slack)) left=$((560 * slack - SECONDS)) code=0 begun=$SECONDS
    ((limit <= left)) || limit=$left
    ((limit > 15)) || { say "$name" "not begun: no time was left"; return; }
    timeout -k 5 "$limit" "$PYTHON" "$root/benchmarks/gpu.py" "$name" "$out" --seconds $((limit - 15)) --work "$work" $tiny || code=$?
    case $code in
        0) ;;
        124 | 137) say "$name" "killed after $((SECONDS - begun)) s of $limit" ;;
        *) say "$name" "ended with $code: see log.txt" ;;
    esac
}

measure() {
    export PYTHONPATH=$work/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    set_up || say setup "the wheels or the package could not be put in place: see log.txt"
    part machine 60
    part train 270
    part smollm2 55
    part qwen2-1.5b 65
    part qwen3-8b 95
    for stage in joint warmstart; do
        if [ -d "$work/pair/$stage/pair" ]; then # files that come back are small
            tar -C "$work/pair/$stage" -czf - pair | split -b $((15 * MIB)) -d - "$out/pair.tgz-"
            break
        fi
    done
}

case ${1:-} in
    prepare | pack)
        mkdir -p "${2:?FOLDER}/wheels"
        "$@"
        exit
        ;;
    run) folder=${2:?FOLDER} out=${3:?OUT} tiny="" slack=1 ;;
    --dry-run) folder=${3:-} out=${2:?OUT} tiny=--tiny slack=20 ;; # nothing is timed there
    *)
        sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
mkdir -p "$out" && out=$(cd "$out" && pwd)
rm -f "$out"/table.* "$out"/pair.tgz-*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
measure >"$out/log.txt" 2>&1
cat "$out/table.md"
! grep -q '"value": null' "$out/table.json"
