//! The converted file: header with room for what is known last, then values as they come.

use serde_json::{Map, Value, json};

use super::super::format::{ALIAS_PREFIX, FORMAT_KEY};
use super::super::{FORMAT, Kind};
use super::{ConvertError, Planned};
use crate::read::{Dtype, MAX_HEADER_BYTES, decode_f64, encode_f64};
use crate::write::NewFile;

/// Values that are encoded at once.
const PIECE: usize = 64 << 10;
/// What rounding may cost, relative to the sum of magnitudes: what bf16 costs at most. Only f16's range costs more.
const MOST_LOST: f64 = 1.0 / 256.0;

/// The header of all outputs, without its length: JSON. Offsets are those of the plan.
pub(super) fn header(
    planned: &[Planned],
    metadata: &[(String, String)],
    aliases: &[(String, String)],
) -> String {
    let mut strings = Map::new();
    strings.insert(FORMAT_KEY.to_owned(), json!(FORMAT));
    for (key, value) in metadata {
        strings.insert(key.clone(), json!(value));
    }
    for (key, target) in aliases {
        strings.insert(format!("{ALIAS_PREFIX}{key}"), json!(target));
    }
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), Value::Object(strings));
    for output in planned {
        header.insert(
            output.key.clone(),
            json!({
                "dtype": output.dtype.name(),
                "shape": output.shape,
                "data_offsets": [output.offset, output.offset + output.bytes],
            }),
        );
    }
    Value::Object(header).to_string()
}

/// Pads a header to `len` bytes and puts its length before it.
///
/// # Errors
/// [`ConvertError::HeaderTooLarge`] past the format's limit.
pub(super) fn framed(mut header: String, len: usize) -> Result<Vec<u8>, ConvertError> {
    if len as u64 > MAX_HEADER_BYTES {
        return Err(ConvertError::HeaderTooLarge { bytes: len as u64 });
    }
    debug_assert!(header.len() <= len, "the room was measured with longer numbers");
    header.extend(std::iter::repeat_n(' ', len.saturating_sub(header.len())));
    Ok([&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat())
}

/// Divides, rounds, writes, and knows what rounding cost.
pub(super) struct Emitter<'a> {
    file: &'a NewFile,
    output: &'a Planned,
    /// Next byte of the file.
    at: u64,
    divisor: f64,
    values: Vec<f64>,
    bytes: Vec<u8>,
    back: Vec<f64>,
    magnitude: f64,
    lost: f64,
    squares_lost: f64,
}

impl<'a> Emitter<'a> {
    /// `data_start`: where the first tensor begins in the file.
    pub(super) fn new(file: &'a NewFile, output: &'a Planned, data_start: u64) -> Self {
        Self {
            file,
            output,
            at: data_start + output.offset,
            divisor: output.divisor,
            values: Vec::with_capacity(PIECE),
            bytes: Vec::new(),
            back: Vec::new(),
            magnitude: 0.0,
            lost: 0.0,
            squares_lost: 0.0,
        }
    }

    /// Appends values.
    pub(super) fn put(&mut self, mut values: &[f64]) -> Result<(), ConvertError> {
        while !values.is_empty() {
            let (now, later) = values.split_at(values.len().min(PIECE - self.values.len()));
            self.values.extend(now.iter().map(|v| if self.divisor == 1.0 { *v } else { v / self.divisor }));
            values = later;
            if self.values.len() == PIECE {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// What values are divided by; from now on they are not.
    pub(super) fn take_divisor(&mut self) -> f64 {
        std::mem::replace(&mut self.divisor, 1.0)
    }

    /// Refuses a diagonal entry that would become zero: a direction of the Gram would be lost.
    pub(super) fn check_diagonal(&self, row: usize, value: f64) -> Result<(), ConvertError> {
        let value = value / self.divisor;
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..self.output.dtype.float_bytes().unwrap_or(8)];
        let mut back = [0.0];
        encode_f64(self.output.dtype, &[value], bytes)
            .and_then(|()| decode_f64(self.output.dtype, bytes, &mut back))?;
        if back[0] == 0.0 && value != 0.0 {
            let what = format!("{value:e} at row {row} of the diagonal would become 0");
            return Err(self.lossy(what));
        }
        Ok(())
    }

    fn lossy(&self, what: String) -> ConvertError {
        ConvertError::Lossy { key: self.output.key.clone(), dtype: self.output.dtype, what }
    }

    fn flush(&mut self) -> Result<(), ConvertError> {
        let dtype = self.output.dtype;
        self.bytes.resize(self.values.len() * dtype.float_bytes().unwrap_or(0), 0);
        encode_f64(dtype, &self.values, &mut self.bytes)?;
        if dtype != Dtype::F64 {
            self.back.resize(self.values.len(), 0.0);
            decode_f64(dtype, &self.bytes, &mut self.back)?;
            for (value, back) in self.values.iter().zip(&self.back) {
                if !back.is_finite() && value.is_finite() {
                    return Err(self.lossy(format!("{value:e} is out of its range")));
                }
                let lost = (value - back).abs();
                self.magnitude += value.abs();
                self.lost += lost;
                self.squares_lost += lost * lost;
            }
        }
        self.file.write_at(self.at, &self.bytes)?;
        self.at += self.bytes.len() as u64;
        self.values.clear();
        Ok(())
    }

    /// Writes the rest and gives back the Frobenius norm of all rounding.
    ///
    /// # Errors
    /// [`ConvertError::Lossy`] where more is lost than precision.
    pub(super) fn finish(mut self) -> Result<f64, ConvertError> {
        self.flush()?;
        if self.lost > MOST_LOST * self.magnitude {
            let share = 100.0 * self.lost / self.magnitude;
            return Err(self.lossy(format!("{share:.1} % of the sum of magnitudes would be lost")));
        }
        Ok(self.squares_lost.sqrt())
    }
}

/// The kind that a Gram becomes as a factor.
pub(super) fn factor_kind(kind: Kind) -> Option<Kind> {
    match kind {
        Kind::InputGram | Kind::InputFactor => Some(Kind::InputFactor),
        Kind::OutputGram | Kind::OutputFactor => Some(Kind::OutputFactor),
        _ => None,
    }
}
