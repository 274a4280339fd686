//! Chunks on a device: physical memory of their own, an address range, and a
//! descriptor for other processes.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{
    self, CUdevice, CUdeviceptr, CUmemAccess_flags_enum, CUmemAccessDesc,
    CUmemAllocationGranularity_flags_enum, CUmemAllocationHandleType_enum as HandleType, CUmemAllocationProp,
    CUmemAllocationProp_st__bindgen_ty_1, CUmemAllocationType_enum, CUmemGenericAllocationHandle,
    CUmemLocation, CUmemLocationType_enum,
};
use terrace_core::{ByteCount, IoClass};

use super::driver::sized;
use super::{Context, check};
use crate::device::{ChunkMemory, Lane, Mark};
use crate::error::DeviceError;
use crate::span::Direction;

/// Zeroing a chunk takes microseconds.
const ZERO_WITHIN: Duration = Duration::from_secs(10);

/// Physical memory, mapped. Dropped: unmapped, freed, the address range given
/// back, each as far as it came.
#[derive(Debug)]
pub(super) struct Vmm {
    context: Arc<Context>,
    handle: CUmemGenericAllocationHandle,
    length: usize,
    address: CUdeviceptr,
    mapped: bool,
    imported: bool,
}

fn location(device: CUdevice) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

fn properties(device: CUdevice, rdma: bool) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: HandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: u8::from(rdma),
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// Chunks are multiples of it.
pub(super) fn granularity(device: CUdevice, rdma: bool) -> Result<ByteCount, DeviceError> {
    let mut bytes = 0;
    let properties = properties(device, rdma);
    let option = CUmemAllocationGranularity_flags_enum::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: the driver reads one struct and writes one number.
    check("cuMemGetAllocationGranularity", unsafe {
        sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const properties, option)
    })?;
    if bytes == 0 {
        return Err(DeviceError::Unsupported { what: "memory in multiples of zero bytes".to_owned() });
    }
    Ok(ByteCount::new(bytes as u64))
}

impl Vmm {
    /// Memory of zeros. `bytes` is a multiple of the granularity.
    pub(super) fn create(
        context: &Arc<Context>,
        bytes: ByteCount,
        rdma: bool,
        peers: &[CUdevice],
    ) -> Result<Self, DeviceError> {
        let full = || DeviceError::NoMemory { bytes: bytes.get() };
        let sized = |error| sized(error, bytes);
        let length = usize::try_from(bytes.get()).map_err(|_| full())?;
        let properties = properties(context.device, rdma);
        let mut handle = 0;
        // SAFETY: the context is current; the driver reads one struct and writes one handle.
        check("cuMemCreate", unsafe { sys::cuMemCreate(&raw mut handle, length, &raw const properties, 0) })
            .map_err(sized)?;
        context.counts.chunks.fetch_add(1, Ordering::Relaxed);
        context.counts.chunk_bytes.fetch_add(bytes.get(), Ordering::Relaxed);
        let context = Arc::clone(context);
        let mut vmm = Self { context, handle, length, address: 0, mapped: false, imported: false };
        vmm.map().map_err(sized)?;
        for peer in peers {
            // A peer that cannot be given access is not copied to directly; that shows at the copy.
            let _ = vmm.give_access(*peer);
        }
        vmm.zero()
    }

    /// Memory of another process.
    pub(super) fn import(
        context: &Arc<Context>,
        descriptor: &OwnedFd,
        bytes: ByteCount,
    ) -> Result<Self, DeviceError> {
        let bad = |error: DeviceError| match error {
            DeviceError::Driver { call, detail } => {
                DeviceError::BadDescriptor { detail: format!("{call} says {detail}") }
            }
            other => other,
        };
        let length =
            usize::try_from(bytes.get()).map_err(|_| DeviceError::NoMemory { bytes: bytes.get() })?;
        let number = usize::try_from(descriptor.as_raw_fd()).expect("an open descriptor is not negative");
        let named = std::ptr::without_provenance_mut(number);
        let mut handle = 0;
        // SAFETY: the context is current. For this type of handle the driver takes the descriptor's number in place
        // of a pointer, takes no ownership of it, and writes one handle.
        check("cuMemImportFromShareableHandle", unsafe {
            let by_descriptor = HandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            sys::cuMemImportFromShareableHandle(&raw mut handle, named, by_descriptor)
        })
        .map_err(bad)?;
        context.counts.imports.fetch_add(1, Ordering::Relaxed);
        let context = Arc::clone(context);
        let mut vmm = Self { context, handle, length, address: 0, mapped: false, imported: true };
        vmm.map().map_err(bad)?;
        Ok(vmm)
    }

    fn map(&mut self) -> Result<(), DeviceError> {
        // SAFETY: the context is current, and the driver writes one address.
        check("cuMemAddressReserve", unsafe {
            sys::cuMemAddressReserve(&raw mut self.address, self.length, 0, 0, 0)
        })?;
        // SAFETY: the range was reserved a line above and nothing is mapped there; the handle is alive.
        check("cuMemMap", unsafe { sys::cuMemMap(self.address, self.length, 0, self.handle, 0) })?;
        self.mapped = true;
        self.give_access(self.context.device)
    }

    fn give_access(&self, device: CUdevice) -> Result<(), DeviceError> {
        let access = CUmemAccessDesc {
            location: location(device),
            flags: CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range is mapped whole, and the driver reads one struct.
        check("cuMemSetAccess", unsafe {
            sys::cuMemSetAccess(self.address, self.length, &raw const access, 1)
        })
    }

    /// The driver promises nothing about what fresh memory holds.
    fn zero(self) -> Result<Self, DeviceError> {
        let stream =
            self.context.stream(Lane { direction: Direction::DeviceToDevice, class: IoClass::Demotion })?;
        // SAFETY: the range is mapped and nobody else has it; the stream is of the current context.
        let set =
            check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(self.address, 0, self.length, stream) });
        let ended = set.and_then(|()| {
            let mut mark = self.context.event(stream, Arc::from(Vec::new()))?;
            let began = Instant::now();
            while !mark.ended()? {
                if began.elapsed() > ZERO_WITHIN {
                    return Err(DeviceError::Late(ZERO_WITHIN));
                }
                std::thread::sleep(Duration::from_micros(20));
            }
            Ok(())
        });
        match ended {
            Ok(()) => Ok(self),
            Err(error) => {
                // The device may still be writing: the range stays mapped for good.
                std::mem::forget(self);
                Err(error)
            }
        }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> ByteCount {
        ByteCount::new(self.length as u64)
    }
}

impl ChunkMemory for Vmm {
    fn export(&self) -> Result<OwnedFd, DeviceError> {
        self.context.bind()?;
        let mut raw: libc::c_int = -1;
        // SAFETY: the handle is alive and was made for this type; the driver writes one descriptor.
        check("cuMemExportToShareableHandle", unsafe {
            let by_descriptor = HandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            sys::cuMemExportToShareableHandle((&raw mut raw).cast(), self.handle, by_descriptor, 0)
        })?;
        if raw < 0 {
            return Err(DeviceError::BadDescriptor { detail: "the driver gave none".to_owned() });
        }
        // SAFETY: a fresh descriptor that nobody else has.
        let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: a call on our own descriptor. It must not pass into programs that we start.
        unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) };
        Ok(descriptor)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let counts = &self.context.counts;
        if self.imported {
            counts.imports.fetch_sub(1, Ordering::Relaxed);
        } else {
            counts.chunks.fetch_sub(1, Ordering::Relaxed);
            counts.chunk_bytes.fetch_sub(self.length as u64, Ordering::Relaxed);
        }
        if self.context.bind().is_err() {
            return;
        }
        // SAFETY: exactly what this value mapped, made and reserved, in the opposite order; whoever copies keeps the
        // chunk, so nothing of ours is under way over it. A failure leaks, which is all that can be done.
        unsafe {
            if self.mapped {
                sys::cuMemUnmap(self.address, self.length);
            }
            sys::cuMemRelease(self.handle);
            if self.address != 0 {
                sys::cuMemAddressFree(self.address, self.length);
            }
        }
    }
}
