use sha2::{Digest as _, Sha256};

use super::*;
use crate::report::json::{
    InputFileRecord, InputRecord, OutputFileRecord, RoundReport, RunSettings, SetupReport, StepReport,
    UnmergedRecord,
};

/// What a name can hold to break out of text, an attribute, a script, a style or a line.
const HOSTILE: &str =
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='x' &amp;\u{202e}\n";

fn solved(steps: usize) -> ParameterReport {
    let history: Vec<StepReport> = (0..=steps)
        .map(|k| StepReport {
            relative_residual: 0.5f64.powi(k as i32),
            objective: 1.0 + 0.3f64.powi(k as i32),
        })
        .collect();
    ParameterReport {
        method: "mats".into(),
        start: Some("task vectors".into()),
        solver: Some("pcg".into()),
        subspace: Some("kfac".into()),
        iterations: Some(steps as u64),
        stop_reason: Some("objective_decrease".into()),
        initial_relative_residual: Some(1.0),
        final_relative_residual: Some(0.0123),
        objective_initial: Some(2.0),
        objective_final: Some(1.0),
        converged: Some(true),
        ridge: Some(0.1),
        preconditioner: Some("kronecker".into()),
        setup: Some(SetupReport { seconds: 0.25, flops: 1e9, bytes: 1 << 20 }),
        solve_seconds: Some(0.5),
        history,
        seconds: 1.0,
        bytes_read: 1 << 30,
        rounds: vec![RoundReport {
            method: "direct".into(),
            subspace: Some("delta_gram".into()),
            stop_reason: Some("direct_cholesky".into()),
            converged: Some(true),
            ..RoundReport::default()
        }],
        ..ParameterReport::default()
    }
}

fn run(parameters: impl IntoIterator<Item = (String, ParameterReport)>) -> RunReport {
    let file = |name: &str| InputFileRecord {
        name: name.into(),
        bytes: 1000,
        mtime_ns: 0,
        header_hash: None,
        location: None,
    };
    RunReport {
        version: "0.1.0".into(),
        config_hash: "c0ffee".into(),
        wall_seconds: 12.0,
        peak_rss_bytes: Some(3 << 30),
        peak_anonymous_bytes: Some(1 << 30),
        bytes_read: 4 << 30,
        bytes_written: 1 << 30,
        flops: 6e12,
        settings: RunSettings { threads: 2, max_memory: 2 << 30, io: "mmap".into(), seed: Some(0) },
        inputs: vec![
            InputRecord {
                path: "models/a".into(),
                files: vec![file("x.safetensors"), file("y.safetensors")],
            },
            InputRecord { path: "models/a (statistics)".into(), files: vec![file("s.safetensors")] },
        ],
        outputs: vec![OutputFileRecord { name: "model.safetensors".into(), bytes: 7 }],
        parameters: parameters.into_iter().collect(),
        ..RunReport::default()
    }
}

/// Base64 of RFC 4648, for 32 bytes.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for k in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * k)) as usize & 63];
            text.push(if k <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

/// Tags of a page, names and attributes, in order; text and the two embedded files left out. The page's own syntax
/// is plain enough for this: every `<` that is not a tag is escaped.
fn tags(page: &str) -> Vec<String> {
    let body = page.replace(STYLE, "").replace(SCRIPT, "");
    body.split('<').skip(1).filter_map(|rest| Some(rest.split('>').next()?.to_owned())).collect()
}

#[test]
fn the_policy_names_what_is_embedded() {
    for (what, text, hash) in [("STYLE_HASH", STYLE, STYLE_HASH), ("SCRIPT_HASH", SCRIPT, SCRIPT_HASH)] {
        assert_eq!(
            hash,
            base64(&Sha256::digest(text)),
            "{what} is not that of its file: right is the second"
        );
        assert!(!text.contains("</"), "{what}: the text would end its element");
    }
    let page = merge_page(&run([]), "x", None);
    assert!(page.contains(&format!("style-src 'sha256-{STYLE_HASH}'")), "unescaped, as browsers read it");
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn every_section_is_there() {
    let mut report = run([
        ("layers.0.weight".to_owned(), solved(7)),
        ("norm.weight".to_owned(), ParameterReport { method: "average".into(), ..Default::default() }),
    ]);
    report.unmerged =
        vec![UnmergedRecord { name: "norm.weight".into(), reason: "no statistics for it".into() }];
    report.warnings = vec!["a tensor is odd".into()];
    let page = merge_page(&report, "out/merged", Some("merge_method: mats # the config\n"));
    for words in [
        "<title>out/merged · Merge report</title>",
        "2 tensors: 1 solved for, 1 averaged",
        "1 checkpoint with 1 set of statistics",
        "12.0 s",
        "bound 2.0 GiB",
        "1.0 GiB",
        "6.00 TFLOP",
        "500.00 GFLOP/s",
        "1 of 1",
        "−50.0 %",
        "mats: task vectors → delta_<wbr>gram direct → kfac pcg (kronecker)",
        "Objective, relative to the initial guess",
        "Residual, relative to the right-hand side",
        "a step lowered the objective by less than the tolerance",
        "solved exactly, by Cholesky",
        "250 ms",
        "500 ms",
        "Largest blocks",
        "layers.<wbr>0.<wbr>weight",
        "no statistics for it",
        "a tensor is odd",
        "models/<wbr>a",
        "1970-01-01 00:00:00.000000000",
        "model.<wbr>safetensors",
        "merge_method: mats # the config",
    ] {
        assert!(page.contains(words), "{words} is missing");
    }
    // Every link leads somewhere on the page, and no two places have one name.
    let ids: Vec<&str> = page.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    for link in page.split("href=\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(link == "warnings" || ids.contains(&link), "#{link} leads nowhere");
    }
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
    // Plots say what they are, and numbers have headings.
    assert_eq!(page.matches("<desc").count(), 2);
    assert_eq!(page.matches("<table").count(), page.matches("<thead").count());
    assert_eq!(page.matches("<h1").count(), 1);
}

#[test]
fn nothing_is_loaded_from_anywhere() {
    let mut report = run([("http://example.org/x".to_owned(), solved(3))]);
    report.warnings = vec!["see https://example.org".into()];
    let page = merge_page(&report, "x", None);
    for tag in tags(&page) {
        assert!(!tag.contains("src=") && !tag.contains("url("), "{tag}");
        if let Some((_, link)) = tag.split_once("href=\"") {
            assert!(link.starts_with('#'), "{tag}");
        }
        assert!(!tag.contains("://") || tag.starts_with("meta"), "{tag}");
    }
    for text in [STYLE, SCRIPT] {
        assert!(!text.contains("://") && !text.contains("import") && !text.contains("url("));
        assert!(!text.contains("innerHTML") && !text.contains("eval("));
    }
}

#[test]
fn hostile_texts_stay_texts() {
    let hostile = || HOSTILE.to_owned();
    let plain = run([("w".to_owned(), solved(2))]);
    let mut report = run([]);
    let mut record = solved(2);
    for text in
        [&mut record.solver, &mut record.subspace, &mut record.stop_reason, &mut record.preconditioner]
    {
        *text = Some(hostile());
    }
    record.method = hostile();
    record.checksum = Some(hostile());
    record.note = Some(hostile());
    record.rounds[0] = RoundReport {
        method: hostile(),
        subspace: Some(hostile()),
        stop_reason: Some(hostile()),
        ..RoundReport::default()
    };
    report.parameters = [(hostile(), record), (String::new(), solved(2))].into();
    report.version = hostile();
    report.config_hash = hostile();
    report.settings.io = hostile();
    report.warnings = vec![hostile()];
    report.unmerged = vec![UnmergedRecord { name: hostile(), reason: hostile() }];
    report.inputs[0].path = hostile();
    report.inputs[0].files[0].name = hostile();
    report.inputs[0].files[0].header_hash = Some(hostile());
    report.outputs[0].name = hostile();
    let page = merge_page(&report, HOSTILE, Some(HOSTILE));
    let plain = tags(&merge_page(&plain, "x", Some("y")));
    let known: Vec<&str> = plain.iter().map(|tag| element(tag)).collect();
    for tag in tags(&page) {
        let allowed = ["ul", "/ul", "li", "/li", "strong", "/strong"];
        assert!(
            known.contains(&element(&tag)) || allowed.contains(&element(&tag)),
            "an element of its own: <{tag}>"
        );
        assert!(!tag.contains("onload=") && !tag.contains("onerror="), "an attribute of its own: <{tag}>");
    }
    assert_eq!(page.matches("<script").count(), 1);
    assert!(
        !page.contains('\u{202e}') || page.matches('\u{202e}').count() == 1,
        "only the config is verbatim"
    );
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;"));
    assert!(page.contains("(empty name)"));

    let sweep = SweepPage {
        version: hostile(),
        config_hash: hostile(),
        runs: vec![SweepRun {
            name: hostile(),
            directory: "javascript:alert(1)".into(),
            linked: true,
            parameters: vec![(hostile(), hostile().into()), ("list".into(), serde_json::json!([HOSTILE]))],
            ..SweepRun::default()
        }],
    };
    let page = sweep_page(&sweep, HOSTILE);
    assert_eq!(page.matches("<script").count(), 1);
    assert!(!page.contains("<img") && page.contains("href=\"./javascript%3Aalert%281%29/report.html\""));
}

fn element(tag: &str) -> &str {
    tag.split([' ', '\n']).next().unwrap_or_default()
}

#[test]
fn what_is_not_finite_is_called_so_and_what_is_absent_is_not() {
    let nan = f64::NAN;
    let broken = ParameterReport {
        seconds: nan,
        final_relative_residual: Some(nan),
        objective_initial: Some(nan),
        objective_final: Some(f64::INFINITY),
        solve_seconds: Some(nan),
        setup: Some(SetupReport { seconds: nan, flops: nan, bytes: 0 }),
        history: vec![StepReport { relative_residual: nan, objective: nan }; 3],
        converged: Some(false),
        ..solved(1)
    };
    let mut report = run([("w".to_owned(), broken), ("v".to_owned(), solved(1))]);
    report.wall_seconds = nan;
    report.flops = nan;
    let page = merge_page(&report, "x", None);
    assert!(page.matches("not finite").count() >= 10, "{}", page.matches("not finite").count());
    assert!(page.contains("1 block did not converge."));
    for word in ["NaN<", ">NaN", "inf<", "=\"NaN", "=\"inf"] {
        assert!(!page.contains(word), "{word}");
    }
    // What no version but the first wrote, at its barest.
    let json = r#"{"version": "", "config_hash": "", "wall_seconds": null, "bytes_read": 0, "bytes_written": 0,
                   "flops": 0, "parameters": {"w": {"method": "average", "seconds": 1, "bytes_read": 0}}}"#;
    let bare: RunReport = serde_json::from_str(json).unwrap();
    let page = merge_page(&bare, "", None);
    assert!(page.contains("not in the record") && page.contains("No steps are in the record"));
    assert!(page.contains("not told apart") && page.contains("no bound in the record"));
    merge_page(&RunReport::default(), "", None);
}

#[test]
fn blocks_stand_longest_first() {
    let with = |seconds: f64| ParameterReport { seconds, ..solved(1) };
    let names = [("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 1.0)];
    let page = merge_page(&run(names.map(|(name, s)| (format!("block-{name}"), with(s)))), "x", None);
    let table = &page[page.find("id=\"table\"").unwrap()..];
    let places = ["b", "c", "a", "d"].map(|name| table.find(&format!("block-{name}")).unwrap());
    assert!(places.is_sorted(), "{places:?}");
}

#[test]
fn two_thousand_blocks_fit_on_a_page() {
    let many = |n: usize| {
        // The shortest do not converge: their curves go first, their rows last.
        let record =
            |k: usize| ParameterReport { seconds: k as f64, converged: Some(k > 100), ..solved(4 + k % 12) };
        merge_page(
            &run((0..n).map(|k| (format!("model.layers.{k}.mlp.down_proj.weight"), record(k)))),
            "x",
            None,
        )
    };
    // A row with its details and three curves is 2 to 3 KB; everything else does not grow with them.
    let page = many(2000);
    assert!(page.len() < 2000 * 4096 + (128 << 10), "{} bytes", page.len());
    assert_eq!(page.matches("<tbody id=\"b").count(), 2000);
    assert_eq!(page.matches("<path").count(), 3 * 2000, "two curves and one small one");
    // Far more are cut, and the page says so.
    let page = many(MAX_ROWS + 1000);
    assert!(page.len() < MAX_ROWS * 4096 + (128 << 10), "{} bytes", page.len());
    assert_eq!(page.matches("<tbody id=\"b").count(), MAX_ROWS);
    assert_eq!(page.matches("<path").count(), MAX_ROWS + 2 * MAX_CURVES);
    assert!(page.contains("The first 5000 of 6000 blocks"));
    assert!(!page.contains("href=\"#b5000\""), "a link to a row that was cut");
}

#[test]
fn long_names_are_cut() {
    let page = merge_page(&run([("x".repeat(1 << 20), solved(1))]), "y", None);
    assert!(page.len() < 128 << 10, "{} bytes", page.len());
}

#[test]
fn a_sweep_lists_its_runs() {
    let run = |ridge: f64, linked| SweepRun {
        name: format!("ridge={ridge}"),
        directory: format!("ridge={ridge}"),
        linked,
        parameters: vec![("solver.ridge".into(), ridge.into())],
        objective_initial: Some(4.0),
        objective_final: Some(1.0),
        ..SweepRun::default()
    };
    let sweep = SweepPage { runs: vec![run(0.5, true), run(0.25, false)], ..SweepPage::default() };
    let page = sweep_page(&sweep, "grid");
    for words in
        ["2 runs", "solver.<wbr>ridge", "href=\"./ridge%3D0.5/report.html\"", "(no record)", "−75.0 %"]
    {
        assert!(page.contains(words), "{words} is missing");
    }
    assert!(!page.contains("href=\"./ridge%3D0.25"));
}
