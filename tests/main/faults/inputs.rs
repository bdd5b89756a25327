//! F6, F7, F13: inputs that change while they are read, or between two parts of a run; `verify` on what has changed since.

use std::fs::{self, File, FileTimes, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{ARGS, assert_same, clean, run, world};
use crate::util::{Output, Scratch, code, error_line, strict_json, wait};

/// Stops a run after its first write, does something to the inputs, and lets it go on.
fn meanwhile(scratch: &Scratch, flags: &[&str], change: impl FnOnce()) -> Output {
    let pause = scratch.join("paused");
    let mut command = scratch.command(&[&ARGS[..], &["--out-shard-size", "3kB"], flags].concat());
    command.env("MATS_STREAM_FAIL", "shard.write=pause@1").env("MATS_STREAM_PAUSE", &pause);
    let stderr = scratch.join("stderr.txt");
    let file = File::create(&stderr).expect("create a file");
    let mut child = command.stdout(Stdio::null()).stderr(file).spawn().expect("start the binary");
    super::kill::until_exists(&pause);
    change();
    fs::remove_file(&pause).expect("let it go on");
    let status = wait(&mut child, Instant::now() + Duration::from_secs(30)).expect("it ends");
    let stderr = fs::read_to_string(&stderr).expect("written");
    Output { code: code(status), stdout: String::new(), stderr }
}

fn assert_changed(scratch: &Scratch, output: &Output) {
    assert_eq!(output.code, 74, "{}", output.stderr);
    let last = output.stderr.lines().last().expect("a line");
    let named = last.contains("c/model.safetensors") || last.contains("an input changed");
    assert!(named && last.contains("mats-stream"), "{}", output.stderr);
    if let Ok(entries) = fs::read_dir(scratch.join("out")) {
        for entry in entries {
            let name = entry.expect("list").file_name();
            assert!(name.to_string_lossy().starts_with('.'), "{name:?} has a final name");
        }
    }
}

#[test]
fn f06_an_input_that_is_truncated_ends_the_run() {
    for io in ["mmap", "pread"] {
        let scratch = world();
        let input = scratch.join("c/model.safetensors");
        let output = meanwhile(&scratch, &["--io", io], || {
            OpenOptions::new().write(true).open(&input).expect("open").set_len(600).expect("truncate");
        });
        assert_changed(&scratch, &output);
    }
}

#[test]
fn f07_an_input_that_is_rewritten_in_place_ends_the_run() {
    for io in ["mmap", "pread"] {
        let scratch = world();
        let input = scratch.join("c/model.safetensors");
        let output = meanwhile(&scratch, &["--io", io], || {
            let file = OpenOptions::new().write(true).open(&input).expect("open");
            let end = file.metadata().expect("look at a file").len();
            file.write_all_at(b"\x7f", end - 1).expect("rewrite a byte");
        });
        assert_changed(&scratch, &output);
    }
}

#[test]
fn f07_an_input_that_vanishes_ends_the_run() {
    let scratch = world();
    let input = scratch.join("c/model.safetensors");
    let output = meanwhile(&scratch, &[], || fs::remove_file(&input).expect("remove a file"));
    assert_changed(&scratch, &output);
}

/// Changes the last byte and sets the times back.
fn change_unseen(path: &Path) {
    let metadata = fs::metadata(path).expect("look at a file");
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, metadata.len() - 1).expect("read");
    file.write_all_at(&[byte[0] ^ 1], metadata.len() - 1).expect("rewrite a byte");
    let modified = metadata.modified().expect("a time");
    file.set_times(FileTimes::new().set_modified(modified)).expect("set the time back");
}

#[test]
fn f13_a_change_with_the_clock_set_back_is_not_resumed_over() {
    let scratch = world();
    assert_eq!(run(&scratch, &[], "shard.write=kill@5").code, 137);
    let input = scratch.join("c/model.safetensors");
    change_unseen(&input);
    let output = run(&scratch, &["--resume"], "");
    assert_eq!(output.code, 2, "{}", output.stderr);
    let line = error_line(&output);
    assert!(line.contains("other inputs") && line.contains("c/model.safetensors"), "{line}");
    // Nothing was thrown away by asking.
    assert!(scratch.join("out/.mats-stream-journal").exists());
}

#[test]
fn another_config_or_flag_is_not_resumed_over() {
    let scratch = world();
    let expected = clean(&scratch);
    assert_eq!(run(&scratch, &[], "shard.write=kill@5").code, 137);
    let config = fs::read_to_string(scratch.join("c.yml")).expect("there");
    scratch.write("c.yml", config.replace("max_iterations: 8", "max_iterations: 9"));
    let output = run(&scratch, &["--resume"], "");
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(error_line(&output).contains("another config"), "{}", output.stderr);
    // Written otherwise, meaning the same.
    scratch.write("c.yml", format!("# a comment\n{config}"));
    let seeded = run(&scratch, &["--resume", "--seed", "7"], "");
    assert_eq!(seeded.code, 2, "{}", seeded.stderr);
    assert!(error_line(&seeded).contains("--seed 0"), "{}", seeded.stderr);
    scratch.write("out/notes.txt", "somebody else's");
    let foreign = run(&scratch, &["--resume"], "");
    assert_eq!(foreign.code, 2, "{}", foreign.stderr);
    assert!(error_line(&foreign).contains("notes.txt"), "{}", foreign.stderr);
    fs::remove_file(scratch.join("out/notes.txt")).expect("remove a file");
    scratch.write("c.yml", config);
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    assert_same(&scratch, &expected, "resumed");
    // Complete, and of another run.
    let output = run(&scratch, &["--resume", "--seed", "7"], "");
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(error_line(&output).contains("is complete"), "{}", output.stderr);
    // Complete, and the inputs are gone: still nothing to do.
    fs::remove_dir_all(scratch.join("b")).expect("remove a directory");
    let output = run(&scratch, &["--resume"], "");
    assert_eq!(output.code, 0, "{}", output.stderr);
}

/// The findings of `verify --json`.
fn findings(scratch: &Scratch, flags: &[&str], expected_code: i32) -> Vec<(String, String)> {
    let output = scratch.run(&[&["verify", "out", "--json"], flags].concat());
    assert_eq!(output.code, expected_code, "{}{}", output.stdout, output.stderr);
    let found = strict_json(&output.stdout);
    assert_eq!(found["ok"], expected_code == 0);
    let text = |value: &serde_json::Value| value.as_str().expect("a string").to_owned();
    let problems = found["problems"].as_array().expect("a list");
    problems.iter().map(|p| (text(&p["what"]), text(&p["name"]))).collect()
}

#[test]
fn verify_names_what_has_changed() {
    let scratch = world();
    assert_eq!(run(&scratch, &[], "").code, 0);
    assert_eq!(findings(&scratch, &["--inputs"], 0), []);
    let shards: Vec<_> = super::files(&scratch.join("out"))
        .into_iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .collect();
    let finding = |what: &str, name: &str| (what.to_owned(), name.to_owned());
    // One bit of the last tensor of the first shard.
    let (first, bytes) = &shards[0];
    let last = crate::util::read_safetensors(&scratch.join("out").join(first));
    let mut flipped = bytes.clone();
    *flipped.last_mut().expect("not empty") ^= 0x10;
    scratch.write(format!("out/{first}"), &flipped);
    let found = findings(&scratch, &[], 1);
    assert!(found.len() == 1 && found[0].0 == "changed_tensor", "{found:?}");
    assert!(last.iter().any(|t| t.name == found[0].1), "{found:?}");
    // Cut, then gone: its tensors are missing, and the rest is still looked at.
    scratch.write(format!("out/{first}"), &bytes[..bytes.len() - 1]);
    let cut = findings(&scratch, &[], 1);
    assert!(cut.contains(&finding("broken_file", first)), "{cut:?}");
    fs::remove_file(scratch.join("out").join(first)).expect("remove a file");
    let gone = findings(&scratch, &[], 1);
    assert!(last.iter().all(|t| gone.contains(&finding("missing_tensor", &t.name))), "{gone:?}");
    assert_eq!(gone.len(), last.len() + 1, "{gone:?}");
    scratch.write(format!("out/{first}"), bytes);
    // A tensor that the index does not lead to any more.
    let index = fs::read_to_string(scratch.join("out/model.safetensors.index.json")).expect("there");
    let mut value = strict_json(&index);
    value["weight_map"].as_object_mut().expect("a map").remove("norm");
    scratch.write("out/model.safetensors.index.json", value.to_string());
    assert_eq!(findings(&scratch, &[], 1), [finding("missing_tensor", "norm")]);
    scratch.write("out/model.safetensors.index.json", &index);
    // A weight file that nobody knows.
    scratch.write("out/extra.safetensors", bytes);
    assert_eq!(findings(&scratch, &[], 1), [finding("extra_file", "extra.safetensors")]);
    fs::remove_file(scratch.join("out/extra.safetensors")).expect("remove a file");
    // Inputs: touched, changed, gone.
    let input = scratch.join("b/model.safetensors");
    let original = fs::read(&input).expect("there");
    let modified = fs::metadata(&input).expect("there").modified().expect("a time");
    let set_back = || {
        let file = OpenOptions::new().write(true).open(&input).expect("open");
        file.set_times(FileTimes::new().set_modified(modified)).expect("set the time back");
    };
    let changed = [finding("changed_input", "b: model.safetensors")];
    fs::write(&input, &original).expect("write");
    assert_eq!(findings(&scratch, &["--inputs"], 1), changed);
    set_back();
    assert_eq!(findings(&scratch, &["--inputs"], 0), []);
    let mut renamed = original.clone();
    let at = original.windows(8).position(|w| w == b"layers.3").expect("in the header");
    renamed[at + 7] = b'9';
    fs::write(&input, renamed).expect("write");
    set_back();
    assert_eq!(findings(&scratch, &["--inputs"], 1), changed);
    fs::remove_file(&input).expect("remove a file");
    assert_eq!(findings(&scratch, &["--inputs"], 1), changed);
    assert_eq!(findings(&scratch, &[], 0), [], "inputs are looked at only when asked for");
    // The text is for people, and names come escaped.
    let output = scratch.run(&["verify", "out", "--inputs"]);
    assert!(output.stdout.contains("changed input `b: model.safetensors`"), "{}", output.stdout);
}

#[test]
fn verify_needs_a_report() {
    let scratch = world();
    for directory in ["absent", "a"] {
        let output = scratch.run(&["verify", directory]);
        assert_eq!(output.code, 2, "{}", output.stderr);
        assert!(error_line(&output).contains("merge_report.json"));
    }
    assert_eq!(run(&scratch, &[], "rename.index=kill").code, 137);
    assert_eq!(scratch.run(&["verify", "out"]).code, 2, "half-published is not finished");
    // A report that names files elsewhere, or no checksums.
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    let path = scratch.join("out/merge_report.json");
    let report = fs::read_to_string(&path).expect("there");
    let mut value = strict_json(&report);
    value["outputs"][0]["name"] = "../a/model.safetensors".into();
    fs::write(&path, value.to_string()).expect("write");
    assert!(findings(&scratch, &[], 1).contains(&("broken_file".into(), "../a/model.safetensors".into())));
    let mut value = strict_json(&report);
    value["parameters"]["norm"]["checksum"] = "crc32:1".into();
    fs::write(&path, value.to_string()).expect("write");
    assert_eq!(findings(&scratch, &[], 1), [("unknown_checksum".into(), "norm".into())]);
}
