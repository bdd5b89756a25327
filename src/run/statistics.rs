//! `statistics convert`: flags into options, warnings and the outcome to stderr.

use std::io::Write as _;
use std::process::ExitCode;

use super::merge::Signals;
use super::resources::default_max_memory;
use crate::cli::{ConvertArgs, StatisticsArgs, StatisticsCommand};
use crate::error::Error;
use crate::read::Dtype;
use crate::report::units::{Bytes, EscapedPath};
use crate::statistics::Kind;
use crate::statistics::convert::{ConvertError, ConvertOptions, From, GramForm, Values, convert, io_mode};

pub(super) fn command(args: StatisticsArgs) -> Result<ExitCode, Error> {
    match args.command {
        StatisticsCommand::Convert(args) => convert_command(&args),
    }
}

fn convert_command(args: &ConvertArgs) -> Result<ExitCode, Error> {
    use crate::cli::{ForeignKind, SourceFormat, StoredDtype, StoredValues};
    let options = ConvertOptions {
        from: match args.from {
            SourceFormat::Auto => From::Auto,
            SourceFormat::Reference => From::Reference,
            SourceFormat::Pmetal => From::Pmetal,
            SourceFormat::MatsStream => From::MatsStream,
        },
        kind: args.kind.map(|kind| match kind {
            ForeignKind::InputGram => Kind::InputGram,
            ForeignKind::OutputGram => Kind::OutputGram,
            ForeignKind::FisherDiagonal => Kind::FisherDiagonal,
            ForeignKind::FisherBlock => Kind::FisherBlock,
        }),
        values: args.values.map(|values| match values {
            StoredValues::Means => Values::Means,
            StoredValues::Sums => Values::Sums,
        }),
        tokens: args.tokens,
        examples: args.examples,
        renames: args.rename.clone(),
        form: match (args.packed, args.dense) {
            (true, _) => Some(GramForm::Packed),
            (_, true) => Some(GramForm::Dense),
            _ => None,
        },
        dtype: args.dtype.map(|dtype| match dtype {
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::Bf16 => Dtype::Bf16,
            StoredDtype::F16 => Dtype::F16,
        }),
        rank: args.rank.map(|rank| rank as usize),
        max_memory: args.max_memory.unwrap_or_else(default_max_memory),
        io: args.io.map_or_else(|| io_mode(&args.inputs), super::io_mode),
    };
    let signals = Signals::install();
    let summary = convert(&args.inputs, &args.out, &options, &signals.cancel).map_err(|error| {
        match (&error, signals.interrupted(None)) {
            (ConvertError::Cancelled, Some(interrupted)) => interrupted,
            _ => Error::Convert(error),
        }
    })?;
    for warning in &summary.warnings {
        tracing::warn!("{warning}");
    }
    let _ = writeln!(
        std::io::stderr(),
        "mats-stream: {}: {} statistics, {} aliases, {}",
        EscapedPath(&args.out),
        summary.statistics,
        summary.aliases,
        Bytes(summary.bytes)
    );
    Ok(ExitCode::SUCCESS)
}
