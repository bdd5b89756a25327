use super::*;
use crate::kernel::{Threading, gemm, mat, mat_mut};
use crate::read::testing::{Spec, directory, file, write};
use crate::solve::eigen::Eigen;

fn options() -> ConvertOptions {
    ConvertOptions {
        from: From::Auto,
        kind: None,
        values: None,
        tokens: None,
        examples: None,
        renames: Vec::new(),
        form: None,
        dtype: None,
        rank: None,
        max_memory: 1 << 30,
        io: IoMode::Mmap,
    }
}

/// Converts one file of these contents, read both ways with the same bytes.
fn converted(
    metadata: &[(&str, &str)],
    tensors: &[Spec<'_>],
    options: &ConvertOptions,
) -> Result<(ModelStatistics, Vec<u8>, tempfile::TempDir), ConvertError> {
    let directory = directory();
    let metadata = [&[("format", super::super::FORMAT)], metadata].concat();
    let input = write(directory.path(), "in.safetensors", file(&metadata, tensors));
    let mut written = Vec::new();
    for io in [IoMode::Mmap, IoMode::Pread] {
        let out = directory.path().join(format!("{io:?}.safetensors"));
        let options = ConvertOptions { io, ..options.clone() };
        convert(std::slice::from_ref(&input), &out, &options, &AtomicBool::new(false))?;
        written.push(std::fs::read(&out).expect("written"));
    }
    assert_eq!(written[0], written[1]);
    let out = directory.path().join("Mmap.safetensors");
    let statistics = ModelStatistics::open(&[out], IoMode::Mmap)?;
    Ok((statistics, written.remove(0), directory))
}

fn f64s(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `Σ_k scale^k b_k b_kᵀ` of `rank` pseudorandom vectors.
fn gram(side: usize, rank: usize, scale: f64, seed: u64) -> Vec<f64> {
    let mut state = seed | 1;
    let b: Vec<f64> = (0..rank * side)
        .map(|at| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (((state >> 33) as f64) / f64::from(1u32 << 31) - 0.5) * scale.powi((at / side) as i32).sqrt()
        })
        .collect();
    let mut s = vec![0.0; side * side];
    let b = mat(&b, rank, side);
    gemm(mat_mut(&mut s, side, side), false, b.transpose(), b, 1.0, Threading::Sequential);
    // Products of two orders of factors differ in the last bit.
    for i in 0..side {
        for j in 0..i {
            s[j * side + i] = s[i * side + j];
        }
    }
    s
}

/// All values of a stored statistic.
fn values(statistics: &ModelStatistics, key: &str) -> Vec<f64> {
    let statistic = statistics.statistics().iter().find(|s| s.key == key).expect("is there");
    let mut values = vec![0.0f64; statistic.elements() as usize];
    decode(statistics, statistic, 0..values.len(), &mut values, &mut Vec::new()).expect("readable");
    values
}

fn number(statistics: &ModelStatistics, key: &str) -> f64 {
    statistics.metadata()[key].parse().expect("a number")
}

/// `A - FᵀF`, dense.
fn residual(a: &[f64], f: &[f64], side: usize) -> Vec<f64> {
    let mut residual = a.to_vec();
    let f = mat(f, f.len() / side, side);
    gemm(mat_mut(&mut residual, side, side), true, f.transpose(), f, -1.0, Threading::Sequential);
    residual
}

fn spectral_norm(symmetric: &[f64], side: usize) -> f64 {
    let eigen = Eigen::of(mat(symmetric, side, side)).expect("finite");
    eigen.values.iter().fold(0.0, |most, v| v.abs().max(most))
}

#[test]
fn a_low_rank_is_the_best_one_and_knows_its_error() {
    let side = 24;
    let a = gram(side, 24, 0.6, 7);
    let eigen = Eigen::of(mat(&a, side, side)).expect("finite");
    let trace: f64 = (0..side).map(|i| a[i * side + i]).sum();
    for (rank, dtype) in
        [(1, Dtype::F64), (7, Dtype::F64), (23, Dtype::F64), (7, Dtype::F32), (7, Dtype::Bf16)]
    {
        let options = ConvertOptions { rank: Some(rank), dtype: Some(dtype), ..options() };
        let tensors = [
            ("a/input_gram", "F64", &[side, side][..], f64s(&a)),
            ("a/fisher_block", "F64", &[2, 2], f64s(&[2.0, 1.0, 1.0, 2.0])),
        ];
        let (found, _, _directory) =
            converted(&[("alias:b/input_gram", "a/input_gram")], &tensors, &options).expect("legal");
        // The alias follows the kind; a Fisher block has no factored kind.
        assert_eq!(found.aliases().collect::<Vec<_>>(), [("b/input_factor", "a/input_factor")]);
        assert!(found.get("a", Kind::FisherBlock).is_some_and(|s| s.form == Form::Full { side: 2 }));
        let norm = spectral_norm(&residual(&a, &values(&found, "a/input_factor"), side), side);
        let best = eigen.values[side - 1 - rank];
        let bound = number(&found, "error:a/input_factor");
        assert!(norm <= bound, "rank {rank} {dtype}: {norm} over {bound}");
        if dtype == Dtype::F64 {
            // Eckart-Young: no matrix of that rank is nearer. 1e-6 are the digits shown.
            assert!(bound <= best * (1.0 + 1e-5) + 1e-12 * trace, "rank {rank}: {bound} for {best}");
        }
        let dropped: f64 = eigen.values[..side - rank].iter().sum();
        let stated = number(&found, "dropped_trace:a/input_factor");
        // Seven digits shown, and the eigenvalues' own rounding.
        assert!(
            (stated - dropped).abs() <= 1e-6 * dropped + 1e-12 * trace,
            "rank {rank}: {stated} {dropped}"
        );
    }
}

#[test]
fn a_wide_gram_is_cut_by_subspace_iteration_within_its_bound() {
    let (side, rank) = (1100, 20);
    assert!(matches!(Method::of(side, rank), Method::Subspace(_)));
    let a = gram(side, 60, 0.8, 3);
    let options = ConvertOptions { rank: Some(rank), form: None, ..options() };
    let packed: Vec<f64> = (0..side).flat_map(|i| a[i * side..=i * side + i].to_vec()).collect();
    let tensors = [("a/output_gram", "F64", &[packed.len()][..], f64s(&packed))];
    let (found, _, _directory) = converted(&[], &tensors, &options).expect("legal");
    let residual = residual(&a, &values(&found, "a/output_factor"), side);
    let frobenius = residual.iter().map(|v| v * v).sum::<f64>().sqrt();
    let squares: f64 = a.iter().map(|v| v * v).sum();
    let bound = number(&found, "error:a/output_factor");
    assert!(frobenius <= bound, "{frobenius} over {bound}");
    // It is that norm, but for the digits shown and what the difference of two sums of squares may round to.
    let rounding = (side as f64 * f64::EPSILON * squares).sqrt();
    assert!(bound <= frobenius * (1.0 + 1e-5) + rounding, "{bound} for {frobenius}");
    let trace = |m: &[f64]| (0..side).map(|i| m[i * side + i]).sum::<f64>();
    let stated = number(&found, "dropped_trace:a/output_factor");
    assert!((stated - trace(&residual)).abs() <= 1e-6 * stated.abs() + 1e-12 * trace(&a));
    // Near the best: the 21st eigenvalue and what follows, by the nonzero spectrum of BBᵀ, falling by 0.8 each.
    let eigen_bound = trace(&residual);
    assert!(eigen_bound < 0.03 * trace(&a), "0.8^20 of the trace is left: {eigen_bound}");
}

#[test]
fn factors_are_cut_and_their_errors_add() {
    // F₀ = diag(3, 2, 1) in a wider space: FᵀF has 9, 4 and 1.
    let f = [3.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    let tensors = [("a/input_factor", "F64", &[3, 4][..], f64s(&f))];
    let metadata = [("error:a/input_factor", "0.5"), ("layout:a", "in,out")];
    let options =
        ConvertOptions { rank: Some(1), renames: vec![("a".to_owned(), "m.a".to_owned())], ..options() };
    let (found, _, _directory) = converted(&metadata, &tensors, &options).expect("legal");
    let kept = values(&found, "m.a/input_factor");
    assert!((kept[0].abs() - 3.0).abs() < 1e-12 && kept[1..].iter().all(|v| v.abs() < 1e-12), "{kept:?}");
    assert!((number(&found, "error:m.a/input_factor") - 4.5).abs() < 1e-4);
    assert!((number(&found, "dropped_trace:m.a/input_factor") - 5.0).abs() < 1e-5);
    assert_eq!(found.metadata()["layout:m.a"], "in,out");
    // A rank that is no smaller leaves the bytes and what is known of them.
    let options = ConvertOptions { rank: Some(3), ..self::options() };
    let (found, _, _directory) = converted(&metadata, &tensors, &options).expect("legal");
    assert_eq!((values(&found, "a/input_factor"), number(&found, "error:a/input_factor")), (f.to_vec(), 0.5));
}

#[test]
fn dense_to_packed_to_dense_gives_the_same_bytes() {
    // A side that is no multiple of any tile, in every dtype; the header is the same, too.
    for (dtype, name) in
        [(Dtype::F32, "F32"), (Dtype::Bf16, "BF16"), (Dtype::F16, "F16"), (Dtype::F64, "F64")]
    {
        let side = 37;
        let a = gram(side, 40, 1.0, 5);
        let mut bytes = vec![0; a.len() * dtype.float_bytes().expect("a float")];
        crate::read::encode_f64(dtype, &a, &mut bytes).expect("fits");
        let tensors = [("a/input_gram", name, &[side, side][..], bytes)];
        let with = |form| ConvertOptions { form: Some(form), ..options() };
        let (_, dense, directory) =
            converted(&[("tokens", "9")], &tensors, &with(GramForm::Dense)).expect("legal");
        let first = directory.path().join("Mmap.safetensors");
        let (packed, again) = (directory.path().join("packed"), directory.path().join("again"));
        let never = AtomicBool::new(false);
        convert(&[first], &packed, &with(GramForm::Packed), &never).expect("legal");
        convert(std::slice::from_ref(&packed), &again, &with(GramForm::Dense), &never).expect("legal");
        assert_eq!(std::fs::read(again).expect("written"), dense);
        let smaller = std::fs::metadata(packed).expect("written").len();
        assert!(smaller < dense.len() as u64 * 6 / 10, "{smaller} of {}", dense.len());
    }
}

#[test]
fn a_dtype_that_cannot_hold_the_values_is_refused() {
    let half = ConvertOptions { dtype: Some(Dtype::F16), ..options() };
    let refused = |key: &str, shape: &[usize], values: &[f64], expected: &str| {
        let tensors = [(key, "F64", shape, f64s(values))];
        let error = converted(&[], &tensors, &half).expect_err("must be refused");
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("bf16"), "{text}\ndoes not say: {expected}");
        // f32 and bf16 have the range.
        for dtype in [Dtype::F32, Dtype::Bf16] {
            converted(&[], &tensors, &ConvertOptions { dtype: Some(dtype), ..options() }).expect("fits");
        }
    };
    refused("a/fisher_diagonal", &[2], &[1.0, 70000.0], "out of its range");
    // A gradient Gram of 1e-9 would become 0 in f16: a direction, or all of them.
    refused("a/output_gram", &[2, 2], &[1.0, 0.0, 0.0, 1e-9], "would become 0");
    refused("a/fisher_diagonal", &[2], &[1e-9, 1e-9], "would be lost");
    refused("a/input_factor", &[1, 2], &[1e-9, 1e-9], "would be lost");
    // One small entry of a diagonal Fisher costs nothing.
    let tensors = [("a/fisher_diagonal", "F64", &[2][..], f64s(&[1.0, 1e-9]))];
    converted(&[], &tensors, &half).expect("rounding");
}

#[test]
fn values_that_no_merge_takes_are_refused() {
    for (key, shape, values, expected) in [
        ("a/input_gram", &[2, 2][..], vec![1.0, 0.0, 0.0, -1.0], "not negative"),
        ("a/input_gram", &[3], vec![1.0, f64::NAN, 1.0], "a finite number"),
        ("a/input_gram", &[2, 2], vec![1.0, 0.5, 0.2, 1.0], "not symmetric"),
        ("a/fisher_diagonal", &[2, 2], vec![1.0, 0.0, -1.0, 1.0], "row 1, column 0"),
        ("a/input_mean", &[2], vec![1.0, f64::INFINITY], "a finite number"),
        ("a/input_factor", &[1, 2], vec![1.0, f64::NAN], "row 0, column 1"),
    ] {
        let tensors = [(key, "F64", shape, f64s(&values))];
        let error = converted(&[], &tensors, &options()).expect_err("must be refused").to_string();
        assert!(error.contains(expected), "{error}\ndoes not say: {expected}");
    }
    // A mean may be negative.
    converted(&[], &[("a/input_mean", "F64", &[1][..], f64s(&[-1.0]))], &options()).expect("legal");
}

#[test]
fn memory_is_planned_and_a_cancelled_run_leaves_nothing() {
    let side = 600;
    let a = gram(side, 4, 1.0, 1);
    let tensors = [("a/input_gram", "F64", &[side, side][..], f64s(&a))];
    let low = ConvertOptions { rank: Some(4), max_memory: 24 << 20, ..options() };
    let error = converted(&[], &tensors, &low).expect_err("too little");
    let ConvertError::Memory { least, .. } = error else { panic!("{error}") };
    // The matrix and three more of its size.
    assert!(least > 4 * 8 * (side * side) as u64);
    converted(&[], &tensors, &ConvertOptions { max_memory: least, ..low.clone() })
        .expect("the least that would do");
    converted(&[], &tensors, &ConvertOptions { rank: None, ..low }).expect("a tile at a time");

    let directory = directory();
    let metadata = [("format", super::super::FORMAT)];
    let input = write(directory.path(), "in", file(&metadata, &tensors));
    let out = directory.path().join("out");
    let error = convert(&[input], &out, &options(), &AtomicBool::new(true)).expect_err("cancelled");
    assert!(matches!(error, ConvertError::Cancelled));
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 1);
}

#[test]
fn renames_must_fit_and_stay_apart() {
    let one = |v: f64| f64s(&[v]);
    let tensors =
        [("t.a/fisher_diagonal", "F64", &[1][..], one(1.0)), ("a/fisher_diagonal", "F64", &[1], one(2.0))];
    let with = |old: &str, new: &str| ConvertOptions {
        renames: vec![(old.to_owned(), new.to_owned())],
        ..options()
    };
    let (found, _, _directory) = converted(&[], &tensors, &with("t.", "u.")).expect("legal");
    assert_eq!(found.parameters().collect::<Vec<_>>(), ["a", "u.a"]);
    let refused = |options| converted(&[], &tensors, &options).expect_err("must be refused").to_string();
    assert!(refused(with("t.", "")).contains("`a/fisher_diagonal`"));
    assert!(refused(with("x.", "")).contains("none has it"));
    assert!(refused(ConvertOptions { values: Some(Values::Sums), ..options() }).contains("are means"));
    assert!(refused(ConvertOptions { kind: Some(Kind::InputGram), ..options() }).contains("--kind"));
}
