//! Blocks in device memory, for torch and its like.
//!
//! A chunk comes from another process by its descriptor (that is how the daemon
//! lends device memory), or is made here. A block is a part of it. Nothing is copied,
//! and nothing here computes.

use std::os::fd::IntoRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyAttributeError, PyBufferError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use terrace_core::ByteCount;
use terrace_gpudirect::{Chunk, Cuda, Device as Memory, DeviceBytes, DeviceError, HostOnly};

use crate::dlpack::{ElementType, Guard, Hold, Place, View, duplicate};
use crate::errors::{closed, device, invalid};
use crate::owned::Owned;

/// Room of a host-only device: as much as anybody asks for.
const HOST_ONLY_BYTES: ByteCount = ByteCount::new(1 << 40);

/// Name, code and bits of DLPack, and numpy's letters where it has some.
const ELEMENTS: [(&str, u8, u8, Option<&str>); 12] = [
    ("uint8", 1, 8, Some("|u1")),
    ("int8", 0, 8, Some("|i1")),
    ("uint16", 1, 16, Some("<u2")),
    ("int16", 0, 16, Some("<i2")),
    ("int32", 0, 32, Some("<i4")),
    ("int64", 0, 64, Some("<i8")),
    ("float16", 2, 16, Some("<f2")),
    ("float32", 2, 32, Some("<f4")),
    ("float64", 2, 64, Some("<f8")),
    ("bfloat16", 4, 16, None),
    ("float8_e4m3fn", 10, 8, None),
    ("float8_e5m2", 12, 8, None),
];

/// A device; see the package's stubs.
#[pyclass(frozen, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct Device {
    memory: Owned<Arc<dyn Memory>>,
}

/// Opens `cuda:N`, or `host-only`: host memory that stands in for a device.
#[pyfunction]
pub(crate) fn open_device(py: Python<'_>, name: &str) -> PyResult<Device> {
    let name = name.to_owned();
    let opened = py.detach(move || -> PyResult<Arc<dyn Memory>> {
        if name == "host-only" {
            return Ok(Arc::new(HostOnly::new(0, HOST_ONLY_BYTES).map_err(device)?));
        }
        let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        let ordinal = ordinal.ok_or_else(|| invalid(format!("{name:?} is no device; say cuda:0")))?;
        Ok(Arc::new(Cuda::open(ordinal).map_err(device)?))
    })?;
    Ok(Device { memory: Owned::new(opened) })
}

#[pymethods]
impl Device {
    /// `cuda` or `host-only`.
    #[getter]
    fn kind(&self) -> PyResult<&'static str> {
        Ok(self.memory.here()?.info().kind.label())
    }

    /// What the driver calls it.
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.memory.here()?.info().name.clone())
    }

    /// Chunks of other processes that are mapped here.
    #[getter]
    fn imports(&self) -> PyResult<u64> {
        Ok(self.memory.here()?.room().map_err(device)?.imports)
    }

    /// Makes a chunk of at least `nbytes`.
    fn allocate(&self, py: Python<'_>, nbytes: u64) -> PyResult<DeviceChunk> {
        let memory = Arc::clone(self.memory.here()?);
        self.chunk(py.detach(move || memory.create(ByteCount::new(nbytes))))
    }

    /// Maps a chunk of another process. The descriptor stays the caller's.
    fn import_chunk(&self, py: Python<'_>, descriptor: i32, nbytes: u64) -> PyResult<DeviceChunk> {
        let memory = Arc::clone(self.memory.here()?);
        let descriptor = duplicate(descriptor)?;
        self.chunk(py.detach(move || memory.import(descriptor, ByteCount::new(nbytes))))
    }

    fn __repr__(&self) -> String {
        match self.memory.here() {
            Ok(memory) => {
                format!("Device(kind={}, name={:?})", memory.info().kind.label(), memory.info().name)
            }
            Err(_) => "Device(of the parent process)".to_owned(),
        }
    }
}

impl Device {
    /// # Errors
    /// `ForkedError`.
    pub(crate) fn memory(&self) -> PyResult<Arc<dyn Memory>> {
        Ok(Arc::clone(self.memory.here()?))
    }

    fn chunk(&self, made: Result<Arc<Chunk>, DeviceError>) -> PyResult<DeviceChunk> {
        let memory = Arc::clone(self.memory.here()?);
        let chunk = made.map_err(device)?;
        Ok(DeviceChunk { inner: Owned::new(Inner { chunk, _memory: memory }) })
    }
}

/// Device memory that is mapped here; see the package's stubs.
#[pyclass(frozen, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct DeviceChunk {
    inner: Owned<Inner>,
}

#[derive(Debug)]
struct Inner {
    chunk: Arc<Chunk>,
    _memory: Arc<dyn Memory>,
}

#[pymethods]
impl DeviceChunk {
    /// Mapped length in bytes.
    #[getter]
    fn nbytes(&self) -> PyResult<u64> {
        Ok(self.inner.here()?.chunk.bytes().get())
    }

    /// A descriptor for another process, which the caller closes.
    fn export(&self) -> PyResult<i32> {
        Ok(self.inner.here()?.chunk.export().map_err(device)?.into_raw_fd())
    }

    /// A part of it, for torch and its like. `lease` is kept until the last tensor of it is gone.
    #[pyo3(signature = (offset, nbytes, *, dtype = "uint8", shape = None, readonly = true, lease = None))]
    fn block(
        &self,
        offset: u64,
        nbytes: u64,
        dtype: &str,
        shape: Option<Vec<i64>>,
        readonly: bool,
        lease: Option<Py<PyAny>>,
    ) -> PyResult<DeviceBlock> {
        let chunk = &self.inner.here()?.chunk;
        let length = chunk.bytes().get();
        if nbytes == 0 || offset.checked_add(nbytes).is_none_or(|end| end > length) {
            return Err(invalid(format!("{nbytes} bytes at {offset} of a chunk of {length}")));
        }
        let part = DeviceBytes::new(Arc::clone(chunk), offset, ByteCount::new(nbytes)).map_err(device)?;
        Layout::new(dtype, shape)?.block(&part, readonly, Guard::Caller(lease))
    }
}

/// How the bytes of a block are looked at.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    element: (&'static str, u8, u8, Option<&'static str>),
    shape: Option<Vec<i64>>,
}

impl Layout {
    /// # Errors
    /// A type that is not known.
    pub(crate) fn new(dtype: &str, shape: Option<Vec<i64>>) -> PyResult<Self> {
        let element = ELEMENTS.iter().find(|(name, ..)| *name == dtype);
        let element =
            element.ok_or_else(|| invalid(format!("dtype {dtype:?}; try uint8, float16 or bfloat16")))?;
        Ok(Self { element: *element, shape })
    }

    /// A part of a chunk as an object of Python.
    ///
    /// # Errors
    /// Bytes that are none of this type and shape.
    pub(crate) fn block(&self, part: &DeviceBytes, read_only: bool, guard: Guard) -> PyResult<DeviceBlock> {
        let (name, code, bits, letters) = self.element;
        let (nbytes, offset) = (part.bytes().get(), part.offset());
        let size = i64::from(bits / 8);
        let bytes = i64::try_from(nbytes).map_err(|_| invalid("longer than memory"))?;
        let shape = self.shape.clone().unwrap_or_else(|| vec![bytes / size]);
        let elements = shape
            .iter()
            .try_fold(1i64, |product, side| product.checked_mul(*side).filter(|product| *product > 0));
        if elements.and_then(|elements| elements.checked_mul(size)) != Some(bytes) {
            return Err(invalid(format!("{nbytes} bytes are no {name} of shape {shape:?}")));
        }
        if !part.address().is_multiple_of(u64::from(bits / 8)) {
            return Err(invalid(format!("{name} at {offset}")));
        }
        let chunk = part.chunk();
        let hold = Arc::new(Owned::new(Hold { chunk: Arc::clone(chunk), guard }));
        let element = ElementType { code, bits, lanes: 1 };
        let place = Place::of(chunk.kind(), chunk.device());
        let view = View { hold, offset, place, element, shape, read_only };
        Ok(DeviceBlock { view: Arc::new(Mutex::new(Some(view))), nbytes, name, letters })
    }
}

/// A part of a chunk; see the package's stubs.
#[pyclass(frozen, module = "terrace_kv")]
#[derive(Clone, Debug)]
pub(crate) struct DeviceBlock {
    view: Arc<Mutex<Option<View>>>,
    nbytes: u64,
    name: &'static str,
    letters: Option<&'static str>,
}

impl DeviceBlock {
    /// # Errors
    /// `ClosedError`, `ForkedError`.
    fn view(&self) -> PyResult<View> {
        let view = self.lock().clone().ok_or_else(|| closed("block"))?;
        view.hold.here()?;
        Ok(view)
    }

    // Only ever locked for a moment.
    fn lock(&self) -> MutexGuard<'_, Option<View>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses further use.
    pub(crate) fn end(&self) {
        let view = self.lock().take();
        drop(view);
    }

    /// Whether what was read until now was the block; `None` if it was closed.
    pub(crate) fn is_valid(&self) -> Option<bool> {
        let view = self.view().ok()?;
        view.hold.here().ok().map(|hold| hold.guard.is_valid())
    }

    /// Capsules and tensors of it.
    pub(crate) fn tensors(&self) -> usize {
        self.lock().as_ref().map_or(0, |view| Arc::strong_count(&view.hold) - 1)
    }

    /// Whether it is open, and consumers may store into it.
    pub(crate) fn is_writable(&self) -> bool {
        self.lock().as_ref().is_some_and(|view| !view.read_only)
    }

    /// Consumers are told not to store from now on.
    pub(crate) fn freeze(&self) {
        self.lock().iter_mut().for_each(|view| view.read_only = true);
    }

    /// Consumers may store again: it was not sealed.
    pub(crate) fn thaw(&self) {
        self.lock().iter_mut().for_each(|view| view.read_only = false);
    }
}

#[pymethods]
impl DeviceBlock {
    /// Length in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Name of the elements' type.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.name
    }

    /// Elements in each direction.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.view()?.shape)
    }

    /// Whether consumers are told not to write. Nothing in a device can stop them.
    #[getter]
    fn readonly(&self) -> PyResult<bool> {
        Ok(self.view()?.read_only)
    }

    /// Refuses further use. Tensors that exist keep the memory and the lease.
    fn close(&self) {
        self.end();
    }

    /// Whether what was read until now was the block's, or the frame is still ours.
    #[getter]
    fn valid(&self) -> PyResult<bool> {
        Ok(self.view()?.hold.here()?.guard.is_valid())
    }

    /// Whether `close` was called.
    #[getter]
    fn closed(&self) -> bool {
        self.lock().is_none()
    }

    /// DLPack's device type and number.
    fn __dlpack_device__(&self) -> PyResult<(i32, i32)> {
        let place = self.view()?.place;
        Ok((place.kind, place.ordinal))
    }

    /// A capsule of DLPack. A sealed block is complete, so that no stream has to wait for it.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let view = self.view()?;
        if dl_device.is_some_and(|(kind, ordinal)| Place { kind, ordinal } != view.place) {
            return Err(PyBufferError::new_err("the block lies on another device; copy the tensor there"));
        }
        if copy == Some(true) {
            return Err(PyBufferError::new_err("a block is lent, not copied; copy the tensor"));
        }
        if view.place.kind == 1 && stream.is_some_and(|stream| !stream.is_none()) {
            return Err(PyBufferError::new_err("host memory has no streams"));
        }
        if max_version.is_some_and(|(major, _)| major >= 1) {
            return view.versioned(py);
        }
        if view.read_only {
            return Err(PyBufferError::new_err(
                "a sealed block is read-only, which DLPack says since version 1",
            ));
        }
        view.plain(py)
    }

    /// For numba, cupy and others. torch refuses it for read-only memory: give it DLPack.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let view = self.view()?;
        if view.place.kind != 2 {
            return Err(PyAttributeError::new_err("host memory has no __cuda_array_interface__"));
        }
        let Some(letters) = self.letters else {
            return Err(PyAttributeError::new_err(format!("numpy has no {}; use DLPack", self.name)));
        };
        let described = PyDict::new(py);
        described.set_item("shape", PyTuple::new(py, &view.shape)?)?;
        described.set_item("typestr", letters)?;
        described.set_item("data", (view.hold.here()?.chunk.address() + view.offset, view.read_only))?;
        described.set_item("strides", py.None())?;
        described.set_item("stream", py.None())?;
        described.set_item("version", 3)?;
        Ok(described)
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { ", closed" } else { "" };
        format!("DeviceBlock(nbytes={}, dtype={}{state})", self.nbytes, self.name)
    }
}
