//! The command line, and where each command goes.
//!
//! Exit codes: 0 done, 1 it could not be done (one line says why and what to
//! do), 2 the command line itself was wrong.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::output::Format;
use crate::{admin, bench, block, curve, doctor, explain, inspect, model, prefix, scrub, sim, up};

/// Terrace: a KV-cache service for LLM inference
#[derive(Debug, Parser)]
#[command(name = "terrace", version, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    target: Target,
    /// How to print
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Table, global = true)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// Which daemon to ask.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    /// The daemon's gRPC address, for example http://127.0.0.1:7070
    #[arg(long, env = "TERRACE_ENDPOINT", global = true)]
    pub(crate) endpoint: Option<String>,
    /// State directory of a running `terrace up` [default: .terrace]
    #[arg(long, env = "TERRACE_HOME", global = true)]
    pub(crate) home: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything on loopback, in the foreground, until Ctrl-C
    Up(up::Options),
    /// What is where, and how full
    Info,
    /// Tiers of the store
    #[command(subcommand)]
    Tier(TierCommand),
    /// One block
    #[command(subcommand)]
    Block(BlockCommand),
    /// Stored prefixes
    #[command(subcommand)]
    Prefix(PrefixCommand),
    /// Where requests go
    #[command(subcommand)]
    Route(RouteCommand),
    /// Live leases
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Spaces: what makes blocks interchangeable
    #[command(subcommand)]
    Space(SpaceCommand),
    /// Make everything sealed so far durable
    Flush,
    /// Read the copies on devices again and compare them
    #[command(subcommand)]
    Scrub(scrub::Command),
    /// Look at devices and the catalog while no daemon runs
    #[command(subcommand)]
    Inspect(inspect::Command),
    /// What about this machine makes Terrace slower than need be, and how to mend it
    Doctor,
    /// The default model
    #[command(subcommand)]
    Model(ModelCommand),
    /// Replay recorded traffic against a node that does not exist yet
    #[command(subcommand)]
    Sim(SimCommand),
    /// Measure, on temporary state of its own; never touches yours
    Bench(bench::Options),
    /// Print a shell's completion script
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum TierCommand {
    /// Each tier: on or why off, device, size, how full
    Ls,
    /// What other sizes of a tier would serve, estimated from what is asked for
    Curve(curve::Options),
}

#[derive(Debug, Subcommand)]
enum BlockCommand {
    /// Everything known about a block
    Stat(BlockArgs),
    /// Where its copies lie
    Locate(BlockArgs),
    /// Read every copy and compare its checksum
    Verify(BlockArgs),
}

#[derive(Debug, Args)]
struct BlockArgs {
    /// Block id, 32 hex digits
    #[arg(value_parser = block::parse_id)]
    id: [u8; 16],
}

#[derive(Debug, Subcommand)]
enum PrefixCommand {
    /// How much of a prompt is stored, and where
    Match(block::PrefixArgs),
    /// The warmest prefixes of the router's index
    Hot(prefix::Options),
    /// The warmest prefixes with what they begin with, as a tree
    Tree(prefix::Options),
}

#[derive(Debug, Subcommand)]
enum RouteCommand {
    /// Every way to serve a prompt, with every term of its estimate
    Explain(explain::Options),
}

#[derive(Debug, Subcommand)]
enum LeaseCommand {
    /// Who holds what, longest first
    Ls,
}

#[derive(Debug, Subcommand)]
enum SpaceCommand {
    /// Each space with what it holds
    Ls,
}

#[derive(Debug, Subcommand)]
enum SimCommand {
    /// What a store of a given size would hit, write and save
    Store(Box<sim::options::Options>),
    /// How soon workers behind a router would answer, by who serves what
    Route(Box<sim::route::options::Options>),
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Fetch the default model once, check it, and print its path
    Fetch,
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// With one line that says what was wrong and what to do.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        // One thread: children are tied to the thread that spawns them.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (target, format) = (self.target, self.output);
        match self.command {
            Command::Up(options) => runtime.block_on(up::run(options, target.home)),
            Command::Bench(options) => runtime.block_on(bench::run(options, format)),
            Command::Sim(SimCommand::Store(options)) => sim::store::run(&options, format),
            Command::Sim(SimCommand::Route(options)) => sim::route::run(&options, format),
            Command::Doctor => runtime.block_on(doctor::run(&target, format)),
            Command::Model(ModelCommand::Fetch) => {
                println!("{}", model::fetch()?.display());
                Ok(ExitCode::SUCCESS)
            }
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Self::command(), "terrace", &mut std::io::stdout());
                Ok(ExitCode::SUCCESS)
            }
            Command::Info => runtime.block_on(admin::info(&target, format)),
            Command::Tier(TierCommand::Ls) => runtime.block_on(admin::tiers(&target, format)),
            Command::Tier(TierCommand::Curve(options)) => {
                runtime.block_on(curve::run(&target, format, &options))
            }
            Command::Route(RouteCommand::Explain(options)) => {
                runtime.block_on(explain::run(&target, format, &options))
            }
            Command::Lease(LeaseCommand::Ls) => runtime.block_on(admin::leases(&target, format)),
            Command::Space(SpaceCommand::Ls) => runtime.block_on(admin::spaces(&target, format)),
            Command::Scrub(command) => runtime.block_on(scrub::run(&target, format, command)),
            Command::Inspect(command) => inspect::run(command, format),
            Command::Flush => runtime.block_on(admin::flush(&target, format)),
            Command::Block(BlockCommand::Stat(args)) => {
                runtime.block_on(block::stat(&target, format, args.id))
            }
            Command::Block(BlockCommand::Locate(args)) => {
                runtime.block_on(block::locate(&target, format, args.id))
            }
            Command::Block(BlockCommand::Verify(args)) => {
                runtime.block_on(block::verify(&target, format, args.id))
            }
            Command::Prefix(PrefixCommand::Match(args)) => {
                runtime.block_on(block::prefix(&target, format, args))
            }
            Command::Prefix(PrefixCommand::Hot(options)) => {
                runtime.block_on(prefix::run(&target, format, prefix::Shape::Hot, &options))
            }
            Command::Prefix(PrefixCommand::Tree(options)) => {
                runtime.block_on(prefix::run(&target, format, prefix::Shape::Tree, &options))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// clap finds contradictions in the definitions only at run time: look now.
    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
