//! What `emr` and `tall_masks` keep of every task, and the models that `materialise` makes of it.

use std::path::Path;

use super::oracle::{self, deltas};
use super::{TENSORS, World};
use crate::outputs::HALF_ULP;
use crate::util::{Merged, Output, Random, Scratch, Tensor, error_line, read_safetensors};

const EMR: &str = "merge_method: emr\nbase_model: base";
const TALL: &str = "merge_method: tall_masks\nbase_model: base\nparameters: { mask_lambda: 0.5 }";

fn materialise(scratch: &Scratch, task: &str, out: &str, flags: &[&str]) -> Output {
    scratch.run(&[&["materialise", "merged", task, "--out", out, "--progress", "none"][..], flags].concat())
}

fn made(scratch: &Scratch, task: &str, out: &str, flags: &[&str]) -> Merged {
    let output = materialise(scratch, task, out, flags);
    assert_eq!(output.code, 0, "{}", output.stderr);
    scratch.merged(out)
}

fn masks(directory: &Path) -> Vec<Tensor> {
    read_safetensors(&directory.join("masks.safetensors"))
}

fn find<'t>(tensors: &'t [Tensor], name: &str) -> &'t Tensor {
    tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name}"))
}

fn tall(deltas: &[Vec<f64>], task: usize) -> Vec<bool> {
    let sum = |k: usize| deltas.iter().map(|d| d[k]).sum::<f64>();
    deltas[task].iter().enumerate().map(|(k, own)| own.abs() > 0.5 * (sum(k) - own).abs()).collect()
}

/// Merged vector of the tasks, and each one's mask.
fn parts(method: &str, deltas: &[Vec<f64>]) -> (Vec<f64>, Vec<Vec<bool>>) {
    if method == TALL {
        let sum = (0..deltas[0].len()).map(|k| deltas.iter().map(|d| d[k]).sum()).collect();
        return (sum, (0..deltas.len()).map(|t| tall(deltas, t)).collect());
    }
    let unified = oracle::unified(deltas);
    let mask = |d: &Vec<f64>| d.iter().zip(&unified).map(|(d, u)| d * u > 0.0).collect();
    (unified.clone(), deltas.iter().map(mask).collect())
}

#[test]
fn every_task_is_made_of_masks_and_the_merged_model() {
    for (head, dtype) in [(EMR, "F32"), (EMR, "BF16"), (TALL, "F32")] {
        let world = World::new(dtype, 3);
        let merged = world.scratch.merge(&World::config(head, &["", "", ""]), "merged", &[]);
        let kept = masks(&merged.directory);
        let rescales = head == EMR;
        assert_eq!(kept.len(), TENSORS.len() * if rescales { 2 } else { 1 });
        let (mut own, mut masked) = ([0.0; 3], [0.0; 3]);
        for (name, _) in TENSORS {
            let (base, models) = world.values(name);
            let d = deltas(&base, &models);
            let (unified, expected) = parts(head, &d);
            let stored = find(&kept, &format!("{name}/mask"));
            let row = base.len().div_ceil(8);
            assert_eq!((stored.dtype, &stored.shape[..]), ("U8", &[3, row][..]));
            for (t, mask) in expected.iter().enumerate() {
                let bits = &stored.bytes[t * row..(t + 1) * row];
                for (k, set) in mask.iter().enumerate() {
                    assert_eq!(bits[k / 8] >> (k % 8) & 1 == 1, *set, "{name} task {t} element {k}");
                }
                // Nothing beyond the last element.
                assert!((mask.len()..8 * row).all(|k| bits[k / 8] >> (k % 8) & 1 == 0), "{name}");
            }
            for t in 0..if rescales { 3 } else { 0 } {
                let norms = find(&kept, &format!("{name}/norms"));
                assert_eq!((norms.dtype, &norms.shape[..]), ("F64", &[2, 3][..]));
                let sums = norms.values();
                let of_task = d[t].iter().map(|v| v.abs()).sum::<f64>();
                let of_mask = unified.iter().zip(&expected[t]).filter(|(_, m)| **m).map(|(u, _)| u.abs());
                let of_mask = of_mask.sum::<f64>();
                // Values are f32 differences of stored ones: half a unit of 1 each, and exact sums.
                let bound = HALF_ULP * base.len() as f64;
                assert!(
                    (sums[t] - of_task).abs() <= bound && (sums[3 + t] - of_mask).abs() <= bound,
                    "{name}"
                );
                own[t] += of_task / base.len() as f64;
                masked[t] += of_mask / base.len() as f64;
            }
        }
        for t in 0..3 {
            let factor = if rescales { own[t] / masked[t] } else { 1.0 };
            let model = made(&world.scratch, &t.to_string(), &format!("task{t}"), &[]);
            let config = format!("{head}\nparameters: {{ task: {t} }}");
            let config =
                if head == TALL { TALL.replace("{ mask", &format!("{{ task: {t}, mask")) } else { config };
            let direct = world.scratch.merge(&World::config(&config, &["", "", ""]), &format!("d{t}"), &[]);
            assert!(!direct.directory.join("masks.safetensors").exists(), "one task alone");
            for (name, _) in TENSORS {
                let (base, models) = world.values(name);
                let (unified, masks) = parts(head, &deltas(&base, &models));
                for (k, got) in model.values(name).into_iter().enumerate() {
                    let want = base[k] + if masks[t][k] { factor * unified[k] } else { 0.0 };
                    let rounding = if dtype == "BF16" { want.abs() / 256.0 } else { 0.0 };
                    let bound = 40.0 * HALF_ULP + rounding;
                    assert!((got - want).abs() <= bound, "{head} {dtype} {name}[{k}]: {got} {want}");
                }
                if dtype == "BF16" {
                    // Every element of the unified model is one model's own, which bf16 holds exactly.
                    assert!(model.tensor(name).bytes == direct.tensor(name).bytes, "{name}");
                }
            }
        }
    }
}

#[test]
fn a_task_goes_by_number_or_name_and_the_directory_is_a_merge_like_others() {
    let world = World::new("BF16", 4);
    let scratch = &world.scratch;
    scratch.merge(&World::config(EMR, &["", "", ""]), "merged", &[]);
    let by_number = made(scratch, "1", "one", &[]);
    let flags = ["--threads", "1", "--io", "pread", "--out-shard-size", "60kB", "--base", "base"];
    let by_name = made(scratch, "m1", "two", &flags);
    assert!(by_name.directory.join("model.safetensors.index.json").exists());
    for (name, tensor) in &by_number.tensors {
        assert!(by_name.tensor(name).bytes == tensor.bytes, "{name}");
    }
    for file in ["config.json", "README.md", "merge_config.yml"] {
        assert!(by_number.directory.join(file).exists(), "{file}");
    }
    for directory in ["merged", "one", "two"] {
        let verified = scratch.run(&["verify", directory, "--inputs"]);
        assert_eq!(verified.code, 0, "{}{}", verified.stdout, verified.stderr);
    }
    let again = materialise(scratch, "1", "one", &["--resume"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    let other = materialise(scratch, "2", "one", &["--resume"]);
    assert_eq!(other.code, 2, "another task");
}

#[test]
fn masks_do_not_depend_on_threads_memory_or_shards() {
    // More than 4 Mi elements run on all threads; an odd count ends within a byte.
    let mut random = Random::new(41);
    let scratch = Scratch::new();
    let shape = [2053, 2049];
    for name in ["base", "m0", "m1"] {
        let large = Tensor::random("large.weight", "BF16", &shape, &mut random);
        let small = Tensor::random("small.weight", "BF16", &[13, 3], &mut random);
        let ids = Tensor::new("ids", "I64", &[2], &[1.0, 2.0]);
        scratch.model(name, &[large, small, ids]);
    }
    let config = World::config(EMR, &["", ""]);
    let one = scratch.merge(&config, "merged", &["--threads", "1"]);
    let plan = scratch.plan(&config, &["--threads", "3"]);
    let least = plan["least_memory_bytes"].to_string();
    let flags = ["--threads", "3", "--max-memory", &least, "--io", "pread", "--out-shard-size", "5MB"];
    let three = scratch.merge(&config, "three", &flags);
    let peak = three.report["peak_anonymous_bytes"].as_u64().expect("measured");
    assert!(peak <= least.parse().expect("a number"), "{peak} held, {least} planned");
    // One read of every model: masks and norms are made while it is merged.
    for merged in [&one, &three] {
        assert_eq!(merged.report["bytes_read"], plan["bytes_read"]);
        assert_eq!(merged.report["bytes_written"], plan["bytes_written"]);
        assert!(merged.parameter("large.weight").get("passes").is_none());
    }
    let file = |merged: &Merged| std::fs::read(merged.directory.join("masks.safetensors")).expect("masks");
    assert!(file(&one) == file(&three));
    assert!(one.tensor("large.weight").bytes == three.tensor("large.weight").bytes);

    let task = made(&scratch, "1", "task", &["--threads", "1"]);
    let flags = ["--threads", "3", "--max-memory", "48MiB", "--io", "pread"];
    let same = made(&scratch, "1", "same", &flags);
    assert!(task.tensors.iter().all(|(name, tensor)| same.tensor(name).bytes == tensor.bytes));
    let peak = same.report["peak_anonymous_bytes"].as_u64().expect("measured");
    assert!(peak <= 48 << 20, "{peak} held");
    let bytes = shape[0] as u64 * shape[1] as u64;
    // Base and merged model, an eighth of a byte an element of the mask.
    let read = task.parameter("large.weight")["bytes_read"].as_u64().expect("a number");
    assert_eq!(read, 2 * 2 * bytes + bytes.div_ceil(8));
    let least = materialise(&scratch, "1", "little", &["--max-memory", "1MiB"]);
    assert_eq!(least.code, 2, "{}", least.stderr);
}

#[test]
fn a_killed_run_resumes_to_the_same_masks() {
    let world = World::new("BF16", 5);
    let scratch = &world.scratch;
    scratch.write("c.yml", World::config(EMR, &["", "", ""]));
    let run = |out: &str, flags: &[&str], fail: &str| {
        let args = [&["merge", "c.yml", "--out", out, "--threads", "2"][..], flags].concat();
        scratch.run_with(&args, &[("MATS_STREAM_FAIL", &format!("commit.often=;{fail}"))])
    };
    assert_eq!(run("merged", &[], "").code, 0);
    let file = |out: &str| std::fs::read(scratch.join(out).join("masks.safetensors")).expect("masks");
    let expected = file("merged");
    for point in ["shard.write=kill@2", "shard.write=kill@9", "shard.write=kill@14", "rename.shard=kill@1"] {
        assert_eq!(run("again", &[], point).code, 137, "{point}");
        let resumed = run("again", &["--resume"], "");
        assert_eq!(resumed.code, 0, "{point}: {}", resumed.stderr);
        assert!(file("again") == expected, "{point}");
        let again = scratch.merged("again");
        for (name, tensor) in &scratch.merged("merged").tensors {
            assert!(again.tensor(name).bytes == tensor.bytes, "{point}: {name}");
        }
        let verified = scratch.run(&["verify", "again"]);
        assert_eq!(verified.code, 0, "{point}: {}{}", verified.stdout, verified.stderr);
        std::fs::remove_dir_all(scratch.join("again")).expect("remove a directory");
    }
}

#[test]
fn verify_sees_a_flipped_bit_of_a_mask() {
    let world = World::new("F32", 6);
    world.scratch.merge(&World::config(EMR, &["", "", ""]), "merged", &[]);
    let path = world.scratch.join("merged/masks.safetensors");
    let mut bytes = std::fs::read(&path).expect("masks");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(&path, bytes).expect("write");
    let verified = world.scratch.run(&["verify", "merged"]);
    assert_eq!(verified.code, 1);
    assert!(verified.stdout.contains("changed tensor"), "{}", verified.stdout);
    std::fs::remove_file(&path).expect("remove");
    assert_eq!(world.scratch.run(&["verify", "merged"]).code, 1);
}

#[test]
fn what_cannot_be_made_is_refused() {
    let world = World::new("F32", 7);
    let scratch = &world.scratch;
    let slices = "merge_method: emr\nbase_model: base\nslices:\n  - sources:\n    - { model: base, layer_range: [0, 2] }\n    \
                  - { model: m0, layer_range: [0, 2] }\n";
    scratch.refuse_unread(slices, &["keeps masks", "slices", "masks: false"]);
    scratch.merge(&format!("{slices}parameters: {{ masks: false }}"), "sliced", &[]);
    scratch.merge(&World::config(EMR, &["", "", ""]), "merged", &[]);
    scratch.merge(&World::config("merge_method: linear", &["", ""]), "plain", &[]);
    let refused = |args: &[&str], words: &[&str]| {
        let output = scratch.run(args);
        assert_eq!(output.code, 2, "{}", output.stderr);
        let line = error_line(&output);
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
        assert!(!scratch.join("out").exists(), "{line}");
    };
    refused(&["materialise", "plain", "0", "--out", "out"], &["masks.safetensors", "emr"]);
    refused(&["materialise", "m0", "0", "--out", "out"], &["merge_report.json"]);
    for task in ["3", "m7", "1x", "base"] {
        refused(&["materialise", "merged", task, "--out", "out"], &["TASK", "0 `m0`", "2 `m2`"]);
    }
    refused(&["materialise", "merged", "0", "--out", "merged/inside"], &["merged"]);
    refused(&["materialise", "merged", "0", "--out", "out", "--base", "plain"], &["--base", "plain"]);
    refused(&["materialise", "merged", "0", "--out", "out", "--base", "a+b+c"], &["--base", "PATH+ADAPTER"]);
    std::fs::rename(scratch.join("base"), scratch.join("moved")).expect("rename");
    refused(&["materialise", "merged", "0", "--out", "out"], &["--base", "`base`", "where it is now"]);
    made(scratch, "0", "found", &["--base", "moved"]);

    // A file that says something else.
    let kept = masks(&scratch.join("merged"));
    let good = [
        ("format", "mats-stream-masks/1"),
        ("base", "base"),
        ("rescaler", "tensors"),
        ("tasks", r#"["m0","m1","m2"]"#),
    ];
    let write = |tensors: &[Tensor], metadata: &[(&str, &str)]| {
        scratch.write("merged/masks.safetensors", crate::util::safetensors(tensors, metadata));
    };
    let bad = |words: &[&str]| {
        refused(&["materialise", "merged", "0", "--out", "out", "--base", "moved"], words);
    };
    write(&kept, &[("format", "other")]);
    bad(&["`format`", "`other`"]);
    for (key, value) in [("rescaler", "none of them"), ("tasks", "m0")] {
        let metadata: Vec<_> = good.iter().map(|(k, v)| (*k, if *k == key { value } else { v })).collect();
        write(&kept, &metadata);
        bad(&[key, value]);
    }
    let changed = |name: &str, with: Tensor| -> Vec<Tensor> {
        kept.iter().map(|t| if t.name == name { with.renamed(name) } else { t.clone() }).collect()
    };
    write(&changed("scale/mask", Tensor::f32("", &[3, 1], &[0.0; 3])), &good);
    bad(&["`scale/mask`", "F32 [3, 1]", "U8 [3, 1]"]);
    for value in [f64::NAN, -1.0, f64::INFINITY] {
        write(&changed("scale/norms", Tensor::new("", "F64", &[2, 3], &[value; 6])), &good);
        bad(&["`scale/norms`", "finite sums"]);
    }
    write(&kept.iter().filter(|t| t.name != "scale/norms").cloned().collect::<Vec<_>>(), &good);
    bad(&["`scale/norms`", "got none"]);
}
