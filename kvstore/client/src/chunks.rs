//! The chunks that this session has mapped, and its windows.
//!
//! A window goes back to the daemon only when nobody can write into it: no
//! [`WriterToken`] of it exists, and its write permission was dropped. A mapping
//! that nobody uses is given up after a while, so that the daemon gets the
//! memory of chunks that it has dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::RwLock;

use terrace_core::ByteCount;
use terrace_gpudirect::Device;
use terrace_lane::{Access, FenceMapping, Mapping};
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{MapChunk, Tier};

use crate::device::{DeviceMapping, Own};
use crate::error::ClientError;
use crate::keeper::Keeper;
use crate::lane::LaneLink;

/// A mapping without a user is dropped after this long: long enough that a busy
/// reader maps a chunk once, short against the daemon's wait for its memory.
const MAPPING_IDLE_MAX: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(crate) struct Chunks {
    table: Mutex<BTreeMap<u64, Chunk>>,
    /// Held by whoever asks for frames to write, and alone by whoever fills some before he is granted them.
    pub(crate) turn: RwLock<()>,
    /// Devices of the daemon that this process reaches, by the daemon's numbers.
    devices: Mutex<BTreeMap<u32, Arc<Own>>>,
}

/// A chunk's bytes in this process.
#[derive(Clone, Debug)]
pub(crate) enum Mapped {
    Host(Arc<Mapping>),
    Device(Arc<DeviceMapping>),
}

impl Mapped {
    fn is_writable(&self) -> bool {
        match self {
            Self::Host(mapping) => mapping.is_writable(),
            Self::Device(mapping) => mapping.is_writable(),
        }
    }

    /// Who has it, the table of chunks among them.
    fn users(&self) -> usize {
        match self {
            Self::Host(mapping) => Arc::strong_count(mapping),
            Self::Device(mapping) => Arc::strong_count(mapping),
        }
    }
}

#[derive(Debug, Default)]
struct Chunk {
    mapping: Option<Mapped>,
    writers: usize,
    recalled: bool,
    idle_since: Option<Instant>,
    /// Handle of the space that a window is for, if it is known.
    space: Option<u32>,
    /// Of a window: no frame from this one on was ever granted.
    unused_from: u32,
}

/// A window that is mapped and has frames that were never granted. It is not returned meanwhile.
#[derive(Debug)]
pub(crate) struct Unused {
    pub(crate) chunk: u64,
    pub(crate) mapping: Arc<Mapping>,
    /// The first of them, if there is one.
    pub(crate) frame: u32,
    _writer: WriterToken,
}

/// When a mapping is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    /// By somebody who waits for it.
    InTurn,
    /// By the session itself, ahead. Its pages are mapped as well, by another thread: both take their time.
    AtOnce,
}

impl Chunks {
    pub(crate) fn new() -> Self {
        Self { table: Mutex::default(), turn: RwLock::default(), devices: Mutex::default() }
    }

    /// From now on, chunks of the daemon's device `number` are mapped by `device`.
    pub(crate) fn add_device(&self, number: u32, device: Arc<dyn Device>) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.entry(number).or_insert_with(|| Arc::new(Own::new(device)));
    }

    /// What maps chunks of the daemon's device `number`.
    pub(crate) fn device(&self, number: u32) -> Result<Arc<Own>, ClientError> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.get(&number).cloned().ok_or(ClientError::UnknownDevice { device: number })
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, Chunk>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mapping of a chunk that a lease names, mapped now if it is not yet.
    pub(crate) async fn mapping(
        &self,
        link: &LaneLink,
        chunk: u64,
        access: Access,
    ) -> Result<Mapped, ClientError> {
        let known = self.table().get(&chunk).and_then(|known| known.mapping.clone());
        if let Some(known) = known
            && (access == Access::Read || known.is_writable())
        {
            return Ok(known);
        }
        let mapping = self.map(link, chunk, access, Asking::InTurn).await?;
        Ok(self.mapped(chunk, access, mapping))
    }

    /// The daemon said what a window is for.
    pub(crate) fn is_window_of(&self, chunk: u64, space: u32) {
        self.table().entry(chunk).or_default().space = Some(space);
    }

    /// The windows of a space, as the daemon takes frames from them.
    pub(crate) fn unused(self: &Arc<Self>, keeper: &Arc<Keeper>, space: u32) -> Vec<Unused> {
        let found: Vec<(u64, Arc<Mapping>, u32)> = {
            let table = self.table();
            let windows = table.iter().filter(|(_, entry)| entry.space == Some(space) && !entry.recalled);
            let mapped = windows.filter_map(|(chunk, entry)| match &entry.mapping {
                Some(Mapped::Host(mapping)) if mapping.is_writable() => {
                    Some((*chunk, Arc::clone(mapping), entry.unused_from))
                }
                Some(_) | None => None,
            });
            mapped.collect()
        };
        let held = found.into_iter().map(|(chunk, mapping, frame)| Unused {
            chunk,
            mapping,
            frame,
            _writer: WriterToken::new(self, keeper, chunk, frame),
        });
        held.collect()
    }

    /// Maps a window that nothing is granted in yet, and its pages, beside whoever writes.
    pub(crate) async fn map_ahead(&self, link: &LaneLink, chunk: u64) -> Result<(), ClientError> {
        if self.table().get(&chunk).is_some_and(|known| known.mapping.is_some()) {
            return Ok(());
        }
        let mapping = self.map(link, chunk, Access::Write, Asking::AtOnce).await?;
        self.mapped(chunk, Access::Write, mapping);
        Ok(())
    }

    /// Remembers a mapping, unless there is a good one already.
    fn mapped(&self, chunk: u64, access: Access, mapping: Mapped) -> Mapped {
        let mut table = self.table();
        let entry = table.entry(chunk).or_default();
        match &entry.mapping {
            // Somebody was quicker: one mapping is enough.
            Some(known) if access == Access::Read || known.is_writable() => known.clone(),
            Some(_) | None => {
                entry.mapping = Some(mapping.clone());
                entry.idle_since = None;
                mapping
            }
        }
    }

    async fn map(
        &self,
        link: &LaneLink,
        chunk: u64,
        access: Access,
        asking: Asking,
    ) -> Result<Mapped, ClientError> {
        let question = Op::MapChunk(MapChunk { chunk });
        let mut delivered = match asking {
            Asking::InTurn => link.call(question).await?,
            Asking::AtOnce => link.call_at_once(question).await?,
        };
        let Answer::MappedChunk(mapped) = delivered.answer else {
            return Err(ClientError::Protocol { detail: "a chunk's mapping was asked for" });
        };
        let (Some(fences), Some(data)) = (delivered.descriptors.pop(), delivered.descriptors.pop()) else {
            return Err(ClientError::Protocol { detail: "a mapped chunk without its descriptors" });
        };
        let granted = if mapped.writable { Access::Write } else { Access::Read };
        if access == Access::Write && granted == Access::Read {
            return Err(ClientError::Protocol { detail: "a frame to write in a chunk that is read-only" });
        }
        let bytes = ByteCount::new(mapped.bytes);
        let fence_bytes = ByteCount::new(mapped.fence_bytes);
        if mapped.tier() != Tier::Hbm {
            let map = move || Mapping::map(data, bytes, fences, fence_bytes, granted);
            let mapping = match asking {
                Asking::InTurn => map()?,
                Asking::AtOnce => {
                    let mapped =
                        tokio::task::spawn_blocking(move || map().inspect(|mapping| mapping.populate()));
                    mapped.await.map_err(|_| ClientError::Disconnected)??
                }
            };
            return Ok(Mapped::Host(mapping));
        }
        let own = self.device(mapped.device)?;
        let info = own.device.info();
        if info.uuid[..] != mapped.device_uuid[..] || info.kind.label() != mapped.device_kind {
            return Err(ClientError::Protocol { detail: "a chunk of another device than its number says" });
        }
        let fences = FenceMapping::map(fences, fence_bytes)?;
        // The driver may take its time, and must not have the runtime's.
        let mapping = tokio::task::spawn_blocking(move || {
            DeviceMapping::map(own, mapped.device, data, bytes, fences, granted)
        });
        let mapping = mapping.await.map_err(|_| ClientError::Disconnected)??;
        Ok(Mapped::Device(mapping))
    }

    /// The daemon wants a window back. True when it can be returned now.
    pub(crate) fn recall(&self, chunk: u64) -> bool {
        let mut table = self.table();
        let entry = table.entry(chunk).or_default();
        entry.recalled = true;
        entry.writers == 0
    }

    /// Windows that nobody writes into.
    pub(crate) fn idle_windows(&self) -> Vec<u64> {
        let table = self.table();
        let windows = table.iter().filter(|(_, entry)| {
            entry.writers == 0 && entry.mapping.as_ref().is_some_and(|mapping| mapping.is_writable())
        });
        windows.map(|(chunk, _)| *chunk).collect()
    }

    /// Drops the write permission of a window. False when somebody writes into
    /// it again, or the permission cannot be dropped: then it must not be returned.
    pub(crate) fn drop_write(&self, chunk: u64) -> bool {
        let mut table = self.table();
        let Some(entry) = table.get_mut(&chunk) else {
            return true;
        };
        if entry.writers > 0 {
            return false;
        }
        let mapping = match &entry.mapping {
            None => return true,
            Some(Mapped::Device(mapping)) => {
                mapping.drop_write();
                return true;
            }
            Some(Mapped::Host(mapping)) => mapping,
        };
        match mapping.drop_write() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(chunk, %error, "cannot drop write permission; the window is not returned");
                false
            }
        }
    }

    /// A window was returned, or the daemon did not take it.
    pub(crate) fn window_returned(&self, chunk: u64, taken: bool) {
        let mut table = self.table();
        if let Some(entry) = table.get_mut(&chunk) {
            entry.recalled = false;
            if taken {
                entry.space = None;
            } else {
                // Still our window: the next writer maps it anew.
                entry.mapping = None;
            }
        }
    }

    /// The daemon waits for the memory of a chunk: it goes now, or with the last guard of it.
    pub(crate) fn dropped(&self, chunk: u64) {
        let mut table = self.table();
        let is_ours = |entry: &Chunk| {
            entry.writers > 0 || entry.mapping.as_ref().is_some_and(|mapping| mapping.is_writable())
        };
        let gone = match table.get(&chunk) {
            Some(entry) if !is_ours(entry) => table.remove(&chunk),
            Some(_) | None => None,
        };
        drop(table);
        // Unmapping takes its time, and others want the table.
        drop(gone);
    }

    /// Gives up mappings that nobody has used for a while. `used` were, since the last time.
    pub(crate) fn sweep(&self, now: Instant, used: &BTreeSet<u64>) {
        self.table().retain(|chunk, entry| {
            // A window that is still ours is written into again, and not where it was before.
            let Some(mapping) = &entry.mapping else {
                return entry.writers > 0 || entry.recalled || entry.space.is_some();
            };
            // One reference is the table's own.
            if entry.writers > 0 || mapping.is_writable() || mapping.users() > 1 || used.contains(chunk) {
                entry.idle_since = None;
                return true;
            }
            let since = *entry.idle_since.get_or_insert(now);
            now.duration_since(since) < MAPPING_IDLE_MAX
        });
    }

    /// The session has ended: mappings go as their guards go.
    pub(crate) fn forget_all(&self) {
        self.table().clear();
    }
}

/// While one exists its chunk is not returned. Held by whoever may write.
#[derive(Debug)]
pub(crate) struct WriterToken {
    chunks: Arc<Chunks>,
    keeper: Arc<Keeper>,
    chunk: u64,
}

impl WriterToken {
    /// `end`: the last frame that was granted, and one.
    pub(crate) fn new(chunks: &Arc<Chunks>, keeper: &Arc<Keeper>, chunk: u64, end: u32) -> Self {
        let mut table = chunks.table();
        let entry = table.entry(chunk).or_default();
        entry.writers += 1;
        entry.unused_from = entry.unused_from.max(end);
        drop(table);
        Self { chunks: Arc::clone(chunks), keeper: Arc::clone(keeper), chunk }
    }
}

impl Drop for WriterToken {
    fn drop(&mut self) {
        let mut table = self.chunks.table();
        // Absent after the session has ended.
        let Some(entry) = table.get_mut(&self.chunk) else {
            return;
        };
        entry.writers = entry.writers.saturating_sub(1);
        let due = entry.writers == 0 && entry.recalled;
        drop(table);
        if due {
            self.keeper.return_window(self.chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A window that the daemon did not take back could be taken for one in which little was granted, and what is sealed in
    // it be filled again: sweep it, and have its first frame granted once more.
    #[test]
    fn what_was_granted_in_a_window_is_remembered() {
        let (chunks, keeper) = (Arc::new(Chunks::new()), Arc::new(Keeper::new()));
        let unused_from = || chunks.table().get(&1).map(|entry| entry.unused_from);
        chunks.is_window_of(1, 7);
        drop(WriterToken::new(&chunks, &keeper, 1, 10));
        chunks.window_returned(1, false);
        chunks.sweep(Instant::now(), &BTreeSet::new());
        drop(WriterToken::new(&chunks, &keeper, 1, 1));
        assert_eq!(unused_from(), Some(10));
        chunks.window_returned(1, true);
        chunks.sweep(Instant::now(), &BTreeSet::new());
        assert_eq!(unused_from(), None, "it is ours no more");
    }
}
