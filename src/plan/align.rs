//! The same tensor across checkpoints: names, shapes, dtypes, ties; what is merged, copied or left out.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::merge::{Inputs, SourceId};
use crate::read::{Dtype, TensorMeta, escaped};
use crate::view::names::{is_head, is_token_embedding, twin};

/// Why checkpoints do not fit together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AlignError {
    /// A model lacks a tensor of the base, or has it in another shape.
    #[error("{model}: tensor `{}` does not match the base model's (got {got}, expected {expected}){}", escaped(tensor),
            if *others > 0 { format!("; {others} more tensors do not match") } else { String::new() })]
    Incompatible {
        /// The model as written.
        model: String,
        /// The tensor.
        tensor: String,
        /// Dtype and shape there, or `none`.
        got: String,
        /// Dtype and shape in the base.
        expected: String,
        /// Further mismatches.
        others: usize,
    },
    /// A dtype that cannot be merged.
    #[error(
        "{model}: tensor `{}` has dtype {dtype}, which cannot be merged (expected F32, F16, BF16 or F64; integers \
             are copied); dequantise the checkpoint first",
        escaped(tensor)
    )]
    Dtype {
        /// The model as written.
        model: String,
        /// The tensor.
        tensor: String,
        /// What it has.
        dtype: Dtype,
    },
    /// Tied in one model and not in another.
    #[error(
        "{tied}: tensor `{}` is tied to `{}`, but {untied} stores both (expected the same in all models); \
             `--untie` stores it on its own in the output",
        escaped(head),
        escaped(embedding)
    )]
    Tied {
        /// Model that ties.
        tied: String,
        /// Model that does not.
        untied: String,
        /// The head.
        head: String,
        /// The embedding.
        embedding: String,
    },
    /// No tensor is common to all models.
    #[error("the models have no tensor in common (expected at least one of the same name and shape)")]
    NothingInCommon,
}

/// The tensors of the output.
#[derive(Debug, Default)]
pub struct Alignment {
    /// In the order of the reference's files.
    pub tensors: Vec<TensorMeta>,
    /// Left out, with the reason.
    pub left_out: BTreeMap<String, String>,
    /// Ties that `--untie` dissolves, to be entered in [`Inputs::tied`].
    pub tied: Vec<((SourceId, String), String)>,
}

fn describe(meta: Option<&TensorMeta>) -> String {
    meta.map_or_else(|| "none".to_owned(), |m| format!("{} {:?}", m.dtype, m.shape))
}

/// The embedding a head of this shape would be tied to, by its name in the output.
fn embedding_of(inputs: &Inputs, source: SourceId, shape: &[usize]) -> Option<String> {
    inputs.checkpoints[source]
        .tensors()
        .find(|(name, t)| t.shape == shape && is_token_embedding(name))
        .map(|(name, _)| name.into_owned())
}

/// Lines the checkpoints up.
///
/// # Errors
/// [`AlignError`] where the contract wants one: a base's tensor missing or different in a model, mixed ties without
/// `untie`, dtypes that cannot be merged.
pub fn align(inputs: &Inputs, untie: bool) -> Result<Alignment, AlignError> {
    let reference = inputs.reference();
    let mut sources: Vec<SourceId> = inputs.models.iter().map(|m| m.source).chain(inputs.base).collect();
    sources.sort_unstable();
    sources.dedup();
    let mut alignment = Alignment::default();

    let named = |name: &str, tensor: &TensorMeta| TensorMeta { name: name.to_owned(), ..tensor.clone() };
    let mut candidates: Vec<TensorMeta> =
        inputs.checkpoints[reference].tensors().map(|(name, tensor)| named(&name, tensor)).collect();
    let known: BTreeSet<Cow<'_, str>> =
        inputs.checkpoints[reference].tensors().map(|(name, _)| name).collect();
    let mut extra: BTreeMap<Cow<'_, str>, (&TensorMeta, SourceId)> = BTreeMap::new();
    for source in &sources {
        for (name, tensor) in inputs.checkpoints[*source].tensors() {
            if !known.contains(&name) && !twin(&name).is_some_and(|twin| known.contains(&*twin)) {
                extra.entry(name).or_insert((tensor, *source));
            }
        }
    }
    for (name, (tensor, source)) in extra {
        let name = &*name;
        // The reference ties its head, another model stores it.
        if is_head(name)
            && let Some(embedding) = embedding_of(inputs, reference, &tensor.shape)
        {
            if !untie {
                return Err(AlignError::Tied {
                    tied: inputs.names[reference].clone(),
                    untied: inputs.names[source].clone(),
                    head: name.to_owned(),
                    embedding,
                });
            }
            candidates.push(named(name, tensor));
            continue;
        }
        alignment.left_out.insert(
            name.to_owned(),
            format!("only some models have it (first found in {})", inputs.names[source]),
        );
    }

    let mut mismatches: Vec<AlignError> = Vec::new();
    for tensor in candidates {
        if !tensor.dtype.is_float() && !tensor.dtype.is_copied() {
            return Err(AlignError::Dtype {
                model: inputs.names[reference].clone(),
                tensor: tensor.name,
                dtype: tensor.dtype,
            });
        }
        let mut mismatch = None;
        let mut ties = Vec::new();
        for source in &sources {
            let found = inputs.tensor(*source, &tensor.name);
            if let Some(found) = found
                && !found.dtype.is_float()
                && !found.dtype.is_copied()
            {
                return Err(AlignError::Dtype {
                    model: inputs.names[*source].clone(),
                    tensor: tensor.name,
                    dtype: found.dtype,
                });
            }
            if found.is_some_and(|f| f.shape == tensor.shape && f.dtype.is_float() == tensor.dtype.is_float())
            {
                continue;
            }
            if found.is_none()
                && is_head(&tensor.name)
                && let Some(embedding) = embedding_of(inputs, *source, &tensor.shape)
            {
                ties.push((*source, embedding));
                continue;
            }
            mismatch.get_or_insert((*source, describe(found)));
        }
        if let Some((source, got)) = mismatch {
            if inputs.base.is_some() {
                mismatches.push(AlignError::Incompatible {
                    model: inputs.names[source].clone(),
                    expected: describe(Some(&tensor)),
                    tensor: tensor.name,
                    got,
                    others: 0,
                });
            } else {
                let reason = format!(
                    "{} has {got}, {} has {}",
                    inputs.names[source],
                    inputs.names[reference],
                    describe(Some(&tensor))
                );
                alignment.left_out.insert(tensor.name, reason);
            }
            continue;
        }
        if let Some((source, embedding)) = ties.first()
            && !untie
        {
            let untied = sources.iter().find(|s| inputs.checkpoints[**s].get(&tensor.name).is_some());
            return Err(AlignError::Tied {
                tied: inputs.names[*source].clone(),
                untied: untied.map_or_else(String::new, |s| inputs.names[*s].clone()),
                head: tensor.name,
                embedding: embedding.clone(),
            });
        }
        alignment
            .tied
            .extend(ties.into_iter().map(|(source, embedding)| ((source, tensor.name.clone()), embedding)));
        alignment.tensors.push(tensor);
    }
    let more = mismatches.len().saturating_sub(1);
    if let Some(mut first) = mismatches.into_iter().next() {
        if let AlignError::Incompatible { others, .. } = &mut first {
            *others = more;
        }
        return Err(first);
    }
    if alignment.tensors.is_empty() {
        return Err(AlignError::NothingInCommon);
    }
    Ok(alignment)
}
