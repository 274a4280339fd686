//! Threads that copy for whoever calls.
//!
//! One thread gets a part only of what a machine's memory gives. Whoever has much to copy shares it with threads that wait
//! here for the next call: one that had to be started came too late for most of them.

use std::any::Any;
use std::hint;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, Thread};

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

use crate::copy::drain;
use crate::processor::take_short_turns;

/// Threads of one call, the caller's own among them.
pub const COPY_THREADS_MAX: usize = 8;
/// Looks before waiting: the last copy of another thread takes less than it costs to be woken.
const SPINS: usize = 2000;

static CREW: Mutex<Crew> = Mutex::new(Crew { process: 0, mates: Vec::new() });

/// Calls `each` once for every item, on this thread and on up to `threads - 1` others, at most [`COPY_THREADS_MAX`] in all.
/// When it returns, every call has ended, and what they copied past the cache is whole.
///
/// # Panics
/// If a call does, once the others have ended.
pub fn share<T: Send>(items: &mut [T], threads: usize, each: impl Fn(&mut T) + Sync) {
    let others = threads.min(COPY_THREADS_MAX).min(items.len()).saturating_sub(1);
    if others == 0 {
        items.iter_mut().for_each(each);
        return drain();
    }
    let (start, count) = (Start(items.as_mut_ptr()), items.len());
    let one = |at: usize| {
        // SAFETY: `Work` hands out each place below `count` once, and nobody else reaches the items until we return.
        each(unsafe { &mut *start.item(at) });
    };
    let one: *const (dyn Fn(usize) + Sync + '_) = &raw const one;
    // SAFETY: the two types differ in how long what is called lives. `Work::run` alone calls it, for places that are left, and
    // `waits` keeps this function from ending, however it does, before the last such call has ended.
    let one = unsafe {
        std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
            one,
        )
    };
    let work = Arc::new(Work {
        one,
        count,
        next: AtomicUsize::new(0),
        left: AtomicUsize::new(count),
        panicked: Mutex::new(None),
        caller: thread::current(),
    });
    let waits = Waits(&work);
    call(&work, others);
    work.run();
    drop(waits);
    let panicked = lock(&work.panicked).take();
    if let Some(panicked) = panicked {
        resume_unwind(panicked);
    }
}

/// Where items begin that several threads are handed, each to one.
struct Start<T>(*mut T);

// SAFETY: it gives out addresses; whoever follows one says why he alone may. Items go to other threads, and are `Send`.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    // A method, so that closures take the whole and not the pointer alone.
    fn item(&self, at: usize) -> *mut T {
        self.0.wrapping_add(at)
    }
}

/// Threads of this process.
struct Crew {
    process: u32,
    mates: Vec<Mate>,
}

struct Mate {
    thread: Pid,
    orders: mpsc::Sender<Arc<Work>>,
}

/// Asks so many others to help. Where there is no thread to be had, the rest do it.
fn call(work: &Arc<Work>, others: usize) {
    // A fork may have fallen into somebody's turn, which then never ends in the child: nobody waits for it.
    let Ok(mut crew) = CREW.try_lock() else { return };
    let process = std::process::id();
    if crew.process != process {
        // The parent's threads are not here, nor are they told that we forget them.
        std::mem::forget(std::mem::take(&mut crew.mates));
        crew.process = process;
    }
    while crew.mates.len() < others
        && let Some(mate) = Mate::start()
    {
        crew.mates.push(mate);
    }
    let elsewhere = processors_but_this();
    for mate in crew.mates.iter().take(others) {
        // Where all processors are busy, the kernel would put it behind its caller on this one.
        if let Some(elsewhere) = &elsewhere {
            let _refused = sched_setaffinity(Some(mate.thread), elsewhere);
        }
        let _ended = mate.orders.send(Arc::clone(work));
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

/// Items that several threads share. A thread takes the next one that nobody has: one that gets its processor late
/// leaves the rest to the others, and one that gets it too late finds none, and nobody waits for it.
struct Work {
    /// Lives until the last place was done.
    one: *const (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    /// Items that are not done.
    left: AtomicUsize,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    /// Who waits for the last of them.
    caller: Thread,
}

// SAFETY: what is called may be called by several threads at once; when, `run` says.
unsafe impl Send for Work {}
// SAFETY: as above.
unsafe impl Sync for Work {}

impl Work {
    fn run(&self) {
        loop {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            if at >= self.count {
                break;
            }
            let _ended = Ended(self);
            // SAFETY: this place is left, so that what is called lives still.
            let done = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.one)(at) }));
            if let Err(panicked) = done {
                lock(&self.panicked).get_or_insert(panicked);
            }
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

/// Counts an item as done, whatever became of it.
struct Ended<'work>(&'work Work);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // What was stored before is seen by whoever sees the count, past the cache as well.
        drain();
        if self.0.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.caller.unpark();
        }
    }
}

/// Returns only once every item is done.
struct Waits<'work>(&'work Work);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;

    use super::*;

    /// Two calls that wait for each other are on two threads.
    fn two_threads_meet() {
        let meet = Barrier::new(2);
        let mut items = [None; 2];
        share(&mut items, 2, |item| {
            meet.wait();
            *item = Some(thread::current().id());
        });
        assert_eq!(items.into_iter().flatten().collect::<HashSet<_>>().len(), 2);
    }

    // An item that is left out is a block that was not copied, and one that is done twice a target with two writers. A
    // thread that ended by a panic would leave its caller waiting, and the next ones without it.
    #[test]
    fn every_item_is_done_once_and_a_panic_is_the_callers() {
        for threads in [0, 1, 2, 3, COPY_THREADS_MAX + 1] {
            for length in [0, 1, 2, 1000] {
                let mut items = vec![0u32; length];
                share(&mut items, threads, |item| *item += 1);
                assert!(items.iter().all(|item| *item == 1), "{length} items by {threads} threads");
            }
        }
        two_threads_meet();
        for _ in 0..20 {
            let mut items = [0, 1, 2, 3];
            let broken = catch_unwind(AssertUnwindSafe(|| {
                share(&mut items, 2, |item| assert_ne!(*item, 2, "the third"));
            }));
            assert!(broken.is_err());
        }
        two_threads_meet();
    }
}
