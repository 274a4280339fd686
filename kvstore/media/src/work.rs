//! A small pool of threads for what costs CPU and follows no I/O: copies, and
//! checksums of what clients wrote. Its queue is as long as the core lets operations be in flight.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

pub(crate) type Task = Box<dyn FnOnce() + Send>;

struct Shared {
    queue: Mutex<(VecDeque<Task>, bool)>,
    wake: Condvar,
}

/// Hands tasks to the pool.
#[derive(Clone)]
pub(crate) struct Workers(Arc<Shared>);

impl Workers {
    /// Starts the pool. The threads end after [`Self::stop`].
    pub(crate) fn start(threads: u32) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        let workers =
            Self(Arc::new(Shared { queue: Mutex::new((VecDeque::new(), false)), wake: Condvar::new() }));
        let mut handles = Vec::new();
        for _ in 0..threads.max(1) {
            let shared = Arc::clone(&workers.0);
            let run = move || {
                while let Some(task) = take(&shared) {
                    task();
                }
            };
            handles.push(std::thread::Builder::new().name("media-check".to_owned()).spawn(run)?);
        }
        Ok((workers, handles))
    }

    /// Queues a task; after [`Self::stop`] it is done at once, by the caller.
    pub(crate) fn push(&self, task: Task) {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.1 {
            drop(queue);
            return task();
        }
        queue.0.push_back(task);
        self.0.wake.notify_one();
    }

    /// What is queued is still done.
    pub(crate) fn stop(&self) {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.0.wake.notify_all();
    }
}

fn take(shared: &Shared) -> Option<Task> {
    let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(task) = queue.0.pop_front() {
            return Some(task);
        }
        if queue.1 {
            return None;
        }
        queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}
