//! F1, F2, F3, F4, F11, F14 inside one long solve: the run that continues goes on from the state that was kept of it, and its
//! bytes, iterates and record are those of a solve in one go. `solve.often` has every step kept, of solves of any length.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{ARGS, assert_nothing_half, assert_same, clean, kill::until_exists, world_of};
use crate::util::{Output, Scratch, strict_json, wait};

/// As `super::run` on one thread, so that solves come one after the other, with every step kept.
fn run(scratch: &Scratch, flags: &[&str], fail: &str) -> Output {
    let fail = format!("solve.often=;commit.often=;{fail}");
    let args = [&ARGS[..], &["--out-shard-size", "3kB", "--threads", "1"], flags].concat();
    scratch.run_with(&args, &[("MATS_STREAM_FAIL", &fail)])
}

/// What solves were said to do, step by step.
fn records(scratch: &Scratch) -> Vec<Value> {
    let text = fs::read_to_string(scratch.join("out/merge_report.json")).expect("finished");
    let report = strict_json(&text);
    let parameters = report["parameters"].as_object().expect("by name").values();
    let keys =
        ["iterations", "stop_reason", "final_relative_residual", "objective_final", "history", "converged"];
    parameters.map(|p| keys.iter().map(|key| p.get(*key).cloned().unwrap_or_default()).collect()).collect()
}

fn states(scratch: &Scratch) -> usize {
    let Ok(entries) = fs::read_dir(scratch.join("out")) else { return 0 };
    let names = entries.map(|entry| entry.expect("list").file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(".mats-stream-solve-")).count()
}

/// The config of `world_of` with another method and solver.
fn configure(scratch: &Scratch, subspace: &str, solver: &str) {
    let config = fs::read_to_string(scratch.join("c.yml")).expect("there");
    let models = config.find("models:").expect("a list of models");
    let head =
        format!("merge_method: mats\nsubspace: {subspace}\ninitial: average\nsolver: {{ {solver} }}\n");
    scratch.write("c.yml", head + &config[models..]);
}

#[test]
fn f02_killed_inside_a_solve_it_goes_on_there_to_the_same_bytes() {
    let solvers = [
        ("kfac", "method: cg, tolerance: 0, max_iterations: 12"),
        ("kfac", "method: pcg, preconditioner: kronecker, ridge: 0.1, tolerance: 1.0e-9, max_iterations: 12"),
        (
            "kfac",
            "method: pcg, preconditioner: kronecker_cholesky, ridge: 0.1, tolerance: 1.0e-9, max_iterations: 12",
        ),
        (
            "kfac",
            "method: pcg, preconditioner: jacobi, ridge: 1, stop: { preconditioned_residual: 1.0e-3 }, max_iterations: 12",
        ),
        ("gram", "method: cg, tolerance: 0, max_iterations: 12"),
    ];
    for (subspace, solver) in solvers {
        let scratch = world_of(3, 24, 1);
        configure(&scratch, subspace, solver);
        let expected = clean(&scratch);
        assert_eq!(run(&scratch, &[], "").code, 0);
        let record = records(&scratch);
        assert_same(&scratch, &expected, "keeping states changes nothing");
        for step in [1, 2, 5, 9] {
            let what = format!("{subspace}, {solver}, step {step}");
            fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
            let killed = run(&scratch, &[], &format!("solve.step=kill@{step}"));
            assert_eq!(killed.code, 137, "{what}: {}", killed.stderr);
            assert!(states(&scratch) > 0, "{what}");
            assert_nothing_half(&scratch, &expected, &what);
            // And again, in the part that goes on.
            let killed = run(&scratch, &["--resume"], "solve.step=kill@2");
            assert_eq!(killed.code, 137, "{what}: {}", killed.stderr);
            let resumed = run(&scratch, &["--resume", "--log-level", "info"], "");
            assert_eq!(resumed.code, 0, "{what}: {}", resumed.stderr);
            assert!(resumed.stderr.contains("going on after step"), "{what}: {}", resumed.stderr);
            assert_same(&scratch, &expected, &what);
            assert_eq!(records(&scratch), record, "{what}");
        }
    }
}

#[test]
fn steps_that_were_taken_are_not_taken_again() {
    let scratch = world_of(1, 60, 40);
    let expected = clean(&scratch);
    assert_eq!(run(&scratch, &[], "solve.step=kill@30").code, 137);
    // The state of step 30 was kept; ten are left.
    assert_eq!(run(&scratch, &["--resume"], "solve.step=kill@10").code, 137);
    let resumed = run(&scratch, &["--resume"], "solve.step=kill@1");
    assert_eq!(resumed.code, 0, "all steps are taken: {}", resumed.stderr);
    assert_same(&scratch, &expected, "resumed");
    // Without states, the solve would have begun again: 40 steps.
    fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    assert_eq!(run(&scratch, &[], "solve.step=kill@30").code, 137);
    for entry in fs::read_dir(scratch.join("out")).expect("there") {
        let path = entry.expect("list").path();
        if path.to_string_lossy().contains("-solve-") {
            fs::remove_file(path).expect("remove a file");
        }
    }
    assert_eq!(run(&scratch, &["--resume"], "solve.step=kill@40").code, 137);
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    assert_same(&scratch, &expected, "begun again");
}

#[test]
fn f02_f04_keeping_a_state_may_fail_at_every_step() {
    let scratch = world_of(3, 24, 6);
    let expected = clean(&scratch);
    for point in ["solve.write", "solve.fsync", "solve.rename"] {
        for time in [1, 4] {
            for (action, code) in [("kill", 137), ("eio", 6)] {
                let what = format!("{point}={action}@{time}");
                let output = run(&scratch, &[], &what);
                assert_eq!(output.code, code, "{what}: {}", output.stderr);
                assert_nothing_half(&scratch, &expected, &what);
                let resumed = run(&scratch, &["--resume"], "");
                assert_eq!(resumed.code, 0, "{what}: {}", resumed.stderr);
                assert_same(&scratch, &expected, &what);
                fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
            }
        }
    }
}

#[test]
fn f03_without_room_for_a_state_the_run_goes_on() {
    let scratch = world_of(3, 24, 6);
    let expected = clean(&scratch);
    for point in ["solve.write", "solve.fsync"] {
        let output = run(&scratch, &[], &format!("{point}=enospc@2"));
        assert_eq!(output.code, 0, "{}", output.stderr);
        assert!(output.stderr.contains("no room for the state of a solve"), "{}", output.stderr);
        assert_same(&scratch, &expected, point);
        fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    }
}

#[test]
fn f11_interrupted_inside_a_solve_it_keeps_where_it_is() {
    let scratch = world_of(3, 60, 40);
    let expected = clean(&scratch);
    let pause = scratch.join("paused");
    let mut command = scratch.command(&[&ARGS[..], &["--out-shard-size", "3kB", "--threads", "1"]].concat());
    command.env("MATS_STREAM_FAIL", "solve.often=;solve.step=pause@7").env("MATS_STREAM_PAUSE", &pause);
    let mut child = command.stderr(Stdio::null()).spawn().expect("start the binary");
    until_exists(&pause);
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
    kill_process(pid, Signal::TERM).expect("send a signal");
    std::thread::sleep(Duration::from_millis(20));
    fs::remove_file(&pause).expect("let it go on");
    let status = wait(&mut child, Instant::now() + Duration::from_secs(30)).expect("the signal ends it");
    assert_eq!(crate::util::code(status), 143);
    assert_eq!(states(&scratch), 1);
    let resumed = run(&scratch, &["--resume", "--log-level", "info"], "");
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    assert!(resumed.stderr.contains("going on after step 7"), "{}", resumed.stderr);
    assert_same(&scratch, &expected, "interrupted");
}

#[test]
fn f14_a_state_that_is_damaged_or_of_another_run_is_not_believed() {
    let scratch = world_of(3, 24, 12);
    let expected = clean(&scratch);
    let state = |scratch: &Scratch| {
        let mut entries = fs::read_dir(scratch.join("out")).expect("there").map(|e| e.expect("list").path());
        entries.find(|path| path.to_string_lossy().contains("-solve-")).expect("a state was kept")
    };
    type Change = fn(&mut Vec<u8>);
    let changes: [Change; 4] = [
        |bytes| bytes[300] ^= 1,
        |bytes| bytes.truncate(200),
        |bytes| bytes.clear(),
        // The run's own hash.
        |bytes| bytes[24] ^= 1,
    ];
    for (k, change) in changes.iter().enumerate() {
        assert_eq!(run(&scratch, &[], "solve.step=kill@5").code, 137);
        let path = state(&scratch);
        let mut bytes = fs::read(&path).expect("there");
        change(&mut bytes);
        fs::write(&path, bytes).expect("write");
        let resumed = run(&scratch, &["--resume"], "");
        assert_eq!(resumed.code, 0, "change {k}: {}", resumed.stderr);
        assert!(resumed.stderr.contains("it begins anew"), "change {k}: {}", resumed.stderr);
        assert_same(&scratch, &expected, &format!("change {k}"));
        fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    }
    // A link is never followed.
    assert_eq!(run(&scratch, &[], "solve.step=kill@5").code, 137);
    let path = state(&scratch);
    let secret = scratch.join("secret");
    fs::rename(&path, &secret).expect("rename");
    std::os::unix::fs::symlink(&secret, &path).expect("a link");
    let bytes = fs::read(&secret).expect("there");
    let resumed = run(&scratch, &["--resume"], "");
    assert!(resumed.code == 0 || resumed.code == 2, "{}: {}", resumed.code, resumed.stderr);
    assert!(fs::read(&secret).expect("there") == bytes, "a link is never written through");
}
