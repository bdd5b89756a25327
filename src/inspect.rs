//! `mats-stream inspect PATH`: what a checkpoint or a statistics file holds, and with `--stats` what its
//! values are like.
//!
//! `main` calls [`inspect`] and prints the [`Inspection`] as a table or as JSON. Without statistics only
//! headers are read; with them every tensor is streamed once, in tiles. Of a Gram the [`spectrum`] follows, which is in
//! memory as a whole only where the caller's bound allows. Nothing is written and nothing is judged here: a NaN is
//! counted, not refused.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use pulp::Arch;
use serde::Serialize;

use crate::read::{
    Checkpoint, Dtype, IoMode, ReadError, TensorMeta, decode_f64, decode_integer, escaped,
    first_nonfinite_f64,
};
use crate::report::units::Bytes;
use crate::statistics::format::{ALIAS_PREFIX, FORMAT_KEY, split_key};
use crate::statistics::{FORMAT, Form, Kind, ModelStatistics};

pub mod spectrum;

use spectrum::{Method, Spectrum};

/// Elements that are decoded at a time: 4 MiB of f64.
const TILE: usize = 512 << 10;

/// What kind of file was inspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// A model.
    Checkpoint,
    /// Statistics of a model.
    Statistics,
}

/// The result of [`inspect`]; serialised, it is what `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The path as it was given.
    pub path: String,
    /// What is there.
    pub content: Content,
    /// Its files, by name.
    pub files: Vec<FileRow>,
    /// Number of tensors.
    pub tensor_count: usize,
    /// Elements of all tensors.
    pub elements: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Totals by dtype.
    pub dtypes: BTreeMap<&'static str, DtypeRow>,
    /// Free-form strings of the headers, without aliases.
    pub metadata: BTreeMap<String, String>,
    /// Aliases of a statistics file, as stated there.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, String>,
    /// Examples that statistics are over, where their file says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub examples: Option<u64>,
    /// Tokens that statistics are over, where their file says it; those of encoder and decoder are in the metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// By file and offset.
    pub tensors: Vec<TensorRow>,
    /// What was accepted but should be known.
    pub warnings: Vec<String>,
}

/// One file of an [`Inspection`].
#[derive(Clone, Debug, Serialize)]
pub struct FileRow {
    pub name: String,
    pub bytes: u64,
}

/// Totals of one dtype.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct DtypeRow {
    pub tensors: usize,
    pub elements: u64,
    pub bytes: u64,
}

/// One tensor of an [`Inspection`].
#[derive(Clone, Debug, Serialize)]
pub struct TensorRow {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub elements: u64,
    pub bytes: u64,
    /// Place in [`Inspection::files`].
    pub file: usize,
    /// What it is of its parameter, in a statistics file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// Aliases that lead to it, through other aliases too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shared_by: Vec<String>,
    /// Only where asked for, and only of dtypes whose values are numbers to us.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<TensorStats>,
}

/// What a tensor's values are like. Norm and extremes are those of the finite values.
#[derive(Clone, Debug, Serialize)]
pub struct TensorStats {
    /// Euclidean norm.
    pub l2_norm: f64,
    /// `None` if no value is finite.
    pub min: Option<f64>,
    /// `None` if no value is finite.
    pub max: Option<f64>,
    pub nan_count: u64,
    pub inf_count: u64,
    /// For a Gram, a Fisher block or a factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gram: Option<GramStats>,
}

/// What a symmetric matrix is like. Values that could not be found are `None`.
#[derive(Clone, Debug, Serialize)]
pub struct GramStats {
    pub side: usize,
    /// Sum of the diagonal; for a factor F that of FᵀF, which is ‖F‖².
    pub trace: f64,
    /// Least diagonal entry; below zero the matrix is no Gram. Not of factors.
    pub min_diagonal: Option<f64>,
    /// `trace² / ‖·‖²_F`: how many equal eigenvalues would have this trace and norm. Not of factors.
    pub effective_rank: Option<f64>,
    /// Largest eigenvalue, or by Lanczos steps one below it.
    pub largest_eigenvalue: Option<f64>,
    /// The least eigenvalue is at most this: it is this, or Lanczos steps approach it from above.
    pub smallest_eigenvalue_at_most: Option<f64>,
    /// The ratio of the two: the condition number is at least this. `None` where the least one is not above
    /// zero to the precision of the computation.
    pub condition_at_least: Option<f64>,
    /// What is known of the eigenvalues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spectrum: Option<Spectrum>,
}

/// Inspects a checkpoint (a directory, a file, an index) or a statistics file.
///
/// - `stats`: stream the values too, with at most so many bytes held for a spectrum.
///
/// # Errors As [`Checkpoint::open`] and [`Checkpoint::read`]; [`ReadError::Changed`] if a file changed while
/// it was streamed.
pub fn inspect(path: &Path, stats: Option<u64>, io: IoMode) -> Result<Inspection, ReadError> {
    let checkpoint = Checkpoint::open(path, io)?;
    let mut warnings = checkpoint.warnings().to_vec();
    let is_statistics = checkpoint.metadata().get(FORMAT_KEY).is_some_and(|format| format == FORMAT);
    let mut shared: BTreeMap<String, Vec<String>> = BTreeMap::new();
    if is_statistics && let [file] = checkpoint.files() {
        match ModelStatistics::open(&[file.path().to_owned()], io) {
            Ok(statistics) => {
                for (key, target) in statistics.aliases() {
                    shared.entry(target.to_owned()).or_default().push(key.to_owned());
                }
            }
            // By itself it may be no model's statistics, as an alias may lead to another file: say so, and show
            // it.
            Err(error) => warnings.push(error.to_string()),
        }
    }
    let count = |key: &str| {
        let stated = checkpoint.metadata().get(key).filter(|_| is_statistics);
        stated.and_then(|count| count.parse::<u64>().ok())
    };
    let (examples, tokens) = (count("examples"), count("tokens"));

    let (aliases, metadata): (BTreeMap<_, _>, BTreeMap<_, _>) = checkpoint
        .metadata()
        .clone()
        .into_iter()
        .partition(|(key, _)| is_statistics && key.starts_with(ALIAS_PREFIX));
    let aliases = aliases
        .into_iter()
        .map(|(key, target)| (key.strip_prefix(ALIAS_PREFIX).unwrap_or(&key).to_owned(), target))
        .collect();

    let mut dtypes: BTreeMap<&'static str, DtypeRow> = BTreeMap::new();
    let mut tensors = Vec::with_capacity(checkpoint.tensors().len());
    let mut buffers = Buffers::default();
    for tensor in checkpoint.tensors() {
        let totals = dtypes.entry(tensor.dtype.name()).or_default();
        totals.tensors += 1;
        totals.elements = totals.elements.saturating_add(tensor.elements());
        totals.bytes = totals.bytes.saturating_add(tensor.bytes);
        let kind = is_statistics
            .then(|| split_key(checkpoint.files()[tensor.file].path(), &tensor.name).ok())
            .flatten()
            .map(|(_, kind)| kind);
        let form = kind.and_then(|kind| kind.form(&tensor.shape).ok());
        let stats = match stats {
            Some(max_memory) => tensor_stats(&checkpoint, tensor, form, max_memory, &mut buffers)?,
            None => None,
        };
        tensors.push(TensorRow {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            elements: tensor.elements(),
            bytes: tensor.bytes,
            file: tensor.file,
            kind,
            shared_by: shared.remove(&tensor.name).unwrap_or_default(),
            stats,
        });
    }
    if stats.is_some() {
        checkpoint.check_unchanged()?;
    }
    Ok(Inspection {
        path: path.to_string_lossy().into_owned(),
        content: if is_statistics { Content::Statistics } else { Content::Checkpoint },
        files: checkpoint
            .files()
            .iter()
            .map(|file| FileRow {
                name: file.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
                bytes: file.len(),
            })
            .collect(),
        tensor_count: tensors.len(),
        elements: tensors.iter().fold(0u64, |sum, row| sum.saturating_add(row.elements)),
        bytes: checkpoint.total_bytes(),
        dtypes,
        metadata,
        aliases,
        examples,
        tokens,
        tensors,
        warnings,
    })
}

/// Buffers that serve one tile after the other.
#[derive(Default)]
struct Buffers {
    scratch: Vec<u8>,
    tile: Vec<f64>,
}

/// Streams one tensor. `None` for dtypes whose values are not numbers to us (F8, F6, F4, C64).
fn tensor_stats(
    checkpoint: &Checkpoint,
    tensor: &TensorMeta,
    form: Option<Form>,
    max_memory: u64,
    buffers: &mut Buffers,
) -> Result<Option<TensorStats>, ReadError> {
    if !tensor.dtype.is_float() && !tensor.dtype.is_copied() {
        return Ok(None);
    }
    let mut values = ValueStats::default();
    let mut diagonal = form.and_then(Diagonal::of);

    // Each dtype here has whole bytes.
    let element_bytes = tensor.dtype.bits() / 8;
    let elements = tensor.elements();
    let mut start = 0;
    checkpoint.will_need(tensor, 0..tensor.bytes.min(TILE as u64 * element_bytes));
    while start < elements {
        let end = (start + TILE as u64).min(elements);
        let next = end * element_bytes;
        checkpoint.will_need(tensor, next..tensor.bytes.min(next + TILE as u64 * element_bytes));
        let range = start * element_bytes..next;
        let bytes = checkpoint.read(tensor, range.clone(), &mut buffers.scratch)?;
        buffers.tile.resize((end - start) as usize, 0.0);
        if tensor.dtype.is_float() {
            decode_f64(tensor.dtype, bytes, &mut buffers.tile)?;
        } else {
            for (value, element) in buffers.tile.iter_mut().zip(bytes.chunks_exact(element_bytes as usize)) {
                *value = decode_integer(tensor.dtype, element).map_or(f64::NAN, |v| v as f64);
            }
        }
        checkpoint.release(tensor, range, false);
        values.add(&buffers.tile);
        if let Some(diagonal) = &mut diagonal {
            diagonal.add(start, &buffers.tile);
        }
        start = end;
    }

    let finite = values.nan + values.inf == 0;
    let mut gram = None;
    if let Some(form) = form
        && let Some(side) = form.side()
    {
        let mut found = GramStats {
            side,
            trace: values.squares,
            min_diagonal: None,
            effective_rank: None,
            largest_eigenvalue: None,
            smallest_eigenvalue_at_most: None,
            condition_at_least: None,
            spectrum: None,
        };
        let mut squares = None;
        if let Some(diagonal) = &diagonal {
            found.trace = diagonal.sum;
            found.min_diagonal = diagonal.least;
            // A packed triangle holds each off-diagonal entry once, the matrix twice.
            let frobenius = match form {
                Form::Packed { .. } => 2.0 * values.squares - diagonal.squares,
                _ => values.squares,
            };
            if finite && frobenius > 0.0 {
                found.effective_rank = Some(found.trace * found.trace / frobenius);
            }
            squares = Some(frobenius);
        }
        if finite && side > 0 {
            found.spectrum = spectrum::of(checkpoint, tensor, form, squares, max_memory)?;
        }
        if let Some(spectrum) = &found.spectrum {
            let (least, largest) = (spectrum.smallest, spectrum.largest);
            found.largest_eigenvalue = Some(largest);
            found.smallest_eigenvalue_at_most = Some(least);
            if least > largest * side as f64 * f64::EPSILON {
                found.condition_at_least = Some(largest / least);
            }
        }
        gram = Some(found);
    }
    Ok(Some(TensorStats {
        l2_norm: values.squares.sqrt(),
        min: values.min,
        max: values.max,
        nan_count: values.nan,
        inf_count: values.inf,
        gram,
    }))
}

/// Sums and extremes of the finite values seen so far.
#[derive(Default)]
struct ValueStats {
    squares: f64,
    min: Option<f64>,
    max: Option<f64>,
    nan: u64,
    inf: u64,
}

impl ValueStats {
    fn add(&mut self, tile: &[f64]) {
        if tile.is_empty() {
            return;
        }
        if first_nonfinite_f64(tile).is_some() {
            // The rare way: value by value.
            for value in tile {
                if value.is_nan() {
                    self.nan += 1;
                } else if value.is_infinite() {
                    self.inf += 1;
                } else {
                    self.merge(value * value, *value, *value);
                }
            }
            return;
        }
        // Independent lanes, so that the loop needs no reordering of sums to be vectorised.
        const LANES: usize = 16;
        let mut squares = [0.0; LANES];
        let mut least = [f64::INFINITY; LANES];
        let mut largest = [f64::NEG_INFINITY; LANES];
        Arch::new().dispatch(|| {
            let (blocks, rest) = tile.as_chunks::<LANES>();
            for block in blocks {
                for lane in 0..LANES {
                    let value = block[lane];
                    squares[lane] += value * value;
                    least[lane] = if value < least[lane] { value } else { least[lane] };
                    largest[lane] = if value > largest[lane] { value } else { largest[lane] };
                }
            }
            for value in rest {
                squares[0] += value * value;
                least[0] = least[0].min(*value);
                largest[0] = largest[0].max(*value);
            }
        });
        let least = least.into_iter().fold(f64::INFINITY, f64::min);
        let largest = largest.into_iter().fold(f64::NEG_INFINITY, f64::max);
        self.merge(squares.iter().sum(), least, largest);
    }

    fn merge(&mut self, squares: f64, least: f64, largest: f64) {
        self.squares += squares;
        self.min = Some(self.min.map_or(least, |min| min.min(least)));
        self.max = Some(self.max.map_or(largest, |max| max.max(largest)));
    }
}

/// Picks the diagonal out of a matrix that passes by in order.
struct Diagonal {
    packed: bool,
    side: u64,
    /// Row of the next diagonal entry.
    row: u64,
    sum: f64,
    squares: f64,
    least: Option<f64>,
}

impl Diagonal {
    fn of(form: Form) -> Option<Self> {
        let (packed, side) = match form {
            Form::Full { side } => (false, side as u64),
            Form::Packed { side } => (true, side as u64),
            Form::Factor { .. } | Form::Dense => return None,
        };
        Some(Self { packed, side, row: 0, sum: 0.0, squares: 0.0, least: None })
    }

    fn add(&mut self, start: u64, tile: &[f64]) {
        while self.row < self.side {
            let at = if self.packed { self.row * (self.row + 3) / 2 } else { self.row * (self.side + 1) };
            let Some(value) = at.checked_sub(start).and_then(|at| tile.get(at as usize)) else { return };
            self.sum += value;
            self.squares += value * value;
            self.least = Some(self.least.map_or(*value, |least| least.min(*value)));
            self.row += 1;
        }
    }
}

impl Inspection {
    /// Writes the inspection as text: one line per tensor, then totals. Foreign names are escaped.
    ///
    /// # Errors
    /// Those of `out`, a closed pipe among them.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let with_stats = self.tensors.iter().any(|row| row.stats.is_some());
        let mut rows = Vec::with_capacity(self.tensors.len() + 1);
        let mut heading = vec!["tensor", "dtype", "shape", "size"];
        if with_stats {
            heading.extend(["l2 norm", "min", "max", "NaN", "Inf"]);
        }
        let with_grams = self.tensors.iter().any(|row| row.stats.as_ref().is_some_and(|s| s.gram.is_some()));
        if with_grams {
            heading.extend(["trace", "effective rank", "largest λ", "median λ", "smallest λ", "condition"]);
        }
        rows.push(heading.into_iter().map(str::to_owned).collect());
        for row in &self.tensors {
            rows.push(row.cells(with_stats, with_grams));
        }
        write_columns(out, &rows)?;
        writeln!(out)?;
        let counts = [(self.examples, "examples"), (self.tokens, "tokens")];
        let counts: Vec<String> =
            counts.iter().filter_map(|(count, of)| count.map(|count| format!("{count} {of}"))).collect();
        if !counts.is_empty() {
            writeln!(out, "over {}", counts.join(", "))?;
        }
        for (key, target) in &self.aliases {
            writeln!(out, "alias {} = {}", escaped(key), escaped(target))?;
        }
        for (key, value) in &self.metadata {
            writeln!(out, "metadata {}: {}", escaped(key), escaped(value))?;
        }
        for (dtype, row) in &self.dtypes {
            writeln!(
                out,
                "{dtype}: {} tensors, {} elements, {}",
                row.tensors,
                row.elements,
                Bytes(row.bytes)
            )?;
        }
        let what = match self.content {
            Content::Checkpoint => "checkpoint",
            Content::Statistics => "statistics",
        };
        writeln!(
            out,
            "{what}: {} tensors, {} elements, {} in {} {}",
            self.tensor_count,
            self.elements,
            Bytes(self.bytes),
            self.files.len(),
            if self.files.len() == 1 { "file" } else { "files" }
        )
    }
}

impl TensorRow {
    fn cells(&self, with_stats: bool, with_grams: bool) -> Vec<String> {
        let shape = self.shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×");
        let mut cells = vec![
            escaped(&self.name),
            self.dtype.to_string(),
            if shape.is_empty() { "scalar".to_owned() } else { shape },
            Bytes(self.bytes).to_string(),
        ];
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.4e}"));
        if with_stats {
            let stats = self.stats.as_ref();
            let count = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |v| v.to_string());
            cells.push(number(stats.map(|s| s.l2_norm)));
            cells.push(number(stats.and_then(|s| s.min)));
            cells.push(number(stats.and_then(|s| s.max)));
            cells.push(count(stats.map(|s| s.nan_count)));
            cells.push(count(stats.map(|s| s.inf_count)));
        }
        if with_grams {
            let gram = self.stats.as_ref().and_then(|s| s.gram.as_ref());
            cells.push(number(gram.map(|g| g.trace)));
            let rank = gram.and_then(|g| g.effective_rank);
            cells.push(rank.map_or_else(|| "-".to_owned(), |rank| format!("{rank:.1}")));
            let spectrum = gram.and_then(|g| g.spectrum.as_ref());
            cells.push(number(spectrum.map(|s| s.largest)));
            cells.push(number(spectrum.and_then(|s| s.quantiles.as_ref()?.get("0.5").copied())));
            // Lanczos steps end above the least eigenvalue, below the largest.
            let estimated = spectrum.is_some_and(|s| s.method == Method::Lanczos);
            let smallest = number(spectrum.map(|s| s.smallest));
            cells.push(if estimated { format!("≤ {smallest}") } else { smallest });
            let condition = spectrum.and_then(|s| {
                Some((s.condition_at_noise?, estimated || s.noise.is_some_and(|noise| s.smallest < noise)))
            });
            cells.push(match condition {
                Some((condition, true)) => format!("≥ {condition:.2e}"),
                Some((condition, false)) => format!("{condition:.2e}"),
                None => "-".to_owned(),
            });
        }
        cells
    }
}

/// Writes rows of cells as columns: the first aligned left, the others right. Cells wider than 64 characters
/// push the rest of their line aside instead of widening their column.
pub(crate) fn write_columns(out: &mut dyn Write, rows: &[Vec<String>]) -> io::Result<()> {
    const WIDEST: usize = 64;
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut widths = vec![0; columns];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().min(WIDEST).max(*width);
        }
    }
    for row in rows {
        let mut line = String::new();
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if at == 0 {
                line.push_str(&format!("{cell:<width$}"));
            } else {
                line.push_str(&format!("  {cell:>width$}"));
            }
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
