//! Matvecs, seconds and memory that K-FAC solvers need to a given gap of the objective.
//!
//! `cargo bench --bench solve`; with `-- --test` only the smallest problems, once; `-- --help` lists what can be chosen. A
//! program of its own rather than criterion's: what counts is what a solver has reached after each matvec, the time is
//! beside it. Every solver starts at the plain average of the models. `gap` is `(f(x) - f*) / (f(average) - f*)` with f the
//! objective, ridge included: 0 is the merged model that was asked for, 1 is no better than averaging. The objective is
//! read off the iteration (each step lowers it by `α⟨r, z⟩`), f* is the lowest value that any solver reached.

// The table is what the program is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "support/clock.rs"]
mod clock;
#[path = "support/contenders.rs"]
mod contenders;
#[path = "support/plot.rs"]
mod plot;
#[path = "support/problems.rs"]
mod problems;
#[path = "support/random.rs"]
mod random;
#[path = "support/table.rs"]
mod table;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Parser;
use clock::Clock;
use contenders::{Contender, Trace, Until};
use mats_stream::operator::BlockShape;
use problems::Problem;
use table::Results;

/// Steps of plain conjugate gradients: the paper's most.
const PLAIN_STEPS: usize = 100;
/// Most steps of the solve that finds f*.
const REFERENCE_STEPS: usize = 300;
/// The reference stops where five steps together lower the objective by less than this fraction.
const REFERENCE_FLAT: f64 = 1e-8;
/// Gaps below this are not told apart: f32 vectors, and a reference that stops.
pub(crate) const RESOLUTION: f64 = 1e-5;
/// Below so many unknowns a solve is short: the best of three counts.
const SHORT: usize = 300_000;

#[derive(Clone, Copy, Debug)]
struct Shape(BlockShape);

impl FromStr for Shape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let sides = text.split_once('x').and_then(|(m, n)| Some((m.parse().ok()?, n.parse().ok()?)));
        sides
            .filter(|(m, n)| *m > 0 && *n > 0)
            .map(|(m, n)| Self(BlockShape::new(m, n)))
            .ok_or_else(|| format!("`{text}` is no shape (expected OUTxIN)"))
    }
}

/// Solves K-FAC systems to a given gap.
#[derive(Debug, Parser)]
struct Args {
    /// The smallest problems, once.
    #[arg(long)]
    test: bool,
    /// Cargo's own.
    #[arg(long, hide = true)]
    bench: bool,
    /// Merge configs whose models and statistics give real problems; the fixtures' unless shapes are given.
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Synthetic problems, as OUTxIN,OUTxIN.
    #[arg(long, value_delimiter = ',')]
    shapes: Vec<Shape>,
    /// Numbers of models of the synthetic problems.
    #[arg(long, value_delimiter = ',')]
    models: Vec<usize>,
    /// Ridges ρ toward the average.
    #[arg(long, value_delimiter = ',', default_value = "0,1e-3,1e-1,1")]
    ridges: Vec<f64>,
    /// Leave these solvers out, by name; `kronecker` is needed for f*.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// What a second is.
    #[arg(long, value_enum, default_value = "wall")]
    clock: Clock,
    /// The table as comma-separated values.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// The gap after each matvec as comma-separated values.
    #[arg(long, value_name = "FILE")]
    traces: Option<PathBuf>,
    /// A plot of the gap after each matvec, at the first ridge.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Measures every contender on a problem, at every ridge.
fn measure(problem: &Problem, args: &Args) -> Result<Vec<Trace>, Box<dyn Error>> {
    let repeats = if args.test || problem.shape.elements() > SHORT { 1 } else { 3 };
    let mut traces: Vec<Trace> = Vec::new();
    // The first finds f*, the second the gap of plain conjugate gradients; both tell the others when to stop.
    for contender in Contender::ALL {
        if contender != Contender::ALL[0] && args.without.iter().any(|name| name == contender.name()) {
            continue;
        }
        let known = traces.len();
        for repeat in 0..repeats {
            let bases = contender.bases(problem)?;
            for (k, ridge) in args.ridges.iter().enumerate() {
                let before = |c: Contender| traces.iter().find(|t| t.contender == c && t.ridge == *ridge);
                let whole = before(Contender::ALL[0]).map_or(0.0, Trace::total);
                let (until, limit) = match contender {
                    _ if contender == Contender::ALL[0] => (Until::Flat(REFERENCE_FLAT), REFERENCE_STEPS),
                    Contender::Plain => (Until::Decrease(f64::INFINITY), PLAIN_STEPS),
                    _ => {
                        let plain = before(Contender::Plain).map_or(1.0, |t| t.gap(t.iterations(), whole));
                        let goal = plain.clamp(RESOLUTION, table::GAPS[table::GAPS.len() - 1]);
                        // A little further: f* may still be found lower.
                        (Until::Decrease(whole * (1.0 - 0.9 * goal)), PLAIN_STEPS)
                    }
                };
                let trace = contender.run(problem, &bases, *ridge, until, limit)?;
                if repeat == 0 {
                    traces.push(trace);
                } else if trace.seconds() < traces[known + k].seconds() {
                    traces[known + k] = trace;
                }
            }
        }
    }
    Ok(traces)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = Args::parse();
    args.clock.choose();
    if args.test {
        args.ridges.truncate(2);
    }
    let defaults = args.shapes.is_empty() && args.config.is_empty();
    let mut configs = args.config.clone();
    let mut synthetic: Vec<(BlockShape, usize)> = Vec::new();
    if defaults {
        configs.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/merge.yml"));
        let (shapes, models): (&[(usize, usize)], &[usize]) = if args.test {
            (&[(96, 160)], &[2])
        } else {
            (&[(192, 160), (384, 320), (1024, 1024), (512, 2048), (2048, 512)], &[2, 4, 8, 12])
        };
        args.shapes = shapes.iter().map(|(m, n)| Shape(BlockShape::new(*m, *n))).collect();
        if args.models.is_empty() {
            args.models = models.to_vec();
        }
    }
    for shape in &args.shapes {
        synthetic.extend(args.models.iter().map(|models| (shape.0, *models)));
    }
    if !args.shapes.is_empty() && args.models.is_empty() {
        synthetic.extend(args.shapes.iter().map(|shape| (shape.0, 4)));
    }
    let mut results = Results::default();
    let mut one = |problem: Problem| -> Result<(), Box<dyn Error>> {
        let traces = measure(&problem, &args)?;
        results.add(&problem, traces);
        // After each problem: a long run may be cut short.
        if let Some(path) = &args.csv {
            std::fs::write(path, results.csv())?;
        }
        if let Some(path) = &args.traces {
            std::fs::write(path, results.traces_csv())?;
        }
        if let Some(path) = &args.svg {
            plot::gaps(path, &results)?;
        }
        Ok(())
    };
    table::head();
    for config in &configs {
        for problem in Problem::real(config)? {
            one(problem)?;
        }
    }
    for (shape, models) in synthetic {
        one(Problem::synthetic(shape, models)?)?;
    }
    Ok(())
}
