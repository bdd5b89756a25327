//! Synthetic checkpoints in Hugging Face's layout, with statistics files, of any size.
//!
//! Every value is a function of (seed, tensor, position), so tensors are written in pieces by all threads and no more
//! than [`PIECE_BYTES`] of one thread's output is ever in memory. The models are a common base plus small task vectors;
//! Grams are those of `spectrum`, tensors those of `layout`. Called by `examples/make_synthetic.rs` and
//! `benches/stream.rs`.

// Both includers write sets, each with what it needs of the choices.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::layout::{Layout, Tensor};
use super::random::{Random, mix};
use super::spectrum::{SpectralGram, Spectrum};

/// Bytes that one thread makes at a time.
const PIECE_BYTES: usize = 4 << 20;
/// Values of a weight that share one random stream: even, and a divisor of every piece.
const RUN: usize = 1 << 12;

/// What values are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// 8 exponent bits, 7 of mantissa.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Element {
    /// As in a safetensors header.
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    /// As in `config.json`.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    /// Bytes of one value.
    pub(crate) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    #[inline(always)]
    fn put(self, value: f32, out: &mut [u8]) {
        match self {
            Self::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Self::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            Self::F32 => out.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// Which statistics go with the models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Statistics {
    /// `input_gram` of every Linear.
    Gram,
    /// `input_gram` and, but for the head, `output_gram`.
    Kfac,
}

/// Everything that decides the bytes of a set.
#[derive(Clone, Debug)]
pub(crate) struct Synthetic {
    /// Names and shapes.
    pub(crate) layout: Layout,
    /// Fine-tuned models, besides the base.
    pub(crate) models: usize,
    /// Whether `base/` is written.
    pub(crate) base: bool,
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    /// Width between `gate`/`up` and `down`.
    pub(crate) intermediate: usize,
    /// Transformer blocks (of encoder and of decoder each, where there are both).
    pub(crate) layers: usize,
    /// Rows of the embedding and of the head.
    pub(crate) vocabulary: usize,
    /// Of all weights.
    pub(crate) element: Element,
    /// With the models, if any.
    pub(crate) statistics: Option<Statistics>,
    /// Only the first so many layers (and the head) have statistics.
    pub(crate) statistics_layers: usize,
    /// Most bytes of one shard; a larger tensor gets one for itself.
    pub(crate) shard_bytes: u64,
    /// Of everything random.
    pub(crate) seed: u64,
}

/// Where a set was written.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    /// `base/`, if asked for.
    pub(crate) base: Option<PathBuf>,
    /// `model-0/` …
    pub(crate) models: Vec<PathBuf>,
    /// `statistics-0.safetensors` …
    pub(crate) statistics: Vec<PathBuf>,
    /// Bytes of the weights of one model.
    pub(crate) model_bytes: u64,
}

impl Synthetic {
    /// Layers that bring a model nearest to `model_bytes`, at least one.
    pub(crate) fn with_model_bytes(mut self, model_bytes: u64) -> Self {
        let (layer, rest) = self.layout.elements(&self);
        let elements = (model_bytes / self.element.bytes() as u64).saturating_sub(rest as u64) as usize;
        self.layers = ((elements + layer / 2) / layer).max(1);
        self
    }

    /// Writes the set into `out`, which is made if need be; files of an earlier set are overwritten.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn write(&self, out: &Path) -> io::Result<Written> {
        let tensors = self.layout.tensors(self);
        let width = self.element.bytes();
        let model_bytes = tensors.iter().map(|t| (t.elements() * width) as u64).sum();
        let mut written = Written { base: None, models: Vec::new(), statistics: Vec::new(), model_bytes };
        if self.base {
            let directory = out.join("base");
            self.write_model(&directory, &tensors, None)?;
            written.base = Some(directory);
        }
        for model in 0..self.models {
            let directory = out.join(format!("model-{model}"));
            self.write_model(&directory, &tensors, Some(model as u64))?;
            written.models.push(directory);
            if let Some(kind) = self.statistics {
                let path = out.join(format!("statistics-{model}.safetensors"));
                self.write_statistics(&path, kind, model as u64)?;
                written.statistics.push(path);
            }
        }
        Ok(written)
    }

    fn write_model(&self, directory: &Path, tensors: &[Tensor], model: Option<u64>) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let config = self.layout.config(self);
        fs::write(directory.join("config.json"), format!("{config:#}\n"))?;

        let mut shards: Vec<Vec<&Tensor>> = Vec::new();
        let mut filled = u64::MAX;
        for tensor in tensors {
            let bytes = (tensor.elements() * self.element.bytes()) as u64;
            if filled.saturating_add(bytes) > self.shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            shards.last_mut().expect("the first tensor opens a shard").push(tensor);
        }
        let mut weight_map = Map::new();
        let mut total = 0u64;
        for (k, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", k + 1),
            };
            let entries: Vec<Entry> = shard
                .iter()
                .map(|t| Entry { name: &t.name, shape: t.shape.clone(), elements: t.elements() })
                .collect();
            let metadata = [("format".to_owned(), "pt".to_owned())];
            write_file(&directory.join(&name), self.element, &entries, &metadata, |entry, first, piece| {
                self.fill_weight(shard[entry], model, first, piece);
            })?;
            for tensor in shard {
                weight_map.insert(tensor.name.clone(), Value::from(name.as_str()));
                total += (tensor.elements() * self.element.bytes()) as u64;
            }
        }
        if shards.len() > 1 {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            fs::write(directory.join("model.safetensors.index.json"), format!("{index:#}\n"))?;
        }
        Ok(())
    }

    fn write_statistics(&self, path: &Path, kind: Statistics, model: u64) -> io::Result<()> {
        let (grams, aliases) = self.layout.grams(self, kind);
        let mut metadata: Vec<(String, String)> = [
            ("format", "mats-stream-statistics/1".to_owned()),
            ("model", format!("model-{model}")),
            ("data", "synthetic".to_owned()),
            ("examples", "1000".to_owned()),
            ("tokens", "100000".to_owned()),
            ("fisher", "empirical".to_owned()),
            ("seed", self.seed.to_string()),
        ]
        .map(|(k, v)| (k.to_owned(), v))
        .into();
        metadata.extend(aliases.into_iter().map(|(from, to)| (format!("alias:{from}"), to)));
        let entries: Vec<Entry> = grams
            .iter()
            .map(|g| {
                let elements = g.side * (g.side + 1) / 2;
                Entry { name: &g.key, shape: vec![elements], elements }
            })
            .collect();
        write_file(path, Element::Bf16, &entries, &metadata, |entry, first, piece| {
            let gram = &grams[entry];
            let common = mix(self.seed ^ mix(gram.stream));
            let spectrum = Spectrum {
                side: gram.side,
                decay: if gram.output { 2.0 } else { 1.5 },
                centred: gram.output,
                // Gradients are small; powers of two change no digit.
                scale: if gram.output { 2f64.powi(-24) } else { 1.0 },
                common,
                own: mix(common ^ model.wrapping_add(1)),
            };
            fill_gram(spectrum, first, piece);
        })
    }

    /// Base weights uniform in ±0.02, task vectors a tenth of that; norms around one.
    fn fill_weight(&self, tensor: &Tensor, model: Option<u64>, first: usize, piece: &mut [u8]) {
        let element = self.element;
        let width = element.bytes();
        let (centre, scale) = if tensor.shape.len() == 1 { (1.0f32, 0.1f32) } else { (0.0, 0.02) };
        let task_scale = if model.is_some() { 0.1 * scale } else { 0.0 };
        for (k, run) in piece.chunks_mut(RUN * width).enumerate() {
            let position = tensor.stream << 32 | (first / RUN + k) as u64;
            let mut base = Random::new(self.seed, position);
            let mut task = Random::new(mix(self.seed ^ (model.unwrap_or(0) + 1)), position);
            for four in run.chunks_mut(4 * width) {
                let (b, t) = (base.bits(), task.bits());
                for (lane, out) in four.chunks_exact_mut(width).enumerate() {
                    // 16 bits are finer than what bf16 keeps of them.
                    let unit = |bits: u64| f32::from((bits >> (16 * lane)) as u16) / 32768.0 - 1.0;
                    element.put(centre + scale * unit(b) + task_scale * unit(t), out);
                }
            }
        }
    }
}

/// Elements `first..` of the packed lower triangle, in bf16.
fn fill_gram(spectrum: Spectrum, first: usize, piece: &mut [u8]) {
    // Made anew for each piece: a tenth of the work, and nothing to share between threads.
    let gram = SpectralGram::new(spectrum);
    let mut row = vec![0.0f32; spectrum.side];
    let mut i = ((((8 * first + 1) as f64).sqrt() - 1.0) / 2.0) as usize;
    // The square root of a large number may land one row off.
    while i * (i + 1) / 2 > first {
        i -= 1;
    }
    while (i + 1) * (i + 2) / 2 <= first {
        i += 1;
    }
    let mut j = first - i * (i + 1) / 2;
    let mut rest = piece;
    while !rest.is_empty() {
        let count = (i + 1 - j).min(rest.len() / 2);
        let (out, after) = rest.split_at_mut(2 * count);
        gram.row(i, j, &mut row[..count]);
        out.chunks_exact_mut(2).zip(&row).for_each(|(out, value)| Element::Bf16.put(*value, out));
        (rest, i, j) = (after, i + 1, 0);
    }
}

struct Entry<'a> {
    name: &'a str,
    shape: Vec<usize>,
    elements: usize,
}

/// One safetensors file, its pieces filled by all threads: `fill(entry, first element, bytes)`.
fn write_file(
    path: &Path,
    element: Element,
    entries: &[Entry<'_>],
    metadata: &[(String, String)],
    fill: impl Fn(usize, usize, &mut [u8]) + Sync,
) -> io::Result<()> {
    let width = element.bytes();
    let mut header = Map::new();
    let metadata: Map<String, Value> =
        metadata.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect();
    header.insert("__metadata__".to_owned(), Value::Object(metadata));
    let mut offset = 0u64;
    let mut pieces = Vec::new();
    let step = PIECE_BYTES / width;
    for (k, entry) in entries.iter().enumerate() {
        for first in (0..entry.elements).step_by(step) {
            pieces.push((k, first, step.min(entry.elements - first), offset + (first * width) as u64));
        }
        let end = offset + (entry.elements * width) as u64;
        header.insert(
            entry.name.to_owned(),
            json!({ "dtype": element.name(), "shape": entry.shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut head = Value::Object(header).to_string().into_bytes();
    head.resize(head.len().next_multiple_of(8), b' ');

    let file = File::create(path)?;
    let start = 8 + head.len() as u64;
    file.set_len(start + offset)?;
    // Contiguous extents, so that the files read like copied ones; where it is not supported the bytes are the same.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, start + offset);
    file.write_all_at(&(head.len() as u64).to_le_bytes(), 0)?;
    file.write_all_at(&head, 8)?;
    pieces.into_par_iter().try_for_each_init(
        || vec![0u8; PIECE_BYTES],
        |buffer, (entry, first, elements, at)| {
            let piece = &mut buffer[..elements * width];
            fill(entry, first, piece);
            file.write_all_at(piece, start + at)
        },
    )
}
