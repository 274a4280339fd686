//! `scrub`: copies on devices are read again and compared.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;
use terrace_proto::v1::{ScrubAction, ScrubRequest, ScrubResponse};

use crate::cli::Target;
use crate::connect::{admin, refused};
use crate::output::{self, Format};

/// What to do about the scrub.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// How it goes
    Status,
    /// Begin a pass now
    Start {
        /// Rate in bytes per second [default: the daemon's configured rate, or 64 MiB if that is off]
        #[arg(long)]
        bytes_per_second: Option<u64>,
    },
    /// End the pass that runs
    Stop,
}

pub(crate) async fn run(target: &Target, format: Format, command: Command) -> anyhow::Result<ExitCode> {
    let (action, bytes_per_second) = match command {
        Command::Status => (ScrubAction::Unspecified, 0),
        Command::Start { bytes_per_second } => (ScrubAction::Start, bytes_per_second.unwrap_or(0)),
        Command::Stop => (ScrubAction::Stop, 0),
    };
    let request = ScrubRequest { action: action.into(), bytes_per_second };
    let answer = admin(target).await?.scrub(request).await.map_err(refused)?.into_inner();
    match format {
        Format::Json => output::json(&json!({
            "running": answer.running,
            "bytes_per_second": answer.bytes_per_second,
            "slots_done": answer.slots_done,
            "slots": answer.slots,
            "configured_bytes_per_second": answer.configured_bytes_per_second,
            "next_pass_ms": answer.next_pass_ms,
            "blocks": answer.blocks,
            "bytes": answer.bytes,
            "damaged": answer.damaged,
            "unreadable": answer.unreadable,
            "passes": answer.passes,
        }))?,
        Format::Table => print(&answer),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(answer: &ScrubResponse) {
    if answer.running {
        println!(
            "a pass runs at {} a second: {} of {} slots are behind it",
            output::bytes(answer.bytes_per_second),
            answer.slots_done,
            answer.slots
        );
    } else if let Some(wait) = answer.next_pass_ms {
        println!("no pass runs; the next begins in {}", output::duration(wait));
    } else {
        println!("no pass runs, and none begins by itself: `scrub_bytes_per_second` is 0");
    }
    println!(
        "since the daemon's start: {} passes to their end, {} blocks ({}) found whole, {} damaged and dropped, \
         {} not readable",
        answer.passes,
        answer.blocks,
        output::bytes(answer.bytes),
        answer.damaged,
        answer.unreadable
    );
}
