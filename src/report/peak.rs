//! The process's memory as the kernel counts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Between two looks at the memory.
const INTERVAL: Duration = Duration::from_millis(10);

/// Most anonymous and shared memory that any look has seen in this process.
static PEAK: AtomicU64 = AtomicU64::new(0);

/// Peak and present memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakMemory {
    /// The largest resident set so far (`VmHWM`), in bytes. Mapped input pages count.
    pub peak_rss_bytes: u64,
    /// Anonymous plus shared memory now (`RssAnon` + `RssShmem`), in bytes: what `--max-memory` bounds.
    pub anonymous_bytes: u64,
}

/// Reads `/proc/self/status`; `None` on systems without it.
pub fn peak_memory() -> Option<PeakMemory> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The largest resident set so far, in bytes; `None` where the system does not say.
pub fn peak_rss_bytes() -> Option<u64> {
    peak_memory().map(|memory| memory.peak_rss_bytes)
}

/// Anonymous plus shared memory now, in bytes; `None` where the system does not say.
pub fn anonymous_bytes() -> Option<u64> {
    peak_memory().map(|memory| memory.anonymous_bytes)
}

/// The largest anonymous plus shared memory seen so far, in bytes: now, and at each look of a [`Sampling`]. The kernel
/// keeps no such peak.
pub fn peak_anonymous_bytes() -> Option<u64> {
    let now = anonymous_bytes()?;
    Some(PEAK.fetch_max(now, Ordering::Relaxed).max(now))
}

/// Looks at the memory every 10 ms until it is dropped.
#[derive(Debug)]
pub struct Sampling(Arc<AtomicBool>);

impl Sampling {
    /// Starts looking, on a thread of its own. Where there can be none, only the ends of the run are seen.
    pub fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let _ = std::thread::Builder::new().name("memory".to_owned()).stack_size(64 << 10).spawn(move || {
            while !stopped.load(Ordering::Relaxed) && peak_anonymous_bytes().is_some() {
                std::thread::sleep(INTERVAL);
            }
        });
        Self(stop)
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn parse(status: &str) -> Option<PeakMemory> {
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(PeakMemory {
        peak_rss_bytes: field("VmHWM")?,
        anonymous_bytes: field("RssAnon")?.checked_add(field("RssShmem")?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_text_is_understood() {
        let status =
            "Name:\tx\nVmHWM:\t    2048 kB\nRssAnon:\t 100 kB\nRssFile:\t 5 kB\nRssShmem:\t   1 kB\n";
        assert_eq!(
            parse(status),
            Some(PeakMemory { peak_rss_bytes: 2048 << 10, anonymous_bytes: 101 << 10 })
        );
        assert_eq!(parse("VmHWM: 1 kB\n"), None);
        assert_eq!(parse("VmHWM: x kB\nRssAnon: 1 kB\nRssShmem: 1 kB\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_touched_buffer_shows() {
        let buffer = vec![1_u8; 64 << 20];
        let memory = peak_memory().unwrap();
        assert!(std::hint::black_box(&buffer)[1 << 20] == 1);
        // Other tests run beside this one, so only what this one holds is known.
        assert!(memory.anonymous_bytes >= 64 << 20, "{memory:?}");
        assert!(memory.peak_rss_bytes >= 64 << 20);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_peak_outlives_what_caused_it() {
        let sampling = Sampling::start();
        let buffer = vec![1_u8; 96 << 20];
        assert!(std::hint::black_box(&buffer)[1 << 20] == 1);
        // Either the thread has looked by now, or this does.
        assert!(peak_anonymous_bytes().unwrap() >= 96 << 20);
        drop(buffer);
        drop(sampling);
        assert!(peak_anonymous_bytes().unwrap() >= 96 << 20);
    }
}
