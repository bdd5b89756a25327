//! The merge at a glance: a sentence, and the figures that people ask for first.

use maud::{Markup, html};

use super::{Block, Status, show};
use crate::report::json::RunReport;
use crate::report::units::{ByteRate, FlopRate, Flops, Seconds};

pub(super) fn section(report: &RunReport, blocks: &[Block]) -> Markup {
    let with = |status| blocks.iter().filter(|b| b.status() == status).count();
    let (converged, unconverged) = (with(Status::Converged), with(Status::Unconverged));
    let (elementwise, unmerged) = (with(Status::Elementwise), with(Status::Unmerged));
    let solved = converged + unconverged;
    let statistics = report.inputs.iter().filter(|i| i.path.ends_with(" (statistics)")).count();
    let models = report.inputs.len() - statistics;
    html! {
        section id="glance" {
            h2 { "At a glance" }
            p {
                (show::count(blocks.len(), "tensor")) ": "
                (solved) " solved for"
                @if elementwise > 0 { ", " (elementwise) " merged elementwise" }
                ", " (unmerged) " averaged, copied or left out. "
                "From " (show::count(models, "checkpoint"))
                @if statistics > 0 { " with " (show::count(statistics, "set")) " of statistics" }
                "."
                @if unconverged > 0 {
                    " " strong.bad { (show::count(unconverged, "block")) " did not converge." }
                }
                @if !report.warnings.is_empty() {
                    " " a href="#warnings" { (show::count(report.warnings.len(), "warning")) } "."
                }
            }
            dl.tiles {
                (tile("wall time", &show::quantity(report.wall_seconds, Seconds), &html! {
                    (report.settings.threads) " threads, " (show::text(&report.settings.io))
                }))
                (memory(report))
                (tile("read", &show::bytes(Some(report.bytes_read)), &rate(report, |w| ByteRate(report.bytes_read as f64 / w))))
                (tile("written", &show::bytes(Some(report.bytes_written)), &html! {
                    (show::count(report.outputs.len(), "shard"))
                }))
                (tile("arithmetic", &show::quantity(report.flops, Flops), &rate(report, |w| FlopRate(report.flops / w))))
                (tile("converged", &html! {
                    @if solved == 0 { (show::absent()) } @else { (converged) " of " (solved) }
                }, &html! { "blocks that were solved for" }))
                (objective(blocks))
            }
        }
    }
}

fn tile(label: &str, value: &Markup, note: &Markup) -> Markup {
    html! { div { dt { (label) } dd { (value) } dd.note { (note) } } }
}

fn rate<T: std::fmt::Display>(report: &RunReport, rate: impl FnOnce(f64) -> T) -> Markup {
    html! {
        @if report.wall_seconds > 0.0 && report.wall_seconds.is_finite() { (rate(report.wall_seconds).to_string()) }
    }
}

/// The peak against the bound.
fn memory(report: &RunReport) -> Markup {
    let bound = report.settings.max_memory;
    let share = report.peak_anonymous_bytes.map(|peak| peak as f64 / bound.max(1) as f64);
    tile(
        "peak memory",
        &show::bytes(report.peak_anonymous_bytes),
        &html! {
            @if bound > 0 {
                "bound " (show::bytes(Some(bound)))
                @if let Some(share) = share {
                    (show::bar(&[(share, if share > 1.0 { "over" } else { "solve" })]))
                }
            } @else { "no bound in the record" }
        },
    )
}

/// Σ over the blocks that were solved, as far as both ends are finite.
fn objective(blocks: &[Block]) -> Markup {
    let ends = blocks.iter().filter_map(|b| {
        let (first, last) = (b.record.objective_initial?, b.record.objective_final?);
        (first.is_finite() && last.is_finite()).then_some((first, last))
    });
    let (first, last, count) =
        ends.fold((0.0, 0.0, 0), |(f, l, n), (first, last)| (f + first, l + last, n + 1));
    if count == 0 {
        return tile("objective", &show::absent(), &html! { "nothing was solved for" });
    }
    tile(
        "objective",
        &html! {
            @match show::decrease(Some(first), Some(last)) {
                Some(part) => (show::change(part)),
                None => (show::digits(last)),
            }
        },
        &html! { (show::digits(first)) " → " (show::digits(last)) ", summed" },
    )
}
