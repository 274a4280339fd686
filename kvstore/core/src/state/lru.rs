//! Recency lists threaded through the residency table: O(1) to touch, to add
//! and to remove. The hot end is the most recently used.

use crate::state::block::{Block, BlockIndex, BlockTable};

/// A block's place in the list of one tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Links {
    hotter: Option<BlockIndex>,
    colder: Option<BlockIndex>,
    listed: Option<Rank>,
}

impl Links {
    /// Is it in a list?
    pub(crate) fn is_listed(self) -> bool {
        self.listed.is_some()
    }

    /// In which of the tier's lists it is.
    pub(crate) fn rank(self) -> Option<Rank> {
        self.listed
    }
}

/// Which of a tier's lists: retained blocks are evicted last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rank {
    Ordinary,
    Retained,
}

/// Which tier's links a list uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    Pinned,
    Nvme,
}

/// How far a block that becomes a leaf again looks for its place.
const PLACE_STEPS_MAX: usize = 64;

/// One list.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct List {
    hottest: Option<BlockIndex>,
    coldest: Option<BlockIndex>,
}

/// Both lists of one tier of one space.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lists {
    ordinary: List,
    retained: List,
}

fn links(block: &mut Block, tier: Tier) -> &mut Links {
    match tier {
        Tier::Pinned => &mut block.lru_pinned,
        Tier::Nvme => &mut block.lru_nvme,
    }
}

fn links_of(block: &Block, tier: Tier) -> Links {
    match tier {
        Tier::Pinned => block.lru_pinned,
        Tier::Nvme => block.lru_nvme,
    }
}

impl Lists {
    fn list(&mut self, rank: Rank) -> &mut List {
        match rank {
            Rank::Ordinary => &mut self.ordinary,
            Rank::Retained => &mut self.retained,
        }
    }

    /// Puts an unlisted block at the hot end.
    pub(crate) fn push(&mut self, blocks: &mut BlockTable, tier: Tier, index: BlockIndex, rank: Rank) {
        let list = self.list(rank);
        let own = links(blocks.at_mut(index), tier);
        assert!(own.listed.is_none(), "a block is in at most one list of a tier");
        *own = Links { hotter: None, colder: list.hottest, listed: Some(rank) };
        match list.hottest {
            Some(old) => links(blocks.at_mut(old), tier).hotter = Some(index),
            None => list.coldest = Some(index),
        }
        list.hottest = Some(index);
    }

    /// Puts an unlisted block where its last use says: near the cold end, where
    /// a parent belongs whose last child has just been evicted, else at the hot end.
    pub(crate) fn place(&mut self, blocks: &mut BlockTable, tier: Tier, index: BlockIndex, rank: Rank) {
        let touched = blocks.at(index).touched;
        let hotter = walk(*self.list(rank), blocks, tier)
            .take(PLACE_STEPS_MAX)
            .find(|&other| blocks.at(other).touched >= touched);
        let Some(hotter) = hotter else { return self.push(blocks, tier, index, rank) };
        let colder = links_of(blocks.at(hotter), tier).colder;
        let own = links(blocks.at_mut(index), tier);
        assert!(own.listed.is_none(), "a block is in at most one list of a tier");
        *own = Links { hotter: Some(hotter), colder, listed: Some(rank) };
        links(blocks.at_mut(hotter), tier).colder = Some(index);
        match colder {
            Some(other) => links(blocks.at_mut(other), tier).hotter = Some(index),
            None => self.list(rank).coldest = Some(index),
        }
    }

    /// Takes a listed block out.
    pub(crate) fn remove(&mut self, blocks: &mut BlockTable, tier: Tier, index: BlockIndex) {
        let own = std::mem::take(links(blocks.at_mut(index), tier));
        let rank = own.listed.expect("only a listed block is taken out of a list");
        let list = self.list(rank);
        match own.hotter {
            Some(other) => links(blocks.at_mut(other), tier).colder = own.colder,
            None => list.hottest = own.colder,
        }
        match own.colder {
            Some(other) => links(blocks.at_mut(other), tier).hotter = own.hotter,
            None => list.coldest = own.hotter,
        }
    }

    /// From the coldest to the hottest, retained blocks after all others.
    pub(crate) fn coldest_first<'a>(
        &self,
        blocks: &'a BlockTable,
        tier: Tier,
    ) -> impl Iterator<Item = BlockIndex> + 'a {
        walk(self.ordinary, blocks, tier).chain(walk(self.retained, blocks, tier))
    }
}

fn walk(list: List, blocks: &BlockTable, tier: Tier) -> impl Iterator<Item = BlockIndex> + '_ {
    std::iter::successors(list.coldest, move |&index| links_of(blocks.at(index), tier).hotter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BlockId;
    use crate::state::space::SpaceIndex;
    use crate::units::Now;

    /// Links could be lost when a block leaves the middle or an end of its list.
    #[test]
    fn the_order_is_that_of_use_with_retained_blocks_last() {
        let mut blocks = BlockTable::default();
        let mut lists = Lists::default();
        let all: Vec<BlockIndex> = (0..6)
            .map(|n| blocks.find_or_insert(BlockId::from_bytes([n; 16]), SpaceIndex(0), Now::default()))
            .collect();
        for (n, &index) in all.iter().enumerate() {
            let rank = if n == 0 { Rank::Retained } else { Rank::Ordinary };
            lists.push(&mut blocks, Tier::Pinned, index, rank);
        }
        for gone in [1, 3, 5] {
            lists.remove(&mut blocks, Tier::Pinned, all[gone]);
        }
        lists.push(&mut blocks, Tier::Pinned, all[1], Rank::Ordinary);
        let order: Vec<BlockIndex> = lists.coldest_first(&blocks, Tier::Pinned).collect();
        assert_eq!(order, [all[2], all[4], all[1], all[0]]);
    }
}
