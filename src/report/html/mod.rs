//! `report.html`: a run's record, or a sweep's, as one page that needs nothing else.
//!
//! `run::report` calls [`merge_page`] and [`sweep_page`] and writes what they return. A page opens from a file,
//! loads nothing (its Content-Security-Policy forbids it) and reads without its script, which only sorts and
//! filters. Every text of a record goes through maud, which escapes it; `show::name` also takes away what could
//! reorder a line. Nothing here reads a file or computes a result.
//!
//! A page stays usable at any number of parameters: lists are cut at the limits below, largest first, and say so.

mod blocks;
mod convergence;
mod cost;
mod groups;
mod plot;
mod provenance;
mod show;
mod summary;
mod sweep;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::json::{ParameterReport, RunReport};
pub use sweep::{SweepPage, SweepRun, sweep_page};

/// The page's name beside the record.
pub const FILE_NAME: &str = "report.html";

/// Rows of the table of all blocks: a row takes about 2 KB.
const MAX_ROWS: usize = 5_000;
/// Curves in a plot: with more, single ones are not seen.
const MAX_CURVES: usize = 2_000;
/// Entries of any other list.
const MAX_LISTED: usize = 1_000;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// SHA-256 of the two texts above: all that the page's policy lets it look like and run. The tests compute them
/// and say what they should be.
const STYLE_HASH: &str = "vWLsyQfpIkTJUQRXFJjI2ECN+HlqKflfmgLcOgZQT1E=";
const SCRIPT_HASH: &str = "K77PEmWIzByhvR2z37HnWk/awoKvMiXcNlRneDyXbpU=";

/// One parameter with what the record says of it elsewhere.
struct Block<'a> {
    name: &'a str,
    record: &'a ParameterReport,
    /// Why it was not merged, if it was not.
    unmerged: Option<&'a str>,
}

impl Block<'_> {
    /// How a block ended, as the table's filter and colours know it.
    fn status(&self) -> Status {
        match self.record.converged {
            _ if self.unmerged.is_some() => Status::Unmerged,
            Some(false) => Status::Unconverged,
            Some(true) => Status::Converged,
            None => Status::Elementwise,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Converged,
    Unconverged,
    Elementwise,
    Unmerged,
}

/// The page of one merge. `title` is shown and may be any text; `config` is the config that was carried out, if
/// it is at hand.
pub fn merge_page(report: &RunReport, title: &str, config: Option<&str>) -> String {
    let reasons: std::collections::HashMap<&str, &str> =
        report.unmerged.iter().map(|u| (u.name.as_str(), u.reason.as_str())).collect();
    let mut blocks: Vec<Block> = report
        .parameters
        .iter()
        .map(|(name, record)| Block { name, record, unmerged: reasons.get(name.as_str()).copied() })
        .collect();
    // Stable: equal ones stay in the order of their names. What is not finite counts as largest, to be seen.
    blocks.sort_by(|a, b| b.record.seconds.total_cmp(&a.record.seconds));
    let body = html! {
        (summary::section(report, &blocks))
        (groups::section(&blocks))
        (convergence::section(&blocks))
        (cost::section(report, &blocks))
        (blocks::section(&blocks))
        (provenance::unmerged(report))
        (provenance::warnings(report))
        (provenance::files(report))
        @if let Some(config) = config { (provenance::config(config)) }
    };
    let sections = [
        ("glance", "At a glance"),
        ("how", "How"),
        ("convergence", "Convergence"),
        ("cost", "Time, bytes, memory"),
        ("blocks", "All blocks"),
        ("unmerged", "Not merged"),
        ("warnings", "Warnings"),
        ("files", "Files"),
    ];
    let lead = html! {
        "mats-stream " (show::text(&report.version)) " · config "
        code { (show::text(&report.config_hash)) }
    };
    document(title, "Merge", &lead, &sections, &body)
}

fn document(title: &str, kind: &str, lead: &Markup, sections: &[(&str, &str)], body: &Markup) -> String {
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{STYLE_HASH}'; script-src 'sha256-{SCRIPT_HASH}'; \
         base-uri 'none'; form-action 'none'"
    );
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="referrer" content="no-referrer";
                meta name="generator" content=(concat!("mats-stream ", env!("CARGO_PKG_VERSION")));
                title { (show::text(title)) " · " (kind) " report" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    p.kind { (kind) " report" }
                    h1 { (show::name(title)) }
                    p.lead { (lead) }
                    nav aria-label="Sections" {
                        @for (id, label) in sections { a href={ "#" (id) } { (label) } }
                    }
                }
                main { (body) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
    .into_string()
}

#[cfg(test)]
mod tests;
