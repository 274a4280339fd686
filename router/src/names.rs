//! Names of blocks: what other routers call them, and what our daemons do.
//!
//! A block is known once its tokens were seen, in a prompt of ours or in an event of an
//! engine. It is found by Dynamo's sequence hash, or by the number that an engine's
//! events gave it. Another router's hashes are of 64 bits: a number that stands for
//! two blocks stands for none from then on.
//!
//! Promises: at most so many blocks as were allowed; the oldest are forgotten first. A
//! name says which bytes a router means, and never what is served.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terrace_core::chain_key;
use terrace_index::events::{Content, Identity, Stored};
use terrace_index::hashes::{DYNAMO_SEED, VLLM_SEED, VllmHash, dynamo_next, sglang_next, vllm_next};

use crate::index::Named;

/// What is known of one block.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Dynamo's sequence hash.
    pub(crate) hash: u64,
    /// That of the block before; none where a prompt begins.
    pub(crate) parent: Option<u64>,
    /// Dynamo's hash of its tokens alone.
    pub(crate) local: u64,
    /// Its tokens.
    pub(crate) tokens: Box<[u32]>,
    /// What our spaces' engines call it.
    pub(crate) named: Named,
}

/// All blocks with names.
#[derive(Debug)]
pub(crate) struct Names {
    blocks_max: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    blocks: BTreeMap<u64, Arc<Block>>,
    /// Engines' numbers. None for one that stood for two blocks.
    numbers: BTreeMap<u64, Option<u64>>,
    /// Blocks and numbers in the order in which they came.
    order: VecDeque<(u64, Option<u64>)>,
    /// Counts what was added, so that others see that there is something new.
    version: u64,
}

impl Names {
    /// Room for so many blocks; with none, nothing is learned.
    pub(crate) fn new(blocks_max: usize) -> Self {
        Self { blocks_max, table: Mutex::default() }
    }

    /// Learns the whole blocks of a prompt.
    pub(crate) fn learn_prompt(&self, tokens: &[u32], block_tokens: u32) {
        if self.blocks_max == 0 || block_tokens == 0 {
            return;
        }
        let mut before: Option<Arc<Block>> = None;
        for tokens in tokens.chunks_exact(block_tokens as usize) {
            let (hash, local) = hashes(before.as_deref(), tokens);
            let known = self.lock().blocks.get(&hash).cloned();
            before = Some(
                known.unwrap_or_else(|| self.add(block(before.as_deref(), (hash, local), tokens), None)),
            );
        }
    }

    /// Learns the blocks of an event. False if they cannot be told by their tokens, or if what is before them is
    /// not known.
    pub(crate) fn learn_event(&self, stored: &Stored) -> bool {
        let Content::Tokens(tokens) = &stored.content else { return false };
        if self.blocks_max == 0 || stored.identity != Identity::Tokens || stored.block_size == 0 {
            return false;
        }
        let mut before = match stored.parent {
            None => None,
            Some(parent) => match self.find(parent) {
                Some(parent) => Some(parent),
                None => return false,
            },
        };
        for (tokens, number) in tokens.chunks_exact(stored.block_size as usize).zip(&stored.blocks) {
            let found = hashes(before.as_deref(), tokens);
            before = Some(self.add(block(before.as_deref(), found, tokens), Some(*number)));
        }
        true
    }

    /// The block of a sequence hash or of an engine's number.
    pub(crate) fn find(&self, hash: u64) -> Option<Arc<Block>> {
        let table = self.lock();
        let found = table.blocks.get(&hash);
        found.or_else(|| table.blocks.get(&(*table.numbers.get(&hash)?)?)).cloned()
    }

    /// Every block, those that came first in front, and the version of the list.
    pub(crate) fn all(&self) -> (Vec<Arc<Block>>, u64) {
        let table = self.lock();
        let known = table.order.iter().filter(|(_, number)| number.is_none());
        let blocks = known.filter_map(|(hash, _)| table.blocks.get(hash).cloned()).collect();
        (blocks, table.version)
    }

    /// Changes whenever a block is added or forgotten.
    pub(crate) fn version(&self) -> u64 {
        self.lock().version
    }

    fn add(&self, block: Block, number: Option<u64>) -> Arc<Block> {
        let mut table = self.lock();
        let hash = block.hash;
        let block = match table.blocks.get(&hash) {
            // Another block with this hash: both were found by it, so the older one stays.
            Some(known) => Arc::clone(known),
            None => {
                let block = Arc::new(block);
                table.blocks.insert(hash, Arc::clone(&block));
                table.order.push_back((hash, None));
                table.version += 1;
                block
            }
        };
        if let Some(number) = number.filter(|number| *number != hash) {
            match table.numbers.get_mut(&number) {
                Some(known) if *known != Some(hash) => *known = None,
                Some(_) => {}
                None => {
                    table.numbers.insert(number, Some(hash));
                    table.order.push_back((hash, Some(number)));
                }
            }
        }
        while table.order.len() > self.blocks_max * 2 || table.blocks.len() > self.blocks_max {
            let Some((hash, number)) = table.order.pop_front() else { break };
            match number {
                None => drop(table.blocks.remove(&hash)),
                Some(number) => drop(table.numbers.remove(&number)),
            }
            table.version += 1;
        }
        block
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // A panic in the middle of a change would leave a number without its block, which is not found.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Dynamo's sequence hash of a block, and that of its tokens alone.
fn hashes(before: Option<&Block>, tokens: &[u32]) -> (u64, u64) {
    dynamo_next(DYNAMO_SEED, before.map(|before| before.hash), tokens)
}

fn block(before: Option<&Block>, (hash, local): (u64, u64), tokens: &[u32]) -> Block {
    let chain = chain_key(&before.map_or([0; 16], |before| before.named.chain), tokens);
    let vllm = vllm_next(VllmHash::Sha256, VLLM_SEED, before.map(|before| &before.named.vllm[..]), tokens);
    let vllm = vllm.try_into().expect("SHA-256 has 32 bytes");
    let sglang = sglang_next(before.map(|before| &before.named.sglang), tokens);
    Block {
        hash,
        parent: before.map(|before| before.hash),
        local,
        tokens: tokens.into(),
        named: Named { chain, vllm, sglang },
    }
}

#[cfg(test)]
mod tests {
    use terrace_index::TierSet;
    use terrace_index::hashes::{dynamo, vllm, vllm_event_number};

    use super::*;
    use crate::index::names as named;

    fn stored(parent: Option<u64>, blocks: &[u64], tokens: &[u32]) -> Stored {
        Stored {
            parent,
            blocks: blocks.to_vec(),
            content: Content::Tokens(tokens.to_vec()),
            block_size: 16,
            tiers: TierSet::HBM,
            group: None,
            identity: Identity::Tokens,
        }
    }

    /// A name that is computed otherwise than a whole prompt's would never be found: what is learned block by block,
    /// from a prompt and from events in pieces, must equal the hashes of the whole.
    #[test]
    fn blocks_are_named_as_whole_prompts_are() {
        let tokens: Vec<u32> = (0..70).collect();
        let expected: Vec<u64> = dynamo(DYNAMO_SEED, &tokens, 16);
        let numbers: Vec<u64> = vllm(VllmHash::Sha256, VLLM_SEED, None, &tokens, 16)
            .iter()
            .map(|hash| vllm_event_number(hash))
            .collect();
        let from_prompt = Names::new(100);
        from_prompt.learn_prompt(&tokens, 16);
        let from_events = Names::new(100);
        assert!(from_events.learn_event(&stored(None, &numbers[..1], &tokens[..16])));
        assert!(from_events.learn_event(&stored(Some(numbers[0]), &numbers[1..4], &tokens[16..64])));
        assert!(!from_events.learn_event(&stored(Some(99), &[7], &tokens[..16])), "its parent is unknown");
        for names in [&from_prompt, &from_events] {
            let (all, version) = names.all();
            assert_eq!(all.iter().map(|block| block.hash).collect::<Vec<_>>(), expected);
            assert_eq!(all.iter().map(|block| block.named).collect::<Vec<_>>(), named(&tokens, 16));
            assert_eq!(version, 4);
            assert_eq!((all[0].parent, all[1].parent), (None, Some(expected[0])));
        }
        assert_eq!(from_events.find(numbers[3]), from_events.find(expected[3]));
        assert_eq!(from_events.find(numbers[3]).unwrap().hash, expected[3]);
        assert_eq!(from_prompt.find(numbers[3]), None, "no engine has told of it");
    }

    /// Two blocks of one number would make one router's hit another's: a number that was given to two blocks names
    /// neither, and what would follow it is not learned.
    #[test]
    fn a_number_of_two_blocks_names_none() {
        let names = Names::new(100);
        let (one, two): (Vec<u32>, Vec<u32>) = ((0..16).collect(), (100..116).collect());
        assert!(names.learn_event(&stored(None, &[7], &one)));
        assert!(names.find(7).is_some());
        assert!(names.learn_event(&stored(None, &[7], &one)), "again");
        assert!(names.find(7).is_some());
        assert!(names.learn_event(&stored(None, &[7], &two)));
        assert_eq!(names.find(7), None);
        assert!(!names.learn_event(&stored(Some(7), &[8], &one)));
        let salted = Stored { identity: Identity::MoreThanTokens, ..stored(None, &[9], &one) };
        assert!(!names.learn_event(&salted), "its tokens do not say what it is");
    }

    /// Prompts without end would take memory without end: the oldest blocks go, numbers with them.
    #[test]
    fn the_oldest_blocks_are_forgotten() {
        let names = Names::new(10);
        for first in 0..1000u32 {
            let tokens: Vec<u32> = (first * 16..first * 16 + 16).collect();
            assert!(names.learn_event(&stored(None, &[u64::from(first)], &tokens)));
        }
        let table = names.lock();
        assert!(table.blocks.len() <= 10 && table.numbers.len() <= 20 && table.order.len() <= 20);
        drop(table);
        assert!(names.find(999).is_some() && names.find(900).is_none());
        let nothing = Names::new(0);
        nothing.learn_prompt(&[1; 64], 16);
        assert!(nothing.all().0.is_empty());
    }
}
