//! One statistic in many forms: the forms must not matter.

use super::HALF_ULP;
use crate::algebra::{Matrix, assert_near};
use crate::util::{Merged, Random, Scratch, Statistics, Tensor, models};

const OUT: usize = 5;
const IN: usize = 6;
/// Two weights that see the same input.
const NAMES: [&str; 2] = ["q.weight", "k.weight"];

struct Forms {
    scratch: Scratch,
    /// By model: F of the input Gram and of each weight's output Gram, small dyadic numbers, so that FᵀF is exact in f32
    /// and in bf16.
    input: Vec<Matrix>,
    output: Vec<[Matrix; 2]>,
}

impl Forms {
    fn new() -> Self {
        let mut random = Random::new(60);
        let scratch = Scratch::new();
        let (mut input, mut output) = (Vec::new(), Vec::new());
        for name in ["a", "b"] {
            scratch.model(name, &NAMES.map(|n| Tensor::random(n, "F32", &[OUT, IN], &mut random)));
            input.push(dyadic(IN, &mut random));
            output.push([dyadic(OUT, &mut random), dyadic(OUT, &mut random)]);
        }
        Self { scratch, input, output }
    }

    /// Merges with the statistics that `form` makes of model `k`.
    fn merge(&self, method: &str, out: &str, form: impl Fn(&Self, usize) -> Statistics) -> Merged {
        let files = [format!("{out}0.safetensors"), format!("{out}1.safetensors")];
        for (k, file) in files.iter().enumerate() {
            form(self, k).write(&self.scratch, file);
        }
        let config = format!("{method}\n{}", models(&[("a", Some(&files[0])), ("b", Some(&files[1]))]));
        self.scratch.merge(&config, out, &[])
    }

    fn full(&self, k: usize) -> Statistics {
        NAMES.iter().enumerate().fold(Statistics::new(), |s, (w, name)| {
            s.full(&format!("{name}/input_gram"), IN, &gram_of(&self.input[k]).data).full(
                &format!("{name}/output_gram"),
                OUT,
                &gram_of(&self.output[k][w]).data,
            )
        })
    }
}

/// `[side, side]` of multiples of 1/2 from -1 to 1, plus 2 on the diagonal: full rank by diagonal dominance being near.
fn dyadic(side: usize, random: &mut Random) -> Matrix {
    let data = random.values(side * side).iter().map(|v| (v * 2.0).round() / 2.0 * 0.5).collect();
    Matrix::new(side, side, data).plus(2.0, &Matrix::identity(side))
}

fn gram_of(factor: &Matrix) -> Matrix {
    factor.transpose().times(factor)
}

const METHODS: [(&str, &str); 3] = [
    ("regmean", "merge_method: regmean"),
    ("direct", "merge_method: mats\nsubspace: kfac\nsolver: { method: direct }"),
    (
        "cg",
        "merge_method: mats\nsubspace: kfac\nsolver: { method: cg, tolerance: 1.0e-6, max_iterations: 300 }",
    ),
];

/// The Grams are the same numbers in every form: direct solves differ by f64 rounding before the one rounding of the
/// output, CG by where its f32 iterates stop: 1e-6 of the right-hand side, times a condition below 1e3.
fn tolerance(method: &str) -> f64 {
    if method == "cg" { 2e-3 } else { 2.0 * HALF_ULP }
}

fn agrees(what: &str, form: impl Fn(&Forms, usize) -> Statistics) {
    let forms = Forms::new();
    for (method, head) in METHODS {
        let expected = forms.merge(head, &format!("{method}_full"), Forms::full);
        let got = forms.merge(head, &format!("{method}_{what}"), &form);
        for name in NAMES {
            assert_ne!(expected.parameter(name)["method"], "average");
            assert_near(
                &got.values(name),
                &expected.values(name),
                tolerance(method),
                &format!("{method} {what} {name}"),
            );
        }
    }
}

#[test]
fn packed() {
    agrees("packed", |forms, k| {
        NAMES.iter().enumerate().fold(Statistics::new(), |s, (w, name)| {
            s.packed(&format!("{name}/input_gram"), IN, &gram_of(&forms.input[k]).data).packed(
                &format!("{name}/output_gram"),
                OUT,
                &gram_of(&forms.output[k][w]).data,
            )
        })
    });
}

#[test]
fn factors() {
    agrees("factor", |forms, k| {
        NAMES.iter().enumerate().fold(Statistics::new(), |s, (w, name)| {
            s.factor(&format!("{name}/input_factor"), IN, &forms.input[k].data).factor(
                &format!("{name}/output_factor"),
                OUT,
                &forms.output[k][w].data,
            )
        })
    });
}

#[test]
fn one_model_full_the_other_factored() {
    agrees("mixed", |forms, k| {
        if k == 0 {
            return forms.full(k);
        }
        NAMES.iter().enumerate().fold(Statistics::new(), |s, (w, name)| {
            s.factor(&format!("{name}/input_factor"), IN, &forms.input[k].data).packed(
                &format!("{name}/output_gram"),
                OUT,
                &gram_of(&forms.output[k][w]).data,
            )
        })
    });
}

#[test]
fn aliases() {
    agrees("alias", |forms, k| {
        NAMES
            .iter()
            .enumerate()
            .fold(
                Statistics::new().packed(
                    &format!("{}/input_gram", NAMES[0]),
                    IN,
                    &gram_of(&forms.input[k]).data,
                ),
                |s, (w, name)| {
                    s.full(&format!("{name}/output_gram"), OUT, &gram_of(&forms.output[k][w]).data)
                },
            )
            .alias(&format!("{}/input_gram", NAMES[1]), &format!("{}/input_gram", NAMES[0]))
    });
}

#[test]
fn dtypes() {
    for dtype in ["F64", "F16", "BF16"] {
        agrees(dtype, |forms, k| {
            NAMES.iter().enumerate().fold(Statistics::new(), |s, (w, name)| {
                // Multiples of 1/16 below 16: eight bits, exact in each dtype.
                s.raw(Tensor::new(&format!("{name}/input_factor"), dtype, &[IN, IN], &forms.input[k].data))
                    .raw(Tensor::new(
                        &format!("{name}/output_factor"),
                        dtype,
                        &[OUT, OUT],
                        &forms.output[k][w].data,
                    ))
            })
        });
    }
}

#[test]
fn several_files_for_one_model() {
    let forms = Forms::new();
    let head = METHODS[1].1;
    let expected = forms.merge(head, "full", Forms::full);
    let mut config = format!("{head}\nmodels:\n");
    for (k, model) in ["a", "b"].into_iter().enumerate() {
        let input = format!("{}/input_gram", NAMES[0]);
        Statistics::new()
            .full(&input, IN, &gram_of(&forms.input[k]).data)
            .write(&forms.scratch, &format!("{model}-in.safetensors"));
        NAMES
            .iter()
            .enumerate()
            .fold(Statistics::new(), |s, (w, name)| {
                s.full(&format!("{name}/output_gram"), OUT, &gram_of(&forms.output[k][w]).data)
            })
            // An alias may point into any file of its model.
            .alias(&format!("{}/input_gram", NAMES[1]), &input)
            .write(&forms.scratch, &format!("{model}-out.safetensors"));
        config += &format!(
            "  - model: {model}\n    statistics: [{model}-in.safetensors, {model}-out.safetensors]\n"
        );
    }
    let got = forms.scratch.merge(&config, "split", &[]);
    assert_eq!(got.tensors, expected.tensors);
}
