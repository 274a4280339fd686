//! S3-FIFO: a small queue through which new blocks pass, a main queue for those
//! that were used in it or come back soon after, and a memory of who left the small one.

use crate::policy::class::Tick;
use crate::policy::queues::{Queues, Slab};

/// The small queue's share of all blocks.
const SMALL_PART: u32 = 10;
/// Uses in the small queue that earn a place in the main one.
const PROMOTE_USES: u8 = 1;
/// Uses that are counted at most.
const USES_MAX: u8 = 3;
/// Blocks that are moved on before one is evicted at the latest.
const MOVES_MAX: u32 = 64;

/// The lists of the two queues in [`Queues`].
const SMALL: u8 = 1;
const MAIN: u8 = 2;
/// Bit of a block's mark: it belongs to the main queue. The rest counts uses.
const IN_MAIN: u8 = 0x80;

/// Who leaves, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaving {
    pub(crate) index: u32,
    /// It was used too little in the small queue: to be remembered.
    pub(crate) from_small: bool,
}

/// Both queues. Every resident block belongs to one of them; only leaves are listed,
/// in order of entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct S3Fifo {
    queues: Queues,
    small: u32,
    main: u32,
}

impl S3Fifo {
    /// A new block; `remembered` says that it left the small queue not long ago.
    pub(crate) fn enter(&mut self, slab: &mut impl Slab, index: u32, remembered: bool) {
        slab.links_mut(index).mark = if remembered { IN_MAIN } else { 0 };
        *(if remembered { &mut self.main } else { &mut self.small }) += 1;
    }

    /// It was used.
    pub(crate) fn used(&self, slab: &mut impl Slab, index: u32) {
        let links = slab.links_mut(index);
        let uses = (links.mark & !IN_MAIN) + 1;
        links.mark = (links.mark & IN_MAIN) | uses.min(USES_MAX);
    }

    /// It is a leaf from now on.
    pub(crate) fn list(&mut self, slab: &mut impl Slab, index: u32, now: Tick) {
        let list = if slab.links(index).mark & IN_MAIN == 0 { SMALL } else { MAIN };
        self.queues.list_in(slab, index, list, now);
    }

    /// It is no leaf any more.
    pub(crate) fn unlist(&mut self, slab: &mut impl Slab, index: u32) {
        self.queues.unlist(slab, index);
    }

    /// It is gone.
    pub(crate) fn leave(&mut self, slab: &mut impl Slab, index: u32) {
        self.queues.unlist(slab, index);
        let in_main = slab.links(index).mark & IN_MAIN != 0;
        *(if in_main { &mut self.main } else { &mut self.small }) -= 1;
    }

    /// Who goes next. Moves blocks that earned it on, up to a bounded number; after
    /// these the next block goes whatever it earned.
    pub(crate) fn victim(&mut self, slab: &mut impl Slab, busy: impl Fn(u32) -> bool) -> Option<Leaving> {
        for moves in 0..=MOVES_MAX {
            let crowded = self.small * SMALL_PART > self.small + self.main;
            let small = self.queues.cold_end(slab, SMALL, &busy);
            let main = self.queues.cold_end(slab, MAIN, &busy);
            let (index, from_small) = match (small, main) {
                (Some(small), None) => (small, true),
                (Some(small), Some(_)) if crowded => (small, true),
                (_, Some(main)) => (main, false),
                (None, None) => return None,
            };
            let uses = slab.links(index).mark & !IN_MAIN;
            let earned = if from_small { uses >= PROMOTE_USES } else { uses > 0 };
            if !earned || moves == MOVES_MAX {
                return Some(Leaving { index, from_small });
            }
            self.leave(slab, index);
            self.main += 1;
            slab.links_mut(index).mark = IN_MAIN | if from_small { 0 } else { uses - 1 };
            self.queues.push(slab, index, MAIN);
        }
        None
    }
}
