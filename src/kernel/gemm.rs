//! Matrix products: every element is one fixed chain of operations, however the work is cut.
//!
//! The inner dimension is cut into panels of [`PANEL`], and `micro` sums each panel of an element in order; so the bits
//! depend on the operands alone. Everything else here is about caches: the right operand is copied into strips that
//! vectors read from end to end, eight strips of a panel at a time stay in the second-level cache while all rows of the
//! left operand, read in place, pass by.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::micro::{Kernel, MAX_ROWS};
use super::{Buffer, PANEL, Real, panels};

/// Strips of the right operand that are packed at once: 768 KiB, for second-level caches of 1 to 2 MiB. In a prototype 6 to
/// 12 were equal within noise.
const GROUP: usize = 8;
/// Values of a scratch for [`GROUP`] strips and a few rows of the left operand, in f64s (an f32 strip is twice as wide).
const PACK: usize = PANEL * (GROUP * 24 + MAX_ROWS);
/// Up to so many rows copying the right operand costs more than it saves …
const UNPACKED_ROWS: usize = 16;
/// … and where its rows all fit into so few bytes: by flops, copies are about a tenth of the time at 96x96.
const UNPACKED_BYTES: usize = 128 << 10;
/// Products of fewer flops stay on their thread.
const PARALLEL_FLOPS: f64 = 2e6;

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

/// `dst ← [dst +] alpha · lhs · rhs`, with `dst` `[m, n]` row-major, `lhs` `[m, k]`, `rhs` `[k, n]` with any strides.
///
/// Each panel of [`PANEL`] along `k` adds `alpha` times a sum in the order of `k`, every step one fused multiply-add: who
/// cuts `k` at multiples of [`PANEL`], or rows and columns anywhere, gets the same bits. Row-major operands are fastest.
/// Cost: `2·m·n·k` flops.
pub fn gemm<T: Real>(
    dst: MatMut<'_, T>,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
    threading: Threading,
) {
    let (m, n, k) = (dst.nrows(), dst.ncols(), lhs.ncols());
    debug_assert_eq!((lhs.nrows(), k, rhs.ncols()), (m, rhs.nrows(), n));
    let (kernel, alpha) = (T::kernel(), T::from_f64(alpha));
    let threads = match threading {
        Threading::Parallel if 2.0 * (m * n) as f64 * k as f64 > PARALLEL_FLOPS => {
            rayon::current_num_threads()
        }
        _ => 1,
    };
    let groups = groups::<T>(n, threads);
    // Few strips: threads share them by rows.
    let bands = if groups.len() < threads { threads.div_ceil(groups.len().max(1)) } else { 1 };
    let band = m.div_ceil(bands).next_multiple_of(MAX_ROWS);
    let mut tasks = Vec::with_capacity(groups.len() * bands);
    let mut right = dst;
    let mut first = 0;
    for columns in groups {
        let (left, rest) = right.split_at_col_mut(columns.end - first);
        (right, first) = (rest, columns.end);
        let rhs = rhs.get(.., columns);
        let (mut below, mut lhs) = (left, lhs);
        while below.nrows() > band {
            let (top, rest) = below.split_at_row_mut(band);
            let (lhs_top, lhs_rest) = lhs.split_at_row(band);
            tasks.push((top, lhs_top, rhs));
            (below, lhs) = (rest, lhs_rest);
        }
        tasks.push((below, lhs, rhs));
    }
    let run = |(dst, lhs, rhs): (MatMut<'_, T>, _, MatRef<'_, T>)| {
        with_scratch(|scratch| {
            let columns = rhs.ncols();
            block(&kernel, Out::Matrix(dst), columns, accumulate, lhs, Right::Matrix(rhs), alpha, scratch);
        });
    };
    if threads > 1 {
        tasks.into_par_iter().with_max_len(1).for_each(run);
    } else {
        tasks.into_iter().for_each(run);
    }
}

/// Cuts columns at strips into groups of at most [`GROUP`], as many for each thread and all of one size within a strip.
pub(super) fn groups<T: Real>(columns: usize, threads: usize) -> Vec<Range<usize>> {
    let strips = columns.div_ceil(T::STRIP);
    let count = strips.div_ceil(GROUP).next_multiple_of(threads).min(strips);
    (0..count)
        .map(|g| {
            let cut = |g: usize| (g * strips / count * T::STRIP).min(columns);
            cut(g)..cut(g + 1)
        })
        .collect()
}

/// This thread's scratch for packed operands.
fn with_scratch<T: Real>(run: impl FnOnce(&mut [T])) {
    thread_local! {
        static SCRATCH: RefCell<Option<Buffer<f64>>> = const { RefCell::new(None) };
    }
    SCRATCH.with_borrow_mut(|buffer| {
        run(bytemuck::cast_slice_mut(buffer.get_or_insert_with(|| Buffer::zeroed(PACK))));
    });
}

/// Columns of a matrix in strips: strip `s` is row-major `[rows, STRIP]` and starts at `s·rows·STRIP`. What vectors read
/// from end to end, as result of one product and right operand of the next.
#[derive(Clone, Copy)]
struct Strips<'a, T> {
    values: &'a [T],
    rows: usize,
}

/// As [`Strips`], to write to.
struct StripsMut<'a, T> {
    values: &'a mut [T],
    rows: usize,
}

/// A right operand.
#[derive(Clone, Copy)]
enum Right<'a, T> {
    Matrix(MatRef<'a, T>),
    Strips(Strips<'a, T>),
}

/// A result.
enum Out<'a, T> {
    Matrix(MatMut<'a, T>),
    Strips(StripsMut<'a, T>),
}

impl<T: Real> Out<'_, T> {
    /// Rows of strip `s`, of which `width` columns count.
    fn tile(&mut self, s: usize, width: usize, rows: Range<usize>) -> MatMut<'_, T> {
        let first = s * T::STRIP;
        match self {
            Out::Matrix(matrix) => matrix.rb_mut().get_mut(rows, first..first + width),
            Out::Strips(strips) => {
                let strip = &mut strips.values[s * strips.rows * T::STRIP..][..strips.rows * T::STRIP];
                mat_mut(strip, strips.rows, T::STRIP).get_mut(rows, ..width)
            }
        }
    }
}

/// `dst ← [dst +] alpha · lhs · rhs` for `columns`, at most [`GROUP`] strips, on this thread.
#[allow(clippy::too_many_arguments, reason = "one product and where its operands are")]
fn block<T: Real>(
    kernel: &Kernel<T>,
    mut dst: Out<'_, T>,
    columns: usize,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: Right<'_, T>,
    alpha: T,
    scratch: &mut [T],
) {
    let m = lhs.nrows();
    let widths = || (0..columns).step_by(T::STRIP).map(|j| T::STRIP.min(columns - j)).enumerate();
    if lhs.ncols() == 0 && !accumulate {
        widths().for_each(|(s, width)| dst.tile(s, width, 0..m).fill(T::default()));
    }
    let (lhs_pack, rhs_pack) = scratch.split_at_mut(PANEL * MAX_ROWS);
    for k in panels(lhs.ncols()) {
        let inner = k.len();
        let strip_len = inner * T::STRIP;
        // Where each strip of this panel is, as `[inner, STRIP or its width]`.
        let mut strips = [MatRef::<T>::from_row_major_slice(&[], 0, 0); GROUP];
        for ((s, width), pack) in widths().zip(rhs_pack.chunks_exact_mut(strip_len)) {
            strips[s] = match rhs {
                Right::Strips(from) => {
                    mat(&from.values[(s * from.rows + k.start) * T::STRIP..], inner, T::STRIP)
                }
                Right::Matrix(from) => {
                    let from = from.get(k.clone(), s * T::STRIP..s * T::STRIP + width);
                    let readable = from.col_stride() == 1 && kernel.columns_read(width) == width;
                    let small = inner * from.row_stride().unsigned_abs() * T::BYTES <= UNPACKED_BYTES;
                    if readable && (small || m <= UNPACKED_ROWS) {
                        from
                    } else {
                        pack_strip(from, pack);
                        mat(pack, inner, T::STRIP)
                    }
                }
            };
        }
        for i in (0..m).step_by(kernel.rows()) {
            let rows = i..m.min(i + kernel.rows());
            let mut lhs = lhs.get(rows.clone(), k.clone());
            if lhs.col_stride() != 1 {
                lhs = pack_rows(lhs, lhs_pack);
            }
            for ((s, width), strip) in widths().zip(&strips) {
                let tile = dst.tile(s, width, rows.clone());
                kernel.multiply(tile, accumulate || k.start > 0, lhs, *strip, alpha);
            }
        }
    }
}

/// `y ← y + alpha · g · (scale · x · a)`: a K-FAC term with both factors in memory, `x` and `y` `[m, n]`.
///
/// The same bits as two products, the first of which is cut into tiles of [`PANEL`] rows: columns of `y` need the same
/// columns of `x·a` and no others, so a thread makes some strips of `x·a` and multiplies them by `g` while they are in
/// its cache, without waiting for the other threads. `scratch`: [`sandwich_scratch`].
#[allow(clippy::too_many_arguments, reason = "one formula")]
pub fn sandwich<T: Real>(
    mut y: MatMut<'_, T>,
    g: MatRef<'_, T>,
    x: MatRef<'_, T>,
    a: MatRef<'_, T>,
    scale: f64,
    alpha: f64,
    scratch: &mut [T],
    threading: Threading,
) {
    let (m, n) = (x.nrows(), x.ncols());
    let kernel = T::kernel();
    let flops = 2.0 * (m * n) as f64 * (m + n) as f64;
    let threads = match threading {
        Threading::Parallel if flops > PARALLEL_FLOPS => rayon::current_num_threads(),
        _ => 1,
    };
    let groups = groups::<T>(n, threads);
    if groups.len() < threads {
        // Too narrow to share by columns.
        for rows in panels(m) {
            let x = x.get(rows.clone(), ..);
            gemm(mat_mut(scratch, rows.len(), n), false, x, a, scale, threading);
            gemm(y.rb_mut(), true, g.get(.., rows.clone()), mat(scratch, rows.len(), n), alpha, threading);
        }
        return;
    }
    let (scale, alpha) = (T::from_f64(scale), T::from_f64(alpha));
    let widest = groups.iter().map(|g| g.len().next_multiple_of(T::STRIP)).max().unwrap_or(1);
    let least = PANEL.min(m).max(1) * widest;
    let slots = threads.min(scratch.len() / least).max(1);
    let share = scratch.len() / slots;
    // As many rows as there is room for: each pass packs `a` anew.
    let tile_rows = if share >= m * widest { m.max(1) } else { share / widest / PANEL * PANEL };
    let run = |(columns, mut y): (Range<usize>, MatMut<'_, T>), tile: &mut [T]| {
        with_scratch(|pack| {
            let width = columns.len();
            let a = Right::Matrix(a.get(.., columns));
            for first in (0..m).step_by(tile_rows) {
                let rows = first..m.min(first + tile_rows);
                let x = x.get(rows.clone(), ..);
                let xa = StripsMut { values: &mut *tile, rows: rows.len() };
                block(&kernel, Out::Strips(xa), width, false, x, a, scale, pack);
                let xa = Right::Strips(Strips { values: &*tile, rows: rows.len() });
                let g = g.get(.., rows);
                block(&kernel, Out::Matrix(y.rb_mut()), width, true, g, xa, alpha, pack);
            }
        });
    };
    let mut tasks = Vec::with_capacity(groups.len());
    let mut right = y;
    for columns in groups {
        let (left, rest) = right.split_at_col_mut(columns.len());
        tasks.push((columns, left));
        right = rest;
    }
    if slots == 1 {
        tasks.into_iter().for_each(|task| run(task, scratch));
    } else {
        let tasks = Mutex::new(tasks.into_iter());
        let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        scratch.par_chunks_exact_mut(share).take(slots).with_max_len(1).for_each(|tile| {
            while let Some(task) = next() {
                run(task, tile);
            }
        });
    }
}

/// Values of scratch of [`sandwich`] for blocks `[m, n]`: a tile of [`PANEL`] rows, its columns rounded up to strips.
pub fn sandwich_scratch<T: Real>(m: usize, n: usize) -> usize {
    PANEL.min(m) * n.next_multiple_of(T::STRIP)
}

/// Copies at most a strip of columns into `strip` `[inner, STRIP]`; the rest of its rows becomes zero.
fn pack_strip<T: Real>(src: MatRef<'_, T>, strip: &mut [T]) {
    /// Rows that are gathered at once where columns are contiguous.
    const ROWS: usize = 16;
    let width = src.ncols();
    if width < T::STRIP {
        strip.fill(T::default());
    }
    if let Some(src) = src.try_as_row_major() {
        for (l, row) in strip.chunks_exact_mut(T::STRIP).enumerate() {
            row[..width].copy_from_slice(src.row(l).as_slice());
        }
        return;
    }
    for (first, rows) in (0..src.nrows()).step_by(ROWS).zip(strip.chunks_mut(ROWS * T::STRIP)) {
        let src = src.get(first..src.nrows().min(first + ROWS), ..);
        for j in 0..width {
            let column = src.col(j);
            match column.try_as_col_major() {
                Some(column) => {
                    for (row, v) in rows.chunks_exact_mut(T::STRIP).zip(column.as_slice()) {
                        row[j] = *v;
                    }
                }
                None => {
                    for (row, v) in rows.chunks_exact_mut(T::STRIP).zip(column.iter()) {
                        row[j] = *v;
                    }
                }
            }
        }
    }
}

/// Copies a few rows whose values are not contiguous into columns `[inner, MAX_ROWS]`.
fn pack_rows<'p, T: Real>(src: MatRef<'_, T>, pack: &'p mut [T]) -> MatRef<'p, T> {
    for (l, to) in pack.chunks_exact_mut(MAX_ROWS).take(src.ncols()).enumerate() {
        let column = src.col(l);
        match column.try_as_col_major() {
            Some(column) => to[..src.nrows()].copy_from_slice(column.as_slice()),
            None => to.iter_mut().zip(column.iter()).for_each(|(to, v)| *to = *v),
        }
    }
    MatRef::from_column_major_slice_with_stride(pack, src.nrows(), src.ncols(), MAX_ROWS)
}

/// `gemm` of the lower triangle of a square `dst`, diagonal included: about half the flops where the product is known to
/// be symmetric. What lies above the diagonal is neither read nor written.
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

/// Rows that a triangle is cut into: of a square of so many on the diagonal, half the flops are for nothing.
const LOWER_ROWS: usize = 128;

fn lower_rows<T: Real>(
    mut dst: MatMut<'_, T>,
    first_row: usize,
    accumulate: bool,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    alpha: f64,
    threading: Threading,
) {
    let m = dst.nrows();
    if m > LOWER_ROWS {
        let cut = m.div_ceil(LOWER_ROWS).div_ceil(2) * LOWER_ROWS;
        let (top, bottom) = dst.split_at_row_mut(cut);
        let (lhs_top, lhs_bottom) = lhs.split_at_row(cut);
        both(
            threading,
            || lower_rows(top, first_row, accumulate, lhs_top, rhs, alpha, threading),
            || lower_rows(bottom, first_row + cut, accumulate, lhs_bottom, rhs, alpha, threading),
        );
    } else {
        let left = rhs.get(.., ..first_row);
        gemm(dst.rb_mut().get_mut(.., ..first_row), accumulate, lhs, left, alpha, Threading::Sequential);
        // The square on the diagonal goes through a copy, of which the lower triangle comes back.
        let mut square = Buffer::<T>::zeroed(m * m);
        let mut view = mat_mut(&mut square, m, m);
        let mut diagonal = dst.get_mut(.., first_row..first_row + m);
        if accumulate {
            for i in 0..m {
                for j in 0..=i {
                    view[(i, j)] = diagonal[(i, j)];
                }
            }
        }
        let right = rhs.get(.., first_row..first_row + m);
        gemm(view.rb_mut(), accumulate, lhs, right, alpha, Threading::Sequential);
        for i in 0..m {
            for j in 0..=i {
                diagonal[(i, j)] = view[(i, j)];
            }
        }
    }
}

/// `dst` `[columns, rows]` ← `src` `[rows, columns]` transposed, both row-major and compact.
///
/// For left operands: a product copies the columns of a transposed one for every eight strips anew.
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

    /// Transposed operands, and shapes that are no multiple of a tile, a strip or a vector.
    #[test]
    fn strides_do_not_change_a_bit() {
        fn check<T: Real>() {
            for (m, n, k) in [(1, 1, 1), (9, 49, 30), (17, 97, 513), (40, 20, 600), (5, 200, 0)] {
                let (a, b) = (filled::<T>(m * k, 7), filled::<T>(k * n, 8));
                let start = filled::<T>(m * n, 9);
                let product = |lhs: MatRef<'_, T>, rhs: MatRef<'_, T>| {
                    let mut c = start.clone();
                    gemm(mat_mut(&mut c, m, n), true, lhs, rhs, -0.5, Threading::Sequential);
                    c
                };
                let want = product(mat(&a, m, k), mat(&b, k, n));
                let (mut at, mut bt) = (vec![T::default(); m * k], vec![T::default(); k * n]);
                transpose(&a, m, k, &mut at, Threading::Sequential);
                transpose(&b, k, n, &mut bt, Threading::Sequential);
                assert!(want == product(mat(&at, k, m).transpose(), mat(&bt, n, k).transpose()));
            }
        }
        check::<f32>();
        check::<f64>();
    }

    /// The promise of [`sandwich`]: two products with a tile between them, for any room and any number of threads.
    #[test]
    fn a_sandwich_is_two_products() {
        for (m, n) in [(0, 5), (5, 0), (1, 1), (30, 50), (700, 600), (1100, 90)] {
            let (g, x, a) = (filled::<f32>(m * m, 1), filled::<f32>(m * n, 2), filled::<f32>(n * n, 3));
            let start = filled::<f32>(m * n, 4);
            let mut want = start.clone();
            let mut tile = vec![0.0f32; PANEL.min(m) * n];
            for rows in panels(m) {
                let x = mat(&x[rows.start * n..rows.end * n], rows.len(), n);
                gemm(mat_mut(&mut tile, rows.len(), n), false, x, mat(&a, n, n), 0.25, Threading::Sequential);
                let g = mat(&g, m, m).get(.., rows.clone());
                let xa = mat(&tile, rows.len(), n);
                gemm(mat_mut(&mut want, m, n), true, g, xa, 3.0, Threading::Sequential);
            }
            let least = sandwich_scratch::<f32>(m, n);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            for (room, threading) in [
                (least, Threading::Sequential),
                (least, Threading::Parallel),
                (5 * least, Threading::Sequential),
                (5 * least, Threading::Parallel),
            ] {
                let mut y = start.clone();
                let mut scratch = vec![f32::NAN; room];
                let (g, x, a) = (mat(&g, m, m), mat(&x, m, n), mat(&a, n, n));
                pool.install(|| {
                    sandwich(mat_mut(&mut y, m, n), g, x, a, 0.25, 3.0, &mut scratch, threading);
                });
                assert!(y == want, "{m}x{n} {room} {threading:?}");
            }
        }
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
            assert!(lower[i * n + i + 1..(i + 1) * n].iter().all(|v| *v == 0.0));
        }
    }
}
