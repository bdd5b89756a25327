//! Owns the typed access to YAML nodes: a value together with the key path and line that an error about it
//! names. Used by `parse`; knows scalars, lists and mappings, not what any key means.

use std::path::Path;

use super::error::{ConfigError, nearest};
use super::schema::Words;
use super::yaml::{Entry, Node, Value, join};

/// A value and where it stands.
#[derive(Clone)]
pub(super) struct Field<'n> {
    pub path: &'n Path,
    /// As `models[1].parameters.weight`.
    pub key: String,
    /// Of the key; the value's own line is [`Field::value_line`].
    pub line: usize,
    pub node: &'n Node,
}

/// A mapping and where it stands.
pub(super) struct Scope<'n> {
    pub path: &'n Path,
    /// Empty at the top level.
    pub key: String,
    pub line: usize,
    pub entries: &'n [Entry],
}

/// How a number is written: `max_iterations` takes no `1e2`.
enum Number {
    Integer(f64, Option<i128>),
    Float(f64),
}

impl<'n> Scope<'n> {
    pub fn field(&self, name: &str) -> Option<Field<'n>> {
        let entry = self.entries.iter().find(|entry| entry.key == name)?;
        // `key:` with nothing after it is a key not given, as in mergekit.
        (!entry.value.is_null()).then(|| Field {
            path: self.path,
            key: join(&self.key, name),
            line: entry.line,
            node: &entry.value,
        })
    }

    /// Refuses every key outside `known`, in the order written; `belongs` says where a stray word has a
    /// meaning.
    pub fn check_keys(
        &self,
        known: &[&'static str],
        belongs: impl Fn(&str) -> Option<&'static str>,
    ) -> Result<(), ConfigError> {
        let Some(entry) = self.entries.iter().find(|entry| !known.contains(&entry.key.as_str())) else {
            return Ok(());
        };
        Err(ConfigError::UnknownKey {
            path: self.path.to_owned(),
            line: entry.line,
            key: join(&self.key, &entry.key),
            expected: known.to_vec(),
            nearest: nearest(&entry.key, known),
            belongs: belongs(&entry.key),
        })
    }

    /// The error of a key that must be there.
    pub fn missing(&self, name: &str, why: &str) -> ConfigError {
        let line = self.entries.iter().find(|entry| entry.key == name).map_or(self.line, |entry| entry.line);
        ConfigError::Missing {
            path: self.path.to_owned(),
            line,
            key: join(&self.key, name),
            why: why.to_owned(),
        }
    }
}

impl<'n> Field<'n> {
    /// Where the value itself is written: behind an alias, in a long list or a block, not the key's line.
    pub fn value_line(&self) -> usize {
        if self.node.line == 0 { self.line } else { self.node.line }
    }

    pub fn scope(&self, expected: &'static str) -> Result<Scope<'n>, ConfigError> {
        match &self.node.value {
            Value::Mapping(entries) => {
                Ok(Scope { path: self.path, key: self.key.clone(), line: self.line, entries })
            }
            _ => Err(self.wrong_type(expected)),
        }
    }

    pub fn is_mapping(&self) -> bool {
        matches!(self.node.value, Value::Mapping(_))
    }

    /// The items of a list; `None` if it is none.
    pub fn items(&self) -> Option<Vec<Self>> {
        let Value::Sequence(items) = &self.node.value else {
            return None;
        };
        let item = |(i, node): (usize, &'n Node)| Self {
            path: self.path,
            key: format!("{}[{i}]", self.key),
            line: node.line,
            node,
        };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// A scalar as text, quoted or not; not empty.
    pub fn text(&self, expected: &'static str) -> Result<&'n str, ConfigError> {
        match &self.node.value {
            Value::Scalar { text, .. } if !text.is_empty() && !self.node.is_null() => Ok(text),
            _ => Err(self.wrong_type(expected)),
        }
    }

    /// One word of a fixed list.
    pub fn word<T: Words>(&self) -> Result<T, ConfigError> {
        let word = self.text("a word")?;
        match T::WORDS.iter().find(|(known, _)| *known == word) {
            Some(&(_, value)) => Ok(value),
            None => Err(self.unknown_value::<T>(word, &[])),
        }
    }

    /// A finite number that `accepts`, which `expected` describes.
    pub fn number(&self, accepts: impl Fn(f64) -> bool, expected: &'static str) -> Result<f64, ConfigError> {
        let (text, number) = self.parse_number(expected)?;
        let (Number::Integer(number, _) | Number::Float(number)) = number;
        if number.is_finite() && accepts(number) {
            Ok(number)
        } else {
            Err(self.out_of_range(text, expected))
        }
    }

    /// An integer from 0 to `max`.
    pub fn integer(&self, max: usize, expected: &'static str) -> Result<usize, ConfigError> {
        let (text, number) = self.parse_number(expected)?;
        match number {
            Number::Integer(_, Some(integer)) => usize::try_from(integer)
                .ok()
                .filter(|&n| n <= max)
                .ok_or_else(|| self.out_of_range(text, expected)),
            _ => Err(self.out_of_range(text, expected)),
        }
    }

    /// With the words of YAML 1.1, which mergekit's reader knows, and the numbers that it takes for truth values.
    pub fn boolean(&self) -> Result<bool, ConfigError> {
        match &self.node.value {
            Value::Scalar { text, plain: true } => match text.as_str() {
                "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "1" | "1.0" => {
                    Ok(true)
                }
                "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "0" | "0.0" => {
                    Ok(false)
                }
                _ => Err(self.wrong_type("`true` or `false`")),
            },
            _ => Err(self.wrong_type("`true` or `false`")),
        }
    }

    pub fn wrong_type(&self, expected: &'static str) -> ConfigError {
        ConfigError::WrongType {
            path: self.path.to_owned(),
            line: self.value_line(),
            key: self.key.clone(),
            found: self.node.describe(),
            expected,
        }
    }

    /// `or` describes what is accepted beside the words of `T`.
    pub fn unknown_value<T: Words>(&self, word: &str, or: &[&'static str]) -> ConfigError {
        let words: Vec<_> = T::WORDS.iter().map(|&(known, _)| known).collect();
        ConfigError::UnknownValue {
            path: self.path.to_owned(),
            line: self.value_line(),
            key: self.key.clone(),
            value: word.to_owned(),
            nearest: nearest(word, &words),
            expected: [&words, or].concat(),
        }
    }

    /// One of `words`; `True` and `FALSE` are `true` and `false`.
    pub fn one_of(&self, words: &'static [&'static str]) -> Result<&'static str, ConfigError> {
        let word = self.text("a word")?;
        let spelt = match word {
            "True" | "TRUE" => "true",
            "False" | "FALSE" => "false",
            word => word,
        };
        words.iter().find(|known| **known == spelt).copied().ok_or_else(|| self.unknown_word(word, words))
    }

    /// As [`Field::unknown_value`], of words that are no enum's.
    pub fn unknown_word(&self, word: &str, expected: &[&'static str]) -> ConfigError {
        ConfigError::UnknownValue {
            path: self.path.to_owned(),
            line: self.value_line(),
            key: self.key.clone(),
            value: word.to_owned(),
            nearest: nearest(word, expected),
            expected: expected.to_vec(),
        }
    }

    pub fn not_allowed(&self, why: impl Into<String>) -> ConfigError {
        ConfigError::NotAllowed {
            path: self.path.to_owned(),
            line: self.line,
            key: self.key.clone(),
            why: why.into(),
        }
    }

    pub fn out_of_range(&self, value: &str, expected: &'static str) -> ConfigError {
        ConfigError::OutOfRange {
            path: self.path.to_owned(),
            line: self.value_line(),
            key: self.key.clone(),
            value: value.to_owned(),
            expected,
        }
    }

    fn parse_number(&self, expected: &'static str) -> Result<(&'n str, Number), ConfigError> {
        let Value::Scalar { text, plain: true } = &self.node.value else {
            return Err(self.wrong_type(expected));
        };
        number(text).map(|number| (text.as_str(), number)).ok_or_else(|| self.wrong_type(expected))
    }
}

/// A plain scalar as YAML 1.2's core schema reads it; `.inf` and `.nan` are numbers, just never accepted
/// ones.
fn number(text: &str) -> Option<Number> {
    let radix = |digits: &str, radix| {
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_alphanumeric());
        let integer = plain.then(|| i128::from_str_radix(digits, radix).ok()).flatten()?;
        Some(Number::Integer(integer as f64, Some(integer)))
    };
    if let Some(digits) = text.strip_prefix("0x") {
        return radix(digits, 16);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return radix(digits, 8);
    }
    let (sign, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    match unsigned {
        ".inf" | ".Inf" | ".INF" => return Some(Number::Float(sign * f64::INFINITY)),
        ".nan" | ".NaN" | ".NAN" if unsigned.len() == text.len() => {
            return Some(Number::Float(f64::NAN));
        }
        _ => {}
    }
    // `parse` would take `inf`, `nan` and `infinity` too, which are words in YAML.
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        || unsigned.contains(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-')))
    {
        return None;
    }
    let number = sign * unsigned.parse::<f64>().ok()?;
    if unsigned.bytes().all(|b| b.is_ascii_digit()) {
        Some(Number::Integer(number, text.parse().ok()))
    } else {
        Some(Number::Float(number))
    }
}

#[cfg(test)]
mod tests {
    use super::{Number, number};

    fn value(text: &str) -> Option<f64> {
        number(text).map(|(Number::Integer(x, _) | Number::Float(x))| x)
    }

    #[test]
    fn numbers_follow_the_core_schema() {
        for (text, expected) in [
            ("1", 1.0),
            ("+1", 1.0),
            ("-0.5", -0.5),
            ("1.0e-3", 1e-3),
            ("1e-3", 1e-3),
            ("1.", 1.0),
            (".5", 0.5),
            ("0x10", 16.0),
            ("0o17", 15.0),
            ("007", 7.0),
            ("-.inf", f64::NEG_INFINITY),
            ("1e400", f64::INFINITY),
        ] {
            assert_eq!(value(text), Some(expected), "{text}");
        }
        assert!(value(".nan").is_some_and(f64::is_nan));
        for text in [
            "", "inf", "nan", "infinity", "1_000", "0x", "0xg", "0x+1", "1e", ".", "--1", "1 2", "-.nan",
            "one",
        ] {
            assert_eq!(value(text), None, "{text}");
        }
    }
}
