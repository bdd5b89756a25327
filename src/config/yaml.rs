//! Owns the step from bytes to a small tree of YAML nodes in which every node knows its line: opening the
//! file, the budgets against hostile input, anchors, merge keys and duplicate keys. Called by
//! [`MergeConfig::load`] only; never knows what a key means.
//!
//! The tree is built here from the parser's events rather than through serde, because an error about a
//! *value* (an unknown method, a negative weight) must name the line of that value, also behind an alias or a
//! merge key.
//!
//! [`MergeConfig::load`]: super::MergeConfig::load

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde_saphyr::granit_parser::{self, Event, Parser, ScalarStyle, Tag};

use super::error::{ConfigError, one_line};

/// Bytes of the longest config accepted.
pub(super) const MAX_BYTES: usize = 1 << 20;
/// Nodes, those copied by aliases included. A config of a thousand models has some ten thousand.
const MAX_NODES: usize = 40_000;
/// Bytes of all scalars, those copied by aliases included: many aliases of one long scalar are a bomb of few
/// nodes.
const MAX_SCALAR_BYTES: usize = 8 << 20;
/// Collections inside collections. Bounds every recursion over the tree, the chain of nested rounds included.
const MAX_DEPTH: usize = 64;

/// One YAML value and the line (from 1) it is written on; behind an alias, the line of the anchored original.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub line: usize,
    pub value: Value,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    /// `plain`: written without quotes, so that it may be a number, a boolean or null.
    Scalar {
        text: String,
        plain: bool,
    },
    Sequence(Vec<Node>),
    Mapping(Vec<Entry>),
}

/// One `key: value` of a mapping; `line` is the key's.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: String,
    pub line: usize,
    pub value: Node,
}

impl Node {
    pub fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// What an error message calls this node.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Scalar { .. } if self.is_null() => "nothing".to_owned(),
            Value::Scalar { text, .. } => format!("`{}`", one_line(text)),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        }
    }
}

/// The text of the config at `path`.
///
/// # Errors
/// Anything but a regular file of at most [`MAX_BYTES`] bytes of UTF-8. A FIFO or device is refused without
/// waiting.
pub(super) fn read_text(path: &Path) -> Result<String, ConfigError> {
    let io_error = |doing| move |source: io::Error| ConfigError::Io { path: path.to_owned(), doing, source };
    // NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file =
        rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from).map_err(io_error("open"))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(io_error("inspect"))?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a directory" } else { "a FIFO, socket or device" };
        return Err(ConfigError::NotRegular { path: path.to_owned(), found });
    }
    let mut bytes = Vec::new();
    // Bounded by what is read, not by the length reported: the file may grow meanwhile.
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(io_error("read"))?;
    if bytes.len() > MAX_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..offset].iter().filter(|&&b| b == b'\n').count();
        ConfigError::NotUtf8 { path: path.to_owned(), line, offset }
    })
}

/// The single document of `text` as a tree; `None` if there is nothing but comments.
///
/// # Errors
/// Invalid YAML, a budget exceeded, a duplicate key, a foreign tag, more than one document.
pub(super) fn parse(path: &Path, text: &str) -> Result<Option<Node>, ConfigError> {
    let mut options = granit_parser::options! {
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    options.set_emit_comments(false);
    let mut builder =
        Builder { path, frames: Vec::new(), anchors: HashMap::new(), nodes: 0, scalar_bytes: 0, root: None };
    let mut documents = 0_usize;
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            line: error.marker().line(),
            column: error.marker().col() + 1,
            message: one_line(&error.info()),
        })?;
        let line = span.start.line();
        match event {
            Event::DocumentStart(..) => {
                documents += 1;
                if documents > 1 {
                    let what = "a second document starts here; give each merge a file of its own";
                    return Err(builder.structure(what.to_owned(), line));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                builder.scalar(&text, style, anchor, tag.as_deref(), line)?
            }
            Event::SequenceStart(_, anchor, tag) => {
                builder.open(Collection::Sequence(Vec::new()), "seq", anchor, tag.as_deref(), line)?;
            }
            Event::MappingStart(_, anchor, tag) => {
                builder.open(
                    Collection::Mapping(MappingFrame::default()),
                    "map",
                    anchor,
                    tag.as_deref(),
                    line,
                )?;
            }
            Event::SequenceEnd | Event::MappingEnd => builder.close()?,
            Event::Alias(id) => builder.alias(id, line)?,
            _ => {}
        }
    }
    Ok(builder.root)
}

/// A collection whose end has not been seen.
struct Frame {
    line: usize,
    anchor: usize,
    collection: Collection,
}

enum Collection {
    Sequence(Vec<Node>),
    Mapping(MappingFrame),
}

#[derive(Default)]
struct MappingFrame {
    entries: Vec<Entry>,
    /// The key read last, its line, and whether it is a merge key; its value comes next.
    pending: Option<(String, usize, bool)>,
    /// Key → the line it was first given on.
    seen: HashMap<String, usize>,
    merge_line: Option<usize>,
    /// Mappings named by `<<`, first wins.
    merged: Vec<Node>,
}

struct Builder<'p> {
    path: &'p Path,
    frames: Vec<Frame>,
    /// Finished anchored nodes by the parser's id.
    anchors: HashMap<usize, Node>,
    nodes: usize,
    scalar_bytes: usize,
    root: Option<Node>,
}

impl Builder<'_> {
    fn scalar(
        &mut self,
        text: &str,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
        line: usize,
    ) -> Result<(), ConfigError> {
        let mut plain = style == ScalarStyle::Plain;
        if let Some(tag) = tag {
            match tag.core_suffix() {
                Some("str") => plain = false,
                Some("int" | "float" | "bool" | "null") => plain = true,
                _ if tag.original() == "!" => plain = false,
                _ => return Err(self.foreign_tag(tag, line)),
            }
        }
        self.charge(1, text.len(), line)?;
        self.finish(Node { line, value: Value::Scalar { text: text.to_owned(), plain } }, anchor)
    }

    fn open(
        &mut self,
        collection: Collection,
        core: &str,
        anchor: usize,
        tag: Option<&Tag>,
        line: usize,
    ) -> Result<(), ConfigError> {
        if let Some(tag) = tag
            && tag.core_suffix() != Some(core)
            && tag.original() != "!"
        {
            return Err(self.foreign_tag(tag, line));
        }
        if self.expects_key() {
            return Err(self.structure("a key must be a single word, not a list or mapping".to_owned(), line));
        }
        self.check_depth(1, line)?;
        self.charge(1, 0, line)?;
        self.frames.push(Frame { line, anchor, collection });
        Ok(())
    }

    fn close(&mut self) -> Result<(), ConfigError> {
        // The parser pairs starts with ends; with nothing open there is nothing to do.
        let Some(frame) = self.frames.pop() else {
            return Ok(());
        };
        let value = match frame.collection {
            Collection::Sequence(items) => Value::Sequence(items),
            Collection::Mapping(mapping) => Value::Mapping(mapping.into_entries()),
        };
        self.finish(Node { line: frame.line, value }, frame.anchor)
    }

    fn alias(&mut self, id: usize, line: usize) -> Result<(), ConfigError> {
        // Weighed before it is copied, so that a bomb costs nothing.
        let Some(weight) = self.anchors.get(&id).map(Weight::of) else {
            return Err(self.structure("an alias stands inside the very node it names".to_owned(), line));
        };
        self.check_depth(weight.height, line)?;
        self.charge(weight.nodes, weight.scalar_bytes, line)?;
        match self.anchors.get(&id).cloned() {
            Some(copy) => self.finish(copy, 0),
            None => Ok(()),
        }
    }

    /// Puts a finished node where it belongs: a key, a value, an item or the root.
    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), ConfigError> {
        if anchor != 0 {
            let weight = Weight::of(&node);
            self.charge(weight.nodes, weight.scalar_bytes, node.line)?;
            self.anchors.insert(anchor, node.clone());
        }
        if self.expects_key() {
            return self.key(node);
        }
        let Some(frame) = self.frames.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut frame.collection {
            Collection::Sequence(items) => items.push(node),
            Collection::Mapping(mapping) => match mapping.pending.take() {
                Some((_, line, true)) => {
                    let sources = match node {
                        Node { value: Value::Sequence(items), .. } => items,
                        single => vec![single],
                    };
                    if let Some(other) = sources.iter().find(|s| !matches!(s.value, Value::Mapping(_))) {
                        let what = format!(
                            "a merge key takes a mapping or a list of mappings, got {}",
                            other.describe()
                        );
                        return Err(self.structure(what, line));
                    }
                    mapping.merged.extend(sources);
                }
                Some((key, line, false)) => mapping.entries.push(Entry { key, line, value: node }),
                None => {}
            },
        }
        Ok(())
    }

    fn key(&mut self, node: Node) -> Result<(), ConfigError> {
        let line = node.line;
        let Value::Scalar { text, plain } = node.value else {
            return Err(self.structure("a key must be a single word, not a list or mapping".to_owned(), line));
        };
        let is_merge = plain && text == "<<";
        let Some(Frame { collection: Collection::Mapping(mapping), .. }) = self.frames.last_mut() else {
            return Ok(());
        };
        let first =
            if is_merge { mapping.merge_line.replace(line) } else { mapping.seen.insert(text.clone(), line) };
        if let Some(first_line) = first {
            let key = join(&self.key_path(), &text);
            return Err(ConfigError::DuplicateKey { path: self.path.to_owned(), line, key, first_line });
        }
        mapping.pending = Some((text, line, is_merge));
        Ok(())
    }

    fn expects_key(&self) -> bool {
        let collection = self.frames.last().map(|frame| &frame.collection);
        matches!(collection, Some(Collection::Mapping(mapping)) if mapping.pending.is_none())
    }

    /// Where the builder stands, as `models[1].parameters`.
    fn key_path(&self) -> String {
        let mut out = String::new();
        for frame in &self.frames {
            match &frame.collection {
                Collection::Sequence(items) => out.push_str(&format!("[{}]", items.len())),
                Collection::Mapping(mapping) => {
                    if let Some((key, ..)) = &mapping.pending {
                        out = join(&out, key);
                    }
                }
            }
        }
        out
    }

    fn check_depth(&self, height: usize, line: usize) -> Result<(), ConfigError> {
        if self.frames.len() + height > MAX_DEPTH {
            return Err(self.budget("nesting", MAX_DEPTH, line));
        }
        Ok(())
    }

    fn charge(&mut self, nodes: usize, scalar_bytes: usize, line: usize) -> Result<(), ConfigError> {
        self.nodes = self.nodes.saturating_add(nodes);
        self.scalar_bytes = self.scalar_bytes.saturating_add(scalar_bytes);
        if self.nodes > MAX_NODES {
            return Err(self.budget("the number of values, aliases followed,", MAX_NODES, line));
        }
        if self.scalar_bytes > MAX_SCALAR_BYTES {
            return Err(self.budget("the text of all values, aliases followed,", MAX_SCALAR_BYTES, line));
        }
        Ok(())
    }

    fn budget(&self, what: &'static str, limit: usize, line: usize) -> ConfigError {
        ConfigError::Budget { path: self.path.to_owned(), line, what, limit }
    }

    fn structure(&self, what: String, line: usize) -> ConfigError {
        ConfigError::Structure { path: self.path.to_owned(), line, key: self.key_path(), what }
    }

    fn foreign_tag(&self, tag: &Tag, line: usize) -> ConfigError {
        self.structure(format!("the YAML tag `{}` has no meaning here", one_line(&tag.original())), line)
    }
}

impl MappingFrame {
    /// The mapping's own entries, then those of its merge sources that it does not give itself.
    fn into_entries(mut self) -> Vec<Entry> {
        for source in self.merged {
            let Value::Mapping(entries) = source.value else {
                continue;
            };
            for entry in entries {
                if self.seen.insert(entry.key.clone(), entry.line).is_none() {
                    self.entries.push(entry);
                }
            }
        }
        self.entries
    }
}

/// What a subtree costs when it is copied.
struct Weight {
    nodes: usize,
    scalar_bytes: usize,
    height: usize,
}

impl Weight {
    fn of(node: &Node) -> Self {
        let own_bytes = if let Value::Scalar { text, .. } = &node.value { text.len() } else { 0 };
        let mut total = Self { nodes: 1, scalar_bytes: own_bytes, height: 0 };
        let mut add = |child: &Node, key_bytes: usize| {
            let weight = Self::of(child);
            total.nodes += weight.nodes;
            total.scalar_bytes += weight.scalar_bytes + key_bytes;
            total.height = total.height.max(weight.height);
        };
        match &node.value {
            Value::Scalar { .. } => return total,
            Value::Sequence(items) => items.iter().for_each(|item| add(item, 0)),
            Value::Mapping(entries) => entries.iter().for_each(|entry| add(&entry.value, entry.key.len())),
        }
        total.height += 1;
        total
    }
}

/// `prefix.key`, the key cut to one line.
pub(super) fn join(prefix: &str, key: &str) -> String {
    let key = one_line(key);
    if prefix.is_empty() { key } else { format!("{prefix}.{key}") }
}
