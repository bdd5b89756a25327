//! How fast the operators apply, against the machine's f32 peak measured in the same run.
//!
//! `cargo bench --bench operator_apply`. Criterion's `Gelem/s` are GFLOP/s here. After its output, one line a case:
//! best rate, and its share of the peak of as many threads; and `kernel::gemm` against faer on the same products.
//! Factors come from statistics files as in a merge: packed bf16, `held` widened in memory or `streamed`, decoded at
//! every use.

// The table at the end is what the program is for.
#![allow(clippy::print_stdout)]

#[path = "support/peak.rs"]
mod peak;
#[path = "support/random.rs"]
mod random;

use std::cell::{Ref, RefCell};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::bf16;
use mats_stream::kernel::{Buffer, Threading, gemm, mat, mat_mut};
use mats_stream::operator::{
    BlockShape, Factor, GramSum, GramTerm, KroneckerSum, KroneckerTerm, LinearOperator, LowRank, MemoryRows,
    Panels, Symmetric, Workspace,
};
use mats_stream::read::IoMode;
use mats_stream::statistics::factor::GramRows;
use mats_stream::statistics::{Kind, ModelStatistics};
use random::Random;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// `[out, in]` of the blocks: small models', a LLaMA-like MLP's, and two of a larger one.
const SHAPES: [(usize, usize); 6] =
    [(48, 48), (96, 96), (384, 384), (1024, 2816), (2048, 2048), (1024, 4096)];
/// Up to this side also one block a thread: how the engine runs small ones.
const SMALL: usize = 384;
const MODELS: [usize; 2] = [4, 8];
/// `[m, n, k]` of the products that are compared with faer's.
const PRODUCTS: [(usize, usize, usize); 6] =
    [(48, 48, 48), (96, 96, 96), (384, 384, 384), (1024, 2816, 2816), (1024, 2816, 1024), (2048, 2048, 2048)];
const PEAK: &str = "fma_peak/f32";

/// Threads of a case.
struct Threads {
    pool: ThreadPool,
    /// As its name says it.
    name: &'static str,
}

impl Threads {
    fn count(&self) -> usize {
        self.pool.current_num_threads()
    }
}

/// Runs `op` with one thread, then with all.
fn with_threads(mut op: impl FnMut(&Threads)) {
    for (count, name) in [(1, "threads=1"), (rayon::current_num_threads(), "threads=all")] {
        let pool = ThreadPoolBuilder::new().num_threads(count).build().expect("threads start");
        op(&Threads { pool, name });
    }
}

fn peak_id(threads: &Threads) -> String {
    format!("{PEAK}/{}", threads.name)
}

/// Best rate of every case, for the lines at the end.
#[derive(Default)]
struct Rates(RefCell<Vec<(String, f64)>>);

impl Rates {
    /// Times `op` and keeps the best of what criterion asks for.
    fn time(
        &self,
        threads: &Threads,
        id: &str,
        flops: f64,
        iterations: u64,
        mut op: impl FnMut() + Send,
    ) -> Duration {
        let elapsed = threads.pool.install(|| {
            let started = Instant::now();
            for _ in 0..iterations {
                op();
            }
            started.elapsed()
        });
        let rate = flops * iterations as f64 / elapsed.as_secs_f64();
        let mut rates = self.0.borrow_mut();
        match rates.iter_mut().find(|(name, _)| name == id) {
            Some((_, best)) => *best = best.max(rate),
            None => rates.push((id.to_owned(), rate)),
        }
        elapsed
    }

    fn all(&self) -> Ref<'_, Vec<(String, f64)>> {
        self.0.borrow()
    }

    fn get(&self, id: &str) -> Option<f64> {
        self.all().iter().find(|(name, _)| name == id).map(|(_, rate)| *rate)
    }
}

/// What a case needs.
type Bench<'b> = (&'b mut Criterion, &'b Rates, &'b Threads);

/// A case of one group, timed through `rates`.
fn case(
    (criterion, rates, threads): Bench<'_>,
    group: &str,
    id: &str,
    flops: f64,
    mut op: impl FnMut() + Send,
) {
    let id = format!("{id}/{}", threads.name);
    let name = format!("{group}/{id}");
    let mut group = criterion.benchmark_group(group);
    group.sample_size(10).throughput(Throughput::Elements(flops as u64));
    // A flat plan of samples: the large cases take a second an iteration.
    group.sampling_mode(criterion::SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.bench_function(BenchmarkId::from_parameter(id), |bencher| {
        bencher.iter_custom(|iterations| rates.time(threads, &name, flops, iterations, &mut op));
    });
    group.finish();
}

/// Packed bf16 of a diagonally dominant matrix: cheap to make, and the products' speed does not depend on the values.
fn packed_gram(side: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed, side as u64);
    let mut bytes = Vec::with_capacity(side * (side + 1));
    for i in 0..side {
        for j in 0..=i {
            let v = random.uniform() as f32 - 0.5 + if i == j { side as f32 } else { 0.0 };
            bytes.extend(bf16::from_f32(v).to_le_bytes());
        }
    }
    bytes
}

/// One model's statistics of the parameter `w` `[m, n]`.
fn statistics(directory: &Path, (m, n): (usize, usize), model: usize) -> Arc<ModelStatistics> {
    let path = directory.join(format!("{m}x{n}-{model}.safetensors"));
    let packed = |side: usize, seed: usize| (packed_gram(side, seed as u64), side * (side + 1) / 2);
    let tensors = [("w/input_gram", packed(n, 2 * model)), ("w/output_gram", packed(m, 2 * model + 1))];
    let views = tensors.iter().map(|(key, (bytes, elements))| {
        (key.to_string(), TensorView::new(Dtype::BF16, vec![*elements], bytes).expect("two bytes an element"))
    });
    let metadata = [("format".to_owned(), "mats-stream-statistics/1".to_owned())].into();
    serialize_to_file(views, Some(metadata), &path).expect("room in the temporary directory");
    Arc::new(ModelStatistics::open(&[path], IoMode::Mmap).expect("written a moment ago"))
}

fn factor(statistics: &Arc<ModelStatistics>, kind: Kind, held: bool) -> Factor<f32> {
    let statistic = statistics.get("w", kind).expect("written a moment ago");
    let rows = GramRows::new(Arc::clone(statistics), statistic, 1.0).expect("a Gram in packed form");
    let panels = match held {
        true => Panels::held(&rows, Threading::Parallel).expect("a mapped file"),
        false => Panels::streamed(Arc::new(rows)),
    };
    Factor::Symmetric(Symmetric::new(panels).expect("a Gram is square"))
}

fn low_rank(rank: usize, side: usize, seed: u64) -> Factor<f32> {
    let values = Random::new(seed, rank as u64).normals(rank * side, 1.0 / (rank as f64).sqrt());
    let mut diagonal = vec![0.0; side];
    for row in values.chunks_exact(side) {
        diagonal.iter_mut().zip(row).for_each(|(d, v)| *d += v * v);
    }
    let rows = MemoryRows::new(rank, side, values).expect("rank times side values");
    let panels = Panels::held(&rows, Threading::Parallel).expect("memory is always there");
    Factor::LowRank(LowRank::new(panels, 1.0, 1.0, diagonal.into()))
}

fn vector(shape: BlockShape, seed: u64) -> Buffer<f32> {
    let mut random = Random::new(seed, 99);
    let mut x = Buffer::zeroed(shape.elements());
    x.iter_mut().for_each(|v| *v = random.uniform() as f32 - 0.5);
    x
}

/// `apply` with all threads on one block.
fn whole(bench: Bench<'_>, group: &str, id: &str, operator: &dyn LinearOperator<f32>) {
    let x = vector(operator.shape(), 7);
    let mut y = Buffer::zeroed(operator.shape().elements());
    let mut workspace = Workspace::new(operator.scratch_elements(), Threading::Parallel);
    case(bench, group, id, operator.flops(), || {
        operator.apply(&x, &mut y, &mut workspace).expect("shapes fit and the file is there");
    });
}

/// `apply` with one block a thread: how the engine runs many small blocks.
fn side_by_side(bench: Bench<'_>, group: &str, id: &str, operator: &dyn LinearOperator<f32>) {
    let count = bench.2.count();
    let x = vector(operator.shape(), 7);
    let mut blocks: Vec<_> = (0..count)
        .map(|_| {
            let workspace = Workspace::new(operator.scratch_elements(), Threading::Sequential);
            (Buffer::zeroed(operator.shape().elements()), workspace)
        })
        .collect();
    // Enough per task that starting it does not count.
    let repeats = (2e9 / operator.flops()).ceil().max(1.0) as usize;
    case(bench, group, id, operator.flops() * (count * repeats) as f64, || {
        blocks.par_iter_mut().with_max_len(1).for_each(|(y, workspace)| {
            for _ in 0..repeats {
                operator.apply(&x, y, workspace).expect("shapes fit and the file is there");
            }
        });
    });
}

fn operators(criterion: &mut Criterion, rates: &Rates, directory: &Path) {
    for (m, n) in SHAPES {
        let largest = MODELS.into_iter().max().unwrap_or(0);
        let files: Vec<_> = (0..largest).map(|k| statistics(directory, (m, n), k)).collect();
        with_threads(|threads| {
            peak_again(rates, threads);
            kronecker((criterion, rates, threads), BlockShape::new(m, n), &files);
            gram((criterion, rates, threads), BlockShape::new(m, n), &files[..4]);
        });
    }
}

fn kronecker((criterion, rates, threads): Bench<'_>, shape: BlockShape, files: &[Arc<ModelStatistics>]) {
    let BlockShape { out_features: m, in_features: n } = shape;
    for models in MODELS {
        for (held, how) in [(true, "held"), (false, "streamed")] {
            let terms = files[..models]
                .iter()
                .map(|file| KroneckerTerm {
                    weight: 1.0 / models as f64,
                    a: factor(file, Kind::InputGram, held),
                    g: factor(file, Kind::OutputGram, held),
                    diagonals: None,
                })
                .collect();
            let operator = KroneckerSum::new(shape, terms).expect("factors of the block's sides");
            let id = format!("{m}x{n}/models={models}/{how}");
            whole((criterion, rates, threads), "operator_apply/kronecker", &id, &operator);
            if m.max(n) <= SMALL && held && threads.count() > 1 {
                let id = format!("{m}x{n}/models={models}/{how}-one-block-a-thread");
                side_by_side((criterion, rates, threads), "operator_apply/kronecker", &id, &operator);
            }
        }
    }
    let terms = (0..4u64)
        .map(|k| KroneckerTerm {
            weight: 0.25,
            a: low_rank(n.div_ceil(8), n, 2 * k),
            g: low_rank(m.div_ceil(8), m, 2 * k + 1),
            diagonals: None,
        })
        .collect();
    let operator = KroneckerSum::new(shape, terms).expect("factors of the block's sides");
    let id = format!("{m}x{n}/models=4/rank=1:8");
    whole((criterion, rates, threads), "operator_apply/low_rank", &id, &operator);
}

fn gram((criterion, rates, threads): Bench<'_>, shape: BlockShape, files: &[Arc<ModelStatistics>]) {
    let BlockShape { out_features: m, in_features: n } = shape;
    let terms = |held| -> Vec<GramTerm<f32>> {
        files
            .iter()
            .map(|file| GramTerm { weight: 0.25, a: factor(file, Kind::InputGram, held), diagonal: None })
            .collect()
    };
    for (held, how) in [(true, "held"), (false, "streamed")] {
        let operator = GramSum::new(shape, terms(held)).expect("factors of the block's sides");
        let id = format!("{m}x{n}/models=4/{how}");
        whole((criterion, rates, threads), "operator_apply/gram", &id, &operator);
    }
    let mut formed = GramSum::new(shape, terms(false)).expect("factors of the block's sides");
    let mut workspace = Workspace::new(formed.scratch_elements(), Threading::Parallel);
    formed.form(&mut workspace).expect("a mapped file");
    whole((criterion, rates, threads), "operator_apply/gram", &format!("{m}x{n}/models=4/formed"), &formed);
}

/// `dst ← lhs·rhs` as one faer call a thread, each on its strip of rows.
fn by_faer(dst: MatMut<'_, f32>, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, threads: usize) {
    if threads <= 1 || dst.nrows() <= 1 {
        matmul(dst, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
        return;
    }
    let cut = dst.nrows() * (threads / 2) / threads;
    let (top, bottom) = dst.split_at_row_mut(cut);
    let (lhs_top, lhs_bottom) = lhs.split_at_row(cut);
    rayon::join(
        || by_faer(top, lhs_top, rhs, threads / 2),
        || by_faer(bottom, lhs_bottom, rhs, threads - threads / 2),
    );
}

/// `(id, faer's id)` of every pair, for the ratios at the end.
fn products(criterion: &mut Criterion, rates: &Rates) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for (m, n, k) in PRODUCTS {
        let a = vector(BlockShape::new(m, k), 1);
        let b = vector(BlockShape::new(k, n), 2);
        let mut c = Buffer::<f32>::zeroed(m * n);
        let flops = 2.0 * (m * n) as f64 * k as f64;
        with_threads(|threads| {
            peak_again(rates, threads);
            let group = "gemm/f32";
            let ids = ["own", "faer"].map(|name| format!("{m}x{n}x{k}/{name}"));
            case((criterion, rates, threads), group, &ids[0], flops, || {
                gemm(mat_mut(&mut c, m, n), false, mat(&a, m, k), mat(&b, k, n), 1.0, Threading::Parallel);
            });
            case((criterion, rates, threads), group, &ids[1], flops, || {
                by_faer(mat_mut(&mut c, m, n), mat(&a, m, k), mat(&b, k, n), rayon::current_num_threads());
            });
            let [own, faer] = ids.map(|id| format!("{group}/{id}/{}", threads.name));
            pairs.push((own, faer));
        });
    }
    pairs
}

/// Between the groups, so that a clock or a neighbour that changes during the run cannot lower the ceiling.
fn peak_again(rates: &Rates, threads: &Threads) {
    for _ in 0..10 {
        rates.time(threads, &peak_id(threads), peak::flops(threads.count()) as f64, 1, || {
            peak::run();
        });
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let rates = Rates::default();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable target directory");
    let pairs = products(&mut criterion, &rates);
    operators(&mut criterion, &rates, directory.path());
    with_threads(|threads| peak_again(&rates, threads));
    criterion.final_summary();
    summary(&rates, &pairs);
}

fn summary(rates: &Rates, pairs: &[(String, String)]) {
    if std::env::args().any(|a| a == "--test") {
        println!("\n--test: one iteration a case, the figures below are no measurement");
    }
    println!("\nf32 peak, best run ({}):", peak::run());
    with_threads(|threads| {
        let rate = rates.get(&peak_id(threads)).unwrap_or(0.0);
        println!("{} ({}): {:.0} GFLOP/s", threads.name, threads.count(), rate / 1e9);
    });
    println!("\n{:<78} {:>8} {:>7}", "case (best run)", "GFLOP/s", "of peak");
    for (id, rate) in rates.all().iter().filter(|(id, _)| !id.starts_with(PEAK)) {
        let threads = id.rsplit('/').next().unwrap_or_default();
        let peak = rates.get(&format!("{PEAK}/{threads}")).unwrap_or(f64::NAN);
        println!("{id:<78} {:>8.0} {:>6.0}%", rate / 1e9, 100.0 * rate / peak);
    }
    println!("\n{:<78} {:>7}", "kernel::gemm against faer", "ratio");
    for (own, faer) in pairs {
        if let (Some(own_rate), Some(faer_rate)) = (rates.get(own), rates.get(faer)) {
            println!("{own:<78} {:>7.2}", own_rate / faer_rate);
        }
    }
}
