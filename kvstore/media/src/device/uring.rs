//! The io_uring backend: one OS thread owns the ring of one device.
//!
//! The thread sleeps in the kernel until an I/O completes or the wake-up
//! descriptor is written; it never spins. Chunks are registered with the ring
//! at their first I/O and forgotten when they are dropped; where registration
//! is refused (locked-memory limit), plain reads and writes take over for good.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use terrace_core::{Fault, GIB};

use super::file::DeviceFile;
use super::later::{self, Answers};
use super::queue::{Next, Shared};
use super::{IoBuffer, IoOp, IoRequest, fault_of};

/// Requests in the kernel at once. The cap on bytes is usually reached first.
const DEPTH: u32 = 128;
/// Chunks registered at once; the table of a ring has at most 16,384 entries.
const REGISTERED_MAX: u32 = 4096;
/// The kernel refuses a larger single buffer.
const REGISTERED_BYTES_MAX: u64 = GIB;
const WAKE: u64 = u64::MAX;
/// Index of the device in the ring's table of files.
const DEVICE: types::Fixed = types::Fixed(0);

/// Starts the thread, and returns once its ring stands.
pub(super) fn start(shared: &Arc<Shared>, file: &Arc<DeviceFile>) -> io::Result<JoinHandle<()>> {
    let (ready, answer) = mpsc::channel();
    let (shared, file) = (Arc::clone(shared), Arc::clone(file));
    let thread = std::thread::Builder::new().name("media-uring".to_owned()).spawn(move || {
        // SINGLE_ISSUER binds a ring to the thread that made it.
        match Ring::new(shared, file) {
            Ok(ring) => {
                let _ = ready.send(Ok(()));
                ring.run();
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    })?;
    match answer.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other("the ring's thread ended at once")),
    }
}

/// An I/O may still write into memory that unwinding would free.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

struct InFlight {
    request: IoRequest,
    base: *mut u8,
    moved: u32,
    length: u32,
    registered: Option<u16>,
}

struct Ring {
    /// First, because fields are dropped in order, and the others free what the kernel may still write.
    _guard: AbortOnUnwind,
    ring: IoUring,
    shared: Arc<Shared>,
    file: Arc<DeviceFile>,
    in_flight: Vec<Option<InFlight>>,
    vacant: Vec<usize>,
    /// Slot of a chunk's memory in the table of buffers; looked up only.
    registered: HashMap<u64, u16>,
    buffers_vacant: Vec<u16>,
    /// Leaked: the kernel cancels the last read into it at a time that we do not see.
    wake_buffer: &'static mut [u8; 8],
}

impl Ring {
    fn new(shared: Arc<Shared>, file: Arc<DeviceFile>) -> io::Result<Self> {
        let ring = match IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(DEPTH * 2) {
            // A kernel before 6.1 does not know these two.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(DEPTH * 2)?,
            other => other?,
        };
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let mut buffers_vacant = Vec::new();
        match ring.submitter().register_buffers_sparse(REGISTERED_MAX) {
            Ok(()) => buffers_vacant = (0..u16::try_from(REGISTERED_MAX).unwrap_or(u16::MAX)).rev().collect(),
            Err(error) => shared.set_note(format!("buffers are not registered: {error}")),
        }
        Ok(Self {
            _guard: AbortOnUnwind,
            ring,
            shared,
            file,
            in_flight: (0..DEPTH).map(|_| None).collect(),
            vacant: (0..DEPTH as usize).collect(),
            registered: HashMap::new(),
            buffers_vacant,
            wake_buffer: Box::leak(Box::new([0; 8])),
        })
    }

    fn run(mut self) {
        later::put_off();
        let mut answers = Answers::new();
        let mut completions: Vec<cqueue::Entry> = Vec::new();
        self.arm_wake();
        loop {
            let closed = self.take_requests();
            // What ended in the last round is answered while the device works on what comes next.
            later::take(&mut answers);
            let answering = !answers.is_empty();
            if closed && !answering && self.vacant.len() == self.in_flight.len() {
                return;
            }
            // New work may have come since: then this round takes only what has completed already.
            let wait = !answering && (closed || self.vacant.is_empty() || self.shared.may_sleep());
            let entered = self.ring.submit_and_wait(usize::from(wait));
            self.shared.awake();
            match entered {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    // The ring is ours and set up right; what it holds can neither be finished nor freed.
                    _ => panic!("io_uring_enter on {}: {error}", self.file.path().display()),
                },
            }
            for (done, buffer, outcome) in answers.drain(..) {
                done(buffer, outcome);
            }
            completions.extend(self.ring.completion());
            for completion in completions.drain(..) {
                self.complete(&completion);
            }
        }
    }

    /// Moves requests from the queue into the ring. True when no more will come.
    fn take_requests(&mut self) -> bool {
        while !self.vacant.is_empty() {
            match self.shared.next() {
                Next::Request(request) => {
                    let idle = self.vacant.len() == self.in_flight.len();
                    self.begin(request);
                    // A device without work gets the first at once, and begins while the others are made ready.
                    // What this call refuses, the next one takes.
                    if idle && let Err(error) = self.ring.submit() {
                        tracing::debug!(%error, "io_uring submission is busy");
                    }
                }
                Next::Nothing => return false,
                Next::Closed => return true,
            }
        }
        false
    }

    fn begin(&mut self, request: IoRequest) {
        if let IoOp::Forget(memory) = request.op {
            self.forget(memory);
            self.shared.finish(request, Ok(()));
            return;
        }
        let base = match self.shared.admit(&request) {
            Ok(base) => base,
            Err(fault) => return self.shared.finish(request, Err(fault)),
        };
        let registered = self.register(&request.buffer);
        let length = u32::try_from(request.bytes).expect("admit refuses longer ones");
        let index = self.vacant.pop().expect("the caller saw a vacant entry");
        self.in_flight[index] = Some(InFlight { request, base, moved: 0, length, registered });
        self.issue(index);
    }

    fn issue(&mut self, index: usize) {
        let Some(operation) = &self.in_flight[index] else { return };
        let offset = operation.request.offset + u64::from(operation.moved);
        let rest = operation.length - operation.moved;
        // A null base (sync) is never offset: its length is zero.
        let address = operation.base.wrapping_add(operation.moved as usize);
        let entry = match (operation.request.op, operation.registered) {
            (IoOp::Read, Some(slot)) => {
                opcode::ReadFixed::new(DEVICE, address, rest, slot).offset(offset).build()
            }
            (IoOp::Read, None) => opcode::Read::new(DEVICE, address, rest).offset(offset).build(),
            (IoOp::Write, Some(slot)) => {
                opcode::WriteFixed::new(DEVICE, address, rest, slot).offset(offset).build()
            }
            (IoOp::Write, None) => opcode::Write::new(DEVICE, address, rest).offset(offset).build(),
            (IoOp::Sync | IoOp::Forget(_), _) => {
                opcode::Fsync::new(DEVICE).flags(types::FsyncFlags::DATASYNC).build()
            }
        };
        self.push(&entry.user_data(index as u64));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry's buffer belongs to `in_flight` (or is `wake_buffer`), which is dropped only after
            // the completion came: the thread leaves when nothing is in flight, and aborts on a panic.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // Twice as many entries as requests: full only with entries that were not told to the kernel yet.
            if let Err(error) = self.ring.submit() {
                tracing::warn!(%error, "io_uring submission is busy");
            }
        }
    }

    fn arm_wake(&mut self) {
        let descriptor = types::Fd(self.shared.eventfd());
        let entry = opcode::Read::new(descriptor, self.wake_buffer.as_mut_ptr(), 8).build().user_data(WAKE);
        self.push(&entry);
    }

    fn complete(&mut self, completion: &cqueue::Entry) {
        if completion.user_data() == WAKE {
            self.arm_wake();
            return;
        }
        let index = usize::try_from(completion.user_data()).expect("we number requests from 0 to DEPTH");
        let operation = self.in_flight[index].as_mut().expect("one completion for each request in flight");
        let outcome = match (operation.request.op, u32::try_from(completion.result())) {
            (IoOp::Sync | IoOp::Forget(_), Ok(_)) => Ok(()),
            (IoOp::Read | IoOp::Write, Ok(0)) => {
                let offset = operation.request.offset + u64::from(operation.moved);
                tracing::warn!(path = %self.file.path().display(), offset, "device is shorter than it was");
                Err(Fault::Device)
            }
            (IoOp::Read | IoOp::Write, Ok(moved)) => {
                operation.moved += moved;
                if operation.moved < operation.length {
                    return self.issue(index);
                }
                Ok(())
            }
            (op, Err(_)) => {
                let error = io::Error::from_raw_os_error(-completion.result());
                let again = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
                if again && op != IoOp::Sync {
                    return self.issue(index);
                }
                let offset = operation.request.offset;
                tracing::warn!(path = %self.file.path().display(), ?op, offset, %error, "device I/O failed");
                Err(fault_of(&error))
            }
        };
        if let Some(operation) = self.in_flight[index].take() {
            self.vacant.push(index);
            self.shared.finish(operation.request, outcome);
        }
    }

    /// The table slot of a frame's chunk, registered now if need be.
    fn register(&mut self, buffer: &IoBuffer) -> Option<u16> {
        let (IoBuffer::Frame(memory, _) | IoBuffer::Frames(memory, ..)) = buffer else { return None };
        if let Some(slot) = self.registered.get(&memory.id()) {
            return Some(*slot);
        }
        let (base, bytes) = memory.mapping();
        if bytes > REGISTERED_BYTES_MAX {
            return None;
        }
        let slot = self.buffers_vacant.pop()?;
        let vector = libc::iovec { iov_base: base.cast(), iov_len: usize::try_from(bytes).ok()? };
        // SAFETY: the range is the mapping of a chunk. The kernel pins its pages until they are forgotten.
        match unsafe { self.ring.submitter().register_buffers_update(u32::from(slot), &[vector], None) } {
            Ok(()) => {
                self.registered.insert(memory.id(), slot);
                Some(slot)
            }
            Err(error) => {
                tracing::info!(%error, "io_uring refuses to register a chunk; using plain reads and writes");
                self.shared.set_note(format!(
                    "buffers are not registered: {error} (raise the limit of locked memory)"
                ));
                self.buffers_vacant.clear();
                None
            }
        }
    }

    fn forget(&mut self, memory: u64) {
        let Some(slot) = self.registered.remove(&memory) else { return };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty buffer takes the place of the chunk's.
        match unsafe { self.ring.submitter().register_buffers_update(u32::from(slot), &[nothing], None) } {
            Ok(()) => self.buffers_vacant.push(slot),
            Err(error) => {
                tracing::error!(%error, "a dropped chunk stays registered; its memory is lost until restart")
            }
        }
    }
}
