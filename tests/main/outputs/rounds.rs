//! Initial guesses, nested configs among them.

use super::{DIRECT, HALF_ULP, Term, WEIGHTS, World, conjugate_gradients, gram_solution, kfac_system};
use crate::algebra::{Matrix, assert_near};
use crate::elementwise::spectral::iso_ridge;

/// θ₀ + 0.3·Σ τᵢ.
fn task_arithmetic(world: &World, weight: usize) -> Matrix {
    let base = world.base_weight(weight);
    (0..world.models.len())
        .fold(base.clone(), |sum, k| sum.plus(0.3, &world.weight(k, weight).plus(-1.0, &base)))
}

/// The flattened task vectors from which `mats` starts where there is a base.
fn auto(world: &World, weight: usize) -> Matrix {
    let base = world.base_weight(weight);
    let tasks: Vec<Matrix> =
        (0..world.models.len()).map(|k| world.weight(k, weight).plus(-1.0, &base)).collect();
    base.plus(1.0, &iso_ridge(&tasks, 0.5))
}

/// The solution of `wudi`.
fn wudi(world: &World, weight: usize) -> Matrix {
    let base = world.base_weight(weight);
    let mut start = base.clone();
    let terms: Vec<Term> = (0..world.models.len())
        .map(|k| {
            let theta = world.weight(k, weight);
            let tau = theta.plus(-1.0, &base);
            start = start.plus(1.0, &tau);
            let input = tau.transpose().times(&tau).scaled(1.0 / tau.norm().powi(2));
            Term { weight: 1.0, input, output: Matrix::zeros(0, 0), theta }
        })
        .collect();
    gram_solution(&terms, &start, 0.3)
}

/// Two CG steps from `start`: few enough that the start shows.
fn two_steps(world: &World, weight: usize, start: &Matrix) -> Vec<f64> {
    let (k, b) = kfac_system(&world.terms(weight, &vec![1.0; world.models.len()]));
    conjugate_gradients(&k, &b, &start.data, 2)
}

const TWO_STEPS: &str = "merge_method: mats\nsubspace: kfac\nbase_model: base\nsolver: { method: cg, max_iterations: 2, tolerance: 0 }\n";

/// As for the paper's steps in `methods`: sums of at most 49 terms in f32, two steps, condition below 1e3.
const CG: f64 = 1e-4;

#[test]
fn rounds_chain() {
    let world = World::new(3, 41);
    let nested = "initial:\n  merge_method: regmean\n  initial:\n    merge_method: task_arithmetic\n    parameters: { weight: 0.3 }\n";
    let merged = world.merge(&format!("{TWO_STEPS}{nested}"), "out");
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        let middle = gram_solution(&world.terms(w, &[1.0; 3]), &task_arithmetic(&world, w), 0.0);
        assert_near(&merged.values(name), &two_steps(&world, w, &middle), CG, name);
        let rounds =
            merged.parameter(name)["rounds"].as_array().expect("earlier rounds are reported").clone();
        assert!(rounds.iter().any(|r| r["subspace"] == "gram"), "{rounds:?}");
    }
}

#[test]
fn outer_weights_stand_back_where_the_nested_round_sets_its_own() {
    let world = World::new(2, 42);
    let config = |nested: &str| {
        format!(
            "{TWO_STEPS}initial: {{ merge_method: linear{nested} }}\nmodels:\n  - model: m0\n    statistics: m0.safetensors\n  - model: m1\n    statistics: m1.safetensors\n    parameters: {{ weight: 3.0 }}\n"
        )
    };
    for (out, nested, weights) in
        [("inherited", "", [0.25, 0.75]), ("own", ", parameters: { weight: 1.0 }", [0.5, 0.5])]
    {
        let merged = world.scratch.merge(&config(nested), out, &[]);
        for (w, (name, rows, columns)) in WEIGHTS.into_iter().enumerate() {
            let start =
                (0..2).fold(Matrix::zeros(rows, columns), |sum, k| sum.plus(weights[k], &world.weight(k, w)));
            let (k, b) = kfac_system(&world.terms(w, &[1.0, 3.0]));
            let expected = conjugate_gradients(&k, &b, &start.data, 2);
            assert_near(&merged.values(name), &expected, CG, &format!("{out} {name}"));
        }
    }
}

#[test]
fn initial_guesses_by_name() {
    let world = World::new(3, 43);
    world.scratch.model("elsewhere", &world.models[2]);
    for (out, initial) in [
        ("zero", "zero"),
        ("average", "average"),
        ("base_start", "base"),
        ("checkpoint", "elsewhere"),
        ("auto", "auto"),
        ("iso_ridge", "{ merge_method: iso_ridge }"),
        ("wudi", "{ merge_method: wudi }"),
    ] {
        let merged = world.merge(&format!("{TWO_STEPS}initial: {initial}"), out);
        for (w, (name, rows, columns)) in WEIGHTS.into_iter().enumerate() {
            let start = match out {
                "zero" => Matrix::zeros(rows, columns),
                "average" => world.mean_weight(w),
                "base_start" => world.base_weight(w),
                "checkpoint" => world.weight(2, w),
                "auto" | "iso_ridge" => auto(&world, w),
                _ => wudi(&world, w),
            };
            assert_near(&merged.values(name), &two_steps(&world, w, &start), CG, &format!("{out} {name}"));
            let told = match out {
                "zero" => "zero",
                "average" => "mean",
                "auto" | "iso_ridge" => "iso_ridge",
                "wudi" => "task vectors",
                _ => "checkpoint",
            };
            assert_eq!(merged.parameter(name)["start"], told, "{out} {name}");
        }
    }
}

#[test]
fn auto_without_a_base_starts_at_the_average() {
    let world = World::new(3, 44);
    let merged = world.merge(&TWO_STEPS.replace("base_model: base\n", ""), "out");
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        assert_near(&merged.values(name), &two_steps(&world, w, &world.mean_weight(w)), CG, name);
    }
}

#[test]
fn average_ignores_weights() {
    let world = World::new(2, 45);
    // Nothing is solved: the start is the result, rounded once.
    let head = "merge_method: mats\nsubspace: kfac\ninitial: average\nparameters: { weight: 0.125 }\nsolver: { method: cg, max_iterations: 1, tolerance: 1.0e+6 }";
    let merged = world.merge(head, "out");
    for (w, (name, _, _)) in WEIGHTS.iter().enumerate() {
        assert_near(&merged.values(name), &world.mean_weight(w).data, HALF_ULP, name);
        assert_eq!(merged.parameter(name)["iterations"], 0, "the tolerance is tested before the first step");
    }
}

#[test]
fn a_merge_is_a_checkpoint_to_start_from() {
    let world = World::new(2, 46);
    let first = world.merge("merge_method: regmean", "first");
    // Already solved: the direct solve from its own solution moves by rounding alone.
    let second = world.merge("merge_method: regmean\ninitial: first", "second");
    for (name, _, _) in WEIGHTS {
        // The first output was rounded to f32, and so is the second.
        assert_near(&second.values(name), &first.values(name), 2.0 * DIRECT, name);
    }
}
