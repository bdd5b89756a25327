//! B28, and `fixtures/hostile/`: every file there stands in this list with what must become of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{LINEAR, with_good_model};
use crate::util::{Scratch, error_line};

/// What a file in `fixtures/hostile/` pretends to be.
#[derive(Clone, Copy)]
enum As {
    /// `b/model.safetensors`.
    Weights,
    /// `b/model.safetensors.index.json`, beside a shard of the good model's.
    Index,
    /// The config of a merge.
    Config,
    /// A statistics file of both models.
    Statistics,
    /// `b/pytorch_model.bin`, alone.
    Pickle,
}

/// File, its part, and words of the refusal.
const FILES: &[(&str, As, &[&str])] = &[
    ("duplicate_key.safetensors", As::Weights, &["declared twice"]),
    ("hole.safetensors", As::Weights, &["a hole"]),
    ("huge_header.safetensors", As::Weights, &["header too large"]),
    ("leading_space.safetensors", As::Weights, &["expected `{`"]),
    ("overlap.safetensors", As::Weights, &["an overlap"]),
    ("shape_overflow.safetensors", As::Weights, &["overflows"]),
    ("trailing_bytes.safetensors", As::Weights, &["trailing bytes"]),
    ("zip_in_disguise.safetensors", As::Weights, &["zip archive", "never read"]),
    ("traversal.index.json", As::Index, &["names a shard elsewhere"]),
    ("duplicate_weight.index.json", As::Index, &["declared twice"]),
    ("alias_bomb.yml", As::Config, &[]),
    ("python_object.yml", As::Config, &[]),
    ("alias_loop.statistics.safetensors", As::Statistics, &["alias"]),
    ("os_system.bin", As::Pickle, &["pickled weights", "never read"]),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/hostile")
}

#[test]
fn every_hostile_file_has_a_test() {
    let there: BTreeSet<String> = fs::read_dir(directory())
        .expect("fixtures/hostile is there")
        .map(|entry| entry.expect("list").file_name().to_string_lossy().into_owned())
        .filter(|name| name != "README.md")
        .collect();
    let listed: BTreeSet<String> = FILES.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(there, listed, "list each file of fixtures/hostile here, with what must become of it");
}

#[test]
fn every_hostile_file_is_refused() {
    for (name, part, words) in FILES {
        let bytes = fs::read(directory().join(name)).expect("listed");
        let scratch = with_good_model();
        match part {
            As::Weights => {
                scratch.write("b/model.safetensors", bytes);
                super::refuse_model_b(&scratch, words);
            }
            As::Index => {
                fs::create_dir(scratch.join("b")).expect("create a directory");
                fs::copy(scratch.join("a/model.safetensors"), scratch.join("b/shard.safetensors"))
                    .expect("copy a file");
                scratch.write("b/model.safetensors.index.json", bytes);
                super::refuse_model_b(&scratch, words);
            }
            As::Config => {
                scratch.refuse_unread(&String::from_utf8(bytes).expect("text"), words);
            }
            As::Statistics => {
                scratch.write("s.safetensors", bytes);
                let config = "merge_method: fisher\nmodels:\n  - { model: a, statistics: s.safetensors }\n";
                scratch.refuse_unread(config, words);
            }
            As::Pickle => {
                scratch.write("b/pytorch_model.bin", &bytes);
                super::refuse_model_b(&scratch, words);
            }
        }
        assert!(!scratch.join("canary").exists(), "{name} was executed");
    }
}

#[test]
fn b28_pickles_are_refused_whatever_they_are_called() {
    let pickle = fs::read(directory().join("os_system.bin")).expect("listed");
    let zip = fs::read(directory().join("zip_in_disguise.safetensors")).expect("listed");
    // Torch's legacy format begins with a pickled number.
    let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
    for (name, bytes) in [
        ("b/pytorch_model.bin", &pickle),
        ("b/model.pt", &zip),
        ("b/model.pth", &legacy),
        ("b/last.ckpt", &legacy),
        ("b/model.safetensors", &zip),
        ("b/model.safetensors", &legacy),
    ] {
        let scratch = with_good_model();
        scratch.write(name, bytes);
        scratch.refuse_unread(LINEAR, &["b", "expected safetensors", "never read"]);
        // By its own path, and as statistics.
        let direct = format!("merge_method: linear\nmodels: [{{ model: a }}, {{ model: {name} }}]\n");
        scratch.refuse_unread(&direct, &[name, "expected safetensors", "never read"]);
        if *bytes != pickle {
            let config = format!("merge_method: fisher\nmodels:\n  - {{ model: a, statistics: {name} }}\n");
            scratch.refuse_unread(&config, &[name, "expected safetensors"]);
        }
        assert!(!scratch.join("canary").exists(), "{name} was executed");
    }
    // Beside safetensors, pickles are nobody's business.
    let scratch = Scratch::new();
    for model in ["a", "b"] {
        scratch.model(model, &[super::good_weight(1)]);
        scratch.write(format!("{model}/pytorch_model.bin"), &pickle);
    }
    assert_eq!(scratch.try_merge(LINEAR, "out", &[]).code, 0);
    assert!(!scratch.join("canary").exists());
    let inspected = scratch.run(&["inspect", "a/pytorch_model.bin"]);
    assert_eq!(inspected.code, 2);
    assert!(error_line(&inspected).contains("never read"));
}
