//! Convergence of plain, Jacobi and Kronecker-preconditioned conjugate gradients on one K-FAC system, as an SVG.
//!
//! `cargo run --release --example convergence_plot -- convergence.svg`

#![allow(clippy::print_stdout, reason = "the output is what the example is for")]

use std::error::Error;

use mats_stream::kernel::Threading;
use mats_stream::operator::{
    BlockShape, Damped, Factor, KroneckerSum, KroneckerTerm, MemoryRows, Panels, Symmetric,
};
use mats_stream::precond::{Jacobi, Kronecker, KroneckerKind, NoPreconditioner, Preconditioner};
use mats_stream::solve::{Any, History, MaxIterations, ObjectiveDecrease, solve};
use plotters::prelude::*;

/// `Σ λₖ vₖvₖᵀ` over cosines, with λ from 1 down to 1e-5 and the axes turned a little by `model`.
fn gram(side: usize, model: usize) -> Vec<f64> {
    let mut s = vec![0.0; side * side];
    for k in 0..side {
        let weight = 1e-5f64.powf(k as f64 / (side - 1) as f64) * 2.0 / side as f64;
        let wave = |i: usize| {
            let turn = 0.05 * model as f64 * ((i * 7 + k * 3) % 11) as f64 / 11.0;
            (std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / side as f64 + turn).cos()
        };
        for i in 0..side {
            for j in 0..side {
                s[i * side + j] += weight * wave(i) * wave(j);
            }
        }
    }
    s
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "convergence.svg".to_owned());
    let (out, input) = (48, 64);
    let factor = |side: usize, model: usize| -> Result<(Factor<f64>, Vec<f64>), Box<dyn Error>> {
        let gram = gram(side, model);
        let diagonal = gram.iter().step_by(side + 1).copied().collect();
        let rows = MemoryRows::new(side, side, gram)?;
        let panels = Panels::held(&rows, Threading::Sequential)?;
        Ok((Factor::Symmetric(Symmetric::new(panels)?), diagonal))
    };
    let mut terms = Vec::new();
    for model in 0..4 {
        let ((a, da), (g, dg)) = (factor(input, model)?, factor(out, model + 4)?);
        terms.push(KroneckerTerm { weight: 1.0, a, g, diagonals: Some((da, dg)) });
    }
    let operator = KroneckerSum::new(BlockShape::new(out, input), terms)?;
    // The ridge: 1e-3 of the mean diagonal, about 1/side² here.
    let shift = 1e-3 * 4.0 / (out * input) as f64;
    let damped = Damped::new(&operator, shift);
    let rhs: Vec<f64> = (0..out * input).map(|k| (k as f64 * 0.7).sin()).collect();

    let jacobi = Jacobi::new(&damped)?;
    let kronecker = Kronecker::new(KroneckerKind::Eigen, &operator, shift, Threading::Sequential)?;
    let preconditioners: [(&dyn Preconditioner<f64>, RGBColor); 3] =
        [(&NoPreconditioner, BLACK), (&jacobi, RED), (&kronecker, BLUE)];
    let mut curves = Vec::new();
    for (preconditioner, colour) in preconditioners {
        let mut history = History::default();
        let mut rule = Any(vec![Box::new(ObjectiveDecrease(1e-12)), Box::new(MaxIterations(200))]);
        solve(&damped, preconditioner, &rhs, &vec![0.0; rhs.len()], &mut rule, &mut history)?;
        curves.push((preconditioner.name(), colour, history.0));
    }
    // The lowest objective that any of them reached stands for the solution's.
    let most = curves.iter().filter_map(|c| c.2.last()).map(|s| s.total_decrease).fold(0.0, f64::max);
    let area = SVGBackend::new(&path, (720, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(0usize..60, (1e-6f64..1.0).log_scale())?;
    chart.configure_mesh().x_desc("steps").y_desc("objective above its minimum").draw()?;
    for (name, colour, steps) in &curves {
        let points: Vec<_> = steps
            .iter()
            .map(|step| (step.iteration, 1.0 - step.total_decrease / most))
            .take_while(|(step, gap)| *step <= 60 && *gap > 1e-6)
            .collect();
        let reached = steps.iter().find(|step| 1.0 - step.total_decrease / most < 1e-2);
        println!("{name:<10} {:>4} steps to 1 %", reached.map_or(-1, |step| step.iteration as i64));
        let colour = *colour;
        chart
            .draw_series(std::iter::once(PathElement::new(points, colour.stroke_width(2))))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
    area.present()?;
    println!("{path}");
    Ok(())
}
