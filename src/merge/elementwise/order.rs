//! Exact order statistics of f32 scores in two reads: radix select over histograms of 16 bits each.
//!
//! Scores are mapped to integers of the same order. The first read counts the upper halves, the second the lower halves in
//! those buckets that hold a wanted rank. Counts are integers, so neither threads nor the cut of the tensor enter.

use crate::kernel::{Buffer, vector};

/// Bins of one histogram, 512 KiB of counts.
const BINS: usize = 1 << 16;

/// Bytes of one histogram.
pub(super) const HISTOGRAM_BYTES: u64 = (BINS * size_of::<u64>()) as u64;

/// An integer that orders as the score does; -0 comes before 0, NaN of either sign at its end.
#[inline(always)]
pub(super) fn key(score: f32) -> u32 {
    let bits = score.to_bits();
    // All bits of a negative one, the sign of a positive one.
    bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000)
}

fn score(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 == 0 { !key } else { key & 0x7fff_ffff })
}

/// One order statistic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OrderStatistic {
    /// The score at the wanted rank.
    pub score: f32,
    /// Scores that are less.
    pub below: u64,
    /// Scores that are the same, itself included.
    pub equal: u64,
}

/// The first read's counts of one column of scores.
pub(super) struct Upper {
    counts: Buffer<u64>,
    /// Scores that are 0.
    pub zeros: u64,
}

impl Upper {
    pub fn new() -> Self {
        Self { counts: Buffer::zeroed(BINS), zeros: 0 }
    }

    pub fn add(&mut self, scores: &[f32]) {
        let counts = &mut self.counts[..BINS];
        for score in scores {
            counts[(key(*score) >> 16) as usize] += 1;
        }
        self.zeros += scores.iter().filter(|s| **s == 0.0).count() as u64;
    }

    pub fn merge(&mut self, other: &Self) {
        self.zeros += other.zeros;
        for (a, b) in self.counts.iter_mut().zip(other.counts.iter()) {
            *a += b;
        }
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The bucket of an ascending rank, and how many scores lie below that bucket.
    pub fn bucket(&self, rank: u64) -> (u16, u64) {
        find(&self.counts, rank)
    }
}

/// The second read's counts of one column: one histogram a wanted bucket.
pub(super) struct Lower {
    /// Ascending, each once.
    buckets: Vec<u16>,
    counts: Vec<Buffer<u64>>,
}

impl Lower {
    pub fn new(mut buckets: Vec<u16>) -> Self {
        buckets.sort_unstable();
        buckets.dedup();
        let counts = buckets.iter().map(|_| Buffer::zeroed(BINS)).collect();
        Self { buckets, counts }
    }

    pub fn add(&mut self, scores: &[f32]) {
        for (bucket, counts) in self.buckets.iter().zip(&mut self.counts) {
            let (bucket, counts) = (u32::from(*bucket), &mut counts[..BINS]);
            // Few are in the bucket: eight at a time are asked at once.
            for group in scores.chunks(16) {
                let mut any = false;
                for score in group {
                    any |= key(*score) >> 16 == bucket;
                }
                if any {
                    for score in group {
                        let key = key(*score);
                        if key >> 16 == bucket {
                            counts[(key & 0xffff) as usize] += 1;
                        }
                    }
                }
            }
        }
    }

    pub fn merge(&mut self, other: &Self) {
        for (own, other) in self.counts.iter_mut().zip(&other.counts) {
            for (a, b) in own.iter_mut().zip(other.iter()) {
                *a += b;
            }
        }
    }

    /// The statistic at ascending rank `rank`, which lies in `bucket` with `below` scores before that.
    pub fn statistic(&self, bucket: u16, below: u64, rank: u64) -> OrderStatistic {
        let at = self.buckets.binary_search(&bucket).expect("counted because a rank lies in it");
        let counts = &self.counts[at];
        let (low, within) = find(counts, rank - below);
        OrderStatistic {
            score: score(u32::from(bucket) << 16 | u32::from(low)),
            below: below + within,
            equal: counts[usize::from(low)],
        }
    }
}

/// The bin of a rank, and the sum of the bins before it.
fn find(counts: &[u64], rank: u64) -> (u16, u64) {
    let mut below = 0;
    for (bin, count) in counts.iter().enumerate() {
        if below + count > rank {
            return (bin as u16, below);
        }
        below += count;
    }
    unreachable!("a rank is less than the number of scores")
}

/// The statistic at ascending rank `rank` of scores in memory; they are reordered.
pub(super) fn select(keys: &mut [u32], rank: u64) -> OrderStatistic {
    let (_, found, _) = keys.select_nth_unstable(rank as usize);
    let found = *found;
    let below = keys.iter().filter(|k| **k < found).count() as u64;
    let equal = keys.iter().filter(|k| **k == found).count() as u64;
    OrderStatistic { score: score(found), below, equal }
}

/// Which scores of a column are kept: a stretch of their sorted order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// All of them.
    All,
    /// None.
    Nothing,
    /// Places `skip..skip + take` from the largest down; of equal scores the first in the tensor comes first.
    FromLargest {
        /// Largest ones left out.
        skip: u64,
        /// How many are kept.
        take: u64,
    },
    /// Places `skip..skip + take` from the smallest up; of equal scores the first in the tensor comes first.
    FromSmallest {
        /// Smallest ones left out.
        skip: u64,
        /// How many are kept.
        take: u64,
    },
    /// The `take` largest and all that equal the least of them.
    AtLeast {
        /// How many, ties aside.
        take: u64,
    },
}

impl Kept {
    /// Ascending ranks of its two ends among `n` scores, the least first; none where nothing needs to be selected.
    pub(super) fn ranks(self, n: u64) -> Option<[u64; 2]> {
        let range = match self {
            Self::All | Self::Nothing => return None,
            Self::FromLargest { skip, take } => {
                n.saturating_sub(skip.saturating_add(take))..n.saturating_sub(skip)
            }
            Self::FromSmallest { skip, take } => skip.min(n)..skip.saturating_add(take).min(n),
            Self::AtLeast { take } => n.saturating_sub(take)..n,
        };
        (!range.is_empty()).then(|| [range.start, range.end - 1])
    }

    /// The window between the statistics at [`Kept::ranks`].
    pub(super) fn window(self, n: u64, ends: Option<[OrderStatistic; 2]>) -> Window {
        let Some([low, high]) = ends else {
            return if self == Self::All { Window::ALL } else { Window::NOTHING };
        };
        // Equal scores that are kept, by their place among the equal ones in the tensor's order.
        let (low_range, high_range) = match self {
            Self::All | Self::Nothing => return Window::ALL,
            Self::AtLeast { .. } => (0..low.equal, 0..high.equal),
            Self::FromSmallest { skip, take } => {
                let end = skip.saturating_add(take).min(n);
                (skip - low.below..low.equal, 0..end - high.below)
            }
            Self::FromLargest { skip, take } => {
                let above = |s: OrderStatistic| n - s.below - s.equal;
                let end = skip.saturating_add(take).min(n);
                (0..end - above(low), skip - above(high)..high.equal)
            }
        };
        let (low_range, high_range) = if low.score == high.score {
            let both = low_range.start.max(high_range.start)..low_range.end.min(high_range.end);
            (both.clone(), both)
        } else {
            (low_range.start..low_range.end.min(low.equal), high_range.start..high_range.end.min(high.equal))
        };
        let partial = |s: OrderStatistic, r: &std::ops::Range<u64>| r.start > 0 || r.end < s.equal;
        Window {
            low: key(low.score),
            high: key(high.score),
            in_order: (partial(low, &low_range) && low.score != 0.0)
                || (partial(high, &high_range) && high.score != 0.0),
            low_range: [low_range.start, low_range.end],
            high_range: [high_range.start, high_range.end],
        }
    }
}

/// What of one column is kept, as keys and, among scores that equal an end, as places in the tensor's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    low: u32,
    high: u32,
    low_range: [u64; 2],
    high_range: [u64; 2],
    /// Whether equal scores must be counted from the tensor's start on. Not where they are 0: a task vector's zero is
    /// the same kept or dropped.
    pub in_order: bool,
}

impl Window {
    pub const ALL: Self =
        Self { low: 0, high: u32::MAX, low_range: [0, u64::MAX], high_range: [0, u64::MAX], in_order: false };
    pub const NOTHING: Self =
        Self { low: u32::MAX, high: 0, low_range: [0, 0], high_range: [0, 0], in_order: false };

    pub fn keeps_all(&self) -> bool {
        *self == Self::ALL
    }

    /// Scores that equal its low and its high end.
    pub fn equals(&self, scores: &[f32]) -> [u64; 2] {
        let count = |end: u32| scores.iter().filter(|s| key(**s) == end).count() as u64;
        [count(self.low), count(self.high)]
    }

    /// Sets what is not kept to 0. `before` are the equal scores in earlier pieces.
    pub fn apply(&self, scores: &[f32], before: [u64; 2], values: &mut [f32]) {
        if !self.in_order {
            let (low, high) = (self.low, self.high);
            vector::dispatch(
                #[inline(always)]
                || {
                    for (value, score) in values.iter_mut().zip(scores) {
                        let key = key(*score);
                        *value = if (key >= low) & (key <= high) { *value } else { 0.0 };
                    }
                },
            );
            return;
        }
        let [mut low_place, mut high_place] = before;
        for (value, score) in values.iter_mut().zip(scores) {
            let key = key(*score);
            let keep = if key == self.high {
                high_place += 1;
                (self.high_range[0]..self.high_range[1]).contains(&(high_place - 1))
            } else if key == self.low {
                low_place += 1;
                (self.low_range[0]..self.low_range[1]).contains(&(low_place - 1))
            } else {
                key > self.low && key < self.high
            };
            if !keep {
                *value = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(n: usize, levels: u64) -> Vec<f32> {
        let mut state = 1u64;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let v = (state >> 33) % levels;
                (v as f32 - levels as f32 / 2.0) * 0.37
            })
            .collect()
    }

    #[test]
    fn keys_order_as_scores() {
        let values = [f32::NEG_INFINITY, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, f32::MAX, f32::INFINITY];
        for pair in values.windows(2) {
            assert!(key(pair[0]) < key(pair[1]), "{pair:?}");
        }
        for v in values {
            assert_eq!(score(key(v)).to_bits(), v.to_bits());
        }
    }

    #[test]
    fn histograms_select_what_sorting_does() {
        for levels in [2, 50, 1 << 31] {
            let scores = scores(5000, levels);
            let mut sorted = scores.clone();
            sorted.sort_by(f32::total_cmp);
            // Counted in two parts, as two threads would.
            let (mut upper, mut other) = (Upper::new(), Upper::new());
            upper.add(&scores[..1234]);
            other.add(&scores[1234..]);
            upper.merge(&other);
            assert_eq!(upper.total(), 5000);
            assert_eq!(upper.zeros, scores.iter().filter(|s| **s == 0.0).count() as u64);
            for rank in [0, 1, 2499, 4998, 4999] {
                let (bucket, below) = upper.bucket(rank);
                let (mut lower, mut other) = (Lower::new(vec![bucket]), Lower::new(vec![bucket]));
                lower.add(&scores[..777]);
                other.add(&scores[777..]);
                lower.merge(&other);
                let found = lower.statistic(bucket, below, rank);
                let want = sorted[rank as usize];
                assert_eq!(found.score, want);
                assert_eq!(found.below, sorted.iter().filter(|s| **s < want).count() as u64);
                assert_eq!(found.equal, sorted.iter().filter(|s| **s == want).count() as u64);
                let mut keys: Vec<u32> = scores.iter().map(|s| key(*s)).collect();
                assert_eq!(select(&mut keys, rank), found);
            }
        }
    }

    #[test]
    fn windows_keep_what_a_stable_sort_keeps() {
        for (n, levels) in [(1, 3), (7, 2), (300, 5), (300, 1 << 31)] {
            let scores = scores(n, levels);
            let count = n as u64;
            for skip in [0, 1, 3, count / 3] {
                for take in [0, 1, 2, count / 2, count] {
                    for (kept, descending) in
                        [(Kept::FromLargest { skip, take }, true), (Kept::FromSmallest { skip, take }, false)]
                    {
                        let mut order: Vec<usize> = (0..n).collect();
                        order.sort_by(|a, b| {
                            let ordering = scores[*a].total_cmp(&scores[*b]);
                            if descending { ordering.reverse() } else { ordering }
                        });
                        let mut want: Vec<usize> =
                            order.into_iter().skip(skip as usize).take(take as usize).collect();
                        want.sort_unstable();
                        let mut keys: Vec<u32> = scores.iter().map(|s| key(*s)).collect();
                        let ends = kept.ranks(count).map(|ranks| ranks.map(|r| select(&mut keys, r)));
                        let window = kept.window(count, ends);
                        let mut values = vec![1.0; n];
                        // In two pieces.
                        let cut = n / 2;
                        window.apply(&scores[..cut], [0, 0], &mut values[..cut]);
                        let before = window.equals(&scores[..cut]);
                        window.apply(&scores[cut..], before, &mut values[cut..]);
                        let got: Vec<usize> =
                            (0..n).filter(|i| values[*i] != 0.0 && scores[*i] != 0.0).collect();
                        want.retain(|i| scores[*i] != 0.0);
                        // How many zeros are kept is not counted.
                        assert_eq!(got, want, "{kept:?} {n} {levels}");
                    }
                }
            }
        }
    }
}
