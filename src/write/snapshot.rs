//! States of solves that take long, in files beside the journal: a run that is continued goes on in the middle of them.
//!
//! One file a solve, `.mats-stream-solve-TENSOR-SOLVE.partial`: a head that says which run, tensor and solve it is of, words,
//! vectors as they are in memory, and the XXH3-128 of all before. A newer state is written beside it, synced and renamed over
//! it, so there is always a whole one. A file that is cut, damaged or of another run or solve counts as none. What the
//! words mean is `merge`'s business.
//!
//! A state is worth little: where there is no room for one, the run goes on without.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use twox_hash::XxHash3_128;

use super::error::WriteError;
use super::fault;
use super::output_dir::{TEMPORARY_SUFFIX, sync_directory};

/// Begins the name of every such file.
const PREFIX: &str = ".mats-stream-solve-";
/// Ends the name of one that is being written.
const NEW_SUFFIX: &str = ".new.partial";
const MAGIC: [u8; 24] = *b"mats-stream-solve/1\n\0\0\0\0";
/// Magic, run, name, solve, number of words, bytes of vectors.
const HEAD_BYTES: usize = 24 + 16 + 16 + 8 + 8 + 8;
const HASH_BYTES: usize = 16;
/// Read and written at a time.
const CHUNK: usize = 1 << 20;

/// The states kept in one output directory.
#[derive(Debug)]
pub(super) struct SolveStore {
    directory: PathBuf,
    /// Hash of the run's key.
    run: u128,
    /// There was no room.
    full: AtomicBool,
    /// By tensor.
    files: Mutex<BTreeMap<usize, BTreeSet<PathBuf>>>,
}

/// Where the states of one tensor's solves are kept.
#[derive(Clone, Copy, Debug)]
pub struct SolvePlace<'a> {
    store: &'a SolveStore,
    tensor: usize,
    name: &'a str,
}

/// Whether a file of this name holds a state.
pub(super) fn is_state(name: &str) -> bool {
    !name.ends_with(NEW_SUFFIX) && tensor_of(name).is_some()
}

fn tensor_of(name: &str) -> Option<usize> {
    let rest = name.strip_prefix(PREFIX)?.strip_suffix(TEMPORARY_SUFFIX)?;
    rest.split_once('-')?.0.parse().ok()
}

impl SolveStore {
    /// Of a directory that this run holds, with what a run before left there. States of tensors that are `complete` go.
    pub fn open(directory: &Path, run: u128, complete: impl Fn(usize) -> bool) -> Self {
        let store = Self {
            directory: directory.to_owned(),
            run,
            full: AtomicBool::new(false),
            files: Mutex::default(),
        };
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| is_state(name)) else { continue };
            let Some(tensor) = tensor_of(name) else { continue };
            if complete(tensor) {
                let _ = fs::remove_file(entry.path());
            } else {
                store.files().entry(tensor).or_default().insert(entry.path());
            }
        }
        store
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<usize, BTreeSet<PathBuf>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn place<'a>(&'a self, tensor: usize, name: &'a str) -> SolvePlace<'a> {
        SolvePlace { store: self, tensor, name }
    }

    /// Removes the states of a tensor that is in the journal.
    pub fn remove(&self, tensor: usize) {
        for path in self.files().remove(&tensor).into_iter().flatten() {
            let _ = fs::remove_file(path);
        }
    }

    /// Removes all.
    pub fn clear(&self) {
        for path in std::mem::take(&mut *self.files()).into_values().flatten() {
            let _ = fs::remove_file(path);
        }
    }
}

/// Writes and hashes.
struct Out<'f> {
    file: &'f File,
    hasher: twox_hash::xxhash3_128::Hasher,
}

impl Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.hasher.write(chunk);
            self.file.write_all(chunk)?;
        }
        Ok(())
    }
}

impl SolvePlace<'_> {
    /// The tensor, as messages show it.
    pub fn tensor_name(&self) -> String {
        crate::read::escaped(self.name)
    }

    fn path(&self, solve: u64, suffix: &str) -> PathBuf {
        self.store.directory.join(format!("{PREFIX}{}-{solve:016x}{suffix}", self.tensor))
    }

    fn head(&self, solve: u64, words: usize, vector_bytes: usize) -> [u8; HEAD_BYTES] {
        let name = XxHash3_128::oneshot(self.name.as_bytes());
        let mut head = [0; HEAD_BYTES];
        let parts: [&[u8]; 6] = [
            &MAGIC,
            &self.store.run.to_le_bytes(),
            &name.to_le_bytes(),
            &solve.to_le_bytes(),
            &(words as u64).to_le_bytes(),
            &(vector_bytes as u64).to_le_bytes(),
        ];
        let mut at = 0;
        for part in parts {
            head[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        head
    }

    /// Keeps a state of the solve of this number, in the place of the one before. False where there is no room: then
    /// nothing is tried any more.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn write(&self, solve: u64, words: &[u64], vectors: [&[u8]; 3]) -> Result<bool, WriteError> {
        if self.store.full.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let (new, path) = (self.path(solve, NEW_SUFFIX), self.path(solve, TEMPORARY_SUFFIX));
        let vector_bytes = vectors.iter().map(|v| v.len()).sum::<usize>();
        let need = (HEAD_BYTES + 8 * words.len() + vector_bytes + HASH_BYTES) as u64;
        let written = fill(&new, &self.head(solve, words.len(), vector_bytes), words, vectors, need)
            .and_then(|()| fault::point("solve.rename"))
            .and_then(|()| fs::rename(&new, &path));
        match written {
            Ok(()) => {
                self.store.files().entry(self.tensor).or_default().insert(path);
                sync_directory(&self.store.directory)?;
                Ok(true)
            }
            Err(source) => {
                let _ = fs::remove_file(&new);
                match WriteError::writing(&new, "keep the state of a solve", need, source) {
                    WriteError::NoSpace { .. } => {
                        self.store.full.store(true, Ordering::Relaxed);
                        tracing::warn!(
                            "no room for the state of a solve ({need} bytes): the run goes on, and could only be continued \
                             tensor by tensor"
                        );
                        Ok(false)
                    }
                    error => Err(error),
                }
            }
        }
    }

    /// Removes the state of the solve of this number, if there is one.
    pub fn discard(&self, solve: u64) {
        let path = self.path(solve, TEMPORARY_SUFFIX);
        if self.store.files().entry(self.tensor).or_default().remove(&path) {
            let _ = fs::remove_file(path);
        }
    }

    /// Reads the state of the solve of this number into `vectors` and gives its words, of which it has at most `most_words`.
    /// `None`, and `vectors` as they were, where there is no whole one, or its words are not `usable`.
    ///
    /// # Errors
    /// [`WriteError::Io`] where a file that was whole cannot be read again.
    pub fn read(
        &self,
        solve: u64,
        most_words: usize,
        mut vectors: [&mut [u8]; 3],
        usable: &dyn Fn(&[u64]) -> bool,
    ) -> Result<Option<Vec<u64>>, WriteError> {
        let path = self.path(solve, TEMPORARY_SUFFIX);
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let Ok(mut file) = OpenOptions::new().read(true).custom_flags(flags).open(&path) else {
            return Ok(None);
        };
        let vector_bytes = vectors.iter().map(|v| v.len()).sum::<usize>();
        let whole = self.whole(&mut file, solve, most_words, vector_bytes);
        let Some(words) = whole.filter(|words| usable(words)) else {
            tracing::warn!(file = %path.display(), "not a whole state of this solve: it begins anew");
            let _ = fs::remove_file(&path);
            return Ok(None);
        };
        let again = |file: &mut File, vectors: &mut [&mut [u8]; 3]| {
            file.seek(SeekFrom::Start((HEAD_BYTES + 8 * words.len()) as u64))?;
            vectors.iter_mut().try_for_each(|vector| file.read_exact(vector))
        };
        again(&mut file, &mut vectors).map_err(|source| WriteError::Io {
            path,
            doing: "read the state of a solve",
            source,
        })?;
        Ok(Some(words))
    }

    /// The words of a file that is what it should be to its last byte.
    fn whole(&self, file: &mut File, solve: u64, most_words: usize, vector_bytes: usize) -> Option<Vec<u64>> {
        let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
        let mut head = [0; HEAD_BYTES];
        file.read_exact(&mut head).ok()?;
        let count = u64::from_le_bytes(*head[HEAD_BYTES - 16..].first_chunk()?);
        let count = usize::try_from(count).ok().filter(|count| *count <= most_words)?;
        let body = 8 * count + vector_bytes;
        if head != self.head(solve, count, vector_bytes)
            || metadata.len() != (HEAD_BYTES + body + HASH_BYTES) as u64
        {
            return None;
        }
        let mut hasher = twox_hash::xxhash3_128::Hasher::new();
        hasher.write(&head);
        let mut bytes = vec![0; 8 * count];
        file.read_exact(&mut bytes).ok()?;
        hasher.write(&bytes);
        let words =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(*word.first_chunk().expect("eight bytes")));
        let words = words.collect();
        let mut left = vector_bytes;
        bytes.resize(CHUNK.min(vector_bytes), 0);
        while left > 0 {
            let chunk = &mut bytes[..CHUNK.min(left)];
            file.read_exact(chunk).ok()?;
            hasher.write(chunk);
            left -= chunk.len();
        }
        let mut hash = [0; HASH_BYTES];
        file.read_exact(&mut hash).ok()?;
        (u128::from_le_bytes(hash) == hasher.finish_128()).then_some(words)
    }
}

/// Writes a whole file, on disk when it returns.
fn fill(new: &Path, head: &[u8], words: &[u64], vectors: [&[u8]; 3], need: u64) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o666).custom_flags(flags).open(new)?;
    // So that a full disk shows before gigabytes are on it. Only advice.
    let reserved = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, need);
    if let Err(error @ (Errno::NOSPC | Errno::DQUOT)) = reserved {
        return Err(error.into());
    }
    fault::point("solve.write")?;
    let mut out = Out { file: &file, hasher: twox_hash::xxhash3_128::Hasher::new() };
    out.write(head)?;
    let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    out.write(&words)?;
    for vector in vectors {
        out.write(vector)?;
    }
    let hash = out.hasher.finish_128();
    (&file).write_all(&hash.to_le_bytes())?;
    fault::point("solve.fsync")?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors() -> [Vec<u8>; 3] {
        [vec![1; 40], (0..40).collect(), vec![7; 40]]
    }

    fn slices(vectors: &[Vec<u8>; 3]) -> [&[u8]; 3] {
        [&vectors[0], &vectors[1], &vectors[2]]
    }

    /// What is read, if the vectors are touched only with it.
    fn read(place: SolvePlace<'_>, solve: u64, most_words: usize) -> Option<(Vec<u64>, [Vec<u8>; 3])> {
        let mut got = [vec![0; 40], vec![0; 40], vec![0; 40]];
        let [a, b, c] = &mut got;
        let words = place.read(solve, most_words, [a, b, c], &|_| true).unwrap();
        if words.is_none() {
            assert!(got.iter().flatten().all(|byte| *byte == 0), "vectors stay as they were");
        }
        words.map(|words| (words, got))
    }

    #[test]
    fn the_last_state_reads_back_and_nobody_elses_does() {
        let root = tempfile::tempdir().unwrap();
        let store = SolveStore::open(root.path(), 7, |_| false);
        let place = store.place(3, "w");
        assert_eq!(read(place, 9, 8), None);
        assert!(place.write(9, &[1, 2], slices(&[vec![0; 40], vec![0; 40], vec![0; 40]])).unwrap());
        assert!(place.write(9, &[u64::MAX, 5, 6], slices(&vectors())).unwrap());
        assert_eq!(read(place, 9, 8), Some((vec![u64::MAX, 5, 6], vectors())));
        assert_eq!(read(place, 10, 8), None, "another solve");
        let again = SolveStore::open(root.path(), 7, |_| false);
        assert_eq!(read(again.place(3, "w"), 9, 3), Some((vec![u64::MAX, 5, 6], vectors())));
        // Each of these removes what it cannot use.
        for (run, name, most) in [(8, "w", 8), (7, "v", 8), (7, "w", 2)] {
            place.write(9, &[1, 2, 3], slices(&vectors())).unwrap();
            let other = SolveStore::open(root.path(), run, |_| false);
            assert_eq!(read(other.place(3, name), 9, most), None, "{run} {name} {most}");
        }
        place.write(9, &[1], slices(&vectors())).unwrap();
        store.place(4, "x").write(1, &[1], slices(&vectors())).unwrap();
        store.remove(3);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        // What is complete needs no state.
        SolveStore::open(root.path(), 7, |tensor| tensor == 4);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn f14_a_state_that_is_cut_or_damaged_anywhere_is_none() {
        let root = tempfile::tempdir().unwrap();
        let store = SolveStore::open(root.path(), 7, |_| false);
        let place = store.place(0, "w");
        place.write(1, &[1, 2, 3], slices(&vectors())).unwrap();
        let path = place.path(1, TEMPORARY_SUFFIX);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read(place, 1, 8), None, "cut at {cut}");
        }
        for bit in 0..8 * whole.len() {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(place, 1, 8), None, "bit {bit}");
        }
        fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
        assert_eq!(read(place, 1, 8), None);
        // Not a file at all.
        fs::create_dir(&path).unwrap();
        assert_eq!(read(place, 1, 8), None);
    }

    #[test]
    fn names_are_told_apart() {
        assert!(is_state(".mats-stream-solve-12-00000000000000ff.partial"));
        for other in [
            ".mats-stream-solve-12-00000000000000ff.new.partial",
            ".mats-stream-solve-x-00.partial",
            ".mats-stream-model.safetensors.partial",
            "model.safetensors",
        ] {
            assert!(!is_state(other), "{other}");
        }
    }
}
