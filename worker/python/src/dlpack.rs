//! Device memory as DLPack capsules: how torch, cupy, jax and numpy take it without
//! a copy. All unsafe code for devices is here.
//!
//! A capsule owns what keeps its memory in place (the mapping, and the lease). It
//! hands that to whoever consumes it, and a tensor made of it keeps it to its end,
//! whatever became of our own objects.

use std::ffi::{CStr, c_void};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use terrace_client::DeviceBlock;
use terrace_gpudirect::{Chunk, DeviceKind};

use crate::on_device::Writing;
use crate::owned::Owned;

const PLAIN: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
/// The structures below are those of DLPack 1.0.
const VERSION: Version = Version { major: 1, minor: 0 };
const FLAG_READ_ONLY: u64 = 1;

/// `DLDevice`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Place {
    pub(crate) kind: i32,
    pub(crate) ordinal: i32,
}

impl Place {
    /// Where a chunk lies, as DLPack numbers it. The stand-in for a device is plain host memory.
    pub(crate) fn of(kind: DeviceKind, ordinal: u32) -> Self {
        match kind {
            DeviceKind::Cuda => Self { kind: 2, ordinal: i32::try_from(ordinal).unwrap_or(i32::MAX) },
            DeviceKind::HostOnly => Self { kind: 1, ordinal: 0 },
        }
    }
}

/// `DLDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct ElementType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Place,
    dimensions: i32,
    element: ElementType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLManagedTensor`.
#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct ManagedVersioned {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: Tensor,
}

/// A descriptor of our own for what the caller's descriptor stands for.
///
/// # Errors
/// `OSError`.
pub(crate) fn duplicate(descriptor: i32) -> std::io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(std::io::Error::from_raw_os_error(9));
    }
    // SAFETY: it is borrowed for this one call, in which nobody closes it: the caller named it as open. A
    // number that stands for nothing is an error of the system.
    unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()
}

/// What keeps the memory of a block in place.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) chunk: Arc<Chunk>,
    pub(crate) guard: Guard,
}

/// What grants a block.
#[derive(Debug)]
pub(crate) enum Guard {
    /// Whatever the caller named, or nothing: kept, never looked at.
    Caller(#[allow(dead_code, reason = "kept for its end")] Option<Py<PyAny>>),
    /// A read lease.
    Read(DeviceBlock),
    /// A write lease, and the position in it.
    Write(Arc<Writing>, u32),
}

impl Guard {
    /// Whether what was read until now was the block, or the frame is still ours.
    pub(crate) fn is_valid(&self) -> bool {
        match self {
            Self::Caller(_) => true,
            Self::Read(block) => block.is_valid(),
            Self::Write(writing, index) => writing.is_valid(*index).unwrap_or(true),
        }
    }
}

/// A block, described for a consumer.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) hold: Arc<Owned<Hold>>,
    /// From the start of the chunk; the view ends inside it.
    pub(crate) offset: u64,
    pub(crate) place: Place,
    pub(crate) element: ElementType,
    pub(crate) shape: Vec<i64>,
    pub(crate) read_only: bool,
}

/// What a capsule points to, and what it owns.
#[repr(C)]
struct Exported<T> {
    managed: T,
    shape: Vec<i64>,
    strides: Vec<i64>,
    hold: Arc<Owned<Hold>>,
}

impl View {
    fn tensor(&self, shape: &mut [i64], strides: &mut [i64]) -> PyResult<Tensor> {
        let address = self.hold.here()?.chunk.address() + self.offset;
        let address = usize::try_from(address).map_err(|_| PyBufferError::new_err("beyond memory"))?;
        Ok(Tensor {
            data: std::ptr::with_exposed_provenance_mut(address),
            device: self.place,
            dimensions: i32::try_from(shape.len())
                .map_err(|_| PyBufferError::new_err("too many dimensions"))?,
            element: self.element,
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut_ptr(),
            byte_offset: 0,
        })
    }

    fn strides(&self) -> Vec<i64> {
        let mut strides = vec![1; self.shape.len()];
        for at in (1..self.shape.len()).rev() {
            strides[at - 1] = strides[at] * self.shape[at];
        }
        strides
    }

    /// A capsule of DLPack before 1.0, which cannot say that memory is read-only.
    ///
    /// # Errors
    /// `ForkedError`, or what Python says.
    pub(crate) fn plain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (mut shape, mut strides) = (self.shape.clone(), self.strides());
        let tensor = self.tensor(&mut shape, &mut strides)?;
        let managed = Managed { tensor, context: std::ptr::null_mut(), deleter: Some(delete::<Managed>) };
        let exported = Exported { managed, shape, strides, hold: Arc::clone(&self.hold) };
        // SAFETY: the name is that of the structure, and its destructor takes just that.
        unsafe { capsule(py, exported, PLAIN, destroy_plain) }
    }

    /// A capsule of DLPack 1.
    ///
    /// # Errors
    /// As [`View::plain`].
    pub(crate) fn versioned<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (mut shape, mut strides) = (self.shape.clone(), self.strides());
        let tensor = self.tensor(&mut shape, &mut strides)?;
        let managed = ManagedVersioned {
            version: VERSION,
            context: std::ptr::null_mut(),
            deleter: Some(delete::<ManagedVersioned>),
            flags: if self.read_only { FLAG_READ_ONLY } else { 0 },
            tensor,
        };
        let exported = Exported { managed, shape, strides, hold: Arc::clone(&self.hold) };
        // SAFETY: as in `plain`.
        unsafe { capsule(py, exported, VERSIONED, destroy_versioned) }
    }
}

/// # Safety
/// `destructor` takes capsules of this name, whose pointer is a `T` inside an `Exported<T>`.
unsafe fn capsule<'py, T>(
    py: Python<'py>,
    exported: Exported<T>,
    name: &'static CStr,
    destructor: ffi::PyCapsule_Destructor,
) -> PyResult<Bound<'py, PyAny>> {
    // The structure is the first field, so that its address is that of the whole. The vectors' memory, to
    // which it points, does not move with them.
    let raw = Box::into_raw(Box::new(exported));
    // SAFETY: the pointer is not null, the name lives for ever, and the destructor is right for both.
    let made = unsafe { ffi::PyCapsule_New(raw.cast(), name.as_ptr(), Some(destructor)) };
    if made.is_null() {
        // SAFETY: nobody else has the pointer.
        drop(unsafe { Box::from_raw(raw) });
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference to an object of Python.
    Ok(unsafe { Bound::from_owned_ptr(py, made) })
}

/// Ends a consumer's use. It may be called by any thread, with the interpreter or without.
///
/// # Safety
/// `managed` is the first field of an `Exported<T>` of ours, and this is the last use of it.
unsafe extern "C" fn delete<T>(managed: *mut T) {
    if managed.is_null() {
        return;
    }
    // SAFETY: the caller's promise; the whole begins where its first field does.
    let exported = unsafe { Box::from_raw(managed.cast::<Exported<T>>()) };
    let Exported { hold, .. } = *exported;
    let mut hold = Some(hold);
    // A lease is an object of Python. Without an interpreter the process is at its end, and keeps all.
    if Python::try_attach(|_| drop(hold.take())).is_none() {
        std::mem::forget(hold);
    }
}

/// # Safety
/// `capsule` is a capsule.
unsafe fn destroy<T>(
    capsule: *mut ffi::PyObject,
    name: &CStr,
    deleter: impl Fn(&T) -> Option<unsafe extern "C" fn(*mut T)>,
) {
    // A consumer renames a capsule that it took; then it calls the deleter itself.
    // SAFETY: a capsule, by the caller's promise.
    if unsafe { ffi::PyCapsule_IsValid(capsule, name.as_ptr()) } == 0 {
        return;
    }
    // SAFETY: the name says that it is ours and that nobody took it.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, name.as_ptr()) }.cast::<T>();
    // SAFETY: as above; this is the last use.
    unsafe {
        if let Some(deleter) = deleter(&*managed) {
            deleter(managed);
        }
    }
}

unsafe extern "C" fn destroy_plain(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls a destructor with its capsule.
    unsafe { destroy::<Managed>(capsule, PLAIN, |managed| managed.deleter) };
}

unsafe extern "C" fn destroy_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as above.
    unsafe { destroy::<ManagedVersioned>(capsule, VERSIONED, |managed| managed.deleter) };
}
