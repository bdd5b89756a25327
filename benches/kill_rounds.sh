#!/usr/bin/env bash
# Kills a merge with SIGKILL at random times, again and again, continues it with --resume, and compares what it ends in
# with an undisturbed run: the same bytes in every file but the report, or the script fails.
#
#   benches/kill_rounds.sh
#
# MATS_BENCH_ROUNDS  merges to be finished (50)
# MATS_BENCH_SEED    of the times (1)
# MATS_BENCH_SWEEP   values of solver.ridge, as `0.1, 1`: a sweep of so many models
# MATS_BENCH_CONFIG  a config to merge; the fixtures, solved slowly by plain conjugate gradients, unless given
# MATS_BENCH_DIR     where a working directory is made and removed again (the target directory)
# MATS_BENCH_BIN     directory of a ready-built `mats-stream`; built by cargo (release) unless given
#
# With a debug build and MATS_STREAM_FAIL='solve.often=;commit.often=' a state is kept of every step of every solve, so that
# each kill leaves some.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${MATS_BENCH_ROUNDS:-50}
RANDOM=${MATS_BENCH_SEED:-1}
target=${CARGO_TARGET_DIR:-target}
if [[ -z ${MATS_BENCH_BIN:-} ]]; then cargo build --quiet --release --bin mats-stream; fi
bin=$(realpath "${MATS_BENCH_BIN:-$target/release}")/mats-stream
parent=${MATS_BENCH_DIR:-$target}
mkdir -p "$parent"
work=$(mktemp -d "$(realpath "$parent")/kill-rounds.XXXXXX")
trap 'rm -rf "$work"' EXIT

config=${MATS_BENCH_CONFIG:-}
if [[ -z $config ]]; then
    config=$work/slow.yml
    models=$(realpath fixtures)
    {
        printf 'merge_method: mats\nsubspace: auto\ninitial: average\nunmatched: average\nbase_model: %s\n' "$models/models/base"
        printf 'solver: { method: cg, max_iterations: %d, tolerance: 0 }\nmodels:\n' "${MATS_BENCH_STEPS:-400}"
        for name in wordnet movies debian; do
            printf '  - { model: %s, statistics: %s }\n' "$models/models/$name" "$models/statistics/$name.safetensors"
        done
        if [[ -n ${MATS_BENCH_SWEEP:-} ]]; then printf 'sweep: { solver.ridge: [%s] }\n' "$MATS_BENCH_SWEEP"; fi
    } > "$config"
fi
merge=("$bin" merge "$config" --progress none --log-level error --out-shard-size 200kB --threads 2)

started=$EPOCHREALTIME
"${merge[@]}" --out "$work/clean"
whole=$(awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }')
echo "commit $(git rev-parse --short HEAD), $("$bin" --version), $(uname -sr); one run takes $whole s"

same() { # every file of the clean run but the records, and nothing else
    diff -r -x merge_report.json -x sweep.json "$work/clean" "$work/out" &&
        diff <(cd "$work/clean" && find . | sort) <(cd "$work/out" && find . | sort)
}
models() { # directories of the clean run that hold a model
    (cd "$work/clean" && find . -name merge_report.json -printf '%h\n')
}

kills=0 taken=0 different=0
for ((round = 1; round <= rounds; round++)); do
    rm -rf "$work/out"
    attempts=0
    while :; do
        # From at once to a little more than a whole run.
        after=$(awk -v r=$RANDOM -v w="$whole" 'BEGIN { printf "%.3f", 1.1 * w * r / 32768 }')
        code=0
        timeout -s KILL "$after" "${merge[@]}" --out "$work/out" --resume || code=$?
        case $code in
            0) break ;;
            137 | 124) kills=$((kills + 1)) attempts=$((attempts + 1)) ;;
            75) sleep 0.05 ;; # the one that was killed is not quite gone
            *) echo "round $round: exit code $code"; exit 1 ;;
        esac
        # Never an index without its shards, never a record without everything.
        for model in $(models); do
            if [[ -f $work/out/sweep.json && ! -f $work/out/$model/merge_report.json ]]; then
                echo "round $round: a sweep's record without $model"
                exit 1
            fi
            for file in "$work/clean/$model"/*; do
                name=$(basename "$file")
                if [[ -f $work/out/$model/merge_report.json && $name != *.json ]] ||
                    [[ -f $work/out/$model/model.safetensors.index.json && $name == *.safetensors ]]; then
                    cmp "$file" "$work/out/$model/$name" || { echo "round $round: half a model"; exit 1; }
                fi
            done
        done
    done
    if [[ -f $work/out/.mats-stream-journal ]]; then echo "round $round: a journal is left"; exit 1; fi
    resumed=0
    for model in $(models); do
        of=$(sed -n 's/.*"resumed_tensors": \([0-9]*\).*/\1/p' "$work/out/$model/merge_report.json")
        resumed=$((resumed + ${of:-0}))
        "$bin" verify "$work/out/$model" > "$work/verified" || { cat "$work/verified"; different=$((different + 1)); }
    done
    taken=$((taken + resumed))
    same || different=$((different + 1))
    echo "round $round: killed $attempts times, $resumed tensors taken over by the last part"
done
echo "$rounds rounds, $kills kills, $taken tensors taken over, $different rounds with other bytes"
[[ $different == 0 ]]
