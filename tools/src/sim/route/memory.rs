//! The blocks that one worker, or the shared pool, keeps: least recently used
//! goes first.
//!
//! A prompt is touched from its last block to its first, so that a block is
//! never older than those that need it: what is kept of a prompt is a prefix.

use hashbrown::HashTable;

/// No slot.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Slot {
    number: u32,
    newer: u32,
    older: u32,
}

/// A bounded set of blocks in the order of use.
#[derive(Debug)]
pub(crate) struct Memory {
    capacity: usize,
    slots: Vec<Slot>,
    places: HashTable<u32>,
    newest: u32,
    oldest: u32,
}

/// What an insertion changed.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    /// Position in the prompt from which on blocks are new.
    pub(crate) new_from: usize,
    /// Position after the last new block.
    pub(crate) new_to: usize,
    /// Blocks that had to go.
    pub(crate) evicted: Vec<u32>,
}

impl Memory {
    /// Empty.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, slots: Vec::new(), places: HashTable::new(), newest: NONE, oldest: NONE }
    }

    /// Blocks from the first of a prompt that are here without a hole.
    pub(crate) fn prefix(&self, numbers: &[u32]) -> usize {
        numbers.iter().take_while(|&&number| self.slot(number).is_some()).count()
    }

    /// A prompt was used: its blocks are the newest from now on. What does not fit is left out.
    pub(crate) fn insert(&mut self, numbers: &[u32]) -> Changed {
        let numbers = &numbers[..numbers.len().min(self.capacity)];
        let known = self.prefix(numbers);
        // Its own blocks first, so that none of them makes room for another.
        self.touch(&numbers[..known]);
        let mut evicted = Vec::new();
        for &number in &numbers[known..] {
            if let Some(slot) = self.slot(number) {
                self.unlink(slot);
                self.link(slot);
                continue;
            }
            let slot = self.room(&mut evicted);
            self.slots[slot as usize].number = number;
            let slots = &self.slots;
            self.places.insert_unique(hash(number), slot, |&slot| hash(slots[slot as usize].number));
            self.link(slot);
        }
        self.touch(numbers);
        Changed { new_from: known, new_to: numbers.len(), evicted }
    }

    fn touch(&mut self, numbers: &[u32]) {
        for &number in numbers.iter().rev() {
            if let Some(slot) = self.slot(number) {
                self.unlink(slot);
                self.link(slot);
            }
        }
    }

    fn slot(&self, number: u32) -> Option<u32> {
        self.places.find(hash(number), |&slot| self.slots[slot as usize].number == number).copied()
    }

    /// A slot that is in no list.
    fn room(&mut self, evicted: &mut Vec<u32>) -> u32 {
        if self.slots.len() < self.capacity {
            self.slots.push(Slot { number: NONE, newer: NONE, older: NONE });
            return u32::try_from(self.slots.len() - 1).unwrap_or(NONE);
        }
        let slot = self.oldest;
        let number = self.slots[slot as usize].number;
        self.unlink(slot);
        if let Ok(entry) = self.places.find_entry(hash(number), |&other| other == slot) {
            entry.remove();
        }
        evicted.push(number);
        slot
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { newer, older, .. } = self.slots[slot as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
    }

    fn link(&mut self, slot: u32) {
        let older = std::mem::replace(&mut self.newest, slot);
        self.slots[slot as usize] = Slot { newer: NONE, older, ..self.slots[slot as usize] };
        match older {
            NONE => self.oldest = slot,
            older => self.slots[older as usize].newer = slot,
        }
    }
}

fn hash(number: u32) -> u64 {
    u64::from(number).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// The same by a list that is searched: newest first.
    fn model(list: &mut VecDeque<u32>, capacity: usize, numbers: &[u32]) {
        let numbers = &numbers[..numbers.len().min(capacity)];
        for number in numbers.iter().rev() {
            list.retain(|other| other != number);
            list.push_front(*number);
        }
        list.truncate(capacity);
    }

    /// A wrong link shows only thousands of requests later: histories of prompts from a forest are compared
    /// with a list, block by block, and every change with the difference between two states.
    #[test]
    fn memory_equals_a_searched_list() {
        for seed in 0..20u64 {
            let capacity = 3 + usize::try_from(seed).unwrap() * 2;
            let (mut memory, mut list) = (Memory::new(capacity), VecDeque::new());
            let mut bits = seed + 1;
            for _ in 0..400 {
                bits = hash(u32::try_from(bits >> 32).unwrap());
                let (family, length) = (u32::try_from(bits % 7).unwrap(), (bits >> 8) % 12);
                let split = (bits >> 16) % 3 + 2;
                let number = |depth: u64| {
                    let branch = if depth < split { 0 } else { u32::try_from(split).unwrap() };
                    family * 1000 + branch * 100 + u32::try_from(depth).unwrap()
                };
                let numbers: Vec<u32> = (0..length).map(number).collect();
                let before: Vec<u32> = list.iter().copied().collect();
                let changed = memory.insert(&numbers);
                model(&mut list, capacity, &numbers);
                for known in list.iter().chain(&before) {
                    assert_eq!(memory.slot(*known).is_some(), list.contains(known), "seed {seed}");
                }
                let gone: Vec<u32> = before.iter().copied().filter(|old| !list.contains(old)).collect();
                let mut evicted = changed.evicted.clone();
                evicted.sort_unstable();
                let mut expected = gone;
                expected.sort_unstable();
                assert_eq!(evicted, expected, "seed {seed}");
                let new = numbers.iter().filter(|&&n| list.contains(&n) && !before.contains(&n)).count();
                assert_eq!(changed.new_to - changed.new_from, new, "seed {seed}");
            }
        }
    }

    /// A memory of nothing keeps nothing.
    #[test]
    fn no_capacity_is_no_panic() {
        let mut memory = Memory::new(0);
        let changed = memory.insert(&[1, 2, 3]);
        assert_eq!((changed.new_to, changed.evicted.len(), memory.prefix(&[1])), (0, 0, 0));
    }
}
