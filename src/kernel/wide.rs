//! Runs a loop compiled for the widest vector unit that the machine has.
//!
//! The compiler vectorises the loop; nothing here reorders a sum or fuses a product with one, so the bits of a result are
//! the same on every unit. `pulp` knows the unit below AVX-512.

/// Runs `op`, whose loops are compiled for each vector unit and chosen at run time. `op` must be `#[inline(always)]`, and
/// what it calls inlined: only then are its loops compiled for the unit.
#[inline(always)]
pub(crate) fn dispatch<R>(op: impl FnOnce() -> R) -> R {
    struct Op<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Op<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    #[cfg(target_arch = "x86_64")]
    if avx512_is_there() {
        // SAFETY: the unit has what the function was compiled for.
        return unsafe { avx512(op) };
    }
    static ARCH: std::sync::LazyLock<pulp::Arch> = std::sync::LazyLock::new(pulp::Arch::new);
    ARCH.dispatch(Op(op))
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn avx512_is_there() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
}

/// # Safety
/// On a machine with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c")]
unsafe fn avx512<R>(op: impl FnOnce() -> R) -> R {
    op()
}
