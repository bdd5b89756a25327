//! Selects from columns of scores: the statistics of an order pass, and what of a column a trim keeps.
//!
//! A tensor in memory is selected from there. Else a sample tells where the wanted ranks lie, and one read counts what is
//! near them (`near`); where the sample's word does not do, two reads select by halves of the score's bits (`order`). Which
//! way was taken changes no result: the statistics are exact.

use std::ops::Range;

use rayon::prelude::*;

use super::near::{self, Bracket, COLUMN_BINS, Near};
use super::order::{self, Counter, Lower, Upper, Window};
use super::passes::{Found, Known, MOST_RANKS, ModelPasses, Run, STRETCH, Slot, scores_of};
use super::{Counts, Elementwise, Kept, OrderStatistic, Pass};
use crate::kernel::{Threading, ranked};
use crate::merge::MergeError;

/// Clusters that one worker samples at a time.
const SAMPLE_STRETCH: u64 = 32;

/// Sums of one column by the pieces that they are of.
type Sums = Vec<(usize, Vec<f64>)>;

impl Run<'_> {
    /// Counts the scores of all columns into `total`, whose counters `new` makes more of; workers beside the first count on
    /// their own. With `norms`, gives each column's sums, added up in an order that the shape alone decides.
    fn count<C: Counter>(
        &self,
        pass: usize,
        known: &Known,
        total: &mut [C],
        norms: bool,
        new: &(dyn Fn(usize) -> C + Sync),
    ) -> Result<Vec<Sums>, MergeError> {
        let line = self.line(known);
        let columns = total.len();
        let work = |counts: &mut [C], sums: &mut Vec<Sums>, slot: &mut Slot, pieces: Range<usize>| {
            let first = pieces.start;
            let mut own: Vec<Vec<f64>> =
                counts.iter().map(|c| vec![0.0; if norms { c.sums() } else { 0 }]).collect();
            let mut places = self.places(STRETCH, pieces.clone(), slot, known, line.as_ref())?;
            for piece in pieces {
                let (piece, scratch) = self.load(piece, slot, known, &mut places)?;
                for (column, (counts, own)) in counts.iter_mut().zip(&mut own).enumerate() {
                    counts.add(scores_of(&*self.start.method, pass, column, &piece, known, scratch));
                    if norms {
                        counts.add_sums(piece.model(column), own);
                    }
                }
            }
            if norms {
                sums.iter_mut().zip(own).for_each(|(sums, own)| sums.push((first, own)));
            }
            Ok(())
        };
        if self.workers(STRETCH) == 1 {
            let pieces = self.cut.pieces();
            let mut slot = self.slot(if line.is_some() { STRETCH } else { 1 });
            let mut sums = vec![Vec::new(); columns];
            for first in (0..pieces).step_by(STRETCH) {
                work(total, &mut sums, &mut slot, first..(first + STRETCH).min(pieces))?;
            }
            return Ok(sums);
        }
        let parts = self.sweep(
            STRETCH,
            line.as_ref(),
            || ((0..columns).map(new).collect::<Vec<C>>(), vec![Vec::new(); columns]),
            |(counts, sums), slot, pieces| work(counts, sums, slot, pieces),
        )?;
        let mut sums = vec![Vec::new(); columns];
        for (counts, part) in parts {
            total.iter_mut().zip(&counts).for_each(|(total, counts)| total.merge(counts));
            sums.iter_mut().zip(part).for_each(|(sums, mut part): (&mut Sums, _)| sums.append(&mut part));
        }
        sums.iter_mut().for_each(|sums| sums.sort_unstable_by_key(|(first, _)| *first));
        Ok(sums)
    }

    /// Order statistics of a tensor in memory.
    pub(super) fn select(&self, pass: usize, kind: Pass, known: &Known) -> Result<Found, MergeError> {
        let mut slot = self.slot(1);
        let (piece, scratch) = self.load(0, &mut slot, known, &mut None)?;
        let method = &*self.start.method;
        let (Pass::Order { columns } | Pass::Trim { columns, .. }) = kind else {
            return Ok(Found::Sums(Vec::new()));
        };
        let mut keys = Vec::with_capacity(piece.len());
        let mut wanted = Wanted::new(kind, columns);
        for column in 0..columns {
            let scores = scores_of(method, pass, column, &piece, known, scratch);
            let (zeros, elements) = (scores.zeros(), piece.len() as u64);
            let ranks = wanted.ranks(method, pass, column, Counts { elements, nonzero: elements - zeros });
            keys.clear();
            scores.keys_into(&mut keys);
            let found: Vec<_> = ranks.iter().map(|rank| order::select(&mut keys, *rank)).collect();
            wanted.found(column, elements, &found);
            if wanted.norms {
                keys.sort_unstable();
                let least =
                    |rank: u64| keys[..rank as usize].iter().map(|k| f64::from(ranked::score(*k))).sum();
                wanted.measured(column, elements, &found, least(elements), |_, rank| least(rank));
            }
        }
        Ok(wanted.finish())
    }

    /// Clusters of neighbouring scores, as many as is the tensor's share of `of` scores, evenly from its first to its last:
    /// their keys, column by column.
    fn sample(
        &self,
        pass: usize,
        known: &Known,
        clusters: u64,
        of: u64,
        sample: &mut [Vec<u32>],
    ) -> Result<(), MergeError> {
        let elements = self.cut.elements as u64;
        let small = self.cut_into(near::CLUSTER);
        let whole = elements / near::CLUSTER as u64;
        let wanted = (clusters * elements / of).min(whole);
        let columns = sample.len();
        let take = |part: Range<u64>| -> Result<Vec<Vec<u32>>, MergeError> {
            let mut slot = small.slot(1);
            let room = (part.end - part.start) as usize * near::CLUSTER;
            let mut taken: Vec<Vec<u32>> = (0..columns).map(|_| Vec::with_capacity(room)).collect();
            for k in part {
                // In the middle of its part of the tensor.
                let piece = (2 * k + 1) * whole / (2 * wanted);
                let (piece, scratch) = small.load(piece as usize, &mut slot, known, &mut None)?;
                for (column, keys) in taken.iter_mut().enumerate() {
                    scores_of(&*self.start.method, pass, column, &piece, known, scratch).keys_into(keys);
                }
            }
            Ok(taken)
        };
        let part = |k: usize| {
            let first = k as u64 * SAMPLE_STRETCH;
            take(first..(first + SAMPLE_STRETCH).min(wanted))
        };
        let parts = wanted.div_ceil(SAMPLE_STRETCH) as usize;
        let parts: Vec<_> = match self.context.threading {
            Threading::Sequential => (0..parts).map(part).collect(),
            Threading::Parallel => (0..parts).into_par_iter().map(part).collect(),
        };
        for part in parts {
            sample.iter_mut().zip(part?).for_each(|(keys, mut taken)| keys.append(&mut taken));
        }
        Ok(())
    }
}

/// What an order pass asks for, column by column, and what it gets.
struct Wanted {
    kind: Pass,
    norms: bool,
    kept: Vec<Kept>,
    order: Vec<Vec<OrderStatistic>>,
    windows: Vec<Window>,
    measures: Vec<[f64; 2]>,
}

impl Wanted {
    fn new(kind: Pass, columns: usize) -> Self {
        let norms = matches!(kind, Pass::Trim { norms: true, .. });
        Self {
            kind,
            norms,
            kept: vec![Kept::All; columns],
            order: vec![Vec::new(); columns],
            windows: vec![Window::ALL; columns],
            measures: if norms { vec![[0.0; 2]; columns] } else { Vec::new() },
        }
    }

    fn ranks(&mut self, method: &dyn Elementwise, pass: usize, column: usize, counts: Counts) -> Vec<u64> {
        if matches!(self.kind, Pass::Order { .. }) {
            let last = counts.elements.saturating_sub(1);
            let ranks = method.ranks(pass, column, counts);
            debug_assert!(
                ranks.len() as u64 <= MOST_RANKS,
                "memory is planned for {MOST_RANKS} ranks a column"
            );
            return ranks.into_iter().map(|r| r.min(last)).collect();
        }
        self.kept[column] = method.kept(pass, column, counts);
        self.kept[column].ranks(counts.elements).map_or_else(Vec::new, |r| r.to_vec())
    }

    /// Takes the statistics at the ranks of a column.
    fn found(&mut self, column: usize, elements: u64, found: &[OrderStatistic]) {
        if matches!(self.kind, Pass::Trim { .. }) {
            let ends = if let [low, high] = found { Some([*low, *high]) } else { None };
            self.windows[column] = match (self.kept[column], ends) {
                (Kept::All, _) => Window::ALL,
                (_, None) => Window::NOTHING,
                (kept, ends) => kept.window(elements, ends),
            };
        } else {
            self.order[column] = found.to_vec();
        }
    }

    /// Takes a column's norm, and with `least(end, rank)`, the sum of the `rank` least scores by the statistic at one of
    /// its two ends, that of what is kept.
    fn measured(
        &mut self,
        column: usize,
        elements: u64,
        found: &[OrderStatistic],
        all: f64,
        least: impl Fn(usize, u64) -> f64,
    ) {
        let kept = match (self.kept[column].range(elements), found) {
            (Some(range), [low, _]) => {
                // Of equal scores at the lower end, all stay where ties do.
                let start = if self.kept[column].keeps_ties() { low.below } else { range.start };
                let below = if start == 0 { 0.0 } else { least(0, start) };
                let end = if range.end == elements { all } else { least(1, range.end) };
                end - below
            }
            (_, _) if self.kept[column] == Kept::All => all,
            _ => 0.0,
        };
        self.measures[column] = [all, kept];
    }

    fn finish(self) -> Found {
        if matches!(self.kind, Pass::Trim { .. }) {
            Found::Trim(self.windows, self.measures)
        } else {
            Found::Order(self.order)
        }
    }
}

impl ModelPasses<'_> {
    /// What one read, or the two of a pass, counts over all tensors.
    fn count<C: Counter>(
        &self,
        pass: usize,
        known: &Known,
        norms: bool,
        new: &(dyn Fn(usize) -> C + Sync),
        columns: usize,
    ) -> Result<(Vec<C>, Vec<Vec<f64>>), MergeError> {
        let mut total: Vec<C> = (0..columns).map(new).collect();
        let mut sums: Vec<Vec<f64>> = total.iter().map(|c| vec![0.0; c.sums()]).collect();
        for run in &self.runs {
            for (sums, parts) in sums.iter_mut().zip(run.count(pass, known, &mut total, norms, new)?) {
                for (_, part) in parts {
                    sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            }
        }
        Ok((total, sums))
    }

    /// The statistics of a pass over one tensor or all of them.
    pub(super) fn order(
        &self,
        pass: usize,
        kind: Pass,
        columns: usize,
        known: &Known,
    ) -> Result<Found, MergeError> {
        if let Some(brackets) = self.brackets(pass, kind, columns, known)?
            && let Some(found) = self.order_near(pass, kind, known, &brackets)?
        {
            return Ok(found);
        }
        self.order_by_halves(pass, kind, columns, known)
    }

    /// Where a sample sees each column's ranks, if it does.
    fn brackets(
        &self,
        pass: usize,
        kind: Pass,
        columns: usize,
        known: &Known,
    ) -> Result<Option<Vec<Vec<Bracket>>>, MergeError> {
        let method = &*self.runs[0].start.method;
        let elements: u64 = self.runs.iter().map(|run| run.cut.elements as u64).sum();
        // Rows may not be cut into clusters.
        if !(near::LEAST_SCORES..near::MOST_SCORES).contains(&elements) || method.row_length().is_some() {
            return Ok(None);
        }
        let room = near::clusters(elements) as usize * near::CLUSTER;
        let mut sample: Vec<Vec<u32>> = (0..columns).map(|_| Vec::with_capacity(room)).collect();
        for run in &self.runs {
            run.sample(pass, known, near::clusters(elements), elements, &mut sample)?;
        }
        let mut wanted = Wanted::new(kind, columns);
        let mut ranks = Vec::with_capacity(columns);
        for (column, keys) in sample.iter().enumerate() {
            let zeros = order::zero_keys(keys) as f64 / keys.len().max(1) as f64;
            let counts = Counts { elements, nonzero: ((1.0 - zeros) * elements as f64) as u64 };
            let mut own = wanted.ranks(method, pass, column, counts);
            own.dedup();
            ranks.push(own);
        }
        let around = |(keys, ranks): (&Vec<u32>, &Vec<u64>)| -> Option<Vec<Bracket>> {
            let bins = COLUMN_BINS / ranks.len().max(1);
            let mut scratch = Vec::new();
            let share = |rank: &u64| (*rank as f64 + 0.5) / elements as f64;
            ranks.iter().map(|rank| Bracket::around(share(rank), bins, keys, &mut scratch)).collect()
        };
        Ok(match self.runs[0].context.threading {
            Threading::Sequential => sample.iter().zip(&ranks).map(around).collect(),
            Threading::Parallel => sample.par_iter().zip(&ranks).map(around).collect(),
        })
    }

    /// By one read; `None` if a rank was not where the sample saw it.
    fn order_near(
        &self,
        pass: usize,
        kind: Pass,
        known: &Known,
        brackets: &[Vec<Bracket>],
    ) -> Result<Option<Found>, MergeError> {
        let method = &*self.runs[0].start.method;
        let mut wanted = Wanted::new(kind, brackets.len());
        let new = |column: usize| Near::new(brackets[column].clone());
        let (counted, sums) = self.count(pass, known, wanted.norms, &new, brackets.len())?;
        for (column, (near, sums)) in counted.iter().zip(&sums).enumerate() {
            let counts = Counts { elements: near.total, nonzero: near.total - near.zeros };
            let ranks = wanted.ranks(method, pass, column, counts);
            // Each where it is: the sample may have seen two ranks as one.
            let at =
                |rank: u64| (0..brackets[column].len()).find_map(|k| Some((k, near.statistic(k, rank)?)));
            let Some(places) = ranks.iter().map(|rank| at(*rank)).collect::<Option<Vec<_>>>() else {
                return Ok(None);
            };
            let found: Vec<_> = places.iter().map(|(_, statistic)| *statistic).collect();
            wanted.found(column, near.total, &found);
            if wanted.norms {
                let least = |end: usize, rank| near.sum_of_least(places[end].0, rank, found[end], sums);
                wanted.measured(column, near.total, &found, sums[0], least);
            }
        }
        Ok(Some(wanted.finish()))
    }

    /// By two reads.
    fn order_by_halves(
        &self,
        pass: usize,
        kind: Pass,
        columns: usize,
        known: &Known,
    ) -> Result<Found, MergeError> {
        let method = &*self.runs[0].start.method;
        let (upper, _) = self.count(pass, known, false, &|_| Upper::new(), columns)?;
        let mut wanted = Wanted::new(kind, columns);
        let mut places: Vec<Vec<(u64, u16, u64)>> = Vec::with_capacity(columns);
        for (column, upper) in upper.iter().enumerate() {
            let elements = upper.total();
            let ranks =
                wanted.ranks(method, pass, column, Counts { elements, nonzero: elements - upper.zeros });
            let place = |rank: u64| {
                let (bucket, below) = upper.bucket(rank);
                (rank, bucket, below)
            };
            places.push(ranks.into_iter().map(place).collect());
        }
        let elements: Vec<u64> = upper.iter().map(Upper::total).collect();
        drop(upper);
        let (mut lower, mut sums) = (Vec::new(), Vec::new());
        if wanted.norms || places.iter().any(|places| !places.is_empty()) {
            let new =
                |column: usize| Lower::new(places[column].iter().map(|(_, bucket, _)| *bucket).collect());
            (lower, sums) = self.count(pass, known, wanted.norms, &new, columns)?;
        }
        for (column, places) in places.iter().enumerate() {
            let statistic =
                |(rank, bucket, below): &(u64, u16, u64)| lower[column].statistic(*bucket, *below, *rank);
            let found: Vec<_> = places.iter().map(statistic).collect();
            wanted.found(column, elements[column], &found);
            if wanted.norms {
                let (lower, sums) = (&lower[column], &sums[column]);
                let least = |end: usize, rank| lower.sum_of_least(places[end].1, rank, found[end], sums);
                wanted.measured(column, elements[column], &found, sums[0], least);
            }
        }
        Ok(wanted.finish())
    }
}
