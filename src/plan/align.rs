//! The same tensor across checkpoints: names, shapes, dtypes, ties; what is merged, copied or left out.

use std::collections::{BTreeMap, BTreeSet};

use crate::merge::{Inputs, SourceId};
use crate::read::{Dtype, TensorMeta, escaped};

/// Tensors of a head that models tie to their input embedding …
const HEADS: [&str; 4] =
    ["lm_head.weight", "embed_out.weight", "predictions.decoder.weight", "output_projection.weight"];
/// … which goes by one of these names.
const EMBEDDINGS: [&str; 6] = [
    "embed_tokens.weight",
    "wte.weight",
    "shared.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
];

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

fn is_head(name: &str) -> bool {
    HEADS.iter().any(|head| name.ends_with(head))
}

/// The embedding a head of this shape would be tied to.
fn embedding_of<'a>(inputs: &'a Inputs, source: SourceId, shape: &[usize]) -> Option<&'a TensorMeta> {
    inputs.checkpoints[source]
        .tensors()
        .iter()
        .find(|t| t.shape == shape && EMBEDDINGS.iter().any(|name| t.name.ends_with(name)))
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

    let mut candidates: Vec<TensorMeta> = inputs.checkpoints[reference].tensors().to_vec();
    let known: BTreeSet<&str> =
        inputs.checkpoints[reference].tensors().iter().map(|t| t.name.as_str()).collect();
    let mut extra: BTreeMap<&str, (&TensorMeta, SourceId)> = BTreeMap::new();
    for source in &sources {
        for tensor in inputs.checkpoints[*source].tensors() {
            if !known.contains(tensor.name.as_str()) {
                extra.entry(&tensor.name).or_insert((tensor, *source));
            }
        }
    }
    for (name, (tensor, source)) in extra {
        // The reference ties its head, another model stores it.
        if is_head(name)
            && let Some(embedding) = embedding_of(inputs, reference, &tensor.shape)
        {
            if !untie {
                return Err(AlignError::Tied {
                    tied: inputs.names[reference].clone(),
                    untied: inputs.names[source].clone(),
                    head: name.to_owned(),
                    embedding: embedding.name.clone(),
                });
            }
            candidates.push(tensor.clone());
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
            let found = inputs.checkpoints[*source].get(&tensor.name);
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
                ties.push((*source, embedding.name.clone()));
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
