//! Random numbers by counter: a function of seed, model, tensor and element alone, so that a mask is the same however the
//! tensor is cut, on however many threads, and whatever else is merged.
//!
//! The generator is Threefry-2x32 with 13 rounds (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3,
//! SC 2011), which its authors found to pass BigCrush: additions, rotations and exclusive ors of 32 bits, which every
//! vector unit has. Its key is XXH3-64 of tensor name and model under the seed; one block gives the numbers of two
//! elements.

use twox_hash::XxHash3_64;

use crate::kernel::dispatch;

/// Skein's constant for the last word of the key.
const PARITY: u32 = 0x1bd1_1bda;

/// Elements whose numbers are made at a time, in the first-level cache.
const CHUNK: usize = 512;

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

    /// 32 random bits of an element.
    #[inline(always)]
    pub fn bits(&self, element: u64) -> u32 {
        self.block(element / 2)[(element % 2) as usize]
    }

    /// Whether an element is kept, which happens with `probability` in [0, 1], to 2⁻³².
    #[inline(always)]
    pub fn keeps(&self, element: u64, probability: f64) -> bool {
        u64::from(self.bits(element)) < threshold(probability)
    }

    /// Sets to 0 what is not kept of the elements from `first` on.
    pub fn thin(&self, first: u64, probability: f64, values: &mut [f32]) {
        // A probability of 1 is the only one whose threshold has no 32 bits.
        let Ok(threshold) = u32::try_from(threshold(probability)) else { return };
        self.for_each_chunk(first, values, |bits, values| {
            dispatch(
                #[inline(always)]
                || {
                    for (value, bits) in values.iter_mut().zip(bits) {
                        *value = if *bits < threshold { *value } else { 0.0 };
                    }
                },
            );
        });
    }

    /// The bits of the elements from `first` on.
    pub fn fill(&self, first: u64, bits: &mut [u32]) {
        let odd = (first % 2) as usize;
        if odd == 1
            && let Some(bits) = bits.first_mut()
        {
            *bits = self.bits(first);
        }
        let mut at = first.div_ceil(2);
        for bits in bits.get_mut(odd..).unwrap_or_default().chunks_mut(CHUNK) {
            self.fill_pairs(at, bits);
            at += (CHUNK / 2) as u64;
        }
    }

    /// A chunk at most, from the first word of block `at` on.
    fn fill_pairs(&self, at: u64, bits: &mut [u32]) {
        let (mut even, mut odd) = ([0u32; CHUNK / 2], [0u32; CHUNK / 2]);
        let [low, high] = [at as u32, (at >> 32) as u32];
        dispatch(
            #[inline(always)]
            || {
                let blocks = bits.len().div_ceil(2);
                for (k, (even, odd)) in even[..blocks].iter_mut().zip(&mut odd[..blocks]).enumerate() {
                    let counter = low.wrapping_add(k as u32);
                    let carry = u32::from(counter < low);
                    [*even, *odd] = threefry(self.key, [counter, high.wrapping_add(carry)]);
                }
                let (pairs, rest) = bits.as_chunks_mut::<2>();
                for ((pair, even), odd) in pairs.iter_mut().zip(&even).zip(&odd) {
                    *pair = [*even, *odd];
                }
                if let [last] = rest {
                    *last = even[blocks - 1];
                }
            },
        );
    }

    fn for_each_chunk(&self, first: u64, values: &mut [f32], mut work: impl FnMut(&[u32], &mut [f32])) {
        let mut bits = [0; CHUNK];
        for (k, values) in values.chunks_mut(CHUNK).enumerate() {
            let bits = &mut bits[..values.len()];
            self.fill(first + (k * CHUNK) as u64, bits);
            work(bits, values);
        }
    }

    #[inline(always)]
    fn block(&self, counter: u64) -> [u32; 2] {
        threefry(self.key, [counter as u32, (counter >> 32) as u32])
    }
}

/// What 32 random bits are below with this probability.
fn threshold(probability: f64) -> u64 {
    (probability * 4_294_967_296.0) as u64
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
    fn filling_is_asking_one_by_one() {
        let stream = Stream::new(7, 1, "a.weight");
        for first in [0, 1, 2, 511, (1 << 33) - 3, (1 << 34) - 300] {
            for len in [0, 1, 2, 3, 700, 1025] {
                let mut bits = vec![0; len];
                stream.fill(first, &mut bits);
                let expected: Vec<u32> = (0..len as u64).map(|k| stream.bits(first + k)).collect();
                assert_eq!(bits, expected, "{len} from {first}");
                for probability in [0.0, 0.3, 1.0] {
                    let mut values = vec![1.0; len];
                    stream.thin(first, probability, &mut values);
                    let kept = |k| if stream.keeps(first + k, probability) { 1.0 } else { 0.0 };
                    assert_eq!(values, (0..len as u64).map(kept).collect::<Vec<f32>>());
                }
            }
        }
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
