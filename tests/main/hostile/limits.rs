//! Inputs that are large, many, pickled or merely odd.

use std::process::Command;

use crate::util::{BINARY, Random, Scratch, Tensor, error_line, safetensors};

const LINEAR: &str = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n";

/// B27: configs that are no configs. The parser's own tests have many more.
#[test]
fn b27_yaml_that_is_no_config() {
    let scratch = Scratch::new();
    let bomb: String = std::iter::once("a0: &a0 [x, x]\n".to_owned())
        .chain((1..30).map(|i| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", "))))
        .collect();
    for (text, words) in [
        (bomb, &["more than a config may have"][..]),
        ("[".repeat(100_000), &["yml:1"]),
        (" ".repeat(2 << 20), &["larger than 1048576 bytes"]),
        (format!("{LINEAR}normalise: true\n"), &[":3: normalise: unknown key", "`parameters`"][..1]),
        (format!("{LINEAR}merge_method: linear\n"), &["duplicate key (first given at line 1)"]),
        ("merge_method: linear\nmodels:\n\t- model: a\n".to_owned(), &["yml:3"]),
        ("!!python/object/apply:os.system [id]".to_owned(), &["has no meaning here"]),
    ] {
        scratch.refuse_unread(&text, words);
    }
}

/// B28: nothing is unpickled, whatever it is called.
#[test]
fn b28_pickles_are_refused_unread() {
    let scratch = Scratch::new();
    scratch.model("b", &[Tensor::f32("w", &[1], &[1.0])]);
    // `cos\nsystem\n(S'touch canary'\ntR.`: what torch.load of an old checkpoint would run.
    let pickle = b"cos\nsystem\n(S'touch canary'\ntR.".to_vec();
    let zip = [&b"PK\x03\x04"[..], &[0; 26], b"../escape"].concat();
    for (name, bytes) in
        [("pytorch_model.bin", &pickle), ("model.pt", &pickle), ("model.pth", &zip), ("model.ckpt", &zip)]
    {
        scratch.write(format!("a/{name}"), bytes);
        scratch.refuse_unread(LINEAR, &["pickled weights", "safetensors"]);
        std::fs::remove_dir_all(scratch.join("a")).expect("remove");
        scratch.write("a/model.safetensors", bytes);
        scratch.refuse_unread(LINEAR, &["a/model.safetensors"]);
        let file = LINEAR.replace("model: a", &format!("model: a/{name}"));
        scratch.write(format!("a/{name}"), bytes);
        scratch.refuse_unread(&file, &[name]);
        std::fs::remove_dir_all(scratch.join("a")).expect("remove");
    }
    assert!(!scratch.join("canary").exists() && !scratch.join("../escape").exists());
}

/// B30: more shards than a process may have files open.
#[test]
fn b30_many_shards_with_few_descriptors() {
    let scratch = Scratch::new();
    let mut random = Random::new(30);
    let model = |random: &mut Random| -> Vec<Tensor> {
        (0..4000).map(|k| Tensor::random(&format!("t.{k}.w"), "F32", &[3], random)).collect()
    };
    let (a, b) = (model(&mut random), model(&mut random));
    scratch.sharded_model("a", &a, 400);
    scratch.sharded_model("b", &b, 400);
    scratch.write("merge.yml", LINEAR);
    for io in ["mmap", "pread"] {
        let out = format!("out-{io}");
        let command = format!(
            "ulimit -n 64 && exec \"$0\" merge merge.yml --out {out} --io {io} --out-shard-size 1000 --progress none"
        );
        let done = Command::new("sh")
            .args(["-c", &command, BINARY])
            .current_dir(scratch.path())
            .output()
            .expect("run a shell");
        assert!(done.status.success(), "{io}: {}", String::from_utf8_lossy(&done.stderr));
        let merged = scratch.merged(&out);
        assert_eq!(merged.tensors.len(), 4000);
        for (a, b) in a.iter().zip(&b).step_by(97) {
            let mean: Vec<f64> =
                a.values().iter().zip(b.values()).map(|(a, b)| f64::from(((a + b) / 2.0) as f32)).collect();
            assert_eq!(merged.values(&a.name), mean);
        }
    }
}

/// B31: a tensor several times the budget streams; one that cannot is refused with what would do.
#[test]
fn b31_a_tensor_larger_than_the_budget() {
    let scratch = Scratch::new();
    let (rows, columns) = (40_960, 1024);
    let value = |seed: u32| {
        (0..rows * columns).map(move |k: u32| f32::from((k.wrapping_mul(seed) >> 16) as u16)).map(f64::from)
    };
    for (name, seed) in [("a", 2_654_435_761), ("b", 40_503)] {
        let bytes: Vec<u8> = value(seed).flat_map(|v| (v as f32).to_le_bytes()).collect();
        let tensor = Tensor {
            name: "big.weight".to_owned(),
            dtype: "F32",
            shape: vec![rows as usize, columns as usize],
            bytes,
        };
        scratch.write(format!("{name}/model.safetensors"), safetensors(&[tensor], &[]));
    }
    // 160 MiB in a budget of 40 MiB.
    let merged = scratch.merge(LINEAR, "out", &["--max-memory", "40MiB"]);
    let expected = value(2_654_435_761).zip(value(40_503)).map(|(a, b)| f64::from(((a + b) / 2.0) as f32));
    assert!(merged.values("big.weight").into_iter().eq(expected));
    let peak = merged.report["peak_anonymous_bytes"].as_u64().expect("measured");
    assert!(peak <= 40 << 20, "{peak}");

    let line = scratch.refuse_with(LINEAR, &["--max-memory", "1MiB"], &["--max-memory", "try --max-memory"]);
    let least = line.rsplit("try --max-memory ").next().expect("named").to_owned();
    scratch.merge(LINEAR, "least", &["--max-memory", &least]);
}

/// B32: integer tensors are the base's, and that others have other values is told.
#[test]
fn b32_integers_that_differ() {
    let scratch = Scratch::new();
    for (name, ids) in [("a", [0.0, 1.0, 2.0]), ("b", [0.0, 1.0, 3.0])] {
        scratch
            .model(name, &[Tensor::f32("w", &[1], &[1.0]), Tensor::new("position_ids", "I64", &[3], &ids)]);
    }
    for (base, last) in [("a", 2_i64), ("b", 3)] {
        let config = format!("{LINEAR}base_model: {base}\n");
        let merged = scratch.merge(&config, &format!("out-{base}"), &[]);
        assert_eq!(merged.tensor("position_ids").bytes[16..], last.to_le_bytes());
        let told = merged.left_out();
        assert!(told.contains("integers are copied") && told.contains("position_ids"), "{told}");
        assert!(told.contains("has other values in"), "{told}");
    }
    // Also where another model's tensor has another dtype.
    scratch
        .model("b", &[Tensor::f32("w", &[1], &[1.0]), Tensor::f32("position_ids", &[3], &[0.0, 1.0, 2.0])]);
    let output = scratch.try_merge(&format!("{LINEAR}base_model: a\n"), "mixed", &[]);
    assert_eq!(output.code, 2);
    assert!(error_line(&output).contains("position_ids"));
}
