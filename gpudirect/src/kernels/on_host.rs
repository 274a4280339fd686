//! The kernels on the host's processor, for tests on machines without a device.
//!
//! The sources are compiled as C++ with `on_host/cuda.h` in front, which makes the
//! threads of a group coroutines. "Device" memory is host memory. It is slow, and
//! nothing chooses it by itself.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use libloading::Library;

use super::queue::{KernelBytes, KernelQueue, Launch};
use super::{COMMON, Cuda, KernelError, Source};
use crate::device::{Chunk, DeviceKind};
use crate::error::DeviceError;

type LaunchByName = unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, *mut *mut c_void) -> c_int;

// Products and sums are never contracted, as on the device.
const OPTIONS: [&str; 9] =
    ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-x", "c++"];

/// The kernels as a library of the host.
#[derive(Debug)]
pub struct OnHost {
    launch: LaunchByName,
    // What `launch` points into.
    _library: Library,
}

impl OnHost {
    /// Compiles and loads the kernels, which takes some seconds. The compiler is
    /// `$CXX`, or `c++`.
    ///
    /// # Errors
    /// [`KernelError::NoCompiler`] if there is none, [`KernelError::Refused`] if it
    /// does not take the sources.
    pub fn build() -> Result<Self, KernelError> {
        static BUILDS: AtomicU32 = AtomicU32::new(0);
        let number = BUILDS.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("terrace-kernels-{}-{number}", std::process::id()));
        let built = Self::build_in(&folder);
        // The library stays loaded without its file; what cannot be removed is in the system's own place.
        drop(std::fs::remove_dir_all(&folder));
        built
    }

    fn build_in(folder: &Path) -> Result<Self, KernelError> {
        let lacking = |detail: String| KernelError::NoCompiler { detail };
        let inner = folder.join("on_host");
        std::fs::create_dir_all(&inner).map_err(|error| lacking(format!("{}: {error}", inner.display())))?;
        let mut files = vec![
            (inner.join("cuda.h"), include_str!("../../kernels/on_host/cuda.h")),
            (inner.join("kernels.cc"), include_str!("../../kernels/on_host/kernels.cc")),
            (folder.join("common.cuh"), COMMON),
        ];
        files.extend(
            Source::ALL.map(|source| (folder.join(source.name()).with_extension("cu"), source.text())),
        );
        for (path, text) in files {
            std::fs::write(&path, text).map_err(|error| lacking(format!("{}: {error}", path.display())))?;
        }
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let library = folder.join("kernels.so");
        let output = Command::new(&compiler)
            .args(OPTIONS)
            .arg(inner.join("kernels.cc"))
            .arg("-o")
            .arg(&library)
            .output()
            .map_err(|error| lacking(format!("{compiler}: {error}")))?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(KernelError::Refused { what: format!("the kernels, by {compiler},"), log });
        }
        // SAFETY: the library was built just now from our sources; loading it runs no code of its own.
        let library = unsafe { Library::new(&library) }.map_err(|error| lacking(error.to_string()))?;
        // SAFETY: `kernels.cc` defines it with this type.
        let launch = unsafe { library.get::<LaunchByName>(b"terrace_launch\0") }
            .map_err(|error| lacking(error.to_string()))?;
        Ok(Self { launch: *launch, _library: library })
    }
}

/// Everything on this machine that runs kernels, for tests: the host's processor where there is a C++ compiler, and the
/// first device where there is one. What is missing is said on standard error.
///
/// # Errors
/// What is there and does not work.
pub fn every_queue() -> Result<Vec<Arc<dyn KernelQueue>>, KernelError> {
    let mut found: Vec<Arc<dyn KernelQueue>> = Vec::new();
    match OnHost::build() {
        Ok(queue) => found.push(Arc::new(queue)),
        Err(KernelError::NoCompiler { detail }) => eprintln!("SKIPPED on the host: {detail}"),
        Err(error) => return Err(error),
    }
    match Cuda::open(0) {
        Ok(queue) => found.push(Arc::new(queue)),
        Err(KernelError::Device(
            error @ (DeviceError::NoDriver { .. }
            | DeviceError::DriverTooOld { .. }
            | DeviceError::NoDevice { .. }
            | DeviceError::Unsupported { .. }),
        )) => eprintln!("SKIPPED on a device: {error}"),
        Err(error) => return Err(error),
    }
    for queue in &found {
        eprintln!("runs on: {}", queue.describe());
    }
    Ok(found)
}

// Words, so that it is aligned for every vector; the device's allocations are aligned to 256 bytes.
#[derive(Clone, Copy)]
#[repr(align(256))]
struct Line(#[allow(dead_code, reason = "reached by address only")] [u8; 256]);

struct Owned(*mut [Line]);

// SAFETY: it owns its memory like the box that it came from.
unsafe impl Send for Owned {}
// SAFETY: it gives out nothing by shared reference.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a box and is freed only here.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

impl KernelQueue for OnHost {
    fn describe(&self) -> String {
        "kernels built for the host's processor, for tests".to_owned()
    }

    fn allocate(&self, bytes: usize) -> Result<KernelBytes, KernelError> {
        let lines = vec![Line([0; 256]); bytes.div_ceil(256).max(1)].into_boxed_slice();
        let memory = Box::into_raw(lines);
        let address = memory.cast::<u8>().expose_provenance() as u64;
        // SAFETY: the memory lives as long as its owner.
        Ok(unsafe { KernelBytes::new(address, bytes, Arc::new(Owned(memory))) })
    }

    fn write(&self, target: &KernelBytes, source: &[u8]) -> Result<(), KernelError> {
        target.fits(source.len())?;
        // SAFETY: whoever made the bytes vouches for their address, and the lengths are equal. Kernels
        // run to their end inside `launch`, so none is at it.
        unsafe { std::ptr::copy(source.as_ptr(), pointer(target.address()), source.len()) };
        Ok(())
    }

    fn read(&self, source: &KernelBytes, target: &mut [u8]) -> Result<(), KernelError> {
        source.fits(target.len())?;
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy(pointer(source.address()), target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        let name = CString::new(launch.kernel.name()).expect("names have no zero");
        let mut parameters = [launch.parameters.cast_mut()];
        // SAFETY: the caller's promise. The kernel takes one structure, and finds its address here.
        let answer = unsafe {
            (self.launch)(name.as_ptr(), launch.grid.as_ptr(), launch.threads, parameters.as_mut_ptr())
        };
        assert_eq!(answer, 0, "{} stands in the table of kernels.cc", launch.kernel.name());
        Ok(())
    }

    fn wait(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn reaches(&self, chunk: &Chunk) -> bool {
        chunk.kind() == DeviceKind::HostOnly
    }
}

fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).expect("an address of this process"))
}

/// A queue whose launches fail after some that do not, for tests of whoever uses one.
#[derive(Debug)]
pub struct FailsAfter {
    inner: Arc<dyn KernelQueue>,
    launches: AtomicUsize,
}

impl FailsAfter {
    /// `launches` of `inner` succeed.
    pub fn new(inner: Arc<dyn KernelQueue>, launches: usize) -> Self {
        Self { inner, launches: AtomicUsize::new(launches) }
    }

    /// Launches that succeed from now on.
    pub fn allow(&self, launches: usize) {
        self.launches.store(launches, Ordering::Relaxed);
    }
}

impl KernelQueue for FailsAfter {
    fn describe(&self) -> String {
        format!("{}, failing at times", self.inner.describe())
    }

    fn allocate(&self, bytes: usize) -> Result<KernelBytes, KernelError> {
        self.inner.allocate(bytes)
    }

    fn write(&self, target: &KernelBytes, source: &[u8]) -> Result<(), KernelError> {
        self.inner.write(target, source)
    }

    fn read(&self, source: &KernelBytes, target: &mut [u8]) -> Result<(), KernelError> {
        self.inner.read(source, target)
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        let left =
            self.launches.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_err() {
            let detail = "a fault of a test".to_owned();
            return Err(DeviceError::Driver { call: "cuLaunchKernel", detail }.into());
        }
        // SAFETY: the caller's promise, passed through.
        unsafe { self.inner.launch(launch) }
    }

    fn wait(&self) -> Result<(), KernelError> {
        self.inner.wait()
    }

    fn reaches(&self, chunk: &Chunk) -> bool {
        self.inner.reaches(chunk)
    }
}
