//! Room on a file system: what there is, and taking it before the work.

use std::fs::File;
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::error::WriteError;

/// Bytes an unprivileged writer may still take on the file system of `path` or its nearest existing
/// ancestor; `None` where it cannot tell (some user-space file systems report no blocks at all).
pub(super) fn free_bytes(path: &Path) -> Option<u64> {
    let statistics = path.ancestors().find_map(|ancestor| rustix::fs::statvfs(ancestor).ok())?;
    if statistics.f_blocks == 0 {
        return None;
    }
    let block = if statistics.f_frsize == 0 { statistics.f_bsize } else { statistics.f_frsize };
    statistics.f_bavail.checked_mul(block)
}

/// Files that may still be made on the file system of `path`; `None` where it does not count them.
pub(super) fn free_files(path: &Path) -> Option<u64> {
    let statistics = rustix::fs::statvfs(path).ok()?;
    (statistics.f_files > 0).then_some(statistics.f_favail)
}

/// Reserves the file's blocks, so that a full disk shows now. File systems that cannot are written to as
/// they are; then it gives false. `left` is what this and the following shards need.
pub(super) fn reserve(path: &Path, file: &File, bytes: u64, left: u64) -> Result<bool, WriteError> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => {
                return Err(WriteError::writing(path, "reserve space", left, error.into()));
            }
        }
    }
}
