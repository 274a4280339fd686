//! Memory of the program's that blocks are copied to and from: whatever has the buffer
//! protocol, in one piece or several.
//!
//! A [`Span`] keeps the memory in place. Its bytes are the program's, whose other threads may
//! store there at any time: what is copied then is any mix, and judged by its checksum alone.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;

use terrace_client::{BlockTarget, TargetMemory};

use crate::errors::invalid;

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

/// Bytes that lie apart in pieces of one length, in their order. Goes with closures as an [`Address`] does.
pub(crate) struct Pieces {
    start: Address,
    /// From the start, in bytes. One, or none where there is nothing.
    offsets: Vec<isize>,
    length: usize,
}

impl Pieces {
    pub(crate) fn one(start: *mut u8, length: usize) -> Self {
        Self { start: Address(start), offsets: vec![0], length }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.offsets.len().saturating_mul(self.length)
    }

    pub(crate) fn writable(&self) -> Vec<(*mut u8, usize)> {
        let start = self.start.get();
        self.offsets.iter().map(|offset| (start.wrapping_offset(*offset), self.length)).collect()
    }

    pub(crate) fn readable(&self) -> Vec<(*const u8, usize)> {
        self.writable().into_iter().map(|(start, length)| (start.cast_const(), length)).collect()
    }

    /// The addresses of each piece.
    pub(crate) fn places(&self) -> impl Iterator<Item = Range<usize>> {
        self.offsets.iter().map(|offset| {
            let first = self.start.get().wrapping_offset(*offset).addr();
            first..first + self.length
        })
    }

    /// The addresses from the first byte of all to the last.
    pub(crate) fn place(&self) -> Range<usize> {
        let first = self.places().map(|place| place.start).min().unwrap_or(0);
        let last = self.places().map(|place| place.end).max().unwrap_or(0);
        first..last
    }
}

/// Bytes of a Python object, held in place.
pub(crate) struct Span {
    buffer: PyUntypedBuffer,
}

impl Span {
    /// Whatever lies in one piece.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let span = Self::of_pieces(object)?;
        if !span.buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("a C-contiguous buffer is needed; copy it first"));
        }
        Ok(span)
    }

    /// Whatever lies at addresses that can be counted.
    pub(crate) fn of_pieces(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if buffer.suboffsets().is_some() {
            return Err(PyBufferError::new_err("a buffer of pointers to others cannot be copied"));
        }
        Ok(Self { buffer })
    }

    /// Its bytes in the order of its elements, in as few pieces as there are.
    pub(crate) fn pieces(&self) -> Pieces {
        let start = self.buffer.buf_ptr().cast::<u8>();
        if self.buffer.is_c_contiguous() {
            return Pieces::one(start, self.length());
        }
        let dims: Vec<_> = self.buffer.shape().iter().zip(self.buffer.strides()).collect();
        let mut length = self.buffer.item_size();
        let mut inner = dims.len();
        while let Some(at) = inner.checked_sub(1)
            && isize::try_from(length) == Ok(*dims[at].1)
        {
            length *= dims[at].0;
            inner = at;
        }
        let mut offsets = vec![0isize];
        for (count, stride) in &dims[..inner] {
            let steps = (0..**count).filter_map(|step| isize::try_from(step).ok()?.checked_mul(**stride));
            let steps: Vec<isize> = steps.collect();
            let with_each = |offset: isize| steps.iter().map(move |step| offset.wrapping_add(*step));
            offsets = offsets.into_iter().flat_map(with_each).collect();
        }
        Pieces { start: Address(start), offsets, length }
    }

    pub(crate) fn length(&self) -> usize {
        self.buffer.len_bytes()
    }

    pub(crate) fn is_readonly(&self) -> bool {
        self.buffer.readonly()
    }

    fn address(&self) -> Address {
        Address(self.buffer.buf_ptr().cast())
    }

    pub(crate) fn expect_length(&self, expected: usize) -> PyResult<()> {
        let found = self.length();
        if found == expected {
            return Ok(());
        }
        Err(invalid(format!("the buffer has {found} bytes; this space's blocks have {expected}")))
    }
}

/// Whether two targets share memory: then several threads would store there at once.
pub(crate) fn overlap(places: impl Iterator<Item = Range<usize>>) -> bool {
    let mut places: Vec<_> = places.collect();
    places.sort_unstable_by_key(|place| place.start);
    places.windows(2).any(|two| two[0].end > two[1].start)
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

    /// The addresses between which it is filled.
    pub(crate) fn place(&self) -> Range<usize> {
        let start = self.target.get().addr();
        start..start + self.length
    }

    /// The same without its span, which the caller holds until the call that fills this has ended.
    pub(crate) fn unbound(self) -> Filled<'static> {
        Filled { target: self.target, length: self.length, _span: PhantomData }
    }
}

impl BlockTarget for Filled<'_> {
    fn memory(&mut self) -> TargetMemory<'_> {
        // SAFETY: the span holds a writable buffer of this length in place, which is no part of the daemon's memory, as
        // nobody gets a writable view of that. Other threads may store there meanwhile, in Python as here: what is there
        // then is any mix, in u8.
        unsafe { TargetMemory::from_raw(self.target.get(), self.length) }
    }
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
