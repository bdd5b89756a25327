//! F4, F5: a C library that fails at random, reads and writes by halves, and is interrupted all the time.

use std::path::PathBuf;
use std::process::Command;

use super::{ARGS, assert_nothing_half, assert_same, clean, world};
use crate::util::Scratch;

/// Compiles the shim; `None` where there is no C compiler.
fn shim(scratch: &Scratch) -> Option<PathBuf> {
    let library = scratch.join("faults.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/faults.c");
    let compiled =
        Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(source).output();
    match compiled {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(_) => None,
    }
}

fn run(scratch: &Scratch, library: &str, mode: &str, seed: u32, flags: &[&str]) -> crate::util::Output {
    let args = [&ARGS[..], &["--out-shard-size", "3kB", "--threads", "2"], flags].concat();
    let seed = seed.to_string();
    scratch.run_with(
        &args,
        &[
            ("LD_PRELOAD", library),
            ("FAULTS_MODE", mode),
            ("FAULTS_SEED", &seed),
            ("MATS_STREAM_FAIL", "commit.often="),
        ],
    )
}

#[test]
fn f04_io_errors_at_random_never_give_wrong_bytes() {
    let scratch = world();
    let Some(library) = shim(&scratch) else { return };
    let library = library.to_str().expect("UTF-8");
    let expected = clean(&scratch);
    let mut failed = 0;
    for round in 0..4 {
        let _ = std::fs::remove_dir_all(scratch.join("out"));
        for attempt in 0..40 {
            // Fewer faults each time, so that it ends.
            let mode = if attempt < 6 { "error" } else { "none" };
            let output = run(&scratch, library, mode, round * 100 + attempt, &["--resume", "--io", "pread"]);
            let what = format!("round {round}, attempt {attempt}");
            if output.code == 0 {
                break;
            }
            failed += 1;
            assert!(matches!(output.code, 5 | 6), "{what}: exit code {}: {}", output.code, output.stderr);
            assert_nothing_half(&scratch, &expected, &what);
        }
        assert_same(&scratch, &expected, &format!("round {round}"));
    }
    assert!(failed > 0, "the shim must have done something");
}

#[test]
fn f05_short_and_interrupted_calls_change_nothing() {
    let scratch = world();
    let Some(library) = shim(&scratch) else { return };
    let library = library.to_str().expect("UTF-8");
    let expected = clean(&scratch);
    for (mode, io) in [("short", "pread"), ("interrupt", "pread"), ("short", "mmap")] {
        let output = run(&scratch, library, mode, 1, &["--io", io]);
        assert_eq!(output.code, 0, "{mode}: {}", output.stderr);
        assert_same(&scratch, &expected, mode);
        std::fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    }
}
