//! One read-only file mapping: the only code of the reader that needs `unsafe`.
//!
//! [`super::file`] is its one caller. It hands out slices of the mapping and gives advice to the kernel; it
//! never maps for writing and never outlives its file's bounds. A mapping holds no descriptor.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{Advice, Mmap, MmapOptions, UncheckedAdvice};

/// The whole of a non-empty file, mapped shared and read-only.
#[derive(Debug)]
pub(super) struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps `len` bytes of `file`, which may be closed afterwards.
    pub(super) fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: memmap2 asks that nobody changes the file while a slice of it is borrowed. No program can
        // enforce that against other processes. What can be done is done: the mapping is never writable,
        // slices of it are short-lived and only copied from or decoded as plain bytes (any bit pattern is
        // valid), lengths and offsets taken from them are copied out before they are checked, the file's
        // fingerprint is compared again before results are published, and `--io pread` avoids mappings where
        // files may change.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        Ok(Self { map })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where the mapping lies, for a message after a SIGBUS.
    pub(super) fn addresses(&self) -> Range<usize> {
        let start = self.map.as_ptr() as usize;
        start..start + self.map.len()
    }

    /// Asks for read-ahead of a range. Advice: a refusal changes nothing but speed.
    pub(super) fn will_need(&self, start: usize, len: usize) {
        let _ = self.map.advise_range(Advice::WillNeed, start, len);
    }

    /// Drops every page that the range touches from this process's resident set.
    pub(super) fn dont_need(&self, start: usize, len: usize) {
        // SAFETY: MADV_DONTNEED is dangerous where it discards data. This mapping is shared, read-only and
        // backed by a file, so dropped pages come back with the same bytes on the next access, for concurrent
        // readers too.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
    }
}

/// Makes a fault in a mapped file (it was cut short, or its disk failed) end the process with one line and exit code 74,
/// where it would otherwise be killed without a word. Temporary output stays; the next run into its directory removes it.
///
/// # Errors
/// Where the handler cannot be installed; mappings work all the same.
pub fn exit_on_lost_pages() -> io::Result<()> {
    const LINE: &[u8] =
        b"mats-stream: error: an input changed or became unreadable while it was mapped (got a bus error, \
        expected its bytes); nothing was published; try again, or --io pread\n";
    // SAFETY: the action runs inside a signal handler and may call only what is async-signal-safe: one write(2) from a
    // constant, and _exit(2). It allocates nothing, takes no lock and does not return.
    unsafe {
        signal_hook::low_level::register(signal_hook::consts::SIGBUS, || {
            let _ = rustix::io::write(rustix::stdio::stderr(), LINE);
            signal_hook::low_level::exit(i32::from(super::ExitClass::Changed.code()));
        })
    }
    .map(|_| ())
}
