//! The places of equal scores in a tensor's order, handed from worker to worker.
//!
//! Where a threshold falls among equal scores, the first ones in the tensor are kept (or the last dropped). Workers take
//! stretches of the tensor in order; each counts its own equal scores first and passes the count on, then works.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::merge::MergeError;

/// Equal scores before a piece, and in those from it to the end of its stretch: one pair a column, for its two ends.
pub(super) struct Places {
    pub before: Vec<[u64; 2]>,
    pub own: VecDeque<Vec<[u64; 2]>>,
}

pub(super) fn add_places(total: &mut [[u64; 2]], own: &[[u64; 2]]) {
    for (total, own) in total.iter_mut().zip(own) {
        total[0] += own[0];
        total[1] += own[1];
    }
}

/// Counts of equal scores handed from stretch to stretch, in order.
pub(super) struct Line {
    state: Mutex<(usize, Vec<[u64; 2]>)>,
    moved: Condvar,
    /// A stretch will not pass: those behind it stop.
    pub failed: AtomicBool,
}

impl Line {
    pub fn new(columns: usize) -> Self {
        let state = Mutex::new((0, vec![[0, 0]; columns]));
        Self { state, moved: Condvar::new(), failed: AtomicBool::new(false) }
    }

    /// Waits for the counts before `stretch` and adds its own. Stretches are taken in order, so the one waited for runs.
    pub fn pass(
        &self,
        stretch: usize,
        own: &[[u64; 2]],
        cancel: &AtomicBool,
    ) -> Result<Vec<[u64; 2]>, MergeError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.0 != stretch {
            if cancel.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed) {
                return Err(MergeError::Cancelled);
            }
            state = self
                .moved
                .wait_timeout(state, Duration::from_millis(20))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let before = state.1.clone();
        add_places(&mut state.1, own);
        state.0 += 1;
        self.moved.notify_all();
        Ok(before)
    }
}
