//! What is linked in keeps to `deny.toml`: the part of `cargo deny check` that needs no network, for machines that lack it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The strings of a list in `deny.toml`; of tables their `crate`.
fn listed(key: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("deny.toml")).expect("deny.toml is there");
    let start = text.find(&format!("\n{key} = [")).unwrap_or_else(|| panic!("deny.toml has `{key}`"));
    let (list, _) = text[start..].split_once("\n]").expect("lists end on a line of their own");
    // The key itself stands before the first quotation mark.
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every package for this machine, tests' included.
fn packages() -> Vec<Value> {
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc is there");
    let told = String::from_utf8(rustc.stdout).expect("UTF-8");
    let host = told.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc names its host");
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()))
        .args(["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", host])
        .current_dir(root())
        .output()
        .expect("cargo is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let used: Vec<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .expect("a graph")
        .iter()
        .map(|node| node["id"].as_str().expect("an id"))
        .collect();
    let all = metadata["packages"].as_array().expect("a list").iter();
    all.filter(|package| used.contains(&package["id"].as_str().expect("an id"))).cloned().collect()
}

fn text<'v>(package: &'v Value, key: &str) -> &'v str {
    package[key].as_str().unwrap_or_default()
}

/// Whether an SPDX expression can be met with what is allowed. `/` is an old way to write OR.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any_of(&words, &mut at, allowed);
    met && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut met = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all_of(words, at, allowed);
    }
    met
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let met = any_of(words, at, allowed);
        *at += 1;
        return met && words.get(*at - 1) == Some(&")");
    }
    let mut name = (*word).to_owned();
    if let (Some(&"WITH"), Some(exception)) = (words.get(*at), words.get(*at + 1)) {
        name += &format!(" WITH {exception}");
        *at += 2;
    }
    allowed.contains(&name)
}

#[test]
fn licences_are_read_as_written() {
    let allowed = ["MIT", "Zlib", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
    for good in [
        "MIT",
        "MIT OR GPL-3.0",
        "GPL-3.0/MIT",
        "(GPL-3.0 OR MIT) AND Zlib",
        "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
    ] {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "Apache-2.0",
        "(MIT",
        "MIT)",
        "MIT GPL-3.0",
        "(GPL-3.0 OR MIT) AND GPL-2.0",
    ] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}

#[test]
fn dependencies_keep_to_deny_toml() {
    let (allowed, skipped, banned) = (listed("allow"), listed("skip"), listed("deny"));
    assert!(allowed.len() > 3 && skipped.len() > 3 && banned.len() > 3);
    let packages = packages();
    assert!(packages.len() > 50, "the graph is there");
    let lock = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock is there");
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in &packages {
        let (name, version, source) =
            (text(package, "name"), text(package, "version"), text(package, "source"));
        let licence = text(package, "license");
        assert!(is_allowed(licence, &allowed), "{name} {version}: licence `{licence}` is not in deny.toml");
        assert!(!banned.iter().any(|b| b == name), "{name} is banned in deny.toml");
        if package["source"].is_null() {
            assert_eq!(name, env!("CARGO_PKG_NAME"), "nothing comes from a path but the crate itself");
            continue;
        }
        assert!(
            source.starts_with("registry+https://github.com/rust-lang/crates.io-index"),
            "{name}: {source}"
        );
        let entry =
            format!("name = \"{name}\"\nversion = \"{version}\"\nsource = \"{source}\"\nchecksum = \"");
        assert!(lock.contains(&entry), "{name} {version} has no checksum in Cargo.lock");
        versions.entry(name).or_default().push(version);
    }
    for (name, versions) in &versions {
        let more = versions.len() > 1 && !skipped.iter().any(|s| s == name);
        assert!(!more, "{name} is linked in several versions ({}): see deny.toml", versions.join(", "));
    }
    for name in &skipped {
        let several = versions.get(name.as_str()).is_some_and(|versions| versions.len() > 1);
        assert!(several, "{name} no longer has several versions: take it out of `skip` in deny.toml");
    }
}
