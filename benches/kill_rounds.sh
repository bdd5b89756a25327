#!/usr/bin/env bash
# Kills a merge with SIGKILL at random times, again and again, continues it with --resume, and compares what it ends in
# with an undisturbed run: the same bytes in every file but the report, or the script fails.
#
#   benches/kill_rounds.sh
#
# MATS_BENCH_ROUNDS  merges to be finished (50)
# MATS_BENCH_SEED    of the times (1)
# MATS_BENCH_CONFIG  a config to merge; the fixtures, solved slowly by plain conjugate gradients, unless given
# MATS_BENCH_DIR     where a working directory is made and removed again (the target directory)
# MATS_BENCH_BIN     directory of a ready-built `mats-stream`; built by cargo (release) unless given
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
    } > "$config"
fi
merge=("$bin" merge "$config" --progress none --log-level error --out-shard-size 200kB --threads 2)

started=$EPOCHREALTIME
"${merge[@]}" --out "$work/clean"
whole=$(awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }')
echo "commit $(git rev-parse --short HEAD), $("$bin" --version), $(uname -sr); one run takes $whole s"

same() { # every file of the clean run but the report, and nothing else
    local name
    diff <(cd "$work/clean" && ls -A) <(cd "$work/out" && ls -A) || return 1
    for name in "$work"/clean/*; do
        name=$(basename "$name")
        [[ $name == merge_report.json ]] || cmp "$work/clean/$name" "$work/out/$name" || return 1
    done
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
        # Never an index without its shards, never a report without everything.
        if [[ -f $work/out/merge_report.json ]]; then same || exit 1; fi
        if [[ -f $work/out/model.safetensors.index.json ]]; then
            for shard in "$work"/clean/*.safetensors; do
                [[ -f $work/out/$(basename "$shard") ]] || { echo "round $round: an index without $shard"; exit 1; }
            done
        fi
    done
    if [[ -f $work/out/.mats-stream-journal ]]; then echo "round $round: a journal is left"; exit 1; fi
    resumed=$(sed -n 's/.*"resumed_tensors": \([0-9]*\).*/\1/p' "$work/out/merge_report.json")
    taken=$((taken + ${resumed:-0}))
    same || different=$((different + 1))
    "$bin" verify "$work/out" > "$work/verified" || { cat "$work/verified"; different=$((different + 1)); }
    echo "round $round: killed $attempts times, ${resumed:-0} tensors taken over by the last part"
done
echo "$rounds rounds, $kills kills, $taken tensors taken over, $different rounds with other bytes"
[[ $different == 0 ]]
