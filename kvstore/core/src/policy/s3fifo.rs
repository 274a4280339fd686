//! S3-FIFO: a small queue through which new blocks pass, a main queue for those
//! that were used in it or come back soon after, and a memory of who left the small one.

use crate::policy::queues::{Queues, Slab};

/// The small queue's share of all blocks.
const SMALL_PART: u32 = 10;
/// Uses in the small queue that earn a place in the main one.
const PROMOTE_USES: u8 = 1;
/// Uses that are counted at most.
const MARK_MAX: u8 = 3;
/// Blocks that are moved on before one is evicted at the latest.
const MOVES_MAX: u32 = 64;

/// The lists of the two queues in [`Queues`].
const SMALL: u8 = 1;
const MAIN: u8 = 2;

/// Who leaves, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaving {
    pub(crate) index: u32,
    /// It was used too little in the small queue: to be remembered.
    pub(crate) from_small: bool,
}

/// Both queues; every resident block is in one of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct S3Fifo {
    queues: Queues,
    small: u32,
    main: u32,
}

impl S3Fifo {
    /// A new block; `remembered` says that it left the small queue not long ago.
    pub(crate) fn insert(&mut self, slab: &mut impl Slab, index: u32, remembered: bool) {
        slab.links_mut(index).mark = 0;
        let list = if remembered { MAIN } else { SMALL };
        self.push(slab, index, list);
    }

    /// It was used.
    pub(crate) fn used(&self, slab: &mut impl Slab, index: u32) {
        let links = slab.links_mut(index);
        links.mark = (links.mark + 1).min(MARK_MAX);
    }

    /// Takes a block out, if it is in.
    pub(crate) fn remove(&mut self, slab: &mut impl Slab, index: u32) {
        match slab.links(index).list() {
            Some(SMALL) => self.small -= 1,
            Some(_) => self.main -= 1,
            None => return,
        }
        self.queues.unlist(slab, index);
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
            let mark = slab.links(index).mark;
            let earned = if from_small { mark >= PROMOTE_USES } else { mark > 0 };
            if !earned || moves == MOVES_MAX {
                return Some(Leaving { index, from_small });
            }
            self.remove(slab, index);
            slab.links_mut(index).mark = if from_small { 0 } else { mark - 1 };
            self.push(slab, index, MAIN);
        }
        None
    }

    fn push(&mut self, slab: &mut impl Slab, index: u32, list: u8) {
        *(if list == SMALL { &mut self.small } else { &mut self.main }) += 1;
        self.queues.push(slab, index, list);
    }
}
