//! The machine's f32 peak: independent fused multiply-adds in registers on every thread, nothing else.
//!
//! Used by `operator_apply` as the ceiling that its rates are read against. The accumulators outnumber latency times
//! issue width on every core it was written for (4 cycles x 2 units), so the units never wait for each other.

// Vector instructions are reached through intrinsics alone; each use says why it is sound.
#![allow(unsafe_code)]

use std::hint::black_box;

/// Steps of one measured run of one thread: tens of milliseconds.
const STEPS: u64 = 12 << 20;

/// One thread's work, with the flops of a step.
#[derive(Clone, Copy)]
struct Kernel {
    name: &'static str,
    run: fn(u64) -> f32,
    flops_per_step: u64,
}

/// One run on all threads of the current rayon pool; which vector unit it was. The caller times it, best of several.
pub(crate) fn run() -> &'static str {
    let kernel = kernel();
    black_box(rayon::broadcast(|_| (kernel.run)(black_box(STEPS))));
    kernel.name
}

/// Flops of one [`run`] on `threads` threads.
pub(crate) fn flops(threads: usize) -> u64 {
    threads as u64 * STEPS * kernel().flops_per_step
}

fn kernel() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature that the function needs was just found on this machine.
            return Kernel {
                name: "AVX-512",
                run: |n| unsafe { x86::avx512(n) },
                flops_per_step: 24 * 16 * 2,
            };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return Kernel { name: "AVX2", run: |n| unsafe { x86::avx2(n) }, flops_per_step: 12 * 8 * 2 };
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        if std::arch::is_aarch64_feature_detected!("neon") {
            // SAFETY: the feature that the function needs was just found on this machine.
            return Kernel { name: "NEON", run: |n| unsafe { arm::neon(n) }, flops_per_step: 24 * 4 * 2 };
        }
    }
    Kernel { name: "portable", run: portable, flops_per_step: 64 * 2 }
}

/// Whatever the compiler makes of it: a lower bound of the peak.
fn portable(steps: u64) -> f32 {
    let (a, b) = (black_box(0.999_f32), black_box(1e-3_f32));
    let mut sums = [0.0f32; 64];
    for _ in 0..steps {
        for s in &mut sums {
            *s = *s * a + b;
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// `s ← s·a + b` on 24 registers of 16 values.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn avx512(steps: u64) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut sums = [_mm512_setzero_ps(); 24];
        for _ in 0..steps {
            for s in &mut sums {
                *s = _mm512_fmadd_ps(*s, a, b);
            }
        }
        let mut sum = _mm512_setzero_ps();
        for s in sums {
            sum = _mm512_add_ps(sum, s);
        }
        _mm512_reduce_add_ps(sum)
    }

    /// `s ← s·a + b` on 12 registers of 8 values.
    #[target_feature(enable = "avx2,fma")]
    pub(crate) fn avx2(steps: u64) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
        let mut sums = [_mm256_setzero_ps(); 12];
        for _ in 0..steps {
            for s in &mut sums {
                *s = _mm256_fmadd_ps(*s, a, b);
            }
        }
        let mut sum = _mm256_setzero_ps();
        for s in sums {
            sum = _mm256_add_ps(sum, s);
        }
        let low = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let pairs = _mm_hadd_ps(low, low);
        _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs))
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;
    use std::hint::black_box;

    /// `s ← b + s·a` on 24 registers of 4 values.
    #[target_feature(enable = "neon")]
    pub(crate) fn neon(steps: u64) -> f32 {
        let (a, b) = (vdupq_n_f32(black_box(0.999)), vdupq_n_f32(black_box(1e-3)));
        let mut sums = [vdupq_n_f32(0.0); 24];
        for _ in 0..steps {
            for s in &mut sums {
                *s = vfmaq_f32(b, *s, a);
            }
        }
        sums.into_iter().map(|s| vaddvq_f32(s)).sum()
    }
}
