//! Curves as inline SVG: axes by plotters, the curves themselves as paths that the page can colour, name and link;
//! and the small pictures of one curve in a table's cell.
//!
//! plotters writes colours into the picture. The axes get three that nobody would choose, and `style.css` gives
//! them the page's own, light or dark.

use std::fmt::Write as _;
use std::ops::Range;

use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;

use super::show;

/// Pixels of the picture, which is scaled to the page: plotters counts in whole ones.
const SIZE: (u32, u32) = (1500, 840);
const AXIS: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
const TEXT: RGBColor = RGBColor(3, 3, 3);

/// Points of a curve: with more, no eye and no pixel tells them apart.
const MAX_POINTS: usize = 64;
/// Orders of magnitude on the vertical axis, from the largest value down. Below stands what is lost in rounding.
const MAX_DECADES: f64 = 20.0;
/// Steps up to which the horizontal axis is linear.
const LINEAR_STEPS: f64 = 48.0;

/// One block's values by step; what is not finite or not positive has no place on a logarithmic axis and is left
/// out.
pub(super) struct Curve<'a> {
    /// Its row in the table of blocks, if it has one there.
    pub(super) row: Option<usize>,
    pub(super) name: &'a str,
    pub(super) converged: bool,
    pub(super) values: Vec<f64>,
}

/// What a plot shows, in words.
pub(super) struct Caption<'a> {
    /// For ids: a plain word.
    pub(super) id: &'a str,
    pub(super) title: &'a str,
    pub(super) description: String,
}

/// All curves on one pair of axes: value (logarithmic) over step. `None` if there is nothing to draw.
pub(super) fn overview(caption: &Caption, curves: &[Curve]) -> Option<Markup> {
    let mut places: Vec<Vec<(f64, f64)>> = curves.iter().map(|c| points(&c.values, MAX_POINTS)).collect();
    let all = || places.iter().flatten();
    let highest = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let lowest = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let last = all().map(|p| p.0).fold(0.0, f64::max);
    if !highest.is_finite() || last == 0.0 {
        return None;
    }
    // A little air, and never an empty range.
    let y = lowest.max(highest - MAX_DECADES) - 0.1..highest + 0.1;
    let x = if last <= LINEAR_STEPS {
        Axis { range: 0.0..last, ticks: step_ticks(last), label: "step", shown: |x| format!("{x}") }
    } else {
        places.iter_mut().flatten().for_each(|place| place.0 = (place.0 + 1.0).log10());
        let range = 0.0..(last + 1.0).log10();
        Axis { ticks: decade_ticks(&range), range, label: "step + 1", shown: tick }
    };
    let y = Axis { ticks: decade_ticks(&y), range: y, label: "", shown: tick };
    let mut svg = String::new();
    let paths = {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let paths = chart(&root, &x, &y, &places)?;
        root.present().ok()?;
        paths
    };
    // Ours instead of plotters' own opening tag, which says nothing to who cannot see it.
    let inside = svg.get(svg.find('>')? + 1..svg.rfind("</svg>")?)?;
    let (id, crowd) = (caption.id, if curves.len() > 100 { "crowd" } else { "few" });
    Some(html! {
        figure {
            figcaption id={ (id) "-title" } { (caption.title) }
            svg.plot viewBox={ "0 0 " (SIZE.0) " " (SIZE.1) } role="group"
                aria-labelledby={ (id) "-title" } aria-describedby={ (id) "-desc" } {
                title { (caption.title) }
                desc id={ (id) "-desc" } { (caption.description) }
                g aria-hidden="true" { (PreEscaped(inside)) }
                g class=(crowd) {
                    @for (curve, path) in curves.iter().zip(&paths) {
                        @if !path.is_empty() {
                            a href=[curve.row.map(|row| format!("#b{row}"))] tabindex="-1" {
                                path class=[(!curve.converged).then_some("un")] d=(path) {
                                    title { (show::text(curve.name)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    })
}

/// One axis in the coordinates that are drawn: linear, whatever they stand for.
#[derive(Clone)]
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
    label: &'static str,
    /// A tick's text.
    shown: fn(f64) -> String,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _most: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Draws the axes and gives back each curve as the data of a path.
fn chart(
    root: &DrawingArea<SVGBackend, Shift>,
    x: &Axis,
    y: &Axis,
    places: &[Vec<(f64, f64)>],
) -> Option<Vec<String>> {
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .margin_right(36)
        .x_label_area_size(100)
        .y_label_area_size(150)
        .build_cartesian_2d(x.clone(), y.clone())
        .ok()?;
    let font = |size: i32| ("sans-serif", size).into_font().color(&TEXT);
    chart
        .configure_mesh()
        .x_desc(x.label)
        .axis_desc_style(font(40))
        .label_style(font(40))
        .axis_style(AXIS)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .x_labels(x.ticks.len())
        .y_labels(y.ticks.len())
        .x_label_formatter(&|at| (x.shown)(*at))
        .y_label_formatter(&|at| (y.shown)(*at))
        .draw()
        .ok()?;
    let one = |curve: &Vec<(f64, f64)>| {
        let pixels = curve.iter().map(|(at, value)| chart.backend_coord(&(*at, value.max(y.range.start))));
        path(pixels.map(|(x, y)| (f64::from(x), f64::from(y))))
    };
    Some(places.iter().map(one).collect())
}

/// Whole steps from 0 to `last`, about eight of them.
fn step_ticks(last: f64) -> Vec<f64> {
    let every = [1.0, 2.0, 5.0].into_iter().find(|every| last / every <= 10.0).unwrap_or(10.0);
    (0..).map(|k| f64::from(k) * every).take_while(|x| *x <= last).collect()
}

/// Places for ticks in a range of decimal logarithms: powers of ten, at most about eight of them, and in a range of
/// less than two decades also twice and five times these.
fn decade_ticks(range: &Range<f64>) -> Vec<f64> {
    let (first, last) = (range.start.floor() as i32, range.end.ceil() as i32);
    let every = (last - first) / 8 + 1;
    let factors: &[f64] = if range.end - range.start < 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    (first..=last)
        .filter(|decade| decade % every == 0)
        .flat_map(|decade| factors.iter().map(move |factor| f64::from(decade) + factor.log10()))
        .filter(|at| (range.start..=range.end).contains(at) && 10f64.powf(*at).is_finite())
        .collect()
}

/// What stands at a decimal logarithm: `1e-3`, `0.5`, `100`.
fn tick(at: f64) -> String {
    let value = 10f64.powf(at);
    if (0.009..1e4).contains(&value) {
        format!("{}", (value * 1e4).round() / 1e4)
    } else {
        format!("{value:.0e}")
    }
}

/// The places of a curve, step and decimal logarithm of the value, thinned to `limit`: dense at first, where it is
/// steep.
fn points(values: &[f64], limit: usize) -> Vec<(f64, f64)> {
    thin(values.len(), limit)
        .into_iter()
        .map(|step| (step as f64, values[step]))
        .filter(|(_, y)| y.is_finite() && *y > 0.0)
        .map(|(x, y)| (x, y.log10()))
        .collect()
}

/// At most `limit` of the numbers below `n`, ascending: all of them, or the first and the last and others at equal
/// ratios between.
pub(super) fn thin(n: usize, limit: usize) -> Vec<usize> {
    if n <= limit {
        return (0..n).collect();
    }
    let mut chosen: Vec<usize> = (0..limit)
        .map(|k| ((n as f64).powf(k as f64 / (limit - 1).max(1) as f64) as usize).clamp(1, n) - 1)
        .collect();
    if let Some(last) = chosen.last_mut() {
        *last = n - 1;
    }
    chosen.dedup();
    chosen
}

/// One curve alone, as large as a word. `label` says the same to who cannot see it.
pub(super) fn sparkline(values: &[f64], label: &str) -> Markup {
    const WIDTH: f64 = 90.0;
    const HEIGHT: f64 = 18.0;
    let points = points(values, 24);
    let lowest = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let highest = points.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    if points.len() < 2 {
        return show::absent();
    }
    let last = (values.len() - 1) as f64;
    let range = if highest > lowest { highest - lowest } else { 1.0 };
    let place = |(x, y): &(f64, f64)| (1.0 + WIDTH * x / last, 1.0 + HEIGHT * (highest - y) / range);
    html! {
        svg.spark viewBox="0 0 92 20" role="img" aria-label=(label) { path d=(path(points.iter().map(place))) {} }
    }
}

/// `M10 20l5 3 5 1`: the first point, then differences, in whole pixels.
fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut data = String::new();
    let mut at: Option<(i64, i64)> = None;
    for (x, y) in points {
        let (x, y) = (x.round() as i64, y.round() as i64);
        // Writing to a String cannot fail.
        let _ = match at {
            None => write!(data, "M{x} {y}l"),
            Some((x0, y0)) => write!(data, "{} {} ", x - x0, y - y0),
        };
        at = Some((x, y));
    }
    // One point alone is a dot, which round ends make visible.
    if data.ends_with('l') {
        data.push_str("0 0");
    }
    data.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_both_ends() {
        assert_eq!(thin(3, 5), [0, 1, 2]);
        assert_eq!(thin(0, 5), [0; 0]);
        for n in [6, 100, 100_000] {
            let chosen = thin(n, 5);
            assert!(chosen.len() <= 5 && chosen[0] == 0 && *chosen.last().unwrap() == n - 1, "{chosen:?}");
            assert!(chosen.windows(2).all(|w| w[0] < w[1]), "{chosen:?}");
        }
    }

    #[test]
    fn ticks_are_few_and_within() {
        let shown = |range| decade_ticks(&range).into_iter().map(tick).collect::<Vec<_>>();
        assert_eq!(shown(-1.4..0.1), ["0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(shown(-3.5..0.3), ["1e-3", "0.01", "0.1", "1"]);
        assert_eq!(shown(0.0..2.6), ["1", "10", "100"]);
        assert!(shown(-20.0..0.0).len() <= 8);
        assert_eq!(shown(307.0..308.2), ["1e307", "2e307", "5e307", "1e308"]);
        assert_eq!(step_ticks(7.0), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(step_ticks(48.0), [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0]);
    }

    #[test]
    fn a_path_is_its_differences() {
        assert_eq!(path([(10.0, 20.0), (15.0, 23.4), (14.0, 23.0)].into_iter()), "M10 20l5 3 -1 0");
        assert_eq!(path([(1.0, 2.0)].into_iter()), "M1 2l0 0");
        assert_eq!(path(std::iter::empty()), "");
    }

    #[test]
    fn ranges_that_no_axis_likes_are_drawn_or_left_out() {
        let caption = Caption { id: "x", title: "t", description: String::new() };
        let drawn = |values: &[f64]| {
            let curve = Curve { row: Some(0), name: "w", converged: true, values: values.to_vec() };
            overview(&caption, &[curve]).map(Markup::into_string)
        };
        for values in [
            &[1.0, 1.0][..],
            &[5e-324, f64::MAX, 1.0],
            &[1e-310, 1e-310],
            &[f64::MAX, f64::MAX],
            &[1.0, 0.0, -1.0, f64::NAN, 2.0],
        ] {
            let svg = drawn(values).expect("it has two points");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{values:?}");
            assert!(svg.len() < 64 << 10, "{values:?}: {} bytes", svg.len());
        }
        for values in [&[][..], &[1.0], &[0.0, 0.0], &[f64::NAN, f64::INFINITY]] {
            assert!(drawn(values).is_none(), "{values:?}");
        }
        // As many steps as anybody takes, thinned.
        let long: Vec<f64> = (0..100_000).map(|k| 1.0 / (1.0 + k as f64)).collect();
        assert!(drawn(&long).is_some_and(|svg| svg.len() < 64 << 10));
    }
}
