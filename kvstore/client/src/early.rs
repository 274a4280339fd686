//! Blocks that are filled before their frames are granted.
//!
//! While the first lease of a put is asked for, a part of it could be filled. Windows are the session's own, and the daemon
//! grants their frames from the first on: the blocks are filled where they will lie if nothing comes between, and what is
//! granted elsewhere is filled once more.
//!
//! A wrong guess hurts nobody. Only frames are filled that were never granted; their windows are not handed back
//! meanwhile; and nobody else of this session asks for frames to write, who could be granted the same ones.

use std::ops::Range;
use std::time::{Duration, Instant};

use tokio::sync::RwLockWriteGuard;

use terrace_core::{BlockId, Checksum, HEADER_PAGE_BYTES};
use terrace_lane::{Called, drain};

use crate::chunks::Unused;
use crate::get::is_past_the_cache;
use crate::put::Put;
use crate::session::LaneSession;

/// Bytes that are filled, at least, before the answer is looked for again.
const PIECE_BYTES: usize = 256 << 10;
/// An answer that takes longer is waited for asleep.
const FILLING_FOR_MAX: Duration = Duration::from_millis(1);
/// Others wait for their turn meanwhile: what was filled for an answer that takes longer is filled again.
const HELD_FOR_MAX: Duration = Duration::from_millis(20);

/// A block that was filled, where, and what it is sealed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FilledEarly {
    pub(crate) chunk: u64,
    pub(crate) frame: u32,
    pub(crate) block: BlockId,
    pub(crate) generation: u64,
    pub(crate) checksum: Checksum,
}

/// The first run of a put, as far as it was filled.
pub(crate) struct Early<'a, K> {
    put: &'a Put<'a, K>,
    run: Range<usize>,
    filled: Vec<FilledEarly>,
    /// The next one last.
    windows: Vec<Unused>,
    began: Instant,
}

impl<'a, K: AsRef<[u8]>> Early<'a, K> {
    /// For a lease that is asked for now, by whoever is told to do that alone. `None`: no window is at hand, or somebody
    /// else asks already.
    pub(crate) fn begin(
        lane: &'a LaneSession,
        put: &'a Put<'a, K>,
        run: Range<usize>,
    ) -> Option<(RwLockWriteGuard<'a, ()>, Self)> {
        let turn = lane.chunks.turn.try_write().ok()?;
        if lane.link.is_asked_for_frames() {
            return None;
        }
        let mut windows = lane.chunks.unused(&lane.keeper, put.space.handle);
        windows.reverse();
        let began = Instant::now();
        (!windows.is_empty()).then_some((turn, Self { put, run, filled: Vec::new(), windows, began }))
    }

    /// When others are to have their turn.
    pub(crate) fn held_until(&self) -> Instant {
        self.began + HELD_FOR_MAX
    }

    /// Fills some more. False: there is nothing left to do but to wait.
    pub(crate) fn go_on(&mut self) -> bool {
        let mut bytes = 0;
        while bytes < PIECE_BYTES
            && let Some(at) = self.run.next()
        {
            let Some(filled) = self.fill(at) else {
                self.run = at..at;
                break;
            };
            self.filled.push(filled);
            bytes += self.put.payloads[at].len();
        }
        bytes > 0 && self.began.elapsed() < FILLING_FOR_MAX
    }

    /// `None`: no frame is left.
    fn fill(&mut self, at: usize) -> Option<FilledEarly> {
        let space = self.put.space;
        let (payload, key) = (self.put.payloads[at], &self.put.keys[at]);
        loop {
            let window = self.windows.last_mut()?;
            let (chunk, frame) = (window.chunk, window.frame);
            let offset = u64::from(frame) * space.frame_bytes().get() + HEADER_PAGE_BYTES;
            let Some(mut view) = window.mapping.view_mut(offset, space.block_bytes()) else {
                self.windows.pop();
                continue;
            };
            window.frame += 1;
            if is_past_the_cache(space, self.put.keys.len()) {
                view.go_past_the_cache();
            }
            view.drain_later();
            let (block, generation) = (space.block_id(key.as_ref()), space.generation());
            let checksum = view.copy_from_and_checksum(payload, block, generation, Called::NONE);
            return Some(FilledEarly { chunk, frame, block, generation, checksum });
        }
    }

    /// The lease is there.
    pub(crate) fn end(mut self) -> Vec<FilledEarly> {
        std::mem::take(&mut self.filled)
    }
}

impl<K> Drop for Early<'_, K> {
    fn drop(&mut self) {
        // Whoever fills these frames from now on comes after.
        drain();
    }
}
