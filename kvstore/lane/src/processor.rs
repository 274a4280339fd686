//! Which processor a thread runs on.
//!
//! The kernel wakes who is asked over a Unix socket on the processor of who asked, who then goes on there: the two take
//! turns, while others are idle. Where idle ones look as if their host had taken them away, as they do in a virtual machine,
//! none of them is looked for.

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
