//! Which bytes of an output's tensors are written, in whatever order they come, and the checksums of the complete ones.

use std::collections::HashMap;
use std::ops::Range;

use super::checksum::{Assembler, Checksum, Hashed};
use super::error::WriteError;
use crate::plan::shards::{OutputLayout, TensorSpec};

/// Which bytes of which tensor have been written.
#[derive(Debug)]
pub(super) struct Coverage {
    pub complete: Vec<bool>,
    /// Of the tensors begun and not complete: what is written, sorted, without overlaps or touching
    /// ends; and what is known of its checksum.
    partial: HashMap<usize, (Vec<Range<u64>>, Assembler)>,
    /// Of complete tensors, unless something was written twice.
    pub checksums: Vec<Option<Checksum>>,
    /// Bytes of pieces written in part that may still be held.
    room: u64,
}

impl Coverage {
    pub fn new(layout: &OutputLayout, room: u64) -> Self {
        let empty = |spec: &TensorSpec| if spec.bytes == 0 { Assembler::new(0).finish(spec) } else { None };
        Self {
            complete: layout.specs().iter().map(|spec| spec.bytes == 0).collect(),
            partial: HashMap::new(),
            checksums: layout.specs().iter().map(empty).collect(),
            room,
        }
    }

    pub fn add(&mut self, tensor: usize, piece: Range<u64>, spec: &TensorSpec, hashed: &Hashed<'_>) {
        if self.complete[tensor] {
            self.checksums[tensor] = None;
            return;
        }
        let (pieces, assembler) =
            self.partial.entry(tensor).or_insert_with(|| (Vec::new(), Assembler::new(spec.bytes)));
        insert(pieces, piece);
        assembler.add(hashed, spec.bytes, &mut self.room);
        if matches!(pieces.as_slice(), [all] if *all == (0..spec.bytes)) {
            self.checksums[tensor] = assembler.finish(spec);
            self.set_complete_at(tensor);
        }
    }

    pub fn set_complete(&mut self, tensor: usize, checksum: Checksum) {
        self.checksums[tensor] = Some(checksum);
        self.set_complete_at(tensor);
    }

    fn set_complete_at(&mut self, tensor: usize) {
        self.complete[tensor] = true;
        if let Some((_, mut assembler)) = self.partial.remove(&tensor) {
            assembler.give_up(&mut self.room);
        }
    }

    pub fn check_complete(&self, layout: &OutputLayout) -> Result<(), WriteError> {
        let mut missing = (0..self.complete.len()).filter(|&tensor| !self.complete[tensor]);
        let Some(tensor) = missing.next() else {
            return Ok(());
        };
        let spec = &layout.specs()[tensor];
        let written =
            self.partial.get(&tensor).map_or(0, |(pieces, _)| pieces.iter().map(|p| p.end - p.start).sum());
        Err(WriteError::Incomplete {
            tensor: spec.name.clone(),
            written,
            bytes: spec.bytes,
            others: missing.count(),
        })
    }
}

/// Adds `piece` to a sorted list of disjoint, non-touching ranges and keeps it so.
pub(super) fn insert(pieces: &mut Vec<Range<u64>>, piece: Range<u64>) {
    let from = pieces.partition_point(|held| held.end < piece.start);
    let to = pieces.partition_point(|held| held.start <= piece.end);
    let joined = pieces[from..to]
        .iter()
        .fold(piece, |joined, held| joined.start.min(held.start)..joined.end.max(held.end));
    pieces.splice(from..to, [joined]);
}
