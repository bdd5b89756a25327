#!/usr/bin/env bash
# A linear merge of three bf16 models against `cp` of the same files, in the page cache, in turns.
#
#   benches/linear_vs_cp.sh
#
# MATS_BENCH_MIB     size of one model (1024)
# MATS_BENCH_ROUNDS  rounds; the best of each contender counts (5)
# MATS_BENCH_DIR     where a working directory is made and removed again (the target directory); needs 8 models' room
# MATS_BENCH_BIN     directory of ready-built `mats-stream` and `examples/make_synthetic`; built by cargo unless given
set -euo pipefail
cd "$(dirname "$0")/.."

mib=${MATS_BENCH_MIB:-1024}
rounds=${MATS_BENCH_ROUNDS:-5}
target=${CARGO_TARGET_DIR:-target}
if [[ -z ${MATS_BENCH_BIN:-} ]]; then
    cargo build --quiet --release --bin mats-stream --example make_synthetic
fi
bin=$(realpath "${MATS_BENCH_BIN:-$target/release}")
parent=${MATS_BENCH_DIR:-$target}
mkdir -p "$parent"
work=$(mktemp -d "$(realpath "$parent")/linear-vs-cp.XXXXXX")
trap 'rm -rf "$work"' EXIT

"$bin/examples/make_synthetic" --out "$work" --models 3 --hidden 2048 --model-mib "$mib" --dtype bf16 \
    --shard-mib 1024 > "$work/paths"
cat > "$work/linear.yml" <<'YAML'
merge_method: linear
models:
  - { model: model-0, parameters: { weight: 1.0 } }
  - { model: model-1, parameters: { weight: 1.0 } }
  - { model: model-2, parameters: { weight: 1.0 } }
YAML
one=$(cat "$work"/model-0/*.safetensors | wc -c)

merge() { "$bin/mats-stream" merge "$work/linear.yml" --out "$work/out" --progress none; }
copy_all() { mkdir "$work/out" && cp -r "$work/model-0" "$work/model-1" "$work/model-2" "$work/out" && cp -r "$work/model-0" "$work/out/merged"; }
copy_all_synced() { copy_all && sync "$work"/out/*/*.safetensors; }
copy_output() { cp -r "$work/model-0" "$work/out"; }
copy_output_synced() { copy_output && sync "$work"/out/*.safetensors; }

# Bytes read and written by each; a merge ends with its files synced, as `_synced` does.
declare -A bytes=(
    [merge]=$((4 * one)) [copy_all]=$((8 * one)) [copy_all_synced]=$((8 * one))
    [copy_output]=$((2 * one)) [copy_output_synced]=$((2 * one))
)
contenders=(merge copy_all_synced copy_all copy_output copy_output_synced)
declare -A best

cat "$work"/model-*/*.safetensors > /dev/null # warm
sync "$work"/model-*/*.safetensors
for ((round = 0; round < rounds; round++)); do
    for contender in "${contenders[@]}"; do
        started=$EPOCHREALTIME
        "$contender"
        ended=$EPOCHREALTIME
        rm -rf "$work/out"
        sync -f "$work" # what removing left to do is not the next one's burden
        seconds=$(awk -v a="$started" -v b="$ended" 'BEGIN { print b - a }')
        best[$contender]=$(awk -v a="${best[$contender]:-1e9}" -v b="$seconds" 'BEGIN { print (a < b) ? a : b }')
    done
done

# In a run of its own, because looking takes time from what is looked at.
"$bin/mats-stream" merge "$work/linear.yml" --out "$work/out" --progress none &
pid=$!
peak=0
while [[ -r /proc/$pid/status ]]; do
    now=$(awk '/^RssAnon:/ { print $2 }' "/proc/$pid/status" 2> /dev/null || true)
    ((${now:-0} > peak)) && peak=$now
    sleep 0.005
done
wait "$pid"

echo "3 bf16 models of $((one >> 20)) MiB, $(nproc) processors, best of $rounds rounds"
printf '%-22s %9s %18s %20s\n' '' seconds 'read+written GB/s' "time / merge's"
for contender in "${contenders[@]}"; do
    awk -v n="$contender" -v b="${bytes[$contender]}" -v s="${best[$contender]}" -v m="${best[merge]}" \
        'BEGIN { printf "%-22s %9.3f %18.2f %20.2f\n", n, s, b / s / 1e9, s / m }'
done
# The faster of the two copies: which one that is says more about the page cache than about cp.
awk -v m="${best[merge]}" -v c="${best[copy_all]}" -v s="${best[copy_all_synced]}" \
    'BEGIN { if (s < c) c = s; printf "bytes per second of merge / of cp of inputs and output: %.2f\n", c / m / 2 }'
echo "peak RssAnon of merge: $((peak >> 10)) MiB"
