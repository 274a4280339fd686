//! Host memory that stands in for a device, for machines without one and for
//! tests. Never chosen silently: somebody has to ask for it by its name.
//!
//! Chunks are memfds, so that other processes import them as they would a
//! device's. Copies run on a thread of its own, in the order of their starts,
//! and end when they end. Everything that a device can do wrong can be asked for
//! ([`Fault`]).

mod chunk;
mod work;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use terrace_core::{ByteCount, MIB};

use crate::device::{Chunk, Device, DeviceInfo, DeviceKind, Lane, Mark, Registered, Registration, Room};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::span::Piece;

use chunk::{Counted, MemfdChunk};
use work::{Flight, Work};

/// Chunks are multiples of it, as on devices of today.
const GRANULARITY: u64 = 2 * MIB;

/// Something that goes wrong, once for each time that it is injected, except
/// where it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A chunk cannot be had, although there is room.
    NoMemory,
    /// Host memory cannot be registered.
    NoRegistration,
    /// A batch is refused when it is started.
    RefusedStart,
    /// A batch ends with an error, half written.
    FailedCopy,
    /// From now on batches are started and nothing of them happens.
    Hold,
    /// What is held happens now, however late, and so does what comes.
    LetGo,
    /// The device is lost: every call and every batch under way fails from now on.
    Lose,
    /// As [`Fault::Lose`], and shutting it down hangs until [`Fault::LetGo`].
    LoseAndHang,
}

/// The stand-in.
#[derive(Debug)]
pub struct HostOnly {
    info: DeviceInfo,
    alone: bool,
    shared: Arc<Shared>,
    worker: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    counts: Counts,
    faults: Vec<Fault>,
    work: Work,
    holding: bool,
    lost: bool,
    closing: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    chunks: u64,
    chunk_bytes: u64,
    imports: u64,
    registrations: u64,
    flights: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether this fault was asked for; it happens once.
    fn strikes(&mut self, fault: Fault) -> bool {
        let found = self.faults.iter().position(|asked| *asked == fault);
        found.map(|index| self.faults.remove(index)).is_some()
    }

    fn alive(&self) -> Result<(), DeviceError> {
        if self.lost { Err(DeviceError::Lost { detail: "injected".to_owned() }) } else { Ok(()) }
    }
}

impl HostOnly {
    /// A stand-in with room for `capacity` bytes of chunks.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] if no thread can be started.
    pub fn new(ordinal: u32, capacity: ByteCount) -> Result<Self, DeviceError> {
        let shared = Arc::new(Shared::default());
        let worker = std::thread::Builder::new()
            .name(format!("host-only-{ordinal}"))
            .spawn({
                let shared = Arc::clone(&shared);
                move || work::run(&shared)
            })
            .map_err(|error| DeviceError::Driver { call: "thread", detail: error.to_string() })?;
        let mut uuid = *b"terrace-host\0\0\0\0";
        uuid[12..].copy_from_slice(&ordinal.to_le_bytes());
        let info = DeviceInfo {
            ordinal,
            kind: DeviceKind::HostOnly,
            name: "host memory, no GPU".to_owned(),
            uuid,
            bytes: capacity,
            driver_version: 0,
            compute_capability: (0, 0),
            granularity: ByteCount::new(GRANULARITY),
            rdma_capable: false,
        };
        Ok(Self { info, alone: false, shared, worker: Some(worker) })
    }

    /// As a device that reaches no other one, for want of a link between them.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Makes something go wrong.
    pub fn inject(&self, fault: Fault) {
        let mut state = self.shared.lock();
        match fault {
            Fault::NoMemory | Fault::NoRegistration | Fault::RefusedStart | Fault::FailedCopy => {
                state.faults.push(fault);
            }
            Fault::Hold => state.holding = true,
            Fault::LetGo => state.holding = false,
            Fault::Lose => state.lost = true,
            Fault::LoseAndHang => {
                state.lost = true;
                state.holding = true;
            }
        }
        self.shared.wake.notify_all();
    }

    fn mapped(&self, descriptor: OwnedFd, bytes: u64, counted: Counted) -> Result<Arc<Chunk>, DeviceError> {
        let memory = MemfdChunk::map(descriptor, bytes, counted)?;
        Ok(Arc::new(Chunk::new(&self.info, memory.address(), ByteCount::new(bytes), Box::new(memory))))
    }
}

impl Drop for HostOnly {
    /// Waits for what is under way, unless it is held: then it never happens.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_all();
        // The worker only panics with the process.
        let _ = self.worker.take().map(std::thread::JoinHandle::join);
    }
}

impl Device for HostOnly {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn room(&self) -> Result<Room, DeviceError> {
        let state = self.shared.lock();
        state.alive()?;
        let Counts { chunks, chunk_bytes, imports, registrations, flights } = state.counts;
        Ok(Room {
            free: ByteCount::new(self.info.bytes.get() - chunk_bytes),
            total: self.info.bytes,
            chunks,
            chunk_bytes: ByteCount::new(chunk_bytes),
            imports,
            registrations,
            flights,
        })
    }

    fn create(&self, bytes: ByteCount) -> Result<Arc<Chunk>, DeviceError> {
        let full = DeviceError::NoMemory { bytes: bytes.get() };
        let length = bytes.round_up(GRANULARITY).filter(|length| length.get() > 0).ok_or(full.clone())?.get();
        {
            let mut state = self.shared.lock();
            state.alive()?;
            let after = state.counts.chunk_bytes.checked_add(length);
            let fits = after.is_some_and(|after| after <= self.info.bytes.get());
            if !fits || state.strikes(Fault::NoMemory) {
                return Err(full);
            }
            state.counts.chunk_bytes += length;
            state.counts.chunks += 1;
        }
        let counted = Counted::made(Arc::clone(&self.shared), length);
        let descriptor = chunk::memfd(length)?;
        self.mapped(descriptor, length, counted)
    }

    fn import(&self, descriptor: OwnedFd, bytes: ByteCount) -> Result<Arc<Chunk>, DeviceError> {
        self.shared.lock().alive()?;
        chunk::check(&descriptor, bytes.get())?;
        self.shared.lock().counts.imports += 1;
        self.mapped(descriptor, bytes.get(), Counted::imported(Arc::clone(&self.shared)))
    }

    fn register(&self, bytes: HostBytes) -> Result<Registered, DeviceError> {
        let mut state = self.shared.lock();
        state.alive()?;
        if state.strikes(Fault::NoRegistration) {
            return Err(DeviceError::Driver { call: "register", detail: "injected".to_owned() });
        }
        state.counts.registrations += 1;
        Ok(Registered::new(bytes, Box::new(Counted::registered(Arc::clone(&self.shared)))))
    }

    fn start(&self, _lane: Lane, pieces: Arc<[Piece]>) -> Result<Box<dyn Mark>, DeviceError> {
        let mut state = self.shared.lock();
        state.alive()?;
        if state.strikes(Fault::RefusedStart) {
            return Err(DeviceError::Driver { call: "start", detail: "injected".to_owned() });
        }
        state.counts.flights += 1;
        let flight = Flight::new(Arc::clone(&self.shared), pieces);
        let mark = flight.mark();
        state.work.push(flight);
        drop(state);
        self.shared.wake.notify_all();
        Ok(mark)
    }

    fn shut(&self) -> Result<(), DeviceError> {
        let mut state = self.shared.lock();
        state.lost = true;
        self.shared.wake.notify_all();
        while state.holding || state.work.is_busy() {
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn bind_thread(&self) -> Result<(), DeviceError> {
        self.shared.lock().alive()
    }

    fn reaches(&self, other: &DeviceInfo) -> bool {
        !self.alone && other.kind == DeviceKind::HostOnly
    }
}

impl Registration for Counted {}
