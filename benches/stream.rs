//! The whole engine on a linear merge of three bf16 models, against a plain loop over the same bytes and against copying.
//!
//! `cargo bench --bench stream`; `MATS_BENCH_MIB` is the size of one model (64 unless set). Everything is in the page
//! cache. A program of its own rather than criterion's: the contenders take turns in every round, so that a machine that
//! slows down slows all of them, and the best round of each is compared. `synced` ones end with an `fsync` of every
//! output file, as a merge always does.

// The table is what the program is for.
#![allow(clippy::print_stdout)]

#[path = "support/layout.rs"]
mod layout;
#[path = "support/random.rs"]
mod random;
#[path = "support/spectrum.rs"]
mod spectrum;
#[path = "support/synthetic.rs"]
mod synthetic;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use half::bf16;
use layout::Layout;
use mats_stream::plan::Limits;
use mats_stream::read::IoMode;
use mats_stream::report::ProgressMode;
use mats_stream::run::{MergeOptions, merge};
use memmap2::Mmap;
use rayon::prelude::*;
use synthetic::{Element, Synthetic};

const MODELS: usize = 3;
/// Bytes that a thread of the plain loop reads, averages and writes at a time.
const PIECE: usize = 4 << 20;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// One way of merging into the given directory.
type Run<'a> = dyn Fn(&Path) -> Fallible<()> + 'a;

/// One way to spend the bytes, with the bytes it reads and writes.
struct Contender<'a> {
    name: &'static str,
    bytes: u64,
    run: Box<Run<'a>>,
    best: f64,
}

impl<'a> Contender<'a> {
    fn new(name: &'static str, bytes: u64, run: impl Fn(&Path) -> Fallible<()> + 'a) -> Self {
        Self { name, bytes, run: Box::new(run), best: f64::INFINITY }
    }
}

/// A read-only map of a whole file.
// Mapping is unsafe as such; here nobody else writes to the files of this run's own directory.
#[allow(unsafe_code)]
fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the file lies in a directory that this process has just made and nobody else knows.
    unsafe { Mmap::map(&file) }
}

/// Bytes before the values of a safetensors file.
fn header_bytes(map: &[u8]) -> io::Result<usize> {
    let length = map.first_chunk::<8>().ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(8 + u64::from_le_bytes(*length) as usize)
}

/// The shards of `model`, by name: all models of a set have the same.
fn shards(model: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(model)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// `out ← mean of the inputs`, values only: mapped inputs, reserved output, pieces of 4 MiB on all threads.
fn average_loop(models: &[PathBuf], out: &Path, sync: bool) -> io::Result<()> {
    fs::create_dir(out)?;
    for shard in shards(&models[0])? {
        let maps = models.iter().map(|m| map(&m.join(&shard))).collect::<io::Result<Vec<_>>>()?;
        let head = header_bytes(&maps[0])?;
        let file = File::create(out.join(&shard))?;
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, maps[0].len() as u64);
        file.write_all_at(&maps[0][..head], 0)?;
        let pieces: Vec<usize> = (head..maps[0].len()).step_by(PIECE).collect();
        pieces.into_par_iter().try_for_each_init(
            || vec![0u8; PIECE],
            |buffer, start| {
                let end = (start + PIECE).min(maps[0].len());
                let out = &mut buffer[..end - start];
                average(&maps[0][start..end], &maps[1][start..end], &maps[2][start..end], out);
                file.write_all_at(out, start as u64)
            },
        )?;
        if sync {
            file.sync_all()?;
        }
    }
    Ok(())
}

fn average(a: &[u8], b: &[u8], c: &[u8], out: &mut [u8]) {
    let value = |v: &[u8]| bf16::from_le_bytes([v[0], v[1]]).to_f32();
    let inputs = a.chunks_exact(2).zip(b.chunks_exact(2)).zip(c.chunks_exact(2));
    for (out, ((a, b), c)) in out.chunks_exact_mut(2).zip(inputs) {
        let mean = (value(a) + value(b) + value(c)) * (1.0 / 3.0);
        out.copy_from_slice(&bf16::from_f32(mean).to_le_bytes());
    }
}

/// `cp`: every file of every model into a directory of its own.
fn copy(models: &[PathBuf], out: &Path, sync: bool) -> io::Result<()> {
    fs::create_dir(out)?;
    for (k, model) in models.iter().enumerate() {
        let directory = out.join(k.to_string());
        fs::create_dir(&directory)?;
        for shard in shards(model)? {
            fs::copy(model.join(&shard), directory.join(&shard))?;
            if sync {
                File::open(directory.join(&shard))?.sync_all()?;
            }
        }
    }
    Ok(())
}

fn main() -> Fallible<()> {
    let quick = std::env::args().any(|a| a == "--test");
    let mib = match std::env::var("MATS_BENCH_MIB") {
        Ok(text) => text.parse::<u64>().map_err(|e| format!("MATS_BENCH_MIB: {e} (got `{text}`)"))?,
        Err(_) => 64,
    };
    let rounds = if quick { 1 } else { 7 };
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let hidden = if mib < 512 { 512 } else { 2048 };
    let written = Synthetic {
        layout: Layout::Llama,
        models: MODELS,
        base: false,
        hidden,
        intermediate: hidden * 11 / 4,
        layers: 1,
        vocabulary: 16 * hidden,
        element: Element::Bf16,
        statistics: None,
        statistics_layers: 0,
        shard_bytes: 1 << 30,
        seed: 1,
    }
    .with_model_bytes(mib << 20)
    .write(directory.path())?;
    let config = directory.path().join("linear.yml");
    let mut text = "merge_method: linear\nmodels:\n".to_owned();
    for k in 0..MODELS {
        text += &format!("  - model: model-{k}\n    parameters: {{ weight: 1.0 }}\n");
    }
    fs::write(&config, text)?;
    let threads = rayon::current_num_threads();
    let options = MergeOptions {
        limits: Limits { max_memory: 2 << 30, threads, shard_bytes: 1 << 30, untie: false },
        io: IoMode::Mmap,
        refuse_nonfinite: true,
        seed: 1,
        progress: ProgressMode::None,
        resume: false,
    };

    let (models, one) = (&written.models, written.model_bytes);
    let merged_bytes = (MODELS as u64 + 1) * one;
    let all: Vec<PathBuf> = models.iter().chain(models.first()).cloned().collect();
    let (all, first) = (&all, &models[..1]);
    let mut contenders = [
        Contender::new("merge (linear), synced", merged_bytes, |out| {
            merge(&config, out, &options, &AtomicBool::new(false))?;
            Ok(())
        }),
        Contender::new("plain loop, synced", merged_bytes, |out| Ok(average_loop(models, out, true)?)),
        Contender::new("plain loop", merged_bytes, |out| Ok(average_loop(models, out, false)?)),
        Contender::new("copy of inputs and output", 2 * merged_bytes, |out| Ok(copy(all, out, false)?)),
        Contender::new("copy of inputs and output, synced", 2 * merged_bytes, |out| {
            Ok(copy(all, out, true)?)
        }),
        Contender::new("copy of the output alone", 2 * one, |out| Ok(copy(first, out, false)?)),
        Contender::new("copy of the output alone, synced", 2 * one, |out| Ok(copy(first, out, true)?)),
    ];
    // What the last contender left to write back must not be the next one's burden.
    let settle = || rustix::fs::sync();
    settle();
    for _ in 0..rounds {
        for contender in &mut contenders {
            let out = directory.path().join("out");
            let started = Instant::now();
            (contender.run)(&out)?;
            contender.best = contender.best.min(started.elapsed().as_secs_f64());
            fs::remove_dir_all(&out)?;
            settle();
        }
    }

    let merge_seconds = contenders[0].best;
    println!("{MODELS} models of {} MiB, {threads} threads, best of {rounds} rounds", one >> 20);
    if quick {
        println!("--test: one round, the figures below are no measurement");
    }
    println!("{:<36} {:>9} {:>16} {:>22}", "", "seconds", "read+written GB/s", "its time / merge's");
    for Contender { name, bytes, best, .. } in &contenders {
        println!(
            "{name:<36} {best:>9.4} {:>16.2} {:>22.2}",
            *bytes as f64 / best / 1e9,
            best / merge_seconds
        );
    }
    Ok(())
}
