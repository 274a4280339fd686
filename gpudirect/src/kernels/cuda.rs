//! Kernels on a CUDA device, on one stream.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUfunction, CUmodule, CUstream, CUstream_flags,
};

use super::nvrtc::{Nvrtc, Target};
use super::queue::{KernelBytes, KernelQueue, Launch};
use super::{Kernel, KernelError, Source};
use crate::cuda::{check, count, gpu, has, load, wanted, within};
use crate::device::{Chunk, DeviceKind};
use crate::error::DeviceError;

/// What is called here, beside what the rest of the crate calls. The bindings panic where one is missing.
const FUNCTIONS: [&str; 8] = [
    "cuStreamCreate",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemsetD8Async",
];
/// A device that sleeps needs a second or more, and compiling the kernels another.
const OPEN_WITHIN: Duration = Duration::from_secs(60);

/// Compute capability that the PTX beside the sources is for.
const PTX_CAPABILITY: u32 = 90;
/// Memory up to this length is kept for the next allocation of the same size, up to [`KEPT_MAX`] in all:
/// taking device memory anew stops the device.
const KEPT_EACH_MAX: usize = 64 << 20;
const KEPT_MAX: usize = 256 << 20;

/// One device with our kernels, and a stream.
#[derive(Debug)]
pub struct Cuda {
    ordinal: u32,
    functions: BTreeMap<Kernel, Function>,
    described: String,
    inner: Arc<Inner>,
}

/// The primary context of the device, which this process shares, and a stream in it.
#[derive(Debug)]
struct Inner {
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    modules: Vec<CUmodule>,
    kept: Mutex<Kept>,
}

// SAFETY: the driver takes its handles from any thread; the context is made current before each use, and what
// changes lies in a mutex.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// Free memory by length.
#[derive(Debug, Default)]
struct Kept {
    free: BTreeMap<usize, Vec<CUdeviceptr>>,
    bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Function(CUfunction);

// SAFETY: a handle of the driver, which any thread may use; the module is kept by `Inner`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: all of it came from the driver, and nobody can name it after this; the driver waits for
            // what still runs. A lost device frees nothing, and needs not.
            unsafe {
                sys::cuStreamSynchronize(self.stream);
                for address in std::mem::take(&mut kept.free).into_values().flatten() {
                    sys::cuMemFree_v2(address);
                }
                for module in self.modules.drain(..) {
                    sys::cuModuleUnload(module);
                }
                sys::cuStreamDestroy_v2(self.stream);
            }
        }
        // SAFETY: gives back what `open_now` retained, once.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Cuda {
    /// Opens a device by its ordinal and loads all kernels: compiled by NVRTC for this very device where
    /// that is installed, else from the PTX that we carry.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::NoDevice`], [`KernelError::TooOld`], or what the driver says.
    pub fn open(ordinal: u32) -> Result<Self, KernelError> {
        within("opening the device for kernels", OPEN_WITHIN, move || Self::open_now(ordinal))?
    }

    fn open_now(ordinal: u32) -> Result<Self, KernelError> {
        load()?;
        if let Some(missing) = FUNCTIONS.iter().find(|name| !has(name)) {
            return Err(DeviceError::DriverTooOld { found: format!("no {missing}"), needed: wanted() }.into());
        }
        let count = count()?;
        let named = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let named = named.ok_or(DeviceError::NoDevice { ordinal, count })?;
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the driver is initialised, and writes one number and one handle.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, named))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        }
        let stream = std::ptr::null_mut();
        let mut inner = Inner { device, context, stream, modules: Vec::new(), kept: Mutex::default() };
        inner.bind()?;
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current, and the driver writes one handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut inner.stream, flags) })?;
        let described = gpu(ordinal)?;
        let (major, minor) = described.compute_capability;
        let capability = major * 10 + minor;
        let (functions, origin) = match by_nvrtc(capability).and_then(|found| load_images(&mut inner, found))
        {
            Ok(loaded) => loaded,
            Err(reason) => load_images(&mut inner, carried(capability, &reason)?)?,
        };
        let described = format!("cuda:{ordinal} ({}), kernels {origin}", described.name);
        Ok(Self { ordinal, functions, described, inner: Arc::new(inner) })
    }
}

/// Images of all sources, and where they came from.
type Images = (Vec<(Source, Vec<u8>)>, String);

fn by_nvrtc(capability: u32) -> Result<Images, KernelError> {
    let nvrtc = Nvrtc::open()?;
    let (major, minor) = nvrtc.version();
    let target = Target::Machine { capability };
    let image = |source| Ok::<_, KernelError>((source, nvrtc.compile(source, target)?.image));
    let images = Source::ALL.into_iter().map(image).collect::<Result<_, _>>()?;
    Ok((images, format!("compiled by NVRTC {major}.{minor}")))
}

/// The PTX that we carry, and why it is taken.
fn carried(capability: u32, reason: &KernelError) -> Result<Images, KernelError> {
    if capability < PTX_CAPABILITY {
        let number = |capability: u32| format!("{}.{}", capability / 10, capability % 10);
        return Err(KernelError::TooOld { needed: number(PTX_CAPABILITY), found: number(capability) });
    }
    let image = |source: Source| (source, [source.ptx().as_bytes(), &[0]].concat());
    Ok((Source::ALL.map(image).into(), format!("from the PTX inside ({reason})")))
}

fn load_images(
    inner: &mut Inner,
    images: Images,
) -> Result<(BTreeMap<Kernel, Function>, String), KernelError> {
    let mut functions = BTreeMap::new();
    for (source, image) in images.0 {
        let mut module = std::ptr::null_mut();
        // SAFETY: PTX that ends in a zero, or machine code, of our own sources; the context is current.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) })?;
        inner.modules.push(module);
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.source() == source) {
            let name = CString::new(kernel.name()).expect("names have no zero");
            let mut function = std::ptr::null_mut();
            // SAFETY: the module was loaded just now, and the name ends in a zero.
            let found = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
            check("cuModuleGetFunction", found)?;
            functions.insert(kernel, Function(function));
        }
    }
    Ok((functions, images.1))
}

/// Device memory that goes back to its queue.
struct Taken {
    address: CUdeviceptr,
    bytes: usize,
    inner: Arc<Inner>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut kept = self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // What was launched before still has it, and what is launched behind comes later: one stream.
        if self.bytes <= KEPT_EACH_MAX && kept.bytes + self.bytes <= KEPT_MAX {
            kept.bytes += self.bytes;
            kept.free.entry(self.bytes).or_default().push(self.address);
            return;
        }
        drop(kept);
        if self.inner.bind().is_ok() {
            // SAFETY: it came from the driver, and nobody else has it. The driver waits for what uses it.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

impl Inner {
    fn take(&self, bytes: usize) -> Result<CUdeviceptr, KernelError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(address) = kept.free.get_mut(&bytes).and_then(Vec::pop) {
            kept.bytes -= bytes;
            return Ok(address);
        }
        drop(kept);
        let mut address = 0;
        // SAFETY: the context is current, the length is not zero, and the driver writes one address.
        match check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }) {
            Err(DeviceError::NoMemory { .. }) => Err(no_memory(bytes)),
            answer => Ok(answer.map(|()| address)?),
        }
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<(), KernelError> {
        // SAFETY: the context is retained until this value is dropped.
        Ok(check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })?)
    }
}

fn no_memory(bytes: usize) -> KernelError {
    DeviceError::NoMemory { bytes: bytes as u64 }.into()
}

impl KernelQueue for Cuda {
    fn describe(&self) -> String {
        self.described.clone()
    }

    fn allocate(&self, bytes: usize) -> Result<KernelBytes, KernelError> {
        self.inner.bind()?;
        let rounded = bytes.max(256).checked_next_power_of_two().ok_or_else(|| no_memory(bytes))?;
        // Above what is kept, nothing is gained by equal lengths.
        let rounded = if rounded <= KEPT_EACH_MAX { rounded } else { bytes };
        let address = self.inner.take(rounded)?;
        let taken = Taken { address, bytes: rounded, inner: Arc::clone(&self.inner) };
        // SAFETY: the memory is as long as this, and ours.
        let zeroed = unsafe { sys::cuMemsetD8Async(address, 0, rounded, self.inner.stream) };
        check("cuMemsetD8Async", zeroed)?;
        // SAFETY: the memory stays as long as `taken`.
        Ok(unsafe { KernelBytes::new(address, bytes, Arc::new(taken)) })
    }

    fn write(&self, target: &KernelBytes, source: &[u8]) -> Result<(), KernelError> {
        target.fits(source.len())?;
        self.inner.bind()?;
        // SAFETY: the lengths are equal, and whoever made the bytes vouches for their address. The source
        // stays borrowed until the copy has ended, which is waited for.
        let copied = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                target.address(),
                source.as_ptr().cast(),
                source.len(),
                self.inner.stream,
            )
        };
        check("cuMemcpyHtoDAsync", copied)?;
        self.wait()
    }

    fn read(&self, source: &KernelBytes, target: &mut [u8]) -> Result<(), KernelError> {
        source.fits(target.len())?;
        self.inner.bind()?;
        let length = target.len();
        // SAFETY: as in `write`.
        let copied = unsafe {
            sys::cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), source.address(), length, self.inner.stream)
        };
        check("cuMemcpyDtoHAsync", copied)?;
        self.wait()
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        self.inner.bind()?;
        let function = self.functions[&launch.kernel].0;
        let mut parameters: [*mut c_void; 1] = [launch.parameters.cast_mut()];
        let ([x, y, z], threads, stream) = (launch.grid, launch.threads, self.inner.stream);
        let none = std::ptr::null_mut();
        // SAFETY: the caller's promise; the driver copies the parameters before it returns.
        let started = unsafe {
            sys::cuLaunchKernel(function, x, y, z, threads, 1, 1, 0, stream, parameters.as_mut_ptr(), none)
        };
        Ok(check("cuLaunchKernel", started)?)
    }

    fn wait(&self) -> Result<(), KernelError> {
        self.inner.bind()?;
        // SAFETY: a stream of the current context.
        Ok(check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.inner.stream) })?)
    }
    fn reaches(&self, chunk: &Chunk) -> bool {
        chunk.kind() == DeviceKind::Cuda && chunk.device() == self.ordinal
    }
}
