//! The scheduler in front of a device: classes, a cap on what the device has at
//! once, deadlines, and the end of the wait for a device that does not answer.
//!
//! Promises: every request is answered once. What the device has is never
//! called back: its buffer stays with it until it answers, however late. What it
//! does not have yet can be promoted or taken back, and is taken back when the
//! device is given up. Reads of neighbours that wait together go as one; if that
//! fails, each goes by itself. Nothing is answered from inside `submit`,
//! `promote` or `cancel`, because their callers hold locks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{DeviceId, Fault, IoClass, OpId};

use super::classes::{ClassQueues, Room, is_background};
use super::health::{Health, Standing};
use super::later;
use super::{AlignedPages, BlockIo, IoBuffer, IoDone, IoFacts, IoOp, IoRequest};
use crate::memory::PAGE_BYTES;

/// Far above the core's own limits of reads and writes in flight.
const REQUESTS_MAX: usize = 65_536;
/// I/Os that the device has at once. The cap on bytes is usually reached first.
const RUNNING_MAX: usize = 128;
/// Background classes leave this part of the bytes to the others.
const BACKGROUND_PART: u64 = 2;
/// Longest run of requests that the device gets as one: where each request costs the same to tell, fewer cost less, and
/// beyond this size that is nothing.
const RUN_BYTES_MAX: u64 = 3 << 19;
/// The device has at least so many runs at once.
const RUN_PART: u64 = 4;
/// What is not answered after so many patiences is taken for stuck.
const STUCK_PATIENCES: u32 = 3;
/// A look that comes this part of a patience after the last one was kept from coming: the process stood still, or had
/// no processor.
const LATE_PART: u32 = 4;
/// Part of the pool's memory that a device may keep.
const STUCK_PART: u64 = 100;

/// Told when a device is taken out (false) and when it is back (true).
pub type DeviceChanged = Box<dyn Fn(DeviceId, bool) + Send + Sync>;

/// The limits of a scheduler.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Until a read or write counts as overdue.
    pub(crate) io: Duration,
    /// The same of a sync.
    pub(crate) sync: Duration,
}

/// Wakes the thread that looks after the schedulers of one store.
#[derive(Default)]
pub(crate) struct Alarm {
    state: Mutex<(bool, bool)>,
    wake: Condvar,
    pub(crate) changed: OnceLock<DeviceChanged>,
}

impl Alarm {
    pub(crate) fn ring(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = true;
        self.wake.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.wake.notify_one();
    }

    /// Waits to be rung, but no longer than this. False: stop.
    pub(crate) fn wait(&self, longest: Duration) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut state, _) = self
            .wake
            .wait_timeout_while(state, longest, |(rung, stop)| !*rung && !*stop)
            .unwrap_or_else(PoisonError::into_inner);
        state.0 = false;
        !state.1
    }

    fn tell(&self, device: DeviceId, usable: bool) {
        if let Some(changed) = self.changed.get() {
            changed(device, usable);
        }
    }
}

/// A device with its queue.
pub(crate) struct Scheduler(Arc<Inner>);

struct Inner {
    device: DeviceId,
    io: Arc<dyn BlockIo>,
    alarm: Arc<Alarm>,
    patience: Patience,
    state: Mutex<State>,
    quiet: Condvar,
}

struct State {
    queues: ClassQueues<IoRequest>,
    running: Vec<Option<Running>>,
    vacant: Vec<usize>,
    bytes_running: u64,
    bytes_background: u64,
    bytes_max: u64,
    health: Health,
    /// Empty; keeps its memory.
    run: Vec<IoRequest>,
    /// To be answered by the watch.
    refused: Vec<(IoRequest, Fault)>,
    probing: bool,
    looked: Instant,
    /// I/Os that were given up and then answered.
    late: u64,
}

/// What the device has.
struct Running {
    op: IoOp,
    class: IoClass,
    bytes: u64,
    /// Bytes that the device had when it got this one, this one included.
    ahead: u64,
    since: Instant,
    /// `None`: a sync whose wait was ended.
    done: Option<IoDone>,
    probe: bool,
    /// Counted once as the reason to take the device out.
    given_up: bool,
}

impl Scheduler {
    pub(crate) fn new(
        device: DeviceId,
        io: Arc<dyn BlockIo>,
        bytes_max: u64,
        patience: Patience,
        alarm: Arc<Alarm>,
    ) -> Self {
        let state = State {
            queues: ClassQueues::new(),
            running: Vec::new(),
            vacant: Vec::new(),
            bytes_running: 0,
            bytes_background: 0,
            bytes_max: bytes_max.max(PAGE_BYTES),
            health: Health::new(),
            run: Vec::new(),
            refused: Vec::new(),
            probing: false,
            looked: Instant::now(),
            late: 0,
        };
        let (state, quiet) = (Mutex::new(state), Condvar::new());
        Self(Arc::new(Inner { device, io, alarm, patience, state, quiet }))
    }

    /// As `submit`, with a name by which it can be promoted or cancelled.
    pub(crate) fn submit_tagged(&self, tag: Option<OpId>, request: IoRequest) {
        let inner = &self.0;
        if matches!(request.op, IoOp::Forget(_)) {
            return inner.io.submit(request);
        }
        let mut state = inner.lock();
        let full = state.queues.len() >= REQUESTS_MAX;
        if full || !state.health.is_well() {
            if full {
                tracing::error!(op = ?request.op, "device queue full: request refused");
            }
            state.refused.push((request, Fault::NotStarted));
            drop(state);
            return inner.alarm.ring();
        }
        if request.op == IoOp::Sync {
            let request = inner.begin(&mut state, request, false);
            drop(state);
            return inner.io.submit(request);
        }
        state.queues.push(request.class, request.bytes, tag, Instant::now(), request);
        inner.pump(state);
    }

    /// Raises the class of a request that waits.
    pub(crate) fn promote(&self, tag: OpId, class: IoClass) {
        self.0.lock().queues.promote(tag, class, Instant::now());
    }

    /// Takes back a request that waits: it is answered with [`Fault::NotStarted`].
    pub(crate) fn cancel(&self, tag: OpId) {
        let mut state = self.0.lock();
        if let Some(request) = state.queues.cancel(tag) {
            state.refused.push((request, Fault::NotStarted));
            drop(state);
            self.0.alarm.ring();
        }
    }

    /// May it be given work?
    pub(crate) fn is_usable(&self) -> bool {
        self.0.lock().health.is_well()
    }

    /// Bytes that the device has at once, at most.
    pub(crate) fn set_bytes_max(&self, bytes: u64) {
        self.0.lock().bytes_max = bytes.max(PAGE_BYTES);
    }

    /// For `info`: what is wrong with it (empty if nothing), requests that wait by class, late answers.
    pub(crate) fn condition(&self) -> (String, [u64; 6], u64) {
        let state = self.0.lock();
        (state.health.sentence(Instant::now()), state.queues.lengths(), state.late)
    }

    /// How much slower it is than it was.
    pub(crate) fn slowdown(&self) -> f64 {
        self.0.lock().health.slowdown()
    }

    /// Gives it no work any more in this life. The core is told.
    pub(crate) fn eject(&self, reason: String) {
        let inner = &self.0;
        inner.take_out(inner.lock(), reason.clone(), Instant::now());
        inner.lock().health.eject(reason);
    }

    /// Looks after deadlines, and answers what was refused. `peers` is the
    /// middle of the other devices' slowdowns; `pool` the bytes of all chunks.
    pub(crate) fn look(&self, peers: Option<f64>, pool: u64) {
        let inner = &self.0;
        let now = Instant::now();
        let mut state = inner.lock();
        state.forgive_standstill(now, inner.patience.io / LATE_PART);
        match &state.health.standing {
            Standing::Well => {
                let reason = inner.overdue(&state, now).or_else(|| state.health.complaint(peers));
                // It answers others, but not those that it lost.
                let reason = reason.or_else(|| inner.hoards(&state, now, pool));
                if let Some(reason) = reason {
                    return inner.take_out(state, reason, now);
                }
            }
            Standing::Out { .. } => {
                if let Some(reason) = inner.hoards(&state, now, pool) {
                    tracing::error!(device = %inner.device, reason, "a device is ejected");
                    state.health.eject(reason);
                } else if !state.probing && state.health.probe_due(now) {
                    return inner.probe(state);
                }
            }
            Standing::Ejected { .. } => {}
        }
        inner.answer_refused(state);
    }
}

impl State {
    /// Time in which we did not look is not held against the device: it may have answered, and nobody heard.
    fn forgive_standstill(&mut self, now: Instant, allowed: Duration) {
        let stood = now.saturating_duration_since(self.looked).saturating_sub(allowed);
        self.looked = now;
        for running in self.running.iter_mut().flatten() {
            running.since = (running.since + stood).min(now);
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the device all that it may have.
    fn pump(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        // Mostly one, as one ends and another begins.
        let mut first = None;
        let mut rest = Vec::new();
        let mut run = std::mem::take(&mut state.run);
        while state.running.len() - state.vacant.len() < RUNNING_MAX {
            let idle = state.bytes_running == 0;
            let room = if idle { u64::MAX } else { state.bytes_max.saturating_sub(state.bytes_running) };
            let of_background = state.bytes_max / BACKGROUND_PART;
            let background = match state.bytes_background {
                0 => u64::MAX,
                held => of_background.saturating_sub(held),
            };
            let room = Room {
                bytes: room,
                background,
                run: RUN_BYTES_MAX.min(state.bytes_max / RUN_PART),
                may_wait: state.bytes_running > state.bytes_max / 2,
            };
            if state.queues.pick(Instant::now(), room, joins, &mut run).is_none() {
                break;
            }
            let Some(request) = self.join(&mut run) else { break };
            let request = self.begin(&mut state, request, false);
            match first {
                None => first = Some(request),
                Some(_) => rest.push(request),
            }
        }
        state.run = run;
        drop(state);
        first.into_iter().chain(rest).for_each(|request| self.io.submit(request));
    }

    /// One I/O for a run of requests; it leaves the vector empty.
    fn join(self: &Arc<Self>, run: &mut Vec<IoRequest>) -> Option<IoRequest> {
        if run.len() < 2 {
            return run.pop();
        }
        let parts: Vec<IoRequest> = std::mem::take(run);
        let first = &parts[0];
        let IoBuffer::Frame(memory, index) = &first.buffer else { unreachable!("only frames join") };
        let count = u32::try_from(parts.len()).expect("a run is short");
        let buffer = IoBuffer::Frames(Arc::clone(memory), *index, count);
        let bytes = parts.iter().map(|part| part.bytes).sum();
        let (op, offset, class) = (first.op, first.offset, first.class);
        let inner = Arc::clone(self);
        let done = move |buffer: IoBuffer, outcome: Result<(), Fault>| {
            drop(buffer);
            match outcome {
                Ok(()) => parts.into_iter().for_each(|part| (part.done)(part.buffer, Ok(()))),
                Err(fault) => inner.separate(parts, fault),
            }
        };
        Some(IoRequest { op, offset, bytes, buffer, class, done: Box::new(done) })
    }

    /// A run failed: the device is asked for each of it by itself, so that none fails for its neighbours.
    fn separate(self: &Arc<Self>, parts: Vec<IoRequest>, fault: Fault) {
        for part in parts {
            let mut state = self.lock();
            if !state.health.is_well() {
                drop(state);
                (part.done)(part.buffer, Err(fault));
                continue;
            }
            let request = self.begin(&mut state, part, false);
            drop(state);
            self.io.submit(request);
        }
    }

    /// Notes that the device gets a request.
    fn begin(self: &Arc<Self>, state: &mut State, request: IoRequest, probe: bool) -> IoRequest {
        let IoRequest { op, offset, bytes, buffer, class, done } = request;
        state.bytes_running += bytes;
        if is_background(class) {
            state.bytes_background += bytes;
        }
        let ahead = state.bytes_running;
        let (since, done) = (Instant::now(), Some(done));
        let running = Running { op, class, bytes, ahead, since, done, probe, given_up: false };
        let index = match state.vacant.pop() {
            Some(index) => {
                state.running[index] = Some(running);
                index
            }
            None => {
                state.running.push(Some(running));
                state.running.len() - 1
            }
        };
        let inner = Arc::clone(self);
        let done: IoDone = Box::new(move |buffer, outcome| inner.ended(index, buffer, outcome));
        IoRequest { op, offset, bytes, buffer, class, done }
    }

    /// The device answered.
    fn ended(self: Arc<Self>, index: usize, buffer: IoBuffer, outcome: Result<(), Fault>) {
        let mut state = self.lock();
        let ended = state.running[index].take().expect("the device answers once");
        state.vacant.push(index);
        state.bytes_running -= ended.bytes;
        if is_background(ended.class) {
            state.bytes_background -= ended.bytes;
        }
        if ended.given_up {
            state.late += 1;
        }
        let now = Instant::now();
        let took = now.saturating_duration_since(ended.since);
        if ended.probe {
            return self.probed(state, outcome, took, now);
        }
        if !ended.given_up {
            observe(&mut state.health, &ended, took, outcome);
        }
        if state.running.len() == state.vacant.len() && state.queues.len() == 0 {
            self.quiet.notify_all();
        }
        self.pump(state);
        if let Some(done) = ended.done {
            later::answer(done, buffer, outcome);
        }
    }

    /// What has waited for the device for too long.
    fn overdue(&self, state: &State, now: Instant) -> Option<String> {
        let longest = |running: &Running| match running.op {
            IoOp::Read | IoOp::Write | IoOp::Forget(_) => self.patience.io,
            IoOp::Sync => self.patience.sync,
        };
        let waited = |running: &Running| now.saturating_duration_since(running.since);
        let late = state.running.iter().flatten().filter(|running| !running.given_up);
        let mut late = late.filter(|running| waited(running) > longest(running));
        late.next().map(|running| {
            let kind = match running.op {
                IoOp::Read => "read",
                IoOp::Write => "write",
                IoOp::Sync | IoOp::Forget(_) => "sync",
            };
            format!("no answer to a {kind} for {} ms", waited(running).as_millis())
        })
    }

    /// Frames that nobody can use because the device does not answer, if they are too many.
    fn hoards(&self, state: &State, now: Instant, pool: u64) -> Option<String> {
        let stuck = |running: &&Running| {
            now.saturating_duration_since(running.since) > self.patience.io * STUCK_PATIENCES
        };
        let stuck: u64 = state.running.iter().flatten().filter(stuck).map(|running| running.bytes).sum();
        (stuck > pool / STUCK_PART).then(|| format!("it keeps {stuck} bytes of the pool's {pool}"))
    }

    /// Ends every wait. The core hears first, so that it starts nothing there any more.
    fn take_out(&self, mut state: MutexGuard<'_, State>, reason: String, now: Instant) {
        tracing::error!(device = %self.device, reason, "a device is taken out; its blocks are misses");
        state.health.take_out(reason, now);
        let drained = state.queues.drain();
        state.refused.extend(drained.into_iter().map(|request| (request, Fault::NotStarted)));
        let mut syncs = Vec::new();
        for running in state.running.iter_mut().flatten() {
            running.given_up = true;
            if running.op == IoOp::Sync {
                syncs.extend(running.done.take());
            }
        }
        drop(state);
        self.alarm.tell(self.device, false);
        syncs.into_iter().for_each(|done| done(IoBuffer::Nothing, Err(Fault::Device)));
        self.answer_refused(self.lock());
    }

    fn answer_refused(&self, mut state: MutexGuard<'_, State>) {
        let refused = std::mem::take(&mut state.refused);
        drop(state);
        for (request, fault) in refused {
            (request.done)(request.buffer, Err(fault));
        }
    }

    /// Asks a device that is out for the first page of its superblock.
    fn probe(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        state.probing = true;
        let request = IoRequest {
            op: IoOp::Read,
            offset: 0,
            bytes: PAGE_BYTES,
            buffer: IoBuffer::Pages(AlignedPages::new(PAGE_BYTES)),
            class: IoClass::DecodeFetch,
            done: Box::new(|_, _| {}),
        };
        let request = self.begin(&mut state, request, true);
        drop(state);
        self.io.submit(request);
        self.answer_refused(self.lock());
    }

    fn probed(
        &self,
        mut state: MutexGuard<'_, State>,
        outcome: Result<(), Fault>,
        took: Duration,
        now: Instant,
    ) {
        state.probing = false;
        let back = state.health.probed(outcome.is_ok(), took, now);
        drop(state);
        if back {
            tracing::warn!(device = %self.device, "a device that had been taken out is back");
            self.alarm.tell(self.device, true);
        }
    }

    /// Waits until nothing is queued or runs, as long as the device has patience with us.
    fn wait_quiet(&self) {
        let state = self.lock();
        let busy = |state: &mut State| {
            let running = state.running.iter().flatten().any(|running| !running.given_up);
            running || state.queues.len() > 0
        };
        let (state, _) = self
            .quiet
            .wait_timeout_while(state, self.patience.io, busy)
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
    }
}

/// Can one I/O read both? They lie behind each other on the device and in memory.
fn joins(one: &IoRequest, next: &IoRequest) -> bool {
    let fills = match &one.buffer {
        IoBuffer::Frame(memory, _) => memory.frame_bytes().get() == one.bytes,
        IoBuffer::Nothing | IoBuffer::Frames(..) | IoBuffer::Pages(_) => false,
    };
    let reads = one.op == IoOp::Read && next.op == IoOp::Read;
    fills && reads && one.offset + one.bytes == next.offset && one.buffer.is_followed_by(&next.buffer)
}

fn observe(health: &mut Health, ended: &Running, took: Duration, outcome: Result<(), Fault>) {
    match (ended.op, outcome) {
        (IoOp::Read, Ok(())) => {
            health.read_ended(true);
            health.reads.observe(took, ended.ahead);
        }
        (IoOp::Read, Err(Fault::Device)) => health.read_ended(false),
        (IoOp::Write, Ok(())) => health.writes.observe(took, ended.ahead),
        (IoOp::Read | IoOp::Write, Err(_)) | (IoOp::Sync | IoOp::Forget(_), _) => {}
    }
}

impl BlockIo for Scheduler {
    fn submit(&self, request: IoRequest) {
        self.submit_tagged(None, request);
    }

    fn facts(&self) -> IoFacts {
        let mut facts = self.0.io.facts();
        let state = self.0.lock();
        // What the device counts is among what runs.
        let running = state.running.len() - state.vacant.len();
        facts.queued = (state.queues.len() + running) as u64;
        facts
    }
}

impl Drop for Scheduler {
    /// What is queued is done and answered, unless the device does not answer.
    fn drop(&mut self) {
        self.0.wait_quiet();
        let mut state = self.0.lock();
        let drained = state.queues.drain();
        state.refused.extend(drained.into_iter().map(|request| (request, Fault::NotStarted)));
        self.0.answer_refused(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never answers.
    #[derive(Default)]
    struct Silent(Mutex<Vec<IoRequest>>);

    impl BlockIo for Silent {
        fn submit(&self, request: IoRequest) {
            self.0.lock().unwrap().push(request);
        }

        fn facts(&self) -> IoFacts {
            IoFacts::default()
        }
    }

    /// A process that was stopped, or had no processor, finds reads that look overdue although their device answered
    /// in time: five such pauses would eject a healthy device. The time between two looks that lie too far apart must
    /// not count; a device that is looked at and says nothing must still be taken out.
    #[test]
    fn standing_still_is_not_held_against_a_device() {
        let patience = Patience { io: Duration::from_millis(400), sync: Duration::from_secs(9) };
        let silent = Arc::new(Silent::default());
        let io = Arc::clone(&silent) as Arc<dyn BlockIo>;
        let scheduler = Scheduler::new(DeviceId::new(0), io, PAGE_BYTES, patience, Arc::default());
        scheduler.submit(IoRequest {
            op: IoOp::Read,
            offset: 0,
            bytes: PAGE_BYTES,
            buffer: IoBuffer::Pages(AlignedPages::new(PAGE_BYTES)),
            class: IoClass::DecodeFetch,
            done: Box::new(|_, _| {}),
        });
        let pool = 100 * STUCK_PART * PAGE_BYTES;
        for _ in 0..2 {
            std::thread::sleep(patience.io * 2);
            scheduler.look(None, pool);
            assert!(scheduler.is_usable(), "we stood still, not the device");
        }
        let began = Instant::now();
        while scheduler.is_usable() {
            assert!(began.elapsed() < patience.io * 20, "a device that never answers stays in");
            std::thread::sleep(patience.io / 40);
            scheduler.look(None, pool);
        }
        assert!(began.elapsed() > patience.io / 4, "it was taken out for the time that we stood still");
        // Whoever drops a scheduler waits for a device that may still answer; this one is out.
        silent.0.lock().unwrap().clear();
    }
}
