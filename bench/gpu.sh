#!/usr/bin/env bash
# Everything a GPU can prove, in one command: bash bench/gpu.sh --out DIR
# Needs torch, triton, transformers, safetensors, tokenizers, pytest and pytest-benchmark; nothing is downloaded or installed.
# A step that fails says so and the others run; DIR gets one JSON a step, a log a step, and summary.md.
set -uo pipefail

out=
lengths=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --lengths) lengths=(--lengths "$2"); shift 2 ;;
        *) echo "gpu.sh: unknown argument $1; use --out DIR [--lengths FILE]" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "gpu.sh: give --out DIR" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=engine:kernels:tests PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

failed=0
step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        echo "   done in $((SECONDS - start)) s"
    else
        echo "   FAILED with $? after $((SECONDS - start)) s:"
        failed=1
    fi
    tail -n 15 "$out/$name.log" | cut -c1-200 | sed 's/^/   /'
}

step ceilings 60 python bench/ceilings.py --out "$out/ceilings.json"
# compiling takes longer than testing: a process a file
step kernels-correct 240 bash -c "printf '%s\n' tests/test_kernel_*.py | xargs -P 8 -n 1 python -m pytest -q -p no:cacheprovider"
step model-correct 60 python -m pytest -q -p no:cacheprovider tests/test_cuda.py
step kernels 120 python -m pytest -q -p no:cacheprovider bench/kernels.py --benchmark-json "$out/kernels.json"
step model 180 python bench/model.py --rounds 3 "${lengths[@]}" --out "$out/model.json"
step summary 20 python bench/report.py "$out" --write "$out/summary.md"
exit $failed
