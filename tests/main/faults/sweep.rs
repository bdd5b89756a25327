//! F1, F2, F3, F4, F11, F14 for sweeps: several models in one directory, killed and continued. Models that are complete
//! are kept, the others go on by tensor, and all end in the bytes of a sweep that nothing happened to.

use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{ARGS, kill::until_exists};
use crate::util::{Output, Scratch, error_line, strict_json, wait};

/// Every file by its path in the sweep's directory, reports aside: they have times in them.
type Files = BTreeMap<String, Vec<u8>>;

const NAMES: [&str; 3] = ["ridge=0.1", "ridge=1", "ridge=10"];

/// As `super::world_of`, with a sweep of three ridges.
fn world_of(count: usize, side: usize, steps: usize) -> Scratch {
    let scratch = super::world_of(count, side, steps);
    let config = fs::read_to_string(scratch.join("c.yml")).expect("there");
    scratch.write("c.yml", format!("{config}\nsweep: {{ solver.ridge: [0.1, 1, 10] }}\n"));
    scratch
}

fn world() -> Scratch {
    world_of(4, 24, 6)
}

fn files(scratch: &Scratch) -> Files {
    let mut found = Files::new();
    let Ok(entries) = fs::read_dir(scratch.join("out")) else { return found };
    for entry in entries {
        let path = entry.expect("list").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_file() {
            found.insert(name, Vec::new());
            continue;
        }
        for entry in fs::read_dir(&path).expect("list a directory") {
            let path = entry.expect("list").path();
            let file = path.file_name().expect("a name").to_string_lossy().into_owned();
            let bytes = if file == "merge_report.json" { Vec::new() } else { fs::read(&path).expect("read") };
            found.insert(format!("{name}/{file}"), bytes);
        }
    }
    found
}

fn run(scratch: &Scratch, flags: &[&str], fail: &str) -> Output {
    super::run(scratch, flags, fail)
}

fn clean(scratch: &Scratch) -> Files {
    let output = run(scratch, &[], "");
    assert_eq!(output.code, 0, "{}", output.stderr);
    let files = files(scratch);
    assert!(
        files.keys().filter(|name| name.ends_with(".safetensors")).count() > NAMES.len(),
        "several shards"
    );
    fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    files
}

/// No model under its final name that is not complete, no record without all models.
fn assert_nothing_half(scratch: &Scratch, expected: &Files, what: &str) {
    let found = files(scratch);
    let recorded = found.contains_key("sweep.json");
    for name in NAMES {
        let there = scratch.join("out").join(name).exists();
        assert!(there || !recorded, "{what}: a record without {name}");
        for (path, bytes) in
            expected.iter().filter(|(path, _)| there && path.starts_with(&format!("{name}/")))
        {
            assert!(found.get(path) == Some(bytes), "{what}: {path} is missing or has other bytes");
        }
    }
}

fn assert_same(scratch: &Scratch, expected: &Files, what: &str) {
    let found = files(scratch);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (path, bytes) in expected {
        assert!(found[path] == *bytes, "{what}: {path} differs");
    }
    for name in NAMES {
        let verified = scratch.run(&["verify", &format!("out/{name}"), "--inputs"]);
        assert_eq!(verified.code, 0, "{what}: {}{}", verified.stdout, verified.stderr);
    }
}

#[test]
fn f01_a_sweep_killed_at_random_times_resumes_to_the_same_bytes() {
    let scratch = world_of(8, 40, 30);
    let started = Instant::now();
    let expected = clean(&scratch);
    let whole = started.elapsed();
    let mut kills = 0;
    for round in 0..4u32 {
        let _ = fs::remove_dir_all(scratch.join("out"));
        for attempt in 0..60u32 {
            let args = [&ARGS[..], &["--resume", "--out-shard-size", "3kB", "--threads", "2"]].concat();
            let mut command = scratch.command(&args);
            command.env("MATS_STREAM_FAIL", "commit.often=");
            let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = quiet.spawn().expect("start the binary");
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

/// Steps of writing, and the times at which each fails; the later ones are in the second or third model, or in the outer
/// directory.
const POINTS: [(&str, &[u32]); 13] = [
    ("journal.create", &[1, 2, 4]),
    ("journal.write", &[1, 3, 6]),
    ("journal.fsync", &[1, 3]),
    ("temporary.create", &[1, 5]),
    ("shard.reserve", &[2]),
    ("shard.write", &[1, 9]),
    ("shard.fsync", &[1, 7]),
    ("directory.fsync", &[1, 3, 6, 9, 12]),
    ("side.fsync", &[1, 5, 9]),
    ("rename.side", &[2, 5]),
    ("rename.shard", &[1, 5]),
    ("rename.report", &[1, 2, 3]),
    ("rename.model", &[1, 2, 3]),
];

#[test]
fn f02_a_sweep_killed_at_every_step_resumes_to_the_same_bytes() {
    every_step("kill", 137);
}

#[test]
fn f04_an_io_error_at_every_step_of_a_sweep_ends_with_6_and_resumes() {
    every_step("eio", 6);
}

#[test]
fn f03_a_full_disk_at_every_step_of_a_sweep_ends_with_5_and_resumes() {
    every_step("enospc", 5);
}

fn every_step(action: &str, expected_code: i32) {
    let scratch = world();
    let expected = clean(&scratch);
    for (point, times) in POINTS {
        for time in times {
            let what = format!("{point}={action}@{time}");
            let output = run(&scratch, &[], &what);
            assert_eq!(output.code, expected_code, "{what}: {}", output.stderr);
            assert_nothing_half(&scratch, &expected, &what);
            if scratch.join("out/.mats-stream-journal").exists() {
                let refused = run(&scratch, &[], "");
                assert_eq!(refused.code, 2, "{what}: {}", refused.stderr);
                assert!(error_line(&refused).contains("--resume"), "{}", refused.stderr);
            }
            let resumed = run(&scratch, &["--resume"], "");
            assert_eq!(resumed.code, 0, "{what}: {}", resumed.stderr);
            assert_same(&scratch, &expected, &what);
            fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
        }
    }
}

#[test]
fn models_and_tensors_that_are_done_are_not_done_again() {
    let scratch = world();
    let expected = clean(&scratch);
    // The first model is complete, the others have all their tensors in their journals.
    assert_eq!(run(&scratch, &[], "rename.report=kill@2").code, 137);
    let first = scratch.join("out/.mats-stream-ridge=0.1.partial/merge_report.json");
    let before = fs::read(&first).expect("the first model is complete");
    let resumed = run(&scratch, &["--resume"], "shard.write=kill@1");
    assert_eq!(resumed.code, 0, "not one tensor is written again: {}", resumed.stderr);
    assert_same(&scratch, &expected, "resumed");
    let report = |name: &str| fs::read(scratch.join(format!("out/{name}/merge_report.json"))).expect("there");
    assert!(report(NAMES[0]) == before, "a model that was complete is kept as it was");
    let second = strict_json(&String::from_utf8(report(NAMES[1])).expect("UTF-8"));
    assert_eq!(second["resumed_tensors"], 6);
    assert_eq!(second["parameters"]["layers.0.weight"]["iterations"], 6);
    let record = fs::read_to_string(scratch.join("out/sweep.json")).expect("there");
    let runs = strict_json(&record)["runs"].as_array().expect("a list").clone();
    for run in runs {
        assert_eq!(run["iterations"], 24, "four weights of six steps, whichever part did them: {run}");
        assert!(run["objective_final"].as_f64() < run["objective_initial"].as_f64(), "{run}");
    }
    // Once more: nothing to do, inputs there or not.
    let again = run(&scratch, &["--resume"], "");
    assert!(again.code == 0 && again.stderr.contains("nothing to do"), "{}: {}", again.code, again.stderr);
    fs::remove_dir_all(scratch.join("b")).expect("remove a directory");
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    assert_eq!(fs::read_to_string(scratch.join("out/sweep.json")).expect("there"), record);
}

#[test]
fn f11_an_interrupted_sweep_says_how_to_go_on_and_does() {
    let scratch = world_of(30, 24, 6);
    let expected = clean(&scratch);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let pause = scratch.join("paused");
        let args = [&ARGS[..], &["--resume", "--out-shard-size", "3kB", "--threads", "2"]].concat();
        let mut command = scratch.command(&args);
        command.env("MATS_STREAM_FAIL", "shard.write=pause@3").env("MATS_STREAM_PAUSE", &pause);
        let stderr = scratch.join("stderr.txt");
        let file = fs::File::create(&stderr).expect("create a file");
        let mut child = command.stdout(Stdio::null()).stderr(file).spawn().expect("start the binary");
        until_exists(&pause);
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
        kill_process(pid, signal).expect("send a signal");
        std::thread::sleep(Duration::from_millis(20));
        fs::remove_file(&pause).expect("let it go on");
        let status = wait(&mut child, Instant::now() + Duration::from_secs(30)).expect("the signal ends it");
        assert_eq!(crate::util::code(status), code);
        let told = fs::read_to_string(&stderr).expect("written");
        assert!(told.contains("`--resume` with the same command"), "{told}");
        assert_nothing_half(&scratch, &expected, "interrupted");
    }
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    assert_same(&scratch, &expected, "interrupted twice");
}

#[test]
fn f14_damaged_journals_of_a_sweep_resume_from_what_is_valid() {
    let scratch = world();
    let expected = clean(&scratch);
    let outer = "out/.mats-stream-journal";
    let inner = "out/.mats-stream-ridge=1.partial/.mats-stream-journal";
    for journal in [outer, inner] {
        let path = scratch.join(journal);
        for eighths in [0, 3, 7] {
            let _ = fs::remove_dir_all(scratch.join("out"));
            assert_eq!(run(&scratch, &[], "rename.report=kill@1").code, 137);
            let bytes = fs::read(&path).expect("a journal");
            fs::write(&path, &bytes[..bytes.len() * eighths / 8]).expect("cut it");
            let output = run(&scratch, &["--resume"], "");
            assert_eq!(output.code, 0, "{journal} cut at {eighths}/8: {}", output.stderr);
            assert_same(&scratch, &expected, &format!("{journal} cut at {eighths}/8"));
        }
    }
}

#[test]
fn another_sweep_is_not_resumed_over() {
    let scratch = world();
    let expected = clean(&scratch);
    assert_eq!(run(&scratch, &[], "shard.write=kill@5").code, 137);
    let config = fs::read_to_string(scratch.join("c.yml")).expect("there");
    let refused = |config: String, words: &str| {
        scratch.write("c.yml", config);
        let output = run(&scratch, &["--resume"], "");
        assert_eq!(output.code, 2, "{}", output.stderr);
        assert!(error_line(&output).contains(words), "{}", output.stderr);
    };
    // Other values have other names: what is there is somebody else's. The same names of another merge are another config.
    refused(config.replace("0.1, 1, 10", "0.1, 1"), "ridge=10");
    refused(config.replace("max_iterations: 6", "max_iterations: 7"), "another config");
    let (single, _) = config.split_once("sweep:").expect("a sweep");
    refused(single.to_owned(), "ridge=");
    scratch.write("c.yml", &config);
    let seeded = run(&scratch, &["--resume", "--seed", "7"], "");
    assert!(seeded.code == 2 && seeded.stderr.contains("--seed 0"), "{}", seeded.stderr);
    scratch.write("out/notes.txt", "somebody else's");
    let foreign = run(&scratch, &["--resume"], "");
    assert!(foreign.code == 2 && foreign.stderr.contains("notes.txt"), "{}", foreign.stderr);
    fs::remove_file(scratch.join("out/notes.txt")).expect("remove a file");
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    assert_same(&scratch, &expected, "resumed");
    // Complete, and of another sweep.
    let seeded = run(&scratch, &["--resume", "--seed", "7"], "");
    assert!(seeded.code == 2 && seeded.stderr.contains("is complete"), "{}", seeded.stderr);
    // A merge that did not finish is no sweep's.
    fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    scratch.write("c.yml", single);
    assert_eq!(run(&scratch, &[], "shard.write=kill@5").code, 137);
    scratch.write("c.yml", &config);
    let output = run(&scratch, &["--resume"], "");
    assert!(output.code == 2 && output.stderr.contains("another config"), "{}", output.stderr);
}
