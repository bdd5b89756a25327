//! What preconditioners take, from shapes alone: flops and bytes of setting up, and when moving into a basis pays.
//!
//! Asked by `plan` before anything is read and by the preconditioners when they report; one place, so that the plan and the
//! report agree.

use super::KroneckerKind;
use crate::kernel::PANEL;
use crate::operator::BlockShape;
use crate::solve::eigen::Eigen;

/// What making a preconditioner takes. Time is the caller's to measure.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SetupCost {
    /// Floating point operations, as counted from shapes.
    pub flops: f64,
    /// Bytes it holds while the solve runs, its diagonal included.
    pub bytes: u64,
}

/// Steps a preconditioned merge is expected to take: between gaps of 1e-2 and 1e-3 for 2 to 8 models.
const EXPECTED_STEPS: usize = 8;
/// Rotated factors must all be held. They may take this many times the bytes of one vector of the block: with more, a
/// faster solve would cost the memory that streaming is for.
const ROTATED_VECTORS: usize = 16;

/// Whether a system is moved into the eigenbases once, instead of four products at every step: cheaper by at least a
/// twentieth of the solve, and small enough to hold. Depends on shapes and the config alone, never on the memory given.
///
/// Moving costs `2N·(m³+n³)` flops beyond what the diagonal needs, and `4mn·(m+n)` for two vectors; each step saves
/// `4mn·(m+n)`.
pub fn rotates(shape: BlockShape, models: usize, max_iterations: usize) -> bool {
    let (m, n, models) = (shape.out_features as f64, shape.in_features as f64, models as f64);
    let steps = max_iterations.min(EXPECTED_STEPS) as f64;
    let product = 2.0 * m * n * (m + n);
    let saved = 2.0 * (steps - 1.0) * product - 2.0 * models * (m.powi(3) + n.powi(3));
    saved > 0.05 * steps * models * product && models * (m * m + n * n) <= ROTATED_VECTORS as f64 * m * n
}

/// The form for a K-FAC block where the config names none: the eigenbases, whose ridge is exact, unless damped Cholesky
/// factors come out at least a fifth cheaper, set-up included, as they do where one side is long and the ridge weak.
///
/// Compared in flops at the speed of f32 products on two threads, the fewest that a merge of such blocks is run with: an
/// eigendecomposition is sequential and counts twice, f64 counts twice. Depends on shapes and the config alone.
pub fn preferred(shape: BlockShape, models: usize, max_iterations: usize, ridge: f64) -> KroneckerKind {
    /// A ridge that the factored damping follows closely.
    const WEAK: f64 = 1e-2;
    // Steps with the Cholesky form per step with the eigenbases: measured 1.0 to 1.14 at ridges up to 1e-2; at a ridge of
    // 1, 1.1 on the fixtures, 1.8 on synthetic 512x2048 and 4 on 1024x2816 with 8 models.
    let more_steps = if ridge <= WEAK { 1.15 } else { 4.0 };
    let (m, n) = (shape.out_features as f64, shape.in_features as f64);
    let (cubes, steps) = (m.powi(3) + n.powi(3), max_iterations.min(EXPECTED_STEPS) as f64);
    let (models, product) = (models as f64, 2.0 * m * n * (m + n));
    let eigen = if rotates(shape, models as usize, max_iterations) {
        (18.0 + 4.0 * models) * cubes + (steps * models + 2.0) * product
    } else {
        (18.0 + 2.0 * models) * cubes + steps * (models + 2.0) * product
    };
    let cholesky = 10.0 / 3.0 * cubes + more_steps * steps * (models + 1.0) * product;
    if cholesky < 0.8 * eigen { KroneckerKind::Cholesky } else { KroneckerKind::Eigen }
}

/// Whether the hybrid keeps this side's eigenbasis: the smaller one; both of a square.
pub fn hybrid_keeps(side: usize, other: usize) -> bool {
    side <= other
}

/// Flops of one side of `models` factors.
pub fn side_flops(kind: KroneckerKind, side: usize, models: usize, rotated: bool) -> f64 {
    let (cube, models) = ((side as f64).powi(3), models as f64);
    match kind {
        // Eigendecomposition, diagonals, and the second half of VᵀCᵢV.
        KroneckerKind::Eigen | KroneckerKind::Hybrid => {
            9.0 * cube + 2.0 * models * cube + if rotated { 2.0 * models * cube } else { 0.0 }
        }
        // Factor, its inverse, and their product.
        KroneckerKind::Cholesky => 5.0 / 3.0 * cube,
        // Two decompositions, whitened factors, the joint basis, diagonals.
        KroneckerKind::Generalized => (18.0 + 4.0 * models + 2.0 + 2.0 * models) * cube,
    }
}

/// Bytes one side holds while the solve runs: a basis and its transpose of `scalar` bytes a value, and rotated factors.
pub fn side_bytes(side: usize, models: usize, rotated: bool, scalar: usize) -> u64 {
    let square = (side * side * scalar) as u64;
    2 * square + if rotated { models as u64 * square } else { 0 }
}

/// Bytes that setting one side up holds beyond [`side_bytes`], at its peak.
pub fn side_setup_bytes(kind: KroneckerKind, side: usize, models: usize, scalar: usize) -> u64 {
    let square = (side * side) as u64;
    let panels = 3 * (PANEL.min(side) * side) as u64 * scalar as u64;
    panels
        + match kind {
            // The sum; vectors and faer's scratch.
            KroneckerKind::Eigen | KroneckerKind::Hybrid => {
                (Eigen::<f32>::SQUARES + 1) as u64 * square * scalar as u64
            }
            // The sum, in f64, and its inverse factor.
            KroneckerKind::Cholesky => 2 * square * 8 + square * scalar as u64,
            // The sum and its decomposition in f64; whitened factors and the whitening itself.
            KroneckerKind::Generalized => {
                (Eigen::<f64>::SQUARES + 2) as u64 * square * 8 + (models as u64 + 2) * square * scalar as u64
            }
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotating_pays_for_square_blocks_and_few_models() {
        assert!(rotates(BlockShape::new(1024, 1024), 4, 20));
        // One step: four products are cheaper.
        assert!(!rotates(BlockShape::new(1024, 1024), 4, 1));
        // Twelve models: the factors would take 24 vectors.
        assert!(!rotates(BlockShape::new(1024, 1024), 12, 20));
        // Lopsided: the cube of the long side outweighs what is saved.
        assert!(!rotates(BlockShape::new(512, 8192), 4, 20));
    }

    #[test]
    fn long_sides_are_factored_instead_of_diagonalised() {
        for (m, n) in [(1024, 4096), (4096, 1024), (2816, 1024), (768, 3072)] {
            for models in [3, 4, 8] {
                assert_eq!(preferred(BlockShape::new(m, n), models, 20, 1e-2), KroneckerKind::Cholesky);
                assert_eq!(preferred(BlockShape::new(m, n), models, 20, 1.0), KroneckerKind::Eigen);
            }
        }
        assert_eq!(preferred(BlockShape::new(1024, 1024), 4, 20, 1e-2), KroneckerKind::Eigen);
        assert_eq!(preferred(BlockShape::new(768, 1024), 4, 20, 1e-2), KroneckerKind::Eigen);
    }

    #[test]
    fn a_hybrid_has_one_eigenbasis_at_least() {
        assert!(hybrid_keeps(3, 5) && !hybrid_keeps(5, 3) && hybrid_keeps(4, 4));
    }
}
