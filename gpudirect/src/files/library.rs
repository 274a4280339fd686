//! cuFile itself: found, loaded, and called. The bindings that we use elsewhere do
//! not look for `libcufile.so.0`, which is the name that it is installed under.
//!
//! Layouts are those of cufile.h 1.6 to 1.20, checked below.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::os::fd::RawFd;
use std::sync::Arc;

use super::log::LOG;
use super::stream::StreamFunctions;
use super::{FileJob, FileOperation};
use crate::error::DeviceError;

const NAMES: [&CStr; 2] = [c"libcufile.so.0", c"libcufile.so"];
/// Another engine of this process opened it; it is never closed.
const ALREADY_OPEN: c_int = 5026;
const OPAQUE_DESCRIPTOR: c_uint = 1;
const BATCH: c_uint = 1;
const COMPLETE: c_uint = 1 << 4;
/// Statuses after which nothing more happens to a job of a batch.
const ENDED: c_uint = 1 << 2 | 1 << 3 | COMPLETE | 1 << 5 | 1 << 6;
/// Bits of `dstatusflags`: NVMe by the kernel module, and NVMe by peer-to-peer DMA.
const NVME: c_uint = 1 << 4 | 1 << 11;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Status {
    error: c_int,
    cuda_error: c_int,
}

#[repr(C)]
union Named {
    descriptor: c_int,
    _windows: *mut c_void,
}

#[repr(C)]
struct Description {
    kind: c_uint,
    named: Named,
    operations: *const c_void,
}

/// Longer than any version's, because the library writes what its version has.
#[derive(Debug)]
#[repr(C)]
struct Properties {
    major: c_uint,
    minor: c_uint,
    poll_bytes: usize,
    direct_bytes_max: usize,
    status_flags: c_uint,
    control_flags: c_uint,
    rest: [u64; 28],
}

#[derive(Debug)]
#[repr(C)]
struct Request {
    mode: c_uint,
    base: *mut c_void,
    file_offset: i64,
    device_offset: i64,
    bytes: usize,
    handle: *mut c_void,
    operation: c_uint,
    cookie: *mut c_void,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Event {
    cookie: *mut c_void,
    status: c_uint,
    result: isize,
}

const _: () = assert!(size_of::<Description>() == 24);
const _: () = assert!(std::mem::offset_of!(Description, named) == 8);
const _: () = assert!(size_of::<Request>() == 64);
const _: () = assert!(std::mem::offset_of!(Request, handle) == 40);
const _: () = assert!(std::mem::offset_of!(Request, cookie) == 56);
const _: () = assert!(size_of::<Event>() == 24);
const _: () = assert!(std::mem::offset_of!(Properties, status_flags) == 24);

type Transfer = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, i64, i64) -> isize;

/// Functions of the library. It is never unloaded: its threads may run.
#[derive(Debug)]
struct Functions {
    open: unsafe extern "C" fn() -> Status,
    properties: unsafe extern "C" fn(*mut Properties) -> Status,
    handle_register: unsafe extern "C" fn(*mut *mut c_void, *mut Description) -> Status,
    handle_deregister: unsafe extern "C" fn(*mut c_void),
    buffer_register: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    buffer_deregister: unsafe extern "C" fn(*const c_void) -> Status,
    read: Transfer,
    write: Transfer,
    batch_set_up: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> Status,
    batch_submit: unsafe extern "C" fn(*mut c_void, c_uint, *mut Request, c_uint) -> Status,
    batch_status:
        unsafe extern "C" fn(*mut c_void, c_uint, *mut c_uint, *mut Event, *mut libc::timespec) -> Status,
    batch_destroy: unsafe extern "C" fn(*mut c_void),
    streams: Result<StreamFunctions, DeviceError>,
}

/// What the library says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdsInfo {
    /// Of the kernel module; zeros without it.
    pub module_version: (u32, u32),
    /// Whether drives may reach the device. If not, the library copies through
    /// host memory of its own ("compat mode").
    pub is_direct: bool,
    /// The most that it moves at once.
    pub direct_bytes_max: u64,
}

#[derive(Debug)]
pub(super) struct Library {
    functions: Arc<Functions>,
    info: GdsInfo,
}

/// A file as the library knows it.
#[derive(Debug)]
pub(super) struct Handle {
    functions: Arc<Functions>,
    raw: *mut c_void,
}

// SAFETY: the library's handles may be used by any thread, and by several at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub(super) fn raw(&self) -> *mut c_void {
        self.raw
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: registered once by us; jobs keep their file, so no call has it.
        unsafe { (self.functions.handle_deregister)(self.raw) };
    }
}

pub(super) fn failed(call: &'static str, status: Status) -> Result<(), DeviceError> {
    match status {
        Status { error: 0, cuda_error: 0 } => Ok(()),
        Status { error, cuda_error } => {
            Err(DeviceError::Driver { call, detail: format!("error {error}, CUDA error {cuda_error}") })
        }
    }
}

/// A function of the library by its name.
///
/// # Safety
/// `F` must be the type of the function.
pub(super) unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F, DeviceError> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>(), "a function is a pointer") };
    // SAFETY: the library is loaded, and the name ends with a zero.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() {
        let found = format!("no {}", name.to_string_lossy());
        return Err(DeviceError::DriverTooOld { found, needed: "cuFile 1.6".to_owned() });
    }
    // SAFETY: the caller says that this is the function's type, and the sizes agree.
    Ok(unsafe { std::mem::transmute_copy(&found) })
}

fn load() -> Result<Functions, DeviceError> {
    // SAFETY: the library's initialisers run; they look for the driver and read its settings.
    let loaded =
        NAMES.iter().map(|name| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) });
    let library = loaded.into_iter().find(|library| !library.is_null());
    let library =
        library.ok_or_else(|| DeviceError::NoDriver { detail: "libcufile.so.0 is not there".to_owned() })?;
    // SAFETY: the types are those of cufile.h.
    unsafe {
        Ok(Functions {
            open: function(library, c"cuFileDriverOpen")?,
            properties: function(library, c"cuFileDriverGetProperties")?,
            handle_register: function(library, c"cuFileHandleRegister")?,
            handle_deregister: function(library, c"cuFileHandleDeregister")?,
            buffer_register: function(library, c"cuFileBufRegister")?,
            buffer_deregister: function(library, c"cuFileBufDeregister")?,
            read: function(library, c"cuFileRead")?,
            write: function(library, c"cuFileWrite")?,
            batch_set_up: function(library, c"cuFileBatchIOSetUp")?,
            batch_submit: function(library, c"cuFileBatchIOSubmit")?,
            batch_status: function(library, c"cuFileBatchIOGetStatus")?,
            batch_destroy: function(library, c"cuFileBatchIODestroy")?,
            streams: StreamFunctions::find(library),
        })
    }
}

impl Library {
    /// The device's context is current.
    pub(super) fn open() -> Result<Self, DeviceError> {
        if std::env::var_os(LOG).is_none() {
            return Err(DeviceError::Unsupported {
                what: format!("cuFile without {LOG}, a place for its log"),
            });
        }
        let functions = Arc::new(load()?);
        // SAFETY: the library is loaded, and the device's context is current.
        match unsafe { (functions.open)() } {
            Status { error: ALREADY_OPEN, .. } => {}
            status => failed("cuFileDriverOpen", status)?,
        }
        let mut properties = Properties {
            major: 0,
            minor: 0,
            poll_bytes: 0,
            direct_bytes_max: 0,
            status_flags: 0,
            control_flags: 0,
            rest: [0; 28],
        };
        // SAFETY: the struct is at least as long as any version's.
        failed("cuFileDriverGetProperties", unsafe { (functions.properties)(&raw mut properties) })?;
        let info = GdsInfo {
            module_version: (properties.major, properties.minor),
            is_direct: properties.status_flags & NVME != 0,
            direct_bytes_max: (properties.direct_bytes_max as u64).saturating_mul(1024),
        };
        Ok(Self { functions, info })
    }

    /// Its calls in the order of a stream; not there in old libraries.
    pub(super) fn streams(&self) -> Result<StreamFunctions, DeviceError> {
        self.functions.streams.clone()
    }

    pub(super) fn info(&self) -> &GdsInfo {
        &self.info
    }

    pub(super) fn register(&self, descriptor: RawFd) -> Result<Handle, DeviceError> {
        let named = Named { descriptor };
        let mut description = Description { kind: OPAQUE_DESCRIPTOR, named, operations: std::ptr::null() };
        let mut raw = std::ptr::null_mut();
        // SAFETY: the library reads one description and writes one handle; the caller keeps the descriptor open.
        failed("cuFileHandleRegister", unsafe {
            (self.functions.handle_register)(&raw mut raw, &raw mut description)
        })?;
        Ok(Handle { functions: Arc::clone(&self.functions), raw })
    }

    pub(super) fn prepare(&self, address: u64, bytes: u64) -> Result<(), DeviceError> {
        let length = usize::try_from(bytes).map_err(|_| DeviceError::NoMemory { bytes })?;
        // SAFETY: the caller keeps the chunk until `unprepare`.
        failed("cuFileBufRegister", unsafe { (self.functions.buffer_register)(pointer(address), length, 0) })
    }

    pub(super) fn unprepare(&self, address: u64) {
        // SAFETY: prepared once by us; a failure leaves what the library has.
        unsafe { (self.functions.buffer_deregister)(pointer(address)) };
    }

    /// One transfer, to its end. Waits, for ever if the library does.
    pub(super) fn call(&self, job: &FileJob) -> Result<(), DeviceError> {
        let Parts { base, device_offset, file_offset, bytes } = Parts::of(job);
        let (call, transfer) = match job.operation {
            FileOperation::Read => ("cuFileRead", self.functions.read),
            FileOperation::Write => ("cuFileWrite", self.functions.write),
        };
        // SAFETY: the range was checked against the chunk; the caller keeps chunk and file until this returns.
        let moved = unsafe { transfer(job.file.handle.raw, base, bytes, file_offset, device_offset) };
        whole(call, moved, bytes)
    }

    /// Several transfers of one direction, to their end.
    pub(super) fn batch(&self, jobs: &[(u64, FileJob)]) -> Vec<Result<(), DeviceError>> {
        let mut results = vec![None; jobs.len()];
        if let Err(error) = self.run_batch(jobs, &mut results) {
            // What the library took and did not end is not free: only its end would free it.
            return results.into_iter().map(|result| result.unwrap_or_else(|| Err(error.clone()))).collect();
        }
        results.into_iter().map(|result| result.expect("a batch ends when all of it has")).collect()
    }

    fn run_batch(
        &self,
        jobs: &[(u64, FileJob)],
        results: &mut [Option<Result<(), DeviceError>>],
    ) -> Result<(), DeviceError> {
        let count = c_uint::try_from(jobs.len()).expect("a batch is short");
        let mut batch = std::ptr::null_mut();
        // SAFETY: the library writes one handle.
        failed("cuFileBatchIOSetUp", unsafe { (self.functions.batch_set_up)(&raw mut batch, count) })?;
        let mut requests: Vec<_> =
            jobs.iter().enumerate().map(|(index, (_, job))| request(index, job)).collect();
        // SAFETY: the library reads `count` requests; chunks and files live until the caller has the results.
        let submitted = unsafe { (self.functions.batch_submit)(batch, count, requests.as_mut_ptr(), 0) };
        if let Err(error) = failed("cuFileBatchIOSubmit", submitted) {
            // SAFETY: nothing of it was taken.
            unsafe { (self.functions.batch_destroy)(batch) };
            return Err(error);
        }
        let mut events = vec![Event { cookie: std::ptr::null_mut(), status: 0, result: 0 }; jobs.len()];
        // An error here says nothing about what is under way, so asking goes on: the deadline of each job is the
        // watch's affair, and a library that fails for ever counts as hanging.
        while results.iter().any(Option::is_none) {
            let mut ended = count;
            let mut patience = libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            // SAFETY: the library writes at most `ended` events, for which there is room.
            let asked = unsafe {
                (self.functions.batch_status)(
                    batch,
                    1,
                    &raw mut ended,
                    events.as_mut_ptr(),
                    &raw mut patience,
                )
            };
            if failed("cuFileBatchIOGetStatus", asked).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(10));
                continue;
            }
            let ended = usize::try_from(ended).unwrap_or(0).min(events.len());
            for event in &events[..ended] {
                let index = event.cookie.addr().wrapping_sub(1);
                let Some(result) = results.get_mut(index).filter(|_| event.status & ENDED != 0) else {
                    continue;
                };
                *result = Some(if event.status & COMPLETE == 0 {
                    let detail = format!("status {}, result {}", event.status, event.result);
                    Err(DeviceError::Driver { call: "a cuFile batch", detail })
                } else {
                    whole("a cuFile batch", event.result, Parts::of(&jobs[index].1).bytes)
                });
            }
        }
        // SAFETY: all of it has ended.
        unsafe { (self.functions.batch_destroy)(batch) };
        Ok(())
    }
}

fn request(index: usize, job: &FileJob) -> Request {
    let Parts { base, device_offset, file_offset, bytes } = Parts::of(job);
    Request {
        mode: BATCH,
        base,
        file_offset,
        device_offset,
        bytes,
        handle: job.file.handle.raw,
        operation: match job.operation {
            FileOperation::Read => 0,
            FileOperation::Write => 1,
        },
        // Not null, in case the library takes null for absent.
        cookie: std::ptr::without_provenance_mut(index + 1),
    }
}

/// A job in the library's terms: the start of the chunk, which may be prepared, and an offset.
pub(super) struct Parts {
    pub(super) base: *mut c_void,
    pub(super) device_offset: i64,
    pub(super) file_offset: i64,
    pub(super) bytes: usize,
}

impl Parts {
    pub(super) fn of(job: &FileJob) -> Self {
        Self {
            base: pointer(job.bytes.chunk().address()),
            device_offset: i64::try_from(job.bytes.offset()).expect("a chunk is shorter than 8 EiB"),
            file_offset: i64::try_from(job.offset).expect("checked when the job was taken"),
            bytes: usize::try_from(job.bytes.bytes().get()).expect("a chunk is mapped"),
        }
    }
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).expect("a chunk is mapped"))
}

fn whole(call: &'static str, moved: isize, bytes: usize) -> Result<(), DeviceError> {
    match usize::try_from(moved) {
        Ok(moved) if moved == bytes => Ok(()),
        Ok(moved) => Err(DeviceError::Driver { call, detail: format!("{moved} of {bytes} bytes") }),
        // Minus one is errno's; others are the library's own numbers.
        Err(_) if moved == -1 => {
            Err(DeviceError::Driver { call, detail: std::io::Error::last_os_error().to_string() })
        }
        Err(_) => Err(DeviceError::Driver { call, detail: format!("error {}", moved.unsigned_abs()) }),
    }
}
