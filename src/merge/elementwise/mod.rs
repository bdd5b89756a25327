//! Merges whose result at an element follows from the models at that element and a few quantities of the whole tensor (or
//! row, or model): one file a method.
//!
//! A method has a [`Definition`], one `static` that says how the config names it and what it takes, and gives for each
//! tensor an [`Elementwise`]: the passes it needs over the data, and the merge of one piece or the coefficients of a sum.
//! `passes` runs them, tile by tile, and knows nothing of any method; `order` selects, `gram` has inner products, `random`
//! has masks, `combine` sums task vectors; `whole` is for methods that need a weight's singular vectors. `starts` has what
//! needs no pass at all. `sums` and `products` are the same from stored bytes, in registers, where models are stored alike.
//! Nothing here holds a tensor that is longer than a piece.

mod combine;
mod gram;
mod order;
mod passes;
mod places;
mod products;
mod random;
mod starts;
mod stored;
mod sums;
mod whole;

mod arcee_fusion;
mod breadcrumbs;
mod consensus;
mod dare;
mod della;
mod emr;
mod iso;
pub(crate) mod iso_ridge;
mod karcher;
mod knots;
mod magmax;
mod masks;
mod model_stock;
mod multislerp;
mod near;
mod nearswap;
mod nuslerp;
mod pcb;
mod ram;
mod sce;
mod selection;
mod slerp;
mod tall_masks;
mod ties;
mod tsv_m;

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

pub use combine::{Combine, Rescale};
pub use gram::Gram;
pub use masks::{Masked, TaskMasks};
pub use order::{Kept, OrderStatistic};
pub use passes::{Known, Piece};
pub(crate) use passes::{Merging, ModelPasses, memory_bytes, passes_over};
pub use random::Stream;
pub(crate) use starts::merge_stored;
pub use starts::{PIECE, Scratch, merge_elementwise};
pub use whole::{ReadTask, WholeError, WholeTensor};

use super::SourceId;
use crate::config::{ParameterSpec, Round};
use crate::view::names::is_embedding;

/// Every method of this module, as the config names them.
pub static METHODS: [&Definition; 27] = [
    &slerp::DEFINITION,
    &nuslerp::DEFINITION,
    &multislerp::DEFINITION,
    &karcher::DEFINITION,
    &ties::DEFINITION,
    &dare::LINEAR,
    &dare::TIES,
    &della::LINEAR,
    &della::TIES,
    &breadcrumbs::LINEAR,
    &breadcrumbs::TIES,
    &sce::DEFINITION,
    &model_stock::DEFINITION,
    &nearswap::DEFINITION,
    &arcee_fusion::DEFINITION,
    &ram::RAM,
    &ram::RAM_PLUS,
    &magmax::DEFINITION,
    &pcb::DEFINITION,
    &consensus::DEFINITION,
    &emr::DEFINITION,
    &tall_masks::DEFINITION,
    &tsv_m::DEFINITION,
    &knots::DEFINITION,
    &iso::ISO_C,
    &iso::ISO_CTS,
    &iso_ridge::DEFINITION,
];

/// What `base_model` is to a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseUse {
    /// The origin of task vectors; there must be one.
    Required,
    /// The origin, where there is one.
    Optional,
    /// A model like the others, the last unless it is listed.
    Model,
}

/// A method as the config sees it: one `static` in the method's file.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// `merge_method`.
    pub name: &'static str,
    /// What becomes of `base_model`.
    pub base: BaseUse,
    /// Least and most models, the base aside unless it is one like the others.
    pub models: (usize, usize),
    /// What `parameters` may hold.
    pub parameters: &'static [ParameterSpec],
    /// The method for one tensor; the error says what is wrong with the parameters there.
    pub build: fn(&Arguments<'_>) -> Result<Box<dyn Elementwise>, String>,
}

impl PartialEq for Definition {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Definition {}

/// One pass over the data before the merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// So many f64 sums over all pieces, of what [`Elementwise::sums`] adds. One read.
    Sums {
        /// How many.
        count: usize,
    },
    /// Inner products of the models, or of their task vectors: [`Known::sums`] has the lower triangle, row by row (what
    /// [`Gram::new`] takes). One read.
    Gram,
    /// Order statistics of so many columns of scores, at the ranks of [`Elementwise::ranks`]. Two reads, or one where the
    /// tensor is a single piece or a sample told where the ranks lie.
    Order {
        /// How many columns of scores.
        columns: usize,
    },
    /// Of the columns (model by model, or one for all), only what [`Elementwise::kept`] says stays; the rest is 0 from
    /// here on. A score of 0 must stand for a value of 0: how many of those stay is not counted. As many reads as
    /// [`Pass::Order`].
    Trim {
        /// As many as there are models, or 1.
        columns: usize,
        /// Whether [`Known::norms`] gives the columns' L1 norms before and after: of scores that are magnitudes. No read
        /// is added for them.
        norms: bool,
    },
}

impl Pass {
    /// How many sums it makes of so many models.
    fn sums(self, models: usize) -> usize {
        match self {
            Self::Sums { count } => count,
            Self::Gram => Gram::sums(models),
            Self::Order { .. } | Self::Trim { .. } => 0,
        }
    }
}

/// What a pass sees of the scores it selects from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// All scores.
    pub elements: u64,
    /// Those that are not 0. Counted before ranks are asked for.
    pub nonzero: u64,
}

/// A method on one tensor. All arithmetic on values is f32, whatever they are stored as; what is summed over a tensor is
/// f64, in an order that depends on shapes alone.
pub trait Elementwise: Debug + Send + Sync {
    /// Whether [`Piece::model`] holds task vectors `θᵢ - θ₀` (f32 differences) instead of models.
    fn task_vectors(&self) -> bool {
        false
    }

    /// Length of rows that a piece must not cut; `None` where any stretch of elements will do.
    fn row_length(&self) -> Option<usize> {
        None
    }

    /// Whether passes run over the whole model, all tensors of the method at once, instead of over each tensor.
    fn whole_model(&self) -> bool {
        false
    }

    /// The passes before the merge, in order.
    fn passes(&self) -> Vec<Pass> {
        Vec::new()
    }

    /// Adds the terms of one piece to the sums of pass `pass`.
    fn sums(&self, _pass: usize, _piece: &mut Piece<'_>, _known: &Known, _sums: &mut [f64]) {}

    /// Whether the scores of pass `pass` are the magnitudes of the column's model: then [`Elementwise::scores`] is not
    /// asked for them.
    fn by_magnitude(&self, _pass: usize) -> bool {
        false
    }

    /// Scores of one piece in one column of pass `pass`; the magnitudes of the column's model unless overridden.
    fn scores(&self, _pass: usize, column: usize, piece: &Piece<'_>, _known: &Known, scores: &mut [f32]) {
        for (s, x) in scores.iter_mut().zip(piece.model(column)) {
            *s = x.abs();
        }
    }

    /// Ascending ranks, from 0, that an [`Pass::Order`] selects: three at most.
    fn ranks(&self, _pass: usize, _column: usize, _counts: Counts) -> Vec<u64> {
        Vec::new()
    }

    /// What a [`Pass::Trim`] leaves of a column.
    fn kept(&self, _pass: usize, _column: usize, _counts: Counts) -> Kept {
        Kept::All
    }

    /// The method on the tensor as a matrix `[out, in]`, where it needs all of it at once: [`Elementwise::merge`] is then
    /// not called.
    fn whole(&self) -> Option<&dyn WholeTensor> {
        None
    }

    /// What is kept of every task beside the merged model, if anything is.
    fn task_masks(&self) -> Option<&dyn TaskMasks> {
        None
    }

    /// Where the result is `[θ₀ +] Σ cᵢ·xᵢ` with one set of coefficients for the whole tensor (`θ₀` where models are task
    /// vectors): these.
    fn coefficients(&self, _known: &Known) -> Option<Vec<f64>> {
        None
    }

    /// Merges one piece; from [`Elementwise::coefficients`], unless overridden.
    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let coefficients = self.coefficients(known).expect("a method has coefficients or a merge of its own");
        gram::combine(piece, &coefficients, self.task_vectors(), out);
    }
}

/// A method's parameters on one tensor.
pub struct Arguments<'a> {
    pub(crate) round: &'a Round,
    pub(crate) tensor: &'a str,
    pub(crate) t: f64,
    /// Place of each model in the config's `models`; `None` for a base that stands beside them.
    pub(crate) models: &'a [Option<usize>],
    /// The tensor's name in each of them, which filters of their parameters match.
    pub(crate) names: &'a [Cow<'a, str>],
    pub(crate) has_base: bool,
    /// Place of the base among `models`, where it is one of them.
    pub(crate) base_model: Option<usize>,
    pub(crate) shape: &'a [usize],
    pub(crate) seed: u64,
}

impl Arguments<'_> {
    /// Number of models, the base aside unless it is one like the others.
    pub fn models(&self) -> usize {
        self.models.len()
    }

    /// Whether there is an origin of task vectors.
    pub fn has_base(&self) -> bool {
        self.has_base
    }

    /// Place of the base among the models, where it is one like the others.
    pub fn base_model(&self) -> Option<usize> {
        self.base_model
    }

    /// The model at place `index` of the config's `models`, by its place among the models that are merged.
    pub fn place(&self, index: f64) -> Option<usize> {
        self.models.iter().position(|m| m.is_some_and(|m| m as f64 == index))
    }

    /// The tensor's name in the output.
    pub fn tensor(&self) -> &str {
        self.tensor
    }

    /// As stored, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        self.shape
    }

    /// Whether the tensor is the weight of a linear layer: 2-D and no embedding.
    pub fn is_linear(&self) -> bool {
        self.shape.len() == 2 && !is_embedding(self.tensor)
    }

    /// Length of the last dimension; a vector is one row.
    pub fn row_length(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Refuses a number that differs between tensors: what is selected over the whole model needs one for all.
    ///
    /// # Errors
    /// Its name.
    pub fn expect_uniform(&self, name: &str) -> Result<(), String> {
        let own = self.models.iter().flatten().filter_map(|m| self.round.model_parameters.get(*m));
        for parameters in own.chain([&self.round.parameters]) {
            if parameters.is_set(name) && parameters.uniform_number(name).is_none() {
                return Err(format!(
                    "what is measured over the whole model needs one `{name}` for all tensors (got a gradient or filters)"
                ));
            }
        }
        Ok(())
    }

    /// One number for all models.
    pub fn number(&self, name: &str, default: f64) -> f64 {
        self.round.number(None, name, self.tensor, self.t).unwrap_or(default)
    }

    /// One number for all models, which must be there.
    ///
    /// # Errors
    /// Its name, where no filter matches the tensor.
    pub fn required(&self, name: &str) -> Result<f64, String> {
        self.round.number(None, name, self.tensor, self.t).ok_or_else(|| {
            format!("`{name}` has no value for this tensor (expected one, or a filter that matches)")
        })
    }

    /// Each model's place, and its number: a filter matches the name that the tensor has in the model.
    fn each(&self, name: &str) -> impl Iterator<Item = (Option<usize>, Option<f64>)> {
        self.models.iter().zip(self.names).map(move |(m, own)| (*m, self.round.number(*m, name, own, self.t)))
    }

    /// A number for each model.
    pub fn numbers(&self, name: &str, default: f64) -> Vec<f64> {
        self.each(name).map(|(_, number)| number.unwrap_or(default)).collect()
    }

    /// A number for each model, which must be there.
    ///
    /// # Errors
    /// Its name and the model, where no filter matches the tensor.
    pub fn required_numbers(&self, name: &str) -> Result<Vec<f64>, String> {
        let of = |(m, number): (Option<usize>, Option<f64>)| {
            number.ok_or_else(|| {
                let model = m.map_or_else(|| "the base".to_owned(), |k| format!("models[{k}]"));
                format!("`{name}` of {model} has no value for this tensor (expected one, or a filter that matches)")
            })
        };
        self.each(name).map(of).collect()
    }

    /// True or false, for all models.
    pub fn boolean(&self, name: &str, default: bool) -> bool {
        self.round.boolean(None, name, self.tensor, self.t).unwrap_or(default)
    }

    /// One of the words of the parameter's list, for all models.
    pub fn word(&self, name: &str, default: &'static str) -> &'static str {
        self.round.word(name, self.tensor, self.t).unwrap_or(default)
    }

    /// The random numbers of each model on this tensor.
    pub fn streams(&self) -> Vec<Stream> {
        // A base that stands beside the models comes after all of them.
        self.models.iter().map(|m| Stream::new(self.seed, m.unwrap_or(usize::MAX), self.tensor)).collect()
    }
}

/// A method on one tensor, and what it reads: a starting point like the others.
#[derive(Debug, Clone)]
pub struct MethodStart {
    /// Its name.
    pub name: &'static str,
    /// Origin of the task vectors.
    pub base: Option<SourceId>,
    /// In the config's order.
    pub models: Vec<SourceId>,
    /// How it merges.
    pub method: Arc<dyn Elementwise>,
}

impl PartialEq for MethodStart {
    fn eq(&self, other: &Self) -> bool {
        (self.name, self.base, &self.models) == (other.name, other.base, &other.models)
            && Arc::ptr_eq(&self.method, &other.method)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Plain;

    impl Elementwise for Plain {
        fn merge(&self, _piece: &mut Piece<'_>, _known: &Known, _out: &mut [f32]) {}
    }

    #[test]
    fn scores_are_magnitudes_unless_a_method_says_otherwise() {
        let mut models = [1.0, -2.0, -0.5, 3.0];
        let piece = Piece::new(0, 2, &[], &mut models);
        let mut scores = [0.0; 2];
        Plain.scores(0, 1, &piece, &Known::default(), &mut scores);
        assert_eq!(scores, [0.5, 3.0]);
    }
}
