//! One CUDA device, by the driver API, loaded at run time.
//!
//! [`Cuda::open`] is the only way in. It looks for the library and every function
//! that is called here first, because the bindings panic where one is missing,
//! and it gives up on a driver that does not answer.

mod driver;
mod vmm;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute_enum as Attribute, CUevent, CUevent_flags, CUresult,
    CUstream, CUstream_flags,
};
use terrace_core::{ByteCount, IoClass};

use crate::device::{Chunk, Device, DeviceInfo, DeviceKind, Lane, Mark, Registered, Registration, Room};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::span::{Direction, Piece, Span};

pub(crate) use driver::{check, count, find, gpu, has, load, wanted, within};
use vmm::Vmm;

/// The driver wakes devices that nobody used for a while, one after the other.
const OPEN_WITHIN: Duration = Duration::from_secs(60);

/// A device of the driver.
#[derive(Debug)]
pub struct Cuda {
    context: Arc<Context>,
    info: DeviceInfo,
    peers: Vec<CUdevice>,
}

/// The primary context of a device, which kernels and libraries of this process
/// share, and what was made in it. Everything that must be given back keeps it.
#[derive(Debug)]
struct Context {
    device: CUdevice,
    raw: CUcontext,
    streams: Mutex<BTreeMap<Lane, Stream>>,
    /// It was reset: nothing of it may be named any more.
    gone: AtomicBool,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    chunks: AtomicU64,
    chunk_bytes: AtomicU64,
    imports: AtomicU64,
    registrations: AtomicU64,
    flights: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Stream(CUstream);

// SAFETY: the driver takes a context and a stream from any thread; the context is made current before each use.
unsafe impl Send for Context {}
// SAFETY: as above; what changes lies in a mutex or in atomics.
unsafe impl Sync for Context {}
// SAFETY: as for `Context`.
unsafe impl Send for Stream {}

impl Context {
    /// Makes it current on this thread.
    fn bind(&self) -> Result<(), DeviceError> {
        if self.gone.load(Ordering::Acquire) {
            return Err(DeviceError::Lost { detail: "its context was shut".to_owned() });
        }
        // SAFETY: the context is retained until this value is dropped.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// The stream of a lane, made at its first use.
    fn stream(&self, lane: Lane) -> Result<CUstream, DeviceError> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.get(&lane) {
            return Ok(stream.0);
        }
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is current, and the driver writes two numbers.
        check("cuCtxGetStreamPriorityRange", unsafe {
            sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)
        })?;
        let mut raw = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let priority = priority(lane.class, least, greatest);
        // SAFETY: the context is current, and the driver writes one handle.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&raw mut raw, flags, priority)
        })?;
        streams.insert(lane, Stream(raw));
        Ok(raw)
    }

    /// An event at the end of what a stream has been given.
    fn event(self: &Arc<Self>, stream: CUstream, pieces: Arc<[Piece]>) -> Result<CudaMark, DeviceError> {
        let mut raw = std::ptr::null_mut();
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current, and the driver writes one handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        self.counts.flights.fetch_add(1, Ordering::Relaxed);
        let mut mark = CudaMark { context: Arc::clone(self), raw, pieces: Some(pieces), over: false };
        // SAFETY: stream and event are of this context and alive.
        let recorded = check("cuEventRecord", unsafe { sys::cuEventRecord(raw, stream) });
        if let Err(error) = recorded {
            // No copy hangs on this event; the caller waits for those of the stream.
            mark.over = true;
            return Err(error);
        }
        Ok(mark)
    }
}

/// Urgent classes before others, as far as the device tells them apart.
fn priority(class: IoClass, least: i32, greatest: i32) -> i32 {
    let place = IoClass::ALL.iter().position(|of| *of == class).unwrap_or(0);
    let steps = i32::try_from(IoClass::ALL.len() - 1).unwrap_or(1);
    greatest + (least - greatest) * i32::try_from(place).unwrap_or(0) / steps
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        let streams = std::mem::take(self.streams.get_mut().unwrap_or_else(PoisonError::into_inner));
        for stream in streams.into_values() {
            // SAFETY: a stream of this context; nobody can name it after this.
            unsafe { sys::cuStreamDestroy_v2(stream.0) };
        }
        // SAFETY: gives back what `open` retained, once.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Cuda {
    /// Opens a device by its ordinal. Takes a second or more.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::DriverTooOld`], [`DeviceError::NoDevice`],
    /// [`DeviceError::Unsupported`], [`DeviceError::Hung`] after a minute, or what the driver says.
    pub fn open(ordinal: u32) -> Result<Self, DeviceError> {
        Self::open_within(ordinal, OPEN_WITHIN)
    }

    /// The same, for a caller with less time.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_within(ordinal: u32, time: Duration) -> Result<Self, DeviceError> {
        within("opening the device", time, move || Self::open_now(ordinal))?
    }

    fn open_now(ordinal: u32) -> Result<Self, DeviceError> {
        let driver_version = load()?;
        let count = count()?;
        let named = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let named = named.ok_or(DeviceError::NoDevice { ordinal, count })?;
        let mut device = 0;
        // SAFETY: the driver is initialised and writes one number.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, named) })?;
        for (attribute, what) in [
            (Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
            (
                Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                "memory with POSIX descriptors",
            ),
        ] {
            if driver::attribute(device, attribute)? == 0 {
                return Err(DeviceError::Unsupported { what: what.to_owned() });
            }
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the device exists, and the driver writes one handle.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        let context = Arc::new(Context {
            device,
            raw,
            streams: Mutex::default(),
            gone: AtomicBool::new(false),
            counts: Counts::default(),
        });
        context.bind()?;
        let rdma = driver::attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
        )?;
        let info = DeviceInfo {
            ordinal,
            kind: DeviceKind::Cuda,
            name: driver::name(device)?,
            uuid: driver::uuid(device)?,
            bytes: driver::memory(device)?,
            driver_version,
            compute_capability: driver::compute_capability(device)?,
            granularity: vmm::granularity(device, rdma != 0)?,
            rdma_capable: rdma != 0,
        };
        let peers = driver::peers(device, count);
        Ok(Self { context, info, peers })
    }

    fn chunk(&self, vmm: Vmm) -> Arc<Chunk> {
        let (address, bytes) = (vmm.address(), vmm.bytes());
        Arc::new(Chunk::new(&self.info, address, bytes, Box::new(vmm)))
    }
}

impl Device for Cuda {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn room(&self) -> Result<Room, DeviceError> {
        self.context.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, and the driver writes two numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        let counts = &self.context.counts;
        Ok(Room {
            free: ByteCount::new(free as u64),
            total: ByteCount::new(total as u64),
            chunks: counts.chunks.load(Ordering::Relaxed),
            chunk_bytes: ByteCount::new(counts.chunk_bytes.load(Ordering::Relaxed)),
            imports: counts.imports.load(Ordering::Relaxed),
            registrations: counts.registrations.load(Ordering::Relaxed),
            flights: counts.flights.load(Ordering::Relaxed),
        })
    }

    fn create(&self, bytes: ByteCount) -> Result<Arc<Chunk>, DeviceError> {
        self.context.bind()?;
        let full = DeviceError::NoMemory { bytes: bytes.get() };
        let length = bytes.round_up(self.info.granularity.get()).filter(|length| length.get() > 0);
        let vmm = Vmm::create(&self.context, length.ok_or(full)?, self.info.rdma_capable, &self.peers)?;
        Ok(self.chunk(vmm))
    }

    fn import(&self, descriptor: OwnedFd, bytes: ByteCount) -> Result<Arc<Chunk>, DeviceError> {
        self.context.bind()?;
        Ok(self.chunk(Vmm::import(&self.context, &descriptor, bytes)?))
    }

    fn register(&self, bytes: HostBytes) -> Result<Registered, DeviceError> {
        self.context.bind()?;
        let start = bytes.as_ptr().cast();
        // Every context of the process may use it.
        let portable = sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: the memory is mapped while `bytes` lives, which the answer keeps until it is unregistered.
        check("cuMemHostRegister", unsafe { sys::cuMemHostRegister_v2(start, bytes.len(), portable) })?;
        self.context.counts.registrations.fetch_add(1, Ordering::Relaxed);
        let guard = CudaRegistration { context: Arc::clone(&self.context), start: bytes.as_ptr() };
        Ok(Registered::new(bytes, Box::new(guard)))
    }

    fn start(&self, lane: Lane, pieces: Arc<[Piece]>) -> Result<Box<dyn Mark>, DeviceError> {
        self.context.bind()?;
        let stream = self.context.stream(lane)?;
        let given = pieces.iter().try_for_each(|piece| copy(piece, stream));
        match given.and_then(|()| self.context.event(stream, Arc::clone(&pieces))) {
            Ok(mark) => Ok(Box::new(mark)),
            Err(error) => {
                // Some copies may be under way, and no event ends them: wait for the stream.
                // SAFETY: a stream of the current context.
                let idle = check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) });
                if let Err(lost) = idle {
                    std::mem::forget(pieces);
                    return Err(driver::lost(lost));
                }
                Err(error)
            }
        }
    }

    fn shut(&self) -> Result<(), DeviceError> {
        if self.context.gone.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // SAFETY: ends every context and stream of the device in this process; `gone` keeps us from naming them again.
        let reset =
            check("cuDevicePrimaryCtxReset", unsafe { sys::cuDevicePrimaryCtxReset_v2(self.context.device) });
        // A lost device answers its reset with the loss: it is reset all the same, and touches nothing any more.
        match reset {
            Err(error) if !error.is_lost() => Err(error),
            Err(_) | Ok(()) => Ok(()),
        }
    }

    fn bind_thread(&self) -> Result<(), DeviceError> {
        self.context.bind()
    }

    fn reaches(&self, other: &DeviceInfo) -> bool {
        let peer = self.peers.iter().any(|peer| u32::try_from(*peer) == Ok(other.ordinal));
        other.kind == DeviceKind::Cuda && (peer || other.uuid == self.info.uuid)
    }
}

fn copy(piece: &Piece, stream: CUstream) -> Result<(), DeviceError> {
    let length =
        usize::try_from(piece.bytes().get()).map_err(|_| DeviceError::BadJob { detail: "too long" })?;
    let address = |span: &Span| match span {
        Span::Host(host) => host.as_ptr().expose_provenance() as u64,
        Span::Device(device) => device.address(),
    };
    let (source, target) = (address(piece.source()), address(piece.target()));
    let host = piece.host().map_or(std::ptr::null_mut(), HostBytes::as_ptr).cast();
    // SAFETY: both ends were checked against their chunk or mapping, which the mark of the batch keeps until the
    // device is done with them; the stream is of the current context.
    let (call, result) = unsafe {
        match piece.direction() {
            Direction::HostToDevice => {
                ("cuMemcpyHtoDAsync", sys::cuMemcpyHtoDAsync_v2(target, host, length, stream))
            }
            Direction::DeviceToHost => {
                ("cuMemcpyDtoHAsync", sys::cuMemcpyDtoHAsync_v2(host, source, length, stream))
            }
            Direction::DeviceToDevice => {
                ("cuMemcpyDtoDAsync", sys::cuMemcpyDtoDAsync_v2(target, source, length, stream))
            }
            Direction::PeerToPeer => ("cuMemcpyAsync", sys::cuMemcpyAsync(target, source, length, stream)),
        }
    };
    check(call, result)
}

/// The event at the end of a batch, and what the batch touches.
#[derive(Debug)]
struct CudaMark {
    context: Arc<Context>,
    raw: CUevent,
    pieces: Option<Arc<[Piece]>>,
    over: bool,
}

// SAFETY: the driver takes an event from any thread of the process.
unsafe impl Send for CudaMark {}

impl Mark for CudaMark {
    fn ended(&mut self) -> Result<bool, DeviceError> {
        if self.over {
            return Ok(true);
        }
        self.context.bind()?;
        // SAFETY: the event is alive until this value is dropped.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_SUCCESS => {
                self.over = true;
                Ok(true)
            }
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            // What fails while it runs breaks the whole context.
            other => {
                Err(check("cuEventQuery", other)
                    .map_or_else(driver::lost, |()| unreachable!("not a success")))
            }
        }
    }
}

impl Drop for CudaMark {
    fn drop(&mut self) {
        let gone = self.context.gone.load(Ordering::Acquire);
        if !self.over && !gone {
            // The device may still be at it. Better lost memory than memory that changes later.
            std::mem::forget(self.pieces.take());
        }
        self.context.counts.flights.fetch_sub(1, Ordering::Relaxed);
        if self.context.bind().is_ok() {
            // SAFETY: our own event; one that is pending goes when it ends.
            unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

#[derive(Debug)]
struct CudaRegistration {
    context: Arc<Context>,
    start: *mut u8,
}

// SAFETY: the pointer is a name for the driver; nothing is read through it.
unsafe impl Send for CudaRegistration {}
// SAFETY: as above.
unsafe impl Sync for CudaRegistration {}

impl Registration for CudaRegistration {}

impl Drop for CudaRegistration {
    fn drop(&mut self) {
        self.context.counts.registrations.fetch_sub(1, Ordering::Relaxed);
        if self.context.bind().is_ok() {
            // SAFETY: registered by us, once, at this address; no copy over it is under way.
            unsafe { sys::cuMemHostUnregister(self.start.cast()) };
        }
    }
}
