//! Shard indexes that lie, and shards that are no files.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use super::{LINEAR, good_weight, refuse_model_b, with_good_model};
use crate::util::{Random, Scratch, Tensor, safetensors, sparse};

const INDEX: &str = "model.safetensors.index.json";

/// A good `a`, and a `b` whose index is this text beside a good shard `s.safetensors`.
fn with_index(index: &str) -> Scratch {
    let scratch = with_good_model();
    scratch.write("b/s.safetensors", safetensors(&[good_weight(2)], &[]));
    scratch.write(format!("b/{INDEX}"), index);
    scratch
}

fn refuse_index(index: &str, words: &[&str]) {
    refuse_model_b(&with_index(index), &[&[INDEX], words].concat());
}

#[test]
fn b14_weight_map_paths() {
    let good = safetensors(&[good_weight(2)], &[]);
    for value in [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../s.safetensors",
        "sub/s.safetensors",
        "./s.safetensors",
        "C:\\x",
        "..\\s",
        "",
        ".",
        "..",
        "s.safetensors/",
        "s.safetensors\u{0}",
        "\n",
    ] {
        let scratch = with_index(&json!({ "weight_map": { "w": value } }).to_string());
        // Each of them leads to a good shard, were it followed.
        scratch.write("outside.safetensors", &good);
        scratch.write("b/sub/s.safetensors", &good);
        fs::create_dir_all(scratch.join("b/a")).expect("create a directory");
        refuse_model_b(&scratch, &[INDEX, "`w`"]);
    }
    let scratch = with_index("{}");
    let absolute = scratch.write("outside.safetensors", &good);
    scratch.write(format!("b/{INDEX}"), json!({ "weight_map": { "w": absolute } }).to_string());
    refuse_model_b(&scratch, &[INDEX, "`w`"]);
}

#[test]
fn b15_malformed_index() {
    refuse_index("", &[]);
    refuse_index("{", &[]);
    refuse_index("[]", &[]);
    refuse_index("{}", &["weight_map"]);
    refuse_index(r#"{"weight_map":{}}"#, &["weight_map"]);
    refuse_index(r#"{"weight_map":["w"]}"#, &[]);
    refuse_index(r#"{"weight_map":{"w":"s.safetensors","w":"s.safetensors"}}"#, &["`w`"]);
    refuse_index(
        r#"{"weight_map":{"w":"s.safetensors"},"weight_map":{"w":"s.safetensors"}}"#,
        &["weight_map"],
    );
    for value in ["1", "null", "[\"s.safetensors\"]", "{}"] {
        refuse_index(&format!(r#"{{"weight_map":{{"w":{value}}}}}"#), &["`w`"]);
    }
    refuse_index(&format!(r#"{{"metadata":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000)), &[]);
}

#[test]
fn b15_index_of_300_mb() {
    let scratch = with_index("{}");
    sparse(&scratch.join("b").join(INDEX), b"{", 300_000_000);
    refuse_model_b(&scratch, &[INDEX, "100000000"]);
}

#[test]
fn b16_index_names_a_tensor_that_its_shard_lacks() {
    let map = json!({ "weight_map": { "w": "s.safetensors", "ghost": "s.safetensors" } });
    refuse_index(&map.to_string(), &["ghost", "s.safetensors"]);
}

#[test]
fn b16_shard_has_a_tensor_that_the_index_lacks() {
    let scratch = with_good_model();
    let extra = Tensor::random("extra", "F32", &[2], &mut Random::new(16));
    scratch.write("b/s.safetensors", safetensors(&[good_weight(2), extra.clone()], &[]));
    scratch.write(format!("b/{INDEX}"), json!({ "weight_map": { "w": "s.safetensors" } }).to_string());
    let output = scratch.try_merge(LINEAR, "out", &[]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stderr.contains("extra") && output.stderr.contains("s.safetensors"), "{}", output.stderr);
    let merged = scratch.merged("out");
    assert_eq!(merged.tensors.keys().collect::<Vec<_>>(), ["w"]);
    assert!(merged.left_out().contains("extra"), "{}", merged.left_out());
    // Where the base has the tensor it is missing in earnest.
    scratch.model("base", &[good_weight(3), extra]);
    scratch.refuse_unread(&format!("{LINEAR}base_model: base\n"), &["b", "extra"]);
}

/// A `b` whose index names the shard `s.safetensors`, which `make` puts there.
fn refuse_shard(make: impl Fn(&std::path::Path)) {
    let scratch = with_index(r#"{"weight_map":{"w":"s.safetensors"}}"#);
    let shard = scratch.join("b/s.safetensors");
    fs::remove_file(&shard).expect("remove the good shard");
    make(&shard);
    for io in ["mmap", "pread"] {
        scratch.refuse_with(LINEAR, &["--io", io], &["b/s.safetensors"]);
    }
    refuse_model_b(&scratch, &["b/s.safetensors"]);
}

fn fifo(path: &std::path::Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("make a FIFO");
}

#[test]
fn b17_shard_is_no_regular_file() {
    refuse_shard(|_| ());
    refuse_shard(|path| fs::create_dir(path).expect("create a directory"));
    refuse_shard(fifo);
    refuse_shard(|path| symlink("/dev/zero", path).expect("link"));
    refuse_shard(|path| symlink("nowhere", path).expect("link"));
    // A socket's own path may not be longer than some 100 bytes: bound under a short name, then moved.
    refuse_shard(|path| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let _listener = UnixListener::bind(directory.path().join("s")).expect("bind a socket");
        fs::rename(directory.path().join("s"), path).expect("move the socket");
    });
}

#[test]
fn b17_other_inputs_are_no_regular_files() {
    let scratch = with_good_model();
    scratch.model("b", &[good_weight(2)]);
    let replace = |name: &str| {
        let path = scratch.join(name);
        if path.exists() {
            fs::remove_file(&path).expect("remove a file");
        }
        fifo(&path);
    };
    replace("stats.safetensors");
    let regmean = "merge_method: regmean\nmodels:\n  - model: a\n    statistics: stats.safetensors\n  - model: b\n    statistics: stats.safetensors\n";
    scratch.refuse(regmean, &["stats.safetensors"]);
    replace("b/config.json");
    scratch.refuse(LINEAR, &["b/config.json"]);
    replace("fifo.safetensors");
    scratch.refuse(
        "merge_method: linear\nmodels:\n  - model: a\n  - model: fifo.safetensors\n",
        &["fifo.safetensors"],
    );
    replace("config.yml");
    let output = scratch.run(&["merge", "config.yml", "--out", "out"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(crate::util::error_line(&output).contains("config.yml"));
}

#[test]
fn b18_symlinks() {
    let scratch = with_good_model();
    // As in a Hugging Face cache: the snapshot links to a blob beside it.
    let b = good_weight(2);
    scratch.write("cache/blobs/0123abcd", safetensors(std::slice::from_ref(&b), &[]));
    fs::create_dir_all(scratch.join("cache/snapshots/main")).expect("create directories");
    let link = scratch.join("cache/snapshots/main/model.safetensors");
    symlink("../../blobs/0123abcd", &link).expect("link");
    symlink("cache/snapshots/main", scratch.join("b")).expect("link");
    let linked = scratch.merge(LINEAR, "linked", &[]);
    scratch.model("c", &[b]);
    let plain = scratch.merge(&LINEAR.replace("model: b", "model: c"), "plain", &[]);
    assert_eq!(linked.tensors, plain.tensors);
    // A loop.
    fs::remove_file(&link).expect("remove a link");
    symlink("model.safetensors", &link).expect("link");
    scratch.refuse_unread(LINEAR, &["model.safetensors"]);
    // Nothing there at all: named as the config writes it.
    scratch.refuse_unread(&LINEAR.replace("model: b", "model: missing/model"), &["missing/model"]);
    let report: &Value = &plain.report;
    assert!(report["inputs"].is_array() || report["inputs"].is_object(), "{report}");
}
