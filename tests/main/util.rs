//! Scratch directories, runs of the binary, and files written and read without the code under test.
//!
//! Called by every module of the tests; asserts only what no test could go on without.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

/// A run that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mats-stream");

/// A directory of a test's own. When the test fails it stays, and every run in it is printed.
pub struct Scratch {
    directory: Option<tempfile::TempDir>,
    log: RefCell<String>,
}

/// What a run of the binary gave.
#[derive(Debug)]
pub struct Output {
    /// Exit code; 128 + N where signal N ended the process, as shells say it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Scratch {
    pub fn new() -> Self {
        let directory =
            tempfile::Builder::new().prefix("mats-stream-test-").tempdir().expect("a temporary directory");
        Self { directory: Some(directory), log: RefCell::default() }
    }

    pub fn path(&self) -> &Path {
        self.directory.as_ref().expect("taken only when dropped").path()
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a file, its directories too.
    pub fn write(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(path.parent().expect("inside the scratch directory")).expect("create directories");
        fs::write(&path, bytes).expect("write a file");
        path
    }

    /// A checkpoint directory with one `model.safetensors` and a small config.
    pub fn model(&self, name: &str, tensors: &[Tensor]) -> PathBuf {
        self.write(format!("{name}/config.json"), MODEL_CONFIG);
        self.write(format!("{name}/model.safetensors"), safetensors(tensors, &[]));
        self.join(name)
    }

    /// A checkpoint directory with `shards` shards, tensors dealt out in turn, and its index.
    pub fn sharded_model(&self, name: &str, tensors: &[Tensor], shards: usize) -> PathBuf {
        self.write(format!("{name}/config.json"), MODEL_CONFIG);
        let mut weight_map = Map::new();
        for shard in 0..shards {
            let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
            let own: Vec<Tensor> = tensors.iter().skip(shard).step_by(shards).cloned().collect();
            weight_map.extend(own.iter().map(|t| (t.name.clone(), json!(file))));
            self.write(format!("{name}/{file}"), safetensors(&own, &[]));
        }
        let total: usize = tensors.iter().map(|t| t.bytes.len()).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        self.write(format!("{name}/model.safetensors.index.json"), index.to_string());
        self.join(name)
    }

    /// Runs the binary in this directory.
    pub fn run(&self, args: &[&str]) -> Output {
        self.run_command(self.command(args), args)
    }

    /// Runs the binary with further environment variables.
    pub fn run_with(&self, args: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = self.command(args);
        command.envs(variables.iter().copied());
        self.run_command(command, args)
    }

    /// Runs a command that ends in the binary; `args` are for the log.
    pub fn run_command(&self, mut command: Command, args: &[&str]) -> Output {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the binary");
        let stdout = drain(child.stdout.take().expect("piped"));
        let stderr = drain(child.stderr.take().expect("piped"));
        let status = wait(&mut child, started + TIME_LIMIT);
        let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&thread.join().expect("the reader does not panic")).into_owned()
        };
        let output = Output { code: status.map_or(-1, code), stdout: text(stdout), stderr: text(stderr) };
        self.note(args, &output, started.elapsed());
        assert!(status.is_some(), "killed after {TIME_LIMIT:?}");
        assert!(!output.stderr.contains("panicked at"), "a panic reached the user");
        output
    }

    /// The command that [`Scratch::run`] runs, for tests that need it their own way.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(args).current_dir(self.path()).env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
        command
    }

    /// The binary behind `sh -c`, after `prelude`: for limits that a shell sets.
    pub fn run_after(&self, prelude: &str, args: &[&str]) -> Output {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{prelude}; exec \"$0\" \"$@\"")).arg(BINARY).args(args);
        command.current_dir(self.path()).env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
        self.run_command(command, args)
    }

    /// Adds a run to what is printed when the test fails.
    pub fn note(&self, args: &[&str], output: &Output, took: Duration) {
        let shorten = |text: &str| match text.char_indices().nth(4000) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text.to_owned(),
        };
        writeln!(
            self.log.borrow_mut(),
            "$ mats-stream {}\n  in {}\n  exit code {} after {:.2} s\n  stdout: {}\n  stderr: {}",
            args.join(" "),
            self.path().display(),
            output.code,
            took.as_secs_f64(),
            shorten(&output.stdout),
            shorten(&output.stderr),
        )
        .expect("a string takes any text");
    }

    /// Writes the config and merges it into `out`, which must succeed.
    pub fn merge(&self, config: &str, out: &str, flags: &[&str]) -> Merged {
        let output = self.try_merge(config, out, flags);
        assert_eq!(output.code, 0, "{}", output.stderr);
        self.merged(out)
    }

    /// Writes the config to `OUT.yml` and runs `merge` on it.
    pub fn try_merge(&self, config: &str, out: &str, flags: &[&str]) -> Output {
        let name = format!("{}.yml", out.replace('/', "_"));
        self.write(&name, config);
        let args = [&["merge", &name, "--out", out, "--progress", "none"], flags].concat();
        self.run(&args)
    }

    /// Writes the config to `plan.yml` and runs `plan --json` on it, which must succeed.
    pub fn plan(&self, config: &str, flags: &[&str]) -> Value {
        self.write("plan.yml", config);
        let output = self.run(&[&["plan", "plan.yml", "--json"], flags].concat());
        assert_eq!(output.code, 0, "{}", output.stderr);
        strict_json(&output.stdout)
    }

    /// Reads a finished output directory.
    pub fn merged(&self, out: &str) -> Merged {
        let directory = self.join(out);
        let report = strict_json(
            &fs::read_to_string(directory.join("merge_report.json")).expect("a finished run reports"),
        );
        Merged { tensors: read_checkpoint(&directory), directory, report }
    }

    /// Merges a config that must be refused: exit code 2, one error line that has all of `words`, no output left.
    pub fn refuse(&self, config: &str, words: &[&str]) -> String {
        self.refuse_with(config, &[], words)
    }

    /// As [`Scratch::refuse`], with further flags.
    pub fn refuse_with(&self, config: &str, flags: &[&str], words: &[&str]) -> String {
        let output = self.try_merge(config, "refused", flags);
        assert_eq!(output.code, 2, "{}", output.stderr);
        assert!(output.stdout.is_empty(), "stdout carries only what was asked for");
        let line = error_line(&output);
        for word in words {
            assert!(line.contains(word), "the error should name `{word}`: {line}");
        }
        assert!(!self.join("refused").exists(), "a refused merge leaves an output directory");
        line
    }

    /// As [`Scratch::refuse`], and `plan`, which sees headers alone, must find it too.
    pub fn refuse_unread(&self, config: &str, words: &[&str]) {
        self.refuse(config, words);
        self.write("plan.yml", config);
        let planned = self.run(&["plan", "plan.yml"]);
        assert_eq!(planned.code, 2, "plan finds it too: {}", planned.stderr);
        let line = error_line(&planned);
        for word in words {
            assert!(line.contains(word), "the error of plan should name `{word}`: {line}");
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(directory) = self.directory.take()
        {
            eprintln!("kept: {}\n{}", directory.keep().display(), self.log.borrow());
        }
    }
}

/// The one error line of a failed run: the last of stderr, and the only one of its kind.
pub fn error_line(output: &Output) -> String {
    let lines: Vec<&str> = output.stderr.lines().collect();
    let errors = lines.iter().filter(|line| line.starts_with("mats-stream: error: ")).count();
    assert_eq!(errors, 1, "one error line expected: {}", output.stderr);
    let last = lines.last().expect("there is one");
    assert!(last.starts_with("mats-stream: error: "), "the error comes last: {}", output.stderr);
    assert!(!last.chars().any(char::is_control), "control characters reach the terminal: {last:?}");
    (*last).to_owned()
}

fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("read a pipe");
        bytes
    })
}

/// `None`: killed at the deadline.
pub fn wait(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().expect("wait for the binary") {
            return Some(status);
        }
        if Instant::now() > deadline {
            child.kill().expect("kill the binary");
            child.wait().expect("wait for the binary");
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// As shells say it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

const MODEL_CONFIG: &str = r#"{"model_type": "test", "num_hidden_layers": 2, "torch_dtype": "float32"}"#;

/// A tensor as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// As safetensors spells it.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Rounds `values` to `dtype`: F64, F32, F16, BF16 or I64.
    pub fn new(name: &str, dtype: &'static str, shape: &[usize], values: &[f64]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name} {shape:?}");
        let encode = |v: f64| match dtype {
            "F64" => v.to_le_bytes().to_vec(),
            "F32" => (v as f32).to_le_bytes().to_vec(),
            "F16" => f16::from_f64(v).to_le_bytes().to_vec(),
            "BF16" => bf16::from_f64(v).to_le_bytes().to_vec(),
            "I64" => (v as i64).to_le_bytes().to_vec(),
            other => panic!("no constructor for {other}"),
        };
        let bytes = values.iter().flat_map(|v| encode(*v)).collect();
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }

    pub fn f32(name: &str, shape: &[usize], values: &[f64]) -> Self {
        Self::new(name, "F32", shape, values)
    }

    /// Random values of about 1.
    pub fn random(name: &str, dtype: &'static str, shape: &[usize], random: &mut Random) -> Self {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| random.uniform()).collect();
        Self::new(name, dtype, shape, &values)
    }

    /// What is stored, exactly.
    pub fn values(&self) -> Vec<f64> {
        match self.dtype {
            "F64" => {
                self.bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8"))).collect()
            }
            "F32" => self
                .bytes
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("4"))))
                .collect(),
            "F16" => self
                .bytes
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes(b.try_into().expect("2")).to_f64())
                .collect(),
            "BF16" => self
                .bytes
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes(b.try_into().expect("2")).to_f64())
                .collect(),
            other => panic!("no floats in {other}"),
        }
    }

    /// The same tensor with one value overwritten.
    pub fn with_value(&self, at: usize, value: f64) -> Self {
        let mut values = self.values();
        values[at] = value;
        Self::new(&self.name, self.dtype, &self.shape, &values)
    }

    pub fn renamed(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }
}

/// SplitMix64: the same values everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [-1, 1), 20 random bits: exact in f32, and sums of a few stay exact in f64.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 44) as f64 / f64::from(1 << 19) - 1.0
    }

    pub fn values(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.uniform()).collect()
    }
}

/// The bytes of a safetensors file, tensors in the order given.
pub fn safetensors(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Vec<u8> {
    safetensors_aligned(tensors, metadata, 0)
}

/// As [`safetensors`], with a header whose length is `misalignment` more than a multiple of 8.
pub fn safetensors_aligned(tensors: &[Tensor], metadata: &[(&str, &str)], misalignment: usize) -> Vec<u8> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let strings: Map<String, Value> = metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        header.insert("__metadata__".to_owned(), Value::Object(strings));
    }
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry =
            json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()] });
        assert!(header.insert(tensor.name.clone(), entry).is_none(), "{} is there twice", tensor.name);
    }
    let mut header = Value::Object(header).to_string();
    while header.len() % 8 != misalignment {
        header.push(' ');
    }
    raw_safetensors(header.as_bytes(), &data)
}

/// A safetensors file with any header and any data, lies included.
pub fn raw_safetensors(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Reads a safetensors file with the `safetensors` crate.
pub fn read_safetensors(path: &Path) -> Vec<Tensor> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file =
        safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.iter()
        .map(|(name, view)| Tensor {
            name: name.to_owned(),
            dtype: DTYPES
                .into_iter()
                .find(|d| *d == view.dtype().to_string())
                .unwrap_or_else(|| panic!("{name}: unexpected {}", view.dtype())),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        })
        .collect()
}

const DTYPES: [&str; 7] = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL"];

/// Reads a checkpoint directory as a user of Hugging Face would: by its index if there is one.
pub fn read_checkpoint(directory: &Path) -> BTreeMap<String, Tensor> {
    let single = directory.join("model.safetensors");
    let Ok(index) = fs::read_to_string(directory.join("model.safetensors.index.json")) else {
        return read_safetensors(&single).into_iter().map(|t| (t.name.clone(), t)).collect();
    };
    assert!(!single.exists(), "an index beside a single file");
    let index = strict_json(&index);
    let weight_map = index["weight_map"].as_object().expect("an index has a weight_map");
    let mut tensors = BTreeMap::new();
    let mut shards: Vec<&str> = weight_map.values().map(|v| v.as_str().expect("a file name")).collect();
    shards.sort_unstable();
    shards.dedup();
    for shard in shards {
        for tensor in read_safetensors(&directory.join(shard)) {
            assert_eq!(weight_map.get(&tensor.name).and_then(Value::as_str), Some(shard), "{}", tensor.name);
            tensors.insert(tensor.name.clone(), tensor);
        }
    }
    assert_eq!(tensors.len(), weight_map.len(), "the index lists what the shards hold");
    let bytes: usize = tensors.values().map(|t| t.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes, "total_size counts the tensors' bytes");
    tensors
}

/// Parses JSON by the letter: serde_json refuses NaN, Infinity and anything after the value.
pub fn strict_json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("not JSON ({e}): {text}"))
}

/// A finished output directory.
pub struct Merged {
    pub directory: PathBuf,
    pub tensors: BTreeMap<String, Tensor>,
    pub report: Value,
}

impl Merged {
    pub fn values(&self, name: &str) -> Vec<f64> {
        self.tensor(name).values()
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name} in the output"))
    }

    /// The report's record of one parameter.
    pub fn parameter(&self, name: &str) -> &Value {
        self.report["parameters"].get(name).unwrap_or_else(|| panic!("no record of {name}"))
    }

    /// What the report says was not merged, and why; for searching.
    pub fn left_out(&self) -> String {
        format!("{} {}", self.report["unmerged"], self.report["warnings"])
    }
}

/// A statistics file in the making.
#[derive(Default)]
pub struct Statistics {
    tensors: Vec<Tensor>,
    aliases: Vec<(String, String)>,
}

impl Statistics {
    pub fn new() -> Self {
        Self::default()
    }

    /// Any tensor under any key.
    pub fn raw(mut self, tensor: Tensor) -> Self {
        self.tensors.push(tensor);
        self
    }

    /// A full square matrix.
    pub fn full(self, key: &str, side: usize, values: &[f64]) -> Self {
        self.raw(Tensor::f32(key, &[side, side], values))
    }

    /// The lower triangle of a full square matrix.
    pub fn packed(self, key: &str, side: usize, values: &[f64]) -> Self {
        let triangle: Vec<f64> =
            (0..side).flat_map(|i| values[i * side..=i * side + i].iter().copied()).collect();
        self.raw(Tensor::f32(key, &[triangle.len()], &triangle))
    }

    /// `F` of `FᵀF`.
    pub fn factor(self, key: &str, side: usize, values: &[f64]) -> Self {
        self.raw(Tensor::f32(key, &[values.len() / side, side], values))
    }

    pub fn diagonal(self, parameter: &str, shape: &[usize], values: &[f64]) -> Self {
        self.raw(Tensor::f32(&format!("{parameter}/fisher_diagonal"), shape, values))
    }

    /// Any other entry of the metadata.
    pub fn metadata(mut self, key: &str, value: &str) -> Self {
        self.aliases.push((key.to_owned(), value.to_owned()));
        self
    }

    /// `alias:{key}` = `target`.
    pub fn alias(mut self, key: &str, target: &str) -> Self {
        self.aliases.push((format!("alias:{key}"), target.to_owned()));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut metadata =
            vec![("format", "mats-stream-statistics/1"), ("model", "test"), ("examples", "10")];
        metadata.extend(self.aliases.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        safetensors(&self.tensors, &metadata)
    }

    pub fn write(&self, scratch: &Scratch, name: &str) -> PathBuf {
        scratch.write(name, self.bytes())
    }
}

/// `models:` of a config: a directory each, and its statistics file where there is one.
pub fn models(entries: &[(&str, Option<&str>)]) -> String {
    let mut text = "models:\n".to_owned();
    for (model, statistics) in entries {
        writeln!(text, "  - model: {model}").expect("a string takes any text");
        if let Some(statistics) = statistics {
            writeln!(text, "    statistics: {statistics}").expect("a string takes any text");
        }
    }
    text
}

/// Writes bytes to a file that has to exist only as a name: for sparse files.
pub fn sparse(path: &Path, head: &[u8], bytes: u64) {
    let mut file = fs::File::create(path).expect("create a file");
    file.write_all(head).expect("write a file");
    file.set_len(bytes).expect("extend a file");
}
