//! The clock that a bench reads: on the wall, or of the processors on a machine with other users.

use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use rustix::time::{ClockId, clock_gettime};

static PROCESSOR: AtomicBool = AtomicBool::new(false);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Clock {
    /// What a user waits.
    Wall,
    /// Processor time of all threads: what others take from the machine does not count, nor does waiting.
    Processor,
}

impl Clock {
    /// For the whole program.
    pub(crate) fn choose(self) {
        PROCESSOR.store(self == Self::Processor, Ordering::Relaxed);
    }
}

/// Seconds since some point in the past.
pub(crate) fn now() -> f64 {
    let processor = PROCESSOR.load(Ordering::Relaxed);
    let time = clock_gettime(if processor { ClockId::ProcessCPUTime } else { ClockId::Monotonic });
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
