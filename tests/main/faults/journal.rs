//! F14: a journal that is cut or damaged, and temporary files that are no longer what it says. The unit tests of the
//! journal cut it at every byte; here whole runs go on from a few of them.

use std::fs;

use super::{assert_same, clean, run, world};
use crate::util::error_line;

/// A run that has all tensors in its journal and has published nothing.
fn almost_done(scratch: &crate::util::Scratch) -> Vec<u8> {
    assert_eq!(run(scratch, &[], "side.write=kill@1").code, 137);
    fs::read(scratch.join("out/.mats-stream-journal")).expect("a journal")
}

#[test]
fn f14_a_cut_or_damaged_journal_resumes_from_its_last_valid_record() {
    let scratch = world();
    let expected = clean(&scratch);
    let journal = almost_done(&scratch);
    let cuts = (0..8).map(|k| journal.len() * k / 8).chain([journal.len() - 1]);
    let cut: Vec<Vec<u8>> = cuts.map(|end| journal[..end].to_vec()).collect();
    let flipped = (1..6).map(|k| {
        let mut bytes = journal.clone();
        bytes[journal.len() * k / 6] ^= 4;
        bytes
    });
    let longer = [journal.clone(), b"0123456789abcdef {}\n".to_vec()].concat();
    for (k, damaged) in cut.into_iter().chain(flipped).chain([longer]).enumerate() {
        let _ = fs::remove_dir_all(scratch.join("out"));
        almost_done(&scratch);
        fs::write(scratch.join("out/.mats-stream-journal"), damaged).expect("write");
        let output = run(&scratch, &["--resume"], "");
        assert_eq!(output.code, 0, "damage {k}: {}", output.stderr);
        assert_same(&scratch, &expected, &format!("damage {k}"));
    }
}

#[test]
fn f14_a_journal_that_lies_about_the_files_is_not_believed() {
    let scratch = world();
    let expected = clean(&scratch);
    let shard = ".mats-stream-model-00001-of-00003.safetensors.partial";
    let count = expected.keys().filter(|name| name.ends_with(".safetensors")).count();
    let shard = shard.replace("00003", &format!("{count:05}"));
    let path = scratch.join("out").join(&shard);
    // Damaged, cut, grown, gone, replaced by a link or by nothing that can be opened.
    let secret = scratch.write("secret", "x");
    let changes: [&dyn Fn(); 6] = [
        &|| {
            let mut bytes = fs::read(&path).expect("there");
            *bytes.last_mut().expect("not empty") ^= 1;
            fs::write(&path, bytes).expect("write");
        },
        &|| {
            let bytes = fs::read(&path).expect("there");
            fs::write(&path, &bytes[..bytes.len() / 2]).expect("write");
        },
        &|| {
            let bytes = fs::read(&path).expect("there");
            fs::write(&path, [bytes, vec![0; 9]].concat()).expect("write");
        },
        &|| fs::remove_file(&path).expect("remove a file"),
        &|| {
            fs::remove_file(&path).expect("remove a file");
            std::os::unix::fs::symlink(&secret, &path).expect("a link");
        },
        &|| {
            fs::remove_file(&path).expect("remove a file");
            fs::write(&path, b"").expect("write");
        },
    ];
    for (k, change) in changes.iter().enumerate() {
        let _ = fs::remove_dir_all(scratch.join("out"));
        almost_done(&scratch);
        change();
        let output = run(&scratch, &["--resume"], "");
        if output.code == 2 {
            // Not a file of ours under our name: left alone, and told.
            assert!(error_line(&output).contains(".mats-stream-model"), "change {k}: {}", output.stderr);
            continue;
        }
        assert_eq!(output.code, 0, "change {k}: {}", output.stderr);
        assert_same(&scratch, &expected, &format!("change {k}"));
    }
    assert_eq!(fs::read(&secret).expect("there"), b"x", "a link is never written through");
}

#[test]
fn f14_a_journal_that_is_no_file_is_somebody_elses() {
    let scratch = world();
    fs::create_dir_all(scratch.join("out/.mats-stream-journal")).expect("create a directory");
    for flags in [&[][..], &["--resume"]] {
        let output = run(&scratch, flags, "");
        assert_eq!(output.code, 2, "{}", output.stderr);
        assert!(error_line(&output).contains(".mats-stream-journal"), "{}", output.stderr);
    }
}
