//! Methods on singular vectors, against a one-sided Jacobi SVD: high, wide, square and tiny weights.

use super::World;
use super::oracle::{deltas, norm};
use crate::algebra::{Matrix, assert_near};
use crate::util::{Merged, Random, Scratch, Tensor};

const SHAPES: [(&str, &[usize]); 6] = [
    ("high.weight", &[17, 9]),
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

fn check(method: &str, parameters: &str, lambda: f64, oracle: &dyn Fn(&[Matrix]) -> Matrix) {
    for dtype in ["F32", "BF16"] {
        let (scratch, base, models) = world(dtype);
        let head = format!("merge_method: {method}\nbase_model: base\nparameters: {{ {parameters} }}");
        let merged: Merged = scratch.merge(&World::config(&head, &["", "", ""]), "out", &[]);
        for (place, (name, shape)) in SHAPES.iter().enumerate() {
            let origin = base[place].values();
            let d = deltas(&origin, &models.iter().map(|m| m[place].values()).collect::<Vec<_>>());
            let merged_task = match shape {
                [m, n] => {
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
fn iso_cts_gives_tasks_spaces_of_their_own() {
    check("iso_cts", "lambda: 0.5, common: 0.4", 0.5, &|tasks| iso_cts(tasks, 0.4));
    check("iso_cts", "", 1.0, &|tasks| iso_cts(tasks, 0.8));
}

#[test]
fn tsv_m_sums_orthogonal_triples() {
    check("tsv_m", "lambda: 0.75", 0.75, &tsv_m);
}

#[test]
fn threads_and_memory_do_not_matter() {
    let mut random = Random::new(32);
    let scratch = Scratch::new();
    // 1.2 Gflop and more: all threads at once.
    for name in ["base", "m0", "m1"] {
        scratch.model(name, &[Tensor::random("w.weight", "BF16", &[620, 310], &mut random)]);
    }
    for method in ["iso_c", "iso_cts", "tsv_m"] {
        let config = World::config(&format!("merge_method: {method}\nbase_model: base"), &["", ""]);
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
