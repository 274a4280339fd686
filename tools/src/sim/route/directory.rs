//! The router's index in the simulation: the real one, fed by events that
//! arrive some time after what they tell.

use std::collections::VecDeque;

use terrace_index::{Found, HolderId, Index, Key, Limits, SizeClass, TierSet};

use crate::sim::trace::Trace;

/// Memory of the index; far more than any replay here needs.
const INDEX_BYTES: u64 = 4 << 30;

#[derive(Debug)]
struct Event {
    at: u64,
    holder: u32,
    parent: Option<u32>,
    stored: Vec<u32>,
    removed: Vec<u32>,
}

/// What the router believes about who holds what.
#[derive(Debug)]
pub(crate) struct Directory {
    index: Index,
    keys: Vec<Key>,
    delay: u64,
    events: VecDeque<Event>,
    found: Found,
    prompt: Vec<Key>,
}

impl Directory {
    /// Empty. Events arrive `delay` microseconds late.
    pub(crate) fn new(trace: &Trace, holders: u32, delay: u64) -> Self {
        let keys = trace.ids().iter().map(|id| Key::from_bytes(id.to_bytes())).collect();
        let index = Index::new(Limits { holders, bytes: INDEX_BYTES });
        Self { index, keys, delay, events: VecDeque::new(), found: Found::new(), prompt: Vec::new() }
    }

    /// A holder tells what it has from now on, and what no longer.
    pub(crate) fn tell(&mut self, now: u64, holder: u32, stored: (&[u32], usize), removed: Vec<u32>) {
        let (numbers, from) = stored;
        let parent = from.checked_sub(1).map(|last| numbers[last]);
        let stored = numbers[from..].to_vec();
        self.events.push_back(Event { at: now + self.delay, holder, parent, stored, removed });
    }

    /// Blocks of the longest prefix that each holder has, as far as the router knows now.
    pub(crate) fn find(&mut self, now: u64, numbers: &[u32]) -> &Found {
        while let Some(event) = self.events.pop_front_if(|event| event.at <= now) {
            self.apply(&event);
        }
        self.prompt.clear();
        self.prompt.extend(numbers.iter().map(|&number| self.keys[number as usize]));
        self.index.find(&self.prompt, &mut self.found);
        &self.found
    }

    fn apply(&self, event: &Event) {
        let keys = |numbers: &[u32]| numbers.iter().map(|&n| self.keys[n as usize]).collect::<Vec<_>>();
        let holder = HolderId(event.holder);
        let parent = event.parent.map(|number| self.keys[number as usize]);
        let (tiers, blocks) = (TierSet::PINNED, keys(&event.stored));
        let stored = match parent {
            Some(_) => self.index.store(holder, tiers, parent, &blocks),
            None => self.index.changes().store_start(holder, tiers, SizeClass::UNKNOWN, &blocks),
        };
        let removed = self.index.remove(holder, TierSet::PINNED, &keys(&event.removed));
        stored.and(removed).expect("holders are numbered below the limit that the index was made with");
    }
}
