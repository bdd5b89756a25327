//! From vocabularies to the rows of every embedding and head.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{TokenizerError, Vocabularies, Vocabulary, key};
use crate::config::{EmbeddingSource, MergeConfig, ModelPath, TokenEmbedding};
use crate::view::{Model, RowMap, RowSource, names};

/// The models of one section with the rows of their vocabularies in the output's order; `base` is an index into
/// `models`, and `seen` tells which tensors are the section's. Also how many tensors have been rearranged or were found
/// to be in order.
///
/// # Errors
/// [`TokenizerError::Width`] and [`TokenizerError::Token`].
pub fn permute(
    config: &MergeConfig,
    vocabularies: &Vocabularies,
    models: &[(ModelPath, Arc<Model>)],
    base: Option<usize>,
    seen: &dyn Fn(&str) -> bool,
) -> Result<(Vec<Arc<Model>>, usize), TokenizerError> {
    let tensors: BTreeSet<String> = models
        .iter()
        .flat_map(|(_, model)| model.tensors())
        .filter(|meta| names::is_vocabulary(&meta.name) && meta.dtype.is_float() && !meta.shape.is_empty())
        .filter(|meta| seen(&meta.name))
        .map(|meta| meta.name.clone())
        .collect();
    let mut maps: Vec<HashMap<String, RowMap>> = models.iter().map(|_| HashMap::new()).collect();
    for name in &tensors {
        let tensor = Tensor::new(config, vocabularies, models, base, name)?;
        for (model, map) in tensor.maps()? {
            maps[model].insert(name.clone(), map);
        }
    }
    let permuted = models
        .iter()
        .zip(maps)
        .map(|((_, model), maps)| {
            if maps.is_empty() {
                Arc::clone(model)
            } else {
                Arc::new(Model::with_rows(Arc::clone(model), maps))
            }
        })
        .collect();
    Ok((permuted, tensors.len()))
}

/// One tensor in all models that have it.
struct Tensor<'t> {
    config: &'t MergeConfig,
    vocabularies: &'t Vocabularies,
    name: &'t str,
    /// Index into the section's models, its path, the model, its vocabulary, its rows.
    models: Vec<(usize, &'t ModelPath, &'t Arc<Model>, &'t Vocabulary, usize)>,
    /// Index into `models` here.
    base: Option<usize>,
}

impl<'t> Tensor<'t> {
    fn new(
        config: &'t MergeConfig,
        vocabularies: &'t Vocabularies,
        models: &'t [(ModelPath, Arc<Model>)],
        base: Option<usize>,
        name: &'t str,
    ) -> Result<Self, TokenizerError> {
        let mut found: Vec<(usize, &ModelPath, &Arc<Model>, &Vocabulary, usize)> = Vec::new();
        let mut width: Option<(usize, &ModelPath)> = None;
        for (k, (path, model)) in models.iter().enumerate() {
            let Some(meta) = model.get(name) else { continue };
            let columns: usize = meta.shape.iter().skip(1).product();
            match width {
                Some((expected, other)) if expected != columns => {
                    return Err(TokenizerError::Width {
                        model: path.written.clone(),
                        other: other.written.clone(),
                        tensor: name.to_owned(),
                        got: columns,
                        expected,
                    });
                }
                _ => width = Some((columns, path)),
            }
            let vocabulary = vocabularies.models.get(key(path)).unwrap_or(&vocabularies.output);
            found.push((k, path, model, vocabulary, meta.shape.first().copied().unwrap_or(0)));
        }
        let base = base.and_then(|base| found.iter().position(|(k, ..)| *k == base));
        Ok(Self { config, vocabularies, name, models: found, base })
    }

    /// The row of `token` in model `k` of this tensor.
    fn row(&self, k: usize, token: &str) -> Option<u32> {
        let (.., vocabulary, rows) = &self.models[k];
        vocabulary.id(token).filter(|id| (*id as usize) < *rows)
    }

    /// The new rows of each model, where they are not the old ones.
    fn maps(&self) -> Result<Vec<(usize, RowMap)>, TokenizerError> {
        let rules: HashMap<&str, &TokenEmbedding> = self
            .config
            .tokenizer
            .iter()
            .flat_map(|tokenizer| &tokenizer.tokens)
            .map(|(token, rule)| (token.as_str(), rule))
            .collect();
        let (filled, total) = (self.vocabularies.output.rows(), self.vocabularies.files.rows);
        let mut empty = vec![RowSource::Zero; filled];
        empty.resize(total, RowSource::Padding);
        let mut rows = vec![empty; self.models.len()];
        let mut means = Vec::new();
        for (id, token) in self.vocabularies.output.by_id() {
            let rule = rules.get(token).copied();
            let force = rule.is_some_and(|rule| rule.force);
            let own: Vec<Option<u32>> = (0..self.models.len()).map(|k| self.row(k, token)).collect();
            let fallback = if force || own.contains(&None) {
                self.fallback(token, rule, &own, &mut means)?
            } else {
                RowSource::Zero
            };
            for (rows, own) in rows.iter_mut().zip(&own) {
                rows[id as usize] = match own {
                    Some(row) if !force => RowSource::Own(*row),
                    _ => fallback,
                };
            }
        }
        let donors: Vec<_> =
            self.models.iter().map(|(_, _, model, ..)| (Arc::clone(model), self.name.to_owned())).collect();
        Ok(self
            .models
            .iter()
            .zip(rows)
            .filter(|((.., old), rows)| {
                rows.len() != *old || !rows.iter().zip(0..).all(|(row, k)| *row == RowSource::Own(k))
            })
            .map(|((k, ..), rows)| (*k, RowMap { rows, means: means.clone(), donors: donors.clone() }))
            .collect())
    }

    /// Where the row of a token comes from in models that have none of their own.
    fn fallback(
        &self,
        token: &str,
        rule: Option<&TokenEmbedding>,
        own: &[Option<u32>],
        means: &mut Vec<Vec<(u32, u32)>>,
    ) -> Result<RowSource, TokenizerError> {
        let error = |why: String| TokenizerError::Token {
            path: self.config.path.display().to_string(),
            line: self.config.tokenizer.as_ref().map_or(0, |tokenizer| tokenizer.line),
            token: token.to_owned(),
            why,
        };
        let model = |wanted: &ModelPath| {
            self.models
                .iter()
                .position(|(_, path, ..)| path.same(wanted))
                .ok_or_else(|| error(format!("`{}` is no model with a `{}` here", wanted.written, self.name)))
        };
        let source = match rule.and_then(|rule| rule.source.as_ref()) {
            Some(EmbeddingSource::Zero) => return Ok(RowSource::Zero),
            Some(EmbeddingSource::Model(wanted)) => {
                let k = model(wanted)?;
                let row = own[k].ok_or_else(|| error(format!("`{}` has no such token", wanted.written)))?;
                vec![(k, row)]
            }
            Some(EmbeddingSource::Token { model: wanted, token: other }) => {
                let k = model(wanted)?;
                let row = self
                    .row(k, other)
                    .ok_or_else(|| error(format!("`{}` has no token `{other}`", wanted.written)))?;
                vec![(k, row)]
            }
            Some(EmbeddingSource::TokenId { model: wanted, id }) => {
                let k = model(wanted)?;
                let rows = self.models[k].4;
                if *id >= rows {
                    return Err(error(format!("`{}` has {rows} rows (got token_id {id})", wanted.written)));
                }
                vec![(k, *id as u32)]
            }
            None => {
                let present: Vec<(usize, u32)> =
                    own.iter().enumerate().filter_map(|(k, row)| Some((k, (*row)?))).collect();
                match (present.len(), self.base) {
                    (0, _) => return Ok(RowSource::Zero),
                    (1, _) => present,
                    (_, Some(base)) if own[base].is_some() => {
                        present.into_iter().filter(|(k, _)| *k == base).collect()
                    }
                    _ => present,
                }
            }
        };
        means.push(source.into_iter().map(|(k, row)| (k as u32, row)).collect());
        Ok(RowSource::Mean((means.len() - 1) as u32))
    }
}
