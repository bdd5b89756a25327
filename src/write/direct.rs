//! Writes that pass the page cache by (`O_DIRECT`): the disk fetches whole blocks from the buffer they were made in.
//!
//! A checkpoint is synced before it is published, so its bytes have to reach the disk anyway; through the page cache every
//! byte is copied once more, on a core that could merge. Direct writes want memory and file aligned alike: a buffer lies
//! at the same phase within a block as its place in the file ([`BlockBuffer`]), whole blocks go straight to the disk, and
//! ragged ends go through the page cache. The two never share a page. Where a file system refuses, and on disks that seek
//! (the page cache sorts what goes there), all goes through the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::plan::shards::BLOCK_BYTES;

/// A block, and a page where there are direct writes.
const BLOCK: usize = BLOCK_BYTES as usize;

/// Files of fewer bytes go through the page cache: the sync at the end costs more than the copies.
const LEAST_FILE: u64 = 16 << 20;

/// A buffer of bytes on their way to a place in a file, in memory at the same phase within a block as there.
///
/// Cut from one stretch of memory that large pages can back: a disk that fetches from a few of them is told a few addresses
/// instead of one for every 4 KiB.
#[derive(Debug)]
pub struct BlockBuffer<'a> {
    storage: &'a mut [u8],
    start: usize,
    len: usize,
}

impl<'a> BlockBuffer<'a> {
    /// What it holds beyond the bytes asked for.
    const SPARE_BYTES: usize = 2 * BLOCK;

    /// Fewer bytes are not worth a trip to the disk of their own.
    pub const LEAST_BYTES: usize = 64 << 10;

    /// Bytes to cut `count` buffers from, with room for `bytes` each: in large pages of 2 MiB.
    pub const fn cut_from(count: usize, bytes: usize) -> usize {
        (count * (bytes + Self::SPARE_BYTES)).next_multiple_of(2 << 20)
    }

    /// Buffers with room for `bytes` each: as many as there is memory for, at most `count`.
    pub fn cut(memory: &'a mut [u8], count: usize, bytes: usize) -> impl Iterator<Item = Self> {
        let cut = memory.chunks_exact_mut(bytes + Self::SPARE_BYTES).take(count);
        cut.map(|storage| Self { storage, start: 0, len: 0 })
    }

    /// Room for `len` bytes that go to `place`; what is in them is not said.
    ///
    /// # Panics
    /// If the buffer was cut for fewer.
    pub fn prepare(&mut self, place: u64, len: usize) -> &mut [u8] {
        let to_block = self.storage.as_ptr().align_offset(BLOCK);
        // An address that cannot be aligned makes a buffer that goes through the page cache.
        self.start = if to_block < BLOCK { to_block + (place % BLOCK_BYTES) as usize } else { 0 };
        self.len = len;
        &mut self.storage[self.start..self.start + len]
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }
}

/// A shard's file while it is open.
#[derive(Debug)]
pub(super) struct OpenShard {
    pub file: File,
    /// The same file, for direct writes.
    direct: Option<File>,
}

impl OpenShard {
    /// Of a file that stands at `path` and is to have so many bytes.
    pub fn new(path: &Path, file: File, file_bytes: u64) -> Self {
        Self { direct: open(path, &file, file_bytes), file }
    }

    /// Whether whole blocks pass the page cache by.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Writes all of `bytes` at `place`; gives how many went through the page cache.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_all_at(&self, bytes: &[u8], place: u64) -> io::Result<u64> {
        write_all_at(&self.file, self.direct.as_ref(), bytes, place)
    }
}

/// The file, opened once more for direct writes; `None` where it is small, its disk seeks or the file system has none, or
/// where pages are larger than blocks, so that a ragged end could share one with a direct write.
fn open(path: &Path, file: &File, file_bytes: u64) -> Option<File> {
    if file_bytes < LEAST_FILE || rustix::param::page_size() != BLOCK {
        return None;
    }
    let ours = file.metadata().ok()?;
    if seeks(Path::new("/sys/dev/block"), ours.dev()) {
        return None;
    }
    let direct = OpenOptions::new()
        .write(true)
        .custom_flags((OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
        .open(path)
        .ok()?;
    let found = direct.metadata().ok()?;
    ((ours.dev(), ours.ino()) == (found.dev(), found.ino())).then_some(direct)
}

/// Whether the system says that a device is a rotating disk. Of virtual disks it says so whatever they are.
fn seeks(devices: &Path, dev: u64) -> bool {
    let device = devices.join(format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev)));
    // The place in the tree of devices: of a partition, below its disk.
    let Ok(place) = device.canonicalize() else { return false };
    let disk = place.ancestors().take(2).find(|disk| disk.join("queue/rotational").exists());
    let Some((disk, name)) = disk.and_then(|disk| Some((disk, disk.file_name()?.to_str()?))) else {
        return false;
    };
    let is_virtual = name.starts_with("vd") || name.starts_with("xvd");
    !is_virtual && std::fs::read_to_string(disk.join("queue/rotational")).is_ok_and(|text| text.trim() == "1")
}

/// Writes all of `bytes` at `place`; gives how many went through the page cache.
///
/// # Errors
/// The page cache's, which has the last word: what a direct write refuses is written through it.
fn write_all_at(file: &File, direct: Option<&File>, bytes: &[u8], place: u64) -> io::Result<u64> {
    let mut done = 0;
    let mut cached = 0;
    if let (Some(direct), Some(blocks)) = (direct, whole_blocks(bytes, place)) {
        file.write_all_at(&bytes[..blocks.start], place)?;
        cached += blocks.start as u64;
        done = blocks.start;
        while done < blocks.end {
            match direct.write_at(&bytes[done..blocks.end], place + done as u64) {
                Ok(written) => {
                    done += written;
                    if written == 0 || !written.is_multiple_of(BLOCK) {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Of a file system with rules of its own, or a real one that comes again.
                Err(_) => break,
            }
        }
    }
    file.write_all_at(&bytes[done..], place + done as u64)?;
    Ok(cached + (bytes.len() - done) as u64)
}

/// The whole blocks among bytes that go to `place`, where memory and file are aligned alike and there are enough.
fn whole_blocks(bytes: &[u8], place: u64) -> Option<std::ops::Range<usize>> {
    let start = bytes.as_ptr().align_offset(BLOCK);
    let end = start.checked_add(bytes.len().checked_sub(start)? / BLOCK * BLOCK)?;
    (place.checked_add(start as u64)?.is_multiple_of(BLOCK_BYTES) && end - start >= BlockBuffer::LEAST_BYTES)
        .then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: usize = BlockBuffer::LEAST_BYTES;

    #[test]
    fn a_buffer_lies_as_its_place_does() {
        let mut memory = vec![0; BlockBuffer::cut_from(1, 200_000)];
        let mut buffer = BlockBuffer::cut(&mut memory, 1, 200_000).next().unwrap();
        for (place, len) in [(0, 10), (4095, 200_000), (8192 + 513, 100_000), (1, 0)] {
            let bytes = buffer.prepare(place, len);
            assert_eq!(bytes.len(), len);
            assert_eq!((bytes.as_ptr() as usize) % BLOCK, place as usize % BLOCK);
            assert_eq!(buffer.bytes().len(), len);
        }
    }

    #[test]
    fn rotating_disks_seek_and_virtual_ones_are_not_believed() {
        let sys = tempfile::tempdir().unwrap();
        let disk = |name: &str, partition: &str, rotational: &str, number: &str| {
            let place = sys.path().join("devices").join(name);
            std::fs::create_dir_all(place.join("queue")).unwrap();
            std::fs::create_dir_all(place.join(partition)).unwrap();
            std::fs::write(place.join("queue/rotational"), rotational).unwrap();
            std::os::unix::fs::symlink(place.join(partition), sys.path().join(number)).unwrap();
        };
        disk("sda", "sda1", "1\n", "8:1");
        disk("sdb", "", "1\n", "8:16");
        disk("nvme0n1", "nvme0n1p2", "0\n", "259:2");
        disk("vda", "vda1", "1\n", "254:1");
        let seeks = |major, minor| seeks(sys.path(), rustix::fs::makedev(major, minor));
        assert!(seeks(8, 1) && seeks(8, 16));
        assert!(!seeks(259, 2) && !seeks(254, 1));
        assert!(!seeks(0, 45), "a file system without a device of its own");
    }

    #[test]
    fn whole_blocks_are_those_that_both_sides_have() {
        let mut memory = vec![0; BlockBuffer::cut_from(1, 3 * LEAST)];
        let mut buffer = BlockBuffer::cut(&mut memory, 1, 3 * LEAST).next().unwrap();
        assert_eq!(whole_blocks(buffer.prepare(4096, 3 * LEAST), 4096), Some(0..3 * LEAST));
        let ragged = buffer.prepare(4000, 2 * LEAST);
        assert_eq!(whole_blocks(ragged, 4000), Some(96..96 + 2 * LEAST - 4096));
        assert_eq!(whole_blocks(ragged, 4001), None, "another phase");
        assert_eq!(whole_blocks(&ragged[..LEAST], 4000), None, "too few");
        assert_eq!(whole_blocks(&[], 0), None);
    }

    /// A file of zeros where direct writes are possible: a temporary directory may be in memory.
    fn file_of(total: usize) -> (tempfile::TempDir, std::path::PathBuf, File) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(total as u64).unwrap();
        (dir, path, file)
    }

    /// Writes `want` in pieces of odd lengths from the back, some of them not aligned in memory; gives the bytes that went
    /// through the page cache.
    fn write_in_pieces(file: &File, direct: Option<&File>, want: &[u8]) -> u64 {
        let mut memory = vec![0; BlockBuffer::cut_from(1, 400_000)];
        let mut buffer = BlockBuffer::cut(&mut memory, 1, 400_000).next().unwrap();
        let (mut end, mut cached) = (want.len(), 0);
        for k in 0.. {
            let begin = end.saturating_sub(300_001 + 997 * (k % 50));
            buffer.prepare(begin as u64, end - begin).copy_from_slice(&want[begin..end]);
            let bytes = if k % 7 == 3 { &want[begin..end] } else { buffer.bytes() };
            cached += write_all_at(file, direct, bytes, begin as u64).unwrap();
            end = begin;
            if end == 0 {
                break;
            }
        }
        let mut found = vec![0; want.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == want);
        cached
    }

    #[test]
    fn direct_and_cached_writes_make_one_file() {
        let want: Vec<u8> = (0..LEAST_FILE as usize + 12_345).map(|k| (k * 7 + k / 4096) as u8).collect();
        let total = want.len() as u64;
        let (dir, path, file) = file_of(want.len());
        assert!(open(&path, &file, LEAST_FILE - 1).is_none(), "a small file");
        let other = File::create(dir.path().join("other")).unwrap();
        assert!(open(&path, &other, total).is_none(), "another file");
        let direct = open(&path, &file, total);
        let cached = write_in_pieces(&file, direct.as_ref(), &want);
        assert!(std::fs::read(&path).unwrap() == want);
        if direct.is_some() {
            assert!(cached < total / 4, "{cached}");
        }
    }

    #[test]
    fn what_is_refused_goes_through_the_page_cache() {
        let want: Vec<u8> = (0..LEAST_FILE as usize).map(|k| (k * 3 + k / 4096) as u8).collect();
        let (_dir, path, file) = file_of(want.len());
        let read_only = File::open(&path).unwrap();
        assert_eq!(write_in_pieces(&file, Some(&read_only), &want), want.len() as u64);
    }
}
