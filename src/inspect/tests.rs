use super::*;
use crate::read::testing::{Spec, directory, f32s, file, raw, write};

fn statistics(metadata: &[(&str, &str)], tensors: &[Spec<'_>]) -> Vec<u8> {
    file(&[&[("format", FORMAT)], metadata].concat(), tensors)
}

fn inspected(bytes: Vec<u8>) -> Inspection {
    let directory = directory();
    let path = write(directory.path(), "x.safetensors", bytes);
    let [mapped, pread] =
        [IoMode::Mmap, IoMode::Pread].map(|io| inspect(&path, Some(1 << 30), io).expect("well-formed"));
    assert_eq!(serde_json::to_string(&mapped).expect("JSON"), serde_json::to_string(&pread).expect("JSON"));
    mapped
}

fn stats(inspection: &Inspection, at: usize) -> &TensorStats {
    inspection.tensors[at].stats.as_ref().expect("asked for")
}

fn close(got: Option<f64>, expected: f64) {
    let got = got.expect("found");
    assert!((got - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{got} is not {expected}");
}

#[test]
fn lists_a_checkpoint_without_reading_values() {
    let directory = directory();
    let bytes = file(&[("k", "v")], &[("a\n", "BF16", &[2, 3], vec![0; 12]), ("n", "I64", &[], vec![0; 8])]);
    let path = write(directory.path(), "x.safetensors", bytes);
    let found = inspect(&path, None, IoMode::Mmap).expect("well-formed");
    assert_eq!(
        (found.content, found.tensor_count, found.elements, found.bytes),
        (Content::Checkpoint, 2, 7, 20)
    );
    assert_eq!(found.dtypes["BF16"].elements, 6);
    assert!(found.tensors.iter().all(|row| row.stats.is_none() && row.kind.is_none()));
    let mut text = Vec::new();
    found.write_table(&mut text).expect("memory takes everything");
    let text = String::from_utf8(text).expect("text");
    assert!(
        text.contains("a\\n") && text.contains("2×3") && text.contains("12 B") && text.contains("scalar"),
        "{text}"
    );
    assert!(text.ends_with("checkpoint: 2 tensors, 7 elements, 20 B in 1 file\n"), "{text}");
}

#[test]
fn counts_and_norms() {
    let values = [3.0, f32::NAN, -4.0, f32::INFINITY, f32::NEG_INFINITY];
    let long: Vec<f32> = (0..TILE + 7).map(|i| if i == TILE + 3 { -2.0 } else { 1.0 }).collect();
    let found = inspected(file(
        &[],
        &[
            ("a", "F32", &[5], f32s(&values)),
            ("i", "I8", &[2], vec![0xff, 2]),
            ("e", "F16", &[0], vec![]),
            ("f8", "F8_E4M3", &[1], vec![1]),
            ("n", "F32", &[1], f32s(&[f32::NAN])),
            ("long", "F32", &[TILE + 7], f32s(&long)),
        ],
    ));
    let a = stats(&found, 0);
    assert_eq!((a.l2_norm, a.min, a.max, a.nan_count, a.inf_count), (5.0, Some(-4.0), Some(3.0), 1, 2));
    assert_eq!((stats(&found, 1).min, stats(&found, 1).max), (Some(-1.0), Some(2.0)));
    assert_eq!((stats(&found, 2).l2_norm, stats(&found, 2).min), (0.0, None));
    assert!(found.tensors[3].stats.is_none());
    assert_eq!(stats(&found, 4).max, None);
    let long = stats(&found, 5);
    assert_eq!(
        (long.l2_norm.powi(2).round(), long.min, long.max),
        ((TILE + 10) as f64, Some(-2.0), Some(1.0))
    );
    // Strict JSON, and a table, whatever the values.
    let json: serde_json::Value = serde_json::to_value(&found).expect("JSON");
    assert_eq!(json["tensors"][4]["stats"]["max"], serde_json::Value::Null);
    found.write_table(&mut Vec::new()).expect("memory takes everything");
}

#[test]
fn grams_full_and_packed_agree() {
    // Eigenvalues 1 and 3, trace 4, ‖·‖²_F = 4 + 4 + 1 + 1 = 10.
    let full = f32s(&[2.0, 1.0, 1.0, 2.0]);
    let packed = f32s(&[2.0, 1.0, 2.0]);
    let found = inspected(statistics(
        &[("alias:c/input_gram", "a/input_gram"), ("tokens", "3")],
        &[
            ("a/input_gram", "F32", &[2, 2], full),
            ("b/output_gram", "F32", &[3], packed),
            ("b/input_factor", "F32", &[1, 2], f32s(&[3.0, 4.0])),
            ("b/fisher_diagonal", "F32", &[2], f32s(&[1.0, 1.0])),
        ],
    ));
    assert_eq!((found.content, found.warnings.len()), (Content::Statistics, 0));
    assert_eq!(found.aliases["c/input_gram"], "a/input_gram");
    assert_eq!(found.tensors[1].kind, Some(Kind::OutputGram));
    for at in [0, 1] {
        let gram = stats(&found, at).gram.as_ref().expect("a Gram");
        assert_eq!((gram.side, gram.trace, gram.min_diagonal), (2, 4.0, Some(2.0)));
        close(gram.effective_rank, 1.6);
        close(gram.largest_eigenvalue, 3.0);
        close(gram.smallest_eigenvalue_at_most, 1.0);
        close(gram.condition_at_least, 3.0);
    }
    let factor = stats(&found, 2).gram.as_ref().expect("a factor");
    assert_eq!((factor.side, factor.trace, factor.largest_eigenvalue), (2, 25.0, Some(25.0)));
    assert_eq!((found.tokens, found.examples), (Some(3), None));
    assert_eq!(found.tensors[0].shared_by, ["c/input_gram"]);
    assert!(stats(&found, 3).gram.is_none());
    let mut text = Vec::new();
    found.write_table(&mut text).expect("memory takes everything");
    let text = String::from_utf8(text).expect("text");
    assert!(
        text.contains("alias c/input_gram = a/input_gram") && text.contains("metadata tokens: 3"),
        "{text}"
    );
}

#[test]
fn singular_and_broken_grams_have_no_condition() {
    let found = inspected(statistics(
        &[],
        &[
            ("a/input_gram", "F32", &[2, 2], f32s(&[1.0, 1.0, 1.0, 1.0])),
            ("b/input_gram", "F32", &[2, 2], f32s(&[0.0; 4])),
            ("c/input_gram", "F32", &[1, 1], f32s(&[f32::NAN])),
            ("d/input_gram", "F32", &[2, 2], f32s(&[1.0, 0.0, 0.0, -1.0])),
            ("e/input_gram", "F32", &[0, 0], vec![]),
        ],
    ));
    for at in 0..5 {
        let gram = stats(&found, at).gram.as_ref().expect("a Gram");
        assert_eq!(gram.condition_at_least, None, "{}", found.tensors[at].name);
    }
    let gram = |at| stats(&found, at).gram.as_ref().expect("a Gram");
    close(gram(0).largest_eigenvalue, 2.0);
    assert_eq!((gram(1).trace, gram(1).effective_rank, gram(1).largest_eigenvalue), (0.0, None, Some(0.0)));
    assert_eq!(gram(2).largest_eigenvalue, None);
    close(gram(3).smallest_eigenvalue_at_most, -1.0);
    assert_eq!(gram(3).min_diagonal, Some(-1.0));
}

#[test]
fn a_part_of_a_models_statistics_is_shown_with_a_warning() {
    let found = inspected(statistics(&[("alias:a/input_gram", "elsewhere/input_gram")], &[]));
    let [warning] = found.warnings.as_slice() else { panic!("{:?}", found.warnings) };
    assert!(warning.contains("dangles"), "{warning}");
}

#[test]
fn bad_files_are_refused() {
    let directory = directory();
    let path = write(directory.path(), "x.safetensors", raw("{", &[]));
    assert!(matches!(inspect(&path, Some(1 << 30), IoMode::Mmap), Err(ReadError::HeaderSyntax { .. })));
}
