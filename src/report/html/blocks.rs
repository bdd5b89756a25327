//! The table of all blocks, one `tbody` each: a row, and details that open under it. It works without a script,
//! which only sorts and filters.

use std::fmt::Write as _;

use maud::{Markup, PreEscaped, html};

use super::cost::Phases;
use super::groups::way;
use super::{Block, MAX_ROWS, Status, plot, show};
use crate::report::json::{ParameterReport, RoundReport, StepReport};
use crate::report::units::{Bytes, Flops};

/// Steps in the details; thinned like the curves.
const MAX_STEPS: usize = 32;

/// Headings, and whether the column holds numbers.
const COLUMNS: [(&str, bool); 9] = [
    ("block", false),
    ("way", false),
    ("stopped by", false),
    ("steps", true),
    ("objective", true),
    ("residual", true),
    ("residual by step", false),
    ("time", true),
    ("read", true),
];

pub(super) fn section(blocks: &[Block]) -> Markup {
    let shown = &blocks[..blocks.len().min(MAX_ROWS)];
    let longest = shown.iter().map(|b| Phases::of(b.record).total()).fold(0.0, f64::max);
    html! {
        section id="blocks" {
            h2 { "All blocks" }
            p.note {
                "Longest first. Objective: its change from the initial guess to the result. "
                "Residual: at the result, relative to the right-hand side. Open a block for the rest."
            }
            form id="controls" hidden {
                label { "Filter " input id="filter" type="search" placeholder="name, way or reason" autocomplete="off"; }
                " "
                label { "Show " select id="status" {
                    option value="" { "all" }
                    option value="un" { "not converged" }
                    option value="ok" { "converged" }
                    option value="el" { "elementwise" }
                    option value="no" { "not merged" }
                } }
                " "
                output id="shown" for="filter status" {}
            }
            div.scroll { table id="table" {
                thead { tr {
                    @for (label, number) in COLUMNS { th.num[number] scope="col" { (label) } }
                } }
                @for (row, block) in shown.iter().enumerate() { (body(row, block, longest)) }
            } }
            (show::cut(MAX_ROWS, blocks.len(), "blocks"))
        }
    }
}

fn body(row: usize, block: &Block, longest: f64) -> Markup {
    let record = block.record;
    let status = match block.status() {
        Status::Converged => "ok",
        Status::Unconverged => "un",
        Status::Elementwise => "el",
        Status::Unmerged => "no",
    };
    let decrease = show::decrease(record.objective_initial, record.objective_final);
    let way = way(record);
    html! {
        tbody id={ "b" (row) } data-s=(status) {
            tr {
                th scope="row" { details { summary { (show::name(block.name)) } } }
                td { (show::name(&way)) }
                td { @match &record.stop_reason {
                    Some(reason) => span.bad[record.converged == Some(false)] { (show::name(reason)) },
                    None => (show::absent()),
                } }
                td.num { @match record.iterations { Some(k) => (k), None => (show::absent()) } }
                td.num data-v=[decrease.map(|d| -d)] { @match decrease {
                    Some(decrease) => (show::change(decrease)),
                    None => (show::number(record.objective_final)),
                } }
                td.num data-v=[finite(record.final_relative_residual)] { (show::number(record.final_relative_residual)) }
                td { (sparkline(record)) }
                td.num data-v=[finite(Some(record.seconds))] {
                    (show::seconds(Some(record.seconds))) (Phases::of(record).bar(longest))
                }
                td.num data-v=(record.bytes_read) { (Bytes(record.bytes_read).to_string()) }
            }
            tr.d { td colspan=(COLUMNS.len()) { div { (details(block)) } } }
        }
    }
}

/// What sorts by number; anything else sorts last.
fn finite(x: Option<f64>) -> Option<f64> {
    x.filter(|x| x.is_finite())
}

fn sparkline(record: &ParameterReport) -> Markup {
    let values: Vec<f64> = record.history.iter().map(|s| s.relative_residual).collect();
    let (Some(first), Some(last)) = (values.first(), values.last()) else { return show::absent() };
    let label = format!("from {} to {}", show::digits(*first), show::digits(*last));
    plot::sparkline(&values, &label)
}

/// Everything that the record has of a block and the row does not show.
fn details(block: &Block) -> Markup {
    let record = block.record;
    html! {
        dl.facts {
            @if let Some(reason) = block.unmerged { (fact("not merged", &show::name(reason))) }
            @if let Some(note) = &record.note && block.unmerged.is_none() { (fact("note", &show::name(note))) }
            @if let Some(ridge) = record.ridge { (fact("ridge", &raised(ridge, record.ridge_raised_from))) }
            @if record.factors_lifted == Some(true) {
                (fact("Grams", &html! { "made positive semidefinite: rounding had left negative eigenvalues" }))
            }
            @if record.objective_initial.is_some() || record.objective_final.is_some() {
                (fact("objective", &ends(record.objective_initial, record.objective_final)))
            }
            @if record.initial_relative_residual.is_some() || record.final_relative_residual.is_some() {
                (fact("residual", &ends(record.initial_relative_residual, record.final_relative_residual)))
            }
            @if let Some(setup) = &record.setup {
                (fact("setup", &html! {
                    (show::seconds(Some(setup.seconds))) ", " (show::quantity(setup.flops, Flops)) ", holds "
                    (Bytes(setup.bytes).to_string())
                }))
            }
            @if let Some(solve) = record.solve_seconds { (fact("solve", &show::seconds(Some(solve)))) }
            @if let Some(checksum) = &record.checksum { (fact("checksum", &html! { code { (show::text(checksum)) } })) }
        }
        @if !record.rounds.is_empty() { (rounds(&record.rounds)) }
        @if record.history.len() > 1 { (steps(&record.history)) }
    }
}

fn fact(label: &str, value: &Markup) -> Markup {
    html! { div { dt { (label) } dd { (value) } } }
}

/// `initial → final`.
fn ends(first: Option<f64>, last: Option<f64>) -> Markup {
    html! { (show::number(first)) " → " (show::number(last)) }
}

fn raised(ridge: f64, from: Option<f64>) -> Markup {
    html! {
        (show::number(Some(ridge)))
        @if from.is_some() { ", raised from " (show::number(from)) ": not positive definite with less" }
    }
}

fn rounds(rounds: &[RoundReport]) -> Markup {
    html! {
        table {
            thead { tr {
                th scope="col" { "earlier round" } th scope="col" { "stopped by" } th.num scope="col" { "steps" }
                th.num scope="col" { "objective" } th.num scope="col" { "residual" } th.num scope="col" { "ridge" }
            } }
            tbody { @for round in rounds { tr {
                th scope="row" { @if let Some(s) = &round.subspace { (show::text(s)) " " } (show::text(&round.method)) }
                td { @match &round.stop_reason {
                    Some(reason) => span.bad[round.converged == Some(false)] { (show::name(reason)) },
                    None => (show::absent()),
                } }
                td.num { @match round.iterations { Some(k) => (k), None => (show::absent()) } }
                td.num { (ends(round.objective_initial, round.objective_final)) }
                td.num { (ends(round.initial_relative_residual, round.final_relative_residual)) }
                td.num { @match round.ridge { Some(ridge) => (raised(ridge, round.ridge_raised_from)), None => (show::absent()) } }
            } } }
        }
    }
}

fn steps(history: &[StepReport]) -> Markup {
    let chosen = plot::thin(history.len(), MAX_STEPS);
    // A few dozen rows for each block are most of a page: closing tags that HTML does without are left out.
    let mut rows = String::new();
    for step in &chosen {
        let value = |x: f64| if x.is_finite() { show::digits(x) } else { "not finite".to_owned() };
        let StepReport { objective, relative_residual } = history[*step];
        // Writing to a String cannot fail.
        let _ = write!(rows, "<tr><th>{step}<td>{}<td>{}", value(objective), value(relative_residual));
    }
    html! {
        table.steps {
            @if chosen.len() < history.len() { caption { (chosen.len()) " of " (history.len()) " entries" } }
            thead { tr { th scope="col" { "step" } th scope="col" { "objective" } th scope="col" { "residual" } } }
            tbody { (PreEscaped(rows)) }
        }
    }
}
