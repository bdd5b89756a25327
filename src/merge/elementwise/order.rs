//! Exact order statistics of f32 scores in two reads: radix select over histograms of 16 bits each.
//!
//! Scores are mapped to integers of the same order. The first read counts the upper halves, the second the lower halves in
//! those buckets that hold a wanted rank. Counts are integers, so neither threads nor the cut of the tensor enter.

use crate::kernel::ranked::{AT_ONCE, Offsets, key, score, within};
use crate::kernel::{Buffer, Threading, dispatch, vector};

/// Bins of one histogram, 512 KiB of counts.
const BINS: usize = 1 << 16;
/// Bytes of one histogram.
pub(super) const HISTOGRAM_BYTES: u64 = (BINS * size_of::<u64>()) as u64;

/// One column's scores of a piece.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scores<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// The magnitudes of these values.
    Magnitudes(&'a [f32]),
}

impl Scores<'_> {
    /// How many are 0.
    pub fn zeros(self) -> u64 {
        let (Self::Plain(values) | Self::Magnitudes(values)) = self;
        values.iter().filter(|v| **v == 0.0).count() as u64
    }

    /// Their keys, behind those that are there.
    pub fn keys_into(self, keys: &mut Vec<u32>) {
        match self {
            Self::Plain(scores) => keys.extend(scores.iter().map(|s| key::<false>(*s))),
            Self::Magnitudes(values) => keys.extend(values.iter().map(|v| key::<true>(*v))),
        }
    }
}

/// Keys of scores that are 0, of either sign.
pub(super) fn zero_keys(keys: &[u32]) -> usize {
    keys.iter().filter(|key| **key == 0x8000_0000 || **key == 0x7fff_ffff).count()
}

/// What a read of scores collects of one column.
pub(super) trait Counter: Send + Sync {
    /// Counts scores, or the magnitudes of values.
    fn add_of<const MAGNITUDE: bool>(&mut self, scores: &[f32]);

    /// Adds what another counter of the column has counted.
    fn merge(&mut self, other: &Self);

    /// How many sums it needs beside its counts, where norms are asked for.
    fn sums(&self) -> usize {
        0
    }

    /// Adds what a piece's magnitudes contribute to these sums.
    fn add_sums(&self, _values: &[f32], _sums: &mut [f64]) {}

    /// Counts a piece's scores.
    fn add(&mut self, scores: Scores<'_>) {
        match scores {
            Scores::Plain(scores) => self.add_of::<false>(scores),
            Scores::Magnitudes(values) => self.add_of::<true>(values),
        }
    }
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

    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The bucket of an ascending rank, and how many scores lie below that bucket.
    pub fn bucket(&self, rank: u64) -> (u16, u64) {
        let (bin, below) = find(self.counts.iter().copied(), rank).expect("a rank of what was counted");
        (bin as u16, below)
    }
}

impl Counter for Upper {
    fn add_of<const MAGNITUDE: bool>(&mut self, scores: &[f32]) {
        let counts: &mut [u64; BINS] = (&mut self.counts[..BINS]).try_into().expect("as many as were made");
        // Keys first, by vectors: what is left to do one by one is the counting alone.
        let mut bins = [0u16; AT_ONCE];
        for scores in scores.chunks(AT_ONCE) {
            let bins = &mut bins[..scores.len()];
            self.zeros += dispatch(
                #[inline(always)]
                || {
                    let mut zeros = 0u32;
                    for (bin, score) in bins.iter_mut().zip(scores) {
                        *bin = (key::<MAGNITUDE>(*score) >> 16) as u16;
                        zeros += u32::from(*score == 0.0);
                    }
                    u64::from(zeros)
                },
            );
            for bin in &*bins {
                counts[usize::from(*bin)] += 1;
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        self.zeros += other.zeros;
        for (a, b) in self.counts.iter_mut().zip(other.counts.iter()) {
            *a += b;
        }
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

    /// The statistic at ascending rank `rank`, which lies in `bucket` with `below` scores before that.
    pub fn statistic(&self, bucket: u16, below: u64, rank: u64) -> OrderStatistic {
        let counts = &self.counts[self.place(bucket)];
        let (low, within) =
            find(counts.iter().copied(), rank - below).expect("counted because a rank lies in it");
        OrderStatistic {
            score: score(u32::from(bucket) << 16 | low as u32),
            below: below + within,
            equal: counts[low],
        }
    }

    /// Sum of the `rank` least magnitudes, `found` being the statistic at `rank` or just before it, in `bucket`.
    pub fn sum_of_least(&self, bucket: u16, rank: u64, found: OrderStatistic, sums: &[f64]) -> f64 {
        let place = self.place(bucket);
        let bins = self.counts[place].iter().enumerate();
        let keys = bins.map(|(bin, count)| (u32::from(bucket) << 16 | bin as u32, *count));
        sum_of_least(keys, rank, found, sums[0] - sums[1 + place])
    }

    fn place(&self, bucket: u16) -> usize {
        self.buckets.binary_search(&bucket).expect("of those it was made for")
    }
}

impl Counter for Lower {
    fn add_of<const MAGNITUDE: bool>(&mut self, scores: &[f32]) {
        let mut offsets: Offsets = [0; _];
        for (bucket, counts) in self.buckets.iter().zip(&mut self.counts) {
            let bucket = u32::from(*bucket);
            let counts: &mut [u64; BINS] = (&mut counts[..BINS]).try_into().expect("as many as were made");
            for scores in scores.chunks(AT_ONCE) {
                let found = within::<MAGNITUDE>(scores, bucket << 16, 1 << 16, &mut offsets);
                for offset in &offsets[..found.inside] {
                    counts[(offset & 0xffff) as usize] += 1;
                }
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        for (own, other) in self.counts.iter_mut().zip(&other.counts) {
            for (a, b) in own.iter_mut().zip(other.iter()) {
                *a += b;
            }
        }
    }

    fn sums(&self) -> usize {
        1 + self.buckets.len()
    }

    /// The sums that [`Lower::sum_of_least`] takes: of all magnitudes, then of those above each bucket.
    fn add_sums(&self, values: &[f32], sums: &mut [f64]) {
        // No number has a key in the last bucket.
        let end = |bucket: &u16| bucket.checked_add(1).map_or(u32::MAX, |next| u32::from(next) << 16);
        let ends = self.buckets.iter().map(end);
        add_sums_above(values, ends, sums);
    }
}

/// The bin of a rank, and the sum of the bins before it; `None` where there are not that many.
fn find(counts: impl Iterator<Item = u64>, rank: u64) -> Option<(usize, u64)> {
    let mut below = 0;
    for (bin, count) in counts.enumerate() {
        if below + count > rank {
            return Some((bin, below));
        }
        below += count;
    }
    None
}

/// Adds the sum of all magnitudes to the first sum, and of those whose keys are `ends[k]` or more to the one after `k`.
pub(super) fn add_sums_above(values: &[f32], ends: impl Iterator<Item = u32>, sums: &mut [f64]) {
    sums[0] += vector::sum_of_magnitudes(values, Threading::Sequential);
    let mut above = [0.0f32; AT_ONCE];
    for (end, sum) in ends.zip(&mut sums[1..]) {
        for values in values.chunks(AT_ONCE) {
            let above = &mut above[..values.len()];
            dispatch(
                #[inline(always)]
                || {
                    for (above, value) in above.iter_mut().zip(values) {
                        *above = if key::<true>(*value) >= end { *value } else { 0.0 };
                    }
                },
            );
            *sum += vector::sum_of_magnitudes(above, Threading::Sequential);
        }
    }
}

/// Sum of the `rank` least magnitudes: `sum`, of what lies in and below some keys, less those of the keys that come after
/// `found`, the statistic at `rank` or just before it, and less those equal to it that come later. `keys`: with their counts.
pub(super) fn sum_of_least(
    keys: impl Iterator<Item = (u32, u64)>,
    rank: u64,
    found: OrderStatistic,
    sum: f64,
) -> f64 {
    let own = key::<true>(found.score);
    // Some keys that no score has stand for no number.
    let after = keys.filter(|(key, count)| *key > own && *count > 0);
    let above: f64 = after.map(|(key, count)| count as f64 * f64::from(score(key))).sum();
    sum - above - (found.below + found.equal - rank) as f64 * f64::from(found.score)
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
    /// Whether nothing is cut off above, and below: an end that needs no selection.
    fn open(self, n: u64) -> [bool; 2] {
        match self {
            Self::All => [true, true],
            Self::Nothing => [false, false],
            Self::FromLargest { skip, take } => [skip == 0, skip.saturating_add(take) >= n],
            Self::FromSmallest { skip, take } => [skip.saturating_add(take) >= n, skip == 0],
            Self::AtLeast { take } => [true, take >= n],
        }
    }

    /// Ascending places that are kept among `n` sorted scores, ties aside. `None` where nothing needs to be selected.
    pub(super) fn range(self, n: u64) -> Option<std::ops::Range<u64>> {
        let range = match self {
            Self::All | Self::Nothing => return None,
            Self::FromLargest { skip, take } => {
                n.saturating_sub(skip.saturating_add(take))..n.saturating_sub(skip)
            }
            Self::FromSmallest { skip, take } => skip.min(n)..skip.saturating_add(take).min(n),
            Self::AtLeast { take } => n.saturating_sub(take)..n,
        };
        (!range.is_empty()).then_some(range)
    }

    /// Whether all scores that equal the least one stay.
    pub(super) fn keeps_ties(self) -> bool {
        matches!(self, Self::AtLeast { .. })
    }

    /// Ranks of its ends among `n` scores, the least first; an open end has the other's rank. `None` where nothing needs to
    /// be selected.
    pub(super) fn ranks(self, n: u64) -> Option<[u64; 2]> {
        let range = self.range(n)?;
        Some(match self.open(n) {
            [true, _] => [range.start; 2],
            [_, true] => [range.end - 1; 2],
            _ => [range.start, range.end - 1],
        })
    }

    /// The window between the statistics at [`Kept::ranks`].
    pub(super) fn window(self, n: u64, ends: Option<[OrderStatistic; 2]>) -> Window {
        let Some([low, high]) = ends else {
            return if self == Self::All { Window::ALL } else { Window::NOTHING };
        };
        let [open_above, open_below] = self.open(n);
        if open_above && open_below {
            return Window::ALL;
        }
        // Equal scores that are kept, by their place among the equal ones in the tensor's order.
        let (low_range, high_range) = match self {
            Self::All | Self::Nothing => return Window::ALL,
            Self::AtLeast { .. } => (0..low.equal, 0..high.equal),
            Self::FromSmallest { skip, take } => {
                let end = skip.saturating_add(take).min(n);
                (skip.saturating_sub(low.below)..low.equal, 0..end.saturating_sub(high.below))
            }
            Self::FromLargest { skip, take } => {
                let above = |s: OrderStatistic| n - s.below - s.equal;
                let end = skip.saturating_add(take).min(n);
                (0..end.saturating_sub(above(low)), skip.saturating_sub(above(high))..high.equal)
            }
        };
        let closed = !open_above && !open_below;
        let (low_range, high_range) = if closed && low.score == high.score {
            let both = low_range.start.max(high_range.start)..low_range.end.min(high_range.end);
            (both.clone(), both)
        } else {
            (low_range.start..low_range.end.min(low.equal), high_range.start..high_range.end.min(high.equal))
        };
        let partial =
            |s: OrderStatistic, r: &std::ops::Range<u64>| s.score != 0.0 && (r.start > 0 || r.end < s.equal);
        let mut window = Window::ALL;
        if !open_below {
            window.low = key::<false>(low.score);
            window.low_range = [low_range.start, low_range.end];
            window.in_order |= partial(low, &low_range);
        }
        if !open_above {
            window.high = key::<false>(high.score);
            window.high_range = [high_range.start, high_range.end];
            window.in_order |= partial(high, &high_range);
        }
        window
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
    pub fn equals(&self, scores: Scores<'_>) -> [u64; 2] {
        match scores {
            Scores::Plain(scores) => self.equals_of::<false>(scores),
            Scores::Magnitudes(values) => self.equals_of::<true>(values),
        }
    }

    fn equals_of<const MAGNITUDE: bool>(&self, scores: &[f32]) -> [u64; 2] {
        let (low, high) = (self.low, self.high);
        let [mut lows, mut highs] = [0u64; 2];
        for scores in scores.chunks(AT_ONCE) {
            let found = dispatch(
                #[inline(always)]
                || {
                    let (mut lows, mut highs) = (0u32, 0u32);
                    for score in scores {
                        let key = key::<MAGNITUDE>(*score);
                        lows += u32::from(key == low);
                        highs += u32::from(key == high);
                    }
                    [lows, highs]
                },
            );
            lows += u64::from(found[0]);
            highs += u64::from(found[1]);
        }
        [lows, highs]
    }

    /// Sets what is not kept to 0, by the values' `scores`, or by their own magnitudes. `before` are the equal scores in
    /// earlier pieces, `own` those in this one; both are asked for only where they must be counted in order.
    pub fn apply(&self, scores: Option<&[f32]>, before: [u64; 2], own: [u64; 2], values: &mut [f32]) {
        // One piece of a tensor has equal scores of which some stay and some go: all others are like the first of theirs.
        let one = |range: [u64; 2], before: u64, own: u64| {
            let all = range[0] <= before && before + own <= range[1];
            let none = before + own <= range[0] || range[1] <= before;
            if all { Some(true) } else { none.then_some(false) }
        };
        let keep = if self.in_order {
            [one(self.low_range, before[0], own[0]), one(self.high_range, before[1], own[1])]
        } else {
            [self.low_range, self.high_range].map(|range| Some(range[1] > range[0]))
        };
        match (keep, scores) {
            ([Some(low), Some(high)], None) => {
                let [low, high] = self.between(low, high);
                dispatch(
                    #[inline(always)]
                    || {
                        values
                            .iter_mut()
                            .for_each(|value| keep_between(low, high, key::<true>(*value), value))
                    },
                );
            }
            ([Some(low), Some(high)], Some(scores)) => {
                let [low, high] = self.between(low, high);
                dispatch(
                    #[inline(always)]
                    || {
                        for (value, score) in values.iter_mut().zip(scores) {
                            keep_between(low, high, key::<false>(*score), value);
                        }
                    },
                );
            }
            (_, None) => {
                let mut keeps = self.in_order(before);
                values
                    .iter_mut()
                    .for_each(|value| *value = if keeps(key::<true>(*value)) { *value } else { 0.0 });
            }
            (_, Some(scores)) => {
                let mut keeps = self.in_order(before);
                for (value, score) in values.iter_mut().zip(scores) {
                    *value = if keeps(key::<false>(*score)) { *value } else { 0.0 };
                }
            }
        }
    }

    /// First and last key that is kept, all equal scores of an end alike; none where the first is the greater.
    fn between(&self, keep_low: bool, keep_high: bool) -> [u32; 2] {
        let low = if keep_low { Some(self.low) } else { self.low.checked_add(1) };
        let high = if keep_high { Some(self.high) } else { self.high.checked_sub(1) };
        low.zip(high).map_or([u32::MAX, 0], |(low, high)| [low, high])
    }

    /// Whether a key is kept, asked for one after the other: the equal scores of an end are counted.
    fn in_order(&self, before: [u64; 2]) -> impl FnMut(u32) -> bool {
        let Self { low, high, low_range, high_range, .. } = *self;
        let [mut low_place, mut high_place] = before;
        move |key| {
            if key == high {
                high_place += 1;
                (high_range[0]..high_range[1]).contains(&(high_place - 1))
            } else if key == low {
                low_place += 1;
                (low_range[0]..low_range[1]).contains(&(low_place - 1))
            } else {
                key > low && key < high
            }
        }
    }
}

#[inline(always)]
fn keep_between(low: u32, high: u32, key: u32, value: &mut f32) {
    *value = if (key >= low) & (key <= high) { *value } else { 0.0 };
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
    fn histograms_select_what_sorting_does() {
        for levels in [2, 50, 1 << 31] {
            let scores = scores(5000, levels);
            let mut sorted = scores.clone();
            sorted.sort_by(f32::total_cmp);
            // Counted in two parts, as two threads would.
            let (mut upper, mut other) = (Upper::new(), Upper::new());
            upper.add(Scores::Plain(&scores[..1234]));
            other.add(Scores::Plain(&scores[1234..]));
            upper.merge(&other);
            assert_eq!(upper.total(), 5000);
            assert_eq!(upper.zeros, scores.iter().filter(|s| **s == 0.0).count() as u64);
            for rank in [0, 1, 2499, 4998, 4999] {
                let (bucket, below) = upper.bucket(rank);
                let (mut lower, mut other) = (Lower::new(vec![bucket]), Lower::new(vec![bucket]));
                lower.add(Scores::Plain(&scores[..777]));
                other.add(Scores::Plain(&scores[777..]));
                lower.merge(&other);
                let found = lower.statistic(bucket, below, rank);
                let want = sorted[rank as usize];
                assert_eq!(found.score, want);
                assert_eq!(found.below, sorted.iter().filter(|s| **s < want).count() as u64);
                assert_eq!(found.equal, sorted.iter().filter(|s| **s == want).count() as u64);
                let mut keys: Vec<u32> = scores.iter().map(|s| key::<false>(*s)).collect();
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
                        let mut keys: Vec<u32> = scores.iter().map(|s| key::<false>(*s)).collect();
                        let ends = kept.ranks(count).map(|ranks| ranks.map(|r| select(&mut keys, r)));
                        let window = kept.window(count, ends);
                        let mut values = vec![1.0; n];
                        // In two pieces.
                        let cut = n / 2;
                        let before = window.equals(Scores::Plain(&scores[..cut]));
                        window.apply(Some(&scores[..cut]), [0, 0], before, &mut values[..cut]);
                        let own = window.equals(Scores::Plain(&scores[cut..]));
                        window.apply(Some(&scores[cut..]), before, own, &mut values[cut..]);
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
