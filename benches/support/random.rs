//! Seeded numbers for the benches: the same inputs on every machine, from a counter, without state to carry around.
//!
//! Used by the benches and, through `synthetic`, by `examples/make_synthetic.rs`; never by the library.

// Each bench includes this file for itself and uses what it needs of it.
#![allow(dead_code)]

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64: a bijection that scatters neighbouring counters.
#[inline(always)]
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A stream of 64-bit numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Streams of different `seed` or `stream` are unrelated.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Self(mix(mix(seed.wrapping_add(GOLDEN)) ^ stream.wrapping_mul(GOLDEN)))
    }

    /// The next number.
    #[inline(always)]
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// In (0, 1).
    #[inline(always)]
    pub(crate) fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller's cosine branch.
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// `len` independent normals times `scale`.
    pub(crate) fn normals(&mut self, len: usize, scale: f64) -> Vec<f64> {
        (0..len).map(|_| scale * self.normal()).collect()
    }
}
