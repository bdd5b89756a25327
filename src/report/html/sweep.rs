//! The page of a sweep: one row for each run, leading to its own page.

use maud::{Markup, html};
use serde_json::Value;

use super::{MAX_LISTED, document, show};

/// A sweep as its `sweep.json` tells it, with what was found of each run.
#[derive(Clone, Debug, Default)]
pub struct SweepPage {
    /// The tool's version, if it is there.
    pub version: String,
    /// Hash of the config, if it is there.
    pub config_hash: String,
    /// In the order of the file.
    pub runs: Vec<SweepRun>,
}

/// One run of a sweep. What is missing is shown as missing.
#[derive(Clone, Debug, Default)]
pub struct SweepRun {
    /// As listed.
    pub name: String,
    /// Its directory in the sweep's: one plain component.
    pub directory: String,
    /// Whether it has a page to lead to.
    pub linked: bool,
    /// Values of what was swept, in the file's order.
    pub parameters: Vec<(String, Value)>,
    /// Sum of the objectives at the initial guess.
    pub objective_initial: Option<f64>,
    /// Sum of the objectives at the results.
    pub objective_final: Option<f64>,
    /// Steps in all.
    pub iterations: Option<u64>,
    /// Whether all blocks converged.
    pub converged: Option<bool>,
    /// Wall time.
    pub seconds: Option<f64>,
}

/// The page over a sweep's runs. `title` is shown and may be any text.
pub fn sweep_page(sweep: &SweepPage, title: &str) -> String {
    let mut keys: Vec<&str> = Vec::new();
    for (key, _) in sweep.runs.iter().flat_map(|run| &run.parameters) {
        if !keys.contains(&key.as_str()) && keys.len() < 16 {
            keys.push(key);
        }
    }
    let body = html! {
        section id="runs" {
            h2 { "Runs" }
            p {
                (show::count(sweep.runs.len(), "run")) ". Objectives are summed over the blocks that were solved for; "
                "where the runs weigh them differently (another ridge, another weight) they are not comparable."
            }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "run" }
                    @for key in &keys { th.num scope="col" { (show::name(key)) } }
                    th.num scope="col" { "objective, initial" }
                    th.num scope="col" { "objective, final" }
                    th.num scope="col" { "change" }
                    th.num scope="col" { "steps" }
                    th scope="col" { "converged" }
                    th.num scope="col" { "time" }
                } }
                tbody { @for run in sweep.runs.iter().take(MAX_LISTED) { (row(run, &keys)) } }
            } }
            (show::cut(MAX_LISTED, sweep.runs.len(), "runs"))
        }
    };
    let lead = html! {
        "mats-stream " (show::text(&sweep.version)) " · config " code { (show::text(&sweep.config_hash)) }
    };
    document(title, "Sweep", &lead, &[("runs", "Runs")], &body)
}

fn row(run: &SweepRun, keys: &[&str]) -> Markup {
    html! { tr {
        th scope="row" {
            @if run.linked { a href={ (encode(&run.directory)) "/report.html" } { (show::name(&run.name)) } }
            @else { (show::name(&run.name)) " " span.absent { "(no record)" } }
        }
        @for key in keys {
            td.num { @match run.parameters.iter().find(|(k, _)| k == key) {
                Some((_, Value::Number(number))) => (number.to_string()),
                Some((_, Value::String(text))) => (show::name(text)),
                Some((_, Value::Null)) => (show::not_finite()),
                Some((_, other)) => (show::name(&other.to_string())),
                None => (show::absent()),
            } }
        }
        td.num { (show::number(run.objective_initial)) }
        td.num { (show::number(run.objective_final)) }
        td.num { @match show::decrease(run.objective_initial, run.objective_final) {
            Some(decrease) => (show::change(decrease)),
            None => (show::absent()),
        } }
        td.num { @match run.iterations { Some(k) => (k), None => (show::absent()) } }
        td { @match run.converged {
            Some(true) => "yes",
            Some(false) => span.bad { "no" },
            None => (show::absent()),
        } }
        td.num { (show::seconds(run.seconds)) }
    } }
}

/// A directory's name as one segment of a relative link: everything but the unreserved characters of RFC 3986 is
/// percent-encoded, so that no name reads as a scheme, a query or a path.
fn encode(name: &str) -> String {
    let mut encoded = String::from("./");
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte))
            }
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_their_directory() {
        assert_eq!(encode("ridge=0.001,x"), "./ridge%3D0.001%2Cx");
        assert_eq!(encode("javascript:alert(1)"), "./javascript%3Aalert%281%29");
        assert_eq!(encode("a#b?c%/ü"), "./a%23b%3Fc%25%2F%C3%BC");
    }
}
