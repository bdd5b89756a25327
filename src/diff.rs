//! `mats-stream diff A B`: how far two checkpoints are apart, tensor by tensor.
//!
//! `main` calls [`diff`], prints the [`Diff`] as a table or as JSON, and exits with 1 where it differs. Both
//! sides are streamed once, in tiles; sums are f64. Float tensors of different dtypes are compared by value,
//! integers exactly, other dtypes byte by byte. Works on statistics files too, since these are safetensors
//! files. Writes nothing.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::inspect::write_columns;
use crate::read::{Checkpoint, IoMode, ReadError, TensorMeta, decode_f64, decode_integer, escaped};

/// Elements that are decoded at a time on each side: 4 MiB of f64.
const TILE: usize = 512 << 10;

/// The result of [`diff`]; serialised, it is what `--json` prints (`null` for what is not a number).
#[derive(Clone, Debug, Serialize)]
pub struct Diff {
    /// The first path, as it was given.
    pub a: String,
    /// The second path, as it was given: the reference of relative differences.
    pub b: String,
    /// Largest `max_abs` of float tensors that does not count as a difference.
    pub tolerance: f64,
    /// Whether anything differs: a set, a shape, a value by more than the tolerance, or a NaN on one side.
    pub differs: bool,
    /// Largest `max_abs` of all tensors.
    pub max_abs: f64,
    /// Tensors that only the first has.
    pub only_in_a: Vec<String>,
    /// Tensors that only the second has.
    pub only_in_b: Vec<String>,
    /// The tensors of both, in the first one's order.
    pub tensors: Vec<TensorDiff>,
    /// What was accepted but should be known.
    pub warnings: Vec<String>,
}

/// How far one tensor's two versions are apart. Elements that are NaN on either side enter no sum.
#[derive(Clone, Debug, Serialize)]
pub struct TensorDiff {
    pub name: String,
    pub differs: bool,
    /// What differs apart from values: shape or dtype.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Largest |a - b|; `None` if the values cannot be compared as numbers.
    pub max_abs: Option<f64>,
    /// ‖a - b‖ / ‖b‖, infinite if only b is zero. Floats only.
    pub relative_l2: Option<f64>,
    /// ⟨a, b⟩ / (‖a‖ ‖b‖); `None` if a side is zero. Floats only.
    pub cosine: Option<f64>,
    /// Elements that are NaN on one side only.
    pub nan_mismatches: u64,
    /// Flat index of the first element that differs by more than the tolerance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
}

/// Compares two checkpoints.
///
/// - `tolerance`: applies to the largest absolute difference of each float tensor; ≥ 0.
///
/// # Errors
/// As [`Checkpoint::open`] and [`Checkpoint::read`]; [`ReadError::Changed`] if a file changed meanwhile.
pub fn diff(a: &Path, b: &Path, tolerance: f64, io: IoMode) -> Result<Diff, ReadError> {
    let (left, right) = (Checkpoint::open(a, io)?, Checkpoint::open(b, io)?);
    let mut buffers = Buffers::default();
    let (mut tensors, mut only_in_a) = (Vec::new(), Vec::new());
    for tensor in left.tensors() {
        match right.get(&tensor.name) {
            Some(other) => {
                tensors.push(tensor_diff((&left, tensor), (&right, other), tolerance, &mut buffers)?);
            }
            None => only_in_a.push(tensor.name.clone()),
        }
    }
    let only_in_b: Vec<String> =
        right.tensors().iter().filter(|t| left.get(&t.name).is_none()).map(|t| t.name.clone()).collect();
    left.check_unchanged()?;
    right.check_unchanged()?;
    Ok(Diff {
        a: a.to_string_lossy().into_owned(),
        b: b.to_string_lossy().into_owned(),
        tolerance,
        differs: !only_in_a.is_empty() || !only_in_b.is_empty() || tensors.iter().any(|t| t.differs),
        max_abs: tensors.iter().filter_map(|t| t.max_abs).fold(0.0, f64::max),
        only_in_a,
        only_in_b,
        tensors,
        warnings: left.warnings().iter().chain(right.warnings()).cloned().collect(),
    })
}

/// Buffers that serve one tile after the other.
#[derive(Default)]
struct Buffers {
    scratch: [Vec<u8>; 2],
    tile: [Vec<f64>; 2],
}

type Side<'a> = (&'a Checkpoint, &'a TensorMeta);

fn tensor_diff(
    (left, a): Side<'_>,
    (right, b): Side<'_>,
    tolerance: f64,
    buffers: &mut Buffers,
) -> Result<TensorDiff, ReadError> {
    let mut found = TensorDiff {
        name: a.name.clone(),
        differs: false,
        note: None,
        max_abs: None,
        relative_l2: None,
        cosine: None,
        nan_mismatches: 0,
        first_difference: None,
    };
    if a.shape != b.shape {
        found.differs = true;
        found.note = Some(format!("shape {:?} and {:?}", a.shape, b.shape));
        return Ok(found);
    }
    let floats = a.dtype.is_float() && b.dtype.is_float();
    if a.dtype != b.dtype {
        found.note = Some(format!("dtype {} and {}", a.dtype, b.dtype));
        if !floats {
            found.differs = true;
            return Ok(found);
        }
    }

    let mut sums = Sums::default();
    let mut integer_max_abs = 0u128;
    // Dtypes of less than a byte are compared as bytes, so their unit is the byte.
    let whole = a.dtype.bits().is_multiple_of(8);
    let units = if whole { a.elements() } else { a.bytes };
    let unit_bytes = |t: &TensorMeta| if whole { t.dtype.bits() / 8 } else { 1 };
    let (size_a, size_b) = (unit_bytes(a), unit_bytes(b));
    let mut start = 0;
    while start < units {
        let end = (start + TILE as u64).min(units);
        let ahead = (end + TILE as u64).min(units);
        left.will_need(a, end * size_a..ahead * size_a);
        right.will_need(b, end * size_b..ahead * size_b);
        let (range_a, range_b) = (start * size_a..end * size_a, start * size_b..end * size_b);
        let [scratch_a, scratch_b] = &mut buffers.scratch;
        let bytes_a = left.read(a, range_a.clone(), scratch_a)?;
        let bytes_b = right.read(b, range_b.clone(), scratch_b)?;
        if floats {
            let [tile_a, tile_b] = &mut buffers.tile;
            tile_a.resize((end - start) as usize, 0.0);
            tile_b.resize((end - start) as usize, 0.0);
            decode_f64(a.dtype, bytes_a, tile_a)?;
            decode_f64(b.dtype, bytes_b, tile_b)?;
            sums.add(start, tile_a, tile_b, tolerance);
        } else if bytes_a != bytes_b {
            let elements = bytes_a.chunks_exact(size_a as usize).zip(bytes_b.chunks_exact(size_b as usize));
            for (at, (x, y)) in elements.enumerate().filter(|(_, (x, y))| x != y) {
                sums.first_difference.get_or_insert(start + at as u64);
                if let (Some(x), Some(y)) = (decode_integer(a.dtype, x), decode_integer(b.dtype, y)) {
                    integer_max_abs = integer_max_abs.max(x.abs_diff(y));
                }
            }
        }
        left.release(a, range_a, false);
        right.release(b, range_b, false);
        start = end;
    }

    found.first_difference = sums.first_difference;
    found.differs |= sums.first_difference.is_some();
    if floats {
        found.nan_mismatches = sums.nan_mismatches;
        found.max_abs = Some(sums.max_abs);
        // The square root of each sum first: their product could overflow or vanish.
        let (norm_a, norm_b) = (sums.a_a.sqrt(), sums.b_b.sqrt());
        let distance = sums.distance.sqrt();
        found.relative_l2 = Some(if distance == 0.0 { 0.0 } else { distance / norm_b });
        found.cosine = (norm_a > 0.0 && norm_b > 0.0).then(|| sums.a_b / norm_a / norm_b);
    } else if a.dtype.is_copied() {
        found.max_abs = Some(integer_max_abs as f64);
    }
    Ok(found)
}

/// Sums over the elements of a float tensor seen so far.
#[derive(Default)]
struct Sums {
    a_a: f64,
    a_b: f64,
    b_b: f64,
    distance: f64,
    max_abs: f64,
    nan_mismatches: u64,
    first_difference: Option<u64>,
}

impl Sums {
    fn add(&mut self, start: u64, a: &[f64], b: &[f64], tolerance: f64) {
        // Partial sums of short runs: they can be vectorised, and they lose less to rounding than one long
        // sum.
        const LANES: usize = 8;
        let mut lanes = [[0.0; LANES]; 5];
        let mut special = false;
        pulp::Arch::new().dispatch(|| {
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
            for (a, b) in a.iter().zip(b) {
                for lane in 0..LANES {
                    let (x, y) = (a[lane], b[lane]);
                    let d = x - y;
                    lanes[0][lane] += x * x;
                    lanes[1][lane] += x * y;
                    lanes[2][lane] += y * y;
                    lanes[3][lane] += d * d;
                    lanes[4][lane] = if d.abs() > lanes[4][lane] { d.abs() } else { lanes[4][lane] };
                    // NaN - anything and ∞ - ∞ are NaN.
                    special |= d.is_nan();
                }
            }
            for (x, y) in a_rest.iter().zip(b_rest) {
                let d = x - y;
                lanes[0][0] += x * x;
                lanes[1][0] += x * y;
                lanes[2][0] += y * y;
                lanes[3][0] += d * d;
                lanes[4][0] = lanes[4][0].max(d.abs());
                special |= d.is_nan();
            }
        });
        let mut max_abs = lanes[4].into_iter().fold(0.0, f64::max);
        let mut sums = [0, 1, 2, 3].map(|sum| lanes[sum].iter().sum::<f64>());
        if special {
            // The rare way: leave out what is NaN on either side, and count equal infinities as equal.
            (sums, max_abs) = ([0.0; 4], 0.0);
            for (at, (x, y)) in a.iter().zip(b).enumerate() {
                if x.is_nan() || y.is_nan() {
                    if x.is_nan() != y.is_nan() {
                        self.nan_mismatches += 1;
                        self.first_difference.get_or_insert(start + at as u64);
                    }
                    continue;
                }
                let d = if x == y { 0.0 } else { x - y };
                for (sum, term) in sums.iter_mut().zip([x * x, x * y, y * y, d * d]) {
                    *sum += term;
                }
                max_abs = max_abs.max(d.abs());
            }
        }
        for (sum, term) in
            [&mut self.a_a, &mut self.a_b, &mut self.b_b, &mut self.distance].into_iter().zip(sums)
        {
            *sum += term;
        }
        if max_abs > tolerance {
            let beyond = |(x, y): (&f64, &f64)| x != y && (x - y).abs() > tolerance;
            let first = a.iter().zip(b).position(beyond).map(|at| start + at as u64);
            self.first_difference = match (self.first_difference, first) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
        }
        self.max_abs = self.max_abs.max(max_abs);
    }
}

impl Diff {
    /// Writes the differences as text: one line per tensor, then a summary. Foreign names are escaped.
    ///
    /// # Errors
    /// Those of `out`, a closed pipe among them.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let heading = ["tensor", "", "max abs", "relative L2", "cosine", "note"].map(str::to_owned).to_vec();
        let mut rows = vec![heading];
        for tensor in &self.tensors {
            let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.3e}"));
            let mut notes: Vec<String> = tensor.note.iter().cloned().collect();
            if tensor.nan_mismatches > 0 {
                notes.push(format!("{} NaN on one side only", tensor.nan_mismatches));
            }
            if let Some(at) = tensor.first_difference {
                notes.push(format!("first at {at}"));
            }
            rows.push(vec![
                escaped(&tensor.name),
                if tensor.differs { "differs" } else { "same" }.to_owned(),
                number(tensor.max_abs),
                number(tensor.relative_l2),
                tensor.cosine.map_or_else(|| "-".to_owned(), |cosine| format!("{cosine:.9}")),
                notes.join(", "),
            ]);
        }
        write_columns(out, &rows)?;
        writeln!(out)?;
        for (names, path) in [(&self.only_in_a, &self.a), (&self.only_in_b, &self.b)] {
            for name in names {
                writeln!(out, "only in {}: {}", escaped(path), escaped(name))?;
            }
        }
        let differing = self.tensors.iter().filter(|t| t.differs).count();
        writeln!(
            out,
            "{}: {} of {} common tensors differ by more than {:e}, {} only in A, {} only in B; max abs {:.3e}",
            if self.differs { "different" } else { "same" },
            differing,
            self.tensors.len(),
            self.tolerance,
            self.only_in_a.len(),
            self.only_in_b.len(),
            self.max_abs
        )
    }
}

#[cfg(test)]
mod tests;
