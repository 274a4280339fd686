//! Blocks as objects of the buffer protocol.
//!
//! A view (`memoryview`, `numpy.frombuffer`, `torch.frombuffer`) points straight
//! at the mapping or the copy. While one exists, what keeps its bytes in place
//! (mapping, lease, write permission) stays, even after the block was closed.
//! Each view has a [`View`] as its owner and ends with it, not when it is
//! released: torch releases at once, and keeps the owner while it uses the memory.

use std::ffi::c_int;
use std::marker::PhantomData;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use terrace_client::{BadBlock, BlockId, ReadBlock, Stale};

use crate::errors::{bad_block, closed, in_use, invalid, stale};
use crate::lease::Writing;
use crate::owned::Owned;
use crate::span::{Pieces, Span};

/// Where the bytes of a sealed block are.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// In shared memory, pinned by a lease.
    Leased(ReadBlock),
    /// In memory of our own, compared with their checksum when they came.
    Copied { block: BlockId, bytes: Arc<Vec<u8>> },
}

/// A sealed block with its views. Shared by its lease and its Python objects.
#[derive(Debug)]
pub(crate) struct Held {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    source: Option<Source>,
    closed: bool,
    views: usize,
}

impl Held {
    pub(crate) fn new(source: Source) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { source: Some(source), closed: false, views: 0 }) })
    }

    // Only ever locked for a moment and with the interpreter held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bytes are.
    ///
    /// # Errors
    /// `ClosedError`.
    fn source(&self) -> PyResult<Source> {
        let state = self.state();
        match &state.source {
            Some(source) if !state.closed => Ok(source.clone()),
            Some(_) | None => Err(closed("block")),
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state().closed
    }

    pub(crate) fn views(&self) -> usize {
        self.state().views
    }

    /// Whether what was read until now was the block; `None` if it was closed.
    pub(crate) fn is_valid(&self) -> Option<bool> {
        self.source().ok().map(|source| source.is_valid())
    }

    /// Refuses further use. What its views need goes with the last of them.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let done = if state.views == 0 { state.source.take() } else { None };
        drop(state);
        drop(done);
    }

    fn add_view(&self) -> PyResult<Source> {
        let source = self.source()?;
        if !source.is_valid() {
            return Err(stale());
        }
        self.state().views += 1;
        Ok(source)
    }

    fn end_view(&self) {
        let mut state = self.state();
        state.views = state.views.saturating_sub(1);
        let done = if state.closed && state.views == 0 { state.source.take() } else { None };
        drop(state);
        drop(done);
    }
}

impl Source {
    fn is_valid(&self) -> bool {
        match self {
            Self::Leased(block) => block.is_valid(),
            Self::Copied { .. } => true,
        }
    }

    fn length(&self) -> usize {
        match self {
            Self::Leased(block) => block.bytes().len(),
            Self::Copied { bytes, .. } => bytes.len(),
        }
    }

    fn id(&self) -> BlockId {
        match self {
            Self::Leased(block) => block.id(),
            Self::Copied { block, .. } => *block,
        }
    }

    fn start(&self) -> *const u8 {
        match self {
            Self::Leased(block) => block.bytes().as_ptr(),
            Self::Copied { bytes, .. } => bytes.as_ptr(),
        }
    }

    fn map_ahead(&self) {
        match self {
            Self::Leased(block) => block.bytes().map_ahead(),
            Self::Copied { .. } => {}
        }
    }

    /// Copies the block to pieces, one behind the other, and judges the copy.
    ///
    /// # Safety
    /// The pieces are valid for stores and as long as the block together.
    unsafe fn copy_out(&self, pieces: &Pieces, way: Way) -> Result<(), BadBlock> {
        match self {
            Self::Copied { bytes, .. } => {
                let mut rest: &[u8] = bytes;
                for (target, length) in pieces.writable() {
                    let (part, behind) = rest.split_at(length.min(rest.len()));
                    // SAFETY: the vector is ours and unchanging; the caller vouches for the
                    // target, which is no part of it, because nobody gets a writable view of it.
                    unsafe { ptr::copy_nonoverlapping(part.as_ptr(), target, part.len()) };
                    rest = behind;
                }
                Ok(())
            }
            Self::Leased(block) => {
                let bytes = match way {
                    Way::ByLength => block.bytes().clone(),
                    Way::ThroughTheCache => block.bytes().clone().through_the_cache(),
                };
                // SAFETY: the pieces hold the whole block, as the caller vouches.
                let found =
                    unsafe { bytes.scatter_and_checksum(&pieces.writable(), block.id(), block.generation()) };
                if !block.is_valid() {
                    return Err(Stale.into());
                }
                if found != block.checksum() {
                    return Err(BadBlock::Checksum { expected: block.checksum().get(), found: found.get() });
                }
                Ok(())
            }
        }
    }
}

/// One block, if it is still there, and a place in memory for it, held by a span.
pub(crate) struct Copy<'span> {
    source: Option<Source>,
    target: Pieces,
    way: Way,
    _span: PhantomData<&'span ()>,
}

/// What a copy does to the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    /// A long block goes past it.
    ByLength,
    /// It stays there, as all that is copied with it.
    ThroughTheCache,
}

impl<'span> Copy<'span> {
    /// # Errors
    /// A target that cannot be written or is not as long as the block; a block of the parent process.
    pub(crate) fn new(block: &Block, target: &'span Span) -> PyResult<Self> {
        if target.is_readonly() {
            return Err(PyBufferError::new_err("the target is read-only"));
        }
        target.expect_length(block.length)?;
        let source = block.held.here()?.source().ok();
        Ok(Self { source, target: target.pieces(), way: Way::ByLength, _span: PhantomData })
    }

    /// The same another way.
    pub(crate) fn by(self, way: Way) -> Self {
        Self { way, ..self }
    }

    /// Where it writes.
    pub(crate) fn target(&self) -> &Pieces {
        &self.target
    }

    /// How much it writes.
    pub(crate) fn bytes(&self) -> usize {
        self.target.bytes()
    }

    /// Copies, and answers whether the copy is the block.
    pub(crate) fn run(&self) -> bool {
        // SAFETY: the span holds a writable buffer of the block's length in place. Other threads
        // may store there meanwhile, in Python as here: the copy is then any mix, in u8.
        self.source.as_ref().is_some_and(|source| unsafe { source.copy_out(&self.target, self.way) }.is_ok())
    }
}

/// What a view keeps in place.
#[derive(Debug)]
enum Hold {
    Sealed(Arc<Held>),
    Writable { writing: Arc<Writing>, index: usize },
}

/// The owner of one view, counted already; ends it when collected.
#[pyclass(frozen, module = "terrace_kv._native")]
#[derive(Debug)]
struct View {
    hold: Owned<Hold>,
}

impl View {
    fn new(py: Python<'_>, hold: Hold) -> PyResult<Bound<'_, Self>> {
        Bound::new(py, Self { hold: Owned::new(hold) })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        match self.hold.here() {
            Ok(Hold::Sealed(held)) => held.end_view(),
            Ok(Hold::Writable { writing, index }) => writing.end_view(*index),
            // A child's copy: the view is the parent's.
            Err(_) => {}
        }
    }
}

/// Fills in a view.
///
/// # Safety
/// `view` is the one that CPython asked with, and `length` bytes from `start` on
/// stay valid (for stores too, unless `readonly`) while `owner` lives.
unsafe fn export(
    view: *mut ffi::Py_buffer,
    owner: &Bound<'_, PyAny>,
    start: *mut u8,
    length: usize,
    readonly: bool,
    flags: c_int,
) -> PyResult<()> {
    let length = isize::try_from(length).map_err(|_| PyBufferError::new_err("longer than memory"))?;
    // SAFETY: `view` is writable, as the caller vouches; the protocol wants its
    // owner null if this fails. The rest is plain arguments; the owner is counted.
    let answer = unsafe {
        (*view).obj = ptr::null_mut();
        ffi::PyBuffer_FillInfo(view, owner.as_ptr(), start.cast(), length, c_int::from(readonly), flags)
    };
    if answer == 0 { Ok(()) } else { Err(PyErr::fetch(owner.py())) }
}

fn check_asked(view: *mut ffi::Py_buffer) -> PyResult<()> {
    if view.is_null() { Err(PyBufferError::new_err("no view to fill in")) } else { Ok(()) }
}

/// A sealed block; see the package's stubs.
#[pyclass(frozen, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct Block {
    held: Owned<Arc<Held>>,
    id: BlockId,
    length: usize,
}

impl Block {
    /// # Errors
    /// `ClosedError`.
    pub(crate) fn new(held: &Arc<Held>) -> PyResult<Self> {
        let source = held.source()?;
        Ok(Self { held: Owned::new(Arc::clone(held)), id: source.id(), length: source.length() })
    }

    pub(crate) fn copied(block: BlockId, bytes: Vec<u8>) -> PyResult<Self> {
        Self::new(&Held::new(Source::Copied { block, bytes: Arc::new(bytes) }))
    }

    /// Has the pages of a block mapped that is still there.
    pub(crate) fn map_ahead(held: &Held) {
        if let Ok(source) = held.source() {
            source.map_ahead();
        }
    }

    /// What it shares with its lease.
    ///
    /// # Errors
    /// A block of the parent process.
    pub(crate) fn held(&self) -> PyResult<Arc<Held>> {
        self.held.here().cloned()
    }

    fn copy_to(&self, py: Python<'_>, pieces: &Pieces) -> PyResult<()> {
        let source = self.held.here()?.source()?;
        // SAFETY: both callers pass memory of `self.length` bytes that they keep in place.
        let copied = py.detach(move || unsafe { source.copy_out(pieces, Way::ByLength) });
        copied.map_err(bad_block)
    }
}

#[pymethods]
impl Block {
    /// Identity, 16 bytes.
    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.id.to_bytes())
    }

    /// Payload length in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.length
    }

    /// Whether `close` was called or a `with` ended.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.held.here()?.is_closed())
    }

    /// Whether everything read until now was the block.
    #[getter]
    fn valid(&self) -> PyResult<bool> {
        Ok(self.held.here()?.source()?.is_valid())
    }

    /// Raises `StaleBlock` unless everything read until now was the block.
    fn check(&self) -> PyResult<()> {
        if self.valid()? { Ok(()) } else { Err(stale()) }
    }

    /// Compares the bytes in place with the sealed checksum.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        match self.held.here()?.source()? {
            Source::Leased(block) => py.detach(move || block.verify()).map_err(bad_block),
            // Compared when they came.
            Source::Copied { .. } => Ok(()),
        }
    }

    /// Copies the block into a writable buffer of `nbytes` bytes and compares the copy with the checksum.
    fn read_into(&self, target: &Bound<'_, PyAny>) -> PyResult<()> {
        let span = Span::of_pieces(target)?;
        if span.is_readonly() {
            return Err(PyBufferError::new_err("the target is read-only"));
        }
        span.expect_length(self.length)?;
        self.copy_to(target.py(), &span.pieces())
    }

    /// A copy that was compared with the checksum.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, self.length, |target| {
            self.copy_to(py, &Pieces::one(target.as_mut_ptr(), target.len()))
        })
    }

    /// Refuses further use, and ends the lease with the last view.
    fn close(&self) -> PyResult<()> {
        self.held.here()?.close();
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().held.here()?.source()?;
        Ok(slf)
    }

    fn __exit__(
        &self,
        kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let held = self.held.here()?;
        let fresh = held.is_valid().unwrap_or(true);
        held.close();
        if kind.is_none() && !fresh { Err(stale()) } else { Ok(()) }
    }

    fn __len__(&self) -> usize {
        self.length
    }

    fn __repr__(&self) -> String {
        let state = match self.held.here() {
            Ok(held) if held.is_closed() => ", closed",
            Ok(_) => "",
            Err(_) => ", of the parent process",
        };
        format!("Block(id={}, nbytes={}{state})", self.id, self.length)
    }

    // CPython passes a view to fill in, and what the caller of it wants.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        check_asked(view)?;
        let block = slf.get();
        let held = block.held.here()?;
        let start = held.add_view()?.start().cast_mut();
        let owner = View::new(slf.py(), Hold::Sealed(Arc::clone(held)))?;
        // SAFETY: the view is CPython's. The bytes stay mapped while `held` has its
        // source, which it keeps until the owner ends the view; nobody may store into them.
        unsafe { export(view, owner.as_any(), start, block.length, true, flags) }
    }

    // Views end with their owner. That this exists tells numpy to keep a
    // memoryview, and with it the owner, and not the block alone.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// A block to be filled; see the package's stubs.
#[pyclass(frozen, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct WriteBlock {
    writing: Owned<Arc<Writing>>,
    index: usize,
    id: BlockId,
    length: usize,
}

impl WriteBlock {
    pub(crate) fn new(writing: &Arc<Writing>, index: usize, id: BlockId, length: usize) -> Self {
        Self { writing: Owned::new(Arc::clone(writing)), index, id, length }
    }
}

#[pymethods]
impl WriteBlock {
    /// Identity, 16 bytes.
    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.id.to_bytes())
    }

    /// Position in the lease.
    #[getter]
    fn index(&self) -> usize {
        self.index
    }

    /// Payload length in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.length
    }

    /// Copies `nbytes` bytes in, and computes their checksum in the same pass.
    fn fill(&self, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let span = Span::of_pieces(source)?;
        span.expect_length(self.length)?;
        let pieces = span.pieces();
        let writing = self.writing.here()?;
        let filling = writing.begin_fill(self.index)?;
        let place = filling.bytes.as_ptr().addr()..filling.bytes.as_ptr().addr() + self.length;
        let taken = pieces.place();
        if taken.start < place.end && place.start < taken.end {
            writing.end_fill(self.index, None);
            return Err(invalid("the source is a view of the frame that it would fill"));
        }
        let (id, generation) = (self.id, filling.generation);
        let sum = source.py().detach(move || {
            // SAFETY: `span` keeps the source, and our view the frame and its write
            // permission, until we are back. They do not overlap, and each has the block's length.
            unsafe { filling.bytes.gather_and_checksum(&pieces.readable(), id, generation) }
        });
        writing.end_fill(self.index, Some(sum));
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.length
    }

    fn __repr__(&self) -> String {
        format!("WriteBlock(index={}, id={}, nbytes={})", self.index, self.id, self.length)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        check_asked(view)?;
        let block = slf.get();
        let writing = block.writing.here()?;
        let start = writing.add_view(block.index)?.as_ptr().cast_mut();
        let hold = Hold::Writable { writing: Arc::clone(writing), index: block.index };
        let owner = View::new(slf.py(), hold)?;
        // SAFETY: the view is CPython's. The frame stays mapped and writable while
        // `writing` counts a view of it, which it does until the owner ends it: until
        // then it refuses to seal or abort the block, and keeps the lease, whose
        // writer keeps the permission.
        unsafe { export(view, owner.as_any(), start, block.length, false, flags) }
    }

    // Views end with their owner. That this exists tells numpy to keep a
    // memoryview, and with it the owner, and not the block alone.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// Views of a read lease that forbid to end it now.
pub(crate) fn refuse_views(views: usize) -> PyResult<()> {
    if views == 0 {
        return Ok(());
    }
    Err(in_use(format!(
        "{views} views of this lease's blocks are alive; delete the arrays and tensors first"
    )))
}
