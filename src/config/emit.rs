//! Owns the way back from nodes to YAML text, for a configuration that was derived from a written one. Called by
//! `sweep`; comments, anchors and the original's spelling of collections are gone, keys and values are not.

use std::fmt::Write as _;

use super::yaml::{Entry, Node, Value};

/// `root` as block YAML that [`super::yaml::parse`] reads as the same tree, lines aside.
pub(super) fn emit(root: &[Entry]) -> String {
    let mut out = String::new();
    mapping(&mut out, root, 0);
    out
}

fn mapping(out: &mut String, entries: &[Entry], indent: usize) {
    for entry in entries {
        out.extend(std::iter::repeat_n(' ', indent));
        // A key is a word whatever it looks like; quotes keep it one.
        push_scalar(out, &entry.key, true);
        out.push(':');
        match inline(&entry.value) {
            Some(text) => {
                out.push(' ');
                out.push_str(&text);
                out.push('\n');
            }
            None => {
                out.push('\n');
                block(out, &entry.value, indent + 2);
            }
        }
    }
}

/// A collection on lines of its own.
fn block(out: &mut String, node: &Node, indent: usize) {
    match &node.value {
        Value::Mapping(entries) => mapping(out, entries, indent),
        Value::Sequence(items) => {
            for item in items {
                let mut text = String::new();
                match inline(item) {
                    Some(scalar) => {
                        let _ = writeln!(text, "{:indent$}{scalar}", "", indent = indent + 2);
                    }
                    None => block(&mut text, item, indent + 2),
                }
                // The dash stands in the item's own indentation.
                text.replace_range(indent..indent + 2, "- ");
                out.push_str(&text);
            }
        }
        Value::Scalar { text, plain } => push_scalar(out, text, *plain),
    }
}

/// A scalar, an empty collection or a list of short words on one line; `None` for the rest.
fn inline(node: &Node) -> Option<String> {
    /// Longer lists get a line an item.
    const ITEMS: usize = 16;
    let mut out = String::new();
    match &node.value {
        Value::Scalar { text, plain } => push_scalar(&mut out, text, *plain),
        Value::Mapping(entries) if entries.is_empty() => out.push_str("{}"),
        Value::Sequence(items)
            if items.len() <= ITEMS
                && items.iter().all(|item| matches!(item.value, Value::Scalar { .. })) =>
        {
            let words: Vec<String> = items.iter().filter_map(inline).collect();
            let _ = write!(out, "[{}]", words.join(", "));
        }
        _ => return None,
    }
    Some(out)
}

/// Plain where it was and where nothing in it could mean anything else, quoted elsewhere.
fn push_scalar(out: &mut String, text: &str, plain: bool) {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | '+' | '-');
    let starts_well = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | '+' | '-');
    if plain && text.is_empty() {
        out.push_str("null");
    } else if plain
        && (text == "~" || text.chars().all(safe) && text.starts_with(starts_well))
        && !matches!(text, "-" | "--" | "---" | "...")
    {
        out.push_str(text);
    } else {
        out.push_str(&quoted(text));
    }
}

/// A double-quoted scalar on one line.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::yaml::parse;
    use super::*;

    /// Values without their lines. A plain word that had to be quoted is a word still: it was no number before.
    fn shape(node: &Node) -> String {
        match &node.value {
            Value::Scalar { .. } if node.is_null() => "null".to_owned(),
            Value::Scalar { text, .. } => format!("{text:?}"),
            Value::Sequence(items) => format!("{:?}", items.iter().map(shape).collect::<Vec<_>>()),
            Value::Mapping(entries) => {
                format!("{:?}", entries.iter().map(|e| (&e.key, shape(&e.value))).collect::<Vec<_>>())
            }
        }
    }

    fn entries(node: &Node) -> &[Entry] {
        match &node.value {
            Value::Mapping(entries) => entries,
            _ => panic!("the documents here are mappings"),
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for text in [
            "a: 1\nb: [1, 2.5, -3e-4]\nc: {d: e, f: [{x: 1, y: [1, [2, 3]]}, z]}",
            "a: \"1\"\nb: 'true'\n\"key: with\": \"a # b\"\nc: ~\nd:\ne: null\nf: {}\ng: []",
            "a: |\n  two\n  lines\nb: >\n  folded\n  text\nc: \"tab\\tand \\\"quotes\\\" \\\\\"",
            "- : a".strip_prefix("- ").unwrap_or(""),
            "base: &x {weight: 1}\nother: {<<: *x, lambda: 2}\nlist: [*x, *x]",
            "a: plain words, with [brackets\nb: -\nc: --- \nd: 'x: y'\ne: ünï\u{2028}cöde",
            "a: [[], {}, [[1]]]\nb:\n  - - 1\n    - 2\n  - c: 3\n    d:\n      - e",
        ] {
            let Ok(Some(first)) = parse(Path::new("a.yml"), text) else { continue };
            let written = emit(entries(&first));
            let second = parse(Path::new("b.yml"), &written).unwrap_or_else(|e| panic!("{e}\n{written}"));
            assert_eq!(second.as_ref().map(shape), Some(shape(&first)), "{written}");
            // Numbers stay numbers, quoted text stays text.
            let again = emit(entries(&second.expect("compared")));
            assert_eq!(again, written);
        }
    }
}
