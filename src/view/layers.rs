//! Which layer a tensor belongs to, by its name, and the names it has where layers are taken out of a model and
//! put elsewhere. No table of architectures: a layer's number is the first number in a name, as in
//! `model.layers.12.mlp.weight`.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

use super::names;

/// Where a name's layer number stands, and the number; `None` for a tensor outside the layers.
pub fn layer_of(name: &str) -> Option<(Range<usize>, usize)> {
    let mut start = 0;
    for part in name.split('.') {
        let number = part.len() <= 6 && !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if number {
            return part.parse().ok().map(|layer| (start..start + part.len(), layer));
        }
        start += part.len() + 1;
    }
    None
}

/// The tensors of one section of a model under the names of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Tensors whose name does not begin with this are not seen; empty, or it ends with a dot.
    pub prefix: String,
    /// `None`: all tensors, as they are.
    pub layers: Option<Layers>,
}

/// Some of a model's layers, and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// First layer in the model.
    pub first: usize,
    /// Layers of the output that they become.
    pub output: Range<usize>,
    /// What stands before the layers is seen too …
    pub before: bool,
    /// … or what stands after them.
    pub after: bool,
}

impl Section {
    /// The name that the output's tensor `name` has in the model; `None` if it is not in this section.
    pub fn stored<'n>(&self, name: &'n str) -> Option<Cow<'n, str>> {
        let Some(layers) = &self.layers else {
            return name.starts_with(&self.prefix).then_some(Cow::Borrowed(name));
        };
        self.renamed(name, |layer| {
            layers.output.contains(&layer).then(|| layer - layers.output.start + layers.first)
        })
    }

    /// The name in the output of the model's tensor `name`; `None` if it is not in this section.
    pub fn output<'n>(&self, name: &'n str) -> Option<Cow<'n, str>> {
        let Some(layers) = &self.layers else {
            return name.starts_with(&self.prefix).then_some(Cow::Borrowed(name));
        };
        let stored = layers.first..layers.first + layers.output.len();
        self.renamed(name, |layer| {
            stored.contains(&layer).then(|| layer - layers.first + layers.output.start)
        })
    }

    fn renamed<'n>(&self, name: &'n str, layer: impl Fn(usize) -> Option<usize>) -> Option<Cow<'n, str>> {
        let rest = name.strip_prefix(&self.prefix)?;
        let layers = self.layers.as_ref()?;
        let Some((at, old)) = layer_of(rest) else {
            let seen = if names::stands_before_layers(name) { layers.before } else { layers.after };
            return seen.then_some(Cow::Borrowed(name));
        };
        let new = layer(old)?;
        let digits = &rest[at.clone()];
        // `layers.07` would come back as `layers.7`.
        if digits.len() > 1 && digits.starts_with('0') {
            return None;
        }
        if new == old {
            return Some(Cow::Borrowed(name));
        }
        Some(Cow::Owned(format!("{}{}{new}{}", self.prefix, &rest[..at.start], &rest[at.end..])))
    }
}

/// The stacks of layers below `prefix`, as `model.layers`, and the highest layer number plus 1.
pub fn stacks<'n>(names: impl Iterator<Item = &'n str>, prefix: &str) -> (BTreeSet<String>, usize) {
    let (mut stacks, mut count) = (BTreeSet::new(), 0);
    for name in names {
        let Some((at, layer)) = name.strip_prefix(prefix).and_then(layer_of) else { continue };
        count = count.max(layer + 1);
        let stack = &name[..prefix.len() + at.start];
        let stack = stack.trim_end_matches('.');
        if !stacks.contains(stack) {
            stacks.insert(stack.to_owned());
        }
    }
    (stacks, count)
}

/// The prefixes that a module's name may mean: paths that end with it, each up to its first place in a name.
pub fn module_prefixes<'n>(names: impl Iterator<Item = &'n str>, module: &str) -> BTreeSet<String> {
    let mut prefixes = BTreeSet::new();
    for name in names {
        let mut from = 0;
        while let Some(found) = name[from..].find(module) {
            let (start, end) = (from + found, from + found + module.len());
            let whole = (start == 0 || name.as_bytes()[start - 1] == b'.') && name[end..].starts_with('.');
            if whole {
                let prefix = &name[..=end];
                if !prefixes.contains(prefix) {
                    prefixes.insert(prefix.to_owned());
                }
                break;
            }
            from = end;
            if !name.is_char_boundary(from) || module.is_empty() {
                break;
            }
        }
    }
    prefixes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_number_is_the_first_in_a_name() {
        assert_eq!(layer_of("model.layers.12.mlp.weight"), Some((13..15, 12)));
        assert_eq!(layer_of("encoder.block.3.layer.0.q.weight"), Some((14..15, 3)));
        assert_eq!(layer_of("h.0.w"), Some((2..3, 0)));
        for name in ["lm_head.weight", "x.99999999999999999999.w", "x.+1.w", "x..w", ""] {
            assert_eq!(layer_of(name), None, "{name}");
        }
    }

    #[test]
    fn names_go_there_and_back() {
        let section = Section {
            prefix: "model.".to_owned(),
            layers: Some(Layers { first: 8, output: 2..4, before: true, after: false }),
        };
        for (output, stored) in [
            ("model.layers.2.mlp.experts.0.w", Some("model.layers.8.mlp.experts.0.w")),
            ("model.layers.3.w", Some("model.layers.9.w")),
            ("model.layers.4.w", None),
            ("model.layers.1.w", None),
            ("model.embed_tokens.weight", Some("model.embed_tokens.weight")),
            ("model.norm.weight", None),
            ("lm_head.weight", None),
        ] {
            assert_eq!(section.stored(output).as_deref(), stored, "{output}");
            if let Some(stored) = stored {
                assert_eq!(section.output(stored).as_deref(), Some(output), "{stored}");
            }
        }
        assert_eq!(section.output("model.layers.10.w"), None);
        assert_eq!(section.output("model.layers.09.w"), None);
    }

    #[test]
    fn modules_are_found_by_name() {
        let names = [
            "model.encoder.layers.0.w",
            "model.encoder.norm.w",
            "model.decoder.encoder_attn.w",
            "encoders.w",
        ];
        let found = |module| module_prefixes(names.iter().copied(), module).into_iter().collect::<Vec<_>>();
        assert_eq!(found("encoder"), ["model.encoder."]);
        assert_eq!(found("decoder"), ["model.decoder."]);
        assert_eq!(found("model"), ["model."]);
        assert_eq!(found("model.encoder"), ["model.encoder."]);
        assert!(found("text_decoder").is_empty() && found("").is_empty());
        let (stacks, count) = stacks(names.iter().copied(), "model.");
        assert_eq!(
            (stacks.into_iter().collect::<Vec<_>>(), count),
            (vec!["model.encoder.layers".to_owned()], 1)
        );
    }
}
