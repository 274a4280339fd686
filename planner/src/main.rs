//! The `terrace-planner` program.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use terrace_planner::config::Options;
use terrace_planner::{process, service};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    process::become_guarded_child();
    let filter = EnvFilter::try_from_env("RUST_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("terrace-planner: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let config = Options::parse().with_file()?.check()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(service::run(config))
}
