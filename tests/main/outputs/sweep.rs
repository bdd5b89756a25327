//! Sweeps: each model has the bytes of a merge of its own, from about one read of the inputs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::World as Small;
use super::same::World;
use crate::util::{code, strict_json, wait};

/// One model of a sweep: its directory, and the lines that a merge of its own has instead of the sweep's.
type Single<'a> = (&'a str, &'a str);

fn record(out: &Path) -> Value {
    strict_json(&fs::read_to_string(out.join("sweep.json")).expect("a finished sweep has its record"))
}

fn report(directory: &Path) -> Value {
    strict_json(&fs::read_to_string(directory.join("merge_report.json")).expect("a finished merge reports"))
}

fn names(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory)
        .expect("list a directory")
        .map(|entry| entry.expect("list a directory").file_name().into_string().expect("plain names"))
        .collect()
}

/// Shards and index of two directories are the same, byte for byte.
fn same_weights(one: &Path, other: &Path) {
    let weights = |directory: &Path| -> BTreeSet<String> {
        names(directory).into_iter().filter(|name| name.contains("safetensors")).collect()
    };
    assert_eq!(weights(one), weights(other), "{}", other.display());
    for name in weights(one) {
        let same = fs::read(one.join(&name)).expect("read") == fs::read(other.join(&name)).expect("read");
        assert!(same, "{name} differs between {} and {}", one.display(), other.display());
    }
}

/// Sweeps in several ways and compares every model with a merge of its own; gives the bytes that the sweep read over
/// what the first of those merges read.
fn agree(world: &World, head: &str, swept: &str, singles: &[Single<'_>]) -> f64 {
    let scratch = &world.scratch;
    let fresh = |out: &str| {
        let _ = fs::remove_dir_all(scratch.join(out));
    };
    let mut read_alone = None;
    for (k, (_, lines)) in singles.iter().enumerate() {
        let out = format!("single{k}");
        fresh(&out);
        let merged = scratch.merge(
            &world.config(&format!("{head}\n{lines}"), "m"),
            &out,
            &["--threads", "2", "--max-memory", "2GiB"],
        );
        read_alone = read_alone.or(merged.report["bytes_read"].as_f64());
    }
    let config = world.config(&format!("{head}\n{swept}"), "m");
    let least = scratch.plan(&config, &["--threads", "2"])["least_memory_bytes"].as_u64().expect("planned");
    let least = least.to_string();
    let mut read_together = None;
    for (way, flags) in [
        ("generous", &["--threads", "2", "--max-memory", "2GiB"][..]),
        ("one_thread", &["--threads", "1", "--io", "pread"]),
        ("least", &["--threads", "2", "--max-memory", &least]),
    ] {
        let out = format!("sweep_{way}");
        fresh(&out);
        let output = scratch.try_merge(&config, &out, flags);
        assert_eq!(output.code, 0, "{}", output.stderr);
        let out = scratch.join(&out);
        let mut expected: BTreeSet<String> = singles.iter().map(|(name, _)| (*name).to_owned()).collect();
        expected.insert("sweep.json".to_owned());
        assert_eq!(names(&out), expected);
        for (k, (name, _)) in singles.iter().enumerate() {
            same_weights(&scratch.join(format!("single{k}")), &out.join(name));
        }
        read_together = read_together.or(record(&out)["bytes_read"].as_f64());
    }
    read_together.expect("recorded") / read_alone.expect("reported")
}

/// What models share is read once: the rest is at most a fourth of one merge's reads.
fn read_once(ratio: f64) {
    assert!(ratio <= 1.25, "a sweep read {ratio} times what one merge reads");
}

const KFAC: &str = "merge_method: mats\nsubspace: kfac\ninitial: average";

#[test]
fn kfac_pcg_over_ridges() {
    let ratio = agree(
        &World::new(3, true),
        KFAC,
        "solver: { method: pcg, ridge: 7 }\nsweep: { solver.ridge: [1.0, 0.1, 1.0e-2, 10] }",
        &[
            ("ridge=1", "solver: { method: pcg, ridge: 1 }"),
            ("ridge=0.1", "solver: { method: pcg, ridge: 0.1 }"),
            ("ridge=0.01", "solver: { method: pcg, ridge: 0.01 }"),
            ("ridge=10", "solver: { method: pcg, ridge: 10 }"),
        ],
    );
    read_once(ratio);
}

#[test]
fn kfac_over_two_keys_and_every_preconditioner() {
    let world = World::new(3, true);
    for preconditioner in ["jacobi", "kronecker", "kronecker_cholesky", "generalized", "hybrid"] {
        let single = |ridge: &str, off_diagonal: &str| {
            format!(
                "solver: {{ method: pcg, preconditioner: {preconditioner}, ridge: {ridge} }}\n\
                 parameters: {{ off_diagonal: {off_diagonal} }}"
            )
        };
        agree(
            &world,
            KFAC,
            &format!(
                "solver: {{ method: pcg, preconditioner: {preconditioner} }}\n\
                 sweep: {{ solver.ridge: [0.5, 2], parameters.off_diagonal: [0.5, 1.0] }}"
            ),
            &[
                ("ridge=0.5,off_diagonal=0.5", &single("0.5", "0.5")),
                ("ridge=0.5,off_diagonal=1", &single("0.5", "1")),
                ("ridge=2,off_diagonal=0.5", &single("2", "0.5")),
                ("ridge=2,off_diagonal=1", &single("2", "1")),
            ],
        );
    }
}

#[test]
fn kfac_cg_over_iterations() {
    // Plain steps pass through each other's results; preconditioned ones may be taken in other bases.
    let world = World::new(3, true);
    for (head, bound) in [("method: cg", Some(())), ("method: pcg", None)] {
        let single = |k: usize| format!("solver: {{ {head}, max_iterations: {k}, tolerance: 1.0e-9 }}");
        let ratio = agree(
            &world,
            &KFAC.replace("kfac", "auto"),
            &format!("solver: {{ {head}, tolerance: 1.0e-9 }}\nsweep: {{ max_iterations: [4, 0, 30, 1] }}"),
            &[
                ("max_iterations=4", &single(4)),
                ("max_iterations=0", &single(0)),
                ("max_iterations=30", &single(30)),
                ("max_iterations=1", &single(1)),
            ],
        );
        if bound.is_some() {
            read_once(ratio);
        }
    }
    // What is reported of a step that was passed through is what a merge that ends there reports.
    let passed = report(&world.scratch.join("sweep_generous/max_iterations=4"));
    let alone = report(&world.scratch.join("single0"));
    for key in ["iterations", "stop_reason", "converged"] {
        assert_eq!(passed["parameters"]["up.weight"][key], alone["parameters"]["up.weight"][key], "{key}");
    }
}

#[test]
fn kfac_past_f32_and_direct() {
    let single = |ridge: &str| {
        format!("solver: {{ method: pcg, ridge: {ridge}, stop: {{ relative_residual: 1.0e-9 }} }}")
    };
    agree(
        &World::new(3, true),
        KFAC,
        "solver: { method: pcg, stop: { relative_residual: 1.0e-9 } }\nsweep: { solver.ridge: [0.5, 2] }",
        &[("ridge=0.5", &single("0.5")), ("ridge=2", &single("2"))],
    );
    agree(
        &World::new(2, true),
        KFAC,
        "sweep: { solver.ridge: [0, 2] }",
        &[("ridge=0", "solver: { ridge: 0 }"), ("ridge=2", "solver: { ridge: 2 }")],
    );
}

#[test]
fn gram_over_ridges_and_scalings() {
    let world = World::new(3, true);
    let head =
        "merge_method: regmean\ninitial: { merge_method: task_arithmetic, parameters: { weight: 0.3 } }";
    let ratio = agree(
        &world,
        head,
        "sweep: { solver.ridge: [0, 0.01, 0.1, 1] }",
        &[
            ("ridge=0", ""),
            ("ridge=0.01", "solver: { ridge: 0.01 }"),
            ("ridge=0.1", "solver: { ridge: 0.1 }"),
            ("ridge=1", "solver: { ridge: 1 }"),
        ],
    );
    read_once(ratio);
    let single =
        |ridge: &str, l: &str| format!("solver: {{ ridge: {ridge} }}\nparameters: {{ off_diagonal: {l} }}");
    agree(
        &world,
        head,
        "sweep: { off_diagonal: [0, 0.9], solver.ridge: [0, 0.1] }",
        &[
            ("off_diagonal=0,ridge=0", &single("0", "0")),
            ("off_diagonal=0,ridge=0.1", &single("0.1", "0")),
            ("off_diagonal=0.9,ridge=0", &single("0", "0.9")),
            ("off_diagonal=0.9,ridge=0.1", &single("0.1", "0.9")),
        ],
    );
    // The same systems by conjugate gradients.
    let single = |k: usize, l: &str| {
        format!("solver: {{ method: cg, max_iterations: {k} }}\nparameters: {{ off_diagonal: {l} }}")
    };
    agree(
        &world,
        head,
        "solver: { method: cg }\nsweep: { max_iterations: [2, 40], off_diagonal: [0.5, 1] }",
        &[
            ("max_iterations=2,off_diagonal=0.5", &single(2, "0.5")),
            ("max_iterations=2,off_diagonal=1", &single(2, "1")),
            ("max_iterations=40,off_diagonal=0.5", &single(40, "0.5")),
            ("max_iterations=40,off_diagonal=1", &single(40, "1")),
        ],
    );
}

#[test]
fn task_vectors_over_ridges() {
    let world = World::new(3, false);
    for head in ["merge_method: wudi", "merge_method: actmat", "merge_method: mats\nsubspace: delta_gram"] {
        let ratio = agree(
            &world,
            head,
            "sweep: { solver.ridge: [0.1, 0.3, 1, 3] }",
            &[
                ("ridge=0.1", "solver: { ridge: 0.1 }"),
                ("ridge=0.3", "solver: { ridge: 0.3 }"),
                ("ridge=1", "solver: { ridge: 1 }"),
                ("ridge=3", "solver: { ridge: 3 }"),
            ],
        );
        read_once(ratio);
    }
}

#[test]
fn elementwise_over_weights() {
    let world = World::new(3, false);
    let ratio = agree(
        &world,
        "merge_method: task_arithmetic",
        "parameters: { lambda: 5 }\nsweep: { parameters.lambda: [0.3, 1], parameters.weight: [-0.5, 0.25] }",
        &[
            ("lambda=0.3,weight=-0.5", "parameters: { lambda: 0.3, weight: -0.5 }"),
            ("lambda=0.3,weight=0.25", "parameters: { lambda: 0.3, weight: 0.25 }"),
            ("lambda=1,weight=-0.5", "parameters: { lambda: 1, weight: -0.5 }"),
            ("lambda=1,weight=0.25", "parameters: { lambda: 1, weight: 0.25 }"),
        ],
    );
    read_once(ratio);
    let single = |w: &str| format!("parameters: {{ normalize: false, weight: {w} }}");
    for dtype in ["float32", "float64"] {
        let ratio = agree(
            &world,
            &format!("merge_method: linear\nout_dtype: {dtype}"),
            "parameters: { normalize: false }\nsweep: { weight: [0.1, 0.25, 0.5, 1] }",
            &[
                ("weight=0.1", &single("0.1")),
                ("weight=0.25", &single("0.25")),
                ("weight=0.5", &single("0.5")),
                ("weight=1", &single("1")),
            ],
        );
        read_once(ratio);
    }
    let single = |r: &str| format!("solver: {{ ridge: {r} }}");
    let ratio = agree(
        &world,
        "merge_method: fisher",
        "sweep: { solver.ridge: [0, 0.1, 1] }",
        &[("ridge=0", &single("0")), ("ridge=0.1", &single("0.1")), ("ridge=1", &single("1"))],
    );
    read_once(ratio);
}

#[test]
fn rounds_are_shared() {
    let world = World::new(3, true);
    let head = "merge_method: mats\nsubspace: kfac\ninitial:\n  merge_method: regmean\n  \
                initial: { merge_method: task_arithmetic, parameters: { weight: 0.3 } }";
    let single = |k: usize| format!("solver: {{ method: cg, max_iterations: {k} }}");
    let ratio = agree(
        &world,
        head,
        "solver: { method: cg }\nsweep: { max_iterations: [1, 3] }",
        &[("max_iterations=1", &single(1)), ("max_iterations=3", &single(3))],
    );
    read_once(ratio);
    // Rows go through both rounds in f64: data-free, then RegMean.
    let single = |r: &str| format!("solver: {{ ridge: {r} }}");
    agree(
        &world,
        "merge_method: regmean\ninitial: { merge_method: wudi, solver: { ridge: 0.5 } }",
        "sweep: { solver.ridge: [0.1, 1] }",
        &[("ridge=0.1", &single("0.1")), ("ridge=1", &single("1"))],
    );
}

#[test]
fn many_shards() {
    let world = Small::new(2, 301);
    let scratch = &world.scratch;
    let head = "merge_method: linear\nbase_model: base";
    let flags = ["--out-shard-size", "300"];
    let alone = world.config(&format!("{head}\nparameters: {{ weight: 2 }}"));
    scratch.merge(&alone, "alone", &flags);
    let sweep = world.config(&format!("{head}\nsweep: {{ weight: [1, 2] }}"));
    assert_eq!(scratch.try_merge(&sweep, "out", &flags).code, 0);
    same_weights(&scratch.join("alone"), &scratch.join("out/weight=2"));
}

const REGMEAN: &str =
    "merge_method: regmean\nbase_model: base\nsweep: { solver.ridge: [0.1, 1.0e-3], off_diagonal: [0.9, 1] }";

#[test]
fn each_model_is_a_whole_output_directory() {
    let world = Small::new(2, 302);
    let scratch = &world.scratch;
    scratch.write("base/tokenizer.json", "{}");
    assert_eq!(scratch.try_merge(&world.config(REGMEAN), "out", &[]).code, 0);
    let order = [
        "ridge=0.1,off_diagonal=0.9",
        "ridge=0.1,off_diagonal=1",
        "ridge=0.001,off_diagonal=0.9",
        "ridge=0.001,off_diagonal=1",
    ];
    let record = record(&scratch.join("out"));
    assert_eq!(record["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(record["grid"]["solver.ridge"], serde_json::json!([0.1, 0.001]));
    assert_eq!(record["grid"]["parameters.off_diagonal"], serde_json::json!([0.9, 1.0]));
    let runs = record["runs"].as_array().expect("a list");
    assert_eq!(runs.iter().map(|run| run["name"].as_str().expect("text")).collect::<Vec<_>>(), order);
    let mut bytes_read = 0;
    for run in runs {
        let directory = scratch.join("out").join(run["directory"].as_str().expect("text"));
        for name in ["README.md", "config.json", "merge_config.yml", "model.safetensors", "tokenizer.json"] {
            assert!(directory.join(name).is_file(), "{name}");
        }
        let report = report(&directory);
        let parameters = report["parameters"].as_object().expect("by name");
        for key in ["objective_initial", "objective_final"] {
            let sum: f64 = parameters.values().filter_map(|p| p[key].as_f64()).sum();
            let got = run[key].as_f64().expect("a number");
            assert!((got - sum).abs() <= 1e-12 * sum.abs(), "{key}: {got}, {sum}");
        }
        assert_eq!(run["converged"], true);
        assert!(run.get("iterations").is_none(), "a direct solve has none");
        assert!(run["wall_seconds"].as_f64().is_some_and(|s| s >= 0.0));
        assert_eq!(run["bytes_read"], report["bytes_read"]);
        bytes_read += report["bytes_read"].as_u64().expect("a number");
        assert_eq!(
            report["parameters"]["model.layers.0.mlp.weight"]["ridge"],
            run["parameters"]["solver.ridge"]
        );
        // The config that it names gives it again.
        let name = run["name"].as_str().expect("text");
        let config = fs::read_to_string(directory.join("merge_config.yml")).expect("it is there");
        assert!(!config.contains("sweep:"), "{config}");
        let again = scratch.merge(&config, &format!("again {name}"), &[]);
        same_weights(&again.directory, &directory);
        assert_eq!(again.report["config_hash"], report["config_hash"]);
    }
    assert_eq!(record["bytes_read"], bytes_read);
    assert_ne!(record["config_hash"], report(&scratch.join("out").join(order[0]))["config_hash"]);
}

#[test]
fn the_plan_names_the_models() {
    let world = Small::new(2, 303);
    let scratch = &world.scratch;
    let config = world.config(REGMEAN);
    let plan = scratch.plan(&config, &[]);
    let models = plan["sweep"].as_array().expect("a list");
    assert_eq!(models.len(), 4);
    assert_eq!(models[1]["name"], "ridge=0.1,off_diagonal=1");
    assert_eq!(models[1]["parameters"]["solver.ridge"], 0.1);
    let one = scratch.plan(&world.config("merge_method: regmean\nbase_model: base"), &[]);
    assert_eq!(plan["bytes_read"], one["bytes_read"]);
    assert_eq!(plan["bytes_written"].as_u64(), one["bytes_written"].as_u64().map(|n| 4 * n));
    assert!(plan["peak_memory_bytes"].as_u64() > one["peak_memory_bytes"].as_u64());
    scratch.write("c.yml", &config);
    let table = scratch.run(&["merge", "c.yml", "--out", "out", "--dry-run"]);
    assert_eq!(table.code, 0, "{}", table.stderr);
    assert!(table.stdout.contains("ridge=0.001,off_diagonal=0.9"), "{}", table.stdout);
    assert!(!scratch.join("out").exists());
}

#[test]
fn one_line_a_model_that_did_not_converge() {
    let world = Small::new(3, 304);
    let config = world.config(&format!(
        "{KFAC}\nbase_model: base\nsolver: {{ method: cg, tolerance: 0 }}\nsweep: {{ max_iterations: [1, 2] }}"
    ));
    let output = world.scratch.try_merge(&config, "out", &["--require-convergence"]);
    assert_eq!(output.code, 3, "{}", output.stderr);
    for name in ["max_iterations=1: ", "max_iterations=2: "] {
        assert!(output.stderr.contains(name), "{}", output.stderr);
    }
    assert_eq!(record(&world.scratch.join("out"))["runs"][0]["converged"], false, "the output is kept");
}

#[test]
fn a_failure_leaves_nothing() {
    let world = Small::new(2, 305);
    let scratch = &world.scratch;
    // Found in the last tensor, when others are written.
    let broken: Vec<_> = world.models[1]
        .iter()
        .map(|t| if t.name == super::NORM { t.with_value(3, f64::NAN) } else { t.clone() })
        .collect();
    scratch.model("m1", &broken);
    let output = scratch.try_merge(&world.config(REGMEAN), "out", &[]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(!scratch.join("out").exists(), "it was made by the run");
    fs::create_dir(scratch.join("mine")).expect("make a directory");
    assert_eq!(scratch.try_merge(&world.config(REGMEAN), "mine", &[]).code, 2);
    assert!(names(&scratch.join("mine")).is_empty());
    // What is not empty, or an input, is refused as for a merge.
    scratch.write("full/note.txt", "mine");
    for out in ["full", "base", "m0/inside"] {
        assert_eq!(scratch.try_merge(&world.config(REGMEAN), out, &[]).code, 2, "{out}");
    }
    assert_eq!(names(&scratch.join("full")), BTreeSet::from(["note.txt".to_owned()]));
}

#[test]
fn an_interrupted_sweep_has_nothing_under_a_final_name() {
    let world = World::new(3, true);
    let scratch = &world.scratch;
    let head = format!(
        "{KFAC}\nsolver: {{ method: cg, max_iterations: 1000000, tolerance: 0 }}\nsweep: {{ solver.ridge: [0, 1] }}"
    );
    scratch.write("c.yml", world.config(&head, "m"));
    let args = ["merge", "c.yml", "--out", "out", "--progress", "none"];
    let mut child = scratch
        .command(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start the binary");
    let started = Instant::now();
    let working = || scratch.join("out").exists() && names(&scratch.join("out")).len() > 2;
    while !working() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(working(), "the sweep does not start");
    for name in names(&scratch.join("out")) {
        assert!(name.starts_with('.'), "{name} stands under a final name");
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
    kill_process(pid, Signal::TERM).expect("send a signal");
    let status = wait(&mut child, Instant::now() + Duration::from_secs(20)).expect("the signal ends it");
    assert_eq!(code(status), 143);
    for name in names(&scratch.join("out")) {
        assert!(name.starts_with(".mats-stream-"), "{name} stands under a final name");
    }
}
