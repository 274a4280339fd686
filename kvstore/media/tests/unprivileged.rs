//! A daemon without CAP_IPC_LOCK and with a small limit of locked memory: its
//! chunks cannot be registered with the ring, and everything works all the same.
//! Alone in its program, because the limit is the process's.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use common::*;
use terrace_core::{Done, Via};
use terrace_media::{Access, Backend};

/// Gives up the right to lock memory, for this thread and those that it starts.
fn give_up_locking() {
    // Enough for the rings themselves, too little for a chunk.
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: a valid rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }, 0);
    // Version 3 of the capability interface; this thread. CAP_IPC_LOCK is bit 14.
    let mut header = [0x2008_0522u32, 0];
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: header and sets have the layout of version 3: two u32, and two times three u32.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()), 0);
        sets[0].iter_mut().for_each(|set| *set &= !(1 << 14));
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_mut_ptr()), 0);
    }
}

/// Registration fails in a container with default limits: reads and writes must
/// go on without it, and `info` must say so.
#[test]
fn chunks_that_cannot_be_registered_are_used_unregistered() {
    let folder = folder();
    give_up_locking();
    let mut store = Store::open(&folder, Backend::IoUring);
    store.chunk(1, Access::Pool);
    store.carve(0);
    for number in 1..=3 {
        let bytes = payload(number);
        store.fill(frame(1, 0), &bytes);
        let header = header(number, &bytes);
        assert_eq!(store.write(frame(1, 0), disk(0, 0), header, Via::Direct), Ok(Done::Plain));
        assert_eq!(store.read(disk(0, 0), frame(1, 2), header), Ok(Done::Plain));
        assert_eq!(store.payload(frame(1, 2)), bytes);
    }
    let backend = store.media.facts().devices[0].backend.clone();
    assert!(backend.contains("not registered"), "{backend}");
}
