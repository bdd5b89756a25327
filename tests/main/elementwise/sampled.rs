//! Tensors so large that a sample tells where a threshold lies: the same as by sorting, in fewer reads.

use super::World;
use super::oracle::{self, deltas};
use crate::outputs::HALF_ULP;
use crate::util::{Random, Scratch, Tensor};

const SHAPE: [usize; 2] = [1031, 1024];

/// A base and two models whose rows differ in scale; `coarse` ones have few distinct differences.
fn world(dtype: &'static str, coarse: bool) -> (Scratch, Vec<f64>, Vec<Vec<f64>>) {
    let mut random = Random::new(5);
    let scratch = Scratch::new();
    let name = "a.weight";
    let base = Tensor::random(name, dtype, &SHAPE, &mut random);
    scratch.model("base", std::slice::from_ref(&base));
    let mut models = Vec::new();
    for k in 0..2 {
        let mut change = |at: usize| {
            let scale = 1.0 + 0.1 * (at / SHAPE[1] % 7) as f64;
            let change = scale * (random.uniform() + random.uniform()) / 8.0;
            if coarse { (change * 32.0).round() / 32.0 } else { change }
        };
        let values: Vec<f64> = base.values().iter().enumerate().map(|(at, v)| v + change(at)).collect();
        let model = Tensor::new(name, dtype, &SHAPE, &values);
        models.push(model.values());
        scratch.model(&format!("m{k}"), &[model]);
    }
    (scratch, base.values(), models)
}

#[test]
fn a_sample_changes_nothing_but_the_reads() {
    let weights = [1.0, 0.75];
    type Trim = fn(&[f64]) -> Vec<f64>;
    let cases: [(&str, &str, Trim, bool); 4] = [
        ("ties", "density: 0.4", |d| oracle::largest(d, 0.4), false),
        ("ties", "density: 0.15, rescale: l1", |d| oracle::largest(d, 0.15), true),
        ("breadcrumbs_ties", "density: 0.5, gamma: 0.2", |d| oracle::without_outliers(d, 0.5, 0.2), false),
        (
            "breadcrumbs_ties",
            "density: 0.6, gamma: 0.1, rescale: true",
            |d| oracle::without_outliers(d, 0.6, 0.1),
            true,
        ),
    ];
    for (dtype, coarse) in [("BF16", false), ("BF16", true), ("F32", true), ("F32", false)] {
        let (scratch, base, models) = world(dtype, coarse);
        let whole = deltas(&base, &models);
        let bytes = (SHAPE[0] * SHAPE[1] * if dtype == "F32" { 4 } else { 2 } * 3) as u64;
        for (k, (method, parameters, trim, rescale)) in cases.iter().enumerate() {
            let head = format!(
                "merge_method: {method}\nbase_model: base\nparameters: {{ normalize: false, {parameters} }}"
            );
            let merged = scratch.merge(
                &World::config(&head, &["weight: 1", "weight: 0.75"]),
                &format!("out-{k}"),
                &[],
            );
            let trimmed: Vec<Vec<f64>> = whole
                .iter()
                .map(|d| if *rescale { oracle::rescaled(&trim(d), d) } else { trim(d) })
                .collect();
            let expected = oracle::consensus(&base, &trimmed, &weights, false, 1.0);
            for (at, (got, want)) in merged.values("a.weight").iter().zip(&expected).enumerate() {
                // Some twenty roundings of values below 4, and the one of storing them.
                let stored = if dtype == "BF16" { want.abs() / 256.0 + 1e-5 } else { 0.0 };
                let bound = 160.0 * HALF_ULP + stored;
                assert!((got - want).abs() <= bound, "{dtype} {coarse} {head} [{at}]: {got}, not {want}");
            }
            // Norms cost no read. Differences of f32 values have no bits to spare, and the rows' scales make the
            // sample's brackets wide: then there are two reads before the merge.
            let read = merged.report["bytes_read"].as_u64().expect("a number");
            let most = if dtype == "F32" && !coarse { 3.1 } else { 2.1 };
            assert!(read as f64 <= most * bytes as f64, "{dtype} {coarse} {head}: {read} of {bytes}");
            assert!(read >= 2 * bytes);
        }
    }
}
