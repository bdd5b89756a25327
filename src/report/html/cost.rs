//! Where time, bytes and memory went: in all, and for the largest blocks.

use maud::{Markup, html};

use super::{Block, show};
use crate::report::json::{ParameterReport, RunReport};
use crate::report::units::{Bytes, Flops};

/// Blocks in the list of the largest.
const LARGEST: usize = 12;

/// Seconds of a block by what they were spent on. Unknown parts are in `rest`.
#[derive(Clone, Copy, Default)]
pub(super) struct Phases {
    pub(super) setup: f64,
    pub(super) solve: f64,
    pub(super) rest: f64,
}

impl Phases {
    /// What is not finite or not positive counts as nothing; parts never pass the block's own time.
    pub(super) fn of(record: &ParameterReport) -> Self {
        let positive = |x: f64| if x.is_finite() { x.max(0.0) } else { 0.0 };
        let total = positive(record.seconds);
        let setup = positive(record.setup.map_or(0.0, |s| s.seconds)).min(total);
        let solve = positive(record.solve_seconds.unwrap_or(0.0)).min(total - setup);
        Self { setup, solve, rest: total - setup - solve }
    }

    pub(super) fn total(self) -> f64 {
        self.setup + self.solve + self.rest
    }

    /// The bar of these parts where `whole` seconds are its full length.
    pub(super) fn bar(self, whole: f64) -> Markup {
        show::bar(&[
            (self.setup / whole, "setup"),
            (self.solve / whole, "solve"),
            (self.rest / whole, "rest"),
        ])
    }
}

pub(super) fn section(report: &RunReport, blocks: &[Block]) -> Markup {
    let mut all = Phases::default();
    for phases in blocks.iter().map(|b| Phases::of(b.record)) {
        all.setup += phases.setup;
        all.solve += phases.solve;
        all.rest += phases.rest;
    }
    let setups = blocks.iter().any(|b| b.record.setup.is_some());
    let solves = blocks.iter().any(|b| b.record.solve_seconds.is_some());
    html! {
        section id="cost" {
            h2 { "Where time, bytes and memory went" }
            h3 { "Time" }
            div.large { (all.bar(all.total())) }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "phase" } th.num scope="col" { "time" } th.num scope="col" { "share" }
                    th scope="col" { "what it is" }
                } }
                tbody {
                    @if setups {
                        (phase("setup", all.setup, all.total(),
                            "factorisations and preconditioners, what they read included"))
                    }
                    @if solves {
                        (phase("solve", all.solve, all.total(), "the steps of the last round, or its direct solve"))
                    }
                    (phase("rest", all.rest, all.total(), if solves {
                        "reading, earlier rounds, right-hand sides, the final check, elementwise work"
                    } else {
                        "not told apart: no block has times of its phases"
                    }))
                }
            } }
            p.note {
                "Summed over blocks: " (show::seconds(Some(all.total()))) " in "
                (show::seconds(Some(report.wall_seconds))) " of wall time, since blocks are worked on side by side."
            }
            h3 { "Memory" }
            (memory(report, blocks))
            (largest(blocks))
        }
    }
}

fn phase(name: &str, seconds: f64, total: f64, what: &str) -> Markup {
    html! { tr {
        th scope="row" { span class={ "key " (name) } {} "\u{a0}" (name) }
        td.num { (show::seconds(Some(seconds))) }
        td.num { @if total > 0.0 { (format!("{:.0} %", 100.0 * seconds / total)) } @else { (show::absent()) } }
        td { (what) }
    } }
}

fn memory(report: &RunReport, blocks: &[Block]) -> Markup {
    let bound = report.settings.max_memory;
    let held =
        blocks.iter().filter_map(|b| Some((b.record.setup?.bytes, b.name))).max_by_key(|(bytes, _)| *bytes);
    let whole = [bound, report.peak_anonymous_bytes.unwrap_or(0), report.peak_rss_bytes.unwrap_or(0)]
        .into_iter()
        .max();
    let whole = whole.unwrap_or(0).max(1) as f64;
    let row = |label: &str, bytes: Option<u64>, what: &Markup| {
        let over = label == "peak, anonymous and shared" && bytes.is_some_and(|b| bound > 0 && b > bound);
        html! { tr {
            th scope="row" { (label) }
            td.num { span.bad[over] { (show::bytes(bytes)) } }
            td.bars { (show::bar(&[(bytes.unwrap_or(0) as f64 / whole, if over { "over" } else { "solve" })])) }
            td { (what) }
        } }
    };
    html! { div.scroll { table {
        thead { tr {
            th scope="col" { "memory" } th.num scope="col" { "bytes" } th scope="col" { "to scale" }
            th scope="col" { "what it is" }
        } }
        tbody {
            (row("bound", (bound > 0).then_some(bound), &html! { "--max-memory" }))
            (row("peak, anonymous and shared", report.peak_anonymous_bytes, &html! { "what the bound is for" }))
            (row("peak, resident", report.peak_rss_bytes, &html! {
                "with pages of mapped inputs, which the system takes back when it needs them"
            }))
            @if let Some((bytes, name)) = held {
                (row("largest preconditioner", Some(bytes), &show::name(name)))
            }
        }
    } } }
}

fn largest(blocks: &[Block]) -> Markup {
    let shown = &blocks[..blocks.len().min(LARGEST)];
    let total: f64 = blocks.iter().map(|b| Phases::of(b.record).total()).sum();
    let setups = shown.iter().any(|b| b.record.setup.is_some());
    let theirs: f64 = shown.iter().map(|b| Phases::of(b.record).total()).sum();
    let whole = shown.iter().map(|b| Phases::of(b.record).total()).fold(0.0, f64::max);
    html! {
        @if !shown.is_empty() {
            h3 { "Largest blocks" }
            p.note {
                "The " (shown.len()) " that took longest"
                @if total > 0.0 { ": " (format!("{:.0} %", 100.0 * theirs / total)) " of the time of all" }
                "."
            }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "block" }
                    th scope="col" {
                        span.key.setup {} "\u{a0}setup " span.key.solve {} "\u{a0}solve " span.key.rest {} "\u{a0}rest"
                    }
                    th.num scope="col" { "time" }
                    th.num scope="col" { "read" }
                    @if setups {
                        th.num scope="col" { "setup holds" }
                        th.num scope="col" { "setup work" }
                    }
                } }
                tbody { @for (row, block) in shown.iter().enumerate() {
                    tr {
                        th scope="row" { a href={ "#b" (row) } { (show::name(block.name)) } }
                        td.bars { (Phases::of(block.record).bar(whole)) }
                        td.num { (show::seconds(Some(block.record.seconds))) }
                        td.num { (Bytes(block.record.bytes_read).to_string()) }
                        @if setups {
                            td.num { (show::bytes(block.record.setup.map(|s| s.bytes))) }
                            td.num { @match block.record.setup {
                                Some(setup) => (show::quantity(setup.flops, Flops)),
                                None => (show::absent()),
                            } }
                        }
                    }
                } }
            } }
        }
    }
}
