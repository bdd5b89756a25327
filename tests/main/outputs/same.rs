//! What must not change a result by a single bit: threads, I/O, memory, shards in and out.

use crate::algebra::Matrix;
use crate::util::{Merged, Random, Scratch, Statistics, Tensor, models};

/// A side longer than any panel or piece that a solver works in is likely to be, and one shorter.
const LONG: usize = 530;
const SHORT: usize = 90;
/// Near square: its system is moved into the eigenbases.
const SQUARE: [usize; 2] = [SHORT, 70];
const TENSORS: [(&str, [usize; 2]); 4] = [
    ("up.weight", [LONG, SHORT]),
    ("down.weight", [SHORT, LONG]),
    ("square.weight", SQUARE),
    ("embed_tokens.weight", [700, 32]),
];

/// `XᵀX/64 + I/10`: well conditioned whatever the side.
fn gram(side: usize, random: &mut Random) -> Vec<f64> {
    let x = Matrix::random(64, side, random);
    x.transpose().times(&x).scaled(1.0 / 64.0).plus(0.1, &Matrix::identity(side)).stored().data
}

pub struct World {
    pub scratch: Scratch,
    base: Vec<Tensor>,
    models: Vec<Vec<Tensor>>,
}

impl World {
    pub fn new(count: usize, grams: bool) -> Self {
        let mut random = Random::new(50);
        let mut checkpoint = || {
            let mut tensors: Vec<Tensor> = TENSORS
                .iter()
                .map(|(name, shape)| Tensor::random(name, "BF16", shape, &mut random))
                .collect();
            tensors.push(Tensor::random("norm.weight", "F32", &[LONG], &mut random));
            tensors
        };
        let base = checkpoint();
        let models: Vec<Vec<Tensor>> = (0..count).map(|_| checkpoint()).collect();
        let scratch = Scratch::new();
        scratch.model("base", &base);
        for (k, model) in models.iter().enumerate() {
            scratch.model(&format!("m{k}"), model);
            let mut statistics = Statistics::new();
            if grams {
                let (long, short) = (gram(LONG, &mut random), gram(SHORT, &mut random));
                statistics = statistics
                    .full("up.weight/input_gram", SHORT, &short)
                    .packed("up.weight/output_gram", LONG, &long)
                    .full("down.weight/input_gram", LONG, &long)
                    .full("down.weight/output_gram", SHORT, &short)
                    .full("square.weight/input_gram", SQUARE[1], &gram(SQUARE[1], &mut random))
                    .packed("square.weight/output_gram", SQUARE[0], &short);
            }
            let norm: Vec<f64> = random.values(LONG).iter().map(|v| v * v).collect();
            statistics.diagonal("norm.weight", &[LONG], &norm).write(&scratch, &format!("m{k}.safetensors"));
        }
        Self { scratch, base, models }
    }

    pub fn config(&self, head: &str, prefix: &str) -> String {
        let names: Vec<(String, String)> =
            (0..self.models.len()).map(|k| (format!("{prefix}{k}"), format!("m{k}.safetensors"))).collect();
        let entries: Vec<(&str, Option<&str>)> =
            names.iter().map(|(m, s)| (m.as_str(), Some(s.as_str()))).collect();
        format!("{head}\nbase_model: base\n{}", models(&entries))
    }

    /// Merges in every way there is; all give the same tensors.
    fn agree(&self, head: &str) -> Merged {
        let config = self.config(head, "m");
        let _ = std::fs::remove_dir_all(self.scratch.join("expected"));
        let expected = self.scratch.merge(
            &config,
            "expected",
            &["--threads", "2", "--max-memory", "2GiB", "--io", "mmap"],
        );
        let same = |out: &str, config: &str, flags: &[&str]| {
            let merged = self.scratch.merge(config, out, flags);
            for (name, tensor) in &expected.tensors {
                assert!(merged.tensors.get(name) == Some(tensor), "{out}: {name} differs");
            }
            assert_eq!(merged.tensors.len(), expected.tensors.len());
            merged
        };
        for out in ["again", "pread", "one_thread", "least_memory", "little_memory", "many_shards", "sharded"]
        {
            // Left by an earlier call.
            let _ = std::fs::remove_dir_all(self.scratch.join(out));
        }
        same("again", &config, &[]);
        same("pread", &config, &["--io", "pread"]);
        same("one_thread", &config, &["--threads", "1"]);
        let plan = self.scratch.plan(&config, &["--threads", "2"]);
        let least = plan["least_memory_bytes"].as_u64().expect("the plan names it");
        same("least_memory", &config, &["--max-memory", &least.to_string(), "--threads", "2"]);
        let little = least.max(64 << 20);
        same("little_memory", &config, &["--max-memory", &little.to_string(), "--threads", "2"]);
        let many = same("many_shards", &config, &["--out-shard-size", "100kB"]);
        let index = std::fs::read_to_string(many.directory.join("model.safetensors.index.json"))
            .expect("several shards");
        assert!(index.contains("model-00001-of-0000"), "{index}");
        for (k, model) in self.models.iter().enumerate() {
            self.scratch.sharded_model(&format!("s{k}"), model, 3);
        }
        self.scratch.sharded_model("base", &self.base, 2);
        // Gone where an earlier call has been here.
        let _ = std::fs::remove_file(self.scratch.join("base/model.safetensors"));
        same("sharded", &self.config(head, "s"), &["--threads", "2"]);
        let output = self.scratch.run(&["diff", "expected", "many_shards"]);
        assert_eq!(output.code, 0, "{}", output.stdout);
        expected
    }
}

#[test]
fn kfac_cg() {
    let world = World::new(3, true);
    let merged = world.agree(
        "merge_method: mats\nsubspace: auto\ninitial: average\nsolver: { method: cg, max_iterations: 4 }",
    );
    assert_eq!(merged.parameter("up.weight")["subspace"], "kfac");
    assert_eq!(merged.parameter("norm.weight")["subspace"], "fisher_diagonal");
}

#[test]
fn kfac_preconditioned() {
    let world = World::new(3, true);
    for preconditioner in ["jacobi", "kronecker", "kronecker_cholesky", "generalized", "hybrid"] {
        let merged = world.agree(&format!(
            "merge_method: mats\nsubspace: kfac\ninitial: average\n\
             solver: {{ method: pcg, preconditioner: {preconditioner}, max_iterations: 3 }}"
        ));
        for name in ["up.weight", "down.weight", "square.weight"] {
            assert_eq!(merged.parameter(name)["preconditioner"], preconditioner);
        }
    }
    world.agree(
        "merge_method: mats\nsubspace: kfac\ninitial: average\n\
         solver: { method: pcg, stop: { relative_residual: 1.0e-9 } }",
    );
}

#[test]
fn kfac_direct() {
    let merged = World::new(2, true).agree("merge_method: mats\nsubspace: kfac\ninitial: average");
    assert_eq!(merged.parameter("down.weight")["subspace"], "kfac");
}

#[test]
fn regmean() {
    let merged = World::new(3, true).agree("merge_method: regmean");
    assert_eq!(merged.parameter("down.weight")["subspace"], "gram");
}

#[test]
fn wudi() {
    let merged = World::new(3, false).agree("merge_method: wudi");
    assert_eq!(merged.parameter("down.weight")["subspace"], "delta_gram");
}

#[test]
fn fisher() {
    let merged = World::new(3, false).agree("merge_method: fisher");
    assert_eq!(merged.parameter("norm.weight")["subspace"], "fisher_diagonal");
}

#[test]
fn linear() {
    World::new(3, false).agree("merge_method: linear");
}

#[test]
fn rounds() {
    let world = World::new(2, true);
    world.agree(
        "merge_method: mats\nsubspace: kfac\nsolver: { method: cg, max_iterations: 2 }\ninitial:\n  merge_method: regmean\n  initial: { merge_method: task_arithmetic, parameters: { weight: 0.3 } }",
    );
}
