//! Memory budgets: the plan names the least, the least works, less is refused.

use serde_json::Value;

use crate::algebra::{Matrix, gram};
use crate::util::{Random, Scratch, Statistics, Tensor, error_line, models};

/// Two models of one weight and its K-FAC statistics, large enough that the matrices show in the budget.
fn world(out: usize, side: usize) -> (Scratch, String) {
    let mut random = Random::new(70);
    let scratch = Scratch::new();
    for name in ["a", "b"] {
        scratch.model(
            name,
            &[
                Tensor::random("w", "F32", &[out, side], &mut random),
                Tensor::random("v", "F32", &[side], &mut random),
            ],
        );
        let diagonal = |side: usize, random: &mut Random| -> Matrix {
            let mut m = Matrix::identity(side);
            for i in 0..side {
                m.data[i * side + i] = 1.5 + random.uniform();
            }
            m
        };
        Statistics::new()
            .full("w/input_gram", side, &diagonal(side, &mut random).data)
            .full("w/output_gram", out, &diagonal(out, &mut random).data)
            .write(&scratch, &format!("{name}.safetensors"));
    }
    (scratch, models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))]))
}

fn bytes(plan: &Value, key: &str) -> u64 {
    plan[key].as_u64().unwrap_or_else(|| panic!("{key}: {plan}"))
}

/// The size after `try --max-memory ` in an error line.
fn advised(line: &str) -> &str {
    line.rsplit_once("--max-memory ")
        .expect("the error says what to type")
        .1
        .split([')', ' '])
        .next()
        .expect("one word")
}

#[test]
fn the_least_that_would_do_does() {
    for (k, head) in [
        "merge_method: mats\nsubspace: kfac\nsolver: { method: cg, max_iterations: 3 }",
        "merge_method: mats\nsubspace: kfac",
        "merge_method: regmean",
        "merge_method: linear",
    ]
    .into_iter()
    .enumerate()
    {
        let (scratch, models) = world(300, 400);
        let config = format!("{head}\n{models}");
        let ample = scratch.merge(&config, "ample", &["--max-memory", "2GiB", "--threads", "2"]);
        let plan = scratch.plan(&config, &["--max-memory", "2GiB", "--threads", "2"]);
        let least = bytes(&plan, "least_memory_bytes");
        assert!(bytes(&plan, "peak_memory_bytes") <= 2 << 30, "{plan}");
        let tight = scratch.merge(&config, "tight", &["--max-memory", &least.to_string(), "--threads", "2"]);
        assert_eq!(tight.tensors, ample.tensors, "{head}: the budget changed the result");
        let anonymous = tight.report["peak_anonymous_bytes"].as_u64().expect("measured");
        assert!(anonymous <= least, "{head}: {anonymous} bytes held, at most {least} allowed");
        // One byte less.
        let short = (least - 1).to_string();
        for args in [vec!["merge", "plan.yml", "--out", "refused"], vec!["plan", "plan.yml"]] {
            let output = scratch.run(&[&args[..], &["--max-memory", &short, "--threads", "2"]].concat());
            assert_eq!(output.code, 2, "{head}: {}", output.stderr);
            let line = error_line(&output);
            assert!(
                line.contains("memory") && line.contains(&least.to_string()),
                "{least} is not named: {line}"
            );
            // What the error advises works as it is typed.
            let advice = advised(&line).to_owned();
            scratch.merge(
                &config,
                &format!("advised{k}{}", args[0]),
                &["--max-memory", &advice, "--threads", "2"],
            );
        }
        assert!(!scratch.join("refused").exists());
    }
}

#[test]
fn one_byte_is_refused_not_attempted() {
    let (scratch, models) = world(8, 8);
    let line =
        scratch.refuse_with(&format!("merge_method: regmean\n{models}"), &["--max-memory", "1"], &["memory"]);
    let advice = advised(&line).to_owned();
    scratch.merge(&format!("merge_method: regmean\n{models}"), "out", &["--max-memory", &advice]);
}

#[test]
fn a_plan_reads_no_data() {
    let (scratch, models) = world(20, 30);
    // Statistics that a merge refuses: the plan sees headers alone.
    let mut a = gram(30, 60, &mut Random::new(71));
    a.data[5] = f64::NAN;
    Statistics::new().full("w/input_gram", 30, &a.data).write(&scratch, "b.safetensors");
    let config = format!("merge_method: regmean\n{models}");
    let plan = scratch.plan(&config, &[]);
    let blocks = plan["blocks"].as_array().expect("a list");
    let block =
        |name: &str| blocks.iter().find(|b| b["name"] == name).unwrap_or_else(|| panic!("{name}: {plan}"));
    assert_eq!(block("w")["subspace"], "gram");
    assert_eq!(block("w")["shape"], serde_json::json!([20, 30]));
    assert_eq!(block("v")["method"], "average");
    for key in ["memory_bytes", "bytes_read", "bytes_written", "flops"] {
        assert!(block("w")[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {}", block("w"));
    }
    // Both models' weight and Gram, once at least.
    assert!(bytes(block("w"), "bytes_read") >= 2 * 4 * (20 * 30 + 30 * 30), "{}", block("w"));
    assert_eq!(bytes(block("w"), "bytes_written"), 4 * 20 * 30);
    for key in ["bytes_read", "bytes_written", "peak_memory_bytes", "least_memory_bytes"] {
        assert!(bytes(&plan, key) > 0);
    }
    scratch.refuse(&config, &["b.safetensors", "w/input_gram"]);
}

#[test]
fn b31_a_tensor_larger_than_the_budget_streams() {
    let mut random = Random::new(72);
    let scratch = Scratch::new();
    // 24 MiB in f32, averaged: any budget of a few MiB above the floor will do.
    let shape = [2048, 3072];
    let tensors: Vec<Tensor> =
        (0..2).map(|_| Tensor::random("embed_tokens.weight", "F32", &shape, &mut random)).collect();
    scratch.model("a", &tensors[..1]);
    scratch.model("b", &tensors[1..]);
    let config = "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n";
    let plan = scratch.plan(config, &["--threads", "2"]);
    let least = bytes(&plan, "least_memory_bytes");
    let floor = bytes(&plan, "overhead_memory_bytes");
    assert!(least - floor < 24 << 20, "a mean needs no whole tensor: {least} of which {floor} in any case");
    let merged = scratch.merge(
        config,
        "out",
        &["--max-memory", &least.to_string(), "--threads", "2", "--io", "pread"],
    );
    let anonymous = merged.report["peak_anonymous_bytes"].as_u64().expect("measured");
    assert!(anonymous <= least, "{anonymous} bytes held, at most {least} allowed");
    let (a, b) = (tensors[0].values(), tensors[1].values());
    for (k, v) in merged.values("embed_tokens.weight").into_iter().enumerate() {
        assert_eq!(v, (a[k] + b[k]) / 2.0, "element {k}");
    }
}

/// What a run keeps of each tensor (plan, journal, report) is planned, too: of many small ones it is most of what is held.
#[test]
#[cfg(target_os = "linux")]
fn many_small_tensors_stay_in_the_bound() {
    let scratch = Scratch::new();
    let tensors: Vec<Tensor> = (0..30_000)
        .map(|k| Tensor::f32(&format!("model.layers.{k}.input_layernorm.weight"), &[4], &[k as f64; 4]))
        .collect();
    scratch.model("a", &tensors);
    scratch.model("b", &tensors);
    let config = "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n";
    let least = bytes(&scratch.plan(config, &["--threads", "2"]), "least_memory_bytes");
    let merged = scratch.merge(config, "out", &["--max-memory", &least.to_string(), "--threads", "2"]);
    let anonymous = merged.report["peak_anonymous_bytes"].as_u64().expect("measured");
    assert!(anonymous <= least, "{anonymous} bytes held, at most {least} allowed");
}

/// Matrices of one weight after the other: what was freed is given back, and does not add up.
#[test]
#[cfg(target_os = "linux")]
fn weights_one_after_the_other_hold_one_weights_memory() {
    const SIDE: usize = 500;
    let mut random = Random::new(71);
    let scratch = Scratch::new();
    let tensors = |random: &mut Random| -> Vec<Tensor> {
        (0..4).map(|k| Tensor::random(&format!("l.{k}.weight"), "F32", &[SIDE, SIDE], random)).collect()
    };
    for name in ["base", "a", "b"] {
        scratch.model(name, &tensors(&mut random));
    }
    let config = "merge_method: tsv_m\nbase_model: base\nmodels: [{ model: a }, { model: b }]\n";
    for threads in ["1", "2"] {
        let least = bytes(&scratch.plan(config, &["--threads", threads]), "least_memory_bytes");
        let flags = ["--max-memory", &least.to_string(), "--threads", threads];
        let merged = scratch.merge(config, &format!("out{threads}"), &flags);
        let anonymous = merged.report["peak_anonymous_bytes"].as_u64().expect("measured");
        assert!(anonymous <= least, "{threads} threads: {anonymous} bytes held, at most {least} allowed");
    }
}
