//! The `terrace` program when its output goes nowhere.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

use std::fs::File;
use std::process::{Command, Output, Stdio};

fn terrace(arguments: &[&str], output: impl Into<Stdio>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_terrace"))
        .args(arguments)
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
}

/// `terrace ... | head -1` in a script ended with a panic and its backtrace.
#[test]
fn a_reader_that_leaves_is_no_fault() {
    for arguments in [&["doctor"][..], &["-o", "json", "doctor"], &["completions", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = terrace(arguments, writer);
        assert_eq!(ended.status.code(), Some(141), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{arguments:?}");
    }
}

/// A report that was cut off must not pass for a whole one.
#[test]
fn a_full_disk_is_an_error() {
    let ended = terrace(&["doctor"], File::create("/dev/full").unwrap());
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(said, "terrace: cannot write the output: No space left on device (os error 28)\n");
}
