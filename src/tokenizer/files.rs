//! The tokenizer files of the output: those of the source, with the tokens that were added.

use std::path::{Path, PathBuf};

use fields::Fields;
use serde_json::Value;

use super::vocabulary::{MAX_BYTES, read_json};
use super::{TokenizerError, Vocabulary};
use crate::read::{ReadError, read_small_file};

mod fields {
    //! A JSON object's members as they are written, so that what does not change is passed through byte for byte.

    use std::fmt;

    use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
    use serde_json::value::RawValue;

    /// In the file's order.
    pub struct Fields(pub Vec<(String, Box<RawValue>)>);

    impl<'de> Deserialize<'de> for Fields {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visit;
            impl<'de> Visitor<'de> for Visit {
                type Value = Fields;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                    let mut fields = Vec::new();
                    while let Some(field) = map.next_entry()? {
                        fields.push(field);
                    }
                    Ok(Fields(fields))
                }
            }
            deserializer.deserialize_map(Visit)
        }
    }
}

/// What the output's tokenizer consists of.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizerFiles {
    /// Whose tokenizer files are copied.
    pub directory: PathBuf,
    /// Files that replace the copied ones.
    pub changed: Vec<(String, Vec<u8>)>,
    /// Rows of the output's embeddings, padding included.
    pub rows: usize,
}

impl TokenizerFiles {
    pub(super) fn new(
        directory: PathBuf,
        output: &Vocabulary,
        grown: bool,
        multiple: Option<usize>,
    ) -> Result<Self, TokenizerError> {
        let rows = output.rows().next_multiple_of(multiple.unwrap_or(1));
        let mut changed = Vec::new();
        if grown {
            changed.push((
                "tokenizer.json".to_owned(),
                tokenizer_json(&directory.join("tokenizer.json"), output)?,
            ));
            changed.extend(tokenizer_config(&directory, output)?);
        }
        Ok(Self { directory, changed, rows })
    }
}

/// Files of a tokenizer beside a model's weights.
pub const TOKENIZER_FILES: [&str; 21] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "qwen.tiktoken",
    "bpe.codes",
    "normalizer.json",
];

/// Whether a file beside the weights belongs to the tokenizer.
pub fn is_tokenizer_file(name: &str) -> bool {
    TOKENIZER_FILES.contains(&name)
}

/// The files that carry a chat template, changed: `tokenizer_config.json` holds it, which every version of transformers
/// reads. `directory` is the tokenizer's, `changed` what has been changed already. False if there is no tokenizer whose
/// template it could be.
///
/// # Errors
/// A `tokenizer_config.json` that is no JSON object.
pub fn set_chat_template(
    directory: &Path,
    changed: &mut Vec<(String, Vec<u8>)>,
    template: &str,
) -> Result<bool, TokenizerError> {
    const NAME: &str = "tokenizer_config.json";
    let path = directory.join(NAME);
    let at = changed.iter().position(|(name, _)| name == NAME);
    let config: Option<Value> = match at {
        Some(at) => Some(
            serde_json::from_slice(&changed[at].1)
                .map_err(|source| ReadError::ModelConfig { path: path.clone(), source })?,
        ),
        None => read_json(&path)?,
    };
    let Some(mut config) = config else { return Ok(false) };
    let Some(object) = config.as_object_mut() else {
        return Err(TokenizerError::Malformed {
            path,
            detail: "got no JSON object, expected one".to_owned(),
        });
    };
    object.insert("chat_template".to_owned(), template.into());
    let bytes = format!("{config:#}\n").into_bytes();
    match at {
        Some(at) => changed[at].1 = bytes,
        None => changed.push((NAME.to_owned(), bytes)),
    }
    Ok(true)
}

/// The file with `added_tokens` replaced; the rest as it is.
fn tokenizer_json(path: &Path, output: &Vocabulary) -> Result<Vec<u8>, TokenizerError> {
    let malformed = |source| ReadError::ModelConfig { path: path.to_owned(), source };
    let bytes = read_small_file(path, MAX_BYTES)?.unwrap_or_default();
    let fields: Fields = serde_json::from_slice(&bytes).map_err(malformed)?;
    let mut added = output.added.clone();
    added.sort_by_key(|token| token.id);
    let added = serde_json::to_string(&added).map_err(malformed)?;
    let mut out = String::with_capacity(bytes.len() + added.len());
    out.push('{');
    let known = fields.0.iter().any(|(name, _)| name == "added_tokens");
    let fields = fields.0.iter().map(|(name, value)| {
        (name.as_str(), if name == "added_tokens" { added.as_str() } else { value.get() })
    });
    for (k, (name, value)) in fields.chain((!known).then_some(("added_tokens", added.as_str()))).enumerate() {
        if k > 0 {
            out.push(',');
        }
        out.push_str("\n  ");
        out.push_str(&Value::String(name.to_owned()).to_string());
        out.push_str(": ");
        out.push_str(value);
    }
    out.push_str("\n}\n");
    Ok(out.into_bytes())
}

/// `tokenizer_config.json` and `added_tokens.json`, where the source has them, with the tokens that were added.
fn tokenizer_config(directory: &Path, output: &Vocabulary) -> Result<Vec<(String, Vec<u8>)>, TokenizerError> {
    let mut changed = Vec::new();
    let mut push =
        |name: &str, value: &Value| changed.push((name.to_owned(), format!("{value:#}\n").into_bytes()));
    let config: Option<Value> = read_json(&directory.join("tokenizer_config.json"))?;
    if let Some(mut config) = config
        && let Some(decoder) = config.get_mut("added_tokens_decoder").and_then(Value::as_object_mut)
    {
        for token in &output.added {
            decoder.entry(token.id.to_string()).or_insert_with(|| token.decoder_entry());
        }
        push("tokenizer_config.json", &config);
    }
    let added: Option<Value> = read_json(&directory.join("added_tokens.json"))?;
    if let Some(Value::Object(mut added)) = added {
        for token in &output.added {
            added.entry(token.content.clone()).or_insert_with(|| token.id.into());
        }
        push("added_tokens.json", &Value::Object(added));
    }
    Ok(changed)
}
