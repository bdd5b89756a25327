//! What can go wrong while writing, and which exit code it means.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use thiserror::Error;

use super::space::free_bytes;
use crate::report::units::{Bytes, Escaped, EscapedPath};

/// The exit codes that writing can end in (contract §1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitClass {
    /// 2: the output path, an input or a flag is wrong; nothing was touched.
    BadInput,
    /// 5: the file system or the quota is full.
    NoSpace,
    /// 6: any other input or output error.
    Io,
    /// 75: another run holds the directory; may be retried.
    Locked,
}

impl ExitClass {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::BadInput => 2,
            Self::NoSpace => 5,
            Self::Io => 6,
            Self::Locked => 75,
        }
    }
}

/// How an output directory lies to an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverInput {
    /// It is the input.
    Equal,
    /// It lies somewhere below the input.
    Inside,
    /// The input lies somewhere below it.
    Around,
}

impl fmt::Display for OverInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Equal => "is",
            Self::Inside => "lies inside",
            Self::Around => "contains",
        })
    }
}

/// An error of this module. The operating system's reason is the `source()`, not part of the text.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The output path exists and is no directory.
    #[error("{}: the output path is {found} (expected an empty directory, or nothing)", EscapedPath(path))]
    NotADirectory {
        /// The output path.
        path: PathBuf,
        /// What is there: "a regular file", …
        found: &'static str,
    },

    /// The output directory holds something that is not ours to remove.
    #[error(
        "{}: the output directory is not empty: it holds {holds} (expected an empty directory, or none); \
         choose another one, or empty it yourself",
        EscapedPath(path)
    )]
    NotEmpty {
        /// The output directory.
        path: PathBuf,
        /// The first names, and how many more.
        holds: String,
    },

    /// The output directory holds a merge that ended early, and nobody said to continue it.
    #[error(
        "{}: holds a merge that did not finish; `--resume` continues it (the same command with that flag), or empty \
         the directory yourself",
        EscapedPath(path)
    )]
    Unfinished {
        /// The output directory.
        path: PathBuf,
    },

    /// The merge that ended early, or the one that is complete, is another one.
    #[error(
        "{}: cannot resume: the merge in this directory has {what}; choose another directory, or empty this one \
         yourself",
        EscapedPath(path)
    )]
    OtherRun {
        /// The output directory.
        path: PathBuf,
        /// In what they differ.
        what: String,
    },

    /// The output file's name is taken.
    #[error(
        "{}: is {found} already (expected a name that is free); choose another one, or remove it",
        EscapedPath(path)
    )]
    Exists {
        /// The output file.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },

    /// The file system has no room for so many files.
    #[error("{}: no space: need {need} new files, have room for {have}", EscapedPath(path))]
    NoFiles {
        /// The output directory.
        path: PathBuf,
        /// Files to be made.
        need: u64,
        /// Files that the file system still takes.
        have: u64,
    },

    /// The output would lie over an input.
    #[error(
        "{}: the output directory {relation} the input {} (expected a place apart from every input)",
        EscapedPath(path),
        EscapedPath(input)
    )]
    OverInput {
        /// The output directory.
        path: PathBuf,
        /// The input.
        input: PathBuf,
        /// How they lie to each other.
        relation: OverInput,
    },

    /// The output directory cannot be made or used: a matter of the path or of permissions.
    #[error("{}: cannot {doing} (expected a writable place for the output)", EscapedPath(path))]
    Unusable {
        /// The path concerned.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },

    /// Another process holds the output directory.
    #[error(
        "{}: another run holds this output directory; wait for it or choose another directory",
        EscapedPath(path)
    )]
    Locked {
        /// The output directory.
        path: PathBuf,
    },

    /// The file system or the quota is full, or would be.
    #[error(
        "{}: no space: need {}, have {}",
        EscapedPath(path),
        Bytes(*need),
        have.map_or_else(|| "an unknown amount".to_owned(), |have| Bytes(have).to_string())
    )]
    NoSpace {
        /// The file or directory concerned.
        path: PathBuf,
        /// Bytes still to be allocated.
        need: u64,
        /// Bytes free to us, as far as the system says. A quota may be tighter.
        have: Option<u64>,
        /// The operating system's reason, unless we found out before asking it to write.
        source: Option<io::Error>,
    },

    /// Any other refusal of the operating system.
    #[error("{}: cannot {doing}", EscapedPath(path))]
    Io {
        /// The path concerned.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },

    /// Something took a final name while the run was under way.
    #[error(
        "{}: appeared during the run (expected the name to be free); nothing was overwritten",
        EscapedPath(path)
    )]
    NameTaken {
        /// The final name.
        path: PathBuf,
    },

    /// A temporary file is no longer the one we made.
    #[error(
        "{}: was removed or replaced during the run (expected our own temporary file)",
        EscapedPath(path)
    )]
    TemporaryReplaced {
        /// The temporary file.
        path: PathBuf,
    },

    /// An earlier fsync failed. Asking again could succeed without the data being on disk, so we do not.
    #[error("{}: an earlier fsync failed, so its data may be lost; run again", EscapedPath(path))]
    NotDurable {
        /// The shard.
        path: PathBuf,
    },

    /// A side file of the base model cannot be looked at or opened.
    #[error(
        "{}: cannot be copied beside the weights (expected a file that can be read, or none)",
        EscapedPath(path)
    )]
    SideFileUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// A side file of the base model is too long to be one.
    #[error("{}: {} is too long for a file to copy beside the weights (at most {})",
        EscapedPath(path), Bytes(*bytes), Bytes(*limit))]
    SideFileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },

    /// A side file's length changed between the listing and the copy.
    #[error("{}: changed while it was copied (got {got} bytes, expected {expected})", EscapedPath(path))]
    SideFileChanged {
        /// The file.
        path: PathBuf,
        /// Bytes copied.
        got: u64,
        /// Bytes listed.
        expected: u64,
    },

    /// A side file's name is not one plain component, or is taken.
    #[error("side file `{}`: {why} (expected a plain file name of its own)", Escaped(name))]
    BadSideName {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },

    /// The engine wrote outside a tensor: a defect of ours.
    #[error(
        "internal error: write of {length} bytes at {offset} of tensor `{}`, which has {bytes}",
        Escaped(tensor)
    )]
    OutOfRange {
        /// The tensor's name, or its number where there is none.
        tensor: String,
        /// Offset within the tensor.
        offset: u64,
        /// Bytes to write.
        length: u64,
        /// The tensor's size.
        bytes: u64,
    },

    /// The engine finished too early: a defect of ours.
    #[error(
        "internal error: tensor `{}` has {written} of {bytes} bytes ({others} more tensors are incomplete)",
        Escaped(tensor)
    )]
    Incomplete {
        /// The first incomplete tensor.
        tensor: String,
        /// Bytes written.
        written: u64,
        /// Bytes expected.
        bytes: u64,
        /// How many tensors are incomplete beside it.
        others: usize,
    },
}

impl WriteError {
    /// The exit code's class.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::NotADirectory { .. }
            | Self::NotEmpty { .. }
            | Self::Unfinished { .. }
            | Self::OtherRun { .. }
            | Self::Exists { .. }
            | Self::OverInput { .. }
            | Self::Unusable { .. }
            | Self::SideFileTooLarge { .. }
            | Self::SideFileUnreadable { .. }
            | Self::BadSideName { .. } => ExitClass::BadInput,
            Self::NoSpace { .. } | Self::NoFiles { .. } => ExitClass::NoSpace,
            Self::Locked { .. } => ExitClass::Locked,
            Self::Io { .. }
            | Self::NameTaken { .. }
            | Self::TemporaryReplaced { .. }
            | Self::NotDurable { .. }
            | Self::SideFileChanged { .. }
            | Self::OutOfRange { .. }
            | Self::Incomplete { .. } => ExitClass::Io,
        }
    }

    /// A refusal while the output is claimed: the path's own faults and missing permissions are bad
    /// input.
    pub(super) fn claiming(path: &Path, doing: &'static str, source: io::Error) -> Self {
        use io::ErrorKind as Kind;
        let kind = source.kind();
        let by_path = matches!(
            kind,
            Kind::NotFound
                | Kind::PermissionDenied
                | Kind::ReadOnlyFilesystem
                | Kind::NotADirectory
                | Kind::AlreadyExists
                | Kind::InvalidInput
                | Kind::InvalidFilename
        ) || Errno::from_io_error(&source) == Some(Errno::LOOP);
        if by_path {
            Self::Unusable { path: path.to_owned(), doing, source }
        } else {
            // A directory entry takes a block at most.
            Self::writing(path, doing, 4096, source)
        }
    }

    /// A refusal while `need` bytes were to be written at `path`.
    pub(super) fn writing(path: &Path, doing: &'static str, need: u64, source: io::Error) -> Self {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            // What the file system has free says nothing about a quota.
            let have = if source.kind() == io::ErrorKind::QuotaExceeded { None } else { free_bytes(path) };
            return Self::NoSpace { path: path.to_owned(), need, have, source: Some(source) };
        }
        Self::Io { path: path.to_owned(), doing, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_what_it_needs_and_has() {
        let full = || io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
        let error = WriteError::writing(Path::new("/"), "write", 3 << 30, full());
        assert_eq!(error.exit_class().code(), 5);
        assert!(error.to_string().starts_with("/: no space: need 3.0 GiB, have "), "{error}");
        let quota = io::Error::from_raw_os_error(Errno::DQUOT.raw_os_error());
        let quota = WriteError::claiming(Path::new("/"), "lock", quota);
        assert_eq!(quota.exit_class(), ExitClass::NoSpace);
        assert!(quota.to_string().ends_with("have an unknown amount"), "{quota}");
        let early = WriteError::NoSpace { path: "x".into(), need: 1, have: None, source: None };
        assert_eq!(early.to_string(), "x: no space: need 1 B, have an unknown amount");
    }

    #[test]
    fn claiming_and_writing_differ_on_permissions() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(WriteError::claiming(Path::new("x"), "lock", denied()).exit_class().code(), 2);
        assert_eq!(WriteError::writing(Path::new("x"), "write", 1, denied()).exit_class().code(), 6);
        let eio = io::Error::from_raw_os_error(Errno::IO.raw_os_error());
        assert_eq!(WriteError::claiming(Path::new("x"), "lock", eio).exit_class().code(), 6);
    }

    #[test]
    fn messages_stay_on_one_line() {
        let error = WriteError::NotEmpty { path: "a\nb".into(), holds: "`x`".into() };
        assert!(!error.to_string().contains('\n'));
    }
}
