//! `slices`, `modules`, adapters, tokenizers: what mergekit's configs mean here.

use super::*;

fn slices(text: &str) -> String {
    format!("merge_method: linear\nslices:\n{text}")
}

#[test]
fn configs_published_with_mergekit_parse_unchanged() {
    let linear = "models:\n  - model: psmathur/orca_mini_v3_13b\n    parameters:\n      weight: 1.0\n  \
                  - model: WizardLM/WizardLM-13B-V1.2\n    parameters:\n      weight: 0.3\n  \
                  - model: garage-bAInd/Platypus2-13B\n    parameters:\n      weight: 0.5\n\
                  merge_method: linear\ndtype: float16\n";
    let stack = "slices:\n  - sources:\n    - model: psmathur/orca_mini_v3_13b\n      layer_range: [0, 24]\n  \
                 - sources:\n    - model: garage-bAInd/Platypus2-13B\n      layer_range: [20, 40]\n\
                 merge_method: passthrough\ndtype: float16\n";
    let gradient = "slices:\n  - sources:\n      - model: psmathur/orca_mini_v3_13b\n        layer_range: [0, 40]\n      \
                    - model: garage-bAInd/Platypus2-13B\n        layer_range: [0, 40]\n\
                    merge_method: METHOD\nbase_model: psmathur/orca_mini_v3_13b\nparameters:\n  PARAMETER:\n    \
                    - filter: self_attn\n      value: [0, 0.5, 0.3, 0.7, 1]\n    - filter: mlp\n      \
                    value: [1, 0.5, 0.7, 0.3, 0]\n    - value: 0.5 # fallback for rest of tensors\ndtype: float16\n";
    assert_eq!(ok(linear).models.len(), 3);
    let stack = ok(stack);
    let outputs: Vec<_> =
        stack.sections.iter().map(|s| s.layers.as_ref().expect("slices").output.clone()).collect();
    assert_eq!(outputs, [0..24, 24..44]);
    assert_eq!((stack.models.len(), stack.round.method), (2, Method::Passthrough));
    let gradient = ok(&gradient.replace("METHOD", "task_arithmetic").replace("PARAMETER", "weight"));
    let [section] = &gradient.sections[..] else { panic!("one slice") };
    assert_eq!(section.layers.as_ref().expect("a slice").base, Some(0..40), "the base is the first source");
    let weight = |name, t| section.config.round.weight(0, name, t);
    assert_eq!(weight("model.layers.0.self_attn.q_proj.weight", 0.25), 0.5);
    assert!((weight("model.layers.0.mlp.up_proj.weight", 0.125) - 0.75).abs() < 1e-15);
    assert_eq!(weight("model.norm.weight", 0.0), 0.5);
}

#[test]
fn a_source_stands_before_its_slice_its_module_and_the_config() {
    let config = ok(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1, lambda: 0.5, normalize: true}\n\
        modules:\n  encoder:\n    parameters: {weight: 2, lambda: 0.25}\n    slices:\n      \
        - sources:\n          - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q, value: 4}]}}\n          \
        - {model: b, layer_range: [0, 2]}\n        parameters: {weight: [{filter: k, value: 3}]}\n  \
        decoder: {models: [{model: a}, {model: b, parameters: {weight: 5}}]}\n",
    );
    let [encoder, decoder] = &config.sections[..] else { panic!("two modules") };
    let round = &encoder.config.round;
    for (model, name, weight) in [(0, "q", 4.0), (0, "k", 3.0), (0, "v", 2.0), (1, "q", 2.0), (1, "k", 3.0)] {
        assert_eq!(round.weight(model, name, 0.0), weight, "{model} {name}");
    }
    assert_eq!((round.lambda("q", 0.0), round.normalize("q", 0.0)), (0.25, true));
    let round = &decoder.config.round;
    assert_eq!(
        (round.weight(0, "q", 0.0), round.weight(1, "q", 0.0), round.lambda("q", 0.0)),
        (1.0, 5.0, 0.5)
    );
    assert_eq!((encoder.module.as_deref(), decoder.layers.as_ref()), (Some("encoder"), None));
    // The base is no source, but all sources take the same layers.
    assert_eq!(encoder.layers.as_ref().expect("a slice").base, Some(0..2));
    assert_eq!(config.models.len(), 2);
}

#[test]
fn models_are_named_in_every_form() {
    for (text, path, adapter) in [
        ("a", "dir/a", None),
        ("a+l", "dir/a", Some("dir/l")),
        ("{model: a, lora: l}", "dir/a", Some("dir/l")),
        ("{model: {path: a}, lora: {path: l}}", "dir/a", Some("dir/l")),
        ("{model: {path: a}}", "dir/a", None),
        ("/x/a+/y/l", "/x/a", Some("/y/l")),
    ] {
        let config = ok(&format!("merge_method: linear\nmodels: [{{model: {text}}}]\n"));
        let model = &config.models[0].model;
        assert_eq!(model.path, Path::new(path), "{text}");
        assert_eq!(model.adapter.as_deref(), adapter.map(Path::new), "{text}");
    }
    let config = ok("merge_method: linear\nmodels: [{model: {model: a, override_architecture: X}}]\n");
    assert!(config.warnings[0].contains("override_architecture"), "{:?}", config.warnings);
}

#[test]
fn tokenizers_are_read_in_every_form() {
    let top = |line: &str| ok(&format!("merge_method: linear\n{MODELS}{line}\n")).tokenizer.expect("given");
    assert_eq!(top("tokenizer_source: union").source, TokenizerSource::Union);
    assert_eq!(top("tokenizer: {}").source, TokenizerSource::Union);
    assert!(matches!(top("tokenizer_source: some/model").source, TokenizerSource::Model(_)));
    let full = top("tokenizer:\n  source: base\n  pad_to_multiple_of: 64\n  tokens:\n    \
        <|im_start|>: {source: b, force: true}\n    a: {source: {kind: zero}}\n    \
        b: {source: {kind: model_token, model: a, token: x}}\n    c: {source: {kind: model_token, model: a, token_id: 7}}\n    \
        d: {source: {model: {path: a}}}\n    e:");
    assert_eq!(
        (full.source, full.pad_to_multiple_of, full.tokens.len()),
        (TokenizerSource::Base, Some(64), 6)
    );
    let rule = |k: usize| &full.tokens[k].1;
    assert!(rule(0).force && matches!(&rule(0).source, Some(EmbeddingSource::Model(m)) if m.written == "b"));
    assert_eq!(rule(1).source, Some(EmbeddingSource::Zero));
    assert!(matches!(&rule(2).source, Some(EmbeddingSource::Token { token, .. }) if token == "x"));
    assert!(matches!(&rule(3).source, Some(EmbeddingSource::TokenId { id: 7, .. })));
    assert!(matches!(&rule(4).source, Some(EmbeddingSource::Model(_))));
    assert_eq!(rule(5).source, None);
    for template in ["auto", "chatml", "llama3", "mistral", "alpaca", "exaone", "\"{{ messages }}\""] {
        let config = ok(&format!("merge_method: linear\n{MODELS}chat_template: {template}\n"));
        assert!(config.chat_template.is_some());
    }
}

#[test]
fn residual_weight_is_accepted_with_a_warning() {
    let config = ok(&slices("  - {residual_weight: 0.5, sources: [{model: a, layer_range: [0, 1]}]}\n"));
    let [warning] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
    assert!(warning.contains(":3: slices[0].residual_weight: is accepted and changes nothing"), "{warning}");
}

#[test]
fn the_hash_knows_every_part() {
    let of = |text: &str| ok(text).canonical_hash_input();
    let one = slices("  - sources: [{model: a, layer_range: [0, 2]}]\n");
    let other = slices("  - sources: [{model: a, layer_range: [1, 3]}]\n");
    assert_ne!(of(&one), of(&other));
    let top = format!("merge_method: linear\n{MODELS}");
    let mut seen = std::collections::BTreeSet::new();
    for line in [
        "",
        "tokenizer_source: union",
        "tokenizer_source: base",
        "tokenizer: {source: union, pad_to_multiple_of: 8}",
        "tokenizer: {tokens: {x: {source: a}}}",
        "tokenizer: {tokens: {x: {source: a, force: true}}}",
        "chat_template: auto",
    ] {
        assert!(seen.insert(of(&format!("{top}{line}\n"))), "{line}");
    }
    assert_eq!(of(&format!("{top}tokenizer_source: union\n")), of(&format!("{top}tokenizer: {{}}\n")));
}

#[test]
fn refusals_name_line_and_key() {
    let source = "{model: a, layer_range: [0, 2]}";
    let models = |line: &str| format!("merge_method: linear\n{MODELS}{line}\n");
    for (text, message) in [
        (
            format!("merge_method: linear\n{MODELS}slices: [{{sources: [{source}]}}]\n"),
            "3: slices: give one of `models`, `slices` and `modules`",
        ),
        (
            format!("merge_method: linear\nslices: [{{sources: [{source}]}}]\nmodules: {{x: {{models: [{{model: a}}]}}}}\n"),
            "3: modules: give one of `models`, `slices` and `modules`",
        ),
        (slices("  []"), "2: slices: the list is empty, and a merge needs at least one slice"),
        (slices("  - {}"), "3: slices[0].sources: is missing: a slice lists the layers it takes"),
        (
            slices("  - {source: []}"),
            "3: slices[0].source: unknown key (expected one of sources, base_model, parameters, residual_weight); \
             did you mean `sources`?",
        ),
        (
            slices("  - {sources: [], layer_range: [0, 1]}"),
            "3: slices[0].layer_range: unknown key (expected one of sources, base_model, parameters, residual_weight); \
             it belongs under `sources`",
        ),
        (
            slices("  - sources:\n      - {model: a, layers: [0, 1]}"),
            "4: slices[0].sources[0].layers: unknown key (expected one of model, layer_range, parameters); did you \
             mean `layer_range`?",
        ),
        (
            slices("  - sources:\n      - {model: a}"),
            "4: slices[0].sources[0].layer_range: is missing: a source says which layers it gives, as `[0, 16]`",
        ),
        (
            slices("  - sources:\n      - {model: a, layer_range: [4, 4]}"),
            "4: slices[0].sources[0].layer_range: expected at least one layer, first < end, got `[4, 4]`",
        ),
        (
            slices("  - sources:\n      - {model: a, layer_range: [0, 1.5]}"),
            "4: slices[0].sources[0].layer_range[1]: expected a layer's number, got `1.5`",
        ),
        (
            slices("  - sources:\n      - {model: a, layer_range: [0, 2]}\n      - {model: b, layer_range: [0, 3]}"),
            "5: slices[0].sources[1].layer_range: all sources of a slice have the same number of layers (got 3, \
             expected 2 as in the first)",
        ),
        (
            format!("merge_method: passthrough\nslices:\n  - sources:\n    - {source}\n    - {source}\n"),
            "5: merge_method: `passthrough` copies one model (got 2)",
        ),
        (
            "merge_method: task_arithmetic\nbase_model: z\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 2]}\n    \
             - {model: b, layer_range: [1, 3]}\n"
                .to_owned(),
            "4: slices[0]: the method needs the base's layers, and the sources differ in theirs: add `z` with its \
             `layer_range` to the sources",
        ),
        (
            "merge_method: linear\nmodules: {x: {}}\n".to_owned(),
            "2: modules.x.models: is missing: a module has `models` or `slices`",
        ),
        (
            "merge_method: linear\nmodules: {x: {model: a}}\n".to_owned(),
            "2: modules.x.model: unknown key (expected one of models, slices, parameters); did you mean `models`?",
        ),
        (
            models("models_: 1"),
            "3: models_: unknown key (expected one of merge_method, models, base_model, parameters, dtype, out_dtype, \
             subspace, initial, solver, unmatched, tokenizer_source, sweep, name, slices, modules, tokenizer, chat_template); \
             did you mean `models`?",
        ),
        (
            "merge_method: linear\nmodels: [{model: a+b+c}]\n".to_owned(),
            "2: models[0].model: expected `path` or `path+adapter_path`, got `a+b+c`",
        ),
        (
            "merge_method: linear\nmodels: [{model: {model: {path: a, revision: main}}}]\n".to_owned(),
            "2: models[0].model.model.revision: nothing is downloaded here; give the directory of that revision as `path`",
        ),
        (
            models("tokenizer: {source: union}\ntokenizer_source: base"),
            "4: tokenizer_source: give `tokenizer_source` or `tokenizer`, not both",
        ),
        (
            models("tokenizer: {pad_to_multiple_of: 0}"),
            "3: tokenizer.pad_to_multiple_of: expected an integer from 1 to 1048576, got `0`",
        ),
        (
            models("tokenizer: {tokens: {x: {kind: zero}}}"),
            "3: tokenizer.tokens.x.kind: unknown key (expected one of source, force); it belongs under `source`",
        ),
        (
            models("tokenizer: {tokens: {x: {source: {kind: zeros}}}}"),
            "3: tokenizer.tokens.x.source.kind: unknown value `zeros` (expected one of zero, model_token); did you mean \
             `zero`?",
        ),
        (
            models("tokenizer: {tokens: {x: {force: true}}}"),
            "3: tokenizer.tokens.x.source: is missing: `force` puts the source's row in place of the models' own",
        ),
        (
            models("chat_template: chat_ml"),
            "3: chat_template: unknown value `chat_ml` (expected one of auto, alpaca, chatml, llama3, mistral, exaone); \
             did you mean `chatml`?",
        ),
    ] {
        assert_eq!(refused(&text), message, "{text}");
    }
}
