//! Every deterministic method on every tensor, stored as f32 and as bf16.

use super::oracle::{self, deltas};
use super::{TENSORS, World};
use crate::outputs::HALF_ULP;

/// Half a unit in the last place of a bf16 of size 1.
const HALF_ULP_BF16: f64 = 1.0 / 256.0 / 2.0;

type Oracle<'a> = &'a dyn Fn(&[f64], &[Vec<f64>], &[usize]) -> Vec<f64>;

/// Merges and compares every tensor. f32 arithmetic on up to three models' values below 1.3: some twenty roundings, and
/// `more` times as many where quotients enlarge them.
fn check(head: &str, parameters: &[&str], more: f64, oracle: Oracle<'_>) {
    for dtype in ["F32", "BF16"] {
        let world = World::new(dtype, 1);
        let merged = world.scratch.merge(&World::config(head, parameters), "out", &[]);
        for (name, shape) in TENSORS {
            let (base, mut models) = world.values(name);
            models.truncate(parameters.len());
            let expected = oracle(&base, &models, shape);
            let got = merged.values(name);
            assert_eq!(merged.tensor(name).dtype, dtype);
            for (k, (got, want)) in got.iter().zip(&expected).enumerate() {
                let rounding = if dtype == "BF16" { HALF_ULP_BF16 * want.abs().max(1e-3) * 2.0 } else { 0.0 };
                let bound = 40.0 * more * HALF_ULP + rounding;
                assert!(
                    (got - want).abs() <= bound,
                    "{head} {dtype} {name}[{k}]: {got} instead of {want}, off by {:.1e} > {bound:.1e}",
                    got - want
                );
            }
        }
    }
}

#[test]
fn slerp() {
    let head = "merge_method: slerp\nbase_model: base\nparameters: { t: 0.3 }";
    check(head, &[""], 1.0, &|base, models, _| oracle::slerp(base, &models[0], 0.3));
    // Further than either end.
    let head = "merge_method: slerp\nbase_model: m1\nparameters: { t: -0.5 }";
    check(head, &["", ""], 4.0, &|_, models, _| oracle::slerp(&models[1], &models[0], -0.5));
}

#[test]
fn nuslerp() {
    let weights = ["weight: 1", "weight: 3"];
    check("merge_method: nuslerp", &weights, 1.0, &|_, m, _| oracle::nuslerp(&m[0], &m[1], 0.75));
    let of_deltas = |by: fn(&[usize]) -> Option<(usize, bool)>| {
        move |base: &[f64], models: &[Vec<f64>], shape: &[usize]| {
            let d = deltas(base, models);
            let mut out = vec![0.0; base.len()];
            let groups: Vec<Vec<usize>> = match by(shape) {
                None => vec![(0..base.len()).collect()],
                Some((width, false)) => {
                    (0..base.len()).collect::<Vec<_>>().chunks(width).map(<[_]>::to_vec).collect()
                }
                Some((width, true)) => (0..width).map(|c| (c..base.len()).step_by(width).collect()).collect(),
            };
            for group in groups {
                let pick = |v: &[f64]| group.iter().map(|k| v[*k]).collect::<Vec<f64>>();
                let merged = oracle::nuslerp(&pick(&d[0]), &pick(&d[1]), 0.75);
                for (k, v) in group.iter().zip(merged) {
                    out[*k] = base[*k] + v;
                }
            }
            out
        }
    };
    let head = "merge_method: nuslerp\nbase_model: base";
    // Task vectors of short columns may be nearly opposite: 1/sin θ enlarges roundings.
    check(head, &weights, 8.0, &of_deltas(|_| None));
    let rows = "merge_method: nuslerp\nbase_model: base\nparameters: { nuslerp_flatten: false }";
    check(rows, &weights, 200.0, &of_deltas(|s| (s.len() > 1).then(|| (s[s.len() - 1], false))));
    let columns = "merge_method: nuslerp\nbase_model: base\nparameters: { nuslerp_flatten: false, nuslerp_row_wise: true }";
    check(columns, &weights, 200.0, &of_deltas(|s| (s.len() > 1).then(|| (s[1..].iter().product(), true))));
}

#[test]
fn multislerp_and_karcher() {
    let weights = ["weight: 0.5", "weight: 1", "weight: 0.25"];
    check("merge_method: multislerp", &weights, 2.0, &|_, m, _| oracle::multislerp(m, &[0.5, 1.0, 0.25]));
    check("merge_method: multislerp\nbase_model: base", &weights, 4.0, &|base, m, _| {
        let point = oracle::multislerp(&deltas(base, m), &[0.5, 1.0, 0.25]);
        base.iter().zip(point).map(|(b, p)| b + p).collect()
    });
    let long = "parameters: { max_iter: 200, tol: 1e-9 }";
    check(&format!("merge_method: karcher\n{long}"), &["", "", ""], 2.0, &|_, m, _| oracle::karcher(m));
    // The base is one more model.
    check(&format!("merge_method: karcher\nbase_model: base\n{long}"), &["", ""], 2.0, &|base, m, _| {
        oracle::karcher(&[m[0].clone(), m[1].clone(), base.to_vec()])
    });
}

#[test]
fn ties_and_breadcrumbs() {
    // Weights of few bits: votes are exact in f32, and a vote of 0 is 0 on both sides.
    let per_model = ["weight: 1, density: 0.5", "weight: -0.5, density: 0", "weight: 0.75, density: 0.25"];
    let weights = [1.0, -0.5, 0.75];
    let trimmed = |base: &[f64], m: &[Vec<f64>]| -> Vec<Vec<f64>> {
        deltas(base, m).iter().zip([0.5, 0.0, 0.25]).map(|(d, density)| oracle::largest(d, density)).collect()
    };
    check("merge_method: ties\nbase_model: base", &per_model, 4.0, &|base, m, _| {
        oracle::consensus(base, &trimmed(base, m), &weights, true, 1.0)
    });
    let head =
        "merge_method: ties\nbase_model: base\nparameters: { rescale: l1, normalize: false, lambda: 0.5 }";
    check(head, &per_model, 4.0, &|base, m, _| {
        let (whole, thin) = (deltas(base, m), trimmed(base, m));
        let rescaled: Vec<_> = thin.iter().zip(&whole).map(|(t, w)| oracle::rescaled(t, w)).collect();
        oracle::consensus(base, &rescaled, &weights, false, 0.5)
    });
    let all = ["weight: 0.5, density: 1", "weight: 0, density: 1", "weight: 0.75, density: 1"];
    check("merge_method: ties\nbase_model: base", &all, 4.0, &|base, m, _| {
        oracle::consensus(base, &deltas(base, m), &[0.5, 0.0, 0.75], true, 1.0)
    });
    let per_model =
        ["weight: 1, density: 0.5, gamma: 0.1", "weight: 0.5, density: 0.95, gamma: 0.2", "weight: 0.75"];
    let crumbs = |base: &[f64], m: &[Vec<f64>]| -> Vec<Vec<f64>> {
        let settings = [(0.5, 0.1), (0.95, 0.2), (1.0, 0.01)];
        deltas(base, m)
            .iter()
            .zip(settings)
            .map(|(d, (density, g))| oracle::without_outliers(d, density, g))
            .collect()
    };
    let weights = [1.0, 0.5, 0.75];
    check(
        "merge_method: breadcrumbs\nbase_model: base\nparameters: { normalize: true }",
        &per_model,
        4.0,
        &|base, m, _| oracle::weighted_sum(base, &crumbs(base, m), &weights, true, 1.0),
    );
    let head = "merge_method: breadcrumbs_ties\nbase_model: base\nparameters: { rescale: true }";
    check(head, &per_model, 4.0, &|base, m, _| {
        let (whole, thin) = (deltas(base, m), crumbs(base, m));
        let rescaled: Vec<_> = thin.iter().zip(&whole).map(|(t, w)| oracle::rescaled(t, w)).collect();
        oracle::consensus(base, &rescaled, &weights, false, 1.0)
    });
}

#[test]
fn everything_kept_is_not_random() {
    let per_model = ["weight: 1", "weight: -0.5", "weight: 0.75"];
    let weights = [1.0, -0.5, 0.75];
    for method in ["dare_linear", "della_linear"] {
        check(&format!("merge_method: {method}\nbase_model: base"), &per_model, 4.0, &|base, m, _| {
            oracle::weighted_sum(base, &deltas(base, m), &weights, false, 1.0)
        });
    }
    for (method, normalize) in [("dare_ties", false), ("della", true)] {
        check(&format!("merge_method: {method}\nbase_model: base"), &per_model, 4.0, &|base, m, _| {
            oracle::consensus(base, &deltas(base, m), &weights, normalize, 1.0)
        });
    }
    let nothing = ["weight: 1, density: 0", "weight: 0.5, density: 0"];
    for method in ["dare_linear", "dare_ties", "della", "della_linear", "ties", "breadcrumbs"] {
        check(&format!("merge_method: {method}\nbase_model: base"), &nothing, 1.0, &|base, _, _| {
            base.to_vec()
        });
    }
}

#[test]
fn the_rest() {
    check("merge_method: model_stock\nbase_model: base", &["", "", ""], 1.0, &|base, m, _| {
        oracle::model_stock(base, &deltas(base, m))
    });
    check(
        "merge_method: model_stock\nbase_model: base\nparameters: { filter_wise: true }",
        &["", ""],
        40.0,
        &|base, m, shape| {
            let row = shape[shape.len() - 1];
            let d = deltas(base, m);
            let rows = base.chunks(row).enumerate().flat_map(|(k, base)| {
                let of: Vec<Vec<f64>> = d.iter().map(|d| d[k * row..(k + 1) * row].to_vec()).collect();
                oracle::model_stock(base, &of)
            });
            rows.collect()
        },
    );
    check("merge_method: nearswap\nbase_model: base\nparameters: { t: 0.05 }", &[""], 2.0, &|base, m, _| {
        oracle::nearswap(base, &m[0], 0.05)
    });
    check(
        "merge_method: magmax\nbase_model: base\nparameters: { lambda: 0.6 }",
        &["", "", ""],
        1.0,
        &|base, m, _| oracle::magmax(base, &deltas(base, m), 0.6),
    );
    check(
        "merge_method: ram\nbase_model: base\nparameters: { epsilon: 0.1 }",
        &["", "", ""],
        1.0,
        &|base, m, _| oracle::ram(base, &deltas(base, m), 0.1, None),
    );
    let head =
        "merge_method: ramplus_tl\nbase_model: base\nparameters: { epsilon: 0.15, r: 0.5, alpha: 1.5 }";
    check(head, &["", "", ""], 2.0, &|base, m, _| {
        oracle::ram(base, &deltas(base, m), 0.15, Some((0.5, 1.5)))
    });
    for topk in ["1.0", "0.3", "0"] {
        let head = format!("merge_method: sce\nbase_model: base\nparameters: {{ select_topk: {topk} }}");
        check(&head, &["", "", ""], 4.0, &|base, m, _| {
            oracle::sce(base, &deltas(base, m), topk.parse().unwrap())
        });
    }
    check("merge_method: passthrough", &["scale: -0.5"], 1.0, &|_, m, _| {
        m[0].iter().map(|v| -0.5 * v).collect()
    });
    check("merge_method: passthrough", &[""], 1.0, &|_, m, _| m[0].clone());
}

#[test]
fn arcee_fusion_takes_what_is_important() {
    let world = World::new("F32", 1);
    let merged = world.scratch.merge(
        &World::config("merge_method: arcee_fusion\nbase_model: base", &[""]),
        "out",
        &[],
    );
    for (name, shape) in TENSORS {
        let (base, models) = world.values(name);
        let importance = oracle::importance(&base, &models[0], shape[shape.len() - 1]);
        let mut sorted = importance.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| sorted[(q * (sorted.len() - 1) as f64) as usize];
        let threshold = at(0.5) + 1.5 * (at(0.75) - at(0.25));
        for (k, got) in merged.values(name).iter().enumerate() {
            // Importance is f32 there: within a few units of the threshold either answer is right.
            let close = (importance[k] - threshold).abs() <= 1e-6 * threshold.abs();
            let want = if importance[k] >= threshold { models[0][k] } else { base[k] };
            let either = close && (*got - base[k]).abs() < HALF_ULP;
            assert!((got - want).abs() <= 2.0 * HALF_ULP || either, "{name}[{k}]: {got} instead of {want}");
        }
    }
}

#[test]
fn pcb_of_each_tensor() {
    let head = "merge_method: pcb\nbase_model: base\nparameters: { scope: tensor, density: 0.3 }";
    let weights = ["weight: 1.2", "weight: 1", "weight: -0.8"];
    // β is f32 there; what just reaches the threshold has a share near 0 on one side and 0 on the other, and alone it
    // is divided by that share: the result jumps. Only such places may differ.
    let world = World::new("F32", 1);
    let merged = world.scratch.merge(&World::config(head, &weights), "out", &[]);
    for (name, _) in TENSORS {
        let (base, models) = world.values(name);
        let expected = oracle::pcb(&base, &deltas(&base, &models), &[1.2, 1.0, -0.8], 0.3);
        let off = merged.values(name).iter().zip(&expected).filter(|(g, w)| (*g - *w).abs() > 2e-4).count();
        assert!(off * 1000 <= base.len(), "{name}: {off} of {}", base.len());
    }
}

#[test]
fn consensus_keeps_what_enough_models_claim() {
    let head = "merge_method: consensus\nbase_model: base\nparameters: { mask_lambda: 0.5, lambda: 0.5 }";
    check(head, &["", "", ""], 2.0, &|base, m, _| {
        oracle::consensus_masks(base, &deltas(base, m), 0.5, 2, 0.5)
    });
    let head = "merge_method: consensus\nbase_model: base\nparameters: { mask_lambda: 0.25, min_models: 3 }";
    check(head, &["", "", ""], 2.0, &|base, m, _| {
        oracle::consensus_masks(base, &deltas(base, m), 0.25, 3, 1.0)
    });
}

#[test]
fn emr_writes_the_model_of_a_task() {
    let unified = "merge_method: emr\nbase_model: base";
    check(unified, &["", "", ""], 2.0, &|base, m, _| {
        base.iter().zip(oracle::unified(&deltas(base, m))).map(|(b, u)| b + u).collect()
    });
    let world = World::new("F32", 1);
    for flat in [false, true] {
        let rescaler = if flat { "flat" } else { "tensors" };
        let head =
            format!("merge_method: emr\nbase_model: base\nparameters: {{ task: 1, rescaler: {rescaler} }}");
        let merged = world.scratch.merge(&World::config(&head, &["", "", ""]), rescaler, &[]);
        let (mut own, mut masked) = (0.0, 0.0);
        for (name, _) in TENSORS {
            let (base, models) = world.values(name);
            let d = deltas(&base, &models);
            let unit = if flat { 1.0 } else { 1.0 / base.len() as f64 };
            own += d[1].iter().map(|v| v.abs()).sum::<f64>() * unit;
            let agreed = oracle::unified(&d).into_iter().zip(&d[1]).filter(|(u, v)| u * **v > 0.0);
            masked += agreed.map(|(u, _)| u.abs()).sum::<f64>() * unit;
        }
        for (name, _) in TENSORS {
            let (base, models) = world.values(name);
            let d = deltas(&base, &models);
            for (k, u) in oracle::unified(&d).into_iter().enumerate() {
                let want = base[k] + if u * d[1][k] > 0.0 { own / masked * u } else { 0.0 };
                let got = merged.values(name)[k];
                assert!((got - want).abs() < 40.0 * HALF_ULP, "{rescaler} {name}[{k}]: {got} {want}");
            }
        }
    }
    let beyond = "merge_method: emr\nbase_model: base\nparameters: { task: 3 }";
    world.scratch.refuse_unread(&World::config(beyond, &["", "", ""]), &["`task`", "got 3"]);
}

#[test]
fn thresholds_of_the_whole_model() {
    let world = World::new("F32", 1);
    let names = TENSORS.map(|t| t.0);
    let whole: Vec<(Vec<f64>, Vec<Vec<f64>>)> = names.iter().map(|n| world.values(n)).collect();
    let base: Vec<f64> = whole.iter().flat_map(|w| w.0.clone()).collect();
    let models: Vec<Vec<f64>> = (0..3).map(|i| whole.iter().flat_map(|w| w.1[i].clone()).collect()).collect();
    let d = deltas(&base, &models);
    let head = "merge_method: ties\nbase_model: base\nparameters: { scope: model, density: 0.2, weight: 1 }";
    let merged = world.scratch.merge(&World::config(head, &["", "", ""]), "out", &[]);
    let trimmed: Vec<Vec<f64>> = d
        .iter()
        .map(|d| {
            let sorted = oracle::descending(&oracle::magnitudes(d));
            let least = d[sorted[(0.2 * d.len() as f64) as usize - 1]].abs();
            d.iter().map(|v| if v.abs() >= least { *v } else { 0.0 }).collect()
        })
        .collect();
    let expected = oracle::consensus(&base, &trimmed, &[1.0; 3], true, 1.0);
    let got: Vec<f64> = names.iter().flat_map(|n| merged.values(n)).collect();
    for (k, (got, want)) in got.iter().zip(&expected).enumerate() {
        assert!((got - want).abs() < 40.0 * HALF_ULP, "ties [{k}]: {got} instead of {want}");
    }
    // Three reads of everything.
    assert_eq!(merged.parameter(names[1])["passes"], 3);
    let bytes: u64 = world.base.iter().map(|t| t.bytes.len() as u64).sum();
    assert_eq!(merged.report["bytes_read"], 3 * 4 * bytes);

    let head = "merge_method: pcb\nbase_model: base\nparameters: { density: 0.1 }";
    let merged = world.scratch.merge(&World::config(head, &["", "", ""]), "pcb", &[]);
    let expected = oracle::pcb(&base, &d, &[1.0; 3], 0.1);
    let got: Vec<f64> = names.iter().flat_map(|n| merged.values(n)).collect();
    let off = got.iter().zip(&expected).filter(|(g, w)| (*g - *w).abs() > 2e-4).count();
    assert!(off * 1000 <= base.len(), "pcb: {off} of {}", base.len());
    // Order statistics of magnitudes, of β, and the merge.
    assert_eq!(merged.parameter(names[0])["passes"], 5);
}

#[test]
fn passes_are_planned_as_they_are_made() {
    let world = World::new("BF16", 2);
    let large = TENSORS[1].0;
    let bytes = |name: &str| world.base.iter().find(|t| t.name == name).map_or(0, |t| t.bytes.len() as u64);
    for (head, passes) in [
        ("merge_method: ties\nbase_model: base\nparameters: { weight: 1, density: 0.5 }", 3),
        ("merge_method: ties\nbase_model: base\nparameters: { weight: 1 }", 1),
        ("merge_method: dare_ties\nbase_model: base\nparameters: { weight: 1, density: 0.5 }", 2),
        (
            "merge_method: dare_ties\nbase_model: base\nparameters: { weight: 1, density: 0.5, rescale: false }",
            1,
        ),
        ("merge_method: sce\nbase_model: base\nparameters: { select_topk: 0.5 }", 4),
        ("merge_method: model_stock\nbase_model: base", 2),
    ] {
        let config = World::config(head, &["", "", ""]);
        let plan = world.scratch.plan(&config, &[]);
        let blocks = plan["blocks"].as_array().expect("a list");
        let planned = |name: &str| blocks.iter().find(|b| b["name"] == name).expect("a block");
        assert_eq!(planned(large)["passes"], passes, "{head}");
        assert_eq!(planned(large)["bytes_read"], passes * 4 * bytes(large), "{head}");
        // What fits in one piece is read once.
        assert_eq!(planned(TENSORS[0].0)["passes"], 1, "{head}");
        let merged = world.scratch.merge(&config, &format!("out-{}", head.len()), &[]);
        assert_eq!(merged.report["bytes_read"], plan["bytes_read"], "{head}");
    }
}

#[test]
fn a_method_may_be_the_start_of_a_solve() {
    let world = World::new("F32", 3);
    let head = "merge_method: mats\nsubspace: delta_gram\nbase_model: base\nsolver: { method: direct, ridge: 1e9 }\ninitial: { merge_method: ties, parameters: { weight: 1, density: 0.5 } }";
    let merged = world.scratch.merge(&World::config(head, &["", "", ""]), "solved", &[]);
    let ties = "merge_method: ties\nbase_model: base\nparameters: { weight: 1, density: 0.5 }";
    let start = world.scratch.merge(&World::config(ties, &["", "", ""]), "start", &[]);
    // A ridge of 1e9 holds the solution to its start, within 1e-9 of the models' distance.
    for (name, shape) in TENSORS.iter().filter(|(_, shape)| shape.len() == 2) {
        for (got, want) in merged.values(name).iter().zip(start.values(name)) {
            assert!((got - want).abs() < 1e-6, "{name} {shape:?}: {got} instead of {want}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let world = World::new("F32", 4);
    for (head, parameters, words) in [
        (
            "merge_method: ties\nbase_model: base",
            &["density: 0.5"][..],
            &["parameters.weight", "no default"][..],
        ),
        ("merge_method: ties", &["weight: 1"], &["base_model", "`ties` needs it"]),
        ("merge_method: slerp\nbase_model: base", &[""], &["parameters.t", "no default"]),
        (
            "merge_method: slerp\nbase_model: base\nparameters: { t: 1 }",
            &["", ""],
            &["2 models, the base included (got 3)"],
        ),
        ("merge_method: nuslerp", &["weight: 1"], &["merges 2 models (got 1)"]),
        (
            "merge_method: model_stock\nbase_model: base",
            &[""],
            &["at least 2 models beside the base (got 1)"],
        ),
        ("merge_method: passthrough", &["", ""], &["`passthrough` copies one model (got 2)"]),
        (
            "merge_method: ties\nbase_model: base",
            &["weight: 1, denstiy: 1"],
            &["denstiy", "did you mean `density`"],
        ),
        (
            "merge_method: dare_ties\nbase_model: base",
            &["weight: 1, density: 1.5"],
            &["a number from 0 to 1"],
        ),
        (
            "merge_method: dare_ties\nbase_model: base\nparameters: { rescale: l2 }",
            &["weight: 1"],
            &["`l2`", "inverse_probability"],
        ),
        (
            "merge_method: della\nbase_model: base",
            &["weight: 1, density: 0.1"],
            &["0.1 ± 0.15", "smaller `epsilon`"],
        ),
        (
            "merge_method: breadcrumbs\nbase_model: base\nparameters: { normalize: true }",
            &["weight: 1", "weight: -1"],
            &["sum to 0"],
        ),
        (
            "merge_method: ties\nbase_model: base\nparameters: { scope: model }",
            &["weight: 1, density: [0, 1]"],
            &["one `density` for all tensors"],
        ),
        (
            "merge_method: ties\nbase_model: base",
            &["weight: [{ filter: large, value: 1 }]"],
            &["`weight` of models[0] has no value"],
        ),
        ("merge_method: tise\nbase_model: base", &["weight: 1"], &["`tise`", "did you mean `ties`"]),
        ("merge_method: ties\nbase_model: base\nsolver: { method: cg }", &["weight: 1"], &["solves nothing"]),
    ] {
        world.scratch.refuse_unread(&World::config(head, parameters), words);
    }
}

#[test]
fn f64_models_are_merged_in_f64_or_it_is_told() {
    let scratch = crate::util::Scratch::new();
    // 1 + 2^-40 is 1 in f32.
    let value = |k: i32| 1.0 + f64::from(k) * 2f64.powi(-40);
    let model = |k: i32| [crate::util::Tensor::new("w.weight", "F64", &[2, 2], &[value(k); 4])];
    for (name, k) in [("base", 0), ("m0", 1), ("m1", 3)] {
        scratch.model(name, &model(k));
    }
    for (head, want) in [
        ("merge_method: linear", value(2)),
        ("merge_method: task_arithmetic\nbase_model: base", value(4)),
        ("merge_method: iso_c\nbase_model: base", f64::NAN),
    ] {
        let merged = scratch.merge(&World::config(head, &["", ""]), &head[14..18], &[]);
        assert!(!merged.left_out().contains("computes in f32"), "{head}");
        assert!(want.is_nan() || merged.values("w.weight") == [want; 4], "{head}");
    }
    let ties = "merge_method: ties\nbase_model: base\nparameters: { weight: 1 }";
    let merged = scratch.merge(&World::config(ties, &["", ""]), "ties", &[]);
    assert!(merged.left_out().contains("`ties` computes in f32"), "{}", merged.left_out());
    assert_eq!(merged.values("w.weight"), [1.0; 4]);
    let plan = scratch.plan(&World::config(ties, &["", ""]), &[]);
    assert!(plan["warnings"].to_string().contains("stored as F64"), "{plan}");
}

/// Of opposite tensors no arc is the shortest, and what f64 leaves of one is noise: the first stays.
#[test]
fn opposite_tensors_give_values_of_their_size() {
    let scratch = crate::util::Scratch::new();
    for (name, factor) in [("a", 1.7), ("b", -0.33)] {
        let tensors = [
            crate::util::Tensor::f32("one", &[1], &[factor]),
            crate::util::Tensor::f32("three", &[3], &[factor, 2.0 * factor, 3.0 * factor]),
        ];
        scratch.model(name, &tensors);
    }
    for models in ["[{model: a}, {model: b}]", "[{model: b}, {model: a}]"] {
        let merged = scratch.merge(&format!("merge_method: karcher\nmodels: {models}\n"), "karcher", &[]);
        // Their mean length, in either direction.
        assert!((merged.values("one")[0].abs() - 1.015).abs() < 1e-6, "{models}: {:?}", merged.values("one"));
        assert!(
            (merged.values("three")[0].abs() - 1.015).abs() < 1e-6,
            "{models}: {:?}",
            merged.values("three")
        );
        std::fs::remove_dir_all(&merged.directory).expect("ours");
        let config = format!("merge_method: nuslerp\nmodels: {models}\nparameters: {{weight: 0.5}}\n");
        let merged = scratch.merge(&config, "nuslerp", &[]);
        for name in ["one", "three"] {
            assert!(
                merged.values(name).iter().all(|v| v.abs() <= 5.1),
                "{models}: {:?}",
                merged.values(name)
            );
        }
        std::fs::remove_dir_all(&merged.directory).expect("ours");
    }
}
