//! safetensors files that lie about themselves.

use serde_json::json;

use super::{LINEAR, good_weight, refuse_file, refuse_model_b, with_good_model};
use crate::util::{
    Random, Scratch, Tensor, error_line, raw_safetensors, safetensors, safetensors_aligned, sparse,
};

/// A header of these entries over `data` bytes of zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    raw_safetensors(header.as_bytes(), &vec![0; data])
}

fn entry(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn b01_short_files() {
    refuse_file(b"", &[]);
    refuse_file(&[1, 0, 0, 0, 0, 0, 0], &[]);
    // A length and nothing else.
    refuse_file(&[0; 8], &[]);
}

#[test]
fn b02_header_length_lies() {
    let header = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    refuse_file(&header(u64::MAX), &[]);
    refuse_file(&header(100_000_001), &["100000000"]);
    refuse_file(&header(1 << 63), &[]);
    refuse_file(&header(3), &[]);
    // The limit holds where the file is as long as it says, too.
    let scratch = with_good_model();
    scratch.write("b/config.json", "{}");
    sparse(&scratch.join("b/model.safetensors"), &100_000_001u64.to_le_bytes(), 100_000_009 + 48);
    refuse_model_b(&scratch, &["b/model.safetensors", "100000000"]);
}

#[test]
fn b03_header_is_no_json() {
    let good = format!("{{{}}}", entry("w", "F32", "[3,4]", 0, 48));
    refuse_file(&raw_safetensors(b"{\"w\xff\":{}}", &[]), &[]);
    refuse_file(&file("not json", 48), &[]);
    refuse_file(&file(&good[..good.len() - 1], 48), &[]);
    refuse_file(&file(&format!(" {good}"), 48), &[]);
    refuse_file(&file(&format!("\u{feff}{good}"), 48), &[]);
    refuse_file(&file(&format!("{good}\0\0\0\0"), 48), &[]);
    refuse_file(&file("[1, 2]", 48), &[]);
    refuse_file(&file(&format!("{good}{good}"), 48), &[]);
    refuse_file(&file(r#"{"__metadata__":{"format":1}}"#, 0), &[]);
}

#[test]
fn b04_nested_json_does_not_overflow_the_stack() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    refuse_file(&file(&deep, 0), &[]);
    refuse_file(
        &file(&format!(r#"{{"w":{{"dtype":"F32","shape":{deep},"data_offsets":[0,48]}}}}"#), 48),
        &[],
    );
    refuse_file(
        &file(&format!(r#"{{"w":{{"dtype":"F32","shape":[3,4],"data_offsets":[0,48],"x":{deep}}}}}"#), 48),
        &[],
    );
}

/// A header of `count` empty tensors.
fn empty_tensors(count: usize) -> Vec<u8> {
    let entries: Vec<String> =
        (0..count).map(|k| format!(r#""{k}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    raw_safetensors(format!("{{{}}}", entries.join(",")).as_bytes(), &[])
}

#[test]
fn b05_too_many_tensors() {
    refuse_file(&empty_tensors(1_000_001), &["1000000"]);
}

#[test]
fn b05_metadata_counts_against_the_memory_budget() {
    let scratch = Scratch::new();
    let file = empty_tensors(300_000);
    scratch.write("a/model.safetensors", &file);
    scratch.write("b/model.safetensors", &file);
    // What it takes to know 300 000 tensors twice, at 28 bytes each at the very least, is counted: this is less.
    let least = |line: &str| -> u64 {
        let (_, rest) = line.split_once("at least ").expect("the least is named");
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("in bytes")
    };
    let refused = least(&scratch.refuse_with(LINEAR, &["--max-memory", "16MiB"], &["memory"]));
    scratch.model("a", &[good_weight(1)]);
    scratch.model("b", &[good_weight(2)]);
    let little = least(&scratch.refuse_with(LINEAR, &["--max-memory", "1"], &["memory"]));
    assert!(refused >= little + 600_000 * 28, "{refused} for 300 000 tensors, {little} for one");
}

#[test]
fn b06_duplicate_tensor() {
    let first = entry("twice", "F32", "[3,4]", 0, 48);
    let same = entry("twice", "F32", "[3,4]", 48, 96);
    let other = entry("twice", "F32", "[2,2]", 48, 64);
    refuse_file(&file(&format!("{{{first},{same}}}"), 96), &["twice"]);
    refuse_file(&file(&format!("{{{first},{other}}}"), 64), &["twice"]);
    refuse_file(&file(&format!("{{{first},{first}}}"), 48), &["twice"]);
}

#[test]
fn b07_layout_lies() {
    let v = |start, end| entry("v", "F32", "[2,2]", start, end);
    let w = |start, end| entry("w", "F32", "[3,4]", start, end);
    // A hole before the second tensor, one before the first, an overlap, two names on one span.
    refuse_file(&file(&format!("{{{},{}}}", w(0, 48), v(52, 68)), 68), &["`v`"]);
    refuse_file(&file(&format!("{{{}}}", w(4, 52)), 52), &["`w`"]);
    refuse_file(&file(&format!("{{{},{}}}", w(0, 48), v(40, 56)), 56), &["`v`"]);
    refuse_file(&file(&format!("{{{},{}}}", w(0, 48), entry("x", "F32", "[3,4]", 0, 48)), 48), &[]);
    // Trailing bytes, truncated by one byte and by all.
    refuse_file(&file(&format!("{{{}}}", w(0, 48)), 49), &[]);
    refuse_file(&file(&format!("{{{}}}", w(0, 48)), 47), &[]);
    refuse_file(&file(&format!("{{{}}}", w(0, 48)), 0), &[]);
    // Shape and span disagree; the span runs backwards.
    refuse_file(&file(&format!("{{{}}}", w(0, 44)), 44), &["`w`"]);
    refuse_file(&file(&format!("{{{}}}", w(48, 0)), 48), &["`w`"]);
}

#[test]
fn b08_shapes_that_overflow() {
    let w = |shape: &str| file(&format!("{{{}}}", entry("w", "F32", shape, 0, 48)), 48);
    // 4194305 · 4194305 · 211106198978564 is 4 modulo 2^64.
    refuse_file(&w("[4194305,4194305,211106198978564]"), &["`w`"]);
    refuse_file(&w("[9223372036854775808]"), &["`w`"]);
    refuse_file(&w("[18446744073709551615,2]"), &["`w`"]);
    refuse_file(&w(&format!("[{}1]", "1,".repeat(99_999))), &["`w`"]);
    refuse_file(&w(&format!("[{}12]", "1,".repeat(16))), &["`w`", "16"]);
}

#[test]
fn b09_dimensions_that_are_no_counts() {
    for shape in ["[-3,4]", "[3.0,4]", "[\"3\",4]", "[3e0,4]", "[18446744073709551616]", "null", "12"] {
        refuse_file(&file(&format!("{{{}}}", entry("w", "F32", shape, 0, 48)), 48), &[]);
    }
    for offsets in ["[0]", "[0,48,48]", "[-1,47]", "[0.0,48]", "{}"] {
        let header = format!(r#"{{"w":{{"dtype":"F32","shape":[3,4],"data_offsets":{offsets}}}}}"#);
        refuse_file(&file(&header, 48), &[]);
    }
}

#[test]
fn b10_dtypes_that_cannot_be_merged() {
    refuse_file(&file(&format!("{{{}}}", entry("w", "F33", "[3,4]", 0, 48)), 48), &["`w`", "F33"]);
    for (dtype, shape, bytes) in [("F8_E4M3", "[3,4]", 12), ("F8_E5M2", "[3,4]", 12), ("F4", "[3,4]", 6)] {
        let scratch = Scratch::new();
        let header = format!("{{{}}}", entry("w", dtype, shape, 0, bytes));
        scratch.write("a/model.safetensors", file(&header, bytes as usize));
        scratch.write("b/model.safetensors", file(&header, bytes as usize));
        scratch.refuse_unread(LINEAR, &["`w`", dtype]);
    }
}

/// `b` merged as it is, and rewritten with a header of another alignment.
#[test]
fn b11_misaligned_header_works() {
    for dtype in ["F64", "F32", "BF16"] {
        let scratch = Scratch::new();
        let mut random = Random::new(11);
        let tensors: Vec<Tensor> = [("w", &[3, 4][..]), ("x", &[5]), ("y", &[2, 3, 7])]
            .map(|(n, s)| Tensor::random(n, dtype, s, &mut random))
            .into();
        scratch.model(
            "a",
            &tensors
                .iter()
                .map(|t| Tensor::random(&t.name, dtype, &t.shape, &mut random))
                .collect::<Vec<_>>(),
        );
        scratch.write("b/model.safetensors", safetensors(&tensors, &[]));
        let aligned = scratch.merge(LINEAR, "aligned", &[]);
        for misalignment in [1, 3, 6] {
            scratch.write("b/model.safetensors", safetensors_aligned(&tensors, &[], misalignment));
            for io in ["mmap", "pread"] {
                let out = format!("{misalignment}{io}");
                let merged = scratch.merge(LINEAR, &out, &["--io", io]);
                assert_eq!(merged.tensors, aligned.tensors, "{dtype} {out}");
            }
        }
    }
}

#[test]
fn b12_empty_tensors_and_scalars_pass() {
    let scratch = Scratch::new();
    let tensors = |scale: f64| {
        vec![
            Tensor::f32("empty", &[0, 7], &[]),
            Tensor::f32("scalar", &[], &[scale]),
            Tensor::f32("vector", &[3], &[scale, 2.0 * scale, 3.0 * scale]),
            Tensor::new("empty_ids", "I64", &[0], &[]),
        ]
    };
    scratch.model("a", &tensors(1.0));
    scratch.model("b", &tensors(2.0));
    scratch.model("base", &tensors(0.0));
    for (out, config) in [
        ("linear", LINEAR.to_owned()),
        ("wudi", format!("{}base_model: base\n", LINEAR.replace("linear", "wudi"))),
        (
            "task",
            format!(
                "{}base_model: base\nparameters: {{ normalize: true }}\n",
                LINEAR.replace("linear", "task_arithmetic")
            ),
        ),
    ] {
        let merged = scratch.merge(&config, out, &[]);
        assert_eq!(merged.tensor("empty").shape, [0, 7]);
        assert_eq!(merged.tensor("empty_ids").shape, [0]);
        assert_eq!(merged.tensor("scalar").shape, [0usize; 0]);
        // Small integers and halves: exact.
        assert_eq!(merged.values("scalar"), [1.5], "{out}");
        assert_eq!(merged.values("vector"), [1.5, 3.0, 4.5], "{out}");
    }
}

#[test]
fn b13_names_are_opaque() {
    let scratch = Scratch::new();
    let long = "n".repeat(64 * 1024);
    let names = [
        "../../../escape",
        "/etc/escape",
        "line\nbreak",
        "nul\0",
        "quote\"`",
        "",
        "ünïcode/\u{202e}x",
        &long,
    ];
    let model = |seed| {
        let mut random = Random::new(seed);
        names.map(|name| Tensor::random(name, "F32", &[2, 2], &mut random))
    };
    let (a, b) = (model(1), model(2));
    scratch.model("a", &a);
    scratch.model("b", &b);
    let merged = scratch.merge(LINEAR, "out", &[]);
    assert_eq!(merged.tensors.len(), names.len());
    for (a, b) in a.iter().zip(&b) {
        let mean: Vec<f64> = a.values().iter().zip(b.values()).map(|(a, b)| (a + b) / 2.0).collect();
        // 20-bit values: their mean is exact in f32.
        assert_eq!(merged.values(&a.name), mean);
    }
    // Such a name in a message stays on its line.
    scratch.model("b", &[b[2].with_value(3, f64::NAN)]);
    scratch.model("a", &[a[2].clone()]);
    scratch.refuse(LINEAR, &["line\\nbreak", "3"]);
}

#[test]
fn b19_shapes_that_differ() {
    let scratch = Scratch::new();
    let mut random = Random::new(19);
    let mut head = |rows: usize| Tensor::random("head.weight", "F32", &[rows, 4], &mut random);
    scratch.model("a", &[good_weight(1), head(2)]);
    scratch.model("b", &[good_weight(2), head(5)]);
    scratch.model("base", &[good_weight(3), head(2)]);
    // The base has it: an error naming model and tensor.
    let based = format!("{LINEAR}base_model: base\n");
    scratch.refuse_unread(&based, &["b", "head.weight", "[5, 4]", "[2, 4]"]);
    // No base: a task head, left out with a warning.
    let output = scratch.try_merge(LINEAR, "out", &[]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stderr.contains("head.weight"), "no warning: {}", output.stderr);
    let merged = scratch.merged("out");
    assert_eq!(merged.tensors.keys().collect::<Vec<_>>(), ["w"]);
    assert!(merged.left_out().contains("head.weight"), "{}", merged.left_out());
    let plan = scratch.plan(LINEAR, &[]).to_string();
    assert!(plan.contains("head.weight"), "{plan}");
}

#[test]
fn b19_tensors_that_are_missing() {
    let scratch = Scratch::new();
    let mut random = Random::new(20);
    let head = Tensor::random("head.weight", "F32", &[2, 4], &mut random);
    scratch.model("a", &[good_weight(1), head.clone()]);
    scratch.model("b", &[good_weight(2)]);
    scratch.model("base", &[good_weight(3), head.clone()]);
    scratch.model("small", &[good_weight(3)]);
    scratch.refuse_unread(&format!("{LINEAR}base_model: base\n"), &["b", "head.weight"]);
    for (out, config) in
        [("no_base", LINEAR.to_owned()), ("small_base", format!("{LINEAR}base_model: small\n"))]
    {
        let output = scratch.try_merge(&config, out, &[]);
        assert_eq!(output.code, 0, "{}", output.stderr);
        assert!(output.stderr.contains("head.weight"), "no warning: {}", output.stderr);
        let merged = scratch.merged(out);
        assert_eq!(merged.tensors.keys().collect::<Vec<_>>(), ["w"]);
        assert!(merged.left_out().contains("head.weight"), "{}", merged.left_out());
    }
}

#[test]
fn b19_float_dtypes_may_differ() {
    let scratch = Scratch::new();
    let values = [0.5, -1.25, 3.0, 0.0625];
    let doubled: Vec<f64> = values.iter().map(|v| 2.0 * v).collect();
    for (name, dtype, values) in
        [("a", "BF16", &values[..]), ("b", "F32", &doubled), ("c", "F16", &values), ("d", "F64", &doubled)]
    {
        scratch.model(name, &[Tensor::new("w", dtype, &[2, 2], values)]);
    }
    let config = "merge_method: linear\nmodels: [{ model: a }, { model: b }, { model: c }, { model: d }]\n";
    let merged = scratch.merge(config, "out", &[]);
    // The first model's dtype; 1.5 times these values fits bf16 exactly.
    assert_eq!(merged.tensor("w").dtype, "BF16");
    assert_eq!(merged.values("w"), values.map(|v| 1.5 * v));
    // An integer tensor against a float one is no such mixture.
    scratch.model("b", &[Tensor::new("w", "I64", &[2, 2], &[1.0, 2.0, 3.0, 4.0])]);
    let output = scratch.try_merge(&format!("{LINEAR}base_model: a\n"), "ints", &[]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(error_line(&output).contains("`w`"), "{}", output.stderr);
}

#[test]
fn b20_tied_in_one_model_only() {
    let scratch = Scratch::new();
    let mut random = Random::new(20);
    let embedding = Tensor::random("model.embed_tokens.weight", "F32", &[5, 4], &mut random);
    let head = embedding.renamed("lm_head.weight");
    scratch.model("a", &[embedding.clone(), good_weight(1)]);
    scratch.model("b", &[embedding.clone(), head.clone(), good_weight(2)]);
    scratch.model("base", &[embedding.clone(), head, good_weight(3)]);
    let tied = json!({ "model_type": "test", "num_hidden_layers": 2, "tie_word_embeddings": true });
    let untied = json!({ "model_type": "test", "num_hidden_layers": 2, "tie_word_embeddings": false });
    scratch.write("a/config.json", tied.to_string());
    scratch.write("b/config.json", untied.to_string());
    scratch.write("base/config.json", untied.to_string());
    let config = format!("{LINEAR}base_model: base\n");
    scratch.refuse_unread(&config, &["lm_head.weight"]);
    let merged = scratch.merge(&config, "out", &["--untie"]);
    // Both models hold the same values under the head: their mean is the embedding itself.
    assert_eq!(merged.values("lm_head.weight"), embedding.values());
    assert_eq!(merged.values("model.embed_tokens.weight"), embedding.values());
}
