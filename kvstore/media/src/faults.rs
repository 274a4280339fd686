//! Devices that misbehave, in front of real ones, for tests here and of the
//! daemon: [`FaultyDevice`] injects faults, one at a time or at random with
//! [`Weather`]; [`SlowDevice`] answers late; [`VolatileDevice`] keeps live and durable bytes apart, so that a
//! power cut can be made; [`cut_power`] does the same to a whole file system.

mod power;
mod slow;
mod volatile;
mod weather;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use terrace_core::{BlockId, Fault};

pub use power::cut_power;
pub use slow::SlowDevice;
pub use volatile::VolatileDevice;
pub use weather::Weather;

use crate::device::{AlignedPages, BlockIo, IoBuffer, IoFacts, IoOp, IoRequest};
use weather::Clouds;

/// What a drive writes as a whole.
const SECTOR: usize = 512;

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// The first bytes (whole pages) are moved, and the device says that it failed.
    Short(u64),
    /// The first bytes (whole pages) are moved, and the device says that all is well.
    Torn(u64),
    /// Of 64 sectors of 512 bytes each those are moved whose bit is set, and so on behind them; the device says
    /// that all is well.
    TornSectors(u64),
    /// All is moved, with the lowest bit of this byte flipped, and the device says that all is well.
    BitFlip(u64),
    /// Nothing is moved, and the device says so.
    Fail(Fault),
    /// The bytes are moved from or to this offset instead, and the device says that all is well.
    Misdirected(u64),
    /// Nothing is moved, and the device says that all is well.
    Lost,
    /// A read gets what lay there before the last write (see [`FaultyDevice::remember`]).
    Stale,
    /// Nothing happens until [`FaultyDevice::release`].
    Hang,
    /// All is well, after this many times the time that it took.
    Slow(u32),
}

impl Injected {
    /// A word for counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Short(_) => "short",
            Self::Torn(_) => "torn",
            Self::TornSectors(_) => "torn sectors",
            Self::BitFlip(_) => "bit flip",
            Self::Fail(_) => "failed",
            Self::Misdirected(_) => "misdirected",
            Self::Lost => "lost",
            Self::Stale => "stale",
            Self::Hang => "hang",
            Self::Slow(_) => "slow",
        }
    }
}

#[derive(Default)]
struct Plan {
    faults: VecDeque<(IoOp, Injected)>,
    holding: bool,
    held: Vec<IoRequest>,
    clouds: Option<Clouds>,
    counts: BTreeMap<(&'static str, &'static str), u64>,
    /// Offsets whose contents are kept, oldest first: what was written last, and before that.
    remembered: VecDeque<(u64, Vec<u8>, Option<Vec<u8>>)>,
    remember_max: usize,
}

/// Passes requests on, but for those that meet a fault.
pub struct FaultyDevice {
    inner: Arc<dyn BlockIo>,
    plan: Arc<Mutex<Plan>>,
}

impl FaultyDevice {
    /// Behaves well until told otherwise.
    pub fn new(inner: Arc<dyn BlockIo>) -> Self {
        Self { inner, plan: Arc::default() }
    }

    /// The next request of this kind meets this fault. Plans queue up.
    pub fn inject(&self, op: IoOp, fault: Injected) {
        self.plan().faults.push_back((op, fault));
    }

    /// From now on faults happen at random; `None` ends that.
    pub fn set_weather(&self, weather: Option<Weather>) {
        self.plan().clouds.get_or_insert_with(Clouds::new).set(weather);
    }

    /// From now on the contents of so many places are kept, for stale reads.
    pub fn remember(&self, places: usize) {
        self.plan().remember_max = places;
    }

    /// How many faults there were, by request (`read`, `write`, `sync`) and [`Injected::name`].
    pub fn injected(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.plan().counts.clone()
    }

    /// Blocks whose copy here may be damaged, or was said to be: the device lied about a write of them, over them
    /// or about a read of them, at random. Whoever relies on their durability may be disappointed.
    pub fn harmed(&self) -> Vec<BlockId> {
        self.plan().clouds.as_ref().map(|clouds| clouds.harmed.iter().copied().collect()).unwrap_or_default()
    }

    /// From now on requests wait (late completions).
    pub fn hold(&self) {
        self.plan().holding = true;
    }

    /// How many requests wait.
    pub fn held(&self) -> usize {
        self.plan().held.len()
    }

    /// Lets all go that wait, in their order, and holds no more.
    pub fn release(&self) {
        let held = {
            let mut plan = self.plan();
            plan.holding = false;
            std::mem::take(&mut plan.held)
        };
        held.into_iter().for_each(|request| self.pass(request));
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        lock(&self.plan)
    }

    fn pass(&self, request: IoRequest) {
        let planned = {
            let mut plan = self.plan();
            let position = plan.faults.iter().position(|(op, _)| *op == request.op);
            let planned = position.and_then(|position| plan.faults.remove(position)).map(|(_, fault)| fault);
            let planned = match (planned, &mut plan.clouds) {
                (None, Some(clouds)) => clouds.draw(&request),
                (planned, _) => planned,
            };
            let planned = planned.filter(|fault| *fault != Injected::Stale || plan.is_older(request.offset));
            if let Some(fault) = planned {
                *plan.counts.entry((name(request.op), fault.name())).or_default() += 1;
            }
            plan.keep(&request);
            planned
        };
        match planned {
            None => self.inner.submit(request),
            Some(fault) => self.misbehave(request, fault),
        }
    }

    fn misbehave(&self, mut request: IoRequest, fault: Injected) {
        if request.op == IoOp::Read && lies(fault) {
            self.note_harm(&mut request);
        }
        match fault {
            Injected::Short(bytes) => self.partly(request, bytes, Err(Fault::Device)),
            Injected::Torn(bytes) => self.partly(request, bytes, Ok(())),
            Injected::TornSectors(pattern) if request.op == IoOp::Write => self.tear(request, pattern),
            Injected::TornSectors(pattern) => {
                // The sectors that do not come keep what was in the buffer.
                let before = content(&request);
                self.changed(request, move |arrived| {
                    let Some(before) = before else { return };
                    mix(arrived.as_mut_slice(), before.as_slice(), !pattern);
                });
            }
            Injected::Fail(fault) => answer(request, Err(fault)),
            Injected::Lost => answer(request, Ok(())),
            Injected::Misdirected(offset) => {
                request.offset = offset;
                self.inner.submit(request);
            }
            Injected::BitFlip(byte) if request.op == IoOp::Write => {
                let Some(mut pages) = content(&request) else { return answer(request, Err(Fault::Device)) };
                flip(&mut pages, byte);
                self.inner.submit(instead(request, pages));
            }
            Injected::BitFlip(byte) => self.changed(request, move |pages| flip(pages, byte)),
            Injected::Stale => {
                let older = self.plan().older(request.offset);
                self.changed(request, move |pages| {
                    let Some(older) = older else { return };
                    let bytes = older.len().min(pages.as_slice().len());
                    pages.as_mut_slice()[..bytes].copy_from_slice(&older[..bytes]);
                });
            }
            Injected::Hang => self.plan().held.push(request),
            Injected::Slow(times) => {
                let (began, done) = (Instant::now(), request.done);
                request.done = Box::new(move |buffer, outcome| {
                    let more = began.elapsed() * times.saturating_sub(1);
                    std::thread::spawn(move || {
                        std::thread::sleep(more);
                        done(buffer, outcome);
                    });
                });
                self.inner.submit(request);
            }
        }
    }

    /// Moves the beginning and answers what the plan says.
    fn partly(&self, mut request: IoRequest, bytes: u64, outcome: Result<(), Fault>) {
        request.bytes = bytes.min(request.bytes);
        if request.bytes == 0 {
            return answer(request, outcome);
        }
        let done = request.done;
        request.done = Box::new(move |buffer, moved| done(buffer, moved.and(outcome)));
        self.inner.submit(request);
    }

    /// A read whose bytes are changed on the way.
    fn changed(&self, mut request: IoRequest, change: impl FnOnce(&mut AlignedPages) + Send + 'static) {
        let (done, bytes) = (request.done, request.bytes);
        request.done = Box::new(move |mut buffer, outcome| {
            let mut pages = AlignedPages::new(bytes);
            if read_buffer(&buffer, pages.as_mut_slice()) {
                change(&mut pages);
                overwrite(&mut buffer, pages.as_slice());
            }
            done(buffer, outcome);
        });
        self.inner.submit(request);
    }

    /// A write that changes some sectors only: the others are read first.
    fn tear(&self, request: IoRequest, pattern: u64) {
        let Some(new) = content(&request) else { return answer(request, Err(Fault::Device)) };
        let (inner, offset, bytes, class) =
            (Arc::clone(&self.inner), request.offset, request.bytes, request.class);
        let done = move |buffer: IoBuffer, outcome: Result<(), Fault>| {
            let Some(mut pages) = buffer.into_pages().filter(|_| outcome.is_ok()) else {
                return answer(request, Err(Fault::Device));
            };
            mix(pages.as_mut_slice(), new.as_slice(), pattern);
            inner.submit(instead(request, pages));
        };
        let buffer = IoBuffer::Pages(AlignedPages::new(bytes));
        self.inner.submit(IoRequest { op: IoOp::Read, offset, bytes, buffer, class, done: Box::new(done) });
    }

    /// Whose block this read is about to lie about is known when it has arrived.
    fn note_harm(&self, request: &mut IoRequest) {
        let plan = Arc::clone(&self.plan);
        let bytes = request.bytes;
        let done = std::mem::replace(&mut request.done, Box::new(|_, _| {}));
        let offset = request.offset;
        request.done = Box::new(move |buffer, outcome| {
            if let Some(clouds) = &mut lock(&plan).clouds {
                let mut page = AlignedPages::new(bytes);
                read_buffer(&buffer, page.as_mut_slice());
                clouds.read_harmed(offset, page.as_slice());
            }
            done(buffer, outcome);
        });
    }
}

impl Plan {
    fn keep(&mut self, request: &IoRequest) {
        if request.op != IoOp::Write || self.remember_max == 0 {
            return;
        }
        let Some(pages) = content(request) else { return };
        let pages = pages.as_slice().to_vec();
        match self.remembered.iter_mut().find(|(offset, ..)| *offset == request.offset) {
            Some((_, last, older)) => *older = Some(std::mem::replace(last, pages)),
            None => {
                if self.remembered.len() >= self.remember_max {
                    self.remembered.pop_front();
                }
                self.remembered.push_back((request.offset, pages, None));
            }
        }
    }

    fn older(&self, offset: u64) -> Option<Vec<u8>> {
        let found = self.remembered.iter().find(|(place, ..)| *place == offset);
        found.and_then(|(.., older)| older.clone())
    }

    fn is_older(&self, offset: u64) -> bool {
        self.remembered.iter().any(|(place, _, older)| *place == offset && older.is_some())
    }
}

impl BlockIo for FaultyDevice {
    fn submit(&self, request: IoRequest) {
        {
            let mut plan = self.plan();
            if plan.holding && matches!(request.op, IoOp::Read | IoOp::Write | IoOp::Sync) {
                plan.held.push(request);
                return;
            }
        }
        self.pass(request);
    }

    fn facts(&self) -> IoFacts {
        self.inner.facts()
    }
}

/// Does the device say that all is well when it is not?
fn lies(fault: Injected) -> bool {
    match fault {
        Injected::Torn(_)
        | Injected::TornSectors(_)
        | Injected::BitFlip(_)
        | Injected::Misdirected(_)
        | Injected::Lost
        | Injected::Stale => true,
        Injected::Short(_) | Injected::Fail(_) | Injected::Hang | Injected::Slow(_) => false,
    }
}

fn name(op: IoOp) -> &'static str {
    match op {
        IoOp::Read => "read",
        IoOp::Write => "write",
        IoOp::Sync => "sync",
        IoOp::Forget(_) => "forget",
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A write of other pages than its own.
fn instead(request: IoRequest, pages: AlignedPages) -> IoRequest {
    let IoRequest { op, offset, bytes, buffer, class, done } = request;
    let done = Box::new(move |_: IoBuffer, outcome| done(buffer, outcome));
    IoRequest { op, offset, bytes, buffer: IoBuffer::Pages(pages), class, done }
}

/// Puts those sectors of `from` into `to` whose bit is set.
fn mix(to: &mut [u8], from: &[u8], pattern: u64) {
    for (number, (to, from)) in to.chunks_exact_mut(SECTOR).zip(from.chunks_exact(SECTOR)).enumerate() {
        if pattern >> (number % 64) & 1 == 1 {
            to.copy_from_slice(from);
        }
    }
}

/// Not from the caller's thread: it may hold the lock that `done` takes.
fn answer(request: IoRequest, outcome: Result<(), Fault>) {
    std::thread::spawn(move || (request.done)(request.buffer, outcome));
}

/// A copy of what a request's buffer holds.
fn content(request: &IoRequest) -> Option<AlignedPages> {
    let mut pages = AlignedPages::new(request.bytes);
    read_buffer(&request.buffer, pages.as_mut_slice()).then_some(pages)
}

fn flip(pages: &mut AlignedPages, byte: u64) {
    let at = usize::try_from(byte).unwrap_or(usize::MAX);
    if let Some(found) = pages.as_mut_slice().get_mut(at) {
        *found ^= 1;
    }
}

fn read_buffer(buffer: &IoBuffer, target: &mut [u8]) -> bool {
    let Some((base, room)) = buffer.range().filter(|(_, room)| *room >= target.len() as u64) else {
        return false;
    };
    debug_assert!(room > 0, "a buffer that holds bytes has room");
    // SAFETY: the buffer has room for `target`, and the request that owns it is with us.
    unsafe { std::ptr::copy_nonoverlapping(base, target.as_mut_ptr(), target.len()) };
    true
}

fn overwrite(buffer: &mut IoBuffer, bytes: &[u8]) {
    if let Some((base, _)) = buffer.range().filter(|(_, room)| *room >= bytes.len() as u64) {
        // SAFETY: as in `read_buffer`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base, bytes.len()) };
    }
}
