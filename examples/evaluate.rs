//! Accuracy of a merged checkpoint on the three tasks of `fixtures/`: `cargo run --release --example evaluate -- DIR`.
//!
//! DIR holds a T5 encoder in Hugging Face's layout, one `model.safetensors` or shards with an index. The whole forward
//! pass is written out below in plain f32 loops, so that this file also says what the merged weights do. The task
//! heads are not merged: each task's own head, its examples and labels come from `fixtures/eval/{task}.safetensors`.
//!
//! `--split test|validation` (default test), `--eval DIR` for other evaluation files, `--json`.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

type Fallible<T> = Result<T, Box<dyn Error>>;

/// A row-major matrix; a weight is `[out, in]`, activations are `[tokens, features]`.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.columns..(index + 1) * self.columns]
    }

    /// `self · weightᵀ`, as every Linear without a bias: `[tokens, in]` to `[tokens, out]`.
    fn linear(&self, weight: &Matrix) -> Matrix {
        let values =
            (0..self.rows).flat_map(|t| (0..weight.rows).map(move |o| dot(self.row(t), weight.row(o))));
        Matrix { rows: self.rows, columns: weight.rows, values: values.collect() }
    }

    fn add(&mut self, other: &Matrix) {
        self.values.iter_mut().zip(&other.values).for_each(|(x, y)| *x += y);
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(a, b)| a * b).sum()
}

/// Tensors by name, decoded to f32 (the fixtures store the embedding BF16).
struct Tensors(HashMap<String, Matrix>);

impl Tensors {
    /// Adds one safetensors file. A vector becomes one row; integers become f32, exact for token ids and labels.
    fn load(&mut self, path: &Path) -> Fallible<()> {
        let bytes = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| format!("{}: {e}", path.display()))?;
        for (name, view) in file.tensors() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => {
                    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
                }
                Dtype::I32 => data
                    .chunks_exact(4)
                    .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32)
                    .collect(),
                Dtype::BF16 => {
                    data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                }
                Dtype::F16 => {
                    data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                }
                Dtype::I64 => continue, // the position buffer, which the forward pass does not use
                other => {
                    return Err(format!("{}: tensor `{name}` has dtype {other:?}", path.display()).into());
                }
            };
            let columns = view.shape().last().copied().unwrap_or(1);
            let rows = view.shape().iter().rev().skip(1).product();
            self.0.insert(name, Matrix { rows, columns, values });
        }
        Ok(())
    }

    fn take(&mut self, name: &str) -> Fallible<Matrix> {
        self.0.remove(name).ok_or_else(|| format!("tensor `{name}` is missing").into())
    }

    /// As `take`, refusing another shape: the loops of the forward pass rely on it.
    fn shaped(&mut self, name: &str, rows: usize, columns: usize) -> Fallible<Matrix> {
        let found = self.take(name)?;
        if (found.rows, found.columns) != (rows, columns) {
            let (r, c) = (found.rows, found.columns);
            return Err(format!("tensor `{name}` is [{r}, {c}], expected [{rows}, {columns}]").into());
        }
        Ok(found)
    }
}

/// One transformer block: self-attention, then a two-layer network with ReLU, each behind its own layer norm.
struct Block {
    attention_norm: Matrix,
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    feed_forward_norm: Matrix,
    expand: Matrix,
    contract: Matrix,
}

struct Encoder {
    heads: usize,
    head_size: usize,
    buckets: usize,
    max_distance: usize,
    epsilon: f32,
    embedding: Matrix,
    /// `[buckets, heads]`: added to the attention scores of all blocks.
    relative_bias: Matrix,
    blocks: Vec<Block>,
    final_norm: Matrix,
}

impl Encoder {
    fn load(directory: &Path) -> Fallible<Self> {
        let config = read_json(&directory.join("config.json"))?;
        let integer = |key: &str| -> Fallible<usize> {
            let value = config[key].as_u64().ok_or_else(|| format!("config.json: `{key}` is no integer"))?;
            Ok(usize::try_from(value)?)
        };
        let mut tensors = Tensors(HashMap::new());
        for shard in shards(directory)? {
            tensors.load(&shard)?;
        }
        let (d, ff, heads, head_size) =
            (integer("d_model")?, integer("d_ff")?, integer("num_heads")?, integer("d_kv")?);
        let (inner, buckets) = (heads * head_size, integer("relative_attention_num_buckets")?);
        let bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        let relative_bias = tensors.shaped(bias, buckets, heads)?;
        let mut blocks = Vec::new();
        for index in 0..integer("num_layers")? {
            let mut part = |name: &str, rows, columns| {
                tensors.shaped(&format!("encoder.block.{index}.layer.{name}.weight"), rows, columns)
            };
            blocks.push(Block {
                attention_norm: part("0.layer_norm", 1, d)?,
                query: part("0.SelfAttention.q", inner, d)?,
                key: part("0.SelfAttention.k", inner, d)?,
                value: part("0.SelfAttention.v", inner, d)?,
                output: part("0.SelfAttention.o", d, inner)?,
                feed_forward_norm: part("1.layer_norm", 1, d)?,
                expand: part("1.DenseReluDense.wi", ff, d)?,
                contract: part("1.DenseReluDense.wo", d, ff)?,
            });
        }
        Ok(Encoder {
            heads,
            head_size,
            buckets,
            max_distance: integer("relative_attention_max_distance")?,
            epsilon: config["layer_norm_epsilon"].as_f64().unwrap_or(1e-6) as f32,
            embedding: tensors.shaped("shared.weight", integer("vocab_size")?, d)?,
            relative_bias,
            blocks,
            final_norm: tensors.shaped("encoder.final_layer_norm.weight", 1, d)?,
        })
    }

    /// The mean of the final hidden states of one example, `[d_model]`; `ids` without padding.
    ///
    /// Leaving padding out is the same as masking it: no other token would attend to it.
    fn pooled(&self, ids: &[usize]) -> Fallible<Vec<f32>> {
        let mut x = Matrix { rows: ids.len(), columns: self.embedding.columns, values: Vec::new() };
        for &id in ids {
            if id >= self.embedding.rows {
                return Err(format!("token id {id}, but the vocabulary has {}", self.embedding.rows).into());
            }
            x.values.extend_from_slice(self.embedding.row(id));
        }
        for block in &self.blocks {
            let normal = self.norm(&x, &block.attention_norm);
            x.add(&self.attend(block, &normal).linear(&block.output));
            let mut wide = self.norm(&x, &block.feed_forward_norm).linear(&block.expand);
            wide.values.iter_mut().for_each(|value| *value = value.max(0.0));
            x.add(&wide.linear(&block.contract));
        }
        let hidden = self.norm(&x, &self.final_norm);
        Ok((0..hidden.columns)
            .map(|c| (0..hidden.rows).map(|t| hidden.row(t)[c]).sum::<f32>() / hidden.rows as f32)
            .collect())
    }

    /// T5's layer norm: divides by the root mean square, subtracts nothing, adds nothing.
    fn norm(&self, x: &Matrix, weight: &Matrix) -> Matrix {
        let mut values = Vec::with_capacity(x.values.len());
        for t in 0..x.rows {
            let scale = (dot(x.row(t), x.row(t)) / x.columns as f32 + self.epsilon).sqrt().recip();
            values.extend(x.row(t).iter().zip(&weight.values).map(|(v, w)| w * (v * scale)));
        }
        Matrix { rows: x.rows, columns: x.columns, values }
    }

    /// The heads' mixed values `[tokens, heads·head_size]`, before the output projection.
    fn attend(&self, block: &Block, x: &Matrix) -> Matrix {
        let (q, k, v) = (x.linear(&block.query), x.linear(&block.key), x.linear(&block.value));
        let mut mixed = Matrix { rows: x.rows, columns: q.columns, values: vec![0.0; q.values.len()] };
        for head in 0..self.heads {
            let part = head * self.head_size..(head + 1) * self.head_size;
            for t in 0..x.rows {
                // No division by √head_size: T5 has it in the initial scale of q instead.
                let score = |s| dot(&q.row(t)[part.clone()], &k.row(s)[part.clone()]);
                let bias = |s| self.relative_bias.row(self.bucket(t, s))[head];
                let scores: Vec<f32> = (0..x.rows).map(|s| score(s) + bias(s)).collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let exponentials: Vec<f32> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f32 = exponentials.iter().sum();
                let to = &mut mixed.values[t * q.columns..][part.clone()];
                for (s, exponential) in exponentials.iter().enumerate() {
                    to.iter_mut()
                        .zip(&v.row(s)[part.clone()])
                        .for_each(|(m, y)| *m += exponential / total * y);
                }
            }
        }
        mixed
    }

    /// Bucket of a relative position: half for keys after the query; near distances one bucket each, then logarithmic.
    fn bucket(&self, query: usize, key: usize) -> usize {
        let half = self.buckets / 2;
        let exact = half / 2;
        let distance = query.abs_diff(key);
        let side = if key > query { half } else { 0 };
        if distance < exact {
            return side + distance;
        }
        let growth = (distance as f32 / exact as f32).ln() / (self.max_distance as f32 / exact as f32).ln();
        side + (exact + (growth * (half - exact) as f32) as usize).min(half - 1)
    }
}

/// The files that make up a checkpoint.
fn shards(directory: &Path) -> Fallible<Vec<PathBuf>> {
    let index = directory.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![directory.join("model.safetensors")]);
    }
    let json = read_json(&index)?;
    let map = json["weight_map"].as_object().ok_or("the index has no weight_map")?;
    let names: BTreeSet<&str> = map.values().filter_map(|v| v.as_str()).collect();
    Ok(names.iter().map(|name| directory.join(name)).collect())
}

fn read_json(path: &Path) -> Fallible<serde_json::Value> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?)
}

/// Fraction of a task's examples whose largest logit is the label.
fn accuracy(encoder: &Encoder, file: &Path, split: &str) -> Fallible<f64> {
    let mut task = Tensors(HashMap::new());
    task.load(file)?;
    let prefix = if split == "test" { "" } else { "validation." };
    let ids = task.take(&format!("{prefix}input_ids"))?;
    let labels = task.shaped(&format!("{prefix}labels"), 1, ids.rows)?;
    let bias = task.take("head.bias")?;
    let head = task.shaped("head.weight", bias.columns, encoder.embedding.columns)?;
    let right: Result<Vec<bool>, String> = (0..ids.rows)
        .into_par_iter()
        .map(|example| {
            let tokens: Vec<usize> =
                ids.row(example).iter().map(|&id| id as usize).filter(|&id| id != 0).collect();
            let state = encoder.pooled(&tokens).map_err(|e| e.to_string())?;
            let logits = (0..head.rows).map(|class| dot(&state, head.row(class)) + bias.values[class]);
            let guess = logits.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(class, _)| class);
            Ok(guess == Some(labels.values[example] as usize))
        })
        .collect();
    let right = right?;
    Ok(right.iter().filter(|&&hit| hit).count() as f64 / right.len() as f64)
}

fn main() -> Fallible<()> {
    let (mut model, mut split, mut json) = (None, "test".to_owned(), false);
    let mut eval = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/eval"));
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--split" => split = arguments.next().ok_or("--split needs test or validation")?,
            "--eval" => eval = arguments.next().ok_or("--eval needs a directory")?.into(),
            "--json" => json = true,
            _ if argument.starts_with('-') || model.is_some() => {
                return Err(format!("unexpected argument `{argument}`").into());
            }
            _ => model = Some(PathBuf::from(argument)),
        }
    }
    if split != "test" && split != "validation" {
        return Err(format!("--split is `{split}`, expected test or validation").into());
    }
    let encoder =
        Encoder::load(&model.ok_or("usage: evaluate DIR [--split test|validation] [--eval DIR] [--json]")?)?;
    let entries = fs::read_dir(&eval).map_err(|e| format!("{}: {e}", eval.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    let mut results: Vec<(String, f64)> = Vec::new();
    for file in &files {
        let task = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        results.push((task, accuracy(&encoder, file, &split)?));
    }
    if results.is_empty() {
        return Err(format!("{}: no .safetensors file", eval.display()).into());
    }
    let mean = results.iter().map(|(_, value)| value).sum::<f64>() / results.len() as f64;
    results.push(("mean".to_owned(), mean));
    if json {
        let object: serde_json::Map<_, _> =
            results.into_iter().map(|(task, value)| (task, value.into())).collect();
        println!("{}", serde_json::Value::Object(object));
    } else {
        results.iter().for_each(|(task, value)| println!("{task} {value:.4}"));
    }
    Ok(())
}
