//! The examples of the client library, run as a reader of them would.

use std::path::PathBuf;
use std::process::Command;

use crate::daemon::Daemon;

fn example(name: &str) -> Command {
    // Beside the folder of the tests.
    let programs = std::env::current_exe().unwrap();
    let program: PathBuf = programs.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(
        program.exists(),
        "{} is missing: cargo build --release --examples -p terrace-client",
        program.display()
    );
    Command::new(program)
}

fn said(command: &mut Command) -> String {
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    said
}

/// An example that does not run teaches the wrong thing: each is run, and by value over both ways.
#[test]
fn they_run() {
    let daemon = Daemon::start("");
    let socket = daemon.target().socket.unwrap();
    let by_lane = said(example("put_and_get").arg(&socket).arg(daemon.grpc()));
    assert!(by_lane.starts_with("Lane: ") && by_lane.ends_with("the same: true\n"), "{by_lane}");
    // Nobody listens there: the session falls back by itself.
    let by_grpc = said(example("put_and_get").arg("/nonexistent/lane.sock").arg(daemon.grpc()));
    assert!(by_grpc.starts_with("Grpc: ") && by_grpc.ends_with("the same: true\n"), "{by_grpc}");
    let in_place = said(example("in_place").arg(&socket));
    assert!(in_place.contains("first byte is 7") && in_place.contains("right: true"), "{in_place}");
}
