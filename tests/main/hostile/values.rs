//! Weights and numbers of the config that are not what they should be.

use super::{LINEAR, good_weight, with_good_model};
use crate::util::{Random, Scratch, Statistics, Tensor};

/// Position of the bad value: in the second 16-bit stretch of a large tensor, so that a flat index is told from an
/// index within a piece.
const AT: usize = 70_001;
const SHAPE: [usize; 2] = [300, 400];

#[test]
fn b21_nonfinite_weights_are_refused() {
    for (value, dtype) in [
        (f64::NAN, "F32"),
        (f64::INFINITY, "F32"),
        (f64::NEG_INFINITY, "BF16"),
        (f64::NAN, "F16"),
        (f64::INFINITY, "F64"),
    ] {
        let scratch = Scratch::new();
        let mut random = Random::new(21);
        let big = Tensor::random("big", dtype, &SHAPE, &mut random);
        scratch.model("a", std::slice::from_ref(&big));
        scratch.model("b", &[big.with_value(AT, value)]);
        scratch.model("base", std::slice::from_ref(&big));
        for config in [
            LINEAR.to_owned(),
            format!("{}base_model: base\n", LINEAR.replace("linear", "task_arithmetic")),
            format!("{}base_model: base\n", LINEAR.replace("linear", "wudi")),
        ] {
            scratch.refuse(&config, &["b", "`big`", &format!("{AT}")]);
        }
    }
}

#[test]
fn b21_nonfinite_weights_are_refused_under_every_solver() {
    let scratch = Scratch::new();
    let mut random = Random::new(22);
    let w = Tensor::random("w", "F32", &[3, 4], &mut random);
    scratch.model("a", std::slice::from_ref(&w));
    scratch.model("b", &[w.with_value(7, f64::NAN)]);
    Statistics::new()
        .full("w/input_gram", 4, &crate::algebra::gram(4, 16, &mut random).data)
        .full("w/output_gram", 3, &crate::algebra::gram(3, 12, &mut random).data)
        .diagonal("w", &[3, 4], &[1.0; 12])
        .write(&scratch, "s.safetensors");
    let models = crate::util::models(&[("a", Some("s.safetensors")), ("b", Some("s.safetensors"))]);
    for head in [
        "merge_method: fisher\n",
        "merge_method: regmean\n",
        "merge_method: mats\nsubspace: kfac\n",
        "merge_method: mats\nsubspace: kfac\nsolver: { method: cg }\n",
        "merge_method: mats\nsubspace: gram\ninitial: zero\nsolver: { method: cg }\n",
        "merge_method: mats\nsubspace: fisher_diagonal\nsolver: { method: cg }\n",
    ] {
        scratch.refuse(&format!("{head}{models}"), &["b", "`w`", "flat index 7"]);
    }
}

#[test]
fn b21_propagate_confines_the_value_to_its_tensor() {
    let scratch = Scratch::new();
    let mut random = Random::new(23);
    let bad = Tensor::random("bad", "F32", &[3, 4], &mut random);
    let good = Tensor::random("good", "F32", &[3, 4], &mut random);
    scratch.model("a", &[bad.clone(), good.clone()]);
    scratch.model("b", &[bad.with_value(5, f64::NAN), Tensor::random("good", "F32", &[3, 4], &mut random)]);
    let mut statistics = Statistics::new();
    for name in ["bad", "good"] {
        statistics = statistics
            .full(&format!("{name}/input_gram"), 4, &crate::algebra::gram(4, 16, &mut random).data)
            .full(&format!("{name}/output_gram"), 3, &crate::algebra::gram(3, 12, &mut random).data);
    }
    statistics.write(&scratch, "s.safetensors");
    let models = crate::util::models(&[("a", Some("s.safetensors")), ("b", Some("s.safetensors"))]);
    for (out, head) in [
        ("linear", "merge_method: linear\n"),
        ("regmean", "merge_method: regmean\n"),
        ("kfac", "merge_method: mats\nsubspace: kfac\n"),
        ("cg", "merge_method: mats\nsubspace: kfac\nsolver: { method: cg }\n"),
    ] {
        // Statistics ride along; linear reads none.
        let config = format!("{head}{models}");
        let merged = scratch.merge(&config, out, &["--nonfinite", "propagate"]);
        assert!(merged.values("good").iter().all(|v| v.is_finite()), "{out}");
        let nans = merged.values("bad").iter().filter(|v| v.is_nan()).count();
        assert!(nans >= 1, "{out}: the NaN is gone");
        if out == "linear" {
            assert_eq!(nans, 1, "elementwise: the one value only");
            assert!(merged.values("bad")[5].is_nan());
        }
        // The report stays strict JSON: reading it back has checked that.
        assert!(merged.parameter("bad")["method"].is_string());
    }
}

#[test]
fn b25_not_converged_is_reported() {
    let scratch = Scratch::new();
    let side = 24;
    let mut random = Random::new(25);
    let models = ["a", "b", "c"];
    let mut entries = Vec::new();
    for name in models {
        scratch.model(name, &[Tensor::random("w", "F32", &[side, side], &mut random)]);
        // Eigenvalues from 1 to 1e-6 on each side: a condition number of 1e12 or so, hopeless in five steps.
        let mut statistics = Statistics::new();
        for kind in ["input_gram", "output_gram"] {
            let mut diagonal = vec![0.0; side * side];
            for i in 0..side {
                let jitter = 1.0 + 0.5 * random.uniform();
                diagonal[i * side + i] = jitter * 10f64.powf(-6.0 * i as f64 / (side - 1) as f64);
            }
            statistics = statistics.full(&format!("w/{kind}"), side, &diagonal);
        }
        statistics.write(&scratch, &format!("{name}.safetensors"));
        entries.push((name, format!("{name}.safetensors")));
    }
    let entries: Vec<(&str, Option<&str>)> = entries.iter().map(|(m, s)| (*m, Some(s.as_str()))).collect();
    let config = format!(
        "merge_method: mats\nsubspace: kfac\nsolver: {{ method: cg, max_iterations: 5 }}\n{}",
        crate::util::models(&entries)
    );
    let merged = scratch.merge(&config, "kept", &[]);
    let record = merged.parameter("w");
    assert_eq!(record["stop_reason"], "max_iterations", "{record}");
    assert_eq!(record["iterations"], 5, "{record}");
    assert_eq!((&record["method"], &record["subspace"]), (&"mats".into(), &"kfac".into()), "{record}");
    assert_eq!(record["converged"], false, "{record}");
    let output = scratch.try_merge(&config, "demanded", &["--require-convergence"]);
    assert_eq!(output.code, 3, "{}", output.stderr);
    assert!(output.stderr.contains("w"), "{}", output.stderr);
    assert_eq!(scratch.merged("demanded").tensors, merged.tensors, "done and kept");
}

fn fisher_pair() -> (Scratch, String) {
    let scratch = with_good_model();
    scratch.model("b", &[good_weight(2)]);
    let mut random = Random::new(26);
    for name in ["a", "b"] {
        let fisher: Vec<f64> = random.values(12).iter().map(|v| v.abs() + 0.1).collect();
        Statistics::new().diagonal("w", &[3, 4], &fisher).write(&scratch, &format!("{name}.safetensors"));
    }
    let models = crate::util::models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))]);
    (scratch, models)
}

/// `models`, with this weight for the second.
fn weighted(models: &str, weight: &str) -> String {
    format!("{models}    parameters: {{ weight: {weight} }}\n")
}

#[test]
fn b26_weights_that_are_no_numbers() {
    let (scratch, models) = fisher_pair();
    for method in ["linear", "fisher"] {
        for weight in [".nan", ".inf", "-.inf", "1.0e400", "heavy", "{}"] {
            let config = format!("merge_method: {method}\n{}", weighted(&models, weight));
            scratch.refuse_unread(&config, &[".yml", "weight"]);
        }
    }
}

#[test]
fn b26_negative_weights() {
    let (scratch, models) = fisher_pair();
    let fisher = format!("merge_method: fisher\n{}", weighted(&models, "-1"));
    scratch.refuse_unread(&fisher, &["weight", "-1"]);
    // Elementwise methods take any sign: 2a - b.
    let linear = "merge_method: linear\nmodels:\n  - model: a\n    parameters: { weight: 2 }\n  - model: b\n    parameters: { weight: -1 }\n";
    let merged = scratch.merge(linear, "out", &[]);
    let expected: Vec<f64> = good_weight(1)
        .values()
        .iter()
        .zip(good_weight(2).values())
        .map(|(a, b)| f64::from((2.0 * a - b) as f32))
        .collect();
    // 20-bit inputs: 2a - b needs 22 bits and is exact in f32.
    assert_eq!(merged.values("w"), expected);
}

#[test]
fn b26_weights_that_sum_to_zero() {
    let (scratch, models) = fisher_pair();
    let linear = |a: &str, b: &str| {
        format!(
            "merge_method: linear\nmodels:\n  - model: a\n    parameters: {{ weight: {a} }}\n  - model: b\n    parameters: {{ weight: {b} }}\n"
        )
    };
    scratch.refuse_unread(&linear("1", "-1"), &["weight"]);
    scratch.refuse_unread(&linear("0", "0"), &["weight"]);
    scratch
        .refuse_unread(&format!("merge_method: fisher\nparameters: {{ weight: 0 }}\n{models}"), &["weight"]);
    // Not divided: any sum will do.
    let merged = scratch.merge(
        &format!("{}parameters: {{ normalize: false }}\n", linear("1", "-1")),
        "difference",
        &[],
    );
    let expected: Vec<f64> =
        good_weight(1).values().iter().zip(good_weight(2).values()).map(|(a, b)| a - b).collect();
    assert_eq!(merged.values("w"), expected);
}

#[test]
fn b26_weight_zero_drops_the_model() {
    let (scratch, models) = fisher_pair();
    // b's statistics would be refused, were they read.
    Statistics::new().diagonal("w", &[3, 4], &[f64::NAN; 12]).write(&scratch, "b.safetensors");
    let config = format!("merge_method: fisher\ninitial: zero\n{}", weighted(&models, "0"));
    let merged = scratch.merge(&config, "out", &[]);
    // Fa·a/Fa in f64, rounded once.
    crate::algebra::assert_near(
        &merged.values("w"),
        &good_weight(1).values(),
        2f64.powi(-23),
        "the other model alone",
    );
}

#[test]
fn b26_no_models() {
    let scratch = with_good_model();
    for config in [
        "merge_method: linear\nmodels: []\n",
        "merge_method: linear\n",
        "merge_method: linear\nmodels:\n",
        "models:\n  - model: a\n",
    ] {
        scratch.refuse_unread(config, &[".yml"]);
    }
}

#[test]
fn b26_the_same_model_twice_is_that_model() {
    for dtype in ["F32", "BF16", "F16"] {
        let scratch = Scratch::new();
        // Every mantissa bit in use, from the smallest normal numbers to the largest that can be added.
        let mut random = Random::new(27);
        let values: Vec<f64> = (0..4096)
            .map(|k| {
                (1.0 + random.uniform() / 3.0)
                    * 2f64.powi(if dtype == "F16" { k % 28 - 14 } else { k % 250 - 125 })
            })
            .collect();
        scratch.model("a", &[Tensor::new("w", dtype, &[64, 64], &values)]);
        let merged =
            scratch.merge("merge_method: linear\nmodels: [{ model: a }, { model: a }]\n", "out", &[]);
        let stored = crate::util::read_safetensors(&scratch.join("a/model.safetensors"));
        assert_eq!(merged.tensor("w"), &stored[0], "{dtype}");
    }
}

fn warnings(merged: &crate::util::Merged) -> String {
    merged.report["warnings"].to_string()
}

#[test]
fn results_beyond_the_outputs_range_are_told() {
    let scratch = Scratch::new();
    scratch.model("a", &[Tensor::f32("w", &[2, 3], &[7e4; 6]), Tensor::f32("v", &[3], &[1.0; 3])]);
    let config = "merge_method: linear\nmodels: [{model: a}]\n";
    let merged = scratch.merge(&format!("{config}out_dtype: float16\n"), "half", &[]);
    assert!(merged.values("w").iter().all(|v| v.is_infinite()));
    assert!(
        warnings(&merged).contains("tensor `w`: NaN or infinities in the result"),
        "{}",
        warnings(&merged)
    );
    let merged = scratch.merge(&format!("{config}out_dtype: bfloat16\n"), "wide", &[]);
    assert_eq!(warnings(&merged), "[]");
    // Numbers that are none in f32.
    scratch.refuse_unread(&format!("{config}parameters: {{weight: 1e39}}\n"), &["weight", "1e39", "finite"]);
}

#[test]
fn b21_copied_tensors_are_looked_at_too() {
    let scratch = Scratch::new();
    let mut random = Random::new(29);
    let w = Tensor::random("w", "BF16", &SHAPE, &mut random);
    scratch.model("a", &[w.with_value(AT, f64::NAN)]);
    let config = "merge_method: passthrough\nmodels: [{model: a}]\n";
    scratch.refuse(config, &["a", "`w`", &format!("flat index {AT}")]);
    let merged = scratch.merge(config, "out", &["--nonfinite", "propagate"]);
    assert_eq!(merged.tensor("w").bytes, w.with_value(AT, f64::NAN).bytes);
}

#[test]
fn b21_methods_on_singular_vectors_let_it_through_to_its_tensor() {
    let scratch = Scratch::new();
    let mut random = Random::new(30);
    let tensors: Vec<Tensor> =
        ["bad.weight", "good.weight"].map(|n| Tensor::random(n, "F32", &[4, 5], &mut random)).into();
    scratch.model("base", &tensors);
    for method in ["iso_c", "iso_ridge", "iso_cts", "tsv_m", "knots", "mats"] {
        let config =
            format!("merge_method: {method}\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\n");
        for value in [f64::NAN, f64::INFINITY] {
            for name in ["a", "b"] {
                let mut own: Vec<Tensor> =
                    tensors.iter().map(|t| Tensor::random(&t.name, "F32", &[4, 5], &mut random)).collect();
                if name == "b" {
                    own[0] = own[0].with_value(7, value);
                }
                scratch.model(name, &own);
            }
            scratch.refuse(&config, &["b", "`bad.weight`", "flat index 7"]);
            let out = format!("{method}-{value}");
            let merged = scratch.merge(&config, &out, &["--nonfinite", "propagate"]);
            assert!(merged.values("bad.weight").iter().any(|v| !v.is_finite()), "{out}");
            assert!(merged.values("good.weight").iter().all(|v| v.is_finite()), "{out}");
            assert!(warnings(&merged).contains("`bad.weight`"), "{out}: {}", warnings(&merged));
        }
    }
}
