//! What a run may use: memory, threads, and what the metadata already takes.

use crate::cli::ResourceArgs;
use crate::error::Error;
use crate::merge::Inputs;
use crate::plan::Limits;

/// Memory of the program itself before any header is read.
const PROGRAM_BYTES: u64 = 4 << 20;
/// Parsed headers take up to this many times their size on disk (measured: 4 at 600 000 tensors).
const METADATA_FACTOR: u64 = 6;

/// What the run itself keeps of each tensor of the output: in its plan, its layout, its journal, and at its end twice in the
/// report, as values and as text (measured: 1.7 KiB at 90 000 tensors and at 300 000).
const RECORD_BYTES: u64 = 2 << 10;

/// Blocks from this size on are mapped, each by itself, and given back when they are freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: i32 = 1 << 20;

/// Has the allocator give freed matrices back. glibc keeps what it has seen freed once for the next time, up to 32 MiB a
/// block, in every thread's heap: four weights of 600 x 600 merged by `tsv_m` held 57 MiB so, and 23 with this.
#[allow(unsafe_code, reason = "two calls of the C library")]
pub(super) fn give_freed_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two numbers of the allocator, which locks for it; a refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MAPPED_BYTES);
    }
}

/// What the process holds of all headers and of its own records: computed, so that the same config gives the same plan.
pub(super) fn metadata_bytes(inputs: &Inputs) -> u64 {
    let checkpoints: u64 = inputs.checkpoints.iter().map(|c| c.header_bytes()).sum();
    let parts = inputs.sections.iter().flat_map(|section| &section.checkpoints).chain(&inputs.checkpoints);
    let rows: u64 = parts.map(|view| view.model().map_bytes()).sum();
    let statistics: u64 =
        inputs.models.iter().filter_map(|m| m.statistics.as_ref()).map(|s| s.header_bytes()).sum();
    // Of sections and of what is in none.
    let outputs = inputs.sections.iter().map(|section| &**section).chain([inputs]);
    let records: u64 =
        outputs.map(|part| part.checkpoints[part.reference()].tensors().count() as u64).sum::<u64>()
            * RECORD_BYTES;
    let files = inputs.files.changed.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
    PROGRAM_BYTES
        + METADATA_FACTOR * (checkpoints + statistics)
        + rows
        + records
        + files
        + inputs.files.vocabulary_bytes
}

pub(super) fn limits(args: &ResourceArgs) -> Result<Limits, Error> {
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n if n <= 4096 => n,
        n => {
            return Err(Error::Flag { flag: "--threads", what: format!("got {n}, expected at most 4096") });
        }
    };
    let max_memory = args.max_memory.unwrap_or_else(default_max_memory);
    Ok(Limits { max_memory, threads, shard_bytes: args.out_shard_size, untie: args.untie })
}

/// 80 % of the memory that is available to this process now: the system's, or its control group's.
pub fn default_max_memory() -> u64 {
    available_memory() / 5 * 4
}

/// Bytes that could be had without swapping.
pub(super) fn available_memory() -> u64 {
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    let group = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok())
        .min();
    // Unknown: assume a small machine rather than a large one.
    system.unwrap_or(2 << 30).min(group.unwrap_or(u64::MAX))
}
