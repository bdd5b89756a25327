use super::*;
use crate::read::file::IoMode;
use crate::read::testing::{directory, f32s, file, raw, write};
use crate::read::{ExitClass, MAX_TENSORS};

/// Parses a whole file's bytes in both modes, which must agree, and returns the error's text if there is one.
fn header(bytes: impl AsRef<[u8]>) -> Result<Header, ReadError> {
    let directory = directory();
    let path = write(directory.path(), "x.safetensors", bytes);
    let read = |io| InputFile::open(&path, io).and_then(|file| read_header(&file, 0));
    let (mapped, pread) = (read(IoMode::Mmap), read(IoMode::Pread));
    match (&mapped, &pread) {
        (Ok(a), Ok(b)) => assert_eq!((&a.tensors, &a.metadata), (&b.tensors, &b.metadata)),
        (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string()),
        (a, b) => panic!("the two modes differ: {a:?} and {b:?}"),
    }
    mapped
}

/// The message that a file is refused with: one line that names the file, for exit code 2.
fn refused(bytes: impl AsRef<[u8]>) -> String {
    let error = header(bytes).expect_err("must be refused");
    assert_eq!(error.exit_class(), ExitClass::BadInput);
    let text = error.to_string();
    assert!(text.contains("x.safetensors: "), "{text}");
    assert!(!text.chars().any(char::is_control) && text.len() < 2000, "{text:?}");
    text
}

fn assert_refused(bytes: impl AsRef<[u8]>, expected: &str) {
    let text = refused(bytes);
    assert!(text.contains(expected), "{text}\ndoes not say: {expected}");
}

const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

#[test]
fn accepts_a_small_file() {
    let found = header(file(
        &[("format", "pt"), ("k\n", "v")],
        &[("b", "F32", &[2, 1], f32s(&[1.0, 2.0])), ("a", "I64", &[1], vec![7; 8])],
    ))
    .expect("well-formed");
    assert_eq!(found.metadata.get("k\n").map(String::as_str), Some("v"));
    assert!(found.warnings.is_empty());
    let [b, a] = found.tensors.as_slice() else { panic!("{:?}", found.tensors) };
    assert_eq!(
        (b.name.as_str(), b.dtype, b.shape.as_slice(), b.bytes, b.elements()),
        ("b", Dtype::F32, &[2, 1][..], 8, 2)
    );
    assert_eq!((a.offset, a.bytes), (found.header_bytes + 8, 8));
}

#[test]
fn accepts_a_file_without_tensors() {
    assert!(header(raw("{}", &[])).expect("well-formed").tensors.is_empty());
    assert!(header(raw(r#"{"__metadata__":{}}     "#, &[])).expect("well-formed").tensors.is_empty());
}

#[test]
fn orders_tensors_by_offset_whatever_the_header_says() {
    let text = r#"{"z":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let names: Vec<String> =
        header(raw(text, &[1, 2])).expect("valid").tensors.into_iter().map(|t| t.name).collect();
    assert_eq!(names, ["a", "z"]);
}

#[test]
fn b01_too_short_for_a_header() {
    assert_refused([], "got 0 bytes");
    assert_refused([1; 7], "got 7 bytes");
    assert_refused(raw("", &[]), "empty header");
}

#[test]
fn b02_header_length_lies() {
    assert_refused(u64::MAX.to_le_bytes(), "got 18446744073709551615 bytes, expected at most 100000000");
    assert_refused(100_000_001u64.to_le_bytes(), "header too large");
    assert_refused([&20u64.to_le_bytes()[..], b"{}"].concat(), "got 20 bytes of header, expected at most 2");
}

#[test]
fn b03_header_is_not_the_prescribed_json() {
    assert_refused(raw(b"{\"a\xff\":1}", &[]), "not UTF-8 at 3");
    assert_refused(raw(b"not json", &[]), "expected `{`");
    assert_refused(raw(format!(" {ONE}"), &[0; 8]), "got a first byte of 0x20, expected `{`");
    assert_refused(raw(format!("\u{feff}{ONE}"), &[0; 8]), "got a first byte of 0xef");
    assert_refused(raw("[]", &[]), "expected `{`");
    assert_refused(raw(&ONE[..30], &[0; 8]), "EOF");
    assert_refused(raw(format!("{ONE}x"), &[0; 8]), "trailing characters");
    assert_refused(raw(format!("{ONE}\0\0"), &[0; 8]), "trailing characters");
    assert_refused(raw(r#"{"a":3}"#, &[]), "tensor `a`: invalid type: integer `3`");
    assert_refused(raw(r#"{"__metadata__":{"a":1}}"#, &[]), "`__metadata__`: invalid type: integer `1`");
    assert_refused(raw(r#"{"a":{"dtype":"U8","shape":[0]}}"#, &[]), "tensor `a`: has no `data_offsets`");
    assert_refused(raw(r#"{"a":{"dtype":"U8","data_offsets":[0,0]}}"#, &[]), "has no `shape`");
    assert_refused(raw(r#"{"a":{"shape":[0],"data_offsets":[0,0]}}"#, &[]), "has no `dtype`");
}

#[test]
fn b04_deep_nesting() {
    let deep = "[".repeat(100_000);
    for text in [
        format!("{{\"a\":{deep}"),
        format!("{{\"__metadata__\":{{\"k\":{deep}"),
        format!("{{\"a\":{{\"shape\":{deep}"),
        // In a field that is otherwise ignored.
        format!("{{\"a\":{{\"extra\":{deep}{}", "]".repeat(100_000)),
        format!("{{\"a\":{{\"extra\":{}", "{\"k\":".repeat(100_000)),
    ] {
        refused(raw(text, &[]));
    }
}

#[test]
fn b05_too_many_tensors() {
    let entries = |count: usize| {
        let mut text = String::from("{");
        for at in 0..count {
            let comma = if at == 0 { "" } else { "," };
            text.push_str(&format!(
                "{comma}\"{at}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"
            ));
        }
        text + "}"
    };
    assert_eq!(header(raw(entries(100_000), &[])).expect("within the limit").tensors.len(), 100_000);
    assert_refused(raw(entries(MAX_TENSORS + 1), &[]), "got more than 1000000, expected at most 1000000");
}

#[test]
fn b06_duplicate_keys() {
    let entry =
        |shape: &str, end: u32| format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{end}]}}");
    let twice = |a: String, b: String| raw(format!("{{\"a\":{a},\"\\u0061\":{b}}}"), &[0; 8]);
    assert_refused(twice(entry("[2]", 8), entry("[2]", 8)), "tensor `a` is declared twice");
    assert_refused(twice(entry("[2]", 8), entry("[1,2]", 8)), "tensor `a` is declared twice");
    let inside = r#"{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    assert_refused(raw(inside, &[0]), "tensor `a`: has `dtype` twice");
    let inside = r#"{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}"#;
    assert_refused(raw(inside, &[0]), "has `shape` twice");
    let inside = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"data_offsets":[0,1]}}"#;
    assert_refused(raw(inside, &[0]), "has `data_offsets` twice");
    assert_refused(raw(r#"{"__metadata__":{"k":"1","k":"1"}}"#, &[]), "has the key `k` twice");
    assert_refused(raw(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), "`__metadata__` is declared twice");
}

fn two(first: (u64, u64), second: (u64, u64)) -> String {
    let entry = |(begin, end): (u64, u64)| {
        format!("{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}", end - begin)
    };
    format!("{{\"a\":{},\"b\":{}}}", entry(first), entry(second))
}

#[test]
fn b07_hole_in_layout() {
    assert_refused(
        raw(two((0, 4), (5, 8)), &[0; 8]),
        "tensor `b` leaves a hole in the layout (got a start of 5, expected 4)",
    );
    assert_refused(raw(two((1, 4), (4, 8)), &[0; 8]), "tensor `a` leaves a hole");
}

#[test]
fn b07_overlap_in_layout() {
    assert_refused(
        raw(two((0, 4), (3, 8)), &[0; 8]),
        "tensor `b` leaves an overlap in the layout (got a start of 3",
    );
    // Two names for one span, as tied weights would have it.
    assert_refused(raw(two((0, 8), (0, 8)), &[0; 8]), "tensor `b` leaves an overlap");
}

#[test]
fn b07_trailing_bytes() {
    let text = refused(raw(ONE, &[0; 9]));
    let expected = 8 + ONE.len() + 8;
    assert!(text.contains(&format!(
        "trailing bytes after the last tensor (got {} bytes, expected {expected})",
        expected + 1
    )));
}

#[test]
fn b07_truncated() {
    assert_refused(raw(ONE, &[0; 7]), "truncated");
    assert_refused(raw(ONE, &[]), "truncated");
}

#[test]
fn b07_offsets_at_the_end_of_u64() {
    let far =
        format!(r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[{},{}]}}}}"#, u64::MAX - 1, u64::MAX);
    assert_refused(raw(far, &[0]), "hole");
    let all =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{max}],"data_offsets":[0,{max}]}}}}"#, max = u64::MAX / 8);
    assert_refused(raw(all, &[0]), "truncated");
}

#[test]
fn b08_shape_overflow() {
    let shaped = |shape: &str| {
        raw(format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}}}"#), &[0; 8])
    };
    assert_refused(shaped("[4194305,4194305,211106198978564]"), "got [4194305, 4194305, 211106198978564]");
    assert_refused(shaped("[9223372036854775808]"), "overflows");
    assert_refused(shaped("[0,9223372036854775808,4]"), "overflows");
    assert_refused(
        shaped(&format!("[{}1]", "1,".repeat(99_999))),
        "too many dimensions (got 100000, expected at most 16)",
    );
    assert_refused(shaped("[3]"), "spans the wrong number of bytes (got 8, expected 12 for F32 [3])");
    let sixteen = format!("[{}2]", "1,".repeat(15));
    assert_eq!(header(shaped(&sixteen)).expect("rank 16 is allowed").tensors[0].shape.len(), 16);
}

#[test]
fn b09_dimensions_and_offsets_of_the_wrong_type() {
    for dims in ["[-1]", "[1.0]", "[1e0]", "[\"1\"]", "[null]", "2", "{}", "[18446744073709551616]"] {
        assert_refused(
            raw(format!(r#"{{"a":{{"dtype":"F32","shape":{dims},"data_offsets":[0,4]}}}}"#), &[0; 4]),
            "tensor `a`: invalid",
        );
    }
    for offsets in ["[0]", "[0,4,4]", "[-1,3]", "[0,4.0]", "\"0\"", "null"] {
        let bytes =
            raw(format!(r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}"#), &[0; 4]);
        assert_refused(bytes, "tensor `a`: ");
    }
    let backwards = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#;
    assert_refused(raw(backwards, &[0; 4]), "ends before it starts (got data_offsets [4, 0])");
}

#[test]
fn b10_unknown_dtype() {
    let typed = |dtype: &str| {
        raw(format!(r#"{{"a":{{"dtype":{dtype},"shape":[1],"data_offsets":[0,4]}}}}"#), &[0; 4])
    };
    assert_refused(typed("\"FLOAT\""), "tensor `a` has an unknown dtype (got `FLOAT`");
    assert_refused(typed("\"f32\""), "unknown dtype");
    assert_refused(typed("4"), "tensor `a`: invalid type");
    let half_a_byte = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#;
    assert_refused(raw(half_a_byte, &[0; 2]), "does not end at a whole byte (got 12 bits");
}

#[test]
fn b11_misaligned_header() {
    for pad in 0..8 {
        let text = format!("{ONE}{}", " ".repeat(pad));
        let found = header(raw(&text, &[0; 8])).expect("any length is allowed");
        assert_eq!(found.tensors[0].offset as usize, 8 + text.len());
    }
}

#[test]
fn b12_empty_tensors_and_scalars() {
    let found = header(file(
        &[],
        &[
            ("empty", "F32", &[0, 4], vec![]),
            ("also_empty", "BF16", &[3, 0], vec![]),
            ("scalar", "F64", &[], vec![0; 8]),
            ("last", "I8", &[0], vec![]),
        ],
    ))
    .expect("well-formed");
    let elements: Vec<(&str, u64)> = found.tensors.iter().map(|t| (t.name.as_str(), t.elements())).collect();
    assert_eq!(elements, [("empty", 0), ("also_empty", 0), ("scalar", 1), ("last", 0)]);
    // No bytes are right only where the shape says so.
    let liar = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,0]}}"#;
    assert_refused(raw(liar, &[]), "got 0, expected 4");
}

#[test]
fn b13_names_are_opaque_and_escaped() {
    let long = "n".repeat(64 << 10);
    let names = ["../../etc/passwd", "a\0b", "a\nb", "", long.as_str(), "\u{1b}[31m"];
    for name in names {
        let found = header(file(&[], &[(name, "U8", &[1], vec![0])])).expect("any name is allowed");
        assert_eq!(found.tensors[0].name, name);
        // In a message it is harmless and short: `refused` checks for control characters and for length.
        refused(file(&[], &[(name, "U9", &[1], vec![0])]));
        refused(file(&[], &[(name, "U8", &[2], vec![0])]));
        refused(file(&[], &[(name, "U8", &[1], vec![0]), (name, "U8", &[1], vec![0])]));
    }
    let alias = r#"{"__metadata__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    assert_refused(raw(alias, &[0]), "`__metadata__`: invalid type");
    // A message quotes foreign values too.
    refused(raw(format!(r#"{{"a":{{"dtype":"{long}","shape":[1],"data_offsets":[0,1]}}}}"#), &[0]));
    refused(raw(format!(r#"{{"a":{{"dtype":"U8","shape":["{long}\n"],"data_offsets":[0,1]}}}}"#), &[0]));
    refused(raw(format!(r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"{long}":[[1}}}}"#), &[0]));
}

#[test]
fn unknown_fields_are_accepted_with_one_warning() {
    let text = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x\n":{"y":[1,null,true,-2.5,"s"]}},
                   "b":{"z":1,"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let found = header(raw(text, &[0, 0])).expect("forward compatible");
    let [warning] = found.warnings.as_slice() else { panic!("{:?}", found.warnings) };
    assert!(warning.contains("ignored 2 unknown header fields, the first `x\\n` of tensor `a`"), "{warning}");
}

proptest::proptest! {
    /// Whatever the bytes, there is an answer; what we accept, the `safetensors` crate accepts with the same meaning.
    #[test]
    fn accepts_only_what_the_reference_accepts(
        text in "\\{(\"[ab]\":\\{\"dtype\":\"(U8|F4|F32)\",\"shape\":\\[[0-4](,[0-2])?\\],\"data_offsets\":\\[[0-4],[0-8]\\]\\},?){0,3}\\}",
        len in 0usize..10,
    ) {
        let bytes = raw(&text, &vec![0; len]);
        if let Ok(found) = header(&bytes) {
            let reference = safetensors::SafeTensors::deserialize(&bytes).expect("the reference accepts it too");
            proptest::prop_assert_eq!(found.tensors.len(), reference.len());
            for tensor in &found.tensors {
                let view = reference.tensor(&tensor.name).expect("same names");
                proptest::prop_assert_eq!(view.shape(), tensor.shape.as_slice());
                proptest::prop_assert_eq!(view.data().len() as u64, tensor.bytes);
                let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                proptest::prop_assert!(tensor.bytes == 0 || at as u64 == tensor.offset);
            }
        }
    }

    #[test]
    fn any_bytes_get_an_answer(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
        let _ = header(&bytes);
        let _ = header(raw(&bytes, &[]));
    }
}
