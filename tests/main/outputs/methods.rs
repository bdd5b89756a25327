//! Every method on little models, against the equations of the contract in f64.

use super::{
    DIRECT, EMBEDDING, FLOATS, HALF_ULP, NORM, Term, WEIGHTS, World, conjugate_gradients, find,
    gram_solution, kfac_solution, kfac_system,
};
use crate::algebra::{Matrix, assert_near};
use crate::util::{Random, Scratch, Statistics, Tensor, models};

#[test]
fn linear_is_the_weighted_mean() {
    let world = World::new(3, 1);
    let weights = [1.0, 2.5, 0.25];
    let config = "merge_method: linear\nmodels:\n  - model: m0\n    parameters: { weight: 1 }\n  - model: m1\n    parameters: { weight: 2.5 }\n  - model: m2\n    parameters: { weight: 0.25 }\n";
    let merged = world.scratch.merge(config, "out", &[]);
    for name in FLOATS {
        let values = world.values(name);
        let sum: f64 = weights.iter().sum();
        let expected: Vec<f64> = (0..values[0].len())
            .map(|i| (0..3).map(|k| weights[k] * values[k][i]).sum::<f64>() / sum)
            .collect();
        // f32 throughout: a product and a sum for each model, then a quotient; each rounds terms of at most
        // Σ|wᵢxᵢ|/Σwᵢ ≤ max|x|, here at most 1.2 times the largest result.
        assert_near(&merged.values(name), &expected, 1.2 * 8.0 * HALF_ULP, name);
        assert_eq!(merged.parameter(name)["method"], "linear");
    }
}

#[test]
fn linear_without_normalisation_sums() {
    let world = World::new(2, 2);
    let merged = world.merge("merge_method: linear\nparameters: { normalize: false, weight: 0.5 }", "out");
    for name in FLOATS {
        // Halves of 20-bit values: exact.
        assert_eq!(merged.values(name), world.mean(name), "{name}");
    }
}

#[test]
fn gradients_and_filters_set_weights_by_tensor() {
    let world = World::new(2, 3);
    let config = |weight: &str| {
        format!(
            "merge_method: linear\nmodels:\n  - model: m0\n    parameters: {{ weight: 1 }}\n  - model: m1\n    parameters:\n      weight: {weight}\n"
        )
    };
    let merged = world.scratch.merge(&config("[0.0, 1.0]"), "gradient", &[]);
    // Layer 0 of 2 has the first weight, layer 1 the last; what is outside the layers counts as the first.
    assert_eq!(merged.values(WEIGHTS[0].0), find(&world.models[0], WEIGHTS[0].0).values());
    assert_eq!(merged.values(WEIGHTS[1].0), world.mean(WEIGHTS[1].0));
    assert_eq!(merged.values(EMBEDDING), find(&world.models[0], EMBEDDING).values());
    let merged = world.scratch.merge(&config("[{ filter: mlp, value: 1.0 }, { value: 0.0 }]"), "filter", &[]);
    assert_eq!(merged.values(WEIGHTS[0].0), world.mean(WEIGHTS[0].0));
    assert_eq!(merged.values(NORM), find(&world.models[0], NORM).values());
}

#[test]
fn task_arithmetic_adds_scaled_task_vectors() {
    let world = World::new(3, 4);
    for (out, parameters, scale) in [
        ("plain", "{ weight: 0.3 }", 0.3),
        ("lambda", "{ weight: 0.5, lambda: 0.25 }", 0.125),
        ("negative", "{ weight: -1 }", -1.0),
    ] {
        let merged = world.merge(
            &format!("merge_method: task_arithmetic\nbase_model: base\nparameters: {parameters}"),
            out,
        );
        for name in FLOATS {
            let (values, base) = (world.values(name), find(&world.base, name).values());
            let expected: Vec<f64> = (0..base.len())
                .map(|i| base[i] + scale * values.iter().map(|v| v[i] - base[i]).sum::<f64>())
                .collect();
            // f32: differences, products and sums of at most 3/8 each, one sum with the base: nine roundings of values
            // no larger than the result's largest.
            assert_near(&merged.values(name), &expected, 9.0 * HALF_ULP, name);
        }
    }
}

#[test]
fn fisher_weighs_each_element() {
    let world = World::new(3, 5);
    let merged = world.merge("merge_method: fisher", "out");
    for (place, name) in [NORM, WEIGHTS[0].0, WEIGHTS[1].0].into_iter().enumerate() {
        let values = world.values(name);
        let fisher = |k: usize, i: usize| world.fisher[k][place][i].max(1e-8);
        let expected: Vec<f64> = (0..values[0].len())
            .map(|i| {
                (0..3).map(|k| fisher(k, i) * values[k][i]).sum::<f64>()
                    / (0..3).map(|k| fisher(k, i)).sum::<f64>()
            })
            .collect();
        assert_near(&merged.values(name), &expected, DIRECT, name);
        assert_eq!(merged.parameter(name)["subspace"], "fisher_diagonal");
    }
    assert_eq!(merged.parameter(EMBEDDING)["method"], "average");
    // 3 models: a sum of 20-bit values is exact in f32, its third is rounded once.
    assert_near(&merged.values(EMBEDDING), &world.mean(EMBEDDING), 3.0 * HALF_ULP, EMBEDDING);
}

#[test]
fn fisher_floor_lets_every_model_speak() {
    let world = World::new(2, 6);
    let name = NORM;
    // Far below the floor of 1e-8 both models have the same say, however different their Fisher.
    for (k, f) in [1e-12, 1e-20].into_iter().enumerate() {
        crate::util::Statistics::new()
            .diagonal(name, &[7], &[f; 7])
            .write(&world.scratch, &format!("m{k}.safetensors"));
    }
    let merged = world.merge("merge_method: fisher", "floor");
    assert_near(&merged.values(name), &world.mean(name), DIRECT, "floor");
    // CG has no floor: the first model's Fisher outweighs the other's by 1e8.
    let merged = world.merge("merge_method: mats\nsubspace: fisher_diagonal\nsolver: { method: cg }", "cg");
    let first = find(&world.models[0], name).values();
    // One step solves an operator that is the same everywhere; tolerance 1e-5 on the residual, and f32.
    assert_near(&merged.values(name), &first, 2e-5, "no floor");
}

#[test]
fn regmean_solves_the_normal_equations() {
    let world = World::new(3, 7);
    let weights = [1.0, 1.0, 1.0];
    for (out, head, ridge, lambda) in [
        ("plain", "merge_method: regmean", 0.0, 1.0),
        ("scaled", "merge_method: regmean\nparameters: { off_diagonal: 0.9 }", 0.0, 0.9),
        ("ridged", "merge_method: regmean\nsolver: { method: direct, ridge: 0.5 }", 0.5, 1.0),
        ("diagonal", "merge_method: regmean\nparameters: { off_diagonal: 0 }", 0.0, 0.0),
    ] {
        let merged = world.merge(head, out);
        for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
            let terms: Vec<Term> = world
                .terms(w, &weights)
                .into_iter()
                .map(|t| Term { input: t.input.off_diagonal(lambda), ..t })
                .collect();
            let expected = gram_solution(&terms, &world.mean_weight(w), ridge);
            assert_near(&merged.values(name), &expected.data, DIRECT, &format!("{out} {name}"));
            let record = merged.parameter(name);
            assert_eq!(
                (&record["subspace"], &record["converged"]),
                (&"gram".into(), &true.into()),
                "{record}"
            );
        }
        // A vector has no input side.
        assert_eq!(merged.parameter(NORM)["method"], "average");
    }
}

#[test]
fn regmean_weighs_models() {
    let world = World::new(2, 8);
    let config = format!("{}    parameters: {{ weight: 3.0 }}\n", world.config("merge_method: regmean"));
    let merged = world.scratch.merge(&config, "out", &[]);
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        let expected = gram_solution(&world.terms(w, &[1.0, 3.0]), &world.mean_weight(w), 0.0);
        assert_near(&merged.values(name), &expected.data, DIRECT, name);
    }
}

#[test]
fn mats_without_statistics_is_iso_ridge_where_there_is_a_base() {
    let world = World::new(3, 9);
    let models = "models: [{ model: m0 }, { model: m1 }, { model: m2 }]\n";
    let merge = |head: &str, out: &str| world.scratch.merge(&format!("{head}\n{models}"), out, &[]);
    let expected = merge("merge_method: iso_ridge\nbase_model: base", "expected");
    let free = merge("merge_method: mats\nbase_model: base", "free");
    for name in WEIGHTS.iter().map(|(name, _, _)| *name).chain([EMBEDDING, NORM]) {
        assert_eq!(free.values(name), expected.values(name), "{name}");
    }
    // Without a base, or where something else is asked for, what has no statistics is unmatched.
    for (out, head) in [
        ("no_base", "merge_method: mats"),
        ("unmatched", "merge_method: mats\nbase_model: base\nunmatched: average"),
        ("auto", "merge_method: mats\nbase_model: base\nsubspace: auto"),
        ("scaled", "merge_method: mats\nbase_model: base\nparameters: { off_diagonal: 0.9 }"),
    ] {
        let merged = merge(head, out);
        for (name, _, _) in WEIGHTS {
            assert_eq!(merged.parameter(name)["method"], "average", "{out} {name}");
        }
    }
}

#[test]
fn wudi_and_actmat_solve_with_task_vectors() {
    let world = World::new(3, 9);
    for (out, head, normalised, ridge) in [
        ("wudi", "merge_method: wudi\nbase_model: base", true, 0.3),
        ("actmat", "merge_method: actmat\nbase_model: base", false, 0.3),
        (
            "ridge",
            "merge_method: wudi\nbase_model: base\nsolver: { method: direct, ridge: 0.05 }",
            true,
            0.05,
        ),
        (
            "mats",
            "merge_method: mats\nsubspace: delta_gram\nbase_model: base\nsolver: { method: direct, ridge: 0.3 }",
            true,
            0.3,
        ),
    ] {
        let merged = world.merge(head, out);
        for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
            let base = world.base_weight(w);
            let mut start = base.clone();
            let terms: Vec<Term> = (0..3)
                .map(|k| {
                    let tau = world.weight(k, w).plus(-1.0, &base);
                    start = start.plus(1.0, &tau);
                    let scale = if normalised { 1.0 / tau.norm().powi(2) } else { 1.0 };
                    let input = tau.transpose().times(&tau).scaled(scale);
                    Term { weight: 1.0, input, output: Matrix::zeros(0, 0), theta: world.weight(k, w) }
                })
                .collect();
            // The ridge bounds the condition: fewer than 3·7/ridge.
            let expected = gram_solution(&terms, &start, ridge);
            assert_near(&merged.values(name), &expected.data, DIRECT, &format!("{out} {name}"));
            assert_eq!(merged.parameter(name)["subspace"], "delta_gram");
        }
        // Lookup tables and vectors: the plain mean.
        for name in [EMBEDDING, NORM] {
            assert_near(&merged.values(name), &world.mean(name), 3.0 * HALF_ULP, name);
            assert_eq!(merged.parameter(name)["method"], "average", "{name}");
        }
    }
}

#[test]
fn two_model_kfac_direct_is_exact() {
    let world = World::new(2, 10);
    for (out, head, ridge) in [
        ("direct", "merge_method: mats\nsubspace: kfac\nsolver: { method: direct }", 0.0),
        ("ridged", "merge_method: mats\nsubspace: kfac\nsolver: { method: direct, ridge: 0.2 }", 0.2),
        ("auto", "merge_method: mats\nsubspace: kfac", 0.1),
        ("auto_given", "merge_method: mats\nsubspace: kfac\nsolver: { ridge: 0.3 }", 0.3),
    ] {
        let merged = world.merge(head, out);
        for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
            let expected = kfac_solution(&world.terms(w, &[1.0, 1.0]), &world.mean_weight(w), ridge);
            assert_near(&merged.values(name), &expected, DIRECT, &format!("{out} {name}"));
            let record = merged.parameter(name);
            assert_eq!(
                (&record["subspace"], &record["converged"]),
                (&"kfac".into(), &true.into()),
                "{record}"
            );
        }
    }
}

/// Factors of a rank below their side with directions that decay, as real ones have: there the inverse of the two terms alone
/// left a tenth of the residual after its last step when the ridge was moderate.
#[test]
fn two_model_kfac_direct_is_exact_on_decaying_factors() {
    const SHAPE: (usize, usize) = (20, 28);
    let mut random = Random::new(12);
    let scratch = Scratch::new();
    let mut terms = Vec::new();
    for name in ["a", "b"] {
        let theta = Matrix::random(SHAPE.0, SHAPE.1, &mut random).stored();
        scratch.model(name, &[Tensor::f32("w", &[SHAPE.0, SHAPE.1], &theta.data)]);
        let mut decaying = |side: usize| {
            let mut x = Matrix::random(side - 4, side, &mut random);
            for (k, row) in x.data.chunks_exact_mut(side).enumerate() {
                row.iter_mut().for_each(|v| *v *= 0.6f64.powi(k as i32));
            }
            x.transpose().times(&x).stored()
        };
        let (input, output) = (decaying(SHAPE.1), decaying(SHAPE.0));
        Statistics::new()
            .full("w/input_gram", SHAPE.1, &input.data)
            .full("w/output_gram", SHAPE.0, &output.data)
            .write(&scratch, &format!("{name}.safetensors"));
        terms.push(Term { weight: 1.0, theta, input, output });
    }
    let mean = terms[0].theta.plus(1.0, &terms[1].theta).scaled(0.5);
    for ridge in [1e-3, 0.1, 10.0] {
        let text = format!(
            "merge_method: mats\nsubspace: kfac\nsolver: {{ method: direct, ridge: {ridge} }}\n{}",
            models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))])
        );
        let merged = scratch.merge(&text, &format!("ridge{ridge}"), &["--require-convergence"]);
        // 1e-10 of the residual by a condition of at most the unknowns over the ridge, 6e5; and the output's rounding.
        assert_near(
            &merged.values("w"),
            &kfac_solution(&terms, &mean, ridge),
            1e-4,
            &format!("ridge {ridge}"),
        );
        let record = merged.parameter("w");
        assert!(record["iterations"].as_u64().is_some_and(|steps| steps < 200), "{record}");
        assert!(record["final_relative_residual"].as_f64().is_some_and(|r| r < 1e-9), "{record}");
    }
}

/// A model of weight 0 has no say, and is no reason to divide by 0.
#[test]
fn two_model_kfac_with_a_weight_of_zero_is_the_other_ones() {
    let world = World::new(2, 13);
    let text = world.config(
        "merge_method: mats\nsubspace: kfac\ninitial: average\nsolver: { method: direct, ridge: 0.2 }",
    );
    let text = text.replacen("- model: m1\n", "- model: m1\n    parameters: { weight: 0 }\n", 1);
    let merged = world.scratch.merge(&text, "out", &["--require-convergence"]);
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        let expected = kfac_solution(&world.terms(w, &[1.0, 0.0]), &world.mean_weight(w), 0.2);
        assert_near(&merged.values(name), &expected, DIRECT, name);
    }
}

/// `auto`: 384 x 384 is cheap in f64, 400 x 400 no more; without a ridge it is direct at any size.
#[test]
fn two_model_kfac_is_direct_where_that_is_cheap() {
    for (side, ridge, solver) in [(384, "0.1", "direct"), (400, "0.1", "pcg"), (400, "0", "direct")] {
        let scratch = Scratch::new();
        for name in ["a", "b"] {
            scratch.model(name, &[Tensor::f32("w", &[side, side], &vec![1.0; side * side])]);
            let gram = Matrix::identity(side);
            Statistics::new()
                .full("w/input_gram", side, &gram.data)
                .full("w/output_gram", side, &gram.data)
                .write(&scratch, &format!("{name}.safetensors"));
        }
        let text = format!(
            "merge_method: mats\nsolver: {{ ridge: {ridge} }}\n{}",
            models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))])
        );
        let plan = scratch.plan(&text, &[]).to_string();
        assert!(plan.contains(&format!("\"solver\":\"{solver}\"")), "{side}, ridge {ridge}: {plan}");
    }
}

#[test]
fn one_model_kfac_is_that_model() {
    let world = World::new(1, 11);
    let merged = world.merge(
        "merge_method: mats\nsubspace: kfac\nbase_model: base\ninitial: base\nsolver: { method: direct }",
        "out",
    );
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        assert_near(&merged.values(name), &world.weight(0, w).data, DIRECT, name);
    }
}

/// What f32 conjugate gradients may leave of the residual beyond its tolerance: in each step the recurrence drifts from
/// the true residual by a few units of rounding of ‖A‖‖x‖ (Greenbaum 1997); the factor 10 covers the sums over at most
/// seven entries inside a product.
fn drift(terms: &[Term], theta: &Matrix, steps: f64) -> f64 {
    let operator: f64 = terms.iter().map(|t| t.weight * t.input.norm() * t.output.norm()).sum();
    10.0 * (steps + 2.0) * HALF_ULP * operator * theta.norm()
}

fn kfac_residual(terms: &[Term], theta: &Matrix) -> (f64, f64) {
    let (k, b) = kfac_system(terms);
    let x = Matrix::new(theta.data.len(), 1, theta.data.clone());
    (b.plus(-1.0, &k.times(&x)).norm(), b.norm())
}

#[test]
fn kfac_cg_reaches_its_tolerance() {
    let world = World::new(3, 12);
    for (out, head, tolerance) in [
        ("default", "merge_method: mats\nsubspace: kfac\nsolver: { method: cg }", 1e-5),
        (
            "loose",
            "merge_method: mats\nsubspace: kfac\nsolver: { method: cg, tolerance: 1.0e-2 }\ninitial: zero",
            1e-2,
        ),
        (
            "scaled",
            "merge_method: mats\nsubspace: kfac\nsolver: { method: cg }\nparameters: { off_diagonal: 0.9 }",
            1e-5,
        ),
    ] {
        let merged = world.merge(head, out);
        for (w, (name, rows, columns)) in WEIGHTS.into_iter().enumerate() {
            let lambda = if out == "scaled" { 0.9 } else { 1.0 };
            let terms: Vec<Term> = world
                .terms(w, &[1.0, 1.0, 1.0])
                .into_iter()
                .map(|t| Term {
                    input: t.input.off_diagonal(lambda),
                    output: t.output.off_diagonal(lambda),
                    ..t
                })
                .collect();
            let theta = Matrix::new(rows, columns, merged.values(name));
            let record = merged.parameter(name);
            assert_eq!(record["stop_reason"], "relative_residual", "{out} {name}: {record}");
            let steps = record["iterations"].as_f64().expect("a count");
            assert!((1.0..=100.0).contains(&steps), "{record}");
            let (residual, rhs) = kfac_residual(&terms, &theta);
            let slack = drift(&terms, &theta, steps);
            assert!(
                residual <= tolerance * rhs + slack,
                "{out} {name}: {residual:e} of {rhs:e}, slack {slack:e}"
            );
            // The report's own figure is the true residual, recomputed in f32.
            let reported = record["final_relative_residual"].as_f64().expect("a number");
            assert!(
                (reported * rhs - residual).abs() <= slack,
                "{out} {name}: reported {reported:e}, is {:e}",
                residual / rhs
            );
            let before = record["initial_relative_residual"].as_f64().expect("a number");
            let start = if out == "loose" { Matrix::zeros(rows, columns) } else { world.mean_weight(w) };
            let (initial, _) = kfac_residual(&terms, &start);
            assert!(
                (before * rhs - initial).abs() <= drift(&terms, &world.mean_weight(w), 1.0),
                "{out} {name}: {record}"
            );
            let (old, new) = (record["objective_initial"].as_f64(), record["objective_final"].as_f64());
            assert!(new.expect("a number") < old.expect("a number"), "{out} {name}: {record}");
        }
    }
}

#[test]
fn cg_takes_the_papers_steps() {
    let world = World::new(3, 13);
    for steps in [1, 2, 3] {
        let head = format!(
            "merge_method: mats\nsubspace: kfac\ninitial: zero\nsolver: {{ method: cg, max_iterations: {steps}, tolerance: 0 }}"
        );
        let merged = world.merge(&head, &format!("steps{steps}"));
        for (w, (name, rows, columns)) in WEIGHTS.into_iter().enumerate() {
            let (k, b) = kfac_system(&world.terms(w, &[1.0, 1.0, 1.0]));
            let expected = conjugate_gradients(&k, &b, &vec![0.0; rows * columns], steps);
            // Each step rounds vectors and products of sums over at most 7·7 entries to f32, and α and β carry that on
            // with the condition, below 1e3 in these systems' first steps: 49 · 2⁻²⁴ · steps, times some tens.
            assert_near(&merged.values(name), &expected, 1e-4, &format!("{steps} steps, {name}"));
            let record = merged.parameter(name);
            assert_eq!(record["iterations"], steps, "{record}");
            assert_eq!(record["stop_reason"], "max_iterations", "{record}");
        }
    }
}

#[test]
fn cg_ridge_pulls_towards_the_initial_guess() {
    let world = World::new(3, 14);
    let head = "merge_method: mats\nsubspace: kfac\nbase_model: base\ninitial: base\nsolver: { method: cg, ridge: 0.5, tolerance: 1.0e-6, max_iterations: 200 }";
    let merged = world.merge(head, "out");
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        let expected = kfac_solution(&world.terms(w, &[1.0; 3]), &world.base_weight(w), 0.5);
        // A relative residual of 1e-6 and f32's drift, times a condition that the ridge keeps below 1 + 42/0.5.
        assert_near(&merged.values(name), &expected, 85.0 * 2e-6, name);
    }
}

#[test]
fn gram_cg_agrees_with_the_direct_solve() {
    let world = World::new(3, 15);
    let merged = world.merge(
        "merge_method: mats\nsubspace: gram\nsolver: { method: cg, tolerance: 1.0e-6, max_iterations: 200 }",
        "cg",
    );
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        let expected = gram_solution(&world.terms(w, &[1.0; 3]), &world.mean_weight(w), 0.0);
        // As above; the condition of a sum of three such Grams is below 50.
        assert_near(&merged.values(name), &expected.data, 50.0 * 2e-6, name);
        assert!(merged.parameter(name)["iterations"].as_u64().is_some_and(|n| n > 0), "CG was asked for");
    }
}

#[test]
fn pcg_agrees_with_the_ridged_system() {
    let world = World::new(3, 16);
    for preconditioner in ["none", "jacobi", "kronecker", "kronecker_cholesky", "generalized", "hybrid"] {
        let head = format!(
            "merge_method: mats\nsubspace: kfac\nsolver: {{ method: pcg, preconditioner: {preconditioner}, ridge: 1.0, tolerance: 0, max_iterations: 60 }}"
        );
        let merged = world.merge(&head, preconditioner);
        for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
            let expected = kfac_solution(&world.terms(w, &[1.0; 3]), &world.mean_weight(w), 1.0);
            // To the end: what is left is f32's rounding times a condition below 1 + 42.
            assert_near(
                &merged.values(name),
                &expected,
                43.0 * 10.0 * HALF_ULP,
                &format!("{preconditioner} {name}"),
            );
            // The report says how it went and what it took.
            let record = merged.parameter(name);
            let steps = record["iterations"].as_u64().expect("a count") as usize;
            let history = record["history"].as_array().expect("one entry a step");
            assert_eq!(history.len(), steps + 1, "{record}");
            let objectives: Vec<f64> = history.iter().filter_map(|h| h["objective"].as_f64()).collect();
            assert!(objectives.windows(2).all(|w| w[1] <= w[0]), "{record}");
            if preconditioner == "none" {
                assert!(record["preconditioner"].is_null() && record["setup"].is_null(), "{record}");
            } else {
                assert_eq!(record["preconditioner"], preconditioner, "{record}");
                assert!(record["setup"]["flops"].as_f64().is_some_and(|f| f > 0.0), "{record}");
                assert!(record["setup"]["bytes"].as_u64().is_some_and(|b| b > 0), "{record}");
            }
        }
    }
}

#[test]
fn refinement_reaches_what_f32_does_not() {
    let world = World::new(3, 17);
    let solver = |tolerance: &str| {
        format!(
            "merge_method: mats\nsubspace: kfac\nout_dtype: float64\n\
             solver: {{ method: pcg, ridge: 1.0, max_iterations: 200, stop: {{ relative_residual: {tolerance} }} }}"
        )
    };
    let merged = world.merge(&solver("1.0e-12"), "refined");
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        let record = merged.parameter(name);
        assert_eq!(record["stop_reason"], "relative_residual", "{record}");
        assert!(record["final_relative_residual"].as_f64().is_some_and(|r| r <= 1e-12), "{record}");
        let expected = kfac_solution(&world.terms(w, &[1.0; 3]), &world.mean_weight(w), 1.0);
        // 1e-12 of b, times a condition below 1 + 42.
        assert_near(&merged.values(name), &expected, 43.0 * 2e-12, name);
    }
    // A goal that f32 meets is left to f32.
    let merged = world.merge(&solver("1.0e-5"), "plain");
    let record = merged.parameter(WEIGHTS[0].0);
    assert_eq!(record["stop_reason"], "relative_residual", "{record}");
    assert!(record["final_relative_residual"].as_f64().is_some_and(|r| r > 1e-9), "{record}");
}

#[test]
fn rules_of_pcg_are_reported() {
    let world = World::new(3, 18);
    for (rule, value, reason) in [
        ("preconditioned_residual", "1.0e-3", "preconditioned_residual"),
        ("objective_decrease", "1.0e-3", "objective_decrease"),
        ("seconds", "0", "time_limit"),
    ] {
        let merged = world.merge(
            &format!(
                "merge_method: mats\nsubspace: kfac\nsolver: {{ method: pcg, stop: {{ {rule}: {value} }} }}"
            ),
            rule,
        );
        assert_eq!(merged.parameter(WEIGHTS[0].0)["stop_reason"], reason);
    }
}

#[test]
fn subspace_auto_takes_the_best_that_the_statistics_allow() {
    let world = World::new(2, 17);
    let merged = world.merge("merge_method: mats", "out");
    for (name, _, _) in WEIGHTS {
        assert_eq!(merged.parameter(name)["subspace"], "kfac");
    }
    assert_eq!(merged.parameter(NORM)["subspace"], "fisher_diagonal");
    assert_eq!(merged.parameter(EMBEDDING)["method"], "average");
}

#[test]
fn fisher_block_couples_a_vectors_entries() {
    let world = World::new(2, 18);
    let mut random = crate::util::Random::new(180);
    let mut terms = Vec::new();
    for k in 0..2 {
        let block = crate::algebra::gram(7, 35, &mut random);
        crate::util::Statistics::new()
            .full(&format!("{NORM}/fisher_block"), 7, &block.data)
            .write(&world.scratch, &format!("m{k}.safetensors"));
        let theta = Matrix::new(1, 7, find(&world.models[k], NORM).values());
        terms.push(Term { weight: 1.0, input: block, output: Matrix::zeros(0, 0), theta });
    }
    let start = Matrix::new(1, 7, world.mean(NORM));
    let merged =
        world.merge("merge_method: mats\nsubspace: fisher_block\nsolver: { method: direct }", "direct");
    assert_near(&merged.values(NORM), &gram_solution(&terms, &start, 0.0).data, DIRECT, "direct");
    let merged = world.merge("merge_method: mats", "auto");
    assert_eq!(merged.parameter(NORM)["subspace"], "fisher_block");
}

#[test]
fn unmatched_parameters() {
    let world = World::new(2, 19);
    let average = world.merge("merge_method: regmean\nunmatched: average", "average");
    assert_eq!(average.values(EMBEDDING), world.mean(EMBEDDING));
    let base = world.merge("merge_method: regmean\nunmatched: base\nbase_model: base", "base_kept");
    assert_eq!(base.tensor(EMBEDDING), find(&world.base, EMBEDDING));
    assert_eq!(base.values(WEIGHTS[0].0), average.values(WEIGHTS[0].0));
    world
        .scratch
        .refuse_unread(&world.config("merge_method: regmean\nunmatched: error"), &[EMBEDDING, "unmatched"]);
}

/// A Conv1D keeps its weight [in, out]; its statistics' sides are named as stored and the metadata says so.
#[test]
fn a_transposed_weight_is_no_regmean() {
    let world = World::new(2, 21);
    let name = WEIGHTS[0].0;
    for k in 0..2 {
        crate::util::Statistics::new()
            .full(&format!("{name}/input_gram"), 7, &world.input[k][0].data)
            .metadata(&format!("layout:{name}"), "in,out")
            .write(&world.scratch, &format!("m{k}.safetensors"));
    }
    let merged = world.merge("merge_method: regmean", "out");
    assert_eq!(merged.values(name), world.mean(name));
    let note = merged.parameter(name)["note"].as_str().expect("a reason");
    assert!(note.contains("[in, out]"), "{note}");
}

#[test]
fn kfac_with_one_of_its_two_statistics_is_unmatched() {
    let world = World::new(2, 20);
    for k in 0..2 {
        let name = WEIGHTS[0].0;
        crate::util::Statistics::new()
            .full(&format!("{name}/input_gram"), 7, &world.input[k][0].data)
            .write(&world.scratch, &format!("m{k}.safetensors"));
    }
    let merged = world.merge("merge_method: mats\nsubspace: kfac", "kfac");
    assert_eq!(merged.values(WEIGHTS[0].0), world.mean(WEIGHTS[0].0));
    let merged = world.merge("merge_method: mats", "auto");
    assert_eq!(merged.parameter(WEIGHTS[0].0)["subspace"], "gram");
}

/// Low-rank factors, whose halves of the ridge make them dense: once the ridge was left out of their preconditioner, and the
/// merge was neither solved nor refused.
#[test]
fn two_model_kfac_direct_is_exact_on_low_rank_factors() {
    const SHAPE: (usize, usize) = (6, 9);
    let mut random = Random::new(14);
    let scratch = Scratch::new();
    let mut terms = Vec::new();
    for name in ["a", "b"] {
        let theta = Matrix::random(SHAPE.0, SHAPE.1, &mut random).stored();
        scratch.model(name, &[Tensor::f32("w", &[SHAPE.0, SHAPE.1], &theta.data)]);
        let input = Matrix::random(4, SHAPE.1, &mut random).stored();
        let output = Matrix::random(3, SHAPE.0, &mut random).stored();
        Statistics::new()
            .factor("w/input_factor", SHAPE.1, &input.data)
            .factor("w/output_factor", SHAPE.0, &output.data)
            .write(&scratch, &format!("{name}.safetensors"));
        let gram = |f: &Matrix| f.transpose().times(f);
        terms.push(Term { weight: 1.0, theta, input: gram(&input), output: gram(&output) });
    }
    let mean = terms[0].theta.plus(1.0, &terms[1].theta).scaled(0.5);
    for ridge in [1e-2, 0.1, 1.0] {
        let text = format!(
            "merge_method: mats\nsolver: {{ ridge: {ridge} }}\n{}",
            models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))])
        );
        let merged = scratch.merge(&text, &format!("ridge{ridge}"), &["--require-convergence"]);
        assert_near(
            &merged.values("w"),
            &kfac_solution(&terms, &mean, ridge),
            DIRECT,
            &format!("ridge {ridge}"),
        );
    }
    // 54 unknowns, of which the sum weighs 24: the least displacement is the limit of small ridges, whose distance from it is
    // the ridge times the condition of what is weighed.
    let text = format!(
        "merge_method: mats\nsubspace: kfac\nsolver: {{ method: direct }}\n{}",
        models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))])
    );
    let merged = scratch.merge(&text, "exact", &[]);
    assert_near(&merged.values("w"), &kfac_solution(&terms, &mean, 1e-9), 1e-5, "no ridge");
}

/// BERT's published checkpoints call the normalisations' parameters as TensorFlow did, fine-tuned ones as today's model does.
#[test]
fn former_names_of_normalisations_are_the_same_tensors() {
    let mut random = Random::new(31);
    let scratch = Scratch::new();
    let (weight, bias) = ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias");
    let (gamma, beta) = ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta");
    let mut model = |directory: &str, names: [&str; 2]| {
        let tensors = [
            Tensor::random("bert.dense.weight", "F32", &[3, 4], &mut random),
            Tensor::random(names[0], "F32", &[4], &mut random),
            Tensor::random(names[1], "F32", &[4], &mut random),
        ];
        scratch.model(directory, &tensors);
        tensors
    };
    let base = model("base", [gamma, beta]);
    let models = [model("m0", [weight, bias]), model("m1", [weight, bias])];
    let fisher: Vec<Vec<f64>> =
        (0..2).map(|k| vec![1.0 + f64::from(k), 2.0, 0.5, 4.0 - f64::from(k)]).collect();
    for (k, fisher) in fisher.iter().enumerate() {
        Statistics::new().diagonal(weight, &[4], fisher).write(&scratch, &format!("m{k}.safetensors"));
    }
    let list = "models: [{ model: m0 }, { model: m1 }]\n";
    let merged = scratch.merge(
        &format!("merge_method: task_arithmetic\nbase_model: base\nparameters: {{ weight: 0.5 }}\n{list}"),
        "arithmetic",
        &[],
    );
    // The output's names are the base's.
    for (place, name) in [(1, gamma), (2, beta)] {
        let (m0, m1) = (models[0][place].values(), models[1][place].values());
        let expected: Vec<f64> = base[place]
            .values()
            .iter()
            .zip(m0.iter().zip(&m1))
            .map(|(b, (x, y))| b + 0.5 * (x - b) + 0.5 * (y - b))
            .collect();
        assert_near(&merged.values(name), &expected, 8.0 * HALF_ULP, name);
    }
    assert_eq!(merged.tensors.len(), 3);
    let averaged = scratch.merge(
        "merge_method: linear\nparameters: { weight: 1 }\nmodels: [{ model: m0 }, { model: base }]\n",
        "linear",
        &[],
    );
    let expected: Vec<f64> =
        models[0][1].values().iter().zip(base[1].values()).map(|(x, b)| (x + b) / 2.0).collect();
    assert_near(&averaged.values(weight), &expected, 2.0 * HALF_ULP, weight);
    // Statistics go by the name that the loaded model has.
    let with =
        "models: [{ model: m0, statistics: m0.safetensors }, { model: m1, statistics: m1.safetensors }]\n";
    let merged = scratch.merge(&format!("merge_method: fisher\nbase_model: base\n{with}"), "fisher", &[]);
    let expected: Vec<f64> = (0..4)
        .map(|i| {
            let terms = (0..2).map(|k| (fisher[k][i], models[k][1].values()[i]));
            let (sum, of) = terms.fold((0.0, 0.0), |(sum, of), (f, x)| (sum + f * x, of + f));
            sum / of
        })
        .collect();
    assert_near(&merged.values(gamma), &expected, 2.0 * HALF_ULP, gamma);
    assert_eq!(merged.parameter(gamma)["subspace"], "fisher_diagonal");
}
