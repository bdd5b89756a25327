//! Owns [`ConfigError`] and the wording of its messages: one line each, naming file, line, key path, what was
//! found and what was expected. Raised by every file of `config`; never reads a file itself.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use super::yaml;

/// What is wrong with a configuration. `Display` is always a single line, whatever bytes the file holds; the
/// operating system's own words are `source()`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The operating system refused to open or read the file.
    #[error("{}: cannot {doing} the config file", Shown(path))]
    Io { path: PathBuf, doing: &'static str, source: io::Error },

    /// A directory, FIFO, socket or device where a file is needed.
    #[error("{}: is {found}, but a config must be a regular file", Shown(path))]
    NotRegular { path: PathBuf, found: &'static str },

    /// More than 1 MiB.
    #[error("{}: is larger than {} bytes, the limit for a config", Shown(path), yaml::MAX_BYTES)]
    TooLarge { path: PathBuf },

    /// A byte sequence that is not UTF-8.
    #[error("{}:{line}: is not UTF-8 text (at byte {offset})", Shown(path))]
    NotUtf8 { path: PathBuf, line: usize, offset: usize },

    /// Not YAML: the parser's own words.
    #[error("{}:{line}: not valid YAML: {message} (column {column})", Shown(path))]
    Syntax { path: PathBuf, line: usize, column: usize, message: String },

    /// YAML that is legal but larger, deeper or more self-referential than a config has reason to be.
    #[error("{}:{line}: {what} is more than a config may have (at most {limit})", Shown(path))]
    Budget { path: PathBuf, line: usize, what: &'static str, limit: usize },

    /// YAML that is legal but that no config uses (a foreign tag, a mapping as a key, an alias inside its own
    /// anchor).
    #[error("{}:{line}: {}{what}", Shown(path), Prefix(key))]
    Structure { path: PathBuf, line: usize, key: String, what: String },

    /// One key twice in the same mapping.
    #[error("{}:{line}: {key}: duplicate key (first given at line {first_line})", Shown(path))]
    DuplicateKey { path: PathBuf, line: usize, key: String, first_line: usize },

    /// A key that nothing reads.
    #[error(
        "{}:{line}: {key}: unknown key (expected {}){}",
        Shown(path), Keys(expected), KeyHint { nearest: *nearest, belongs: *belongs }
    )]
    UnknownKey {
        path: PathBuf,
        line: usize,
        key: String,
        expected: Vec<&'static str>,
        nearest: Option<&'static str>,
        /// Where the key would have a meaning, as `parameters`.
        belongs: Option<&'static str>,
    },

    /// A word outside a fixed list.
    #[error(
        "{}:{line}: {key}: unknown value {} (expected one of {}){}",
        Shown(path), Quoted(value), expected.join(", "), KeyHint { nearest: *nearest, belongs: None }
    )]
    UnknownValue {
        path: PathBuf,
        line: usize,
        key: String,
        value: String,
        expected: Vec<&'static str>,
        nearest: Option<&'static str>,
    },

    /// A scalar where a list belongs, text where a number belongs.
    #[error("{}:{line}: {key}: expected {expected}, got {found}", Shown(path))]
    WrongType { path: PathBuf, line: usize, key: String, found: String, expected: &'static str },

    /// A number outside its range, or not finite.
    #[error("{}:{line}: {key}: expected {expected}, got {}", Shown(path), Quoted(value))]
    OutOfRange { path: PathBuf, line: usize, key: String, value: String, expected: &'static str },

    /// A key that is needed here and absent.
    #[error("{}:{line}: {key}: is missing: {why}", Shown(path))]
    Missing { path: PathBuf, line: usize, key: String, why: String },

    /// A key that is known but has no meaning together with the rest of the config.
    #[error("{}:{line}: {key}: {why}", Shown(path))]
    NotAllowed { path: PathBuf, line: usize, key: String, why: String },
}

/// The known word that `word` was most likely meant to be; none if nothing is close.
pub(super) fn nearest<'w>(word: &str, known: &[&'w str]) -> Option<&'w str> {
    // A hostile megabyte of a word would make the quadratic distance expensive, and resembles nothing.
    if word.len() > 64 {
        return None;
    }
    let word = word.to_lowercase().replace('-', "_");
    let length = word.chars().count();
    known
        .iter()
        .filter_map(|&candidate| {
            let distance = strsim::damerau_levenshtein(&word, candidate);
            let similarity = strsim::jaro_winkler(&word, candidate);
            let allowed = (length.max(candidate.chars().count()) / 3).max(1);
            let close = !word.is_empty()
                && (similarity >= 0.8 || distance <= allowed || abbreviates(&word, candidate));
            close.then_some((candidate, distance, similarity))
        })
        .min_by(|a, b| a.1.cmp(&b.1).then(b.2.total_cmp(&a.2)))
        .map(|(candidate, _, _)| candidate)
}

/// Whether `word` is `full` with letters left out, as `bf16` of `bfloat16`.
fn abbreviates(word: &str, full: &str) -> bool {
    let mut letters = full.chars();
    word.len() >= 3
        && word.chars().next() == full.chars().next()
        && word.chars().all(|c| letters.any(|letter| letter == c))
}

/// `text` on one line and of bounded length: control characters escaped, the rest cut after 80 characters.
pub(super) fn one_line(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == SHOWN {
            out.push('…');
            break;
        }
        if c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

struct Shown<'p>(&'p Path);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string_lossy().chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

struct Quoted<'t>(&'t str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", one_line(self.0))
    }
}

struct Prefix<'t>(&'t str);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "{}: ", self.0) }
    }
}

/// The keys that may stand there.
struct Keys<'a>(&'a [&'static str]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("none here") } else { write!(f, "one of {}", self.0.join(", ")) }
    }
}

struct KeyHint {
    nearest: Option<&'static str>,
    belongs: Option<&'static str>,
}

impl fmt::Display for KeyHint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.belongs, self.nearest) {
            (Some(place), _) => write!(f, "; it belongs under `{place}`"),
            (None, Some(word)) => write!(f, "; did you mean `{word}`?"),
            (None, None) => Ok(()),
        }
    }
}
