//! What `benches/solve.rs` prints and writes.

use std::fmt::Write as _;

use mats_stream::precond::{KroneckerKind, cost};

use super::RESOLUTION;
use super::contenders::{Contender, Reached, Trace};
use super::problems::Problem;

/// Gaps that are asked for; that of plain conjugate gradients comes last.
pub(crate) const GAPS: [f64; 3] = [1e-1, 1e-2, 1e-3];

/// All solves of one problem at one ridge.
pub(crate) struct Group {
    pub source: String,
    pub out_features: usize,
    pub in_features: usize,
    pub models: usize,
    pub ridge: f64,
    /// What the engine takes where nothing is named.
    pub preferred: &'static str,
    /// `f(average) - f*`.
    pub whole: f64,
    pub traces: Vec<Trace>,
}

impl Group {
    /// Where plain conjugate gradients are after their last step.
    pub fn plain_gap(&self) -> Option<f64> {
        let plain = self.traces.iter().find(|t| t.contender == Contender::Plain)?;
        Some(plain.gap(plain.iterations(), self.whole))
    }

    fn reached(&self, trace: &Trace) -> Vec<Option<Reached>> {
        let gaps = GAPS.into_iter().map(Some).chain([self.plain_gap().map(|g| g.max(RESOLUTION))]);
        gaps.map(|gap| trace.reached(gap?, self.whole)).collect()
    }

    fn plain_seconds(&self) -> Option<f64> {
        let plain = self.traces.iter().find(|t| t.contender == Contender::Plain)?;
        self.reached(plain).last().copied().flatten().map(|r| r.seconds)
    }
}

#[derive(Default)]
pub(crate) struct Results {
    pub groups: Vec<Group>,
}

impl Results {
    /// Takes over the solves of one problem and prints them.
    pub fn add(&mut self, problem: &Problem, traces: Vec<Trace>) {
        // As asked for: the first contender met all of them in order.
        let first = traces.first().map(|t| t.contender);
        let ridges: Vec<f64> =
            traces.iter().filter(|t| Some(t.contender) == first).map(|t| t.ridge).collect();
        for ridge in ridges {
            let traces: Vec<Trace> = traces.iter().filter(|t| t.ridge == ridge).cloned().collect();
            let group = Group {
                source: problem.source.clone(),
                out_features: problem.shape.out_features,
                in_features: problem.shape.in_features,
                models: problem.models(),
                ridge,
                preferred: preferred(problem, ridge),
                whole: traces.iter().map(Trace::total).fold(0.0, f64::max),
                traces,
            };
            print(&group);
            self.groups.push(group);
        }
    }

    pub fn csv(&self) -> String {
        let mut out = String::from(
            "source,out,in,models,ridge,solver,preferred,plain_gap,setup_seconds,setup_matvecs,step_matvecs,bytes",
        );
        for gap in GAPS.iter().map(|g| format!("{g}")).chain(["plain".to_owned()]) {
            let _ = write!(out, ",matvecs_to_{gap},seconds_to_{gap},work_to_{gap}");
        }
        out.push_str(",steps,stop\n");
        for group in &self.groups {
            for t in &group.traces {
                let Group { source, out_features, in_features, models, ridge, preferred, .. } = group;
                let _ = write!(
                    out,
                    "{source},{out_features},{in_features},{models},{ridge},{},{preferred},{},{:.5},{:.3},{:.3},{}",
                    t.contender.name().replace(", ", " "),
                    group.plain_gap().map_or_else(String::new, |g| format!("{g:.3e}")),
                    t.setup_seconds,
                    t.setup_matvecs,
                    t.step_matvecs,
                    t.bytes
                );
                for reached in group.reached(t) {
                    let _ = match reached {
                        Some(r) => write!(out, ",{},{:.5},{:.2}", r.matvecs, r.seconds, r.work),
                        None => write!(out, ",,,"),
                    };
                }
                let _ = writeln!(out, ",{},{}", t.iterations(), t.stop.name());
            }
        }
        out
    }

    pub fn traces_csv(&self) -> String {
        let mut out = String::from("source,out,in,models,ridge,solver,matvecs,seconds,gap\n");
        for group in &self.groups {
            for t in &group.traces {
                for (k, (seconds, _)) in t.steps.iter().enumerate() {
                    let _ = writeln!(
                        out,
                        "{},{},{},{},{},{},{k},{:.5},{:.3e}",
                        group.source,
                        group.out_features,
                        group.in_features,
                        group.models,
                        group.ridge,
                        t.contender.name().replace(", ", " "),
                        t.setup_seconds + seconds,
                        t.gap(k, group.whole)
                    );
                }
            }
        }
        out
    }
}

/// As the engine decides on shapes, with its default limit of steps.
fn preferred(problem: &Problem, ridge: f64) -> &'static str {
    const LIMIT: usize = 20;
    match cost::preferred(problem.shape, problem.models(), LIMIT, ridge) {
        KroneckerKind::Eigen if cost::rotates(problem.shape, problem.models(), LIMIT) => "kronecker rotated",
        kind => kind.name(),
    }
}

pub(crate) fn head() {
    println!(
        "matvecs and seconds (set-up included) to a gap; `plain` is the gap of plain CG at its last step;"
    );
    println!(
        "work: matvecs that set-up and preconditioning are worth, by flops, included; MiB without factors"
    );
}

fn print(group: &Group) {
    let plain = group.plain_gap().map_or_else(String::new, |g| format!(", plain CG reaches {g:.1e}"));
    println!(
        "\n{} [{}, {}], {} models, ridge {}{plain}; by default {}",
        group.source, group.out_features, group.in_features, group.models, group.ridge, group.preferred
    );
    print!("{:<20} {:>9} {:>7}", "solver", "set-up s", "MiB");
    for gap in GAPS.iter().map(|g| format!("{g:.0e}")).chain(["plain".to_owned()]) {
        print!(" | {gap:>5} {:>9}", "s");
    }
    println!(" | {:>7} {:>7} {:>7}", "work", "time/pl", "work/pl");
    for t in &group.traces {
        print!(
            "{:<20} {:>9.4} {:>7.1}",
            t.contender.name(),
            t.setup_seconds,
            t.bytes as f64 / f64::from(1 << 20)
        );
        let reached = group.reached(t);
        for r in &reached {
            match r {
                Some(r) => print!(" | {:>5} {:>9.4}", r.matvecs, r.seconds),
                None => print!(" | {:>5} {:>9}", "-", "-"),
            }
        }
        match (reached.last().copied().flatten(), group.plain_seconds()) {
            (Some(r), Some(plain)) => {
                let steps = group.traces.iter().find(|t| t.contender == Contender::Plain);
                let steps = steps.and_then(|t| group.reached(t).last().copied().flatten());
                let share = steps.map_or(f64::NAN, |p| r.work / p.work);
                println!(" | {:>7.1} {:>7.3} {share:>7.3}", r.work, r.seconds / plain);
            }
            _ => println!(" | {:>7} {:>7} {:>7}", "-", "-", "-"),
        }
    }
}
