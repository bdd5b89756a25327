use std::os::unix::fs::symlink;

use super::*;
use crate::read::testing::{directory, f32s, file, write};
use crate::read::{Dtype, ExitClass};

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path, IoMode::Mmap).expect("a checkpoint")
}

fn refused(path: &Path) -> String {
    let error = Checkpoint::open(path, IoMode::Mmap).expect_err("must be refused");
    assert_eq!(error.exit_class(), ExitClass::BadInput);
    error.to_string()
}

fn assert_refused(path: &Path, expected: &str) {
    let text = refused(path);
    assert!(text.contains(expected), "{text}\ndoes not say: {expected}");
}

fn small(name: &str, value: f32) -> Vec<u8> {
    file(&[("format", "pt")], &[(name, "F32", &[2], f32s(&[value, -value]))])
}

/// Two shards: `b` in the first, `a` in the second.
fn sharded(directory: &Path) {
    write(directory, "m-1.safetensors", small("b", 1.0));
    write(directory, "m-2.safetensors", small("a", 2.0));
    write(directory, INDEX_FILE, r#"{"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors"}}"#);
}

#[test]
fn opens_a_directory_with_shards() {
    let directory = directory();
    sharded(directory.path());
    write(directory.path(), CONFIG_FILE, r#"{"z":1,"a":2}"#);
    for path in [directory.path().to_owned(), directory.path().join(INDEX_FILE)] {
        for io in [IoMode::Mmap, IoMode::Pread] {
            let checkpoint = Checkpoint::open(&path, io).expect("a checkpoint");
            assert_eq!(checkpoint.path(), path);
            assert_eq!(checkpoint.directory(), Some(directory.path()));
            let config = checkpoint.config().expect("a config").as_object().expect("a map");
            assert_eq!(config.keys().collect::<Vec<_>>(), ["z", "a"]);
            let names: Vec<&str> = checkpoint.tensors().iter().map(|t| t.name.as_str()).collect();
            assert_eq!(names, ["b", "a"]);
            assert_eq!((checkpoint.files().len(), checkpoint.total_bytes()), (2, 16));
            assert_eq!(
                checkpoint.header_bytes() + 16,
                checkpoint.files().iter().map(InputFile::len).sum::<u64>()
            );
            assert!(checkpoint.warnings().is_empty() && checkpoint.left_out().is_empty());
            assert_eq!(checkpoint.metadata()["format"], "pt");
            let a = checkpoint.get("a").expect("there");
            assert_eq!((a.file, a.dtype, a.bytes), (1, Dtype::F32, 8));
            assert_eq!(checkpoint.read(a, 4..8, &mut Vec::new()).expect("inside"), (-2f32).to_le_bytes());
            assert!(checkpoint.get("c").is_none());
            checkpoint.will_need(a, 0..8);
            checkpoint.release(a, 0..8, true);
            checkpoint.check_unchanged().expect("nobody touched it");
        }
    }
}

#[test]
fn opens_a_single_file_with_and_without_a_directory() {
    let directory = directory();
    let path = write(directory.path(), "other.safetensors", small("a", 1.0));
    assert_eq!(open(&path).directory(), None);
    // The one safetensors file of a directory.
    assert_eq!(open(directory.path()).directory(), Some(directory.path()));
    assert!(open(directory.path()).config().is_none());
    // The usual name goes first where there are several.
    write(directory.path(), SINGLE_FILE, small("b", 1.0));
    assert!(open(directory.path()).get("b").is_some());
    // And an index before it.
    sharded(directory.path());
    assert_eq!(open(directory.path()).files().len(), 2);
}

#[test]
fn reads_only_inside_the_tensor() {
    let directory = directory();
    let path = write(
        directory.path(),
        "x.safetensors",
        file(&[], &[("a", "U8", &[4], vec![1; 4]), ("b", "U8", &[4], vec![2; 4])]),
    );
    let checkpoint = open(&path);
    let a = checkpoint.get("a").expect("there");
    let error = checkpoint.read(a, 2..5, &mut Vec::new()).expect_err("reaches into b");
    assert!(
        error.to_string().ends_with("tensor `a`: no such byte range (got 2..5, expected it within 0..4)"),
        "{error}"
    );
    assert!(checkpoint.read(a, 4..4, &mut Vec::new()).expect("inside").is_empty());
}

#[test]
fn directories_without_a_checkpoint() {
    let directory = directory();
    assert_refused(directory.path(), "got no *.safetensors file");
    write(directory.path(), "pytorch_model.bin", "x");
    assert_refused(directory.path(), "got pickled weights (`pytorch_model.bin`), expected safetensors");
    write(directory.path(), "a.safetensors", small("a", 1.0));
    write(directory.path(), "b.safetensors", small("b", 1.0));
    assert_refused(directory.path(), "got 2 *.safetensors files and no model.safetensors.index.json");
    assert_refused(&directory.path().join("missing"), "missing: cannot open");
}

#[test]
fn config_must_be_json_where_there_is_one() {
    let directory = directory();
    write(directory.path(), SINGLE_FILE, small("a", 1.0));
    write(directory.path(), CONFIG_FILE, "{");
    assert_refused(directory.path(), "config.json: malformed JSON");
    write(directory.path(), CONFIG_FILE, vec![b' '; MAX_MODEL_CONFIG_BYTES as usize + 1]);
    assert_refused(directory.path(), "too large");
}

#[test]
fn b16_index_and_shard_disagree() {
    let directory = directory();
    sharded(directory.path());
    // The index has one more than the shard.
    write(
        directory.path(),
        INDEX_FILE,
        r#"{"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors","c":"m-1.safetensors"}}"#,
    );
    assert_refused(
        directory.path(),
        "weight_map key `c` is not in its shard (got no such tensor in `m-1.safetensors`",
    );
    // The shard has one more than the index.
    write(
        directory.path(),
        "m-1.safetensors",
        file(&[], &[("b", "U8", &[1], vec![1]), ("a", "U8", &[1], vec![3]), ("x\n", "U8", &[1], vec![2])]),
    );
    sharded_index(directory.path());
    let checkpoint = open(directory.path());
    assert_eq!(checkpoint.left_out(), ["x\n"]);
    assert!(checkpoint.get("x\n").is_none());
    let [unlisted, elsewhere] = checkpoint.warnings() else { panic!("{:?}", checkpoint.warnings()) };
    assert!(unlisted.ends_with("m-1.safetensors: left out, as the index lacks them: `x\\n`"), "{unlisted}");
    assert!(elsewhere.ends_with("the index places them in another shard: `a`"), "{elsewhere}");
    // The index decides where `a` comes from.
    assert_eq!(checkpoint.get("a").expect("there").dtype, Dtype::F32);
}

fn sharded_index(directory: &Path) {
    write(directory, INDEX_FILE, r#"{"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors"}}"#);
}

#[test]
fn b17_shards_that_cannot_be_read() {
    let directory = directory();
    sharded(directory.path());
    let shard = directory.path().join("m-2.safetensors");
    std::fs::remove_file(&shard).expect("removable");
    assert_refused(directory.path(), "m-2.safetensors: cannot open");
    std::fs::create_dir(&shard).expect("a directory");
    assert_refused(directory.path(), "m-2.safetensors: not a regular file (got a directory");
    std::fs::remove_dir(&shard).expect("removable");
    symlink("/dev/zero", &shard).expect("a link");
    assert_refused(directory.path(), "m-2.safetensors: not a regular file (got a character device");
    assert_refused(Path::new("/dev/zero"), "/dev/zero: not a regular file");
}

#[test]
fn b18_snapshot_of_links() {
    let directory = directory();
    let (blobs, snapshot) = (directory.path().join("blobs"), directory.path().join("snapshots/1"));
    std::fs::create_dir_all(&blobs).expect("a directory");
    std::fs::create_dir_all(&snapshot).expect("a directory");
    sharded(&blobs);
    write(&blobs, CONFIG_FILE, "{}");
    for name in ["m-1.safetensors", "m-2.safetensors", INDEX_FILE, CONFIG_FILE] {
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).expect("a link");
    }
    let checkpoint = open(&snapshot);
    assert_eq!((checkpoint.tensors().len(), checkpoint.config().is_some()), (2, true));
}

#[test]
fn b19_checkpoints_may_mix_dtypes() {
    let directory = directory();
    let bytes = file(
        &[],
        &[("a", "BF16", &[1], vec![0; 2]), ("b", "F32", &[1], vec![0; 4]), ("ids", "I64", &[1], vec![0; 8])],
    );
    let checkpoint = open(&write(directory.path(), "x.safetensors", bytes));
    let dtypes: Vec<Dtype> = checkpoint.tensors().iter().map(|t| t.dtype).collect();
    assert_eq!(dtypes, [Dtype::Bf16, Dtype::F32, Dtype::I64]);
}
