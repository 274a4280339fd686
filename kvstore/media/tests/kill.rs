//! kill -9 in the middle of writes and commits: what was answered as durable is
//! there after a restart, and the catalog opens without a rebuild.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::*;
use terrace_core::{Done, Via};
use terrace_media::{Access, Backend, CatalogState, MediaOp};

const FOLDER: &str = "TERRACE_TEST_KILL_FOLDER";
const BACKEND: &str = "TERRACE_TEST_KILL_BACKEND";
const LINE: &str = "durable ";

/// The child's part: persists blocks for ever and says which are durable.
/// Does nothing when it is not started by the test below.
#[test]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let backend = if std::env::var(BACKEND).unwrap() == "pread" { Backend::Pread } else { Backend::IoUring };
    let mut store = Store::with(config_at(std::path::Path::new(&folder), backend)).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    store.carve(1);
    for round in 0u64.. {
        // Ten blocks in turn, each time with a higher write sequence and in the other slot, as after an eviction.
        let number = u8::try_from(1 + round % 10).unwrap();
        let slot = u32::from(round / 10 % 2 == 0);
        let source = frame(1, u32::from(number % 8));
        let bytes = payload(number);
        store.fill(source, &bytes);
        let header = terrace_core::BlockHeader { write_sequence: round + 1, ..header(number, &bytes) };
        let target = disk(slot, u32::from(number));
        let outcome = store.run(|op| MediaOp::Commit { op, put: vec![], delete: vec![header.block] });
        assert_eq!(outcome, Ok(Done::Plain));
        assert_eq!(store.write(source, target, header, Via::Direct), Ok(Done::Plain));
        assert_eq!(store.commit(vec![(target, header)], vec![]), Ok(Done::Plain));
        println!("\n{LINE}{round}");
    }
}

/// A durable answer that a kill takes back would be a lie: a child is killed
/// after some answers, at a moment of chance, and its store is opened.
#[test]
fn durable_blocks_survive_kill_nine() {
    for (backend, answers) in [("io_uring", 13u64), ("pread", 27), ("io_uring", 40)] {
        let folder = folder();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(FOLDER, folder.path())
            .env(BACKEND, backend)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut last = 0;
        for line in lines {
            if let Some(round) = line.unwrap().strip_prefix(LINE) {
                last = round.parse::<u64>().unwrap();
                if last == answers {
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        assert!(last >= answers, "the child ended by itself after {last}");

        let mut store = Store::open(&folder, Backend::Auto);
        assert_eq!(store.report.catalog, CatalogState::Opened);
        assert!(!store.report.clean);
        store.chunk(1, Access::Pool);
        let mut found = Vec::new();
        store.media.blocks(64, &mut |batch| found.extend(batch)).unwrap();
        // The child was at most one block further than it said.
        for round in last.saturating_sub(8)..=last {
            let number = u8::try_from(1 + round % 10).unwrap();
            let entry = found.iter().find(|found| found.header.block == block(number));
            let entry = entry.unwrap_or_else(|| panic!("block of round {round} of {last} is gone"));
            assert!(entry.header.write_sequence > round);
            assert_eq!(store.read(entry.frame, frame(1, 7), entry.header), Ok(Done::Plain));
            assert_eq!(store.payload(frame(1, 7)), payload(number));
        }
    }
}
