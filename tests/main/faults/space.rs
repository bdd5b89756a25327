//! F3, F8, F11, F12: full disks, memory limits, file size limits, permissions.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use super::{ARGS, assert_same, clean, run, world};
use crate::util::{Random, Scratch, Tensor, error_line};

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A file system of its own, unmounted at the end; `None` where that is not allowed.
struct Tmpfs<'s>(&'s Path);

impl<'s> Tmpfs<'s> {
    fn mount(path: &'s Path, size: &str) -> Option<Self> {
        fs::create_dir_all(path).expect("create a directory");
        let option = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(path).status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(path))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Two models of 4 MiB, averaged.
fn four_mebibytes() -> Scratch {
    let scratch = Scratch::new();
    let mut random = Random::new(710);
    for model in ["a", "b"] {
        let tensors: Vec<Tensor> =
            (0..4).map(|k| Tensor::random(&format!("w{k}"), "F32", &[512, 512], &mut random)).collect();
        scratch.model(model, &tensors);
    }
    scratch.write("c.yml", "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n");
    scratch
}

#[test]
fn f03_a_full_file_system_is_seen_before_anything_is_made() {
    let scratch = four_mebibytes();
    let small = scratch.join("small");
    let Some(_mounted) = Tmpfs::mount(&small, "3m") else { return };
    let output = scratch.run(&["merge", "c.yml", "--out", "small/out", "--progress", "none"]);
    assert_eq!(output.code, 5, "{}", output.stderr);
    let line = error_line(&output);
    assert!(line.contains("need 5.0 MiB") && line.contains("have 3.0 MiB"), "{line}");
    assert_eq!(fs::read_dir(&small).expect("list").count(), 0, "nothing is left");
    drop(_mounted);
    let Some(_mounted) = Tmpfs::mount(&small, "12m") else { return };
    let output = scratch.run(&["merge", "c.yml", "--out", "small/out", "--progress", "none"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
}

#[test]
fn f03_room_for_the_side_files_is_reserved_before_the_work() {
    let scratch = four_mebibytes();
    scratch.write("a/tokenizer.json", vec![b' '; 3 << 20]);
    let small = scratch.join("small");
    let args = ["merge", "c.yml", "--out", "small/out", "--progress", "none"];
    let Some(_mounted) = Tmpfs::mount(&small, "7m") else { return };
    let output = scratch.run_with(&args, &[("MATS_STREAM_FAIL", "shard.write=kill@1")]);
    assert_eq!(output.code, 5, "not one tensor is written: {}", output.stderr);
    assert!(error_line(&output).contains("need 4.0 MiB"), "{}", output.stderr);
    assert_eq!(fs::read_dir(&small).expect("list").count(), 0, "nothing is left");
    drop(_mounted);
    let Some(_mounted) = Tmpfs::mount(&small, "9m") else { return };
    let output = scratch.run(&args);
    assert_eq!(output.code, 0, "{}", output.stderr);
}

#[test]
fn f03_a_file_system_without_room_for_files_is_seen_before_anything_is_made() {
    let scratch = four_mebibytes();
    let small = scratch.join("small");
    let Some(_mounted) = Tmpfs::mount(&small, "64m,nr_inodes=20") else { return };
    let output = scratch.run(&["merge", "c.yml", "--out", "small/out", "--progress", "none"]);
    assert_eq!(output.code, 5, "{}", output.stderr);
    assert!(error_line(&output).contains("need 33 new files"), "{}", output.stderr);
    assert_eq!(fs::read_dir(&small).expect("list").count(), 0, "nothing is left");
}

/// Reserving blocks is what a quota is asked by: it says no before the work, and the free space says nothing about it.
#[test]
fn f03_a_quota_is_seen_before_the_work() {
    let scratch = four_mebibytes();
    for point in ["shard.reserve", "spare.reserve"] {
        let fail = format!("{point}=edquot;shard.write=kill@1");
        let output = scratch.run_with(&ARGS, &[("MATS_STREAM_FAIL", &fail)]);
        assert_eq!(output.code, 5, "not one tensor is written: {}", output.stderr);
        let line = error_line(&output);
        assert!(line.contains("have an unknown amount") && line.contains("uota exceeded"), "{line}");
        assert!(!scratch.join("out").exists(), "nothing is left");
    }
}

#[test]
fn f03_a_disk_that_fills_up_meanwhile_ends_with_5_and_resumes() {
    let scratch = four_mebibytes();
    let small = scratch.join("small");
    let Some(_mounted) = Tmpfs::mount(&small, "8m") else { return };
    let pause = scratch.join("paused");
    let args = ["merge", "c.yml", "--out", "small/out", "--progress", "none"];
    let mut command = scratch.command(&args);
    command.env("MATS_STREAM_FAIL", "side.write=pause@1").env("MATS_STREAM_PAUSE", &pause);
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().expect("start the binary");
    super::kill::until_exists(&pause);
    // Somebody else takes the rest.
    let _ = fs::write(small.join("filler"), vec![0; 8 << 20]);
    fs::remove_file(&pause).expect("let it go on");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(5));
    let names: Vec<String> = fs::read_dir(small.join("out"))
        .expect("it can be resumed")
        .map(|e| e.expect("list").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().all(|name| name.starts_with('.')), "{names:?}");
    fs::remove_file(small.join("filler")).expect("free space");
    let output = scratch.run(&[&args[..], &["--resume"]].concat());
    assert_eq!(output.code, 0, "{}", output.stderr);
    let verified = scratch.run(&["verify", "small/out"]);
    assert_eq!(verified.code, 0, "{}", verified.stdout);
}

#[test]
fn f08_it_stays_within_a_memory_group() {
    let group = format!("/sys/fs/cgroup/memory/mats-stream-test-{}", std::process::id());
    let group = Path::new(&group);
    if !is_root() || !group.parent().is_some_and(Path::exists) || fs::create_dir(group).is_err() {
        return;
    }
    let scratch = four_mebibytes();
    let limited = fs::write(group.join("memory.limit_in_bytes"), "100663296").is_ok();
    let prelude = format!("echo $$ > {}/cgroup.procs", group.display());
    let output =
        scratch.run_after(&prelude, &[&ARGS[..], &["--max-memory", "48MiB", "--threads", "2"]].concat());
    let _ = fs::remove_dir(group);
    if limited {
        assert_eq!(output.code, 0, "{}", output.stderr);
        assert_eq!(scratch.merged("out").tensors.len(), 4);
    }
}

#[test]
fn f11_a_file_size_limit_is_an_error_and_no_signal() {
    let scratch = four_mebibytes();
    // In blocks of 512 bytes: 1 MiB.
    let output = scratch.run_after("ulimit -f 2048", &ARGS);
    assert_eq!(output.code, 6, "{}", output.stderr);
    error_line(&output);
    let resumed = scratch.run(&[&ARGS[..], &["--resume"]].concat());
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
}

#[test]
fn f12_modes_follow_the_umask_and_a_closed_input_is_bad_input() {
    let scratch = world();
    for (umask, mode) in [("077", 0o600), ("022", 0o644), ("002", 0o664)] {
        let output = scratch.run_after(&format!("umask {umask}"), &ARGS);
        assert_eq!(output.code, 0, "{}", output.stderr);
        for entry in fs::read_dir(scratch.join("out")).expect("written") {
            let entry = entry.expect("list");
            let got = entry.metadata().expect("look at a file").permissions().mode() & 0o777;
            assert_eq!(got, mode, "{:?} under umask {umask}", entry.file_name());
        }
        fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    }
    let closed = scratch.join("a/model.safetensors");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).expect("close a file");
    let mut command = scratch.command(&ARGS);
    if is_root() {
        // Nothing is closed to root.
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o777)).expect("open a directory");
        command.uid(65534);
    }
    let output = scratch.run_command(command, &ARGS);
    assert!(output.code == 2, "exit code {}: {}", output.code, output.stderr);
    assert!(error_line(&output).contains("model.safetensors"));
}

#[test]
fn b30_more_shards_than_descriptors() {
    const SHARDS: usize = 300;
    let scratch = Scratch::new();
    let mut random = Random::new(711);
    for model in ["a", "b"] {
        let tensors: Vec<Tensor> =
            (0..SHARDS).map(|k| Tensor::random(&format!("w{k}"), "F32", &[4, 4], &mut random)).collect();
        scratch.sharded_model(model, &tensors, SHARDS);
    }
    scratch.write("c.yml", "merge_method: linear\nmodels: [{ model: a }, { model: b }]\n");
    for io in ["mmap", "pread"] {
        let flags = ["--io", io, "--out-shard-size", "64"];
        let output = scratch.run_after("ulimit -n 64", &[&ARGS[..], &flags].concat());
        assert_eq!(output.code, 0, "--io {io}: {}", output.stderr);
        assert_eq!(scratch.merged("out").tensors.len(), SHARDS);
        fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    }
    // Resumed, too: every shard is opened again.
    let many = [&ARGS[..], &["--out-shard-size", "64"]].concat();
    let output = scratch.run_with(&many, &[("MATS_STREAM_FAIL", "rename.index=kill")]);
    assert_eq!(output.code, 137);
    let output = scratch.run_after("ulimit -n 64", &[&many[..], &["--resume"]].concat());
    assert_eq!(output.code, 0, "{}", output.stderr);
}

#[test]
fn b32_integer_tensors_are_the_first_models() {
    let scratch = world();
    for (model, last) in [("b", 4.0), ("c", 3.0)] {
        let mut tensors = crate::util::read_safetensors(&scratch.join(format!("{model}/model.safetensors")));
        let ids = tensors.iter_mut().find(|t| t.name == "ids").expect("there");
        *ids = Tensor::new("ids", "I64", &[3], &[1.0, 2.0, last]);
        scratch.model(model, &tensors);
    }
    let expected = clean(&scratch);
    let check = || {
        let merged = scratch.merged("out");
        assert_eq!(merged.tensor("ids"), &Tensor::new("ids", "I64", &[3], &[1.0, 2.0, 3.0]));
        assert_eq!(merged.parameter("ids")["method"], "copy");
        let warnings = merged.report["warnings"].to_string();
        assert!(warnings.contains("`ids` has other values in b"), "{warnings}");
    };
    assert_eq!(run(&scratch, &[], "").code, 0);
    check();
    // Told again by the run that took it over.
    fs::remove_dir_all(scratch.join("out")).expect("remove a directory");
    assert_eq!(run(&scratch, &[], "rename.side=kill@1").code, 137);
    assert_eq!(run(&scratch, &["--resume"], "").code, 0);
    check();
    assert_same(&scratch, &expected, "resumed");
}
