//! The plan as a table for people and as JSON for programs.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::{Action, BlockPlan, MergePlan};
use crate::merge::Start;
use crate::merge::block::{Stage, Strategy};
use crate::report::units::{Bytes, Escaped, Flops};

impl BlockPlan {
    /// Method, start, subspace and solver in a few words: `mats: iso_ridge -> kfac pcg`.
    pub fn summary(&self) -> String {
        match &self.action {
            Action::Copy { reason, .. } => format!("copy ({reason})"),
            Action::Merge { recipe, .. } => {
                if recipe.solves.is_empty() {
                    return recipe.method.to_owned();
                }
                let start = matches!(recipe.start, Start::Method(_)).then(|| recipe.start.name().to_owned());
                let solves = recipe.solves.iter().map(|s| format!("{} {}", s.system.name(), s.solver.name()));
                let steps: Vec<String> = start.into_iter().chain(solves).collect();
                format!("{}: {}", recipe.method, steps.join(" -> "))
            }
        }
    }

    fn cut(&self) -> String {
        let Action::Merge { strategy, .. } = &self.action else { return "stream".to_owned() };
        match strategy {
            Strategy::Elements if self.passes > 1 => format!("stream, {} passes", self.passes),
            Strategy::Elements => "stream".to_owned(),
            Strategy::Stages(stages) => stages
                .iter()
                .map(|stage| match stage {
                    Stage::Diagonal => "stream".to_owned(),
                    Stage::Direct(memory) if memory.tile_rows >= self.block.out_features => {
                        "whole".to_owned()
                    }
                    Stage::Direct(memory) => format!("tiles of {} rows", memory.tile_rows),
                    Stage::Iterative(memory) | Stage::Refined(memory) => match (memory.hold_a, memory.hold_g)
                    {
                        (true, true) => "factors held",
                        (true, false) => "output factors streamed",
                        _ => "factors streamed",
                    }
                    .to_owned(),
                    Stage::TwoTerm => "whole".to_owned(),
                })
                .collect::<Vec<_>>()
                .join(" -> "),
        }
    }
}

impl MergePlan {
    /// Strict JSON.
    pub fn to_json(&self) -> Value {
        let blocks: Vec<Value> = self
            .blocks
            .iter()
            .map(|b| {
                let (method, subspace, solver) = match &b.action {
                    Action::Copy { .. } => ("copy", None, None),
                    Action::Merge { recipe, .. } => {
                        let last = recipe.solves.last();
                        (recipe.method, last.map(|s| s.system.name()), last.map(|s| s.solver.name()))
                    }
                };
                json!({
                    "name": b.name,
                    "shape": b.shape,
                    "dtype": b.dtype.name(),
                    "method": method,
                    "subspace": subspace,
                    "solver": solver,
                    "steps": b.summary(),
                    "memory": b.cut(),
                    "unmatched": b.unmatched,
                    "passes": b.passes,
                    "memory_bytes": b.memory_bytes,
                    "bytes_read": b.read_bytes,
                    "bytes_written": b.output_bytes(),
                    "flops": b.flops,
                })
            })
            .collect();
        let not_merged: Vec<Value> =
            self.not_merged().map(|(name, reason)| json!({"name": name, "reason": reason})).collect();
        json!({
            "blocks": blocks,
            "units": self.units.len(),
            "not_merged": not_merged,
            "shards": self.layout.shards().iter().map(|s| json!({"name": s.file_name, "bytes": s.file_bytes})).collect::<Vec<_>>(),
            "bytes_read": self.read_bytes(),
            "bytes_written": self.write_bytes(),
            "bytes_of_solve_states": self.snapshot_bytes(),
            "flops": self.flops(),
            "peak_memory_bytes": self.peak_memory_bytes(),
            "overhead_memory_bytes": self.overhead_bytes,
            "least_memory_bytes": self.least_memory_bytes,
            "max_memory_bytes": self.limits.max_memory,
            "threads": self.limits.threads,
            "warnings": self.warnings,
        })
    }

    /// What is not merged by the config's method, and why.
    pub fn not_merged(&self) -> impl Iterator<Item = (&str, String)> {
        let blocks = self.blocks.iter().filter_map(|b| match (&b.action, &b.unmatched) {
            (Action::Copy { reason, .. }, _) => Some((b.name.as_str(), format!("copied: {reason}"))),
            (Action::Merge { recipe, .. }, Some(reason)) => {
                Some((b.name.as_str(), format!("{} instead: {reason}", recipe.method)))
            }
            (Action::Merge { .. }, None) => None,
        });
        blocks
            .chain(self.left_out.iter().map(|(name, reason)| (name.as_str(), format!("left out: {reason}"))))
    }

    /// A table and totals.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let rows: Vec<[String; 5]> = self
            .blocks
            .iter()
            .map(|b| {
                [
                    Escaped(&b.name).to_string(),
                    format!("{} {:?}", b.dtype, b.shape),
                    b.summary(),
                    b.cut(),
                    Bytes(b.memory_bytes).to_string(),
                ]
            })
            .collect();
        let titles = ["tensor", "output", "steps", "memory", "held"];
        let width =
            |k: usize| rows.iter().map(|r| r[k].chars().count()).chain([titles[k].len()]).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        let line = |out: &mut dyn Write, cells: [&str; 5]| {
            let text: Vec<String> =
                cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(out, "{}", text.join("  ").trim_end())
        };
        line(out, titles)?;
        for row in &rows {
            line(out, [&row[0], &row[1], &row[2], &row[3], &row[4]])?;
        }
        writeln!(out)?;
        let mut any = false;
        for (name, reason) in self.not_merged() {
            if !any {
                writeln!(out, "not merged:")?;
                any = true;
            }
            writeln!(out, "  {}: {}", Escaped(name), Escaped(&reason))?;
        }
        if any {
            writeln!(out)?;
        }
        writeln!(out, "blocks   {} in {} units", self.blocks.len(), self.units.len())?;
        writeln!(out, "reads    {}", Bytes(self.read_bytes()))?;
        writeln!(out, "writes   {} in {} files", Bytes(self.write_bytes()), self.layout.shards().len())?;
        if self.snapshot_bytes() > 0 {
            let bytes = Bytes(self.snapshot_bytes());
            writeln!(
                out,
                "keeps    {bytes} more on disk at most while it runs, to continue long solves from"
            )?;
        }
        writeln!(out, "flops    {} at most", Flops(self.flops()))?;
        writeln!(
            out,
            "memory   {} at its peak, of {}; at least {} would do",
            Bytes(self.peak_memory_bytes()),
            Bytes(self.limits.max_memory),
            Bytes(self.least_memory_bytes)
        )
    }
}
