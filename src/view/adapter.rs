//! PEFT adapters: which tensors of a checkpoint one changes, and by which product. Reads `adapter_config.json` and the
//! headers of `adapter_model.safetensors`; the products themselves are formed by [`super::Model`] as values are read.
//!
//! Every setting that changes what the adapter means is either carried out or refused by name: an adapter that is
//! half understood would merge without a word and be wrong.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::read::{
    Checkpoint, IoMode, MAX_MODEL_CONFIG_BYTES, ReadError, TensorMeta, escaped, read_small_file,
};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const PICKLED_FILE: &str = "adapter_model.bin";
/// What PEFT puts before the names of the model it wraps.
const PREFIX: &str = "base_model.model.";

/// Why an adapter cannot be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file of the adapter cannot be read or is malformed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The directory has no adapter.
    #[error("{}: no adapter here: {detail}", path.display())]
    NoAdapter {
        /// The directory.
        path: PathBuf,
        /// What was found and expected.
        detail: String,
    },
    /// `adapter_config.json` is not what PEFT writes.
    #[error("{}: `{key}` is not what PEFT writes (got {got}, expected {expected})", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value, shortened.
        got: String,
        /// What would do.
        expected: &'static str,
    },
    /// A kind of adapter that is not a sum of low-rank products.
    #[error("{}: {what} is not supported; merge the adapter into its base with PEFT first (`merge_and_unload`)", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The setting or tensor.
        what: String,
    },
    /// A tensor of the adapter that does not fit.
    #[error("{}: tensor `{}`: {detail}", path.display(), escaped(tensor))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was found and expected.
        detail: String,
    },
}

/// `scale · B·A`, or its transpose, to be added to a weight.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: TensorMeta,
    /// `[out, rank]`.
    pub b: TensorMeta,
    /// Columns of B.
    pub rank: usize,
    /// `alpha / rank`, or over its root.
    pub scale: f64,
    /// The weight is stored as `[in, out]`: embeddings, GPT-2's `Conv1D`.
    pub transposed: bool,
}

impl LowRank {
    /// Values of both factors.
    pub fn elements(&self) -> u64 {
        self.a.elements() + self.b.elements()
    }
}

/// What an adapter does to one tensor; at least one of the two.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Change {
    /// A tensor of the adapter that stands in for the checkpoint's (`modules_to_save`, biases).
    pub replaced: Option<TensorMeta>,
    /// A product that is added.
    pub low_rank: Option<LowRank>,
}

/// An opened adapter, lined up with the checkpoint that it changes.
#[derive(Debug)]
pub struct Adapter {
    checkpoint: Checkpoint,
    changes: BTreeMap<String, Change>,
    warnings: Vec<String>,
}

/// `adapter_config.json`, what counts of it.
struct Settings {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    rslora: bool,
    transposed: bool,
    ranks: Vec<(Pattern, f64)>,
    alphas: Vec<(Pattern, f64)>,
}

/// A key of `rank_pattern` or `alpha_pattern`: a regular expression for the end of a module's path.
struct Pattern(regex_lite::Regex);

impl Pattern {
    fn new(key: &str) -> Option<Self> {
        // As PEFT: the whole path, or all of it behind some dot.
        regex_lite::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).ok().map(Self)
    }

    fn find(patterns: &[(Self, f64)], module: &str) -> Option<f64> {
        patterns.iter().find(|(pattern, _)| pattern.0.is_match(module)).map(|(_, value)| *value)
    }
}

/// The factors of one module as they are found.
#[derive(Default)]
struct Factors {
    a: Option<TensorMeta>,
    b: Option<TensorMeta>,
    embedding: bool,
}

impl Adapter {
    /// Opens the adapter in the directory `path` and lines it up with `base`: headers only.
    ///
    /// # Errors
    /// [`AdapterError`] for files that are missing or malformed, for kinds of adapters that are not supported, and for
    /// tensors that fit nothing in `base`.
    pub fn open(path: &Path, base: &Checkpoint, io: IoMode) -> Result<Self, AdapterError> {
        let settings = Settings::read(&path.join(CONFIG_FILE), path)?;
        let weights = path.join(WEIGHTS_FILE);
        if fs::symlink_metadata(&weights).is_err() {
            let detail = if path.join(PICKLED_FILE).exists() {
                format!(
                    "got pickled weights (`{PICKLED_FILE}`), expected {WEIGHTS_FILE}; save it as safetensors first"
                )
            } else {
                format!("got no {WEIGHTS_FILE}, expected one beside {CONFIG_FILE}")
            };
            return Err(AdapterError::NoAdapter { path: path.to_owned(), detail });
        }
        let checkpoint = Checkpoint::open(&weights, io)?;
        let mut adapter = Self { checkpoint, changes: BTreeMap::new(), warnings: Vec::new() };
        adapter.line_up(&settings, base, &weights)?;
        Ok(adapter)
    }

    /// The adapter's own tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// By the stored name of the tensor that changes; a name that the checkpoint lacks is a tensor more.
    pub fn changes(&self) -> &BTreeMap<String, Change> {
        &self.changes
    }

    /// What was accepted but should be known.
    pub fn warnings(&self) -> impl Iterator<Item = &String> {
        self.checkpoint.warnings().iter().chain(&self.warnings)
    }

    fn line_up(&mut self, settings: &Settings, base: &Checkpoint, path: &Path) -> Result<(), AdapterError> {
        let mut modules: BTreeMap<String, Factors> = BTreeMap::new();
        let mut names = Names { base, added: None };
        for meta in self.checkpoint.tensors() {
            let name = meta.name.strip_prefix(PREFIX).unwrap_or(&meta.name);
            let error = |detail: String| AdapterError::Tensor {
                path: path.to_owned(),
                tensor: meta.name.clone(),
                detail,
            };
            if !meta.dtype.is_float() {
                return Err(error(format!("has dtype {}, expected F32, F16, BF16 or F64", meta.dtype)));
            }
            let Some((module, kind)) = name.split_once(".lora_") else {
                if let Some(foreign) = FOREIGN.iter().find(|part| name.contains(**part)) {
                    let what = format!("tensor `{}` (`{foreign}`)", escaped(&meta.name));
                    return Err(AdapterError::Unsupported { path: path.to_owned(), what });
                }
                let stored = names.stored(&saved_name(name)).unwrap_or_else(|| saved_name(name));
                let change = self.changes.entry(stored).or_default();
                if change.replaced.replace(meta.clone()).is_some() {
                    return Err(error("stands for a tensor that another one stands for, too".to_owned()));
                }
                continue;
            };
            let factors = modules.entry(module.to_owned()).or_default();
            let slot = match kind.split('.').collect::<Vec<_>>()[..] {
                ["A", "weight"] | ["A", _, "weight"] => &mut factors.a,
                ["B", "weight"] | ["B", _, "weight"] => &mut factors.b,
                ["embedding_A"] | ["embedding_A", _] => {
                    factors.embedding = true;
                    &mut factors.a
                }
                ["embedding_B"] | ["embedding_B", _] => {
                    factors.embedding = true;
                    &mut factors.b
                }
                _ => {
                    let what = if kind.starts_with("magnitude_vector") {
                        format!("DoRA (tensor `{}`)", escaped(&meta.name))
                    } else {
                        format!("tensor `{}`", escaped(&meta.name))
                    };
                    return Err(AdapterError::Unsupported { path: path.to_owned(), what });
                }
            };
            if slot.replace(meta.clone()).is_some() {
                return Err(error(
                    "its module has two factors of this side (several adapters in one file?)".to_owned(),
                ));
            }
        }

        let mut squares = None;
        let mut contradiction = None;
        let mut odd_ranks = 0_usize;
        for (module, factors) in &modules {
            let named = |meta: Option<&TensorMeta>| meta.map_or_else(|| module.clone(), |m| m.name.clone());
            let error = |meta: Option<&TensorMeta>, detail: String| AdapterError::Tensor {
                path: path.to_owned(),
                tensor: named(meta),
                detail,
            };
            let (Some(a), Some(b)) = (&factors.a, &factors.b) else {
                let half = factors.a.as_ref().or(factors.b.as_ref());
                return Err(error(
                    half,
                    "its other factor is missing (expected lora_A and lora_B)".to_owned(),
                ));
            };
            let wanted = format!("{module}.weight");
            let Some(stored) = names.stored(&wanted) else {
                let hint = if super::names::is_head(&wanted) {
                    "; the checkpoint may tie it to its embedding"
                } else {
                    ""
                };
                return Err(error(
                    Some(a),
                    format!("changes `{}`, which {} lacks{hint}", escaped(&wanted), base.path().display()),
                ));
            };
            let change = self.changes.entry(stored.clone()).or_default();
            let weight = match (&change.replaced, base.get(&stored)) {
                (Some(replaced), _) => replaced,
                (None, Some(weight)) => weight,
                (None, None) => unreachable!("`stored` gives names of the base"),
            };
            if !weight.dtype.is_float() {
                return Err(error(
                    Some(a),
                    format!(
                        "changes `{}`, which has dtype {}; dequantise the checkpoint first",
                        escaped(&stored),
                        weight.dtype
                    ),
                ));
            }
            let (rank, input) = flattened(a);
            let (output, of_b) = flattened(b);
            let (rows, columns) = flattened(weight);
            let straight = (output, input) == (rows, columns) && !factors.embedding;
            let turned = (input, output) == (rows, columns) && weight.shape.len() == 2;
            if rank == 0 || rank != of_b || weight.shape.len() < 2 || !(straight || turned) {
                return Err(error(
                    Some(a),
                    format!(
                        "its factors do not make a change of `{}` (got A {:?} and B {:?}, expected a product {:?})",
                        escaped(&stored),
                        a.shape,
                        b.shape,
                        weight.shape
                    ),
                ));
            }
            // Shapes tell which way round a weight is stored; only where it is square the setting has to.
            let transposed = if straight && turned {
                squares.get_or_insert(a.name.clone());
                settings.transposed
            } else {
                if !factors.embedding && turned != settings.transposed {
                    contradiction.get_or_insert(a.name.clone());
                }
                turned
            };
            let stated = Pattern::find(&settings.ranks, module).unwrap_or(settings.rank as f64);
            if stated != rank as f64 {
                odd_ranks += 1;
            }
            let alpha = Pattern::find(&settings.alphas, module).unwrap_or(settings.alpha);
            let divisor = if settings.rslora { (rank as f64).sqrt() } else { rank as f64 };
            let scale = alpha / divisor;
            change.low_rank = Some(LowRank { a: a.clone(), b: b.clone(), rank, scale, transposed });
        }
        if let (Some(_), Some(other)) = (squares, contradiction) {
            return Err(AdapterError::Tensor {
                path: path.to_owned(),
                tensor: other,
                detail: format!(
                    "its shape contradicts `fan_in_fan_out: {}`, and square weights of this adapter depend on it; \
                     correct {CONFIG_FILE}",
                    settings.transposed
                ),
            });
        }
        if odd_ranks > 0 {
            self.warnings.push(format!(
                "{}: {odd_ranks} factors have another rank than `r` and `rank_pattern` say; theirs is taken",
                settings.path.display()
            ));
        }
        if self.changes.is_empty() {
            return Err(AdapterError::NoAdapter {
                path: path.to_owned(),
                detail: "got no tensors, expected lora_A and lora_B".to_owned(),
            });
        }
        Ok(())
    }
}

/// Parts of tensor names of other kinds of adapters.
const FOREIGN: [&str; 11] = [
    "hada_",
    "lokr_",
    "ia3_",
    "oft_",
    "boft_",
    "vera_",
    "prompt_embeddings",
    "ln_tuning_",
    "hra_",
    "trainable_tokens_",
    "adaption_",
];

/// The name of a tensor that was saved whole: without the marks of PEFT's wrappers.
fn saved_name(name: &str) -> String {
    name.replace(".modules_to_save.default.", ".")
        .replace(".modules_to_save.", ".")
        .replace(".original_module.", ".")
        .replace(".base_layer.", ".")
}

/// First dimension, and the product of the others.
fn flattened(meta: &TensorMeta) -> (usize, usize) {
    match meta.shape.split_first() {
        Some((first, rest)) => (*first, rest.iter().product()),
        None => (1, 1),
    }
}

/// Names of the wrapped model → names in the checkpoint, which may lack or have a common prefix (`transformer.`).
struct Names<'b> {
    base: &'b Checkpoint,
    /// What has to be put before them, once it is known.
    added: Option<HashMap<String, String>>,
}

impl Names<'_> {
    fn stored(&mut self, name: &str) -> Option<String> {
        let mut rest = name;
        loop {
            if self.base.get(rest).is_some() {
                return Some(rest.to_owned());
            }
            // What is left must still name a module: `weight` alone fits anywhere.
            match rest.split_once('.') {
                Some((_, shorter)) if shorter.contains('.') => rest = shorter,
                _ => break,
            }
        }
        let base = self.base;
        let added = self.added.get_or_insert_with(|| {
            let mut by_end: HashMap<String, String> = HashMap::new();
            for meta in base.tensors() {
                if let Some((_, end)) = meta.name.split_once('.') {
                    by_end
                        .entry(end.to_owned())
                        .and_modify(|name| name.clear())
                        .or_insert_with(|| meta.name.clone());
                }
            }
            by_end
        });
        // Two candidates are none.
        added.get(name).filter(|found| !found.is_empty()).cloned()
    }
}

impl Settings {
    fn read(file: &Path, directory: &Path) -> Result<Self, AdapterError> {
        let Some(bytes) = read_small_file(file, MAX_MODEL_CONFIG_BYTES)? else {
            return Err(AdapterError::NoAdapter {
                path: directory.to_owned(),
                detail: format!("got no {CONFIG_FILE}, expected a PEFT adapter's directory"),
            });
        };
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|source| ReadError::ModelConfig { path: file.to_owned(), source })?;
        let reader = Reader { path: file, map: json.as_object().cloned().unwrap_or_default() };
        reader.refuse_unsupported()?;
        let rank = reader.number("r", "an integer of at least 1", |r| r >= 1.0 && r.fract() == 0.0)?;
        let alpha = reader.number("lora_alpha", "a number", f64::is_finite)?;
        Ok(Self {
            path: file.to_owned(),
            rank: rank.unwrap_or(8.0) as usize,
            alpha: alpha.unwrap_or(8.0),
            rslora: reader.boolean("use_rslora")?,
            transposed: reader.boolean("fan_in_fan_out")?,
            ranks: reader.patterns("rank_pattern")?,
            alphas: reader.patterns("alpha_pattern")?,
        })
    }
}

struct Reader<'p> {
    path: &'p Path,
    map: Map<String, Value>,
}

impl Reader<'_> {
    /// Settings under which the adapter is not `scale · B·A` on the weights that the checkpoint has.
    fn refuse_unsupported(&self) -> Result<(), AdapterError> {
        let refuse = |what: String| Err(AdapterError::Unsupported { path: self.path.to_owned(), what });
        match self.map.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => return refuse(format!("`peft_type: {}`", escaped(other))),
            None => return Err(self.wrong("peft_type", "`LORA`")),
        }
        if self.boolean("use_dora")? {
            return refuse("DoRA (`use_dora: true`)".to_owned());
        }
        for key in ["lora_bias", "use_qalora"] {
            if self.boolean(key)? {
                return refuse(format!("`{key}: true`"));
            }
        }
        const MUST_BE_EMPTY: [&str; 8] = [
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "arrow_config",
            "alora_invocation_tokens",
            "kasa_config",
            "bdlora_config",
            "velora_config",
        ];
        for key in MUST_BE_EMPTY {
            let empty = match self.map.get(key) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(Value::Object(items)) => items.is_empty(),
                Some(_) => false,
            };
            if !empty {
                return refuse(format!("`{key}`"));
            }
        }
        // PiSSA and its like move the weights that the adapter is relative to.
        match self.map.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Ok(()),
            Some(Value::String(word))
                if matches!(word.as_str(), "gaussian" | "eva" | "orthogonal" | "true" | "false") =>
            {
                Ok(())
            }
            Some(other) => refuse(format!(
                "`init_lora_weights: {}`, which may change the base's own weights,",
                escaped(other.as_str().unwrap_or("…"))
            )),
        }
    }

    fn wrong(&self, key: &str, expected: &'static str) -> AdapterError {
        let got = self
            .map
            .get(key)
            .map_or_else(|| "nothing".to_owned(), |value| format!("`{}`", escaped(&value.to_string())));
        AdapterError::Config { path: self.path.to_owned(), key: key.to_owned(), got, expected }
    }

    fn number(
        &self,
        key: &str,
        expected: &'static str,
        accepts: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, AdapterError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|number| accepts(*number)) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(key, expected)),
            },
        }
    }

    fn boolean(&self, key: &str) -> Result<bool, AdapterError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn patterns(&self, key: &str) -> Result<Vec<(Pattern, f64)>, AdapterError> {
        const EXPECTED: &str = "a mapping from module names or regular expressions to numbers";
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Object(entries)) => entries
                .iter()
                .map(|(pattern, value)| {
                    let number = value.as_f64().filter(|number| number.is_finite());
                    Pattern::new(pattern).zip(number).ok_or_else(|| self.wrong(key, EXPECTED))
                })
                .collect(),
            Some(_) => Err(self.wrong(key, EXPECTED)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_the_end_of_a_module_as_in_peft() {
        let patterns = vec![
            (Pattern::new("q_proj").expect("valid"), 1.0),
            (Pattern::new(r"layers\.1\..*").expect("valid"), 2.0),
        ];
        let find = |module| Pattern::find(&patterns, module);
        assert_eq!(find("model.layers.0.self_attn.q_proj"), Some(1.0));
        assert_eq!(find("q_proj"), Some(1.0));
        assert_eq!(find("model.layers.0.self_attn.not_q_proj"), None);
        assert_eq!(find("model.layers.1.mlp.up_proj"), Some(2.0));
        assert_eq!(find("model.layers.11.mlp.up_proj"), None);
        assert!(Pattern::new("(").is_none());
    }

    #[test]
    fn names_of_saved_modules_lose_their_wrappers() {
        assert_eq!(saved_name("lm_head.modules_to_save.default.weight"), "lm_head.weight");
        assert_eq!(saved_name("model.embed_tokens.base_layer.weight"), "model.embed_tokens.weight");
        assert_eq!(saved_name("score.weight"), "score.weight");
    }
}
