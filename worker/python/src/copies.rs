//! Many blocks copied in one call, with the interpreter released once, by more than one thread if there is much.
//!
//! Promises: every copy was compared with its block's checksum; nobody writes where two targets overlap at once.
//!
//! The other threads wait here for the next call: one that had to be started came too late for most of them.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, Thread};

use pyo3::prelude::*;
use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

use crate::block::{Block, Copy, Way, take_short_turns};
use crate::errors::invalid;
use crate::span::Span;

/// Below this a second thread costs more than it saves.
const PARALLEL_BYTES_MIN: usize = 4 << 20;
/// Up to here the targets of one call are still in the last cache when somebody looks at them, and often before: 29 GiB/s
/// into what is there, by two threads 36, on Zen 5, where past the cache both have 25 to 27.
const CACHED_BYTES_MAX: usize = 8 << 20;
const THREADS_MAX: usize = 8;
/// Looks before waiting: the last copy of another thread takes less than it costs to be woken.
const SPINS: usize = 2000;

static CREW: Mutex<Option<Arc<Crew>>> = Mutex::new(None);

/// Copies each block into its target; answers which copies are the block. See the package's stubs.
#[pyfunction]
#[pyo3(signature = (blocks, targets, *, threads=1))]
pub(crate) fn copy_blocks(
    py: Python<'_>,
    blocks: Vec<Bound<'_, Block>>,
    targets: Vec<Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<Vec<bool>> {
    if blocks.len() != targets.len() {
        return Err(invalid(format!("{} blocks and {} targets", blocks.len(), targets.len())));
    }
    let spans = targets.iter().map(Span::of_pieces).collect::<PyResult<Vec<_>>>()?;
    let pairs = blocks.iter().zip(&spans);
    let copies = pairs.map(|(block, span)| Copy::new(block.get(), span)).collect::<PyResult<Vec<_>>>()?;
    let threads = threads.clamp(1, THREADS_MAX).min(copies.len());
    let bytes: usize = copies.iter().map(Copy::bytes).sum();
    let way = if bytes <= CACHED_BYTES_MAX { Way::ThroughTheCache } else { Way::ByLength };
    let copies: Vec<_> = copies.into_iter().map(|copy| copy.by(way)).collect();
    if threads < 2 || bytes < PARALLEL_BYTES_MIN || overlap(&copies) {
        return Ok(py.detach(|| copies.iter().map(Copy::run).collect()));
    }
    // Taken with the interpreter held, so that no fork falls into it.
    let crew = Crew::current();
    Ok(py.detach(|| crew.copy_all(copies, threads)))
}

/// Maps the pages of blocks, so that whoever reads them soon need not wait for it. See the package's stubs.
#[pyfunction]
pub(crate) fn map_blocks(py: Python<'_>, blocks: Vec<Bound<'_, Block>>) -> PyResult<()> {
    let held = blocks.iter().map(|block| block.get().held()).collect::<PyResult<Vec<_>>>()?;
    py.detach(|| held.iter().for_each(|held| Block::map_ahead(held)));
    Ok(())
}

fn overlap(copies: &[Copy<'_>]) -> bool {
    let mut places: Vec<_> = copies.iter().map(Copy::place).collect();
    places.sort_unstable_by_key(|place| place.start);
    places.windows(2).any(|two| two[0].end > two[1].start)
}

/// Threads of this process that copy for whoever calls.
struct Crew {
    process: u32,
    mates: Mutex<Vec<Mate>>,
}

struct Mate {
    thread: Pid,
    orders: mpsc::Sender<Arc<Work>>,
}

impl Crew {
    fn current() -> Arc<Self> {
        let mut current = lock(&CREW);
        if let Some(crew) = current.as_ref().filter(|crew| crew.process == std::process::id()) {
            return Arc::clone(crew);
        }
        // The parent's threads are not here.
        std::mem::forget(current.take());
        let crew = Arc::new(Self { process: std::process::id(), mates: Mutex::default() });
        *current = Some(Arc::clone(&crew));
        crew
    }

    /// Runs copies, whose targets do not overlap, on this thread and others; answers which are the block.
    fn copy_all(&self, copies: Vec<Copy<'_>>, threads: usize) -> Vec<bool> {
        // Their spans are held by our caller; this function ends, however it does, after the last copy, and none
        // begins after that.
        let work = Arc::new(Work {
            good: copies.iter().map(|_| AtomicBool::new(false)).collect(),
            next: AtomicUsize::new(0),
            left: AtomicUsize::new(copies.len()),
            caller: thread::current(),
            copies: copies.into_iter().map(Copy::unbound).collect(),
        });
        let waits = Waits(&work);
        self.call(&work, threads - 1);
        work.run();
        drop(waits);
        work.good.iter().map(|good| good.load(Ordering::Relaxed)).collect()
    }

    /// Asks so many others to help. Where there is no thread to be had, the rest do it.
    fn call(&self, work: &Arc<Work>, others: usize) {
        let elsewhere = processors_but_this();
        let mut mates = lock(&self.mates);
        while mates.len() < others
            && let Some(mate) = Mate::start()
        {
            mates.push(mate);
        }
        for mate in mates.iter().take(others) {
            // Where all processors are busy, the kernel would put it behind its caller on this one.
            if let Some(elsewhere) = &elsewhere {
                let _refused = sched_setaffinity(Some(mate.thread), elsewhere);
            }
            let _ended = mate.orders.send(Arc::clone(work));
        }
    }
}

impl Mate {
    fn start() -> Option<Self> {
        let (orders, taken) = mpsc::channel::<Arc<Work>>();
        let (tell, told) = mpsc::channel();
        let body = move || {
            take_short_turns();
            let _gone = tell.send(gettid());
            while let Ok(work) = taken.recv() {
                work.run();
            }
        };
        thread::Builder::new().name("terrace-copy".into()).spawn(body).ok()?;
        Some(Self { thread: told.recv().ok()?, orders })
    }
}

/// Where the caller may run, without the processor that it runs on; `None` where that is none.
fn processors_but_this() -> Option<CpuSet> {
    let mut set = sched_getaffinity(None).ok()?;
    let this = sched_getcpu();
    if this >= CpuSet::MAX_CPU {
        return None;
    }
    set.unset(this);
    (set.count() > 0).then_some(set)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

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
