//! Inputs that lie, one test for each row of the matrix of bad inputs (`b07_…` is its row B7).
//!
//! A refusal is exit code 2 (unless said otherwise), one line on stderr that names the file and the tensor or key, no
//! output directory, no panic; what is hostile but legal must come out right.

mod checkpoints;
mod files;
mod index;
mod limits;
mod output;
mod statistics;
mod values;

use crate::util::{Random, Scratch, Tensor};

/// Averages models `a` and `b`.
const LINEAR: &str = "merge_method: linear\nmodels:\n  - model: a\n  - model: b\n";

/// A directory with a good model `a` of one weight `w` `[3, 4]`.
fn with_good_model() -> Scratch {
    let scratch = Scratch::new();
    scratch.model("a", &[good_weight(1)]);
    scratch
}

fn good_weight(seed: u64) -> Tensor {
    Tensor::random("w", "F32", &[3, 4], &mut Random::new(seed))
}

/// `b` is these bytes: `merge`, `plan` and `inspect` refuse it, naming the file and all of `words`.
fn refuse_file(bytes: &[u8], words: &[&str]) {
    let scratch = with_good_model();
    scratch.write("b/model.safetensors", bytes);
    refuse_model_b(&scratch, &[&["b/model.safetensors"], words].concat());
}

/// As [`refuse_file`], for a `b` that is there already, and without the file's name.
fn refuse_model_b(scratch: &Scratch, words: &[&str]) {
    scratch.refuse_unread(LINEAR, words);
    let inspected = scratch.run(&["inspect", "b"]);
    assert_eq!(inspected.code, 2, "{}", inspected.stderr);
    let line = crate::util::error_line(&inspected);
    for word in words {
        assert!(line.contains(word), "the error of inspect should name `{word}`: {line}");
    }
}
