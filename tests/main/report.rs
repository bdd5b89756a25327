//! `report`, `completions` and `man`: the pages and scripts that the binary writes, and what it refuses.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::util::{Scratch, error_line, strict_json};

/// A record with one solved parameter of this name.
fn record(name: &str) -> Value {
    json!({
        "version": "0.1.0", "config_hash": "c0ffee", "wall_seconds": 1.5, "bytes_read": 10, "bytes_written": 20,
        "flops": 3e9,
        "parameters": { name: {
            "method": "mats", "solver": "pcg", "subspace": "kfac", "iterations": 2, "converged": true,
            "stop_reason": "objective_decrease", "objective_initial": 2.0, "objective_final": null,
            "history": [
                { "relative_residual": 1.0, "objective": 2.0 },
                { "relative_residual": 0.1, "objective": null },
                { "relative_residual": 0.01, "objective": 1.0 },
            ],
            "seconds": 1.0, "bytes_read": 10,
        } },
    })
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/merge.yml")
}

#[test]
fn the_fixtures_merge_has_a_page() {
    let scratch = Scratch::new();
    let config = fixtures();
    let config = config.to_str().expect("a plain path");
    let merge = scratch.run(&["merge", config, "--out", "merged", "--progress", "none"]);
    assert_eq!(merge.code, 0, "{}", merge.stderr);
    let report = scratch.run(&["report", "merged"]);
    assert_eq!(
        (report.code, report.stdout.as_str(), report.stderr.as_str()),
        (0, "merged/report.html\n", "")
    );
    let page = fs::read_to_string(scratch.join("merged/report.html")).expect("its path was printed");
    let record = strict_json(
        &fs::read_to_string(scratch.join("merged/merge_report.json")).expect("a finished run reports"),
    );
    let parameters = record["parameters"].as_object().expect("by name");
    assert_eq!(page.matches("<tbody id=\"b").count(), parameters.len());
    for name in parameters.keys() {
        assert!(page.contains(&name.replace('.', ".<wbr>").replace('_', "_<wbr>")), "{name}");
    }
    let stepped = parameters.values().filter(|p| p.get("history").is_some()).count();
    assert!(stepped > 0);
    assert_eq!(page.matches("<path").count(), 3 * stepped, "two curves and a small one for each");
    for words in [
        "mats: ",
        "objective_<wbr>decrease",
        "merge_method: mats",
        record["config_hash"].as_str().expect("text"),
    ] {
        assert!(page.contains(words), "{words}");
    }
    // Made again, it is the same page; and the directory holds nothing else that is new.
    let again = scratch.run(&["report", "merged/"]);
    assert_eq!((again.code, again.stdout.as_str()), (0, "merged/report.html\n"));
    assert_eq!(fs::read_to_string(scratch.join("merged/report.html")).expect("there"), page);
    let hidden = fs::read_dir(scratch.join("merged"))
        .expect("list")
        .any(|e| e.expect("list").file_name().to_string_lossy().starts_with('.'));
    assert!(!hidden, "a temporary file is left");
}

#[test]
fn hostile_names_and_nulls_are_shown_as_text() {
    let scratch = Scratch::new();
    let name = "</script><script>alert(1)</script>\u{202e}\n\"'<img src=x onerror=alert(1)>";
    scratch.write("run/merge_report.json", record(name).to_string());
    let output = scratch.run(&["report", "run"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    let page = fs::read_to_string(scratch.join("run/report.html")).expect("written");
    assert_eq!(page.matches("<script").count(), 1);
    assert!(!page.contains("<img") && !page.contains('\u{202e}'));
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;"));
    assert!(page.contains("not finite"), "null is not hidden");
}

#[test]
fn what_is_no_record_is_refused() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.join("empty")).expect("create a directory");
    fs::create_dir_all(scratch.join("odd/merge_report.json")).expect("create a directory");
    let whole = record("w").to_string();
    scratch.write("cut/merge_report.json", &whole[..whole.len() / 2]);
    scratch.write("foreign/merge_report.json", "{\"mergekit\": true}");
    scratch.write("text/merge_report.json", "a line\nand another");
    scratch.write("deep/merge_report.json", "[".repeat(1 << 20));
    scratch.write("binary/merge_report.json", [0xff; 64]);
    crate::util::sparse(&scratch.join("long.json"), b"{", (1 << 30) + 1);
    fs::create_dir(scratch.join("long")).expect("create a directory");
    fs::rename(scratch.join("long.json"), scratch.join("long/merge_report.json")).expect("rename a file");
    scratch.write("sweep/sweep.json", "{\"runs\": 3}");
    scratch.write("sweep_cut/sweep.json", "{\"runs\": [");
    for (directory, word) in [
        ("absent", "merge_report.json"),
        ("empty", "finished merge"),
        ("odd", "not a regular file"),
        ("cut", "not all of it"),
        ("foreign", "missing field"),
        ("text", "not a run's record"),
        ("deep", "not a run's record"),
        ("binary", "not a run's record"),
        ("long", "too long"),
        ("sweep", "runs"),
        ("sweep_cut", "not a sweep's record"),
    ] {
        let output = scratch.run(&["report", directory]);
        assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{directory}: {}", output.stderr);
        let line = error_line(&output);
        assert!(line.contains(word) && line.contains(directory), "{directory}: {line}");
        assert!(!scratch.join(directory).join("report.html").exists());
    }
}

#[test]
fn a_page_that_cannot_be_written_is_an_error() {
    let scratch = Scratch::new();
    scratch.write("run/merge_report.json", record("w").to_string());
    scratch.write("run/report.html/kept", "this");
    let output = scratch.run(&["report", "run"]);
    assert!(matches!(output.code, 2 | 6), "{}", output.code);
    assert!(error_line(&output).contains("report.html"));
    let names: Vec<_> = fs::read_dir(scratch.join("run")).expect("list").collect();
    assert_eq!(names.len(), 2, "a temporary file is left");
}

#[test]
fn a_sweep_has_an_index() {
    let scratch = Scratch::new();
    let sweep = json!({
        "version": "0.1.0",
        "runs": [
            { "name": "ridge=0.001,off_diagonal=0.9", "parameters": { "solver.ridge": 0.001, "off_diagonal": 0.9 },
              "objective_initial": 4.0, "objective_final": 1.0, "iterations": 12, "converged": true },
            { "name": "lost", "objective_final": null },
            { "name": "../outside" },
            { "directory": 3, "name": ["odd"] },
            "odd",
        ],
    });
    scratch.write("grid/sweep.json", sweep.to_string());
    scratch.write("grid/ridge=0.001,off_diagonal=0.9/merge_report.json", record("w").to_string());
    scratch.write("outside/merge_report.json", record("w").to_string());
    let output = scratch.run(&["report", "grid"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "grid/report.html\n"), "{}", output.stderr);
    assert!(output.stderr.contains("lost") && output.stderr.contains("../outside"), "{}", output.stderr);
    let page = fs::read_to_string(scratch.join("grid/report.html")).expect("written");
    for words in
        ["5 runs", "./ridge%3D0.001%2Coff_diagonal%3D0.9/report.html", "(no record)", "−75.0 %", "not finite"]
    {
        assert!(page.contains(words), "{words}");
    }
    assert!(scratch.join("grid/ridge=0.001,off_diagonal=0.9/report.html").exists());
    assert!(!scratch.join("outside/report.html").exists(), "a name out of a file led outside");
    // A merge's own record goes first.
    scratch.write("grid/merge_report.json", record("w").to_string());
    assert_eq!(scratch.run(&["report", "grid"]).code, 0);
    let page = fs::read_to_string(scratch.join("grid/report.html")).expect("written");
    assert!(page.contains("Merge report"));
}

/// The script goes through the shell's own parser, where that shell is there.
fn parses(shell: &str, args: &[&str], script: &std::path::Path) {
    match Command::new(shell).args(args).arg(script).stdin(Stdio::null()).output() {
        Ok(output) => {
            assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr))
        }
        Err(error) => eprintln!("{shell} is not here: {error}"),
    }
}

#[test]
fn completions_know_every_command() {
    let scratch = Scratch::new();
    for (shell, args) in [
        ("bash", &["--norc", "-n"][..]),
        ("zsh", &["-f", "-n"]),
        ("fish", &["--no-config", "--no-execute"]),
        ("elvish", &["-compileonly"]),
        ("powershell", &[]),
    ] {
        let output = scratch.run(&["completions", shell]);
        assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{shell}");
        for word in ["mats-stream", "merge", "plan", "inspect", "diff", "report", "completions", "max-memory"]
        {
            assert!(output.stdout.contains(word), "{shell}: {word}");
        }
        let script = scratch.write(shell, &output.stdout);
        if shell != "powershell" {
            parses(shell, args, &script);
        }
    }
    assert_eq!(scratch.run(&["completions", "csh"]).code, 2);
}

#[test]
fn man_pages_for_all_commands() {
    let scratch = Scratch::new();
    let main = scratch.run(&["man"]);
    assert_eq!((main.code, main.stderr.as_str()), (0, ""));
    assert!(
        main.stdout.contains(".TH MATS-STREAM 1") && main.stdout.contains("EXIT STATUS"),
        "{}",
        main.stdout
    );
    for _ in 0..2 {
        let output = scratch.run(&["man", "share/man1"]);
        assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (0, "", ""));
    }
    let mut pages: Vec<String> = fs::read_dir(scratch.join("share/man1"))
        .expect("made")
        .map(|e| e.expect("list").file_name().into_string().expect("plain names"))
        .collect();
    pages.sort();
    assert!(!pages.iter().any(|page| page.ends_with("-help.1")), "{pages:?}");
    // What the page above refers to is there, and nothing else.
    for page in pages.iter().filter(|page| *page != "mats-stream.1") {
        let name = page.strip_suffix(".1").expect("section 1");
        let above = name.rsplit_once('-').map(|(above, _)| above).expect("below the program's");
        let above = fs::read_to_string(scratch.join(format!("share/man1/{above}.1"))).expect(page);
        let name = name.replace('-', "\\-");
        assert!(above.contains(&format!("{name}(1)")), "{page}: {above}");
    }
    assert!(pages.contains(&"mats-stream-statistics-convert.1".to_owned()), "{pages:?}");
    for command in ["merge", "plan", "inspect", "diff", "report", "completions", "man"] {
        let text =
            fs::read_to_string(scratch.join(format!("share/man1/mats-stream-{command}.1"))).expect(command);
        assert!(text.contains(&format!(".TH MATS-STREAM-{} 1", command.to_uppercase())), "{text}");
    }
    assert_eq!(
        fs::read_to_string(scratch.join("share/man1/mats-stream.1")).expect("written"),
        main.stdout,
        "the same page, however it is asked for"
    );
    scratch.write("file", "");
    assert_eq!(scratch.run(&["man", "file/below"]).code, 2);
}
