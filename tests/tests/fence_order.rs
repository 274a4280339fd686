//! The order of a fence and the bytes that it guards, in every way that the memory
//! model allows: a model of `ChunkMemory::set_fence` (media) and `ReadBlock::is_valid` (client).
//!
//! The owner moves the fence and then changes the bytes; the reader copies the
//! bytes and then looks at the fence. A byte is a relaxed atomic here: the worst
//! that a plain store of another process can be.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};
use loom::thread;

const OLD: u64 = 1;
const NEW: u64 = 2;

/// Whether an order can be left out, or is as in the code.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Both,
    OwnersOnly,
    ReadersOnly,
}

fn race(kept: Kept) {
    loom::model(move || {
        let (guard, byte) = (Arc::new(AtomicU64::new(OLD)), Arc::new(AtomicU64::new(OLD)));
        let (owner_guard, owner_byte) = (Arc::clone(&guard), Arc::clone(&byte));
        let owner = thread::spawn(move || {
            owner_guard.store(NEW, Release);
            if kept != Kept::ReadersOnly {
                fence(Release);
            }
            owner_byte.store(NEW, Relaxed);
        });
        let seen = byte.load(Relaxed);
        if kept != Kept::OwnersOnly {
            fence(Acquire);
        }
        let valid = guard.load(Acquire) == OLD;
        assert!(!valid || seen == OLD, "a byte of the next block passed for the old one");
        owner.join().expect("the owner ends");
    });
}

/// A reader that takes a new byte for an old block would compute with another prompt's KV.
#[test]
fn no_new_byte_passes_under_the_old_fence() {
    race(Kept::Both);
}

/// A model that passes without the orders proves nothing about them.
#[test]
#[should_panic(expected = "passed for the old one")]
fn the_owners_order_is_needed() {
    race(Kept::ReadersOnly);
}

/// As above, for the reader.
#[test]
#[should_panic(expected = "passed for the old one")]
fn the_readers_order_is_needed() {
    race(Kept::OwnersOnly);
}
