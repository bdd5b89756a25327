//! The files to convert, each read by the reader of its format, as one set of statistics.
//!
//! Which format a file is of is told by its bytes and, for formats without a mark of their own, by the name that the
//! other tool gives it; nothing is guessed beyond that. What the values of each file must be divided by to be the means
//! that this format holds stands beside it.

use std::path::{Path, PathBuf};

use super::super::format::{ForeignFile, Opening};
use super::super::{Kind, ModelStatistics, StatisticsError};
use super::{ConvertError, ConvertOptions, From, Values};
use crate::read::{InputFile, IoMode, Storages, TensorMeta, TorchFile, escaped, pickled, read_header};

/// Metadata of the counts.
const TOKENS: &str = "tokens";
const EXAMPLES: &str = "examples";
/// Metadata of where the Fisher's labels are from.
const FISHER: &str = "fisher";

/// All inputs.
pub(super) struct Sources {
    pub(super) statistics: ModelStatistics,
    /// Of each file: what its values are divided by.
    pub(super) divisors: Vec<f64>,
    /// Of each file: whether it is of another format.
    pub(super) foreign: Vec<bool>,
    /// Of archives: the number of the file, and what to hold its bytes against.
    storages: Vec<(usize, Storages)>,
}

impl Sources {
    /// Reads every storage of foreign archives once against its checksum.
    pub(super) fn check_storages(&self) -> Result<(), ConvertError> {
        let files = self.statistics.files();
        self.storages.iter().try_for_each(|(file, storages)| Ok(storages.check(&files[*file])?))
    }
}

/// Opens every input; reads headers alone.
pub(super) fn open(paths: &[PathBuf], options: &ConvertOptions) -> Result<Sources, ConvertError> {
    let mut opening = Opening::default();
    let (mut divisors, mut foreign, mut storages) = (Vec::new(), Vec::new(), Vec::new());
    let mut kind_used = false;
    for path in paths {
        let format = match options.from {
            From::Auto => detect(path, options)?,
            given => given,
        };
        let mut divisor = 1.0;
        match format {
            From::Auto | From::MatsStream => {
                if options.values == Some(Values::Sums) {
                    return Err(ConvertError::Flag {
                        flag: "--values",
                        what: format!(
                            "{}: statistics of this format are means, expected no `sums`",
                            path.display()
                        ),
                    });
                }
                opening.add_file(path, options.io)?;
            }
            From::Reference => {
                let index = opening.files();
                let (file, checks) = reference(path, options, index, &mut kind_used, &mut divisor)?;
                storages.push((index, checks));
                opening.add_foreign(file)?;
            }
            From::Pmetal => {
                let file = pmetal(path, options, opening.files(), &mut kind_used, &mut divisor)?;
                opening.add_foreign(file)?;
            }
        }
        divisors.push(divisor);
        foreign.push(format != From::MatsStream);
    }
    if let (Some(kind), false) = (options.kind, kind_used) {
        return Err(ConvertError::Flag {
            flag: "--kind",
            what: format!("got `{kind}`, but every file's name tells its kind, or its keys do; leave it out"),
        });
    }
    Ok(Sources { statistics: opening.finish()?, divisors, foreign, storages })
}

/// The format of a file, by its first bytes and, for plain safetensors, by its metadata and its name.
fn detect(path: &Path, options: &ConvertOptions) -> Result<From, ConvertError> {
    let file = InputFile::open(path, options.io).map_err(StatisticsError::from)?;
    if pickled(&file).map_err(StatisticsError::from)?.is_some() {
        return Ok(From::Reference);
    }
    let header = read_header(&file, 0).map_err(StatisticsError::from)?;
    if header
        .metadata
        .get(super::super::format::FORMAT_KEY)
        .is_some_and(|f| f.starts_with("mats-stream-statistics/"))
    {
        return Ok(From::MatsStream);
    }
    if pmetal_kind(path).is_some() {
        return Ok(From::Pmetal);
    }
    Err(ConvertError::Unknown { path: path.to_owned() })
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What the other tool names a file of this kind.
fn pmetal_kind(path: &Path) -> Option<Kind> {
    match file_name(path).as_str() {
        "fisher.safetensors" => Some(Kind::FisherDiagonal),
        "regmean_grams.safetensors" => Some(Kind::InputGram),
        _ => None,
    }
}

/// What the reference code names a file of this kind: `CHECKPOINT_gram_matrix_input_activations_SPLIT.pt`, with `_true`
/// before it where labels were sampled; `CHECKPOINT_diagonal_empirical_fisher_SPLIT.pt`.
fn reference_kind(path: &Path) -> (Option<Kind>, &'static str) {
    let name = file_name(path);
    let parts = [
        ("gram_matrix_input_activations", Kind::InputGram),
        ("gram_matrix_output_activation_gradients", Kind::OutputGram),
        ("diagonal_true_fisher", Kind::FisherDiagonal),
        ("diagonal_empirical_fisher", Kind::FisherDiagonal),
        ("blockwise_true_fisher", Kind::FisherBlock),
        ("blockwise_empirical_fisher", Kind::FisherBlock),
    ];
    let kind = parts.into_iter().find(|(part, _)| name.contains(part)).map(|(_, kind)| kind);
    let sampled = name.contains("_true_gram_matrix") || name.contains("_true_fisher");
    (kind, if sampled { "true" } else { "empirical" })
}

/// The kind that the name tells, else the one that was given.
fn kind_of(
    told: Option<Kind>,
    path: &Path,
    options: &ConvertOptions,
    used: &mut bool,
) -> Result<Kind, ConvertError> {
    match (told, options.kind) {
        (Some(kind), _) => Ok(kind),
        (None, Some(kind)) => {
            *used = true;
            Ok(kind)
        }
        (None, None) => Err(ConvertError::Kind { path: path.to_owned() }),
    }
}

/// What sums of this kind are divided by.
fn count_of(
    kind: Kind,
    path: &Path,
    options: &ConvertOptions,
    stated: impl Fn(&str) -> Option<u64>,
) -> Result<f64, ConvertError> {
    let (flag, key, given) = match kind {
        Kind::FisherDiagonal | Kind::FisherBlock => ("--examples", EXAMPLES, options.examples),
        _ => ("--tokens", TOKENS, options.tokens),
    };
    match given.or_else(|| stated(key)).filter(|count| *count > 0) {
        Some(count) => Ok(count as f64),
        None => Err(ConvertError::Flag {
            flag,
            what: format!(
                "{}: holds sums over {key}, and not over how many (got no number, expected one above 0; \
                 --values means if it is divided already)",
                path.display()
            ),
        }),
    }
}

/// The counts that were given, as metadata.
fn counts(options: &ConvertOptions) -> impl Iterator<Item = (String, String)> {
    let counts = [(TOKENS, options.tokens), (EXAMPLES, options.examples)];
    counts.into_iter().filter_map(|(key, count)| Some((key.to_owned(), count?.to_string())))
}

/// A matrix of foreign statistics must be one: a triangle is this format's alone.
fn check_square(path: &Path, tensor: &TensorMeta, kind: Kind) -> Result<(), StatisticsError> {
    let square = matches!(tensor.shape[..], [rows, columns] if rows == columns);
    if kind == Kind::FisherDiagonal || square {
        return Ok(());
    }
    Err(StatisticsError::Shape {
        path: path.to_owned(),
        key: tensor.name.clone(),
        shape: tensor.shape.clone(),
        expected: "a square matrix",
    })
}

/// `torch.save`d dictionaries of r-three/mats: Grams under the names of modules, Fishers under those of parameters, all
/// of them means already: Grams over the tokens of the encoder or of the decoder, Fishers over examples.
fn reference(
    path: &Path,
    options: &ConvertOptions,
    index: usize,
    kind_used: &mut bool,
    divisor: &mut f64,
) -> Result<(ForeignFile, Storages), ConvertError> {
    let file = TorchFile::open(path, options.io, index).map_err(StatisticsError::from)?;
    let (told, fisher) = reference_kind(path);
    let kind = kind_of(told, path, options, kind_used)?;
    if options.values == Some(Values::Sums) {
        *divisor = count_of(kind, path, options, |_| None)?;
    }
    let TorchFile { file, tensors, warnings, header_bytes, storages } = file;
    let mut metadata: Vec<(String, String)> = counts(options).collect();
    metadata.push((FISHER.to_owned(), fisher.to_owned()));
    let mut foreign =
        ForeignFile { file, tensors: Vec::new(), aliases: Vec::new(), metadata, warnings, header_bytes };
    for tensor in tensors {
        check_square(path, &tensor, kind)?;
        let key = format!("{}/{kind}", parameter_of(&tensor.name, kind));
        // One storage saved under several names is one statistic.
        match foreign.tensors.last() {
            Some(last)
                if (last.offset, last.bytes, last.dtype, &last.shape)
                    == (tensor.offset, tensor.bytes, tensor.dtype, &tensor.shape)
                    && tensor.bytes > 0 =>
            {
                foreign.aliases.push((key, last.name.clone()));
            }
            _ => foreign.tensors.push(TensorMeta { name: key, ..tensor }),
        }
    }
    Ok((foreign, storages))
}

/// The reference's Grams carry the names of their modules, to which its merging adds `.weight`; those of (IA)³ vectors
/// and all Fishers are parameters' already.
fn parameter_of(name: &str, kind: Kind) -> String {
    let of_module = matches!(kind, Kind::InputGram | Kind::OutputGram);
    if of_module && !name.contains("ia3") && !name.ends_with(".weight") {
        format!("{name}.weight")
    } else {
        name.to_owned()
    }
}

/// pmetal-merge's files: safetensors under the names of parameters, sums over whatever was collected.
fn pmetal(
    path: &Path,
    options: &ConvertOptions,
    index: usize,
    kind_used: &mut bool,
    divisor: &mut f64,
) -> Result<ForeignFile, ConvertError> {
    let file = InputFile::open(path, options.io).map_err(StatisticsError::from)?;
    let header = read_header(&file, index).map_err(StatisticsError::from)?;
    let kind = kind_of(pmetal_kind(path), path, options, kind_used)?;
    if options.values != Some(Values::Means) {
        let stated = |key: &str| header.metadata.get(key).and_then(|count| count.parse().ok());
        *divisor = count_of(kind, path, options, stated)?;
    }
    let mut metadata: Vec<(String, String)> = counts(options).collect();
    for key in [TOKENS, EXAMPLES] {
        if let (Some(value), false) =
            (header.metadata.get(key), metadata.iter().any(|(known, _)| known == key))
        {
            metadata.push((key.to_owned(), value.clone()));
        }
    }
    let mut tensors = Vec::with_capacity(header.tensors.len());
    for tensor in header.tensors {
        check_square(path, &tensor, kind)?;
        tensors.push(TensorMeta { name: format!("{}/{kind}", tensor.name), ..tensor });
    }
    Ok(ForeignFile {
        file,
        tensors,
        aliases: Vec::new(),
        metadata,
        warnings: header.warnings,
        header_bytes: header.header_bytes,
    })
}

/// What begins every name of foreign files, if it looks like a wrapper's attribute that the model does not have.
pub(super) fn wrapper_prefix(statistics: &ModelStatistics) -> Option<String> {
    const WRAPPERS: [&str; 3] = ["transformer.", "module.", "_orig_mod."];
    let prefix =
        WRAPPERS.into_iter().find(|prefix| statistics.parameters().all(|name| name.starts_with(prefix)))?;
    statistics.parameters().next().map(|_| escaped(prefix))
}

/// The mode that suits the file systems of the inputs.
pub(super) fn io_mode(paths: &[PathBuf]) -> IoMode {
    let remote = paths.iter().any(|path| IoMode::for_path(path) == IoMode::Pread);
    if remote { IoMode::Pread } else { IoMode::Mmap }
}
