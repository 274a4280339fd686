//! Child processes that never outlive their parent.
//!
//! A guarded child starts as a copy of this program, asks the kernel for a
//! SIGKILL when its parent dies, and then becomes the program that was meant.
//! The main function of every program that spawns guarded children calls
//! [`become_guarded_child`] first.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal};

/// First argument of a guarded child before it becomes what it is meant to be.
const GUARD: &str = "__with-parent";

/// A command for `program` whose process is killed when this one dies. The
/// spawning thread must live as long as the process: the kernel watches threads.
pub fn guarded(program: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(program).arg(GUARD).arg(getpid().as_raw_nonzero().to_string()).arg(program);
    command
}

/// Returns at once unless this process was started by [`guarded`]; then it
/// becomes the named program and does not return.
pub fn become_guarded_child() {
    let mut args = std::env::args_os().skip(1);
    if args.next().as_deref() != Some(GUARD.as_ref()) {
        return;
    }
    let error = exec(args);
    eprintln!("{error}");
    std::process::exit(127);
}

fn exec(mut args: impl Iterator<Item = OsString>) -> String {
    let parent = args.next().and_then(|pid| pid.to_str()?.parse::<i32>().ok());
    let Some(program) = args.next() else {
        return format!("{GUARD} is for internal use: it needs a parent's pid and a program");
    };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return format!("cannot tie the child to its parent: {error}");
    }
    // The parent may have died before the signal was armed.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != parent {
        return "the parent is gone".to_owned();
    }
    let error = Command::new(&program).args(args).exec();
    format!("cannot run {}: {error}", Path::new(&program).display())
}

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// SIGTERM: finish and exit.
    Stop,
    /// SIGKILL.
    Die,
}

/// Signals a child that has not been waited for yet. A child that is gone is no error.
pub fn signal(pid: u32, ask: Ask) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let signal = match ask {
        Ask::Stop => Signal::TERM,
        Ask::Die => Signal::KILL,
    };
    if let Err(error) = kill_process(pid, signal) {
        tracing::debug!(%error, pid = pid.as_raw_nonzero().get(), "signal not delivered");
    }
}
