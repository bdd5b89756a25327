//! One file written over an older one of its name: all of it or nothing.
//!
//! For files that are made again at will (`report.html`, man pages). What a merge publishes never goes this
//! way: there a name that is taken is an error.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::error::WriteError;
use super::output_dir::{TEMPORARY_PREFIX, TEMPORARY_SUFFIX};
use super::side;

/// Temporary names tried: each that is taken was left by a process of our number that died.
const ATTEMPTS: u32 = 16;

/// Writes `bytes` as `name` in `directory`, replacing a file of that name, and gives back its path. The bytes
/// are on disk before the rename; on failure the older file is as it was and nothing else is left.
///
/// # Errors
/// [`WriteError`]: a directory that is missing or may not be written is bad input, the rest as for any write.
pub fn replace_file(directory: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, WriteError> {
    side::check_name(name)?;
    let path = directory.join(name);
    let (temporary, mut file) = create(directory, name)?;
    let need = bytes.len() as u64;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|source| WriteError::writing(&temporary, "write", need, source))
        .and_then(|()| {
            fs::rename(&temporary, &path)
                .map_err(|source| WriteError::claiming(&path, "replace the file", source))
        });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| path)
}

/// A new file of a name that no other process uses, so that two at work do not meet.
pub(super) fn create(directory: &Path, name: &str) -> Result<(PathBuf, fs::File), WriteError> {
    let mut attempt = 0;
    loop {
        let own = format!("{TEMPORARY_PREFIX}{name}-{}-{attempt}{TEMPORARY_SUFFIX}", std::process::id());
        let path = directory.join(own);
        match OpenOptions::new().write(true).create_new(true).mode(0o666).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt + 1 < ATTEMPTS => {
                attempt += 1;
            }
            Err(source) => {
                return Err(WriteError::claiming(&directory.join(name), "create the file", source));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        for content in ["one", "a longer one", ""] {
            let path = replace_file(at, "report.html", content.as_bytes()).unwrap();
            assert_eq!(path, at.join("report.html"));
            assert_eq!(fs::read_to_string(path).unwrap(), content);
            assert_eq!(names(at), ["report.html"]);
        }
    }

    #[test]
    fn leftovers_are_stepped_over() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let (left, _) = create(at, "x").unwrap();
        replace_file(at, "x", b"new").unwrap();
        assert!(left.exists());
        assert_eq!(fs::read(at.join("x")).unwrap(), b"new");
    }

    #[test]
    fn what_cannot_be_replaced_stays() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        fs::create_dir(at.join("x")).unwrap();
        fs::write(at.join("x/y"), "kept").unwrap();
        assert!(replace_file(at, "x", b"new").is_err());
        assert_eq!(names(at), ["x"]);
        let missing = replace_file(&at.join("absent"), "x", b"new").unwrap_err();
        assert_eq!(missing.exit_class().code(), 2);
        assert!(replace_file(at, "../x", b"new").is_err());
    }
}
