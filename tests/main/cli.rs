//! Flags, exit codes, signals and streams that close early.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::algebra::Matrix;
use crate::util::{Output, Random, Scratch, Statistics, Tensor, code, error_line, models, wait};

fn ready() -> Scratch {
    let scratch = Scratch::new();
    let mut random = Random::new(90);
    for name in ["a", "b"] {
        scratch.model(name, &[Tensor::random("w", "F32", &[3, 4], &mut random)]);
    }
    scratch.write("c.yml", "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n");
    scratch
}

#[test]
fn version_and_help() {
    let scratch = Scratch::new();
    let version = scratch.run(&["--version"]);
    assert_eq!(
        (version.code, version.stdout.trim()),
        (0, concat!("mats-stream ", env!("CARGO_PKG_VERSION")))
    );
    let help = scratch.run(&["--help"]);
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
    for word in [
        "merge",
        "plan",
        "inspect",
        "diff",
        "verify",
        "report",
        "completions",
        "man",
        "Exit codes",
        "Examples",
    ] {
        assert!(help.stdout.contains(word), "{}", help.stdout);
    }
    let merge = scratch.run(&["merge", "--help"]);
    assert_eq!(merge.code, 0);
    for flag in [
        "--out",
        "--max-memory",
        "--threads",
        "--out-shard-size",
        "--dry-run",
        "--io",
        "--seed",
        "--nonfinite",
        "--require-convergence",
        "--resume",
        "--untie",
        "--progress",
        "--log-level",
    ] {
        assert!(merge.stdout.contains(flag), "{flag}: {}", merge.stdout);
    }
}

#[test]
fn flags_that_are_wrong() {
    let scratch = ready();
    for args in [
        &[][..],
        &["frobnicate"],
        &["merge"],
        &["merge", "c.yml"],
        &["merge", "c.yml", "--out", ""],
        &["merge", "c.yml", "--out", "out", "--unknown"],
        &["merge", "c.yml", "--out", "out", "extra"],
        &["merge", "c.yml", "--out", "out", "--io", "direct"],
        &["merge", "c.yml", "--out", "out", "--nonfinite", "maybe"],
        &["merge", "c.yml", "--out", "out", "--progress", "fancy"],
        &["merge", "c.yml", "--out", "out", "--seed", "-1"],
        &["merge", "c.yml", "--out", "out", "--threads", "two"],
        &["diff", "a"],
        &["diff", "a", "b", "--tolerance", "nan"],
        &["diff", "a", "b", "--tolerance=-1"],
        &["inspect"],
    ] {
        let output = scratch.run(args);
        assert_eq!(output.code, 2, "{args:?}: {}", output.stderr);
        assert_eq!(output.stdout, "", "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
    assert!(!scratch.join("out").exists());
}

#[test]
fn sizes() {
    let scratch = ready();
    for size in ["0", "0GiB", "-1", "5B", "8 parsecs", "GiB", "", "nan", "1e9", "99999999999999999999GiB"] {
        for flag in ["--max-memory", "--out-shard-size"] {
            let output = scratch.run(&["merge", "c.yml", "--out", "out", &format!("{flag}={size}")]);
            assert_eq!(output.code, 2, "{flag} {size}: {}", output.stderr);
            assert!(!scratch.join("out").exists());
        }
    }
    for (k, size) in ["8GiB", "512MiB", "5GB", "1073741824", "1.5GiB"].into_iter().enumerate() {
        let out = format!("out{k}");
        let output =
            scratch.run(&["merge", "c.yml", "--out", &out, "--max-memory", size, "--out-shard-size", size]);
        assert_eq!(output.code, 0, "{size}: {}", output.stderr);
    }
}

#[test]
fn a_missing_config() {
    let scratch = ready();
    std::fs::create_dir(scratch.join("directory.yml")).expect("create a directory");
    for name in ["absent.yml", "directory.yml", "c.yml/below"] {
        for args in [vec!["merge", name, "--out", "out"], vec!["plan", name]] {
            let output = scratch.run(&args);
            assert_eq!(output.code, 2, "{args:?}: {}", output.stderr);
            assert!(error_line(&output).contains(name), "{}", output.stderr);
        }
    }
    assert!(!scratch.join("out").exists());
}

#[test]
fn paths_are_relative_to_the_config() {
    let scratch = ready();
    scratch
        .write("deep/er/c.yml", "merge_method: linear\nmodels: [{ model: ../../a }, { model: ../../b }]\n");
    let output = scratch.run(&["merge", "deep/er/c.yml", "--out", "out"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let direct = scratch.run(&["merge", "c.yml", "--out", "direct"]);
    assert_eq!(direct.code, 0, "{}", direct.stderr);
    assert_eq!(scratch.merged("out").tensors, scratch.merged("direct").tensors);
}

/// Hours of work, had it to finish: ill-conditioned systems and a tolerance that cannot be met.
fn endless() -> Scratch {
    const SIDE: usize = 160;
    let mut random = Random::new(91);
    let scratch = Scratch::new();
    let names: Vec<String> = (0..4).map(|k| format!("layers.{k}.weight")).collect();
    for model in ["a", "b", "c"] {
        scratch.model(
            model,
            &names.iter().map(|n| Tensor::random(n, "F32", &[SIDE, SIDE], &mut random)).collect::<Vec<_>>(),
        );
        let mut statistics = Statistics::new();
        for name in &names {
            for kind in ["input_gram", "output_gram"] {
                // Eigenvalues from 1 to 1e-5 on each side.
                let mut m = Matrix::zeros(SIDE, SIDE);
                for i in 0..SIDE {
                    let exponent = -5.0 * i as f64 / (SIDE - 1) as f64 + 0.3 * random.uniform();
                    m.data[i * SIDE + i] = 10f64.powf(exponent);
                }
                statistics = statistics.packed(&format!("{name}/{kind}"), SIDE, &m.data);
            }
        }
        statistics.write(&scratch, &format!("{model}.safetensors"));
    }
    let entries = ["a", "b", "c"].map(|m| (m, format!("{m}.safetensors")));
    let entries: Vec<(&str, Option<&str>)> = entries.iter().map(|(m, s)| (*m, Some(s.as_str()))).collect();
    let head = "merge_method: mats\nsubspace: kfac\ninitial: zero\nsolver: { method: cg, max_iterations: 1000000, tolerance: 0 }";
    scratch.write("c.yml", format!("{head}\n{}", models(&entries)));
    scratch
}

fn interrupted(signal: Signal, expected: i32) {
    let scratch = endless();
    let args = ["merge", "c.yml", "--out", "out", "--progress", "none"];
    let started = Instant::now();
    let mut child = scratch
        .command(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the binary");
    // The journal appears once inputs are open and the plan stands; then let it get into a solve.
    while !scratch.join("out/.mats-stream-journal").exists() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(scratch.join("out/.mats-stream-journal").exists(), "the merge does not start");
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().expect("wait for the binary").is_none(), "the merge was to take longer");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
    kill_process(pid, signal).expect("send a signal");
    let status = wait(&mut child, Instant::now() + Duration::from_secs(20)).expect("the signal ends it");
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("read a pipe");
    let output = Output { code: code(status), stdout: String::new(), stderr };
    scratch.note(&args, &output, started.elapsed());
    assert_eq!(output.code, expected, "{}", output.stderr);
    assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
    assert!(output.stderr.starts_with("mats-stream: "), "{}", output.stderr);
    let names: Vec<String> = match std::fs::read_dir(scratch.join("out")) {
        Ok(entries) => entries.map(|e| e.expect("list").file_name().to_string_lossy().into_owned()).collect(),
        Err(_) => Vec::new(),
    };
    for name in names {
        assert!(name.starts_with('.'), "{name} stands under a final name");
    }
    assert!(output.stderr.contains("--resume"), "it says how to go on: {}", output.stderr);
    // Nobody else may take the directory, and it may not be taken by mistake.
    let again = scratch.run(&["merge", "c.yml", "--out", "out"]);
    assert_eq!(again.code, 2, "{}", again.stderr);
    assert!(error_line(&again).contains("--resume"));
    scratch.write("c.yml", "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n");
    let other = scratch.run(&["merge", "c.yml", "--out", "out", "--resume"]);
    assert_eq!(other.code, 2, "{}", other.stderr);
    assert!(error_line(&other).contains("another config"), "{}", other.stderr);
}

#[test]
fn f11_sigterm_ends_a_merge() {
    interrupted(Signal::TERM, 143);
}

#[test]
fn f11_sigint_ends_a_merge() {
    interrupted(Signal::INT, 130);
}

#[test]
fn f10_a_second_run_into_the_same_directory_is_told_to_wait() {
    let scratch = endless();
    let started = Instant::now();
    let mut child = scratch
        .command(&["merge", "c.yml", "--out", "out", "--progress", "none"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start the binary");
    while !scratch.join("out/.mats-stream-journal").exists() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    scratch.write("d.yml", "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n");
    let second = scratch.run(&["merge", "d.yml", "--out", "out", "--progress", "none"]);
    let same = scratch.run(&["merge", "c.yml", "--out", "out", "--progress", "none", "--resume"]);
    child.kill().expect("kill the first run");
    child.wait().expect("wait for the first run");
    assert_eq!(second.code, 75, "{}", second.stderr);
    assert!(error_line(&second).contains("out"));
    assert_eq!(same.code, 75, "--resume does not take it from a run that lives: {}", same.stderr);
}

/// Runs with a stdout or stderr whose reader has gone, or that is full.
fn with_streams(scratch: &Scratch, args: &[&str], stdout: Stdio, stderr: Stdio) -> i32 {
    let mut child = scratch
        .command(args)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .expect("start the binary");
    let status = wait(&mut child, Instant::now() + Duration::from_secs(60)).expect("it ends");
    code(status)
}

fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    std::fs::File::options().write(true).open("/dev/full").expect("a device that is always full").into()
}

#[test]
fn f11_closed_and_full_streams_are_no_panic() {
    let scratch = ready();
    // More than a pipe holds, so that a write fails even where the first ones are buffered.
    let many: Vec<Tensor> =
        (0..3000).map(|k| Tensor::f32(&format!("layers.{k}.weight"), &[1], &[0.5])).collect();
    scratch.model("many", &many);
    scratch.write("many.yml", "merge_method: linear\nmodels: [{ model: many }, { model: many }]\n");
    let record = r#"{"version": "", "config_hash": "", "wall_seconds": 1, "bytes_read": 0, "bytes_written": 0, "flops": 0}"#;
    scratch.write("reported/merge_report.json", record);
    for args in [
        &["inspect", "many"][..],
        &["inspect", "many", "--json"],
        &["plan", "many.yml"],
        &["plan", "many.yml", "--json"],
        &["diff", "many", "a"],
        &["completions", "zsh"],
        &["man"],
        &["report", "reported"],
        &["--help"],
        &["--version"],
        &["merge", "many.yml", "--dry-run"],
    ] {
        for (what, stdout) in [("closed", closed()), ("full", full())] {
            let output_file = scratch.join("stderr.txt");
            let stderr = std::fs::File::create(&output_file).expect("create a file");
            let code = with_streams(&scratch, args, stdout, stderr.into());
            let text = std::fs::read_to_string(&output_file).expect("written");
            assert!(
                !text.contains("panicked") && code != 101 && code < 128,
                "{args:?}, {what}: exit code {code}: {text}"
            );
        }
    }
    // A merge needs neither stream.
    for (k, (stdout, stderr)) in [(closed(), closed()), (full(), full())].into_iter().enumerate() {
        let out = format!("out{k}");
        let code = with_streams(
            &scratch,
            &["merge", "many.yml", "--out", &out, "--progress", "plain"],
            stdout,
            stderr,
        );
        assert_eq!(code, 0, "streams {k}");
        assert_eq!(scratch.merged(&out).tensors.len(), 3000);
    }
    // An error keeps its code where nobody reads it.
    assert_eq!(with_streams(&scratch, &["merge", "absent.yml", "--out", "x"], closed(), closed()), 2);
}
