//! Failpoints: places where a test makes the next step of writing fail, or the process die.
//!
//! Builds without debug assertions have none: [`point`] is then nothing at all. In a debug build the environment variable
//! `MATS_STREAM_FAIL` holds `NAME=ACTION` or `NAME=ACTION@N` (at the N-th time, from 1), several divided by `;`. Actions:
//! `kill` (as `kill -9`), `eio`, `enospc`, `edquot`, and `pause` (makes the file that `MATS_STREAM_PAUSE` names and waits until
//! somebody removes it).

use std::io;

/// Fails if the environment says that the step `name` fails now.
///
/// # Errors
/// The injected one.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) -> io::Result<()> {
    armed::point(name)
}

/// Whether a failpoint is named at all: for tests that want a step done more often than a user would.
#[cfg(debug_assertions)]
pub(crate) fn named(name: &str) -> bool {
    armed::named(name)
}

/// Never: failpoints exist in debug builds only.
#[cfg(not(debug_assertions))]
pub(crate) fn named(_name: &str) -> bool {
    false
}

/// Nothing: failpoints exist in debug builds only.
#[cfg(not(debug_assertions))]
#[inline(always)]
#[allow(clippy::unnecessary_wraps, reason = "the signature of the debug build's")]
pub(crate) fn point(_name: &str) -> io::Result<()> {
    Ok(())
}

#[cfg(debug_assertions)]
mod armed {
    use std::io;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Fault {
        name: String,
        action: String,
        at: u64,
        count: AtomicU64,
    }

    static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();

    fn faults() -> &'static [Fault] {
        FAULTS.get_or_init(|| {
            let text = std::env::var("MATS_STREAM_FAIL").unwrap_or_default();
            text.split(';')
                .filter_map(|entry| {
                    let (name, action) = entry.split_once('=')?;
                    let (action, at) = action.split_once('@').unwrap_or((action, "1"));
                    Some(Fault {
                        name: name.to_owned(),
                        action: action.to_owned(),
                        at: at.parse().ok()?,
                        count: AtomicU64::new(0),
                    })
                })
                .collect()
        })
    }

    pub(super) fn named(name: &str) -> bool {
        faults().iter().any(|fault| fault.name == name)
    }

    pub(super) fn point(name: &str) -> io::Result<()> {
        for fault in faults().iter().filter(|fault| fault.name == name) {
            if fault.count.fetch_add(1, Ordering::Relaxed) + 1 != fault.at {
                continue;
            }
            match fault.action.as_str() {
                "kill" => {
                    let _ = rustix::process::kill_process(
                        rustix::process::getpid(),
                        rustix::process::Signal::KILL,
                    );
                }
                "eio" => return Err(rustix::io::Errno::IO.into()),
                "enospc" => return Err(rustix::io::Errno::NOSPC.into()),
                "edquot" => return Err(rustix::io::Errno::DQUOT.into()),
                "pause" => pause(),
                _ => {}
            }
        }
        Ok(())
    }

    fn pause() {
        let Some(path) = std::env::var_os("MATS_STREAM_PAUSE") else { return };
        let _ = std::fs::write(&path, b"");
        while std::path::Path::new(&path).exists() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}
