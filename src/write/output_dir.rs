//! The claim on an output directory: that it is empty and apart from every input, made if need be, and
//! locked.
//!
//! Nothing foreign is ever removed or overwritten: only our own temporary files of a run that died.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;

use super::error::{OverInput, WriteError};
use super::fault;
use super::side::{self, SideFile};
use crate::report::REPORT_FILE;
use crate::report::units::Escaped;

/// Held with `flock` while a run works in the directory.
pub(super) const LOCK_NAME: &str = ".mats-stream-lock";

/// What a run that ended early leaves for the next one.
pub(super) const JOURNAL_NAME: &str = ".mats-stream-journal";

/// Every temporary file begins so …
pub(super) const TEMPORARY_PREFIX: &str = ".mats-stream-";

/// … and ends so.
pub(super) const TEMPORARY_SUFFIX: &str = ".partial";

/// An output directory that this process alone may write to.
///
/// Dropped without [`OutputDir::publish`] or a writer's `finish`, it takes back its lock and every
/// directory that it made, if that is empty.
#[derive(Debug)]
pub struct OutputDir {
    /// As the user wrote it, for messages.
    shown: PathBuf,
    /// Canonical, so that a later change of the working directory does no harm.
    path: PathBuf,
    /// The open, locked file; `None` before and after.
    lock: Option<File>,
    /// The directories we made, outermost first.
    created: Vec<PathBuf>,
    /// Holds the journal of a run that ended early, to be continued.
    unfinished: bool,
}

impl OutputDir {
    /// Everything that [`OutputDir::claim`] refuses, without touching anything: for a plan, or before
    /// inputs are opened.
    ///
    /// # Errors
    /// As for `claim`.
    pub fn check(path: &Path, inputs: &[PathBuf]) -> Result<(), WriteError> {
        examine(path, inputs, false).map(|_| ())
    }

    /// As [`OutputDir::check`] for a run that continues what it finds.
    ///
    /// # Errors
    /// As for [`OutputDir::claim_unfinished`], but for files that are not the run's own.
    pub fn check_unfinished(path: &Path, inputs: &[PathBuf]) -> Result<(), WriteError> {
        examine(path, inputs, true).map(|_| ())
    }

    /// Removes what a run that died right after its last rename left in a directory that is complete. Best effort: both
    /// names promise nothing.
    pub fn tidy(path: &Path) {
        if !lock_is_held(path) {
            for name in [JOURNAL_NAME, LOCK_NAME] {
                let _ = fs::remove_file(path.join(name));
            }
        }
    }

    /// Claims `path` for this run.
    ///
    /// It must not exist (then it is made, parents too) or be an empty directory. Temporary files of a
    /// run that died are removed first. `inputs` are the files and directories that the run reads; those
    /// that do not exist are passed over, since whoever opens them says so better.
    ///
    /// # Errors
    /// [`WriteError::NotEmpty`], [`WriteError::NotADirectory`], [`WriteError::OverInput`] and
    /// [`WriteError::Unusable`] for a path that cannot serve, [`WriteError::Unfinished`] for one that holds a
    /// journal, [`WriteError::Locked`] while another process holds it.
    pub fn claim(path: &Path, inputs: &[PathBuf]) -> Result<Self, WriteError> {
        Self::claim_as(path, inputs, None)
    }

    /// As [`OutputDir::claim`], and a directory with a journal will do: [`OutputDir::unfinished`] then says so. `own`
    /// tells the final names of that run's output; they may be there already.
    ///
    /// # Errors
    /// As for `claim`; [`WriteError::NotEmpty`] if there is anything but the run's own files beside the journal.
    pub fn claim_unfinished(
        path: &Path,
        inputs: &[PathBuf],
        own: &dyn Fn(&str) -> bool,
    ) -> Result<Self, WriteError> {
        Self::claim_as(path, inputs, Some(own))
    }

    fn claim_as(
        path: &Path,
        inputs: &[PathBuf],
        own: Option<&dyn Fn(&str) -> bool>,
    ) -> Result<Self, WriteError> {
        let place = examine(path, inputs, own.is_some())?;
        // From here on a failure drops `claimed`, which takes back what was made.
        let mut claimed = Self {
            shown: path.to_owned(),
            path: place.existing,
            lock: None,
            created: Vec::new(),
            unfinished: false,
        };
        for component in place.missing {
            claimed.path.push(component);
            // The mode is cut by the umask, as for every program that makes directories.
            match fs::DirBuilder::new().mode(0o777).create(&claimed.path) {
                Ok(()) => claimed.created.push(claimed.path.clone()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && claimed.path.is_dir() => {}
                Err(error) => {
                    return Err(WriteError::claiming(path, "create the output directory", error));
                }
            }
        }
        claimed.lock = Some(lock(&claimed.path, path)?);
        // Looked at again now that nobody else may write here.
        let mut contents = survey(&claimed.path, path)?;
        if let (true, Some(own)) = (contents.journal, own) {
            contents.foreign.retain(|name| !own(&name.to_string_lossy()));
            if !contents.foreign.is_empty() {
                return Err(contents.not_empty(path));
            }
            // What is in the temporary files is for the writer to judge.
            claimed.unfinished = true;
            return Ok(claimed);
        }
        contents.refuse(path)?;
        for leftover in contents.leftovers {
            let file = claimed.path.join(leftover);
            tracing::info!(file = %file.display(), "removing a temporary file of a run that died");
            fs::remove_file(&file)
                .map_err(|error| WriteError::claiming(&file, "remove a leftover file", error))?;
        }
        Ok(claimed)
    }

    /// The directory, as a canonical path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it holds the journal of a run that ended early.
    pub fn unfinished(&self) -> bool {
        self.unfinished
    }

    /// The directory as the user wrote it.
    pub(super) fn shown(&self) -> &Path {
        &self.shown
    }

    /// Writes one file into the directory and keeps it, unlocked: for a directory that holds only other
    /// outputs.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be written; the directory is then as if dropped.
    pub fn publish(mut self, file: SideFile) -> Result<(), WriteError> {
        self.place(&file)?;
        self.keep();
        Ok(())
    }

    /// Writes one file into the directory; on failure it is not there.
    pub(super) fn place(&self, file: &SideFile) -> Result<(), WriteError> {
        side::check_name(&file.name)?;
        let temporary = side::stage(&self.path, file)?;
        let published = side::rename_free(&temporary, &self.path.join(&file.name)).and_then(|()| {
            sync_directory(&self.path).and_then(|()| self.sync_created()).inspect_err(|_| {
                let _ = fs::remove_file(self.path.join(&file.name));
            })
        });
        if published.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        published
    }

    /// Makes the directories that we made durable: each is an entry of its parent.
    pub(super) fn sync_created(&self) -> Result<(), WriteError> {
        self.created.iter().filter_map(|made| made.parent()).try_for_each(sync_directory)
    }

    /// From now on a drop only unlocks.
    pub(super) fn keep(&mut self) {
        self.created.clear();
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            // Removed while still locked: whoever waits for the lock finds the name gone and starts
            // over.
            let _ = fs::remove_file(self.path.join(LOCK_NAME));
            drop(lock);
        }
        // Only empty directories go: somebody else's file in one of them keeps it and its parents.
        for directory in self.created.iter().rev() {
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}

/// Makes renames and new names in `directory` durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), WriteError> {
    fault::point("directory.fsync")
        .and_then(|()| File::open(directory))
        .and_then(|handle| handle.sync_all())
        .map_err(|source| WriteError::writing(directory, "fsync the output directory", 4096, source))
}

/// An output path split where it stops existing.
struct Place {
    /// Canonical.
    existing: PathBuf,
    /// Plain names, outermost first.
    missing: Vec<OsString>,
}

impl Place {
    fn full(&self) -> PathBuf {
        let mut path = self.existing.clone();
        path.extend(&self.missing);
        path
    }
}

/// All checks that need no lock.
fn examine(path: &Path, inputs: &[PathBuf], resume: bool) -> Result<Place, WriteError> {
    let place = resolve(path)?;
    refuse_over_inputs(path, &place, inputs)?;
    if !place.missing.is_empty() {
        return Ok(place);
    }
    let metadata = fs::metadata(&place.existing)
        .map_err(|error| WriteError::claiming(path, "look at the output path", error))?;
    if !metadata.is_dir() {
        let found =
            if metadata.is_file() { "a regular file" } else { "neither a directory nor a regular file" };
        return Err(WriteError::NotADirectory { path: path.to_owned(), found });
    }
    let contents = survey(&place.existing, path)?;
    // Another run that is just publishing has final names in place: it says "wait", not "not empty".
    if contents.lock && lock_is_held(&place.existing) {
        return Err(WriteError::Locked { path: path.to_owned() });
    }
    if !(resume && contents.journal) {
        contents.refuse(path)?;
    }
    Ok(place)
}

fn resolve(path: &Path) -> Result<Place, WriteError> {
    let refuse = |error| WriteError::claiming(path, "resolve the output path", error);
    let absolute = std::path::absolute(path).map_err(refuse)?;
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match fs::canonicalize(existing) {
            Ok(real) => {
                missing.reverse();
                return Ok(Place { existing: real, missing });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refuse(error)),
        }
        // There is something, but it leads nowhere.
        if existing.is_symlink() {
            return Err(WriteError::NotADirectory {
                path: path.to_owned(),
                found: "a symbolic link to nothing",
            });
        }
        match (existing.components().next_back(), existing.parent()) {
            (Some(Component::Normal(name)), Some(parent)) => {
                missing.push(name.to_owned());
                existing = parent;
            }
            // `missing/..`: nothing to go up from.
            _ => return Err(refuse(io::ErrorKind::NotFound.into())),
        }
    }
}

/// Compares canonical paths, and the identities of directories: a bind mount has two canonical paths.
fn refuse_over_inputs(path: &Path, place: &Place, inputs: &[PathBuf]) -> Result<(), WriteError> {
    let output = place.full();
    let above_output = identities(&place.existing);
    let output_itself = if place.missing.is_empty() { above_output.first().copied() } else { None };
    for input in inputs {
        let Ok(real) = fs::canonicalize(input) else {
            continue;
        };
        let above_input = identities(&real);
        let Some(&input_itself) = above_input.first() else {
            continue;
        };
        let relation = if output == real || output_itself == Some(input_itself) {
            OverInput::Equal
        } else if output.starts_with(&real) || above_output.contains(&input_itself) {
            OverInput::Inside
        } else if real.starts_with(&output) || output_itself.is_some_and(|id| above_input.contains(&id)) {
            OverInput::Around
        } else {
            continue;
        };
        return Err(WriteError::OverInput { path: path.to_owned(), input: input.clone(), relation });
    }
    Ok(())
}

/// Device and inode of a path and of everything above it, innermost first.
fn identities(path: &Path) -> Vec<(u64, u64)> {
    path.ancestors().filter_map(|ancestor| fs::metadata(ancestor).ok()).map(|m| (m.dev(), m.ino())).collect()
}

/// What a directory holds, as far as it matters here.
#[derive(Default)]
struct Contents {
    lock: bool,
    journal: bool,
    /// Our temporary files.
    leftovers: Vec<OsString>,
    /// Everything else.
    foreign: Vec<OsString>,
}

impl Contents {
    /// Anything but leftovers that nobody can continue.
    fn refuse(&self, path: &Path) -> Result<(), WriteError> {
        let finished = self.foreign.iter().any(|name| name == REPORT_FILE);
        if self.journal && !finished {
            return Err(WriteError::Unfinished { path: path.to_owned() });
        }
        if self.foreign.is_empty() && !self.journal { Ok(()) } else { Err(self.not_empty(path)) }
    }

    fn not_empty(&self, path: &Path) -> WriteError {
        const SHOWN: usize = 4;
        let mut foreign: Vec<&OsString> = self.foreign.iter().collect();
        foreign.sort_unstable();
        let names: Vec<String> = foreign
            .iter()
            .take(SHOWN)
            .map(|name| format!("`{}`", Escaped(&name.to_string_lossy())))
            .collect();
        let mut holds = names.join(", ");
        if self.foreign.len() > SHOWN {
            holds.push_str(&format!(" and {} more", self.foreign.len() - SHOWN));
        }
        if self.lock || !self.leftovers.is_empty() {
            holds.push_str(", left by a run that died while it published");
        }
        WriteError::NotEmpty { path: path.to_owned(), holds }
    }
}

fn survey(directory: &Path, shown: &Path) -> Result<Contents, WriteError> {
    let refuse = |error| WriteError::claiming(shown, "list the output directory", error);
    let mut contents = Contents::default();
    for entry in fs::read_dir(directory).map_err(refuse)? {
        let entry = entry.map_err(refuse)?;
        let name = entry.file_name();
        // Ours are regular files; a link or a directory of that name is somebody else's.
        let regular = entry.file_type().is_ok_and(|kind| kind.is_file());
        let text = name.to_string_lossy();
        if regular && text == LOCK_NAME {
            contents.lock = true;
        } else if regular && text == JOURNAL_NAME {
            contents.journal = true;
        } else if regular && text.starts_with(TEMPORARY_PREFIX) && text.ends_with(TEMPORARY_SUFFIX) {
            contents.leftovers.push(name);
        } else {
            contents.foreign.push(name);
        }
    }
    Ok(contents)
}

/// Whether another process holds the lock just now.
fn lock_is_held(directory: &Path) -> bool {
    // Opened without creating, so that asking leaves no trace; locked shared, so that two who ask do not
    // see each other.
    match open_lock(directory, false) {
        Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

fn open_lock(directory: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(create)
        .create(create)
        .truncate(false)
        .mode(0o666)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(directory.join(LOCK_NAME))
}

fn lock(directory: &Path, shown: &Path) -> Result<File, WriteError> {
    let refuse = |error| WriteError::claiming(shown, "lock the output directory", error);
    loop {
        let file = open_lock(directory, true).map_err(refuse)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(WriteError::Locked { path: shown.to_owned() });
            }
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(directory = %shown.display(), "no locks on this file system: keep other runs away");
            }
            Err(TryLockError::Error(error)) => return Err(refuse(error)),
        }
        // A run that ended between our open and our lock took the name away: then we hold a lock on
        // nothing.
        let held = file.metadata().map_err(refuse)?;
        match fs::symlink_metadata(directory.join(LOCK_NAME)) {
            Ok(named) if (named.dev(), named.ino()) == (held.dev(), held.ino()) => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refuse(error)),
        }
    }
}

#[cfg(test)]
mod tests;
