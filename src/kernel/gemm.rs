//! Matrix products on a grid that depends on shapes alone.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::{PANEL, Real};

/// Largest width of an output tile. Square tiles: faer was measured 20 % slower on tiles that are wider than high.
const TILE_COLUMNS: usize = PANEL;
/// Height of an output tile: 3 % faster than half of it.
const TILE_ROWS: usize = 2 * PANEL;

/// Whether a kernel may use the other threads of the current rayon pool. Never changes a bit of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threading {
    /// One thread: many small blocks run side by side.
    Sequential,
    /// All threads of the pool: one large block runs alone.
    Parallel,
}

/// A row-major `[rows, columns]` view.
pub fn mat<T: Real>(data: &[T], rows: usize, columns: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(&data[..rows * columns], rows, columns)
}

/// A row-major `[rows, columns]` view to write to.
pub fn mat_mut<T: Real>(data: &mut [T], rows: usize, columns: usize) -> MatMut<'_, T> {
    MatMut::from_row_major_slice_mut(&mut data[..rows * columns], rows, columns)
}

/// `dst ← [dst +] alpha · lhs · rhs`, with `dst` `[m, n]`, `lhs` `[m, k]`, `rhs` `[k, n]`.
///
/// The product is cut into output tiles of `2·`[`PANEL`] rows and at most [`PANEL`], equal columns, and panels of [`PANEL`]
/// along `k`, each one sequential faer call. Who cuts panels off along `k`, or hands rows over in tiles of [`PANEL`] one by
/// one however many there are, gets the same bits. Cost: `2·m·n·k` flops.
pub fn gemm<T: Real>(
    dst: MatMut<'_, T>,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
    threading: Threading,
) {
    debug_assert_eq!((lhs.nrows(), lhs.ncols(), rhs.ncols()), (dst.nrows(), rhs.nrows(), dst.ncols()));
    // Equal columns: a narrow last tile would leave a thread without work.
    let tiles = dst.ncols().div_ceil(TILE_COLUMNS).max(1);
    let width = dst.ncols().div_ceil(tiles).next_multiple_of(16);
    grid(dst, width, accumulate, lhs, rhs, alpha, threading);
}

/// Halves the grid until a tile is left: rows at multiples of [`TILE_ROWS`], columns at multiples of `width`.
fn grid<T: Real>(
    dst: MatMut<'_, T>,
    width: usize,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
    threading: Threading,
) {
    let (m, n) = (dst.nrows(), dst.ncols());
    if m > TILE_ROWS {
        let cut = m.div_ceil(TILE_ROWS).div_ceil(2) * TILE_ROWS;
        let (top, bottom) = dst.split_at_row_mut(cut);
        let (lhs_top, lhs_bottom) = lhs.split_at_row(cut);
        both(
            threading,
            || grid(top, width, accumulate, lhs_top, rhs, alpha, threading),
            || grid(bottom, width, accumulate, lhs_bottom, rhs, alpha, threading),
        );
    } else if n > width {
        let cut = n.div_ceil(width).div_ceil(2) * width;
        let (left, right) = dst.split_at_col_mut(cut);
        let (rhs_left, rhs_right) = rhs.split_at_col(cut);
        both(
            threading,
            || grid(left, width, accumulate, lhs, rhs_left, alpha, threading),
            || grid(right, width, accumulate, lhs, rhs_right, alpha, threading),
        );
    } else {
        tile(dst, accumulate, lhs, rhs, alpha);
    }
}

/// The tiles of `gemm` that touch the lower triangle (with the diagonal tiles whole) of a square `dst`: about half the
/// flops where the product is known to be symmetric. What lies above the diagonal tiles is left as it was.
pub fn gemm_lower<T: Real>(
    dst: MatMut<'_, T>,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
    threading: Threading,
) {
    lower_rows(dst, 0, accumulate, lhs, rhs, alpha, threading);
}

fn lower_rows<T: Real>(
    dst: MatMut<'_, T>,
    first_row: usize,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
    threading: Threading,
) {
    let m = dst.nrows();
    if m > PANEL {
        let cut = m.div_ceil(PANEL).div_ceil(2) * PANEL;
        let (top, bottom) = dst.split_at_row_mut(cut);
        let (lhs_top, lhs_bottom) = lhs.split_at_row(cut);
        both(
            threading,
            || lower_rows(top, first_row, accumulate, lhs_top, rhs, alpha, threading),
            || lower_rows(bottom, first_row + cut, accumulate, lhs_bottom, rhs, alpha, threading),
        );
    } else {
        let end = (first_row + m).min(dst.ncols());
        let dst = dst.get_mut(.., ..end);
        gemm(dst, accumulate, lhs, rhs.get(.., ..end), alpha, threading);
    }
}

/// `dst` `[columns, rows]` ← `src` `[rows, columns]` transposed, both row-major and compact.
///
/// Products want row-major operands: faer was measured at half its speed where the left one is transposed (or the right
/// one, of a row-major result), and a copy costs a few per cent of what it is then multiplied with.
pub fn transpose<T: Real>(src: &[T], rows: usize, columns: usize, dst: &mut [T], threading: Threading) {
    /// Side of a block: one cache line of f32.
    const BLOCK: usize = 16;
    if rows == 0 || columns == 0 {
        return;
    }
    let strip = |(k, strip): (usize, &mut [T])| {
        let first = k * BLOCK;
        let width = strip.len() / rows;
        for i in (0..rows).step_by(BLOCK) {
            for ii in i..(i + BLOCK).min(rows) {
                let line = &src[ii * columns + first..ii * columns + first + width];
                for (j, v) in line.iter().enumerate() {
                    strip[j * rows + ii] = *v;
                }
            }
        }
    };
    let dst = &mut dst[..rows * columns];
    match threading {
        Threading::Sequential => dst.chunks_mut(BLOCK * rows).enumerate().for_each(strip),
        Threading::Parallel => dst.par_chunks_mut(BLOCK * rows).enumerate().for_each(strip),
    }
}

fn tile<T: Real>(
    mut dst: MatMut<'_, T>,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
) {
    let alpha = T::from_f64(alpha);
    let mut accum = if accumulate { Accum::Add } else { Accum::Replace };
    if lhs.ncols() == 0 && !accumulate {
        dst.fill(T::default());
    }
    for Range { start, end } in super::panels(lhs.ncols()) {
        matmul(dst.rb_mut(), accum, lhs.get(.., start..end), rhs.get(start..end, ..), alpha, Par::Seq);
        accum = Accum::Add;
    }
}

fn both(threading: Threading, a: impl FnOnce() + Send, b: impl FnOnce() + Send) {
    match threading {
        Threading::Sequential => {
            a();
            b();
        }
        Threading::Parallel => {
            rayon::join(a, b);
        }
    }
}

use faer::prelude::ReborrowMut;

#[cfg(test)]
mod tests {
    use super::*;

    fn filled<T: Real>(len: usize, seed: u64) -> Vec<T> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                T::from_f64(((state >> 33) as f64) / f64::from(1u32 << 31) - 0.5)
            })
            .collect()
    }

    fn naive(m: usize, n: usize, k: usize, a: &[f64], b: &[f64]) -> Vec<f64> {
        let mut c = vec![0.0; m * n];
        for i in 0..m {
            for l in 0..k {
                for j in 0..n {
                    c[i * n + j] += a[i * k + l] * b[l * n + j];
                }
            }
        }
        c
    }

    #[test]
    fn agrees_with_three_loops_across_tile_borders() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 2), (513, 20, 515), (20, 1030, 7), (7, 3, 1100)] {
            let (a, b) = (filled::<f64>(m * k, 1), filled::<f64>(k * n, 2));
            let mut c = vec![1.0; m * n];
            gemm(mat_mut(&mut c, m, n), true, mat(&a, m, k), mat(&b, k, n), 2.0, Threading::Parallel);
            for (got, want) in c.iter().zip(naive(m, n, k, &a, &b)) {
                assert!((got - (1.0 + 2.0 * want)).abs() < 1e-12 * k as f64, "{got} {want}");
            }
        }
    }

    /// The promise that the memory plan rests on: threads, panels given one by one, tiles given one by one and copies of
    /// strided operands all give the same bits.
    #[test]
    fn bits_do_not_depend_on_threads_panels_or_copies() {
        let (m, n, k) = (1100, 1300, 1200);
        let (a, b) = (filled::<f32>(m * k, 3), filled::<f32>(k * n, 4));
        let mut whole = vec![0.0f32; m * n];
        gemm(mat_mut(&mut whole, m, n), false, mat(&a, m, k), mat(&b, k, n), 0.5, Threading::Parallel);

        let mut sequential = vec![0.0f32; m * n];
        gemm(mat_mut(&mut sequential, m, n), false, mat(&a, m, k), mat(&b, k, n), 0.5, Threading::Sequential);
        assert!(whole == sequential);

        let mut pieces = vec![0.0f32; m * n];
        for rows in super::super::panels(m) {
            let tile = &mut pieces[rows.start * n..rows.end * n];
            for inner in super::super::panels(k) {
                // A compact copy of the panel of `a`, as a streamed factor is.
                let mut copy = Vec::new();
                for i in rows.clone() {
                    copy.extend_from_slice(&a[i * k + inner.start..i * k + inner.end]);
                }
                gemm(
                    mat_mut(tile, rows.len(), n),
                    inner.start > 0,
                    mat(&copy, rows.len(), inner.len()),
                    mat(&b[inner.start * n..inner.end * n], inner.len(), n),
                    0.5,
                    Threading::Sequential,
                );
            }
        }
        assert!(whole == pieces);
    }

    #[test]
    fn a_transpose_is_one() {
        for (rows, columns) in [(1, 1), (3, 50), (33, 17), (16, 16), (100, 1)] {
            let a = filled::<f32>(rows * columns, 6);
            let mut t = vec![0.0; rows * columns];
            transpose(&a, rows, columns, &mut t, Threading::Parallel);
            for i in 0..rows {
                for j in 0..columns {
                    assert_eq!(t[j * rows + i], a[i * columns + j]);
                }
            }
        }
    }

    #[test]
    fn lower_tiles_hold_the_same_bits_as_the_whole_product() {
        let (n, k) = (1100, 70);
        let a = filled::<f64>(k * n, 5);
        let f = mat(&a, k, n);
        let mut whole = vec![0.0f64; n * n];
        gemm(mat_mut(&mut whole, n, n), false, f.transpose(), f, 1.0, Threading::Parallel);
        let mut lower = vec![0.0f64; n * n];
        gemm_lower(mat_mut(&mut lower, n, n), false, f.transpose(), f, 1.0, Threading::Parallel);
        for i in 0..n {
            assert!(whole[i * n..=i * n + i] == lower[i * n..=i * n + i]);
        }
    }
}
