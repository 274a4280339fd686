//! The table of chunks, and the thread that makes and drops them.
//!
//! Between its wishes the thread makes memory ahead for the next chunks, so that
//! a writer does not wait for it: what is ahead counts against the pool's limit.
//!
//! A dropped chunk is unmapped, and then watched until no other process holds
//! its pages: the answer is given when the kernel has them back, or as
//! [`Fault::StillMapped`] after two seconds. What stays held is counted as
//! lingering until it is gone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, mpsc};
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, ChunkId, Done, Fault, IoClass, OpId};

use crate::api::Complete;
use crate::device::{IoBuffer, IoOp, IoRequest};
use crate::memfd::Blank;
use crate::memory::{Access, ChunkMemory, Retired};
use crate::slots::Slots;

/// How long a drop waits for other processes to let go.
const PATIENCE: Duration = Duration::from_secs(2);
/// Where the kernel cannot tell who holds memory, it is taken for free after this long.
const UNPROVABLE: Duration = Duration::from_secs(60);
/// This part of the pool's limit is made ahead, so that as much is written without a wait for memory.
const READY_PART: u64 = 4;
/// While there is some, more is made when nobody has asked for so long: zeros that are written beside whoever fills what
/// there is take half of the memory's pace from him.
const LULL: Duration = Duration::from_millis(5);
/// How often a held chunk is looked at, before and after patience has run out.
const LOOK_SOON: Duration = Duration::from_millis(2);
const LOOK_LATE: Duration = Duration::from_millis(250);

/// Chunks by id.
#[derive(Default)]
pub(crate) struct ChunkTable(RwLock<BTreeMap<ChunkId, Arc<ChunkMemory>>>);

impl ChunkTable {
    pub(crate) fn find(&self, chunk: ChunkId) -> Option<Arc<ChunkMemory>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&chunk).cloned()
    }

    /// Runs something on a chunk without counting a reference.
    pub(crate) fn with<T>(&self, chunk: ChunkId, act: impl FnOnce(&ChunkMemory) -> T) -> Option<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&chunk).map(|memory| act(memory))
    }

    fn insert(&self, chunk: ChunkId, memory: ChunkMemory) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(chunk, Arc::new(memory));
    }

    fn remove(&self, chunk: ChunkId) -> Option<Arc<ChunkMemory>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&chunk)
    }

    /// Memory of all chunks.
    pub(crate) fn bytes(&self) -> u64 {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(|memory| memory.bytes().get())
            .sum()
    }

    /// Chunks by label of their pages.
    pub(crate) fn pages(&self) -> Vec<(&'static str, u64)> {
        let mut counts = BTreeMap::new();
        for memory in self.0.read().unwrap_or_else(PoisonError::into_inner).values() {
            *counts.entry(memory.pages().label()).or_insert(0) += 1;
        }
        counts.into_iter().collect()
    }
}

/// What the thread is asked to do.
pub(crate) enum Wish {
    Create {
        op: OpId,
        chunk: ChunkId,
        access: Access,
        frame_bytes: ByteCount,
        frames: u32,
    },
    Drop {
        op: OpId,
        chunk: ChunkId,
    },
    /// Answer an operation that cannot even be begun.
    Refuse {
        op: OpId,
        fault: Fault,
    },
}

/// Its queue.
#[derive(Default)]
pub(crate) struct Wishes {
    queue: Mutex<(VecDeque<Wish>, bool)>,
    wake: Condvar,
    lingering: AtomicU64,
    memory_max: AtomicU64,
    ready: AtomicU64,
    preparing: AtomicBool,
}

impl Wishes {
    pub(crate) fn push(&self, wish: Wish) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).0.push_back(wish);
        self.wake.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.wake.notify_one();
    }

    /// Memory that chunks, and what is made ahead for them, may take together. Nothing is made ahead before this.
    pub(crate) fn set_memory_max(&self, bytes: ByteCount) {
        // Under the lock, so that the thread sees it before it waits, or is woken.
        let _queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        self.memory_max.store(bytes.get(), Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Memory that was made ahead.
    pub(crate) fn ready(&self) -> ByteCount {
        ByteCount::new(self.ready.load(Ordering::Relaxed))
    }

    /// Whether more is to be made ahead.
    pub(crate) fn is_preparing(&self) -> bool {
        self.preparing.load(Ordering::Relaxed)
    }

    /// Memory that is dropped, and still held by others.
    pub(crate) fn lingering(&self) -> ByteCount {
        ByteCount::new(self.lingering.load(Ordering::Relaxed))
    }
}

/// Makes and drops chunks.
pub(crate) struct ChunkMaker {
    pub(crate) wishes: Arc<Wishes>,
    pub(crate) table: Arc<ChunkTable>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) complete: Arc<Complete>,
}

/// Memory that nobody has had, for chunks to come.
#[derive(Default)]
struct Ahead {
    ready: Vec<Blank>,
    /// There was no memory for more: not before somebody asks for a chunk again.
    short: bool,
    /// When somebody asked last.
    asked: Option<Instant>,
}

impl Ahead {
    fn bytes(&self) -> u64 {
        self.ready.iter().map(|blank| blank.mapping.bytes).sum()
    }

    /// How long more can wait.
    fn can_wait(&self, now: Instant) -> Duration {
        let asked = self.asked.filter(|_| !self.ready.is_empty());
        asked.map_or(Duration::ZERO, |asked| (asked + LULL).saturating_duration_since(now))
    }

    fn prepare(&mut self, bytes: u64) {
        match Blank::make(bytes) {
            Ok(blank) => self.ready.push(blank),
            Err(error) => {
                tracing::debug!(%error, "no memory ahead");
                self.short = true;
            }
        }
    }
}

/// Memory of chunks on their way out.
fn held(leaving: &[Leaving]) -> u64 {
    leaving.iter().map(|chunk| chunk.bytes).sum()
}

/// A chunk on its way out.
struct Leaving {
    /// `None` once the drop has been answered.
    op: Option<OpId>,
    memory: Memory,
    bytes: u64,
    patience_ends: Instant,
}

enum Memory {
    /// A stream of the daemon still uses it.
    Used(Arc<ChunkMemory>),
    Unmapped(Retired),
}

enum Turn {
    Wish(Wish),
    Look,
    /// Nobody wants anything: the time to make memory ahead.
    Prepare,
    Stop,
}

impl ChunkMaker {
    pub(crate) fn run(self) {
        let mut leaving: Vec<Leaving> = Vec::new();
        let mut ahead = Ahead::default();
        loop {
            match self.turn(&leaving, &ahead) {
                Turn::Wish(Wish::Create { op, chunk, access, frame_bytes, frames }) => {
                    let made = self.create(&mut ahead, held(&leaving), chunk, access, frame_bytes, frames);
                    // As the one who asked for the chunk may look.
                    self.wishes.ready.store(ahead.bytes(), Ordering::Relaxed);
                    (self.complete)(op, made);
                }
                Turn::Prepare => ahead.prepare(self.slots.chunk_bytes()),
                Turn::Wish(Wish::Drop { op, chunk }) => self.begin_drop(op, chunk, &mut leaving),
                Turn::Wish(Wish::Refuse { op, fault }) => (self.complete)(op, Err(fault)),
                Turn::Look => {}
                Turn::Stop => break,
            }
            let looked = std::mem::take(&mut leaving);
            leaving.extend(looked.into_iter().filter_map(|chunk| self.look(chunk)));
            self.wishes.lingering.store(held(&leaving), Ordering::Relaxed);
            self.wishes.ready.store(ahead.bytes(), Ordering::Relaxed);
        }
        for op in leaving.into_iter().filter_map(|chunk| chunk.op) {
            (self.complete)(op, Err(Fault::StillMapped));
        }
    }

    fn turn(&self, leaving: &[Leaving], ahead: &Ahead) -> Turn {
        let leaving_bytes = held(leaving);
        self.wishes.preparing.store(self.prepares(ahead, leaving_bytes), Ordering::Relaxed);
        let mut queue = self.wishes.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let look = match leaving {
            [] => None,
            some if some.iter().any(|chunk| chunk.op.is_some()) => Some(LOOK_SOON),
            _ => Some(LOOK_LATE),
        };
        loop {
            if let Some(wish) = queue.0.pop_front() {
                return Turn::Wish(wish);
            }
            if queue.1 {
                return Turn::Stop;
            }
            let prepare = self.prepares(ahead, leaving_bytes).then(|| ahead.can_wait(Instant::now()));
            if prepare.is_some_and(|wait| wait.is_zero()) {
                return Turn::Prepare;
            }
            let Some(pause) = look.into_iter().chain(prepare).min() else {
                queue = self.wishes.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (woken, waited) =
                self.wishes.wake.wait_timeout(queue, pause).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            if waited.timed_out() && queue.0.is_empty() {
                return Turn::Look;
            }
        }
    }

    /// Whether so much more stays below the limit of the pool.
    fn has_room(&self, ahead: &Ahead, leaving: u64, more: u64) -> bool {
        let taken = self.table.bytes() + ahead.bytes() + leaving;
        taken.saturating_add(more) <= self.wishes.memory_max.load(Ordering::Relaxed)
    }

    /// Whether another chunk's memory is to be made ahead.
    fn prepares(&self, ahead: &Ahead, leaving: u64) -> bool {
        let chunk = self.slots.chunk_bytes();
        let most = self.wishes.memory_max.load(Ordering::Relaxed) / READY_PART;
        !ahead.short && ahead.bytes() + chunk <= most && self.has_room(ahead, leaving, chunk)
    }

    fn create(
        &self,
        ahead: &mut Ahead,
        leaving: u64,
        chunk: ChunkId,
        access: Access,
        frame_bytes: ByteCount,
        frames: u32,
    ) -> Result<Done, Fault> {
        let made = ChunkMemory::bytes_for(frame_bytes, frames).and_then(|bytes| {
            let chunk = self.slots.chunk_bytes();
            (ahead.short, ahead.asked) = (false, Some(Instant::now()));
            let blank = match ahead.ready.pop().filter(|_| bytes <= chunk) {
                Some(blank) => blank,
                None => {
                    while !self.has_room(ahead, leaving, bytes) && ahead.ready.pop().is_some() {}
                    Blank::make(bytes.max(chunk))?
                }
            };
            ChunkMemory::on(blank, frame_bytes, frames, access)
        });
        match made {
            Ok(memory) => {
                self.table.insert(chunk, memory);
                Ok(Done::ChunkCreated)
            }
            Err(error) => {
                tracing::warn!(%chunk, frames, %error, "no memory for a chunk");
                Err(Fault::NoMemory)
            }
        }
    }

    fn begin_drop(&self, op: OpId, chunk: ChunkId, leaving: &mut Vec<Leaving>) {
        let Some(memory) = self.table.remove(chunk) else {
            // It was never made: nothing is held.
            return (self.complete)(op, Ok(Done::Plain));
        };
        self.forget(memory.id());
        leaving.push(Leaving {
            op: Some(op),
            bytes: memory.bytes().get(),
            memory: Memory::Used(memory),
            patience_ends: Instant::now() + PATIENCE,
        });
    }

    /// Every ring lets go of its registration, which pins the pages.
    fn forget(&self, memory: u64) {
        let (sender, receiver) = mpsc::channel();
        for device in self.slots.ids() {
            let Some(io) = self.slots.io(device) else { continue };
            let sender = sender.clone();
            io.submit(IoRequest {
                op: IoOp::Forget(memory),
                offset: 0,
                bytes: 0,
                buffer: IoBuffer::Nothing,
                class: IoClass::DecodeFetch,
                done: Box::new(move |_, _| drop(sender)),
            });
        }
        drop(sender);
        // Ends when the last sender is gone; nobody sends. A device that hangs must not stop the making of chunks:
        // it keeps the pages pinned until it comes to this.
        let _: Result<(), _> = receiver.recv_timeout(PATIENCE);
    }

    /// Takes the next step of a chunk's way out. `None` when it is gone.
    fn look(&self, mut chunk: Leaving) -> Option<Leaving> {
        chunk.memory = match chunk.memory {
            Memory::Used(memory) => match Arc::try_unwrap(memory) {
                Ok(memory) => Memory::Unmapped(memory.retire()),
                Err(memory) => Memory::Used(memory),
            },
            unmapped @ Memory::Unmapped(_) => unmapped,
        };
        let gone = match &chunk.memory {
            Memory::Used(_) => false,
            Memory::Unmapped(retired) if retired.provable() => retired.gone(),
            Memory::Unmapped(_) => Instant::now() >= chunk.patience_ends + UNPROVABLE,
        };
        if gone {
            // Closed before the answer: the last descriptor keeps the pages.
            let op = chunk.op.take();
            drop(chunk);
            if let Some(op) = op {
                (self.complete)(op, Ok(Done::Plain));
            }
            return None;
        }
        if chunk.op.is_some() && Instant::now() >= chunk.patience_ends {
            let op = chunk.op.take();
            // Counted before the core hears of it.
            self.wishes.lingering.fetch_max(chunk.bytes, Ordering::Relaxed);
            if let Some(op) = op {
                (self.complete)(op, Err(Fault::StillMapped));
            }
        }
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A writer that has to wait for memory would wait for the lull as well, and one that is busy would have zeros written
    // beside him all the time.
    #[test]
    fn more_is_made_in_a_lull_unless_there_is_none() {
        let now = Instant::now();
        let mut ahead = Ahead::default();
        assert_eq!(ahead.can_wait(now), Duration::ZERO, "nobody has asked yet");
        ahead.asked = Some(now);
        assert_eq!(ahead.can_wait(now), Duration::ZERO, "there is none");
        ahead.prepare(2 << 20);
        assert_eq!(ahead.ready.len(), 1, "the machine has memory for one");
        assert_eq!(ahead.can_wait(now), LULL);
        assert_eq!(ahead.can_wait(now + LULL), Duration::ZERO);
    }
}
