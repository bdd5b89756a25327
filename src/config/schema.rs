//! Owns the types of a parsed configuration and their words: what the rest of the crate reads. Filled by
//! `parse`; never touches YAML or the file system.

use std::path::PathBuf;

use super::parameters::{ParameterSpec, Parameters, Range};
use super::slices::SliceLayers;
use super::sweep::Sweep;
use super::tokenizer::{ChatTemplate, TokenizerConfig};
use crate::merge::elementwise::{BaseUse, Definition, METHODS};

/// A whole configuration, checked as far as that needs no tensor.
#[derive(Debug, Clone)]
pub struct MergeConfig {
    /// The file as it was named.
    pub path: PathBuf,
    /// The file's text, verbatim; copied to `merge_config.yml`.
    pub text: String,
    /// What relative paths are relative to: the config file's directory.
    pub directory: PathBuf,
    /// The user's handle of this merge (`name`); changes nothing.
    pub name: Option<String>,
    /// At least one, in the order given. May hold the base itself: methods on task vectors skip that entry.
    pub models: Vec<ModelEntry>,
    pub base_model: Option<ModelPath>,
    /// mergekit's working dtype; here, arithmetic being f32 or f64, the output's unless `out_dtype` is given.
    pub dtype: Option<OutDtype>,
    pub out_dtype: Option<OutDtype>,
    /// The outermost round; its `initial` may hold nested ones.
    pub round: Round,
    /// Several merges in one run; `round` is then the file without it.
    pub sweep: Option<Sweep>,
    /// How vocabularies are brought together; `None`: the base's tokenizer files are copied.
    pub tokenizer: Option<TokenizerConfig>,
    pub chat_template: Option<ChatTemplate>,
    /// The parts of `slices` or `modules`, in the order of the output; empty for `models`. Then `models` here has every
    /// model that is named, once, and `round` is the first section's.
    pub sections: Vec<Section>,
    /// What was accepted and should be known all the same, one line each.
    pub warnings: Vec<String>,
}

/// A part of the output that is merged on its own.
#[derive(Debug, Clone)]
pub struct Section {
    /// Its models, base and round; the parameters of slice, module and config are one there. Has no sections.
    pub config: MergeConfig,
    /// Whose tensors, by the module's name; `None`: the model's.
    pub module: Option<String>,
    /// `None`: whole models.
    pub layers: Option<SliceLayers>,
}

impl MergeConfig {
    /// The dtype of merged tensors: `out_dtype`, else `dtype`; `None` keeps each tensor's own.
    pub fn output_dtype(&self) -> Option<OutDtype> {
        self.out_dtype.or(self.dtype)
    }

    /// All rounds, innermost (carried out first) to outermost.
    pub fn rounds(&self) -> Vec<&Round> {
        let mut rounds = vec![&self.round];
        let mut round = &self.round;
        while let Initial::Nested(inner) = &round.initial {
            rounds.push(inner);
            round = inner;
        }
        rounds.reverse();
        rounds
    }
}

/// A checkpoint named in the config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPath {
    /// As written.
    pub written: String,
    /// Joined to the config's directory; existence is checked by whoever opens it.
    pub path: PathBuf,
    /// A PEFT adapter that is added to it, joined likewise.
    pub adapter: Option<PathBuf>,
    /// Line of the config, from 1.
    pub line: usize,
}

impl ModelPath {
    /// Whether both name one model, wherever they are written.
    pub fn same(&self, other: &Self) -> bool {
        self.path == other.path && self.adapter == other.adapter
    }
}

/// One item of `models`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelEntry {
    pub model: ModelPath,
    /// Statistics files, joined to the config's directory; empty if none are named.
    pub statistics: Vec<PathBuf>,
    pub line: usize,
}

/// One solve over all parameters, with the round that gives its start nested inside.
#[derive(Debug, Clone)]
pub struct Round {
    pub method: Method,
    /// A preset's fixed subspace; what was written (else `Auto`) under `mats`.
    pub subspace: Subspace,
    pub initial: Initial,
    pub solver: SolverConfig,
    /// A nested round's is the outer one's unless it sets its own.
    pub unmatched: Unmatched,
    /// This round's own `parameters`.
    pub parameters: Parameters,
    /// One for each model. In a nested round: the models' values of what its method knows and the round does
    /// not set.
    pub model_parameters: Vec<Parameters>,
    /// Line of the round's `merge_method`.
    pub line: usize,
}

impl Round {
    /// What stands in a config until its own round is read.
    pub(super) fn placeholder() -> Self {
        Self {
            method: Method::Linear,
            subspace: Subspace::Auto,
            initial: Initial::Auto,
            solver: SolverConfig {
                method: SolverMethod::Auto,
                preconditioner: None,
                max_iterations: None,
                tolerance: None,
                ridge: None,
                stop: None,
                line: 0,
            },
            unmatched: Unmatched::Average,
            parameters: Parameters::default(),
            model_parameters: Vec::new(),
            line: 0,
        }
    }

    /// The number `name` for one tensor: the model's value, else this round's own, else `None`: the caller's
    /// default applies. A filter list without a match counts as not given.
    ///
    /// - `model`: index into `models`; `None` for parameters of the round as a whole.
    /// - `t`: position of the tensor's layer, 0 (first, and whatever stands outside the layers) to 1 (last).
    pub fn number(&self, model: Option<usize>, name: &str, tensor: &str, t: f64) -> Option<f64> {
        self.of_model(model)
            .and_then(|own| own.number(name, tensor, t))
            .or_else(|| self.parameters.number(name, tensor, t))
    }

    /// As [`Round::number`], of a true-or-false parameter.
    pub fn boolean(&self, model: Option<usize>, name: &str, tensor: &str, t: f64) -> Option<bool> {
        self.of_model(model)
            .and_then(|own| own.boolean(name, tensor, t))
            .or_else(|| self.parameters.boolean(name, tensor, t))
    }

    /// As [`Round::boolean`], of a parameter that takes one of several words, for all models.
    pub fn word(&self, name: &str, tensor: &str, t: f64) -> Option<&'static str> {
        self.parameters.word(name, tensor, t)
    }

    /// Weight of a model for one tensor; 1.0 unless given.
    pub fn weight(&self, model: usize, tensor: &str, t: f64) -> f64 {
        self.number(Some(model), "weight", tensor, t).unwrap_or(1.0)
    }

    /// Factor λ of the off-diagonal entries of a model's Cᵢ, in [0, 1]; 1.0 unless given.
    pub fn off_diagonal(&self, model: usize, tensor: &str, t: f64) -> f64 {
        self.number(Some(model), "off_diagonal", tensor, t).unwrap_or(1.0)
    }

    /// Factor of a model's values (`passthrough`); 1.0 unless given.
    pub fn scale(&self, model: usize, tensor: &str, t: f64) -> f64 {
        self.number(Some(model), "scale", tensor, t).unwrap_or(1.0)
    }

    /// Scale of the summed task vectors (`task_arithmetic`); 1.0 unless given.
    pub fn lambda(&self, tensor: &str, t: f64) -> f64 {
        self.number(None, "lambda", tensor, t).unwrap_or(1.0)
    }

    /// Whether the factors of adapters are merged side by side for one tensor; their products unless asked for.
    pub fn factor_space(&self, tensor: &str, t: f64) -> bool {
        self.word("space", tensor, t) == Some("factor")
    }

    /// Whether weights are divided by their sum: true for `linear`, false for `task_arithmetic` unless given.
    pub fn normalize(&self, tensor: &str, t: f64) -> bool {
        self.boolean(None, "normalize", tensor, t).unwrap_or(self.method == Method::Linear)
    }

    /// The ridge ρ in force once the engine knows which solver it uses: the one given, else 0.3 for `wudi`
    /// and `actmat`, 0.1 for `pcg`, 0 for the rest.
    pub fn ridge(&self, solver: SolverMethod) -> f64 {
        self.solver.ridge_or(match (self.method, solver) {
            (Method::Wudi | Method::Actmat, _) => TASK_VECTOR_RIDGE,
            (_, SolverMethod::Pcg) => PCG_RIDGE,
            _ => 0.0,
        })
    }

    /// Whether the entry of `models` that is the base itself carries no information (its task vector is
    /// zero).
    pub fn skips_base(&self) -> bool {
        match self.method {
            Method::Elementwise(definition) => definition.base != BaseUse::Model,
            method => method == Method::TaskArithmetic || matches!(self.subspace, Subspace::DeltaGram(_)),
        }
    }

    fn of_model(&self, model: Option<usize>) -> Option<&Parameters> {
        model.and_then(|i| self.model_parameters.get(i))
    }
}

/// Default ridge of `wudi` and `actmat`.
pub const TASK_VECTOR_RIDGE: f64 = 0.3;
/// Default ridge of `pcg`.
pub const PCG_RIDGE: f64 = 0.1;

/// An enum whose variants are words of the config.
pub(super) trait Words: Sized + Copy + 'static {
    const WORDS: &'static [(&'static str, Self)];
}

macro_rules! words {
    ($type:ty { $($word:literal => $variant:expr),+ $(,)? }) => {
        impl Words for $type {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, $variant)),+];
        }
        impl $type {
            /// The word the config uses.
            pub fn name(self) -> &'static str {
                Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
            }
        }
    };
}

/// `dtype`, `out_dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutDtype {
    Float32,
    Float16,
    Bfloat16,
    Float64,
}

words!(OutDtype {
    "float32" => Self::Float32,
    "float16" => Self::Float16,
    "bfloat16" => Self::Bfloat16,
    "float64" => Self::Float64,
});

/// `merge_method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Linear,
    TaskArithmetic,
    Passthrough,
    Fisher,
    Regmean,
    Wudi,
    Actmat,
    Mats,
    /// One of [`METHODS`], or one that the caller brought.
    Elementwise(&'static Definition),
}

/// Methods of their own kind; `merge::elementwise` has the rest.
const SOLVING: [(&str, Method); 8] = [
    ("linear", Method::Linear),
    ("task_arithmetic", Method::TaskArithmetic),
    ("passthrough", Method::Passthrough),
    ("fisher", Method::Fisher),
    ("regmean", Method::Regmean),
    ("wudi", Method::Wudi),
    ("actmat", Method::Actmat),
    ("mats", Method::Mats),
];

impl Method {
    /// Every method and its word, `extra` ones first.
    pub(super) fn words(extra: &[&'static Definition]) -> Vec<(&'static str, Self)> {
        let elementwise = extra.iter().chain(&METHODS).map(|d| (d.name, Self::Elementwise(d)));
        SOLVING.into_iter().chain(elementwise).collect()
    }

    /// The word the config uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Elementwise(definition) => definition.name,
            method => SOLVING.iter().find(|(_, m)| *m == method).map_or("", |(word, _)| word),
        }
    }

    /// Whether it solves a system (Σ wᵢ Cᵢ) θ = Σ wᵢ Cᵢ θᵢ, so that `initial`, `solver` and `off_diagonal`
    /// mean something and weights must not be negative.
    pub fn solves(self) -> bool {
        !matches!(self, Self::Linear | Self::TaskArithmetic | Self::Passthrough | Self::Elementwise(_))
    }

    /// Whether it cannot do without `base_model`, whatever the subspace.
    pub fn needs_base(self) -> bool {
        match self {
            Self::Elementwise(definition) => definition.base == BaseUse::Required,
            _ => matches!(self, Self::TaskArithmetic | Self::Wudi | Self::Actmat),
        }
    }

    /// The Cᵢ that the method's name stands for; `None` for `mats`, which has it from `subspace`. Task
    /// arithmetic weighs all directions alike.
    pub fn fixed_subspace(self) -> Option<Subspace> {
        match self {
            Self::Linear | Self::TaskArithmetic | Self::Passthrough | Self::Elementwise(_) => {
                Some(Subspace::Identity)
            }
            Self::Fisher => Some(Subspace::FisherDiagonal),
            Self::Regmean => Some(Subspace::Gram),
            Self::Wudi => Some(Subspace::DeltaGram(DeltaScale::InverseSquaredNorm)),
            Self::Actmat => Some(Subspace::DeltaGram(DeltaScale::One)),
            Self::Mats => None,
        }
    }

    /// The names that `parameters` may hold.
    pub(super) fn parameters(self) -> &'static [ParameterSpec] {
        // Whether adapters are merged as the weights' changes that they stand for, or factor by factor.
        const SPACE: ParameterSpec = ParameterSpec::word("space", &["delta", "factor"]);
        const LINEAR: &[ParameterSpec] = &[
            ParameterSpec::number("weight", Range::Any).per_model(),
            ParameterSpec::boolean("normalize"),
            SPACE,
        ];
        const TASK_ARITHMETIC: &[ParameterSpec] = &[
            ParameterSpec::number("weight", Range::Any).per_model(),
            ParameterSpec::boolean("normalize"),
            ParameterSpec::number("lambda", Range::Any),
            // mergekit takes them here too, where nothing is thinned: published configs have them.
            ParameterSpec::number("density", Range::Unit).per_model(),
            ParameterSpec::boolean("rescale"),
            ParameterSpec::boolean("int8_mask"),
            SPACE,
        ];
        const SOLVED: &[ParameterSpec] = &[
            ParameterSpec::number("weight", Range::NonNegative).per_model(),
            ParameterSpec::number("off_diagonal", Range::Unit).per_model(),
        ];
        const PASSTHROUGH: &[ParameterSpec] = &[ParameterSpec::number("scale", Range::Any).per_model()];
        match self {
            Self::Passthrough => PASSTHROUGH,
            Self::Linear => LINEAR,
            Self::TaskArithmetic => TASK_ARITHMETIC,
            Self::Elementwise(definition) => definition.parameters,
            _ => SOLVED,
        }
    }
}

/// Which Cᵢ weighs a model's directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subspace {
    /// For each parameter the best its statistics allow: fisher_block, kfac, gram, fisher_diagonal, else
    /// unmatched.
    Auto,
    Identity,
    FisherDiagonal,
    Gram,
    Kfac,
    FisherBlock,
    DeltaGram(DeltaScale),
}

impl Words for Subspace {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("identity", Self::Identity),
        ("fisher_diagonal", Self::FisherDiagonal),
        ("gram", Self::Gram),
        ("kfac", Self::Kfac),
        ("fisher_block", Self::FisherBlock),
        ("delta_gram", Self::DeltaGram(DeltaScale::InverseSquaredNorm)),
    ];
}

impl Subspace {
    /// The word the config uses; `delta_gram` whatever its scale.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Identity => "identity",
            Self::FisherDiagonal => "fisher_diagonal",
            Self::Gram => "gram",
            Self::Kfac => "kfac",
            Self::FisherBlock => "fisher_block",
            Self::DeltaGram(_) => "delta_gram",
        }
    }

    /// Whether it cannot do without statistics files. `Auto` can: then every parameter is unmatched.
    pub fn needs_statistics(self) -> bool {
        matches!(self, Self::FisherDiagonal | Self::Gram | Self::Kfac | Self::FisherBlock)
    }
}

/// Scale of τᵢᵀτᵢ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaScale {
    /// 1/‖τᵢ‖², as `wudi`; also `subspace: delta_gram`'s.
    InverseSquaredNorm,
    /// 1, as `actmat`.
    One,
}

impl DeltaScale {
    pub fn name(self) -> &'static str {
        match self {
            Self::InverseSquaredNorm => "inverse_squared_norm",
            Self::One => "one",
        }
    }
}

/// `initial`: where a solve starts, and what it keeps in the null space.
#[derive(Debug, Clone)]
pub enum Initial {
    /// Not given. `mats`: `iso_ridge` for 2-D weights with a Gram or K-FAC system where there is a base, else the
    /// average; `wudi`, `actmat` and `delta_gram`: base + Σ τᵢ; `regmean` and `fisher`: the average. Resolved by the
    /// engine, parameter by parameter.
    Auto,
    Zero,
    /// Plain mean of the models; weights do not enter.
    Average,
    Base,
    Checkpoint(ModelPath),
    /// The result of another round.
    Nested(Box<Round>),
}

impl Initial {
    /// The word the config uses; `checkpoint` and `nested` where it uses a path or a mapping.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Zero => "zero",
            Self::Average => "average",
            Self::Base => "base",
            Self::Checkpoint(_) => "checkpoint",
            Self::Nested(_) => "nested",
        }
    }
}

/// `solver`. What is `None` was not given; the defaults depend on the method the engine settles on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SolverConfig {
    /// `Auto` unless given; `Direct` for `wudi` and `actmat`.
    pub method: SolverMethod,
    /// Only with `Pcg`.
    pub preconditioner: Option<PreconditionerKind>,
    /// At most [`SolverConfig::MAX_ITERATIONS`].
    pub max_iterations: Option<usize>,
    /// Finite, ≥ 0.
    pub tolerance: Option<f64>,
    /// Finite, ≥ 0.
    pub ridge: Option<f64>,
    /// Only with `Pcg`; in the place of `tolerance`.
    pub stop: Option<StopConfig>,
    /// Line of `solver`, or of the round where it is not given.
    pub line: usize,
}

/// `solver.stop`: rules beside `max_iterations`, of which the first that fires ends the solve. At least one is given; all
/// finite, ≥ 0.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StopConfig {
    /// A step's decrease of the objective, relative to all so far.
    pub objective_decrease: Option<f64>,
    /// `√⟨r, M⁻¹r⟩`, relative to its start.
    pub preconditioned_residual: Option<f64>,
    /// `‖r‖`, relative to `‖b‖`.
    pub relative_residual: Option<f64>,
    /// Wall time of one parameter: the result then depends on the machine.
    pub seconds: Option<f64>,
}

impl SolverConfig {
    /// Largest `max_iterations` accepted.
    pub const MAX_ITERATIONS: usize = 1_000_000;

    /// The iteration limit given, else `default` (`cg`: 100, `pcg`: 20).
    pub fn max_iterations_or(&self, default: usize) -> usize {
        self.max_iterations.unwrap_or(default)
    }

    /// The tolerance given, else `default` (`cg`: 1e-5 of ‖b‖; `pcg`: 1e-3 of the objective's decrease so
    /// far).
    pub fn tolerance_or(&self, default: f64) -> f64 {
        self.tolerance.unwrap_or(default)
    }

    /// The ridge given, else `default`; see [`Round::ridge`].
    pub fn ridge_or(&self, default: f64) -> f64 {
        self.ridge.unwrap_or(default)
    }
}

/// `solver.method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SolverMethod {
    Auto,
    Cg,
    Pcg,
    Direct,
}

words!(SolverMethod {
    "auto" => Self::Auto,
    "cg" => Self::Cg,
    "pcg" => Self::Pcg,
    "direct" => Self::Direct,
});

/// `solver.preconditioner`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreconditionerKind {
    None,
    Jacobi,
    Kronecker,
    KroneckerCholesky,
    Generalized,
    Hybrid,
}

words!(PreconditionerKind {
    "none" => Self::None,
    "jacobi" => Self::Jacobi,
    "kronecker" => Self::Kronecker,
    "kronecker_cholesky" => Self::KroneckerCholesky,
    "generalized" => Self::Generalized,
    "hybrid" => Self::Hybrid,
});

/// `unmatched`: what becomes of a parameter without the statistics its subspace needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmatched {
    /// Plain mean of the models; weights do not enter.
    Average,
    Base,
    Error,
}

words!(Unmatched {
    "average" => Self::Average,
    "base" => Self::Base,
    "error" => Self::Error,
});
