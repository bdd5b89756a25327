use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

use super::super::ExitClass;
use super::super::coverage::insert;
use super::*;
use crate::plan::shards::TensorSpec;

fn spec(name: &str, bytes: usize) -> TensorSpec {
    TensorSpec { name: name.into(), dtype: "U8".into(), shape: vec![bytes], bytes: bytes as u64 }
}

/// Three tensors of 5, 0 and 8 bytes, in two shards.
fn two_shards() -> Arc<OutputLayout> {
    Arc::new(OutputLayout::new(vec![spec("a", 5), spec("empty", 0), spec("b", 8)], 8).unwrap())
}

fn open(root: &TempDir, layout: &Arc<OutputLayout>) -> CheckpointWriter {
    let dir = OutputDir::claim(&root.path().join("out"), &[]).unwrap();
    CheckpointWriter::create(dir, Arc::clone(layout)).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn record() -> SideFile {
    SideFile::new("merge_report.json", "{}\n")
}

#[test]
fn what_was_written_reads_back_and_nothing_else_remains() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    writer.write_at(2, 4, b"5678").unwrap();
    writer.write_at(0, 0, b"abcde").unwrap();
    writer.write_at(2, 0, b"1234").unwrap();
    assert_eq!(writer.bytes_written(), 13);
    let out = root.path().join("out");
    assert!(names(&out).iter().all(|name| name.starts_with(".mats-stream-")), "no final name yet");
    let written = writer.finish(vec![SideFile::new("config.json", "{}")], record()).unwrap();
    assert_eq!(
        names(&out),
        [
            "config.json",
            "merge_report.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json"
        ]
    );
    assert_eq!(written.directory, fs::canonicalize(&out).unwrap());
    assert_eq!(written.files.len(), 2);
    let mut total = 0;
    for file in &written.files {
        let bytes = fs::read(out.join(&file.name)).unwrap();
        assert_eq!(bytes.len() as u64, file.bytes);
        total += file.bytes;
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in parsed.tensors() {
            let expected: &[u8] = match name.as_str() {
                "a" => b"abcde",
                "b" => b"12345678",
                _ => b"",
            };
            assert_eq!(view.data(), expected);
        }
    }
    assert_eq!(total, written.bytes);
    let index: serde_json::Value = serde_json::from_slice(&fs::read(out.join(INDEX_NAME)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 13);
    assert_eq!(index["weight_map"]["b"], "model-00002-of-00002.safetensors");
    // A finished directory is not written over.
    assert!(matches!(OutputDir::claim(&out, &[]), Err(WriteError::NotEmpty { .. })));
}

#[test]
fn a_single_shard_has_no_index() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &Arc::new(OutputLayout::new(vec![spec("a", 1)], u64::MAX).unwrap()));
    writer.write_at(0, 0, b"x").unwrap();
    writer.finish(Vec::new(), record()).unwrap();
    assert_eq!(names(&root.path().join("out")), ["merge_report.json", "model.safetensors"]);
}

#[test]
fn f12_modes_follow_the_umask() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    writer.write_at(0, 0, &[0; 5]).unwrap();
    writer.write_at(2, 0, &[0; 8]).unwrap();
    writer.finish(Vec::new(), record()).unwrap();
    // The umask is the process's: compared with a file made plainly beside it instead of being set.
    fs::write(root.path().join("plain"), b"").unwrap();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode();
    for name in names(&root.path().join("out")) {
        assert_eq!(mode(root.path().join("out").join(name)), mode(root.path().join("plain")));
    }
}

#[test]
fn dropped_unfinished_it_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    writer.write_at(0, 0, b"abcde").unwrap();
    writer.write_file("README.md", b"# x").unwrap();
    assert!(names(&root.path().join("out")).contains(&"README.md".to_owned()));
    drop(writer);
    assert!(names(root.path()).is_empty());
}

#[test]
fn an_incomplete_tensor_is_named_and_nothing_published() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    writer.write_at(2, 0, b"123").unwrap();
    writer.write_at(2, 0, b"123").unwrap(); // written twice, counted once
    writer.write_at(2, 5, b"678").unwrap();
    let error = writer.finish(Vec::new(), record()).unwrap_err();
    assert!(error.to_string().contains("tensor `a` has 0 of 5 bytes (1 more tensors"), "{error}");
    assert!(names(root.path()).is_empty());
}

#[test]
fn writes_outside_a_tensor_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    for (tensor, offset, bytes) in [(0, 1, 5), (0, 6, 0), (0, u64::MAX, 1), (1, 0, 1), (3, 0, 0)] {
        let error = writer.write_at(tensor, offset, &vec![1; bytes]).unwrap_err();
        assert!(matches!(error, WriteError::OutOfRange { .. }), "{error}");
    }
    writer.write_at(1, 0, b"").unwrap();
    writer.write_at(0, 5, b"").unwrap();
}

#[test]
fn a_name_taken_midway_takes_back_what_was_renamed() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    writer.write_at(0, 0, b"abcde").unwrap();
    writer.write_at(2, 0, b"12345678").unwrap();
    let taken = root.path().join("out/model-00002-of-00002.safetensors");
    fs::write(&taken, b"somebody else's").unwrap();
    let error = writer.finish(vec![SideFile::new("config.json", "{}")], record()).unwrap_err();
    assert!(matches!(error, WriteError::NameTaken { .. }), "{error}");
    assert_eq!(names(&root.path().join("out")), ["model-00002-of-00002.safetensors"]);
    assert_eq!(fs::read(&taken).unwrap(), b"somebody else's");
}

#[test]
fn side_files_need_names_of_their_own() {
    let refused = |files: Vec<SideFile>| {
        let root = tempfile::tempdir().unwrap();
        let writer = open(&root, &Arc::new(OutputLayout::new(Vec::new(), 1).unwrap()));
        let error = writer.finish(files, record()).unwrap_err();
        assert!(names(root.path()).is_empty());
        error.to_string()
    };
    assert!(refused(vec![SideFile::new("../evil", "")]).contains("contains a separator"));
    assert!(refused(vec![SideFile::new("model.safetensors", "")]).contains("the checkpoint's own"));
    assert!(refused(vec![SideFile::new(INDEX_NAME, "")]).contains("the checkpoint's own"));
    assert!(refused(vec![record()]).contains("given twice"));
}

#[test]
fn f03_too_little_space_is_seen_before_anything_is_made() {
    let root = tempfile::tempdir().unwrap();
    let layout = Arc::new(OutputLayout::new(vec![spec("a", 1 << 60)], u64::MAX).unwrap());
    let dir = OutputDir::claim(&root.path().join("out"), &[]).unwrap();
    let error = CheckpointWriter::create(dir, layout).unwrap_err();
    assert_eq!(error.exit_class(), ExitClass::NoSpace);
    assert!(error.to_string().contains("no space: need 1.0 EiB, have "), "{error}");
    assert!(names(root.path()).is_empty());
}

#[test]
fn more_shards_than_open_files() {
    let root = tempfile::tempdir().unwrap();
    let count = 3 * MAX_OPEN;
    let layout = OutputLayout::new((0..count).map(|i| spec(&format!("t{i}"), 4)).collect(), 4).unwrap();
    let writer = open(&root, &Arc::new(layout));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let writer = &writer;
            scope.spawn(move || {
                for i in (0..count).rev().filter(|i| i % 4 == thread) {
                    for byte in 0..4 {
                        writer.write_at(i, byte, &[i as u8]).unwrap();
                    }
                }
            });
        }
    });
    assert!(lock(&writer.open).len() <= MAX_OPEN);
    let written = writer.finish(Vec::new(), record()).unwrap();
    for (i, file) in written.files.iter().enumerate() {
        let bytes = fs::read(root.path().join("out").join(&file.name)).unwrap();
        assert_eq!(
            SafeTensors::deserialize(&bytes).unwrap().tensor(&format!("t{i}")).unwrap().data(),
            [i as u8; 4]
        );
    }
}

#[test]
fn a_replaced_temporary_file_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    lock(&writer.open).clear();
    let temporary = writer.shards[0].temporary.clone();
    fs::rename(&temporary, temporary.with_extension("moved")).unwrap();
    assert!(matches!(writer.write_at(0, 0, b"x"), Err(WriteError::TemporaryReplaced { .. })));
    fs::write(&temporary, b"other").unwrap();
    assert!(matches!(writer.write_at(0, 0, b"x"), Err(WriteError::TemporaryReplaced { .. })));
}

#[test]
fn a_failed_fsync_is_never_asked_again() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    writer.write_at(0, 0, b"abcde").unwrap();
    writer.write_at(2, 0, b"12345678").unwrap();
    writer.shards[1].durable.store(SYNC_FAILED, Ordering::Release);
    writer.write_at(2, 0, b"12345678").unwrap(); // writing again does not heal it
    assert!(matches!(writer.sync(), Err(WriteError::NotDurable { .. })));
    let error = writer.finish(Vec::new(), record()).unwrap_err();
    assert_eq!(error.exit_class(), ExitClass::Io);
    assert!(names(root.path()).is_empty());
}

#[test]
fn sync_before_finish_is_done_once_and_noticed_by_later_writes() {
    let root = tempfile::tempdir().unwrap();
    let writer = open(&root, &two_shards());
    assert!(matches!(writer.sync(), Err(WriteError::Incomplete { .. })));
    writer.write_at(0, 0, b"abcde").unwrap();
    writer.write_at(2, 0, b"12345678").unwrap();
    writer.sync().unwrap();
    writer.write_at(0, 0, b"x").unwrap();
    assert_eq!(writer.shards[0].durable.load(Ordering::Acquire), NOT_SYNCED);
    assert_eq!(writer.shards[1].durable.load(Ordering::Acquire), SYNCED);
    writer.finish(Vec::new(), record()).unwrap();
}

#[test]
fn write_back_past_its_threshold_keeps_the_bytes() {
    let root = tempfile::tempdir().unwrap();
    let bytes = WRITE_BACK_BYTES as usize + 12_345;
    let writer = open(&root, &Arc::new(OutputLayout::new(vec![spec("a", bytes)], u64::MAX).unwrap()));
    let block: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
    for start in (0..bytes).step_by(block.len()) {
        let end = bytes.min(start + block.len());
        writer.write_at(0, start as u64, &block[..end - start]).unwrap();
    }
    assert!(writer.shards[0].dirty.load(Ordering::Relaxed) < WRITE_BACK_BYTES);
    let written = writer.finish(Vec::new(), record()).unwrap();
    let file = fs::read(root.path().join("out").join(&written.files[0].name)).unwrap();
    let parsed = SafeTensors::deserialize(&file).unwrap();
    let data = parsed.tensor("a").unwrap().data();
    assert!(data.chunks(block.len()).all(|chunk| *chunk == block[..chunk.len()]));
}

#[test]
fn the_writer_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    shared::<CheckpointWriter>();
}

proptest! {
    #[test]
    fn ranges_join_like_a_set_of_bytes(pieces in prop::collection::vec((0_u64..40, 0_u64..12), 0..20)) {
        let mut joined = Vec::new();
        let mut bytes = vec![false; 64];
        for (start, length) in pieces {
            let piece = start..start + length.max(1);
            bytes[piece.start as usize..piece.end as usize].fill(true);
            insert(&mut joined, piece);
        }
        let mut again = vec![false; 64];
        for piece in &joined {
            again[piece.start as usize..piece.end as usize].fill(true);
        }
        prop_assert_eq!(bytes, again);
        prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}
