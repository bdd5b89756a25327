//! `slices` and `modules`: layers taken apart and put together, against arithmetic written out here.

use std::fs;

use serde_json::{Value, json};

use crate::util::{Merged, Random, Scratch, Tensor, strict_json};

const ROWS: usize = 6;
const COLUMNS: usize = 4;

/// Names of one layer, with their shapes: out ≠ in.
const LAYER: [(&str, &[usize]); 3] = [
    ("self_attn.q_proj.weight", &[ROWS, COLUMNS]),
    ("mlp.up_proj.weight", &[COLUMNS, ROWS]),
    ("norm.weight", &[COLUMNS]),
];

/// A little Llama of `layers` layers.
fn llama(layers: usize, random: &mut Random) -> Vec<Tensor> {
    let mut tensors = vec![Tensor::random("model.embed_tokens.weight", "F32", &[8, COLUMNS], random)];
    for layer in 0..layers {
        for (name, shape) in LAYER {
            tensors.push(Tensor::random(&format!("model.layers.{layer}.{name}"), "F32", shape, random));
        }
    }
    tensors.push(Tensor::random("model.norm.weight", "F32", &[COLUMNS], random));
    tensors.push(Tensor::random("lm_head.weight", "F32", &[8, COLUMNS], random));
    tensors
}

struct World {
    scratch: Scratch,
    a: Vec<Tensor>,
    b: Vec<Tensor>,
}

impl World {
    fn new() -> Self {
        let mut random = Random::new(11);
        let (a, b) = (llama(4, &mut random), llama(4, &mut random));
        let scratch = Scratch::new();
        for (name, tensors) in [("a", &a), ("b", &b)] {
            scratch.sharded_model(name, tensors, 3);
            let types = if name == "a" { ["full", "full", "full", "full"] } else { ["b0", "b1", "b2", "b3"] };
            let config = json!({"num_hidden_layers": 4, "layer_types": types, "max_window_layers": 4});
            scratch.write(format!("{name}/config.json"), config.to_string());
        }
        Self { scratch, a, b }
    }

    fn of(tensors: &[Tensor], name: &str) -> Vec<f64> {
        tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name}")).values()
    }

    fn config(merged: &Merged) -> Value {
        strict_json(&fs::read_to_string(merged.directory.join("config.json")).expect("a config"))
    }
}

fn layers(merged: &Merged) -> usize {
    let layer = |name: &String| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    merged.tensors.keys().filter_map(layer).max().map_or(0, |k| k + 1)
}

const STACK: &str = "merge_method: passthrough\nslices:\n\
    - sources: [{model: a, layer_range: [0, 3]}]\n\
    - sources: [{model: b, layer_range: [1, 4]}]\n\
    - sources: [{model: a, layer_range: [2, 3]}]\n";

#[test]
fn layers_are_stacked_bit_for_bit() {
    let world = World::new();
    let merged = world.scratch.merge(STACK, "out", &[]);
    assert_eq!(layers(&merged), 7);
    let from = [
        (&world.a, 0),
        (&world.a, 1),
        (&world.a, 2),
        (&world.b, 1),
        (&world.b, 2),
        (&world.b, 3),
        (&world.a, 2),
    ];
    for (layer, (tensors, source)) in from.into_iter().enumerate() {
        for (name, _) in LAYER {
            let stored =
                tensors.iter().find(|t| t.name == format!("model.layers.{source}.{name}")).expect("there");
            assert_eq!(
                merged.tensor(&format!("model.layers.{layer}.{name}")).bytes,
                stored.bytes,
                "{layer} {name}"
            );
        }
    }
    // What stands before the layers is the first slice's, what stands after them the last one's: both are a's.
    assert_eq!(merged.values("model.embed_tokens.weight"), World::of(&world.a, "model.embed_tokens.weight"));
    assert_eq!(merged.values("lm_head.weight"), World::of(&world.a, "lm_head.weight"));
    assert_eq!(merged.tensors.len(), 7 * LAYER.len() + 3);
    let config = World::config(&merged);
    assert_eq!(config["num_hidden_layers"], 7);
    assert_eq!(config["layer_types"], json!(["full", "full", "full", "b1", "b2", "b3", "full"]));
    assert_eq!(config["max_window_layers"], 4, "no count of layers");
    // The same bytes whatever the threads and the way of reading.
    let other =
        world.scratch.merge(STACK, "other", &["--threads", "1", "--io", "pread", "--out-shard-size", "300"]);
    assert_eq!(merged.tensors, other.tensors);
}

#[test]
fn embeddings_come_from_the_first_slice_and_heads_from_the_last() {
    let world = World::new();
    let config = "merge_method: passthrough\nslices:\n\
        - sources: [{model: b, layer_range: [3, 4]}]\n- sources: [{model: a, layer_range: [0, 1]}]\n";
    let merged = world.scratch.merge(config, "out", &[]);
    assert_eq!(merged.values("model.embed_tokens.weight"), World::of(&world.b, "model.embed_tokens.weight"));
    assert_eq!(merged.values("model.norm.weight"), World::of(&world.a, "model.norm.weight"));
    assert_eq!(merged.values("lm_head.weight"), World::of(&world.a, "lm_head.weight"));
    assert_eq!(World::config(&merged)["num_hidden_layers"], 2);
}

#[test]
fn passthrough_scales_by_filter() {
    let world = World::new();
    let config = "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [1, 3]\n    \
        parameters: {scale: [{filter: q_proj, value: [0.5, 0]}, {value: 1}]}\n";
    let merged = world.scratch.merge(config, "out", &[]);
    for (layer, scale) in [(0, 0.5), (1, 0.0)] {
        let stored = World::of(&world.a, &format!("model.layers.{}.self_attn.q_proj.weight", layer + 1));
        let expected: Vec<f64> = stored.iter().map(|v| v * scale).collect();
        assert_eq!(merged.values(&format!("model.layers.{layer}.self_attn.q_proj.weight")), expected);
        let copied = World::of(&world.a, &format!("model.layers.{}.norm.weight", layer + 1));
        assert_eq!(merged.values(&format!("model.layers.{layer}.norm.weight")), copied);
    }
}

#[test]
fn gradients_run_over_the_layers_of_each_slice() {
    let world = World::new();
    // As a gradient slerp has it, with a method whose arithmetic is written out: a + w (b - a).
    let config = "merge_method: task_arithmetic\nbase_model: a\nslices:\n\
        - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]\n\
        - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [1, 2]}]\n\
        parameters:\n  weight: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.25}]\n";
    let merged = world.scratch.merge(config, "out", &[]);
    let check = |output: &str, of_a: &str, of_b: &str, weight: f64| {
        let (a, b) = (World::of(&world.a, of_a), World::of(&world.b, of_b));
        for ((got, a), b) in merged.values(output).iter().zip(a).zip(b) {
            // Three f32 operations on values below 2, each within half an ulp of at most 4.
            assert!((got - (a + weight * (b - a))).abs() <= 3.0 * 4.0 / f64::from(1 << 24), "{output}");
        }
    };
    for (layer, attention, mlp) in [(0, 0.0, 1.0), (1, 0.5, 0.5), (2, 1.0, 0.0)] {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for (part, weight) in
            [("self_attn.q_proj.weight", attention), ("mlp.up_proj.weight", mlp), ("norm.weight", 0.25)]
        {
            check(&name(part), &name(part), &name(part), weight);
        }
    }
    // A slice of one layer stands at the end of its gradients.
    for (part, weight) in [("self_attn.q_proj.weight", 1.0), ("mlp.up_proj.weight", 0.0)] {
        let (of_a, of_b) = (format!("model.layers.3.{part}"), format!("model.layers.1.{part}"));
        check(&format!("model.layers.3.{part}"), &of_a, &of_b, weight);
    }
    // What is in no layer stands at their beginning.
    check("model.embed_tokens.weight", "model.embed_tokens.weight", "model.embed_tokens.weight", 0.25);
}

#[test]
fn one_model_may_give_several_layers_of_a_slice() {
    let world = World::new();
    let config = "merge_method: linear\nslices:\n\
        - sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]\n";
    let merged = world.scratch.merge(config, "out", &[]);
    let name = |layer: usize| format!("model.layers.{layer}.mlp.up_proj.weight");
    for layer in 0..2 {
        let (x, y) = (World::of(&world.a, &name(layer)), World::of(&world.a, &name(layer + 2)));
        let mean: Vec<f64> = x.iter().zip(y).map(|(x, y)| f64::from(((x + y) / 2.0) as f32)).collect();
        assert_eq!(merged.values(&name(layer)), mean);
    }
}

#[test]
fn slices_that_a_model_does_not_have_are_refused() {
    let world = World::new();
    let one = |range: &str| {
        format!("merge_method: passthrough\nslices:\n- sources: [{{model: a, layer_range: {range}}}]\n")
    };
    world.scratch.refuse_unread(&one("[2, 5]"), &[":3: slices: `a` has 4 layers (got layer_range [2, 5])"]);
    let mut random = Random::new(3);
    let stacks: Vec<Tensor> = ["encoder.block.0.w", "decoder.block.0.w"]
        .iter()
        .map(|name| Tensor::random(name, "F32", &[2, 3], &mut random))
        .collect();
    world.scratch.model("t5", &stacks);
    world.scratch.refuse_unread(
        "merge_method: passthrough\nslices:\n- sources: [{model: t5, layer_range: [0, 1]}]\n",
        &["several stacks of layers (decoder.block, encoder.block)", "`modules`"],
    );
}

/// A model of two modules, as T5 names them, and something beside them.
fn two_modules(random: &mut Random) -> Vec<Tensor> {
    let mut tensors = vec![Tensor::random("shared.weight", "F32", &[8, 3], random)];
    for stack in ["encoder", "decoder"] {
        for layer in 0..3 {
            tensors.push(Tensor::random(
                &format!("{stack}.block.{layer}.layer.0.q.weight"),
                "F32",
                &[4, 3],
                random,
            ));
        }
        tensors.push(Tensor::random(&format!("{stack}.final_layer_norm.weight"), "F32", &[3], random));
    }
    tensors
}

#[test]
fn modules_are_merged_each_in_its_own_way() {
    let mut random = Random::new(17);
    let (a, b) = (two_modules(&mut random), two_modules(&mut random));
    let scratch = Scratch::new();
    for (name, tensors) in [("a", &a), ("b", &b)] {
        scratch.model(name, tensors);
        scratch.write(format!("{name}/config.json"), r#"{"num_layers": 3, "num_decoder_layers": 3}"#);
    }
    let config = "merge_method: linear\nmodules:\n  \
        encoder: {models: [{model: a}, {model: b, parameters: {weight: 3}}]}\n  \
        decoder:\n    slices:\n    - sources: [{model: a, layer_range: [0, 2]}]\n    \
        - sources: [{model: b, layer_range: [0, 3]}]\n";
    let merged = scratch.merge(config, "out", &[]);
    let of = World::of;
    let q = |stack: &str, layer: usize| format!("{stack}.block.{layer}.layer.0.q.weight");
    for layer in 0..3 {
        let (x, y) = (of(&a, &q("encoder", layer)), of(&b, &q("encoder", layer)));
        for ((got, x), y) in merged.values(&q("encoder", layer)).iter().zip(x).zip(y) {
            // Four f32 operations on values below 4.
            assert!((got - (x + 3.0 * y) / 4.0).abs() <= 4.0 * 4.0 / f64::from(1 << 24));
        }
        assert_eq!(merged.values(&q("decoder", layer + 2)), of(&b, &q("decoder", layer)));
    }
    assert_eq!(merged.values(&q("decoder", 1)), of(&a, &q("decoder", 1)));
    assert_eq!(merged.values("decoder.final_layer_norm.weight"), of(&b, "decoder.final_layer_norm.weight"));
    assert_eq!(merged.values("shared.weight"), of(&a, "shared.weight"), "in no module: the reference's");
    assert!(merged.left_out().contains("in none of the config's modules"), "{}", merged.left_out());
    let model = World::config(&merged);
    assert_eq!((&model["num_layers"], &model["num_decoder_layers"]), (&json!(3), &json!(5)));

    scratch.refuse_unread(
        "merge_method: linear\nmodules: {text_decoder: {models: [{model: a}]}}\n",
        &[
            "modules.text_decoder",
            "`a` has no tensors below a part of that name",
            "`decoder`, `encoder`, `shared`",
        ],
    );
    scratch.write("a/config.json", "{}");
    scratch.refuse_unread(config, &["modules.decoder", "has 5 layers now (it had 3)", "config.json"]);
}

#[test]
fn a_threshold_over_the_whole_model_wants_the_same_models_everywhere() {
    let world = World::new();
    let source =
        |model: &str, first: usize| format!("{{ model: {model}, layer_range: [{first}, {}] }}", first + 1);
    let config = format!(
        "merge_method: ties\nbase_model: a\nparameters: {{ scope: model, weight: 1, density: 0.5 }}\nslices:\n\
         - sources: [{}, {}]\n- sources: [{}, {}, {}]\n",
        source("b", 0),
        source("a", 0),
        source("b", 1),
        source("b", 0),
        source("a", 1),
    );
    world.scratch.refuse(&config, &["`ties` over the whole model", "scope: tensor"]);
}

/// Only what belongs to no module is the reference's: layers that a module's slices leave out are gone.
#[test]
fn layers_that_a_modules_slices_leave_out_are_left_out() {
    let world = World::new();
    let config = "merge_method: passthrough\nmodules: {default: {slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}}\n";
    let merged = world.scratch.merge(config, "out", &[]);
    assert_eq!(layers(&merged), 2);
    assert_eq!(World::config(&merged)["num_hidden_layers"], 2);
    assert_eq!(merged.values("lm_head.weight"), World::of(&world.a, "lm_head.weight"));

    let mut random = Random::new(19);
    let a = two_modules(&mut random);
    world.scratch.model("t5", &a);
    world.scratch.write("t5/config.json", r#"{"num_layers": 3, "num_decoder_layers": 3}"#);
    let config = "merge_method: passthrough\nmodules: {encoder: {slices: [{sources: [{model: t5, layer_range: [1, 2]}]}]}}\n";
    let merged = world.scratch.merge(config, "t5-out", &[]);
    let q = |stack: &str, layer: usize| format!("{stack}.block.{layer}.layer.0.q.weight");
    assert_eq!(merged.values(&q("encoder", 0)), World::of(&a, &q("encoder", 1)));
    assert!(!merged.tensors.contains_key(&q("encoder", 1)), "{:?}", merged.tensors.keys());
    assert_eq!(merged.values(&q("decoder", 2)), World::of(&a, &q("decoder", 2)));
}

/// As in mergekit: a filter of a model's parameters sees the model's names, one of all models' parameters the output's.
#[test]
fn filters_of_a_models_parameters_match_its_own_names() {
    let world = World::new();
    let config = |scale: &str| {
        format!(
            "merge_method: passthrough\nslices:\n- sources: [{{model: a, layer_range: [0, 2]}}]\n\
             - sources: [{{model: b, layer_range: [1, 3], parameters: {{scale: [{{filter: {scale}, value: 0}}, {{value: 1}}]}}}}]\n"
        )
    };
    let merged = world.scratch.merge(&config("layers.1."), "out", &[]);
    let q = |layer: usize| format!("model.layers.{layer}.self_attn.q_proj.weight");
    assert_eq!(merged.values(&q(1)), World::of(&world.a, &q(1)));
    assert!(merged.values(&q(2)).iter().all(|v| *v == 0.0), "b's layer 1");
    assert_eq!(merged.values(&q(3)), World::of(&world.b, &q(2)));
    let merged = world.scratch.merge(&config("layers.3."), "none", &[]);
    assert_eq!(merged.values(&q(3)), World::of(&world.b, &q(2)));
    // The same of weights, with a method that takes task vectors.
    let config = "merge_method: ties\nbase_model: a\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  \
        - {model: b, layer_range: [2, 4], parameters: {weight: [{filter: layers.3., value: 1}, {value: 0}]}}\n\
        parameters: {density: 1, normalize: no}\n";
    let merged = world.scratch.merge(config, "ties", &[]);
    assert_eq!(merged.values(&q(0)), World::of(&world.a, &q(0)));
    for (got, want) in merged.values(&q(1)).iter().zip(World::of(&world.b, &q(3))) {
        // a + (b - a) in f32, of values below 1.
        assert!((got - want).abs() <= 2.0 / f64::from(1 << 24), "{got} {want}");
    }
}

/// Encoder and decoder have layers of their own: a gradient ends at the last of each.
#[test]
fn gradients_run_over_each_stack() {
    let mut random = Random::new(23);
    let tensors = |random: &mut Random| -> Vec<Tensor> {
        let layer = |(stack, layer)| format!("{stack}.block.{layer}.w");
        let names = (0..5).map(|k| ("encoder", k)).chain((0..3).map(|k| ("decoder", k))).map(layer);
        names.map(|name| Tensor::random(&name, "F32", &[2, 3], random)).collect()
    };
    let (a, b) = (tensors(&mut random), tensors(&mut random));
    let scratch = Scratch::new();
    for (name, tensors) in [("a", &a), ("b", &b)] {
        scratch.model(name, tensors);
        scratch.write(format!("{name}/config.json"), r#"{"num_layers": 5, "num_decoder_layers": 3}"#);
    }
    let config =
        "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: b, parameters: {weight: [0, 1]}}]\n";
    let merged = scratch.merge(config, "out", &[]);
    for (name, weight) in [
        ("encoder.block.1.w", 0.25),
        ("encoder.block.4.w", 1.0),
        ("decoder.block.0.w", 0.0),
        ("decoder.block.1.w", 0.5),
        ("decoder.block.2.w", 1.0),
    ] {
        for ((got, x), y) in merged.values(name).iter().zip(World::of(&a, name)).zip(World::of(&b, name)) {
            // Three f32 operations on values below 2.
            assert!((got - (x + weight * (y - x))).abs() <= 3.0 * 2.0 / f64::from(1 << 24), "{name}");
        }
    }
}

/// As in mergekit, a base that is none of the models is averaged with them, by the weight that is given for all.
#[test]
fn linear_counts_a_base_that_is_none_of_the_models() {
    let scratch = Scratch::new();
    for (name, value) in [("base", 8.0), ("a", 1.0), ("b", 3.0)] {
        scratch.model(name, &[Tensor::f32("w", &[2, 3], &[value; 6])]);
    }
    let config = "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: b}]\n";
    let of = |more: &str, out: &str| scratch.merge(&format!("{config}{more}"), out, &[]).values("w")[0];
    assert_eq!(of("parameters: {weight: 0.5}\n", "all"), 4.0);
    // No weight for it: it gives names and dtypes only.
    assert_eq!(of("", "none"), 2.0);
    let listed = "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: base}]\nparameters: {weight: 1}\n";
    assert_eq!(scratch.merge(listed, "listed", &[]).values("w")[0], 4.5);
}
