//! Exact order statistics in one read, where a sample tells beforehand about where they lie.
//!
//! A sample of the scores gives, for each wanted rank, a bracket of keys that holds it all but surely; the read counts the
//! scores of the bracket key by key and those below it. The statistic follows exactly, or not at all: then `order` selects
//! in two reads. The differences of 16-bit values have few significant bits, so a bracket's bins may stand for multiples
//! of a power of two; the few keys that are none are kept one by one.

use super::order::{Counter, OrderStatistic, add_sums_above, sum_of_least};
use crate::kernel::Buffer;
use crate::kernel::ranked::{self, AT_ONCE, Offsets, within};

/// Bins that the brackets of one column share: as much memory as two histograms of `order`.
pub(super) const COLUMN_BINS: usize = 1 << 18;
/// Fewer scores than this are not sampled.
pub(super) const LEAST_SCORES: u64 = 1 << 19;
/// More are counted in 64 bits, by `order`.
pub(super) const MOST_SCORES: u64 = u32::MAX as u64;
/// Neighbours that are sampled together.
pub(super) const CLUSTER: usize = 256;
/// Largest sample of a column.
const MOST_SAMPLED: u64 = 1 << 17;
/// Standard deviations of the sample's rank on either side of a bracket: of normal ones, one in two million lies outside.
/// Such a miss costs the read that did not find it.
const DEVIATIONS: f64 = 5.0;
/// Most keys between a column's bins.
const MOST_BETWEEN: usize = 1 << 12;

/// Clusters that are sampled of so many scores.
pub(super) fn clusters(scores: u64) -> u64 {
    (scores / 64).min(MOST_SAMPLED) / CLUSTER as u64
}

/// Keys `first..first + len`, in bins of `2^shift`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bracket {
    first: u32,
    len: u32,
    shift: u32,
}

impl Bracket {
    /// Around the share `rank` in [0, 1] of the scores, with `bins` bins, as far as a sample tells. `sample`: clusters of
    /// keys, one after the other; `scratch`: room for as many. `None` where the bins do not suffice, or where the rank is
    /// too near to an end.
    pub fn around(rank: f64, bins: usize, sample: &[u32], scratch: &mut Vec<u32>) -> Option<Self> {
        let count = sample.len();
        let last = count.checked_sub(1)?;
        let place = (rank * count as f64) as usize;
        scratch.clear();
        scratch.extend_from_slice(sample);
        let (below, middle, above) = scratch.select_nth_unstable(place.min(last));
        let middle = *middle;
        let margin = (DEVIATIONS * deviation(sample, middle)).ceil() as usize + 1;
        // What the sample does not have on both sides, it says nothing about.
        let low = *below.select_nth_unstable(below.len().checked_sub(margin)?).1;
        if above.len() < margin {
            return None;
        }
        let high = *above.select_nth_unstable(margin - 1).1;
        let inside = |key: u32| if (low..=high).contains(&key) { key } else { 0 };
        let zeros = sample.iter().fold(0, |any, key| any | inside(*key)).trailing_zeros();
        let width = u64::from(high - low) + 1;
        let shift = (0..=zeros.min(31)).find(|shift| width >> shift < bins as u64 - 1)?;
        let first = low >> shift << shift;
        Some(Self { first, len: (high - first).saturating_add(1), shift })
    }
}

/// Standard deviation of the number of keys below `key` in a sample of clusters like this one. Neighbours resemble each
/// other, so it is taken from the clusters; never less than that of scores drawn one by one.
fn deviation(sample: &[u32], key: u32) -> f64 {
    let counts = sample.chunks(CLUSTER).map(|c| c.iter().filter(|k| **k < key).count() as f64);
    let clusters = counts.clone().count() as f64;
    let mean = counts.clone().sum::<f64>() / clusters;
    let variance = counts.map(|c| (c - mean).powi(2)).sum::<f64>() / (clusters - 1.0).max(1.0);
    let share = mean / CLUSTER as f64;
    (clusters * variance.max(CLUSTER as f64 * share * (1.0 - share))).sqrt()
}

/// One read's counts of one column around its brackets.
pub(super) struct Near {
    brackets: Vec<Bracket>,
    counts: Vec<Buffer<u32>>,
    below: Vec<u64>,
    /// Scores that were counted.
    pub total: u64,
    /// Those that are 0.
    pub zeros: u64,
    /// Of each bracket, those keys less its first that are no multiples of what its bins stand for: a few more than
    /// [`MOST_BETWEEN`] of them, and they are too many.
    between: Vec<Vec<u32>>,
}

impl Near {
    pub fn new(brackets: Vec<Bracket>) -> Self {
        let bins = |b: &Bracket| (b.len >> b.shift) as usize + 1;
        let counts = brackets.iter().map(|b| Buffer::zeroed(bins(b))).collect();
        let (below, between) = (vec![0; brackets.len()], vec![Vec::new(); brackets.len()]);
        Self { brackets, counts, below, total: 0, zeros: 0, between }
    }

    /// The keys in bracket `k`, ascending, each with the number of its scores.
    fn keys(&self, k: usize) -> impl Iterator<Item = (u32, u64)> {
        let Bracket { first, shift, .. } = self.brackets[k];
        let mut between = self.between[k].clone();
        between.sort_unstable();
        let mut at = 0;
        self.counts[k].iter().enumerate().flat_map(move |(bin, count)| {
            let start = at;
            at += between[start..].iter().take_while(|offset| (*offset >> shift) as usize == bin).count();
            let groups: Vec<(u32, u64)> = between[start..at]
                .chunk_by(|a, b| a == b)
                .map(|group| (first + group[0], group.len() as u64))
                .collect();
            let own = (*count > 0).then(|| (first + ((bin as u32) << shift), u64::from(*count)));
            own.into_iter().chain(groups)
        })
    }

    /// The statistic at ascending rank `rank`, if it lies in bracket `k`.
    pub fn statistic(&self, k: usize, rank: u64) -> Option<OrderStatistic> {
        let mut below = *self.below.get(k)?;
        if rank < below || self.between[k].len() > MOST_BETWEEN {
            return None;
        }
        for (key, equal) in self.keys(k) {
            if below + equal > rank {
                return Some(OrderStatistic { score: ranked::score(key), below, equal });
            }
            below += equal;
        }
        None
    }

    /// Sum of the `rank` least magnitudes, `found` being the statistic at `rank` or just before it, in bracket `k`.
    pub fn sum_of_least(&self, k: usize, rank: u64, found: OrderStatistic, sums: &[f64]) -> f64 {
        sum_of_least(self.keys(k), rank, found, sums[0] - sums[1 + k])
    }
}

impl Counter for Near {
    fn add_of<const MAGNITUDE: bool>(&mut self, scores: &[f32]) {
        let mut offsets: Offsets = [0; _];
        self.total += scores.len() as u64;
        for scores in scores.chunks(AT_ONCE) {
            if self.brackets.is_empty() {
                self.zeros += u64::from(within::<MAGNITUDE>(scores, 0, 0, &mut offsets).zeros);
            }
            for (k, bracket) in self.brackets.iter().enumerate() {
                let found = within::<MAGNITUDE>(scores, bracket.first, bracket.len, &mut offsets);
                self.below[k] += u64::from(found.below);
                if k == 0 {
                    self.zeros += u64::from(found.zeros);
                }
                let (counts, between) = (&mut self.counts[k], &mut self.between[k]);
                let odd = (1u32 << bracket.shift) - 1;
                for offset in &offsets[..found.inside] {
                    if offset & odd == 0 {
                        counts[(offset >> bracket.shift) as usize] += 1;
                    } else if between.len() <= MOST_BETWEEN {
                        between.push(*offset);
                    }
                }
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        self.total += other.total;
        self.zeros += other.zeros;
        for (own, other) in self.below.iter_mut().zip(&other.below) {
            *own += other;
        }
        for (own, other) in self.between.iter_mut().zip(&other.between) {
            own.extend_from_slice(&other[..other.len().min((MOST_BETWEEN + 1).saturating_sub(own.len()))]);
        }
        for (own, other) in self.counts.iter_mut().zip(&other.counts) {
            for (a, b) in own.iter_mut().zip(other.iter()) {
                *a += b;
            }
        }
    }

    fn sums(&self) -> usize {
        1 + self.brackets.len()
    }

    /// The sums that [`Near::sum_of_least`] takes: of all magnitudes, then of those above each bracket.
    fn add_sums(&self, values: &[f32], sums: &mut [f64]) {
        add_sums_above(values, self.brackets.iter().map(|b| b.first.saturating_add(b.len)), sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::elementwise::order::Scores;

    /// Scores like those of the differences of two models, their clusters of different scale: in f32, or of bf16 values.
    fn differences(count: usize, short: bool) -> Vec<f32> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / 16_777_216.0 - 0.5
        };
        let round = |x: f32| if short { half::bf16::from_f32(x).to_f32() } else { x };
        (0..count)
            .map(|k| {
                let scale = 1.0 + 0.1 * ((k / 4096) % 7) as f32;
                let base = round((0..6).map(|_| next()).sum::<f32>() * 0.05);
                round(base + (0..6).map(|_| next()).sum::<f32>() * 0.004 * scale) - base
            })
            .collect()
    }

    fn sample(scores: &[f32]) -> Vec<u32> {
        let clusters = clusters(scores.len() as u64) as usize;
        let step = scores.len() / clusters;
        let keys = |k: usize| scores[k * step..][..CLUSTER].iter().map(|s| ranked::key::<true>(*s));
        (0..clusters).flat_map(keys).collect()
    }

    #[test]
    fn one_read_selects_what_sorting_does() {
        let mut found = 0;
        for short in [false, true] {
            let scores = differences(LEAST_SCORES as usize * 4 + 77, short);
            let mut sorted: Vec<f32> = scores.iter().map(|s| s.abs()).collect();
            sorted.sort_by(f32::total_cmp);
            let sample = sample(&scores);
            for share in [0.02, 0.3, 0.5, 0.8, 0.99] {
                let Some(bracket) = Bracket::around(share, COLUMN_BINS, &sample, &mut Vec::new()) else {
                    continue;
                };
                // In two parts, as two threads would.
                let cut = 1_000_003;
                let (mut near, mut other) = (Near::new(vec![bracket]), Near::new(vec![bracket]));
                near.add(Scores::Magnitudes(&scores[..cut]));
                other.add(Scores::Magnitudes(&scores[cut..]));
                near.merge(&other);
                assert_eq!(near.total, scores.len() as u64);
                assert_eq!(near.zeros, sorted.iter().filter(|s| **s == 0.0).count() as u64);
                let rank = (share * scores.len() as f64) as u64;
                let statistic = near.statistic(0, rank).expect("five deviations off");
                let want = sorted[rank as usize];
                assert_eq!(statistic.score, want);
                assert_eq!(statistic.below, sorted.iter().filter(|s| **s < want).count() as u64);
                assert_eq!(statistic.equal, sorted.iter().filter(|s| **s == want).count() as u64);
                let mut sums = [0.0; 2];
                near.add_sums(&scores, &mut sums);
                for rank in [rank, rank + 1, statistic.below] {
                    let direct: f64 = sorted[..rank as usize].iter().map(|s| f64::from(*s)).sum();
                    let got = near.sum_of_least(0, rank, statistic, &sums);
                    // Sums of two million positive terms in another order.
                    assert!((got - direct).abs() <= 1e-12 * sums[0], "{got} {direct}");
                }
                found += 1;
            }
        }
        // Only the short values have bits to spare for what this sample can say.
        assert!(found >= 5, "brackets fit for {found} of 10 ranks only");
    }

    #[test]
    fn what_the_sample_did_not_say_is_noticed() {
        let scores = differences(1 << 16, false);
        let bracket = Bracket { first: ranked::key::<true>(0.001) >> 4 << 4, len: 1 << 22, shift: 4 };
        let mut near = Near::new(vec![bracket]);
        near.add(Scores::Magnitudes(&scores[..3000]));
        // Some keys that are no multiples of sixteen.
        let mut sorted: Vec<f32> = scores[..3000].iter().map(|s| s.abs()).collect();
        sorted.sort_by(f32::total_cmp);
        let rank = near.below[0] + 20;
        assert_eq!(near.statistic(0, rank).map(|s| s.score), Some(sorted[rank as usize]));
        assert!(!near.between[0].is_empty());
        // Too many.
        let bracket = Bracket { first: ranked::key::<true>(0.001) >> 4 << 4, len: 1 << 24, shift: 10 };
        let mut near = Near::new(vec![bracket]);
        near.add(Scores::Magnitudes(&scores));
        assert_eq!(near.statistic(0, near.below[0] + 20), None);
        let bracket = Bracket { first: ranked::key::<true>(0.001), len: 1 << 18, shift: 0 };
        let mut near = Near::new(vec![bracket]);
        near.add(Scores::Magnitudes(&scores));
        assert!(near.statistic(0, near.below[0]).is_some());
        assert_eq!(near.statistic(0, near.below[0] - 1), None);
        assert_eq!(near.statistic(0, near.total - 1), None);
    }
}
