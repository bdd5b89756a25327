//! Scores as integers of the same order, and a search among them: which of many lie in a bracket.
//!
//! The search is written out for AVX-512, which packs what it finds in one instruction; elsewhere the same is found one
//! by one.

/// Scores that are looked at in one call of [`within`].
pub(crate) const AT_ONCE: usize = 512;
/// Of one vector.
const LANES: usize = 16;

/// An integer that orders as the score does; -0 comes before 0, NaN of either sign at its end. With `MAGNITUDE`, that of
/// the score's magnitude.
#[inline(always)]
pub(crate) fn key<const MAGNITUDE: bool>(score: f32) -> u32 {
    let bits = score.to_bits();
    if MAGNITUDE {
        bits | 0x8000_0000
    } else {
        // All bits of a negative one, the sign of a positive one.
        bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000)
    }
}

/// The score of a key.
pub(crate) fn score(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 == 0 { !key } else { key & 0x7fff_ffff })
}

/// What [`within`] counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Within {
    /// Keys in the bracket.
    pub inside: usize,
    /// Keys below it.
    pub below: u32,
    /// Scores that are 0, of either sign.
    pub zeros: u32,
}

/// Room for what one call of [`within`] finds, and a vector more.
pub(crate) type Offsets = [u32; AT_ONCE + LANES];

/// Finds the keys of `scores`, [`AT_ONCE`] at most, that lie in `first..first + len`, and puts them, less `first` and in
/// their order, to the beginning of `offsets`.
pub(crate) fn within<const MAGNITUDE: bool>(
    scores: &[f32],
    first: u32,
    len: u32,
    offsets: &mut Offsets,
) -> Within {
    debug_assert!(scores.len() <= AT_ONCE);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt") {
        // SAFETY: the unit is there.
        return unsafe { by_vectors::<MAGNITUDE>(scores, first, len, offsets) };
    }
    let mut found = Within::default();
    one_by_one::<MAGNITUDE>(scores, first, len, offsets, &mut found);
    found
}

fn one_by_one<const MAGNITUDE: bool>(
    scores: &[f32],
    first: u32,
    len: u32,
    offsets: &mut Offsets,
    found: &mut Within,
) {
    for score in scores {
        let key = key::<MAGNITUDE>(*score);
        let offset = key.wrapping_sub(first);
        offsets[found.inside] = offset;
        found.inside += usize::from(offset < len);
        found.below += u32::from(key < first);
        found.zeros += u32::from(*score == 0.0);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,popcnt")]
fn by_vectors<const MAGNITUDE: bool>(scores: &[f32], first: u32, len: u32, offsets: &mut Offsets) -> Within {
    use std::arch::x86_64::{
        _mm512_cmpeq_epi32_mask, _mm512_cmplt_epu32_mask, _mm512_loadu_si512, _mm512_maskz_compress_epi32,
        _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srai_epi32,
        _mm512_storeu_si512, _mm512_sub_epi32, _mm512_xor_si512,
    };
    let mut found = Within::default();
    let sign = _mm512_set1_epi32(i32::MIN);
    let (low, width) = (_mm512_set1_epi32(first as i32), _mm512_set1_epi32(len as i32));
    let (groups, rest) = scores.as_chunks::<LANES>();
    for group in groups {
        // SAFETY: `group` has sixteen values.
        let bits = unsafe { _mm512_loadu_si512(group.as_ptr().cast()) };
        let key = if MAGNITUDE {
            _mm512_or_si512(bits, sign)
        } else {
            _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32::<31>(bits), sign))
        };
        let offset = _mm512_sub_epi32(key, low);
        let inside = _mm512_cmplt_epu32_mask(offset, width);
        found.below += _mm512_cmplt_epu32_mask(key, low).count_ones();
        let magnitude = _mm512_slli_epi32::<1>(bits);
        found.zeros += _mm512_cmpeq_epi32_mask(magnitude, _mm512_setzero_si512()).count_ones();
        let packed = _mm512_maskz_compress_epi32(inside, offset);
        let room = &mut offsets[found.inside..found.inside + LANES];
        // SAFETY: `room` has sixteen places.
        unsafe { _mm512_storeu_si512(room.as_mut_ptr().cast(), packed) };
        found.inside += inside.count_ones() as usize;
    }
    one_by_one::<MAGNITUDE>(rest, first, len, offsets, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_as_scores() {
        let values = [f32::NEG_INFINITY, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, f32::MAX, f32::INFINITY];
        for pair in values.windows(2) {
            assert!(key::<false>(pair[0]) < key::<false>(pair[1]), "{pair:?}");
        }
        for v in values {
            assert_eq!(score(key::<false>(v)).to_bits(), v.to_bits());
            assert_eq!(key::<true>(v), key::<false>(v.abs()));
        }
    }

    fn check<const MAGNITUDE: bool>(scores: &[f32], first: u32, len: u32) {
        let [mut got, mut want] = [[0; AT_ONCE + LANES]; 2];
        let found = within::<MAGNITUDE>(scores, first, len, &mut got);
        let mut expected = Within::default();
        one_by_one::<MAGNITUDE>(scores, first, len, &mut want, &mut expected);
        assert_eq!(found, expected);
        assert_eq!(got[..found.inside], want[..found.inside]);
        let keys = scores.iter().map(|s| key::<MAGNITUDE>(*s));
        let inside = |key: &u32| {
            u64::from(*key) >= first.into() && u64::from(*key) < u64::from(first) + u64::from(len)
        };
        let direct: Vec<u32> = keys.clone().filter(inside).map(|key| key - first).collect();
        assert_eq!(got[..found.inside], direct);
        assert_eq!(found.below as usize, keys.filter(|key| *key < first).count());
    }

    #[test]
    fn vectors_find_what_is_found_one_by_one() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / 16_777_216.0 - 0.5) * 3.0
        };
        for len in [0, 1, 15, 16, 17, 300, AT_ONCE] {
            let mut scores: Vec<f32> = (0..len).map(|_| next()).collect();
            for (k, special) in [0.0, -0.0, f32::NAN, f32::NEG_INFINITY, f32::MAX].into_iter().enumerate() {
                if let Some(score) = scores.get_mut(7 * k) {
                    *score = special;
                }
            }
            for (first, width) in [
                (0, u32::MAX),
                (key::<false>(0.1), 1 << 20),
                (key::<false>(-0.9), 1 << 24),
                (key::<false>(0.0), 1),
                (u32::MAX - 3, 4),
            ] {
                check::<false>(&scores, first, width);
                check::<true>(&scores, first, width);
            }
        }
    }
}
