//! What goes wrong while a merge runs, one test for each row of the matrix of faults (`f03_…` is its row F3).
//!
//! Whatever happens, nothing stands under a final name before it is complete, and `--resume` ends in the bytes of a run
//! that nothing happened to. F9's power cut is checked by the order of system calls.

mod inputs;
mod journal;
mod kill;
mod preload;
mod solve;
mod space;
mod sweep;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::util::{Output, Random, Scratch, Statistics, Tensor, models};

/// Every row of both matrices, B1 to B32 and F1 to F15, has a test of its name.
#[test]
fn every_row_has_a_test() {
    fn collect(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).expect("list a directory") {
            let path = entry.expect("list a directory").path();
            if path.is_dir() {
                collect(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(path).expect("read a file"));
            }
        }
    }
    let mut text = String::new();
    collect(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/main")), &mut text);
    for (row, last) in [('b', 32), ('f', 15)] {
        for number in 1..=last {
            assert!(text.contains(&format!("fn {row}{number:02}_")), "row {row}{number} has no test");
        }
    }
}

const ARGS: [&str; 6] = ["merge", "c.yml", "--out", "out", "--progress", "none"];

/// Three models, K-FAC on six weights of different shapes, an averaged norm and an integer tensor; three shards.
fn world() -> Scratch {
    world_of(6, 24, 8)
}

/// With `count` weights of about `side` squared, and so many steps for each.
fn world_of(count: usize, side: usize, steps: usize) -> Scratch {
    let mut random = Random::new(700);
    let scratch = Scratch::new();
    for model in ["a", "b", "c"] {
        let mut tensors = vec![Tensor::new("ids", "I64", &[3], &[1.0, 2.0, 3.0])];
        let mut statistics = Statistics::new();
        for k in 0..count {
            let (out, input) = (side + k % 5, side - k % 3);
            let name = format!("layers.{k}.weight");
            tensors.push(Tensor::random(&name, "BF16", &[out, input], &mut random));
            for (kind, side) in [("input_gram", input), ("output_gram", out)] {
                let gram = crate::algebra::gram(side, 2 * side, &mut random);
                statistics = statistics.full(&format!("{name}/{kind}"), side, &gram.data);
            }
        }
        tensors.push(Tensor::random("norm", "F32", &[side], &mut random));
        scratch.model(model, &tensors);
        statistics.write(&scratch, &format!("{model}.safetensors"));
    }
    let entries = [("a", Some("a.safetensors")), ("b", Some("b.safetensors")), ("c", Some("c.safetensors"))];
    let head = format!(
        "merge_method: mats\nsubspace: kfac\ninitial: average\nsolver: {{ method: cg, tolerance: 0, max_iterations: {steps} }}"
    );
    scratch.write("c.yml", format!("{head}\n{}", models(&entries)));
    scratch
}

/// Runs [`ARGS`] with further flags and a failpoint.
fn run(scratch: &Scratch, flags: &[&str], fail: &str) -> Output {
    let shards = ["--out-shard-size", "3kB", "--threads", "2"];
    let fail = format!("commit.often=;{fail}");
    scratch.run_with(&[&ARGS[..], &shards, flags].concat(), &[("MATS_STREAM_FAIL", &fail)])
}

/// What an undisturbed run writes: every file but the report, which has times in it.
fn clean(scratch: &Scratch) -> BTreeMap<String, Vec<u8>> {
    let output = run(scratch, &[], "");
    assert_eq!(output.code, 0, "{}", output.stderr);
    let files = files(&scratch.join("out"));
    fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    assert!(files.keys().filter(|name| name.ends_with(".safetensors")).count() > 1, "several shards");
    files
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(directory)
        .expect("list a directory")
        .map(|entry| entry.expect("list a directory"))
        .map(|e| (e.file_name().to_string_lossy().into_owned(), fs::read(e.path()).expect("read a file")))
        .filter(|(name, _)| name != "merge_report.json")
        .collect()
}

/// `out` holds nothing that looks finished and is not: no index without all its shards, no report without all.
fn assert_nothing_half(scratch: &Scratch, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let directory = scratch.join("out");
    if !directory.exists() {
        return;
    }
    let found = files(&directory);
    let complete = directory.join("merge_report.json").exists();
    let index = found.contains_key("model.safetensors.index.json");
    for (name, bytes) in expected {
        match found.get(name) {
            Some(got) => assert!(got == bytes, "{what}: {name} has its final name and other bytes"),
            None => {
                assert!(!complete, "{what}: a report without {name}");
                assert!(!(index && name.ends_with(".safetensors")), "{what}: an index without {name}");
            }
        }
    }
}

/// `out` is what an undisturbed run writes, nothing is left beside it, and `verify` agrees.
fn assert_same(scratch: &Scratch, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let found = files(&scratch.join("out"));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (name, bytes) in expected {
        assert!(found[name] == *bytes, "{what}: {name} differs");
    }
    let verified = scratch.run(&["verify", "out", "--inputs"]);
    assert_eq!(verified.code, 0, "{what}: {}{}", verified.stdout, verified.stderr);
}
