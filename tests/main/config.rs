//! Configs that are wrong: refused before anything is read, by file, line and key.

use crate::util::{Random, Scratch, Tensor};

const MODELS: &str = "models:\n  - model: a\n  - model: b\n";

fn ready() -> Scratch {
    let scratch = Scratch::new();
    let mut random = Random::new(30);
    for name in ["a", "b", "base"] {
        scratch.model(name, &[Tensor::random("w", "F32", &[3, 4], &mut random)]);
    }
    scratch
}

#[test]
fn unknown_keys_and_words_name_the_nearest() {
    let scratch = ready();
    for (config, words) in [
        (format!("merge_method: linear\nmodell: x\n{MODELS}"), &[".yml:2", "modell", "models"][..]),
        (format!("merge_method: linar\n{MODELS}"), &[".yml:1", "linar", "linear"]),
        (format!("merge_method: mats\nsubspace: kfak\n{MODELS}"), &[".yml:2", "kfak", "kfac"]),
        (format!("merge_method: mats\nsolver: {{ methd: cg }}\n{MODELS}"), &[".yml:2", "methd", "method"]),
        (format!("merge_method: mats\nsolver: {{ method: gc }}\n{MODELS}"), &[".yml:2", "gc", "cg"]),
        (
            format!("merge_method: linear\nparameters: {{ wieght: 1 }}\n{MODELS}"),
            &[".yml:2", "wieght", "weight"],
        ),
        (
            format!("merge_method: linear\n{MODELS}    paramters: {{ weight: 1 }}\n"),
            &[".yml:5", "paramters", "parameters"],
        ),
        (format!("merge_method: linear\ndtype: bfloat17\n{MODELS}"), &[".yml:2", "bfloat17", "bfloat16"]),
        (format!("merge_method: regmean\nunmatched: avrage\n{MODELS}"), &[".yml:2", "avrage", "average"]),
    ] {
        scratch.refuse_unread(&config, words);
    }
}

#[test]
fn numbers_out_of_range() {
    let scratch = ready();
    for (line, words) in [
        ("solver: { ridge: -1 }", &["ridge", "-1"][..]),
        ("solver: { ridge: .nan }", &["ridge"]),
        ("solver: { tolerance: .inf }", &["tolerance"]),
        ("solver: { tolerance: -1.0e-5 }", &["tolerance"]),
        ("solver: { max_iterations: -1 }", &["max_iterations"]),
        ("solver: { max_iterations: 1.5 }", &["max_iterations"]),
        ("solver: { max_iterations: many }", &["max_iterations", "many"]),
        ("parameters: { off_diagonal: 1.5 }", &["off_diagonal", "1.5"]),
        ("parameters: { off_diagonal: .nan }", &["off_diagonal"]),
    ] {
        scratch.refuse_unread(&format!("merge_method: mats\nsubspace: gram\n{line}\n{MODELS}"), words);
    }
}

#[test]
fn what_a_method_cannot_do_without() {
    let scratch = ready();
    for method in ["task_arithmetic", "wudi", "actmat"] {
        scratch.refuse_unread(&format!("merge_method: {method}\n{MODELS}"), &["base_model"]);
    }
    scratch.refuse_unread(&format!("merge_method: mats\nsubspace: delta_gram\n{MODELS}"), &["base_model"]);
    scratch.refuse_unread(&format!("merge_method: mats\ninitial: base\n{MODELS}"), &["base_model"]);
    scratch.refuse_unread(&format!("merge_method: regmean\nunmatched: base\n{MODELS}"), &["base_model"]);
    scratch
        .refuse_unread(&format!("merge_method: linear\nbase_model: absent/base\n{MODELS}"), &["absent/base"]);
}

#[test]
fn b27_yaml_that_is_hostile() {
    let scratch = ready();
    let bomb: String = std::iter::once("a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned())
        .chain((1..12).map(|k| {
            let alias = format!("*a{}", k - 1);
            format!("a{k}: &a{k} [{}]\n", [alias.as_str(); 9].join(", "))
        }))
        .collect();
    let flat = format!("merge_method: linear\n{MODELS}");
    for config in [
        format!("{bomb}{flat}"),
        format!("{flat}parameters: {}", "[".repeat(100_000)),
        format!("{flat}# {}\n", "x".repeat(2 << 20)),
        format!("{flat}merge_method: linear\n"),
        format!("{flat}\tdtype: float32\n"),
        format!("{flat}parameters: !!python/object:os.system {{ x: 1 }}\n"),
        "merge_method: linear\nmodels: [\n".to_owned(),
        String::new(),
        "---\n---\n".to_owned(),
        "just words\n".to_owned(),
        "[1, 2]\n".to_owned(),
        format!("{flat}? [a, b]\n: c\n"),
    ] {
        scratch.refuse_unread(&config, &[".yml"]);
    }
    scratch.write("binary.yml", b"merge_method: \xff\xfe linear");
    let output = scratch.run(&["plan", "binary.yml"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(crate::util::error_line(&output).contains("binary.yml"));
}
