//! Statistics files that lie, and statistics that are legal but hard.

use super::{LINEAR, good_weight};
use crate::algebra::{Matrix, assert_near, gram};
use crate::util::{Merged, Random, Scratch, Statistics, Tensor, models, safetensors};

const OUT: usize = 3;
const IN: usize = 4;

/// Models `a` and `b` of one weight `w` [3, 4], and `base`; statistics `a.safetensors`, `b.safetensors` as given.
fn pair(a: Statistics, b: Statistics) -> Scratch {
    let scratch = Scratch::new();
    scratch.model("a", &[good_weight(1)]);
    scratch.model("b", &[good_weight(2)]);
    scratch.model("base", &[good_weight(3)]);
    a.write(&scratch, "a.safetensors");
    b.write(&scratch, "b.safetensors");
    scratch
}

fn config(head: &str) -> String {
    format!("{head}\n{}", models(&[("a", Some("a.safetensors")), ("b", Some("b.safetensors"))]))
}

fn fisher(values: &[f64]) -> Statistics {
    Statistics::new().diagonal("w", &[OUT, IN], values)
}

/// Both Grams of `w`, well conditioned.
fn kfac(random: &mut Random) -> Statistics {
    kfac_with(&gram(IN, 16, random), &gram(OUT, 12, random))
}

fn kfac_with(a: &Matrix, g: &Matrix) -> Statistics {
    Statistics::new().full("w/input_gram", a.rows, &a.data).full("w/output_gram", g.rows, &g.data)
}

const KFAC_CG: &str = "merge_method: mats\nsubspace: kfac\nsolver: { method: cg }";
const KFAC_DIRECT: &str = "merge_method: mats\nsubspace: kfac\nsolver: { method: direct }";
const FISHER: &str = "merge_method: fisher";
const FISHER_CG: &str = "merge_method: mats\nsubspace: fisher_diagonal\nsolver: { method: cg }";

#[test]
fn b22_fisher_that_is_no_mean_of_squares() {
    for bad in [f64::NAN, f64::INFINITY, -1.0, -1e-30] {
        let mut values = [1.0; OUT * IN];
        values[6] = bad;
        let scratch = pair(fisher(&[1.0; OUT * IN]), fisher(&values));
        for head in [FISHER, FISHER_CG] {
            scratch.refuse(&config(head), &["b.safetensors", "w/fisher_diagonal"]);
        }
    }
}

#[test]
fn b22_zero_fisher_leaves_the_initial_guess() {
    let zero = || fisher(&[0.0; OUT * IN]);
    let scratch = pair(zero(), zero());
    let base = good_weight(3).values();
    let merged = scratch.merge(&format!("{}base_model: base\ninitial: base\n", config(FISHER_CG)), "cg", &[]);
    assert_eq!(merged.values("w"), base);
    let direct = FISHER_CG.replace("method: cg", "method: direct");
    let merged =
        scratch.merge(&format!("{}base_model: base\ninitial: base\n", config(&direct)), "direct", &[]);
    assert_eq!(merged.values("w"), base);
    // The closed form's floor of 1e-8 gives every model the same say: the mean, exact for 20-bit values.
    let merged = scratch.merge(&format!("{}base_model: base\ninitial: base\n", config(FISHER)), "floor", &[]);
    assert_near(&merged.values("w"), &mean(), 2f64.powi(-23), "the mean");
}

fn mean() -> Vec<f64> {
    good_weight(1).values().iter().zip(good_weight(2).values()).map(|(a, b)| (a + b) / 2.0).collect()
}

#[test]
fn b22_zero_grams_leave_the_initial_guess() {
    let zero = || kfac_with(&Matrix::zeros(IN, IN), &Matrix::zeros(OUT, OUT));
    let scratch = pair(zero(), zero());
    for (out, head) in [
        ("cg", KFAC_CG),
        ("direct", KFAC_DIRECT),
        ("auto", "merge_method: mats\nsubspace: kfac"),
        ("gram", "merge_method: regmean"),
        ("gram_cg", "merge_method: regmean\nsolver: { method: cg }"),
    ] {
        let merged = scratch.merge(&format!("{}base_model: base\ninitial: base\n", config(head)), out, &[]);
        assert_eq!(merged.values("w"), good_weight(3).values(), "{out}");
        assert_eq!(merged.parameter("w")["stop_reason"], "zero_operator", "{out}");
    }
}

#[test]
fn b22_huge_and_denormal_fisher_stays_finite() {
    let huge = [1e38; OUT * IN];
    let tiny = [1e-42; OUT * IN];
    let mixed: Vec<f64> = (0..OUT * IN).map(|k| if k % 2 == 0 { 1e38 } else { 1e-42 }).collect();
    for (name, a, b) in [
        ("huge", &huge[..], &huge[..]),
        ("tiny", &tiny, &tiny),
        ("apart", &huge, &tiny),
        ("mixed", &mixed, &huge),
    ] {
        let scratch = pair(fisher(a), fisher(b));
        for (solver, head) in [("closed", FISHER), ("cg", FISHER_CG)] {
            let merged = scratch.merge(&config(head), solver, &[]);
            let values = merged.values("w");
            assert!(values.iter().all(|v| v.is_finite()), "{name} {solver}: {values:?}");
            // A mean with weights ≥ 0 stays between the two models, up to rounding.
            if solver == "closed" {
                for ((v, x), y) in values.iter().zip(good_weight(1).values()).zip(good_weight(2).values()) {
                    assert!(*v >= x.min(y) - 1e-7 && *v <= x.max(y) + 1e-7, "{name}: {v} outside {x}..{y}");
                }
            }
        }
    }
}

/// Products of two such Grams, 1e-40, leave f32; gradients of a confident model are that small.
#[test]
fn b22_tiny_grams_are_solved() {
    grams_of_any_size_are_solved(1e-20);
}

/// Products of two such Grams, 1e40, leave f32.
#[test]
fn b22_huge_grams_are_solved() {
    grams_of_any_size_are_solved(1e20);
}

fn grams_of_any_size_are_solved(scale: f64) {
    let mut random = Random::new(22);
    let mut scaled = |side: usize| -> Vec<f64> {
        gram(side, 4 * side, &mut random).data.iter().map(|v| v * scale).collect()
    };
    let mut statistics =
        || Statistics::new().full("w/input_gram", IN, &scaled(IN)).full("w/output_gram", OUT, &scaled(OUT));
    let scratch = pair(statistics(), statistics());
    for (out, head) in [
        ("regmean", "merge_method: regmean"),
        ("gram_cg", "merge_method: regmean\nsolver: { method: cg }"),
        ("kfac_direct", KFAC_DIRECT),
        ("kfac_cg", KFAC_CG),
    ] {
        let merged = scratch.merge(&config(head), out, &[]);
        assert!(merged.values("w").iter().all(|v| v.is_finite()), "{out}");
        assert_eq!(merged.parameter("w")["converged"], true, "{out}: {}", merged.parameter("w"));
    }
}

#[test]
fn b23_gram_that_is_not_symmetric() {
    let mut random = Random::new(23);
    for (key, skew) in [("w/input_gram", 0), ("w/output_gram", 1)] {
        let (mut a, mut g) = (gram(IN, 16, &mut random), gram(OUT, 12, &mut random));
        if skew == 0 {
            a.data[1] += 0.05;
        } else {
            g.data[1] += 0.05;
        }
        let scratch = pair(kfac(&mut random), kfac_with(&a, &g));
        for head in [KFAC_CG, KFAC_DIRECT] {
            scratch.refuse(&config(head), &["b.safetensors", key, "symmetric"]);
        }
    }
}

#[test]
fn b23_gram_with_values_that_no_gram_has() {
    let mut random = Random::new(24);
    for (at, value) in [(6, f64::NAN), (6, f64::INFINITY), (0, -0.5)] {
        for form in ["full", "packed"] {
            let mut a = gram(IN, 16, &mut random);
            a.data[at] = value;
            a.data[(at % IN) * IN + at / IN] = value;
            let g = gram(OUT, 12, &mut random);
            let statistics = Statistics::new().full("w/output_gram", OUT, &g.data);
            let statistics = if form == "full" {
                statistics.full("w/input_gram", IN, &a.data)
            } else {
                statistics.packed("w/input_gram", IN, &a.data)
            };
            let scratch = pair(kfac(&mut random), statistics);
            for head in [KFAC_CG, KFAC_DIRECT, "merge_method: regmean"] {
                scratch.refuse(&config(head), &["b.safetensors", "w/input_gram"]);
            }
        }
    }
    let mut factor = random.values(2 * IN);
    factor[5] = f64::NAN;
    let scratch = pair(kfac(&mut random), Statistics::new().factor("w/input_factor", IN, &factor));
    scratch.refuse(&config("merge_method: regmean"), &["b.safetensors", "w/input_factor"]);
}

#[test]
fn b23_gram_of_the_wrong_side() {
    let mut random = Random::new(25);
    let (a, g) = (gram(IN, 16, &mut random), gram(OUT, 12, &mut random));
    let five = gram(5, 20, &mut random);
    for (statistics, key) in [
        (kfac_with(&five, &g), "w/input_gram"),
        (kfac_with(&a, &five), "w/output_gram"),
        // Swapped: out ≠ in tells.
        (kfac_with(&g, &a), "w/input_gram"),
        (
            Statistics::new().packed("w/input_gram", 5, &five.data).full("w/output_gram", OUT, &g.data),
            "w/input_gram",
        ),
        (
            Statistics::new().factor("w/input_factor", 5, &[0.5; 10]).full("w/output_gram", OUT, &g.data),
            "w/input_factor",
        ),
    ] {
        let scratch = pair(kfac(&mut random), statistics);
        scratch.refuse_unread(&config(KFAC_CG), &["b.safetensors", key, "`w`"]);
    }
    let scratch = pair(fisher(&[1.0; 12]), Statistics::new().diagonal("w", &[IN, OUT], &[1.0; 12]));
    scratch.refuse_unread(&config(FISHER), &["b.safetensors", "w/fisher_diagonal", "`w`"]);
}

#[test]
fn b23_malformed_statistics_files() {
    let mut random = Random::new(26);
    let a = gram(IN, 16, &mut random);
    let tensor = |key: &str, shape: &[usize], values: &[f64]| Tensor::f32(key, shape, values);
    let regmean = config("merge_method: regmean");
    let full = tensor("w/input_gram", &[IN, IN], &a.data);
    let format = [("format", "mats-stream-statistics/1")];
    let refuse = |tensors: &[Tensor], metadata: &[(&str, &str)], words: &[&str]| {
        let scratch = pair(Statistics::new().raw(full.clone()), Statistics::new());
        scratch.write("b.safetensors", safetensors(tensors, metadata));
        scratch.refuse_unread(&regmean, &[&["b.safetensors"], words].concat());
    };
    // No format, another one.
    refuse(std::slice::from_ref(&full), &[], &["mats-stream-statistics/1"]);
    refuse(
        std::slice::from_ref(&full),
        &[("format", "mats-stream-statistics/2")],
        &["mats-stream-statistics/2"],
    );
    // Keys that are none, with the nearest kind named.
    refuse(&[tensor("w", &[IN, IN], &a.data)], &format, &["`w`"]);
    refuse(&[tensor("w/input_grams", &[IN, IN], &a.data)], &format, &["input_grams", "input_gram"]);
    // Shapes that fit no form.
    refuse(&[tensor("w/input_gram", &[2, 8], &a.data)], &format, &["w/input_gram"]);
    refuse(&[tensor("w/input_gram", &[IN * IN], &a.data)], &format, &["w/input_gram"]);
    refuse(&[tensor("w/input_factor", &[8, 2], &a.data)], &format, &["w/input_factor"]);
    refuse(&[Tensor::new("w/input_gram", "I64", &[1, 1], &[1.0])], &format, &["w/input_gram", "I64"]);
    // Aliases that dangle, loop, shadow, change the kind.
    for (key, target) in [
        ("v/input_gram", "x/input_gram"),
        ("v/input_gram", "v/input_gram"),
        ("w/input_gram", "w/input_gram"),
        ("v/output_gram", "w/input_gram"),
    ] {
        let alias = format!("alias:{key}");
        refuse(std::slice::from_ref(&full), &[format[0], (&alias, target)], &[key]);
    }
    let two = [format[0], ("alias:v/input_gram", "x/input_gram"), ("alias:x/input_gram", "v/input_gram")];
    refuse(std::slice::from_ref(&full), &two, &["input_gram"]);
    // One key in two files.
    let scratch = pair(Statistics::new().raw(full.clone()), Statistics::new().raw(full.clone()));
    let both = "merge_method: regmean\nmodels:\n  - model: a\n    statistics: [a.safetensors, b.safetensors]\n  - model: b\n    statistics: a.safetensors\n";
    scratch.refuse_unread(both, &["b.safetensors", "w/input_gram"]);
    // No file at all.
    scratch.refuse_unread(&regmean.replace("b.safetensors", "c.safetensors"), &["c.safetensors"]);
}

/// `merged - start`, entry by entry.
fn moved(merged: &Merged, start: &Tensor) -> Matrix {
    let data = merged.values("w").iter().zip(start.values()).map(|(v, s)| v - s).collect();
    Matrix::new(OUT, IN, data)
}

#[test]
fn b23_rank_deficient_factors_work() {
    let mut random = Random::new(27);
    // All inputs of both models lie in the plane of two rows; what is orthogonal to it stays at the initial guess. Small
    // integers: the stored f32 Grams have exactly this rank.
    let plane = integers(2, IN, &mut random);
    let mut low_rank = || {
        let x = integers(10, 2, &mut random).times(&plane);
        x.transpose().times(&x).scaled(0.125)
    };
    let (a1, a2) = (low_rank(), low_rank());
    let (g1, g2) = (gram(OUT, 12, &mut random), gram(OUT, 12, &mut random));
    let scratch = pair(kfac_with(&a1, &g1), kfac_with(&a2, &g2));
    for (out, head) in [
        ("regmean", "merge_method: regmean"),
        ("gram_cg", "merge_method: regmean\nsolver: { method: cg }"),
        ("kfac_cg", KFAC_CG),
        ("kfac_direct", KFAC_DIRECT),
    ] {
        let merged = scratch.merge(&format!("{}base_model: base\ninitial: base\n", config(head)), out, &[]);
        let d = moved(&merged, &good_weight(3));
        assert!(d.norm() > 0.1, "{out}: nothing moved");
        // Rounding of f32 vectors (2⁻²⁴ of each, in each of at most 100 steps, times a condition of some tens) and of
        // the output; a displacement that a solver let through would be of order 1.
        let leak = d.times(&outside(&plane)).norm() / d.norm();
        assert!(leak < 1e-4, "{out}: {leak:e} of the displacement lies in the null space");
        assert_eq!(merged.parameter("w")["converged"], true, "{out}: {}", merged.parameter("w"));
    }
}

/// Entries from -3 to 3.
fn integers(rows: usize, columns: usize, random: &mut Random) -> Matrix {
    Matrix::new(rows, columns, random.values(rows * columns).iter().map(|v| (v * 3.5).trunc()).collect())
}

/// Projection onto what is orthogonal to the rows of `plane`: I - Pᵀ(PPᵀ)⁻¹P.
fn outside(plane: &Matrix) -> Matrix {
    let inside = plane.transpose().times(&plane.times(&plane.transpose()).solve(plane));
    Matrix::identity(plane.columns).plus(-1.0, &inside)
}

/// The same with Grams that rounding to their dtype has given tiny eigenvalues of either sign, as real statistics of fewer
/// tokens than inputs have: dividing rounding noise by rounding noise must not decide the result.
#[test]
fn b23_rank_deficient_factors_work_when_rounded() {
    const SIDE: usize = 32;
    const RANK: usize = 8;
    let mut noise = Vec::new();
    for (dtype, seed) in [("F64", 0), ("F64", 1), ("F32", 0), ("F32", 1), ("F32", 2), ("F32", 3)] {
        let mut random = Random::new(270 + seed);
        let plane = Matrix::random(RANK, SIDE, &mut random);
        let scratch = Scratch::new();
        let weight = |random: &mut Random| Tensor::random("w", "F32", &[OUT, SIDE], random);
        let base = weight(&mut random);
        scratch.model("base", std::slice::from_ref(&base));
        let mut farthest = 0.0f64;
        for name in ["a", "b"] {
            let own = weight(&mut random);
            let distance: f64 = own.values().iter().zip(base.values()).map(|(x, y)| (x - y).powi(2)).sum();
            farthest = farthest.max(distance.sqrt());
            scratch.model(name, &[own]);
            let x = Matrix::random(64, RANK, &mut random).times(&plane);
            let a = x.transpose().times(&x).scaled(1.0 / 64.0);
            Statistics::new()
                .raw(Tensor::new("w/input_gram", dtype, &[SIDE, SIDE], &a.data))
                .full("w/output_gram", OUT, &gram(OUT, 12, &mut random).data)
                .write(&scratch, &format!("{name}.safetensors"));
        }
        for (out, head) in [
            ("regmean", "merge_method: regmean"),
            ("gram_cg", "merge_method: regmean\nsolver: { method: cg }"),
            ("kfac_cg", KFAC_CG),
            ("kfac_direct", KFAC_DIRECT),
        ] {
            let merged =
                scratch.merge(&format!("{}base_model: base\ninitial: base\n", config(head)), out, &[]);
            let data = merged.values("w").iter().zip(base.values()).map(|(v, s)| v - s).collect();
            let leak = Matrix::new(OUT, SIDE, data).times(&outside(&plane)).norm();
            // The models themselves are this far from the base, in all directions: a result that leaves the base by
            // more in directions that no model has data for is noise.
            if leak > farthest {
                noise.push(format!(
                    "{out}, {dtype}, seed {seed}: {leak:.1}, the models are {farthest:.1} away"
                ));
            }
        }
    }
    assert!(noise.is_empty(), "moved in the null space: {noise:#?}");
}

#[test]
fn b23_indefinite_factor_is_reported() {
    // Eigenvalues 3 and -1 in the first plane, a diagonal of ones: nothing but the solve can tell. CG's curvatures have
    // the signs of the eigenvalues, so that one of its first three steps meets the negative one.
    let mut indefinite = Matrix::identity(IN);
    indefinite.data[1] = 2.0;
    indefinite.data[IN] = 2.0;
    let g = Matrix::identity(OUT);
    let text = format!("{}initial: zero\n", config(KFAC_CG));
    let scratch = pair(kfac_with(&indefinite, &g), kfac_with(&indefinite, &g));
    let merged = scratch.merge(&text, "kept", &[]);
    assert!(merged.values("w").iter().all(|v| v.is_finite()));
    let record = merged.parameter("w");
    assert_eq!(record["stop_reason"], "not_positive_definite", "{record}");
    assert_eq!(record["converged"], false, "{record}");
    assert!(
        merged.report["warnings"]
            .to_string()
            .contains("tensor `w`: the solver stopped (not_positive_definite)")
    );
    let output = scratch.try_merge(&text, "demanded", &["--require-convergence"]);
    assert_eq!(output.code, 3, "{}", output.stderr);
    assert_eq!(scratch.merged("demanded").tensors, merged.tensors, "done and kept");
    // Beside a definite model that outweighs it there is no such thing to report.
    let scratch = pair(kfac_with(&indefinite, &g), kfac_with(&Matrix::identity(IN).scaled(2.0), &g));
    let merged = scratch.merge(&text, "outweighed", &["--require-convergence"]);
    assert_eq!(merged.parameter("w")["converged"], true);
}

/// With a ridge, a factor with a negative eigenvalue gets what that lacks of zero on its diagonal.
#[test]
fn b23_rounded_factors_are_lifted_where_there_is_a_ridge() {
    const RIDGE: f64 = 0.125;
    let mut random = Random::new(23);
    // Eigenvalues 3, -1, 1, 1: it lacks exactly 1. The other model's factors are positive definite, and too small to help.
    let mut indefinite = Matrix::identity(IN);
    indefinite.data[1] = 2.0;
    indefinite.data[IN] = 2.0;
    let small = gram(IN, 16, &mut random).scaled(0.125);
    let (g_a, g_b) = (gram(OUT, 12, &mut random), gram(OUT, 12, &mut random));
    let scratch = pair(kfac_with(&indefinite, &g_a), kfac_with(&small, &g_b));
    let weight = |seed| Matrix::new(OUT, IN, good_weight(seed).values());
    let column = |m: &Matrix| Matrix::new(OUT * IN, 1, m.data.clone());
    let start = column(&weight(3));
    let (stored, lifted) =
        (g_a.kronecker(&indefinite), g_a.kronecker(&indefinite.plus(1.0, &Matrix::identity(IN))));
    let b = g_b.kronecker(&small);
    let shift = RIDGE * stored.plus(1.0, &b).trace() / (OUT * IN) as f64;
    let rhs = lifted
        .times(&column(&weight(1)).plus(-1.0, &start))
        .plus(1.0, &b.times(&column(&weight(2)).plus(-1.0, &start)));
    let system = lifted.plus(1.0, &b).plus(shift, &Matrix::identity(OUT * IN));
    let expected = start.plus(1.0, &system.solve(&rhs)).data;
    let solvers = [
        "method: direct",
        "method: pcg, preconditioner: kronecker",
        "method: pcg, preconditioner: hybrid",
        "method: pcg, preconditioner: jacobi",
    ];
    for (k, solver) in solvers.iter().enumerate() {
        let text = format!(
            "{}base_model: base\ninitial: base\nsolver: {{ {solver}, ridge: {RIDGE}, max_iterations: 200, stop: {{ relative_residual: 1.0e-6 }} }}\n",
            config("merge_method: mats\nsubspace: kfac")
        );
        let text = if k == 0 {
            text.replace(", max_iterations: 200, stop: { relative_residual: 1.0e-6 }", "")
        } else {
            text
        };
        let merged = scratch.merge(&text, &format!("lifted{k}"), &["--require-convergence"]);
        // A residual of 1e-6 of ‖b‖ by a condition below 30, and the f32 of the Lanczos steps.
        assert_near(&merged.values("w"), &expected, 1e-4, solver);
        let record = merged.parameter("w");
        assert_eq!(
            (&record["factors_lifted"], &record["converged"]),
            (&true.into(), &true.into()),
            "{record}"
        );
        assert_eq!(record["ridge"], RIDGE, "{record}");
        assert!(record.get("ridge_raised_from").is_none(), "{record}");
    }
}

/// Grams of fewer tokens than their side, rounded to bf16: without a repair CG met their noise after a few steps, and
/// kept an iterate on the way there.
#[test]
fn b23_a_merge_with_grams_in_bf16_is_near_the_one_in_f32() {
    const SIDE: usize = 96;
    let mut random = Random::new(2);
    let names = ["a", "b", "c"];
    let scratch = Scratch::new();
    scratch.model("base", &[Tensor::random("w", "F32", &[SIDE, SIDE], &mut random)]);
    for name in names {
        scratch.model(name, &[Tensor::random("w", "F32", &[SIDE, SIDE], &mut random)]);
        // Decaying directions, as of activations and gradients.
        let mut side = |rank: usize| {
            let mut x = Matrix::random(rank, SIDE, &mut random);
            for (k, row) in x.data.chunks_exact_mut(SIDE).enumerate() {
                row.iter_mut().for_each(|v| *v *= 0.8f64.powi(k as i32));
            }
            x.transpose().times(&x)
        };
        let (a, g) = (side(48), side(32));
        for dtype in ["F32", "BF16"] {
            Statistics::new()
                .raw(Tensor::new("w/input_gram", dtype, &[SIDE, SIDE], &a.data))
                .raw(Tensor::new("w/output_gram", dtype, &[SIDE, SIDE], &g.data))
                .write(&scratch, &format!("{name}-{dtype}.safetensors"));
        }
    }
    let merged = |dtype: &str, ridge: f64| {
        let files = names.map(|name| format!("{name}-{dtype}.safetensors"));
        let entries: Vec<_> = names.iter().zip(&files).map(|(n, f)| (*n, Some(f.as_str()))).collect();
        let text = format!(
            "merge_method: mats\nbase_model: base\nsolver: {{ ridge: {ridge} }}\n{}",
            models(&entries)
        );
        scratch.merge(&text, &format!("{dtype}-{ridge}"), &["--require-convergence"])
    };
    for ridge in [0.1, 0.003] {
        let (exact, rounded) = (merged("F32", ridge), merged("BF16", ridge));
        assert_eq!(rounded.parameter("w")["factors_lifted"], true, "{}", rounded.parameter("w"));
        assert!(exact.parameter("w").get("factors_lifted").is_none(), "{}", exact.parameter("w"));
        let start = scratch.merge(
            &format!("merge_method: iso_ridge\nbase_model: base\n{}", models(&names.map(|n| (n, None)))),
            &format!("start-{ridge}"),
            &[],
        );
        let from = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
        let (exact, rounded, start) = (exact.values("w"), rounded.values("w"), start.values("w"));
        let (apart, moved) = (from(&exact, &rounded), from(&exact, &start));
        // The noise moves directions that no model has data for, on the way to the models' mean and not beyond: about as far
        // as the merge itself went. Kept where it met the noise, the iterate was 250 away where the merge moved 14.
        assert!(apart < 2.0 * moved, "ridge {ridge}: {apart} apart, {moved} from the start");
    }
}

#[test]
fn b24_statistics_of_another_model() {
    let mut random = Random::new(29);
    let foreign = |random: &mut Random| {
        let (a, g) = (gram(IN, 16, random), gram(OUT, 12, random));
        Statistics::new()
            .full("model.w/input_gram", IN, &a.data)
            .full("model.w/output_gram", OUT, &g.data)
            .diagonal("model.w", &[OUT, IN], &[1.0; OUT * IN])
    };
    let scratch = pair(foreign(&mut random), foreign(&mut random));
    for (out, head) in [
        ("fisher", FISHER),
        ("regmean", "merge_method: regmean"),
        ("kfac", KFAC_CG),
        ("auto", "merge_method: mats"),
    ] {
        let merged = scratch.merge(&config(head), out, &[]);
        assert_eq!(merged.values("w"), mean(), "{out}: unmatched is averaged, exactly here");
        assert_eq!(merged.parameter("w")["method"], "average", "{out}: {}", merged.parameter("w"));
        assert!(
            merged.report.to_string().contains("has no"),
            "{out}: no reason in the report: {}",
            merged.report
        );
        assert!(merged.report["warnings"].to_string().contains("the statistics fit no parameter"), "{out}");
        let plan = scratch.plan(&config(head), &[]).to_string();
        assert!(plan.contains("has no"), "{out}: no reason in the plan: {plan}");
        scratch.refuse_unread(&format!("{}unmatched: error\n", config(head)), &["`w`", "unmatched"]);
        let base = format!("{}unmatched: base\nbase_model: base\n", config(head));
        assert_eq!(
            scratch.merge(&base, &format!("{out}_base"), &[]).values("w"),
            good_weight(3).values(),
            "{out}"
        );
    }
}

#[test]
fn b24_statistics_missing_for_one_layer_of_one_model() {
    let mut random = Random::new(30);
    let scratch = Scratch::new();
    let second = |seed| Tensor::random("v", "F32", &[OUT, IN], &mut Random::new(seed));
    scratch.model("a", &[good_weight(1), second(11)]);
    scratch.model("b", &[good_weight(2), second(12)]);
    let key = |name: &str| format!("{name}/input_gram");
    let mut grams = || gram(IN, 16, &mut random).data;
    Statistics::new()
        .full(&key("w"), IN, &grams())
        .full(&key("v"), IN, &grams())
        .write(&scratch, "a.safetensors");
    Statistics::new().full(&key("w"), IN, &grams()).write(&scratch, "b.safetensors");
    let merged = scratch.merge(&config("merge_method: regmean"), "out", &[]);
    let mean: Vec<f64> =
        second(11).values().iter().zip(second(12).values()).map(|(a, b)| (a + b) / 2.0).collect();
    assert_eq!(merged.values("v"), mean);
    assert_eq!(merged.parameter("v")["method"], "average");
    assert_eq!(merged.parameter("w")["subspace"], "gram");
    scratch.refuse_unread(&format!("{}unmatched: error\n", config("merge_method: regmean")), &["`v`", "b"]);
    // A model without any statistics file at all is an oversight where the method cannot do without.
    let without = format!("merge_method: regmean\n{}", models(&[("a", Some("a.safetensors")), ("b", None)]));
    scratch.refuse_unread(&without, &["models[1].statistics"]);
    let auto = without.replace("regmean", "mats");
    scratch.refuse_unread(&auto, &["models[1].statistics"]);
    // `auto` can do without them all.
    let none = LINEAR.replace("linear", "mats");
    assert_eq!(scratch.merge(&none, "none", &[]).tensors, scratch.merge(LINEAR, "linear", &[]).tensors);
}
