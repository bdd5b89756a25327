//! `report DIR`: from the record of a run, or of a sweep, to its page beside it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;

use super::print;
use crate::cli::ReportArgs;
use crate::error::Error;
use crate::read::escaped;
use crate::report::html::{self, SweepPage, SweepRun};
use crate::report::{REPORT_FILE, ReportError, RunReport, read_record};
use crate::write::replace_file;

/// Lists the runs of a sweep.
const SWEEP_FILE: &str = "sweep.json";

/// The config that a merge carried out, kept beside its record.
const CONFIG_FILE: &str = "merge_config.yml";

/// A config is at most this long.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

pub(super) fn command(args: &ReportArgs) -> Result<ExitCode, Error> {
    let directory = &args.directory;
    let is_sweep = !directory.join(REPORT_FILE).exists() && directory.join(SWEEP_FILE).exists();
    let path = if is_sweep { sweep(directory)? } else { merge(directory)? };
    print(|out| {
        out.write_all(path.as_os_str().as_bytes())?;
        out.write_all(b"\n")
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the page of one merge and gives back its path.
fn merge(directory: &Path) -> Result<PathBuf, Error> {
    let report = RunReport::read(directory)?;
    write(directory, &report)
}

fn write(directory: &Path, report: &RunReport) -> Result<PathBuf, Error> {
    let page = html::merge_page(report, &title(directory), config(directory).as_deref());
    Ok(replace_file(directory, html::FILE_NAME, page.as_bytes())?)
}

/// Writes the page over a sweep's runs, and the page of each run that has a record.
fn sweep(directory: &Path) -> Result<PathBuf, Error> {
    let path = directory.join(SWEEP_FILE);
    let bytes = read_record(&path)?;
    let record: Value = serde_json::from_slice(&bytes)
        .map_err(|source| ReportError::MalformedSweep { path: path.clone(), source: Some(source) })?;
    let Some(runs) = record.get("runs").and_then(Value::as_array) else {
        return Err(ReportError::MalformedSweep { path, source: None }.into());
    };
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut page = SweepPage {
        version: text(&record, "version"),
        config_hash: text(&record, "config_hash"),
        runs: Vec::with_capacity(runs.len()),
    };
    for run in runs {
        let number = |key| number(run, key);
        let name = text(run, "name");
        let own = text(run, "directory");
        let own = if own.is_empty() { name.clone() } else { own };
        page.runs.push(SweepRun {
            linked: own_page(directory, &own)?,
            parameters: run
                .get("parameters")
                .and_then(Value::as_object)
                .map(|map| map.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
                .unwrap_or_default(),
            objective_initial: number("objective_initial"),
            objective_final: number("objective_final"),
            iterations: run.get("iterations").and_then(Value::as_u64),
            converged: run.get("converged").and_then(Value::as_bool),
            seconds: number("wall_seconds"),
            directory: own,
            name,
        });
    }
    let page = html::sweep_page(&page, &title(directory));
    Ok(replace_file(directory, html::FILE_NAME, page.as_bytes())?)
}

/// Writes a run's own page, if its directory lies right here and has a record that can be read.
fn own_page(sweep: &Path, name: &str) -> Result<bool, Error> {
    // A name out of a file: it must not lead anywhere else.
    let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
    if !plain {
        tracing::warn!("{SWEEP_FILE}: run `{}` is not a plain name of a directory: left out", escaped(name));
        return Ok(false);
    }
    let directory = sweep.join(name);
    match RunReport::read(&directory) {
        Ok(report) => write(&directory, &report).map(|_| true),
        Err(error) => {
            tracing::warn!("no page for run `{}`: {}", escaped(name), Error::from(error).one_line());
            Ok(false)
        }
    }
}

/// A number of a record: null is NaN, anything else that is no number is absent.
fn number(record: &Value, key: &str) -> Option<f64> {
    match record.get(key)? {
        Value::Null => Some(f64::NAN),
        value => value.as_f64(),
    }
}

/// The directory's own name, also where it was typed as `.`.
fn title(directory: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    name(directory).or_else(|| name(&directory.canonicalize().ok()?)).unwrap_or_else(|| "merge".to_owned())
}

/// The config beside the record. The page does without it where it is missing or no config.
fn config(directory: &Path) -> Option<String> {
    let path = directory.join(CONFIG_FILE);
    // By its metadata first: opening a FIFO would wait for a writer for ever.
    let metadata = std::fs::metadata(&path).ok()?;
    if !metadata.is_file() || metadata.len() > MAX_CONFIG_BYTES {
        return None;
    }
    let mut text = String::new();
    File::open(&path).ok()?.take(MAX_CONFIG_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}
