//! TSV-Merge (Gargiulo et al. 2024, arXiv:2412.00081): leading singular vectors of every task, made orthogonal to each
//! other's.
//!
//! Of each 2-D task vector the ⌊min(out, in)/T⌋ leading singular triples; all left vectors together, and all right ones,
//! are replaced by the nearest orthonormal ones; their products with the singular values are summed. Everything else gets
//! the mean of the task vectors. `lambda` scales both (1).

use super::combine::LAMBDA;
use super::whole::{
    OnWeights, ReadTask, WholeError, WholeTensor, gram_values, orthonormalise, recompose, svd,
};
use super::{Arguments, BaseUse, Definition, Elementwise};
use crate::kernel::{Buffer, Threading};
use crate::operator::BlockShape;

pub(super) static DEFINITION: Definition = Definition {
    name: "tsv_m",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[LAMBDA],
    build,
};

#[derive(Debug)]
struct TsvM {
    lambda: f64,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let lambda = arguments.number("lambda", 1.0);
    Ok(OnWeights::boxed(lambda, (arguments.shape().len() == 2).then_some(TsvM { lambda })))
}

impl WholeTensor for TsvM {
    fn reads(&self) -> u64 {
        1
    }

    fn memory_bytes(&self, shape: BlockShape, _models: usize) -> u64 {
        let (m, n) = (shape.out_features as u64, shape.in_features as u64);
        let side = m.min(n);
        // The result and a task vector, whose place the products take; both sides' vectors and a copy of one.
        8 * (2 * m * n + 2 * side * (m + n) + gram_values(side))
    }

    fn flops(&self, shape: BlockShape, models: usize) -> f64 {
        let (m, n) = (shape.out_features as f64, shape.in_features as f64);
        let side = m.min(n);
        (models as f64 + 2.0) * (2.0 * m * n * side + 9.0 * side.powi(3)) + 4.0 * m * n * side
    }

    fn merge_whole(
        &self,
        shape: BlockShape,
        models: usize,
        read: &mut ReadTask<'_>,
        threading: Threading,
        out: &mut [f64],
    ) -> Result<(), WholeError> {
        let (m, n) = (shape.out_features, shape.in_features);
        let each = m.min(n) / models;
        let total = each * models;
        let (mut left, mut right) = (Buffer::<f64>::zeroed(total * m), Buffer::<f64>::zeroed(total * n));
        let mut values = Vec::with_capacity(total);
        {
            let mut task = Buffer::<f64>::zeroed(m * n);
            for i in 0..models {
                read(i, 0, &mut task)?;
                let triples = svd(&task, m, n, each, threading)?;
                left[i * each * m..(i + 1) * each * m].copy_from_slice(&triples.left);
                right[i * each * n..(i + 1) * each * n].copy_from_slice(&triples.right);
                values.extend(triples.values.iter().map(|v| v * self.lambda));
            }
        }
        orthonormalise(&mut left, total, m, threading)?;
        orthonormalise(&mut right, total, n, threading)?;
        recompose(&mut left, &right, &values, m, n, threading, out);
        Ok(())
    }
}
