//! Kernels on a CUDA device, on one stream.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUmodule, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::nvrtc::{Nvrtc, Target};
use super::queue::{KernelBytes, KernelQueue, Launch};
use super::{Kernel, KernelError, Source};
use crate::status::driver_present;

/// Compute capability that the PTX beside the sources is for.
const PTX_CAPABILITY: u32 = 90;
/// Memory up to this length is kept for the next allocation of the same size, up to [`KEPT_MAX`] in all:
/// taking device memory anew stops the device.
const KEPT_EACH_MAX: usize = 64 << 20;
const KEPT_MAX: usize = 256 << 20;

/// One device with our kernels, and a stream.
#[derive(Debug)]
pub struct Cuda {
    functions: BTreeMap<Kernel, Function>,
    described: String,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    modules: Vec<Loaded>,
    kept: Mutex<Kept>,
}

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

#[derive(Debug)]
struct Loaded(CUmodule);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for address in std::mem::take(&mut kept.free).into_values().flatten() {
            // SAFETY: it came from the driver and nobody has it. A lost device frees nothing, and needs not.
            unsafe { result::free_sync(address) }.ok();
        }
        for module in self.modules.drain(..) {
            // SAFETY: loaded in `Cuda::open`, and unloaded only here, where no kernel of it can be started.
            unsafe { result::module::unload(module.0) }.ok();
        }
    }
}

impl Cuda {
    /// Opens a device by its ordinal and loads all kernels: compiled by NVRTC for this very device where
    /// that is installed, else from the PTX that we carry.
    ///
    /// # Errors
    /// [`KernelError::NoDevice`], [`KernelError::TooOld`], or what the driver says.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        let lacking = |detail: String| KernelError::NoDevice { detail };
        if !driver_present() {
            return Err(lacking("there is no driver; install one, or run without a device".to_owned()));
        }
        let context = CudaContext::new(ordinal).map_err(|error| lacking(error.to_string()))?;
        let stream = context.new_stream().map_err(|error| said("cuStreamCreate", error))?;
        let (major, minor) =
            context.compute_capability().map_err(|error| said("cuDeviceGetAttribute", error))?;
        let name = context.name().map_err(|error| said("cuDeviceGetName", error))?;
        let capability = u32::try_from(major * 10 + minor).unwrap_or(0);
        let mut inner = Inner { stream, context, modules: Vec::new(), kept: Mutex::default() };
        let (functions, origin) = match by_nvrtc(capability).and_then(|found| load(&mut inner, found)) {
            Ok(loaded) => loaded,
            Err(reason) => load(&mut inner, carried(capability, &reason)?)?,
        };
        let described = format!("cuda:{ordinal} ({name}), kernels {origin}");
        Ok(Self { functions, described, inner: Arc::new(inner) })
    }

    fn bind(&self) -> Result<(), KernelError> {
        self.inner.context.bind_to_thread().map_err(|error| said("cuCtxSetCurrent", error))
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

fn load(inner: &mut Inner, images: Images) -> Result<(BTreeMap<Kernel, Function>, String), KernelError> {
    let mut functions = BTreeMap::new();
    for (source, image) in images.0 {
        // SAFETY: PTX that ends in a zero, or machine code, of our own sources.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(|error| said("cuModuleLoadData", error))?;
        inner.modules.push(Loaded(module));
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.source() == source) {
            let name = CString::new(kernel.name()).expect("names have no zero");
            // SAFETY: the module was loaded just now.
            let function = unsafe { result::module::get_function(module, name) }
                .map_err(|error| said("cuModuleGetFunction", error))?;
            functions.insert(kernel, Function(function));
        }
    }
    Ok((functions, images.1))
}

fn said(call: &'static str, error: DriverError) -> KernelError {
    KernelError::Driver { call, detail: error.to_string() }
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
        if self.inner.context.bind_to_thread().is_ok() {
            // SAFETY: it came from the driver, and nobody else has it. The driver waits for what uses it.
            unsafe { result::free_sync(self.address) }.ok();
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
        // SAFETY: the length is not zero.
        unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::NoMemory { bytes },
            _ => said("cuMemAlloc", error),
        })
    }
}

impl KernelQueue for Cuda {
    fn describe(&self) -> String {
        self.described.clone()
    }

    fn allocate(&self, bytes: usize) -> Result<KernelBytes, KernelError> {
        self.bind()?;
        let rounded = bytes.max(256).checked_next_power_of_two().ok_or(KernelError::NoMemory { bytes })?;
        // Above what is kept, nothing is gained by equal lengths.
        let rounded = if rounded <= KEPT_EACH_MAX { rounded } else { bytes };
        let address = self.inner.take(rounded)?;
        let taken = Taken { address, bytes: rounded, inner: Arc::clone(&self.inner) };
        // SAFETY: the memory is as long as this, and ours.
        unsafe { result::memset_d8_async(address, 0, rounded, self.inner.stream.cu_stream()) }
            .map_err(|error| said("cuMemsetD8Async", error))?;
        // SAFETY: the memory stays as long as `taken`.
        Ok(unsafe { KernelBytes::new(address, bytes, Arc::new(taken)) })
    }

    fn write(&self, target: &KernelBytes, source: &[u8]) -> Result<(), KernelError> {
        target.fits(source.len())?;
        self.bind()?;
        // SAFETY: the lengths are equal, and whoever made the bytes vouches for their address. The source
        // stays borrowed until the copy has ended, which is waited for.
        unsafe { result::memcpy_htod_async(target.address(), source, self.inner.stream.cu_stream()) }
            .map_err(|error| said("cuMemcpyHtoDAsync", error))?;
        self.wait()
    }

    fn read(&self, source: &KernelBytes, target: &mut [u8]) -> Result<(), KernelError> {
        source.fits(target.len())?;
        self.bind()?;
        // SAFETY: as in `write`.
        unsafe { result::memcpy_dtoh_async(target, source.address(), self.inner.stream.cu_stream()) }
            .map_err(|error| said("cuMemcpyDtoHAsync", error))?;
        self.wait()
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        self.bind()?;
        let function = self.functions[&launch.kernel];
        let mut parameters: [*mut c_void; 1] = [launch.parameters.cast_mut()];
        let [x, y, z] = launch.grid;
        let stream: sys::CUstream = self.inner.stream.cu_stream();
        // SAFETY: the caller's promise; the driver copies the parameters before it returns.
        unsafe {
            result::launch_kernel(function.0, (x, y, z), (launch.threads, 1, 1), 0, stream, &mut parameters)
        }
        .map_err(|error| said("cuLaunchKernel", error))
    }

    fn wait(&self) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the stream lives as long as `inner`.
        unsafe { result::stream::synchronize(self.inner.stream.cu_stream()) }
            .map_err(|error| said("cuStreamSynchronize", error))
    }
}
