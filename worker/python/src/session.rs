//! Sessions: the calls of the client, blocking or for asyncio.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyList;

use terrace_client::{
    ClientError, ComputeCost, GetOptions, ReadOptions, Session as Client, Space as ClientSpace, Target,
    Transport, Verify, WriteOptions,
};

use terrace_core::ByteCount;

use crate::arguments::{Keys, Manifest, Payload, durability, match_mode, purpose, span};
use crate::block::Block;
use crate::device::{Device, Layout};
use crate::errors::{Failure, invalid};
use crate::lease::{ReadLease, WriteLease};
use crate::on_device::{DeviceReadLease, DeviceWriteLease, Terms, without_host_frames};
use crate::owned::Owned;
use crate::results::{Match, Prefetched, seal_word};
use crate::runtime::{Engine, Mode, done};
use crate::space::Space;
use crate::span::{Filled, Span, overlap};
use crate::stream::{Feed, Stream};

/// What blocking and asyncio sessions have in common; see the package's stubs.
#[pyclass(frozen, subclass, module = "terrace_kv._native")]
#[derive(Debug)]
pub(crate) struct Calls {
    session: Owned<Client>,
    engine: Arc<Engine>,
    mode: Mode,
}

/// A session whose calls block.
#[pyclass(frozen, extends = Calls, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct Session;

/// A session whose calls answer with asyncio futures.
#[pyclass(frozen, extends = Calls, module = "terrace_kv")]
#[derive(Debug)]
pub(crate) struct AsyncSession;

fn target(
    socket: Option<PathBuf>,
    grpc: Option<String>,
    tenant: String,
    token: String,
    client_name: Option<String>,
    (answer_within, copy_threads): (Option<f64>, Option<NonZero<usize>>),
) -> PyResult<Target> {
    let client_name = client_name.unwrap_or_else(|| format!("python pid {}", std::process::id()));
    let answer_within = answer_within.map(|seconds| span("answer_within", seconds)).transpose()?;
    Ok(Target { socket, grpc, tenant, token, client_name, answer_within, copy_threads })
}

fn open<'py>(py: Python<'py>, mode: Mode, target: Target) -> PyResult<Bound<'py, PyAny>> {
    let engine = Engine::current(py)?;
    let own = Arc::clone(&engine);
    let call = async move { Ok(Client::connect(&target).await?) };
    engine.run(py, mode, call, move |py, session| {
        let base = PyClassInitializer::from(Calls { session: Owned::new(session), engine: own, mode });
        match mode {
            Mode::Blocking => Ok(Py::new(py, base.add_subclass(Session))?.into_any()),
            Mode::Asyncio => Ok(Py::new(py, base.add_subclass(AsyncSession))?.into_any()),
        }
    })
}

/// Opens a session, over the socket if one is named and somebody answers there, else over gRPC.
#[pyfunction]
#[pyo3(signature = (
    socket=None, grpc=None, *, tenant=String::new(), token=String::new(), client_name=None, answer_within=None,
    copy_threads=None
))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn connect<'py>(
    py: Python<'py>,
    socket: Option<PathBuf>,
    grpc: Option<String>,
    tenant: String,
    token: String,
    client_name: Option<String>,
    answer_within: Option<f64>,
    copy_threads: Option<NonZero<usize>>,
) -> PyResult<Bound<'py, PyAny>> {
    open(py, Mode::Blocking, target(socket, grpc, tenant, token, client_name, (answer_within, copy_threads))?)
}

/// As `connect`, for asyncio.
#[pyfunction]
#[pyo3(signature = (
    socket=None, grpc=None, *, tenant=String::new(), token=String::new(), client_name=None, answer_within=None,
    copy_threads=None
))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn connect_async<'py>(
    py: Python<'py>,
    socket: Option<PathBuf>,
    grpc: Option<String>,
    tenant: String,
    token: String,
    client_name: Option<String>,
    answer_within: Option<f64>,
    copy_threads: Option<NonZero<usize>>,
) -> PyResult<Bound<'py, PyAny>> {
    open(py, Mode::Asyncio, target(socket, grpc, tenant, token, client_name, (answer_within, copy_threads))?)
}

/// One space, or the spaces of a bundle.
#[derive(FromPyObject)]
enum Spaces<'py> {
    One(Bound<'py, Space>),
    Many(Vec<Bound<'py, Space>>),
}

impl Spaces<'_> {
    fn cloned(&self) -> Vec<ClientSpace> {
        match self {
            Self::One(space) => vec![space.get().space.clone()],
            Self::Many(spaces) => spaces.iter().map(|space| space.get().space.clone()).collect(),
        }
    }
}

fn number(py: Python<'_>, value: impl Into<u64>) -> PyResult<Py<PyAny>> {
    Ok(value.into().into_pyobject(py)?.into_any().unbind())
}

impl Calls {
    fn terms(&self, dtype: &str, shape: Option<Vec<i64>>) -> PyResult<Terms> {
        Ok(Terms { layout: Layout::new(dtype, shape)?, engine: Arc::clone(&self.engine), mode: self.mode })
    }
}

#[pymethods]
impl Calls {
    /// Life of the daemon; another number means that it was started again.
    #[getter]
    fn incarnation(&self) -> PyResult<u64> {
        Ok(self.session.here()?.incarnation())
    }

    /// Most keys in one request.
    #[getter]
    fn blocks_max(&self) -> PyResult<usize> {
        Ok(self.session.here()?.blocks_max())
    }

    /// "lane" (blocks are mapped) or "grpc" (blocks are copied).
    #[getter]
    fn transport(&self) -> PyResult<&'static str> {
        Ok(match self.session.here()?.transport() {
            Transport::Lane => "lane",
            Transport::Grpc => "grpc",
        })
    }

    /// Whether the session has ended: every block is stale and every call fails.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.session.here()?.is_closed())
    }

    /// Ends the session now; every block of it is stale from then on.
    fn close(&self) -> PyResult<()> {
        self.session.here()?.close();
        Ok(())
    }

    /// Opens a space.
    #[pyo3(signature = (manifest, *, compute_cost=None))]
    fn open_space<'py>(
        &self,
        py: Python<'py>,
        manifest: Manifest,
        compute_cost: Option<(f64, f64)>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let session = self.session.here()?.clone();
        let manifest = manifest.checked()?;
        let call = async move {
            let opened = match compute_cost {
                None => session.open_space(&manifest).await,
                Some((first_seconds, slope_seconds)) => {
                    let cost = ComputeCost { first_seconds, slope_seconds };
                    session.open_space_with_cost(&manifest, cost).await
                }
            };
            Ok(opened?)
        };
        self.engine.run(py, self.mode, call, |py, space| Ok(Py::new(py, Space { space })?.into_any()))
    }

    /// Which keys are there: `(prefix, [bool, ...])`.
    #[pyo3(signature = (spaces, keys, *, mode="prefix", within=None))]
    fn exists<'py>(
        &self,
        py: Python<'py>,
        spaces: Spaces<'py>,
        keys: Keys,
        mode: &str,
        within: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, spaces, mode) = (self.session.here()?.clone(), spaces.cloned(), match_mode(mode)?);
        let within = within.map(|seconds| span("within", seconds)).transpose()?;
        let call = async move {
            let spaces: Vec<&ClientSpace> = spaces.iter().collect();
            let asked = session.exists(&spaces, &keys, mode);
            let Some(within) = within else { return Ok(asked.await?) };
            let late = |_| ClientError::NoAnswer { waited: within };
            Ok(tokio::time::timeout(within, asked).await.map_err(late)??)
        };
        self.engine.run(py, self.mode, call, |py, found| Ok(found.into_pyobject(py)?.into_any().unbind()))
    }

    /// Which keys are there, where, and how soon they could be read.
    #[pyo3(signature = (spaces, keys, *, mode="prefix"))]
    fn match_blocks<'py>(
        &self,
        py: Python<'py>,
        spaces: Spaces<'py>,
        keys: Keys,
        mode: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, spaces, mode) = (self.session.here()?.clone(), spaces.cloned(), match_mode(mode)?);
        let call = async move {
            let spaces: Vec<&ClientSpace> = spaces.iter().collect();
            Ok(session.match_blocks(&spaces, &keys, mode).await?)
        };
        self.engine.run(py, self.mode, call, |py, found| Ok(Py::new(py, Match::from(found))?.into_any()))
    }

    /// Pins blocks for reading in place.
    #[pyo3(signature = (space, keys, *, wait=0.0, ttl=None, purpose="prefill"))]
    fn lease_read<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
        wait: f64,
        ttl: Option<f64>,
        purpose: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let ttl = ttl.map(|ttl| span("ttl", ttl)).transpose()?;
        let options = ReadOptions { ttl, wait: span("wait", wait)?, purpose: self::purpose(purpose)? };
        let (engine, mode) = (Arc::clone(&self.engine), self.mode);
        let call = async move { Ok(session.lease_read(&space, &keys, options).await?) };
        self.engine.run(py, mode, call, move |py, lease| ReadLease::wrap(py, lease, engine, mode))
    }

    /// Reserves frames for blocks, each the child of the one before it.
    #[pyo3(signature = (space, keys, *, parent=None, wait=0.0, ttl=None))]
    fn lease_write<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
        parent: Option<PyBackedBytes>,
        wait: f64,
        ttl: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let ttl = ttl.map(|ttl| span("ttl", ttl)).transpose()?;
        let options = WriteOptions { ttl, wait: span("wait", wait)? };
        let (engine, mode) = (Arc::clone(&self.engine), self.mode);
        let call = async move { Ok(session.lease_write(&space, &keys, parent.as_deref(), options).await?) };
        self.engine.run(py, mode, call, move |py, lease| WriteLease::wrap(py, lease, engine, mode))
    }

    /// Pins blocks for reading in the daemon's memory on a device.
    #[pyo3(signature = (device, space, keys, *, wait=0.0, ttl=None, purpose="prefill", dtype="uint8", shape=None))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn lease_read_on<'py>(
        &self,
        py: Python<'py>,
        device: &Bound<'py, Device>,
        space: &Bound<'py, Space>,
        keys: Keys,
        wait: f64,
        ttl: Option<f64>,
        purpose: &str,
        dtype: &str,
        shape: Option<Vec<i64>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let ttl = ttl.map(|ttl| span("ttl", ttl)).transpose()?;
        let options = ReadOptions { ttl, wait: span("wait", wait)?, purpose: self::purpose(purpose)? };
        let terms = self.terms(dtype, shape)?;
        let memory = device.get().memory()?;
        let call = async move {
            let number = session.add_device(memory)?;
            Ok(session.lease_read_on(number, &space, &keys, options).await?)
        };
        self.engine.run(py, self.mode, call, move |py, lease| DeviceReadLease::wrap(py, lease, &terms))
    }

    /// Reserves frames for blocks in the daemon's memory on a device, each the child of the one before it.
    #[pyo3(signature = (device, space, keys, *, parent=None, wait=0.0, ttl=None, dtype="uint8", shape=None))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn lease_write_on<'py>(
        &self,
        py: Python<'py>,
        device: &Bound<'py, Device>,
        space: &Bound<'py, Space>,
        keys: Keys,
        parent: Option<PyBackedBytes>,
        wait: f64,
        ttl: Option<f64>,
        dtype: &str,
        shape: Option<Vec<i64>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let ttl = ttl.map(|ttl| span("ttl", ttl)).transpose()?;
        let options = WriteOptions { ttl, wait: span("wait", wait)? };
        let terms = self.terms(dtype, shape)?;
        let memory = device.get().memory()?;
        let call = async move {
            let number = session.add_device(memory)?;
            let lease = session.lease_write_on(number, &space, &keys, parent.as_deref(), options).await?;
            Ok(without_host_frames(lease).await?)
        };
        self.engine.run(py, self.mode, call, move |py, lease| DeviceWriteLease::wrap(py, lease, &terms))
    }

    /// Says how many bytes of a device the caller needs in all; answers how many the daemon leaves free.
    #[pyo3(signature = (device, nbytes, *, wait=0.0))]
    fn shrink<'py>(
        &self,
        py: Python<'py>,
        device: &Bound<'py, Device>,
        nbytes: u64,
        wait: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let session = self.session.here()?.clone();
        let (memory, wait) = (device.get().memory()?, span("wait", wait)?);
        let call = async move {
            let number = session.add_device(memory)?;
            Ok(session.shrink(number, ByteCount::new(nbytes), wait).await?.get())
        };
        self.engine.run(py, self.mode, call, number)
    }

    /// Copies blocks out; `None` is a miss.
    #[pyo3(signature = (space, keys, *, wait=5.0))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
        wait: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let wait = span("wait", wait)?;
        let call = async move {
            let found = session.read_within(&space, &keys, wait).await?;
            let ids = keys.iter().map(|key| space.block_id(key));
            Ok(ids.zip(found).collect::<Vec<_>>())
        };
        self.engine.run(py, self.mode, call, |py, found| {
            let blocks = found.into_iter().map(|(id, bytes)| bytes.map(|bytes| Block::copied(id, bytes)));
            let blocks: Vec<Option<Block>> = blocks.map(Option::transpose).collect::<PyResult<_>>()?;
            Ok(PyList::new(py, blocks)?.into_any().unbind())
        })
    }

    /// Copies blocks into buffers, verified; answers which of them were there.
    #[pyo3(signature = (space, keys, targets, *, wait=0.0, purpose="prefill"))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
        targets: Vec<Bound<'py, PyAny>>,
        wait: f64,
        purpose: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let purpose = self::purpose(purpose)?;
        let options = GetOptions { wait: span("wait", wait)?, purpose, verify: Verify::Checksum };
        let spans = targets.iter().map(Span::of).collect::<PyResult<Vec<_>>>()?;
        let filled = spans.iter().map(Filled::new).collect::<PyResult<Vec<_>>>()?;
        if overlap(filled.iter().map(Filled::place)) {
            return Err(invalid("two targets share memory; each block needs its own"));
        }
        // The spans go with the call, and are let go where the interpreter is held.
        let mut filled: Vec<_> = filled.into_iter().map(Filled::unbound).collect();
        let call = async move {
            let outcomes = session.get(&space, &keys, &mut filled, options).await;
            Ok((outcomes, spans))
        };
        self.engine.run(py, self.mode, call, |py, (outcomes, spans)| {
            drop(spans);
            let outcomes = outcomes.map_err(Failure::from)?;
            let copied = outcomes.iter().map(|outcome| outcome.granted().is_some());
            Ok(PyList::new(py, copied)?.into_any().unbind())
        })
    }

    /// Stores and seals blocks, each the child of the one before it.
    #[pyo3(signature = (space, keys, payloads, *, parent=None, durability="readable"))]
    fn write<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
        payloads: Vec<Payload>,
        parent: Option<PyBackedBytes>,
        durability: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let durability = self::durability(durability)?;
        let call =
            async move { Ok(session.write(&space, &keys, parent.as_deref(), &payloads, durability).await?) };
        self.engine.run(py, self.mode, call, |py, outcomes| {
            Ok(PyList::new(py, outcomes.into_iter().map(seal_word))?.into_any().unbind())
        })
    }

    /// Marks blocks as used; answers how many were there.
    fn touch<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let call = async move { Ok(session.touch(&space, &keys).await?) };
        self.engine.run(py, self.mode, call, number)
    }

    /// Starts bringing blocks into memory and does not wait for them.
    fn prefetch<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let call = async move { Ok(session.prefetch(&space, &keys).await?) };
        self.engine.run(py, self.mode, call, |py, done| Ok(Py::new(py, Prefetched::from(done))?.into_any()))
    }

    /// Asks for blocks to be kept for `ttl` seconds; answers for how many there was quota.
    #[pyo3(signature = (space, keys, *, ttl, priority=50))]
    fn retain<'py>(
        &self,
        py: Python<'py>,
        space: &Bound<'py, Space>,
        keys: Keys,
        ttl: f64,
        priority: u8,
    ) -> PyResult<Bound<'py, PyAny>> {
        if priority > 100 {
            return Err(invalid(format!("priority is {priority}; it must be 0 to 100")));
        }
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let ttl = span("ttl", ttl)?;
        let call = async move { Ok(session.retain(&space, &keys, ttl, priority).await?) };
        self.engine.run(py, self.mode, call, number)
    }

    /// Drops every block of a space, durably; answers how many there were.
    fn clear<'py>(&self, py: Python<'py>, space: &Bound<'py, Space>) -> PyResult<Bound<'py, PyAny>> {
        let (session, space) = (self.session.here()?.clone(), space.get().space.clone());
        let call = async move { Ok(session.clear(&space).await?) };
        self.engine.run(py, self.mode, call, number)
    }

    /// Hands back every window that nobody writes into; answers how many the daemon took.
    fn flush_windows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let session = self.session.here()?.clone();
        let call = async move { Ok(session.flush_windows().await?) };
        self.engine.run(py, self.mode, call, number)
    }

    /// Streams what happens to the tenant's blocks, from now on or from a sequence number on.
    #[pyo3(signature = (from_sequence=None))]
    fn watch<'py>(&self, py: Python<'py>, from_sequence: Option<u64>) -> PyResult<Bound<'py, PyAny>> {
        let session = self.session.here()?.clone();
        let (engine, mode) = (Arc::clone(&self.engine), self.mode);
        let call = async move { Ok(session.watch(from_sequence).await?) };
        self.engine
            .run(py, mode, call, move |py, stream| Stream::wrap(py, Feed::Events(stream), engine, mode))
    }

    /// Streams everything the tenant holds at one sequence number.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let session = self.session.here()?.clone();
        let (engine, mode) = (Arc::clone(&self.engine), self.mode);
        let call = async move { Ok(session.snapshot().await?) };
        self.engine
            .run(py, mode, call, move |py, stream| Stream::wrap(py, Feed::Snapshot(stream), engine, mode))
    }

    fn __repr__(&self) -> String {
        match self.session.here() {
            Ok(session) if session.is_closed() => "Session(closed)".to_owned(),
            Ok(session) => {
                format!("Session(transport={:?}, incarnation={})", session.transport(), session.incarnation())
            }
            Err(_) => "Session(of the parent process)".to_owned(),
        }
    }
}

#[pymethods]
impl Session {
    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.as_super().get().session.here()?;
        Ok(slf)
    }

    fn __exit__(
        slf: Bound<'_, Self>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        slf.as_super().get().close()
    }
}

#[pymethods]
impl AsyncSession {
    fn __aenter__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.as_super().get().session.here()?;
        done(slf.py(), slf.clone().into_any())
    }

    fn __aexit__<'py>(
        slf: Bound<'py, Self>,
        _kind: &Bound<'py, PyAny>,
        _error: &Bound<'py, PyAny>,
        _traceback: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.as_super().get().close()?;
        done(slf.py(), slf.py().None().into_bound(slf.py()))
    }
}
