//! Devices that misbehave: whatever they do, a read gives the block or a fault,
//! and what was acknowledged as durable survives a power cut.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use common::*;
use terrace_core::{BlockHeader, ByteCount, Done, Fault, IoClass, Via};
use terrace_media::{
    Access, Backend, BlockIo, FaultyDevice, Injected, IoOp, MediaConfig, MediaOp, VolatileDevice,
    decode_header,
};

/// A configuration whose device is wrapped, and the wrapper once the store is open.
fn wrapped<T: BlockIo + 'static>(
    folder: &tempfile::TempDir,
    backend: Backend,
    wrap: fn(Arc<dyn BlockIo>) -> T,
) -> (MediaConfig, Arc<Mutex<Option<Arc<T>>>>) {
    let found = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&found);
    let mut configuration = config(folder, backend);
    configuration.hooks.wrap_device = Some(Box::new(move |_, inner| {
        let device = Arc::new(wrap(inner));
        *keep.lock().unwrap() = Some(Arc::clone(&device));
        device
    }));
    (configuration, found)
}

fn faulty(folder: &tempfile::TempDir, backend: Backend) -> (Store, Arc<FaultyDevice>) {
    let (configuration, found) = wrapped(folder, backend, FaultyDevice::new);
    let mut store = Store::with(configuration).unwrap();
    store.chunk(1, Access::Pool);
    store.carve(0);
    let device = found.lock().unwrap().take().unwrap();
    (store, device)
}

fn prepared(store: &Store, number: u8) -> BlockHeader {
    let bytes = payload(number);
    store.fill(frame(1, 0), &bytes);
    header(number, &bytes)
}

/// Block `number` of its own bytes in the frame of its number, on disk too.
fn prepared_in(store: &mut Store, number: u8) -> BlockHeader {
    let bytes = payload(number);
    let at = u32::from(number);
    store.fill(frame(1, at), &bytes);
    let block = header(number, &bytes);
    assert_eq!(store.write(frame(1, at), disk(0, at), block, Via::Direct), Ok(Done::Plain));
    block
}

/// A write that did less or other than it said must be found out by the read:
/// torn at each boundary, a flipped bit in header and payload, misdirected, lost.
#[test]
fn writes_that_lie_are_found_out_by_reads() {
    for backend in BACKENDS {
        let folder = folder();
        let (mut store, device) = faulty(&folder, backend);
        let elsewhere = store.offset(disk(0, 15));
        let lies = [
            Injected::Torn(4096),
            Injected::Torn(8192),
            Injected::Torn(FRAME_BYTES - 4096),
            // The header's sector is the first of eight in its page: without it, alone, and with every second one.
            Injected::TornSectors(!1),
            Injected::TornSectors(1),
            Injected::TornSectors(0x5555_5555_5555_5555),
            Injected::TornSectors(!(1 << 63)),
            Injected::BitFlip(20),
            Injected::BitFlip(4096),
            Injected::BitFlip(4096 + BLOCK_BYTES - 1),
            Injected::Misdirected(elsewhere),
            Injected::Lost,
        ];
        for (at, lie) in lies.into_iter().enumerate() {
            let target = disk(0, u32::try_from(at).unwrap());
            // What lay there before is another, whole block.
            let before = prepared(&store, 100);
            assert_eq!(store.write(frame(1, 0), target, before, Via::Direct), Ok(Done::Plain));
            let block = prepared(&store, 1);
            device.inject(IoOp::Write, lie);
            assert_eq!(store.write(frame(1, 0), target, block, Via::Direct), Ok(Done::Plain), "{lie:?}");
            assert_eq!(store.read(target, frame(1, 5), block), Err(Fault::Checksum), "{backend:?} {lie:?}");
            assert_eq!(store.payload(frame(1, 0)), payload(1), "the source stays whole: {lie:?}");
        }
    }
}

/// A read that returned less or other than it said must not be served, and the next one may be.
#[test]
fn reads_that_lie_are_found_out() {
    for backend in BACKENDS {
        let folder = folder();
        let (mut store, device) = faulty(&folder, backend);
        let block = prepared(&store, 1);
        assert_eq!(store.write(frame(1, 0), disk(0, 1), block, Via::Direct), Ok(Done::Plain));
        let other = prepared(&store, 2);
        assert_eq!(store.write(frame(1, 0), disk(0, 2), other, Via::Bounce), Ok(Done::Plain));
        let (start, wrong) = (store.offset(disk(0, 1)), store.offset(disk(0, 2)));
        let lies = [
            (Injected::Torn(8192), Fault::Checksum),
            (Injected::TornSectors(!1), Fault::Checksum),
            (Injected::TornSectors(1), Fault::Checksum),
            (Injected::TornSectors(!(1 << 63)), Fault::Checksum),
            (Injected::Short(8192), Fault::Device),
            (Injected::BitFlip(4096 + 77), Fault::Checksum),
            (Injected::Misdirected(wrong), Fault::Checksum),
            (Injected::Misdirected(start + 4096), Fault::Checksum),
            (Injected::Lost, Fault::Checksum),
            (Injected::Fail(Fault::Device), Fault::Device),
        ];
        for (lie, fault) in lies {
            // The frame holds another block before, as after an eviction.
            assert_eq!(store.read(disk(0, 2), frame(1, 5), other), Ok(Done::Plain));
            device.inject(IoOp::Read, lie);
            assert_eq!(store.read(disk(0, 1), frame(1, 5), block), Err(fault), "{backend:?} {lie:?}");
            assert_eq!(store.read(disk(0, 1), frame(1, 5), block), Ok(Done::Plain), "{backend:?} {lie:?}");
        }
    }
}

/// A write that went to another place harms two blocks: the one that is not where it should be, and the one
/// that was there. Neither may be served from the wrong place.
#[test]
fn a_misdirected_write_harms_two_and_fools_nobody() {
    for backend in BACKENDS {
        let folder = folder();
        let (mut store, device) = faulty(&folder, backend);
        let victim = prepared(&store, 1);
        assert_eq!(store.write(frame(1, 0), disk(0, 1), victim, Via::Direct), Ok(Done::Plain));
        let bystander = prepared(&store, 3);
        assert_eq!(store.write(frame(1, 0), disk(0, 3), bystander, Via::Direct), Ok(Done::Plain));
        let block = prepared(&store, 2);
        device.inject(IoOp::Write, Injected::Misdirected(store.offset(disk(0, 1))));
        assert_eq!(store.write(frame(1, 0), disk(0, 2), block, Via::Direct), Ok(Done::Plain));
        assert_eq!(store.read(disk(0, 2), frame(1, 5), block), Err(Fault::Checksum), "{backend:?}");
        assert_eq!(store.read(disk(0, 1), frame(1, 5), victim), Err(Fault::Checksum), "{backend:?}");
        assert_eq!(store.read(disk(0, 3), frame(1, 5), bystander), Ok(Done::Plain), "{backend:?}");
        assert_eq!(store.payload(frame(1, 5)), payload(3));
    }
}

/// A stale read gives a whole and sound block: the one that lay there before. It may be another block, or an
/// earlier copy of the same one; neither is what was written last.
#[test]
fn a_stale_read_is_found_out() {
    for backend in BACKENDS {
        let folder = folder();
        let (mut store, device) = faulty(&folder, backend);
        device.remember(4);
        for before in [2, 1] {
            let older = prepared(&store, before);
            assert_eq!(store.write(frame(1, 0), disk(0, 1), older, Via::Direct), Ok(Done::Plain));
            let block = prepared(&store, 1);
            let block = BlockHeader { write_sequence: 77, ..block };
            assert_eq!(store.write(frame(1, 0), disk(0, 1), block, Via::Direct), Ok(Done::Plain));
            device.inject(IoOp::Read, Injected::Stale);
            assert_eq!(store.read(disk(0, 1), frame(1, 5), block), Err(Fault::Checksum), "{backend:?}");
            assert_eq!(store.read(disk(0, 1), frame(1, 5), block), Ok(Done::Plain), "{backend:?}");
        }
        assert_eq!(device.injected()[&("read", "stale")], 2, "both reads were stale");
    }
}

/// One flipped bit of a header page, whichever it is, must be found out: all 32,768 of them, on the device.
#[test]
fn every_bit_of_a_header_page_counts() {
    let folder = folder();
    let (mut store, _) = faulty(&folder, Backend::Auto);
    let block = prepared(&store, 1);
    assert_eq!(store.write(frame(1, 0), disk(0, 1), block, Via::Direct), Ok(Done::Plain));
    let start = store.offset(disk(0, 1));
    let raw = std::fs::File::options().read(true).write(true).open(device_path(&folder)).unwrap();
    let mut page = [0u8; 4096];
    raw.read_exact_at(&mut page, start).unwrap();
    assert_eq!(decode_header(&page), Ok(block));
    for bit in 0..4096 * 8 {
        page[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_header(&page).is_err(), "bit {bit} may flip unseen");
        page[bit / 8] ^= 1 << (bit % 8);
    }
    // And through the whole way of a read, for one bit of each field and many of the payload.
    let fields = [0, 8, 10, 12, 16, 32, 48, 64, 80, 88, 96, 104, 112, 120, 4095];
    let payload_bytes = (0..400).map(|number| 4096 + number * 499 % BLOCK_BYTES);
    for (number, at) in fields.into_iter().chain(payload_bytes).enumerate() {
        let mut byte = [0u8];
        raw.read_exact_at(&mut byte, start + at).unwrap();
        let flipped = [byte[0] ^ 1 << (number % 8)];
        raw.write_all_at(&flipped, start + at).unwrap();
        assert_eq!(store.read(disk(0, 1), frame(1, 5), block), Err(Fault::Checksum), "byte {at}");
        raw.write_all_at(&byte, start + at).unwrap();
    }
    assert_eq!(store.read(disk(0, 1), frame(1, 5), block), Ok(Done::Plain));
}

/// Blocks that lie behind each other are read together: a device that damages or fails such a read must cost no more
/// than the block it hurt, and every block must come into its own frame.
#[test]
fn neighbours_that_are_read_together_fail_alone() {
    for backend in BACKENDS {
        let folder = folder();
        let (mut store, device) = faulty(&folder, backend);
        let blocks: Vec<BlockHeader> = (0..6).map(|number| prepared_in(&mut store, number)).collect();
        let third = 2 * FRAME_BYTES + 4096 + 77;
        let cases = [
            (Injected::Slow(1), None),
            (Injected::BitFlip(third), Some(3)),
            (Injected::Fail(Fault::Device), None),
            (Injected::Short(FRAME_BYTES), None),
        ];
        for (fault, lost) in cases {
            for number in 0..6 {
                store.fill(frame(1, number), &payload(100));
            }
            let answers = read_together(&mut store, &device, &blocks, fault);
            for (number, answer) in (0u8..).zip(answers) {
                if Some(number) == lost {
                    assert_eq!(answer, Err(Fault::Checksum), "{backend:?}: the damaged block");
                    continue;
                }
                assert_eq!(answer, Ok(Done::Plain), "{backend:?}: block {number} with {fault:?}");
                assert_eq!(store.payload(frame(1, u32::from(number))), payload(number));
            }
        }
    }
}

/// Reads blocks that lie behind each other: the first alone, and the next four in one I/O, which meets the fault.
fn read_together(
    store: &mut Store,
    device: &FaultyDevice,
    blocks: &[BlockHeader],
    fault: Injected,
) -> Vec<Result<Done, Fault>> {
    device.hold();
    store.media.set_bytes_in_flight_max(ByteCount::new(4096));
    let ops: Vec<_> = (0u32..)
        .zip(blocks)
        .map(|(index, expect)| {
            let (op, source, target) = (store.op(), disk(0, index), frame(1, index));
            let (source_offset, class) = (store.offset(source), IoClass::PrefillFetch);
            store.media.start(MediaOp::Read { op, source, source_offset, target, expect: *expect, class });
            op
        })
        .collect();
    // From when the first ends there is room for sixteen, of which a quarter is the longest run.
    store.media.set_bytes_in_flight_max(ByteCount::new(16 * FRAME_BYTES));
    device.inject(IoOp::Read, Injected::Slow(1));
    device.inject(IoOp::Read, fault);
    device.release();
    let mut answers: Vec<_> = ops.iter().map(|_| store.answer()).collect();
    answers.sort_by_key(|(op, _)| *op);
    assert!(answers.iter().map(|(op, _)| op).eq(&ops), "each is answered once");
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// Failures that a device admits must arrive as what they are.
#[test]
fn admitted_failures_keep_their_kind() {
    let folder = folder();
    let (mut store, device) = faulty(&folder, Backend::Auto);
    let block = prepared(&store, 1);
    for fault in [Fault::Device, Fault::NoSpace] {
        for via in [Via::Direct, Via::Bounce] {
            device.inject(IoOp::Write, Injected::Fail(fault));
            assert_eq!(store.write(frame(1, 0), disk(0, 1), block, via), Err(fault));
        }
    }
    device.inject(IoOp::Write, Injected::Fail(Fault::NoSpace));
    let carve = store.run(|op| MediaOp::CarveSlot {
        op,
        device: terrace_core::DeviceId::new(0),
        slot: 1,
        space: space(),
        frame_bytes: ByteCount::new(FRAME_BYTES),
    });
    assert_eq!(carve, Err(Fault::NoSpace));
}

/// A commit whose device did not sync must fail and leave the catalog as it
/// was: an entry would promise what a power cut may have taken.
#[test]
fn a_failed_sync_commits_nothing() {
    let folder = folder();
    let (mut store, device) = faulty(&folder, Backend::Auto);
    let block = prepared(&store, 1);
    assert_eq!(store.write(frame(1, 0), disk(0, 1), block, Via::Direct), Ok(Done::Plain));
    device.inject(IoOp::Sync, Injected::Fail(Fault::Device));
    assert_eq!(store.commit(vec![(disk(0, 1), block)], vec![]), Err(Fault::Device));
    assert!(store.known().is_empty());
}

/// The catalog must hear of a block only after the sync that covers it: the
/// sync is held back, and until then no batch may be written.
#[test]
fn the_batch_waits_for_the_sync() {
    let folder = folder();
    let (mut store, device) = faulty(&folder, Backend::Auto);
    let block = prepared(&store, 1);
    assert_eq!(store.write(frame(1, 0), disk(0, 1), block, Via::Direct), Ok(Done::Plain));
    device.hold();
    let op = store.op();
    store.media.start(MediaOp::Commit { op, put: puts(vec![(disk(0, 1), block)]), delete: vec![] });
    let deadline = Instant::now() + PATIENCE;
    while device.held() == 0 {
        assert!(Instant::now() < deadline, "no sync was asked for");
        std::thread::yield_now();
    }
    assert!(store.known().is_empty(), "in the catalog before the sync");
    device.release();
    assert_eq!(store.answer(), (op, Ok(Done::Plain)));
    assert_eq!(store.known(), vec![block.block]);
}

/// A device that hangs must not hold up commits for ever: its sync is held back
/// past the patience, and the commit must fail without an entry in the catalog.
#[test]
fn a_hanging_device_fails_its_commits() {
    let folder = folder();
    let (mut configuration, found) = wrapped(&folder, Backend::Auto, FaultyDevice::new);
    configuration.hooks.sync_patience = Some(Duration::from_millis(500));
    let mut store = Store::with(configuration).unwrap();
    let device = found.lock().unwrap().take().unwrap();
    device.hold();
    let header = header(1, &payload(1));
    assert_eq!(store.commit(vec![(disk(0, 1), header)], vec![]), Err(Fault::Device));
    assert_eq!(store.commit(vec![], vec![block(9)]), Ok(Done::Plain), "other commits go on");
    assert!(store.known().is_empty());
    device.release();
    // The device may have been taken out meanwhile: a probe has to bring it back first.
    let deadline = Instant::now() + PATIENCE;
    let back = loop {
        let outcome = store.commit(vec![(disk(0, 1), header)], vec![]);
        if outcome == Ok(Done::Plain) || Instant::now() >= deadline {
            break outcome;
        }
        std::thread::yield_now();
    };
    assert_eq!(back, Ok(Done::Plain), "it is back");
}

/// A chunk must not be unmapped under an I/O that a device still performs: it
/// is dropped while a read is held back, and the drop must come after the read.
#[test]
fn a_late_read_keeps_its_chunk() {
    let folder = folder();
    let (mut store, device) = faulty(&folder, Backend::Auto);
    let block = prepared(&store, 1);
    assert_eq!(store.write(frame(1, 0), disk(0, 1), block, Via::Direct), Ok(Done::Plain));
    device.hold();
    let (read, drop) = (store.op(), store.op());
    store.media.start(MediaOp::Read {
        op: read,
        source: disk(0, 1),
        source_offset: store.offset(disk(0, 1)),
        target: frame(1, 4),
        expect: block,
        class: IoClass::DecodeFetch,
    });
    store.media.start(MediaOp::DropChunk { op: drop, chunk: terrace_core::ChunkId::new(1) });
    let deadline = Instant::now() + PATIENCE;
    while store.media.facts().lingering.get() == 0 {
        assert!(Instant::now() < deadline, "the drop never began");
        std::thread::yield_now();
    }
    device.release();
    assert_eq!(store.answer(), (read, Ok(Done::Plain)));
    assert_eq!(store.answer(), (drop, Ok(Done::Plain)));
}

/// Power cuts: what was committed before must be there and whole, what was not
/// must be absent or a fault, also if the cache was half written.
#[test]
fn committed_blocks_survive_power_cuts() {
    for (backend, unevenly) in [(Backend::IoUring, false), (Backend::Pread, true), (Backend::IoUring, true)] {
        let folder = folder();
        let (configuration, found) = wrapped(&folder, backend, VolatileDevice::new);
        let mut store = Store::with(configuration).unwrap();
        store.chunk(1, Access::Pool);
        store.carve(0);
        let device = found.lock().unwrap().take().unwrap();
        let kept = store.persist(1, disk(0, 0));
        let loose = prepared(&store, 2);
        assert_eq!(store.write(frame(1, 0), disk(0, 1), loose, Via::Direct), Ok(Done::Plain));
        assert_eq!(store.read(disk(0, 1), frame(1, 3), loose), Ok(Done::Plain), "the cache answers");
        if unevenly {
            device.cut_unevenly();
        } else {
            device.cut();
        }
        drop((store, device));
        let mut store = Store::open(&folder, backend);
        assert_eq!(store.known(), vec![kept.block]);
        store.chunk(1, Access::Pool);
        assert_eq!(store.read(disk(0, 0), frame(1, 2), kept), Ok(Done::Plain));
        assert_eq!(store.payload(frame(1, 2)), payload(1));
        assert_eq!(store.read(disk(0, 1), frame(1, 2), loose), Err(Fault::Checksum));
        // Now by the scan: it may find the uncommitted block's header, and its read must tell.
        drop(store);
        std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
        let store = Store::open(&folder, backend);
        store.media.scan(&mut |_| {}).unwrap();
        assert!(store.known().contains(&kept.block));
    }
}

/// A request that breaks the rules of O_DIRECT or of its buffer must be refused, and harm nobody.
#[test]
fn malformed_requests_are_refused() {
    use terrace_media::{AlignedPages, Device, IoBuffer, IoRequest};
    for backend in BACKENDS {
        let folder = folder();
        let device = Device::open(&folder.path().join("device"), 1 << 21, backend).unwrap();
        let run = |op, bytes, buffer| {
            let (sender, receiver) = mpsc::channel();
            let done = Box::new(move |_: IoBuffer, outcome| sender.send(outcome).unwrap());
            device.submit(IoRequest { op, offset: 0, bytes, buffer, class: IoClass::DecodeFetch, done });
            receiver.recv_timeout(Duration::from_secs(20)).unwrap()
        };
        let pages = || IoBuffer::Pages(AlignedPages::new(4096));
        assert_eq!(run(IoOp::Write, 4096, pages()), Ok(()));
        assert_eq!(run(IoOp::Sync, 0, IoBuffer::Nothing), Ok(()));
        assert_eq!(run(IoOp::Read, 4096, pages()), Ok(()));
        assert_eq!(run(IoOp::Read, 1000, pages()), Err(Fault::Device));
        assert_eq!(run(IoOp::Read, 8192, pages()), Err(Fault::Device));
        assert_eq!(run(IoOp::Write, 0, pages()), Err(Fault::Device));
        assert_eq!(run(IoOp::Write, 4096, IoBuffer::Nothing), Err(Fault::Device));
        assert!(device.facts().writable);
    }
}
