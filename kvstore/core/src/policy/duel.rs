//! Which of LRU and the learned policy a tier follows: the one whose shadow lately
//! saved more seconds.

use crate::policy::ghost::{Ghost, Saved, Step};
use crate::policy::hazards::Hazards;
use crate::units::BlockCount;

/// What remains of the scores after each request: half after 2,800.
const KEEP: f64 = 1.0 - 1.0 / 4096.0;
/// How much better the other one has to be before the leader changes, so that the
/// live cache does not waver between two orders that are equally good.
const MARGIN: f64 = 1.005;

/// An order of eviction that the same lists serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leader {
    /// Least recently used.
    Lru,
    /// Least expected seconds saved.
    Learned,
}

/// Both shadows of one tier, and what was learned on the way.
#[derive(Clone, Debug)]
pub struct Duel {
    ghost: Ghost,
    hazards: Hazards,
    scores: Saved,
    leader: Leader,
    changes: u64,
}

impl Duel {
    /// For a tier that holds this many blocks.
    pub fn new(capacity: BlockCount) -> Self {
        Self {
            ghost: Ghost::new(capacity),
            hazards: Hazards::new(),
            scores: Saved::default(),
            leader: Leader::Lru,
            changes: 0,
        }
    }

    /// The tier holds this many blocks from now on. What was learned stays.
    pub fn resize(&mut self, capacity: BlockCount) {
        self.ghost.resize(capacity);
    }

    /// A request for a prefix of so many blocks, head first; what is missing counts as computed and kept. Blocks
    /// that [`Duel::shift`] leaves out may be missing from `steps`.
    pub fn request(&mut self, blocks: u64, steps: impl Iterator<Item = Step>) {
        let saved = self.ghost.request(blocks, steps, &mut self.hazards);
        self.scores.lru = self.scores.lru * KEEP + saved.lru;
        self.scores.learned = self.scores.learned * KEEP + saved.learned;
        let (own, other, next) = match self.leader {
            Leader::Lru => (self.scores.lru, self.scores.learned, Leader::Learned),
            Leader::Learned => (self.scores.learned, self.scores.lru, Leader::Lru),
        };
        if other > own * MARGIN {
            self.leader = next;
            self.changes += 1;
        }
    }

    /// A block is looked at only if so many leading bits of its key are zero.
    pub(crate) fn shift(&self) -> u32 {
        self.ghost.shift()
    }

    /// The order to follow now.
    pub fn leader(&self) -> Leader {
        self.leader
    }

    /// How often the leader changed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Seconds that each would have saved lately: LRU, learned.
    pub fn scores(&self) -> (f64, f64) {
        let scale = f64::from(1u32 << self.ghost.shift().min(31));
        (self.scores.lru * scale, self.scores.learned * scale)
    }

    /// What the ranks of the learned order come from.
    pub(crate) fn hazards(&self) -> &Hazards {
        &self.hazards
    }
}
