//! The run's progress on stderr: a bar on a terminal, one plain line a block elsewhere, or nothing.
//!
//! The engine calls it from any thread. It never fails: a closed or full stderr loses lines, not the
//! run. It never writes to stdout, and every name it shows is escaped.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::units::{ByteRate, Escaped, Seconds};

/// `--progress`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProgressMode {
    /// A bar where stderr is a terminal, else as `Plain`.
    #[default]
    Auto,
    /// One line a block.
    Plain,
    /// Silence.
    None,
}

/// A bar is redrawn for an iteration at most this often.
const BAR_INTERVAL: Duration = Duration::from_millis(100);

/// Without a bar, a long solve shows a sign of life this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(30);

/// What a run shows while it works.
pub struct Progress {
    shown: Shown,
    started: Instant,
    total_blocks: u64,
    total_bytes: u64,
    blocks: AtomicU64,
    bytes: AtomicU64,
    /// Milliseconds after `started` at which an iteration may be shown again.
    next_iteration_ms: AtomicU64,
}

enum Shown {
    Nothing,
    Plain(Mutex<Box<dyn Write + Send>>),
    Bar(ProgressBar),
}

impl Progress {
    /// Progress over `total_blocks` blocks that read `total_bytes` bytes in all (0 where unknown: no
    /// time left is shown).
    pub fn new(mode: ProgressMode, total_blocks: u64, total_bytes: u64) -> Self {
        let bar = || Shown::Bar(new_bar(ProgressDrawTarget::stderr_with_hz(10), total_blocks));
        let shown = match mode {
            ProgressMode::None => Shown::Nothing,
            ProgressMode::Auto if io::stderr().is_terminal() => bar(),
            // Not LineWriter or the like: stderr is unbuffered, and each line is written by one call.
            ProgressMode::Auto | ProgressMode::Plain => Shown::Plain(Mutex::new(Box::new(io::stderr()))),
        };
        Self::with(shown, total_blocks, total_bytes)
    }

    fn with(shown: Shown, total_blocks: u64, total_bytes: u64) -> Self {
        let interval = if matches!(shown, Shown::Plain(_)) { PLAIN_INTERVAL } else { BAR_INTERVAL };
        Self {
            shown,
            started: Instant::now(),
            total_blocks,
            total_bytes,
            blocks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            next_iteration_ms: AtomicU64::new(interval.as_millis() as u64),
        }
    }

    /// A block's work begins.
    pub fn block_started(&self, name: &str) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_message(format!("{}{}", Escaped(name), self.pace()));
        }
    }

    /// Iteration `k` of a block's solve is done, at this residual relative to the right-hand side. Most
    /// calls return at once: what is shown is limited to a few lines.
    pub fn iteration(&self, name: &str, k: u64, relative_residual: f64) {
        let interval = match self.shown {
            Shown::Nothing => return,
            Shown::Plain(_) => PLAIN_INTERVAL,
            Shown::Bar(_) => BAR_INTERVAL,
        };
        let now = self.started.elapsed();
        let now_ms = now.as_millis() as u64;
        let due = self.next_iteration_ms.load(Ordering::Relaxed);
        let next = (now + interval).as_millis() as u64;
        // Of several threads that find it due, one shows its line.
        if now_ms < due
            || self
                .next_iteration_ms
                .compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_err()
        {
            return;
        }
        let step = format!("{} iteration {k}, residual {relative_residual:.2e}", Escaped(name));
        match &self.shown {
            Shown::Nothing => {}
            Shown::Plain(writer) => self.write_line(writer, self.blocks.load(Ordering::Relaxed), &step),
            Shown::Bar(bar) => bar.set_message(format!("{step}{}", self.pace())),
        }
    }

    /// `n` more bytes were read.
    pub fn bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }

    /// A block is written; `line` says how it went (`cg, 100 iterations, residual 3.1e-5`). May be
    /// empty.
    pub fn block_finished(&self, name: &str, line: &str) {
        let finished = self.blocks.fetch_add(1, Ordering::Relaxed) + 1;
        match &self.shown {
            Shown::Nothing => {}
            Shown::Plain(writer) => {
                let colon = if line.is_empty() { "" } else { ": " };
                self.write_line(writer, finished, &format!("{}{colon}{}", Escaped(name), Escaped(line)));
            }
            Shown::Bar(bar) => {
                bar.set_position(finished);
                bar.set_message(format!("{}{}", Escaped(name), self.pace()));
            }
        }
    }

    /// The run is over, well or not: takes the bar away.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }

    /// Runs `print` while no bar is in its way: for warnings and log lines on the same stderr.
    pub fn suspend<R>(&self, print: impl FnOnce() -> R) -> R {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(print),
            _ => print(),
        }
    }

    fn write_line(&self, writer: &Mutex<Box<dyn Write + Send>>, blocks: u64, text: &str) {
        let line = format!("[{blocks}/{}] {text}{}\n", self.total_blocks, self.pace());
        // Nobody may be reading; the run goes on.
        let _ = lock(writer).write_all(line.as_bytes());
    }

    /// `, 2.50 GB/s, 3 min 10 s left`, as far as it is known.
    fn pace(&self) -> String {
        let read = self.bytes.load(Ordering::Relaxed);
        let elapsed = self.started.elapsed().as_secs_f64();
        if read == 0 || elapsed < 0.5 {
            return String::new();
        }
        let rate = read as f64 / elapsed;
        let mut text = format!(", {}", ByteRate(rate));
        if read < self.total_bytes {
            text.push_str(&format!(", {} left", Seconds((self.total_bytes - read) as f64 / rate)));
        }
        text
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn new_bar(target: ProgressDrawTarget, total_blocks: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total_blocks), target);
    // The template is ours and constant; were it wrong, indicatif's default bar does.
    match ProgressStyle::with_template("{bar:24} {pos}/{len} blocks {wide_msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A panic in another thread does not make a writer unusable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    fn plain(writer: impl Write + Send + 'static) -> Progress {
        Progress::with(Shown::Plain(Mutex::new(Box::new(writer))), 3, 100)
    }

    #[test]
    fn plain_is_one_escaped_line_a_block() {
        let sink = Sink::default();
        let progress = plain(sink.clone());
        progress.block_started("a");
        for k in 0..1000 {
            progress.iteration("a", k, 0.5);
        }
        progress.block_finished("a\n\u{1b}[2J", "cg, 3 iterations");
        progress.block_finished("b", "");
        progress.finish();
        let text = String::from_utf8(lock(&sink.0).clone()).unwrap();
        assert_eq!(text, "[1/3] a\\n\\u{1b}[2J: cg, 3 iterations\n[2/3] b\n");
    }

    #[test]
    fn a_closed_stderr_loses_lines_only() {
        let progress = plain(Closed);
        progress.block_finished("a", "x");
        progress.finish();
    }

    #[test]
    fn iterations_are_limited_but_come_through() {
        let sink = Sink::default();
        let mut progress = plain(sink.clone());
        progress.started = Instant::now().checked_sub(PLAIN_INTERVAL * 2).unwrap();
        progress.bytes(50);
        for k in 0..1000 {
            progress.iteration("w", k, 0.125);
        }
        let text = String::from_utf8(lock(&sink.0).clone()).unwrap();
        assert_eq!(text, "[0/3] w iteration 0, residual 1.25e-1, 1 B/s, 1 min 00 s left\n");
    }

    #[test]
    fn threads_share_bar_and_counters() {
        let progress = Progress::with(Shown::Bar(new_bar(ProgressDrawTarget::hidden(), 400)), 400, 400);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for k in 0..100 {
                        progress.block_started("b");
                        progress.iteration("b", k, f64::NAN);
                        progress.bytes(1);
                        progress.block_finished("b", "");
                    }
                });
            }
        });
        assert_eq!(progress.blocks.load(Ordering::Relaxed), 400);
        assert_eq!(progress.bytes.load(Ordering::Relaxed), 400);
        assert_eq!(progress.suspend(|| 7), 7);
        progress.finish();
    }

    #[test]
    fn none_is_silent() {
        let progress = Progress::new(ProgressMode::None, 1, 1);
        assert!(matches!(progress.shown, Shown::Nothing));
        progress.iteration("a", 1, 0.1);
        progress.block_finished("a", "x");
    }
}
