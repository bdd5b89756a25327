use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::read::ExitClass;
use crate::read::testing::{directory, write};

const MODES: [IoMode; 2] = [IoMode::Mmap, IoMode::Pread];

fn open_error(path: &Path) -> ReadError {
    // A FIFO or a device that was waited for would hang here.
    let [mapped, pread] = MODES.map(|io| InputFile::open(path, io).expect_err("must be refused"));
    assert_eq!(mapped.to_string(), pread.to_string());
    assert_eq!(mapped.exit_class(), ExitClass::BadInput);
    mapped
}

#[test]
fn both_modes_return_the_same_bytes() {
    let directory = directory();
    let contents: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let path = write(directory.path(), "f", &contents);
    for io in MODES {
        let file = InputFile::open(&path, io).expect("a regular file");
        assert_eq!((file.len(), file.io_mode(), file.path()), (300_000, io, path.as_path()));
        assert_eq!(file.mapped_addresses().map(|a| a.len()), (io == IoMode::Mmap).then_some(300_000));
        let mut scratch = Vec::new();
        for range in [0..300_000, 0..0, 300_000..300_000, 1..2, 4095..4097, 299_999..300_000] {
            let expected = &contents[range.start as usize..range.end as usize];
            file.will_need(range.clone());
            assert_eq!(file.bytes(range.clone(), &mut scratch).expect("inside"), expected);
            file.release(range.clone(), true);
            assert_eq!(file.bytes(range.clone(), &mut scratch).expect("still there"), expected);
            file.release(range, false);
        }
        file.check_unchanged().expect("nobody touched it");
    }
}

#[test]
fn ranges_outside_the_file_are_refused() {
    let directory = directory();
    let path = write(directory.path(), "f", [1; 10]);
    for io in MODES {
        let file = InputFile::open(&path, io).expect("a regular file");
        #[expect(clippy::reversed_empty_ranges, reason = "a reversed range is one of the cases")]
        for range in [0..11, 11..11, u64::MAX - 1..u64::MAX, 5..4] {
            // Advice on them is ignored.
            file.will_need(range.clone());
            file.release(range.clone(), true);
            let error = file.bytes(range, &mut Vec::new()).expect_err("outside");
            assert!(matches!(error, ReadError::RangePastEnd { len: 10, .. }), "{error}");
        }
    }
}

#[test]
fn an_empty_file_has_no_bytes() {
    let directory = directory();
    let path = write(directory.path(), "f", []);
    for io in MODES {
        let file = InputFile::open(&path, io).expect("a regular file");
        assert!(file.is_empty() && file.bytes(0..0, &mut Vec::new()).expect("inside").is_empty());
        assert!(file.bytes(0..1, &mut Vec::new()).is_err());
    }
}

#[test]
fn b17_only_regular_files_are_opened() {
    let directory = directory();
    let fifo = directory.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs").success());
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    for (path, found) in [
        (directory.path(), "a directory"),
        (&fifo, "a FIFO"),
        (&socket, "a socket"),
        (Path::new("/dev/zero"), "a character device"),
    ] {
        let error = open_error(path);
        assert!(matches!(error, ReadError::NotRegular { found: f, .. } if f == found), "{error}");
        assert!(read_small_file(path, 10).is_err());
    }
    let error = open_error(&directory.path().join("missing"));
    assert!(matches!(error, ReadError::Open { .. }), "{error}");
}

#[test]
fn b18_symlinks() {
    let directory = directory();
    std::fs::create_dir(directory.path().join("blobs")).expect("a directory");
    write(&directory.path().join("blobs"), "0123", b"contents");
    let link = directory.path().join("model.safetensors");
    symlink("blobs/0123", &link).expect("a link");
    for io in MODES {
        let file = InputFile::open(&link, io).expect("links are followed");
        assert_eq!(file.bytes(0..8, &mut Vec::new()).expect("inside"), b"contents");
    }
    let looped = directory.path().join("loop");
    symlink("loop", &looped).expect("a link");
    assert!(matches!(open_error(&looped), ReadError::Open { .. }));
    let dangling = directory.path().join("dangling");
    symlink("nowhere", &dangling).expect("a link");
    assert!(matches!(open_error(&dangling), ReadError::Open { .. }));
    assert!(matches!(read_small_file(&dangling, 10), Err(ReadError::Open { .. })));
}

#[test]
fn changes_are_noticed() {
    let directory = directory();
    for io in MODES {
        let fresh = |name: &str| {
            let path = write(directory.path(), name, vec![1; 10_000]);
            let file = InputFile::open(&path, io).expect("a regular file");
            (path, file)
        };
        let expect = |file: &InputFile, text: &str| {
            let error = file.check_unchanged().expect_err("it changed");
            assert_eq!(error.exit_class(), ExitClass::Changed);
            assert!(error.to_string().contains(text), "{error}");
        };
        let (path, file) = fresh("grown");
        write(directory.path(), "grown", vec![1; 10_001]);
        expect(&file, "got 10001 bytes, expected 10000");

        let (_, same_size) = fresh("rewritten");
        std::thread::sleep(Duration::from_millis(20));
        write(directory.path(), "rewritten", vec![2; 10_000]);
        expect(&same_size, "time differs");

        let (gone_path, gone) = fresh("gone");
        std::fs::remove_file(gone_path).expect("removable");
        expect(&gone, "no longer there");

        let (replaced_path, replaced) = fresh("replaced");
        std::fs::rename(&path, replaced_path).expect("renamable");
        expect(&replaced, "replaced by another file");
    }
}

#[test]
fn a_shrunk_file_is_a_change_to_pread() {
    let directory = directory();
    let path = write(directory.path(), "f", vec![1; 10_000]);
    let file = InputFile::open(&path, IoMode::Pread).expect("a regular file");
    write(directory.path(), "f", vec![1; 5_000]);
    let error = file.bytes(0..10_000, &mut Vec::new()).expect_err("it shrank");
    assert_eq!(error.exit_class(), ExitClass::Changed);
}

#[test]
fn b30_many_files_need_few_descriptors() {
    let directory = directory();
    let open_descriptors = || {
        let links = std::fs::read_dir("/proc/self/fd").expect("procfs").flatten();
        links
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|to| to.starts_with(directory.path()))
            .count()
    };
    for io in MODES {
        let files: Vec<InputFile> = (0..300u32)
            .map(|i| {
                let path = write(directory.path(), &format!("{i}"), i.to_le_bytes());
                InputFile::open(&path, io).expect("a regular file")
            })
            .collect();
        let mut scratch = Vec::new();
        for _ in 0..2 {
            for (i, file) in files.iter().enumerate() {
                assert_eq!(file.bytes(0..4, &mut scratch).expect("inside"), (i as u32).to_le_bytes());
            }
        }
        assert!(open_descriptors() <= 16, "{io:?}: {}", open_descriptors());
        // A file that leaves the pool must come back as itself, or not at all.
        if io == IoMode::Pread {
            std::thread::sleep(Duration::from_millis(20));
            write(directory.path(), "0", 9u32.to_le_bytes());
            let error = files[0].bytes(0..4, &mut scratch).expect_err("replaced meanwhile");
            assert_eq!(error.exit_class(), ExitClass::Changed);
        }
        drop(files);
        assert_eq!(open_descriptors(), 0);
    }
}

#[test]
fn threads_may_read_at_once() {
    let directory = directory();
    let files: Vec<InputFile> = (0..40u8)
        .map(|i| {
            let path = write(directory.path(), &format!("{i}"), vec![i; 5000]);
            InputFile::open(&path, IoMode::Pread).expect("a regular file")
        })
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let files = &files;
            scope.spawn(move || {
                let mut scratch = Vec::new();
                for at in 0..200 {
                    let i = (at * 7 + thread * 11) % files.len();
                    let bytes = files[i].bytes(10..4000, &mut scratch).expect("inside");
                    assert!(bytes.iter().all(|b| usize::from(*b) == i));
                }
            });
        }
    });
}

#[test]
fn small_files_have_a_limit() {
    let directory = directory();
    let path = write(directory.path(), "f", [1; 10]);
    assert_eq!(read_small_file(&path, 10).expect("within the limit"), Some(vec![1; 10]));
    assert!(matches!(read_small_file(&path, 9), Err(ReadError::FileTooLarge { bytes: 10, limit: 9, .. })));
    assert_eq!(read_small_file(&directory.path().join("none"), 9).expect("absent is fine"), None);
}
