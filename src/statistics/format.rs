//! The statistics file format `mats-stream-statistics/1`: kinds, forms, keys and aliases.
//!
//! A statistics file is a safetensors file whose keys read `{parameter}/{kind}`. One model may have several,
//! each key in one of them; an alias lets parameters that see the same input share one stored Gram.
//! [`ModelStatistics`] resolves all that once, so that the planner and the engine ask by parameter and kind
//! and never see a key.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::StatisticsError;
use crate::read::checkpoint::within;
use crate::read::{Dtype, InputFile, IoMode, ReadError, TensorMeta, escaped, pickled, read_header};
use crate::view::names::twin;

/// What `format` in a statistics file's metadata must say.
pub const FORMAT: &str = "mats-stream-statistics/1";
pub(crate) const FORMAT_KEY: &str = "format";
pub(crate) const ALIAS_PREFIX: &str = "alias:";

/// What a statistic is of its parameter. `in` and `out` are the sides of a weight `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `Σ x xᵀ / tokens`, `[in, in]` or packed.
    InputGram,
    /// `Σ g gᵀ / tokens`, `[out, out]` or packed.
    OutputGram,
    /// `F` with `FᵀF` the input Gram, `[r, in]`.
    InputFactor,
    /// `F` with `FᵀF` the output Gram, `[r, out]`.
    OutputFactor,
    /// `Σ (∂ log p / ∂θ)² / examples`, the parameter's shape.
    FisherDiagonal,
    /// `Σ g gᵀ / examples` of a vector parameter, `[d, d]` or packed.
    FisherBlock,
    /// `Σ x / tokens`, `[in]`.
    InputMean,
}

impl Kind {
    /// Every kind of the format.
    pub const ALL: [Self; 7] = [
        Self::InputGram,
        Self::OutputGram,
        Self::InputFactor,
        Self::OutputFactor,
        Self::FisherDiagonal,
        Self::FisherBlock,
        Self::InputMean,
    ];

    /// The name at the end of a key.
    pub fn name(self) -> &'static str {
        match self {
            Self::InputGram => "input_gram",
            Self::OutputGram => "output_gram",
            Self::InputFactor => "input_factor",
            Self::OutputFactor => "output_factor",
            Self::FisherDiagonal => "fisher_diagonal",
            Self::FisherBlock => "fisher_block",
            Self::InputMean => "input_mean",
        }
    }

    /// The kind of a name; `None` if the format has no such kind.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The name that is most like a misspelt one.
    fn nearest(found: &str) -> &'static str {
        let likeness = |kind: &Self| strsim::jaro_winkler(kind.name(), found);
        Self::ALL
            .iter()
            .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
            .map_or(Self::InputGram.name(), |kind| kind.name())
    }

    /// The form that a shape means for this kind, or what it should have been.
    pub(crate) fn form(self, shape: &[usize]) -> Result<Form, &'static str> {
        match (self, shape) {
            (Self::InputGram | Self::OutputGram | Self::FisherBlock, [rows, columns]) if rows == columns => {
                Ok(Form::Full { side: *rows })
            }
            (Self::InputGram | Self::OutputGram | Self::FisherBlock, [length]) => {
                match triangle_side(*length) {
                    Some(side) => Ok(Form::Packed { side }),
                    None => Err("a packed triangle, whose length is n·(n+1)/2"),
                }
            }
            (Self::InputGram | Self::OutputGram | Self::FisherBlock, _) => {
                Err("a square matrix or a packed triangle")
            }
            (Self::InputFactor | Self::OutputFactor, [rank, side]) if rank <= side => {
                Ok(Form::Factor { rank: *rank, side: *side })
            }
            (Self::InputFactor | Self::OutputFactor, _) => Err("a matrix [r, side] with r ≤ side"),
            (Self::FisherDiagonal, _) => Ok(Form::Dense),
            (Self::InputMean, [_]) => Ok(Form::Dense),
            (Self::InputMean, _) => Err("a vector"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// `n` with `n·(n+1)/2 = length`.
fn triangle_side(length: usize) -> Option<usize> {
    let wide = length as u128;
    // n is the integer part of √(2·length): n² ≤ n² + n = 2·length < (n+1)².
    let side = (2 * wide).isqrt();
    (side * (side + 1) == 2 * wide).then_some(side as usize)
}

/// How a statistic's elements stand for what it means. Sides and ranks are element counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A symmetric matrix `[side, side]`, row-major, both triangles stored.
    Full { side: usize },
    /// Its lower triangle, row-major: (0,0), (1,0), (1,1), (2,0), …
    Packed { side: usize },
    /// `F` `[rank, side]`, row-major, with the matrix = `FᵀF`.
    Factor { rank: usize, side: usize },
    /// One value per element of the parameter, or of its input.
    Dense,
}

impl Form {
    /// The side of the symmetric matrix that is meant; `None` for [`Form::Dense`].
    pub fn side(self) -> Option<usize> {
        match self {
            Self::Full { side } | Self::Packed { side } | Self::Factor { side, .. } => Some(side),
            Self::Dense => None,
        }
    }
}

/// One stored statistic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statistic {
    /// The key under which it is stored, after aliases. Foreign text, shown only through [`escaped`].
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// How it is stored.
    pub form: Form,
    /// F32, F16, BF16 or F64.
    pub dtype: Dtype,
    /// Dimensions as stored.
    pub shape: Vec<usize>,
    /// Place of its file in [`ModelStatistics::files`].
    pub file: usize,
    /// First byte, counted from the beginning of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Statistic {
    /// Number of stored elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|dim| *dim as u64).product()
    }
}

/// A key's parameter and kind: it is split at its last `/`.
pub(crate) fn split_key<'k>(path: &Path, key: &'k str) -> Result<(&'k str, Kind), StatisticsError> {
    let Some((parameter, found)) = key.rsplit_once('/').filter(|(parameter, _)| !parameter.is_empty()) else {
        return Err(StatisticsError::KeySyntax { path: path.to_owned(), key: key.to_owned() });
    };
    match Kind::from_name(found) {
        Some(kind) => Ok((parameter, kind)),
        None => Err(StatisticsError::UnknownKind {
            path: path.to_owned(),
            key: key.to_owned(),
            found: found.to_owned(),
            nearest: Kind::nearest(found),
        }),
    }
}

/// An alias as a file states it.
#[derive(Debug)]
struct Alias {
    target: String,
    file: usize,
    /// The place of the statistic that it leads to, once resolved.
    statistic: Option<usize>,
}

/// A file of another format as statistics: what its own reader found, under the keys that it gets here.
pub(super) struct ForeignFile {
    pub(super) file: InputFile,
    /// Names are keys, `{parameter}/{kind}`.
    pub(super) tensors: Vec<TensorMeta>,
    /// Key and target.
    pub(super) aliases: Vec<(String, String)>,
    pub(super) metadata: Vec<(String, String)>,
    pub(super) warnings: Vec<String>,
    pub(super) header_bytes: u64,
}

/// A model's statistics while its files are added.
#[derive(Default)]
pub(super) struct Opening {
    model: ModelStatistics,
    /// Where each key's statistic is.
    places: HashMap<String, usize>,
}

impl Opening {
    /// Adds a file of this format.
    pub(super) fn add_file(&mut self, path: &Path, io: IoMode) -> Result<(), StatisticsError> {
        self.model.add_file(path, io, &mut self.places)
    }

    /// Adds a file of another one.
    pub(super) fn add_foreign(&mut self, foreign: ForeignFile) -> Result<(), StatisticsError> {
        let path = foreign.file.path().to_owned();
        let model = &mut self.model;
        let file = model.files.len();
        model.files.push(foreign.file);
        model.header_bytes += foreign.header_bytes;
        model.warnings.extend(foreign.warnings);
        for tensor in foreign.tensors {
            model.add_statistic(&path, TensorMeta { file, ..tensor }, &mut self.places)?;
        }
        for (key, target) in foreign.aliases {
            model.add_alias(&path, &key, target)?;
        }
        for (key, value) in foreign.metadata {
            model.add_metadata(&path, key, value);
        }
        Ok(())
    }

    /// Number of files so far.
    pub(super) fn files(&self) -> usize {
        self.model.files.len()
    }

    /// Follows the aliases and checks what only all files together can show.
    pub(super) fn finish(self) -> Result<ModelStatistics, StatisticsError> {
        let Self { mut model, places } = self;
        model.resolve_aliases(&places)?;
        model.check_unambiguous()?;
        Ok(model)
    }
}

/// All statistics of one model, from one or several files.
#[derive(Debug, Default)]
pub struct ModelStatistics {
    files: Vec<InputFile>,
    /// In the order of files and offsets.
    statistics: Vec<Statistic>,
    /// Places in `statistics`, by parameter and kind; aliases are entries like others.
    by_parameter: BTreeMap<String, [Option<u32>; Kind::ALL.len()]>,
    aliases: BTreeMap<String, Alias>,
    metadata: BTreeMap<String, String>,
    warnings: Vec<String>,
    header_bytes: u64,
}

impl ModelStatistics {
    /// Opens the statistics files of one model; no files give no statistics.
    ///
    /// # Errors Everything that can be wrong with the files, their headers, keys, shapes and aliases, each
    /// naming file and key.
    pub fn open(paths: &[PathBuf], io: IoMode) -> Result<Self, StatisticsError> {
        let mut opening = Opening::default();
        for path in paths {
            opening.add_file(path, io)?;
        }
        opening.finish()
    }

    /// Refuses a parameter that has a Gram and a factor of it.
    fn check_unambiguous(&self) -> Result<(), StatisticsError> {
        for (parameter, kinds) in &self.by_parameter {
            for (gram, factor) in
                [(Kind::InputGram, Kind::InputFactor), (Kind::OutputGram, Kind::OutputFactor)]
            {
                if let (Some(_), Some(at)) = (kinds[gram as usize], kinds[factor as usize]) {
                    let path = self.path_of(&self.statistics[at as usize]).to_owned();
                    return Err(StatisticsError::Ambiguous {
                        path,
                        parameter: parameter.clone(),
                        gram,
                        factor,
                    });
                }
            }
        }
        Ok(())
    }

    /// Adds one file's keys and notes its aliases. `places`: where each key's statistic is.
    fn add_file(
        &mut self,
        path: &Path,
        io: IoMode,
        places: &mut HashMap<String, usize>,
    ) -> Result<(), StatisticsError> {
        let file = InputFile::open(path, io)?;
        if let Some(what) = pickled(&file)? {
            return Err(StatisticsError::Pickled { path: path.to_owned(), what });
        }
        let mut header = read_header(&file, self.files.len())?;
        let found = header.metadata.remove(FORMAT_KEY);
        if found.as_deref() != Some(FORMAT) {
            return Err(StatisticsError::Format { path: path.to_owned(), found });
        }
        self.files.push(file);
        self.header_bytes += header.header_bytes;
        self.warnings.append(&mut header.warnings);
        for tensor in header.tensors {
            self.add_statistic(path, tensor, places)?;
        }
        for (key, value) in header.metadata {
            match key.strip_prefix(ALIAS_PREFIX) {
                Some(key) => self.add_alias(path, key, value)?,
                None => self.add_metadata(path, key, value),
            }
        }
        Ok(())
    }

    fn add_statistic(
        &mut self,
        path: &Path,
        tensor: TensorMeta,
        places: &mut HashMap<String, usize>,
    ) -> Result<(), StatisticsError> {
        let TensorMeta { name: key, dtype, shape, file, offset, bytes } = tensor;
        let (parameter, kind) = split_key(path, &key)?;
        if !dtype.is_float() {
            return Err(StatisticsError::NotFloat { path: path.to_owned(), key, dtype });
        }
        let form = match kind.form(&shape) {
            Ok(form) => form,
            Err(expected) => {
                return Err(StatisticsError::Shape { path: path.to_owned(), key, shape, expected });
            }
        };
        let at = self.statistics.len();
        if let Some(first) = places.insert(key.clone(), at) {
            let first = self.path_of(&self.statistics[first]).to_owned();
            return Err(StatisticsError::TwoFiles { path: path.to_owned(), key, first });
        }
        self.note(parameter, kind, at);
        self.statistics.push(Statistic { key, kind, form, dtype, shape, file, offset, bytes });
        Ok(())
    }

    /// Makes a statistic known under a parameter.
    fn note(&mut self, parameter: &str, kind: Kind, at: usize) {
        // Each file has at most a million keys; counts beyond u32 would need thousands of full files.
        let Ok(at) = u32::try_from(at) else { return };
        match self.by_parameter.get_mut(parameter) {
            Some(kinds) => kinds[kind as usize] = Some(at),
            None => {
                let mut kinds = [None; Kind::ALL.len()];
                kinds[kind as usize] = Some(at);
                self.by_parameter.insert(parameter.to_owned(), kinds);
            }
        }
    }

    fn add_alias(&mut self, path: &Path, key: &str, target: String) -> Result<(), StatisticsError> {
        let (_, kind) = split_key(path, key)?;
        let (_, target_kind) = split_key(path, &target)?;
        if kind != target_kind {
            return Err(StatisticsError::AliasKind {
                path: path.to_owned(),
                key: key.to_owned(),
                target,
                kind,
            });
        }
        match self.aliases.get(key) {
            // The same statement in two files is the same alias.
            Some(first) if first.target == target => {}
            Some(first) => {
                return Err(StatisticsError::AliasDiffers {
                    path: path.to_owned(),
                    key: key.to_owned(),
                    target,
                    first_target: first.target.clone(),
                    first: self.files[first.file].path().to_owned(),
                });
            }
            None => {
                let file = self.files.len() - 1;
                self.aliases.insert(key.to_owned(), Alias { target, file, statistic: None });
            }
        }
        Ok(())
    }

    fn add_metadata(&mut self, path: &Path, key: String, value: String) {
        match self.metadata.get(&key) {
            Some(first) if *first != value => self.warnings.push(format!(
                "{}: metadata `{}` differs from an earlier file's (got `{}`, kept `{}`)",
                path.display(),
                escaped(&key),
                escaped(&value),
                escaped(first)
            )),
            Some(_) => {}
            None => {
                self.metadata.insert(key, value);
            }
        }
    }

    /// Follows each alias to the statistic that it stands for. Each is followed once: a walk ends where an
    /// earlier one has been, so that long chains take linear time.
    fn resolve_aliases(&mut self, places: &HashMap<String, usize>) -> Result<(), StatisticsError> {
        let keys: Vec<String> = self.aliases.keys().cloned().collect();
        for start in &keys {
            let path_of = |alias: &Alias| self.files[alias.file].path().to_owned();
            let first = &self.aliases[start];
            if places.contains_key(start) {
                return Err(StatisticsError::AliasShadows { path: path_of(first), key: start.clone() });
            }
            let mut walked = vec![start.clone()];
            let mut alias = first;
            let at = loop {
                if let Some(at) = alias.statistic.or_else(|| places.get(&alias.target).copied()) {
                    break at;
                }
                // A walk that takes more steps than there are aliases has been somewhere twice.
                match self.aliases.get(&alias.target) {
                    Some(_) if walked.len() > keys.len() => {
                        let (key, target) = (start.clone(), first.target.clone());
                        return Err(StatisticsError::AliasLoops { path: path_of(first), key, target });
                    }
                    Some(next) => {
                        walked.push(alias.target.clone());
                        alias = next;
                    }
                    None => {
                        let (key, target) = (start.clone(), alias.target.clone());
                        return Err(StatisticsError::AliasDangles { path: path_of(first), key, target });
                    }
                }
            };
            for key in &walked {
                if let Some(alias) = self.aliases.get_mut(key) {
                    alias.statistic = Some(at);
                }
                if let Some((parameter, _)) = key.rsplit_once('/') {
                    self.note(parameter, self.statistics[at].kind, at);
                }
            }
        }
        Ok(())
    }

    /// The statistic of a parameter, through aliases.
    pub fn get(&self, parameter: &str, kind: Kind) -> Option<&Statistic> {
        let at = self.of_parameter(parameter)?[kind as usize]?;
        self.statistics.get(at as usize)
    }

    /// By the name that the checkpoint has for it, or the one that the model it was loaded into has.
    fn of_parameter(&self, parameter: &str) -> Option<&[Option<u32>; Kind::ALL.len()]> {
        self.by_parameter.get(parameter).or_else(|| self.by_parameter.get(&twin(parameter)?))
    }

    /// Names that have any statistic, sorted; those that have it only through an alias too.
    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        self.by_parameter.keys().map(String::as_str)
    }

    /// The kinds that a parameter has, through aliases too.
    pub fn kinds(&self, parameter: &str) -> impl Iterator<Item = Kind> {
        let kinds = self.of_parameter(parameter).copied().unwrap_or_default();
        Kind::ALL.into_iter().filter(move |kind| kinds[*kind as usize].is_some())
    }

    /// What is stored, by file and then by offset; each once, however many aliases lead to it.
    pub fn statistics(&self) -> &[Statistic] {
        &self.statistics
    }

    /// The aliases' keys, sorted, each with the key that it leads to in the end.
    pub fn aliases(&self) -> impl Iterator<Item = (&str, &str)> {
        self.aliases
            .iter()
            .filter_map(|(key, alias)| Some((key.as_str(), self.statistics[alias.statistic?].key.as_str())))
    }

    /// The files, in the order in which they were given.
    pub fn files(&self) -> &[InputFile] {
        &self.files
    }

    /// The files' free-form strings (`model`, `data`, `examples`, `tokens`, `fisher`, `seed`, …) without
    /// `format` and aliases; where two files differ, the first one's, and a warning.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What was accepted but should be known, one line each, naming the file.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Bytes of all headers: what the metadata in memory is in proportion to.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Bytes of all statistics.
    pub fn total_bytes(&self) -> u64 {
        self.statistics.iter().fold(0u64, |sum, statistic| sum.saturating_add(statistic.bytes))
    }

    /// Bytes of a statistic as stored. `byte_range` counts from its first byte.
    ///
    /// # Errors
    /// As [`InputFile::bytes`]; a range outside the statistic names its key.
    pub fn read<'a>(
        &'a self,
        statistic: &Statistic,
        byte_range: Range<u64>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], StatisticsError> {
        let file = &self.files[statistic.file];
        match within(statistic.offset, statistic.bytes, &byte_range) {
            Some(range) => Ok(file.bytes(range, scratch)?),
            None => Err(StatisticsError::Read(ReadError::RangePastEnd {
                path: file.path().to_owned(),
                tensor: Some(statistic.key.clone()),
                start: byte_range.start,
                end: byte_range.end,
                len: statistic.bytes,
            })),
        }
    }

    /// Asks the kernel to read a part of a statistic ahead. See [`InputFile::will_need`].
    pub fn will_need(&self, statistic: &Statistic, byte_range: Range<u64>) {
        if let Some(range) = within(statistic.offset, statistic.bytes, &byte_range) {
            self.files[statistic.file].will_need(range);
        }
    }

    /// Gives back a part of a statistic that has been read. See [`InputFile::release`].
    pub fn release(&self, statistic: &Statistic, byte_range: Range<u64>, drop_cache: bool) {
        if let Some(range) = within(statistic.offset, statistic.bytes, &byte_range) {
            self.files[statistic.file].release(range, drop_cache);
        }
    }

    /// The file that a statistic is stored in.
    pub fn path_of(&self, statistic: &Statistic) -> &Path {
        self.files[statistic.file].path()
    }

    /// Checks that a statistic's matrix has the side that a parameter needs.
    ///
    /// For [`Form::Dense`] the number of elements counts as the side.
    ///
    /// # Errors
    /// [`StatisticsError::Side`], naming file, key and parameter.
    pub fn expect_side(
        &self,
        statistic: &Statistic,
        parameter: &str,
        expected: usize,
    ) -> Result<(), StatisticsError> {
        let got = statistic.form.side().unwrap_or_else(|| statistic.shape.iter().product());
        if got == expected {
            return Ok(());
        }
        Err(StatisticsError::Side {
            path: self.path_of(statistic).to_owned(),
            key: statistic.key.clone(),
            parameter: parameter.to_owned(),
            got,
            expected,
        })
    }

    /// Checks that a statistic has a parameter's shape, as a Fisher diagonal must.
    ///
    /// # Errors
    /// [`StatisticsError::ParameterShape`], naming file, key and parameter.
    pub fn expect_shape(
        &self,
        statistic: &Statistic,
        parameter: &str,
        expected: &[usize],
    ) -> Result<(), StatisticsError> {
        if statistic.shape == expected {
            return Ok(());
        }
        Err(StatisticsError::ParameterShape {
            path: self.path_of(statistic).to_owned(),
            key: statistic.key.clone(),
            parameter: parameter.to_owned(),
            got: statistic.shape.clone(),
            expected: expected.to_owned(),
        })
    }

    /// Compares every file with the one that was opened.
    ///
    /// # Errors
    /// [`ReadError::Changed`] for the first that differs.
    pub fn check_unchanged(&self) -> Result<(), StatisticsError> {
        for file in &self.files {
            file.check_unchanged()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
