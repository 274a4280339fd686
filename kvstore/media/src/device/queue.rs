//! The hand-over between the scheduler and a device's threads: first in, first
//! out, with a wake-up descriptor for the ring and a condition variable for
//! pread threads. The scheduler bounds it and decides the order.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use terrace_core::Fault;

use super::{IoBuffer, IoOp, IoRequest};

/// Far above the core's own limits of reads and writes in flight.
const REQUESTS_MAX: usize = 65_536;

/// Shared by the submitters and the device's threads.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    eventfd: File,
    /// The ring's thread sleeps in the kernel, or is about to.
    asleep: AtomicBool,
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
    requests: VecDeque<IoRequest>,
    closed: bool,
}

/// What a device thread gets when it asks for work.
pub(super) enum Next {
    Request(IoRequest),
    /// Nothing now.
    Nothing,
    /// Nothing, and nothing will come.
    Closed,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
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
            asleep: AtomicBool::new(false),
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
        if queue.closed || queue.requests.len() >= REQUESTS_MAX {
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
        self.counters.queued.fetch_add(1, Ordering::Relaxed);
        queue.requests.push_back(request);
        drop(queue);
        self.wake.notify_one();
        // The ring's own thread looks again before it sleeps, so that it needs no system call for itself.
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.ring_eventfd();
        }
    }

    /// The ring's thread is about to sleep. False: there is work, and it must not.
    pub(super) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        let queue = self.lock();
        let nothing = queue.requests.is_empty() && !queue.closed;
        if !nothing {
            self.asleep.store(false, Ordering::SeqCst);
        }
        nothing
    }

    /// The ring's thread is awake: nobody needs to wake it.
    pub(super) fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_all();
        self.ring_eventfd();
    }

    fn ring_eventfd(&self) {
        // A full counter (never: it is read by every round) would only mean that a wake-up is pending.
        let _ = (&self.eventfd).write(&1u64.to_ne_bytes_for_eventfd());
    }

    pub(super) fn eventfd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// The next request.
    pub(super) fn next(&self) -> Next {
        Self::take(&mut self.lock())
    }

    /// As [`Self::next`], but waits for one.
    pub(super) fn wait(&self) -> Option<IoRequest> {
        let mut queue = self.lock();
        loop {
            match Self::take(&mut queue) {
                Next::Request(request) => return Some(request),
                Next::Closed => return None,
                Next::Nothing => queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn take(queue: &mut Queue) -> Next {
        match queue.requests.pop_front() {
            Some(request) => Next::Request(request),
            None if queue.closed => Next::Closed,
            None => Next::Nothing,
        }
    }

    /// Accounts for a request that ended and calls its `done`.
    pub(super) fn finish(&self, request: IoRequest, outcome: Result<(), Fault>) {
        let IoRequest { op, bytes, buffer, done, .. } = request;
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
