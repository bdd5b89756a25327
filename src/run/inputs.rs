//! Opening everything a config names, each file once: checkpoints, adapters, statistics, tokenizers. What is opened
//! becomes the views that a merge reads: whole models, or one set of views for each section of the config.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sections::{patch_layers, patch_vocabulary};
use crate::config::{Initial, MergeConfig, ModelPath, Section as ConfigSection};
use crate::error::Error;
use crate::merge::{Inputs, ModelInput, OutputFiles, SourceId};
use crate::read::{Checkpoint, IoMode};
use crate::statistics::ModelStatistics;
use crate::tokenizer::{self, Donor, TokenizerError, Vocabularies};
use crate::view::{Adapter, Layers, Model, Section, View, layers, names};

/// A vocabulary in memory takes up to this many times its file, which has merges beside the tokens: an estimate.
const VOCABULARY_FACTOR: u64 = 4;

/// Opens models, base, initial checkpoints, adapters, statistics and tokenizers: headers and vocabularies only.
///
/// # Errors
/// The first file that cannot be opened or is not what it should be; a slice or module that a model does not have.
pub fn open_inputs(config: &MergeConfig, io: IoMode, refuse_nonfinite: bool) -> Result<Inputs, Error> {
    let mut opener = Opener { io, checkpoints: HashMap::new(), models: HashMap::new() };
    let mut inputs = opener.inputs(config, None, refuse_nonfinite)?;
    let mut prefixes: Vec<(String, &ConfigSection)> = Vec::new();
    for section in &config.sections {
        let prefix = opener.prefix(config, section)?;
        let clash = prefixes.iter().find(|(other, with)| {
            with.module != section.module && (other.starts_with(&prefix) || prefix.starts_with(other))
        });
        if let Some((_, other)) = clash {
            let name = |section: &ConfigSection| section.module.clone().unwrap_or_default();
            return Err(section_error(
                config,
                section,
                format!("holds tensors of module `{}`, too; name modules that do not overlap", name(other)),
            ));
        }
        let part = opener.inputs(&section.config, Some((config, section, &prefix)), refuse_nonfinite)?;
        prefixes.push((prefix, section));
        inputs.sections.push(Arc::new(part));
    }
    let rows = if config.tokenizer.is_some() { bring_together(config, &mut inputs)? } else { None };
    super::factors::merge_factors(config, &mut inputs)?;
    let reference = Arc::clone(&inputs.checkpoints[inputs.reference()]);
    let mut files = std::mem::take(&mut inputs.files);
    if let Some(model) = reference.config() {
        let mut patched = model.clone();
        patch_layers(config, &inputs, &mut patched, &mut files.warnings)?;
        if let Some(rows) = rows {
            patch_vocabulary(&mut patched, rows);
        }
        files.model_config = (patched != *model).then_some(patched);
    }
    chat_template(config, &inputs, &mut files)?;
    inputs.files = files;
    Ok(inputs)
}

/// Enters the chat template that the config asks for.
fn chat_template(config: &MergeConfig, inputs: &Inputs, files: &mut OutputFiles) -> Result<(), Error> {
    let Some(wanted) = &config.chat_template else { return Ok(()) };
    let reference = inputs.reference();
    let order = std::iter::once(reference).chain((0..inputs.checkpoints.len()).filter(|k| *k != reference));
    let directories = order.filter_map(|k| inputs.checkpoints[k].directory());
    let directory = files.tokenizer_directory.clone();
    let directory = directory.or_else(|| inputs.checkpoints[reference].directory().map(Path::to_owned));
    let Some(template) = tokenizer::chat_template(config, directories)? else {
        files.warnings.push("chat_template: no model has one; the output has none".to_owned());
        return Ok(());
    };
    let written = match &directory {
        Some(directory) => tokenizer::set_chat_template(directory, &mut files.changed, &template)?,
        None => false,
    };
    if written {
        // These would stand before the one that is asked for.
        files.dropped.extend(["chat_template.jinja", "chat_template.json"]);
    } else {
        let line = wanted.line;
        files.warnings.push(format!(
            "{}:{line}: chat_template: not written, as the output has no tokenizer_config.json",
            config.path.display()
        ));
    }
    Ok(())
}

/// All paths that a config reads, for the check that the output is none of them.
pub(super) fn input_paths(config: &MergeConfig) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut add = |model: &ModelPath| {
        paths.push(model.path.clone());
        paths.extend(model.adapter.clone());
    };
    for part in std::iter::once(config).chain(config.sections.iter().map(|section| &section.config)) {
        part.base_model.iter().for_each(&mut add);
        part.models.iter().for_each(|entry| add(&entry.model));
        for round in part.rounds() {
            if let Initial::Checkpoint(model) = &round.initial {
                add(model);
            }
        }
    }
    if let Some(crate::config::TokenizerSource::Model(model)) = config.tokenizer.as_ref().map(|t| &t.source) {
        add(model);
    }
    let parts = std::iter::once(config).chain(config.sections.iter().map(|section| &section.config));
    paths.extend(parts.flat_map(|part| &part.models).flat_map(|entry| entry.statistics.iter().cloned()));
    paths
}

fn section_error(config: &MergeConfig, section: &ConfigSection, what: String) -> Error {
    let key = match &section.module {
        Some(module) => format!("modules.{}", crate::read::escaped(module)),
        None => "slices".to_owned(),
    };
    let line = section
        .layers
        .as_ref()
        .map_or_else(|| section.config.models.first().map_or(0, |entry| entry.line), |layers| layers.line);
    Error::Section { config: config.path.display().to_string(), line, key, what }
}

struct Opener {
    io: IoMode,
    checkpoints: HashMap<PathBuf, Arc<Checkpoint>>,
    models: HashMap<(PathBuf, Option<PathBuf>), Arc<Model>>,
}

/// The views of one section (or of the whole) while they are collected.
#[derive(Default)]
struct Views {
    by_key: HashMap<(PathBuf, Option<PathBuf>, usize), SourceId>,
    checkpoints: Vec<Arc<View>>,
    names: Vec<String>,
}

impl Opener {
    /// Two spellings of one path are one file; what does not exist is reported by whoever opens it.
    fn key(path: &Path) -> PathBuf {
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    }

    fn checkpoint(&mut self, path: &Path) -> Result<Arc<Checkpoint>, Error> {
        let key = Self::key(path);
        if let Some(checkpoint) = self.checkpoints.get(&key) {
            return Ok(Arc::clone(checkpoint));
        }
        let checkpoint = Arc::new(Checkpoint::open(path, self.io_for(path))?);
        self.checkpoints.insert(key, Arc::clone(&checkpoint));
        Ok(checkpoint)
    }

    fn model(&mut self, model: &ModelPath) -> Result<Arc<Model>, Error> {
        let key = (Self::key(&model.path), model.adapter.as_deref().map(Self::key));
        if let Some(model) = self.models.get(&key) {
            return Ok(Arc::clone(model));
        }
        let checkpoint = self.checkpoint(&model.path)?;
        let adapter = match &model.adapter {
            Some(path) => Some(Arc::new(Adapter::open(path, &checkpoint, self.io_for(path))?)),
            None => None,
        };
        let model = Arc::new(Model::new(checkpoint, adapter));
        self.models.insert(key, Arc::clone(&model));
        Ok(model)
    }

    fn inputs(
        &mut self,
        config: &MergeConfig,
        section: Option<(&MergeConfig, &ConfigSection, &str)>,
        refuse_nonfinite: bool,
    ) -> Result<Inputs, Error> {
        let mut views = Views::default();
        let range =
            |k: usize| section.and_then(|(_, s, _)| s.layers.as_ref()).map(|layers| layers.ranges[k].clone());
        let base_range =
            section.and_then(|(_, s, _)| s.layers.as_ref()).and_then(|layers| layers.base.clone());
        let base = match &config.base_model {
            Some(base) => Some(self.view(&mut views, base, section, base_range)?),
            None => None,
        };
        let mut models = Vec::with_capacity(config.models.len());
        for (k, entry) in config.models.iter().enumerate() {
            let source = self.view(&mut views, &entry.model, section, range(k))?;
            let statistics = match &entry.statistics[..] {
                [] => None,
                paths => Some(Arc::new(ModelStatistics::open(paths, self.io_for(&paths[0]))?)),
            };
            models.push(ModelInput { source, written: entry.model.written.clone(), statistics });
        }
        let mut initials = HashMap::new();
        for round in config.rounds() {
            if let Initial::Checkpoint(model) = &round.initial {
                initials.insert(model.path.clone(), self.view(&mut views, model, None, None)?);
            }
        }
        Ok(Inputs {
            checkpoints: views.checkpoints,
            names: views.names,
            models,
            base,
            initials,
            factors: None,
            tied: HashMap::new(),
            refuse_nonfinite,
            seed: 0,
            sections: Vec::new(),
            files: OutputFiles::default(),
        })
    }

    /// A model, or the layers `range` of it, as one of `views`.
    fn view(
        &mut self,
        views: &mut Views,
        path: &ModelPath,
        section: Option<(&MergeConfig, &ConfigSection, &str)>,
        range: Option<std::ops::Range<usize>>,
    ) -> Result<SourceId, Error> {
        let model = self.model(path)?;
        let first = range.as_ref().map_or(0, |range| range.start + 1);
        let key = (Self::key(&path.path), path.adapter.as_deref().map(Self::key), first);
        if let Some(source) = views.by_key.get(&key) {
            return Ok(*source);
        }
        let view = match section {
            None => View::whole(model),
            Some((config, section, prefix)) => {
                let layers = match (&section.layers, range) {
                    (Some(slice), Some(range)) => {
                        let (stacks, count) =
                            layers::stacks(model.tensors().map(|t| t.name.as_str()), prefix);
                        if stacks.len() > 1 {
                            let listed: Vec<_> =
                                stacks.iter().take(4).map(|s| crate::read::escaped(s)).collect();
                            return Err(section_error(
                                config,
                                section,
                                format!(
                                    "`{}` has several stacks of layers ({}); say under `modules` which one is meant",
                                    path.written,
                                    listed.join(", ")
                                ),
                            ));
                        }
                        if range.end > count {
                            return Err(section_error(
                                config,
                                section,
                                format!(
                                    "`{}` has {count} layers (got layer_range [{}, {}])",
                                    path.written, range.start, range.end
                                ),
                            ));
                        }
                        Some(Layers {
                            first: range.start,
                            output: slice.output.clone(),
                            before: slice.first,
                            after: slice.last,
                        })
                    }
                    _ => None,
                };
                View::of_section(model, Section { prefix: prefix.to_owned(), layers })
            }
        };
        views.checkpoints.push(Arc::new(view));
        views.names.push(path.written.clone());
        views.by_key.insert(key, views.checkpoints.len() - 1);
        Ok(views.checkpoints.len() - 1)
    }

    /// What the names of a section's tensors begin with.
    fn prefix(&mut self, config: &MergeConfig, section: &ConfigSection) -> Result<String, Error> {
        let Some(module) = &section.module else { return Ok(String::new()) };
        let first = section.config.models.first().expect("a section lists at least one model");
        let model = self.model(&first.model)?;
        let names = || model.tensors().map(|tensor| tensor.name.as_str());
        let found = layers::module_prefixes(names(), module);
        let mut candidates = found.into_iter();
        match (candidates.next(), candidates.next()) {
            (Some(prefix), None) => Ok(prefix),
            // The one module of a model that has no parts.
            (None, _)
                if module == "default" && config.sections.iter().all(|s| s.module == section.module) =>
            {
                Ok(String::new())
            }
            (Some(one), Some(other)) => Err(section_error(
                config,
                section,
                format!(
                    "`{}` has several modules of this name (`{one}`, `{other}`); write the whole path",
                    first.model.written
                ),
            )),
            (None, _) => {
                let tops: std::collections::BTreeSet<&str> =
                    names().filter_map(|name| name.split_once('.').map(|(top, _)| top)).collect();
                let tops: Vec<_> = tops.into_iter().take(8).map(crate::read::escaped).collect();
                Err(section_error(
                    config,
                    section,
                    format!(
                        "`{}` has no tensors below a part of that name; modules go by the tensors' names, as `{}`",
                        first.model.written,
                        tops.join("`, `")
                    ),
                ))
            }
        }
    }

    /// Mapping a file that a server may change or lose ends in a signal: network file systems are read instead.
    fn io_for(&self, path: &Path) -> IoMode {
        match (self.io, IoMode::for_path(path)) {
            (IoMode::Mmap, IoMode::Mmap) => IoMode::Mmap,
            _ => IoMode::Pread,
        }
    }
}

/// Puts the rows of every vocabulary in the order of the output's; how many there are then.
fn bring_together(config: &MergeConfig, inputs: &mut Inputs) -> Result<Option<usize>, Error> {
    let mut paths: Vec<&ModelPath> = config.base_model.iter().collect();
    for entry in &config.models {
        if !paths.iter().any(|known| known.path == entry.model.path) {
            paths.push(&entry.model);
        }
    }
    let view = |path: &ModelPath| {
        let models = inputs.models.iter().zip(&config.models);
        let source =
            models.filter(|(_, entry)| entry.model.path == path.path).map(|(input, _)| input.source).next();
        source.or(inputs.base).map(|source| &inputs.checkpoints[source])
    };
    let donors: Vec<Donor<'_>> = paths
        .iter()
        .map(|path| {
            let view = view(path);
            let rows = |view: &Arc<View>| {
                let tensors = view.tensors().filter(|(name, _)| names::is_vocabulary(name));
                tensors.filter_map(|(_, meta)| meta.shape.first().copied()).max()
            };
            Donor {
                written: &path.written,
                path: &path.path,
                directory: view.and_then(|view| view.directory()),
                rows: view.and_then(rows).unwrap_or(usize::MAX),
            }
        })
        .collect();
    let Some(vocabularies) = tokenizer::vocabularies(config, &donors)? else { return Ok(None) };
    // Tokens, ids and the files' own text, all models at once.
    let size = |directory: &Path| {
        let names = ["tokenizer.json", "vocab.json", "vocab.txt"];
        let found = names.iter().find_map(|name| std::fs::metadata(directory.join(name)).ok());
        found.map_or(0, |metadata| metadata.len())
    };
    let read: u64 = donors.iter().filter_map(|donor| donor.directory).map(size).sum::<u64>()
        + size(&vocabularies.files.directory);
    let mut found = permute(config, config, &vocabularies, inputs)?;
    for (section, part) in config.sections.iter().zip(&mut inputs.sections) {
        let part = Arc::get_mut(part).expect("nobody else has the inputs before the plan");
        found += permute(config, &section.config, &vocabularies, part)?;
    }
    if found == 0 {
        return Err(TokenizerError::NoEmbedding.into());
    }
    let Vocabularies { files, warnings, .. } = vocabularies;
    inputs.files = OutputFiles {
        vocabulary_bytes: VOCABULARY_FACTOR * read,
        tokenizer_directory: Some(files.directory),
        changed: files.changed,
        warnings,
        ..OutputFiles::default()
    };
    Ok(Some(files.rows))
}

/// Replaces the views of one section by views whose vocabularies are in order; how many tensors that concerns.
fn permute(
    config: &MergeConfig,
    section: &MergeConfig,
    vocabularies: &Vocabularies,
    inputs: &mut Inputs,
) -> Result<usize, Error> {
    let mut sources: Vec<(SourceId, ModelPath)> = Vec::new();
    let named =
        inputs.models.iter().map(|input| input.source).zip(section.models.iter().map(|entry| &entry.model));
    for (source, path) in named.chain(inputs.base.into_iter().zip(&section.base_model)) {
        if !sources.iter().any(|(known, _)| *known == source) {
            sources.push((source, path.clone()));
        }
    }
    let models: Vec<(ModelPath, Arc<Model>)> = sources
        .iter()
        .map(|(source, path)| (path.clone(), Arc::clone(inputs.checkpoints[*source].model())))
        .collect();
    let base = inputs.base.and_then(|base| sources.iter().position(|(source, _)| *source == base));
    // A slice in the middle sees no embedding, the last one only the head.
    let seen = |name: &str| sources.iter().any(|(source, _)| inputs.checkpoints[*source].get(name).is_some());
    let (models, found) = tokenizer::permute(config, vocabularies, &models, base, &seen)?;
    for ((source, _), model) in sources.iter().zip(models) {
        inputs.checkpoints[*source] = Arc::new(inputs.checkpoints[*source].with_model(model));
    }
    Ok(found)
}
