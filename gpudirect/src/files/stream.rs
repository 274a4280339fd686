//! Transfers in the order of a CUDA stream: several are given to cuFile at once,
//! and an event says when the stream has passed them.
//!
//! Promises: what the library is given by address lives until the stream has
//! passed it, or until the library has said what became of it; a wait that nobody
//! ends goes on. Libraries before 1.7 have no such calls, which is a plain answer.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::Duration;

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags};

use super::library::{Library, Parts, Status, failed, function};
use super::{FileJob, FileOperation};
use crate::cuda::check;
use crate::error::DeviceError;

/// Offsets and sizes are known when a transfer is given, and are whole pages.
const FIXED: c_uint = 1 | 2 | 4 | 8;
/// No library says this of bytes that it moved.
const UNTOLD: isize = isize::MIN;
/// How soon it is looked whether the stream has passed. Doubled each time, up to the second.
const LOOK_AFTER: [Duration; 2] = [Duration::from_micros(20), Duration::from_micros(200)];

type Order = unsafe extern "C" fn(
    *mut c_void,
    *mut c_void,
    *mut usize,
    *mut i64,
    *mut i64,
    *mut isize,
    CUstream,
) -> Status;

/// What a library before 1.7 does not have.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamFunctions {
    register: unsafe extern "C" fn(CUstream, c_uint) -> Status,
    deregister: unsafe extern "C" fn(CUstream) -> Status,
    read: Order,
    write: Order,
}

impl StreamFunctions {
    /// Looks for all of them.
    pub(super) fn find(library: *mut c_void) -> Result<Self, DeviceError> {
        // SAFETY: the types are those of cufile.h.
        let found = unsafe {
            function(library, c"cuFileStreamRegister").and_then(|register| {
                Ok(Self {
                    register,
                    deregister: function(library, c"cuFileStreamDeregister")?,
                    read: function(library, c"cuFileReadAsync")?,
                    write: function(library, c"cuFileWriteAsync")?,
                })
            })
        };
        found.map_err(|error| match error {
            DeviceError::DriverTooOld { found, .. } => DeviceError::Unsupported {
                what: format!("cuFile by streams: {found}, which cuFile 1.7 and newer have"),
            },
            other => other,
        })
    }
}

/// One transfer's numbers, which the library reads and writes by their addresses, some of them late.
#[derive(Debug)]
struct Numbers {
    bytes: usize,
    file_offset: i64,
    device_offset: i64,
    /// Written by the library, from a thread of its own.
    moved: AtomicIsize,
}

impl Numbers {
    fn of(parts: &Parts) -> Self {
        let Parts { file_offset, device_offset, bytes, .. } = *parts;
        Self { bytes, file_offset, device_offset, moved: AtomicIsize::new(UNTOLD) }
    }

    fn moved(&self) -> isize {
        self.moved.load(Ordering::Acquire)
    }
}

/// A stream that the library knows. Used by the thread that made it.
#[derive(Debug)]
pub(super) struct Stream {
    functions: StreamFunctions,
    raw: CUstream,
    event: CUevent,
}

impl Stream {
    /// Makes one. The device's context is current, now and whenever it is used.
    pub(super) fn open(library: &Library) -> Result<Self, DeviceError> {
        let functions = library.streams()?;
        let (mut raw, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current, and the driver writes one handle.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&raw mut raw, flags, 0)
        })?;
        // SAFETY: as above.
        let made = check("cuEventCreate", unsafe {
            sys::cuEventCreate(&raw mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
        });
        if let Err(error) = made {
            // SAFETY: our own stream, which was given nothing.
            unsafe { sys::cuStreamDestroy_v2(raw) };
            return Err(error);
        }
        // SAFETY: a stream of the current context.
        let known = failed("cuFileStreamRegister", unsafe { (functions.register)(raw, FIXED) });
        if let Err(error) = known {
            // SAFETY: our own stream and event, which were given nothing.
            unsafe {
                sys::cuEventDestroy_v2(event);
                sys::cuStreamDestroy_v2(raw);
            }
            return Err(error);
        }
        Ok(Self { functions, raw, event })
    }

    /// Several transfers, to their end. Waits, for ever if the library does.
    pub(super) fn run(&self, jobs: &[(u64, FileJob)]) -> Vec<Result<(), DeviceError>> {
        let numbers: Box<[Numbers]> = jobs.iter().map(|(_, job)| Numbers::of(&Parts::of(job))).collect();
        let given: Vec<_> =
            jobs.iter().zip(&numbers).map(|((_, job), numbers)| self.give(job, numbers)).collect();
        self.wait(&numbers);
        let results = given.into_iter().zip(&numbers);
        results.map(|(given, numbers)| given.and_then(|()| whole(numbers))).collect()
    }

    fn give(&self, job: &FileJob, numbers: &Numbers) -> Result<(), DeviceError> {
        let (call, give) = match job.operation {
            FileOperation::Read => ("cuFileReadAsync", self.functions.read),
            FileOperation::Write => ("cuFileWriteAsync", self.functions.write),
        };
        // SAFETY: the range was checked against the chunk. Chunk, file and numbers live until `run` returns, which
        // is after the stream has passed the transfer. The library only reads what it is given as constant numbers.
        let given = unsafe {
            give(
                job.file.handle.raw(),
                Parts::of(job).base,
                (&raw const numbers.bytes).cast_mut(),
                (&raw const numbers.file_offset).cast_mut(),
                (&raw const numbers.device_offset).cast_mut(),
                numbers.moved.as_ptr(),
                self.raw,
            )
        };
        // It was not taken, so nothing will be told of it.
        failed(call, given).inspect_err(|_| numbers.moved.store(0, Ordering::Release))
    }

    /// Until the stream has passed everything. A driver that fails says nothing of what the library does: then it is
    /// over when the library has told of each transfer, and until then nothing of it is free.
    fn wait(&self, numbers: &[Numbers]) {
        // SAFETY: stream and event are of this context and alive.
        let recorded = check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, self.raw) });
        let [mut pause, pause_max] = LOOK_AFTER;
        loop {
            match recorded.clone().and_then(|()| self.has_passed()) {
                Ok(true) => return,
                Ok(false) => {}
                Err(_) if numbers.iter().all(|numbers| numbers.moved() != UNTOLD) => return,
                Err(_) => pause = pause_max,
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(pause_max);
        }
    }

    fn has_passed(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event is alive until this value is dropped.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("cuEventQuery", other).map(|()| true),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: our own stream and event. Nothing is under way on them: whoever runs transfers waits for their end.
        unsafe {
            (self.functions.deregister)(self.raw);
            sys::cuEventDestroy_v2(self.event);
            sys::cuStreamDestroy_v2(self.raw);
        }
    }
}

fn whole(numbers: &Numbers) -> Result<(), DeviceError> {
    let moved = numbers.moved();
    let detail = match usize::try_from(moved) {
        Ok(moved) if moved == numbers.bytes => return Ok(()),
        Ok(moved) => format!("{moved} of {} bytes", numbers.bytes),
        Err(_) if moved == UNTOLD => "passed by its stream, and nothing was told of it".to_owned(),
        Err(_) => format!("error {}", moved.unsigned_abs()),
    };
    Err(DeviceError::Driver { call: "a transfer by a stream", detail })
}
