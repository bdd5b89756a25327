//! The output directory, from the claim to the last rename.
//!
//! The engine claims a directory ([`OutputDir`]), opens a [`CheckpointWriter`] on a planned layout,
//! writes tensor bytes at their places from any thread, and finishes. Until then everything carries a
//! temporary name; a run that fails leaves nothing behind, or a [`journal`] with which another continues
//! it. What a name in the directory promises (contract §4):
//!
//! 1. side files (config, tokenizer, model card), then shards: each complete and on disk before its
//!    rename;
//! 2. the index: every shard has its final name;
//! 3. `merge_report.json`: the directory is complete.
//!
//! A single file that is no checkpoint goes through a [`NewFile`], under the same rule. Solves that take long keep their
//! states beside the journal (`snapshot`). A sweep's checkpoints go through a [`SweepDir`]: each in its own directory, all
//! renamed at the end.
//!
//! Output is never mapped into memory: a full disk has to be an error, not a signal. Nothing here
//! computes, encodes a dtype or decides a layout.

pub mod checksum;
mod coverage;
mod direct;
mod error;
pub(crate) mod fault;
pub mod journal;
mod new_file;
mod output_dir;
mod replace;
mod shard;
mod side;
mod snapshot;
mod space;
mod sweep_dir;

pub use checksum::{Checksum, PieceChecksums};
pub use direct::BlockBuffer;
pub use error::{ExitClass, OverInput, WriteError};
pub use new_file::NewFile;
pub use output_dir::OutputDir;
pub use replace::replace_file;
pub use shard::{CheckpointWriter, Share, WrittenCheckpoint, WrittenFile};
pub use side::{SideContent, SideFile, copy_side_files, patch_config, torch_dtype_name};
pub use snapshot::SolvePlace;
pub use sweep_dir::SweepDir;
