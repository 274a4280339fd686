//! What workers of Dynamo post: `RouterEvent`s, one holder for each worker and rank, and one for each pool
//! that several of them tell of.
//!
//! Events of a worker and rank are numbered. What was taken before is passed over;
//! what is missing was never sent to us, so it is counted and the rest applied.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terrace_index::events::{Domain, Event, RouterEvent};

use super::holders::{Holder, Holders};
use super::publisher::apply;
use super::spec::Hash;

/// Most workers and ranks whose numbers are remembered.
const STREAMS_MAX: usize = 4096;
/// Most ways of naming blocks.
const WAYS_MAX: usize = 8;

/// Whose blocks they are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Worker(u64, u32),
    /// Its id, as it was encoded.
    Pool(Vec<u8>),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Posted {
    holders: Arc<Holders>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// With the worker that told last.
    owners: BTreeMap<Owner, (u64, Holder)>,
    /// The number that comes next of each worker and rank.
    next: BTreeMap<(u64, u32), u64>,
    ways: Vec<(Hash, u32)>,
}

/// What became of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) applied: u64,
    pub(crate) repeated: u64,
    pub(crate) gaps: u64,
    /// Of a pool without a name.
    pub(crate) ignored: u64,
}

/// There is no place for another worker. The events before it were applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Posted {
    pub(super) fn new(holders: Arc<Holders>) -> Self {
        Self { holders, state: Mutex::default() }
    }

    /// How posted blocks are named, as far as it was said.
    pub(super) fn ways(&self) -> Vec<(Hash, u32)> {
        self.lock().ways.clone()
    }

    /// Takes events whose blocks have this many tokens and are named so.
    pub(crate) fn take(&self, events: &[RouterEvent], way: (Hash, u32)) -> Result<Tally, TooMany> {
        let mut state = self.lock();
        if !state.ways.contains(&way) {
            if state.ways.len() == WAYS_MAX {
                return Err(TooMany);
            }
            state.ways.push(way);
        }
        let mut tally = Tally::default();
        for event in events {
            self.take_one(&mut state, event, &mut tally)?;
        }
        Ok(tally)
    }

    fn take_one(&self, state: &mut State, event: &RouterEvent, tally: &mut Tally) -> Result<(), TooMany> {
        let stream = (event.worker, event.rank);
        let (owner, name) = match &event.domain {
            Domain::Unsaid | Domain::Worker => {
                let (worker, rank) = stream;
                (Owner::Worker(worker, rank), format!("dynamo/{worker}#{rank}"))
            }
            Domain::CacheOwner { id: Some(id) } => {
                let shown = short(id);
                (Owner::Pool(id.clone()), format!("dynamo/owner/{shown}"))
            }
            Domain::CacheOwner { id: None } => {
                tally.ignored += 1;
                return Ok(());
            }
        };
        let next = state.next.get(&stream).copied();
        if next.is_some_and(|next| event.number < next) {
            tally.repeated += 1;
            return Ok(());
        }
        if next.is_none() && state.next.len() == STREAMS_MAX {
            return Err(TooMany);
        }
        if !state.owners.contains_key(&owner) {
            let holder = self.holders.take(name).ok_or(TooMany)?;
            state.owners.insert(owner.clone(), (event.worker, holder));
        }
        tally.gaps += u64::from(next.is_some_and(|next| event.number > next));
        state.next.insert(stream, event.number.saturating_add(1));
        tally.applied += 1;
        if event.event == Event::Cleared && event.domain == Domain::Unsaid {
            // Of everything that this worker tells of.
            let told = state.owners.iter().filter(|(owner, (teller, _))| match owner {
                Owner::Worker(worker, rank) => (*worker, *rank) == stream,
                Owner::Pool(_) => *teller == event.worker,
            });
            told.for_each(|(_, (_, holder))| holder.forget());
            return Ok(());
        }
        let (teller, holder) = state.owners.get_mut(&owner).expect("it was just put there");
        *teller = event.worker;
        apply(&self.holders, holder, std::slice::from_ref(&event.event));
        Ok(())
    }

    /// A worker is gone, with all its ranks. Pools outlive it. Whether it was known.
    pub(crate) fn remove(&self, worker: u64) -> bool {
        let mut state = self.lock();
        let before = state.owners.len();
        state.owners.retain(|owner, _| !matches!(owner, Owner::Worker(of, _) if *of == worker));
        state.next.retain(|(of, _), _| *of != worker);
        state.owners.len() < before
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in the middle of an event leaves it half applied, which costs a miss.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A short name for an id of any form.
fn short(id: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use terrace_index::events::{Content, Identity, Stored};
    use terrace_index::{Found, Index, Key, Limits, TierSet};

    use super::*;
    use crate::engines::ENGINE_HOLDERS_MAX;
    use crate::names::Names;

    fn event(worker: u64, number: u64, domain: Domain, blocks: &[u64]) -> RouterEvent {
        let stored = Stored {
            parent: None,
            blocks: blocks.to_vec(),
            content: Content::Unknown,
            block_size: 0,
            tiers: TierSet::NVME,
            group: None,
            identity: Identity::Tokens,
        };
        RouterEvent { worker, rank: 0, number, domain, event: Event::Stored(stored) }
    }

    fn holders(posted: &Posted, block: u64) -> usize {
        let mut found = Found::new();
        posted.holders.index().find(&[Key::from_alias(block)], &mut found);
        found.holders().len()
    }

    /// Events that come twice or after a hole, pools that outlive who told of them, and workers that go: each must
    /// leave in the index what is still true.
    #[test]
    fn workers_and_pools_are_told_apart() {
        let index = Arc::new(Index::new(Limits { holders: ENGINE_HOLDERS_MAX, bytes: 4 << 20 }));
        let posted = Posted::new(Arc::new(Holders::new(index, 0, Arc::new(Names::new(0)))));
        let pool = || Domain::CacheOwner { id: Some(b"pool".to_vec()) };
        let events = [
            event(1, 0, Domain::Worker, &[1]),
            event(1, 0, Domain::Worker, &[2]),
            event(1, 3, pool(), &[1]),
            event(2, 9, Domain::Unsaid, &[1]),
            event(2, 10, Domain::CacheOwner { id: None }, &[1]),
        ];
        let tally = posted.take(&events, (Hash::Dynamo, 16)).unwrap();
        assert_eq!(tally, Tally { applied: 3, repeated: 1, gaps: 1, ignored: 1 });
        assert_eq!((holders(&posted, 1), holders(&posted, 2)), (3, 0));
        assert!(posted.remove(1) && !posted.remove(1), "once");
        assert_eq!(holders(&posted, 1), 2, "the pool outlives the worker");
        let cleared = RouterEvent { event: Event::Cleared, ..event(1, 0, Domain::Unsaid, &[]) };
        posted.take(&[cleared], (Hash::Dynamo, 16)).unwrap();
        assert_eq!(holders(&posted, 1), 1, "who told of the pool cleared everything");
        assert_eq!(posted.ways(), [(Hash::Dynamo, 16)]);
        for block in 1..8 {
            posted.take(&[], (Hash::Dynamo, block)).unwrap();
        }
        assert_eq!(posted.take(&[], (Hash::Dynamo, 99)), Err(TooMany));
    }
}
