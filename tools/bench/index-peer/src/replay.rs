//! Recorded traffic over 16 workers: each session stays on one worker, which tells of the blocks that it
//! did not have; before that, both indexes are asked for the prompt.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use anyhow::Context;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData, LocalBlockHash,
};
use terrace_index::{Found, HolderId, Index, Key, Limits, TierSet};

use crate::load::{mix, permille};
use crate::peer::{Peer, event};
use crate::report::Pairs;

const WORKERS: u32 = 16;
/// Blocks that one event tells of.
const PER_EVENT: usize = 64;

pub(crate) fn run(trace: &str, round: usize, pairs: &mut Pairs) -> anyhow::Result<()> {
    let file = File::open(trace).with_context(|| format!("cannot open {trace}"))?;
    let lines = BufReader::new(ruzstd::decoding::StreamingDecoder::new(file)?).lines();
    let (ours, theirs) = (Index::new(Limits { holders: WORKERS, bytes: 2 << 30 }), Peer::new(1));
    let mut held: Vec<HashSet<u64>> = vec![HashSet::new(); WORKERS as usize];
    let (mut our_finds, mut their_finds, mut found) = (Vec::new(), Vec::new(), Found::new());
    let (mut our_time, mut their_time, mut told) = (Duration::ZERO, Duration::ZERO, 0);
    for line in lines {
        let line: serde_json::Value = serde_json::from_str(&line?)?;
        let ids: Vec<u64> =
            line["hash_ids"].as_array().context("no hash_ids")?.iter().filter_map(|id| id.as_u64()).collect();
        let session = line["session_id"].to_string();
        let worker = session.bytes().fold(0, |sum, byte| mix(sum ^ u64::from(byte))) % u64::from(WORKERS);
        let worker = u32::try_from(worker)?;
        let keys: Vec<Key> = ids.iter().map(|id| Key::from_alias(*id)).collect();
        let hashes: Vec<LocalBlockHash> = ids.iter().map(|id| LocalBlockHash(mix(*id))).collect();
        for turn in 0..2 {
            let began = Instant::now();
            if (turn + round) % 2 == 0 {
                ours.find(&keys, &mut found);
                our_finds.push(crate::nanos(began));
            } else {
                std::hint::black_box(theirs.find(&hashes));
                their_finds.push(crate::nanos(began));
            }
        }
        let held = &mut held[worker as usize];
        let new = ids.iter().position(|id| !held.contains(id)).unwrap_or(ids.len());
        held.extend(&ids[new..]);
        told += (ids.len() - new) as u64;
        let began = Instant::now();
        let mut parent = new.checked_sub(1).map(|at| keys[at]);
        for blocks in keys[new..].chunks(PER_EVENT) {
            ours.store(HolderId(worker), TierSet::HBM, parent, blocks)?;
            parent = blocks.last().copied();
        }
        our_time += began.elapsed();
        let events = stored(worker, &ids, new);
        let began = Instant::now();
        theirs.send(events);
        theirs.drain();
        their_time += began.elapsed();
    }
    for (part, permilles) in [("p50", 500), ("p99", 990)] {
        let (mine, other) = (permille(&mut our_finds, permilles), permille(&mut their_finds, permilles));
        pairs.lower(&format!("agentic_find_{part}"), mine / 1e3, other / 1e3, Some(1.0), "us");
    }
    let rate = |time: Duration| told as f64 / 1e6 / time.as_secs_f64();
    // The peer is waited for after each request, which a stream of events would not do: no bar.
    pairs.higher("agentic_store_1_threads", rate(our_time), rate(their_time), None, "Mblocks/s");
    Ok(())
}

fn stored(worker: u32, ids: &[u64], new: usize) -> Vec<crate::peer::Event> {
    let chained = |id: u64| ExternalSequenceBlockHash(mix(mix(id) ^ 1337));
    let mut parent = new.checked_sub(1).map(|at| chained(ids[at]));
    let mut events = Vec::new();
    for blocks in ids[new..].chunks(PER_EVENT) {
        let those = blocks.iter().map(|id| KvCacheStoredBlockData {
            block_hash: chained(*id),
            tokens_hash: LocalBlockHash(mix(*id)),
            mm_extra_info: None,
        });
        let data = KvCacheStoreData { parent_hash: parent, start_position: None, blocks: those.collect() };
        events.push(event(worker, KvCacheEventData::Stored(data)));
        parent = blocks.last().map(|id| chained(*id));
    }
    events
}
