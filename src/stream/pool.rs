//! The buffers between those who compute and those who write: a fixed number, taken in the order of the tensors.
//!
//! A disk that is slower than the merge makes everybody wait for buffers. The first tensor then gets them first: it is
//! finished, and its thread reads the next one while the disk writes. Shared fairly, threads would end up reading at the
//! same time and writing at the same time. What was used last is taken first: it is in a cache.

use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::write::BlockBuffer;

/// The buffers that nobody has.
pub(super) struct Pool<'b> {
    state: Mutex<State<'b>>,
    changed: Condvar,
}

struct State<'b> {
    free: Vec<BlockBuffer<'b>>,
    /// Who waits: tensor, and a number of its own.
    waiting: BTreeSet<(usize, u64)>,
    tickets: u64,
    closed: bool,
}

impl<'b> Pool<'b> {
    /// Of these buffers.
    pub fn new(buffers: impl Iterator<Item = BlockBuffer<'b>>) -> Self {
        let state = State { free: buffers.collect(), waiting: BTreeSet::new(), tickets: 0, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<'b>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a buffer; `None` once nobody writes any more.
    pub fn take(&self, tensor: usize) -> Option<Taken<'_, 'b>> {
        let mut state = self.lock();
        let ticket = (tensor, state.tickets);
        state.tickets += 1;
        state.waiting.insert(ticket);
        loop {
            let next = state.waiting.first() == Some(&ticket);
            if state.closed || (next && !state.free.is_empty()) {
                state.waiting.remove(&ticket);
                let buffer = if state.closed { None } else { state.free.pop() };
                // There may be one more for the next.
                self.changed.notify_all();
                return buffer.map(|buffer| Taken { pool: self, buffer: Some(buffer) });
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a buffer back.
    pub fn put(&self, buffer: BlockBuffer<'b>) {
        self.lock().free.push(buffer);
        self.changed.notify_all();
    }

    /// Nobody writes any more: whoever waits need not.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// A buffer that goes back to the pool unless it is sent on.
pub(super) struct Taken<'p, 'b> {
    pool: &'p Pool<'b>,
    /// There until it is sent.
    buffer: Option<BlockBuffer<'b>>,
}

impl<'b> Taken<'_, 'b> {
    /// The buffer, for whoever puts it back.
    pub fn send(mut self) -> BlockBuffer<'b> {
        self.buffer.take().expect("it is there until it is sent")
    }
}

impl<'b> Deref for Taken<'_, 'b> {
    type Target = BlockBuffer<'b>;
    fn deref(&self) -> &BlockBuffer<'b> {
        self.buffer.as_ref().expect("it is there until it is sent")
    }
}

impl<'b> DerefMut for Taken<'_, 'b> {
    fn deref_mut(&mut self) -> &mut BlockBuffer<'b> {
        self.buffer.as_mut().expect("it is there until it is sent")
    }
}

impl Drop for Taken<'_, '_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.pool.put(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_first_tensor_that_waits_gets_the_next_buffer() {
        let mut memory = vec![0; BlockBuffer::cut_from(1, 10)];
        let pool = Pool::new(BlockBuffer::cut(&mut memory, 1, 10));
        let held = pool.take(5).unwrap();
        let (got, order) = mpsc::channel();
        std::thread::scope(|threads| {
            for tensor in [3, 1, 2] {
                let (got, pool) = (got.clone(), &pool);
                threads.spawn(move || {
                    let taken = pool.take(tensor).unwrap();
                    got.send(tensor).unwrap();
                    drop(taken);
                });
            }
            while pool.lock().waiting.len() < 3 {
                std::thread::sleep(Duration::from_millis(1));
            }
            pool.put(held.send());
        });
        assert_eq!(order.try_iter().collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(pool.lock().free.len(), 1, "all came back");
    }

    #[test]
    fn a_buffer_that_is_not_sent_comes_back_and_a_closed_pool_gives_none() {
        let mut memory = vec![0; BlockBuffer::cut_from(1, 10)];
        let pool = Pool::new(BlockBuffer::cut(&mut memory, 1, 10));
        drop(pool.take(0));
        let held = pool.take(0).unwrap();
        std::thread::scope(|threads| {
            let waits = threads.spawn(|| pool.take(1).is_none());
            while pool.lock().waiting.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            pool.close();
            assert!(waits.join().unwrap());
        });
        drop(held);
        assert!(pool.take(0).is_none());
    }
}
