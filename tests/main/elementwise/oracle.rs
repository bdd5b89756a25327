//! The methods written down from their formulas, in f64 and without a thought for speed.

/// `xᵢ - base`, for each model.
pub fn deltas(base: &[f64], models: &[Vec<f64>]) -> Vec<Vec<f64>> {
    models.iter().map(|m| m.iter().zip(base).map(|(x, b)| x - b).collect()).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

pub fn l1(a: &[f64]) -> f64 {
    a.iter().map(|v| v.abs()).sum()
}

/// Places by descending score, the first of equal ones first.
pub fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order
}

/// Places by ascending score, the first of equal ones first.
pub fn ascending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    order
}

pub fn only(values: &[f64], places: &[usize]) -> Vec<f64> {
    let mut kept = vec![0.0; values.len()];
    for place in places {
        kept[*place] = values[*place];
    }
    kept
}

pub fn magnitudes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v.abs()).collect()
}

/// mergekit's `magnitude`: the ⌊density·n⌋ largest, one at least.
pub fn largest(values: &[f64], density: f64) -> Vec<f64> {
    if density >= 1.0 {
        return values.to_vec();
    }
    if density <= 0.0 {
        return vec![0.0; values.len()];
    }
    let take = ((density * values.len() as f64) as usize).max(1);
    only(values, &descending(&magnitudes(values))[..take])
}

/// mergekit's `magnitude_outliers`.
pub fn without_outliers(values: &[f64], density: f64, gamma: f64) -> Vec<f64> {
    if density >= 1.0 {
        return values.to_vec();
    }
    let n = values.len();
    let take = (density * n as f64) as usize;
    let top = (gamma * n as f64) as usize;
    let bottom = n.saturating_sub(take + top);
    only(values, &ascending(&magnitudes(values))[bottom..bottom + take])
}

/// To the L1 norm before, unless either is tiny.
pub fn rescaled(thinned: &[f64], whole: &[f64]) -> Vec<f64> {
    let (before, after) = (l1(whole), l1(thinned));
    let factor = if before < 1e-7 || after < 1e-7 { 1.0 } else { before / after };
    thinned.iter().map(|v| v * factor).collect()
}

pub fn weighted_sum(
    base: &[f64],
    deltas: &[Vec<f64>],
    weights: &[f64],
    normalize: bool,
    lambda: f64,
) -> Vec<f64> {
    let divisor = if normalize { weights.iter().sum() } else { 1.0 };
    (0..base.len())
        .map(|k| base[k] + lambda * deltas.iter().zip(weights).map(|(d, w)| d[k] * w).sum::<f64>() / divisor)
        .collect()
}

/// Elected sign of the weighted sum (0 is positive), mean over those that have it.
pub fn consensus(
    base: &[f64],
    deltas: &[Vec<f64>],
    weights: &[f64],
    normalize: bool,
    lambda: f64,
) -> Vec<f64> {
    (0..base.len())
        .map(|k| {
            let terms: Vec<f64> = deltas.iter().zip(weights).map(|(d, w)| d[k] * w).collect();
            let sign = if terms.iter().sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
            let agree: Vec<bool> = terms.iter().map(|t| t * sign > 0.0).collect();
            let of =
                |values: &[f64]| -> f64 { values.iter().zip(&agree).filter(|p| *p.1).map(|p| p.0).sum() };
            let divisor = match of(weights) {
                d if !normalize || d == 0.0 => 1.0,
                d => d,
            };
            base[k] + lambda * of(&terms) / divisor
        })
        .collect()
}

pub fn slerp(a: &[f64], b: &[f64], t: f64) -> Vec<f64> {
    let unit = |v: &[f64]| if norm(v) > 1e-8 { norm(v) } else { 1.0 };
    let cosine = dot(a, b) / (unit(a) * unit(b));
    let [ca, cb] = if cosine.abs() > 0.9995 { [1.0 - t, t] } else { arc(cosine.acos(), t) };
    a.iter().zip(b).map(|(a, b)| ca * a + cb * b).collect()
}

fn arc(theta: f64, t: f64) -> [f64; 2] {
    [((1.0 - t) * theta).sin() / theta.sin(), (t * theta).sin() / theta.sin()]
}

/// Of two vectors, linear where they are parallel.
pub fn nuslerp(a: &[f64], b: &[f64], t: f64) -> Vec<f64> {
    let cosine = (dot(a, b) / (norm(a).max(1e-7) * norm(b).max(1e-7))).clamp(-1.0, 1.0);
    let [ca, cb] = if 1.0 - cosine * cosine <= 1e-16 { [1.0 - t, t] } else { arc(cosine.acos(), t) };
    a.iter().zip(b).map(|(a, b)| ca * a + cb * b).collect()
}

fn sum_of(vectors: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    (0..vectors[0].len()).map(|k| vectors.iter().zip(weights).map(|(v, w)| v[k] * w).sum()).collect()
}

fn scaled(v: &[f64], s: f64) -> Vec<f64> {
    v.iter().map(|x| x * s).collect()
}

fn minus(a: &[f64], s: f64, b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - s * b).collect()
}

pub fn multislerp(vectors: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| w / total).collect();
    let norms: Vec<f64> = vectors.iter().map(|v| norm(v)).collect();
    if norms.iter().all(|n| *n == 0.0) {
        return vec![0.0; vectors[0].len()];
    }
    let units: Vec<Vec<f64>> = vectors.iter().zip(&norms).map(|(v, n)| scaled(v, 1.0 / (n + 1e-8))).collect();
    let mean = sum_of(&units, &weights);
    let mean = scaled(&mean, 1.0 / norm(&mean));
    let tangents: Vec<Vec<f64>> = units.iter().map(|u| minus(u, dot(u, &mean), &mean)).collect();
    let tangent = sum_of(&tangents, &weights);
    let length = norm(&tangent) + 1e-8;
    let point = minus(&scaled(&mean, length.cos()), -length.sin() / length, &tangent);
    scaled(&point, norms.iter().zip(&weights).map(|(n, w)| n * w).sum())
}

/// To convergence: the test runs the method as long.
pub fn karcher(vectors: &[Vec<f64>]) -> Vec<f64> {
    let n = vectors.len() as f64;
    let norms: Vec<f64> = vectors.iter().map(|v| norm(v)).collect();
    let units: Vec<Vec<f64>> = vectors.iter().zip(&norms).map(|(v, n)| scaled(v, 1.0 / n)).collect();
    let mut mean = sum_of(&units, &vec![1.0 / n; units.len()]);
    mean = scaled(&mean, 1.0 / norm(&mean));
    for _ in 0..200 {
        let mut tangent = vec![0.0; mean.len()];
        for unit in &units {
            let cosine = dot(&mean, unit).clamp(-1.0, 1.0);
            let theta = cosine.acos();
            if theta > 1e-12 {
                let log = minus(unit, cosine, &mean);
                tangent = minus(&tangent, -theta / theta.sin() / n, &log);
            }
        }
        let step = norm(&tangent);
        if step < 1e-13 {
            break;
        }
        mean = minus(&scaled(&mean, step.cos()), -step.sin() / step, &tangent);
        mean = scaled(&mean, 1.0 / norm(&mean));
    }
    scaled(&mean, norms.iter().sum::<f64>() / n)
}

pub fn model_stock(base: &[f64], deltas: &[Vec<f64>]) -> Vec<f64> {
    let n = deltas.len() as f64;
    let mut cosines = Vec::new();
    for i in 0..deltas.len() {
        for j in i + 1..deltas.len() {
            let product = (norm(&deltas[i]) * norm(&deltas[j])).max(1e-6);
            cosines.push((dot(&deltas[i], &deltas[j]) / product).clamp(-1.0, 1.0));
        }
    }
    let cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let denominator = 1.0 + (n - 1.0) * cosine;
    let t = if denominator.abs() < 1e-6 { 0.0 } else { n * cosine / denominator };
    (0..base.len()).map(|k| base[k] + t * deltas.iter().map(|d| d[k]).sum::<f64>() / n).collect()
}

pub fn nearswap(base: &[f64], model: &[f64], t: f64) -> Vec<f64> {
    let weight = |a: f64, b: f64| (t / (a - b).abs().max(1e-6)).clamp(0.0, 1.0);
    base.iter().zip(model).map(|(a, b)| weight(*a, *b) * b + (1.0 - weight(*a, *b)) * a).collect()
}

pub fn magmax(base: &[f64], deltas: &[Vec<f64>], lambda: f64) -> Vec<f64> {
    let largest = |k: usize| {
        deltas.iter().map(|d| d[k]).fold(0.0f64, |best, d| if d.abs() > best.abs() { d } else { best })
    };
    (0..base.len()).map(|k| base[k] + lambda * largest(k)).collect()
}

pub fn ram(base: &[f64], deltas: &[Vec<f64>], epsilon: f64, plus: Option<(f64, f64)>) -> Vec<f64> {
    let changed = |i: usize, k: usize| deltas[i][k].abs() > epsilon;
    let count = |k: usize| (0..deltas.len()).filter(|i| changed(*i, k)).count();
    let factors: Vec<f64> = (0..deltas.len())
        .map(|i| match plus {
            None => 1.0,
            Some((r, alpha)) => {
                let own = |alone: bool| {
                    (0..base.len()).filter(|k| changed(i, *k) && (count(*k) == 1) == alone).count() as f64
                };
                1.0 + r * (own(false) / own(true).max(epsilon)).clamp(0.0, alpha)
            }
        })
        .collect();
    (0..base.len())
        .map(|k| {
            let n = count(k);
            let terms = (0..deltas.len()).filter(|i| changed(*i, k));
            let term = |i: usize| if n == 1 { deltas[i][k] * factors[i] } else { deltas[i][k] / n as f64 };
            base[k] + terms.map(term).sum::<f64>()
        })
        .collect()
}

pub fn sce(base: &[f64], deltas: &[Vec<f64>], topk: f64) -> Vec<f64> {
    let n = deltas.len() as f64;
    let mut deltas = deltas.to_vec();
    if topk < 1.0 {
        let variance = |k: usize| {
            let mean = deltas.iter().map(|d| d[k]).sum::<f64>() / n;
            // Rounded, as both tools select on f32.
            f64::from((deltas.iter().map(|d| (d[k] - mean).powi(2)).sum::<f64>() / n) as f32)
        };
        let variances: Vec<f64> = (0..base.len()).map(variance).collect();
        let take = (variances.iter().filter(|v| **v != 0.0).count() as f64 * topk) as usize;
        let places = descending(&variances)[..take].to_vec();
        deltas = deltas.iter().map(|d| only(d, &places)).collect();
    }
    let squares: Vec<f64> = deltas.iter().map(|d| dot(d, d) / base.len() as f64).collect();
    let sum: f64 = squares.iter().sum();
    let weights: Vec<f64> = squares.iter().map(|s| if sum < 1e-6 { 1.0 / n } else { s / sum }).collect();
    (0..base.len())
        .map(|k| {
            let sign = if deltas.iter().map(|d| d[k]).sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
            let (mut merged, mut divisor) = (0.0, 0.0);
            for (d, w) in deltas.iter().zip(&weights) {
                if d[k] * sign > 0.0 {
                    merged += d[k] * w;
                    divisor += w;
                }
            }
            base[k] + merged / divisor.max(1e-6)
        })
        .collect()
}

/// Importance of each element; the caller takes the quartiles.
pub fn importance(base: &[f64], model: &[f64], row: usize) -> Vec<f64> {
    let softmax = |row: &[f64]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|x| x.exp()).sum();
        row.iter().map(|x| x.exp() / sum + 1e-8).collect()
    };
    base.chunks(row)
        .zip(model.chunks(row))
        .flat_map(|(b, m)| {
            let (p, q) = (softmax(m), softmax(b));
            let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            b.iter().zip(m).map(move |(b, m)| (m - b).abs() * divergence).collect::<Vec<_>>()
        })
        .collect()
}

/// PCB-Merging's P3 on these vectors as one.
pub fn pcb(base: &[f64], deltas: &[Vec<f64>], weights: &[f64], density: f64) -> Vec<f64> {
    let n = base.len();
    let models = deltas.len();
    let at = |sorted: &[f64], place: f64| sorted[place.clamp(0.0, n as f64 - 1.0) as usize];
    let sorted = |values: &[f64]| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted
    };
    let bounds: Vec<(f64, f64)> = deltas
        .iter()
        .map(|d| {
            let sorted = sorted(&magnitudes(d));
            (at(&sorted, 0.01 * n as f64), at(&sorted, 0.99 * n as f64 - 1.0))
        })
        .collect();
    let sign = |v: f64| if v == 0.0 { 0.0 } else { v.signum() };
    let clamped = |i: usize, k: usize| {
        sign(deltas[i][k]) * deltas[i][k].abs().max(bounds[i].0).min(bounds[i].1.max(bounds[i].0))
    };
    let unit = |i: usize, k: usize| {
        let (low, high) = bounds[i];
        if high > low {
            sign(deltas[i][k]) * (clamped(i, k).abs().max(low) - low) / (high - low)
        } else {
            0.0
        }
    };
    let shares: Vec<Vec<f64>> = (0..models)
        .map(|i| {
            let beta: Vec<f64> = (0..n)
                .map(|k| {
                    let inter: f64 = (0..models).map(|j| (unit(i, k) * unit(j, k)).tanh()).sum();
                    (models as f64 * unit(i, k).powi(2)).exp() * inter
                })
                .collect();
            let sorted = sorted(&beta);
            let (least, most) = (at(&sorted, n as f64 * (1.0 - density)), sorted[n - 1]);
            beta.iter()
                .map(|b| if most > least { ((b - least) / (most - least)).max(0.0) } else { 0.0 })
                .collect()
        })
        .collect();
    (0..n)
        .map(|k| {
            let sum: f64 = shares.iter().map(|s| s[k]).sum();
            let merged: f64 = (0..models).map(|i| weights[i] * clamped(i, k) * shares[i][k]).sum();
            base[k] + merged / sum.max(1e-12)
        })
        .collect()
}

pub fn consensus_masks(
    base: &[f64],
    deltas: &[Vec<f64>],
    mask_lambda: f64,
    least: usize,
    lambda: f64,
) -> Vec<f64> {
    (0..base.len())
        .map(|k| {
            let sum: f64 = deltas.iter().map(|d| d[k]).sum();
            let claims = deltas.iter().filter(|d| d[k].abs() > mask_lambda * (sum - d[k]).abs()).count();
            base[k] + if claims >= least { lambda * sum } else { 0.0 }
        })
        .collect()
}

/// EMR's vector for all tasks.
pub fn unified(deltas: &[Vec<f64>]) -> Vec<f64> {
    (0..deltas[0].len())
        .map(|k| {
            let sign = if deltas.iter().map(|d| d[k]).sum::<f64>() > 0.0 { 1.0 } else { -1.0 };
            sign * deltas.iter().map(|d| d[k] * sign).filter(|d| *d > 0.0).fold(0.0, f64::max)
        })
        .collect()
}
