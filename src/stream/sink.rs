//! From computed values to bytes in the output: encoding, and the bounded queue to the writer.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::pool::Pool;
use crate::merge::MergeError;
use crate::merge::block::Values;
use crate::plan::budget::OUT_BUFFER_BYTES;
use crate::read::Dtype;
use crate::write::{BlockBuffer, CheckpointWriter, PieceChecksums};

/// Elements encoded at a time where they are written at once: 512 KiB of f64.
const PIECE: usize = OUT_BUFFER_BYTES / 8;

/// Writes in flight where they pass the page cache by: more keep a disk no busier.
const DIRECT_WRITERS: usize = 8;

/// Encoded values on their way to the writer thread.
pub(super) struct Job<'b> {
    outputs: Arc<[usize]>,
    tensor: usize,
    offset: u64,
    bytes: BlockBuffer<'b>,
    pieces: PieceChecksums,
}

/// Hands tiles to the writers. A fixed number of buffers goes round; when all are on their way the producers wait.
pub(super) struct Sink<'w, 'b> {
    /// One an output: one, or one for each variant of a sweep.
    writers: &'w [CheckpointWriter],
    jobs: Sender<Job<'b>>,
    pool: Arc<Pool<'b>>,
    /// Output and tensor of what has been encoded to NaN or an infinity.
    nonfinite: Mutex<BTreeSet<(usize, usize)>>,
}

/// A writer thread's end. Where one ends early, nobody gets a buffer any more.
#[derive(Clone)]
pub(super) struct Drain<'b> {
    jobs: Receiver<Job<'b>>,
    pool: Arc<Pool<'b>>,
}

/// Writer threads that these writers keep busy.
pub(super) fn writer_threads(writers: &[CheckpointWriter]) -> usize {
    if writers.iter().any(CheckpointWriter::is_direct) { DIRECT_WRITERS } else { 1 }
}

/// Both ends, with `buffers` buffers cut from `memory` between them.
pub(super) fn channel<'w, 'b>(
    writers: &'w [CheckpointWriter],
    buffers: usize,
    memory: &'b mut [u8],
) -> (Sink<'w, 'b>, Drain<'b>) {
    let (jobs, ready) = bounded(buffers);
    let pool = Arc::new(Pool::new(BlockBuffer::cut(memory, buffers, OUT_BUFFER_BYTES)));
    let drain = Drain { jobs: ready, pool: Arc::clone(&pool) };
    (Sink { writers, jobs, pool, nonfinite: Mutex::default() }, drain)
}

impl Sink<'_, '_> {
    /// Encodes values and queues them for these outputs: a solver goes on while the bytes are written.
    pub fn queue(
        &self,
        outputs: &Arc<[usize]>,
        tensor: usize,
        dtype: Dtype,
        first: usize,
        values: Values<'_>,
    ) -> Result<(), MergeError> {
        let width = dtype.float_bytes().unwrap_or(1);
        let at_a_time = OUT_BUFFER_BYTES / width;
        for begin in (0..values.len()).step_by(at_a_time) {
            let range = begin..(begin + at_a_time).min(values.len());
            let mut bytes = self.pool.take(tensor).ok_or(MergeError::Cancelled)?;
            let offset = ((first + begin) * width) as u64;
            let place = self.writers[outputs[0]].direct_place(tensor, offset);
            let encoded = bytes.prepare(place.unwrap_or(0), range.len() * width);
            self.store(outputs, tensor, dtype, values, range, encoded)?;
            // The tensor has the same bytes in all outputs, and here they are in this core's cache.
            let pieces = self.writers[outputs[0]].piece_checksums(tensor, offset, encoded);
            let job = Job { outputs: Arc::clone(outputs), tensor, offset, bytes: bytes.send(), pieces };
            self.jobs.send(job).map_err(|_| MergeError::Cancelled)?;
        }
        Ok(())
    }

    /// Encodes values and writes them: merges that only stream. At once, while they are in this core's cache; where writes
    /// pass the page cache by and wait for the disk, by way of the queue.
    pub fn write(
        &self,
        outputs: &Arc<[usize]>,
        tensor: usize,
        dtype: Dtype,
        first: usize,
        values: Values<'_>,
        buffer: &mut Vec<u8>,
    ) -> Result<(), MergeError> {
        let width = dtype.float_bytes().unwrap_or(0);
        let direct = |output: &usize| self.writers[*output].direct_place(tensor, 0).is_some();
        if values.len() * width >= BlockBuffer::LEAST_BYTES && outputs.iter().all(direct) {
            return self.queue(outputs, tensor, dtype, first, values);
        }
        for begin in (0..values.len()).step_by(PIECE) {
            let range = begin..(begin + PIECE).min(values.len());
            buffer.resize(range.len() * width, 0);
            self.store(outputs, tensor, dtype, values, range, buffer)?;
            self.write_bytes(outputs, tensor, ((first + begin) * width) as u64, buffer)?;
        }
        Ok(())
    }

    /// Encodes some values and takes note of those that are not finite then.
    fn store(
        &self,
        outputs: &[usize],
        tensor: usize,
        dtype: Dtype,
        values: Values<'_>,
        range: Range<usize>,
        encoded: &mut [u8],
    ) -> Result<(), MergeError> {
        if values.store(range, dtype, encoded)? {
            let mut found = self.nonfinite.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(outputs.iter().map(|output| (*output, tensor)));
        }
        Ok(())
    }

    /// Whether an output has had NaN or infinities for a tensor.
    pub fn nonfinite(&self, output: usize, tensor: usize) -> bool {
        self.nonfinite.lock().unwrap_or_else(PoisonError::into_inner).contains(&(output, tensor))
    }

    /// Bytes as they are.
    pub fn write_bytes(
        &self,
        outputs: &[usize],
        tensor: usize,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), MergeError> {
        for output in outputs {
            self.writers[*output].write_at(tensor, offset, bytes)?;
        }
        Ok(())
    }
}

impl Drain<'_> {
    /// Writes until every sink is gone.
    ///
    /// # Errors
    /// The first write that fails; what is queued behind it is dropped.
    pub fn run(&self, writers: &[CheckpointWriter]) -> Result<(), MergeError> {
        let _closing = Closing(&self.pool);
        for job in &self.jobs {
            for output in job.outputs.iter() {
                writers[*output].write_hashed(job.tensor, job.offset, job.bytes.bytes(), &job.pieces)?;
            }
            self.pool.put(job.bytes);
        }
        Ok(())
    }
}

/// Closes the pool where a writer thread ends, however it does: with an error, or since every sink is gone and nobody waits.
struct Closing<'p, 'b>(&'p Pool<'b>);

impl Drop for Closing<'_, '_> {
    fn drop(&mut self) {
        self.0.close();
    }
}
