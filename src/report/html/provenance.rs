//! What was not merged and why, warnings, the files read and written, and the config.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use maud::{Markup, html};

use super::{MAX_LISTED, show};
use crate::report::json::RunReport;
use crate::report::units::Bytes;

/// Grouped by reason: a model has few reasons and many tensors.
pub(super) fn unmerged(report: &RunReport) -> Markup {
    let mut by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for record in &report.unmerged {
        by_reason.entry(&record.reason).or_default().push(&record.name);
    }
    let mut groups: Vec<(&str, Vec<&str>)> = by_reason.into_iter().collect();
    groups.sort_by_key(|group| Reverse(group.1.len()));
    html! {
        section id="unmerged" {
            h2 { "Not merged, and why" }
            @if groups.is_empty() { p { "Every tensor was merged." } }
            @for (reason, names) in groups.iter().take(MAX_LISTED) {
                details open[names.len() <= 12] {
                    summary { strong { (show::count(names.len(), "tensor")) } ": " (show::name(reason)) }
                    ul.names { @for name in names.iter().take(MAX_LISTED) { li { code { (show::name(name)) } } } }
                    (show::cut(MAX_LISTED, names.len(), "tensors"))
                }
            }
            (show::cut(MAX_LISTED, groups.len(), "reasons"))
        }
    }
}

pub(super) fn warnings(report: &RunReport) -> Markup {
    html! {
        section id="warnings" {
            h2 { "Warnings" }
            @if report.warnings.is_empty() { p { "None." } }
            @else {
                ul { @for line in report.warnings.iter().take(MAX_LISTED) { li { (show::name(line)) } } }
                (show::cut(MAX_LISTED, report.warnings.len(), "warnings"))
            }
        }
    }
}

pub(super) fn files(report: &RunReport) -> Markup {
    let count: usize = report.inputs.iter().map(|i| i.files.len().max(1)).sum();
    let mut left = MAX_LISTED;
    html! {
        section id="files" {
            h2 { "Files" }
            h3 { "Read" }
            p.note { "What tells whether an input is still the same: its length, when it was changed, and its header's hash where the run took one." }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "input" } th scope="col" { "file" } th.num scope="col" { "bytes" }
                    th scope="col" { "changed (UTC)" } th scope="col" { "header" }
                } }
                @for input in &report.inputs {
                    @let files = &input.files[..input.files.len().min(left)];
                    @let () = left -= files.len();
                    @if !files.is_empty() || input.files.is_empty() { tbody {
                        @if files.is_empty() { tr {
                            th scope="row" { (show::name(&input.path)) } td colspan="4" { "no files in the record" }
                        } }
                        @for (k, file) in files.iter().enumerate() { tr {
                            @if k == 0 { th scope="rowgroup" rowspan=(files.len()) { (show::name(&input.path)) } }
                            td { (show::name(&file.name)) }
                            td.num title={ (file.bytes) " bytes" } { (Bytes(file.bytes).to_string()) }
                            td { (utc(file.mtime_ns)) }
                            td { @match &file.header_hash {
                                Some(hash) => code { (show::text(hash)) },
                                None => (show::absent()),
                            } }
                        } }
                    } }
                }
            } }
            (show::cut(MAX_LISTED, count, "files"))
            h3 { "Written" }
            div.scroll { table {
                thead { tr { th scope="col" { "shard" } th.num scope="col" { "bytes" } } }
                tbody { @for file in report.outputs.iter().take(MAX_LISTED) { tr {
                    th scope="row" { (show::name(&file.name)) }
                    td.num title={ (file.bytes) " bytes" } { (Bytes(file.bytes).to_string()) }
                } } }
            } }
            (show::cut(MAX_LISTED, report.outputs.len(), "shards"))
        }
    }
}

pub(super) fn config(config: &str) -> Markup {
    html! {
        section id="config" {
            h2 { "Config" }
            details { summary { "merge_config.yml" } pre { code { (config) } } }
        }
    }
}

/// `2026-11-24 20:35:37.263987841` of nanoseconds since 1970, in the Gregorian calendar without leap seconds.
fn utc(ns: i64) -> String {
    const DAY: i64 = 86_400;
    let (seconds, ns) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
    // Years that begin in March have their leap day last; 719468 days lead from 0000-03-01 to 1970.
    // (Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.)
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{ns:09}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against `date -u -d @SECONDS`.
    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00.000000000");
        assert_eq!(utc(-1), "1969-12-31 23:59:59.999999999");
        assert_eq!(utc(951_782_400_000_000_000), "2000-02-29 00:00:00.000000000");
        assert_eq!(utc(1_763_922_000_123_456_789), "2025-11-23 18:20:00.123456789");
        assert_eq!(utc(4_107_542_399_000_000_000), "2100-02-28 23:59:59.000000000");
        // No panic at either end.
        assert!(utc(i64::MAX).starts_with("2262-04-11") && utc(i64::MIN).starts_with("1677-09-21"));
    }
}
