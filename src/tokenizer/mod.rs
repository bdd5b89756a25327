//! Bringing the vocabularies of several models together: the output's tokenizer, and for every embedding and head where
//! each of its rows comes from.
//!
//! Follows mergekit's `tokenizer`: the output has the base's vocabulary, another model's, or the union; every model's
//! rows are put in that order; a token that a model lacks takes the base's row, else the mean of those that have it.
//! Called by `run` once the headers are open. Reads tokenizer files, never a tensor.

mod files;
mod rows;
mod templates;
mod vocabulary;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub use files::{TOKENIZER_FILES, TokenizerFiles, is_tokenizer_file, set_chat_template};
pub use rows::permute;
pub use templates::{named_template, template_names};
pub use vocabulary::{AddedToken, Vocabulary};

use crate::config::{MergeConfig, ModelPath, TokenizerSource};
use crate::read::{ReadError, escaped};

/// Why vocabularies cannot be brought together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file is not what it should be.
    #[error("{}: malformed tokenizer: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was found and expected.
        detail: String,
    },
    /// A SentencePiece model and nothing else.
    #[error(
        "{}: a SentencePiece model alone cannot be matched with other vocabularies (got no tokenizer.json, expected \
         one); make one with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        path.display()
    )]
    SentencePieceOnly {
        /// The file.
        path: PathBuf,
    },
    /// No tokenizer where one is needed.
    #[error(
        "{model}: has no tokenizer (got none of tokenizer.json, vocab.json, vocab.txt, expected one as `{key}` names it)"
    )]
    Missing {
        /// The model as written.
        model: String,
        /// The key of the config.
        key: &'static str,
    },
    /// Tokens are to be added to a tokenizer that has no `tokenizer.json`.
    #[error(
        "{}: {count} tokens would have to be added, which needs a tokenizer.json (got none); make one with \
         transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        path.display()
    )]
    NotFast {
        /// The directory.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// New tokens would get ids that are taken.
    #[error(
        "{}: token `{}` cannot be added: the vocabulary's ids have gaps (expected ids from 0 without any)",
        path.display(),
        escaped(token)
    )]
    Gaps {
        /// The directory.
        path: PathBuf,
        /// The token.
        token: String,
    },
    /// A rule of `tokenizer.tokens` that cannot be carried out.
    #[error("{path}:{line}: tokenizer.tokens: token `{}`: {why}", escaped(token))]
    Token {
        /// The config.
        path: String,
        /// Its line of `tokenizer`.
        line: usize,
        /// The token.
        token: String,
        /// What is wrong.
        why: String,
    },
    /// Embeddings that cannot lend each other rows.
    #[error(
        "{model}: tensor `{}` has rows of {got} values (expected {expected} as in {other}), so their vocabularies \
         cannot be brought together",
        escaped(tensor)
    )]
    Width {
        /// The model as written.
        model: String,
        /// The model it is compared with.
        other: String,
        /// The tensor.
        tensor: String,
        /// Values in a row.
        got: usize,
        /// Values in the other's rows.
        expected: usize,
    },
    /// Nothing to rearrange.
    #[error(
        "no model has an embedding that is known by its name (expected one that ends with `embed_tokens.weight`, \
         `wte.weight`, `word_embeddings.weight` or the like); leave `tokenizer` out"
    )]
    NoEmbedding,
}

/// The output's vocabulary and those that it is made of.
#[derive(Debug)]
pub struct Vocabularies {
    /// The output's.
    pub output: Vocabulary,
    /// By the checkpoint's path as resolved; models without a tokenizer of their own have the base's.
    pub models: HashMap<PathBuf, Vocabulary>,
    /// What is written.
    pub files: TokenizerFiles,
    /// What was accepted but should be known.
    pub warnings: Vec<String>,
}

/// Reads the tokenizers that the config's `tokenizer` needs and makes the output's; `None` if the config has no such key,
/// or if no model has a tokenizer.
///
/// `directories` has every model's directory by its path, the base (else the first model) first, with its rows.
///
/// # Errors
/// [`TokenizerError`].
pub fn vocabularies(
    config: &MergeConfig,
    directories: &[Donor<'_>],
) -> Result<Option<Vocabularies>, TokenizerError> {
    let Some(wanted) = &config.tokenizer else { return Ok(None) };
    let Some((base, others)) = directories.split_first() else { return Ok(None) };
    let mut warnings = Vec::new();
    let base_vocabulary = match base.directory.map(Vocabulary::read).transpose()?.flatten() {
        Some(vocabulary) => vocabulary,
        // Nothing is to be brought in order then.
        None if wanted.source == TokenizerSource::Base && wanted.tokens.is_empty() => return Ok(None),
        None => return Err(TokenizerError::Missing { model: base.written.to_owned(), key: "tokenizer" }),
    };
    let mut models = HashMap::new();
    for other in others {
        let vocabulary = match other.directory.map(Vocabulary::read).transpose()?.flatten() {
            Some(vocabulary) => vocabulary,
            None => {
                warnings.push(format!(
                    "{}: has no tokenizer; taken to have that of {}",
                    other.written, base.written
                ));
                base_vocabulary.clone()
            }
        };
        models.insert(other.path.to_owned(), vocabulary);
    }
    let (directory, mut output) = match &wanted.source {
        TokenizerSource::Union | TokenizerSource::Base => {
            (base.directory.map(Path::to_owned).unwrap_or_default(), base_vocabulary.clone())
        }
        TokenizerSource::Model(model) => {
            let vocabulary = Vocabulary::read(&model.path)?.ok_or_else(|| TokenizerError::Missing {
                model: model.written.clone(),
                key: "tokenizer.source",
            })?;
            (model.path.clone(), vocabulary)
        }
    };
    models.insert(base.path.to_owned(), base_vocabulary);
    let before = output.added.len();
    let add = |output: &mut Vocabulary, entry: AddedToken| {
        let token = entry.content.clone();
        if output.add(entry) { Ok(()) } else { Err(TokenizerError::Gaps { path: directory.clone(), token }) }
    };
    if wanted.source == TokenizerSource::Union {
        // Tokens of the models' own first, then those that were added to them, each in the order of the models.
        for donor in directories {
            let vocabulary = &models[donor.path];
            let added: std::collections::HashSet<&str> =
                vocabulary.added.iter().map(|token| token.content.as_str()).collect();
            for (id, token) in vocabulary.by_id() {
                let seen = models[base.path].id(token).is_some();
                if !seen && !added.contains(token) && (id as usize) < donor.rows {
                    add(&mut output, AddedToken::plain(0, token.to_owned()))?;
                }
            }
        }
        for donor in directories {
            for token in &models[donor.path].added {
                if (token.id as usize) < donor.rows {
                    add(&mut output, token.clone())?;
                }
            }
        }
    }
    for (token, _) in &wanted.tokens {
        // A token that is there stays what it is: as an added one, texts would be cut at it first.
        if output.id(token).is_none() {
            add(&mut output, AddedToken::plain(0, token.clone()))?;
        }
    }
    let count = output.added.len() - before;
    if count > 0 && !output.fast {
        return Err(TokenizerError::NotFast { path: directory, count });
    }
    let files = TokenizerFiles::new(directory, &output, count > 0, wanted.pad_to_multiple_of)?;
    Ok(Some(Vocabularies { output, models, files, warnings }))
}

/// A model whose tokens count.
#[derive(Debug, Clone, Copy)]
pub struct Donor<'d> {
    /// As written in the config.
    pub written: &'d str,
    /// The checkpoint's path as resolved.
    pub path: &'d Path,
    /// Where its tokenizer may be.
    pub directory: Option<&'d Path>,
    /// Rows of its embedding: tokens behind them have none.
    pub rows: usize,
}

/// The chat template that the config asks for; `None` if it asks for none, or for the most frequent of none.
///
/// # Errors
/// Those of the models' files.
pub fn chat_template<'d>(
    config: &MergeConfig,
    directories: impl Iterator<Item = &'d Path>,
) -> Result<Option<String>, TokenizerError> {
    let Some(template) = &config.chat_template else { return Ok(None) };
    if template.written == "auto" {
        return templates::most_frequent(directories);
    }
    Ok(Some(named_template(&template.written).unwrap_or(&template.written).to_owned()))
}

/// Identifies a model among [`Vocabularies::models`].
pub(crate) fn key(model: &ModelPath) -> &Path {
    &model.path
}
