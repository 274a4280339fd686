//! The queue in front of a device: bounded, by class, with a wake-up descriptor
//! for the ring and a condition variable for pread threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use terrace_core::{Fault, IoClass};

use super::{IoBuffer, IoOp, IoRequest};

/// Far above the core's own limits of reads and writes in flight.
const REQUESTS_MAX: usize = 65_536;
const CLASSES: usize = 5;
/// One of this many picks goes to the least urgent class that waits, so that write-behind never starves.
const FAIRNESS: u32 = 16;

/// Shared by the submitters and the device's threads.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    eventfd: File,
    bytes_in_flight_max: u64,
    /// A sync failed: no more writes.
    pub(super) sync_failed: AtomicBool,
    pub(super) counters: Counters,
    note: Mutex<Option<String>>,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) read_bytes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) queued: AtomicU64,
}

#[derive(Default)]
struct Queue {
    /// Syncs and registrations: short, and somebody waits for them.
    control: VecDeque<IoRequest>,
    classes: [VecDeque<IoRequest>; CLASSES],
    waiting: usize,
    picks: u32,
    bytes_in_flight: u64,
    closed: bool,
}

/// What a device thread gets when it asks for work.
pub(super) enum Next {
    Request(IoRequest),
    /// Nothing that may start now.
    Nothing,
    /// Nothing, and nothing will come.
    Closed,
}

impl Shared {
    pub(super) fn new(bytes_in_flight_max: u64) -> io::Result<Self> {
        // SAFETY: plain system call.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel just gave us.
        let eventfd = unsafe { File::from_raw_fd(raw) };
        Ok(Self {
            queue: Mutex::new(Queue::default()),
            wake: Condvar::new(),
            eventfd,
            bytes_in_flight_max,
            sync_failed: AtomicBool::new(false),
            counters: Counters::default(),
            note: Mutex::new(None),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, request: IoRequest) {
        let mut queue = self.lock();
        if queue.closed || queue.waiting >= REQUESTS_MAX {
            drop(queue);
            tracing::error!(op = ?request.op, "device queue closed or full: request refused");
            // Not from this thread: the caller may hold a lock that `done` takes.
            let IoRequest { buffer, done, .. } = request;
            let refusal = std::thread::Builder::new().name("io-refusal".to_owned());
            if let Err(error) = refusal.spawn(move || done(buffer, Err(Fault::Device))) {
                tracing::error!(%error, "no thread to refuse a request on");
            }
            return;
        }
        queue.waiting += 1;
        self.counters.queued.fetch_add(1, Ordering::Relaxed);
        match request.op {
            IoOp::Sync | IoOp::Forget(_) => queue.control.push_back(request),
            IoOp::Read | IoOp::Write => queue.classes[rank(request.class)].push_back(request),
        }
        drop(queue);
        self.wake_all();
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake_all();
    }

    fn wake_all(&self) {
        self.wake.notify_all();
        // A full counter (never: it is read by every round) would only mean that a wake-up is pending.
        let _ = (&self.eventfd).write(&1u64.to_ne_bytes_for_eventfd());
    }

    pub(super) fn eventfd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// The next request that fits under the cap of bytes in flight.
    pub(super) fn next(&self) -> Next {
        self.pick(&mut self.lock())
    }

    /// As [`Self::next`], but waits for one.
    pub(super) fn wait(&self) -> Option<IoRequest> {
        let mut queue = self.lock();
        loop {
            match self.pick(&mut queue) {
                Next::Request(request) => return Some(request),
                Next::Closed => return None,
                Next::Nothing => queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn pick(&self, queue: &mut Queue) -> Next {
        let request = match queue.control.pop_front() {
            Some(request) => Some(request),
            None => {
                queue.picks = queue.picks.wrapping_add(1);
                let least_urgent_first = queue.picks.is_multiple_of(FAIRNESS);
                let position = if least_urgent_first {
                    queue.classes.iter().rposition(|class| !class.is_empty())
                } else {
                    queue.classes.iter().position(|class| !class.is_empty())
                };
                let room = self.bytes_in_flight_max.saturating_sub(queue.bytes_in_flight);
                let idle = queue.bytes_in_flight == 0;
                position.and_then(|position| {
                    queue.classes[position].pop_front_if(|request| idle || request.bytes <= room)
                })
            }
        };
        match request {
            Some(request) => {
                queue.waiting -= 1;
                queue.bytes_in_flight += request.bytes;
                Next::Request(request)
            }
            None if queue.closed && queue.waiting == 0 => Next::Closed,
            None => Next::Nothing,
        }
    }

    /// Accounts for a request that ended and calls its `done`.
    pub(super) fn finish(&self, request: IoRequest, outcome: Result<(), Fault>) {
        let IoRequest { op, bytes, buffer, done, .. } = request;
        {
            let mut queue = self.lock();
            queue.bytes_in_flight -= bytes;
        }
        // Another thread may wait for room.
        self.wake.notify_one();
        self.counters.queued.fetch_sub(1, Ordering::Relaxed);
        let counters = &self.counters;
        let (counter, by) = match (&outcome, op) {
            (Ok(()), IoOp::Read) => (&counters.read_bytes, bytes),
            (Ok(()), IoOp::Write) => (&counters.write_bytes, bytes),
            (Ok(()), IoOp::Sync | IoOp::Forget(_)) => (&counters.errors, 0),
            (Err(_), IoOp::Read | IoOp::Write | IoOp::Sync | IoOp::Forget(_)) => (&counters.errors, 1),
        };
        counter.fetch_add(by, Ordering::Relaxed);
        if op == IoOp::Sync && outcome.is_err() {
            self.sync_failed.store(true, Ordering::Release);
        }
        done(buffer, outcome);
    }

    /// Checks what must hold before a request may go to the kernel: address and
    /// length of the buffer, or the refusal.
    pub(super) fn admit(&self, request: &IoRequest) -> Result<*mut u8, Fault> {
        let writes = matches!(request.op, IoOp::Write | IoOp::Sync);
        if writes && self.sync_failed.load(Ordering::Acquire) {
            return Err(Fault::Device);
        }
        if matches!(request.op, IoOp::Sync | IoOp::Forget(_)) {
            return Ok(std::ptr::null_mut());
        }
        let Some((base, room)) = request.buffer.range() else { return Err(Fault::Device) };
        let page = crate::memory::PAGE_BYTES;
        let aligned = request.offset.is_multiple_of(page) && request.bytes.is_multiple_of(page);
        let fits = request.bytes > 0 && request.bytes <= room && u32::try_from(request.bytes).is_ok();
        if !aligned || !fits || matches!(request.buffer, IoBuffer::Nothing) {
            tracing::error!(op = ?request.op, offset = request.offset, bytes = request.bytes, "malformed I/O refused");
            return Err(Fault::Device);
        }
        Ok(base)
    }

    pub(super) fn set_note(&self, note: String) {
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = Some(note);
    }

    pub(super) fn note(&self) -> Option<String> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

const fn rank(class: IoClass) -> usize {
    match class {
        IoClass::Fetch => 0,
        IoClass::Demotion => 1,
        IoClass::Prefetch => 2,
        IoClass::Persistence => 3,
        IoClass::Scrub => 4,
    }
}

/// The one place where the byte order of the machine is right: an eventfd counts in it.
trait EventfdBytes {
    fn to_ne_bytes_for_eventfd(self) -> [u8; 8];
}

impl EventfdBytes for u64 {
    #[allow(clippy::host_endian_bytes, reason = "an eventfd's counter is in the byte order of the machine")]
    fn to_ne_bytes_for_eventfd(self) -> [u8; 8] {
        self.to_ne_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::AlignedPages;

    fn request(op: IoOp, class: IoClass, bytes: u64) -> IoRequest {
        let buffer = IoBuffer::Pages(AlignedPages::new(bytes));
        IoRequest { op, offset: 0, bytes, buffer, class, done: Box::new(|_, _| {}) }
    }

    fn next(shared: &Shared) -> Option<IoRequest> {
        match shared.next() {
            Next::Request(request) => Some(request),
            Next::Nothing | Next::Closed => None,
        }
    }

    /// A decode that waits must not queue behind write-behind, and write-behind must not starve.
    #[test]
    fn urgent_classes_go_first_and_none_starves() {
        let shared = Shared::new(1 << 30).unwrap();
        shared.push(request(IoOp::Write, IoClass::Persistence, 4096));
        for _ in 0..40 {
            shared.push(request(IoOp::Read, IoClass::Fetch, 4096));
        }
        let order: Vec<IoClass> = std::iter::from_fn(|| next(&shared)).map(|request| request.class).collect();
        assert_eq!(order.len(), 41);
        assert_eq!(order[0], IoClass::Fetch);
        let position = order.iter().position(|class| *class == IoClass::Persistence).unwrap();
        assert_eq!(position, FAIRNESS as usize - 1);
    }

    /// Deep queues only add latency: no request may start over the cap of bytes,
    /// a single larger one may, and syncs always do.
    #[test]
    fn bytes_in_flight_are_capped() {
        let shared = Shared::new(8192).unwrap();
        for _ in 0..3 {
            shared.push(request(IoOp::Read, IoClass::Fetch, 4096));
        }
        let (first, second) = (next(&shared).unwrap(), next(&shared).unwrap());
        assert!(next(&shared).is_none(), "over the cap");
        shared.push(request(IoOp::Sync, IoClass::Fetch, 0));
        assert_eq!(next(&shared).unwrap().op, IoOp::Sync);
        shared.finish(first, Ok(()));
        let third = next(&shared).unwrap();
        shared.finish(second, Ok(()));
        shared.finish(third, Ok(()));
        shared.push(request(IoOp::Read, IoClass::Fetch, 65_536));
        assert!(next(&shared).is_some(), "a large one alone");
    }
}
