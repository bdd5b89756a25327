//! One input file: opened safely, read by ranges, watched for changes.
//!
//! [`super::Checkpoint`] and the statistics module own [`InputFile`]s; the engine asks them for ranges,
//! announces what it will read next and gives back what it has read. A file is mapped (no descriptor stays
//! open) or read with `pread` through a bounded pool, with the same bytes out of both. This module never
//! interprets the bytes and never writes.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::ReadError;
use super::mmap::Mapping;
use super::pread::{PoolSlot, read_exact_at};

/// How the bytes of an input reach the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoMode {
    /// Shared read-only mappings: no copies, no descriptors. For local file systems.
    Mmap,
    /// Positioned reads into the caller's buffer: an I/O error is an error and not a signal. For network file
    /// systems.
    Pread,
}

impl IoMode {
    /// The mode that suits the file system of `path`: [`IoMode::Pread`] where a server or another process
    /// stands behind it (NFS, SMB, FUSE, Lustre, …), since an error there would end a mapped reader with a
    /// signal.
    pub fn for_path(path: &Path) -> Self {
        #[cfg(target_os = "linux")]
        {
            const REMOTE: [u32; 12] = [
                0x6969,      // NFS
                0x517B,      // SMB
                0xFE53_4D42, // SMB2
                0xFF53_4D42, // CIFS
                0x6573_5546, // FUSE
                0x0BD0_0BD0, // Lustre
                0x00C3_6400, // Ceph
                0x0102_1997, // 9p
                0x4750_4653, // GPFS
                0x1983_0326, // BeeGFS
                0x0116_1970, // GFS2
                0x5346_414F, // AFS
            ];
            if let Ok(found) = rustix::fs::statfs(path) {
                // The magic numbers are 32 bits wide, the field's type depends on the architecture.
                if REMOTE.contains(&(found.f_type as u32)) {
                    return Self::Pread;
                }
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = path;
        Self::Mmap
    }
}

/// What identifies a file and its state, as far as the file system tells. Times are nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change of the contents.
    pub mtime_ns: i64,
    /// Time of the last change of the contents or of the inode.
    pub ctime_ns: i64,
}

impl Fingerprint {
    fn of(metadata: &Metadata) -> Self {
        let ns = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            len: metadata.len(),
            mtime_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// In words what differs, `None` if nothing does.
    fn difference(&self, now: &Self) -> Option<String> {
        if (self.dev, self.ino) != (now.dev, now.ino) {
            Some("replaced by another file".to_owned())
        } else if self.len != now.len {
            Some(format!("size: got {} bytes, expected {}", now.len, self.len))
        } else if self.mtime_ns != now.mtime_ns {
            Some("modification time differs".to_owned())
        } else if self.ctime_ns != now.ctime_ns {
            Some("status change time differs".to_owned())
        } else {
            None
        }
    }
}

#[derive(Debug)]
enum Backend {
    Empty,
    Mapped(Mapping),
    Pooled(PoolSlot),
}

/// A regular file whose bytes can be read by ranges, from any number of threads.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    fingerprint: Fingerprint,
    backend: Backend,
    /// Bytes that one read-ahead request may ask for, found when first needed.
    readahead: OnceLock<u64>,
}

impl InputFile {
    /// Opens a regular file. Symlinks are followed, as the snapshots of HF caches consist of them.
    ///
    /// [`IoMode::Mmap`] falls back to reads where the file system supports no mappings.
    ///
    /// # Errors [`ReadError::Open`] if the path is missing or unopenable, [`ReadError::NotRegular`], without
    /// waiting, for FIFOs, sockets, devices and directories, [`ReadError::Io`] if the kernel refuses a
    /// mapping.
    pub fn open(path: &Path, io: IoMode) -> Result<Self, ReadError> {
        let (file, fingerprint) = open_regular(path)?;
        let backend = match (io, usize::try_from(fingerprint.len)) {
            (_, Ok(0)) => Backend::Empty,
            (IoMode::Mmap, Ok(len)) => match Mapping::new(&file, len) {
                Ok(mapping) => Backend::Mapped(mapping),
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
                    tracing::debug!(path = %path.display(), "no mappings on this file system: reading instead");
                    Backend::pooled(file)
                }
                Err(source) => {
                    return Err(ReadError::Io { path: path.to_owned(), doing: "mapping", source });
                }
            },
            _ => Backend::pooled(file),
        };
        Ok(Self { path: path.to_owned(), fingerprint, backend, readahead: OnceLock::new() })
    }

    /// The path as it was given to [`InputFile::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub fn len(&self) -> u64 {
        self.fingerprint.len
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.fingerprint.len == 0
    }

    /// The file's identity and state when it was opened.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The mode in effect, after a possible fallback.
    pub fn io_mode(&self) -> IoMode {
        match self.backend {
            Backend::Mapped(_) => IoMode::Mmap,
            Backend::Empty | Backend::Pooled(_) => IoMode::Pread,
        }
    }

    /// The addresses of the mapping, so that a signal handler can name the file; `None` if it is not mapped.
    pub fn mapped_addresses(&self) -> Option<Range<usize>> {
        match &self.backend {
            Backend::Mapped(mapping) => Some(mapping.addresses()),
            Backend::Empty | Backend::Pooled(_) => None,
        }
    }

    /// The bytes of `range`: a slice of the mapping, or `scratch` filled by reads.
    ///
    /// `scratch` only ever grows, to the longest range asked for; it stays empty for mapped files.
    ///
    /// # Errors [`ReadError::RangePastEnd`] for a range that is not inside the file, [`ReadError::Changed`]
    /// if the file shrank, vanished or was replaced, [`ReadError::Io`] for what the operating system reports.
    pub fn bytes<'a>(&'a self, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], ReadError> {
        let (start, len) = self.checked(&range)?;
        match &self.backend {
            Backend::Empty => Ok(&[]),
            Backend::Mapped(mapping) => Ok(&mapping.bytes()[start..start + len]),
            Backend::Pooled(slot) => {
                if scratch.len() < len {
                    scratch.resize(len, 0);
                }
                let out = &mut scratch[..len];
                let file = slot.get(|| self.reopen())?;
                match read_exact_at(&file, range.start, out) {
                    Ok(()) => Ok(out),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ReadError::Changed {
                        path: self.path.clone(),
                        what: format!("got an end before byte {}, expected {} bytes", range.end, self.len()),
                    }),
                    Err(source) => Err(ReadError::Io { path: self.path.clone(), doing: "reading", source }),
                }
            }
        }
    }

    /// Asks the kernel to read `range` ahead, without waiting. Never fails: it is advice.
    pub fn will_need(&self, range: Range<u64>) {
        let Ok((start, len)) = self.checked(&range) else {
            return;
        };
        if len == 0 {
            return;
        }
        // The kernel cuts each request at its read-ahead window, so one large request would fetch only its
        // beginning.
        let step = *self.readahead.get_or_init(|| readahead_bytes(self.fingerprint.dev));
        let mut at = start as u64;
        match &self.backend {
            Backend::Empty => {}
            Backend::Mapped(mapping) => {
                while at < range.end {
                    mapping.will_need(at as usize, step.min(range.end - at) as usize);
                    at += step;
                }
            }
            Backend::Pooled(slot) => {
                let Ok(file) = slot.get(|| self.reopen()) else {
                    return;
                };
                while at < range.end {
                    fadvise(&file, at, step.min(range.end - at), Advice::WillNeed);
                    at += step;
                }
            }
        }
    }

    /// Gives back `range`: its pages leave this process's resident set and, with `drop_cache`, those that lie
    /// wholly inside leave the page cache. Reading them again is allowed, also by others at this moment.
    /// Never fails: it is advice.
    pub fn release(&self, range: Range<u64>, drop_cache: bool) {
        let Ok((start, len)) = self.checked(&range) else {
            return;
        };
        if len == 0 {
            return;
        }
        match &self.backend {
            Backend::Empty => {}
            Backend::Mapped(mapping) => {
                mapping.dont_need(start, len);
                if drop_cache && let Ok(file) = self.reopen() {
                    fadvise(&file, range.start, len as u64, Advice::DontNeed);
                }
            }
            Backend::Pooled(slot) => {
                if drop_cache && let Ok(file) = slot.get(|| self.reopen()) {
                    fadvise(&file, range.start, len as u64, Advice::DontNeed);
                }
            }
        }
    }

    /// Compares the file under this path with the one that was opened.
    ///
    /// # Errors
    /// [`ReadError::Changed`] if it vanished or differs in identity, size or times.
    pub fn check_unchanged(&self) -> Result<(), ReadError> {
        let what = match std::fs::metadata(&self.path) {
            Ok(metadata) => self.fingerprint.difference(&Fingerprint::of(&metadata)),
            Err(error) => Some(format!("no longer there: {error}")),
        };
        match what {
            None => Ok(()),
            Some(what) => Err(ReadError::Changed { path: self.path.clone(), what }),
        }
    }

    /// Start and length as indexes, if the range lies inside the file.
    fn checked(&self, range: &Range<u64>) -> Result<(usize, usize), ReadError> {
        if range.start <= range.end
            && range.end <= self.len()
            && let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end))
        {
            return Ok((start, end - start));
        }
        Err(ReadError::RangePastEnd {
            path: self.path.clone(),
            tensor: None,
            start: range.start,
            end: range.end,
            len: self.len(),
        })
    }

    /// A new descriptor of the same file.
    fn reopen(&self) -> Result<File, ReadError> {
        let changed = |what| ReadError::Changed { path: self.path.clone(), what };
        match open_regular(&self.path) {
            Ok((file, now)) => match self.fingerprint.difference(&now) {
                None => Ok(file),
                Some(what) => Err(changed(what)),
            },
            // Out of descriptors or memory is the system's state, not the file's.
            Err(ReadError::Open { path, source }) if source.kind() != io::ErrorKind::NotFound => {
                Err(ReadError::Io { path, doing: "opening again", source })
            }
            Err(ReadError::Open { source, .. }) => Err(changed(format!("no longer there: {source}"))),
            Err(error) => Err(changed(error.to_string())),
        }
    }
}

impl Backend {
    fn pooled(file: File) -> Self {
        let slot = PoolSlot::new();
        slot.keep(Arc::new(file));
        Self::Pooled(slot)
    }
}

/// Opens a regular file for reading, never waiting for a writer or a device.
fn open_regular(path: &Path) -> Result<(File, Fingerprint), ReadError> {
    let failed = |source| ReadError::Open { path: path.to_owned(), source };
    let not_regular = |found| ReadError::NotRegular { path: path.to_owned(), found };
    // Opening some devices has effects, and opening a socket fails without saying why: ask first. The check
    // after opening is the one that counts.
    if let Some(found) = irregular(&std::fs::metadata(path).map_err(failed)?) {
        return Err(not_regular(found));
    }
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    match irregular(&metadata) {
        Some(found) => Err(not_regular(found)),
        None => Ok((file, Fingerprint::of(&metadata))),
    }
}

/// What a path is if it is not a regular file.
fn irregular(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else if kind.is_char_device() {
        Some("a character device")
    } else if kind.is_block_device() {
        Some("a block device")
    } else {
        Some("something else")
    }
}

/// Reads a whole regular file of at most `limit` bytes; `None` if there is none under this path.
///
/// A dangling symlink is not "none": it is an error, as somebody meant a file to be there.
///
/// # Errors
/// As [`InputFile::open`], and [`ReadError::FileTooLarge`] before anything is allocated.
pub fn read_small_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, ReadError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(ReadError::Open { path: path.to_owned(), source });
        }
        Ok(_) => {}
    }
    let (file, fingerprint) = open_regular(path)?;
    let too_large = |bytes| ReadError::FileTooLarge { path: path.to_owned(), bytes, limit };
    if fingerprint.len > limit {
        return Err(too_large(fingerprint.len));
    }
    let mut bytes = Vec::with_capacity(fingerprint.len as usize);
    // One byte more than allowed, so that a file that grows meanwhile is noticed.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|source| ReadError::Io {
        path: path.to_owned(),
        doing: "reading",
        source,
    })?;
    if bytes.len() as u64 > limit { Err(too_large(bytes.len() as u64)) } else { Ok(Some(bytes)) }
}

#[derive(Clone, Copy)]
enum Advice {
    WillNeed,
    DontNeed,
}

/// `posix_fadvise` where there is one; a refusal changes nothing but speed.
fn fadvise(file: &File, offset: u64, len: u64, advice: Advice) {
    #[cfg(target_os = "linux")]
    {
        let advice = match advice {
            Advice::WillNeed => rustix::fs::Advice::WillNeed,
            Advice::DontNeed => rustix::fs::Advice::DontNeed,
        };
        let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), advice);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, len, advice);
}

/// The device's read-ahead window, between 128 KiB (the usual one, and safe) and 1 MiB, in bytes.
fn readahead_bytes(dev: u64) -> u64 {
    const LEAST: u64 = 128 << 10;
    const MOST: u64 = 1 << 20;
    #[cfg(target_os = "linux")]
    {
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        if let Ok(text) = std::fs::read_to_string(setting)
            && let Ok(kib) = text.trim().parse::<u64>()
        {
            return kib.saturating_mul(1024).clamp(LEAST, MOST);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (dev, MOST);
    LEAST
}

#[cfg(test)]
mod tests;
