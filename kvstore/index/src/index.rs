//! The index as its callers see it: changes take turns, look-ups take none.

use std::sync::{Mutex, MutexGuard, TryLockError};

use crate::directory::{Directory, Tags};
use crate::find::{Found, find};
use crate::ids::{BYTES_MIN, HOLDERS_MAX, HolderId, Key, Limits, Refused, SizeClass, Tier, TierSet};
use crate::pool::{Extent, Pool, Slab};
use crate::run::{RUNS_MAX, Run, Tables};
use crate::write::{After, BATCH, Writer};

/// Blocks that are asked for one by one in one turn.
const BLOCKS_ASKED_FOR: usize = 2_048;

/// Who holds what. Shared by any number of threads; see the crate's promises.
#[derive(Debug)]
pub struct Index {
    limits: Limits,
    pub(crate) tables: Tables,
    writer: Mutex<Writer>,
}

/// How much an index holds and takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Different blocks.
    pub blocks: u64,
    /// Pairs of block and holder.
    pub entries: u64,
    /// Pairs of run and holder.
    pub records: u64,
    /// Entries forgotten since the beginning to stay within the limit.
    pub evicted: u64,
    /// Memory taken, free places included.
    pub bytes: u64,
}

impl Index {
    /// An empty index. Limits that are too small or too large are taken as the nearest that work.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits { holders: limits.holders.min(HOLDERS_MAX), bytes: limits.bytes.max(BYTES_MIN) };
        let most = |item: usize| limits.bytes / item as u64 + 1024;
        let tables = Tables {
            pool: Pool::new(most(size_of::<Extent>()).min(u64::from(u32::MAX))),
            runs: Slab::new(most(size_of::<Run>()).min(RUNS_MAX)),
            directory: Directory::new(most(64), Tags::Change),
            inner: Directory::new(most(64), Tags::Stay),
        };
        Self { limits, tables, writer: Mutex::new(Writer::new(limits.bytes)) }
    }

    /// A turn to change it, for as long as the answer lives. Whoever has several changes at hand should make
    /// them in one turn: threads that take turns for each change mostly wake each other.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn changes(&self) -> Changes<'_> {
        Changes { index: self, writer: self.guard() }
    }

    /// The limits it works within.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// `holder` has `blocks`, a piece of a chain, in `tiers`, beside what it had before. `parent` is the
    /// block before the first; a parent that is not known, or none, is no error: the keys say it all, and
    /// naming it keeps a chain together. Entries that are new.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn store(
        &self,
        holder: HolderId,
        tiers: TierSet,
        parent: Option<Key>,
        blocks: &[Key],
    ) -> Result<u64, Refused> {
        self.store_sized(holder, tiers, SizeClass::UNKNOWN, parent, blocks)
    }

    /// [`Index::store`] of blocks whose size is known.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn store_sized(
        &self,
        holder: HolderId,
        tiers: TierSet,
        size: SizeClass,
        parent: Option<Key>,
        blocks: &[Key],
    ) -> Result<u64, Refused> {
        self.changes().store_sized(holder, tiers, size, parent, blocks)
    }

    /// `holder` no longer has `blocks` in `tiers`; blocks that are not known are passed over. Entries that
    /// are gone, which are those without a tier left.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn remove(&self, holder: HolderId, tiers: TierSet, blocks: &[Key]) -> Result<u64, Refused> {
        self.changes().remove(holder, tiers, blocks)
    }

    /// `holder` has `blocks`, a piece of a chain, in `target` and no longer in `source`. A reader sees
    /// them in both for a moment, never in none. Entries that are new.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn relocate(
        &self,
        holder: HolderId,
        source: TierSet,
        target: TierSet,
        blocks: &[Key],
    ) -> Result<u64, Refused> {
        let added = self.store(holder, target, None, blocks)?;
        let leaves = Self::without(source, target);
        self.turn().remove(&self.tables, holder, leaves, blocks);
        Ok(added)
    }

    fn without(source: TierSet, target: TierSet) -> TierSet {
        TierSet::from_bits(source.bits() & !target.bits()).expect("fewer tiers are a set of tiers")
    }

    /// `holder` has nothing any more. Entries that are gone. Looks at every run.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn clear(&self, holder: HolderId) -> Result<u64, Refused> {
        self.check(holder)?;
        Ok(self.turn().clear(&self.tables, holder))
    }

    /// `holder` was used for the beginning of a prompt: keeps it warm. Stops at the first unknown block.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn touch(&self, holder: HolderId, prompt: &[Key]) -> Result<(), Refused> {
        self.check(holder)?;
        self.turn().touch(&self.tables, holder, prompt);
        Ok(())
    }

    /// [`Index::touch`] if nobody is changing the index, for callers that must not wait. Whether it was done.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn touch_unless_busy(&self, holder: HolderId, prompt: &[Key]) -> Result<bool, Refused> {
        self.check(holder)?;
        let mut writer = match self.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Poisoned(_)) => self.guard(),
        };
        writer.clock = writer.clock.wrapping_add(1);
        writer.touch(&self.tables, holder, prompt);
        Ok(true)
    }

    /// Fills `found` with what is held of `prompt`, which begins at token 0. Ends at the first block that
    /// nobody holds. Never waits for a writer. A piece that begins later, behind a block that is held, may be
    /// found or not.
    pub fn find(&self, prompt: &[Key], found: &mut Found) {
        find(&self.tables, prompt, found);
    }

    /// The fastest tier in which `holder` has each of these blocks, if it has it. They need not follow each other. Takes
    /// turns with changes, a few thousand blocks in each.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn fastest(&self, holder: HolderId, blocks: &[Key]) -> Vec<Option<Tier>> {
        let mut found = Vec::with_capacity(blocks.len());
        for part in blocks.chunks(BLOCKS_ASKED_FOR) {
            self.guard().fastest(&self.tables, holder, part, &mut found);
        }
        found
    }

    /// What it holds and takes.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn counts(&self) -> Counts {
        let writer = self.guard();
        Counts {
            blocks: writer.blocks,
            entries: writer.entries,
            records: writer.records,
            evicted: writer.evicted,
            bytes: self.tables.bytes() + writer.bytes(),
        }
    }

    fn check(&self, holder: HolderId) -> Result<(), Refused> {
        if holder.0 < self.limits.holders {
            return Ok(());
        }
        Err(Refused::Holder { holder: holder.0, limit: self.limits.holders })
    }

    /// The writer, for one more operation.
    fn turn(&self) -> MutexGuard<'_, Writer> {
        let mut writer = self.guard();
        writer.clock = writer.clock.wrapping_add(1);
        writer
    }

    pub(crate) fn guard(&self) -> MutexGuard<'_, Writer> {
        self.writer
            .lock()
            .expect("a writer panicked in the middle of a change; the index is not to be trusted")
    }
}

/// A turn to change an index. Look-ups go on meanwhile and see each change as it is made.
#[derive(Debug)]
pub struct Changes<'a> {
    index: &'a Index,
    writer: MutexGuard<'a, Writer>,
}

impl Changes<'_> {
    /// [`Index::store_sized`].
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    pub fn store_sized(
        &mut self,
        holder: HolderId,
        tiers: TierSet,
        size: SizeClass,
        parent: Option<Key>,
        blocks: &[Key],
    ) -> Result<u64, Refused> {
        self.put(holder, (tiers, size), parent.map_or(After::Unknown, After::Block), blocks)
    }

    /// [`Index::store_sized`] of blocks of which the first is a prompt's first. Saves to look for it behind all blocks
    /// that are known.
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    pub fn store_start(
        &mut self,
        holder: HolderId,
        tiers: TierSet,
        size: SizeClass,
        blocks: &[Key],
    ) -> Result<u64, Refused> {
        self.put(holder, (tiers, size), After::Start, blocks)
    }

    fn put(
        &mut self,
        holder: HolderId,
        (tiers, size): (TierSet, SizeClass),
        mut after: After,
        blocks: &[Key],
    ) -> Result<u64, Refused> {
        self.index.check(holder)?;
        if tiers.is_empty() {
            return Ok(0);
        }
        self.writer.clock = self.writer.clock.wrapping_add(1);
        let mut added = 0;
        for batch in blocks.chunks(BATCH) {
            added += self.writer.store(&self.index.tables, (holder, tiers, size), after, batch);
            after = batch.last().map_or(after, |last| After::Block(*last));
        }
        Ok(added)
    }

    /// [`Index::remove`].
    ///
    /// # Errors
    /// [`Refused::Holder`] if the holder's number is too large.
    pub fn remove(&mut self, holder: HolderId, tiers: TierSet, blocks: &[Key]) -> Result<u64, Refused> {
        self.index.check(holder)?;
        self.writer.clock = self.writer.clock.wrapping_add(1);
        Ok(self.writer.remove(&self.index.tables, holder, tiers, blocks))
    }
}

#[cfg(test)]
mod tests;
