//! Merge fine-tuned neural networks that do not fit in memory, by solving for what each one learned.
//!
//! Averaging checkpoints loses what makes them different. Merging by matching models in their task-parameter subspaces
//! (Tam, Bansal, Raffel 2024, arXiv:2312.04339) solves `(Σ wᵢ Cᵢ) θ = Σ wᵢ Cᵢ θᵢ` for each parameter instead, with Cᵢ a
//! diagonal Fisher, a Gram of the inputs, a K-FAC pair or the Gram of the task vector. This crate does so from mapped
//! safetensors files to sharded safetensors files, in a memory bound that the caller sets, without ever forming Cᵢ.
//!
//! The data's way, and where to look: [`config`] → [`read`], [`statistics`] → [`plan`] → [`stream`], which drives
//! [`merge`] (one parameter) on [`operator`], [`precond`] and [`solve`], themselves on [`kernel`] → [`mod@write`] →
//! [`mod@report`]. [`run`] has the commands.
//!
//! The solver needs no checkpoint. A K-FAC system of one model, from factors in memory:
//!
//! ```
//! use std::sync::Arc;
//!
//! use mats_stream::operator::{BlockShape, Factor, KroneckerSum, KroneckerTerm, MemoryRows, Panels, Symmetric};
//! use mats_stream::precond::NoPreconditioner;
//! use mats_stream::solve::{Any, MaxIterations, RelativeResidual, Silent, solve};
//!
//! let factor = |side, values: Vec<f64>| -> Result<Factor<f64>, mats_stream::operator::OperatorError> {
//!     let rows = Arc::new(MemoryRows::new(side, side, values)?);
//!     Ok(Factor::Symmetric(Symmetric::new(Panels::streamed(rows))?))
//! };
//! // G is [out, out], A is [in, in]: the operator is X ↦ G·X·A on [out, in].
//! let term = KroneckerTerm {
//!     weight: 1.0,
//!     g: factor(1, vec![2.0])?,
//!     a: factor(2, vec![3.0, 1.0, 1.0, 2.0])?,
//!     diagonals: None,
//! };
//! let operator = KroneckerSum::new(BlockShape::new(1, 2), vec![term])?;
//! let mut rule = Any(vec![Box::new(RelativeResidual(1e-12)), Box::new(MaxIterations(10))]);
//! // 2·[1, 2]·A = [10, 10].
//! let solution = solve(&operator, &NoPreconditioner, &[10.0, 10.0], &[0.0, 0.0], &mut rule, &mut Silent)?;
//! assert!((solution.x[0] - 1.0).abs() < 1e-9 && (solution.x[1] - 2.0).abs() < 1e-9);
//! # Ok::<(), mats_stream::operator::OperatorError>(())
//! ```
// One file maps memory, one has vector kernels, and each block says why it is sound; nothing else may.
#![deny(unsafe_code)]
// Untrusted files must never reach one of these. Tests may: a panic there is the report.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::panic,
        clippy::todo,
        clippy::dbg_macro,
        clippy::print_stdout,
        clippy::print_stderr
    )
)]

pub mod cli;
pub mod config;
pub mod diff;
pub mod error;
pub mod inspect;
pub mod kernel;
pub mod masks;
pub mod merge;
pub mod operator;
pub mod plan;
pub mod precond;
pub mod read;
pub mod report;
pub mod run;
pub mod solve;
pub mod statistics;
pub mod stream;
pub mod tokenizer;
pub mod verify;
pub mod view;
pub mod write;
