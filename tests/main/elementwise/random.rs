//! Methods that drop at random: rates, expectation, independence, and that nothing but seed, model, tensor and element
//! enters.

use super::{TENSORS, World};
use crate::util::{Random, Scratch, Tensor};

const LARGE: &str = TENSORS[1].0;

/// Merged minus base.
fn change(world: &World, merged: &crate::util::Merged, name: &str) -> Vec<f64> {
    merged.values(name).iter().zip(world.values(name).0).map(|(m, b)| m - b).collect()
}

fn one(head: &str, parameters: &str) -> String {
    World::config(&format!("{head}\nbase_model: base"), &[parameters])
}

#[test]
fn dare_keeps_its_share_and_its_expectation() {
    let world = World::new("F32", 11);
    let (base, models) = world.values(LARGE);
    let delta: Vec<f64> = models[0].iter().zip(&base).map(|(x, b)| x - b).collect();
    for density in [0.1, 0.5, 0.9] {
        let rescale = "merge_method: dare_linear\nparameters: { rescale: inverse_probability }";
        let config = one(rescale, &format!("weight: 1, density: {density}"));
        let merged = world.scratch.merge(&config, &format!("paper-{density}"), &[]);
        let got = change(&world, &merged, LARGE);
        let moved = delta.iter().filter(|d| **d != 0.0).count() as f64;
        let kept = got.iter().filter(|d| **d != 0.0).count() as f64;
        // Six standard deviations of a binomial.
        let bound = 6.0 * (moved * density * (1.0 - density)).sqrt();
        assert!((kept - moved * density).abs() < bound, "{density}: {kept} of {moved}");
        for (got, d) in got.iter().zip(&delta) {
            assert!(
                *got == 0.0 || (got - d / density).abs() < 1e-6 / density,
                "scaled by 1/density: {got} {d}"
            );
        }
        // The expectation of the sum is the sum; its variance is Σd²(1-p)/p.
        let deviation = (delta.iter().map(|d| d * d).sum::<f64>() * (1.0 - density) / density).sqrt();
        let difference = got.iter().sum::<f64>() - delta.iter().sum::<f64>();
        assert!(difference.abs() < 6.0 * deviation, "{density}: {difference} against {deviation}");

        // mergekit's: the L1 norm of the tensor, whatever was drawn; the same mask.
        for (out, rescale) in [("l1", "rescale: l1"), ("true", "rescale: true"), ("default", "lambda: 1")] {
            let head = format!("merge_method: dare_linear\nparameters: {{ {rescale} }}");
            let config = one(&head, &format!("weight: 1, density: {density}"));
            let merged = world.scratch.merge(&config, &format!("{out}-{density}"), &[]);
            let scaled = change(&world, &merged, LARGE);
            let l1 = |v: &[f64]| v.iter().map(|x| x.abs()).sum::<f64>();
            assert!((l1(&scaled) / l1(&delta) - 1.0).abs() < 1e-5, "{out} {density}");
            assert!(scaled.iter().zip(&got).all(|(a, b)| (*a == 0.0) == (*b == 0.0)), "one mask");
        }
    }
}

#[test]
fn della_keeps_large_values_more_often() {
    let world = World::new("F32", 12);
    let (base, models) = world.values(LARGE);
    let delta: Vec<f64> = models[0].iter().zip(&base).map(|(x, b)| x - b).collect();
    let (density, epsilon) = (0.5, 0.3);
    let head = "merge_method: della_linear\nparameters: { rescale: false }";
    let merged = world.scratch.merge(&one(head, "weight: 1, density: 0.5, epsilon: 0.3"), "out", &[]);
    let got = change(&world, &merged, LARGE);
    // By place within its row: each fifth of the ranks has the mean probability of its ranks.
    let row = 211;
    let (mut kept, mut expected, mut variance) = ([0.0; 5], [0.0; 5], [0.0; 5]);
    for (got, delta) in got.chunks(row).zip(delta.chunks(row)) {
        let mut order: Vec<usize> = (0..row).collect();
        order.sort_by(|a, b| delta[*a].abs().total_cmp(&delta[*b].abs()));
        for (rank, k) in order.iter().enumerate() {
            // What is 0 anyway says nothing.
            if delta[*k] == 0.0 {
                continue;
            }
            let p = density - epsilon + 2.0 * epsilon * rank as f64 / (row - 1) as f64;
            let fifth = rank * 5 / row;
            kept[fifth] += f64::from(u8::from(got[*k] != 0.0));
            expected[fifth] += p;
            variance[fifth] += p * (1.0 - p);
        }
    }
    for fifth in 0..5 {
        let off = kept[fifth] - expected[fifth];
        assert!(
            off.abs() < 6.0 * variance[fifth].sqrt() + 1.0,
            "{fifth}: {} of {}",
            kept[fifth],
            expected[fifth]
        );
    }
    // The paper's scale: each by its own probability, so that sums keep their expectation.
    let head = "merge_method: della_linear\nparameters: { rescale: inverse_probability }";
    let merged = world.scratch.merge(&one(head, "weight: 1, density: 0.5, epsilon: 0.3"), "paper", &[]);
    let scaled = change(&world, &merged, LARGE);
    let deviation = (delta.iter().map(|d| d * d).sum::<f64>() * (1.0 / 0.2)).sqrt();
    assert!((scaled.iter().sum::<f64>() - delta.iter().sum::<f64>()).abs() < 6.0 * deviation);
    assert!(scaled.iter().zip(&got).all(|(a, b)| (*a == 0.0) == (*b == 0.0)), "one mask");
}

#[test]
fn masks_depend_on_seed_model_tensor_and_element_alone() {
    let mut random = Random::new(13);
    let n = 40_000;
    let zeros = vec![0.0; n];
    let ones = vec![1.0; n];
    let tensor = |name: &str, values: &[f64]| Tensor::f32(name, &[200, 200], values);
    let scratch = Scratch::new();
    let names = ["a.weight", "b.weight"];
    scratch.model("base", &names.map(|n| tensor(n, &zeros)));
    for model in ["m0", "m1"] {
        scratch.model(model, &names.map(|n| tensor(n, &ones)));
    }
    // A tensor more, and in another order.
    let more = [
        tensor("b.weight", &zeros),
        Tensor::random("0.weight", "F32", &[7, 9], &mut random),
        tensor("a.weight", &zeros),
    ];
    let changed = [tensor("b.weight", &ones), more[1].clone(), tensor("a.weight", &ones)];
    scratch.model("base-more", &more);
    scratch.model("m0-more", &changed);

    let config = |base: &str, models: &str| {
        format!(
            "merge_method: dare_linear\nbase_model: {base}\nparameters: {{ rescale: false }}\nmodels:\n{models}"
        )
    };
    let model = |name: &str, weight: f64| {
        format!("  - model: {name}\n    parameters: {{ weight: {weight}, density: 0.5 }}\n")
    };
    let both = config("base", &(model("m0", 1.0) + &model("m1", 2.0)));
    let merged = scratch.merge(&both, "both", &["--seed", "5"]);
    // 0 to 3: bit 0 is the first model's mask, bit 1 the second's.
    let bits = |merged: &crate::util::Merged, name: &str, bit: u32| -> Vec<bool> {
        merged.values(name).iter().map(|v| (*v as u32 >> bit) & 1 == 1).collect()
    };
    let masks = [
        bits(&merged, "a.weight", 0),
        bits(&merged, "a.weight", 1),
        bits(&merged, "b.weight", 0),
        bits(&merged, "b.weight", 1),
        bits(&scratch.merge(&both, "seed", &["--seed", "6"]), "a.weight", 0),
    ];
    for i in 0..masks.len() {
        let kept = masks[i].iter().filter(|b| **b).count() as f64;
        // Six standard deviations of n fair bits, here and below.
        assert!((kept - n as f64 / 2.0).abs() < 3.0 * (n as f64).sqrt(), "{i}: {kept}");
        for j in 0..i {
            let same = masks[i].iter().zip(&masks[j]).filter(|(a, b)| a == b).count() as f64;
            assert!((same - n as f64 / 2.0).abs() < 3.0 * (n as f64).sqrt(), "{i} {j}: {same}");
        }
    }
    let alone = scratch.merge(&config("base-more", &model("m0-more", 1.0)), "more", &["--seed", "5"]);
    assert_eq!(bits(&alone, "a.weight", 0), masks[0], "other tensors and models do not enter");
}
