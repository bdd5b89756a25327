use super::*;
use crate::read::testing::{Spec, directory, f32s, file, write};

fn compared(a: &[Spec<'_>], b: &[Spec<'_>], tolerance: f64) -> Diff {
    let directory = directory();
    let paths = [("a", a), ("b", b)].map(|(name, tensors)| write(directory.path(), name, file(&[], tensors)));
    let [mapped, pread] = [IoMode::Mmap, IoMode::Pread]
        .map(|io| diff(&paths[0], &paths[1], tolerance, io).expect("well-formed"));
    assert_eq!(serde_json::to_string(&mapped).expect("JSON"), serde_json::to_string(&pread).expect("JSON"));
    mapped.write_table(&mut Vec::new()).expect("memory takes everything");
    mapped
}

fn floats(a: &[f32], b: &[f32], tolerance: f64) -> Diff {
    compared(&[("x", "F32", &[a.len()], f32s(a))], &[("x", "F32", &[b.len()], f32s(b))], tolerance)
}

#[test]
fn equal_checkpoints_do_not_differ() {
    let tensors: [Spec<'_>; 3] =
        [("x", "F32", &[2], f32s(&[3.0, 4.0])), ("i", "I64", &[1], vec![1; 8]), ("q", "F4", &[2], vec![7])];
    let found = compared(&tensors, &tensors, 0.0);
    assert!(!found.differs);
    let x = &found.tensors[0];
    assert_eq!((x.max_abs, x.relative_l2), (Some(0.0), Some(0.0)));
    assert!((x.cosine.expect("not zero") - 1.0).abs() < 1e-15);
    assert_eq!((found.tensors[1].max_abs, found.tensors[2].max_abs), (Some(0.0), None));
}

#[test]
fn distances_by_hand() {
    // a - b = (1, 0); ‖b‖ = 5; ⟨a, b⟩ = 12 + 16 = 28; ‖a‖² = 32.
    let found = floats(&[4.0, 4.0], &[3.0, 4.0], 0.5);
    let x = &found.tensors[0];
    assert_eq!(
        (found.differs, x.max_abs, x.relative_l2, x.first_difference),
        (true, Some(1.0), Some(0.2), Some(0))
    );
    assert!((x.cosine.expect("not zero") - 28.0 / (32f64.sqrt() * 5.0)).abs() < 1e-15);
    assert!(!floats(&[4.0, 4.0], &[3.0, 4.0], 1.0).differs);
    // A zero reference.
    let zero = floats(&[1.0], &[0.0], 2.0);
    assert_eq!((zero.tensors[0].relative_l2, zero.tensors[0].cosine), (Some(f64::INFINITY), None));
    assert_eq!(
        serde_json::to_value(&zero).expect("JSON")["tensors"][0]["relative_l2"],
        serde_json::Value::Null
    );
}

#[test]
fn nan_and_infinity() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    assert!(!floats(&[nan, 1.0, inf], &[nan, 1.0, inf], 0.0).differs);
    let one_side = floats(&[1.0, nan, 0.0], &[1.0, 2.0, 0.0], 100.0);
    assert_eq!((one_side.differs, one_side.tensors[0].nan_mismatches), (true, 1));
    assert_eq!((one_side.tensors[0].first_difference, one_side.tensors[0].max_abs), (Some(1), Some(0.0)));
    assert!(floats(&[inf], &[1.0], 1e300).differs);
    assert!(floats(&[inf], &[-inf], 1e300).differs);
    // The first difference may come before or after the NaN.
    assert_eq!(floats(&[5.0, nan], &[1.0, 2.0], 0.0).tensors[0].first_difference, Some(0));
    assert_eq!(floats(&[1.0, nan, 5.0], &[1.0, nan, 2.0], 0.0).tensors[0].first_difference, Some(2));
}

#[test]
fn sets_shapes_and_dtypes() {
    let found = compared(
        &[
            ("only a", "U8", &[1], vec![0]),
            ("shape", "U8", &[1, 2], vec![0; 2]),
            ("dtype", "F32", &[1], f32s(&[1.0])),
            ("kind", "F32", &[1], f32s(&[1.0])),
        ],
        &[
            ("shape", "U8", &[2, 1], vec![0; 2]),
            ("dtype", "BF16", &[1], vec![0x80, 0x3f]),
            ("kind", "I32", &[1], vec![0; 4]),
            ("only b", "U8", &[1], vec![0]),
        ],
        0.0,
    );
    assert!(found.differs);
    assert_eq!(
        (found.only_in_a.as_slice(), found.only_in_b.as_slice()),
        (&["only a".to_owned()][..], &["only b".to_owned()][..])
    );
    let differs: Vec<bool> = found.tensors.iter().map(|t| t.differs).collect();
    assert_eq!(differs, [true, false, true]);
    assert_eq!(found.tensors[0].note.as_deref(), Some("shape [1, 2] and [2, 1]"));
    assert_eq!(found.tensors[1].note.as_deref(), Some("dtype F32 and BF16"));
    // A missing tensor is a difference by itself, on either side.
    let one: Spec<'_> = ("x", "U8", &[1], vec![0]);
    assert!(compared(std::slice::from_ref(&one), &[], 0.0).differs && compared(&[], &[one], 0.0).differs);
}

#[test]
fn integers_are_compared_exactly() {
    let wide = |value: i64| -> [Spec<'static>; 1] { [("i", "I64", &[1], value.to_le_bytes().to_vec())] };
    // These two are one f64.
    let found = compared(&wide(i64::MAX), &wide(i64::MAX - 1), 10.0);
    assert_eq!((found.differs, found.tensors[0].max_abs), (true, Some(1.0)));
    let found = compared(&wide(i64::MIN), &wide(i64::MAX), 0.0);
    assert_eq!(found.tensors[0].max_abs, Some(u64::MAX as f64));
    let odd = |value| -> [Spec<'static>; 1] { [("q", "F4", &[2], vec![value])] };
    assert!(compared(&odd(1), &odd(2), 10.0).differs);
}

#[test]
fn tiles_are_joined() {
    let mut a: Vec<f32> = (0..2 * TILE + 5).map(|i| (i % 7) as f32).collect();
    let b = a.clone();
    let at = TILE + 17;
    a[at] += 2.0;
    a[2 * TILE + 4] -= 3.0;
    let found = floats(&a, &b, 0.0);
    let x = &found.tensors[0];
    assert_eq!((x.max_abs, x.first_difference), (Some(3.0), Some(at as u64)));
    let norm = b.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
    assert!((x.relative_l2.expect("a number") - 13f64.sqrt() / norm).abs() < 1e-15);
}
