//! Owns `slices` and `modules`: the parts of the output that are merged on their own, each as a config of its
//! own with the parameters of all levels in it. Filled by `parse`; knows nothing of what a layer is called.

use std::ops::Range;
use std::path::Path;

use super::error::ConfigError;
use super::fields::{Field, Scope};
use super::parse::{Models, model_path, models};
use super::schema::{ModelEntry, ModelPath};

const SLICE_KEYS: &[&str] = &["sources", "base_model", "parameters", "residual_weight"];
const SOURCE_KEYS: &[&str] = &["model", "layer_range", "parameters"];
const MODULE_KEYS: &[&str] = &["models", "slices", "parameters"];
/// More layers than any model has; keeps sums of ranges small.
const MAX_LAYER: usize = 100_000;

/// The layers of one slice, counted from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceLayers {
    /// One range a model of the section, all of the same length.
    pub ranges: Vec<Range<usize>>,
    /// The base's range, where the section has a base.
    pub base: Option<Range<usize>>,
    /// Where they stand in the output.
    pub output: Range<usize>,
    /// The section also holds what stands before the layers (embeddings) …
    pub first: bool,
    /// … or after them (final norm, head).
    pub last: bool,
    /// Line of the slice.
    pub line: usize,
}

/// What `parse` makes a section of: whose models, which layers, under which parameters.
pub(super) struct Part<'n> {
    pub module: Option<String>,
    pub models: Vec<ModelEntry>,
    /// `parameters` of each model, as written.
    pub written: Vec<Option<Field<'n>>>,
    /// `parameters` of the slice and of its module, innermost first.
    pub levels: Vec<Field<'n>>,
    /// The slice's own `base_model`.
    pub base_model: Option<ModelPath>,
    pub layers: Option<SliceLayers>,
    /// Key path, for messages about the part as a whole.
    pub key: String,
    pub line: usize,
}

/// The parts of `slices` or `modules`; none if the config has `models`.
pub(super) fn parts<'n>(top: &Scope<'n>, context: &Models<'_>) -> Result<Vec<Part<'n>>, ConfigError> {
    let given: Vec<Field<'n>> =
        ["models", "slices", "modules"].iter().filter_map(|name| top.field(name)).collect();
    if let [_, second, ..] = &given[..] {
        return Err(second.not_allowed("give one of `models`, `slices` and `modules`"));
    }
    if let Some(field) = top.field("slices") {
        return slices(&field, None, &[], context);
    }
    let Some(field) = top.field("modules") else { return Ok(Vec::new()) };
    let scope = field.scope("a mapping from a module's name to its `models` or `slices`")?;
    if scope.entries.is_empty() {
        return Err(top.missing("modules", "the mapping is empty, and a merge needs at least one module"));
    }
    let mut parts = Vec::new();
    for entry in scope.entries {
        let Some(field) = scope.field(&entry.key) else {
            return Err(scope.missing(&entry.key, "a module has `models` or `slices`"));
        };
        let module = field.scope("a mapping with `models` or `slices`")?;
        module.check_keys(MODULE_KEYS, |_| None)?;
        let levels: Vec<Field<'n>> = module.field("parameters").into_iter().collect();
        match (module.field("models"), module.field("slices")) {
            (Some(_), Some(slices)) => {
                return Err(slices.not_allowed("give `models` or `slices` in a module, not both"));
            }
            (None, None) => return Err(module.missing("models", "a module has `models` or `slices`")),
            (None, Some(field)) => parts.extend(slices(&field, Some(&entry.key), &levels, context)?),
            (Some(_), None) => {
                let (models, written) = models(&module, context)?;
                parts.push(Part {
                    module: Some(entry.key.clone()),
                    models,
                    written,
                    levels,
                    base_model: None,
                    layers: None,
                    key: field.key.clone(),
                    line: field.line,
                });
            }
        }
    }
    Ok(parts)
}

fn slices<'n>(
    field: &Field<'n>,
    module: Option<&str>,
    outer: &[Field<'n>],
    context: &Models<'_>,
) -> Result<Vec<Part<'n>>, ConfigError> {
    let items = field.items().ok_or_else(|| field.wrong_type("a list of slices"))?;
    if items.is_empty() {
        return Err(field.not_allowed("the list is empty, and a merge needs at least one slice"));
    }
    let (mut parts, mut next, count) = (Vec::with_capacity(items.len()), 0, items.len());
    for (k, item) in items.into_iter().enumerate() {
        let slice = item.scope("a mapping with `sources`")?;
        slice.check_keys(SLICE_KEYS, |key| match key {
            "model" | "layer_range" => Some("sources"),
            _ => None,
        })?;
        if let Some(unread) = slice.field("residual_weight") {
            context.warn(
                unread.path,
                unread.line,
                format!("{}: is accepted and changes nothing, as in mergekit", unread.key),
            );
        }
        let Some(sources) = slice.field("sources") else {
            return Err(slice.missing("sources", "a slice lists the layers it takes"));
        };
        let listed = sources.items().ok_or_else(|| sources.wrong_type("a list of sources"))?;
        if listed.is_empty() {
            return Err(slice.missing("sources", "the list is empty, and a slice needs at least one source"));
        }
        let (mut models, mut written, mut ranges) = (Vec::new(), Vec::new(), Vec::<Range<usize>>::new());
        for source in listed {
            let scope = source.scope("a mapping with `model` and `layer_range`")?;
            if let Some(statistics) = scope.field("statistics") {
                return Err(
                    statistics.not_allowed("layers have statistics only in a config that lists `models`")
                );
            }
            scope.check_keys(SOURCE_KEYS, |key| if key == "weight" { Some("parameters") } else { None })?;
            let Some(model) = scope.field("model") else {
                return Err(scope.missing("model", "every source names a checkpoint"));
            };
            let model = model_path(&model, context)?;
            let Some(range) = scope.field("layer_range") else {
                return Err(scope.missing("layer_range", "a source says which layers it gives, as `[0, 16]`"));
            };
            let layers = layer_range(&range)?;
            if let Some(first) = ranges.first()
                && first.len() != layers.len()
            {
                return Err(range.not_allowed(format!(
                    "all sources of a slice have the same number of layers (got {}, expected {} as in the first)",
                    layers.len(),
                    first.len()
                )));
            }
            ranges.push(layers);
            models.push(ModelEntry { model, statistics: Vec::new(), line: source.line });
            written.push(scope.field("parameters"));
        }
        let length = ranges[0].len();
        let output = next..next + length;
        next = output.end;
        parts.push(Part {
            module: module.map(str::to_owned),
            models,
            written,
            levels: slice.field("parameters").into_iter().chain(outer.iter().cloned()).collect(),
            base_model: slice.field("base_model").map(|field| model_path(&field, context)).transpose()?,
            layers: Some(SliceLayers {
                ranges,
                base: None,
                output,
                first: k == 0,
                last: k + 1 == count,
                line: item.line,
            }),
            key: item.key.clone(),
            line: item.line,
        });
    }
    Ok(parts)
}

/// `[first, end)`.
fn layer_range(field: &Field<'_>) -> Result<Range<usize>, ConfigError> {
    const EXPECTED: &str = "two integers `[first, end]`, the end not included";
    let items = field.items().ok_or_else(|| field.wrong_type(EXPECTED))?;
    let [first, end] = &items[..] else { return Err(field.wrong_type(EXPECTED)) };
    let (first, end) =
        (first.integer(MAX_LAYER, "a layer's number")?, end.integer(MAX_LAYER, "a layer's number")?);
    if first >= end {
        return Err(field.out_of_range(&format!("[{first}, {end}]"), "at least one layer, first < end"));
    }
    Ok(first..end)
}

impl Part<'_> {
    /// The base of this part, given the config's: the source that is the same model, else (where `needed`) the base at
    /// the layers that all sources take.
    ///
    /// # Errors
    /// [`ConfigError::NotAllowed`] where a base is needed and its layers cannot be told.
    pub fn base(
        &mut self,
        path: &Path,
        outer: Option<&ModelPath>,
        needed: bool,
    ) -> Result<Option<ModelPath>, ConfigError> {
        let Some(base) = self.base_model.as_ref().or(outer).cloned() else { return Ok(None) };
        let Some(layers) = &mut self.layers else { return Ok(Some(base)) };
        if let Some(k) = self.models.iter().position(|entry| entry.model.same(&base)) {
            layers.base = Some(layers.ranges[k].clone());
            return Ok(Some(base));
        }
        if !needed {
            return Ok(None);
        }
        if layers.ranges.windows(2).any(|pair| pair[0] != pair[1]) {
            return Err(ConfigError::NotAllowed {
                path: path.to_owned(),
                line: self.line,
                key: self.key.clone(),
                why: format!(
                    "the method needs the base's layers, and the sources differ in theirs: add `{}` with its \
                     `layer_range` to the sources",
                    base.written
                ),
            });
        }
        layers.base = layers.ranges.first().cloned();
        Ok(Some(base))
    }
}
