//! Writes what a method keeps of every task while a tensor is merged: bits piece by piece, norms at the end.

use std::sync::{Mutex, PoisonError};

use super::sink::Sink;
use crate::masks::mask_bytes;
use crate::merge::elementwise::{Piece, TaskMasks};
use crate::merge::{MergeError, Recipe, Start};
use crate::plan::{BlockPlan, MaskPlan};

/// The masks of one tensor on their way to the writer.
pub(super) struct Marker<'e, 'b> {
    plan: MaskPlan,
    method: &'e dyn TaskMasks,
    sink: &'e Sink<'e, 'b>,
    outputs: &'e [usize],
    /// Bytes of one task's mask.
    row: u64,
    /// First element of each piece, and its share. Added in order, so that threads do not matter.
    norms: Mutex<Vec<(usize, Vec<f64>)>>,
}

impl<'e, 'b> Marker<'e, 'b> {
    /// Of a block that keeps masks.
    pub fn of(
        block: &BlockPlan,
        recipe: &'e Recipe,
        sink: &'e Sink<'e, 'b>,
        outputs: &'e [usize],
    ) -> Option<Self> {
        let plan = block.masks?;
        let Start::Method(start) = &recipe.start else { return None };
        let method = start.method.task_masks()?;
        let row = mask_bytes(block.block.elements() as u64);
        Some(Self { plan, method, sink, outputs, row, norms: Mutex::default() })
    }

    /// Marks one piece.
    pub fn piece(&self, piece: &Piece<'_>) -> Result<(), MergeError> {
        thread_local! {
            static BITS: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        let bytes = piece.len().div_ceil(8);
        debug_assert!(
            piece.first().is_multiple_of(8),
            "pieces of a method without rows begin at whole bytes"
        );
        let mut norms = vec![0.0; if self.plan.norms.is_some() { 2 * self.plan.tasks } else { 0 }];
        BITS.with_borrow_mut(|bits| {
            bits.clear();
            bits.resize(bytes * self.plan.tasks, 0);
            self.method.record(piece, bits, &mut norms);
            for (task, bits) in bits.chunks_exact(bytes.max(1)).enumerate() {
                let offset = task as u64 * self.row + piece.first() as u64 / 8;
                self.sink.write_bytes(self.outputs, self.plan.mask, offset, bits)?;
            }
            Ok::<(), MergeError>(())
        })?;
        if self.plan.norms.is_some() {
            self.norms.lock().unwrap_or_else(PoisonError::into_inner).push((piece.first(), norms));
        }
        Ok(())
    }

    /// Writes the norms, once every piece is marked.
    pub fn finish(&self) -> Result<(), MergeError> {
        let Some(tensor) = self.plan.norms else { return Ok(()) };
        let mut parts = self.norms.lock().unwrap_or_else(PoisonError::into_inner);
        parts.sort_unstable_by_key(|part| part.0);
        let mut total = vec![0.0; 2 * self.plan.tasks];
        for (_, part) in parts.iter() {
            for (total, part) in total.iter_mut().zip(part) {
                *total += part;
            }
        }
        let bytes: Vec<u8> = total.iter().flat_map(|norm| norm.to_le_bytes()).collect();
        self.sink.write_bytes(self.outputs, tensor, 0, &bytes)
    }
}
