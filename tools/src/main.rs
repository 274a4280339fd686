//! The `terrace` program.

use std::process::ExitCode;

use clap::Parser;
use terrace::cli::Cli;

fn main() -> ExitCode {
    terrace_planner::process::become_guarded_child();
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("terrace: {error:#}");
            ExitCode::FAILURE
        }
    }
}
