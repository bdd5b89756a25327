//! The tests' own linear algebra: small dense f64 matrices and Gaussian elimination, written to be checked by eye.

use crate::util::Random;

/// Row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn new(rows: usize, columns: usize, data: Vec<f64>) -> Self {
        assert_eq!(data.len(), rows * columns);
        Self { rows, columns, data }
    }

    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, vec![0.0; rows * columns])
    }

    pub fn identity(side: usize) -> Self {
        let mut m = Self::zeros(side, side);
        for i in 0..side {
            m.data[i * side + i] = 1.0;
        }
        m
    }

    pub fn random(rows: usize, columns: usize, random: &mut Random) -> Self {
        Self::new(rows, columns, random.values(rows * columns))
    }

    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.columns + j]
    }

    pub fn transpose(&self) -> Self {
        let data = (0..self.columns).flat_map(|j| (0..self.rows).map(move |i| self.at(i, j))).collect();
        Self::new(self.columns, self.rows, data)
    }

    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows);
        let mut product = Self::zeros(self.rows, other.columns);
        for i in 0..self.rows {
            for k in 0..self.columns {
                for j in 0..other.columns {
                    product.data[i * other.columns + j] += self.at(i, k) * other.at(k, j);
                }
            }
        }
        product
    }

    /// `self + scale · other`.
    pub fn plus(&self, scale: f64, other: &Self) -> Self {
        assert_eq!((self.rows, self.columns), (other.rows, other.columns));
        let data = self.data.iter().zip(&other.data).map(|(a, b)| a + scale * b).collect();
        Self::new(self.rows, self.columns, data)
    }

    pub fn scaled(&self, scale: f64) -> Self {
        Self::new(self.rows, self.columns, self.data.iter().map(|v| v * scale).collect())
    }

    pub fn trace(&self) -> f64 {
        (0..self.rows).map(|i| self.at(i, i)).sum()
    }

    /// Frobenius norm: at least the spectral one.
    pub fn norm(&self) -> f64 {
        self.data.iter().map(|v| v * v).sum::<f64>().sqrt()
    }

    /// `λ·C + (1-λ)·diag(C)`.
    pub fn off_diagonal(&self, lambda: f64) -> Self {
        let mut m = self.scaled(lambda);
        for i in 0..self.rows {
            m.data[i * self.columns + i] = self.at(i, i);
        }
        m
    }

    /// `self ⊗ other`: with row-major `vec`, `(G ⊗ A) vec(X) = vec(G X Aᵀ)`.
    pub fn kronecker(&self, other: &Self) -> Self {
        let (rows, columns) = (self.rows * other.rows, self.columns * other.columns);
        let mut m = Self::zeros(rows, columns);
        for i in 0..rows {
            for j in 0..columns {
                m.data[i * columns + j] =
                    self.at(i / other.rows, j / other.columns) * other.at(i % other.rows, j % other.columns);
            }
        }
        m
    }

    /// `X` with `self · X = right`, by Gaussian elimination with partial pivoting.
    pub fn solve(&self, right: &Self) -> Self {
        let n = self.rows;
        assert!(self.columns == n && right.rows == n);
        let (mut a, mut b) = (self.clone(), right.clone());
        for k in 0..n {
            let pivot = (k..n).max_by(|i, j| a.at(*i, k).abs().total_cmp(&a.at(*j, k).abs())).expect("k < n");
            assert!(a.at(pivot, k) != 0.0, "a singular system in a test");
            for m in [&mut a, &mut b] {
                for j in 0..m.columns {
                    m.data.swap(k * m.columns + j, pivot * m.columns + j);
                }
            }
            for i in k + 1..n {
                let factor = a.at(i, k) / a.at(k, k);
                for m in [&mut a, &mut b] {
                    for j in 0..m.columns {
                        let subtrahend = factor * m.at(k, j);
                        m.data[i * m.columns + j] -= subtrahend;
                    }
                }
            }
        }
        for k in (0..n).rev() {
            for j in 0..b.columns {
                let known: f64 = (k + 1..n).map(|i| a.at(k, i) * b.at(i, j)).sum();
                b.data[k * b.columns + j] = (b.at(k, j) - known) / a.at(k, k);
            }
        }
        b
    }

    /// Rounded to f32 where it stands, as a statistics file stores it.
    pub fn stored(&self) -> Self {
        Self::new(self.rows, self.columns, self.data.iter().map(|v| f64::from(*v as f32)).collect())
    }
}

/// A Gram `XᵀX / rows` of `rows` random rows, rounded to f32; exactly symmetric. With `rows ≥ 4·side` of uniform values
/// its eigenvalues lie between about 0.1 and 0.75: a condition number of some tens at most.
pub fn gram(side: usize, rows: usize, random: &mut Random) -> Matrix {
    let x = Matrix::random(rows, side, random);
    x.transpose().times(&x).scaled(1.0 / rows as f64).stored()
}

/// Fails where two vectors differ by more than `relative` of the expected vector's largest entry.
#[track_caller]
pub fn assert_near(got: &[f64], expected: &[f64], relative: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(0.0f64, |a, v| a.max(v.abs()));
    for (k, (g, e)) in got.iter().zip(expected).enumerate() {
        let off = (g - e).abs();
        assert!(off <= relative * scale, "{what}: entry {k} is {g}, expected {e}: off by {off:e} of {scale}");
    }
}
