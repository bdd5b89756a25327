//! `statistics convert`: files that real versions of PyTorch wrote (`fixtures/torch/make.py`), pmetal-merge's, ours in
//! other forms; what must be refused; what a failure leaves; and that a merge sees no difference.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::util::{
    Output, Random, Scratch, Statistics, Tensor, code, error_line, models, read_safetensors, safetensors,
    strict_json, wait,
};

const VERSIONS: [&str; 2] = ["old", "new"];
/// Parameters once `transformer.` is cut off, with their weights' shapes.
const Q: &str = "encoder.block.0.q.weight";
const K: &str = "decoder.block.0.EncDecAttention.k.weight";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// `fixtures/torch/NAME` as an argument.
fn torch(name: &str) -> String {
    fixture(&format!("torch/{name}")).display().to_string()
}

/// As `make.py` makes them: exact in every dtype that is used.
fn entry(seed: usize, i: usize, j: usize) -> f64 {
    (((7 * i + 3 * j * j + 5 * seed) % 11) as f64 - 5.0) / 4.0
}

fn squares(seed: usize, rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns).map(|at| entry(seed, at / columns, at % columns).powi(2)).collect()
}

fn gram(seed: usize, side: usize) -> Vec<f64> {
    let sum = |i, j| (0..6).map(|row| entry(seed, row, i) * entry(seed, row, j)).sum();
    (0..side * side).map(|at| sum(at / side, at % side)).collect()
}

fn convert(scratch: &Scratch, inputs: &[&str], flags: &[&str]) -> Output {
    scratch.run(&[&["statistics", "convert"], inputs, &["--out", "out.safetensors"], flags].concat())
}

/// Converts, which must succeed; takes the output away.
fn converted(scratch: &Scratch, inputs: &[&str], flags: &[&str]) -> (Vec<Tensor>, serde_json::Value) {
    let output = convert(scratch, inputs, flags);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stdout.is_empty(), "stdout carries only what was asked for");
    let path = scratch.join("out.safetensors");
    let inspected = scratch.run(&["inspect", "out.safetensors", "--json"]);
    let mut tensors = read_safetensors(&path);
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    fs::remove_file(path).expect("is there");
    (tensors, strict_json(&inspected.stdout))
}

/// Refused with 2, one line, nothing written.
fn refuse(scratch: &Scratch, inputs: &[&str], flags: &[&str], words: &[&str]) {
    let before = names(scratch.path());
    let output = convert(scratch, inputs, flags);
    assert_eq!(output.code, 2, "{}", output.stderr);
    let line = error_line(&output);
    for word in words {
        assert!(line.contains(word), "the error should name `{word}`: {line}");
    }
    assert_eq!(names(scratch.path()), before, "a refusal leaves something");
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("readable").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn tensor<'a>(tensors: &'a [Tensor], name: &str) -> &'a Tensor {
    tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name} in {tensors:?}"))
}

#[test]
fn a_merge_sees_no_difference_between_the_references_files_and_ours() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut random = Random::new(3);
        for model in ["a", "b"] {
            let weights = [(Q, [3, 4]), (K, [5, 3])]
                .map(|(name, shape)| Tensor::random(name, "F32", &shape, &mut random));
            scratch.model(model, &weights);
        }
        // Ours, of the same values; and another model's.
        let ours = |seed: usize| {
            Statistics::new()
                .packed(&format!("{Q}/input_gram"), 4, &gram(seed, 4))
                .packed(&format!("{K}/input_gram"), 3, &gram(seed + 1, 3))
                .packed(&format!("{Q}/output_gram"), 3, &gram(seed + 4, 3))
                .packed(&format!("{K}/output_gram"), 5, &gram(seed + 5, 5))
                .diagonal(Q, &[3, 4], &squares(seed + 1, 3, 4))
                .diagonal(K, &[5, 3], &squares(seed + 1, 5, 3))
        };
        ours(1).write(&scratch, "ours.safetensors");
        ours(2).write(&scratch, "other.safetensors");
        let inputs = [
            torch(&format!("{version}_gram_matrix_input_activations_validation.pt")),
            torch(&format!("{version}_gram_matrix_output_activation_gradients_validation.pt")),
            torch(&format!("{version}_diagonal_empirical_fisher_validation.pt")),
        ];
        let inputs = inputs.each_ref().map(String::as_str);
        let done = convert(&scratch, &inputs, &["--rename", "transformer.=", "--tokens", "24"]);
        assert_eq!(done.code, 0, "{}", done.stderr);
        for (method, flags) in [
            ("mats\nsubspace: kfac\nsolver: { method: pcg, ridge: 0.1 }", "kfac"),
            ("regmean", "gram"),
            ("fisher", "diagonal"),
        ] {
            let config = |first: &str| {
                format!(
                    "merge_method: {method}\n{}",
                    models(&[("a", Some(first)), ("b", Some("other.safetensors"))])
                )
            };
            let expected = scratch.merge(&config("ours.safetensors"), &format!("{flags}-ours"), &[]);
            let got = scratch.merge(&config("out.safetensors"), &format!("{flags}-theirs"), &[]);
            assert_eq!(got.tensors, expected.tensors, "{version} {flags}");
            // And it is no average: the statistics were used.
            assert_ne!(got.values(Q), {
                let [a, b] =
                    ["a", "b"].map(|m| read_safetensors(&scratch.join(format!("{m}/model.safetensors"))));
                let mean = |x: &Tensor, y: &Tensor| -> Vec<f64> {
                    x.values()
                        .iter()
                        .zip(y.values())
                        .map(|(x, y)| f64::from(((x + y) / 2.0) as f32))
                        .collect()
                };
                mean(tensor(&a, Q), tensor(&b, Q))
            });
        }
    }
}

#[test]
fn names_kinds_and_counts_of_the_references_files() {
    let scratch = Scratch::new();
    for version in VERSIONS {
        let grams = torch(&format!("{version}_gram_matrix_input_activations_validation.pt"));
        let (tensors, shown) =
            converted(&scratch, &[&grams], &["--dense", "--examples", "6", "--tokens", "36"]);
        let name = format!("transformer.{Q}/input_gram");
        let found = tensor(&tensors, &name);
        assert_eq!((found.dtype, &found.shape[..], found.values()), ("F32", &[4, 4][..], gram(1, 4)));
        assert_eq!(
            (&shown["metadata"]["fisher"], &shown["tokens"], &shown["examples"]),
            (&"empirical".into(), &36.into(), &6.into())
        );

        let block = torch(&format!("{version}_blockwise_true_fisher_validation.pt"));
        let (tensors, shown) = converted(&scratch, &[&block], &["--dense"]);
        assert_eq!(tensors[0].name, "transformer.decoder.block.0.k_ia3/fisher_block");
        assert_eq!((tensors[0].values(), &shown["metadata"]["fisher"]), (gram(3, 5), &"true".into()));
        // Sums are divided by what is said, in f64, and rounded once.
        let (tensors, _) =
            converted(&scratch, &[&block], &["--dense", "--values", "sums", "--examples", "3"]);
        let thirds: Vec<f64> = gram(3, 5).iter().map(|v| f64::from((v / 3.0) as f32)).collect();
        assert_eq!(tensors[0].values(), thirds);
        // A name that tells nothing needs a word.
        let state = torch(&format!("{version}_state_dict.pt"));
        refuse(&scratch, &[&state], &[], &["state_dict.pt", "--kind input_gram"]);
        for file in [state, torch(&format!("{version}_parameter.pt"))] {
            let (tensors, _) = converted(&scratch, &[&file], &["--kind", "fisher_diagonal"]);
            assert_eq!((&tensors[0].shape[..], tensors[0].values()), (&[3, 4][..], squares(2, 3, 4)));
        }
    }
    let hint = convert(&scratch, &[&torch("new_gram_matrix_input_activations_validation.pt")], &[]);
    assert!(hint.stderr.contains("--rename transformer.="), "{}", hint.stderr);
}

#[test]
fn storages_that_are_shared_and_dtypes() {
    let scratch = Scratch::new();
    for version in VERSIONS {
        let (tensors, shown) = converted(
            &scratch,
            &[&torch(&format!("{version}_views.pt"))],
            &["--kind", "fisher_block", "--dense"],
        );
        assert_eq!(tensors.len(), 2);
        assert_eq!(tensor(&tensors, "a/fisher_block").values(), gram(1, 4));
        assert_eq!(tensor(&tensors, "c/fisher_block").values(), gram(2, 4));
        assert_eq!(shown["aliases"]["b/fisher_block"], "a/fisher_block");
        for (name, dtype) in [("float64", "F64"), ("float16", "F16"), ("bfloat16", "BF16")] {
            let file = torch(&format!("{version}_{name}.pt"));
            for io in ["mmap", "pread"] {
                let flags = ["--kind", "output_gram", "--dense", "--io", io];
                let (tensors, _) = converted(&scratch, &[&file], &flags);
                // Multiples of 1/16 below 16: exact in bf16 up to rounding of the larger, as torch rounded them.
                let expected = Tensor::new("a.weight/output_gram", dtype, &[4, 4], &gram(1, 4));
                assert_eq!(tensors[0], expected, "{file}");
            }
        }
    }
    let output = convert(&scratch, &[&torch("new_without_crc.pt")], &["--kind", "input_gram"]);
    assert_eq!(output.code, 0);
    assert!(output.stderr.contains("without checksums"), "{}", output.stderr);
}

#[test]
fn what_torch_saves_and_no_statistics_are() {
    let scratch = Scratch::new();
    for version in VERSIONS {
        for (name, words) in [
            ("strided", &["tensor `a`", "strided view", ".contiguous()"][..]),
            ("expanded", &["tensor `a`", "strided view"]),
            ("integers", &["wrong dtype (got I64"]),
            ("complex", &["torch.ComplexFloatStorage", "nothing of it was run"]),
            ("step", &["key `step` holds a number"]),
            ("list", &["EMPTY_LIST", "nothing of it was run"]),
            ("module", &["global `", "nothing of it was run"]),
            ("legacy", &["no zip archive", "save it again with torch.save"]),
        ] {
            let file = format!("{version}_{name}.pt");
            refuse(&scratch, &[&torch(&file)], &["--kind", "fisher_block"], &[&[&*file], words].concat());
        }
    }
}

#[test]
fn pickles_that_would_run_something_run_nothing() {
    let scratch = Scratch::new();
    for name in ["os_system.bin", "zip_in_disguise.safetensors"] {
        let path = fixture("hostile").join(name).display().to_string();
        refuse(&scratch, &[&path], &["--kind", "fisher_diagonal"], &[name]);
        refuse(&scratch, &[&path], &["--from", "reference", "--kind", "fisher_diagonal"], &[name]);
    }
    assert!(!scratch.join("canary").exists(), "something ran");
}

#[test]
fn a_merge_refuses_them_and_says_what_converts_them() {
    let scratch = Scratch::new();
    scratch.model("a", &[Tensor::f32(Q, &[3, 4], &[0.0; 12])]);
    let file = torch("new_gram_matrix_input_activations_validation.pt");
    scratch.refuse_unread(
        &format!("merge_method: regmean\n{}", models(&[("a", Some(&file))])),
        &["new_gram_matrix_input", "zip archive", "mats-stream statistics convert"],
    );
}

#[test]
fn pmetals_files_are_sums_over_something() {
    let scratch = Scratch::new();
    let weights =
        [Tensor::f32("m.q.weight", &[4, 4], &gram(1, 4)), Tensor::f32("m.k.weight", &[3, 3], &gram(2, 3))];
    scratch.write("regmean_grams.safetensors", safetensors(&weights, &[]));
    scratch.write("fisher.safetensors", safetensors(&[Tensor::f32("norm", &[3], &[1.0, 2.0, 4.0])], &[]));
    let grams = ["regmean_grams.safetensors"];
    refuse(
        &scratch,
        &grams,
        &[],
        &["--tokens", "regmean_grams.safetensors", "sums over tokens", "--values means"],
    );
    refuse(&scratch, &["fisher.safetensors"], &["--tokens", "5"], &["--examples", "sums over examples"]);
    let inputs = ["regmean_grams.safetensors", "fisher.safetensors"];
    let (tensors, shown) = converted(&scratch, &inputs, &["--tokens", "8", "--examples", "2"]);
    let eighths: Vec<f64> = gram(2, 3).iter().map(|v| v / 8.0).collect();
    let triangle: Vec<f64> = (0..3).flat_map(|i| eighths[3 * i..=4 * i].to_vec()).collect();
    assert_eq!(
        tensor(&tensors, "m.k.weight/input_gram"),
        &Tensor::f32("m.k.weight/input_gram", &[6], &triangle)
    );
    assert_eq!(tensor(&tensors, "norm/fisher_diagonal").values(), [0.5, 1.0, 2.0]);
    assert_eq!((&shown["tokens"], &shown["examples"]), (&8.into(), &2.into()));
    let (tensors, _) = converted(&scratch, &grams, &["--values", "means", "--dense"]);
    assert_eq!(tensor(&tensors, "m.k.weight/input_gram").values(), gram(2, 3));
    // The factor of a mean is divided by the root: of one direction, exactly.
    let ones = Tensor::f32("w", &[2, 2], &[4.0; 4]);
    scratch.write("one/regmean_grams.safetensors", safetensors(&[ones], &[("tokens", "4")]));
    let (tensors, shown) = converted(&scratch, &["one/regmean_grams.safetensors"], &["--rank", "1"]);
    assert_eq!((&*tensors[0].name, &tensors[0].shape[..]), ("w/input_factor", &[1, 2][..]));
    // The Gram is ones(2, 2): F = ±(1, 1), to a rounding of f32.
    assert!(tensors[0].values().iter().all(|v| (v.abs() - 1.0).abs() < 1e-6), "{:?}", tensors[0].values());
    let bound: f64 =
        shown["metadata"]["error:w/input_factor"].as_str().and_then(|v| v.parse().ok()).expect("a number");
    assert!(bound < 1e-6, "{bound}");

    // Under another name nobody knows what it is.
    fs::rename(scratch.join("fisher.safetensors"), scratch.join("f.safetensors")).expect("is there");
    refuse(&scratch, &["f.safetensors"], &["--examples", "2"], &["f.safetensors", "cannot tell whose"]);
    refuse(
        &scratch,
        &["f.safetensors"],
        &["--from", "mats-stream"],
        &["f.safetensors", "not a statistics file"],
    );
    let flags = ["--from", "pmetal", "--kind", "fisher_diagonal", "--examples", "2"];
    assert_eq!(converted(&scratch, &["f.safetensors"], &flags).0[0].values(), [0.5, 1.0, 2.0]);
    let vector = Tensor::f32("norm", &[3], &[1.0, 2.0, 4.0]);
    scratch.write("v/regmean_grams.safetensors", safetensors(&[vector], &[]));
    refuse(&scratch, &["v/regmean_grams.safetensors"], &["--tokens", "2"], &["`norm`", "a square matrix"]);
}

#[test]
fn ours_in_another_form_with_its_aliases_from_several_files() {
    let scratch = Scratch::new();
    Statistics::new()
        .packed("q/input_gram", 3, &gram(2, 3))
        .metadata("tokens", "9")
        .write(&scratch, "one.safetensors");
    Statistics::new()
        .full("q/output_gram", 3, &gram(4, 3))
        .alias("k/input_gram", "q/input_gram")
        .alias("v/input_gram", "k/input_gram")
        .write(&scratch, "two.safetensors");
    let inputs = ["one.safetensors", "two.safetensors"];
    let (tensors, shown) = converted(&scratch, &inputs, &[]);
    assert_eq!(tensor(&tensors, "q/input_gram").shape, [6], "as it is");
    assert_eq!(tensor(&tensors, "q/output_gram").shape, [3, 3], "as it is");
    let (tensors, again) = converted(&scratch, &inputs, &["--dense", "--dtype", "bf16"]);
    let expected = Tensor::new("q/input_gram", "BF16", &[3, 3], &gram(2, 3));
    assert_eq!(tensor(&tensors, "q/input_gram"), &expected);
    for shown in [&shown, &again] {
        assert_eq!(shown["aliases"]["k/input_gram"], "q/input_gram");
        assert_eq!(shown["aliases"]["v/input_gram"], "q/input_gram");
        assert_eq!((&shown["tokens"], &shown["warnings"]), (&9.into(), &serde_json::json!([])));
    }
    // One of the files alone dangles; the same key twice is refused.
    refuse(&scratch, &["two.safetensors"], &[], &["dangles"]);
    refuse(&scratch, &["one.safetensors", "one.safetensors"], &[], &["`q/input_gram` is in two files"]);
    // Spectra of what came out.
    assert_eq!(convert(&scratch, &inputs, &["--rank", "2"]).code, 0);
    let inspected = scratch.run(&["inspect", "out.safetensors", "--stats", "--json"]);
    let shown = strict_json(&inspected.stdout);
    let rows = shown["tensors"].as_array().expect("a list");
    let row = rows.iter().find(|row| row["name"] == "q/input_factor").expect("was cut");
    assert_eq!(row["shared_by"], serde_json::json!(["k/input_factor", "v/input_factor"]));
    assert_eq!(row["stats"]["gram"]["spectrum"]["above_noise"], 2);
    let table = scratch.run(&["inspect", "out.safetensors", "--stats"]).stdout;
    assert!(table.contains("over 10 examples, 9 tokens") && table.contains("median λ"), "{table}");
}

#[test]
fn the_output_appears_whole_or_not_at_all() {
    let scratch = Scratch::new();
    Statistics::new().full("q/input_gram", 3, &gram(2, 3)).write(&scratch, "in.safetensors");
    let run = |fault: &str| {
        let args = ["statistics", "convert", "in.safetensors", "--out", "out.safetensors"];
        scratch.run_with(&args, &[("MATS_STREAM_FAIL", fault)])
    };
    for (fault, code) in [
        ("file.reserve=enospc", 5),
        ("file.write=enospc", 5),
        ("file.write=eio@2", 6),
        ("file.fsync=eio", 6),
        ("rename.shard=eio", 6),
    ] {
        let output = run(fault);
        assert_eq!(output.code, code, "{fault}: {}", output.stderr);
        error_line(&output);
        assert_eq!(names(scratch.path()), ["in.safetensors"], "{fault}");
    }
    // Killed: a temporary name may stay, the final one is not there, and the next run does not mind.
    for fault in ["file.write=kill", "file.fsync=kill", "rename.shard=kill"] {
        assert_eq!(run(fault).code, 137);
        assert!(!scratch.join("out.safetensors").exists(), "{fault}");
    }
    assert_eq!(run("").code, 0);
    // It is never replaced, nor is anything else.
    let before = fs::read(scratch.join("out.safetensors")).expect("written");
    let again = run("");
    assert!(again.code == 2 && error_line(&again).contains("is a file already"), "{}", again.stderr);
    assert_eq!(fs::read(scratch.join("out.safetensors")).expect("kept"), before);
    let args = |out: &'static str| ["statistics", "convert", "in.safetensors", "--out", out];
    for out in ["in.safetensors", ".", "absent/out", "in.safetensors/out"] {
        assert_eq!(scratch.run(&args(out)).code, 2, "{out}");
    }
    let small = scratch.run(&[&args("x")[..], &["--max-memory", "1MiB"]].concat());
    assert!(small.code == 2 && error_line(&small).contains("try --max-memory"), "{}", small.stderr);
}

#[test]
fn an_input_that_changes_meanwhile_ends_the_run() {
    let scratch = Scratch::new();
    let input = Statistics::new().full("q/input_gram", 3, &gram(2, 3)).write(&scratch, "in.safetensors");
    let pause = scratch.join("pause");
    let args = ["statistics", "convert", "in.safetensors", "--out", "out.safetensors"];
    let mut command = scratch.command(&args);
    command.env("MATS_STREAM_FAIL", "file.write=pause").env("MATS_STREAM_PAUSE", &pause);
    command.stderr(std::process::Stdio::null());
    let mut child = command.spawn().expect("start the binary");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !pause.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    let bytes = fs::read(&input).expect("is there");
    fs::write(&input, &bytes[..bytes.len() - 1]).expect("writable");
    fs::remove_file(&pause).expect("the run has paused");
    let status = wait(&mut child, deadline).expect("ends");
    assert_eq!(code(status), 74);
    assert_eq!(names(scratch.path()), ["in.safetensors"]);
}
