//! The plan of a sweep: one plan a variant, over the same blocks, run together block by block.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::{Limits, MergePlan, PlanError, align_inputs, budget};
use crate::config::Variant;
use crate::merge::Inputs;
use crate::report::units::{Bytes, Escaped, Flops};

/// What a sweep will do.
#[derive(Debug)]
pub struct SweepPlan {
    /// One a variant, in the sweep's order. All have the same blocks, layout and units; a unit's memory is that of the
    /// variant that needs most.
    pub plans: Vec<MergePlan>,
    /// Names of the variants.
    pub names: Vec<String>,
    /// The swept values of each.
    parameters: Vec<Value>,
}

impl SweepPlan {
    /// Makes the plan; parameters as of [`MergePlan::new`].
    ///
    /// # Errors
    /// [`PlanError`], of the first variant that has one.
    pub fn new(
        variants: &[Variant],
        inputs: &mut Inputs,
        limits: Limits,
        metadata: u64,
    ) -> Result<Self, PlanError> {
        let alignment = align_inputs(inputs, limits)?;
        let mut extra = 0;
        if let Some(first) = variants.first() {
            // A plan without a bound tells what another one takes.
            let unbound = Limits { max_memory: u64::MAX, ..limits };
            let plan = MergePlan::of_variant(&first.config, inputs, &alignment, unbound, metadata)?;
            extra = budget::sweep_bytes(&plan, variants.len());
        }
        let mut plans = variants
            .iter()
            .map(|v| MergePlan::of_variant(&v.config, inputs, &alignment, limits, metadata + extra))
            .collect::<Result<Vec<_>, _>>()?;
        let blocks = plans.first().map_or(0, |plan| plan.blocks.len());
        let memory: Vec<u64> =
            (0..blocks).map(|k| plans.iter().map(|p| p.blocks[k].memory_bytes).max().unwrap_or(0)).collect();
        let large: Vec<bool> = (0..blocks).map(|k| plans.iter().any(|p| p.blocks[k].large)).collect();
        let least = plans.iter().map(|plan| plan.least_memory_bytes).max().unwrap_or(0);
        if let Some(mut units) = plans.first().map(|plan| plan.units.clone()) {
            for unit in &mut units {
                unit.memory_bytes = unit.blocks.iter().map(|k| memory[*k]).max().unwrap_or(0);
                unit.large = unit.blocks.iter().any(|k| large[*k]);
            }
            for plan in &mut plans {
                plan.units.clone_from(&units);
                plan.least_memory_bytes = least;
            }
        }
        let names = variants.iter().map(|v| v.name.clone()).collect();
        let parameters = variants.iter().map(Variant::parameters).collect();
        Ok(Self { plans, names, parameters })
    }

    /// Peak anonymous memory of the run.
    pub fn peak_memory_bytes(&self) -> u64 {
        self.plans.first().map_or(0, MergePlan::peak_memory_bytes)
    }

    /// Inputs read, each byte counted once a round: what any one of the merges reads, but for methods with passes of their
    /// own, which every variant makes.
    pub fn read_bytes(&self) -> u64 {
        let blocks = self.plans.first().map_or(0, |plan| plan.blocks.len());
        let of = |k: usize| {
            let bytes = self.plans.iter().map(|plan| plan.blocks[k].read_bytes);
            let apart = self.plans.iter().any(|plan| plan.blocks[k].has_passes());
            if apart { bytes.sum() } else { bytes.max().unwrap_or(0) }
        };
        (0..blocks).map(of).sum()
    }

    /// Tensor bytes of all outputs.
    pub fn write_bytes(&self) -> u64 {
        self.plans.iter().map(MergePlan::write_bytes).sum()
    }

    /// Upper bound of the floating point operations, as if nothing were shared.
    pub fn flops(&self) -> f64 {
        self.plans.iter().map(MergePlan::flops).sum()
    }

    /// Strict JSON: the first variant's plan with the totals of all, and the variants under `sweep`.
    pub fn to_json(&self) -> Value {
        let mut json = self.plans.first().map_or_else(|| json!({}), MergePlan::to_json);
        let variants: Vec<Value> = self
            .plans
            .iter()
            .zip(&self.names)
            .zip(&self.parameters)
            .map(|((plan, name), parameters)| {
                json!({
                    "name": name,
                    "parameters": parameters,
                    "bytes_written": plan.write_bytes(),
                    "flops": plan.flops(),
                })
            })
            .collect();
        json["sweep"] = variants.into();
        json["bytes_read"] = self.read_bytes().into();
        json["bytes_written"] = self.write_bytes().into();
        json["flops"] = self.flops().into();
        json
    }

    /// The first variant's table, then the variants and the totals of all.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let Some(first) = self.plans.first() else { return Ok(()) };
        first.write_table(out)?;
        writeln!(out)?;
        writeln!(out, "the above is `{}`, the first of a sweep of {}:", self.names[0], self.plans.len())?;
        for name in &self.names {
            writeln!(out, "  {}", Escaped(name))?;
        }
        writeln!(out)?;
        writeln!(out, "reads    {} for all of them", Bytes(self.read_bytes()))?;
        writeln!(out, "writes   {} in all", Bytes(self.write_bytes()))?;
        writeln!(out, "flops    {} at most in all", Flops(self.flops()))?;
        writeln!(out, "memory   {} at its peak", Bytes(self.peak_memory_bytes()))
    }
}
