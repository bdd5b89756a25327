//! Owns the meaning of the keys: YAML nodes in, a checked [`MergeConfig`] out. Every rule that can be checked
//! without a tensor is checked here. Called by [`MergeConfig::load`]; opens nothing (it asks whether a bare
//! word under `initial` exists as a path, no more).

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::fields::{Field, Scope};
use super::parameters::{Parameter, ParameterKind, ParameterSpec, ParameterValue, Parameters, Rule};
use super::schema::{
    Initial, MergeConfig, Method, ModelEntry, ModelPath, Round, Section, Subspace, Unmatched, Words,
};
use super::slices::{Part, parts};
use super::solver::{SOLVER_KEYS, solver};
use super::sweep;
use super::tokenizer::{chat_template, tokenizer};
use super::yaml::{Node, Value, join};
use crate::merge::elementwise::{BaseUse, Definition, iso_ridge};

/// Everything the top level may hold.
const TOP_KEYS: &[&str] = &[
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "subspace",
    "initial",
    "solver",
    "unmatched",
    "tokenizer_source",
    "sweep",
    "name",
    "slices",
    "modules",
    "tokenizer",
    "chat_template",
];
const NESTED_KEYS: &[&str] = &["merge_method", "parameters", "subspace", "initial", "solver", "unmatched"];
const MODEL_KEYS: &[&str] = &["model", "statistics", "parameters"];
const RULE_KEYS: &[&str] = &["filter", "value"];

/// What every reference to a model is read with.
pub(super) struct Models<'c> {
    /// What relative paths are relative to.
    directory: &'c Path,
    /// What is accepted and should be known all the same.
    warnings: RefCell<Vec<String>>,
}

impl Models<'_> {
    pub fn warn(&self, path: &Path, line: usize, what: impl std::fmt::Display) {
        self.warnings.borrow_mut().push(format!("{}:{line}: {what}", path.display()));
    }
}

/// What rounds have in common.
struct Shared<'s> {
    context: &'s Models<'s>,
    models: &'s [ModelEntry],
    base: Option<&'s ModelPath>,
    /// `models[i].parameters` as written: what a nested round inherits, however deep.
    written: &'s [Option<Field<'s>>],
    /// `parameters` between a source's and the config's own: the slice's, the module's.
    levels: &'s [Field<'s>],
    /// Methods that the caller brought.
    extra: &'s [&'static Definition],
}

pub(super) fn config(
    path: &Path,
    text: String,
    root: Option<&Node>,
    extra: &[&'static Definition],
) -> Result<MergeConfig, ConfigError> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let top = match root {
        Some(node) => Field { path, key: "config".to_owned(), line: node.line, node }.scope("a mapping")?,
        None => Scope { path, key: String::new(), line: 1, entries: &[] },
    };
    let top = Scope { key: String::new(), ..top };
    check_top_keys(&top)?;
    // First of all, so that a mergekit config of another method hears that, and not about some detail of its
    // models.
    method(&top, extra)?;

    let context = Models { directory: &directory, warnings: RefCell::default() };
    let base_model = top.field("base_model").map(|field| model_path(&field, &context)).transpose()?;
    let parts = parts(&top, &context)?;
    let tokenizer = tokenizer(&top, &context)?;
    let chat_template = chat_template(&top)?;
    let name = top.field("name").map(|field| field.text("a name").map(str::to_owned)).transpose()?;
    let dtype = top.field("dtype").map(|field| field.word()).transpose()?;
    let out_dtype = top.field("out_dtype").map(|field| field.word()).transpose()?;
    let mut config = MergeConfig {
        path: path.to_owned(),
        text,
        name,
        base_model,
        dtype,
        out_dtype,
        round: Round::placeholder(),
        tokenizer,
        chat_template,
        models: Vec::new(),
        directory: directory.clone(),
        sections: Vec::new(),
        warnings: Vec::new(),
        sweep: None,
    };
    if parts.is_empty() {
        let (models, written) = models(&top, &context)?;
        let base = config.base_model.as_ref();
        let shared =
            Shared { context: &context, models: &models, base, written: &written, levels: &[], extra };
        config.round = shared.round(&top, None)?;
        config.models = models;
    } else {
        sections(&mut config, parts, &top, &context, extra)?;
    }
    config.warnings = context.warnings.into_inner();
    if let Some(field) = top.field("sweep") {
        if !config.sections.is_empty() {
            return Err(field
                .not_allowed("goes over whole models; give it beside `models`, not `slices` or `modules`"));
        }
        let variant = |text, root: &Node| self::config(path, text, Some(root), extra);
        config.sweep = Some(sweep::sweep(&field, &top, &config, variant)?);
    }
    Ok(config)
}

/// Makes each part a config of its own. The whole keeps every model that is named, once, and the round as the first
/// part has it: for what is said about the merge as a whole.
fn sections(
    config: &mut MergeConfig,
    parts: Vec<Part<'_>>,
    top: &Scope<'_>,
    context: &Models<'_>,
    extra: &[&'static Definition],
) -> Result<(), ConfigError> {
    // Without the text and the sections before: copying those for each section would be quadratic.
    let shell = MergeConfig { text: String::new(), ..config.clone() };
    let needed = needs_base(top, extra)?;
    for mut part in parts {
        let base = part.base(top.path, config.base_model.as_ref(), needed)?;
        let shared = Shared {
            context,
            models: &part.models,
            base: base.as_ref(),
            written: &part.written,
            levels: &part.levels,
            extra,
        };
        let round = shared.round(top, None)?;
        for entry in &part.models {
            if !config.models.iter().any(|known| known.model.same(&entry.model)) {
                config.models.push(entry.clone());
            }
        }
        if config.sections.is_empty() {
            config.round = round.clone();
            config.round.model_parameters.clear();
        }
        let section = MergeConfig { models: part.models, base_model: base, round, ..shell.clone() };
        config.sections.push(Section { config: section, module: part.module, layers: part.layers });
    }
    Ok(())
}

/// Whether some round of the config cannot do without a base, or takes one where there is one.
fn needs_base(scope: &Scope<'_>, extra: &[&'static Definition]) -> Result<bool, ConfigError> {
    let (method, _) = method(scope, extra)?;
    let is = |key: &str, word: &str| {
        scope.field(key).is_some_and(|field| field.text("a word").is_ok_and(|text| text == word))
    };
    let nested = match scope.field("initial") {
        Some(field) if field.is_mapping() => needs_base(&field.scope("a nested config")?, extra)?,
        _ => false,
    };
    Ok(method.needs_base()
        || method == Method::Mats
        || is("unmatched", "base")
        || is("initial", "base")
        || nested)
}

fn check_top_keys(top: &Scope<'_>) -> Result<(), ConfigError> {
    top.check_keys(TOP_KEYS, belongs)
}

/// The place where a word that is no key of a round has a meaning.
fn belongs(key: &str) -> Option<&'static str> {
    let is_parameter =
        Method::words(&[]).iter().any(|(_, method)| method.parameters().iter().any(|spec| spec.name == key));
    // `ridge` is both: of a solver more often.
    if SOLVER_KEYS.contains(&key) {
        Some("solver")
    } else if is_parameter {
        Some("parameters")
    } else if matches!(key, "model" | "statistics") {
        Some("models")
    } else {
        None
    }
}

fn method(scope: &Scope<'_>, extra: &[&'static Definition]) -> Result<(Method, usize), ConfigError> {
    let Some(field) = scope.field("merge_method") else {
        return Err(scope.missing("merge_method", "it says how to merge, as `mats` or `linear`"));
    };
    let word = field.text("a word")?;
    let words = Method::words(extra);
    match words.iter().find(|(known, _)| *known == word) {
        Some((_, method)) => Ok((*method, field.line)),
        None => {
            let known: Vec<_> = words.iter().map(|(known, _)| *known).collect();
            Err(field.unknown_word(word, &known))
        }
    }
}

/// The models, and each one's `parameters` as written: their meaning depends on the round that reads them.
pub(super) fn models<'n>(
    top: &Scope<'n>,
    context: &Models<'_>,
) -> Result<(Vec<ModelEntry>, Vec<Option<Field<'n>>>), ConfigError> {
    let Some(field) = top.field("models") else {
        return Err(top.missing("models", "it lists the checkpoints to merge"));
    };
    let items = field.items().ok_or_else(|| field.wrong_type("a list of models"))?;
    if items.is_empty() {
        return Err(top.missing("models", "the list is empty, and a merge needs at least one model"));
    }
    let mut models = Vec::with_capacity(items.len());
    let mut written = Vec::with_capacity(items.len());
    for item in items {
        let scope = item.scope("a mapping with `model`")?;
        scope.check_keys(MODEL_KEYS, |key| if key == "weight" { Some("parameters") } else { None })?;
        let Some(model) = scope.field("model") else {
            return Err(scope.missing("model", "every item of `models` names a checkpoint"));
        };
        let model = model_path(&model, context)?;
        let statistics = match scope.field("statistics") {
            Some(field) => statistics(&field, context.directory)?,
            None => Vec::new(),
        };
        models.push(ModelEntry { model, statistics, line: item.line });
        written.push(scope.field("parameters"));
    }
    Ok((models, written))
}

fn statistics(field: &Field<'_>, directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    const EXPECTED: &str = "the path of a statistics file, or a list of them";
    let items = field.items().unwrap_or_else(|| vec![field.clone()]);
    items.iter().map(|item| resolve(item, item.text(EXPECTED)?, directory)).collect()
}

/// mergekit's grammar: `path`, `path+lora_path`, or `{model: {path}, lora: {path}}`.
pub(super) fn model_path(field: &Field<'_>, context: &Models<'_>) -> Result<ModelPath, ConfigError> {
    const EXPECTED: &str = "the path of a checkpoint, or `{model: …, lora: …}`";
    let line = field.value_line();
    if field.is_mapping() {
        let scope = field.scope(EXPECTED)?;
        scope.check_keys(&["model", "lora", "override_architecture"], |_| None)?;
        let Some(model) = scope.field("model") else {
            return Err(scope.missing("model", "it names the checkpoint"));
        };
        if let Some(unread) = scope.field("override_architecture") {
            let what = format!("{}: changes nothing: layers are told by the tensors' names", unread.key);
            context.warn(unread.path, unread.line, what);
        }
        let (model, lora) = (path_only(&model)?, scope.field("lora").map(|f| path_only(&f)).transpose()?);
        let path = resolve(field, model, context.directory)?;
        let adapter = lora.map(|lora| resolve(field, lora, context.directory)).transpose()?;
        let written = lora.map_or_else(|| model.to_owned(), |lora| format!("{model}+{lora}"));
        return Ok(ModelPath { written, path, adapter, line });
    }
    let written = field.text(EXPECTED)?;
    // As in mergekit `+` always starts an adapter; a path that holds one is not guessed at.
    let mut chunks = written.split('+');
    let (path, adapter, more) = (chunks.next().unwrap_or_default(), chunks.next(), chunks.next());
    if more.is_some() || path.is_empty() || adapter.is_some_and(str::is_empty) {
        return Err(field.wrong_type("`path` or `path+adapter_path`"));
    }
    let adapter = adapter.map(|adapter| resolve(field, adapter, context.directory)).transpose()?;
    let path = resolve(field, path, context.directory)?;
    Ok(ModelPath { written: written.to_owned(), path, adapter, line })
}

/// `path`, or `{path}`.
fn path_only<'n>(field: &Field<'n>) -> Result<&'n str, ConfigError> {
    const EXPECTED: &str = "a path, or `{path: …}`";
    if !field.is_mapping() {
        return field.text(EXPECTED);
    }
    let scope = field.scope(EXPECTED)?;
    scope.check_keys(&["path", "revision"], |_| None)?;
    if let Some(revision) = scope.field("revision") {
        return Err(
            revision.not_allowed("nothing is downloaded here; give the directory of that revision as `path`")
        );
    }
    match scope.field("path") {
        Some(path) => path.text("a path"),
        None => Err(scope.missing("path", "it says where the files are")),
    }
}

/// Joins a path as written to the config's directory.
fn resolve(field: &Field<'_>, written: &str, directory: &Path) -> Result<PathBuf, ConfigError> {
    if written.contains('\0') {
        return Err(field.wrong_type("a path without NUL"));
    }
    // No `./` in front of every path that a message shows.
    if directory == Path::new(".") { Ok(PathBuf::from(written)) } else { Ok(directory.join(written)) }
}

impl Shared<'_> {
    /// Reads a round; `outer` is the round that it starts, `None` at the top level.
    fn round(&self, scope: &Scope<'_>, outer: Option<Unmatched>) -> Result<Round, ConfigError> {
        let (method, line) = method(scope, self.extra)?;
        let method = if method == Method::Mats && self.is_data_free(scope) {
            Method::Elementwise(&iso_ridge::DEFINITION)
        } else {
            method
        };
        let subspace = self.subspace(scope, method)?;
        let parameters = match scope.field("parameters") {
            Some(field) => parameters(&field, method, false)?,
            None => Parameters::default(),
        };
        // What a slice or module sets stands before the config's own; nested rounds stand for themselves.
        let levels = if outer.is_none() { self.levels } else { &[] };
        let parameters = levels
            .iter()
            .rev()
            .try_fold(parameters, |below, level| Ok(self::parameters(level, method, false)?.over(below)))?;
        let model_parameters = self.model_parameters(method, &parameters, outer.is_some())?;
        let unmatched = match scope.field("unmatched") {
            Some(field) => {
                let unmatched = field.word()?;
                if unmatched == Unmatched::Base {
                    self.need_base(scope, field.line, "`unmatched: base`")?;
                }
                unmatched
            }
            // Inherited.
            None => outer.unwrap_or(Unmatched::Average),
        };
        let solver = solver(scope, method, line)?;
        let initial = self.initial(scope, method, unmatched)?;

        if method.needs_base() {
            self.need_base(scope, line, &format!("`{}`", method.name()))?;
        }
        if method == Method::Passthrough && self.models.len() != 1 {
            return Err(ConfigError::NotAllowed {
                path: scope.path.to_owned(),
                line: self.models.get(1).map_or(line, |model| model.line),
                key: join(&scope.key, "merge_method"),
                why: format!("`passthrough` copies one model (got {})", self.models.len()),
            });
        }
        if method == Method::Mats && matches!(subspace, Subspace::DeltaGram(_)) {
            let line = scope.field("subspace").map_or(line, |field| field.line);
            self.need_base(scope, line, "`subspace: delta_gram`")?;
        }
        let round =
            Round { method, subspace, initial, solver, unmatched, parameters, model_parameters, line };
        self.check_statistics(scope.path, &round)?;
        self.check_weights(scope, &round)?;
        if let Method::Elementwise(definition) = method {
            self.check_models(scope, &round, definition)?;
        }
        Ok(round)
    }

    /// Whether nothing but task vectors can say how to merge: no statistics at all, a base, and nothing else asked for. Then
    /// `mats` is what it otherwise starts from, `iso_ridge`: 2 (LoRA) to 10 points of normalised accuracy above the plain
    /// average that unmatched parameters get (`benches/quality`).
    fn is_data_free(&self, scope: &Scope<'_>) -> bool {
        let asked = ["subspace", "initial", "solver", "unmatched", "sweep"];
        // Of Grams.
        let own = scope.field("parameters");
        let scales = self.written.iter().flatten().chain(&own).any(|field| {
            field.scope("a mapping of parameters").is_ok_and(|scope| scope.field("off_diagonal").is_some())
        });
        self.base.is_some()
            && !scales
            && self.models.iter().all(|model| model.statistics.is_empty())
            && asked.iter().all(|key| scope.field(key).is_none())
    }

    /// As many models as an elementwise method takes, and each one's parameters that have no default.
    fn check_models(
        &self,
        scope: &Scope<'_>,
        round: &Round,
        definition: &Definition,
    ) -> Result<(), ConfigError> {
        let is_base = |model: &ModelEntry| self.base.is_some_and(|base| base.same(&model.model));
        let listed = self.models.iter().filter(|model| is_base(model)).count();
        let count = match definition.base {
            BaseUse::Model => self.models.len() + usize::from(self.base.is_some() && listed == 0),
            BaseUse::Required | BaseUse::Optional => self.models.len() - listed,
        };
        let (least, most) = definition.models;
        if !(least..=most).contains(&count) {
            let many = |n: usize| format!("{n} model{}", if n == 1 { "" } else { "s" });
            let takes = match (least, most) {
                (least, most) if least == most => many(least),
                (least, usize::MAX) => format!("at least {}", many(least)),
                (least, most) => format!("{least} to {}", many(most)),
            };
            let beside = match definition.base {
                BaseUse::Model => ", the base included",
                _ if self.base.is_some() => " beside the base",
                _ => "",
            };
            return Err(ConfigError::NotAllowed {
                path: scope.path.to_owned(),
                line: round.line,
                key: join(&scope.key, "merge_method"),
                why: format!("`{}` merges {takes}{beside} (got {count})", definition.name),
            });
        }
        for spec in definition.parameters.iter().filter(|spec| spec.required) {
            if round.parameters.is_set(spec.name) {
                continue;
            }
            let lacks = |(i, model): &(usize, &ModelEntry)| {
                let skipped = definition.base != BaseUse::Model && is_base(model);
                !skipped && !round.model_parameters.get(*i).is_some_and(|own| own.is_set(spec.name))
            };
            let lacking = match spec.per_model {
                true => self
                    .models
                    .iter()
                    .enumerate()
                    .find(lacks)
                    .map(|(i, model)| (model.line, format!("models[{i}].parameters.{}", spec.name))),
                false => Some((round.line, join(&scope.key, &format!("parameters.{}", spec.name)))),
            };
            if let Some((line, key)) = lacking {
                return Err(ConfigError::Missing {
                    path: scope.path.to_owned(),
                    line,
                    key,
                    why: format!("`{}` has no default for it", definition.name),
                });
            }
        }
        Ok(())
    }

    fn subspace(&self, scope: &Scope<'_>, method: Method) -> Result<Subspace, ConfigError> {
        match (scope.field("subspace"), method.fixed_subspace()) {
            (Some(field), Some(fixed)) => {
                field.word::<Subspace>()?;
                let why = match method {
                    Method::Linear
                    | Method::TaskArithmetic
                    | Method::Passthrough
                    | Method::Elementwise(_) => {
                        format!("`{}` has no subspace; `merge_method: mats` has", method.name())
                    }
                    _ => format!(
                        "`{}` is a preset whose subspace is {}; others go with `merge_method: mats`",
                        method.name(),
                        fixed.name()
                    ),
                };
                Err(field.not_allowed(why))
            }
            (Some(field), None) => field.word(),
            (None, fixed) => Ok(fixed.unwrap_or(Subspace::Auto)),
        }
    }

    /// Each model's parameters as this round sees them. The outer round refuses names its method does not
    /// know; a nested one takes what it knows and does not set itself.
    fn model_parameters(
        &self,
        method: Method,
        own: &Parameters,
        nested: bool,
    ) -> Result<Vec<Parameters>, ConfigError> {
        let of_model = |field: &Option<Field<'_>>| match field {
            None => Ok(Parameters::default()),
            Some(field) if nested => {
                inherited_parameters(field, method).map(|given| given.filtered(|name| !own.is_set(name)))
            }
            Some(field) => parameters(field, method, true),
        };
        self.written.iter().map(of_model).collect()
    }

    fn initial(
        &self,
        scope: &Scope<'_>,
        method: Method,
        unmatched: Unmatched,
    ) -> Result<Initial, ConfigError> {
        let Some(field) = scope.field("initial") else {
            return Ok(Initial::Auto);
        };
        if !method.solves() {
            return Err(
                field.not_allowed(format!("`{}` solves nothing, so it starts nowhere", method.name()))
            );
        }
        if field.is_mapping() {
            let inner = field.scope("a nested config")?;
            self.check_nested_keys(&inner)?;
            return Ok(Initial::Nested(Box::new(self.round(&inner, Some(unmatched))?)));
        }
        let word = field.text("a word, the path of a checkpoint or a nested config")?;
        match word {
            "auto" => Ok(Initial::Auto),
            "zero" => Ok(Initial::Zero),
            "average" => Ok(Initial::Average),
            "base" => {
                self.need_base(scope, field.line, "`initial: base`")?;
                Ok(Initial::Base)
            }
            _ => {
                let model = model_path(&field, self.context)?;
                // A bare word that is no path is a misspelt keyword rather than a checkpoint gone missing.
                let is_path = word.contains('/') || word.ends_with(".safetensors") || model.path.exists();
                if is_path {
                    Ok(Initial::Checkpoint(model))
                } else {
                    Err(field.unknown_value::<InitialWord>(word, &["a checkpoint's path", "a nested config"]))
                }
            }
        }
    }

    fn check_nested_keys(&self, inner: &Scope<'_>) -> Result<(), ConfigError> {
        for entry in inner.entries {
            if entry.key == "sweep" {
                return Err(sweep::refuse_nested(inner.path, join(&inner.key, &entry.key), entry.line));
            }
            if TOP_KEYS.contains(&entry.key.as_str()) && !NESTED_KEYS.contains(&entry.key.as_str()) {
                return Err(ConfigError::NotAllowed {
                    path: inner.path.to_owned(),
                    line: entry.line,
                    key: join(&inner.key, &entry.key),
                    why: format!("a nested config inherits the outer one's `{}`; leave it out", entry.key),
                });
            }
        }
        inner.check_keys(NESTED_KEYS, belongs)
    }

    fn need_base(&self, scope: &Scope<'_>, line: usize, who: &str) -> Result<(), ConfigError> {
        if self.base.is_some() {
            return Ok(());
        }
        Err(ConfigError::Missing {
            path: scope.path.to_owned(),
            line,
            key: "base_model".to_owned(),
            why: format!("{who} needs it"),
        })
    }

    /// A subspace that cannot do without statistics needs them of every model; `auto` of every model or of
    /// none, since one model without would make every parameter unmatched. A model of weight 0 is dropped
    /// before.
    fn check_statistics(&self, path: &Path, round: &Round) -> Result<(), ConfigError> {
        let some = self.models.iter().any(|model| !model.statistics.is_empty());
        if !(round.subspace.needs_statistics() || round.subspace == Subspace::Auto && some) {
            return Ok(());
        }
        let lacks = |(i, model): &(usize, &ModelEntry)| {
            model.statistics.is_empty() && uniform_weight(round, *i) != Some(0.0)
        };
        let Some((i, model)) = self.models.iter().enumerate().find(lacks) else {
            return Ok(());
        };
        let subspace = round.subspace.name();
        let why = if round.subspace == Subspace::Auto {
            "other models name theirs, and `subspace: auto` needs those of all models (or of none)".to_owned()
        } else if round.method == Method::Mats {
            format!("`subspace: {subspace}` needs the statistics of every model")
        } else {
            format!("`{}` needs the statistics of every model", round.method.name())
        };
        Err(ConfigError::Missing {
            path: path.to_owned(),
            line: model.line,
            key: format!("models[{i}].statistics"),
            why,
        })
    }

    /// Refuses weights that are known to sum to 0 for every tensor where their sum divides.
    fn check_weights(&self, scope: &Scope<'_>, round: &Round) -> Result<(), ConfigError> {
        // What divides by weights checks them for each tensor.
        if matches!(round.method, Method::Elementwise(_)) {
            return Ok(());
        }
        let divides = round.method.solves()
            || match round.parameters.is_set("normalize") {
                true => round.parameters.uniform_boolean("normalize") == Some(true),
                false => round.method == Method::Linear,
            };
        if !divides {
            return Ok(());
        }
        let mut sum = 0.0;
        for (i, model) in self.models.iter().enumerate() {
            if round.skips_base() && self.base.is_some_and(|base| base.same(&model.model)) {
                continue;
            }
            match uniform_weight(round, i) {
                Some(weight) => sum += weight,
                None => return Ok(()),
            }
        }
        if sum != 0.0 {
            return Ok(());
        }
        let all_skipped = round.skips_base()
            && self.models.iter().all(|model| self.base.is_some_and(|base| base.same(&model.model)));
        if all_skipped {
            return Ok(());
        }
        let line = round.model_parameters.iter().find_map(|own| own.line("weight"));
        Err(ConfigError::NotAllowed {
            path: scope.path.to_owned(),
            line: line.or(round.parameters.line("weight")).unwrap_or(round.line),
            key: join(&scope.key, "parameters.weight"),
            why: "the models' weights sum to 0, and their sum divides".to_owned(),
        })
    }
}

/// The words of `initial`, for the error that lists them.
#[derive(Clone, Copy)]
struct InitialWord;

impl Words for InitialWord {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self), ("zero", Self), ("average", Self), ("base", Self)];
}

/// A model's weight if it is one number for all tensors.
fn uniform_weight(round: &Round, model: usize) -> Option<f64> {
    let own = round.model_parameters.get(model).filter(|own| own.is_set("weight"));
    match own {
        Some(own) => own.uniform_number("weight"),
        None if round.parameters.is_set("weight") => round.parameters.uniform_number("weight"),
        None => Some(1.0),
    }
}

/// Reads `parameters` of a round, or (`per_model`) of one model.
fn parameters(field: &Field<'_>, method: Method, per_model: bool) -> Result<Parameters, ConfigError> {
    let scope = field.scope("a mapping of parameters")?;
    let specs = method.parameters();
    let allowed: Vec<_> =
        specs.iter().filter(|spec| spec.per_model || !per_model).map(|spec| spec.name).collect();
    if let Some(entry) = scope.entries.iter().find(|entry| !allowed.contains(&entry.key.as_str()))
        && specs.iter().any(|spec| spec.name == entry.key)
    {
        return Err(ConfigError::NotAllowed {
            path: scope.path.to_owned(),
            line: entry.line,
            key: join(&scope.key, &entry.key),
            why: "is one for all models: give it under the config's own `parameters`".to_owned(),
        });
    }
    scope.check_keys(&allowed, |_| None)?;
    read_parameters(&scope, specs)
}

/// Reads from a model's `parameters` what a nested round's method takes of each model; the outer round has
/// refused every unknown name.
fn inherited_parameters(field: &Field<'_>, method: Method) -> Result<Parameters, ConfigError> {
    let scope = field.scope("a mapping of parameters")?;
    let specs: Vec<_> = method.parameters().iter().filter(|spec| spec.per_model).copied().collect();
    read_parameters(&scope, &specs)
}

fn read_parameters(scope: &Scope<'_>, specs: &[ParameterSpec]) -> Result<Parameters, ConfigError> {
    let mut parameters = Parameters::default();
    for spec in specs {
        let Some(field) = scope.field(spec.name) else {
            continue;
        };
        let value = match spec.kind {
            ParameterKind::Number(range) => ParameterValue::Number(rules(&field, &|point: &Field<'_>| {
                point.number(|number| range.contains(number), range.expected())
            })?),
            ParameterKind::Boolean => {
                ParameterValue::Boolean(rules(&field, &|point: &Field<'_>| point.boolean())?)
            }
            ParameterKind::Word(words) => {
                ParameterValue::Word(rules(&field, &|point: &Field<'_>| point.one_of(words))?)
            }
        };
        parameters.insert(spec.name, Parameter { line: field.line, value });
    }
    Ok(parameters)
}

/// A scalar, a gradient, a `{filter, value}` or a list of those.
fn rules<T>(
    field: &Field<'_>,
    point: &impl Fn(&Field<'_>) -> Result<T, ConfigError>,
) -> Result<Vec<Rule<T>>, ConfigError> {
    if field.is_mapping() {
        return Ok(vec![rule(field, point)?]);
    }
    match field.items() {
        Some(items) if items.iter().any(Field::is_mapping) => {
            items.iter().map(|item| rule(item, point)).collect()
        }
        _ => Ok(vec![Rule { filter: None, points: points(field, point)? }]),
    }
}

fn rule<T>(
    field: &Field<'_>,
    point: &impl Fn(&Field<'_>) -> Result<T, ConfigError>,
) -> Result<Rule<T>, ConfigError> {
    let scope = field.scope("a `{filter, value}`, as the rest of the list")?;
    scope.check_keys(RULE_KEYS, |_| None)?;
    let filter = match scope.field("filter") {
        Some(filter) => Some(filter.text("a part of tensor names, or `*`")?).filter(|&text| text != "*"),
        None => None,
    };
    let Some(value) = scope.field("value") else {
        return Err(scope.missing("value", "a filter without a value decides nothing"));
    };
    Ok(Rule { filter: filter.map(str::to_owned), points: points(&value, point)? })
}

/// A scalar as one point, a gradient as several.
fn points<T>(
    field: &Field<'_>,
    point: &impl Fn(&Field<'_>) -> Result<T, ConfigError>,
) -> Result<Vec<T>, ConfigError> {
    match &field.node.value {
        Value::Sequence(items) if items.is_empty() => Err(field.wrong_type("at least one value")),
        Value::Sequence(_) => field.items().unwrap_or_default().iter().map(point).collect(),
        _ => Ok(vec![point(field)?]),
    }
}
