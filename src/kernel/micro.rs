//! The innermost loops of a matrix product: one small tile of the result, kept in vector registers. The only code of
//! the kernels that needs `unsafe`.
//!
//! Every element of a tile is one chain of fused multiply-adds along the inner dimension, in order, whatever the vector
//! unit: AVX-512, AVX2 and the portable loop give the same bits (where the machine multiplies and adds with one
//! rounding, as all of x86-64 with FMA and aarch64 do). Called by `gemm`, which cuts matrices into strips and panels.

use faer::{MatMut, MatRef};

/// Most rows of a tile on any machine; rows of a packed left operand.
pub(super) const MAX_ROWS: usize = 8;
/// Vectors of a full tile's row.
const VECTORS: usize = 3;

/// A scalar that has kernels. Sealed: this module is private.
pub trait Micro: Copy + Default + 'static {
    /// Columns of a strip of the right operand: a multiple of every machine's tile.
    const STRIP: usize;
    /// The fastest kernel of this machine.
    fn kernel() -> Kernel<Self>;
}

/// What one call computes: `c ← alpha·Σₗ a[·, l]·b[l, ·] [+ c]` on `rows` × `vectors·lanes` values.
#[derive(Clone, Copy)]
struct Tile<T> {
    rows: usize,
    vectors: usize,
    /// Length of the sum.
    inner: usize,
    a: *const T,
    /// Values between two rows of `a` …
    a_row: isize,
    /// … and between two of its columns.
    a_column: isize,
    b: *const T,
    /// Values between two rows of `b`; columns are contiguous.
    b_row: isize,
    c: *mut T,
    /// Values between two rows of `c`; columns are contiguous.
    c_row: isize,
    alpha: T,
    add: bool,
}

/// One machine's kernel.
#[derive(Clone, Copy)]
pub struct Kernel<T> {
    /// Rows of a full tile: a power of two.
    rows: usize,
    /// Values of a vector.
    lanes: usize,
    /// # Safety
    /// The machine has the vector unit; all that [`Tile`] describes is inside its matrices, `c` not shared; rows are a
    /// power of two up to `rows`, vectors 1 to [`VECTORS`].
    run: unsafe fn(&Tile<T>),
}

impl<T: Micro> Kernel<T> {
    /// Rows of a full tile.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of `rhs` that [`Kernel::multiply`] reads for so many of the result: whole vectors.
    pub(super) fn columns_read(&self, columns: usize) -> usize {
        columns.next_multiple_of(self.lanes)
    }

    /// `dst ← alpha · lhs · rhs [+ dst]` for row-major `dst` and `rhs`. `rhs` may have more columns than `dst`: the last
    /// vector of each of its rows is read whole, and what is not `dst`'s does not count.
    pub(super) fn multiply(
        &self,
        dst: MatMut<'_, T>,
        add: bool,
        lhs: MatRef<'_, T>,
        rhs: MatRef<'_, T>,
        alpha: T,
    ) {
        let (rows, columns, inner) = (dst.nrows(), dst.ncols(), lhs.ncols());
        assert!(lhs.nrows() == rows && rhs.nrows() == inner && rhs.ncols() >= self.columns_read(columns));
        assert!(dst.col_stride() == 1 && rhs.col_stride() == 1);
        let c = dst.as_ptr_mut();
        let mut done = 0;
        while done < rows {
            // The largest power of two that is left.
            let height = self.rows.min(1 << (rows - done).ilog2());
            let mut column = 0;
            while column < columns {
                let width = (columns - column).min(VECTORS * self.lanes);
                let vectors = width.div_ceil(self.lanes);
                let mut tile = Tile {
                    rows: height,
                    vectors,
                    inner,
                    a: lhs.as_ptr().wrapping_offset(done as isize * lhs.row_stride()),
                    a_row: lhs.row_stride(),
                    a_column: lhs.col_stride(),
                    b: rhs.as_ptr().wrapping_add(column),
                    b_row: rhs.row_stride(),
                    c: c.wrapping_offset(done as isize * dst.row_stride()).wrapping_add(column),
                    c_row: dst.row_stride(),
                    alpha,
                    add,
                };
                if width == vectors * self.lanes {
                    // SAFETY: `kernel()` found the vector unit on this machine. The tile's rows and columns are inside
                    // `dst` (ours alone), `lhs` and `rhs`, whose shapes were compared above: `done + height ≤ rows` and
                    // `column + width ≤ columns`.
                    unsafe { (self.run)(&tile) }
                } else {
                    let mut edge = [T::default(); MAX_ROWS * MAX_WIDTH];
                    let (c, c_row) = (tile.c, tile.c_row);
                    tile.c_row = MAX_WIDTH as isize;
                    for i in 0..height {
                        // SAFETY: `width` values of row `done + i` of `dst`, ours alone, copied into and out of a row
                        // of `edge`, which is at least that long.
                        let row = unsafe {
                            std::slice::from_raw_parts(c.wrapping_offset(i as isize * c_row), width)
                        };
                        edge[i * MAX_WIDTH..][..width].copy_from_slice(row);
                    }
                    tile.c = edge.as_mut_ptr();
                    // SAFETY: as above, but for the result, which is `edge`: MAX_ROWS rows of MAX_WIDTH values; and for
                    // the columns of `rhs`, of which `columns_read(columns)` are there.
                    unsafe { (self.run)(&tile) }
                    for i in 0..height {
                        // SAFETY: as for the copy in.
                        let row = unsafe {
                            std::slice::from_raw_parts_mut(c.wrapping_offset(i as isize * c_row), width)
                        };
                        row.copy_from_slice(&edge[i * MAX_WIDTH..][..width]);
                    }
                }
                column += width;
            }
            done += height;
        }
    }
}

/// Longest row of a tile: three vectors of 64 bytes, of f32.
const MAX_WIDTH: usize = 48;

impl Micro for f32 {
    const STRIP: usize = 48;
    fn kernel() -> Kernel<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Kernel { rows: 8, lanes: 16, run: x86::avx512_f32 };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return AVX2_F32;
            }
        }
        PORTABLE_F32
    }
}

impl Micro for f64 {
    const STRIP: usize = 24;
    fn kernel() -> Kernel<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Kernel { rows: 8, lanes: 8, run: x86::avx512_f64 };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return AVX2_F64;
            }
        }
        PORTABLE_F64
    }
}

#[cfg(target_arch = "x86_64")]
const AVX2_F32: Kernel<f32> = Kernel { rows: 4, lanes: 8, run: x86::avx2_f32 };
#[cfg(target_arch = "x86_64")]
const AVX2_F64: Kernel<f64> = Kernel { rows: 4, lanes: 4, run: x86::avx2_f64 };
const PORTABLE_F32: Kernel<f32> = Kernel { rows: 4, lanes: 4, run: portable_f32 };
const PORTABLE_F64: Kernel<f64> = Kernel { rows: 4, lanes: 2, run: portable_f64 };

/// Chooses the monomorphic loop of a tile's rows and vectors.
macro_rules! dispatch {
    ($tile:ident, $body:ident) => {
        match ($tile.rows, $tile.vectors) {
            (8, 3) => $body::<8, 3>($tile),
            (8, 2) => $body::<8, 2>($tile),
            (8, 1) => $body::<8, 1>($tile),
            (4, 3) => $body::<4, 3>($tile),
            (4, 2) => $body::<4, 2>($tile),
            (4, 1) => $body::<4, 1>($tile),
            (2, 3) => $body::<2, 3>($tile),
            (2, 2) => $body::<2, 2>($tile),
            (2, 1) => $body::<2, 1>($tile),
            (1, 3) => $body::<1, 3>($tile),
            (1, 2) => $body::<1, 2>($tile),
            (1, 1) => $body::<1, 1>($tile),
            _ => unreachable!("tiles are 1, 2, 4 or 8 rows of 1 to 3 vectors"),
        }
    };
}

macro_rules! portable {
    ($name:ident, $body:ident, $scalar:ty, $lanes:literal) => {
        /// # Safety
        /// As [`Kernel`] says; any machine will do.
        unsafe fn $name(tile: &Tile<$scalar>) {
            // SAFETY: passed on to the caller.
            unsafe { dispatch!(tile, $body) }
        }

        /// # Safety
        /// As [`Kernel`] says.
        unsafe fn $body<const R: usize, const V: usize>(t: &Tile<$scalar>) {
            /// With one rounding where the machine has it; a call into a library for each product would take forever.
            #[inline(always)]
            fn fused(x: $scalar, y: $scalar, z: $scalar) -> $scalar {
                if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                    x.mul_add(y, z)
                } else {
                    x * y + z
                }
            }
            // SAFETY: the caller's promise: every index below is inside the tile's operands.
            unsafe {
                let mut acc = [[[<$scalar>::default(); $lanes]; V]; R];
                for l in 0..t.inner {
                    for i in 0..R {
                        let x = *t.a.offset(i as isize * t.a_row + l as isize * t.a_column);
                        for v in 0..V {
                            for k in 0..$lanes {
                                let y = *t.b.offset(l as isize * t.b_row).add(v * $lanes + k);
                                acc[i][v][k] = fused(x, y, acc[i][v][k]);
                            }
                        }
                    }
                }
                for i in 0..R {
                    for v in 0..V {
                        for k in 0..$lanes {
                            let c = t.c.offset(i as isize * t.c_row).add(v * $lanes + k);
                            *c =
                                if t.add { fused(t.alpha, acc[i][v][k], *c) } else { t.alpha * acc[i][v][k] };
                        }
                    }
                }
            }
        }
    };
}

portable!(portable_f32, portable_f32_body, f32, 4);
portable!(portable_f64, portable_f64_body, f64, 2);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Tile;

    macro_rules! x86 {
        ($name:ident, $body:ident, $features:literal, $scalar:ty, $lanes:literal,
         $zero:ident, $splat:ident, $load:ident, $store:ident, $fused:ident, $product:ident) => {
            /// # Safety
            /// As [`super::Kernel`] says, on a machine with these features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(tile: &Tile<$scalar>) {
                // SAFETY: passed on to the caller.
                unsafe { dispatch!(tile, $body) }
            }

            /// # Safety
            /// As [`super::Kernel`] says, on a machine with these features.
            #[target_feature(enable = $features)]
            unsafe fn $body<const R: usize, const V: usize>(t: &Tile<$scalar>) {
                // SAFETY: the caller's promise: every address that is read or written is inside the tile's operands.
                // Prefetching reads nothing.
                unsafe {
                    for i in 0..R {
                        for v in 0..V {
                            let c = t.c.offset(i as isize * t.c_row).add(v * $lanes);
                            _mm_prefetch::<_MM_HINT_T0>(c.cast());
                        }
                    }
                    let mut acc = [[$zero(); V]; R];
                    let (mut a, mut b) = (t.a, t.b);
                    // Once by hand: the compiler does not unroll what holds this many registers.
                    macro_rules! step {
                        () => {
                            let mut row = [$zero(); V];
                            for v in 0..V {
                                row[v] = $load(b.add(v * $lanes));
                            }
                            for i in 0..R {
                                let x = $splat(*a.offset(i as isize * t.a_row));
                                for v in 0..V {
                                    acc[i][v] = $fused(x, row[v], acc[i][v]);
                                }
                            }
                            a = a.wrapping_offset(t.a_column);
                            b = b.wrapping_offset(t.b_row);
                        };
                    }
                    for _ in 0..t.inner / 4 {
                        step!();
                        step!();
                        step!();
                        step!();
                    }
                    for _ in 0..t.inner % 4 {
                        step!();
                    }
                    let alpha = $splat(t.alpha);
                    for i in 0..R {
                        for v in 0..V {
                            let c = t.c.offset(i as isize * t.c_row).add(v * $lanes);
                            let value = if t.add {
                                $fused(alpha, acc[i][v], $load(c))
                            } else {
                                $product(alpha, acc[i][v])
                            };
                            $store(c, value);
                        }
                    }
                }
            }
        };
    }

    x86!(
        avx512_f32,
        avx512_f32_body,
        "avx512f",
        f32,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_mul_ps
    );
    x86!(
        avx512_f64,
        avx512_f64_body,
        "avx512f",
        f64,
        8,
        _mm512_setzero_pd,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_fmadd_pd,
        _mm512_mul_pd
    );
    x86!(
        avx2_f32,
        avx2_f32_body,
        "avx2,fma",
        f32,
        8,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_mul_ps
    );
    x86!(
        avx2_f64,
        avx2_f64_body,
        "avx2,fma",
        f64,
        4,
        _mm256_setzero_pd,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_fmadd_pd,
        _mm256_mul_pd
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplications by a prime: no pattern that a wrong stride could hit by chance.
    fn numbers<T>(len: usize, make: impl Fn(i32) -> T) -> Vec<T> {
        (0..len as i32).map(|i| make(i.wrapping_mul(7919) % 1009 - 500)).collect()
    }

    macro_rules! chains {
        ($name:ident, $scalar:ty, $kernels:expr) => {
            /// Every kernel of this machine against the chain it promises, one element at a time, on all heights and
            /// widths, with both orders of the left operand.
            #[test]
            fn $name() {
                const STRIP: usize = <$scalar as Micro>::STRIP;
                // The portable loop rounds twice where the compiler may not use FMA: exact numbers do not show it.
                for (kernel, exact) in $kernels {
                    let make = |v: i32| if exact { v as $scalar } else { v as $scalar / 501.0 };
                    for (rows, columns, inner) in
                        [(1, 1, 1), (2, STRIP, 3), (3, STRIP - 1, 0), (5, 17, 4), (7, 9, 9), (8, STRIP, 21)]
                    {
                        let a = numbers(rows * inner, make);
                        let b = numbers(inner * STRIP, |v| make(v + 1));
                        let start = numbers(rows * STRIP, |v| make(v + 2));
                        for (alpha, add) in [(-2.0, true), (0.5, false)] {
                            let mut want = start.clone();
                            for i in 0..rows {
                                for j in 0..columns {
                                    let mut sum: $scalar = 0.0;
                                    for l in 0..inner {
                                        sum = a[i * inner + l].mul_add(b[l * STRIP + j], sum);
                                    }
                                    let c = &mut want[i * STRIP + j];
                                    *c = if add { sum.mul_add(alpha, *c) } else { alpha * sum };
                                }
                            }
                            let mut columns_first = vec![0.0; rows * inner];
                            for i in 0..rows {
                                for l in 0..inner {
                                    columns_first[l * rows + i] = a[i * inner + l];
                                }
                            }
                            for lhs in [
                                MatRef::from_row_major_slice(&a, rows, inner),
                                MatRef::from_column_major_slice(&columns_first, rows, inner),
                            ] {
                                let mut c = start.clone();
                                let dst = MatMut::from_row_major_slice_mut(&mut c, rows, STRIP);
                                let rhs = MatRef::from_row_major_slice(&b, inner, STRIP);
                                kernel.multiply(dst.get_mut(.., ..columns), add, lhs, rhs, alpha);
                                assert!(c == want, "{rows} x {columns} x {inner}, lanes {}", kernel.lanes);
                            }
                        }
                    }
                }
            }
        };
    }

    /// Whether this machine's own kernel is known to round once.
    const FUSED: bool = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));

    fn kernels_f32() -> Vec<(Kernel<f32>, bool)> {
        let mut kernels = vec![(PORTABLE_F32, true), (f32::kernel(), !FUSED)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kernels.push((AVX2_F32, false));
        } else {
            kernels.truncate(1);
        }
        kernels
    }

    fn kernels_f64() -> Vec<(Kernel<f64>, bool)> {
        let mut kernels = vec![(PORTABLE_F64, true), (f64::kernel(), !FUSED)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kernels.push((AVX2_F64, false));
        } else {
            kernels.truncate(1);
        }
        kernels
    }

    chains!(f32_kernels_are_chains_of_fused_steps, f32, kernels_f32());
    chains!(f64_kernels_are_chains_of_fused_steps, f64, kernels_f64());
}
