//! Parse, run, exit code. Nothing else lives here.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use mats_stream::cli::{Cli, LogLevel};
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(|| Quiet(std::io::stderr()))
        .with_target(false)
        .without_time()
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    match mats_stream::run::run(cli) {
        Ok(code) => code,
        Err(error) => {
            // A closed stderr must not turn an error into a panic.
            let _ = writeln!(std::io::stderr(), "mats-stream: error: {}", error.one_line());
            ExitCode::from(error.exit_code())
        }
    }
}

/// stderr that may be closed or full: what cannot be written is dropped.
struct Quiet(std::io::Stderr);

impl Write for Quiet {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}
