//! One new file of any size: written by position under a temporary name, complete under its own or not there.
//!
//! For converted statistics. Unlike [`super::replace_file`] it holds nothing in memory, reserves its space first and
//! never replaces anything.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::error::WriteError;
use super::{fault, output_dir, replace, side, space};

/// A file on its way to its name. Dropped without [`NewFile::finish`], it leaves nothing.
#[derive(Debug)]
pub struct NewFile {
    /// The final name.
    path: PathBuf,
    directory: PathBuf,
    temporary: PathBuf,
    file: File,
    bytes: u64,
    published: bool,
}

impl NewFile {
    /// Makes the temporary file beside `path` and reserves `bytes` for it.
    ///
    /// # Errors
    /// [`WriteError::Exists`] if there is something of that name; [`WriteError::Unusable`] for a directory that is missing
    /// or may not be written; [`WriteError::NoSpace`].
    pub fn create(path: &Path, bytes: u64) -> Result<Self, WriteError> {
        Self::check(path)?;
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let (temporary, file) = replace::create(&directory, &name)?;
        let new = Self { path: path.to_owned(), directory, temporary, file, bytes, published: false };
        fault::point("file.reserve")
            .map_err(|source| WriteError::writing(&new.temporary, "reserve space", bytes, source))
            .and_then(|()| space::reserve(&new.temporary, &new.file, bytes, bytes))?;
        Ok(new)
    }

    /// What [`NewFile::create`] refuses of the path itself, without touching anything.
    ///
    /// # Errors
    /// [`WriteError::Exists`], and [`WriteError::Unusable`] for a path that names no file.
    pub fn check(path: &Path) -> Result<(), WriteError> {
        if path.file_name().is_none() {
            let source = std::io::ErrorKind::InvalidFilename.into();
            return Err(WriteError::Unusable { path: path.to_owned(), doing: "write a file", source });
        }
        match fs::symlink_metadata(path) {
            Ok(found) => {
                let found = if found.is_dir() { "a directory" } else { "a file" };
                Err(WriteError::Exists { path: path.to_owned(), found })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(WriteError::claiming(path, "look at the output path", source)),
        }
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`] and [`WriteError::Io`].
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        fault::point("file.write")
            .and_then(|()| self.file.write_all_at(bytes, offset))
            .map_err(|source| WriteError::writing(&self.temporary, "write", self.bytes, source))
    }

    /// Gives the file its name once it is on disk, and waits until the name is, too.
    ///
    /// # Errors
    /// [`WriteError::NameTaken`] if something took the name meanwhile; those of writing. The temporary file is then
    /// removed.
    pub fn finish(mut self) -> Result<(), WriteError> {
        fault::point("file.fsync")
            .and_then(|()| self.file.sync_all())
            .map_err(|source| WriteError::writing(&self.temporary, "fsync", self.bytes, source))?;
        side::rename_free(&self.temporary, &self.path)?;
        self.published = true;
        output_dir::sync_directory(&self.directory)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_file(&self.temporary);
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
    fn appears_when_finished_and_leaves_nothing_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let file = NewFile::create(&path, 4).unwrap();
        file.write_at(2, b"cd").unwrap();
        assert!(!path.exists());
        drop(file);
        assert!(names(directory.path()).is_empty());

        let file = NewFile::create(&path, 4).unwrap();
        file.write_at(2, b"cd").unwrap();
        file.write_at(0, b"ab").unwrap();
        file.finish().unwrap();
        assert_eq!(names(directory.path()), ["x.safetensors"]);
        assert_eq!(fs::read(&path).unwrap(), b"abcd");
    }

    #[test]
    fn replaces_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        fs::write(&path, "kept").unwrap();
        assert_eq!(NewFile::create(&path, 1).unwrap_err().exit_class().code(), 2);
        let other = directory.path().join("y");
        let file = NewFile::create(&other, 1).unwrap();
        fs::write(&other, "meanwhile").unwrap();
        assert!(matches!(file.finish(), Err(WriteError::NameTaken { .. })));
        assert_eq!(fs::read(&other).unwrap(), b"meanwhile");
        assert_eq!(names(directory.path()).len(), 2);
        for bad in ["absent/x", "x/y", ".."] {
            assert_eq!(NewFile::create(&directory.path().join(bad), 1).unwrap_err().exit_class().code(), 2);
        }
    }
}
