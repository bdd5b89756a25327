//! Owns `tokenizer_source`, `tokenizer` and `chat_template`: which vocabulary the output has and where rows of new
//! tokens come from. Filled by `parse`; reads no tokenizer.

use super::error::ConfigError;
use super::fields::{Field, Scope};
use super::parse::{Models, model_path};
use super::schema::ModelPath;

/// Largest `pad_to_multiple_of`, a million rows.
const MAX_PADDING: usize = 1 << 20;
/// Largest id of a token: what 32 bits hold with room for codes.
const MAX_TOKEN_ID: usize = 1 << 30;

/// `tokenizer`, or `tokenizer_source` as its short form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerConfig {
    pub source: TokenizerSource,
    /// Tokens with a rule of their own, in the order given; those that the vocabulary lacks are added to it.
    pub tokens: Vec<(String, TokenEmbedding)>,
    /// Rows of the embeddings are filled up to a multiple of this.
    pub pad_to_multiple_of: Option<usize>,
    pub line: usize,
}

/// Whose vocabulary the output has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// The base's (else the first model's) and what the others have beyond it.
    Union,
    /// The base's, else the first model's.
    Base,
    Model(ModelPath),
}

/// Where the row of one token comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenEmbedding {
    /// `None`: as of any other token.
    pub source: Option<EmbeddingSource>,
    /// For the models that have a row of their own, too.
    pub force: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmbeddingSource {
    Zero,
    /// The model's row of the same token.
    Model(ModelPath),
    /// The model's row of another token.
    Token {
        model: ModelPath,
        token: String,
    },
    /// The model's row of this number.
    TokenId {
        model: ModelPath,
        id: usize,
    },
}

/// `chat_template` as written: `auto`, a name, or the template itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    pub written: String,
    pub line: usize,
}

pub(super) fn tokenizer(
    top: &Scope<'_>,
    context: &Models<'_>,
) -> Result<Option<TokenizerConfig>, ConfigError> {
    let short = top.field("tokenizer_source");
    let Some(field) = top.field("tokenizer") else {
        return short
            .map(|field| {
                let (source, line) = (source(&field, context)?, field.line);
                Ok(TokenizerConfig { source, tokens: Vec::new(), pad_to_multiple_of: None, line })
            })
            .transpose();
    };
    if let Some(short) = short {
        return Err(short.not_allowed("give `tokenizer_source` or `tokenizer`, not both"));
    }
    let scope = field.scope("a mapping, as `{ source: union }`")?;
    scope.check_keys(&["source", "tokens", "pad_to_multiple_of"], |_| None)?;
    let source = match scope.field("source") {
        Some(field) => source(&field, context)?,
        None => TokenizerSource::Union,
    };
    let tokens = match scope.field("tokens") {
        Some(field) => tokens(&field, context)?,
        None => Vec::new(),
    };
    let pad_to_multiple_of = scope
        .field("pad_to_multiple_of")
        .map(|field| {
            const EXPECTED: &str = "an integer from 1 to 1048576";
            match field.integer(MAX_PADDING, EXPECTED)? {
                0 => Err(field.out_of_range("0", EXPECTED)),
                multiple => Ok(multiple),
            }
        })
        .transpose()?;
    Ok(Some(TokenizerConfig { source, tokens, pad_to_multiple_of, line: field.line }))
}

fn source(field: &Field<'_>, context: &Models<'_>) -> Result<TokenizerSource, ConfigError> {
    if !field.is_mapping() {
        match field.text("`union`, `base` or the path of a model")? {
            "union" => return Ok(TokenizerSource::Union),
            "base" => return Ok(TokenizerSource::Base),
            _ => {}
        }
    }
    Ok(TokenizerSource::Model(model_path(field, context)?))
}

fn tokens(field: &Field<'_>, context: &Models<'_>) -> Result<Vec<(String, TokenEmbedding)>, ConfigError> {
    let scope = field.scope("a mapping from a token to its `{source, force}`")?;
    let mut tokens = Vec::with_capacity(scope.entries.len());
    for entry in scope.entries {
        if entry.key.is_empty() {
            return Err(field.wrong_type("tokens that are not empty"));
        }
        // A token with nothing after it is added, by the rule for tokens that no model has.
        let Some(field) = scope.field(&entry.key) else {
            tokens.push((entry.key.clone(), TokenEmbedding { source: None, force: false }));
            continue;
        };
        let token = field.scope("a mapping with `source` or `force`")?;
        token.check_keys(&["source", "force"], |key| match key {
            "kind" | "model" | "token" | "token_id" => Some("source"),
            _ => None,
        })?;
        let force = token.field("force").map(|field| field.boolean()).transpose()?.unwrap_or(false);
        let source = token.field("source").map(|field| embedding_source(&field, context)).transpose()?;
        if force && source.is_none() {
            return Err(token.missing("source", "`force` puts the source's row in place of the models' own"));
        }
        tokens.push((entry.key.clone(), TokenEmbedding { source, force }));
    }
    Ok(tokens)
}

fn embedding_source(field: &Field<'_>, context: &Models<'_>) -> Result<EmbeddingSource, ConfigError> {
    if !field.is_mapping() {
        return Ok(EmbeddingSource::Model(model_path(field, context)?));
    }
    let scope = field.scope("a mapping with `kind`")?;
    let Some(kind) = scope.field("kind") else {
        // A model in its long form.
        return Ok(EmbeddingSource::Model(model_path(field, context)?));
    };
    match kind.text("`zero` or `model_token`")? {
        "zero" => {
            scope.check_keys(&["kind"], |_| None)?;
            Ok(EmbeddingSource::Zero)
        }
        "model_token" => {
            scope.check_keys(&["kind", "model", "token", "token_id"], |_| None)?;
            let Some(model) = scope.field("model") else {
                return Err(scope.missing("model", "it has the row that is taken"));
            };
            let model = model_path(&model, context)?;
            match (scope.field("token"), scope.field("token_id")) {
                (Some(_), Some(id)) => Err(id.not_allowed("give `token` or `token_id`, not both")),
                (None, None) => Err(scope.missing("token", "it says which row, or `token_id` does")),
                (Some(token), None) => {
                    Ok(EmbeddingSource::Token { model, token: token.text("a token")?.to_owned() })
                }
                (None, Some(id)) => {
                    Ok(EmbeddingSource::TokenId { model, id: id.integer(MAX_TOKEN_ID, "a row's number")? })
                }
            }
        }
        word => Err(kind.unknown_word(word, &["zero", "model_token"])),
    }
}

pub(super) fn chat_template(top: &Scope<'_>) -> Result<Option<ChatTemplate>, ConfigError> {
    let Some(field) = top.field("chat_template") else { return Ok(None) };
    let written = field.text("`auto`, a template's name or a Jinja template")?;
    // A template has braces; a name that is none of ours is a mistake, not a template.
    if !written.contains('{') && written != "auto" && crate::tokenizer::named_template(written).is_none() {
        let known: Vec<&'static str> =
            std::iter::once("auto").chain(crate::tokenizer::template_names()).collect();
        return Err(field.unknown_word(written, &known));
    }
    Ok(Some(ChatTemplate { written: written.to_owned(), line: field.value_line() }))
}
