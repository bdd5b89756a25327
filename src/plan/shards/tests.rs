use std::collections::HashMap;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;

fn spec(name: &str, dtype: &str, shape: &[usize]) -> TensorSpec {
    let bytes = stored_bytes(shape, dtype_bits(dtype).expect("known dtype")).expect("whole bytes");
    TensorSpec { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec(), bytes }
}

/// The file as it will be, with zeros for data.
fn file_of(shard: &ShardLayout) -> Vec<u8> {
    let mut file = shard.header.clone();
    file.resize(usize::try_from(shard.file_bytes).expect("small"), 0);
    file
}

#[test]
fn one_small_shard_by_hand() {
    let layout =
        OutputLayout::new(vec![spec("a", "F32", &[2, 3]), spec("b", "BF16", &[])], u64::MAX).unwrap();
    let shard = &layout.shards()[0];
    assert_eq!(shard.file_name, "model.safetensors");
    let json = concat!(
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"#,
        r#""b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}"#,
    );
    let padded = json.len().next_multiple_of(8);
    assert_eq!(shard.header[..8], (padded as u64).to_le_bytes());
    assert_eq!(std::str::from_utf8(&shard.header[8..]).unwrap(), format!("{json:padded$}"));
    assert_eq!(shard.file_bytes, 8 + padded as u64 + 26);
    assert_eq!(layout.locate(1), Some((0, shard.data_start + 24)));
    assert_eq!(layout.locate(2), None);
    assert_eq!(layout.index_json(), None);
}

#[test]
fn a_tensor_larger_than_the_limit_is_alone() {
    let specs =
        vec![spec("a", "U8", &[4]), spec("big", "U8", &[50]), spec("b", "U8", &[6]), spec("c", "U8", &[4])];
    let layout = OutputLayout::new(specs, 10).unwrap();
    let members: Vec<Vec<usize>> =
        layout.shards().iter().map(|shard| shard.tensors.iter().map(|t| t.spec).collect()).collect();
    assert_eq!(members, [vec![0], vec![1], vec![2, 3]]);
    assert_eq!(layout.shards()[1].file_name, "model-00002-of-00003.safetensors");
    let index: Value = serde_json::from_slice(&layout.index_json().unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 64);
    let names: Vec<&String> = index["weight_map"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["a", "b", "big", "c"]);
    assert_eq!(index["weight_map"]["big"], "model-00002-of-00003.safetensors");
}

#[test]
fn wide_dtypes_come_first_only_where_the_order_would_misalign_them() {
    let kept = OutputLayout::new(vec![spec("m", "BOOL", &[8]), spec("w", "F32", &[2])], u64::MAX).unwrap();
    assert_eq!(kept.shards()[0].tensors[0].spec, 0);
    let moved = OutputLayout::new(vec![spec("m", "BOOL", &[3]), spec("w", "F32", &[2])], u64::MAX).unwrap();
    assert_eq!(moved.shards()[0].tensors[0].spec, 1);
    assert_eq!(moved.locate(0), Some((0, moved.shards()[0].data_start + 8)));
}

#[test]
fn no_tensors_make_one_valid_file() {
    let layout = OutputLayout::new(Vec::new(), 1).unwrap();
    assert_eq!(layout.shards().len(), 1);
    assert!(SafeTensors::deserialize(&file_of(&layout.shards()[0])).unwrap().is_empty());
}

#[test]
fn a_header_past_its_limit_splits_the_shard() {
    let specs: Vec<_> = (0..40).map(|i| spec(&format!("layers.{i}.weight"), "F32", &[1])).collect();
    let layout = OutputLayout::with_header_limit(specs, u64::MAX, 1000).unwrap();
    assert!(layout.shards().len() > 1);
    assert!(layout.shards().iter().all(|shard| shard.header.len() - 8 <= 1000));
    let long = vec![spec(&"n".repeat(1000), "F32", &[1])];
    assert!(matches!(
        OutputLayout::with_header_limit(long, u64::MAX, 1000),
        Err(LayoutError::EntryTooLarge { bytes, .. }) if bytes > 1000
    ));
}

#[test]
fn refusals_name_the_tensor() {
    let refused = |specs: Vec<TensorSpec>| OutputLayout::new(specs, 100).unwrap_err().to_string();
    assert!(refused(vec![spec("__metadata__", "F32", &[1])]).contains("__metadata__"));
    assert!(
        refused(vec![spec("a", "F32", &[1]), spec("a", "F32", &[1])]).starts_with("tensor `a`: named twice")
    );
    let odd = TensorSpec { dtype: "F33\n".into(), ..spec("a", "F32", &[1]) };
    assert_eq!(refused(vec![odd]), "tensor `a`: dtype `F33\\n` is none of safetensors'");
    let wrong = TensorSpec { bytes: 5, ..spec("a", "F32", &[1]) };
    assert_eq!(refused(vec![wrong]), "tensor `a`: F32 [1] does not take 5 bytes (expected 4)");
    let overflow = TensorSpec { shape: vec![1 << 40, 1 << 40], ..spec("a", "F32", &[1]) };
    assert!(refused(vec![overflow]).contains("below 2^64"));
    let mut huge: Vec<_> = (0..4).map(|i| spec(&i.to_string(), "U8", &[1 << 60])).collect();
    huge.push(spec("c", "U8", &[1]));
    assert!(refused(huge).starts_with("tensor `c`: the output passes"));
    assert!(matches!(OutputLayout::new(Vec::new(), 0), Err(LayoutError::ZeroShardSize)));
}

#[test]
fn half_byte_dtypes_must_fill_whole_bytes() {
    let even = TensorSpec { name: "a".into(), dtype: "F4".into(), shape: vec![4], bytes: 2 };
    assert!(OutputLayout::new(vec![even.clone()], 100).is_ok());
    let odd = TensorSpec { shape: vec![3], ..even };
    assert!(matches!(
        OutputLayout::new(vec![odd], 100),
        Err(LayoutError::SizeMismatch { expected: None, .. })
    ));
}

fn any_specs() -> impl Strategy<Value = Vec<TensorSpec>> {
    let dtype = prop::sample::select(vec!["BOOL", "I8", "F16", "BF16", "F32", "I64", "F64"]);
    let shape = prop::collection::vec(0_usize..7, 0..4);
    // Any text is a name: quotes, control characters, other scripts, the empty string.
    let one = (any::<String>(), dtype, shape);
    prop::collection::vec(one, 0..30).prop_map(|drawn| {
        let unique: HashMap<String, (&str, Vec<usize>)> =
            drawn.into_iter().filter(|d| d.0 != METADATA_KEY).map(|(n, d, s)| (n, (d, s))).collect();
        unique.into_iter().map(|(name, (dtype, shape))| spec(&name, dtype, &shape)).collect()
    })
}

proptest! {
    #[test]
    fn every_layout_is_a_readable_contiguous_partition(specs in any_specs(), shard_bytes in 1_u64..2000) {
        let layout = OutputLayout::new(specs.clone(), shard_bytes).unwrap();
        let mut seen = vec![0; specs.len()];
        for (number, shard) in layout.shards().iter().enumerate() {
            let file = file_of(shard);
            let parsed = SafeTensors::deserialize(&file).unwrap();
            prop_assert_eq!(parsed.len(), shard.tensors.len());
            prop_assert_eq!(shard.data_start, shard.header.len() as u64);
            prop_assert_eq!(shard.data_start % 8, 0);
            let mut next = shard.data_start;
            for placed in &shard.tensors {
                let spec = &specs[placed.spec];
                seen[placed.spec] += 1;
                prop_assert_eq!(placed.offset, next);
                prop_assert_eq!(placed.offset % alignment(spec), 0);
                prop_assert_eq!(layout.locate(placed.spec), Some((number, placed.offset)));
                next += placed.bytes;
                let view = parsed.tensor(&spec.name).unwrap();
                prop_assert_eq!(view.shape(), &spec.shape[..]);
                prop_assert_eq!(view.dtype().to_string(), spec.dtype.clone());
                prop_assert_eq!(view.data().len() as u64, spec.bytes);
            }
            prop_assert_eq!(next, shard.file_bytes);
            let data: u64 = shard.tensors.iter().map(|t| t.bytes).sum();
            prop_assert!(data <= shard_bytes || shard.tensors.iter().filter(|t| t.bytes > 0).count() == 1);
        }
        prop_assert!(seen.iter().all(|&times| times == 1));
        // Shards partition the output order into runs.
        let first = |shard: &ShardLayout| shard.tensors.iter().map(|t| t.spec).min();
        let firsts: Vec<usize> = layout.shards().iter().filter_map(first).collect();
        prop_assert!(firsts.is_sorted());
    }
}
