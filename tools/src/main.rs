//! The `terrace` program.

use std::process::ExitCode;

use clap::Parser;
use terrace::cli::Cli;
use terrace_media::LargePages;

/// As the daemon's, whose code is simulated and measured here.
#[global_allocator]
static ALLOCATOR: LargePages = LargePages;

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
