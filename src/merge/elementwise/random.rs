//! Random numbers by counter: a function of seed, model, tensor and element alone, so that a mask is the same however the
//! tensor is cut, on however many threads, and whatever else is merged.
//!
//! The generator is Threefry-2x32 with 13 rounds (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3,
//! SC 2011), which its authors found to pass BigCrush: additions, rotations and exclusive ors of 32 bits, which every
//! vector unit has. Its key is XXH3-64 of tensor name and model under the seed.
//!
//! Whether an element is kept is whether 40 random bits are below its probability's. The first eight of them tell for all
//! elements but one in 256: one block of the generator gives those of eight elements, and the rest is drawn where it counts.

use std::cmp::Ordering;

use twox_hash::XxHash3_64;

use crate::kernel::dispatch;

/// Skein's constant for the last word of the key.
const PARITY: u32 = 0x1bd1_1bda;

/// Elements that share a block.
const EIGHT: usize = 8;
/// Elements that are thinned at a time, in the first-level cache.
const CHUNK: usize = 1024;
/// Counters of the blocks that one element has for itself.
const OWN: u64 = 1 << 63;

/// The stream of one tensor of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// `model` is the place in the config's `models`.
    pub fn new(seed: u64, model: usize, tensor: &str) -> Self {
        let mut text = Vec::with_capacity(8 + tensor.len());
        text.extend_from_slice(&(model as u64).to_le_bytes());
        text.extend_from_slice(tensor.as_bytes());
        let hash = XxHash3_64::oneshot_with_seed(seed, &text);
        Self { key: [hash as u32, (hash >> 32) as u32] }
    }

    /// Whether an element is kept, which happens with `probability` in [0, 1], to 2⁻⁴⁰.
    pub fn keeps(&self, element: u64, probability: f64) -> bool {
        let [low, high] = self.block(element / EIGHT as u64);
        let first = (u64::from(high) << 32 | u64::from(low)).to_le_bytes()[element as usize % EIGHT];
        let threshold = Threshold::of(probability);
        match u32::from(first).cmp(&threshold.first) {
            Ordering::Less => true,
            Ordering::Equal => self.keeps_by_rest(element, threshold),
            Ordering::Greater => false,
        }
    }

    /// The same where the first bits do not tell: by 32 more, of a block that is the element's own.
    #[cold]
    fn keeps_by_rest(&self, element: u64, threshold: Threshold) -> bool {
        self.block(element | OWN)[0] < threshold.rest
    }

    /// Sets to 0 what is not kept of the elements from `first` on.
    pub fn thin(&self, first: u64, probability: f64, values: &mut [f32]) {
        let threshold = Threshold::of(probability);
        let Ok(byte) = u8::try_from(threshold.first) else { return };
        // A multiple of 1/256: eight bits say it all, and the byte itself is one too many.
        let undecided = threshold.rest > 0;
        let Some(last) = (if undecided { Some(byte) } else { byte.checked_sub(1) }) else {
            values.fill(0.0);
            return;
        };
        // Up to a whole block, then by chunks of them.
        let head = (first.next_multiple_of(EIGHT as u64) - first).min(values.len() as u64) as usize;
        let (values_before, values) = values.split_at_mut(head);
        for (element, value) in (first..).zip(values_before) {
            *value = if self.keeps(element, probability) { *value } else { 0.0 };
        }
        let first = first + head as u64;
        for (k, values) in values.chunks_mut(CHUNK).enumerate() {
            let first = first + (k * CHUNK) as u64;
            let bytes = self.first_bytes(first / EIGHT as u64, values.len().div_ceil(EIGHT));
            let bytes = &bytes.as_flattened()[..values.len()];
            if undecided {
                for at in memchr::memchr_iter(byte, bytes) {
                    if !self.keeps_by_rest(first + at as u64, threshold) {
                        values[at] = 0.0;
                    }
                }
            }
            dispatch(
                #[inline(always)]
                || {
                    for (value, own) in values.iter_mut().zip(bytes) {
                        *value = if *own <= last { *value } else { 0.0 };
                    }
                },
            );
        }
    }

    /// The bytes of so many blocks, a chunk at most, from block `at` on.
    fn first_bytes(&self, at: u64, blocks: usize) -> [[u8; EIGHT]; CHUNK / EIGHT] {
        let mut bytes = [[0; EIGHT]; CHUNK / EIGHT];
        let [low, high] = [at as u32, (at >> 32) as u32];
        dispatch(
            #[inline(always)]
            || {
                let [mut even, mut odd] = [[0u32; CHUNK / EIGHT]; 2];
                for (k, (even, odd)) in even[..blocks].iter_mut().zip(&mut odd[..blocks]).enumerate() {
                    let counter = low.wrapping_add(k as u32);
                    let carry = u32::from(counter < low);
                    [*even, *odd] = threefry(self.key, [counter, high.wrapping_add(carry)]);
                }
                for ((bytes, even), odd) in bytes.iter_mut().zip(&even).zip(&odd) {
                    *bytes = (u64::from(*odd) << 32 | u64::from(*even)).to_le_bytes();
                }
            },
        );
        bytes
    }

    #[inline(always)]
    fn block(&self, counter: u64) -> [u32; 2] {
        threefry(self.key, [counter as u32, (counter >> 32) as u32])
    }
}

/// What 40 random bits are below with a probability: the first eight, and the others.
#[derive(Debug, Clone, Copy)]
struct Threshold {
    /// 256 for a probability of 1: every byte is below.
    first: u32,
    rest: u32,
}

impl Threshold {
    fn of(probability: f64) -> Self {
        let bits = (probability.clamp(0.0, 1.0) * 1_099_511_627_776.0) as u64;
        Self { first: (bits >> 32) as u32, rest: bits as u32 }
    }
}

/// Threefry-2x32-13.
#[inline(always)]
fn threefry(key: [u32; 2], [mut x, mut y]: [u32; 2]) -> [u32; 2] {
    let keys = [key[0], key[1], PARITY ^ key[0] ^ key[1]];
    // Written out: the compiler makes vectors of a loop around this only where there is none in it.
    macro_rules! rounds {
        ($($rotation:literal)*) => {
            $(
                x = x.wrapping_add(y);
                y = y.rotate_left($rotation) ^ x;
            )*
        };
    }
    macro_rules! key {
        ($part:literal) => {
            x = x.wrapping_add(keys[$part % 3]);
            y = y.wrapping_add(keys[($part + 1) % 3]).wrapping_add($part);
        };
    }
    key!(0);
    rounds!(13 15 26 6);
    key!(1);
    rounds!(17 29 16 24);
    key!(2);
    rounds!(13 15 26 6);
    key!(3);
    rounds!(17);
    [x, y]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers that the authors publish with their code (Random123, `kat_vectors`, threefry2x32, 13 rounds).
    #[test]
    fn known_answers() {
        assert_eq!(threefry([0; 2], [0; 2]), [0x9d1c_5ec6, 0x8bd5_0731]);
        assert_eq!(threefry([u32::MAX; 2], [u32::MAX; 2]), [0xfd36_d048, 0x2d17_272c]);
        let (counter, key) = ([0x243f_6a88, 0x85a3_08d3], [0x1319_8a2e, 0x0370_7344]);
        assert_eq!(threefry(key, counter), [0xba3e_4725, 0xf27d_669e]);
    }

    #[test]
    fn thinning_is_asking_one_by_one() {
        let stream = Stream::new(7, 1, "a.weight");
        for first in [0, 1, 7, 511, (1 << 35) - 3, (1 << 36) - 3000] {
            for len in [0, 1, 2, 9, 700, 3 * CHUNK + 1] {
                for probability in [0.0, 1e-6, 0.3, 0.5, 1.0 - 1e-6, 1.0] {
                    let mut values = vec![1.0; len];
                    stream.thin(first, probability, &mut values);
                    let kept = |k| if stream.keeps(first + k, probability) { 1.0 } else { 0.0 };
                    let expected: Vec<f32> = (0..len as u64).map(kept).collect();
                    assert_eq!(values, expected, "{len} from {first}, {probability}");
                }
            }
        }
    }

    #[test]
    fn bits_beyond_the_first_eight_count() {
        let stream = Stream::new(7, 1, "a.weight");
        let n = 1u64 << 22;
        // Between two steps of eight bits: a quarter of the elements whose first bits do not tell are kept.
        let probability = (77.0 + 0.25) / 256.0;
        let [below, kept, above] =
            [77.0 / 256.0, probability, 78.0 / 256.0].map(|p| (0..n).filter(|i| stream.keeps(*i, p)).count());
        let undecided = (above - below) as f64;
        let bound = 6.0 * (undecided * 0.25 * 0.75).sqrt();
        assert!(((kept - below) as f64 - undecided / 4.0).abs() < bound, "{below} {kept} {above}");
    }

    #[test]
    fn zero_and_one_are_exact_and_rates_are_right() {
        let n = 1u64 << 20;
        let stream = Stream::new(7, 1, "a.weight");
        assert!((0..n).all(|i| stream.keeps(i, 1.0) && !stream.keeps(i, 0.0)));
        for p in [0.01, 0.3, 0.5, 0.9] {
            let kept = (0..n).filter(|i| stream.keeps(*i, p)).count() as f64;
            // Six standard deviations of a binomial: a fair generator fails once in 5e8 seeds, and this one is fixed.
            let bound = 6.0 * (n as f64 * p * (1.0 - p)).sqrt();
            assert!((kept - n as f64 * p).abs() < bound, "{p}: {kept}");
        }
    }

    #[test]
    fn streams_do_not_resemble_each_other() {
        let n = 1u64 << 20;
        let one = Stream::new(7, 1, "a.weight");
        let others =
            [Stream::new(8, 1, "a.weight"), Stream::new(7, 2, "a.weight"), Stream::new(7, 1, "b.weight")];
        for other in others {
            let same = (0..n).filter(|i| one.keeps(*i, 0.5) == other.keeps(*i, 0.5)).count() as f64;
            // Agreement of independent fair bits: six standard deviations, 6·√n/2.
            assert!((same - n as f64 / 2.0).abs() < 3.0 * (n as f64).sqrt(), "{same}");
        }
        // Neighbours in one stream.
        let same = (0..n).filter(|i| one.keeps(*i, 0.5) == one.keeps(*i + 1, 0.5)).count() as f64;
        assert!((same - n as f64 / 2.0).abs() < 3.0 * (n as f64).sqrt(), "{same}");
    }
}
