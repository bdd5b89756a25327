use std::os::unix::fs::symlink;

use serde_json::json;

use super::*;

#[test]
fn takes_over_what_is_there_and_follows_links() {
    let root = tempfile::tempdir().unwrap();
    let base = root.path().join("base");
    fs::create_dir(&base).unwrap();
    fs::write(root.path().join("blob"), b"{ \"vocab\": 1 }").unwrap();
    symlink("../blob", base.join("tokenizer.json")).unwrap();
    symlink("../absent", base.join("vocab.json")).unwrap();
    fs::create_dir(base.join("merges.txt")).unwrap();
    fs::write(base.join("config.json"), b"{}").unwrap();
    fs::write(base.join("modeling.py"), b"import os").unwrap();
    fs::write(base.join("model.safetensors"), b"x").unwrap();
    let files = copy_side_files(&base).unwrap();
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["config.json", "tokenizer.json"]);
    let staged = stage(root.path(), &files[1]).unwrap();
    assert_eq!(fs::read(staged).unwrap(), b"{ \"vocab\": 1 }");
    assert_eq!(copy_side_files(&root.path().join("nowhere")).unwrap(), []);
}

#[test]
fn a_huge_or_changing_file_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("tokenizer.json");
    File::create(&from).unwrap().set_len(MAX_COPY_BYTES + 1).unwrap(); // sparse
    let error = copy_side_files(root.path()).unwrap_err();
    assert!(error.to_string().contains("at most 256.0 MiB"), "{error}");
    for (bytes, got) in [(3, 4), (9, 5)] {
        fs::write(&from, b"12345").unwrap();
        let file = SideFile { name: "t".into(), content: SideContent::Copy { from: from.clone(), bytes } };
        let error = stage(root.path(), &file).unwrap_err();
        assert!(matches!(error, WriteError::SideFileChanged { got: g, .. } if g == got), "{error}");
        assert!(!root.path().join(temporary_name("t")).exists(), "nothing is left");
    }
}

#[test]
fn a_config_is_changed_only_where_untrue() {
    let config = json!({ "z": 1, "torch_dtype": "float32", "a": { "torch_dtype": "float32" }, "d_ff": 2 });
    assert_eq!(patch_config(&config, Some("float32"), None), None);
    assert_eq!(patch_config(&config, None, None), None);
    let patched = patch_config(&config, Some("bfloat16"), None).unwrap();
    assert_eq!(
        patched.to_string(),
        r#"{"z":1,"torch_dtype":"bfloat16","a":{"torch_dtype":"float32"},"d_ff":2}"#,
        "order kept, other objects untouched"
    );
    let tied = patch_config(&config, None, Some(false)).unwrap();
    assert_eq!(tied["tie_word_embeddings"], false);
    assert_eq!(patch_config(&tied, None, Some(false)), None);
    assert_eq!(patch_config(&json!([1]), Some("float16"), Some(true)), None, "not a config");
    assert_eq!(patch_config(&json!({ "x": 1 }), Some("float16"), None), None, "says nothing, stays so");
    assert_eq!(patch_config(&json!({ "torch_dtype": "auto" }), Some("float16"), None), None);
}

#[test]
fn nested_configs_are_patched_but_not_quantization() {
    let config = json!({
        "dtype": "torch.bfloat16",
        "text_config": { "dtype": "bfloat16", "tie_word_embeddings": true },
        "quantization_config": { "dtype": "bfloat16" },
    });
    let patched = patch_config(&config, Some("float16"), Some(false)).unwrap();
    assert_eq!(
        patched,
        json!({
            "dtype": "torch.float16",
            "text_config": { "dtype": "float16", "tie_word_embeddings": false },
            "quantization_config": { "dtype": "bfloat16" },
            "tie_word_embeddings": false,
        })
    );
}

#[test]
fn names_must_be_plain() {
    for name in ["", ".", "..", "a/b", "../x", "a\\b", "a\0", ".hidden", "/etc/passwd"] {
        assert!(matches!(check_name(name), Err(WriteError::BadSideName { .. })), "{name:?}");
    }
    assert!(check_name("README.md").is_ok());
}

#[test]
fn dtype_names() {
    assert_eq!(torch_dtype_name("BF16"), Some("bfloat16"));
    assert_eq!(torch_dtype_name("I64"), None);
}
