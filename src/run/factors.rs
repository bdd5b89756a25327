//! `space: factor`: adapters of one base merged factor by factor, `(Σ wᵢsᵢBᵢ)·(Σ wᵢAᵢ / Σ wᵢ)` in the place of `Σ wᵢsᵢBᵢAᵢ`.
//!
//! L-LoRA's task vectors live in the factors: linearised adapters start from one A and from B = 0, and where the As agree
//! both spaces give the same. The result has the rank of one adapter, and is added to the base like one: a full checkpoint
//! is written. B is summed as the method sums task vectors (`linear` divides by the weights, `task_arithmetic` scales by
//! λ), A is averaged over the models that change the tensor. A model that does not change it counts as B = 0.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::config::{ConfigError, MergeConfig, Method};
use crate::error::Error;
use crate::merge::{Inputs, LayerPosition, MergeError};
use crate::read::escaped;
use crate::view::{Adapter, FactorTerm, Model, View};

/// Adds the model that holds the results to `inputs`, where the config asks for any.
///
/// # Errors
/// Adapters of several bases, factors of different ranks, a config that asks for it beside what it does not go with.
pub(super) fn merge_factors(config: &MergeConfig, inputs: &mut Inputs) -> Result<(), Error> {
    let round = &config.round;
    let parts = std::iter::once(config).chain(config.sections.iter().map(|section| &section.config));
    let mut rounds = parts.flat_map(MergeConfig::rounds);
    let Some(line) = rounds.find_map(|round| round.parameters.line("space")) else { return Ok(()) };
    let refuse = |why: String| {
        let (path, key) = (config.path.clone(), "parameters.space".to_owned());
        Error::Config(ConfigError::NotAllowed { path, line, key, why })
    };
    let reference = inputs.reference();
    let layers = LayerPosition::of(&inputs.checkpoints[reference]);
    let stored: Vec<String> =
        inputs.checkpoints[reference].tensors().map(|(name, _)| name.into_owned()).collect();
    let position = |name: &str| layers.of_tensor(name);
    if !stored.iter().any(|name| round.factor_space(name, position(name))) && config.sections.is_empty() {
        return Ok(());
    }
    let beside = [
        (!config.sections.is_empty(), "`slices` and `modules`"),
        (config.tokenizer.is_some(), "`tokenizer` and `tokenizer_source`"),
        (config.sweep.is_some(), "`sweep`"),
        (round.parameters.line("space").is_none(), "a nested config"),
    ];
    if let Some((_, what)) = beside.into_iter().find(|(is, _)| *is) {
        return Err(refuse(format!("does not go with {what} in this version; leave it out (`delta`)")));
    }
    let base = Arc::clone(inputs.checkpoints[reference].model().checkpoint());
    let mut adapters: Vec<Option<Arc<Adapter>>> = Vec::new();
    for model in &inputs.models {
        let own = inputs.checkpoints[model.source].model();
        if !Arc::ptr_eq(own.checkpoint(), &base) {
            return Err(refuse(format!(
                "`factor` merges adapters of one base (got `{}`, expected {}+ADAPTER)",
                model.written,
                base.path().display()
            )));
        }
        adapters.push(own.adapter().cloned());
    }
    if inputs.base.is_some_and(|base| inputs.checkpoints[base].model().adapter().is_some()) {
        return Err(refuse("`factor` needs a base_model without an adapter".to_owned()));
    }
    let changed: BTreeSet<&String> = adapters
        .iter()
        .flatten()
        .flat_map(|adapter| adapter.changes())
        .filter(|(_, change)| change.low_rank.is_some())
        .map(|(name, _)| name)
        .collect();
    if changed.is_empty() {
        return Err(refuse("`factor` merges adapters, and no model is `base+adapter`".to_owned()));
    }
    let mut tensors = Vec::new();
    for name in changed.into_iter().filter(|name| round.factor_space(name, position(name))) {
        let (own, terms) = terms(config, inputs, &adapters, name, position(name))?;
        tensors.push((name.clone(), own, terms));
    }
    let model = Arc::new(Model::of_factors(base, tensors));
    inputs.checkpoints.push(Arc::new(View::whole(model)));
    inputs.names.push("the merged factors".to_owned());
    inputs.factors = Some(inputs.checkpoints.len() - 1);
    Ok(())
}

/// The share of the base's own tensor, and of every adapter.
fn terms(
    config: &MergeConfig,
    inputs: &Inputs,
    adapters: &[Option<Arc<Adapter>>],
    name: &str,
    t: f64,
) -> Result<(f64, Vec<FactorTerm>), Error> {
    let round = &config.round;
    let refuse = |reason| {
        Error::Merge(MergeError::Parameters { tensor: name.to_owned(), method: round.method.name(), reason })
    };
    // The base itself among the models has no task vector.
    let counts = |i: &usize| round.method == Method::Linear || Some(inputs.models[*i].source) != inputs.base;
    let weights: Vec<(usize, f64)> =
        (0..adapters.len()).filter(counts).map(|i| (i, round.weight(i, name, t))).collect();
    let sum = |of: &dyn Fn(usize) -> bool| -> Result<f64, Error> {
        let own = || weights.iter().filter(|(i, _)| of(*i)).map(|(_, weight)| *weight);
        let (sum, size) = (own().sum::<f64>(), own().map(f64::abs).sum::<f64>());
        if sum.abs() <= 1e-12 * size {
            let all = own().collect::<Vec<_>>();
            return Err(refuse(format!(
                "the weights {all:?} sum to 0, and `space: factor` divides by their sum"
            )));
        }
        Ok(sum)
    };
    let low_rank = |i: usize| {
        let change = adapters[i].as_ref()?.changes().get(name)?;
        Some((change.low_rank.as_ref()?, change.replaced.is_some()))
    };
    let divisor = if round.normalize(name, t) { sum(&|_| true)? } else { 1.0 };
    let (own, scale) = match round.method {
        Method::Linear => (weights.iter().map(|(_, weight)| weight).sum::<f64>() / divisor, 1.0 / divisor),
        _ => (1.0, round.lambda(name, t) / divisor),
    };
    let of_a = sum(&|i| low_rank(i).is_some())?;
    let mut terms: Vec<FactorTerm> = Vec::new();
    for (i, weight) in &weights {
        let (Some(adapter), Some((low, replaced))) = (&adapters[*i], low_rank(*i)) else { continue };
        let written = escaped(&inputs.models[*i].written);
        if replaced {
            return Err(refuse(format!(
                "`{written}` replaces the weight and changes it, too; `space: delta` can"
            )));
        }
        if let Some(first) = terms.first()
            && (first.low_rank.rank, first.low_rank.transposed) != (low.rank, low.transposed)
        {
            return Err(refuse(format!(
                "`space: factor` needs factors of one rank (`{written}` has {}, an adapter before it {}); `delta` does not",
                low.rank, first.low_rank.rank
            )));
        }
        let (a, b) = (weight / of_a, weight * low.scale * scale);
        terms.push(FactorTerm { adapter: Arc::clone(adapter), low_rank: low.clone(), a, b });
    }
    Ok((own, terms))
}
