#!/usr/bin/env bash
# RegMean of models many times larger than memory under a hard limit that counts the page cache, and the same merge
# without a limit: the outputs must be the same bytes.
#
#   benches/memory_limit.sh          (as root for cgroups; else systemd's user scopes or prlimit where there are any)
#
# MATS_BENCH_MIB        size of one model (4096); three models and their base are made
# MATS_BENCH_BIG_MIB    size of the embedding, and of the head, which RegMean solves (512)
# MATS_BENCH_LIMIT_MIB  the limit (512)
# MATS_BENCH_BUDGET     --max-memory under the limit (256MiB)
# MATS_BENCH_DIR        where a working directory is made and removed again (the target directory); needs 6 models' room
# MATS_BENCH_BIN        directory of ready-built `mats-stream` and `examples/make_synthetic`; built by cargo unless given
#
# Exits 0 if the outputs agree or there is no way to limit memory here, 1 if they differ or a merge failed.
set -euo pipefail
cd "$(dirname "$0")/.."

mib=${MATS_BENCH_MIB:-4096}
big=${MATS_BENCH_BIG_MIB:-512}
limit=$((${MATS_BENCH_LIMIT_MIB:-512} << 20))
budget=${MATS_BENCH_BUDGET:-256MiB}
target=${CARGO_TARGET_DIR:-target}

group=
v1=/sys/fs/cgroup/memory/mats-stream-bench-$$
v2=/sys/fs/cgroup/mats-stream-bench-$$
how=none
if [[ -d /sys/fs/cgroup/memory ]] && mkdir "$v1" 2> /dev/null; then
    how=v1 group=$v1
elif [[ -f /sys/fs/cgroup/cgroup.controllers ]] && mkdir "$v2" 2> /dev/null; then
    if [[ -f $v2/memory.max ]]; then how=v2 group=$v2; else rmdir "$v2"; fi
fi
if [[ $how == none ]] && systemd-run --user --scope --quiet true 2> /dev/null; then how=systemd; fi
if [[ $how == none ]] && command -v prlimit > /dev/null; then how=prlimit; fi
if [[ $how == none ]]; then
    echo "skipped: no writable cgroup, no systemd scope and no prlimit here"
    exit 0
fi

work=
cleanup() {
    if [[ -n $work ]]; then rm -rf "$work"; fi
    if [[ -n $group ]]; then rmdir "$group" || true; fi
}
trap cleanup EXIT

if [[ -z ${MATS_BENCH_BIN:-} ]]; then
    cargo build --quiet --release --bin mats-stream --example make_synthetic
fi
bin=$(realpath "${MATS_BENCH_BIN:-$target/release}")
parent=${MATS_BENCH_DIR:-$target}
mkdir -p "$parent"
work=$(mktemp -d "$(realpath "$parent")/memory-limit.XXXXXX")

"$bin/examples/make_synthetic" --out "$work" --models 3 --base --hidden 2048 --intermediate 3072 \
    --big-tensor-mib "$big" --model-mib "$mib" --statistics gram --statistics-layers 4 --shard-mib 2048 > "$work/paths"
{
    printf 'merge_method: regmean\nbase_model: base\nmodels:\n'
    for k in 0 1 2; do printf '  - { model: model-%d, statistics: statistics-%d.safetensors }\n' "$k" "$k"; done
} > "$work/regmean.yml"
inputs=("$work"/base/*.safetensors "$work"/model-*/*.safetensors "$work"/statistics-*.safetensors)
echo "inputs: $(du -shc "${inputs[@]}" | tail -1 | cut -f1); limit $((limit >> 20)) MiB by $how, --max-memory $budget"

# A page counts against the group that first cached it: what stays cached from the making would be free of charge.
evict() {
    sync "${inputs[@]}"
    for file in "${inputs[@]}"; do dd if="$file" iflag=nocache count=0 status=none; done
}

# $1 name of the output directory, $2 --max-memory; what limits is in `prefix`.
merge() {
    local started=$EPOCHREALTIME pid anonymous=0 rss=0 code=0
    "${prefix[@]}" "$bin/mats-stream" merge "$work/regmean.yml" --out "$work/$1" --max-memory "$2" \
        --out-shard-size 1GB --progress none &
    pid=$!
    while [[ -r /proc/$pid/status ]]; do
        # shellcheck disable=SC2046
        set -- "$1" "$2" $(awk '/^RssAnon:/ { a = $2 } /^VmHWM:/ { h = $2 } END { print a + 0, h + 0 }' \
            "/proc/$pid/status" 2> /dev/null || echo 0 0)
        (($3 > anonymous)) && anonymous=$3
        (($4 > rss)) && rss=$4
        sample_group
        sleep 0.1
    done
    wait "$pid" || code=$?
    awk -v n="$1" -v a="$started" -v b="$EPOCHREALTIME" -v anon="$anonymous" -v rss="$rss" -v code="$code" 'BEGIN {
        printf "%-10s exit %d, %.1f s, peak RssAnon %d MiB, peak RSS with mapped files %d MiB\n",
            n, code, b - a, anon / 1024, rss / 1024 }'
    return "$code"
}

declare -A most
sample_group() {
    [[ -n $group && -r $group/memory.stat ]] || return 0
    local key value
    while read -r key value; do
        case $key in
            rss | cache | mapped_file | dirty | anon | file | file_mapped | file_dirty)
                if ((value > ${most[$key]:-0})); then most[$key]=$value; fi ;;
        esac
    done < "$group/memory.stat"
}

case $how in
    v1)
        echo "$limit" > "$group/memory.limit_in_bytes"
        if [[ -f $group/memory.memsw.limit_in_bytes ]]; then echo "$limit" > "$group/memory.memsw.limit_in_bytes"; fi
        prefix=(bash -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group") ;;
    v2)
        echo "$limit" > "$group/memory.max"
        if [[ -f $group/memory.swap.max ]]; then echo 0 > "$group/memory.swap.max"; fi
        prefix=(bash -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group") ;;
    systemd) prefix=(systemd-run --user --scope --quiet -p "MemoryMax=$limit" -p MemorySwapMax=0) ;;
    prlimit)
        echo "note: prlimit bounds private memory alone, the page cache is free"
        prefix=(prlimit "--data=$limit") ;;
esac

evict
failed=0
merge limited "$budget" || failed=1
if [[ -n $group ]]; then
    for key in "${!most[@]}"; do printf '  group: most %s %d MiB\n' "$key" $((most[$key] >> 20)); done | sort
    case $how in
        v1)
            echo "  group: most in all $(($(cat "$group/memory.max_usage_in_bytes") >> 20)) MiB," \
                "failcnt $(cat "$group/memory.failcnt") (times the limit was met, no failure)," \
                "$(grep '^oom_kill ' "$group/memory.oom_control")" ;;
        v2) echo "  group: $(tr '\n' ' ' < "$group/memory.events")" ;;
    esac
fi
((failed == 0)) || exit 1

prefix=(env)
group_kept=$group
group='' # the second merge runs outside; its samples do not count
evict
merge unlimited 8GiB || failed=1
group=$group_kept
((failed == 0)) || exit 1

for shard in "$work"/unlimited/*.safetensors; do
    if ! cmp "$shard" "$work/limited/$(basename "$shard")"; then failed=1; fi
done
count=$(find "$work/limited" -name '*.safetensors' | wc -l)
if ((failed == 0)); then echo "same bytes in $count shards"; else echo "the outputs differ"; fi
exit "$failed"
