//! Where kernels run: memory, copies and launches in one order.

use std::any::Any;
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::Arc;

use super::{Kernel, KernelError};
use crate::device::Chunk;
use crate::span::DeviceBytes;

/// Runs what it is given in the order in which it came.
pub trait KernelQueue: Debug + Send + Sync {
    /// What runs the kernels, and where they came from, for logs.
    fn describe(&self) -> String;

    /// Takes memory of zeros. It is freed with the last of its [`KernelBytes`],
    /// after what was launched before.
    ///
    /// # Errors
    /// [`DeviceError::NoMemory`](crate::DeviceError::NoMemory), or what else the driver says.
    fn allocate(&self, bytes: usize) -> Result<KernelBytes, KernelError>;

    /// Copies host memory to the device and waits.
    ///
    /// # Errors
    /// If the lengths differ, or what the driver says.
    fn write(&self, target: &KernelBytes, source: &[u8]) -> Result<(), KernelError>;

    /// Waits for everything before, and copies to host memory.
    ///
    /// # Errors
    /// If the lengths differ, or what the driver says.
    fn read(&self, source: &KernelBytes, target: &mut [u8]) -> Result<(), KernelError>;

    /// Starts a kernel.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and the addresses in them are good
    /// for what the kernel reads and writes until the queue has come to an end.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError>;

    /// Waits for everything that was started.
    ///
    /// # Errors
    /// What the driver says; what was started must not be used.
    fn wait(&self) -> Result<(), KernelError>;

    /// Whether kernels find the memory of a chunk at its address.
    fn reaches(&self, chunk: &Chunk) -> bool;
}

/// A kernel with its parameters, and how many run it.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Which one.
    pub kernel: Kernel,
    /// Groups of threads, in three directions.
    pub grid: [u32; 3],
    /// Threads of a group.
    pub threads: u32,
    pub(crate) parameters: *const c_void,
    lives: std::marker::PhantomData<&'a ()>,
}

impl<'a> Launch<'a> {
    /// A launch with these parameters.
    pub fn new<T: Parameters>(kernel: Kernel, grid: [u32; 3], threads: u32, parameters: &'a T) -> Self {
        let parameters = std::ptr::from_ref(parameters).cast();
        Self { kernel, grid, threads, parameters, lives: std::marker::PhantomData }
    }
}

/// The one parameter of a kernel.
///
/// # Safety
/// `repr(C)`, with the fields of the structure of the same name in the source, in
/// the same order.
pub unsafe trait Parameters: Copy {}

/// Memory that kernels may use while this or a clone of it lives.
#[derive(Clone)]
pub struct KernelBytes {
    address: u64,
    bytes: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

impl Debug for KernelBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KernelBytes({:#x}, {} bytes)", self.address, self.bytes)
    }
}

impl KernelBytes {
    /// Memory of somebody else, for example a leased block.
    ///
    /// # Safety
    /// The device that will use it may read and write the bytes while `owner` lives.
    pub unsafe fn new(address: u64, bytes: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { address, bytes, owner }
    }

    /// A part of a chunk, for example a leased block. `owner` is kept with it: what grants the bytes.
    ///
    /// # Errors
    /// [`KernelError::BadJob`] if the queue is not on the chunk's device.
    pub fn lent(
        queue: &dyn KernelQueue,
        bytes: &DeviceBytes,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, KernelError> {
        let chunk = bytes.chunk();
        if !queue.reaches(chunk) {
            let (kind, device) = (chunk.kind().label(), chunk.device());
            return Err(KernelError::bad(format!("memory of {kind}:{device} for {}", queue.describe())));
        }
        let length = usize::try_from(bytes.bytes().get())
            .map_err(|_| KernelError::bad("longer than the memory of this process"))?;
        let owner = Arc::new((bytes.clone(), owner));
        // SAFETY: the part lies in its chunk, which stays mapped while `owner` lives, and the queue finds it there.
        Ok(unsafe { Self::new(bytes.address(), length, owner) })
    }

    /// Where the device finds the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// A part.
    ///
    /// # Errors
    /// If it leaves the whole.
    pub fn part(&self, offset: usize, bytes: usize) -> Result<Self, KernelError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(KernelError::bad(format!("{bytes} bytes at {offset} of {}", self.bytes)));
        }
        Ok(Self { address: self.address + offset as u64, bytes, owner: Arc::clone(&self.owner) })
    }

    pub(super) fn fits(&self, length: usize) -> Result<(), KernelError> {
        if self.bytes == length {
            return Ok(());
        }
        Err(KernelError::bad(format!("{length} bytes for {} on the device", self.bytes)))
    }
}

/// Little-endian bytes of numbers, as devices read them.
pub(super) fn bytes_of(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
