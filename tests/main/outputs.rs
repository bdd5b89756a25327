//! What a merge writes, against f64 arithmetic of the tests' own and against the contract's words.
//!
//! `methods`: numbers. `rounds`: nested initial guesses. `forms`: one statistic in many forms. `same`: what must not
//! change a result. `sweep`: several models at once. `large`: files past the page cache. `directory`: the output directory. `memory`: budgets. `compare`: `inspect` and `diff`.

mod compare;
mod directory;
mod forms;
mod large;
mod memory;
mod methods;
mod rounds;
mod same;
mod sweep;

use crate::algebra::{Matrix, gram};
use crate::util::{Merged, Random, Scratch, Statistics, Tensor, models};

/// One rounding to f32, relative.
pub const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;

/// Direct solves: f64 arithmetic, then one rounding to f32. The systems here have at most 42 unknowns and, by
/// [`gram`]'s construction, a condition below 1e4, so that f64 loses at most 42 · 1e4 · 2⁻⁵² ≈ 1e-10.
const DIRECT: f64 = HALF_ULP + 1e-10;

/// The 2-D weights that have statistics: out ≠ in, so that a missing transpose shows.
const WEIGHTS: [(&str, usize, usize); 2] =
    [("model.layers.0.mlp.weight", 5, 7), ("model.layers.1.mlp.weight", 6, 4)];
const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const IDS: &str = "model.position_ids";
/// All float tensors of the little models.
const FLOATS: [&str; 4] = [EMBEDDING, WEIGHTS[0].0, WEIGHTS[1].0, NORM];

/// A base, fine-tuned models `m0`, `m1`, … near it, and statistics `m0.safetensors`, … of each kind.
struct World {
    scratch: Scratch,
    base: Vec<Tensor>,
    models: Vec<Vec<Tensor>>,
    /// By model, then by place in [`WEIGHTS`].
    input: Vec<Vec<Matrix>>,
    output: Vec<Vec<Matrix>>,
    /// By model; of [`NORM`] and both [`WEIGHTS`], in this order.
    fisher: Vec<[Vec<f64>; 3]>,
}

impl World {
    fn new(count: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let base = checkpoint(&mut random, None);
        let models: Vec<Vec<Tensor>> = (0..count).map(|_| checkpoint(&mut random, Some(&base))).collect();
        let scratch = Scratch::new();
        scratch.model("base", &base);
        let (mut input, mut output, mut fisher) = (Vec::new(), Vec::new(), Vec::new());
        for (k, model) in models.iter().enumerate() {
            scratch.model(&format!("m{k}"), model);
            let a: Vec<Matrix> =
                WEIGHTS.iter().map(|(_, _, side)| gram(*side, 5 * side, &mut random)).collect();
            let g: Vec<Matrix> =
                WEIGHTS.iter().map(|(_, side, _)| gram(*side, 5 * side, &mut random)).collect();
            let mut squares =
                |len: usize| -> Vec<f64> { random.values(len).iter().map(|v| v * v + 1e-3).collect() };
            let f: [Vec<f64>; 3] = [squares(7), squares(35), squares(24)]
                .map(|v| v.iter().map(|x| f64::from(*x as f32)).collect());
            let mut statistics = Statistics::new().diagonal(NORM, &[7], &f[0]);
            for (w, (name, out, side)) in WEIGHTS.iter().enumerate() {
                statistics = statistics
                    .full(&format!("{name}/input_gram"), *side, &a[w].data)
                    .full(&format!("{name}/output_gram"), *out, &g[w].data)
                    .diagonal(name, &[*out, *side], &f[1 + w]);
            }
            statistics.write(&scratch, &format!("m{k}.safetensors"));
            input.push(a);
            output.push(g);
            fisher.push(f);
        }
        Self { scratch, base, models, input, output, fisher }
    }

    /// A config of these top-level lines over all models with their statistics.
    fn config(&self, head: &str) -> String {
        let names: Vec<(String, String)> =
            (0..self.models.len()).map(|k| (format!("m{k}"), format!("m{k}.safetensors"))).collect();
        let entries: Vec<(&str, Option<&str>)> =
            names.iter().map(|(m, s)| (m.as_str(), Some(s.as_str()))).collect();
        format!("{head}\n{}", models(&entries))
    }

    fn merge(&self, head: &str, out: &str) -> Merged {
        self.scratch.merge(&self.config(head), out, &[])
    }

    /// A weight of one model.
    fn weight(&self, model: usize, weight: usize) -> Matrix {
        matrix(&self.models[model], weight)
    }

    fn base_weight(&self, weight: usize) -> Matrix {
        matrix(&self.base, weight)
    }

    /// Values of a tensor in each model.
    fn values(&self, name: &str) -> Vec<Vec<f64>> {
        self.models.iter().map(|m| find(m, name).values()).collect()
    }

    fn mean(&self, name: &str) -> Vec<f64> {
        let values = self.values(name);
        (0..values[0].len()).map(|i| values.iter().map(|v| v[i]).sum::<f64>() / values.len() as f64).collect()
    }

    fn mean_weight(&self, weight: usize) -> Matrix {
        let (name, out, side) = WEIGHTS[weight];
        Matrix::new(out, side, self.mean(name))
    }

    /// `Σ wᵢAᵢ` and the like: weight, input Gram, output Gram, model's weight.
    fn terms(&self, weight: usize, weights: &[f64]) -> Vec<Term> {
        weights
            .iter()
            .enumerate()
            .map(|(k, w)| Term {
                weight: *w,
                input: self.input[k][weight].clone(),
                output: self.output[k][weight].clone(),
                theta: self.weight(k, weight),
            })
            .collect()
    }
}

fn find<'a>(tensors: &'a [Tensor], name: &str) -> &'a Tensor {
    tensors.iter().find(|t| t.name == name).expect("every little model has it")
}

fn matrix(tensors: &[Tensor], weight: usize) -> Matrix {
    let (name, out, side) = WEIGHTS[weight];
    Matrix::new(out, side, find(tensors, name).values())
}

/// Random tensors, or `near` plus a tenth of random ones.
fn checkpoint(random: &mut Random, near: Option<&[Tensor]>) -> Vec<Tensor> {
    let mut tensor = |name: &str, shape: &[usize]| {
        let values = random.values(shape.iter().product());
        match near {
            None => Tensor::f32(name, shape, &values),
            Some(near) => {
                let moved: Vec<f64> =
                    find(near, name).values().iter().zip(&values).map(|(base, v)| base + v / 8.0).collect();
                Tensor::f32(name, shape, &moved)
            }
        }
    };
    let mut tensors = vec![tensor(EMBEDDING, &[11, 6])];
    tensors.extend(WEIGHTS.map(|(name, out, side)| tensor(name, &[out, side])));
    tensors.push(tensor(NORM, &[7]));
    let first = if near.is_none() { 100.0 } else { 200.0 };
    tensors.push(Tensor::new(IDS, "I64", &[3], &[first, 2.0, 3.0]));
    tensors
}

/// One model's part in a reference solution.
struct Term {
    weight: f64,
    input: Matrix,
    output: Matrix,
    theta: Matrix,
}

/// `θ` with `(θ - θ₀)(S + μI) = Σ wᵢ(θᵢ - θ₀)Aᵢ`, `S = ΣwᵢAᵢ`, `μ = ρ·tr S/in`.
fn gram_solution(terms: &[Term], start: &Matrix, ridge: f64) -> Matrix {
    let side = start.columns;
    let (mut s, mut rhs) = (Matrix::zeros(side, side), Matrix::zeros(start.rows, side));
    for term in terms {
        s = s.plus(term.weight, &term.input);
        rhs = rhs.plus(term.weight, &term.theta.plus(-1.0, start).times(&term.input));
    }
    s = s.plus(ridge * s.trace() / side as f64, &Matrix::identity(side));
    start.plus(1.0, &s.transpose().solve(&rhs.transpose()).transpose())
}

/// `Σ wᵢ Gᵢ⊗Aᵢ` and `vec(Σ wᵢGᵢθᵢAᵢ)`.
fn kfac_system(terms: &[Term]) -> (Matrix, Matrix) {
    let (rows, columns) = (terms[0].theta.rows, terms[0].theta.columns);
    let unknowns = rows * columns;
    let (mut k, mut b) = (Matrix::zeros(unknowns, unknowns), Matrix::zeros(rows, columns));
    for term in terms {
        k = k.plus(term.weight, &term.output.kronecker(&term.input));
        b = b.plus(term.weight, &term.output.times(&term.theta).times(&term.input));
    }
    (k, Matrix::new(unknowns, 1, b.data))
}

/// `θ` with `(K + μI)(θ - θ₀) = b - Kθ₀`, `μ = ρ·tr K/(in·out)`.
fn kfac_solution(terms: &[Term], start: &Matrix, ridge: f64) -> Vec<f64> {
    let (k, b) = kfac_system(terms);
    let start = Matrix::new(start.data.len(), 1, start.data.clone());
    let rhs = b.plus(-1.0, &k.times(&start));
    let shift = ridge * k.trace() / k.rows as f64;
    start.plus(1.0, &k.plus(shift, &Matrix::identity(k.rows)).solve(&rhs)).data
}

/// The textbook's conjugate gradients, one α and β for the whole vector, `steps` of them.
fn conjugate_gradients(a: &Matrix, b: &Matrix, start: &[f64], steps: usize) -> Vec<f64> {
    let dot = |x: &Matrix, y: &Matrix| x.data.iter().zip(&y.data).map(|(x, y)| x * y).sum::<f64>();
    let mut x = Matrix::new(start.len(), 1, start.to_vec());
    let mut r = b.plus(-1.0, &a.times(&x));
    let mut p = r.clone();
    for _ in 0..steps {
        let q = a.times(&p);
        let rr = dot(&r, &r);
        let alpha = rr / dot(&p, &q);
        x = x.plus(alpha, &p);
        r = r.plus(-alpha, &q);
        p = r.plus(dot(&r, &r) / rr, &p);
    }
    x.data
}
