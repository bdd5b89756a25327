//! From a config's rounds to the recipe of one tensor: presets, defaults, what its statistics allow.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::elementwise::{Arguments, BaseUse, Definition, MethodStart, iso_ridge};
use super::{
    GramKind, Inputs, Iteration, MergeError, Recipe, Solve, SolveModel, SolverChoice, SourceId, Start, System,
};
use crate::config::{
    Initial, MergeConfig, Method, PreconditionerKind, Round, SolverMethod, StopConfig, Subspace, Unmatched,
};
use crate::operator::BlockShape;
use crate::precond::{KroneckerKind, cost};
use crate::read::TensorMeta;
use crate::statistics::{Form, Kind};
use crate::view::names::is_embedding;
use crate::view::{View, layer_of};

/// The paper's floor under each model's diagonal Fisher in the closed form.
const FISHER_FLOOR: f64 = 1e-8;
/// Iterations and relative tolerance of plain CG where the config names none: the paper's.
const CG_DEFAULTS: (usize, f64) = (100, 1e-5);
/// Iterations and relative objective decrease of preconditioned CG where the config names none.
const PCG_DEFAULTS: (usize, f64) = (20, 1e-3);
/// Ridge that `auto` folds into the exact two-model K-FAC solve: that of `pcg`, which it stands for.
const TWO_MODEL_RIDGE: f64 = crate::config::PCG_RIDGE;

/// What an exact two-model solve may take at most for `auto` to choose it: some seconds of f64. Weights of 384 × 384 are below.
const CHEAP_FLOPS: f64 = 2e11;

/// Where a tensor's layer lies between the first (0) and the last (1), for per-layer gradients.
#[derive(Debug, Clone, Default)]
pub struct LayerPosition {
    /// The first layer's number in the output.
    first: usize,
    layers: usize,
    /// Layers by the stack they are in (`encoder.block.`), where there are several: each has its own first and last.
    stacks: BTreeMap<String, usize>,
}

impl LayerPosition {
    /// Counts layers: from config.json where it says so, else from the numbers in the tensors' names; of several stacks
    /// (encoder and decoder, a vision tower), each from the names.
    pub fn of(checkpoint: &View) -> Self {
        const KEYS: [&str; 5] = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_layer"];
        let stated = checkpoint.config().and_then(|config| {
            let own = |config: &serde_json::Value| KEYS.iter().find_map(|k| config.get(k)?.as_u64());
            own(config).or_else(|| config.get("text_config").and_then(own))
        });
        let counted = Self::counted(checkpoint);
        Self { layers: stated.map_or(counted.layers, |n| n as usize), ..counted }
    }

    /// Counts layers by the numbers in the tensors' names.
    pub fn counted(checkpoint: &View) -> Self {
        let mut stacks: BTreeMap<String, usize> = BTreeMap::new();
        for (name, _) in checkpoint.tensors() {
            let Some((at, layer)) = layer_of(&name) else { continue };
            let stack = &name[..at.start];
            match stacks.get_mut(stack) {
                Some(layers) => *layers = (*layers).max(layer + 1),
                None => drop(stacks.insert(stack.to_owned(), layer + 1)),
            }
        }
        let layers = stacks.values().copied().max().unwrap_or(0);
        if stacks.len() <= 1 {
            stacks.clear();
        }
        Self { first: 0, layers, stacks }
    }

    /// Those of a slice: a gradient runs over each slice anew, as in mergekit.
    pub fn of_slice(output: std::ops::Range<usize>) -> Self {
        Self { first: output.start, layers: output.len(), ..Self::default() }
    }

    /// 0 for tensors outside the layers, 1 where there is one layer, as mergekit.
    pub fn of_tensor(&self, name: &str) -> f64 {
        let Some((at, layer)) = layer_of(name) else { return 0.0 };
        match self.stacks.get(&name[..at.start]).copied().unwrap_or(self.layers) {
            ..=1 => 1.0,
            layers => (layer.saturating_sub(self.first) as f64 / (layers - 1) as f64).min(1.0),
        }
    }
}

/// A recipe and what a user should know about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolution {
    /// What will be done.
    pub recipe: Recipe,
    /// Why the config's method does not apply, where it does not.
    pub unmatched: Option<String>,
}

/// Decides what is done to the float tensor `name`, which every model has in the reference's shape.
///
/// # Errors
/// [`MergeError`] where weights divide by zero, `unmatched: error` hits, or a solver does not fit.
pub fn resolve(
    config: &MergeConfig,
    inputs: &Inputs,
    meta: &TensorMeta,
    layers: &LayerPosition,
) -> Result<Resolution, MergeError> {
    let t = layers.of_tensor(&meta.name);
    let mut resolver = Resolver { inputs, meta, t, outermost: true, unmatched: None };
    let mut recipe = resolver.round(&config.round)?;
    recipe.method = config.round.method.name();
    if resolver.unmatched.is_some() {
        recipe.method = match config.round.unmatched {
            Unmatched::Average | Unmatched::Error => "average",
            Unmatched::Base => "base",
        };
    }
    Ok(Resolution { recipe, unmatched: resolver.unmatched })
}

struct Resolver<'a> {
    inputs: &'a Inputs,
    meta: &'a TensorMeta,
    t: f64,
    /// In the config's own round, not in one that it starts from.
    outermost: bool,
    /// Set by the outermost round only: inner rounds that do not match average silently, as their own result.
    unmatched: Option<String>,
}

impl Resolver<'_> {
    fn name(&self) -> &str {
        &self.meta.name
    }

    /// Its name in one of the models.
    fn name_in(&self, source: SourceId) -> Cow<'_, str> {
        self.inputs.name_in(source, self.name())
    }

    fn round(&mut self, round: &Round) -> Result<Recipe, MergeError> {
        match round.method {
            Method::Linear => Ok(start(self.linear(round)?)),
            Method::TaskArithmetic => Ok(start(self.task_arithmetic(round)?)),
            Method::Passthrough => Ok(start(self.passthrough(round))),
            Method::Elementwise(definition) => Ok(start(self.elementwise(round, definition)?)),
            _ => self.solved(round),
        }
    }

    /// What the adapters' factors make of the tensor, where they are merged side by side and change it.
    fn factors(&self) -> Option<Start> {
        let source = self.inputs.factors?;
        let view = &self.inputs.checkpoints[source];
        view.get(self.name()).filter(|meta| !view.is_stored(meta)).map(|_| Start::Copy(source))
    }

    fn linear(&self, round: &Round) -> Result<Start, MergeError> {
        if let Some(start) = self.factors() {
            return Ok(start);
        }
        let mut terms: Vec<_> = self
            .inputs
            .models
            .iter()
            .enumerate()
            .map(|(i, m)| (m.source, round.weight(i, &self.name_in(m.source), self.t)))
            .collect();
        // As in mergekit, a base that is none of the models is one more, with the weight that is given for all.
        if self.outermost
            && let Some(base) = self.inputs.base.filter(|base| terms.iter().all(|t| t.0 != *base))
            && let Some(weight) = round.number(None, "weight", &self.name_in(base), self.t)
        {
            terms.push((base, weight));
        }
        let sum: f64 = terms.iter().map(|t| t.1).sum();
        let divisor = if round.normalize(self.name(), self.t) { sum } else { 1.0 };
        self.divides(divisor, &terms)?;
        Ok(Start::Mean { terms, divisor })
    }

    fn task_arithmetic(&self, round: &Round) -> Result<Start, MergeError> {
        if let Some(start) = self.factors() {
            return Ok(start);
        }
        let base = self.base();
        let terms: Vec<_> = self
            .inputs
            .models
            .iter()
            .enumerate()
            .filter(|(_, m)| m.source != base)
            .map(|(i, m)| (m.source, round.weight(i, &self.name_in(m.source), self.t)))
            .collect();
        let sum: f64 = terms.iter().map(|t| t.1).sum();
        let divisor = if round.normalize(self.name(), self.t) { sum } else { 1.0 };
        self.divides(divisor, &terms)?;
        Ok(Start::TaskVectors { base, terms, scale: round.lambda(self.name(), self.t) / divisor })
    }

    /// One model's values, or a multiple of them.
    fn passthrough(&self, round: &Round) -> Start {
        let source = self.inputs.models[0].source;
        match round.scale(0, &self.name_in(source), self.t) {
            1.0 => Start::Copy(source),
            scale => Start::Mean { terms: vec![(source, scale)], divisor: 1.0 },
        }
    }

    fn elementwise(&self, round: &Round, definition: &'static Definition) -> Result<Start, MergeError> {
        let (inputs, base) = (self.inputs, self.inputs.base);
        let origin = base.filter(|_| definition.base != BaseUse::Model);
        let mut models: Vec<(Option<usize>, SourceId)> = inputs
            .models
            .iter()
            .enumerate()
            .filter(|(_, m)| origin != Some(m.source))
            .map(|(i, m)| (Some(i), m.source))
            .collect();
        let mut base_model = None;
        if definition.base == BaseUse::Model
            && let Some(base) = base
        {
            base_model = Some(models.iter().position(|m| m.1 == base).unwrap_or_else(|| {
                models.push((None, base));
                models.len() - 1
            }));
        }
        let places: Vec<Option<usize>> = models.iter().map(|m| m.0).collect();
        let names: Vec<Cow<'_, str>> = models.iter().map(|m| self.name_in(m.1)).collect();
        let arguments = Arguments {
            round,
            tensor: self.name(),
            t: self.t,
            models: &places,
            names: &names,
            has_base: origin.is_some(),
            base_model,
            shape: &self.meta.shape,
            seed: inputs.seed,
        };
        let refused = |reason| MergeError::Parameters {
            tensor: self.name().to_owned(),
            method: definition.name,
            reason,
        };
        // Two paths of one directory are one model, which the config could not see.
        if !(definition.models.0..=definition.models.1).contains(&models.len()) {
            return Err(refused(format!(
                "got {} different models, expected {} to {}",
                models.len(),
                definition.models.0,
                definition.models.1
            )));
        }
        let method = (definition.build)(&arguments).map_err(refused)?;
        Ok(Start::Method(MethodStart {
            name: definition.name,
            base: origin,
            models: models.into_iter().map(|m| m.1).collect(),
            method: Arc::from(method),
        }))
    }

    fn divides(&self, divisor: f64, terms: &[(SourceId, f64)]) -> Result<(), MergeError> {
        // Weights that cancel to rounding noise would blow every value up, too.
        let size: f64 = terms.iter().map(|t| t.1.abs()).sum();
        if divisor.abs() <= 1e-12 * size || divisor == 0.0 {
            return Err(MergeError::ZeroWeights {
                tensor: self.name().to_owned(),
                weights: terms.iter().map(|t| t.1).collect(),
            });
        }
        Ok(())
    }

    fn base(&self) -> SourceId {
        self.inputs.base.expect("the config requires base_model where a round needs it")
    }

    fn average(&self) -> Start {
        let terms: Vec<_> = self.inputs.models.iter().map(|m| (m.source, 1.0)).collect();
        let divisor = terms.len() as f64;
        Start::Mean { terms, divisor }
    }

    fn sum_of_task_vectors(&self) -> Start {
        let base = self.base();
        let terms = self.inputs.models.iter().filter(|m| m.source != base).map(|m| (m.source, 1.0)).collect();
        Start::TaskVectors { base, terms, scale: 1.0 }
    }

    fn solved(&mut self, round: &Round) -> Result<Recipe, MergeError> {
        let base = self.inputs.base;
        let mut models = Vec::new();
        let mut weights = Vec::new();
        for (i, m) in self.inputs.models.iter().enumerate() {
            if round.skips_base() && Some(m.source) == base {
                continue;
            }
            let name = self.name_in(m.source);
            let weight = round.weight(i, &name, self.t);
            weights.push(weight);
            if weight > 0.0 {
                let off_diagonal = round.off_diagonal(i, &name, self.t);
                models.push(SolveModel { model: i, source: m.source, weight, off_diagonal });
            }
        }
        if models.is_empty() {
            return Err(MergeError::ZeroWeights { tensor: self.name().to_owned(), weights });
        }
        match self.system(round.subspace, &models)? {
            Err(reason) => {
                self.unmatched = Some(reason.clone());
                match round.unmatched {
                    Unmatched::Average => Ok(start(self.average())),
                    Unmatched::Base => Ok(start(Start::Copy(self.base()))),
                    Unmatched::Error => Err(MergeError::Unmatched { tensor: self.name().to_owned(), reason }),
                }
            }
            Ok(system) => {
                let outer = self.unmatched.take();
                let mut recipe = self.initial(round, system)?;
                // An inner round that averages this tensor is a start like any other.
                self.unmatched = outer;
                let solve = self.solve(round, system, models)?;
                recipe.solves.push(solve);
                Ok(recipe)
            }
        }
    }

    fn initial(&mut self, round: &Round, system: System) -> Result<Recipe, MergeError> {
        let nested;
        let inner = match &round.initial {
            Initial::Auto => match round.method {
                Method::Wudi | Method::Actmat => return Ok(start(self.sum_of_task_vectors())),
                Method::Mats
                    if self.inputs.base.is_some() && !matches!(round.subspace, Subspace::DeltaGram(_)) =>
                {
                    let models = self.task_vector_models();
                    // A diagonal system keeps nothing of its start but where it has no information.
                    let diagonal = matches!(system, System::Identity | System::FisherDiagonal);
                    if diagonal || models.is_empty() || self.delta_reason().is_some() {
                        return Ok(start(self.average()));
                    }
                    return Ok(start(Start::Method(MethodStart {
                        name: iso_ridge::DEFINITION.name,
                        base: self.inputs.base,
                        method: Arc::from(iso_ridge::start(models.len())),
                        models,
                    })));
                }
                Method::Mats if self.inputs.base.is_some() => return Ok(start(self.sum_of_task_vectors())),
                _ => return Ok(start(self.average())),
            },
            Initial::Zero => return Ok(start(Start::Zero)),
            Initial::Average => return Ok(start(self.average())),
            Initial::Base => return Ok(start(Start::Copy(self.base()))),
            Initial::Checkpoint(model) => return self.checkpoint(model),
            Initial::Nested(inner) => {
                nested = inner;
                nested
            }
        };
        let outer = std::mem::replace(&mut self.outermost, false);
        let recipe = self.round(inner);
        self.outermost = outer;
        recipe
    }

    fn checkpoint(&self, model: &crate::config::ModelPath) -> Result<Recipe, MergeError> {
        let source = self.inputs.initials[&model.path];
        let got = self.inputs.tensor(source, self.name());
        if got.is_none_or(|got| got.shape != self.meta.shape || !got.dtype.is_float()) {
            return Err(MergeError::Missing {
                model: model.written.clone(),
                tensor: self.name().to_owned(),
                got: got.map_or_else(|| "none".to_owned(), |got| format!("{} {:?}", got.dtype, got.shape)),
                expected: self.meta.shape.clone(),
            });
        }
        Ok(start(Start::Copy(source)))
    }

    fn task_vector_models(&self) -> Vec<SourceId> {
        let base = self.base();
        self.inputs.models.iter().map(|m| m.source).filter(|source| *source != base).collect()
    }

    /// The system that the tensor's statistics allow, or why there is none.
    fn system(
        &self,
        subspace: Subspace,
        models: &[SolveModel],
    ) -> Result<Result<System, String>, MergeError> {
        Ok(match subspace {
            Subspace::Identity => Ok(System::Identity),
            Subspace::DeltaGram(scale) => match self.delta_reason() {
                None => Ok(System::Gram(GramKind::Delta { base: self.base(), scale })),
                Some(reason) => Err(reason),
            },
            Subspace::FisherDiagonal => self.fisher_diagonal(models)?,
            Subspace::FisherBlock => self.fisher_block(models)?,
            Subspace::Gram => self.gram(models)?,
            Subspace::Kfac => self.kfac(models)?,
            Subspace::Auto => {
                let mut reasons = Vec::new();
                for attempt in [Self::fisher_block, Self::kfac, Self::gram, Self::fisher_diagonal] {
                    match attempt(self, models)? {
                        Ok(system) => return Ok(Ok(system)),
                        Err(reason) => reasons.push(reason),
                    }
                }
                // The last is the least demanding.
                Err(reasons.pop().unwrap_or_default())
            }
        })
    }

    /// Why a data-free Gram does not apply.
    fn delta_reason(&self) -> Option<String> {
        if self.meta.shape.len() != 2 || self.meta.elements() == 0 {
            Some("not a 2-D weight".to_owned())
        } else if is_embedding(self.name()) {
            Some("an embedding".to_owned())
        } else {
            None
        }
    }

    /// The name of the first model that lacks all of `kinds`.
    fn lacking(&self, models: &[SolveModel], kinds: &[Kind]) -> Option<String> {
        models.iter().map(|m| &self.inputs.models[m.model]).find_map(|model| {
            let has = model
                .statistics
                .as_ref()
                .is_some_and(|s| kinds.iter().any(|kind| s.get(self.name(), *kind).is_some()));
            (!has).then(|| format!("`{}` has no {}", model.written, kinds[0].name()))
        })
    }

    fn check_side(&self, models: &[SolveModel], kinds: &[Kind], side: usize) -> Result<(), MergeError> {
        for model in models {
            let statistics = self.inputs.models[model.model].statistics.as_ref();
            for kind in kinds {
                if let Some((s, found)) = statistics.and_then(|s| Some((s, s.get(self.name(), *kind)?))) {
                    if matches!(found.form, Form::Dense) {
                        s.expect_shape(found, self.name(), &self.meta.shape)?;
                    } else {
                        s.expect_side(found, self.name(), side)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn fisher_diagonal(&self, models: &[SolveModel]) -> Result<Result<System, String>, MergeError> {
        let kinds = [Kind::FisherDiagonal];
        if let Some(reason) = self.lacking(models, &kinds) {
            return Ok(Err(reason));
        }
        self.check_side(models, &kinds, 0)?;
        Ok(Ok(System::FisherDiagonal))
    }

    fn fisher_block(&self, models: &[SolveModel]) -> Result<Result<System, String>, MergeError> {
        let kinds = [Kind::FisherBlock];
        if let Some(reason) = self.lacking(models, &kinds) {
            return Ok(Err(reason));
        }
        self.check_side(models, &kinds, self.meta.elements() as usize)?;
        Ok(Ok(System::Gram(GramKind::FisherBlock)))
    }

    fn gram(&self, models: &[SolveModel]) -> Result<Result<System, String>, MergeError> {
        if let Err(reason) = self.columns(models)? {
            return Ok(Err(reason));
        }
        // A weight stored [in, out] has its sides named as stored: what stands on its columns is no input.
        let layout = format!("layout:{}", self.name());
        let transposed = |m: &SolveModel| {
            let statistics = self.inputs.models[m.model].statistics.as_ref();
            statistics.and_then(|s| s.metadata().get(&layout)).is_some_and(|l| l == "in,out")
        };
        if models.iter().any(transposed) {
            let reason = "stored [in, out]: its columns are outputs, of which RegMean knows nothing";
            return Ok(Err(reason.to_owned()));
        }
        Ok(Ok(System::Gram(GramKind::Input)))
    }

    /// Whether every model has the factor of the weight's columns.
    fn columns(&self, models: &[SolveModel]) -> Result<Result<(), String>, MergeError> {
        let kinds = [Kind::InputGram, Kind::InputFactor];
        if let Some(reason) = self.lacking(models, &kinds) {
            return Ok(Err(reason));
        }
        let [_, input] = self.meta.shape[..] else { return Ok(Err("not a 2-D weight".to_owned())) };
        self.check_side(models, &kinds, input)?;
        Ok(Ok(()))
    }

    fn kfac(&self, models: &[SolveModel]) -> Result<Result<System, String>, MergeError> {
        if let Err(reason) = self.columns(models)? {
            return Ok(Err(reason));
        }
        let kinds = [Kind::OutputGram, Kind::OutputFactor];
        if let Some(reason) = self.lacking(models, &kinds) {
            return Ok(Err(reason));
        }
        self.check_side(models, &kinds, self.meta.shape[0])?;
        Ok(Ok(System::Kfac))
    }

    fn solve(&self, round: &Round, system: System, models: Vec<SolveModel>) -> Result<Solve, MergeError> {
        let auto = round.solver.method == SolverMethod::Auto;
        let direct = match round.solver.method {
            SolverMethod::Direct => true,
            SolverMethod::Cg | SolverMethod::Pcg => false,
            // Exact and cheap. A vector's full Fisher block goes with K-FAC to the ridged solver: solving it to the end
            // was measured to lose most of the accuracy (paper, figure 3).
            SolverMethod::Auto => match system {
                System::Identity | System::FisherDiagonal => true,
                System::Gram(kind) => kind != GramKind::FisherBlock,
                System::Kfac => models.len() <= 2 && self.two_models_are_cheap(round),
            },
        };
        if direct && system == System::Kfac && models.len() > 2 {
            return Err(MergeError::NotDirect { tensor: self.name().to_owned(), models: models.len() });
        }
        let method = match round.solver.method {
            SolverMethod::Auto if direct => SolverMethod::Direct,
            SolverMethod::Auto => SolverMethod::Pcg,
            given => given,
        };
        let mut ridge = round.ridge(method);
        if auto && direct && system == System::Kfac {
            ridge = round.solver.ridge_or(TWO_MODEL_RIDGE);
        }
        let solver = if direct {
            SolverChoice::Direct
        } else {
            let pcg = method == SolverMethod::Pcg;
            let (iterations, tolerance) = if pcg { PCG_DEFAULTS } else { CG_DEFAULTS };
            let max_iterations = round.solver.max_iterations_or(iterations);
            let tolerance = Some(round.solver.tolerance_or(tolerance));
            let default = match pcg {
                true => StopConfig { objective_decrease: tolerance, ..StopConfig::default() },
                false => StopConfig { relative_residual: tolerance, ..StopConfig::default() },
            };
            SolverChoice::Iterative(Iteration {
                preconditioner: pcg.then(|| {
                    let preferred = || self.preconditioner(system, models.len(), max_iterations, ridge);
                    round.solver.preconditioner.unwrap_or_else(preferred)
                }),
                max_iterations,
                stop: round.solver.stop.unwrap_or(default),
            })
        };
        let floor = if direct && round.method == Method::Fisher { FISHER_FLOOR } else { 0.0 };
        Ok(Solve { system, models, solver, ridge, floor })
    }

    /// Whether K-FAC of two models is solved to the end in about the time of `pcg`'s few steps. Of real factors the three
    /// terms that a ridge makes take a hundred steps in f64: for large weights that is many times the cost.
    fn two_models_are_cheap(&self, round: &Round) -> bool {
        let shape = BlockShape::new(
            self.meta.shape.first().copied().unwrap_or(1),
            self.meta.shape.iter().skip(1).product(),
        );
        round.solver.ridge_or(TWO_MODEL_RIDGE) == 0.0 || super::two_term_flops(shape, true) <= CHEAP_FLOPS
    }

    /// The preconditioner of a `pcg` that names none.
    fn preconditioner(
        &self,
        system: System,
        models: usize,
        max_iterations: usize,
        ridge: f64,
    ) -> PreconditionerKind {
        let [out, input] = self.meta.shape[..] else { return PreconditionerKind::Kronecker };
        match system {
            System::Kfac => match cost::preferred(BlockShape::new(out, input), models, max_iterations, ridge)
            {
                KroneckerKind::Cholesky => PreconditionerKind::KroneckerCholesky,
                _ => PreconditionerKind::Kronecker,
            },
            _ => PreconditionerKind::Kronecker,
        }
    }
}

fn start(start: Start) -> Recipe {
    Recipe { start, solves: Vec::new(), method: "" }
}

/// Statistics a solve reads, by model: used by the plan for sharing and for byte counts.
pub(crate) fn statistics_keys(inputs: &Inputs, tensor: &str, solve: &Solve) -> Vec<(usize, Kind, String)> {
    let kinds: &[Kind] = match solve.system {
        System::Identity | System::Gram(GramKind::Delta { .. }) => &[],
        System::FisherDiagonal => &[Kind::FisherDiagonal],
        System::Gram(GramKind::Input) => &[Kind::InputGram, Kind::InputFactor],
        System::Gram(GramKind::FisherBlock) => &[Kind::FisherBlock],
        System::Kfac => &[Kind::InputGram, Kind::InputFactor, Kind::OutputGram, Kind::OutputFactor],
    };
    let mut keys = Vec::new();
    for model in &solve.models {
        if let Some(statistics) = &inputs.models[model.model].statistics {
            for kind in kinds {
                if let Some(found) = statistics.get(tensor, *kind) {
                    keys.push((model.model, *kind, found.key.clone()));
                }
            }
        }
    }
    keys
}

/// Identifies the factored `S` of a direct Gram solve, so that tensors with the same input share it; `None` where it
/// belongs to one tensor.
pub(crate) fn gram_key(inputs: &Inputs, tensor: &str, solve: &Solve) -> Option<String> {
    (solve.system == System::Gram(GramKind::Input) && solve.solver == SolverChoice::Direct).then(|| {
        let weights: Vec<_> =
            solve.models.iter().map(|m| (m.weight.to_bits(), m.off_diagonal.to_bits())).collect();
        format!("{:?}", (statistics_keys(inputs, tensor, solve), weights, solve.ridge.to_bits()))
    })
}

/// Identifies what tensors with one input can share in a K-FAC solve: factors, weights, and the form their
/// preconditioner's input side takes beside a weight of this shape.
pub(crate) fn input_factors_key(
    inputs: &Inputs,
    tensor: &str,
    solve: &Solve,
    shape: BlockShape,
) -> Option<String> {
    (solve.system == System::Kfac && solve.solver != SolverChoice::Direct).then(|| {
        let mut keys = statistics_keys(inputs, tensor, solve);
        keys.retain(|(_, kind, _)| matches!(kind, Kind::InputGram | Kind::InputFactor));
        let scaling: Vec<_> =
            solve.models.iter().map(|m| (m.weight.to_bits(), m.off_diagonal.to_bits())).collect();
        let preconditioner = solve.solver.preconditioner();
        let form = match preconditioner {
            Some(PreconditionerKind::Kronecker) => super::rotates(inputs, tensor, solve, shape),
            Some(PreconditionerKind::Hybrid) => {
                crate::precond::cost::hybrid_keeps(shape.in_features, shape.out_features)
            }
            _ => false,
        };
        format!("kfac {:?}", (keys, scaling, preconditioner, form))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_that_of_the_layer_in_its_stack() {
        let layers = LayerPosition { layers: 5, ..LayerPosition::default() };
        assert_eq!(layers.of_tensor("h.2.w"), 0.5);
        assert_eq!(layers.of_tensor("wte.weight"), 0.0);
        assert_eq!(LayerPosition { layers: 1, ..LayerPosition::default() }.of_tensor("h.0.w"), 1.0);
        let stacks = [("encoder.block.".to_owned(), 5), ("decoder.block.".to_owned(), 3)].into();
        let stacks = LayerPosition { layers: 5, stacks, ..LayerPosition::default() };
        assert_eq!(stacks.of_tensor("encoder.block.1.layer.0.w"), 0.25);
        assert_eq!(stacks.of_tensor("decoder.block.1.layer.0.w"), 0.5);
        let slice = LayerPosition::of_slice(4..7);
        assert_eq!([4, 5, 6].map(|k| slice.of_tensor(&format!("h.{k}.w"))), [0.0, 0.5, 1.0]);
        assert_eq!(slice.of_tensor("wte.weight"), 0.0);
    }

    #[test]
    fn embeddings_are_told_from_weights_by_name() {
        for name in
            ["model.embed_tokens.weight", "transformer.wte.weight", "shared.weight", "a.position_bias.w"]
        {
            assert!(is_embedding(name), "{name}");
        }
        for name in ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "h.0.attn.c_attn.weight"] {
            assert!(!is_embedding(name), "{name}");
        }
    }
}
