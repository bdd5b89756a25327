//! How tensors were merged: one row for each way, however many tensors went it.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use maud::{Markup, html};

use super::{Block, MAX_LISTED, show};
use crate::report::json::ParameterReport;

/// `mats: iso_ridge → kfac pcg (kronecker)`: the method, its start, its rounds.
pub(super) fn way(record: &ParameterReport) -> String {
    let mut way = record.method.clone();
    let system = |subspace: &Option<String>, solver: &str| match subspace {
        Some(subspace) => format!("{subspace} {solver}"),
        None => solver.to_owned(),
    };
    let rounds = record.rounds.iter().map(|r| system(&r.subspace, &r.method));
    let mut steps: Vec<String> = record.start.iter().cloned().chain(rounds).collect();
    if let Some(solver) = &record.solver {
        let mut step = system(&record.subspace, solver);
        if let Some(preconditioner) = &record.preconditioner {
            step += &format!(" ({preconditioner})");
        }
        steps.push(step);
    }
    if !steps.is_empty() {
        way += ": ";
        way += &steps.join(" → ");
    }
    way
}

#[derive(Default)]
struct Group {
    tensors: usize,
    converged: usize,
    judged: usize,
    /// Of the last round, sorted when shown.
    iterations: Vec<u64>,
    seconds: f64,
    bytes_read: u64,
}

pub(super) fn section(blocks: &[Block]) -> Markup {
    let mut by_way: BTreeMap<String, Group> = BTreeMap::new();
    for block in blocks {
        let group = by_way.entry(way(block.record)).or_default();
        group.tensors += 1;
        group.converged += usize::from(block.record.converged == Some(true));
        group.judged += usize::from(block.record.converged.is_some());
        group.iterations.extend(block.record.iterations);
        group.seconds += block.record.seconds;
        group.bytes_read = group.bytes_read.saturating_add(block.record.bytes_read);
    }
    let mut groups: Vec<(String, Group)> = by_way.into_iter().collect();
    groups.sort_by_key(|group| Reverse(group.1.tensors));
    let total = groups.iter().map(|(_, g)| g.seconds).sum::<f64>();
    html! {
        section id="how" {
            h2 { "How the tensors were merged" }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "way" }
                    th.num scope="col" { "tensors" }
                    th.num scope="col" { "converged" }
                    th.num scope="col" { "steps, median (most)" }
                    th.num scope="col" { "time" }
                    th scope="col" { "share of time" }
                    th.num scope="col" { "read" }
                } }
                tbody {
                    @for (way, group) in groups.iter().take(MAX_LISTED) { (row(way, group, total)) }
                }
            } }
            (show::cut(MAX_LISTED, groups.len(), "ways"))
        }
    }
}

fn row(way: &str, group: &Group, total: f64) -> Markup {
    let mut iterations = group.iterations.clone();
    iterations.sort_unstable();
    html! {
        tr {
            th scope="row" { (show::name(way)) }
            td.num { (group.tensors) }
            td.num {
                @if group.judged == 0 { (show::absent()) }
                @else if group.converged < group.judged {
                    span.bad { (group.converged) " of " (group.judged) }
                } @else { "all" }
            }
            td.num {
                @match (iterations.get(iterations.len() / 2), iterations.last()) {
                    (Some(median), Some(most)) => { (median) " (" (most) ")" }
                    _ => { (show::absent()) }
                }
            }
            td.num { (show::seconds(Some(group.seconds))) }
            td.bars { (show::bar(&[(group.seconds / total, "solve")])) }
            td.num { (show::bytes(Some(group.bytes_read))) }
        }
    }
}
