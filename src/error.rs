//! The crate's error: what went wrong and which exit code that is.

use crate::config::ConfigError;
use crate::merge::MergeError;
use crate::plan::PlanError;
use crate::read::ReadError;
use crate::report::ReportError;
use crate::statistics::StatisticsError;
use crate::tokenizer::TokenizerError;
use crate::view::AdapterError;
use crate::write::WriteError;

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A checkpoint.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Vocabularies.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A slice or module that a model does not have.
    #[error("{config}:{line}: {key}: {what}")]
    Section {
        /// The config.
        config: String,
        /// Its line.
        line: usize,
        /// The slice or module.
        key: String,
        /// What was found and expected.
        what: String,
    },
    /// A statistics file.
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A block.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The output.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A run's record.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A flag whose value makes no sense here.
    #[error("{flag}: {what}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong and what would do.
        what: String,
    },
    /// stdout could not be written.
    #[error("stdout")]
    Stdout {
        /// Why.
        source: std::io::Error,
    },
    /// A signal ended the run.
    #[error(
        "interrupted by signal {signal}; nothing was published: `--resume` with the same command continues in {}",
        crate::report::units::EscapedPath(out)
    )]
    Interrupted {
        /// Its number.
        signal: i32,
        /// The output directory.
        out: std::path::PathBuf,
    },
}

impl Error {
    /// The exit code that the command line's contract gives this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Read(error)
            | Self::Adapter(AdapterError::Read(error))
            | Self::Tokenizer(TokenizerError::Read(error)) => error.exit_class().code(),
            Self::Config(_)
            | Self::Report(_)
            | Self::Flag { .. }
            | Self::Adapter(_)
            | Self::Tokenizer(_)
            | Self::Section { .. } => 2,
            Self::Statistics(error) => error.exit_class().code(),
            Self::Plan(PlanError::Merge(error)) | Self::Merge(error) => merge_code(error),
            Self::Plan(_) => 2,
            Self::Write(error) => error.exit_class().code(),
            Self::Stdout { .. } => 6,
            Self::Interrupted { signal, .. } => 128u8.saturating_add(u8::try_from(*signal).unwrap_or(0)),
        }
    }

    /// The whole chain on one line: `WHERE: WHAT: why`.
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            let text = error.to_string();
            // A transparent wrapper says the same again.
            if !line.ends_with(&text) {
                line += ": ";
                line += &text;
            }
            source = error.source();
        }
        line.replace(['\n', '\r'], " ")
    }
}

fn merge_code(error: &MergeError) -> u8 {
    match error {
        MergeError::Read(error) => error.exit_class().code(),
        MergeError::Statistics(error) => error.exit_class().code(),
        MergeError::Write(error) => error.exit_class().code(),
        _ => 2,
    }
}
