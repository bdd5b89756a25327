//! A merge method of your own in one file: `trimmed_mean` drops, at each element, the largest and the smallest of the models'
//! task vectors and adds the mean of the rest, scaled so that the tensor's L1 norm is the mean of the models'.
//!
//! `cargo run --release --example custom_method -- CONFIG OUT`, with a config that says `merge_method: trimmed_mean`.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use mats_stream::config::{MergeConfig, ParameterSpec, Range};
use mats_stream::merge::elementwise::{Arguments, BaseUse, Definition, Elementwise, Known, Pass, Piece};
use mats_stream::plan::Limits;
use mats_stream::read::IoMode;
use mats_stream::report::ProgressMode;
use mats_stream::run::{MergeOptions, default_max_memory, merge_config};

/// How the config names the method, and what it takes.
static TRIMMED_MEAN: Definition = Definition {
    name: "trimmed_mean",
    base: BaseUse::Required,
    models: (3, usize::MAX),
    parameters: &[ParameterSpec::number("lambda", Range::Any)],
    build: |arguments: &Arguments<'_>| {
        let (models, lambda) = (arguments.models(), arguments.number("lambda", 1.0) as f32);
        Ok(Box::new(TrimmedMean { models, lambda }))
    },
};

/// The method on one tensor.
#[derive(Debug)]
struct TrimmedMean {
    models: usize,
    lambda: f32,
}

impl TrimmedMean {
    /// Mean of the task vectors at one element without the two extremes.
    fn mean(&self, piece: &Piece<'_>, k: usize) -> f32 {
        let (mut sum, mut least, mut most) = (0.0f32, f32::INFINITY, f32::NEG_INFINITY);
        for i in 0..self.models {
            let value = piece.model(i)[k];
            sum += value;
            least = least.min(value);
            most = most.max(value);
        }
        (sum - least - most) / (self.models - 2) as f32
    }
}

impl Elementwise for TrimmedMean {
    fn task_vectors(&self) -> bool {
        true
    }

    /// One pass before the merge: the L1 norms of the models, together, and of the result.
    fn passes(&self) -> Vec<Pass> {
        vec![Pass::Sums { count: 2 }]
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        for k in 0..piece.len() {
            sums[0] += (0..self.models).map(|i| f64::from(piece.model(i)[k].abs())).sum::<f64>();
            sums[1] += f64::from(self.mean(piece, k).abs());
        }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let [models, mean] = [known.sums(0)[0] / self.models as f64, known.sums(0)[1]];
        let scale = if mean > 0.0 { (models / mean) as f32 } else { 1.0 };
        for (k, out) in out.iter_mut().enumerate() {
            *out = piece.base()[k] + self.lambda * scale * self.mean(piece, k);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [config, out] = &paths[..] else { return Err("usage: custom_method CONFIG OUT".into()) };
    let config = MergeConfig::load_with(config, &[&TRIMMED_MEAN])?;
    let threads = std::thread::available_parallelism()?.get();
    let options = MergeOptions {
        limits: Limits {
            max_memory: default_max_memory(),
            threads,
            shard_bytes: 5_000_000_000,
            untie: false,
        },
        io: IoMode::Mmap,
        refuse_nonfinite: true,
        seed: 0,
        resume: false,
        progress: ProgressMode::Auto,
    };
    let summary = merge_config(&config, out, &options, &AtomicBool::new(false))?;
    println!("{} parameters", summary.report.parameters.len());
    Ok(())
}
