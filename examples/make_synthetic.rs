//! Writes synthetic fine-tuned models of any size, for measurements:
//! `cargo run --release --example make_synthetic -- --out DIR --models 3 --hidden 2048 --layers 8`.
//!
//! DIR gets `base/` (with `--base`), `model-0/` …, each in Hugging Face's layout, and with `--statistics` one
//! `statistics-K.safetensors` a model. The same arguments give the same bytes on every machine. No tensor is held in
//! memory, so a set may be larger than the machine.

// Paths and errors are what a command line tool prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../benches/support/layout.rs"]
mod layout;
#[path = "../benches/support/random.rs"]
mod random;
#[path = "../benches/support/spectrum.rs"]
mod spectrum;
#[path = "../benches/support/synthetic.rs"]
mod synthetic;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use layout::Layout;
use synthetic::{Element, Statistics, Synthetic};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    F32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Family {
    Llama,
    T5,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Gram,
    Kfac,
}

/// Writes synthetic fine-tuned models in Hugging Face's layout.
#[derive(Debug, Parser)]
struct Args {
    /// Directory to write into; made if need be.
    #[arg(long)]
    out: PathBuf,
    /// Fine-tuned models.
    #[arg(long, default_value_t = 3)]
    models: usize,
    /// Write the base, too.
    #[arg(long)]
    base: bool,
    /// Names and shapes of the tensors.
    #[arg(long, value_enum, default_value = "llama")]
    layout: Family,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    hidden: u32,
    /// Width of the MLP; 2.75 times the hidden one unless given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=262_144))]
    intermediate: Option<u32>,
    /// Transformer blocks; of the encoder and of the decoder each, where there are both.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Choose the number of layers for models of about so many MiB.
    #[arg(long, conflicts_with = "layers")]
    model_mib: Option<u64>,
    /// Stored type of the weights.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    /// Statistics files to go with the models, packed bf16.
    #[arg(long, value_enum)]
    statistics: Option<Kind>,
    /// Only the first so many layers (and the head) have statistics; all unless given.
    #[arg(long)]
    statistics_layers: Option<usize>,
    /// Rows of the embedding and of the head.
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    vocabulary: u32,
    /// Size of the embedding, and of the head, in MiB, instead.
    #[arg(long, conflicts_with = "vocabulary", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    big_tensor_mib: Option<u64>,
    /// Most MiB of one shard.
    #[arg(long, default_value_t = 2048)]
    shard_mib: u64,
    /// Of everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let element = match args.dtype {
        Dtype::Bf16 => Element::Bf16,
        Dtype::F16 => Element::F16,
        Dtype::F32 => Element::F32,
    };
    let hidden = args.hidden as usize;
    let rows = |mib: u64| ((mib << 20) / (args.hidden as u64 * element.bytes() as u64)).max(1) as usize;
    let mut synthetic = Synthetic {
        layout: match args.layout {
            Family::Llama => Layout::Llama,
            Family::T5 => Layout::T5,
        },
        models: args.models,
        base: args.base,
        hidden,
        intermediate: args.intermediate.map_or(hidden * 11 / 4, |n| n as usize).max(1),
        layers: args.layers,
        vocabulary: args.big_tensor_mib.map_or(args.vocabulary as usize, rows),
        element,
        statistics: args.statistics.map(|kind| match kind {
            Kind::Gram => Statistics::Gram,
            Kind::Kfac => Statistics::Kfac,
        }),
        statistics_layers: args.statistics_layers.unwrap_or(usize::MAX),
        shard_bytes: args.shard_mib << 20,
        seed: args.seed,
    };
    if let Some(mib) = args.model_mib {
        synthetic = synthetic.with_model_bytes(mib << 20);
    }
    match synthetic.write(&args.out) {
        Ok(written) => {
            for path in written.base.iter().chain(&written.models).chain(&written.statistics) {
                println!("{}", path.display());
            }
            eprintln!("{} layers, {} bytes a model", synthetic.layers, written.model_bytes);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("make_synthetic: error: {}: {error}", args.out.display());
            ExitCode::FAILURE
        }
    }
}
