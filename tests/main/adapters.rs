//! PEFT adapters, against dense products written out here.

use serde_json::{Value, json};

use crate::util::{Random, Scratch, Tensor};

const OUT: usize = 6;
const IN: usize = 4;
const RANK: usize = 3;
const Q: &str = "model.layers.0.self_attn.q_proj";
const V: &str = "model.layers.1.self_attn.v_proj";

fn matrix(name: &str, rows: usize, columns: usize, random: &mut Random) -> Tensor {
    Tensor::random(name, "F32", &[rows, columns], random)
}

fn weight(module: &str) -> String {
    format!("{module}.weight")
}

fn factors(module: &str, rank: usize, random: &mut Random) -> [Tensor; 2] {
    [
        matrix(&format!("base_model.model.{module}.lora_A.weight"), rank, IN, random),
        matrix(&format!("base_model.model.{module}.lora_B.weight"), OUT, rank, random),
    ]
}

/// `scale · B·A` in f64.
fn product(a: &Tensor, b: &Tensor, scale: f64) -> Vec<f64> {
    let (rank, columns, rows) = (a.shape[0], a.shape[1], b.shape[0]);
    let (a, b) = (a.values(), b.values());
    let mut out = vec![0.0; rows * columns];
    for i in 0..rows {
        for j in 0..columns {
            out[i * columns + j] =
                scale * (0..rank).map(|k| b[i * rank + k] * a[k * columns + j]).sum::<f64>();
        }
    }
    out
}

fn transposed(values: &[f64], columns: usize) -> Vec<f64> {
    let rows = values.len() / columns;
    (0..columns).flat_map(|j| (0..rows).map(move |i| values[i * columns + j])).collect()
}

/// Values are below 1 and factors of rank 3 are scaled by less than 8: sums below 32, some 10 f32 operations.
fn close(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= 10.0 * 32.0 / f64::from(1 << 24), "{got} {expected}");
    }
}

fn added(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

struct World {
    scratch: Scratch,
    base: Vec<Tensor>,
    factors: Vec<Tensor>,
}

impl World {
    fn new() -> Self {
        let mut random = Random::new(5);
        let base = vec![
            matrix("model.embed_tokens.weight", 7, IN, &mut random),
            matrix(&weight(Q), OUT, IN, &mut random),
            matrix(&weight(V), OUT, IN, &mut random),
            Tensor::random("model.norm.weight", "F32", &[IN], &mut random),
        ];
        let factors = [factors(Q, RANK, &mut random), factors(V, RANK, &mut random)].concat();
        let world = Self { scratch: Scratch::new(), base, factors };
        world.scratch.model("base", &world.base);
        world
    }

    fn base(&self, name: &str) -> Vec<f64> {
        self.base.iter().find(|t| t.name == name).expect("in the base").values()
    }

    fn adapter(&self, name: &str, tensors: &[Tensor], settings: Value) {
        let mut config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_dora": false});
        for (key, value) in settings.as_object().expect("an object") {
            config[key] = value.clone();
        }
        self.scratch.write(format!("{name}/adapter_config.json"), config.to_string());
        self.scratch
            .write(format!("{name}/adapter_model.safetensors"), crate::util::safetensors(tensors, &[]));
    }

    fn config(adapter: &str) -> String {
        format!("merge_method: linear\nmodels: [{{model: base+{adapter}}}]\n")
    }
}

#[test]
fn an_adapter_is_added_to_its_base() {
    let world = World::new();
    let f = &world.factors;
    world.adapter("plain", f, json!({}));
    world.adapter("rslora", f, json!({"use_rslora": true}));
    world.adapter("patterns", f, json!({"alpha_pattern": {"v_proj": 12}, "rank_pattern": {"q_proj": 3}}));
    world.adapter("regex", f, json!({"alpha_pattern": {r"layers\.[1-9]\d*\..*_proj": 12}}));
    let rank = RANK as f64;
    for (name, of_q, of_v) in [
        ("plain", 6.0 / rank, 6.0 / rank),
        ("rslora", 6.0 / rank.sqrt(), 6.0 / rank.sqrt()),
        ("patterns", 6.0 / rank, 12.0 / rank),
        ("regex", 6.0 / rank, 12.0 / rank),
    ] {
        let merged = world.scratch.merge(&World::config(name), &format!("{name}-0"), &[]);
        for (module, factors, scale) in [(Q, &f[..2], of_q), (V, &f[2..], of_v)] {
            let expected = added(&world.base(&weight(module)), &product(&factors[0], &factors[1], scale));
            close(&merged.values(&weight(module)), &expected);
        }
        assert_eq!(merged.values("model.norm.weight"), world.base("model.norm.weight"));
        // The same bytes by reads and one thread, and for the mapping's form.
        let other = world.scratch.merge(
            &World::config(name),
            &format!("{name}-1"),
            &["--threads", "1", "--io", "pread"],
        );
        assert_eq!(merged.tensors, other.tensors);
        let form =
            format!("merge_method: linear\nmodels: [{{model: {{model: {{path: base}}, lora: {name}}}}}]\n");
        assert_eq!(merged.tensors, world.scratch.merge(&form, &format!("{name}-2"), &[]).tensors);
    }
}

#[test]
fn adapters_are_merged_with_their_base_as_task_vectors() {
    let world = World::new();
    let f = &world.factors;
    world.adapter("one", &f[..2], json!({}));
    world.adapter("two", f, json!({"lora_alpha": 3}));
    let config = "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 0.5}\n\
        models: [{model: base+one}, {model: base+two}]\n";
    let merged = world.scratch.merge(config, "out", &[]);
    let both = added(&product(&f[0], &f[1], 0.5 * 2.0), &product(&f[0], &f[1], 0.5));
    close(&merged.values(&weight(Q)), &added(&world.base(&weight(Q)), &both));
    close(&merged.values(&weight(V)), &added(&world.base(&weight(V)), &product(&f[2], &f[3], 0.5)));
    assert_eq!(merged.report["inputs"].as_array().expect("a list").len(), 3);
}

#[test]
fn large_weights_are_added_to_by_tiles() {
    // More than a piece of 16 Ki elements, rows that straddle pieces, several chunks of columns.
    let (rows, columns, rank) = (40, 1500, 5);
    let mut random = Random::new(8);
    let scratch = Scratch::new();
    let base = matrix("h.0.w.weight", rows, columns, &mut random);
    let a = matrix("base_model.model.h.0.w.lora_A.weight", rank, columns, &mut random);
    let b = matrix("base_model.model.h.0.w.lora_B.weight", rows, rank, &mut random);
    scratch.model("base", std::slice::from_ref(&base));
    scratch.write("l/adapter_config.json", r#"{"peft_type": "LORA", "r": 5, "lora_alpha": 5}"#);
    scratch.write("l/adapter_model.safetensors", crate::util::safetensors(&[a.clone(), b.clone()], &[]));
    let merged = scratch.merge(&World::config("l"), "out", &[]);
    close(&merged.values("h.0.w.weight"), &added(&base.values(), &product(&a, &b, 1.0)));
    let plan = scratch.plan(&World::config("l"), &[]);
    let block = &plan["blocks"][0];
    // The factors, and the hashes of the output's pieces.
    let hashes = 33 * (4 * rows * columns / (64 << 10));
    assert_eq!(block["memory_bytes"], 4 * rank * (rows + columns) + hashes);
    assert_eq!(block["bytes_read"], 4 * (rows * columns + rank * (rows + columns)));
    assert_eq!(merged.parameter("h.0.w.weight")["bytes_read"], block["bytes_read"]);
}

#[test]
fn weights_stored_as_in_times_out() {
    let mut random = Random::new(21);
    let scratch = Scratch::new();
    // GPT-2's Conv1D, a square one, and an embedding; the checkpoint lacks the wrapper's `transformer.`.
    let base = [
        matrix("h.0.attn.c_attn.weight", IN, OUT, &mut random),
        matrix("h.0.attn.c_proj.weight", IN, IN, &mut random),
        matrix("wte.weight", 9, IN, &mut random),
    ];
    let prefix = "base_model.model.transformer";
    let f = [
        matrix(&format!("{prefix}.h.0.attn.c_attn.lora_A.weight"), RANK, IN, &mut random),
        matrix(&format!("{prefix}.h.0.attn.c_attn.lora_B.weight"), OUT, RANK, &mut random),
        matrix(&format!("{prefix}.h.0.attn.c_proj.lora_A.weight"), RANK, IN, &mut random),
        matrix(&format!("{prefix}.h.0.attn.c_proj.lora_B.weight"), IN, RANK, &mut random),
        matrix(&format!("{prefix}.wte.lora_embedding_A"), RANK, 9, &mut random),
        matrix(&format!("{prefix}.wte.lora_embedding_B"), IN, RANK, &mut random),
    ];
    scratch.model("base", &base);
    let config = |turned: bool| {
        format!(r#"{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": {RANK}, "fan_in_fan_out": {turned}}}"#)
    };
    scratch.write("l/adapter_config.json", config(true));
    scratch.write("l/adapter_model.safetensors", crate::util::safetensors(&f, &[]));
    let merged = scratch.merge(&World::config("l"), "out", &[]);
    for (k, (name, columns)) in
        [("h.0.attn.c_attn.weight", IN), ("h.0.attn.c_proj.weight", IN), ("wte.weight", 9)]
            .into_iter()
            .enumerate()
    {
        let delta = transposed(&product(&f[2 * k], &f[2 * k + 1], 1.0), columns);
        close(&merged.values(name), &added(&base[k].values(), &delta));
    }
    // Shapes contradict the setting, and the square weight depends on it.
    scratch.write("l/adapter_config.json", config(false));
    scratch.refuse_unread(&World::config("l"), &["c_attn.lora_A", "fan_in_fan_out: false"]);
}

#[test]
fn saved_modules_stand_in_for_the_bases() {
    let world = World::new();
    let mut random = Random::new(2);
    let mut tensors = world.factors.clone();
    let norm =
        Tensor::random("base_model.model.model.norm.modules_to_save.weight", "F32", &[IN], &mut random);
    tensors.push(norm.clone());
    world.adapter("saved", &tensors, json!({"modules_to_save": ["norm"]}));
    let merged = world.scratch.merge(&World::config("saved"), "out", &[]);
    assert_eq!(merged.values("model.norm.weight"), norm.values());
}

#[test]
fn what_is_no_plain_adapter_is_refused_by_name() {
    let world = World::new();
    let refuse = |tensors: &[Tensor], settings: Value, words: &[&str]| {
        world.adapter("bad", tensors, settings);
        world.scratch.refuse_unread(&World::config("bad"), words);
    };
    let f = &world.factors;
    refuse(f, json!({"use_dora": true}), &["adapter_config.json", "DoRA", "merge_and_unload"]);
    refuse(f, json!({"peft_type": "LOHA"}), &["`peft_type: LOHA`"]);
    refuse(f, json!({"peft_type": null}), &["`peft_type` is not what PEFT writes (got `null`"]);
    refuse(f, json!({"init_lora_weights": "pissa_niter_4"}), &["`init_lora_weights: pissa_niter_4`"]);
    refuse(f, json!({"layer_replication": [[0, 2]]}), &["`layer_replication`"]);
    refuse(f, json!({"lora_bias": true}), &["`lora_bias: true`"]);
    refuse(f, json!({"r": 0}), &["`r` is not what PEFT writes (got `0`, expected an integer of at least 1)"]);
    refuse(f, json!({"lora_alpha": "x"}), &["`lora_alpha`"]);
    refuse(f, json!({"alpha_pattern": {"(": 1}}), &["`alpha_pattern`"]);
    refuse(&f[..1], json!({}), &["q_proj.lora_A.weight", "other factor is missing"]);
    refuse(&[], json!({}), &["no adapter here"]);
    let renamed = |from: &str, to: &str| -> Vec<Tensor> {
        f.iter().map(|t| t.renamed(&t.name.replace(from, to))).collect()
    };
    refuse(
        &renamed("q_proj", "k_proj"),
        json!({}),
        &["changes `model.layers.0.self_attn.k_proj.weight`, which", "lacks"],
    );
    refuse(&renamed("lora_B.weight", "lora_magnitude_vector"), json!({}), &["DoRA"]);
    refuse(&renamed("lora_A.weight", "hada_w1_a"), json!({}), &["hada_"]);
    let wide = Tensor::f32(&f[0].name, &[RANK, IN + 1], &[0.5; RANK * (IN + 1)]);
    refuse(&[wide, f[1].clone()], json!({}), &["do not make a change of", "[3, 5]", "[6, 3]", "[6, 4]"]);
    std::fs::remove_file(world.scratch.join("bad/adapter_model.safetensors")).expect("remove");
    world.scratch.write("bad/adapter_model.bin", b"pickle");
    world.scratch.refuse_unread(&World::config("bad"), &["pickled weights", "adapter_model.safetensors"]);
    world.scratch.refuse_unread(&World::config("none"), &["adapter_config.json"]);
}

/// A and B, and the weight of each.
type Weighed<'t> = (&'t [Tensor], f64, f64);

/// `(Σ bᵢBᵢ)·(Σ aᵢAᵢ)` in f64.
fn summed_product(terms: &[Weighed<'_>]) -> Vec<f64> {
    let sum = |place: usize, weight: &dyn Fn(&Weighed<'_>) -> f64| {
        let mut total = vec![0.0; terms[0].0[place].values().len()];
        for term in terms {
            for (t, v) in total.iter_mut().zip(term.0[place].values()) {
                *t += weight(term) * v;
            }
        }
        Tensor::new("", "F64", &terms[0].0[place].shape, &total)
    };
    product(&sum(0, &|term| term.2), &sum(1, &|term| term.1), 1.0)
}

fn scaled(values: &[f64], by: f64) -> Vec<f64> {
    values.iter().map(|v| v * by).collect()
}

#[test]
fn factors_are_merged_side_by_side_where_that_is_asked_for() {
    let world = World::new();
    let mut random = Random::new(6);
    let f = &world.factors;
    let g = [factors(Q, RANK, &mut random), factors(V, RANK, &mut random)].concat();
    world.adapter("f", f, json!({}));
    // Scale 4 instead of 2, and it changes only Q.
    world.adapter("g", &g[..2], json!({"lora_alpha": 12}));
    let models = "models:\n  - { model: base+f, parameters: { weight: 3 } }\n  - { model: base+g, parameters: { weight: 1 } }\n";
    let q = world.base(&weight(Q));
    let v = world.base(&weight(V));
    let linear = format!("merge_method: linear\nparameters: {{ space: factor }}\n{models}");
    let merged = world.scratch.merge(&linear, "linear", &[]);
    let of_q = summed_product(&[(&f[..2], 3.0 * 2.0 / 4.0, 0.75), (&g[..2], 4.0 / 4.0, 0.25)]);
    close(&merged.values(&weight(Q)), &added(&q, &of_q));
    // Only one adapter changes V: its A is the mean, and the other's B is 0.
    close(&merged.values(&weight(V)), &added(&v, &product(&f[2], &f[3], 2.0 * 0.75)));
    assert_eq!(merged.values("model.norm.weight"), world.base("model.norm.weight"));
    let inputs = merged.report["inputs"].as_array().expect("a list");
    assert_eq!(inputs.len(), 2, "what is opened, once: {inputs:?}");
    let plan = world.scratch.plan(&linear, &[]);
    assert_eq!(plan["bytes_read"], merged.report["bytes_read"]);

    let sum = "merge_method: linear\nparameters: { space: factor, normalize: false }\n";
    let merged = world.scratch.merge(&format!("{sum}{models}"), "sum", &[]);
    let of_q = summed_product(&[(&f[..2], 3.0 * 2.0, 0.75), (&g[..2], 4.0, 0.25)]);
    close(&merged.values(&weight(Q)), &added(&scaled(&q, 4.0), &of_q));

    let arithmetic =
        "merge_method: task_arithmetic\nbase_model: base\nparameters: { space: factor, lambda: 0.5 }\n";
    let merged = world.scratch.merge(&format!("{arithmetic}{models}"), "arithmetic", &[]);
    close(&merged.values(&weight(Q)), &added(&q, &scaled(&of_q, 0.5)));
    close(&merged.values(&weight(V)), &added(&v, &product(&f[2], &f[3], 3.0)));

    // Linearised adapters start from one A: then both spaces are one, and `filter` may choose.
    let mut same = g[..2].to_vec();
    same[0] = f[0].renamed(&same[0].name);
    world.adapter("same", &same, json!({}));
    let config = |space: &str| {
        format!(
            "merge_method: task_arithmetic\nbase_model: base\nparameters: {{ space: {space} }}\nmodels:\n  \
             - {{ model: base+f, parameters: {{ weight: 0.4 }} }}\n  - {{ model: base+same, parameters: {{ weight: 0.7 }} }}\n"
        )
    };
    let delta = world.scratch.merge(&config("delta"), "delta", &[]);
    let factor = world.scratch.merge(&config("factor"), "factor", &[]);
    let some = world.scratch.merge(
        &config("[{ filter: self_attn.q_proj, value: factor }, { value: delta }]"),
        "some",
        &["--threads", "1", "--io", "pread"],
    );
    close(&factor.values(&weight(Q)), &delta.values(&weight(Q)));
    assert!(some.tensor(&weight(Q)).bytes == factor.tensor(&weight(Q)).bytes);
    assert!(some.tensor(&weight(V)).bytes == delta.tensor(&weight(V)).bytes);
}

#[test]
fn factors_that_do_not_go_together_are_refused() {
    let world = World::new();
    let mut random = Random::new(8);
    world.adapter("f", &world.factors, json!({}));
    world.adapter("thin", &factors(Q, 2, &mut random), json!({"r": 2}));
    world.scratch.model("other", &world.base);
    let config = |head: &str, models: &[&str]| {
        let models: Vec<String> = models.iter().map(|m| format!("  - model: {m}\n")).collect();
        format!("{head}\nmodels:\n{}", models.concat())
    };
    let linear = "merge_method: linear\nparameters: { space: factor }";
    let refuse = |config: &str, words: &[&str]| world.scratch.refuse_unread(config, words);
    refuse(
        &config(linear, &["base+f", "base+thin"]),
        &["q_proj", "one rank", "`base+thin` has 2", "`delta`"],
    );
    refuse(&config(linear, &["base+f", "other+f"]), &["parameters.space", "one base", "`other+f`"]);
    refuse(&config(linear, &["base", "base"]), &["parameters.space", "no model is `base+adapter`"]);
    let word = "merge_method: linear\nparameters: { space: tensor }";
    refuse(&config(word, &["base+f"]), &["`tensor`", "delta, factor"]);
    let ties = "merge_method: ties\nbase_model: base\nparameters: { weight: 1, space: factor }";
    refuse(&config(ties, &["base+f"]), &["space"]);
    let slices = "merge_method: linear\nparameters: { space: factor }\nslices:\n  - sources:\n    - { model: base+f, layer_range: [0, 1] }\n";
    refuse(slices, &["parameters.space", "`slices` and `modules`"]);
    let sweep = config(
        "merge_method: linear\nparameters: { space: factor }\nsweep: { parameters.weight: [1, 2] }",
        &["base+f"],
    );
    refuse(&sweep, &["parameters.space", "`sweep`"]);
    let zero = "merge_method: linear\nparameters: { space: factor, normalize: false }\nmodels:\n  - { model: base+f, \
                parameters: { weight: 1 } }\n  - { model: base+f, parameters: { weight: -1 } }\n";
    refuse(zero, &["q_proj", "sum to 0"]);
    let adapted = "merge_method: task_arithmetic\nbase_model: base+f\nparameters: { space: factor }";
    refuse(&config(adapted, &["base+thin"]), &["base_model without an adapter"]);
}
