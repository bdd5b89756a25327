//! Chat templates by name, in our own words: the formats are those that the models named after them were trained on.

use std::path::Path;

use serde_json::Value;

use super::TokenizerError;
use super::vocabulary::read_json;
use crate::read::read_small_file;

/// Longest template that is read.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

const TEMPLATES: [(&str, &str); 5] = [
    (
        "alpaca",
        "{% for message in messages %}\
         {% if message.role == 'system' %}{{ message.content | trim ~ '\\n\\n' }}\
         {% elif message.role == 'user' %}{{ '### Instruction:\\n' ~ message.content | trim ~ '\\n\\n' }}\
         {% elif message.role == 'user_context' %}{{ '### Input:\\n' ~ message.content | trim ~ '\\n\\n' }}\
         {% else %}{{ '### Response:\\n' ~ message.content | trim ~ '\\n\\n' }}{% endif %}\
         {% endfor %}\
         {% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
    (
        "chatml",
        "{% for message in messages %}\
         {{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}\
         {% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    (
        "llama3",
        "{{ bos_token }}{% for message in messages %}\
         {{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}\
         {% endfor %}\
         {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    (
        "mistral",
        "{{ bos_token }}{% set before = namespace(text='') %}{% for message in messages %}\
         {% if message.role == 'system' %}{% set before.text = message.content ~ '\\n\\n' %}\
         {% elif message.role == 'user' %}\
         {{ ' [INST] ' ~ before.text ~ message.content ~ ' [/INST]' }}{% set before.text = '' %}\
         {% else %}{{ ' ' ~ message.content ~ eos_token }}{% endif %}{% endfor %}",
    ),
    (
        "exaone",
        "{% for message in messages %}\
         {% if loop.first and message.role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}\
         {{ '[|' ~ message.role ~ '|]' ~ message.content ~ ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}\
         {% endfor %}\
         {% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
    ),
];

/// The template of this name.
pub fn named_template(name: &str) -> Option<&'static str> {
    TEMPLATES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// The names there are.
pub fn template_names() -> impl Iterator<Item = &'static str> {
    TEMPLATES.iter().map(|(name, _)| *name)
}

/// The template that most of the models in `directories` have; the first of them where several are as frequent, `None`
/// where none has one.
pub(super) fn most_frequent<'d>(
    directories: impl Iterator<Item = &'d Path>,
) -> Result<Option<String>, TokenizerError> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for directory in directories {
        let Some(template) = template_of(directory)? else { continue };
        match counts.iter_mut().find(|(known, _)| *known == template) {
            Some((_, count)) => *count += 1,
            None => counts.push((template, 1)),
        }
    }
    let most = counts.iter().map(|(_, count)| *count).max();
    Ok(counts.into_iter().find(|(_, count)| Some(*count) == most).map(|(template, _)| template))
}

fn template_of(directory: &Path) -> Result<Option<String>, TokenizerError> {
    let file = directory.join("chat_template.jinja");
    let text = match read_small_file(&file, MAX_TEMPLATE_BYTES)? {
        Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| TokenizerError::Malformed {
            path: file,
            detail: "got bytes that are no UTF-8, expected a Jinja template".to_owned(),
        })?),
        None => {
            let config: Option<Value> = read_json(&directory.join("tokenizer_config.json"))?;
            match config.as_ref().and_then(|config| config.get("chat_template")) {
                Some(Value::String(text)) => Some(text.clone()),
                Some(Value::Array(named)) => named
                    .iter()
                    .find(|item| item.get("name").and_then(Value::as_str) == Some("default"))
                    .and_then(|item| item.get("template")?.as_str())
                    .map(str::to_owned),
                Some(Value::Object(named)) => named.get("default").and_then(Value::as_str).map(str::to_owned),
                _ => None,
            }
        }
    };
    Ok(text.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()))
}
