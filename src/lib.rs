//! mats-stream
pub mod cli;
pub mod config;
pub mod diff;
pub mod error;
pub mod inspect;
pub mod kernel;
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
pub mod write;
