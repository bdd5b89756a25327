//! The model card: `README.md` of the output directory, in the form that the Hugging Face hub reads.

use std::fmt::Write as _;

/// One merged model, as a row of the card's table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CardModel {
    /// The model as the config names it.
    pub name: String,
    /// Its weight, where the method has one.
    pub weight: Option<String>,
    /// Its statistics files as the config names them.
    pub statistics: Vec<String>,
}

/// What the card says. `render` never fails and never reads anything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCard {
    /// The output directory's name, for the title.
    pub title: String,
    /// The base model as the config names it.
    pub base_model: Option<String>,
    /// The models merged, in the config's order.
    pub models: Vec<CardModel>,
    /// The merge method as the config names it.
    pub method: String,
    /// One sentence on the method and its solver; may be empty.
    pub summary: String,
    /// The config, byte for byte.
    pub config: String,
    /// The tool's version.
    pub version: String,
}

impl ModelCard {
    /// The card as Markdown with YAML front matter.
    pub fn render(&self) -> String {
        let mut card = String::from("---\n");
        self.front_matter(&mut card);
        card.push_str("---\n");
        // Writing to a String cannot fail, so the results are dropped.
        let _ = writeln!(card, "# {}\n", markdown(&self.title));
        let _ = writeln!(
            card,
            "A merge of fine-tuned models, made with mats-stream {} by the method {}.",
            markdown(&self.version),
            code_span(&self.method)
        );
        if !self.summary.is_empty() {
            let _ = writeln!(card, "{}", markdown(&self.summary));
        }
        if let Some(base) = &self.base_model {
            let _ = writeln!(card, "\nBase model: {}", markdown(base));
        }
        if !self.models.is_empty() {
            card.push_str("\n## Models\n\n");
            self.table(&mut card);
        }
        let fence = "`".repeat(longest_backtick_run(&self.config).max(2) + 1);
        let newline = if self.config.is_empty() || self.config.ends_with('\n') { "" } else { "\n" };
        let _ = write!(card, "\n## Configuration\n\n{fence}yaml\n{}{newline}{fence}\n", self.config);
        card
    }

    fn front_matter(&self, card: &mut String) {
        let named = self.base_model.iter().chain(self.models.iter().map(|model| &model.name));
        let mut names: Vec<&String> = Vec::new();
        for name in named {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        if !names.is_empty() {
            card.push_str("base_model:\n");
            for name in names {
                let _ = writeln!(card, "- {}", yaml_string(name));
            }
        }
        card.push_str("library_name: transformers\ntags:\n- mats-stream\n- merge\n");
    }

    fn table(&self, card: &mut String) {
        let weights = self.models.iter().any(|model| model.weight.is_some());
        let statistics = self.models.iter().any(|model| !model.statistics.is_empty());
        let row = |card: &mut String, model: &str, weight: &str, files: &str| {
            let _ = write!(card, "| {model} |");
            if weights {
                let _ = write!(card, " {weight} |");
            }
            if statistics {
                let _ = write!(card, " {files} |");
            }
            card.push('\n');
        };
        row(card, "model", "weight", "statistics");
        row(card, "---", "---", "---");
        for model in &self.models {
            let files: Vec<String> = model.statistics.iter().map(|file| markdown(file)).collect();
            let weight = model.weight.as_deref().map(markdown).unwrap_or_default();
            row(card, &markdown(&model.name), &weight, &files.join(", "));
        }
    }
}

/// A double-quoted YAML scalar. JSON's strings are YAML's, but for the line separators that YAML would
/// fold.
fn yaml_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Text that means itself in a paragraph, a heading or a table cell, on one line.
fn markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '~' | '&' | '#' | '!' | '$' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// `text` as inline code, with a fence that its own backticks cannot close.
fn code_span(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let fence = "`".repeat(longest_backtick_run(&text) + 1);
    let pad = if text.starts_with('`') || text.ends_with('`') { " " } else { "" };
    format!("{fence}{pad}{text}{pad}{fence}")
}

fn longest_backtick_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_in_full() {
        let card = ModelCard {
            title: "out_1".into(),
            base_model: Some("models/base".into()),
            models: vec![
                CardModel {
                    name: "models/paws".into(),
                    weight: Some("1.0".into()),
                    statistics: vec!["stats/p".into()],
                },
                CardModel { name: "models/qasc".into(), weight: None, statistics: Vec::new() },
            ],
            method: "mats".into(),
            summary: "Solved by cg.".into(),
            config: "merge_method: mats\n".into(),
            version: "0.1.0".into(),
        };
        assert_eq!(
            card.render(),
            "---\nbase_model:\n- \"models/base\"\n- \"models/paws\"\n- \"models/qasc\"\nlibrary_name: transformers\n\
             tags:\n- mats-stream\n- merge\n---\n# out\\_1\n\n\
             A merge of fine-tuned models, made with mats-stream 0.1.0 by the method `mats`.\nSolved by cg.\n\n\
             Base model: models/base\n\n## Models\n\n| model | weight | statistics |\n| --- | --- | --- |\n\
             | models/paws | 1.0 | stats/p |\n| models/qasc |  |  |\n\n\
             ## Configuration\n\n```yaml\nmerge_method: mats\n```\n"
        );
    }

    #[test]
    fn a_config_cannot_close_its_own_fence() {
        let card = ModelCard { config: "a: ````\n# ```".into(), ..Default::default() };
        let text = card.render();
        assert!(text.ends_with("`````yaml\na: ````\n# ```\n`````\n"), "{text}");
    }

    #[test]
    fn names_cannot_break_out_of_table_or_front_matter() {
        let name = "a|b\n---\n\"x\\<script>";
        let card = ModelCard {
            models: vec![CardModel { name: name.into(), ..Default::default() }],
            method: "`x`\n".into(),
            ..Default::default()
        };
        let text = card.render();
        assert!(text.contains("- \"a|b\\u000a---\\u000a\\\"x\\\\<script>\"\n"), "{text}");
        assert!(text.contains("| a\\|b --- \"x\\\\\\<script\\> |\n"), "{text}");
        assert_eq!(text.lines().filter(|line| *line == "---").count(), 2);
        assert!(text.contains("`` `x`  ``."), "{text}");
    }
}
