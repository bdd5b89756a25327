//! Owns the canonical text of a configuration, of which the config hash is taken: two files that mean the
//! same (other order, comments, anchors, number spellings) have the same text. Read by the engine; never
//! parsed back.

use std::fmt::Write as _;

use super::schema::{Initial, MergeConfig, Round, Subspace};
use super::tokenizer::{EmbeddingSource, TokenizerConfig, TokenizerSource};

impl MergeConfig {
    /// A canonical text of everything that may change the result, one `key = value` per line. Paths are as
    /// written, so that a directory of config and models can move; line numbers, `name` and the text itself
    /// do not enter.
    pub fn canonical_hash_input(&self) -> String {
        let mut out = String::from("mats-stream-config/1\n");
        let dtype = self.output_dtype().map_or("-", |dtype| dtype.name());
        let _ = writeln!(out, "output_dtype = {dtype}");
        if let Some(tokenizer) = &self.tokenizer {
            write_tokenizer(tokenizer, &mut out);
        }
        if let Some(template) = &self.chat_template {
            let _ = writeln!(out, "chat_template = {:?}", template.written);
        }
        if self.sections.is_empty() {
            self.write_models(&mut out, "");
        }
        for (i, section) in self.sections.iter().enumerate() {
            let prefix = format!("sections[{i}].");
            if let Some(module) = &section.module {
                let _ = writeln!(out, "{prefix}module = {module:?}");
            }
            if let Some(layers) = &section.layers {
                let _ = writeln!(out, "{prefix}layers = {:?} {:?}", layers.ranges, layers.base);
            }
            section.config.write_models(&mut out, &prefix);
        }
        for axis in self.sweep.iter().flat_map(|sweep| &sweep.axes) {
            let _ = writeln!(out, "sweep.{} = {:?}", axis.key.dotted(), axis.values);
        }
        out
    }

    fn write_models(&self, out: &mut String, prefix: &str) {
        if let Some(base) = &self.base_model {
            let _ = writeln!(out, "{prefix}base_model = {:?}", base.written);
        }
        for (i, model) in self.models.iter().enumerate() {
            let _ = writeln!(out, "{prefix}models[{i}].model = {:?}", model.model.written);
            for file in &model.statistics {
                let written = file.strip_prefix(&self.directory).unwrap_or(file);
                let _ = writeln!(out, "{prefix}models[{i}].statistics = {written:?}");
            }
        }
        write_round(&self.round, out, prefix);
    }
}

fn write_tokenizer(tokenizer: &TokenizerConfig, out: &mut String) {
    let source = match &tokenizer.source {
        TokenizerSource::Union => "union",
        TokenizerSource::Base => "base",
        TokenizerSource::Model(model) => &format!("{:?}", model.written),
    };
    let _ = writeln!(out, "tokenizer.source = {source}");
    if let Some(multiple) = tokenizer.pad_to_multiple_of {
        let _ = writeln!(out, "tokenizer.pad_to_multiple_of = {multiple}");
    }
    for (token, rule) in &tokenizer.tokens {
        let source = match &rule.source {
            None => "-".to_owned(),
            Some(EmbeddingSource::Zero) => "zero".to_owned(),
            Some(EmbeddingSource::Model(model)) => format!("{:?}", model.written),
            Some(EmbeddingSource::Token { model, token }) => format!("{:?} {token:?}", model.written),
            Some(EmbeddingSource::TokenId { model, id }) => format!("{:?} {id}", model.written),
        };
        let _ = writeln!(out, "tokenizer.tokens[{token:?}] = {source} force {}", rule.force);
    }
}

fn write_round(round: &Round, out: &mut String, prefix: &str) {
    let _ = writeln!(out, "{prefix}merge_method = {}", round.method.name());
    let _ = writeln!(out, "{prefix}subspace = {}", round.subspace.name());
    if let Subspace::DeltaGram(scale) = round.subspace {
        let _ = writeln!(out, "{prefix}subspace.scale = {}", scale.name());
    }
    let _ = writeln!(out, "{prefix}unmatched = {}", round.unmatched.name());
    let solver = &round.solver;
    let _ = writeln!(out, "{prefix}solver.method = {}", solver.method.name());
    if let Some(preconditioner) = solver.preconditioner {
        let _ = writeln!(out, "{prefix}solver.preconditioner = {}", preconditioner.name());
    }
    if let Some(max_iterations) = solver.max_iterations {
        let _ = writeln!(out, "{prefix}solver.max_iterations = {max_iterations}");
    }
    let stop = solver.stop.unwrap_or_default();
    for (name, number) in [
        ("tolerance", solver.tolerance),
        ("ridge", solver.ridge),
        ("stop.objective_decrease", stop.objective_decrease),
        ("stop.preconditioned_residual", stop.preconditioned_residual),
        ("stop.relative_residual", stop.relative_residual),
        ("stop.seconds", stop.seconds),
    ] {
        if let Some(number) = number {
            let _ = writeln!(out, "{prefix}solver.{name} = {number:?}");
        }
    }
    round.parameters.write_canonical(out, &format!("{prefix}parameters."));
    for (i, parameters) in round.model_parameters.iter().enumerate() {
        parameters.write_canonical(out, &format!("{prefix}models[{i}].parameters."));
    }
    let _ = writeln!(out, "{prefix}initial = {}", round.initial.name());
    match &round.initial {
        Initial::Checkpoint(model) => {
            let _ = writeln!(out, "{prefix}initial.checkpoint = {:?}", model.written);
        }
        Initial::Nested(inner) => write_round(inner, out, &format!("{prefix}initial.")),
        Initial::Auto | Initial::Zero | Initial::Average | Initial::Base => {}
    }
}
