use super::*;
use crate::read::ExitClass;
use crate::read::testing::{directory, write};

fn read(json: impl AsRef<[u8]>) -> Result<Index, ReadError> {
    let directory = directory();
    Index::read(&write(directory.path(), "x.index.json", json))
}

fn refused(json: impl AsRef<[u8]>) -> String {
    let error = read(json).expect_err("must be refused");
    assert_eq!(error.exit_class(), ExitClass::BadInput);
    let text = error.to_string();
    assert!(text.contains("x.index.json: ") && !text.chars().any(char::is_control), "{text:?}");
    text
}

fn assert_refused(json: impl AsRef<[u8]>, expected: &str) {
    let text = refused(json);
    assert!(text.contains(expected), "{text}\ndoes not say: {expected}");
}

#[test]
fn shards_are_sorted_and_tensors_found() {
    let index = read(r#"{"metadata":{"total_size":3},"weight_map":{"z":"2.safetensors","a":"10.safetensors","b":"2.safetensors"}}"#)
        .expect("well-formed");
    assert_eq!(index.shards, ["10.safetensors", "2.safetensors"]);
    let shard_of = |name| index.find(name).map(|(_, shard)| shard);
    assert_eq!(
        (shard_of("z"), shard_of("a"), shard_of("b"), shard_of("c")),
        (Some(1), Some(0), Some(1), None)
    );
    let (at, _) = index.find("b").expect("there");
    assert_eq!((index.entry(at), index.len()), (("b", "2.safetensors"), 3));
}

#[test]
fn b14_shards_are_plain_file_names() {
    let hostile = [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "a/b",
        "C:\\\\x",
        "C:x",
        "\\\\\\\\host\\\\x",
        "a\\\\b",
        "",
        ".",
        "..",
        "a\\u0000b",
        "a\\nb",
    ];
    for value in hostile {
        assert_refused(
            format!(r#"{{"weight_map":{{"the.key":"{value}"}}}}"#),
            "weight_map key `the.key` names a shard elsewhere",
        );
    }
    for value in ["a", "...", "..a", "model-00001-of-00002.safetensors", "ü", "10:x"] {
        read(format!(r#"{{"weight_map":{{"k":"{value}"}}}}"#)).expect("a plain name");
    }
}

#[test]
fn b15_malformed_indexes() {
    assert_refused(r#"{"weight_map":{"a":"x","a":"x"}}"#, "weight_map key `a`: is declared twice");
    assert_refused(r#"{"weight_map":{"a":"x"},"weight_map":{}}"#, "the key `weight_map` is there twice");
    assert_refused(r#"{"weight_map":{"a":3}}"#, "weight_map key `a`: invalid type: integer `3`");
    assert_refused(r#"{"weight_map":{"a":null}}"#, "weight_map key `a`: ");
    assert_refused(r#"{"weight_map":["a"]}"#, "invalid type: sequence");
    assert_refused(r#"{"metadata":{}}"#, "got no `weight_map`");
    assert_refused(r#"{"weight_map":{}}"#, "empty `weight_map`");
    assert_refused("[]", "invalid type: sequence");
    assert_refused("", "EOF");
    assert_refused(b"{\"weight_map\":{\"a\xff\":\"x\"}}", "malformed index");
    assert_refused(r#"{"weight_map":{"a":"x"}} x"#, "trailing characters");
    assert_refused(format!(r#"{{"other":{}"#, "[".repeat(100_000)), "recursion limit");
}

#[test]
fn b15_huge_index() {
    let directory = directory();
    let path = directory.path().join("x.index.json");
    let file = std::fs::File::create(&path).expect("a file");
    // Sparse: nothing is read before the length is known to be too much.
    file.set_len(300_000_000).expect("a sparse file");
    let error = Index::read(&path).expect_err("too large");
    assert!(
        matches!(error, ReadError::FileTooLarge { bytes: 300_000_000, limit: 100_000_000, .. }),
        "{error}"
    );
}
