#!/usr/bin/env bash
# Tests and tables on a GPU machine that can install nothing: it needs torch, triton, peft, pytest, hypothesis and rich.
#
#   bash bench/gpu.sh OUTDIR [options of `python -m bench run`]
#
# Writes tests.log and, of each of three runs, NAME.json, NAME.txt and NAME.log to OUTDIR, where no earlier
# results may be, in under nine minutes, and ends with the tables: run (everybody, rank 16), ranks (PEFT and ours, ranks
# 64 and 384), fidelity.
# Exit status 0 only if the tests passed and nothing in the tables failed; each part runs whatever became of the other.
# PYTHON names the interpreter (python3), COMMIT the commit where there is no repository. A rehearsal without a GPU:
#
#   bash bench/gpu.sh rehearsal --device cpu --dtype fp32 --hidden 256 --tokens 32 --block 256x512x4x2
set -uo pipefail

TESTS_SECONDS=${TESTS_SECONDS:-145}
RUN_SECONDS=${RUN_SECONDS:-180}
RANKS_SECONDS=${RANKS_SECONDS:-100}
FIDELITY_SECONDS=${FIDELITY_SECONDS:-40}

if [ $# -lt 1 ]; then
    echo "usage: bash bench/gpu.sh OUTDIR [options of python -m bench run]" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0

has() {
    "$python" -c "import $1" 2>/dev/null
}
options=(-m gpu -v --tb=short -p no:cacheprovider)
# Most of the tests' time is compilation, which several processes share out. pytest's own limit ends it in good order;
# without pytest-timeout the log still has a line for every test that ended in time.
has xdist && options+=(-n 4)
has pytest_timeout && options+=(--session-timeout "$TESTS_SECONDS")
echo "== GPU tests, at most $TESTS_SECONDS s: $out/tests.log"
timeout --kill-after=5 $((TESTS_SECONDS + 15)) "$python" -m pytest tests "${options[@]}" >"$out/tests.log" 2>&1
code=$?
if [ "$code" -ne 0 ]; then
    echo "   failed: exit status $code"
    grep -E '^(FAILED|ERROR|E  )|session-timeout' "$out/tests.log" | cut -c1-180 | head -n 25
    status=1
fi
for word in PASSED FAILED ERROR SKIPPED; do
    printf '   %s %s' "$(grep -cE "^(\[gw[0-9]+\] .*$word |tests/[^ ]+ $word)" "$out/tests.log")" "$word"
done
echo
if [ "$code" -eq 0 ] && ! grep -qE "^(\[gw[0-9]+\] .*PASSED |tests/[^ ]+ PASSED)" "$out/tests.log"; then
    echo "   nothing ran: no GPU that torch can use"
    case " $* " in *" --device cpu "*) ;; *) status=1 ;; esac
fi

# A run of `python -m bench run`: NAME, seconds, options.
measure() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name, at most $seconds s: $out/$name.json"
    timeout --kill-after=10 $((seconds + 30)) "$python" -m bench run --limit-s "$seconds" --out "$out/$name.json" "$@" \
        >"$out/$name.txt" 2>"$out/$name.log"
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "   failed: exit status $code"
        status=1
    fi
    # The record is written stage by stage: of a run that was killed, too, `python -m bench plot` draws what there is.
    if [ -s "$out/$name.txt" ]; then cat "$out/$name.txt"; else tail -n 15 "$out/$name.log"; fi
}
measure run "$RUN_SECONDS" --suite norm compose layer decode memory host block --rank 16 "$@"
measure ranks "$RANKS_SECONDS" --suite norm layer decode --rank 64 384 --providers frozen peft_lora peft_dora ours "$@"
measure fidelity "$FIDELITY_SECONDS" --suite fidelity --rank 1 16 256 "$@"
exit "$status"
