//! The output directory: files, report, which tensors are there and in which dtype.

use std::collections::BTreeSet;
use std::fs;

use half::bf16;

use super::{EMBEDDING, FLOATS, IDS, NORM, WEIGHTS, World, find};
use crate::util::{Merged, Random, Scratch, Tensor, strict_json};

fn files(merged: &Merged) -> BTreeSet<String> {
    fs::read_dir(&merged.directory)
        .expect("list the output")
        .map(|entry| entry.expect("list the output").file_name().into_string().expect("plain names"))
        .collect()
}

#[test]
fn one_shard() {
    let world = World::new(2, 81);
    let config = world.config("# a comment that stays\nmerge_method: regmean\nbase_model: base");
    world.scratch.write("base/tokenizer.json", "{\"tokens\": 3}");
    world.scratch.write("base/generation_config.json", "{\"top_k\": 1}");
    world.scratch.write("base/training_args.bin", "not for others");
    let merged = world.scratch.merge(&config, "out", &[]);
    let expected = [
        "README.md",
        "config.json",
        "generation_config.json",
        "merge_config.yml",
        "merge_report.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(files(&merged), expected.map(str::to_owned).into());
    let read = |name: &str| fs::read_to_string(merged.directory.join(name)).expect("it is there");
    assert_eq!(read("merge_config.yml"), config, "the config, verbatim");
    for name in ["tokenizer.json", "generation_config.json", "config.json"] {
        assert_eq!(
            read(name),
            fs::read_to_string(world.scratch.join("base").join(name)).expect("there"),
            "{name}"
        );
    }
    let card = read("README.md");
    assert!(card.contains("regmean") && card.contains("m0") && card.contains("m1"), "{card}");
    assert!(card.contains("merge_method: regmean"), "the card has the config: {card}");
    // The header's metadata, as other tools expect it of PyTorch weights.
    let bytes = fs::read(merged.directory.join("model.safetensors")).expect("there");
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("a safetensors file");
    assert_eq!(metadata.metadata().as_ref().and_then(|m| m.get("format")).map(String::as_str), Some("pt"));
}

#[test]
fn many_shards() {
    let world = World::new(2, 82);
    let config = world.config("merge_method: linear\nbase_model: base");
    let one = world.scratch.merge(&config, "one", &[]);
    let many = world.scratch.merge(&config, "many", &["--out-shard-size", "300"]);
    assert_eq!(one.tensors, many.tensors);
    let shards: Vec<String> =
        files(&many).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() >= 2, "{shards:?}");
    for (k, shard) in shards.iter().enumerate() {
        assert_eq!(*shard, format!("model-{:05}-of-{:05}.safetensors", k + 1, shards.len()));
    }
    // A shard is no larger than asked, unless one tensor alone is.
    for shard in &shards {
        let tensors = crate::util::read_safetensors(&many.directory.join(shard));
        let bytes: usize = tensors.iter().map(|t| t.bytes.len()).sum();
        assert!(bytes <= 300 || tensors.len() == 1, "{shard} has {bytes} bytes");
    }
    assert!(!files(&many).contains("model.safetensors"));
}

#[test]
fn report_has_the_contracts_keys() {
    let world = World::new(3, 83);
    let merged = world.merge("merge_method: mats\nsubspace: kfac\nsolver: { method: cg }", "out");
    let report = &merged.report;
    for key in ["wall_seconds", "peak_rss_bytes", "bytes_read", "bytes_written", "flops"] {
        assert!(report[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {}", report[key]);
    }
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["config_hash"].as_str().is_some_and(|h| h.len() >= 16), "{}", report["config_hash"]);
    let inputs = report["inputs"].to_string();
    for name in ["m0", "m1", "m2", "m0.safetensors"] {
        assert!(inputs.contains(name), "{inputs}");
    }
    let data: u64 = merged.tensors.values().map(|t| t.bytes.len() as u64).sum();
    assert!(report["bytes_written"].as_u64().is_some_and(|n| n >= data), "{}", report["bytes_written"]);
    let solved = merged.parameter(WEIGHTS[0].0);
    assert_eq!((&solved["method"], &solved["subspace"]), (&"mats".into(), &"kfac".into()));
    for key in [
        "iterations",
        "initial_relative_residual",
        "final_relative_residual",
        "objective_initial",
        "objective_final",
        "seconds",
        "bytes_read",
    ] {
        assert!(solved[key].is_number(), "{key}: {solved}");
    }
    assert!(solved["stop_reason"].is_string(), "{solved}");
    let averaged = merged.parameter(EMBEDDING);
    assert_eq!(averaged["method"], "average");
    for key in ["iterations", "stop_reason", "subspace", "objective_final"] {
        assert!(averaged.get(key).is_none(), "{key} makes no sense for an average: {averaged}");
    }
    for name in FLOATS {
        assert!(merged.parameter(name)["seconds"].as_f64().is_some_and(|s| s >= 0.0));
    }
    // The averaged embedding reads each model's 11·6 f32 once.
    assert_eq!(averaged["bytes_read"], 3 * 11 * 6 * 4);
}

#[test]
fn config_hash_tells_configs_apart() {
    let world = World::new(2, 84);
    let hash = |merged: &Merged| merged.report["config_hash"].clone();
    let a = world.merge("merge_method: linear", "a");
    let again = world.merge("merge_method: linear", "again");
    let other = world.merge("merge_method: linear\nparameters: { weight: 2.0 }", "other");
    assert_eq!(hash(&a), hash(&again));
    assert_ne!(hash(&a), hash(&other));
}

#[test]
fn every_tensor_of_the_base_appears() {
    let world = World::new(2, 85);
    let merged = world.merge("merge_method: linear\nbase_model: base", "out");
    assert_eq!(merged.tensors.len(), world.base.len());
    // Integers come from the base, bit for bit, though the models' differ.
    assert_eq!(merged.tensor(IDS), find(&world.base, IDS));
    let merged = world.merge("merge_method: linear", "no_base");
    assert_eq!(merged.tensor(IDS), find(&world.models[0], IDS));
    assert_eq!(merged.tensors.len(), world.base.len());
}

#[test]
fn tied_weights_stay_absent() {
    let scratch = Scratch::new();
    let mut random = Random::new(86);
    for name in ["a", "b", "base"] {
        scratch.model(name, &[Tensor::random(EMBEDDING, "F32", &[5, 4], &mut random)]);
        scratch
            .write(format!("{name}/config.json"), r#"{"model_type": "test", "tie_word_embeddings": true}"#);
    }
    let merged = scratch.merge(
        "merge_method: linear\nbase_model: base\nmodels: [{ model: a }, { model: b }]\n",
        "out",
        &[],
    );
    assert_eq!(merged.tensors.keys().collect::<Vec<_>>(), [EMBEDDING]);
    let config = strict_json(&fs::read_to_string(merged.directory.join("config.json")).expect("copied"));
    assert_eq!(config["tie_word_embeddings"], true);
}

#[test]
fn dtypes_follow_the_base_unless_told() {
    let scratch = Scratch::new();
    let mut random = Random::new(87);
    let mut checkpoint = |dtypes: [&'static str; 3]| {
        let names = [("x", [4, 4]), ("y", [2, 3]), ("z", [1, 5])];
        let mut tensors: Vec<Tensor> =
            names.iter().zip(dtypes).map(|((n, s), d)| Tensor::random(n, d, s, &mut random)).collect();
        tensors.push(Tensor::new("ids", "I64", &[2], &[7.0, 9.0]));
        tensors
    };
    let (a, b) = (checkpoint(["F32"; 3]), checkpoint(["F32"; 3]));
    scratch.model("base", &checkpoint(["BF16", "F16", "F32"]));
    scratch.model("a", &a);
    scratch.model("b", &b);
    let linear = "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n";
    let dtypes = |merged: &Merged| ["x", "y", "z", "ids"].map(|n| merged.tensor(n).dtype);
    let torch = |merged: &Merged| {
        strict_json(&fs::read_to_string(merged.directory.join("config.json")).expect("copied"))["torch_dtype"]
            .clone()
    };
    let based = scratch.merge(&format!("{linear}base_model: base\n"), "based", &[]);
    assert_eq!(dtypes(&based), ["BF16", "F16", "F32", "I64"]);
    assert_eq!(dtypes(&scratch.merge(linear, "first", &[])), ["F32", "F32", "F32", "I64"]);
    let told = scratch.merge(&format!("{linear}base_model: base\ndtype: bfloat16\n"), "told", &[]);
    assert_eq!(dtypes(&told), ["BF16", "BF16", "BF16", "I64"]);
    assert_eq!(torch(&told), "bfloat16", "the config says what the weights are");
    let out = scratch.merge(
        &format!("{linear}base_model: base\ndtype: bfloat16\nout_dtype: float32\n"),
        "out",
        &[],
    );
    assert_eq!(dtypes(&out), ["F32", "F32", "F32", "I64"]);
    // Whatever dtype says, arithmetic is f32 and each value is rounded once: means of 20-bit values are exact in f32.
    for (k, name) in ["x", "y", "z"].into_iter().enumerate() {
        let mean: Vec<f64> = a[k].values().iter().zip(b[k].values()).map(|(a, b)| (a + b) / 2.0).collect();
        assert_eq!(out.values(name), mean, "{name}");
        let rounded: Vec<f64> = mean.iter().map(|v| bf16::from_f64(*v).to_f64()).collect();
        assert_eq!(told.values(name), rounded, "{name}");
    }
}

#[test]
fn a_single_file_has_no_side_files() {
    let scratch = Scratch::new();
    let mut random = Random::new(88);
    for name in ["a", "b"] {
        let tensor = Tensor::random("w", "F32", &[2, 2], &mut random);
        scratch.write(format!("{name}.safetensors"), crate::util::safetensors(&[tensor], &[]));
    }
    let config = "merge_method: linear\nmodels: [{ model: a.safetensors }, { model: b.safetensors }]\n";
    let merged = scratch.merge(config, "out", &[]);
    let expected = ["README.md", "merge_config.yml", "merge_report.json", "model.safetensors"];
    assert_eq!(files(&merged), expected.map(str::to_owned).into());
}

#[test]
fn stdout_stays_empty_and_progress_goes_to_stderr() {
    let world = World::new(2, 89);
    world.scratch.write("c.yml", world.config("merge_method: regmean"));
    let output = world.scratch.run(&["merge", "c.yml", "--out", "out", "--progress", "plain"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, ""), "{}", output.stderr);
    assert!(output.stderr.contains(WEIGHTS[0].0) && output.stderr.contains(NORM), "{}", output.stderr);
    assert!(!output.stderr.contains('\u{1b}'), "no escape sequences where there is no terminal");
    let quiet = world.scratch.run(&[
        "merge",
        "c.yml",
        "--out",
        "quiet",
        "--progress",
        "none",
        "--log-level",
        "error",
    ]);
    assert_eq!((quiet.code, quiet.stderr.as_str()), (0, ""));
}

#[test]
fn dry_run_is_the_plan() {
    let world = World::new(2, 90);
    world.scratch.write("c.yml", world.config("merge_method: regmean"));
    let dry = world.scratch.run(&["merge", "c.yml", "--out", "out", "--dry-run"]);
    let plan = world.scratch.run(&["plan", "c.yml"]);
    assert_eq!((dry.code, plan.code), (0, 0), "{}", dry.stderr);
    for output in [&dry, &plan] {
        assert!(
            output.stdout.contains(WEIGHTS[0].0) && output.stdout.contains(EMBEDDING),
            "{}",
            output.stdout
        );
    }
    assert!(!world.scratch.join("out").exists());
}

/// Nothing is merged for hours, to fail at the end on a file beside the weights.
#[test]
fn side_files_that_cannot_be_opened_are_refused_at_once() {
    let scratch = Scratch::new();
    scratch.model("a", &[Tensor::f32("w", &[1], &[1.0])]);
    std::os::unix::fs::symlink("tokenizer.json", scratch.join("a/tokenizer.json")).expect("a link to itself");
    scratch.refuse("merge_method: linear\nmodels: [{ model: a }]\n", &["tokenizer.json", "cannot be copied"]);
}

/// `--resume` of a merge that is complete has nothing to do, unless a file of it is gone.
#[test]
fn a_complete_merge_that_has_lost_a_file_is_no_complete_merge() {
    let scratch = Scratch::new();
    scratch.model("a", &[Tensor::f32("w", &[1], &[1.0])]);
    let config = "merge_method: linear\nmodels: [{ model: a }]\n";
    let merged = scratch.merge(config, "out", &[]);
    assert_eq!(scratch.try_merge(config, "out", &["--resume"]).code, 0);
    std::fs::write(merged.directory.join("model.safetensors"), b"short").expect("ours");
    for _ in 0..2 {
        let output = scratch.try_merge(config, "out", &["--resume"]);
        assert_eq!(output.code, 2, "{}", output.stderr);
        assert!(crate::util::error_line(&output).contains("model.safetensors"), "{}", output.stderr);
        let _ = std::fs::remove_file(merged.directory.join("model.safetensors"));
    }
}
