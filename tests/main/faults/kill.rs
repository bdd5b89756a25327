//! F1, F2, F9, F11: a process that dies, at random and at every step of writing; the order of what it does to the disk.

use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{ARGS, assert_nothing_half, assert_same, clean, run, world, world_of};
use crate::util::{Scratch, wait};

#[test]
fn f01_killed_at_random_times_it_resumes_to_the_same_bytes() {
    let scratch = world_of(10, 48, 40);
    let started = Instant::now();
    let expected = clean(&scratch);
    let whole = started.elapsed();
    let mut kills = 0;
    // Not a random number: the time itself is random enough on a machine that does other things.
    for round in 0..6u32 {
        let _ = std::fs::remove_dir_all(scratch.join("out"));
        for attempt in 0..50u32 {
            let mut command = scratch
                .command(&[&ARGS[..], &["--resume", "--out-shard-size", "3kB", "--threads", "2"]].concat());
            command.env("MATS_STREAM_FAIL", "commit.often=");
            let mut child = command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("start the binary");
            let until = Instant::now() + whole.mul_f64(f64::from((round * 7 + attempt * 3) % 11 + 1) / 10.0);
            let status = loop {
                if let Some(status) = child.try_wait().expect("wait for the binary") {
                    break Some(status);
                }
                if Instant::now() > until {
                    child.kill().expect("kill the binary");
                    child.wait().expect("wait for the binary");
                    break None;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            if let Some(status) = status {
                assert!(status.success(), "round {round}, attempt {attempt}: {status}");
                break;
            }
            kills += 1;
            assert_nothing_half(&scratch, &expected, &format!("round {round}, attempt {attempt}"));
        }
        assert_same(&scratch, &expected, &format!("round {round}"));
    }
    assert!(kills > 0, "some run must have been killed");
}

/// Every step that writes, and the times at which it is made to fail.
const POINTS: [(&str, &[u32]); 17] = [
    ("temporary.create", &[1, 2]),
    ("shard.reserve", &[1, 3]),
    ("shard.header", &[2]),
    ("spare.reserve", &[1]),
    ("journal.create", &[1]),
    ("journal.write", &[1, 2]),
    ("journal.fsync", &[1, 2]),
    ("shard.write", &[1, 4, 8]),
    ("shard.fsync", &[1, 3]),
    ("directory.fsync", &[1, 2, 3, 4, 5]),
    ("side.write", &[1, 3]),
    ("side.fsync", &[1, 3]),
    ("rename.side", &[1, 2]),
    ("rename.shard", &[1, 2, 3]),
    ("rename.index", &[1]),
    ("rename.report", &[1]),
    ("shard.write", &[2]),
];

#[test]
fn f02_killed_at_every_step_it_resumes_to_the_same_bytes() {
    every_step("kill", |code| code == 137);
}

#[test]
fn f04_an_io_error_at_every_step_ends_with_6_and_resumes() {
    every_step("eio", |code| code == 6);
}

#[test]
fn f03_a_full_disk_at_every_step_ends_with_5_and_resumes() {
    every_step("enospc", |code| code == 5);
}

fn every_step(action: &str, expected_code: impl Fn(i32) -> bool) {
    let scratch = world();
    let expected = clean(&scratch);
    for (point, times) in POINTS {
        for time in times {
            let what = format!("{point}={action}@{time}");
            let output = run(&scratch, &[], &what);
            assert!(expected_code(output.code), "{what}: exit code {}: {}", output.code, output.stderr);
            assert_nothing_half(&scratch, &expected, &what);
            let left = scratch.join("out/.mats-stream-journal").exists();
            if left && !scratch.join("out/merge_report.json").exists() {
                let refused = run(&scratch, &[], "");
                assert_eq!(refused.code, 2, "{what}: {}", refused.stderr);
                assert!(crate::util::error_line(&refused).contains("--resume"), "{}", refused.stderr);
            }
            let resumed = run(&scratch, &["--resume"], "");
            assert_eq!(resumed.code, 0, "{what}: {}", resumed.stderr);
            assert_same(&scratch, &expected, &what);
            std::fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
        }
    }
}

#[test]
fn what_is_done_is_not_done_again() {
    let scratch = world();
    let expected = clean(&scratch);
    // Everything is in the journal by then.
    let output = run(&scratch, &[], "rename.shard=kill@1");
    assert_eq!(output.code, 137);
    let resumed = run(&scratch, &["--resume"], "shard.write=kill@1");
    assert_eq!(resumed.code, 0, "not one tensor is written again: {}", resumed.stderr);
    assert_same(&scratch, &expected, "resumed");
    let report = scratch.merged("out").report;
    assert_eq!(report["resumed_tensors"], 8);
    // Its record is as complete as that of a run in one go.
    assert_eq!(report["parameters"]["layers.0.weight"]["iterations"], 8);
    assert!(report["parameters"]["layers.0.weight"]["history"].as_array().expect("steps").len() > 1);
    // Once more: nothing to do.
    let before = std::fs::read(scratch.join("out/merge_report.json")).expect("there");
    let again = run(&scratch, &["--resume"], "");
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);
    assert_eq!(std::fs::read(scratch.join("out/merge_report.json")).expect("there"), before);
}

#[test]
fn threads_memory_and_io_may_change_between_the_parts() {
    let scratch = world();
    let expected = clean(&scratch);
    let output = run(&scratch, &[], "shard.write=kill@6");
    assert_eq!(output.code, 137);
    let flags = ["--threads", "1", "--io", "pread", "--max-memory", "64MiB", "--out-shard-size", "3kB"];
    let resumed = scratch.run(&[&ARGS[..], &["--resume"], &flags[..]].concat());
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    assert_same(&scratch, &expected, "other resources");
}

#[test]
fn f11_interrupted_twice_it_resumes_to_the_same_bytes() {
    // More weights than the writer has buffers, so that some are still to be merged when it pauses.
    let scratch = world_of(40, 24, 8);
    let expected = clean(&scratch);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let pause = scratch.join("paused");
        let mut command = scratch
            .command(&[&ARGS[..], &["--resume", "--out-shard-size", "3kB", "--threads", "2"]].concat());
        command.env("MATS_STREAM_FAIL", "shard.write=pause@3").env("MATS_STREAM_PAUSE", &pause);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("start the binary");
        until_exists(&pause);
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
        kill_process(pid, signal).expect("send a signal");
        std::thread::sleep(Duration::from_millis(20));
        std::fs::remove_file(&pause).expect("let it go on");
        let status = wait(&mut child, Instant::now() + Duration::from_secs(30)).expect("the signal ends it");
        assert_eq!(crate::util::code(status), code);
        assert_nothing_half(&scratch, &expected, "interrupted");
        assert!(scratch.join("out/.mats-stream-journal").exists(), "it can be resumed");
    }
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    assert_same(&scratch, &expected, "interrupted twice");
}

/// A cluster's scheduler kills a worker in the middle of a write, starts the same command on the same directory again, now
/// and then twice at a time, and does not know whether it ever finished: the command is the same each time, and so is what
/// comes of it.
#[test]
fn f15_a_worker_that_is_requeued_ends_in_the_same_bytes() {
    let scratch = world();
    let expected = clean(&scratch);
    let args = [&ARGS[..], &["--resume", "--out-shard-size", "3kB", "--threads", "2"]].concat();
    let pause = scratch.join("paused");
    for _ in 0..3 {
        let mut command = scratch.command(&args);
        // Whatever others write meanwhile, this one tensor is never complete.
        command.env("MATS_STREAM_FAIL", "commit.often=;shard.write=pause@1").env("MATS_STREAM_PAUSE", &pause);
        let mut first = command.stderr(Stdio::null()).spawn().expect("start the binary");
        until_exists(&pause);
        // Started too early: told to wait, and nothing is touched.
        let second = scratch.run(&args);
        assert_eq!(second.code, 75, "{}", second.stderr);
        first.kill().expect("kill the binary");
        first.wait().expect("wait for the binary");
        std::fs::remove_file(&pause).expect("nobody waits for it");
        assert_nothing_half(&scratch, &expected, "killed");
    }
    let requeued = scratch.run(&args);
    assert_eq!(requeued.code, 0, "{}", requeued.stderr);
    assert_same(&scratch, &expected, "requeued");
    let report = std::fs::read(scratch.join("out/merge_report.json")).expect("there");
    let again = scratch.run(&args);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert_eq!(std::fs::read(scratch.join("out/merge_report.json")).expect("there"), report);
}

pub(super) fn until_exists(path: &std::path::Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(30), "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What is renamed has been synced since it was last written, and the directory is synced between the shards, the index and
/// the report: after a power cut, a name means what it says.
#[test]
fn f09_names_are_given_to_what_is_on_disk() {
    let scratch = world();
    let trace = scratch.join("trace");
    let mut command = std::process::Command::new("strace");
    command
        .args(["-f", "-y", "-e", "trace=pwrite64,write,fsync,fdatasync,rename", "-o"])
        .arg(&trace)
        .arg(crate::util::BINARY)
        .args(ARGS)
        .args(["--out-shard-size", "3kB", "--threads", "2"])
        .current_dir(scratch.path());
    // Not there, or not allowed here: nothing to look at.
    let Ok(output) = command.output() else { return };
    let Ok(trace) = std::fs::read_to_string(&trace) else { return };
    if !output.status.success() || !trace.contains("rename(") {
        return;
    }
    check_order(&scratch, &trace);
}

fn check_order(scratch: &Scratch, trace: &str) {
    let out = scratch.join("out").canonicalize().expect("written");
    let out = out.to_str().expect("UTF-8");
    let path_of = |line: &str| -> Option<String> {
        let (_, rest) = line.split_once('<')?;
        Some(rest.split_once('>')?.0.to_owned())
    };
    let mut unsynced = std::collections::BTreeSet::new();
    let mut directory_synced = true;
    let mut stages = Vec::new();
    for line in trace.lines() {
        let call = line.split_once(' ').map_or("", |(_, call)| call.trim_start());
        let path = path_of(call).unwrap_or_default();
        if call.starts_with("pwrite64(") || call.starts_with("write(") {
            if path.starts_with(out) {
                unsynced.insert(path);
            }
        } else if call.starts_with("fsync(") || call.starts_with("fdatasync(") {
            directory_synced |= path == out;
            unsynced.remove(&path);
        } else if call.starts_with("rename(") {
            let names: Vec<&str> = call.split('"').collect();
            let (from, to) = (names[1], names[3]);
            assert!(!unsynced.contains(from), "renamed before it was synced: {line}");
            let stage = match to.rsplit('/').next().unwrap_or_default() {
                "model.safetensors.index.json" => 1,
                "merge_report.json" => 2,
                _ => 0,
            };
            if stages.last().is_some_and(|last| *last != stage) {
                assert!(directory_synced, "the names before {to} are not on disk yet");
            }
            stages.push(stage);
            directory_synced = false;
        }
    }
    assert!(directory_synced, "the report's name is on disk at the end");
    assert!(stages.is_sorted() && stages.ends_with(&[0, 1, 2]), "{stages:?}");
}
