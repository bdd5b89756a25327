//! Owns `sweep`: lists of values for keys of the outermost round, and the configuration of each combination. Called by
//! `parse` once the rest of the file is known to be sound; never opens anything.
//!
//! A combination is an ordinary configuration: the file's own tree without `sweep` and with the values filled in, read
//! by the same rules, so that merging its text alone gives the same model.

use std::path::Path;

use super::emit::emit;
use super::error::{ConfigError, nearest};
use super::fields::{Field, Scope};
use super::parameters::ParameterKind;
use super::schema::{MergeConfig, Method, SolverConfig, SolverMethod, Subspace};
use super::yaml::{Entry, MAX_BYTES, Node, Value};

/// Largest number of combinations: each is a model's worth of disk.
pub const MAX_COMBINATIONS: usize = 256;
/// Bytes of all combinations' texts; a config that is swept has a few thousand.
const MAX_TEXT: usize = 16 * MAX_BYTES;

/// A key that may be swept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SweepKey {
    /// `solver.ridge`.
    Ridge,
    /// `solver.max_iterations`.
    MaxIterations,
    /// `parameters.off_diagonal`.
    OffDiagonal,
    /// `parameters.weight`, of all models together.
    Weight,
    /// `parameters.lambda`.
    Lambda,
}

impl SweepKey {
    const ALL: [Self; 5] = [Self::Ridge, Self::MaxIterations, Self::OffDiagonal, Self::Weight, Self::Lambda];
    /// As errors list them.
    const EXPECTED: [&'static str; 5] = [
        "solver.ridge",
        "solver.max_iterations",
        "parameters.off_diagonal",
        "parameters.weight",
        "parameters.lambda",
    ];

    /// As the config writes it: `solver.ridge`.
    pub fn dotted(self) -> &'static str {
        Self::EXPECTED[Self::ALL.iter().position(|key| *key == self).unwrap_or(0)]
    }

    /// The mapping it stands in, and its own name there.
    fn place(self) -> (&'static str, &'static str) {
        self.dotted().split_once('.').unwrap_or(("", self.dotted()))
    }

    /// Its last part: `ridge`.
    pub fn name(self) -> &'static str {
        self.place().1
    }

    /// A value as JSON writes it.
    fn json(self, value: f64) -> serde_json::Value {
        if self == Self::MaxIterations { (value as u64).into() } else { value.into() }
    }

    /// By its dotted spelling, or by its last part alone: no two share one.
    fn find(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|key| key.dotted() == word || key.name() == word)
    }
}

/// One key and its values.
#[derive(Debug, Clone, PartialEq)]
pub struct SweepAxis {
    /// What is varied.
    pub key: SweepKey,
    /// In the order written; all different.
    pub values: Vec<f64>,
    /// Line of the key.
    pub line: usize,
}

/// `sweep`: the grid is the product of the axes.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// In the order written.
    pub axes: Vec<SweepAxis>,
    /// Every combination, the last axis running fastest.
    pub variants: Vec<Variant>,
    /// Line of `sweep`.
    pub line: usize,
}

/// One combination.
#[derive(Debug, Clone)]
pub struct Variant {
    /// `ridge=0.001,off_diagonal=0.9`: a plain file name, unique in the sweep.
    pub name: String,
    /// The value of each axis.
    pub values: Vec<(SweepKey, f64)>,
    /// The configuration that `sweep` stands for; its text is written anew.
    pub config: MergeConfig,
}

impl Variant {
    /// Its values by dotted key, as JSON: integers where they are.
    pub fn parameters(&self) -> serde_json::Value {
        let entries = self.values.iter().map(|(key, value)| (key.dotted().to_owned(), key.json(*value)));
        serde_json::Value::Object(entries.collect())
    }
}

impl Sweep {
    /// The lists, by dotted key, as JSON.
    pub fn grid(&self) -> serde_json::Value {
        let entries = self.axes.iter().map(|axis| {
            let values: Vec<_> = axis.values.iter().map(|value| axis.key.json(*value)).collect();
            (axis.key.dotted().to_owned(), values.into())
        });
        serde_json::Value::Object(entries.collect())
    }
}

/// An axis with the nodes that its values were written as.
struct Written<'n> {
    axis: SweepAxis,
    nodes: Vec<&'n Node>,
}

/// Reads `sweep`; `config` is the file without it, `top` its entries. `parse` reads a derived tree as a configuration.
pub(super) fn sweep(
    field: &Field<'_>,
    top: &Scope<'_>,
    config: &MergeConfig,
    parse: impl Fn(String, &Node) -> Result<MergeConfig, ConfigError>,
) -> Result<Sweep, ConfigError> {
    let scope = field.scope("a mapping of lists, as `{ solver.ridge: [0.01, 0.1] }`")?;
    let written =
        scope.entries.iter().map(|entry| axis(&scope, entry, top, config)).collect::<Result<Vec<_>, _>>()?;
    if written.is_empty() {
        return Err(field.wrong_type("at least one list, as `{ solver.ridge: [0.01, 0.1] }`"));
    }
    for (k, axis) in written.iter().enumerate() {
        if let Some(first) = written[..k].iter().find(|other| other.axis.key == axis.axis.key) {
            return Err(ConfigError::DuplicateKey {
                path: field.path.to_owned(),
                line: axis.axis.line,
                key: format!("sweep.{}", axis.axis.key.dotted()),
                first_line: first.axis.line,
            });
        }
    }
    let combinations = written.iter().try_fold(1usize, |n, a| n.checked_mul(a.nodes.len()));
    let combinations = combinations.filter(|n| *n <= MAX_COMBINATIONS).ok_or_else(|| {
        let lengths: Vec<String> = written.iter().map(|a| a.nodes.len().to_string()).collect();
        field.not_allowed(format!(
            "{} combinations are more than a sweep may have (expected at most {MAX_COMBINATIONS})",
            lengths.join(" x ")
        ))
    })?;

    let mut variants = Vec::with_capacity(combinations);
    let mut text_bytes = 0;
    for mut number in 0..combinations {
        let mut picked = Vec::with_capacity(written.len());
        for axis in written.iter().rev() {
            picked.push(number % axis.nodes.len());
            number /= axis.nodes.len();
        }
        picked.reverse();
        let values: Vec<(SweepKey, f64)> =
            written.iter().zip(&picked).map(|(a, k)| (a.axis.key, a.axis.values[*k])).collect();
        let parts: Vec<String> =
            values.iter().map(|(key, value)| format!("{}={}", key.name(), shortest(*value))).collect();
        let name = parts.join(",");
        let mut entries: Vec<Entry> = top.entries.iter().filter(|e| e.key != "sweep").cloned().collect();
        for (axis, k) in written.iter().zip(&picked) {
            set(&mut entries, axis.axis.key, axis.nodes[*k]);
        }
        let text = format!("# {name} of a sweep\n{}", emit(&entries));
        text_bytes += text.len();
        if text_bytes > MAX_TEXT {
            return Err(ConfigError::Budget {
                path: field.path.to_owned(),
                line: field.line,
                what: "the text of all combinations of a sweep",
                limit: MAX_TEXT,
            });
        }
        let root = Node { line: top.line, value: Value::Mapping(entries) };
        variants.push(Variant { name, values, config: parse(text, &root)? });
    }
    let axes = written.into_iter().map(|a| a.axis).collect();
    Ok(Sweep { axes, variants, line: field.line })
}

fn axis<'n>(
    scope: &Scope<'n>,
    entry: &'n Entry,
    top: &Scope<'_>,
    config: &MergeConfig,
) -> Result<Written<'n>, ConfigError> {
    let Some(key) = SweepKey::find(&entry.key) else { return Err(unknown(scope, entry)) };
    let field =
        Field { path: scope.path, key: format!("sweep.{}", entry.key), line: entry.line, node: &entry.value };
    means_something(key, &field, top, config)?;
    const EXPECTED: &str = "a list of numbers, as `[0.01, 0.1]`";
    let items = field.items().filter(|items| !items.is_empty()).ok_or_else(|| field.wrong_type(EXPECTED))?;
    let mut values: Vec<f64> = Vec::with_capacity(items.len());
    let mut nodes = Vec::with_capacity(items.len());
    for item in items {
        let value = number(key, &item, config.round.method)?;
        // Zero has two signs and one meaning.
        let value = if value == 0.0 { 0.0 } else { value };
        if values.contains(&value) {
            return Err(item.not_allowed(format!("{} is given twice", shortest(value))));
        }
        values.push(value);
        nodes.push(item.node);
    }
    Ok(Written { axis: SweepAxis { key, values, line: entry.line }, nodes })
}

fn unknown(scope: &Scope<'_>, entry: &Entry) -> ConfigError {
    let place = entry.key.split_once('.').map_or(entry.key.as_str(), |(first, _)| first);
    if place == "initial" || place == "models" {
        let why = "only what the outermost round sets for all models can be swept: solver.ridge, \
                   solver.max_iterations, parameters.off_diagonal, parameters.weight, parameters.lambda";
        return ConfigError::NotAllowed {
            path: scope.path.to_owned(),
            line: entry.line,
            key: super::yaml::join(&scope.key, &entry.key),
            why: why.to_owned(),
        };
    }
    ConfigError::UnknownKey {
        path: scope.path.to_owned(),
        line: entry.line,
        key: super::yaml::join(&scope.key, &entry.key),
        expected: SweepKey::EXPECTED.to_vec(),
        nearest: nearest(&entry.key, &SweepKey::EXPECTED),
        belongs: None,
    }
}

/// Refuses a key whose values could change nothing, and one that something else in the config would hide.
fn means_something(
    key: SweepKey,
    field: &Field<'_>,
    top: &Scope<'_>,
    config: &MergeConfig,
) -> Result<(), ConfigError> {
    let round = &config.round;
    let method = round.method;
    let (place, name) = key.place();
    if place == "solver" {
        if !method.solves() {
            return Err(field.not_allowed(format!("`{}` solves nothing, so it has no {name}", method.name())));
        }
        let auto_is_direct = round.subspace == Subspace::Identity
            || matches!(round.subspace, Subspace::FisherDiagonal | Subspace::Gram | Subspace::DeltaGram(_));
        if key == SweepKey::MaxIterations
            && (round.solver.method == SolverMethod::Direct
                || round.solver.method == SolverMethod::Auto && auto_is_direct)
        {
            return Err(field.not_allowed(
                "the solver here is direct and takes no iterations; `solver: { method: cg }` does",
            ));
        }
        return Ok(());
    }
    let Some(spec) = method.parameters().iter().find(|spec| spec.name == name) else {
        return Err(field.not_allowed(format!("`{}` has no parameter {name}", method.name())));
    };
    if key == SweepKey::OffDiagonal && matches!(round.subspace, Subspace::Identity | Subspace::FisherDiagonal)
    {
        return Err(
            field.not_allowed(format!("`subspace: {}` has nothing off the diagonal", round.subspace.name()))
        );
    }
    if spec.per_model
        && let Some((i, own)) = round.model_parameters.iter().enumerate().find(|(_, own)| own.is_set(name))
    {
        let line = own.line(name).unwrap_or(0);
        return Err(field.not_allowed(format!(
            "models[{i}] sets its own {name} at line {line}, which wins over the swept one; leave one of them out"
        )));
    }
    if round.parameters.is_set(name) && round.parameters.uniform_number(name).is_none() {
        let line = round.parameters.line(name).unwrap_or(top.line);
        return Err(field.not_allowed(format!(
            "parameters.{name} at line {line} varies over tensors or layers, which one number would undo; leave one of \
             them out"
        )));
    }
    Ok(())
}

fn number(key: SweepKey, item: &Field<'_>, method: Method) -> Result<f64, ConfigError> {
    match key {
        SweepKey::MaxIterations => {
            Ok(item.integer(SolverConfig::MAX_ITERATIONS, "an integer from 0 to 1000000")? as f64)
        }
        SweepKey::Ridge => item.number(|x| x >= 0.0, "a finite number of at least 0"),
        SweepKey::OffDiagonal | SweepKey::Weight | SweepKey::Lambda => {
            let spec = method.parameters().iter().find(|spec| spec.name == key.name());
            match spec.map(|spec| spec.kind) {
                Some(ParameterKind::Number(range)) => {
                    item.number(|number| range.contains(number), range.expected())
                }
                _ => item.number(|_| true, "a finite number"),
            }
        }
    }
}

/// Puts `value` at `key`, over what the file has there.
fn set(entries: &mut Vec<Entry>, key: SweepKey, value: &Node) {
    let (place, name) = key.place();
    let empty = || Node { line: value.line, value: Value::Mapping(Vec::new()) };
    let at = entries.iter().position(|entry| entry.key == place).unwrap_or_else(|| {
        entries.push(Entry { key: place.to_owned(), line: value.line, value: empty() });
        entries.len() - 1
    });
    // `solver:` with nothing after it is a key not given.
    if entries[at].value.is_null() {
        entries[at].value = empty();
    }
    if let Value::Mapping(inner) = &mut entries[at].value.value {
        inner.retain(|entry| entry.key != name);
        inner.push(Entry { key: name.to_owned(), line: value.line, value: value.clone() });
    }
}

/// The shortest decimal that reads back as `value`, with an exponent only where it saves many zeros.
fn shortest(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 || (1e-5..1e16).contains(&size) { value.to_string() } else { format!("{value:e}") }
}

/// Refuses `sweep` inside a nested round.
pub(super) fn refuse_nested(path: &Path, key: String, line: usize) -> ConfigError {
    ConfigError::NotAllowed {
        path: path.to_owned(),
        line,
        key,
        why: "only the outermost round can be swept; give `sweep` at the top level".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::shortest;

    #[test]
    fn numbers_are_short_and_exact() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.001, "0.001"),
            (1e-4, "0.0001"),
            (1e-5, "0.00001"),
            (1e-6, "1e-6"),
            (2.5e-7, "2.5e-7"),
            (1e20, "1e20"),
            (-0.3, "-0.3"),
            (100.0, "100"),
            (0.1 + 0.2, "0.30000000000000004"),
        ] {
            assert_eq!(shortest(value), text);
            assert_eq!(text.parse::<f64>().ok(), Some(value));
        }
    }
}
