//! Outputs of more than 16 MiB: whole blocks pass the page cache by, ragged ends do not, and nobody can tell.

use crate::util::{Merged, Random, Scratch, Tensor, read_checkpoint};

/// Vectors of odd lengths move what follows off every block.
const TENSORS: [(&str, &[usize]); 5] = [
    ("a.bias", &[77]),
    ("b.weight", &[3000, 2048]),
    ("c.bias", &[1001]),
    ("d.weight", &[2500, 2048]),
    ("e.bias", &[3]),
];

fn world() -> Scratch {
    let mut random = Random::new(90);
    let scratch = Scratch::new();
    for model in ["a", "b", "base"] {
        let tensors: Vec<Tensor> =
            TENSORS.iter().map(|(name, shape)| Tensor::random(name, "BF16", shape, &mut random)).collect();
        scratch.model(model, &tensors);
    }
    scratch
}

const LINEAR: &str =
    "merge_method: linear\nmodels: [{ model: a }, { model: b }]\nparameters: { weight: 1 }\n";

fn assert_average(scratch: &Scratch, merged: &Merged) {
    let (a, b) = (read_checkpoint(&scratch.join("a")), read_checkpoint(&scratch.join("b")));
    for (name, _) in TENSORS {
        let (a, b) = (a[name].values(), b[name].values());
        let found = merged.values(name);
        assert_eq!(found.len(), a.len());
        for ((a, b), found) in a.iter().zip(&b).zip(&found) {
            let want = half::bf16::from_f32((*a as f32 + *b as f32) / 2.0);
            assert_eq!(want.to_f64(), *found, "{name}");
        }
    }
}

#[test]
fn direct_and_cached_writes_give_the_same_bytes() {
    let scratch = world();
    let whole = scratch.merge(LINEAR, "whole", &["--threads", "2"]);
    assert_average(&scratch, &whole);
    let file = std::fs::read(scratch.join("whole/model.safetensors")).expect("one file");
    for threads in ["1", "3"] {
        let again = scratch.merge(LINEAR, &format!("t{threads}"), &["--threads", threads]);
        assert!(std::fs::read(again.directory.join("model.safetensors")).expect("one file") == file);
    }
    // Shards of less than 16 MiB go through the page cache.
    let shards = scratch.merge(LINEAR, "shards", &["--out-shard-size", "13MB"]);
    assert!(shards.directory.join("model-00002-of-00002.safetensors").exists());
    assert_average(&scratch, &shards);
    for out in ["whole", "shards"] {
        let verified = scratch.run(&["verify", out]);
        assert_eq!(verified.code, 0, "{}", verified.stderr);
    }
    let ties = "merge_method: ties\nbase_model: base\nmodels: [{ model: a }, { model: b }]\n\
                parameters: { weight: 1, density: 0.4 }\n";
    let whole = scratch.merge(ties, "ties", &["--threads", "2"]);
    let shards = scratch.merge(ties, "ties-shards", &["--threads", "1", "--out-shard-size", "13MB"]);
    assert!(whole.tensors == shards.tensors);
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let scratch = world();
    scratch.write("c.yml", LINEAR);
    let args = ["merge", "c.yml", "--out", "out", "--progress", "none", "--threads", "2", "--resume"];
    for at in [3, 10, 20] {
        let mut command = scratch.command(&args);
        let fail = format!("commit.often=;shard.write=kill@{at}");
        let status = command.env("MATS_STREAM_FAIL", fail).status().expect("start the binary");
        assert!(!status.success(), "killed at write {at}");
    }
    let output = scratch.run(&args);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_average(&scratch, &scratch.merged("out"));
    let verified = scratch.run(&["verify", "out"]);
    assert_eq!(verified.code, 0, "{}", verified.stderr);
}
