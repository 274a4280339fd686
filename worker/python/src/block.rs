//! Blocks as objects of the buffer protocol. All unsafe code of the package is here.
//!
//! A view (`memoryview`, `numpy.frombuffer`, `torch.frombuffer`) points straight
//! at the mapping or the copy. While one exists, what keeps its bytes in place
//! (mapping, lease, write permission) stays, even after the block was closed.
//! Each view has a [`View`] as its owner and ends with it, not when it is
//! released: torch releases at once, and keeps the owner while it uses the memory.

use std::ffi::c_int;
use std::hint;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use terrace_client::{BadBlock, BlockId, BlockTarget, Checksum, ReadBlock, SharedBytes, Stale};

use crate::errors::{bad_block, closed, in_use, invalid, stale};
use crate::lease::Writing;
use crate::owned::Owned;

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

    /// Copies the block to `target` and judges the copy.
    ///
    /// # Safety
    /// `target` is valid for as many stores as the block has bytes.
    unsafe fn copy_out(&self, target: *mut u8) -> Result<(), BadBlock> {
        match self {
            Self::Copied { bytes, .. } => {
                // SAFETY: the vector is ours and unchanging; the caller vouches for
                // `target`, which is no part of it, because nobody gets a writable view of it.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
                Ok(())
            }
            Self::Leased(block) => {
                // SAFETY: `target` holds the whole block, as the caller vouches.
                let found =
                    unsafe { block.bytes().copy_and_checksum_to(target, block.id(), block.generation()) };
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

/// An address that goes with a closure to where the interpreter is released.
struct Address(*mut u8);

// SAFETY: an address is a number; whoever follows it says why it may.
unsafe impl Send for Address {}

// SAFETY: as above.
unsafe impl Sync for Address {}

impl Address {
    // A method, so that closures take the whole and not the pointer alone.
    fn get(&self) -> *mut u8 {
        self.0
    }
}

/// Contiguous bytes of a Python object, held in place.
pub(crate) struct Span {
    buffer: PyUntypedBuffer,
}

impl Span {
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("a C-contiguous buffer is needed; copy it first"));
        }
        Ok(Self { buffer })
    }

    fn length(&self) -> usize {
        self.buffer.len_bytes()
    }

    fn is_readonly(&self) -> bool {
        self.buffer.readonly()
    }

    fn address(&self) -> Address {
        Address(self.buffer.buf_ptr().cast())
    }

    fn expect_length(&self, expected: usize) -> PyResult<()> {
        let found = self.length();
        if found == expected {
            return Ok(());
        }
        Err(invalid(format!("the buffer has {found} bytes; this space's blocks have {expected}")))
    }
}

/// One block, if it is still there, and a place in memory for it, held by a span.
pub(crate) struct Copy<'span> {
    source: Option<Source>,
    target: Address,
    length: usize,
    _span: PhantomData<&'span ()>,
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
        Ok(Self { source, target: target.address(), length: block.length, _span: PhantomData })
    }

    /// The addresses that it writes to.
    pub(crate) fn place(&self) -> Range<usize> {
        let start = self.target.get().addr();
        start..start + self.length
    }

    /// Copies, and answers whether the copy is the block.
    pub(crate) fn run(&self) -> bool {
        // SAFETY: the span holds a writable buffer of the block's length in place. Other threads
        // may store there meanwhile, in Python as here: the copy is then any mix, in u8.
        self.source.as_ref().is_some_and(|source| unsafe { source.copy_out(self.target.get()) }.is_ok())
    }
}

/// A span as what a session's `get` fills.
pub(crate) struct Filled<'span> {
    target: Address,
    length: usize,
    _span: PhantomData<&'span ()>,
}

impl<'span> Filled<'span> {
    /// # Errors
    /// A target that cannot be written.
    pub(crate) fn new(target: &'span Span) -> PyResult<Self> {
        if target.is_readonly() {
            return Err(PyBufferError::new_err("the target is read-only"));
        }
        Ok(Self { target: target.address(), length: target.length(), _span: PhantomData })
    }
}

impl BlockTarget for Filled<'_> {
    fn length(&self) -> usize {
        self.length
    }

    fn copy(&mut self, source: &SharedBytes, block: BlockId, generation: u64) -> Checksum {
        assert_eq!(source.len(), self.length, "source and target of a copy have one length");
        // SAFETY: the span holds a writable buffer of this length in place, which is no part of the daemon's memory, as
        // nobody gets a writable view of that. Other threads may store there meanwhile, in Python as here: the copy
        // is then any mix, in u8.
        unsafe { source.copy_and_checksum_to(self.target.get(), block, generation) }
    }

    fn copy_unsummed(&mut self, source: &SharedBytes) {
        assert_eq!(source.len(), self.length, "source and target of a copy have one length");
        // SAFETY: as above.
        unsafe { source.copy_to_raw(self.target.get()) };
    }

    fn store(&mut self, payload: &[u8]) {
        assert_eq!(payload.len(), self.length, "source and target of a copy have one length");
        // SAFETY: as above; the payload is memory of our own.
        unsafe { ptr::copy_nonoverlapping(payload.as_ptr(), self.target.get(), self.length) };
    }
}

/// Looks before waiting: the last copy of another thread takes less than it costs to be woken.
const SPINS: usize = 2000;

/// Copies that several threads share. A thread takes the next one that nobody has: one that gets its processor late
/// leaves the rest to the others, and one that gets it too late finds none, and nobody waits for it.
struct Work {
    /// Their targets are in place until the last one has ended.
    copies: Vec<Copy<'static>>,
    good: Vec<AtomicBool>,
    next: AtomicUsize,
    /// Copies that have not ended.
    left: AtomicUsize,
    /// Who waits for the last of them.
    caller: Thread,
}

impl Work {
    fn run(&self) {
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(copy) = self.copies.get(at) else { break };
            let _ended = Ended(self);
            self.good[at].store(copy.run(), Ordering::Relaxed);
        }
    }

    fn wait(&self) {
        for _ in 0..SPINS {
            if self.left.load(Ordering::Acquire) == 0 {
                return;
            }
            hint::spin_loop();
        }
        while self.left.load(Ordering::Acquire) > 0 {
            thread::park();
        }
    }
}

/// Counts a copy as ended, whatever became of it.
struct Ended<'work>(&'work Work);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // What was stored before is seen by whoever sees the count.
        if self.0.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.caller.unpark();
        }
    }
}

/// Returns only once every copy has ended: from then on nobody stores into a target.
struct Waits<'work>(&'work Work);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.wait();
    }
}

/// Runs copies, whose targets do not overlap, on this thread and others; answers which are the block.
pub(crate) fn copy_all(copies: Vec<Copy<'_>>, threads: usize) -> Vec<bool> {
    // Their spans are held by our caller; this function ends, however it does, after the last copy, and none begins
    // after that.
    let unbound = |copy: Copy<'_>| Copy {
        source: copy.source,
        target: copy.target,
        length: copy.length,
        _span: PhantomData,
    };
    let work = Arc::new(Work {
        good: copies.iter().map(|_| AtomicBool::new(false)).collect(),
        next: AtomicUsize::new(0),
        left: AtomicUsize::new(copies.len()),
        caller: thread::current(),
        copies: copies.into_iter().map(unbound).collect(),
    });
    let waits = Waits(&work);
    for _ in 1..threads {
        let work = Arc::clone(&work);
        // Where there is no thread to be had, the others do it.
        let _refused = thread::Builder::new().name("terrace-copy".into()).spawn(move || work.run());
    }
    work.run();
    drop(waits);
    work.good.iter().map(|good| good.load(Ordering::Relaxed)).collect()
}

/// A copy of the bytes of any contiguous buffer.
///
/// # Errors
/// An object without a contiguous buffer.
pub(crate) fn copy_in(object: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    let span = Span::of(object)?;
    let (address, length) = (span.address(), span.length());
    let copied = object.py().detach(move || {
        let mut bytes = Vec::<u8>::with_capacity(length);
        // SAFETY: `span` keeps `length` bytes at the address until we are back; the
        // vector is new and has room for them, and is full afterwards. Another
        // thread may store into the source meanwhile: what is copied is then any mix, in u8.
        unsafe {
            ptr::copy_nonoverlapping(address.get().cast_const(), bytes.as_mut_ptr(), length);
            bytes.set_len(length);
        }
        bytes
    });
    drop(span);
    Ok(copied)
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

    fn copy_to(&self, py: Python<'_>, address: Address) -> PyResult<()> {
        let source = self.held.here()?.source()?;
        // SAFETY: both callers pass memory of `self.length` bytes that they keep in place.
        let copied = py.detach(move || unsafe { source.copy_out(address.get()) });
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
        let span = Span::of(target)?;
        if span.is_readonly() {
            return Err(PyBufferError::new_err("the target is read-only"));
        }
        span.expect_length(self.length)?;
        self.copy_to(target.py(), span.address())
    }

    /// A copy that was compared with the checksum.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, self.length, |target| self.copy_to(py, Address(target.as_mut_ptr())))
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

    /// Copies `nbytes` bytes in.
    fn fill(&self, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let span = Span::of(source)?;
        span.expect_length(self.length)?;
        let writing = self.writing.here()?;
        let frame: SharedBytes = writing.add_view(self.index)?;
        let (address, length) = (span.address(), self.length);
        source.py().detach(move || {
            let target = frame.as_ptr().cast_mut();
            // SAFETY: `span` keeps the source, and our view the frame and its write
            // permission, until we are back. Both have `length` bytes; they may
            // overlap, if the source is a view of this frame.
            unsafe { ptr::copy(address.get().cast_const(), target, length) };
        });
        writing.end_view(self.index);
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
