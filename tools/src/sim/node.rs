//! A node without hardware: the core of `terraced`, and a model of what it
//! drives. Effects take the time that memory and devices would take; nothing
//! moves.
//!
//! Promises: equal calls give equal replies at equal times. Leaves requests,
//! workers and sessions to the caller.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

use terrace_core::{
    Admission, ByteCount, ComputeCost, Config, Core, Counters, DeviceId, Done, Effect, Fault,
    HEADER_PAGE_BYTES, Input, IoClass, Limits, Locality, Micros, Now, OpId, Policy, Reply, Request,
    RequestId, SessionId, SpaceId, TenantId, TierViews, TokenCount,
};

/// A commit of the catalog: sync and batch.
const COMMIT_MICROS: u64 = 1_000;
/// A lease of the simulation does not expire: its holder lives as long as it.
const FOREVER: Micros = Micros::new(1 << 60);

/// One device of the Nvme tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DeviceModel {
    /// Bytes read in a second.
    pub(crate) read_rate: f64,
    /// Bytes written in a second.
    pub(crate) write_rate: f64,
    /// Added to every transfer, in microseconds.
    pub(crate) latency: u64,
}

/// What the node has, and how it decides.
#[derive(Clone, Debug)]
pub(crate) struct Hardware {
    /// Payload of a block.
    pub(crate) block_bytes: u64,
    /// Tokens of a block.
    pub(crate) block_tokens: u32,
    /// Frames of Pinned that eviction keeps free for new blocks.
    pub(crate) frames_ready: u32,
    /// Size of a chunk of any tier.
    pub(crate) chunk_bytes: u64,
    /// Chunks of the Pinned tier.
    pub(crate) pinned_chunks: u64,
    /// Chunk slots of each device.
    pub(crate) device_slots: Vec<u32>,
    /// Every device.
    pub(crate) device: DeviceModel,
    /// Bytes a second that memory copies.
    pub(crate) memory_rate: f64,
    /// Clients: each has a session of its own.
    pub(crate) clients: u32,
    /// Blocks of the longest prompt.
    pub(crate) blocks_per_request: usize,
    /// Longest that a write waits for memory, in microseconds.
    pub(crate) patience: u64,
    /// What is evicted first.
    pub(crate) policy: Policy,
    /// What is copied to Nvme.
    pub(crate) admission: Admission,
    /// What computing a block costs.
    pub(crate) cost: ComputeCost,
}

impl Hardware {
    /// Frames of Pinned.
    pub(crate) fn pinned_frames(&self) -> u64 {
        self.pinned_chunks * (self.chunk_bytes / (self.block_bytes + HEADER_PAGE_BYTES))
    }

    /// Frames of all devices.
    pub(crate) fn nvme_frames(&self) -> u64 {
        let per_slot = (self.chunk_bytes - HEADER_PAGE_BYTES) / (self.block_bytes + HEADER_PAGE_BYTES);
        self.device_slots.iter().map(|&slots| u64::from(slots) * per_slot).sum()
    }
}

/// Bytes and blocks that went over the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Blocks written to Nvme.
    pub(crate) blocks_written: u64,
    /// Bytes written to Nvme.
    pub(crate) bytes_written: u64,
    /// Bytes read from Nvme.
    pub(crate) bytes_read: u64,
}

/// What ends at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// An operation of the core.
    Op(u64),
    /// A device can start its next transfer.
    Device(usize),
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// A transfer that waits for its device.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    op: OpId,
    direction: Direction,
}

/// One transfer at a time, the most urgent class first.
#[derive(Debug)]
struct Device {
    queues: BTreeMap<IoClass, VecDeque<Transfer>>,
    busy: bool,
}

/// The node.
pub(crate) struct Node {
    core: Core,
    now: u64,
    hardware: Hardware,
    frame_bytes: u64,
    timers: BinaryHeap<Reverse<(u64, u64, Timer)>>,
    timer_last: u64,
    /// Operations that take no time.
    instant: VecDeque<(OpId, Result<Done, Fault>)>,
    devices: Vec<Device>,
    request_last: u64,
    replies: VecDeque<(RequestId, Reply)>,
    traffic: Traffic,
}

impl Node {
    /// A node with empty tiers.
    pub(crate) fn new(hardware: Hardware) -> Self {
        let device = || Device { queues: BTreeMap::new(), busy: false };
        let devices = hardware.device_slots.iter().map(|_| device()).collect();
        let mut node = Self {
            core: Core::new(config(&hardware)),
            now: 0,
            frame_bytes: hardware.block_bytes + HEADER_PAGE_BYTES,
            hardware,
            timers: BinaryHeap::new(),
            timer_last: 0,
            instant: VecDeque::new(),
            devices,
            request_last: 0,
            replies: VecDeque::new(),
            traffic: Traffic::default(),
        };
        let tenant = TenantId::from_bytes([1; 16]);
        let block_bytes = ByteCount::new(node.hardware.block_bytes);
        for client in 0..node.hardware.clients {
            let session = session_of(client);
            node.tell(Input::SessionOpened { session, tenant, locality: Locality::Streamed });
        }
        let block_tokens = TokenCount::new(node.hardware.block_tokens);
        let space = Self::SPACE;
        node.tell(Input::SpaceKnown { space, tenant, block_bytes, block_tokens, generation: 0 });
        node.tell(Input::SpaceCost { space: Self::SPACE, cost: node.hardware.cost });
        node
    }

    /// The space of all blocks.
    pub(crate) const SPACE: SpaceId = SpaceId::from_bytes([1; 16]);

    /// The time inside the node.
    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// A client asks the core something now. Its reply comes at once or later; see [`Node::reply`].
    pub(crate) fn ask(&mut self, client: u32, op: Request) -> RequestId {
        self.request_last += 1;
        let request = RequestId::new(self.request_last);
        self.tell(Input::Request { session: session_of(client), request, op });
        request
    }

    /// A client asks what is answered without waiting.
    pub(crate) fn ask_now(&mut self, client: u32, op: Request) -> Reply {
        let request = self.ask(client, op);
        self.take_reply(request).expect("this kind of request is answered at once")
    }

    /// A client asks and waits as long as it takes.
    pub(crate) fn ask_and_wait(&mut self, client: u32, op: Request) -> Reply {
        let request = self.ask(client, op);
        loop {
            if let Some(reply) = self.take_reply(request) {
                return reply;
            }
            let next = self.next().expect("a request that waits has a deadline");
            self.advance(next);
        }
    }

    fn take_reply(&mut self, request: RequestId) -> Option<Reply> {
        let place = self.replies.iter().position(|(answered, _)| *answered == request)?;
        self.replies.remove(place).map(|(_, reply)| reply)
    }

    /// A number for a request that may be repeated; never used before.
    pub(crate) fn repeat(&self) -> u64 {
        self.request_last + 1
    }

    /// The oldest reply that was not fetched.
    pub(crate) fn reply(&mut self) -> Option<(RequestId, Reply)> {
        self.replies.pop_front()
    }

    /// When something happens inside the node next.
    pub(crate) fn next(&self) -> Option<u64> {
        let timer = self.timers.peek().map(|Reverse((at, _, _))| *at);
        let deadline = self.core.next_deadline().map(Now::micros);
        timer.into_iter().chain(deadline).min()
    }

    /// Time passes up to `at`. What ends at that moment ends; call it again while [`Node::next`] is not later.
    pub(crate) fn advance(&mut self, at: u64) {
        self.now = self.now.max(at);
        let mut ticked = false;
        while let Some(&Reverse((due, _, timer))) = self.timers.peek()
            && due <= self.now
        {
            self.timers.pop();
            ticked = true;
            match timer {
                Timer::Op(op) => self.tell(Input::OpDone { op: OpId::new(op), outcome: Ok(Done::Plain) }),
                Timer::Device(place) => {
                    self.devices[place].busy = false;
                    self.start_transfer(place);
                }
            }
        }
        if !ticked || self.core.next_deadline().is_some_and(|due| due.micros() <= self.now) {
            self.tell(Input::Tick);
        }
    }

    /// What the core counted.
    pub(crate) fn counters(&self) -> Counters {
        *self.core.counters()
    }

    /// Tiers as the core sees them.
    pub(crate) fn tiers(&self) -> TierViews {
        self.core.tier_views()
    }

    /// What went over the devices.
    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// The core's own consistency check: a walk of all its tables.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.core.check();
    }

    fn tell(&mut self, input: Input) {
        self.core.handle(Now::from_micros(self.now), input);
        self.drain();
        while let Some((op, outcome)) = self.instant.pop_front() {
            self.core.handle(Now::from_micros(self.now), Input::OpDone { op, outcome });
            self.drain();
        }
    }

    fn drain(&mut self) {
        while let Some(effect) = self.core.poll_effect() {
            self.perform(effect);
        }
    }

    /// Starts an effect. Fences, events and mappings have nobody to tell here.
    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Reply { session: _, request, reply } => {
                self.replies.push_back((request, Arc::unwrap_or_clone(reply)));
            }
            Effect::EndSession { .. }
            | Effect::Notify { .. }
            | Effect::SetFences { .. }
            | Effect::Publish { .. } => {}
            Effect::CreateChunk { op, .. } => self.instant.push_back((op, Ok(Done::ChunkCreated))),
            Effect::CloseWindow { op, .. }
            | Effect::DropChunk { op, .. }
            | Effect::CarveSlot { op, .. }
            | Effect::Verify { op, .. } => {
                self.instant.push_back((op, Ok(Done::Plain)));
            }
            Effect::Read { op, source, class, .. } => {
                self.queue(source.device, class, Transfer { op, direction: Direction::Read });
            }
            Effect::Write { op, target, class, .. } => {
                self.queue(target.device, class, Transfer { op, direction: Direction::Write });
            }
            Effect::Scrub { op, source, .. } => {
                self.queue(source.device, IoClass::Scrub, Transfer { op, direction: Direction::Read });
            }
            Effect::Promote { op, device, class } => {
                if let Some(transfer) = self.unqueue(device, op) {
                    self.queue(device, class, transfer);
                }
            }
            Effect::Cancel { op, device } => {
                if self.unqueue(device, op).is_some() {
                    self.instant.push_back((op, Err(Fault::NotStarted)));
                }
            }
            Effect::Commit { op, .. } | Effect::ClearSpace { op, .. } => {
                self.timer(COMMIT_MICROS, Timer::Op(op.get()));
            }
            Effect::Copy { op, .. } => {
                let micros = transfer_micros(self.frame_bytes, self.hardware.memory_rate);
                self.timer(micros, Timer::Op(op.get()));
            }
        }
    }

    fn queue(&mut self, device: DeviceId, class: IoClass, transfer: Transfer) {
        let place = usize::from(device.get());
        self.devices[place].queues.entry(class).or_default().push_back(transfer);
        self.start_transfer(place);
    }

    /// Takes a transfer back that its device has not started.
    fn unqueue(&mut self, device: DeviceId, op: OpId) -> Option<Transfer> {
        let mut queues = self.devices[usize::from(device.get())].queues.values_mut();
        queues.find_map(|queue| {
            let place = queue.iter().position(|transfer| transfer.op == op)?;
            queue.remove(place)
        })
    }

    fn start_transfer(&mut self, place: usize) {
        let device = &mut self.devices[place];
        if device.busy {
            return;
        }
        let next = device.queues.values_mut().find_map(VecDeque::pop_front);
        let Some(Transfer { op, direction }) = next else { return };
        device.busy = true;
        let rate = match direction {
            Direction::Read => {
                self.traffic.bytes_read += self.frame_bytes;
                self.hardware.device.read_rate
            }
            Direction::Write => {
                self.traffic.blocks_written += 1;
                self.traffic.bytes_written += self.frame_bytes;
                self.hardware.device.write_rate
            }
        };
        let micros = transfer_micros(self.frame_bytes, rate);
        self.timer(micros + self.hardware.device.latency, Timer::Op(op.get()));
        self.timer(micros, Timer::Device(place));
    }

    fn timer(&mut self, after: u64, timer: Timer) {
        self.timer_last += 1;
        self.timers.push(Reverse((self.now + after, self.timer_last, timer)));
    }
}

fn session_of(client: u32) -> SessionId {
    SessionId::new(u64::from(client) + 1)
}

/// Microseconds that `bytes` take at `rate` bytes a second, at least one.
pub(crate) fn transfer_micros(bytes: u64, rate: f64) -> u64 {
    #[expect(clippy::cast_precision_loss, reason = "a transfer is far shorter than 2^53 bytes")]
    let bytes = bytes as f64;
    micros(bytes / rate).max(1)
}

/// Seconds as whole microseconds; beyond the end of time it is the end of time.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a conversion that saturates is what is wanted"
)]
pub(crate) fn micros(seconds: f64) -> u64 {
    ((seconds * 1e6).round() as u64).min(1 << 60)
}

/// The one place where the core of the simulation is configured.
fn config(hardware: &Hardware) -> Config {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let devices = count(hardware.device_slots.len());
    Config {
        incarnation: 1,
        pinned_bytes: ByteCount::new(hardware.pinned_chunks * hardware.chunk_bytes),
        chunk_bytes: ByteCount::new(hardware.chunk_bytes),
        device_slots: hardware.device_slots.clone(),
        hbm: Vec::new(),
        persist_delay: Micros::from_millis(1000),
        window_idle: Micros::from_millis(30_000),
        window_recall_max: Micros::from_millis(10_000),
        // Windows are for clients that map memory; the simulated one streams.
        chunks_ready_min: 0,
        frames_ready_min: hardware.frames_ready,
        policy: hardware.policy,
        admission: hardware.admission,
        limits: Limits {
            blocks: u32::MAX,
            spaces: 1,
            sessions: hardware.clients,
            leases_per_session: u32::MAX,
            blocks_per_request: count(hardware.blocks_per_request).max(1),
            leases_per_tenant: u32::MAX,
            leased_bytes_per_tenant: ByteCount::new(1 << 60),
            leased_bytes_per_session: ByteCount::new(1 << 60),
            lease_hold_max: FOREVER,
            requests_waiting_per_session: 1 << 20,
            requests_waiting_per_tenant: 1 << 20,
            lease_ttl_max: FOREVER,
            lease_ttl_default: Micros::new(hardware.patience),
            requests_waiting: 1 << 20,
            reads_in_flight: devices.saturating_mul(32).max(32),
            writes_in_flight: devices.saturating_mul(16).max(16),
            replies_remembered: 1,
            retained_percent: 0,
        },
    }
}

/// How long a lease of the simulation lives.
pub(crate) const LEASE_TTL: Option<Micros> = Some(FOREVER);
