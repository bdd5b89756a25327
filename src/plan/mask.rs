//! What the masks of one tensor take: bytes of the side file, and memory while they are made.

use crate::masks::{Rescaler, mask_bytes};
use crate::merge::elementwise::{self, MethodStart, TaskMasks};

/// Masks that a method keeps of a tensor: see [`crate::masks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskPlan {
    /// Models that are merged.
    pub tasks: usize,
    /// What they are scaled by.
    pub rescaler: Rescaler,
    /// Number of the mask's tensor in the layout.
    pub mask: usize,
    /// Number of the norms' tensor, where there is a rescaler.
    pub norms: Option<usize>,
    /// Bytes of both.
    pub bytes: u64,
}

impl MaskPlan {
    pub(super) fn new(start: &MethodStart, method: &dyn TaskMasks, elements: u64) -> Self {
        let (tasks, rescaler) = (start.models.len(), method.rescaler());
        let norms = if rescaler == Rescaler::None { 0 } else { 16 * tasks as u64 };
        let bytes = tasks as u64 * mask_bytes(elements) + norms;
        Self { tasks, rescaler, mask: 0, norms: None, bytes }
    }

    /// What is held beside the merge: bits of a piece a worker, ragged pieces of checksums, the norms of each piece.
    pub(super) fn memory_bytes(&self, elements: u64, workers: usize) -> u64 {
        let (tasks, pieces) = (self.tasks as u64, elements.div_ceil(elementwise::PIECE as u64));
        let workers = (workers as u64).min(pieces);
        let bits = tasks * elementwise::PIECE as u64 / 8;
        // A row is written 2 KiB at a time: until 64 KiB of it are there, they are kept to be hashed.
        let ragged = tasks * (64 << 10).min(mask_bytes(elements));
        workers * (bits + 2 * ragged) + pieces * (16 * tasks + 64)
    }
}
