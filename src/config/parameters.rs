//! Owns the values under `parameters`: scalars, gradients over the layers and `{filter, value}` lists, as
//! mergekit defines them. Filled by `parse`, asked by the engine once per tensor; never knows which methods
//! exist.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

/// The parameters of one level (a round, or one model), by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters {
    entries: BTreeMap<&'static str, Parameter>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parameter {
    pub line: usize,
    pub value: ParameterValue,
}

/// A value that may depend on the tensor's name and on its layer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ParameterValue {
    Number(Vec<Rule<f64>>),
    Boolean(Vec<Rule<bool>>),
    /// Each one of the words of the parameter's list.
    Word(Vec<Rule<&'static str>>),
}

/// One `{filter, value}`; a value outside a list is a single rule without a filter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rule<T> {
    /// Substring of the tensor's name; `None` (absent or `*`) matches all.
    pub filter: Option<String>,
    /// One point is a scalar, more are a gradient from the first layer to the last. Never empty.
    pub points: Vec<T>,
}

impl Parameters {
    /// The number for one tensor, `t` in [0, 1] being the position of its layer. `None`: not given here, or
    /// given as a filter list of which nothing matches.
    pub fn number(&self, name: &str, tensor: &str, t: f64) -> Option<f64> {
        match &self.entries.get(name)?.value {
            ParameterValue::Number(rules) => first_match(rules, tensor).map(|points| interpolate(points, t)),
            ParameterValue::Boolean(_) | ParameterValue::Word(_) => None,
        }
    }

    /// As [`Parameters::number`], of a true-or-false parameter; a list picks by index.
    pub fn boolean(&self, name: &str, tensor: &str, t: f64) -> Option<bool> {
        match &self.entries.get(name)?.value {
            ParameterValue::Boolean(rules) => {
                let points = first_match(rules, tensor)?;
                points.get(position(points.len(), t).0).copied()
            }
            ParameterValue::Number(_) | ParameterValue::Word(_) => None,
        }
    }

    /// As [`Parameters::boolean`], of a parameter that takes one of several words.
    pub fn word(&self, name: &str, tensor: &str, t: f64) -> Option<&'static str> {
        match &self.entries.get(name)?.value {
            ParameterValue::Word(rules) => {
                let points = first_match(rules, tensor)?;
                points.get(position(points.len(), t).0).copied()
            }
            ParameterValue::Number(_) | ParameterValue::Boolean(_) => None,
        }
    }

    /// Whether the name is given at all, for whatever tensors.
    pub fn is_set(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether no name is given.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Line of the config on which the name is given.
    pub fn line(&self, name: &str) -> Option<usize> {
        self.entries.get(name).map(|parameter| parameter.line)
    }

    /// The number, if it is the same for every tensor and layer.
    pub fn uniform_number(&self, name: &str) -> Option<f64> {
        match &self.entries.get(name)?.value {
            ParameterValue::Number(rules) => uniform(rules),
            ParameterValue::Boolean(_) | ParameterValue::Word(_) => None,
        }
    }

    /// The truth value, if it is the same for every tensor and layer.
    pub fn uniform_boolean(&self, name: &str) -> Option<bool> {
        match &self.entries.get(name)?.value {
            ParameterValue::Boolean(rules) => uniform(rules),
            ParameterValue::Number(_) | ParameterValue::Word(_) => None,
        }
    }

    pub(super) fn insert(&mut self, name: &'static str, parameter: Parameter) {
        self.entries.insert(name, parameter);
    }

    /// These, and where they decide nothing for a tensor, `below`: one level's values over those of the level around it.
    pub(super) fn over(mut self, below: Self) -> Self {
        for (name, mut outer) in below.entries {
            match self.entries.get_mut(name) {
                None => {
                    self.entries.insert(name, outer);
                }
                // The first rule that matches decides, so the outer level's simply follow.
                Some(own) => match (&mut own.value, &mut outer.value) {
                    (ParameterValue::Number(own), ParameterValue::Number(more)) => own.append(more),
                    (ParameterValue::Boolean(own), ParameterValue::Boolean(more)) => own.append(more),
                    _ => {}
                },
            }
        }
        self
    }

    /// Those entries whose name `keep` wants.
    pub(super) fn filtered(&self, keep: impl Fn(&str) -> bool) -> Self {
        let kept = self.entries.iter().filter(|(name, _)| keep(name));
        Self { entries: kept.map(|(&name, parameter)| (name, parameter.clone())).collect() }
    }

    /// Appends `{prefix}{name} = value` lines; line numbers do not enter.
    pub(super) fn write_canonical(&self, out: &mut String, prefix: &str) {
        for (name, parameter) in &self.entries {
            let _ = write!(out, "{prefix}{name} =");
            match &parameter.value {
                ParameterValue::Number(rules) => write_rules(out, rules),
                ParameterValue::Boolean(rules) => write_rules(out, rules),
                ParameterValue::Word(rules) => write_rules(out, rules),
            }
            out.push('\n');
        }
    }
}

fn write_rules<T: fmt::Debug>(out: &mut String, rules: &[Rule<T>]) {
    for rule in rules {
        // `Debug` of f64 is the shortest text that reads back as the same number.
        let _ = match &rule.filter {
            Some(filter) => write!(out, " {filter:?}:{:?}", rule.points),
            None => write!(out, " *:{:?}", rule.points),
        };
    }
}

fn first_match<'r, T>(rules: &'r [Rule<T>], tensor: &str) -> Option<&'r [T]> {
    let rule =
        rules.iter().find(|rule| rule.filter.as_deref().is_none_or(|filter| tensor.contains(filter)))?;
    Some(&rule.points)
}

fn uniform<T: Copy>(rules: &[Rule<T>]) -> Option<T> {
    match rules.first()? {
        Rule { filter: None, points } if points.len() == 1 => points.first().copied(),
        _ => None,
    }
}

/// Index of the point at or before `t`, and how far `t` lies towards the next, in [0, 1).
fn position(len: usize, t: f64) -> (usize, f64) {
    let t = if t.is_nan() { 0.0 } else { t.clamp(0.0, 1.0) };
    let scaled = t * len.saturating_sub(1) as f64;
    (scaled as usize, scaled.fract())
}

/// Linear interpolation at `t`·(len − 1).
fn interpolate(points: &[f64], t: f64) -> f64 {
    let (index, fraction) = position(points.len(), t);
    match (points.get(index), points.get(index + 1)) {
        (Some(&a), Some(&b)) if fraction > 0.0 => (1.0 - fraction) * a + fraction * b,
        (Some(&a), _) => a,
        // Unreachable: a rule has at least one point.
        (None, _) => 0.0,
    }
}

/// A name that some method's `parameters` may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterSpec {
    /// As the config writes it.
    pub name: &'static str,
    /// What its values are.
    pub kind: ParameterKind,
    /// Whether a model may give its own value.
    pub per_model: bool,
    /// Whether it has no default.
    pub required: bool,
}

/// What the values of a parameter are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// Numbers; a list of them is a gradient over the layers.
    Number(Range),
    /// `true` or `false`; a list picks by layer.
    Boolean,
    /// One of these words, `true` and `false` among them or not; a list picks by layer.
    Word(&'static [&'static str]),
}

/// Which finite numbers are accepted. Every range is convex, so a gradient stays inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// All of them.
    Any,
    /// 0 and more.
    NonNegative,
    /// 0 to 1.
    Unit,
}

impl ParameterSpec {
    /// A number for all models, with a default.
    pub const fn number(name: &'static str, range: Range) -> Self {
        Self { name, kind: ParameterKind::Number(range), per_model: false, required: false }
    }

    /// `true` or `false` for all models, with a default.
    pub const fn boolean(name: &'static str) -> Self {
        Self { name, kind: ParameterKind::Boolean, per_model: false, required: false }
    }

    /// One of some words for all models, with a default.
    pub const fn word(name: &'static str, words: &'static [&'static str]) -> Self {
        Self { name, kind: ParameterKind::Word(words), per_model: false, required: false }
    }

    /// The same, which a model may give its own value of.
    pub const fn per_model(self) -> Self {
        Self { per_model: true, ..self }
    }

    /// The same without a default.
    pub const fn required(self) -> Self {
        Self { required: true, ..self }
    }
}

impl Range {
    /// Whether a number is accepted.
    pub fn contains(self, number: f64) -> bool {
        // Merges compute in f32.
        number.abs() <= f64::from(f32::MAX)
            && match self {
                Self::Any => true,
                Self::NonNegative => number >= 0.0,
                Self::Unit => (0.0..=1.0).contains(&number),
            }
    }

    /// As an error message says it.
    pub fn expected(self) -> &'static str {
        match self {
            Self::Any => "a finite number",
            Self::NonNegative => "a finite number of at least 0",
            Self::Unit => "a number from 0 to 1",
        }
    }
}
