//! The tokens of one model: `tokenizer.json`, else `vocab.json` or `vocab.txt` with `added_tokens.json`.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::TokenizerError;
use crate::read::{ReadError, read_small_file};

/// Longest tokenizer file that is read.
pub(super) const MAX_BYTES: u64 = 256 << 20;
/// Most tokens, and one more than the highest id.
const MAX_TOKENS: usize = 1 << 24;

/// Files of a SentencePiece model, which alone say nothing that can be read here.
const SENTENCEPIECE: [&str; 5] =
    ["tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model"];

/// A token that the tokenizer's model does not make, as `tokenizer.json` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedToken {
    /// Its row.
    pub id: u32,
    /// Its text.
    pub content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default = "yes")]
    normalized: bool,
    /// Whether decoding may leave it out.
    #[serde(default)]
    pub special: bool,
}

fn yes() -> bool {
    true
}

impl AddedToken {
    /// As `add_tokens` makes it of a string.
    pub fn plain(id: u32, content: String) -> Self {
        Self {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: true,
            special: false,
        }
    }

    /// The form of `added_tokens_decoder`, where the id is the key.
    pub(super) fn decoder_entry(&self) -> Value {
        serde_json::json!({
            "content": self.content,
            "lstrip": self.lstrip,
            "normalized": self.normalized,
            "rstrip": self.rstrip,
            "single_word": self.single_word,
            "special": self.special,
        })
    }
}

/// All tokens of one model and their ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    ids: HashMap<String, u32>,
    /// In the order of the file.
    pub added: Vec<AddedToken>,
    added_names: HashSet<String>,
    /// Tokens that the tokenizer's model makes.
    model_tokens: usize,
    /// One more than the highest id.
    rows: usize,
    /// One more than the highest id of the added tokens.
    behind_added: usize,
    /// Whether there is a `tokenizer.json`, to which tokens can be added.
    pub fast: bool,
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: ModelPart,
}

#[derive(Deserialize)]
struct ModelPart {
    vocab: Tokens,
}

/// `{token: id}`, or Unigram's `[[token, score], …]`.
struct Tokens(HashMap<String, u32>);

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Tokens;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary: a mapping from tokens to ids, or a list of tokens with scores")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
                let mut tokens = HashMap::new();
                while let Some((token, id)) = map.next_entry::<String, u32>()? {
                    tokens.insert(token, id);
                }
                Ok(Tokens(tokens))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Tokens, A::Error> {
                let mut tokens = HashMap::new();
                let mut id = 0;
                while let Some((token, _score)) = list.next_element::<(String, f64)>()? {
                    tokens.entry(token).or_insert(id);
                    id += 1;
                }
                Ok(Tokens(tokens))
            }
        }
        deserializer.deserialize_any(Visit)
    }
}

/// A JSON file; `None` if there is none.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TokenizerError> {
    let Some(bytes) = read_small_file(path, MAX_BYTES)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| ReadError::ModelConfig { path: path.to_owned(), source }.into())
}

impl Vocabulary {
    /// The vocabulary in a model's directory; `None` if it has no tokenizer.
    ///
    /// # Errors
    /// [`TokenizerError`] for files that are malformed, and for a SentencePiece model without a `tokenizer.json`.
    pub fn read(directory: &Path) -> Result<Option<Self>, TokenizerError> {
        let file = directory.join("tokenizer.json");
        if let Some(TokenizerFile { added_tokens, model }) = read_json(&file)? {
            return Self::new(model.vocab.0, added_tokens, true).checked(&file).map(Some);
        }
        let file = directory.join("vocab.json");
        let ids: Option<HashMap<String, u32>> = read_json(&file)?;
        let (file, ids) = match ids {
            Some(ids) => (file, ids),
            None => {
                let file = directory.join("vocab.txt");
                match read_small_file(&file, MAX_BYTES)? {
                    Some(bytes) => {
                        let text = String::from_utf8_lossy(&bytes);
                        let ids = text.lines().zip(0..).map(|(token, id)| (token.to_owned(), id)).collect();
                        (file, ids)
                    }
                    None => {
                        return match SENTENCEPIECE.iter().find(|name| directory.join(name).exists()) {
                            Some(name) => {
                                Err(TokenizerError::SentencePieceOnly { path: directory.join(name) })
                            }
                            None => Ok(None),
                        };
                    }
                }
            }
        };
        let added: Option<HashMap<String, u32>> = read_json(&directory.join("added_tokens.json"))?;
        let mut added: Vec<AddedToken> =
            added.into_iter().flatten().map(|(content, id)| AddedToken::plain(id, content)).collect();
        added.sort_unstable_by(|a, b| (a.id, &a.content).cmp(&(b.id, &b.content)));
        Self::new(ids, added, false).checked(&file).map(Some)
    }

    fn new(mut ids: HashMap<String, u32>, added: Vec<AddedToken>, fast: bool) -> Self {
        let model_tokens = ids.len();
        ids.extend(added.iter().map(|token| (token.content.clone(), token.id)));
        let after = |ids: &mut dyn Iterator<Item = u32>| ids.map(|id| id as usize + 1).max().unwrap_or(0);
        Self {
            model_tokens,
            rows: after(&mut ids.values().copied()),
            behind_added: after(&mut added.iter().map(|token| token.id)),
            added_names: added.iter().map(|token| token.content.clone()).collect(),
            ids,
            added,
            fast,
        }
    }

    fn checked(self, path: &Path) -> Result<Self, TokenizerError> {
        let highest = self.rows.saturating_sub(1);
        let detail = if self.ids.is_empty() {
            "got no tokens, expected at least one".to_owned()
        } else if highest >= MAX_TOKENS || self.ids.len() > MAX_TOKENS {
            format!("got a token with id {highest}, expected ids below {MAX_TOKENS}")
        } else {
            return Ok(self);
        };
        Err(TokenizerError::Malformed { path: PathBuf::from(path), detail })
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Rows that an embedding needs: the highest id and one.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Every token by its id.
    pub fn by_id(&self) -> Vec<(u32, &str)> {
        let mut tokens: Vec<_> = self.ids.iter().map(|(token, id)| (*id, token.as_str())).collect();
        tokens.sort_unstable();
        tokens
    }

    /// Adds a token at the end; `entry` says how it is matched. A token that is known keeps its id. False if the id
    /// that the token would get is another's: the ids have gaps.
    ///
    /// Ids go on as the `tokenizers` library counts them when it reads the file: behind the model's tokens and behind
    /// every token added so far.
    pub(super) fn add(&mut self, mut entry: AddedToken) -> bool {
        if self.added_names.contains(&entry.content) {
            return true;
        }
        entry.id = match self.id(&entry.content) {
            Some(id) => id,
            None => {
                let id = self.behind_added.max(self.model_tokens);
                if id < self.rows {
                    return false;
                }
                self.rows = id + 1;
                id as u32
            }
        };
        self.behind_added = self.behind_added.max(entry.id as usize + 1);
        self.ids.insert(entry.content.clone(), entry.id);
        self.added_names.insert(entry.content.clone());
        self.added.push(entry);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<Option<Vocabulary>, TokenizerError> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).expect("write");
        }
        Vocabulary::read(directory.path())
    }

    #[test]
    fn every_kind_of_vocabulary_is_read() {
        let bpe = r#"{"added_tokens": [{"id": 2, "content": "<s>", "special": true}],
                      "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}"#;
        let unigram = r#"{"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5]]}}"#;
        for (files, fast, rows) in [
            (&[("tokenizer.json", bpe)][..], true, 3),
            (&[("tokenizer.json", unigram)], true, 2),
            (&[("vocab.json", r#"{"a": 0, "b": 1}"#), ("added_tokens.json", r#"{"<s>": 2}"#)], false, 3),
            (&[("vocab.txt", "a\nb\n")], false, 2),
        ] {
            let vocabulary = read(files).expect("valid").expect("there");
            assert_eq!((vocabulary.fast, vocabulary.rows()), (fast, rows), "{files:?}");
            assert_eq!(
                (vocabulary.id("a"), vocabulary.id("b"), vocabulary.id("c")),
                (Some(0), Some(1), None)
            );
        }
        assert_eq!(read(&[]).expect("no error"), None);
        let lone = read(&[("tokenizer.model", "")]).expect_err("not readable");
        assert!(matches!(lone, TokenizerError::SentencePieceOnly { .. }), "{lone}");
        for bad in [
            "[]",
            "{}",
            r#"{"model": {"vocab": 3}}"#,
            r#"{"model": {"vocab": {}}}"#,
            "{\"model\": {\"vocab\": {\"a\": -1}}}",
        ] {
            read(&[("tokenizer.json", bad)]).expect_err(bad);
        }
        read(&[("tokenizer.json", r#"{"model": {"vocab": {"a": 4000000000}}}"#)]).expect_err("a huge id");
    }

    #[test]
    fn ids_of_new_tokens_go_on() {
        let mut vocabulary = read(&[("vocab.txt", "a\nb\n")]).expect("valid").expect("there");
        assert!(vocabulary.add(AddedToken::plain(0, "b".to_owned())), "known: keeps its id");
        assert!(vocabulary.add(AddedToken::plain(0, "c".to_owned())));
        assert!(vocabulary.add(AddedToken::plain(0, "d".to_owned())));
        assert_eq!((vocabulary.id("b"), vocabulary.id("c"), vocabulary.id("d")), (Some(1), Some(2), Some(3)));
        let mut gaps = read(&[("vocab.json", r#"{"a": 0, "b": 5}"#)]).expect("valid").expect("there");
        assert!(!gaps.add(AddedToken::plain(0, "c".to_owned())), "id 2 would stand below 5");
    }
}
