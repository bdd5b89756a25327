//! Convergence of every block that was solved step by step, and why each solve ended.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use maud::{Markup, html};

use super::plot::{Caption, Curve, overview};
use super::{Block, MAX_CURVES, MAX_LISTED, MAX_ROWS, Status, show};
use crate::report::json::StepReport;

pub(super) fn section(blocks: &[Block]) -> Markup {
    let mut stepped: Vec<(usize, &Block)> =
        blocks.iter().enumerate().filter(|(_, b)| !b.record.history.is_empty()).collect();
    let all = stepped.len();
    // Where there are too many, those that did not converge first, and the longest of the others.
    stepped.sort_by_key(|(_, b)| b.status() != Status::Unconverged);
    stepped.truncate(MAX_CURVES);
    // Drawn last, seen best.
    stepped.reverse();
    let curves = |value: fn(&StepReport, &StepReport) -> f64| -> Vec<Curve> {
        let each = stepped.iter().map(|&(row, block)| {
            let history = &block.record.history;
            Curve {
                row: (row < MAX_ROWS).then_some(row),
                name: block.name,
                converged: block.record.converged != Some(false),
                values: history.iter().map(|step| value(step, &history[0])).collect(),
            }
        });
        each.collect()
    };
    let describe = |what: &str| {
        format!(
            "{what} on a logarithmic axis over the steps of the solver, one curve for each of {}. \
             The table of all blocks has the values.",
            show::count(stepped.len(), "block")
        )
    };
    let objective = overview(
        &Caption {
            id: "objective",
            title: "Objective, relative to the initial guess",
            description: describe("Objective after each step divided by its value at the initial guess,"),
        },
        &curves(|step, first| step.objective / first.objective),
    );
    let residual = overview(
        &Caption {
            id: "residual",
            title: "Residual, relative to the right-hand side",
            description: describe("Norm of the solver's residual divided by that of the right-hand side,"),
        },
        &curves(|step, _| step.relative_residual),
    );
    let drawn = objective.is_some() || residual.is_some();
    html! {
        section id="convergence" {
            h2 { "Convergence" }
            @if drawn {
                div.plots { (objective.unwrap_or_default()) (residual.unwrap_or_default()) }
                p.note {
                    "One curve is one block; "
                    span.key.converged {} "\u{a0}converged, " span.key.un {} "\u{a0}not converged. "
                    "A curve leads to its block in the table. Values that are zero, negative or not finite have no place on these axes."
                }
                (show::cut(MAX_CURVES, all, "blocks are drawn, those that did not converge before others"))
            } @else {
                p { "No steps are in the record: nothing was solved by iteration, or an earlier version wrote it." }
            }
            (reasons(blocks))
        }
    }
}

/// How many solves ended for which reason; the rounds before a block's last count too.
fn reasons(blocks: &[Block]) -> Markup {
    let mut counts: BTreeMap<&str, (usize, bool)> = BTreeMap::new();
    for block in blocks {
        let record = block.record;
        let rounds = record.rounds.iter().map(|r| (&r.stop_reason, r.converged));
        for (reason, converged) in rounds.chain([(&record.stop_reason, record.converged)]) {
            let Some(reason) = reason else { continue };
            let (count, failed) = counts.entry(reason).or_default();
            *count += 1;
            *failed |= converged == Some(false);
        }
    }
    let mut rows: Vec<(&str, (usize, bool))> = counts.into_iter().collect();
    rows.sort_by_key(|row| Reverse(row.1.0));
    html! {
        @if !rows.is_empty() {
            h3 { "Why solves ended" }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "reason" }
                    th.num scope="col" { "solves" }
                    th scope="col" { "which means" }
                } }
                tbody {
                    @for (reason, (count, failed)) in rows.iter().take(MAX_LISTED) {
                        tr {
                            th scope="row" { span.bad[*failed] { (show::name(reason)) } }
                            td.num { (count) }
                            td { (meaning(reason)) }
                        }
                    }
                }
            } }
            (show::cut(MAX_LISTED, rows.len(), "reasons"))
        }
    }
}

/// [`crate::solve::StopReason::name`] in words. A reason of another version has none here.
fn meaning(reason: &str) -> &'static str {
    match reason {
        "relative_residual" => "the residual fell to the tolerance",
        "preconditioned_residual" => "the residual in the preconditioner's norm fell to the tolerance",
        "stagnated" => "the residual reached what rounding leaves of it",
        "objective_decrease" => "a step lowered the objective by less than the tolerance",
        "max_iterations" => "the last allowed step was taken",
        "time_limit" => "time ran out",
        "solved" => "the residual was zero",
        "zero_operator" => "all statistics are zero here: the initial guess stays",
        "direct_diagonal" => "divided elementwise",
        "direct_cholesky" => "solved exactly, by Cholesky",
        "direct_cholesky_ridged" => "solved by Cholesky, with a tiny ridge that made it possible",
        "direct_eigen" => "solved by an eigendecomposition with a floor under the eigenvalues",
        "direct_generalised_eigen" => "solved exactly, by two generalised eigendecompositions",
        "not_positive_definite" => "a direction without curvature: the last good iterate is kept",
        "not_finite" => "a number was not finite: the last good iterate is kept",
        "cancelled" => "stopped from outside",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::{DirectMethod, StopReason};

    #[test]
    fn every_reason_has_a_meaning() {
        let reasons = [
            StopReason::RelativeResidual,
            StopReason::PreconditionedResidual,
            StopReason::ObjectiveDecrease,
            StopReason::Stagnated,
            StopReason::MaxIterations,
            StopReason::TimeLimit,
            StopReason::Solved,
            StopReason::ZeroOperator,
            StopReason::Direct(DirectMethod::Diagonal),
            StopReason::Direct(DirectMethod::Cholesky),
            StopReason::Direct(DirectMethod::RidgedCholesky),
            StopReason::Direct(DirectMethod::Eigen),
            StopReason::Direct(DirectMethod::GeneralisedEigen),
            StopReason::NotPositiveDefinite { curvature: -1.0 },
            StopReason::NotFinite,
            StopReason::Cancelled,
        ];
        for reason in reasons {
            assert_ne!(meaning(reason.name()), "", "{}", reason.name());
        }
    }
}
