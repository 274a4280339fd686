//! Threads that copy for whoever calls.
//!
//! One thread gets a part only of what a machine's memory gives. Whoever has much to copy shares it with threads that wait
//! here for the next call: one that had to be started came too late for most of them. To wake one takes as long as to copy
//! some hundreds of KiB, so that they stay awake for a moment, and short copies are shared where one follows the other.
//!
//! Where somebody else wants the processors, a thread may lose its own in the middle of a copy, and its caller waits for it for
//! milliseconds. Then nobody is called for a while, which is longer each time that it happens again.

use std::any::Any;
use std::hint;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

use crate::copy::drain;
use crate::processor::take_short_turns;

/// Threads of one call, the caller's own among them.
pub const COPY_THREADS_MAX: usize = 8;
/// Less is one thread's: of a call, and of a block that is copied in parts.
pub const SHARED_BYTES_MIN: usize = 256 << 10;
/// Who copies as much has others woken for it.
const WORTH_WAKING_BYTES: usize = 4 << 20;
/// So has who calls again so soon, and as long as a thread takes for what he copied the last time, however little it is.
const SOON: Duration = Duration::from_micros(100);
/// How long a thread looks for the next call before it sleeps.
const AWAKE_FOR: Duration = Duration::from_micros(50);
/// Looks before waiting: the last copy of another thread mostly takes less than it costs to be woken.
const SPINS: usize = 2000;
/// Who waits for longer than this, and as long as a thread takes for an item, waits for one that lost its processor.
const LATE: Duration = Duration::from_millis(1);
/// How long nobody is called after that: the first time, and at most.
const REST_MIN: Duration = Duration::from_millis(20);
const REST_MAX: Duration = Duration::from_millis(250);
/// So many calls without it, and the next one is the first.
const FORGOTTEN_AFTER: u32 = 100;

static CREW: Mutex<Crew> = Mutex::new(Crew {
    process: 0,
    called: None,
    rests: Rests { until: None, next: REST_MIN, quick: 0 },
    mates: Vec::new(),
});

/// As long as a thread takes to copy so much, or longer.
fn copied_in(bytes: usize) -> Duration {
    const BYTES_PER_NANO: u64 = 4;
    Duration::from_nanos(bytes as u64 / BYTES_PER_NANO)
}

/// Who helps with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Called {
    others: usize,
    /// Those who sleep as well.
    wake: bool,
}

impl Called {
    /// Nobody.
    pub const NONE: Self = Self { others: 0, wake: false };

    /// Those for a call of up to so many threads, the caller's among them and [`COPY_THREADS_MAX`] at most, that copies so
    /// many bytes in all: whoever is awake, or is worth waking.
    pub fn of(threads: usize, bytes: usize) -> Self {
        let most = threads.min(COPY_THREADS_MAX).saturating_sub(1);
        if most == 0 || bytes < SHARED_BYTES_MIN {
            return Self::NONE;
        }
        // A fork may have fallen into somebody's turn, which then never ends in the child: nobody waits for it.
        let Ok(mut crew) = CREW.try_lock() else { return Self::NONE };
        crew.is_of_this_process();
        let now = Instant::now();
        let before = crew.called.replace((now, bytes));
        let again_soon =
            before.is_some_and(|(then, bytes)| now.duration_since(then) < SOON + copied_in(bytes));
        let wake = again_soon || bytes >= WORTH_WAKING_BYTES;
        if !crew.rests.is_over(now) {
            return Self::NONE;
        }
        while wake
            && crew.mates.len() < most
            && let Some(mate) = Mate::start()
        {
            crew.mates.push(mate);
        }
        let there = crew.mates.iter().filter(|mate| wake || mate.is_awake()).count();
        Self { others: there.min(most), wake }
    }

    /// Whether the caller is alone.
    pub fn is_none(self) -> bool {
        self.others == 0
    }
}

/// Calls `each` once for every item, on this thread and on those that are called; together they copy so many `bytes`, about
/// as many each. When it returns, every call has ended, and what they copied past the cache is whole.
///
/// # Panics
/// If a call does, once the others have ended.
pub fn share<T: Send>(items: &mut [T], bytes: usize, called: Called, each: impl Fn(&mut T) + Sync) {
    let others = called.others.min(items.len().saturating_sub(1));
    if others == 0 {
        items.iter_mut().for_each(each);
        return drain();
    }
    let (start, count) = (Start(items.as_mut_ptr()), items.len());
    let one = |at: usize| {
        // SAFETY: `Work` hands out each place below `count` once, and nobody else reaches the items until we return.
        each(unsafe { &mut *start.at(at) });
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
        late_after: LATE + copied_in(bytes / count),
        late: AtomicBool::new(false),
        caller: thread::current(),
    });
    let waits = Waits(&work);
    call(&work, Called { others, ..called });
    work.run();
    drop(waits);
    if work.late.load(Ordering::Relaxed)
        && let Ok(mut crew) = CREW.try_lock()
    {
        crew.rests.begin(Instant::now());
    }
    let panicked = lock(&work.panicked).take();
    if let Some(panicked) = panicked {
        resume_unwind(panicked);
    }
}

/// Where items begin that several threads are handed, each to one.
pub(crate) struct Start<T>(pub(crate) *mut T);

// SAFETY: it gives out addresses; whoever follows one says why he alone may. Items go to other threads, and are `Send`.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    // A method, so that closures take the whole and not the pointer alone.
    pub(crate) fn at(&self, at: usize) -> *mut T {
        self.0.wrapping_add(at)
    }
}

/// Threads of this process.
struct Crew {
    process: u32,
    /// When it was called the last time, and for how many bytes.
    called: Option<(Instant, usize)>,
    rests: Rests,
    mates: Vec<Mate>,
}

/// When nobody is called, as the processors are wanted by others.
#[derive(Debug)]
struct Rests {
    until: Option<Instant>,
    /// How long the next one is.
    next: Duration,
    /// Calls since the last one.
    quick: u32,
}

impl Rests {
    /// A thread was interrupted.
    fn begin(&mut self, now: Instant) {
        if self.quick >= FORGOTTEN_AFTER {
            self.next = REST_MIN;
        }
        self.until = Some(now + self.next);
        (self.next, self.quick) = ((4 * self.next).min(REST_MAX), 0);
    }

    /// Whether somebody may be called, which he then is.
    fn is_over(&mut self, now: Instant) -> bool {
        if self.until.is_some_and(|until| now < until) {
            return false;
        }
        (self.until, self.quick) = (None, self.quick.saturating_add(1));
        true
    }
}

struct Mate {
    /// Once it has begun.
    thread: Arc<OnceLock<Pid>>,
    orders: mpsc::Sender<Arc<Work>>,
    awake: Arc<AtomicBool>,
    /// The processor that it was told to stay away from: its caller's.
    leaves: usize,
}

impl Crew {
    fn is_of_this_process(&mut self) {
        let process = std::process::id();
        if self.process != process {
            // The parent's threads are not here, nor are they told that we forget them.
            std::mem::forget(std::mem::take(&mut self.mates));
            self.process = process;
        }
    }
}

/// Asks them to help. Whoever cannot be asked leaves it to the rest.
fn call(work: &Arc<Work>, called: Called) {
    let Ok(mut crew) = CREW.try_lock() else { return };
    let here = sched_getcpu();
    let there = crew.mates.iter_mut().filter(|mate| called.wake || mate.is_awake());
    for mate in there.take(called.others) {
        mate.leave(here);
        let _ended = mate.orders.send(Arc::clone(work));
    }
}

impl Mate {
    fn start() -> Option<Self> {
        let (orders, taken) = mpsc::channel::<Arc<Work>>();
        let (thread, awake) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(true)));
        let (its, known) = (Arc::clone(&thread), Arc::clone(&awake));
        let body = move || {
            take_short_turns();
            its.get_or_init(gettid);
            while let Some(work) = next(&taken, &known) {
                work.run();
            }
        };
        thread::Builder::new().name("terrace-copy".into()).spawn(body).ok()?;
        Some(Self { thread, orders, awake, leaves: usize::MAX })
    }

    fn is_awake(&self) -> bool {
        self.awake.load(Ordering::Relaxed)
    }

    /// Where all processors are busy, the kernel would put it behind its caller on this one.
    fn leave(&mut self, here: usize) {
        let Some(thread) = self.thread.get().filter(|_| self.leaves != here && here < CpuSet::MAX_CPU) else {
            return;
        };
        let Ok(mut elsewhere) = sched_getaffinity(None) else { return };
        elsewhere.unset(here);
        // A set that the kernel refuses, for example because nothing is in it, changes nothing.
        let _refused = sched_setaffinity(Some(*thread), &elsewhere);
        self.leaves = here;
    }
}

/// The next call; `None` when nobody calls any more.
fn next(taken: &mpsc::Receiver<Arc<Work>>, awake: &AtomicBool) -> Option<Arc<Work>> {
    const LOOKS: usize = 32;
    let began = Instant::now();
    while began.elapsed() < AWAKE_FOR {
        for _ in 0..LOOKS {
            match taken.try_recv() {
                Ok(work) => return Some(work),
                Err(TryRecvError::Empty) => hint::spin_loop(),
                Err(TryRecvError::Disconnected) => return None,
            }
        }
    }
    awake.store(false, Ordering::Relaxed);
    let work = taken.recv();
    awake.store(true, Ordering::Relaxed);
    work.ok()
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
    late_after: Duration,
    /// The caller had to wait for longer.
    late: AtomicBool,
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
        let began = Instant::now();
        while self.left.load(Ordering::Acquire) > 0 {
            thread::park();
        }
        self.late.store(began.elapsed() > self.late_after, Ordering::Relaxed);
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

    use super::*;

    /// Not always, for another test may be calling.
    fn two_threads_take_part() {
        for _ in 0..1000 {
            let mut items = [None; 8];
            share(&mut items, WORTH_WAKING_BYTES, Called::of(2, WORTH_WAKING_BYTES), |item| {
                thread::sleep(Duration::from_millis(1));
                *item = Some(thread::current().id());
            });
            // What sleeps is late.
            thread::sleep(REST_MAX / 10);
            if items.into_iter().flatten().collect::<HashSet<_>>().len() == 2 {
                return;
            }
        }
        panic!("nobody helps");
    }

    // A caller that waits again and again for a thread that others interrupt is slower than alone; one that never asks again is
    // slower than it could be.
    #[test]
    fn rests_grow_and_are_forgotten() {
        let (began, ms) = (Instant::now(), Duration::from_millis);
        let mut rests = Rests { until: None, next: REST_MIN, quick: 0 };
        assert!(rests.is_over(began));
        rests.begin(began);
        assert!(!rests.is_over(began + ms(19)));
        assert!(rests.is_over(began + ms(20)));
        rests.begin(began + ms(20));
        assert!(!rests.is_over(began + ms(99)));
        for _ in 0..20 {
            rests.begin(began);
        }
        assert!(!rests.is_over(began + ms(249)));
        assert!(rests.is_over(began + ms(250)));
        assert!((1..FORGOTTEN_AFTER).all(|_| rests.is_over(began + ms(250))));
        rests.begin(began);
        assert!(rests.is_over(began + ms(20)));
    }

    // An item that is left out is a block that was not copied, and one that is done twice a target with two writers. A
    // thread that ended by a panic would leave its caller waiting, and the next ones without it.
    #[test]
    fn every_item_is_done_once_and_a_panic_is_the_callers() {
        for threads in [0, 1, 2, 3, COPY_THREADS_MAX + 1] {
            for length in [0, 1, 2, 1000] {
                let mut items = vec![0u32; length];
                share(&mut items, 1, Called::of(threads, WORTH_WAKING_BYTES), |item| *item += 1);
                assert!(items.iter().all(|item| *item == 1), "{length} items by {threads} threads");
            }
        }
        two_threads_take_part();
        for _ in 0..20 {
            let mut items = [0, 1, 2, 3];
            let broken = catch_unwind(AssertUnwindSafe(|| {
                share(&mut items, 1, Called::of(2, WORTH_WAKING_BYTES), |item| {
                    assert_ne!(*item, 2, "the third")
                });
            }));
            assert!(broken.is_err());
        }
        two_threads_take_part();
    }
}
