//! What is refused: every message in full, hostile YAML, files that are no config.

use std::fs;
use std::path::Path;

use super::{ConfigError, MODELS, MergeConfig, PATH, parse, refused};

/// Every message in full: file, line, key path, value, what was expected, the nearest known word.
#[test]
fn refusals() {
    let linear = |rest: &str| format!("merge_method: linear\n{MODELS}{rest}");
    let mats = |rest: &str| format!("merge_method: mats\n{MODELS}{rest}");
    let table = [
        // Words.
        (
            mats("solver: {\n  method: cgg}"),
            "4: solver.method: unknown value `cgg` (expected one of auto, cg, pcg, direct); did \
             you mean `cg`?",
        ),
        (
            mats("subspase: kfac"),
            "3: subspase: unknown key (expected one of merge_method, models, base_model, \
             parameters, dtype, out_dtype, subspace, initial, solver, unmatched, \
             tokenizer_source, sweep, name, slices, modules, tokenizer, chat_template); did you mean `subspace`?",
        ),
        (
            mats("subspace: kfca"),
            "3: subspace: unknown value `kfca` (expected one of auto, identity, \
             fisher_diagonal, gram, kfac, fisher_block, delta_gram); did you mean `kfac`?",
        ),
        (
            mats("solver: {max_iter: 3}"),
            "3: solver.max_iter: unknown key (expected one of method, preconditioner, \
             max_iterations, tolerance, ridge, stop); did you mean `max_iterations`?",
        ),
        (
            mats("initial: avrage"),
            "3: initial: unknown value `avrage` (expected one of auto, zero, average, base, a \
             checkpoint's path, a nested config); did you mean `average`?",
        ),
        (
            mats("unmatched: skip"),
            "3: unmatched: unknown value `skip` (expected one of average, base, error)",
        ),
        (
            linear("dtype: bf16"),
            "3: dtype: unknown value `bf16` (expected one of float32, float16, bfloat16, \
             float64); did you mean `bfloat16`?",
        ),
        (
            linear("parameters: {wieght: 1}"),
            "3: parameters.wieght: unknown key (expected one of weight, normalize, space); did you \
             mean `weight`?",
        ),
        (
            linear("parameters: {lambda: 1}"),
            "3: parameters.lambda: unknown key (expected one of weight, normalize, space)",
        ),
        (
            "merge_method: linear\nmodels: [{modle: a}]".into(),
            "2: models[0].modle: unknown key (expected one of model, statistics, parameters); \
             did you mean `model`?",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filtre: a, value: \
             1}]}}]"
                .into(),
            "2: models[0].parameters.weight[0].filtre: unknown key (expected one of filter, \
             value); did you mean `filter`?",
        ),
        // Known words in the wrong place.
        (
            linear("normalize: true"),
            "3: normalize: unknown key (expected one of merge_method, models, base_model, \
             parameters, dtype, out_dtype, subspace, initial, solver, unmatched, \
             tokenizer_source, sweep, name, slices, modules, tokenizer, chat_template); it belongs under `parameters`",
        ),
        (
            mats("ridge: 1"),
            "3: ridge: unknown key (expected one of merge_method, models, base_model, \
             parameters, dtype, out_dtype, subspace, initial, solver, unmatched, \
             tokenizer_source, sweep, name, slices, modules, tokenizer, chat_template); it belongs under `solver`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, weight: 1}]".into(),
            "2: models[0].weight: unknown key (expected one of model, statistics, parameters); \
             it belongs under `parameters`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]".into(),
            "2: models[0].parameters.normalize: is one for all models: give it under the \
             config's own `parameters`",
        ),
        (linear("solver: {method: cg}"), "3: solver: `linear` solves nothing, so it has no solver"),
        (linear("initial: zero"), "3: initial: `linear` solves nothing, so it starts nowhere"),
        (linear("subspace: gram"), "3: subspace: `linear` has no subspace; `merge_method: mats` has"),
        (
            "merge_method: fisher\nmodels: [{model: a, statistics: s}]\nsubspace: kfac".into(),
            "3: subspace: `fisher` is a preset whose subspace is fisher_diagonal; others go \
             with `merge_method: mats`",
        ),
        (
            mats("solver: {method: cg, preconditioner: jacobi}"),
            "3: solver.preconditioner: only `method: pcg` has a preconditioner, and the method \
             here is cg",
        ),
        (
            mats("initial:\n  merge_method: linear\n  models: []"),
            "5: initial.models: a nested config inherits the outer one's `models`; leave it out",
        ),
        (
            mats("initial: {merge_method: linear, dtype: float32}"),
            "3: initial.dtype: a nested config inherits the outer one's `dtype`; leave it out",
        ),
        (
            mats("initial: {merge_method: linear, solver: {}}"),
            "3: initial.solver: `linear` solves nothing, so it has no solver",
        ),
        (
            mats("initial: {merge_method: linear, foo: 1}"),
            "3: initial.foo: unknown key (expected one of merge_method, parameters, subspace, \
             initial, solver, unmatched)",
        ),
        // Not in this version.
        (
            "merge_method: linear\n---\nmodels: []".into(),
            "2: a second document starts here; give each merge a file of its own",
        ),
        // Types.
        ("- a".into(), "1: config: expected a mapping, got a list"),
        ("merge_method: linear\nmodels: a".into(), "2: models: expected a list of models, got `a`"),
        (
            "merge_method: linear\nmodels: [a]".into(),
            "2: models[0]: expected a mapping with `model`, got `a`",
        ),
        ("merge_method: [linear]".into(), "1: merge_method: expected a word, got a list"),
        (mats("solver: cg"), "3: solver: expected a mapping, as `{ method: cg }`, got `cg`"),
        (linear("parameters: {weight: '1.0'}"), "3: parameters.weight: expected a finite number, got `1.0`"),
        (linear("parameters: {weight: []}"), "3: parameters.weight: expected at least one value, got a list"),
        (
            linear("parameters: {weight: [1, two]}"),
            "3: parameters.weight[1]: expected a finite number, got `two`",
        ),
        (
            linear("parameters: {weight: [1, {value: 2}]}"),
            "3: parameters.weight[0]: expected a `{filter, value}`, as the rest of the list, \
             got `1`",
        ),
        (
            linear("parameters: {weight: [{filter: a}]}"),
            "3: parameters.weight[0].value: is missing: a filter without a value decides \
             nothing",
        ),
        (
            linear("parameters: {weight: [[1]]}"),
            "3: parameters.weight[0]: expected a finite number, got a list",
        ),
        (
            linear("parameters: {normalize: maybe}"),
            "3: parameters.normalize: expected `true` or `false`, got `maybe`",
        ),
        // Ranges.
        (linear("parameters: {weight: .nan}"), "3: parameters.weight: expected a finite number, got `.nan`"),
        (
            linear("parameters: {weight: -.inf}"),
            "3: parameters.weight: expected a finite number, got `-.inf`",
        ),
        (
            linear("parameters: {weight: 1e400}"),
            "3: parameters.weight: expected a finite number, got `1e400`",
        ),
        (
            mats("parameters: {weight: [0, -1]}"),
            "3: parameters.weight[1]: expected a finite number of at least 0, got `-1`",
        ),
        (
            mats("parameters: {off_diagonal: 1.5}"),
            "3: parameters.off_diagonal: expected a number from 0 to 1, got `1.5`",
        ),
        (
            mats("solver: {method: cg, stop: {objective_decrease: 0.1}}"),
            "3: solver.stop: only `method: pcg` has more than one stopping rule, and the method here is cg",
        ),
        (
            mats("solver: {method: pcg, tolerance: 0.1, stop: {seconds: 1}}"),
            "3: solver.stop: stands in the place of `tolerance`: give one of the two",
        ),
        (
            mats("solver: {method: pcg, stop: {}}"),
            "3: solver.stop: names no rule: give `objective_decrease`, say",
        ),
        (
            mats("solver: {method: pcg, stop: {residual: 1}}"),
            "3: solver.stop.residual: unknown key (expected one of objective_decrease, \
             preconditioned_residual, relative_residual, seconds); did you mean `relative_residual`?",
        ),
        (mats("solver: {ridge: -1}"), "3: solver.ridge: expected a finite number of at least 0, got `-1`"),
        (
            mats("solver: {tolerance: .inf}"),
            "3: solver.tolerance: expected a finite number of at least 0, got `.inf`",
        ),
        (
            mats("solver: {max_iterations: 1.5}"),
            "3: solver.max_iterations: expected an integer from 0 to 1000000, got `1.5`",
        ),
        (
            mats("solver: {max_iterations: 1000001}"),
            "3: solver.max_iterations: expected an integer from 0 to 1000000, got `1000001`",
        ),
        (
            mats("solver: {max_iterations: -1}"),
            "3: solver.max_iterations: expected an integer from 0 to 1000000, got `-1`",
        ),
        // What is missing.
        (String::new(), "1: merge_method: is missing: it says how to merge, as `mats` or `linear`"),
        (MODELS.into(), "1: merge_method: is missing: it says how to merge, as `mats` or `linear`"),
        ("merge_method: linear".into(), "1: models: is missing: it lists the checkpoints to merge"),
        ("merge_method: linear\nmodels:".into(), "2: models: is missing: it lists the checkpoints to merge"),
        (
            "merge_method: linear\nmodels: []".into(),
            "2: models: is missing: the list is empty, and a merge needs at least one model",
        ),
        (
            "merge_method: linear\nmodels: [{parameters: {weight: 1}}]".into(),
            "2: models[0].model: is missing: every item of `models` names a checkpoint",
        ),
        (
            format!("merge_method: task_arithmetic\n{MODELS}"),
            "1: base_model: is missing: `task_arithmetic` needs it",
        ),
        (format!("{MODELS}merge_method: wudi\n"), "2: base_model: is missing: `wudi` needs it"),
        (mats("subspace: delta_gram"), "3: base_model: is missing: `subspace: delta_gram` needs it"),
        (mats("initial: base"), "3: base_model: is missing: `initial: base` needs it"),
        (mats("unmatched: base"), "3: base_model: is missing: `unmatched: base` needs it"),
        (mats("initial: {merge_method: wudi}"), "3: base_model: is missing: `wudi` needs it"),
        (
            mats("subspace: kfac"),
            "2: models[0].statistics: is missing: `subspace: kfac` needs the statistics of \
             every model",
        ),
        (
            mats("initial:\n  merge_method: regmean"),
            "2: models[0].statistics: is missing: `regmean` needs the statistics of every model",
        ),
        (
            "merge_method: mats\nmodels:\n  - {model: a, statistics: s}\n  - {model: b}".into(),
            "4: models[1].statistics: is missing: other models name theirs, and `subspace: \
             auto` needs those of all models (or of none)",
        ),
        // Sums of weights.
        (
            linear("parameters: {weight: 0}"),
            "3: parameters.weight: the models' weights sum to 0, and their sum divides",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: \
             -1}}]"
                .into(),
            "2: parameters.weight: the models' weights sum to 0, and their sum divides",
        ),
        (
            mats("initial: {merge_method: linear, parameters: {weight: 0}}"),
            "3: initial.parameters.weight: the models' weights sum to 0, and their sum divides",
        ),
        // YAML.
        (
            "merge_method: mats\nmerge_method: fisher".into(),
            "2: merge_method: duplicate key (first given at line 1)",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    model: b".into(),
            "4: models[0].model: duplicate key (first given at line 3)",
        ),
        ("? [a]\n: b".into(), "1: a key must be a single word, not a list or mapping"),
        (
            "merge_method: !!python/object:os.system x".into(),
            "1: merge_method: the YAML tag `!!python/object:os.system` has no meaning here",
        ),
        ("merge_method: &a [*a]".into(), "1: merge_method[0]: an alias stands inside the very node it names"),
        ("a: {<<: 3}".into(), "1: a: a merge key takes a mapping or a list of mappings, got `3`"),
        (
            linear("\"bad\\nkey\\u001b[31m\": 1"),
            "3: bad\\nkey\\u{1b}[31m: unknown key (expected one of merge_method, models, \
             base_model, parameters, dtype, out_dtype, subspace, initial, solver, unmatched, \
             tokenizer_source, sweep, name, slices, modules, tokenizer, chat_template)",
        ),
    ];
    let mut wrong = String::new();
    for (text, message) in &table {
        let found = refused(text);
        if found != *message {
            wrong += &format!("{text}\n     got {found}\nexpected {message}\n\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn hostile_yaml_is_refused_quickly() {
    let bomb: String = std::iter::once("a0: &a0 [x, x]\n".to_owned())
        .chain((1..40).map(|i| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", "))))
        .collect();
    let long = format!("a: &a {}\nb: [{}]", "x".repeat(500_000), vec!["*a"; 100_000].join(","));
    let merge_bomb: String = std::iter::once("a0: &a0 {k: v}\n".to_owned())
        .chain((1..40).map(|i| format!("a{i}: &a{i} {{b: *a{0}, c: *a{0}, <<: [*a{0}, *a{0}]}}\n", i - 1)))
        .collect();
    let deep_alias: String = std::iter::once("a0: &a0 [x]\n".to_owned())
        .chain((1..20_000).map(|i| format!("a{i}: &a{i} [*a{}]\n", i - 1)))
        .collect();
    let deep_rounds =
        format!("merge_method: mats\n{MODELS}{}x", "initial: {merge_method: mats, ".repeat(10_000));
    let cases = [
        ("alias bomb", bomb),
        ("one long scalar, often", long),
        ("merge key bomb", merge_bomb),
        ("deep through aliases", deep_alias),
        ("nested rounds", deep_rounds),
        ("open lists", "[".repeat(100_000)),
        ("open mappings", "{a: ".repeat(100_000)),
        ("block lists", "- ".repeat(100_000)),
        ("block mappings", (0..1000).map(|i| format!("{}a:\n", " ".repeat(i))).collect()),
        ("many values", "- a\n".repeat(250_000)),
        ("many keys", (0..100_000).map(|i| format!("k{i}: 1\n")).collect()),
        ("one long key", format!("{}: 1", "k".repeat(1_000_000))),
        ("one long value", format!("merge_method: {}", "m".repeat(1_000_000))),
        ("two megabytes", " ".repeat(2 << 20)),
        ("tabs", "merge_method: linear\nmodels:\n\t- model: a\n".to_owned()),
        ("a tag", "!!python/object/apply:os.system [id]".to_owned()),
        ("a bad escape", "merge_method: \"\\q\"".to_owned()),
        ("NUL", "merge_method: \0".to_owned()),
        ("an unknown alias", "merge_method: *nothing".to_owned()),
        ("question marks", "? ".repeat(100_000)),
        ("many anchors", (0..60_000).map(|i| format!("- &a{i} x\n")).collect()),
        ("quotes", "\"".repeat(99_999)),
    ];
    for (name, text) in cases {
        // A bomb that went off would not end in this test's lifetime.
        let message = parse(&text).expect_err(name).to_string();
        assert!(
            message.starts_with(PATH) && !message.contains('\n') && message.len() < 600,
            "{name}: {message}"
        );
    }
}

#[test]
fn files_that_are_no_config() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = |name: &str| directory.path().join(name);
    let load = |name: &str| MergeConfig::load(&path(name)).expect_err(name);

    assert!(matches!(load("missing.yml"), ConfigError::Io { doing: "open", .. }));
    assert!(std::error::Error::source(&load("missing.yml")).is_some());
    fs::create_dir(path("sub")).expect("mkdir");
    assert!(matches!(load("sub"), ConfigError::NotRegular { found: "a directory", .. }));
    rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), rustix::fs::Mode::RUSR).expect("mkfifo");
    assert!(matches!(load("fifo"), ConfigError::NotRegular { .. }));
    assert!(matches!(
        MergeConfig::load(Path::new("/dev/null")).expect_err("a device"),
        ConfigError::NotRegular { .. }
    ));
    fs::write(path("latin1.yml"), b"merge_method: linear\nname: caf\xe9\n").expect("write");
    assert!(matches!(load("latin1.yml"), ConfigError::NotUtf8 { line: 2, offset: 30, .. }));
    let limit = 1 << 20;
    let text = format!("merge_method: linear\n{MODELS}#");
    fs::write(path("full.yml"), format!("{text}{}", "x".repeat(limit - text.len()))).expect("write");
    MergeConfig::load(&path("full.yml")).expect("exactly the limit");
    fs::write(path("over.yml"), format!("{text}{}", "x".repeat(limit + 1 - text.len()))).expect("write");
    assert!(matches!(load("over.yml"), ConfigError::TooLarge { .. }));
    fs::write(path("new\nline.yml"), "a: b").expect("write");
    assert!(load("new\nline.yml").to_string().contains("new\\nline.yml:1: a: unknown key"));
}

#[test]
fn sweeps() {
    let of = |method: &str, rest: &str| format!("merge_method: {method}\nbase_model: b\n{MODELS}{rest}");
    let mats = |rest: &str| of("mats", rest);
    let long = |n: usize| (0..n).map(|k| k.to_string()).collect::<Vec<_>>().join(", ");
    let table = [
        (
            mats("sweep: {solver.rigde: [1]}"),
            "4: sweep.solver.rigde: unknown key (expected one of solver.ridge, solver.max_iterations, \
             parameters.off_diagonal, parameters.weight, parameters.lambda); did you mean `solver.ridge`?",
        ),
        (
            mats("sweep: {initial.parameters.weight: [1]}"),
            "4: sweep.initial.parameters.weight: only what the outermost round sets for all models can be swept: \
             solver.ridge, solver.max_iterations, parameters.off_diagonal, parameters.weight, parameters.lambda",
        ),
        (
            mats("initial:\n  merge_method: linear\n  sweep: {weight: [1]}"),
            "6: initial.sweep: only the outermost round can be swept; give `sweep` at the top level",
        ),
        (mats("sweep: [1]"), "4: sweep: expected a mapping of lists, as `{ solver.ridge: [0.01, 0.1] }`, got a list"),
        (
            mats("sweep: {}"),
            "4: sweep: expected at least one list, as `{ solver.ridge: [0.01, 0.1] }`, got a mapping",
        ),
        (
            mats("sweep: {ridge: 1}"),
            "4: sweep.ridge: expected a list of numbers, as `[0.01, 0.1]`, got `1`",
        ),
        (
            mats("sweep: {ridge: []}"),
            "4: sweep.ridge: expected a list of numbers, as `[0.01, 0.1]`, got a list",
        ),
        (
            mats("sweep:\n  ridge: [1,\n    -1]"),
            "6: sweep.ridge[1]: expected a finite number of at least 0, got `-1`",
        ),
        (
            mats("sweep: {ridge: [1, x]}"),
            "4: sweep.ridge[1]: expected a finite number of at least 0, got `x`",
        ),
        (mats("sweep: {ridge: [0.1, 1.0e-1]}"), "4: sweep.ridge[1]: 0.1 is given twice"),
        (mats("sweep: {off_diagonal: [0, -0.0]}"), "4: sweep.off_diagonal[1]: 0 is given twice"),
        (
            mats("sweep: {off_diagonal: [1.5]}"),
            "4: sweep.off_diagonal[0]: expected a number from 0 to 1, got `1.5`",
        ),
        (
            mats("sweep: {weight: [-1]}"),
            "4: sweep.weight[0]: expected a finite number of at least 0, got `-1`",
        ),
        (
            mats("sweep: {max_iterations: [1.5]}"),
            "4: sweep.max_iterations[0]: expected an integer from 0 to 1000000, got `1.5`",
        ),
        (
            mats("sweep:\n  solver.ridge: [1]\n  ridge: [2]"),
            "6: sweep.solver.ridge: duplicate key (first given at line 5)",
        ),
        (
            mats(&format!("sweep: {{ridge: [{}], weight: [{}]}}", long(17), &long(17)[3..])),
            "4: sweep: 17 x 16 combinations are more than a sweep may have (expected at most 256)",
        ),
        (of("linear", "sweep: {ridge: [1]}"), "4: sweep.ridge: `linear` solves nothing, so it has no ridge"),
        (of("linear", "sweep: {lambda: [1]}"), "4: sweep.lambda: `linear` has no parameter lambda"),
        (mats("sweep: {parameters.lambda: [1]}"), "4: sweep.parameters.lambda: `mats` has no parameter lambda"),
        (
            of("wudi", "sweep: {solver.max_iterations: [1]}"),
            "4: sweep.solver.max_iterations: the solver here is direct and takes no iterations; \
             `solver: { method: cg }` does",
        ),
        (
            mats("subspace: fisher_diagonal\nmodels: 0").replace("\nmodels: 0", "").replace(
                MODELS,
                "models: [{model: a, statistics: s}]\n",
            ) + "\nsweep: {off_diagonal: [0.5]}",
            "5: sweep.off_diagonal: `subspace: fisher_diagonal` has nothing off the diagonal",
        ),
        (
            "merge_method: linear\nmodels:\n- model: a\n- model: b\n  parameters: {weight: 1}\nsweep: {weight: [1]}"
                .into(),
            "6: sweep.weight: models[1] sets its own weight at line 5, which wins over the swept one; leave one of them \
             out",
        ),
        (
            mats("parameters: {off_diagonal: [0, 1]}\nsweep: {off_diagonal: [1]}"),
            "5: sweep.off_diagonal: parameters.off_diagonal at line 4 varies over tensors or layers, which one number \
             would undo; leave one of them out",
        ),
        (
            of("linear", "sweep:\n  weight:\n  - 1\n  - 0"),
            "7: parameters.weight: the models' weights sum to 0, and their sum divides",
        ),
    ];
    for (text, message) in table {
        assert_eq!(refused(&text), message, "{text}");
    }
}

/// The list of methods is long and grows.
#[test]
fn a_misspelt_method_hears_the_nearest() {
    for (word, meant) in
        [("fischer", "fisher"), ("tise", "ties"), ("dare_tie", "dare_ties"), ("iso-c", "iso_c")]
    {
        let message = refused(&format!("merge_method: {word}\nmodels: []"));
        let head =
            format!("1: merge_method: unknown value `{word}` (expected one of linear, task_arithmetic,");
        assert!(message.contains(&head), "{message}");
        assert!(message.ends_with(&format!("; did you mean `{meant}`?")), "{message}");
    }
}
