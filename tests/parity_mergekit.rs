//! Every deterministic method against mergekit 0.1.5 itself: `fixtures/mergekit/make_goldens.py` ran it on the configs that
//! are merged here, unchanged. Random methods have no goldens; `tests/main/elementwise` tests their statistics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use mats_stream::plan::Limits;
use mats_stream::read::{Checkpoint, Dtype, IoMode, decode_f64};
use mats_stream::report::ProgressMode;
use mats_stream::run::{MergeOptions, merge};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/mergekit")
}

fn options(threads: usize) -> MergeOptions {
    MergeOptions {
        limits: Limits { max_memory: 1 << 30, threads, shard_bytes: u64::MAX, untie: false },
        io: IoMode::Mmap,
        refuse_nonfinite: true,
        seed: 0,
        resume: false,
        progress: ProgressMode::None,
    }
}

/// Tensors by name: dtype and values.
fn values(path: &Path) -> BTreeMap<String, (Dtype, Vec<f64>)> {
    let checkpoint = Checkpoint::open(path, IoMode::Mmap).unwrap();
    let mut scratch = Vec::new();
    checkpoint
        .tensors()
        .iter()
        .map(|t| {
            let mut out = vec![0.0; t.elements() as usize];
            decode_f64(t.dtype, checkpoint.read(t, 0..t.bytes, &mut scratch).unwrap(), &mut out).unwrap();
            (t.name.clone(), (t.dtype, out))
        })
        .collect()
}

/// Cases by name, from the configs in `cases`.
fn cases() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixtures().join("cases"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.strip_suffix(".yml").expect("only configs").to_owned())
        .collect();
    names.sort();
    names
}

/// Half a unit in the last place of values of this size.
fn half_ulp(dtype: Dtype, size: f64) -> f64 {
    let bits = if dtype == Dtype::Bf16 { 8 } else { 24 };
    2f64.powi(size.max(f64::MIN_POSITIVE).log2().floor() as i32 - bits)
}

/// For each element of each tensor, whether a selection by size may as well have taken another: its task vector has the
/// magnitude of another element's in some model, or its variance over the models is another's. PyTorch's sort leaves open
/// which of equal values comes first (and its vectorised kernels make use of that); mats-stream takes the first.
fn tied(suffix: &str) -> BTreeMap<String, Vec<bool>> {
    let model = |name: &str| values(&fixtures().join(format!("models/{name}{suffix}")));
    let (base, tuned) = (model("base"), ["a", "b", "c"].map(model));
    base.iter()
        .map(|(name, (_, base))| {
            let deltas = tuned.each_ref().map(|m| {
                let values = m[name].1.iter().zip(base);
                values.map(|(x, b)| *x as f32 - *b as f32).collect::<Vec<f32>>()
            });
            let variance = |k: usize| {
                let mean = deltas.iter().map(|d| f64::from(d[k])).sum::<f64>() / 3.0;
                (deltas.iter().map(|d| (f64::from(d[k]) - mean).powi(2)).sum::<f64>() / 3.0) as f32
            };
            let twice = |k: usize| {
                (0..base.len()).filter(|other| *other != k).any(|other| {
                    deltas.iter().any(|d| d[k] != 0.0 && d[k].abs() == d[other].abs())
                        || (variance(k) != 0.0 && variance(k) == variance(other))
                })
            };
            (name.clone(), (0..base.len()).map(twice).collect())
        })
        .collect()
}

/// Methods that select by size.
fn selects(case: &str) -> bool {
    let case = case.strip_prefix("stack-").unwrap_or(case);
    ["ties", "breadcrumbs", "sce"].iter().any(|method| case.starts_with(method))
}

#[test]
fn every_case_gives_what_mergekit_gave() {
    let goldens = values(&fixtures().join("goldens.safetensors"));
    let mut compared = 0;
    let mut failures = Vec::new();
    let (ties, ties_bf16) = (tied(""), tied("-bf16"));
    let mut open = 0;
    for case in cases() {
        let ties = if case.ends_with("-bf16") { &ties_bf16 } else { &ties };
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        merge(&fixtures().join(format!("cases/{case}.yml")), &out, &options(2), &AtomicBool::new(false))
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        let merged = values(&out);
        let prefix = format!("{case}/");
        let expected: Vec<_> = goldens.iter().filter(|(name, _)| name.starts_with(&prefix)).collect();
        assert_eq!(merged.len(), expected.len(), "{case}: the same tensors");
        for (name, (dtype, want)) in expected {
            let (got_dtype, got) = &merged[&name[prefix.len()..]];
            assert_eq!(got_dtype, dtype, "{name}");
            let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for (k, (got, want)) in got.iter().zip(want).enumerate() {
                // Both sides compute in f32, in different orders: at most three models, so a dozen roundings of values no
                // larger than twice the largest result, and coefficients (angles, norms) that one side has in f32 with a
                // relative error of a few units. Rounding to bf16 may then fall to the other side: one unit.
                let noise = 32.0 * half_ulp(Dtype::F32, largest);
                let bound =
                    noise + if *dtype == Dtype::Bf16 { 2.0 * half_ulp(Dtype::Bf16, want.abs()) } else { 0.0 };
                let same = (got - want).abs() <= bound;
                if !same && selects(&case) && ties[&name[prefix.len()..]][k] {
                    open += 1;
                } else if !same {
                    failures.push(format!(
                        "{name}[{k}]: {got} instead of {want}, off by {:.1e} > {bound:.1e}",
                        got - want
                    ));
                }
                compared += 1;
            }
        }
    }
    let shown: Vec<_> = failures.iter().take(40).cloned().collect();
    assert!(failures.is_empty(), "{} of {compared} values:\n{}", failures.len(), shown.join("\n"));
    assert!(compared > 100_000, "{compared}");
    // `v_proj` differs from the base by multiples of 1/16 to be tied on purpose, bf16 by chance.
    assert!(open * 100 < compared, "{open} of {compared}");
}

#[test]
fn bf16_without_a_dtype_is_computed_in_f32_all_the_same() {
    for case in ["linear-plain-bf16", "slerp-plain-bf16"] {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        merge(&fixtures().join(format!("cases/{case}.yml")), &out, &options(1), &AtomicBool::new(false))
            .unwrap();
        assert!(values(&out).values().all(|(dtype, _)| *dtype == Dtype::Bf16), "{case}");
    }
}
