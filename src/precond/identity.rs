use super::Preconditioner;
use crate::kernel::Real;
use crate::operator::{OperatorError, Workspace};

/// `M = I`.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPreconditioner;

impl<T: Real> Preconditioner<T> for NoPreconditioner {
    fn name(&self) -> &'static str {
        "none"
    }
    fn is_identity(&self) -> bool {
        true
    }
    fn apply_inverse(
        &self,
        r: &[T],
        z: &mut [T],
        _workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError> {
        z.copy_from_slice(r);
        Ok(())
    }
}
