//! Random numbers by counter: a function of seed, model, tensor and element alone, so that a mask is the same however the
//! tensor is cut, on however many threads, and whatever else is merged.
//!
//! The key is XXH3-128 of tensor name and model under the seed. An element's number is SplitMix64's finaliser applied
//! twice: to the key's one half plus a Weyl sequence (Steele, Lea, Flood 2014), then, after the other half went in, once
//! more, so that two tensors whose halves collide still have unrelated masks.

use twox_hash::XxHash3_128;

/// The stream of one tensor of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    weyl: u64,
    whiten: u64,
}

impl Stream {
    /// `model` is the place in the config's `models`.
    pub fn new(seed: u64, model: usize, tensor: &str) -> Self {
        let mut key = Vec::with_capacity(8 + tensor.len());
        key.extend_from_slice(&(model as u64).to_le_bytes());
        key.extend_from_slice(tensor.as_bytes());
        let hash = XxHash3_128::oneshot_with_seed(seed, &key);
        Self { weyl: hash as u64, whiten: (hash >> 64) as u64 }
    }

    /// 32 random bits of an element.
    #[inline(always)]
    pub fn bits(&self, element: u64) -> u32 {
        let first = mix(self.weyl.wrapping_add(element.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        (mix(first ^ self.whiten) >> 32) as u32
    }

    /// Whether an element is kept, which happens with `probability` in [0, 1], to 2⁻³².
    #[inline(always)]
    pub fn keeps(&self, element: u64, probability: f64) -> bool {
        u64::from(self.bits(element)) < (probability * 4_294_967_296.0) as u64
    }
}

#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

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
