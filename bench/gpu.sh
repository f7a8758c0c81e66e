#!/usr/bin/env bash
# Run all tests and benchmarks that need a GPU, in at most 8 minutes: bash bench/gpu.sh --out DIR [--lengths FILE] [--small]
# Needs torch, triton, transformers, sentence-transformers, safetensors, tokenizers, pytest and pytest-benchmark, and
# matplotlib for plots; installs and downloads nothing. A step that fails does not stop the others; one that takes too
# long keeps its measurements so far. Writes one JSON file and one log per step, plots, and summary.md to DIR. --small
# runs every step on tiny shapes, also without a GPU.
set -uo pipefail

out=
lengths=()
small=()
kernels=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --lengths) lengths=(--lengths "$(realpath "$2")"); shift 2 ;;
        --small) small=(--small); shift ;;
        *) echo "gpu.sh: unknown argument $1; use --out DIR [--lengths FILE] [--small]" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "gpu.sh: --out is missing; use --out DIR" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
tests=(tests/test_kernel_*.py tests/test_ops.py)
mapfile -t families < <(grep -lE 'def test_.*(cuda\)|gpu)' tests/test_family_*.py tests/test_integration_transformers.py)
if [ ${#small[@]} -gt 0 ]; then
    tests=(tests/test_kernel_qk_norm.py)
    families=(tests/test_family_xlm_roberta.py)
    kernels=(-k "swiglu or rms_norm")
fi
unset "${!PYTEST_@}" # those of a pytest-xdist worker that runs this script would change the runs below
export PYTHONPATH=engine:kernels:tests PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

failed=0
patience=1 # factor of every time limit, larger for --small on a busy CPU
[ ${#small[@]} -gt 0 ] && patience=10
end=$((patience * 445)) # seconds from the start; the rest of the 8 minutes is for the summary
step() { # step NAME SECONDS COMMAND...: run a command, interrupted after SECONDS or at $end
    local name=$1 limit=$((patience * $2)) start=$SECONDS left=$((end - SECONDS)) status
    shift 2
    echo "== $name"
    timeout -s INT -k 10 $((limit < left ? limit : left > 1 ? left : 1)) "$@" >"$out/$name.log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "   done in $((SECONDS - start)) s"
    else
        echo "   FAILED with $status after $((SECONDS - start)) s:"
        failed=1
    fi
    grep -v '^{' "$out/$name.log" | tail -n 15 | cut -c1-200 | sed 's/^/   /'
}
# The project's own suite turns warnings into errors; other versions of libraries may warn here.
test=(python -m pytest -q -W default -p no:cacheprovider)

# One process per file, since compiling takes longer than testing.
each='printf "%s\n" "$@" | xargs -P 12 -n 1 '"${test[*]}"
step ceilings 30 python bench/ceilings.py --out "$out/ceilings.json"
step kernels-correct 100 bash -c "$each" - "${tests[@]}"
step model-correct 70 "${test[@]}" -m gpu tests/test_cuda*.py tests/test_float8.py
step model 120 python bench/model.py "${small[@]}" "${lengths[@]}" --out "$out/model.json"
step throughput 60 python bench/throughput.py --rounds 2 "${small[@]}" "${lengths[@]}" --out "$out/throughput.json"
step kernels 80 "${test[@]}" bench/ops.py "${kernels[@]}" --benchmark-json "$out/kernels.json"
step families-correct 60 bash -c "$each -k 'gpu or cuda or captured'" - "${families[@]}"
end=$((patience * 480))
step summary 30 python bench/report.py "$out" --page "$out/summary.md"
exit $failed
