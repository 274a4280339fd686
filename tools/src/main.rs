//! The `terrace` program.

use std::panic::{catch_unwind, resume_unwind, set_hook, take_hook};
use std::process::ExitCode;

use clap::Parser;
use terrace::cli::Cli;
use terrace_media::LargePages;

/// As the daemon's, whose code is simulated and measured here.
#[global_allocator]
static ALLOCATOR: LargePages = LargePages;

/// What a shell says of a filter that a broken pipe ended: 128 and the number of the signal.
const ENDED_BY_A_PIPE: u8 = 128 + 13;

fn main() -> ExitCode {
    terrace_planner::process::become_guarded_child();
    say_nothing_of_output();
    match catch_unwind(|| Cli::parse().run()) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("terrace: {error:#}");
            ExitCode::FAILURE
        }
        Err(panic) => match unwritten(panic.downcast_ref::<String>().map_or("", String::as_str)) {
            // Nobody reads any more (`terrace info | head -1`).
            Some(reason) if reason.contains("Broken pipe") => ExitCode::from(ENDED_BY_A_PIPE),
            Some(reason) => {
                eprintln!("terrace: cannot write the output: {reason}");
                ExitCode::FAILURE
            }
            None => resume_unwind(panic),
        },
    }
}

/// The reason, in a message of `println!` or of clap, which panic when they cannot write.
fn unwritten(message: &str) -> Option<&str> {
    ["failed printing to stdout: ", "failed to write completion file: "]
        .iter()
        .find_map(|words| message.strip_prefix(words))
}

/// Output that nobody takes is no fault of the program: no backtrace.
fn say_nothing_of_output() {
    let say = take_hook();
    set_hook(Box::new(move |panic| {
        if panic.payload_as_str().and_then(unwritten).is_none() {
            say(panic);
        }
    }));
}
