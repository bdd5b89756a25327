use super::*;
use crate::read::Dtype;
use crate::read::testing::{Pickled, directory, f32s, pickle, write, zip};

const GOOD: Pickled<'_> = ("a", "0", "FloatStorage", 6, 0, &[2, 3], &[3, 1]);

fn data() -> Vec<u8> {
    f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
}

/// Opens both ways, which must agree.
fn open(bytes: &[u8]) -> Result<TorchFile, ReadError> {
    let directory = directory();
    let path = write(directory.path(), "x.pt", bytes);
    let [mapped, pread] = [IoMode::Mmap, IoMode::Pread].map(|io| TorchFile::open(&path, io, 0));
    assert_eq!(mapped.as_ref().err().map(ToString::to_string), pread.err().map(|e| e.to_string()));
    if let Ok(file) = &mapped {
        file.storages.check(&file.file)?;
    }
    mapped
}

fn archive(tensors: &[Pickled<'_>], data: &[u8]) -> Vec<u8> {
    zip(&[("x/data.pkl", &pickle(tensors)), ("x/data/0", data), ("x/version", b"3\n")])
}

fn refused(bytes: &[u8], expected: &str) {
    let error = open(bytes).expect_err("must be refused");
    assert_eq!(error.exit_class(), crate::read::ExitClass::BadInput);
    let text = error.to_string();
    assert!(text.contains(expected), "{text}\ndoes not say: {expected}");
    assert!(text.contains("x.pt: ") && !text.chars().any(char::is_control), "{text:?}");
}

fn replaced(bytes: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let at = bytes.windows(old.len()).position(|w| w == old).expect("is there");
    [&bytes[..at], new, &bytes[at + old.len()..]].concat()
}

#[test]
fn tensors_are_ranges_of_the_file() {
    let bytes = archive(&[GOOD, ("b", "0", "FloatStorage", 6, 4, &[2], &[1])], &data());
    let file = open(&bytes).expect("as torch writes it");
    let [a, b] = &file.tensors[..] else { panic!("{:?}", file.tensors) };
    assert_eq!((a.dtype, &a.shape[..], a.bytes), (Dtype::F32, &[2, 3][..], 24));
    assert_eq!(&bytes[a.offset as usize..][..24], &data()[..]);
    assert_eq!((b.offset, b.bytes), (a.offset + 16, 8));
    // Scalars, empty tensors, sides of one with any stride.
    for (shape, strides, bytes) in
        [(&[][..], &[][..], 4), (&[0, 7], &[9, 9], 0), (&[1, 6, 1], &[5, 1, 5], 24), (&[3, 2], &[2, 1], 24)]
    {
        let tensors = [("a", "0", "FloatStorage", 6, 0, shape, strides)];
        assert_eq!(open(&archive(&tensors, &data())).expect("legal").tensors[0].bytes, bytes);
    }
}

#[test]
fn views_that_reach_elsewhere_are_refused() {
    let with = |tensor: Pickled<'_>| archive(&[tensor], &data());
    for (tensor, expected) in [
        (
            ("a", "0", "FloatStorage", 6, 1, &[2, 3][..], &[3, 1][..]),
            "got elements 1..7, expected them within 0..6",
        ),
        (("a", "0", "FloatStorage", 6, 0, &[3, 3], &[3, 1]), "reaches beyond"),
        (("a", "0", "FloatStorage", 7, 0, &[2, 3], &[3, 1]), "wrong size (got 24 bytes"),
        (("a", "0", "DoubleStorage", 6, 0, &[2, 3], &[3, 1]), "wrong size (got 24 bytes"),
        (("a", "1", "FloatStorage", 6, 0, &[2, 3], &[3, 1]), "lacks"),
        (("a", "../data/0", "FloatStorage", 6, 0, &[2, 3], &[3, 1]), "lacks"),
        (("a", "0", "FloatStorage", 6, 0, &[2, 3], &[1, 2]), "strided view"),
        (("a", "0", "FloatStorage", 6, 0, &[6, 6], &[0, 1]), "strided view"),
        (("a", "0", "FloatStorage", 6, 0, &[2, 3], &[0, 1]), "strided view"),
        (("a", "0", "FloatStorage", 6, 0, &[2, 2], &[3, 1]), "strided view"),
        // 2³¹-1 three times, and four: over 64 bits.
        (("a", "0", "FloatStorage", 6, 0, &[0x7fff_ffff; 3], &[0, 0, 0]), "overflows"),
        (("a", "0", "FloatStorage", 6, 0, &[0x7fff_ffff; 2], &[0x7fff_ffff, 1]), "reaches beyond"),
    ] {
        refused(&with(tensor), expected);
    }
}

#[test]
fn archives_are_read_by_the_letter() {
    let good = archive(&[GOOD], &data());
    open(&good).expect("good");
    refused(&good[..good.len() - 1], "no end record");
    refused(&[good.as_slice(), b"x"].concat(), "no end record");
    refused(&[good.as_slice(), &good].concat(), "malformed archive");
    refused(b"PK\x03\x04", "at least 22");
    // Something before it, something between.
    refused(&[b"PK\x03\x04junk".as_slice(), &good].concat(), "malformed archive");
    // Compressed, encrypted, in both headers as a writer would.
    let pickle = pickle(&[GOOD]);
    let good_entries: [(&str, &[u8]); 3] =
        [("x/data.pkl", &pickle), ("x/data/0", &data()), ("x/version", b"3\n")];
    let patched = |flags: &[u8; 2], method: u8| {
        let mut bytes = good.clone();
        for (signature, at) in [(b"PK\x03\x04", 6), (b"PK\x01\x02", 8)] {
            let places: Vec<usize> =
                bytes.windows(4).enumerate().filter(|(_, w)| w == signature).map(|(k, _)| k).collect();
            for place in places {
                bytes[place + at..place + at + 2].copy_from_slice(flags);
                bytes[place + at + 2] = method;
            }
        }
        bytes
    };
    refused(&patched(b"\x08\x08", 8), "is compressed (got method 8");
    refused(&patched(b"\x09\x08", 0), "encrypted");
    // Without the flag for sizes behind the data, they must stand in the header.
    refused(&patched(b"\0\0", 0), "other sizes in its header");
    // The two headers of one entry disagree.
    refused(&replaced(&good, b"x/data/0FB", b"x/data/1FB"), "differs between its header and the directory");
    // Names.
    for name in ["x/../data.pkl", "/x/data.pkl", "x//y", "x\\y", "./x", "x/a\n", "x/data/"] {
        let mut entries = good_entries.to_vec();
        entries.push((name, b"1"));
        refused(&zip(&entries), "leads elsewhere");
    }
    let mut entries = good_entries.to_vec();
    entries.push(("x/version", b"3\n"));
    refused(&zip(&entries), "is there twice");
    let mut entries = good_entries.to_vec();
    entries.push(("y/data.pkl", b"3\n"));
    refused(&zip(&entries), "two directories");
    refused(&zip(&good_entries[1..]), "has no data.pkl");
    refused(&zip(&[]), "no zip archive");
    let mut entries = good_entries.to_vec();
    entries.push(("x/byteorder", b"big"));
    refused(&zip(&entries), "byte order `big`");
}

#[test]
fn entries_may_not_overlap_or_lie() {
    let good = archive(&[GOOD], &data());
    // The directory says another length than the header's trailing record leaves room for.
    let central = good.windows(4).rposition_of(b"PK\x01\x02", 1);
    for (at, value, expected) in [
        (24usize, 25u32, "two sizes"),
        (42, 0, "overlaps"),
        (42, 7, "differs"),
        (42, u32::MAX, "lacks its zip64 sizes"),
        (42, 0x7fff_ffff, "reaches into the directory"),
    ] {
        let mut bytes = good.clone();
        bytes[central + at..central + at + 4].copy_from_slice(&value.to_le_bytes());
        let error = open(&bytes).expect_err("must be refused").to_string();
        assert!(
            error.contains(expected) || error.contains("belong to no entry") || error.contains("overlaps"),
            "{error}\ndoes not say: {expected}"
        );
    }
    // A length over the whole rest of the file: a bomb by overlap.
    let mut bytes = good.clone();
    for at in [20, 24] {
        bytes[central + at..central + at + 4].copy_from_slice(&(good.len() as u32).to_le_bytes());
    }
    refused(&bytes, "reaches into the directory");
    // Counts and places of the directory.
    let end = good.len() - 22;
    for (at, value) in [(8, 9u8), (10, 9), (12, 9), (16, 9), (4, 1)] {
        let mut bytes = good.clone();
        bytes[end + at] = value;
        refused(&bytes, "malformed archive");
    }
}

/// The place of the `n`-th window, counted from 0, that is `wanted`.
trait Windows {
    fn rposition_of(self, wanted: &[u8], n: usize) -> usize;
}

impl<'a, I: Iterator<Item = &'a [u8]>> Windows for I {
    fn rposition_of(self, wanted: &[u8], n: usize) -> usize {
        self.enumerate().filter(|(_, w)| *w == wanted).nth(n).map(|(at, _)| at).expect("is there")
    }
}

#[test]
fn every_cut_and_every_flipped_byte_is_survived() {
    let good = archive(&[GOOD], &data());
    for len in 0..good.len() {
        assert!(open(&good[..len]).is_err(), "cut at {len}");
    }
    let reference = open(&good).expect("good").tensors;
    for at in 0..good.len() {
        for flip in [1u8, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            // Bytes that mean nothing to anybody (times, versions) may change; what is read may not.
            if let Ok(file) = open(&bytes) {
                assert_eq!(file.tensors, reference, "byte {at} ^ {flip:#x}");
            }
        }
    }
}

#[test]
fn damage_shows_unless_the_writer_left_checksums_out() {
    let good = archive(&[GOOD], &data());
    refused(&replaced(&good, &6.0f32.to_le_bytes(), &7.0f32.to_le_bytes()), "`x/data/0` is damaged");
    refused(&replaced(&good, b"cpu", b"gpu"), "`x/data.pkl` is damaged");
    let mut without = good.clone();
    for k in 0..3 {
        let central = good.windows(4).rposition_of(b"PK\x01\x02", k);
        without[central + 16..central + 20].fill(0);
    }
    let file =
        open(&replaced(&without, &6.0f32.to_le_bytes(), &7.0f32.to_le_bytes())).expect("nothing to compare");
    assert!(file.warnings[0].contains("without checksums"), "{:?}", file.warnings);
}

#[test]
fn the_old_format_is_refused_with_a_hint() {
    refused(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "save it again with torch.save");
    refused(b"", "save it again");
}
