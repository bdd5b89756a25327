//! The gap after each matvec, as one SVG picture of several panels.

use std::error::Error;
use std::path::Path;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::contenders::Contender;
use super::table::{Group, Results};

const PANEL: (u32, u32) = (440, 300);
const COLUMNS: usize = 2;
/// Room for the legend below the panels.
const LEGEND: u32 = 40;
/// Matvecs shown.
const STEPS: usize = 100;
/// Gaps shown, as powers of ten.
const DECADES: std::ops::Range<f64> = -4.0..0.0;

fn colour(contender: Contender) -> RGBColor {
    // Okabe and Ito's: told apart by most eyes.
    let place = Contender::ALL.iter().position(|c| *c == contender).unwrap_or(0);
    [
        RGBColor(0, 114, 178),
        RGBColor(90, 90, 90),
        RGBColor(230, 159, 0),
        RGBColor(86, 180, 233),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(213, 94, 0),
    ][place]
}

/// Writes one panel for each problem at its first ridge.
pub(crate) fn gaps(path: &Path, results: &Results) -> Result<(), Box<dyn Error>> {
    let Some(ridge) = results.groups.first().map(|g| g.ridge) else { return Ok(()) };
    let groups: Vec<&Group> = results.groups.iter().filter(|g| g.ridge == ridge).collect();
    let rows = groups.len().div_ceil(COLUMNS);
    let size = (PANEL.0 * COLUMNS as u32, PANEL.1 * rows as u32 + LEGEND);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        let (panels, legend) = root.split_vertically(size.1 - LEGEND);
        for (panel, group) in panels.split_evenly((rows, COLUMNS)).iter().zip(&groups) {
            draw(panel, group)?;
        }
        let shown: Vec<Contender> = shown(&groups);
        let width = size.0 as usize / shown.len().max(1);
        for (k, contender) in shown.into_iter().enumerate() {
            let x = (k * width + 8) as i32;
            let line = vec![(x, 16), (x + 16, 16)];
            legend.draw(&PathElement::new(line, colour(contender).stroke_width(2)))?;
            legend.draw(&Text::new(contender.name(), (x + 20, 10), ("sans-serif", 12)))?;
        }
        root.present()?;
    }
    std::fs::write(path, text)?;
    Ok(())
}

/// Rotated steps are those of `kronecker` up to rounding: one line is enough.
fn shown(groups: &[&Group]) -> Vec<Contender> {
    let there = |c: &Contender| groups.iter().any(|g| g.traces.iter().any(|t| t.contender == *c));
    Contender::ALL.into_iter().filter(|c| *c != Contender::Rotated).filter(there).collect()
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    group: &Group,
) -> Result<(), Box<dyn Error>> {
    let name = group.source.rsplit(':').next().unwrap_or(&group.source);
    let caption = format!(
        "{name} [{}, {}], {} models, ridge {}",
        group.out_features, group.in_features, group.models, group.ridge
    );
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 13))
        .margin(8)
        .x_label_area_size(28)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..STEPS as f64, DECADES)?;
    chart
        .configure_mesh()
        .x_desc("matvecs")
        .y_desc("gap")
        .x_labels(6)
        .y_labels(5)
        .y_max_light_lines(1)
        .x_max_light_lines(1)
        .y_label_formatter(&|y| format!("1e{y:.0}"))
        .label_style(("sans-serif", 11))
        .draw()?;
    for trace in group.traces.iter().filter(|t| t.contender != Contender::Rotated) {
        let points: Vec<(f64, f64)> = (0..trace.steps.len().min(STEPS + 1))
            .map(|k| (k as f64, trace.gap(k, group.whole).max(1e-12).log10()))
            .collect();
        let style = colour(trace.contender).stroke_width(2);
        line(&mut chart, &points, style)?;
    }
    Ok(())
}

/// Up to the lower edge, and no further.
fn line(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<RangedCoordf64, RangedCoordf64>>,
    points: &[(f64, f64)],
    style: ShapeStyle,
) -> Result<(), Box<dyn Error>> {
    let inside = points.iter().take_while(|p| p.1 >= DECADES.start).count();
    let mut shown = points[..inside].to_vec();
    if let (Some(last), Some(next)) = (shown.last().copied(), points.get(inside)) {
        let share = (last.1 - DECADES.start) / (last.1 - next.1);
        shown.push((last.0 + share * (next.0 - last.0), DECADES.start));
    }
    chart.draw_series([PathElement::new(shown, style)])?;
    Ok(())
}
