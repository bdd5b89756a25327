//! Large zeroed buffers that go back to the operating system the moment they are dropped.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Below this a `Vec` is cheaper than a mapping.
const MAPPED_FROM_BYTES: usize = 256 << 10;

/// What unwinds where the system refuses memory that was planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Size of the buffer.
    pub bytes: usize,
}

/// A zeroed `[T]` of fixed length.
///
/// Large ones are anonymous mappings of their own: an allocator would keep freed blocks for reuse, and the memory plan,
/// which counts exactly these buffers, would no longer bound what the process holds.
pub struct Buffer<T> {
    storage: Storage<T>,
    len: usize,
}

enum Storage<T> {
    Small(Vec<T>),
    Mapped(MmapMut),
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// Unwinds with [`OutOfMemory`] when the operating system refuses the memory: the plan has admitted this buffer, so
    /// nothing is left to try here.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("the plan bounds every buffer");
        if bytes < MAPPED_FROM_BYTES {
            return Self { storage: Storage::Small(vec![T::zeroed(); len]), len };
        }
        // Not a panic with its message: `stream` catches this and reports it as an error.
        let map = MmapMut::map_anon(bytes)
            .unwrap_or_else(|_| std::panic::resume_unwind(Box::new(OutOfMemory { bytes })));
        #[cfg(target_os = "linux")]
        if bytes >= 4 << 20 {
            // Fewer page faults on first touch; a hint, so a refusal changes nothing.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Self { storage: Storage::Mapped(map), len }
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &self.storage {
            Storage::Small(values) => values,
            // A mapping starts at a page, so it is aligned for every scalar.
            Storage::Mapped(map) => &bytemuck::cast_slice(&map[..self.len * size_of::<T>()])[..self.len],
        }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.storage {
            Storage::Small(values) => values,
            Storage::Mapped(map) => {
                &mut bytemuck::cast_slice_mut(&mut map[..self.len * size_of::<T>()])[..self.len]
            }
        }
    }
}

impl<T: Pod> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} x {} bytes)", self.len, size_of::<T>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_mapped_buffers_are_zero_and_writable() {
        for len in [0, 3, MAPPED_FROM_BYTES / 8, MAPPED_FROM_BYTES, 3 << 20] {
            let mut buffer = Buffer::<f64>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|v| *v == 0.0));
            if let Some(last) = buffer.last_mut() {
                *last = 2.5;
                assert_eq!(buffer[len - 1], 2.5);
            }
        }
    }
}
