//! A K-FAC system moved into the eigenbases of its sums once: preconditioning is then one pass over a vector.

use super::cost::{self, SetupCost};
use super::kronecker::inverse_diagonal;
use super::{KroneckerKind, Preconditioner, Side};
use crate::kernel::{Buffer, Real, Threading, vector};
use crate::operator::{BlockShape, KroneckerSum, KroneckerTerm, Lift, OperatorError, OperatorSum, Workspace};

/// `Σ wᵢ·Ĝᵢ X Âᵢ` with `Âᵢ = V_Aᵀ AᵢV_A`, `Ĝᵢ = V_Gᵀ GᵢV_G`, and the way there and back.
///
/// The same system in other coordinates: norms, objectives and the ridge are those of the original, because the bases are
/// orthonormal. Holds all rotated factors.
pub struct Rotated<T: Real> {
    shape: BlockShape,
    a: Side<T>,
    g: Side<T>,
    operator: KroneckerSum<T>,
}

impl<T: Real> Rotated<T> {
    /// From two sides made with [`Side::eigen`] and `rotate`, the weights of the terms, and the operator's scalings.
    ///
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] where a side was not rotated or does not fit.
    pub fn new(
        shape: BlockShape,
        a: Side<T>,
        g: Side<T>,
        weights: &[f64],
        scales: (f64, f64),
    ) -> Result<Self, OperatorError> {
        let missing = |what| OperatorError::ShapeMismatch { what, got: 0, expected: weights.len() };
        let inputs = a.rotated().ok_or_else(|| missing("rotated input factors"))?;
        let outputs = g.rotated().ok_or_else(|| missing("rotated output factors"))?;
        let terms = weights
            .iter()
            .zip(inputs)
            .zip(outputs)
            .map(|((weight, a), g)| KroneckerTerm {
                weight: *weight,
                a: a.clone(),
                g: g.clone(),
                diagonals: None,
            })
            .collect();
        let operator = KroneckerSum::new(shape, terms)?.scaled(scales.0, scales.1);
        Ok(Self { shape, a, g, operator })
    }

    /// The operator in the bases.
    pub fn operator(&self) -> &KroneckerSum<T> {
        &self.operator
    }

    /// Adds to the diagonals of the factors: in orthonormal bases the same as before they were moved. `input` and `output`
    /// as for [`Preconditioner::damp`].
    pub fn lift(&mut self, lifts: &[Lift], input: &[f64], output: &[f64]) {
        self.operator.lift(lifts);
        self.a.lift(input);
        self.g.lift(output);
    }

    /// Its exact diagonal, `shift` included, as a preconditioner.
    pub fn scaling(&self, shift: f64, threading: Threading) -> Scaling<T> {
        let weights: Vec<f64> = self.operator.terms_weights().collect();
        let inverse = inverse_diagonal(self.shape, &self.a, &self.g, &weights, shift, threading);
        let mut cost = SetupCost { flops: 0.0, bytes: inverse.bytes() as u64 };
        for side in [&self.a, &self.g] {
            cost.flops += cost::side_flops(KroneckerKind::Eigen, side.side(), side.terms(), true);
            cost.bytes += cost::side_bytes(side.side(), side.terms(), true, T::BYTES);
        }
        Scaling { inverse, cost }
    }

    /// `r ← V_Gᵀ·r·V_A`; `t` is scratch of its length.
    pub fn enter(&self, r: &mut [T], t: &mut [T], threading: Threading) {
        self.a.right(r, t, self.shape.out_features, threading);
        self.g.left(t, r, self.shape.in_features, threading);
    }

    /// `d ← V_G·d·V_Aᵀ`.
    pub fn leave(&self, d: &mut [T], t: &mut [T], threading: Threading) {
        self.g.left_back(d, t, self.shape.in_features, threading);
        self.a.right_back(t, d, self.shape.out_features, threading);
    }
}

/// Division by the diagonal in the rotated basis: the `kronecker` preconditioner without a product.
#[derive(Debug)]
pub struct Scaling<T: Real> {
    inverse: Buffer<T>,
    cost: SetupCost,
}

impl<T: Real> Preconditioner<T> for Scaling<T> {
    fn name(&self) -> &'static str {
        KroneckerKind::Eigen.name()
    }
    fn setup_cost(&self) -> SetupCost {
        self.cost
    }
    fn flops(&self) -> f64 {
        self.inverse.len() as f64
    }
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        z.copy_from_slice(r);
        vector::multiply(&self.inverse, z, workspace.threading);
        Ok(())
    }
}
