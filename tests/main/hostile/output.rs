//! Output directories that would hurt something, or cannot be written.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::{LINEAR, good_weight, with_good_model};
use crate::util::{Scratch, error_line, read_safetensors};

/// Models `a` and `b`, and the config `c.yml`.
fn ready() -> Scratch {
    let scratch = with_good_model();
    scratch.model("b", &[good_weight(2)]);
    scratch.write("c.yml", LINEAR);
    scratch
}

/// Every file below the scratch directory, with its bytes.
fn listing(scratch: &Scratch) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut open = vec![scratch.path().to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).expect("list a directory") {
            let path = entry.expect("list a directory").path();
            let name = path.strip_prefix(scratch.path()).expect("inside").to_string_lossy().into_owned();
            if path.is_dir() && !path.is_symlink() {
                found.push((name, Vec::new()));
                open.push(path);
            } else {
                found.push((name, fs::read(&path).unwrap_or_default()));
            }
        }
    }
    found.sort();
    found
}

fn refuse_out(scratch: &Scratch, out: &str, words: &[&str]) {
    let before = listing(scratch);
    let output = scratch.run(&["merge", "c.yml", "--out", out, "--progress", "none"]);
    assert_eq!(output.code, 2, "{out}: {}", output.stderr);
    let line = error_line(&output);
    for word in words {
        assert!(line.contains(word), "the error should name `{word}`: {line}");
    }
    assert_eq!(listing(scratch), before, "{out}: a refused run touched something");
}

#[test]
fn b29_output_over_an_input() {
    let scratch = ready();
    refuse_out(&scratch, "a", &["a"]);
    refuse_out(&scratch, "a/merged", &["a/merged"]);
    refuse_out(&scratch, "a/deeper/merged", &["a/deeper/merged"]);
    refuse_out(&scratch, "./b/../a", &["a"]);
    // Around the inputs: the scratch directory itself, which is not empty either.
    refuse_out(&scratch, ".", &[]);
    symlink("a", scratch.join("link")).expect("link");
    refuse_out(&scratch, "link", &["link"]);
    refuse_out(&scratch, "link/merged", &["link/merged"]);
    // A statistics file and a base are inputs, too.
    let statistics = crate::util::Statistics::new().diagonal("w", &[3, 4], &[1.0; 12]);
    statistics.write(&scratch, "stats/a.safetensors");
    scratch.model("base", &[good_weight(3)]);
    scratch.write(
        "c.yml",
        "merge_method: fisher\nbase_model: base\nmodels:\n  - model: a\n    statistics: stats/a.safetensors\n  - model: b\n    statistics: stats/a.safetensors\n",
    );
    refuse_out(&scratch, "base/merged", &["base/merged"]);
    refuse_out(&scratch, "stats", &["stats"]);
}

#[test]
fn b29_output_that_is_taken() {
    let scratch = ready();
    scratch.write("full/notes.txt", "mine");
    refuse_out(&scratch, "full", &["full", "notes.txt"]);
    scratch.write("hidden/.keep", "");
    refuse_out(&scratch, "hidden", &["hidden"]);
    scratch.write("file", "mine");
    refuse_out(&scratch, "file", &["file"]);
    refuse_out(&scratch, "file/out", &["file"]);
    symlink("nowhere", scratch.join("dangling")).expect("link");
    refuse_out(&scratch, "dangling", &["dangling"]);
    // A finished merge is not written over.
    assert_eq!(scratch.run(&["merge", "c.yml", "--out", "done"]).code, 0);
    refuse_out(&scratch, "done", &["done"]);
}

#[test]
fn b29_read_only_place() {
    let scratch = ready();
    let locked = scratch.join("locked");
    fs::create_dir(&locked).expect("create a directory");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).expect("change permissions");
    // Root writes where permissions forbid it; then there is nothing to refuse.
    if fs::create_dir(locked.join("probe")).is_ok() {
        fs::remove_dir(locked.join("probe")).expect("remove the probe");
    } else {
        refuse_out(&scratch, "locked/out", &["locked"]);
    }
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).expect("change permissions");
    // A file system without files of ours refuses everybody.
    if fs::metadata("/proc/self").is_ok() {
        refuse_out(&scratch, "/proc/mats-stream-test", &["/proc/mats-stream-test"]);
    }
}

#[test]
fn b29_unusual_names_work() {
    let scratch = ready();
    for out in ["with space", "ünïcode-出力", "deep/er/still", "-dash", "line\nbreak", "trailing/", "empty"]
    {
        fs::create_dir_all(scratch.join("empty")).expect("create a directory");
        let output = scratch.run(&["merge", "c.yml", &format!("--out={out}"), "--progress", "none"]);
        assert_eq!(output.code, 0, "{out}: {}", output.stderr);
        let merged = scratch.merged(out);
        assert_eq!(merged.tensors["w"].shape, [3, 4]);
        // Readable by whom the umask allows: safetensors' own writer would leave 0600.
        let mode =
            fs::metadata(merged.directory.join("model.safetensors")).expect("there").permissions().mode();
        assert_eq!(mode & 0o400, 0o400);
        let plain = fs::metadata(scratch.write("probe", "")).expect("there").permissions().mode();
        assert_eq!(mode, plain, "file modes follow the umask");
    }
}

#[test]
fn b29_a_failed_run_leaves_the_directory_as_it_was() {
    let scratch = ready();
    fs::create_dir(scratch.join("mine")).expect("create a directory");
    scratch.write(
        "b/model.safetensors",
        crate::util::safetensors(&[good_weight(2).with_value(4, f64::NAN)], &[]),
    );
    let output = scratch.run(&["merge", "c.yml", "--out", "mine", "--progress", "none"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert_eq!(
        fs::read_dir(scratch.join("mine")).expect("still there").count(),
        0,
        "an empty directory of the user's stays"
    );
    let output = scratch.run(&["merge", "c.yml", "--out", "new/er", "--progress", "none"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(!scratch.join("new").exists(), "directories that were made for the run go with it");
    // The inputs are what they were.
    assert_eq!(read_safetensors(&scratch.join("a/model.safetensors")), [good_weight(1)]);
}
