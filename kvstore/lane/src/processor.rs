//! Which processor a thread runs on.
//!
//! The kernel wakes who is asked over a Unix socket on the processor of who asked, who then goes on there: the two take
//! turns, while others are idle. Where idle ones look as if their host had taken them away, as they do in a virtual machine,
//! none of them is looked for.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// The processor that the caller runs on just now; `None` if its number is none that can be.
pub fn processor() -> Option<u32> {
    u32::try_from(sched_getcpu()).ok()
}

/// If the calling thread runs on this processor and may run on others, it goes on on one of those. It may come back at any
/// time: what it may run on is as before. Takes some 50 us where the other one sleeps. Whether it left.
pub fn leave_processor(number: u32) -> bool {
    let place = usize::try_from(number).ok().filter(|place| *place < CpuSet::MAX_CPU);
    let Some(place) = place.filter(|_| processor() == Some(number)) else { return false };
    let Ok(before) = sched_getaffinity(None) else { return false };
    let mut others = before;
    others.unset(place);
    // A set that the kernel refuses, for example because nothing is in it, changes nothing.
    let left = sched_setaffinity(None, &others).is_ok();
    if left {
        let _refused = sched_setaffinity(None, &before);
    }
    left
}

/// Gives its processor away again and again, while it waits awake for somebody on another one.
#[derive(Clone, Copy, Debug)]
pub struct Yields {
    /// Whoever has it for longer wanted it.
    longest: Duration,
    /// The last one was longer.
    long: bool,
}

impl Yields {
    /// An interrupt takes as long now and then, but no longer, and not twice in a row.
    const INTERRUPTED_FOR_MAX: Duration = Duration::from_micros(50);

    /// Others may have the processor for so long before it counts that they had it.
    pub fn new(longest: Duration) -> Self {
        Self { longest, long: false }
    }

    /// Once. When it has the processor again, and whether somebody else wanted it.
    pub fn give(&mut self) -> (Instant, bool) {
        let began = Instant::now();
        std::thread::yield_now();
        let ended = Instant::now();
        (ended, self.judge(ended.duration_since(began)))
    }

    fn judge(&mut self, away: Duration) -> bool {
        let before = std::mem::replace(&mut self.long, away >= self.longest);
        self.long && (before || away >= Self::INTERRUPTED_FOR_MAX)
    }
}

/// From here on this thread takes its turns on a processor in slices as short as the kernel has them, so that it gets the
/// next one sooner. A kernel that knows none leaves it as it is.
pub(crate) fn take_short_turns() {
    const SLICE_NANOS: u64 = 100_000;
    // SAFETY: plain integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let length = size_of::<libc::sched_attr>();
    let (own, none) = (0, 0);
    // SAFETY: the kernel fills in at most `length` bytes of what we own, and reads as many.
    unsafe {
        if libc::syscall(libc::SYS_sched_getattr, own, &raw mut attributes, length, none) == 0 {
            attributes.sched_runtime = SLICE_NANOS;
            let _refused = libc::syscall(libc::SYS_sched_setattr, own, &raw const attributes, none);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Who takes an interrupt for somebody else sleeps until he is woken for a tenth of a second, and who takes somebody else for an
    // interrupt waits for him for milliseconds, each time.
    #[test]
    fn an_interrupt_is_nobody() {
        let us = Duration::from_micros;
        let mut yields = Yields::new(us(5));
        assert!(![1, 6, 2, 49, 4].map(us).into_iter().any(|away| yields.judge(away)));
        assert!(yields.judge(us(50)), "nothing but another thread takes so long");
        assert!(yields.judge(us(6)), "twice in a row");
        assert!(!Yields::new(us(500)).judge(us(400)));
        assert!(Yields::new(us(500)).judge(us(500)));
    }

    // A thread that stays where its client works waits for him; one that lost the other processors for good would wait for
    // everybody from then on.
    #[test]
    fn a_thread_leaves_a_processor_and_may_come_back() {
        let others = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) > 1;
        let mut left = false;
        for _ in 0..100 {
            let before = processor().unwrap();
            // The kernel may have moved it in between: then there is nothing to leave, but not a hundred times.
            left |= leave_processor(before);
            if !others {
                assert_eq!(processor(), Some(before));
            }
        }
        assert_eq!(left, others, "it left while there was another");
        let after = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) > 1;
        assert_eq!(after, others, "it may run where it could before");
        assert!(!leave_processor(u32::MAX));
    }
}
