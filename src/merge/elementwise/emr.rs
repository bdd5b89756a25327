//! EMR-Merging (Huang et al. 2024, arXiv:2405.17461): elect one vector for all tasks, mask and rescale it for each.
//!
//! γ = sign(Σ τₜ) (0 is negative); τ_uni = γ · max |τₜ| over the models that have that sign. Task t's model is
//! θ₀ + λₜ · mₜ∘τ_uni with mₜ where τₜ has the sign of τ_uni. λₜ is Σ mean|τₜ| / Σ mean|mₜ∘τ_uni|, the sums over all tensors,
//! the means over each (`rescaler: flat` weighs every element alike). `task` says which model is written, by its place in
//! `models`; without it that is θ₀ + τ_uni.

use super::{Arguments, BaseUse, Definition, Elementwise, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};

pub(super) static DEFINITION: Definition = Definition {
    name: "emr",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("task", Range::NonNegative),
        ParameterSpec::word("rescaler", &["tensors", "flat"]),
    ],
    build,
};

#[derive(Debug)]
struct Emr {
    /// Place among the models that are merged.
    task: Option<usize>,
    /// What a value adds to a sum.
    unit: f64,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    arguments.expect_uniform("task")?;
    let task = match arguments.number("task", -1.0) {
        task if task < 0.0 => None,
        task => Some(arguments.place(task).ok_or_else(|| {
            format!(
                "`task` must be the place in `models`, from 0, of a model that is not the base (got {task})"
            )
        })?),
    };
    let elements = arguments.shape().iter().product::<usize>().max(1) as f64;
    let unit = if arguments.word("rescaler", "tensors") == "flat" { 1.0 } else { 1.0 / elements };
    Ok(Box::new(Emr { task, unit }))
}

/// τ_uni at one element.
fn unified(piece: &Piece<'_>, k: usize) -> f32 {
    let values = (0..piece.models()).map(|i| piece.model(i)[k]);
    let positive = values.clone().sum::<f32>() > 0.0;
    let largest =
        values.filter(|d| if positive { *d > 0.0 } else { *d < 0.0 }).fold(0.0f32, |m, d| m.max(d.abs()));
    if positive { largest } else { -largest }
}

impl Elementwise for Emr {
    fn task_vectors(&self) -> bool {
        true
    }

    fn whole_model(&self) -> bool {
        self.task.is_some()
    }

    fn passes(&self) -> Vec<Pass> {
        if self.task.is_some() { vec![Pass::Sums { count: 2 }] } else { Vec::new() }
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        let Some(task) = self.task else { return };
        for (k, own) in piece.model(task).iter().enumerate() {
            let unified = unified(piece, k);
            sums[0] += f64::from(own.abs()) * self.unit;
            sums[1] += if own * unified > 0.0 { f64::from(unified.abs()) * self.unit } else { 0.0 };
        }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let scale = match known.sums(0) {
            [own, masked] if *masked > 0.0 => (own / masked) as f32,
            _ => 1.0,
        };
        for (k, o) in out.iter_mut().enumerate() {
            let unified = unified(piece, k);
            let kept = self.task.is_none_or(|task| piece.model(task)[k] * unified > 0.0);
            *o = piece.base()[k] + if kept { scale * unified } else { 0.0 };
        }
    }
}
