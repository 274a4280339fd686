//! Answers that are plain values.

use pyo3::prelude::*;

use terrace_client::wire::{self, BlockEventKind, Tier};
use terrace_client::{MissReason, SealOutcome};

/// Which blocks are there; see the package's stubs.
#[pyclass(frozen, get_all, eq, module = "terrace_kv")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Match {
    prefix: usize,
    blocks: Vec<BlockMatch>,
}

/// One position of a `Match`.
#[pyclass(frozen, get_all, eq, from_py_object, module = "terrace_kv")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockMatch {
    present: bool,
    tier: Option<&'static str>,
    holder: String,
    fetch_seconds: f64,
}

impl From<terrace_client::Match> for Match {
    fn from(found: terrace_client::Match) -> Self {
        let blocks = found.blocks.into_iter().map(|block| BlockMatch {
            present: block.present,
            tier: tier_word(block.tier),
            holder: block.holder,
            fetch_seconds: block.fetch.as_secs_f64(),
        });
        Self { prefix: found.prefix, blocks: blocks.collect() }
    }
}

/// What a prefetch did.
#[pyclass(frozen, get_all, eq, module = "terrace_kv")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Prefetched {
    started: u32,
    resident: u32,
}

impl From<terrace_client::Prefetched> for Prefetched {
    fn from(found: terrace_client::Prefetched) -> Self {
        Self { started: found.started, resident: found.resident }
    }
}

/// A run of events without a gap.
#[pyclass(frozen, get_all, module = "terrace_kv")]
#[derive(Clone, Debug)]
pub(crate) struct Events {
    incarnation: u64,
    sequence: u64,
    events: Vec<Event>,
    resync: bool,
}

impl From<wire::WatchResponse> for Events {
    fn from(run: wire::WatchResponse) -> Self {
        let events = run.events.into_iter().map(Event::from).collect();
        Self { incarnation: run.incarnation, sequence: run.sequence, events, resync: run.resync }
    }
}

/// A part of a snapshot.
#[pyclass(frozen, get_all, module = "terrace_kv")]
#[derive(Clone, Debug)]
pub(crate) struct SnapshotPart {
    incarnation: u64,
    sequence: u64,
    blocks: Vec<Event>,
    last: bool,
}

impl From<wire::SnapshotResponse> for SnapshotPart {
    fn from(part: wire::SnapshotResponse) -> Self {
        let blocks = part.blocks.into_iter().map(Event::from).collect();
        Self { incarnation: part.incarnation, sequence: part.sequence, blocks, last: part.last }
    }
}

/// What happened to a block.
#[pyclass(frozen, get_all, eq, from_py_object, module = "terrace_kv")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    kind: &'static str,
    space_id: Vec<u8>,
    block_id: Option<Vec<u8>>,
    parent_id: Option<Vec<u8>>,
    tiers: Vec<&'static str>,
    length: u64,
}

fn some(id: &[u8]) -> Option<Vec<u8>> {
    (!id.is_empty()).then(|| id.to_vec())
}

impl From<wire::BlockEvent> for Event {
    fn from(event: wire::BlockEvent) -> Self {
        let kind = match event.kind() {
            // A kind of a later daemon.
            BlockEventKind::Unspecified => "unknown",
            BlockEventKind::Sealed => "sealed",
            BlockEventKind::Moved => "moved",
            BlockEventKind::Evicted => "evicted",
            BlockEventKind::Cleared => "cleared",
        };
        Self {
            kind,
            space_id: event.space_id.to_vec(),
            block_id: some(&event.block_id),
            parent_id: some(&event.parent_id),
            tiers: event.tiers().filter_map(tier_word).collect(),
            length: event.length,
        }
    }
}

fn tier_word(tier: Tier) -> Option<&'static str> {
    match tier {
        Tier::Unspecified => None,
        Tier::Hbm => Some("hbm"),
        Tier::Pinned => Some("pinned"),
        Tier::Nvme => Some("nvme"),
        Tier::Remote => Some("remote"),
    }
}

pub(crate) fn reason_word(reason: MissReason) -> &'static str {
    match reason {
        MissReason::Unknown => "unknown",
        MissReason::Filling => "filling",
        MissReason::Checksum => "checksum",
        MissReason::Device => "device",
        MissReason::CheaperToRecompute => "cheaper_to_recompute",
    }
}

pub(crate) fn seal_word(outcome: SealOutcome) -> &'static str {
    match outcome {
        SealOutcome::Sealed => "sealed",
        SealOutcome::Already => "already",
        SealOutcome::Conflict => "conflict",
        SealOutcome::Lost => "lost",
        SealOutcome::NotDurable => "not_durable",
    }
}

macro_rules! shows_fields {
    ($($class:ident),*) => { $(
        #[pymethods]
        impl $class {
            fn __repr__(&self) -> String {
                format!("{self:?}")
            }
        }
    )* };
}

shows_fields!(Match, BlockMatch, Prefetched, Events, SnapshotPart, Event);
