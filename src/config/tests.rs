//! Tests of the configuration as a whole: what is read and what it means.

mod refusals;
mod sections;

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

const PATH: &str = "dir/config.yml";
const MODELS: &str = "models: [{model: a}, {model: b}]\n";

fn parse(text: &str) -> Result<MergeConfig, ConfigError> {
    MergeConfig::parse(Path::new(PATH), text.to_owned())
}

fn ok(text: &str) -> MergeConfig {
    parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The message of a refusal, without the file name.
fn refused(text: &str) -> String {
    let error = parse(text).expect_err(text);
    let message = error.to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message.strip_prefix("dir/config.yml:").unwrap_or_else(|| panic!("no file: {message}")).to_owned()
}

/// The contract's example, word for word but for its paths.
const FULL: &str = "\
merge_method: mats            # solves
base_model: models/base
models:
  - model: models/paws
    statistics: stats/paws.safetensors     # or a list of files
    parameters: { weight: 1.0 }
  - model: models/qasc
    statistics: [stats/qasc-1.safetensors, /abs/qasc-2.safetensors]
subspace: kfac
parameters: { off_diagonal: 0.9 }
initial: { merge_method: task_arithmetic, parameters: { weight: 0.3 } }
solver: { method: cg, max_iterations: 100, tolerance: 1.0e-5 }
unmatched: average
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
";

#[test]
fn the_contracts_example() {
    let config = ok(FULL);
    assert_eq!(config.text, FULL);
    assert_eq!((config.path.as_path(), config.directory.as_path()), (Path::new(PATH), Path::new("dir")));
    let base = config.base_model.as_ref().expect("given");
    assert_eq!(
        (base.written.as_str(), base.path.as_path(), base.line),
        ("models/base", Path::new("dir/models/base"), 2)
    );
    assert_eq!((config.models[0].line, config.models[1].line), (4, 7));
    assert_eq!(config.models[0].statistics, [PathBuf::from("dir/stats/paws.safetensors")]);
    assert_eq!(
        config.models[1].statistics,
        [PathBuf::from("dir/stats/qasc-1.safetensors"), PathBuf::from("/abs/qasc-2.safetensors")]
    );
    assert_eq!((config.dtype, config.out_dtype), (Some(OutDtype::Float32), Some(OutDtype::Bfloat16)));
    assert_eq!(config.output_dtype(), Some(OutDtype::Bfloat16));
    assert_eq!(config.tokenizer.as_ref().map(|tokenizer| &tokenizer.source), Some(&TokenizerSource::Base));

    let round = &config.round;
    assert_eq!(
        (round.method, round.subspace, round.unmatched),
        (Method::Mats, Subspace::Kfac, Unmatched::Average)
    );
    assert_eq!(
        round.solver,
        SolverConfig {
            method: SolverMethod::Cg,
            preconditioner: None,
            max_iterations: Some(100),
            tolerance: Some(1e-5),
            ridge: None,
            stop: None,
            line: 12,
        }
    );
    assert_eq!((round.weight(0, "x", 0.0), round.weight(1, "x", 0.0)), (1.0, 1.0));
    assert_eq!((round.off_diagonal(0, "x", 0.0), round.off_diagonal(1, "x", 0.5)), (0.9, 0.9));
    let Initial::Nested(inner) = &round.initial else { panic!("{:?}", round.initial) };
    assert_eq!((inner.method, inner.subspace, inner.line), (Method::TaskArithmetic, Subspace::Identity, 11));
    // Its own weight stands for itself: the outer model's 1.0 does not shine through.
    assert_eq!((inner.weight(0, "x", 0.0), inner.weight(1, "x", 0.0)), (0.3, 0.3));
    let rounds: Vec<_> = config.rounds().iter().map(|round| round.method).collect();
    assert_eq!(rounds, [Method::TaskArithmetic, Method::Mats]);
}

#[test]
fn defaults_of_each_method() {
    let stats = "base_model: base\nmodels: [{model: a, statistics: s}, {model: b, statistics: t}]\n";
    for (name, subspace, solver) in [
        ("linear", Subspace::Identity, SolverMethod::Auto),
        ("task_arithmetic", Subspace::Identity, SolverMethod::Auto),
        ("fisher", Subspace::FisherDiagonal, SolverMethod::Auto),
        ("regmean", Subspace::Gram, SolverMethod::Auto),
        ("wudi", Subspace::DeltaGram(DeltaScale::InverseSquaredNorm), SolverMethod::Direct),
        ("actmat", Subspace::DeltaGram(DeltaScale::One), SolverMethod::Direct),
        ("mats", Subspace::Auto, SolverMethod::Auto),
    ] {
        let config = ok(&format!("merge_method: {name}\n{stats}"));
        let round = &config.round;
        assert_eq!((round.method.name(), round.subspace, round.solver.method), (name, subspace, solver));
        assert!(matches!(round.initial, Initial::Auto));
        assert_eq!((round.unmatched, round.solver.ridge), (Unmatched::Average, None));
        assert_eq!((round.weight(0, "x", 0.0), round.off_diagonal(1, "x", 0.0)), (1.0, 1.0));
        assert_eq!(round.normalize("x", 0.0), name == "linear");
        let ridge = if matches!(name, "wudi" | "actmat") { 0.3 } else { 0.0 };
        assert_eq!(round.ridge(SolverMethod::Direct), ridge, "{name}");
    }
    let config = ok(&format!("merge_method: mats\nsubspace: delta_gram\n{stats}"));
    assert_eq!(config.round.subspace, Subspace::DeltaGram(DeltaScale::InverseSquaredNorm));
    assert_eq!(config.round.ridge(SolverMethod::Pcg), 0.1);
    assert_eq!(ok("merge_method: linear\nmodels: [{model: a}]").directory, Path::new("dir"));
    let here =
        MergeConfig::parse(Path::new("c.yml"), format!("merge_method: linear\n{MODELS}")).expect("valid");
    assert_eq!(
        (here.directory.as_path(), here.models[0].model.path.as_path()),
        (Path::new("."), Path::new("a"))
    );
}

#[test]
fn precedence_gradients_and_filters() {
    let config = ok("\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters:
      weight:
        - {filter: mlp, value: [0.0, 1.0, 4.0]}
        - {filter: self_attn, value: 7}
  - model: b
    parameters: {weight: {filter: norm, value: -2}}
  - model: c
parameters:
  weight: [1, 2]
  lambda: [{filter: norm, value: 0.5}, {filter: '*', value: [2, 4]}]
  normalize: [true, false, true]
");
    let round = &config.round;
    for (model, tensor, t, weight) in [
        (0, "layers.0.mlp.up", 0.0, 0.0),
        (0, "layers.1.mlp.up", 0.25, 0.5),
        (0, "layers.2.mlp.up", 0.5, 1.0),
        (0, "layers.3.mlp.up", 0.75, 2.5),
        (0, "layers.4.mlp.up", 1.0, 4.0),
        // The first match wins.
        (0, "self_attn.mlp", 1.0, 4.0),
        (0, "self_attn.q", 1.0, 7.0),
        // No filter of the model matches: the round's gradient.
        (0, "embed", 0.0, 1.0),
        (1, "norm", 0.0, -2.0),
        (1, "embed", 0.5, 1.5),
        (2, "embed", 1.0, 2.0),
        // Outside [0, 1] is the nearer end.
        (2, "embed", 9.0, 2.0),
        (2, "embed", f64::NAN, 1.0),
    ] {
        assert_eq!(round.weight(model, tensor, t), weight, "{model} {tensor} {t}");
    }
    assert_eq!((round.lambda("norm", 1.0), round.lambda("q", 0.5)), (0.5, 3.0));
    let normalize = [0.0, 0.4, 0.5, 0.9, 1.0].map(|t| round.normalize("q", t));
    assert_eq!(normalize, [true, true, false, false, true]);
    assert_eq!(round.number(None, "weight", "q", 0.0), Some(1.0));
    assert_eq!(round.number(Some(9), "nothing", "q", 0.0), None);
    assert!(round.model_parameters[1].is_set("weight") && !round.model_parameters[2].is_set("weight"));
    assert_eq!(round.model_parameters[0].line("weight"), Some(6));
    // A filter list without a match, and nothing below it: the default.
    let config =
        ok(&format!("merge_method: linear\n{MODELS}parameters: {{weight: [{{filter: q, value: 2}}]}}"));
    assert_eq!((config.round.weight(0, "q", 0.0), config.round.weight(0, "k", 0.0)), (2.0, 1.0));
}

#[test]
fn nested_rounds_inherit_models_weights_and_unmatched() {
    let config = ok("\
merge_method: mats
subspace: kfac
base_model: base
unmatched: base
parameters: {weight: 5}
models:
  - {model: a, statistics: s, parameters: {weight: 2, off_diagonal: 0.5}}
  - {model: b, statistics: t}
initial:
  merge_method: regmean
  parameters: {off_diagonal: 0.9}
  initial:
    merge_method: linear
    parameters: {weight: 3}
");
    let rounds = config.rounds();
    let [linear, regmean, mats] = rounds.as_slice() else { panic!("{} rounds", rounds.len()) };
    assert_eq!((mats.weight(0, "x", 0.0), mats.weight(1, "x", 0.0)), (2.0, 5.0));
    // The models' weights, where the round sets none; never the outer round's own.
    assert_eq!((regmean.weight(0, "x", 0.0), regmean.weight(1, "x", 0.0)), (2.0, 1.0));
    assert_eq!((regmean.off_diagonal(0, "x", 0.0), mats.off_diagonal(0, "x", 0.0)), (0.9, 0.5));
    assert_eq!((linear.weight(0, "x", 0.0), linear.weight(1, "x", 0.0)), (3.0, 3.0));
    assert!(linear.model_parameters.iter().all(Parameters::is_empty));
    assert!(
        rounds.iter().all(|round| round.unmatched == Unmatched::Base && round.model_parameters.len() == 2)
    );
}

#[test]
fn initial_words_and_paths() {
    let with = |initial: &str| {
        ok(&format!(
            "merge_method: regmean\nbase_model: x\nmodels: [{{model: a, statistics: s}}]\ninitial: {initial}"
        ))
    };
    assert!(matches!(with("auto").round.initial, Initial::Auto));
    assert!(matches!(with("zero").round.initial, Initial::Zero));
    assert!(matches!(with("average").round.initial, Initial::Average));
    assert!(matches!(with("base").round.initial, Initial::Base));
    for path in ["./start", "runs/start", "start.safetensors"] {
        let config = with(path);
        let Initial::Checkpoint(model) = &config.round.initial else { panic!("{:?}", config.round.initial) };
        assert_eq!(
            (model.written.as_str(), model.path.clone(), model.line),
            (path, Path::new("dir").join(path), 4)
        );
    }
    let directory = tempfile::tempdir().expect("temporary directory");
    fs::create_dir(directory.path().join("start")).expect("mkdir");
    let text = "merge_method: wudi\nbase_model: x\nmodels: [{model: a}]\ninitial: start".to_owned();
    let config =
        MergeConfig::parse(&directory.path().join("c.yml"), text).expect("a bare word that exists is a path");
    assert!(matches!(config.round.initial, Initial::Checkpoint(_)));
}

#[test]
fn anchors_merge_keys_and_quotes() {
    let config = ok("\
merge_method: &m 'mats'
models:
  - &first
    model: \"a\"
    statistics: &s [s1, s2]
    parameters: &p {weight: &w 0.5, off_diagonal: 0.25}
  - <<: *first
    model: b
  - {model: c, statistics: *s, parameters: {<<: [{weight: 3}, *p], off_diagonal: *w}}
solver: {method: !!str pcg, ridge: !!float 1}
name:
dtype: ~
");
    assert_eq!(config.round.method, Method::Mats);
    assert_eq!(config.models.iter().map(|m| m.model.written.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(config.models.iter().all(|model| model.statistics.len() == 2));
    let weights =
        [0, 1, 2].map(|i| (config.round.weight(i, "x", 0.0), config.round.off_diagonal(i, "x", 0.0)));
    assert_eq!(weights, [(0.5, 0.25), (0.5, 0.25), (3.0, 0.5)]);
    assert_eq!(config.round.solver.ridge, Some(1.0));
    assert_eq!((config.name, config.dtype), (None, None));
    // An error behind an alias names the line of the original.
    let message = refused(
        "merge_method: linear\n\
         models:\n  - model: a\n    parameters: &p\n      weight: much\n  - {model: b, parameters: *p}\n",
    );
    assert_eq!(message, "5: models[0].parameters.weight: expected a finite number, got `much`");
}

#[test]
fn what_mergekit_accepts_is_not_refused() {
    for text in [
        // The base among the models, the same model twice, any sign of a task vector, weights that cancel
        // undivided.
        "merge_method: task_arithmetic\nbase_model: a\n\
         models: [{model: a}, {model: b, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]",
        "merge_method: linear\n\
         models: [{model: a}, {model: a}]\ndtype: float16\n\
         parameters: {normalize: false, weight: 0}",
        "merge_method: linear\n\
         models:\n- model: org/name\n  parameters:\n    weight: 0.4\n- model: /abs/other\n  parameters:\n    weight: 0.6\n",
        "merge_method: wudi\nbase_model: a\nmodels: [{model: a}]",
        // Statistics that the method does not read; auto without any; a dropped model without.
        "merge_method: linear\nmodels: [{model: a, statistics: s}]",
        "merge_method: mats\n\
         models: [{model: a}]\n\
         solver: {method: pcg, preconditioner: kronecker, max_iterations: 0, tolerance: 0, ridge: 0}",
        "merge_method: mats\nsubspace: kfac\n\
         models: [{model: a, statistics: s}, {model: b, parameters: {weight: 0}}]",
        "%YAML 1.2\n---\nmerge_method: linear\nmodels: [{model: a}]\n...\n",
        "\u{feff}merge_method: linear\r\nmodels:\r\n  - model: a\r\n",
    ] {
        ok(text);
    }
    let long: Vec<String> = (0..2000).map(|i| format!("0.{i:04}")).collect();
    let config = ok(&format!("merge_method: linear\n{MODELS}parameters: {{weight: [{}]}}", long.join(", ")));
    assert_eq!(config.round.weight(0, "x", 1.0), 0.1999);
}

#[test]
fn the_canonical_text_is_of_the_meaning() {
    let spelt = ok("\
# the same in other words
'unmatched': average
solver:
  tolerance: 0.00001
  max_iterations: 0x64
  method: cg
tokenizer_source: base
name: irrelevant
out_dtype: &d bfloat16
dtype: float32
initial:
  parameters:
    weight: 3.0e-1
  merge_method: task_arithmetic
parameters:
  off_diagonal: [{value: .9, filter: '*'}]
subspace: kfac
models:
- statistics: [stats/paws.safetensors]
  parameters: {weight: 1}
  model: models/paws
- model: models/qasc
  statistics:
  - stats/qasc-1.safetensors
  - /abs/qasc-2.safetensors
base_model: models/base
merge_method: mats
");
    let canonical = ok(FULL).canonical_hash_input();
    assert_eq!(spelt.canonical_hash_input(), canonical);
    assert_eq!(
        canonical,
        "\
mats-stream-config/1
output_dtype = bfloat16
tokenizer.source = base
base_model = \"models/base\"
models[0].model = \"models/paws\"
models[0].statistics = \"stats/paws.safetensors\"
models[1].model = \"models/qasc\"
models[1].statistics = \"stats/qasc-1.safetensors\"
models[1].statistics = \"/abs/qasc-2.safetensors\"
merge_method = mats
subspace = kfac
unmatched = average
solver.method = cg
solver.max_iterations = 100
solver.tolerance = 1e-5
parameters.off_diagonal = *:[0.9]
models[0].parameters.weight = *:[1.0]
initial = nested
initial.merge_method = task_arithmetic
initial.subspace = identity
initial.unmatched = average
initial.solver.method = auto
initial.parameters.weight = *:[0.3]
initial.initial = auto
"
    );
    // Whatever changes the result changes the text.
    for (from, to) in [
        ("off_diagonal: 0.9", "off_diagonal: 0.8"),
        ("weight: 0.3", "weight: 0.4"),
        ("weight: 1.0", "weight: [1.0, 1.0]"),
        ("subspace: kfac", "subspace: gram"),
        ("method: cg", "method: pcg"),
        ("tolerance: 1.0e-5", "ridge: 1.0e-5"),
        ("models/qasc", "models/qasc2"),
        ("stats/qasc-1", "stats/qasc-3"),
        ("unmatched: average", "unmatched: error"),
        ("out_dtype: bfloat16", "out_dtype: float16"),
        ("initial: {", "initial: zero\n#"),
    ] {
        assert!(FULL.contains(from), "{from}");
        assert_ne!(ok(&FULL.replace(from, to)).canonical_hash_input(), canonical, "{to}");
    }
}

proptest! {
    /// Whatever the bytes, an answer and no panic; an error is one line and names the file.
    #[test]
    fn any_text_is_answered(text in "[a-z:\\- \\[\\]{}&*!?|>'\"\\\\\n\t#,%<~0-9.é]{0,120}") {
        if let Err(error) = parse(&text) {
            let message = error.to_string();
            prop_assert!(message.starts_with(PATH) && !message.contains('\n'));
        }
    }

    /// Damage to a valid config is answered too, which reaches deeper than random text.
    #[test]
    fn a_damaged_config_is_answered(
        at in 0..FULL.len(),
        cut in 0..40_usize,
        insert in "[a-z:\\[\\]{}&*!?'\"\n0-9.\\- ]{0,6}",
    ) {
        let end = (at + cut).min(FULL.len());
        let text = format!("{}{insert}{}", &FULL[..at], &FULL[end..]);
        if let Err(error) = parse(&text) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }

    /// A gradient meets its points at t = i/(len − 1) and stays between its neighbours elsewhere.
    #[test]
    fn a_gradient_interpolates(points in prop::collection::vec(-10.0_f64..10.0, 2..8), t in 0.0_f64..=1.0) {
        let list: Vec<_> = points.iter().map(|x| format!("{x:?}")).collect();
        let parameters = format!("parameters: {{normalize: false, weight: [{}]}}", list.join(", "));
        let text = format!("merge_method: linear\n{MODELS}{parameters}");
        let round = parse(&text).expect("valid").round;
        let last = (points.len() - 1) as f64;
        prop_assert_eq!(round.weight(0, "x", 0.0), points[0]);
        prop_assert_eq!(round.weight(0, "x", 1.0), points[points.len() - 1]);
        let i = ((t * last) as usize).min(points.len() - 2);
        let (low, high) = (points[i].min(points[i + 1]), points[i].max(points[i + 1]));
        let value = round.weight(0, "x", t);
        prop_assert!(value >= low - 1e-12 && value <= high + 1e-12);
    }
}

#[test]
fn a_sweep_is_the_product_of_its_lists() {
    let text = "# comment\nmerge_method: mats\nname: \"a # b\"\nbase_model: b\nsolver: {method: cg, ridge: 9, tolerance: 1e-3}\n\
                models: [{model: a, statistics: [s, t]}, {model: 'c: d', statistics: u}]\n\
                initial: {merge_method: task_arithmetic, parameters: {weight: 0.3, lambda: [1, {filter: x, value: 2}]}}\n\
                sweep: {ridge: [1.0e-4, 2], parameters.off_diagonal: [0.90, 1.0]}\n"
        .replace("[1, {filter: x, value: 2}]", "[{filter: x, value: 2}, {filter: '*', value: [0.5, 1]}]");
    let config = ok(&text);
    assert_eq!((config.round.solver.ridge, config.text.as_str()), (Some(9.0), text.as_str()));
    let sweep = config.sweep.as_ref().expect("given");
    let names: Vec<_> = sweep.variants.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "ridge=0.0001,off_diagonal=0.9",
            "ridge=0.0001,off_diagonal=1",
            "ridge=2,off_diagonal=0.9",
            "ridge=2,off_diagonal=1"
        ]
    );
    for variant in &sweep.variants {
        let [(SweepKey::Ridge, ridge), (SweepKey::OffDiagonal, off_diagonal)] = variant.values[..] else {
            panic!("{:?}", variant.values)
        };
        let own = &variant.config;
        assert!(own.sweep.is_none());
        assert_eq!((own.round.solver.ridge, own.round.solver.tolerance), (Some(ridge), Some(1e-3)));
        assert_eq!(own.round.off_diagonal(0, "x", 0.0), off_diagonal);
        assert_eq!((own.models.len(), own.name.as_deref()), (2, Some("a # b")));
        assert_eq!(own.models[1].model.written, "c: d");
        // Its text means the same, wherever it is read.
        let again = ok(&own.text);
        assert_eq!(again.canonical_hash_input(), own.canonical_hash_input());
        assert_ne!(again.canonical_hash_input(), config.canonical_hash_input());
        assert!(matches!(&again.round.initial, Initial::Nested(inner)
            if inner.lambda("x", 0.0) == 2.0 && inner.lambda("y", 1.0) == 1.0));
    }
    // One key may be swept without a mapping to stand in.
    let config = ok(&format!("merge_method: linear\n{MODELS}sweep: {{weight: [2]}}"));
    let sweep = config.sweep.expect("given");
    assert_eq!((sweep.variants.len(), sweep.variants[0].config.round.weight(1, "x", 0.0)), (1, 2.0));
}
