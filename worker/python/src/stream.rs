//! Streams of events and of a snapshot, as iterators.

use std::sync::Arc;

use pyo3::exceptions::{PyStopAsyncIteration, PyStopIteration};
use pyo3::prelude::*;
use pyo3::types::PyType;
use tokio::sync::Mutex;

use terrace_client::{ClientError, EventStream, SnapshotStream};

use crate::errors::Failure;
use crate::owned::Owned;
use crate::results::{Events, SnapshotPart};
use crate::runtime::{Engine, Mode};

/// What a stream yields from.
#[derive(Debug)]
pub(crate) enum Feed {
    Events(EventStream),
    Snapshot(SnapshotStream),
}

enum Item {
    Events(Events),
    Snapshot(SnapshotPart),
}

impl Feed {
    async fn next(&mut self) -> Result<Option<Item>, ClientError> {
        match self {
            Self::Events(stream) => Ok(stream.next().await?.map(|run| Item::Events(run.into()))),
            Self::Snapshot(stream) => Ok(stream.next().await?.map(|part| Item::Snapshot(part.into()))),
        }
    }
}

/// An iterator over a stream; see the package's stubs.
#[pyclass(frozen, subclass, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct Stream {
    // Empty once closed.
    feed: Owned<Arc<Mutex<Option<Feed>>>>,
    engine: Arc<Engine>,
}

/// The same as an asynchronous iterator.
#[pyclass(frozen, extends = Stream, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct AsyncStream;

impl Stream {
    pub(crate) fn wrap(py: Python<'_>, feed: Feed, engine: Arc<Engine>, mode: Mode) -> PyResult<Py<PyAny>> {
        let base =
            PyClassInitializer::from(Self { feed: Owned::new(Arc::new(Mutex::new(Some(feed)))), engine });
        match mode {
            Mode::Blocking => Ok(Py::new(py, base)?.into_any()),
            Mode::Asyncio => Ok(Py::new(py, base.add_subclass(AsyncStream))?.into_any()),
        }
    }

    fn next<'py>(&self, py: Python<'py>, mode: Mode) -> PyResult<Bound<'py, PyAny>> {
        let feed = Arc::clone(self.feed.here()?);
        let call = async move {
            match &mut *feed.lock().await {
                Some(feed) => feed.next().await.map_err(Failure::from),
                None => Ok(None),
            }
        };
        self.engine.run(py, mode, call, move |py, item| match item {
            Some(Item::Events(run)) => Ok(Py::new(py, run)?.into_any()),
            Some(Item::Snapshot(part)) => Ok(Py::new(py, part)?.into_any()),
            None => match mode {
                Mode::Blocking => Err(PyStopIteration::new_err(())),
                Mode::Asyncio => Err(PyStopAsyncIteration::new_err(())),
            },
        })
    }
}

#[pymethods]
impl Stream {
    /// Ends the stream, once no `next` of it is waiting.
    fn close(&self) -> PyResult<()> {
        if let Ok(mut feed) = self.feed.here()?.try_lock() {
            feed.take();
        }
        Ok(())
    }

    // Lets annotations say what is yielded.
    #[classmethod]
    fn __class_getitem__<'py>(class: &Bound<'py, PyType>, _item: &Bound<'py, PyAny>) -> Bound<'py, PyType> {
        class.clone()
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.next(py, Mode::Blocking)
    }
}

#[pymethods]
impl AsyncStream {
    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.as_super().get().next(slf.py(), Mode::Asyncio)
    }
}
