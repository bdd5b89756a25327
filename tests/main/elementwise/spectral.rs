//! Methods on singular vectors, against a one-sided Jacobi SVD: high, wide, square and tiny weights.

use super::World;
use super::oracle::{deltas, norm};
use crate::algebra::{Matrix, assert_near};
use crate::util::{Merged, Random, Scratch, Tensor};

const SHAPES: [(&str, &[usize]); 8] = [
    ("high.weight", &[17, 9]),
    // More rows than all three tasks have columns.
    ("higher.weight", &[31, 7]),
    ("model.embed_tokens.weight", &[9, 4]),
    ("wide.weight", &[8, 21]),
    ("square.weight", &[12, 12]),
    ("tiny.weight", &[1, 1]),
    ("bias", &[13]),
    ("conv.weight", &[4, 3, 2]),
];

struct Svd {
    /// Rows are left vectors.
    left: Matrix,
    values: Vec<f64>,
    /// Rows are right vectors.
    right: Matrix,
}

/// One-sided Jacobi on the smaller side.
fn svd(a: &Matrix) -> Svd {
    if a.rows > a.columns {
        let Svd { left, values, right } = svd(&a.transpose());
        return Svd { left: right, values, right: left };
    }
    // Rows are rotated until they are orthogonal.
    let (m, n) = (a.rows, a.columns);
    let mut rows: Vec<Vec<f64>> = (0..m).map(|i| a.data[i * n..(i + 1) * n].to_vec()).collect();
    let mut turned: Vec<Vec<f64>> =
        (0..m).map(|i| Matrix::identity(m).data[i * m..(i + 1) * m].to_vec()).collect();
    for _ in 0..60 {
        for i in 0..m {
            for j in i + 1..m {
                let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
                let (p, q, r) = (dot(&rows[i], &rows[i]), dot(&rows[j], &rows[j]), dot(&rows[i], &rows[j]));
                if r.abs() <= 1e-15 * (p * q).sqrt() {
                    continue;
                }
                let zeta = (q - p) / (2.0 * r);
                let t = if zeta >= 0.0 { 1.0 } else { -1.0 } / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                for set in [&mut rows, &mut turned] {
                    for k in 0..set[i].len() {
                        let (x, y) = (set[i][k], set[j][k]);
                        set[i][k] = c * (x - t * y);
                        set[j][k] = c * (t * x + y);
                    }
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..m).collect();
    order.sort_by(|i, j| norm(&rows[*j]).total_cmp(&norm(&rows[*i])));
    let values: Vec<f64> = order.iter().map(|i| norm(&rows[*i])).collect();
    let right = order.iter().zip(&values).flat_map(|(i, s)| rows[*i].iter().map(move |v| v / s)).collect();
    let left = order.iter().flat_map(|i| turned[*i].clone()).collect();
    Svd { left: Matrix::new(m, m, left), values, right: Matrix::new(m, n, right) }
}

fn top(m: &Matrix, count: usize) -> Matrix {
    Matrix::new(count, m.columns, m.data[..count * m.columns].to_vec())
}

fn stack(parts: &[Matrix]) -> Matrix {
    let rows = parts.iter().map(|p| p.rows).sum();
    Matrix::new(rows, parts[0].columns, parts.iter().flat_map(|p| p.data.clone()).collect())
}

/// The nearest matrix with orthonormal rows or columns.
fn polar(a: &Matrix) -> Matrix {
    let Svd { left, right, .. } = svd(a);
    left.transpose().times(&right)
}

fn diagonal(values: &[f64]) -> Matrix {
    let mut m = Matrix::zeros(values.len(), values.len());
    for (i, v) in values.iter().enumerate() {
        m.data[i * values.len() + i] = *v;
    }
    m
}

fn sum(tasks: &[Matrix]) -> Matrix {
    tasks[1..].iter().fold(tasks[0].clone(), |sum, t| sum.plus(1.0, t))
}

fn iso_c(tasks: &[Matrix]) -> Matrix {
    let sum = sum(tasks);
    let values = svd(&sum).values;
    polar(&sum).scaled(values.iter().sum::<f64>() / values.len() as f64)
}

/// `iso_ridge` from its definition: singular values of the sum flattened, and a norm.
pub fn iso_ridge(tasks: &[Matrix], ridge: f64) -> Matrix {
    let count = tasks.len() as f64;
    let (sum, norm) = (sum(tasks), tasks.iter().map(Matrix::norm).sum::<f64>() / count);
    let Svd { left, values, right } = svd(&sum);
    let (l1, squares) = (values.iter().sum::<f64>(), values.iter().map(|v| v * v).sum::<f64>());
    let mean = squares / l1;
    let flat: Vec<f64> = values.iter().map(|v| v / (v * v + (ridge * mean).powi(2)).sqrt()).collect();
    let directions = (count * norm / squares.sqrt()).powi(2).min(count);
    let share = l1 * l1 / (values.len() as f64 * squares);
    let target = (norm * (share * directions).max(1.0).sqrt()).min(squares.sqrt());
    let length = flat.iter().map(|v| v * v).sum::<f64>().sqrt();
    left.transpose().times(&diagonal(&flat)).times(&right).scaled(target / length)
}

fn iso_cts(tasks: &[Matrix], share: f64) -> Matrix {
    let (m, n) = (tasks[0].rows, tasks[0].columns);
    let side = m.min(n);
    let each = (side - (share * side as f64) as usize) / tasks.len();
    let common = side - each * tasks.len();
    let whole = svd(&sum(tasks));
    let u = top(&whole.left, common);
    let mut values = whole.values[..common].to_vec();
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for task in tasks {
        let own = svd(&task.plus(-1.0, &u.transpose().times(&u.times(task))));
        left.push(top(&own.left, each));
        right.push(top(&own.right, each));
        values.extend(&own.values[..each]);
    }
    left.push(u);
    right.push(top(&whole.right, common));
    let mean = values.iter().sum::<f64>() / side as f64;
    polar(&stack(&left)).transpose().times(&polar(&stack(&right))).scaled(mean)
}

fn tsv_m(tasks: &[Matrix]) -> Matrix {
    let (m, n) = (tasks[0].rows, tasks[0].columns);
    let each = m.min(n) / tasks.len();
    if each == 0 {
        return Matrix::zeros(m, n);
    }
    let parts: Vec<Svd> = tasks.iter().map(svd).collect();
    let left = polar(&stack(&parts.iter().map(|p| top(&p.left, each)).collect::<Vec<_>>()));
    let right = polar(&stack(&parts.iter().map(|p| top(&p.right, each)).collect::<Vec<_>>()));
    let values: Vec<f64> = parts.iter().flat_map(|p| p.values[..each].to_vec()).collect();
    left.transpose().times(&diagonal(&values)).times(&right)
}

fn world(dtype: &'static str) -> (Scratch, Vec<Tensor>, Vec<Vec<Tensor>>) {
    let mut random = Random::new(31);
    let scratch = Scratch::new();
    let mut tensors = || {
        SHAPES.iter().map(|(name, shape)| Tensor::random(name, dtype, shape, &mut random)).collect::<Vec<_>>()
    };
    let (base, models) = (tensors(), vec![tensors(), tensors(), tensors()]);
    scratch.model("base", &base);
    for (k, model) in models.iter().enumerate() {
        scratch.model(&format!("m{k}"), model);
    }
    (scratch, base, models)
}

/// Task vectors in the left basis of all of them side by side, trimmed and merged there.
fn knots(tasks: &[Matrix], weights: &[f64], density: &[f64], ties: bool, normalize: bool) -> Matrix {
    let (m, n) = (tasks[0].rows, tasks[0].columns);
    let mut wide = Matrix::zeros(m, n * tasks.len());
    for (t, task) in tasks.iter().enumerate() {
        for i in 0..m {
            let at = i * wide.columns + t * n;
            wide.data[at..at + n].copy_from_slice(&task.data[i * n..(i + 1) * n]);
        }
    }
    let Svd { left, values, .. } = svd(&wide);
    let rank = values.iter().filter(|v| **v > 1e-6 * values[0]).count();
    let basis = top(&left, rank);
    let coordinates: Vec<Vec<f64>> = tasks
        .iter()
        .zip(density)
        .map(|(task, density)| super::oracle::largest(&basis.times(task).data, *density))
        .collect();
    let merged = (0..rank * n)
        .map(|k| {
            let values: Vec<f64> = coordinates.iter().zip(weights).map(|(c, w)| c[k] * w).collect();
            let vote: f64 = values.iter().sum();
            let counts = |v: f64| !ties || if vote >= 0.0 { v > 0.0 } else { v < 0.0 };
            let sum: f64 = values.iter().filter(|v| counts(**v)).sum();
            let weight: f64 = values.iter().zip(weights).filter(|(v, _)| counts(**v)).map(|(_, w)| w).sum();
            if normalize && weight != 0.0 { sum / weight } else { sum }
        })
        .collect();
    basis.transpose().times(&Matrix::new(rank, n, merged))
}

fn check(method: &str, parameters: &str, lambda: f64, oracle: &dyn Fn(&[Matrix]) -> Matrix) {
    check_with(method, parameters, &["", "", ""], lambda, oracle);
}

fn check_with(
    method: &str,
    parameters: &str,
    of_models: &[&str],
    lambda: f64,
    oracle: &dyn Fn(&[Matrix]) -> Matrix,
) {
    for dtype in ["F32", "BF16"] {
        let (scratch, base, models) = world(dtype);
        let head = format!("merge_method: {method}\nbase_model: base\nparameters: {{ {parameters} }}");
        let merged: Merged = scratch.merge(&World::config(&head, of_models), "out", &[]);
        for (place, (name, shape)) in SHAPES.iter().enumerate() {
            let origin = base[place].values();
            let d = deltas(&origin, &models.iter().map(|m| m[place].values()).collect::<Vec<_>>());
            // These two are for linear layers.
            let embedding = ["knots", "iso_ridge"].contains(&method) && name.contains("embed");
            let merged_task = match shape {
                [m, n] if !embedding => {
                    let tasks: Vec<Matrix> = d.iter().map(|d| Matrix::new(*m, *n, d.clone())).collect();
                    oracle(&tasks).data
                }
                _ => (0..origin.len()).map(|k| d.iter().map(|d| d[k]).sum::<f64>() / 3.0).collect(),
            };
            let expected: Vec<f64> = origin.iter().zip(&merged_task).map(|(b, t)| b + lambda * t).collect();
            // Conditions of up to 1e3 in f64, squared: 1e-10. Then one rounding to the stored dtype; vectors are f32.
            let relative = if dtype == "BF16" { 1.0 / 256.0 } else { 1e-6 };
            assert_near(&merged.values(name), &expected, relative, &format!("{method} {dtype} {name}"));
        }
    }
}

#[test]
fn iso_c_makes_singular_values_equal() {
    check("iso_c", "lambda: 1.5", 1.5, &iso_c);
}

#[test]
fn iso_ridge_flattens_singular_values_and_keeps_a_norm() {
    check("iso_ridge", "", 1.0, &|tasks| iso_ridge(tasks, 0.5));
    check("iso_ridge", "lambda: 0.7, ridge: 2", 0.7, &|tasks| iso_ridge(tasks, 2.0));
    // Weights scale task vectors against each other; one of 0 drops the model, biases' mean is plain.
    let weighted = |tasks: &[Matrix]| iso_ridge(&[tasks[0].scaled(0.5), tasks[2].scaled(1.5)], 0.5);
    check_with("iso_ridge", "", &["weight: 2", "weight: 0", "weight: 6"], 1.0, &weighted);
    let (scratch, ..) = world("F32");
    let head = "merge_method: iso_ridge\nbase_model: base";
    scratch.refuse_unread(&World::config(head, &["weight: 0", "weight: 0"]), &["every `weight` is 0"]);
    scratch.refuse_unread(&World::config(head, &["weight: -1", ""]), &["weight", "at least 0"]);
}

#[test]
fn iso_ridge_of_one_task_is_that_task() {
    let (scratch, _, models) = world("F32");
    let merged =
        scratch.merge(&World::config("merge_method: iso_ridge\nbase_model: base", &[""]), "out", &[]);
    for (place, (name, _)) in SHAPES.iter().enumerate() {
        // base + (model - base) in f64, vectors in f32; one rounding.
        assert_near(&merged.values(name), &models[0][place].values(), 3e-7, name);
    }
}

#[test]
fn iso_ridge_leaves_noise_small_and_what_cancels_gone() {
    // Two task vectors of rank 1 and norm 1 on a base of which only rounding differs elsewhere; then opposite ones.
    let mut random = Random::new(34);
    let (m, n) = (24, 16);
    let base = Tensor::random("a.weight", "F32", &[m, n], &mut random);
    let rank_one = |random: &mut Random| {
        let (u, v) = (Matrix::random(m, 1, random), Matrix::random(1, n, random));
        let product = u.times(&v);
        product.scaled(1.0 / product.norm())
    };
    let tasks = [rank_one(&mut random), rank_one(&mut random)];
    let scratch = Scratch::new();
    scratch.model("base", std::slice::from_ref(&base));
    let model = |name: &str, task: &Matrix, scale: f64| {
        let values: Vec<f64> = base.values().iter().zip(&task.data).map(|(b, t)| b + scale * t).collect();
        scratch.model(name, &[Tensor::new("a.weight", "F32", &[m, n], &values)]);
    };
    model("m0", &tasks[0], 1.0);
    model("m1", &tasks[1], 1.0);
    model("m2", &tasks[0], -1.0);
    let merged_task = |models: &str, out: &str| {
        let config = format!("merge_method: iso_ridge\nbase_model: base\nmodels: [{models}]");
        let merged = scratch.merge(&config, out, &[]);
        let change = merged.values("a.weight").iter().zip(base.values()).map(|(x, b)| x - b).collect();
        Matrix::new(m, n, change)
    };
    let values = svd(&merged_task("{ model: m0 }, { model: m1 }", "two")).values;
    // Rounding of 384 values below 1 to f32: a norm below 384^(1/2) · 6e-8 = 1.2e-6 a task vector and for the result, scaled
    // up by at most 1 / (0.5·σ̄) of about 2.
    assert!(values[1] > 0.3 && values[2] < 1e-5, "{values:?}");
    assert!((norm(&values) - 1.0).abs() < 1e-5, "the norm of one task vector: {values:?}");
    let gone = merged_task("{ model: m0 }, { model: m2 }", "opposite");
    assert!(gone.norm() < 1e-5, "{}", gone.norm());
}

#[test]
fn iso_cts_gives_tasks_spaces_of_their_own() {
    check("iso_cts", "lambda: 0.5, common: 0.4", 0.5, &|tasks| iso_cts(tasks, 0.4));
    check("iso_cts", "", 1.0, &|tasks| iso_cts(tasks, 0.8));
}

#[test]
fn tsv_m_sums_orthogonal_triples() {
    check("tsv_m", "lambda: 0.75", 0.75, &tsv_m);
}

#[test]
fn knots_merges_in_the_basis_of_all_tasks() {
    let ones = [1.0; 3];
    check("knots", "density: 0.3, lambda: 0.6", 0.6, &|tasks| knots(tasks, &ones, &[0.3; 3], true, true));
    let models = ["weight: 1, density: 0.5", "weight: 0.5, density: 1", "weight: -0.3, density: 0.8"];
    let (weights, density) = ([1.0, 0.5, -0.3], [0.5, 1.0, 0.8]);
    check_with("knots", "", &models, 1.0, &|tasks| knots(tasks, &weights, &density, true, true));
    check_with("knots", "inner: linear, normalize: false", &models, 1.0, &|tasks| {
        knots(tasks, &weights, &density, false, false)
    });
    // Nothing trimmed, nothing elected: a basis changes nothing.
    check("knots", "inner: linear", 1.0, &|tasks| sum(tasks).scaled(1.0 / 3.0));
    let (scratch, ..) = world("F32");
    let zero = "merge_method: knots\nbase_model: base\nparameters: { inner: linear }";
    scratch.refuse_unread(
        &World::config(zero, &["weight: 1", "weight: -1", ""]).replace("m2", "base"),
        &["sum to 0", "normalize: false"],
    );
    scratch.refuse_unread("merge_method: knots\nmodels: [{ model: m0 }]", &["base_model"]);
    let word = "merge_method: knots\nbase_model: base\nparameters: { inner: slerp }";
    scratch.refuse_unread(&World::config(word, &["", ""]), &["slerp", "ties", "linear"]);
}

#[test]
fn knots_of_low_rank_adapters_keeps_to_their_directions() {
    // Task vectors of rank 2 in the span of 4 left vectors: the result stays there, and a tensor nobody changed does too.
    let mut random = Random::new(33);
    let scratch = Scratch::new();
    let (m, n) = (12, 10);
    let matrix = |rows: usize, columns: usize, random: &mut Random| {
        Matrix::new(rows, columns, (0..rows * columns).map(|_| random.uniform()).collect())
    };
    let base = Tensor::random("a.weight", "F64", &[m, n], &mut random);
    let still = Tensor::random("still.weight", "F64", &[5, 3], &mut random);
    scratch.model("base", &[base.clone(), still.clone()]);
    let mut lefts = Vec::new();
    for k in 0..2 {
        let (left, right) = (matrix(m, 2, &mut random), matrix(2, n, &mut random));
        let task = left.times(&right);
        let values: Vec<f64> = base.values().iter().zip(&task.data).map(|(b, t)| b + t).collect();
        scratch.model(&format!("m{k}"), &[Tensor::new("a.weight", "F64", &[m, n], &values), still.clone()]);
        lefts.push(left.transpose());
    }
    let head = "merge_method: knots\nbase_model: base\nparameters: { density: 0.4 }";
    let merged = scratch.merge(&World::config(head, &["", ""]), "out", &[]);
    assert_eq!(merged.values("still.weight"), still.values());
    let change: Vec<f64> = merged.values("a.weight").iter().zip(base.values()).map(|(x, b)| x - b).collect();
    let change = Matrix::new(m, n, change);
    let span = top(&svd(&polar(&stack(&lefts))).right, 4);
    let outside = change.plus(-1.0, &span.transpose().times(&span.times(&change)));
    // f64 throughout, condition below 1e3, squared.
    assert!(norm(&change.data) > 0.1 && norm(&outside.data) < 1e-9, "{}", norm(&outside.data));
}

#[test]
fn threads_and_memory_do_not_matter() {
    let mut random = Random::new(32);
    let scratch = Scratch::new();
    // 1.2 Gflop and more: all threads at once.
    for name in ["base", "m0", "m1"] {
        scratch.model(name, &[Tensor::random("w.weight", "BF16", &[620, 310], &mut random)]);
    }
    for method in ["iso_c", "iso_cts", "iso_ridge", "tsv_m", "knots"] {
        let more = if method == "knots" { "\nparameters: { density: 0.3 }" } else { "" };
        let config = World::config(&format!("merge_method: {method}\nbase_model: base{more}"), &["", ""]);
        let one = scratch.merge(&config, &format!("{method}-1"), &["--threads", "1"]);
        let plan = scratch.plan(&config, &["--threads", "3"]);
        let least = plan["least_memory_bytes"].to_string();
        let flags = ["--threads", "3", "--max-memory", &least, "--io", "pread"];
        let three = scratch.merge(&config, &format!("{method}-3"), &flags);
        assert!(one.tensor("w.weight").bytes == three.tensor("w.weight").bytes, "{method}");
        let peak = three.report["peak_anonymous_bytes"].as_u64().expect("measured");
        assert!(peak <= least.parse().expect("a number"), "{method}: {peak} held, {least} planned");
        assert_eq!(three.report["bytes_read"], plan["bytes_read"], "{method}");
    }
}

/// Tasks that change columns of their own agree everywhere, so nothing is lost, also where the rows are many.
#[test]
fn knots_of_tasks_on_their_own_columns_is_their_sum() {
    for (rows, columns) in [(8, 6), (13, 6), (64, 8)] {
        let mut random = Random::new(31);
        let scratch = Scratch::new();
        let base = Matrix::random(rows, columns, &mut random).stored();
        let mut sum = base.data.clone();
        scratch.model("base", &[Tensor::f32("w.weight", &[rows, columns], &base.data)]);
        for k in 0..2 {
            let mut model = base.data.clone();
            for (at, v) in model.iter_mut().enumerate().filter(|(at, _)| at % columns % 2 == k) {
                *v = f64::from((*v + random.uniform() - 0.5) as f32);
                sum[at] = *v;
            }
            scratch.model(&format!("m{k}"), &[Tensor::f32("w.weight", &[rows, columns], &model)]);
        }
        let config = "merge_method: knots\nbase_model: base\nmodels: [{model: m0}, {model: m1}]\n";
        let merged = scratch.merge(config, "out", &[]);
        // Rounded to f32 once; f64 before.
        assert_near(&merged.values("w.weight"), &sum, 1e-6, &format!("{rows} x {columns}"));
    }
}
