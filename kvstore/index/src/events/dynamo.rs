//! Dynamo's `RouterEvent`: one map, or a list of them.
//!
//! Only the form with named fields is read; the one by position differs between its versions.

use super::engine::{hash, hashes, list, optional, reader_of, small, text, unknown, unsigned};
use super::msgpack::{Reader, Skipped, Value};
use super::{BLOCKS_MAX, BadEvents, Content, EVENTS_MAX, Event, Identity, Stored};
use crate::ids::TierSet;

/// Longest id of a cache owner.
const OWNER_BYTES_MAX: usize = 1024;

/// An event, and who it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterEvent {
    /// The worker that tells.
    pub worker: u64,
    /// Its rank among data-parallel ones.
    pub rank: u32,
    /// Numbers the events of a worker and rank.
    pub number: u64,
    /// Whose the blocks are.
    pub domain: Domain,
    /// What happened.
    pub event: Event,
}

/// Whose blocks an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Domain {
    /// Not said: the worker's; and of [`Event::Cleared`], everybody's that this worker tells of.
    Unsaid,
    /// The worker's own.
    Worker,
    /// A pool's that outlives the worker.
    CacheOwner {
        /// Its id as it was encoded: equal bytes, equal owner. None if it has no name.
        id: Option<Vec<u8>>,
    },
}

/// Reads one event, or a list of events.
///
/// # Errors
/// Says what is wrong with the bytes, and where.
pub fn decode_dynamo(bytes: &[u8]) -> Result<Vec<RouterEvent>, BadEvents> {
    let mut reader = reader_of(bytes)?;
    let count = match reader.peek()? {
        Value::List(_) => list(&mut reader, "events", EVENTS_MAX)?,
        _ => 1,
    };
    let mut events = Vec::new();
    for _ in 0..count {
        events.push(router_event(&mut reader)?);
    }
    reader.end()?;
    Ok(events)
}

fn router_event(reader: &mut Reader<'_>) -> Result<RouterEvent, BadEvents> {
    let (mut worker, mut inner, mut owner) = (None, None, None);
    let (mut tiers, mut domain) = (TierSet::HBM, Domain::Unsaid);
    for _ in 0..map(reader, "a router event")? {
        match text(reader)? {
            b"worker_id" => worker = Some(unsigned(reader)?),
            b"storage_tier" => tiers = tier(reader)?,
            b"residency_domain" => domain = residency(reader)?,
            b"event" => inner = Some(cache_event(reader)?),
            b"state_source" => owner = optional(reader, owner_id)?,
            _ => {
                reader.skip()?;
            }
        }
    }
    let missing = |field| BadEvents::Missing { at: reader.at(), field };
    let Inner { number, rank, event } = inner.ok_or(missing("event"))?;
    // The tier may come after the event.
    let event = match event {
        Event::Stored(stored) => Event::Stored(Stored { tiers, ..stored }),
        Event::Removed { blocks, tiers: _, group } => Event::Removed { blocks, tiers, group },
        Event::Cleared => Event::Cleared,
    };
    let domain = match domain {
        Domain::CacheOwner { id: _ } => Domain::CacheOwner { id: owner },
        Domain::Worker => Domain::Worker,
        Domain::Unsaid => Domain::Unsaid,
    };
    Ok(RouterEvent { worker: worker.ok_or(missing("worker_id"))?, rank, number, domain, event })
}

struct Inner {
    number: u64,
    rank: u32,
    event: Event,
}

fn cache_event(reader: &mut Reader<'_>) -> Result<Inner, BadEvents> {
    let (mut number, mut rank, mut event) = (None, 0, None);
    for _ in 0..map(reader, "a cache event")? {
        match text(reader)? {
            b"event_id" => number = Some(unsigned(reader)?),
            b"dp_rank" => rank = small(reader)?,
            b"data" => event = Some(data(reader)?),
            _ => {
                reader.skip()?;
            }
        }
    }
    let missing = |field| BadEvents::Missing { at: reader.at(), field };
    Ok(Inner { number: number.ok_or(missing("event_id"))?, rank, event: event.ok_or(missing("data"))? })
}

/// `"cleared"`, or a map of one pair.
fn data(reader: &mut Reader<'_>) -> Result<Event, BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::Text(b"cleared") => Ok(Event::Cleared),
        Value::Text(other) => Err(unknown(at, "the event", other)),
        Value::Map(1) => {
            let at = reader.at();
            match text(reader)? {
                b"stored" => stored(reader).map(Event::Stored),
                b"removed" => removed(reader),
                b"cleared" => reader.skip().map(|_| Event::Cleared),
                other => Err(unknown(at, "the event", other)),
            }
        }
        _ => Err(BadEvents::Kind { at, wanted: "what happened" }),
    }
}

fn removed(reader: &mut Reader<'_>) -> Result<Event, BadEvents> {
    let mut blocks = None;
    for _ in 0..map(reader, "what was removed")? {
        match text(reader)? {
            b"block_hashes" => blocks = Some(hashes(reader)?),
            _ => {
                reader.skip()?;
            }
        }
    }
    let blocks = blocks.ok_or(BadEvents::Missing { at: reader.at(), field: "block_hashes" })?;
    Ok(Event::Removed { blocks, tiers: TierSet::NONE, group: None })
}

fn stored(reader: &mut Reader<'_>) -> Result<Stored, BadEvents> {
    let (mut parent, mut found) = (None, None);
    for _ in 0..map(reader, "what was stored")? {
        match text(reader)? {
            b"parent_hash" => parent = optional(reader, hash)?,
            b"blocks" => found = Some(blocks(reader)?),
            _ => {
                reader.skip()?;
            }
        }
    }
    let found = found.ok_or(BadEvents::Missing { at: reader.at(), field: "blocks" })?;
    Ok(Stored { parent, ..found })
}

/// The blocks of an event; parent and tier are the caller's to fill in.
fn blocks(reader: &mut Reader<'_>) -> Result<Stored, BadEvents> {
    let count = list(reader, "blocks", BLOCKS_MAX)?;
    let (mut blocks, mut inside) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let mut identity = Identity::Tokens;
    for _ in 0..count {
        let (mut name, mut tokens) = (None, None);
        for _ in 0..map(reader, "a block")? {
            match text(reader)? {
                b"block_hash" => name = Some(hash(reader)?),
                b"tokens_hash" => tokens = Some(hash(reader)?),
                b"mm_extra_info" => {
                    if reader.skip()? == Skipped::Something {
                        identity = Identity::MoreThanTokens;
                    }
                }
                _ => {
                    reader.skip()?;
                }
            }
        }
        let missing = |field| BadEvents::Missing { at: reader.at(), field };
        blocks.push(name.ok_or(missing("block_hash"))?);
        inside.push(tokens.ok_or(missing("tokens_hash"))?);
    }
    Ok(Stored {
        parent: None,
        blocks,
        content: Content::Hashes(inside),
        block_size: 0,
        tiers: TierSet::NONE,
        group: None,
        identity,
    })
}

fn tier(reader: &mut Reader<'_>) -> Result<TierSet, BadEvents> {
    let at = reader.at();
    match text(reader)? {
        b"device" => Ok(TierSet::HBM),
        b"host_pinned" => Ok(TierSet::PINNED),
        b"disk" | b"external" => Ok(TierSet::NVME),
        other => Err(unknown(at, "the tier", other)),
    }
}

fn residency(reader: &mut Reader<'_>) -> Result<Domain, BadEvents> {
    let at = reader.at();
    match text(reader)? {
        b"worker" => Ok(Domain::Worker),
        b"cache_owner" => Ok(Domain::CacheOwner { id: None }),
        other => Err(unknown(at, "the domain", other)),
    }
}

fn owner_id(reader: &mut Reader<'_>) -> Result<Vec<u8>, BadEvents> {
    let at = reader.at();
    reader.skip()?;
    let id = reader.since(at);
    if id.len() > OWNER_BYTES_MAX {
        return Err(BadEvents::TooMany { at, what: "bytes of an owner's id", limit: OWNER_BYTES_MAX });
    }
    Ok(id.to_vec())
}

fn map(reader: &mut Reader<'_>, wanted: &'static str) -> Result<usize, BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::Map(pairs) => Ok(pairs),
        _ => Err(BadEvents::Kind { at, wanted }),
    }
}
