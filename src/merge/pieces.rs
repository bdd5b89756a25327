//! The piece of the inputs that one worker is on, kept while every variant of a sweep takes it.
//!
//! Elementwise merges read all models piece by piece. In a sweep each variant needs the same piece: it is read once, as
//! stored, and decoded again from memory that is still in the worker's cache. Without a sweep nothing is kept.

use std::cell::RefCell;

/// Bytes kept by a worker at most; what does not fit is read again. Counted in the worker's share of the overhead.
pub const MOST_BYTES: usize = 4 << 20;

/// What a kept piece is, beside its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Of the checkpoint with this number, as stored.
    Tensor(usize),
    /// Diagonal Fisher values of the model with this number, as f64.
    Fisher(usize),
}

#[derive(Default)]
struct Pieces {
    active: bool,
    used: usize,
    held: Vec<(Kind, u64, Vec<u8>)>,
    /// Buffers of the piece before.
    free: Vec<Vec<u8>>,
}

thread_local! {
    static PIECES: RefCell<Pieces> = RefCell::default();
}

/// Runs `work`, in which each piece is read once. Not to be nested.
pub(super) fn shared<R>(work: impl FnOnce() -> R) -> R {
    /// Ends the sharing on every way out.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            PIECES.with_borrow_mut(|pieces| {
                pieces.active = false;
                pieces.used = 0;
                let Pieces { held, free, .. } = pieces;
                free.extend(held.drain(..).map(|(_, _, bytes)| bytes));
            });
        }
    }
    PIECES.with_borrow_mut(|pieces| pieces.active = true);
    let _end = End;
    work()
}

/// Whether pieces are being kept.
pub(super) fn active() -> bool {
    PIECES.with_borrow(|pieces| pieces.active)
}

/// Hands the kept bytes at `offset` to `decode`; false where they are not kept.
pub(super) fn take(kind: Kind, offset: u64, len: usize, decode: impl FnOnce(&[u8])) -> bool {
    PIECES.with_borrow(|pieces| {
        pieces.active
            && pieces
                .held
                .iter()
                .find(|(k, o, bytes)| (*k, *o, bytes.len()) == (kind, offset, len))
                .map(|(_, _, bytes)| decode(bytes))
                .is_some()
    })
}

/// Keeps `len` bytes, which `fill` writes, if a sweep is on and they fit.
pub(super) fn keep(kind: Kind, offset: u64, len: usize, fill: impl FnOnce(&mut [u8])) {
    PIECES.with_borrow_mut(|pieces| {
        if !pieces.active || pieces.used + len > MOST_BYTES {
            return;
        }
        pieces.used += len;
        let mut bytes = pieces.free.pop().unwrap_or_default();
        bytes.resize(len, 0);
        fill(&mut bytes);
        pieces.held.push((kind, offset, bytes));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_live_as_long_as_the_sharing() {
        let get = |offset| {
            let mut found = Vec::new();
            take(Kind::Tensor(1), offset, 3, |bytes| found = bytes.to_vec()).then_some(found)
        };
        keep(Kind::Tensor(1), 5, 3, |bytes| bytes.fill(7));
        assert_eq!(get(5), None, "nothing is kept outside");
        shared(|| {
            keep(Kind::Tensor(1), 5, 3, |bytes| bytes.fill(7));
            assert_eq!(get(5), Some(vec![7; 3]));
            assert_eq!(get(6), None);
            keep(Kind::Tensor(1), 9, MOST_BYTES, |bytes| bytes.fill(1));
            assert!(!take(Kind::Tensor(1), 9, MOST_BYTES, |_| {}), "what does not fit is read again");
        });
        assert_eq!(get(5), None);
    }
}
