use super::cost::{self, SetupCost};
use super::{KroneckerKind, Preconditioner, PreconditionerError, Side};
use crate::kernel::{Buffer, Real, Threading, vector};
use crate::operator::{BlockShape, KroneckerSum, LinearOperator, OperatorError, Workspace};

/// Entries of a diagonal below this fraction of the largest are what f32 rounding leaves of a null direction.
///
/// With a ridge they are raised to it: `M` stays positive definite and the solution is the same, but a rounding error of
/// the residual is not blown up. Without one they are left out of the correction.
const FLOOR: f64 = 1e-7;

/// `M = V⁻ᵀ·D·V⁻¹` with `V = V_G ⊗ V_A`: an operator's diagonal `D` in bases of its two sides.
///
/// | [`KroneckerKind`] | bases | `D` |
/// |---|---|---|
/// | `Eigen` | eigenvectors of `Σ wᵢAᵢ`, `Σ wᵢGᵢ` | exact, ridge included |
/// | `Hybrid` | the same on the smaller side, unit vectors on the other | exact, ridge included |
/// | `Generalized` | whiten the sums, then the leading difference of the models | exact; the ridge by its diagonal |
/// | `Cholesky` | inverse Cholesky factors of the damped sums | 1 |
///
/// The number of steps it leaves measures how different the models' factors are from each other, not how ill-conditioned
/// they are. One application is four matrix products, `4·out·in·(out + in)` flops: `2/N` of a K-FAC operator's of N models.
/// Well-damped Cholesky sides are inverted: two products.
///
/// # Source
/// George et al. 2018 (EKFAC, arXiv:1806.03884) for the diagonal in a Kronecker eigenbasis; the basis of the sum is ours.
/// Damping of the Cholesky form: Martens & Grosse 2015 (arXiv:1503.05671) §6.3.
pub struct Kronecker<T: Real> {
    kind: KroneckerKind,
    shape: BlockShape,
    a: Side<T>,
    g: Side<T>,
    weights: Vec<f64>,
    /// `1/D`, or empty where `D = 1`.
    inverse: Buffer<T>,
}

impl<T: Real> Kronecker<T> {
    /// For `operator + shift·I`.
    ///
    /// # Errors
    /// [`PreconditionerError`] where a streamed factor cannot be read or a sum cannot be decomposed.
    ///
    /// ```
    /// use mats_stream::kernel::Threading;
    /// use mats_stream::operator::{BlockShape, Factor, KroneckerSum, KroneckerTerm, MemoryRows, Panels, Symmetric};
    /// use mats_stream::precond::{Kronecker, KroneckerKind};
    /// use mats_stream::solve::{Any, MaxIterations, RelativeResidual, Silent, solve};
    ///
    /// let factor = |side, values: &[f64]| -> Result<Factor<f64>, Box<dyn std::error::Error>> {
    ///     let rows = MemoryRows::new(side, side, values.to_vec())?;
    ///     Ok(Factor::Symmetric(Symmetric::new(Panels::held(&rows, Threading::Sequential)?)?))
    /// };
    /// // One model: the eigenbases make its operator diagonal, and one step solves it.
    /// let term = KroneckerTerm {
    ///     weight: 1.0,
    ///     a: factor(2, &[2.0, 1.0, 1.0, 3.0])?,
    ///     g: factor(1, &[5.0])?,
    ///     diagonals: None,
    /// };
    /// let operator = KroneckerSum::new(BlockShape::new(1, 2), vec![term])?;
    /// let preconditioner = Kronecker::new(KroneckerKind::Eigen, &operator, 0.0, Threading::Sequential)?;
    /// let mut rule = Any(vec![Box::new(RelativeResidual(1e-12)), Box::new(MaxIterations(10))]);
    /// let solution = solve(&operator, &preconditioner, &[5.0, 10.0], &[0.0, 0.0], &mut rule, &mut Silent)?;
    /// assert_eq!(solution.iterations, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        kind: KroneckerKind,
        operator: &KroneckerSum<T>,
        shift: f64,
        threading: Threading,
    ) -> Result<Self, PreconditionerError> {
        let (a, g) = operator.sides();
        let weights: Vec<f64> = operator.terms_weights().collect();
        let (a, g) = Side::pair(kind, &a, &g, shift, threading)?;
        Ok(Self::of_sides(kind, operator.shape(), a, g, &weights, shift, threading)?)
    }

    /// From sides made before (tensors with one input share theirs). The `diagonals` of both sides hold each term's
    /// `weight`, which counts once.
    ///
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] where a side does not fit the block.
    pub fn of_sides(
        kind: KroneckerKind,
        shape: BlockShape,
        a: Side<T>,
        g: Side<T>,
        weights: &[f64],
        shift: f64,
        threading: Threading,
    ) -> Result<Self, OperatorError> {
        for (what, got, expected) in
            [("input basis", a.side(), shape.in_features), ("output basis", g.side(), shape.out_features)]
        {
            if got != expected {
                return Err(OperatorError::ShapeMismatch { what, got, expected });
            }
        }
        let inverse = if kind == KroneckerKind::Cholesky {
            Buffer::zeroed(0)
        } else {
            inverse_diagonal(shape, &a, &g, weights, shift, threading)
        };
        Ok(Self { kind, shape, a, g, weights: weights.to_vec(), inverse })
    }
}

/// `1/(Σ gᵢaᵢᵀ/wᵢ + shift·norms)`, floored: row-major `[out, in]`.
pub(super) fn inverse_diagonal<T: Real>(
    shape: BlockShape,
    a: &Side<T>,
    g: &Side<T>,
    weights: &[f64],
    shift: f64,
    threading: Threading,
) -> Buffer<T> {
    let mut diagonal = Buffer::<T>::zeroed(shape.elements());
    vector::for_rows(&mut diagonal, shape.in_features, threading, |i, row| {
        let norm = g.norm(i) * shift;
        for (j, v) in row.iter_mut().enumerate() {
            let sum: f64 =
                weights.iter().zip(g.diagonals()).zip(a.diagonals()).map(|((w, g), a)| g[i] * a[j] / w).sum();
            *v = T::from_f64(sum + norm * a.norm(j));
        }
    });
    let largest = diagonal.iter().fold(0.0f64, |m, v| m.max(v.to_f64()));
    let floor = FLOOR * largest;
    vector::for_rows(&mut diagonal, shape.in_features, threading, |_, row| {
        for v in row {
            let d = v.to_f64();
            *v = T::from_f64(if d > floor {
                1.0 / d
            } else if d > 0.0 && shift > 0.0 {
                1.0 / floor
            } else {
                0.0
            });
        }
    });
    diagonal
}

impl<T: Real> Preconditioner<T> for Kronecker<T> {
    fn name(&self) -> &'static str {
        self.kind.name()
    }
    fn setup_cost(&self) -> SetupCost {
        let mut cost = SetupCost { flops: 0.0, bytes: self.inverse.bytes() as u64 };
        for side in [&self.a, &self.g] {
            if side.has_basis() {
                cost.flops += cost::side_flops(self.kind, side.side(), side.terms(), false);
                cost.bytes += cost::side_bytes(side.side(), side.terms(), false, T::BYTES);
            }
        }
        cost
    }
    fn scratch_elements(&self) -> usize {
        self.shape.elements()
    }
    fn flops(&self) -> f64 {
        let BlockShape { out_features: m, in_features: n } = self.shape;
        let products = if self.a.inverted() { 2.0 } else { 4.0 };
        let side = |s: &Side<T>, other: usize| {
            if s.has_basis() { products * (s.side() * s.side() * other) as f64 } else { 0.0 }
        };
        side(&self.a, m) + side(&self.g, n)
    }
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        let (t, threading) = workspace.take(self.shape.elements())?;
        let BlockShape { out_features: m, in_features: n } = self.shape;
        // Into the bases: V_Gᵀ·R·V_A …
        self.a.right(r, t, m, threading);
        self.g.left(t, z, n, threading);
        if self.a.inverted() {
            return Ok(());
        }
        if !self.inverse.is_empty() {
            vector::multiply(&self.inverse, z, threading);
        }
        // … and back: V_G·Z·V_Aᵀ.
        self.g.left_back(z, t, n, threading);
        self.a.right_back(t, z, m, threading);
        Ok(())
    }
    fn damp(&mut self, shift: f64, input: &[f64], output: &[f64], threading: Threading) {
        if !self.inverse.is_empty() {
            self.a.lift(input);
            self.g.lift(output);
            self.inverse = Buffer::zeroed(0);
            self.inverse = inverse_diagonal(self.shape, &self.a, &self.g, &self.weights, shift, threading);
        }
    }
}
