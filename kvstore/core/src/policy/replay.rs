//! One tier without bytes, devices or time: what each policy would have hit. The
//! live table and the shadows use the same queues, life tables and duel.
//!
//! The model: a hit is the longest cached prefix, what is missing is computed and
//! kept, and then what ranks least leaves until the tier is within its size. So a
//! new block can be the first to leave, and a prompt never needs a free tier.

use crate::api::{Policy, UseStats};
use crate::ids::BlockId;
use crate::policy::class::{Class, Tick};
use crate::policy::duel::{Duel, Leader};
use crate::policy::ghost::Step;
use crate::policy::queues::{Facts, Links, Look, NONE, Place, Queues, Slab};
use crate::policy::s3fifo::S3Fifo;
use crate::policy::{PASTS_MIN, PASTS_REACH};
use crate::state::index::{Index, Past, tag};
use crate::units::{BlockCount, TokenCount};

/// The memory of S3-FIFO is as long as its main queue.
const S3_SMALL_PART: u32 = 10;

/// What a use saves.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Tokens of one block.
    pub block_tokens: TokenCount,
    /// Cost of computing a prompt of h tokens: `linear * h + quadratic * h^2`, in
    /// any unit. Only proportions matter to the choice.
    pub linear: f64,
    /// See `linear`.
    pub quadratic: f64,
}

impl Costs {
    /// Cost of computing a prompt of this many tokens.
    pub fn of(&self, tokens: u64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "prompts are far below 2^52 tokens")]
        let tokens = tokens as f64;
        self.linear * tokens + self.quadratic * tokens * tokens
    }

    /// Cost of computing the block at this depth when all before it are there.
    fn of_block(&self, depth: u32) -> f64 {
        let tokens = f64::from(self.block_tokens.get());
        let before = f64::from(depth);
        tokens * (self.linear + self.quadratic * tokens * (2.0 * before + 1.0))
    }
}

/// What became of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Blocks of the longest cached prefix.
    pub hits: u32,
    /// Blocks that came in.
    pub inserted: u32,
    /// Blocks that left.
    pub evicted: u32,
}

#[derive(Clone, Debug)]
struct Entry {
    block: BlockId,
    parent: u32,
    children: u32,
    used: Tick,
    links: Links,
    stats: UseStats,
}

#[derive(Clone, Debug, Default)]
struct Entries(Vec<Entry>);

impl Entries {
    fn at(&self, index: u32) -> &Entry {
        &self.0[index as usize]
    }

    fn at_mut(&mut self, index: u32) -> &mut Entry {
        &mut self.0[index as usize]
    }
}

impl Look for Entries {
    fn links(&self, index: u32) -> Links {
        self.at(index).links
    }

    fn facts(&self, index: u32) -> Facts {
        let entry = self.at(index);
        Facts { class: Class::of(entry.stats), used: entry.used, worth: 1.0 }
    }
}

impl Slab for Entries {
    fn links_mut(&mut self, index: u32) -> &mut Links {
        &mut self.at_mut(index).links
    }
}

/// A tier that is replayed.
#[derive(Clone, Debug)]
pub struct Replay {
    policy: Policy,
    capacity: u32,
    costs: Costs,
    entries: Entries,
    free: Vec<u32>,
    index: Index,
    resident: u32,
    queues: Queues,
    s3: S3Fifo,
    duel: Duel,
    tick: Tick,
    path: Vec<u32>,
}

impl Replay {
    /// An empty tier of this many blocks, at least one.
    pub fn new(policy: Policy, capacity: BlockCount, costs: Costs) -> Self {
        let blocks = capacity.get().max(1);
        let remembered = match policy {
            Policy::Duel | Policy::Learned | Policy::Lru | Policy::Fifo => {
                blocks.saturating_mul(PASTS_REACH).max(PASTS_MIN)
            }
            Policy::S3Fifo => blocks - blocks / S3_SMALL_PART,
        };
        let mut index = Index::default();
        index.remember(remembered);
        Self {
            policy,
            capacity: blocks,
            costs,
            entries: Entries::default(),
            free: Vec::new(),
            index,
            resident: 0,
            queues: Queues::default(),
            s3: S3Fifo::default(),
            duel: Duel::new(capacity),
            tick: Tick::default(),
            path: Vec::new(),
        }
    }

    /// The shadows; they follow requests under `Learned` and `Duel` only.
    pub fn duel(&self) -> &Duel {
        &self.duel
    }

    /// Blocks resident now.
    pub fn resident(&self) -> BlockCount {
        BlockCount::new(self.resident)
    }

    /// A prompt asks for its blocks, head first; each is the child of the one before it.
    pub fn request(&mut self, blocks: &[BlockId]) -> Served {
        self.tick = self.tick.next();
        let mut served = Served::default();
        self.path.clear();
        for &block in blocks {
            let Some(index) = self.find(block) else { break };
            self.path.push(index);
            served.hits += 1;
            self.use_again(index);
        }
        self.insert_missing(blocks, &mut served);
        self.enlist_path();
        if matches!(self.policy, Policy::Learned | Policy::Duel) {
            let costs = self.costs;
            let steps = blocks.iter().zip(0..).map(|(&block, depth)| Step {
                key: Step::key_of(block),
                seconds: narrow(costs.of_block(depth)),
                worth: 1.0,
            });
            self.duel.request(blocks.len() as u64, steps);
        }
        while self.resident > self.capacity {
            if !self.evict() {
                break;
            }
            served.evicted += 1;
        }
        served
    }

    fn find(&self, block: BlockId) -> Option<u32> {
        self.index.find(tag(block), |index| self.entries.at(index).block == block)
    }

    fn use_again(&mut self, index: u32) {
        match self.policy {
            Policy::Duel | Policy::Learned | Policy::Lru => {
                self.queues.unlist(&mut self.entries, index);
                let entry = self.entries.at_mut(index);
                entry.stats.uses = entry.stats.uses.saturating_add(1);
                entry.used = self.tick;
            }
            Policy::S3Fifo => self.s3.used(&mut self.entries, index),
            Policy::Fifo => {}
        }
    }

    fn insert_missing(&mut self, blocks: &[BlockId], served: &mut Served) {
        let mut known = true;
        let mut turn = match self.path.last() {
            Some(&last) => self.entries.at(last).stats.turn.saturating_add(1),
            None => 0,
        };
        for (&block, depth) in blocks.iter().zip(0..).skip(served.hits as usize) {
            let (index, past) = self.add(block);
            known &= past.is_some();
            if let Some(past) = past.filter(|_| known) {
                turn = past.turn.saturating_add(1);
            }
            let stats = match past {
                Some(past) => UseStats { depth, uses: past.uses.saturating_add(1), turn: past.turn },
                None => UseStats { depth, uses: 0, turn },
            };
            let parent = self.path.last().copied().unwrap_or(NONE);
            let entry = self.entries.at_mut(index);
            (entry.parent, entry.stats) = (parent, stats);
            if parent != NONE {
                self.entries.at_mut(parent).children += 1;
                self.unlist(parent);
            }
            if self.policy == Policy::S3Fifo {
                self.s3.enter(&mut self.entries, index, past.is_some());
            }
            self.path.push(index);
            served.inserted += 1;
        }
    }

    /// Only the last block of the path can be a leaf.
    fn enlist_path(&mut self) {
        if let Some(&last) = self.path.last()
            && self.entries.at(last).children == 0
            && !self.entries.links(last).is_listed()
        {
            self.list(last);
        }
    }

    fn list(&mut self, index: u32) {
        match self.policy {
            Policy::S3Fifo => self.s3.list(&mut self.entries, index, self.tick),
            Policy::Fifo | Policy::Duel | Policy::Learned | Policy::Lru => {
                self.queues.list(&mut self.entries, index, Place::Ordinary, self.tick);
            }
        }
    }

    fn unlist(&mut self, index: u32) {
        match self.policy {
            Policy::S3Fifo => self.s3.unlist(&mut self.entries, index),
            Policy::Fifo | Policy::Duel | Policy::Learned | Policy::Lru => {
                self.queues.unlist(&mut self.entries, index);
            }
        }
    }

    /// An entry of a block that has none, and what it had earned before.
    fn add(&mut self, block: BlockId) -> (u32, Option<Past>) {
        let links = Links::default();
        let entry =
            Entry { block, parent: NONE, children: 0, used: self.tick, links, stats: UseStats::default() };
        let index = match self.free.pop() {
            Some(index) => {
                *self.entries.at_mut(index) = entry;
                index
            }
            None => {
                self.entries.0.push(entry);
                u32::try_from(self.entries.0.len() - 1).expect("entries are bounded by the capacity")
            }
        };
        self.resident += 1;
        (index, self.index.insert(tag(block), index))
    }

    /// True if a block left.
    fn evict(&mut self) -> bool {
        let (victim, remember) = match self.policy {
            Policy::S3Fifo => match self.s3.victim(&mut self.entries, |_| false) {
                Some(leaving) => (Some(leaving.index), leaving.from_small),
                None => (None, false),
            },
            Policy::Lru | Policy::Fifo => (self.queues.coldest(&self.entries, self.tick, |_| false), false),
            Policy::Learned => (self.least(), true),
            Policy::Duel => match self.duel.leader() {
                Leader::Lru => (self.queues.coldest(&self.entries, self.tick, |_| false), true),
                Leader::Learned => (self.least(), true),
            },
        };
        let Some(victim) = victim else { return false };
        self.remove(victim, remember);
        true
    }

    fn least(&mut self) -> Option<u32> {
        self.queues.least(&self.entries, self.duel.hazards(), self.tick, |_| false)
    }

    fn remove(&mut self, index: u32, remember: bool) {
        match self.policy {
            Policy::S3Fifo => self.s3.leave(&mut self.entries, index),
            Policy::Fifo | Policy::Duel | Policy::Learned | Policy::Lru => self.unlist(index),
        }
        let Entry { block, parent, stats, .. } = *self.entries.at(index);
        let past = remember.then_some(Past { turn: stats.turn, uses: stats.uses });
        self.index.remove(tag(block), index, past);
        self.free.push(index);
        self.resident -= 1;
        if parent == NONE {
            return;
        }
        let entry = self.entries.at_mut(parent);
        entry.children -= 1;
        if entry.children == 0 {
            self.list(parent);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a cost needs no more digits")]
fn narrow(value: f64) -> f32 {
    value as f32
}
