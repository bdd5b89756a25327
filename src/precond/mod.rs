//! Preconditioners: cheap stand-ins `M` for an operator, applied as `M⁻¹·r`.
//!
//! Called by `solve::cg`. [`NoPreconditioner`] is the paper's plain conjugate gradients, [`Jacobi`] the operator's
//! diagonal, [`Kronecker`] its diagonal in the eigenbases of the summed factors.

mod identity;
mod jacobi;
mod kronecker;

pub use identity::NoPreconditioner;
pub use jacobi::Jacobi;
pub use kronecker::{Basis, Kronecker};

use crate::kernel::Real;
use crate::operator::{OperatorError, Workspace};

/// `z ← M⁻¹·r`, with `M` symmetric positive definite.
pub trait Preconditioner<T: Real>: Sync {
    /// As written in a config.
    fn name(&self) -> &'static str;
    /// True where `M` is the identity: the solver then needs no vector for `z`.
    fn is_identity(&self) -> bool {
        false
    }
    /// Values of scratch that `apply_inverse` takes from its workspace; the memory plan counts them.
    fn scratch_elements(&self) -> usize {
        0
    }
    /// Overwrites `z`; both row-major `[out, in]`.
    ///
    /// # Errors
    /// [`OperatorError`] where the lengths are wrong or something streamed cannot be read.
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError>;
}
