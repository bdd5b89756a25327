//! EMR-Merging (Huang et al. 2024, arXiv:2405.17461): elect one vector for all tasks, mask and rescale it for each.
//!
//! γ = sign(Σ τₜ) (0 is negative); τ_uni = γ · max |τₜ| over the models that have that sign. The merged model is θ₀ + τ_uni;
//! beside it every task's mask mₜ, set where τₜ has the sign of τ_uni, and the norms of its rescaler are kept
//! ([`crate::masks`]), of which `materialise` makes θ₀ + λₜ · mₜ∘τ_uni. λₜ is Σ mean|τₜ| / Σ mean|mₜ∘τ_uni|, the sums over all
//! tensors, the means over each (`rescaler: flat` weighs every element alike). `task` writes that model at once, by its
//! place in `models`; `masks: false` keeps nothing beside the merged model.

use super::masks::{TaskMasks, set};
use super::{Arguments, BaseUse, Definition, Elementwise, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};
use crate::kernel::dispatch;
use crate::masks::Rescaler;

/// Whether a method that can keep masks does.
pub(super) const MASKS: ParameterSpec = ParameterSpec::boolean("masks");

pub(super) static DEFINITION: Definition = Definition {
    name: "emr",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("task", Range::NonNegative),
        ParameterSpec::word("rescaler", &["tensors", "flat"]),
        MASKS,
    ],
    build,
};

/// Elements worked on at a time, on the stack.
const CHUNK: usize = 512;

#[derive(Debug)]
struct Emr {
    /// Place among the models that are merged.
    task: Option<usize>,
    rescaler: Rescaler,
    masks: bool,
    /// What a value adds to a sum.
    unit: f64,
}

/// Place among the models that are merged of the one whose model is asked for.
///
/// # Errors
/// A `task` that is none of them, or not the same for all tensors.
pub(super) fn task(arguments: &Arguments<'_>) -> Result<Option<usize>, String> {
    arguments.expect_uniform("task")?;
    match arguments.number("task", -1.0) {
        task if task < 0.0 => Ok(None),
        task => arguments.place(task).map(Some).ok_or_else(|| {
            format!(
                "`task` must be the place in `models`, from 0, of a model that is not the base (got {task})"
            )
        }),
    }
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let task = task(arguments)?;
    let elements = arguments.shape().iter().product::<usize>().max(1) as f64;
    let flat = arguments.word("rescaler", "tensors") == "flat";
    Ok(Box::new(Emr {
        task,
        rescaler: if flat { Rescaler::Flat } else { Rescaler::Tensors },
        masks: task.is_none() && arguments.boolean("masks", true),
        unit: if flat { 1.0 } else { 1.0 / elements },
    }))
}

/// τ_uni of at most a chunk of elements, `first..`.
fn unified(piece: &Piece<'_>, first: usize, out: &mut [f32]) {
    let len = out.len();
    let (mut sum, mut negative) = ([0.0f32; CHUNK], [0.0f32; CHUNK]);
    out.fill(0.0);
    dispatch(
        #[inline(always)]
        || {
            for i in 0..piece.models() {
                let values = piece.model(i)[first..first + len].iter();
                for (((d, sum), most), least) in values.zip(&mut sum).zip(&mut *out).zip(&mut negative) {
                    *sum += *d;
                    *most = most.max(*d);
                    *least = least.min(*d);
                }
            }
            for ((most, least), sum) in out.iter_mut().zip(&negative).zip(&sum) {
                *most = if *sum > 0.0 { *most } else { *least };
            }
        },
    );
}

/// Whether a task vector's value has the sign of the elected one. Not by their product, which may underflow.
fn agrees(own: f32, unified: f32) -> bool {
    (own > 0.0) & (unified > 0.0) | (own < 0.0) & (unified < 0.0)
}

/// Calls `with(first, τ_uni)` for chunk after chunk.
fn chunks(piece: &Piece<'_>, mut with: impl FnMut(usize, &[f32])) {
    let mut buffer = [0.0f32; CHUNK];
    for first in (0..piece.len()).step_by(CHUNK) {
        let unified_values = &mut buffer[..CHUNK.min(piece.len() - first)];
        unified(piece, first, unified_values);
        with(first, unified_values);
    }
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
        chunks(piece, |first, unified| {
            for (own, unified) in piece.model(task)[first..].iter().zip(unified) {
                sums[0] += f64::from(own.abs()) * self.unit;
                sums[1] += if agrees(*own, *unified) { f64::from(unified.abs()) * self.unit } else { 0.0 };
            }
        });
    }

    fn task_masks(&self) -> Option<&dyn TaskMasks> {
        self.masks.then_some(self)
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let scale = match known.sums(0) {
            [own, masked] if *masked > 0.0 => (own / masked) as f32,
            _ => 1.0,
        };
        chunks(piece, |first, unified| {
            let base = &piece.base()[first..];
            for (k, (unified, base)) in unified.iter().zip(base).enumerate() {
                let kept = self.task.is_none_or(|task| agrees(piece.model(task)[first + k], *unified));
                out[first + k] = *base + if kept { scale * *unified } else { 0.0 };
            }
        });
    }
}

impl TaskMasks for Emr {
    fn rescaler(&self) -> Rescaler {
        self.rescaler
    }

    fn record(&self, piece: &Piece<'_>, bits: &mut [u8], norms: &mut [f64]) {
        let row = piece.len().div_ceil(8);
        let (own_norms, masked_norms) = norms.split_at_mut(piece.models());
        chunks(piece, |first, unified| {
            for (i, bits) in bits.chunks_exact_mut(row).enumerate() {
                for (k, (own, unified)) in piece.model(i)[first..].iter().zip(unified).enumerate() {
                    own_norms[i] += f64::from(own.abs());
                    if agrees(*own, *unified) {
                        masked_norms[i] += f64::from(unified.abs());
                        set(bits, first + k);
                    }
                }
            }
        });
    }
}
