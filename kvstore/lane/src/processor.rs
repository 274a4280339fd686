//! Which processor a thread runs on.
//!
//! The kernel wakes who is asked over a Unix socket on the processor of who asked, who then goes on there: the two take
//! turns, while others are idle. Where idle ones look as if their host had taken them away, as they do in a virtual machine,
//! none of them is looked for.

use std::mem::{MaybeUninit, size_of};

/// The processor that the caller runs on just now; `None` if the kernel does not say.
pub fn processor() -> Option<u32> {
    // SAFETY: plain call without arguments.
    u32::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// If the calling thread runs on this processor and may run on others, it goes on on one of those. It may come back at any
/// time: what it may run on is as before. Takes some 50 us where the other one sleeps.
pub fn leave_processor(number: u32) {
    let Some(place) = usize::try_from(number).ok().filter(|place| *place < 8 * size_of::<libc::cpu_set_t>())
    else {
        return;
    };
    if processor() != Some(number) {
        return;
    }
    let mut allowed = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: zero is the calling thread; the set is as long as is said, and zeros are a set.
    let mut allowed = unsafe {
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), allowed.as_mut_ptr()) != 0 {
            return;
        }
        allowed.assume_init()
    };
    let before = allowed;
    // SAFETY: the place is inside the set. Zero is the calling thread, and the sets are as long as is said; a set that the
    // kernel refuses, for example because nothing is in it, changes nothing.
    unsafe {
        libc::CPU_CLR(place, &mut allowed);
        if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &allowed) == 0 {
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &before);
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
        for _ in 0..100 {
            let before = processor().unwrap();
            leave_processor(before);
            if !others {
                assert_eq!(processor(), Some(before));
            }
        }
        let after = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) > 1;
        assert_eq!(after, others, "it may run where it could before");
        leave_processor(u32::MAX);
    }
}
