use super::*;
use crate::inspect::inspect;
use crate::read::IoMode;
use crate::read::testing::{directory, file, write};
use crate::statistics::FORMAT;

/// diag(1, …, n) turned by a Householder reflection I - 2vvᵀ, so that nothing is sparse; F64, packed.
fn turned(n: usize) -> Vec<u8> {
    let v = 1.0 / (n as f64).sqrt();
    let sum = (n * (n + 1) / 2) as f64;
    let entry = |i: usize, j: usize| {
        let (di, dj) = ((i + 1) as f64, (j + 1) as f64);
        f64::from(u8::from(i == j)) * di - 2.0 * v * v * (di + dj) + 4.0 * v.powi(4) * sum
    };
    (0..n).flat_map(|i| (0..=i).flat_map(move |j| entry(i, j).to_le_bytes())).collect()
}

fn spectrum(key: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>, max_memory: u64) -> Option<Spectrum> {
    let directory = directory();
    let bytes = file(&[("format", FORMAT)], &[(key, dtype, shape, bytes)]);
    let path = write(directory.path(), "x.safetensors", bytes);
    let [mapped, pread] = [IoMode::Mmap, IoMode::Pread]
        .map(|io| inspect(&path, Some(max_memory), io).expect("well-formed").tensors.remove(0));
    let found = mapped.stats.and_then(|s| s.gram).and_then(|g| g.spectrum);
    let again = pread.stats.and_then(|s| s.gram).and_then(|g| g.spectrum);
    assert_eq!(serde_json::to_string(&found).expect("JSON"), serde_json::to_string(&again).expect("JSON"));
    found
}

#[test]
fn all_eigenvalues_where_they_fit() {
    let n = 101;
    let found = spectrum("a/input_gram", "F64", &[n * (n + 1) / 2], turned(n), 1 << 20).expect("a Gram");
    assert_eq!(found.method, Method::Whole);
    // The eigenvalues are 1 to 101; a few units in the last place of the largest.
    let near = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-11, "{got} {expected}");
    near(found.smallest, 1.0);
    near(found.largest, 101.0);
    near(found.condition_at_noise.expect("definite"), 101.0);
    assert_eq!(found.above_noise, Some(101));
    let quantiles = found.quantiles.expect("all are known");
    for (share, expected) in [("0.01", 2.0), ("0.1", 11.0), ("0.5", 51.0), ("0.9", 91.0), ("0.99", 100.0)] {
        near(quantiles[share], expected);
    }
}

#[test]
fn lanczos_where_they_do_not_and_the_same_when_read_at_each_step() {
    let n = 300;
    let square = 8 * (n * n) as u64;
    let of = |max_memory| {
        spectrum("a/input_gram", "F64", &[n * (n + 1) / 2], turned(n), max_memory).expect("a Gram")
    };
    let (held, streamed) = (of(square), of(square - 1));
    assert_eq!((held.method, streamed.method), (Method::Lanczos, Method::Lanczos));
    assert_eq!((held.smallest, held.largest), (streamed.smallest, streamed.largest));
    // A flat spectrum is the hard case: bounds hold, and are near after 64 of 300 steps.
    assert!((295.0..=300.0 + 1e-9).contains(&held.largest), "{}", held.largest);
    assert!((1.0 - 1e-9..=5.0).contains(&held.smallest), "{}", held.smallest);
    assert!(held.quantiles.is_none() && held.above_noise.is_none());
}

#[test]
fn what_rounding_hides_counts_as_noise() {
    // diag(1, 1e-12) in f32: the noise is 4·2·2⁻²⁵/√3·√(1/2), about 1e-7.
    let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let found = spectrum("a/input_gram", "F32", &[3], f32s(&[1.0, 0.0, 1e-12]), 1 << 20).expect("a Gram");
    let noise = found.noise.expect("stored in f32");
    assert!((noise - 8.0 / 3f64.sqrt() * 2f64.powi(-25) * 0.5f64.sqrt()).abs() < 1e-12, "{noise}");
    assert_eq!(found.above_noise, Some(1));
    assert!((found.condition_at_noise.expect("not zero") * noise - 1.0).abs() < 1e-9);
    let zero = spectrum("a/input_gram", "F32", &[3], f32s(&[0.0; 3]), 1 << 20).expect("a Gram");
    assert_eq!((zero.condition_at_noise, zero.above_noise), (None, Some(0)));
}

#[test]
fn factors_have_the_zeros_that_they_do_not_store() {
    // Rows (3, 0, 0) and (0, 4, 0): eigenvalues 16, 9, 0.
    let bytes: Vec<u8> = [3.0f64, 0.0, 0.0, 0.0, 4.0, 0.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let found = spectrum("a/input_factor", "F64", &[2, 3], bytes.clone(), 1 << 20).expect("a factor");
    assert_eq!((found.largest, found.smallest, found.above_noise), (16.0, 0.0, Some(2)));
    assert_eq!((found.quantiles.expect("all")["0.5"], found.condition_at_noise), (9.0, None));
    assert!(spectrum("a/input_factor", "F64", &[2, 3], bytes, 10).is_none());
}
