//! The threads behind the package, and the two ways of waiting for a call.
//!
//! One tokio runtime a process carries every session. A blocking call runs on
//! its caller's thread with the interpreter released. An asyncio call runs on
//! the runtime; a thread of its own hands results to event loops, so that a
//! program that holds the interpreter for long cannot keep leases from renewing.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;

use crate::errors::{ConnectError, Failure, SessionEnded};

/// How often a blocking call looks for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);
/// How long the end of the interpreter waits for calls that still run.
const STOP_WAIT_MAX: Duration = Duration::from_secs(1);
/// One copies while the other renews leases.
const THREADS: usize = 2;

static CURRENT: Mutex<Option<Arc<Engine>>> = Mutex::new(None);

/// The runtime of this process.
#[derive(Debug)]
pub(crate) struct Engine {
    process: u32,
    // Read-locked by whoever uses it, for a signal interval at most.
    running: RwLock<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    runtime: Runtime,
    deliveries: mpsc::Sender<Delivery>,
    courier: JoinHandle<()>,
}

/// How a caller waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// On its thread.
    Blocking,
    /// In an asyncio event loop.
    Asyncio,
}

/// Makes a result what Python sees.
type Convert = dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send;

/// A result on its way into an event loop.
struct Delivery {
    event_loop: Py<PyAny>,
    future: Py<PyAny>,
    outcome: Box<Convert>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// The engine of this process, started if there is none.
    pub(crate) fn current(py: Python<'_>) -> PyResult<Arc<Self>> {
        // Locked only with the interpreter held, so that no fork falls into it.
        let mut current = lock(&CURRENT);
        if let Some(engine) = current.as_ref().filter(|engine| engine.process == std::process::id()) {
            return Ok(Arc::clone(engine));
        }
        // The parent's threads are not here: its engine can be neither used nor dropped.
        std::mem::forget(current.take());
        let engine = Arc::new(Self::start(py)?);
        *current = Some(Arc::clone(&engine));
        Ok(engine)
    }

    fn start(py: Python<'_>) -> PyResult<Self> {
        let refused = |error: std::io::Error| {
            ConnectError::new_err(format!("the client's threads cannot be started: {error}"))
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("terrace-client")
            .enable_all()
            .build()
            .map_err(refused)?;
        let (deliveries, queue) = mpsc::channel();
        let courier = std::thread::Builder::new()
            .name("terrace-courier".to_owned())
            .spawn(move || deliver(&queue))
            .map_err(refused)?;
        // Before the interpreter goes, or a thread would call into what is gone.
        let stop = py.import("terrace_kv._native")?.getattr("_stop")?;
        py.import("atexit")?.call_method1("register", (stop,))?;
        let running = RwLock::new(Some(Running { runtime, deliveries, courier }));
        Ok(Self { process: std::process::id(), running })
    }

    /// Waits for a call in the caller's way and answers with its result or an
    /// asyncio future of it. A call that is interrupted or cancelled is dropped.
    pub(crate) fn run<'py, T, C>(
        &self,
        py: Python<'py>,
        mode: Mode,
        call: impl Future<Output = Result<T, Failure>> + Send + 'static,
        convert: C,
    ) -> PyResult<Bound<'py, PyAny>>
    where
        T: Send + 'static,
        C: FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    {
        match mode {
            Mode::Blocking => Ok(convert(py, self.block_on(py, call)?)?.into_bound(py)),
            Mode::Asyncio => self.promise(py, call, convert),
        }
    }

    /// Waits on the caller's thread, with the interpreter released. What is interrupted is dropped.
    pub(crate) fn block_on<T: Send>(
        &self,
        py: Python<'_>,
        call: impl Future<Output = Result<T, Failure>> + Send,
    ) -> PyResult<T> {
        let mut call = pin!(call);
        loop {
            let waited = py.detach(|| {
                let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
                let slice = async { tokio::time::timeout(SIGNAL_INTERVAL, call.as_mut()).await };
                running.as_ref().map(|running| running.runtime.block_on(slice))
            });
            match waited {
                Some(Ok(outcome)) => return outcome.map_err(PyErr::from),
                Some(Err(_)) => py.check_signals()?,
                None => return Err(stopped()),
            }
        }
    }

    fn promise<'py, T, C>(
        &self,
        py: Python<'py>,
        call: impl Future<Output = Result<T, Failure>> + Send + 'static,
        convert: C,
    ) -> PyResult<Bound<'py, PyAny>>
    where
        T: Send + 'static,
        C: FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    {
        let event_loop = running_loop(py)?;
        let future = event_loop.call_method0("create_future")?;
        let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
        let Some(running) = running.as_ref() else {
            return Err(stopped());
        };
        let deliveries = running.deliveries.clone();
        let (event_loop, target) = (event_loop.unbind(), future.clone().unbind());
        let task = running.runtime.spawn(async move {
            let outcome = call.await;
            let outcome = Box::new(move |py: Python<'_>| convert(py, outcome?));
            // Nobody receives once the interpreter ends.
            let _ended = deliveries.send(Delivery { event_loop, future: target, outcome });
        });
        future.call_method1("add_done_callback", (Canceller { task: task.abort_handle() },))?;
        Ok(future)
    }
}

fn stopped() -> PyErr {
    SessionEnded::new_err("the interpreter is ending; no further calls")
}

fn running_loop(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static RUNNING_LOOP: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    RUNNING_LOOP.import(py, "asyncio", "get_running_loop")?.call0()
}

/// An asyncio future that is done already.
pub(crate) fn done<'py>(py: Python<'py>, value: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let future = running_loop(py)?.call_method0("create_future")?;
    future.call_method1("set_result", (value,))?;
    Ok(future)
}

/// The courier: the one thread of ours that calls into Python.
fn deliver(queue: &mpsc::Receiver<Delivery>) {
    while let Ok(first) = queue.recv() {
        let attached = Python::try_attach(|py| {
            first.hand_over(py);
            while let Ok(next) = queue.try_recv() {
                next.hand_over(py);
            }
        });
        if attached.is_none() {
            return;
        }
    }
}

impl Delivery {
    fn hand_over(self, py: Python<'_>) {
        static RESOLVE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let (value, error) = match (self.outcome)(py) {
            Ok(value) => (value, py.None()),
            Err(error) => (py.None(), error.into_value(py).into_any()),
        };
        let handed = RESOLVE.import(py, "terrace_kv._resolve", "resolve").and_then(|resolve| {
            let arguments = (resolve, self.future, value, error);
            self.event_loop.bind(py).call_method1("call_soon_threadsafe", arguments)
        });
        // A loop that was closed has nobody who waits.
        drop(handed);
    }
}

/// Ends a call whose asyncio future was cancelled.
#[pyclass(frozen, module = "terrace_kv._native")]
struct Canceller {
    task: AbortHandle,
}

#[pymethods]
impl Canceller {
    fn __call__(&self, future: &Bound<'_, PyAny>) -> PyResult<()> {
        if future.call_method0("cancelled")?.is_truthy()? {
            self.task.abort();
        }
        Ok(())
    }
}

/// Stops the threads. The interpreter calls it at its end.
#[pyfunction(name = "_stop")]
pub(crate) fn stop(py: Python<'_>) {
    let engine = lock(&CURRENT).clone().filter(|engine| engine.process == std::process::id());
    let Some(engine) = engine else {
        return;
    };
    py.detach(|| {
        // Waits for the calls of threads that the interpreter does not wait for.
        let running = engine.running.write().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Running { runtime, deliveries, courier }) = running else {
            return;
        };
        drop(deliveries);
        runtime.shutdown_timeout(STOP_WAIT_MAX);
        // Every sender went with the runtime; what is queued is still handed over.
        let _panicked = courier.join();
    });
}
