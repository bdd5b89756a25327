//! Vocabularies brought together: rows of embeddings and heads, and the tokenizer's files, against tables written by hand.

use std::fs;

use serde_json::{Value, json};

use crate::util::{Merged, Scratch, Tensor, strict_json};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const WIDTH: usize = 2;

/// Row `r` of model `m` is `[10m + r, -(10m + r)]`: a row says where it comes from.
fn row(model: usize, row: usize) -> Vec<f64> {
    let value = (10 * model + row) as f64;
    vec![value, -value]
}

/// Rounded to f32, as it is stored.
fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let mean = |k| rows.iter().map(|row: &Vec<f64>| row[k]).sum::<f64>() / rows.len() as f64;
    (0..WIDTH).map(|k| f64::from(mean(k) as f32)).collect()
}

fn rows(model: usize, count: usize) -> Vec<f64> {
    (0..count).flat_map(|r| row(model, r)).collect()
}

/// A model with a fast tokenizer: tokens of its own and tokens added to it.
fn model(scratch: &Scratch, number: usize, count: usize, tokens: &[(&str, u32)], added: &[(&str, u32)]) {
    let name = format!("m{number}");
    let values = rows(number, count);
    let head: Vec<f64> = values.iter().map(|v| v + 0.5).collect();
    scratch.model(
        &name,
        &[
            Tensor::f32(EMBEDDING, &[count, WIDTH], &values),
            Tensor::f32("model.layers.0.w.weight", &[3, 2], &[number as f64; 6]),
            Tensor::f32(HEAD, &[count, WIDTH], &head),
        ],
    );
    scratch.write(
        format!("{name}/config.json"),
        json!({"vocab_size": count, "num_hidden_layers": 1}).to_string(),
    );
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().map(|(t, id)| ((*t).to_owned(), json!(id))).collect();
    let entry = |(token, id): &(&str, u32)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let added_tokens: Vec<Value> = added.iter().map(entry).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": added_tokens, "normalizer": {"type": "NFC"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    });
    scratch.write(format!("{name}/tokenizer.json"), tokenizer.to_string());
    let decoder: serde_json::Map<String, Value> =
        added.iter().map(|(t, id)| (id.to_string(), json!({"content": t}))).collect();
    let config =
        json!({"added_tokens_decoder": decoder, "chat_template": format!("{{{{ m{} }}}}", number.min(1))});
    scratch.write(format!("{name}/tokenizer_config.json"), config.to_string());
}

/// m0 is the base: a b <s>. m1: b a c <s> <t>. m2: a c <t>, and no <s>.
fn world() -> Scratch {
    let scratch = Scratch::new();
    model(&scratch, 0, 3, &[("a", 0), ("b", 1)], &[("<s>", 2)]);
    model(&scratch, 1, 5, &[("b", 0), ("a", 1), ("c", 2)], &[("<s>", 3), ("<t>", 4)]);
    model(&scratch, 2, 4, &[("a", 0), ("c", 1), ("ab", 3)], &[("<t>", 2)]);
    scratch
}

fn config(weights: [u32; 3], more: &str) -> String {
    let [a, b, c] = weights;
    format!(
        "merge_method: linear\nbase_model: m0\nmodels:\n- {{model: m0, parameters: {{weight: {a}}}}}\n\
         - {{model: m1, parameters: {{weight: {b}}}}}\n- {{model: m2, parameters: {{weight: {c}}}}}\n{more}\n"
    )
}

fn json_file(merged: &Merged, name: &str) -> Value {
    strict_json(&fs::read_to_string(merged.directory.join(name)).expect(name))
}

fn check(merged: &Merged, expected: &[Vec<f64>]) {
    let flat: Vec<f64> = expected.concat();
    assert_eq!(merged.values(EMBEDDING), flat, "embedding");
    // Every row of the head is the embedding's plus 0.5, but for rows of zeros.
    let head: Vec<f64> = expected
        .iter()
        .flat_map(|row| row.iter().map(|v| if row[0] == 0.0 && row[1] == 0.0 { 0.0 } else { v + 0.5 }))
        .collect();
    if !expected.iter().any(|row| row[0] == 0.0 && row[1] == 0.0) {
        assert_eq!(merged.values(HEAD), head, "head");
    }
    assert_eq!(merged.tensor(EMBEDDING).shape, [expected.len(), WIDTH]);
    assert_eq!(json_file(merged, "config.json")["vocab_size"], expected.len());
}

#[test]
fn the_union_has_the_bases_ids_and_what_the_others_have_beyond_it() {
    let scratch = world();
    // Tokens of the models' own first (c of m1, ab of m2), then added ones: a b <s> c ab <t>.
    let union = "tokenizer_source: union";
    // Of one model at a time its own rows, and for what it lacks: the only one's, the base's, or the mean.
    let c = mean(&[row(1, 2), row(2, 1)]);
    let t = mean(&[row(1, 4), row(2, 2)]);
    let merged = scratch.merge(&config([1, 0, 0], union), "of-m0", &[]);
    check(&merged, &[row(0, 0), row(0, 1), row(0, 2), c, row(2, 3), t]);
    let merged = scratch.merge(&config([0, 1, 0], union), "of-m1", &[]);
    check(&merged, &[row(1, 1), row(1, 0), row(1, 3), row(1, 2), row(2, 3), row(1, 4)]);
    let merged = scratch.merge(&config([0, 0, 1], union), "of-m2", &[]);
    check(&merged, &[row(2, 0), row(0, 1), row(0, 2), row(2, 1), row(2, 3), row(2, 2)]);

    let tokenizer = json_file(&merged, "tokenizer.json");
    let added: Vec<(u64, &str, bool)> = tokenizer["added_tokens"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|t| {
            (t["id"].as_u64().expect("an id"), t["content"].as_str().expect("text"), t["special"] == true)
        })
        .collect();
    assert_eq!(added, [(2, "<s>", true), (3, "c", false), (4, "ab", false), (5, "<t>", true)]);
    assert_eq!(tokenizer["model"]["vocab"], json!({"a": 0, "b": 1}));
    assert_eq!(
        (&tokenizer["model"]["merges"], &tokenizer["normalizer"]["type"]),
        (&json!([["a", "b"]]), &json!("NFC"))
    );
    let decoder = &json_file(&merged, "tokenizer_config.json")["added_tokens_decoder"];
    assert_eq!(decoder["5"]["content"], "<t>");
    assert_eq!(decoder.as_object().expect("an object").len(), 4);

    // All weights, threads and ways of reading: the same rows added up, the same bytes.
    let merged = scratch.merge(&config([1, 2, 1], union), "all", &["--threads", "1", "--io", "pread"]);
    let first = mean(&[row(0, 0), row(1, 1), row(1, 1), row(2, 0)]);
    assert_eq!(merged.values(EMBEDDING)[..WIDTH], first);
    assert_eq!(merged.tensors, scratch.merge(&config([1, 2, 1], union), "again", &[]).tensors);
}

#[test]
fn the_bases_vocabulary_and_another_models() {
    let scratch = world();
    let merged = scratch.merge(&config([0, 1, 0], "tokenizer_source: base"), "base", &[]);
    check(&merged, &[row(1, 1), row(1, 0), row(1, 3)]);
    assert_eq!(
        fs::read(merged.directory.join("tokenizer.json")).expect("copied"),
        fs::read(scratch.join("m0/tokenizer.json")).expect("there"),
        "nothing is added: copied as it is"
    );
    let merged = scratch.merge(&config([0, 0, 1], "tokenizer_source: m1"), "other", &[]);
    check(&merged, &[row(0, 1), row(2, 0), row(2, 1), row(0, 2), row(2, 2)]);
    assert_eq!(json_file(&merged, "tokenizer.json")["model"]["vocab"], json!({"b": 0, "a": 1, "c": 2}));
}

#[test]
fn tokens_have_rules_of_their_own() {
    let scratch = world();
    let rules = "tokenizer:\n  source: base\n  tokens:\n    \
        <new>: {source: {kind: model_token, model: m1, token: c}}\n    \
        <id>: {source: {kind: model_token, model: m2, token_id: 3}}\n    \
        <zero>: {source: {kind: zero}}\n    <s>: {source: m1, force: true}\n    b: {source: m1}";
    let merged = scratch.merge(&config([0, 0, 1], rules), "out", &[]);
    // a is m2's own; b it lacks; <s> is m1's for all.
    check(&merged, &[row(2, 0), row(1, 0), row(1, 3), row(1, 2), row(2, 3), vec![0.0, 0.0]]);
    let merged = scratch.merge(&config([1, 0, 0], rules), "forced", &[]);
    assert_eq!(merged.values(EMBEDDING)[..3 * WIDTH], [row(0, 0), row(0, 1), row(1, 3)].concat());
    assert_eq!(merged.values(HEAD)[10..], [0.0, 0.0], "zero in the head, too");
}

#[test]
fn rows_are_padded_with_the_mean_of_all() {
    let scratch = world();
    let padded = "tokenizer: {source: base, pad_to_multiple_of: 4}";
    let merged = scratch.merge(&config([0, 1, 0], padded), "out", &[]);
    let own = [row(1, 1), row(1, 0), row(1, 3)];
    assert_eq!(merged.values(EMBEDDING), [&own[0][..], &own[1], &own[2], &mean(&own)].concat());
    assert_eq!(json_file(&merged, "config.json")["vocab_size"], 4);
}

#[test]
fn slices_take_rows_from_the_models_of_their_own() {
    let scratch = world();
    let config = "merge_method: passthrough\ntokenizer_source: union\nslices:\n\
        - sources: [{model: m1, layer_range: [0, 1]}]\n- sources: [{model: m2, layer_range: [0, 1]}]\n";
    let merged = scratch.merge(config, "out", &[]);
    // The first model's ids: b a c <s> <t>, and ab at the end, which m1 has no row for.
    let expected = [row(1, 0), row(1, 1), row(1, 2), row(1, 3), row(1, 4), vec![0.0, 0.0]];
    assert_eq!(merged.values(EMBEDDING), expected.concat());
    let half = |r: Vec<f64>| r.iter().map(|v| v + 0.5).collect::<Vec<_>>();
    let zero = vec![0.0, 0.0];
    let expected = [zero.clone(), half(row(2, 0)), half(row(2, 1)), zero, half(row(2, 2)), half(row(2, 3))];
    assert_eq!(merged.values(HEAD), expected.concat());
}

#[test]
fn chat_templates_by_name_by_text_and_by_majority() {
    let scratch = world();
    scratch.write("m0/chat_template.jinja", "{{ m1 }}\n");
    for (written, expected) in [
        ("auto", "{{ m1 }}"),
        ("'{{ bos_token }}'", "{{ bos_token }}"),
        ("chatml", "<|im_start|>"),
        ("llama3", "<|start_header_id|>"),
        ("mistral", "[INST]"),
        ("alpaca", "### Instruction:"),
        ("exaone", "[|endofturn|]"),
    ] {
        let out = format!("out-{}", written.len());
        let merged = scratch.merge(
            &config([1, 1, 1], &format!("tokenizer_source: union\nchat_template: {written}")),
            &out,
            &[],
        );
        let template = json_file(&merged, "tokenizer_config.json")["chat_template"].clone();
        assert!(template.as_str().is_some_and(|t| t.contains(expected)), "{written}: {template}");
        assert!(!merged.directory.join("chat_template.jinja").exists(), "it would overrule the new one");
        fs::remove_dir_all(&merged.directory).expect("remove");
    }
    // Without a tokenizer block the reference's files are the ones.
    let merged =
        scratch.merge("merge_method: linear\nchat_template: chatml\nmodels: [{model: m2}]\n", "plain", &[]);
    assert!(
        json_file(&merged, "tokenizer_config.json")["chat_template"]
            .as_str()
            .is_some_and(|t| t.contains("im_start"))
    );
}

#[test]
fn what_cannot_be_brought_together_is_refused() {
    let scratch = world();
    let refuse = |more: &str, words: &[&str]| scratch.refuse_unread(&config([1, 1, 1], more), words);
    refuse("tokenizer: {tokens: {x: {source: nowhere}}}", &["token `x`", "`nowhere` is no model"]);
    refuse("tokenizer: {tokens: {x: {source: m1}}}", &["token `x`", "`m1` has no such token"]);
    refuse(
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: m1, token_id: 5}}}}",
        &["token `x`", "`m1` has 5 rows (got token_id 5)"],
    );
    refuse("tokenizer_source: nowhere", &["nowhere", "has no tokenizer"]);
    // Without one, models of different vocabularies do not fit together, as before.
    refuse("", &[EMBEDDING, "F32 [5, 2]", "F32 [3, 2]"]);
    fs::remove_file(scratch.join("m1/tokenizer.json")).expect("remove");
    scratch.write("m1/tokenizer.model", b"sentencepiece");
    refuse("tokenizer_source: union", &["m1/tokenizer.model", "SentencePiece", "save_pretrained"]);
    fs::remove_file(scratch.join("m0/tokenizer.json")).expect("remove");
    scratch.write("m0/vocab.json", r#"{"a": 0, "b": 1}"#);
    fs::remove_file(scratch.join("m1/tokenizer.model")).expect("remove");
    refuse("tokenizer_source: union", &["3 tokens would have to be added", "tokenizer.json"]);
    scratch.write("m0/tokenizer.json", "{");
    refuse("tokenizer_source: union", &["m0/tokenizer.json", "malformed JSON"]);
}

/// A rule for a token that is there is about its row: as an added token, texts would be cut at it before anything else.
#[test]
fn a_rule_for_a_token_that_is_there_leaves_the_tokenizer_alone() {
    let scratch = world();
    let rules = "tokenizer: {source: base, tokens: {a: {source: m1, force: true}}}";
    let merged = scratch.merge(&config([1, 0, 0], rules), "out", &[]);
    check(&merged, &[row(1, 1), row(0, 1), row(0, 2)]);
    let tokenizer = json_file(&merged, "tokenizer.json");
    let added = tokenizer["added_tokens"].as_array().expect("a list");
    assert!(added.iter().all(|token| token["content"] != "a"), "{added:?}");
}
