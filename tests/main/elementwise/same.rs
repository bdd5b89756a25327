//! Bytes that must not change: threads, memory, I/O, shards.

use super::World;
use crate::util::{Merged, Random, Scratch, Tensor};

const HEADS: [&str; 9] = [
    "merge_method: ties\nbase_model: base\nparameters: { weight: 1, density: 0.3 }",
    "merge_method: ties\nbase_model: base\nparameters: { weight: 1, density: 0.3, scope: model }",
    "merge_method: dare_ties\nbase_model: base\nparameters: { weight: 1, density: 0.3 }",
    "merge_method: della\nbase_model: base\nparameters: { weight: 1, density: 0.4 }",
    "merge_method: breadcrumbs\nbase_model: base\nparameters: { weight: 1, density: 0.4, gamma: 0.1, rescale: true }",
    "merge_method: sce\nbase_model: base\nparameters: { select_topk: 0.3 }",
    "merge_method: nuslerp\nbase_model: base\nparameters: { weight: 1, nuslerp_flatten: false, nuslerp_row_wise: true }",
    "merge_method: karcher\nbase_model: base",
    "merge_method: pcb\nbase_model: base",
];

fn assert_same(a: &Merged, b: &Merged, what: &str) {
    assert_eq!(a.tensors.keys().collect::<Vec<_>>(), b.tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &a.tensors {
        assert!(tensor.bytes == b.tensors[name].bytes, "{what}: {name} differs");
    }
}

#[test]
fn a_tensor_that_all_threads_share() {
    // More than 4 Mi elements run on all threads; bf16 has many equal magnitudes.
    let shape = [2053, 2049];
    let mut random = Random::new(21);
    let scratch = Scratch::new();
    let tensors = |random: &mut Random| {
        [
            Tensor::random("large.weight", "BF16", &shape, random),
            Tensor::random("b.weight", "BF16", &[40, 30], random),
        ]
    };
    for name in ["base", "m0", "m1"] {
        scratch.model(name, &tensors(&mut random));
    }
    for (k, head) in HEADS.iter().enumerate() {
        let config = World::config(head, &["", ""]);
        let one = scratch.merge(&config, &format!("one-{k}"), &["--threads", "1"]);
        let least = scratch.plan(&config, &["--threads", "3"])["least_memory_bytes"].to_string();
        let flags = ["--threads", "3", "--max-memory", &least, "--io", "pread"];
        let three = scratch.merge(&config, &format!("three-{k}"), &flags);
        assert_same(&one, &three, head);
        let peak = three.report["peak_anonymous_bytes"].as_u64().expect("measured");
        assert!(peak <= least.parse().expect("a number"), "{head}: {peak} held, {least} planned");
    }
}

#[test]
fn shards_do_not_matter() {
    for dtype in ["F32", "BF16"] {
        let world = World::new(dtype, 22);
        for (k, model) in world.models.iter().enumerate() {
            world.scratch.sharded_model(&format!("sharded/m{k}"), model, 3);
        }
        world.scratch.model("sharded/base", &world.base);
        for (k, head) in HEADS.iter().enumerate() {
            let plain = world.scratch.merge(&World::config(head, &["", ""]), &format!("plain-{k}"), &[]);
            let config = World::config(head, &["", ""]).replace("model: m", "model: sharded/m");
            let config = config.replace("base_model: base", "base_model: sharded/base");
            let flags = ["--out-shard-size", "100000"];
            let sharded = world.scratch.merge(&config, &format!("sharded-{k}"), &flags);
            assert_same(&plain, &sharded, head);
        }
    }
}

/// Sums that go straight from stored bytes to stored bytes, and those of models that are stored differently.
#[test]
fn how_models_are_stored_does_not_matter() {
    const HEADS: [&str; 10] = [
        "merge_method: linear\nparameters: { weight: 0.7 }",
        "merge_method: linear\nparameters: { weight: 0.7, normalize: false }",
        "merge_method: task_arithmetic\nbase_model: base\nparameters: { weight: 0.7, lambda: 0.9 }",
        "merge_method: slerp\nbase_model: m0\nparameters: { t: 0.3 }",
        "merge_method: nuslerp\nparameters: { weight: 1 }",
        "merge_method: nuslerp\nbase_model: base\nparameters: { weight: 1 }",
        "merge_method: multislerp\nparameters: { weight: 1 }",
        "merge_method: multislerp\nbase_model: base\nparameters: { weight: 1 }",
        "merge_method: karcher\nbase_model: base",
        "merge_method: model_stock\nbase_model: base",
    ];
    let world = World::new("BF16", 23);
    // The same values in another dtype: one model is no longer stored like the rest.
    let wide: Vec<Tensor> =
        world.models[1].iter().map(|t| Tensor::new(&t.name, "F32", &t.shape, &t.values())).collect();
    world.scratch.model("wide", &wide);
    for out in ["float32", "bfloat16", "float16"] {
        for (k, head) in HEADS.iter().enumerate() {
            let config = World::config(&format!("{head}\ndtype: float32\nout_dtype: {out}"), &["", ""]);
            let alike = world.scratch.merge(&config, &format!("alike-{out}-{k}"), &[]);
            let pread = world.scratch.merge(&config, &format!("pread-{out}-{k}"), &["--io", "pread"]);
            assert_same(&alike, &pread, head);
            let mixed = config.replace("model: m1", "model: wide");
            let mixed = world.scratch.merge(&mixed, &format!("mixed-{out}-{k}"), &[]);
            assert_same(&alike, &mixed, head);
        }
    }
}
