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
