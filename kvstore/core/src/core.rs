//! The state machine itself: its tables, its clock, and which file decides what.
//!
//! Promises: inputs are handled to completion, in order; equal inputs give equal
//! effects; nothing is freed while an operation may still read or write it.
//! Leaves all I/O to the shell.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::api::{Admission, BlockHeader, Config, Done, Effect, Event, Fault, Input, IoClass, Via};
use crate::curves::CurveBooks;
use crate::evict::Duels;
use crate::ids::{
    BlockId, ChunkId, DeviceId, DiskFrame, Fence, FrameRef, LeaseId, OpId, SessionId, TenantId,
};
use crate::intake::Intake;
use crate::persist::Stalled;
use crate::policy::class::Tick;
use crate::policy::{Admit, WriteBudget};
use crate::scrub::Scrubber;
use crate::state::block::{BlockIndex, BlockTable, Retained};
use crate::state::chunk::ChunkTable;
use crate::state::departed::Departed;
use crate::state::disk::Disks;
use crate::state::gpu::Gpus;
use crate::state::session::{Lease, Session, WaitId};
use crate::state::space::{SpaceIndex, SpaceTable};
use crate::units::{Micros, Now};
use crate::urgency::Wanted;
use crate::view::Counters;
use crate::waiting::Wait;
use crate::windows::Ahead;

/// After a failure that may pass (no memory, no space, catalog), the next try.
pub(crate) const RETRY_AFTER: Micros = Micros::from_millis(1000);

/// Nobody has written for so long: the burst is over.
const LULL: Micros = Micros::from_millis(5);
/// What can wait waits so long at most.
pub(crate) const BURST_MAX: Micros = Micros::from_millis(100);

/// What a tenant holds at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TenantUse {
    /// By leases and windows.
    pub(crate) leased_bytes: u64,
    /// By `Retain`.
    pub(crate) retained_bytes: u64,
    /// Its leases and its waiting requests.
    pub(crate) leases: u32,
    pub(crate) waits: u32,
}

/// Requests that write, one soon after the other. They take all that memory can move, so that what can wait does: copies
/// to Nvme that are merely due, and room for windows beyond the next one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Burst {
    began: Now,
    /// When it is over, unless somebody writes until then.
    quiet_at: Now,
}

impl Burst {
    pub(crate) fn written(&mut self, now: Now) {
        if now >= self.quiet_at {
            self.began = now;
        }
        self.quiet_at = now.after(LULL);
    }

    /// When what can wait waits no longer; `None` if nobody has written yet.
    fn end(&self) -> Option<Now> {
        (self.quiet_at > Now::default()).then(|| self.quiet_at.min(self.began.after(BURST_MAX)))
    }

    pub(crate) fn is_on(&self, now: Now) -> bool {
        self.end().is_some_and(|end| now < end)
    }
}

/// A slow effect in flight.
#[derive(Debug)]
pub(crate) enum Op {
    CreateChunk {
        chunk: ChunkId,
    },
    CloseWindow {
        chunk: ChunkId,
    },
    DropChunk {
        chunk: ChunkId,
    },
    Read {
        block: BlockIndex,
        source: DiskFrame,
        target: FrameRef,
        sent: Now,
        class: IoClass,
        /// Its device was given up while it had the read. It still owns the frame.
        stuck: bool,
    },
    Write {
        block: BlockIndex,
        source: FrameRef,
        fence: Fence,
        target: DiskFrame,
        header: BlockHeader,
        via: Via,
        stuck: bool,
    },
    CarveSlot {
        device: DeviceId,
        slot: u32,
        space: SpaceIndex,
    },
    Commit {
        puts: Vec<Put>,
        deletes: Vec<Delete>,
    },
    ClearSpace {
        clearing: Clearing,
        wait: Option<WaitId>,
    },
    Verify {
        block: BlockIndex,
        frame: FrameRef,
        fence: Fence,
    },
    /// Within Pinned, or with one or both ends in Hbm.
    Copy {
        block: BlockIndex,
        source: FrameRef,
        fence: Fence,
        target: FrameRef,
        sent: Now,
    },
    /// A copy into the daemon's own memory of what an isolated session seals.
    Intake {
        intake: Intake,
        target: FrameRef,
    },
    Scrub {
        block: BlockIndex,
        source: DiskFrame,
    },
}

/// A written block on its way into the catalog.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Put {
    pub(crate) block: BlockIndex,
    pub(crate) frame: DiskFrame,
    pub(crate) header: BlockHeader,
}

/// A block on its way out of the catalog.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delete {
    pub(crate) block: BlockIndex,
    pub(crate) id: BlockId,
    pub(crate) frame: DiskFrame,
}

/// A clear whose generation is not durable yet.
#[derive(Debug)]
pub(crate) struct Clearing {
    pub(crate) space: SpaceIndex,
    pub(crate) generation: u64,
    /// Frames that hold what was cleared.
    pub(crate) cells: Vec<DiskFrame>,
    pub(crate) failures: u32,
}

/// What is to be done at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Deadline {
    /// The lease ends.
    Lease(LeaseId),
    /// The request is answered with what there is.
    Answer(WaitId),
    /// The window may be idle.
    WindowIdle(ChunkId),
    /// The recalled window should have been handed back.
    WindowRecalled(ChunkId),
    /// The block is an ordinary one again.
    Retain(BlockIndex, BlockId),
    /// A paused activity is tried again.
    Retry,
    /// The next copy is read again.
    Scrub,
}

/// Decides where the blocks of one node live. See the crate's documentation.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: Config,
    pub(crate) now: Now,
    /// The clock of requests.
    pub(crate) tick: Tick,
    pub(crate) duels: Duels,
    pub(crate) curves: CurveBooks,
    /// `None` admits everything.
    pub(crate) admit: Option<Admit>,
    pub(crate) effects: VecDeque<Effect>,
    /// Fences that moved; and what is to be published. One effect each.
    pub(crate) fences: Vec<(FrameRef, Fence)>,
    pub(crate) events: Vec<(TenantId, Event)>,
    pub(crate) counters: Counters,

    pub(crate) blocks: BlockTable,
    pub(crate) spaces: SpaceTable,
    pub(crate) chunks: ChunkTable,
    pub(crate) disks: Disks,
    pub(crate) gpus: Gpus,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    /// Answers of clients whose connection has ended.
    pub(crate) departed: Departed,
    pub(crate) tenants: BTreeMap<TenantId, TenantUse>,
    pub(crate) leases: BTreeMap<LeaseId, Lease>,
    pub(crate) lease_last: u32,

    pub(crate) ops: BTreeMap<OpId, Op>,
    pub(crate) op_last: u64,
    pub(crate) deadlines: BTreeSet<(Now, Deadline)>,
    pub(crate) waits: BTreeMap<WaitId, Wait>,
    pub(crate) wait_last: u64,
    /// Read leases that wait for a block: request and position in it.
    pub(crate) arrivals: BTreeMap<BlockIndex, Vec<(WaitId, u32)>>,
    /// Requests that wait for a block to be durable.
    pub(crate) durables: BTreeMap<BlockIndex, Vec<(WaitId, u32)>>,
    /// Write leases that wait for memory.
    pub(crate) writers: BTreeSet<WaitId>,
    /// Blocks of isolated sessions that wait for a frame, and how many are being copied.
    pub(crate) intakes: VecDeque<Intake>,
    pub(crate) intakes_running: u32,

    /// Blocks to promote or to verify, and those of them that wait for a frame.
    pub(crate) wanted: Wanted,
    pub(crate) wanted_stalled: Vec<BlockIndex>,
    /// Sealed blocks by the time at which they are due for Nvme.
    pub(crate) due: VecDeque<(Now, BlockIndex, BlockId)>,
    pub(crate) ready: VecDeque<(BlockIndex, BlockId)>,
    pub(crate) urgent: VecDeque<(BlockIndex, BlockId)>,
    /// Blocks that wait for a frame on a device, by space; none of them is empty.
    pub(crate) stalled: BTreeMap<SpaceIndex, Stalled>,
    /// Of these, the one that has its turn next.
    pub(crate) stalled_next: SpaceIndex,
    pub(crate) commit_puts: Vec<Put>,
    pub(crate) commit_deletes: VecDeque<Delete>,
    /// Commits of the round that runs, one a device.
    pub(crate) commits_running: u32,
    /// Clears that could not be recorded, and when they are tried again; one a space.
    pub(crate) clears_again: BTreeMap<SpaceIndex, (Now, Clearing)>,
    pub(crate) write_sequence: u64,
    /// Promises to evict a block last.
    pub(crate) retained: BTreeMap<BlockIndex, Retained>,

    pub(crate) reads_running: u32,
    pub(crate) writes_running: u32,
    pub(crate) verifies_running: u32,
    pub(crate) copies_running: u32,
    pub(crate) ahead: Ahead,
    /// Chunks that are being emptied, and whether something changed for them.
    pub(crate) emptying: BTreeSet<ChunkId>,
    pub(crate) emptying_due: bool,
    /// Frames or chunks came free since the waiting requests last looked.
    pub(crate) memory_changed: bool,
    pub(crate) disk_changed: bool,
    /// Blocks of the catalog are coming in, and nobody is served yet.
    pub(crate) restoring: bool,
    pub(crate) memory_limit: u64,
    /// No frame by frame look for something to evict before.
    pub(crate) sweep_next: Now,
    /// Of the next to be evicted so many are in the processor's cache.
    pub(crate) warm_victims: u32,
    /// The space whose pool was taken from last.
    pub(crate) pool_space: Option<SpaceIndex>,
    pub(crate) create_paused_until: Now,
    /// The last chunk of host memory could not be made.
    pub(crate) create_failed: bool,
    pub(crate) persist_paused_until: Now,
    pub(crate) burst: Burst,
    pub(crate) degraded: bool,
    pub(crate) unpersisted: u64,
    pub(crate) scrub: Scrubber,
}

impl Core {
    /// An empty node.
    pub fn new(config: Config) -> Self {
        let disks = Disks::new(&config.device_slots, config.chunk_bytes);
        let gpus = Gpus::new(&config.hbm);
        let memory_limit = config.pinned_bytes.get();
        let curves = CurveBooks::new(&config);
        Self {
            admit: admit_of(config.admission),
            config,
            now: Now::default(),
            tick: Tick::default(),
            duels: Duels::new(gpus.len()),
            curves,
            effects: VecDeque::new(),
            fences: Vec::new(),
            events: Vec::new(),
            counters: Counters::default(),
            blocks: BlockTable::default(),
            spaces: SpaceTable::default(),
            chunks: ChunkTable::default(),
            disks,
            gpus,
            sessions: BTreeMap::new(),
            departed: Departed::default(),
            tenants: BTreeMap::new(),
            leases: BTreeMap::new(),
            lease_last: 0,
            ops: BTreeMap::new(),
            op_last: 0,
            deadlines: BTreeSet::new(),
            waits: BTreeMap::new(),
            wait_last: 0,
            arrivals: BTreeMap::new(),
            durables: BTreeMap::new(),
            writers: BTreeSet::new(),
            intakes: VecDeque::new(),
            intakes_running: 0,
            wanted: Wanted::default(),
            wanted_stalled: Vec::new(),
            due: VecDeque::new(),
            ready: VecDeque::new(),
            urgent: VecDeque::new(),
            stalled: BTreeMap::new(),
            stalled_next: SpaceIndex(0),
            commit_puts: Vec::new(),
            commit_deletes: VecDeque::new(),
            commits_running: 0,
            clears_again: BTreeMap::new(),
            write_sequence: 0,
            retained: BTreeMap::new(),
            reads_running: 0,
            writes_running: 0,
            verifies_running: 0,
            copies_running: 0,
            ahead: Ahead::default(),
            emptying: BTreeSet::new(),
            emptying_due: false,
            memory_changed: false,
            disk_changed: false,
            restoring: false,
            memory_limit,
            sweep_next: Now::default(),
            warm_victims: 0,
            pool_space: None,
            create_paused_until: Now::default(),
            create_failed: false,
            persist_paused_until: Now::default(),
            burst: Burst::default(),
            degraded: false,
            unpersisted: 0,
            scrub: Scrubber::default(),
        }
    }

    /// Takes one input and queues what follows from it. `now` must not go
    /// back; if it does, time stands still.
    pub fn handle(&mut self, now: Now, input: Input) {
        self.now = self.now.max(now);
        self.expire();
        match input {
            Input::SessionOpened { session, tenant, locality } => {
                self.session_opened(session, tenant, locality)
            }
            Input::SessionResumed { session, client } => self.session_resumed(session, client),
            Input::SessionClosed { session } => self.session_closed(session),
            Input::SpaceKnown { space, tenant, block_bytes, block_tokens, generation } => {
                self.space_known(space, tenant, block_bytes, block_tokens, generation);
            }
            Input::SpaceCost { space, cost } => {
                if let Some(index) = self.spaces.find(space) {
                    self.spaces.at_mut(index).compute.declare(cost);
                }
            }
            Input::Request { session, request, op } => self.request(session, request, op),
            Input::OpDone { op, outcome } => self.op_done(op, outcome),
            Input::BlocksFound { blocks } => self.blocks_found(&blocks),
            Input::BlocksRestored { blocks } => {
                self.restoring = true;
                self.blocks_found(&blocks);
            }
            Input::Restored => {
                self.restoring = false;
                self.counters.circles_cut += self.blocks.cut_circles();
            }
            Input::SlotsUnscanned { device, slots } => self.slots_unscanned(device, &slots),
            Input::SlotsScanned { device, slots } => self.slots_scanned(device, &slots),
            Input::SlotCarved { device, slot, space, frame_bytes } => {
                self.slot_carved(device, slot, space, frame_bytes);
            }
            Input::MemoryLimit { bytes } => {
                self.memory_limit = bytes.get();
                self.curves.resize_pinned(bytes.get().min(self.config.pinned_bytes.get()));
                self.create_paused_until = self.now;
                self.memory_changed = true;
            }
            Input::DeviceState { device, usable } => self.device_state(device, usable),
            Input::GpuState { gpu, usable } => self.gpu_state(gpu, usable),
            Input::Degraded { degraded } => self.set_degraded(degraded),
            Input::Scrub(what) => self.scrub_told(what),
            Input::Tick => {}
        }
        self.pump();
    }

    /// The next thing to do. Drain it after each [`Core::handle`].
    pub fn poll_effect(&mut self) -> Option<Effect> {
        if !self.fences.is_empty() {
            return Some(Effect::SetFences { fences: take_all(&mut self.fences) });
        }
        let next = self.effects.pop_front();
        if next.is_none() && !self.events.is_empty() {
            return Some(Effect::Publish { events: take_all(&mut self.events) });
        }
        next
    }

    /// When [`Input::Tick`] is wanted at the latest. Stale after any input.
    pub fn next_deadline(&self) -> Option<Now> {
        let timed = self.deadlines.first().map(|&(at, _)| at);
        let due = self.due.front().map(|&(at, _, _)| at);
        let lull = self.burst.end().filter(|&end| end > self.now && self.is_held_back());
        [timed, due, lull].into_iter().flatten().min()
    }

    /// Everything whose time has come.
    fn expire(&mut self) {
        while let Some(&(at, deadline)) = self.deadlines.first() {
            if at > self.now {
                break;
            }
            self.deadlines.pop_first();
            match deadline {
                Deadline::Lease(lease) => self.lease_expired(lease),
                Deadline::Answer(wait) => self.answer_due(wait),
                Deadline::WindowIdle(chunk) => self.window_idle(chunk),
                Deadline::WindowRecalled(chunk) => self.window_overdue(chunk),
                Deadline::Retain(block, id) => self.retain_ended(block, id),
                Deadline::Retry => {
                    self.memory_changed = true;
                    self.disk_changed = true;
                    self.emptying_due = true;
                    self.clear_again();
                }
                Deadline::Scrub => {}
            }
        }
        while let Some(&(at, block, id)) = self.due.front() {
            if at > self.now {
                break;
            }
            self.due.pop_front();
            self.ready.push_back((block, id));
        }
        self.forget_queued();
    }

    /// Starts whatever can be started. Each round needs a frame that came free,
    /// so it ends.
    fn pump(&mut self) {
        loop {
            let memory = std::mem::take(&mut self.memory_changed);
            let disk = std::mem::take(&mut self.disk_changed);
            if memory {
                self.pump_writers();
                self.want_stalled();
            }
            if disk {
                self.stalled.values_mut().for_each(Stalled::ask_again);
            }
            self.pump_arrivals();
            if !self.gpus.is_empty() {
                self.pump_gpus(memory);
            }
            self.pump_intakes();
            self.pump_emptying();
            self.pump_writes();
            self.pump_commit();
            self.ahead.due |= memory;
            self.pump_ahead();
            self.pump_reserve();
            self.pump_frames();
            self.pump_scrub();
            self.pump_lessons();
            if !self.memory_changed && !self.disk_changed {
                break;
            }
        }
    }

    /// An operation ended. It is known exactly once; anything else is the shell's mistake.
    fn op_done(&mut self, id: OpId, outcome: Result<Done, Fault>) {
        let op = self.ops.remove(&id);
        assert!(op.is_some(), "operation {id} is not in flight");
        let Some(op) = op else { return };
        let outcome = outcome.map(|_| ());
        match op {
            Op::CreateChunk { chunk } => self.chunk_created(chunk, outcome),
            Op::CloseWindow { chunk } => self.window_closed(chunk, outcome),
            Op::DropChunk { chunk } => self.chunk_dropped(chunk, outcome),
            Op::Read { block, source, target, sent, class: _, stuck } => {
                self.read_ended(source.device, stuck);
                self.read_done(id, block, (source, sent), target, outcome);
            }
            Op::Write { block, source, fence, target, header, via, stuck } => {
                self.write_ended(target.device, stuck);
                self.write_done(block, (source, fence), target, header, via, outcome);
            }
            Op::CarveSlot { device, slot, space } => self.carve_done(device, slot, space, outcome),
            Op::Commit { puts, deletes } => self.commit_done(&puts, &deletes, outcome),
            Op::ClearSpace { clearing, wait } => self.clear_done(clearing, wait, outcome),
            Op::Verify { block, frame, fence } => self.verify_done(id, block, frame, fence, outcome),
            Op::Copy { block, source, fence, target, sent } => {
                self.copy_done(id, block, (source, fence), (target, sent), outcome);
            }
            Op::Intake { intake, target } => self.intake_done(intake, target, outcome),
            Op::Scrub { block, source } => self.scrub_done(block, source, outcome),
        }
        self.emptying_due = true;
    }

    /// Registers a slow effect.
    pub(crate) fn start(&mut self, op: Op) -> OpId {
        self.op_last += 1;
        let id = OpId::new(self.op_last);
        self.ops.insert(id, op);
        id
    }

    pub(crate) fn at(&mut self, when: Now, deadline: Deadline) {
        self.deadlines.insert((when, deadline));
    }

    /// Nvme takes blocks: there is a usable device and the catalog is well.
    pub(crate) fn is_persisting(&self) -> bool {
        !self.degraded && self.disks.any_usable()
    }

    /// What the header page of a block's copy says.
    pub(crate) fn header_of(&self, index: BlockIndex, write_sequence: u64) -> BlockHeader {
        let block = self.blocks.at(index);
        let space = self.spaces.at(block.space);
        let checksum = block.seal().expect("a block with a copy has been sealed");
        BlockHeader {
            block: block.id,
            space: space.id,
            tenant: space.tenant,
            parent: block.parent.map(|parent| self.blocks.at(parent).id),
            length: space.block_bytes,
            checksum,
            generation: space.generation,
            write_sequence,
        }
    }
}

/// Which sealed blocks are worth a write; `None` is every one.
fn admit_of(admission: Admission) -> Option<Admit> {
    match admission {
        Admission::All => None,
        Admission::Learned { bytes_per_day } => {
            Some(Admit::new(WriteBudget::new(bytes_per_day, Now::default())))
        }
    }
}

/// Empties a list that will be as long again soon.
fn take_all<T>(list: &mut Vec<T>) -> Vec<T> {
    let next = Vec::with_capacity(list.len());
    std::mem::replace(list, next)
}
