//! What a run tells: its record (`merge_report.json`), its page (`report.html`), its model card, its progress
//! line, its peak memory.
//!
//! The engine fills a [`RunReport`] and drives a [`Progress`]; `verify` and `report` read the record
//! back. Nothing here computes a result or opens a tensor, and nothing here decides an exit code.

mod card;
pub mod html;
mod json;
mod peak;
mod progress;
mod sweep;
pub mod units;

pub use card::{CardModel, ModelCard};
pub use json::{
    FILE_NAME as REPORT_FILE, InputFileRecord, InputRecord, OutputFileRecord, ParameterReport, ReportError,
    RoundReport, RunReport, RunSettings, SetupReport, SideRecord, StepReport, UnmergedRecord, read_record,
};
pub use peak::{PeakMemory, Sampling, anonymous_bytes, peak_anonymous_bytes, peak_memory, peak_rss_bytes};
pub use progress::{Progress, ProgressMode};
pub use sweep::{FILE_NAME as SWEEP_FILE, SweepReport, SweepRun};
