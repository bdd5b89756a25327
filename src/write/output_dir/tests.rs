use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::super::ExitClass;
use super::*;

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn refusal(path: &Path, inputs: &[PathBuf]) -> WriteError {
    let checked = OutputDir::check(path, inputs).expect_err("check refuses");
    let claimed = OutputDir::claim(path, inputs).expect_err("claim refuses");
    assert_eq!(checked.to_string(), claimed.to_string());
    assert!(!claimed.to_string().contains('\n'));
    claimed
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A model directory with one file.
fn model(parent: &Path, name: &str) -> PathBuf {
    let directory = parent.join(name);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("model.safetensors"), b"x").unwrap();
    directory
}

#[test]
fn b29_output_equal_to_an_input_is_refused() {
    let root = temporary();
    let input = model(root.path(), "in");
    let dotted = root.path().join("in/../in/.");
    for output in [&input, &dotted] {
        let error = refusal(output, std::slice::from_ref(&input));
        assert!(matches!(error, WriteError::OverInput { relation: OverInput::Equal, .. }), "{error}");
        assert_eq!(error.exit_class(), ExitClass::BadInput);
    }
    assert_eq!(names(&input), ["model.safetensors"]);
}

#[test]
fn b29_output_nested_in_an_input_is_refused() {
    let root = temporary();
    let input = model(root.path(), "in");
    for nested in ["out", "a/b/c"] {
        let error = refusal(&input.join(nested), std::slice::from_ref(&input));
        assert!(matches!(error, WriteError::OverInput { relation: OverInput::Inside, .. }), "{error}");
    }
    assert_eq!(names(&input), ["model.safetensors"], "nothing was made");
}

#[test]
fn b29_output_around_an_input_is_refused() {
    let root = temporary();
    let input = model(root.path(), "out/in");
    let file = input.join("model.safetensors");
    for input in [input, file] {
        let error = refusal(&root.path().join("out"), &[input]);
        assert!(matches!(error, WriteError::OverInput { relation: OverInput::Around, .. }), "{error}");
    }
}

#[test]
fn b29_symbolic_links_to_and_into_an_input_are_refused() {
    let root = temporary();
    let input = model(root.path(), "in");
    let link = root.path().join("link");
    symlink(&input, &link).unwrap();
    assert!(matches!(
        refusal(&link, std::slice::from_ref(&input)),
        WriteError::OverInput { relation: OverInput::Equal, .. }
    ));
    let inside = refusal(&link.join("out"), std::slice::from_ref(&input));
    assert!(matches!(inside, WriteError::OverInput { relation: OverInput::Inside, .. }));
    // And the other way round: the input is the link.
    assert!(matches!(refusal(&input, &[link]), WriteError::OverInput { relation: OverInput::Equal, .. }));
}

#[test]
fn b29_a_link_to_nothing_or_to_itself_is_refused() {
    let root = temporary();
    let dangling = root.path().join("dangling");
    symlink(root.path().join("absent"), &dangling).unwrap();
    assert!(matches!(refusal(&dangling, &[]), WriteError::NotADirectory { .. }));
    assert!(matches!(refusal(&dangling.join("out"), &[]), WriteError::NotADirectory { .. }));
    let looped = root.path().join("loop");
    symlink(&looped, &looped).unwrap();
    assert_eq!(refusal(&looped, &[]).exit_class(), ExitClass::BadInput);
}

#[test]
fn b29_a_sibling_of_a_single_file_input_works() {
    let root = temporary();
    let input = model(root.path(), "in").join("model.safetensors");
    let claimed = OutputDir::claim(&root.path().join("in/merged"), std::slice::from_ref(&input)).unwrap();
    drop(claimed);
    assert_eq!(names(&root.path().join("in")), ["model.safetensors"]);
    // The file itself is no directory to write to.
    let error = refusal(&input, std::slice::from_ref(&input));
    assert!(matches!(error, WriteError::OverInput { relation: OverInput::Equal, .. }), "{error}");
}

#[test]
fn b29_a_non_empty_directory_is_refused_and_said_to_hold_what() {
    let root = temporary();
    for name in ["a", "b", "c\n", "d", "e", "f"] {
        fs::write(root.path().join(name), b"").unwrap();
    }
    let error = refusal(root.path(), &[]);
    assert!(error.to_string().contains("it holds `a`, `b`, `c\\n`, `d` and 2 more (expected"), "{error}");
    assert_eq!(error.exit_class().code(), 2);
    assert_eq!(names(root.path()).len(), 6);
}

#[test]
fn b29_a_file_or_a_place_below_a_file_is_refused() {
    let root = temporary();
    let file = root.path().join("file");
    fs::write(&file, b"x").unwrap();
    assert!(refusal(&file, &[]).to_string().contains("is a regular file"));
    assert_eq!(refusal(&file.join("out"), &[]).exit_class(), ExitClass::BadInput);
    assert_eq!(refusal(Path::new(""), &[]).exit_class(), ExitClass::BadInput);
    assert_eq!(refusal(&root.path().join("absent/../out"), &[]).exit_class(), ExitClass::BadInput);
}

#[test]
#[cfg(target_os = "linux")]
fn b29_a_read_only_place_is_bad_input() {
    // Refused to root too, in a container (read-only) as well as outside (no such operation).
    let error = OutputDir::claim(Path::new("/sys/mats-stream-test/out"), &[]).unwrap_err();
    assert!(matches!(error, WriteError::Unusable { .. }), "{error}");
    assert_eq!(error.exit_class(), ExitClass::BadInput);
}

#[test]
fn b29_a_read_only_directory_is_bad_input() {
    if rustix::process::geteuid().is_root() {
        return; // nothing is read-only to root
    }
    let root = temporary();
    let closed = root.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    for path in [closed.clone(), closed.join("out")] {
        assert_eq!(OutputDir::claim(&path, &[]).unwrap_err().exit_class(), ExitClass::BadInput);
    }
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn b29_another_file_system_and_odd_names_work() {
    let root = temporary();
    let input = model(root.path(), "in");
    let odd = root.path().join("ein Ordner/ünï ✓ 名前");
    drop(OutputDir::claim(&odd, std::slice::from_ref(&input)).unwrap());
    if let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") {
        drop(OutputDir::claim(&elsewhere.path().join("out"), &[input]).unwrap());
        assert!(names(elsewhere.path()).is_empty());
    }
    assert_eq!(names(root.path()), ["in"]);
}

#[test]
fn absent_inputs_are_left_to_their_readers() {
    let root = temporary();
    OutputDir::check(&root.path().join("out"), &[root.path().join("absent")]).unwrap();
    assert!(names(root.path()).is_empty(), "a check makes nothing");
}

#[test]
fn f10_the_second_run_is_locked_out_until_the_first_ends() {
    let root = temporary();
    let out = root.path().join("out");
    let first = OutputDir::claim(&out, &[]).unwrap();
    let error = refusal(&out, &[]);
    assert!(matches!(error, WriteError::Locked { .. }), "{error}");
    assert_eq!(error.exit_class().code(), 75);
    // While the first one publishes, final names are there: the second still has to wait, not to give
    // up.
    fs::write(out.join("model.safetensors"), b"x").unwrap();
    assert_eq!(refusal(&out, &[]).exit_class(), ExitClass::Locked);
    fs::remove_file(out.join("model.safetensors")).unwrap();
    drop(first);
    drop(OutputDir::claim(&out, &[]).unwrap());
    assert!(names(root.path()).is_empty());
}

#[test]
fn many_claims_at_once_have_one_winner_at_a_time() {
    let root = temporary();
    let out = root.path().join("out");
    let inside = std::sync::atomic::AtomicU32::new(0);
    let won = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..200 {
                    // A directory that a loser or a past winner just removed is refused, too: tried
                    // again here.
                    if let Ok(claimed) = OutputDir::claim(&out, &[]) {
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        won.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(claimed);
                    }
                }
            });
        }
    });
    assert!(won.into_inner() > 0);
    // Whoever made the directory may have lost the lock to another, who then did not make it: it can
    // stay, but empty.
    drop(OutputDir::claim(&out, &[]).unwrap());
    assert!(!out.exists() || names(&out).is_empty());
}

#[test]
fn leftovers_of_a_dead_run_are_removed_and_nothing_else() {
    let root = temporary();
    for name in [LOCK_NAME, ".mats-stream-model.safetensors.partial"] {
        fs::write(root.path().join(name), b"old").unwrap();
    }
    let claimed = OutputDir::claim(root.path(), &[]).unwrap();
    assert_eq!(names(root.path()), [LOCK_NAME]);
    drop(claimed);
    assert!(names(root.path()).is_empty(), "the directory was not ours to remove");

    // Died between two renames: final names are the user's to remove.
    fs::write(root.path().join(".mats-stream-model-00002-of-00002.safetensors.partial"), b"old").unwrap();
    fs::write(root.path().join("model-00001-of-00002.safetensors"), b"new").unwrap();
    let error = refusal(root.path(), &[]);
    assert!(error.to_string().contains("left by a run that died"), "{error}");
    assert_eq!(names(root.path()).len(), 2);
}

#[test]
fn only_regular_files_of_our_names_are_ours() {
    let root = temporary();
    let target = root.path().join("precious");
    fs::write(&target, b"x").unwrap();
    let out = root.path().join("out");
    fs::create_dir(&out).unwrap();
    symlink(&target, out.join(LOCK_NAME)).unwrap();
    assert!(matches!(refusal(&out, &[]), WriteError::NotEmpty { .. }));
    fs::remove_file(out.join(LOCK_NAME)).unwrap();
    fs::create_dir(out.join(".mats-stream-x.partial")).unwrap();
    assert!(matches!(refusal(&out, &[]), WriteError::NotEmpty { .. }));
    assert_eq!(fs::read(&target).unwrap(), b"x");
}

#[test]
fn drop_removes_only_what_it_made_and_only_if_empty() {
    let root = temporary();
    let out = root.path().join("a/b/c");
    let claimed = OutputDir::claim(&out, &[]).unwrap();
    fs::write(root.path().join("a/b/note"), b"somebody else's").unwrap();
    drop(claimed);
    assert_eq!(names(&root.path().join("a/b")), ["note"]);
}

#[test]
fn a_relative_path_survives_in_messages_only() {
    let claimed = OutputDir::claim(Path::new("target/mats-stream-relative-test"), &[]).unwrap();
    assert!(claimed.path().is_absolute());
    assert_eq!(claimed.shown(), Path::new("target/mats-stream-relative-test"));
}

#[test]
fn publish_keeps_the_directory_and_unlocks_it() {
    let root = temporary();
    let out = root.path().join("sweep");
    let claimed = OutputDir::claim(&out, &[]).unwrap();
    let inner = OutputDir::claim(&out.join("ridge=0.1"), &[]).unwrap();
    drop(inner);
    claimed.publish(SideFile::new("sweep.json", "{}\n")).unwrap();
    assert_eq!(names(&out), ["sweep.json"]);
    let other = OutputDir::claim(&root.path().join("other"), &[]).unwrap();
    assert!(matches!(other.publish(SideFile::new("../x", "")), Err(WriteError::BadSideName { .. })));
    assert_eq!(names(root.path()), ["sweep"]);
}
