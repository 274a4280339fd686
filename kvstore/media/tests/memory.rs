//! Chunk memory: what leaves the daemon cannot be written, and a drop is
//! answered when no other process holds the memory.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use common::*;
use terrace_core::{ByteCount, ChunkId, Done, Fault};
use terrace_media::{Access, Backend, ChunkMemory, Holders, MediaOp, memory_available, memory_facts};

fn chunk(access: Access) -> ChunkMemory {
    ChunkMemory::create(ByteCount::new(FRAME_BYTES), 8, access).unwrap()
}

/// A mapping of a whole chunk's first page; unmapped on drop.
struct Mapped(*mut libc::c_void);

impl Mapped {
    fn new(fd: &OwnedFd, protection: libc::c_int) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice, unmapped by drop. 2 MiB, for huge pages.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), 2 << 20, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(address)) }
    }

    fn byte(&self, at: usize) -> u8 {
        // SAFETY: inside the mapping.
        unsafe { self.0.cast::<u8>().add(at).read_volatile() }
    }

    fn set(&self, at: usize, value: u8) {
        // SAFETY: inside the mapping, which the caller made writable.
        unsafe { self.0.cast::<u8>().add(at).write_volatile(value) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once.
        unsafe { libc::munmap(self.0, 2 << 20) };
    }
}

/// What a hostile reader does: open the descriptor that it was given once more, for writing.
fn reopened(fd: &OwnedFd) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    // SAFETY: the path outlives the call.
    let raw = unsafe { libc::open(path.as_ptr(), libc::O_RDWR) };
    // SAFETY: a descriptor that the kernel just gave us.
    if raw < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(raw) }) }
}

const READ: libc::c_int = libc::PROT_READ;
const WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A reader could reopen its descriptor through /proc and write into other
/// clients' blocks: neither a mapping nor a write may succeed, by either way, on data or fences.
#[test]
fn a_reader_cannot_write() {
    let memory = chunk(Access::Pool);
    for fd in [memory.share_data().unwrap(), memory.share_fences().unwrap()] {
        assert!(Mapped::new(&fd, WRITE).is_err(), "mapped writable as given");
        let Ok(second) = reopened(&fd) else { continue };
        assert!(Mapped::new(&second, WRITE).is_err(), "mapped writable after reopening");
        // SAFETY: writes from a local buffer to a descriptor that lives through the call.
        let wrote = unsafe { libc::pwrite(second.as_raw_fd(), b"x".as_ptr().cast(), 1, 0) };
        assert!(wrote < 0, "written by a system call");
        assert!(std::fs::File::from(second).set_len(0).is_err(), "cut short under its readers");
    }
    let fd = memory.share_data().unwrap();
    let mapped = Mapped::new(&fd, READ).unwrap();
    memory.copy_in(0, 10, b"y").unwrap();
    assert_eq!(mapped.byte(4096 + 10), b'y');
    let fences = Mapped::new(&memory.share_fences().unwrap(), READ).unwrap();
    for mapped in [&mapped, &fences] {
        // SAFETY: our own mapping; nothing but its protection would change.
        let raised = unsafe { libc::mprotect(mapped.0, 4096, WRITE) };
        assert_eq!(raised, -1, "a mapping for reading became one for writing");
    }
    assert!(memory.share_writable().is_err());
}

/// A window must be writable by its owner until it is adopted, and by nobody new afterwards.
#[test]
fn an_adopted_window_is_sealed() {
    let memory = chunk(Access::Window);
    let owner = Mapped::new(&memory.share_writable().unwrap(), WRITE).unwrap();
    owner.set(4096, 9);
    let mut byte = [0];
    memory.copy_out(0, 0, &mut byte).unwrap();
    assert_eq!(byte, [9]);
    assert_eq!(memory.holders(), Holders::Writers);
    drop(owner);
    assert_eq!(memory.holders(), Holders::Nobody);
    memory.adopt().unwrap();
    assert!(memory.share_writable().is_err());
    let reader = memory.share_data().unwrap();
    assert!(Mapped::new(&reader, WRITE).is_err());
    assert!(reopened(&reader).map_or(true, |fd| Mapped::new(&fd, WRITE).is_err()));
}

/// The kernel must know who holds a chunk: by descriptor, by mapping alone, and by nobody.
#[test]
fn holders_are_seen_through_descriptors_and_mappings() {
    let memory = chunk(Access::Pool);
    assert_eq!(memory.holders(), Holders::Nobody);
    let fd = memory.share_data().unwrap();
    assert_eq!(memory.holders(), Holders::Readers);
    let mapped = Mapped::new(&fd, READ).unwrap();
    drop(fd);
    assert_eq!(memory.holders(), Holders::Readers);
    let retired = memory.retire();
    assert!(!retired.gone());
    drop(mapped);
    assert!(retired.gone());
}

/// A drop that is answered too early lets the pool grow past its limit: it must
/// wait for a foreign mapping, and come as soon as that is gone.
#[test]
fn a_drop_waits_for_foreign_mappings() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Pool);
    let fd = store.media.chunk(ChunkId::new(1)).unwrap().share_data().unwrap();
    let op = store.op();
    store.media.start(MediaOp::DropChunk { op, chunk: ChunkId::new(1) });
    let deadline = Instant::now() + PATIENCE;
    while store.media.facts().lingering.get() == 0 {
        assert!(Instant::now() < deadline, "the drop never began");
        std::thread::yield_now();
    }
    drop(fd);
    assert_eq!(store.answer(), (op, Ok(Done::Plain)));
    assert!(store.media.chunk(ChunkId::new(1)).is_none());
}

/// A mapping that stays for ever must not stall the core: the drop says so, and
/// the bytes are counted until the mapping is gone.
#[test]
fn a_stuck_mapping_is_reported_and_counted() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Window);
    let memory = store.media.chunk(ChunkId::new(1)).unwrap();
    let mapped = Mapped::new(&memory.share_writable().unwrap(), WRITE).unwrap();
    let bytes = memory.bytes();
    drop(memory);
    let dropped = store.run(|op| MediaOp::DropChunk { op, chunk: ChunkId::new(1) });
    assert_eq!(dropped, Err(Fault::StillMapped));
    assert_eq!(store.media.facts().lingering, bytes);
    drop(mapped);
    let deadline = Instant::now() + PATIENCE;
    while store.media.facts().lingering.get() > 0 {
        assert!(Instant::now() < deadline, "still counted as lingering");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Many chunks come and go while I/O runs on them: registrations, descriptors and memory must not pile up.
#[test]
fn dropped_chunks_leave_nothing_behind() {
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for backend in BACKENDS {
        let folder = folder();
        let mut store = Store::open(&folder, backend);
        store.chunk(1, Access::Pool);
        store.carve(0);
        let block = store.persist(1, disk(0, 0));
        let before = descriptors();
        for round in 2..60 {
            store.chunk(round, Access::Pool);
            assert_eq!(store.read(disk(0, 0), frame(round, 3), block), Ok(Done::Plain));
            let dropped = store.run(|op| MediaOp::DropChunk { op, chunk: ChunkId::new(round) });
            assert_eq!(dropped, Ok(Done::Plain), "round {round}");
        }
        // Tests beside this one open descriptors of their own; ours would be hundreds.
        assert!(descriptors() < before + 60, "{before} descriptors became {}", descriptors());
    }
}

/// Memory that is made ahead could push the pool past its limit, or come to no use. With room for four chunks it is
/// one, before there is a chunk and beside three; the fourth takes it, and beside four there is none.
#[test]
fn memory_made_ahead_stays_below_the_limit() {
    let folder = folder();
    let mut store = Store::open(&folder, Backend::Auto);
    store.chunk(1, Access::Window);
    assert_eq!(store.media.facts().ready.get(), 0, "made ahead before anybody said how much");
    let bytes = store.media.chunk(ChunkId::new(1)).unwrap().bytes().get();
    assert_eq!(bytes, CHUNK_BYTES, "memory of one length serves all frames");
    store.media.set_memory_max(ByteCount::new(4 * CHUNK_BYTES));
    for chunk in 2..=3 {
        ready_becomes(&store, CHUNK_BYTES);
        store.chunk(chunk, Access::Pool);
    }
    ready_becomes(&store, CHUNK_BYTES);
    store.chunk(4, Access::Window);
    assert_eq!(store.media.facts().ready.get(), 0, "four chunks, and some ahead");
    assert_eq!(
        store.run(|op| MediaOp::DropChunk { op, chunk: ChunkId::new(1) }),
        Ok(Done::Plain),
        "nobody holds it"
    );
    ready_becomes(&store, CHUNK_BYTES);
}

fn ready_becomes(store: &Store, bytes: u64) {
    let deadline = Instant::now() + PATIENCE;
    while store.media.facts().ready.get() != bytes {
        assert!(Instant::now() < deadline, "{} bytes ahead", store.media.facts().ready.get());
        std::thread::yield_now();
    }
}

/// Ranges outside a frame come from the wire in the end: they must be refused, not trusted.
#[test]
fn ranges_outside_a_frame_are_refused() {
    let memory = chunk(Access::Pool);
    let room = FRAME_BYTES - 4096;
    let mut byte = [0u8; 1];
    for (index, offset) in [(8, 0), (0, room), (7, u64::MAX), (u32::MAX, 0)] {
        assert!(memory.copy_in(index, offset, &byte).is_err());
        assert!(memory.copy_out(index, offset, &mut byte).is_err());
    }
    assert!(memory.copy_in(7, room - 1, &byte).is_ok());
    let bytes = payload(1);
    let mut long = header(1, &bytes);
    long.length = ByteCount::new(room + 1);
    assert!(memory.verify(0, &long).is_err());
    assert!(ChunkMemory::create(ByteCount::new(5000), 8, Access::Pool).is_err());
    assert!(ChunkMemory::create(ByteCount::new(FRAME_BYTES), 0, Access::Pool).is_err());
}

/// A pool larger than the machine must be refused before the kernel kills somebody.
#[test]
fn memory_that_is_not_there_is_refused() {
    let available = memory_available().get();
    assert!(available > 0 && memory_facts().available.get() > 0);
    let frames = u32::try_from(available / (1 << 20)).unwrap() + 1;
    let error = ChunkMemory::create(ByteCount::new(1 << 20), frames, Access::Pool).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
}
