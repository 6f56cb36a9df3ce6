#!/usr/bin/env bash
# Checks and measurements on a GPU machine that can install nothing: it needs torch, triton, peft, pytest, hypothesis and
# rich. Three stages, each under four minutes and useful without the others:
#
#   bash bench/gpu.sh check  OUTDIR       the GPU tests, kernel cases first, compiled by several processes
#   bash bench/gpu.sh tables OUTDIR       kernels compiled, ceilings, then what matters most first: a layer's training
#                                         and decoding at ranks 16, 384 and 64, host time, norms, a decoder block
#   bash bench/gpu.sh tune   OUTDIR       dora_kernels.tune for an 8B model's layers: a table for the cache folder
#
# Everything is written to OUTDIR as it comes: a line per test, a record after each comparison, a table after each
# layer. A stage that runs out of time says what it has left out, and what it has written can be used. A stage whose
# results are there already is refused. Exit status 0 only if the stage's tests passed and nothing in its tables failed.
# PYTHON names the interpreter (python3), COMMIT the commit where there is no repository, and STAGE_SECONDS the time of
# a stage (215). Further words are options of `python -m bench run` for tables, and layers for tune. A rehearsal without
# a GPU:
#
#   bash bench/gpu.sh check rehearsal
#   bash bench/gpu.sh tables rehearsal --device cpu --dtype fp32 --hidden 256 --tokens 32 --block 256x512x4x2
#   bash bench/gpu.sh tune rehearsal 256x256x16
set -uo pipefail

stage=${1:-}
case "$stage" in check | tables | tune) ;; *) stage= ;; esac
if [ -z "$stage" ] || [ $# -lt 2 ]; then
    echo "usage: bash bench/gpu.sh check|tables|tune OUTDIR [options]" >&2
    exit 2
fi
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if compgen -G "$out/$stage*" >/dev/null; then
    echo "$out/$stage*: there are results already; they are never overwritten" >&2
    exit 2
fi
python=${PYTHON:-python3}
seconds=${STAGE_SECONDS:-215}
begun=$SECONDS
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
compiling=$((seconds / 4)) # at most, of the stage `tables`
share=0
status=0

has() {
    "$python" -c "import $1" 2>/dev/null
}

left() {
    echo $((seconds - (SECONDS - begun)))
}

check() {
    local log=$out/check.log code options=(-m gpu -v --tb=short -p no:cacheprovider)
    # Most of the time is compilation, which several processes share out. pytest's own limit ends it in good order;
    # without pytest-timeout the log still has a line for every test that ended in time.
    has xdist && options+=(-n "$(nproc | awk '{print $1 < 8 ? $1 : 8}')")
    has pytest_timeout && options+=(--session-timeout "$((seconds - 20))")
    echo "== GPU tests, at most $seconds s: $log"
    timeout --kill-after=5 "$seconds" "$python" -m pytest tests/kernels/test_kernel_cases.py tests "${options[@]}" \
        >"$log" 2>&1
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "   failed: exit status $code"
        grep -E '^(FAILED|ERROR|E  )|session-timeout' "$log" | cut -c1-180 | head -n 25
        status=1
    fi
    for word in PASSED FAILED ERROR SKIPPED; do
        printf '   %s %s' "$(grep -cE "^(\[gw[0-9]+\] .*$word |tests/[^ ]+ $word)" "$log")" "$word"
    done
    echo
    if [ "$code" -eq 0 ] && ! grep -qE "^(\[gw[0-9]+\] .*PASSED |tests/[^ ]+ PASSED)" "$log"; then
        echo "   nothing ran: no GPU that torch can use"
        status=1
    fi
}

# A run of `python -m bench run`: NAME, share in percent of the stage's time less that of `compiled`, options. What a run
# leaves of its share is the next ones'.
measure() {
    local name=tables-$1 limit hard code
    share=$((share + $2))
    limit=$((begun + compiling + (seconds - compiling) * share / 100 - SECONDS))
    shift 2
    if [ "$limit" -lt 15 ]; then limit=15; fi # what an earlier run took too long is the last ones' loss
    hard=$((limit + 10))
    if [ "$(left)" -lt "$hard" ]; then hard=$(left); fi
    if [ "$((hard - 5))" -lt "$limit" ]; then limit=$((hard - 5)); fi
    if [ "$limit" -lt 10 ]; then
        echo "== $name: left out, $seconds s were over"
        status=1
        return
    fi
    echo "== $name, at most $limit s: $out/$name.json"
    # The record is written comparison by comparison. Interrupted, the run says in it how many it had not begun.
    timeout --signal=INT --kill-after=10 "$hard" "$python" -m bench run --limit-s "$limit" --rounds 11 \
        --out "$out/$name.json" "$@" >"$out/$name.txt" 2>"$out/$name.log"
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "   failed, or left something out: exit status $code"
        status=1
    fi
    if [ -s "$out/$name.txt" ]; then cat "$out/$name.txt"; else tail -n 15 "$out/$name.log"; fi
}

# Every run of `tables`, by a function that gets NAME, share, options. What matters most comes first, and what the
# compilers of others need time for last.
runs() {
    local each=$1 few=(--providers frozen peft_lora ours ours_triton ours_torch ours_merged)
    shift
    "$each" layer 30 --suite layer --rank 16 --tokens 8192 1024 64 "${few[@]}" "$@"
    "$each" decode 15 --suite decode host --rank 16 --tokens 1 64 --providers frozen peft_lora ours ours_frozen \
        ours_merged "$@"
    "$each" rank384 11 --suite layer decode --rank 384 --tokens 8192 1 "${few[@]}" "$@"
    "$each" rank64 9 --suite layer decode --rank 64 --tokens 8192 1 "${few[@]}" "$@"
    "$each" norm 10 --suite norm --rank 16 384 --providers peft_dora ours ours_direct ours_factored "$@"
    "$each" block 10 --suite block --rank 16 "$@"
    "$each" compiled 8 --suite decode --rank 16 --tokens 1 --providers peft_lora peft_lora_compiled ours ours_compiled \
        "$@"
    "$each" everybody 7 --suite layer --rank 16 --tokens 1024 "$@"
}

# The kernels of all runs, compiled into Triton's cache by a process for each run. Without it each run would compile its
# kernels one after another inside its share: about 130 in all, each 0.3 s of one core for sm_90 and about as much for
# its launcher. Nothing that these processes measure is kept.
compiled() {
    local name=$1 folder
    folder=$(mktemp -d)
    shift 2
    (
        timeout --kill-after=5 "$compiling" "$python" -m bench run --limit-s "$compiling" --rounds 1 \
            --out "$folder/$name.json" "$@" >/dev/null 2>&1
        rm -r "$folder"
    ) &
}

tables() {
    echo "== compilation, at most $compiling s"
    runs compiled "$@"
    wait
    echo "   $((SECONDS - begun)) s"
    compiling=$((SECONDS - begun))
    runs measure "$@"
}

tune() {
    local layers=("$@") code
    if [ $# -eq 0 ]; then layers=(4096x4096x16 14336x4096x16 4096x14336x16 1024x4096x16 4096x4096x384); fi
    echo "== tune, at most $seconds s: $out/tune"
    DORA_KERNELS_CACHE=$out/tune timeout --kill-after=10 "$seconds" "$python" - "$((seconds - 45))" "${layers[@]}" \
        >"$out/tune.txt" 2>"$out/tune.log" <<'PYTHON'
import sys

import dora_kernels

layers = [tuple(map(int, layer.split("x"))) for layer in sys.argv[2:]]
found = dora_kernels.tune(layers, seconds=float(sys.argv[1]))
print(found)
sys.exit(1 if found.wrong else 0)
PYTHON
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "   failed: exit status $code"
        tail -n 5 "$out/tune.log"
        echo "   of ${layers[*]} the table has: $(cat "$out"/tune/*.json 2>/dev/null | grep -oE '[0-9]+x[0-9]+ r[0-9]+' | xargs)"
        status=1
    fi
    cat "$out/tune.txt"
}

"$stage" "$@"
echo "== $stage: $((SECONDS - begun)) s, exit status $status"
exit "$status"
