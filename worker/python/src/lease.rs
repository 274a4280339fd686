//! Leases: what was granted, and when it goes back.
//!
//! A lease ends when it and its blocks are closed or collected and no view of
//! them is left. Nothing is sealed or given back while a writable view exists:
//! a store through it would reach bytes that others read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList};

use terrace_client::{BlockId, Checksum, ClientError, Outcome, SealOutcome, SharedBytes};

use crate::arguments::durability;
use crate::block::{Block, Held, Source, WriteBlock, refuse_views};
use crate::errors::{Failure, closed, in_use, invalid, stale};
use crate::owned::Owned;
use crate::results::{reason_word, seal_word};
use crate::runtime::{Engine, Mode};

fn words<B>(outcome: &Outcome<B>) -> (&'static str, Option<&'static str>) {
    match outcome {
        Outcome::Granted(_) => ("granted", None),
        Outcome::Promoting => ("promoting", None),
        Outcome::Missing(reason) => ("missing", Some(reason_word(*reason))),
        Outcome::Throttled => ("throttled", None),
        Outcome::Exists => ("exists", None),
    }
}

/// Outcomes and reasons, one a key.
#[derive(Debug)]
pub(crate) struct Words {
    pub(crate) outcomes: Vec<&'static str>,
    pub(crate) reasons: Vec<Option<&'static str>>,
}

impl Words {
    pub(crate) fn of<B>(grants: &[Outcome<B>]) -> Self {
        let (outcomes, reasons) = grants.iter().map(words).unzip();
        Self { outcomes, reasons }
    }

    /// Keys granted from the first one on without a gap.
    pub(crate) fn prefix(&self) -> usize {
        self.outcomes.iter().take_while(|outcome| **outcome == "granted").count()
    }
}

/// Blocks pinned for reading; see the package's stubs.
#[pyclass(frozen, subclass, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct ReadLease {
    reading: Owned<Reading>,
    words: Words,
    id: Option<u64>,
    engine: Arc<Engine>,
    mode: Mode,
}

#[derive(Debug)]
struct Reading {
    blocks: Vec<Option<Arc<Held>>>,
    // Without its grants, which are in the blocks.
    lease: Mutex<Option<terrace_client::ReadLease>>,
}

/// The same lease where `release` is awaited.
#[pyclass(frozen, extends = ReadLease, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct AsyncReadLease;

impl ReadLease {
    pub(crate) fn wrap(
        py: Python<'_>,
        mut lease: terrace_client::ReadLease,
        engine: Arc<Engine>,
        mode: Mode,
    ) -> PyResult<Py<PyAny>> {
        let words = Words::of(&lease.grants);
        let grants = std::mem::take(&mut lease.grants);
        let hold = |block| Held::new(Source::Leased(block));
        let blocks = grants.into_iter().map(|grant| grant.into_granted().map(hold)).collect();
        let id = lease.id();
        let reading = Owned::new(Reading { blocks, lease: Mutex::new(Some(lease)) });
        let base = PyClassInitializer::from(Self { reading, words, id, engine, mode });
        match mode {
            Mode::Blocking => Ok(Py::new(py, base)?.into_any()),
            Mode::Asyncio => Ok(Py::new(py, base.add_subclass(AsyncReadLease))?.into_any()),
        }
    }

    fn close_all(&self) -> PyResult<Option<terrace_client::ReadLease>> {
        let reading = self.reading.here()?;
        reading.blocks.iter().flatten().for_each(|held| held.close());
        Ok(reading.lease.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

#[pymethods]
impl ReadLease {
    /// The daemon's number of the lease; `None` when nothing was granted.
    #[getter]
    fn id(&self) -> Option<u64> {
        self.id
    }

    /// One block a key, `None` where it was not granted.
    #[getter]
    fn blocks(&self) -> PyResult<Vec<Option<Block>>> {
        let blocks = self.reading.here()?.blocks.iter();
        blocks.map(|held| held.as_ref().map(Block::new).transpose()).collect()
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
        let mut blocks = self.reading.here()?.blocks.iter().flatten();
        Ok(blocks.all(|held| held.is_valid().unwrap_or(true)))
    }

    /// Raises `StaleBlock` unless everything read until now of all blocks was theirs.
    fn check(&self) -> PyResult<()> {
        if self.valid()? { Ok(()) } else { Err(stale()) }
    }

    /// Closes every block; the lease ends with the last view.
    fn close(&self) -> PyResult<()> {
        drop(self.close_all()?);
        Ok(())
    }

    /// Closes every block and waits until the daemon knows that the lease has ended.
    fn release<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let views = self.reading.here()?.blocks.iter().flatten().map(|held| held.views()).sum();
        refuse_views(views)?;
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
        PyList::new(py, self.blocks()?)?.try_iter()
    }

    fn __repr__(&self) -> String {
        format!("ReadLease(id={:?}, blocks={}, prefix={})", self.id, self.__len__(), self.prefix())
    }
}

/// A write lease with its blocks' views. Shared by its Python objects.
#[derive(Debug)]
pub(crate) struct Writing {
    // Held over awaits by the one call that seals, aborts or releases.
    lease: tokio::sync::Mutex<Option<terrace_client::WriteLease>>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    closed: bool,
    frames: Vec<Frame>,
}

/// Where a block is written.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) bytes: SharedBytes,
    pub(crate) generation: u64,
    /// Of all that is in the frame, as far as it is known.
    sum: Option<Checksum>,
    /// How often somebody began to store.
    turns: u64,
    /// The turn of the fill that runs, if nobody else could store when it began.
    filling: Option<u64>,
}

/// One key of a write lease.
#[derive(Debug)]
enum Frame {
    NotGranted,
    /// Stores are allowed.
    Writable {
        open: Open,
        views: usize,
    },
    /// A seal began: nobody stores any more, unless the daemon refuses it.
    Sealing {
        open: Open,
    },
    /// Published, or lost: what readers start from, and those that were handed out.
    Sealed {
        source: Option<Source>,
        readers: Vec<Weak<Held>>,
    },
    Aborted,
}

impl Frame {
    /// Views of it, of writers or of readers.
    fn views(&self) -> usize {
        match self {
            Self::Writable { views, .. } => *views,
            Self::Sealed { readers, .. } => {
                readers.iter().filter_map(Weak::upgrade).map(|held| held.views()).sum()
            }
            Self::NotGranted | Self::Sealing { .. } | Self::Aborted => 0,
        }
    }
}

impl Writing {
    fn new(lease: terrace_client::WriteLease) -> Arc<Self> {
        let frames = lease.grants.iter().map(|grant| match grant.granted() {
            Some(block) => {
                let (bytes, generation) = (block.bytes().clone(), block.generation());
                Frame::Writable {
                    open: Open { bytes, generation, sum: None, turns: 0, filling: None },
                    views: 0,
                }
            }
            None => Frame::NotGranted,
        });
        let table = Mutex::new(Table { closed: false, frames: frames.collect() });
        Arc::new(Self { lease: tokio::sync::Mutex::new(Some(lease)), table })
    }

    // Only ever locked for a moment.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of a writable frame, which stays so until the view ends.
    ///
    /// # Errors
    /// The lease was closed, or the block is not writable any more.
    pub(crate) fn add_view(&self, index: usize) -> PyResult<SharedBytes> {
        self.begin(index, |_, _| {}).map(|open| open.bytes)
    }

    /// The same, for a copy of a whole block that ends by [`Self::end_fill`].
    ///
    /// # Errors
    /// As [`Self::add_view`].
    pub(crate) fn begin_fill(&self, index: usize) -> PyResult<Open> {
        self.begin(index, |open, views| open.filling = (views == 0).then_some(open.turns))
    }

    fn begin(&self, index: usize, mark: impl FnOnce(&mut Open, usize)) -> PyResult<Open> {
        let mut table = self.table();
        if table.closed {
            return Err(closed("write lease"));
        }
        match table.frames.get_mut(index) {
            Some(Frame::Writable { open, views }) => {
                // From here on somebody may store: what is known of the bytes is not true any more.
                open.sum = None;
                open.turns += 1;
                mark(open, *views);
                *views += 1;
                Ok(open.clone())
            }
            Some(Frame::Sealing { .. } | Frame::Sealed { .. }) => {
                Err(in_use(format!("block {index} was sealed; read it by `lease.reader({index})`")))
            }
            Some(Frame::Aborted) => Err(closed("block")),
            Some(Frame::NotGranted) | None => Err(invalid(format!("block {index} was not granted"))),
        }
    }

    /// A fill has ended. Its sum is that of the frame if nobody else began to store meanwhile, or before and goes on.
    pub(crate) fn end_fill(&self, index: usize, sum: Option<Checksum>) {
        if let Some(Frame::Writable { open, .. }) = self.table().frames.get_mut(index) {
            open.sum = sum.filter(|_| open.filling == Some(open.turns));
            open.filling = None;
        }
        self.end_view(index);
    }

    pub(crate) fn end_view(&self, index: usize) {
        if let Some(Frame::Writable { views, .. }) = self.table().frames.get_mut(index) {
            *views = views.saturating_sub(1);
        }
        self.settle();
    }

    fn close(&self) {
        self.table().closed = true;
        self.settle();
    }

    /// Ends the lease if it was closed and nobody has a view or a call running;
    /// whoever has does it later.
    fn settle(&self) {
        let mut table = self.table();
        let stores = |frame: &Frame| matches!(frame, Frame::Writable { views, .. } if *views > 0);
        if !table.closed || table.frames.iter().any(stores) {
            return;
        }
        let frames = std::mem::take(&mut table.frames);
        drop(table);
        let lease = self.lease.try_lock().ok().and_then(|mut lease| lease.take());
        drop((frames, lease));
    }

    /// The frames that a call is about: those named, or all that are writable.
    /// None of them may have a view.
    fn pick(&self, indexes: Option<Vec<u32>>) -> PyResult<Vec<u32>> {
        let table = self.table();
        if table.closed {
            return Err(closed("write lease"));
        }
        let indexes = match indexes {
            Some(indexes) => indexes,
            None => {
                let all = table.frames.iter().enumerate();
                let writable = all.filter(|(_, frame)| matches!(frame, Frame::Writable { .. }));
                writable.filter_map(|(index, _)| u32::try_from(index).ok()).collect()
            }
        };
        for index in &indexes {
            let views = match table.frames.get(*index as usize) {
                Some(Frame::Writable { views, .. }) => *views,
                Some(Frame::NotGranted | Frame::Sealing { .. } | Frame::Sealed { .. } | Frame::Aborted) => 0,
                None => return Err(invalid(format!("the lease has no block {index}"))),
            };
            if views > 0 {
                return Err(in_use(format!(
                    "block {index} has {views} writable views; delete the arrays and tensors first"
                )));
            }
        }
        Ok(indexes)
    }

    fn mark(&self, indexes: &[u32], mut next: impl FnMut(u32, Frame) -> Frame) {
        let mut table = self.table();
        for index in indexes {
            if let Some(frame) = table.frames.get_mut(*index as usize) {
                *frame = next(*index, std::mem::replace(frame, Frame::Aborted));
            }
        }
    }

    /// Forbids further views of the frames that are to be sealed.
    fn freeze(&self, indexes: &[u32]) -> PyResult<()> {
        let table = self.table();
        for index in indexes {
            match table.frames.get(*index as usize) {
                Some(Frame::Writable { .. } | Frame::Sealing { .. }) => {}
                Some(Frame::NotGranted | Frame::Sealed { .. } | Frame::Aborted) | None => {
                    return Err(invalid(format!(
                        "block {index} of this lease cannot be sealed: not granted, or sealed or aborted before"
                    )));
                }
            }
        }
        drop(table);
        self.mark(indexes, |_, frame| match frame {
            Frame::Writable { open, .. } => Frame::Sealing { open },
            same @ (Frame::NotGranted | Frame::Sealing { .. } | Frame::Sealed { .. } | Frame::Aborted) => {
                same
            }
        });
        Ok(())
    }

    /// Checksums of what is in frames that nobody stores into any more: known since they were filled, or computed now.
    fn sums(
        &self,
        lease: &terrace_client::WriteLease,
        indexes: &[u32],
    ) -> Result<Vec<(u32, Checksum)>, ClientError> {
        let known: Vec<_> = {
            let table = self.table();
            let sum = |index: &u32| match table.frames.get(*index as usize) {
                Some(Frame::Sealing { open }) => open.sum,
                Some(Frame::NotGranted | Frame::Writable { .. } | Frame::Sealed { .. } | Frame::Aborted)
                | None => None,
            };
            indexes.iter().map(sum).collect()
        };
        let sums = indexes.iter().zip(known).map(|(index, known)| {
            let block = lease.block(*index).filter(|block| block.is_writable());
            let block = block.ok_or(ClientError::NotWritable { index: *index })?;
            Ok((*index, known.unwrap_or_else(|| block.seal_value().1)))
        });
        sums.collect()
    }

    async fn seal(
        self: Arc<Self>,
        indexes: Vec<u32>,
        durability: terrace_client::Durability,
    ) -> Result<Vec<SealOutcome>, Failure> {
        let mut lease = self.lease.lock().await;
        let outcomes = match lease.as_mut() {
            Some(open) => match self.sums(open, &indexes) {
                Ok(sums) => open.seal_with(&sums, durability).await.map_err(Failure::from),
                Err(error) => Err(Failure::from(error)),
            },
            None => Err(Failure::Closed("write lease")),
        };
        match (&outcomes, lease.as_ref()) {
            (Ok(_), Some(open)) => {
                self.mark(&indexes, |index, _| {
                    let source = open.reader(index).map(Source::Leased);
                    Frame::Sealed { source, readers: Vec::new() }
                });
            }
            // Nothing was sealed. After other errors it may have been.
            (Err(Failure::Client(ClientError::Refused { .. } | ClientError::Throttled { .. })), _) => {
                self.mark(&indexes, |_, frame| match frame {
                    Frame::Sealing { open } => Frame::Writable { open, views: 0 },
                    same @ (Frame::NotGranted
                    | Frame::Writable { .. }
                    | Frame::Sealed { .. }
                    | Frame::Aborted) => same,
                });
            }
            (Ok(_) | Err(_), _) => {}
        }
        drop(lease);
        self.settle();
        outcomes
    }

    async fn abort(self: Arc<Self>, indexes: Vec<u32>) -> Result<u32, Failure> {
        let mut lease = self.lease.lock().await;
        let aborted = match lease.as_mut() {
            Some(open) => open.abort(&indexes).await.map_err(Failure::from),
            None => Err(Failure::Closed("write lease")),
        };
        drop(lease);
        self.settle();
        aborted
    }

    async fn release(self: Arc<Self>) -> Result<(), Failure> {
        let lease = self.lease.lock().await.take();
        match lease {
            Some(lease) => Ok(lease.release().await?),
            None => Ok(()),
        }
    }
}

/// Blocks to be filled; see the package's stubs.
#[pyclass(frozen, subclass, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct WriteLease {
    writing: Owned<Arc<Writing>>,
    blocks: Vec<Option<(BlockId, usize)>>,
    words: Words,
    id: Option<u64>,
    engine: Arc<Engine>,
    mode: Mode,
}

/// The same lease where `seal`, `abort` and `release` are awaited.
#[pyclass(frozen, extends = WriteLease, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct AsyncWriteLease;

impl WriteLease {
    pub(crate) fn wrap(
        py: Python<'_>,
        lease: terrace_client::WriteLease,
        engine: Arc<Engine>,
        mode: Mode,
    ) -> PyResult<Py<PyAny>> {
        let words = Words::of(&lease.grants);
        let granted = lease.grants.iter().map(Outcome::granted);
        let blocks = granted.map(|block| block.map(|block| (block.id(), block.bytes().len()))).collect();
        let id = lease.id();
        let writing = Owned::new(Writing::new(lease));
        let base = PyClassInitializer::from(Self { writing, blocks, words, id, engine, mode });
        match mode {
            Mode::Blocking => Ok(Py::new(py, base)?.into_any()),
            Mode::Asyncio => Ok(Py::new(py, base.add_subclass(AsyncWriteLease))?.into_any()),
        }
    }
}

#[pymethods]
impl WriteLease {
    /// The daemon's number of the lease; `None` when nothing was granted.
    #[getter]
    fn id(&self) -> Option<u64> {
        self.id
    }

    /// One block a key, `None` where no frame was granted.
    #[getter]
    fn blocks(&self) -> PyResult<Vec<Option<WriteBlock>>> {
        let writing = self.writing.here()?;
        let blocks = self.blocks.iter().enumerate();
        let blocks = blocks
            .map(|(index, block)| block.map(|(id, length)| WriteBlock::new(writing, index, id, length)));
        Ok(blocks.collect())
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
        let writing = self.writing.here()?;
        let indexes = writing.pick(indexes)?;
        writing.freeze(&indexes)?;
        let call = Arc::clone(writing).seal(indexes, durability);
        self.engine.run(py, self.mode, call, |py, outcomes| {
            let words: Vec<&str> = outcomes.into_iter().map(seal_word).collect();
            Ok(words.into_pyobject(py)?.unbind())
        })
    }

    /// Gives frames back unwritten; answers how many.
    #[pyo3(signature = (indexes=None))]
    fn abort<'py>(&self, py: Python<'py>, indexes: Option<Vec<u32>>) -> PyResult<Bound<'py, PyAny>> {
        let writing = self.writing.here()?;
        let mut indexes = writing.pick(indexes)?;
        let table = writing.table();
        indexes.retain(|index| matches!(table.frames.get(*index as usize), Some(Frame::Writable { .. })));
        drop(table);
        writing.mark(&indexes, |_, _| Frame::Aborted);
        let call = Arc::clone(writing).abort(indexes);
        self.engine.run(py, self.mode, call, |py, aborted| Ok(aborted.into_pyobject(py)?.into_any().unbind()))
    }

    /// A reading block of one that this lease has sealed.
    fn reader(&self, index: usize) -> PyResult<Block> {
        let mut table = self.writing.here()?.table();
        if table.closed {
            return Err(closed("write lease"));
        }
        let held = match table.frames.get_mut(index) {
            Some(Frame::Sealed { source: Some(source), readers }) => {
                let held = Held::new(source.clone());
                readers.retain(|reader| reader.strong_count() > 0);
                readers.push(Arc::downgrade(&held));
                held
            }
            Some(
                Frame::NotGranted
                | Frame::Writable { .. }
                | Frame::Sealing { .. }
                | Frame::Sealed { source: None, .. }
                | Frame::Aborted,
            )
            | None => return Err(invalid(format!("block {index} of this lease was not sealed"))),
        };
        drop(table);
        Block::new(&held)
    }

    /// Gives back what was not sealed and unpins the rest, once no writable view is left.
    fn close(&self) -> PyResult<()> {
        self.writing.here()?.close();
        Ok(())
    }

    /// As `close`, and waits until the daemon knows.
    fn release<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let writing = self.writing.here()?;
        let views = writing.table().frames.iter().map(Frame::views).sum();
        refuse_views(views)?;
        // A call that runs keeps the lease until it ends; the release waits for it.
        let mut table = writing.table();
        table.closed = true;
        let frames = std::mem::take(&mut table.frames);
        drop(table);
        drop(frames);
        let call = Arc::clone(writing).release();
        self.engine.run(py, self.mode, call, |py, ()| Ok(py.None()))
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().writing.here()?;
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
        PyList::new(py, self.blocks()?)?.try_iter()
    }

    fn __repr__(&self) -> String {
        format!("WriteLease(id={:?}, blocks={})", self.id, self.__len__())
    }
}
