//! Rows of a vocabulary in the order of another one: where each row of the new tensor comes from. Made by `tokenizer`,
//! read through [`super::Model`].

use std::sync::Arc;

use super::Model;

/// Where one row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowSource {
    /// The tensor's own row of this number.
    Own(u32),
    /// Zeros.
    Zero,
    /// The mean of these rows: index into [`RowMap::means`]. A mean of one is that row.
    Mean(u32),
    /// The mean of all rows that are no padding.
    Padding,
}

/// The rows of one tensor in its new order.
#[derive(Debug, Default)]
pub struct RowMap {
    /// One a row of the new tensor. Padding stands at the end.
    pub rows: Vec<RowSource>,
    /// Lists of (index into `donors`, row there).
    pub means: Vec<Vec<(u32, u32)>>,
    /// The models that rows come from, their rows in the old order, and the stored name of the tensor there.
    pub donors: Vec<(Arc<Model>, String)>,
}

impl RowMap {
    /// Rows before the padding.
    pub fn filled(&self) -> usize {
        self.rows.iter().position(|row| *row == RowSource::Padding).unwrap_or(self.rows.len())
    }

    /// Whether some rows are the mean of all others.
    pub fn has_padding(&self) -> bool {
        self.rows.last() == Some(&RowSource::Padding)
    }

    /// Memory that it takes itself.
    pub fn bytes(&self) -> u64 {
        let means: usize = self.means.iter().map(|mean| 24 + 8 * mean.len()).sum();
        (8 * self.rows.len() + means) as u64
    }
}
