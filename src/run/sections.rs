//! What slices and vocabularies make untrue in `config.json`: counts of layers, lists with one entry a layer, the size of
//! the vocabulary. Told by the values that are there, not by architecture.

use serde_json::{Map, Value};

use crate::config::{MergeConfig, SliceLayers};
use crate::error::Error;
use crate::merge::Inputs;
use crate::view::layers::stacks;

/// Keys that count a model's layers.
const COUNTS: [&str; 6] = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_layer", "n_blocks"];

/// The layers of the output of one module, in order.
struct Assembly<'c> {
    module: Option<&'c str>,
    line: usize,
    /// Section of the config, and the layer of its first source.
    layers: Vec<(usize, usize)>,
}

/// Puts right in `config` (the reference's `config.json`) what the sections change; warnings go to `warnings`.
///
/// # Errors
/// [`Error::Section`] where a module's layer count changes and it cannot be told which key holds it.
pub(super) fn patch_layers(
    merge: &MergeConfig,
    inputs: &Inputs,
    config: &mut Value,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    for assembly in assemblies(merge) {
        let new = assembly.layers.len();
        let reference = &inputs.checkpoints[inputs.reference()];
        // Of a module only the names know the count.
        let names: Vec<&str> = reference.model().tensors().map(|tensor| tensor.name.as_str()).collect();
        let section = assembly.layers.first().map(|(section, _)| *section);
        let prefix = section.and_then(|k| inputs.sections.get(k)).map_or("", |part| {
            part.checkpoints[part.reference()].section().map_or("", |section| section.prefix.as_str())
        });
        let named = stacks(names.iter().copied(), prefix).1;
        let targets = targets(config, assembly.module, named);
        if targets.is_empty() {
            if new == named {
                continue;
            }
            let what = format!(
                "has {new} layers now (it had {named}), and no key of config.json is known to count them"
            );
            match assembly.module {
                None => warnings.push(format!("slices: the output {what}: set it by hand")),
                Some(module) => {
                    return Err(Error::Section {
                        config: merge.path.display().to_string(),
                        line: assembly.line,
                        key: format!("modules.{}", crate::read::escaped(module)),
                        what,
                    });
                }
            }
        }
        for (path, keys) in targets {
            let lists = lists(inputs, &assembly, &path, config);
            let Some(object) = object(config, &path) else { continue };
            for key in keys {
                object.insert(key, new.into());
            }
            for (key, list) in lists {
                object.insert(key, list);
            }
        }
    }
    Ok(())
}

/// Sets the number of rows of the embeddings wherever `config` states one.
pub(super) fn patch_vocabulary(config: &mut Value, rows: usize) {
    let Some(root) = config.as_object_mut() else { return };
    if let Some(size) = root.get_mut("vocab_size") {
        *size = rows.into();
    }
    if let Some(size) = root.get_mut("text_config").and_then(|text| text.get_mut("vocab_size")) {
        *size = rows.into();
    }
}

fn assemblies(merge: &MergeConfig) -> Vec<Assembly<'_>> {
    let mut found: Vec<Assembly<'_>> = Vec::new();
    for (k, section) in merge.sections.iter().enumerate() {
        let Some(SliceLayers { ranges, line, .. }) = &section.layers else { continue };
        let Some(first) = ranges.first() else { continue };
        let module = section.module.as_deref();
        let layers = first.clone().map(|layer| (k, layer));
        match found.iter_mut().find(|assembly| assembly.module == module) {
            Some(assembly) => assembly.layers.extend(layers),
            None => found.push(Assembly { module, line: *line, layers: layers.collect() }),
        }
    }
    found
}

/// Objects of `config`, by the key of the nested one (empty: the root), and the keys there that count the layers.
fn targets(config: &Value, module: Option<&str>, named: usize) -> Vec<(String, Vec<String>)> {
    let Some(root) = config.as_object() else { return Vec::new() };
    let counts = |object: &Map<String, Value>, keys: &[String], all: bool| -> Vec<String> {
        let counts = |key: &&String| {
            let value = object.get(*key).and_then(Value::as_u64);
            value.is_some_and(|value| all || value == named as u64)
        };
        keys.iter().filter(counts).cloned().collect()
    };
    let plain: Vec<String> = COUNTS.iter().map(|key| (*key).to_owned()).collect();
    let Some(module) = module.filter(|module| *module != "default") else {
        let own = counts(root, &plain, true);
        if !own.is_empty() {
            return vec![(String::new(), own)];
        }
        let nested = root.get("text_config").and_then(Value::as_object);
        let nested = nested.map(|nested| counts(nested, &plain, true)).unwrap_or_default();
        return if nested.is_empty() { Vec::new() } else { vec![("text_config".to_owned(), nested)] };
    };
    let name = module.rsplit('.').next().unwrap_or(module);
    // A module's own keys: `encoder_layers`, `num_decoder_layers`, `decoder_config: {num_layers}`.
    let own: Vec<String> =
        [format!("{name}_layers"), format!("num_{name}_layers"), format!("n_{name}_layers")].into();
    let mut keys = counts(root, &own, true);
    if name == "encoder" {
        // T5 and Whisper state the encoder's under the plain names.
        keys.extend(counts(root, &plain, false));
    }
    let mut found = Vec::new();
    if !keys.is_empty() {
        found.push((String::new(), keys));
    }
    let kind = name.split('_').next().unwrap_or(name);
    let kind = match kind {
        "language" => "text",
        "visual" => "vision",
        kind => kind,
    };
    for nested in [format!("{name}_config"), format!("{kind}_config")] {
        if found.iter().any(|(path, _)| *path == nested) {
            continue;
        }
        if let Some(object) = root.get(&nested).and_then(Value::as_object) {
            let mut keys = counts(object, &plain, false);
            // `depth` is what vision towers call it.
            keys.extend(counts(object, &["depth".to_owned()], false));
            if !keys.is_empty() {
                found.push((nested, keys));
            }
        }
    }
    found
}

/// Lists with one entry a layer (`layer_types`), put together as the layers are.
fn lists(inputs: &Inputs, assembly: &Assembly<'_>, path: &str, config: &mut Value) -> Vec<(String, Value)> {
    let Some(reference) = object(config, path) else { return Vec::new() };
    let count = COUNTS.iter().find_map(|key| reference.get(*key)?.as_u64());
    let keys: Vec<(String, Vec<Value>)> = reference
        .iter()
        .filter_map(|(key, value)| Some((key.clone(), value.as_array()?.clone())))
        .filter(|(key, list)| Some(list.len() as u64) == count && key.contains("layer"))
        .collect();
    let entry = |key: &str, own: &[Value], section: usize, layer: usize| -> Option<Value> {
        // The model that the layer comes from knows best.
        let part = inputs.sections.get(section)?;
        let source = part.models.first()?.source;
        let config = part.checkpoints[source].config()?;
        let object = if path.is_empty() { Some(config) } else { config.get(path) };
        let theirs = object.and_then(|object| object.get(key)?.as_array()?.get(layer).cloned());
        theirs.or_else(|| own.get(layer).cloned())
    };
    keys.into_iter()
        .filter_map(|(key, own)| {
            let list: Option<Vec<Value>> =
                assembly.layers.iter().map(|(section, layer)| entry(&key, &own, *section, *layer)).collect();
            Some((key, Value::Array(list?)))
        })
        .collect()
}

fn object<'c>(config: &'c mut Value, path: &str) -> Option<&'c mut Map<String, Value>> {
    if path.is_empty() { config.as_object_mut() } else { config.get_mut(path)?.as_object_mut() }
}
