//! `inspect` and `diff`: the commands that read what merges write.

use crate::algebra::{Matrix, gram};
use crate::util::{Random, Scratch, Statistics, Tensor, error_line, strict_json};

fn weights(seed: u64) -> Vec<Tensor> {
    let mut random = Random::new(seed);
    vec![
        Tensor::random("w", "F32", &[3, 4], &mut random),
        Tensor::random("v", "BF16", &[5], &mut random),
        Tensor::new("ids", "I64", &[2], &[1.0, 2.0]),
    ]
}

#[test]
fn inspect_lists_tensors() {
    let scratch = Scratch::new();
    scratch.sharded_model("m", &weights(1), 2);
    let output = scratch.run(&["inspect", "m", "--json"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let json = strict_json(&output.stdout);
    let tensors = json["tensors"].as_array().expect("a list");
    assert_eq!(tensors.len(), 3);
    let w = tensors.iter().find(|t| t["name"] == "w").expect("listed");
    assert_eq!(
        (&w["dtype"], &w["shape"], &w["bytes"]),
        (&"F32".into(), &serde_json::json!([3, 4]), &48.into())
    );
    let text = scratch.run(&["inspect", "m"]);
    assert_eq!(text.code, 0);
    for word in ["w", "BF16", "ids"] {
        assert!(text.stdout.contains(word), "{}", text.stdout);
    }
}

#[test]
fn inspect_counts_what_is_not_finite() {
    let scratch = Scratch::new();
    let values = [3.0, f64::NAN, -4.0, f64::INFINITY, f64::NEG_INFINITY, 0.0];
    scratch.model("m", &[Tensor::f32("w", &[6], &values), Tensor::f32("none", &[0], &[])]);
    let output = scratch.run(&["inspect", "m", "--json", "--stats"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let json = strict_json(&output.stdout);
    let w =
        json["tensors"].as_array().and_then(|t| t.iter().find(|t| t["name"] == "w")).expect("listed").clone();
    assert_eq!(w["stats"]["nan_count"], 1, "{w}");
    assert_eq!(w["stats"]["inf_count"], 2, "{w}");
    // Of the finite values: a 3-4-5 triangle.
    assert_eq!(w["stats"]["l2_norm"], 5.0, "{w}");
    assert_eq!((&w["stats"]["min"], &w["stats"]["max"]), (&serde_json::json!(-4.0), &serde_json::json!(3.0)));
}

#[test]
fn inspect_knows_statistics() {
    let scratch = Scratch::new();
    let mut random = Random::new(2);
    let mut diagonal = Matrix::identity(4);
    for i in 0..4 {
        diagonal.data[i * 5] = 2f64.powi(i as i32);
    }
    Statistics::new()
        .full("w/input_gram", 4, &diagonal.data)
        .packed("w/output_gram", 3, &gram(3, 12, &mut random).data)
        .alias("v/input_gram", "w/input_gram")
        .write(&scratch, "s.safetensors");
    let output = scratch.run(&["inspect", "s.safetensors", "--json", "--stats"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let json = strict_json(&output.stdout);
    assert!(json.to_string().contains("v/input_gram"), "aliases are listed: {json}");
    let row = json["tensors"]
        .as_array()
        .and_then(|t| t.iter().find(|t| t["name"] == "w/input_gram"))
        .expect("listed")
        .clone();
    assert_eq!(row["kind"], "input_gram", "{row}");
    assert_eq!(row["stats"]["gram"]["trace"], 15.0, "{row}");
    // Eigenvalues 1, 2, 4, 8: Lanczos finds all four of them to rounding.
    let condition = row["stats"]["gram"]["condition_at_least"].as_f64().expect("a number");
    assert!((condition - 8.0).abs() < 1e-6, "{row}");
}

#[test]
fn inspect_refuses_what_is_no_checkpoint() {
    let scratch = Scratch::new();
    scratch.write("pickled/pytorch_model.bin", "not read");
    scratch.write("text.safetensors", "hello, this is text");
    std::fs::create_dir(scratch.join("empty")).expect("create a directory");
    for path in ["pickled", "text.safetensors", "empty", "absent"] {
        let output = scratch.run(&["inspect", path]);
        assert_eq!(output.code, 2, "{path}: {}", output.stderr);
        assert!(error_line(&output).contains(path));
        assert_eq!(output.stdout, "");
    }
}

#[test]
fn diff_says_whether_checkpoints_differ() {
    let scratch = Scratch::new();
    let a = weights(3);
    let mut b = a.clone();
    b[0] = a[0].with_value(6, a[0].values()[6] + 0.25);
    scratch.model("a", &a);
    scratch.sharded_model("same", &a, 2);
    scratch.model("b", &b);
    let code = |args: &[&str]| {
        let output = scratch.run(&[&["diff"], args].concat());
        (output.code, output.stdout)
    };
    assert_eq!(code(&["a", "a"]).0, 0);
    assert_eq!(code(&["a", "same"]).0, 0, "shards do not matter");
    assert_eq!(code(&["a", "b"]).0, 1);
    // The difference is 1/4, and both values have few bits: exact.
    assert_eq!(code(&["a", "b", "--tolerance", "0.25"]).0, 0);
    assert_eq!(code(&["a", "b", "--tolerance", "0.2499"]).0, 1);
    let (_, text) = code(&["a", "b", "--json"]);
    let json = strict_json(&text);
    assert_eq!(json["differs"], true);
    let w =
        json["tensors"].as_array().and_then(|t| t.iter().find(|t| t["name"] == "w")).expect("listed").clone();
    assert_eq!(w["max_abs"], 0.25, "{w}");
    let norm: f64 = b[0].values().iter().map(|v| v * v).sum::<f64>().sqrt();
    assert!((w["relative_l2"].as_f64().expect("a number") - 0.25 / norm).abs() < 1e-12, "{w}");
    assert!(w["cosine"].as_f64().is_some_and(|c| c > 0.9 && c < 1.0), "{w}");
    assert!(code(&["a", "b"]).1.contains("w"));
}

#[test]
fn diff_of_what_cannot_be_the_same() {
    let scratch = Scratch::new();
    let a = weights(4);
    scratch.model("a", &a);
    let variants: [(&str, Vec<Tensor>); 5] = [
        ("nan", [&[a[0].with_value(0, f64::NAN)], &a[1..]].concat()),
        ("fewer", a[1..].to_vec()),
        ("more", [&a[..], &[a[0].renamed("x")]].concat()),
        ("reshaped", [&[Tensor { shape: vec![4, 3], ..a[0].clone() }], &a[1..]].concat()),
        ("ids", [&a[..2], &[Tensor::new("ids", "I64", &[2], &[1.0, 3.0])]].concat()),
    ];
    for (name, tensors) in variants {
        scratch.model(name, &tensors);
        for args in [["diff", "a", name], ["diff", name, "a"]] {
            // No tolerance makes these the same; it is for floats that are there on both sides.
            let output = scratch.run(&[&args[..], &["--tolerance", "1e30", "--json"]].concat());
            assert_eq!(output.code, 1, "{args:?}: {}", output.stdout);
            assert_eq!(strict_json(&output.stdout)["differs"], true, "{args:?}");
        }
    }
    // NaN on both sides in the same place is no difference.
    scratch.model("nan_too", &[&[a[0].with_value(0, f64::NAN)], &a[1..]].concat());
    assert_eq!(scratch.run(&["diff", "nan", "nan_too"]).code, 0);
}

#[test]
fn diff_refuses_what_it_cannot_read() {
    let scratch = Scratch::new();
    scratch.model("a", &weights(5));
    scratch.write("b/model.safetensors", "short");
    for args in [["diff", "a", "b"], ["diff", "b", "a"], ["diff", "a", "absent"]] {
        let output = scratch.run(&args);
        assert_eq!(output.code, 2, "{args:?}: {}", output.stderr);
        error_line(&output);
        assert_eq!(output.stdout, "");
    }
}
