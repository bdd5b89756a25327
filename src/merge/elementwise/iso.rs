//! Isotropic merging (Marczak et al. 2025, arXiv:2502.04959): the singular vectors of the summed task vector, all singular
//! values made equal.
//!
//! `iso_c`: λ · mean(σ) · U·Vᵀ of Σ τₜ. `iso_cts` keeps the `common` share (0.8) of its leading singular vectors and gives the
//! rest to the tasks: of each task vector, with the common left space projected out, the leading triples, an equal number
//! a task; all left and all right vectors together are replaced by the nearest orthonormal ones, and every singular value
//! by the mean of those collected. Only 2-D weights; everything else gets the mean of the task vectors, times λ.

use super::combine::LAMBDA;
use super::whole::{
    OnWeights, ReadTask, WholeError, WholeTensor, map_bytes, map_flops, orthonormalise, recompose,
    sum_of_tasks, svd,
};
use super::{Arguments, BaseUse, Definition, Elementwise};
use crate::config::{ParameterSpec, Range};
use crate::kernel::{Buffer, Threading, gemm, mat, mat_mut};
use crate::operator::BlockShape;

pub(super) static ISO_C: Definition = Definition {
    name: "iso_c",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[LAMBDA],
    build: |arguments| Ok(build(arguments, None)),
};

pub(super) static ISO_CTS: Definition = Definition {
    name: "iso_cts",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[LAMBDA, ParameterSpec::number("common", Range::Unit)],
    build: |arguments| Ok(build(arguments, Some(arguments.number("common", 0.8)))),
};

#[derive(Debug)]
struct Iso {
    lambda: f64,
    /// Share of the common space, where tasks have spaces of their own.
    common: Option<f64>,
}

fn build(arguments: &Arguments<'_>, common: Option<f64>) -> Box<dyn Elementwise> {
    let lambda = arguments.number("lambda", 1.0);
    OnWeights::boxed(lambda, (arguments.shape().len() == 2).then_some(Iso { lambda, common }))
}

impl WholeTensor for Iso {
    fn reads(&self) -> u64 {
        if self.common.is_some() { 2 } else { 1 }
    }

    fn memory_bytes(&self, shape: BlockShape, _models: usize) -> u64 {
        let (m, n) = (shape.out_features as u64, shape.in_features as u64);
        // With spaces of their own: a task vector beside the result, both sides' vectors and a copy of one.
        let vectors = if self.common.is_some() { m * n + 3 * m.min(n) * (m + n) } else { 0 };
        map_bytes(shape) + 8 * vectors
    }

    fn flops(&self, shape: BlockShape, models: usize) -> f64 {
        let decompositions = if self.common.is_some() { models as f64 + 3.0 } else { 1.0 };
        decompositions * map_flops(shape)
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
        let side = m.min(n);
        sum_of_tasks(read, &vec![1.0; models], out)?;
        let Some(share) = self.common else {
            let sum = orthonormalise(out, m, n, threading)?;
            let scale = self.lambda * sum / side.max(1) as f64;
            out.iter_mut().for_each(|v| *v *= scale);
            return Ok(());
        };
        // So many that the rest is the same for every task.
        let common = (share * side as f64) as usize;
        let each = (side - common) / models;
        let common = side - each * models;
        let (mut left, mut right) = (Buffer::<f64>::zeroed(side * m), Buffer::<f64>::zeroed(side * n));
        let leading = svd(out, m, n, common, threading)?;
        let own = each * models;
        left[own * m..].copy_from_slice(&leading.left);
        right[own * n..].copy_from_slice(&leading.right);
        let mut sum: f64 = leading.values.iter().sum();
        let mut task = Buffer::<f64>::zeroed(m * n);
        drop(leading.right);
        for i in 0..if each > 0 { models } else { 0 } {
            read(i, 0, &mut task)?;
            // τ ← τ - Uᵀ(U·τ), U the common left vectors as rows.
            let u = mat(&leading.left, common, m);
            let mut inner = Buffer::<f64>::zeroed(common * n);
            gemm(mat_mut(&mut inner, common, n), false, u, mat(&task, m, n), 1.0, threading);
            gemm(mat_mut(&mut task, m, n), true, u.transpose(), mat(&inner, common, n), -1.0, threading);
            drop(inner);
            let triples = svd(&task, m, n, each, threading)?;
            left[i * each * m..(i + 1) * each * m].copy_from_slice(&triples.left);
            right[i * each * n..(i + 1) * each * n].copy_from_slice(&triples.right);
            sum += triples.values.iter().sum::<f64>();
        }
        drop(task);
        orthonormalise(&mut left, side, m, threading)?;
        orthonormalise(&mut right, side, n, threading)?;
        let value = self.lambda * sum / side.max(1) as f64;
        recompose(&mut left, &right, &vec![value; side], m, n, threading, out);
        Ok(())
    }
}
