//! Mutated inputs against every parser and against a whole merge: whatever comes, no panic, no hang, no file where none
//! belongs, and what is accepted is right.
//!
//! A plain test with fixed seeds: a few hundred inputs each by default, or as many as fit into `FUZZ_SECONDS` each from the
//! seed `FUZZ_SEED`. The input at work lies in `target/fuzz/NAME-PROCESS`, so that one that ends the process is not lost.
//! Mutations know what they work on: JSON tokens, numbers, lengths. Findings become files in `fixtures/hostile/`.
//!
//! `FUZZ_SECONDS=600 cargo test --release --test fuzz header -- --nocapture`

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mats_stream::config::MergeConfig;
use mats_stream::plan::Limits;
use mats_stream::plan::shards::{OutputLayout, TensorSpec};
use mats_stream::read::{Checkpoint, InputFile, IoMode, TorchFile, read_header};
use mats_stream::report::ProgressMode;
use mats_stream::run::{MergeOptions, merge};
use mats_stream::statistics::ModelStatistics;
use mats_stream::verify::verify;
use mats_stream::write::{CheckpointWriter, OutputDir, journal};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// What parsers trip over.
const TOKENS: [&[u8]; 40] = [
    b"0",
    b"-1",
    b"1",
    b"1.5",
    b"1e400",
    b"-0",
    b"NaN",
    b".nan",
    b"18446744073709551615",
    b"18446744073709551616",
    b"9223372036854775808",
    b"4294967296",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"[",
    b"{",
    b"}",
    b"]",
    b"\"\"",
    b",",
    b":",
    b"\"__metadata__\"",
    b"\"F32\"",
    b"\"BF16\"",
    b"\"F4\"",
    b"\"../x\"",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"\xff\xfe",
    b"\n",
    b"\t",
    b" ",
    b"&a",
    b"*a",
    b"!!python/object",
    b"? ",
    b"- ",
    b"#",
];

/// One to four changes.
fn mutate(input: &[u8], others: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(11) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => drop(bytes.drain(at.min(end)..end)),
            3 => {
                let piece = bytes[at.min(end)..end].to_vec();
                bytes.splice(at..at, piece);
            }
            4 => drop(bytes.splice(at..at, random.pick(&TOKENS).iter().copied())),
            5 => {
                let other = &others[random.below(others.len())];
                let from = random.below(other.len() + 1);
                let to = (from + random.below(64)).min(other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            6 => bytes.truncate(at),
            // A number or a string becomes another one.
            7..=9 => {
                let token =
                    |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'"' | b'_' | b'.' | b'/' | b'-');
                let Some(start) = bytes.iter().skip(at).position(token).map(|k| at + k) else { continue };
                let stop = bytes[start..].iter().position(|b| !token(b)).map_or(bytes.len(), |k| start + k);
                bytes.splice(start..stop, random.pick(&TOKENS).iter().copied());
            }
            _ => {
                let piece: Vec<u8> = bytes.iter().copied().skip(at).take(200).collect();
                bytes.extend(piece);
            }
        }
    }
    bytes
}

/// A header's JSON changed, its length told truly: what comes behind the first check.
fn mutate_header(file: &[u8], others: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let Some(length) = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b) as usize) else {
        return mutate(file, others, random);
    };
    let (Some(json), true) = (file.get(8..8usize.saturating_add(length)), random.below(4) > 0) else {
        return mutate(file, others, random);
    };
    let json = mutate(json, others, random);
    [&(json.len() as u64).to_le_bytes(), &json[..], &file[8 + length..]].concat()
}

/// Runs `one` on inputs until iterations or time run out. What it says of an accepted input is counted.
fn fuzz(name: &str, iterations: u64, mut one: impl FnMut(&mut Random, &Path) -> bool) {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let seed: u64 = std::env::var("FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
    let directory = directory.join(format!("{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("create a directory");
    let started = Instant::now();
    let (mut count, mut accepted) = (0u64, 0u64);
    loop {
        let over = match seconds {
            Some(seconds) => started.elapsed() >= Duration::from_secs(seconds),
            None => count >= iterations,
        };
        if over {
            break;
        }
        let mut random = Random(seed.wrapping_mul(1 << 40).wrapping_add(count));
        let outcome = catch_unwind(AssertUnwindSafe(|| one(&mut random, &directory)));
        match outcome {
            Ok(is_accepted) => accepted += u64::from(is_accepted),
            Err(_) => panic!("{name}: input {count} of seed {seed} is kept in {}", directory.display()),
        }
        count += 1;
    }
    println!(
        "{name}: {count} inputs, {accepted} accepted, {:.0} s, seed {seed}",
        started.elapsed().as_secs_f64()
    );
    let _ = fs::remove_dir_all(&directory);
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The hostile files that end so.
fn hostile(suffix: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(fixtures().join("hostile")).expect("fixtures/hostile is there");
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("list").path()).collect();
    paths.sort();
    paths.retain(|path| path.to_string_lossy().ends_with(suffix));
    paths.iter().map(|path| fs::read(path).expect("read a file")).collect()
}

/// A safetensors file: names, dtypes and shapes, then bytes that count up.
fn safetensors(tensors: &[(&str, &str, &[usize], usize)], metadata: &str) -> Vec<u8> {
    let mut entries = Vec::new();
    if !metadata.is_empty() {
        entries.push(format!(r#""__metadata__":{{{metadata}}}"#));
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        // Small positive numbers in every float dtype.
        data.extend((0..*bytes).map(|k| [0x00, 0x3f, 0x80, 0x3e][k % 4]));
        let end = data.len();
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn weights() -> Vec<u8> {
    safetensors(
        &[
            ("layers.0.weight", "F32", &[3, 4], 48),
            ("layers.1.weight", "BF16", &[4, 2], 16),
            ("norm", "F32", &[5], 20),
            ("ids", "I64", &[2], 16),
            ("scale", "F32", &[], 4),
        ],
        r#""format":"pt""#,
    )
}

fn statistics() -> Vec<u8> {
    safetensors(
        &[
            ("layers.0.weight/input_gram", "F32", &[10], 40),
            ("layers.0.weight/output_factor", "F32", &[2, 3], 24),
            ("layers.1.weight/fisher_diagonal", "F32", &[4, 2], 32),
            ("norm/fisher_block", "F32", &[15], 60),
        ],
        r#""format":"mats-stream-statistics/1","model":"m","alias:layers.1.weight/output_gram":"layers.0.weight/input_gram""#,
    )
}

#[test]
fn header() {
    let mut corpus = hostile(".safetensors");
    corpus.extend([weights(), statistics()]);
    fuzz("header", 3000, |random, directory| {
        let input = mutate_header(&corpus[random.below(corpus.len())], &corpus, random);
        let path = directory.join("input.safetensors");
        fs::write(&path, &input).expect("write a file");
        let io = if random.below(2) == 0 { IoMode::Mmap } else { IoMode::Pread };
        let Ok(file) = InputFile::open(&path, io) else { return false };
        match read_header(&file, 0) {
            Ok(header) => {
                // Ours is the stricter one, and both see the same tensors.
                let theirs = safetensors::SafeTensors::deserialize(&input);
                let theirs = theirs.unwrap_or_else(|e| panic!("accepted, and the crate refuses it: {e}"));
                assert_eq!(header.tensors.len(), theirs.len());
                for tensor in &header.tensors {
                    let view = theirs.tensor(&tensor.name).expect("both see it");
                    let mut scratch = Vec::new();
                    let ours = file.bytes(tensor.offset..tensor.offset + tensor.bytes, &mut scratch);
                    assert_eq!(
                        (view.shape(), view.data()),
                        (&tensor.shape[..], ours.expect("inside the file"))
                    );
                }
                true
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains('\n') && text.len() < 4000, "{text}");
                false
            }
        }
    });
}

#[test]
fn index() {
    let mut corpus = hostile(".index.json");
    corpus.push(fs::read(fixtures().join("models/base/model.safetensors.index.json")).expect("a fixture"));
    corpus.push(
        br#"{"metadata":{"total_size":104},"weight_map":{"layers.0.weight":"m.safetensors","norm":"m.safetensors"}}"#
            .to_vec(),
    );
    fuzz("index", 3000, |random, directory| {
        let input = mutate(&corpus[random.below(corpus.len())], &corpus, random);
        let shard = directory.join("m.safetensors");
        if !shard.exists() {
            fs::write(&shard, weights()).expect("write a file");
        }
        fs::write(directory.join("model.safetensors.index.json"), &input).expect("write a file");
        match Checkpoint::open(directory, IoMode::Pread) {
            Ok(checkpoint) => {
                for file in checkpoint.files() {
                    assert_eq!(file.path().parent(), Some(directory), "a shard elsewhere was opened");
                }
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                false
            }
        }
    });
}

#[test]
fn config() {
    let mut corpus = hostile(".yml");
    for name in ["merge.yml", "average.yml", "rounds.yml"] {
        corpus.push(fs::read(fixtures().join(name)).expect("a fixture"));
    }
    corpus.push(
        b"merge_method: task_arithmetic\nbase_model: b\nmodels:\n  - model: a\n    parameters:\n      weight:\n        - filter: mlp\n          value: [0, 0.5, 1]\n        - value: 1\nparameters: { normalize: true, lambda: 0.3 }\ndtype: bfloat16\n"
            .to_vec(),
    );
    fuzz("config", 2000, |random, directory| {
        let input = mutate(&corpus[random.below(corpus.len())], &corpus, random);
        fs::write(directory.join("input.yml"), &input).expect("write a file");
        let text = String::from_utf8_lossy(&input).into_owned();
        match MergeConfig::parse(Path::new("input.yml"), text) {
            Ok(config) => {
                // The canonical text is one: it does not depend on how it was written.
                let again = MergeConfig::parse(Path::new("input.yml"), format!("{}\n# more\n", config.text));
                if let Ok(again) = again {
                    assert_eq!(again.canonical_hash_input(), config.canonical_hash_input());
                }
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                false
            }
        }
    });
}

#[test]
fn statistics_file() {
    let mut corpus = hostile(".statistics.safetensors");
    corpus.extend([statistics(), statistics(), weights()]);
    fuzz("statistics_file", 3000, |random, directory| {
        let input = mutate_header(&corpus[random.below(corpus.len())], &corpus, random);
        let path = directory.join("input.safetensors");
        fs::write(&path, &input).expect("write a file");
        match ModelStatistics::open(&[path], IoMode::Pread) {
            Ok(statistics) => {
                let mut scratch = Vec::new();
                for statistic in statistics.statistics() {
                    let bytes = statistics.read(statistic, 0..statistic.bytes, &mut scratch);
                    assert_eq!(bytes.expect("inside the file").len() as u64, statistic.bytes);
                }
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                false
            }
        }
    });
}

/// Archives of torch, mostly one without checksums, so that a changed pickle is read and not only found damaged.
#[test]
fn torch_file() {
    let entries = fs::read_dir(fixtures().join("torch")).expect("fixtures/torch is there");
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("list").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "pt"));
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).expect("read a file")).collect();
    let open = fs::read(fixtures().join("torch/new_without_crc.pt")).expect("read a file");
    fuzz("torch_file", 3000, |random, directory| {
        let mut input = open.clone();
        if random.below(3) == 0 {
            input = mutate(&corpus[random.below(corpus.len())], &corpus, random);
        } else {
            // Bytes in place: lengths stay, so that the archive holds.
            for _ in 0..=random.below(3) {
                let at = random.below(input.len());
                input[at] = random.next() as u8;
            }
        }
        let path = directory.join("input.pt");
        fs::write(&path, &input).expect("write a file");
        let io = if random.below(2) == 0 { IoMode::Mmap } else { IoMode::Pread };
        match TorchFile::open(&path, io, 0) {
            Ok(torch) => {
                let mut scratch = Vec::new();
                for tensor in &torch.tensors {
                    let elements: usize = tensor.shape.iter().product();
                    assert_eq!(tensor.bytes, elements as u64 * (tensor.dtype.bits() / 8));
                    let bytes = torch.file.bytes(tensor.offset..tensor.offset + tensor.bytes, &mut scratch);
                    assert_eq!(bytes.expect("inside the file").len() as u64, tensor.bytes);
                }
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                false
            }
        }
    });
}

#[test]
fn a_journal() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut file = journal::Journal::create(directory.path(), journal::RunKey::default()).expect("a journal");
    for tensor in 0..4 {
        let done = r#"{"parameter":{"method":"cg"},"flops":1.5}"#.to_owned();
        let done = serde_json::value::RawValue::from_string(done).expect("JSON");
        let record = journal::Record { tensor, name: format!("w{tensor}"), checksum: String::new(), done };
        file.append(&[record]).expect("written");
    }
    let valid = fs::read(directory.path().join(".mats-stream-journal")).expect("there");
    let whole = journal::replay(&valid[..]).expect("memory does not fail");
    let corpus = [valid];
    fuzz("a_journal", 5000, |random, directory| {
        let input = mutate(&corpus[0], &corpus, random);
        fs::write(directory.join("input"), &input).expect("write a file");
        let replay = journal::replay(&input[..]).expect("memory does not fail");
        // Only what was written is ever read, in its order.
        assert_eq!(replay.records[..], whole.records[..replay.records.len()]);
        assert!(replay.key.is_none() || replay.key == whole.key);
        replay.records.len() == whole.records.len()
    });
}

#[test]
fn a_solve_state() {
    let spec = TensorSpec { name: "w".into(), dtype: "U8".into(), shape: vec![4], bytes: 4 };
    let layout = std::sync::Arc::new(OutputLayout::new(vec![spec], 100).expect("one tensor"));
    let out = tempfile::tempdir().expect("a temporary directory");
    let claimed = OutputDir::claim(&out.path().join("out"), &[]).expect("a new directory");
    let mut writer = CheckpointWriter::create(claimed, layout).expect("a new directory");
    writer.keep_solves(7, 0);
    let place = writer.solve_place(0, "w").expect("states are kept");
    let vectors = [[1u8; 24], [2; 24], [3; 24]];
    place.write(5, &[1, 2, 3], vectors.each_ref().map(|v| &v[..])).expect("written");
    let path = writer.path().join(".mats-stream-solve-0-0000000000000005.partial");
    let corpus = [fs::read(&path).expect("there")];
    fuzz("a_solve_state", 3000, |random, directory| {
        let input = mutate(&corpus[0], &corpus, random);
        fs::write(directory.join("input"), &input).expect("write a file");
        fs::write(&path, &input).expect("write a file");
        let mut got = [[0u8; 24]; 3];
        let found =
            place.read(5, 1 << 20, got.each_mut().map(|v| &mut v[..]), &|_| true).expect("it can be read");
        // Whole as it was written, or not at all.
        assert_eq!(found.is_some(), input == corpus[0]);
        assert_eq!(got, if found.is_some() { vectors } else { [[0; 24]; 3] });
        found.is_some()
    });
}

/// Two tiny checkpoints with statistics, one file of the four mutated: a merge that ends well is a whole one, and one that
/// does not leaves nothing.
#[test]
fn merge_of_mutated_checkpoints() {
    const CONFIGS: [&str; 4] = [
        "merge_method: linear\n",
        "merge_method: mats\nsubspace: auto\nsolver: { method: pcg }\n",
        "merge_method: mats\ninitial: average\nsolver: { method: cg, max_iterations: 3 }\n",
        "merge_method: wudi\nbase_model: a/model.safetensors\n",
    ];
    let corpus = [weights(), statistics()];
    fuzz("merge_of_mutated_checkpoints", 150, |random, directory| {
        let mut files = [weights(), statistics(), weights(), statistics()];
        let chosen = random.below(4);
        files[chosen] = match random.below(3) {
            0 => {
                // Values alone: NaN, infinities, huge and negative numbers behind a good header.
                let mut bytes = files[chosen].clone();
                let data = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
                for _ in 0..=random.below(6) {
                    let at = data + random.below(bytes.len() - data);
                    bytes[at] = *random.pick(&[&0xff, &0x7f, &0x80, &0x00, &0xbf]);
                }
                bytes
            }
            _ => mutate_header(&files[chosen], &corpus, random),
        };
        for (name, bytes) in ["a", "sa", "b", "sb"].iter().zip(&files) {
            fs::create_dir_all(directory.join(name)).expect("create a directory");
            fs::write(directory.join(name).join("model.safetensors"), bytes).expect("write a file");
        }
        let head = random.pick(&CONFIGS);
        let models = |s: bool| {
            ["a", "b"].map(|m| {
                let statistics =
                    if s { format!(", statistics: s{m}/model.safetensors") } else { String::new() };
                format!("  - {{ model: {m}/model.safetensors{statistics} }}\n")
            })
        };
        let config = directory.join("c.yml");
        let models = models(head.contains("mats")).concat();
        fs::write(&config, format!("{head}models:\n{models}")).expect("write a file");
        let options = MergeOptions {
            limits: Limits { max_memory: 256 << 20, threads: 2, shard_bytes: 64, untie: false },
            io: if random.below(2) == 0 { IoMode::Mmap } else { IoMode::Pread },
            refuse_nonfinite: random.below(4) > 0,
            seed: 0,
            progress: ProgressMode::None,
            resume: random.below(2) == 0,
        };
        let out = directory.join("out");
        let merged = merge(&config, &out, &options, &AtomicBool::new(false));
        let is_good = match merged {
            Ok(_) => {
                let found = verify(&out, true, IoMode::Pread).expect("a finished directory");
                assert!(found.ok, "{:?}", found.problems);
                fs::remove_dir_all(&out).expect("remove a directory");
                true
            }
            Err(error) => {
                let line = error.one_line();
                assert!(!line.contains('\n') && !line.contains("internal error"), "{line}");
                assert_eq!(error.exit_code(), 2, "{line}");
                assert!(!out.exists(), "left behind: {line}");
                false
            }
        };
        let names: Vec<_> =
            fs::read_dir(directory).expect("list").map(|e| e.expect("list").file_name()).collect();
        assert_eq!(names.len(), 5, "files where none belong: {names:?}");
        is_good
    });
}
