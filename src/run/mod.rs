//! The commands: from parsed arguments to an exit code. `main` calls [`run`]; everything else is called from here.

mod factors;
mod inputs;
mod manual;
mod materialise;
mod merge;
mod record;
mod report;
mod resources;
mod resume;
mod sections;
mod statistics;
mod sweep;

use std::io::{self, Write};
use std::process::ExitCode;

pub use inputs::open_inputs;
pub use materialise::materialise;
pub use merge::{MergeOptions, MergeSummary, merge, merge_config};
pub use resources::default_max_memory;
pub use sweep::{SweepSummary, sweep};

use crate::cli::{Cli, Command, DiffArgs, InspectArgs, PlanArgs, VerifyArgs};
use crate::config::MergeConfig;
use crate::error::Error;
use crate::plan::{MergePlan, SweepPlan};
use crate::read::IoMode;

/// Carries out a command; what it was asked for goes to stdout, everything else to stderr.
///
/// # Errors
/// Whatever ends the command; [`Error::exit_code`] says how.
pub fn run(cli: Cli) -> Result<ExitCode, Error> {
    resources::give_freed_memory_back();
    match cli.command {
        Command::Merge(args) if args.dry_run => {
            plan(&PlanArgs { config: args.config, resources: args.resources, json: false })
        }
        Command::Merge(args) => merge::command(args),
        Command::Plan(args) => plan(&args),
        Command::Inspect(args) => inspect(&args),
        Command::Diff(args) => diff(&args),
        Command::Materialise(args) => materialise::command(args),
        Command::Verify(args) => verify(&args),
        Command::Statistics(args) => statistics::command(args),
        Command::Report(args) => report::command(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    }
}

fn plan(args: &PlanArgs) -> Result<ExitCode, Error> {
    let config = MergeConfig::load(&args.config)?;
    let mut inputs = open_inputs(&config, io_mode(args.resources.io), true)?;
    let metadata = resources::metadata_bytes(&inputs);
    let limits = resources::limits(&args.resources)?;
    let warn = |plan: &MergePlan| plan.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    if let Some(sweep) = &config.sweep {
        let plan = SweepPlan::new(&sweep.variants, &mut inputs, limits, metadata)?;
        plan.plans.first().map(warn);
        print(|out| if args.json { json(out, &plan.to_json()) } else { plan.write_table(out) })?;
    } else {
        let plan = MergePlan::new(&config, &mut inputs, limits, metadata)?;
        warn(&plan);
        print(|out| if args.json { json(out, &plan.to_json()) } else { plan.write_table(out) })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect(args: &InspectArgs) -> Result<ExitCode, Error> {
    let stats = args.stats.then(|| args.max_memory.unwrap_or_else(default_max_memory));
    let inspection = crate::inspect::inspect(&args.path, stats, IoMode::for_path(&args.path))?;
    for warning in &inspection.warnings {
        tracing::warn!("{warning}");
    }
    print(|out| if args.json { json(out, &inspection) } else { inspection.write_table(out) })?;
    Ok(ExitCode::SUCCESS)
}

fn diff(args: &DiffArgs) -> Result<ExitCode, Error> {
    let diff = crate::diff::diff(&args.a, &args.b, args.tolerance, IoMode::for_path(&args.a))?;
    print(|out| if args.json { json(out, &diff) } else { diff.write_table(out) })?;
    Ok(if diff.differs { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn verify(args: &VerifyArgs) -> Result<ExitCode, Error> {
    // Read, not mapped: a shard with a bad sector is a finding, not a signal.
    let found = crate::verify::verify(&args.directory, args.inputs, IoMode::Pread)?;
    print(|out| if args.json { json(out, &found) } else { found.write_table(out) })?;
    Ok(if found.ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn io_mode(io: crate::cli::IoMode) -> IoMode {
    match io {
        crate::cli::IoMode::Mmap => IoMode::Mmap,
        crate::cli::IoMode::Pread => IoMode::Pread,
    }
}

fn json(out: &mut dyn Write, value: &impl serde::Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// Writes to stdout through one buffer. A reader that went away has what it wanted.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let result = write(&mut out).and_then(|()| out.flush());
    // Not flushed again on drop: what could not be written once is lost.
    let _ = out.into_parts();
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(source) => Err(Error::Stdout { source }),
        Ok(()) => Ok(()),
    }
}
