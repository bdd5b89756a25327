//! Small safetensors files for the tests of this module and its neighbours: well-formed ones, and any bytes
//! at all.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A tensor to be written: name, dtype's name, shape, bytes.
pub(crate) type Spec<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

/// A file of any header text and any data.
pub(crate) fn raw(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A well-formed file of these tensors, in this order.
pub(crate) fn file(metadata: &[(&str, &str)], tensors: &[Spec<'_>]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    if !metadata.is_empty() {
        let strings: Vec<String> =
            metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        entries.push(format!("\"__metadata__\":{{{}}}", strings.join(",")));
    }
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        entries.push(format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{begin},{}]}}",
            quoted(name),
            data.len()
        ));
    }
    raw(format!("{{{}}}", entries.join(",")), &data)
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON")
}

/// f32 values as stored.
pub(crate) fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A test's own directory.
pub(crate) fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Writes one file and returns its path.
pub(crate) fn write(directory: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).expect("a writable temporary directory");
    path
}

/// A zip archive of stored entries as torch writes one: sizes behind the data, zip64 records at the end.
pub(crate) fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let local = bytes.len() as u32;
        let crc = crc32fast::hash(data);
        let names = name.len() as u16;
        bytes.extend_from_slice(b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0");
        bytes.extend_from_slice(&[0; 12]);
        bytes.extend_from_slice(&names.to_le_bytes());
        bytes.extend_from_slice(&5u16.to_le_bytes());
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(b"FB\x01\0Z");
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(b"PK\x07\x08");
        for word in [crc, data.len() as u32, data.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        directory.extend_from_slice(b"PK\x01\x02\0\0\0\0\x08\x08\0\0\0\0\0\0");
        for word in [crc, data.len() as u32, data.len() as u32] {
            directory.extend_from_slice(&word.to_le_bytes());
        }
        directory.extend_from_slice(&names.to_le_bytes());
        directory.extend_from_slice(&[0; 12]);
        directory.extend_from_slice(&local.to_le_bytes());
        directory.extend_from_slice(name.as_bytes());
    }
    let start = bytes.len() as u64;
    bytes.extend_from_slice(&directory);
    let end = bytes.len() as u64;
    let count = entries.len() as u64;
    bytes.extend_from_slice(b"PK\x06\x06");
    bytes.extend_from_slice(&44u64.to_le_bytes());
    bytes.extend_from_slice(&[0; 12]);
    for wide in [count, count, end - start, start] {
        bytes.extend_from_slice(&wide.to_le_bytes());
    }
    bytes.extend_from_slice(b"PK\x06\x07\0\0\0\0");
    bytes.extend_from_slice(&end.to_le_bytes());
    bytes.extend_from_slice(b"\x01\0\0\0PK\x05\x06\0\0\0\0");
    for narrow in [count as u16, count as u16] {
        bytes.extend_from_slice(&narrow.to_le_bytes());
    }
    for narrow in [(end - start) as u32, start as u32] {
        bytes.extend_from_slice(&narrow.to_le_bytes());
    }
    bytes.extend_from_slice(&[0; 2]);
    bytes
}

/// A pickle of `{name: tensor}`: name, storage, its class and elements, offset, shape, strides; protocol 2.
pub(crate) type Pickled<'a> = (&'a str, &'a str, &'a str, u32, u32, &'a [u32], &'a [u32]);

/// See [`Pickled`].
pub(crate) fn pickle(tensors: &[Pickled<'_>]) -> Vec<u8> {
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.push(b'X');
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    };
    // Four bytes, and a sign: values beyond i32 are not needed.
    let int = |bytes: &mut Vec<u8>, value: u32| {
        bytes.push(b'J');
        bytes.extend_from_slice(&value.to_le_bytes());
    };
    let mut bytes = b"\x80\x02}(".to_vec();
    for (name, storage, class, elements, offset, shape, strides) in tensors {
        text(&mut bytes, name);
        bytes.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut bytes, "storage");
        bytes.extend_from_slice(format!("ctorch\n{class}\n").as_bytes());
        text(&mut bytes, storage);
        text(&mut bytes, "cpu");
        int(&mut bytes, *elements);
        bytes.extend_from_slice(b"tQ");
        int(&mut bytes, *offset);
        for numbers in [shape, strides] {
            bytes.push(b'(');
            numbers.iter().for_each(|number| int(&mut bytes, *number));
            bytes.push(b't');
        }
        bytes.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    bytes.extend_from_slice(b"u.");
    bytes
}
