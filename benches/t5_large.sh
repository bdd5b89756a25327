#!/usr/bin/env bash
# Makes a synthetic set of the size of T5-Large (24 + 24 blocks, 1024 / 2816, 8 models, packed bf16 Grams), merges it with
# the default config of `mats` under a memory bound, and prints where time and memory went. Removes the set again.
#
#   benches/t5_large.sh
#
# MATS_BENCH_LAYERS   blocks of the encoder, and of the decoder (24); 24 take 31 GB of disk
# MATS_BENCH_HIDDEN   d_model (1024); d_ff is 2.75 times it
# MATS_BENCH_MODELS   fine-tuned models (8)
# MATS_BENCH_MEMORY   --max-memory of the merge (8GiB)
# MATS_BENCH_THREADS  --threads of the merge (all)
# MATS_BENCH_CONFIG   lines to put into the config, as `solver: { method: cg }` (none: the defaults)
# MATS_BENCH_KEEP     set: the merged directory's report is copied to this file
# MATS_BENCH_DIR      where a working directory is made and removed again (the target directory)
# MATS_BENCH_BIN      directory of ready-built `mats-stream` and `examples/make_synthetic`; built by cargo unless given
set -euo pipefail
cd "$(dirname "$0")/.."

layers=${MATS_BENCH_LAYERS:-24}
hidden=${MATS_BENCH_HIDDEN:-1024}
models=${MATS_BENCH_MODELS:-8}
memory=${MATS_BENCH_MEMORY:-8GiB}
threads=${MATS_BENCH_THREADS:-0}
target=${CARGO_TARGET_DIR:-target}
if [[ -z ${MATS_BENCH_BIN:-} ]]; then
    cargo build --quiet --release --bin mats-stream --example make_synthetic
fi
bin=$(realpath "${MATS_BENCH_BIN:-$target/release}")
parent=${MATS_BENCH_DIR:-$target}
mkdir -p "$parent"

# Millions of bytes at a d_model of 1024: weights of base, models and output; Grams of the models.
per_layer=$((25 + 34)) # weights of an encoder and a decoder block, in bf16
grams=$((33 + 41))     # their packed Grams, in bf16
fixed=132              # embedding and head
need=$(((models + 2) * (layers * per_layer + fixed) + models * layers * grams))
need=$((need * hidden / 1024 * hidden / 1024 + (models + 2) * fixed))
free=$(($(df --output=avail -B1000000 "$parent" | tail -1)))
if ((free < need + need / 10)); then
    echo "t5_large: $parent has $free MB free, and $need MB are needed with a tenth to spare; set MATS_BENCH_DIR or fewer MATS_BENCH_LAYERS" >&2
    exit 1
fi
work=$(mktemp -d "$(realpath "$parent")/t5-large.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "making $models models of $layers + $layers blocks, about $need MB"
started=$EPOCHREALTIME
"$bin/examples/make_synthetic" --out "$work" --layout t5 --base --models "$models" --hidden "$hidden" \
    --intermediate $((hidden * 11 / 4)) --layers "$layers" --vocabulary 32128 --statistics kfac > "$work/paths"
awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "made in %.0f s\n", b - a }'
du -ch --apparent-size "$work"/statistics-*.safetensors | awk 'END { print "statistics: " $1 }'

{
    echo "merge_method: mats"
    echo "base_model: base"
    echo "models:"
    for ((k = 0; k < models; k++)); do
        echo "  - { model: model-$k, statistics: statistics-$k.safetensors }"
    done
    [[ -z ${MATS_BENCH_CONFIG:-} ]] || printf '%s\n' "$MATS_BENCH_CONFIG"
} > "$work/merge.yml"

# What was just written must not count as read from memory: evicted, as far as the system allows.
find "$work" -name '*.safetensors' -exec sync {} +
find "$work" -name '*.safetensors' -exec dd if={} iflag=nocache count=0 status=none \;

"$bin/mats-stream" merge "$work/merge.yml" --out "$work/out" --max-memory "$memory" --threads "$threads" --progress plain \
    2> "$work/log" || { tail -5 "$work/log" >&2; exit 1; }
report=$work/out/merge_report.json
[[ -z ${MATS_BENCH_KEEP:-} ]] || cp "$report" "$MATS_BENCH_KEEP"

"${PYTHON:-python3}" - "$report" "$memory" <<'PY'
import json
import sys
from collections import Counter, defaultdict

report, memory = json.load(open(sys.argv[1])), sys.argv[2]
gib = 1 << 30
kinds = defaultdict(lambda: defaultdict(float))
stops = Counter()
for name, p in report["parameters"].items():
    kind = " / ".join(p[k] for k in ("method", "subspace", "solver", "preconditioner") if k in p)
    row = kinds[kind]
    row["parameters"] += 1
    row["seconds"] += p["seconds"]
    row["setup"] += p.get("setup", {}).get("seconds", 0.0)
    row["solve"] += p.get("solve_seconds", 0.0)
    row["iterations"] += p.get("iterations", 0)
    row["objective"] += p.get("objective_final", 0.0) / (p.get("objective_initial") or 1.0)
    stops[p.get("stop_reason", "none")] += 1
print(f"wall {report['wall_seconds']:.1f} s, {report['settings']['threads']} threads, --max-memory {memory}")
print(f"peak rss {report.get('peak_rss_bytes', 0) / gib:.2f} GiB (mapped inputs included), "
      f"anonymous {report.get('peak_anonymous_bytes', 0) / gib:.2f} GiB")
print(f"read {report['bytes_read'] / 1e9:.1f} GB, written {report['bytes_written'] / 1e9:.1f} GB, "
      f"{report['flops'] / 1e12:.1f} TFLOP planned, {report['flops'] / report['wall_seconds'] / 1e9:.0f} GFLOP/s over all")
print("\n`rest`: initial guess, reading, right-hand side, checking the result, writing; `objective`: final / at the guess")
print("seconds summed over parameters (small ones run side by side, so sums may pass the wall time)")
print(f"{'':<34} {'count':>6} {'all':>9} {'set-up':>9} {'iterating':>9} {'rest':>9} {'steps':>6} {'objective':>9}")
for kind, r in sorted(kinds.items(), key=lambda k: -k[1]["seconds"]):
    rest = r["seconds"] - r["setup"] - r["solve"]
    n = r["parameters"]
    print(f"{kind:<34} {n:>6.0f} {r['seconds']:>9.1f} {r['setup']:>9.1f} {r['solve']:>9.1f} {rest:>9.1f} "
          f"{r['iterations'] / n:>6.1f} {r['objective'] / n:>9.3f}")
print("stopped by: " + ", ".join(f"{reason} {count}" for reason, count in stops.most_common()))
PY
