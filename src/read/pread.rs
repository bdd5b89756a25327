//! Positioned reads through a small, process-wide pool of descriptors.
//!
//! [`super::file`] is its one caller. A checkpoint may have thousands of shards and the process few
//! descriptors, so only the most recently used stay open; the others are opened again when needed, and the
//! opener checks that it got the same file. The pool never opens anything itself and never holds its lock
//! while reading.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Descriptors kept open between reads. Threads in the middle of a read may hold one more each.
const MAX_IDLE: usize = 16;

/// Least recently used first.
static POOL: Mutex<Vec<(u64, Arc<File>)>> = Mutex::new(Vec::new());

fn pool() -> MutexGuard<'static, Vec<(u64, Arc<File>)>> {
    // A poisoned pool is still a valid list of open files.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file's place in the pool, given up when dropped.
#[derive(Debug)]
pub(super) struct PoolSlot {
    id: u64,
}

impl PoolSlot {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// The open descriptor, or the one that `open` returns, which is kept for the next call.
    pub(super) fn get<E>(&self, open: impl FnOnce() -> Result<File, E>) -> Result<Arc<File>, E> {
        {
            let mut files = pool();
            if let Some(at) = files.iter().position(|(id, _)| *id == self.id) {
                let entry = files.remove(at);
                let file = Arc::clone(&entry.1);
                files.push(entry);
                return Ok(file);
            }
        }
        let file = Arc::new(open()?);
        self.keep(Arc::clone(&file));
        Ok(file)
    }

    /// Hands over a descriptor that was opened anyway.
    pub(super) fn keep(&self, file: Arc<File>) {
        let mut files = pool();
        // Two threads may have opened the file at once: the later descriptor replaces the earlier.
        files.retain(|(id, _)| *id != self.id);
        if files.len() >= MAX_IDLE {
            files.remove(0);
        }
        files.push((self.id, file));
    }
}

impl Drop for PoolSlot {
    fn drop(&mut self) {
        pool().retain(|(id, _)| *id != self.id);
    }
}

/// Fills `out` from `offset` on. Reads may be short or interrupted; the file's end is reported as
/// `UnexpectedEof`.
pub(super) fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < out.len() {
        match file.read_at(&mut out[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
