//! `mats-stream statistics convert`: statistics of other tools, and ours in another form, into one statistics file.
//!
//! `run::statistics` calls [`convert()`]. Every input becomes a [`ModelStatistics`] (`sources`), every statistic of it one
//! tensor of the output; they are written one after the other, a tile of rows at a time, so that only a low rank ever
//! takes memory in proportion to a Gram, and that is planned before the first value is read. Values are checked as a merge
//! would: finite, symmetric, no negative diagonal. Nothing has the final name before all of it is written.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

use super::factor::{FactorRows, GramRows, bad_value, decode};
use super::{Form, Kind, ModelStatistics, Statistic, StatisticsError};
use crate::kernel::OutOfMemory;
use crate::read::{Dtype, IoMode, ReadError, escaped, first_nonfinite_f64};
use crate::report::units::Bytes;
use crate::solve::eigen::NoConvergence;
use crate::write::{NewFile, WriteError};

mod low_rank;
mod output;
mod sources;

use low_rank::{LowRank, LowRankError, Method};
use output::{Emitter, factor_kind};

/// Rows of a Gram are mirrored in tiles of about so many values.
const TILE: usize = 1 << 20;
/// What every conversion holds: the program, a tile, pieces being encoded, buffers of reads.
const BASE_BYTES: u64 = (4 << 20) + 8 * TILE as u64 + (8 << 20);
/// Parsed headers take up to this many times their size on disk; that of the output is made twice on top.
const METADATA_FACTOR: u64 = 9;
/// Metadata of what a low rank leaves out: at least the spectral norm of Gram - FᵀF, and the difference of their traces.
const ERROR_PREFIX: &str = "error:";
const DROPPED_TRACE_PREFIX: &str = "dropped_trace:";
/// Longest number in the metadata.
const NUMBER_CHARS: usize = 16;

/// What a file is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// What its bytes and its name say.
    Auto,
    /// `torch.save`d by r-three/mats.
    Reference,
    /// `fisher.safetensors`, `regmean_grams.safetensors` of pmetal-merge.
    Pmetal,
    /// This format.
    MatsStream,
}

/// Whether a foreign file's values have been divided by the number of tokens or examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// They have.
    Means,
    /// They have not.
    Sums,
}

/// How Grams are to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GramForm {
    /// The lower triangle.
    Packed,
    /// All of it.
    Dense,
}

/// How to convert: the flags, for callers of the library.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// What the inputs are.
    pub from: From,
    /// The kind of files whose name and keys do not tell it.
    pub kind: Option<Kind>,
    /// Whether foreign values are sums; `None`: as their tool writes them.
    pub values: Option<Values>,
    /// Tokens that foreign sums are over; written to the metadata.
    pub tokens: Option<u64>,
    /// Examples that foreign sums are over; written to the metadata.
    pub examples: Option<u64>,
    /// Prefixes of parameters and what takes their place; the first that fits counts.
    pub renames: Vec<(String, String)>,
    /// `None`: packed if foreign, else as it is.
    pub form: Option<GramForm>,
    /// F32, BF16, F16 or F64; `None`: as it is.
    pub dtype: Option<Dtype>,
    /// Grams become factors of so many rows.
    pub rank: Option<usize>,
    /// Bound on anonymous memory, in bytes.
    pub max_memory: u64,
    /// How inputs are read.
    pub io: IoMode,
}

/// What a conversion wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertSummary {
    /// Statistics stored.
    pub statistics: usize,
    /// Aliases.
    pub aliases: usize,
    /// Length of the file.
    pub bytes: u64,
    /// What was accepted but should be known.
    pub warnings: Vec<String>,
}

/// What can end a conversion.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// An input, or a value of it.
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    /// The output.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Neither bytes nor name tell what a file is.
    #[error("{}: cannot tell whose statistics these are (got safetensors without `format`, expected fisher.safetensors or \
             regmean_grams.safetensors by name, or --from and --kind)", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// The name does not tell the kind.
    #[error("{}: cannot tell what it holds by its name (expected one that the tool gives it, or --kind input_gram, \
             output_gram, fisher_diagonal or fisher_block)", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A flag that does not fit.
    #[error("{flag}: {what}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong and what would do.
        what: String,
    },
    /// Two statistics would have one key.
    #[error("--rename: two statistics would have the key `{}`", escaped(key))]
    Renamed {
        /// The key.
        key: String,
    },
    /// Not enough memory for the largest statistic.
    #[error("--max-memory: key `{}` cannot be converted in {} (got {max_memory} bytes, expected at least {least}); try \
             --max-memory {}MiB", escaped(key), Bytes(*max_memory), least.div_ceil(1 << 20))]
    Memory {
        /// The statistic that needs most.
        key: String,
        /// What was given.
        max_memory: u64,
        /// What would do.
        least: u64,
    },
    /// The system has less memory than the bound.
    #[error("the system refused {} of memory within --max-memory", Bytes(*bytes as u64))]
    OutOfMemory {
        /// Asked for.
        bytes: usize,
    },
    /// A dtype cannot hold the values.
    #[error(
        "key `{}` does not fit {dtype}: {what}; try --dtype bf16, which has the range of f32",
        escaped(key)
    )]
    Lossy {
        /// The statistic.
        key: String,
        /// The dtype asked for.
        dtype: Dtype,
        /// What would be lost.
        what: String,
    },
    /// The output's header is over the format's limit.
    #[error(
        "the output's header would be too large (got {bytes} bytes, expected at most {})",
        crate::read::MAX_HEADER_BYTES
    )]
    HeaderTooLarge {
        /// Its length.
        bytes: u64,
    },
    /// An eigendecomposition failed.
    #[error("key `{}`", escaped(key))]
    Eigen {
        /// The statistic.
        key: String,
        /// Why.
        source: NoConvergence,
    },
    /// Somebody raised the flag.
    #[error("cancelled")]
    Cancelled,
}

impl std::convert::From<ReadError> for ConvertError {
    fn from(error: ReadError) -> Self {
        Self::Statistics(StatisticsError::Read(error))
    }
}

impl ConvertError {
    /// The exit code that the contract gives this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Statistics(error) => error.exit_class().code(),
            Self::Write(error) => error.exit_class().code(),
            _ => 2,
        }
    }
}

/// One statistic of the output.
struct Planned {
    key: String,
    /// Place of its source in [`ModelStatistics::statistics`].
    source: usize,
    how: How,
    dtype: Dtype,
    shape: Vec<usize>,
    divisor: f64,
    /// Counted from the first tensor's.
    offset: u64,
    bytes: u64,
}

/// What is done to a statistic besides division and rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Values in their order: diagonals, means, factors.
    Elements,
    /// A Gram's lower triangle.
    Triangle,
    /// A Gram's rows.
    Rows,
    /// Its leading directions.
    LowRank { rank: usize },
}

/// Converts `inputs`, which are of one model, into the new file `out`.
///
/// `cancel` ends the conversion early, with nothing written. Memory: see the module. Reads each statistic twice (once to
/// check it) and of foreign archives each storage once more, against its checksum; a low rank of a Gram wider than 1024
/// takes five more passes.
///
/// # Errors
/// [`ConvertError`], naming file, key and what would do; nothing is left under the output's name.
pub fn convert(
    inputs: &[PathBuf],
    out: &Path,
    options: &ConvertOptions,
    cancel: &AtomicBool,
) -> Result<ConvertSummary, ConvertError> {
    catch_unwind(AssertUnwindSafe(|| run(inputs, out, options, cancel))).unwrap_or_else(|payload| {
        match payload.downcast::<OutOfMemory>() {
            Ok(error) => Err(ConvertError::OutOfMemory { bytes: error.bytes }),
            Err(payload) => resume_unwind(payload),
        }
    })
}

/// The mode that suits the file systems of all inputs.
pub fn io_mode(inputs: &[PathBuf]) -> IoMode {
    sources::io_mode(inputs)
}

fn run(
    inputs: &[PathBuf],
    out: &Path,
    options: &ConvertOptions,
    cancel: &AtomicBool,
) -> Result<ConvertSummary, ConvertError> {
    NewFile::check(out)?;
    let sources = sources::open(inputs, options)?;
    let (statistics, divisors, foreign) = (&sources.statistics, &sources.divisors, &sources.foreign);
    let mut warnings = statistics.warnings().to_vec();
    let mut names = Names::new(&options.renames);
    let plan = Plan::new(statistics, divisors, foreign, options, &mut names, &mut warnings)?;
    let mut metadata = plan.metadata(statistics, options, &mut names);
    names.check_used()?;
    if options.renames.is_empty()
        && foreign.iter().any(|foreign| *foreign)
        && let Some(prefix) = sources::wrapper_prefix(statistics)
    {
        warnings.push(format!(
            "every name begins with `{prefix}`; if those of the model's tensors do not, add --rename {prefix}="
        ));
    }
    plan.check_memory(statistics, options.max_memory)?;
    sources.check_storages()?;
    let statistics = Arc::new(sources.statistics);

    // The header's room is measured with the longest numbers; the final one is padded to it.
    let fixed = metadata.len();
    metadata.extend(plan.errors(|_| ("9".repeat(NUMBER_CHARS), "9".repeat(NUMBER_CHARS))));
    let room = output::header(&plan.outputs, &metadata, &plan.aliases).len().next_multiple_of(8);
    let data_start = 8 + room as u64;
    let bytes = plan
        .outputs
        .last()
        .map_or(0, |last| last.offset.saturating_add(last.bytes))
        .saturating_add(data_start);
    let file = NewFile::create(out, bytes)?;

    let mut bounds: Vec<Option<(f64, f64)>> = Vec::with_capacity(plan.outputs.len());
    for output in &plan.outputs {
        if cancel.load(Ordering::Relaxed) {
            return Err(ConvertError::Cancelled);
        }
        bounds.push(write_one(&statistics, output, &file, data_start, cancel)?);
    }
    metadata.truncate(fixed);
    metadata.extend(plan.errors(|at| {
        let (norm, trace) = bounds[at].unwrap_or_default();
        let source = &statistics.statistics()[plan.outputs[at].source];
        // A factor of a factor is off by both. Rounded up to the digits shown.
        let earlier = |prefix| {
            let stated = statistics.metadata().get(&format!("{prefix}{}", source.key));
            stated.and_then(|v| v.parse::<f64>().ok()).filter(|v| v.is_finite()).unwrap_or(0.0)
        };
        let norm = norm + earlier(ERROR_PREFIX);
        (format!("{:.6e}", norm * (1.0 + 1e-6)), format!("{:.6e}", trace + earlier(DROPPED_TRACE_PREFIX)))
    }));
    let header = output::header(&plan.outputs, &metadata, &plan.aliases);
    file.write_at(0, &output::framed(header, room)?)?;
    statistics.check_unchanged()?;
    file.finish()?;
    Ok(ConvertSummary { statistics: plan.outputs.len(), aliases: plan.aliases.len(), bytes, warnings })
}

/// Renames, and remembers which of them were of use.
struct Names<'a> {
    renames: &'a [(String, String)],
    used: Vec<bool>,
}

impl<'a> Names<'a> {
    fn new(renames: &'a [(String, String)]) -> Self {
        Self { renames, used: vec![false; renames.len()] }
    }

    fn apply(&mut self, name: &str) -> String {
        for ((old, new), used) in self.renames.iter().zip(&mut self.used) {
            if let Some(rest) = name.strip_prefix(old.as_str()) {
                *used = true;
                return format!("{new}{rest}");
            }
        }
        name.to_owned()
    }

    fn check_used(&self) -> Result<(), ConvertError> {
        match self.renames.iter().zip(&self.used).find(|(_, used)| !**used) {
            Some(((old, _), _)) => Err(ConvertError::Flag {
                flag: "--rename",
                what: format!(
                    "got `{}`, expected the beginning of a parameter's name: none has it",
                    escaped(old)
                ),
            }),
            None => Ok(()),
        }
    }
}

/// Everything that headers decide.
struct Plan {
    /// By offset.
    outputs: Vec<Planned>,
    /// Keys and their targets.
    aliases: Vec<(String, String)>,
    /// Places in `outputs` by the keys of their sources.
    by_source: HashMap<String, usize>,
}

impl Plan {
    fn new(
        statistics: &ModelStatistics,
        divisors: &[f64],
        foreign: &[bool],
        options: &ConvertOptions,
        names: &mut Names<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConvertError> {
        let mut outputs = Vec::with_capacity(statistics.statistics().len());
        let mut keys = HashSet::new();
        let mut too_narrow = 0;
        for (source, statistic) in statistics.statistics().iter().enumerate() {
            let (how, kind, shape) = target(statistic, foreign[statistic.file], options);
            if options.rank.is_some()
                && factor_kind(statistic.kind).is_some()
                && !matches!(how, How::LowRank { .. })
            {
                too_narrow += 1;
            }
            let parameter = statistic.key.rsplit_once('/').map_or("", |(parameter, _)| parameter);
            let key = format!("{}/{kind}", names.apply(parameter));
            if !keys.insert(key.clone()) {
                return Err(ConvertError::Renamed { key });
            }
            let dtype = options.dtype.unwrap_or(statistic.dtype);
            let width = dtype.float_bytes().unwrap_or(0) as u64;
            // Of a file that cannot be, the reservation says so.
            let bytes = shape.iter().fold(width, |bytes, dim| bytes.saturating_mul(*dim as u64));
            let divisor = divisors[statistic.file];
            outputs.push(Planned { key, source, how, dtype, shape, divisor, offset: 0, bytes });
        }
        if too_narrow > 0 {
            warnings.push(format!(
                "--rank: {too_narrow} statistics have no more sides than that and stay as they are"
            ));
        }
        // Wide elements first, so that each begins at a multiple of its width.
        outputs.sort_by_key(|output: &Planned| std::cmp::Reverse(output.dtype.bits()));
        let mut at = 0;
        for output in &mut outputs {
            output.offset = at;
            at = at.saturating_add(output.bytes);
        }
        let mut aliases = Vec::new();
        let by_source: HashMap<String, usize> = (outputs.iter().enumerate())
            .map(|(at, output)| (statistics.statistics()[output.source].key.clone(), at))
            .collect();
        for (key, target) in statistics.aliases() {
            let Some(output) = by_source.get(target).map(|at| &outputs[*at]) else { continue };
            let kind = output.key.rsplit_once('/').map_or("", |(_, kind)| kind);
            let parameter = key.rsplit_once('/').map_or("", |(parameter, _)| parameter);
            let key = format!("{}/{kind}", names.apply(parameter));
            if !keys.insert(key.clone()) {
                return Err(ConvertError::Renamed { key });
            }
            aliases.push((key, output.key.clone()));
        }
        Ok(Self { outputs, aliases, by_source })
    }

    /// Free-form strings, those that carry a name renamed; errors of factors are left to [`Plan::errors`].
    fn metadata(
        &self,
        statistics: &ModelStatistics,
        options: &ConvertOptions,
        names: &mut Names<'_>,
    ) -> Vec<(String, String)> {
        let mut metadata: Vec<(String, String)> = Vec::new();
        let is_low_rank = |key: &str| {
            self.by_source.get(key).is_some_and(|at| matches!(self.outputs[*at].how, How::LowRank { .. }))
        };
        for (key, value) in statistics.metadata() {
            let named = ["layout:", ERROR_PREFIX, DROPPED_TRACE_PREFIX];
            match named.into_iter().find_map(|prefix| Some((prefix, key.strip_prefix(prefix)?))) {
                Some((prefix, name)) if prefix != "layout:" && is_low_rank(name) => {}
                Some((prefix, name)) => {
                    metadata.push((format!("{prefix}{}", names.apply(name)), value.clone()))
                }
                None => metadata.push((key.clone(), value.clone())),
            }
        }
        for (key, count) in [("tokens", options.tokens), ("examples", options.examples)] {
            if let Some(count) = count {
                metadata.retain(|(known, _)| known != key);
                metadata.push((key.to_owned(), count.to_string()));
            }
        }
        metadata
    }

    /// What low ranks leave out, as metadata. `of` gives the two numbers of an output.
    fn errors(&self, of: impl Fn(usize) -> (String, String)) -> Vec<(String, String)> {
        let mut metadata = Vec::new();
        for (at, output) in self.outputs.iter().enumerate() {
            if matches!(output.how, How::LowRank { .. }) {
                let (norm, trace) = of(at);
                metadata.push((format!("{ERROR_PREFIX}{}", output.key), norm));
                metadata.push((format!("{DROPPED_TRACE_PREFIX}{}", output.key), trace));
            }
        }
        metadata
    }

    fn check_memory(&self, statistics: &ModelStatistics, max_memory: u64) -> Result<(), ConvertError> {
        let metadata = METADATA_FACTOR * statistics.header_bytes();
        let bytes = |output: &Planned| {
            let form = statistics.statistics()[output.source].form;
            let side = form.side().unwrap_or(0);
            let own = match (output.how, form) {
                (How::LowRank { rank }, Form::Factor { rank: rows, .. }) => {
                    low_rank::factor_bytes(rows, side, rank)
                }
                (How::LowRank { rank }, _) => Method::of(side, rank).bytes(side, rank),
                // A row, its diagonal's scan.
                _ => 8 * (side.max(TILE) - TILE) as u64,
            };
            BASE_BYTES + metadata + own + 32 * side as u64
        };
        match self.outputs.iter().map(|output| (bytes(output), output)).max_by_key(|(bytes, _)| *bytes) {
            Some((least, output)) if least > max_memory => {
                Err(ConvertError::Memory { key: output.key.clone(), max_memory, least })
            }
            _ => Ok(()),
        }
    }
}

/// What becomes of a statistic: how, of which kind, in which shape.
fn target(statistic: &Statistic, foreign: bool, options: &ConvertOptions) -> (How, Kind, Vec<usize>) {
    let kind = statistic.kind;
    if let (Some(rank), Some(factor)) = (options.rank, factor_kind(kind)) {
        match statistic.form {
            Form::Full { side } | Form::Packed { side } if rank < side => {
                return (How::LowRank { rank }, factor, vec![rank, side]);
            }
            Form::Factor { rank: rows, side } if rank < rows => {
                return (How::LowRank { rank }, factor, vec![rank, side]);
            }
            _ => {}
        }
    }
    let (Form::Full { side } | Form::Packed { side }) = statistic.form else {
        return (How::Elements, kind, statistic.shape.clone());
    };
    let as_it_is =
        if matches!(statistic.form, Form::Packed { .. }) { GramForm::Packed } else { GramForm::Dense };
    match options.form.unwrap_or(if foreign { GramForm::Packed } else { as_it_is }) {
        GramForm::Packed => (How::Triangle, kind, vec![side * (side + 1) / 2]),
        GramForm::Dense => (How::Rows, kind, vec![side, side]),
    }
}

/// Checks and writes one statistic. Of a low rank: its bound on the spectral norm of the error, and the dropped trace.
fn write_one(
    statistics: &Arc<ModelStatistics>,
    output: &Planned,
    file: &NewFile,
    data_start: u64,
    cancel: &AtomicBool,
) -> Result<Option<(f64, f64)>, ConvertError> {
    let statistic = &statistics.statistics()[output.source];
    statistics.will_need(statistic, 0..statistic.bytes.min(16 << 20));
    let mut emitter = Emitter::new(file, output, data_start);
    let bounds = match (GramRows::new(Arc::clone(statistics), statistic, 1.0), output.how) {
        (Some(gram), how) => {
            let summary = gram.scan()?;
            let side = summary.diagonal.len();
            match how {
                How::LowRank { rank } => {
                    let mut found = low_rank::of_gram(&gram, &summary, side, rank).map_err(named(output))?;
                    divide(&mut found, &mut emitter)?;
                    Some(found)
                }
                _ => {
                    for (row, value) in summary.diagonal.iter().enumerate() {
                        emitter.check_diagonal(row, *value)?;
                    }
                    gram_values(&gram, how, side, &mut emitter, cancel)?;
                    None
                }
            }
        }
        (None, How::LowRank { rank }) => {
            let source = FactorRows::new(Arc::clone(statistics), statistic);
            source.scan()?;
            let (rows, side) = crate::operator::RowSource::shape(&source);
            let mut found = low_rank::of_factor(&source, rows, side, rank).map_err(named(output))?;
            divide(&mut found, &mut emitter)?;
            Some(found)
        }
        (None, _) => {
            elements(statistics, statistic, &mut emitter, cancel)?;
            None
        }
    };
    statistics.release(statistic, 0..statistic.bytes, false);
    let rounding = emitter.finish()?;
    // ‖FᵀF - (F+E)ᵀ(F+E)‖ ≤ 2‖F‖‖E‖ + ‖E‖².
    Ok(bounds.map(|found| {
        let rounded = (2.0 * found.largest.sqrt() + rounding) * rounding;
        (found.dropped_norm + rounded, found.dropped_trace)
    }))
}

/// An error of a decomposition with its key.
fn named(output: &Planned) -> impl Fn(LowRankError) -> ConvertError {
    |error| match error {
        LowRankError::Statistics(error) => error.into(),
        LowRankError::NoConvergence(source) => ConvertError::Eigen { key: output.key.clone(), source },
    }
}

/// Writes a factor; a Gram of sums becomes one of means, its factor by the root of their number.
fn divide(found: &mut LowRank, emitter: &mut Emitter<'_>) -> Result<(), ConvertError> {
    let divisor = emitter.take_divisor();
    if divisor != 1.0 {
        let root = divisor.sqrt();
        found.factor.iter_mut().for_each(|v| *v /= root);
        found.dropped_norm /= divisor;
        found.dropped_trace /= divisor;
        found.largest /= divisor;
    }
    emitter.put(&found.factor)
}

fn gram_values(
    gram: &GramRows,
    how: How,
    side: usize,
    emitter: &mut Emitter<'_>,
    cancel: &AtomicBool,
) -> Result<(), ConvertError> {
    let rows = if how == How::Triangle { 1 } else { (TILE / side.max(1)).clamp(1, crate::kernel::PANEL) };
    let mut tile = vec![0.0; rows.min(side) * side];
    let mut scratch = Vec::new();
    for start in (0..side).step_by(rows) {
        if cancel.load(Ordering::Relaxed) {
            return Err(ConvertError::Cancelled);
        }
        let end = (start + rows).min(side);
        if how == How::Triangle {
            gram.read_lower(start, &mut tile, &mut scratch)?;
            emitter.put(&tile[..=start])?;
        } else {
            let tile = &mut tile[..(end - start) * side];
            gram.read(start..end, tile)?;
            emitter.put(tile)?;
        }
    }
    Ok(())
}

/// Diagonals, means and factors as they are; what no merge would take is refused.
fn elements(
    statistics: &ModelStatistics,
    statistic: &Statistic,
    emitter: &mut Emitter<'_>,
    cancel: &AtomicBool,
) -> Result<(), ConvertError> {
    const PIECE: usize = 64 << 10;
    let count = statistic.elements() as usize;
    let mut values = vec![0.0f64; PIECE.min(count)];
    let mut scratch = Vec::new();
    for start in (0..count).step_by(PIECE) {
        if cancel.load(Ordering::Relaxed) {
            return Err(ConvertError::Cancelled);
        }
        let values = &mut values[..PIECE.min(count - start)];
        decode(statistics, statistic, start..start + values.len(), values, &mut scratch)?;
        let refused = match first_nonfinite_f64(values) {
            Some(at) => Some((at, "a finite number")),
            None if statistic.kind == Kind::FisherDiagonal => {
                values.iter().position(|v| *v < 0.0).map(|at| (at, "a number that is not negative"))
            }
            None => None,
        };
        if let Some((at, expected)) = refused {
            let width = statistic.shape.last().copied().unwrap_or(1).max(1);
            let place = ((start + at) / width, (start + at) % width);
            return Err(bad_value(statistics, statistic, place, values[at], expected).into());
        }
        emitter.put(values)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
