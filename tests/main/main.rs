//! The end-to-end tests: the built binary on real files, judged by exit code, stderr and what it wrote.
//!
//! One binary, a module per kind. Inputs are written and outputs are read by code of the tests' own ([`util`]) and by
//! the `safetensors` crate, never by the code under test; expected numbers come from f64 arithmetic in [`algebra`].

mod adapters;
mod algebra;
mod cli;
mod config;
mod dependencies;
mod elementwise;
mod faults;
mod hostile;
mod outputs;
mod report;
mod sections;
mod statistics;
mod tokenizers;
mod util;
