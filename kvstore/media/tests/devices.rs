//! Devices that hang, slow down or come back: what was given to one keeps its
//! memory until it answers, nobody waits for it, and the others do not notice.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use common::*;
use terrace_core::{
    BlockHeader, ByteCount, ChunkId, DeviceId, DiskFrame, Done, Fault, FrameRef, IoClass, OpId, UseStats, Via,
};
use terrace_media::inspect::OfflineDevice;
use terrace_media::{
    Access, Backend, BlockIo, CopyState, DeviceConfig, FaultyDevice, Injected, IoOp, Media, MediaConfig,
    MediaOp, SlowDevice,
};

const IO_PATIENCE: Duration = Duration::from_millis(1500);
const DEVICES: u16 = 3;
/// The one that misbehaves.
const BAD: DeviceId = DeviceId::new(2);

/// Three devices with the same blocks on each, the last of which is wrapped.
struct Three<T> {
    media: Media,
    answers: mpsc::Receiver<(OpId, Result<Done, Fault>)>,
    told: mpsc::Receiver<(DeviceId, bool)>,
    bad: Arc<T>,
    header: BlockHeader,
    next: u64,
    _folder: tempfile::TempDir,
}

impl<T: BlockIo + 'static> Three<T> {
    fn new(backend: Backend, chunks: u64, wrap: fn(Arc<dyn BlockIo>) -> T) -> Self {
        let folder = folder();
        let found = Arc::new(Mutex::new(None));
        let keep = Arc::clone(&found);
        let mut config = MediaConfig {
            devices: (0..DEVICES)
                .map(|n| DeviceConfig { path: folder.path().join(format!("nvme{n}.dat")), slots: 4 })
                .collect(),
            // Two frames at once: what is more has to wait.
            bytes_in_flight_max: ByteCount::new(2 * FRAME_BYTES),
            ..config(&folder, backend)
        };
        config.hooks.io_patience = Some(IO_PATIENCE);
        config.hooks.wrap_device = Some(Box::new(move |device, inner| {
            if device != BAD {
                return inner;
            }
            let wrapped = Arc::new(wrap(inner));
            *keep.lock().unwrap() = Some(Arc::clone(&wrapped));
            wrapped
        }));
        let (sender, answers) = mpsc::channel();
        let complete = Box::new(move |op, outcome| drop(sender.send((op, outcome))));
        let (media, _) = Media::open(config, complete).unwrap();
        let (teller, told) = mpsc::channel();
        media.on_device_change(Box::new(move |device, usable| {
            let _ = teller.send((device, usable));
        }));
        let bytes = payload(1);
        let header = header(1, &bytes);
        let bad = found.lock().unwrap().take().unwrap();
        let mut three = Self { media, answers, told, bad, header, next: 0, _folder: folder };
        for chunk in 1..=chunks {
            let (frame_bytes, frames) = (ByteCount::new(FRAME_BYTES), 16);
            let access = Access::Pool;
            let chunk = ChunkId::new(chunk);
            three.run(|op| MediaOp::CreateChunk { op, chunk, access, frame_bytes, frames });
        }
        three.media.chunk(ChunkId::new(1)).unwrap().copy_in(0, 0, &bytes).unwrap();
        for device in (0..DEVICES).map(DeviceId::new) {
            let (slot, frame_bytes) = (0, ByteCount::new(FRAME_BYTES));
            three.run(|op| MediaOp::CarveSlot { op, device, slot, space: space(), frame_bytes });
            for index in 0..8 {
                let op = three.op();
                three.write(op, device, index);
                assert_eq!(three.answer(), (op, Ok(Done::Plain)));
            }
        }
        three
    }

    fn op(&mut self) -> OpId {
        self.next += 1;
        OpId::new(self.next)
    }

    fn run(&mut self, make: impl FnOnce(OpId) -> MediaOp) {
        let op = self.op();
        self.media.start(make(op));
        let (answered, outcome) = self.answer();
        assert_eq!(answered, op);
        outcome.unwrap();
    }

    fn answer(&self) -> (OpId, Result<Done, Fault>) {
        self.answers.recv_timeout(PATIENCE).expect("an operation was never answered")
    }

    fn target(&self, device: DeviceId, index: u32) -> (DiskFrame, u64) {
        let frame = DiskFrame { device, slot: 0, index };
        (frame, self.media.frame_offset(frame, ByteCount::new(FRAME_BYTES)).unwrap())
    }

    fn write(&self, op: OpId, device: DeviceId, index: u32) {
        let (target, target_offset) = self.target(device, index);
        let (source, header) = (frame(1, 0), self.header);
        let (via, class) = (Via::Direct, IoClass::Persistence);
        self.media.start(MediaOp::Write { op, source, target, target_offset, header, via, class });
    }

    fn read(&self, op: OpId, device: DeviceId, target: FrameRef) {
        let (source, source_offset) = self.target(device, target.index % 8);
        let (expect, class) = (self.header, IoClass::PrefillFetch);
        self.media.start(MediaOp::Read { op, source, source_offset, target, expect, class });
    }

    /// The 99th percentile of `count` reads of the two good devices.
    fn read_good_ones(&mut self, count: u32) -> Duration {
        let mut begun = BTreeMap::new();
        let mut took = Vec::new();
        for number in 0..count {
            let op = self.op();
            begun.insert(op, Instant::now());
            self.read(op, DeviceId::new(u16::from(number % 2 == 0)), frame(1, 8 + number % 4));
            if begun.len() == 4 || number + 1 == count {
                while let Ok((op, outcome)) = self.answers.recv_timeout(PATIENCE) {
                    assert_eq!(outcome, Ok(Done::Plain));
                    took.push(begun.remove(&op).expect("only these run").elapsed());
                    if begun.is_empty() {
                        break;
                    }
                }
            }
        }
        took.sort();
        took[took.len() * 99 / 100]
    }

    fn is_told(&self, usable: bool) {
        assert_eq!(self.told.recv_timeout(PATIENCE), Ok((BAD, usable)), "nobody is told");
    }

    fn condition(&self) -> String {
        self.media.facts().devices[usize::from(BAD.get())].condition.clone()
    }

    fn wait_for(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "{what} never happened: {}", self.condition());
            std::thread::yield_now();
        }
    }
}

/// One device of three hangs. Its reads must not be answered before it does
/// (they own their frames), those that it does not have must be given back, the
/// core must be told, and the other two must be as quick as before. When it
/// answers, late, nothing is lost, and probes bring it back.
#[test]
fn a_device_that_hangs_costs_only_its_own_blocks() {
    for backend in BACKENDS {
        // Large enough that a few stuck frames are no reason to eject it.
        let mut three = Three::new(backend, 13, FaultyDevice::new);
        let before = three.read_good_ones(200);
        three.bad.hold();
        let stuck: Vec<OpId> = (0..6).map(|_| three.op()).collect();
        for (op, index) in stuck.iter().zip(0..) {
            three.read(*op, BAD, frame(2, index));
        }
        // The good ones first find out, then the bad one is given up.
        let during = three.read_good_ones(200);
        assert!(
            during < before * 5 + Duration::from_millis(30),
            "{backend:?}: p99 was {before:?} and is {during:?}"
        );
        three.is_told(false);
        let mut back: Vec<_> = (0..4).map(|_| three.answer()).collect();
        back.sort_by_key(|(op, _)| *op);
        let expected: Vec<_> = stuck[2..].iter().map(|op| (*op, Err(Fault::NotStarted))).collect();
        assert_eq!(back, expected, "what it did not have is given back");
        let refused = three.op();
        three.read(refused, BAD, frame(2, 7));
        assert_eq!(three.answer(), (refused, Err(Fault::NotStarted)), "it is given nothing more");
        assert!(three.condition().contains("no answer to a read"), "{}", three.condition());
        assert!(three.answers.try_recv().is_err(), "the frames of two reads are still the device's");
        three.bad.release();
        let mut late = [three.answer(), three.answer()];
        late.sort_by_key(|(op, _)| *op);
        assert_eq!(late, [(stuck[0], Ok(Done::Plain)), (stuck[1], Ok(Done::Plain))]);
        three.is_told(true);
        let facts = three.media.facts().devices.pop().unwrap();
        assert_eq!((facts.late, facts.queued, facts.usable), (2, 0, true));
        let again = three.op();
        three.read(again, BAD, frame(2, 7));
        assert_eq!(three.answer(), (again, Ok(Done::Plain)));
    }
}

/// A device that keeps more than a hundredth of the pool must never get more,
/// even if it answers probes later.
#[test]
fn a_device_that_keeps_too_much_is_ejected() {
    let mut three = Three::new(Backend::Auto, 2, FaultyDevice::new);
    three.bad.hold();
    let stuck = three.op();
    three.read(stuck, BAD, frame(2, 0));
    three.is_told(false);
    three.wait_for("the ejection", |three| three.condition().contains("ejected"));
    three.bad.release();
    assert_eq!(three.answer(), (stuck, Ok(Done::Plain)), "the late answer gives the frame back");
    let refused = three.op();
    three.read(refused, BAD, frame(2, 0));
    assert_eq!(three.answer(), (refused, Err(Fault::NotStarted)));
    let quick = three.read_good_ones(50);
    assert!(quick < PATIENCE);
    assert!(three.told.try_recv().is_err(), "it is not back");
}

/// A device becomes a hundred times slower: it must be taken out after a few
/// dozen reads, and come back when it is quick again.
#[test]
fn a_hundredfold_slower_device_is_taken_out() {
    let mut three = Three::new(Backend::Auto, 13, SlowDevice::new);
    for index in 0..64 {
        let op = three.op();
        three.read(op, BAD, frame(2, index % 8));
        assert_eq!(three.answer(), (op, Ok(Done::Plain)));
    }
    three.read_good_ones(64);
    three.bad.delay(120_000);
    let mut reads = 0;
    while three.told.try_recv().is_err() {
        let op = three.op();
        three.read(op, BAD, frame(2, reads % 8));
        let (answered, _) = three.answer();
        assert_eq!(answered, op);
        reads += 1;
        assert!(reads < 200, "it is still used: {:?}", three.media.facts().devices);
    }
    assert!(three.condition().contains("times what they took"), "{}", three.condition());
    three.bad.delay(0);
    three.is_told(true);
}

/// A commit waits for a sync that hangs: when its device is taken out, it must be answered as failed.
#[test]
fn a_sync_is_not_waited_for_when_its_device_is_out() {
    let mut three = Three::new(Backend::Auto, 13, FaultyDevice::new);
    three.bad.hold();
    let (commit, read) = (three.op(), three.op());
    let (target, _) = three.target(BAD, 0);
    let began = Instant::now();
    three.media.start(MediaOp::Commit {
        op: commit,
        put: vec![(target, three.header, UseStats::default())],
        delete: vec![],
    });
    three.read(read, BAD, frame(2, 0));
    assert_eq!(three.answer(), (commit, Err(Fault::Device)));
    assert!(began.elapsed() < Duration::from_secs(20), "the sync's own patience is 30 seconds");
    let (good, _) = three.target(DeviceId::new(0), 0);
    let header = three.header;
    three.run(|op| MediaOp::Commit { op, put: vec![(good, header, UseStats::default())], delete: vec![] });
    three.bad.release();
    assert_eq!(three.answer(), (read, Ok(Done::Plain)));
}

/// A space is cleared, and one device never answers the write of its superblock. The commits of all devices wait
/// behind it: they must go on when the patience ends, and the device be taken out. While that write is under way no
/// other may begin, even if the device answers everything else; when it has arrived, the clear is recorded once and whole.
#[test]
fn a_superblock_that_hangs_does_not_stop_commits() {
    let mut three = Three::new(Backend::Auto, 13, FaultyDevice::new);
    three.bad.inject(IoOp::Write, Injected::Hang);
    let (clear, commit) = (three.op(), three.op());
    let ask = |op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 };
    let put = |three: &Three<_>, device| vec![(three.target(device, 0).0, three.header, UseStats::default())];
    three.media.start(ask(clear));
    let good = put(&three, DeviceId::new(0));
    three.media.start(MediaOp::Commit { op: commit, put: good, delete: vec![] });
    let began = Instant::now();
    assert_eq!(three.answer(), (clear, Ok(Done::Plain)), "the two others have recorded it");
    assert_eq!(three.answer(), (commit, Ok(Done::Plain)));
    let took = began.elapsed();
    assert!(took > IO_PATIENCE / 2 && took < IO_PATIENCE + Duration::from_secs(5), "{took:?}");
    three.is_told(false);
    assert!(three.condition().contains("no answer to a write"), "{}", three.condition());
    // Probes are answered.
    three.is_told(true);
    let (again, began) = (three.op(), Instant::now());
    three.media.start(ask(again));
    assert_eq!(three.answer(), (again, Ok(Done::Plain)));
    assert!(began.elapsed() < IO_PATIENCE / 2, "refused at once, and not sent: {:?}", began.elapsed());
    assert_eq!(three.bad.held(), 1);
    let of_bad = put(&three, BAD);
    three.run(|op| MediaOp::Commit { op, put: of_bad, delete: vec![] });
    three.bad.release();
    three.wait_for("the late write", |three| three.media.facts().devices[2].late == 1);
    three.run(ask);
    let Three { media, bad, _folder: folder, .. } = three;
    drop((media, bad));
    for number in 0..DEVICES {
        let device = OfflineDevice::open(&folder.path().join(format!("nvme{number}.dat"))).unwrap();
        let sequences: Vec<_> = device.copies().iter().map(|copy| copy.facts().unwrap().sequence).collect();
        assert_eq!(sequences[0].abs_diff(sequences[1]), 1, "both copies are whole: {sequences:?}");
        let newest = device.copies().iter().filter_map(CopyState::facts).max_by_key(|copy| copy.sequence);
        assert_eq!(newest.unwrap().cleared, [(tenant(), space(), 2)], "device {number}");
    }
}

/// A device fails to write what a clear records, and takes writes again. It could go without until the next clear or
/// start: it must be told with what is written next, whichever device that is for.
#[test]
fn a_device_that_missed_a_clear_is_told_of_it() {
    let mut three = Three::new(Backend::Auto, 13, FaultyDevice::new);
    three.bad.inject(IoOp::Write, Injected::Fail(Fault::Device));
    three.run(|op| MediaOp::ClearSpace { op, space: space(), tenant: tenant(), generation: 2 });
    let written = |three: &Three<_>| three.media.facts().devices[2].write_bytes;
    let before = written(&three);
    let (good, until) = (three.target(DeviceId::new(0), 0).0, Instant::now() + PATIENCE);
    while written(&three) == before {
        let put = vec![(good, three.header, UseStats::default())];
        three.run(|op| MediaOp::Commit { op, put, delete: vec![] });
        assert!(Instant::now() < until, "it was not told: {}", three.condition());
    }
    let Three { media, bad, _folder: folder, .. } = three;
    drop((media, bad));
    let device = OfflineDevice::open(&folder.path().join("nvme2.dat")).unwrap();
    let newest = device.copies().iter().filter_map(CopyState::facts).max_by_key(|copy| copy.sequence);
    assert_eq!(newest.unwrap().cleared, [(tenant(), space(), 2)]);
}

/// A read that nobody wants ends at once if its device does not have it, and goes on if it does.
#[test]
fn only_what_waits_is_cancelled() {
    let mut three = Three::new(Backend::Auto, 13, FaultyDevice::new);
    three.bad.hold();
    let reads: Vec<OpId> = (0..4).map(|_| three.op()).collect();
    for (op, index) in reads.iter().zip(0..) {
        three.read(*op, BAD, frame(2, index));
    }
    three.media.cancel(reads[3], BAD);
    assert_eq!(three.answer(), (reads[3], Err(Fault::NotStarted)));
    three.media.cancel(reads[0], BAD);
    three.media.promote(reads[2], BAD, IoClass::DecodeFetch);
    assert_eq!(three.media.facts().devices[2].waiting, [1, 0, 0, 0, 0, 0], "promoted while it waits");
    three.bad.release();
    let mut rest = [three.answer(), three.answer(), three.answer()];
    rest.sort_by_key(|(op, _)| *op);
    assert!(rest.iter().all(|(_, outcome)| *outcome == Ok(Done::Plain)), "{rest:?}");
}

/// The store is closed while a device hangs: closing must end, and with it every operation that did not begin.
#[test]
fn closing_does_not_wait_for_a_device_that_hangs() {
    let mut three = Three::new(Backend::Auto, 13, FaultyDevice::new);
    three.bad.hold();
    let reads: Vec<OpId> = (0..4).map(|_| three.op()).collect();
    for (op, index) in reads.iter().zip(0..) {
        three.read(*op, BAD, frame(2, index));
    }
    let Three { media, answers, bad, .. } = three;
    let began = Instant::now();
    drop(media);
    assert!(began.elapsed() < Duration::from_secs(20), "closing took {:?}", began.elapsed());
    let ended: Vec<_> = answers.try_iter().collect();
    assert_eq!(ended, [(reads[2], Err(Fault::NotStarted)), (reads[3], Err(Fault::NotStarted))]);
    drop(bad);
}

/// The self-test must measure without touching a block, and leave the file as long as it was.
#[test]
fn the_self_test_measures_and_changes_nothing() {
    for backend in BACKENDS {
        let folder = folder();
        let mut store = Store::open(&folder, backend);
        store.chunk(1, Access::Pool);
        store.carve(3);
        let last = disk(3, 19);
        let header = store.persist(1, last);
        let path = device_path(&folder);
        let length = std::fs::metadata(&path).unwrap().len();
        store.media.start_self_test();
        let until = Instant::now() + PATIENCE;
        let facts = loop {
            let facts = store.media.facts().devices.remove(0);
            if !facts.self_test.is_empty() || !facts.self_test_note.is_empty() {
                break facts;
            }
            assert!(Instant::now() < until, "the self-test does not end");
            std::thread::yield_now();
        };
        assert!(!facts.self_test.is_empty(), "{}", facts.self_test_note);
        for line in &facts.self_test {
            assert!(line.bytes_per_second > 0.0 && line.latency_us > 0.0, "{line:?}");
        }
        eprintln!("{:#?}", facts.self_test);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), length, "the scratch area stays");
        assert_eq!(store.read(last, frame(1, 3), header), Ok(Done::Plain));
        assert_eq!(store.payload(frame(1, 3)), payload(1));
    }
}
