#!/usr/bin/env bash
# Run all tests and benchmarks that need a GPU, in at most 9 minutes: bash bench/gpu.sh --out DIR [--lengths FILE] [--small]
# Needs torch, triton, transformers, sentence-transformers, safetensors, tokenizers, pytest and pytest-benchmark; uses
# pytest-xdist, matplotlib and compute-sanitizer where they are installed; installs and downloads nothing.
#
# The steps run in the order of their importance. One that fails does not stop the others, except that the model is not
# timed if an operation it needs is wrong; one that takes too long keeps its measurements so far. DIR gets at most 7
# files, also if the run is interrupted: summary.md, results.tar.gz with all results and logs, and the JSON files of the
# main steps. The last output is a summary of at most 40 lines. --small runs every step on tiny shapes, also without a GPU.
set -uo pipefail

out=
lengths=()
small=()
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
shopt -s nullglob
kernel_tests=(tests/test_kernel_*.py tests/test_ops.py)
engine_tests=(tests/test_cuda.py tests/test_gpu*.py)
mapfile -t family_tests < <(grep -lE 'def test_.*(cuda\)|gpu)' tests/test_family_*.py tests/test_integration_transformers.py)
matmuls="(linear or attention)" kernels="not linear and not attention" workers=14
patience=1 # factor of every time limit, larger for --small on a busy CPU
if [ ${#small[@]} -gt 0 ]; then
    kernel_tests=(tests/test_kernel_rms_norm.py)
    engine_tests=(tests/test_cuda_memory.py) family_tests=(tests/test_cuda_memory.py) # skipped without a GPU
    matmuls="linear and swiglu and not 333" kernels=rms_norm workers=0
    patience=10
fi
unset "${!PYTEST_@}" # those of a pytest-xdist worker that runs this script would change the runs below
export PYTHONPATH=$PWD/engine:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

failed=0
end=$((patience * 500)) # seconds from the start; the rest of the 9 minutes is for the summary
work=$(mktemp -d)

save() { # copy the results so far to $out
    local file
    for file in "$work"/{headline,matmuls,kernels,model,throughput}.json; do [ ! -e "$file" ] || cp "$file" "$out"; done
    tar -czf "$work.tar.gz" -C "$work" . && mv "$work.tar.gz" "$out/results.tar.gz"
}

finish() {
    local status=$? running measured=("$work"/matmuls.json* "$work"/kernels.json*)
    trap - EXIT
    trap '' INT TERM
    if [ $status -ne 0 ]; then
        running=$(jobs -p)
        [ -z "$running" ] || kill -INT "$running" # timeout passes it on and kills what is left after 10 seconds
        wait
        echo "interrupted $status 0" >>"$work/steps.txt"
        failed=1
    fi
    timeout -k 5 30 python3 bench/report.py "$work" --page "$work/report.md" >"$work/report.log" 2>&1 || failed=1
    timeout -k 5 30 python3 bench/model_of_time.py --measured "${measured[@]}" >"$work/predictions.log" 2>&1
    timeout -k 5 30 python3 bench/gpu_summary.py "$work" >"$work/summary.txt" 2>&1 || failed=1
    { echo '```'; cat "$work/summary.txt"; echo '```'; cat "$work/report.md"; } >"$out/summary.md" 2>>"$work/report.log"
    save
    cat "$work/summary.txt"
    rm -rf "$work"
    exit $failed
}
trap finish EXIT
trap 'exit 130' INT TERM

step() { # step NAME SECONDS COMMAND...: run a command, interrupted after SECONDS or at $end
    local name=$1 limit=$((patience * $2)) start=$SECONDS left=$((end - SECONDS)) status
    shift 2
    if [ $left -lt 5 ]; then skip "$name"; return 1; fi
    echo "== $name"
    # in the background, since bash runs a trap during `wait`, but only after a command in the foreground
    timeout -s INT -k 10 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1 &
    wait $!
    status=$?
    echo "$name $status $((SECONDS - start))" >>"$work/steps.txt"
    if [ $status -eq 0 ]; then
        echo "   done in $((SECONDS - start)) s"
    else
        echo "   FAILED with $status after $((SECONDS - start)) s:"
        failed=1
    fi
    grep -v '^{' "$work/$name.log" | tail -n 15 | cut -c1-200 | sed 's/^/   /'
    save
    return $status
}

skip() { # skip NAME...
    local name
    for name in "$@"; do
        echo "== $name: skipped"
        echo "$name skipped 0" >>"$work/steps.txt"
    done
}

# The project's own suite turns warnings into errors; other versions of libraries may warn here.
pytest=(python3 -m pytest -q -W default -p no:cacheprovider)
python3 -c 'import xdist' 2>/dev/null && xdist=1 || xdist=

tests() { # tests NAME SECONDS WORKERS OPTION EXPRESSION FILE...: -k or -m EXPRESSION selects
    local name=$1 limit=$2 count=$((workers < $3 ? workers : $3)) select=("$4" "$5")
    shift 5
    if [ -n "$xdist" ]; then
        OMP_NUM_THREADS=1 step "$name" "$limit" "${pytest[@]}" "${select[@]}" -n $count --dist worksteal "$@"
    else
        # one process per file, since compiling takes longer than testing; xargs runs at least one
        step "$name" "$limit" bash -c 'files=$1; shift; tr " " "\n" <<<"$files" | xargs -P '$((count ? count : 1))' -n 1 "$@"' - "$*" "${pytest[@]}" "${select[@]}"
    fi
}

sanitize() { # run the first operation that is wrong under compute-sanitizer
    local dtype name
    IFS='|' read -r name dtype < <(sed -nE 's/^  (.*), (b?float(16|32)), .*: FAILED.*/\1|\2/p' "$work/smoke.log")
    command -v compute-sanitizer >/dev/null && [ -n "$name" ] || return 0
    step sanitizer 60 compute-sanitizer --target-processes all python3 bench/smoke.py --limit 50 --dtype "$dtype" --only "$name"
}

step smoke 60 python3 bench/smoke.py --out "$work/smoke.json"
smoke=$?
wrong=()
for choice in library triton; do # a choice of kernels that is wrong is not timed; it may hang
    if grep -q ", unpadded, $choice: FAILED" "$work/smoke.log"; then
        wrong+=(--without "$choice")
        matmuls+=" and not $choice"
    fi
done
# an interrupted run has no exit code of its own
if [ $smoke -eq 1 ] || { [ $smoke -gt 2 ] && grep -q ", unpadded: FAILED" "$work/smoke.log"; }; then
    model=
    sanitize
else
    model=1
fi
step ceilings 20 python3 bench/ceilings.py "${small[@]}" --out "$work/ceilings.json"
if [ -n "$model" ]; then
    step headline 85 python3 bench/model.py --part headline "${wrong[@]}" "${small[@]}" --out "$work/headline.json"
else
    skip headline
fi
# ops.py checks every kernel before it times it
step matmuls 70 "${pytest[@]}" bench/ops.py -k "$matmuls and not torch.compile" --benchmark-json "$work/matmuls.json"
tests kernel-tests 75 14 -k "" "${kernel_tests[@]}"
tests engine-tests 75 4 -m gpu "${engine_tests[@]}"
tests memory-tests 30 0 -m gpu tests/test_cuda_memory.py
tests family-tests 40 8 -k "gpu or cuda or captured" "${family_tests[@]}"
step kernels 50 "${pytest[@]}" bench/ops.py -k "$kernels and not torch.compile" --benchmark-json "$work/kernels.json"
if [ -n "$model" ]; then
    step model 75 python3 bench/model.py --part rest "${small[@]}" "${lengths[@]}" --out "$work/model.json"
    step throughput 75 python3 bench/throughput.py --against "${small[@]}" "${lengths[@]}" --out "$work/throughput.json"
    step heads 60 python3 bench/heads.py "${small[@]}" --out "$work/heads.json"
else
    skip model throughput heads
fi
if [ ${#small[@]} -eq 0 ]; then # on a CPU nothing is compiled
    step compiled 45 "${pytest[@]}" bench/ops.py -k "$kernels and torch.compile" --benchmark-json "$work/compiled.json"
fi
[ $smoke -ne 2 ] || sanitize
exit 0
