//! Devices that misbehave, in front of real ones, for tests here and of the
//! daemon: [`FaultyDevice`] injects one fault at a time, [`VolatileDevice`]
//! keeps live and durable bytes apart, so that a power cut can be made.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use terrace_core::{Fault, IoClass};

use crate::device::{AlignedPages, BlockIo, IoBuffer, IoFacts, IoOp, IoRequest};
use crate::memory::PAGE_BYTES;

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// The first bytes (whole pages) are moved, and the device says that it failed.
    Short(u64),
    /// The first bytes (whole pages) are moved, and the device says that all is well.
    Torn(u64),
    /// All is moved, with the lowest bit of this byte flipped, and the device says that all is well.
    BitFlip(u64),
    /// Nothing is moved, and the device says so.
    Fail(Fault),
    /// The bytes are moved from or to this offset instead, and the device says that all is well.
    Misdirected(u64),
    /// Nothing is moved, and the device says that all is well.
    Lost,
}

#[derive(Default)]
struct Plan {
    faults: VecDeque<(IoOp, Injected)>,
    holding: bool,
    held: Vec<IoRequest>,
}

/// Passes requests on, but for those that meet a planned fault.
pub struct FaultyDevice {
    inner: Arc<dyn BlockIo>,
    plan: Mutex<Plan>,
}

impl FaultyDevice {
    /// Behaves well until told otherwise.
    pub fn new(inner: Arc<dyn BlockIo>) -> Self {
        Self { inner, plan: Mutex::new(Plan::default()) }
    }

    /// The next request of this kind meets this fault. Plans queue up.
    pub fn inject(&self, op: IoOp, fault: Injected) {
        self.plan().faults.push_back((op, fault));
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
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self, request: IoRequest) {
        let planned = {
            let mut plan = self.plan();
            let position = plan.faults.iter().position(|(op, _)| *op == request.op);
            position.and_then(|position| plan.faults.remove(position))
        };
        match planned {
            None => self.inner.submit(request),
            Some((_, fault)) => self.misbehave(request, fault),
        }
    }

    fn misbehave(&self, mut request: IoRequest, fault: Injected) {
        match fault {
            Injected::Short(bytes) => self.partly(request, bytes, Err(Fault::Device)),
            Injected::Torn(bytes) => self.partly(request, bytes, Ok(())),
            Injected::Fail(fault) => answer(request, Err(fault)),
            Injected::Lost => answer(request, Ok(())),
            Injected::Misdirected(offset) => {
                request.offset = offset;
                self.inner.submit(request);
            }
            Injected::BitFlip(byte) if request.op == IoOp::Write => {
                let Some(mut pages) = content(&request) else { return answer(request, Err(Fault::Device)) };
                flip(&mut pages, byte);
                let IoRequest { op, offset, bytes, buffer, class, done } = request;
                let done = Box::new(move |_: IoBuffer, outcome| done(buffer, outcome));
                self.inner.submit(IoRequest {
                    op,
                    offset,
                    bytes,
                    buffer: IoBuffer::Pages(pages),
                    class,
                    done,
                });
            }
            Injected::BitFlip(byte) => {
                let done = request.done;
                let bytes = request.bytes;
                request.done = Box::new(move |buffer, outcome| {
                    let mut copy = IoRequest {
                        op: IoOp::Read,
                        offset: 0,
                        bytes,
                        buffer,
                        class: IoClass::Scrub,
                        done: Box::new(|_, _| {}),
                    };
                    if let Some(mut pages) = content(&copy) {
                        flip(&mut pages, byte);
                        overwrite(&mut copy.buffer, pages.as_slice());
                    }
                    done(copy.buffer, outcome);
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

/// Keeps writes in memory until a sync, as a drive's cache may; [`Self::cut`] loses them.
pub struct VolatileDevice {
    inner: Arc<dyn BlockIo>,
    cache: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
}

impl VolatileDevice {
    /// Starts with an empty cache.
    pub fn new(inner: Arc<dyn BlockIo>) -> Self {
        Self { inner, cache: Arc::default() }
    }

    /// The power goes: what was not synced is gone.
    pub fn cut(&self) {
        lock(&self.cache).clear();
    }

    /// The power goes while some of the cache is being written: every second page survives.
    pub fn cut_unevenly(&self) {
        let survivors: Vec<_> = std::mem::take(&mut *lock(&self.cache)).into_iter().step_by(2).collect();
        for (offset, page) in survivors {
            let _ = self.write_now(offset, &page);
        }
    }

    fn write_now(&self, offset: u64, page: &[u8]) -> Result<(), Fault> {
        write_through(&self.inner, offset, page)
    }
}

fn write_through(inner: &Arc<dyn BlockIo>, offset: u64, page: &[u8]) -> Result<(), Fault> {
    let (sender, receiver) = mpsc::channel();
    let mut pages = AlignedPages::new(PAGE_BYTES);
    pages.as_mut_slice().copy_from_slice(page);
    inner.submit(IoRequest {
        op: IoOp::Write,
        offset,
        bytes: PAGE_BYTES,
        buffer: IoBuffer::Pages(pages),
        class: IoClass::DecodeFetch,
        done: Box::new(move |_, outcome| {
            let _ = sender.send(outcome);
        }),
    });
    receiver.recv().unwrap_or(Err(Fault::Device))
}

impl BlockIo for VolatileDevice {
    fn submit(&self, mut request: IoRequest) {
        match request.op {
            IoOp::Forget(_) => self.inner.submit(request),
            IoOp::Write => {
                let Some(pages) = content(&request) else { return answer(request, Err(Fault::Device)) };
                let mut cache = lock(&self.cache);
                for (number, page) in pages.as_slice().chunks_exact(4096).enumerate() {
                    cache.insert(request.offset + number as u64 * PAGE_BYTES, page.to_vec());
                }
                drop(cache);
                answer(request, Ok(()));
            }
            IoOp::Read => {
                let (cache, done) = (Arc::clone(&self.cache), request.done);
                let (offset, bytes) = (request.offset, request.bytes);
                request.done = Box::new(move |mut buffer, outcome| {
                    let mut copy = AlignedPages::new(bytes);
                    read_buffer(&buffer, copy.as_mut_slice());
                    for (number, page) in copy.as_mut_slice().chunks_exact_mut(4096).enumerate() {
                        if let Some(newer) = lock(&cache).get(&(offset + number as u64 * PAGE_BYTES)) {
                            page.copy_from_slice(newer);
                        }
                    }
                    overwrite(&mut buffer, copy.as_slice());
                    done(buffer, outcome);
                });
                self.inner.submit(request);
            }
            IoOp::Sync => {
                let (inner, cache) = (Arc::clone(&self.inner), std::mem::take(&mut *lock(&self.cache)));
                // Waits for the inner device, which its own threads must not.
                std::thread::spawn(move || {
                    let written =
                        cache.iter().try_for_each(|(offset, page)| write_through(&inner, *offset, page));
                    match written {
                        Ok(()) => inner.submit(request),
                        Err(fault) => answer(request, Err(fault)),
                    }
                });
            }
        }
    }

    fn facts(&self) -> IoFacts {
        self.inner.facts()
    }
}

fn lock(cache: &Mutex<BTreeMap<u64, Vec<u8>>>) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
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
