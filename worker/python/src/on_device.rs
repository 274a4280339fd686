//! Leases of blocks in the daemon's device memory.
//!
//! A block is a [`DeviceBlock`]: tensors are made of it without a copy, and keep its
//! lease. Nothing is sealed or given back while a tensor of a frame exists. What the
//! caller's streams still do is the caller's to wait for.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList};

use terrace_client::{
    ClientError, DeviceBlock as Pinned, DeviceReadLease as Pins, DeviceWriteLease as Frames,
};
use terrace_client::{Durability, Leased, Outcome, Reserved, SealOutcome};

use crate::arguments::durability;
use crate::block::{Block, Held, Source, refuse_views};
use crate::device::{DeviceBlock, Layout};
use crate::dlpack::Guard;
use crate::errors::{Failure, closed, invalid, stale};
use crate::lease::Words;
use crate::owned::Owned;
use crate::results::seal_word;
use crate::runtime::{Engine, Mode};

/// What a call that leases has beside the lease.
#[derive(Clone)]
pub(crate) struct Terms {
    pub(crate) layout: Layout,
    pub(crate) engine: Arc<Engine>,
    pub(crate) mode: Mode,
}

/// Blocks pinned for reading on a device; see the package's stubs.
#[pyclass(frozen, subclass, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct DeviceReadLease {
    reading: Owned<Reading>,
    words: Words,
    id: Option<u64>,
    engine: Arc<Engine>,
    mode: Mode,
}

/// The same lease where `release` is awaited.
#[pyclass(frozen, extends = DeviceReadLease, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct AsyncDeviceReadLease;

#[derive(Debug)]
struct Reading {
    blocks: Vec<Option<Kept>>,
    // Without its grants, which are in the blocks.
    lease: Mutex<Option<Pins>>,
}

/// A granted block, where it is.
#[derive(Debug)]
enum Kept {
    Device(Py<DeviceBlock>),
    Host(Arc<Held>),
}

impl Kept {
    fn new(py: Python<'_>, block: Leased, layout: &Layout) -> PyResult<Self> {
        Ok(match block {
            Leased::Host(block) => Self::Host(Held::new(Source::Leased(block))),
            Leased::Device(block) => Self::Device(Py::new(py, reading(block, layout)?)?),
        })
    }

    fn close(&self) {
        match self {
            Self::Device(block) => block.get().end(),
            Self::Host(held) => held.close(),
        }
    }

    fn is_valid(&self) -> bool {
        match self {
            Self::Device(block) => block.get().is_valid().unwrap_or(true),
            Self::Host(held) => held.is_valid().unwrap_or(true),
        }
    }

    fn views(&self) -> usize {
        match self {
            Self::Device(block) => block.get().tensors(),
            Self::Host(held) => held.views(),
        }
    }

    fn object(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(match self {
            Self::Device(block) => block.clone_ref(py).into_any(),
            Self::Host(held) => Py::new(py, Block::new(held)?)?.into_any(),
        })
    }
}

fn reading(block: Pinned, layout: &Layout) -> PyResult<DeviceBlock> {
    let bytes = block.bytes().clone();
    layout.block(&bytes, true, Guard::Read(block))
}

impl DeviceReadLease {
    pub(crate) fn wrap(py: Python<'_>, mut lease: Pins, terms: &Terms) -> PyResult<Py<PyAny>> {
        let words = Words::of(&lease.grants);
        let grants = std::mem::take(&mut lease.grants);
        let kept = |grant: Outcome<Leased>| {
            grant.into_granted().map(|block| Kept::new(py, block, &terms.layout)).transpose()
        };
        let blocks = grants.into_iter().map(kept).collect::<PyResult<_>>()?;
        let id = lease.id();
        let reading = Owned::new(Reading { blocks, lease: Mutex::new(Some(lease)) });
        let (engine, mode) = (Arc::clone(&terms.engine), terms.mode);
        let base = PyClassInitializer::from(Self { reading, words, id, engine, mode });
        match mode {
            Mode::Blocking => Ok(Py::new(py, base)?.into_any()),
            Mode::Asyncio => Ok(Py::new(py, base.add_subclass(AsyncDeviceReadLease))?.into_any()),
        }
    }

    fn close_all(&self) -> PyResult<Option<Pins>> {
        let reading = self.reading.here()?;
        reading.blocks.iter().flatten().for_each(Kept::close);
        Ok(reading.lease.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

#[pymethods]
impl DeviceReadLease {
    /// The daemon's number of the lease; `None` when nothing was granted.
    #[getter]
    fn id(&self) -> Option<u64> {
        self.id
    }

    /// One block a key: on the device, else in host memory, else `None`.
    #[getter]
    fn blocks(&self, py: Python<'_>) -> PyResult<Vec<Option<Py<PyAny>>>> {
        let blocks = self.reading.here()?.blocks.iter();
        blocks.map(|kept| kept.as_ref().map(|kept| kept.object(py)).transpose()).collect()
    }

    /// What became of each key.
    #[getter]
    fn outcomes(&self) -> Vec<&'static str> {
        self.words.outcomes.clone()
    }

    /// Why a key is missing; `None` for those that are not.
    #[getter]
    fn reasons(&self) -> Vec<Option<&'static str>> {
        self.words.reasons.clone()
    }

    /// Blocks granted from the first key on without a gap.
    #[getter]
    fn prefix(&self) -> usize {
        self.words.prefix()
    }

    /// Whether everything read until now of all blocks was theirs.
    #[getter]
    fn valid(&self) -> PyResult<bool> {
        Ok(self.reading.here()?.blocks.iter().flatten().all(Kept::is_valid))
    }

    /// Raises `StaleBlock` unless everything read until now of all blocks was theirs.
    fn check(&self) -> PyResult<()> {
        if self.valid()? { Ok(()) } else { Err(stale()) }
    }

    /// Closes every block; the lease ends with the last tensor.
    fn close(&self) -> PyResult<()> {
        drop(self.close_all()?);
        Ok(())
    }

    /// Closes every block and waits until the daemon knows that the lease has ended.
    fn release<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        refuse_views(self.reading.here()?.blocks.iter().flatten().map(Kept::views).sum())?;
        let lease = self.close_all()?;
        let call = async move {
            match lease {
                Some(lease) => Ok(lease.release().await?),
                None => Ok(()),
            }
        };
        self.engine.run(py, self.mode, call, |py, ()| Ok(py.None()))
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().reading.here()?;
        Ok(slf)
    }

    fn __exit__(
        &self,
        kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let fresh = self.valid()?;
        self.close()?;
        if kind.is_none() && !fresh { Err(stale()) } else { Ok(()) }
    }

    fn __len__(&self) -> usize {
        self.words.outcomes.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.blocks(py)?)?.try_iter()
    }

    fn __repr__(&self) -> String {
        format!("DeviceReadLease(id={:?}, blocks={}, prefix={})", self.id, self.__len__(), self.prefix())
    }
}

/// A write lease. Shared by its Python object and by the tensors of its frames.
#[derive(Debug)]
pub(crate) struct Writing {
    // Held over awaits by the one call that seals.
    lease: tokio::sync::Mutex<Frames>,
}

impl Writing {
    /// Whether a frame is still ours; nothing while a call has the lease.
    pub(crate) fn is_valid(&self, index: u32) -> Option<bool> {
        let lease = self.lease.try_lock().ok()?;
        Some(match lease.block(index)? {
            Reserved::Host(block) => block.is_valid(),
            Reserved::Device(block) => block.is_valid(),
        })
    }

    async fn seal(
        self: Arc<Self>,
        blocks: Vec<(u32, DeviceBlock)>,
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, Failure> {
        let indexes: Vec<u32> = blocks.iter().map(|(index, _)| *index).collect();
        let mut lease = self.lease.lock().await;
        let outcomes = lease.seal(&indexes, durability).await;
        // Nothing was sealed. After other errors it may have been.
        if let Err(ClientError::Refused { .. } | ClientError::Throttled { .. }) = outcomes {
            blocks.iter().for_each(|(_, block)| block.thaw());
        }
        Ok(outcomes?)
    }
}

/// Frames to be filled on a device; see the package's stubs.
#[pyclass(frozen, subclass, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct DeviceWriteLease {
    // Taken when it is closed: the tensors of its frames keep it from then on.
    writing: Owned<Mutex<Option<Arc<Writing>>>>,
    blocks: Vec<Option<Py<DeviceBlock>>>,
    words: Words,
    id: Option<u64>,
    engine: Arc<Engine>,
    mode: Mode,
}

/// The same lease where `seal` and `release` are awaited.
#[pyclass(frozen, extends = DeviceWriteLease, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct AsyncDeviceWriteLease;

/// Gives back the frames that came in host memory: who asked for a device cannot use them.
///
/// # Errors
/// As [`Frames::abort`].
pub(crate) async fn without_host_frames(mut lease: Frames) -> Result<Frames, ClientError> {
    let in_host_memory = |grant: &Outcome<Reserved>| matches!(grant, Outcome::Granted(Reserved::Host(_)));
    let indexes: Vec<u32> =
        (0..).zip(&lease.grants).filter(|(_, grant)| in_host_memory(grant)).map(|(at, _)| at).collect();
    lease.abort(&indexes).await?;
    Ok(lease)
}

impl DeviceWriteLease {
    pub(crate) fn wrap(py: Python<'_>, lease: Frames, terms: &Terms) -> PyResult<Py<PyAny>> {
        let mut words = Words::of(&lease.grants);
        let id = lease.id();
        let mut frames = Vec::with_capacity(lease.grants.len());
        for (grant, word) in lease.grants.iter().zip(&mut words.outcomes) {
            frames.push(match grant.granted() {
                Some(Reserved::Device(block)) => Some(block.bytes().clone()),
                Some(Reserved::Host(_)) => {
                    *word = "elsewhere";
                    None
                }
                None => None,
            });
        }
        let writing = Arc::new(Writing { lease: tokio::sync::Mutex::new(lease) });
        let frame = |(index, bytes): (u32, Option<_>)| {
            let Some(bytes) = bytes else { return Ok(None) };
            let guard = Guard::Write(Arc::clone(&writing), index);
            Py::new(py, terms.layout.block(&bytes, false, guard)?).map(Some)
        };
        let blocks = (0..).zip(frames).map(frame).collect::<PyResult<_>>()?;
        let writing = Owned::new(Mutex::new(Some(writing)));
        let (engine, mode) = (Arc::clone(&terms.engine), terms.mode);
        let base = PyClassInitializer::from(Self { writing, blocks, words, id, engine, mode });
        match mode {
            Mode::Blocking => Ok(Py::new(py, base)?.into_any()),
            Mode::Asyncio => Ok(Py::new(py, base.add_subclass(AsyncDeviceWriteLease))?.into_any()),
        }
    }

    fn writing(&self) -> PyResult<Arc<Writing>> {
        let writing = self.writing.here()?.lock().unwrap_or_else(PoisonError::into_inner);
        writing.clone().ok_or_else(|| closed("write lease"))
    }

    /// Forbids stores into frames that have no tensor: those named, or all that are not sealed.
    fn freeze(&self, indexes: Option<Vec<u32>>) -> PyResult<Vec<(u32, DeviceBlock)>> {
        let all = || (0..).zip(&self.blocks).filter_map(|(at, block)| Some((at, block.as_ref()?.get())));
        let wanted: Vec<(u32, &DeviceBlock)> = match indexes {
            None => all().filter(|(_, block)| block.is_writable()).collect(),
            Some(indexes) => {
                let named =
                    |index: u32| all().find(|(at, block)| *at == index && block.is_writable()).ok_or(index);
                let found: Result<Vec<_>, u32> = indexes.into_iter().map(named).collect();
                found.map_err(|index| {
                    invalid(format!(
                        "block {index} of this lease cannot be sealed: not granted, closed, or sealed before"
                    ))
                })?
            }
        };
        refuse_views(wanted.iter().map(|(_, block)| block.tensors()).sum())?;
        wanted.iter().for_each(|(_, block)| block.freeze());
        Ok(wanted.into_iter().map(|(index, block)| (index, block.clone())).collect())
    }
}

#[pymethods]
impl DeviceWriteLease {
    /// The daemon's number of the lease; `None` when nothing was granted.
    #[getter]
    fn id(&self) -> Option<u64> {
        self.id
    }

    /// One frame a key, `None` where none was granted on the device.
    #[getter]
    fn blocks(&self, py: Python<'_>) -> PyResult<Vec<Option<Py<DeviceBlock>>>> {
        self.writing()?;
        Ok(self.blocks.iter().map(|block| block.as_ref().map(|block| block.clone_ref(py))).collect())
    }

    /// What became of each key.
    #[getter]
    fn outcomes(&self) -> Vec<&'static str> {
        self.words.outcomes.clone()
    }

    /// Why a key is missing; `None` for those that are not.
    #[getter]
    fn reasons(&self) -> Vec<Option<&'static str>> {
        self.words.reasons.clone()
    }

    /// Publishes blocks with the checksums of what is in their frames.
    #[pyo3(signature = (indexes=None, *, durability="readable"))]
    fn seal<'py>(
        &self,
        py: Python<'py>,
        indexes: Option<Vec<u32>>,
        durability: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let durability = self::durability(durability)?;
        let writing = self.writing()?;
        let blocks = self.freeze(indexes)?;
        let call = writing.seal(blocks, durability);
        self.engine.run(py, self.mode, call, |py, outcomes| {
            let words: Vec<&str> = outcomes.into_iter().map(seal_word).collect();
            Ok(words.into_pyobject(py)?.unbind())
        })
    }

    /// Gives back what was not sealed and unpins the rest, with the last tensor of a frame.
    fn close(&self) -> PyResult<()> {
        let writing = self.writing.here()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.blocks.iter().flatten().for_each(|block| block.get().end());
        drop(writing);
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().writing()?;
        Ok(slf)
    }

    fn __exit__(
        &self,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close()
    }

    fn __len__(&self) -> usize {
        self.words.outcomes.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.blocks(py)?)?.try_iter()
    }

    fn __repr__(&self) -> String {
        format!("DeviceWriteLease(id={:?}, blocks={})", self.id, self.__len__())
    }
}
